//! A NAR request: checked bytes from whoever has them, in the encoding that was asked for.
//!
//! Small NARs are read and checked whole before the first byte is given out; of larger ones the
//! last bytes are held back until size and hash agree, see [`super::sound`].
//!
//! What is kept on disk is served as the file that it is. Everything else is kept on its way, see
//! [`super::filling`], but what is asked for uncompressed and lies in this machine's own store: a copy
//! of it would save nothing.
//!
//! ```text
//! source (who has it) ┬─> relay (next holder at the same byte) -> sound -> filling | encoder
//!                     └─> passing (the upstream's own zstd file, checked) -> filling
//! ```

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use tracing::warn;

use crate::cache::memory::Entry;
use crate::cache::nar_name::{FileHash, NarName};
use crate::codec::compression::{EncodeError, EncoderOptions, Encoding};
use crate::upstream;

use super::ahead::Ahead;
use super::filling::{self, Begun};
use super::kept::{KEPT, KeptNar};
use super::lent::Lending;
use super::nar_url::NarUrl;
use super::passing::Passing;
use super::query::{self, Wanted};
use super::relay::Relay;
use super::shared::Shared;
use super::source::Source;
use super::write_behind::WriteBehind;

/// The bounds of transfers.
#[derive(Clone, Debug)]
pub struct Options {
    /// NARs up to this size are read whole before the first byte. Promise 1: 4 MiB.
    pub whole_bytes_max: u64,
    /// KiB that such NARs take together; further ones wait, and clients that stopped make room.
    pub whole_kib_max: u32,
    /// Last bytes of a larger NAR that are held back until hash and size agree, so that another holder can give
    /// them anew; as much memory as each transfer takes at its end, twice that where a file passes as it is.
    /// 1 MiB: a wrong end is known with the last byte, so a client at 1 Gbit/s waits 8 ms for what it held, and
    /// 64 clients that stop reading there hold no more than the small NARs do.
    pub tail_bytes: u64,
    /// Silence, before or within a NAR, after which another holder is taken if there is one.
    pub stall: Duration,
    /// Silence within a NAR after which the last holder is given up, too.
    pub stall_last: Duration,
    /// For all holders to say which file they have, and all upstreams whether they have a large NAR, too, before it may
    /// pass as a file; the transfer of a large one takes longer in any case.
    pub others_within: Duration,
    /// For how long a last holder that lets nobody in, though it answers questions, is tried again.
    pub refusal: Duration,
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
    /// The same, piece by piece.
    Checked {
        /// The pieces; an error only if the NAR made room for others and is not to be had again.
        stream: BoxStream<'static, Result<Bytes, Error>>,
        /// Bytes in all.
        length: u64,
    },
    /// A checked stream: whoever reads it to its end without an error has the right bytes.
    Stream(BoxStream<'static, Result<Bytes, Error>>),
    /// A kept file.
    File(KeptNar),
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

/// How much of a NAR a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// All of it.
    Whole,
    /// A part, as of a transfer that it resumes.
    Part,
}

/// Opens the NAR that a URL names; `None` when no holder can give it.
///
/// A part of a file that is not kept any more is given only if the very same file can be made again:
/// then that is done first. Dropped, or its stream dropped, the transfer ends and the builder's channel is
/// free, unless it is being kept.
pub(super) async fn open(shared: &Arc<Shared>, url: &NarUrl, extent: Extent) -> Option<Nar> {
    let mut entry = query::entry(shared, url.path_hash, Wanted::Nar).await?;
    match kept(shared, url, &entry).await {
        Kept::As(nar) => return Some(nar),
        // What is known besides, so that it is kept anew.
        Kept::NotAnyMore => entry = query::entry(shared, url.path_hash, Wanted::Nar).await?,
        Kept::Otherwise => {}
    }
    let source = Source::of_entry(shared, url, &entry).await?;
    if extent == Extent::Part && url.file_hash.is_some() {
        let made_again = keep_first(shared, source, url).await;
        return match made_again {
            Some(nar) => Some(nar),
            None => begin(shared, Source::of_entry(shared, url, &entry).await?, url).await,
        };
    }
    begin(shared, source, url).await
}

/// Begins to read a NAR that is not served as a file.
async fn begin(shared: &Arc<Shared>, source: Source, url: &NarUrl) -> Option<Nar> {
    let size_bytes = source.info.nar_size;
    let body = if let Some(bytes) = Ahead::claim(shared, &source.info, url.encoding).await {
        NarBody::Whole(bytes)
    } else if size_bytes <= shared.options.transfer.whole_bytes_max {
        whole(shared, source, url).await?
    } else if let Some(filling) = shared.fillings.running(&source.info) {
        NarBody::Stream(filling.give(shared, url, None))
    } else if source.is_kept() || (source.is_here() && url.encoding == Encoding::None) {
        let checked = Checked::Nar(Relay::new(source).into_checked().await?);
        NarBody::Stream(checked.encoded(shared, url.encoding, size_bytes))
    } else {
        match filling::begin(source, url).await? {
            Begun::Kept(stream, _) => NarBody::Stream(stream),
            Begun::Direct(checked) => {
                NarBody::Stream(checked.encoded(shared, url.encoding, size_bytes))
            }
        }
    };
    Some(Nar { size_bytes, body })
}

/// Opens a NAR without keeping it, in the encoding of the URL and made in this way.
pub(super) async fn directly(
    shared: &Arc<Shared>,
    url: &NarUrl,
    form: Form,
) -> Option<BoxStream<'static, Result<Bytes, Error>>> {
    let source = Source::locate(shared, url).await?;
    let nar_size = source.info.nar_size;
    let checked = match form {
        Form::Nar => Checked::Nar(Relay::new(source).into_checked().await?),
        Form::File => Checked::passing(Passing::begin(&source, url).await?),
    };
    Some(checked.encoded(shared, url.encoding, nar_size))
}

