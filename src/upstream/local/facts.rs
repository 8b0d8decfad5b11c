//! What the file system says of a path's files, by which they are known to be as they were.
//!
//! No file can be written to, renamed or linked without another time of change, nor be replaced without another
//! inode; nobody but the kernel sets either. So a file of which inode, size, mode and times are those under which
//! its bytes were found right has these bytes still. A link to it from elsewhere is a change, too: then it is hashed
//! once more.
//!
//! Times tick, and two changes within one tick have the same. So nothing is kept of a path of which a file was changed
//! just before it was looked at: it is hashed the next time, too. The clock is the one that the kernel takes such times
//! from; a file system that another machine serves has its own.

use std::sync::Arc;

use rustix::fs::Stat;
use rustix::time::{ClockId, Timespec, clock_gettime};
use sha2::{Digest as _, Sha256};

/// Digest of what is said of one file, directory or symlink.
type Fact = [u8; 16];

/// What was said of all files of a path, in the order of its NAR. A clone is another handle on the same.
#[derive(Clone, Debug)]
pub(super) struct Facts(Arc<[Fact]>);

/// What a walk over a path does with what it sees.
pub(super) enum Ledger {
    /// It is noted.
    Noting(Notes),
    /// It must be what was noted before.
    Comparing(Facts, usize),
}

/// What was seen so far.
pub(super) struct Notes {
    facts: Vec<Fact>,
    /// The time before the first file was looked at, in nanoseconds since 1970.
    began: i128,
    /// Whether each later change of what was seen leaves another time.
    tell: bool,
}

impl Facts {
    /// Returns how many bytes of memory they take.
    pub(super) fn size_bytes(&self) -> usize {
        size_of_val(&*self.0)
    }
}

impl Ledger {
    /// Begins to note.
    pub(super) fn noting() -> Self {
        Self::noting_since(clock_gettime(ClockId::RealtimeCoarse))
    }

    fn noting_since(now: Timespec) -> Self {
        Self::Noting(Notes {
            facts: Vec::new(),
            began: nanos(now.tv_sec, i128::from(now.tv_nsec)),
            tell: true,
        })
    }

    /// Begins to compare.
    pub(super) fn comparing(facts: Facts) -> Self {
        Self::Comparing(facts, 0)
    }

    /// Takes the next file in; `false`: it is not as it was.
    #[must_use]
    pub(super) fn take(&mut self, stat: &Stat) -> bool {
        let fact = fact(stat);
        match self {
            Self::Noting(notes) => {
                notes.tell &= tells(stat, notes.began);
                notes.facts.push(fact);
            }
            Self::Comparing(Facts(facts), next) => {
                let same = facts.get(*next) == Some(&fact);
                *next += 1;
                return same;
            }
        }
        true
    }

    /// Returns what is noted so far, if it would tell of any change; what is compared is not noted.
    pub(super) fn facts(&mut self) -> Option<Facts> {
        match self {
            Self::Noting(notes) => {
                let facts = std::mem::take(&mut notes.facts);
                notes.tell.then(|| Facts(facts.into()))
            }
            Self::Comparing(..) => None,
        }
    }
}

/// Tells whether a file that is changed again, after it was looked at, has another time of change.
///
/// It was looked at after `began`, perhaps long after. A file from the future never tells: its time may come.
fn tells(stat: &Stat, began: i128) -> bool {
    let tick = match stat.st_ctime_nsec {
        0 => TICK_OF_SECONDS,
        _ => TICK,
    };
    let changed = nanos(stat.st_ctime, i128::from(stat.st_ctime_nsec));
    began - changed > tick
}

fn nanos(seconds: i64, nanos: i128) -> i128 {
    i128::from(seconds) * 1_000_000_000 + nanos
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

/// Nanoseconds, and more than a tick: the kernel's clock has 100 to 1000 in a second.
const TICK: i128 = 20_000_000;
/// The same where the file system keeps whole seconds.
const TICK_OF_SECONDS: i128 = 2_000_000_000;

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write as _;
    use std::os::unix::fs::FileExt as _;
    use std::thread::sleep;
    use std::time::Duration;

    use super::*;

    fn stat(file: &File) -> Stat {
        rustix::fs::fstat(file).unwrap()
    }

    fn changed_at(file: &File) -> Timespec {
        let stat = stat(file);
        let tv_nsec = i64::try_from(stat.st_ctime_nsec).unwrap();
        Timespec {
            tv_sec: stat.st_ctime,
            tv_nsec,
        }
    }

    fn noted(mut ledger: Ledger, stat: &Stat) -> Option<Facts> {
        assert!(ledger.take(stat));
        ledger.facts()
    }

    /// What is written within the tick in which the file was looked at leaves it as it was, by all that is said of it:
    /// up to Linux 6.12 everywhere, since then on few file systems (`TMPDIR` on a ramfs shows it).
    #[test]
    fn facts_that_a_write_does_not_change_are_not_kept() {
        let file = tempfile::tempfile().unwrap();
        for number in 0..2000_u32 {
            file.write_all_at(&number.to_ne_bytes(), 0).unwrap();
            let facts = noted(Ledger::noting(), &stat(&file));
            file.write_all_at(b"same", 0).unwrap();
            if let Some(facts) = facts {
                assert!(!Ledger::comparing(facts).take(&stat(&file)), "{number}");
            }
        }
    }

    #[test]
    fn facts_are_kept_once_the_tick_is_over() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"right").unwrap();
        let just_now = changed_at(&file);
        assert!(noted(Ledger::noting_since(just_now), &stat(&file)).is_none());
        sleep(Duration::from_millis(100));
        let facts = noted(Ledger::noting(), &stat(&file)).unwrap();
        assert!(Ledger::comparing(facts.clone()).take(&stat(&file)));
        file.write_all(b"!").unwrap();
        assert!(!Ledger::comparing(facts).take(&stat(&file)));
    }

    #[test]
    fn a_tick_is_as_long_as_the_file_system_has_it() {
        let mut stat = stat(&tempfile::tempfile().unwrap());
        let mut kept = |ctime: (i64, u64), now: (i64, i64)| {
            (stat.st_ctime, stat.st_ctime_nsec) = ctime;
            let now = Timespec {
                tv_sec: now.0,
                tv_nsec: now.1,
            };
            noted(Ledger::noting_since(now), &stat).is_some()
        };
        assert!(!kept((1000, 500), (1000, 500)));
        assert!(!kept((1000, 500), (1000, 10_000_500)));
        assert!(kept((1000, 500), (1000, 30_000_500)));
        assert!(!kept((1000, 0), (1001, 900_000_000)));
        assert!(kept((1000, 0), (1002, 1)));
        // Changed while the walk went on, or a clock that was set back.
        assert!(!kept((1000, 10_000_000), (1000, 1)));
        assert!(!kept((1005, 500), (1000, 500)));
    }

    #[test]
    fn one_file_that_was_just_changed_is_enough() {
        let [old, new] = [(); 2].map(|()| tempfile::tempfile().unwrap());
        sleep(Duration::from_millis(100));
        new.write_all_at(b"new", 0).unwrap();
        // However long that took on a busy machine.
        let mut ledger = Ledger::noting_since(changed_at(&new));
        assert!(ledger.take(&stat(&new)) && ledger.take(&stat(&old)));
        assert!(ledger.facts().is_none());
    }
}
