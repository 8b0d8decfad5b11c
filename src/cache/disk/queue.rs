//! What the writer has to do: a bounded list that it takes as a whole, so that work of one moment
//! shares one sync.

use std::collections::{HashMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

use super::super::backend::{Error, NarFile, Record};
use super::super::nar_name::NarName;
use super::super::stamp::Stamp;
use super::folder::Temp;
use super::resign::Tally;
use super::shared::Reservation;
use crate::nix::hash::NarHash;
use crate::nix::store_path::StorePathHash;

/// Something to do for the writer, the only one that changes the folder and the index.
pub enum Task {
    /// Make an entry.
    Commit(Box<Commit>),
    /// Keep a look-up.
    Remember(Box<Record>),
    /// Forget that upstreams have a NAR.
    Deny(Denial),
    /// Remove a path.
    Forget(StorePathHash),
    /// Write narinfos anew that carry other signatures than they should, then answer.
    SignAnew(
        Vec<StorePathHash>,
        std::sync::mpsc::SyncSender<std::io::Result<Tally>>,
    ),
    /// Remove an entry that was found wrong.
    Corrupt(NarName, String),
    /// Take a narinfo of the folder into the index, if it checks.
    TakeIn(StorePathHash),
    /// Remove a NAR of the folder, if nothing names it.
    Orphan(NarName),
    /// Take a path out of the index, if its NAR is not there.
    Gone(StorePathHash),
    /// Write everything that waits, then answer.
    Flush(oneshot::Sender<()>),
}

/// What upstreams said that they do not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denial {
    /// Of which path.
    pub hash: StorePathHash,
    /// Which of its NARs.
    pub nar_hash: NarHash,
    /// Their names.
    pub upstreams: Vec<String>,
}

/// A whole NAR that is to become an entry.
pub struct Commit {
    /// The NAR.
    pub temp: Temp,
    /// Whether its bytes are on disk already.
    pub synced: bool,
    /// What tells that it was changed since; `None` where the file system does not.
    pub stamp: Option<Stamp>,
    /// What is known of it; the file is there.
    pub record: Record,
    /// The narinfo, with its grounds.
    pub narinfo: String,
    /// Its share of the bytes, until it is listed.
    pub reservation: Reservation,
    /// Who waits.
    pub reply: oneshot::Sender<Result<NarFile, Error>>,
}

/// The list of tasks, and the uses that are yet to be noted.
pub struct Queue {
    // No other lock is taken under it.
    waiting: Mutex<Waiting>,
    changed: Condvar,
    droppable_max: usize,
}

#[derive(Default)]
struct Waiting {
    tasks: VecDeque<Task>,
    /// Look-ups among them: dropped when there are too many.
    droppable: usize,
    /// How many look-ups of a path are on their way: among the tasks, or with the writer.
    look_ups: HashMap<StorePathHash, usize>,
    touches: HashMap<StorePathHash, u64>,
    woken: bool,
    stopped: bool,
}

/// What the writer takes at one go.
pub struct Batch {
    /// In the order of their coming.
    pub tasks: VecDeque<Task>,
    /// Last uses by path.
    pub touches: HashMap<StorePathHash, u64>,
    /// Nothing comes after it.
    pub stopped: bool,
}

impl Queue {
    /// Makes an empty list for so many look-ups and uses; other tasks are bounded by who sends them.
    pub fn new(droppable_max: usize) -> Self {
        Self {
            waiting: Mutex::default(),
            changed: Condvar::new(),
            droppable_max,
        }
    }

    /// Adds a task; `false`, and it is dropped, when the writer stops or has too many look-ups.
    pub fn push(&self, task: Task) -> bool {
        let mut waiting = self.lock();
        if waiting.stopped {
            return false;
        }
        let mut wake = true;
        if let Task::Remember(record) = &task {
            if waiting.droppable >= self.droppable_max {
                return false;
            }
            let was_full = self.is_full(&waiting);
            waiting.droppable += 1;
            let hash = record.info.path.hash();
            *waiting.look_ups.entry(hash).or_default() += 1;
            // One more while some gather changes nothing: to wake a thread takes longer than to list a look-up.
            wake = waiting.tasks.is_empty() || self.is_full(&waiting) != was_full;
        }
        waiting.tasks.push_back(task);
        if wake {
            self.changed.notify_all();
        }
        true
    }

    /// Tells whether look-ups are not to gather any longer.
    fn is_full(&self, waiting: &Waiting) -> bool {
        waiting.droppable > GATHERED_MAX.min(self.droppable_max / 2)
    }

    /// Tells whether a look-up of a path is on its way into the index.
    pub fn has_look_up(&self, hash: StorePathHash) -> bool {
        self.lock().look_ups.contains_key(&hash)
    }

    /// Notes that the writer is done with look-ups that it took.
    pub fn written(&self, look_ups: &[StorePathHash]) {
        let mut waiting = self.lock();
        for hash in look_ups {
            if let Some(count) = waiting.look_ups.get_mut(hash) {
                *count -= 1;
                if *count == 0 {
                    waiting.look_ups.remove(hash);
                }
            }
        }
    }

    /// Adds a task of the background pass once there is room; `false` when the writer stops.
    pub fn push_patiently(&self, task: Task) -> bool {
        let mut waiting = self.lock();
        while waiting.tasks.len() >= PATIENT_MAX && !waiting.stopped {
            let waited = self.changed.wait(waiting);
            waiting = waited.unwrap_or_else(PoisonError::into_inner);
        }
        drop(waiting);
        self.push(task)
    }

    /// Notes a use.
    pub fn touch(&self, hash: StorePathHash, used: u64) {
        let mut waiting = self.lock();
        if waiting.touches.len() < self.droppable_max || waiting.touches.contains_key(&hash) {
            waiting.touches.insert(hash, used);
        }
    }

