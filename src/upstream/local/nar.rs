//! A store path's NAR as a stream that is packed as it is read.
//!
//! No thread waits for a slow reader: a blocking job packs about 1 MiB, gives the walk back, and ends.
//! The next begins when the first chunk of the last is taken, so reading goes ahead of sending.
//!
//! ```text
//! packer -> size -> hash (first time) or facts (later) -> chunks of 256 KiB
//! ```
//!
//! The first time the last chunk is held back until the hash is known to be right. Later each file is known by
//! its facts before it is read, so each chunk is right when it comes. Where the facts of the first MiB are not
//! those of before, all is hashed as the first time; where those of a later one are not, the NAR ends early.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{Stream, StreamExt as _};
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{Instant, Sleep, sleep};

use super::buffers::Buffers;
use super::pack::{PackError, Packer};
use super::proofs::{Claim, Found, Proofs};
use crate::codec::beginnings::{Beginnings, NotingDigest};
use crate::upstream::{Error, OpenedNar};

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
    Hash(NotingDigest, Claim, Proofs),
    /// By the facts under which they were right before.
    Facts(Found, Claim, Proofs),
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
    /// The next file is not as it was when the path was hashed.
    Differs,
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
    proven: Option<Beginnings>,
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
            let begin = |check: Check| {
                let before = check.found().map(|found| found.facts.clone());
                let (packer, begun) = Packer::open(&files, nar_size, buffers.clone(), before)?;
                let proven = check.found().map(|found| found.beginnings.clone());
                let work = Work {
                    packer,
                    begun: Some(begun),
                    check,
                    nar_size,
                };
                Ok((proven, work.batch()))
            };
            let hashing = check.hashing();
            match (begin(check), hashing) {
                (Err(PackError::Differs) | Ok((_, (_, Left::Differs))), Some(hashing)) => {
                    begin(hashing)
                }
                (begun, _) => begun,
            }
        });
        let first = tokio::time::timeout(silence_max, first).await;
        let (proven, batch) = match first {
            Ok(Ok(Ok(begun))) => begun,
            Ok(Ok(Err(error))) => return Err(NoNar::of(error)),
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
            proven,
        };
        nar.receive(batch);
        match nar.failure.take() {
            Some(error) if nar.ready.is_empty() => Err(NoNar::Failed(error)),
            failure => {
                nar.failure = failure;
                Ok(nar)
            }
        }
    }

    /// Says what the stream is worth to whoever reads it; `checked`: it was asked for as such.
    pub(super) fn into_opened(self, checked: bool) -> OpenedNar {
        match (&self.proven, checked) {
            (Some(beginnings), _) => OpenedNar::Proven(beginnings.clone(), self.boxed()),
            (None, true) => OpenedNar::Checked(self.boxed()),
            (None, false) => OpenedNar::Unchecked(self.boxed()),
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
            Left::Differs => {
                self.permit = None;
                self.failure = Some(wrong("were changed since they were hashed"));
            }
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
                Err(PackError::Differs) => {
                    if let Check::Facts(_, claim, proofs) = &self.check {
                        proofs.forget(claim);
                    }
                    return (chunks, Left::Differs);
                }
                Err(error) => return (chunks, Left::Failed(unpacked(error))),
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
        let check = std::mem::replace(&mut self.check, Check::Size);
        if let Check::Hash(digest, claim, proofs) = check {
            let (hash, beginnings) = digest.finish();
            if hash != claim.nar_hash {
                return Err(wrong("have another hash than was registered"));
            }
            if let Some(facts) = self.packer.facts() {
                proofs.note(&claim, Found { facts, beginnings });
            }
        }
        Ok(())
    }
}

impl Check {
    fn found(&self) -> Option<&Found> {
        match self {
            Self::Facts(found, ..) => Some(found),
            Self::Size | Self::Hash(..) => None,
        }
    }

    /// Returns the check to fall back on where the files are not as they were.
    fn hashing(&self) -> Option<Self> {
        match self {
            Self::Facts(_, claim, proofs) => {
                let digest = NotingDigest::default();
                Some(Self::Hash(digest, claim.clone(), proofs.clone()))
            }
            Self::Size | Self::Hash(..) => None,
        }
    }
}

impl NoNar {
    fn of(error: PackError) -> Self {
        match error {
            PackError::Unreadable(error) if error.kind() == std::io::ErrorKind::NotFound => {
                Self::Gone
            }
            error => Self::Failed(unpacked(error)),
        }
    }
}

fn unpacked(error: PackError) -> Error {
    match error {
        PackError::Unreadable(error) => unreadable(&error),
        PackError::Differs => wrong("were changed since they were hashed"),
        PackError::Written => Error::Written("a file of its store".into()),
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
