//! The compressions that NARs are served in, made on their way to a client off the async threads.
//!
//! A NAR is encoded in batches of about 256 KiB, zstd of a large one in batches of 1 MiB. Each batch is one
//! `spawn_blocking` that takes the encoder's state along and gives it back, and holds one of a fixed number of permits
//! meanwhile. So a client that reads slowly occupies neither thread nor permit, and a transfer never holds more than:
//! one batch being encoded, one being gathered, two encoded and unread, and the encoder's state.
//! A tiny NAR is encoded where it is: the change of threads takes longer.
//!
//! ```text
//! source ──▶ gathering ──▶ [ permit: spawn_blocking: Compressor ] ──▶ ready ──▶ client
//!            ≤ 1 batch + 1 chunk                                      ≤ 2 batches
//! ```

use std::collections::VecDeque;
use std::io;
use std::num::NonZero;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures_util::future::{BoxFuture, FutureExt as _};
use futures_util::stream::{Stream, StreamExt as _};
use tokio::sync::Semaphore;

use super::compressor::{Compressor, Levels, encode_small, is_large};
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
}

/// Bounds and levels of all encoders.
#[derive(Clone, Debug)]
pub struct EncoderOptions {
    /// Batches encoded at the same time, 1 to 1024: the processors that compression may take.
    pub concurrent: usize,
    /// How hard zstd tries, within [`Levels::ZSTD`]; by the size of the NAR where nothing is said.
    pub zstd_level: Option<i32>,
    /// How hard xz tries, within [`Levels::XZ`].
    pub xz_level: u32,
}

impl Default for EncoderOptions {
    /// One batch for each processor.
    fn default() -> Self {
        let levels = Levels::default();
        Self {
            concurrent: std::thread::available_parallelism().map_or(1, NonZero::get),
            zstd_level: levels.zstd,
            xz_level: levels.xz,
        }
    }
}

/// The place where NARs are encoded; clones share the bound.
#[derive(Clone, Debug)]
pub struct Encoder {
    permits: Arc<Semaphore>,
    levels: Levels,
}

/// Why an encoded NAR broke off.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError<E> {
    /// The NAR to be encoded broke off.
    #[error("the nar to be encoded broke off")]
    Source(#[source] E),
    /// The encoder failed: the NAR had another size than promised, or memory ran out.
    #[error("the encoder failed")]
    Encoder(#[source] io::Error),
}

impl Encoder {
    /// Makes the place; it starts nothing.
    pub fn new(options: EncoderOptions) -> Self {
        Self {
            permits: Arc::new(Semaphore::new(options.concurrent.clamp(1, CONCURRENT_MAX))),
            levels: Levels {
                zstd: options.zstd_level,
                xz: options.xz_level,
            },
        }
    }

    /// Encodes a NAR of `nar_size` bytes while it is read.
    ///
    /// When the source fails the error is passed on and the frame has no end, so no decoder takes
    /// the bytes before it for a whole NAR. With all permits taken the stream waits its turn. Dropping
    /// it stops the encoder after at most the batch under way. It must be polled in a tokio runtime.
    pub fn encode_stream<S, E>(&self, encoding: Encoding, nar_size: u64, source: S) -> EncodedNar<S>
    where
        S: Stream<Item = Result<Bytes, E>> + Unpin,
    {
        let large = encoding == Encoding::Zstd && is_large(nar_size);
        EncodedNar {
            source: source.fuse(),
            encoder: self.clone(),
            stage: match encoding {
                Encoding::None => Stage::Plain,
                Encoding::Zstd | Encoding::Xz => Stage::Start(encoding, nar_size),
            },
            batch_bytes: match large {
                true => BATCH_BYTES_LARGE,
                false => BATCH_BYTES,
            },
            gathered: Vec::new(),
            gathered_bytes: 0,
            source_ended: false,
            ready: VecDeque::new(),
        }
    }

    /// Encodes a NAR that is wholly in memory.
    ///
    /// Waits its turn like a batch, unless the change of threads would cost more than the encoding.
    /// Dropping the future lets the encoding end unheard.
    pub async fn encode_whole(&self, encoding: Encoding, nar: Bytes) -> io::Result<Bytes> {
        let levels = self.levels;
        if encoding == Encoding::None {
            return Ok(nar);
        }
        if nar.len() <= AT_ONCE_BYTES_MAX
            && levels.are_quick(encoding)
            && let Some(file) = encode_small(encoding, levels, &nar)?
        {
            return Ok(exact(file));
        }
        let work = move || {
            let Some(mut compressor) = Compressor::new(encoding, levels, nar.len() as u64)? else {
                return Ok(nar);
            };
            compressor.write(&nar)?;
            compressor.finish().map(exact)
        };
        self.run(work).await
    }

    /// Runs work on a blocking thread as soon as a permit is free, and keeps the permit until its end.
    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let permit = Arc::clone(&self.permits).acquire_owned().await;
        let permit = permit.map_err(io::Error::other)?;
        let done = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            work()
        });
        done.await.map_err(io::Error::other)?
    }
}

/// Takes no more memory than the file has bytes: it may be kept for long, and room was made for the worst.
fn exact(mut file: Vec<u8>) -> Bytes {
    file.shrink_to_fit();
    file.into()
}

