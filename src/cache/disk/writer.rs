//! The thread that alone changes the folder and the index.
//!
//! It takes all that waits at one go, so that what comes while it syncs shares the next sync. It also
//! makes room, and tries a degraded folder again after a pause.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tracing::{debug, warn};

use super::super::backend::Error;
use super::super::nar_name::NarName;
use super::folder::{self, FolderError, Lock};
use super::index::{Index, IndexError};
use super::queue::{Batch, Commit, Task};
use super::resign::{self, Tally, Unvouched};
use super::shared::Shared;
use super::{commit, removal};
use crate::nix::store_path::StorePathHash;
use notes::Note;

mod found;
mod notes;
#[cfg(test)]
mod tests;

/// What the writer alone has.
pub struct Writer {
    shared: Arc<Shared>,
    lock: Option<Lock>,
    /// Uses that are yet to be written.
    touches: HashMap<StorePathHash, u64>,
    touched_at: Instant,
    checked_at: Instant,
}

/// The kinds of tasks of one batch, apart.
#[derive(Default)]
struct Sorted {
    commits: Vec<Commit>,
    notes: Vec<Note>,
    others: Vec<Task>,
    flushes: Vec<oneshot::Sender<()>>,
}

impl Writer {
    /// Looks at the folder for the first time: takes the lock, opens the index.
    pub fn open(shared: Arc<Shared>) -> Self {
        let now = Instant::now();
        let mut writer = Self {
            shared,
            lock: None,
            touches: HashMap::new(),
            touched_at: now,
            checked_at: now,
        };
        writer.try_to_open();
        writer
    }

    /// Works until it is told to stop; then nothing waits any more and the lock is free.
    pub fn run(mut self) {
        let _ended = Ended(Arc::clone(&self.shared));
        while self.turn(CHECK_EVERY) {}
    }

    /// Takes what waits, after `idle_max` at the latest, and does it; `false`: nothing comes any more.
    fn turn(&mut self, idle_max: Duration) -> bool {
        // Asked before the batch is taken, which then has all look-ups that came before what is lost.
        let sweep = self.shared.denials.sweep_due();
        let idle_max = match sweep {
            Some(_) if self.shared.index().is_some() => Duration::ZERO,
            _ => idle_max,
        };
        let Batch {
            tasks,
            touches,
            stopped,
        } = self.shared.queue.take(idle_max);
        self.touches.extend(touches);
        self.look_after();
        self.work(tasks);
        // After the last batch nothing comes any more, so it has all.
        let last = || self.shared.denials.sweep_due().filter(|_| stopped);
        if let Some(sweep) = last().or(sweep) {
            self.sweep(sweep);
        }
        if stopped || self.touched_at.elapsed() >= TOUCHES_EVERY {
            self.write_touches();
        }
        self.make_room();
        !stopped
    }

    fn work(&mut self, mut tasks: VecDeque<Task>) {
        let mut flushes = Vec::new();
        while !tasks.is_empty() {
            let mut sorted = Sorted::default();
            sorted.take(&mut tasks);
            let index = self.shared.index();
            let index = index.as_deref();
            self.note(index, sorted.notes);
            if !sorted.commits.is_empty() {
                commit::commit(&self.shared, index, sorted.commits);
            }
            for task in sorted.others {
                self.one(task);
            }
            flushes.extend(sorted.flushes);
        }
        if !flushes.is_empty() {
            self.write_touches();
            self.make_room();
        }
        for flush in flushes {
            _ = flush.send(());
        }
    }

    fn one(&self, task: Task) {
        match task {
            Task::SignAnew(hashes, reply) => {
                // The pass may have ended meanwhile.
                _ = reply.send(self.sign_anew(&hashes));
            }
            Task::Forget(hash) => self.remove(hash),
            Task::Corrupt(name, cause) => self.corrupt(&name, &cause),
            Task::TakeIn(hash) => self.take_in(hash),
            Task::Orphan(name) => self.orphan(&name),
            Task::Gone(hash) => self.gone(hash),
            // Sorted out before.
            Task::Commit(_) | Task::Remember(_) | Task::Deny(_) | Task::Flush(_) => {}
        }
    }

    fn write_touches(&mut self) {
        self.touched_at = Instant::now();
        let touches = std::mem::take(&mut self.touches);
        let Some(index) = self.shared.index() else {
            return;
        };
        let proven = self.shared.judged.take_right();
        if touches.is_empty() && proven.is_empty() {
            return;
        }
        self.change(&index, |changes| {
            for (hash, stamp) in proven {
                changes.stamp(hash, Some(stamp))?;
            }
            for (hash, used) in touches {
                changes.touch(hash, used)?;
            }
            Ok(())
        });
    }

