//! Keeps paths from a builder's garbage collection for a while.
//!
//! Temporary roots live as long as their connection, so they have connections of their own, opened
//! at the first path and closed when nothing is held any more. See `generations`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};
use tracing::debug;

use super::Error;
use super::generations::Generations;
use super::session::{Session, SessionOptions};
use super::wire::{Dial, Purpose};
use crate::nix::store_path::StorePath;
use crate::nix::worker_protocol::reply::Reply;
use crate::nix::worker_protocol::request::Request;

/// Roots paths in two generations.
pub struct Roots {
    shared: Arc<Shared>,
    keeper: JoinHandle<()>,
}

/// The bounds of temporary roots.
#[derive(Clone, Debug)]
pub struct RootsOptions {
    /// Of opening a session.
    pub session: SessionOptions,
    /// How long a generation takes roots, and then holds them.
    pub lifetime: Duration,
    /// From asking to the answer.
    pub query_timeout: Duration,
    /// Paths in one generation; some 100 bytes each.
    pub roots_max: usize,
}

struct Shared {
    name: String,
    dial: Arc<dyn Dial>,
    options: RootsOptions,
    // Never held over an await; no other lock is taken under it.
    generations: Mutex<Generations<Arc<Session>>>,
    /// A session for the next generation, so that nobody waits for its login.
    // Never held over an await; no other lock is taken under it.
    spare: Mutex<Option<Arc<Session>>>,
    /// Whether a spare session is wanted.
    warm: AtomicBool,
    /// Held while a session opens, so that one does for all who wait.
    opening: tokio::sync::Mutex<()>,
    /// Tells the keeper that a generation began, or whether a spare is wanted.
    changed: Notify,
}

impl Roots {
    /// Makes none yet; must be called in a runtime.
    pub fn new(name: String, dial: Arc<dyn Dial>, options: RootsOptions) -> Self {
        let shared = Arc::new(Shared {
            name,
            dial,
            generations: Mutex::new(Generations::new(options.lifetime, options.roots_max)),
            spare: Mutex::default(),
            warm: AtomicBool::new(false),
            opening: tokio::sync::Mutex::default(),
            changed: Notify::new(),
            options,
        });
        let keeper = tokio::spawn(keep(shared.clone()));
        Self { shared, keeper }
    }

    /// Keeps a session ready for the next generation, or does not any more.
    pub fn warm(&self, warm: bool) {
        self.shared.warm.store(warm, Ordering::Relaxed);
        if !warm {
            self.shared.spare().take();
        }
        self.shared.changed.notify_one();
    }

    /// Roots a path and asks then whether it is there; `false`: it is gone.
    ///
    /// Dropped, the path may be rooted or not.
    pub async fn keep(&self, path: &StorePath) -> Result<bool, Error> {
        let mut kept = self.keep_many(std::slice::from_ref(path)).await;
        let ended = || Error::Lost("the connection ended".into());
        kept.pop().unwrap_or_else(|| Err(ended()))
    }

    /// Does the same with many, asked back to back; the answers have their order.
    pub async fn keep_many(&self, paths: &[StorePath]) -> Vec<Result<bool, Error>> {
        let mut kept = self.shared.root(paths).await;
        let lost: Vec<_> = (0..)
            .zip(&kept)
            .filter(|(_, answer)| matches!(answer, Err(Error::Lost(_))))
            .map(|(place, _): (usize, _)| place)
            .collect();
        if !lost.is_empty() {
            let again: Vec<_> = lost
                .iter()
                .filter_map(|place| paths.get(*place).cloned())
                .collect();
            let answers = self.shared.root(&again).await;
            for (place, answer) in lost.into_iter().zip(answers) {
                if let Some(kept) = kept.get_mut(place) {
                    *kept = answer;
                }
            }
        }
        kept
    }
}

impl Drop for Roots {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

impl Shared {
    fn generations(&self) -> MutexGuard<'_, Generations<Arc<Session>>> {
        let generations = self.generations.lock();
        generations.unwrap_or_else(PoisonError::into_inner)
    }

    async fn root(&self, paths: &[StorePath]) -> Vec<Result<bool, Error>> {
        let held: Vec<_> = {
            let generations = self.generations();
            paths.iter().map(|path| generations.holds(path)).collect()
        };
        let missing = paths.iter().zip(&held).filter(|(_, held)| !**held);
        let requests: Vec<_> = missing.flat_map(|(path, _)| requests_for(path)).collect();
        if requests.is_empty() {
            return held.into_iter().map(Ok).collect();
        }
        let session = match self.session().await {
            Ok(session) => session,
            Err(error) => {
                let answer = |held| if held { Ok(true) } else { Err(error.clone()) };
                return held.into_iter().map(answer).collect();
            }
        };
        let mut answers = self.ask_many(&session, requests).await.into_iter();
        let mut kept = Vec::with_capacity(paths.len());
        for (path, held) in paths.iter().zip(&held) {
            kept.push(match held {
                true => Ok(true),
                false => self.rooted(&session, path, answers.next(), answers.next()),
            });
        }
        // One loss is that of all, and to find out why takes its time.
        let lost = kept
            .iter_mut()
            .filter(|answer| matches!(answer, Err(Error::Lost(_))));
        let mut explained: Option<Error> = None;
        for answer in lost {
            if let (None, Err(error)) = (&explained, &answer) {
                explained = Some(session.explain(error.clone()).await);
            }
            if let Some(error) = &explained {
                *answer = Err(error.clone());
            }
        }
        kept
    }

