//! Questions on their way: those that wait, and the window of those that are under way.
//!
//! Callers take turns: of a caller with many questions some are written, then the next caller's.
//! What is written moves on to the reader, which gives the window back as answers come.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use tokio::sync::{Notify, oneshot, watch};
use tokio::time::Instant;

use super::super::Error;
use super::many::Many;
use super::{Load, body};
use crate::nix::store_path::StorePath;
use crate::nix::worker_protocol::reply::Reply;
use crate::nix::worker_protocol::request::{Encoder, Expected, Request};

/// The questions of one connection.
#[derive(Debug)]
pub(super) struct Questions {
    encoder: Encoder,
    questions_max: usize,
    question_bytes_max: usize,
    state: Mutex<State>,
    /// Wakes the writer.
    work: Notify,
    broken: watch::Sender<Option<Error>>,
    /// NAR bytes that were asked for and did not arrive.
    nar_bytes: AtomicU64,
}

/// Where an answer goes.
#[derive(Debug)]
pub(super) enum Slot {
    /// To one caller.
    One(oneshot::Sender<Answer>),
    /// To a caller of many, after the answers before it.
    Many(Arc<Batch>),
    /// A NAR.
    Nar(NarSlot),
    /// A list of all paths.
    AllPaths(body::Sender<Vec<StorePath>>),
}

/// Where a NAR goes.
#[derive(Debug)]
pub(super) struct NarSlot {
    /// Told whether there is a NAR, when it begins.
    pub(super) opened: Option<oneshot::Sender<Result<bool, Error>>>,
    pub(super) body: body::Sender<Bytes>,
    /// Bytes that did not arrive yet.
    pub(super) left: u64,
}

/// The answers to many questions, as far as they came.
#[derive(Debug)]
pub(super) struct Batch {
    count: usize,
    answers: Mutex<Vec<Answer>>,
    sender: Mutex<Option<oneshot::Sender<Vec<Answer>>>>,
}

/// A question that was written.
#[derive(Debug)]
pub(super) struct Sent {
    pub(super) expected: Expected,
    pub(super) slot: Slot,
    pub(super) name: &'static str,
    pub(super) bytes: usize,
}

pub(super) type Answer = Result<Reply, Error>;

#[derive(Debug)]
struct State {
    /// Callers in the order of their turn.
    waiting: VecDeque<Waiting>,
    /// Written, not taken over by the reader yet.
    sent: Vec<Sent>,
    questions_waiting: usize,
    questions_out: usize,
    bytes_out: usize,
    /// Whether something waits until the window is open again.
    full: bool,
    /// Since when something is under way without a pause.
    asking_since: Instant,
    last_heard: Instant,
    /// When so many callers wait, those that left are swept out.
    sweep_at: usize,
}

#[derive(Debug)]
enum Waiting {
    One(Request, Slot),
    Many(VecDeque<Request>, Arc<Batch>),
}

impl Questions {
    pub(super) fn new(encoder: Encoder, questions_max: usize, question_bytes_max: usize) -> Self {
        let now = Instant::now();
        Self {
            encoder,
            questions_max,
            question_bytes_max,
            state: Mutex::new(State {
                waiting: VecDeque::new(),
                sent: Vec::new(),
                questions_waiting: 0,
                questions_out: 0,
                bytes_out: 0,
                full: false,
                asking_since: now,
                last_heard: now,
                sweep_at: SWEEP_AT_LEAST,
            }),
            work: Notify::new(),
            broken: watch::Sender::new(None),
            nar_bytes: AtomicU64::new(0),
        }
    }

    /// Queues a question.
    pub(super) fn push(&self, request: Request, slot: Slot) -> Result<(), Error> {
        self.enqueue(Waiting::One(request, slot))
    }

    /// Queues a question if no other waits or is under way; tells whether it did.
    pub(super) fn push_when_idle(&self, request: Request, slot: Slot) -> Result<bool, Error> {
        let idle = |state: &State| state.questions_waiting + state.questions_out == 0;
        self.enqueue_if(idle, Waiting::One(request, slot))
    }

    /// Queues many questions of one caller.
    pub(super) fn push_many(&self, requests: Vec<Request>) -> Result<Many, Error> {
        let (sender, answers) = oneshot::channel();
        let batch = Arc::new(Batch {
            count: requests.len(),
            answers: Mutex::new(Vec::with_capacity(requests.len())),
            sender: Mutex::new(Some(sender)),
        });
        if requests.is_empty() {
            batch.send();
        } else {
            self.enqueue(Waiting::Many(requests.into(), batch.clone()))?;
        }
        Ok(Many::new(batch, answers))
    }

