//! The compressions that NARs are served in, and the encoders that make them.
//!
//! A [`Compressor`] turns the bytes of one NAR, in order, into one zstd frame or one xz stream. It is
//! synchronous and slow (zstd 3: about 470 MB/s, xz 1: about 46 MB/s); [`super::encoder`] runs it off the
//! async threads. What upstreams send is not read here. Formats: RFC 8878 (zstd) and the ".xz File Format".

use std::io::{self, Write as _};
use std::ops::RangeInclusive;

use liblzma::write::XzEncoder;
use zstd::stream::write::Encoder as ZstdEncoder;

use crate::nix::narinfo::Compression;

/// How a NAR is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// The NAR itself.
    None,
    /// One zstd frame with content size and checksum.
    Zstd,
    /// One xz stream of one block with CRC-64, as `xz` writes it.
    Xz,
}

/// How hard the encoders try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Levels {
    /// zstd, 1 to 19; memory per encoder about 1 MiB (1), 4 MiB (3), 90 MiB (19).
    pub zstd: i32,
    /// xz, 0 to 9; memory per encoder about 4 MiB (0), 9 MiB (1), 94 MiB (6), 674 MiB (9).
    pub xz: u32,
}

/// The encoder of one NAR; dropping it before [`Compressor::finish`] leaves a frame without end.
pub struct Compressor(State);

enum State {
    Zstd(ZstdEncoder<'static, Vec<u8>>),
    Xz(XzEncoder<Vec<u8>>),
}

impl Encoding {
    /// Every encoding.
    pub const ALL: [Self; 3] = [Self::None, Self::Zstd, Self::Xz];

    /// Reads Nix's name: `none`, `zstd` or `xz`.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|e| e.name() == name)
    }

    /// Returns Nix's name, as the `Compression` line has it.
    pub const fn name(self) -> &'static str {
        self.compression().name()
    }

    /// Returns the value for a narinfo.
    pub const fn compression(self) -> Compression {
        match self {
            Self::None => Compression::None,
            Self::Zstd => Compression::Zstd,
            Self::Xz => Compression::Xz,
        }
    }

    /// Returns the end of the file name: `.nar`, `.nar.zst` or `.nar.xz`.
    pub const fn suffix(self) -> &'static str {
        match self {
            Self::None => ".nar",
            Self::Zstd => ".nar.zst",
            Self::Xz => ".nar.xz",
        }
    }

    /// Splits a file name into what precedes the suffix and the encoding that the suffix names.
    pub fn split_suffix(file: &str) -> Option<(&str, Self)> {
        let split = |e: Self| file.strip_suffix(e.suffix()).map(|stem| (stem, e));
        Self::ALL.into_iter().find_map(split)
    }

    /// Starts the encoder of a NAR of `nar_size` bytes; `None` where there is nothing to encode.
    ///
    /// Levels outside of [`Levels::ZSTD`] and [`Levels::XZ`] are moved to the nearest inside.
    pub fn compressor(self, levels: Levels, nar_size: u64) -> io::Result<Option<Compressor>> {
        Ok(match self {
            Self::None => None,
            Self::Zstd => {
                let (least, most) = Levels::ZSTD.into_inner();
                let mut encoder = ZstdEncoder::new(Vec::new(), levels.zstd.clamp(least, most))?;
                encoder.include_checksum(true)?;
                encoder.include_contentsize(true)?;
                // A promise too: `finish` fails when other than so many bytes were written.
                encoder.set_pledged_src_size(Some(nar_size))?;
                Some(Compressor(State::Zstd(encoder)))
            }
            Self::Xz => {
                let (least, most) = Levels::XZ.into_inner();
                let encoder = XzEncoder::new(Vec::new(), levels.xz.clamp(least, most));
                Some(Compressor(State::Xz(encoder)))
            }
        })
    }
}

impl Levels {
    /// Levels that zstd may have; beyond 19 it takes gigabytes.
    pub const ZSTD: RangeInclusive<i32> = 1..=19;
    /// Levels that xz may have.
    pub const XZ: RangeInclusive<u32> = 0..=9;
}

impl Default for Levels {
    /// Levels that keep up with a network: what Nix itself makes with xz 6 takes twelve times as long.
    fn default() -> Self {
        Self { zstd: 3, xz: 1 }
    }
}

impl Compressor {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_name_the_encoding() {
        for encoding in Encoding::ALL {
            let file = format!("a.b{}", encoding.suffix());
            assert_eq!(Encoding::split_suffix(&file), Some(("a.b", encoding)));
            assert_eq!(Encoding::parse(encoding.name()), Some(encoding));
            assert_eq!(
                Compression::parse(encoding.name()),
                Some(encoding.compression())
            );
        }
        for file in ["a", "a.nar.bz2", "a.zst", ""] {
            assert_eq!(Encoding::split_suffix(file), None);
        }
        assert_eq!(Encoding::parse("bzip2"), None);
    }

    #[test]
    fn a_wrong_promise_of_size_is_no_frame() {
        for actual in [9, 11] {
            let levels = Levels::default();
            let mut zstd = Encoding::Zstd.compressor(levels, 10).unwrap().unwrap();
            let written = zstd.write(&vec![0; actual]).and_then(|()| zstd.finish());
            assert!(written.is_err(), "{actual}");
        }
    }
}
