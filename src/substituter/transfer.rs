//! A NAR request: who holds exactly these bytes, the next holder when one breaks, checked bytes.
//!
//! NARs of one hash are the same bytes everywhere, so a transfer goes on from the next holder at
//! the same byte. Small NARs are read and checked whole before the first byte is given out; of
//! larger ones the last chunk is held back until size and hash agree.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::BoxStream;
use futures_util::{StreamExt as _, stream};
use tokio::sync::OwnedSemaphorePermit;
use tracing::{debug, warn};

use crate::cache::memory::UpstreamId;
use crate::codec::compression::Encoding;
use crate::codec::compression::{EncodeError, EncoderOptions};
use crate::codec::digest::{self, DigestError};
use crate::nix::path_info::{PathInfo, Verified};
use crate::upstream::{self, NarStream};

use super::berth::Berth;
use super::member::Member;
use super::nar_url::NarUrl;
use super::query;
use super::shared::Shared;

/// The bounds of transfers.
#[derive(Clone, Debug)]
pub struct Options {
    /// NARs up to this size are read whole before the first byte. Promise 1: 4 MiB.
    pub whole_bytes_max: u64,
    /// KiB that such NARs take together; further ones wait.
    pub whole_kib_max: u32,
    /// Silence after which another holder is taken.
    pub stall: Duration,
    /// Silence after which the last holder is given up, too.
    pub stall_last: Duration,
    /// How NARs are compressed on the fly.
    pub encoder: EncoderOptions,
}

/// A NAR that is being given out.
pub struct Nar {
    /// Size of the NAR in bytes, before compression.
    pub size_bytes: u64,
    /// Its bytes in the encoding that was asked for.
    pub body: NarBody,
}

/// The bytes of a NAR.
pub enum NarBody {
    /// All of them, checked.
    Whole(Bytes),
    /// A checked stream: whoever reads it to its end without an error has the right bytes.
    Stream(BoxStream<'static, Result<Bytes, Error>>),
}

/// Why a transfer was cut.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The last holder broke in the middle.
    #[error("no holder is left after {offset} bytes: {cause}")]
    NoHolderLeft {
        /// NAR bytes that had been read.
        offset: u64,
        /// What the last holder said.
        cause: upstream::Error,
    },
    /// The bytes are not those that the narinfo promised.
    #[error("{upstream}: {cause}")]
    Corrupt {
        /// Where the last of them came from.
        upstream: String,
        /// What did not agree.
        cause: String,
    },
    /// Compressing them failed.
    #[error("cannot be compressed: {0}")]
    Encoder(String),
}

/// Opens the NAR that a URL names; `None` when no holder can give it.
///
/// Dropped, or its stream dropped, the transfer ends and the builder's channel is free.
pub(super) async fn open(shared: &Arc<Shared>, url: &NarUrl) -> Option<Nar> {
    let mut source = Source::locate(shared, url).await?;
    let size_bytes = source.info.nar_size;
    let encoder = &shared.encoder;
    let body = if size_bytes <= shared.options.transfer.whole_bytes_max {
        let whole = source.whole().await?;
        match encoder.encode_whole(url.encoding, whole).await {
            Ok(encoded) => NarBody::Whole(encoded),
            Err(error) => {
                warn!(path = %source.info.path, %error, "cannot be compressed");
                return None;
            }
        }
    } else {
        let checked = source.stream().await?;
        NarBody::Stream(match url.encoding {
            Encoding::None => checked,
            encoding => {
                let encoded = encoder.encode_stream(encoding, size_bytes, checked);
                let cut = |error| match error {
                    EncodeError::Source(error) => error,
                    EncodeError::Encoder(error) => Error::Encoder(error.to_string()),
                };
                encoded.map(move |item| item.map_err(cut)).boxed()
            }
        })
    };
    Some(Nar { size_bytes, body })
}

