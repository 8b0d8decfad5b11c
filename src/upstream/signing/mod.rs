//! Signing every path of one store, through its daemon.
//!
//! ```text
//! open   log in -> QueryAllValidPaths -> may we? (AddSignatures of none)
//! run    for some hundred paths at a time: QueryPathInfo -> sign -> AddSignatures     many such at once
//! ```
//!
//! All of it is on one connection, questions back to back, so a long line costs a few round trips and
//! not two for each path. What a store signed is known to it alone: a run that was interrupted is
//! simply begun again. Nix's daemon crashes on AddSignatures for a path that is not there (all versions
//! up to 2.35), so a path is asked for just before; when one is collected in between, the session is
//! lost, another one is opened, and what had no answer is asked for again. Source: `addSignatures` in
//! `local-store.cc`, `AddSignatures` in `daemon.cc`, where untrusted users are refused up to Nix 2.16.

pub mod tally;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::Error;
use super::session::{Session, SessionOptions};
use super::wire::{Dial, Purpose};
use crate::nix::path_info::PathInfo;
use crate::nix::signer::{Need, Signer};
use crate::nix::store_path::StorePath;
use crate::nix::worker_protocol::reply::Reply;
use crate::nix::worker_protocol::request::Request;
use tally::{Fate, Tally};

/// The bounds of signing one store.
#[derive(Clone, Debug)]
pub struct SigningOptions {
    /// Of each session.
    pub session: SessionOptions,
    /// Paths that are asked for, signed and written together.
    pub chunk_paths: usize,
    /// Chunks under way: with the above 2,048 paths, which keep a daemon that needs 100 µs for each
    /// busy over a round trip of 200 ms; some 4 MiB of path infos.
    pub chunks_max: usize,
    /// Sessions lost in a row without a path being settled before the store is given up. Finding the
    /// one path that a daemon crashes on takes [`TRIES_MAX`].
    pub barren_sessions_max: u32,
    /// Pauses before each further attempt to log in, after which the store is given up.
    pub retry_after: Vec<Duration>,
    /// How long listing all paths may take.
    pub list_timeout: Duration,
}

/// Whether anything is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Signatures are added.
    Sign,
    /// Only counted.
    Count,
}

/// Why a store cannot be signed, or not to its end.
#[derive(Clone, Debug, thiserror::Error)]
pub enum SigningError {
    /// The daemon does not let us add signatures; its own words.
    #[error("the daemon refuses signatures: {0}")]
    Refused(Arc<str>),
    /// It cannot be asked, or not any more.
    #[error(transparent)]
    Upstream(Error),
    /// Sessions break over and over.
    #[error("{sessions} sessions in a row ended without signing anything: {error}")]
    Barren {
        /// How many.
        sessions: u32,
        /// How the last one ended.
        #[source]
        error: Error,
    },
}

/// A store that was logged in to, listed, and found to permit signing.
pub struct Signing {
    way: Way,
    session: Session,
    tasks: VecDeque<Task>,
    tally: Arc<Tally>,
}

/// How to get there and what to do.
struct Way {
    dial: Arc<dyn Dial>,
    signer: Arc<Signer>,
    mode: Mode,
    options: SigningOptions,
}

/// A path that is not settled.
#[derive(Debug)]
struct Task {
    path: StorePath,
    /// Sessions that were lost while its signature was under way.
    tries: u8,
}

/// What is left of a chunk.
#[derive(Default)]
struct Chunk {
    left: Vec<Task>,
    lost: Option<Error>,
    settled: usize,
}

impl Signing {
    /// Logs in, lists the paths, and tries whether signatures may be added; nothing is changed.
    ///
    /// Only the attempt tells: up to Nix 2.16 the daemon refuses users whom it does not trust, later
    /// ones take signatures from everybody. Dropped, it closes the connection.
    pub async fn open(
        dial: Arc<dyn Dial>,
        signer: Arc<Signer>,
        mode: Mode,
        options: SigningOptions,
        tally: Arc<Tally>,
    ) -> Result<Self, SigningError> {
        let way = Way {
            dial,
            signer,
            mode,
            options,
        };
        let mut session = way.log_in().await.map_err(SigningError::Upstream)?;
        let listing = timeout(way.options.list_timeout, list(&session));
        let listed = listing.await.unwrap_or_else(|_| {
            Err(Error::TimedOut {
                question: "QueryAllValidPaths",
                after: way.options.list_timeout,
            })
        });
        let tasks = match listed {
            Ok(tasks) => tasks,
            Err(error) => return Err(SigningError::Upstream(session.explain(error).await)),
        };
        tally.list(tasks.len() as u64);
        if mode == Mode::Sign {
            session = way.try_out(session, &tasks).await?;
        }
        Ok(Self {
            way,
            session,
            tasks,
            tally,
        })
    }

