//! From configured upstreams to running ones; those that stay over a reload keep their connections.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use tracing::warn;

use crate::cache::memory::UpstreamId;
use crate::config::{self, Config, LocalStore};
use crate::nix::path_info::Trust;
use crate::nix::store_uri::StoreKind;
use crate::nix::store_uri::authority::Authority;
use crate::substituter::health;
use crate::substituter::member::Member;
use crate::upstream::Upstream;
use crate::upstream::build_log::BuildLogs;
use crate::upstream::daemon::DaemonSocket;
use crate::upstream::http_client::{Got, HttpOptions};
use crate::upstream::left_out::LeftOut;
use crate::upstream::local::database::Place;
use crate::upstream::local::{LocalOptions, LocalUpstream};
use crate::upstream::runtime_dir::RuntimeDir;
use crate::upstream::served::ServedOptions;
use crate::upstream::ssh::{Ssh, SshOptions, SshTarget};
use crate::upstream::ssh_command::split_options;
use crate::upstream::wire::Dial;
use crate::upstream::worker::{WorkerOptions, WorkerSetup, WorkerUpstream};

use super::binary_caches::{self, BinaryCaches};

/// The upstreams that run, by all that was said about them.
pub(super) struct Upstreams {
    running: HashMap<String, Arc<Member>>,
    /// Those that cannot be started, likewise, and what stands for each.
    left_out: HashMap<String, (Arc<LeftOut>, Arc<Member>)>,
    next: u16,
    starter: Starter,
}

/// Starts single upstreams as they are configured; for the server, and for commands that ask themselves.
pub(crate) struct Starter {
    runtime_dir: Arc<RuntimeDir>,
    ssh_options: Vec<String>,
    binary_caches: BinaryCaches,
}

impl Upstreams {
    /// Runs none yet.
    pub(super) fn new() -> anyhow::Result<Self> {
        Ok(Self {
            running: HashMap::new(),
            left_out: HashMap::new(),
            next: 0,
            starter: Starter::new()?,
        })
    }

    /// Starts what is configured and does not run, and lets go of what is not configured any more.
    ///
    /// One that cannot be started is left out and said; the others serve, and know that they are not all.
    pub(super) fn members(&mut self, config: &Config) -> anyhow::Result<Vec<Arc<Member>>> {
        let mut members = Vec::new();
        let (mut kept, mut left_out) = (HashMap::new(), HashMap::new());
        for upstream in &config.upstreams {
            let said = said(upstream, config);
            if let Some(member) = self.running.get(&said) {
                members.push(Arc::clone(member));
                kept.insert(said, Arc::clone(member));
                continue;
            }
            match self.starter.start(upstream, config) {
                Ok(started) => {
                    let member = Arc::new(self.member(upstream, started)?);
                    members.push(Arc::clone(&member));
                    kept.insert(said, member);
                }
                Err(error) => {
                    let member = self.leave_out(upstream, &said, &error)?;
                    members.push(Arc::clone(&member.1));
                    left_out.insert(said, member);
                }
            }
        }
        (self.running, self.left_out) = (kept, left_out);
        Ok(members)
    }

    /// Tells whether an upstream could not be started.
    pub(super) fn leaves_out(&self) -> bool {
        !self.left_out.is_empty()
    }

    /// Notes that an upstream cannot be started; that is told once, until the next reload.
    fn leave_out(
        &mut self,
        upstream: &config::Upstream,
        said: &str,
        error: &anyhow::Error,
    ) -> anyhow::Result<(Arc<LeftOut>, Arc<Member>)> {
        let error = format!("{error:#}");
        if let Some((left_out, member)) = self.left_out.get(said) {
            left_out.failed_again(&error, RETRY);
            return Ok((Arc::clone(left_out), Arc::clone(member)));
        }
        let (name, source) = (&upstream.name, &upstream.source);
        warn!(upstream = name, %source, error, "upstream left out, it is tried again each minute");
        let left_out = Arc::new(LeftOut::new(name, &error, RETRY));
        let member = self.member(upstream, Arc::clone(&left_out) as Arc<dyn Upstream>)?;
        Ok((left_out, Arc::new(member)))
    }

