//! One transfer over as many holders as it takes.
//!
//! NARs of one hash are the same bytes everywhere, so a transfer goes on from the next holder at
//! the same byte; a store gives a NAR from its beginning only, so what the client has is skipped.
//!
//! What a holder has checked itself is not hashed again, see [`OpenedNar`]. Should it break, who takes over must
//! repeat the same bytes, and all of its own are hashed: a [`KeyedSum`] of what was given tells, or, where each
//! chunk was known to be right, the hashes of the NAR's beginnings.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures_util::stream::BoxStream;
use futures_util::{StreamExt as _, stream};
use tokio::time::{sleep, timeout};
use tracing::warn;

use crate::codec::digest::{self, DigestError};
use crate::codec::keyed_sum::KeyedSum;
use crate::nix::path_info::PathInfo;
use crate::upstream::{self, NarStream, OpenedNar};

use super::berth::Berth;
use super::givers::{Given, Givers, Witness, blame, lock};
use super::member::Member;
use super::source::Source;
use super::transfer::Error;

/// The bytes of one NAR, unchecked, from one holder after the other.
pub(super) struct Relay {
    source: Source,
    /// Where the bytes come from, while somebody asks for more.
    current: Option<(Arc<Member>, NarStream)>,
    /// Where that is left until somebody does.
    berth: Arc<Berth>,
    givers: Arc<Mutex<Givers>>,
    offset: u64,
    /// Bytes that the current holder repeats.
    skip: u64,
    cause: upstream::Error,
}

impl Relay {
    /// Begins with no holder.
    pub(super) fn new(source: Source) -> Self {
        Self {
            berth: source.shared.berths.berth(),
            source,
            current: None,
            givers: Arc::default(),
            offset: 0,
            skip: 0,
            cause: upstream::Error::Down("nobody has it".into()),
        }
    }

    /// Reads and checks the whole NAR, and gives its source back; `None` when no holder gives it rightly.
    ///
    /// Dropped, the transfer ends.
    pub(super) async fn whole(mut self) -> Option<(Bytes, Source)> {
        let (shared, info) = (Arc::clone(&self.source.shared), self.info());
        let givers = Arc::clone(&self.givers);
        loop {
            let bytes = stream::unfold(&mut self, |relay| async move {
                let item = relay.next().await?;
                Some((item, relay))
            });
            let witness = Witness(Arc::clone(&givers));
            let bytes = digest::verified_by(witness, bytes.boxed(), info.nar_hash, info.nar_size);
            match digest::whole_of(bytes).await {
                Ok(nar) => {
                    shared.counters.nar_bytes.add(nar.len() as u64);
                    return Some((nar, self.source));
                }
                // Nothing was given out, so another can begin.
                Err(DigestError::Source(_)) if self.is_doubtful() => self.begin_anew(),
                Err(DigestError::Source(_)) => return None,
                Err(error) => {
                    blame(&shared, &info, &givers, &error.to_string());
                    // One that took over may be right.
                    for member in &lock(&givers).members {
                        self.source.set_aside(member);
                    }
                    self.begin_anew();
                }
            }
        }
    }

    /// Forgets what was read; the next holder gives the first byte.
    fn begin_anew(&mut self) {
        drop(self.berth.take_back());
        (self.current, self.offset, self.skip) = (None, 0, 0);
        *lock(&self.givers) = Givers::default();
    }

