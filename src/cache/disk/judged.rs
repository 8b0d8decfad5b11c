//! What was found of NAR files and the writer is yet to put down: entries that are wrong, files that are right.
//!
//! It holds at once, so that a file that was found wrong is not given to the next who asks, and one that was
//! read is not read again. What is beyond its bounds is judged by the next who reads the file.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::super::nar_name::NarName;
use super::super::stamp::Stamp;
use crate::nix::store_path::StorePathHash;

/// Judgements on files.
pub struct Judged {
    // No other lock is taken under either.
    wrong: Mutex<HashSet<NarName>>,
    right: Mutex<HashMap<StorePathHash, Stamp>>,
    files_max: usize,
}

impl Judged {
    /// Begins without any; it holds so many files at most that are wrong, and as many that are right.
    pub fn new(files_max: usize) -> Self {
        Self {
            wrong: Mutex::default(),
            right: Mutex::default(),
            files_max,
        }
    }

    /// Has an entry be none from now on, until the writer has removed it; `false`: it is none already, or there
    /// are too many, and the writer need not be told.
    pub fn condemn(&self, name: NarName) -> bool {
        let mut wrong = lock(&self.wrong);
        wrong.len() < self.files_max && wrong.insert(name)
    }

    /// Notes that the writer is done with an entry that was found wrong.
    pub fn removed(&self, name: &NarName) {
        lock(&self.wrong).remove(name);
    }

    /// Tells whether an entry was found wrong.
    pub fn is_wrong(&self, name: &NarName) -> bool {
        lock(&self.wrong).contains(name)
    }

    /// Notes that a file with this stamp was read and is right.
    pub fn proven(&self, hash: StorePathHash, stamp: Stamp) {
        let mut right = lock(&self.right);
        if right.len() < self.files_max || right.contains_key(&hash) {
            right.insert(hash, stamp);
        }
    }

    /// Returns the stamp with which a path's file was right.
    pub fn right(&self, hash: StorePathHash) -> Option<Stamp> {
        lock(&self.right).get(&hash).copied()
    }

    /// Takes the stamps of right files, for the index.
    pub fn take_right(&self) -> HashMap<StorePathHash, Stamp> {
        std::mem::take(&mut *lock(&self.right))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::nar_name::FileHash;
    use crate::nix::hash::NarHash;

    fn name(number: u8) -> NarName {
        NarName {
            path_hash: StorePathHash([number; 20]),
            nar_hash: NarHash([number; 32]),
            file_hash: FileHash([number; 32]),
        }
    }

    #[test]
    fn a_wrong_file_is_told_once_and_there_is_room_for_so_many() {
        let judged = Judged::new(2);
        assert!(judged.condemn(name(1)));
        assert!(!judged.condemn(name(1)), "many readers of one file");
        assert!(judged.condemn(name(2)));
        assert!(!judged.condemn(name(3)));
        let wrong = [1, 2, 3].map(|number| judged.is_wrong(&name(number)));
        assert_eq!(wrong, [true, true, false]);
        judged.removed(&name(1));
        assert!(!judged.is_wrong(&name(1)));
        assert!(judged.condemn(name(3)));
    }
}
