//! One upstream as the substituter sees it: with its trust and its health.

use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tracing::{debug, info, warn};

use crate::cache::memory::UpstreamId;
use crate::nix::path_info::{PathInfo, Trust, Verified};
use crate::nix::store_path::{StoreDir, StorePathHash};
use crate::upstream::{Error, Link, OpenedNar, Upstream};

use super::figures::Figures;
use super::health::{self, Record, Standing};
use super::now;

/// An upstream with the operator's word on it and what was seen of it.
pub struct Member {
    /// Its number, by which caches name it as a holder.
    pub id: UpstreamId,
    /// The store itself.
    pub upstream: Arc<dyn Upstream>,
    /// Whom its path infos are believed.
    pub trust: Trust,
    link: watch::Receiver<Link>,
    options: health::Options,
    // Never held over an await; no other lock is taken under it.
    record: Mutex<Record>,
    // When a refused path info was told last; as the record.
    told: Mutex<Option<Instant>>,
    /// What asking it for a path that nobody can have has shown about it.
    vetting: AtomicU8,
    in_care: AtomicBool,
    own_store: bool,
    /// Answers that were refused: unsigned path infos, NARs of another hash.
    pub refused: AtomicU64,
    /// Path infos that were found here.
    pub found: AtomicU64,
    /// How quickly it answers, what it gave, what went wrong last.
    pub figures: Figures,
}

/// What came of asking one upstream for a path.
pub enum Answer {
    /// It has the path, and is believed.
    Found(Verified),
    /// It does not have the path.
    Absent,
    /// It could not tell, or is not believed.
    Unknown,
}

impl Member {
    /// Takes an upstream in.
    pub fn new(
        id: UpstreamId,
        upstream: Arc<dyn Upstream>,
        trust: Trust,
        options: health::Options,
        now: Instant,
    ) -> Self {
        Self {
            id,
            link: upstream.link(),
            upstream,
            trust,
            options,
            record: Mutex::new(Record::new(now)),
            told: Mutex::new(None),
            vetting: AtomicU8::new(UNVETTED),
            in_care: AtomicBool::new(false),
            own_store: false,
            refused: AtomicU64::new(0),
            found: AtomicU64::new(0),
            figures: Figures::default(),
        }
    }

    /// Says that it is this machine's own store.
    #[must_use]
    pub fn of_own_store(mut self, own_store: bool) -> Self {
        self.own_store = own_store;
        self
    }

    /// Tells whether it is this machine's own store, so that its NARs are on this disk already.
    pub fn is_own_store(&self) -> bool {
        self.own_store
    }

    /// Returns the state of its standing connection.
    pub fn link(&self) -> Link {
        let link = self.link.borrow().clone();
        self.figures.observe(&link, now());
        link
    }

    /// Decides whether questions wait for it.
    pub fn standing(&self, now: Instant) -> Standing {
        if self.is_ourselves() {
            return Standing::Sick;
        }
        let link = self.link();
        let mut record = self.record();
        record.was_up |= matches!(link, Link::Up { .. });
        health::standing(&link, &record, &self.options, now)
    }

    /// Tells whether this upstream's questions come back to this very program.
    pub fn is_ourselves(&self) -> bool {
        self.vetting.load(Ordering::Relaxed) == OURSELVES
    }

    /// Notes that a question to this upstream has come back to us.
    pub fn mark_as_ourselves(&self) {
        if self.vetting.swap(OURSELVES, Ordering::Relaxed) != OURSELVES {
            warn!(
                upstream = self.upstream.name(),
                "leads back to this very muster, not asked any more; take it out of the configuration"
            );
        }
    }

    /// Asks each new connection for a path that nobody can have.
    ///
    /// Should the question come back to our own server, by whatever road, the upstream is
    /// ourselves: asking it would go round in circles.
    pub async fn vet(&self, nobody: StorePathHash) {
        self.vetting.store(VETTED, Ordering::Relaxed);
        if self.upstream.path_info(nobody).await.is_err() && !self.is_ourselves() {
            self.vetting.store(UNVETTED, Ordering::Relaxed);
        }
    }

