//! What the operator said: flags over a file over defaults, checked.
//!
//! ```text
//! file (TOML or JSON) -> RawConfig <- flags        raw -> Config: keys and machines are read here
//! ```
//!
//! A [`Config`] holds values only, no sockets and no connections; `app` fills each floor's options from it.

mod environment;
mod error;
mod file;
pub mod keys;
mod listen;
pub mod raw;
mod upstreams;
pub mod values;

use std::path::PathBuf;
use std::time::Duration;

pub use environment::{Environment, hostname};
pub use error::{At, Error};
pub use file::{ConfigFile, Place};
pub use listen::{ListenAddress, ListenError};
pub use upstreams::{Source, Upstream, Upstreams};

use crate::nix::signature::SecretKey;
use crate::nix::store_path::StoreDir;
use keys::{DefaultKey, Found, KeyFile};
use raw::RawConfig;
use values::{MachinesSetting, Text};

/// A checked configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// Addresses to listen on, where systemd hands none in; at least one.
    pub listen: Vec<ListenAddress>,
    /// Whether somebody named them.
    pub says_where_to_listen: bool,
    /// The stores to ask, in this order.
    pub upstreams: Vec<Upstream>,
    /// The socket of this machine's daemon.
    pub daemon_socket: PathBuf,
    /// The folder of this machine's build logs.
    pub log_dir: PathBuf,
    /// Where this machine's Nix keeps its database.
    pub nix_state_dir: PathBuf,
    /// How this machine's own store is read.
    pub local_store: LocalStore,
    /// Keys that sign each path, of different names; none only where files were not to be read, the service
    /// alone sees them, or the default key was not to be made.
    pub secret_keys: Vec<SecretKey>,
    /// The files of the keys, in the same order.
    pub secret_key_files: Vec<PathBuf>,
    /// Keys that the service alone sees, by the names of their credentials; found when looked at from outside of it.
    pub unseen_keys: Vec<PathBuf>,
    /// The file of the default key, if it was made just now.
    pub generated_key: Option<PathBuf>,
    /// The file of the default key, if it is yet to be made.
    pub key_to_be_made: Option<PathBuf>,
    /// The directory of all store paths.
    pub store_dir: StoreDir,
    /// The place among a client's substituters; 40 is cache.nixos.org, lower is asked first.
    pub priority: u32,
    /// Whether clients may ask for many paths at once.
    pub want_mass_query: bool,
    /// How NARs are served.
    pub compression: CompressionSetting,
    /// How hard zstd tries, 1 to 19; `None`: as the encoder is by default.
    pub zstd_level: Option<i32>,
    /// How hard xz tries, 0 to 9; `None`: as the encoder is by default.
    pub xz_level: Option<u32>,
    /// NARs compressed at the same time.
    pub max_encoders: usize,
    /// How long "not there" is remembered; none at all when zero.
    pub negative_ttl: Duration,
    /// After what age a found path is asked for again.
    pub revalidate_after: Duration,
    /// Memory for what was found.
    pub memory_cache_bytes: u64,
    /// Where NARs are kept, absolute; `None`: nowhere, as `cache_bytes` is 0 or there is no home.
    pub cache_dir: Option<PathBuf>,
    /// Bytes of NARs that are kept.
    pub cache_bytes: u64,
    /// How long one generation of roots lives.
    pub roots_lifetime: Duration,
    /// Whether a path's closure is asked for before the client does.
    pub prefetch: bool,
    /// Whether musters are asked for their catalog.
    pub catalog: bool,
    /// Whether whole closures are asked for over a connection of their own to each far builder.
    pub prefetch_closure: bool,
    /// Memory for small NARs that are fetched before the client asks; 0: none are.
    pub prefetch_nars_bytes: u64,
    /// For how long a NAR may bring nothing before another holder goes on with it.
    pub stall_timeout: Duration,
    /// Clients' connections at the same time.
    pub max_connections: usize,
    /// How long running transfers have to end after SIGTERM.
    pub stop_timeout: Duration,
    /// What is logged, as directives of `tracing`'s filter.
    pub log: String,
    /// How it is logged.
    pub log_format: LogFormat,
    /// Lines of the machines file that are left out; Nix refuses the whole file for one.
    pub machines_errors: Vec<crate::nix::machines::MachinesError>,
    /// Lines of the machines file that some Nix reads otherwise.
    pub machines_warnings: Vec<crate::nix::machines::MachinesWarning>,
    /// What is likely not meant.
    pub warnings: Vec<String>,
}

/// How NARs are served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CompressionSetting {
    /// Not compressed when only loopback is listened on, else zstd.
    #[default]
    Auto,
    /// Not compressed; a broken transfer can be resumed.
    None,
    /// One zstd frame, made on the fly.
    Zstd,
    /// One xz stream, made on the fly; slow.
    Xz,
}

