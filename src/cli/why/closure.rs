//! The walk over a closure: what belongs to it, and who has it.
//!
//! ```text
//! a store path    it, its references, theirs …                 (path infos of the upstreams)
//! a derivation    its outputs, the outputs and sources it needs, and what those need …     (.drv files)
//! ```

use std::collections::{HashMap, HashSet, VecDeque};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use futures_util::future::join_all;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::time::timeout;

use super::Args;
use super::target::Target;
use super::upstreams::{Claim, One, Upstreams};
use super::weather::{Tally, Weather};
use crate::codec::digest;
use crate::config::Config;
use crate::nix::derivation::Derivation;
use crate::nix::path_info::PathInfo;
use crate::nix::store_path::StorePath;

/// Walks the closure; tells the report, and whether all is there.
pub(super) async fn report(
    args: &Args,
    config: &Config,
    upstreams: &Upstreams,
    target: Target,
) -> anyhow::Result<(String, bool)> {
    let top = match target {
        Target::Path(path) => path,
        Target::Hash(hash) => {
            let claims = upstreams.ask(hash).await;
            let found = claims.into_iter().find_map(|(_, claim)| match claim {
                Claim::Has(info) => Some(info.path),
                Claim::Absent | Claim::Unknown(_) => None,
            });
            found.with_context(|| {
                format!(
                    "no upstream that can tell has a path with the hash part {hash}; `muster why {hash}` \
                     says more of each"
                )
            })?
        }
    };
    let mut walk = Walk::new(config, upstreams);
    let kind = match top.is_derivation() {
        true => {
            walk.derivation(&top).await?;
            "derivation"
        }
        false => {
            walk.references(top.clone()).await?;
            "path"
        }
    };
    let weather = walk.finish(config.store_dir.join(&top), kind);
    let good = weather.missing().next().is_none() && weather.unreadable.is_empty();
    let text = match args.json {
        true => format!("{:#}\n", weather.to_json(config)),
        false => weather.to_text(config),
    };
    Ok((text, good && weather.unknown_outputs == 0))
}

struct Walk<'w> {
    config: &'w Config,
    upstreams: &'w Upstreams,
    paths: Vec<(StorePath, Option<u64>)>,
    seen: HashSet<StorePath>,
    tallies: Vec<Tally>,
    /// Derivations and the names of their outputs.
    unknown_outputs: HashSet<(StorePath, String)>,
    unreadable: Vec<StorePath>,
    bar: ProgressBar,
}

impl<'w> Walk<'w> {
    fn new(config: &'w Config, upstreams: &'w Upstreams) -> Self {
        let tally = |one: &One| Tally {
            name: one.config.name.clone(),
            ..Tally::default()
        };
        // Drawn on standard error, and only on a terminal.
        let bar = ProgressBar::new(0);
        let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {eta}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Self {
            config,
            upstreams,
            paths: Vec::new(),
            seen: HashSet::new(),
            tallies: upstreams.iter().map(tally).collect(),
            unknown_outputs: HashSet::new(),
            unreadable: Vec::new(),
            bar,
        }
    }

    /// Walks from a path along references, level by level.
    async fn references(&mut self, top: StorePath) -> anyhow::Result<()> {
        self.bar.set_message("asking");
        let mut level = vec![top.clone()];
        self.seen.insert(top);
        while !level.is_empty() {
            self.bar.inc_length(level.len() as u64);
            let mut next = Vec::new();
            for batch in level.chunks(BATCH_MAX) {
                for info in self.ask(batch).await.into_iter().flatten() {
                    let new = info.references.into_iter();
                    next.extend(new.filter(|path| self.seen.insert(path.clone())));
                }
            }
            if self.seen.len() > PATHS_MAX {
                bail!("the closure has more than {PATHS_MAX} paths");
            }
            level = next;
        }
        Ok(())
    }

    /// Walks from a derivation along what it needs, then asks for all at once.
    async fn derivation(&mut self, top: &StorePath) -> anyhow::Result<()> {
        self.bar.set_message("reading derivations");
        let mut read: HashMap<StorePath, Option<Derivation>> = HashMap::new();
        let mut wanted: Vec<StorePath> = Vec::new();
        let mut waiting = VecDeque::from([(top.clone(), None)]);
        while let Some((path, outputs)) = waiting.pop_front() {
            let first = !read.contains_key(&path);
            if first {
                self.bar.inc_length(1);
                let found = self.read(&path).await;
                self.bar.inc(1);
                if found.is_none() {
                    self.unreadable.push(path.clone());
                }
                read.insert(path.clone(), found);
            }
            let Some(Some(derivation)) = read.get(&path) else {
                continue;
            };
            wanted.extend(self.outputs(&path, derivation, outputs.as_deref()));
            if first {
                let sources = derivation.input_sources.iter();
                let sources = sources.filter(|path| self.seen.insert((*path).clone()));
                wanted.extend(sources.cloned());
                let inputs = derivation.input_derivations.iter();
                waiting.extend(inputs.map(|(path, names)| (path.clone(), Some(names.clone()))));
            }
            if self.seen.len() > PATHS_MAX {
                bail!("the closure has more than {PATHS_MAX} paths");
            }
        }
        if self.unreadable.first() == Some(top) {
            bail!(
                "{top} is not in this machine's store, and no upstream gave it; make it here with \
                 nix-instantiate, or name the path that it builds"
            );
        }
        self.bar.set_message("asking");
        self.bar.set_position(0);
        self.bar.set_length(wanted.len() as u64);
        for batch in wanted.chunks(BATCH_MAX) {
            self.ask(batch).await;
        }
        Ok(())
    }

