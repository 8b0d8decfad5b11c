//! The link to a binary cache: there is no standing connection, so it is a question that decides.
//!
//! ```text
//! Connecting ──nix-cache-info──▶ Up ──a question breaks──▶ Connecting …
//!            ──an error────────▶ Down ──a pause, or reconnect()──▶ Connecting …
//! Up ──its pulse is missed──▶ Down ──a byte of it──▶ Up      see `cache_pulse`
//! ```
//!
//! The first `nix-cache-info` also tells whether the cache is of our store directory. One warning for each
//! cause; the pauses are those of `backoff`.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};
use tracing::{debug, info, warn};

use super::backoff::{Backoff, Next};
use super::cache_files::CacheFiles;
use super::cache_pulse::{CachePulse, CachePulseOptions};
use super::{Error, Link};
use crate::nix::cache_info::CacheInfo;
use crate::nix::store_path::StoreDir;

/// The cause that the operator was last warned of, so that it is told once.
type Told = Option<Arc<str>>;

/// Why a link that was up is looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Over {
    /// A question broke, or the machine slept.
    Doubtful,
    /// It fell silent and stayed so: the link is down.
    Silent,
}

/// Keeps the link of one cache; dropped, it ends.
pub(super) struct CacheLink {
    shared: Arc<Shared>,
    keeper: JoinHandle<()>,
}

struct Shared {
    name: String,
    store_dir: StoreDir,
    files: Arc<dyn CacheFiles>,
    pulse: Arc<CachePulse>,
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
    pub(super) fn start(
        name: String,
        store_dir: StoreDir,
        files: Arc<dyn CacheFiles>,
        pulse: CachePulseOptions,
    ) -> Self {
        let since = Instant::now().into_std();
        let shared = Arc::new(Shared {
            name,
            store_dir,
            pulse: Arc::new(CachePulse::new(Arc::clone(&files), pulse)),
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

    /// Asks a small question, which is given up when the cache turns silent.
    ///
    /// Dropped, so is the question.
    pub(super) async fn ask<T>(
        &self,
        question: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        self.ready().await?;
        let asked = Instant::now();
        let answer = tokio::select! {
            biased;
            answer = question => answer,
            error = self.down() => return Err(error),
            never = self.shared.pulse.taken_while_quiet() => match never {},
        };
        if answer.is_ok() {
            self.shared.pulse.answered(asked.elapsed());
        }
        self.note(answer)
    }

    /// Takes the pulse of the cache.
    pub(super) fn pulse(&self) -> Arc<CachePulse> {
        Arc::clone(&self.shared.pulse)
    }

    /// Waits until it is down, and returns why.
    async fn down(&self) -> Error {
        let mut link = self.shared.link.subscribe();
        // Without a sender there is nobody left who would ask.
        let _ = link
            .wait_for(|link| matches!(link, Link::Down { .. }))
            .await;
        self.shared.cause().clone()
    }

    /// Hands an answer on, and has the link looked at when it speaks of a broken connection.
    pub(super) fn note<T>(&self, answer: Result<T, Error>) -> Result<T, Error> {
        if matches!(
            answer,
            Err(Error::Lost(_) | Error::TimedOut { .. } | Error::Slow(_))
        ) {
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
    let mut told = None;
    let mut known: Option<Arc<str>> = None;
    loop {
        let asked = Instant::now();
        let pause = match shared.greet().await {
            Ok(peer) => {
                shared.pulse.answered(asked.elapsed());
                if known.as_ref() != Some(&peer) {
                    info!(upstream = %shared.name, %peer, "connected");
                }
                (known, told) = (Some(Arc::clone(&peer)), None);
                let up_at = Instant::now();
                if shared.tend(&peer, &mut told).await == Over::Silent {
                    // It is asked again now, and nobody waits for it.
                    continue;
                }
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
                shared.failed(error, retry_after, &mut told);
                known = None;
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
        // The first time there is nothing to forget, and afterwards there is a reason each time.
        self.files.renew();
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

    /// Waits until the link is to be looked at. While the cache gives no sign of life it is down, so that nobody
    /// waits; a cache that was merely held up is up again with its first byte.
    async fn tend(&self, peer: &Arc<str>, told: &mut Told) -> Over {
        loop {
            let peer = Arc::clone(peer);
            self.link.send_replace(Link::Up { peer });
            let missed = tokio::select! {
                () = self.distrust.notified() => return Over::Doubtful,
                missed = self.pulse.missed() => missed,
            };
            let text = format!("no sign of life for {:?}", self.pulse.within());
            self.failed(Error::Down(text.into()), Duration::ZERO, told);
            tokio::select! {
                // Questions wait from now on.
                () = self.wake.notified() => return Over::Silent,
                heard = missed.comes() => if heard.is_err() {
                    return Over::Silent;
                },
                // It may be the connection alone.
                greeted = self.greet() => if greeted.is_err() {
                    return Over::Silent;
                },
            }
            debug!(upstream = %self.name, "heard again");
        }
    }

    fn failed(&self, error: Error, retry_after: Duration, told: &mut Told) {
        let text: Arc<str> = match &error {
            Error::Down(text) | Error::Lost(text) => Arc::clone(text),
            error => error.to_string().into(),
        };
        if told.as_ref() == Some(&text) {
            debug!(upstream = %self.name, error = %text, ?retry_after, "still down");
        } else {
            warn!(upstream = %self.name, error = %text, "down, trying again in the background");
            *told = Some(Arc::clone(&text));
        }
        *self.cause() = match error {
            // What must be changed by hand is told as it is.
            Error::StoreDir(_) | Error::Protocol(_) => error,
            _ => Error::Down(Arc::clone(&text)),
        };
        self.link.send_replace(Link::Down {
            error: text,
            retry_after,
        });
    }

    fn cause(&self) -> std::sync::MutexGuard<'_, Error> {
        self.cause.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
