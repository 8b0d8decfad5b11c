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
