//! Many stores seen as one, signed.
//!
//! The server makes one call here; from here calls go to the cache and to the upstreams, and each
//! gives one value back. Nothing points upward.
//!
//! ```text
//! narinfo(hash)   cache: present | absent | miss -> flight -> query -> publish -> cache
//!                                                              \-> closure (in the background)
//! nar(url)        holders -> upstream's stream -> verified bytes; next holder at the same byte
//! ```

pub mod closure;
pub mod counters;
pub mod health;
pub mod member;
pub mod nar_url;
pub mod publish;
mod query;
mod report;
pub mod tasks;
pub mod transfer;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::sync::Semaphore;
use tracing::{info, warn};

use crate::cache::memory::{self, Entry, Lookup, NarInfoCache, UpstreamId};
use crate::cache::policy::Freshness;
use crate::cache::single_flight::SingleFlight;
use crate::codec::compression::Encoder;
use crate::nix::build_trace::{BuildTraceEntry, BuildTraceKey};
use crate::nix::narinfo::NarInfo;
use crate::nix::path_info::{PathInfo, Trust, Verified};
use crate::nix::realisation::{DrvOutput, Realisation, UntrustedRealisation};
use crate::nix::store_path::{StoreDir, StorePath, StorePathHash};

use counters::Counters;
use member::Member;
use publish::Publisher;
use tasks::Tasks;

/// Many upstreams as one store. A clone is another handle on the same.
#[derive(Clone)]
pub struct Substituter {
    shared: Arc<Shared>,
}

/// The bounds of a substituter.
#[derive(Clone, Debug)]
pub struct Options {
    /// Of the answers kept in memory.
    pub memory: memory::Options,
    /// Who is waited for.
    pub health: health::Options,
    /// Of transfers.
    pub transfer: transfer::Options,
    /// Of fetching path infos ahead; `None`: not done.
    pub prefetch: Option<closure::Options>,
    /// How often a path that is asked for is kept alive on its builder anew; half of the time
    /// that a generation of roots lives at most.
    pub keep_interval: Duration,
    /// Background tasks at once.
    pub tasks_max: usize,
}

/// What may change while running: who is asked and who signs.
pub struct Setup {
    /// The upstreams, in the order of the configuration.
    pub members: Vec<Arc<Member>>,
    /// Keys and form of what is published.
    pub publisher: Publisher,
}

/// Everything that handles, flights and background tasks share.
struct Shared {
    options: Options,
    // Never held over an await; read, cloned and let go.
    setup: RwLock<Arc<Setup>>,
    cache: NarInfoCache,
    flights: SingleFlight<StorePathHash, Option<Arc<Entry>>>,
    counters: Counters,
    tasks: Tasks,
    /// Paths of which two holders have different NARs. Bounded by `DIVERGENT_MAX`.
    divergent: Mutex<HashSet<StorePathHash>>,
    /// Hash parts whose revalidation is under way.
    revalidating: Mutex<HashSet<StorePathHash>>,
    /// Random hash parts that upstreams are asked for, to see whether they lead back here.
    vetting: Mutex<HashMap<StorePathHash, UpstreamId>>,
    walks: Arc<Semaphore>,
    /// KiB of small NARs that may be in memory at once.
    whole_nars: Arc<Semaphore>,
    /// Holders whose bytes did not fit; not asked for this path for a while.
    corrupt: moka::sync::Cache<(StorePathHash, UpstreamId), ()>,
    encoder: Encoder,
}

impl Substituter {
    /// Makes a substituter over these upstreams.
    pub fn new(options: Options, setup: Setup) -> Self {
        let walks_max = options.prefetch.as_ref().map_or(0, |p| p.walks_max);
        let shared = Shared {
            cache: NarInfoCache::new(options.memory.clone()),
            setup: RwLock::new(Arc::new(setup)),
            flights: SingleFlight::new(),
            counters: Counters::default(),
            tasks: Tasks::new(options.tasks_max),
            divergent: Mutex::default(),
            revalidating: Mutex::default(),
            vetting: Mutex::default(),
            walks: Arc::new(Semaphore::new(walks_max)),
            whole_nars: Arc::new(Semaphore::new(options.transfer.whole_kib_max as usize)),
            corrupt: moka::sync::Cache::builder()
                .max_capacity(CORRUPT_MAX)
                .time_to_live(CORRUPT_TTL)
                .build(),
            encoder: Encoder::new(options.transfer.encoder.clone()),
            options,
        };
        let shared = Arc::new(shared);
        Self { shared }
    }

