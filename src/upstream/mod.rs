//! Whom we ask: one store behind one small trait.
//!
//! An upstream answers for its own store only and never recurses into further substituters. It
//! decides nothing about trust, choice or retries over several stores: that is the substituter's.

mod backoff;
pub mod binary_cache;
pub mod build_log;
pub mod cache_files;
pub mod cache_folder;
pub mod cache_http;
mod cache_link;
pub mod cache_pulse;
mod cache_turns;
pub mod catalog_feed;
pub mod closures;
pub mod connection;
pub mod daemon;
pub mod dialect;
mod generations;
pub mod http_client;
pub mod http_credentials;
mod http_drip;
mod http_pools;
pub mod http_tls;
pub mod http_url;
mod leased;
pub mod left_out;
pub mod local;
pub mod memory;
pub mod peer_closures;
pub mod pool;
mod pool_choice;
pub mod pulse;
mod realisations;
pub mod roots;
pub mod runtime_dir;
#[cfg(test)]
mod said;
pub mod serve_session;
pub mod served;
pub mod session;
pub mod signing;
mod slots;
pub mod ssh;
pub mod ssh_command;
mod ssh_diagnosis;
pub mod ssh_process;
pub mod standing;
pub mod wire;
pub mod worker;

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::future::join_all;
use futures_util::stream::BoxStream;
use tokio::sync::watch;

use cache_files::FilePart;
use closures::Closures;

use crate::codec::beginnings::Beginnings;
use crate::nix::build_trace::{BuildTraceEntry, BuildTraceKey};
use crate::nix::hash::Hash;
use crate::nix::narinfo::Compression;
use crate::nix::path_info::PathInfo;
use crate::nix::realisation::{DrvOutput, Realisation};
use crate::nix::store_path::{StorePath, StorePathHash};

/// The bytes of one NAR from its first to its last, in chunks of at most 256 KiB.
///
/// The stream ends after exactly the NAR; an item that is an error is the last. Dropping it
/// abandons the NAR and frees what carried it. Hash and size are the reader's to check.
pub type NarStream = BoxStream<'static, Result<Bytes, Error>>;

/// A NAR with what its store says for it.
pub enum OpenedNar {
    /// Hash and size are the reader's to check.
    Unchecked(NarStream),
    /// The store holds the last chunk back until it knows that the NAR is the promised one, and fails
    /// else: whoever reads the stream to its end has the right bytes, and need not hash them.
    Checked(NarStream),
    /// Each chunk is right when it comes. Who goes on where this one breaks is known to repeat the same NAR by
    /// the hashes of its beginnings, unless the break is an [`Error::Written`].
    Proven(Beginnings, NarStream),
}

/// How a store keeps a NAR compressed, as [`Upstream::encoded_nar`] tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedNar {
    /// How the file is compressed.
    pub compression: Compression,
    /// The hash of the file, where the store says it.
    pub file_hash: Option<Hash>,
    /// The size of the file in bytes, where the store says it.
    pub file_size: Option<u64>,
    /// The store's own word for where the file is.
    pub place: String,
}