/// The stream that [`Encoder::encode_stream`] makes.
pub struct EncodedNar<S> {
    source: futures_util::stream::Fuse<S>,
    encoder: Encoder,
    stage: Stage,
    batch_bytes: usize,
    /// The next batch.
    gathered: Vec<Bytes>,
    gathered_bytes: usize,
    source_ended: bool,
    /// Encoded and unread.
    ready: VecDeque<Bytes>,
}

enum Stage {
    /// Nothing to encode.
    Plain,
    /// Nothing was encoded yet.
    Start(Encoding, u64),
    /// The encoder waits for a batch.
    Idle(Compressor),
    /// A batch is being encoded.
    Busy(BoxFuture<'static, io::Result<Batch>>),
    /// The last byte was encoded, or the stream failed.
    Over,
}

/// An encoded batch, and the encoder unless it was the last.
struct Batch {
    encoded: Vec<u8>,
    compressor: Option<Compressor>,
}

impl<S, E> EncodedNar<S>
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
{
    /// Gathers the next batch as far as the source has it.
    fn gather(&mut self, cx: &mut Context<'_>) -> Result<(), E> {
        while !self.source_ended && self.gathered_bytes < self.batch_bytes {
            match self.source.poll_next_unpin(cx) {
                Poll::Ready(Some(chunk)) => {
                    let chunk = chunk?;
                    if !chunk.is_empty() {
                        self.gathered_bytes += chunk.len();
                        self.gathered.push(chunk);
                    }
                }
                Poll::Ready(None) => self.source_ended = true,
                Poll::Pending => break,
            }
        }
        Ok(())
    }

    /// Starts or awaits a batch; `Pending` when only the source or the batch can change anything.
    fn advance(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stage = match std::mem::replace(&mut self.stage, Stage::Over) {
            stage @ (Stage::Start(..) | Stage::Idle(_)) => {
                if self.gathered_bytes < self.batch_bytes && !self.source_ended {
                    self.stage = stage;
                    return Poll::Pending;
                }
                Stage::Busy(self.batch(stage))
            }
            Stage::Busy(mut batch) => {
                let Poll::Ready(done) = batch.poll_unpin(cx) else {
                    self.stage = Stage::Busy(batch);
                    return Poll::Pending;
                };
                let done = done?;
                if !done.encoded.is_empty() {
                    self.ready.push_back(done.encoded.into());
                }
                done.compressor.map_or(Stage::Over, Stage::Idle)
            }
            stage @ (Stage::Plain | Stage::Over) => {
                self.stage = stage;
                return Poll::Pending;
            }
        };
        Poll::Ready(Ok(()))
    }

    /// Sends what was gathered through the encoder, and ends the frame with the source.
    fn batch(&mut self, stage: Stage) -> BoxFuture<'static, io::Result<Batch>> {
        let chunks = std::mem::take(&mut self.gathered);
        self.gathered_bytes = 0;
        let last = self.source_ended;
        let encoder = self.encoder.clone();
        let levels = encoder.levels;
        let work = move || {
            let compressor = match stage {
                Stage::Start(encoding, nar_size) => Compressor::new(encoding, levels, nar_size)?,
                Stage::Idle(compressor) => Some(compressor),
                Stage::Plain | Stage::Busy(_) | Stage::Over => None,
            };
            let mut compressor = compressor.ok_or_else(|| io::Error::other("no encoder"))?;
            for chunk in chunks {
                compressor.write(&chunk)?;
            }
            Ok(if last {
                let encoded = compressor.finish()?;
                let compressor = None;
                Batch {
                    encoded,
                    compressor,
                }
            } else {
                let encoded = compressor.take();
                let compressor = Some(compressor);
                Batch {
                    encoded,
                    compressor,
                }
            })
        };
        async move { encoder.run(work).await }.boxed()
    }
}

impl<S, E> Stream for EncodedNar<S>
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
{
    type Item = Result<Bytes, EncodeError<E>>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if matches!(this.stage, Stage::Plain) {
            let item = ready!(this.source.poll_next_unpin(cx));
            if !matches!(item, Some(Ok(_))) {
                this.stage = Stage::Over;
            }
            return Poll::Ready(item.map(|chunk| chunk.map_err(EncodeError::Source)));
        }
        while this.ready.len() < READY_MAX && !matches!(this.stage, Stage::Over) {
            if let Err(cause) = this.gather(cx) {
                this.ready.clear();
                this.stage = Stage::Over;
                return Poll::Ready(Some(Err(EncodeError::Source(cause))));
            }
            match this.advance(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => {
                    this.ready.clear();
                    return Poll::Ready(Some(Err(EncodeError::Encoder(error))));
                }
                Poll::Pending => break,
            }
        }
        match this.ready.pop_front() {
            Some(encoded) => Poll::Ready(Some(Ok(encoded))),
            None if matches!(this.stage, Stage::Over) => Poll::Ready(None),
            None => Poll::Pending,
        }
    }
}

/// Bytes encoded at one go: about 2 ms of zstd 3, against some 10 µs for the change of threads.
const BATCH_BYTES: usize = 256 << 10;

/// The same where memory is taken for a long window anyway.
const BATCH_BYTES_LARGE: usize = 1 << 20;

/// NARs up to this size are encoded where they are, if the level is quick: some 200 µs at most.
const AT_ONCE_BYTES_MAX: usize = 32 << 10;

/// More than any machine has processors; keeps a typing error from the semaphore.
const CONCURRENT_MAX: usize = 1024;

/// One batch for the client to read, and one so that the encoder need not wait for it.
const READY_MAX: usize = 2;

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
}
