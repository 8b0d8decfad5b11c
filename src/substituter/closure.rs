//! The closure of a path that was found, fetched before the client asks for it.
//!
//! A client walks a closure level by level; from the builder that has the top, the path infos of
//! its references, and theirs, are asked for at once. Bounded, and nothing waits for it but those
//! who ask for just these paths.
//!
//! ```text
//! far builders    the whole closure, then all its path infos: two round trips (upstream::closures)
//! musters         both at once: one round trip
//! all others      level by level: a round trip each; also when the above fails
//! ```

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tracing::debug;

use crate::cache::memory::{Entry, Lookup};
use crate::cache::single_flight::Landing;
use crate::nix::path_info::{PathInfo, Trust, Verified};
use crate::nix::store_path::{StorePath, StorePathHash};
use crate::upstream::Error;
use crate::upstream::closures::Closures;

use super::member::{Answer, Member};
use super::shared::Shared;
use super::{Setup, now};

/// The bounds of walking closures.
#[derive(Clone, Debug)]
pub struct Options {
    /// Closures walked at once; further ones are not walked.
    pub walks_max: usize,
    /// Paths fetched for one closure.
    pub paths_max: usize,
    /// Whether whole closures are asked for where an upstream offers it.
    pub whole: bool,
    /// Path infos of a whole closure asked for in one go; each is some 500 bytes.
    pub infos_max: usize,
    /// Questions asked in one go; small enough that a client's own question is not held up.
    pub batch_max: usize,
    /// How long a client's question for a path that is being fetched waits for that one builder
    /// alone; then all are asked.
    pub patience: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            walks_max: 8,
            paths_max: 20_000,
            whole: true,
            infos_max: 5_000,
            batch_max: 256,
            patience: Duration::from_millis(300),
        }
    }
}

/// Begins to walk the closure of a path that `member` has, in the background.
pub(super) fn follow(shared: &Arc<Shared>, member: &Arc<Member>, top: &PathInfo) {
    let Some(options) = shared.options.prefetch.clone() else {
        return;
    };
    let Ok(permit) = Arc::clone(&shared.walks).try_acquire_owned() else {
        return;
    };
    let mut walk = Walk {
        shared: Arc::clone(shared),
        member: Arc::clone(member),
        seen: HashSet::from([top.path.hash()]),
        options,
    };
    let first = walk.unknown(&top.references);
    if first.is_empty() {
        return;
    }
    let top = top.path.clone();
    let closures = member.upstream.closures().filter(|_| walk.options.whole);
    // The client may ask for these as soon as it has the answer about the top.
    let mut awaited = Awaited::new();
    if closures.is_some() {
        walk.announce(&first, &mut awaited);
    }
    shared.tasks.spawn(async move {
        if let Some(closures) = closures
            && walk.fetch_whole(&*closures, &top, awaited).await
        {
            return;
        }
        walk.run(first).await;
        drop(permit);
    });
}

/// Paths that were announced, with those who wait for them.
type Awaited = HashMap<StorePathHash, (StorePath, Landing<Option<Arc<Entry>>>)>;

/// What a builder told of some paths and is believed, with those who wait for it.
struct Told {
    infos: Vec<(Verified, Landing<Option<Arc<Entry>>>)>,
    /// Whether the builder can be asked for more.
    goes_on: bool,
}

impl Default for Told {
    fn default() -> Self {
        Self {
            infos: Vec::new(),
            goes_on: true,
        }
    }
}

struct Walk {
    shared: Arc<Shared>,
    member: Arc<Member>,
    seen: HashSet<StorePathHash>,
    options: Options,
}

impl Walk {
    /// Fetches level by level. What a level refers to is asked for while the level itself is signed.
    async fn run(&mut self, first: Vec<StorePath>) {
        let mut wanted: VecDeque<_> = first.into();
        wanted.retain(|path| !self.is_known(path));
        let mut told = Told::default();
        loop {
            let references = told.infos.iter().flat_map(|(info, _)| &info.references);
            let references: Vec<_> = references.cloned().collect();
            wanted.extend(self.unknown(&references));
            if self.seen.len() > self.options.paths_max {
                debug!(
                    paths = self.seen.len(),
                    "closure is too large, rest not fetched ahead"
                );
                wanted.clear();
            }
            if !told.goes_on {
                wanted.clear();
            }
            let count = wanted.len().min(self.options.batch_max.max(1));
            let batch: Vec<_> = wanted.drain(..count).collect();
            if batch.is_empty() && told.infos.is_empty() {
                return;
            }
            let (next, taken_in) = tokio::join!(self.ask(batch), self.take_in_all(told));
            if !taken_in {
                return;
            }
            told = next;
        }
    }

