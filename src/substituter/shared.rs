//! What handles, flights and background tasks of one substituter share.
//!
//! Bookkeeping only: who holds what, what is published, what is kept alive. Whom to ask is `query`'s.

use std::collections::hash_map::Entry as MapEntry;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::Semaphore;
use tracing::warn;

use crate::cache::backend::{Backend, NarFile};
use crate::cache::memory::{Checked, Entry, Lookup, NarInfoCache, UpstreamId};
use crate::cache::policy::Freshness;
use crate::cache::single_flight::SingleFlight;
use crate::codec::compression::Encoder;
use crate::nix::hash::NarHash;
use crate::nix::path_info::{PathInfo, Verified};
use crate::nix::store_path::{StorePath, StorePathHash};

use super::ahead::Ahead;
use super::berth::Berths;
use super::counters::Counters;
use super::filling::Fillings;
use super::kept::{self, KEPT};
use super::lent::Lending;
use super::member::Member;
use super::nar_url::NarUrl;
use super::promises::Promises;
use super::tasks::Tasks;
use super::write_behind::WriteBehind;
use super::{Options, Setup, now};

/// Everything that handles, flights and background tasks share.
pub(super) struct Shared {
    pub(super) options: Options,
    // Never held over an await. Held while the cache changes, so that nothing of an old setup is
    // kept beside a new one; only locks of the caches are taken under it.
    setup: RwLock<Arc<Setup>>,
    pub(super) cache: NarInfoCache,
    pub(super) flights: SingleFlight<StorePathHash, Option<Arc<Entry>>>,
    pub(super) counters: Counters,
    pub(super) tasks: Tasks,
    /// Paths of which two holders have different NARs. Bounded by `DIVERGENT_MAX`.
    pub(super) divergent: Mutex<HashMap<StorePathHash, Divergence>>,
    /// Hash parts whose revalidation is under way.
    pub(super) revalidating: Mutex<HashSet<StorePathHash>>,
    /// Random hash parts that upstreams are asked for, to see whether they lead back here.
    pub(super) vetting: Mutex<HashMap<StorePathHash, UpstreamId>>,
    pub(super) walks: Arc<Semaphore>,
    /// Memory for small NARs.
    pub(super) lending: Lending,
    /// Holders whose bytes did not fit; not asked for this path for a while.
    pub(super) corrupt: moka::sync::Cache<(StorePathHash, UpstreamId), ()>,
    /// Holders whose file of a path did not fit; its NAR is decoded there for a while.
    pub(super) unpassable: moka::sync::Cache<(StorePathHash, UpstreamId), ()>,
    pub(super) encoder: Encoder,
    /// Streams of transfers whose clients do not read at the moment.
    pub(super) berths: Berths,
    /// What is kept beyond memory, if anything is.
    pub(super) kept: Option<Kept>,
    pub(super) fillings: Fillings,
    /// Small NARs that are to be kept.
    pub(super) write_behind: WriteBehind,
    /// Paths that were promised, and are to be kept alive where they are.
    pub(super) promises: Promises,
    /// NARs pulled before they are asked for.
    pub(super) ahead: Ahead,
    /// Small NARs that are being read; those who ask for the same meanwhile share it.
    pub(super) small_nars: SingleFlight<NarUrl, Option<Bytes>>,
}

/// The cache below, and the member that stands for it as a holder.
pub(super) struct Kept {
    pub(super) backend: Arc<dyn Backend>,
    pub(super) member: Arc<Member>,
    /// Whose turn it is to read a kept file that may have changed.
    pub(super) proving: Arc<Semaphore>,
}

/// A path of which an upstream has another NAR than the one that is served.
#[derive(Clone, Debug)]
pub(super) struct Divergence {
    pub(super) path: StorePath,
    pub(super) served: NarHash,
    pub(super) other: NarHash,
    pub(super) upstream: String,
}

