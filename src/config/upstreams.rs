//! The stores to ask: those the operator named, the machines file's, and this machine's daemon.

use std::collections::BTreeSet;
use std::fmt;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::environment::Environment;
use super::error::{At, Error, suggest};
use super::file::{self, ConfigFile};
use super::raw::{RawConfig, RawUpstream, UpstreamTable};
use super::values::{List, MachinesSetting, Text};
use crate::nix::machines::{Builder, Machines, MachinesError, MachinesWarning};
use crate::nix::path_info::Trust;
use crate::nix::signature::PublicKey;
use crate::nix::store_uri::settings::KNOWN;
use crate::nix::store_uri::{StoreKind, StoreUri};

/// A store to ask.
#[derive(Clone, Debug)]
pub struct Upstream {
    /// How it is reached.
    pub uri: StoreUri,
    /// What it is called: the name it was given, or its URI without what only says how to ask.
    pub name: String,
    /// Whom it is believed.
    pub trust: Trust,
    /// The file of the ssh key, where one is named; credentials are looked up.
    pub ssh_key: Option<PathBuf>,
    /// Who named it.
    pub source: Source,
    /// The systems that the machines file says it builds for; empty: not said.
    pub systems: BTreeSet<String>,
    /// How long connecting may take.
    pub connect_timeout: Duration,
    /// How long an answer may take while it is alive.
    pub query_timeout: Duration,
    /// NARs that it sends at the same time.
    pub nar_transfers_max: usize,
    /// The file with a binary cache's user and password, or token; credentials are looked up.
    pub credentials_file: Option<PathBuf>,
    /// The netrc where its credentials may be; likewise.
    pub netrc_file: Option<PathBuf>,
    /// Further hosts that a binary cache may send us to: `host`, `host:port` or `*`.
    pub allowed_nar_hosts: Vec<String>,
}

/// Who named an upstream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The operator, by flag or in the configuration.
    Named,
    /// The machines file, at the first of its lines that do.
    Machines {
        /// The file.
        file: String,
        /// The line, from 1.
        line: usize,
    },
    /// Nobody: it is this machine's own daemon.
    LocalDaemon,
}

/// All upstreams, and what is to be said about them.
#[derive(Clone, Debug, Default)]
pub struct Upstreams {
    /// The stores in the order of asking: named ones first, this machine's daemon last.
    pub list: Vec<Upstream>,
    /// Lines of the machines file that are left out; Nix refuses the whole file for one.
    pub machines_errors: Vec<MachinesError>,
    /// Lines of the machines file that some Nix reads otherwise.
    pub machines_warnings: Vec<MachinesWarning>,
    /// What is likely not meant.
    pub warnings: Vec<String>,
}

/// Bounds that a table may set for its own upstream.
struct Defaults {
    connect_timeout: Duration,
    query_timeout: Duration,
    nar_transfers_max: usize,
    netrc_file: Option<PathBuf>,
}

/// Finds the upstreams; the machines file is read here.
pub(super) fn find(
    raw: &mut RawConfig,
    environment: &Environment,
    file: Option<&ConfigFile>,
) -> Result<Upstreams, Error> {
    let defaults = Defaults {
        connect_timeout: raw.connect_timeout.map_or(CONNECT_TIMEOUT, |s| s.0),
        query_timeout: raw.query_timeout.map_or(QUERY_TIMEOUT, |s| s.0),
        nar_transfers_max: raw
            .max_nar_transfers
            .map_or(NAR_TRANSFERS_MAX, |n| n.0 as usize),
        netrc_file: raw
            .netrc_file
            .take()
            .map(|file| environment.key_path(&file.0)),
    };
    let mut found = Upstreams::default();
    for RawUpstream(table) in raw.upstreams.take().map(|list| list.0).unwrap_or_default() {
        found.add_named(table, &defaults, environment, file)?;
    }
    let setting = raw.machines.take().unwrap_or(MachinesSetting::Usual);
    if let Some(machines) = read_machines(&setting, file)? {
        for builder in machines.builders() {
            found.add_builder(builder, &defaults, environment);
        }
        found.machines_errors = machines.errors;
        found.machines_warnings = machines.warnings;
    }
    let present = || environment.daemon_socket.exists();
    if raw.local_daemon.unwrap_or_else(present) {
        let daemon = StoreUri::parse("daemon").map_err(|error| Error::Value {
            at: At::default(),
            key: "local-daemon",
            message: error.to_string(),
        })?;
        if !found.has(&daemon) {
            found.list.push(upstream(
                daemon,
                Source::LocalDaemon,
                &defaults,
                environment,
            ));
        }
    }
    Ok(found)
}

