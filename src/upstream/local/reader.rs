//! The thread that reads the database, and the way to ask it.
//!
//! A look-up takes some 10 µs where the pages are in memory, and a disk's time where they are not; so
//! it is done on a thread of its own. Questions that wait together are answered in one read
//! transaction. A database that cannot be read is left alone until [`Reader::reopen`].

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;
use tracing::debug;

use super::database::{self, Database, DatabaseError, Place, Registered};
use crate::nix::store_path::{StorePath, StorePathHash};
use crate::upstream::Error;

/// Asks the thread. It ends when the last clone is dropped, after what it is at.
#[derive(Clone)]
pub(super) struct Reader {
    jobs: mpsc::Sender<Job>,
    state: watch::Receiver<State>,
    query_timeout: Duration,
}

/// The bounds of a reader.
#[derive(Clone, Copy, Debug)]
pub struct ReaderOptions {
    /// Questions that wait at the same time; further ones wait for room. Some 200 bytes each.
    pub questions_max: usize,
    /// From asking to the answer; a disk that is busy may take a while.
    pub query_timeout: Duration,
}

/// Whether the database can be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// It was not tried yet.
    Unknown,
    /// It is open.
    Open,
    /// It cannot be, and why.
    Closed(Arc<str>),
}

type Answer = Result<Option<Registered>, Error>;

enum Job {
    ByHash(StorePathHash, oneshot::Sender<Answer>),
    ByPath(StorePath, oneshot::Sender<Answer>),
    ByPaths(Vec<StorePath>, oneshot::Sender<Vec<Answer>>),
    Reopen,
}

impl Reader {
    /// Starts the thread, which opens the database at once.
    ///
    /// `Err` when the system gives no thread.
    pub(super) fn start(place: Place, options: ReaderOptions) -> std::io::Result<Self> {
        let (jobs, waiting) = mpsc::channel(options.questions_max.max(1));
        let (told, state) = watch::channel(State::Unknown);
        std::thread::Builder::new()
            .name("nix-database".into())
            .spawn(move || run(&place, waiting, &told))?;
        Ok(Self {
            jobs,
            state,
            query_timeout: options.query_timeout,
        })
    }

    /// Follows whether the database can be read.
    pub(super) fn state(&self) -> watch::Receiver<State> {
        self.state.clone()
    }

    /// Tries a closed database once more; an open one stays.
    pub(super) fn reopen(&self) {
        // When there is no room, questions wait, and it is open.
        let _ = self.jobs.try_send(Job::Reopen);
    }

    /// Looks a path up by its hash part; `Err` when the daemon is to be asked instead.
    ///
    /// Dropped, the answer is thrown away.
    pub(super) async fn by_hash(&self, hash: StorePathHash) -> Answer {
        self.ask(|answer| Job::ByHash(hash, answer)).await?
    }

    /// Looks up exactly this path.
    pub(super) async fn by_path(&self, path: &StorePath) -> Answer {
        self.ask(|answer| Job::ByPath(path.clone(), answer)).await?
    }

    /// Looks up many paths; the answers have their order.
    pub(super) async fn by_paths(&self, paths: &[StorePath]) -> Result<Vec<Answer>, Error> {
        self.ask(|answer| Job::ByPaths(paths.to_vec(), answer))
            .await
    }

    async fn ask<T>(&self, job: impl FnOnce(oneshot::Sender<T>) -> Job) -> Result<T, Error> {
        if let State::Closed(why) = &*self.state.borrow() {
            return Err(Error::Down(why.clone()));
        }
        let (answer, answered) = oneshot::channel();
        let asked = async {
            self.jobs.send(job(answer)).await.map_err(|_| gone())?;
            answered.await.map_err(|_| gone())
        };
        let after = self.query_timeout;
        let question = "the Nix database";
        let answer = timeout(after, asked).await;
        answer.unwrap_or(Err(Error::TimedOut { question, after }))
    }
}

