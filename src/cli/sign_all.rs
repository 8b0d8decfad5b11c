//! `muster sign-all`: signs every path that stores already have.

mod cache;
mod progress;
mod report;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::CommandFactory as _;
use clap::error::ErrorKind;

use super::logging;
use crate::app::sign_all::{self, Order};
use crate::config::raw::{RawConfig, RawUpstream};
use crate::config::values::{FromText, List, MachinesSetting, Text};
use crate::config::{Config, Environment, LogFormat, Look, Source};
use crate::nix::signature::PublicKey;
use crate::nix::store_path::StoreDir;
use crate::nix::store_uri::{StoreKind, StoreUri};
use crate::upstream::signing::Mode;
use progress::Display;

/// Sign every path that stores already have
///
/// Signed paths can be trusted wherever they are copied, without muster. Any number of stores is signed
/// at once, from this place: the keys do not leave it. Paths that carry a valid signature by each key are
/// skipped, and so are those that prove themselves (content-addressed), which no Nix wants a signature
/// of. Interrupted and started again, it goes on.
///
/// With --cache it is Muster's own cache on disk that is signed anew, after a change of keys.
#[derive(clap::Args, Debug)]
#[command(after_long_help = AFTER_LONG_HELP)]
pub struct Args {
    /// Store to sign; may be repeated [default: daemon, if no machines file is named]
    ///
    /// daemon, unix:///SOCKET, ssh-ng://[USER@]HOST[:PORT] or ssh://…; what has no scheme is a host for
    /// ssh. Parameters are those of `muster serve --upstream`.
    #[arg(long = "store", value_name = "URI", value_parser = StoreUri::from_text)]
    pub stores: Vec<StoreUri>,

    /// Machines file; every builder in it is signed
    #[arg(long, value_name = "FILE")]
    pub machines: Option<PathBuf>,

    /// File of a key to sign with; may be repeated, and each key signs
    ///
    /// As made by `muster key generate` or `nix key generate-secret`. Its owner alone may be able to
    /// read it. A name without slash is looked up among systemd's credentials. With --cache the keys of
    /// the configuration sign if none is named.
    #[arg(
        long = "secret-key-file",
        value_name = "FILE",
        required_unless_present = "cache"
    )]
    pub secret_key_files: Vec<PathBuf>,

    /// Stores to sign at the same time
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..))]
    pub jobs: u16,

    /// Count only; nothing is written
    #[arg(long)]
    pub dry_run: bool,

    /// Directory of all store paths [default: /nix/store]
    #[arg(long, value_name = "DIR", value_parser = |dir: &str| StoreDir::new(dir))]
    pub store_dir: Option<StoreDir>,

    /// Sign Muster's own cache anew, in place of stores [default DIR: as `muster serve` has it]
    ///
    /// Each narinfo in the folder carries signatures by these keys then, and by no others of Muster's.
    /// What nobody vouches for whom the configuration trusts is left as it is, and counts as failed. No
    /// server may use the folder: a running one does this by itself when its keys change.
    #[arg(
        long,
        value_name = "DIR",
        num_args = 0..=1,
        conflicts_with_all = ["stores", "machines", "jobs", "dry_run"]
    )]
    pub cache: Option<Option<PathBuf>>,

    /// With --cache: public key that Muster signed with, NAME:BASE64; may be repeated
    ///
    /// Narinfos with its signature are known for Muster's own where the index of the cache is gone.
    #[arg(long = "former-public-key", value_name = "KEY", requires = "cache", value_parser = PublicKey::parse)]
    pub former_public_keys: Vec<PublicKey>,

    /// With --cache: configuration that says whom to trust [default: /etc/muster/muster.toml or config.toml, if there]
    #[arg(long, value_name = "FILE", env = "MUSTER_CONFIG")]
    pub config: Option<PathBuf>,

    /// Write JSON
    #[arg(long)]
    pub json: bool,
}

/// Signs, and prints what became of the paths; the status says whether all is well.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    if let Some(dir) = &args.cache {
        logging::start("warn", LogFormat::Text);
        return cache::run(args, dir.as_ref());
    }
    for uri in &args.stores {
        if !can_be_signed(uri.kind()) {
            let message = format!(
                "--store {uri}: a store is signed through its nix-daemon; name it as ssh-ng://HOST, \
                 unix:///SOCKET or daemon\n"
            );
            let mut command = super::Cli::command();
            return Err(command.error(ErrorKind::ValueValidation, message).into());
        }
    }
    logging::start("warn", LogFormat::Text);
    let config = args.config()?;
    let order = Order {
        jobs: args.jobs.into(),
        mode: if args.dry_run {
            Mode::Count
        } else {
            Mode::Sign
        },
    };
    let stores = sign_all::stores(&config);
    let display = Display::new(&stores, order.mode);
    let prepared = || display.draw();
    sign_all::run(&config, &stores, order, prepared, display.keep_drawing())?;
    display.draw();
    drop(display);
    let report = report::Report::new(&config, &stores, order.mode);
    super::show(args.json, || report.to_json(), || report.to_text())?;
    Ok(super::status_of(report.ok()))
}