impl Upstreams {
    fn has(&self, uri: &StoreUri) -> bool {
        let id = uri.id();
        self.list.iter().any(|upstream| upstream.uri.id() == id)
    }

    fn add_named(
        &mut self,
        table: UpstreamTable,
        defaults: &Defaults,
        environment: &Environment,
        file: Option<&ConfigFile>,
    ) -> Result<(), Error> {
        let mut upstream = upstream(table.uri.0, Source::Named, defaults, environment);
        if self.leaves_out(&upstream) {
            return Ok(());
        }
        if self.has(&upstream.uri) {
            let name = upstream.uri.name();
            self.warnings
                .push(format!("upstream {name} is named twice; the first counts"));
            return Ok(());
        }
        if let Some(name) = table.name {
            let taken = self.list.iter().any(|other| other.name == name);
            if taken || name.is_empty() || name.contains(char::is_control) {
                let message = if taken {
                    "two upstreams have it"
                } else {
                    "it cannot be a name"
                };
                return Err(Error::Value {
                    at: At(file.and_then(|file| file.locate(&name))),
                    key: "name",
                    message: format!("{name:?}: {message}"),
                });
            }
            upstream.name = name;
        }
        upstream.trust = trust(&upstream.uri, table.trusted, table.trusted_public_keys);
        upstream.connect_timeout = table
            .connect_timeout
            .map_or(upstream.connect_timeout, |s| s.0);
        upstream.query_timeout = table.query_timeout.map_or(upstream.query_timeout, |s| s.0);
        if let Some(max) = table.max_nar_transfers {
            upstream.nar_transfers_max = max.0 as usize;
        }
        if let Some(file) = table.credentials_file {
            upstream.credentials_file = Some(environment.key_path(&file.0));
        }
        if let Some(file) = table.netrc_file {
            upstream.netrc_file = Some(environment.key_path(&file.0));
        }
        let hosts = table.allowed_nar_hosts.map(|hosts| hosts.0);
        upstream.allowed_nar_hosts = hosts.into_iter().flatten().map(|host| host.0.0).collect();
        self.warn_about(&upstream);
        self.list.push(upstream);
        Ok(())
    }

    /// A store that the operator named keeps the operator's settings, and learns its systems.
    fn add_builder(&mut self, builder: Builder, defaults: &Defaults, environment: &Environment) {
        let id = builder.uri.id();
        if let Some(known) = self
            .list
            .iter_mut()
            .find(|upstream| upstream.uri.id() == id)
        {
            known.systems.extend(builder.systems);
            return;
        }
        let source = builder
            .places
            .first()
            .map_or(Source::Named, |place| Source::Machines {
                file: place.origin.to_string(),
                line: place.line,
            });
        let mut upstream = upstream(builder.uri, source, defaults, environment);
        if self.leaves_out(&upstream) {
            return;
        }
        upstream.systems = builder.systems;
        self.warn_about(&upstream);
        self.list.push(upstream);
    }

    /// Leaves out what cannot be asked, and says so: the others serve.
    fn leaves_out(&mut self, upstream: &Upstream) -> bool {
        let reason = match upstream.uri.kind() {
            StoreKind::Daemon
            | StoreKind::Unix(_)
            | StoreKind::Local(None)
            | StoreKind::Ssh(_)
            | StoreKind::SshNg(_)
            | StoreKind::Http(..)
            | StoreKind::Https(..)
            | StoreKind::File(_) => return false,
            StoreKind::Local(Some(_)) => {
                "a store without a daemon cannot be asked; run a nix-daemon for it, and name its \
                 socket as unix:///path"
            }
            StoreKind::Unsupported(_) => "this kind of store cannot be asked",
        };
        let Upstream { name, source, .. } = upstream;
        self.warnings
            .push(format!("upstream {name} ({source}) is left out: {reason}"));
        true
    }

