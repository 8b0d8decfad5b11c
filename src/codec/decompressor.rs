//! The decoder of one compressed file, step by step: what [`super::compressor`] and every other cache writes.
//!
//! It reads `none`, `xz` (also `lzma`), `zstd`, `bzip2`, `gzip` and `br`. Several frames, streams or members one
//! behind the other are one file, as their own programs have it; xz may be padded between them. Anything else
//! behind the end is an error, and so is a file that stops before its end.
//!
//! It is slow and takes memory as the file asks: call it from a blocking thread, as [`super::decompress`] does.
//!
//! ```text
//!          decodes     memory at most
//! zstd     2 GB/s      128 MiB (a window of 2^27, what `zstd --ultra -22` makes)
//! xz       30-260 MB/s 128 MiB (`xz -9` asks for 65)
//! gzip, br 300 MB/s    32 KiB, 16 MiB (a window of 2^24, the widest of RFC 7932)
//! bzip2    30 MB/s     4 MiB
//! ```
//!
//! How much comes out is the caller's to bound: it gives the room, and stops when it has enough.

use std::io;

use async_compression::codecs::DecodeV2;
use async_compression::codecs::brotli::BrotliDecoder;
use async_compression::codecs::bzip2::BzDecoder;
use async_compression::codecs::gzip::GzipDecoder;
use async_compression::codecs::xz::XzDecoder;
use async_compression::codecs::zstd::ZstdDecoder;
use async_compression::codecs::zstd::params::DParameter;
use async_compression::core::util::{PartialBuffer, WriteBuffer};

use crate::nix::narinfo::Compression;

/// The decoder of one file; dropping it at any point loses nothing but its own state.
pub struct Decompressor {
    /// `None`: the file is not compressed.
    codec: Option<Box<dyn DecodeV2 + Send>>,
    compression: Compression,
    place: Place,
    /// The last output came full, so more may be had without input.
    full: bool,
}

/// Where in the file the next byte of input is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Before the first byte.
    Start,
    /// In a frame, stream or member.
    Inside,
    /// Behind one; the file may end here.
    Behind,
    /// In the zero bytes that may follow an xz stream; likewise.
    Padding,
}

impl Decompressor {
    /// Starts a decoder; `None` for the compressions that nobody uses for NARs any more.
    pub fn new(compression: Compression) -> Option<Self> {
        let codec: Option<Box<dyn DecodeV2 + Send>> = match compression {
            Compression::None => None,
            Compression::Brotli => Some(Box::new(BrotliDecoder::new())),
            Compression::Bzip2 => Some(Box::new(BzDecoder::new())),
            Compression::Gzip => Some(Box::new(GzipDecoder::new())),
            Compression::Xz | Compression::Lzma => {
                Some(Box::new(XzDecoder::with_memlimit(XZ_BYTES_MAX)))
            }
            Compression::Zstd => {
                let window = DParameter::window_log_max(ZSTD_WINDOW_LOG_MAX);
                Some(Box::new(ZstdDecoder::new_with_params(&[window])))
            }
            Compression::Compress
            | Compression::Grzip
            | Compression::Lrzip
            | Compression::Lz4
            | Compression::Lzip
            | Compression::Lzop => return None,
        };
        Some(Self {
            codec,
            compression,
            place: Place::Start,
            full: false,
        })
    }

    /// Tells whether the decoder takes less than some 4 ns for a byte it gives out.
    pub fn is_quick(&self) -> bool {
        matches!(self.compression, Compression::None | Compression::Zstd)
    }

