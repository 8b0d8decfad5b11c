//! Which of the store's own files were found right, so that they need not be hashed again.
//!
//! A path's NAR was read whole, its hash was the promised one, and what the file system says of each of
//! its files was noted before that was read. While the registration and the [`Facts`] are the same, the
//! bytes are. Nothing of this is kept over a restart.

use moka::sync::Cache;

use super::facts::Facts;
use crate::codec::beginnings::Beginnings;
use crate::nix::hash::NarHash;
use crate::nix::store_path::StorePath;

/// What was found right. A clone is another handle on the same.
#[derive(Clone)]
pub(super) struct Proofs(Cache<StorePath, Proof>);

#[derive(Clone, Debug)]
struct Proof {
    nar_hash: NarHash,
    registration_time: i64,
    found: Found,
}

/// What was found when a path was hashed.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub(super) facts: Facts,
    pub(super) beginnings: Beginnings,
}

/// One registration of a path, as a proof is bound to it.
#[derive(Clone, Debug)]
pub(super) struct Claim {
    pub(super) path: StorePath,
    pub(super) nar_hash: NarHash,
    pub(super) registration_time: i64,
}

impl Proofs {
    /// Notes none yet, and at most so many bytes of them.
    pub(super) fn new(proofs_bytes_max: u64) -> Self {
        let weigh = |_: &StorePath, proof: &Proof| {
            let found = proof.found.facts.size_bytes() + proof.found.beginnings.size_bytes();
            u32::try_from(found + PROOF_BYTES).unwrap_or(u32::MAX)
        };
        let proofs = Cache::builder().weigher(weigh);
        Self(proofs.max_capacity(proofs_bytes_max).build())
    }

    /// Returns what was found when this claim was found right.
    pub(super) fn of(&self, claim: &Claim) -> Option<Found> {
        let proof = self.0.get(&claim.path)?;
        let same =
            proof.nar_hash == claim.nar_hash && proof.registration_time == claim.registration_time;
        same.then_some(proof.found)
    }

    /// Notes that the claim was found right.
    pub(super) fn note(&self, claim: &Claim, found: Found) {
        let proof = Proof {
            nar_hash: claim.nar_hash,
            registration_time: claim.registration_time,
            found,
        };
        self.0.insert(claim.path.clone(), proof);
    }

    /// Has the path hashed again.
    pub(super) fn forget(&self, claim: &Claim) {
        self.0.invalidate(&claim.path);
    }
}

/// What a proof takes beside what was found: its path, two handles, and its place in the table.
const PROOF_BYTES: usize = 250;
