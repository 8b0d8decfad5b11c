//! A NAR on its way into a backend: a file that grows, hashed as it is written.
//!
//! The caller writes compressed bytes and has checked the NAR inside them when it commits; the hash and
//! size of the file are made here, but for a hash that the caller checks, too. Others may follow the growing file by [`Fill::reader`] and
//! [`Fill::progress`]. Where the bytes end up is the backend's: it gives each fill a [`Place`].

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;

use crate::nix::path_info::PathInfo;

use super::backend::{Error, Ground, NarFile, Record};
use super::nar_name::FileHash;

/// A NAR that is being taken in.
///
/// Dropped without [`commit`](Self::commit), its file and its reservation are gone, and followers see
/// [`Stage::Failed`].
pub struct Fill {
    file: Arc<File>,
    hash: Digest,
    progress: watch::Sender<Progress>,
    /// `None` once it is committed.
    place: Option<Box<dyn Place>>,
}

/// Where the hash of the file comes from.
enum Digest {
    /// From the bytes, as they are written.
    Made(Sha256),
    /// From the caller.
    Promised(FileHash),
}

/// How far a fill has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes that can be read.
    pub written: u64,
    /// Whether more is to come.
    pub stage: Stage,
}

/// Whether more bytes are to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Yes.
    Growing,
    /// No: all are there and were checked; set before they are durable.
    Complete(NarFile),
    /// No: the rest will never come, or what came was wrong.
    Failed,
}

/// What a backend holds for one fill; dropped, the file and the reservation are gone.
#[async_trait]
pub trait Place: Send + Sync {
    /// Makes sure that the fill may have `size_bytes` in all; it does not wait.
    fn grow(&mut self, size_bytes: u64) -> io::Result<()>;

    /// Hears that writing the file failed, so that it can say so and judge the place.
    fn failed(&mut self, _error: &io::Error) {}

    /// Makes an entry of the whole file; `record.file` is there.
    ///
    /// It comes back when the entry is durable, with the file that is kept now: an earlier one, where
    /// another fill of the same path was faster. Dropped, the work goes on.
    async fn commit(self: Box<Self>, record: Record, narinfo: Bytes) -> Result<NarFile, Error>;
}

impl Fill {
    /// Begins to write to an empty file.
    pub fn new(file: Arc<File>, place: Box<dyn Place>) -> Self {
        let progress = Progress {
            written: 0,
            stage: Stage::Growing,
        };
        Self {
            file,
            hash: Digest::Made(Sha256::new()),
            progress: watch::Sender::new(progress),
            place: Some(place),
        }
    }

    /// Has nothing hashed here: the caller promises that what it commits has this hash, because it hashes it.
    ///
    /// To be said before anything is written.
    pub fn promise(&mut self, hash: FileHash) {
        self.hash = Digest::Promised(hash);
    }

    /// Appends compressed bytes; it blocks for as long as the file system does.
    ///
    /// After an error the fill can only be dropped.
    pub fn write(&mut self, chunk: &[u8]) -> io::Result<()> {
        self.write_all(&[chunk])
    }

    /// Appends several chunks, which are then to be read at one go.
    ///
    /// After an error the fill can only be dropped.
    pub fn write_all(&mut self, chunks: &[impl AsRef<[u8]>]) -> io::Result<()> {
        let Progress { written, stage } = *self.progress.borrow();
        let (Some(place), Stage::Growing) = (&mut self.place, stage) else {
            return Err(io::Error::other("the fill has failed before"));
        };
        let size = |chunk: &_| AsRef::<[u8]>::as_ref(chunk).len() as u64;
        let size_bytes = written + chunks.iter().map(size).sum::<u64>();
        let mut offset = written;
        let mut done = place.grow(size_bytes);
        for chunk in chunks.iter().map(AsRef::as_ref) {
            done = done.and_then(|()| {
                let done = self.file.write_all_at(chunk, offset);
                done.inspect_err(|error| place.failed(error))
            });
            if done.is_ok() {
                self.hash.update(chunk);
                offset += chunk.len() as u64;
            }
        }
        self.progress.send_modify(|progress| match done {
            Ok(()) => progress.written = size_bytes,
            Err(_) => progress.stage = Stage::Failed,
        });
        done
    }

