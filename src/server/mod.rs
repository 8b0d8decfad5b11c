//! HTTP in, HTTP out.
//!
//! ```text
//! listener -> connection (one task each; HTTP/1.1, or HTTP/2 where a client begins so) -> route -> handler -> response
//! ```
//!
//! Other musters find more here than other clients do: their questions may be about the own store alone
//! (`scope`), and of that they are told whole closures (`closure`) and a live catalog (`catalog`).
//!
//! They may ask over HTTP/2 (`multiplexed`).
//!
//! Nothing here decides what is served; that is the substituter's. Overload holds connections
//! back: it is never answered with 429 or 503, on which real clients give up.

mod catalog;
mod closure;
pub mod error;
mod handler;
mod idle;
pub mod listener;
mod multiplexed;
mod range;
pub mod response;
pub mod route;
pub mod scope;
pub mod splice;

use std::convert::Infallible;
use std::iter;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::sync::futures::OwnedNotified;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::{debug, warn};

use crate::substituter::Substituter;

use catalog::Feeds;
use handler::Handler;
use idle::IdleTimer;
use listener::{Listener, StallGuard, Stream};
use splice::{FileQueue, Splice};

/// The bounds of a server.
#[derive(Clone, Debug)]
pub struct Options {
    /// Connections at once; further ones wait in the kernel's queue, and idle ones make room.
    pub connections_max: usize,
    /// Time for a request's head, and for which an idle connection is kept.
    pub idle: Duration,
    /// For which an idle connection of HTTP/2 is kept: a muster has few and asks again any time.
    pub shared_idle: Duration,
    /// Time for which a client may take no byte of a response.
    pub write_stall: Duration,
    /// Time that running transfers get when the server is told to stop.
    pub stop: Duration,
}

/// What the server says of itself; replaced when keys or configuration change.
#[derive(Clone, Debug)]
pub struct Info {
    /// The text of `/nix-cache-info`.
    pub cache_info: bytes::Bytes,
    /// The public keys, one in each line.
    pub public_keys: bytes::Bytes,
}

/// Serves on all listeners until `stop` says true or is dropped, then lets transfers finish.
///
/// Returns when the last connection is gone or the time for it is over. Dropped, all connections
/// are cut.
pub async fn serve(
    listeners: Vec<Listener>,
    substituter: Substituter,
    info: watch::Receiver<Info>,
    options: Options,
    stop: watch::Receiver<bool>,
) {
    let feeds = Feeds::new(stop.clone());
    let handler = Arc::new(Handler::new(substituter, info, feeds));
    let places = Places {
        free: Arc::new(Semaphore::new(options.connections_max)),
        wanted: Arc::new(Notify::new()),
    };
    let mut accepting = JoinSet::new();
    for listener in listeners {
        let accept = accept(
            listener,
            Arc::clone(&handler),
            options.clone(),
            places.clone(),
            stop.clone(),
        );
        accepting.spawn(accept);
    }
    let mut connections = JoinSet::new();
    while let Some(ended) = accepting.join_next().await {
        if let Ok(theirs) = ended {
            connections.spawn(wait_for(theirs));
        }
    }
    let running = options.connections_max - places.free.available_permits();
    if running > 0 {
        debug!(connections = running, "waiting for running transfers");
    }
    let finished = async { while connections.join_next().await.is_some() {} };
    if timeout(options.stop, finished).await.is_err() {
        warn!(after = ?options.stop, "transfers were still running, they are cut");
    }
}

/// The connections that there may be at once.
#[derive(Clone)]
struct Places {
    free: Arc<Semaphore>,
    /// Rung when somebody waits for a place: clients keep idle connections for as long as they run,
    /// and those who wait would wait for their end.
    wanted: Arc<Notify>,
}

