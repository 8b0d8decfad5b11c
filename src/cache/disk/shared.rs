//! What the callers, the writer and the background pass of one cache on disk share.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tracing::{info, warn};

use super::super::backend::{Error, Record, Sign, Stats};
use super::super::nar_name::NarName;
use super::super::stamp::{Content, Stamp};
use super::Options;
use super::denials::Denials;
use super::folder::Folder;
use super::foreign::Foreign;
use super::index::{Index, IndexError, Totals};
use super::judged::Judged;
use super::queue::Queue;
use super::space::Lacking;
use super::text::{self, TextError};
use crate::nix::cache_info::CacheInfo;
use crate::nix::signature::PublicKey;
use crate::nix::store_path::StorePathHash;

/// The state of one cache on disk.
pub struct Shared {
    /// Its bounds.
    pub options: Options,
    /// Its places.
    pub folder: Folder,
    /// What the writer has to do.
    pub queue: Queue,
    /// `None` while it cannot be used; the narinfos in the folder stand in for it.
    // Held for the moment of cloning alone.
    index: RwLock<Option<Arc<Index>>>,
    /// Whether this process may read the folder: false while another one writes in it.
    pub readable: AtomicBool,
    /// Whether all narinfos of the folder are in the index.
    pub reconciled: AtomicBool,
    // No other lock is taken under it.
    degraded: Mutex<Option<Degraded>>,
    /// As of the last write of the index.
    totals: Mutex<Totals>,
    /// What upstreams deny and the index is yet to forget.
    pub denials: Denials,
    /// What was found of files and the index is yet to know.
    pub judged: Judged,
    /// What the background pass has met that is none of ours.
    pub foreign: Foreign,
    /// Who signs now. Held for the moment of cloning alone.
    signing: RwLock<Option<Arc<Signing>>>,
    /// Background passes that began. No other lock is taken under it.
    passes: Mutex<Vec<JoinHandle<()>>>,
    reserved: AtomicU64,
    /// What the file system is to have of our bytes.
    pub lacking: Mutex<Lacking>,
    clock: AtomicU64,
    /// Counts since the start.
    pub counts: Counts,
}

/// What came to pass since the start.
#[derive(Debug, Default)]
pub struct Counts {
    /// Fills that were committed.
    pub fills: AtomicU64,
    /// Entries that made room.
    pub evictions: AtomicU64,
    /// Entries that were found wrong.
    pub corrupt: AtomicU64,
}

/// Who signs what others may read of the folder.
pub struct Signing {
    /// Counts from 1; a later one ends the passes of the earlier.
    pub generation: u64,
    /// By these, narinfos of the folder are known again.
    pub keys: Vec<PublicKey>,
    /// Stands for who is believed.
    pub trust: String,
    /// Makes the signatures.
    pub sign: Arc<Sign<'static>>,
}

impl Signing {
    /// Stands for the signatures that narinfos carry: one key a line, in an order that does not depend on the
    /// configuration's, and the trust. Where it is another, they must be looked through.
    pub fn mark(&self) -> String {
        let mut lines: Vec<_> = self.keys.iter().map(|key| format!("{key}\n")).collect();
        lines.sort_unstable();
        lines.push(format!("trust {}\n", self.trust));
        lines.concat()
    }
}

struct Degraded {
    cause: String,
    retry_at: Instant,
}

/// Bytes that a running fill may take; dropped, they are free.
pub struct Reservation {
    shared: Arc<Shared>,
    bytes: u64,
}

impl Shared {
    /// Makes the state of a folder that was not looked at yet.
    pub fn new(folder: Folder, options: Options) -> Self {
        Self {
            queue: Queue::new(options.queue_max),
            judged: Judged::new(options.queue_max),
            denials: Denials::new(options.queue_max),
            foreign: Foreign::default(),
            options,
            folder,
            index: RwLock::new(None),
            readable: AtomicBool::new(false),
            reconciled: AtomicBool::new(false),
            degraded: Mutex::default(),
            totals: Mutex::default(),
            signing: RwLock::new(None),
            passes: Mutex::default(),
            reserved: AtomicU64::new(0),
            lacking: Mutex::default(),
            clock: AtomicU64::new(0),
            counts: Counts::default(),
        }
    }

    /// Returns what `nix-cache-info` is to say.
    pub fn cache_info(&self) -> CacheInfo {
        CacheInfo {
            store_dir: self.options.store_dir.clone(),
            want_mass_query: self.options.want_mass_query,
            priority: self.options.priority,
        }
    }

    /// Returns the index while it can be used.
    pub fn index(&self) -> Option<Arc<Index>> {
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        index.clone()
    }

    /// Begins or ends the use of an index.
    pub fn set_index(&self, index: Option<Index>) {
        if let Some(totals) = index.as_ref().and_then(|index| index.totals().ok()) {
            self.set_totals(totals);
        }
        let mut place = self.index.write().unwrap_or_else(PoisonError::into_inner);
        *place = index.map(Arc::new);
    }

