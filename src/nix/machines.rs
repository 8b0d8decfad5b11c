//! The machines file, `/etc/nix/machines`: the builders that Nix hands work to.
//!
//! ```text
//! config  = line *( LF line )          line  = [entries] [ "#" comment ]
//! entries = entry *( ";" entry )       entry = "@" path  |  uri *( blanks column )
//!
//! 1 store URI   2 systems   3 ssh key   4 max jobs   5 speed factor
//! 6 supported features   7 mandatory features   8 host key (base64)      "-": the default
//! ```
//!
//! No quoting, no escapes; blanks are space, tab, CR. It is read by the rules of Nix 2.29 and later;
//! where an older Nix reads a line otherwise, a warning says so. A bad line is reported and the rest
//! used, while Nix refuses the whole file. Files are read by the caller: nothing is opened here.
//! Source: `libstore/machines.cc` of Nix 2.8 to 2.36, and what 2.8 was seen to do.

mod builder;
mod error;
mod line;

use std::collections::BTreeSet;
use std::sync::Arc;

pub use builder::Builder;
pub use error::{Cause, Column, MachinesError, MachinesWarning, Place, Quirk};

use super::store_uri::{self, StoreUri};

/// What a machines file says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Machines {
    /// The machines in the order of their lines.
    pub machines: Vec<Machine>,
    /// Lines that are left out.
    pub errors: Vec<MachinesError>,
    /// Lines that some Nix reads otherwise.
    pub warnings: Vec<MachinesWarning>,
}

/// One entry of the file. The columns for ssh are in the URI's settings, where they win over its own.
#[derive(Clone, Debug, PartialEq)]
pub struct Machine {
    /// Where it stands.
    pub place: Place,
    /// The entry as it was written, without blanks around it.
    pub raw: String,
    /// How the machine's store is reached.
    pub uri: StoreUri,
    /// What it builds for.
    pub systems: Systems,
    /// Jobs that it takes at once; with 0 it is given none, and may still have been given some before.
    pub max_jobs: u32,
    /// Speed compared to other machines; above 0.
    pub speed: f32,
    /// Features that jobs may ask for, without those of `mandatory`.
    pub supported: BTreeSet<String>,
    /// Features that each job must ask for.
    pub mandatory: BTreeSet<String>,
}

/// The systems that a machine builds for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Systems {
    /// The system of the machine that reads the file.
    Local,
    /// These; none at all when the column is a lone comma.
    Listed(BTreeSet<String>),
}

/// Reads the text of an included file, by its path as it was written; `None`: there is no such file.
pub type ReadInclude<'r> = dyn FnMut(&str) -> Result<Option<String>, String> + 'r;

impl Machines {
    /// Reads the text of the file that is called `origin` in messages.
    ///
    /// Each text may have 1 MiB, and includes may nest 10 deep and be 100 in all.
    pub fn parse(text: &str, origin: &str, read_include: &mut ReadInclude<'_>) -> Self {
        let mut reader = Reader {
            read_include,
            found: Self::default(),
            open: vec![origin.to_owned()],
            includes: 0,
        };
        reader.text(text, origin);
        reader.found
    }

    /// Returns the whole only if there is no bad line, as Nix itself does.
    pub fn strict(self) -> Result<Self, Vec<MachinesError>> {
        if self.errors.is_empty() {
            Ok(self)
        } else {
            Err(self.errors)
        }
    }

    /// Returns each store once, in the order of first appearance.
    pub fn builders(&self) -> Vec<Builder> {
        builder::merge(&self.machines)
    }
}

struct Reader<'r, 'f> {
    read_include: &'r mut ReadInclude<'f>,
    found: Machines,
    /// The files being read, the outermost first.
    open: Vec<String>,
    includes: usize,
}

impl Reader<'_, '_> {
    fn text(&mut self, text: &str, origin: &str) {
        let origin: Arc<str> = origin.into();
        if text.len() > TEXT_BYTES_MAX {
            let place = Place::new(&origin, 1, 1);
            self.found.errors.push(MachinesError::TooLarge { place });
            return;
        }
        for (number, line) in text.split('\n').enumerate() {
            self.warn_of_old_reading(line, &origin, number + 1);
            let content = line.split('#').next().unwrap_or_default();
            let mut at = 0;
            for entry in content.split(';') {
                let indent = entry.len() - entry.trim_start_matches(BLANKS).len();
                let entry_at = at + indent;
                at += entry.len() + 1;
                let entry = entry.trim_matches(BLANKS);
                let place = Place::new(&origin, number + 1, chars_before(line, entry_at) + 1);
                match entry.strip_prefix('@') {
                    _ if entry.is_empty() => {}
                    Some(path) => self.include(path.trim_start_matches(BLANKS), place),
                    None => self.machine(entry, place),
                }
            }
        }
    }

