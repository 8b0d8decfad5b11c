//! The standing connection for look-ups.
//!
//! ```text
//! Connecting --opened--> Up --lost--> Connecting      at once, unless it is lost again and again
//!      \                   \--fell silent--v
//!       \--failed-----------------------> Down --pause, attempt--> Up
//!                    \--reconnect()--> Connecting
//! ```
//!
//! Questions wait while the link is connecting and fail at once while it is down. One that was
//! under way when the connection broke is asked once more on the next, because all questions here
//! only read. The task that connects is owned and ends with the [`Standing`].

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info, warn};

use super::backoff::{Backoff, Next};
use super::session::{Session, SessionOptions};
use super::wire::{Dial, Purpose};
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
        let keeper = tokio::spawn(keep(shared.clone()));
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
        let begun = Instant::now();
        let (mut answered, mut since) = (0, begun);
        let tick = (silence_max / 8).clamp(TICK_MIN, TICK_MAX);
        let enough = |now_answered| {
            if now_answered > answered {
                (answered, since) = (now_answered, Instant::now());
            }
            if !self.shared.status.borrow().is(live) {
                return Some(Error::Lost("the connection was given up".into()));
            }
            let (silent, whole) = (since.elapsed(), begun.elapsed());
            (silent >= silence_max || whole >= whole_max)
                .then(|| self.timed_out(live, question, whole.min(silence_max)))
        };
        live.session.ask_many_until(requests, tick, enough).await
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

/// The cause that the operator was last warned of, so that it is told once.
type Told = Option<Arc<str>>;

/// Connects, waits for the loss, and connects again, for ever.
async fn keep(shared: Arc<Shared>) {
    let mut backoff = Backoff::default();
    let mut number = 0;
    let mut told = None;
    // Such a store is connected to at each attempt, which is no news.
    let mut elsewhere = false;
    loop {
        let attempt = Session::open(&*shared.dial, Purpose::Lookup, &shared.options.session);
        let opened = tokio::select! {
            biased;
            () = shared.wake.notified() => continue,
            opened = attempt => opened,
        };
        let next = match opened {
            Ok(session) => {
                number += 1;
                let session = Arc::new(session);
                shared.up(&session, number, elsewhere);
                let up_at = Instant::now();
                let cause = shared.loss(&session).await;
                elsewhere = matches!(cause, Error::StoreDir(_));
                let next = if elsewhere {
                    Next::After(backoff.failed(fastrand::f64()))
                } else {
                    told = None;
                    backoff.lost(up_at.elapsed(), fastrand::f64())
                };
                shared.lost(&session, cause, next, &mut told).await;
                next
            }
            Err(error) => {
                let pause = backoff.failed(fastrand::f64());
                shared.failed(error, pause, &mut told);
                Next::After(pause)
            }
        };
        if let Next::After(pause) = next {
            tokio::select! {
                () = sleep(pause) => {}
                () = shared.wake.notified() => {}
            }
        }
    }
}

impl Shared {
    /// Waits until the connection is over, or found silent while a question waits.
    async fn loss(&self, session: &Session) -> Error {
        tokio::select! {
            // It refuses and closes: the reason goes first.
            biased;
            error = session.other_store_dir() => error,
            error = session.closed() => error,
            () = self.distrust.notified() => {
                let after = self.options.query_timeout;
                Error::Lost(format!("no sign of life for {after:?} while a question waited").into())
            }
        }
    }

    fn up(&self, session: &Arc<Session>, number: u64, elsewhere: bool) {
        let peer = session.peer();
        if elsewhere {
            debug!(upstream = %self.name, %peer, "connected");
        } else {
            info!(upstream = %self.name, %peer, "connected");
        }
        let session = session.clone();
        let peer = peer.into();
        self.change(Status::Up(Live { session, number }), Link::Up { peer });
    }

    /// Says first that the link is gone, and learns then from the carrier why.
    async fn lost(&self, session: &Session, cause: Error, next: Next, told: &mut Told) {
        self.connecting();
        // What was given up has not ended, and will not say why.
        let error = match session.is_closed() {
            true => session.explain(cause).await,
            false => cause,
        };
        match (next, &error) {
            // Silent, so it will hardly answer a moment later: the attempt is made, and nobody waits for it.
            (Next::AtOnce, Error::Down(_)) => self.failed(error, Duration::ZERO, told),
            (Next::AtOnce, _) => {
                warn!(upstream = %self.name, %error, "connection lost, connecting anew");
            }
            (Next::After(pause), _) => self.failed(error, pause, told),
        }
    }

    fn connecting(&self) {
        self.connecting_if(|_| true);
    }

    /// Goes over to connecting if the present state is such; tells whether it is.
    fn connecting_if(&self, such: impl Fn(&Link) -> bool) -> bool {
        let _changing = self.changing.lock();
        let begins = such(&self.link.borrow());
        if begins {
            let since = Instant::now().into_std();
            self.status.send_replace(Status::Connecting);
            self.link.send_replace(Link::Connecting { since });
        }
        begins
    }

    fn change(&self, status: Status, link: Link) {
        let _changing = self.changing.lock();
        self.status.send_replace(status);
        self.link.send_replace(link);
    }

    fn failed(&self, error: Error, retry_after: Duration, told: &mut Told) {
        let text: Arc<str> = match &error {
            Error::Down(text) | Error::Lost(text) => text.clone(),
            error => error.to_string().into(),
        };
        if told.as_ref() == Some(&text) {
            debug!(upstream = %self.name, error = %text, ?retry_after, "still down");
        } else {
            warn!(upstream = %self.name, error = %text, "down, trying again in the background");
            *told = Some(text.clone());
        }
        let status = match error {
            // What must be changed by hand is told as it is.
            Error::StoreDir(_) | Error::Protocol(_) => error,
            _ => Error::Down(text.clone()),
        };
        let error = text;
        self.change(Status::Down(status), Link::Down { error, retry_after });
    }
}

impl Default for StandingOptions {
    fn default() -> Self {
        Self {
            session: SessionOptions::default(),
            query_timeout: Duration::from_secs(10),
            batch_timeout: Duration::from_secs(60),
            retry_within: Duration::from_secs(5),
        }
    }
}

/// How often it is looked whether answers still come.
const TICK_MIN: Duration = Duration::from_millis(10);
const TICK_MAX: Duration = Duration::from_millis(250);

/// An attempt younger than this is not given up for another.
const FRESH: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests;
