//! Two generations of temporary roots. Pure decisions; `roots` acts on them.
//!
//! A root is held by its connection and cannot be released, so a connection is a generation: it
//! takes roots for a lifetime, holds them for one more, and is closed with all of them.
//!
//! ```text
//! 0            L             2L            3L
//! |-- current -|-- previous -|                    first generation
//!              |-- current --|-- previous -|      second
//! ```
//!
//! A path is held for one lifetime at least and two at most after it was asked for last. The paths of
//! a connection that was lost are orphans until they are rooted anew, or their time is over.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use crate::nix::store_path::StorePath;

/// The generations with what holds them, `C`.
#[derive(Debug)]
pub struct Generations<C> {
    current: Option<Generation<C>>,
    previous: Option<Generation<C>>,
    /// Paths whose connection was lost, and until when they were to be held.
    orphans: Option<(HashSet<StorePath>, Instant)>,
    lifetime: Duration,
    /// A generation with so many roots takes no more, so that memory is bounded.
    roots_max: usize,
}

/// A connection and the paths that it roots.
#[derive(Debug)]
struct Generation<C> {
    carrier: C,
    since: Instant,
    kept: HashSet<StorePath>,
}

impl<C: Clone> Generations<C> {
    /// Makes none yet.
    pub fn new(lifetime: Duration, roots_max: usize) -> Self {
        Self {
            current: None,
            previous: None,
            orphans: None,
            lifetime,
            roots_max: roots_max.max(1),
        }
    }

    /// Moves on to `now`: what is too old takes no more roots, or is dropped.
    pub fn advance(&mut self, now: Instant) {
        if self
            .orphans
            .as_ref()
            .is_some_and(|(_, until)| *until <= now)
        {
            self.orphans = None;
        }
        let age = |since: Instant| now.saturating_duration_since(since);
        let ended = |g: &Generation<C>, lifetimes| age(g.since) >= self.lifetime * lifetimes;
        if self.previous.as_ref().is_some_and(|g| ended(g, 2)) {
            self.previous = None;
        }
        let done = |g: &Generation<C>| ended(g, 1) || g.kept.len() >= self.roots_max;
        if self.current.as_ref().is_some_and(done) {
            self.previous = self.current.take();
        }
        if self.previous.as_ref().is_some_and(|g| ended(g, 2)) {
            self.previous = None;
        }
    }

    /// Returns what holds the current generation.
    pub fn current(&self) -> Option<C> {
        self.current.as_ref().map(|g| g.carrier.clone())
    }

    /// Tells until when the current generation takes roots.
    pub fn current_until(&self) -> Option<Instant> {
        self.current.as_ref().map(|g| g.since + self.lifetime)
    }

    /// Begins a generation.
    pub fn begin(&mut self, carrier: C, now: Instant) {
        let old = self.current.replace(Generation {
            carrier,
            since: now,
            kept: HashSet::new(),
        });
        if old.is_some() {
            self.previous = old;
        }
    }

    /// Tells whether the current generation holds this path.
    pub fn holds(&self, path: &StorePath) -> bool {
        self.current.as_ref().is_some_and(|g| g.kept.contains(path))
    }

    /// Notes that the generation held by what `is` says roots a path.
    pub fn note(&mut self, is: impl Fn(&C) -> bool, path: StorePath) {
        if let Some(current) = self.current.as_mut().filter(|g| is(&g.carrier)) {
            current.kept.insert(path);
        }
    }

    /// Drops what `is` says is lost; its paths are orphans now.
    pub fn lose(&mut self, is: impl Fn(&C) -> bool) {
        for generation in [&mut self.current, &mut self.previous] {
            if let Some(lost) = generation.take_if(|g| is(&g.carrier)) {
                if lost.kept.is_empty() {
                    continue;
                }
                let until = lost.since + self.lifetime * 2;
                let (orphans, last) = self.orphans.get_or_insert((HashSet::new(), until));
                orphans.extend(lost.kept);
                *last = until.max(*last);
            }
        }
    }

