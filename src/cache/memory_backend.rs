//! A backend that outlives nothing: NARs in nameless files, records in a map. For tests of the floors
//! above, and the plain example of what [`Backend`] means.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use rustix::fs::MemfdFlags;

use super::backend::{Backend, Error, NarFile, OpenNar, Record, Sign, Stats};
use super::fill::{Fill, Place};
use super::nar_name::NarName;
use super::stamp::{Content, Stamp};
use crate::nix::hash::NarHash;
use crate::nix::signature::PublicKey;
use crate::nix::store_path::StorePathHash;

/// Records and NARs until the process ends.
#[derive(Clone)]
pub struct MemoryBackend {
    // No other lock is taken under it.
    kept: Arc<Mutex<Kept>>,
}

struct Kept {
    entries: HashMap<StorePathHash, Entry>,
    /// Counts uses, to know which was last.
    clock: u64,
    stopped: bool,
    stats: Stats,
}

struct Entry {
    record: Record,
    file: Option<Arc<File>>,
    used: u64,
}

impl MemoryBackend {
    /// Makes an empty one for so many bytes of compressed NARs.
    pub fn new(bytes_max: u64) -> Self {
        let stats = Stats {
            bytes_max,
            ..Stats::default()
        };
        Self {
            kept: Arc::new(Mutex::new(Kept {
                entries: HashMap::new(),
                clock: 0,
                stopped: false,
                stats,
            })),
        }
    }

