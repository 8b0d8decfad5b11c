//! What another muster is told: this machine's own store, and nothing that others would have to be asked for.
//!
//! ```text
//! a asks b, b asks a:   client -> a -> b (own store only) -> a's client has its answer; nothing goes round
//! ```
//!
//! Its look-ups are remembered apart from those of clients, whose answers speak for all upstreams. NARs are not
//! kept apart: which bytes belong to a URL does not depend on who asks.

use std::sync::Arc;

use crate::cache::memory;

use super::member::Member;
use super::shared::Shared;
use super::{Options, Setup, Substituter};

impl Substituter {
    /// Returns the same with this machine's own store as the only upstream.
    ///
    /// Without such an upstream it has nothing. It takes part in what `self` replaces and stops.
    #[must_use]
    pub fn own_store(&self) -> Self {
        match &self.own {
            None => self.clone(),
            Some(own) => Self {
                shared: Arc::clone(own),
                own: None,
                all: Some(Arc::clone(&self.shared)),
            },
        }
    }

    /// Tells whether this machine's own store is among the upstreams.
    pub fn has_own_store(&self) -> bool {
        let setup = self.shared.setup();
        setup.members.iter().any(|member| member.is_own_store())
    }

    /// Returns whose cache and transfers bring NARs.
    pub(super) fn carrier(&self) -> &Arc<Shared> {
        self.all.as_ref().unwrap_or(&self.shared)
    }
}

impl Setup {
    /// Returns the same with the own store alone.
    pub(super) fn of_own_store(&self) -> Self {
        let own = |member: &&Arc<Member>| member.is_own_store();
        Self {
            members: self.members.iter().filter(own).map(Arc::clone).collect(),
            publisher: self.publisher.clone(),
        }
    }
}

impl Options {
    /// Returns the bounds for answering other musters, who remember what they are told themselves.
    pub(super) fn of_own_store(&self) -> Self {
        Self {
            memory: memory::Options {
                bytes_max: self.memory.bytes_max / MEMORY_PART,
                ..self.memory.clone()
            },
            prefetch: None,
            ahead: None,
            ..self.clone()
        }
    }
}

/// The own store is asked in less than a tenth of a millisecond, so little is worth remembering.
const MEMORY_PART: u64 = 8;
