//! How a session opens: a magic word and a version each way, in one round trip.
//!
//! Source: `BasicClientConnection::handshake` in `serve-protocol-connection.cc`.

use bytes::{Buf as _, BytesMut};

use super::Version;
use crate::nix::worker_protocol::message;
use crate::nix::worker_protocol::wire::{Reader, Writer};

/// Why no session opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// The peer's first bytes are not those of `nix-store --serve`; what it said, made plain.
    #[error("what answers is not nix-store --serve; it says {0:?}")]
    NotServing(String),
    /// The server is older than Nix 2.0: its path infos have no NAR hash.
    #[error("nix-store --serve speaks protocol {0}, which is too old: at least 2.4 is needed")]
    TooOld(Version),
    /// The server speaks another major version.
    #[error("nix-store --serve speaks protocol {0}, only 2.x is understood")]
    TooNew(Version),
}

/// The opening of a session.
#[derive(Clone, Copy, Debug)]
pub struct Handshake(());

impl Handshake {
    /// Begins a session: appends our greeting to `out`.
    pub fn begin(out: &mut BytesMut) -> Self {
        let mut out = Writer(out);
        out.number(CLIENT_MAGIC);
        out.number(Version::OURS.to_wire());
        Self(())
    }

    /// Reads the server's greeting and returns the version that both speak.
    ///
    /// `None`: more input is needed. Afterwards, what is left in `input` is the session's.
    pub fn proceed(&self, input: &mut BytesMut) -> Result<Option<Version>, HandshakeError> {
        let mut reader = Reader(input);
        let Ok(magic) = reader.number() else {
            return Ok(None);
        };
        if magic != SERVER_MAGIC {
            return Err(not_serving(input));
        }
        let Ok(word) = reader.number() else {
            return Ok(None);
        };
        let version = Version::from_wire(word);
        if word > u64::from(u16::MAX) || version.major > Version::OURS.major {
            return Err(HandshakeError::TooNew(version));
        }
        if version < Version::MINIMUM {
            return Err(HandshakeError::TooOld(version));
        }
        input.advance(16);
        Ok(Some(version.min(Version::OURS)))
    }

    /// Names what `input` holds when the peer closed the connection before it greeted.
    ///
    /// `None` when it said nothing.
    pub fn end_of_input(&self, input: &[u8]) -> Option<HandshakeError> {
        (!input.is_empty()).then(|| not_serving(input))
    }
}

fn not_serving(input: &[u8]) -> HandshakeError {
    let said = message::plain(input);
    HandshakeError::NotServing(said.chars().take(EXCERPT_CHARS_MAX).collect())
}

const CLIENT_MAGIC: u64 = 0x390c_9deb;
pub(super) const SERVER_MAGIC: u64 = 0x5452_eecb;

const EXCERPT_CHARS_MAX: usize = 200;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn play(server: &[u8], size: usize) -> Result<Option<Version>, HandshakeError> {
        let mut input = BytesMut::new();
        let handshake = Handshake::begin(&mut BytesMut::new());
        for chunk in server.chunks(size) {
            input.extend_from_slice(chunk);
            match handshake.proceed(&mut input) {
                Ok(None) => {}
                done => return done,
            }
        }
        Ok(None)
    }

    fn greeting(version: u64) -> Vec<u8> {
        [SERVER_MAGIC.to_le_bytes(), version.to_le_bytes()].concat()
    }

    #[test]
    fn the_lower_version_is_spoken() {
        let mut out = BytesMut::new();
        Handshake::begin(&mut out);
        assert_eq!(out[..], *b"\xeb\x9d\x0c9\0\0\0\0\x08\x02\0\0\0\0\0\0");
        // What nix-store 2.8.0, 2.26.3 and 2.34.8 say.
        for size in [1, 7, 16] {
            let spoken = play(&greeting(0x207), size).unwrap();
            assert_eq!(spoken, Some(Version::new(2, 7)));
        }
        let spoken = play(&greeting(0x20a), 16).unwrap();
        assert_eq!(spoken, Some(Version::OURS));
    }

    #[test]
    fn foreign_old_and_new_peers_are_named() {
        let refused = |bytes: &[u8]| play(bytes, 1000).unwrap_err().to_string();
        // A forced command that starts the daemon instead.
        let daemon = refused(b"oixd\0\0\0\0\"\x01\0\0\0\0\0\0");
        assert!(daemon.contains("not nix-store --serve"), "{daemon}");
        assert_eq!(
            refused(b"This account is currently not available.\n"),
            "what answers is not nix-store --serve; it says \"This account is currently not available.\""
        );
        assert!(refused(&greeting(0x203)).contains("2.3, which is too old"));
        assert!(refused(&greeting(0x301)).contains("3.1"));
        assert!(refused(&greeting(1 << 40)).contains("only 2.x"));
        let handshake = Handshake::begin(&mut BytesMut::new());
        assert!(handshake.end_of_input(b"no").is_some());
        assert!(handshake.end_of_input(b"").is_none());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..40),
            size in 1_usize..20,
        ) {
            let whole = play(&bytes, 40).is_ok();
            prop_assert_eq!(play(&bytes, size).is_ok(), whole);
        }
    }
}
