//! Whole closures over ssh: a `nix-store --serve` beside the daemon, kept standing.
//!
//! ```text
//! look-up link up -> round trip measured -> not worth it: wait for the next link
//!                                        \-> login -> ready -> used: 30 s more, then anew
//!                                                 \-> refused: said once, wait for the next link
//! ```
//!
//! The protocol cannot look up by hash part, so this comes beside the look-up connection, never in
//! its place. `nix-store` remembers path infos for as long as it runs, gone ones too: so one that was
//! used does not stand for long. Source: `Store::queryPathInfo` in `store-api.cc`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{debug, info};

use super::backoff::{Backoff, Next};
use super::closures::Closures;
use super::serve_session::{Answer, ServeOptions, ServeSession};
use super::standing::Standing;
use super::wire::Dial;
use super::{Error, Link};
use crate::nix::path_info::PathInfo;
use crate::nix::serve_protocol::request::Request;
use crate::nix::store_path::{StorePath, StorePathHash};
use crate::nix::worker_protocol::request::Request as Lookup;

/// Asks for whole closures while a server stands ready.
pub struct Served {
    asks: mpsc::Sender<Ask>,
    ready: Arc<AtomicBool>,
    answer_timeout: Duration,
    // Logs in and asks; aborted when this is dropped, which ends its ssh.
    keeper: JoinHandle<()>,
}

/// The bounds of asking for closures.
#[derive(Clone, Debug)]
pub struct ServedOptions {
    /// Of each session.
    pub session: ServeOptions,
    /// Round trip from which it is worth a login and a process on the builder; below, a closure
    /// level by level is as quick.
    pub round_trip_min: Duration,
    /// How long a server stands after its first question.
    pub lifetime: Duration,
    /// From asking a question, turn included, to the end of its answer.
    pub answer_timeout: Duration,
}

struct Ask {
    request: Request,
    answer: oneshot::Sender<Result<Answer, Error>>,
}

impl Served {
    /// Begins to wait for the look-up link; must be called in a runtime.
    pub fn start(
        name: String,
        dial: Arc<dyn Dial>,
        lookups: Arc<Standing>,
        options: ServedOptions,
    ) -> Arc<Self> {
        let (asks, asked) = mpsc::channel(ASKS_MAX);
        let ready = Arc::new(AtomicBool::new(false));
        let answer_timeout = options.answer_timeout;
        let keeper = Keeper {
            name,
            dial,
            link: lookups.link(),
            lookups,
            asked,
            ready: ready.clone(),
            options,
            told: None,
        };
        Arc::new(Self {
            asks,
            ready,
            answer_timeout,
            keeper: tokio::spawn(keeper.run()),
        })
    }

