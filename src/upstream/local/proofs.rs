//! Which of the store's own files were found right, so that they need not be hashed again.
//!
//! A path's NAR was read whole, its hash was the promised one, and the file system's facts about all
//! its files were noted while they were read. While the registration and the facts are the same, the
//! bytes are. Nothing of this is kept over a restart.

use moka::sync::Cache;

use super::pack::Facts;
use crate::nix::hash::NarHash;
use crate::nix::store_path::StorePath;

/// What was found right. A clone is another handle on the same.
#[derive(Clone)]
pub(super) struct Proofs(Cache<StorePath, Proof>);

#[derive(Clone, Debug)]
struct Proof {
    nar_hash: NarHash,
    registration_time: i64,
    facts: Facts,
}

/// One registration of a path, as a proof is bound to it.
#[derive(Clone, Debug)]
pub(super) struct Claim {
    pub(super) path: StorePath,
    pub(super) nar_hash: NarHash,
    pub(super) registration_time: i64,
}

impl Proofs {
    /// Notes none yet, and at most so many.
    pub(super) fn new(proofs_max: u64) -> Self {
        Self(Cache::new(proofs_max))
    }

    /// Returns the facts under which this claim was found right.
    pub(super) fn of(&self, claim: &Claim) -> Option<Facts> {
        let proof = self.0.get(&claim.path)?;
        let same =
            proof.nar_hash == claim.nar_hash && proof.registration_time == claim.registration_time;
        same.then_some(proof.facts)
    }

    /// Notes that the claim was found right under these facts.
    pub(super) fn note(&self, claim: &Claim, facts: Facts) {
        let proof = Proof {
            nar_hash: claim.nar_hash,
            registration_time: claim.registration_time,
            facts,
        };
        self.0.insert(claim.path.clone(), proof);
    }

    /// Has the path hashed again.
    pub(super) fn forget(&self, claim: &Claim) {
        self.0.invalidate(&claim.path);
    }
}
