//! Whether one kept NAR is what its narinfo promises: file hash and size, NAR hash, size and grammar.
//!
//! The file is read once, in constant memory. It does not judge signatures: which keys are ours may
//! have changed, and the NAR is right or wrong all the same.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read};

use sha2::{Digest as _, Sha256};

use super::super::backend::Record;
use crate::codec::digest::NarDigest;
use crate::nix::nar::NarParser;

/// What was found of one NAR.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is as promised.
    Right,
    /// It is not, for this reason.
    Wrong(String),
}

/// Reads the file of a record to its end; `Err` when the system failed, which says nothing of the file.
pub fn verify(file: File, record: &Record) -> io::Result<Verdict> {
    let hashing = Hashing {
        file,
        sha256: Sha256::new(),
        size: 0,
    };
    let reader = BufReader::with_capacity(BUFFER_BYTES, hashing);
    let mut decoder = zstd::stream::read::Decoder::with_buffer(reader)?;
    decoder.window_log_max(WINDOW_LOG_MAX)?;
    let mut fault = decode(&mut decoder, record)?;
    // What the decoder left is part of the file, too.
    let mut reader = decoder.finish();
    loop {
        let bytes = reader.fill_buf()?.len();
        if bytes == 0 {
            break;
        }
        reader.consume(bytes);
    }
    let Hashing { sha256, size, .. } = reader.into_inner();
    if let Some(expected) = record.file {
        let hash: [u8; 32] = sha256.finalize().into();
        if size != expected.size_bytes {
            fault = Some(format!(
                "the file has {size} of {} bytes",
                expected.size_bytes
            ));
        } else if hash != expected.hash.0 {
            fault = Some("the file has another hash than its narinfo says".to_owned());
        }
    }
    Ok(fault.map_or(Verdict::Right, Verdict::Wrong))
}

/// Decodes the NAR as far as it is right; returns what is wrong with it.
fn decode(decoder: &mut impl Read, record: &Record) -> io::Result<Option<String>> {
    let size = record.info.nar_size;
    let mut parser = NarParser::with_size_max(size);
    let mut digest = NarDigest::default();
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let count = match decoder.read(&mut buffer) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // The file system's errors have numbers, the decoder's have none.
            Err(error) if error.raw_os_error().is_some() => return Err(error),
            Err(error) => return Ok(Some(format!("it cannot be decompressed: {error}"))),
        };
        let chunk = buffer.get(..count).unwrap_or_default();
        if chunk.is_empty() {
            break;
        }
        if chunk.len() as u64 > size - digest.size() {
            return Ok(Some(format!("the nar has more than {size} bytes")));
        }
        digest.update(chunk);
        if let Err(error) = parser.push(chunk) {
            return Ok(Some(error.to_string()));
        }
    }
    Ok(if digest.size() != size {
        Some(format!("the nar has {} of {size} bytes", digest.size()))
    } else if parser.offset() != size {
        Some(format!("the archive ends after {} bytes", parser.offset()))
    } else if digest.finish() != record.info.nar_hash {
        Some("the nar has another hash than its narinfo says".to_owned())
    } else {
        None
    })
}

/// A file that is hashed while it is read.
struct Hashing {
    file: File,
    sha256: Sha256,
    size: u64,
}

impl Read for Hashing {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read(buffer)?;
        self.sha256.update(buffer.get(..count).unwrap_or_default());
        self.size += count as u64;
        Ok(count)
    }
}

const BUFFER_BYTES: usize = 256 << 10;
/// 128 MiB, more than any of our levels takes.
const WINDOW_LOG_MAX: u32 = 27;

#[cfg(test)]
mod tests {
    use std::io::{Seek as _, Write as _};

    use super::*;
    use crate::cache::backend::NarFile;
    use crate::cache::nar_name::FileHash;
    use crate::nix::hash::NarHash;
    use crate::nix::path_info::PathInfo;

    /// The NAR of an empty file.
    const NAR: &[u8] = b"\x0d\0\0\0\0\0\0\0nix-archive-1\0\0\0\
        \x01\0\0\0\0\0\0\0(\0\0\0\0\0\0\0\
        \x04\0\0\0\0\0\0\0type\0\0\0\0\
        \x07\0\0\0\0\0\0\0regular\0\
        \x08\0\0\0\0\0\0\0contents\0\0\0\0\0\0\0\0\
        \x01\0\0\0\0\0\0\0)\0\0\0\0\0\0\0";

    fn judge(nar: &[u8], file: &[u8], change: impl FnOnce(&mut Record)) -> Verdict {
        let mut record = Record {
            info: PathInfo {
                path: "1q8w6gl1ll0mwfkqc3c2yx005s6wwfrl-empty".parse().unwrap(),
                nar_hash: NarHash::of(nar),
                nar_size: nar.len() as u64,
                references: vec![],
                deriver: None,
                signatures: vec![],
                ca: None,
            },
            grounds: vec![],
            file: Some(NarFile {
                hash: FileHash(Sha256::digest(file).into()),
                size_bytes: file.len() as u64,
            }),
        };
        change(&mut record);
        let mut opened = tempfile::tempfile().unwrap();
        opened.write_all(file).unwrap();
        opened.rewind().unwrap();
        verify(opened, &record).unwrap()
    }

    #[test]
    fn only_what_agrees_in_all_is_right() {
        let file = zstd::encode_all(NAR, 3).unwrap();
        assert_eq!(judge(NAR, &file, |_| ()), Verdict::Right);
        let wrong = |verdict: Verdict, cause: &str| match verdict {
            Verdict::Wrong(found) => assert!(found.contains(cause), "{found}"),
            Verdict::Right => panic!("it is not right: {cause}"),
        };
        let cut = &file[..file.len() - 1];
        wrong(judge(NAR, cut, |_| ()), "cannot be decompressed");
        wrong(judge(NAR, NAR, |_| ()), "cannot be decompressed");
        let size = |delta: i64| {
            move |r: &mut Record| r.info.nar_size = r.info.nar_size.wrapping_add_signed(delta)
        };
        wrong(judge(NAR, &file, size(1)), "has 112 of 113 bytes");
        wrong(judge(NAR, &file, size(-1)), "more than 111 bytes");
        wrong(
            judge(NAR, &file, |r| r.info.nar_hash.0[0] ^= 1),
            "the nar has another hash",
        );
        let file_of = |r: &mut Record, change: fn(&mut NarFile)| r.file.iter_mut().for_each(change);
        wrong(
            judge(NAR, &file, |r| file_of(r, |f| f.hash.0[0] ^= 1)),
            "the file has another hash",
        );
        wrong(
            judge(NAR, &file, |r| file_of(r, |f| f.size_bytes += 1)),
            "the file has",
        );
        let text = zstd::encode_all(&b"no archive"[..], 3).unwrap();
        wrong(judge(b"no archive", &text, |_| ()), "malformed NAR");
        let longer = [NAR, b"12345678"].concat();
        let trailing = zstd::encode_all(longer.as_slice(), 3).unwrap();
        wrong(judge(&longer, &trailing, |_| ()), "ends after 112 bytes");
    }
}
