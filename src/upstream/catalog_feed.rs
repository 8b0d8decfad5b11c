//! Keeps the live catalog of a store that feeds it, over whatever carries the bytes.
//!
//! Losing the feed loses nothing but quick answers: the store is asked then. A store that has no
//! catalog is asked for one seldom. See `codec::catalog`.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tracing::{debug, info};

use super::Error;
use super::backoff::{Backoff, Next};
use crate::codec::catalog::view::{self, Says, View};
use crate::codec::catalog::wire::Decoder;
use crate::nix::store_path::{StoreDir, StorePathHash};

/// Where a feed comes from.
#[async_trait]
pub trait FeedSource: Send + Sync + 'static {
    /// Begins a feed; `Ok(None)`: the store has none.
    ///
    /// Dropped, nothing is left behind. It need not bound its own time. The stream ends with the feed,
    /// and an error is its last item.
    async fn open(&self) -> Result<Option<FeedStream>, Error>;
}

/// The bytes of a feed, cut anywhere.
pub type FeedStream = BoxStream<'static, Result<Bytes, Error>>;

/// A catalog that is kept up to date in the background. The feed ends when it is dropped.
pub struct FedCatalog {
    view: Arc<Mutex<View>>,
    keeper: JoinHandle<()>,
}

/// The bounds of a fed catalog.
#[derive(Clone, Copy, Debug)]
pub struct FeedOptions {
    /// What of it is believed, and how long.
    pub view: view::Options,
    /// For a feed to begin.
    pub connect_timeout: Duration,
    /// A feed that is silent for so long is left; heartbeats come four times a second.
    pub silence_max: Duration,
    /// Pause before a store without a catalog is asked for one again.
    pub absent_pause: Duration,
}

impl FedCatalog {
    /// Begins to be fed; must be called in a runtime.
    pub fn start(
        name: String,
        source: Arc<dyn FeedSource>,
        store_dir: StoreDir,
        options: FeedOptions,
    ) -> Self {
        let view = Arc::new(Mutex::new(View::new(store_dir, options.view)));
        let keeper = tokio::spawn(keep(name, source, Arc::clone(&view), options));
        Self { view, keeper }
    }

    /// Tells what is known of a path without asking.
    pub fn says(&self, hash: &StorePathHash) -> Says {
        lock(&self.view).says(hash, Instant::now())
    }

    /// Returns how many paths are known, and whether that is all and fresh.
    pub fn state(&self) -> (usize, bool) {
        let view = lock(&self.view);
        (view.paths().len(), view.is_fresh(Instant::now()))
    }
}

impl Drop for FedCatalog {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

/// Reads one feed after the other, for ever.
async fn keep(
    name: String,
    source: Arc<dyn FeedSource>,
    view: Arc<Mutex<View>>,
    options: FeedOptions,
) {
    let mut backoff = Backoff::default();
    loop {
        let pause = match timeout(options.connect_timeout, source.open()).await {
            Ok(Ok(Some(feed))) => {
                let begun = Instant::now();
                let error = follow(&name, feed, &view, options.silence_max).await;
                lock(&view).clear();
                debug!(upstream = %name, error, "the catalog's feed ended");
                match backoff.lost(begun.elapsed(), fastrand::f64()) {
                    Next::AtOnce => Duration::ZERO,
                    Next::After(pause) => pause,
                }
            }
            Ok(Ok(None)) => options.absent_pause,
            Ok(Err(error)) => {
                debug!(upstream = %name, %error, "no feed of its catalog");
                backoff.failed(fastrand::f64())
            }
            Err(_) => backoff.failed(fastrand::f64()),
        };
        sleep(pause).await;
    }
}

/// Takes a feed in until it ends; returns why it did.
async fn follow(name: &str, mut feed: FeedStream, view: &Mutex<View>, silence: Duration) -> String {
    let mut decoder = Decoder::default();
    let mut told = false;
    loop {
        let chunk = match timeout(silence, feed.next()).await {
            Err(_) => return format!("silent for {silence:?}"),
            Ok(None) => return "it was closed".to_owned(),
            Ok(Some(Err(error))) => return error.to_string(),
            Ok(Some(Ok(chunk))) => chunk,
        };
        let now = Instant::now();
        let taken = decoder.push(&chunk, |frame| lock(view).apply(frame, now));
        if let Err(error) = taken {
            return error.to_string();
        }
        let view = lock(view);
        if !told && view.is_fresh(now) {
            told = true;
            info!(upstream = %name, paths = view.paths().len(), "its catalog is here");
        }
    }
}

fn lock(view: &Mutex<View>) -> MutexGuard<'_, View> {
    view.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Default for FeedOptions {
    fn default() -> Self {
        Self {
            view: view::Options::default(),
            connect_timeout: Duration::from_secs(10),
            silence_max: Duration::from_secs(5),
            absent_pause: Duration::from_secs(300),
        }
    }
}
