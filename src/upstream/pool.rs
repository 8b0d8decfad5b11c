//! The sessions that carry NARs: a few that small NARs share, one of its own for each large NAR.
//!
//! A NAR never rides on the look-up connection: NarFromPath of a path that is gone breaks its
//! session. When a session breaks, the NARs that had given no byte yet are asked once more on
//! another. Tasks that open sessions are owned by the pool and end with it; a stream that is
//! being read keeps its session, but not the pool.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream;
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep, timeout};
use tracing::debug;

use super::leased::Leased;
use super::pool_choice::{self, Choice};
use super::session::{Session, SessionOptions};
use super::slots::{Lease, Slots, Table};
use super::wire::{Dial, Purpose};
use super::{Error, NarStream};
use crate::nix::store_path::StorePath;
use crate::nix::worker_protocol::reply::Reply;
use crate::nix::worker_protocol::request::Request;

/// Opens NARs over as few sessions as do.
pub struct Pool {
    shared: Arc<Shared>,
    keeper: JoinHandle<()>,
}

/// The bounds of a pool.
#[derive(Clone, Debug)]
pub struct PoolOptions {
    /// Of opening a session.
    pub session: SessionOptions,
    /// A NAR of more bytes is large: it is streamed with back-pressure on a session of its own.
    pub small_bytes_max: u64,
    /// Sessions that small NARs share.
    pub shared_max: usize,
    /// Large NARs under way; further ones wait.
    pub large_max: usize,
    /// Logins under way: sshd drops some beyond ten from everyone (`MaxStartups`).
    pub logins_max: usize,
    /// An idle session is closed after so long; one stays.
    pub idle_max: Duration,
    /// The longest silence before and within a NAR. A large one that waits for its turn does not
    /// count as silent.
    pub silence_max: Duration,
}

struct Shared {
    name: String,
    dial: Arc<dyn Dial>,
    options: PoolOptions,
    table: Arc<Table>,
    // Taken under the table's lock; never held over an await.
    openers: Mutex<JoinSet<()>>,
    large: Arc<Semaphore>,
    logins: Arc<Semaphore>,
    /// Tells those who wait for a session how the last opening went.
    opened: watch::Sender<Opened>,
}

/// The result of the last opening of a shared session.
#[derive(Clone, Default)]
struct Opened {
    error: Option<Error>,
}

impl Pool {
    /// Makes a pool without a session; must be called in a runtime.
    pub fn new(name: String, dial: Arc<dyn Dial>, options: PoolOptions) -> Self {
        let shared = Arc::new(Shared {
            name,
            dial,
            table: Arc::default(),
            openers: Mutex::default(),
            large: Arc::new(Semaphore::new(options.large_max.max(1))),
            logins: Arc::new(Semaphore::new(options.logins_max.max(1))),
            opened: watch::Sender::default(),
            options,
        });
        let keeper = tokio::spawn(tend(Arc::downgrade(&shared), shared.options.idle_max));
        Self { shared, keeper }
    }

    /// Says whether one session is to be kept open, and opens it if there is none.
    pub fn warm(&self, warm: bool) {
        let mut slots = self.shared.table.lock();
        slots.warm = warm;
        self.shared.keep_warm(&mut slots);
    }

    /// Has no further NAR come over the sessions that are there, as after a sleep, when they are dead.
    pub fn renew(&self) {
        let mut slots = self.shared.table.lock();
        slots.clear();
        self.shared.keep_warm(&mut slots);
    }

