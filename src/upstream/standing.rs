//! The standing connection for look-ups.
//!
//! ```text
//! Connecting --opened--> Up --lost--> Connecting      at once, unless it is lost again and again
//!      \                   \--fell silent--v--heard again--> Up
//!       \--failed-----------------------> Down --pause, attempt--> Up
//!                    \--reconnect()--> Connecting
//! ```
//!
//! Questions wait while the link is connecting and fail at once while it is down. One that was
//! under way when the connection broke is asked once more on the next, because all questions here
//! only read. The task that connects (`keeper`) is owned and ends with the [`Standing`].

mod keeper;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::pulse::{self, PulseOptions};
use super::session::{Session, SessionOptions};
use super::wire::Dial;
use super::{Error, Link};
use crate::nix::worker_protocol::reply::Reply;
use crate::nix::worker_protocol::request::Request;

/// Keeps one connection up and asks questions over it.
pub struct Standing {
    shared: Arc<Shared>,
    keeper: JoinHandle<()>,
}

/// The bounds of a standing connection.
#[derive(Clone, Debug)]
pub struct StandingOptions {
    /// Of each attempt to connect.
    pub session: SessionOptions,
    /// From asking a question, once there is a connection, to its answer. A connection that is
    /// silent for so long while a question waits is given up.
    pub query_timeout: Duration,
    /// From asking many questions to the last answer, as long as answers come: a closure over a
    /// thin line takes its time. Without one they are given up after `query_timeout`.
    pub batch_timeout: Duration,
    /// For the next connection, when one is lost with questions under way.
    pub retry_within: Duration,
    /// Of the sign of life that is asked for with questions.
    pub pulse: PulseOptions,
}

struct Shared {
    name: String,
    dial: Arc<dyn Dial>,
    options: StandingOptions,
    status: watch::Sender<Status>,
    link: watch::Sender<Link>,
    /// Held while both change, so that they tell the same. Never held over an await.
    changing: Mutex<()>,
    /// Cuts the pause between two attempts, or an attempt.
    wake: Notify,
    /// Ends a connection that a question found silent.
    distrust: Notify,
}

#[derive(Clone)]
enum Status {
    Connecting,
    Up(Live),
    Down(Error),
}

impl Status {
    fn is(&self, live: &Live) -> bool {
        matches!(self, Self::Up(current) if current.number == live.number)
    }
}

/// The connection that is up, with its number among all so far.
#[derive(Clone)]
struct Live {
    session: Arc<Session>,
    number: u64,
    pulse: pulse::Asking,
}

impl Standing {
    /// Begins to connect; must be called in a runtime.
    pub fn start(name: String, dial: Arc<dyn Dial>, options: StandingOptions) -> Self {
        let shared = Arc::new(Shared {
            name,
            dial,
            options,
            status: watch::Sender::new(Status::Connecting),
            link: watch::Sender::new(Link::Connecting {
                since: Instant::now().into_std(),
            }),
            changing: Mutex::default(),
            wake: Notify::new(),
            distrust: Notify::new(),
        });
        let keeper = tokio::spawn(keeper::keep(shared.clone()));
        Self { shared, keeper }
    }

    /// Follows the state of the connection.
    pub fn link(&self) -> watch::Receiver<Link> {
        self.shared.link.subscribe()
    }

    /// Begins an attempt at once, in place of a pause or of an attempt that has taken long.
    ///
    /// Questions wait for it from now on. A connection that is up stays.
    pub fn reconnect(&self) {
        let begins = self.shared.connecting_if(|link| match link {
            Link::Up { .. } => false,
            Link::Connecting { since } => Instant::from_std(*since).elapsed() >= FRESH,
            Link::Down { .. } => true,
        });
        if begins {
            self.shared.wake.notify_one();
        }
    }

    /// Waits while the link is connecting; fails when it is down.
    pub async fn ready(&self) -> Result<(), Error> {
        self.live_after(0).await.map(drop)
    }

    /// Asks one question.
    ///
    /// Dropped, the question may still reach the store; its answer is thrown away.
    pub async fn ask(&self, request: Request) -> Result<Reply, Error> {
        let live = self.live_after(0).await?;
        match self.ask_on(&live, request.clone()).await {
            Err(error) if live.session.broke(&error) => {
                let next = self.next_live(&live, error).await?;
                self.ask_on(&next, request).await
            }
            answer => answer,
        }
    }