/// Finds the path info of exactly the NAR that a URL names.
pub(super) async fn info(shared: &Arc<Shared>, url: &NarUrl) -> Option<PathInfo> {
    Source::locate(shared, url).await.map(|source| source.info)
}

/// Where the bytes of one NAR can be had.
struct Source {
    shared: Arc<Shared>,
    info: PathInfo,
    /// Holders to be tried, the best first.
    waiting: VecDeque<Arc<Member>>,
    tried: Vec<UpstreamId>,
    /// Whether all upstreams were asked already.
    asked_all: bool,
}

impl Source {
    async fn locate(shared: &Arc<Shared>, url: &NarUrl) -> Option<Self> {
        let entry = query::entry(shared, url.path_hash).await?;
        let setup = shared.setup();
        let mut source = if entry.nar_hash == url.nar_hash {
            let members = entry.holders();
            let members = members
                .into_iter()
                .filter_map(|id| setup.member(id).cloned());
            Self {
                shared: Arc::clone(shared),
                info: setup.parse(&entry)?,
                waiting: members.collect(),
                tried: Vec::new(),
                asked_all: false,
            }
        } else {
            // A client remembers another build of this path; somebody may still have it.
            let mut found = None;
            query::further_holders(shared, url.path_hash, &[], |member, info| {
                let same = info.nar_hash == url.nar_hash;
                if same {
                    found = Some((member, (*info).clone()));
                }
                same
            })
            .await;
            let (member, info) = found?;
            Self {
                shared: Arc::clone(shared),
                info,
                waiting: VecDeque::from([member]),
                tried: Vec::new(),
                asked_all: false,
            }
        };
        source.waiting.retain(|member| !member.is_sick());
        Some(source)
    }

    /// Reads and checks the whole NAR from the first holder that gives it rightly.
    async fn whole(&mut self) -> Option<Bytes> {
        let size_bytes = self.info.nar_size;
        let kib = u32::try_from(size_bytes.div_ceil(1024)).unwrap_or(u32::MAX);
        let permits = kib.clamp(1, self.shared.options.transfer.whole_kib_max);
        let bound = Arc::clone(&self.shared.whole_nars);
        let permit = bound.acquire_many_owned(permits).await.ok()?;
        while let Some((member, stream)) = self.next_holder().await {
            let stalling = with_stall(stream, self.shared.options.transfer.stall_last);
            match digest::whole(stalling, self.info.nar_hash, size_bytes).await {
                Ok(nar) => {
                    self.shared.counters.nar_bytes.add(nar.len() as u64);
                    let held = Held {
                        nar,
                        _permit: permit,
                    };
                    return Some(Bytes::from_owner(held));
                }
                Err(DigestError::Source(error)) => self.broke(&member, 0, &error),
                Err(error) => corrupt(&self.shared, &self.info, &member, &error.to_string()),
            }
        }
        None
    }

