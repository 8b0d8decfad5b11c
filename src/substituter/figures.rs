//! What was seen of one upstream: how quickly it answers, what it gave, what went wrong last.
//!
//! Figures only: who is waited for is `health`'s.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};

use crate::upstream::{Error, Link, NarStream};

/// Figures of one upstream since it was taken in.
#[derive(Debug, Default)]
pub struct Figures {
    /// Look-ups by clients that it was asked.
    pub asked: AtomicU64,
    /// Those that it answered with a path, and was believed.
    pub hits: AtomicU64,
    /// NARs that it began to give.
    pub nars: AtomicU64,
    bytes: Arc<AtomicU64>,
    // Never held over an await; no other lock is taken under it.
    recent: Mutex<Recent>,
}

/// An error and when it was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LastError {
    /// Its text.
    pub text: Arc<str>,
    /// When.
    pub at: Instant,
}

#[derive(Debug, Default)]
struct Recent {
    /// Of answered look-ups, the latest last. Bounded by `LATENCIES_MAX`.
    latencies: VecDeque<Duration>,
    last_error: Option<LastError>,
    /// The failed attempt that was seen last, and when.
    attempt: Option<(Arc<str>, Duration, Instant)>,
}

impl Figures {
    /// Notes how long an answered look-up took.
    pub fn answered(&self, took: Duration) {
        let mut recent = self.recent();
        if recent.latencies.len() == LATENCIES_MAX {
            recent.latencies.pop_front();
        }
        recent.latencies.push_back(took);
    }

    /// Notes that a question failed.
    pub fn failed(&self, error: &Error, now: Instant) {
        self.recent().last_error = Some(LastError {
            text: error.to_string().into(),
            at: now,
        });
    }

    /// Notes the state of the connection, to know since when an attempt has failed.
    pub fn observe(&self, link: &Link, now: Instant) {
        let mut recent = self.recent();
        match link {
            Link::Down { error, retry_after } => {
                let seen = |(e, r, _): &(Arc<str>, Duration, Instant)| {
                    Arc::ptr_eq(e, error) && r == retry_after
                };
                if !recent.attempt.as_ref().is_some_and(seen) {
                    recent.attempt = Some((Arc::clone(error), *retry_after, now));
                    recent.last_error = Some(LastError {
                        text: Arc::clone(error),
                        at: now,
                    });
                }
            }
            Link::Connecting { .. } | Link::Up { .. } => recent.attempt = None,
        }
    }

    /// Returns the median of the latest look-ups' times; `None`: none was answered yet.
    pub fn latency(&self) -> Option<Duration> {
        let mut latencies: Vec<_> = self.recent().latencies.iter().copied().collect();
        latencies.sort_unstable();
        latencies.get(latencies.len() / 2).copied()
    }

    /// Returns the last error of a question or of connecting.
    pub fn last_error(&self) -> Option<LastError> {
        self.recent().last_error.clone()
    }

    /// Returns the time until it is connected to anew; `None`: it is not waiting for that.
    pub fn retry_in(&self, now: Instant) -> Option<Duration> {
        let recent = self.recent();
        let (_, retry_after, at) = recent.attempt.as_ref()?;
        Some((*at + *retry_after).saturating_duration_since(now))
    }

    /// Returns the bytes of NARs that it gave, before compression.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Counts a NAR and the bytes of it that are read.
    pub fn count(&self, nar: NarStream) -> NarStream {
        self.nars.fetch_add(1, Ordering::Relaxed);
        let bytes = Arc::clone(&self.bytes);
        Counted { nar, bytes }.boxed()
    }

    fn recent(&self) -> MutexGuard<'_, Recent> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Counted {
    nar: NarStream,
    bytes: Arc<AtomicU64>,
}

impl Stream for Counted {
    type Item = Result<Bytes, Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let polled = self.nar.poll_next_unpin(context);
        if let Poll::Ready(Some(Ok(chunk))) = &polled {
            let length = u64::try_from(chunk.len()).unwrap_or(u64::MAX);
            self.bytes.fetch_add(length, Ordering::Relaxed);
        }
        polled
    }
}

/// Look-ups that the median is taken of: a minute of a busy build, so that it follows the line.
const LATENCIES_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_of_the_latest() {
        let figures = Figures::default();
        assert_eq!(figures.latency(), None);
        for ms in [3, 900, 1] {
            figures.answered(Duration::from_millis(ms));
        }
        assert_eq!(figures.latency(), Some(Duration::from_millis(3)));
        for _ in 0..LATENCIES_MAX {
            figures.answered(Duration::from_millis(7));
        }
        assert_eq!(figures.latency(), Some(Duration::from_millis(7)));
    }

    #[test]
    fn the_pause_counts_down_from_when_it_was_seen_first() {
        let (figures, now) = (Figures::default(), Instant::now());
        let after = |ms| now + Duration::from_millis(ms);
        let error: Arc<str> = "refused".into();
        let down = |error: &Arc<str>, ms| Link::Down {
            error: Arc::clone(error),
            retry_after: Duration::from_millis(ms),
        };
        assert_eq!(figures.retry_in(now), None);
        figures.observe(&down(&error, 1000), now);
        figures.observe(&down(&error, 1000), after(400));
        assert_eq!(
            figures.retry_in(after(400)),
            Some(Duration::from_millis(600))
        );
        assert_eq!(figures.retry_in(after(1500)), Some(Duration::ZERO));
        figures.observe(&down(&error, 2000), after(1500));
        assert_eq!(figures.retry_in(after(1500)), Some(Duration::from_secs(2)));
        assert_eq!(figures.last_error().map(|last| last.at), Some(after(1500)));
        figures.observe(&Link::Up { peer: "Nix".into() }, after(1600));
        assert_eq!(figures.retry_in(after(1600)), None);
        let last = figures.last_error().map(|last| last.text);
        assert_eq!(
            last.as_deref(),
            Some("refused"),
            "it is told afterwards, too"
        );
    }
}
