//! `muster key`: making signing keys, and showing public ones.

use std::io::{self, IsTerminal as _, Read as _};
use std::path::PathBuf;

use anyhow::Context as _;
use clap::error::ErrorKind;
use clap::{CommandFactory as _, Subcommand};
use zeroize::Zeroizing;

use crate::config::keys;
use crate::nix::signature::{KeyName, SecretKey};

/// The subcommands of `muster key`.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Make a signing key
    ///
    /// The key is of the kind that Nix makes: `nix key generate-secret` and this are
    /// interchangeable. A file that is there already is never replaced.
    #[command(after_long_help = GENERATE_HELP)]
    Generate(Generate),
    /// Show the public half of the secret key on standard input
    ///
    /// Its output goes into `trusted-public-keys` of each client. `nix key convert-secret-to-public`
    /// does the same.
    #[command(after_long_help = PUBLIC_HELP)]
    Public,
}

/// The arguments of `muster key generate`.
#[derive(clap::Args, Debug)]
pub struct Generate {
    /// Name of the key, such as laptop-muster-1: clients take only one key of a name
    #[arg(value_name = "NAME", value_parser = |name: &str| KeyName::new(name))]
    pub name: KeyName,
    /// File to write the secret key to, for its owner alone [default: standard output]
    #[arg(long, value_name = "FILE")]
    pub secret_key_file: Option<PathBuf>,
    /// File to write the public key to [default: standard output, if the secret key goes to a file]
    #[arg(long, value_name = "FILE")]
    pub public_key_file: Option<PathBuf>,
}

/// Makes a key or shows one.
pub fn run(command: &Command) -> anyhow::Result<()> {
    match command {
        Command::Generate(args) => generate(args),
        Command::Public => public(),
    }
}

fn generate(args: &Generate) -> anyhow::Result<()> {
    let key = keys::generate(args.name.clone())?;
    match &args.secret_key_file {
        Some(path) => keys::write_secret(path, &key)?,
        None => super::print(&Zeroizing::new(format!("{}\n", *key.to_secret_text())))?,
    }
    match (&args.public_key_file, &args.secret_key_file) {
        (Some(path), _) => keys::write_public(path, &key.public())?,
        (None, Some(_)) => super::print(&format!("{}\n", key.public()))?,
        (None, None) => {}
    }
    Ok(())
}

fn public() -> anyhow::Result<()> {
    let stdin = io::stdin();
    if stdin.is_terminal() {
        let message = "muster key public reads a secret key from standard input:\n\n  \
                       muster key public < /var/lib/muster/secret-key\n";
        let mut command = super::Cli::command();
        return Err(command
            .error(ErrorKind::MissingRequiredArgument, message)
            .into());
    }
    let mut text = Zeroizing::new(String::with_capacity(INPUT_BYTES_MAX));
    let input = stdin.lock().take(INPUT_BYTES_MAX as u64);
    let read = { input }.read_to_string(&mut text);
    read.context("cannot read standard input")?;
    let key = SecretKey::parse(&text)
        .context("standard input holds no secret key (muster key public < SECRET-KEY-FILE)")?;
    super::print(&format!("{}\n", key.public()))?;
    Ok(())
}

const GENERATE_HELP: &str = "\
Examples:
  muster key generate laptop-muster-1 --secret-key-file secret-key --public-key-file secret-key.pub
  muster key generate laptop-muster-1 --secret-key-file secret-key     (prints the public key)

Exit status: 0 if all went well, 1 if it failed, 2 if the command line was wrong.";

const PUBLIC_HELP: &str = "\
Example:
  muster key public < /var/lib/muster/secret-key

Exit status: 0 if all went well, 1 if it failed, 2 if the command line was wrong.";

const INPUT_BYTES_MAX: usize = 4096;