    /// Names the daemon for people: `Nix 2.34.8, protocol 1.38`.
    pub fn peer(&self) -> String {
        self.session.peer()
    }

    /// Signs until every path is settled, or `stop` turns true: then what is under way is finished.
    ///
    /// What became of each path is in the tally. Dropped, signatures that were sent are added all the
    /// same, without being counted.
    pub async fn run(mut self, stop: watch::Receiver<bool>) -> Result<(), SigningError> {
        let mut barren = 0;
        loop {
            let pass = self.pass(&stop).await;
            let Some(error) = pass.lost else {
                return Ok(());
            };
            let error = self.session.explain(error).await;
            barren = if pass.settled > 0 { 0 } else { barren + 1 };
            if barren >= self.way.options.barren_sessions_max {
                let sessions = barren;
                return Err(SigningError::Barren { sessions, error });
            }
            if *stop.borrow() {
                return Ok(());
            }
            self.session = self.way.log_in_again().await?;
        }
    }

    /// Goes on until all is settled or the session is lost.
    async fn pass(&mut self, stop: &watch::Receiver<bool>) -> Chunk {
        let mut running = FuturesUnordered::new();
        let mut pass = Chunk::default();
        loop {
            while pass.lost.is_none() && !*stop.borrow() {
                let alone = self.tasks.front().is_some_and(|task| task.tries > 0);
                if running.len() >= self.way.options.chunks_max || alone && !running.is_empty() {
                    break;
                }
                let tasks = self.way.take(&mut self.tasks);
                if tasks.is_empty() {
                    break;
                }
                running.push(self.way.chunk(&self.session, tasks, &self.tally));
                if alone {
                    break;
                }
            }
            let Some(chunk) = running.next().await else {
                return pass;
            };
            pass.settled += chunk.settled;
            pass.lost = pass.lost.or(chunk.lost);
            // At the front: those that may have broken the session are found before the rest goes on.
            for task in chunk.left.into_iter().rev() {
                self.tasks.push_front(task);
            }
        }
    }
}

impl Way {
    async fn log_in(&self) -> Result<Session, Error> {
        let mut options = self.options.session.clone();
        let connection = &mut options.connection;
        connection.store_dir = self.signer.store_dir().clone();
        connection.questions_max = self.options.chunk_paths * self.options.chunks_max;
        connection.question_bytes_max = connection.questions_max * QUESTION_BYTES;
        Session::open(&*self.dial, Purpose::Nar, &options).await
    }

    async fn log_in_again(&self) -> Result<Session, SigningError> {
        let mut pauses = self.options.retry_after.iter();
        loop {
            match self.log_in().await {
                Ok(session) => return Ok(session),
                Err(error) => match pauses.next() {
                    Some(pause) => sleep(*pause).await,
                    None => return Err(SigningError::Upstream(error)),
                },
            }
        }
    }

    /// Adds no signature to a path, which needs the same permission as adding one.
    async fn try_out(
        &self,
        mut session: Session,
        tasks: &VecDeque<Task>,
    ) -> Result<Session, SigningError> {
        for task in tasks.iter().take(PROBES_MAX) {
            match session.ask(Request::QueryPathInfo(task.path.clone())).await {
                Ok(Reply::PathInfo(Some(_))) => {}
                // Gone, or strange; the next one may do.
                Ok(_) => continue,
                Err(error) if session.broke(&error) => {
                    session = self.log_in_again().await?;
                    continue;
                }
                Err(_) => continue,
            }
            let nothing = Request::AddSignatures(task.path.clone(), Vec::new());
            match session.ask(nothing).await {
                Err(Error::Remote(words)) => return Err(SigningError::Refused(words)),
                Err(_) => session = self.log_in_again().await?,
                Ok(_) => break,
            }
        }
        Ok(session)
    }

    /// Takes the next paths off the front: fewer of those that lost sessions, the more often they did.
    fn take(&self, tasks: &mut VecDeque<Task>) -> Vec<Task> {
        let tries = tasks.front().map_or(0, |task| task.tries);
        let most = (self.options.chunk_paths >> (SHRINK_BITS * u32::from(tries))).max(1);
        let alike = tasks.iter().take(most).take_while(|t| t.tries == tries);
        let count = alike.count();
        tasks.drain(..count).collect()
    }

