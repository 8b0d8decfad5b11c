//! The check of a compressed NAR that is passed on as it is: of the file, and of the NAR inside.
//!
//! The file is decoded on the side, step by step, and the decoded bytes are thrown away once they are hashed; so
//! it takes what [`super::decompressor`] says and no more, however much the file unpacks to: it is given
//! up with the first byte that is too many. Whoever passes the file on holds back its last chunk until
//! [`FileCheck::end`] finds all of it right; as the bytes that complete the NAR are judged before the chunk with
//! them comes back, nobody ever gets the whole of a wrong one.

use std::io;

use sha2::{Digest as _, Sha256};

use super::decompressor::Decompressor;
use super::digest::{NarDigest, Proof as _};
use crate::nix::hash::NarHash;
use crate::nix::narinfo::Compression;

/// What a file must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Promise {
    /// Hash of the NAR inside.
    pub nar_hash: NarHash,
    /// Size of the NAR inside in bytes.
    pub nar_size: u64,
    /// SHA-256 of the file, where it is known.
    pub file_hash: Option<[u8; 32]>,
    /// Size of the file in bytes, where it is known.
    pub file_size: Option<u64>,
}

/// The check of one file from its first byte to its last.
pub struct FileCheck {
    promise: Promise,
    decoder: Decompressor,
    nar: NarDigest,
    file: Sha256,
    file_size: u64,
    room: Vec<u8>,
}

/// Whether more is to come of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// No: all is there and right.
    Whole,
    /// Yes: what came is its beginning.
    Early,
}

/// Why a file is not the promised one.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It is not what the compression makes, or asks for too much memory.
    #[error("the compressed file is damaged: {0}")]
    Damaged(#[source] io::Error),
    /// The NAR inside goes on behind its end.
    #[error("the nar has more than the {expected} bytes that were promised")]
    NarLong {
        /// Bytes promised.
        expected: u64,
    },
    /// The NAR inside has the right size and another content.
    #[error("the nar hashes to {actual}, but {expected} was promised")]
    NarMismatch {
        /// Hash of what came.
        actual: NarHash,
        /// Hash promised.
        expected: NarHash,
    },
    /// The file has the right size, but the NAR inside is not complete.
    #[error("the file ends after {actual} of {expected} bytes of the nar")]
    NarShort {
        /// Bytes that came.
        actual: u64,
        /// Bytes promised.
        expected: u64,
    },
    /// The NAR inside is right, the file has another size.
    #[error("the file has {actual} bytes or more, but {expected} were promised")]
    FileSize {
        /// Bytes that came.
        actual: u64,
        /// Bytes promised.
        expected: u64,
    },
    /// The NAR inside is right, the file has another hash.
    #[error("the file has another hash than was promised")]
    FileHash,
}

impl FileCheck {
    /// Begins at the first byte; `None` for a compression that is not read here.
    pub fn new(compression: Compression, promise: Promise) -> Option<Self> {
        Some(Self {
            promise,
            decoder: Decompressor::new(compression)?,
            nar: NarDigest::default(),
            file: Sha256::new(),
            file_size: 0,
            room: vec![0; STEP_BYTES],
        })
    }

    /// Takes up to 64 KiB off the file's next bytes, as far as it gets in some 100 µs.
    ///
    /// To be called until it returns false: then all of `input` is checked as far as can be told.
    /// After an error nothing more can be said.
    pub fn step(&mut self, input: &mut &[u8]) -> Result<bool, FileError> {
        let (before, _) = input.split_at(input.len().min(INPUT_BYTES));
        let mut rest = before;
        let size = self.decoder.decode(&mut rest, &mut self.room);
        let size = size.map_err(FileError::Damaged)?;
        let (read, _) = before.split_at(before.len() - rest.len());
        self.file_size += read.len() as u64;
        if self.promise.file_hash.is_some() {
            self.file.update(read);
        }
        if let Some(expected) = self.promise.file_size.filter(|size| self.file_size > *size) {
            let actual = self.file_size;
            return Err(FileError::FileSize { actual, expected });
        }
        let (_, left) = input.split_at(read.len());
        *input = left;
        self.judge_nar(size)?;
        Ok(!input.is_empty() || size == self.room.len())
    }

    /// Judges the file's end, `Early` when more of it must come.
    pub fn end(&self) -> Result<End, FileError> {
        let (actual, expected) = (self.nar.size(), self.promise.nar_size);
        if actual < expected || !self.decoder.may_end() {
            return match self.promise.file_size {
                Some(size) if size == self.file_size => {
                    Err(FileError::NarShort { actual, expected })
                }
                _ => Ok(End::Early),
            };
        }
        let actual = self.file_size;
        if let Some(expected) = self.promise.file_size.filter(|size| actual != *size) {
            return Err(FileError::FileSize { actual, expected });
        }
        let hash: [u8; 32] = self.file.clone().finalize().into();
        match self.promise.file_hash {
            Some(expected) if expected != hash => Err(FileError::FileHash),
            _ => Ok(End::Whole),
        }
    }

    /// Returns what the file must be.
    pub fn promise(&self) -> &Promise {
        &self.promise
    }

    /// Returns the bytes of the NAR that were decoded so far.
    pub fn nar_bytes(&self) -> u64 {
        self.nar.size()
    }

