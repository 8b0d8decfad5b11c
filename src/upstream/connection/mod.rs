//! One connection to a `nix-daemon`: many questions under way at once.
//!
//! Questions are written back to back, answers come in the same order. Reading and writing go on
//! independently of each other, since a daemon that cannot get rid of its answers stops reading;
//! and only a window of questions is under way, so that a late one is not behind thousands. One
//! task per connection does both and dies with the last handle. What is said is decided in
//! [`nix::worker_protocol`](crate::nix::worker_protocol); this is the plumbing.
//!
//! ```text
//! ask ─► waiting ─► window ─► write … the daemon … read ─► session ─► answer
//!        by turns   256 or 64 KiB                           └► NAR body, bounded ─► stream
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tracing::Instrument as _;

use super::{Error, NarStream};
use crate::nix::store_path::{StoreDir, StorePath};
use crate::nix::worker_protocol::handshake::{Handshake, HandshakeError};
use crate::nix::worker_protocol::reply::Reply;
use crate::nix::worker_protocol::request::{Encoder, Request};
use crate::nix::worker_protocol::session::Session;
use crate::nix::worker_protocol::{Peer, ProtocolError};
use many::Many;
use questions::{Questions, Slot};

mod body;
pub mod many;
mod questions;
mod reader;
mod writer;

/// A handle on an open connection; clones share it, the last one dropped closes it.
#[derive(Clone, Debug)]
pub struct Connection {
    inner: Arc<Inner>,
}

/// Bounds of a connection.
#[derive(Clone, Debug)]
pub struct ConnectionOptions {
    /// Where the daemon's store lies; it is written before each path.
    pub store_dir: StoreDir,
    /// Most questions under way: some 2 ms of the daemon's time.
    pub questions_max: usize,
    /// Most bytes of questions under way: what a pipe holds.
    pub question_bytes_max: usize,
    /// Longest silence while a question is under way, before the connection is given up. A caller
    /// may have given up long before.
    pub query_timeout: Duration,
    /// Longest pause within a NAR, before the connection is given up.
    pub stall_timeout: Duration,
}

/// How busy a connection is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Questions that wait or are under way.
    pub questions: usize,
    /// Bytes of NARs that were asked for and did not arrive yet.
    pub nar_bytes: u64,
}

#[derive(Debug)]
struct Inner {
    peer: Peer,
    questions: Arc<Questions>,
    /// The task that reads and writes; aborted when this is dropped.
    _tasks: JoinSet<()>,
}

/// A question under way; dropped, its answer is thrown away.
#[derive(Debug)]
pub struct Pending(oneshot::Receiver<questions::Answer>);

impl Pending {
    /// Waits until it is answered or failed. May be dropped and called again, until it has returned.
    pub async fn settled(&mut self) -> Result<Reply, Error> {
        let ended = || Err(Error::Lost("the connection ended".into()));
        (&mut self.0).await.unwrap_or_else(|_| ended())
    }
}

