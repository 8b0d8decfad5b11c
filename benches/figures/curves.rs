//! Figures whose `via` is a number, as curves over it.

use std::fmt::Write as _;

use super::{Figures, median, quartiles};

impl Figures {
    /// Draws one panel for each of these figures, named with what its numbers count; SVG.
    pub fn curves(&self, title: &str, subtitle: &str, wanted: &[(&str, &str)]) -> String {
        let rows = wanted.len().div_ceil(2);
        let height = TOP + PANEL_HEIGHT * rows as f64;
        let mut svg = format!(
            r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" aria-label="{title}">
<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff"/>
<g font-family="system-ui, DejaVu Sans, Helvetica, Arial, sans-serif" font-size="12" fill="#24292f">
<text x="20" y="30" font-size="17" font-weight="bold">{title}</text>
<text x="20" y="50" fill="#57606a">{subtitle}</text>
"##
        );
        for (place, (what, axis)) in wanted.iter().enumerate() {
            let x = 20.0 + PANEL_WIDTH * (place % 2) as f64;
            let y = TOP + PANEL_HEIGHT * (place / 2) as f64;
            self.panel(&mut svg, what, axis, x, y);
        }
        svg.push_str("</g>\n</svg>\n");
        svg
    }

    fn panel(&self, svg: &mut String, what: &str, axis: &str, left: f64, top: f64) {
        let points: Vec<_> = self
            .series
            .iter()
            .filter(|series| series.what == what)
            .filter_map(|series| Some((series.via.parse::<f64>().ok()?, series)))
            .collect();
        let Some(highest) = points
            .iter()
            .map(|(_, s)| quartiles(&s.samples).1)
            .reduce(f64::max)
        else {
            return;
        };
        let (bottom, width) = (top + PANEL_HEIGHT - 62.0, PANEL_WIDTH - 110.0);
        let x_of = |place: usize| left + 50.0 + width * (place as f64 + 0.5) / points.len() as f64;
        let y_of = |value: f64| bottom - (value / (highest * 1.15)) * (PANEL_HEIGHT - 110.0);
        _ = writeln!(
            svg,
            r##"<text x="{left:.1}" y="{:.1}" font-weight="bold">{what}</text>
<path d="M{:.1} {:.1} V{bottom:.1} H{:.1}" fill="none" stroke="#8c959f"/>
<text x="{:.1}" y="{:.1}" text-anchor="middle" fill="#57606a">{axis}</text>"##,
            top + 14.0,
            left + 50.0,
            top + 26.0,
            left + 50.0 + width,
            left + 50.0 + width / 2.0,
            bottom + 36.0,
        );
        let mut line = String::new();
        for (place, (number, series)) in points.iter().enumerate() {
            let value = median(&series.samples);
            let (low, high) = quartiles(&series.samples);
            let (x, y) = (x_of(place), y_of(value));
            _ = write!(line, "{}{x:.1} {y:.1} ", if place == 0 { "M" } else { "L" });
            _ = writeln!(
                svg,
                r##"<line x1="{x:.1}" y1="{:.1}" x2="{x:.1}" y2="{:.1}" stroke="#0969da" stroke-width="2" opacity="0.5"/>
<circle cx="{x:.1}" cy="{y:.1}" r="4" fill="#0969da"/>
<text x="{x:.1}" y="{:.1}" text-anchor="middle">{}</text>
<text x="{x:.1}" y="{:.1}" text-anchor="middle" fill="#57606a">{number}</text>"##,
                y_of(low),
                y_of(high),
                y - 10.0,
                series.unit.show(value),
                bottom + 18.0,
            );
        }
        _ = writeln!(
            svg,
            r##"<path d="{line}" fill="none" stroke="#0969da" stroke-width="2"/>"##
        );
    }
}

const WIDTH: f64 = 940.0;
const PANEL_WIDTH: f64 = 455.0;
const PANEL_HEIGHT: f64 = 260.0;
const TOP: f64 = 76.0;
