//! One transfer over as many holders as it takes.
//!
//! NARs of one hash are the same bytes everywhere, so a transfer goes on from the next holder at
//! the same byte; a store gives a NAR from its beginning only, so what the client has is skipped.
//!
//! What a holder has checked itself is not hashed again, see [`OpenedNar`]. Should it break, who takes over must
//! repeat the same bytes, and all of its own are hashed: a [`KeyedSum`] of what was given tells, or, where each
//! chunk was known to be right, the hashes of the NAR's beginnings.
//!
//! Bytes that are held back, see [`super::sound`], are not given yet: who takes over gives them anew.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use tokio::time::{sleep, timeout};

use crate::cache::memory::UpstreamId;
use crate::codec::digest::{self, DigestError};
use crate::codec::held_tail::HeldTail;
use crate::codec::keyed_sum::KeyedSum;
use crate::nix::path_info::PathInfo;
use crate::upstream::{self, NarStream, OpenedNar};

use super::berth::{Berth, Giver};
use super::givers::{Given, Givers, Witness, accuse, lock};
use super::member::Member;
use super::source::{Source, is_of_connection};
use super::transfer::Error;

/// The bytes of one NAR, unchecked, from one holder after the other.
pub(super) struct Relay {
    pub(super) source: Source,
    /// Where the bytes come from, while somebody asks for more.
    current: Option<(Arc<Member>, NarStream)>,
    /// Where that is left until somebody does.
    berth: Arc<Berth<(Arc<Member>, NarStream)>>,
    /// Whether the current stream was left there.
    is_left: bool,
    pub(super) givers: Arc<Mutex<Givers>>,
    /// What came, and what of it is held back.
    pub(super) tail: HeldTail,
    /// Bytes that the current holder repeats.
    skip: u64,
    /// Who was found not to repeat what was given.
    pub(super) differed: Vec<Arc<Member>>,
    /// Who was silent for as long as a last holder may be: the second time it is not waited for that long.
    hung: Vec<UpstreamId>,
    cause: upstream::Error,
}

impl Relay {
    /// Begins with no holder.
    pub(super) fn new(source: Source) -> Self {
        Self {
            berth: source.shared.berths.berth(),
            tail: HeldTail::nothing(),
            source,
            current: None,
            is_left: false,
            givers: Arc::default(),
            skip: 0,
            differed: Vec::new(),
            hung: Vec::new(),
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
                    let liars = lock(&givers).liars(&error, info.nar_hash);
                    accuse(&shared, &info, &liars, &error.to_string());
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
        self.drop_stream();
        (self.tail, self.skip) = (HeldTail::nothing(), 0);
        *lock(&self.givers) = Givers::default();
    }

    /// Goes on with the next holder, which must repeat what was given; what is held back is forgotten.
    pub(super) fn distrust(&mut self) {
        self.drop_stream();
        let mut givers = lock(&self.givers);
        givers.suspect();
        // One that took over may be right.
        for member in &givers.members {
            self.source.set_aside(member);
        }
    }

    /// Ends the current stream.
    pub(super) fn drop_stream(&mut self) {
        drop(self.berth.take_back());
        (self.current, self.is_left) = (None, false);
    }

    /// Reads a chunk; it is empty where it is held back. `None` at the end, when all came or more.
    pub(super) async fn next(&mut self) -> Option<Result<Bytes, Error>> {
        self.current = self.berth.take_back();
        if self.current.is_none() && std::mem::take(&mut self.is_left) {
            // It made room for others: the same holder, when it is its turn again.
            if let Some(last) = lock(&self.givers).members.last() {
                self.source.retry_first(last);
            }
        }
        let item = self.next_of_current().await;
        if let Some(current) = self.current.take() {
            self.berth.leave(Giver::Member(current.0.id), current);
            self.is_left = true;
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
            if self.tail.came() >= self.source.info.nar_size {
                // What a holder gives beyond the end is for the check to see; one that gives
                // nothing and does not end has given all.
                let more = timeout(stall, nar.next()).await.ok()??;
                return more.ok().map(|more| Ok(self.tail.take(more)));
            }
            let timed_out = |after| upstream::Error::TimedOut {
                question: "NAR",
                after,
            };
            let patience = match self.hung.contains(&member.id) {
                true => stall,
                false => stall_last,
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
                () = sleep(patience) => {
                    self.hung.push(member.id);
                    timed_out(patience)
                }
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
        let mut same = givers.repeated(&chunk.split_to(repeated));
        if self.skip == 0 {
            same = same.and_then(|()| givers.compare());
        }
        let member = self.current.as_ref().map(|(member, _)| member);
        same.inspect_err(|_| self.differed.extend(member.cloned()))?;
        if chunk.is_empty() {
            return Ok(None);
        }
        let is_right = matches!(givers.given, Given::Proven(_));
        let passes = match is_right {
            true => chunk.len(),
            false => self.tail.passes(&chunk),
        };
        for (bytes, is_held) in [(chunk.get(..passes), false), (chunk.get(passes..), true)] {
            let Some(bytes) = bytes.filter(|bytes| !bytes.is_empty()) else {
                continue;
            };
            if is_held {
                givers.mark();
            }
            givers.gave(bytes);
            member.iter().for_each(|member| givers.add(member));
        }
        Ok(Some(match is_right {
            true => self.tail.take_right(chunk),
            false => self.tail.take(chunk),
        }))
    }

    /// Tells whether what was given may be wrong, so that nobody can go on from there.
    fn is_doubtful(&self) -> bool {
        matches!(lock(&self.givers).given, Given::Doubtful)
    }

    fn drop_current(&mut self, error: upstream::Error) {
        if self.tail.given() > 0 && matches!(error, upstream::Error::Written(_)) {
            lock(&self.givers).doubt();
        }
        if let Some((member, _)) = self.current.take() {
            self.source.broke(&member, self.tail.came(), &error);
            if is_of_connection(&error) {
                self.source.set_aside(&member);
            }
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
                offset: self.tail.came(),
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
        self.tail.forget();
        if self.tail.given() == 0 {
            *givers = Givers::first(given);
        } else {
            self.source.shared.counters.nar_resumed.increment();
            givers.forget_held();
            givers.taken_over();
        }
        self.skip = self.tail.given();
        self.current = Some((member, stream));
        Ok(())
    }

    pub(super) fn info(&self) -> Arc<PathInfo> {
        Arc::clone(&self.source.info)
    }
}
