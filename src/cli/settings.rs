//! The flags that say which configuration a command is about; the same as those of `muster serve`.

use std::path::PathBuf;

use super::serve;
use crate::config::raw::{RawConfig, RawUpstream};
use crate::config::values::{FromText, List, MachinesSetting, Text};
use crate::config::{Config, ListenAddress, Look};
use crate::nix::store_uri::StoreUri;

/// Which upstreams, keys and addresses are meant.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct Settings {
    /// Configuration file, TOML or JSON; flags win over it [default: /etc/muster/muster.toml or config.toml, if there]
    #[arg(long, value_name = "FILE", env = "MUSTER_CONFIG")]
    pub config: Option<PathBuf>,
    /// Where muster listens: ADDRESS:PORT or unix:PATH; may be repeated [default: 127.0.0.1:5000]
    #[arg(long, value_name = "ADDRESS", value_parser = ListenAddress::from_text, help_heading = "As for muster serve")]
    pub listen: Vec<ListenAddress>,
    /// Store beside the builders of the machines file; may be repeated
    #[arg(long = "upstream", value_name = "URI", value_parser = StoreUri::from_text, help_heading = "As for muster serve")]
    pub upstreams: Vec<StoreUri>,
    /// Machines file to take builders from [default: /etc/nix/machines, if it is there]
    #[arg(long, value_name = "FILE", help_heading = "As for muster serve")]
    pub machines: Option<PathBuf>,
    /// Do not read a machines file
    #[arg(
        long,
        conflicts_with = "machines",
        help_heading = "As for muster serve"
    )]
    pub no_machines: bool,
    /// Do not ask this machine's own daemon
    #[arg(long, help_heading = "As for muster serve")]
    pub no_local_daemon: bool,
    /// File of a key that signs; may be repeated
    #[arg(
        long = "secret-key-file",
        value_name = "FILE",
        help_heading = "As for muster serve"
    )]
    pub secret_key_files: Vec<PathBuf>,
}

impl Settings {
    /// Takes over what `muster serve` was told.
    pub(super) fn of_serve(args: &serve::Args) -> Self {
        Self {
            config: args.config.clone(),
            listen: args.listen.clone(),
            upstreams: args.upstreams.clone(),
            machines: args.machines.clone(),
            no_machines: args.no_machines,
            no_local_daemon: args.no_local_daemon,
            secret_key_files: args.secret_key_files.clone(),
        }
    }

    /// Reads and checks the configuration that is meant.
    pub(super) fn load(&self, look: Look) -> anyhow::Result<Config> {
        let flags = |raw: &mut RawConfig| self.lay_over(raw);
        let (_, config) = super::load(self.config.as_deref(), flags, look)?;
        Ok(config)
    }

    /// Writes the flags for another command line.
    pub(super) fn words(&self) -> Vec<String> {
        let mut words = Vec::new();
        let mut flag = |name: &str, value: String| words.extend([format!("--{name}"), value]);
        let path = |path: &PathBuf| path.display().to_string();
        if let Some(file) = &self.config {
            flag("config", path(file));
        }
        self.listen
            .iter()
            .for_each(|at| flag("listen", at.to_string()));
        self.upstreams
            .iter()
            .for_each(|uri| flag("upstream", uri.to_string()));
        if let Some(file) = &self.machines {
            flag("machines", path(file));
        }
        self.secret_key_files
            .iter()
            .for_each(|file| flag("secret-key-file", path(file)));
        let switches = [
            ("--no-machines", self.no_machines),
            ("--no-local-daemon", self.no_local_daemon),
        ];
        let on = switches.into_iter().filter(|(_, on)| *on);
        words.extend(on.map(|(name, _)| name.to_owned()));
        words
    }

    /// Replaces what the file says by what the flags say; lists are replaced as a whole.
    pub(super) fn lay_over(&self, raw: &mut RawConfig) {
        if !self.listen.is_empty() {
            raw.listen = Some(List(self.listen.iter().cloned().map(Text).collect()));
        }
        if !self.upstreams.is_empty() {
            let upstreams = self.upstreams.iter().cloned().map(RawUpstream::new);
            raw.upstreams = Some(List(upstreams.collect()));
        }
        if let Some(path) = &self.machines {
            raw.machines = Some(MachinesSetting::File(path.clone()));
        }
        if self.no_machines {
            raw.machines = Some(MachinesSetting::Off);
        }
        if self.no_local_daemon {
            raw.local_daemon = Some(false);
        }
        if !self.secret_key_files.is_empty() {
            let files = self.secret_key_files.iter().cloned().map(Text);
            raw.secret_key_files = Some(List(files.collect()));
        }
    }
}