    /// Removes the least recently used entries until all fits, at most some hundred at one go.
    fn make_room(&mut self) {
        let lacking = self.shared.take_lacking();
        let bytes_max = self.shared.stats().bytes.saturating_sub(lacking);
        loop {
            let over = self.shared.bytes_over();
            let bytes = self.shared.stats().bytes;
            let target = bytes.saturating_sub(over).min(bytes_max);
            if target == bytes {
                return;
            }
            // What was just used must not go first, even if that came after this batch.
            self.touches.extend(self.shared.queue.take_touches());
            self.write_touches();
            let Some(index) = self.shared.index() else {
                return;
            };
            match removal::take_oldest(&index, target, EVICTED_MAX) {
                Ok((names, totals)) => {
                    self.shared.set_totals(totals);
                    if names.is_empty() {
                        return;
                    }
                    removal::remove_files(&self.shared.folder, &names);
                    let evictions = &self.shared.counts.evictions;
                    evictions.fetch_add(names.len() as u64, Ordering::Relaxed);
                    debug!(count = names.len(), "evicted from the cache");
                }
                Err(error) => return self.shared.index_failed(&error),
            }
        }
    }

    fn remove(&self, hash: StorePathHash) {
        let name = self.shared.known(hash).and_then(|record| record.name());
        self.unlist(hash);
        if let Some(name) = name {
            removal::remove_files(&self.shared.folder, &[name]);
        }
    }

    fn sign_anew(&self, hashes: &[StorePathHash]) -> io::Result<Tally> {
        let mut tally = Tally::default();
        if self.lock.is_none() || self.shared.degraded().is_some() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let Some(signing) = self.shared.signing() else {
            return Ok(tally);
        };
        let known = hashes.iter().filter_map(|hash| self.shared.known(*hash));
        let records: Vec<_> = known.filter(|record| record.file.is_some()).collect();
        let (folder, store_dir) = (&self.shared.folder, &self.shared.options.store_dir);
        let (sign, unvouched) = (&*signing.sign, Unvouched::Unsigned);
        let done = resign::batch(folder, store_dir, sign, unvouched, &records, &mut tally);
        if let Err(error) = &done {
            self.shared.note_failure("signing narinfos anew", error);
        }
        done.map(|()| tally)
    }

    fn corrupt(&self, name: &NarName, cause: &str) {
        let known = self.shared.listed(name.path_hash);
        if known.and_then(|record| record.name()) != Some(*name) {
            return self.shared.judged.removed(name);
        }
        let file = self.shared.folder.nar(name);
        warn!(file = %file.display(), cause, "a cached nar is corrupt, the entry is removed");
        self.shared.counts.corrupt.fetch_add(1, Ordering::Relaxed);
        // The narinfo first: a process that dies in between must not take the entry in again.
        if removal::narinfo_names(&self.shared.folder, name) {
            _ = folder::remove(&self.shared.folder.narinfo(name.path_hash));
        }
        self.unlist(name.path_hash);
        removal::remove_files(&self.shared.folder, &[*name]);
        self.shared.judged.removed(name);
    }

    fn unlist(&self, hash: StorePathHash) {
        if let Some(index) = self.shared.index() {
            self.change(&index, |changes| changes.remove(hash));
        }
    }

