//! The configured upstreams, started for a few questions.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::timeout;

use crate::app::upstreams::Starter;
use crate::config::{self, Config};
use crate::nix::path_info::PathInfo;
use crate::nix::store_path::{StorePath, StorePathHash};
use crate::upstream::Upstream;

/// All upstreams of a configuration.
pub(super) struct Upstreams {
    all: Vec<One>,
    // Holds the files of ssh for as long as it is used.
    _starter: Starter,
}

/// One upstream, started or not.
pub(super) struct One {
    pub(super) config: config::Upstream,
    started: Result<Arc<dyn Upstream>, String>,
}

/// What an upstream says of a path; not believed yet.
#[derive(Clone, Debug)]
pub(super) enum Claim {
    Has(Box<PathInfo>),
    Absent,
    Unknown(String),
}

impl Upstreams {
    /// Begins to connect to all; must be called in a runtime.
    pub(super) fn start(config: &Config) -> anyhow::Result<Self> {
        let starter = Starter::new()?;
        let start = |upstream: &config::Upstream| One {
            started: starter
                .start(upstream, config)
                .map_err(|error| format!("{error:#}")),
            config: upstream.clone(),
        };
        Ok(Self {
            all: config.upstreams.iter().map(start).collect(),
            _starter: starter,
        })
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &One> {
        self.all.iter()
    }

    /// Asks all at once for the path with this hash part; the answers have their order.
    pub(super) async fn ask(&self, hash: StorePathHash) -> Vec<(&config::Upstream, Claim)> {
        let asked = self.all.iter().map(|one| async move {
            let claim = one.path_info(hash).await;
            (&one.config, claim)
        });
        join_all(asked).await
    }
}

impl One {
    /// Asks for the path with this hash part, for as long as the configuration lets it take.
    pub(super) async fn path_info(&self, hash: StorePathHash) -> Claim {
        let upstream = match &self.started {
            Ok(upstream) => upstream,
            Err(error) => return Claim::Unknown(error.clone()),
        };
        match timeout(self.patience(), upstream.path_info(hash)).await {
            Ok(Ok(Some(info))) => Claim::Has(Box::new(info)),
            Ok(Ok(None)) => Claim::Absent,
            Ok(Err(error)) => Claim::Unknown(error.to_string()),
            Err(_) => Claim::Unknown(format!("no answer within {:?}", self.patience())),
        }
    }

    /// Asks for many paths; an error is one of the upstream, not of a single path.
    pub(super) async fn path_infos(
        &self,
        paths: &[StorePath],
    ) -> Result<Vec<Option<PathInfo>>, String> {
        let upstream = self.started.as_ref().map_err(Clone::clone)?;
        let patience = self.patience() + BATCH_PATIENCE;
        let answers = timeout(patience, upstream.path_infos(paths)).await;
        let answers = answers.map_err(|_| format!("no answer within {patience:?}"))?;
        let mut infos = Vec::with_capacity(answers.len());
        for answer in answers {
            infos.push(answer.map_err(|error| error.to_string())?);
        }
        Ok(infos)
    }

    /// Returns the upstream, if it could be started.
    pub(super) fn started(&self) -> Option<&dyn Upstream> {
        self.started.as_deref().ok()
    }

    fn patience(&self) -> Duration {
        self.config.connect_timeout + self.config.query_timeout
    }
}

const BATCH_PATIENCE: Duration = Duration::from_secs(30);
