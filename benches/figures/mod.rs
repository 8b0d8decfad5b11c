//! Times that were taken in turn, and the table that they make.

#![allow(
    clippy::allow_attributes,
    dead_code,
    reason = "each benchmark uses another part of it"
)]

pub mod cpu;
mod curves;
mod plot;

use serde_json::{Value, json};

/// All figures of one run, in the order in which they first came.
#[derive(Default)]
pub struct Figures {
    series: Vec<Series>,
}

/// One figure, taken again and again.
pub struct Series {
    pub what: String,
    /// The version of the client's Nix, or nothing.
    pub client: String,
    pub via: String,
    pub unit: Unit,
    samples: Vec<f64>,
    goal: Option<Goal>,
}

/// What a figure counts.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    Seconds,
    Milliseconds,
    Microseconds,
    Megabytes,
    Bytes,
    SecondsPerGb,
}

/// What a figure is to reach.
#[derive(Clone, Copy)]
pub enum Goal {
    /// A median of so much at most.
    AtMost(f64),
    /// So many times the anchor at most, in the median of the pairs.
    Times(f64, &'static str),
    /// So much more than the anchor at most, in the median of the pairs.
    Plus(f64, &'static str),
    /// Shown beside the anchor, and no more.
    Beside(&'static str),
}

impl Figures {
    /// Adds one sample of a figure.
    pub fn add(&mut self, what: &str, client: &str, via: &str, unit: Unit, sample: f64) {
        let place = self.place(what, client, via).unwrap_or_else(|| {
            self.series.push(Series {
                what: what.to_owned(),
                client: client.to_owned(),
                via: via.to_owned(),
                unit,
                samples: Vec::new(),
                goal: None,
            });
            self.series.len() - 1
        });
        eprintln!("{what}, {client} {via}: {}", unit.show(sample));
        self.series[place].samples.push(sample);
    }

    /// Says what a figure is to reach.
    pub fn set_goal(&mut self, what: &str, client: &str, via: &str, goal: Goal) {
        if let Some(place) = self.place(what, client, via) {
            self.series[place].goal = Some(goal);
        }
    }

    /// The table, as Markdown.
    pub fn table(&self) -> String {
        let mut text = "| | client | via | median | min | max | runs | against | goal | |\n\
             |---|---|---|---|---|---|---|---|---|---|\n"
            .to_owned();
        for series in &self.series {
            let sorted = sorted(&series.samples);
            let show =
                |sample: Option<&f64>| sample.map_or_else(String::new, |s| series.unit.show(*s));
            let (against, goal, verdict) = self.judge(series);
            text.push_str(&format!(
                "| {} | {} | {} | **{}** | {} | {} | {} | {against} | {goal} | {verdict} |\n",
                series.what,
                series.client,
                series.via,
                series.unit.show(median(&series.samples)),
                show(sorted.first()),
                show(sorted.last()),
                sorted.len(),
            ));
        }
        text
    }

    /// Every sample, for other programs.
    pub fn json(&self) -> Value {
        let series = self.series.iter().map(|series| {
            let (against, goal, verdict) = self.judge(series);
            json!({
                "what": series.what,
                "client": series.client,
                "via": series.via,
                "unit": series.unit.name(),
                "median": median(&series.samples),
                "samples": series.samples,
                "against": against,
                "goal": goal,
                "verdict": verdict,
            })
        });
        series.collect()
    }

    /// How a figure stands to its anchor, what it is to reach, and whether it does.
    fn judge(&self, series: &Series) -> (String, String, &'static str) {
        let verdict = |reached: bool| if reached { "reached" } else { "missed" };
        match series.goal {
            None => (String::new(), String::new(), ""),
            Some(Goal::AtMost(bound)) => {
                let reached = median(&series.samples) <= bound;
                (
                    String::new(),
                    format!("≤ {}", series.unit.show(bound)),
                    verdict(reached),
                )
            }
            Some(Goal::Times(bound, anchor)) => {
                let ratios = self.pairs(series, anchor, |a, b| a / b);
                let ratio = median(&ratios);
                let (low, high) = quartiles(&ratios);
                let against = format!("{ratio:.2} × {anchor} ({low:.2} to {high:.2})");
                (against, format!("≤ {bound} ×"), verdict(ratio <= bound))
            }
            Some(Goal::Plus(bound, anchor)) => {
                let differences = self.pairs(series, anchor, |a, b| a - b);
                let more = median(&differences);
                let (low, high) = quartiles(&differences);
                let against = format!("{more:+.3} s to {anchor} ({low:+.3} to {high:+.3})");
                (against, format!("≤ +{bound} s"), verdict(more <= bound))
            }
            Some(Goal::Beside(anchor)) => {
                let ratio = median(&self.pairs(series, anchor, |a, b| a / b));
                (format!("{ratio:.2} × {anchor}"), String::new(), "")
            }
        }
    }

    /// What two figures make together, run by run.
    fn pairs(&self, series: &Series, anchor: &str, make: impl Fn(f64, f64) -> f64) -> Vec<f64> {
        let place = self.place(&series.what, &series.client, anchor);
        let anchors = place
            .map(|p| self.series[p].samples.as_slice())
            .unwrap_or_default();
        series
            .samples
            .iter()
            .zip(anchors)
            .map(|(a, b)| make(*a, *b))
            .collect()
    }

    fn place(&self, what: &str, client: &str, via: &str) -> Option<usize> {
        self.series.iter().position(|s| {
            (s.what.as_str(), s.client.as_str(), s.via.as_str()) == (what, client, via)
        })
    }
}

impl Unit {
    fn show(self, sample: f64) -> String {
        match self {
            Self::Seconds => format!("{sample:.3} s"),
            Self::Milliseconds => format!("{sample:.1} ms"),
            Self::Microseconds => format!("{sample:.1} µs"),
            Self::Megabytes => format!("{sample:.1} MB"),
            Self::Bytes => format!("{sample:.0} B"),
            Self::SecondsPerGb => format!("{sample:.3} s/GB"),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Seconds => "s",
            Self::Milliseconds => "ms",
            Self::Microseconds => "µs",
            Self::Megabytes => "MB",
            Self::Bytes => "B",
            Self::SecondsPerGb => "s/GB",
        }
    }
}

/// The middle one; of an even number, the mean of the two.
fn median(samples: &[f64]) -> f64 {
    let sorted = sorted(samples);
    let at = |place: usize| sorted.get(place).copied().unwrap_or(f64::NAN);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => at(n / 2),
        n => f64::midpoint(at(n / 2 - 1), at(n / 2)),
    }
}

/// Between which half of them lie: a verdict is worth little where the bound lies between, too.
fn quartiles(samples: &[f64]) -> (f64, f64) {
    let sorted = sorted(samples);
    let last = sorted.len().saturating_sub(1);
    let at = |place: usize| sorted.get(place).copied().unwrap_or(f64::NAN);
    (at(last / 4), at(last - last / 4))
}

fn sorted(samples: &[f64]) -> Vec<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}
