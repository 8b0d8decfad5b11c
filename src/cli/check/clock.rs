//! How far another machine's clock is from ours.

use std::fmt;
use std::time::{Duration, SystemTime};

use crate::cli::units;

/// A difference, known to within the time that asking took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Difference {
    by: Duration,
    ahead: bool,
}

impl Difference {
    /// Compares a clock, read to the second between two moments, with ours.
    pub(super) fn of(theirs: SystemTime, before: SystemTime, after: SystemTime) -> Self {
        // Whole seconds are cut off, so they may be almost a second behind.
        let latest = theirs + Duration::from_secs(1);
        if let Ok(by) = theirs.duration_since(after) {
            Self { by, ahead: true }
        } else if let Ok(by) = before.duration_since(latest) {
            Self { by, ahead: false }
        } else {
            Self {
                by: Duration::ZERO,
                ahead: false,
            }
        }
    }

    /// Tells whether nothing suffers from it.
    pub(super) fn tolerable(&self) -> bool {
        self.by <= TOLERABLE
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.by < Duration::from_secs(1) {
            return f.write_str("agrees with ours");
        }
        let side = if self.ahead { "ahead of" } else { "behind" };
        write!(f, "{} {side} ours", units::duration(self.by))
    }
}

/// Certificates that were just made, and what is kept for a minute, suffer from more.
const TOLERABLE: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_more_or_less_is_no_difference() {
        let at = |ms| SystemTime::UNIX_EPOCH + Duration::from_millis(ms);
        let of = |theirs, before, after| Difference::of(at(theirs), at(before), at(after));
        assert_eq!(of(5000, 5900, 5950).to_string(), "agrees with ours");
        assert_eq!(of(6000, 5900, 5950).to_string(), "agrees with ours");
        assert_eq!(of(96_000, 5000, 6000).to_string(), "1 min ahead of ours");
        assert!(!of(96_000, 5000, 6000).tolerable());
        assert_eq!(of(1000, 62_000, 63_000).to_string(), "1 min behind ours");
        assert!(of(1000, 62_000, 63_000).tolerable());
    }
}
