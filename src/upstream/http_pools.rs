//! The connections to one cache: questions and NARs in pools of their own, connecting bounded as a whole.
//!
//! A muster that speaks HTTP/2 without TLS is asked all questions over one connection and for all small NARs over
//! another one. Large NARs have a connection each, as everywhere: a lost packet holds up one of them alone, and the
//! other side's kernel sends its files.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http_body::{Body, Frame};
use hyper::Uri;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use rustls::ClientConfig;
use tokio::time::timeout;
use tower_service::Service;

use super::http_client::HttpOptions;

/// The pools of connections; clones share them.
#[derive(Clone)]
pub(super) struct Clients {
    pub(super) questions: Client<Connector, NoBody>,
    pub(super) nars: Client<Connector, NoBody>,
    /// The same over HTTP/2 without TLS.
    pub(super) shared_questions: Client<Connector, NoBody>,
    /// The same for small ones.
    pub(super) shared_nars: Client<Connector, NoBody>,
}

impl Clients {
    /// Makes empty pools.
    pub(super) fn new(tls: &ClientConfig, options: &HttpOptions) -> Self {
        let client = |http2_only: bool| {
            let mut tcp = HttpConnector::new();
            tcp.enforce_http(false);
            tcp.set_nodelay(true);
            tcp.set_keepalive(Some(KEEPALIVE));
            let https = HttpsConnectorBuilder::new()
                .with_tls_config(tls.clone())
                .https_or_http()
                .enable_http1()
                .enable_http2()
                .wrap_connector(tcp);
            Client::builder(TokioExecutor::new())
                .timer(TokioTimer::new())
                .pool_timer(TokioTimer::new())
                // A shared one is kept until the other side ends it: there are two.
                .pool_idle_timeout((!http2_only).then_some(options.idle_timeout))
                .pool_max_idle_per_host(options.idle_max)
                .http1_max_headers(HEADERS_MAX)
                .http1_max_buf_size(BUFFER_BYTES)
                .http2_only(http2_only)
                .http2_initial_stream_window_size(STREAM_WINDOW_BYTES)
                .http2_initial_connection_window_size(CONNECTION_WINDOW_BYTES)
                .http2_keep_alive_interval(H2_PING)
                // So that the next question finds out at once that a kept one is dead.
                .http2_keep_alive_while_idle(http2_only)
                .http2_keep_alive_timeout(options.connect_timeout)
                .build(Connector {
                    https,
                    timeout: options.connect_timeout,
                })
        };
        Self {
            questions: client(false),
            nars: client(false),
            shared_questions: client(true),
            shared_nars: client(true),
        }
    }
}

/// TCP and TLS with one bound over both.
#[derive(Clone)]
pub(super) struct Connector {
    https: HttpsConnector<HttpConnector>,
    timeout: Duration,
}

type Connected = <HttpsConnector<HttpConnector> as Service<Uri>>::Response;
type ConnectError = Box<dyn std::error::Error + Send + Sync>;

impl Service<Uri> for Connector {
    type Response = Connected;
    type Error = ConnectError;
    type Future = BoxFuture<'static, Result<Connected, ConnectError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConnectError>> {
        self.https.poll_ready(cx)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connecting = self.https.call(uri);
        let after = self.timeout;
        Box::pin(async move {
            match timeout(after, connecting).await {
                Ok(connected) => connected,
                Err(_) => Err(format!("no connection within {after:?}").into()),
            }
        })
    }
}

/// The body of a GET.
pub(super) struct NoBody;

impl Body for NoBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(None)
    }

    fn is_end_stream(&self) -> bool {
        true
    }
}

/// Lines of a head; real ones have about 20.
const HEADERS_MAX: usize = 100;

/// Of a connection over HTTP/1: the longest head, and what is read of a body at one go.
const BUFFER_BYTES: usize = 256 << 10;

/// What one stream may send ahead of its reader: 40 ms at 400 Mbit/s.
const STREAM_WINDOW_BYTES: u32 = 2 << 20;

/// The same for all streams of a connection: more than all transfers together, so that slow readers do not hold
/// the others up. The streams' own windows bound the memory.
const CONNECTION_WINDOW_BYTES: u32 = 128 << 20;

/// A dead peer is noticed within this and `connect_timeout`, though streams wait on it.
const H2_PING: Duration = Duration::from_secs(20);
const KEEPALIVE: Duration = Duration::from_secs(30);
