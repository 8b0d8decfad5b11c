//! Small NARs of a closure that a client is fetching, pulled before it asks for them.
//!
//! ```text
//! narinfo asked for -> noted -+
//! NAR asked for: one of them -+-> what is connected with it, leaves first, is pulled: bounded in
//!                                 bytes, checked, encoded -> parcels -> claimed by the NAR requests
//!                                                                  \-> dropped when unclaimed
//! ```
//!
//! A client that only looks (a dry run) asks for no NAR, and then nothing is pulled. A parcel is made
//! by the very way that a request for it takes (holders, checks, encoder), only earlier; a request
//! that finds none, or one that failed, goes that way itself. It decides nothing about trust: the
//! claim comes after the request has found its path info anew.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};
use tracing::debug;

use crate::cache::memory::Lookup;
use crate::codec::compression::Encoding;
use crate::nix::hash::NarHash;
use crate::nix::path_info::PathInfo;
use crate::nix::store_path::StorePathHash;

use super::nar_url::NarUrl;
use super::shared::Shared;
use super::source::Source;
use super::{ahead_order, now, transfer};

/// The bounds of pulling NARs ahead.
#[derive(Clone, Debug)]
pub struct Options {
    /// Memory for NARs that were pulled and not claimed yet, before compression; a pull waits while
    /// it is full.
    pub bytes_max: u64,
    /// Larger NARs are not pulled: their round trip is a small part of their time.
    pub nar_bytes_max: u64,
    /// NARs pulled at once for one closure: a round trip's worth of a quick line, and fewer than
    /// make a pool open more sessions.
    pub at_once: usize,
    /// KiB pulled at once from where many share one connection: little enough that the NAR that a client waits for
    /// is not long behind them.
    pub shared_kib: u32,
    /// Closures pulled at once; further ones are not pulled.
    pub pulls_max: usize,
    /// How long a NAR waits to be claimed, and a pull for room.
    pub ttl: Duration,
    /// Paths remembered as asked about; 20 bytes each.
    pub asked_max: usize,
    /// How long they are, at least; at most twice as long.
    pub asked_ttl: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            bytes_max: 64 << 20,
            nar_bytes_max: 1 << 20,
            at_once: 48,
            shared_kib: 2 << 10,
            pulls_max: 8,
            ttl: Duration::from_secs(30),
            asked_max: 20_000,
            asked_ttl: Duration::from_secs(60),
        }
    }
}

/// What was asked about, and what was pulled.
pub(super) struct Ahead {
    options: Option<Options>,
    // Never held over an await; no other lock is taken under it.
    state: Mutex<State>,
    /// KiB that parcels may take.
    room: Arc<Semaphore>,
}

#[derive(Default)]
struct State {
    asked: Asked,
    /// Those that a pull has yet to begin with.
    queued: HashSet<StorePathHash>,
    parcels: HashMap<Name, Parcel>,
    pulls: usize,
    /// Whether one of them still finds out what it is to pull.
    sorting: bool,
    next: u64,
}

/// Paths whose narinfo a client was given lately, and whose NAR nobody has begun.
#[derive(Default)]
struct Asked {
    lately: HashSet<StorePathHash>,
    before: HashSet<StorePathHash>,
    /// When `lately` began.
    since: Option<Instant>,
}

/// What a parcel holds: exactly these bytes in exactly this encoding.
type Name = (StorePathHash, NarHash, Encoding);

struct Parcel {
    /// The pull that it belongs to.
    pull: u64,
    /// Its bytes, once they are there; closed: they do not come.
    arrival: oneshot::Receiver<Bytes>,
}

impl Ahead {
    /// Begins with nothing; without options it stays so.
    pub(super) fn new(options: Option<Options>) -> Self {
        let bytes_max = options.as_ref().map_or(0, |options| options.bytes_max);
        let kib = usize::try_from(bytes_max / 1024).unwrap_or(usize::MAX);
        Self {
            options: options.filter(|_| kib > 0),
            state: Mutex::default(),
            room: Arc::new(Semaphore::new(kib.min(Semaphore::MAX_PERMITS))),
        }
    }

    /// Notes that a client was given the narinfo of a path.
    pub(super) fn note_asked(&self, hash: StorePathHash, now: Instant) {
        if let Some(options) = &self.options {
            self.state().asked.insert(hash, now, options);
        }
    }

