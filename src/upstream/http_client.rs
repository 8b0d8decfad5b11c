//! How a binary cache is spoken to: GET over HTTP/1.1, over HTTP/2 where TLS agrees on it or a muster offers it.
//!
//! Small files and NARs have connections of their own, so that no NAR delays a question. Each phase has its
//! bound: connecting (TLS included), the head of an answer with all redirects, silence and slow drip in a body.
//! Redirects stay where [`CacheUrl::redirect`] allows, at most five; credentials are shown to the cache's own
//! scheme, host and port alone. This file knows nothing of what the files hold.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt as _};
use http_body::{Body, Frame};
use hyper::body::Incoming;
use hyper::header::{
    ACCEPT, AUTHORIZATION, CONTENT_ENCODING, HeaderMap, HeaderName, HeaderValue, LOCATION,
    RETRY_AFTER, SERVER, USER_AGENT,
};
use hyper::{Request, Response, StatusCode, Uri, Version};
use hyper_util::client::legacy::Client;
use rustls::ClientConfig;
use tokio::sync::watch;
use tokio::time::timeout;

use super::Error;
use super::cache_files::FileSize;
use super::http_credentials::Credentials;
use super::http_drip::Drip;
use super::http_pools::{Clients, Connector, NoBody};
use super::http_url::CacheUrl;

/// A client of one cache; its connections are closed when it is dropped.
pub struct HttpClient {
    // Never held over an await.
    clients: Mutex<Clients>,
    tls: Arc<ClientConfig>,
    cache: CacheUrl,
    access: Access,
    options: HttpOptions,
    // What the cache offered when it was last greeted; never held over an await.
    offers: Mutex<Offers>,
    /// Whether it is spoken to over HTTP/2 without TLS.
    shares: AtomicBool,
    heard: Heard,
}

/// What a cache lets us do, and where it may send us.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// Shown to the cache itself alone.
    pub credentials: Option<Credentials>,
    /// Further hosts that its narinfos and redirects may lead to: `host`, `host:port` or `*`.
    pub hosts: Vec<String>,
}

/// The bounds of a client.
#[derive(Clone, Debug)]
pub struct HttpOptions {
    /// Name look-up, TCP and TLS together.
    pub connect_timeout: Duration,
    /// From the request to the head of the answer, all redirects and the connecting included.
    pub head_timeout: Duration,
    /// Silence in the middle of a body.
    pub silence: Duration,
    /// A body must bring as many bytes while we wait for it as `drip_bytes` in each `drip_time`: slower than a
    /// modem, and it would hold a transfer for days.
    pub drip_time: Duration,
    /// See `drip_time`.
    pub drip_bytes: u64,
    /// Idle connections that are kept, of each of the two kinds: what a burst of questions over HTTP/1 opened.
    pub idle_max: usize,
    /// After so long without use a connection is closed; most servers close it after 60 to 75 s.
    pub idle_timeout: Duration,
}

/// What was got.
pub struct Got {
    /// The whole head; its bounds are hyper's: 100 lines in 256 KiB, or 16 KiB over HTTP/2.
    pub status: StatusCode,
    headers: HeaderMap,
    version: Version,
    body: Incoming,
    /// Told of each piece of the body; not where another host sends it.
    heard: Option<Heard>,
}

/// When bytes of the cache last came.
type Heard = watch::Sender<Option<tokio::time::Instant>>;

/// What answers, as far as it says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// `Server`, its first 60 characters.
    pub server: Option<String>,
    /// Whether many questions share one connection.
    pub multiplexed: bool,
    /// What it offers, if it is a muster.
    pub offers: Offers,
}

/// What a muster offers beyond what all caches do; see the server's `scope`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offers {
    /// To answer for its own store alone.
    pub own_store: bool,
    /// To tell whole closures of it.
    pub closure: bool,
    /// To be spoken to over HTTP/2 without TLS.
    pub h2c: bool,
}

