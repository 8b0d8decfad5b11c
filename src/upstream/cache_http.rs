//! A binary cache over HTTP: which answer means what.
//!
//! ```text
//! 200                 the file
//! 404, 410, 403       not there; S3 says 403 to those who may not list
//! 401, other 4xx      could not find out; 401 names the credentials
//! 429, 503            could not find out, and the cache is left alone for a while: Retry-After, or a back-off
//! other 5xx           the same after three of them running
//! ```
//!
//! Source: `HttpBinaryCacheStore` in `libstore/http-binary-cache-store.cc`; there 401 counts as missing, too.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt as _;
use hyper::{StatusCode, Uri};
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, timeout};
use tracing::debug;

use super::Error;
use super::backoff::Backoff;
use super::cache_files::{CacheFiles, FilePart, FileSize, FileStream, Greeting, PAUSE_MAX, whole};
use super::http_client::{Got, HttpClient, HttpOptions, Peer};
use super::http_url::Scheme;
use crate::codec::decompress::{DecodeError, Decoder};
use crate::nix::narinfo::Compression;

/// A cache over HTTP.
pub struct CacheHttp {
    client: HttpClient,
    options: HttpOptions,
    decoder: Decoder,
    /// For a small file from question to last byte.
    query_timeout: Duration,
    questions: Semaphore,
    /// The same where they share one connection.
    shared_questions: Semaphore,
    /// Whether the last greeting showed that they do.
    multiplexed: AtomicBool,
    // Never held over an await.
    rest: Mutex<Rest>,
}

/// When the cache is left alone.
#[derive(Default)]
struct Rest {
    until: Option<Instant>,
    /// Answers running that blame the server.
    failures: u32,
    backoff: Backoff,
    /// When it was last seen that connections cannot be shared, though that is offered.
    refused_sharing: Option<Instant>,
}

/// What a file is asked for as.
#[derive(Clone, Copy)]
enum Kind {
    Greeting,
    Question,
    Bulk,
}

impl CacheHttp {
    /// Takes a client; `query_timeout` bounds each small file.
    pub fn new(
        client: HttpClient,
        options: HttpOptions,
        decoder: Decoder,
        query_timeout: Duration,
    ) -> Self {
        Self {
            client,
            options,
            decoder,
            query_timeout,
            questions: Semaphore::new(QUESTIONS_MAX),
            shared_questions: Semaphore::new(QUESTIONS_MULTIPLEXED_MAX),
            multiplexed: AtomicBool::new(false),
            rest: Mutex::default(),
        }
    }

    /// Tries whether questions and small NARs can share connections, where that is offered.
    ///
    /// A proxy may have passed the offer on and know nothing of it; then it is not tried again for a while.
    async fn shares(&self, peer: &Peer) -> bool {
        let refused = self.rest().refused_sharing;
        let lately = refused.is_some_and(|at| at.elapsed() < SHARING_REFUSED);
        let offered = peer.offers.h2c && self.client.cache().scheme() == Scheme::Http;
        let info = self.client.cache().file(INFO).ok();
        let Some(info) = info.filter(|_| offered && !lately) else {
            self.client.share_no_more();
            return false;
        };
        let shares = self.client.try_sharing(info).await;
        self.rest().refused_sharing = (!shares).then(Instant::now);
        if !shares {
            debug!(cache = %self.client.cache(), "HTTP/2 is offered and cannot be had");
        }
        shares
    }

