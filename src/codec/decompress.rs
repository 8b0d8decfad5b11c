//! Compressed NARs of other caches, decoded on their way.
//!
//! What is quick (zstd, 128 KiB at some 60 µs) is decoded where the stream is polled. Everything else goes in
//! steps to a blocking thread that takes the decoder along, gives it back, and holds one of a fixed number of
//! permits meanwhile; so a reader that is slow occupies neither thread nor permit. Nothing is decoded ahead: a
//! stream holds one chunk of its source, at most 256 KiB of output, and what [`super::decompressor`] says
//! its decoder takes. A file that unpacks to more than it should is the reader's to stop, as
//! [`super::digest::verified`] does.
//!
//! ```text
//! source ──▶ one chunk ──▶ Decompressor (here, or [ permit: spawn_blocking ]) ──▶ ≤ 256 KiB ──▶ reader
//! ```

use std::io;
use std::num::NonZero;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{self, Stream, StreamExt as _};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::compressor::{WINDOW_LOG, is_large};
use super::decompressor::Decompressor;
use crate::nix::narinfo::Compression;

/// The place where NARs are decoded; clones share the bound.
#[derive(Clone, Debug)]
pub struct Decoder {
    permits: Arc<Semaphore>,
    /// MiB that long windows may take.
    windows: Arc<Semaphore>,
}

/// A place in memory for the decoder of a file that was made here; held as long as that is.
#[derive(Debug)]
pub struct Window(
    #[expect(dead_code, reason = "it is there to be dropped")] Option<OwnedSemaphorePermit>,
);

/// Why a decoded stream broke off.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError<E> {
    /// The compressed stream broke off.
    #[error("the compressed stream broke off")]
    Source(#[source] E),
    /// The bytes are not what the compression makes, stop early, or ask for too much memory.
    #[error("the {} stream is damaged", .compression.name())]
    Damaged {
        /// What it should have been.
        compression: Compression,
        /// The decoder's words.
        #[source]
        cause: io::Error,
    },
}

impl Decoder {
    /// Makes a place where so many slow steps, 1 to 1024, run at the same time; it starts nothing.
    pub fn new(concurrent: usize) -> Self {
        Self {
            permits: Arc::new(Semaphore::new(concurrent.clamp(1, CONCURRENT_MAX))),
            windows: Arc::new(Semaphore::new(WINDOWS_MIB_MAX)),
        }
    }

    /// Waits until the file of a NAR of so many bytes, as [`super::compressor`] makes it, may be decoded: that
    /// of a large one takes up to 32 MiB, for as long as its client reads.
    ///
    /// Who holds one must not wait for another one of the same place.
    pub async fn window(&self, nar_size: u64) -> Window {
        if !is_large(nar_size) {
            return Window(None);
        }
        let mib = u32::try_from(nar_size.min(1 << WINDOW_LOG) >> 20).unwrap_or(1);
        let windows = Arc::clone(&self.windows);
        Window(windows.acquire_many_owned(mib).await.ok())
    }

    /// Decodes a stream while it is read; `None` for a compression that is not read here.
    ///
    /// Chunks have 1 byte to 256 KiB, but those of [`Compression::None`], which pass as they come.
    /// What was decoded before an error has been given out; an error is the last item. Dropping the
    /// stream stops the decoder after at most the step under way. It must be polled in a tokio runtime.
    pub fn decode_stream<S, E>(
        &self,
        compression: Compression,
        source: S,
    ) -> Option<impl Stream<Item = Result<Bytes, DecodeError<E>>> + Send + use<S, E>>
    where
        S: Stream<Item = Result<Bytes, E>> + Send + Unpin,
        E: Send,
    {
        let state = Decoding {
            source,
            place: self.clone(),
            compression,
            decoder: Some(Box::new(Decompressor::new(compression)?)),
            input: Bytes::new(),
            full: false,
        };
        Some(stream::unfold(state, |mut state| async move {
            let item = state.next().await.transpose()?;
            Some((item, state))
        }))
    }

    /// Runs a step on a blocking thread as soon as a permit is free, and keeps the permit until its end.
    async fn run(&self, step: Step) -> io::Result<Stepped> {
        let permit = Arc::clone(&self.permits).acquire_owned().await;
        let permit = permit.map_err(io::Error::other)?;
        let done = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            step.decode(SLOW_STEP_BYTES)
        });
        done.await.map_err(io::Error::other)?
    }
}

