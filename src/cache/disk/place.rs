//! Where a running fill of the cache on disk is: a file under `.muster/tmp/` and a reservation.

use std::fs::File;
use std::io;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::oneshot;

use super::super::backend::{Error, NarFile, Record};
use super::super::fill::Place;
use super::super::stamp::Stamp;
use super::RESERVED_AHEAD_MAX;
use super::folder::Temp;
use super::queue::{Commit, Task};
use super::shared::{Reservation, Shared};
use super::text;

/// A fill's file and its share of the bytes.
pub struct OnDisk {
    /// The state of the cache.
    pub shared: Arc<Shared>,
    /// The file's name, until it has a lasting one.
    pub temp: Temp,
    /// The file.
    pub file: Arc<File>,
    /// The share.
    pub reservation: Reservation,
    /// Bytes that the file will take, as far as that can be told.
    pub estimate: u64,
}

#[async_trait]
impl Place for OnDisk {
    fn grow(&mut self, size_bytes: u64) -> io::Result<()> {
        if size_bytes <= self.reservation.bytes() {
            return Ok(());
        }
        // In large steps, as the writer makes room for each; where they do not fit, byte by byte.
        let ahead = self.estimate.min(size_bytes + RESERVED_AHEAD_MAX);
        if ahead > size_bytes && self.reservation.grow(ahead) {
            return Ok(());
        }
        match self.reservation.grow(size_bytes) {
            true => Ok(()),
            false => Err(io::ErrorKind::StorageFull.into()),
        }
    }

    fn failed(&mut self, error: &io::Error) {
        let dir = self.shared.folder.root().display();
        self.shared
            .note_failure(&format!("writing in {dir}"), error);
    }

    async fn commit(self: Box<Self>, record: Record, narinfo: Bytes) -> Result<NarFile, Error> {
        let shared = Arc::clone(&self.shared);
        let store_dir = &shared.options.store_dir;
        let narinfo = text::with_grounds(&narinfo, &record, store_dir);
        let narinfo = narinfo.map_err(|error| Error::Io {
            what: format!("the narinfo of {} does not fit its file", record.info.path),
            source: io::Error::new(io::ErrorKind::InvalidData, error),
        })?;
        let large = record
            .file
            .is_some_and(|file| file.size_bytes >= SYNC_ALONE_BYTES_MIN);
        let (reply, done) = oneshot::channel();
        let this = *self;
        let work = move || {
            let stamp = Stamp::set(&this.file).ok();
            // Here, so that the writer need not wait for gigabytes; small ones share one sync.
            if large && let Err(source) = this.file.sync_data() {
                // The system tells it once: whoever syncs the file again hears that all is well.
                let what = format!("syncing a nar in {}", this.shared.folder.root().display());
                this.shared.note_failure(&what, &source);
                return Err(Error::Io { what, source });
            }
            this.shared.queue.push(Task::Commit(Box::new(Commit {
                temp: this.temp,
                synced: large,
                stamp,
                record,
                narinfo,
                reservation: this.reservation,
                reply,
            })));
            Ok(())
        };
        if large {
            // It goes on when nobody waits for it any more.
            let synced = tokio::task::spawn_blocking(work).await;
            synced.map_err(|_| Error::Stopping)??;
        } else {
            work()?;
        }
        done.await.unwrap_or(Err(Error::Stopping))
    }
}

/// From this size on a file is synced by itself.
const SYNC_ALONE_BYTES_MIN: u64 = 4 << 20;