    /// Asks many questions at once; the answers have their order.
    ///
    /// Those that a loss of the connection left open are asked once more.
    pub async fn ask_many(&self, requests: Vec<Request>) -> Vec<Result<Reply, Error>> {
        let live = match self.live_after(0).await {
            Ok(live) => live,
            Err(error) => return vec![Err(error); requests.len()],
        };
        let mut answers = self.ask_many_on(&live, requests.clone()).await;
        let lost = |answer: &Result<Reply, Error>| match answer {
            Ok(_) => false,
            Err(error) => live.session.broke(error),
        };
        let Some(Err(cause)) = answers.iter().find(|a| lost(a)).cloned() else {
            return answers;
        };
        let Ok(next) = self.next_live(&live, cause).await else {
            return answers;
        };
        let again: Vec<_> = requests
            .into_iter()
            .zip(&answers)
            .filter(|(_, answer)| lost(answer))
            .map(|(request, _)| request)
            .collect();
        let mut second = self.ask_many_on(&next, again).await.into_iter();
        for open in answers.iter_mut().filter(|a| lost(a)) {
            if let Some(answer) = second.next() {
                *open = answer;
            }
        }
        answers
    }

    async fn ask_on(&self, live: &Live, request: Request) -> Result<Reply, Error> {
        let question = request.name();
        let after = self.shared.options.query_timeout;
        live.pulse.before_question(&live.session);
        let answer = async {
            tokio::select! {
                biased;
                answer = live.session.ask(request) => answer,
                given_up = self.given_up(live) => Err(given_up),
            }
        };
        match timeout(after, answer).await {
            Ok(answer) => answer,
            Err(_) => Err(self.timed_out(live, question, after)),
        }
    }

    /// Asks until no answer comes any more; those that came before count.
    async fn ask_many_on(&self, live: &Live, requests: Vec<Request>) -> Vec<Result<Reply, Error>> {
        let question = requests.first().map_or("nothing", Request::name);
        let (silence_max, whole_max) = {
            let options = &self.shared.options;
            (options.query_timeout, options.batch_timeout)
        };
        live.pulse.before_question(&live.session);
        let begun = Instant::now();
        let timed_out = |after| self.timed_out(live, question, after);
        let enough = || {
            if !self.shared.status.borrow().is(live) {
                return Some(Error::Lost("the connection was given up".into()));
            }
            (begun.elapsed() >= whole_max).then(|| timed_out(silence_max.min(whole_max)))
        };
        let silent = || timed_out(silence_max);
        let asked = (live.session).ask_many_while_heard(requests, silence_max, enough, silent);
        asked.await
    }

    /// Waits until this connection is no longer the one that questions go to.
    async fn given_up(&self, live: &Live) -> Error {
        let mut status = self.shared.status.subscribe();
        let other = |status: &Status| !status.is(live);
        // Without a sender there is nobody left who would ask.
        let _ = status.wait_for(other).await;
        Error::Lost("the connection was given up".into())
    }

    /// Makes the error of a question that got no answer, and gives up a silent connection.
    fn timed_out(&self, live: &Live, question: &'static str, after: Duration) -> Error {
        let silent = live.session.silent_for() >= self.shared.options.query_timeout;
        if silent && self.shared.status.borrow().is(live) {
            self.shared.distrust.notify_waiters();
        }
        Error::TimedOut { question, after }
    }

    /// Waits for a connection later than this one; fails when the link is down.
    async fn live_after(&self, number: u64) -> Result<Live, Error> {
        let mut status = self.shared.status.subscribe();
        let settled = status.wait_for(|status| match status {
            Status::Connecting => false,
            Status::Up(live) => live.number > number,
            Status::Down(_) => true,
        });
        match settled.await.as_deref() {
            Ok(Status::Up(live)) => Ok(live.clone()),
            Ok(Status::Down(error)) => Err(error.clone()),
            // The sender is ours, and has been waited for.
            Ok(Status::Connecting) | Err(_) => Err(Error::Down("it is being closed".into())),
        }
    }

    /// Waits a bounded time for the connection after a lost one.
    async fn next_live(&self, lost: &Live, cause: Error) -> Result<Live, Error> {
        let within = self.shared.options.retry_within;
        match timeout(within, self.live_after(lost.number)).await {
            Ok(next) => next,
            Err(_) => Err(cause),
        }
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

impl Default for StandingOptions {
    fn default() -> Self {
        Self {
            session: SessionOptions::default(),
            query_timeout: Duration::from_secs(10),
            batch_timeout: Duration::from_secs(60),
            retry_within: Duration::from_secs(5),
            pulse: PulseOptions::default(),
        }
    }
}

/// An attempt younger than this is not given up for another.
const FRESH: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests;
