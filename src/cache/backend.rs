//! Where NARs and what is known of their paths are kept beyond memory: the trait of all such places.
//!
//! A backend believes what it is given: trust, signing and the choice of holders are the floor above's.
//! It promises that what it lists is complete: an entry is seen only when its NAR is there whole.
//!
//! ```text
//! begin -> Fill (write … write) -> commit: NAR, then narinfo, then index -> look_up, open
//! ```

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use async_trait::async_trait;
use sha2::{Digest as _, Sha256};

use crate::nix::hash::NarHash;
use crate::nix::path_info::{Basis, PathInfo};
use crate::nix::signature::{PublicKey, Signature};
use crate::nix::store_path::StorePathHash;

use super::fill::Fill;
use super::nar_name::{FileHash, NarName};
use super::stamp::{Content, Stamp};

/// A compressed NAR that is kept, always zstd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NarFile {
    /// SHA-256 of the file.
    pub hash: FileHash,
    /// Size of the file in bytes.
    pub size_bytes: u64,
}

/// Who had a path, and what that was believed by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ground {
    /// The upstream's name.
    pub upstream: String,
    /// What the check rested on.
    pub basis: Basis,
}

/// What is kept of one store path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// What was verified, with foreign signatures only: ours are made when it is published.
    pub info: PathInfo,
    /// Who has it and what each was believed by; the floor above decides whether one still holds.
    pub grounds: Vec<Ground>,
    /// Its NAR, where that is kept; `None`: a positive look-up alone.
    pub file: Option<NarFile>,
}

/// A NAR that can be read; it stays readable when it is evicted meanwhile.
#[derive(Clone, Debug)]
pub struct OpenNar {
    /// The file, to be read by `pread` or `sendfile` at given places only: others may share it.
    pub file: Arc<File>,
    /// Its size in bytes, as the file system and the record agree.
    pub size_bytes: u64,
    /// Whether it is as it was checked.
    pub content: Content,
}

/// How much is kept and what came to pass since the start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// NARs that are kept.
    pub entries: u64,
    /// Bytes of their files.
    pub bytes: u64,
    /// Bytes that running fills have reserved.
    pub bytes_reserved: u64,
    /// Bytes that both together may take.
    pub bytes_max: u64,
    /// Paths that are known without their NAR.
    pub look_ups: u64,
    /// Fills that were committed since the start.
    pub fills: u64,
    /// Entries that were removed since the start to make room.
    pub evictions: u64,
    /// Entries that were removed since the start because they were found wrong.
    pub corrupt: u64,
    /// Why nothing can be written, or nothing read, at present.
    pub degraded: Option<String>,
}

/// Says with which signatures a path is to be shown to those who read what is kept without muster,
/// beside the foreign ones; `None`: it is not vouched for today, and is to be shown without any of ours.
pub type Sign<'a> = dyn Fn(&Record) -> Option<Vec<Signature>> + Send + Sync + 'a;

/// Why a backend cannot do it now; whoever serves goes on without.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The NAR would not fit even into an empty cache.
    #[error("a nar of {size_bytes} bytes does not fit into a cache of {bytes_max}")]
    TooLarge {
        /// Bytes that it takes, perhaps estimated.
        size_bytes: u64,
        /// Bytes that the cache may take.
        bytes_max: u64,
    },
    /// Running fills have reserved all that there is, or the file system is full until some entries are gone.
    #[error("there is no room in the cache just now")]
    Full,
    /// Another NAR of the same path is kept; it stays.
    #[error("a nar of another hash is kept for this path")]
    Diverges,
    /// The backend cannot write at present; the cause was logged when it was found.
    #[error("the cache is degraded: {0}")]
    Degraded(String),
    /// Reading or writing failed.
    #[error("{what}")]
    Io {
        /// What was done, with the place.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// It is being stopped.
    #[error("the cache is stopping")]
    Stopping,
}