impl Connection {
    /// Shakes hands over an open byte stream and starts the connection's task.
    ///
    /// It waits as long as the peer does: the caller bounds it. Dropped, it closes both halves.
    pub async fn open<R, W>(
        mut reader: R,
        mut writer: W,
        options: ConnectionOptions,
    ) -> Result<Self, Error>
    where
        R: AsyncRead + Send + Unpin + 'static,
        W: AsyncWrite + Send + Unpin + 'static,
    {
        let mut buffer = BytesMut::with_capacity(reader::READ_BYTES);
        let peer = shake_hands(&mut reader, &mut writer, &mut buffer).await?;
        let questions = Arc::new(Questions::new(
            Encoder::new(&peer, options.store_dir.clone()),
            options.questions_max,
            options.question_bytes_max,
        ));
        let session = Session::new(&peer, options.store_dir.clone());
        let reading = reader::Reading::new(reader, buffer, session, questions.clone(), &options);
        let mut tasks = JoinSet::new();
        tasks.spawn(run(reading, writer, questions.clone()).in_current_span());
        let inner = Inner {
            peer,
            questions,
            _tasks: tasks,
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// Returns what the daemon told of itself.
    pub fn peer(&self) -> &Peer {
        &self.inner.peer
    }

    /// Asks one question. The caller bounds how long it waits.
    ///
    /// Dropped before the question was written, it is never asked; later, its answer is thrown
    /// away and nothing else is disturbed.
    pub async fn ask(&self, request: Request) -> Result<Reply, Error> {
        refuse_stream(&request)?;
        let (sender, answer) = oneshot::channel();
        self.inner.questions.push(request, Slot::One(sender))?;
        answer.await.unwrap_or_else(|_| Err(self.broken()))
    }

    /// Asks one question if no other waits or is under way, so that its answer waits for the daemon alone.
    pub fn ask_when_idle(&self, request: Request) -> Option<Pending> {
        refuse_stream(&request).ok()?;
        let (sender, answer) = oneshot::channel();
        let asked = (self.inner.questions).push_when_idle(request, Slot::One(sender));
        matches!(asked, Ok(true)).then_some(Pending(answer))
    }

    /// Asks many questions, written back to back; the answers have their order.
    ///
    /// They take turns with the questions of other callers. Dropped, those that were not written
    /// are never asked. When the connection breaks, the questions without an answer fail.
    pub async fn ask_many(&self, requests: Vec<Request>) -> Vec<Result<Reply, Error>> {
        let mut many = self.begin_many(requests);
        many.settled().await;
        many.finish(self.inner.questions.broken())
    }

    /// Begins to ask as [`ask_many`](Self::ask_many) does.
    pub fn begin_many(&self, requests: Vec<Request>) -> Many {
        let count = requests.len();
        match requests.iter().find_map(|r| refuse_stream(r).err()) {
            Some(error) => Many::refused(count, error),
            None => match self.inner.questions.push_many(requests) {
                Ok(many) => many,
                Err(error) => Many::refused(count, error),
            },
        }
    }

    /// Fetches the NAR of a path that the store said has `nar_size` bytes.
    ///
    /// It resolves when the NAR begins, or with `Ok(None)` when the store has no such path; then
    /// the daemon closes the connection, as it does after every error here. NARs may be asked for
    /// back to back: those of at most 4 MiB are buffered whole and hold nothing up, of larger
    /// ones at most 1 MiB is, and what was asked behind them waits for their reader.
    ///
    /// The stream keeps the connection open. Dropped with more than 8 MiB to come, it breaks the
    /// connection, as there is no other way to stop a NAR; otherwise the rest is read and thrown
    /// away. A NAR of another size than promised breaks the connection too.
    pub async fn nar(&self, path: &StorePath, nar_size: u64) -> Result<Option<NarStream>, Error> {
        let request = Request::NarFromPath {
            path: path.clone(),
            nar_size,
        };
        let (body, chunks) = body::channel(body::budget(nar_size));
        let (opened, begun) = oneshot::channel();
        let slot = Slot::Nar(questions::NarSlot {
            opened: Some(opened),
            body,
            left: nar_size,
        });
        self.inner.questions.push(request, slot)?;
        match begun.await.unwrap_or_else(|_| Err(self.broken()))? {
            true => Ok(Some(self.hold(chunks))),
            false => Ok(None),
        }
    }

    /// Lists all paths of the store, some thousand at a time.
    ///
    /// What is asked behind it waits for the reader: it wants a connection of its own. Dropped,
    /// the rest is read and thrown away.
    pub fn all_paths(&self) -> Result<BoxStream<'static, Result<Vec<StorePath>, Error>>, Error> {
        let (body, paths) = body::channel(body::PATHS_BUDGET);
        let slot = Slot::AllPaths(body);
        self.inner
            .questions
            .push(Request::QueryAllValidPaths, slot)?;
        Ok(self.hold(paths))
    }

    /// Returns when the daemon was last heard; its greeting counts.
    pub fn last_heard(&self) -> Instant {
        self.inner.questions.last_heard()
    }

    /// Returns how busy the connection is now.
    pub fn load(&self) -> Load {
        self.inner.questions.load()
    }

    /// Waits until the connection is broken and says why. May be dropped at any time.
    pub async fn closed(&self) -> Error {
        self.inner.questions.closed().await
    }

    fn broken(&self) -> Error {
        let unknown = || Error::Lost("the connection ended".into());
        self.inner.questions.broken().unwrap_or_else(unknown)
    }

    /// Makes a stream of a body that keeps the connection open.
    fn hold<T: Send + 'static>(
        &self,
        body: body::Receiver<T>,
    ) -> BoxStream<'static, Result<T, Error>> {
        let connection = self.clone();
        body.inspect(move |_| {
            let _keeps_open = &connection;
        })
        .boxed()
    }
}