    /// Opens the NAR of a path and waits for its first bytes; `None`: the path is gone.
    ///
    /// Dropped, a small NAR still comes and is thrown away; the session of a large one closes.
    pub async fn nar(&self, path: &StorePath, nar_size: u64) -> Result<Option<NarStream>, Error> {
        let large = nar_size > self.shared.options.small_bytes_max;
        let mut attempt = 1;
        loop {
            let lease = if large {
                self.shared.lease_large(nar_size).await?
            } else {
                self.shared.lease_small(nar_size).await?
            };
            let session = lease.session().clone();
            // Among the NARs that a break left open there may be more that would break a session.
            let opened = match attempt {
                1 => self.shared.open_nar(lease, path, nar_size).await,
                _ => match self.shared.is_there(&session, path).await {
                    Ok(true) => self.shared.open_nar(lease, path, nar_size).await,
                    Ok(false) => return Ok(None),
                    Err(error) => Err(error),
                },
            };
            match opened {
                Err(error) if attempt < ATTEMPTS && session.broke(&error) => attempt += 1,
                // Each Nix has its own words for a path that is gone.
                Err(error @ Error::Remote(_)) if attempt == 1 => {
                    debug!(upstream = %self.shared.name, %path, %error, "NAR refused");
                    attempt += 1;
                }
                Err(error) => return Err(session.explain(error).await),
                opened => return opened,
            }
        }
    }