    /// Tells whether it is connected and was not vetted since; a lost connection asks for it anew.
    pub fn wants_vetting(&self) -> bool {
        match (self.link(), self.vetting.load(Ordering::Relaxed)) {
            (Link::Up { .. }, vetting) => vetting == UNVETTED,
            (_, VETTED) => {
                self.vetting.store(UNVETTED, Ordering::Relaxed);
                false
            }
            _ => false,
        }
    }

    /// Asks for a path that a client wants, for as long as the upstream is not sick.
    ///
    /// Dropped, the question is abandoned.
    pub async fn path_info(&self, hash: StorePathHash, store_dir: &StoreDir) -> Answer {
        self.figures.asked.fetch_add(1, Ordering::Relaxed);
        let begun = now();
        let answer = tokio::select! {
            answer = self.upstream.kept_path_info(hash) => answer,
            () = self.sickness() => {
                debug!(upstream = self.upstream.name(), path.hash = %hash, "not waited for");
                return Answer::Unknown;
            }
        };
        if answer.is_ok() {
            let took = now().saturating_duration_since(begun);
            self.figures.answered(took);
        }
        self.judge(hash, answer, store_dir)
    }

    /// Asks for a path though the upstream is sick, for as long as `patience`.
    ///
    /// Dropped, the question is abandoned.
    pub async fn path_info_of_sick(
        &self,
        hash: StorePathHash,
        store_dir: &StoreDir,
        patience: Duration,
    ) -> Answer {
        let asked = tokio::time::timeout(patience, self.upstream.kept_path_info(hash));
        let late = |_| Error::TimedOut {
            question: "path info",
            after: patience,
        };
        let answer = asked.await.map_err(late).flatten();
        self.judge(hash, answer, store_dir)
    }

    fn judge(
        &self,
        hash: StorePathHash,
        answer: Result<Option<PathInfo>, Error>,
        store_dir: &StoreDir,
    ) -> Answer {
        match self.note(answer) {
            Ok(None) => Answer::Absent,
            Err(error) => {
                debug!(upstream = self.upstream.name(), path.hash = %hash, %error, "could not tell");
                Answer::Unknown
            }
            Ok(Some(claim)) if claim.path.hash() != hash => {
                self.refused.fetch_add(1, Ordering::Relaxed);
                let path = &claim.path;
                warn!(upstream = self.upstream.name(), path.hash = %hash, %path, "answered with another path");
                Answer::Unknown
            }
            Ok(Some(claim)) => {
                let answer = self.verify(claim, store_dir);
                if matches!(answer, Answer::Found(_)) {
                    self.figures.hits.fetch_add(1, Ordering::Relaxed);
                }
                answer
            }
        }
    }

    /// Opens the NAR of a path; its bytes are counted as they are read.
    ///
    /// Dropped, it is given up as the upstream says.
    pub async fn nar(&self, info: &PathInfo) -> Result<Option<OpenedNar>, Error> {
        let nar = self.upstream.open_nar(info).await?;
        Ok(nar.map(|nar| match nar {
            OpenedNar::Checked(nar) => OpenedNar::Checked(self.figures.count(nar)),
            OpenedNar::Unchecked(nar) => OpenedNar::Unchecked(self.figures.count(nar)),
            OpenedNar::Proven(beginnings, nar) => {
                OpenedNar::Proven(beginnings, self.figures.count(nar))
            }
        }))
    }

    /// Checks a claim of this upstream against the operator's trust in it.
    pub fn verify(&self, claim: PathInfo, store_dir: &StoreDir) -> Answer {
        if claim.nar_size == 0 {
            let remedy = "nix-store --verify --check-contents there fills it in";
            let (upstream, path) = (self.upstream.name(), &claim.path);
            // Databases of old have such paths; Nix takes no narinfo with it.
            if self.refusal_is_news() {
                warn!(upstream, %path, remedy, "not offered: its store does not know the NAR's size");
            } else {
                debug!(upstream, %path, "not offered: its store does not know the NAR's size");
            }
            return Answer::Unknown;
        }
        match claim.verify(&self.trust, store_dir) {
            Ok(verified) => {
                self.found.fetch_add(1, Ordering::Relaxed);
                Answer::Found(verified)
            }
            Err(error) => {
                let refused = self.refused.fetch_add(1, Ordering::Relaxed) + 1;
                let upstream = self.upstream.name();
                // A cache whose key is missing has every path of every closure refused.
                if self.refusal_is_news() {
                    warn!(upstream, %error, refused, "path info refused; further ones are not told for a while");
                } else {
                    debug!(upstream, %error, "path info refused");
                }
                Answer::Unknown
            }
        }
    }

