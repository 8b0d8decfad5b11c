//! The way of a NAR from the connection's task to its reader: a channel bounded by weight.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use futures_util::Stream;
use tokio::sync::{Semaphore, mpsc};

use super::super::Error;

/// The connection's end.
#[derive(Debug)]
pub(super) struct Sender<T> {
    items: mpsc::UnboundedSender<Item<T>>,
    room: Arc<Semaphore>,
}

/// The reader's end: a stream that ends after a complete body; an error is its last item.
#[derive(Debug)]
pub(super) struct Receiver<T> {
    items: mpsc::UnboundedReceiver<Item<T>>,
    room: Arc<Semaphore>,
    ended: bool,
}

/// The reader is gone.
#[derive(Clone, Copy, Debug)]
pub(super) struct Abandoned;

#[derive(Debug)]
enum Item<T> {
    Part(T, u32),
    End(Result<(), Error>),
}

/// Makes a channel that holds parts of at most `budget` in weight together.
pub(super) fn channel<T>(budget: u32) -> (Sender<T>, Receiver<T>) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let room = Arc::new(Semaphore::new(budget as usize));
    let sender = Sender {
        items: sender,
        room: room.clone(),
    };
    let receiver = Receiver {
        items: receiver,
        room,
        ended: false,
    };
    (sender, receiver)
}

/// Returns how many bytes of a NAR of this size are buffered: all of it if it is small.
pub(super) fn budget(nar_size: u64) -> u32 {
    match u32::try_from(nar_size) {
        Ok(size) if size <= WHOLE_BYTES_MAX => size.max(1),
        _ => PART_BYTES_MAX,
    }
}

impl<T> Sender<T> {
    /// Hands a part over once there is room for it.
    pub(super) async fn send(&self, part: T, weight: u32) -> Result<(), Abandoned> {
        let room = tokio::select! {
            biased;
            () = self.items.closed() => return Err(Abandoned),
            room = self.room.acquire_many(weight) => room,
        };
        room.map_err(|_| Abandoned)?.forget();
        let sent = self.items.send(Item::Part(part, weight));
        sent.map_err(|_| Abandoned)
    }

    /// Tells that the body is complete, or why it is not.
    pub(super) fn end(self, result: Result<(), Error>) {
        // A reader that left does not mind.
        let _ = self.items.send(Item::End(result));
    }

    pub(super) fn is_abandoned(&self) -> bool {
        self.items.is_closed()
    }
}

impl<T> Stream for Receiver<T> {
    type Item = Result<T, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let item = ready!(self.items.poll_recv(cx));
        if let Some(Item::Part(part, weight)) = item {
            self.room.add_permits(weight as usize);
            return Poll::Ready(Some(Ok(part)));
        }
        self.ended = true;
        Poll::Ready(match item {
            Some(Item::End(Ok(()))) => None,
            Some(Item::End(Err(error))) => Some(Err(error)),
            _ => Some(Err(Error::Lost("the connection ended".into()))),
        })
    }
}

impl<T> Unpin for Receiver<T> {}

/// NARs up to this size are buffered whole, so that those behind them are not held up.
const WHOLE_BYTES_MAX: u32 = 4 << 20;

/// Of larger ones this much is buffered.
const PART_BYTES_MAX: u32 = 1 << 20;

/// So many paths of a list of all are buffered.
pub(super) const PATHS_BUDGET: u32 = 16 << 10;
