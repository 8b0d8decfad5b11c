//! The closure of a path that was found, fetched before the client asks for it.
//!
//! A client walks a closure level by level; from the builder that has the top, the path infos of
//! its references, and theirs, are asked for at once. Bounded, and nothing waits for it but those
//! who ask for just these paths.

use std::collections::HashSet;
use std::sync::Arc;

use tracing::debug;

use crate::cache::memory::Lookup;
use crate::nix::path_info::PathInfo;
use crate::nix::store_path::{StorePath, StorePathHash};
use crate::upstream::Error;

use super::member::{Answer, Member};
use super::now;
use super::shared::Shared;

/// The bounds of walking closures.
#[derive(Clone, Debug)]
pub struct Options {
    /// Closures walked at once; further ones are not walked.
    pub walks_max: usize,
    /// Paths fetched for one closure.
    pub paths_max: usize,
    /// Questions asked in one go; small enough that a client's own question is not held up.
    pub batch_max: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            walks_max: 8,
            paths_max: 20_000,
            batch_max: 256,
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
    shared.tasks.spawn(async move {
        walk.run(first).await;
        drop(permit);
    });
}

struct Walk {
    shared: Arc<Shared>,
    member: Arc<Member>,
    seen: HashSet<StorePathHash>,
    options: Options,
}

impl Walk {
    async fn run(&mut self, mut level: Vec<StorePath>) {
        while !level.is_empty() {
            let mut next = Vec::new();
            for batch in level.chunks(self.options.batch_max) {
                if self.seen.len() > self.options.paths_max {
                    debug!(
                        paths = self.seen.len(),
                        "closure is too large, rest not fetched ahead"
                    );
                    return;
                }
                if !self.fetch(batch, &mut next).await {
                    return;
                }
            }
            level = next;
        }
    }

    /// Fetches one batch; `false` when the upstream cannot be asked any more.
    async fn fetch(&mut self, batch: &[StorePath], next: &mut Vec<StorePath>) -> bool {
        // A path that somebody asks for already has a flight of its own.
        let (paths, landings): (Vec<_>, Vec<_>) = batch
            .iter()
            .filter_map(|path| {
                let landing = self.shared.flights.announce(path.hash())?;
                Some((path.clone(), landing))
            })
            .unzip();
        if paths.is_empty() {
            return true;
        }
        let setup = self.shared.setup();
        if setup.member(self.member.id).is_none() {
            return false;
        }
        let answers = tokio::select! {
            answers = self.member.upstream.path_infos(&paths) => answers,
            () = self.member.sickness() => return false,
        };
        // One batch that is late is one time-out, however many questions it had.
        let failed = answers
            .iter()
            .filter_map(|answer| answer.as_ref().err())
            .find(|error| !matches!(error, Error::Remote(_)));
        let alive = failed.is_none();
        let _ = self.member.note(failed.cloned().map_or(Ok(()), Err));
        for ((answer, path), landing) in answers.into_iter().zip(paths).zip(landings) {
            let Ok(Some(claim)) = answer else {
                continue;
            };
            if claim.path != path {
                continue;
            }
            let Answer::Found(info) = self.member.verify(claim, setup.store_dir()) else {
                continue;
            };
            let Some(entry) = self.shared.commit(&setup, &self.member, &info, now()) else {
                return false;
            };
            self.shared.counters.narinfo_prefetched.increment();
            landing.land(Some(entry));
            next.extend(self.unknown(&info.references));
            tokio::task::yield_now().await;
        }
        alive
    }

    /// Returns those that were not seen on this walk and are not known.
    fn unknown(&mut self, references: &[StorePath]) -> Vec<StorePath> {
        let now = now();
        let mut unknown = Vec::new();
        for path in references {
            let hash = path.hash();
            let known = matches!(self.shared.cache.get(hash, now), Lookup::Present(..));
            if self.seen.insert(hash) && !known {
                unknown.push(path.clone());
            }
        }
        unknown
    }
}