impl Default for ConnectionOptions {
    fn default() -> Self {
        Self {
            store_dir: StoreDir::default(),
            questions_max: 256,
            question_bytes_max: 64 << 10,
            query_timeout: Duration::from_secs(60),
            stall_timeout: Duration::from_secs(60),
        }
    }
}

async fn shake_hands(
    reader: &mut (impl AsyncRead + Unpin),
    writer: &mut (impl AsyncWrite + Unpin),
    buffer: &mut BytesMut,
) -> Result<Peer, Error> {
    let mut out = BytesMut::new();
    let mut handshake = Handshake::begin(&mut out);
    loop {
        // If the peer has just closed, what it said before may still be there to be read.
        let _ = writer.write_all_buf(&mut out).await;
        let _ = writer.flush().await;
        if reader.read_buf(buffer).await.map_err(|e| lost(&e))? == 0 {
            let said = handshake.end_of_input(buffer).map(of_handshake);
            return Err(said.unwrap_or_else(|| Error::Lost("closed before it greeted".into())));
        }
        if let Some(peer) = handshake.proceed(buffer, &mut out).map_err(of_handshake)? {
            return Ok(peer);
        }
    }
}

/// Reads and writes until one of both fails, then fails what is left.
async fn run<R, W>(mut reading: reader::Reading<R>, writer: W, questions: Arc<Questions>)
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let ending = Ending(questions.clone());
    let error = tokio::select! {
        error = reading.run() => error,
        error = writer::run(writer, &questions) => error,
    };
    questions.fail(&error);
    reading.fail(&error);
    drop(ending);
}

/// Fails what waits even if the task is ended from outside or panics.
struct Ending(Arc<Questions>);

impl Drop for Ending {
    fn drop(&mut self) {
        if self.0.broken().is_none() {
            self.0.fail(&Error::Lost("the connection ended".into()));
        }
    }
}

fn refuse_stream(request: &Request) -> Result<(), Error> {
    match request {
        Request::NarFromPath { .. } | Request::QueryAllValidPaths => {
            Err(Error::Unsupported("a stream as an answer".into()))
        }
        _ => Ok(()),
    }
}

fn of_protocol(error: ProtocolError) -> Error {
    let text = error.to_string().into();
    match error {
        ProtocolError::GaveUp(_) | ProtocolError::NarCut(_) => Error::Lost(text),
        _ => Error::Protocol(text),
    }
}

fn of_handshake(error: HandshakeError) -> Error {
    let text = error.to_string().into();
    match error {
        HandshakeError::TooOld(_) | HandshakeError::TooNew(_) => Error::Unsupported(text),
        HandshakeError::Refused(_) => Error::Remote(text),
        HandshakeError::NotADaemon(_) | HandshakeError::Protocol(_) => Error::Protocol(text),
    }
}

fn lost(error: &std::io::Error) -> Error {
    Error::Lost(error.to_string().into())
}

#[cfg(test)]
mod tests;
