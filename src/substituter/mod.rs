//! Many stores seen as one, signed.
//!
//! The server makes one call here; from here calls go to the cache and to the upstreams, and each
//! gives one value back. Nothing points upward.
//!
//! ```text
//! narinfo(hash)   cache: present | absent | miss -> flight -> query -> publish -> cache
//!                                                              \-> closure (in the background)
//! nar(url)        holders -> upstream's stream -> verified bytes; next holder at the same byte
//!                 \-> ahead: what belongs to the same fetch is pulled, claimed by the next requests
//! ```

pub mod ahead;
mod ahead_order;
mod berth;
mod care;
pub mod closure;
pub mod counters;
pub mod figures;
mod file_relay;
pub mod filling;
mod following;
mod givers;
pub mod health;
mod intake;
pub mod kept;
mod lent;
pub mod member;
pub mod nar_url;
mod own;
mod own_closure;
mod passing;
mod promises;
pub mod publish;
mod query;
mod recent;
mod relay;
mod report;
mod same_file;
mod shared;
mod sound;
mod source;
pub mod tasks;
pub mod transfer;
pub mod write_behind;
mod writing;

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::future::ready;
use futures_util::stream::{BoxStream, FuturesUnordered};
use tracing::warn;

use crate::cache::backend::Backend;
use crate::cache::memory::{self, Entry, UpstreamId};
use crate::nix::build_trace::{BuildTraceEntry, BuildTraceKey};
use crate::nix::narinfo::NarInfo;
use crate::nix::path_info::{PathInfo, Trust};
use crate::nix::realisation::{DrvOutput, Realisation, UntrustedRealisation};
use crate::nix::store_path::{StoreDir, StorePath, StorePathHash};

use counters::Counters;
use member::Member;
use publish::Publisher;
use query::Wanted;
use shared::Shared;

/// Many upstreams as one store. A clone is another handle on the same.
#[derive(Clone)]
pub struct Substituter {
    shared: Arc<Shared>,
    /// The same for the own store alone; `None`: this is that one.
    own: Option<Arc<Shared>>,
    /// In that one, the whole that it is a part of.
    all: Option<Arc<Shared>>,
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
    /// Of filling the cache.
    pub fill: filling::Options,
    /// Of small NARs that wait to be kept.
    pub write_behind: write_behind::Options,
    /// Of fetching path infos ahead; `None`: not done.
    pub prefetch: Option<closure::Options>,
    /// Of pulling NARs ahead; `None`: not done.
    pub ahead: Option<ahead::Options>,
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

impl Substituter {
    /// Makes a substituter over these upstreams.
    ///
    /// `backend` keeps NARs and what is known of paths beyond memory, if anything does.
    pub fn new(options: Options, setup: Setup, backend: Option<Arc<dyn Backend>>) -> Self {
        let own = Shared::new(options.of_own_store(), setup.of_own_store(), None);
        Self {
            shared: Arc::new(Shared::new(options, setup, backend)),
            own: Some(Arc::new(own)),
            all: None,
        }
    }

    /// Returns the finished narinfo of the path with this hash part; `None`: nobody has it.
    ///
    /// Equal questions share one flight; dropped, another asker drives it on.
    pub async fn narinfo(&self, hash: StorePathHash) -> Option<Bytes> {
        self.carrier().counters.narinfo_requests.increment();
        // An upstream that is ourselves is found out by a question that comes back, however it is asked.
        if self.all.as_ref().is_some_and(|all| all.came_back(hash)) {
            return None;
        }
        let entry = query::entry(&self.shared, hash, Wanted::NarInfo).await;
        entry.map(|entry| entry.text.clone())
    }

    /// Opens the NAR that a URL names; `None` when no holder can give it.
    pub async fn nar(
        &self,
        url: &nar_url::NarUrl,
        extent: transfer::Extent,
    ) -> Option<transfer::Nar> {
        self.carrier().counters.nar_requests.increment();
        let nar = match self.may_give(url).await {
            true => transfer::open(self.carrier(), url, extent).await,
            false => None,
        };
        if nar.is_none() {
            self.carrier().counters.nar_absent.increment();
        }
        nar
    }

    /// Returns what the answer to a NAR request would be, without opening it.
    pub async fn nar_head(&self, url: &nar_url::NarUrl) -> Option<transfer::Head> {
        match self.may_give(url).await {
            true => transfer::head(self.carrier(), url).await,
            false => None,
        }
    }

    /// Tells whether a NAR is in scope: the own store gives what it has, not what others have.
    async fn may_give(&self, url: &nar_url::NarUrl) -> bool {
        self.all.is_none()
            || query::entry(&self.shared, url.path_hash, Wanted::Nar)
                .await
                .is_some_and(|entry| entry.nar_hash == url.nar_hash)
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

    /// Takes new upstreams and keys; what the old ones answer yet is asked anew.
    pub fn replace(&self, setup: Setup) {
        if let Some(own) = &self.own {
            own.replace(setup.of_own_store());
        }
        self.shared.replace(setup);
    }

    /// Returns who is asked and who signs.
    pub fn setup(&self) -> Arc<Setup> {
        self.shared.setup()
    }

    /// Begins a feed of what there is, where that is one store that knows it; see `codec::catalog`.
    ///
    /// Of several stores nobody knows it. The feed ends when the upstreams change.
    pub fn catalog(&self) -> Option<BoxStream<'static, Bytes>> {
        let setup = self.shared.setup();
        let [only] = setup.members.as_slice() else {
            return None;
        };
        let (only, shared) = (Arc::clone(only), Arc::clone(&self.shared));
        let feed = only.upstream.catalog()?;
        let is_only = move || {
            let setup = shared.setup();
            matches!(setup.members.as_slice(), [one] if Arc::ptr_eq(one, &only))
        };
        Some(feed.take_while(move |_| ready(is_only())).boxed())
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

    /// Ends all background work and waits until it is gone.
    pub async fn stop(&self) {
        self.shared.write_behind.flush().await;
        self.shared.tasks.stop().await;
        if let Some(own) = &self.own {
            own.tasks.stop().await;
        }
        if let Some(kept) = &self.shared.kept {
            kept.backend.stop().await;
        }
    }
}

impl Setup {
    /// Returns the upstream of this number, if it is still configured.
    pub fn member(&self, id: UpstreamId) -> Option<&Arc<Member>> {
        self.members.iter().find(|member| member.id == id)
    }

    /// Tells whether its upstreams are not the very ones of another setup.
    pub fn asks_others_than(&self, other: &Self) -> bool {
        let ids = |setup: &Self| -> Vec<_> { setup.members.iter().map(|m| m.id).collect() };
        ids(self) != ids(other)
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

const LOG_PATIENCE: Duration = Duration::from_secs(20);
