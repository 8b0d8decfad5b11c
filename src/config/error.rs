//! Why a configuration cannot be used: each error is the operator's to mend, and says how.

use std::fmt;
use std::io;
use std::path::PathBuf;

use super::file::Place;
use super::keys::KeyFileError;

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The configuration file is neither TOML nor JSON, or a value is not what it must be.
    #[error("{place}: {message}")]
    Malformed {
        /// Where.
        place: Place,
        /// What is wrong.
        message: String,
    },
    /// A key that does not exist.
    #[error("{place}: unknown key {key:?}; {remedy}")]
    UnknownKey {
        /// Where.
        place: Place,
        /// The key.
        key: String,
        /// What was meant, or what there is.
        remedy: String,
    },
    /// A value that does not fit with others.
    #[error("{at}{key}: {message}")]
    Value {
        /// Where, if it is in a file.
        at: At,
        /// The key.
        key: &'static str,
        /// What is wrong.
        message: String,
    },
    /// A key file cannot be used.
    #[error("{at}cannot use a signing key")]
    Key {
        /// Where it is named, if in a file.
        at: At,
        /// Why.
        #[source]
        cause: Box<KeyFileError>,
    },
    /// The machines file that was asked for cannot be read.
    #[error("{at}cannot read the machines file {}; name another with --machines, or none with --no-machines", path.display())]
    Machines {
        /// Where it is named, if in a file.
        at: At,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The start of a message about a value: its place in a file, or nothing for a flag.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct At(pub Option<Place>);

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(place) => write!(f, "{place}: "),
            None => Ok(()),
        }
    }
}

impl Error {
    /// Takes a message of serde; one about an unknown key gets a remedy.
    pub(super) fn in_file(place: Place, message: &str) -> Self {
        // unknown field `a`, expected one of `b`, `c`
        let mut quoted = message.split('`').skip(1).step_by(2);
        match quoted.next() {
            Some(key) if message.starts_with("unknown field ") => {
                let known: Vec<_> = quoted.collect();
                Self::UnknownKey {
                    place,
                    key: key.to_owned(),
                    remedy: remedy(key, &known),
                }
            }
            _ => Self::Malformed {
                place,
                message: message.replace('\n', " "),
            },
        }
    }
}

/// Says which of the known words was meant, or lists them.
pub(super) fn remedy(word: &str, known: &[&str]) -> String {
    match suggest(word, known) {
        Some(meant) => format!("did you mean {meant:?}?"),
        None => format!("there are: {}", known.join(", ")),
    }
}

/// Finds the known word that a misspelt one meant.
pub(super) fn suggest<'k>(word: &str, known: &[&'k str]) -> Option<&'k str> {
    let word = word.to_ascii_lowercase().replace('_', "-");
    let nearest = known.iter().min_by_key(|known| distance(&word, known))?;
    if distance(&word, nearest) <= word.chars().count().div_ceil(3) {
        return Some(nearest);
    }
    // `listen-address` for `listen`, `ttl` for `negative-ttl`.
    let first = |text: &str| text.split('-').next().unwrap_or_default().to_owned();
    let mut related = known
        .iter()
        .filter(|k| first(k) == first(&word) || k.contains(&word));
    related.next().filter(|_| related.next().is_none()).copied()
}

/// Counts the insertions, removals and changes that turn one word into the other.
fn distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (done, c) in from.chars().take(WORD_CHARS_MAX).enumerate() {
        let mut diagonal = row[0];
        row[0] = done + 1;
        for (at, other) in to.iter().enumerate() {
            let changed = diagonal + usize::from(c != *other);
            diagonal = row[at + 1];
            row[at + 1] = changed.min(row[at] + 1).min(diagonal + 1);
        }
    }
    row[to.len()]
}

/// Longer words are no misspelt keys.
const WORD_CHARS_MAX: usize = 100;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn misspelt_words_are_recognised() {
        let known = [
            "listen",
            "upstreams",
            "negative-ttl",
            "max-encoders",
            "max-connections",
        ];
        for (word, meant) in [
            ("listn", Some("listen")),
            ("Listen", Some("listen")),
            ("listen-adress", Some("listen")),
            ("upstream", Some("upstreams")),
            ("negative_ttl", Some("negative-ttl")),
            ("ttl", Some("negative-ttl")),
            ("max-conections", Some("max-connections")),
            ("max", None),
            ("colour", None),
        ] {
            assert_eq!(suggest(word, &known), meant, "{word}");
        }
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("", "ab"), 2);
        assert_eq!(distance("ab", ""), 2);
    }
}