    /// Hashes what was decoded, and compares the hash once the NAR is complete.
    fn judge_nar(&mut self, size: usize) -> Result<(), FileError> {
        let expected = self.promise.nar_size;
        if size as u64 > expected - self.nar.size() {
            return Err(FileError::NarLong { expected });
        }
        let (decoded, _) = self.room.split_at(size);
        self.nar.update(decoded);
        if size == 0 || self.nar.size() < expected {
            return Ok(());
        }
        let expected = self.promise.nar_hash;
        let judged = self.nar.judge(expected);
        judged.map_err(|actual| FileError::NarMismatch { actual, expected })
    }
}

/// Decoded at one go: some 60 µs of zstd, and as much of hashing.
const STEP_BYTES: usize = 64 << 10;

/// Read at one go: as much of hashing again, where nothing is compressed away.
const INPUT_BYTES: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    fn nar() -> Vec<u8> {
        let mut random = fastrand::Rng::with_seed(8);
        let mut nar = vec![0; 300_000];
        for block in nar.chunks_mut(1000).step_by(2) {
            random.fill(block);
        }
        nar
    }

    fn file(nar: &[u8]) -> Vec<u8> {
        zstd::encode_all(nar, 3).unwrap()
    }

    fn promise(nar: &[u8], file: Option<&[u8]>) -> Promise {
        Promise {
            nar_hash: NarHash::of(nar),
            nar_size: nar.len() as u64,
            file_hash: file.map(|file| NarHash::of(file).0),
            file_size: file.map(|file| file.len() as u64),
        }
    }

    /// Checks a file in chunks of this size; how it ended, and how many chunks before that were found right.
    fn check(promise: Promise, file: &[u8], size: usize) -> (Result<End, FileError>, usize) {
        let mut check = FileCheck::new(Compression::Zstd, promise).unwrap();
        let mut right = 0;
        for mut chunk in file.chunks(size) {
            loop {
                match check.step(&mut chunk) {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(error) => return (Err(error), right),
                }
            }
            assert!(chunk.is_empty());
            right += 1;
        }
        (check.end(), right)
    }

    #[test]
    fn the_promised_file_passes_in_any_chunks() {
        let nar = nar();
        let whole = file(&nar);
        let several = [file(&nar[..1000]), vec![], file(&nar[1000..])].concat();
        for size in [1000, 65_537, 1 << 20] {
            for promise in [promise(&nar, None), promise(&nar, Some(&whole))] {
                let (end, _) = check(promise, &whole, size);
                assert_eq!(end.unwrap(), End::Whole);
            }
            let (end, _) = check(promise(&nar, Some(&several)), &several, size);
            assert_eq!(end.unwrap(), End::Whole);
        }
        let (end, _) = check(promise(&nar, Some(&whole)), &whole[..whole.len() - 1], 9000);
        assert_eq!(end.unwrap(), End::Early);
        let (end, _) = check(promise(&nar, None), &[], 1);
        assert_eq!(end.unwrap(), End::Early);
        // As long as it was said to be, and yet its last block is not there.
        let open = &whole[..whole.len() - 1];
        let (end, _) = check(promise(&nar, Some(open)), open, 9000);
        assert!(matches!(end, Err(FileError::NarShort { .. })));
        let nothing = file(b"");
        let (end, _) = check(promise(b"", Some(&nothing)), &nothing, 1);
        assert_eq!(end.unwrap(), End::Whole);
    }

    #[test]
    fn the_chunk_that_completes_a_wrong_nar_never_comes_back_as_right() {
        let (nar, mut other) = (nar(), nar());
        other[7] ^= 1;
        let lie = file(&other);
        let (end, right) = check(promise(&nar, None), &lie, 1000);
        assert!(matches!(end, Err(FileError::NarMismatch { .. })));
        let given = &lie[..right * 1000];
        assert!(zstd::decode_all(given).is_err());
        // With a second, empty frame behind it, too: the whole NAR is before the last chunk.
        let padded = [lie, file(b"")].concat();
        let (end, right) = check(promise(&nar, None), &padded, 1000);
        assert!(matches!(end, Err(FileError::NarMismatch { .. })));
        assert!(zstd::decode_all(&padded[..right * 1000]).is_err());
    }

    #[test]
    fn a_bomb_is_given_up_with_the_first_byte_that_is_too_many() {
        let bomb = file(&vec![0; 64 << 20]);
        let promise = promise(&[0; 1000], None);
        let mut check = FileCheck::new(Compression::Zstd, promise).unwrap();
        let error = check.step(&mut &*bomb).unwrap_err();
        assert!(matches!(error, FileError::NarLong { expected: 1000 }));
    }

    #[test]
    fn another_file_with_the_same_nar_is_told_apart() {
        let nar = nar();
        let (first, second) = (file(&nar), zstd::encode_all(&*nar, 9).unwrap());
        let mut by_hash = promise(&nar, Some(&first));
        by_hash.file_size = None;
        assert!(matches!(
            check(by_hash, &second, 5000).0,
            Err(FileError::FileHash)
        ));
        for off in [-1, 1] {
            let mut by_size = promise(&nar, Some(&first));
            by_size.file_hash = None;
            by_size.file_size = (first.len() as u64).checked_add_signed(off);
            let (end, _) = check(by_size, &first, 5000);
            assert!(matches!(end, Err(FileError::FileSize { .. })));
        }
        assert!(matches!(
            check(promise(&nar, None), b"no zstd at all", 5).0,
            Err(FileError::Damaged(_))
        ));
    }
}
