//! `muster serve`: flags over the configuration file, then the server until it is told to stop.

use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser as _};
use tracing::warn;

use super::logging;
use super::settings::Settings;
use crate::config::raw::{PRIORITY_MAX, RawConfig};
use crate::config::values::{Bytes, FromText, Number, Text};
use crate::config::{CompressionSetting, Config, ListenAddress, LogFormat, Look};
use crate::nix::store_uri::StoreUri;

/// Serve the stores of all builders as one substituter
///
/// Without flags it listens on 127.0.0.1:5000, asks the builders in /etc/nix/machines and this
/// machine's own daemon where there is one, and signs with a key that it makes at the first start.
/// It prints each upstream with its state and the three lines that go into a client's nix.conf. It
/// starts, and answers, even when no builder does.
#[derive(clap::Args, Debug)]
#[command(after_long_help = AFTER_LONG_HELP)]
pub struct Args {
    /// Configuration file, TOML or JSON; flags win over it
    ///
    /// Without this flag /etc/muster/muster.toml is read if it is there, else /etc/muster/config.toml.
    /// Unknown keys are refused, with the line; `muster check-config FILE` says what a file means.
    #[arg(long, value_name = "FILE", env = "MUSTER_CONFIG")]
    pub config: Option<PathBuf>,

    /// Where to listen: ADDRESS:PORT or unix:PATH; may be repeated [default: 127.0.0.1:5000]
    ///
    /// Sockets that systemd hands in are used instead. Anybody who can connect can fetch every path
    /// of every builder: listen on other addresses than loopback only where that is meant.
    #[arg(
        long,
        value_name = "ADDRESS",
        value_parser = ListenAddress::from_text,
        help_heading = "Listening"
    )]
    pub listen: Vec<ListenAddress>,

    /// Store to ask beside the builders of the machines file; may be repeated
    ///
    /// ssh-ng://[USER@]HOST[:PORT], ssh://…, unix:///SOCKET or daemon; http://…, https://… and file:///PATH
    /// are binary caches, whose paths must be signed; what has no scheme is a host for ssh. Parameters
    /// are Nix's: ssh-key, base64-ssh-public-host-key, remote-program, remote-store, compress, trusted,
    /// trusted-public-keys.
    #[arg(
        long = "upstream",
        value_name = "URI",
        value_parser = StoreUri::from_text,
        help_heading = "Upstreams"
    )]
    pub upstreams: Vec<StoreUri>,

    /// Machines file to take builders from [default: /etc/nix/machines, if it is there]
    #[arg(long, value_name = "FILE", help_heading = "Upstreams")]
    pub machines: Option<PathBuf>,

    /// Do not read a machines file
    #[arg(long, conflicts_with = "machines", help_heading = "Upstreams")]
    pub no_machines: bool,

    /// Do not ask this machine's own daemon
    #[arg(long, help_heading = "Upstreams")]
    pub no_local_daemon: bool,

    /// File of a key to sign with; may be repeated, and each key signs [default: made at first start]
    ///
    /// As made by `muster key generate` or `nix key generate-secret`. Its owner alone may be able to
    /// read it. A name without slash is looked up among systemd's credentials.
    #[arg(
        long = "secret-key-file",
        value_name = "FILE",
        help_heading = "Signing"
    )]
    pub secret_key_files: Vec<PathBuf>,

    /// How NARs are served [default: auto]
    ///
    /// auto is none when only loopback is listened on, else zstd. Uncompressed NARs can be resumed;
    /// zstd and xz are made on the fly, and xz is slow.
    #[arg(
        long,
        value_name = "HOW",
        value_parser = compression_parser(),
        help_heading = "Answers"
    )]
    pub compression: Option<CompressionSetting>,

    /// Place among a client's substituters, lower first [default: 30; cache.nixos.org has 40]
    #[arg(
        long,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(..=i64::from(PRIORITY_MAX)),
        help_heading = "Answers"
    )]
    pub priority: Option<u32>,

    /// Where NARs are kept [default: CACHE_DIRECTORY, or /var/cache/muster for root]
    ///
    /// The folder is a binary cache by itself: any web server, or Nix by file://, can use it. It may be
    /// deleted at any moment. Others than root keep NARs in $XDG_CACHE_HOME/muster or ~/.cache/muster.
    #[arg(long, value_name = "DIR", help_heading = "Answers")]
    pub cache_dir: Option<PathBuf>,

    /// Bytes of NARs that are kept, or a text with K, M, G or T; 0 keeps none [default: 10G]
    #[arg(
        long,
        value_name = "SIZE",
        value_parser = |text: &str| Bytes::from_text(text),
        help_heading = "Answers"
    )]
    pub cache_size: Option<Bytes>,

    /// What to log: error, warn, info, debug, or as "warn,muster=debug" [default: info]
    #[arg(long, value_name = "FILTER", env = "MUSTER_LOG", help_heading = "Log")]
    pub log: Option<String>,

    /// How to log [default: text]
    #[arg(
        long,
        value_name = "FORMAT",
        value_parser = PossibleValuesParser::new(["text", "json"]).try_map(|s| LogFormat::from_text(&s)),
        help_heading = "Log"
    )]
    pub log_format: Option<LogFormat>,
}