    /// Takes over what the index counts after a write.
    pub fn set_totals(&self, totals: Totals) {
        *lock(&self.totals) = totals;
    }

    /// Begins a background pass in a thread of its own, which ends soon after the queue was stopped.
    pub fn start(&self, name: &str, pass: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let mut passes = lock(&self.passes);
        passes.retain(|pass| !pass.is_finished());
        let builder = std::thread::Builder::new().name(name.to_owned());
        passes.push(builder.spawn(pass)?);
        Ok(())
    }

    /// Waits until nobody uses the index any more, after the queue was stopped: until then its file is locked.
    pub fn close(&self) {
        let passes = std::mem::take(&mut *lock(&self.passes));
        for pass in passes {
            if pass.join().is_err() {
                warn!("a background pass of the cache ended by a panic");
            }
        }
        let index = self.index();
        self.set_index(None);
        // Who just looks something up is done in microseconds.
        for _ in 0..CLOSE_TRIES {
            if index.as_ref().is_none_or(|i| Arc::strong_count(i) == 1) {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Returns what is known of a path: by the index, or by its narinfo while that is not all in.
    pub fn known(&self, hash: StorePathHash) -> Option<Record> {
        let denied = self.denials.of(hash);
        let mut record = self.listed(hash)?;
        if record
            .name()
            .is_some_and(|name| self.judged.is_wrong(&name))
        {
            record.file = None;
        }
        denied.leave(record)
    }

    /// Tells whether a file is as it was when its content was checked.
    pub fn content(&self, name: &NarName, file: &File) -> Content {
        let Some(found) = file.metadata().ok().and_then(|found| Stamp::of(&found)) else {
            return Content::Unknown(None);
        };
        let hash = name.path_hash;
        let is_proven = self.judged.right(hash) == Some(found);
        let is_noted = || {
            let index = self.index()?;
            index.stamp(hash).ok()?
        };
        if is_proven || is_noted() == Some(found) {
            return Content::Unchanged;
        }
        Content::Unknown(found.tells_from(SystemTime::now()).then_some(found))
    }

    /// Returns what the index or the folder says of a path, whatever waits for the writer.
    pub fn listed(&self, hash: StorePathHash) -> Option<Record> {
        if !self.readable.load(Ordering::Acquire) {
            return None;
        }
        let index = self.index();
        match index.as_ref().map(|index| index.get(hash)) {
            Some(Ok(Some(record))) if record.file.is_some() => return Some(record),
            Some(Ok(found)) if self.reconciled.load(Ordering::Acquire) => return found,
            Some(Ok(found)) => return self.in_folder(hash).or(found),
            Some(Err(error)) => self.index_failed(&error),
            None => {}
        }
        self.in_folder(hash)
    }

    /// Reads a narinfo of the folder; `None` unless it and its NAR check.
    fn in_folder(&self, hash: StorePathHash) -> Option<Record> {
        let text = self.folder.read_narinfo(hash).ok()??;
        self.check(hash, &text).ok()
    }

    /// Checks a narinfo of the folder: whose it is, and that its NAR has the promised size.
    pub fn check(&self, hash: StorePathHash, text: &str) -> Result<Record, TextError> {
        let signing = self.signing();
        let keys = signing.as_ref().map_or(&self.options.keys, |s| &s.keys);
        let record = text::read_file(text, keys, &self.options.store_dir)?;
        let malformed = |cause: &str| TextError::Malformed(cause.to_owned());
        if record.info.path.hash() != hash {
            return Err(malformed("it is of another path"));
        }
        let (name, file) = record.name().zip(record.file).ok_or(TextError::Unsigned)?;
        match self.folder.open_nar(&name) {
            Ok((_, size)) if size == file.size_bytes => Ok(record),
            Ok((_, size)) => Err(malformed(&format!(
                "its nar has {size} of {} bytes",
                file.size_bytes
            ))),
            Err(error) if is_of_the_file(&error) => Err(malformed(&format!("its nar: {error}"))),
            Err(error) => Err(TextError::Unknown(error.to_string())),
        }
    }

    /// Returns who signs now; `None`: as when the cache was opened.
    pub fn signing(&self) -> Option<Arc<Signing>> {
        let signing = self.signing.read();
        signing.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Lets others sign from now on.
    pub fn sign_with(&self, keys: Vec<PublicKey>, trust: String, sign: Arc<Sign<'static>>) {
        let mut signing = self.signing.write().unwrap_or_else(PoisonError::into_inner);
        let generation = signing.as_ref().map_or(0, |s| s.generation) + 1;
        *signing = Some(Arc::new(Signing {
            generation,
            keys,
            trust,
            sign,
        }));
    }

    /// Gives the index up until it can be opened anew, and says why.
    pub fn index_failed(&self, error: &IndexError) {
        let mut place = self.index.write().unwrap_or_else(PoisonError::into_inner);
        if place.take().is_some() {
            drop(place);
            let path = self.folder.index();
            self.degrade(format!("{}: {error}", path.display()));
        }
    }

    /// Returns why nothing can be written, where that is so.
    pub fn degraded(&self) -> Option<String> {
        lock(&self.degraded).as_ref().map(|d| d.cause.clone())
    }

    /// Notes that nothing can be written until a pause is over; each cause is said once.
    pub fn degrade(&self, cause: String) {
        let mut degraded = lock(&self.degraded);
        let known = degraded.as_ref().is_some_and(|d| d.cause == cause);
        if !known {
            let dir = self.folder.root().display();
            warn!(%dir, cause, "the cache cannot be written, serving goes on without");
        }
        *degraded = Some(Degraded {
            cause,
            retry_at: Instant::now() + self.options.retry_after,
        });
    }

    /// Tells whether the pause after a failure is over.
    pub fn retry_is_due(&self, now: Instant) -> bool {
        lock(&self.degraded)
            .as_ref()
            .is_some_and(|degraded| now >= degraded.retry_at)
    }

    /// Notes that the folder can be written again; tells whether it could not before.
    pub fn recover(&self) -> bool {
        let recovered = lock(&self.degraded).take().is_some();
        if recovered {
            let dir = self.folder.root().display();
            info!(%dir, "the cache can be written again");
        }
        recovered
    }

    /// Notes an error of the file system; one that concerns all entries degrades the cache.
    pub fn note_failure(&self, what: &str, error: &io::Error) {
        if concerns_all(error) {
            self.degrade(format!("{what}: {error}"));
        }
    }

    /// Returns a time in microseconds since 1970 that is later than all before.
    pub fn tick(&self) -> u64 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(0, |now| u64::try_from(now.as_micros()).unwrap_or(0));
        let next = |last: u64| Some(now.max(last + 1));
        let last = self
            .clock
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
        now.max(last.unwrap_or_default() + 1)
    }

    /// Lets the clock go on from the last use of an earlier process.
    pub fn advance_clock(&self, last: u64) {
        self.clock.fetch_max(last, Ordering::Relaxed);
    }

    /// Returns by how many bytes entries and running fills are over the bound.
    pub fn bytes_over(&self) -> u64 {
        // Who sees a reservation sees the uses that were noted before it, too.
        let bytes = lock(&self.totals).bytes + self.reserved.load(Ordering::Acquire);
        bytes.saturating_sub(self.options.bytes_max)
    }

    /// Sets bytes aside for a fill; the writer makes room for them.
    pub fn reserve(self: &Arc<Self>, bytes: u64) -> Result<Reservation, Error> {
        let mut reservation = Reservation {
            shared: Arc::clone(self),
            bytes: 0,
        };
        match reservation.grow(bytes) {
            true => Ok(reservation),
            false => Err(Error::Full),
        }
    }

    /// Returns how much is kept, and whether all is well.
    pub fn stats(&self) -> Stats {
        let Totals {
            entries,
            bytes,
            look_ups,
        } = *lock(&self.totals);
        let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Stats {
            entries,
            bytes,
            bytes_reserved: count(&self.reserved),
            bytes_max: self.options.bytes_max,
            look_ups,
            fills: count(&self.counts.fills),
            evictions: count(&self.counts.evictions),
            corrupt: count(&self.counts.corrupt),
            degraded: self.degraded(),
        }
    }
}

impl Reservation {
    /// Returns how much is set aside.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Sets aside `bytes` in all; `false`, and nothing changes, when running fills have everything.
    pub fn grow(&mut self, bytes: u64) -> bool {
        let more = bytes.saturating_sub(self.bytes);
        if more == 0 {
            return true;
        }
        let max = self.shared.options.bytes_max;
        let add = |reserved: u64| reserved.checked_add(more).filter(|sum| *sum <= max);
        let reserved = &self.shared.reserved;
        let added = reserved.fetch_update(Ordering::AcqRel, Ordering::Relaxed, add);
        if added.is_ok() {
            self.bytes += more;
            if self.shared.bytes_over() > 0 {
                self.shared.queue.wake();
            }
        }
        added.is_ok()
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.shared
            .reserved
            .fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Tells an error of the whole folder from one of a single file in it.
pub fn concerns_all(error: &io::Error) -> bool {
    use io::ErrorKind::{
        NotFound, PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull,
    };
    let kinds = [
        NotFound,
        PermissionDenied,
        QuotaExceeded,
        ReadOnlyFilesystem,
        StorageFull,
    ];
    let hardware = rustix::io::Errno::from_io_error(error) == Some(rustix::io::Errno::IO);
    kinds.contains(&error.kind()) || hardware
}

/// Tells an error of this entry from one that may pass, such as too many open files.
pub fn is_of_the_file(error: &io::Error) -> bool {
    use io::ErrorKind::{InvalidData, NotFound};
    let kinds = [NotFound, InvalidData];
    let hardware = rustix::io::Errno::from_io_error(error) == Some(rustix::io::Errno::IO);
    kinds.contains(&error.kind()) || hardware
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Milliseconds.
const CLOSE_TRIES: u32 = 1000;
