//! NARs that pass as the files that their upstreams keep, neither decoded nor encoded for the client.
//!
//! It is done where zstd is asked for and [`super::same_file`] allows it. The file is checked on the side by
//! [`FileCheck`], and its last chunk is held back until the NAR inside and the file are the promised ones. When
//! its source breaks, it goes on at the same byte of the file: at the same place by `Range`, else at the next
//! holder's. Who gave a file that does not fit is not passed again, but decoded, which needs the NAR alone to
//! be right.
//!
//! ```text
//! file (at any holder) ──▶ check ──▶ one chunk held back ──▶ filling | client
//! ```

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use futures_util::stream::{self, BoxStream};
use tokio::time::{sleep, timeout};
use tracing::warn;

use crate::cache::nar_name::FileHash;
use crate::codec::compression::Encoding;
use crate::codec::file_check::{End, FileCheck, FileError, Promise};
use crate::nix::path_info::PathInfo;
use crate::upstream::cache_files::FilePart;
use crate::upstream::{self, NarStream};

use super::berth::Berth;
use super::member::Member;
use super::nar_url::NarUrl;
use super::now;
use super::same_file::{Holder, file_hash, holders};
use super::shared::Shared;
use super::source::Source;
use super::transfer::Error;

/// The file of one NAR on its way, from one holder or the next.
pub(super) struct Passing {
    shared: Arc<Shared>,
    info: Arc<PathInfo>,
    /// Who may give it, the next to be asked first.
    holders: Vec<Holder>,
    /// Where the bytes come from, while somebody asks for more.
    current: Option<(Arc<Member>, NarStream)>,
    /// Where that is left until somebody does.
    berth: Arc<Berth>,
    check: FileCheck,
    /// Bytes of the file that came.
    offset: u64,
    /// Bytes that the current source repeats.
    skip: u64,
    /// The last chunk that was checked.
    held: Option<Bytes>,
    /// Who gave the bytes so far.
    givers: Vec<Arc<Member>>,
    /// Since when nobody has given a further byte, and how often holders were asked meanwhile.
    broken: Option<(Instant, usize)>,
    opened: usize,
    cause: upstream::Error,
}

impl Passing {
    /// Begins to pass a NAR on; `None` when that may not be done, or no holder gives a right first chunk.
    ///
    /// Dropped, the transfer ends.
    pub(super) fn begin(
        source: &Source,
        url: &NarUrl,
    ) -> impl Future<Output = Option<Self>> + Send + use<> {
        let may_be = url.encoding == Encoding::Zstd && !source.is_here();
        let known = source.known_members().filter(|_| may_be);
        let (shared, info) = (Arc::clone(&source.shared), Arc::clone(&source.info));
        let wanted = url.file_hash;
        async move {
            let holders = holders(&shared, &info, known?, wanted).await?;
            Self::of(shared, info, holders).await
        }
    }

    /// Reads a first chunk.
    async fn of(shared: Arc<Shared>, info: Arc<PathInfo>, holders: Vec<Holder>) -> Option<Self> {
        let first = holders.first()?;
        let promise = Promise {
            nar_hash: info.nar_hash,
            nar_size: info.nar_size,
            file_hash: file_hash(&first.nar),
            file_size: first.nar.file_size,
        };
        let check = FileCheck::new(first.nar.compression, promise)?;
        let mut passing = Self {
            berth: shared.berths.berth(),
            shared,
            info,
            holders,
            current: None,
            check,
            offset: 0,
            skip: 0,
            held: None,
            givers: Vec::new(),
            broken: None,
            opened: 0,
            cause: upstream::Error::Down("nobody has it".into()),
        };
        passing.held = passing.checked_chunk().await.ok()?;
        passing.held.as_ref()?;
        Some(passing)
    }

    /// Returns the hash that the file has if it comes to its end, where it was promised and so is checked.
    pub(super) fn file_hash(&self) -> Option<FileHash> {
        self.check.promise().file_hash.map(FileHash)
    }

