//! The background pass after start: what is in the folder and not in the index, and the reverse.
//!
//! It reads and asks; the writer looks again and changes. It rests as long as it works, so a large
//! cache is gone through in minutes, at half a processor's idle priority.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use tracing::{debug, info, warn};

use super::super::nar_name::NarName;
use super::folder::narinfo_hash;
use super::foreign::{self, Met};
use super::index::IndexError;
use super::queue::Task;
use super::shared::{Shared, is_of_the_file};
use crate::nix::store_path::StorePathHash;

/// Begins the pass in a thread of its own, which ends with the cache.
pub fn start(shared: &Arc<Shared>) {
    let pass = Pass {
        shared: Arc::clone(shared),
        since: Instant::now(),
        looked_at: 0,
    };
    let started = shared.start("cache-reconcile", || pass.run());
    if let Err(error) = started {
        warn!(%error, "the cache is not reconciled: no thread");
    }
}

struct Pass {
    shared: Arc<Shared>,
    since: Instant,
    looked_at: u32,
}

/// The pass ends early, because the cache stops or something failed.
enum End {
    Stopped,
    Folder(io::Error),
    Index(IndexError),
}

impl Pass {
    fn run(mut self) {
        // Others first; where that is not allowed, resting is enough.
        _ = rustix::process::setpriority_process(None, 10);
        let begun = Instant::now();
        let shared = Arc::clone(&self.shared);
        // Another index has a pass of its own.
        let index = shared.index().as_ref().map(Arc::downgrade);
        let is_over = || {
            let is_gone = index.as_ref().is_none_or(|i| i.strong_count() == 0);
            shared.queue.is_stopped() || is_gone
        };
        let dir = shared.folder.root().display();
        let done = loop {
            self.shared.foreign.take();
            self.since = Instant::now();
            let done = self
                .narinfos()
                .and_then(|()| self.nars())
                .and_then(|()| self.rows());
            let Err(End::Folder(error)) = &done else {
                break done;
            };
            warn!(%dir, %error, "the cache is not reconciled yet");
            // Until then nobody counts what is not listed, nor takes its signatures off.
            shared.queue.sleep(shared.options.retry_after);
            if is_over() {
                break Err(End::Stopped);
            }
        };
        match done {
            Ok(()) => {
                debug!(%dir, elapsed = ?begun.elapsed(), "cache reconciled");
                let Met { count, first } = self.shared.foreign.take();
                if count > 0 {
                    let first = first.display();
                    info!(%dir, count, %first, "files of others in the cache are left alone");
                }
            }
            Err(End::Stopped | End::Folder(_)) => {}
            Err(End::Index(error)) => self.shared.index_failed(&error),
        }
    }

    /// Narinfos that are not in the index are taken in.
    fn narinfos(&mut self) -> Result<(), End> {
        for name in names(self.shared.folder.root())? {
            let name = name?;
            let Some(hash) = narinfo_hash(&name) else {
                if !foreign::is_known(&name) {
                    let file = self.shared.folder.root().join(name);
                    self.shared.foreign.note(file);
                }
                continue;
            };
            if self.index()?.get(hash)?.is_none_or(|r| r.file.is_none()) {
                self.ask(Task::TakeIn(hash))?;
            }
            self.rest()?;
        }
        // Behind the last one: from now on the index alone is asked.
        let (reply, done) = tokio::sync::oneshot::channel();
        self.ask(Task::Flush(reply))?;
        done.blocking_recv().map_err(|_| End::Stopped)?;
        self.shared.reconciled.store(true, Ordering::Release);
        Ok(())
    }

    /// NARs that no narinfo and no row names go.
    fn nars(&mut self) -> Result<(), End> {
        for file in names(&self.shared.folder.nars())? {
            let file = file?;
            let Some(name) = NarName::parse(&file) else {
                let file = self.shared.folder.nars().join(file);
                self.shared.foreign.note(file);
                continue;
            };
            let known = self.index()?.get(name.path_hash)?;
            if known.and_then(|record| record.name()) != Some(name) {
                self.ask(Task::Orphan(name))?;
            }
            self.rest()?;
        }
        Ok(())
    }

    /// Rows whose NAR is not there go.
    fn rows(&mut self) -> Result<(), End> {
        let mut after = None;
        loop {
            let page = self.index()?.page(after, PAGE_ROWS)?;
            let Some((last, _)) = page.last() else {
                return Ok(());
            };
            after = Some(*last);
            for (hash, _) in page.iter().filter(|(_, size)| *size > 0) {
                if !self.may_be_there(*hash)? {
                    self.ask(Task::Gone(*hash))?;
                }
                self.rest()?;
            }
        }
    }

    /// Tells whether a row that lists a NAR can be read, and the NAR has its size or cannot be looked at now.
    fn may_be_there(&self, hash: StorePathHash) -> Result<bool, End> {
        let record = self.index()?.get(hash)?;
        let Some((name, file)) = record.and_then(|r| r.name().zip(r.file)) else {
            return Ok(false);
        };
        Ok(match fs::symlink_metadata(self.shared.folder.nar(&name)) {
            Ok(found) => found.is_file() && found.len() == file.size_bytes,
            Err(error) => !is_of_the_file(&error),
        })
    }

    fn index(&self) -> Result<Arc<super::index::Index>, End> {
        self.shared.index().ok_or(End::Stopped)
    }

    fn ask(&self, task: Task) -> Result<(), End> {
        match self.shared.queue.push_patiently(task) {
            true => Ok(()),
            false => Err(End::Stopped),
        }
    }

    /// Sleeps now and then for as long as it worked.
    fn rest(&mut self) -> Result<(), End> {
        self.looked_at += 1;
        if !self.looked_at.is_multiple_of(REST_EVERY) {
            return Ok(());
        }
        self.shared.queue.sleep(self.since.elapsed());
        self.since = Instant::now();
        match self.shared.queue.is_stopped() {
            true => Err(End::Stopped),
            false => Ok(()),
        }
    }
}

impl From<IndexError> for End {
    fn from(error: IndexError) -> Self {
        Self::Index(error)
    }
}

/// The names in a folder; one that is no text is none of ours, and does not become one.
fn names(path: &Path) -> Result<impl Iterator<Item = Result<String, End>> + use<>, End> {
    let entries = fs::read_dir(path).map_err(End::Folder)?;
    Ok(entries.map(|entry| match entry {
        Ok(entry) => Ok(entry.file_name().to_string_lossy().into_owned()),
        Err(error) => Err(End::Folder(error)),
    }))
}

const REST_EVERY: u32 = 256;
const PAGE_ROWS: usize = 1024;