    /// Takes the NAR that was pulled for this request, if one was, waiting while it is on its way.
    ///
    /// The request is also the sign that a client is fetching: what belongs to it begins to be
    /// pulled. `None`: the request must fetch the NAR itself. Dropped, the NAR is thrown away.
    pub(super) async fn claim(
        shared: &Arc<Shared>,
        info: &Arc<PathInfo>,
        encoding: Encoding,
    ) -> Option<Bytes> {
        let ahead = &shared.ahead;
        ahead.options.as_ref()?;
        let hash = info.path.hash();
        let name = (hash, info.nar_hash, encoding);
        let (parcel, fetching) = {
            let mut state = ahead.state();
            let parcel = state.parcels.remove(&name);
            state.queued.remove(&hash);
            let fetching = state.asked.remove(hash);
            (parcel, fetching)
        };
        let Some(parcel) = parcel else {
            if fetching {
                begin(shared, info);
            }
            return None;
        };
        let bytes = parcel.arrival.await.ok()?;
        shared.counters.nar_ahead_claimed.increment();
        Some(bytes)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Asked {
    fn insert(&mut self, hash: StorePathHash, now: Instant, options: &Options) {
        let since = *self.since.get_or_insert(now);
        let old = now.saturating_duration_since(since);
        if old >= options.asked_ttl || self.lately.len() >= options.asked_max / 2 {
            self.before = std::mem::take(&mut self.lately);
            if old >= options.asked_ttl * 2 {
                self.before.clear();
            }
            self.since = Some(now);
        }
        self.lately.insert(hash);
    }

    /// Forgets a path; tells whether a client had asked about it.
    fn remove(&mut self, hash: StorePathHash) -> bool {
        let lately = self.lately.remove(&hash);
        self.before.remove(&hash) || lately
    }

    fn all(&self) -> impl Iterator<Item = &StorePathHash> {
        self.lately.iter().chain(&self.before)
    }
}

/// Begins to pull what a client wants that has just begun with this path.
fn begin(shared: &Arc<Shared>, first: &Arc<PathInfo>) {
    let Some(options) = shared.ahead.options.clone() else {
        return;
    };
    let number = {
        let mut state = shared.ahead.state();
        if state.sorting || state.asked.all().next().is_none() || state.pulls >= options.pulls_max {
            return;
        }
        state.sorting = true;
        state.pulls += 1;
        state.next += 1;
        state.next
    };
    let pull = Pull {
        shared: Arc::clone(shared),
        alone: Arc::new(Semaphore::new(options.at_once.max(1))),
        together: Arc::new(Semaphore::new(options.shared_kib.max(1) as usize)),
        options,
        number,
        queued: Vec::new(),
        sorting: true,
        over: false,
    };
    let first = Arc::clone(first);
    // Dropped unrun when there is no room for a task.
    shared.tasks.spawn(pull.run(first));
}

/// One closure on its way; dropped, what nobody claimed is gone.
struct Pull {
    shared: Arc<Shared>,
    options: Options,
    number: u64,
    /// All that it was to pull.
    queued: Vec<StorePathHash>,
    sorting: bool,
    /// Places for those that do not share a connection.
    alone: Arc<Semaphore>,
    /// KiB of those that do.
    together: Arc<Semaphore>,
    /// Whether it counts no more as one that pulls.
    over: bool,
}

impl Pull {
    async fn run(mut self, first: Arc<PathInfo>) {
        let wanted = self.wanted(&first).await;
        self.end_sorting();
        if wanted.is_empty() {
            return;
        }
        self.queued = wanted.iter().map(|info| info.path.hash()).collect();
        let this = &self;
        // In their order, so that the memory is for those that are wanted first.
        stream::iter(wanted)
            .map(|info| this.prepare(info))
            .buffered(1)
            .take_while(|prepared| std::future::ready(prepared.is_some()))
            .filter_map(|prepared| std::future::ready(prepared.flatten()))
            .map(|prepared| this.pull(prepared))
            .buffer_unordered(PULLED_AT_ONCE)
            .for_each(|()| std::future::ready(()))
            .await;
        self.end();
        sleep(self.options.ttl).await;
    }

    /// Finds what belongs to the fetch that began with `first`.
    async fn wanted(&self, first: &Arc<PathInfo>) -> Vec<Arc<PathInfo>> {
        let hashes: Vec<_> = {
            let state = self.shared.ahead.state();
            state.asked.all().copied().collect()
        };
        let setup = self.shared.setup();
        let mut asked = HashMap::from([(first.path.hash(), Arc::clone(first))]);
        for some in hashes.chunks(PARSED_AT_ONCE) {
            for hash in some {
                if let Lookup::Present(entry, _) = self.shared.cache.get(*hash, now())
                    && let Some(info) = setup.parse(&entry)
                {
                    asked.insert(*hash, Arc::new(info));
                }
            }
            tokio::task::yield_now().await;
        }
        let first = first.path.hash();
        let sorting = spawn_blocking(move || ahead_order::wanted(first, &asked));
        let mut wanted = sorting.await.unwrap_or_default();
        let mut state = self.shared.ahead.state();
        wanted.retain(|info| {
            let hash = info.path.hash();
            let small = info.nar_size <= self.options.nar_bytes_max;
            let known = self.shared.cache.get(hash, now());
            let kept = matches!(known, Lookup::Present(entry, _) if entry.file().is_some());
            // One that is gone from there was begun by a client meanwhile, or is another pull's.
            small && !kept && state.asked.remove(hash) && state.queued.insert(hash)
        });
        wanted
    }

    /// Waits for its turn and for room; `None`: nobody claims what is there, so it is enough, and `Some(None)`: this one
    /// is not to be had.
    async fn prepare(&self, info: Arc<PathInfo>) -> Option<Option<Prepared>> {
        let url = NarUrl {
            path_hash: info.path.hash(),
            nar_hash: info.nar_hash,
            encoding: self.shared.setup().publisher.encoding,
            file_hash: None,
        };
        let Some(source) = Source::locate(&self.shared, &url).await else {
            return Some(None);
        };
        let kib = u32::try_from(info.nar_size.div_ceil(1024).max(1)).unwrap_or(u32::MAX);
        let (turns, count) = match source.shares_connections() {
            true => (
                &self.together,
                kib.max(SHARED_KIB_LEAST)
                    .min(self.options.shared_kib.max(1)),
            ),
            false => (&self.alone, 1),
        };
        let turn = Arc::clone(turns).acquire_many_owned(count).await.ok()?;
        let room = Arc::clone(&self.shared.ahead.room);
        let room = timeout(self.options.ttl, room.acquire_many_owned(kib)).await;
        let room = room.ok()?.ok()?;
        Some(Some(Prepared {
            url,
            source,
            room,
            _turn: turn,
        }))
    }

    async fn pull(&self, prepared: Prepared) {
        let Prepared {
            url,
            source,
            room,
            _turn,
        } = prepared;
        let (arrived, arrival) = oneshot::channel();
        {
            let mut state = self.shared.ahead.state();
            if !state.queued.remove(&url.path_hash) {
                // A client was quicker.
                return;
            }
            let name = (url.path_hash, url.nar_hash, url.encoding);
            let pull = self.number;
            state.parcels.insert(name, Parcel { pull, arrival });
        }
        if let Some(bytes) = transfer::read_whole(&self.shared, source, &url).await {
            self.shared.counters.nar_ahead.increment();
            // One who claimed it and left does not mind.
            let _ = arrived.send(Bytes::from_owner(Held { bytes, _room: room }));
        }
    }

    fn end_sorting(&mut self) {
        if std::mem::take(&mut self.sorting) {
            self.shared.ahead.state().sorting = false;
        }
    }

    fn end(&mut self) {
        self.end_sorting();
        if !std::mem::replace(&mut self.over, true) {
            let mut state = self.shared.ahead.state();
            state.pulls -= 1;
            for hash in self.queued.drain(..) {
                state.queued.remove(&hash);
            }
        }
    }
}

impl Drop for Pull {
    fn drop(&mut self) {
        self.end();
        let mut unclaimed = Vec::new();
        let mut state = self.shared.ahead.state();
        state.parcels.retain(|_, parcel| {
            let own = parcel.pull == self.number;
            if own {
                let (_, nothing) = oneshot::channel();
                unclaimed.push(std::mem::replace(&mut parcel.arrival, nothing));
            }
            !own
        });
        drop(state);
        if !unclaimed.is_empty() {
            debug!(
                nars = unclaimed.len(),
                "pulled ahead and not claimed, dropped"
            );
            let dropped = unclaimed.len() as u64;
            self.shared.counters.nar_ahead_dropped.add(dropped);
        }
    }
}

/// A NAR that may be pulled now.
struct Prepared {
    url: NarUrl,
    source: Source,
    /// Its share of the memory for what is not claimed yet.
    room: OwnedSemaphorePermit,
    _turn: OwnedSemaphorePermit,
}

/// A NAR that was pulled, and its share of the memory for such.
struct Held {
    bytes: Bytes,
    _room: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Narinfos parsed between two looks at what else there is to do: some 200 µs.
const PARSED_AT_ONCE: usize = 64;

/// What the smallest NAR counts as where many share one connection: 200 at once.
const SHARED_KIB_LEAST: u32 = 10;

/// More than have a turn at the same time.
const PULLED_AT_ONCE: usize = 300;
