//! How a session opens: magic words, versions, features, and what the daemon tells of itself.
//!
//! Two round trips: our greeting, the daemon's; then features and two obsolete words (CPU affinity
//! since 1.14, reserve space since 1.11), answered by the daemon's features (1.38), Nix version
//! (1.33), trust (1.35) and messages up to `STDERR_LAST`. Source: `handshake` and `postHandshake`
//! in `worker-protocol-connection.cc`.

use bytes::{Buf as _, BytesMut};

use super::message::{self, Message};
use super::shape::{Field, Scan};
use super::wire::{Reader, Writer};
use super::{Peer, ProtocolError, Version};

/// The opening of a session, as far as it has come.
#[derive(Clone, Debug)]
pub struct Handshake {
    state: State,
}

/// Why no session opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// The peer's first bytes are not a daemon's; what it said, made plain.
    #[error("what answers is not a nix-daemon; it says {0:?}")]
    NotADaemon(String),
    /// The daemon is older than Nix 2.0.
    #[error(
        "the nix-daemon speaks protocol {0}, which is too old: at least 1.18 (Nix 2.0) is needed; update Nix there"
    )]
    TooOld(Version),
    /// The daemon speaks another major version.
    #[error("the nix-daemon speaks protocol {0}, only 1.x is understood; update muster")]
    TooNew(Version),
    /// The daemon refused us, in its own words.
    #[error("the nix-daemon refuses: {0}")]
    Refused(String),
    /// The bytes break the protocol.
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
}

#[derive(Clone, Debug)]
enum State {
    Greeting,
    Facts(Version, Scan),
    /// The word of the message whose fields are awaited, if it has come.
    Messages(Peer, Option<(u64, Scan)>),
}

impl Handshake {
    /// Begins a session: appends our greeting to `out`.
    pub fn begin(out: &mut BytesMut) -> Self {
        let mut out = Writer(out);
        out.number(CLIENT_MAGIC);
        out.number(Version::OURS.to_wire());
        Self {
            state: State::Greeting,
        }
    }

    /// Takes what it can from `input` and appends what is to be sent to `out`.
    ///
    /// `None`: more input is needed. Once the peer is known, what is left in `input` is the
    /// session's.
    pub fn proceed(
        &mut self,
        input: &mut BytesMut,
        out: &mut BytesMut,
    ) -> Result<Option<Peer>, HandshakeError> {
        loop {
            match &mut self.state {
                State::Greeting => {
                    let Some(version) = greeting(input)? else {
                        return Ok(None);
                    };
                    let mut out = Writer(out);
                    if version.has(38) {
                        out.number(1);
                        out.text(BUILD_TRACES);
                    }
                    out.number(0);
                    out.number(0);
                    self.state = State::Facts(version, Scan::new(facts_shape(version)));
                }
                State::Facts(version, scan) => {
                    let Some(len) = scan.resume(input)? else {
                        return Ok(None);
                    };
                    let peer = facts(*version, &input.split_to(len))?;
                    self.state = State::Messages(peer, None);
                }
                State::Messages(peer, None) => {
                    let Ok(word) = Reader(input).number() else {
                        return Ok(None);
                    };
                    let shape = message::shape(word, peer.version)?;
                    input.advance(8);
                    self.state = State::Messages(peer.clone(), Some((word, Scan::new(shape))));
                }
                State::Messages(peer, Some((word, scan))) => {
                    let Some(len) = scan.resume(input)? else {
                        return Ok(None);
                    };
                    match message::decode(*word, &input.split_to(len), peer.version)? {
                        Message::Last => return Ok(Some(peer.clone())),
                        Message::Error(text) => return Err(HandshakeError::Refused(text)),
                        Message::Log(_) | Message::Progress => {}
                    }
                    self.state = State::Messages(peer.clone(), None);
                }
            }
        }
    }

    /// Names what `input` holds when the peer closed the connection before the session opened.
    ///
    /// `None` when it said nothing that helps.
    pub fn end_of_input(&self, input: &[u8]) -> Option<HandshakeError> {
        let greeting = matches!(self.state, State::Greeting);
        (greeting && !input.is_empty()).then(|| not_a_daemon(input))
    }
}