    /// Tells whether a server stands ready, so that asking costs no login.
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }

    async fn ask(&self, request: Request) -> Result<Answer, Error> {
        let (answer, answered) = oneshot::channel();
        let ask = Ask { request, answer };
        let busy = |_| Error::Down("too many closures are asked for".into());
        self.asks.try_send(ask).map_err(busy)?;
        let after = self.answer_timeout;
        match timeout(after, answered).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(Error::Lost("the connection ended".into())),
            Err(_) => Err(Error::TimedOut {
                question: "a closure",
                after,
            }),
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

#[async_trait]
impl Closures for Served {
    async fn paths(&self, top: &StorePath) -> Result<Vec<StorePath>, Error> {
        match self.ask(Request::QueryClosure(vec![top.clone()])).await? {
            Answer::Paths(paths) => Ok(paths),
            Answer::Infos(_) => Err(unasked()),
        }
    }

    async fn infos(&self, paths: &[StorePath]) -> Result<Vec<PathInfo>, Error> {
        let question = Request::QueryPathInfos(paths.to_vec());
        match self.ask(question).await? {
            Answer::Infos(infos) => Ok(infos),
            Answer::Paths(_) => Err(unasked()),
        }
    }
}

/// The task that logs in and asks; one question at a time.
struct Keeper {
    name: String,
    dial: Arc<dyn Dial>,
    lookups: Arc<Standing>,
    link: watch::Receiver<Link>,
    asked: mpsc::Receiver<Ask>,
    ready: Arc<AtomicBool>,
    options: ServedOptions,
    /// The cause that the operator was last told, so that it is told once.
    told: Option<Arc<str>>,
}

/// Why a session was left.
enum End {
    /// It has stood for its time.
    Old,
    /// It broke.
    Lost(Error),
    /// Nobody can ask any more.
    Unwanted,
}

impl Keeper {
    async fn run(mut self) {
        let mut backoff = Backoff::default();
        let mut failures = 0;
        loop {
            match self.is_worth_it().await {
                None => return,
                Some(true) if failures < FAILURES_MAX => {}
                Some(_) => {
                    failures = 0;
                    if self.next_link().await.is_none() {
                        return;
                    }
                    continue;
                }
            }
            let opened = ServeSession::open(&*self.dial, self.options.session.clone()).await;
            let pause = match opened {
                Ok(session) => {
                    (failures, self.told) = (0, None);
                    let up_at = Instant::now();
                    match self.serve(session).await {
                        End::Unwanted => return,
                        End::Old => Duration::ZERO,
                        End::Lost(error) => {
                            debug!(upstream = %self.name, %error, "nix-store --serve is lost");
                            match backoff.lost(up_at.elapsed(), fastrand::f64()) {
                                Next::AtOnce => Duration::ZERO,
                                Next::After(pause) => pause,
                            }
                        }
                    }
                }
                Err(error) => {
                    failures = match error {
                        // What answers is something else, and will be the next time.
                        Error::Protocol(_) | Error::Unsupported(_) => FAILURES_MAX,
                        _ => failures + 1,
                    };
                    self.tell(&error);
                    backoff.failed(fastrand::f64())
                }
            };
            sleep(pause).await;
        }
    }

    /// Waits for the look-up link and measures its round trip; `None`: the upstream is dropped.
    async fn is_worth_it(&mut self) -> Option<bool> {
        let up = |link: &Link| matches!(link, Link::Up { .. });
        self.link.wait_for(up).await.ok()?;
        let mut least = Duration::MAX;
        for _ in 0..MEASUREMENTS {
            let asked = Instant::now();
            let question = Lookup::QueryPathFromHashPart(StorePathHash([0; 20]));
            if self.lookups.ask(question).await.is_err() {
                return Some(false);
            }
            least = least.min(asked.elapsed());
        }
        let worth_it = least >= self.options.round_trip_min;
        debug!(upstream = %self.name, round_trip = ?least, worth_it, "round trip measured");
        Some(worth_it)
    }

    /// Waits until the look-up link that is up, if one is, goes down.
    async fn next_link(&mut self) -> Option<()> {
        let gone = |link: &Link| !matches!(link, Link::Up { .. });
        self.link.wait_for(gone).await.ok().map(drop)
    }

    /// Asks what is to be asked until the session is over.
    async fn serve(&mut self, session: ServeSession) -> End {
        debug!(upstream = %self.name, protocol = %session.version(), "nix-store --serve stands ready");
        self.ready.store(true, Ordering::Relaxed);
        let end = self.ask_all(session).await;
        self.ready.store(false, Ordering::Relaxed);
        // Those that wait are better served level by level than by the next session.
        while let Ok(ask) = self.asked.try_recv() {
            drop(ask);
        }
        end
    }

    async fn ask_all(&mut self, mut session: ServeSession) -> End {
        let mut ends_at = None;
        loop {
            let old = async {
                match ends_at {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            let ask = tokio::select! {
                biased;
                () = old => return End::Old,
                error = session.ended() => return End::Lost(error),
                ask = self.asked.recv() => ask,
            };
            let Some(Ask { request, answer }) = ask else {
                return End::Unwanted;
            };
            if answer.is_closed() {
                continue;
            }
            ends_at.get_or_insert_with(|| Instant::now() + self.options.lifetime);
            let after = self.options.answer_timeout;
            let answered = timeout(after, session.ask(&request)).await;
            let answered = answered.unwrap_or(Err(Error::TimedOut {
                question: request.name(),
                after,
            }));
            let error = answered.as_ref().err().cloned();
            // One who left does not mind.
            let _ = answer.send(answered);
            if let Some(error) = error {
                return End::Lost(error);
            }
        }
    }

    fn tell(&mut self, error: &Error) {
        let text: Arc<str> = error.to_string().into();
        if self.told.as_ref() != Some(&text) {
            info!(
                upstream = %self.name,
                error = %text,
                "nix-store --serve cannot be had, closures are fetched level by level"
            );
            self.told = Some(text);
        }
    }
}

fn unasked() -> Error {
    Error::Protocol("another answer than asked for".into())
}

impl Default for ServedOptions {
    fn default() -> Self {
        Self {
            session: ServeOptions::default(),
            round_trip_min: Duration::from_millis(3),
            lifetime: Duration::from_secs(30),
            answer_timeout: Duration::from_secs(20),
        }
    }
}

/// Closures that wait for their turn; further ones are fetched level by level.
const ASKS_MAX: usize = 16;

/// Round trips measured; the least counts, as other load makes them longer.
const MEASUREMENTS: usize = 3;

/// Failed logins in a row after which the account counts as one that refuses.
const FAILURES_MAX: usize = 3;
