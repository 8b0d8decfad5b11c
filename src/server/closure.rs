//! `GET /muster/closure/<hash>`: all narinfos of a closure at once, for other musters.
//!
//! Answered of the own store alone, which has closures whole; who asks without that scope is told 404, as is who
//! asks for a path that is not there, or while many are told already: narinfos are had one by one as well. The
//! format is in `codec::closure_wire`; a store that fails in the middle leaves the answer without its end, and so
//! does a closure of more bytes than anybody reads.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use hyper::Response;
use tokio::sync::Semaphore;
use tracing::debug;

use super::response::{self, Body};
use crate::codec::closure_wire;
use crate::nix::store_path::StorePathHash;
use crate::substituter::Substituter;
use crate::upstream::peer_closures::BYTES_MAX;

/// The closures that are told at the moment.
#[derive(Clone)]
pub(super) struct Closures {
    places: Arc<Semaphore>,
}

impl Closures {
    /// Begins to tell one; `None`: it is not there, or there is no place.
    pub(super) async fn open(
        &self,
        substituter: &Substituter,
        top: StorePathHash,
    ) -> Option<Response<Body>> {
        let place = Arc::clone(&self.places).try_acquire_owned().ok()?;
        let told = substituter.own_closure(top).await?;
        let told = told.map(Some).chain(stream::iter([None]));
        let whole = told.scan(closure_wire::begin().len(), move |bytes, narinfos| {
            let _held = &place;
            let piece = match narinfos {
                None => Some(closure_wire::end()),
                Some(Ok(narinfos)) => closure_wire::frames(&narinfos),
                Some(Err(error)) => {
                    debug!(path.hash = %top, %error, "a closure cannot be told to its end");
                    None
                }
            };
            *bytes += piece.as_ref().map_or(0, Bytes::len);
            let fits = *bytes <= BYTES_MAX;
            if !fits {
                debug!(path.hash = %top, "a closure of more than {BYTES_MAX} bytes is not told");
            }
            std::future::ready(piece.filter(|_| fits))
        });
        let pieces = stream::iter([closure_wire::begin()]).chain(whole);
        let pieces = pieces.map(Ok::<Bytes, _>).boxed();
        Some(response::stream(CLOSURE, pieces, None))
    }
}

impl Default for Closures {
    fn default() -> Self {
        Self {
            places: Arc::new(Semaphore::new(CLOSURES_MAX)),
        }
    }
}

/// Closures told at the same time: a large one holds some 10 MB of names.
const CLOSURES_MAX: usize = 32;

const CLOSURE: &str = "application/x-muster-closure";