    /// Decodes until the input is used up or the output is full; returns the bytes written.
    ///
    /// `input` is moved on behind what was read. When the output came full, more may follow
    /// without further input, so call again before [`Decompressor::finish`].
    pub fn decode(&mut self, input: &mut &[u8], output: &mut [u8]) -> io::Result<usize> {
        let Some(codec) = &mut self.codec else {
            let size = input.len().min(output.len());
            let (now, later) = input.split_at(size);
            output.split_at_mut(size).0.copy_from_slice(now);
            *input = later;
            self.place = Place::Behind;
            return Ok(size);
        };
        let mut room = WriteBuffer::new_initialized(output);
        loop {
            if room.has_no_spare_space() {
                self.full = true;
                break;
            }
            if input.is_empty() && !self.full {
                break;
            }
            match self.place {
                Place::Behind if input.is_empty() => {
                    self.full = false;
                    break;
                }
                Place::Behind if self.compression == Compression::Brotli => {
                    return Err(invalid("there are bytes behind its end"));
                }
                Place::Behind => {
                    codec.reinit()?;
                    self.place = Place::Inside;
                }
                Place::Start if self.compression == Compression::Brotli && is_wide(input) => {
                    return Err(invalid("it asks for too much memory"));
                }
                Place::Start => self.place = Place::Inside,
                Place::Inside | Place::Padding => {}
            }
            let before = room.written_len();
            let mut part = PartialBuffer::new(*input);
            // With no input left, this one decoder is asked in another way.
            let ended = if input.is_empty() && self.compression == Compression::Gzip {
                codec.flush(&mut room)?;
                false
            } else {
                codec.decode(&mut part, &mut room)?
            };
            let (read, rest) = input.split_at(part.written_len());
            *input = rest;
            let wrote = room.written_len() > before;
            if ended {
                let padded = !wrote && !read.is_empty() && read.iter().all(|byte| *byte == 0);
                self.place = match self.compression {
                    Compression::Xz if padded => Place::Padding,
                    _ => Place::Behind,
                };
            } else if self.place == Place::Padding {
                self.place = Place::Inside;
            }
            if !wrote && read.is_empty() {
                self.full = false;
                if !ended && !input.is_empty() {
                    return Err(invalid("it leads nowhere"));
                }
            }
        }
        Ok(room.written_len())
    }

    /// Notes that the input was taken as it is, which [`Compression::None`] allows.
    pub(super) fn pass(&mut self) {
        self.place = Place::Behind;
    }

    /// Tells whether the file may end here.
    pub fn may_end(&self) -> bool {
        let sound = match self.place {
            Place::Behind | Place::Padding => true,
            Place::Start => self.codec.is_none(),
            Place::Inside => false,
        };
        sound && !self.full
    }

    /// Checks that the file may end here.
    pub fn finish(self) -> io::Result<()> {
        if self.may_end() {
            return Ok(());
        }
        let cause = "it stops before its end";
        Err(io::Error::new(io::ErrorKind::UnexpectedEof, cause))
    }
}

fn invalid(cause: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, cause)
}

/// Tells by its first byte whether a brotli stream is one of "large windows", of up to 1 GiB.
///
/// RFC 7932 has no such streams, but the decoder reads them and cannot be told not to.
fn is_wide(stream: &[u8]) -> bool {
    stream
        .first()
        .is_some_and(|first| first & 0x7f == BROTLI_LARGE_WINDOW)
}

/// What a brotli stream of RFC 7932 never begins with; the size of the window is in the next bits.
const BROTLI_LARGE_WINDOW: u8 = 0x11;

/// What `xz -9` makes can be read, and twice that; beyond it a few bytes could ask for gigabytes.
const XZ_BYTES_MAX: u64 = 128 << 20;