/// One store that can be asked. Every method may be called any number of times at once.
///
/// `Ok(None)` says "not there"; `Err` says "could not find out". Each future may be dropped at any
/// point: the question may still reach the store, its answer is thrown away. No method waits
/// for ever: what is silent is given up by the bounds in its options.
#[async_trait]
pub trait Upstream: Send + Sync + 'static {
    /// Names the upstream in logs and errors: its URI, without secrets.
    fn name(&self) -> &str;

    /// Follows the state of the standing connection.
    fn link(&self) -> watch::Receiver<Link>;

    /// Gives up waiting between two attempts and connects anew at once, as after a wake-up.
    fn reconnect(&self) {}

    /// Asks for the path with this hash part.
    async fn path_info(&self, hash: StorePathHash) -> Result<Option<PathInfo>, Error>;

    /// Asks for a path that is about to be promised to a client, and keeps it as [`keep`] does.
    ///
    /// The answer counts from after the keeping, so the path cannot go in between. A store that
    /// cannot keep it within a moment answers all the same.
    ///
    /// [`keep`]: Upstream::keep
    async fn kept_path_info(&self, hash: StorePathHash) -> Result<Option<PathInfo>, Error> {
        self.path_info(hash).await
    }

    /// Asks for many paths at once; the answers have the order of the questions.
    ///
    /// An error of one question fails it alone; when the connection breaks, the rest fails too.
    async fn path_infos(&self, paths: &[StorePath]) -> Vec<Result<Option<PathInfo>, Error>>;

    /// Returns who tells whole closures at once, where that is possible just now and worth it.
    ///
    /// `None`: they are fetched level by level, by [`path_infos`](Upstream::path_infos).
    fn closures(&self) -> Option<Arc<dyn Closures>> {
        None
    }

    /// Opens the NAR of a path; `Ok(None)` when the path is gone.
    async fn nar(&self, info: &PathInfo) -> Result<Option<NarStream>, Error>;

    /// Opens the NAR of a path as [`nar`](Upstream::nar) does, and tells whether it is to be hashed.
    async fn open_nar(&self, info: &PathInfo) -> Result<Option<OpenedNar>, Error> {
        Ok(self.nar(info).await?.map(OpenedNar::Unchecked))
    }

    /// Tells how the store keeps a NAR compressed; `Ok(None)`: it does not, or the path is gone.
    async fn encoded_nar(&self, _info: &PathInfo) -> Result<Option<EncodedNar>, Error> {
        Ok(None)
    }

    /// Opens that file at a byte or before it, as it is; `Ok(None)`: it is not there any more.
    ///
    /// Chunks have at most 256 KiB. Nothing of the file is checked, but one that has far more bytes
    /// than its NAR is given up.
    async fn open_encoded(
        &self,
        _info: &PathInfo,
        _nar: &EncodedNar,
        _offset: u64,
    ) -> Result<Option<FilePart>, Error> {
        Ok(None)
    }

    /// Begins a feed of what the store has, as `codec::catalog::wire` writes it.
    ///
    /// `None`: this store does not know it. Whoever drops the feed ends it.
    fn catalog(&self) -> Option<BoxStream<'static, Bytes>> {
        None
    }

    /// Returns how many paths the store has, where it tells of all of them and did so a moment ago.
    fn paths_known(&self) -> Option<usize> {
        None
    }

    /// Tells whether many small NARs come over one connection, so that as many as are wanted may be asked for at once.
    fn shares_connections(&self) -> bool {
        false
    }

    /// Keeps a path from that store's garbage collection for a while; `false`: it is gone.
    async fn keep(&self, path: &StorePath) -> Result<bool, Error>;

    /// Keeps many paths, as [`keep`](Upstream::keep) does each; the answers have their order.
    ///
    /// Some are asked for at once. Dropped, each path may be kept or not.
    async fn keep_many(&self, paths: &[StorePath]) -> Vec<Result<bool, Error>> {
        let mut kept = Vec::with_capacity(paths.len());
        for some in paths.chunks(KEPT_AT_ONCE) {
            kept.extend(join_all(some.iter().map(|path| self.keep(path))).await);
        }
        kept
    }

    /// Returns the decoded build log of a derivation.
    async fn build_log(&self, _derivation: &StorePath) -> Result<Option<Bytes>, Error> {
        Ok(None)
    }

    /// Returns what a content-addressed derivation's output was realised as.
    async fn realisation(&self, _id: &DrvOutput) -> Result<Option<Realisation>, Error> {
        Ok(None)
    }

    /// Returns the same by the derivation's path, as Nix 2.35 and later name it.
    async fn build_trace(&self, _key: &BuildTraceKey) -> Result<Option<BuildTraceEntry>, Error> {
        Ok(None)
    }
}

/// The state of an upstream's standing connection.
#[derive(Clone, Debug)]
pub enum Link {
    /// A connection is being made; questions wait for it.
    Connecting {
        /// When this round of attempts began: at start, after a loss, or after a wake-up.
        since: Instant,
    },
    /// Questions are answered.
    Up {
        /// What answers, for people: `Nix 2.34.8, protocol 1.38`.
        peer: Arc<str>,
    },
    /// The last attempt failed; a further one follows after a pause. Questions fail at once.
    Down {
        /// Why.
        error: Arc<str>,
        /// Pause until the next attempt.
        retry_after: Duration,
    },
}

/// Why an upstream could not tell.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// There is no connection, and none is about to be made.
    #[error("not connected: {0}")]
    Down(Arc<str>),
    /// One more connection was refused where another one stands; a moment later it may be had.
    #[error("refused: {0}")]
    Refused(Arc<str>),
    /// The connection broke while the question was under way.
    #[error("connection lost: {0}")]
    Lost(Arc<str>),
    /// Nothing came for a bounded time.
    #[error("no answer to {question} within {after:?}")]
    TimedOut {
        /// What was asked.
        question: &'static str,
        /// The bound.
        after: Duration,
    },
    /// What comes is too little to be waited for, and would be again.
    #[error("no more than a drip came within {0:?}")]
    Slow(Duration),
    /// The store itself answered with an error; its own words.
    #[error("the store answered: {0}")]
    Remote(Arc<str>),
    /// The peer broke its protocol; the connection is given up.
    #[error("protocol error: {0}")]
    Protocol(Arc<str>),
    /// Somebody wrote to what was being read: nothing that was given rests on it any more.
    #[error("{0} was written to while it was read")]
    Written(Arc<str>),
    /// The store lies in another directory than ours.
    #[error("its {0}")]
    StoreDir(Arc<str>),
    /// The store cannot do this.
    #[error("not supported: {0}")]
    Unsupported(Arc<str>),
}

/// Paths that a store is asked to keep at once where it is asked for each: some ms of its time.
const KEPT_AT_ONCE: usize = 32;
