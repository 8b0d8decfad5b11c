//! Small NARs in memory while their clients take them: a client that stops gives its memory up when
//! others want it.
//!
//! A small NAR is read and checked whole before its first byte is given, so it takes memory of which
//! there is only so much. A client gets it in pieces that are copied out. When somebody waits for room,
//! what nobody has taken a piece of for long is dropped; should its client read on, the NAR is read and
//! checked anew, out of the cache where it is kept, and goes on at the same byte. So neither a cut nor a
//! file is needed, and a client that stops holds what its socket holds.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::stream::{self, BoxStream};
use futures_util::{StreamExt as _, TryStreamExt as _};
use sha2::{Digest as _, Sha256};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::debug;

use crate::cache::nar_name::{FileHash, NarName};
use crate::upstream;

use super::kept::{KeptNar, read_file};
use super::nar_url::NarUrl;
use super::now;
use super::shared::Shared;
use super::source::Source;
use super::transfer::{self, Error, NarBody};

/// The memory for small NARs, and who has it.
pub(super) struct Lending {
    /// KiB that such NARs take together.
    room: Arc<Semaphore>,
    kib_max: u32,
    // Taken before any loan's own lock; neither is held over an await.
    loans: Mutex<Vec<Weak<Loan>>>,
}

/// A small NAR on its way to one client.
struct Loan {
    state: Mutex<State>,
}

enum State {
    /// In memory.
    Here {
        bytes: Bytes,
        _room: OwnedSemaphorePermit,
        /// When a piece was taken last.
        taken: Instant,
    },
    /// Made room for others; the same bytes have this SHA-256.
    Gone([u8; 32]),
}

impl Lending {
    /// Has memory of so many KiB.
    pub(super) fn new(kib_max: u32) -> Self {
        Self {
            room: Arc::new(Semaphore::new(kib_max as usize)),
            kib_max,
            loans: Mutex::default(),
        }
    }

    /// Waits for room for a NAR; meanwhile clients that stopped make some.
    ///
    /// Dropped, nothing is lost.
    pub(super) async fn room(&self, nar_size: u64) -> Option<OwnedSemaphorePermit> {
        let kib = u32::try_from(nar_size.div_ceil(1024)).unwrap_or(u32::MAX);
        let kib = kib.clamp(1, self.kib_max);
        let mut acquired = std::pin::pin!(Arc::clone(&self.room).acquire_many_owned(kib));
        loop {
            tokio::select! {
                biased;
                permit = &mut acquired => return permit.ok(),
                () = tokio::time::sleep(PAUSE) => self.make_room(kib).await,
            }
        }
    }

    /// Drops what was idle for longest until there is so much more room, if there is so much.
    async fn make_room(&self, kib: u32) {
        let mut dropped = 0;
        for loan in self.idle() {
            if dropped >= kib as usize {
                return;
            }
            dropped += loan.give_up().await.div_ceil(1024);
        }
    }

    /// Those that nobody has taken a piece of for long, the longest first.
    fn idle(&self) -> Vec<Arc<Loan>> {
        let now = now();
        let mut loans = lock(&self.loans);
        loans.retain(|loan| loan.strong_count() > 0);
        let living = loans.iter().filter_map(Weak::upgrade);
        let mut idle: Vec<_> = living
            .filter_map(|loan| Some((loan.idle_since(now)?, loan)))
            .collect();
        drop(loans);
        idle.sort_unstable_by_key(|(since, _)| *since);
        idle.into_iter().map(|(_, loan)| loan).collect()
    }

    /// Gives a small NAR to a client; what one piece holds all of takes no room any more.
    pub(super) fn lend(
        shared: &Arc<Shared>,
        url: &NarUrl,
        bytes: Bytes,
        room: OwnedSemaphorePermit,
    ) -> NarBody {
        if bytes.len() <= PIECE_BYTES {
            return NarBody::Whole(bytes);
        }
        let length = bytes.len();
        let loan = Arc::new(Loan {
            state: Mutex::new(State::here(bytes, room)),
        });
        let mut loans = lock(&shared.lending.loans);
        if loans.len() >= SWEEP_MIN && loans.len().is_power_of_two() {
            loans.retain(|loan| loan.strong_count() > 0);
        }
        loans.push(Arc::downgrade(&loan));
        drop(loans);
        let lent = Lent {
            shared: Arc::clone(shared),
            url: *url,
            loan,
            length,
            offset: 0,
        };
        NarBody::Checked {
            stream: lent.into_stream(),
            length: length as u64,
        }
    }
}

impl State {
    fn here(bytes: Bytes, room: OwnedSemaphorePermit) -> Self {
        Self::Here {
            bytes,
            _room: room,
            taken: now(),
        }
    }
}