impl Args {
    /// Reads keys and machines; what of the machines file cannot be signed is said and left out.
    fn config(&self) -> anyhow::Result<Config> {
        let stores = self.stores.iter().cloned().map(RawUpstream::new);
        let machines = self.machines.clone();
        let keys = self.secret_key_files.iter().cloned().map(Text);
        let raw = RawConfig {
            upstreams: Some(List(stores.collect())),
            local_daemon: Some(self.stores.is_empty() && machines.is_none()),
            machines: Some(machines.map_or(MachinesSetting::Off, MachinesSetting::File)),
            secret_key_files: Some(List(keys.collect())),
            store_dir: self.store_dir.clone().map(Text),
            ..RawConfig::default()
        };
        let mut config = Config::check(raw, None, &Environment::of_process(), Look::ToCheck)?;
        for error in &config.machines_errors {
            progress::say(&format!("warning: {error}; the line is left out"));
        }
        for warning in &config.warnings {
            progress::say(&format!("warning: {warning}"));
        }
        config.upstreams.retain(|upstream| {
            let can = can_be_signed(upstream.uri.kind());
            if !can && matches!(upstream.source, Source::Machines { .. }) {
                let name = &upstream.name;
                progress::say(&format!(
                    "warning: {name} has no nix-daemon and is left out"
                ));
            }
            can
        });
        Ok(config)
    }
}

fn can_be_signed(kind: &StoreKind) -> bool {
    match kind {
        StoreKind::Daemon
        | StoreKind::Unix(_)
        | StoreKind::Local(None)
        | StoreKind::Ssh(_)
        | StoreKind::SshNg(_) => true,
        StoreKind::Local(Some(_))
        | StoreKind::Http(..)
        | StoreKind::Https(..)
        | StoreKind::File(_)
        | StoreKind::Unsupported(_) => false,
    }
}

const AFTER_LONG_HELP: &str = "\
Examples:
  muster sign-all --secret-key-file /var/lib/muster/secret-key
      This machine's own store.
  muster sign-all --machines /etc/nix/machines --secret-key-file key
      Every builder.
  muster sign-all --store ssh-ng://root@b1 --store ssh-ng://root@b2 --secret-key-file key --dry-run
      How many paths of two builders lack the signature.
  muster sign-all --cache --secret-key-file new-key
      Muster's own cache, while no server runs.
  nix store verify --all --no-contents --sigs-needed 1 --trusted-public-keys \"$(cat key.pub)\"
      What real Nix says of it.

Who may sign:
  Daemons before Nix 2.17 take signatures from trusted users only: root, and trusted-users in their
  nix.conf. That is tried on every store before anything is signed; those that refuse are said, with
  the remedy, and the others are signed.

Signals:
  SIGINT, SIGTERM   finish what is under way, print the counts and stop

JSON (--json), on standard output; fields may be added:
  { \"ok\": bool, \"dry-run\": bool, \"interrupted\": bool, \"keys\": [NAME…],
    \"stores\": [{
      \"store\": NAME, \"peer\": STRING or null,          what answers: \"Nix 2.34.8, protocol 1.38\"
      \"error\": STRING or null,                        why it could not be signed (to its end)
      \"paths\": N,                                     in the store when it was listed
      \"signed\": N,                                    with --dry-run: lacking a signature
      \"skipped\": { \"signed-already\": N, \"content-addressed\": N, \"gone\": N },
      \"failed\": N, \"left\": N,                         left: not reached
      \"failures\": [{ \"reason\": STRING, \"count\": N, \"examples\": [PATH…] }],
      \"seconds\": NUMBER or null                       without the login
    }] }

  With --cache: ok, keys, paths, signed, failed, failures and seconds as above, and
  { \"cache-dir\": DIR, \"skipped\": { \"signed-already\": N, \"foreign\": N } }

Exit status:
  0  every path of every store is signed or needs no signature
  1  a path or a store failed, or it was stopped before the end
  2  the command line was wrong";