    /// Takes the uses that were noted since the last batch.
    pub fn take_touches(&self) -> HashMap<StorePathHash, u64> {
        std::mem::take(&mut self.lock().touches)
    }

    /// Has the writer look for room or at a degraded folder now.
    pub fn wake(&self) {
        self.lock().woken = true;
        self.changed.notify_all();
    }

    /// Lets the writer end after what is listed.
    pub fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
    }

    /// Sleeps, until the writer is told to end.
    pub fn sleep(&self, duration: Duration) {
        let goes_on = |waiting: &mut Waiting| !waiting.stopped;
        _ = self
            .changed
            .wait_timeout_while(self.lock(), duration, goes_on);
    }

    /// Tells whether the writer was told to end.
    pub fn is_stopped(&self) -> bool {
        self.lock().stopped
    }

    /// Takes everything as soon as there is a task, or after `idle_max`.
    ///
    /// Look-ups alone are left to gather for a moment.
    pub fn take(&self, idle_max: Duration) -> Batch {
        let nothing =
            |waiting: &mut Waiting| waiting.tasks.is_empty() && !waiting.woken && !waiting.stopped;
        let waited = self
            .changed
            .wait_timeout_while(self.lock(), idle_max, nothing);
        let (waiting, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let idle = |waiting: &mut Waiting| {
            let urgent = waiting.tasks.len() > waiting.droppable;
            let at_once = urgent || self.is_full(waiting) || waiting.woken || waiting.stopped;
            !(at_once || waiting.tasks.is_empty())
        };
        let waited = self.changed.wait_timeout_while(waiting, GATHER, idle);
        let (mut waiting, _) = waited.unwrap_or_else(PoisonError::into_inner);
        waiting.woken = false;
        waiting.droppable = 0;
        let batch = Batch {
            tasks: std::mem::take(&mut waiting.tasks),
            touches: std::mem::take(&mut waiting.touches),
            stopped: waiting.stopped,
        };
        drop(waiting);
        self.changed.notify_all();
        batch
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How long look-ups wait for more of their kind: each write of the index costs a sync, and time of a processor that
/// a client whose closure they are of has a better use for. What is lost with the machine is asked for again.
const GATHER: Duration = Duration::from_secs(1);
/// How many do so at most: a closure's, and in memory a few hundred kB.
const GATHERED_MAX: usize = 512;
/// Tasks that may wait before the background pass does.
const PATIENT_MAX: usize = 256;

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Instant;

    use super::super::samples::record;
    use super::*;

    fn look_up(number: u8) -> Task {
        Task::Remember(Box::new(record(number, None)))
    }

    #[test]
    fn look_ups_gather_until_half_of_the_places_are_taken_or_something_urgent_comes() {
        let forget = || Task::Forget(StorePathHash([3; 20]));
        for (places, third) in [(4, look_up(3)), (100, forget())] {
            let queue = Queue::new(places);
            thread::scope(|scope| {
                let writer = scope.spawn(|| {
                    let batch = queue.take(Duration::from_secs(60));
                    (batch.tasks.len(), Instant::now())
                });
                let begun = Instant::now();
                assert!(queue.push(look_up(1)) && queue.push(look_up(2)));
                thread::sleep(GATHER / 10);
                assert!(queue.push(third));
                let pushed = Instant::now();
                let (count, taken) = writer.join().unwrap();
                assert_eq!(count, 3, "taken after {:?}", taken - begun);
                assert!(taken < pushed + GATHER / 2, "{places}");
            });
        }
        let queue = Queue::new(100);
        let begun = Instant::now();
        assert!(queue.take(Duration::ZERO).tasks.is_empty());
        assert!(begun.elapsed() < GATHER / 2, "there is nothing to gather");
        let begun = Instant::now();
        assert!(queue.push(look_up(1)) && queue.push(look_up(2)));
        assert_eq!(queue.take(Duration::from_secs(60)).tasks.len(), 2);
        assert!(begun.elapsed() >= GATHER);
    }

    #[test]
    fn urgent_tasks_come_at_once_and_none_after_the_stop() {
        let queue = Queue::new(2);
        assert!(queue.push(Task::Forget(StorePathHash([1; 20]))));
        queue.touch(StorePathHash([1; 20]), 1);
        queue.touch(StorePathHash([1; 20]), 2);
        queue.touch(StorePathHash([2; 20]), 3);
        queue.touch(StorePathHash([3; 20]), 4);
        let begun = Instant::now();
        let batch = queue.take(Duration::from_secs(60));
        assert!(begun.elapsed() < Duration::from_secs(30));
        assert_eq!(batch.tasks.len(), 1);
        assert_eq!(batch.touches.len(), 2, "uses are bounded");
        assert_eq!(batch.touches[&StorePathHash([1; 20])], 2);
        queue.stop();
        assert!(!queue.push(Task::Forget(StorePathHash([1; 20]))));
        assert!(queue.take(Duration::from_secs(60)).stopped);
    }

    #[test]
    fn the_background_waits_for_room() {
        let queue = Queue::new(2);
        std::thread::scope(|scope| {
            let pass = scope.spawn(|| {
                (0..PATIENT_MAX + 10)
                    .all(|_| queue.push_patiently(Task::Gone(StorePathHash([1; 20]))))
            });
            let mut taken = 0;
            while taken < PATIENT_MAX + 10 {
                let count = queue.take(Duration::from_secs(10)).tasks.len();
                assert!(count <= PATIENT_MAX);
                taken += count;
            }
            assert!(pass.join().unwrap());
        });
    }
}
