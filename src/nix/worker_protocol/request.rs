//! The questions that can be asked, and their bytes.
//!
//! Each is its operation number and its arguments; see [`super::reply`] for what comes back.
//! Source: the operations in `daemon.cc`.

use bytes::BytesMut;

use super::wire::Writer;
use super::{Peer, Version};
use crate::nix::build_trace::BuildTraceKey;
use crate::nix::realisation::DrvOutput;
use crate::nix::signature::Signature;
use crate::nix::store_path::{StoreDir, StorePath, StorePathHash};

/// A question to a daemon. All ask its own store only: nothing recurses into its substituters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Is the path there? Answered by [`Reply::Valid`](super::reply::Reply::Valid).
    IsValidPath(StorePath),
    /// Keeps the path, there or not, from garbage collection while the connection lives.
    AddTempRoot(StorePath),
    /// Sets how much the daemon logs; everything else is left at its defaults.
    SetOptions {
        /// Nix's `Verbosity`: 0 errors, 1 warnings, 3 information, 7 all.
        verbosity: u64,
    },
    /// All paths of the store; they come as events before the reply.
    QueryAllValidPaths,
    /// What the store knows of a path.
    QueryPathInfo(StorePath),
    /// The path with this hash part.
    QueryPathFromHashPart(StorePathHash),
    /// Which of these paths are there?
    QueryValidPaths(Vec<StorePath>),
    /// Adds signatures to a path that must be there: Nix 2.8 crashes when it is not.
    AddSignatures(StorePath, Vec<Signature>),
    /// The NAR of a path; it comes as events, without a reply.
    NarFromPath {
        /// The path.
        path: StorePath,
        /// Size that the path info names, in bytes; another one breaks the session.
        nar_size: u64,
    },
    /// What a derivation output, named by hash, was realised as: protocol 1.27 to Nix 2.34.
    QueryRealisation(DrvOutput),
    /// What an output of a derivation was realised as: Nix 2.35 and later.
    QueryBuildTrace(BuildTraceKey),
}

/// Writes requests as one peer understands them.
#[derive(Clone, Debug)]
pub struct Encoder {
    version: Version,
    build_traces: bool,
    store_dir: StoreDir,
}

/// What the session waits for once a request was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected(pub(super) Awaited);

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Awaited {
    Validity,
    Acknowledgement,
    Nothing,
    AllPaths,
    PathInfo(StorePath),
    Path,
    Paths,
    Nar { size: u64 },
    Realisation(DrvOutput),
    BuildTrace(BuildTraceKey),
}

/// A question that this peer cannot be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{question} in protocol {version}")]
pub struct Unsupported {
    question: &'static str,
    version: Version,
}

impl Request {
    /// Returns the operation's name in Nix.
    pub fn name(&self) -> &'static str {
        match self {
            Self::IsValidPath(_) => "IsValidPath",
            Self::AddTempRoot(_) => "AddTempRoot",
            Self::SetOptions { .. } => "SetOptions",
            Self::QueryAllValidPaths => "QueryAllValidPaths",
            Self::QueryPathInfo(_) => "QueryPathInfo",
            Self::QueryPathFromHashPart(_) => "QueryPathFromHashPart",
            Self::QueryValidPaths(_) => "QueryValidPaths",
            Self::AddSignatures(..) => "AddSignatures",
            Self::NarFromPath { .. } => "NarFromPath",
            Self::QueryRealisation(_) | Self::QueryBuildTrace(_) => "QueryRealisation",
        }
    }

    fn operation(&self) -> u64 {
        match self {
            Self::IsValidPath(_) => 1,
            Self::AddTempRoot(_) => 11,
            Self::SetOptions { .. } => 19,
            Self::QueryAllValidPaths => 23,
            Self::QueryPathInfo(_) => 26,
            Self::QueryPathFromHashPart(_) => 29,
            Self::QueryValidPaths(_) => 31,
            Self::AddSignatures(..) => 37,
            Self::NarFromPath { .. } => 38,
            Self::QueryRealisation(_) | Self::QueryBuildTrace(_) => 43,
        }
    }
}

