//! Chunks that are held for a while: small ones are joined, as each costs more than a few bytes of it.

use bytes::{Bytes, BytesMut};

/// Joins a chunk to the last one that is held, where that is small; else it comes back, to be held beside it.
pub fn append(last: &mut Bytes, chunk: Bytes) -> Option<Bytes> {
    if last.len() >= SMALL_BYTES || last.len() + chunk.len() > JOINED_BYTES_MAX {
        return Some(chunk);
    }
    // Cut from a larger buffer it is copied, the first time alone.
    let joined = std::mem::take(last).try_into_mut();
    let mut joined = joined.unwrap_or_else(|shared| BytesMut::from(&*shared));
    joined.extend_from_slice(&chunk);
    *last = joined.freeze();
    None
}

/// Chunks below this are joined.
const SMALL_BYTES: usize = 32 << 10;

/// As much as any chunk has.
const JOINED_BYTES_MAX: usize = 256 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_joined_in_order_until_they_are_many() {
        let all: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
        let buffer = Bytes::from(all.clone());
        let mut held: Vec<Bytes> = vec![];
        let mut rest = buffer.clone();
        while !rest.is_empty() {
            let chunk = rest.split_to(rest.len().min(7));
            let apart = match held.last_mut() {
                Some(last) => append(last, chunk),
                None => Some(chunk),
            };
            held.extend(apart);
        }
        assert_eq!(held.concat(), all);
        assert_eq!(held.len(), all.len().div_ceil(SMALL_BYTES + 3), "{held:?}");
    }

    #[test]
    fn large_ones_stay_apart() {
        let large = Bytes::from(vec![1; JOINED_BYTES_MAX]);
        let mut last = Bytes::from_static(b"a");
        assert_eq!(append(&mut last, large.clone()).unwrap(), large);
        assert_eq!(last, "a");
        let mut last = large.clone();
        assert_eq!(append(&mut last, Bytes::from_static(b"a")).unwrap(), "a");
        assert_eq!(last.as_ptr(), large.as_ptr());
    }
}