impl Loan {
    fn idle_since(&self, now: Instant) -> Option<Instant> {
        match &*lock(&self.state) {
            State::Here { taken, .. } if now.saturating_duration_since(*taken) >= IDLE_MIN => {
                Some(*taken)
            }
            _ => None,
        }
    }

    /// Drops the bytes, unless the client has come back meanwhile; returns how many.
    async fn give_up(&self) -> usize {
        let (bytes, before) = match &*lock(&self.state) {
            State::Here { bytes, taken, .. } => (bytes.clone(), *taken),
            State::Gone(_) => return 0,
        };
        let length = bytes.len();
        let Some(hash) = sha256(bytes).await else {
            return 0;
        };
        let mut state = lock(&self.state);
        match &*state {
            State::Here { taken, .. } if *taken == before => {
                *state = State::Gone(hash);
                debug!(length, "a client reads nothing, its small NAR makes room");
                length
            }
            _ => 0,
        }
    }

    /// Copies the next piece out; `Err` is the hash of what is not here any more.
    fn piece(&self, offset: usize) -> Result<Bytes, [u8; 32]> {
        match &mut *lock(&self.state) {
            State::Here { bytes, taken, .. } => {
                *taken = now();
                let end = bytes.len().min(offset + PIECE_BYTES);
                let piece = bytes.get(offset..end).unwrap_or_default();
                // A slice would hold all of it for as long as hyper has it.
                Ok(Bytes::copy_from_slice(piece))
            }
            State::Gone(hash) => Err(*hash),
        }
    }
}

/// One client and its small NAR; dropped, the memory is free.
struct Lent {
    shared: Arc<Shared>,
    url: NarUrl,
    loan: Arc<Loan>,
    length: usize,
    offset: usize,
}

impl Lent {
    fn into_stream(self) -> BoxStream<'static, Result<Bytes, Error>> {
        stream::unfold(Some(self), |lent| async move {
            let mut lent = lent.filter(|lent| lent.offset < lent.length)?;
            match lent.next().await {
                Ok(piece) => {
                    lent.offset += piece.len();
                    Some((Ok(piece), Some(lent)))
                }
                Err(error) => Some((Err(error), None)),
            }
        })
        .boxed()
    }

    async fn next(&self) -> Result<Bytes, Error> {
        loop {
            let hash = match self.loan.piece(self.offset) {
                Ok(piece) => return Ok(piece),
                Err(hash) => hash,
            };
            let again = self.read_again(hash).await;
            let (bytes, room) = again.ok_or_else(|| Error::NoHolderLeft {
                offset: self.offset as u64,
                cause: upstream::Error::Down("nobody has it any more".into()),
            })?;
            if bytes.len() != self.length || sha256(bytes.clone()).await != Some(hash) {
                return Err(Error::Encoder("it came out otherwise this time".to_owned()));
            }
            *lock(&self.loan.state) = State::here(bytes, room);
        }
    }

    async fn read_again(&self, hash: [u8; 32]) -> Option<(Bytes, OwnedSemaphorePermit)> {
        if let Some(file) = self.read_kept(hash).await {
            return Some(file);
        }
        let source = Source::locate(&self.shared, &self.url).await?;
        let room = self.shared.lending.room(source.info.nar_size).await?;
        let bytes = transfer::read_whole(&self.shared, source, &self.url).await?;
        Some((bytes, room))
    }

    /// Reads the very same bytes from the cache, where they are kept as they are.
    ///
    /// Made anew they would come out otherwise if they were an upstream's own.
    async fn read_kept(&self, hash: [u8; 32]) -> Option<(Bytes, OwnedSemaphorePermit)> {
        let backend = &self.shared.kept.as_ref()?.backend;
        let name = NarName {
            path_hash: self.url.path_hash,
            nar_hash: self.url.nar_hash,
            file_hash: FileHash(hash),
        };
        let nar = KeptNar::open(backend, name)?.nar;
        let room = self.shared.lending.room(nar.size_bytes).await?;
        let chunks: Vec<_> = read_file(nar.file, nar.size_bytes)
            .try_collect()
            .await
            .ok()?;
        Some((chunks.concat().into(), room))
    }
}

async fn sha256(bytes: Bytes) -> Option<[u8; 32]> {
    let hashing = tokio::task::spawn_blocking(move || Sha256::digest(&bytes).into());
    hashing.await.ok()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is copied at a time, and what a client may hold without room: as much as its socket does.
const PIECE_BYTES: usize = 128 << 10;
/// A client that takes anything takes a piece in this time; one that was wrongly taken to have stopped
/// costs another reading.
const IDLE_MIN: Duration = Duration::from_secs(5);
/// How long somebody waits before clients that stopped make room, and between two looks.
const PAUSE: Duration = Duration::from_millis(250);
/// From so many on, those whose clients left are swept out now and then.
const SWEEP_MIN: usize = 1024;
