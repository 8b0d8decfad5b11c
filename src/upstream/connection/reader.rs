//! The reading half: bytes to events, events to those who asked.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::time::Instant;
use tracing::debug;

use super::ConnectionOptions;
use super::body::Abandoned;
use super::questions::{Questions, Sent, Slot};
use crate::nix::worker_protocol::reply::ReplyError;
use crate::nix::worker_protocol::session::{Event, Session};
use crate::upstream::Error;

/// The reading half and the questions whose answers it awaits.
pub(super) struct Reading<R> {
    reader: R,
    buffer: BytesMut,
    session: Session,
    questions: Arc<Questions>,
    /// In the order of their answers.
    slots: VecDeque<Pending>,
    sent: Vec<Sent>,
    /// Answers since the window was last given back, and the bytes of their questions.
    answered: (usize, usize),
    query_timeout: Duration,
    stall_timeout: Duration,
}

struct Pending {
    slot: Slot,
    name: &'static str,
    bytes: usize,
}

impl<R: AsyncRead + Unpin> Reading<R> {
    pub(super) fn new(
        reader: R,
        buffer: BytesMut,
        session: Session,
        questions: Arc<Questions>,
        options: &ConnectionOptions,
    ) -> Self {
        Self {
            reader,
            buffer,
            session,
            questions,
            slots: VecDeque::new(),
            sent: Vec::new(),
            answered: (0, 0),
            query_timeout: options.query_timeout,
            stall_timeout: options.stall_timeout,
        }
    }

    /// Reads until the connection breaks.
    pub(super) async fn run(&mut self) -> Error {
        loop {
            if let Err(error) = self.turn().await {
                return error;
            }
        }
    }

    /// Fails the questions whose answers did not come.
    pub(super) fn fail(&mut self, error: &Error) {
        for sent in self.sent.drain(..) {
            sent.slot.fail(error);
        }
        for pending in self.slots.drain(..) {
            pending.slot.fail(error);
        }
    }

    /// Reads once and hands out what came.
    async fn turn(&mut self) -> Result<(), Error> {
        self.read().await?;
        self.questions.heard();
        self.take_over();
        while let Some(event) = self.next()? {
            self.on_event(event).await?;
        }
        self.give_back();
        Ok(())
    }

    fn next(&mut self) -> Result<Option<Event>, Error> {
        let event = self.session.next(&mut self.buffer);
        event.map_err(super::of_protocol)
    }

    async fn read(&mut self) -> Result<(), Error> {
        if self.buffer.is_empty() && self.buffer.capacity() > READ_BYTES * 2 {
            // A long answer made it grow.
            self.buffer = BytesMut::new();
        }
        if self.buffer.capacity() - self.buffer.len() < READ_BYTES_MIN {
            self.buffer.reserve(READ_BYTES);
        }
        let (begun, tick) = (Instant::now(), self.tick());
        loop {
            let read = self.reader.read_buf(&mut self.buffer);
            match tokio::time::timeout(tick, read).await {
                Ok(Ok(0)) => return Err(Error::Lost("the daemon closed the connection".into())),
                Ok(Ok(_)) => return Ok(()),
                Ok(Err(error)) => return Err(super::lost(&error)),
                Err(_) => self.check_silence(begun)?,
            }
        }
    }

    /// Gives up when nothing came for too long since `begun` while an answer is awaited.
    fn check_silence(&mut self, begun: Instant) -> Result<(), Error> {
        self.take_over();
        let (Some(front), Some(since)) = (self.slots.front(), self.questions.asking_since()) else {
            return Ok(());
        };
        let after = match front.slot {
            Slot::Nar(_) => self.stall_timeout,
            _ => self.query_timeout,
        };
        if begun.max(since).elapsed() < after {
            return Ok(());
        }
        let question = front.name;
        Err(Error::TimedOut { question, after })
    }

    /// Returns how often silence is looked at: precise to an eighth.
    fn tick(&self) -> Duration {
        let least = self.query_timeout.min(self.stall_timeout) / 8;
        least.clamp(TICK_MIN, TICK_MAX)
    }

    /// Takes over the questions that were written meanwhile, before their answers are read.
    fn take_over(&mut self) {
        self.questions.take_sent(&mut self.sent);
        for sent in self.sent.drain(..) {
            self.session.expect(sent.expected);
            self.slots.push_back(Pending {
                slot: sent.slot,
                name: sent.name,
                bytes: sent.bytes,
            });
        }
    }

