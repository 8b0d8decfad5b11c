//! What became of each path of a store: counted while it goes on, failures kept by their reason.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::nix::store_path::{StoreDir, StorePath};

/// Counts that one store's signing writes and anybody may read meanwhile.
#[derive(Debug, Default)]
pub struct Tally {
    paths: AtomicU64,
    signed: AtomicU64,
    signed_already: AtomicU64,
    content_addressed: AtomicU64,
    gone: AtomicU64,
    failed: AtomicU64,
    failures: Mutex<Vec<Failure>>,
}

/// The counts at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Paths that the store listed.
    pub paths: u64,
    /// Paths that got a signature; when only counting, those that lack one.
    pub signed: u64,
    /// Paths that carried a valid signature by each key before.
    pub signed_already: u64,
    /// Paths that prove themselves.
    pub content_addressed: u64,
    /// Paths that were collected after they had been listed.
    pub gone: u64,
    /// Paths that could not be signed.
    pub failed: u64,
}

/// Paths that failed for one reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The reason, without the path's own name.
    pub reason: String,
    /// How many.
    pub count: u64,
    /// The first of them, by their names.
    pub examples: Vec<StorePath>,
}

/// What became of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Fate {
    Signed,
    SignedAlready,
    ContentAddressed,
    Gone,
}

impl Tally {
    /// Returns the counts as they are now.
    pub fn counts(&self) -> Counts {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Counts {
            paths: read(&self.paths),
            signed: read(&self.signed),
            signed_already: read(&self.signed_already),
            content_addressed: read(&self.content_addressed),
            gone: read(&self.gone),
            failed: read(&self.failed),
        }
    }

    /// Returns the failures by reason, the most frequent first.
    pub fn failures(&self) -> Vec<Failure> {
        let mut failures = self.lock().clone();
        failures.sort_by(|a, b| b.count.cmp(&a.count));
        failures
    }

    pub(super) fn list(&self, paths: u64) {
        self.paths.store(paths, Ordering::Relaxed);
    }

    pub(super) fn settle(&self, fate: Fate) {
        let count = match fate {
            Fate::Signed => &self.signed,
            Fate::SignedAlready => &self.signed_already,
            Fate::ContentAddressed => &self.content_addressed,
            Fate::Gone => &self.gone,
        };
        count.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a failure; the store's words name the path, which would make each reason another.
    pub(super) fn fail(&self, path: StorePath, words: &str, store_dir: &StoreDir) {
        self.failed.fetch_add(1, Ordering::Relaxed);
        let mut reason = words.replace(&store_dir.join(&path), "…");
        let mut failures = self.lock();
        let known = failures.iter().any(|failure| failure.reason == reason);
        if !known && failures.len() >= REASONS_MAX {
            OTHER_REASONS.clone_into(&mut reason);
        }
        match failures.iter_mut().find(|known| known.reason == reason) {
            Some(failure) => {
                failure.count += 1;
                if failure.examples.len() < EXAMPLES_MAX {
                    failure.examples.push(path);
                }
            }
            None => failures.push(Failure {
                reason,
                count: 1,
                examples: vec![path],
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Failure>> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Counts {
    /// Returns how many paths are decided, one way or the other.
    pub fn settled(&self) -> u64 {
        self.signed + self.skipped() + self.failed
    }

    /// Returns how many paths needed nothing.
    pub fn skipped(&self) -> u64 {
        self.signed_already + self.content_addressed + self.gone
    }
}

/// Adds the counts of another store.
impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.paths += other.paths;
        self.signed += other.signed;
        self.signed_already += other.signed_already;
        self.content_addressed += other.content_addressed;
        self.gone += other.gone;
        self.failed += other.failed;
    }
}

/// More reasons than this are one: a store that words each failure anew must not fill the memory.
const REASONS_MAX: usize = 20;
const OTHER_REASONS: &str = "other reasons";

/// Enough to look one up.
const EXAMPLES_MAX: usize = 3;

#[cfg(test)]
mod tests {
    use super::*;

    fn path(place: u64) -> StorePath {
        format!("{place:032}-x").parse().unwrap()
    }

    #[test]
    fn failures_are_kept_by_reason_and_bounded() {
        let (tally, store_dir) = (Tally::default(), StoreDir::default());
        for place in 0..10 {
            let words = format!("path '{}' is locked", store_dir.join(&path(place)));
            tally.fail(path(place), &words, &store_dir);
        }
        let failures = tally.failures();
        assert_eq!(failures.len(), 1);
        assert_eq!(failures[0].reason, "path '…' is locked");
        assert_eq!(failures[0].count, 10);
        assert_eq!(failures[0].examples, [path(0), path(1), path(2)]);

        for place in 0..1000 {
            tally.fail(path(place), &format!("reason {place}"), &store_dir);
        }
        let failures = tally.failures();
        assert_eq!(failures.len(), REASONS_MAX + 1);
        assert_eq!(failures[0].reason, OTHER_REASONS);
        assert_eq!(failures.iter().map(|f| f.count).sum::<u64>(), 1010);
        assert_eq!(tally.counts().failed, 1010);
    }
}
