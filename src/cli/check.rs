//! `muster check`: is everything set up right?
//!
//! Each upstream is checked by itself and all at once; a failure ends nothing but what rests on it.

mod clock;
mod finding;
mod here;
mod network;
mod report;
mod service;
mod ssh;
mod upstream;

use std::process::ExitCode;

use futures_util::{StreamExt as _, stream};
use regex_lite::Regex;

use self::finding::{Finding, Outcome, Subject};
use self::here::Keys;
use self::report::{count, to_json, to_text};
use super::http::Server;
use super::settings::Settings;
use crate::app::upstreams::Starter;
use crate::config::{self, Config, Look, Source};
use crate::nix::store_path::StorePath;

/// Check whether everything is set up right, and say what to do where it is not
///
/// For each upstream: does its name resolve, is its port open, does ssh log in, is the host key the right
/// one, does the remote program start, which Nix answers there, is its store ours, is it trusted, does it
/// find and give a path with the right hash and a good signature, is its clock right. For this side: is
/// the signing key private, is the port free or held by a muster, and does nix.conf name our URL and key.
/// Nothing is changed.
#[derive(clap::Args, Debug)]
#[command(after_long_help = AFTER_LONG_HELP)]
pub struct Args {
    #[command(flatten)]
    settings: Settings,
    /// URL by which clients reach this muster, if it is another than where it listens
    #[arg(long, value_name = "URL", value_parser = |text: &str| Server::parse(text).map(|_| text.to_owned()))]
    pub url: Option<String>,
    /// Path to ask each upstream for [default: a small one that it lists]
    #[arg(long, value_name = "STORE-PATH")]
    pub path: Option<String>,
    /// Check only what matches, as "NAME: CHECK": 'builder-a', ': clock', 'this side: nix.conf'
    #[arg(long, value_name = "REGEX", value_parser = Regex::new)]
    pub only: Option<Regex>,
    /// Check as the service would: with its user, credentials and sandbox [default unit: muster.service]
    #[arg(long, value_name = "UNIT", num_args = 0..=1, require_equals = true, default_missing_value = "muster.service")]
    pub as_service: Option<String>,
    /// Show each check, and all that ssh said
    #[arg(long, short)]
    pub verbose: bool,
    /// Write JSON
    #[arg(long)]
    pub json: bool,
}

/// Prints what was found; the status says whether anything failed.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    if let Some(unit) = &args.as_service {
        return service::run(unit, &args.words());
    }
    let (config, keys) = load(&args.settings)?;
    let path = args.path.as_deref().map(|path| store_path(path, &config));
    let path = path.transpose()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let subjects = runtime.block_on(subjects(args, &config, &keys, path.as_ref()))?;
    // Whatever still hangs has been given up.
    runtime.shutdown_background();
    if let (Some(only), true) = (&args.only, subjects.is_empty()) {
        let names = config.upstreams.iter().map(|upstream| &*upstream.name);
        let names: Vec<_> = ["this side", "machines file"]
            .into_iter()
            .chain(names)
            .collect();
        anyhow::bail!(
            "--only {only} matches no check; it is held against \"NAME: CHECK\", as in 'this side: port', \
             and the names are: {}",
            names.join(", ")
        );
    }
    let failed = count(&subjects, Outcome::Failed);
    super::show(
        args.json,
        || to_json(&subjects),
        || to_text(&subjects, args.verbose),
    )?;
    Ok(super::status_of(failed == 0))
}

impl Args {
    /// The flags that go to the check within the service.
    fn words(&self) -> Vec<String> {
        let mut words = Vec::new();
        let valued = [
            ("--url", self.url.clone()),
            ("--path", self.path.clone()),
            (
                "--only",
                self.only.as_ref().map(|only| only.as_str().to_owned()),
            ),
        ];
        for (flag, value) in valued {
            words.extend(value.map(|value| format!("{flag}={value}")));
        }
        words.extend(self.verbose.then(|| "--verbose".to_owned()));
        words.extend(self.json.then(|| "--json".to_owned()));
        words
    }

    /// Tells whether a check is asked for.
    fn wants(&self, subject: &str, check: &str) -> bool {
        let only = self.only.as_ref();
        only.is_none_or(|only| only.is_match(&format!("{subject}: {check}")))
    }

    fn wants_any(&self, subject: &str, checks: &[&str]) -> bool {
        checks.iter().any(|check| self.wants(subject, check))
    }
}

/// Reads the configuration; keys that cannot be used are a finding, not the end.
fn load(settings: &Settings) -> anyhow::Result<(Config, Keys)> {
    let error = match settings.load(Look::ToCheck) {
        Ok(config) => return Ok((config, Keys::Read)),
        Err(error) => error,
    };
    let about_keys = |error: &config::Error| match error {
        config::Error::Key { .. } => true,
        config::Error::Value { key, .. } => *key == "secret-key-files",
        _ => false,
    };
    match error.downcast::<config::Error>() {
        Ok(error) if about_keys(&error) => {
            Ok((settings.load(Look::NotAtKeys)?, Keys::Refused(error)))
        }
        Ok(error) => Err(error.into()),
        Err(error) => Err(error),
    }
}

