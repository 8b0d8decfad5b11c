//! One `nix-store --serve`, one question at a time.
//!
//! What is said is decided in [`nix::serve_protocol`](crate::nix::serve_protocol); this is the
//! plumbing. A server that fails at a question says why on its error output and ends: then so does
//! the session.

use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::time::timeout;

use super::Error;
use super::wire::{Dial, Guard, Wire};
use crate::nix::path_info::PathInfo;
use crate::nix::serve_protocol::Version;
use crate::nix::serve_protocol::handshake::Handshake;
use crate::nix::serve_protocol::request::{Encoder, Request};
use crate::nix::serve_protocol::session::{Event, Session};
use crate::nix::store_path::{StoreDir, StorePath};
use crate::nix::worker_protocol::reply::ReplyError;

/// An open session; it closes, and its ssh ends, when it is dropped.
pub struct ServeSession {
    reader: Box<dyn AsyncRead + Send + Unpin>,
    writer: Box<dyn AsyncWrite + Send + Unpin>,
    guard: Guard,
    buffer: BytesMut,
    encoder: Encoder,
    session: Session,
    version: Version,
    options: ServeOptions,
}

/// The bounds of a session.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// Where the store lies.
    pub store_dir: StoreDir,
    /// From the first step of the login to the end of the greeting.
    pub connect_timeout: Duration,
    /// Longest silence while an answer is awaited.
    pub silence_max: Duration,
    /// Bytes of one answer: a closure of 100,000 paths takes some 60 MB.
    pub answer_bytes_max: u64,
}

/// What came for a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// To `QueryValidPaths` and `QueryClosure`.
    Paths(Vec<StorePath>),
    /// To `QueryPathInfos`, without those that cannot be read.
    Infos(Vec<PathInfo>),
}

impl ServeSession {
    /// Logs in and greets.
    ///
    /// [`Error::Protocol`] and [`Error::Unsupported`]: what answers there is something else, and
    /// will be the next time. Dropped, it leaves nothing behind.
    pub async fn open(dial: &dyn Dial, options: ServeOptions) -> Result<Self, Error> {
        let mut guard = Guard::default();
        let opening = async {
            let wire = dial.dial_nix_store().await?;
            guard = wire.guard.clone();
            greet(wire, options.clone()).await
        };
        let opened = timeout(options.connect_timeout, opening).await;
        match opened {
            Ok(Ok(session)) => Ok(session),
            Ok(Err(error)) => Err(guard.explain(error).await),
            Err(_) => {
                let after = options.connect_timeout;
                let words = guard.words().unwrap_or_default();
                Err(Error::Down(
                    format!("no greeting within {after:?}: {words}").into(),
                ))
            }
        }
    }

    /// Returns the version that is spoken.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Asks one question and waits for the whole answer.
    ///
    /// After an error, or dropped, the session is of no more use.
    pub async fn ask(&mut self, request: &Request) -> Result<Answer, Error> {
        let mut out = BytesMut::new();
        self.session.expect(self.encoder.encode(request, &mut out));
        // A server may answer before it has read all; so both go on at once.
        let (writer, name) = (&mut self.writer, request.name());
        let write = async {
            writer.write_all_buf(&mut out).await.map_err(lost)?;
            writer.flush().await.map_err(lost)
        };
        let read = Reading {
            reader: &mut self.reader,
            buffer: &mut self.buffer,
            session: &mut self.session,
            options: &self.options,
            name,
        };
        match tokio::try_join!(write, read.answer()) {
            Ok(((), answer)) => Ok(answer),
            Err(error) => Err(self.guard.explain(error).await),
        }
    }

    /// Waits for the end of the server while nothing is asked, and says why it ended.
    ///
    /// May be dropped at any time.
    pub async fn ended(&mut self) -> Error {
        let error = match self.reader.read_buf(&mut self.buffer).await {
            Ok(0) => Error::Lost("nix-store --serve ended".into()),
            Ok(_) => Error::Protocol("nix-store --serve speaks unasked".into()),
            Err(error) => lost(error),
        };
        self.guard.explain(error).await
    }
}

struct Reading<'a> {
    reader: &'a mut Box<dyn AsyncRead + Send + Unpin>,
    buffer: &'a mut BytesMut,
    session: &'a mut Session,
    options: &'a ServeOptions,
    name: &'static str,
}

impl Reading<'_> {
    async fn answer(self) -> Result<Answer, Error> {
        let mut infos = Vec::new();
        let mut bytes = 0;
        loop {
            while let Some(event) = self.session.next(self.buffer).map_err(protocol)? {
                match event {
                    Event::Paths(Ok(paths)) => return Ok(Answer::Paths(paths)),
                    Event::Paths(Err(error)) => return Err(of_reply(error)),
                    // One that cannot be read is asked for again when a client wants it.
                    Event::Info(info) => infos.extend(info.ok()),
                    Event::InfosEnd => return Ok(Answer::Infos(infos)),
                }
            }
            self.buffer.reserve(READ_BYTES);
            let after = self.options.silence_max;
            let read = timeout(after, self.reader.read_buf(self.buffer)).await;
            let read = read.map_err(|_| Error::TimedOut {
                question: self.name,
                after,
            })?;
            match read.map_err(lost)? {
                0 => return Err(Error::Lost("nix-store --serve ended".into())),
                read => bytes += read as u64,
            }
            if bytes > self.options.answer_bytes_max {
                let max = self.options.answer_bytes_max;
                return Err(Error::Protocol(
                    format!("an answer to {} of more than {max} bytes", self.name).into(),
                ));
            }
        }
    }
}

async fn greet(mut wire: Wire, options: ServeOptions) -> Result<ServeSession, Error> {
    let (mut out, mut buffer) = (BytesMut::new(), BytesMut::new());
    let handshake = Handshake::begin(&mut out);
    // If the peer has just closed, what it said before may still be there to be read.
    let _ = wire.writer.write_all_buf(&mut out).await;
    let _ = wire.writer.flush().await;
    let refused = |error: crate::nix::serve_protocol::handshake::HandshakeError| {
        Error::Protocol(error.to_string().into())
    };
    loop {
        if let Some(version) = handshake.proceed(&mut buffer).map_err(refused)? {
            return Ok(ServeSession {
                reader: wire.reader,
                writer: wire.writer,
                guard: wire.guard,
                buffer,
                encoder: Encoder::new(options.store_dir.clone()),
                session: Session::new(options.store_dir.clone()),
                version,
                options,
            });
        }
        if wire.reader.read_buf(&mut buffer).await.map_err(lost)? == 0 {
            let said = handshake.end_of_input(&buffer).map(refused);
            return Err(said.unwrap_or_else(|| Error::Lost("closed before it greeted".into())));
        }
    }
}

fn protocol(error: impl std::error::Error) -> Error {
    Error::Protocol(error.to_string().into())
}

fn of_reply(error: ReplyError) -> Error {
    match error {
        ReplyError::StoreDir(_) => Error::StoreDir(error.to_string().into()),
        error => protocol(error),
    }
}

fn lost(error: std::io::Error) -> Error {
    Error::Lost(error.to_string().into())
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self {
            store_dir: StoreDir::default(),
            connect_timeout: Duration::from_secs(10),
            silence_max: Duration::from_secs(10),
            answer_bytes_max: 64 << 20,
        }
    }
}

/// Room made for a read.
const READ_BYTES: usize = 64 << 10;
