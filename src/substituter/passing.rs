//! NARs that pass as the files that their upstreams keep, neither decoded nor encoded for the client.
//!
//! It is done where zstd is asked for and [`super::same_file`] allows it. The file is checked on the side by
//! [`FileCheck`], and its last chunk is held back until the NAR inside and the file are the promised ones. When
//! its source breaks, it goes on at the same byte of the file, see [`super::file_relay`]. Who gave a file that does
//! not fit is not passed again, but decoded, which needs the NAR alone to be right.
//!
//! ```text
//! file (at any holder) ──▶ check ──▶ last chunks held back ──▶ filling | client
//! ```
//!
//! Where several have the file, all chunks with bytes of the NAR's last
//! [`tail_bytes`](super::transfer::Options::tail_bytes) are held back. So when one is wrong at its end, the next
//! holder gives the file anew, and if it repeats what was given, the client gets its end and sees one whole file.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, BoxStream, StreamExt as _};
use tracing::{info, warn};

use crate::cache::nar_name::FileHash;
use crate::codec::chunks;
use crate::codec::compression::Encoding;
use crate::codec::file_check::{FileCheck, FileError};
use crate::codec::keyed_sum::KeyedSum;
use crate::nix::path_info::PathInfo;
use crate::upstream;

use super::file_relay::FileRelay;
use super::member::Member;
use super::nar_url::NarUrl;
use super::same_file::{Holder, holders};
use super::shared::Shared;
use super::source::Source;
use super::transfer::Error;

/// The file of one NAR on its way, from one holder or the next.
pub(super) struct Passing {
    file: FileRelay,
    check: FileCheck,
    /// Checked chunks that nobody got yet.
    held: VecDeque<Held>,
    held_bytes: usize,
    /// Whether there was another holder, so that it is worth it to hold more than one chunk.
    can_mend: bool,
    /// What was given out.
    given: KeyedSum,
    given_bytes: u64,
    /// What a holder repeats of that after a lie, and how much more of it.
    again: Option<(KeyedSum, u64)>,
    /// Who was found not to repeat it.
    differed: Vec<Arc<Member>>,
    /// What was found out about the last that lied.
    lie: Option<Error>,
    /// Whether all is known to be right: what is held can go.
    is_right: bool,
}