    /// Writes the index; `false`: it failed, and there is none any more.
    fn change(
        &self,
        index: &Index,
        change: impl FnOnce(&mut super::index::Changes<'_>) -> Result<(), IndexError>,
    ) -> bool {
        let changed = index.write(|changes| {
            change(changes)?;
            Ok(changes.totals())
        });
        match changed {
            Ok(totals) => {
                self.shared.set_totals(totals);
                true
            }
            Err(error) => {
                self.shared.index_failed(&error);
                false
            }
        }
    }

    /// Sees whether the folder is still there, and tries a degraded one again when it is time.
    fn look_after(&mut self) {
        let now = Instant::now();
        if now.duration_since(self.checked_at) >= CHECK_EVERY {
            self.checked_at = now;
            let lost = |lock: &Lock| !self.shared.folder.still_has(lock);
            if self.lock.as_ref().is_some_and(lost) {
                self.lock = None;
                self.shared.readable.store(false, Ordering::Release);
                self.shared.set_index(None);
                self.shared.set_totals(super::index::Totals::default());
                warn!(dir = %self.shared.folder.root().display(), "the cache was deleted, it begins anew");
                self.try_to_open();
            }
        }
        if self.shared.retry_is_due(now) {
            self.try_to_open();
        }
    }

    /// Does what is missing for writing: folders, lock, index, room; notes what cannot be done.
    fn try_to_open(&mut self) {
        match self.open_folder() {
            Ok(()) => {}
            Err(error) => {
                // Nobody else writes there, so what is there can be read.
                let shared = &self.shared;
                let readable = matches!(error, FolderError::Io { .. })
                    && shared.folder.check_store(&shared.cache_info()).is_ok()
                    && !shared.folder.is_in_use();
                if self.lock.is_none() {
                    shared.readable.store(readable, Ordering::Release);
                }
                return shared.degrade(match &error {
                    FolderError::Io { source, .. } => format!("{error}: {source}"),
                    _ => error.to_string(),
                });
            }
        }
        self.shared.readable.store(true, Ordering::Release);
        if self.shared.index().is_none() {
            match self.open_index() {
                Ok(index) => {
                    self.shared.reconciled.store(false, Ordering::Release);
                    self.shared.set_index(Some(index));
                    super::reconcile::start(&self.shared);
                }
                Err(error) => {
                    let path = self.shared.folder.index();
                    return self.shared.degrade(format!("{}: {error}", path.display()));
                }
            }
        }
        match self.shared.ask_for_space() {
            Ok(()) => {}
            // There is enough to evict, and then it can be written.
            Err(Error::Full) => self.make_room(),
            Err(_) => return,
        }
        if self.shared.recover() {
            // What could not be written is yet to be.
            super::signing::start(&self.shared);
        }
    }

    fn open_folder(&mut self) -> Result<(), FolderError> {
        let folder = &self.shared.folder;
        folder.make(&self.shared.cache_info())?;
        if self.lock.is_none() {
            let lock = folder.lock()?;
            let cleaned = folder.clean_temp();
            cleaned.map_err(|source| FolderError::Io {
                path: folder.root().to_owned(),
                source,
            })?;
            self.lock = Some(lock);
        }
        // Making a file is the proof that files can be made.
        let probed = folder.create_temp("probe");
        probed.map(drop).map_err(|source| FolderError::Io {
            path: folder.root().to_owned(),
            source,
        })
    }

    fn open_index(&self) -> Result<Index, IndexError> {
        let (path, options) = (self.shared.folder.index(), &self.shared.options);
        let open = || {
            // What keeps it from being made is what keeps it from being opened, and is said then.
            _ = self.shared.folder.make_index();
            Index::open(&path, options.index_cache_bytes, options.store_dir.clone())
        };
        let opened = open().and_then(|index| Ok((index.last_use()?, index)));
        let (last_use, index) = match opened {
            Ok(opened) => opened,
            Err(error) if is_of_the_disk(&error) => return Err(error),
            Err(error) => {
                warn!(file = %path.display(), %error, "the index is damaged, it is made anew from the folder");
                _ = folder::remove(&path);
                (0, open()?)
            }
        };
        self.shared.advance_clock(last_use);
        Ok(index)
    }
}

/// Lets nobody wait for a writer that ended, even by a panic.
struct Ended(Arc<Shared>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.readable.store(false, Ordering::Release);
        self.0.queue.stop();
        drop(self.0.queue.take(Duration::ZERO));
        self.0.close();
    }
}

impl Sorted {
    /// Takes what can be done together; a path that comes again waits for the next round.
    fn take(&mut self, tasks: &mut VecDeque<Task>) {
        let mut paths = HashSet::new();
        while let Some(task) = tasks.pop_front() {
            match task {
                Task::Commit(commit) => {
                    if !paths.insert(commit.record.info.path.hash())
                        || self.commits.len() == COMMITS_MAX
                    {
                        tasks.push_front(Task::Commit(commit));
                        return;
                    }
                    self.commits.push(*commit);
                }
                Task::Remember(record) => self.notes.push(Note::Said(*record)),
                Task::Deny(denial) => self.notes.push(Note::Denied(denial)),
                Task::Flush(reply) => self.flushes.push(reply),
                // After the commits that came before it, and before those that come after it.
                other => {
                    self.others.push(other);
                    let next = tasks.front();
                    if let Some(Task::Commit(_) | Task::Remember(_) | Task::Deny(_)) = next {
                        return;
                    }
                }
            }
        }
    }
}

/// Tells a failing disk from a damaged file.
fn is_of_the_disk(error: &IndexError) -> bool {
    match error {
        IndexError::Database(redb::Error::Io(error)) => super::shared::concerns_all(error),
        IndexError::Database(redb::Error::DatabaseAlreadyOpen) => true,
        _ => false,
    }
}

/// Uses of this long are lost by kill -9.
const TOUCHES_EVERY: Duration = Duration::from_secs(2);
/// How soon it is seen that the folder was deleted.
const CHECK_EVERY: Duration = Duration::from_secs(2);
/// Bounds the time until commits have their turn.
const EVICTED_MAX: usize = 256;
/// Bounds open files.
const COMMITS_MAX: usize = 256;
