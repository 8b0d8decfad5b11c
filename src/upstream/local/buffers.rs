//! Buffers of full chunks, used again while they are warm.
//!
//! A new buffer costs the system a page fault per 4 KiB when it is written, which is as dear as the
//! reading itself. One that was just sent is still in the processor's cache.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

/// Buffers that nobody uses. A clone is another handle on the same.
#[derive(Clone, Debug, Default)]
pub(super) struct Buffers(Arc<Mutex<Vec<Vec<u8>>>>);

/// A full chunk; its buffer goes back when the last who reads it is through.
struct Lent {
    bytes: Vec<u8>,
    home: Buffers,
}

impl Buffers {
    /// Gives an empty buffer for so many bytes, at most those of a chunk.
    pub(super) fn take(&self, bytes: u64) -> Vec<u8> {
        match usize::try_from(bytes) {
            Ok(bytes) if bytes < CHUNK_BYTES_MAX => Vec::with_capacity(bytes),
            _ => {
                let free = self.lock().pop();
                free.unwrap_or_else(|| Vec::with_capacity(CHUNK_BYTES_MAX))
            }
        }
    }

    /// Makes a chunk of a filled buffer.
    pub(super) fn freeze(&self, bytes: Vec<u8>) -> Bytes {
        if bytes.capacity() == CHUNK_BYTES_MAX && bytes.len() * 2 > CHUNK_BYTES_MAX {
            let home = self.clone();
            return Bytes::from_owner(Lent { bytes, home });
        }
        bytes.into()
    }

    fn give_back(&self, mut buffer: Vec<u8>) {
        buffer.clear();
        let mut free = self.lock();
        if free.len() < FREE_MAX {
            free.push(buffer);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.home.give_back(std::mem::take(&mut self.bytes));
    }
}

/// The bound of a stream's chunks.
pub(super) const CHUNK_BYTES_MAX: usize = 256 << 10;

/// Free buffers kept: 4 MiB, enough for what a few transfers have on their way.
const FREE_MAX: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_chunks_come_back_and_small_ones_are_small() {
        let buffers = Buffers::default();
        assert_eq!(buffers.take(100).capacity(), 100);
        let mut full = buffers.take(u64::MAX);
        full.resize(CHUNK_BYTES_MAX, 7);
        let address = full.as_ptr();
        let chunk = buffers.freeze(full);
        let part = chunk.slice(5..10);
        drop(chunk);
        assert_eq!(buffers.lock().len(), 0);
        assert_eq!(&part[..], [7; 5]);
        drop(part);
        let again = buffers.take(u64::MAX);
        assert!(again.is_empty() && again.as_ptr() == address);
    }
}
