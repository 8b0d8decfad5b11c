//! Text for a terminal: tables, indented words, and colour where somebody looks at it.
//!
//! A terminal's lines are kept to its width. Elsewhere nothing is cut or wrapped, so that `grep` finds it.

use std::fmt::Write as _;
use std::io::{self, IsTerminal as _};

/// A page that is being written.
pub(super) struct Page {
    text: String,
    colour: bool,
    /// Columns of the terminal; `None`: it is no terminal.
    width: Option<usize>,
}

/// How a word is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tone {
    Plain,
    Good,
    Doubtful,
    Bad,
    Faint,
    Heading,
}

/// One field of a table.
pub(super) struct Cell {
    text: String,
    tone: Tone,
}

/// A table whose columns are as wide as their widest field.
pub(super) struct Table {
    alignments: Vec<Alignment>,
    rows: Vec<Row>,
}

/// Where the text of a column stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Alignment {
    Left,
    Right,
}

enum Row {
    Cells(Vec<Cell>),
    /// Words below the row before.
    Remark(String, Tone),
}

impl Page {
    /// Begins a page for standard output.
    pub(super) fn for_stdout() -> Self {
        let terminal = io::stdout().is_terminal();
        let width = rustix::termios::tcgetwinsize(io::stdout());
        Self {
            text: String::new(),
            colour: terminal && std::env::var_os("NO_COLOR").is_none(),
            width: terminal.then(|| match width {
                Ok(size) if size.ws_col > 0 => usize::from(size.ws_col).max(WIDTH_MIN),
                _ => WIDTH_DEFAULT,
            }),
        }
    }

    /// Writes a line, wrapped with this indent.
    pub(super) fn line(&mut self, indent: usize, text: &str, tone: Tone) {
        self.item(indent, indent, text, tone);
    }

    /// Writes a line whose further lines, where it must be wrapped, have another indent.
    pub(super) fn item(&mut self, indent: usize, further: usize, text: &str, tone: Tone) {
        let room = self
            .width
            .map(|width| width.saturating_sub(further.max(indent)));
        for (place, line) in wrapped(text, room).into_iter().enumerate() {
            let indent = if place == 0 { indent } else { further };
            let painted = self.painted(&line, tone);
            _ = writeln!(self.text, "{:indent$}{painted}", "");
        }
    }

    /// Writes an empty line.
    pub(super) fn gap(&mut self) {
        self.text.push('\n');
    }

    /// Writes a table; its first column gives way where the terminal is too narrow.
    pub(super) fn table(&mut self, table: &Table) {
        let widths = table.widths(self.width);
        for row in &table.rows {
            match row {
                Row::Remark(text, tone) => self.line(REMARK_INDENT, text, *tone),
                Row::Cells(cells) => {
                    let line = self.row(cells, &table.alignments, &widths);
                    self.text.push_str(line.trim_end());
                    self.text.push('\n');
                }
            }
        }
    }

    /// Returns what was written.
    pub(super) fn into_text(self) -> String {
        self.text
    }

    fn row(&self, cells: &[Cell], alignments: &[Alignment], widths: &[usize]) -> String {
        let mut line = String::new();
        for (place, cell) in cells.iter().enumerate() {
            let width = widths.get(place).copied().unwrap_or_default();
            let text = elided(&cell.text, width);
            let room = width.saturating_sub(text.chars().count());
            let right = alignments.get(place) == Some(&Alignment::Right);
            let (before, after) = if right { (room, 0) } else { (0, room) };
            let gap = if place == 0 { 0 } else { COLUMN_GAP };
            let painted = self.painted(&text, cell.tone);
            _ = write!(line, "{0:1$}{painted}{0:2$}", "", gap + before, after);
        }
        line
    }

    fn painted(&self, text: &str, tone: Tone) -> String {
        let code = match tone {
            Tone::Plain => return text.to_owned(),
            Tone::Good => "32",
            Tone::Doubtful => "33",
            Tone::Bad => "1;31",
            Tone::Faint => "2",
            Tone::Heading => "1",
        };
        match self.colour && !text.is_empty() {
            true => format!("\x1b[{code}m{text}\x1b[0m"),
            false => text.to_owned(),
        }
    }
}

impl Cell {
    /// Makes a field.
    pub(super) fn new(text: impl Into<String>, tone: Tone) -> Self {
        let text: String = text.into();
        // What a server says must not steer the terminal.
        let text = text.chars().filter(|c| !c.is_control()).collect();
        Self { text, tone }
    }