    /// Asks for a small file and reads it, within the bound for both.
    async fn fetch(
        &self,
        kind: Kind,
        name: &str,
        bytes_max: usize,
    ) -> Result<Option<(Bytes, Peer)>, Error> {
        let uri = self.client.cache().file(name);
        let uri = uri.map_err(|e| Error::Unsupported(e.to_string().into()))?;
        let answer = async {
            let _permit = match self.multiplexed.load(Ordering::Relaxed) {
                true => self.shared_questions.acquire().await,
                false => self.questions.acquire().await,
            };
            let got = match kind {
                Kind::Greeting => self.client.greet(uri).await?,
                Kind::Question => self.client.ask(uri).await?,
                Kind::Bulk => self.client.transfer(uri, 0, FileSize::Small).await?,
            };
            if !self.is_there(&got)? {
                return Ok(None);
            }
            let peer = got.peer();
            let text = whole(self.body(got, FileSize::Small)?, bytes_max).await?;
            Ok(Some((text, peer)))
        };
        let after = self.query_timeout;
        let question = "GET";
        let timed_out = Err(Error::TimedOut { question, after });
        timeout(after, answer).await.unwrap_or(timed_out)
    }

    /// Judges an answer; whatever blames the server counts for leaving it alone.
    fn is_there(&self, got: &Got) -> Result<bool, Error> {
        let status = got.status;
        let overloaded = matches!(
            status,
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
        );
        if overloaded || status.is_server_error() {
            let mut rest = self.rest();
            rest.failures += 1;
            if overloaded || rest.failures >= FAILURES_MAX {
                let pause = rest.backoff.failed(fastrand::f64());
                let pause = got.retry_after().unwrap_or(pause).min(PAUSE_MAX);
                rest.until = Some(Instant::now() + pause);
            }
            return Err(Error::Remote(status.to_string().into()));
        }
        let mut rest = self.rest();
        if rest.until.is_none_or(|until| until <= Instant::now()) {
            *rest = Rest {
                refused_sharing: rest.refused_sharing,
                ..Rest::default()
            };
        }
        match status {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT => Ok(true),
            StatusCode::NOT_FOUND | StatusCode::GONE | StatusCode::FORBIDDEN => Ok(false),
            StatusCode::UNAUTHORIZED => Err(Error::Remote(
                format!("{status}; does it want a credentials-file or netrc-file?").into(),
            )),
            _ => Err(Error::Remote(status.to_string().into())),
        }
    }

    /// Returns the body without what was put around the file on its way.
    fn body(&self, got: Got, size: FileSize) -> Result<FileStream, Error> {
        let options = HttpOptions {
            drip_bytes: match size {
                FileSize::Small | FileSize::Large => self.options.drip_bytes,
                FileSize::Endless => 0,
            },
            ..self.options.clone()
        };
        let encoding = match got.content_encoding() {
            None => return Ok(got.body(&options)),
            Some("x-gzip") => Some(Compression::Gzip),
            Some(name) => Compression::parse(&name.to_ascii_lowercase()),
        };
        let name = got.content_encoding().unwrap_or_default().to_owned();
        let body = got.body(&options);
        let decoded = encoding.and_then(|encoding| self.decoder.decode_stream(encoding, body));
        let decoded = decoded.ok_or_else(|| {
            Error::Unsupported(format!("content encoding {name:?} cannot be read").into())
        })?;
        Ok(decoded.map(|chunk| chunk.map_err(decode_error)).boxed())
    }

    /// Fails while the cache is left alone.
    fn check_rest(&self) -> Result<(), Error> {
        let until = self.rest().until;
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        match left.filter(|left| !left.is_zero()) {
            None => Ok(()),
            Some(left) => Err(Error::Down(
                format!("it is overloaded, left alone for {left:.1?}").into(),
            )),
        }
    }

