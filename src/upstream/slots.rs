//! The table of a pool's sessions: which there are, and what each carries.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use super::pool_choice::{Load, Usage};
use super::session::Session;

/// The table behind its lock. The lock is never held over an await, and no other is taken under it.
#[derive(Default)]
pub(super) struct Table(Mutex<Slots>);

/// The sessions and what is about to become of them.
#[derive(Default)]
pub(super) struct Slots {
    slots: Vec<Slot>,
    next: u64,
    /// Sessions on their way.
    pub(super) opening: usize,
    /// One session is to be kept open even when nothing is asked.
    pub(super) warm: bool,
}

struct Slot {
    id: u64,
    session: Arc<Session>,
    load: Load,
}

/// The use of a session by one NAR; given back when dropped. It keeps the session, not the pool.
pub(super) struct Lease {
    table: Weak<Table>,
    id: u64,
    bytes: u64,
    usage: Usage,
    ended: bool,
    session: Arc<Session>,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Table {
    pub(super) fn lock(&self) -> MutexGuard<'_, Slots> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slots {
    /// Drops what is closed and returns what the others carry.
    pub(super) fn loads(&mut self) -> Vec<Load> {
        self.slots.retain(|slot| !slot.session.is_closed());
        self.slots.iter().map(|slot| slot.load).collect()
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    /// Tells whether nothing is there that a small NAR could use, now or soon.
    pub(super) fn lacks_shared(&self) -> bool {
        let shared = |slot: &Slot| slot.load.usage == Usage::Shared;
        self.opening == 0 && !self.slots.iter().any(shared)
    }

    /// Adds a session and returns its place.
    pub(super) fn add(&mut self, session: Arc<Session>) -> usize {
        self.next += 1;
        self.slots.push(Slot {
            id: self.next,
            session,
            load: Load {
                usage: Usage::Shared,
                nars: 0,
                bytes: 0,
                since: Instant::now().into_std(),
            },
        });
        self.slots.len() - 1
    }

    /// Drops all sessions; those who use one still keep it.
    pub(super) fn clear(&mut self) {
        self.slots.clear();
    }

    /// Drops the sessions at these places; those who use one still keep it.
    pub(super) fn remove(&mut self, mut places: Vec<usize>) {
        places.sort_unstable();
        for place in places.into_iter().rev() {
            self.slots.swap_remove(place);
        }
    }

    /// Notes the use of the session at a place by a NAR; with a permit, by a large one alone.
    ///
    /// `None` when there is no such place.
    pub(super) fn lease(
        &mut self,
        table: &Arc<Table>,
        place: usize,
        bytes: u64,
        permit: Option<OwnedSemaphorePermit>,
    ) -> Option<Lease> {
        let slot = self.slots.get_mut(place)?;
        let usage = match permit {
            Some(_) => Usage::Exclusive,
            None => Usage::Shared,
        };
        slot.load.nars += 1;
        slot.load.bytes = slot.load.bytes.saturating_add(bytes);
        slot.load.usage = usage;
        Some(Lease {
            table: Arc::downgrade(table),
            id: slot.id,
            bytes,
            usage,
            ended: false,
            session: slot.session.clone(),
            _permit: permit,
        })
    }

    fn give_back(&mut self, lease: &Lease) {
        let place = self.slots.iter().position(|slot| slot.id == lease.id);
        let Some(place) = place else {
            return;
        };
        let load = &mut self.slots[place].load;
        load.nars = load.nars.saturating_sub(1);
        load.bytes = load.bytes.saturating_sub(lease.bytes);
        load.since = Instant::now().into_std();
        if lease.usage == Usage::Exclusive {
            load.usage = Usage::Shared;
            if !lease.ended {
                // What is left of a large NAR would have to be read and thrown away.
                self.slots.swap_remove(place);
            }
        }
    }
}

impl Lease {
    /// Returns the session to ask.
    pub(super) fn session(&self) -> &Arc<Session> {
        &self.session
    }

    /// Notes that the NAR came whole, or that the peer said properly that it does not come.
    pub(super) fn end(&mut self) {
        self.ended = true;
    }

    /// Lets the session carry no further NAR; it closes when those on it are through.
    pub(super) fn discard(&mut self) {
        self.usage = Usage::Exclusive;
        self.ended = false;
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(table) = self.table.upgrade() {
            table.lock().give_back(self);
        }
    }
}
