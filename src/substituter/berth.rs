//! Transfers whose client reads nothing: they give their builder's channel up when others want it.
//!
//! A builder gives a few large NARs at a time. Between two chunks a transfer leaves its stream in a
//! [`Berth`]; one that has lain there for long is dropped for somebody who waits, and is opened
//! anew, at the same byte, when its client reads on.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use tracing::debug;

use crate::cache::memory::UpstreamId;
use crate::upstream::NarStream;

use super::member::Member;
use super::now;

/// The streams that nobody reads from at the moment.
#[derive(Default)]
pub(super) struct Berths {
    // Taken before any berth's own lock; neither is held over an await.
    berths: Mutex<Vec<Weak<Berth>>>,
}

/// The place of one transfer's stream between two chunks.
#[derive(Default)]
pub(super) struct Berth {
    idle: Mutex<Option<Idle>>,
}

struct Idle {
    member: Arc<Member>,
    stream: NarStream,
    since: Instant,
}

impl Berths {
    /// Makes a place, which lasts as long as its transfer.
    pub(super) fn berth(&self) -> Arc<Berth> {
        let berth = Arc::new(Berth::default());
        let mut berths = lock(&self.berths);
        berths.retain(|berth| berth.strong_count() > 0);
        berths.push(Arc::downgrade(&berth));
        berth
    }

    /// Makes room at an upstream for as long as it is not dropped, one transfer at a time.
    pub(super) async fn make_room(&self, id: UpstreamId) -> Infallible {
        loop {
            tokio::time::sleep(PAUSE).await;
            let Some(idle) = self.longest_idle(id) else {
                continue;
            };
            let upstream = idle.member.upstream.name();
            debug!(upstream, "a client reads nothing, its transfer makes room");
        }
    }

    fn longest_idle(&self, id: UpstreamId) -> Option<Idle> {
        let now = now();
        let berths = lock(&self.berths);
        let since = |berth: &Arc<Berth>| {
            let idle = lock(&berth.idle);
            let idle = idle.as_ref().filter(|idle| idle.member.id == id)?;
            (now.saturating_duration_since(idle.since) >= IDLE_MIN).then_some(idle.since)
        };
        let living = berths.iter().filter_map(Weak::upgrade);
        let (_, longest) = living
            .filter_map(|berth| Some((since(&berth)?, berth)))
            .min_by_key(|(since, _)| *since)?;
        // Its client may have come back in between; then there is no room by it.
        lock(&longest.idle).take()
    }
}

impl Berth {
    /// Leaves a stream until the client wants more.
    pub(super) fn leave(&self, (member, stream): (Arc<Member>, NarStream)) {
        let since = now();
        *lock(&self.idle) = Some(Idle {
            member,
            stream,
            since,
        });
    }

    /// Takes the stream back, unless it was given up.
    pub(super) fn take_back(&self) -> Option<(Arc<Member>, NarStream)> {
        let idle = lock(&self.idle).take()?;
        Some((idle.member, idle.stream))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A slow client still takes a chunk in this time: its socket holds megabytes.
const IDLE_MIN: Duration = Duration::from_secs(20);
/// How long somebody waits before a first transfer makes room, and between two.
const PAUSE: Duration = Duration::from_secs(1);
