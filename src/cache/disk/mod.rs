//! The cache on disk: a folder that is a binary cache by itself, and an index beside it.
//!
//! ```text
//! folder    names, lock, files              text      narinfos with grounds of trust
//! index     what is known, order of use     queue     what the writer has to do
//! place     a running fill                  writer    the one thread that changes anything
//! commit    group commit                    removal   eviction and removal
//! reconcile the background pass at start    shared    state, and whether all is well
//! judged    files found right or wrong        denials   look-ups that hold no more
//! upkeep    what `muster cache` does        verify    whether one NAR is right
//! resign    narinfos after a change of keys  signing  its background pass
//! owner     whose the files are
//! ```
//!
//! Opening never fails and never scans: a folder that cannot be used is a degraded cache, which is
//! tried again after a pause. kill -9 at any moment leaves whole entries only.

mod commit;
mod denials;
pub mod folder;
mod foreign;
pub mod index;
mod judged;
mod owner;
mod place;
mod queue;
mod reconcile;
pub mod removal;
pub mod resign;
#[cfg(test)]
mod samples;
mod shared;
mod signing;
mod space;
pub mod text;
pub mod upkeep;
pub mod verify;
mod writer;

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::sync::oneshot;
use tracing::warn;

use super::backend::{Backend, Error, OpenNar, Record, Sign, Stats};
use super::fill::Fill;
use super::nar_name::NarName;
use super::stamp::Stamp;
use crate::nix::hash::NarHash;
use crate::nix::signature::PublicKey;
use crate::nix::store_path::{StoreDir, StorePathHash};
use folder::Folder;
use place::OnDisk;
use queue::{Denial, Task};
use shared::{Shared, is_of_the_file};
use writer::Writer;

/// The bounds of a cache on disk, and whose it is.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bytes that NAR files may take, those of running fills too. The index, about 2 kB an entry,
    /// and the narinfos are not counted.
    pub bytes_max: u64,
    /// The directory of all store paths; a folder that holds those of another one is not touched.
    pub store_dir: StoreDir,
    /// The keys that sign now: narinfos that are not in the index count by them.
    pub keys: Vec<PublicKey>,
    /// What `nix-cache-info` says, for whoever serves the folder: its place among substituters.
    pub priority: u32,
    /// And whether it may be asked for many paths at once.
    pub want_mass_query: bool,
    /// Paths that are known without their NAR, at most: about 500 MB of index.
    pub look_ups_max: u64,
    /// Look-ups, denials and uses that wait for the writer, of each: some MB. Further look-ups and uses are dropped;
    /// a further denial drops all look-ups, because none that was denied may come back.
    pub queue_max: usize,
    /// How long a folder that cannot be written is left alone before it is tried again.
    pub retry_after: Duration,
    /// Bytes that are left to others on the file system, for the index, too.
    pub free_bytes_min: u64,
    /// Memory for the pages of the index.
    pub index_cache_bytes: usize,
}

/// A cache in a folder; dropped, the writer ends after what waits.
pub struct DiskCache {
    shared: Arc<Shared>,
    writer: Mutex<Option<std::thread::JoinHandle<()>>>,
}

impl Options {
    /// Takes the usual bounds.
    pub fn new(bytes_max: u64, store_dir: StoreDir, keys: Vec<PublicKey>) -> Self {
        Self {
            bytes_max,
            store_dir,
            keys,
            priority: 30,
            want_mass_query: true,
            look_ups_max: 250_000,
            queue_max: 8192,
            retry_after: Duration::from_secs(30),
            free_bytes_min: 64 << 20,
            index_cache_bytes: 2 << 20,
        }
    }
}

impl DiskCache {
    /// Opens the cache in a folder, which is made if it is not there.
    ///
    /// It always succeeds: [`Stats::degraded`] says what is wrong with the folder, and so does the log,
    /// once. It takes milliseconds, whatever the number of entries.
    pub fn open(dir: impl Into<PathBuf>, options: Options) -> Self {
        let shared = Arc::new(Shared::new(Folder::new(dir.into()), options));
        let writer = Writer::open(Arc::clone(&shared));
        let started = std::thread::Builder::new()
            .name("cache-writer".to_owned())
            .spawn(move || writer.run());
        let writer = match started {
            Ok(handle) => Some(handle),
            Err(error) => {
                shared.queue.stop();
                shared.degrade(format!("no thread for the writer: {error}"));
                None
            }
        };
        Self {
            shared,
            writer: Mutex::new(writer),
        }
    }

    /// Returns when everything that waits is written and room is made.
    ///
    /// Dropped, the work goes on.
    pub async fn flush(&self) {
        let (reply, done) = oneshot::channel();
        if self.shared.queue.push(Task::Flush(reply)) {
            // The writer ended: nothing waits.
            _ = done.await;
        }
    }

    /// Tells whether every narinfo of the folder is in the index.
    pub fn is_reconciled(&self) -> bool {
        self.shared.reconciled.load(Ordering::Acquire)
    }
}

#[async_trait]
impl Backend for DiskCache {
    fn look_up(&self, hash: StorePathHash) -> Option<Record> {
        self.shared.known(hash)
    }

