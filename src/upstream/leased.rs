//! A NAR stream that holds its session while it is read, and does not wait for ever.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::Stream;
use tokio::time::{Instant, Sleep, sleep};

use super::slots::Lease;
use super::{Error, NarStream};

/// A stream with its lease. It ends after its first error.
pub(super) struct Leased {
    // Before the lease, so that the stream is gone when the session is given back.
    nar: Option<NarStream>,
    lease: Option<Lease>,
    silence_max: Duration,
    silence: Pin<Box<Sleep>>,
    /// Whether the reader waits; its own pauses are not the peer's silence.
    waiting: bool,
}

impl Leased {
    pub(super) fn new(nar: NarStream, lease: Lease, silence_max: Duration) -> Self {
        Self {
            nar: Some(nar),
            lease: Some(lease),
            silence_max,
            silence: Box::pin(sleep(silence_max)),
            waiting: false,
        }
    }

    fn finish(&mut self) {
        self.nar = None;
        self.lease = None;
    }
}

impl Stream for Leased {
    type Item = Result<Bytes, Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        let Some(nar) = &mut this.nar else {
            return Poll::Ready(None);
        };
        match nar.as_mut().poll_next(context) {
            Poll::Ready(Some(Ok(chunk))) => {
                this.waiting = false;
                Poll::Ready(Some(Ok(chunk)))
            }
            Poll::Ready(Some(Err(error))) => {
                this.finish();
                Poll::Ready(Some(Err(error)))
            }
            Poll::Ready(None) => {
                if let Some(lease) = &mut this.lease {
                    lease.end();
                }
                this.finish();
                Poll::Ready(None)
            }
            Poll::Pending => {
                if !this.waiting {
                    this.waiting = true;
                    let deadline = Instant::now() + this.silence_max;
                    this.silence.as_mut().reset(deadline);
                }
                if this.silence.as_mut().poll(context).is_pending() {
                    return Poll::Pending;
                }
                if let Some(lease) = &mut this.lease {
                    lease.discard();
                }
                this.finish();
                let after = this.silence_max;
                let question = "NarFromPath";
                Poll::Ready(Some(Err(Error::TimedOut { question, after })))
            }
        }
    }
}
