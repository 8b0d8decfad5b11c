//! `muster cache`: what is kept on disk, whether it is right, and less of it.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Subcommand;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use crate::cache::disk::folder::FolderError;
use crate::cache::disk::upkeep::{Census, Findings, Removed, Upkeep};
use crate::config::raw::RawConfig;
use crate::config::values::{Bytes, FromText, Text};
use crate::config::{Config, Look};

/// Look after the NARs that are kept on disk
///
/// The folder is that of `muster serve` with the same configuration. It is a binary cache by itself,
/// and deleting it costs nothing but time.
#[derive(clap::Args, Debug)]
#[command(after_long_help = AFTER_LONG_HELP)]
pub struct Args {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
    /// Folder of the cache [default: as `muster serve` has it]
    #[arg(long, value_name = "DIR", global = true)]
    pub cache_dir: Option<PathBuf>,
    /// Configuration file [default: /etc/muster/muster.toml or config.toml, if there]
    #[arg(long, value_name = "FILE", env = "MUSTER_CONFIG", global = true)]
    pub config: Option<PathBuf>,
    /// Write JSON
    #[arg(long, global = true)]
    pub json: bool,
}

/// The subcommands of `muster cache`.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Count what is kept
    ///
    /// It goes by the files, so it works beside a server, and without an index.
    Stats,
    /// Read every NAR and remove what is wrong
    ///
    /// Checks that each narinfo has its file, and FileHash, FileSize, NarHash, NarSize and the archive
    /// itself. The status is 1 if anything was wrong. While a server uses the folder only --dry-run
    /// works; what a server finds wrong it removes itself.
    Verify {
        /// Remove nothing
        #[arg(long)]
        dry_run: bool,
    },
    /// Remove the least recently used NARs until the rest fits
    ///
    /// A running server keeps to its cache-size by itself; this is for when none runs.
    Gc {
        /// Bytes that may be left, or a text with K, M, G or T [default: cache-size]
        #[arg(long, value_name = "SIZE", value_parser = |text: &str| Bytes::from_text(text))]
        max_size: Option<Bytes>,
    },
    /// Remove everything that is kept
    ///
    /// What Muster did not write stays. While a server uses the folder, delete the folder itself
    /// instead: the server makes it anew within seconds.
    Clear,
}

/// Does it; the status says whether all was well.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let mut size = None;
    let flags = |raw: &mut RawConfig| {
        size = raw.cache_size.take();
        if let Some(dir) = &args.cache_dir {
            raw.cache_dir = Some(Text(
                std::path::absolute(dir).unwrap_or_else(|_| dir.clone()),
            ));
        }
    };
    let (_, config) = super::load(args.config.as_deref(), flags, Look::NotAtFiles)?;
    let dir = config.cache_dir.clone();
    let dir = dir.context("there is no folder for the cache; name it with --cache-dir")?;
    let open = || Upkeep::read_only(&dir, config.store_dir.clone());
    // Asked for at once, so that all commands say the same of a folder that is none.
    open().with_context(|| {
        let dir = dir.display();
        format!("no muster keeps NARs in {dir}; name the folder of the cache by --cache-dir")
    })?;
    match args.command {
        Command::Stats => {
            let progress = counter("counting");
            let census = open()?.census(|n| progress.inc(n));
            progress.finish_and_clear();
            let census = census.with_context(|| cannot_read(&dir))?;
            super::show(
                args.json,
                || stats_json(&dir, &census),
                || stats_text(&dir, &census),
            )?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Verify { dry_run } => verify(args, &dir, &config, dry_run),
        Command::Gc { max_size } => {
            let bytes_max = max_size.or(size).map_or(config.cache_bytes, |size| size.0);
            let upkeep = exclusive(&dir, &config, "a running server keeps to its cache-size")?;
            let progress = counter("looking");
            let removed = upkeep.collect(bytes_max, |n| progress.inc(n));
            progress.finish_and_clear();
            removals(args.json, removed.with_context(|| cannot_write(&dir))?)
        }
        Command::Clear => {
            let instead = "delete the folder itself instead, the server makes it anew";
            let upkeep = exclusive(&dir, &config, instead)?;
            let progress = counter("removing");
            let removed = upkeep.clear(|n| progress.inc(n));
            progress.finish_and_clear();
            removals(args.json, removed.with_context(|| cannot_write(&dir))?)
        }
    }
}

