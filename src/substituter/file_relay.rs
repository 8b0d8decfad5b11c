//! The file of one NAR, unchecked, from one holder after the other.
//!
//! All of them have the very same file, see [`super::same_file`]. When a source breaks, the file goes on at the same
//! byte: at the same place by `Range`, else at the next holder's. What is made of the bytes is told by
//! [`super::passing`].

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt as _;
use tokio::time::{sleep, timeout};
use tracing::warn;

use crate::codec::file_check::{End, FileCheck, FileError, Promise};
use crate::nix::path_info::PathInfo;
use crate::upstream::cache_files::FilePart;
use crate::upstream::{self, NarStream};

use super::berth::{Berth, Giver};
use super::member::Member;
use super::now;
use super::same_file::{Holder, file_hash};
use super::shared::Shared;
use super::transfer::Error;

/// The bytes of one file.
pub(super) struct FileRelay {
    pub(super) shared: Arc<Shared>,
    pub(super) info: Arc<PathInfo>,
    /// Who may give it, the next to be asked first.
    holders: Vec<Holder>,
    /// Where the bytes come from, while somebody asks for more.
    current: Option<(Arc<Member>, NarStream)>,
    /// Where that is left until somebody does.
    berth: Arc<Berth<(Arc<Member>, NarStream)>>,
    /// Bytes of the file that came.
    offset: u64,
    /// Bytes that the current source repeats.
    skip: u64,
    /// Who gave the bytes so far.
    givers: Vec<Arc<Member>>,
    /// Since when nobody has given a further byte, and how often holders were asked meanwhile.
    broken: Option<(Instant, usize)>,
    opened: usize,
    cause: upstream::Error,
}

impl FileRelay {
    /// Begins with the first holder.
    pub(super) fn new(shared: Arc<Shared>, info: Arc<PathInfo>, holders: Vec<Holder>) -> Self {
        Self {
            berth: shared.berths.berth(),
            shared,
            info,
            holders,
            current: None,
            offset: 0,
            skip: 0,
            givers: Vec::new(),
            broken: None,
            opened: 0,
            cause: upstream::Error::Down("nobody has it".into()),
        }
    }

    /// Begins the check of what the next holder has; `None` when none is left.
    pub(super) fn check(&self) -> Option<FileCheck> {
        let Holder { nar, .. } = self.holders.first()?;
        let promise = Promise {
            nar_hash: self.info.nar_hash,
            nar_size: self.info.nar_size,
            file_hash: file_hash(nar),
            file_size: nar.file_size,
        };
        FileCheck::new(nar.compression, promise)
    }

    /// Tells whether another could give the file anew.
    pub(super) fn has_others(&self) -> bool {
        self.holders.len() > 1
    }

    /// Ends the current source.
    pub(super) fn drop_source(&mut self) {
        drop(self.berth.take_back());
        self.current = None;
    }

    /// Begins at the first byte again, without those that have given any, who come back.
    pub(super) fn begin_without_givers(&mut self) -> Vec<Arc<Member>> {
        self.drop_source();
        (self.offset, self.skip, self.broken) = (0, 0, None);
        let givers = std::mem::take(&mut self.givers);
        let gave = |holder: &Holder| givers.iter().any(|giver| giver.id == holder.member.id);
        self.holders.retain(|holder| !gave(holder));
        givers
    }

    /// Reads one chunk that was not there before, wherever it can be had; `None` at the end, unless that is early.
    ///
    /// `end` is what the check says of an end here.
    pub(super) async fn next(
        &mut self,
        end: &Result<End, FileError>,
    ) -> Result<Option<Bytes>, Error> {
        self.current = self.berth.take_back();
        let chunk = self.chunk(end).await?;
        if let Some(current) = self.current.take() {
            self.berth.leave(Giver::Member(current.0.id), current);
        }
        Ok(chunk)
    }

    async fn chunk(&mut self, end: &Result<End, FileError>) -> Result<Option<Bytes>, Error> {
        // Too short a file is known as such by its end alone.
        let whole = matches!(end, Ok(End::Whole));
        loop {
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
                Ok(None) => match end {
                    Ok(_) => upstream::Error::Lost("it ended early".into()),
                    Err(_) => {
                        self.name_who_gave_nothing();
                        return Ok(None);
                    }
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

    /// Has an empty file be somebody's: else nobody is left out of those that are asked for it anew.
    fn name_who_gave_nothing(&mut self) {
        if self.givers.is_empty()
            && let Some((member, _)) = &self.current
        {
            self.givers.push(Arc::clone(member));
        }
    }

    fn drop_current(&mut self, error: upstream::Error) {
        if let Some((member, _)) = self.current.take() {
            let (upstream, offset) = (member.upstream.name(), self.offset);
            warn!(upstream, path = %self.info.path, offset, %error, "NAR file broke off, it is asked for from there");
            if matches!(error, upstream::Error::Slow(_)) {
                // Each time a few bytes would come, and it would never be late.
                self.holders.retain(|holder| holder.member.id != member.id);
            }
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
                never = shared.berths.make_room_at(member) => match never {},
            }
        };
        let after = self.silence_max();
        let opened = timeout(after, question).await;
        let member = Arc::clone(member);
        let opened = match opened {
            Ok(opened) => member.note(opened),
            // Other NARs may have all its turns, so this says nothing of its health.
            Err(_) => Err(upstream::Error::TimedOut {
                question: "NAR",
                after,
            }),
        };
        match opened {
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
    pub(super) fn blame(&self, error: &FileError) -> Error {
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
