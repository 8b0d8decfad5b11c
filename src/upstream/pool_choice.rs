//! Which session carries a NAR. Pure decisions; the pool acts on them.
//!
//! ```text
//! small NAR   the shared session with the fewest bytes under way; when that is much already
//!             and there may be more sessions, a further one is opened for those that follow
//! large NAR   a session of its own: one that idles, else a new one
//! ```

use std::time::{Duration, Instant};

/// What a choice depends on, of one session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// How it is used.
    pub usage: Usage,
    /// NARs under way.
    pub nars: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Since when it is used as it is.
    pub since: Instant,
}

/// How a session is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    /// By any number of small NARs.
    Shared,
    /// By one large NAR.
    Exclusive,
}

/// Where a small NAR goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// To the session at this place.
    Use(usize),
    /// To the session at this place, and a further one is worth its login.
    UseAndOpen(usize),
    /// There is none: wait for one to open.
    Wait,
}

/// Chooses for a small NAR; `opening` sessions are on their way, `shared_max` is the cap on both.
pub fn for_small(loads: &[Load], opening: usize, shared_max: usize) -> Choice {
    let shared = || shared(loads);
    let Some((place, least)) = shared().min_by_key(|(_, load)| (load.bytes, load.nars)) else {
        return Choice::Wait;
    };
    let full = least.bytes >= FULL_BYTES || least.nars >= FULL_NARS;
    if full && opening == 0 && shared().count() < shared_max {
        Choice::UseAndOpen(place)
    } else {
        Choice::Use(place)
    }
}

/// Chooses an idle session for a large NAR: the one that idles for the shortest time.
pub fn for_large(loads: &[Load]) -> Option<usize> {
    let idle = shared(loads).filter(|(_, load)| load.nars == 0);
    idle.max_by_key(|(_, load)| load.since)
        .map(|(place, _)| place)
}

/// Tells which sessions have idled for too long; the youngest `keep` idle ones never have.
pub fn stale(loads: &[Load], now: Instant, idle_max: Duration, keep: usize) -> Vec<usize> {
    let mut idle: Vec<_> = shared(loads).filter(|(_, load)| load.nars == 0).collect();
    idle.sort_by_key(|(_, load)| std::cmp::Reverse(load.since));
    idle.into_iter()
        .skip(keep)
        .filter(|(_, load)| now.saturating_duration_since(load.since) >= idle_max)
        .map(|(place, _)| place)
        .collect()
}

fn shared(loads: &[Load]) -> impl Iterator<Item = (usize, &Load)> {
    let all = loads.iter().enumerate();
    all.filter(|(_, load)| load.usage == Usage::Shared)
}

/// So much is under way on every shared session before a further one is worth a login: about what
/// a session carries in the time of one.
const FULL_BYTES: u64 = 8 << 20;
const FULL_NARS: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    fn loads(of: &[(Usage, usize, u64, u64)]) -> Vec<Load> {
        let start = Instant::now();
        of.iter()
            .map(|&(usage, nars, bytes, since)| Load {
                usage,
                nars,
                bytes,
                since: start + Duration::from_secs(since),
            })
            .collect()
    }

    use Usage::{Exclusive, Shared};

    #[test]
    fn small_nars_go_where_the_fewest_bytes_are() {
        assert_eq!(for_small(&[], 0, 3), Choice::Wait);
        assert_eq!(
            for_small(&loads(&[(Exclusive, 1, 9, 0)]), 0, 3),
            Choice::Wait
        );
        let two = loads(&[
            (Shared, 2, 900, 0),
            (Exclusive, 1, 1, 0),
            (Shared, 9, 800, 0),
        ]);
        assert_eq!(for_small(&two, 0, 3), Choice::Use(2));
    }

    #[test]
    fn more_sessions_are_opened_when_all_are_busy() {
        let busy = loads(&[
            (Shared, 2, FULL_BYTES, 0),
            (Shared, FULL_NARS, FULL_BYTES + 1, 0),
        ]);
        assert_eq!(for_small(&busy, 0, 3), Choice::UseAndOpen(0));
        assert_eq!(for_small(&busy, 1, 3), Choice::Use(0));
        assert_eq!(for_small(&busy, 0, 2), Choice::Use(0));
    }

    #[test]
    fn large_nars_take_what_idles() {
        assert_eq!(
            for_large(&loads(&[(Shared, 1, 9, 0), (Exclusive, 0, 0, 0)])),
            None
        );
        assert_eq!(
            for_large(&loads(&[(Shared, 0, 0, 3), (Shared, 0, 0, 5)])),
            Some(1)
        );
    }

    #[test]
    fn the_youngest_idle_session_stays() {
        let all = loads(&[
            (Shared, 0, 0, 1),
            (Shared, 0, 0, 2),
            (Shared, 1, 9, 0),
            (Exclusive, 1, 9, 0),
            (Shared, 0, 0, 50),
        ]);
        let now = all[0].since + Duration::from_secs(70);
        let idle_max = Duration::from_secs(60);
        let mut places = stale(&all, now, idle_max, 1);
        places.sort_unstable();
        assert_eq!(places, [0, 1]);
        assert_eq!(stale(&all, now, idle_max, 3), [0; 0]);
    }
}