    /// Tells whether there are paths to be rooted anew.
    pub fn has_orphans(&self) -> bool {
        self.orphans.is_some()
    }

    /// Takes the paths that are to be rooted anew, and until when they are to be held.
    pub fn take_orphans(&mut self) -> Option<(HashSet<StorePath>, Instant)> {
        self.orphans.take()
    }

    /// Notes paths that are yet to be rooted anew, until then.
    pub fn orphan(&mut self, paths: impl IntoIterator<Item = StorePath>, until: Instant) {
        let empty = || (HashSet::new(), until);
        let (orphans, last) = self.orphans.get_or_insert_with(empty);
        orphans.extend(paths);
        *last = until.max(*last);
    }

    /// Tells when [`advance`](Self::advance) has something to do next.
    pub fn next_change(&self) -> Option<Instant> {
        let current = self.current.as_ref().map(|g| g.since + self.lifetime);
        let previous = self.previous.as_ref().map(|g| g.since + self.lifetime * 2);
        let orphans = self.orphans.as_ref().map(|(_, until)| *until);
        current.into_iter().chain(previous).chain(orphans).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const L: Duration = Duration::from_secs(900);

    fn path(name: &str) -> StorePath {
        format!("xgd4ijld16zz4n65lm0jzb4cfscm9vwi-{name}")
            .parse()
            .unwrap()
    }

    #[test]
    fn each_holds_for_two_lifetimes() {
        let start = Instant::now();
        let mut all = Generations::new(L, 100);
        assert_eq!(all.next_change(), None);
        all.begin(1, start);
        all.note(|c| *c == 1, path("a"));
        assert!(all.holds(&path("a")));

        all.advance(start + L - Duration::from_secs(1));
        assert_eq!(all.current(), Some(1));
        assert_eq!(all.next_change(), Some(start + L));

        all.advance(start + L);
        assert_eq!(all.current(), None);
        assert!(!all.holds(&path("a")));
        assert_eq!(all.previous.as_ref().map(|g| g.carrier), Some(1));

        all.begin(2, start + L + L / 2);
        assert_eq!(all.next_change(), Some(start + L * 2));
        all.advance(start + L * 2);
        assert!(all.previous.is_none());
        assert_eq!(all.current(), Some(2));
    }

    #[test]
    fn a_long_sleep_ends_both() {
        let start = Instant::now();
        let mut all = Generations::new(L, 100);
        all.begin(1, start);
        all.advance(start + L * 5);
        assert!(all.current.is_none() && all.previous.is_none());
    }

    #[test]
    fn a_full_generation_and_a_lost_one() {
        let start = Instant::now();
        let mut all = Generations::new(L, 2);
        all.begin(1, start);
        for name in ["a", "b"] {
            all.note(|_| true, path(name));
        }
        all.note(|c| *c == 9, path("c"));
        assert!(!all.holds(&path("c")));
        all.advance(start);
        assert_eq!(all.current(), None);
        all.begin(2, start);
        all.lose(|c| *c == 1);
        assert!(all.previous.is_none());
        all.lose(|c| *c == 2);
        assert_eq!(all.current(), None);
        let (orphans, until) = all.take_orphans().unwrap();
        assert_eq!(orphans, HashSet::from([path("a"), path("b")]));
        assert!(!all.has_orphans());
        assert_eq!(all.next_change(), None);
        all.orphan([path("b")], until);
        assert!(all.has_orphans(), "it could not be rooted");
        assert_eq!(all.next_change(), Some(until));
    }

    #[test]
    fn orphans_have_their_time_too() {
        let start = Instant::now();
        let mut all = Generations::new(L, 100);
        all.begin(1, start);
        all.note(|_| true, path("a"));
        all.lose(|_| true);
        all.advance(start + L);
        assert!(all.has_orphans());
        all.advance(start + L * 2);
        assert!(!all.has_orphans());
    }
}
