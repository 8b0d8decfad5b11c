//! Hashes of a NAR's beginnings, taken when it was hashed whole: by them one who takes a transfer over is
//! found to repeat the very NAR, without a look at what was given before.
//!
//! ```text
//! hash of the first MiB, of the first two, …    16 bytes each
//! ```
//!
//! What lies behind the last whole MiB has no hash of its own; the NAR's hash judges it in the end.

use std::sync::Arc;

use super::digest::NarDigest;
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
    /// Adds bytes at the end of a hash, and tells whether they are this NAR's as far as that can be told.
    pub fn repeat(&self, nar: &mut NarDigest, bytes: &[u8]) -> bool {
        let mut same = true;
        by_steps(nar, bytes, |step, beginning| {
            same &= self.0.get(step) == Some(&beginning);
        });
        same
    }

    /// Returns how many bytes of memory the hashes take.
    pub fn size_bytes(&self) -> usize {
        size_of_val(&*self.0)
    }
}

impl NotingDigest {
    /// Adds bytes at the end.
    pub fn update(&mut self, bytes: &[u8]) {
        let noted = &mut self.noted;
        by_steps(&mut self.nar, bytes, |_, beginning| noted.push(beginning));
    }

    /// Returns the hash of all bytes added, and those of their beginnings.
    pub fn finish(self) -> (NarHash, Beginnings) {
        (self.nar.finish(), Beginnings(self.noted.into()))
    }
}

/// Adds bytes to a hash and tells of each whole step.
fn by_steps(nar: &mut NarDigest, mut bytes: &[u8], mut whole: impl FnMut(usize, Beginning)) {
    while !bytes.is_empty() {
        let missing = STEP_BYTES - nar.size() % STEP_BYTES;
        let missing = usize::try_from(missing).unwrap_or(usize::MAX);
        let (now, later) = bytes.split_at(missing.min(bytes.len()));
        nar.update(now);
        bytes = later;
        if nar.size().is_multiple_of(STEP_BYTES) {
            let NarHash(hash) = nar.clone().finish();
            let step = usize::try_from(nar.size() / STEP_BYTES - 1).unwrap_or(usize::MAX);
            let (half, _) = hash.as_chunks::<16>();
            whole(step, half.first().copied().unwrap_or_default());
        }
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
            let mut digest = NarDigest::default();
            let same = |part: &[u8]| beginnings.repeat(&mut digest, part);
            assert!(nar.chunks(cut).all(same));
            assert_eq!(digest.finish(), hash);
        }
    }

    #[test]
    fn another_nar_is_known_by_its_first_wrong_step() {
        let nar = nar();
        let (_, beginnings) = noted(&nar, SIZE);
        for (wrong, seen) in [(0, true), ((3 << 20) - 1, true), (3 << 20, false)] {
            let mut other = nar.clone();
            other[wrong] ^= 1;
            let mut digest = NarDigest::default();
            assert_eq!(!beginnings.repeat(&mut digest, &other), seen, "{wrong}");
        }
        let longer = [&nar[..], &nar].concat();
        assert!(!beginnings.repeat(&mut NarDigest::default(), &longer));
    }
}
