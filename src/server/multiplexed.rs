//! HTTP/2 without TLS, for other musters: many questions and small NARs share one connection.
//!
//! A client that begins with the preface of HTTP/2 (RFC 9113, section 3.3, "prior knowledge") is spoken to in it;
//! musters know by the offer `h2c`, see `scope`. Nix does not do so, and its way is as if this were not here.
//!
//! Files are read into memory chunk by chunk, as frames cannot be sent past user space. A stream whose client
//! takes nothing holds memory and a builder as a connection would, so after the same time no further one is begun,
//! and the connection is cut when nothing else is left on it.

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

use super::Options;
use super::handler::Handler;
use super::listener::{StallGuard, Stream};
use super::response::Body;

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
            let turn = Arc::new(turn);
            let rest = Bytes::new();
            Ok::<_, Infallible>(answer.map(|body| Watched { body, rest, turn }))
        }
    });
    let io = TokioIo::new(StallGuard::new(stream, options.write_stall));
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(HEADERS_BYTES_MAX)
        // Those of a client that gave up many questions at once, while this server was paused, say.
        .max_pending_accept_reset_streams(STREAMS_MAX as usize)
        .keep_alive_interval(PING)
        .keep_alive_timeout(PING)
        .serve_connection(io, service);
    let mut connection = pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = async {
            tokio::select! {
                () = wanted => {}
                () = turns.idle(options.idle, options.shared_idle) => {}
                () = turns.stalled(options.write_stall) => {}
                _ = stop.wait_for(|stop| *stop) => {}
            }
        } => {
            connection.as_mut().graceful_shutdown();
            tokio::select! {
                ended = connection.as_mut() => ended,
                // A client may never say that it has heard of the end.
                () = turns.all_theirs(options.write_stall.min(END_MAX)) => return,
            }
        }
    };
    if let Err(error) = ended {
        debug!(%error, "connection ended");
    }
}

/// Leaves the body out and its length in, as hyper does by itself over HTTP/1 alone.
fn without_body(mut answer: Response<Body>) -> Response<Body> {
    // None has no bytes, and stands for one whose length is not known, too.
    if let Some(length) = answer.body().size_hint().exact().filter(|l| *l > 0) {
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
    /// When a stream ended last, or the connection began.
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
            // The first question may come at any time and change the limit.
            sleep(left.min(first).min(later)).await;
        }
    }

    /// Returns when a client has taken nothing of a stream for so long, or somewhat longer.
    async fn stalled(&self, limit: Duration) {
        loop {
            sleep(limit / 8).await;
            let state = self.lock();
            let mut theirs = state.open.values().flatten();
            if theirs.any(|since| since.elapsed() >= limit) {
                return;
            }
        }
    }

    /// Returns when for so long, or somewhat longer, nothing was to be done for any stream.
    async fn all_theirs(&self, limit: Duration) {
        loop {
            sleep(limit / 8).await;
            let state = self.lock();
            let waits = |turn: &Option<Instant>| turn.is_some_and(|since| since.elapsed() >= limit);
            if state.quiet_since.elapsed() >= limit && state.open.values().all(waits) {
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

/// A body that notes whose turn it is: the client's, as long as bytes of it wait to be sent.
struct Watched {
    body: Body,
    /// Of what the body gave, not handed on yet.
    rest: Bytes,
    turn: Arc<Turn>,
}

/// Bytes on their way. hyper lets go of a body when it has given all, which is before it is sent.
struct Held {
    bytes: Bytes,
    _turn: Arc<Turn>,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
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
        if this.rest.is_empty() {
            match ready!(Pin::new(&mut this.body).poll_frame(context)) {
                Some(Ok(frame)) => this.rest = frame.into_data().unwrap_or_default(),
                end => return Poll::Ready(end),
            }
        }
        this.turn.pass(Some(Instant::now()));
        let piece = Held {
            bytes: this.rest.split_to(this.rest.len().min(PIECE_BYTES)),
            _turn: Arc::clone(&this.turn),
        };
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_owner(piece)))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let rest = self.rest.len() as u64;
        match self.body.size_hint().exact() {
            Some(left) => SizeHint::with_exact(rest + left),
            None => SizeHint::default(),
        }
    }
}

/// Answers under way at once; a muster asks 100 questions or fetches 200 small NARs.
const STREAMS_MAX: u32 = 256;

/// Bytes of a request's headers, as over HTTP/1.
const HEADERS_BYTES_MAX: u32 = 64 * 1024;

/// Bytes of one stream that are handed on at once, whatever its client has room for.
const PIECE_BYTES: usize = 32 << 10;

/// A client that has gone is noticed within twice this.
const PING: Duration = Duration::from_secs(30);

/// For a client to take what is left, or the end itself, when the connection is to end.
const END_MAX: Duration = Duration::from_secs(5);

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