impl Encoder {
    /// Makes an encoder for a peer whose store lies in `store_dir`.
    pub fn new(peer: &Peer, store_dir: StoreDir) -> Self {
        Self {
            version: peer.version,
            build_traces: peer.build_traces,
            store_dir,
        }
    }

    /// Appends the bytes of a request; on an error nothing is written.
    pub fn encode(&self, request: Request, out: &mut BytesMut) -> Result<Expected, Unsupported> {
        let supported = match &request {
            Request::QueryRealisation(_) => self.version.has(27) && !self.build_traces,
            Request::QueryBuildTrace(_) => self.build_traces,
            _ => true,
        };
        if !supported {
            return Err(Unsupported {
                question: request.name(),
                version: self.version,
            });
        }
        let mut out = Writer(out);
        out.number(request.operation());
        Ok(Expected(self.arguments(request, &mut out)))
    }

    fn arguments(&self, request: Request, out: &mut Writer<'_>) -> Awaited {
        match request {
            Request::IsValidPath(path) => {
                self.path(&path, out);
                Awaited::Validity
            }
            Request::AddTempRoot(path) => {
                self.path(&path, out);
                Awaited::Acknowledgement
            }
            Request::SetOptions { verbosity } => {
                options(verbosity, out);
                Awaited::Nothing
            }
            Request::QueryAllValidPaths => Awaited::AllPaths,
            Request::QueryPathInfo(path) => {
                self.path(&path, out);
                Awaited::PathInfo(path)
            }
            Request::QueryPathFromHashPart(hash) => {
                out.text(&hash.to_string());
                Awaited::Path
            }
            Request::QueryValidPaths(paths) => {
                out.number(paths.len() as u64);
                for path in &paths {
                    self.path(path, out);
                }
                if self.version.has(27) {
                    // Never substitute: only the daemon's own store is asked.
                    out.number(0);
                }
                Awaited::Paths
            }
            Request::AddSignatures(path, signatures) => {
                self.path(&path, out);
                out.number(signatures.len() as u64);
                for signature in &signatures {
                    out.text(&signature.to_string());
                }
                Awaited::Acknowledgement
            }
            Request::NarFromPath { path, nar_size } => {
                self.path(&path, out);
                Awaited::Nar { size: nar_size }
            }
            Request::QueryRealisation(id) => {
                out.text(id.as_str());
                Awaited::Realisation(id)
            }
            Request::QueryBuildTrace(key) => {
                self.path(key.derivation(), out);
                out.text(key.output());
                Awaited::BuildTrace(key)
            }
        }
    }

    fn path(&self, path: &StorePath, out: &mut Writer<'_>) {
        out.texts_joined(&[self.store_dir.as_str(), "/", path.as_str()]);
    }
}

impl Awaited {
    /// Makes any kind from a byte, for fuzzing.
    pub(super) fn arbitrary(byte: u8) -> Self {
        match byte % 10 {
            0 => Self::Validity,
            1 => Self::Acknowledgement,
            2 => Self::Nothing,
            3 => Self::AllPaths,
            4 => Self::PathInfo(
                "i4f75pn3bxkxdk2kld86k5qazq4cqj8i-hello"
                    .parse()
                    .expect("a path"),
            ),
            5 => Self::Path,
            6 => Self::Paths,
            7 => Self::Nar {
                size: u64::from(byte) * 8,
            },
            8 => {
                let id = "sha256:0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73!out";
                Self::Realisation(id.parse().expect("a name"))
            }
            _ => {
                let derivation = "i4f75pn3bxkxdk2kld86k5qazq4cqj8i-hello.drv";
                let key = BuildTraceKey::new(derivation.parse().expect("a path"), "out");
                Self::BuildTrace(key.expect("a key"))
            }
        }
    }
}