    /// Gives the checked file; a reader that gets to its end without an error has all of it.
    pub(super) fn into_stream(self) -> BoxStream<'static, Result<Bytes, Error>> {
        self.shared.counters.nar_passed.increment();
        stream::unfold(Some(self), |passing| async move {
            let mut passing = passing?;
            match passing.next().await {
                Ok(Some(chunk)) => Some((Ok(chunk), Some(passing))),
                Ok(None) => None,
                Err(error) => {
                    passing.shared.counters.nar_cut.increment();
                    if let Error::NoHolderLeft { .. } = error {
                        warn!(path = %passing.info.path, %error, "transfer cut");
                    }
                    Some((Err(error), None))
                }
            }
        })
        .boxed()
    }

    /// Reads the whole file, which is small: at most what a NAR of its size can take.
    pub(super) async fn whole(mut self) -> Option<Bytes> {
        let mut file = BytesMut::new();
        while let Some(chunk) = self.next().await.ok()? {
            file.extend_from_slice(&chunk);
        }
        self.shared.counters.nar_passed.increment();
        Some(file.freeze())
    }

    /// Returns the chunk before the one that comes now, and at the end the last.
    async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        if self.held.is_none() {
            return Ok(None);
        }
        let chunk = self.checked_chunk().await?;
        Ok(std::mem::replace(&mut self.held, chunk))
    }

    /// Reads and checks one chunk; `None` behind the last of a file that is right.
    async fn checked_chunk(&mut self) -> Result<Option<Bytes>, Error> {
        self.current = self.berth.take_back();
        let Some(chunk) = self.chunk().await? else {
            return Ok(None);
        };
        if let Some(current) = self.current.take() {
            self.berth.leave(current);
        }
        let before = self.check.nar_bytes();
        let mut rest = &*chunk;
        loop {
            match self.check.step(&mut rest) {
                // A few bytes may unpack to gigabytes: others have their turn in between.
                Ok(true) => tokio::task::yield_now().await,
                Ok(false) => break,
                Err(error) => return Err(self.blame(&error)),
            }
        }
        let decoded = self.check.nar_bytes() - before;
        self.shared.counters.nar_bytes.add(decoded);
        Ok(Some(chunk))
    }

    /// Reads one chunk that was not there before, wherever it can be had; `None` at the end.
    async fn chunk(&mut self) -> Result<Option<Bytes>, Error> {
        loop {
            // Too short a file is known as such by its end alone.
            let whole = matches!(self.check.end(), Ok(End::Whole));
            let stall = self.silence_max();
            let Some((_, bytes)) = &mut self.current else {
                if whole {
                    return Ok(None);
                }
                self.open().await?;
                continue;
            };
            let error = match timeout(stall, bytes.next()).await {
                Ok(Some(Ok(chunk))) => match self.advance(chunk) {
                    Some(fresh) => return Ok(Some(fresh)),
                    None => continue,
                },
                // All is there: what does not end, or ends badly, does no harm.
                _ if whole => return Ok(None),
                Ok(Some(Err(error))) => error,
                Ok(None) => match self.check.end() {
                    Ok(_) => upstream::Error::Lost("it ended early".into()),
                    Err(error) => return Err(self.blame(&error)),
                },
                Err(_) => {
                    // Not the same again, if there is another.
                    self.broken.get_or_insert((now(), 1));
                    upstream::Error::TimedOut {
                        question: "NAR",
                        after: stall,
                    }
                }
            };
            self.drop_current(error);
        }
    }

    /// For how long a holder may say nothing before it is asked anew, or another.
    fn silence_max(&self) -> Duration {
        let options = &self.shared.options.transfer;
        match self.holders.len() {
            // In time for a second try.
            0 | 1 => options.stall_last / 2,
            _ => options.stall,
        }
    }

    /// Counts a chunk and cuts off what came before.
    fn advance(&mut self, mut chunk: Bytes) -> Option<Bytes> {
        let repeated = usize::try_from(self.skip)
            .unwrap_or(usize::MAX)
            .min(chunk.len());
        self.skip -= repeated as u64;
        let _ = chunk.split_to(repeated);
        if chunk.is_empty() {
            return None;
        }
        self.offset += chunk.len() as u64;
        self.broken = None;
        if let Some((member, _)) = &self.current
            && self.givers.last().is_none_or(|last| last.id != member.id)
        {
            if !self.givers.is_empty() {
                self.shared.counters.nar_resumed.increment();
            }
            self.givers.push(Arc::clone(member));
        }
        Some(chunk)
    }

    fn drop_current(&mut self, error: upstream::Error) {
        if let Some((member, _)) = self.current.take() {
            let (upstream, offset) = (member.upstream.name(), self.offset);
            warn!(upstream, path = %self.info.path, offset, %error, "NAR file broke off, it is asked for from there");
        }
        self.cause = error;
    }

    /// Opens the file where it broke off: at the holder that had it, then in turn at all.
    ///
    /// A round that brought nothing is followed by a pause, until nobody has given anything for as long
    /// as a last holder may be silent.
    async fn open(&mut self) -> Result<(), Error> {
        let patience = self.shared.options.transfer.stall_last;
        let begun = now();
        let (since, tries) = *self.broken.get_or_insert((begun, 0));
        self.broken = Some((since, tries + 1));
        let late = begun.saturating_duration_since(since) >= patience;
        let all_tried = tries >= self.holders.len();
        // Of what was not begun nobody waits for the end.
        let lost = all_tried && (late || self.offset == 0);
        if self.holders.is_empty() || lost || self.opened >= OPENED_MAX {
            return Err(Error::NoHolderLeft {
                offset: self.offset,
                cause: self.cause.clone(),
            });
        }
        if tries > 0 {
            self.holders.rotate_left(1);
            if tries.is_multiple_of(self.holders.len()) {
                sleep(PAUSE).await;
            }
        }
        let Some(Holder { member, nar }) = self.holders.first() else {
            return Ok(());
        };
        let (shared, info) = (&self.shared, &self.info);
        let question = async {
            tokio::select! {
                opened = member.upstream.open_encoded(info, nar, self.offset) => opened,
                () = member.sickness() => Err(upstream::Error::Down("it is sick".into())),
                never = shared.berths.make_room(member.id) => match never {},
            }
        };
        let after = self.silence_max();
        let timed_out = upstream::Error::TimedOut {
            question: "NAR",
            after,
        };
        let opened = timeout(after, question).await;
        let opened = opened.unwrap_or(Err(timed_out));
        let member = Arc::clone(member);
        match member.note(opened) {
            Ok(Some(FilePart { begins_at, bytes })) if begins_at <= self.offset => {
                self.opened += 1;
                self.skip = self.offset - begins_at;
                let bytes = member.figures.count(bytes);
                self.current = Some((member, bytes));
            }
            Ok(_) => {
                self.holders.remove(0);
            }
            Err(error) => {
                let for_good = matches!(
                    error,
                    upstream::Error::Unsupported(_)
                        | upstream::Error::Protocol(_)
                        | upstream::Error::StoreDir(_)
                );
                if for_good {
                    self.holders.remove(0);
                }
                self.cause = error;
            }
        }
        Ok(())
    }

    /// Counts a wrong file against those who gave it, and returns what the client's cut is told as.
    ///
    /// One that alone gave a wrong NAR is not asked for it again for a while. Else the file alone may be wrong,
    /// or its parts not of one file: then its NARs are not passed, but decoded.
    fn blame(&self, error: &FileError) -> Error {
        let (shared, hash) = (&self.shared, self.info.path.hash());
        let nar_is_wrong = matches!(
            error,
            FileError::NarLong { .. } | FileError::NarMismatch { .. }
        );
        shared.counters.nar_corrupt.increment();
        let mut names = Vec::new();
        for member in &self.givers {
            member.refused.fetch_add(1, Ordering::Relaxed);
            shared.unpassable.insert((hash, member.id), ());
            if nar_is_wrong && self.givers.len() == 1 {
                shared.corrupt.insert((hash, member.id), ());
                shared.forget_holder(hash, self.info.nar_hash, member.id);
            }
            names.push(member.upstream.name());
        }
        let (upstream, cause) = (names.join(", "), error.to_string());
        warn!(upstream, path = %self.info.path, cause, "NAR file does not fit its narinfo, nothing of it is kept");
        Error::Corrupt { upstream, cause }
    }
}

/// Between two rounds over all holders.
const PAUSE: Duration = Duration::from_millis(250);

/// A file that breaks off more often than this is given up, however much comes each time.
const OPENED_MAX: usize = 100;
