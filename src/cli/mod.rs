//! The command line: one file per subcommand, and what they share.

pub mod cache;
pub mod check;
pub mod check_config;
pub mod completions;
mod http;
pub mod key;
pub mod logging;
pub mod man;
mod nix_conf;
mod page;
pub mod serve;
pub mod settings;
pub mod sign_all;
pub mod status;
mod units;
pub mod why;

use std::io::{self, ErrorKind, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};
use serde_json::Value;

use crate::config::raw::RawConfig;
use crate::config::{Config, ConfigFile, Environment, Look};

/// The arguments of `muster`.
#[derive(Parser, Debug)]
#[command(
    name = "muster",
    version,
    about = "One signed Nix substituter for all of your builders",
    long_about = LONG_ABOUT,
    after_long_help = AFTER_LONG_HELP,
    disable_help_subcommand = true,
    subcommand_required = true,
    arg_required_else_help = true
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Subcommand, Debug)]
#[expect(
    missing_docs,
    reason = "each is documented where its arguments are; words here would hide those from --help"
)]
pub enum Command {
    Serve(Box<serve::Args>),
    SignAll(Box<sign_all::Args>),
    /// Make signing keys and show their public halves
    #[command(subcommand)]
    Key(key::Command),
    Cache(cache::Args),
    CheckConfig(check_config::Args),
    Check(Box<check::Args>),
    Status(status::Args),
    Why(Box<why::Args>),
    Completions(completions::Args),
    Man(man::Args),
}

/// Returns the definition of the whole command line, for completions and manual pages.
pub(crate) fn definition() -> clap::Command {
    let mut command = Cli::command();
    command.build();
    command
}

/// Shows an error on standard error, with its causes, in colour on a terminal.
pub fn show_error(error: &anyhow::Error) {
    let mut stderr = io::stderr().lock();
    let colour = stderr.is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let (on, off) = if colour {
        ("\x1b[1;31m", "\x1b[0m")
    } else {
        ("", "")
    };
    // With nobody to read it, there is nobody to tell.
    _ = writeln!(stderr, "{on}error:{off} {error:#}");
}

/// Writes to standard output; a reader who has had enough, such as `head`, is no error.
fn print(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    let written = stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush());
    match written {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

/// Writes what a command found, as JSON or as text.
fn show(
    json: bool,
    value: impl FnOnce() -> Value,
    text: impl FnOnce() -> String,
) -> io::Result<()> {
    let text = match json {
        true => format!("{:#}\n", value()),
        false => text(),
    };
    print(&text)
}

/// Returns the exit status of a command that found all well, or not.
fn status_of(all_is_well: bool) -> ExitCode {
    match all_is_well {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

/// Reads the named file, or the usual one where there is one, and checks it under some flags.
fn load(
    named: Option<&Path>,
    flags: impl FnOnce(&mut RawConfig),
    look: Look,
) -> anyhow::Result<(Option<PathBuf>, Config)> {
    let usual = || {
        CONFIG_FILES
            .map(Path::new)
            .into_iter()
            .find(|path| path.exists())
    };
    let path = named.or_else(usual);
    let file = path.map(ConfigFile::open).transpose()?;
    let mut raw = match &file {
        Some(file) => file.parse()?,
        None => RawConfig::default(),
    };
    flags(&mut raw);
    let config = Config::check(raw, file.as_ref(), &Environment::of_process(), look)?;
    Ok((path.map(Path::to_owned), config))
}

/// The first of them that is there is read when no other is named; the packages' file goes first.
const CONFIG_FILES: [&str; 2] = ["/etc/muster/muster.toml", "/etc/muster/config.toml"];

const LONG_ABOUT: &str = "\
Muster gathers the stores of many Nix builders into one signed HTTP substituter. A client adds one \
URL and one key to nix.conf, and whatever any builder has already built is found before a single \
dependency is rebuilt.";

const AFTER_LONG_HELP: &str = "\
Start with `muster serve`: it finds the builders in /etc/nix/machines, makes a signing key, and \
prints the lines that go into nix.conf.

Exit status: 0 if all went well, 1 if it failed, 2 if the command line was wrong. Where a command says
more with its status, its own help has it.";

/// Of commands whose status says no more than whether they did it.
const EXIT_STATUS: &str =
    "Exit status: 0 if all went well, 1 if it failed, 2 if the command line was wrong.";
