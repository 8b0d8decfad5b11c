//! The task that keeps a standing connection: it connects, waits for the loss, and connects again.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tracing::{debug, info, warn};

use super::{Live, Shared, Status};
use crate::upstream::backoff::{Backoff, Next};
use crate::upstream::pulse;
use crate::upstream::session::Session;
use crate::upstream::wire::Purpose;
use crate::upstream::{Error, Link};

/// The cause that the operator was last warned of, so that it is told once.
type Told = Option<Arc<str>>;

/// Connects, waits for the loss, and connects again, for ever.
pub(super) async fn keep(shared: Arc<Shared>) {
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
                let (pulse, mut beats) = pulse::channel(shared.options.pulse);
                let live = Live {
                    session: session.clone(),
                    number,
                    pulse,
                };
                shared.up(&live, elsewhere);
                let up_at = Instant::now();
                let cause = shared.tend(&live, &mut beats, &mut told).await;
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
    /// Waits until the connection is over. While the daemon gives no sign of life the link is down, so that
    /// nobody waits; a daemon that was merely held up is up again with its answer.
    async fn tend(&self, live: &Live, beats: &mut pulse::Watching, told: &mut Told) -> Error {
        let mut loss = pin!(self.loss(&live.session));
        loop {
            let pulse = tokio::select! {
                biased;
                error = &mut loss => return error,
                pulse = beats.missed() => pulse,
            };
            self.silent(told);
            tokio::select! {
                biased;
                error = &mut loss => return error,
                () = self.wake.notified() => {
                    return Error::Lost("it is silent, and a new connection was asked for".into());
                }
                // Nobody asks a link that is down, and so nobody else would find it silent for long.
                () = sleep(self.options.query_timeout) => {
                    return Error::Lost("it stayed silent".into());
                }
                () = pulse.comes() => {}
            }
            self.heard_again(live);
        }
    }

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

    fn up(&self, live: &Live, elsewhere: bool) {
        let peer = live.session.peer();
        if elsewhere {
            debug!(upstream = %self.name, %peer, "connected");
        } else {
            info!(upstream = %self.name, %peer, "connected");
        }
        let peer = peer.into();
        self.change(Status::Up(live.clone()), Link::Up { peer });
    }

    fn silent(&self, told: &mut Told) {
        let text = format!("no sign of life for {:?}", self.options.pulse.within);
        self.failed(Error::Down(text.into()), Duration::ZERO, told);
    }

    fn heard_again(&self, live: &Live) {
        let peer = live.session.peer();
        debug!(upstream = %self.name, %peer, "heard again");
        let peer = peer.into();
        self.change(Status::Up(live.clone()), Link::Up { peer });
    }

    /// Says first that the link is gone, unless it was down already, and learns then from the carrier why.
    async fn lost(&self, session: &Session, cause: Error, next: Next, told: &mut Told) {
        self.connecting_if(|link| matches!(link, Link::Up { .. }));
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

    /// Goes over to connecting if the present state is such; tells whether it is.
    pub(super) fn connecting_if(&self, such: impl Fn(&Link) -> bool) -> bool {
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