/// A NAR whose first bytes came, checked on its way.
pub(super) enum Checked {
    /// The NAR itself.
    Nar(BoxStream<'static, Result<Bytes, Error>>),
    /// The file that an upstream keeps it in, in the encoding that was asked for.
    File {
        stream: BoxStream<'static, Result<Bytes, Error>>,
        /// What the stream has if it comes to its end, where that is known.
        hash: Option<FileHash>,
    },
}

/// In which form a NAR is taken from its holders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// See [`Checked::Nar`].
    Nar,
    /// See [`Checked::File`].
    File,
}

impl Checked {
    /// Opens a NAR in the form that costs less; `None` when no holder gives a first byte.
    pub(super) async fn open(source: Source, url: &NarUrl) -> Option<Self> {
        match Passing::begin(&source, url).await {
            Some(passing) => Some(Self::passing(passing)),
            None => Relay::new(source).into_checked().await.map(Self::Nar),
        }
    }

    fn passing(passing: Passing) -> Self {
        Self::File {
            hash: passing.file_hash(),
            stream: passing.into_stream(),
        }
    }

    pub(super) fn form(&self) -> Form {
        match self {
            Self::Nar(_) => Form::Nar,
            Self::File { .. } => Form::File,
        }
    }

    fn encoded(
        self,
        shared: &Shared,
        encoding: Encoding,
        nar_size: u64,
    ) -> BoxStream<'static, Result<Bytes, Error>> {
        match self {
            Self::File { stream, .. } => stream,
            Self::Nar(nar) if encoding == Encoding::None => nar,
            Self::Nar(nar) => encode(shared, encoding, nar_size, nar),
        }
    }
}

/// Opens the kept file of a NAR, where its bytes are what the URL means and as they were checked.
async fn kept(shared: &Shared, url: &NarUrl, entry: &Entry) -> Kept {
    let Some((name, here)) = kept_name(url, entry).zip(shared.kept.as_ref()) else {
        return Kept::Otherwise;
    };
    let proven = match KeptNar::open(&here.backend, name) {
        Some(opened) => opened.proven(&here.proving).await,
        None => None,
    };
    let Some(kept) = proven else {
        shared.forget_holder(url.path_hash, url.nar_hash, KEPT);
        return Kept::NotAnyMore;
    };
    shared.counters.nar_kept.increment();
    Kept::As(Nar {
        size_bytes: kept.nar.size_bytes,
        body: NarBody::File(kept),
    })
}

/// Whether a NAR is kept as the file that a URL means.
enum Kept {
    /// This one.
    As(Nar),
    /// It was, but the file is not there or not right.
    NotAnyMore,
    /// Not, or in another form.
    Otherwise,
}

/// Names the kept file of a NAR, where its bytes are what the URL means.
fn kept_name(url: &NarUrl, entry: &Entry) -> Option<NarName> {
    let file = entry.file().filter(|_| entry.nar_hash == url.nar_hash)?;
    if url.encoding != Encoding::Zstd || url.file_hash.is_some_and(|hash| hash != file.hash) {
        return None;
    }
    Some(NarName {
        path_hash: url.path_hash,
        nar_hash: url.nar_hash,
        file_hash: file.hash,
    })
}

