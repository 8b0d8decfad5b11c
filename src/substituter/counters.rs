//! Figures of one running substituter, for people and scripts.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// When counting began.
#[derive(Clone, Copy, Debug)]
pub struct Started(Instant);

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

/// What happened since start.
#[derive(Debug, Default)]
pub struct Counters {
    /// When this substituter started.
    pub started: Started,
    /// Narinfos asked for.
    pub narinfo_requests: Counter,
    /// Narinfos answered from memory.
    pub narinfo_memory_hits: Counter,
    /// Narinfos answered from what was kept on disk.
    pub narinfo_recalled: Counter,
    /// Narinfos found by asking.
    pub narinfo_found: Counter,
    /// Narinfos that nobody has, said with full knowledge.
    pub narinfo_absent: Counter,
    /// The same, said while an upstream could not be asked.
    pub narinfo_absent_unsure: Counter,
    /// Narinfos fetched ahead of being asked for.
    pub narinfo_prefetched: Counter,
    /// NARs begun.
    pub nar_requests: Counter,
    /// NARs served as the files that they are kept in.
    pub nar_kept: Counter,
    /// NARs passed on as the files that their upstreams keep.
    pub nar_passed: Counter,
    /// NARs compressed here.
    pub nar_encoded: Counter,
    /// NAR bytes given out or pulled ahead, before compression.
    pub nar_bytes: Counter,
    /// NARs pulled ahead of being asked for.
    pub nar_ahead: Counter,
    /// Those of them that were asked for.
    pub nar_ahead_claimed: Counter,
    /// Those of them that nobody asked for in time.
    pub nar_ahead_dropped: Counter,
    /// NARs that no holder could give.
    pub nar_absent: Counter,
    /// Times that a NAR went on from another holder.
    pub nar_resumed: Counter,
    /// NARs cut because no holder was left.
    pub nar_cut: Counter,
    /// NARs whose bytes did not fit the narinfo.
    pub nar_corrupt: Counter,
}

impl Counters {
    /// Returns how much was asked for, narinfos and NARs together.
    pub fn requests(&self) -> u64 {
        self.narinfo_requests.value() + self.nar_requests.value()
    }
}

impl Started {
    /// Returns for how long it has been counted.
    pub fn elapsed(&self) -> Duration {
        super::now().saturating_duration_since(self.0)
    }
}

impl Default for Started {
    fn default() -> Self {
        Self(super::now())
    }
}

impl Counter {
    /// Counts one.
    pub fn increment(&self) {
        self.add(1);
    }

    /// Counts `amount`.
    pub fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    /// Returns the count.
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
