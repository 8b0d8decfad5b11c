//! The encoder of one NAR, step by step.
//!
//! It turns the bytes of one NAR, in order, into one zstd frame with content size and checksum, or one xz
//! stream of one block with CRC-64. It is slow (zstd: 150 to 250 MB/s of programs; xz 1: 46 MB/s, 3 MB/s of random
//! bytes): call it from a blocking thread, as [`super::compression`] does. Formats: RFC 8878 (zstd) and "The .xz File
//! Format".
//!
//! In a large NAR zstd looks 32 MiB back for what came before (long-distance matching), and by default at a quick
//! level. CPU of one thread in s/GB, and how much smaller the data gets:
//!
//! | | programs and headers | gcc | Python | rustc |
//! |---|---|---|---|---|
//! | level 3, no long distance | 7.2, 3.11 | 6.8, 2.85 | 6.4, 3.61 | 6.4, 2.68 |
//! | level 1, long distance, zstd's own way, as harmonia 3.2 | 3.5, 3.90 | 5.1, 2.67 | 4.9, 3.64 | 5.2, 2.43 |
//! | level 1, long distance, as here | 3.8, 3.96 | 3.9, 2.71 | 3.6, 3.66 | 4.1, 2.49 |

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
    /// zstd, 1 to 19; `None`: 3, and 1 for a large NAR, of which it makes up to a tenth more, or less where much
    /// comes again, in some six tenths of the time.
    ///
    /// Memory of one transfer, batches included: 3 MiB (1), 4 MiB (3), 15 MiB (9), 90 MiB (19); of a large NAR
    /// 38 MiB (1 to 3), 50 MiB (9), 120 MiB (19). How many there are at once is bounded by what their holders are
    /// asked for at once.
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

    /// Tells whether the encoder takes some nanoseconds for a byte, and not tens.
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

/// Tells whether zstd looks far back in a NAR of so many bytes.
pub(super) const fn is_large(nar_size: u64) -> bool {
    nar_size > LARGE_BYTES
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
                    // One place of 2^8 is noted, in a table of 512 KiB: zstd's own takes longer than it gains.
                    encoder.set_parameter(CParameter::LdmHashRateLog(8))?;
                    encoder.set_parameter(CParameter::LdmHashLog(16))?;
                    if levels.zstd.is_none() {
                        // Level 1 has 7, and finds less in no less time.
                        encoder.set_parameter(CParameter::MinMatch(6))?;
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

/// A NAR of more bytes is large.
const LARGE_BYTES: u64 = 8 << 20;

/// Base-2 logarithm of the bytes that zstd looks back in a large NAR: 32 MiB. zstd(1) and libarchive, with which Nix
/// reads, take up to 128 MiB.
pub(super) const WINDOW_LOG: u32 = 25;

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
    fn a_large_nar_is_searched_for_matches_that_lie_far_apart() {
        // Nothing of it comes twice but all of it, so many bytes later.
        let mut state = 1_u64;
        let mut random = || {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            state.to_be_bytes()[0]
        };
        let apart = 20 << 20;
        let part: Vec<u8> = (0..apart).map(|_| random()).collect();
        let nar = [&part[..], &part[..]].concat();
        for zstd in [None, Some(1), Some(3), Some(9)] {
            let levels = Levels { zstd, xz: 1 };
            let encoder = Compressor::new(Encoding::Zstd, levels, nar.len() as u64);
            let mut encoder = encoder.unwrap().unwrap();
            for chunk in nar.chunks(300_000) {
                encoder.write(chunk).unwrap();
            }
            let file = encoder.finish().unwrap();
            assert!(file.len() < apart / 16 * 17, "{zstd:?}: {}", file.len());
            // As a decoder that has room for no more of the past.
            let mut decoder = zstd::stream::read::Decoder::new(&file[..]).unwrap();
            decoder.window_log_max(WINDOW_LOG).unwrap();
            let mut read = Vec::new();
            io::copy(&mut decoder, &mut read).unwrap();
            assert!(read == nar, "{zstd:?}");
        }
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
