//! The frame of a picture: colours for light and dark pages, title, and the words below it.

use std::fmt::Write as _;

/// A picture of so many pixels that has its frame, but no end yet.
pub(super) fn begin(title: &str, subtitle: &str, width: f64, height: f64) -> String {
    let title = escape(title);
    let mut svg = format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{title}">
{STYLE}
<rect class="page" x="0.5" y="0.5" width="{}" height="{}" rx="8"/>
<text x="20" y="32" class="title">{title}</text>
"##,
        width - 1.0,
        height - 1.0,
    );
    for (number, line) in wrapped(subtitle, LINE_CHARS).iter().take(2).enumerate() {
        _ = writeln!(
            svg,
            r##"<text x="20" y="{}" class="faint">{}</text>"##,
            52 + 16 * number,
            escape(line)
        );
    }
    svg
}

/// Where the frame ends, from above.
pub(super) const TOP: f64 = 84.0;

/// Words in lines of so many characters.
pub(super) fn wrapped(text: &str, chars_max: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= chars_max => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('"', "&quot;")
}

const LINE_CHARS: usize = 130;

const STYLE: &str = "<style>
  text { font: 12px system-ui, 'DejaVu Sans', Helvetica, Arial, sans-serif; fill: #24292f }
  .page { fill: #ffffff; stroke: #d0d7de }
  .title { font-size: 17px; font-weight: bold }
  .strong { font-weight: bold }
  .faint { fill: #57606a }
  .small { font-size: 11px }
  .axis { stroke: #8c959f; fill: none }
  .grid { stroke: #d8dee4; fill: none }
  .ink { stroke: #24292f; fill: none }
  .curve { stroke: #0969da; stroke-width: 2; fill: none }
  .point { fill: #0969da }
  .spread { stroke: #0969da; stroke-width: 6; opacity: 0.3 }
  .good { fill: #2da44e } .bad { fill: #cf222e } .plain { fill: #8c959f }
  .goal { stroke: #9a6700; stroke-width: 2; stroke-dasharray: 4 3; fill: none }
  .goaltext { fill: #9a6700 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .page { fill: #0d1117; stroke: #30363d }
    .faint { fill: #9198a1 }
    .axis { stroke: #6e7681 }
    .grid { stroke: #21262d }
    .ink { stroke: #e6edf3 }
    .curve, .spread { stroke: #58a6ff }
    .point { fill: #58a6ff }
    .good { fill: #3fb950 } .bad { fill: #f85149 } .plain { fill: #6e7681 }
    .goal { stroke: #d29922 } .goaltext { fill: #d29922 }
  }
</style>";
