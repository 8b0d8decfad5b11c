//! Figures whose `via` is a number, as curves over it.

use std::fmt::Write as _;

use super::style::{self, TOP, escape};
use super::{Figures, Goal, Series, median, quartiles};

impl Figures {
    /// Draws one panel for each of these figures, named with what its numbers count; SVG.
    ///
    /// The numbers stand side by side at equal distances; a bar shows where half of the rounds lie.
    pub fn curves(&self, title: &str, subtitle: &str, wanted: &[(&str, &str)]) -> String {
        let rows = wanted.len().div_ceil(2);
        let height = TOP + PANEL_HEIGHT * rows as f64;
        let mut svg = style::begin(title, subtitle, WIDTH, height);
        for (place, (what, axis)) in wanted.iter().enumerate() {
            let left = 20.0 + PANEL_WIDTH * (place % 2) as f64;
            let top = TOP + PANEL_HEIGHT * (place / 2) as f64;
            self.panel(&mut svg, what, axis, left, top);
        }
        svg.push_str("</svg>\n");
        svg
    }

    fn panel(&self, svg: &mut String, what: &str, axis: &str, left: f64, top: f64) {
        let mut points: Vec<_> = self
            .series
            .iter()
            .filter(|series| series.what == what)
            .filter_map(|series| Some((series.via.parse::<f64>().ok()?, series)))
            .collect();
        points.sort_by(|(a, _), (b, _)| a.total_cmp(b));
        let Some((_, first)) = points.first() else {
            return;
        };
        let highest = points.iter().map(|(_, s)| quartiles(&s.samples).1);
        let goal = points.iter().find_map(|(_, series)| bound(series));
        let highest = highest.fold(0.0, f64::max);
        // A goal that is far above all would press the curve flat.
        let goal = goal.filter(|goal| *goal < 4.0 * highest);
        let panel = Panel {
            left: left + 52.0,
            right: left + PANEL_WIDTH - 24.0,
            bottom: top + PANEL_HEIGHT - 58.0,
            top: top + 40.0,
            highest: round_up(highest.max(goal.unwrap_or(0.0)) * 1.12),
        };
        let unit = first.unit.name();
        _ = writeln!(
            svg,
            r##"<text x="{left:.1}" y="{:.1}" class="strong">{}</text>
<text x="{:.1}" y="{:.1}" text-anchor="end" class="faint small">{unit}</text>
<text x="{:.1}" y="{:.1}" text-anchor="middle" class="faint">{}</text>"##,
            top + 14.0,
            escape(what),
            panel.left - 8.0,
            panel.top - 10.0,
            f64::midpoint(panel.left, panel.right),
            panel.bottom + 36.0,
            escape(axis),
        );
        panel.draw_scale(svg);
        if let Some(goal) = goal {
            panel.draw_goal(svg, goal);
        }
        let numbered = points.iter().enumerate();
        let places: Vec<_> = numbered
            .map(|(place, (number, series))| (panel.x_of(place, points.len()), *number, *series))
            .collect();
        let line: String = places
            .iter()
            .enumerate()
            .map(|(place, (x, _, series))| {
                let y = panel.y_of(median(&series.samples));
                format!("{}{x:.1} {y:.1} ", if place == 0 { "M" } else { "L" })
            })
            .collect();
        _ = writeln!(svg, r##"<path d="{}" class="curve"/>"##, line.trim_end());
        let corners = places
            .iter()
            .map(|(x, _, series)| (*x, panel.y_of(median(&series.samples))));
        let corners: Vec<_> = corners.collect();
        for (place, (x, number, series)) in places.into_iter().enumerate() {
            let before = place.checked_sub(1).and_then(|before| corners.get(before));
            let beside = before.into_iter().chain(corners.get(place + 1));
            let words_y = panel.words_y(x, series, beside.copied());
            panel.draw_point(svg, x, number, series, words_y);
        }
    }
}

/// The place of one panel's axes.
struct Panel {
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
    /// What stands at the top.
    highest: f64,
}

impl Panel {
    fn x_of(&self, place: usize, count: usize) -> f64 {
        self.left + (self.right - self.left) * (place as f64 + 0.5) / count as f64
    }