    /// Asks until no answer comes any more; those that came before count.
    async fn ask_many(
        &self,
        session: &Session,
        requests: Vec<Request>,
    ) -> Vec<Result<Reply, Error>> {
        let after = self.options.query_timeout;
        let question = "AddTempRoot";
        let silent = || Error::TimedOut { question, after };
        let asked = session.ask_many_while_heard(requests, after, || None, silent);
        asked.await
    }

    /// Reads the two answers for a path, and notes that it is rooted.
    fn rooted(
        &self,
        session: &Arc<Session>,
        path: &StorePath,
        rooted: Option<Result<Reply, Error>>,
        valid: Option<Result<Reply, Error>>,
    ) -> Result<bool, Error> {
        let ours = |other: &Arc<Session>| Arc::ptr_eq(other, session);
        match (rooted, valid) {
            (Some(Ok(_)), Some(Ok(Reply::Valid(valid)))) => {
                if valid {
                    self.generations().note(ours, path.clone());
                }
                Ok(valid)
            }
            (Some(Err(error)), _) | (_, Some(Err(error))) => Err(error),
            _ => Err(Error::Protocol("another answer than asked for".into())),
        }
    }

    /// Returns the current generation's session, beginning a generation where there is none.
    async fn session(&self) -> Result<Arc<Session>, Error> {
        if let Some(session) = self.current() {
            return Ok(session);
        }
        let _opening = self.opening.lock().await;
        if let Some(session) = self.current() {
            return Ok(session);
        }
        let ready = self.spare().take().filter(|spare| !spare.is_closed());
        let session = match ready {
            Some(spare) => spare,
            None => self.open().await?,
        };
        let now = Instant::now().into_std();
        self.generations().begin(session.clone(), now);
        self.changed.notify_one();
        Ok(session)
    }

    async fn open(&self) -> Result<Arc<Session>, Error> {
        let session = Session::open(&*self.dial, Purpose::Roots, &self.options.session).await?;
        debug!(upstream = %self.name, "opened a session for roots");
        Ok(Arc::new(session))
    }

    /// Roots anew what a lost connection held; `false` when that failed.
    async fn adopt(&self) -> bool {
        if !self.generations().has_orphans() {
            return true;
        }
        let session = match self.session().await {
            Ok(session) => session,
            Err(error) => {
                debug!(upstream = %self.name, %error, "cannot root anew what was lost");
                return false;
            }
        };
        let Some((orphans, until)) = self.generations().take_orphans() else {
            return true;
        };
        let requests = orphans.iter().flat_map(requests_for).collect();
        let mut answers = self.ask_many(&session, requests).await.into_iter();
        let mut lost = Vec::new();
        let (paths, mut gone) = (orphans.len(), 0);
        for path in orphans {
            match self.rooted(&session, &path, answers.next(), answers.next()) {
                Ok(true) => {}
                // Whoever asks for it next hears of it.
                Ok(false) => gone += 1,
                Err(_) => lost.push(path),
            }
        }
        debug!(upstream = %self.name, paths, gone, lost = lost.len(), "rooted anew");
        let all = lost.is_empty();
        if !all {
            self.generations().orphan(lost, until);
        }
        all
    }

    /// Opens a spare session where one will soon be of use; `false` when that failed.
    async fn prepare(&self) -> bool {
        let ready = self
            .spare()
            .as_ref()
            .is_some_and(|spare| !spare.is_closed());
        let soon = self
            .spare_at()
            .is_none_or(|at| at <= Instant::now().into_std());
        if ready || !soon || !self.warm.load(Ordering::Relaxed) {
            return true;
        }
        match self.open().await {
            Ok(session) => {
                *self.spare() = Some(session);
                true
            }
            Err(error) => {
                debug!(upstream = %self.name, %error, "no session for roots yet");
                false
            }
        }
    }

    /// Returns from when on a spare session is of use: shortly before the current generation ends;
    /// `None`: now.
    fn spare_at(&self) -> Option<std::time::Instant> {
        let until = self.generations().current_until()?;
        until.checked_sub(SPARE_BEFORE)
    }

    fn spare(&self) -> MutexGuard<'_, Option<Arc<Session>>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn current(&self) -> Option<Arc<Session>> {
        let mut generations = self.generations();
        generations.lose(|session| session.is_closed());
        generations.advance(Instant::now().into_std());
        generations.current()
    }
}

/// A path is asked for after it was rooted, so that it cannot go in between.
fn requests_for(path: &StorePath) -> [Request; 2] {
    let rooted = Request::AddTempRoot(path.clone());
    [rooted, Request::IsValidPath(path.clone())]
}

/// Lets generations end in time, also when nothing is asked, makes good the loss of one, and keeps
/// a session ready for the next.
async fn keep(shared: Arc<Shared>) {
    loop {
        let current = shared.current();
        let well = shared.adopt().await && shared.prepare().await;
        let now = Instant::now().into_std();
        // One after the other: each takes the lock.
        let change = shared.generations().next_change();
        let spare = shared.spare_at().filter(|at| *at > now);
        let retry = (!well).then(|| now + RETRY);
        let ended = async {
            match change.into_iter().chain(spare).chain(retry).min() {
                Some(at) => sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        let lost = async {
            match &current {
                Some(session) => session.closed().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = lost => {}
            () = ended => {}
            () = shared.changed.notified() => {}
        }
    }
}

impl Default for RootsOptions {
    fn default() -> Self {
        Self {
            session: SessionOptions::default(),
            lifetime: Duration::from_secs(900),
            query_timeout: Duration::from_secs(10),
            roots_max: 100_000,
        }
    }
}

/// How long before the end of a generation the session for the next is opened.
const SPARE_BEFORE: Duration = Duration::from_secs(30);

/// Pause before a spare session, or rooting anew, is tried again.
const RETRY: Duration = Duration::from_secs(10);
