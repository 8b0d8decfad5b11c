//! Room on the file system: the bound of a cache may be larger than what it lies on.
//!
//! ```text
//! free   ... 1.5 x least    fills go on
//!        ... least          fills go on, and the writer evicts
//!        ... 0              fills are refused, until the writer has evicted; degraded where that would not be enough
//! ```

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use super::super::backend::Error;
use super::shared::Shared;

/// Bytes that are to be evicted so that the file system has room.
#[derive(Default)]
pub struct Lacking {
    bytes: u64,
    /// Some file systems take a while to count what was removed.
    asked_at: Option<Instant>,
}

impl Shared {
    /// Tells whether a fill may begin, as far as the file system is concerned; has the writer evict where that helps.
    ///
    /// Fails with [`Error::Full`] while room is being made, and with [`Error::Degraded`] where none can be.
    pub fn ask_for_space(&self) -> Result<(), Error> {
        let dir = self.folder.root().display();
        let degraded = |cause: String| {
            self.degrade(cause.clone());
            Error::Degraded(cause)
        };
        let free = self.folder.free_bytes();
        let free = free.map_err(|error| degraded(format!("{dir}: {error}")))?;
        let least = self.options.free_bytes_min;
        if free >= least + least / 2 {
            return Ok(());
        }
        let kept = self.stats().bytes;
        // Some more, or every fill would ask.
        let lacking = (2 * least).saturating_sub(free) + kept / 16;
        let can_be_made = lacking <= kept && self.index().is_some();
        if can_be_made {
            self.evict_soon(lacking);
        }
        match (free >= least, can_be_made) {
            (true, _) => Ok(()),
            (false, true) => Err(Error::Full),
            (false, false) => Err(degraded(format!(
                "the file system of {dir} has only {free} bytes left"
            ))),
        }
    }

    /// Tells the writer how much is to go, unless it was told a moment ago.
    fn evict_soon(&self, bytes: u64) {
        let now = Instant::now();
        let pause = self.options.retry_after.min(PAUSE_MAX);
        let mut lacking = self.lacking.lock().unwrap_or_else(PoisonError::into_inner);
        let just_now = |at: Instant| now.duration_since(at) < pause;
        if lacking.asked_at.is_some_and(just_now) {
            return;
        }
        *lacking = Lacking {
            bytes,
            asked_at: Some(now),
        };
        drop(lacking);
        self.queue.wake();
    }

    /// Takes over how many bytes are to be evicted for the file system's sake.
    pub fn take_lacking(&self) -> u64 {
        let mut lacking = self.lacking.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut lacking.bytes)
    }
}

/// After which what was evicted should be free.
const PAUSE_MAX: Duration = Duration::from_secs(5);
