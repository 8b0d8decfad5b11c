//! One request: route, one call to the substituter, response.

use bytes::Bytes;
use futures_util::StreamExt as _;
use hyper::body::Incoming;
use hyper::{Method, Request, Response};
use tokio::sync::watch;

use crate::codec::compression::Encoding;
use crate::codec::slice::slice;
use crate::substituter::Substituter;
use crate::substituter::nar_url::NarUrl;
use crate::substituter::transfer::NarBody;

use super::Info;
use super::catalog::Feeds;
use super::error::Error;
use super::range;
use super::response::{self, Body};
use super::route::Route;

/// Answers requests.
#[derive(Clone)]
pub(super) struct Handler {
    substituter: Substituter,
    info: watch::Receiver<Info>,
    feeds: Feeds,
}

impl Handler {
    pub(super) fn new(substituter: Substituter, info: watch::Receiver<Info>, feeds: Feeds) -> Self {
        Self {
            substituter,
            info,
            feeds,
        }
    }

    /// Answers one request. Dropped when the client leaves; what it asked for is given up, unless
    /// somebody else waits for it too.
    pub(super) async fn handle(&self, request: Request<Incoming>) -> Response<Body> {
        let only_head = match *request.method() {
            Method::GET => false,
            Method::HEAD => true,
            _ => return response::error(Error::ReadOnly),
        };
        let uri = request.uri();
        let answer = match Route::parse(uri.path(), uri.query()) {
            Route::NarInfo(hash) => self.narinfo(hash).await,
            Route::Nar(url) if only_head => self.nar_head(&url).await,
            Route::Nar(url) => self.nar(&url, &request).await,
            Route::CacheInfo => {
                let text = self.info.borrow().cache_info.clone();
                Ok(response::named(response::whole(
                    "text/x-nix-cache-info",
                    text,
                )))
            }
            Route::Log(derivation) => {
                let log = self.substituter.build_log(&derivation).await;
                log.map(|log| response::whole(response::TEXT, log))
                    .ok_or(Error::NotFound)
            }
            Route::Realisation(id) => {
                let realisation = self.substituter.realisation(&id).await;
                realisation
                    .map(|r| response::whole("application/json", Bytes::from(r.render())))
                    .ok_or(Error::NotFound)
            }
            Route::BuildTrace(key) => {
                let entry = self.substituter.build_trace(&key).await;
                entry
                    .map(|e| response::whole("application/json", Bytes::from(e.render())))
                    .ok_or(Error::NotFound)
            }
            Route::Catalog => self.feeds.open(&self.substituter).ok_or(Error::NotFound),
            Route::PublicKey => {
                let keys = self.info.borrow().public_keys.clone();
                Ok(response::whole(response::TEXT, keys))
            }
            Route::Health => {
                let report = Bytes::from(self.substituter.report().to_string());
                Ok(response::whole("application/json", report))
            }
            Route::Root => Ok(response::whole(response::TEXT, Bytes::from_static(ROOT))),
            Route::Unknown => Err(Error::NotFound),
        };
        answer.unwrap_or_else(response::error)
    }

    async fn narinfo(
        &self,
        hash: crate::nix::store_path::StorePathHash,
    ) -> Result<Response<Body>, Error> {
        let text = self.substituter.narinfo(hash).await;
        text.map(|text| response::whole("text/x-nix-narinfo", text))
            .ok_or(Error::NotFound)
    }

    async fn nar_head(&self, url: &NarUrl) -> Result<Response<Body>, Error> {
        let size = self
            .substituter
            .nar_size(url)
            .await
            .ok_or(Error::NotFound)?;
        Ok(match url.encoding {
            Encoding::None => response::with_range(response::head(NAR, Some(size)), None, size),
            Encoding::Zstd | Encoding::Xz => response::head(NAR, None),
        })
    }

    async fn nar(
        &self,
        url: &NarUrl,
        request: &Request<Incoming>,
    ) -> Result<Response<Body>, Error> {
        let nar = self.substituter.nar(url).await.ok_or(Error::NotFound)?;
        let size = nar.size_bytes;
        if url.encoding != Encoding::None {
            // Made on the fly: two of them need not be the same bytes, so no ranges.
            return Ok(match nar.body {
                NarBody::Whole(bytes) => response::whole(NAR, bytes),
                NarBody::Stream(stream) => response::stream(NAR, stream, None),
            });
        }
        let part = range::of(request.headers(), size)?;
        let answer = match (nar.body, part.clone()) {
            (NarBody::Whole(bytes), None) => response::whole(NAR, bytes),
            (NarBody::Whole(bytes), Some(part)) => {
                // A whole NAR is in memory, so its size fits.
                let place = |at: u64| usize::try_from(at).unwrap_or(bytes.len());
                let part = place(part.start)..place(part.end);
                response::whole(NAR, bytes.slice(part))
            }
            (NarBody::Stream(stream), None) => response::stream(NAR, stream, Some(size)),
            (NarBody::Stream(stream), Some(part)) => {
                let length = part.end - part.start;
                response::stream(NAR, slice(stream, part).boxed(), Some(length))
            }
        };
        Ok(response::with_range(answer, part, size))
    }
}

const NAR: &str = "application/x-nix-nar";
const ROOT: &[u8] = b"This is Muster, a Nix binary cache over many builders.\n\
    See /nix-cache-info, /public-key and /healthz.\n";