    /// Makes a plain field.
    pub(super) fn plain(text: impl Into<String>) -> Self {
        Self::new(text, Tone::Plain)
    }
}

impl Table {
    /// Begins a table with its headings.
    pub(super) fn new(columns: &[(&str, Alignment)]) -> Self {
        let headings = columns
            .iter()
            .map(|(name, _)| Cell::new(*name, Tone::Heading));
        Self {
            rows: vec![Row::Cells(headings.collect())],
            alignments: columns.iter().map(|(_, alignment)| *alignment).collect(),
        }
    }

    /// Adds a row.
    pub(super) fn row(&mut self, cells: Vec<Cell>) {
        self.rows.push(Row::Cells(cells));
    }

    /// Adds words below the last row.
    pub(super) fn remark(&mut self, text: impl Into<String>, tone: Tone) {
        self.rows.push(Row::Remark(text.into(), tone));
    }

    fn widths(&self, width: Option<usize>) -> Vec<usize> {
        let mut widths = vec![0; self.alignments.len()];
        for row in &self.rows {
            let Row::Cells(cells) = row else { continue };
            for (width, cell) in widths.iter_mut().zip(cells) {
                *width = cell.text.chars().count().max(*width);
            }
        }
        let gaps = COLUMN_GAP * widths.len().saturating_sub(1);
        let total = widths.iter().sum::<usize>() + gaps;
        if let (Some(width), Some(first)) = (width, widths.first_mut()) {
            let surplus = total.saturating_sub(width);
            *first = first
                .saturating_sub(surplus)
                .max(FIRST_WIDTH_MIN.min(*first));
        }
        widths
    }
}

/// Cuts the middle out of a text that is too long.
fn elided(text: &str, width: usize) -> String {
    let length = text.chars().count();
    if length <= width {
        return text.to_owned();
    }
    let kept = width.saturating_sub(1);
    let end = kept * 2 / 3;
    let start = text.chars().take(kept - end);
    start
        .chain(['…'])
        .chain(text.chars().skip(length - end))
        .collect()
}

/// Breaks a text at blanks and line ends; words longer than a line stay whole.
fn wrapped(text: &str, width: Option<usize>) -> Vec<String> {
    let mut lines = Vec::new();
    for paragraph in text.lines() {
        let paragraph: String = paragraph.chars().filter(|c| !c.is_control()).collect();
        let Some(width) = width else {
            lines.push(paragraph);
            continue;
        };
        let mut line = String::new();
        for word in paragraph.split(' ') {
            let longer = line.chars().count() + 1 + word.chars().count();
            if !line.is_empty() && longer > width {
                lines.push(std::mem::take(&mut line));
            } else if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
        lines.push(line);
    }
    lines
}

const WIDTH_DEFAULT: usize = 80;
const WIDTH_MIN: usize = 40;
const COLUMN_GAP: usize = 2;
const REMARK_INDENT: usize = 4;
const FIRST_WIDTH_MIN: usize = 12;

#[cfg(test)]
mod tests {
    use super::*;

    fn page(width: Option<usize>, colour: bool) -> Page {
        Page {
            text: String::new(),
            colour,
            width,
        }
    }

    fn table() -> Table {
        let mut table = Table::new(&[("NAME", Alignment::Left), ("SIZE", Alignment::Right)]);
        let name = Cell::plain("ssh-ng://somebody@a-builder.example.org");
        table.row(vec![name, Cell::new("7 B", Tone::Bad)]);
        table.remark("words that go below the row they are about", Tone::Faint);
        table
    }

    #[test]
    fn nothing_is_cut_where_there_is_no_terminal() {
        let mut page = page(None, false);
        page.table(&table());
        let expected = "NAME                                     SIZE\n\
                        ssh-ng://somebody@a-builder.example.org   7 B\n    \
                        words that go below the row they are about\n";
        assert_eq!(page.into_text(), expected);
    }

    #[test]
    fn a_narrow_terminal_is_kept_to() {
        let mut page = page(Some(40), true);
        page.table(&table());
        let text = page.into_text();
        assert!(text.contains("\x1b[1;31m7 B\x1b[0m"), "{text:?}");
        let bare = regex_lite::Regex::new("\x1b\\[[0-9;]*m").unwrap();
        for line in bare.replace_all(&text, "").lines() {
            assert!(line.chars().count() <= 40, "{line:?}");
        }
        assert!(text.contains('…'));
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        let mut page = page(Some(80), false);
        page.line(0, "a\x1b[2Jb", Tone::Plain);
        assert_eq!(page.into_text(), "a[2Jb\n");
    }
}
