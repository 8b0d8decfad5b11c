//! What became of the paths: a table for people, JSON for programs.

use std::fmt::Write as _;
use std::sync::Arc;

use serde_json::{Value, json};

use crate::app::sign_all::{Phase, Progress, Store};
use crate::config::Config;
use crate::nix::store_path::StoreDir;
use crate::upstream::signing::Mode;
use crate::upstream::signing::tally::{Counts, Failure};

/// The end of a run.
pub(super) struct Report {
    mode: Mode,
    keys: Vec<String>,
    store_dir: StoreDir,
    stores: Vec<Line>,
}

/// The end of one store.
struct Line {
    name: String,
    progress: Progress,
    counts: Counts,
    failures: Vec<Failure>,
}

impl Report {
    pub(super) fn new(config: &Config, stores: &[Arc<Store>], mode: Mode) -> Self {
        let line = |store: &Arc<Store>| Line {
            name: store.name.clone(),
            progress: store.progress(),
            counts: store.tally.counts(),
            failures: store.tally.failures(),
        };
        let keys = config.secret_keys.iter();
        Self {
            mode,
            keys: keys.map(|key| key.name().to_string()).collect(),
            store_dir: config.store_dir.clone(),
            stores: stores.iter().map(line).collect(),
        }
    }

    /// Tells whether every path of every store is signed or needs no signature.
    pub(super) fn ok(&self) -> bool {
        self.stores.iter().all(Line::ok)
    }

    fn interrupted(&self) -> bool {
        let stopped = |line: &Line| line.progress.phase == Phase::Stopped;
        self.stores.iter().any(stopped)
    }

    pub(super) fn to_json(&self) -> Value {
        json!({
            "ok": self.ok(),
            "dry-run": self.mode == Mode::Count,
            "interrupted": self.interrupted(),
            "keys": self.keys,
            "stores": self.stores.iter().map(|line| line.to_json(&self.store_dir)).collect::<Value>(),
        })
    }

    pub(super) fn to_text(&self) -> String {
        let signed = match self.mode {
            Mode::Sign => "signed",
            Mode::Count => "unsigned",
        };
        let mut rows = vec![
            [
                "store",
                "paths",
                signed,
                "signed before",
                "content-addressed",
                "gone",
                "failed",
                "left",
                "seconds",
            ]
            .map(str::to_owned),
        ];
        let mut total = Counts::default();
        for line in &self.stores {
            total += line.counts;
            rows.push(row(&line.name, &line.counts, line.seconds()));
        }
        if self.stores.len() > 1 {
            rows.push(row("all", &total, None));
        }
        let mut text = table(&rows);
        for line in &self.stores {
            line.remarks(&self.store_dir, &mut text);
        }
        if self.stores.is_empty() {
            text.push_str("no store to sign\n");
        }
        text
    }
}

impl Line {
    fn ok(&self) -> bool {
        self.progress.phase == Phase::Done && self.counts.failed == 0
    }

    fn error(&self) -> Option<&str> {
        match &self.progress.phase {
            Phase::Failed(error) => Some(error),
            _ => None,
        }
    }

    fn left(&self) -> u64 {
        left(&self.counts)
    }

    fn seconds(&self) -> Option<f64> {
        let took = self.progress.took?;
        Some((took.as_secs_f64() * 1000.0).round() / 1000.0)
    }

    fn remarks(&self, store_dir: &StoreDir, text: &mut String) {
        if let Some(error) = self.error() {
            _ = writeln!(text, "{}: cannot be signed: {error}", self.name);
        }
        if self.progress.phase == Phase::Stopped {
            let left = self.left();
            _ = writeln!(
                text,
                "{}: stopped with {left} paths left; start it again and it goes on",
                self.name
            );
        }
        for failure in &self.failures {
            let first = failure.examples.first().map(|path| store_dir.join(path));
            _ = writeln!(
                text,
                "{}: {} failed: {} (first: {})",
                self.name,
                failure.count,
                failure.reason,
                first.unwrap_or_default()
            );
        }
    }

    fn to_json(&self, store_dir: &StoreDir) -> Value {
        let counts = &self.counts;
        let failure = |failure: &Failure| {
            let examples = failure.examples.iter().map(|path| store_dir.join(path));
            json!({
                "reason": failure.reason,
                "count": failure.count,
                "examples": examples.collect::<Vec<_>>(),
            })
        };
        json!({
            "store": self.name,
            "peer": self.progress.peer,
            "error": self.error(),
            "paths": counts.paths,
            "signed": counts.signed,
            "skipped": {
                "signed-already": counts.signed_already,
                "content-addressed": counts.content_addressed,
                "gone": counts.gone,
            },
            "failed": counts.failed,
            "left": self.left(),
            "failures": self.failures.iter().map(failure).collect::<Value>(),
            "seconds": self.seconds(),
        })
    }
}

fn left(counts: &Counts) -> u64 {
    counts.paths.saturating_sub(counts.settled())
}

fn row(name: &str, counts: &Counts, seconds: Option<f64>) -> [String; COLUMNS] {
    [
        name.to_owned(),
        counts.paths.to_string(),
        counts.signed.to_string(),
        counts.signed_already.to_string(),
        counts.content_addressed.to_string(),
        counts.gone.to_string(),
        counts.failed.to_string(),
        left(counts).to_string(),
        seconds.map(|s| format!("{s:.1}")).unwrap_or_default(),
    ]
}

/// Writes rows whose first column stands left and whose numbers stand right.
fn table(rows: &[[String; COLUMNS]]) -> String {
    let widths: [usize; COLUMNS] = std::array::from_fn(|column| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    });
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(widths).enumerate() {
            _ = match column {
                0 => write!(line, "{cell:width$}"),
                _ => write!(line, "  {cell:>width$}"),
            };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

const COLUMNS: usize = 9;