    fn member(
        &mut self,
        upstream: &config::Upstream,
        started: Arc<dyn Upstream>,
    ) -> anyhow::Result<Member> {
        let id = UpstreamId(self.next);
        self.next = self
            .next
            .checked_add(1)
            .context("too many upstreams over all reloads")?;
        Ok(Member::new(
            id,
            started,
            upstream.trust.clone(),
            health::Options::default(),
            // One that a reload brings gets the patience of a start, too.
            Instant::now(),
        )
        .of_own_store(is_own_store(upstream)))
    }
}

impl Starter {
    /// Makes the folder for ssh's files and reads `NIX_SSHOPTS`.
    pub(crate) fn new() -> anyhow::Result<Self> {
        let parent = std::env::var_os("RUNTIME_DIRECTORY")
            .map(PathBuf::from)
            .unwrap_or_else(std::env::temp_dir);
        let runtime_dir = RuntimeDir::create(&parent)
            .with_context(|| {
                format!(
                    "cannot make a folder for ssh's files in {}; name another with RUNTIME_DIRECTORY or TMPDIR",
                    parent.display()
                )
            })?;
        let ssh_options = std::env::var("NIX_SSHOPTS").unwrap_or_default();
        Ok(Self {
            runtime_dir: Arc::new(runtime_dir),
            ssh_options: split_options(&ssh_options)?,
            binary_caches: BinaryCaches::default(),
        })
    }

    /// Begins to connect to one upstream; must be called in a runtime.
    pub(crate) fn start(
        &self,
        upstream: &config::Upstream,
        config: &Config,
    ) -> anyhow::Result<Arc<dyn Upstream>> {
        if let StoreKind::Http(..) | StoreKind::Https(..) | StoreKind::File(_) = upstream.uri.kind()
        {
            return Ok(Arc::new(self.binary_caches.start(upstream, config)?));
        }
        let (dial, logs) = self.dial(upstream, config)?;
        let setup = WorkerSetup {
            name: upstream.name.clone(),
            dial,
            logs,
            store_dir: config.store_dir.clone(),
        };
        run(setup, upstream, config)
    }

    /// Asks a binary cache over HTTP for one of its files, with its credentials and certificates.
    ///
    /// Dropped, the question is given up.
    pub(crate) async fn ask_cache(
        &self,
        upstream: &config::Upstream,
        file: &str,
    ) -> anyhow::Result<(Got, HttpOptions)> {
        self.binary_caches.ask(upstream, file).await
    }

    /// Returns the way to an upstream's daemon, and to its build logs.
    pub(crate) fn dial(
        &self,
        upstream: &config::Upstream,
        config: &Config,
    ) -> anyhow::Result<(Arc<dyn Dial>, BuildLogs)> {
        let local = |path: PathBuf| -> (Arc<dyn Dial>, BuildLogs) {
            let logs = BuildLogs::Directory(config.log_dir.clone());
            (Arc::new(DaemonSocket::new(path)), logs)
        };
        match upstream.uri.kind() {
            StoreKind::Daemon | StoreKind::Local(None) => Ok(local(config.daemon_socket.clone())),
            StoreKind::Unix(path) => Ok(local(path.into())),
            StoreKind::Ssh(authority) | StoreKind::SshNg(authority) => {
                let ssh = Arc::new(self.ssh(upstream, authority, &[])?);
                let logs = BuildLogs::Command {
                    nix_store: ssh.nix_store(),
                    dial: Arc::clone(&ssh) as Arc<dyn Dial>,
                };
                Ok((ssh, logs))
            }
            StoreKind::Http(..) | StoreKind::Https(..) | StoreKind::File(_) => {
                Err(anyhow!("a binary cache has no daemon"))
            }
            StoreKind::Local(Some(_)) => Err(anyhow!(
                "a store without a daemon cannot be asked; run a nix-daemon for it and name its \
                 socket as unix:///path"
            )),
            StoreKind::Unsupported(scheme) => Err(anyhow!(
                "{scheme} stores cannot be upstreams; use ssh-ng://, ssh://, daemon, unix://, http://, https:// or file://"
            )),
        }
    }

    /// Returns the way to log in to a builder, with further words for ssh.
    pub(crate) fn ssh(
        &self,
        upstream: &config::Upstream,
        authority: &Authority,
        more_options: &[&str],
    ) -> anyhow::Result<Ssh> {
        let mut target = self.target(upstream, authority);
        let more = more_options.iter().map(|word| (*word).to_owned());
        target.options.extend(more);
        let options = SshOptions {
            connect_timeout: upstream.connect_timeout,
            ..SshOptions::default()
        };
        Ok(Ssh::new(target, options, Arc::clone(&self.runtime_dir))?)
    }

