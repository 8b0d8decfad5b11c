//! Whether a daemon that was heard a moment ago still lives: a question that costs it nothing.
//!
//! It goes before the questions of a connection that has none under way, so its answer waits for nothing but
//! the daemon itself: a loaded one that is slow with what stands behind it has answered this already.
//! ssh's own keep-alives show silence too, but between one and two seconds late: they go out at whole seconds.
//! Behind a question nothing can be told from it, so none is asked there, and those keep-alives decide.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use super::connection::Pending;
use super::session::Session;
use crate::nix::worker_protocol::request::Request;

/// The bounds of pulses.
#[derive(Clone, Copy, Debug)]
pub struct PulseOptions {
    /// For the answer; then nobody waits for the daemon until it comes. One round trip to a process that
    /// need not read anything from disk: a builder that is frozen half of the time gives it in half a second.
    pub within: Duration,
    /// Only a daemon heard so recently is asked. One that was idle for longer may have to be read
    /// back from swap first.
    pub heard_within: Duration,
}

/// Asks for a connection's pulse; a clone does for the same connection.
#[derive(Clone)]
pub(super) struct Asking {
    pulses: mpsc::Sender<Pulse>,
    options: PulseOptions,
}

/// Waits for the answers of one connection.
pub(super) struct Watching {
    pulses: mpsc::Receiver<Pulse>,
    options: PulseOptions,
}

/// A pulse under way.
pub(super) struct Pulse {
    asked: Instant,
    answer: Pending,
}

/// Makes the two ends for one connection.
pub(super) fn channel(options: PulseOptions) -> (Asking, Watching) {
    // One is under way at a time.
    let (sender, receiver) = mpsc::channel(1);
    let asking = Asking {
        pulses: sender,
        options,
    };
    let watching = Watching {
        pulses: receiver,
        options,
    };
    (asking, watching)
}

impl Asking {
    /// Asks, where the answer can tell something: call it before each question.
    pub(super) fn before_question(&self, session: &Arc<Session>) {
        if session.silent_for() > self.options.heard_within {
            return;
        }
        let Ok(permit) = self.pulses.try_reserve() else {
            return;
        };
        if let Some(answer) = session.ask_when_idle(Request::QueryValidPaths(vec![])) {
            let asked = Instant::now();
            permit.send(Pulse { asked, answer });
        }
    }
}

impl Watching {
    /// Waits for a pulse that is not answered in time. Dropped, it forgets the one it waits for.
    pub(super) async fn missed(&mut self) -> Pulse {
        loop {
            let Some(mut pulse) = self.pulses.recv().await else {
                return std::future::pending().await;
            };
            let until = pulse.asked + self.options.within;
            if timeout_at(until, pulse.answer.settled()).await.is_err() {
                return pulse;
            }
        }
    }
}

impl Pulse {
    /// Waits for the answer, however late; for ever if the connection ends.
    pub(super) async fn comes(mut self) {
        if self.answer.settled().await.is_err() {
            std::future::pending().await
        }
    }
}

impl Default for PulseOptions {
    fn default() -> Self {
        Self {
            within: Duration::from_millis(1200),
            heard_within: Duration::from_secs(30),
        }
    }
}
