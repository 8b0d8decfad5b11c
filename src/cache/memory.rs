//! Answers in memory: finished narinfo texts, bounded by bytes, and for seconds what was not there.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use moka::sync::Cache;
use smallvec::SmallVec;

use crate::nix::hash::NarHash;
use crate::nix::store_path::StorePathHash;

use super::backend::NarFile;
use super::policy::{Freshness, freshness};

/// Narinfos by hash part, and hash parts that nobody had.
pub struct NarInfoCache {
    present: Cache<StorePathHash, Arc<Entry>>,
    absent: Cache<StorePathHash, Instant>,
    options: Options,
}

/// The bounds of a [`NarInfoCache`].
#[derive(Clone, Debug)]
pub struct Options {
    /// Bytes that texts and their keeping may take.
    pub bytes_max: u64,
    /// Age from which a narinfo is asked for again in the background.
    pub revalidate_after: Duration,
    /// How long "nobody has it" is believed; zero: not at all.
    pub negative_ttl: Duration,
}

/// The number of an upstream, given out by the floor above and never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UpstreamId(pub u16);

/// One finished narinfo.
pub struct Entry {
    /// The signed text, ready to be sent.
    pub text: Bytes,
    /// The NAR hash that the text names; what is served under it never changes.
    pub nar_hash: NarHash,
    /// The NAR that is kept here; behind a pointer, as most have none.
    file: Option<Box<NarFile>>,
    /// Upstreams that said they have exactly this NAR, in the order of their answers.
    holders: Mutex<Holders>,
    checked: Checked,
    /// Seconds since the time in `checked` at which a holder was last told to keep the path, plus one; 0: never.
    kept: AtomicU64,
    /// The same of when it was last noted that a client asks for it.
    asked: AtomicU64,
}

/// As many as there mostly are without memory of their own.
type Holders = SmallVec<[UpstreamId; 8]>;

/// When somebody was asked for what an entry says.
#[derive(Clone, Copy, Debug)]
pub enum Checked {
    /// At this time.
    At(Instant),
    /// Before the program started; the time is when it was recalled.
    Earlier(Instant),
}

/// What is known of a hash part.
pub enum Lookup {
    /// A narinfo, and whether to ask again.
    Present(Arc<Entry>, Freshness),
    /// Nobody had it a moment ago.
    Absent,
    /// Nothing.
    Miss,
}

impl NarInfoCache {
    /// Makes an empty cache.
    pub fn new(options: Options) -> Self {
        let weigh = |_: &StorePathHash, entry: &Arc<Entry>| {
            u32::try_from(entry.text.len() + ENTRY_OVERHEAD_BYTES).unwrap_or(u32::MAX)
        };
        let present = Cache::builder()
            .weigher(weigh)
            .max_capacity(options.bytes_max);
        let absent = Cache::builder()
            .max_capacity(ABSENT_ENTRIES_MAX)
            .time_to_live(options.negative_ttl.max(Duration::from_millis(1)));
        Self {
            present: present.build(),
            absent: absent.build(),
            options,
        }
    }

    /// Looks a hash part up.
    pub fn get(&self, hash: StorePathHash, now: Instant) -> Lookup {
        if let Some(entry) = self.present.get(&hash) {
            let freshness = match entry.checked {
                Checked::At(time) => freshness(time, self.options.revalidate_after, now),
                Checked::Earlier(_) => Freshness::Stale,
            };
            return Lookup::Present(entry, freshness);
        }
        let believed =
            |said: Instant| now.saturating_duration_since(said) < self.options.negative_ttl;
        match self.absent.get(&hash) {
            Some(said) if believed(said) => Lookup::Absent,
            _ => Lookup::Miss,
        }
    }

    /// Keeps a narinfo; what was known of its hash part is forgotten.
    pub fn commit(&self, hash: StorePathHash, entry: Arc<Entry>) {
        self.absent.invalidate(&hash);
        self.present.insert(hash, entry);
    }

    /// Remembers for a moment that nobody has this path.
    pub fn commit_absent(&self, hash: StorePathHash, now: Instant) {
        if !self.options.negative_ttl.is_zero() {
            self.absent.insert(hash, now);
        }
    }

    /// Forgets a narinfo.
    pub fn remove(&self, hash: StorePathHash) {
        self.present.invalidate(&hash);
    }

    /// Forgets who has what not, as when there are more upstreams.
    pub fn clear_absent(&self) {
        self.absent.invalidate_all();
    }

    /// Forgets everything, as when keys or upstreams changed.
    pub fn clear(&self) {
        self.present.invalidate_all();
        self.absent.invalidate_all();
    }

    /// Returns the number of narinfos, roughly.
    pub fn len(&self) -> u64 {
        self.present.entry_count()
    }

    /// Tells whether no narinfo is kept, roughly.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Entry {
    /// Makes an entry of a finished text and those who are known to have its NAR.
    pub fn new(
        text: Bytes,
        nar_hash: NarHash,
        file: Option<NarFile>,
        holders: Vec<UpstreamId>,
        checked: Checked,
    ) -> Self {
        Self {
            text,
            nar_hash,
            file: file.map(Box::new),
            holders: Mutex::new(holders.into()),
            checked,
            kept: AtomicU64::new(0),
            asked: AtomicU64::new(0),
        }
    }