fn greeting(input: &mut BytesMut) -> Result<Option<Version>, HandshakeError> {
    let mut reader = Reader(input);
    let Ok(magic) = reader.number() else {
        return Ok(None);
    };
    if magic != DAEMON_MAGIC {
        return Err(not_a_daemon(input));
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

fn not_a_daemon(input: &[u8]) -> HandshakeError {
    HandshakeError::NotADaemon(excerpt(input))
}

fn facts_shape(version: Version) -> &'static [Field] {
    match version.minor {
        38.. => &[Field::Texts, Field::Text, Field::Number],
        35.. => &[Field::Text, Field::Number],
        33.. => &[Field::Text],
        _ => &[],
    }
}

fn facts(version: Version, bytes: &[u8]) -> Result<Peer, ProtocolError> {
    let mut reader = Reader(bytes);
    let mut peer = Peer {
        version,
        nix_version: None,
        trusted: None,
        build_traces: false,
    };
    if version.has(38) {
        let features = reader.texts(Ok::<_, ProtocolError>)?;
        peer.build_traces = features.contains(&BUILD_TRACES.as_bytes());
    }
    if version.has(33) {
        peer.nix_version = Some(excerpt(reader.text()?));
    }
    if version.has(35) {
        peer.trusted = match reader.number()? {
            0 => None,
            1 => Some(true),
            2 => Some(false),
            value => {
                return Err(ProtocolError::Unexpected {
                    what: "trust word",
                    value,
                });
            }
        };
    }
    Ok(peer)
}

fn excerpt(text: &[u8]) -> String {
    let text = message::plain(text);
    text.chars().take(EXCERPT_CHARS_MAX).collect()
}

const CLIENT_MAGIC: u64 = 0x6e69_7863;
const DAEMON_MAGIC: u64 = 0x6478_696f;

/// The one feature that we know: realisations named by derivation path, Nix 2.35.
const BUILD_TRACES: &str = "realisation-with-path-not-hash";

const EXCERPT_CHARS_MAX: usize = 200;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn number(number: u64) -> Vec<u8> {
        number.to_le_bytes().to_vec()
    }

    fn text(text: &str) -> Vec<u8> {
        let mut out = BytesMut::new();
        Writer(&mut out).text(text);
        out.to_vec()
    }

    /// Plays the daemon's side in chunks of `size`; returns the result and what we sent.
    fn play(daemon: &[Vec<u8>], size: usize) -> (Result<Option<Peer>, HandshakeError>, Vec<u8>) {
        let (mut input, mut out) = (BytesMut::new(), BytesMut::new());
        let mut handshake = Handshake::begin(&mut out);
        for chunk in daemon.concat().chunks(size) {
            input.extend_from_slice(chunk);
            match handshake.proceed(&mut input, &mut out) {
                Ok(None) => {}
                done => return (done, out.to_vec()),
            }
        }
        (Ok(None), out.to_vec())
    }

    fn opens(daemon: &[Vec<u8>]) -> Peer {
        for size in [1, 3, 8] {
            assert_eq!(play(daemon, size).0, play(daemon, 1000).0);
        }
        play(daemon, 1000).0.unwrap().unwrap()
    }

    #[test]
    fn nix_2_3_speaks_1_21() {
        let (magic, version) = (number(0x6478_696f), number(0x115));
        let daemon = [magic, version, number(0x616c_7473)];
        let peer = opens(&daemon);
        assert_eq!(peer.to_string(), "protocol 1.21");
        assert_eq!((peer.nix_version, peer.trusted), (None, None));
        let sent = [number(0x6e69_7863), number(0x126), number(0), number(0)];
        assert_eq!(play(&daemon, 1).1, sent.concat());
    }

    #[test]
    fn nix_2_8_says_its_version() {
        // What nix-daemon 2.8.0 sent.
        let daemon = [
            b"oixd\0\0\0\0\"\x01\0\0\0\0\0\0".to_vec(),
            b"\x05\0\0\0\0\0\0\x002.8.0\0\0\0stla\0\0\0\0".to_vec(),
        ];
        assert_eq!(opens(&daemon).to_string(), "Nix 2.8.0, protocol 1.34");
    }

    #[test]
    fn later_versions_exchange_features_and_trust() {
        let facts = [text("2.34.8"), number(2), number(0x616c_7473)].concat();
        let none = [number(0x6478_696f), number(0x126), number(0), facts.clone()];
        let peer = opens(&none);
        assert_eq!(peer.to_string(), "Nix 2.34.8, protocol 1.38");
        assert_eq!((peer.trusted, peer.build_traces), (Some(false), false));

        let mut features = number(2);
        features.extend([text("from-the-future"), text(BUILD_TRACES)].concat());
        let future = [number(0x6478_696f), number(0x12d), features, facts];
        let peer = opens(&future);
        assert_eq!(peer.version, Version::OURS);
        assert!(peer.build_traces);
        let sent = play(&future, 7).1;
        let ours = [number(1), text(BUILD_TRACES), number(0), number(0)].concat();
        assert_eq!(sent[16..], ours);
    }

    #[test]
    fn log_lines_pass_and_a_refusal_is_shown() {
        let greeting = [number(0x6478_696f), number(0x120)].concat();
        let log = [number(0x6f6c_6d67), text("warning: x\n")].concat();
        let mut error = [number(0x6378_7470), text("Error"), number(0), text("Error")].concat();
        error.extend([text("user 'x' is not allowed"), number(0), number(0)].concat());
        let (result, _) = play(&[greeting, log, error], 5);
        let error = result.unwrap_err().to_string();
        assert_eq!(error, "the nix-daemon refuses: user 'x' is not allowed");
    }

    #[test]
    fn foreign_and_old_peers_are_named() {
        let refused = |bytes: &[u8]| play(&[bytes.to_vec()], 1000).0.unwrap_err().to_string();
        assert_eq!(
            refused(b"This account is currently not available.\n"),
            "what answers is not a nix-daemon; it says \"This account is currently not available.\""
        );
        let old = [number(0x6478_696f), number(0x10a)].concat();
        assert!(refused(&old).contains("protocol 1.10, which is too old"));
        let new = [number(0x6478_696f), number(0x200)].concat();
        assert!(refused(&new).contains("protocol 2.0"));
        let handshake = Handshake::begin(&mut BytesMut::new());
        assert!(handshake.end_of_input(b"no").is_some());
        assert!(handshake.end_of_input(b"").is_none());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(
            minor in 0_u64..64,
            greeting in any::<bool>(),
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            size in 1_usize..30,
        ) {
            let mut daemon = Vec::new();
            if greeting {
                daemon.push(number(0x6478_696f));
                daemon.push(number(0x100 + minor));
            }
            daemon.push(bytes);
            // How much of a foreign greeting is shown depends on how much has come.
            let result = |size| match play(&daemon, size).0 {
                Err(HandshakeError::NotADaemon(_)) => None,
                result => Some(result),
            };
            prop_assert_eq!(result(size), result(1));
        }
    }
}