impl Offers {
    /// Reads the list; words that are not known mean nothing, and without a store of its own there are no closures.
    pub fn parse(list: &str) -> Self {
        let has = |word| list.split(',').any(|offer| offer.trim() == word);
        let own_store = has(OWN_STORE);
        Self {
            own_store,
            closure: own_store && has(CLOSURE),
            h2c: has(H2C),
        }
    }
}

/// What is asked for, as far as it matters to the connection.
#[derive(Clone, Copy)]
enum Load {
    Greeting,
    Question,
    Nar(FileSize),
}

impl HttpClient {
    /// Makes a client; nothing is connected to yet.
    pub fn new(
        cache: CacheUrl,
        tls: Arc<ClientConfig>,
        access: Access,
        options: HttpOptions,
    ) -> Self {
        let clients = Clients::new(&tls, &options);
        Self {
            clients: Mutex::new(clients),
            tls,
            cache,
            access,
            options,
            offers: Mutex::default(),
            shares: AtomicBool::new(false),
            heard: watch::Sender::new(None),
        }
    }

    /// Tries whether questions and small NARs of the cache can share connections, over HTTP/2 without TLS; from
    /// then on they do, or do not any more.
    ///
    /// Both connections are opened by it. Who swallows the question without a word is given two seconds.
    pub async fn try_sharing(&self, uri: Uri) -> bool {
        let Clients {
            shared_questions,
            shared_nars,
            ..
        } = self.clients();
        let try_one = async |client: Client<Connector, NoBody>| {
            let answer = timeout(TRIAL, self.once(&client, &uri, None)).await;
            matches!(answer, Ok(Ok(answer)) if answer.status().is_success())
        };
        let (questions, nars) = tokio::join!(try_one(shared_questions), try_one(shared_nars));
        self.share(questions && nars);
        questions && nars
    }

    /// Says whether they share connections.
    pub fn shares_connections(&self) -> bool {
        self.shares.load(Ordering::Relaxed)
    }

    /// Has them share connections no more.
    pub fn share_no_more(&self) {
        self.share(false);
    }

    fn share(&self, shares: bool) {
        self.shares.store(shares, Ordering::Relaxed);
    }

    /// Asks for a small file over a connection of its own kind, whatever is shared.
    pub async fn greet(&self, uri: Uri) -> Result<Got, Error> {
        self.get(Load::Greeting, uri, None).await
    }

    /// Has the cache asked for its own store alone from now on, or for all that it has.
    ///
    /// To be called with what its `nix-cache-info` came with.
    pub fn note_offers(&self, offers: Offers) {
        *self.offers.lock().unwrap_or_else(PoisonError::into_inner) = offers;
    }

