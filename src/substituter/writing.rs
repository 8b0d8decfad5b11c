//! Writing a NAR's file beside its reading: what comes while a batch is written makes the next batch.
//!
//! So the first chunk is written at once, and a busy machine changes threads once for a batch and not for each
//! chunk. What is written can be had from [`Recent`] at the same time.
//!
//! ```text
//! file ──▶ gathered, at most 1 MiB and a chunk ──▶ [ spawn_blocking: write, hash ] ──▶ progress
//! ```

use std::future::pending;
use std::sync::Arc;

use bytes::Bytes;
use tokio::task::{JoinHandle, spawn_blocking};

use crate::cache::fill::Fill;

use super::recent::Recent;

/// A fill that is being written. Dropped, it ends with the batch that is being written.
pub(super) struct Writing {
    recent: Arc<Recent>,
    /// While nothing is written.
    idle: Option<Fill>,
    /// Gives the fill back, unless the cache cannot be written, which it has said then.
    batch: Option<JoinHandle<Option<Fill>>>,
    /// The next batch.
    gathered: Vec<Bytes>,
    gathered_bytes: usize,
}

impl Writing {
    /// Begins with an empty file.
    pub(super) fn new(fill: Fill, recent: Arc<Recent>) -> Self {
        Self {
            recent,
            idle: Some(fill),
            batch: None,
            gathered: Vec::new(),
            gathered_bytes: 0,
        }
    }

    /// Tells whether another chunk may be taken.
    pub(super) fn has_room(&self) -> bool {
        self.gathered_bytes < BATCH_BYTES_MAX
    }

    /// Takes the next chunk.
    pub(super) fn take(&mut self, chunk: Bytes) {
        self.gathered_bytes += chunk.len();
        self.gathered.push(chunk);
        if let Some(fill) = self.idle.take() {
            self.begin(fill);
        }
    }

    /// Waits for the batch that is being written, and begins the next; `None` when writing failed.
    ///
    /// It never comes back while nothing is written. Dropped, nothing is lost.
    pub(super) async fn turn(&mut self) -> Option<()> {
        let Some(batch) = &mut self.batch else {
            return pending().await;
        };
        let written = batch.await;
        self.batch = None;
        self.begin(written.ok()??);
        Some(())
    }

    /// Writes what was taken, and gives the fill back; `None` when writing failed.
    pub(super) async fn finish(mut self) -> Option<Fill> {
        while self.batch.is_some() {
            self.turn().await?;
        }
        self.idle
    }

    /// Writes what was gathered, if anything was.
    fn begin(&mut self, mut fill: Fill) {
        if self.gathered.is_empty() {
            self.idle = Some(fill);
            return;
        }
        let batch = std::mem::take(&mut self.gathered);
        self.gathered_bytes = 0;
        self.recent.add(&batch);
        let write = move || fill.write_all(&batch).ok().map(|()| fill);
        self.batch = Some(spawn_blocking(write));
    }
}

/// Some 0.7 ms of writing and hashing; with what is being written, the memory of one fill.
const BATCH_BYTES_MAX: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io;
    use std::os::unix::fs::FileExt as _;

    use async_trait::async_trait;

    use super::*;
    use crate::cache::backend::{Error, NarFile, Record};
    use crate::cache::fill::{Place, Progress, Stage};

    /// A place for so many bytes.
    struct Room(u64);

    #[async_trait]
    impl Place for Room {
        fn grow(&mut self, size_bytes: u64) -> io::Result<()> {
            match size_bytes <= self.0 {
                true => Ok(()),
                false => Err(io::ErrorKind::StorageFull.into()),
            }
        }

        async fn commit(self: Box<Self>, _: Record, _: Bytes) -> Result<NarFile, Error> {
            unreachable!("nothing is committed here")
        }
    }

    fn writing(room: u64) -> (Writing, Arc<File>, tokio::sync::watch::Receiver<Progress>) {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let fill = Fill::new(Arc::clone(&file), Box::new(Room(room)));
        let progress = fill.progress();
        (Writing::new(fill, Arc::default()), file, progress)
    }

    #[tokio::test]
    async fn all_is_written_in_order_and_no_more_is_gathered_than_a_batch() {
        let (mut writing, file, progress) = writing(u64::MAX);
        let mut whole = Vec::new();
        for number in 0..100_u8 {
            let mut taken = 0;
            while writing.has_room() && taken < usize::from(number) {
                let chunk = Bytes::from(vec![number; 40_000]);
                whole.extend_from_slice(&chunk);
                writing.take(chunk);
                taken += 1;
                assert!(writing.gathered_bytes < BATCH_BYTES_MAX + 40_000);
            }
            if !writing.has_room() {
                writing.turn().await.unwrap();
                assert!(writing.has_room());
            }
        }
        let fill = writing.finish().await.unwrap();
        assert_eq!(fill.written(), whole.len() as u64);
        assert_eq!(progress.borrow().written, whole.len() as u64);
        let mut read = vec![0; whole.len()];
        file.read_exact_at(&mut read, 0).unwrap();
        assert!(read == whole);
    }

    #[tokio::test]
    async fn what_cannot_be_written_ends_it() {
        let (mut writing, _, progress) = writing(10);
        writing.take(Bytes::from_static(b"0123456789"));
        writing.turn().await.unwrap();
        assert_eq!(progress.borrow().written, 10);
        writing.take(Bytes::from_static(b"0"));
        writing.take(Bytes::from_static(b"1"));
        assert!(writing.finish().await.is_none());
        let Progress { written, stage } = *progress.borrow();
        assert_eq!((written, stage), (10, Stage::Failed));
    }
}
