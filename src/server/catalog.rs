//! `GET /muster/catalog`: the live catalog of a muster that serves one store, for other musters.
//!
//! The response has no end of its own: it ends with the server, with its client, or when the upstreams
//! change. Its format is in `codec::catalog::wire`. A muster without a catalog answers 404.

use std::sync::Arc;

use futures_util::StreamExt as _;
use hyper::Response;
use tokio::sync::{Semaphore, watch};

use super::response::{self, Body};
use crate::substituter::Substituter;

/// The feeds that run.
#[derive(Clone)]
pub(super) struct Feeds {
    places: Arc<Semaphore>,
    stop: watch::Receiver<bool>,
}

impl Feeds {
    /// Lets feeds run until told to stop.
    pub(super) fn new(stop: watch::Receiver<bool>) -> Self {
        Self {
            places: Arc::new(Semaphore::new(FEEDS_MAX)),
            stop,
        }
    }

    /// Begins one; `None`: there is no catalog, or no place.
    pub(super) fn open(&self, substituter: &Substituter) -> Option<Response<Body>> {
        let place = Arc::clone(&self.places).try_acquire_owned().ok()?;
        let feed = substituter.catalog()?;
        let mut stop = self.stop.clone();
        let stopped = async move {
            // Without a sender the server stops, too.
            let _ = stop.wait_for(|stop| *stop).await;
        };
        let feed = feed.take_until(Box::pin(stopped)).map(move |piece| {
            let _held = &place;
            Ok(piece)
        });
        Some(response::stream(CATALOG, feed.boxed(), None))
    }
}

/// Musters that are fed at the same time: each holds one of the clients' connections for good.
const FEEDS_MAX: usize = 64;

const CATALOG: &str = "application/x-muster-catalog";
