//! What the file system says of a path's files, by which they are known to be as they were.
//!
//! No file can be written to, renamed or linked without another time of change, nor be replaced without another
//! inode; nobody but the kernel sets either. So a file of which inode, size, mode and times are those under which
//! its bytes were found right has these bytes still. The one gap is a write within the same tick of the file
//! system's clock, some milliseconds, as the change that was noted. A link to it from elsewhere is a change, too:
//! then it is hashed once more.

use std::sync::Arc;

use rustix::fs::Stat;
use sha2::{Digest as _, Sha256};

/// Digest of what is said of one file, directory or symlink.
type Fact = [u8; 16];

/// What was said of all files of a path, in the order of its NAR. A clone is another handle on the same.
#[derive(Clone, Debug)]
pub(super) struct Facts(Arc<[Fact]>);

/// What a walk over a path does with what it sees.
pub(super) enum Ledger {
    /// It is noted.
    Noting(Vec<Fact>),
    /// It must be what was noted before.
    Comparing(Facts, usize),
}

impl Facts {
    /// Returns how many bytes of memory they take.
    pub(super) fn size_bytes(&self) -> usize {
        size_of_val(&*self.0)
    }
}

impl Ledger {
    /// Takes the next file in; `false`: it is not as it was.
    #[must_use]
    pub(super) fn take(&mut self, stat: &Stat) -> bool {
        let fact = fact(stat);
        match self {
            Self::Noting(facts) => facts.push(fact),
            Self::Comparing(Facts(facts), next) => {
                let same = facts.get(*next) == Some(&fact);
                *next += 1;
                return same;
            }
        }
        true
    }

    /// Returns what is noted so far; what is compared is not noted.
    pub(super) fn facts(&mut self) -> Option<Facts> {
        match self {
            Self::Noting(facts) => Some(Facts(std::mem::take(facts).into())),
            Self::Comparing(..) => None,
        }
    }
}

fn fact(stat: &Stat) -> Fact {
    let mut facts = Sha256::new();
    facts.update(stat.st_dev.to_ne_bytes());
    facts.update(stat.st_ino.to_ne_bytes());
    facts.update(stat.st_mode.to_ne_bytes());
    facts.update(stat.st_size.to_ne_bytes());
    facts.update(stat.st_mtime.to_ne_bytes());
    facts.update(stat.st_mtime_nsec.to_ne_bytes());
    facts.update(stat.st_ctime.to_ne_bytes());
    facts.update(stat.st_ctime_nsec.to_ne_bytes());
    let digest: [u8; 32] = facts.finalize().into();
    let (halves, _) = digest.as_chunks::<16>();
    halves.first().copied().unwrap_or_default()
}
