//! HTTP in, HTTP out.
//!
//! ```text
//! listener -> connection (one task each) -> route -> handler -> response
//! ```
//!
//! Nothing here decides what is served; that is the substituter's. Overload holds connections
//! back: it is never answered with 429 or 503, on which real clients give up.

pub mod error;
mod handler;
pub mod listener;
mod range;
pub mod response;
pub mod route;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tracing::{debug, warn};

use crate::substituter::Substituter;

use handler::Handler;
use listener::{Listener, StallGuard};

/// The bounds of a server.
#[derive(Clone, Debug)]
pub struct Options {
    /// Connections at once; further ones wait, one for each listener here, the rest in the
    /// kernel's queue.
    pub connections_max: usize,
    /// Time for a request's head, and for which an idle connection is kept.
    pub idle: Duration,
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
    let graceful = Arc::new(GracefulShutdown::new());
    let handler = Handler::new(substituter, info);
    let places = Arc::new(Semaphore::new(options.connections_max));
    let mut accepting = JoinSet::new();
    for listener in listeners {
        let accept = accept(
            listener,
            handler.clone(),
            options.clone(),
            Arc::clone(&places),
            Arc::clone(&graceful),
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
    let running = options.connections_max - places.available_permits();
    if running > 0 {
        debug!(connections = running, "waiting for running transfers");
    }
    let finished = async {
        if let Some(graceful) = Arc::into_inner(graceful) {
            graceful.shutdown().await;
        }
        while connections.join_next().await.is_some() {}
    };
    if tokio::time::timeout(options.stop, finished).await.is_err() {
        warn!(after = ?options.stop, "transfers were still running, they are cut");
    }
}

/// Accepts until told to stop; returns the connections that still run.
async fn accept(
    listener: Listener,
    handler: Handler,
    options: Options,
    places: Arc<Semaphore>,
    graceful: Arc<GracefulShutdown>,
    mut stop: watch::Receiver<bool>,
) -> JoinSet<()> {
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        // The place comes second: a listener that nobody calls must not hold one back.
        let accepted = async {
            let stream = listener.accept().await;
            (stream, Arc::clone(&places).acquire_owned().await)
        };
        let (stream, place) = tokio::select! {
            accepted = accepted => accepted,
            _ = stop.wait_for(|stop| *stop) => return connections,
        };
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => {
                // Out of file descriptors, most often: a pause lets some be freed.
                warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let handler = handler.clone();
        let service = service_fn(move |request| {
            let handler = handler.clone();
            async move { Ok::<_, Infallible>(handler.handle(request).await) }
        });
        let io = TokioIo::new(StallGuard::new(stream, options.write_stall));
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(options.idle)
            .max_buf_size(HEAD_BYTES_MAX)
            .serve_connection(io, service);
        let connection = graceful.watch(connection);
        connections.spawn(async move {
            if let Err(error) = connection.await {
                debug!(%error, "connection ended");
            }
            drop(place);
        });
    }
}

async fn wait_for(mut connections: JoinSet<()>) {
    while connections.join_next().await.is_some() {}
}

/// Bytes of a request's head, and of what is read ahead.
const HEAD_BYTES_MAX: usize = 64 * 1024;
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
