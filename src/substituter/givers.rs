//! Who gave the bytes of one transfer, what is known of them, and who is to blame when they are wrong.
//!
//! Nothing is read here: [`super::relay`] tells what came.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tracing::warn;

use crate::codec::beginnings::{Beginnings, NotingDigest};
use crate::codec::digest::{DigestError, Proof};
use crate::codec::keyed_sum::KeyedSum;
use crate::nix::hash::NarHash;
use crate::nix::path_info::PathInfo;
use crate::upstream;

use super::kept::KEPT;
use super::member::Member;
use super::shared::Shared;

/// Who gave the bytes so far, to know whom to blame when they are wrong.
// Behind a lock that is never held over an await; no other lock is taken under it.
#[derive(Default)]
pub(super) struct Givers {
    pub(super) members: Vec<Arc<Member>>,
    /// Of one that took over: all its bytes, those too that were skipped.
    own: Option<NotingDigest>,
    pub(super) given: Given,
    /// What it must repeat, until it has.
    again: Option<Again>,
    /// Whether somebody lied, so that what was given is to be doubted.
    suspect: bool,
    /// What was known, and how many had given, where bytes began to be held back.
    mark: Option<(Given, usize)>,
}

/// What is known of the bytes that came.
#[derive(Clone)]
pub(super) enum Given {
    /// Their hash so far.
    Hashed(NotingDigest),
    /// The one holder that gave them answers for them when it comes to its end.
    Vouched(KeyedSum),
    /// They are right.
    Proven(Beginnings),
    /// They were, but may have been written to before they were read.
    Doubtful,
}

/// By what one who takes over is found to repeat what was given.
enum Again {
    /// Of what it repeats, to be compared with [`Given::Vouched`].
    Sum(KeyedSum),
    /// The beginnings it must have, and the hash of all that was given where that is known.
    Beginnings(Beginnings, Option<NarHash>),
}

/// The proof of a relay's bytes, which the relay itself tells of.
pub(super) struct Witness(pub(super) Arc<Mutex<Givers>>);

impl Givers {
    /// Begins with the first holder.
    pub(super) fn first(given: Given) -> Self {
        Self {
            given,
            ..Self::default()
        }
    }

    /// Begins with a holder that repeats what was given; whatever it says of itself, it is hashed.
    pub(super) fn taken_over(&mut self) {
        self.own = Some(NotingDigest::default());
        self.again = match &self.given {
            Given::Vouched(sum) => Some(Again::Sum(sum.twin())),
            Given::Proven(beginnings) => Some(Again::Beginnings(beginnings.clone(), None)),
            // Its last byte tells, and who is to blame; but not once more for who lied already.
            Given::Hashed(digest) if self.suspect => Some(Again::Beginnings(
                digest.beginnings(),
                Some(digest.so_far()),
            )),
            Given::Hashed(_) | Given::Doubtful => None,
        };
    }

    /// Hears that what was being read was written to.
    pub(super) fn doubt(&mut self) {
        if matches!(self.given, Given::Proven(_)) && self.own.is_none() {
            self.given = Given::Doubtful;
        }
    }

    /// Hears that somebody lied: who takes over must repeat what was given.
    pub(super) fn suspect(&mut self) {
        self.suspect = true;
    }

    /// Hears that what comes now is held back.
    pub(super) fn mark(&mut self) {
        if self.mark.is_none() {
            self.mark = Some((self.given.clone(), self.members.len()));
        }
    }

    /// Hears that what was held back is forgotten.
    pub(super) fn forget_held(&mut self) {
        if let Some((given, members)) = &self.mark {
            self.given = given.clone();
            self.members.truncate(*members);
        }
    }

    /// Hears bytes that were given before; an error as soon as they are seen to differ.
    pub(super) fn repeated(&mut self, bytes: &[u8]) -> Result<(), upstream::Error> {
        let Some(own) = &mut self.own else {
            return Ok(());
        };
        own.update(bytes);
        match &mut self.again {
            Some(Again::Sum(sum)) => sum.update(bytes),
            Some(Again::Beginnings(beginnings, _)) if !own.agrees_with(beginnings) => {
                return Err(differs());
            }
            _ => {}
        }
        Ok(())
    }