/// What every zstd reads without being asked for more.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    /// Decodes with inputs and outputs of these sizes.
    fn decode(
        compression: Compression,
        file: &[u8],
        input: usize,
        output: usize,
    ) -> io::Result<Vec<u8>> {
        let mut decoder = Decompressor::new(compression).unwrap();
        let mut all = vec![];
        let mut room = vec![0; output];
        for mut part in file.chunks(input) {
            loop {
                let size = decoder.decode(&mut part, &mut room)?;
                all.extend_from_slice(&room[..size]);
                if size < output {
                    break;
                }
            }
            assert!(part.is_empty(), "input is left though there is room");
        }
        decoder.finish().map(|()| all)
    }

    fn text() -> Vec<u8> {
        let mut random = fastrand::Rng::with_seed(3);
        let mut text = vec![0; 150_000];
        for block in text.chunks_mut(1000).step_by(3) {
            random.fill(block);
        }
        text
    }

    fn encode(compression: Compression, text: &[u8]) -> Vec<u8> {
        match compression {
            Compression::None => text.to_vec(),
            Compression::Zstd => zstd::encode_all(text, 3).unwrap(),
            Compression::Xz => {
                let mut encoder = liblzma::write::XzEncoder::new(vec![], 1);
                encoder.write_all(text).unwrap();
                encoder.finish().unwrap()
            }
            Compression::Bzip2 => {
                let mut encoder = bzip2::write::BzEncoder::new(vec![], bzip2::Compression::fast());
                encoder.write_all(text).unwrap();
                encoder.finish().unwrap()
            }
            // What these encoders do inside is no matter here; `tests/decompression.rs` has the real ones.
            Compression::Gzip => with_codec(
                async_compression::codecs::gzip::GzipEncoder::new(
                    async_compression::Level::Fastest.into(),
                ),
                text,
            ),
            Compression::Brotli => with_codec(
                async_compression::codecs::brotli::BrotliEncoder::new(
                    async_compression::brotli::EncoderParams::default()
                        .quality(async_compression::Level::Fastest),
                ),
                text,
            ),
            other => panic!("{other:?} is not written"),
        }
    }

    fn with_codec(mut codec: impl async_compression::codecs::EncodeV2, text: &[u8]) -> Vec<u8> {
        let mut all = vec![0; text.len() + 10_000];
        let mut room = WriteBuffer::new_initialized(&mut all);
        let mut input = PartialBuffer::new(text);
        while !input.unwritten().is_empty() {
            codec.encode(&mut input, &mut room).unwrap();
        }
        while !codec.finish(&mut room).unwrap() {}
        let size = room.written_len();
        all.truncate(size);
        all
    }

    const ALL: [Compression; 6] = [
        Compression::None,
        Compression::Brotli,
        Compression::Bzip2,
        Compression::Gzip,
        Compression::Xz,
        Compression::Zstd,
    ];

    #[test]
    fn every_compression_is_read_in_any_steps() {
        let text = text();
        for compression in ALL {
            let file = encode(compression, &text);
            for (input, output) in [(1 << 20, 1 << 20), (1, 1000), (1000, 7), (4096, 4096)] {
                let read = decode(compression, &file, input, output).unwrap();
                assert!(read == text, "{compression:?} {input} {output}");
            }
        }
    }

    #[test]
    fn several_members_are_one_file() {
        for compression in ALL {
            let file = [encode(compression, b"one "), encode(compression, b"two")].concat();
            for input in [1, 3, 1000] {
                let read = decode(compression, &file, input, 100);
                if compression == Compression::Brotli {
                    assert!(read.unwrap_err().to_string().contains("behind its end"));
                } else {
                    assert_eq!(read.unwrap(), b"one two", "{compression:?}");
                }
            }
        }
    }

    #[test]
    fn xz_may_be_padded() {
        let (one, two) = (
            encode(Compression::Xz, b"one "),
            encode(Compression::Xz, b"two"),
        );
        let file = [&one, &[0; 8][..], &two, &[0; 4]].concat();
        for input in [1, 3, 5, 1000] {
            assert_eq!(
                decode(Compression::Xz, &file, input, 100).unwrap(),
                b"one two"
            );
        }
        let wrong = [&one, &[0; 3][..], &two].concat();
        assert!(decode(Compression::Xz, &wrong, 1000, 100).is_err());
    }

    #[test]
    fn frames_that_zstd_skips_are_skipped() {
        let skipped = [
            &0x184d_2a50_u32.to_le_bytes()[..],
            &3_u32.to_le_bytes(),
            b"xyz",
        ]
        .concat();
        let frame = encode(Compression::Zstd, b"text");
        let file = [&skipped[..], &frame, &skipped].concat();
        for input in [1, 1000] {
            assert_eq!(
                decode(Compression::Zstd, &file, input, 100).unwrap(),
                b"text"
            );
        }
    }

    #[test]
    fn a_file_that_stops_early_is_no_file() {
        let text = text();
        for compression in ALL.into_iter().filter(|c| *c != Compression::None) {
            let file = encode(compression, &text);
            for left in [0, 1, 10, file.len() / 2, file.len() - 1] {
                let read = decode(compression, &file[..left], 4096, 1 << 20);
                assert!(read.is_err(), "{compression:?} {left}");
            }
        }
        assert_eq!(decode(Compression::None, b"", 1, 1).unwrap(), b"");
    }

    #[test]
    fn garbage_is_an_error() {
        let mut garbage = vec![0; 10_000];
        fastrand::Rng::with_seed(1).fill(&mut garbage);
        for compression in ALL.into_iter().filter(|c| *c != Compression::None) {
            assert!(
                decode(compression, &garbage, 1000, 4096).is_err(),
                "{compression:?}"
            );
            let trailed = [encode(compression, b"text"), garbage.clone()].concat();
            assert!(
                decode(compression, &trailed, 1000, 4096).is_err(),
                "{compression:?}"
            );
        }
    }

    #[test]
    fn a_greedy_xz_is_refused() {
        use liblzma::stream::{Check, Filters, LzmaOptions, Stream};
        let mut options = LzmaOptions::new_preset(0).unwrap();
        options.dict_size(512 << 20);
        let mut filters = Filters::new();
        filters.lzma2(&options);
        let stream = Stream::new_stream_encoder(&filters, Check::Crc32).unwrap();
        let mut encoder = liblzma::write::XzEncoder::new_stream(vec![], stream);
        encoder.write_all(b"text").unwrap();
        let file = encoder.finish().unwrap();
        assert!(decode(Compression::Xz, &file, 1000, 100).is_err());
    }

    #[test]
    fn a_greedy_zstd_is_refused() {
        // A frame of one raw block, whose window is 2^(10 + exponent) bytes.
        let file = |exponent: u8| {
            let mut file = 0xfd2f_b528_u32.to_le_bytes().to_vec();
            file.extend([0, exponent << 3, 0x21, 0, 0]);
            file.extend(b"text");
            file
        };
        assert_eq!(
            decode(Compression::Zstd, &file(17), 1000, 100).unwrap(),
            b"text"
        );
        assert!(decode(Compression::Zstd, &file(18), 1000, 100).is_err());
        assert!(decode(Compression::Zstd, &file(21), 1000, 100).is_err());
    }

    #[test]
    fn a_greedy_brotli_is_refused() {
        // What follows the window: a block of four bytes as they are, and the end.
        let file = |window: u32, bits: u32| {
            let head = u64::from(window) | 3 << (bits + 3) | 1 << (bits + 19);
            let size = (bits + 20).div_ceil(8) as usize;
            [&head.to_le_bytes()[..size], b"text", &[0b11]].concat()
        };
        // The widest that RFC 7932 has, 2^24, and two that are wider.
        let ordinary = file(0b1111, 4);
        assert_eq!(
            decode(Compression::Brotli, &ordinary, 1000, 100).unwrap(),
            b"text"
        );
        for exponent in [25, 30] {
            let wide = file(0x11 | exponent << 8, 14);
            for input in [1, 1000] {
                let error = decode(Compression::Brotli, &wide, input, 100).unwrap_err();
                assert!(error.to_string().contains("memory"), "{exponent} {error}");
            }
        }
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_end(
            which in 0_usize..ALL.len(),
            bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300),
            place: proptest::sample::Index,
            value: u8,
        ) {
            _ = decode(ALL[which], &bytes, 50, 64);
            let mut file = encode(ALL[which], &bytes);
            if !file.is_empty() {
                let at = place.index(file.len());
                file[at] = value;
                _ = decode(ALL[which], &file, 50, 64);
            }
        }
    }
}
