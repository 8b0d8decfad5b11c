//! Files of others in the folder of the cache: they are left alone, and a background pass says that there are some.
//!
//! A binary cache that somebody else writes, too, may have any number of them, so one line tells how many, and where
//! the first is.

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What was met since it was last said.
#[derive(Debug, Default)]
pub struct Foreign {
    // No other lock is taken under it.
    met: Mutex<Met>,
}

/// Files of others.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Met {
    /// How many.
    pub count: u64,
    /// The first of them.
    pub first: PathBuf,
}

impl Foreign {
    /// Notes a file that is none of ours.
    pub fn note(&self, path: PathBuf) {
        let mut met = self.lock();
        if met.count == 0 {
            met.first = path;
        }
        met.count += 1;
    }

    /// Forgets what was noted and returns it.
    pub fn take(&self) -> Met {
        std::mem::take(&mut self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, Met> {
        self.met.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells whether a binary cache has something of this name beside its narinfos.
pub fn is_known(name: &str) -> bool {
    KNOWN.contains(&name)
}

const KNOWN: [&str; 6] = [
    "nix-cache-info",
    "nar",
    "realisations",
    "build-trace-v2",
    "log",
    ".muster",
];
