//! Times that were taken in turn, and the table that they make.

#![allow(
    clippy::allow_attributes,
    dead_code,
    reason = "each benchmark uses another part of it"
)]

pub mod cpu;
mod curves;
mod markdown;
mod plot;
pub mod saved;
mod style;

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
    goals: Vec<Goal>,
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
    /// How many times one thing is another.
    Ratio,
}

/// What a figure is to reach.
#[derive(Clone, Copy, PartialEq)]
pub enum Goal {
    /// A median of so much at most.
    AtMost(f64),
    /// So many times the anchor at most, in the median of the pairs.
    Times(f64, &'static str),
    /// So many times the anchor at least, in the median of the pairs.
    AtLeast(f64, &'static str),
    /// So much more than the anchor at most, in the median of the pairs.
    Plus(f64, &'static str),
    /// Shown beside the anchor, and no more.
    Beside(&'static str),
}

/// Says where the stores of the machines lie.
pub fn stores() -> &'static str {
    let place = rustix::fs::statfs(std::env::temp_dir().as_path());
    match place.is_ok_and(|place| place.f_type == TMPFS) {
        true => "stores in memory",
        false => "stores on disk",
    }
}

/// As statfs(2) names it.
const TMPFS: rustix::fs::FsWord = 0x0102_1994;

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
                goals: Vec::new(),
            });
            self.series.len() - 1
        });
        eprintln!("{what}, {client} {via}: {}", unit.show(sample));
        self.series[place].samples.push(sample);
    }

    /// Says what a figure is to reach, beside what was said before.
    pub fn set_goal(&mut self, what: &str, client: &str, via: &str, goal: Goal) {
        if let Some(place) = self.place(what, client, via) {
            let goals = &mut self.series[place].goals;
            // A goal takes the place of a look at the same anchor.
            goals.retain(|other| *other != goal && *other != Goal::Beside(goal.anchor()));
            goals.push(goal);
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
            let judged: Vec<_> = self.judge(series).collect();
            let column = |one: fn(&Judged) -> &str| {
                let all: Vec<_> = judged.iter().map(one).filter(|t| !t.is_empty()).collect();
                all.join("; ")
            };
            text.push_str(&format!(
                "| {} | {} | {} | **{}** | {} | {} | {} | {} | {} | {} |\n",
                series.what,
                series.client,
                series.via,
                series.unit.show(median(&series.samples)),
                show(sorted.first()),
                show(sorted.last()),
                sorted.len(),
                column(|j| &j.against),
                column(|j| &j.goal),
                column(|j| j.verdict()),
            ));
        }
        text
    }

    /// How a figure stands to each of its goals.
    fn judge(&self, series: &Series) -> impl Iterator<Item = Judged> {
        series.goals.iter().map(|goal| self.judge_by(series, *goal))
    }

    fn judge_by(&self, series: &Series, goal: Goal) -> Judged {
        let anchor = goal.anchor();
        let pairs = |make: fn(f64, f64) -> f64| {
            let all = self.pairs(series, anchor, make);
            (median(&all), quartiles(&all))
        };
        let times = || {
            let (ratio, (low, high)) = pairs(|a, b| a / b);
            let against = format!("{ratio:.2} × {anchor} ({low:.2} to {high:.2})");
            (ratio, against)
        };
        let factor = |bound: f64, sign| {
            let (ratio, against) = times();
            let bound_text = format!("{bound:.2}");
            let bound_text = bound_text.strip_suffix('0').unwrap_or(&bound_text);
            Judged {
                against,
                goal: format!("{sign} {bound_text} × {anchor}"),
                reached: Some(goal.is_reached_by(ratio)),
            }
        };
        match goal {
            Goal::AtMost(bound) => Judged {
                against: String::new(),
                goal: format!("≤ {}", series.unit.show(bound)),
                reached: Some(median(&series.samples) <= bound),
            },
            Goal::Times(bound, _) => factor(bound, "≤"),
            Goal::AtLeast(bound, _) => factor(bound, "≥"),
            Goal::Plus(bound, _) => {
                let (more, (low, high)) = pairs(|a, b| a - b);
                Judged {
                    against: format!("{more:+.3} s to {anchor} ({low:+.3} to {high:+.3})"),
                    goal: format!("≤ +{bound} s"),
                    reached: Some(more <= bound),
                }
            }
            Goal::Beside(_) => Judged {
                against: times().1,
                goal: String::new(),
                reached: None,
            },
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

/// How a figure stands to one goal.
struct Judged {
    against: String,
    goal: String,
    /// `None`: there is nothing to reach.
    reached: Option<bool>,
}

impl Judged {
    fn verdict(&self) -> &'static str {
        match self.reached {
            None => "",
            Some(true) => "reached",
            Some(false) => "missed",
        }
    }
}

impl Goal {
    /// What it is measured by; nothing, where it is a number.
    fn anchor(self) -> &'static str {
        match self {
            Self::AtMost(_) => "",
            Self::Times(_, anchor)
            | Self::AtLeast(_, anchor)
            | Self::Plus(_, anchor)
            | Self::Beside(anchor) => anchor,
        }
    }

    /// Whether a figure that is so many times the anchor is what is wanted, where a factor says that.
    fn is_reached_by(self, ratio: f64) -> bool {
        match self {
            Self::Times(bound, _) => ratio <= bound,
            Self::AtLeast(bound, _) => ratio >= bound,
            Self::AtMost(_) | Self::Plus(..) | Self::Beside(_) => false,
        }
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
            Self::Ratio => format!("{sample:.2}"),
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
            Self::Ratio => "ratio",
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

/// The panels of what benches/scale.rs measures, and what their numbers count.
pub const SCALE_CURVES: [(&str, &str); 8] = [
    (BY_BUILDERS, "builders"),
    (BY_PATHS, "paths in the store"),
    (BY_CLIENTS, "connections"),
    (BY_CLIENTS_P99, "connections"),
    (BY_ROUND_TRIP, "round trip to the builder, ms"),
    (CATALOG_MEMORY, "paths in the store"),
    (CATALOG_ADDED, "paths in the store"),
    (CATALOG_GONE, "paths in the store"),
];

pub const BY_BUILDERS: &str = "a path that nobody has, CPU a request";
pub const BY_PATHS: &str = "a path found for the first time, CPU a request";
pub const BY_CLIENTS: &str = "narinfo hit, CPU a request";
pub const BY_CLIENTS_P99: &str = "narinfo hit, p99";
pub const BY_ROUND_TRIP: &str = "closure of 201 paths, cold, real client";
pub const CATALOG_MEMORY: &str = "catalog of a builder, memory at whom it feeds";
pub const CATALOG_ADDED: &str = "catalog: an added path is known elsewhere after";
pub const CATALOG_GONE: &str = "catalog: a deleted path is gone elsewhere after";
