//! The last bytes of a file that grows, for those who follow closely: they need not be read back.
//!
//! ```text
//! file:  |———————— on disk alone ————————|—— recent, at least 3 MiB ——|
//! ```
//!
//! Whoever lags further behind reads the file, and comes back here once it has caught up.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

/// The last chunks of one file.
#[derive(Debug, Default)]
pub(super) struct Recent(
    // Never held over an await; no other lock is taken under it.
    Mutex<Chunks>,
);

#[derive(Debug, Default)]
struct Chunks {
    /// Where each begins, in order and without gaps.
    chunks: VecDeque<(u64, Bytes)>,
    /// Where the first begins, and where the last ends.
    begin: u64,
    end: u64,
}

impl Recent {
    /// Adds what comes next in the file, and lets the oldest go.
    pub(super) fn add(&self, chunks: &[Bytes]) {
        let mut recent = self.lock();
        for chunk in chunks.iter().filter(|chunk| !chunk.is_empty()) {
            let begin = recent.end;
            recent.end += chunk.len() as u64;
            recent.chunks.push_back((begin, chunk.clone()));
        }
        while let Some((_, first)) = recent.chunks.front() {
            let next = recent.begin + first.len() as u64;
            if recent.end - next < BYTES_MIN {
                break;
            }
            recent.begin = next;
            recent.chunks.pop_front();
        }
    }

    /// Returns what follows a place, as far as it came in one piece and ends at `end`; `None` when it is not
    /// here, any more or yet.
    pub(super) fn at(&self, offset: u64, end: u64) -> Option<Bytes> {
        let recent = self.lock();
        let place = recent.chunks.partition_point(|(begin, _)| *begin <= offset);
        let (begin, chunk) = recent.chunks.get(place.checked_sub(1)?)?;
        let skip = usize::try_from(offset - begin).ok()?;
        let length = usize::try_from(end.checked_sub(*begin)?).unwrap_or(usize::MAX);
        let length = length.min(chunk.len());
        (skip < length).then(|| chunk.slice(skip..length))
    }

    /// Lets all go.
    pub(super) fn clear(&self) {
        let mut recent = self.lock();
        recent.chunks.clear();
        recent.begin = recent.end;
    }

    fn lock(&self) -> MutexGuard<'_, Chunks> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is held of each file while it grows: more than one batch that is being written and one that was, of a large
/// NAR too, of which one that does not compress takes 1.25 MiB.
const BYTES_MIN: u64 = 3 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_last_is_here_and_what_came_long_before_is_not() {
        let recent = Recent::default();
        assert_eq!(recent.at(0, 1), None);
        let chunk = |value: u8| Bytes::from(vec![value; 1 << 20]);
        recent.add(&[chunk(0), Bytes::new(), chunk(1), chunk(2)]);
        recent.add(&[chunk(3), Bytes::from_static(b"abc")]);
        let mib = |count: u64| count << 20;
        assert_eq!(recent.at(0, mib(4)), None, "three MiB came behind it");
        assert_eq!(recent.at(mib(2) - 1, mib(4)).unwrap(), [1][..]);
        assert_eq!(recent.at(mib(3), mib(4)).unwrap(), chunk(3));
        assert_eq!(recent.at(mib(4) + 1, mib(5)).unwrap(), "bc");
        assert_eq!(recent.at(mib(4) + 3, mib(5)), None);
        // As far as is written.
        assert_eq!(recent.at(mib(4), mib(4) + 1).unwrap(), "a");
        assert_eq!(recent.at(mib(4), mib(4)), None);
        assert_eq!(recent.at(mib(4) + 1, mib(3)), None);
        recent.clear();
        assert_eq!(recent.at(mib(4), mib(5)), None);
        recent.add(&[Bytes::from_static(b"d")]);
        assert_eq!(recent.at(mib(4) + 3, mib(5)).unwrap(), "d");
    }

    #[test]
    fn no_more_is_held_than_is_needed() {
        let recent = Recent::default();
        for _ in 0..100 {
            recent.add(&[Bytes::from(vec![0; 256 << 10])]);
        }
        assert_eq!(recent.lock().chunks.len(), 12);
    }
}
