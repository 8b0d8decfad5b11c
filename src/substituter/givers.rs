//! Who gave the bytes of one transfer, what is known of them, and who is to blame when they are wrong.
//!
//! Nothing is read here: [`super::relay`] tells what came.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tracing::warn;

use crate::codec::beginnings::Beginnings;
use crate::codec::digest::{NarDigest, Proof};
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
    own: Option<NarDigest>,
    pub(super) given: Given,
    /// Of what it repeats, to be compared with [`Given::Vouched`].
    again: Option<KeyedSum>,
    /// Whether it was seen not to repeat a [`Given::Proven`].
    differs: bool,
}

/// What is known of the bytes that were given out.
pub(super) enum Given {
    /// Their hash so far.
    Hashed(NarDigest),
    /// The one holder that gave them answers for them when it comes to its end.
    Vouched(KeyedSum),
    /// They are right.
    Proven(Beginnings),
    /// They were, but may have been written to before they were read.
    Doubtful,
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
        self.own = Some(NarDigest::default());
        self.again = match &self.given {
            Given::Vouched(sum) => Some(sum.twin()),
            Given::Hashed(_) | Given::Proven(_) | Given::Doubtful => None,
        };
        self.differs = false;
    }

    /// Hears that what was being read was written to.
    pub(super) fn doubt(&mut self) {
        if matches!(self.given, Given::Proven(_)) && self.own.is_none() {
            self.given = Given::Doubtful;
        }
    }

    pub(super) fn repeated(&mut self, bytes: &[u8]) {
        match (&mut self.own, &self.given) {
            (Some(own), Given::Proven(beginnings)) => {
                self.differs |= !beginnings.repeat(own, bytes);
            }
            (Some(own), _) => own.update(bytes),
            (None, _) => {}
        }
        if let Some(again) = &mut self.again {
            again.update(bytes);
        }
    }

    /// Compares what was repeated with what was given before, once all of it came.
    ///
    /// From then on its hash stands for both.
    pub(super) fn compare(&mut self) -> Result<(), upstream::Error> {
        let same = match (&self.given, &self.again, &self.own) {
            (Given::Vouched(sum), Some(again), _) => again.finish() == sum.finish(),
            (Given::Proven(_), _, Some(_)) => !self.differs,
            _ => return Ok(()),
        };
        if !same {
            let cause = "it does not begin with the bytes that were given before";
            return Err(upstream::Error::Protocol(cause.into()));
        }
        self.again = None;
        if let Some(own) = &self.own {
            self.given = Given::Hashed(own.clone());
        }
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

    /// Tells whose bytes are wrong, once the last of them came.
    fn to_blame(&self, expected: NarHash) -> &[Arc<Member>] {
        let Some((last, earlier)) = self.members.split_last() else {
            return &[];
        };
        match &self.own {
            // All that the last one has is right, so what it took over was not.
            Some(own) if own.clone().finish() == expected && !earlier.is_empty() => earlier,
            _ => std::slice::from_ref(last),
        }
    }
}

impl Default for Given {
    fn default() -> Self {
        Self::Hashed(NarDigest::default())
    }
}

impl Proof for Witness {
    fn update(&mut self, _: &[u8]) {}

    fn judge(&self, expected: NarHash) -> Result<(), NarHash> {
        match &lock(&self.0).given {
            Given::Hashed(digest) => digest.judge(expected),
            Given::Vouched(_) | Given::Proven(_) => Ok(()),
            // Nothing follows them, so they never are all.
            Given::Doubtful => Err(expected),
        }
    }
}

/// Counts wrong bytes against those who gave them, asks them for this path no more for a while,
/// and returns their names.
pub(super) fn blame(
    shared: &Shared,
    info: &PathInfo,
    givers: &Mutex<Givers>,
    cause: &str,
) -> String {
    shared.counters.nar_corrupt.increment();
    let mut names = Vec::new();
    let givers = lock(givers);
    for member in givers.to_blame(info.nar_hash) {
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