    fn target(&self, upstream: &config::Upstream, authority: &Authority) -> SshTarget {
        let settings = upstream.uri.settings();
        SshTarget {
            user: authority.user().map(str::to_owned),
            host: authority.host().to_ssh(),
            port: authority.port(),
            key_file: upstream.ssh_key.clone(),
            host_key: settings.host_key.as_ref().map(ToString::to_string),
            compress: settings.compress,
            remote_program: settings.remote_program.clone(),
            remote_store: settings.remote_store.clone(),
            options: self.ssh_options.clone(),
        }
    }
}

/// Runs an upstream over a daemon; this machine's own store is read in place where it can be.
fn run(
    setup: WorkerSetup,
    upstream: &config::Upstream,
    config: &Config,
) -> anyhow::Result<Arc<dyn Upstream>> {
    let worker = options(upstream, config);
    let Some(place) = own_place(upstream, config) else {
        return Ok(Arc::new(WorkerUpstream::start(setup, worker)));
    };
    let options = LocalOptions {
        worker,
        ..LocalOptions::default()
    };
    let local = LocalUpstream::start(place, setup, options);
    Ok(Arc::new(local.context("cannot start a thread")?))
}

/// After which an upstream that could not be started is tried again.
pub(super) const RETRY: Duration = Duration::from_secs(60);

/// Tells whether an upstream is a store of this very machine.
fn is_own_store(upstream: &config::Upstream) -> bool {
    matches!(
        upstream.uri.kind(),
        StoreKind::Daemon | StoreKind::Local(_) | StoreKind::Unix(_)
    )
}

/// Finds where an upstream's store lies on this machine, if that is to be read.
fn own_place(upstream: &config::Upstream, config: &Config) -> Option<Place> {
    let own = matches!(
        upstream.uri.kind(),
        StoreKind::Daemon | StoreKind::Local(None)
    );
    // A socket in another place belongs to a daemon of another store.
    let beside = config.nix_state_dir.join("daemon-socket/socket");
    let same = config.daemon_socket == beside;
    let place = Place::new(&config.nix_state_dir, config.store_dir.clone());
    (own && same && config.local_store == LocalStore::Auto).then_some(place)
}

fn options(upstream: &config::Upstream, config: &Config) -> WorkerOptions {
    let mut options = WorkerOptions::default();
    for session in [
        &mut options.standing.session,
        &mut options.pool.session,
        &mut options.roots.session,
    ] {
        session.connect_timeout = upstream.connect_timeout;
    }
    options.standing.query_timeout = upstream.query_timeout;
    options.standing.batch_timeout = options.standing.batch_timeout.max(upstream.query_timeout);
    options.roots.query_timeout = upstream.query_timeout;
    options.roots.lifetime = config.roots_lifetime;
    options.pool.large_max = upstream.nar_transfers_max;
    let far = matches!(upstream.uri.kind(), StoreKind::Ssh(_) | StoreKind::SshNg(_));
    options.closures = (far && config.prefetch && config.prefetch_closure).then(|| {
        let mut closures = ServedOptions::default();
        closures.session.connect_timeout = upstream.connect_timeout;
        closures.session.silence_max = upstream.query_timeout;
        closures
    });
    options
}

/// All that decides how an upstream runs, so that a change of any of it starts it anew.
fn said(upstream: &config::Upstream, config: &Config) -> String {
    let trust = match &upstream.trust {
        Trust::Operator => "trusted".to_owned(),
        Trust::Keys(keys) => format!("{keys:?}"),
    };
    format!(
        "{:?} {} {trust} {:?} {:?} {:?} {} {:?} {:?} {} {} {:?} {} {:?} {} {}",
        upstream.uri,
        upstream.name,
        upstream.ssh_key,
        upstream.connect_timeout,
        upstream.query_timeout,
        upstream.nar_transfers_max,
        config.daemon_socket,
        config.local_store,
        config.catalog,
        config.store_dir,
        config.roots_lifetime,
        binary_caches::said(upstream),
        upstream.allowed_nar_hosts,
        config.prefetch,
        config.prefetch_closure,
    )
}
