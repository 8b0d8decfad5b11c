//! Hashes of a NAR's beginnings, taken while it was hashed: by them one who takes a transfer over is
//! found to repeat the very NAR, without a look at what was given before.
//!
//! ```text
//! hash of the first MiB, of the first two, …    16 bytes each
//! ```
//!
//! What lies behind the last whole MiB has no hash of its own; the NAR's hash judges it in the end.

use std::sync::Arc;

use super::digest::{NarDigest, Proof};
use crate::nix::hash::NarHash;

/// The hashes of one NAR's beginnings. A clone is another handle on the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Beginnings(Arc<[Beginning]>);

/// The first half of a SHA-256: nobody looks for two NARs that share it.
type Beginning = [u8; 16];

/// The hash of a NAR, which notes its beginnings on the way.
#[derive(Clone, Debug, Default)]
pub struct NotingDigest {
    nar: NarDigest,
    noted: Vec<Beginning>,
}

impl Beginnings {
    /// Returns how many bytes of memory the hashes take.
    pub fn size_bytes(&self) -> usize {
        size_of_val(&*self.0)
    }
}

impl NotingDigest {
    /// Adds bytes at the end.
    pub fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let missing = STEP_BYTES - self.nar.size() % STEP_BYTES;
            let missing = usize::try_from(missing).unwrap_or(usize::MAX);
            let (now, later) = bytes.split_at(missing.min(bytes.len()));
            self.nar.update(now);
            bytes = later;
            if self.nar.size().is_multiple_of(STEP_BYTES) {
                let NarHash(hash) = self.so_far();
                let (half, _) = hash.as_chunks::<16>();
                self.noted.push(half.first().copied().unwrap_or_default());
            }
        }
    }

    /// Tells whether the bytes added are this NAR's, as far as that can be told: up to the last whole MiB.
    pub fn agrees_with(&self, beginnings: &Beginnings) -> bool {
        // The hash of a beginning stands for all that are shorter.
        let last = self.noted.len().checked_sub(1);
        last.is_none_or(|last| beginnings.0.get(last) == self.noted.last())
    }

    /// Returns the hashes that were noted until now.
    pub fn beginnings(&self) -> Beginnings {
        Beginnings(self.noted.as_slice().into())
    }

    /// Returns the hash of the bytes added until now.
    pub fn so_far(&self) -> NarHash {
        self.nar.clone().finish()
    }

    /// Returns the hash of all bytes added, and those of their beginnings.
    pub fn finish(self) -> (NarHash, Beginnings) {
        (self.nar.finish(), Beginnings(self.noted.into()))
    }
}

impl Proof for NotingDigest {
    fn update(&mut self, bytes: &[u8]) {
        Self::update(self, bytes);
    }

    fn judge(&self, expected: NarHash) -> Result<(), NarHash> {
        self.nar.judge(expected)
    }
}

const STEP_BYTES: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: usize = (3 << 20) + 500_000;

    fn nar() -> Vec<u8> {
        (0..=250).cycle().take(SIZE).collect()
    }

    fn noted(nar: &[u8], cut: usize) -> (NarHash, Beginnings) {
        let mut digest = NotingDigest::default();
        nar.chunks(cut).for_each(|part| digest.update(part));
        digest.finish()
    }

    #[test]
    fn cuts_make_no_difference() {
        let nar = nar();
        let (hash, beginnings) = noted(&nar, SIZE);
        assert_eq!(hash, NarHash::of(&nar));
        assert_eq!(beginnings.size_bytes(), 3 * 16);
        for cut in [1 << 20, 262_144, 1_000_003, 4096] {
            assert_eq!(noted(&nar, cut), (hash, beginnings.clone()));
            let mut digest = NotingDigest::default();
            let same = |part: &[u8]| {
                digest.update(part);
                digest.agrees_with(&beginnings)
            };
            assert!(nar.chunks(cut).all(same));
            assert_eq!(digest.so_far(), hash);
            assert_eq!(digest.beginnings(), beginnings);
        }
    }

    #[test]
    fn another_nar_is_known_by_its_first_wrong_step() {
        let nar = nar();
        let (_, beginnings) = noted(&nar, SIZE);
        for (wrong, seen) in [(0, true), ((3 << 20) - 1, true), (3 << 20, false)] {
            let mut other = nar.clone();
            other[wrong] ^= 1;
            let mut digest = NotingDigest::default();
            digest.update(&other);
            assert_eq!(!digest.agrees_with(&beginnings), seen, "{wrong}");
        }
        let longer = [&nar[..], &nar].concat();
        let mut digest = NotingDigest::default();
        digest.update(&longer);
        assert!(!digest.agrees_with(&beginnings));
    }
}
