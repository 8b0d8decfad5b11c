//! What comes back for a question.
//!
//! A reply has the shape that its operation gives it; what is inside is judged once its bytes are
//! complete, so a strange path or hash fails its own question and not the session. Source:
//! `worker-protocol.cc`, `common-protocol.cc`; realisations of 1.27 to 1.30 are bare paths, from 1.31
//! JSON texts, and since Nix 2.35 a path with signatures.

use super::request::Awaited;
use super::shape::Field;
use super::wire::Reader;
use super::{ProtocolError, Version, message};
use crate::nix::build_trace::BuildTraceEntry;
use crate::nix::content_address::ContentAddress;
use crate::nix::hash::NarHash;
use crate::nix::path_info::PathInfo;
use crate::nix::realisation::Realisation;
use crate::nix::signature::Signature;
use crate::nix::store_path::{StoreDir, StorePath, StorePathError};

/// The answer to a [`Request`](super::request::Request).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// To `IsValidPath`.
    Valid(bool),
    /// To `AddTempRoot`, `SetOptions` and `AddSignatures`.
    Done,
    /// To `QueryAllValidPaths`, after the events that carried the paths.
    AllPaths {
        /// How many paths had names that are none, and were left out.
        unreadable: u64,
    },
    /// To `QueryPathInfo`; `None`: not there.
    PathInfo(Option<PathInfo>),
    /// To `QueryPathFromHashPart`; `None`: not there.
    Path(Option<StorePath>),
    /// To `QueryValidPaths`: those that are there.
    Paths(Vec<StorePath>),
    /// To `QueryRealisation`; `None`: not known.
    Realisation(Option<Realisation>),
    /// To `QueryBuildTrace`; `None`: not known.
    BuildTrace(Option<BuildTraceEntry>),
}

/// Why a question has no reply; the session goes on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReplyError {
    /// The daemon's own words.
    #[error("{0}")]
    Remote(String),
    /// A path lies in another store directory than ours.
    #[error("path {0}")]
    StoreDir(StorePathError),
    /// The reply holds something that is not what it should be.
    #[error("malformed reply: {0}")]
    Malformed(String),
    /// The bytes break the protocol: here, and so for good.
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
}

/// Returns the shape of the reply that is awaited.
///
/// The NAR and the list of all paths are streams and have none. The flag before a path info came
/// with 1.17, its last three fields with 1.16: every daemon that is spoken to sends them.
pub(super) fn shape(awaited: &Awaited) -> &'static [Field] {
    match awaited {
        Awaited::Validity | Awaited::Acknowledgement => &[Field::Number],
        Awaited::Nothing | Awaited::AllPaths | Awaited::Nar { .. } => &[],
        Awaited::Path => &[Field::Text],
        Awaited::Paths | Awaited::Realisation(_) => &[Field::Texts],
        Awaited::BuildTrace(_) => &[Field::Present, Field::Text, Field::Texts],
        Awaited::PathInfo(_) => &[
            Field::Present,
            Field::Text,
            Field::Text,
            Field::Texts,
            Field::Number,
            Field::Number,
            Field::Number,
            Field::Texts,
            Field::Text,
        ],
    }
}

/// Reads the complete bytes of the reply that is awaited.
pub(super) fn decode(
    awaited: Awaited,
    bytes: &[u8],
    version: Version,
    store_dir: &StoreDir,
) -> Result<Reply, ReplyError> {
    let mut reader = Reader(bytes);
    Ok(match awaited {
        Awaited::Validity => Reply::Valid(reader.number()? != 0),
        Awaited::Acknowledgement | Awaited::Nothing => Reply::Done,
        Awaited::AllPaths | Awaited::Nar { .. } => Reply::AllPaths { unreadable: 0 },
        Awaited::Path => Reply::Path(optional_path(reader.text()?, store_dir)?),
        Awaited::Paths => Reply::Paths(reader.texts(|text| path(text, store_dir))?),
        Awaited::PathInfo(of) => Reply::PathInfo(match reader.number()? {
            0 => None,
            _ => Some(path_info(of, &mut reader, store_dir)?),
        }),
        Awaited::Realisation(id) if version.has(31) => {
            let known = reader.texts(|text| Realisation::parse(text).map_err(malformed))?;
            Reply::Realisation(known.into_iter().find(|known| known.id == id))
        }
        Awaited::Realisation(id) => {
            let known = reader.texts(|text| path(text, store_dir))?;
            Reply::Realisation(known.into_iter().next().map(|out_path| Realisation {
                id,
                out_path,
                signatures: Vec::new(),
                dependent_realisations: Default::default(),
            }))
        }
        Awaited::BuildTrace(key) => Reply::BuildTrace(match reader.number()? {
            0 => None,
            _ => Some(BuildTraceEntry {
                key,
                out_path: path(reader.text()?, store_dir)?,
                signatures: signatures(&mut reader)?,
            }),
        }),
    })
}

/// Reads a path with its directory.
pub(in crate::nix) fn path(text: &[u8], store_dir: &StoreDir) -> Result<StorePath, ReplyError> {
    let text =
        std::str::from_utf8(text).map_err(|_| ReplyError::Malformed(message::plain(text)))?;
    store_dir.parse(text).map_err(|error| match error {
        error @ StorePathError::OtherStoreDir { .. } => ReplyError::StoreDir(error),
        error => malformed(error),
    })
}

/// The fields of `UnkeyedValidPathInfo`; registration time and `ultimate` are passed over.
fn path_info(
    path_asked: StorePath,
    reader: &mut Reader<'_>,
    store_dir: &StoreDir,
) -> Result<PathInfo, ReplyError> {
    let deriver = optional_path(reader.text()?, store_dir)?;
    let nar_hash = utf8(reader.text()?)?;
    let nar_hash = NarHash::parse(nar_hash).map_err(malformed)?;
    let references = reader.texts(|text| path(text, store_dir))?;
    let _registration_time = reader.number()?;
    let nar_size = reader.number()?;
    let _ultimate = reader.number()?;
    let signatures = signatures(reader)?;
    let mut info = PathInfo {
        path: path_asked,
        nar_hash,
        nar_size,
        references,
        deriver,
        signatures,
        ca: ContentAddress::parse(utf8(reader.text()?)?),
    };
    info.normalize();
    Ok(info)
}

/// Reads signatures; malformed ones are dropped.
pub(in crate::nix) fn signatures(reader: &mut Reader<'_>) -> Result<Vec<Signature>, ProtocolError> {
    let parse = |text| Signature::parse(std::str::from_utf8(text).ok()?).ok();
    let signatures = reader.texts(|text| Ok::<_, ProtocolError>(parse(text)))?;
    Ok(signatures.into_iter().flatten().collect())
}

pub(in crate::nix) fn optional_path(
    text: &[u8],
    store_dir: &StoreDir,
) -> Result<Option<StorePath>, ReplyError> {
    match text {
        b"" => Ok(None),
        text => path(text, store_dir).map(Some),
    }
}

pub(in crate::nix) fn utf8(text: &[u8]) -> Result<&str, ReplyError> {
    std::str::from_utf8(text).map_err(|_| ReplyError::Malformed(message::plain(text)))
}

pub(in crate::nix) fn malformed(error: impl std::error::Error) -> ReplyError {
    ReplyError::Malformed(error.to_string())
}