fn options(verbosity: u64, out: &mut Writer<'_>) {
    let keep_failed = 0;
    let keep_going = 0;
    let try_fallback = 0;
    let build_jobs_max = 0;
    let silent_time_max_seconds = 0;
    let build_hook = 1;
    let build_verbosity = 7;
    let log_type = 0;
    let print_build_trace = 0;
    let build_cores = 0;
    let use_substitutes = 0;
    let overrides = 0;
    for number in [
        keep_failed,
        keep_going,
        try_fallback,
        verbosity,
        build_jobs_max,
        silent_time_max_seconds,
        build_hook,
        build_verbosity,
        log_type,
        print_build_trace,
        build_cores,
        use_substitutes,
        overrides,
    ] {
        out.number(number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(minor: u8, build_traces: bool) -> Peer {
        Peer {
            version: Version::new(1, minor),
            nix_version: None,
            trusted: None,
            build_traces,
        }
    }

    fn encoded(minor: u8, request: &Request) -> Vec<u8> {
        let mut out = BytesMut::new();
        let encoder = Encoder::new(&peer(minor, false), StoreDir::default());
        encoder.encode(request.clone(), &mut out).unwrap();
        out.to_vec()
    }

    fn path() -> StorePath {
        "i4f75pn3bxkxdk2kld86k5qazq4cqj8i-hello".parse().unwrap()
    }

    #[test]
    fn a_path_is_written_with_its_directory() {
        let bytes = encoded(34, &Request::QueryPathInfo(path()));
        let text = b"/nix/store/i4f75pn3bxkxdk2kld86k5qazq4cqj8i-hello\0\0\0\0\0\0\0";
        let head = b"\x1a\0\0\0\0\0\0\0\x31\0\0\0\0\0\0\0";
        assert_eq!(bytes, [&head[..], text].concat());
    }

    #[test]
    fn signatures_follow_their_path() {
        let text = format!("k-1:{}==", "A".repeat(86));
        let signature = Signature::parse(&text).unwrap();
        let bytes = encoded(34, &Request::AddSignatures(path(), vec![signature]));
        let path =
            b"\x31\0\0\0\0\0\0\0/nix/store/i4f75pn3bxkxdk2kld86k5qazq4cqj8i-hello\0\0\0\0\0\0\0";
        let count_and_len = b"\x01\0\0\0\0\0\0\0\x5c\0\0\0\0\0\0\0";
        let operation = b"\x25\0\0\0\0\0\0\0";
        let padding = b"\0\0\0\0";
        let parts = [
            &operation[..],
            path,
            count_and_len,
            text.as_bytes(),
            padding,
        ];
        assert_eq!(bytes, parts.concat());
        // None at all: what asks for the permission without changing anything.
        let none = encoded(34, &Request::AddSignatures(self::path(), vec![]));
        assert_eq!(none, [&operation[..], path, &[0; 8]].concat());
    }

    #[test]
    fn the_substitute_flag_came_with_1_27() {
        let request = Request::QueryValidPaths(vec![path()]);
        let (old, new) = (encoded(26, &request), encoded(27, &request));
        assert_eq!(new, [&old[..], &[0; 8]].concat());
    }

    #[test]
    fn realisations_are_asked_for_as_the_peer_names_them() {
        let id: DrvOutput = format!("sha256:{}!out", "0".repeat(64)).parse().unwrap();
        let by_hash = Request::QueryRealisation(id);
        let derivation = "i4f75pn3bxkxdk2kld86k5qazq4cqj8i-hello.drv".parse();
        let key = BuildTraceKey::new(derivation.unwrap(), "out").unwrap();
        let by_path = Request::QueryBuildTrace(key);
        let asks = |minor, build_traces, request: &Request| {
            let encoder = Encoder::new(&peer(minor, build_traces), StoreDir::default());
            let mut out = BytesMut::new();
            let result = encoder.encode(request.clone(), &mut out);
            assert_eq!(result.is_err(), out.is_empty());
            result.is_ok()
        };
        assert!(!asks(26, false, &by_hash));
        assert!(asks(27, false, &by_hash));
        assert!(asks(38, false, &by_hash));
        assert!(!asks(38, true, &by_hash));
        assert!(!asks(38, false, &by_path));
        assert!(asks(38, true, &by_path));
    }
}