fn verify(args: &Args, dir: &Path, config: &Config, dry_run: bool) -> anyhow::Result<ExitCode> {
    let upkeep = match dry_run {
        true => Upkeep::read_only(dir, config.store_dir.clone())?,
        false => exclusive(dir, config, "or use --dry-run, which only reads")?,
    };
    let counting = counter("counting");
    let total = upkeep
        .census(|n| counting.inc(n))
        .map(|census| census.bytes);
    counting.finish_and_clear();
    let progress = ProgressBar::new(total.with_context(|| cannot_read(dir))?);
    progress.set_style(style(
        "{msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta}",
    ));
    progress.set_message("verifying");
    let findings = upkeep.verify(|n| progress.inc(n));
    progress.finish_and_clear();
    let findings = findings.with_context(|| cannot_read(dir))?;
    if !dry_run {
        let removed = upkeep.remove_wrong(&findings);
        removed.with_context(|| cannot_write(dir))?;
    }
    super::show(
        args.json,
        || findings_json(&findings, dry_run),
        || findings_text(&findings, dry_run),
    )?;
    Ok(super::status_of(findings.wrong.is_empty()))
}

fn exclusive(dir: &Path, config: &Config, instead: &str) -> anyhow::Result<Upkeep> {
    let upkeep = Upkeep::exclusive(dir, config.store_dir.clone());
    upkeep.map_err(|error| match error {
        FolderError::InUse(_) => anyhow::anyhow!("{error}: stop it first; {instead}"),
        error => error.into(),
    })
}

fn removals(json: bool, removed: Removed) -> anyhow::Result<ExitCode> {
    let Removed {
        nars,
        bytes,
        bytes_left,
    } = removed;
    let value = || json!({ "removed-nars": nars, "removed-bytes": bytes, "bytes": bytes_left });
    let text = || {
        let (freed, left) = (HumanBytes(bytes), HumanBytes(bytes_left));
        format!("removed {nars} NARs, {freed}; {left} are left\n")
    };
    super::show(json, value, text)?;
    Ok(ExitCode::SUCCESS)
}

fn stats_json(dir: &Path, census: &Census) -> Value {
    json!({
        "cache-dir": dir,
        "nars": census.nars,
        "bytes": census.bytes,
        "narinfos": census.narinfos,
        "foreign": census.foreign,
        "bytes-free": census.bytes_free,
        "in-use": census.in_use,
    })
}

fn stats_text(dir: &Path, census: &Census) -> String {
    let Census {
        nars,
        bytes,
        narinfos,
        foreign,
        bytes_free,
        in_use,
    } = *census;
    format!(
        "folder    {}\n\
         NARs      {nars}, {} ({bytes} bytes)\n\
         narinfos  {narinfos}\n\
         foreign   {foreign}\n\
         free      {}\n\
         used by   {}\n",
        dir.display(),
        HumanBytes(bytes),
        HumanBytes(bytes_free),
        if in_use { "a running muster" } else { "nobody" },
    )
}

fn findings_json(findings: &Findings, dry_run: bool) -> Value {
    let wrong = findings.wrong.iter();
    let wrong = wrong.map(|(file, cause)| json!({ "file": file, "cause": cause }));
    json!({
        "right": findings.right,
        "bytes": findings.bytes,
        "wrong": wrong.collect::<Value>(),
        "foreign": findings.foreign,
        "removed": !dry_run,
    })
}

fn findings_text(findings: &Findings, dry_run: bool) -> String {
    let mut text = String::new();
    for (file, cause) in &findings.wrong {
        text.push_str(&format!("{}: {cause}\n", file.display()));
    }
    let (right, bytes) = (findings.right, HumanBytes(findings.bytes));
    let wrong = findings.wrong.len();
    let fate = match (wrong, dry_run) {
        (0, _) => "",
        (_, true) => ", left as they are",
        (_, false) => ", removed",
    };
    text.push_str(&format!(
        "{right} NARs are right, {bytes}; {wrong} are wrong{fate}\n"
    ));
    text
}

/// Progress on standard error, and only where that is a terminal.
fn counter(message: &'static str) -> ProgressBar {
    let progress = ProgressBar::new_spinner();
    progress.set_style(style("{msg} {human_pos} files {per_sec}"));
    progress.set_message(message);
    progress
}

fn style(template: &str) -> ProgressStyle {
    let style = ProgressStyle::with_template(template);
    style.unwrap_or_else(|_| ProgressStyle::default_bar())
}

fn cannot_read(dir: &Path) -> String {
    format!("cannot read {}", dir.display())
}

fn cannot_write(dir: &Path) -> String {
    format!("cannot change {}", dir.display())
}

const AFTER_LONG_HELP: &str = "\
Examples:
  muster cache stats
  muster cache verify --dry-run --json
  muster cache gc --max-size 2G
  nix copy --from file:///var/cache/muster /nix/store/…      (without Muster)

JSON:
  The form is stable: keys are added, never changed. Sizes are in bytes.
    stats       cache-dir, nars, bytes, narinfos, foreign (files of others), bytes-free, in-use
    verify      right, bytes, wrong[] {file, cause}, foreign, removed (false with --dry-run)
    gc, clear   removed-nars, removed-bytes, bytes (that are left)

Exit status: 0 if all went well, 1 if it failed or verify found something wrong, 2 if the command
line was wrong.";
