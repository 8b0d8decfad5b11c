//! A builder reached by the system's own `ssh` (`ssh-ng://`, `ssh://`).
//!
//! The system's ssh honours ssh_config, agents, jump hosts and hardware keys, as Nix users expect.
//! Each wire is an ssh connection of its own: look-ups must not share one with NARs, which would
//! delay them by seconds (one 2 MiB window, one core), and for NARs a private ControlMaster gained
//! nothing. Source: `libstore/ssh.cc`, ssh(1), ssh_config(5).

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Semaphore;

use super::Error;
use super::runtime_dir::RuntimeDir;
use super::ssh_command;
use super::ssh_process::{self, Attempt, Process};
use super::wire::{Bounds, Dial, Guard, Output, Purpose, Wire};

/// Where and how to log in, as a store URI and the environment say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SshTarget {
    /// The account; ssh_config's choice when absent.
    pub user: Option<String>,
    /// The host as ssh takes it: a name, an alias of ssh_config, an address; IPv6 without brackets.
    pub host: String,
    /// The port; ssh_config's choice when absent.
    pub port: Option<u16>,
    /// `ssh-key`: a private key file, tried besides the usual ones.
    pub key_file: Option<PathBuf>,
    /// The only host key to accept, `TYPE KEY [COMMENT]`: column 8 of the machines file, decoded.
    pub host_key: Option<String>,
    /// `compress`: ssh's own compression.
    pub compress: bool,
    /// `remote-program`, read by the account's shell; empty: `nix-daemon`. One that names
    /// `nix-store` means the `nix-daemon` beside it.
    pub remote_program: Vec<String>,
    /// `remote-store`: another store than the account's default.
    pub remote_store: Option<String>,
    /// `NIX_SSHOPTS`, split by [`ssh_command::split_options`].
    pub options: Vec<String>,
}

/// A target that ssh cannot be given.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// The host or user would be read as an option, or as several words.
    #[error("{what} {text:?} cannot be given to ssh: {reason}")]
    Name {
        /// `host name` or `user name`.
        what: &'static str,
        /// The text.
        text: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The pinned host key is not `TYPE KEY`.
    #[error("the pinned host key is not one line of `TYPE KEY`")]
    HostKey,
    /// The pinned host key could not be written down for ssh.
    #[error("cannot write the pinned host key: {0}")]
    HostKeyFile(String),
    /// `NIX_SSHOPTS` has an open quote.
    #[error("NIX_SSHOPTS: {0:?} has a quote that does not end")]
    Options(String),
}

/// How ssh is run.
#[derive(Clone, Debug)]
pub struct SshOptions {
    /// The program, found in `PATH`.
    pub program: PathBuf,
    /// The bound of whoever dials; ssh's own bound on a login is a second less.
    pub connect_timeout: Duration,
    /// Commands beside the daemon at once: sshd drops logins beyond ten under way (`MaxStartups`).
    pub commands_max: usize,
}

/// Opens ssh connections to one builder.
pub struct Ssh {
    target: SshTarget,
    options: SshOptions,
    known_hosts: Option<PathBuf>,
    // The folder of `known_hosts` stays while we do.
    _runtime_dir: Arc<RuntimeDir>,
    commands: Semaphore,
}

impl Ssh {
    /// Checks the target and writes its pinned host key to the runtime directory.
    pub fn new(
        target: SshTarget,
        options: SshOptions,
        runtime_dir: Arc<RuntimeDir>,
    ) -> Result<Self, TargetError> {
        ssh_command::check(&target)?;
        let known_hosts = match &target.host_key {
            Some(key) => {
                let text = ssh_command::known_hosts(key)?;
                let file = runtime_dir.write("known-hosts", text.as_bytes());
                Some(file.map_err(|e| TargetError::HostKeyFile(e.to_string()))?)
            }
            None => None,
        };
        Ok(Self {
            commands: Semaphore::new(options.commands_max.max(1)),
            target,
            options,
            known_hosts,
            _runtime_dir: runtime_dir,
        })
    }

    /// Returns the words that run `nix-store` beside the daemon, for the account's shell.
    pub fn nix_store(&self) -> Vec<String> {
        ssh_command::nix_store(&self.target)
    }

    /// Runs words in the account's shell once, and gives what came of it even if ssh itself failed.
    ///
    /// Dropped, it ends the process.
    pub async fn attempt(&self, command: &[String], bounds: Bounds) -> Result<Attempt, Error> {
        self.start(Purpose::Nar, command)?.attempt(bounds).await
    }

    /// Returns what ssh would heed on this login, `key value` a line, without logging in (`ssh -G`).
    pub async fn heeded(&self, bounds: Bounds) -> Result<String, Error> {
        let mut arguments = vec!["-G".into()];
        arguments.extend(self.arguments(Purpose::Nar, &[]));
        let host = self.target.host.clone();
        let started = Process::start(&self.options.program, &arguments, host, false)?;
        let output = started.output(bounds).await?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Returns the words that run the daemon, for the account's shell.
    pub fn daemon(&self) -> Vec<String> {
        ssh_command::daemon(&self.target)
    }

    /// Tells whether a single host key is accepted.
    pub fn pins_host_key(&self) -> bool {
        self.known_hosts.is_some()
    }

    fn wire(&self, purpose: Purpose, remote: &[String]) -> Result<Wire, Error> {
        let started = self.start(purpose, remote)?;
        Ok(Wire {
            reader: Box::new(started.stdout),
            writer: Box::new(started.stdin),
            guard: Guard::of_process(started.process),
        })
    }

    fn start(&self, purpose: Purpose, remote: &[String]) -> Result<ssh_process::Started, Error> {
        let arguments = self.arguments(purpose, remote);
        let target = self.target.host.clone();
        let pinned = self.known_hosts.is_some();
        Process::start(&self.options.program, &arguments, target, pinned)
    }

    fn arguments(&self, purpose: Purpose, remote: &[String]) -> Vec<OsString> {
        let login = ssh_command::Login {
            target: &self.target,
            known_hosts: self.known_hosts.as_deref(),
            connect_timeout: self.options.connect_timeout,
            purpose,
        };
        login.arguments(remote)
    }
}

impl Default for SshOptions {
    fn default() -> Self {
        Self {
            program: "ssh".into(),
            connect_timeout: Duration::from_secs(10),
            commands_max: 2,
        }
    }
}

#[async_trait]
impl Dial for Ssh {
    async fn dial(&self, purpose: Purpose) -> Result<Wire, Error> {
        self.wire(purpose, &ssh_command::daemon(&self.target))
    }

    async fn dial_nix_store(&self) -> Result<Wire, Error> {
        self.wire(Purpose::Closures, &ssh_command::serve(&self.target))
    }

    /// Runs the words in the account's shell, with nothing on their input.
    async fn run(&self, command: &[String], bounds: Bounds) -> Option<Result<Output, Error>> {
        // A closed semaphore would be a defect of ours; running without a permit does no harm.
        let _permit = self.commands.acquire().await.ok();
        let output = match self.start(Purpose::Nar, command) {
            Ok(started) => started.output(bounds).await,
            Err(error) => Err(error),
        };
        Some(output)
    }
}