    fn rest(&self) -> MutexGuard<'_, Rest> {
        self.rest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl CacheFiles for CacheHttp {
    async fn greet(&self) -> Result<Greeting, Error> {
        let Some((info, peer)) = self.fetch(Kind::Greeting, INFO, INFO_BYTES_MAX).await? else {
            let cause = "it does not appear to be a binary cache: there is no nix-cache-info, or it may not be read";
            return Err(Error::Remote(cause.into()));
        };
        self.client.note_offers(peer.offers);
        let multiplexed = peer.multiplexed || self.shares(&peer).await;
        self.multiplexed.store(multiplexed, Ordering::Relaxed);
        let version = if multiplexed { "HTTP/2" } else { "HTTP/1.1" };
        let peer = match peer.server {
            Some(server) => format!("{server}, {version}"),
            None => version.to_owned(),
        };
        Ok(Greeting { info, peer })
    }

    async fn read(&self, name: &str, bytes_max: usize) -> Result<Option<Bytes>, Error> {
        self.check_rest()?;
        // Logs and closures do not hold up questions.
        let kind = match bytes_max > QUESTION_BYTES_MAX {
            true => Kind::Bulk,
            false => Kind::Question,
        };
        let found = self.fetch(kind, name, bytes_max).await?;
        Ok(found.map(|(text, _)| text))
    }

    fn locate(&self, url: &str) -> Result<String, Error> {
        let found = self.client.cache().resolve(url, self.client.hosts());
        let refused =
            |error: super::http_url::UrlError| Error::Unsupported(error.to_string().into());
        found.map(|uri| uri.to_string()).map_err(refused)
    }

    async fn open(
        &self,
        place: &str,
        offset: u64,
        size: FileSize,
    ) -> Result<Option<FilePart>, Error> {
        self.check_rest()?;
        let malformed = |_| Error::Unsupported("the address of a NAR cannot be sent".into());
        let uri: Uri = place.parse().map_err(malformed)?;
        let got = self.client.transfer(uri, offset, size).await?;
        if !self.is_there(&got)? {
            return Ok(None);
        }
        // What a server puts around a file is not cut where the file is.
        let as_asked = got.begins_at(offset) && got.content_encoding().is_none();
        let begins_at = match (as_asked, got.status) {
            (true, _) => offset,
            (false, StatusCode::OK) => 0,
            (false, _) if offset == 0 => 0,
            (false, _) => {
                let cause = "it sends another part of the file than was asked for";
                return Err(Error::Protocol(cause.into()));
            }
        };
        let bytes = self.body(got, size)?;
        Ok(Some(FilePart { begins_at, bytes }))
    }

    fn renew(&self) {
        self.client.renew();
    }

    fn heard(&self) -> Option<watch::Receiver<Option<Instant>>> {
        Some(self.client.heard())
    }

    /// Goes past those who wait for their turn to ask; what is answered does not matter.
    async fn pulse(&self) -> Result<(), Error> {
        let uri = self.client.cache().file(INFO);
        let uri = uri.map_err(|e| Error::Unsupported(e.to_string().into()))?;
        let got = self.client.greet(uri).await?;
        // Read to its end, its connection serves again.
        let _read = whole(got.body(&self.options), INFO_BYTES_MAX).await;
        Ok(())
    }

    fn tells_closures(&self) -> bool {
        self.client.offers().closure
    }

    fn questions_max(&self) -> usize {
        match self.multiplexed.load(Ordering::Relaxed) {
            true => QUESTIONS_MULTIPLEXED_MAX,
            false => QUESTIONS_MAX,
        }
    }

    fn shares_connections(&self) -> bool {
        self.client.shares_connections()
    }
}

/// Tells a body that broke off from one that is damaged.
pub(super) fn decode_error(error: DecodeError<Error>) -> Error {
    match error {
        DecodeError::Source(error) => error,
        DecodeError::Damaged { ref cause, .. } => {
            Error::Protocol(format!("{error}: {cause}").into())
        }
    }
}

/// Questions at once over HTTP/1, a connection each; as many as Nix asks.
const QUESTIONS_MAX: usize = 25;

/// The same where they share one connection; servers allow 100 to 128 streams.
const QUESTIONS_MULTIPLEXED_MAX: usize = 100;

/// Of a question's answer; what may be larger goes where small NARs go.
const QUESTION_BYTES_MAX: usize = 1 << 20;

/// For which an offer that did not hold is not tried again.
const SHARING_REFUSED: Duration = Duration::from_secs(600);

const INFO: &str = "nix-cache-info";
const INFO_BYTES_MAX: usize = 64 << 10;

/// One 500 may be about one path; three running are about the server.
const FAILURES_MAX: u32 = 3;
