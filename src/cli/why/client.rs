//! The two ends of the way: what a running Muster serves now, and which keys a client here trusts.

use std::time::Duration;

use super::super::http::Server;
use super::super::nix_conf::NixConf;
use super::super::status;
use crate::config::Config;
use crate::nix::narinfo::NarInfo;
use crate::nix::path_info::PathInfo;
use crate::nix::signature::PublicKey;
use crate::nix::store_path::StorePathHash;

/// What the running server and this machine's Nix say.
pub(super) struct Client {
    /// The running Muster, if one answers.
    pub(super) server: Option<Server>,
    /// What it serves of the path; `None`: it answers 404.
    pub(super) served: Option<PathInfo>,
    /// The keys that Muster signs with, by the configuration or by what the running one says.
    pub(super) our_keys: Vec<PublicKey>,
    /// This machine's settings, or why they cannot be read.
    pub(super) conf: Result<NixConf, String>,
}

impl Client {
    /// Asks both.
    pub(super) async fn ask(config: &Config, servers: &[Server], hash: StorePathHash) -> Self {
        let mut client = Self {
            server: None,
            served: None,
            our_keys: config.secret_keys.iter().map(|key| key.public()).collect(),
            conf: tokio::task::spawn_blocking(NixConf::of_daemon)
                .await
                .unwrap_or_else(|error| Err(error.to_string())),
        };
        for server in servers {
            if status::report(server).await.is_err() {
                continue;
            }
            client.server = Some(server.clone());
            if let Ok(answer) = server.get(&format!("/{hash}.narinfo"), PATIENCE).await {
                let text = std::str::from_utf8(&answer.body).unwrap_or_default();
                let narinfo = NarInfo::parse(text, &config.store_dir).ok();
                client.served = narinfo.filter(|_| answer.status == OK).map(|n| n.info);
            }
            if client.our_keys.is_empty()
                && let Ok(answer) = server.get("/public-key", PATIENCE).await
            {
                let text = String::from_utf8_lossy(&answer.body).into_owned();
                let keys = text.lines().filter_map(|line| PublicKey::parse(line).ok());
                client.our_keys = keys.collect();
            }
            break;
        }
        client
    }

    /// Returns the keys that this machine's Nix trusts.
    pub(super) fn trusted(&self) -> Vec<PublicKey> {
        self.conf.as_ref().map(NixConf::keys).unwrap_or_default()
    }
}

const OK: u16 = 200;
/// More than the server itself waits for its upstreams.
const PATIENCE: Duration = Duration::from_secs(20);
