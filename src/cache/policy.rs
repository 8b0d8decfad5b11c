//! When a kept answer may be given again: plain decisions, `now` is an argument.

use std::time::{Duration, Instant};

/// What to do with a kept answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freshness {
    /// Give it.
    Fresh,
    /// Give it, and ask again in the background.
    Stale,
}

/// Decides whether an answer of the time `checked` is asked for again.
pub fn freshness(checked: Instant, revalidate_after: Duration, now: Instant) -> Freshness {
    if now.saturating_duration_since(checked) < revalidate_after {
        Freshness::Fresh
    } else {
        Freshness::Stale
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_grows_stale_at_its_age() {
        let checked = Instant::now();
        let age = Duration::from_secs(60);
        let at = |seconds| freshness(checked, age, checked + Duration::from_secs(seconds));
        assert_eq!(at(0), Freshness::Fresh);
        assert_eq!(at(59), Freshness::Fresh);
        assert_eq!(at(60), Freshness::Stale);
    }
}
