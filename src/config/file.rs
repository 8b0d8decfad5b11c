//! The configuration file: reading it, and where its errors are.

use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use super::error::Error;
use super::raw::RawConfig;

/// A configuration file that was read.
#[derive(Clone, Debug)]
pub struct ConfigFile {
    path: PathBuf,
    text: String,
}

/// A line of a configuration file, and a character in it where that is known; both count from 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub path: PathBuf,
    /// The line.
    pub line: usize,
    /// The character.
    pub at: Option<usize>,
}

impl ConfigFile {
    /// Reads a file of at most 1 MiB.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let read = |source| Error::Read {
            path: path.to_owned(),
            source,
        };
        let text = read_text(path).map_err(read)?;
        let path = path.to_owned();
        Ok(Self { path, text })
    }

    /// Reads what the file says: JSON if it begins with a brace, else TOML.
    pub fn parse(&self) -> Result<RawConfig, Error> {
        let json = self.text.trim_start().starts_with('{');
        if json {
            serde_json::from_str(&self.text).map_err(|error| {
                let message = error.to_string();
                let end = message.rfind(" at line ").unwrap_or(message.len());
                let message = message.split_at_checked(end).map_or("", |(start, _)| start);
                let place = self.place(error.line().max(1), Some(error.column().max(1)));
                Error::in_file(place, message)
            })
        } else {
            toml::from_str(&self.text).map_err(|error| {
                let start = error.span().map_or(0, |span| span.start);
                let before = self.text.get(..start).unwrap_or_default();
                let line = before.matches('\n').count() + 1;
                let at = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
                Error::in_file(self.place(line, Some(at)), error.message())
            })
        }
    }

    /// Finds the first line outside of comments that holds a text, for errors found after reading.
    pub fn locate(&self, needle: &str) -> Option<Place> {
        let holds = |line: &str| line.contains(needle) && !line.trim_start().starts_with('#');
        let line = self.text.lines().position(holds)?;
        Some(self.place(line + 1, None))
    }

    /// Returns the file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn place(&self, line: usize, at: Option<usize>) -> Place {
        let path = self.path.clone();
        Place { path, line, at }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.path.display(), self.line)?;
        match self.at {
            Some(at) => write!(f, ":{at}"),
            None => Ok(()),
        }
    }
}

/// Reads a text of at most 1 MiB; bytes that are no UTF-8 are replaced, they may be in comments.
pub(super) fn read_text(path: &Path) -> io::Result<String> {
    let mut bytes = Vec::new();
    File::open(path)?
        .take(TEXT_BYTES_MAX + 1)
        .read_to_end(&mut bytes)?;
    if bytes.len() as u64 > TEXT_BYTES_MAX {
        let message = "it has more than 1 MiB";
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

const TEXT_BYTES_MAX: u64 = 1 << 20;