impl Places {
    /// Waits for a place, and has the connections that are there make room: each ends after its
    /// response, an idle one at once.
    async fn take(&self) -> Option<OwnedSemaphorePermit> {
        if let Ok(place) = Arc::clone(&self.free).try_acquire_owned() {
            return Some(place);
        }
        self.wanted.notify_waiters();
        Arc::clone(&self.free).acquire_owned().await.ok()
    }
}

/// Accepts until told to stop; returns the connections that still run.
async fn accept(
    listener: Listener,
    handler: Arc<Handler>,
    options: Options,
    places: Places,
    mut stop: watch::Receiver<bool>,
) -> JoinSet<()> {
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        // In this order, or listeners that wait for a client would hold the last places.
        let accepted = async {
            let stream = listener.accept().await;
            // Made before there is a place, so that no ring is missed.
            let wanted = Arc::clone(&places.wanted).notified_owned();
            (stream, wanted, places.take().await)
        };
        let (stream, wanted, place) = tokio::select! {
            accepted = accepted => accepted,
            _ = stop.wait_for(|stop| *stop) => return connections,
        };
        match stream {
            Ok(stream) => {
                let served = connection(
                    stream,
                    Arc::clone(&handler),
                    options.clone(),
                    wanted,
                    stop.clone(),
                );
                connections.spawn(async move {
                    served.await;
                    drop(place);
                });
            }
            Err(error) => {
                // Out of file descriptors, most often: a pause lets some be freed.
                warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Serves one connection to its end.
async fn connection(
    stream: Stream,
    handler: Arc<Handler>,
    options: Options,
    wanted: OwnedNotified,
    mut stop: watch::Receiver<bool>,
) {
    let preface = tokio::select! {
        preface = timeout(options.idle, stream.begins_with(HTTP2_PREFACE)) => preface,
        _ = stop.wait_for(|stop| *stop) => return,
    };
    match preface {
        Ok(Ok(true)) => multiplexed::serve(stream, handler, options, wanted, stop).await,
        Ok(Ok(false)) => one_by_one(stream, handler, options, wanted, stop).await,
        Ok(Err(error)) => debug!(%error, "connection ended"),
        Err(_) => {}
    }
}

/// Serves one connection of HTTP/1.1 to its end, which comes after the next response once its place is wanted
/// or the server stops.
async fn one_by_one(
    stream: Stream,
    handler: Arc<Handler>,
    options: Options,
    wanted: OwnedNotified,
    mut stop: watch::Receiver<bool>,
) {
    let asked = Arc::new(Notify::new());
    let has_asked = Arc::clone(&asked);
    let files = FileQueue::default();
    let stream = Splice::new(stream, files.clone());
    let service = service_fn(move |request| {
        asked.notify_one();
        let (handler, files) = (Arc::clone(&handler), files.clone());
        async move { Ok::<_, Infallible>(handler.handle(request, Some(files)).await) }
    });
    let io = TokioIo::new(StallGuard::new(stream, options.write_stall));
    let connection = http1::Builder::new()
        .timer(IdleTimer::new())
        .header_read_timeout(options.idle)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(io, service);
    let mut connection = pin!(connection);
    // hyper closes one that has not asked yet at once, and its client would go without an answer.
    let spare = async {
        wanted.await;
        has_asked.notified().await;
    };
    let last = async {
        tokio::select! {
            () = spare => {}
            _ = stop.wait_for(|stop| *stop) => {}
        }
    };
    // In a set of its own it is looked at when it was woken, not with every request.
    let mut last: FuturesUnordered<_> = iter::once(last).collect();
    let ended = tokio::select! {
        biased;
        ended = connection.as_mut() => Some(ended),
        _ = last.next() => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        debug!(%error, "connection ended");
    }
}

async fn wait_for(mut connections: JoinSet<()>) {
    while connections.join_next().await.is_some() {}
}

/// Bytes of a request's head, and of what is read ahead.
const HEAD_BYTES_MAX: usize = 64 * 1024;
/// What no request of HTTP/1 begins with; the whole preface is hyper's to check.
const HTTP2_PREFACE: &[u8] = b"PRI ";
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
