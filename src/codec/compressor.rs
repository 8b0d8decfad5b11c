//! The encoder of one NAR, step by step.
//!
//! It turns the bytes of one NAR, in order, into one zstd frame with content size and checksum, or one xz
//! stream of one block with CRC-64. It is slow (zstd 2: about 150 MB/s; xz 1: 46 MB/s of programs, 3 MB/s of
//! random bytes): call it from a blocking thread, as [`super::compression`] does. Formats: RFC 8878 (zstd) and "The .xz File Format".
//!
//! In a large NAR zstd looks for matches over [`WINDOW_LOG`] (long-distance matching), and by default with
//! tables that stay in a processor's own cache. Of 500 MiB of programs and headers that makes, by medians of four
//! runs of one thread in turn:
//!
//! | | CPU, s/GB | ratio |
//! |---|---|---|
//! | level 3 | 9.3 | 3.13 |
//! | level 2, long | 6.4 | 3.34 |
//! | level 1, long, window of 32 MiB, as harmonia 3.2 | 4.4 | 3.20 |
//! | level 1, long, other tables, as here | 4.1 | 3.22 |

use std::cell::RefCell;
use std::io::{self, Write as _};
use std::ops::RangeInclusive;

use liblzma::write::XzEncoder;
use zstd::stream::write::Encoder as ZstdEncoder;
use zstd::zstd_safe::CParameter;

use super::compression::Encoding;

/// How hard the encoders try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Levels {
    /// zstd, 1 to 19; `None`: 3, and less for a large NAR, where the longer window makes good for it.
    ///
    /// Memory of one transfer of a large NAR, batches included: 11 MiB (1 to 3), 23 MiB (9), 93 MiB (19).
    pub zstd: Option<i32>,
    /// xz, 0 to 9; likewise: 4 MiB (0), 9 MiB (1), 95 MiB (6), 674 MiB (9).
    pub xz: u32,
}

/// The encoder of one NAR; dropping it before [`Compressor::finish`] leaves a frame without end.
pub struct Compressor(State);

enum State {
    Zstd(ZstdEncoder<'static, Vec<u8>>),
    Xz(XzEncoder<Vec<u8>>),
}

impl Levels {
    /// Levels that zstd may have; beyond 19 it takes gigabytes.
    pub const ZSTD: RangeInclusive<i32> = 1..=19;
    /// Levels that xz may have.
    pub const XZ: RangeInclusive<u32> = 0..=9;

    /// Tells whether the encoder takes less than 4 ns for a byte.
    pub(super) fn are_quick(self, encoding: Encoding) -> bool {
        match encoding {
            Encoding::None => true,
            Encoding::Zstd => self.zstd.is_none_or(|level| level <= SMALL_LEVEL),
            Encoding::Xz => false,
        }
    }

    /// Returns zstd's level for a NAR of so many bytes.
    fn zstd_for(self, nar_size: u64) -> i32 {
        let (least, most) = Self::ZSTD.into_inner();
        match self.zstd {
            Some(level) => level.clamp(least, most),
            None if is_large(nar_size) => 1,
            None => SMALL_LEVEL,
        }
    }
}

impl Default for Levels {
    /// Levels that keep up with a network: what Nix itself makes with xz 6 takes twelve times as long.
    fn default() -> Self {
        Self { zstd: None, xz: 1 }
    }
}

/// Tells whether a NAR fills more than zstd's longest window.
pub(super) const fn is_large(nar_size: u64) -> bool {
    nar_size > 1 << WINDOW_LOG
}

impl Compressor {
    /// Starts the encoder of a NAR of `nar_size` bytes; `None` where there is nothing to encode.
    ///
    /// Levels outside of [`Levels::ZSTD`] and [`Levels::XZ`] are moved to the nearest inside.
    pub fn new(encoding: Encoding, levels: Levels, nar_size: u64) -> io::Result<Option<Self>> {
        Ok(match encoding {
            Encoding::None => None,
            Encoding::Zstd => {
                let mut encoder = ZstdEncoder::new(Vec::new(), levels.zstd_for(nar_size))?;
                if is_large(nar_size) {
                    encoder.long_distance_matching(true)?;
                    encoder.window_log(WINDOW_LOG)?;
                    if levels.zstd.is_none() {
                        for parameter in LARGE_TABLES {
                            encoder.set_parameter(parameter)?;
                        }
                    }
                }
                encoder.include_checksum(true)?;
                encoder.include_contentsize(true)?;
                // A promise too: `finish` fails when other than so many bytes were written.
                encoder.set_pledged_src_size(Some(nar_size))?;
                Some(Self(State::Zstd(encoder)))
            }
            Encoding::Xz => {
                let (least, most) = Levels::XZ.into_inner();
                let encoder = XzEncoder::new(Vec::new(), levels.xz.clamp(least, most));
                Some(Self(State::Xz(encoder)))
            }
        })
    }