    fn warn_about(&mut self, upstream: &Upstream) {
        let name = &upstream.name;
        if matches!(&upstream.trust, Trust::Keys(keys) if keys.is_empty()) {
            self.warnings.push(format!(
                "upstream {name} is not trusted and has no trusted-public-keys: nothing of it can be \
                 served but content-addressed paths"
            ));
        }
        for param in upstream.uri.unknown_params() {
            let meant = suggest(param, &KNOWN);
            let meant = meant
                .map(|meant| format!("; did you mean {meant:?}?"))
                .unwrap_or_default();
            self.warnings.push(format!(
                "upstream {name}: unknown parameter {param:?} is ignored{meant}"
            ));
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Named => f.write_str("named by the operator"),
            Self::Machines { file, line } => write!(f, "{file}:{line}"),
            Self::LocalDaemon => f.write_str("this machine's own daemon"),
        }
    }
}

fn upstream(
    uri: StoreUri,
    source: Source,
    defaults: &Defaults,
    environment: &Environment,
) -> Upstream {
    let ssh_key = uri.settings().ssh_key.as_ref();
    Upstream {
        name: uri.name(),
        trust: trust(&uri, None, None),
        ssh_key: ssh_key.map(|path| environment.key_path(Path::new(path))),
        source,
        systems: BTreeSet::new(),
        connect_timeout: defaults.connect_timeout,
        query_timeout: defaults.query_timeout,
        nar_transfers_max: defaults.nar_transfers_max,
        credentials_file: None,
        netrc_file: defaults.netrc_file.clone(),
        allowed_nar_hosts: Vec::new(),
        uri,
    }
}

/// Decides whom an upstream is believed; what the configuration says goes before the URI.
fn trust(uri: &StoreUri, trusted: Option<bool>, keys: Option<List<Text<PublicKey>>>) -> Trust {
    let settings = uri.settings();
    let keys = keys.map(|keys| keys.0.into_iter().map(|key| key.0).collect());
    let keys: Vec<_> = keys.unwrap_or_else(|| settings.trusted_public_keys.clone());
    match trusted.or(settings.trusted) {
        Some(true) => Trust::Operator,
        Some(false) => Trust::Keys(keys),
        // Whoever lists keys wants them to be asked for.
        None if keys.is_empty() && is_own(uri.kind()) => Trust::Operator,
        None if keys.is_empty() => Trust::Keys(well_known(uri.kind())),
        None => Trust::Keys(keys),
    }
}

/// Returns the keys of a cache that every Nix trusts from the start.
fn well_known(kind: &StoreKind) -> Vec<PublicKey> {
    let nixos = matches!(kind, StoreKind::Https(authority, path)
        if path.is_empty() && authority.to_string().eq_ignore_ascii_case(NIXOS_CACHE));
    let key = nixos.then(|| PublicKey::parse(NIXOS_CACHE_KEY).ok());
    key.flatten().into_iter().collect()
}

/// Tells whether naming such a store is vouching for it: the operator's own machines, not a cache.
fn is_own(kind: &StoreKind) -> bool {
    match kind {
        StoreKind::Daemon
        | StoreKind::Unix(_)
        | StoreKind::Local(_)
        | StoreKind::Ssh(_)
        | StoreKind::SshNg(_) => true,
        StoreKind::Http(..)
        | StoreKind::Https(..)
        | StoreKind::File(_)
        | StoreKind::Unsupported(_) => false,
    }
}

fn read_machines(
    setting: &MachinesSetting,
    file: Option<&ConfigFile>,
) -> Result<Option<Machines>, Error> {
    let path = match setting {
        MachinesSetting::Off => return Ok(None),
        MachinesSetting::Usual => Path::new(MACHINES_FILE),
        MachinesSetting::File(path) => path,
    };
    let origin = path.display().to_string();
    let text = match file::read_text(path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound && *setting == MachinesSetting::Usual => {
            return Ok(None);
        }
        Err(source) => {
            return Err(Error::Machines {
                at: At(file.and_then(|file| file.locate(&origin))),
                path: path.to_owned(),
                source,
            });
        }
    };
    let mut include = |path: &str| match file::read_text(Path::new(path)) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(plain(&error)),
    };
    Ok(Some(Machines::parse(&text, &origin, &mut include)))
}

fn plain(error: &io::Error) -> String {
    error.to_string()
}

/// The one cache whose key is the default of `trusted-public-keys` in Nix.
const NIXOS_CACHE: &str = "cache.nixos.org";
const NIXOS_CACHE_KEY: &str = "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=";

const MACHINES_FILE: &str = "/etc/nix/machines";
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const QUERY_TIMEOUT: Duration = Duration::from_secs(10);
/// sshd lets ten sessions share a connection.
const NAR_TRANSFERS_MAX: usize = 8;
