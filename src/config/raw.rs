//! The configuration as it is written, each value read but nothing looked up.
//!
//! TOML or JSON, all keys optional, unknown keys refused. Values are checked while they are read, so
//! that an error knows its place. Flags are laid over the file's values by the caller.

use std::fmt;
use std::path::PathBuf;

use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor};

use super::listen::ListenAddress;
use super::values::{
    Bytes, Count, FromText, HostPattern, List, MachinesSetting, Number, PositiveSeconds, Seconds,
    Text,
};
use super::{CompressionSetting, LocalStore, LogFormat};
use crate::nix::signature::PublicKey;
use crate::nix::store_path::StoreDir;
use crate::nix::store_uri::StoreUri;

/// What the operator said; what is `None` has its default.
#[derive(Clone, Debug, Default, serde::Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct RawConfig {
    /// Addresses to listen on, where systemd hands none in.
    pub listen: Option<List<Text<ListenAddress>>>,
    /// Stores to ask beside those of the machines file.
    pub upstreams: Option<List<RawUpstream>>,
    /// The machines file.
    pub machines: Option<MachinesSetting>,
    /// Whether this machine's own daemon is asked; not said: where there is one.
    pub local_daemon: Option<bool>,
    /// How this machine's own store is read.
    pub local_store: Option<Text<LocalStore>>,
    /// Files of the keys that sign; none: one is made in the state directory.
    pub secret_key_files: Option<List<Text<PathBuf>>>,
    /// The directory of all store paths.
    pub store_dir: Option<Text<StoreDir>>,
    /// The place among a client's substituters, lower first.
    pub priority: Option<Number<0, PRIORITY_MAX>>,
    /// Whether clients may ask for many paths at once.
    pub want_mass_query: Option<bool>,
    /// How NARs are served.
    pub compression: Option<Text<CompressionSetting>>,
    /// How hard the compression tries.
    pub compression_level: Option<Number<0, 19>>,
    /// NARs compressed at the same time.
    pub max_encoders: Option<Count>,
    /// How long "not there" is remembered.
    pub negative_ttl: Option<Seconds>,
    /// After what age a found path is asked for again, behind the client's back.
    pub revalidate_after: Option<Seconds>,
    /// Memory for what was found.
    pub memory_cache_size: Option<Bytes>,
    /// Where NARs are kept.
    pub cache_dir: Option<Text<PathBuf>>,
    /// Bytes of NARs that are kept; 0: none.
    pub cache_size: Option<Bytes>,
    /// How long builders are asked to keep what was served; one generation.
    pub roots_lifetime: Option<PositiveSeconds>,
    /// Whether a path's closure is asked for before the client does.
    pub prefetch: Option<bool>,
    /// Whether musters are asked for their catalog.
    pub catalog: Option<bool>,
    /// Whether that is done in two round trips where builders are far.
    pub prefetch_closure: Option<bool>,
    /// Memory for small NARs that are fetched before the client asks; 0: none are.
    pub prefetch_nars: Option<Bytes>,
    /// How long connecting to an upstream may take.
    pub connect_timeout: Option<PositiveSeconds>,
    /// How long an upstream that is alive may take to answer.
    pub query_timeout: Option<PositiveSeconds>,
    /// For how long a NAR may bring nothing before another holder goes on with it.
    pub stall_timeout: Option<Number<STALL_SECONDS_LEAST, STALL_SECONDS_MOST>>,
    /// NARs that one upstream sends at the same time.
    pub max_nar_transfers: Option<Count>,
    /// A netrc with the credentials of binary caches.
    pub netrc_file: Option<Text<PathBuf>>,
    /// Clients' connections at the same time.
    pub max_connections: Option<Count>,
    /// How long running transfers have to end after SIGTERM.
    pub stop_timeout: Option<Seconds>,
    /// What is logged, as directives of `tracing`'s filter.
    pub log: Option<String>,
    /// How it is logged.
    pub log_format: Option<Text<LogFormat>>,
}

/// A store to ask: a URI alone, or a table.
#[derive(Clone, Debug, serde::Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct UpstreamTable {
    /// How it is reached.
    pub uri: Text<StoreUri>,
    /// What it is called in logs.
    #[serde(default)]
    pub name: Option<String>,
    /// Whether its paths need no signature.
    #[serde(default)]
    pub trusted: Option<bool>,
    /// Keys by which its paths must be signed where it is not trusted.
    #[serde(default)]
    pub trusted_public_keys: Option<List<Text<PublicKey>>>,
    /// As the global one.
    #[serde(default)]
    pub connect_timeout: Option<PositiveSeconds>,
    /// As the global one.
    #[serde(default)]
    pub query_timeout: Option<PositiveSeconds>,
    /// As the global one.
    #[serde(default)]
    pub max_nar_transfers: Option<Count>,
    /// A file with `user:password` or a token; goes before any netrc.
    #[serde(default)]
    pub credentials_file: Option<Text<PathBuf>>,
    /// As the global one.
    #[serde(default)]
    pub netrc_file: Option<Text<PathBuf>>,
    /// Further hosts that a binary cache may send us to.
    #[serde(default)]
    pub allowed_nar_hosts: Option<List<Text<HostPattern>>>,
}

/// An upstream, by whichever form.
#[derive(Clone, Debug)]
pub struct RawUpstream(pub UpstreamTable);

impl RawUpstream {
    /// Takes a URI without further settings.
    pub fn new(uri: StoreUri) -> Self {
        Self(UpstreamTable {
            uri: Text(uri),
            name: None,
            trusted: None,
            trusted_public_keys: None,
            connect_timeout: None,
            query_timeout: None,
            max_nar_transfers: None,
            credentials_file: None,
            netrc_file: None,
            allowed_nar_hosts: None,
        })
    }
}

impl<'de> Deserialize<'de> for RawUpstream {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct UpstreamVisitor;
        impl<'de> Visitor<'de> for UpstreamVisitor {
            type Value = RawUpstream;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a store URI, or a table with the key \"uri\"")
            }

            fn visit_str<E: de::Error>(self, uri: &str) -> Result<RawUpstream, E> {
                StoreUri::from_text(uri)
                    .map(RawUpstream::new)
                    .map_err(E::custom)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<RawUpstream, A::Error> {
                let table = de::value::MapAccessDeserializer::new(map);
                UpstreamTable::deserialize(table).map(RawUpstream)
            }
        }
        deserializer.deserialize_any(UpstreamVisitor)
    }
}

/// A loaded builder, or one behind a slow line, pauses for parts of a second.
pub const STALL_SECONDS_LEAST: u32 = 1;

/// A connection that brings nothing of its NAR for longer is given up in any case.
pub const STALL_SECONDS_MOST: u32 = 60;

/// Nix reads it as a signed 32-bit number.
pub const PRIORITY_MAX: u32 = i32::MAX.unsigned_abs();
