//! A narinfo request: what is kept, else all upstreams at once, the first trusted answer wins.

use std::sync::Arc;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tracing::debug;

use crate::cache::memory::{Entry, Lookup};
use crate::cache::policy::Freshness;
use crate::nix::store_path::StorePathHash;

use super::health::Standing;
use super::member::{Answer, Member};
use super::shared::Shared;
use super::{Setup, closure, now};

/// Finds the narinfo of a hash part.
///
/// Dropped, the question goes on if somebody else asks it too, and is given up otherwise.
pub(super) async fn entry(shared: &Arc<Shared>, hash: StorePathHash) -> Option<Arc<Entry>> {
    loop {
        let asked = now();
        match shared.cache.get(hash, asked) {
            Lookup::Present(entry, freshness) => {
                shared.counters.narinfo_memory_hits.increment();
                if freshness == Freshness::Stale {
                    revalidate(shared, hash, &entry);
                }
                shared.keep(hash, &entry, asked);
                return Some(entry);
            }
            Lookup::Absent => {
                shared.counters.narinfo_absent.increment();
                return None;
            }
            Lookup::Miss if shared.came_back(hash) => return None,
            Lookup::Miss => {}
        }
        let lead = || ask_all(Arc::clone(shared), hash);
        // An announced flight that was abandoned: look again, and lead this time.
        if let Some(answer) = shared.flights.join(hash, lead).await {
            if let Some(entry) = &answer {
                shared.keep(hash, entry, now());
            }
            return answer;
        }
    }
}

/// Asks every upstream that is not sick; returns the first trusted answer.
async fn ask_all(shared: Arc<Shared>, hash: StorePathHash) -> Option<Arc<Entry>> {
    let setup = shared.setup();
    let mut complete = true;
    let mut asked = ask(&setup, hash, &mut complete);
    while let Some((member, answer)) = asked.next().await {
        match answer {
            Answer::Found(verified) => {
                shared.counters.narinfo_found.increment();
                let entry = shared.commit(&member, &verified, now());
                note_late_answers(&shared, asked, &entry);
                closure::follow(&shared, &member, &verified);
                return Some(entry);
            }
            Answer::Absent => {}
            Answer::Unknown => complete = false,
        }
    }
    if complete {
        shared.counters.narinfo_absent.increment();
        shared.cache.commit_absent(hash, now());
    } else {
        debug!(path.hash = %hash, "answered 404 without full knowledge");
        shared.counters.narinfo_absent_unsure.increment();
    }
    None
}

type Asked = FuturesUnordered<futures_util::future::BoxFuture<'static, (Arc<Member>, Answer)>>;

fn ask(setup: &Arc<Setup>, hash: StorePathHash, complete: &mut bool) -> Asked {
    let now = now();
    let asked = Asked::new();
    for member in &setup.members {
        if member.standing(now) == Standing::Sick {
            *complete = false;
            continue;
        }
        let (member, setup) = (Arc::clone(member), Arc::clone(setup));
        asked.push(Box::pin(async move {
            let answer = member.path_info(hash, setup.store_dir()).await;
            (member, answer)
        }));
    }
    asked
}

/// Records who else has the path, without delaying the first answer.
fn note_late_answers(shared: &Arc<Shared>, mut asked: Asked, entry: &Arc<Entry>) {
    if asked.is_empty() {
        return;
    }
    let (held, entry) = (Arc::clone(shared), Arc::clone(entry));
    shared.tasks.spawn(async move {
        while let Some((member, answer)) = asked.next().await {
            if let Answer::Found(info) = answer {
                held.note_holder(&entry, &member, &info);
            }
        }
    });
}

/// Finds who has the NAR that `nar_hash` names among those not yet `tried`.
pub(super) async fn further_holders(
    shared: &Arc<Shared>,
    hash: StorePathHash,
    tried: &[crate::cache::memory::UpstreamId],
    mut accept: impl FnMut(Arc<Member>, crate::nix::path_info::Verified) -> bool,
) {
    let setup = shared.setup();
    let mut asked: FuturesUnordered<_> = setup
        .members
        .iter()
        .filter(|member| !tried.contains(&member.id) && !member.is_sick())
        .map(|member| {
            let setup = &setup;
            async move { (member, member.path_info(hash, setup.store_dir()).await) }
        })
        .collect();
    while let Some((member, answer)) = asked.next().await {
        if let Answer::Found(verified) = answer
            && accept(Arc::clone(member), verified)
        {
            return;
        }
    }
}

/// Asks again in the background, once at a time for each path.
fn revalidate(shared: &Arc<Shared>, hash: StorePathHash, entry: &Arc<Entry>) {
    let mut under_way = shared.revalidating();
    if under_way.len() >= REVALIDATING_MAX || !under_way.insert(hash) {
        return;
    }
    drop(under_way);
    let (held, entry) = (Arc::clone(shared), Arc::clone(entry));
    let begun = shared.tasks.spawn(async move {
        ask_again(&held, hash, &entry).await;
        held.revalidating().remove(&hash);
    });
    if !begun {
        shared.revalidating().remove(&hash);
    }
}

/// Compares what is served with what all upstreams say now.
///
/// The NAR that was chosen stays chosen as long as anybody has it or could not be asked.
async fn ask_again(shared: &Arc<Shared>, hash: StorePathHash, entry: &Arc<Entry>) {
    let setup = shared.setup();
    let mut complete = true;
    let mut asked = ask(&setup, hash, &mut complete);
    let mut same = Vec::new();
    let mut other = None;
    while let Some((member, answer)) = asked.next().await {
        match answer {
            Answer::Found(info) if info.nar_hash == entry.nar_hash => same.push((member, info)),
            Answer::Found(info) => {
                shared.note_holder(entry, &member, &info);
                other.get_or_insert((member, info));
            }
            Answer::Absent => {}
            Answer::Unknown => complete = false,
        }
    }
    let now = now();
    let mut same = same.into_iter();
    if let Some((member, info)) = same.next() {
        let fresh = shared.recommit(&member, &info, now);
        same.for_each(|(member, _)| fresh.add_holder(member.id));
    } else if !complete {
        // Nobody contradicts it: believed for another while, from what was known.
        shared.extend(hash, entry, now);
    } else if let Some((member, info)) = other {
        shared.recommit(&member, &info, now);
    } else {
        shared.cache.remove(hash);
    }
}

/// Revalidations at once; more wait for the next request.
const REVALIDATING_MAX: usize = 1000;