    /// Begins a checked stream; `None` when no holder gives a first byte.
    async fn stream(mut self) -> Option<BoxStream<'static, Result<Bytes, Error>>> {
        let current = self.next_holder().await?;
        let (shared, info) = (Arc::clone(&self.shared), self.info.clone());
        let last = Arc::new(std::sync::Mutex::new(Arc::clone(&current.0)));
        let mut relay = Relay {
            source: self,
            current: Some(current),
            berth: shared.berths.berth(),
            last: Arc::clone(&last),
            offset: 0,
            skip: 0,
            cause: upstream::Error::Down("it has not been tried".into()),
        };
        // Nothing is promised to the client before somebody gives a first chunk.
        let Some(Ok(first)) = relay.next().await else {
            return None;
        };
        let rest = stream::unfold(relay, |mut relay| async move {
            let item = relay.next().await?;
            Some((item, relay))
        });
        let relayed = stream::iter([Ok(first)]).chain(rest);
        let checked = digest::verified(relayed.boxed(), info.nar_hash, info.nar_size);
        let named = checked.map(move |item| match item {
            Ok(chunk) => {
                shared.counters.nar_bytes.add(chunk.len() as u64);
                Ok(chunk)
            }
            Err(DigestError::Source(error)) => {
                shared.counters.nar_cut.increment();
                warn!(path = %info.path, %error, "transfer cut");
                Err(error)
            }
            Err(error) => {
                shared.counters.nar_cut.increment();
                let member = Arc::clone(
                    &last
                        .lock()
                        .unwrap_or_else(std::sync::PoisonError::into_inner),
                );
                let cause = error.to_string();
                corrupt(&shared, &info, &member, &cause);
                let upstream = member.upstream.name().to_owned();
                Err(Error::Corrupt { upstream, cause })
            }
        });
        Some(named.boxed())
    }

    /// Opens the NAR at the next holder that has it.
    async fn next_holder(&mut self) -> Option<(Arc<Member>, NarStream)> {
        loop {
            if self.waiting.is_empty() {
                self.find_more().await;
            }
            let member = self.waiting.pop_front()?;
            self.tried.push(member.id);
            let known_bad = (self.info.path.hash(), member.id);
            if member.is_sick() || self.shared.corrupt.contains_key(&known_bad) {
                continue;
            }
            let opened = tokio::select! {
                opened = member.upstream.nar(&self.info) => opened,
                never = self.shared.berths.make_room(member.id) => match never {},
                () = member.sickness() => Err(upstream::Error::Down("it is sick".into())),
            };
            match member.note(opened) {
                Ok(Some(stream)) => return Some((member, stream)),
                Ok(None) => {
                    let upstream = member.upstream.name();
                    debug!(upstream, path = %self.info.path, "the path is gone");
                    self.shared.forget_holder(self.info.path.hash(), member.id);
                }
                Err(error) => self.broke(&member, 0, &error),
            }
        }
    }

    /// Asks all upstreams once who else has exactly this NAR.
    async fn find_more(&mut self) {
        if std::mem::replace(&mut self.asked_all, true) {
            return;
        }
        let (waiting, info) = (&mut self.waiting, &self.info);
        let queue = |member, found: Verified| {
            if found.nar_hash == info.nar_hash {
                waiting.push_back(member);
            }
            false
        };
        query::further_holders(&self.shared, info.path.hash(), &self.tried, queue).await;
    }

    fn broke(&self, member: &Member, offset: u64, error: &upstream::Error) {
        let upstream = member.upstream.name();
        warn!(upstream, path = %self.info.path, offset, %error, "NAR broke off, the next holder is tried");
    }
}

/// One transfer over as many holders as it takes.
struct Relay {
    source: Source,
    /// Where the bytes come from, while somebody asks for more.
    current: Option<(Arc<Member>, NarStream)>,
    /// Where that is left until somebody does.
    berth: Arc<Berth>,
    /// Whom the latest bytes came from, for those who find them wrong.
    last: Arc<std::sync::Mutex<Arc<Member>>>,
    offset: u64,
    /// Bytes that the current holder repeats.
    skip: u64,
    cause: upstream::Error,
}

impl Relay {
    async fn next(&mut self) -> Option<Result<Bytes, Error>> {
        if self.current.is_none() {
            self.current = self.berth.take_back();
        }
        if self.current.is_none() && self.offset > 0 {
            // It made room for others: the same holder, when it is its turn again.
            let last = self.last.lock();
            let last = Arc::clone(&last.unwrap_or_else(std::sync::PoisonError::into_inner));
            self.source.waiting.push_front(last);
        }
        let item = self.next_of_current().await;
        if let Some(current) = self.current.take() {
            self.berth.leave(current);
        }
        item
    }