fn store_path(text: &str, config: &Config) -> anyhow::Result<StorePath> {
    let path = config.store_dir.parse(text).or_else(|_| text.parse());
    path.map_err(|error| anyhow::anyhow!("--path {text}: {error}"))
}

async fn subjects(
    args: &Args,
    config: &Config,
    keys: &Keys,
    path: Option<&StorePath>,
) -> anyhow::Result<Vec<Subject>> {
    let starter = Starter::new()?;
    let wanted = config
        .upstreams
        .iter()
        .filter(|upstream| args.wants_any(&upstream.name, &UPSTREAM_CHECKS));
    let checks = wanted.map(|upstream| {
        let starter = &starter;
        async move {
            let context = upstream::Context {
                starter,
                config,
                upstream,
                path,
            };
            upstream::check(&context).await
        }
    });
    let upstreams = stream::iter(checks)
        .buffered(AT_ONCE_MAX)
        .collect::<Vec<_>>();
    let here = async {
        match args.wants_any("this side", &HERE_CHECKS) {
            true => Some(here::check(config, keys, args.url.as_deref()).await),
            false => None,
        }
    };
    let (upstreams, here) = tokio::join!(upstreams, here);
    let mut subjects: Vec<_> = here
        .into_iter()
        .chain(machines(config))
        .chain(upstreams)
        .collect();
    for subject in &mut subjects {
        let name = subject.name.clone();
        subject
            .findings
            .retain(|finding| args.wants(&name, finding.check));
    }
    subjects.retain(|subject| !subject.findings.is_empty());
    Ok(subjects)
}

/// What is to be said of the machines file, and of stores that are left out.
fn machines(config: &Config) -> Option<Subject> {
    let mut subject = Subject::new("machines file", "machines file");
    for error in &config.machines_errors {
        subject.add(
            Finding::failed("line", error.to_string()).remedy(
                "mend the line: muster leaves it out, but Nix refuses the whole file for it",
            ),
        );
    }
    for warning in &config.machines_warnings {
        subject.add(Finding::note("line", warning.to_string()));
    }
    for warning in &config.warnings {
        subject.add(Finding::note("upstreams", warning));
    }
    let of_machines =
        |upstream: &&config::Upstream| matches!(upstream.source, Source::Machines { .. });
    let count = config.upstreams.iter().filter(of_machines).count();
    if subject.findings.is_empty() && count > 0 {
        let seen = format!("{count} builders, and every Nix since 2.8 reads its lines alike");
        subject.add(Finding::ok("line", seen));
    }
    if config.upstreams.is_empty() {
        subject.add(
            Finding::failed("upstreams", "there is nobody to ask")
                .remedy("name builders in /etc/nix/machines or with --upstream"),
        );
    }
    (!subject.findings.is_empty()).then_some(subject)
}

/// Parts `what was seen (what to do)`, as errors of upstreams are written.
fn split_remedy(text: &str) -> (String, Option<String>) {
    let whole = || (text.to_owned(), None);
    let Some(inner) = text.strip_suffix(')') else {
        return whole();
    };
    let mut open = 1;
    for (at, c) in inner.char_indices().rev() {
        match c {
            ')' => open += 1,
            '(' => open -= 1,
            _ => {}
        }
        if open == 0 {
            let (seen, remedy) = (inner.get(..at), inner.get(at + 1..));
            return match (seen.map(str::trim_end), remedy) {
                (Some(seen), Some(remedy)) if !seen.is_empty() => {
                    (seen.to_owned(), Some(remedy.to_owned()))
                }
                _ => whole(),
            };
        }
    }
    whole()
}

/// Logins at once: each upstream's own sshd sees one or two, this machine one process each.
const AT_ONCE_MAX: usize = 16;

const UPSTREAM_CHECKS: [&str; 15] = [
    "name",
    "TCP",
    "TLS",
    "cache info",
    "host key",
    "login",
    "remote program",
    "socket",
    "protocol",
    "store directory",
    "trust",
    "known path",
    "fetch",
    "signature",
    "clock",
];
const HERE_CHECKS: [&str; 8] = [
    "signing key",
    "port",
    "nix.conf",
    "nix.conf URL",
    "nix.conf key",
    "key names",
    "priority",
    "negative TTL",
];

const AFTER_LONG_HELP: &str = "\
Examples:
  muster check                          everything
  muster check --only builder-a -v      one builder, with all that ssh said
  muster check --as-service             as muster.service sees it

JSON:
  The form is stable: keys are added, never changed.
    ok, failed      whether nothing failed, and how many checks did
    subjects[]      name, kind (this side, machines file, upstream), and
      checks[]      check (its name), outcome (ok, note, failed, skipped), seen, remedy,
                    words (all that ssh said)

Exit status: 0 if nothing failed, 1 if anything did or the configuration cannot be used, 2 if the
command line was wrong.";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_remedy_is_parted_from_what_was_seen() {
        let (seen, remedy) = split_remedy("denied (publickey). (give one (a key))");
        assert_eq!(seen, "denied (publickey).");
        assert_eq!(remedy.as_deref(), Some("give one (a key)"));
        assert_eq!(split_remedy("no remedy"), ("no remedy".to_owned(), None));
        assert_eq!(split_remedy("(all)"), ("(all)".to_owned(), None));
        assert_eq!(split_remedy("odd)"), ("odd)".to_owned(), None));
    }
}