    /// Returns the finished narinfo of the path with this hash part; `None`: nobody has it.
    ///
    /// Equal questions share one flight; dropped, another asker drives it on.
    pub async fn narinfo(&self, hash: StorePathHash) -> Option<Bytes> {
        self.shared.counters.narinfo_requests.increment();
        self.entry(hash).await.map(|entry| entry.text.clone())
    }

    /// Opens the NAR that a URL names; `None` when no holder can give it.
    pub async fn nar(&self, url: &nar_url::NarUrl) -> Option<transfer::Nar> {
        self.shared.counters.nar_requests.increment();
        let nar = transfer::open(&self.shared, url).await;
        if nar.is_none() {
            self.shared.counters.nar_absent.increment();
        }
        nar
    }

    /// Returns the size of the NAR that a URL names in bytes, without opening it.
    pub async fn nar_size(&self, url: &nar_url::NarUrl) -> Option<u64> {
        let info = transfer::info(&self.shared, url).await?;
        Some(info.nar_size)
    }

    /// Returns the build log of a derivation, from the first upstream that has one.
    pub async fn build_log(&self, derivation: &StorePath) -> Option<Bytes> {
        let setup = self.shared.setup();
        let ask = |member: Arc<Member>| async move {
            let log = member.upstream.build_log(derivation).await;
            log.inspect_err(|error| {
                let upstream = member.upstream.name();
                tracing::debug!(upstream, %derivation, %error, "no build log");
            })
            .ok()?
        };
        let first = first_of(&setup.members, ask);
        tokio::time::timeout(LOG_PATIENCE, first).await.ok()?
    }

    /// Returns a signed realisation, from the first upstream that is believed.
    pub async fn realisation(&self, id: &DrvOutput) -> Option<Realisation> {
        let setup = self.shared.setup();
        let ask = |member: Arc<Member>| async move {
            let claim = member.note(member.upstream.realisation(id).await).ok()??;
            let verified = claim.verify(&member.trust);
            verified.inspect_err(|e| refuse(&member, e)).ok()
        };
        let verified = first_of(&setup.members, ask).await?;
        Some(verified.sign(&setup.publisher.keys))
    }

    /// Returns a signed build trace entry, from the first upstream that is believed.
    pub async fn build_trace(&self, key: &BuildTraceKey) -> Option<BuildTraceEntry> {
        let setup = self.shared.setup();
        let ask = |member: Arc<Member>| async move {
            let claim = member.note(member.upstream.build_trace(key).await).ok()??;
            let verified = claim.verify(&member.trust);
            verified.inspect_err(|e| refuse(&member, e)).ok()
        };
        let verified = first_of(&setup.members, ask).await?;
        Some(verified.sign(&setup.publisher.keys))
    }

    /// Takes new upstreams and keys; what was known through the old ones is forgotten.
    pub fn replace(&self, setup: Setup) {
        let mut current = self
            .shared
            .setup
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        *current = Arc::new(setup);
        drop(current);
        self.shared.cache.clear();
    }

    /// Returns who is asked and who signs.
    pub fn setup(&self) -> Arc<Setup> {
        self.shared.setup()
    }

