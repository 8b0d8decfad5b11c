//! The figures that have an anchor, as a picture: how many times the anchor each is.

use std::fmt::Write as _;

use super::{Figures, Goal, median, quartiles};

/// One bar.
struct Bar {
    label: String,
    ratio: f64,
    /// Between which half of the pairs lie.
    spread: (f64, f64),
    goal: Option<f64>,
    /// Both medians.
    values: String,
}

impl Figures {
    /// Draws every ratio as a bar, with the anchor as a line at 1 and the goal as a mark; SVG.
    pub fn picture(&self, title: &str, subtitle: &str) -> String {
        let bars = self.bars();
        let longest = bars
            .iter()
            .map(|b| b.spread.1.max(b.ratio))
            .fold(1.25, f64::max)
            .min(4.0);
        let scale = BAR_WIDTH / longest;
        let height = TOP + ROW * bars.len() as f64 + 40.0;
        let mut svg = format!(
            r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" aria-label="{title}">
<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff"/>
<g font-family="system-ui, DejaVu Sans, Helvetica, Arial, sans-serif" font-size="13" fill="#24292f">
<text x="20" y="30" font-size="17" font-weight="bold">{title}</text>
<text x="20" y="50" fill="#57606a">{subtitle}</text>
"##,
            title = escape(title),
            subtitle = escape(subtitle),
        );
        let anchor = LEFT + scale;
        let bottom = height - 28.0;
        _ = writeln!(
            svg,
            r##"<line x1="{anchor:.1}" y1="{:.1}" x2="{anchor:.1}" y2="{bottom:.1}" stroke="#24292f"/>
<text x="{anchor:.1}" y="{:.1}" text-anchor="middle" fill="#57606a">1.0 = the anchor</text>"##,
            TOP - 12.0,
            bottom + 17.0,
        );
        for (place, bar) in bars.iter().enumerate() {
            let y = TOP + ROW * place as f64;
            bar.draw(&mut svg, y, scale, longest);
        }
        svg.push_str("</g>\n</svg>\n");
        svg
    }

    fn bars(&self) -> Vec<Bar> {
        let bar = |series: &super::Series| {
            let (anchor, goal) = match series.goal? {
                Goal::Times(bound, anchor) => (anchor, Some(bound)),
                Goal::Beside(anchor) => (anchor, None),
                Goal::AtMost(_) | Goal::Plus(..) => return None,
            };
            let ratios = self.pairs(series, anchor, |a, b| a / b);
            let beside = self.place(&series.what, &series.client, anchor)?;
            let client = match series.client.as_str() {
                "" => String::new(),
                version => format!(", Nix {version}"),
            };
            Some(Bar {
                label: format!("{}{client}: {}", series.what, series.via),
                ratio: median(&ratios),
                spread: quartiles(&ratios),
                goal,
                values: format!(
                    "{}, {anchor} {}",
                    series.unit.show(median(&series.samples)),
                    series.unit.show(median(&self.series[beside].samples)),
                ),
            })
        };
        self.series
            .iter()
            .filter_map(bar)
            .filter(|b| b.ratio.is_finite())
            .collect()
    }
}

impl Bar {
    fn draw(&self, svg: &mut String, y: f64, scale: f64, longest: f64) {
        let width = |ratio: f64| ratio.min(longest) * scale;
        let colour = match self.goal {
            Some(goal) if self.ratio <= goal => "#2da44e",
            Some(_) => "#cf222e",
            None => "#8c959f",
        };
        _ = writeln!(
            svg,
            r##"<text x="20" y="{:.1}">{}</text>
<text x="20" y="{:.1}" font-size="11" fill="#57606a">{}</text>
<rect x="{LEFT}" y="{:.1}" width="{:.1}" height="16" fill="{colour}"/>
<line x1="{:.1}" y1="{:.1}" x2="{:.1}" y2="{:.1}" stroke="#24292f" stroke-width="1.5"/>"##,
            y + 12.0,
            escape(&self.label),
            y + 27.0,
            escape(&self.values),
            y + 4.0,
            width(self.ratio),
            LEFT + width(self.spread.0),
            y + 12.0,
            LEFT + width(self.spread.1),
            y + 12.0,
        );
        let mut end = width(self.ratio.max(self.spread.1));
        if let Some(goal) = self.goal {
            _ = writeln!(
                svg,
                r##"<path d="M{x:.1} {:.1} v24" stroke="#bf8700" stroke-width="3"/>"##,
                y,
                x = LEFT + width(goal),
            );
            end = end.max(width(goal));
        }
        let goal = self
            .goal
            .map_or_else(String::new, |goal| format!(" (goal {goal:.2})"));
        _ = writeln!(
            svg,
            r##"<text x="{:.1}" y="{:.1}" font-weight="bold">{:.2}{goal}</text>"##,
            LEFT + end + 8.0,
            y + 17.0,
            self.ratio,
        );
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('"', "&quot;")
}

const WIDTH: f64 = 940.0;
const LEFT: f64 = 400.0;
const BAR_WIDTH: f64 = 410.0;
const TOP: f64 = 78.0;
const ROW: f64 = 40.0;
