//! Transfers whose client reads nothing: they give their builder's channel up when others want it, or the memory of
//! their decoder.
//!
//! A builder gives a few large NARs at a time. Between two chunks a transfer leaves its stream in a
//! [`Berth`]; one that has lain there for long is dropped for somebody who waits, and is opened
//! anew, at the same byte, when its client reads on.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use tracing::debug;

use crate::cache::memory::UpstreamId;

use super::member::Member;
use super::now;

/// The streams that nobody reads from at the moment.
#[derive(Default)]
pub(super) struct Berths {
    // Taken before any berth's own lock; neither is held over an await.
    berths: Mutex<Vec<Weak<dyn Place>>>,
}

/// The place of one transfer's stream between two chunks.
pub(super) struct Berth<S> {
    idle: Mutex<Option<Idle<S>>>,
}

/// Who has room for a few transfers at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Giver {
    /// An upstream, or the cache.
    Member(UpstreamId),
    /// Files that are still being written, of which there is no member.
    Growing,
}

struct Idle<S> {
    giver: Giver,
    stream: S,
    since: Instant,
}

/// A berth, whatever lies in it.
trait Place: Send + Sync {
    /// Since when a stream of this giver lies here.
    fn idle_since(&self, giver: Giver) -> Option<Instant>;

    /// Drops what lies here; `false` when its client came back before.
    fn clear(&self) -> bool;
}

impl Berths {
    /// Makes a place, which lasts as long as its transfer.
    pub(super) fn berth<S: Send + 'static>(&self) -> Arc<Berth<S>> {
        let berth = Arc::new(Berth {
            idle: Mutex::new(None),
        });
        let mut berths = lock(&self.berths);
        berths.retain(|berth| berth.strong_count() > 0);
        let weak: Weak<Berth<S>> = Arc::downgrade(&berth);
        berths.push(weak);
        berth
    }

    /// Makes room at an upstream as [`Self::make_room`] does.
    pub(super) async fn make_room_at(&self, member: &Member) -> Infallible {
        let giver = Giver::Member(member.id);
        self.make_room(giver, member.upstream.name()).await
    }

    /// Makes room at a giver for as long as it is not dropped, one transfer at a time.
    pub(super) async fn make_room(&self, giver: Giver, name: &str) -> Infallible {
        loop {
            tokio::time::sleep(PAUSE).await;
            if self.longest_idle(giver).is_some_and(|berth| berth.clear()) {
                debug!(
                    upstream = name,
                    "a client reads nothing, its transfer makes room"
                );
            }
        }
    }

    fn longest_idle(&self, giver: Giver) -> Option<Arc<dyn Place>> {
        let now = now();
        let since = |berth: &Arc<dyn Place>| {
            let since = berth.idle_since(giver)?;
            (now.saturating_duration_since(since) >= IDLE_MIN).then_some(since)
        };
        let berths = lock(&self.berths);
        let living = berths.iter().filter_map(Weak::upgrade);
        let (_, longest) = living
            .filter_map(|berth| Some((since(&berth)?, berth)))
            .min_by_key(|(since, _)| *since)?;
        Some(longest)
    }
}

impl<S> Berth<S> {
    /// Leaves a stream until the client wants more.
    pub(super) fn leave(&self, giver: Giver, stream: S) {
        let since = now();
        *lock(&self.idle) = Some(Idle {
            giver,
            stream,
            since,
        });
    }

    /// Takes the stream back, unless it was given up.
    pub(super) fn take_back(&self) -> Option<S> {
        Some(lock(&self.idle).take()?.stream)
    }
}

impl<S: Send> Place for Berth<S> {
    fn idle_since(&self, giver: Giver) -> Option<Instant> {
        let idle = lock(&self.idle);
        let idle = idle.as_ref().filter(|idle| idle.giver == giver)?;
        Some(idle.since)
    }

    fn clear(&self) -> bool {
        // Dropped behind the lock.
        let idle = lock(&self.idle).take();
        idle.is_some()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A slow client still takes a chunk in this time: its socket holds megabytes.
const IDLE_MIN: Duration = Duration::from_secs(20);
/// How long somebody waits before a first transfer makes room, and between two.
const PAUSE: Duration = Duration::from_secs(1);
