//! The link to a binary cache: there is no standing connection, so it is a question that decides.
//!
//! ```text
//! Connecting ──nix-cache-info──▶ Up ──a question breaks──▶ Connecting …
//!            ──an error────────▶ Down ──a pause, or reconnect()──▶ Connecting …
//! ```
//!
//! The first `nix-cache-info` also tells whether the cache is of our store directory. One warning for each
//! cause; the pauses are those of `backoff`.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};
use tracing::{debug, info, warn};

use super::backoff::{Backoff, Next};
use super::cache_files::CacheFiles;
use super::{Error, Link};
use crate::nix::cache_info::CacheInfo;
use crate::nix::store_path::StoreDir;

/// Keeps the link of one cache; dropped, it ends.
pub(super) struct CacheLink {
    shared: Arc<Shared>,
    keeper: JoinHandle<()>,
}

struct Shared {
    name: String,
    store_dir: StoreDir,
    files: Arc<dyn CacheFiles>,
    link: watch::Sender<Link>,
    /// A question broke: the link is to be looked at.
    distrust: Notify,
    /// Pauses end.
    wake: Notify,
    // What questions fail with while the link is down; never held over an await.
    cause: Mutex<Error>,
}

impl CacheLink {
    /// Begins to ask; needs a tokio runtime.
    pub(super) fn start(name: String, store_dir: StoreDir, files: Arc<dyn CacheFiles>) -> Self {
        let since = Instant::now().into_std();
        let shared = Arc::new(Shared {
            name,
            store_dir,
            files,
            link: watch::Sender::new(Link::Connecting { since }),
            distrust: Notify::new(),
            wake: Notify::new(),
            cause: Mutex::new(Error::Down("not asked yet".into())),
        });
        let keeper = tokio::spawn(keep(Arc::clone(&shared)));
        Self { shared, keeper }
    }

    /// Follows the state.
    pub(super) fn watch(&self) -> watch::Receiver<Link> {
        self.shared.link.subscribe()
    }

    /// Asks at once, in place of a pause.
    pub(super) fn reconnect(&self) {
        let since = Instant::now().into_std();
        let down = self.shared.link.send_if_modified(|link| {
            let down = matches!(link, Link::Down { .. });
            if down {
                *link = Link::Connecting { since };
            }
            down
        });
        match down {
            true => self.shared.wake.notify_one(),
            // After a sleep, what is up may have gone.
            false => self.shared.distrust.notify_one(),
        }
    }

    /// Waits while the link is connecting; fails when it is down.
    pub(super) async fn ready(&self) -> Result<(), Error> {
        let mut link = self.shared.link.subscribe();
        let settled = link.wait_for(|link| !matches!(link, Link::Connecting { .. }));
        match settled.await.as_deref() {
            Ok(Link::Up { .. }) => Ok(()),
            _ => Err(self.shared.cause().clone()),
        }
    }

    /// Hands an answer on, and has the link looked at when it speaks of a broken connection.
    pub(super) fn note<T>(&self, answer: Result<T, Error>) -> Result<T, Error> {
        if matches!(answer, Err(Error::Lost(_) | Error::TimedOut { .. })) {
            self.shared.distrust.notify_one();
        }
        answer
    }
}

impl Drop for CacheLink {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

/// Asks, waits for doubts or for a pause to end, and asks again, for ever.
async fn keep(shared: Arc<Shared>) {
    let mut backoff = Backoff::default();
    let mut told: Option<Arc<str>> = None;
    let mut known: Option<Arc<str>> = None;
    loop {
        let pause = match shared.greet().await {
            Ok(peer) => {
                if known.as_ref() != Some(&peer) {
                    info!(upstream = %shared.name, %peer, "connected");
                }
                (known, told) = (Some(Arc::clone(&peer)), None);
                shared.link.send_replace(Link::Up { peer });
                let up_at = Instant::now();
                shared.distrust.notified().await;
                match backoff.lost(up_at.elapsed(), fastrand::f64()) {
                    Next::AtOnce => None,
                    Next::After(pause) => {
                        // It has just answered: what broke is looked at, but not in a tight loop, and not by those who ask.
                        sleep(pause).await;
                        None
                    }
                }
            }
            Err(error) => {
                let retry_after = backoff.failed(fastrand::f64());
                let text: Arc<str> = match &error {
                    Error::Down(text) | Error::Lost(text) => Arc::clone(text),
                    error => error.to_string().into(),
                };
                if told.as_ref() == Some(&text) {
                    debug!(upstream = %shared.name, error = %text, ?retry_after, "still down");
                } else {
                    warn!(upstream = %shared.name, error = %text, "down, trying again in the background");
                    told = Some(Arc::clone(&text));
                }
                known = None;
                *shared.cause() = match error {
                    // What must be changed by hand is told as it is.
                    Error::StoreDir(_) | Error::Protocol(_) => error,
                    _ => Error::Down(Arc::clone(&text)),
                };
                shared.link.send_replace(Link::Down {
                    error: text,
                    retry_after,
                });
                Some(retry_after)
            }
        };
        if let Some(pause) = pause {
            tokio::select! {
                () = sleep(pause) => {}
                () = shared.wake.notified() => {}
            }
        } else {
            let since = Instant::now().into_std();
            shared.link.send_replace(Link::Connecting { since });
        }
    }
}

impl Shared {
    async fn greet(&self) -> Result<Arc<str>, Error> {
        let greeting = self.files.greet().await?;
        let text = String::from_utf8_lossy(&greeting.info);
        let info = CacheInfo::parse(&text)
            .map_err(|e| Error::Protocol(format!("its nix-cache-info: {e}").into()))?;
        if info.store_dir != self.store_dir {
            let (theirs, ours) = (info.store_dir, &self.store_dir);
            let cause = format!("store directory is {theirs}, not {ours}");
            return Err(Error::StoreDir(cause.into()));
        }
        Ok(match greeting.peer.as_str() {
            "" => "binary cache".into(),
            peer => format!("binary cache, {peer}").into(),
        })
    }

    fn cause(&self) -> std::sync::MutexGuard<'_, Error> {
        self.cause.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
