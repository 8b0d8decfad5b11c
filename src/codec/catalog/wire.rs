//! The catalog's feed as bytes: frames of at most 64 KiB behind a line that names the version.
//!
//! ```text
//! feed    = "muster-catalog-1\n" { frame }
//! frame   = kind (1 byte), length of the rest (4 bytes), rest; all numbers little-endian
//! 1 begin    store directory (text)                    a new whole begins, what was sent is void
//! 2 paths    hash parts, 20 bytes each                 of the whole, in any order
//! 3 change   1 added | 0 removed, hash parts           after the whole, or while it is sent
//! 4 beat     count (8), checksum (8), clock in ms (8)  all that was sent is what there is
//! ```
//!
//! The first beat after a `begin` says that the whole is complete. Unknown kinds are skipped, so that
//! later versions may add some. Decoding takes chunks cut anywhere and holds at most one frame.

use crate::nix::store_path::StorePathHash;

/// One message of a feed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// A new whole begins.
    Begin {
        /// The directory of the paths.
        store_dir: String,
    },
    /// Members of the whole.
    Paths(Vec<StorePathHash>),
    /// Paths that came.
    Added(Vec<StorePathHash>),
    /// Paths that went.
    Removed(Vec<StorePathHash>),
    /// All that was sent is what there is.
    Beat(Beat),
}

/// A heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Beat {
    /// How many paths there are.
    pub count: u64,
    /// Their checksum, see [`HashSet::checksum`](super::set::HashSet::checksum).
    pub checksum: u64,
    /// The sender's clock when it knew this, in milliseconds from any moment.
    pub clock_ms: u64,
}

/// Bytes that are no feed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FeedError {
    /// It does not begin with the line that names the version.
    #[error("it is no catalog, or one of another version")]
    Version,
    /// A frame is longer than the bound.
    #[error("a frame of {0} bytes")]
    Length(usize),
    /// A frame's content has not the form of its kind.
    #[error("a malformed frame of kind {0}")]
    Frame(u8),
    /// What was sent is not what the heartbeat says.
    #[error("it has lost its way: {0}")]
    Mismatch(&'static str),
}

/// Writes a frame at the end of a buffer; of paths, at most [`PATHS_MAX`] at a time.
pub fn encode(frame: &Frame, out: &mut Vec<u8>) {
    let start = out.len();
    out.extend([0; HEAD_BYTES]);
    let kind = match frame {
        Frame::Begin { store_dir } => {
            out.extend(store_dir.as_bytes());
            BEGIN
        }
        Frame::Paths(hashes) => {
            out.extend(hashes.iter().flat_map(|hash| hash.0));
            PATHS
        }
        Frame::Added(hashes) | Frame::Removed(hashes) => {
            out.push(u8::from(matches!(frame, Frame::Added(_))));
            out.extend(hashes.iter().flat_map(|hash| hash.0));
            CHANGE
        }
        Frame::Beat(beat) => {
            for number in [beat.count, beat.checksum, beat.clock_ms] {
                out.extend(number.to_le_bytes());
            }
            BEAT
        }
    };
    let length = u32::try_from(out.len() - start - HEAD_BYTES).unwrap_or(u32::MAX);
    let head = std::iter::once(kind).chain(length.to_le_bytes());
    for (byte, value) in out.iter_mut().skip(start).zip(head) {
        *byte = value;
    }
}

/// Reads a feed from chunks.
#[derive(Clone, Debug, Default)]
pub struct Decoder {
    unread: Vec<u8>,
    begun: bool,
}

impl Decoder {
    /// Takes a chunk and hands on the frames that it completes; after an error nothing makes sense.
    pub fn push(
        &mut self,
        chunk: &[u8],
        mut take: impl FnMut(Frame) -> Result<(), FeedError>,
    ) -> Result<(), FeedError> {
        // Whole frames at a time, so that at most one is held beside the chunk.
        for part in chunk.chunks(FRAME_BYTES_MAX) {
            self.unread.extend_from_slice(part);
            let mut read = 0;
            while let Some((frame, bytes)) = self.next(read)? {
                read += bytes;
                if let Some(frame) = frame {
                    take(frame)?;
                }
            }
            self.unread.drain(..read);
        }
        Ok(())
    }

    /// Reads the frame at an offset; `None`: it is not complete yet.
    fn next(&mut self, at: usize) -> Result<Option<(Option<Frame>, usize)>, FeedError> {
        let unread = self.unread.get(at..).unwrap_or_default();
        if !self.begun {
            let have = unread.len().min(VERSION.len());
            if unread.get(..have) != VERSION.get(..have) {
                return Err(FeedError::Version);
            }
            self.begun = have == VERSION.len();
            return Ok(self.begun.then_some((None, have)));
        }
        let Some(([kind, length @ ..], rest)) = unread.split_first_chunk::<HEAD_BYTES>() else {
            return Ok(None);
        };
        let length = usize::try_from(u32::from_le_bytes(*length)).unwrap_or(usize::MAX);
        if length > FRAME_BYTES_MAX {
            return Err(FeedError::Length(length));
        }
        let Some(content) = rest.get(..length) else {
            return Ok(None);
        };
        let frame = decode(*kind, content).ok_or(FeedError::Frame(*kind))?;
        Ok(Some((frame, HEAD_BYTES + length)))
    }
}

