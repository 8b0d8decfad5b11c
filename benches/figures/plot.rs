//! The figures that have an anchor, as a picture: how many times the anchor each is.

use std::fmt::Write as _;

use super::style::{self, TOP, escape, wrapped};
use super::{Figures, Goal, Series, median, quartiles};

/// One bar.
struct Bar {
    label: Vec<String>,
    ratio: f64,
    /// Between which half of the pairs lie.
    spread: (f64, f64),
    /// A factor, if there is one.
    goal: Option<Goal>,
    /// Both medians: in a line of their own each where one line has no room for them.
    values: Vec<String>,
}

impl Figures {
    /// Draws every ratio as a bar, with the anchor as a line at 1 and the goal as a mark; SVG.
    pub fn picture(&self, title: &str, subtitle: &str) -> String {
        let bars: Vec<_> = self.series.iter().filter_map(|one| self.bar(one)).collect();
        let longest = bars.iter().map(|b| b.spread.1.max(b.ratio));
        let longest = longest.fold(1.25, f64::max).min(LONGEST);
        let scale = BAR_WIDTH / longest;
        let first = TOP + 22.0;
        let height = first + bars.iter().map(Bar::height).sum::<f64>() + 20.0;
        let mut svg = style::begin(title, subtitle, WIDTH, height);
        let anchor = LEFT + scale;
        _ = writeln!(
            svg,
            r##"<text x="{anchor:.1}" y="{:.1}" text-anchor="middle" class="faint">1.0 = the anchor</text>
<path d="M{anchor:.1} {:.1} V{:.1}" class="ink"/>
<path d="M{:.1} {:.1} h22" class="goal"/>
<text x="{:.1}" y="{:.1}" class="goaltext">goal</text>"##,
            TOP + 6.0,
            first - 8.0,
            height - 16.0,
            WIDTH - 88.0,
            TOP + 2.0,
            WIDTH - 60.0,
            TOP + 6.0,
        );
        let mut y = first;
        for bar in &bars {
            bar.draw(&mut svg, y, scale, longest);
            y += bar.height();
        }
        svg.push_str("</svg>\n");
        svg
    }

    fn bar(&self, series: &Series) -> Option<Bar> {
        let (anchor, goal) = series.goals.iter().find_map(|goal| match goal {
            Goal::Times(_, anchor) | Goal::AtLeast(_, anchor) => Some((*anchor, Some(*goal))),
            Goal::Beside(anchor) => Some((*anchor, None)),
            Goal::AtMost(_) | Goal::Plus(..) => None,
        })?;
        let ratios = self.pairs(series, anchor, |a, b| a / b);
        let beside = self.place(&series.what, &series.client, anchor)?;
        let client = match series.client.as_str() {
            "" => String::new(),
            version => format!(", Nix {version}"),
        };
        let ratio = median(&ratios);
        let one = |via: &str, series: &Series| {
            let median = series.unit.show(median(&series.samples));
            format!("{via} {median}")
        };
        let own = one(&series.via, series);
        let other = one(anchor, &self.series[beside]);
        let both = format!("{own}, {other}");
        let values = match both.chars().count() <= VALUES_CHARS {
            true => vec![both],
            false => [format!("{own},"), other]
                .iter()
                .flat_map(|part| wrapped(part, VALUES_CHARS))
                .collect(),
        };
        let bar = Bar {
            label: wrapped(&format!("{}{client}", series.what), LABEL_CHARS),
            ratio,
            spread: quartiles(&ratios),
            goal,
            values,
        };
        (ratio.is_finite() && series.via != anchor).then_some(bar)
    }
}

impl Bar {
    /// With the words beside it and the space below.
    fn height(&self) -> f64 {
        let lines = self.label.len() + self.values.len();
        (LINE * lines as f64 + 12.0).max(ROW_MIN)
    }

    /// Where the goal's mark stands, and on which side of it the bar is to end.
    fn mark(&self) -> Option<(&'static str, f64)> {
        match self.goal? {
            Goal::Times(bound, _) => Some(("≤", bound)),
            Goal::AtLeast(bound, _) => Some(("≥", bound)),
            Goal::AtMost(_) | Goal::Plus(..) | Goal::Beside(_) => None,
        }
    }

    fn draw(&self, svg: &mut String, y: f64, scale: f64, longest: f64) {
        let width = |ratio: f64| ratio.min(longest) * scale;
        let class = match self.goal {
            Some(goal) if goal.is_reached_by(self.ratio) => "good",
            Some(_) => "bad",
            None => "plain",
        };
        let label = self.label.iter().map(|line| (line, ""));
        let values = self.values.iter();
        let values = values.map(|line| (line, r##" class="faint small""##));
        for (place, (line, class)) in label.chain(values).enumerate() {
            let (y, line) = (y + 12.0 + LINE * place as f64, escape(line));
            _ = writeln!(svg, r##"<text x="20" y="{y:.1}"{class}>{line}</text>"##);
        }
        _ = writeln!(
            svg,
            r##"<rect x="{LEFT}" y="{:.1}" width="{:.1}" height="16" class="{class}"/>
<path d="M{:.1} {:.1} H{:.1}" class="ink"/>"##,
            y + 6.0,
            width(self.ratio),
            LEFT + width(self.spread.0),
            y + 14.0,
            LEFT + width(self.spread.1),
        );
        let mut end = width(self.ratio.max(self.spread.1));
        if let Some((_, goal)) = self.mark() {
            let x = LEFT + width(goal);
            _ = writeln!(svg, r##"<path d="M{x:.1} {y:.1} v28" class="goal"/>"##);
            end = end.max(width(goal));
        }
        // Not upon the anchor's line.
        let number_width = if self.goal.is_some() { 92.0 } else { 40.0 };
        if end < scale && end + number_width > scale {
            end = scale;
        }
        let goal = self.mark().map_or_else(String::new, |(sign, goal)| {
            format!(r##"<tspan class="goaltext" font-weight="normal">  {sign} {goal:.2}</tspan>"##)
        });
        _ = writeln!(
            svg,
            r##"<text x="{:.1}" y="{:.1}" class="strong" xml:space="preserve">{:.2}{goal}</text>"##,
            LEFT + end + 8.0,
            y + 18.0,
            self.ratio,
        );
    }
}

const WIDTH: f64 = 940.0;
const LEFT: f64 = 400.0;
const BAR_WIDTH: f64 = 400.0;
/// From one line of words to the next, and what a row takes at least.
const LINE: f64 = 14.0;
const ROW_MIN: f64 = 40.0;
/// What surely ends before the bars begin, in a wide font, too; the values are written smaller.
const LABEL_CHARS: usize = 56;
const VALUES_CHARS: usize = 61;
/// Longer bars are cut; their number tells.
const LONGEST: f64 = 4.0;
