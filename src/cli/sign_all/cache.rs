//! `muster sign-all --cache`: the narinfos of Muster's own cache, signed anew after a change of keys.
//!
//! A running server does this by itself when it is reloaded; this is for a folder that no server uses,
//! such as one that nginx or `nix copy` read.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use super::Args;
use crate::cache::backend::{Ground, Record};
use crate::cache::disk::folder::FolderError;
use crate::cache::disk::resign::{Progress, Tally};
use crate::cache::disk::upkeep::Upkeep;
use crate::config::raw::RawConfig;
use crate::config::values::{List, Text};
use crate::config::{Config, Look};
use crate::nix::path_info::Trust;
use crate::nix::signer::Signer;
use crate::nix::store_path::StoreDir;

/// What became of the folder.
struct Report {
    dir: PathBuf,
    keys: Vec<String>,
    tally: Tally,
    seconds: f64,
}

/// Signs the folder `named`, or that of the configuration; the status says whether all is well.
pub(super) fn run(args: &Args, named: Option<&PathBuf>) -> anyhow::Result<ExitCode> {
    let (_, config) = super::super::load(
        args.config.as_deref(),
        |raw| lay_over(raw, args, named),
        Look::ToCheck,
    )?;
    let dir = config.cache_dir.clone();
    let dir = dir.context("the configuration keeps no NARs; name the folder: --cache DIR")?;
    if config.secret_keys.is_empty() {
        bail!("there is no key to sign with; name its file with --secret-key-file");
    }
    let upkeep = Upkeep::exclusive(&dir, config.store_dir.clone());
    let upkeep = upkeep.map_err(|error| match error {
        FolderError::InUse(_) => anyhow::anyhow!(
            "{error}: it signs the folder anew by itself when its keys change (systemctl reload \
             muster); or stop it first"
        ),
        error => error.into(),
    })?;
    let signer = Signer::new(config.secret_keys.clone(), config.store_dir.clone());
    let bar = bar();
    let show = |progress: Progress| {
        bar.set_length(progress.total);
        bar.set_position(progress.done);
    };
    let begun = Instant::now();
    let believed = |record: &Record| is_believed(&config, &config.store_dir, record);
    let tally = upkeep.re_sign(&signer, &args.former_public_keys, &believed, show);
    bar.finish_and_clear();
    let report = Report {
        tally: tally.with_context(|| format!("cannot change {}", dir.display()))?,
        dir,
        keys: config
            .secret_keys
            .iter()
            .map(|k| k.name().to_string())
            .collect(),
        seconds: begun.elapsed().as_secs_f64(),
    };
    super::super::show(args.json, || report.to_json(), || report.to_text())?;
    Ok(super::super::status_of(report.ok()))
}

fn lay_over(raw: &mut RawConfig, args: &Args, named: Option<&PathBuf>) {
    if let Some(dir) = named {
        let dir = std::path::absolute(dir).unwrap_or_else(|_| dir.clone());
        raw.cache_dir = Some(Text(dir));
        // Named here, it is meant, even if the server keeps nothing any more.
        raw.cache_size = None;
    }
    if !args.secret_key_files.is_empty() {
        let files = args.secret_key_files.iter().cloned().map(Text);
        raw.secret_key_files = Some(List(files.collect()));
    }
    if let Some(dir) = &args.store_dir {
        raw.store_dir = Some(Text(dir.clone()));
    }
}

/// Tells whether somebody who vouched for a path is believed by the configuration of today.
fn is_believed(config: &Config, store_dir: &StoreDir, record: &Record) -> bool {
    let holds = |trust: &Trust| record.info.clone().verify(trust, store_dir).is_ok();
    let mut upstreams = config.upstreams.iter();
    let vouched = upstreams.any(|upstream| {
        let named = |ground: &Ground| ground.upstream == upstream.name;
        record.grounds.iter().any(named) && holds(&upstream.trust)
    });
    // Its content address is enough, whoever had it.
    vouched || holds(&Trust::Keys(Vec::new()))
}

impl Report {
    fn ok(&self) -> bool {
        self.tally.refused == 0
    }

    fn to_json(&self) -> Value {
        let Tally {
            signed,
            current,
            refused,
            foreign,
        } = self.tally;
        json!({
            "ok": self.ok(),
            "keys": self.keys,
            "cache-dir": self.dir,
            "paths": self.tally.all(),
            "signed": signed,
            "skipped": { "signed-already": current, "foreign": foreign },
            "failed": refused,
            "failures": match refused {
                0 => json!([]),
                count => json!([{ "reason": REFUSED, "count": count, "examples": [] }]),
            },
            "seconds": self.seconds,
        })
    }

    fn to_text(&self) -> String {
        let Tally {
            signed,
            current,
            refused,
            foreign,
        } = self.tally;
        let mut text = format!(
            "{}: {signed} signed, {current} as they should be, {foreign} of others, {refused} failed \
             in {:.1} s, with {}\n",
            self.dir.display(),
            self.seconds,
            self.keys.join(", "),
        );
        if refused > 0 {
            text.push_str(&format!("  {refused}: {REFUSED}\n"));
        }
        text
    }
}

/// On standard error, and only where that is a terminal.
fn bar() -> ProgressBar {
    let style =
        ProgressStyle::with_template("signing {bar:30} {human_pos}/{human_len} {per_sec} {eta}");
    let bar = ProgressBar::new(0);
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}

const REFUSED: &str = "nobody whom the configuration trusts has vouched for the path; name the upstreams \
                       with --config, or the key that signed it with --former-public-key";
