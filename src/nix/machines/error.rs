//! What can be wrong with a machines file, and where.

use std::fmt;
use std::sync::Arc;

use crate::nix::host_key::HostKeyError;
use crate::nix::store_uri::StoreUriError;

/// A place in a text; line and character count from 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The file, as it is called.
    pub origin: Arc<str>,
    /// The line.
    pub line: usize,
    /// The character in the line.
    pub at: usize,
}

/// A column of a machine's line; they count from 1, while Nix's own messages count from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the variants are the columns' own names")]
pub enum Column {
    Uri = 1,
    Systems,
    SshKey,
    MaxJobs,
    Speed,
    Supported,
    Mandatory,
    HostKey,
}

/// An entry that is left out; Nix itself refuses the whole file for it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MachinesError {
    /// A column's value is not what it must be.
    #[error("{place}: column {number} ({column}): {cause}", number = *column as usize)]
    Column {
        /// Where the value stands.
        place: Place,
        /// Its column.
        column: Column,
        /// What is wrong with it.
        #[source]
        cause: Cause,
    },
    /// An include cannot be followed.
    #[error("{place}: cannot include {path:?}: {reason}")]
    Include {
        /// Where it stands.
        place: Place,
        /// The path, as it was written.
        path: String,
        /// Why.
        reason: String,
    },
    /// The file is larger than any machines file.
    #[error("{place}: the file has more than 1 MiB")]
    TooLarge {
        /// Its first line.
        place: Place,
    },
}

/// What is wrong with a value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Cause {
    /// The first column is `-`.
    #[error("the store URI cannot be left out")]
    NoUri,
    /// The store URI cannot be one.
    #[error(transparent)]
    Uri(#[from] StoreUriError),
    /// The URI names no store that could be asked.
    #[error("{0:?} is no kind of store that can be asked; ssh-ng, ssh, unix and daemon are")]
    Scheme(String),
    /// The number of jobs is none.
    #[error("{0:?} is not a whole number from 0 to 4294967295")]
    MaxJobs(String),
    /// The speed is none.
    #[error("{0:?} is not a number that is 0 or more")]
    Speed(String),
    /// The host key cannot be one.
    #[error(transparent)]
    HostKey(#[from] HostKeyError),
}

/// An entry that some versions of Nix read otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachinesWarning {
    /// Where it stands.
    pub place: Place,
    /// The difference.
    pub quirk: Quirk,
}

/// A difference between versions of Nix, or a value of no use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Quirk {
    /// What follows `;` in a comment was an entry.
    EntryInComment(String),
    /// Blanks alone between two `;`, or on a line, were an error.
    BlankEntry,
    /// An include with blanks before it was taken for a machine.
    IndentedInclude,
    /// The speed factor had to be a whole number.
    FractionalSpeed(String),
    /// A port was taken for a part of the host's name.
    Port(u16),
    /// An IPv6 address without brackets was refused.
    BareIpv6,
    /// The ssh key has to be an absolute path.
    RelativeSshKey(String),
    /// The host key is not `TYPE KEY COMMENT`.
    HostKeyForm,
}

impl Place {
    pub(super) fn new(origin: &Arc<str>, line: usize, at: usize) -> Self {
        let origin = Arc::clone(origin);
        Self { origin, line, at }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.origin, self.line, self.at)
    }
}

impl fmt::Display for Column {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Uri => "store URI",
            Self::Systems => "systems",
            Self::SshKey => "ssh key",
            Self::MaxJobs => "max jobs",
            Self::Speed => "speed factor",
            Self::Supported => "supported features",
            Self::Mandatory => "mandatory features",
            Self::HostKey => "host key",
        })
    }
}

impl MachinesError {
    /// Returns where it is.
    pub fn place(&self) -> &Place {
        match self {
            Self::Column { place, .. } | Self::Include { place, .. } | Self::TooLarge { place } => {
                place
            }
        }
    }
}

impl fmt::Display for MachinesWarning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.quirk)
    }
}

impl fmt::Display for Quirk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::EntryInComment(text) => {
                write!(
                    f,
                    "Nix before 2.29 reads {text:?} in the comment as an entry"
                )
            }
            Self::BlankEntry => {
                f.write_str("Nix before 2.29 refuses the file for blanks without an entry")
            }
            Self::IndentedInclude => {
                f.write_str("Nix before 2.29 takes an include with blanks before it for a machine")
            }
            Self::FractionalSpeed(speed) => {
                write!(
                    f,
                    "Nix before 2.20 refuses the file for the speed factor {speed:?}"
                )
            }
            Self::Port(port) => write!(
                f,
                "Nix before 2.31 takes :{port} for a part of the host's name; \
                 a Port line in ssh_config works for all"
            ),
            Self::BareIpv6 => f.write_str("Nix 2.31 refuses an IPv6 address without brackets"),
            Self::RelativeSshKey(path) => {
                write!(
                    f,
                    "Nix from 2.35 refuses the ssh key {path:?}: it must be an absolute path"
                )
            }
            Self::HostKeyForm => f.write_str(
                "the host key is not of the form \"TYPE KEY COMMENT\": ssh will refuse every host",
            ),
        }
    }
}