    async fn next_of_current(&mut self) -> Option<Result<Bytes, Error>> {
        let options = self.source.shared.options.transfer.clone();
        let mut patience = options.stall;
        loop {
            if self.offset >= self.source.info.nar_size && self.skip == 0 {
                // The rest of a holder that gives too much is seen by the check.
                return self.drain().await;
            }
            let Some((member, stream)) = &mut self.current else {
                self.take_next().await;
                if self.current.is_none() {
                    return Some(Err(self.no_holder_left()));
                }
                patience = options.stall;
                continue;
            };
            let item = tokio::time::timeout(patience, stream.next()).await;
            let error = match item {
                Ok(Some(Ok(chunk))) => match self.advance(chunk) {
                    Some(fresh) => return Some(Ok(fresh)),
                    None => continue,
                },
                Ok(Some(Err(error))) => error,
                Ok(None) => upstream::Error::Lost("it ended early".into()),
                Err(_) => {
                    let member = Arc::clone(member);
                    if patience < options.stall_last && !self.another_waits().await {
                        let upstream = member.upstream.name();
                        debug!(upstream, "stalls, but nobody else has the path");
                        patience = options.stall_last;
                        continue;
                    }
                    upstream::Error::TimedOut {
                        question: "NAR",
                        after: patience,
                    }
                }
            };
            self.drop_current(error);
        }
    }

    /// Counts a chunk and cuts off what the client already has.
    fn advance(&mut self, mut chunk: Bytes) -> Option<Bytes> {
        let repeated = usize::try_from(self.skip)
            .unwrap_or(usize::MAX)
            .min(chunk.len());
        self.skip -= repeated as u64;
        let _ = chunk.split_to(repeated);
        self.offset += chunk.len() as u64;
        (!chunk.is_empty()).then_some(chunk)
    }

    fn drop_current(&mut self, error: upstream::Error) {
        if let Some((member, _)) = self.current.take() {
            self.source.broke(&member, self.offset, &error);
        }
        self.cause = error;
    }

    async fn another_waits(&mut self) -> bool {
        if self.source.waiting.is_empty() {
            self.source.find_more().await;
        }
        !self.source.waiting.is_empty()
    }

    async fn take_next(&mut self) {
        self.current = self.source.next_holder().await;
        if let Some((member, _)) = &self.current {
            self.source.shared.counters.nar_resumed.increment();
            self.skip = self.offset;
            *self
                .last
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner) = Arc::clone(member);
        }
    }

    /// Hands on whatever follows the last byte; a well-behaved holder has nothing more.
    async fn drain(&mut self) -> Option<Result<Bytes, Error>> {
        let (_, stream) = self.current.as_mut()?;
        match stream.next().await? {
            Ok(chunk) => Some(Ok(chunk)),
            Err(_) => None,
        }
    }

    fn no_holder_left(&self) -> Error {
        Error::NoHolderLeft {
            offset: self.offset,
            cause: self.cause.clone(),
        }
    }
}

/// A small NAR and its share of the memory for such.
struct Held {
    nar: Bytes,
    _permit: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.nar
    }
}

/// Counts wrong bytes against a holder and asks it for this path no more for a while.
fn corrupt(shared: &Shared, info: &PathInfo, member: &Member, cause: &str) {
    shared.counters.nar_corrupt.increment();
    member.refused.fetch_add(1, Ordering::Relaxed);
    shared.corrupt.insert((info.path.hash(), member.id), ());
    shared.forget_holder(info.path.hash(), member.id);
    let upstream = member.upstream.name();
    warn!(upstream, path = %info.path, cause, "NAR does not fit its narinfo, nothing of it is kept");
}

/// Ends a stream that is silent for too long.
fn with_stall(
    source: NarStream,
    stall: Duration,
) -> BoxStream<'static, Result<Bytes, upstream::Error>> {
    let guarded = stream::unfold(source, move |mut source| async move {
        let item = match tokio::time::timeout(stall, source.next()).await {
            Ok(item) => item?,
            Err(_) => Err(upstream::Error::TimedOut {
                question: "NAR",
                after: stall,
            }),
        };
        Some((item, source))
    });
    guarded.boxed()
}
