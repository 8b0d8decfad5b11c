//! Signing many stores at once: each is prepared first, and only then is anything signed.
//!
//! ```text
//! prepare  all stores, `jobs` at a time: log in, list, may we?      what cannot be signed is known here
//! sign     those that can, `jobs` at a time, until done or told to stop
//! ```
//!
//! One store that fails leaves the others alone.

use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use super::upstreams::Starter;
use crate::config::{Config, Upstream};
use crate::nix::signer::Signer;
use crate::nix::store_uri::StoreKind;
use crate::upstream::signing::tally::Tally;
use crate::upstream::signing::{Mode, Signing, SigningError, SigningOptions};

/// A store to be signed, and how far that is; shared with whoever shows it.
#[derive(Debug)]
pub struct Store {
    /// Its name: the URI, without what only says how to reach it.
    pub name: String,
    /// What became of its paths.
    pub tally: Arc<Tally>,
    progress: Mutex<Progress>,
}

/// How far a store is.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// What happens.
    pub phase: Phase,
    /// What answers there: `Nix 2.34.8, protocol 1.38`; `None` before it did.
    pub peer: Option<String>,
    /// When signing began.
    pub began: Option<Instant>,
    /// How long signing took; `None` while it goes on.
    pub took: Option<Duration>,
}

/// What happens with a store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// Its turn has not come.
    #[default]
    Waiting,
    /// Logging in, listing, trying.
    Preparing,
    /// It may be signed, and waits for the others to be prepared.
    Ready,
    /// Under way.
    Signing,
    /// Every path is settled.
    Done,
    /// Told to stop before the end.
    Stopped,
    /// Why it cannot be signed, or not to its end, with the remedy.
    Failed(String),
}

/// What is to be done.
#[derive(Clone, Copy, Debug)]
pub struct Order {
    /// Stores at the same time.
    pub jobs: usize,
    /// Sign or count.
    pub mode: Mode,
}

/// Returns the stores of a configuration, one for each upstream, in its order.
pub fn stores(config: &Config) -> Vec<Arc<Store>> {
    let store = |upstream: &Upstream| Store {
        name: upstream.name.clone(),
        tally: Arc::default(),
        progress: Mutex::default(),
    };
    config.upstreams.iter().map(store).map(Arc::new).collect()
}

/// Signs the stores made by [`stores`] of the same configuration, while `show` shows them.
///
/// Returns when all are done, or soon after SIGINT or SIGTERM. `show` is dropped then; it must not be
/// needed for the work to go on.
pub fn run(
    config: &Config,
    stores: &[Arc<Store>],
    order: Order,
    show: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("muster")
        .build()
        .context("cannot start the threads")?;
    let done = runtime.block_on(async {
        let mut signals = Signals::listen()?;
        let (tell_stop, stop) = watch::channel(false);
        let work = work(config, stores, order, stop);
        let stopping = async {
            signals.next().await;
            tell_stop.send_replace(true);
            tokio::time::sleep(STOP_TIMEOUT).await;
        };
        tokio::select! {
            done = work => done,
            () = stopping => Ok(()),
            () = async { show.await; std::future::pending().await } => Ok(()),
        }
    });
    for store in stores {
        store.stopped();
    }
    runtime.shutdown_timeout(Duration::from_secs(1));
    done
}

impl Store {
    /// Returns how far it is.
    pub fn progress(&self) -> Progress {
        self.lock().clone()
    }

    fn enter(&self, phase: Phase) {
        let mut progress = self.lock();
        let now = Instant::now();
        match &phase {
            Phase::Signing => progress.began = Some(now),
            Phase::Done | Phase::Stopped | Phase::Failed(_) => {
                progress.took = progress.began.map(|began| now - began);
            }
            Phase::Waiting | Phase::Preparing | Phase::Ready => {}
        }
        progress.phase = phase;
    }

    /// Notes that what is not over by now will not be.
    fn stopped(&self) {
        let over = |phase: &Phase| matches!(phase, Phase::Done | Phase::Stopped | Phase::Failed(_));
        if !over(&self.lock().phase) {
            self.enter(Phase::Stopped);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn work(
    config: &Config,
    stores: &[Arc<Store>],
    order: Order,
    stop: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let starter = Starter::new()?;
    let signer = Signer::new(config.secret_keys.clone(), config.store_dir.clone());
    let signer = Arc::new(signer);
    let turns = Arc::new(Semaphore::new(order.jobs.max(1)));
    let mut preparing = JoinSet::new();
    for (upstream, store) in config.upstreams.iter().zip(stores) {
        let dial = match starter.dial(upstream, config) {
            Ok((dial, _)) => dial,
            Err(error) => {
                store.enter(Phase::Failed(format!("{error:#}")));
                continue;
            }
        };
        let mut options = SigningOptions::default();
        options.session.connect_timeout = upstream.connect_timeout.max(CONNECT_TIMEOUT);
        let (store, signer, turns) = (store.clone(), signer.clone(), turns.clone());
        let kind = upstream.uri.kind().clone();
        let mut stop = stop.clone();
        preparing.spawn(async move {
            let _turn = turns.acquire().await.ok()?;
            store.enter(Phase::Preparing);
            let tally = store.tally.clone();
            let opening = Signing::open(dial, signer, order.mode, options, tally);
            let opened = tokio::select! {
                opened = opening => opened,
                _ = stop.wait_for(|stop| *stop) => return None,
            };
            match opened {
                Ok(signing) => {
                    store.lock().peer = Some(signing.peer());
                    store.enter(Phase::Ready);
                    Some((store, signing, kind))
                }
                Err(error) => {
                    store.enter(Phase::Failed(explain(&error, &kind)));
                    None
                }
            }
        });
    }
    // Nothing is signed before it is known, and shown, what cannot be.
    let ready = preparing.join_all().await;
    let mut running = JoinSet::new();
    for (store, signing, kind) in ready.into_iter().flatten() {
        let (turns, stop) = (turns.clone(), stop.clone());
        running.spawn(async move {
            let Ok(_turn) = turns.acquire().await else {
                return;
            };
            if *stop.borrow() {
                return;
            }
            store.enter(Phase::Signing);
            let result = signing.run(stop).await;
            let counts = store.tally.counts();
            store.enter(match result {
                Err(error) => Phase::Failed(explain(&error, &kind)),
                Ok(()) if counts.settled() < counts.paths => Phase::Stopped,
                Ok(()) => Phase::Done,
            });
        });
    }
    while running.join_next().await.is_some() {}
    Ok(())
}

/// Says what is wrong and what to do about it.
fn explain(error: &SigningError, kind: &StoreKind) -> String {
    match error {
        SigningError::Refused(words) => {
            let remedy = match kind {
                StoreKind::Ssh(_) | StoreKind::SshNg(_) => {
                    "log in as root (ssh-ng://root@…), or add the account to trusted-users in that \
                     machine's nix.conf and restart its nix-daemon"
                }
                _ => {
                    "run this as root, or add the user to trusted-users in this machine's nix.conf \
                     and restart nix-daemon"
                }
            };
            format!(
                "not permitted there: Nix before 2.17 takes signatures from trusted users only, and \
                 its daemon says {words:?}; {remedy}"
            )
        }
        SigningError::Barren { error: cause, .. } => format!("{error}: {cause}"),
        SigningError::Upstream(error) => error.to_string(),
    }
}

/// What tells the process to stop.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn listen() -> anyhow::Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen for signals");
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// What is under way takes some milliseconds and a round trip; a store that is silent is not waited for.
const STOP_TIMEOUT: Duration = Duration::from_secs(3);

/// Signing is no look-up that somebody waits for.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