/// A chunk that is held back.
struct Held {
    chunk: Bytes,
    /// Whether it has, or comes behind, bytes of the NAR's tail.
    is_tail: bool,
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
        let file = FileRelay::new(shared, info, holders);
        let mut passing = Self {
            check: file.check()?,
            can_mend: file.has_others(),
            file,
            held: VecDeque::new(),
            held_bytes: 0,
            given: KeyedSum::new(),
            given_bytes: 0,
            again: None,
            differed: Vec::new(),
            lie: None,
            is_right: false,
        };
        while passing.held.is_empty() && !passing.is_right {
            passing.read().await.ok()?;
        }
        passing.held.front()?;
        Some(passing)
    }

    /// Returns the hash that the file has if it comes to its end, where it was promised and so is checked.
    pub(super) fn file_hash(&self) -> Option<FileHash> {
        self.check.promise().file_hash.map(FileHash)
    }

    /// Gives the checked file; a reader that gets to its end without an error has all of it.
    pub(super) fn into_stream(self) -> BoxStream<'static, Result<Bytes, Error>> {
        self.file.shared.counters.nar_passed.increment();
        stream::unfold(Some(self), |passing| async move {
            let mut passing = passing?;
            match passing.next().await {
                Ok(Some(chunk)) => Some((Ok(chunk), Some(passing))),
                Ok(None) => None,
                Err(error) => {
                    passing.file.shared.counters.nar_cut.increment();
                    if let Error::NoHolderLeft { .. } = error {
                        warn!(path = %passing.file.info.path, %error, "transfer cut");
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
        self.file.shared.counters.nar_passed.increment();
        // It may wait to be written, and what it grew into for its length is up to twice of it.
        let mut file = Vec::from(file);
        file.shrink_to_fit();
        Some(file.into())
    }

    /// Returns the next chunk that need not be held back, and at the end those that were.
    async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        while !self.may_give() {
            if self.is_right {
                return Ok(None);
            }
            self.read().await?;
        }
        let Some(Held { chunk, .. }) = self.held.pop_front() else {
            return Ok(None);
        };
        self.held_bytes -= chunk.len();
        if self.can_mend {
            self.given.update(&chunk);
            self.given_bytes += chunk.len() as u64;
        }
        Ok(Some(chunk))
    }

    /// Tells whether the first held chunk may go: all is right, or it is neither the last nor near the end.
    fn may_give(&self) -> bool {
        let Some(first) = self.held.front() else {
            return false;
        };
        let bytes_max = self.file.shared.options.transfer.tail_bytes * 2;
        // Padding may make the end longer than the NAR in it.
        let is_too_much = self.held_bytes as u64 > bytes_max;
        self.is_right || (self.held.len() > 1 && (!first.is_tail || is_too_much))
    }

    /// Reads and checks one chunk, which is held; or finds that all was right, or that somebody lied.
    async fn read(&mut self) -> Result<(), Error> {
        let end = self.check.end();
        let chunk = match self.file.next(&end).await {
            Ok(chunk) => chunk,
            // Whoever breaks after a lie leaves the client with the lie.
            Err(error) => return Err(self.lie.take().unwrap_or(error)),
        };
        let Some(mut chunk) = chunk else {
            return match end {
                Err(error) => self.mend(&error),
                Ok(_) if self.again.is_some() => self.pass_over(),
                Ok(_) => {
                    self.prove();
                    Ok(())
                }
            };
        };
        let before = self.check.nar_bytes();
        let mut rest = &*chunk;
        loop {
            match self.check.step(&mut rest) {
                // A few bytes may unpack to gigabytes: others have their turn in between.
                Ok(true) => tokio::task::yield_now().await,
                Ok(false) => break,
                Err(error) => return self.mend(&error),
            }
        }
        if let Some((sum, left)) = &mut self.again {
            let repeated = usize::try_from(*left).unwrap_or(usize::MAX);
            let repeated = chunk.split_to(repeated.min(chunk.len()));
            sum.update(&repeated);
            *left -= repeated.len() as u64;
            if *left == 0 && sum.finish() != self.given.finish() {
                return self.pass_over();
            }
            if *left == 0 {
                self.again = None;
            }
        } else {
            let decoded = self.check.nar_bytes() - before;
            self.file.shared.counters.nar_bytes.add(decoded);
        }
        if !chunk.is_empty() {
            let tail_bytes = self.file.shared.options.transfer.tail_bytes;
            let left = self.file.info.nar_size - self.check.nar_bytes();
            let is_tail = self.can_mend && left < tail_bytes;
            self.hold(Held { chunk, is_tail });
        }
        Ok(())
    }

    /// Holds a chunk; what waits for the end is joined where it is small.
    fn hold(&mut self, Held { chunk, is_tail }: Held) {
        self.held_bytes += chunk.len();
        let apart = match self.held.back_mut() {
            Some(last) if is_tail && last.is_tail => chunks::append(&mut last.chunk, chunk),
            _ => Some(chunk),
        };
        let apart = apart.map(|chunk| Held { chunk, is_tail });
        self.held.extend(apart);
    }

    /// Blames who gave a wrong file, and begins at another; an error when none is left.
    fn mend(&mut self, error: &FileError) -> Result<(), Error> {
        let lie = self.file.blame(error);
        self.file.begin_without_givers();
        self.lie = Some(lie);
        self.begin_anew()
    }

    /// Leaves out one that does not repeat what was given.
    fn pass_over(&mut self) -> Result<(), Error> {
        for member in self.file.begin_without_givers() {
            let upstream = member.upstream.name();
            warn!(upstream, path = %self.file.info.path, "NAR file does not begin with the bytes that were given before");
            self.differed.push(member);
        }
        self.begin_anew()
    }

    fn begin_anew(&mut self) -> Result<(), Error> {
        let Some(check) = self.file.check().filter(|_| self.can_mend) else {
            let cause = upstream::Error::Down("nobody has it".into());
            let (offset, lie) = (self.given_bytes, self.lie.take());
            return Err(lie.unwrap_or(Error::NoHolderLeft { offset, cause }));
        };
        self.check = check;
        self.held.clear();
        self.held_bytes = 0;
        self.again = None;
        if self.given_bytes > 0 {
            self.again = Some((self.given.twin(), self.given_bytes));
            self.file.shared.counters.nar_resumed.increment();
        }
        Ok(())
    }

    /// Lets the last chunks go: all is right, so whoever would not repeat it was not.
    fn prove(&mut self) {
        self.is_right = true;
        self.file.drop_source();
        let (shared, path) = (&self.file.shared, &self.file.info.path);
        for member in self.differed.drain(..) {
            shared.unpassable.insert((path.hash(), member.id), ());
        }
        if let Some(lie) = self.lie.take() {
            info!(%path, %lie, "NAR file was mended by another holder");
        }
    }
}
