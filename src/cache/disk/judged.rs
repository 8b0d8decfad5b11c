//! What was found of NAR files and the writer is yet to put down: entries that are wrong, files that are right.
//!
//! It holds at once, so that a file that was found wrong is not given to the next who asks, and one that was
//! read is not read again.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::super::nar_name::NarName;
use super::super::stamp::Stamp;
use crate::nix::store_path::StorePathHash;

/// Judgements on files.
pub struct Judged {
    // No other lock is taken under either.
    wrong: Mutex<Vec<NarName>>,
    right: Mutex<HashMap<StorePathHash, Stamp>>,
    right_max: usize,
}

impl Judged {
    /// Begins without any; of so many right files at most is known, others are read again.
    pub fn new(right_max: usize) -> Self {
        Self {
            wrong: Mutex::default(),
            right: Mutex::default(),
            right_max,
        }
    }

    /// Has an entry be none from now on; the writer is yet to remove it.
    pub fn condemn(&self, name: NarName) {
        lock(&self.wrong).push(name);
    }

    /// Notes that the writer is done with an entry that was found wrong.
    pub fn removed(&self, name: &NarName) {
        let mut wrong = lock(&self.wrong);
        if let Some(place) = wrong.iter().position(|n| n == name) {
            wrong.swap_remove(place);
        }
    }

    /// Tells whether an entry was found wrong.
    pub fn is_wrong(&self, name: &NarName) -> bool {
        lock(&self.wrong).contains(name)
    }

    /// Notes that a file with this stamp was read and is right.
    pub fn proven(&self, hash: StorePathHash, stamp: Stamp) {
        let mut right = lock(&self.right);
        if right.len() < self.right_max || right.contains_key(&hash) {
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