/// How this machine's own store is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LocalStore {
    /// Its database and files in place; through its daemon where that cannot be.
    #[default]
    Auto,
    /// Through its daemon.
    Daemon,
}

/// How the log is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// What of the machine may be looked at while the configuration is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// Everything; the default key is made where there is none.
    ToServe,
    /// Everything, and nothing is made.
    ToCheck,
    /// Everything but keys: they are looked at apart, or cannot be read by this user.
    NotAtKeys,
    /// Neither keys nor machines: they may be on another machine.
    NotAtFiles,
}

impl CompressionSetting {
    /// Every setting.
    pub const ALL: [Self; 4] = [Self::Auto, Self::None, Self::Zstd, Self::Xz];

    /// Returns its name in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::None => "none",
            Self::Zstd => "zstd",
            Self::Xz => "xz",
        }
    }
}

impl Config {
    /// Checks what was said; `file` is where it was read from, for the places of errors.
    pub fn check(
        mut raw: RawConfig,
        file: Option<&ConfigFile>,
        environment: &Environment,
        look: Look,
    ) -> Result<Self, Error> {
        if look == Look::NotAtFiles {
            raw.machines = Some(MachinesSetting::Off);
            raw.local_daemon = Some(raw.local_daemon.unwrap_or(false));
        }
        let (zstd_level, xz_level) = levels(&raw, file)?;
        let log = checked_log(raw.log.take(), file)?;
        let upstreams = upstreams::find(&mut raw, environment, file)?;
        // Last, so that nothing is made for a configuration that cannot be used.
        let keys = Keys::find(&raw, file, environment, look)?;
        let cache_bytes = raw.cache_size.map_or(CACHE_BYTES, |b| b.0);
        let cache_dir = checked_cache_dir(raw.cache_dir.take(), environment, file)?;
        let listen = raw.listen.map(|list| list.0).unwrap_or_default();
        let mut listen: Vec<_> = listen.into_iter().map(|address| address.0).collect();
        let says_where_to_listen = !listen.is_empty();
        if listen.is_empty() {
            listen.push(ListenAddress::Tcp(LISTEN.into()));
        }
        Ok(Self {
            listen,
            says_where_to_listen,
            upstreams: upstreams.list,
            daemon_socket: environment.daemon_socket.clone(),
            log_dir: environment.log_dir.clone(),
            nix_state_dir: environment.nix_state_dir.clone(),
            local_store: raw.local_store.map(|store| store.0).unwrap_or_default(),
            secret_keys: keys.files.iter().map(|file| file.key.clone()).collect(),
            secret_key_files: keys.files.into_iter().map(|file| file.path).collect(),
            unseen_keys: keys.unseen,
            generated_key: keys.generated,
            key_to_be_made: keys.to_be_made,
            store_dir: raw.store_dir.map(|dir| dir.0).unwrap_or_default(),
            priority: raw.priority.map_or(PRIORITY, |n| n.0),
            want_mass_query: raw.want_mass_query.unwrap_or(true),
            compression: raw.compression.map(|c| c.0).unwrap_or_default(),
            zstd_level,
            xz_level,
            max_encoders: raw.max_encoders.map_or(environment.cores, |n| n.0 as usize),
            negative_ttl: raw.negative_ttl.map_or(NEGATIVE_TTL, |s| s.0),
            revalidate_after: raw.revalidate_after.map_or(REVALIDATE_AFTER, |s| s.0),
            memory_cache_bytes: raw.memory_cache_size.map_or(MEMORY_CACHE_BYTES, |b| b.0),
            cache_dir: cache_dir.filter(|_| cache_bytes > 0),
            cache_bytes,
            roots_lifetime: raw.roots_lifetime.map_or(ROOTS_LIFETIME, |s| s.0),
            prefetch: raw.prefetch.unwrap_or(true),
            catalog: raw.catalog.unwrap_or(true),
            prefetch_closure: raw.prefetch_closure.unwrap_or(true),
            prefetch_nars_bytes: raw.prefetch_nars.map_or(PREFETCH_NARS_BYTES, |b| b.0),
            stall_timeout: raw
                .stall_timeout
                .map_or(STALL_TIMEOUT, |n| Duration::from_secs(n.0.into())),
            max_connections: raw
                .max_connections
                .map_or(MAX_CONNECTIONS, |n| n.0 as usize),
            stop_timeout: raw.stop_timeout.map_or(STOP_TIMEOUT, |s| s.0),
            log,
            log_format: raw.log_format.map(|format| format.0).unwrap_or_default(),
            machines_errors: upstreams.machines_errors,
            machines_warnings: upstreams.machines_warnings,
            warnings: upstreams.warnings,
        })
    }
}

#[derive(Default)]
struct Keys {
    files: Vec<KeyFile>,
    unseen: Vec<PathBuf>,
    generated: Option<PathBuf>,
    to_be_made: Option<PathBuf>,
}

