//! `muster completions`: a script that completes the command line.

use clap_complete::Shell;

/// Write a completion script for a shell
///
/// For example: muster completions bash > /etc/bash_completion.d/muster
#[derive(clap::Args, Debug)]
#[command(after_long_help = super::EXIT_STATUS)]
pub struct Args {
    /// The shell
    #[arg(value_name = "SHELL")]
    pub shell: Shell,
}

/// Prints the script.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut super::definition(), "muster", &mut script);
    super::print(&String::from_utf8(script)?)?;
    Ok(())
}