/// Why the thread stops reading.
enum End {
    /// Nobody asks any more.
    Unused,
    /// The file was replaced.
    Replaced,
    /// It does not answer.
    Broken(DatabaseError),
}

/// Opens the database and answers, for as long as there is somebody who asks.
fn run(place: &Place, mut jobs: mpsc::Receiver<Job>, state: &watch::Sender<State>) {
    loop {
        let why: Arc<str> = match read(place, &mut jobs, state) {
            End::Unused => return,
            End::Replaced => continue,
            End::Broken(error) => error.to_string().into(),
        };
        state.send_if_modified(|state| {
            let new = State::Closed(why.clone());
            let changed = *state != new;
            *state = new;
            changed
        });
        loop {
            match jobs.blocking_recv() {
                None => return,
                Some(Job::Reopen) => break,
                Some(job) => job.fail(&Error::Down(why.clone())),
            }
        }
    }
}

fn read(place: &Place, jobs: &mut mpsc::Receiver<Job>, state: &watch::Sender<State>) -> End {
    let identity = database::identity(place);
    let connection = match database::open(place) {
        Ok(connection) => connection,
        Err(error) => return End::Broken(error),
    };
    let mut database = match Database::prepare(&connection, place.store_dir.clone()) {
        Ok(database) => database,
        Err(error) => return End::Broken(error),
    };
    state.send_replace(State::Open);
    let mut looked = Instant::now();
    while let Some(first) = jobs.blocking_recv() {
        if looked.elapsed() >= LOOK_AFTER {
            looked = Instant::now();
            if database::identity(place) != identity {
                first.fail(&Error::Lost("the database was replaced".into()));
                return End::Replaced;
            }
        }
        let batch = std::iter::once(first).chain(std::iter::from_fn(|| jobs.try_recv().ok()));
        if let Err(error) = answer(&mut database, batch.take(BATCH_MAX))
            && !error.is_passing()
        {
            return End::Broken(error);
        }
    }
    End::Unused
}

/// Answers questions in one transaction; `Err`: the last failure.
fn answer(
    database: &mut Database<'_>,
    batch: impl Iterator<Item = Job>,
) -> Result<(), DatabaseError> {
    let mut outcome = database.begin();
    let mut keep = |answer: Result<Option<Registered>, DatabaseError>| {
        answer.map_err(|error| {
            debug!(%error, "the database does not tell");
            let text = error.to_string();
            outcome = Err(error);
            Error::Down(text.into())
        })
    };
    // Whoever asked may be gone.
    for job in batch {
        match job {
            Job::ByHash(hash, answer) => drop(answer.send(keep(database.by_hash(hash)))),
            Job::ByPath(path, answer) => drop(answer.send(keep(database.by_path(&path)))),
            Job::ByPaths(paths, answer) => {
                let answers = paths.iter().map(|path| keep(database.by_path(path)));
                drop(answer.send(answers.collect()));
            }
            Job::Reopen => {}
        }
    }
    let ended = database.end();
    outcome.and(ended)
}

impl Job {
    fn fail(self, error: &Error) {
        match self {
            Self::ByHash(_, answer) | Self::ByPath(_, answer) => {
                drop(answer.send(Err(error.clone())));
            }
            Self::ByPaths(paths, answer) => {
                drop(answer.send(vec![Err(error.clone()); paths.len()]));
            }
            Self::Reopen => {}
        }
    }
}

impl Default for ReaderOptions {
    fn default() -> Self {
        Self {
            questions_max: 4096,
            query_timeout: Duration::from_secs(2),
        }
    }
}

fn gone() -> Error {
    Error::Down("the database is not read any more".into())
}

/// Questions of one transaction, so that the log can be folded in between.
const BATCH_MAX: usize = 256;

/// How often it is looked whether the file is still the same one.
const LOOK_AFTER: Duration = Duration::from_millis(500);