impl Shared {
    pub(super) fn new(options: Options, setup: Setup, backend: Option<Arc<dyn Backend>>) -> Self {
        let walks = options.prefetch.clone().unwrap_or_default();
        let setup = Arc::new(setup);
        if let Some(backend) = &backend {
            kept::sign(&**backend, &setup);
        }
        Self {
            cache: NarInfoCache::new(options.memory.clone()),
            setup: RwLock::new(setup),
            flights: SingleFlight::new(walks.patience),
            counters: Counters::default(),
            tasks: Tasks::new(options.tasks_max),
            divergent: Mutex::default(),
            revalidating: Mutex::default(),
            vetting: Mutex::default(),
            walks: Arc::new(Semaphore::new(walks.walks_max)),
            lending: Lending::new(options.transfer.whole_kib_max),
            corrupt: for_a_while(),
            unpassable: for_a_while(),
            encoder: Encoder::new(options.transfer.encoder.clone()),
            berths: Berths::default(),
            kept: backend.map(|backend| {
                let proving = Arc::new(Semaphore::new(kept::PROVING_MAX));
                Kept {
                    member: kept::member(Arc::clone(&backend), Arc::clone(&proving), now()),
                    backend,
                    proving,
                }
            }),
            fillings: Fillings::new(&options.fill),
            write_behind: WriteBehind::new(options.write_behind.clone()),
            promises: Promises::default(),
            ahead: Ahead::new(options.ahead.clone()),
            // None is announced, so none is waited for.
            small_nars: SingleFlight::new(Duration::ZERO),
            options,
        }
    }

