//! The background pass after the keys or the trust in upstreams have changed, by reload or over a restart: it has
//! the narinfos of all entries signed by the keys of today, at half a processor's idle priority.
//!
//! It reads the index and asks; the writer writes. That it went through is noted in the folder, so that
//! the next start has nothing to do. What nobody vouches for today is shown without our signatures, so that it is
//! not believed by those who read the folder without muster either; it is looked at again at the next start or
//! reload.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tracing::{debug, info, warn};

use super::queue::Task;
use super::resign::Tally;
use super::shared::{Shared, Signing};

/// Begins the pass in a thread of its own, where it is needed; it ends with the cache, or when the keys
/// change once more.
pub fn start(shared: &Arc<Shared>) {
    let Some(signing) = shared.signing() else {
        return;
    };
    let own = Arc::clone(shared);
    let started = shared.start("cache-signing", move || run(&own, &signing));
    if let Err(error) = started {
        warn!(%error, "the cache is not signed anew: no thread");
    }
}

fn run(shared: &Shared, signing: &Signing) {
    // Others first; where that is not allowed, resting is enough.
    _ = rustix::process::setpriority_process(None, 10);
    while !shared.reconciled.load(Ordering::Acquire) {
        if is_over(shared, signing) {
            return;
        }
        shared.queue.sleep(PAUSE);
    }
    let folder = &shared.folder;
    if folder.is_signed_by(&signing.mark()) {
        return;
    }
    let begun = Instant::now();
    let done = folder
        .note_signed_by(None)
        .and_then(|()| pass(shared, signing));
    let dir = folder.root().display();
    match done {
        Ok(None) => {}
        Ok(Some(tally)) => {
            let (elapsed, signed, unsigned) = (begun.elapsed(), tally.signed, tally.refused);
            if signed > 0 || unsigned > 0 {
                info!(%dir, signed, unsigned, ?elapsed, "narinfos in the cache signed by the keys of today");
            }
            let noted = match unsigned {
                0 => folder.note_signed_by(Some(&signing.mark())),
                _ => Ok(()),
            };
            if let Err(error) = noted {
                debug!(%dir, %error, "it cannot be noted by which keys the narinfos are signed");
            }
        }
        Err(error) => {
            warn!(%dir, %error, "narinfos in the cache are not signed anew yet");
        }
    }
}

/// Goes through all entries; `None` when it ended early.
fn pass(shared: &Shared, signing: &Signing) -> io::Result<Option<Tally>> {
    // A commit that is being made carries the signatures of before, and is listed by then.
    let (reply, done) = oneshot::channel();
    if !shared.queue.push_patiently(Task::Flush(reply)) || done.blocking_recv().is_err() {
        return Ok(None);
    }
    let mut sum = Tally::default();
    let mut after = None;
    loop {
        let begun = Instant::now();
        let Some(index) = shared.index().filter(|_| !is_over(shared, signing)) else {
            return Ok(None);
        };
        let page = index.page(after, PAGE_ROWS);
        let page = page.map_err(io::Error::other)?;
        let Some((last, _)) = page.last() else {
            return Ok(Some(sum));
        };
        after = Some(*last);
        let with_nar = page.iter().filter(|(_, size)| *size > 0);
        let hashes: Vec<_> = with_nar.map(|(hash, _)| *hash).collect();
        let (reply, done) = sync_channel(1);
        if hashes.is_empty() {
            continue;
        }
        if !shared.queue.push_patiently(Task::SignAnew(hashes, reply)) {
            return Ok(None);
        }
        // The writer ended: so does the pass.
        let Ok(tally) = done.recv() else {
            return Ok(None);
        };
        sum = sum.and(tally?);
        shared.queue.sleep(begun.elapsed());
    }
}

fn is_over(shared: &Shared, signing: &Signing) -> bool {
    let current = shared.signing();
    let same = current.is_some_and(|current| current.generation == signing.generation);
    !same || shared.queue.is_stopped() || shared.index().is_none()
}

/// Rows of the index that the writer works off at one go: some milliseconds and a sync.
const PAGE_ROWS: usize = 128;
const PAUSE: Duration = Duration::from_millis(50);
