//! Small checked NARs on their way to the disk, which wait until no client does.
//!
//! A client that fetches a closure asks for hundreds of small NARs at once. Files are made for them once it
//! pauses, at the latest after a second: what it waits for then takes neither a processor nor the disk from it.
//! Whoever asks for such a NAR meanwhile is given it from here.
//!
//! ```text
//! read_whole ─▶ waiting, bounded ── a pause | a second | half full | stop ──▶ files ─▶ one group commit
//!                   └─▶ clients that ask for it again
//! ```

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::join_all;
use tokio::runtime::Handle;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};
use tracing::info_span;

use crate::cache::fill::Fill;
use crate::codec::compression::Encoding;
use crate::nix::hash::NarHash;
use crate::nix::store_path::StorePathHash;

use super::counters::Counters;
use super::intake::Intake;
use super::nar_url::NarUrl;
use super::now;
use super::shared::Shared;
use super::source::Source;
use super::transfer::Form;

/// The bounds of waiting.
#[derive(Clone, Debug)]
pub struct Options {
    /// KiB that wait or are being written; further NARs are not kept.
    pub kib_max: u32,
    /// For how long nothing is asked for when clients pause.
    pub pause: Duration,
    /// How long a NAR waits for a pause at most.
    pub patience: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            kib_max: 64 << 10,
            pause: Duration::from_millis(50),
            patience: Duration::from_secs(1),
        }
    }
}

/// The NARs that wait.
pub(super) struct WriteBehind {
    options: Options,
    room: Arc<Semaphore>,
    // Never held over an await; no other lock is taken under it.
    state: Mutex<State>,
    /// Told when it is to be written at once.
    urgent: Notify,
    /// Told when nothing waits any more.
    done: Notify,
}

#[derive(Default)]
struct State {
    /// In the order in which they came.
    waiting: VecDeque<Waiting>,
    /// Those that wait or are being written.
    here: HashMap<Key, Here>,
    /// Whether a task looks after them.
    attended: bool,
    /// Whether nothing waits for a pause any more.
    stopping: bool,
}

type Key = (StorePathHash, NarHash);

/// A NAR that can be had from here, and its share of the room.
struct Here {
    /// The NAR itself, or its zstd file.
    bytes: Bytes,
    form: Form,
    _room: OwnedSemaphorePermit,
}

/// The same with what it takes to make an entry of it.
struct Waiting {
    key: Key,
    intake: Intake,
    bytes: Bytes,
    form: Form,
    since: Instant,
}

impl WriteBehind {
    /// Begins with nothing.
    pub(super) fn new(options: Options) -> Self {
        Self {
            room: Arc::new(Semaphore::new(options.kib_max as usize)),
            options,
            state: Mutex::default(),
            urgent: Notify::new(),
            done: Notify::new(),
        }
    }

    /// Has a NAR kept in a while, if there is room for it to wait.
    ///
    /// `bytes` are the checked NAR itself, or its zstd file where there is one already.
    pub(super) fn keep(source: &Source, bytes: Bytes, form: Form) {
        let Some(intake) = Intake::of(source) else {
            return;
        };
        let shared = Arc::clone(&intake.shared);
        let this = &shared.write_behind;
        let kib = bytes.len().div_ceil(1024) + KIB_BESIDE;
        let kib = u32::try_from(kib).unwrap_or(u32::MAX);
        let Ok(room) = Arc::clone(&this.room).try_acquire_many_owned(kib) else {
            return;
        };
        let key = (source.info.path.hash(), source.info.nar_hash);
        let first = {
            let mut state = this.state();
            if state.here.contains_key(&key) {
                return;
            }
            let here = Here {
                bytes: bytes.clone(),
                form,
                _room: room,
            };
            state.here.insert(key, here);
            state.waiting.push_back(Waiting {
                key,
                intake,
                bytes,
                form,
                since: now(),
            });
            !std::mem::replace(&mut state.attended, true)
        };
        if this.is_half_full() {
            this.urgent.notify_one();
        }
        // It is the work of many requests.
        let apart = info_span!(parent: None, "write behind");
        let spawn = || {
            shared
                .tasks
                .spawn(attend(Ending(Some(Arc::clone(&shared)))))
        };
        if first {
            apart.in_scope(spawn);
        }
    }

    /// Returns a NAR that waits, in the encoding of the URL; a URL that names a file means another one.
    pub(super) fn get(&self, url: &NarUrl) -> Option<Bytes> {
        if url.file_hash.is_some() {
            return None;
        }
        let form = match url.encoding {
            Encoding::None => Form::Nar,
            Encoding::Zstd => Form::File,
            Encoding::Xz => return None,
        };
        let state = self.state();
        let here = state.here.get(&(url.path_hash, url.nar_hash));
        here.filter(|here| here.form == form)
            .map(|here| here.bytes.clone())
    }

