//! Whether an upstream is waited for: connecting, well or sick.
//!
//! Plain decisions over the state of its link and its time-outs; `now` is an argument.

use std::time::{Duration, Instant};

use crate::upstream::Link;

/// Whether questions wait for an upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is being connected to: waited for, until the given time.
    Connecting {
        /// When waiting ends.
        until: Instant,
    },
    /// It gives signs of life: waited for, up to its own bound for a question.
    Well,
    /// Not waited for; what is known of its paths is still answered.
    Sick,
}

/// How long is waited for whom.
#[derive(Clone, Debug)]
pub struct Options {
    /// For an upstream that connects after start or wake-up. Design: 5 s, so that the first
    /// command after a laptop opens does not rebuild the world.
    pub patience_at_start: Duration,
    /// For one whose connection was lost a moment ago: a restarted sshd is back within it.
    pub patience_after_loss: Duration,
    /// Time-outs running after which an upstream is sick although it is connected.
    pub timeouts_max: u32,
}

/// What was seen of an upstream since the last start or wake-up.
#[derive(Clone, Debug)]
pub struct Record {
    /// The start of this program, or the last wake-up of the machine.
    pub started: Instant,
    /// Whether the upstream has been connected since then.
    pub was_up: bool,
    /// Questions running that were not answered in time.
    pub timeouts: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            patience_at_start: Duration::from_secs(5),
            patience_after_loss: Duration::from_secs(1),
            timeouts_max: 2,
        }
    }
}

impl Record {
    /// Begins anew, at start or wake-up.
    pub fn new(started: Instant) -> Self {
        Self {
            started,
            was_up: false,
            timeouts: 0,
        }
    }
}

/// Decides whether questions wait for an upstream.
pub fn standing(link: &Link, record: &Record, options: &Options, now: Instant) -> Standing {
    match link {
        Link::Up { .. } if record.timeouts >= options.timeouts_max => Standing::Sick,
        Link::Up { .. } => Standing::Well,
        Link::Down { .. } => Standing::Sick,
        Link::Connecting { since } => {
            // A connection that was up at wake-up may yet prove dead: the patience of the start holds.
            let mut until = record.started + options.patience_at_start;
            if record.was_up {
                until = until.max(*since + options.patience_after_loss);
            }
            if now < until {
                Standing::Connecting { until }
            } else {
                Standing::Sick
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn up() -> Link {
        Link::Up { peer: "Nix".into() }
    }

    #[test]
    fn a_new_upstream_is_waited_for_from_the_start_only() {
        let (options, start) = (Options::default(), Instant::now());
        let record = Record::new(start);
        let link = Link::Connecting { since: start };
        let at = |ms| standing(&link, &record, &options, start + Duration::from_millis(ms));
        let until = start + Duration::from_secs(5);
        assert_eq!(at(0), Standing::Connecting { until });
        assert_eq!(at(4999), Standing::Connecting { until });
        assert_eq!(at(5000), Standing::Sick);
    }

    #[test]
    fn a_lost_one_is_waited_for_a_moment() {
        let (options, start) = (Options::default(), Instant::now());
        let record = Record {
            was_up: true,
            ..Record::new(start)
        };
        let lost = start + Duration::from_secs(100);
        let link = Link::Connecting { since: lost };
        let at = |ms| standing(&link, &record, &options, lost + Duration::from_millis(ms));
        let until = lost + Duration::from_secs(1);
        assert_eq!(at(999), Standing::Connecting { until });
        assert_eq!(at(1000), Standing::Sick);
    }

    #[test]
    fn one_lost_just_after_a_wake_up_has_the_patience_of_the_start() {
        let (options, woken) = (Options::default(), Instant::now());
        let record = Record {
            was_up: true,
            ..Record::new(woken)
        };
        // What ssh takes to see that the old connection is dead.
        let since = woken + Duration::from_secs(2);
        let standing = standing(&Link::Connecting { since }, &record, &options, since);
        let until = woken + Duration::from_secs(5);
        assert_eq!(standing, Standing::Connecting { until });
    }

    #[test]
    fn two_timeouts_running_make_a_connected_one_sick() {
        let (options, now) = (Options::default(), Instant::now());
        let mut record = Record::new(now);
        record.timeouts = 1;
        assert_eq!(standing(&up(), &record, &options, now), Standing::Well);
        record.timeouts = 2;
        assert_eq!(standing(&up(), &record, &options, now), Standing::Sick);
        let down = Link::Down {
            error: "refused".into(),
            retry_after: Duration::ZERO,
        };
        record.timeouts = 0;
        assert_eq!(standing(&down, &record, &options, now), Standing::Sick);
    }
}