    /// Asks for some path infos; what is not believed is left out, and so is what it refers to.
    async fn ask(&self, batch: Vec<StorePath>) -> Told {
        // A path that somebody asks for already has a flight of its own.
        let announce = |path: StorePath| Some((self.shared.flights.announce(path.hash())?, path));
        let (landings, paths): (Vec<_>, Vec<_>) = batch.into_iter().filter_map(announce).unzip();
        let mut told = Told::default();
        if paths.is_empty() {
            return told;
        }
        let setup = self.shared.setup();
        if setup.member(self.member.id).is_none() {
            told.goes_on = false;
            return told;
        }
        let answers = tokio::select! {
            answers = self.member.upstream.path_infos(&paths) => answers,
            () = self.member.sickness() => {
                told.goes_on = false;
                return told;
            }
        };
        // One batch that is late is one time-out, however many questions it had.
        let failed = answers
            .iter()
            .filter_map(|answer| answer.as_ref().err())
            .find(|error| !matches!(error, Error::Remote(_)));
        told.goes_on = failed.is_none();
        let _ = self.member.note(failed.cloned().map_or(Ok(()), Err));
        for ((answer, path), landing) in answers.into_iter().zip(paths).zip(landings) {
            if let Ok(Some(claim)) = answer
                && claim.path == path
                && let Some(info) = self.check(&setup, claim)
            {
                told.infos.push((info, landing));
            }
            if matches!(self.member.trust, Trust::Keys(_)) {
                // Checking takes its time, and others have questions, too.
                tokio::task::yield_now().await;
            }
        }
        told
    }

    /// Keeps what was told and gives it to who waits; `false`: the setup was replaced, stop.
    async fn take_in_all(&self, told: Told) -> bool {
        let setup = self.shared.setup();
        if setup.member(self.member.id).is_none() {
            return false;
        }
        for (info, landing) in told.infos {
            if self.take_in(&setup, &info, landing).await.is_none() {
                return false;
            }
        }
        true
    }

    /// Fetches the closure in two round trips, however deep it is; `false`: not done.
    async fn fetch_whole(
        &mut self,
        closures: &dyn Closures,
        top: &StorePath,
        awaited: Awaited,
    ) -> bool {
        let before = self.seen.clone();
        let member = Arc::clone(&self.member);
        let fetched = tokio::select! {
            fetched = self.fetch_both(closures, top, awaited) => fetched,
            () = member.sickness() => return true,
        };
        if let Err(error) = fetched {
            let upstream = member.upstream.name();
            debug!(upstream, path = %top, %error, "closure not had at once, fetched level by level");
            self.seen = before;
            return false;
        }
        true
    }

    async fn fetch_both(
        &mut self,
        closures: &dyn Closures,
        top: &StorePath,
        mut awaited: Awaited,
    ) -> Result<(), Error> {
        let paths = closures.paths(top).await?;
        let mut paths = self.unknown(&paths);
        let room = self.options.paths_max.saturating_sub(awaited.len());
        if paths.len() > room {
            debug!(
                paths = paths.len(),
                "closure is too large, rest not fetched ahead"
            );
            paths.truncate(room);
        }
        self.announce(&paths, &mut awaited);
        let setup = self.shared.setup();
        if setup.member(self.member.id).is_none() {
            return Ok(());
        }
        let wanted: Vec<_> = awaited.values().map(|(path, _)| path.clone()).collect();
        for some in wanted.chunks(self.options.infos_max.max(1)) {
            for claim in closures.infos(some).await? {
                let Some((path, landing)) = awaited.remove(&claim.path.hash()) else {
                    continue;
                };
                if claim.path == path
                    && let Some(info) = self.check(&setup, claim)
                    && self.take_in(&setup, &info, landing).await.is_none()
                {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Has those who ask for these paths wait for what comes; not where somebody asks already.
    fn announce(&self, paths: &[StorePath], awaited: &mut Awaited) {
        for path in paths {
            if let Some(landing) = self.shared.flights.announce(path.hash()) {
                awaited.insert(path.hash(), (path.clone(), landing));
            }
        }
    }

    /// Checks a claim; `None`: the builder is not believed about it.
    fn check(&self, setup: &Setup, claim: PathInfo) -> Option<Verified> {
        let Answer::Found(info) = self.member.verify(claim, setup.store_dir()) else {
            return None;
        };
        let distrusted = self.shared.is_distrusted(info.path.hash(), self.member.id);
        (!distrusted).then_some(info)
    }

    /// Keeps a path info and gives it to who waits; `None`: the setup was replaced, stop.
    async fn take_in(
        &self,
        setup: &Arc<Setup>,
        info: &Verified,
        landing: Landing<Option<Arc<Entry>>>,
    ) -> Option<()> {
        let entry = self.shared.commit(setup, &self.member, info, now())?;
        self.shared.counters.narinfo_prefetched.increment();
        landing.land(Some(entry));
        // Signing takes its time, and others have questions, too.
        tokio::task::yield_now().await;
        Some(())
    }

    /// Returns those that were not seen on this walk and are not known.
    fn unknown(&mut self, references: &[StorePath]) -> Vec<StorePath> {
        let mut unknown = Vec::new();
        for path in references {
            if self.seen.insert(path.hash()) && !self.is_known(path) {
                unknown.push(path.clone());
            }
        }
        unknown
    }

    fn is_known(&self, path: &StorePath) -> bool {
        matches!(
            self.shared.cache.get(path.hash(), now()),
            Lookup::Present(..)
        )
    }
}