    fn machine(&mut self, entry: &str, place: Place) {
        match line::parse(entry, &place, &mut self.found.warnings) {
            Ok(machine) => self.found.machines.push(machine),
            Err(error) => self.found.errors.push(error),
        }
    }

    fn include(&mut self, path: &str, place: Place) {
        if let Err(reason) = self.try_include(path) {
            self.found.errors.push(MachinesError::Include {
                place,
                path: path.to_owned(),
                reason,
            });
        }
    }

    fn try_include(&mut self, path: &str) -> Result<(), String> {
        if path.is_empty() {
            return Err("no path follows '@'".to_owned());
        }
        if self.open.iter().any(|open| open == path) {
            return Err("the file includes itself".to_owned());
        }
        if self.open.len() > DEPTH_MAX {
            return Err(format!("includes nest more than {DEPTH_MAX} deep"));
        }
        if self.includes == INCLUDES_MAX {
            return Err(format!("there are more than {INCLUDES_MAX} includes"));
        }
        self.includes += 1;
        if let Some(text) = (self.read_include)(path)? {
            self.open.push(path.to_owned());
            self.text(&text, path);
            self.open.pop();
        }
        Ok(())
    }

    /// Before 2.29 a line was cut at `;` before the comment was taken off, and blanks stayed.
    fn warn_of_old_reading(&mut self, line: &str, origin: &Arc<str>, number: usize) {
        let comment = line.find('#').unwrap_or(line.len());
        let mut at = 0;
        for piece in line.split(';') {
            let start = at;
            at += piece.len() + 1;
            let old = piece.split('#').next().unwrap_or_default();
            let trimmed = old.trim_matches(BLANKS);
            let quirk = if old.is_empty() {
                continue;
            } else if trimmed.is_empty() {
                Quirk::BlankEntry
            } else if start > comment {
                Quirk::EntryInComment(trimmed.to_owned())
            } else if trimmed.starts_with('@') && !old.starts_with('@') {
                Quirk::IndentedInclude
            } else {
                continue;
            };
            let place = Place::new(origin, number, chars_before(line, start) + 1);
            self.found.warnings.push(MachinesWarning { place, quirk });
        }
    }
}

/// Reads any bytes and checks what always holds; for fuzzing.
///
/// Every error and warning names a line of the text, every machine's entry stands there, and its URI
/// is one that can be written and read again.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let mut include = |path: &str| match path {
        "self" | "other" => Ok(Some(text.to_string())),
        "unreadable" => Err("permission denied".to_owned()),
        _ => Ok(None),
    };
    let found = Machines::parse(&text, "self", &mut include);
    let places = found.machines.iter().map(|m| &m.place);
    let places = places.chain(found.errors.iter().map(MachinesError::place));
    for place in places.chain(found.warnings.iter().map(|w| &w.place)) {
        let line = text
            .split('\n')
            .nth(place.line - 1)
            .expect("the line is there");
        assert!(place.line >= 1 && place.at >= 1);
        assert!(place.at <= line.chars().count() + 1, "{place}");
    }
    for machine in &found.machines {
        let line = text.split('\n').nth(machine.place.line - 1);
        assert!(line.is_some_and(|line| line.contains(&machine.raw)));
        assert!(machine.speed > 0.0 && machine.speed.is_finite());
        store_uri::fuzz(machine.uri.to_string().as_bytes());
    }
    assert!(found.builders().len() <= found.machines.len());
    for error in &found.errors {
        assert!(error.to_string().contains(&error.place().to_string()));
    }
}

fn chars_before(line: &str, byte: usize) -> usize {
    line.char_indices().take_while(|(at, _)| *at < byte).count()
}

/// What Nix takes for blanks; LF ends the line before.
const BLANKS: [char; 3] = [' ', '\t', '\r'];

const TEXT_BYTES_MAX: usize = 1 << 20;
const DEPTH_MAX: usize = 10;
const INCLUDES_MAX: usize = 100;
