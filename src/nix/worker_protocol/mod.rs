//! The worker protocol, which `nix-daemon` speaks: bytes to send, and what arriving bytes mean.
//!
//! It does no I/O: [`handshake::Handshake`] opens a session, [`request::Encoder`] writes
//! questions, [`session::Session`] turns the answers into events. It is not a server.
//!
//! ```text
//! client  0x6e697863 version                      features  0 0            request …
//! daemon                     0x6478696f version   features  nix-version trust  messages LAST   messages LAST reply …
//! ```
//!
//! Every number is 64-bit little-endian; a text is its length, its bytes and zeros up to a multiple
//! of 8; a list is its count and its items. Questions may follow each other without waiting, answers
//! come in the same order. Source: `worker-protocol.hh`, `worker-protocol-connection.cc` and
//! `daemon.cc` of Nix 2.3 to 2.35, and what daemons of 2.8, 2.26 and 2.34 sent.

use std::fmt;

#[doc(hidden)]
pub mod fuzz;
pub mod handshake;
pub mod message;
pub mod reply;
pub mod request;
pub mod session;
pub(in crate::nix) mod shape;
pub(in crate::nix) mod wire;

/// A protocol version, `<major>.<minor>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// Always 1 so far.
    pub major: u8,
    /// Grew with each change up to 38; since then features are named instead.
    pub minor: u8,
}

/// What a daemon told of itself, and what both sides agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The version that is spoken: the lower of the daemon's and ours.
    pub version: Version,
    /// The daemon's Nix version, as it says from protocol 1.33 on; at most 200 characters.
    pub nix_version: Option<String>,
    /// Whether the daemon trusts us, as it says from protocol 1.35 on.
    pub trusted: Option<bool>,
    /// Whether both sides name realisations by derivation path (Nix 2.35), not by hash.
    pub build_traces: bool,
}

/// Bytes that break the protocol; the session cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// A text, list or message is longer than its bound.
    #[error("{what} of {length} is longer than the bound of {max}")]
    TooLong {
        /// Which.
        what: &'static str,
        /// Its length: bytes of a text or message, items of a list.
        length: u64,
        /// The bound.
        max: u64,
    },
    /// A number or text is not one of those that may stand there.
    #[error("unexpected {what} {value:#x}")]
    Unexpected {
        /// What was read.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// The daemon spoke without having been asked.
    #[error("an answer without a question")]
    Unasked,
    /// The daemon gave up and said why.
    #[error("the daemon gave up: {0}")]
    GaveUp(String),
    /// The bytes after `NarFromPath` are no NAR of the size that was promised.
    #[error("NAR of {promised} bytes: {error}")]
    Nar {
        /// Size that the path info names.
        promised: u64,
        /// What is wrong.
        error: super::nar::NarError,
    },
    /// The NAR is complete, but shorter than promised.
    #[error("NAR of {actual} bytes, {promised} were promised")]
    NarSize {
        /// Size that the path info names.
        promised: u64,
        /// Size of what came.
        actual: u64,
    },
    /// The daemon reported an error in the middle of a NAR.
    #[error("the NAR was cut: {0}")]
    NarCut(String),
    /// The session broke before; nothing more can be read from it.
    #[error("the session is over")]
    Over,
}

impl Version {
    /// The version that we speak.
    pub const OURS: Self = Self::new(1, 38);
    /// The oldest that we understand: Nix 2.0.
    pub const MINIMUM: Self = Self::new(1, 18);

    /// Makes a version.
    pub const fn new(major: u8, minor: u8) -> Self {
        Self { major, minor }
    }

    fn from_wire(word: u64) -> Self {
        let [minor, major, ..] = word.to_le_bytes();
        Self { major, minor }
    }

    fn to_wire(self) -> u64 {
        u64::from(self.major) << 8 | u64::from(self.minor)
    }

    /// Tells whether version 1.`minor` is spoken or a later one.
    fn has(self, minor: u8) -> bool {
        self.minor >= minor
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl fmt::Display for Peer {
    /// Names the daemon for people: `Nix 2.34.8, protocol 1.38`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(nix_version) = &self.nix_version {
            write!(f, "Nix {nix_version}, ")?;
        }
        write!(f, "protocol {}", self.version)
    }
}

/// Longest text that is read, in bytes: error texts and log lines are the longest.
const TEXT_BYTES_MAX: u64 = 4 << 20;

/// Longest message or reply that is kept in memory, in bytes: some 200,000 references.
const MESSAGE_BYTES_MAX: u64 = 16 << 20;