    /// Returns the same with another text and file, as when its NAR has been cached.
    pub fn with_file(&self, text: Bytes, file: Option<NarFile>) -> Self {
        Self {
            text,
            nar_hash: self.nar_hash,
            file: file.map(Box::new),
            holders: Mutex::new(self.lock().clone()),
            checked: self.checked,
            kept: AtomicU64::new(self.kept.load(Ordering::Relaxed)),
            asked: AtomicU64::new(self.asked.load(Ordering::Relaxed)),
        }
    }

    /// Returns the known holders, in the order of their answers.
    pub fn holders(&self) -> Vec<UpstreamId> {
        self.lock().to_vec()
    }

    /// Returns the NAR that is kept here, which the text then names; nothing is kept under it but these bytes.
    pub fn file(&self) -> Option<NarFile> {
        self.file.as_deref().copied()
    }

    /// Records a further holder of exactly this NAR; `false` when it was known.
    pub fn add_holder(&self, holder: UpstreamId) -> bool {
        let mut holders = self.lock();
        let new = !holders.contains(&holder);
        if new {
            holders.push(holder);
        }
        new
    }

    /// Forgets a holder; `true` when nobody has the NAR any more, not even we.
    pub fn remove_holder(&self, holder: UpstreamId) -> bool {
        let mut holders = self.lock();
        holders.retain(|h| *h != holder);
        holders.is_empty() && self.file.is_none()
    }

    /// Tells whether it is time to have the path kept alive, and notes that it is done.
    ///
    /// True for one caller in each `interval`.
    pub fn keep_is_due(&self, interval: Duration, now: Instant) -> bool {
        self.is_due(&self.kept, interval, now)
    }

    /// Tells whether it is time to note that a client asks for this, and notes that it is done.
    ///
    /// True for one caller in each `interval`.
    pub fn asking_is_news(&self, interval: Duration, now: Instant) -> bool {
        self.is_due(&self.asked, interval, now)
    }

    fn is_due(&self, last: &AtomicU64, interval: Duration, now: Instant) -> bool {
        let (Checked::At(since) | Checked::Earlier(since)) = self.checked;
        let seconds = now.saturating_duration_since(since).as_secs() + 1;
        let done = last.load(Ordering::Relaxed);
        let due = done == 0 || seconds.saturating_sub(done) >= interval.as_secs().max(1);
        due && last
            .compare_exchange(done, seconds, Ordering::Relaxed, Ordering::Relaxed)
            .is_ok()
    }

    fn lock(&self) -> MutexGuard<'_, Holders> {
        self.holders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What an entry takes beside its text: itself, its holders and moka's own nodes.
const ENTRY_OVERHEAD_BYTES: usize = 400;
/// About 10 MB of hash parts.
const ABSENT_ENTRIES_MAX: u64 = 100_000;

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(negative_ttl: Duration) -> NarInfoCache {
        NarInfoCache::new(Options {
            bytes_max: 1 << 20,
            revalidate_after: Duration::from_secs(60),
            negative_ttl,
        })
    }

    fn entry(text: &str, now: Instant) -> Arc<Entry> {
        let text = Bytes::copy_from_slice(text.as_bytes());
        let holders = vec![UpstreamId(0)];
        let nar_hash = NarHash::of(b"");
        Arc::new(Entry::new(text, nar_hash, None, holders, Checked::At(now)))
    }

    #[test]
    fn a_no_is_believed_for_its_time_and_a_yes_ends_it() {
        let cache = cache(Duration::from_secs(3));
        let (hash, now) = (StorePathHash([1; 20]), Instant::now());
        cache.commit_absent(hash, now);
        let later = now + Duration::from_secs(4);
        assert!(matches!(cache.get(hash, now), Lookup::Absent));
        assert!(matches!(cache.get(hash, later), Lookup::Miss));
        cache.commit(hash, entry("x", now));
        assert!(matches!(
            cache.get(hash, now),
            Lookup::Present(_, Freshness::Fresh)
        ));
        cache.remove(hash);
        assert!(matches!(cache.get(hash, now), Lookup::Miss));
    }

    #[test]
    fn the_bytes_are_bounded() {
        let cache = cache(Duration::ZERO);
        let now = Instant::now();
        let text = "x".repeat(1000);
        for number in 0..5000_u32 {
            let mut hash = [0; 20];
            hash[..4].copy_from_slice(&number.to_le_bytes());
            cache.commit(StorePathHash(hash), entry(&text, now));
        }
        cache.present.run_pending_tasks();
        assert!(cache.present.weighted_size() <= 1 << 20);
        assert!(!cache.is_empty());
    }

    #[test]
    fn keeping_is_due_once_in_each_interval() {
        let now = Instant::now();
        let entry = entry("x", now);
        let interval = Duration::from_secs(10);
        assert!(entry.keep_is_due(interval, now));
        assert!(!entry.keep_is_due(interval, now + Duration::from_secs(9)));
        assert!(entry.keep_is_due(interval, now + Duration::from_secs(10)));
    }
}
