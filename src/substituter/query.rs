//! A narinfo request: what is kept, else all upstreams at once, the first trusted answer wins.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt as _, StreamExt as _};
use tracing::debug;

use crate::cache::memory::{Entry, Lookup, UpstreamId};
use crate::cache::policy::Freshness;
use crate::nix::store_path::StorePathHash;

use super::counters::Counter;
use super::health::Standing;
use super::member::{Answer, Member};
use super::shared::Shared;
use super::{Setup, closure, now};

/// What a narinfo is looked up for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// To be given to a client; counted.
    NarInfo,
    /// To know where its NAR is.
    Nar,
}

/// Finds the narinfo of a hash part.
///
/// Dropped, the question goes on if somebody else asks it too, and is given up otherwise.
pub(super) async fn entry(
    shared: &Arc<Shared>,
    hash: StorePathHash,
    wanted: Wanted,
) -> Option<Arc<Entry>> {
    let count = |counter: &Counter| {
        if wanted == Wanted::NarInfo {
            counter.increment();
        }
    };
    // Under a lock of all, so not with each of many requests for the same.
    let note = |entry: &Entry| {
        let now = now();
        if wanted == Wanted::NarInfo && entry.asking_is_news(NOTED_FOR, now) {
            shared.ahead.note_asked(hash, now);
        }
    };
    loop {
        let asked = now();
        match shared.cache.get(hash, asked) {
            Lookup::Present(entry, freshness) => {
                count(&shared.counters.narinfo_memory_hits);
                if freshness == Freshness::Stale {
                    revalidate(shared, hash, &entry);
                }
                shared.keep(&entry, asked);
                note(&entry);
                return Some(entry);
            }
            Lookup::Absent => {
                count(&shared.counters.narinfo_absent);
                return None;
            }
            Lookup::Miss if shared.came_back(hash) => return None,
            Lookup::Miss => {
                if let Some(entry) = shared.recall(&shared.setup(), hash, asked) {
                    count(&shared.counters.narinfo_recalled);
                    revalidate(shared, hash, &entry);
                    shared.keep(&entry, asked);
                    return Some(entry);
                }
            }
        }
        let lead = || ask_all(Arc::clone(shared), hash);
        // An announced flight that was abandoned: look again, and lead this time.
        if let Some(answer) = shared.flights.join(hash, lead).await {
            if let Some(entry) = &answer {
                shared.keep(entry, now());
                note(entry);
            }
            return match (answer, wanted) {
                // A narinfo's "no" is quick; a NAR was promised to somebody once.
                (None, Wanted::Nar) => ask_sick(shared, hash).await,
                (answer, _) => answer,
            };
        }
    }
}

/// Asks those that are sick but connected, all at once, as long as a last holder is waited for.
async fn ask_sick(shared: &Arc<Shared>, hash: StorePathHash) -> Option<Arc<Entry>> {
    let setup = shared.setup();
    let patience = shared.options.transfer.stall_last;
    let doubtful = setup.members.iter().filter(|member| member.is_doubtful());
    let ask = |member: &Arc<Member>| {
        let (member, setup) = (Arc::clone(member), Arc::clone(&setup));
        async move {
            let store_dir = setup.store_dir();
            let answer = member.path_info_of_sick(hash, store_dir, patience).await;
            (member, answer)
        }
    };
    let mut asked: FuturesUnordered<_> = doubtful.map(ask).collect();
    while let Some((member, answer)) = asked.next().await {
        if let Answer::Found(verified) = answer {
            return shared.commit(&setup, &member, &verified, now());
        }
    }
    None
}

/// Asks every upstream that is not sick; returns the first trusted answer.
async fn ask_all(shared: Arc<Shared>, hash: StorePathHash) -> Option<Arc<Entry>> {
    loop {
        // Outdated at most once for each reload.
        if let Ok(answer) = ask_setup(&shared, &shared.setup(), hash).await {
            return answer;
        }
    }
}

/// The setup was replaced while its upstreams were asked.
struct Outdated;

async fn ask_setup(
    shared: &Arc<Shared>,
    setup: &Arc<Setup>,
    hash: StorePathHash,
) -> Result<Option<Arc<Entry>>, Outdated> {
    let distrusted = distrusted(shared, setup, hash);
    let mut asked = ask(setup, hash, &distrusted);
    let mut complete = asked.complete && distrusted.is_empty();
    while let Some((member, answer)) = asked.answers.next().await {
        match answer {
            Answer::Found(verified) => {
                let entry = shared.commit(setup, &member, &verified, now());
                let entry = entry.ok_or(Outdated)?;
                shared.counters.narinfo_found.increment();
                note_late_answers(shared, setup, asked.answers, &entry);
                closure::follow(shared, &member, &verified);
                return Ok(Some(entry));
            }
            Answer::Absent => {}
            Answer::Unknown => complete = false,
        }
    }
    if complete {
        shared.commit_absent(setup, hash, now()).ok_or(Outdated)?;
        shared.counters.narinfo_absent.increment();
    } else {
        shared.if_current(setup, || ()).ok_or(Outdated)?;
        debug!(path.hash = %hash, "answered 404 without full knowledge");
        shared.counters.narinfo_absent_unsure.increment();
    }
    Ok(None)
}

