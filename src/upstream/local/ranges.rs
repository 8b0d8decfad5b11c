//! How many rows of the database begin with which two digits of a hash part.
//!
//! Which rows are gone, SQLite cannot tell; but it counts those of a range in the index over paths quickly. So
//! only the ranges whose count is another one are read again: of a million paths a thousand, not all.

use rusqlite::types::{ToSqlOutput, ValueRef};

use crate::nix::base32::ALPHABET;
use crate::nix::store_path::{StoreDir, StorePathHash};

/// The rows of each range, as far as they are known. Together the ranges hold every text.
pub(super) struct Ranges {
    /// Where each begins, in the order of the index; the first with the empty text.
    begins: Vec<String>,
    rows: Vec<i64>,
}

/// Texts from one to before another; the last range has no end.
pub(super) struct Range<'r> {
    /// Its place among all.
    pub(super) place: usize,
    begin: &'r str,
    end: Option<&'r str>,
}

impl Ranges {
    /// Divides what lies in a store directory.
    pub(super) fn new(store_dir: &StoreDir) -> Self {
        let digits = || ALPHABET.iter().map(|digit| char::from(*digit));
        let pairs = digits().flat_map(|first| digits().map(move |second| (first, second)));
        let mut begins: Vec<_> = pairs
            .map(|(first, second)| format!("{store_dir}/{first}{second}"))
            .collect();
        if let Some(first) = begins.first_mut() {
            first.clear();
        }
        let rows = vec![0; begins.len()];
        Self { begins, rows }
    }

    /// Forgets all rows.
    pub(super) fn clear(&mut self) {
        self.rows.fill(0);
    }

    /// Counts a row in.
    pub(super) fn add(&mut self, place: usize) {
        if let Some(rows) = self.rows.get_mut(place) {
            *rows += 1;
        }
    }

    /// Returns all ranges with the rows that each should have.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Range<'_>, i64)> {
        let ends = self.begins.iter().skip(1).map(|end| Some(end.as_str()));
        let bounds = self.begins.iter().zip(ends.chain([None])).enumerate();
        let ranges = bounds.map(|(place, (begin, end))| Range { place, begin, end });
        ranges.zip(self.rows.iter().copied())
    }

    /// Corrects how many rows a range has.
    pub(super) fn set(&mut self, place: usize, count: usize) {
        if let Some(rows) = self.rows.get_mut(place) {
            *rows = i64::try_from(count).unwrap_or(i64::MAX);
        }
    }

    /// Returns the range of a path as it stands in the database.
    pub(super) fn of_text(&self, path: &[u8]) -> usize {
        let after = self.begins.partition_point(|b| b.as_bytes() <= path);
        after.saturating_sub(1)
    }
}

impl Range<'_> {
    /// What `path >= ?1 and path < ?2` is asked with. A blob is behind all texts.
    pub(super) fn bounds(&self) -> [ToSqlOutput<'_>; 2] {
        let end = self.end.map_or(ValueRef::Blob(&[]), ValueRef::from);
        [ValueRef::from(self.begin), end].map(ToSqlOutput::Borrowed)
    }
}

/// Returns the range of a path of the store directory: the first two digits are its last bits.
pub(super) fn of_hash(hash: &StorePathHash) -> usize {
    let [.., low, high] = hash.0;
    usize::from(high) << 2 | usize::from(low) >> 6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_and_its_text_lie_in_the_same_range() {
        let store_dir = StoreDir::default();
        let ranges = Ranges::new(&store_dir);
        let mut random = fastrand::Rng::with_seed(1);
        for _ in 0..10_000 {
            let mut hash = StorePathHash([0; 20]);
            random.fill(&mut hash.0);
            let place = of_hash(&hash);
            let text = format!("{store_dir}/{hash}-name");
            assert_eq!(ranges.of_text(text.as_bytes()), place, "{text}");
            let (range, _) = ranges.iter().nth(place).unwrap();
            assert!(*range.begin <= *text && range.end.is_none_or(|end| *text < *end));
        }
    }

    #[test]
    fn every_text_has_a_range() {
        let ranges = Ranges::new(&StoreDir::default());
        assert_eq!(ranges.iter().count(), 1024);
        for (text, place) in [
            ("", 0),
            ("/nix/store/", 0),
            ("/nix/store/00", 0),
            ("/nix/store/0e", 13),
            ("/nix/store/zz", 1023),
            ("/other", 1023),
        ] {
            assert_eq!(ranges.of_text(text.as_bytes()), place, "{text}");
        }
    }
}