    /// Returns how far it has come, now and later; the last value stays.
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// Returns the growing file, to be read by `pread` up to [`Progress::written`].
    ///
    /// It stays readable whatever becomes of the fill.
    pub fn reader(&self) -> Arc<File> {
        Arc::clone(&self.file)
    }

    /// Returns the bytes that were written so far.
    pub fn written(&self) -> u64 {
        self.progress.borrow().written
    }

    /// Keeps the NAR, whose hash and size the caller has checked against `info`.
    ///
    /// `narinfo` writes the signed text, without grounds, for the file that it is given; it must name
    /// [`NarName::url`](super::nar_name::NarName::url). `info` carries foreign signatures alone. What
    /// comes back is the file that is kept: an earlier one, if another fill of this path was faster.
    /// It resolves when the entry is durable; nobody who serves needs to wait for it. Dropped once it
    /// was polled, the commit goes on.
    pub async fn commit(
        mut self,
        info: PathInfo,
        grounds: Vec<Ground>,
        narinfo: impl FnOnce(&NarFile) -> Bytes + Send,
    ) -> Result<NarFile, Error> {
        let Progress { written, stage } = *self.progress.borrow();
        let failed = || Error::Io {
            what: "a fill that failed cannot be committed".to_owned(),
            source: io::ErrorKind::InvalidData.into(),
        };
        if stage != Stage::Growing {
            return Err(failed());
        }
        let place = self.place.take().ok_or_else(failed)?;
        let file = NarFile {
            hash: self.hash.finish(),
            size_bytes: written,
        };
        let narinfo = narinfo(&file);
        self.progress
            .send_modify(|progress| progress.stage = Stage::Complete(file));
        let record = Record {
            info,
            grounds,
            file: Some(file),
        };
        place.commit(record, narinfo).await
    }
}

impl Digest {
    fn update(&mut self, chunk: &[u8]) {
        if let Self::Made(sha256) = self {
            sha256.update(chunk);
        }
    }

    fn finish(&self) -> FileHash {
        match self {
            Self::Made(sha256) => FileHash(sha256.clone().finalize().into()),
            Self::Promised(hash) => *hash,
        }
    }
}

impl Drop for Fill {
    fn drop(&mut self) {
        self.progress.send_modify(|progress| {
            if progress.stage == Stage::Growing {
                progress.stage = Stage::Failed;
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nix::hash::NarHash;

    /// A place that keeps whatever it is told.
    struct Anywhere;

    #[async_trait]
    impl Place for Anywhere {
        fn grow(&mut self, _: u64) -> io::Result<()> {
            Ok(())
        }

        async fn commit(self: Box<Self>, record: Record, _: Bytes) -> Result<NarFile, Error> {
            Ok(record.file.unwrap())
        }
    }

    async fn kept(promise: Option<FileHash>) -> NarFile {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let mut fill = Fill::new(file, Box::new(Anywhere));
        if let Some(hash) = promise {
            fill.promise(hash);
        }
        fill.write(b"some ").unwrap();
        fill.write_all(&["by", "tes"]).unwrap();
        let info = PathInfo {
            path: "00000000000000000000000000000000-a".parse().unwrap(),
            nar_hash: NarHash::of(b""),
            nar_size: 0,
            references: vec![],
            deriver: None,
            signatures: vec![],
            ca: None,
        };
        fill.commit(info, vec![], |_| Bytes::new()).await.unwrap()
    }

    #[tokio::test]
    async fn the_hash_is_that_of_the_bytes_or_the_promised_one() {
        let NarFile { hash, size_bytes } = kept(None).await;
        assert_eq!((hash.0, size_bytes), (NarHash::of(b"some bytes").0, 10));
        let checked_elsewhere = FileHash([7; 32]);
        assert_eq!(kept(Some(checked_elsewhere)).await.hash, checked_elsewhere);
    }
}
