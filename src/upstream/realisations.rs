//! Asking for realisations without harm to a builder that knows none.
//!
//! A daemon without the feature `ca-derivations` does not refuse `QueryRealisation`: Nix 2.8 and 2.26
//! abort on it (an assertion in their database code), and all that is under way on the connection is
//! lost. Nix 2.34 answers properly. So the first such question goes out on a connection of its own;
//! further ones take the look-up connection once it was answered.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;
use tracing::debug;

use super::session::{Session, SessionOptions};
use super::standing::Standing;
use super::wire::{Dial, Purpose};
use super::{Error, Link};
use crate::nix::worker_protocol::reply::Reply;
use crate::nix::worker_protocol::request::Request;

/// What is known of one daemon's realisations.
pub(super) struct Realisations {
    name: String,
    dial: Arc<dyn Dial>,
    session: SessionOptions,
    query_timeout: Duration,
    // Never held over an await.
    known: Mutex<Known>,
    /// Held while a trial is under way, so that one does for all who ask.
    trying: tokio::sync::Mutex<()>,
}

/// What a trial has shown, and since which state of the link it holds.
struct Known {
    ability: Option<Ability>,
    link: watch::Receiver<Link>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ability {
    Answers,
    Breaks,
}

impl Realisations {
    pub(super) fn new(
        name: String,
        dial: Arc<dyn Dial>,
        session: SessionOptions,
        query_timeout: Duration,
        link: watch::Receiver<Link>,
    ) -> Self {
        Self {
            name,
            dial,
            session,
            query_timeout,
            known: Mutex::new(Known {
                ability: None,
                link,
            }),
            trying: tokio::sync::Mutex::default(),
        }
    }

    /// Asks for a realisation or build trace; `None`: the daemon knows none at all.
    pub(super) async fn ask(
        &self,
        standing: &Standing,
        request: Request,
    ) -> Result<Option<Reply>, Error> {
        if self.ability().is_none() {
            let _trying = self.trying.lock().await;
            if self.ability().is_none() {
                return self.attempt(standing, request).await;
            }
        }
        match self.ability() {
            Some(Ability::Breaks) => Ok(None),
            _ => known(standing.ask(request).await),
        }
    }

    /// Asks on a connection of its own and notes what becomes of it.
    async fn attempt(&self, standing: &Standing, request: Request) -> Result<Option<Reply>, Error> {
        // Waits for the link, and fails while it is down, as every question does.
        standing.ready().await?;
        let session = Session::open(&*self.dial, Purpose::Lookup, &self.session).await?;
        let question = request.name();
        let after = self.query_timeout;
        let answer = timeout(after, session.ask(request)).await;
        let answer = answer.map_err(|_| Error::TimedOut { question, after })?;
        let (ability, answer) = match answer {
            Err(error) if session.broke(&error) => {
                let upstream = &self.name;
                debug!(%upstream, %error, "the daemon breaks when asked for a realisation");
                (Ability::Breaks, Ok(None))
            }
            answer => (Ability::Answers, known(answer)),
        };
        self.lock().ability = Some(ability);
        answer
    }

    /// Returns what is known; a daemon that was connected anew may be another.
    fn ability(&self) -> Option<Ability> {
        let mut known = self.lock();
        if known.link.has_changed().unwrap_or(false) {
            known.link.mark_unchanged();
            known.ability = None;
        }
        known.ability
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads "the feature is off" and "this daemon is too old" as "there is none".
fn known(answer: Result<Reply, Error>) -> Result<Option<Reply>, Error> {
    match answer {
        Ok(reply) => Ok(Some(reply)),
        Err(Error::Unsupported(_)) => Ok(None),
        Err(Error::Remote(text)) if text.contains("ca-derivations") => Ok(None),
        Err(error) => Err(error),
    }
}