    pub(super) fn setup(&self) -> Arc<Setup> {
        let setup = self.setup.read().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&setup)
    }

    /// Runs `keep` unless other upstreams or keys were taken in since `setup` was read.
    ///
    /// Else an answer that was under way would bring back trust that the operator has withdrawn.
    pub(super) fn if_current<T>(&self, setup: &Arc<Setup>, keep: impl FnOnce() -> T) -> Option<T> {
        let current = self.setup.read().unwrap_or_else(PoisonError::into_inner);
        Arc::ptr_eq(&current, setup).then(keep)
    }

    /// Takes new upstreams and keys.
    ///
    /// What was found stays where the same keys sign and all upstreams stay, since it may be all
    /// that is known of a sick one; otherwise it is forgotten, and "not there" in any case.
    pub(super) fn replace(&self, setup: Setup) {
        let mut current = self.setup.write().unwrap_or_else(PoisonError::into_inner);
        let stays = |member: &Arc<Member>| setup.member(member.id).is_some();
        let only_more =
            current.publisher.publishes_as(&setup.publisher) && current.members.iter().all(stays);
        *current = Arc::new(setup);
        if let Some(kept) = &self.kept {
            kept::sign(&*kept.backend, &current);
        }
        if only_more {
            self.cache.clear_absent();
        } else {
            self.cache.clear();
        }
    }

    /// Publishes a checked path info and keeps it; the NAR that was chosen before is kept to.
    ///
    /// `None`: the setup was replaced meanwhile, ask again.
    pub(super) fn commit(
        &self,
        setup: &Arc<Setup>,
        member: &Member,
        verified: &Verified,
        now: Instant,
    ) -> Option<Arc<Entry>> {
        match self.cache.get(verified.path.hash(), now) {
            Lookup::Present(entry, freshness)
                if freshness == Freshness::Fresh || entry.nar_hash != verified.nar_hash =>
            {
                self.note_holder(setup, &entry, member, verified);
                self.if_current(setup, || entry)
            }
            _ => self.recommit(setup, member, verified, now),
        }
    }

    /// Remembers for a moment that nobody has a path; `None` as with [`Self::commit`].
    pub(super) fn commit_absent(
        &self,
        setup: &Arc<Setup>,
        hash: StorePathHash,
        now: Instant,
    ) -> Option<()> {
        self.if_current(setup, || self.cache.commit_absent(hash, now))
    }

    /// Tells whether an upstream has given wrong bytes for a path: what it says of that does not count for a while.
    pub(super) fn is_distrusted(&self, hash: StorePathHash, id: UpstreamId) -> bool {
        self.corrupt.contains_key(&(hash, id))
    }

    /// Records a late answer: one more holder, or one of different bytes.
    pub(super) fn note_holder(
        &self,
        setup: &Setup,
        entry: &Entry,
        member: &Member,
        info: &Verified,
    ) {
        if info.nar_hash == entry.nar_hash {
            if entry.add_holder(member.id) {
                self.remember(setup, member, info);
            }
            return;
        }
        let mut divergent = self
            .divergent
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let known = divergent.len();
        if let MapEntry::Vacant(place) = divergent.entry(info.path.hash())
            && known < DIVERGENT_MAX
        {
            place.insert(Divergence {
                path: info.path.clone(),
                served: entry.nar_hash,
                other: info.nar_hash,
                upstream: member.upstream.name().to_owned(),
            });
            warn!(
                path = %info.path,
                served = %entry.nar_hash,
                upstream = member.upstream.name(),
                upstream.nar_hash = %info.nar_hash,
                "two builders have different bytes for one path, the first answer is kept to"
            );
        }
    }

    /// Publishes anew, in place of what was kept; `None` as with [`Self::commit`].
    pub(super) fn recommit(
        &self,
        setup: &Arc<Setup>,
        member: &Member,
        verified: &Verified,
        now: Instant,
    ) -> Option<Arc<Entry>> {
        let mut text = setup.publisher.publish(verified);
        let file = self.kept_file(verified);
        if let Some(file) = &file {
            text = setup.publisher.with_file(&text, file).unwrap_or(text);
        }
        let holders = vec![member.id];
        let entry = Entry::new(text, verified.nar_hash, file, holders, Checked::At(now));
        let entry = Arc::new(entry);
        let kept = self.if_current(setup, || {
            self.cache.commit(verified.path.hash(), Arc::clone(&entry));
            entry
        });
        if kept.is_some() {
            self.remember(setup, member, verified);
        }
        kept
    }

    /// Returns the file that this NAR of a path is kept in.
    pub(super) fn kept_file(&self, info: &PathInfo) -> Option<NarFile> {
        let record = self.kept.as_ref()?.backend.look_up(info.path.hash())?;
        record
            .file
            .filter(|_| record.info.nar_hash == info.nar_hash)
    }

    /// Believes what is known for another while, of these holders.
    pub(super) fn extend(
        &self,
        setup: &Arc<Setup>,
        hash: StorePathHash,
        entry: &Entry,
        holders: &[UpstreamId],
        now: Instant,
    ) {
        let (text, holders) = (entry.text.clone(), holders.to_vec());
        let fresh = Entry::new(
            text,
            entry.nar_hash,
            entry.file(),
            holders,
            Checked::At(now),
        );
        self.if_current(setup, || self.cache.commit(hash, Arc::new(fresh)));
    }

    /// Notes that an upstream does not have this NAR of a path any more.
    pub(super) fn forget_holder(&self, hash: StorePathHash, nar_hash: NarHash, id: UpstreamId) {
        if id == KEPT {
            // Its text names a file that is not there; what is known besides is recalled or asked anew.
            self.cache.remove(hash);
            return;
        }
        if let Lookup::Present(entry, _) = self.cache.get(hash, now())
            && entry.nar_hash == nar_hash
            && entry.remove_holder(id)
        {
            self.cache.remove(hash);
        }
        self.deny(&self.setup(), hash, nar_hash, &[id]);
    }

    /// Lets no record on disk say any more that these upstreams have this NAR of a path.
    pub(super) fn deny(
        &self,
        setup: &Setup,
        hash: StorePathHash,
        nar_hash: NarHash,
        denied: &[UpstreamId],
    ) {
        let members = denied.iter().filter_map(|id| setup.member(*id));
        let names: Vec<_> = members.map(|member| member.upstream.name()).collect();
        if let (Some(kept), false) = (&self.kept, names.is_empty()) {
            kept.backend.deny(hash, nar_hash, &names);
        }
    }

    pub(super) fn vetting(&self) -> MutexGuard<'_, HashMap<StorePathHash, UpstreamId>> {
        self.vetting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn revalidating(&self) -> MutexGuard<'_, HashSet<StorePathHash>> {
        self.revalidating
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

fn for_a_while() -> moka::sync::Cache<(StorePathHash, UpstreamId), ()> {
    let cache = moka::sync::Cache::builder().max_capacity(CORRUPT_MAX);
    cache.time_to_live(CORRUPT_TTL).build()
}

/// Beyond it divergence is noted no more; each takes some 300 bytes and a line in the log.
const DIVERGENT_MAX: usize = 10_000;
const CORRUPT_MAX: u64 = 10_000;
/// Time after which a builder that gave wrong bytes is tried again; it may have been repaired.
const CORRUPT_TTL: Duration = Duration::from_secs(600);
