//! When a file was changed last: what tells a kept NAR that is as it was checked from one to be read again.
//!
//! Entries are never written after they were made. So a file whose time is still the one that was noted has
//! the content that was checked then, as `git` and `rsync` have it; a disk that changes bits without a write is
//! not seen, `muster cache verify` is for that.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The time of a file's last change, as its file system has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp(u64);

/// What is known of the content of an open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// It is as it was checked.
    Unchanged,
    /// It may be anything; with the stamp that it has where it is right, if that would tell a later change.
    Unknown(Option<Stamp>),
}

impl Stamp {
    /// Takes a stamp from the index.
    pub fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// Returns nanoseconds since 1970.
    pub fn nanos(self) -> u64 {
        self.0
    }

    /// Gives a file that is complete a time at which it was not written, so that every later write tells.
    pub fn set(file: &File) -> io::Result<Self> {
        file.set_modified(SystemTime::now() - BACKWARDS)?;
        let found = file.metadata()?;
        Self::of(&found).ok_or_else(|| io::ErrorKind::Unsupported.into())
    }

    /// Reads a file's stamp; `None` for times before 1970.
    pub fn of(found: &Metadata) -> Option<Self> {
        let seconds = u64::try_from(found.mtime()).ok()?;
        let nanos = u64::try_from(found.mtime_nsec()).ok()?;
        Some(Self(
            seconds.checked_mul(1_000_000_000)?.checked_add(nanos)?,
        ))
    }

    /// Tells whether a change from now on leaves another stamp; clocks of file systems tick slowly.
    pub fn tells_from(self, now: SystemTime) -> bool {
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        now.abs_diff(Duration::from_nanos(self.0)) > BACKWARDS / 2
    }
}

/// More than the coarsest time stamps of file systems, which are of a second.
const BACKWARDS: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn every_write_after_it_was_set_tells() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"whole").unwrap();
        let written = Stamp::of(&file.metadata().unwrap()).unwrap();
        assert!(!written.tells_from(SystemTime::now()));
        let set = Stamp::set(&file).unwrap();
        assert!(set.tells_from(SystemTime::now()));
        assert_eq!(Stamp::of(&file.metadata().unwrap()), Some(set));
        file.write_all(b"!").unwrap();
        assert_ne!(Stamp::of(&file.metadata().unwrap()), Some(set));
        assert_eq!(Stamp::from_nanos(set.nanos()), set);
    }
}
