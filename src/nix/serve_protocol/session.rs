//! An open session: arriving bytes in, events out.
//!
//! Answers come in the order of the questions. A list of path infos has no count, an empty path ends
//! it; what is not there is left out. It keeps no bytes itself: what an event did not take stays in
//! the caller's buffer. Work is linear in the bytes, however they are cut.

use std::collections::VecDeque;

use bytes::{Buf as _, BytesMut};

use super::request::{Awaited, Expected};
use crate::nix::content_address::ContentAddress;
use crate::nix::hash::NarHash;
use crate::nix::path_info::PathInfo;
use crate::nix::store_path::{StoreDir, StorePath};
use crate::nix::worker_protocol::ProtocolError;
use crate::nix::worker_protocol::reply::{self, ReplyError};
use crate::nix::worker_protocol::shape::{Field, Scan};
use crate::nix::worker_protocol::wire::Reader;

/// The client's side of an open session.
#[derive(Debug)]
pub struct Session {
    store_dir: StoreDir,
    questions: VecDeque<Awaited>,
    state: State,
}

/// Something that arrived; it belongs to the question at the front.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The paths that were asked for, in no order that means anything; the question is answered. An
    /// error is about a name among them, and the session goes on.
    Paths(Result<Vec<StorePath>, ReplyError>),
    /// What is known of one of the paths; an error is about this path alone.
    Info(Result<PathInfo, ReplyError>),
    /// There are no more path infos; the question is answered.
    InfosEnd,
}

#[derive(Debug)]
enum State {
    /// Before an answer.
    Answer,
    Paths(Scan),
    /// Before the path of an info, of which so many more may come.
    Name(usize, Scan),
    Info(usize, Result<StorePath, ReplyError>, Scan),
    Over,
}

impl Session {
    /// Begins after the handshake; the store's paths must lie in `store_dir`.
    pub fn new(store_dir: StoreDir) -> Self {
        Self {
            store_dir,
            questions: VecDeque::new(),
            state: State::Answer,
        }
    }

    /// Notes that a request was, or is about to be, written.
    pub fn expect(&mut self, expected: Expected) {
        self.questions.push_back(expected.0);
    }

    /// Takes the next event from `buffer`; `None`: it needs more bytes behind those that are left.
    ///
    /// An error ends the session and fails all that is pending.
    pub fn next(&mut self, buffer: &mut BytesMut) -> Result<Option<Event>, ProtocolError> {
        let event = self.step(buffer);
        if event.is_err() {
            self.state = State::Over;
        }
        event
    }

    fn step(&mut self, buffer: &mut BytesMut) -> Result<Option<Event>, ProtocolError> {
        loop {
            match &mut self.state {
                State::Answer => {
                    if buffer.is_empty() {
                        return Ok(None);
                    }
                    self.state = match self.questions.pop_front() {
                        None => return Err(ProtocolError::Unasked),
                        Some(Awaited::Paths) => State::Paths(Scan::new(&[Field::Texts])),
                        Some(Awaited::Infos(count)) => State::Name(count, Scan::new(NAME)),
                    };
                }
                State::Paths(scan) => {
                    let Some(len) = scan.resume(buffer)? else {
                        return Ok(None);
                    };
                    let mut reader = Reader(buffer.get(..len).unwrap_or_default());
                    let paths = reader.texts(|text| reply::path(text, &self.store_dir));
                    buffer.advance(len);
                    self.state = State::Answer;
                    return Ok(Some(Event::Paths(own(paths)?)));
                }
                State::Name(left, scan) => {
                    let Some(len) = scan.resume(buffer)? else {
                        return Ok(None);
                    };
                    let text = Reader(buffer.get(..len).unwrap_or_default()).text()?;
                    if text.is_empty() {
                        buffer.advance(len);
                        self.state = State::Answer;
                        return Ok(Some(Event::InfosEnd));
                    }
                    let left = left.checked_sub(1).ok_or(ProtocolError::Unasked)?;
                    let path = own(reply::path(text, &self.store_dir))?;
                    buffer.advance(len);
                    self.state = State::Info(left, path, Scan::new(INFO));
                }
                State::Info(left, path, scan) => {
                    let Some(len) = scan.resume(buffer)? else {
                        return Ok(None);
                    };
                    let bytes = buffer.get(..len).unwrap_or_default();
                    let info = match path {
                        Ok(path) => own(path_info(path.clone(), bytes, &self.store_dir))?,
                        Err(error) => Err(error.clone()),
                    };
                    let left = *left;
                    buffer.advance(len);
                    self.state = State::Name(left, Scan::new(NAME));
                    return Ok(Some(Event::Info(info)));
                }
                State::Over => return Err(ProtocolError::Over),
            }
        }
    }
}

/// Takes what breaks the protocol out of what is wrong with one answer.
fn own<T>(result: Result<T, ReplyError>) -> Result<Result<T, ReplyError>, ProtocolError> {
    match result {
        Err(ReplyError::Protocol(error)) => Err(error),
        result => Ok(result),
    }
}

/// The fields behind a path, from protocol 2.4 on; the first size is that of a download, once.
fn path_info(path: StorePath, bytes: &[u8], store_dir: &StoreDir) -> Result<PathInfo, ReplyError> {
    let mut reader = Reader(bytes);
    let deriver = reply::optional_path(reader.text()?, store_dir)?;
    let references = reader.texts(|text| reply::path(text, store_dir))?;
    let _download_size = reader.number()?;
    let nar_size = reader.number()?;
    let nar_hash = NarHash::parse(reply::utf8(reader.text()?)?).map_err(reply::malformed)?;
    let ca = ContentAddress::parse(reply::utf8(reader.text()?)?);
    let mut info = PathInfo {
        path,
        nar_hash,
        nar_size,
        references,
        deriver,
        signatures: reply::signatures(&mut reader)?,
        ca,
    };
    info.normalize();
    Ok(info)
}

const NAME: &[Field] = &[Field::Text];

const INFO: &[Field] = &[
    Field::Text,
    Field::Texts,
    Field::Number,
    Field::Number,
    Field::Text,
    Field::Text,
    Field::Texts,
];

#[cfg(test)]
mod tests;
