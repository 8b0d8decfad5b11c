//! What stands for an upstream that cannot be started, as for want of its password: whoever is asked meanwhile does
//! not know of all that there is, and says so.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;

use super::{Error, Link, NarStream, Upstream};
use crate::nix::path_info::PathInfo;
use crate::nix::store_path::{StorePath, StorePathHash};

/// An upstream that is down until another takes its place.
#[derive(Debug)]
pub struct LeftOut {
    name: String,
    link: watch::Sender<Link>,
}

impl LeftOut {
    /// Stands for the upstream of this name, which could not be started and is tried again after so long.
    pub fn new(name: &str, error: &str, retry_after: Duration) -> Self {
        Self {
            name: name.to_owned(),
            link: watch::Sender::new(down(error, retry_after)),
        }
    }

    /// Notes that another attempt failed.
    pub fn failed_again(&self, error: &str, retry_after: Duration) {
        self.link.send_replace(down(error, retry_after));
    }

    fn error(&self) -> Error {
        match &*self.link.borrow() {
            Link::Down { error, .. } => Error::Down(Arc::clone(error)),
            Link::Up { .. } | Link::Connecting { .. } => Error::Down("it is left out".into()),
        }
    }
}

fn down(error: &str, retry_after: Duration) -> Link {
    Link::Down {
        error: format!("left out: {error}").into(),
        retry_after,
    }
}

#[async_trait]
impl Upstream for LeftOut {
    fn name(&self) -> &str {
        &self.name
    }

    fn link(&self) -> watch::Receiver<Link> {
        self.link.subscribe()
    }

    async fn path_info(&self, _: StorePathHash) -> Result<Option<PathInfo>, Error> {
        Err(self.error())
    }

    async fn path_infos(&self, paths: &[StorePath]) -> Vec<Result<Option<PathInfo>, Error>> {
        paths.iter().map(|_| Err(self.error())).collect()
    }

    async fn nar(&self, _: &PathInfo) -> Result<Option<NarStream>, Error> {
        Err(self.error())
    }

    async fn keep(&self, _: &StorePath) -> Result<bool, Error> {
        Err(self.error())
    }
}
