//! A compact set of hash parts: 20 bytes each and little more.
//!
//! Sorted buckets by the first 12 bits, so that adding one moves some 5 KB at a million paths, and
//! looking one up is a binary search over some 250. A million paths take 22 MB.

use crate::nix::store_path::StorePathHash;

/// A set of hash parts with a checksum that does not depend on the order of changes.
#[derive(Clone, Debug)]
pub struct HashSet {
    buckets: Vec<Vec<StorePathHash>>,
    len: usize,
    checksum: u64,
}

impl HashSet {
    /// Makes an empty set; with the first member it takes 100 KB.
    pub fn new() -> Self {
        Self {
            buckets: Vec::new(),
            len: 0,
            checksum: 0,
        }
    }

    /// Returns how many there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Tells whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns a sum over all members, by which two sets can be told apart.
    pub fn checksum(&self) -> u64 {
        self.checksum
    }

    /// Returns the bytes that the members take, slack included.
    pub fn size_bytes(&self) -> usize {
        let slots: usize = self.buckets.iter().map(Vec::capacity).sum();
        slots * size_of::<StorePathHash>() + self.buckets.len() * size_of::<Vec<StorePathHash>>()
    }

    /// Tells whether a hash part is in the set.
    pub fn contains(&self, hash: &StorePathHash) -> bool {
        let bucket = self.buckets.get(place(hash));
        bucket.is_some_and(|bucket| bucket.binary_search(hash).is_ok())
    }

    /// Adds a hash part; `false`: it was there.
    pub fn insert(&mut self, hash: StorePathHash) -> bool {
        if self.buckets.is_empty() {
            self.buckets.resize_with(BUCKETS, Vec::new);
        }
        let Some(bucket) = self.buckets.get_mut(place(&hash)) else {
            return false;
        };
        let Err(at) = bucket.binary_search(&hash) else {
            return false;
        };
        if bucket.len() == bucket.capacity() {
            // Growing by a fixed step costs time that nobody feels, doubling would cost memory.
            bucket.reserve_exact(GROWTH);
        }
        bucket.insert(at, hash);
        self.len += 1;
        self.checksum = self.checksum.wrapping_add(weight(&hash));
        true
    }

    /// Tells whether far more members lie beside this one than chance would have it, so that each further one takes long.
    pub fn is_skewed_at(&self, hash: &StorePathHash) -> bool {
        let beside = self.buckets.get(place(hash)).map_or(0, Vec::len);
        beside > BESIDE_MAX + 4 * self.len / BUCKETS
    }

    /// Takes a hash part out; `false`: it was not there.
    pub fn remove(&mut self, hash: &StorePathHash) -> bool {
        let Some(bucket) = self.buckets.get_mut(place(hash)) else {
            return false;
        };
        let Ok(at) = bucket.binary_search(hash) else {
            return false;
        };
        bucket.remove(at);
        if bucket.capacity() - bucket.len() > 2 * GROWTH {
            bucket.shrink_to(bucket.len() + GROWTH);
        }
        self.len -= 1;
        self.checksum = self.checksum.wrapping_sub(weight(hash));
        true
    }

    /// Returns the members of one of the [`BUCKETS`], sorted; the buckets have the members' order.
    pub fn bucket(&self, place: usize) -> &[StorePathHash] {
        self.buckets.get(place).map_or(&[], Vec::as_slice)
    }

    /// Returns all members, sorted.
    pub fn iter(&self) -> impl Iterator<Item = &StorePathHash> {
        self.buckets.iter().flatten()
    }
}

impl Default for HashSet {
    fn default() -> Self {
        Self::new()
    }
}

impl PartialEq for HashSet {
    fn eq(&self, other: &Self) -> bool {
        self.len == other.len && self.checksum == other.checksum && self.iter().eq(other.iter())
    }
}

impl FromIterator<StorePathHash> for HashSet {
    fn from_iter<I: IntoIterator<Item = StorePathHash>>(hashes: I) -> Self {
        let mut set = Self::new();
        for hash in hashes {
            set.insert(hash);
        }
        set
    }
}

fn place(hash: &StorePathHash) -> usize {
    let [first, second, ..] = hash.0;
    usize::from(first) << 4 | usize::from(second) >> 4
}

/// Mixes all bytes, so that two members do not cancel each other out.
fn weight(hash: &StorePathHash) -> u64 {
    let mut weight = 0_u64;
    for part in hash.0.chunks(4) {
        let part = part
            .iter()
            .fold(0, |word, byte| word << 8 | u64::from(*byte));
        weight = (weight ^ part)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(29);
    }
    weight
}

/// How many buckets there are.
pub const BUCKETS: usize = 4096;

/// Members of a small set that may lie in one bucket, by whatever chance.
const BESIDE_MAX: usize = 1024;

/// Room that a bucket gets at once, and keeps at most twice.
const GROWTH: usize = 8;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// Few enough that changes meet, some sharing a bucket.
    fn hash(n: u8) -> StorePathHash {
        let mut bytes = [n; 20];
        bytes[0] = n % 3;
        StorePathHash(bytes)
    }

    proptest! {
        #[test]
        fn does_what_a_set_does(changes in prop::collection::vec((any::<u8>(), any::<bool>()), 0..400)) {
            let (mut ours, mut theirs) = (HashSet::new(), BTreeSet::new());
            for (n, add) in changes {
                if add {
                    prop_assert_eq!(ours.insert(hash(n)), theirs.insert(hash(n)));
                } else {
                    prop_assert_eq!(ours.remove(&hash(n)), theirs.remove(&hash(n)));
                }
                prop_assert_eq!(ours.contains(&hash(n)), theirs.contains(&hash(n)));
            }
            prop_assert_eq!(ours.len(), theirs.len());
            prop_assert!(ours.iter().eq(theirs.iter()));
            // The same set by another road has the same sum.
            let again: HashSet = theirs.into_iter().rev().collect();
            prop_assert_eq!(again.checksum(), ours.checksum());
            prop_assert!(again == ours);
        }
    }

    #[test]
    fn a_million_fit_into_their_bound() {
        let mut random = fastrand::Rng::with_seed(1);
        let mut set = HashSet::new();
        for _ in 0..1_000_000 {
            let mut hash = [0; 20];
            random.fill(&mut hash);
            set.insert(StorePathHash(hash));
        }
        assert_eq!(set.len(), 1_000_000);
        assert!(set.size_bytes() < 24 << 20, "{} bytes", set.size_bytes());
    }
}