    fn y_of(&self, value: f64) -> f64 {
        self.bottom - value / self.highest * (self.bottom - self.top)
    }

    fn draw_scale(&self, svg: &mut String) {
        for part in 0..=4 {
            let value = self.highest * f64::from(part) / 4.0;
            let (y, class) = (self.y_of(value), if part == 0 { "axis" } else { "grid" });
            _ = writeln!(
                svg,
                r##"<path d="M{:.1} {y:.1} H{:.1}" class="{class}"/>
<text x="{:.1}" y="{:.1}" text-anchor="end" class="faint small">{}</text>"##,
                self.left,
                self.right,
                self.left - 8.0,
                y + 4.0,
                short(value),
            );
        }
    }

    fn draw_goal(&self, svg: &mut String, goal: f64) {
        let y = self.y_of(goal);
        _ = writeln!(
            svg,
            r##"<path d="M{:.1} {y:.1} H{:.1}" class="goal"/>
<text x="{:.1}" y="{:.1}" class="goaltext small">goal</text>"##,
            self.left,
            self.right,
            self.left + 4.0,
            y - 4.0,
        );
    }

    /// Returns where the value of a point stands: above it, or below where a line to the points beside it leaves no
    /// room above, and there is some below.
    fn words_y(
        &self,
        x: f64,
        series: &Series,
        beside: impl Iterator<Item = (f64, f64)> + Clone,
    ) -> f64 {
        let value = median(&series.samples);
        let (low, high) = quartiles(&series.samples);
        let y = self.y_of(value);
        let above = self.y_of(value.max(high)) - 9.0;
        let below = self.y_of(value.min(low)) + 19.0;
        // How far the line is from the point's height where the words end.
        let mut rises = beside.map(|(at, to)| (to - y) * WORDS_HALF / (at - x).abs());
        let is_crossed_below = rises.clone().any(|rise| rise > 5.0);
        let is_crossed_above = rises.any(|rise| rise < -5.0);
        match is_crossed_above && !is_crossed_below && below < self.bottom - 4.0 {
            true => below,
            false => above,
        }
    }

    fn draw_point(&self, svg: &mut String, x: f64, number: f64, series: &Series, words_y: f64) {
        let value = median(&series.samples);
        let (low, high) = quartiles(&series.samples);
        _ = writeln!(
            svg,
            r##"<path d="M{x:.1} {:.1} V{:.1}" class="spread"/>
<circle cx="{x:.1}" cy="{:.1}" r="4" class="point"/>
<text x="{x:.1}" y="{:.1}" text-anchor="middle">{}</text>
<text x="{x:.1}" y="{:.1}" text-anchor="middle" class="faint">{}</text>"##,
            self.y_of(low),
            self.y_of(high),
            self.y_of(value),
            words_y,
            short(value),
            self.bottom + 18.0,
            grouped(number),
        );
    }
}

fn bound(series: &Series) -> Option<f64> {
    series.goals.iter().find_map(|goal| match goal {
        Goal::AtMost(bound) => Some(*bound),
        Goal::Times(..) | Goal::AtLeast(..) | Goal::Plus(..) | Goal::Beside(_) => None,
    })
}

/// The next number that a quarter of is easy to read.
fn round_up(value: f64) -> f64 {
    if value <= 0.0 {
        return 1.0;
    }
    let power = 10_f64.powf(value.log10().floor());
    let steps = [1.0, 1.2, 1.6, 2.0, 2.4, 3.2, 4.0, 6.0, 8.0, 10.0];
    let step = steps.into_iter().find(|step| step * power >= value);
    step.unwrap_or(10.0) * power
}

/// Three digits.
fn short(value: f64) -> String {
    let text = match value.abs() {
        0.0 => return "0".to_owned(),
        99.95.. => format!("{value:.0}"),
        9.995.. => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    };
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        text
    }
}

/// A whole number with commas.
fn grouped(number: f64) -> String {
    let digits = format!("{number:.0}");
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

const WIDTH: f64 = 940.0;
const PANEL_WIDTH: f64 = 455.0;
const PANEL_HEIGHT: f64 = 264.0;
/// From the middle of a value to its end.
const WORDS_HALF: f64 = 14.0;