/// What upstreams say of a path, as it comes.
pub(super) type Answers = FuturesUnordered<BoxFuture<'static, (Arc<Member>, Answer)>>;

/// Upstreams that were asked for a path.
pub(super) struct Asked {
    pub(super) answers: Answers,
    /// Whether none was left out for being sick.
    complete: bool,
}

/// Asks all upstreams that are not sick but `left_out`; dropped, the questions are abandoned.
pub(super) fn ask(setup: &Arc<Setup>, hash: StorePathHash, left_out: &[UpstreamId]) -> Asked {
    let now = now();
    let mut asked = Asked {
        answers: FuturesUnordered::new(),
        complete: true,
    };
    for member in &setup.members {
        // What we would tell ourselves is nothing that we do not know.
        if member.is_ourselves() || left_out.contains(&member.id) {
            continue;
        }
        if member.standing(now) == Standing::Sick {
            asked.complete = false;
            continue;
        }
        let (member, setup) = (Arc::clone(member), Arc::clone(setup));
        let answer = async move {
            let answer = member.path_info(hash, setup.store_dir()).await;
            (member, answer)
        };
        asked.answers.push(answer.boxed());
    }
    asked
}

/// Returns those who gave wrong bytes for a path: one of another NAR hash would win again by being first.
fn distrusted(shared: &Shared, setup: &Setup, hash: StorePathHash) -> Vec<UpstreamId> {
    let ids = setup.members.iter().map(|member| member.id);
    ids.filter(|id| shared.is_distrusted(hash, *id)).collect()
}

/// Records who else has the path, without delaying the first answer.
fn note_late_answers(
    shared: &Arc<Shared>,
    setup: &Arc<Setup>,
    mut answers: Answers,
    entry: &Arc<Entry>,
) {
    if answers.is_empty() {
        return;
    }
    let (held, setup, entry) = (Arc::clone(shared), Arc::clone(setup), Arc::clone(entry));
    shared.tasks.spawn(async move {
        while let Some((member, answer)) = answers.next().await {
            if let Answer::Found(info) = answer {
                held.note_holder(&setup, &entry, &member, &info);
            }
        }
    });
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
/// The NAR that was chosen stays chosen as long as anybody has it, or a holder could not be asked.
async fn ask_again(shared: &Arc<Shared>, hash: StorePathHash, entry: &Arc<Entry>) {
    let setup = shared.setup();
    let mut answers = ask(&setup, hash, &distrusted(shared, &setup, hash)).answers;
    let mut same = Vec::new();
    let mut other = None;
    let mut denied = Vec::new();
    while let Some((member, answer)) = answers.next().await {
        match answer {
            Answer::Found(info) if info.nar_hash == entry.nar_hash => same.push((member, info)),
            Answer::Found(info) => {
                shared.note_holder(&setup, entry, &member, &info);
                denied.push(member.id);
                other.get_or_insert((member, info));
            }
            Answer::Absent => denied.push(member.id),
            Answer::Unknown => {}
        }
    }
    // Else what memory forgets would come back from there.
    shared.deny(&setup, hash, entry.nar_hash, &denied);
    let now = now();
    let mut holders = entry.holders();
    holders.retain(|id| !denied.contains(id));
    let mut same = same.into_iter();
    if let Some((member, info)) = same.next() {
        if let Some(fresh) = shared.recommit(&setup, &member, &info, now) {
            same.for_each(|(member, info)| shared.note_holder(&setup, &fresh, &member, &info));
            for id in holders {
                fresh.add_holder(id);
            }
        }
    } else if !holders.is_empty() || entry.file().is_some() {
        // No holder contradicts it, or its NAR is here: believed for another while.
        shared.extend(&setup, hash, entry, &holders, now);
    } else if let Some((member, info)) = other {
        shared.recommit(&setup, &member, &info, now);
    } else {
        shared.cache.remove(hash);
    }
}

/// Revalidations at once; more wait for the next request.
const REVALIDATING_MAX: usize = 1000;
/// Far less than what is noted is remembered for.
const NOTED_FOR: Duration = Duration::from_secs(2);
