//! The guard against slow drip: a body that comes, but so slowly that it would hold a transfer for days.

use std::time::Duration;

use super::Error;
use super::http_client::HttpOptions;

/// Watches that a body does not come too slowly; the time in which nobody reads does not count.
pub(super) struct Drip {
    time: Duration,
    bytes: u64,
    waited: Duration,
    came: u64,
}

impl Drip {
    /// Begins to watch a body.
    pub(super) fn new(options: &HttpOptions) -> Self {
        Self {
            time: options.drip_time,
            bytes: options.drip_bytes,
            waited: Duration::ZERO,
            came: 0,
        }
    }

    /// Counts what came after such a wait; an error when it is too little.
    pub(super) fn count(&mut self, bytes: usize, waited: Duration) -> Result<(), Error> {
        self.waited += waited;
        self.came += bytes as u64;
        if self.waited < self.time {
            return Ok(());
        }
        if self.came < self.bytes {
            return Err(Error::Slow(self.time));
        }
        (self.waited, self.came) = (Duration::ZERO, 0);
        Ok(())
    }
}
