//! Figures as JSON, for other programs and to be read again.
//!
//! ```text
//! about    what ran, in words
//! figures  [{ what, client, via, unit, median, samples, goals }]
//!   goals  [{ kind: "at-most" | "times" | "at-least" | "plus" | "beside", bound, anchor, against, goal, verdict }]
//! ```

use serde_json::{Value, json};

use super::{Figures, Goal, Series, Unit, median};

impl Figures {
    /// Every sample, and how it stands to its goals.
    pub fn json(&self) -> Value {
        let series = self.series.iter().map(|series| {
            let judged = self.judge(series).zip(&series.goals);
            let goals = judged.map(|(judged, goal)| {
                let (kind, bound) = match goal {
                    Goal::AtMost(bound) => ("at-most", Some(bound)),
                    Goal::Times(bound, _) => ("times", Some(bound)),
                    Goal::AtLeast(bound, _) => ("at-least", Some(bound)),
                    Goal::Plus(bound, _) => ("plus", Some(bound)),
                    Goal::Beside(_) => ("beside", None),
                };
                json!({
                    "kind": kind,
                    "bound": bound,
                    "anchor": goal.anchor(),
                    "against": judged.against,
                    "goal": judged.goal,
                    "verdict": judged.verdict(),
                })
            });
            json!({
                "what": series.what,
                "client": series.client,
                "via": series.via,
                "unit": series.unit.name(),
                "median": median(&series.samples),
                "samples": series.samples,
                "goals": goals.collect::<Vec<_>>(),
            })
        });
        series.collect()
    }

    /// Reads what [`Self::json`] wrote; `None`: it is something else.
    pub fn read(saved: &Value) -> Option<Self> {
        let series = saved.as_array()?.iter().map(|one| {
            let text = |name: &str| one[name].as_str().map(str::to_owned);
            let samples = one["samples"].as_array()?.iter().map(Value::as_f64);
            let goals = one["goals"].as_array()?.iter().map(|goal| {
                // Few and short, and this program ends soon.
                let anchor = || Some(&*goal["anchor"].as_str()?.to_owned().leak());
                let bound = || goal["bound"].as_f64();
                match goal["kind"].as_str()? {
                    "at-most" => Some(Goal::AtMost(bound()?)),
                    "times" => Some(Goal::Times(bound()?, anchor()?)),
                    "at-least" => Some(Goal::AtLeast(bound()?, anchor()?)),
                    "plus" => Some(Goal::Plus(bound()?, anchor()?)),
                    "beside" => Some(Goal::Beside(anchor()?)),
                    _ => None,
                }
            });
            Some(Series {
                what: text("what")?,
                client: text("client")?,
                via: text("via")?,
                unit: Unit::named(one["unit"].as_str()?)?,
                samples: samples.collect::<Option<_>>()?,
                goals: goals.collect::<Option<_>>()?,
            })
        });
        Some(Self {
            series: series.collect::<Option<_>>()?,
        })
    }
}

impl Unit {
    fn named(name: &str) -> Option<Self> {
        let all = [
            Self::Seconds,
            Self::Milliseconds,
            Self::Microseconds,
            Self::Megabytes,
            Self::Bytes,
            Self::SecondsPerGb,
            Self::Ratio,
        ];
        all.into_iter().find(|unit| unit.name() == name)
    }
}