    /// Returns the figures since start.
    pub fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    /// Returns of how many paths two holders had different NARs.
    pub fn divergent_paths(&self) -> usize {
        let divergent = self.shared.divergent.lock();
        divergent.unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Returns how many narinfos are in memory, roughly.
    pub fn narinfos_in_memory(&self) -> u64 {
        self.shared.cache.len()
    }

    /// Probes sick upstreams and notices when the machine has slept; runs until it is dropped.
    pub async fn care(&self) {
        let mut clock = (now(), SystemTime::now());
        loop {
            tokio::time::sleep(CARE_INTERVAL).await;
            let now = (now(), SystemTime::now());
            let setup = self.shared.setup();
            if has_slept(clock, now) {
                info!("the machine was asleep, connecting anew");
                setup.members.iter().for_each(|m| m.wake(now.0));
            }
            clock = now;
            let probe = |member: &Arc<Member>| self.shared.care_for(Arc::clone(member), now.0);
            let probes: FuturesUnordered<_> = setup.members.iter().map(probe).collect();
            let all = probes.collect::<()>();
            // A probe that hangs is asked again in the next round.
            let _ = tokio::time::timeout(PROBE_PATIENCE, all).await;
        }
    }

    /// Ends all background work and waits until it is gone.
    pub async fn stop(&self) {
        self.shared.tasks.stop().await;
    }

    async fn entry(&self, hash: StorePathHash) -> Option<Arc<Entry>> {
        query::entry(&self.shared, hash).await
    }
}

impl Shared {
    fn setup(&self) -> Arc<Setup> {
        let setup = self.setup.read().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&setup)
    }

    /// Publishes a checked path info and keeps it; the NAR that was chosen before is kept to.
    fn commit(
        &self,
        setup: &Setup,
        member: &Member,
        verified: &Verified,
        now: Instant,
    ) -> Arc<Entry> {
        let hash = verified.path.hash();
        if let Lookup::Present(entry, Freshness::Fresh) = self.cache.get(hash, now) {
            self.note_holder(&entry, member, verified);
            return entry;
        }
        self.recommit(setup, member, verified, now)
    }

    /// Records a late answer: one more holder, or one of different bytes.
    fn note_holder(&self, entry: &Entry, member: &Member, info: &PathInfo) {
        if info.nar_hash == entry.nar_hash {
            entry.add_holder(member.id);
            return;
        }
        let mut divergent = self
            .divergent
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if divergent.len() < DIVERGENT_MAX && divergent.insert(info.path.hash()) {
            warn!(
                path = %info.path,
                served = %entry.nar_hash,
                upstream = member.upstream.name(),
                upstream.nar_hash = %info.nar_hash,
                "two builders have different bytes for one path, the first answer is kept to"
            );
        }
    }

    /// Publishes anew, in place of what was kept.
    fn recommit(
        &self,
        setup: &Setup,
        member: &Member,
        verified: &Verified,
        now: Instant,
    ) -> Arc<Entry> {
        let text = setup.publisher.publish(verified);
        let entry = Arc::new(Entry::new(text, verified.nar_hash, member.id, now));
        self.cache.commit(verified.path.hash(), Arc::clone(&entry));
        entry
    }

    /// Believes what is known for another while.
    fn extend(&self, hash: StorePathHash, entry: &Entry, now: Instant) {
        let mut holders = entry.holders().into_iter();
        let Some(first) = holders.next() else {
            return;
        };
        let fresh = Entry::new(entry.text.clone(), entry.nar_hash, first, now);
        holders.for_each(|id| fresh.add_holder(id));
        self.cache.commit(hash, Arc::new(fresh));
    }

    /// Notes that an upstream does not have a path any more.
    fn forget_holder(&self, hash: StorePathHash, id: UpstreamId) {
        if let Lookup::Present(entry, _) = self.cache.get(hash, now())
            && entry.remove_holder(id)
        {
            self.cache.remove(hash);
        }
    }

    async fn care_for(&self, member: Arc<Member>, now: Instant) {
        if member.wants_vetting() {
            let mut nobody = StorePathHash([0; 20]);
            fastrand::fill(&mut nobody.0);
            self.vetting().insert(nobody, member.id);
            member.vet(nobody).await;
            self.vetting().remove(&nobody);
        }
        member.probe(now).await;
    }

    /// Tells whether this is a question of our own that came back.
    fn came_back(&self, hash: StorePathHash) -> bool {
        let asked = self.vetting().get(&hash).copied();
        let setup = self.setup();
        if let Some(member) = asked.and_then(|id| setup.member(id)) {
            member.mark_as_ourselves();
        }
        asked.is_some()
    }

