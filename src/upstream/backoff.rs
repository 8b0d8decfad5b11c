//! When to connect anew: at once, or after a pause that grows.
//!
//! ```text
//! start, first loss          at once
//! attempt failed n times     0.25 s * 2^(n-1), at most 30 s, a quarter more or less
//! lost within 10 s of up     counts as a failed attempt, but for the first time
//! ```

use std::time::Duration;

/// Counts failures in a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backoff {
    failures: u32,
}

/// What to do after a connection was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Connect now; questions may wait for it.
    AtOnce,
    /// Connect after this pause; questions fail meanwhile.
    After(Duration),
}

impl Backoff {
    /// Returns the pause after an attempt failed. `random` is in `0.0..1.0`.
    pub fn failed(&mut self, random: f64) -> Duration {
        self.failures = self.failures.saturating_add(1);
        pause(self.failures, random)
    }

    /// Decides after a connection was lost that had been up for a while. `random` is in `0.0..1.0`.
    pub fn lost(&mut self, up_for: Duration, random: f64) -> Next {
        if up_for >= STEADY {
            self.failures = 0;
        }
        if self.failures == 0 {
            // A connection that is lost again at once must not be made in a tight loop.
            self.failures = 1;
            Next::AtOnce
        } else {
            Next::After(self.failed(random))
        }
    }
}

/// Returns the pause after so many failures in a row.
fn pause(failures: u32, random: f64) -> Duration {
    let doublings = failures.saturating_sub(1).min(DOUBLINGS_MAX);
    let pause = FIRST.saturating_mul(1 << doublings).min(LONGEST);
    pause.mul_f64(0.75 + random.clamp(0.0, 1.0) / 2.0)
}

/// After so long a connection counts as one that works.
const STEADY: Duration = Duration::from_secs(10);
const FIRST: Duration = Duration::from_millis(250);
const LONGEST: Duration = Duration::from_secs(30);
const DOUBLINGS_MAX: u32 = 10;

#[cfg(test)]
mod tests {
    use super::*;

    const MIDDLE: f64 = 0.5;

    #[test]
    fn pauses_double_up_to_half_a_minute() {
        let mut backoff = Backoff::default();
        let mut pauses = vec![];
        for _ in 0..10 {
            pauses.push(backoff.failed(MIDDLE).as_millis());
        }
        let expected = [250, 500, 1000, 2000, 4000, 8000, 16000, 30000, 30000, 30000];
        assert_eq!(pauses, expected);
    }

    #[test]
    fn jitter_is_a_quarter_either_way() {
        let after = |random| Backoff::default().failed(random);
        assert_eq!(after(0.0), FIRST.mul_f64(0.75));
        assert_eq!(after(1.0), FIRST.mul_f64(1.25));
        let many = Backoff { failures: u32::MAX };
        assert_eq!({ many }.failed(MIDDLE), LONGEST);
    }

    #[test]
    fn a_loss_is_made_good_at_once_but_not_in_a_loop() {
        let long = Duration::from_secs(60);
        let short = Duration::from_secs(1);
        let mut backoff = Backoff::default();
        assert_eq!(backoff.lost(long, MIDDLE), Next::AtOnce);
        assert_eq!(backoff.lost(long, MIDDLE), Next::AtOnce);
        assert_ne!(backoff.lost(short, MIDDLE), Next::AtOnce);
        assert_ne!(backoff.lost(short, MIDDLE), Next::AtOnce);
        assert_eq!(backoff.lost(long, MIDDLE), Next::AtOnce);
        assert_eq!(Backoff::default().lost(short, MIDDLE), Next::AtOnce);
    }
}
