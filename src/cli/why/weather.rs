//! The weather: how much of a closure is built already, and where; as a table and as JSON.

use serde_json::{Value, json};

use super::super::page::{Alignment, Cell, Page, Table, Tone};
use super::super::units;
use crate::config::Config;
use crate::nix::store_path::StorePath;

/// The paths of a closure and who has them.
pub(super) struct Weather {
    pub(super) top: String,
    pub(super) kind: &'static str,
    /// Each path with the NAR size that somebody tells; `None`: nobody has it.
    pub(super) paths: Vec<(StorePath, Option<u64>)>,
    pub(super) tallies: Vec<Tally>,
    /// Outputs whose paths are known after building only.
    pub(super) unknown_outputs: usize,
    pub(super) unreadable: Vec<StorePath>,
}

/// What one upstream has.
#[derive(Default)]
pub(super) struct Tally {
    pub(super) name: String,
    pub(super) has: u64,
    pub(super) bytes: u64,
    pub(super) only_here: u64,
    /// Paths it has that it is not believed.
    pub(super) refused: u64,
    /// Why it could not be asked, or not to the end.
    pub(super) error: Option<String>,
}

impl Weather {
    pub(super) fn missing(&self) -> impl Iterator<Item = &StorePath> {
        let missing = self.paths.iter().filter(|(_, size)| size.is_none());
        missing.map(|(path, _)| path)
    }

    fn built(&self) -> u64 {
        (self.paths.len() - self.missing().count()) as u64
    }

    fn bytes(&self) -> u64 {
        self.paths.iter().filter_map(|(_, size)| *size).sum()
    }

    pub(super) fn to_text(&self, config: &Config) -> String {
        let all = self.paths.len() as u64;
        let mut page = Page::for_stdout();
        let head = match self.kind {
            "derivation" => format!("{all} paths that {} makes and needs", self.top),
            _ => format!("{all} paths in the closure of {}", self.top),
        };
        page.line(0, &head, Tone::Heading);
        page.gap();
        let mut table = Table::new(&[
            ("UPSTREAM", Alignment::Left),
            ("HAS", Alignment::Right),
            ("SHARE", Alignment::Right),
            ("SIZE", Alignment::Right),
            ("ONLY HERE", Alignment::Right),
        ]);
        for tally in &self.tallies {
            table.row(vec![
                Cell::plain(&tally.name),
                Cell::plain(tally.has.to_string()),
                Cell::plain(units::share(tally.has, all)),
                Cell::plain(units::size(tally.bytes)),
                Cell::plain(tally.only_here.to_string()),
            ]);
            if let Some(error) = &tally.error {
                table.remark(format!("could not be asked: {error}"), Tone::Bad);
            }
            if tally.refused > 0 {
                let words = format!("{} more are not signed by a trusted key", tally.refused);
                table.remark(words, Tone::Doubtful);
            }
        }
        let built = self.built();
        let tone = if built == all {
            Tone::Good
        } else {
            Tone::Doubtful
        };
        table.row(vec![
            Cell::new("anywhere", tone),
            Cell::new(built.to_string(), tone),
            Cell::new(units::share(built, all), tone),
            Cell::new(units::size(self.bytes()), tone),
        ]);
        page.table(&table);
        self.rest(&mut page, config);
        page.into_text()
    }

    fn rest(&self, page: &mut Page, config: &Config) {
        let mut list = |head: String, paths: Vec<&StorePath>| {
            if paths.is_empty() {
                return;
            }
            page.gap();
            page.line(0, &head, Tone::Doubtful);
            for path in paths.iter().take(LISTED_MAX) {
                page.line(4, &config.store_dir.join(path), Tone::Plain);
            }
            if paths.len() > LISTED_MAX {
                page.line(4, "… (all with --json)", Tone::Faint);
            }
        };
        let missing: Vec<_> = self.missing().collect();
        list(format!("{} are nowhere:", missing.len()), missing);
        let unreadable: Vec<_> = self.unreadable.iter().collect();
        let count = unreadable.len();
        list(
            format!("{count} derivations are nowhere, and what they need is not counted:"),
            unreadable,
        );
        if self.unknown_outputs > 0 {
            page.gap();
            let line = format!(
                "{} outputs have no path before they are built (content-addressed), and are not counted",
                self.unknown_outputs
            );
            page.line(0, &line, Tone::Doubtful);
        }
    }

    pub(super) fn to_json(&self, config: &Config) -> Value {
        let names = |paths: &mut dyn Iterator<Item = &StorePath>| -> Value {
            paths.map(|path| config.store_dir.join(path)).collect()
        };
        let tallies = self.tallies.iter().map(|tally| {
            json!({
                "name": tally.name,
                "has": tally.has,
                "bytes": tally.bytes,
                "only-here": tally.only_here,
                "refused": tally.refused,
                "error": tally.error,
            })
        });
        json!({
            "path": self.top,
            "kind": self.kind,
            "paths": self.paths.len(),
            "built": self.built(),
            "bytes": self.bytes(),
            "missing": names(&mut self.missing()),
            "unknown-outputs": self.unknown_outputs,
            "unreadable-derivations": names(&mut self.unreadable.iter()),
            "upstreams": tallies.collect::<Value>(),
        })
    }
}

const LISTED_MAX: usize = 20;