impl Keys {
    fn find(
        raw: &RawConfig,
        file: Option<&ConfigFile>,
        environment: &Environment,
        look: Look,
    ) -> Result<Self, Error> {
        let mut keys = Self::default();
        let if_none = match look {
            Look::ToServe => DefaultKey::Make,
            Look::ToCheck => DefaultKey::LookOnly,
            Look::NotAtKeys | Look::NotAtFiles => return Ok(keys),
        };
        for path in raw.secret_key_files.iter().flat_map(|list| &list.0) {
            let at = || At(file.and_then(|file| file.locate(&path.0.to_string_lossy())));
            let found = keys::read_secret(&environment.key_path(&path.0), environment);
            let missing = found.as_ref().is_err_and(keys::KeyFileError::is_missing);
            if missing && look == Look::ToCheck && environment.may_be_unseen(&path.0) {
                keys.unseen.push(path.0.clone());
                continue;
            }
            let found = found.map_err(|cause| key_error(at(), cause))?;
            let name = found.key.name();
            if keys.files.iter().any(|other| other.key.name() == name) {
                return Err(Error::Value {
                    at: at(),
                    key: "secret-key-files",
                    message: format!("two keys are named {name}, and clients take one of a name"),
                });
            }
            keys.files.push(found);
        }
        if keys.files.is_empty() && keys.unseen.is_empty() {
            let found = keys::default_key(environment, if_none);
            match found.map_err(|cause| key_error(At::default(), cause))? {
                Found::Kept(file) => keys.files.push(file),
                Found::Made(file) => {
                    keys.generated = Some(file.path.clone());
                    keys.files.push(file);
                }
                Found::ToBeMade(path) => keys.to_be_made = Some(path),
            }
        }
        Ok(keys)
    }
}

fn key_error(at: At, cause: keys::KeyFileError) -> Error {
    let cause = Box::new(cause);
    Error::Key { at, cause }
}

/// The level is zstd's or xz's by the compression that is set; `auto` makes zstd.
fn levels(raw: &RawConfig, file: Option<&ConfigFile>) -> Result<(Option<i32>, Option<u32>), Error> {
    let Some(level) = raw.compression_level.map(|level| level.0) else {
        return Ok((None, None));
    };
    let refused = |message: &str| Error::Value {
        at: At(file.and_then(|file| file.locate("compression-level"))),
        key: "compression-level",
        message: format!("{level} is {message}"),
    };
    match raw.compression.as_ref().map(|c| c.0).unwrap_or_default() {
        CompressionSetting::None => Err(refused("of no use with compression none: remove it")),
        CompressionSetting::Xz if level <= 9 => Ok((None, Some(level))),
        CompressionSetting::Xz => Err(refused("not a level of xz, which are 0 to 9")),
        CompressionSetting::Auto | CompressionSetting::Zstd => match i32::try_from(level) {
            Ok(level @ 1..=19) => Ok((Some(level), None)),
            _ => Err(refused("not a level of zstd, which are 1 to 19")),
        },
    }
}

fn checked_log(log: Option<String>, file: Option<&ConfigFile>) -> Result<String, Error> {
    let Some(log) = log else {
        return Ok(LOG.to_owned());
    };
    match tracing_subscriber::EnvFilter::try_new(&log) {
        Ok(_) => Ok(log),
        Err(error) => Err(Error::Value {
            at: At(file.and_then(|file| file.locate(&log))),
            key: "log",
            message: format!("{log:?}: {error}; it must be like \"info\" or \"warn,muster=debug\""),
        }),
    }
}

fn checked_cache_dir(
    said: Option<Text<PathBuf>>,
    environment: &Environment,
    file: Option<&ConfigFile>,
) -> Result<Option<PathBuf>, Error> {
    match said {
        None => Ok(environment.cache_dir.clone()),
        Some(Text(dir)) if dir.is_absolute() => Ok(Some(dir)),
        Some(Text(dir)) => Err(Error::Value {
            at: At(file.and_then(|file| file.locate(&dir.to_string_lossy()))),
            key: "cache-dir",
            message: format!("{:?} is not an absolute path", dir.display().to_string()),
        }),
    }
}

const LISTEN: ([u8; 4], u16) = ([127, 0, 0, 1], 5000);
/// Before cache.nixos.org, which has 40.
const PRIORITY: u32 = 30;
const NEGATIVE_TTL: Duration = Duration::from_secs(3);
const REVALIDATE_AFTER: Duration = Duration::from_secs(300);
const MEMORY_CACHE_BYTES: u64 = 64 << 20;
const CACHE_BYTES: u64 = 10 << 30;
const PREFETCH_NARS_BYTES: u64 = 64 << 20;
const ROOTS_LIFETIME: Duration = Duration::from_secs(900);
const STALL_TIMEOUT: Duration = Duration::from_secs(5);
const MAX_CONNECTIONS: usize = 4096;
const STOP_TIMEOUT: Duration = Duration::from_secs(30);
const LOG: &str = "info";
