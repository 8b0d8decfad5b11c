//! The way of a checked NAR into the cache: room for its file, and the entry once that is written.

use std::sync::Arc;

use tracing::debug;

use crate::cache::backend::{Ground, NarFile};
use crate::cache::fill::Fill;
use crate::nix::path_info::PathInfo;

use super::Setup;
use super::shared::Shared;
use super::source::Source;

/// What it takes to make an entry of a NAR.
pub(super) struct Intake {
    pub(super) shared: Arc<Shared>,
    setup: Arc<Setup>,
    info: Arc<PathInfo>,
    grounds: Vec<Ground>,
}

impl Intake {
    /// Gathers what an entry takes, while it is known; `None` where the NAR is not to be kept.
    pub(super) fn of(source: &Source) -> Option<Self> {
        let shared = Arc::clone(&source.shared);
        shared.kept.as_ref()?;
        let holders = source.holders.as_ref()?;
        let setup = shared.setup();
        let grounds = Shared::grounds(&setup, &source.info, holders);
        Some(Self {
            info: Arc::clone(&source.info),
            setup,
            grounds,
            shared,
        })
    }

    /// Begins to write its file; `None` where there is no room for it, or no disk.
    pub(super) fn begin(&self) -> Option<Fill> {
        let kept = self.shared.kept.as_ref()?;
        let fill = kept.backend.begin(self.info.nar_size);
        fill.inspect_err(|error| debug!(path = %self.info.path, %error, "not kept"))
            .ok()
    }

    /// Makes the entry and publishes the path anew; dropped, the former goes on.
    pub(super) async fn commit(self, fill: Fill) -> Option<NarFile> {
        let publisher = &self.setup.publisher;
        let info = publisher.without_ours((*self.info).clone());
        let narinfo = |file: &NarFile| publisher.narinfo_of((*self.info).clone(), file);
        match fill.commit(info, self.grounds, narinfo).await {
            Ok(file) => {
                self.shared.publish_kept(&self.info, file);
                Some(file)
            }
            Err(error) => {
                debug!(path = %self.info.path, %error, "not kept");
                None
            }
        }
    }
}