/// Serves until SIGTERM or SIGINT; SIGHUP reads configuration and machines anew.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let load = || -> anyhow::Result<Config> {
        let flags = |raw: &mut RawConfig| args.lay_over(raw);
        let (_, config) = super::load(args.config.as_deref(), flags, Look::ToServe)?;
        logging::start(&config.log, config.log_format);
        for error in &config.machines_errors {
            warn!("{error}; the line is left out");
        }
        for warning in &config.warnings {
            warn!("{warning}");
        }
        Ok(config)
    };
    crate::app::serve(&load)
}

impl Args {
    /// Replaces what the file says by what the flags say; lists are replaced as a whole.
    fn lay_over(&self, raw: &mut RawConfig) {
        Settings::of_serve(self).lay_over(raw);
        if let Some(compression) = self.compression {
            // A level in the file belongs to the compression there.
            raw.compression_level = raw.compression_level.take().filter(|_| {
                raw.compression
                    .as_ref()
                    .is_some_and(|text| text.0 == compression)
            });
            raw.compression = Some(Text(compression));
        }
        if let Some(dir) = &self.cache_dir {
            // A flag is relative to where it is given.
            let dir = std::path::absolute(dir).unwrap_or_else(|_| dir.clone());
            raw.cache_dir = Some(Text(dir));
        }
        raw.cache_size = self.cache_size.or(raw.cache_size);
        raw.priority = self.priority.map(Number).or(raw.priority);
        raw.log = self.log.clone().or(raw.log.take());
        raw.log_format = self.log_format.map(Text).or(raw.log_format.take());
    }
}

fn compression_parser() -> impl clap::builder::TypedValueParser<Value = CompressionSetting> {
    let names = CompressionSetting::ALL.map(CompressionSetting::name);
    PossibleValuesParser::new(names).try_map(|name| CompressionSetting::from_text(&name))
}

const AFTER_LONG_HELP: &str = "\
Examples:
  muster serve
      Everything that the builders in /etc/nix/machines have, for this machine.
  muster serve --listen 0.0.0.0:5000 --no-machines
      This machine's own store, for others.
  muster serve --upstream 'ssh-ng://nix@builder?ssh-key=/root/.ssh/builder'
      One more builder, with a key of its own.
  muster serve --upstream 'ssh-ng://guest@other?trusted-public-keys=other-1:…'
      A store whose paths must carry a signature by this key.
  muster serve --upstream 'https://cache.example.org?trusted-public-keys=cache.example.org-1:…'
      A binary cache.

Signals:
  SIGTERM, SIGINT   finish running transfers, for 30 seconds at most, and stop; twice: stop at once
  SIGHUP            read the configuration and the machines file anew

Environment:
  MUSTER_CONFIG, MUSTER_LOG   as --config and --log
  STATE_DIRECTORY             where the key is made; else /var/lib/muster for root, and
                              $XDG_STATE_HOME/muster or ~/.local/state/muster for others
  CACHE_DIRECTORY             where NARs are kept; else /var/cache/muster for root, and
                              $XDG_CACHE_HOME/muster or ~/.cache/muster for others
  CREDENTIALS_DIRECTORY       where key files named without slash are looked up (systemd)
  NIX_DAEMON_SOCKET_PATH      the socket of this machine's own daemon
  NIX_LOG_DIR                 where its build logs are; else /nix/var/log/nix
  NIX_SSL_CERT_FILE           certificates to judge https caches by, in place of the system's; else
                              SSL_CERT_FILE and SSL_CERT_DIR
  NIX_SSHOPTS                 options for ssh, split as a shell does
  RUNTIME_DIRECTORY           where pinned host keys are written for ssh; else TMPDIR or /tmp
  LISTEN_FDS, NOTIFY_SOCKET, WATCHDOG_USEC
                              systemd's sockets, notifications and watchdog
  NO_COLOR                    no colours on a terminal

Files:
  /etc/muster/muster.toml        configuration, if it is there; else /etc/muster/config.toml
  /etc/nix/machines              builders
  STATE_DIRECTORY/secret-key     the key made at the first start; its public half is beside it

Exit status: 0 after a signal to stop, 1 if it could not start or go on, 2 if the command line was wrong.";
