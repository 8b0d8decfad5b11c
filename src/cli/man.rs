//! `muster man`: the manual pages.
//!
//! clap_mangen would fill what stands behind the options, examples and forms of JSON too, into one
//! paragraph; here it becomes sections of its own, with its lines as they are.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

/// Write the manual pages
///
/// With a directory, a page for each subcommand is written there; without one, the main page goes to
/// standard output: muster man | man -l -
#[derive(clap::Args, Debug)]
#[command(after_long_help = super::EXIT_STATUS)]
pub struct Args {
    /// Directory to write the pages to, such as /usr/local/share/man/man1
    #[arg(value_name = "DIR")]
    pub dir: Option<PathBuf>,
}

/// Writes the pages.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let definition = super::definition();
    let Some(dir) = &args.dir else {
        super::print(&String::from_utf8(page(&definition)?)?)?;
        return Ok(());
    };
    let written = fs::create_dir_all(dir).and_then(|()| write_pages(&definition, dir));
    written.with_context(|| format!("cannot write manual pages to {}", dir.display()))
}

fn write_pages(command: &clap::Command, dir: &Path) -> io::Result<()> {
    for below in command.get_subcommands() {
        write_pages(below, dir)?;
    }
    let name = clap_mangen::Man::new(command.clone()).get_filename();
    fs::write(dir.join(name), page(command)?)
}

fn page(command: &clap::Command) -> io::Result<Vec<u8>> {
    let extra = command.get_after_long_help().map(ToString::to_string);
    let rest = command.clone().after_long_help(None::<&'static str>);
    let mut page = Vec::new();
    let version = concat!("muster ", env!("CARGO_PKG_VERSION"));
    // Without a date; clap_mangen writes nothing for an empty one, and the rest would move up.
    let man = clap_mangen::Man::new(rest).date(" ");
    man.source(version).manual("Muster").render(&mut page)?;
    page.extend(sections(&extra.unwrap_or_default()).into_bytes());
    Ok(page)
}

/// Makes a section of each headline, which begins at the margin and has a colon.
fn sections(text: &str) -> String {
    let mut page = String::new();
    let mut verbatim = false;
    let mut fill = |page: &mut String, wanted: bool| {
        if verbatim != wanted {
            page.push_str(if wanted { ".nf\n" } else { ".fi\n" });
            verbatim = wanted;
        }
    };
    for line in text.lines() {
        match headline(line) {
            Some((title, rest)) => {
                fill(&mut page, false);
                page.push_str(&format!(".SH \"{}\"\n", title.to_uppercase()));
                if !rest.is_empty() {
                    page.push_str(&format!("{}\n", escaped(rest)));
                }
            }
            None if line.starts_with(' ') => {
                fill(&mut page, true);
                let line = line.strip_prefix("  ").unwrap_or(line);
                page.push_str(&format!("{}\n", escaped(line)));
            }
            None if line.is_empty() => {
                fill(&mut page, false);
                page.push_str(".PP\n");
            }
            None => {
                fill(&mut page, false);
                page.push_str(&format!("{}\n", escaped(line)));
            }
        }
    }
    fill(&mut page, false);
    page
}

/// Splits a headline into its title and what the line says beside it.
fn headline(line: &str) -> Option<(&str, &str)> {
    let title = TITLES.iter().find(|title| {
        let rest = line.strip_prefix(**title);
        rest.is_some_and(|rest| {
            rest.starts_with(':') || (rest.starts_with(' ') && rest.ends_with(':'))
        })
    })?;
    let rest = line.strip_prefix(title)?;
    Some((title, rest.trim_start_matches(':').trim()))
}

/// Has troff take a line as it is.
fn escaped(line: &str) -> String {
    let line = line.replace('\\', "\\e").replace('-', "\\-");
    match line.starts_with(['.', '\'']) {
        true => format!("\\&{line}"),
        false => line,
    }
}

/// The headlines of help texts.
const TITLES: [&str; 9] = [
    "Columns",
    "Environment",
    "Example",
    "Examples",
    "Exit status",
    "Files",
    "JSON",
    "Signals",
    "Who may sign",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_headline_is_a_section_and_lines_stay_as_they_are() {
        let text = "Examples:\n  muster --x\n    .dot\n\nJSON (--json), may grow:\n  { a }\n\nExit status: 0 or\n1.";
        let page = sections(text);
        let expected = ".SH \"EXAMPLES\"\n.nf\nmuster \\-\\-x\n  .dot\n.fi\n.PP\n\
                        .SH \"JSON\"\n(\\-\\-json), may grow:\n.nf\n{ a }\n.fi\n.PP\n\
                        .SH \"EXIT STATUS\"\n0 or\n1.\n";
        assert_eq!(page, expected);
        assert_eq!(escaped(".a\\b"), "\\&.a\\eb");
    }

    #[test]
    fn every_headline_of_every_help_text_is_known() {
        fn check(command: &clap::Command) {
            let extra = command.get_after_long_help().map(ToString::to_string);
            for line in extra.unwrap_or_default().lines() {
                let looks_like_one = !line.starts_with(' ') && line.ends_with(':');
                assert!(!looks_like_one || headline(line).is_some(), "{line:?}");
            }
            command.get_subcommands().for_each(check);
        }
        check(&super::super::definition());
    }
}