    fn vetting(&self) -> MutexGuard<'_, HashMap<StorePathHash, UpstreamId>> {
        self.vetting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn revalidating(&self) -> MutexGuard<'_, HashSet<StorePathHash>> {
        self.revalidating
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the path kept alive on a holder, in the background, where that is due.
    fn keep(self: &Arc<Self>, hash: StorePathHash, entry: &Arc<Entry>, now: Instant) {
        if !entry.keep_is_due(self.options.keep_interval, now) {
            return;
        }
        let (shared, entry) = (Arc::clone(self), Arc::clone(entry));
        self.tasks.spawn(async move {
            let setup = shared.setup();
            let Some(path) = setup.parse(&entry).map(|info| info.path) else {
                return;
            };
            for id in entry.holders() {
                let Some(member) = setup.member(id).filter(|m| !m.is_sick()) else {
                    continue;
                };
                match member.upstream.keep(&path).await {
                    Ok(true) => return,
                    Ok(false) => {
                        if entry.remove_holder(id) {
                            shared.cache.remove(hash);
                        }
                    }
                    Err(error) => {
                        let upstream = member.upstream.name();
                        tracing::debug!(upstream, %path, %error, "could not be kept alive");
                    }
                }
            }
        });
    }
}

impl Setup {
    /// Returns the upstream of this number, if it is still configured.
    pub fn member(&self, id: UpstreamId) -> Option<&Arc<Member>> {
        self.members.iter().find(|member| member.id == id)
    }

    /// Reads a published text back.
    fn parse(&self, entry: &Entry) -> Option<PathInfo> {
        let text = std::str::from_utf8(&entry.text).ok()?;
        let narinfo = NarInfo::parse(text, self.store_dir()).ok()?;
        Some(narinfo.info)
    }

    fn store_dir(&self) -> &StoreDir {
        &self.publisher.store_dir
    }
}

impl Member {
    fn is_sick(&self) -> bool {
        self.standing(now()) == health::Standing::Sick
    }

    /// Tells whether the operator vouches for this upstream.
    pub fn is_trusted(&self) -> bool {
        matches!(self.trust, Trust::Operator)
    }
}

/// Tells the time by the runtime's clock, which tests can stop.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// Asks all upstreams that are not sick at once, and returns the first answer.
async fn first_of<T, F>(members: &[Arc<Member>], ask: impl Fn(Arc<Member>) -> F) -> Option<T>
where
    F: Future<Output = Option<T>>,
{
    let waited_for = members.iter().filter(|member| !member.is_sick());
    let mut asked: FuturesUnordered<_> = waited_for
        .map(|member| {
            let answer = ask(Arc::clone(member));
            async move {
                tokio::select! {
                    answer = answer => answer,
                    () = member.sickness() => None,
                }
            }
        })
        .collect();
    while let Some(answer) = asked.next().await {
        if answer.is_some() {
            return answer;
        }
    }
    None
}

fn refuse(member: &Member, error: &UntrustedRealisation) {
    warn!(upstream = member.upstream.name(), %error, "refused");
}

/// Tells whether the wall clock ran well ahead of the monotonic one, which stops in sleep.
fn has_slept(before: (Instant, SystemTime), now: (Instant, SystemTime)) -> bool {
    let running = now.0.saturating_duration_since(before.0);
    let wall = now.1.duration_since(before.1).unwrap_or_default();
    wall > running + SLEEP_MIN
}

/// Beyond it divergence is logged no more; each takes 20 bytes and a line in the log.
const DIVERGENT_MAX: usize = 10_000;
const CORRUPT_MAX: u64 = 10_000;
/// Time after which a builder that gave wrong bytes is tried again; it may have been repaired.
const CORRUPT_TTL: Duration = Duration::from_secs(600);
const CARE_INTERVAL: Duration = Duration::from_millis(250);
const PROBE_PATIENCE: Duration = Duration::from_secs(10);
const SLEEP_MIN: Duration = Duration::from_secs(5);
const LOG_PATIENCE: Duration = Duration::from_secs(20);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jump_of_the_wall_clock_alone_is_sleep() {
        let before = (Instant::now(), SystemTime::now());
        let after = |running, wall| {
            let (running, wall) = (Duration::from_secs(running), Duration::from_secs(wall));
            has_slept(before, (before.0 + running, before.1 + wall))
        };
        assert!(!after(1, 1));
        assert!(!after(60, 62));
        assert!(after(1, 600));
    }
}
