//! Files to sockets without a copy through user space, under an unmodified hyper.
//!
//! hyper passes the buffers of a body with a known length on to `poll_write_vectored` as they are. So a
//! body of a file yields slices of one static [`PLACEHOLDER`] that nobody reads, after it has put the
//! part of the file that each stands for into its connection's [`FileQueue`]. The transport knows such a
//! slice by its address and calls `sendfile(2)` for the first part in the queue instead. HTTP/1 answers in
//! the order of the requests, so the queue's order is the slices' order.
//!
//! ```text
//! body: queue.push(file, 4096..1052672), yields PLACEHOLDER[..1048576]
//! hyper: head, slice -> poll_write_vectored([head, slice])
//! transport: head is written; slice lies in PLACEHOLDER -> sendfile(socket, file, 4096, 1048576)
//! ```
//!
//! No file is mapped, so one that is truncated or unreadable while it is served ends its connection and nothing else.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use rustix::fs::{Advice, fadvise, sendfile};
use rustix::io::Errno;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::substituter::kept::KeptNar;

use super::listener::Stream;

/// Stands for bytes of files. Nothing reads it, so it takes no memory.
static PLACEHOLDER: [u8; PART_BYTES] = [0; PART_BYTES];

/// The parts of files that a connection has still to send, in order.
#[derive(Clone, Default)]
pub struct FileQueue {
    // Never held over an await; no other lock is taken under it.
    parts: Arc<Mutex<VecDeque<Part>>>,
}

struct Part {
    kept: KeptNar,
    offset: u64,
    left: usize,
}

/// A range of a kept file on its way to a client.
pub struct FileBody {
    kept: KeptNar,
    offset: u64,
    end: u64,
    queue: FileQueue,
}

/// A client's connection that sends files.
pub(super) struct Splice {
    stream: Stream,
    queue: FileQueue,
}

impl FileQueue {
    fn lock(&self) -> MutexGuard<'_, VecDeque<Part>> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FileBody {
    /// Begins at a place; the body must be the next one of the queue's connection, and have its length
    /// declared.
    pub fn new(kept: KeptNar, range: std::ops::Range<u64>, queue: FileQueue) -> Self {
        Self {
            kept,
            offset: range.start,
            end: range.end,
            queue,
        }
    }

    /// Returns how many bytes are still to come.
    pub fn left(&self) -> u64 {
        self.end - self.offset
    }

    /// Puts the next part into the queue and returns what stands for it.
    pub fn next_part(&mut self) -> Option<Bytes> {
        let length = usize::try_from(self.left())
            .unwrap_or(PART_BYTES)
            .min(PART_BYTES);
        let stand_in = PLACEHOLDER.get(..length).filter(|part| !part.is_empty())?;
        // Only advice: without it a thread may wait for the disk.
        let ahead = std::num::NonZero::new(AHEAD_BYTES);
        let _ = fadvise(&*self.kept.nar.file, self.offset, ahead, Advice::WillNeed);
        self.queue.lock().push_back(Part {
            kept: self.kept.clone(),
            offset: self.offset,
            left: length,
        });
        self.offset += length as u64;
        Some(Bytes::from_static(stand_in))
    }
}

impl Splice {
    pub(super) fn new(stream: Stream, queue: FileQueue) -> Self {
        Self { stream, queue }
    }

    /// Sends from the first part in the queue, at most what its slice stands for.
    fn poll_file(&self, context: &mut Context<'_>, length: usize) -> Poll<io::Result<usize>> {
        let mut parts = self.queue.lock();
        let Some(part) = parts.front_mut() else {
            return Poll::Ready(Err(io::Error::other("no file stands behind these bytes")));
        };
        let length = length.min(part.left);
        let sent = loop {
            ready!(self.stream.poll_write_ready(context))?;
            let mut offset = part.offset;
            let file = &*part.kept.nar.file;
            let send = |socket: rustix::fd::BorrowedFd<'_>| {
                Ok(sendfile(socket, file, Some(&mut offset), length)?)
            };
            match self.stream.try_write(send) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // Sockets say other things: the file cannot be read there.
                Err(error) if Errno::from_io_error(&error) == Some(Errno::IO) => break 0,
                sent => break sent?,
            }
        };
        if sent == 0 {
            part.kept.ended_early(part.offset);
            let cut = "a kept file ended early";
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::UnexpectedEof, cut)));
        }
        part.offset += sent as u64;
        part.left -= sent;
        if part.left == 0 {
            parts.pop_front();
        }
        Poll::Ready(Ok(sent))
    }
}

/// Tells whether a buffer is no bytes, but stands for some of a file.
fn stands_in(buffer: &[u8]) -> bool {
    let range = PLACEHOLDER.as_ptr_range();
    range.contains(&buffer.as_ptr())
}

impl AsyncRead for Splice {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Splice {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if stands_in(bytes) {
            return this.poll_file(context, bytes.len());
        }
        Pin::new(&mut this.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let filled = slices.iter().position(|slice| !slice.is_empty());
        let slices = slices.get(filled.unwrap_or(0)..).unwrap_or_default();
        if let Some(first) = slices.first().filter(|first| stands_in(first)) {
            return this.poll_file(context, first.len());
        }
        let bytes = slices.iter().position(|slice| stands_in(slice));
        let bytes = slices
            .get(..bytes.unwrap_or(slices.len()))
            .unwrap_or_default();
        // What the kernel does for a list of buffers takes longer than for one; a 404 is one.
        if let [bytes] = bytes {
            return Pin::new(&mut this.stream).poll_write(context, bytes);
        }
        Pin::new(&mut this.stream).poll_write_vectored(context, bytes)
    }

    /// Without it hyper would copy the buffers, and the placeholder with them.
    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }
}

/// Bytes of a file in one piece: large enough that hyper's own work does not show.
const PART_BYTES: usize = 1 << 20;
/// What the system is told to read from the disk before it is sent.
const AHEAD_BYTES: u64 = 8 << 20;
