//! One request: route, one call to the substituter, response.

use std::ops::Range;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use hyper::body::Incoming;
use hyper::{Method, Request, Response};
use tokio::sync::watch;

use crate::codec::compression::Encoding;
use crate::codec::slice::slice;
use crate::substituter::Substituter;
use crate::substituter::nar_url::NarUrl;
use crate::substituter::transfer::{self, Extent, NarBody};

use super::Info;
use super::catalog::Feeds;
use super::closure::Closures;
use super::error::Error;
use super::range;
use super::response::{self, Body};
use super::route::Route;
use super::scope::{Scope, offer};
use super::splice::{FileBody, FileQueue};

/// Answers requests.
pub(super) struct Handler {
    substituter: Substituter,
    info: watch::Receiver<Info>,
    feeds: Feeds,
    closures: Closures,
}

impl Handler {
    pub(super) fn new(substituter: Substituter, info: watch::Receiver<Info>, feeds: Feeds) -> Self {
        Self {
            substituter,
            info,
            feeds,
            closures: Closures::default(),
        }
    }

    /// Answers for the own store alone.
    fn of_own_store(&self) -> Self {
        Self {
            substituter: self.substituter.own_store(),
            info: self.info.clone(),
            feeds: self.feeds.clone(),
            closures: self.closures.clone(),
        }
    }

    /// Answers one request. Dropped when the client leaves; what it asked for is given up, unless
    /// somebody else waits for it too. `files` is the queue of its connection, if that sends files by itself.
    pub(super) async fn handle(
        &self,
        request: Request<Incoming>,
        files: Option<FileQueue>,
    ) -> Response<Body> {
        let only_head = match *request.method() {
            Method::GET => false,
            Method::HEAD => true,
            _ => return response::error(Error::ReadOnly),
        };
        let own_store;
        let this = match Scope::of(request.headers()) {
            Scope::All => self,
            Scope::OwnStore => {
                own_store = self.of_own_store();
                &own_store
            }
        };
        let uri = request.uri();
        let answer = match Route::parse(uri.path(), uri.query()) {
            Route::NarInfo(hash) => this.narinfo(hash).await,
            Route::Nar(url) if only_head => this.nar_head(&url).await,
            Route::Nar(url) => this.nar(&url, &request, files).await,
            Route::CacheInfo => {
                let text = this.info.borrow().cache_info.clone();
                let offer = offer(self.substituter.has_own_store());
                let answer = response::whole("text/x-nix-cache-info", text);
                Ok(response::named(answer, offer))
            }
            Route::Log(derivation) => {
                let log = this.substituter.build_log(&derivation).await;
                log.map(|log| response::whole(response::TEXT, log))
                    .ok_or(Error::NotFound)
            }
            Route::Realisation(id) => {
                let realisation = this.substituter.realisation(&id).await;
                realisation
                    .map(|r| response::whole("application/json", Bytes::from(r.render())))
                    .ok_or(Error::NotFound)
            }
            Route::BuildTrace(key) => {
                let entry = this.substituter.build_trace(&key).await;
                entry
                    .map(|e| response::whole("application/json", Bytes::from(e.render())))
                    .ok_or(Error::NotFound)
            }
            Route::Catalog => this.feeds.open(&this.substituter).ok_or(Error::NotFound),
            Route::Closure(hash) => {
                let closure = this.closures.open(&this.substituter, hash).await;
                closure.ok_or(Error::NotFound)
            }
            Route::PublicKey => {
                let keys = this.info.borrow().public_keys.clone();
                Ok(response::whole(response::TEXT, keys))
            }
            Route::Health => {
                let report = Bytes::from(this.substituter.report().to_string());
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
        Ok(text.map_or_else(response::absent, |text| {
            response::whole("text/x-nix-narinfo", text)
        }))
    }

    async fn nar_head(&self, url: &NarUrl) -> Result<Response<Body>, Error> {
        let head = self.substituter.nar_head(url).await;
        let head = head.ok_or(Error::NotFound)?;
        let response = response::head(NAR, head.length);
        Ok(match head.length.filter(|_| head.in_parts) {
            Some(length) => response::with_range(response, None, length),
            None => response,
        })
    }

    async fn nar(
        &self,
        url: &NarUrl,
        request: &Request<Incoming>,
        files: Option<FileQueue>,
    ) -> Result<Response<Body>, Error> {
        let extent = match range::is_asked_for(request.headers()) {
            true => Extent::Part,
            false => Extent::Whole,
        };
        let nar = self.substituter.nar(url, extent).await;
        let nar = nar.ok_or(Error::NotFound)?;
        let size = nar.size_bytes;
        // What is made on the fly need not come out as the same bytes again, so it has no ranges.
        let in_parts = match nar.body {
            NarBody::File(_) => url.file_hash.is_some(),
            NarBody::Whole(_) | NarBody::Checked { .. } | NarBody::Stream(_) => {
                url.encoding == Encoding::None
            }
        };
        let part = match in_parts {
            true => range::of(request.headers(), size)?,
            false => None,
        };
        let answer = match nar.body {
            NarBody::File(kept) => {
                let extent = part.clone().unwrap_or(0..kept.nar.size_bytes);
                match files {
                    Some(files) => response::file(NAR, FileBody::new(kept, extent, files)),
                    None => {
                        let length = extent.end - extent.start;
                        response::stream(NAR, kept.read(extent), Some(length))
                    }
                }
            }
            NarBody::Whole(bytes) => {
                // A whole NAR is in memory, so its size fits.
                let place = |at: u64| usize::try_from(at).unwrap_or(bytes.len());
                let wanted = part.clone().map(|part| place(part.start)..place(part.end));
                response::whole(NAR, bytes.slice(wanted.unwrap_or(0..bytes.len())))
            }
            NarBody::Checked { stream, length } => streamed(stream, part.clone(), Some(length)),
            NarBody::Stream(stream) => streamed(stream, part.clone(), in_parts.then_some(size)),
        };
        Ok(match in_parts {
            true => response::with_range(answer, part, size),
            false => answer,
        })
    }
}

/// Answers with a stream of so many bytes, or with a part of it.
fn streamed(
    stream: BoxStream<'static, Result<Bytes, transfer::Error>>,
    part: Option<Range<u64>>,
    length: Option<u64>,
) -> Response<Body> {
    match part {
        Some(part) => {
            let length = part.end - part.start;
            response::stream(NAR, slice(stream, part).boxed(), Some(length))
        }
        None => response::stream(NAR, stream, length),
    }
}

const NAR: &str = "application/x-nix-nar";
const ROOT: &[u8] = b"This is Muster, a Nix binary cache over many builders.\n\
    See /nix-cache-info, /public-key and /healthz.\n";