impl Default for Decoder {
    /// One slow step for each processor.
    fn default() -> Self {
        Self::new(std::thread::available_parallelism().map_or(1, NonZero::get))
    }
}

struct Decoding<S> {
    source: S,
    place: Decoder,
    compression: Compression,
    /// Gone once the stream is over.
    decoder: Option<Box<Decompressor>>,
    /// Read and not yet decoded.
    input: Bytes,
    /// The last step filled its room, so more may follow without input.
    full: bool,
}

impl<S, E> Decoding<S>
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
{
    async fn next(&mut self) -> Result<Option<Bytes>, DecodeError<E>> {
        // Taken for the time of the step: after an error there is none, and the stream is over.
        while let Some(decoder) = self.decoder.take() {
            if self.input.is_empty() && !self.full {
                match self.source.next().await {
                    Some(Ok(chunk)) => self.input = chunk,
                    Some(Err(cause)) => return Err(DecodeError::Source(cause)),
                    None => {
                        decoder.finish().map_err(|cause| self.damaged(cause))?;
                        return Ok(None);
                    }
                }
            }
            if self.compression == Compression::None {
                let mut decoder = decoder;
                decoder.pass();
                self.decoder = Some(decoder);
                return Ok(Some(std::mem::take(&mut self.input)));
            }
            let quick = decoder.is_quick();
            let input = std::mem::take(&mut self.input);
            let step = Step { decoder, input };
            let stepped = match quick {
                true => step.decode(QUICK_STEP_BYTES),
                false => self.place.run(step).await,
            };
            let stepped = stepped.map_err(|cause| self.damaged(cause))?;
            self.decoder = Some(stepped.decoder);
            self.input = stepped.input;
            self.full = stepped.full;
            if !stepped.output.is_empty() {
                return Ok(Some(stepped.output));
            }
        }
        Ok(None)
    }

    fn damaged(&self, cause: io::Error) -> DecodeError<E> {
        let compression = self.compression;
        DecodeError::Damaged { compression, cause }
    }
}

/// A decoder on its way to a thread.
struct Step {
    decoder: Box<Decompressor>,
    input: Bytes,
}

/// And back.
struct Stepped {
    decoder: Box<Decompressor>,
    input: Bytes,
    output: Bytes,
    full: bool,
}

impl Step {
    fn decode(mut self, room: usize) -> io::Result<Stepped> {
        let mut output = vec![0; room];
        let mut rest = &*self.input;
        let size = self.decoder.decode(&mut rest, &mut output)?;
        let read = self.input.len() - rest.len();
        output.truncate(size);
        // A few bytes in a large allocation would add up where chunks are kept.
        if size < room / 2 {
            output.shrink_to_fit();
        }
        Ok(Stepped {
            decoder: self.decoder,
            input: self.input.split_off(read),
            output: output.into(),
            full: size == room,
        })
    }
}

/// Bytes that zstd gives out at one go where the stream is polled: 60 µs, at worst some 250.
const QUICK_STEP_BYTES: usize = 128 << 10;

/// Bytes that the others give out on a blocking thread: 1 to 10 ms, against some 10 µs for the change of threads.
const SLOW_STEP_BYTES: usize = 256 << 10;

/// MiB that long windows of files made here take at once: sixteen of them, or more of NARs that do not fill one.
const WINDOWS_MIB_MAX: usize = 512;

/// More than any machine has processors; keeps a typing error from the semaphore.
const CONCURRENT_MAX: usize = 1024;

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn long_windows_wait_for_each_other_and_short_ones_for_nobody() {
        let (decoder, large) = (Decoder::default(), 100 << 20);
        let other = decoder.clone();
        let mut windows = Vec::new();
        for _ in 0..16 {
            windows.push(decoder.window(large).await);
        }
        assert!(other.window(large).now_or_never().is_none());
        assert!(other.window(9 << 20).now_or_never().is_none());
        assert!(other.window(1 << 20).now_or_never().is_some());
        windows.pop();
        for _ in 0..3 {
            windows.extend(other.window(9 << 20).now_or_never());
        }
        assert_eq!(windows.len(), 18, "three of 9 MiB in place of one of 32");
        assert!(other.window(large).now_or_never().is_none());
    }
}
