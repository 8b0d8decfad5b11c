//! `muster man`: the manual pages.

use std::fs;
use std::path::PathBuf;

use anyhow::Context as _;

/// Write the manual pages
///
/// With a directory, a page for each subcommand is written there; without one, the main page goes to
/// standard output: muster man | man -l -
#[derive(clap::Args, Debug)]
#[command(after_long_help = super::EXIT_STATUS)]
pub struct Args {
    /// Directory to write the pages to, such as /usr/local/share/man/man1
    #[arg(value_name = "DIR")]
    pub dir: Option<PathBuf>,
}

/// Writes the pages.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let Some(dir) = &args.dir else {
        let mut page = Vec::new();
        clap_mangen::Man::new(super::definition()).render(&mut page)?;
        super::print(&String::from_utf8(page)?)?;
        return Ok(());
    };
    let written = fs::create_dir_all(dir).and_then(|()| {
        // It builds the definition itself, and names each page after the whole command.
        clap_mangen::generate_to(<super::Cli as clap::CommandFactory>::command(), dir)
    });
    written.with_context(|| format!("cannot write manual pages to {}", dir.display()))
}
