//! The parameters of a store URI that Muster heeds, by Nix's names.
//!
//! ```text
//! ssh-key=/root/.ssh/id     base64-ssh-public-host-key=…    compress=true    remote-store=…
//! remote-program=nix-daemon  (words)   max-connections=2    priority=10      root=/mnt
//! trusted=true              trusted-public-keys=a-1:… b-1:…
//! ```
//!
//! Source: `libstore/ssh-store-config.hh`, `libstore/store-api.hh`; values as in `libutil/config.cc`.

use std::num::NonZeroU32;

use super::StoreUriError;
use crate::nix::host_key::HostKey;
use crate::nix::signature::PublicKey;

/// What the parameters say; a missing or empty one has the default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoreSettings {
    /// File of the secret ssh key; a name without slash is for the reader to look up.
    pub ssh_key: Option<String>,
    /// The host key that ssh must see.
    pub host_key: Option<HostKey>,
    /// Whether ssh compresses (`ssh -C`).
    pub compress: bool,
    /// Program and arguments to run instead of `nix-daemon`; empty: the default.
    pub remote_program: Vec<String>,
    /// What the remote program gets as `--store`.
    pub remote_store: Option<String>,
    /// Connections that Nix would open; Muster has bounds of its own.
    pub max_connections: Option<NonZeroU32>,
    /// Whether paths need no signature; `None`: not said.
    pub trusted: Option<bool>,
    /// Keys by which paths must be signed where the store is not trusted.
    pub trusted_public_keys: Vec<PublicKey>,
    /// The place among several stores, lower first.
    pub priority: Option<i32>,
    /// The directory below which a local store lies.
    pub root: Option<String>,
}

impl StoreSettings {
    /// Reads the parameters; those that Nix alone has a use for are left.
    pub(super) fn read(params: &[(String, String)]) -> Result<Self, StoreUriError> {
        let mut settings = Self::default();
        for (key, value) in params {
            settings
                .take(key, value)
                .map_err(|reason| StoreUriError::Param {
                    key: super::excerpt(key),
                    reason,
                })?;
        }
        Ok(settings)
    }

    fn take(&mut self, key: &str, value: &str) -> Result<(), String> {
        let text = || Some(value.to_owned()).filter(|v| !v.is_empty());
        match key {
            "ssh-key" => self.ssh_key = text(),
            "base64-ssh-public-host-key" if value.is_empty() => self.host_key = None,
            "base64-ssh-public-host-key" => {
                let key = HostKey::parse_base64(value).map_err(|error| error.to_string())?;
                self.host_key = Some(key);
            }
            "compress" => self.compress = boolean(value)?,
            "remote-program" => self.remote_program = words(value).map(str::to_owned).collect(),
            "remote-store" => self.remote_store = text(),
            // Nix takes 0 for 1.
            "max-connections" => {
                self.max_connections = NonZeroU32::new(number::<u32>(value)?.max(1));
            }
            "trusted" => self.trusted = Some(boolean(value)?),
            "trusted-public-keys" => {
                let keys = words(value).map(PublicKey::parse).collect::<Result<_, _>>();
                self.trusted_public_keys = keys.map_err(|error| error.to_string())?;
            }
            "priority" => self.priority = Some(number(value)?),
            "root" if !value.is_empty() && !value.starts_with('/') => {
                return Err("it must be an absolute path".to_owned());
            }
            "root" => self.root = text(),
            _ => {}
        }
        Ok(())
    }
}

/// Tells whether some Nix knows a parameter of this name for a kind of store that Muster asks.
pub(super) fn is_known(key: &str) -> bool {
    KNOWN.contains(&key)
}

fn words(value: &str) -> impl Iterator<Item = &str> {
    value.split_ascii_whitespace()
}

fn boolean(value: &str) -> Result<bool, String> {
    match value {
        "true" | "yes" | "1" => Ok(true),
        "false" | "no" | "0" => Ok(false),
        _ => Err(format!(
            "{:?} is neither true nor false",
            super::excerpt(value)
        )),
    }
}

fn number<T: std::str::FromStr>(value: &str) -> Result<T, String> {
    let malformed = |_| format!("{:?} is no number that fits", super::excerpt(value));
    value.parse().map_err(malformed)
}

/// The parameters that a misspelt one may have meant.
pub const KNOWN: [&str; 31] = [
    "base64-ssh-public-host-key",
    "compress",
    "compression",
    "compression-level",
    "index-debug-info",
    "local-nar-cache",
    "log",
    "log-fd",
    "max-connection-age",
    "max-connections",
    "narinfo-cache-meta-ttl",
    "parallel-compression",
    "path-info-cache-size",
    "priority",
    "read-only",
    "real",
    "remote-program",
    "remote-store",
    "require-sigs",
    "root",
    "secret-key",
    "secret-keys",
    "ssh-key",
    "state",
    "store",
    "system-features",
    "trusted",
    "trusted-public-keys",
    "use-roots-daemon",
    "want-mass-query",
    "write-nar-listing",
];
