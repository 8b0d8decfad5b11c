//! The `muster` program.

use std::process::ExitCode;

use clap::Parser as _;
use muster::cli::{self, Cli, Command};

fn main() -> ExitCode {
    let done = |result: anyhow::Result<()>| result.map(|()| ExitCode::SUCCESS);
    let result = match Cli::parse().command {
        Command::Serve(args) => done(cli::serve::run(&args)),
        Command::Key(command) => done(cli::key::run(&command)),
        Command::SignAll(args) => cli::sign_all::run(&args),
        Command::Cache(args) => cli::cache::run(&args),
        Command::CheckConfig(args) => cli::check_config::run(&args),
        Command::Check(args) => cli::check::run(&args),
        Command::Status(args) => cli::status::run(&args),
        Command::Completions(args) => done(cli::completions::run(&args)),
        Command::Man(args) => done(cli::man::run(&args)),
    };
    result.unwrap_or_else(|error| match error.downcast::<clap::Error>() {
        Ok(usage) => usage.exit(),
        Err(error) => {
            cli::show_error(&error);
            ExitCode::FAILURE
        }
    })
}