    /// Behaves as a backend that cannot write, until it is `None` again; for tests.
    pub fn degrade(&self, cause: Option<&str>) {
        self.lock().stats.degraded = cause.map(str::to_owned);
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Backend for MemoryBackend {
    fn look_up(&self, hash: StorePathHash) -> Option<Record> {
        let kept = self.lock();
        kept.entries.get(&hash).map(|entry| entry.record.clone())
    }

    fn remember(&self, mut record: Record) {
        let mut kept = self.lock();
        if kept.stopped {
            return;
        }
        record.file = None;
        let used = kept.tick();
        match kept.entries.get_mut(&record.info.path.hash()) {
            Some(entry) if entry.record.info.nar_hash == record.info.nar_hash => {
                entry.record.join(record);
            }
            Some(entry) if entry.record.file.is_some() => {}
            _ => {
                let hash = record.info.path.hash();
                let file = None;
                kept.entries.insert(hash, Entry { record, file, used });
            }
        }
    }

    fn deny(&self, hash: StorePathHash, nar_hash: NarHash, upstreams: &[&str]) {
        let mut kept = self.lock();
        if let Some(entry) = kept.entries.get_mut(&hash)
            && entry.record.deny(nar_hash, upstreams)
            && entry.record.grounds.is_empty()
        {
            kept.remove(hash);
        }
    }

    /// Nobody else reads what is kept here.
    fn sign_with(&self, _: Vec<PublicKey>, _: String, _: Arc<Sign<'static>>) {}

    fn forget(&self, hash: StorePathHash) {
        self.lock().remove(hash);
    }

    fn touch(&self, hash: StorePathHash) {
        let mut kept = self.lock();
        let used = kept.tick();
        if let Some(entry) = kept.entries.get_mut(&hash) {
            entry.used = used;
        }
    }

    fn begin(&self, nar_size: u64) -> Result<Fill, Error> {
        let kept = self.lock();
        if kept.stopped {
            return Err(Error::Stopping);
        }
        if let Some(cause) = &kept.stats.degraded {
            return Err(Error::Degraded(cause.clone()));
        }
        let (size_bytes, bytes_max) = (nar_size / COMPRESSION_EXPECTED, kept.stats.bytes_max);
        if size_bytes > bytes_max {
            return Err(Error::TooLarge {
                size_bytes,
                bytes_max,
            });
        }
        let made = rustix::fs::memfd_create("nar", MemfdFlags::CLOEXEC);
        let file = made.map_err(|error| Error::Io {
            what: "cannot make a file in memory".to_owned(),
            source: error.into(),
        })?;
        let file = Arc::new(File::from(file));
        let place = Reserved {
            kept: Arc::clone(&self.kept),
            file: Arc::clone(&file),
            reserved: 0,
        };
        Ok(Fill::new(file, Box::new(place)))
    }

    fn open(&self, name: &NarName) -> Result<Option<OpenNar>, Error> {
        let kept = self.lock();
        let entry = kept.entries.get(&name.path_hash);
        let entry = entry.filter(|entry| entry.record.name() == Some(*name));
        let open = |entry: &Entry| {
            Some(OpenNar {
                file: Arc::clone(entry.file.as_ref()?),
                size_bytes: entry.record.file?.size_bytes,
                content: Content::Unchanged,
            })
        };
        Ok(entry.and_then(open))
    }

    /// Nobody else can write what is kept here.
    fn proven(&self, _: &NarName, _: Stamp) {}

    fn corrupt(&self, name: &NarName, _: &str) {
        let mut kept = self.lock();
        let entry = kept.entries.get(&name.path_hash);
        if entry.is_some_and(|entry| entry.record.name() == Some(*name)) {
            kept.remove(name.path_hash);
            kept.stats.corrupt += 1;
        }
    }

    fn stats(&self) -> Stats {
        let kept = self.lock();
        let known = kept.entries.len() as u64;
        Stats {
            look_ups: known - kept.stats.entries,
            ..kept.stats.clone()
        }
    }

    async fn stop(&self) {
        let mut kept = self.lock();
        kept.entries.clear();
        (kept.stats.entries, kept.stats.bytes) = (0, 0);
        kept.stopped = true;
    }
}

impl Kept {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn remove(&mut self, hash: StorePathHash) {
        let removed = self.entries.remove(&hash);
        if let Some(file) = removed.and_then(|entry| entry.record.file) {
            self.stats.entries -= 1;
            self.stats.bytes -= file.size_bytes;
        }
    }

    /// Removes the entries whose last use is longest ago until all fits.
    fn make_room(&mut self) {
        while self.stats.bytes + self.stats.bytes_reserved > self.stats.bytes_max {
            let with_file = self.entries.iter().filter(|(_, e)| e.file.is_some());
            let Some((hash, _)) = with_file.min_by_key(|(_, entry)| entry.used) else {
                return;
            };
            let hash = *hash;
            self.remove(hash);
            self.stats.evictions += 1;
        }
    }
}

/// A running fill's share of the bytes.
struct Reserved {
    kept: Arc<Mutex<Kept>>,
    file: Arc<File>,
    reserved: u64,
}

impl Reserved {
    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Place for Reserved {
    fn grow(&mut self, size_bytes: u64) -> io::Result<()> {
        let more = size_bytes.saturating_sub(self.reserved);
        let mut kept = self.lock();
        if kept.stats.bytes_reserved + more > kept.stats.bytes_max {
            return Err(io::ErrorKind::StorageFull.into());
        }
        kept.stats.bytes_reserved += more;
        kept.make_room();
        drop(kept);
        self.reserved += more;
        Ok(())
    }

    async fn commit(self: Box<Self>, mut record: Record, _: Bytes) -> Result<NarFile, Error> {
        let hash = record.info.path.hash();
        let Some(file) = record.file else {
            return Err(Error::Diverges);
        };
        let mut kept = self.lock();
        if kept.stopped {
            return Err(Error::Stopping);
        }
        if let Some(known) = kept.entries.get_mut(&hash) {
            let same = known.record.info.nar_hash == record.info.nar_hash;
            match known.record.file {
                Some(earlier) if same => {
                    known.record.join(record);
                    return Ok(earlier);
                }
                Some(_) => return Err(Error::Diverges),
                None if same => {
                    let mut joined = known.record.clone();
                    joined.join(record);
                    joined.file = Some(file);
                    record = joined;
                }
                None => {}
            }
        }
        let used = kept.tick();
        let entry = Entry {
            record,
            file: Some(Arc::clone(&self.file)),
            used,
        };
        kept.entries.insert(hash, entry);
        kept.stats.entries += 1;
        kept.stats.fills += 1;
        kept.stats.bytes += file.size_bytes;
        Ok(file)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let mut kept = self.lock();
        kept.stats.bytes_reserved -= self.reserved;
    }
}

/// NARs are rarely compressed to less; only to refuse early what cannot fit.
const COMPRESSION_EXPECTED: u64 = 50;
