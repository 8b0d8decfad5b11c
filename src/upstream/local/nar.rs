//! A store path's NAR as a stream that is packed as it is read.
//!
//! No thread waits for a slow reader: a blocking job packs about 1 MiB, gives the walk back, and ends.
//! The next begins when the first chunk of the last is taken, so reading goes ahead of sending.
//!
//! ```text
//! packer -> size -> hash (first time) or facts (later) -> chunks of 256 KiB
//! ```

use std::collections::VecDeque;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::Stream;
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{Instant, Sleep, sleep};

use super::buffers::Buffers;
use super::pack::{Facts, Packer};
use super::proofs::{Claim, Proofs};
use crate::codec::digest::NarDigest;
use crate::upstream::Error;

/// What is to be packed.
pub(super) struct Order {
    pub(super) files: PathBuf,
    pub(super) nar_size: u64,
    pub(super) check: Check,
    pub(super) buffers: Buffers,
    /// Given back when the last byte was packed or the stream is dropped.
    pub(super) permit: OwnedSemaphorePermit,
    /// A job that takes longer is given up.
    pub(super) silence_max: Duration,
}

/// How it is known that the bytes are the promised ones.
pub(super) enum Check {
    /// By size alone: whoever reads hashes.
    Size,
    /// By their hash, which is then noted.
    Hash(NarDigest, Claim, Proofs),
    /// By the facts under which they were right before.
    Facts(Facts, Claim, Proofs),
}

/// What a job works on.
struct Work {
    packer: Packer,
    begun: Option<Vec<u8>>,
    check: Check,
    nar_size: u64,
}

/// What a job gives: chunks, and the work that is left or why there is none.
type Batch = (Vec<Bytes>, Left);

enum Left {
    Work(Box<Work>),
    Nothing,
    Failed(Error),
}

/// The stream. Dropped, the job that runs ends after its batch, and nothing is held any more.
pub(super) struct PackedNar {
    ready: VecDeque<Bytes>,
    job: Option<JoinHandle<Batch>>,
    failure: Option<Error>,
    permit: Option<OwnedSemaphorePermit>,
    silence_max: Duration,
    silence: Pin<Box<Sleep>>,
}

/// Why no stream begins.
pub(super) enum NoNar {
    /// There are no such files.
    Gone,
    /// They cannot be read.
    Failed(Error),
}

impl PackedNar {
    /// Packs the first batch, so that what cannot be read is known before the first byte.
    ///
    /// Dropped, the batch is packed and thrown away.
    pub(super) async fn open(order: Order) -> Result<Self, NoNar> {
        let Order {
            files,
            nar_size,
            check,
            buffers,
            permit,
            silence_max,
        } = order;
        let first = spawn_blocking(move || {
            let (packer, begun) = Packer::open(&files, nar_size, buffers)?;
            let begun = Some(begun);
            Ok(Work {
                packer,
                begun,
                check,
                nar_size,
            }
            .batch())
        });
        let first = tokio::time::timeout(silence_max, first).await;
        let (chunks, left) = match first {
            Ok(Ok(Ok(batch))) => batch,
            Ok(Ok(Err(error))) => return Err(NoNar::of(&error)),
            Ok(Err(_)) => return Err(NoNar::Failed(Error::Down("it is being closed".into()))),
            Err(_) => return Err(NoNar::Failed(silent(silence_max))),
        };
        let mut nar = Self {
            ready: VecDeque::new(),
            job: None,
            failure: None,
            permit: Some(permit),
            silence_max,
            silence: Box::pin(sleep(silence_max)),
        };
        nar.receive((chunks, left));
        match nar.failure.take() {
            Some(error) if nar.ready.is_empty() => Err(NoNar::Failed(error)),
            failure => {
                nar.failure = failure;
                Ok(nar)
            }
        }
    }

    /// Takes a batch in and has the next one packed.
    fn receive(&mut self, (chunks, left): Batch) {
        self.ready.extend(chunks);
        match left {
            Left::Work(work) => {
                self.job = Some(spawn_blocking(move || work.batch()));
                let deadline = Instant::now() + self.silence_max;
                self.silence.as_mut().reset(deadline);
            }
            Left::Nothing => self.permit = None,
            Left::Failed(error) => {
                self.permit = None;
                self.failure = Some(error);
            }
        }
    }
}

impl Stream for PackedNar {
    type Item = Result<Bytes, Error>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if this.ready.is_empty()
            && let Some(job) = &mut this.job
        {
            let batch = match Pin::new(job).poll(context) {
                Poll::Ready(batch) => batch,
                Poll::Pending => {
                    ready!(this.silence.as_mut().poll(context));
                    this.job = None;
                    this.permit = None;
                    return Poll::Ready(Some(Err(silent(this.silence_max))));
                }
            };
            this.job = None;
            let stopped = |_| {
                (
                    vec![],
                    Left::Failed(Error::Lost("it is being closed".into())),
                )
            };
            this.receive(batch.unwrap_or_else(stopped));
        }
        match this.ready.pop_front() {
            Some(chunk) => Poll::Ready(Some(Ok(chunk))),
            None => Poll::Ready(this.failure.take().map(Err)),
        }
    }
}

impl Work {
    /// Packs chunks until there are enough for one job.
    fn batch(mut self) -> Batch {
        let mut chunks = Vec::with_capacity(CHUNKS_PER_JOB);
        while chunks.len() < CHUNKS_PER_JOB {
            let chunk = match self.packer.fill(self.begun.take()) {
                Ok(chunk) => chunk,
                Err(error) => return (chunks, Left::Failed(unreadable(&error))),
            };
            match self.accept(&chunk) {
                Ok(()) => chunks.push(chunk),
                // The chunk is held back for ever, so the reader sees a cut.
                Err(error) => return (chunks, Left::Failed(error)),
            }
            if self.packer.is_done() {
                return (chunks, Left::Nothing);
            }
        }
        (chunks, Left::Work(Box::new(self)))
    }

    /// Counts a chunk, and judges the whole with the last one.
    fn accept(&mut self, chunk: &Bytes) -> Result<(), Error> {
        if let Check::Hash(digest, ..) = &mut self.check {
            digest.update(chunk);
        }
        let (done, offset) = (self.packer.is_done(), self.packer.offset());
        if offset > self.nar_size || (done && offset < self.nar_size) {
            return Err(wrong("have another size than was registered"));
        }
        if !done {
            return Ok(());
        }
        let facts = self.packer.facts();
        match &self.check {
            Check::Size => Ok(()),
            Check::Hash(digest, claim, proofs) => {
                if digest.clone().finish() != claim.nar_hash {
                    return Err(wrong("have another hash than was registered"));
                }
                proofs.note(claim, facts);
                Ok(())
            }
            Check::Facts(before, claim, proofs) => {
                if *before != facts {
                    proofs.forget(claim);
                    return Err(wrong("were changed since they were hashed"));
                }
                Ok(())
            }
        }
    }
}

impl NoNar {
    fn of(error: &std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::NotFound => Self::Gone,
            _ => Self::Failed(unreadable(error)),
        }
    }
}

fn wrong(what: &str) -> Error {
    Error::Protocol(format!("its files {what}").into())
}

fn unreadable(error: &std::io::Error) -> Error {
    Error::Lost(format!("its files cannot be read: {error}").into())
}

fn silent(after: Duration) -> Error {
    let question = "reading the store's files";
    Error::TimedOut { question, after }
}

/// 1 MiB: a job costs some 10 µs to hand over, and packing so much some 200. Two such batches are the
/// memory of one transfer.
const CHUNKS_PER_JOB: usize = 4;
