//! An open session: arriving bytes in, events out.
//!
//! For each question in turn come messages up to `STDERR_LAST` or `STDERR_ERROR`, then the reply;
//! after `NarFromPath` a raw NAR, whose end only its grammar tells. A daemon that fails to make the
//! NAR writes an error frame into it: before or after `nix-archive-1`, and then closes.
//!
//! It keeps no bytes itself: what an event did not take stays in the caller's buffer. Work is
//! linear in the bytes, however they are cut.

use std::collections::VecDeque;

use bytes::{Buf as _, Bytes, BytesMut};

use super::message::{self, Message};
use super::reply::{self, Reply, ReplyError};
use super::request::{Awaited, Expected};
use super::shape::{self, Field, Scan};
use super::wire::Reader;
use super::{Peer, ProtocolError, Version};
use crate::nix::nar::{NarError, NarParser};
use crate::nix::store_path::{StoreDir, StorePath};

/// The client's side of an open session.
#[derive(Debug)]
pub struct Session {
    version: Version,
    store_dir: StoreDir,
    questions: VecDeque<Awaited>,
    state: State,
}

/// Something that arrived. Those between two replies belong to the question at the front.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A line for people.
    Log(String),
    /// The question at the front is answered, or failed by itself.
    Reply(Result<Reply, ReplyError>),
    /// Some of all valid paths; the reply comes after the last.
    Paths(Vec<StorePath>),
    /// The NAR at the front is there and begins.
    NarStart,
    /// Bytes of it, at most 256 KiB.
    NarChunk(Bytes),
    /// It is complete and has the size that was promised; the question is answered.
    NarEnd,
    /// The store could not give the NAR, in its own words. The session is over.
    NarRefused(String),
}

#[derive(Debug)]
enum State {
    /// Before a message.
    Message,
    /// In the fields of the message that the word names.
    Fields(u64, Scan),
    Reply(Awaited, Scan),
    /// In the list of all paths; how many are left once their count came.
    Paths(Option<u64>, Listed),
    /// Before the first bytes of a NAR of this size.
    NarHead(u64),
    Nar(u64, Box<NarParser>),
    /// In an error frame inside a NAR.
    NarError(Begun, Scan),
    Over,
}

/// What was seen of a list of all paths.
#[derive(Debug, Default)]
struct Listed {
    unreadable: u64,
    error: Option<ReplyError>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Begun {
    No,
    Yes,
}

/// What a step brought.
enum Step {
    Event(Event),
    /// Nothing to tell; go on.
    Next,
    NeedMore,
}

impl Session {
    /// Begins after the handshake; the store's paths must lie in `store_dir`.
    pub fn new(peer: &Peer, store_dir: StoreDir) -> Self {
        Self {
            version: peer.version,
            store_dir,
            questions: VecDeque::new(),
            state: State::Message,
        }
    }

    /// Notes that a request was, or is about to be, written.
    pub fn expect(&mut self, expected: Expected) {
        self.questions.push_back(expected.0);
    }

    /// Returns how many questions are not answered yet.
    pub fn pending(&self) -> usize {
        self.questions.len()
    }

    /// Takes the next event from `buffer`; `None`: it needs more bytes behind those that are left.
    ///
    /// An error, like [`Event::NarRefused`], ends the session and fails all that is pending.
    pub fn next(&mut self, buffer: &mut BytesMut) -> Result<Option<Event>, ProtocolError> {
        loop {
            match self.step(buffer) {
                Ok(Step::Event(event)) => return Ok(Some(event)),
                Ok(Step::Next) => {}
                Ok(Step::NeedMore) => return Ok(None),
                Err(error) => {
                    self.state = State::Over;
                    return Err(error);
                }
            }
        }
    }

    fn step(&mut self, buffer: &mut BytesMut) -> Result<Step, ProtocolError> {
        match &mut self.state {
            State::Message => {
                let Ok(word) = Reader(buffer).number() else {
                    return Ok(Step::NeedMore);
                };
                let scan = Scan::new(message::shape(word, self.version)?);
                buffer.advance(8);
                self.state = State::Fields(word, scan);
                Ok(Step::Next)
            }
            State::Fields(word, scan) => {
                let Some(len) = scan.resume(buffer)? else {
                    return Ok(Step::NeedMore);
                };
                let fields = buffer.get(..len).unwrap_or_default();
                let message = message::decode(*word, fields, self.version)?;
                buffer.advance(len);
                self.state = State::Message;
                self.on_message(message)
            }
            State::Reply(_, scan) => match scan.resume(buffer)? {
                Some(len) => self.on_reply(buffer, len),
                None => Ok(Step::NeedMore),
            },
            State::Paths(None, _) => {
                let Ok(count) = Reader(buffer).number() else {
                    return Ok(Step::NeedMore);
                };
                shape::bounded("list", count, PATHS_MAX)?;
                buffer.advance(8);
                self.state = State::Paths(Some(count), Listed::default());
                Ok(Step::Next)
            }
            State::Paths(Some(left), listed) => {
                let paths = listed.take(left, buffer, &self.store_dir)?;
                let ended = *left == 0;
                if !paths.is_empty() {
                    return Ok(Step::Event(Event::Paths(paths)));
                }
                if !ended {
                    return Ok(Step::NeedMore);
                }
                let result = match listed.error.take() {
                    Some(error) => Err(error),
                    None => Ok(Reply::AllPaths {
                        unreadable: listed.unreadable,
                    }),
                };
                self.state = State::Message;
                Ok(Step::Event(Event::Reply(result)))
            }
            State::NarHead(size) => {
                let size = *size;
                Ok(self.on_nar_head(size, buffer))
            }
            State::Nar(..) => self.on_nar(buffer),
            State::NarError(begun, scan) => {
                let Some(len) = scan.resume(buffer)? else {
                    return Ok(Step::NeedMore);
                };
                let fields = buffer.get(..len).unwrap_or_default();
                let text = message::decode_error(fields, self.version)?;
                if *begun == Begun::Yes {
                    return Err(ProtocolError::NarCut(text));
                }
                self.state = State::Over;
                Ok(Step::Event(Event::NarRefused(text)))
            }
            State::Over => Err(ProtocolError::Over),
        }
    }