    async fn chunk(&self, session: &Session, tasks: Vec<Task>, tally: &Tally) -> Chunk {
        let mut chunk = Chunk::default();
        let questions = tasks.iter().map(|task| task.path.clone());
        let questions = questions.map(Request::QueryPathInfo).collect();
        let answers = session.ask_many(questions).await;
        let mut found = Vec::with_capacity(tasks.len());
        for (task, answer) in tasks.into_iter().zip(answers) {
            match answer {
                Ok(Reply::PathInfo(Some(info))) => found.push((task, info)),
                Ok(Reply::PathInfo(None)) => chunk.settle(Fate::Gone, tally),
                Ok(_) => self.fail(task, &unasked(), tally, &mut chunk),
                Err(error) => self.err(session, task, error, tally, &mut chunk),
            }
        }
        let mut writing = Vec::with_capacity(found.len());
        let mut requests = Vec::with_capacity(found.len());
        for (task, need) in self.judge(found).await {
            match need {
                Need::ContentAddressed => chunk.settle(Fate::ContentAddressed, tally),
                // By us, in the session that was lost.
                Need::Signed if task.tries > 0 => chunk.settle(Fate::Signed, tally),
                Need::Signed => chunk.settle(Fate::SignedAlready, tally),
                Need::Signatures(_) if self.mode == Mode::Count => {
                    chunk.settle(Fate::Signed, tally);
                }
                Need::Signatures(signatures) => {
                    requests.push(Request::AddSignatures(task.path.clone(), signatures));
                    writing.push(task);
                }
            }
        }
        let alone = writing.len() == 1;
        let answers = session.ask_many(requests).await;
        for (mut task, answer) in writing.into_iter().zip(answers) {
            match answer {
                Ok(_) => chunk.settle(Fate::Signed, tally),
                Err(error) => {
                    task.tries = task.tries.saturating_add(u8::from(ended(session, &error)));
                    if task.tries >= TRIES_MAX && alone {
                        chunk.lost = Some(error);
                        let words = "the daemon ends the session instead of adding its signature";
                        self.fail_with(task, words, tally, &mut chunk);
                    } else {
                        self.err(session, task, error, tally, &mut chunk);
                    }
                }
            }
        }
        chunk
    }

    /// Judges on a thread of its own: a chunk takes some milliseconds.
    async fn judge(&self, found: Vec<(Task, PathInfo)>) -> Vec<(Task, Need)> {
        let signer = Arc::clone(&self.signer);
        let judge = move || {
            let judged = found.into_iter();
            let judged = judged.map(|(task, info)| (task, signer.need(&info)));
            judged.collect()
        };
        match tokio::task::spawn_blocking(judge).await {
            Ok(judged) => judged,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The runtime is shutting down, and we with it.
                Err(_) => std::future::pending().await,
            },
        }
    }

    /// Keeps a path for the next session if this one ended, and fails it otherwise.
    fn err(&self, session: &Session, task: Task, error: Error, tally: &Tally, chunk: &mut Chunk) {
        if ended(session, &error) {
            chunk.left.push(task);
            chunk.lost.get_or_insert(error);
        } else {
            self.fail(task, &error, tally, chunk);
        }
    }

    fn fail(&self, task: Task, error: &Error, tally: &Tally, chunk: &mut Chunk) {
        self.fail_with(task, &error.to_string(), tally, chunk);
    }

    fn fail_with(&self, task: Task, words: &str, tally: &Tally, chunk: &mut Chunk) {
        tally.fail(task.path, words, self.signer.store_dir());
        chunk.settled += 1;
    }
}

impl Chunk {
    fn settle(&mut self, fate: Fate, tally: &Tally) {
        tally.settle(fate);
        self.settled += 1;
    }
}

impl Default for SigningOptions {
    fn default() -> Self {
        let second = Duration::from_secs(1);
        Self {
            session: SessionOptions::default(),
            chunk_paths: 128,
            chunks_max: 16,
            barren_sessions_max: 8,
            retry_after: vec![second / 4, second, second * 3, second * 10],
            list_timeout: second * 120,
        }
    }
}

async fn list(session: &Session) -> Result<VecDeque<Task>, Error> {
    let mut tasks = VecDeque::new();
    let mut parts = session.all_paths()?;
    while let Some(part) = parts.next().await {
        tasks.extend(part?.into_iter().map(|path| Task { path, tries: 0 }));
    }
    Ok(tasks)
}

/// Tells whether a question failed only because the session ended under it.
fn ended(session: &Session, error: &Error) -> bool {
    let words_of_its_own = matches!(error, Error::Remote(_) | Error::StoreDir(_));
    session.broke(error) || !words_of_its_own && session.is_closed()
}

fn unasked() -> Error {
    Error::Protocol("another answer than asked for".into())
}

/// Sessions that a path may end before it is left out, by when it was alone in the last.
pub const TRIES_MAX: u8 = 5;

/// After each loss the chunks of those that may be its cause are a quarter as large.
const SHRINK_BITS: u32 = 2;

/// Room for a request with two signatures.
const QUESTION_BYTES: usize = 384;

/// Paths that the permission is tried on, as the first may have been collected.
const PROBES_MAX: usize = 16;