    fn enqueue(&self, waiting: Waiting) -> Result<(), Error> {
        self.enqueue_if(|_| true, waiting).map(drop)
    }

    fn enqueue_if(
        &self,
        may: impl FnOnce(&State) -> bool,
        waiting: Waiting,
    ) -> Result<bool, Error> {
        let mut state = self.lock();
        // Under the lock, as `fail` sets it first and then empties the queue.
        if let Some(error) = self.broken() {
            return Err(error);
        }
        if !may(&state) {
            return Ok(false);
        }
        self.nar_bytes
            .fetch_add(waiting.nar_bytes(), Ordering::Relaxed);
        state.questions_waiting += waiting.len();
        state.waiting.push_back(waiting);
        if state.waiting.len() >= state.sweep_at {
            self.sweep(&mut state);
        }
        drop(state);
        self.work.notify_one();
        Ok(true)
    }

    /// Drops the questions of callers that left.
    fn sweep(&self, state: &mut State) {
        let mut gone = 0;
        state.waiting.retain(|waiting| {
            let abandoned = waiting.is_abandoned();
            if abandoned {
                gone += waiting.len();
                self.nar_bytes
                    .fetch_sub(waiting.nar_bytes(), Ordering::Relaxed);
            }
            !abandoned
        });
        state.questions_waiting -= gone;
        state.sweep_at = SWEEP_AT_LEAST.max(state.waiting.len() * 2);
    }

    /// Waits until there may be something to write.
    pub(super) async fn wait_for_work(&self) {
        self.work.notified().await;
    }

    /// Appends the bytes of all questions that the window has room for.
    pub(super) fn take_work(&self, out: &mut BytesMut) {
        let mut state = self.lock();
        if state.full && !self.is_open(&state) {
            return;
        }
        while state.questions_out < self.questions_max
            && (state.bytes_out < self.question_bytes_max || state.questions_out == 0)
        {
            let Some(waiting) = state.waiting.pop_front() else {
                break;
            };
            if waiting.is_abandoned() {
                state.questions_waiting -= waiting.len();
                self.nar_bytes
                    .fetch_sub(waiting.nar_bytes(), Ordering::Relaxed);
                continue;
            }
            match waiting {
                Waiting::One(request, slot) => self.send(&mut state, request, slot, out),
                Waiting::Many(mut requests, batch) => {
                    let room = self.questions_max - state.questions_out;
                    let turn = requests.len().min(room).min(TURN_QUESTIONS_MAX);
                    for request in requests.drain(..turn) {
                        self.send(&mut state, request, Slot::Many(batch.clone()), out);
                    }
                    if !requests.is_empty() {
                        state.waiting.push_back(Waiting::Many(requests, batch));
                    }
                }
            }
        }
        state.full = !state.waiting.is_empty();
    }

    /// Tells whether a window that was full is filled again: at three quarters.
    ///
    /// Filled at each answer, 10,000 questions of one caller took 6,516 writes; so it is 128.
    fn is_open(&self, state: &State) -> bool {
        state.questions_out <= self.questions_max / 4 * 3
            && state.bytes_out <= self.question_bytes_max / 4 * 3
    }

    fn send(&self, state: &mut State, request: Request, slot: Slot, out: &mut BytesMut) {
        state.questions_waiting -= 1;
        let (name, before) = (request.name(), out.len());
        let expected = match self.encoder.encode(request, out) {
            Ok(expected) => expected,
            Err(error) => {
                let error = Error::Unsupported(error.to_string().into());
                return slot.fail(&error);
            }
        };
        if state.questions_out == 0 {
            state.asking_since = Instant::now();
        }
        let bytes = out.len() - before;
        state.questions_out += 1;
        state.bytes_out += bytes;
        state.sent.push(Sent {
            expected,
            slot,
            name,
            bytes,
        });
    }

    /// Hands over what was written since the last call.
    pub(super) fn take_sent(&self, into: &mut Vec<Sent>) {
        std::mem::swap(&mut self.lock().sent, into);
    }

    /// Gives the window of answered questions back.
    pub(super) fn give_back(&self, questions: usize, bytes: usize) {
        let mut state = self.lock();
        state.questions_out -= questions;
        state.bytes_out -= bytes;
        let work = !state.waiting.is_empty() && self.is_open(&state);
        drop(state);
        if work {
            self.work.notify_one();
        }
    }

    pub(super) fn heard(&self) {
        self.lock().last_heard = Instant::now();
    }