    /// Takes the paths of outputs that were not seen yet; all of them, or those of these names.
    fn outputs(
        &mut self,
        of: &StorePath,
        derivation: &Derivation,
        names: Option<&[String]>,
    ) -> Vec<StorePath> {
        let mut paths = Vec::new();
        for (name, path) in &derivation.outputs {
            if names.is_some_and(|names| !names.contains(name)) {
                continue;
            }
            match path {
                Some(path) if self.seen.insert(path.clone()) => paths.push(path.clone()),
                Some(_) => {}
                None => {
                    self.unknown_outputs.insert((of.clone(), name.clone()));
                }
            }
        }
        paths
    }

    /// Reads a derivation here, or else from an upstream.
    async fn read(&self, path: &StorePath) -> Option<Derivation> {
        let store_dir = &self.config.store_dir;
        let file = store_dir.join(path);
        if let Ok(text) = std::fs::read_to_string(Path::new(&file)) {
            return Derivation::parse(&text, store_dir).ok();
        }
        for one in self.upstreams.iter() {
            let Claim::Has(info) = one.path_info(path.hash()).await else {
                continue;
            };
            if info.nar_size > DERIVATION_BYTES_MAX {
                continue;
            }
            let upstream = one.started()?;
            let reading = async {
                let stream = upstream.nar(&info).await.ok()??;
                digest::whole(stream, info.nar_hash, info.nar_size)
                    .await
                    .ok()
            };
            let Ok(Some(nar)) = timeout(READ_WITHIN, reading).await else {
                continue;
            };
            let text = regular_file(&nar).and_then(|bytes| std::str::from_utf8(bytes).ok());
            if let Some(Ok(found)) = text.map(|text| Derivation::parse(text, store_dir)) {
                return Some(found);
            }
        }
        None
    }

    /// Asks everybody for these paths, counts, and returns what is believed best of each.
    async fn ask(&mut self, paths: &[StorePath]) -> Vec<Option<PathInfo>> {
        let asked = self
            .upstreams
            .iter()
            .zip(&self.tallies)
            .map(|(one, tally)| async move {
                match &tally.error {
                    Some(error) => Err(error.clone()),
                    None => one.path_infos(paths).await,
                }
            });
        let answers = join_all(asked).await;
        let mut best: Vec<Option<PathInfo>> = vec![None; paths.len()];
        let mut holders: Vec<Vec<usize>> = vec![Vec::new(); paths.len()];
        let upstreams = self.upstreams.iter().enumerate();
        for ((place, one), answer) in upstreams.zip(answers) {
            let Some(tally) = self.tallies.get_mut(place) else {
                continue;
            };
            let infos = match answer {
                Ok(infos) => infos,
                Err(error) => {
                    tally.error = Some(error);
                    continue;
                }
            };
            for ((info, best), holders) in infos.into_iter().zip(&mut best).zip(&mut holders) {
                let Some(info) = info else { continue };
                let trust = &one.config.trust;
                if info.clone().verify(trust, &self.config.store_dir).is_err() {
                    tally.refused += 1;
                    continue;
                }
                tally.has += 1;
                tally.bytes += info.nar_size;
                holders.push(place);
                best.get_or_insert(info);
            }
        }
        for holders in &holders {
            if let [only] = holders.as_slice()
                && let Some(tally) = self.tallies.get_mut(*only)
            {
                tally.only_here += 1;
            }
        }
        let sizes = best
            .iter()
            .map(|info| info.as_ref().map(|info| info.nar_size));
        self.paths.extend(paths.iter().cloned().zip(sizes));
        self.bar.inc(paths.len() as u64);
        best
    }

    fn finish(self, top: String, kind: &'static str) -> Weather {
        self.bar.finish_and_clear();
        Weather {
            top,
            kind,
            paths: self.paths,
            tallies: self.tallies,
            unknown_outputs: self.unknown_outputs.len(),
            unreadable: self.unreadable,
        }
    }
}

/// Returns the content of a NAR that is one file, not executable, as all derivations are.
fn regular_file(nar: &[u8]) -> Option<&[u8]> {
    let mut rest = nar;
    let mut text = || {
        let (length, after) = rest.split_first_chunk::<8>()?;
        let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
        let text = after.get(..length)?;
        rest = after.get(length.checked_next_multiple_of(8)?..)?;
        Some(text)
    };
    for word in ["nix-archive-1", "(", "type", "regular", "contents"] {
        if text()? != word.as_bytes() {
            return None;
        }
    }
    text()
}

/// Questions in one go.
const BATCH_MAX: usize = 256;
/// All of nixpkgs is some 200,000 derivations.
const PATHS_MAX: usize = 1_000_000;
const DERIVATION_BYTES_MAX: u64 = 4 << 20;
const READ_WITHIN: Duration = Duration::from_secs(30);
