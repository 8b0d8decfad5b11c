//! Keeping promised paths alive on their builders, many at a time.
//!
//! A client that walks a closure is promised hundreds of paths within a moment. None of them is in danger at once,
//! so they are gathered for a moment: a builder roots them all at the price of one question.
//!
//! ```text
//! narinfo given ─▶ gathered, 20 ms ─▶ by holder ─▶ keep_many ─┬─▶ kept
//!                                       ▲                     └─▶ gone or unknown: the next holder
//!                                       └──────────────────────────────┘
//! ```

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::time::sleep;
use tracing::{debug, info_span};

use crate::cache::memory::{Entry, UpstreamId};
use crate::nix::store_path::StorePath;

use super::Setup;
use super::shared::Shared;

/// The paths that are to be kept alive.
#[derive(Default)]
pub(super) struct Promises {
    // Never held over an await; no other lock is taken under it.
    gathered: Mutex<Vec<Arc<Entry>>>,
}

/// A path, and whom it can be kept at, the next one last.
struct Promised {
    path: StorePath,
    entry: Arc<Entry>,
    holders: Vec<UpstreamId>,
}

impl Promises {
    fn gathered(&self) -> MutexGuard<'_, Vec<Arc<Entry>>> {
        self.gathered.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    /// Has the path kept alive on a holder, in the background, where that is due.
    pub(super) fn keep(self: &Arc<Self>, entry: &Arc<Entry>, now: Instant) {
        if !entry.keep_is_due(self.options.keep_interval, now) {
            return;
        }
        let first = {
            let mut gathered = self.promises.gathered();
            if gathered.len() >= GATHERED_MAX {
                return;
            }
            gathered.push(Arc::clone(entry));
            gathered.len() == 1
        };
        // It is the work of many requests.
        let apart = info_span!(parent: None, "keep");
        let spawn = || self.tasks.spawn(keep_gathered(Arc::clone(self)));
        if first && !apart.in_scope(spawn) {
            self.promises.gathered().clear();
        }
    }
}

async fn keep_gathered(shared: Arc<Shared>) {
    sleep(GATHERED_FOR).await;
    let gathered = std::mem::take(&mut *shared.promises.gathered());
    let setup = shared.setup();
    let mut promised = Vec::with_capacity(gathered.len());
    for some in gathered.chunks(PARSED_AT_ONCE) {
        promised.extend(some.iter().filter_map(|entry| {
            let mut holders = entry.holders();
            holders.reverse();
            Some(Promised {
                path: setup.parse(entry)?.path,
                entry: Arc::clone(entry),
                holders,
            })
        }));
        tokio::task::yield_now().await;
    }
    // No holder waits for another.
    let mut asked = FuturesUnordered::new();
    loop {
        for (id, some) in by_next_holder(&setup, std::mem::take(&mut promised)) {
            asked.push(keep_at(&shared, &setup, id, some));
        }
        match asked.next().await {
            Some(left) => promised = left,
            None => return,
        }
    }
}

fn by_next_holder(setup: &Setup, promised: Vec<Promised>) -> HashMap<UpstreamId, Vec<Promised>> {
    let mut by_holder: HashMap<UpstreamId, Vec<Promised>> = HashMap::new();
    for mut promised in promised {
        if let Some(holder) = next_holder(setup, &mut promised) {
            by_holder.entry(holder).or_default().push(promised);
        }
    }
    by_holder
}

fn next_holder(setup: &Setup, promised: &mut Promised) -> Option<UpstreamId> {
    let well = |id: &UpstreamId| setup.member(*id).is_some_and(|member| !member.is_sick());
    loop {
        let id = promised.holders.pop()?;
        if well(&id) {
            return Some(id);
        }
    }
}

/// Asks one holder to keep them; those that it does not keep come back.
async fn keep_at(
    shared: &Arc<Shared>,
    setup: &Setup,
    id: UpstreamId,
    promised: Vec<Promised>,
) -> Vec<Promised> {
    let Some(member) = setup.member(id) else {
        return promised;
    };
    let paths: Vec<_> = promised
        .iter()
        .map(|promised| promised.path.clone())
        .collect();
    let answers = tokio::select! {
        answers = member.upstream.keep_many(&paths) => answers,
        () = member.sickness() => return promised,
    };
    let mut left = Vec::new();
    for (promised, answer) in promised.into_iter().zip(answers) {
        match answer {
            Ok(true) => {}
            Ok(false) => {
                shared.forget_holder(promised.path.hash(), promised.entry.nar_hash, id);
                left.push(promised);
            }
            Err(error) => {
                let (upstream, path) = (member.upstream.name(), &promised.path);
                debug!(upstream, %path, %error, "could not be kept alive");
                left.push(promised);
            }
        }
    }
    left
}

/// Far less than a builder's collector takes to find a path that nobody holds.
const GATHERED_FOR: Duration = Duration::from_millis(20);
/// Further ones are kept when they are asked for and due again, half the lifetime of a root later.
const GATHERED_MAX: usize = 10_000;
/// Narinfos parsed between two looks at what else there is to do: some 200 µs.
const PARSED_AT_ONCE: usize = 64;
