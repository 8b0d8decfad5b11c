//! The serve protocol, which `nix-store --serve` speaks: bytes to send, and what arriving bytes mean.
//!
//! It does no I/O: [`handshake::Handshake`] opens a session, [`request::Encoder`] writes questions,
//! [`session::Session`] turns the answers into events. It is not a server, and it cannot look a path
//! up by its hash part: what it is good for is a whole closure in two round trips.
//!
//! ```text
//! client  0x390c9deb version                      7 false (paths)          2 (paths)
//! server                      0x5452eecb version            (closure)        { path info } ""
//! ```
//!
//! Numbers, texts and lists are the worker protocol's; there are no messages and no error frames: a
//! server that fails says why on its error output and ends. Source: `serve-protocol.hh`,
//! `serve-protocol.cc`, `serve-protocol-connection.cc` and `opServe` in `nix-store.cc` of Nix 2.3 to
//! 2.35, and what 2.8, 2.26 and 2.34 sent.

use std::fmt;

#[doc(hidden)]
pub mod fuzz;
pub mod handshake;
pub mod request;
pub mod session;

/// A protocol version, `2.<minor>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// Always 2 so far.
    pub major: u8,
    /// 7 since Nix 2.4, 8 since Nix 2.35.
    pub minor: u8,
}

impl Version {
    /// The version that we speak. What 8 changed (realisations) is not asked for.
    pub const OURS: Self = Self::new(2, 8);
    /// The oldest that is of use: before, path infos came without NAR hash.
    pub const MINIMUM: Self = Self::new(2, 4);

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
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}