    /// Counts an answer for or against the upstream's health, and hands it on.
    pub fn note<T>(&self, answer: Result<T, Error>) -> Result<T, Error> {
        if let Err(error) = &answer {
            self.figures.failed(error, now());
        }
        let mut record = self.record();
        match &answer {
            Ok(_) | Err(Error::Remote(_)) => record.timeouts = 0,
            Err(Error::TimedOut { .. } | Error::Slow(_)) => {
                record.timeouts += 1;
                if record.timeouts == self.options.timeouts_max {
                    warn!(
                        upstream = self.upstream.name(),
                        timeouts = record.timeouts,
                        "does not answer in time, not waited for any more"
                    );
                }
            }
            Err(_) => {}
        }
        answer
    }

    /// Asks something cheap where the upstream is connected but sick, so that it can recover.
    pub async fn probe(&self, now: Instant) {
        if !self.wants_probe(now) {
            return;
        }
        let nobody = StorePathHash([0; 20]);
        if self.note(self.upstream.path_info(nobody).await).is_ok() {
            info!(upstream = self.upstream.name(), "answers again");
        }
    }

    /// Claims the care for this upstream; `None` when it needs none, or while an earlier round
    /// goes on, which the upstream's own time-outs bound.
    pub fn begin_care(self: &Arc<Self>, now: Instant) -> Option<InCare> {
        let needed = self.wants_vetting() || self.wants_probe(now);
        let begun = needed && !self.in_care.swap(true, Ordering::Relaxed);
        begun.then(|| InCare(Arc::clone(self)))
    }

    fn wants_probe(&self, now: Instant) -> bool {
        let connected = matches!(self.link(), Link::Up { .. });
        connected && !self.is_ourselves() && self.standing(now) == Standing::Sick
    }

    /// Tells whether it is sick although it is connected: what it has may yet come, slowly.
    pub fn is_doubtful(&self) -> bool {
        self.wants_probe(now())
    }

    /// Begins anew after the machine slept: old connections are dead, old time-outs mean nothing.
    pub fn wake(&self, now: Instant) {
        *self.record() = Record::new(now);
        self.upstream.reconnect();
    }

    /// Resolves when the upstream is sick.
    pub async fn sickness(&self) {
        let mut link = self.link.clone();
        loop {
            link.borrow_and_update();
            let recheck = match self.standing(now()) {
                Standing::Sick => return,
                Standing::Connecting { until } => until.into(),
                // A second time-out running is noticed by those who wait, too.
                Standing::Well => (now() + RECHECK).into(),
            };
            if let Ok(Err(_closed)) = tokio::time::timeout_at(recheck, link.changed()).await {
                return;
            }
        }
    }

    /// Tells whether a refusal is to be told: one in each interval.
    fn refusal_is_news(&self) -> bool {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let now = now();
        let news = told.is_none_or(|told| now.duration_since(told) >= TELL_AGAIN);
        if news {
            *told = Some(now);
        }
        news
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The claim on an upstream's care; dropped, the next round may begin.
pub struct InCare(Arc<Member>);

impl Deref for InCare {
    type Target = Member;

    fn deref(&self) -> &Member {
        &self.0
    }
}

impl Drop for InCare {
    fn drop(&mut self) {
        self.0.in_care.store(false, Ordering::Relaxed);
    }
}

/// A setting is not repaired within it, and a day's log is not filled by it.
const TELL_AGAIN: Duration = Duration::from_secs(300);

const RECHECK: Duration = Duration::from_secs(1);

const UNVETTED: u8 = 0;
const VETTED: u8 = 1;
const OURSELVES: u8 = 2;