/// Keeps a NAR whole before any of it is given; `None` where that is not the file that the URL names.
async fn keep_first(shared: &Arc<Shared>, source: Source, url: &NarUrl) -> Option<Nar> {
    let info = Arc::clone(&source.info);
    let (filling, _client) = match shared.fillings.running(&info) {
        Some(filling) => (Arc::clone(&filling), filling.give(shared, url, None)),
        None => match filling::begin(source, url).await? {
            Begun::Kept(stream, filling) => (filling, stream),
            Begun::Direct(_) => return None,
        },
    };
    filling.kept().await?;
    let entry = query::entry(shared, url.path_hash, Wanted::Nar).await?;
    match kept(shared, url, &entry).await {
        Kept::As(nar) => Some(nar),
        Kept::NotAnyMore | Kept::Otherwise => None,
    }
}

/// Says how large the answer is and whether parts of it can be asked for, without opening it.
pub(super) async fn head(shared: &Arc<Shared>, url: &NarUrl) -> Option<Head> {
    let entry = query::entry(shared, url.path_hash, Wanted::Nar).await?;
    let opened = kept_name(url, &entry).zip(shared.kept.as_ref());
    if let Some(kept) = opened.and_then(|(name, here)| KeptNar::open(&here.backend, name)) {
        return Some(Head {
            length: Some(kept.nar.size_bytes),
            in_parts: url.file_hash.is_some(),
        });
    }
    let info = Source::of_entry(shared, url, &entry).await?.info;
    let plain = url.encoding == Encoding::None;
    Some(Head {
        length: plain.then_some(info.nar_size),
        in_parts: plain,
    })
}

/// What a NAR's answer would be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Bytes of the body, where they are known beforehand.
    pub length: Option<u64>,
    /// Whether the body can be had in parts.
    pub in_parts: bool,
}

/// Encodes a checked NAR on its way.
pub(super) fn encode(
    shared: &Shared,
    encoding: Encoding,
    nar_size: u64,
    nar: BoxStream<'static, Result<Bytes, Error>>,
) -> BoxStream<'static, Result<Bytes, Error>> {
    shared.counters.nar_encoded.increment();
    let encoded = shared.encoder.encode_stream(encoding, nar_size, nar);
    let cut = |error| match error {
        EncodeError::Source(error) => error,
        EncodeError::Encoder(error) => Error::Encoder(error.to_string()),
    };
    encoded.map(move |item| item.map_err(cut)).boxed()
}

/// Reads, checks and encodes a small NAR once there is room for it in memory.
async fn whole(shared: &Arc<Shared>, source: Source, url: &NarUrl) -> Option<NarBody> {
    let room = shared.lending.room(source.info.nar_size).await?;
    let bytes = read_shared(shared, source, *url).await?;
    Some(Lending::lend(shared, url, bytes, room))
}

/// Reads, checks and encodes a small NAR once for all who ask for it just now.
async fn read_shared(shared: &Arc<Shared>, source: Source, url: NarUrl) -> Option<Bytes> {
    let held = Arc::clone(shared);
    let read = || async move { read_whole(&held, source, &url).await };
    shared.small_nars.join(url, read).await?
}

/// Reads, checks and encodes a small NAR, and has it kept, unless it waits for that already; its memory is the
/// caller's to bound.
pub(super) async fn read_whole(shared: &Shared, source: Source, url: &NarUrl) -> Option<Bytes> {
    if let Some(bytes) = shared.write_behind.get(url) {
        return Some(bytes);
    }
    if let Some(passing) = Passing::begin(&source, url).await
        && let Some(file) = passing.whole().await
    {
        WriteBehind::keep(&source, file.clone(), Form::File);
        return Some(file);
    }
    let keep = !source.is_kept() && (url.encoding != Encoding::None || !source.is_here());
    let (nar, source) = Relay::new(source).whole().await?;
    if url.encoding != Encoding::None {
        shared.counters.nar_encoded.increment();
    }
    match shared.encoder.encode_whole(url.encoding, nar.clone()).await {
        Ok(bytes) => {
            if keep {
                match url.encoding {
                    Encoding::Zstd => WriteBehind::keep(&source, bytes.clone(), Form::File),
                    _ => WriteBehind::keep(&source, nar, Form::Nar),
                }
            }
            Some(bytes)
        }
        Err(error) => {
            warn!(path = %source.info.path, %error, "cannot be compressed");
            None
        }
    }
}
