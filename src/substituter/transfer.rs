//! A NAR request: checked bytes from whoever has them, in the encoding that was asked for.
//!
//! Small NARs are read and checked whole before the first byte is given out; of larger ones the
//! last chunk is held back until size and hash agree.
//!
//! ```text
//! source (who has it) -> relay (next holder at the same byte) -> digest -> encoder
//! ```

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use tokio::sync::OwnedSemaphorePermit;
use tracing::warn;

use crate::codec::compression::{EncodeError, EncoderOptions, Encoding};
use crate::nix::path_info::PathInfo;
use crate::upstream;

use super::ahead::Ahead;
use super::nar_url::NarUrl;
use super::relay::Relay;
use super::shared::Shared;
use super::source::Source;

/// The bounds of transfers.
#[derive(Clone, Debug)]
pub struct Options {
    /// NARs up to this size are read whole before the first byte. Promise 1: 4 MiB.
    pub whole_bytes_max: u64,
    /// KiB that such NARs take together; further ones wait.
    pub whole_kib_max: u32,
    /// Silence, before or within a NAR, after which another holder is taken if there is one.
    pub stall: Duration,
    /// Silence within a NAR after which the last holder is given up, too.
    pub stall_last: Duration,
    /// How NARs are compressed on the fly.
    pub encoder: EncoderOptions,
}

/// A NAR that is being given out.
pub struct Nar {
    /// Size of the NAR in bytes, before compression.
    pub size_bytes: u64,
    /// Its bytes in the encoding that was asked for.
    pub body: NarBody,
}

/// The bytes of a NAR.
pub enum NarBody {
    /// All of them, checked.
    Whole(Bytes),
    /// A checked stream: whoever reads it to its end without an error has the right bytes.
    Stream(BoxStream<'static, Result<Bytes, Error>>),
}

/// Why a transfer was cut.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The last holder broke in the middle.
    #[error("no holder is left after {offset} bytes: {cause}")]
    NoHolderLeft {
        /// NAR bytes that had been read.
        offset: u64,
        /// What the last holder said.
        cause: upstream::Error,
    },
    /// The bytes are not those that the narinfo promised.
    #[error("{upstream}: {cause}")]
    Corrupt {
        /// Where the last of them came from.
        upstream: String,
        /// What did not agree.
        cause: String,
    },
    /// Compressing them failed.
    #[error("cannot be compressed: {0}")]
    Encoder(String),
}

/// Opens the NAR that a URL names; `None` when no holder can give it.
///
/// Dropped, or its stream dropped, the transfer ends and the builder's channel is free.
pub(super) async fn open(shared: &Arc<Shared>, url: &NarUrl) -> Option<Nar> {
    let source = Source::locate(shared, url).await?;
    let size_bytes = source.info.nar_size;
    let body = if let Some(bytes) = Ahead::claim(shared, &source.info, url.encoding).await {
        NarBody::Whole(bytes)
    } else if size_bytes <= shared.options.transfer.whole_bytes_max {
        NarBody::Whole(whole(shared, source, url.encoding).await?)
    } else {
        let checked = Relay::new(source).into_checked().await?;
        NarBody::Stream(match url.encoding {
            Encoding::None => checked,
            encoding => {
                let encoded = shared.encoder.encode_stream(encoding, size_bytes, checked);
                let cut = |error| match error {
                    EncodeError::Source(error) => error,
                    EncodeError::Encoder(error) => Error::Encoder(error.to_string()),
                };
                encoded.map(move |item| item.map_err(cut)).boxed()
            }
        })
    };
    Some(Nar { size_bytes, body })
}

/// Finds the path info of exactly the NAR that a URL names.
pub(super) async fn info(shared: &Arc<Shared>, url: &NarUrl) -> Option<Arc<PathInfo>> {
    Source::locate(shared, url).await.map(|source| source.info)
}

/// Reads, checks and encodes a small NAR once there is room for it in memory.
async fn whole(shared: &Arc<Shared>, source: Source, encoding: Encoding) -> Option<Bytes> {
    let info = Arc::clone(&source.info);
    let kib = u32::try_from(info.nar_size.div_ceil(1024)).unwrap_or(u32::MAX);
    let permits = kib.clamp(1, shared.options.transfer.whole_kib_max);
    let room = Arc::clone(&shared.whole_nars);
    let permit = room.acquire_many_owned(permits).await.ok()?;
    let nar = Relay::new(source).whole().await?;
    match shared.encoder.encode_whole(encoding, nar).await {
        Ok(bytes) => Some(Bytes::from_owner(Held {
            bytes,
            _permit: permit,
        })),
        Err(error) => {
            warn!(path = %info.path, %error, "cannot be compressed");
            None
        }
    }
}

/// A small NAR, perhaps encoded, and its share of the memory for such.
struct Held {
    bytes: Bytes,
    _permit: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}