    /// Compares what was repeated with what was given before, once all of it came.
    ///
    /// From then on its hash stands for both.
    pub(super) fn compare(&mut self) -> Result<(), upstream::Error> {
        let Some((own, again)) = self.own.as_ref().zip(self.again.take()) else {
            return Ok(());
        };
        let same = match (&self.given, again) {
            (Given::Vouched(sum), Again::Sum(again)) => again.finish() == sum.finish(),
            (_, Again::Beginnings(_, all)) => all.is_none_or(|all| all == own.so_far()),
            (_, Again::Sum(_)) => false,
        };
        if !same {
            return Err(differs());
        }
        self.given = Given::Hashed(own.clone());
        Ok(())
    }

    pub(super) fn gave(&mut self, bytes: &[u8]) {
        if let Some(own) = &mut self.own {
            own.update(bytes);
        }
        match &mut self.given {
            Given::Hashed(digest) => digest.update(bytes),
            Given::Vouched(sum) => sum.update(bytes),
            Given::Proven(_) | Given::Doubtful => {}
        }
    }

    pub(super) fn add(&mut self, member: &Arc<Member>) {
        if self.members.last().is_none_or(|last| last.id != member.id) {
            self.members.push(Arc::clone(member));
        }
    }

    /// Judges all bytes, once there are as many as promised; an error is the hash that they have.
    pub(super) fn judge(&self, expected: NarHash) -> Result<(), NarHash> {
        match &self.given {
            Given::Hashed(digest) => digest.judge(expected),
            Given::Vouched(_) | Given::Proven(_) => Ok(()),
            // Nothing follows them, so they never are all.
            Given::Doubtful => Err(expected),
        }
    }

    /// Tells whether all that the last one has is right, though it was not the first.
    ///
    /// Where the whole is wrong, what it took over is.
    pub(super) fn last_is_right(&self, expected: NarHash) -> bool {
        let own = self.own.as_ref();
        self.members.len() > 1 && own.is_some_and(|own| own.so_far() == expected)
    }

    /// Tells whose bytes are wrong, once that is seen.
    pub(super) fn liars<E>(&self, lie: &DigestError<E>, expected: NarHash) -> Vec<Arc<Member>> {
        let Some((last, earlier)) = self.members.split_last() else {
            return Vec::new();
        };
        match lie {
            DigestError::Mismatch { .. } if self.last_is_right(expected) => earlier.to_vec(),
            _ => vec![Arc::clone(last)],
        }
    }
}

impl Default for Given {
    fn default() -> Self {
        Self::Hashed(NotingDigest::default())
    }
}

impl Proof for Witness {
    fn update(&mut self, _: &[u8]) {}

    fn judge(&self, expected: NarHash) -> Result<(), NarHash> {
        lock(&self.0).judge(expected)
    }
}

fn differs() -> upstream::Error {
    upstream::Error::Protocol("it does not begin with the bytes that were given before".into())
}

/// Counts wrong bytes against those who gave them, asks them for this path no more for a while,
/// and returns their names.
pub(super) fn accuse(
    shared: &Shared,
    info: &PathInfo,
    members: &[Arc<Member>],
    cause: &str,
) -> String {
    shared.counters.nar_corrupt.increment();
    let mut names = Vec::new();
    for member in members {
        member.refused.fetch_add(1, Ordering::Relaxed);
        shared.corrupt.insert((info.path.hash(), member.id), ());
        if member.id == KEPT {
            shared.distrust_kept(info, cause);
        }
        shared.forget_holder(info.path.hash(), info.nar_hash, member.id);
        names.push(member.upstream.name());
    }
    let upstream = names.join(", ");
    warn!(upstream, path = %info.path, cause, "NAR does not fit its narinfo, nothing of it is kept");
    upstream
}

pub(super) fn lock(givers: &Mutex<Givers>) -> MutexGuard<'_, Givers> {
    givers.lock().unwrap_or_else(PoisonError::into_inner)
}
