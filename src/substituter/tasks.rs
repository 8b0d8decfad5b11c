//! Work that outlives the request that began it, owned in one place and awaited at stop.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::task::JoinSet;
use tracing::Instrument as _;

/// The background tasks of a substituter; dropped, they are aborted.
pub struct Tasks {
    // Never held over an await; no other lock is taken under it.
    running: Mutex<JoinSet<()>>,
    limit: usize,
}

impl Tasks {
    /// Starts with none; at most `limit` run at once.
    pub fn new(limit: usize) -> Self {
        Self {
            running: Mutex::new(JoinSet::new()),
            limit,
        }
    }

    /// Runs `task` in the background; `false` when too many run, and `task` is dropped.
    ///
    /// Only work that can be done without is put here, so a full house loses nothing but time.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) -> bool {
        let mut running = self.running();
        while running.try_join_next().is_some() {}
        if running.len() >= self.limit {
            return false;
        }
        running.spawn(task.in_current_span());
        true
    }

    /// Ends all of them and waits until they are gone.
    pub async fn stop(&self) {
        let mut running = std::mem::take(&mut *self.running());
        running.shutdown().await;
    }

    fn running(&self) -> MutexGuard<'_, JoinSet<()>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