    /// Returns what the cache offered when it was last greeted.
    pub fn offers(&self) -> Offers {
        *self.offers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows when bytes of the cache last came, whatever was asked for.
    pub fn heard(&self) -> watch::Receiver<Option<tokio::time::Instant>> {
        self.heard.subscribe()
    }

    /// Returns the cache's address.
    pub fn cache(&self) -> &CacheUrl {
        &self.cache
    }

    /// Returns where a narinfo of this cache may send us.
    pub fn hosts(&self) -> &[String] {
        &self.access.hosts
    }

    /// Asks for a small file. Dropping the future gives the question up.
    pub async fn ask(&self, uri: Uri) -> Result<Got, Error> {
        self.get(Load::Question, uri, None).await
    }

    /// Asks for a NAR, from this byte on. Dropping the future or the body ends the transfer.
    pub async fn transfer(&self, uri: Uri, offset: u64, size: FileSize) -> Result<Got, Error> {
        let range = (offset > 0).then(|| format!("bytes={offset}-"));
        let range = range.and_then(|range| HeaderValue::try_from(range).ok());
        self.get(Load::Nar(size), uri, range).await
    }

    /// Lets go of all connections: those of before a sleep are dead, and would be asked one after the other.
    ///
    /// What is under way goes on.
    pub fn renew(&self) {
        *self.lock() = Clients::new(&self.tls, &self.options);
    }

    fn clients(&self) -> Clients {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Clients> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn get(&self, load: Load, uri: Uri, range: Option<HeaderValue>) -> Result<Got, Error> {
        let after = self.options.head_timeout;
        let followed = self.follow(load, uri, range);
        timeout(after, followed)
            .await
            .unwrap_or(Err(Error::TimedOut {
                question: "GET",
                after,
            }))
    }

    async fn follow(
        &self,
        load: Load,
        mut uri: Uri,
        range: Option<HeaderValue>,
    ) -> Result<Got, Error> {
        for _ in 0..=REDIRECTS_MAX {
            let client = self.client(load, &uri);
            let response = self.once(&client, &uri, range.clone()).await?;
            let heard = self.cache.is_home_of(&uri).then(|| self.heard.clone());
            note(heard.as_ref());
            if !is_redirect(response.status()) {
                let (head, body) = response.into_parts();
                return Ok(Got {
                    status: head.status,
                    version: head.version,
                    headers: head.headers,
                    body,
                    heard,
                });
            }
            let location = text_of(response.headers(), &LOCATION);
            let location = location.ok_or_else(|| Error::Remote("a redirect to nowhere".into()))?;
            let next = self.cache.redirect(&uri, location, &self.access.hosts);
            uri = next.map_err(|e| Error::Unsupported(format!("redirect refused: {e}").into()))?;
        }
        let cause = format!("more than {REDIRECTS_MAX} redirects");
        Err(Error::Remote(cause.into()))
    }

    /// Chooses the connections for a request.
    fn client(&self, load: Load, uri: &Uri) -> Client<Connector, NoBody> {
        let shares = self.shares_connections() && self.cache.is_home_of(uri);
        let Clients {
            questions,
            nars,
            shared_questions,
            shared_nars,
        } = self.clients();
        match load {
            Load::Question if shares => shared_questions,
            Load::Question | Load::Greeting => questions,
            Load::Nar(FileSize::Small) if shares => shared_nars,
            Load::Nar(_) => nars,
        }
    }

    /// Asks at one address; once more where the connection went, as a server closes idle ones just when one is used.
    async fn once(
        &self,
        client: &Client<Connector, NoBody>,
        uri: &Uri,
        range: Option<HeaderValue>,
    ) -> Result<Response<Incoming>, Error> {
        let lost = |error| Error::Lost(chain(&error).into());
        match client.request(self.request(uri, range.clone())).await {
            Err(error) if !error.is_connect() => {
                let again = client.request(self.request(uri, range)).await;
                again.map_err(lost)
            }
            answer => answer.map_err(lost),
        }
    }

    fn request(&self, uri: &Uri, range: Option<HeaderValue>) -> Request<NoBody> {
        let mut request = Request::new(NoBody);
        *request.uri_mut() = uri.clone();
        let headers = request.headers_mut();
        headers.insert(ACCEPT, HeaderValue::from_static("*/*"));
        headers.insert(USER_AGENT, HeaderValue::from_static(AGENT));
        if let Some(range) = range {
            headers.insert(hyper::header::RANGE, range);
        }
        if self.offers().own_store && self.cache.is_home_of(uri) {
            headers.insert(SCOPE, HeaderValue::from_static(OWN_STORE));
        }
        if let Some(credentials) = &self.access.credentials
            && self.cache.is_home_of(uri)
        {
            headers.insert(AUTHORIZATION, credentials.header());
        }
        request
    }
}

impl Got {
    /// Returns the server's clock as it writes it, where it does.
    pub fn date(&self) -> Option<&str> {
        text_of(&self.headers, &hyper::header::DATE)
    }

    /// Returns what answers, as far as it says.
    pub fn peer(&self) -> Peer {
        let server = text_of(&self.headers, &SERVER);
        let printable = |c: &char| !c.is_control();
        Peer {
            server: server.map(|text| text.chars().filter(printable).take(60).collect()),
            multiplexed: self.version == Version::HTTP_2,
            offers: text_of(&self.headers, &OFFERS).map_or_else(Offers::default, Offers::parse),
        }
    }

    /// Returns the encoding that was put around the file, `identity` being none.
    pub fn content_encoding(&self) -> Option<&str> {
        let encoding = text_of(&self.headers, &CONTENT_ENCODING).map(str::trim);
        encoding.filter(|name| !name.is_empty() && !name.eq_ignore_ascii_case("identity"))
    }

    /// Returns how long the server asks us to stay away, in seconds.
    pub fn retry_after(&self) -> Option<Duration> {
        let seconds = text_of(&self.headers, &RETRY_AFTER)?.trim().parse().ok()?;
        Some(Duration::from_secs(seconds))
    }

    /// Tells whether this is the rest of a file from this byte on, as asked for.
    pub fn begins_at(&self, offset: u64) -> bool {
        let range = text_of(&self.headers, &hyper::header::CONTENT_RANGE);
        let begins = |range: &str| range.trim().starts_with(&format!("bytes {offset}-"));
        match self.status {
            StatusCode::PARTIAL_CONTENT => range.is_some_and(begins),
            status => status == StatusCode::OK && offset == 0,
        }
    }

    /// Returns the body's chunks; silence and slow drip end it with an error.
    pub fn body(self, options: &HttpOptions) -> BoxStream<'static, Result<Bytes, Error>> {
        let drip = Drip::new(options);
        let state = Some((self.body, drip, options.silence));
        let heard = self.heard;
        let chunks = stream::unfold(state, |state| async move {
            let (mut body, mut drip, silence) = state?;
            loop {
                let begun = Instant::now();
                let frame = std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx));
                let frame = match timeout(silence, frame).await {
                    Ok(frame) => frame?,
                    Err(_) => {
                        let question = "the rest of a body";
                        let after = silence;
                        return Some((Err(Error::TimedOut { question, after }), None));
                    }
                };
                match frame.map(Frame::into_data) {
                    // Trailers, or nothing.
                    Ok(Err(_)) => {}
                    Ok(Ok(data)) => {
                        if let Err(error) = drip.count(data.len(), begun.elapsed()) {
                            return Some((Err(error), None));
                        }
                        if !data.is_empty() {
                            return Some((Ok(data), Some((body, drip, silence))));
                        }
                    }
                    Err(error) => return Some((Err(Error::Lost(chain(&error).into())), None)),
                }
            }
        });
        let chunks = chunks.inspect(move |chunk| {
            if chunk.is_ok() {
                note(heard.as_ref());
            }
        });
        chunks.boxed()
    }
}

impl Default for HttpOptions {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(5),
            head_timeout: Duration::from_secs(10),
            silence: Duration::from_secs(10),
            drip_time: Duration::from_secs(30),
            drip_bytes: 30 << 10,
            idle_max: 32,
            idle_timeout: Duration::from_secs(50),
        }
    }
}

fn note(heard: Option<&Heard>) {
    if let Some(heard) = heard {
        heard.send_replace(Some(tokio::time::Instant::now()));
    }
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

fn text_of<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// Writes an error with its causes, each once: "client error" alone tells nobody anything.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let words = cause.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        next = cause.source();
    }
    text
}

const AGENT: &str = concat!("muster/", env!("CARGO_PKG_VERSION"));

/// What a muster says that it can do, and what one asks of it; see the server's `scope`.
const OFFERS: HeaderName = HeaderName::from_static("muster-offers");
const SCOPE: HeaderName = HeaderName::from_static("muster-scope");
const OWN_STORE: &str = "own-store";
const CLOSURE: &str = "closure";
const H2C: &str = "h2c";

/// For a first answer over HTTP/2.
const TRIAL: Duration = Duration::from_secs(2);

/// What browsers and curl allow.
const REDIRECTS_MAX: usize = 5;
