//! A connection together with what carries it.

use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::stream::BoxStream;
use tokio::time::{Instant, timeout};

use super::connection::{Connection, ConnectionOptions, Pending};
use super::wire::{Dial, Guard, Purpose};
use super::{Error, NarStream};
use crate::nix::store_path::StorePath;
use crate::nix::worker_protocol::Peer;
use crate::nix::worker_protocol::reply::Reply;
use crate::nix::worker_protocol::request::Request;

/// An open session with a daemon; it closes, and its ssh ends, when the last handle is dropped.
pub struct Session {
    connection: Connection,
    guard: Guard,
}

/// The bounds of opening a session.
#[derive(Clone, Debug)]
pub struct SessionOptions {
    /// Of the protocol.
    pub connection: ConnectionOptions,
    /// From the first step of the login to the end of the greeting.
    pub connect_timeout: Duration,
}

impl Session {
    /// Logs in and greets.
    ///
    /// A failure is [`Error::Down`] with the carrier's own words, unless it is about the peer's
    /// protocol or store directory. Dropped, it leaves nothing behind.
    pub async fn open(
        dial: &dyn Dial,
        purpose: Purpose,
        options: &SessionOptions,
    ) -> Result<Self, Error> {
        let mut guard = Guard::default();
        let opening = async {
            let wire = dial.dial(purpose).await?;
            guard = wire.guard;
            Connection::open(wire.reader, wire.writer, options.connection.clone()).await
        };
        let opened = timeout(options.connect_timeout, opening).await;
        match opened {
            Ok(Ok(connection)) => Ok(Self { connection, guard }),
            Ok(Err(error)) => Err(match guard.explain(error).await {
                Error::Lost(text) => Error::Down(text),
                error => error,
            }),
            Err(_) => {
                let after = options.connect_timeout;
                let text = match guard.words() {
                    Some(words) => format!("no greeting within {after:?}: {words}"),
                    None => format!("no greeting within {after:?}: what listens there is silent"),
                };
                Err(Error::Down(text.into()))
            }
        }
    }

    /// Names the peer for people.
    pub fn peer(&self) -> String {
        self.connection.peer().to_string()
    }

    /// Returns what the daemon told of itself.
    pub fn daemon(&self) -> &Peer {
        self.connection.peer()
    }

    /// Lists all paths of the store, without a bound in time; see [`Connection::all_paths`].
    pub fn all_paths(&self) -> Result<BoxStream<'static, Result<Vec<StorePath>, Error>>, Error> {
        self.connection.all_paths()
    }

    /// Asks one question, without a bound in time.
    pub async fn ask(&self, request: Request) -> Result<Reply, Error> {
        self.connection.ask(request).await.map_err(elsewhere)
    }

    /// Asks one question if no other is under way; see [`Connection::ask_when_idle`].
    pub fn ask_when_idle(&self, request: Request) -> Option<Pending> {
        self.connection.ask_when_idle(request)
    }

    /// Asks many questions, without a bound in time.
    pub async fn ask_many(&self, requests: Vec<Request>) -> Vec<Result<Reply, Error>> {
        let answers = self.connection.ask_many(requests).await.into_iter();
        answers.map(|answer| answer.map_err(elsewhere)).collect()
    }

    /// Asks many questions until `enough` says why they are given up; what came until then counts.
    ///
    /// `enough` is called with how many are answered whenever `tick` has passed.
    async fn ask_many_until(
        &self,
        requests: Vec<Request>,
        tick: Duration,
        mut enough: impl FnMut(usize) -> Option<Error>,
    ) -> Vec<Result<Reply, Error>> {
        let mut many = self.connection.begin_many(requests);
        let given_up = loop {
            match timeout(tick, many.settled()).await {
                Ok(()) => break None,
                Err(_) => {
                    if let Some(error) = enough(many.answered()) {
                        break Some(error);
                    }
                }
            }
        };
        let answers = many.finish(given_up).into_iter();
        answers.map(|answer| answer.map_err(elsewhere)).collect()
    }

    /// Asks many questions until no answer came for `silence_max`, or `enough` says why they are given up; what came
    /// until then counts.
    ///
    /// `enough` is asked several times within that time.
    pub async fn ask_many_while_heard(
        &self,
        requests: Vec<Request>,
        silence_max: Duration,
        mut enough: impl FnMut() -> Option<Error>,
        timed_out: impl Fn() -> Error,
    ) -> Vec<Result<Reply, Error>> {
        let (mut answered, mut since) = (0, Instant::now());
        let tick = (silence_max / 8).clamp(TICK_MIN, TICK_MAX);
        let enough = |now_answered| {
            if now_answered > answered {
                (answered, since) = (now_answered, Instant::now());
            }
            enough().or_else(|| (since.elapsed() >= silence_max).then(&timed_out))
        };
        self.ask_many_until(requests, tick, enough).await
    }

    /// Opens a NAR, without a bound in time.
    pub async fn nar(&self, path: &StorePath, nar_size: u64) -> Result<Option<NarStream>, Error> {
        self.connection.nar(path, nar_size).await
    }

    /// Tells how long the peer has been silent.
    pub fn silent_for(&self) -> Duration {
        Instant::from_std(self.connection.last_heard()).elapsed()
    }

    /// Resolves when it shows that the peer's store lies in another directory, and never otherwise.
    ///
    /// Asks for a path of our directory, there or not: a daemon of another one refuses it. Without
    /// this it would say "not there" to every hash part that it does not have, and seem well.
    pub async fn other_store_dir(&self) -> Error {
        if let Ok(path) = NOBODYS.parse()
            && let Err(error @ Error::StoreDir(_)) = self.ask(Request::IsValidPath(path)).await
        {
            return error;
        }
        std::future::pending().await
    }

    /// Tells whether the connection is over.
    pub fn is_closed(&self) -> bool {
        self.connection.closed().now_or_never().is_some()
    }

    /// Waits for the end of the connection and tells its bare cause.
    pub async fn closed(&self) -> Error {
        self.connection.closed().await
    }

    /// Tells whether a question failed only because the connection broke under it.
    pub fn broke(&self, error: &Error) -> bool {
        match error {
            Error::Lost(_) => true,
            // The peer's broken words fail all that is under way; malformed content fails the
            // one question, and the connection goes on.
            Error::Protocol(_) => self.is_closed(),
            _ => false,
        }
    }

    /// Adds what the carrier knows to the cause of a loss.
    pub async fn explain(&self, error: Error) -> Error {
        self.guard.explain(error).await
    }
}

/// Understands the words of a daemon whose store lies in another directory.
///
/// It says them twice, so they may be the answer to the next question.
fn elsewhere(error: Error) -> Error {
    match error {
        Error::Remote(words) if words.contains("is not in the Nix store") => {
            let text = format!(
                "store lies in another directory, and its paths are of no use here; a muster of its \
                 own can serve them (store-dir); its daemon says: {words}"
            );
            Error::StoreDir(text.into())
        }
        error => error,
    }
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self {
            connection: ConnectionOptions::default(),
            connect_timeout: Duration::from_secs(10),
        }
    }
}

/// How often it is looked whether answers still come.
const TICK_MIN: Duration = Duration::from_millis(10);
const TICK_MAX: Duration = Duration::from_millis(250);

const NOBODYS: &str = "00000000000000000000000000000000-store-directory";
