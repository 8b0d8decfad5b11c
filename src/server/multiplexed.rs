//! HTTP/2 without TLS, for other musters: many questions and small NARs share one connection.
//!
//! A client that begins with the preface of HTTP/2 (RFC 9113, section 3.3, "prior knowledge") is spoken to in it;
//! musters know by the offer `h2c`, see `scope`. Nix does not do so, and its way is as if this were not here.
//!
//! Files are read into memory chunk by chunk, as frames cannot be sent past user space. A stream whose client
//! takes nothing holds a builder as a connection would, so it ends the whole connection after the same time.

use std::collections::HashMap;
use std::convert::Infallible;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::header::{CONTENT_LENGTH, HeaderValue};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper::{Method, Response};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::sync::futures::OwnedNotified;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tracing::debug;

use crate::substituter::transfer;

use super::handler::Handler;
use super::listener::{StallGuard, Stream};
use super::response::Body;
use super::{HEAD_BYTES_MAX, Options};

/// Serves one connection to its end, which comes after the answers that are under way once its place is wanted,
/// the server stops, or nothing was asked for a while.
pub(super) async fn serve(
    stream: Stream,
    handler: Arc<Handler>,
    options: Options,
    wanted: OwnedNotified,
    mut stop: watch::Receiver<bool>,
) {
    let turns = Arc::new(Turns::new());
    let answers = Arc::clone(&turns);
    let service = service_fn(move |request| {
        let (handler, turn) = (Arc::clone(&handler), Turns::begin(&answers));
        async move {
            let only_head = *request.method() == Method::HEAD;
            let mut answer = handler.handle(request, None).await;
            if only_head {
                answer = without_body(answer);
            }
            Ok::<_, Infallible>(answer.map(|body| Watched { body, turn }))
        }
    });
    let io = TokioIo::new(StallGuard::new(stream, options.write_stall));
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(HEAD_BYTES_MAX as u32)
        .max_send_buf_size(SEND_BYTES_MAX)
        .serve_connection(io, service);
    let mut connection = pin!(connection);
    let mut last = pin!(async {
        tokio::select! {
            () = wanted => {}
            () = turns.idle(options.idle, options.shared_idle) => {}
            _ = stop.wait_for(|stop| *stop) => {}
        }
    });
    let mut stalled = pin!(turns.stalled(options.write_stall));
    let mut is_last = false;
    let ended = loop {
        tokio::select! {
            ended = connection.as_mut() => break ended,
            () = last.as_mut(), if !is_last => {
                is_last = true;
                connection.as_mut().graceful_shutdown();
            }
            () = stalled.as_mut() => {
                debug!("the client takes no bytes of a stream, its connection is cut");
                return;
            }
        }
    };
    if let Err(error) = ended {
        debug!(%error, "connection ended");
    }
}

/// Leaves the body out and its length in, as hyper does by itself over HTTP/1 alone.
fn without_body(mut answer: Response<Body>) -> Response<Body> {
    if let Some(length) = answer.body().size_hint().exact() {
        let length = HeaderValue::from(length);
        let headers = answer.headers_mut();
        headers.entry(CONTENT_LENGTH).or_insert(length);
    }
    answer.map(|_| Body::Whole(None))
}

/// Whose turn it is in each stream of a connection.
struct Turns {
    // Never held over an await; no other lock is taken under it.
    state: Mutex<State>,
}

struct State {
    /// Since when it is the client's; `None`: it is ours.
    open: HashMap<u64, Option<Instant>>,
    next: u64,
    /// When the last stream ended, or the connection began.
    quiet_since: Instant,
}

/// One stream, from its request to the end of its answer.
struct Turn {
    number: u64,
    turns: Arc<Turns>,
}

impl Turns {
    fn new() -> Self {
        Self {
            state: Mutex::new(State {
                open: HashMap::new(),
                next: 0,
                quiet_since: Instant::now(),
            }),
        }
    }

    fn begin(turns: &Arc<Self>) -> Turn {
        let mut state = turns.lock();
        let number = state.next;
        state.next += 1;
        state.open.insert(number, None);
        Turn {
            number,
            turns: Arc::clone(turns),
        }
    }

    /// Returns when no stream has been open for so long; the first one has less time.
    async fn idle(&self, first: Duration, later: Duration) {
        loop {
            let left = {
                let state = self.lock();
                let limit = if state.next == 0 { first } else { later };
                let quiet = state.open.is_empty().then(|| state.quiet_since.elapsed());
                quiet.map_or(limit, |quiet| limit.saturating_sub(quiet))
            };
            if left.is_zero() {
                return;
            }
            sleep(left).await;
        }
    }

    /// Returns when a client has taken nothing of a stream for so long, or somewhat longer.
    async fn stalled(&self, limit: Duration) {
        loop {
            sleep(limit / 8).await;
            let state = self.lock();
            let theirs = state.open.values().flatten();
            if theirs.into_iter().any(|since| since.elapsed() >= limit) {
                return;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Turn {
    fn pass(&self, since: Option<Instant>) {
        self.turns.lock().open.insert(self.number, since);
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut state = self.turns.lock();
        state.open.remove(&self.number);
        state.quiet_since = Instant::now();
    }
}

/// A body that notes whose turn it is: hyper asks for the next frame when the client has room for it.
struct Watched {
    body: Body,
    turn: Turn,
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = transfer::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, transfer::Error>>> {
        let this = self.get_mut();
        this.turn.pass(None);
        let frame = ready!(Pin::new(&mut this.body).poll_frame(context));
        this.turn.pass(Some(Instant::now()));
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Answers under way at once; a muster asks 100 questions or fetches 200 small NARs.
const STREAMS_MAX: u32 = 256;

/// Bytes of one stream that wait in memory beside what its client has room for.
const SEND_BYTES_MAX: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn idle_is_counted_from_the_end_of_the_last_answer() {
        let turns = Arc::new(Turns::new());
        let begun = Instant::now();
        let turn = Turns::begin(&turns);
        let ends = async {
            sleep(Duration::from_secs(100)).await;
            drop(turn);
        };
        tokio::join!(
            ends,
            turns.idle(Duration::from_secs(5), Duration::from_secs(30))
        );
        assert_eq!(begun.elapsed().as_secs(), 130);
    }

    #[tokio::test(start_paused = true)]
    async fn only_a_client_that_takes_nothing_stalls() {
        let turns = Arc::new(Turns::new());
        let (slow_source, other) = (Turns::begin(&turns), Turns::begin(&turns));
        slow_source.pass(None);
        let limit = Duration::from_secs(80);
        let begun = Instant::now();
        other.pass(Some(begun));
        sleep(Duration::from_secs(40)).await;
        other.pass(Some(Instant::now()));
        turns.stalled(limit).await;
        assert_eq!(begun.elapsed().as_secs(), 120);
    }
}
