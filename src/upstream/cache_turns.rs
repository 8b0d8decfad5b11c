//! The turns of a binary cache's NARs: how many are under way at once, or how many bytes of those that share a connection.
//!
//! ```text
//! large     a connection of its own each                       counted
//! small     over HTTP/1 a connection each                      counted
//! small     over HTTP/2 they share one                         KiB, at least so many each
//! ```

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Error;
use super::binary_cache::BinaryCacheOptions;
use super::cache_files::{CacheFiles, FileSize};

/// Whose turn it is.
pub(super) struct Turns {
    large: Arc<Semaphore>,
    small: Arc<Semaphore>,
    /// KiB of those that share a connection.
    shared_small: Arc<Semaphore>,
    shared_small_kib: u32,
}

impl Turns {
    /// Lets as many go at once as the options say.
    pub(super) fn new(options: &BinaryCacheOptions) -> Self {
        let count = |count: usize| Arc::new(Semaphore::new(count.clamp(1, TRANSFERS_MAX)));
        let shared_small_kib = options.shared_small_kib.max(1);
        Self {
            large: count(options.large_max),
            small: count(options.small_max),
            shared_small: Arc::new(Semaphore::new(shared_small_kib as usize)),
            shared_small_kib,
        }
    }

    /// Waits for the turn of a NAR, which lasts until the permit is dropped.
    ///
    /// That takes as long as the others do, and says nothing of the cache. Dropped, it waits no more and took nothing.
    pub(super) async fn next(
        &self,
        nar_size: u64,
        files: &dyn CacheFiles,
    ) -> Result<OwnedSemaphorePermit, Error> {
        let kib = u32::try_from(nar_size.div_ceil(1024)).unwrap_or(u32::MAX);
        let (turns, count) = match size_of(nar_size) {
            FileSize::Small if files.shares_connections() => {
                let count = kib.max(SHARED_KIB_LEAST).min(self.shared_small_kib);
                (&self.shared_small, count)
            }
            FileSize::Small => (&self.small, 1),
            FileSize::Large | FileSize::Endless => (&self.large, 1),
        };
        let permit = Arc::clone(turns).acquire_many_owned(count).await;
        permit.map_err(|_| Error::Down("it is being closed".into()))
    }
}

/// Tells whether a NAR's file is a small one, as far as its way is concerned.
pub(super) fn size_of(nar_size: u64) -> FileSize {
    match nar_size {
        0..=SMALL_BYTES_MAX => FileSize::Small,
        _ => FileSize::Large,
    }
}

const SMALL_BYTES_MAX: u64 = 4 << 20;

/// What the smallest NAR counts as, where they share a connection: 200 at once.
const SHARED_KIB_LEAST: u32 = 20;

/// Keeps a typing error from the semaphores.
const TRANSFERS_MAX: usize = 1000;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::sleep;

    use super::super::cache_folder::CacheFolder;
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_turn_is_waited_for_as_long_as_it_takes() {
        let turns = Turns::new(&BinaryCacheOptions {
            large_max: 1,
            ..BinaryCacheOptions::default()
        });
        let files = CacheFolder::new("/none", Duration::from_secs(1));
        let first = turns.next(5 << 20, &files).await.unwrap();
        let (next, ()) = tokio::join!(turns.next(5 << 20, &files), async {
            sleep(Duration::from_secs(3600)).await;
            drop(first);
        });
        assert!(next.is_ok());
    }
}
