//! The figures that have an anchor or a goal, as the tables of the README.

use super::{Figures, Goal, Series, median};

impl Figures {
    /// One row for each goal: the case, what stands beside it, Muster, how they compare.
    pub fn markdown(&self) -> String {
        let mut text = "| case | anchor | Muster | ratio, and of half of the pairs | goal | |\n|---|---|---|---|---|---|\n".to_owned();
        for series in &self.series {
            for (judged, goal) in self.judge(series).zip(&series.goals) {
                if goal.anchor() == series.via {
                    continue;
                }
                let verdict = match judged.reached {
                    None => "",
                    Some(true) => "✓",
                    Some(false) => "✗",
                };
                let value = series.unit.show(median(&series.samples));
                let (case, value) = match is_muster(series) || judged.reached.is_some() {
                    true => (case(series, &series.via), value),
                    false => (case(series, ""), format!("{} {value}", series.via)),
                };
                text.push_str(&format!(
                    "| {case} | {} | {value} | {} | {} | {verdict} |\n",
                    self.anchor(series, *goal),
                    without_name(&judged.against, goal.anchor()),
                    without_name(&judged.goal, goal.anchor()),
                ));
            }
        }
        text
    }

    /// One row for each figure whose `via` is a number.
    pub fn markdown_curves(&self, wanted: &[(&str, &str)]) -> String {
        let mut text = "| | over | medians |\n|---|---|---|\n".to_owned();
        for (what, axis) in wanted {
            let points = self.series.iter().filter(|series| series.what == *what);
            let points: Vec<_> = points
                .map(|one| format!("{}: {}", one.via, one.unit.show(median(&one.samples))))
                .collect();
            if !points.is_empty() {
                text.push_str(&format!("| {what} | {axis} | {} |\n", points.join(", ")));
            }
        }
        text
    }

    fn anchor(&self, series: &Series, goal: Goal) -> String {
        let anchor = goal.anchor();
        let place = self.place(&series.what, &series.client, anchor);
        place.map_or_else(String::new, |place| {
            let value = median(&self.series[place].samples);
            format!("{anchor} {}", series.unit.show(value))
        })
    }
}

fn is_muster(series: &Series) -> bool {
    series.via.starts_with("muster")
}

/// What a row is about, and by which road.
fn case(series: &Series, via: &str) -> String {
    let mut text = series.what.clone();
    if !series.client.is_empty() {
        text.push_str(&format!(", Nix {}", series.client));
    }
    // The column says that it is Muster.
    let via = via.strip_prefix("muster").unwrap_or(via);
    let via = via.trim_start_matches(", ");
    if !via.is_empty() {
        text.push_str(&format!(": {via}"));
    }
    text
}

/// The anchor has a column of its own.
fn without_name(text: &str, anchor: &str) -> String {
    let text = text.replace(&format!(" to {anchor}"), "");
    text.replace(&format!(" × {anchor}"), " ×")
}