    /// Writes what waits, and returns when that is done or took too long; from now on nothing waits for a pause.
    pub(super) async fn flush(&self) {
        self.state().stopping = true;
        let empty = async {
            loop {
                let mut done = std::pin::pin!(self.done.notified());
                done.as_mut().enable();
                self.urgent.notify_one();
                if !self.state().attended {
                    return;
                }
                done.await;
            }
        };
        // What is not written by then is only not kept.
        let _ = timeout(FLUSHED_WITHIN, empty).await;
    }

    /// Waits until it is time to write.
    async fn due(&self, counters: &Counters) {
        let Options {
            pause, patience, ..
        } = self.options;
        loop {
            let waited = {
                let state = self.state();
                match state.waiting.front() {
                    Some(first) if !state.stopping => now().saturating_duration_since(first.since),
                    _ => return,
                }
            };
            let left = patience.saturating_sub(waited);
            if left.is_zero() || self.is_half_full() {
                return;
            }
            let asked = counters.requests();
            tokio::select! {
                () = sleep(pause.min(left)) => {}
                () = self.urgent.notified() => continue,
            }
            if counters.requests() == asked {
                return;
            }
        }
    }

    /// Takes what can be written at one go; `None`: nothing waits, and nobody attends any more.
    fn take(&self) -> Option<Vec<Waiting>> {
        let mut state = self.state();
        let count = state.waiting.len().min(WRITTEN_AT_ONCE);
        if count == 0 {
            state.attended = false;
            drop(state);
            self.done.notify_waiters();
            return None;
        }
        Some(state.waiting.drain(..count).collect())
    }

    /// Lets go of what is kept now, or never will be.
    fn over(&self, keys: &[Key]) {
        let mut state = self.state();
        for key in keys {
            state.here.remove(key);
        }
    }

    /// Lets go of everything: there is nobody to write it.
    fn give_up(&self) {
        let mut state = self.state();
        let waiting = std::mem::take(&mut state.waiting);
        state.here.clear();
        state.attended = false;
        drop(state);
        drop(waiting);
        self.done.notify_waiters();
    }

    fn is_half_full(&self) -> bool {
        self.room.available_permits() < self.options.kib_max as usize / 2
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes what waits, whenever it is time, until nothing does.
async fn attend(mut ending: Ending) {
    let Some(shared) = ending.0.clone() else {
        return;
    };
    let this = &shared.write_behind;
    loop {
        this.due(&shared.counters).await;
        let Some(taken) = this.take() else {
            break;
        };
        let keys: Vec<_> = taken.iter().map(|waiting| waiting.key).collect();
        let runtime = Handle::current();
        // One change of threads for all of them, and no other task is held up by their encoding and signing.
        let written = spawn_blocking(move || runtime.block_on(write(taken)));
        // A panic alone ends it early; what was not committed then is not kept.
        let _ = written.await;
        this.over(&keys);
    }
    ending.0 = None;
}

/// Lets go of what waits when the task that attends is not begun, or is ended from outside.
struct Ending(Option<Arc<Shared>>);

impl Drop for Ending {
    fn drop(&mut self) {
        if let Some(shared) = &self.0 {
            shared.write_behind.give_up();
        }
    }
}

/// Makes files and entries of NARs; it blocks.
async fn write(taken: Vec<Waiting>) {
    let mut commits = Vec::with_capacity(taken.len());
    for waiting in taken {
        if let Some(fill) = fill(&waiting).await {
            commits.push(waiting.intake.commit(fill));
        }
    }
    join_all(commits).await;
}

/// Writes the file of a NAR; `None` where it cannot be, which the cache has said, or the encoder has no memory.
async fn fill(waiting: &Waiting) -> Option<Fill> {
    let shared = &waiting.intake.shared;
    let mut fill = waiting.intake.begin()?;
    let bytes = waiting.bytes.clone();
    let file = match waiting.form {
        Form::File => bytes,
        Form::Nar => {
            shared.counters.nar_encoded.increment();
            let encoded = shared.encoder.encode_whole(Encoding::Zstd, bytes);
            encoded.await.ok()?
        }
    };
    fill.write(&file).ok()?;
    Some(fill)
}

/// What an entry takes beside its bytes: a path info, mostly.
const KIB_BESIDE: usize = 1;
/// As many as one group commit takes.
const WRITTEN_AT_ONCE: usize = 256;
/// Some hundred files are written in a few ms on a machine at rest.
const FLUSHED_WITHIN: Duration = Duration::from_secs(5);