    /// Returns how many sessions are open, for people.
    pub fn sessions(&self) -> usize {
        self.shared.table.lock().len()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

impl Shared {
    /// Asks for the NAR and waits for its first bytes, so that a loss until then can be made good.
    async fn open_nar(
        &self,
        mut lease: Lease,
        path: &StorePath,
        nar_size: u64,
    ) -> Result<Option<NarStream>, Error> {
        let session = lease.session().clone();
        let silence_max = self.options.silence_max;
        let first = async {
            let Some(mut nar) = session.nar(path, nar_size).await? else {
                return Ok(None);
            };
            match nar.next().await {
                None => Ok(Some((None, nar))),
                Some(Ok(chunk)) => Ok(Some((Some(chunk), nar))),
                Some(Err(error)) => Err(error),
            }
        };
        let (first, rest) = match timeout(silence_max, first).await {
            Ok(Ok(Some(opened))) => opened,
            Ok(Ok(None)) => {
                lease.end();
                return Ok(None);
            }
            Ok(Err(error)) => {
                if session.broke(&error) {
                    lease.discard();
                }
                return Err(error);
            }
            Err(_) => {
                lease.discard();
                return Err(Error::TimedOut {
                    question: "NarFromPath",
                    after: silence_max,
                });
            }
        };
        let whole = stream::iter(first.map(Ok)).chain(rest);
        Ok(Some(Leased::new(whole.boxed(), lease, silence_max).boxed()))
    }

    /// Asks whether the path is there, before the NAR is asked for.
    async fn is_there(&self, session: &Session, path: &StorePath) -> Result<bool, Error> {
        let after = self.options.silence_max;
        let asked = timeout(after, session.ask(Request::IsValidPath(path.clone()))).await;
        match asked {
            Ok(Ok(Reply::Valid(valid))) => Ok(valid),
            Ok(Ok(_)) => Err(Error::Protocol("another answer than asked for".into())),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(Error::TimedOut {
                question: "IsValidPath",
                after,
            }),
        }
    }

    /// Takes a part in a shared session, opening one where there is none.
    async fn lease_small(self: &Arc<Self>, bytes: u64) -> Result<Lease, Error> {
        let mut opened = self.opened.subscribe();
        loop {
            {
                let mut slots = self.table.lock();
                let loads = slots.loads();
                let choice = pool_choice::for_small(&loads, slots.opening, self.options.shared_max);
                let place = match choice {
                    Choice::Use(place) => Some(place),
                    Choice::UseAndOpen(place) => {
                        self.begin_open(&mut slots);
                        Some(place)
                    }
                    Choice::Wait if slots.opening == 0 => {
                        self.begin_open(&mut slots);
                        None
                    }
                    Choice::Wait => None,
                };
                let lease = place.and_then(|p| slots.lease(&self.table, p, bytes, None));
                if let Some(lease) = lease {
                    return Ok(lease);
                }
            }
            if opened.changed().await.is_err() {
                return Err(closing());
            }
            if let Some(error) = opened.borrow_and_update().error.clone() {
                return Err(error);
            }
        }
    }

    /// Takes a session for a large NAR alone, waiting while there are too many.
    async fn lease_large(self: &Arc<Self>, bytes: u64) -> Result<Lease, Error> {
        let permit = self.large.clone().acquire_owned().await;
        let permit = Some(permit.map_err(|_| closing())?);
        {
            let mut slots = self.table.lock();
            if let Some(place) = pool_choice::for_large(&slots.loads()) {
                let lease = slots.lease(&self.table, place, bytes, permit);
                // Small NARs must not find the last shared session gone.
                if slots.lacks_shared() {
                    self.begin_open(&mut slots);
                }
                return lease.ok_or_else(closing);
            }
        }
        let session = self.open().await?;
        let mut slots = self.table.lock();
        let place = slots.add(session);
        let lease = slots.lease(&self.table, place, bytes, permit);
        lease.ok_or_else(closing)
    }

    async fn open(&self) -> Result<Arc<Session>, Error> {
        let _login = self.logins.acquire().await;
        let session = Session::open(&*self.dial, Purpose::Nar, &self.options.session).await;
        let session = session.map_err(refused)?;
        debug!(upstream = %self.name, "opened a session for NARs");
        Ok(Arc::new(session))
    }

    /// Opens a session when there is none and one is to be kept open.
    fn keep_warm(self: &Arc<Self>, slots: &mut Slots) {
        if slots.warm && slots.len() == 0 && slots.opening == 0 {
            self.begin_open(slots);
        }
    }

    /// Opens a shared session in the background and tells those who wait.
    fn begin_open(self: &Arc<Self>, slots: &mut Slots) {
        slots.opening += 1;
        // The task must not keep the pool that owns it.
        let pool = Arc::downgrade(self);
        let logins = self.logins.clone();
        let dial = self.dial.clone();
        let options = self.options.session.clone();
        let open = async move {
            let _login = logins.acquire().await;
            let result = Session::open(&*dial, Purpose::Nar, &options).await;
            let result = result.map_err(refused);
            if let Some(pool) = pool.upgrade() {
                pool.end_open(result);
            }
        };
        let mut openers = self.openers.lock().unwrap_or_else(PoisonError::into_inner);
        while openers.try_join_next().is_some() {}
        openers.spawn(open);
    }

    fn end_open(&self, result: Result<Session, Error>) {
        let error = {
            let mut slots = self.table.lock();
            slots.opening = slots.opening.saturating_sub(1);
            result.map(|session| slots.add(Arc::new(session))).err()
        };
        match &error {
            None => debug!(upstream = %self.name, "opened a session for NARs"),
            Some(error) => {
                debug!(upstream = %self.name, %error, "cannot open a session for NARs");
            }
        }
        self.opened.send_replace(Opened { error });
    }
}

/// Closes sessions that idle, and opens one anew that is to be kept warm.
async fn tend(pool: Weak<Shared>, idle_max: Duration) {
    let pause = (idle_max / 4).max(Duration::from_millis(10));
    loop {
        sleep(pause).await;
        let Some(shared) = pool.upgrade() else {
            return;
        };
        let mut slots = shared.table.lock();
        let now = Instant::now().into_std();
        let stale = pool_choice::stale(&slots.loads(), now, idle_max, WARM);
        slots.remove(stale);
        shared.keep_warm(&mut slots);
    }
}

/// Tells a session that cannot be had from a store that is down: whether that is so, its look-ups tell.
fn refused(error: Error) -> Error {
    match error {
        Error::Down(text) => Error::Refused(text),
        error => error,
    }
}

fn closing() -> Error {
    Error::Down("it is being closed".into())
}

impl Default for PoolOptions {
    fn default() -> Self {
        Self {
            session: SessionOptions::default(),
            small_bytes_max: 4 << 20,
            shared_max: 3,
            large_max: 8,
            logins_max: 3,
            idle_max: Duration::from_secs(60),
            silence_max: Duration::from_secs(30),
        }
    }
}

/// How often a NAR is asked for whose sessions break before its first byte.
const ATTEMPTS: usize = 3;

/// Idle sessions that stay.
const WARM: usize = 1;

#[cfg(test)]
mod tests;