    fn remember(&self, record: Record) {
        if self.shared.index().is_some() {
            self.shared.queue.push(Task::Remember(Box::new(record)));
        }
    }

    fn deny(&self, hash: StorePathHash, nar_hash: NarHash, upstreams: &[&str]) {
        let shared = &self.shared;
        if shared.index().is_none() {
            // It may say so, once it is there again.
            return shared.denials.lose();
        }
        // Most denials are of what was never said. The index is read last: what is not on its way any more is there.
        let on_its_way = shared.queue.has_look_up(hash);
        let said = || {
            let known = shared.known(hash);
            known.is_some_and(|mut record| record.deny(nar_hash, upstreams))
        };
        if !on_its_way && !said() {
            return;
        }
        let denial = Denial {
            hash,
            nar_hash,
            upstreams: upstreams.iter().map(|u| (*u).to_owned()).collect(),
        };
        if !shared.denials.add(denial.clone()) {
            shared.queue.wake();
        } else if !shared.queue.push(Task::Deny(denial.clone())) {
            shared.denials.done(&denial);
        }
    }

    fn sign_with(&self, keys: Vec<PublicKey>, trust: String, sign: Arc<Sign<'static>>) {
        self.shared.sign_with(keys, trust, sign);
        signing::start(&self.shared);
    }

    fn forget(&self, hash: StorePathHash) {
        self.shared.queue.push(Task::Forget(hash));
    }

    fn touch(&self, hash: StorePathHash) {
        self.shared.queue.touch(hash, self.shared.tick());
    }

    fn begin(&self, nar_size: u64) -> Result<Fill, Error> {
        let shared = &self.shared;
        if shared.queue.is_stopped() {
            return Err(Error::Stopping);
        }
        if let Some(cause) = shared.degraded() {
            if shared.retry_is_due(Instant::now()) {
                shared.queue.wake();
            }
            return Err(Error::Degraded(cause));
        }
        let (size_bytes, bytes_max) = (nar_size / COMPRESSION_EXPECTED, shared.options.bytes_max);
        if size_bytes > bytes_max {
            return Err(Error::TooLarge {
                size_bytes,
                bytes_max,
            });
        }
        shared.ask_for_space()?;
        let reservation = shared.reserve(size_bytes.min(RESERVED_AHEAD_MAX))?;
        let made = shared.folder.create_temp("nar");
        let (temp, file) = made.map_err(|source| {
            let what = format!("making a file in {}", shared.folder.root().display());
            shared.note_failure(&what, &source);
            Error::Io { what, source }
        })?;
        let file = Arc::new(file);
        let place = OnDisk {
            shared: Arc::clone(shared),
            temp,
            file: Arc::clone(&file),
            reservation,
            estimate: size_bytes,
        };
        Ok(Fill::new(file, Box::new(place)))
    }

    fn open(&self, name: &NarName) -> Result<Option<OpenNar>, Error> {
        let known = self.shared.known(name.path_hash);
        let known = known.filter(|record| record.name() == Some(*name));
        let Some(expected) = known.and_then(|record| record.file) else {
            return Ok(None);
        };
        let cause = match self.shared.folder.open_nar(name) {
            Ok((file, size_bytes)) if size_bytes == expected.size_bytes => {
                let content = self.shared.content(name, &file);
                let file = Arc::new(file);
                return Ok(Some(OpenNar {
                    file,
                    size_bytes,
                    content,
                }));
            }
            Ok((_, size)) => format!("it has {size} of {} bytes", expected.size_bytes),
            Err(error) if is_of_the_file(&error) => error.to_string(),
            Err(source) => {
                let what = format!("opening {}", self.shared.folder.nar(name).display());
                return Err(Error::Io { what, source });
            }
        };
        self.corrupt(name, &cause);
        Ok(None)
    }

    fn proven(&self, name: &NarName, stamp: Stamp) {
        self.shared.judged.proven(name.path_hash, stamp);
    }

    fn corrupt(&self, name: &NarName, cause: &str) {
        let judged = &self.shared.judged;
        if judged.condemn(*name)
            && !(self.shared.queue).push(Task::Corrupt(*name, cause.to_owned()))
        {
            judged.removed(name);
        }
    }

    fn stats(&self) -> Stats {
        self.shared.stats()
    }

    async fn stop(&self) {
        self.shared.queue.stop();
        let writer = self.writer.lock();
        let writer = writer.unwrap_or_else(PoisonError::into_inner).take();
        if let Some(writer) = writer {
            let ended = tokio::task::spawn_blocking(move || writer.join());
            if !matches!(ended.await, Ok(Ok(()))) {
                warn!("the writer of the cache ended by a panic");
            }
        }
    }
}

impl Drop for DiskCache {
    fn drop(&mut self) {
        self.shared.queue.stop();
    }
}

/// Bytes that a fill may have reserved and not written: what was only declared evicts no more than this.
const RESERVED_AHEAD_MAX: u64 = 64 << 20;
/// What zstd makes of NARs, roughly; reservations grow where it is less.
const COMPRESSION_EXPECTED: u64 = 4;