    /// Takes the next bytes of the NAR.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.0 {
            State::Zstd(encoder) => encoder.write_all(bytes),
            State::Xz(encoder) => encoder.write_all(bytes),
        }
    }

    /// Takes away what is encoded so far, perhaps nothing.
    pub fn take(&mut self) -> Vec<u8> {
        match &mut self.0 {
            State::Zstd(encoder) => std::mem::take(encoder.get_mut()),
            State::Xz(encoder) => std::mem::take(encoder.get_mut()),
        }
    }

    /// Writes the end of the frame and returns what was not taken away.
    pub fn finish(self) -> io::Result<Vec<u8>> {
        match self.0 {
            State::Zstd(encoder) => encoder.finish(),
            State::Xz(encoder) => encoder.finish(),
        }
    }
}

/// Encodes a small NAR at one go with an encoder that its thread keeps: to make one takes longer than to use it.
///
/// What it keeps grows with the largest NAR that it has seen: 0.5 MiB after 32 KiB. `None` where there is
/// nothing to encode, or no encoder is kept for this encoding.
pub fn encode_small(encoding: Encoding, levels: Levels, nar: &[u8]) -> io::Result<Option<Vec<u8>>> {
    if encoding != Encoding::Zstd {
        return Ok(None);
    }
    let level = levels.zstd_for(nar.len() as u64);
    KEPT.with_borrow_mut(|kept| {
        let compressor = match kept {
            Some((of, compressor)) if *of == level => compressor,
            _ => {
                let mut compressor = zstd::bulk::Compressor::new(level)?;
                compressor.include_checksum(true)?;
                compressor.include_contentsize(true)?;
                &mut kept.insert((level, compressor)).1
            }
        };
        compressor.compress(nar).map(Some)
    })
}

/// Of the level at which a NAR is encoded that is not large.
const SMALL_LEVEL: i32 = 3;

/// What becomes of level 1 for a large NAR: matches of 6 bytes, not 7, with tables of 64 KiB for near ones and of
/// 256 KiB for far ones.
const LARGE_TABLES: [CParameter; 3] = [
    CParameter::MinMatch(6),
    CParameter::HashLog(14),
    CParameter::LdmHashLog(15),
];

/// Base-2 logarithm of the bytes that matches may lie apart in a large NAR, 8 MiB: no decoder asks for leave
/// below 128 MiB, and levels up to 19 have no longer one of their own.
const WINDOW_LOG: u32 = 23;

thread_local! {
    /// The encoder of this thread, and its level.
    static KEPT: RefCell<Option<(i32, zstd::bulk::Compressor<'static>)>> = const { RefCell::new(None) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_nars_are_encoded_alike_whatever_was_encoded_before() {
        let nars: Vec<Vec<u8>> = (0..40_usize)
            .map(|n| {
                (0..n * 800)
                    .map(|i| u8::try_from(i / 7 % (n + 1)).unwrap())
                    .collect()
            })
            .collect();
        let encode = |level, nar: &Vec<u8>| {
            let levels = Levels {
                zstd: Some(level),
                xz: 1,
            };
            encode_small(Encoding::Zstd, levels, nar).unwrap().unwrap()
        };
        let first: Vec<_> = nars.iter().map(|nar| encode(3, nar)).collect();
        for (nar, file) in nars.iter().zip(&first).rev() {
            encode(1, nar);
            assert_eq!(&encode(3, nar), file);
            assert_eq!(&zstd::decode_all(&file[..]).unwrap(), nar);
            // Its size is in the frame, and its last four bytes are a checksum.
            assert_eq!(
                zstd::zstd_safe::get_frame_content_size(file).ok().flatten(),
                Some(nar.len() as u64)
            );
            let mut damaged = file.clone();
            *damaged.last_mut().unwrap() ^= 1;
            assert!(zstd::decode_all(&damaged[..]).is_err());
            // A part of a kept file that is gone is made anew by the other one.
            let levels = Levels {
                zstd: Some(3),
                xz: 1,
            };
            let other = Compressor::new(Encoding::Zstd, levels, nar.len() as u64);
            let mut other = other.unwrap().unwrap();
            other.write(nar).unwrap();
            assert_eq!(&other.finish().unwrap(), file);
        }
        let none = encode_small(Encoding::Xz, Levels::default(), &[0]);
        assert!(none.unwrap().is_none());
    }

    #[test]
    fn a_wrong_promise_of_size_is_no_frame() {
        for actual in [9, 11] {
            let zstd = Compressor::new(Encoding::Zstd, Levels::default(), 10);
            let mut zstd = zstd.unwrap().unwrap();
            let written = zstd.write(&vec![0; actual]).and_then(|()| zstd.finish());
            assert!(written.is_err(), "{actual}");
        }
    }

    #[test]
    fn levels_outside_of_the_range_are_moved_inside() {
        for (zstd, xz) in [(i32::MIN, 0), (1_000, 1_000)] {
            let levels = Levels {
                zstd: Some(zstd),
                xz,
            };
            for encoding in [Encoding::Zstd, Encoding::Xz] {
                assert!(Compressor::new(encoding, levels, 1).unwrap().is_some());
            }
        }
    }
}