    /// Begins a checked stream; `None` when no holder gives a first byte.
    ///
    /// Dropped, the transfer ends.
    pub(super) async fn into_checked(mut self) -> Option<BoxStream<'static, Result<Bytes, Error>>> {
        let (shared, info) = (Arc::clone(&self.source.shared), self.info());
        let givers = Arc::clone(&self.givers);
        // Nothing is promised to the client before somebody gives a first chunk.
        let Some(Ok(first)) = self.next().await else {
            return None;
        };
        let rest = stream::unfold(self, |mut relay| async move {
            let item = relay.next().await?;
            Some((item, relay))
        });
        let relayed = stream::iter([Ok(first)]).chain(rest);
        let witness = Witness(Arc::clone(&givers));
        let relayed = relayed.boxed();
        let checked = digest::verified_by(witness, relayed, info.nar_hash, info.nar_size);
        let named = checked.map(move |item| {
            let error = match item {
                Ok(chunk) => {
                    shared.counters.nar_bytes.add(chunk.len() as u64);
                    return Ok(chunk);
                }
                Err(error) => error,
            };
            shared.counters.nar_cut.increment();
            Err(match error {
                DigestError::Source(error) => {
                    warn!(path = %info.path, %error, "transfer cut");
                    error
                }
                error => {
                    let cause = error.to_string();
                    let upstream = blame(&shared, &info, &givers, &cause);
                    Error::Corrupt { upstream, cause }
                }
            })
        });
        Some(named.boxed())
    }

    async fn next(&mut self) -> Option<Result<Bytes, Error>> {
        self.current = self.berth.take_back();
        if self.current.is_none() && self.offset > 0 {
            // It made room for others: the same holder, when it is its turn again.
            if let Some(last) = lock(&self.givers).members.last() {
                self.source.retry_first(last);
            }
        }
        let item = self.next_of_current().await;
        if let Some(current) = self.current.take() {
            self.berth.leave(current);
        }
        item
    }

    async fn next_of_current(&mut self) -> Option<Result<Bytes, Error>> {
        let (stall, stall_last) = {
            let options = &self.source.shared.options.transfer;
            (options.stall, options.stall_last)
        };
        loop {
            let Some((member, nar)) = &mut self.current else {
                if let Err(error) = self.take_next().await {
                    return Some(Err(error));
                }
                continue;
            };
            if self.offset >= self.source.info.nar_size {
                // What a holder gives beyond the end is for the check to see; one that gives
                // nothing and does not end has given all.
                let more = timeout(stall, nar.next()).await.ok()??;
                return more.ok().map(Ok);
            }
            let timed_out = |after| upstream::Error::TimedOut {
                question: "NAR",
                after,
            };
            let error = tokio::select! {
                biased;
                item = nar.next() => match item {
                    Some(Ok(chunk)) => match self.advance(chunk) {
                        Ok(Some(fresh)) => return Some(Ok(fresh)),
                        Ok(None) => continue,
                        Err(error) => error,
                    },
                    Some(Err(error)) => error,
                    None => upstream::Error::Lost("it ended early".into()),
                },
                () = self.source.another_after_stall() => {
                    self.source.set_aside(member);
                    timed_out(stall)
                }
                () = sleep(stall_last) => timed_out(stall_last),
            };
            self.drop_current(error);
        }
    }

    /// Counts a chunk and cuts off what the client already has; that must be the same.
    fn advance(&mut self, mut chunk: Bytes) -> Result<Option<Bytes>, upstream::Error> {
        let mut givers = lock(&self.givers);
        let repeated = usize::try_from(self.skip)
            .unwrap_or(usize::MAX)
            .min(chunk.len());
        self.skip -= repeated as u64;
        givers.repeated(&chunk.split_to(repeated));
        if self.skip == 0 {
            givers.compare()?;
        }
        self.offset += chunk.len() as u64;
        if chunk.is_empty() {
            return Ok(None);
        }
        givers.gave(&chunk);
        if let Some((member, _)) = &self.current {
            givers.add(member);
        }
        Ok(Some(chunk))
    }

    /// Tells whether what was given may be wrong, so that nobody can go on from there.
    fn is_doubtful(&self) -> bool {
        matches!(lock(&self.givers).given, Given::Doubtful)
    }

    fn drop_current(&mut self, error: upstream::Error) {
        if self.offset > 0 && matches!(error, upstream::Error::Written(_)) {
            lock(&self.givers).doubt();
        }
        if let Some((member, _)) = self.current.take() {
            self.source.broke(&member, self.offset, &error);
        }
        self.cause = error;
    }

    async fn take_next(&mut self) -> Result<(), Error> {
        let next = match self.is_doubtful() {
            true => None,
            false => self.source.next_holder().await,
        };
        let Some(next) = next else {
            return Err(Error::NoHolderLeft {
                offset: self.offset,
                cause: self.cause.clone(),
            });
        };
        let (member, opened) = next;
        let (stream, given) = match opened {
            OpenedNar::Checked(stream) => (stream, Given::Vouched(KeyedSum::new())),
            OpenedNar::Proven(beginnings, stream) => (stream, Given::Proven(beginnings)),
            OpenedNar::Unchecked(stream) => (stream, Given::default()),
        };
        let mut givers = lock(&self.givers);
        if self.offset == 0 {
            *givers = Givers::first(given);
        } else {
            self.source.shared.counters.nar_resumed.increment();
            givers.taken_over();
        }
        self.skip = self.offset;
        self.current = Some((member, stream));
        Ok(())
    }

    fn info(&self) -> Arc<PathInfo> {
        Arc::clone(&self.source.info)
    }
}