    fn on_message(&mut self, message: Message) -> Result<Step, ProtocolError> {
        let text = match message {
            Message::Progress => return Ok(Step::Next),
            Message::Log(line) => return Ok(Step::Event(Event::Log(line))),
            Message::Error(text) => Some(text),
            Message::Last => None,
        };
        match (self.questions.pop_front(), text) {
            // A daemon that cannot read a request says so twice before it closes.
            (None, Some(text)) => Err(ProtocolError::GaveUp(text)),
            (None, None) => Err(ProtocolError::Unasked),
            // As Nix itself does: not every daemon answers with a flag that says so.
            (Some(Awaited::PathInfo(_)), Some(text)) if text.contains("is not valid") => {
                Ok(Step::Event(Event::Reply(Ok(Reply::PathInfo(None)))))
            }
            (Some(_), Some(text)) => Ok(Step::Event(Event::Reply(Err(ReplyError::Remote(text))))),
            (Some(awaited), None) => {
                self.state = match awaited {
                    Awaited::AllPaths => State::Paths(None, Listed::default()),
                    Awaited::Nar { size } => State::NarHead(size),
                    awaited => {
                        let scan = Scan::new(reply::shape(&awaited));
                        State::Reply(awaited, scan)
                    }
                };
                Ok(Step::Next)
            }
        }
    }

    fn on_reply(&mut self, buffer: &mut BytesMut, len: usize) -> Result<Step, ProtocolError> {
        let State::Reply(awaited, _) = std::mem::replace(&mut self.state, State::Message) else {
            return Ok(Step::Next);
        };
        let bytes = buffer.get(..len).unwrap_or_default();
        let result = reply::decode(awaited, bytes, self.version, &self.store_dir);
        buffer.advance(len);
        match result {
            Err(ReplyError::Protocol(error)) => Err(error),
            result => Ok(Step::Event(Event::Reply(result))),
        }
    }

    /// Waits until it is clear that a NAR comes, not an error frame in its place.
    fn on_nar_head(&mut self, size: u64, buffer: &mut BytesMut) -> Step {
        for error_at in [0, NAR_MAGIC_BYTES] {
            let rest = buffer.get(error_at..).unwrap_or_default();
            match Reader(rest).number() {
                Err(_) => return Step::NeedMore,
                Ok(message::ERROR) => {
                    buffer.advance(error_at + 8);
                    let scan = Scan::new(message::error_shape(self.version));
                    self.state = State::NarError(Begun::No, scan);
                    return Step::Next;
                }
                Ok(_) => {}
            }
        }
        self.state = State::Nar(size, Box::new(NarParser::with_size_max(size)));
        Step::Event(Event::NarStart)
    }

    fn on_nar(&mut self, buffer: &mut BytesMut) -> Result<Step, ProtocolError> {
        let State::Nar(promised, parser) = &mut self.state else {
            return Ok(Step::Next);
        };
        let promised = *promised;
        let before = parser.offset();
        let chunk = buffer.get(..buffer.len().min(CHUNK_BYTES_MAX));
        match parser.push(chunk.unwrap_or_default()) {
            Ok(progress) if progress.consumed > 0 => {
                let chunk = buffer.split_to(progress.consumed).freeze();
                Ok(Step::Event(Event::NarChunk(chunk)))
            }
            Ok(progress) if !progress.ended => Ok(Step::NeedMore),
            Ok(_) if before != promised => Err(ProtocolError::NarSize {
                promised,
                actual: before,
            }),
            Ok(_) => {
                self.state = State::Message;
                Ok(Step::Event(Event::NarEnd))
            }
            Err(NarError::Length { offset, length }) if length == message::ERROR => {
                // The word is refused in the chunk that completes it.
                let behind = usize::try_from(offset + 8 - before).unwrap_or(0);
                buffer.advance(behind.min(buffer.len()));
                let scan = Scan::new(message::error_shape(self.version));
                self.state = State::NarError(Begun::Yes, scan);
                Ok(Step::Next)
            }
            Err(error) => Err(ProtocolError::Nar { promised, error }),
        }
    }
}

impl Listed {
    /// Takes complete paths from the front of `buffer`, a bounded number at a time.
    fn take(
        &mut self,
        left: &mut u64,
        buffer: &mut BytesMut,
        store_dir: &StoreDir,
    ) -> Result<Vec<StorePath>, ProtocolError> {
        let mut paths = Vec::new();
        while *left > 0 && paths.len() < PATHS_AT_ONCE {
            let Some(len) = Scan::new(&[Field::Text]).resume(buffer)? else {
                break;
            };
            match reply::path(Reader(buffer).text()?, store_dir) {
                Ok(path) => paths.push(path),
                Err(error @ ReplyError::StoreDir(_)) => {
                    self.error.get_or_insert(error);
                }
                Err(_) => self.unreadable += 1,
            }
            buffer.advance(len);
            *left -= 1;
        }
        Ok(paths)
    }
}

/// Bytes of `nix-archive-1` as a text.
const NAR_MAGIC_BYTES: usize = 24;

const CHUNK_BYTES_MAX: usize = 256 << 10;

const PATHS_AT_ONCE: usize = 4096;

/// Far more than any store holds, so that a count is not without a bound.
const PATHS_MAX: u64 = 1 << 32;

#[cfg(test)]
mod tests;
