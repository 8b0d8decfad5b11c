//! The files of a binary cache, wherever they are: over HTTP, or in a folder.
//!
//! ```text
//! nix-cache-info   <hash>.narinfo   nar/…   log/<drv>   realisations/<id>.doi   build-trace-v2/<drv>/<out>.doi
//! ```
//!
//! Names are the cache's own; what the files hold is read in `binary_cache`.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::BoxStream;
use tokio::sync::watch;
use tokio::time::Instant;

use super::Error;

/// The bytes of a file as they come; an error is the last item. Dropping it ends the transfer.
pub type FileStream = BoxStream<'static, Result<Bytes, Error>>;

/// The rest of a file.
pub struct FilePart {
    /// The byte that comes first; what is before the one that was asked for is the reader's to skip.
    pub begins_at: u64,
    /// The bytes from there to the end of the file.
    pub bytes: FileStream,
}

/// How large a file is, as far as its way is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSize {
    /// Up to some MiB: it may share a connection with others of its kind.
    Small,
    /// Larger: it has a connection of its own.
    Large,
    /// Without an end, and mostly with nothing to say: likewise, and it may come as slowly as it likes.
    Endless,
}

/// Where the files of one cache are.
///
/// Every method may be called at once, its future dropped at any point, and is bounded in time.
#[async_trait]
pub trait CacheFiles: Send + Sync + 'static {
    /// Reads `nix-cache-info`, and says what answers: `nginx/1.22.1, HTTP/2`.
    ///
    /// Unlike the others it is asked for at any time, also while the cache wants to be left alone.
    async fn greet(&self) -> Result<Greeting, Error>;

    /// Reads a small file whole; `None`: it is not there. More bytes than `bytes_max` are an error.
    async fn read(&self, name: &str, bytes_max: usize) -> Result<Option<Bytes>, Error>;

    /// Finds the place that a narinfo means by its `URL`; an error when it must not be followed.
    fn locate(&self, url: &str) -> Result<String, Error>;

    /// Opens a NAR's file at a byte, or before it where it cannot be had in parts; `None`: it is not there.
    async fn open(
        &self,
        place: &str,
        offset: u64,
        size: FileSize,
    ) -> Result<Option<FilePart>, Error>;

    /// Forgets what may have gone bad while nobody looked, such as idle connections.
    fn renew(&self) {}

    /// Follows when bytes of it last came, whatever was asked for; `None`: such files are never silent.
    fn heard(&self) -> Option<watch::Receiver<Option<Instant>>> {
        None
    }

    /// Asks for any answer at all, beside and not behind what is under way.
    async fn pulse(&self) -> Result<(), Error> {
        Ok(())
    }

    /// Tells whether what answers is a muster that tells whole closures, as far as it has said.
    fn tells_closures(&self) -> bool {
        false
    }

    /// Returns how many questions are sensibly asked at once.
    fn questions_max(&self) -> usize;

    /// Tells whether many small files share one connection, as far as what answers has shown.
    fn shares_connections(&self) -> bool {
        false
    }
}

/// The first answer of a cache.
#[derive(Clone, Debug)]
pub struct Greeting {
    /// The text of `nix-cache-info`.
    pub info: Bytes,
    /// What answers, for people; may be empty.
    pub peer: String,
}

/// Reads a stream to its end, if that comes within the bound.
pub(super) async fn whole(
    mut stream: impl futures_util::Stream<Item = Result<Bytes, Error>> + Unpin,
    bytes_max: usize,
) -> Result<Bytes, Error> {
    use futures_util::TryStreamExt as _;
    let mut all = bytes::BytesMut::new();
    while let Some(chunk) = stream.try_next().await? {
        if chunk.len() > bytes_max - all.len() {
            let cause = format!("a file has more than {bytes_max} bytes");
            return Err(Error::Protocol(cause.into()));
        }
        all.extend_from_slice(&chunk);
    }
    Ok(all.freeze())
}

/// How long a cache that said "not now" is left alone where it does not say itself.
pub(super) const PAUSE_MAX: Duration = Duration::from_secs(60);
