//! What upstreams deny to have, and the index is yet to forget.
//!
//! It holds at once. Where more is denied than may wait here, or the index cannot take it, no look-up counts from then
//! on, until the writer has swept all of them out of the index: they are only a memory, and none that was denied may
//! come back. NARs that are kept are not concerned.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::super::backend::Record;
use super::queue::Denial;
use crate::nix::store_path::StorePathHash;

/// Denials that wait for the writer.
pub struct Denials {
    // No other lock is taken under it.
    waiting: Mutex<Waiting>,
    count_max: usize,
}

#[derive(Default)]
struct Waiting {
    by_path: HashMap<StorePathHash, Vec<Denial>>,
    count: usize,
    /// Sweeps that were asked for since the start, and those of them that are done.
    sweeps: u64,
    swept: u64,
}

/// What is denied of one path at a moment.
pub enum Denied {
    /// So much.
    These(Vec<Denial>),
    /// Perhaps everything: no look-up counts.
    Unknown,
}

impl Denials {
    /// Begins without any, with room for so many.
    pub fn new(count_max: usize) -> Self {
        Self {
            waiting: Mutex::default(),
            count_max,
        }
    }

    /// Has a denial hold from now on; `false`: there are too many, a sweep is due instead and the writer is to be
    /// woken.
    #[must_use]
    pub fn add(&self, denial: Denial) -> bool {
        let mut waiting = self.lock();
        if waiting.count >= self.count_max {
            waiting.sweeps += 1;
            return false;
        }
        waiting.count += 1;
        waiting.by_path.entry(denial.hash).or_default().push(denial);
        true
    }

    /// Notes that the writer is done with a denial.
    pub fn done(&self, denial: &Denial) {
        let mut waiting = self.lock();
        let Some(of_it) = waiting.by_path.get_mut(&denial.hash) else {
            return;
        };
        let Some(place) = of_it.iter().position(|d| d == denial) else {
            return;
        };
        of_it.swap_remove(place);
        if of_it.is_empty() {
            waiting.by_path.remove(&denial.hash);
        }
        waiting.count -= 1;
    }

    /// Lets no look-up count until all are swept out of the index.
    pub fn lose(&self) {
        self.lock().sweeps += 1;
    }

    /// Names the sweep that is due.
    ///
    /// It must sweep whatever waited for the writer when this was asked.
    pub fn sweep_due(&self) -> Option<u64> {
        let waiting = self.lock();
        (waiting.sweeps > waiting.swept).then_some(waiting.sweeps)
    }

    /// Notes that a sweep is done; look-ups count again unless another was asked for meanwhile.
    pub fn swept(&self, sweep: u64) {
        self.lock().swept = sweep;
    }

    /// Returns what is denied of a path now.
    ///
    /// What the index says must be read after it: what is not here any more is there.
    pub fn of(&self, hash: StorePathHash) -> Denied {
        let waiting = self.lock();
        if waiting.sweeps > waiting.swept {
            return Denied::Unknown;
        }
        let of_it = waiting.by_path.get(&hash);
        Denied::These(of_it.cloned().unwrap_or_default())
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Denied {
    /// Returns what is left of a record.
    pub fn leave(&self, mut record: Record) -> Option<Record> {
        match self {
            Self::Unknown => record.file.is_some().then_some(record),
            Self::These(denials) => {
                let mut changed = false;
                for denial in denials {
                    changed |= record.deny(denial.nar_hash, &denial.upstreams);
                }
                (!changed || !record.grounds.is_empty()).then_some(record)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nix::hash::NarHash;

    fn denial(number: u8) -> Denial {
        Denial {
            hash: StorePathHash([number; 20]),
            nar_hash: NarHash([number; 32]),
            upstreams: vec!["u".to_owned()],
        }
    }

    fn waiting(denials: &Denials, number: u8) -> Option<usize> {
        match denials.of(StorePathHash([number; 20])) {
            Denied::These(these) => Some(these.len()),
            Denied::Unknown => None,
        }
    }

    #[test]
    fn a_denial_waits_for_its_writer_alone() {
        let denials = Denials::new(3);
        assert!(denials.add(denial(1)));
        assert!(denials.add(denial(1)), "once for each task of the writer");
        assert!(denials.add(denial(2)));
        denials.done(&denial(1));
        denials.done(&denial(3));
        assert_eq!([1, 2, 3].map(|n| waiting(&denials, n)), [1, 1, 0].map(Some));
        denials.done(&denial(1));
        assert!(denials.add(denial(3)) && denials.add(denial(4)));
        assert_eq!(denials.sweep_due(), None);
    }

    #[test]
    fn beyond_the_bound_nothing_counts_until_the_last_sweep_is_done() {
        let denials = Denials::new(1);
        assert!(denials.add(denial(1)));
        assert!(!denials.add(denial(2)));
        assert_eq!([1, 2, 3].map(|n| waiting(&denials, n)), [None; 3]);
        let first = denials.sweep_due().unwrap();
        assert!(!denials.add(denial(3)));
        denials.swept(first);
        assert_eq!(waiting(&denials, 3), None, "it came during the sweep");
        denials.swept(denials.sweep_due().unwrap());
        assert_eq!([1, 2, 3].map(|n| waiting(&denials, n)), [1, 0, 0].map(Some));
        assert_eq!(denials.sweep_due(), None);
    }
}
