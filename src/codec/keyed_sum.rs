//! A sum by which two streams are found to begin with the same bytes, at a small part of a hash's cost.
//!
//! Each KiB is brought to 16 bytes by NH, the universal hash of UMAC (RFC 4418, section 5.2.1, here over words of
//! 64 bits), under keys that are random and told to nobody; only those 16 bytes are hashed. Two streams that differ
//! have the same sum by a chance of 2^-64 for each KiB. It is no promise to anybody else: it means
//! something only beside a [`KeyedSum::twin`].

use std::sync::Arc;

use sha2::{Digest as _, Sha256};

/// The sum of the bytes seen so far; where they were cut makes no difference.
#[derive(Clone)]
pub struct KeyedSum {
    keys: Arc<[[u64; 2]]>,
    /// Of the block that is not full yet.
    pending: Vec<u8>,
    sums: Sha256,
}

impl KeyedSum {
    /// Makes the sum of nothing, under keys of its own.
    pub fn new() -> Self {
        let pair = || [fastrand::u64(..), fastrand::u64(..)];
        let keys = std::iter::repeat_with(pair).take(BLOCK_BYTES / 16);
        Self::under(keys.collect())
    }

    /// Makes the sum of nothing, to be compared with this one.
    pub fn twin(&self) -> Self {
        Self::under(Arc::clone(&self.keys))
    }

    /// Adds bytes at the end.
    pub fn update(&mut self, mut bytes: &[u8]) {
        if !self.pending.is_empty() {
            let missing = BLOCK_BYTES - self.pending.len();
            let (now, later) = bytes.split_at(missing.min(bytes.len()));
            self.pending.extend_from_slice(now);
            bytes = later;
            if self.pending.len() < BLOCK_BYTES {
                return;
            }
            let block = std::mem::take(&mut self.pending);
            self.add(&block);
        }
        let blocks = bytes.chunks_exact(BLOCK_BYTES);
        self.pending.extend_from_slice(blocks.remainder());
        for block in blocks {
            self.add(block);
        }
    }

    /// Returns the sum of all bytes added.
    pub fn finish(&self) -> [u8; 32] {
        let mut sums = self.sums.clone();
        // Behind a whole number of sums; the length tells it from one.
        sums.update(&self.pending);
        sums.update(self.pending.len().to_le_bytes());
        sums.finalize().into()
    }

    fn under(keys: Arc<[[u64; 2]]>) -> Self {
        Self {
            keys,
            pending: Vec::new(),
            sums: Sha256::new(),
        }
    }

    fn add(&mut self, block: &[u8]) {
        let (words, _) = block.as_chunks::<8>();
        let (pairs, _) = words.as_chunks::<2>();
        let sum = pairs.iter().zip(&*self.keys).fold(0, |sum: u128, it| {
            let ([a, b], [key_a, key_b]) = it;
            let a = u64::from_le_bytes(*a).wrapping_add(*key_a);
            let b = u64::from_le_bytes(*b).wrapping_add(*key_b);
            sum.wrapping_add(u128::from(a) * u128::from(b))
        });
        self.sums.update(sum.to_le_bytes());
    }
}

impl Default for KeyedSum {
    fn default() -> Self {
        Self::new()
    }
}

/// A 64th of the bytes is left to be hashed.
const BLOCK_BYTES: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    fn sum_of(parts: &[&[u8]], like: &KeyedSum) -> [u8; 32] {
        let mut sum = like.twin();
        parts.iter().for_each(|part| sum.update(part));
        sum.finish()
    }

    proptest::proptest! {
        #[test]
        fn cuts_make_no_difference(
            bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..5000),
            cuts in proptest::collection::vec(0_usize..2000, 0..5),
        ) {
            let keys = KeyedSum::new();
            let mut rest = &*bytes;
            let mut parts = vec![];
            for cut in cuts {
                let (part, later) = rest.split_at(cut.min(rest.len()));
                parts.push(part);
                rest = later;
            }
            parts.push(rest);
            proptest::prop_assert_eq!(sum_of(&parts, &keys), sum_of(&[&bytes], &keys));
        }

        #[test]
        fn a_bit_makes_one(
            mut bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 1..5000),
            place: proptest::sample::Index,
            bit in 0_u32..8,
        ) {
            let keys = KeyedSum::new();
            let before = sum_of(&[&bytes], &keys);
            let place = place.index(bytes.len());
            bytes[place] ^= 1 << bit;
            proptest::prop_assert_ne!(sum_of(&[&bytes], &keys), before);
            bytes[place] ^= 1 << bit;
            proptest::prop_assert_eq!(sum_of(&[&bytes], &keys), before);
            proptest::prop_assert_ne!(sum_of(&[&bytes, &[0]], &keys), before);
        }
    }

    #[test]
    fn words_and_blocks_that_change_places_make_a_difference() {
        let keys = KeyedSum::new();
        let block = |first: u8| [&[first; 8][..], &[7; 1016]].concat();
        let (one, two) = (block(1), block(2));
        assert_ne!(sum_of(&[&one, &two], &keys), sum_of(&[&two, &one], &keys));
        let swapped = [&one[8..16], &one[..8], &one[16..]].concat();
        assert_ne!(sum_of(&[&one], &keys), sum_of(&[&swapped], &keys));
        assert_ne!(sum_of(&[&one], &keys), sum_of(&[&one], &KeyedSum::new()));
    }
}