/// Reads a frame's content; `Some(None)`: of a kind that is not known.
fn decode(kind: u8, content: &[u8]) -> Option<Option<Frame>> {
    Some(Some(match kind {
        BEGIN => Frame::Begin {
            store_dir: std::str::from_utf8(content).ok()?.to_owned(),
        },
        PATHS => Frame::Paths(hashes(content)?),
        CHANGE => match content.split_first()? {
            (1, rest) => Frame::Added(hashes(rest)?),
            (0, rest) => Frame::Removed(hashes(rest)?),
            _ => return None,
        },
        BEAT => {
            let (numbers, []) = content.as_chunks::<8>() else {
                return None;
            };
            let [count, checksum, clock_ms] = numbers else {
                return None;
            };
            Frame::Beat(Beat {
                count: u64::from_le_bytes(*count),
                checksum: u64::from_le_bytes(*checksum),
                clock_ms: u64::from_le_bytes(*clock_ms),
            })
        }
        _ => return Some(None),
    }))
}

fn hashes(content: &[u8]) -> Option<Vec<StorePathHash>> {
    let (hashes, []) = content.as_chunks::<20>() else {
        return None;
    };
    Some(hashes.iter().copied().map(StorePathHash).collect())
}

/// How a feed begins.
pub const VERSION: &[u8] = b"muster-catalog-1\n";

/// Hash parts of one frame: so many fit.
pub const PATHS_MAX: usize = 3200;

const FRAME_BYTES_MAX: usize = 64 << 10;
const HEAD_BYTES: usize = 5;

const BEGIN: u8 = 1;
const PATHS: u8 = 2;
const CHANGE: u8 = 3;
const BEAT: u8 = 4;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frames() -> impl Strategy<Value = Frame> {
        let hashes = || prop::collection::vec(any::<[u8; 20]>().prop_map(StorePathHash), 0..50);
        prop_oneof![
            "/[a-z/]{0,20}".prop_map(|store_dir| Frame::Begin { store_dir }),
            hashes().prop_map(Frame::Paths),
            hashes().prop_map(Frame::Added),
            hashes().prop_map(Frame::Removed),
            any::<(u64, u64, u64)>().prop_map(|(count, checksum, clock_ms)| {
                Frame::Beat(Beat {
                    count,
                    checksum,
                    clock_ms,
                })
            }),
        ]
    }

    fn read(bytes: &[u8], cut: usize) -> Result<Vec<Frame>, FeedError> {
        let (mut decoder, mut read) = (Decoder::default(), vec![]);
        for chunk in bytes.chunks(cut) {
            decoder.push(chunk, |frame| {
                read.push(frame);
                Ok(())
            })?;
            assert!(decoder.unread.len() <= FRAME_BYTES_MAX + HEAD_BYTES);
        }
        Ok(read)
    }

    fn written(frames: &[Frame]) -> Vec<u8> {
        let mut bytes = VERSION.to_vec();
        for frame in frames {
            encode(frame, &mut bytes);
        }
        bytes
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_however_it_is_cut(
            sent in prop::collection::vec(frames(), 0..20),
            cut in 1..3000_usize,
        ) {
            prop_assert_eq!(read(&written(&sent), cut).unwrap(), sent);
        }

        #[test]
        fn mutated_bytes_are_refused_or_read_but_never_harm(
            sent in prop::collection::vec(frames(), 1..8),
            changes in prop::collection::vec(any::<(prop::sample::Index, u8)>(), 1..8),
            cut in 1..300_usize,
        ) {
            let mut bytes = written(&sent);
            for (at, value) in changes {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            // However it is cut, the same comes of it.
            let whole = read(&bytes, bytes.len());
            prop_assert_eq!(read(&bytes, cut), whole);
        }
    }

    #[test]
    fn another_version_and_too_long_frames_are_refused() {
        assert_eq!(read(b"muster-catalog-2\n", 100), Err(FeedError::Version));
        assert_eq!(read(b"<html>", 100), Err(FeedError::Version));
        let mut long = VERSION.to_vec();
        long.extend([PATHS, 0xff, 0xff, 0xff, 0xff]);
        assert!(matches!(read(&long, 7), Err(FeedError::Length(_))));
        let mut full = vec![];
        encode(
            &Frame::Paths(vec![StorePathHash([1; 20]); PATHS_MAX]),
            &mut full,
        );
        assert!(full.len() <= FRAME_BYTES_MAX);
    }

    #[test]
    fn kinds_of_later_times_are_skipped() {
        let mut bytes = VERSION.to_vec();
        bytes.extend([200, 3, 0, 0, 0, 1, 2, 3]);
        encode(&Frame::Added(vec![]), &mut bytes);
        assert_eq!(read(&bytes, 5).unwrap(), [Frame::Added(vec![])]);
    }
}