/// A place where NARs and what is known of their paths are kept.
///
/// All methods may be called at any time from any number of threads. Only [`stop`](Self::stop) waits
/// for anything; `look_up`, `open` and `begin` take microseconds on a machine at rest and never wait
/// for writers.
#[async_trait]
pub trait Backend: Send + Sync + 'static {
    /// Returns what is known of a path.
    ///
    /// `file` is there only if the NAR is kept whole. What was given to [`remember`](Self::remember)
    /// may show a moment later.
    fn look_up(&self, hash: StorePathHash) -> Option<Record>;

    /// Keeps what an upstream said of a path, for restarts.
    ///
    /// Its `file` is not read. It joins what is known of the path: grounds of the same upstream are
    /// replaced, others and a kept NAR stay; where a NAR of another hash is kept, it changes nothing.
    /// Queued, and dropped when the queue is full: it is only a memory.
    fn remember(&self, record: Record);

    /// Forgets that upstreams have this NAR of a path, because they deny it.
    ///
    /// It shows at once. Where the NAR is kept nothing changes: who vouched for it did so when it was
    /// taken in. A look-up that nobody is left for is forgotten; where more is denied than can be put down, so are
    /// all others that no NAR is kept for.
    fn deny(&self, hash: StorePathHash, nar_hash: NarHash, upstreams: &[&str]);

    /// Takes over which keys sign now, at the start and when they or the trust in upstreams change.
    ///
    /// `keys` are those that entries are known by where only their narinfo is left, and `trust` is a line that
    /// is another one whenever others are believed; in the background each narinfo that others may read gets
    /// the signatures that `sign` makes, or loses ours.
    fn sign_with(&self, keys: Vec<PublicKey>, trust: String, sign: Arc<Sign<'static>>);

    /// Forgets a path, its NAR too, in the background.
    fn forget(&self, hash: StorePathHash);

    /// Notes that a path was used just now, so that it is evicted late.
    fn touch(&self, hash: StorePathHash);

    /// Begins to take in a NAR of `nar_size` bytes before compression.
    ///
    /// Room is reserved by estimate and grows with what is written; the least recently used entries
    /// make room in the background.
    fn begin(&self, nar_size: u64) -> Result<Fill, Error>;

    /// Opens a kept NAR; `None` when exactly this file is not kept.
    ///
    /// A file whose size is not what was recorded is corrupt: the entry is removed, and it is `None`.
    /// The content is not read: where [`OpenNar::content`] is unknown, that is for the caller to do before
    /// the bytes are given out unchecked.
    fn open(&self, name: &NarName) -> Result<Option<OpenNar>, Error>;

    /// Hears that an open NAR with this stamp was read and has the hash that it is named by.
    ///
    /// It is not read again until its file changes.
    fn proven(&self, name: &NarName, stamp: Stamp);

    /// Removes an entry that was found wrong while it was served, says so in the log and counts it.
    ///
    /// An entry of that path with another file stays.
    fn corrupt(&self, name: &NarName, cause: &str);

    /// Returns how much is kept, and whether all is well.
    fn stats(&self) -> Stats;

    /// Writes what is queued and ends the background work; later calls find nothing and keep nothing.
    ///
    /// Dropped, the work goes on without anybody waiting.
    async fn stop(&self);
}

impl OpenNar {
    /// Reads all of it and tells whether it has the hash of its file. It blocks.
    ///
    /// The error is the file system's, and says nothing of the content.
    pub fn has_hash(&self, expected: FileHash) -> io::Result<bool> {
        let mut sha256 = Sha256::new();
        let mut buffer = vec![0; BUFFER_BYTES];
        let mut offset = 0;
        loop {
            match self.file.read_at(&mut buffer, offset) {
                Ok(0) => break,
                Ok(count) => {
                    sha256.update(buffer.get(..count).unwrap_or_default());
                    offset += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        let hash: [u8; 32] = sha256.finalize().into();
        Ok(hash == expected.0)
    }
}

impl NarFile {
    /// Names the file of this NAR of a path.
    pub fn name(&self, info: &PathInfo) -> NarName {
        NarName {
            path_hash: info.path.hash(),
            nar_hash: info.nar_hash,
            file_hash: self.hash,
        }
    }
}

impl Record {
    /// Forgets that upstreams have this NAR, as [`Backend::deny`] says; `false` when nothing changes.
    pub fn deny(&mut self, nar_hash: NarHash, upstreams: &[impl AsRef<str>]) -> bool {
        if self.file.is_some() || self.info.nar_hash != nar_hash {
            return false;
        }
        let before = self.grounds.len();
        let denied = |ground: &Ground| upstreams.iter().any(|u| u.as_ref() == ground.upstream);
        self.grounds.retain(|ground| !denied(ground));
        self.grounds.len() < before
    }

    /// Names the kept file, where there is one.
    pub fn name(&self) -> Option<NarName> {
        self.file.map(|file| file.name(&self.info))
    }

    /// Adds what another answer for the same path and NAR said.
    ///
    /// Grounds of the same upstream are replaced, foreign signatures are united; both are bounded.
    pub fn join(&mut self, other: Self) {
        for ground in other.grounds {
            self.grounds.retain(|g| g.upstream != ground.upstream);
            self.grounds.push(ground);
        }
        let surplus = self.grounds.len().saturating_sub(GROUNDS_MAX);
        self.grounds.drain(..surplus);
        for signature in other.info.signatures {
            let signatures = &mut self.info.signatures;
            if signatures.len() < SIGNATURES_MAX && !signatures.contains(&signature) {
                signatures.push(signature);
            }
        }
        self.info.deriver = self.info.deriver.take().or(other.info.deriver);
        self.info.ca = self.info.ca.take().or(other.info.ca);
    }
}

const BUFFER_BYTES: usize = 256 << 10;
/// More holders than this are not worth remembering.
const GROUNDS_MAX: usize = 64;
/// As many as are published.
const SIGNATURES_MAX: usize = 32;