    fn give_back(&mut self) {
        let (questions, bytes) = std::mem::take(&mut self.answered);
        if questions > 0 {
            self.questions.give_back(questions, bytes);
        }
    }

    fn pop(&mut self) -> Result<Slot, Error> {
        let pending = self.slots.pop_front();
        let pending =
            pending.ok_or_else(|| Error::Protocol("an answer without a question".into()))?;
        self.answered.0 += 1;
        self.answered.1 += pending.bytes;
        Ok(pending.slot)
    }

    async fn on_event(&mut self, event: Event) -> Result<(), Error> {
        match event {
            Event::Log(line) => debug!(line, "nix-daemon says"),
            Event::Reply(answer) => {
                let answer = answer.map_err(error_of_reply);
                self.pop()?.answer(answer);
            }
            Event::Paths(paths) => {
                if let Some(Slot::AllPaths(body)) = self.slots.front().map(|p| &p.slot) {
                    let weight = u32::try_from(paths.len()).unwrap_or(u32::MAX);
                    // Nobody listens: the rest is read to the end.
                    let _: Result<(), Abandoned> = body.send(paths, weight).await;
                }
            }
            Event::NarStart => {
                if let Some(Slot::Nar(nar)) = self.slots.front_mut().map(|p| &mut p.slot)
                    && let Some(opened) = nar.opened.take()
                {
                    let _ = opened.send(Ok(true));
                }
            }
            Event::NarChunk(chunk) => self.on_chunk(chunk).await?,
            Event::NarEnd => {
                if let Slot::Nar(nar) = self.pop()? {
                    nar.body.end(Ok(()));
                }
            }
            Event::NarRefused(text) => {
                let told = Error::Lost(format!("closed after an error: {text}").into());
                if let Slot::Nar(nar) = self.pop()?
                    && let Some(opened) = nar.opened
                {
                    let _ = opened.send(match is_missing(&text) {
                        true => Ok(false),
                        false => Err(Error::Remote(text.into())),
                    });
                }
                return Err(told);
            }
        }
        Ok(())
    }

    async fn on_chunk(&mut self, chunk: Bytes) -> Result<(), Error> {
        // The window is not to wait for a slow reader of a NAR.
        self.give_back();
        let Some(Slot::Nar(nar)) = self.slots.front_mut().map(|p| &mut p.slot) else {
            return Ok(());
        };
        let len = chunk.len() as u64;
        self.questions.nar_arrived(len);
        nar.left = nar.left.saturating_sub(len);
        // A small part would keep the whole buffer it was cut from.
        let chunk = match chunk.len() {
            len if len < COPY_BYTES_MAX => Bytes::copy_from_slice(&chunk),
            _ => chunk,
        };
        let weight = u32::try_from(len).unwrap_or(u32::MAX);
        match nar.body.send(chunk, weight).await {
            Err(Abandoned) if nar.left > DISCARD_BYTES_MAX => {
                let left = nar.left;
                let told =
                    format!("given up in a NAR that nobody reads, {left} bytes before its end");
                Err(Error::Lost(told.into()))
            }
            Ok(()) | Err(Abandoned) => Ok(()),
        }
    }
}

fn error_of_reply(error: ReplyError) -> Error {
    let text = error.to_string().into();
    match error {
        ReplyError::Remote(_) => Error::Remote(text),
        ReplyError::StoreDir(_) => Error::StoreDir(text),
        ReplyError::Malformed(_) | ReplyError::Protocol(_) => Error::Protocol(text),
    }
}

/// Tells whether the words of a daemon say that the path is not there.
fn is_missing(text: &str) -> bool {
    let words = [
        "is not valid",              // what `LocalStore` says of a path that is not registered
        "is not a valid store path", // Nix 2.34
        "does not exist",            // Nix 2.26 and 2.34, registered but deleted
        "No such file or directory", // Nix 2.8
    ];
    words.iter().any(|words| text.contains(words))
}

/// Room made for a read.
pub(super) const READ_BYTES: usize = 128 << 10;

const READ_BYTES_MIN: usize = 16 << 10;

const COPY_BYTES_MAX: usize = 8 << 10;

/// What is left of an abandoned NAR is read if it is no more than this; a new connection over ssh
/// costs as much.
const DISCARD_BYTES_MAX: u64 = 8 << 20;

const TICK_MIN: Duration = Duration::from_millis(10);
const TICK_MAX: Duration = Duration::from_secs(5);