    pub(super) fn nar_arrived(&self, bytes: u64) {
        self.nar_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    pub(super) fn last_heard(&self) -> std::time::Instant {
        self.lock().last_heard.into_std()
    }

    /// Returns since when something is under way without a pause; `None`: nothing is.
    pub(super) fn asking_since(&self) -> Option<Instant> {
        let state = self.lock();
        (state.questions_out > 0).then_some(state.asking_since)
    }

    pub(super) fn load(&self) -> Load {
        let state = self.lock();
        Load {
            questions: state.questions_waiting + state.questions_out,
            nar_bytes: self.nar_bytes.load(Ordering::Relaxed),
        }
    }

    /// Refuses further questions and fails those that are not with the reader.
    pub(super) fn fail(&self, error: &Error) {
        self.broken.send_replace(Some(error.clone()));
        let (waiting, sent) = {
            let mut state = self.lock();
            state.questions_waiting = 0;
            state.questions_out = 0;
            self.nar_bytes.store(0, Ordering::Relaxed);
            (
                std::mem::take(&mut state.waiting),
                std::mem::take(&mut state.sent),
            )
        };
        for sent in sent {
            sent.slot.fail(error);
        }
        for waiting in waiting {
            match waiting {
                Waiting::One(_, slot) => slot.fail(error),
                Waiting::Many(requests, batch) => {
                    for _ in requests {
                        batch.answer(Err(error.clone()));
                    }
                }
            }
        }
    }

    pub(super) fn broken(&self) -> Option<Error> {
        self.broken.borrow().clone()
    }

    pub(super) async fn closed(&self) -> Error {
        let mut broken = self.broken.subscribe();
        let error = broken.wait_for(Option::is_some).await;
        let error = error.ok().and_then(|error| error.clone());
        error.unwrap_or_else(|| Error::Lost("the connection ended".into()))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    fn len(&self) -> usize {
        match self {
            Self::One(..) => 1,
            Self::Many(requests, _) => requests.len(),
        }
    }

    fn nar_bytes(&self) -> u64 {
        match self {
            Self::One(_, Slot::Nar(nar)) => nar.left,
            _ => 0,
        }
    }

    fn is_abandoned(&self) -> bool {
        match self {
            Self::One(_, Slot::One(sender)) => sender.is_closed(),
            Self::One(_, Slot::Many(batch)) | Self::Many(_, batch) => batch.is_abandoned(),
            Self::One(_, Slot::Nar(nar)) => nar.body.is_abandoned(),
            Self::One(_, Slot::AllPaths(body)) => body.is_abandoned(),
        }
    }
}

impl Slot {
    /// Gives the answer to who asked; a caller that left does not mind.
    pub(super) fn answer(self, answer: Answer) {
        match (self, answer) {
            (Self::One(sender), answer) => {
                let _ = sender.send(answer);
            }
            (Self::Many(batch), answer) => batch.answer(answer),
            (Self::AllPaths(body), Ok(_)) => body.end(Ok(())),
            (Self::Nar(nar), Ok(_)) => nar.body.end(Ok(())),
            (slot, Err(error)) => slot.fail(&error),
        }
    }

    /// Fails the question.
    pub(super) fn fail(self, error: &Error) {
        match self {
            Self::One(sender) => {
                let _ = sender.send(Err(error.clone()));
            }
            Self::Many(batch) => batch.answer(Err(error.clone())),
            Self::AllPaths(body) => body.end(Err(error.clone())),
            Self::Nar(nar) => match nar.opened {
                Some(opened) => {
                    let _ = opened.send(Err(error.clone()));
                }
                None => nar.body.end(Err(error.clone())),
            },
        }
    }
}

impl Batch {
    pub(super) fn count(&self) -> usize {
        self.count
    }

    pub(super) fn answered(&self) -> usize {
        self.answers().len()
    }

    /// Takes the answers so far; those to come go nowhere, and what was not written is not asked.
    pub(super) fn take(&self) -> Vec<Answer> {
        self.sender().take();
        std::mem::take(&mut *self.answers())
    }

    fn answer(&self, answer: Answer) {
        let complete = {
            let mut answers = self.answers();
            answers.push(answer);
            answers.len() == self.count
        };
        if complete {
            self.send();
        }
    }

    fn send(&self) {
        let sender = self.sender().take();
        if let Some(sender) = sender {
            let _ = sender.send(std::mem::take(&mut *self.answers()));
        }
    }

    fn answers(&self) -> MutexGuard<'_, Vec<Answer>> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_abandoned(&self) -> bool {
        let sender = self.sender();
        sender.as_ref().is_none_or(oneshot::Sender::is_closed)
    }

    fn sender(&self) -> MutexGuard<'_, Option<oneshot::Sender<Vec<Answer>>>> {
        self.sender.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Questions of one caller that are written before it is the next one's turn.
const TURN_QUESTIONS_MAX: usize = 32;

const SWEEP_AT_LEAST: usize = 1024;
