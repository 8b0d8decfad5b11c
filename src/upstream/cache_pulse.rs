//! Whether a cache that was heard a moment ago still lives: a tiny question beside those that wait.
//!
//! ```text
//! a question waits, no byte of the cache for 0.2 s ─┐
//! the feed of its catalog is quiet for 0.6 s ───────┴▶ pulse ──any byte within 1.2 s──▶ it lives: waited for
//!                                                            ──none──────────────────▶ silent, until one comes
//! ```
//!
//! Every byte is a sign of life, whatever it answers: a cache that is slow with a question and answers this one,
//! or sends NARs meanwhile, is waited for. A feed alone is a sign of life and never of death: its store may be in
//! doubt, and a proxy may hold it back. The pulse goes over HTTP/1, so over another connection than questions that
//! share one. Only caches that are near are judged: from afar, what was lost on its way comes late by itself.

use std::convert::Infallible;
use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt as _};
use futures_util::stream::{self, StreamExt as _};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until, timeout};

use super::Error;
use super::cache_files::{CacheFiles, FileStream};
use super::pulse::PulseOptions;

/// The bounds of a cache's pulse.
#[derive(Clone, Copy, Debug)]
pub struct CachePulseOptions {
    /// For any byte, and what a cache must be that is asked; as for daemons.
    pub pulse: PulseOptions,
    /// A question that waits asks when nothing was heard for so long. With `within`, a cache that turns silent
    /// costs 1.4 s once.
    pub ask_after: Duration,
    /// The same while it goes on waiting, so that a slow cache has little of it.
    pub ask_again_after: Duration,
    /// Quiet of a feed after which is asked, though nobody waits; it beats four times a second.
    pub feed_quiet: Duration,
    /// A cache that never answered so quickly is far. Of a near one even a connection whose first packet was lost,
    /// which is sent again after a second, is made and answers within `within`.
    pub near: Duration,
}

/// Takes the pulse of one cache.
pub(super) struct CachePulse {
    files: Arc<dyn CacheFiles>,
    options: CachePulseOptions,
    /// The pulse is to be taken.
    doubt: Notify,
    /// The quickest answer, in µs.
    quickest: AtomicU64,
}

/// A pulse under way, after which nothing was heard.
pub(super) struct Missed<'p> {
    pulse: BoxFuture<'p, Result<(), Error>>,
    heard: watch::Receiver<Option<Instant>>,
}

impl CachePulse {
    pub(super) fn new(files: Arc<dyn CacheFiles>, options: CachePulseOptions) -> Self {
        Self {
            files,
            options,
            doubt: Notify::new(),
            quickest: AtomicU64::new(u64::MAX),
        }
    }

    /// Returns for how long a silent cache was listened to.
    pub(super) fn within(&self) -> Duration {
        self.options.pulse.within
    }

    /// Notes how long an answer took.
    pub(super) fn answered(&self, took: Duration) {
        let took = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.quickest.fetch_min(took, Ordering::Relaxed);
    }

    /// Has the pulse taken whenever nothing is heard for a while; to be polled beside a question that waits.
    pub(super) async fn taken_while_quiet(&self) -> Infallible {
        let Some(heard) = self.files.heard() else {
            return pending().await;
        };
        let mut since = Instant::now();
        let mut patience = self.options.ask_after;
        loop {
            sleep_until(since + patience).await;
            let last = *heard.borrow();
            match last.filter(|last| *last > since) {
                Some(last) => since = last,
                None => {
                    self.doubt.notify_one();
                    since = Instant::now();
                    patience = self.options.ask_again_after;
                }
            }
        }
    }

    /// Hands the feed of a catalog on, and has the pulse taken once whenever it is quiet.
    pub(super) fn watching(self: Arc<Self>, feed: FileStream) -> FileStream {
        let feed = stream::unfold((self, feed), |(pulse, mut feed)| async move {
            let piece = match timeout(pulse.options.feed_quiet, feed.next()).await {
                Ok(piece) => piece,
                Err(_) => {
                    pulse.doubt.notify_one();
                    feed.next().await
                }
            };
            Some((piece?, (pulse, feed)))
        });
        feed.boxed()
    }

    /// Waits for a pulse after which nothing is heard in time. Dropped, it forgets the one that is under way.
    pub(super) async fn missed(&self) -> Missed<'_> {
        let Some(mut heard) = self.files.heard() else {
            return pending().await;
        };
        if !self.is_near() {
            // Its greeting came over new connections; one that stands shows how far it is.
            let _ = self.measured(self.files.pulse()).await;
        }
        loop {
            // It was heard just now, so older doubts are settled.
            let _ = self.doubt.notified().now_or_never();
            self.doubt.notified().await;
            if !self.tells(*heard.borrow_and_update()) {
                continue;
            }
            let mut pulse = self.measured(self.files.pulse()).boxed();
            let mut quiet = 0;
            // Piece by piece: after we were held up ourselves, what came meanwhile is read before the time is over.
            let piece = self.options.pulse.within / PIECES;
            while quiet < PIECES && timeout(piece, &mut pulse).await.is_err() {
                let since = heard.has_changed().unwrap_or(false);
                heard.mark_unchanged();
                quiet = if since { 0 } else { quiet + 1 };
            }
            if quiet == PIECES {
                return Missed { pulse, heard };
            }
        }
    }

    /// Decides whether a missing pulse would say anything.
    fn tells(&self, heard: Option<Instant>) -> bool {
        let lately = heard.is_some_and(|at| at.elapsed() <= self.options.pulse.heard_within);
        lately && self.is_near()
    }

    fn is_near(&self) -> bool {
        let quickest = Duration::from_micros(self.quickest.load(Ordering::Relaxed));
        quickest <= self.options.near
    }

    async fn measured(&self, pulse: impl Future<Output = Result<(), Error>>) -> Result<(), Error> {
        let asked = Instant::now();
        let answer = pulse.await;
        if answer.is_ok() {
            self.answered(asked.elapsed());
        }
        answer
    }
}

impl Missed<'_> {
    /// Waits until the cache is heard again; fails when the pulse does, by its own bound or with its connection.
    pub(super) async fn comes(mut self) -> Result<(), Error> {
        tokio::select! {
            answer = self.pulse => answer,
            Ok(()) = self.heard.changed() => Ok(()),
        }
    }
}

impl Default for CachePulseOptions {
    fn default() -> Self {
        Self {
            pulse: PulseOptions::default(),
            ask_after: Duration::from_millis(200),
            ask_again_after: Duration::from_secs(1),
            feed_quiet: Duration::from_millis(600),
            near: Duration::from_millis(100),
        }
    }
}

const PIECES: u32 = 4;
