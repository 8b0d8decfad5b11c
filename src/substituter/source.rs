//! Where the bytes of one NAR can be had: the known holders, then whoever else says to have it, and at
//! the very last known holders that are sick although they are connected.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, warn};

use crate::cache::memory::{Entry, UpstreamId};
use crate::nix::hash::NarHash;
use crate::nix::path_info::{PathInfo, Verified};
use crate::upstream::{self, OpenedNar};

use super::kept::KEPT;
use super::member::{Answer, Member};
use super::nar_url::NarUrl;
use super::query::{self, Answers, Wanted};
use super::shared::Shared;

/// The holders of one NAR, each given out once, and once more if it was only slow or its connection broke.
pub(super) struct Source {
    pub(super) shared: Arc<Shared>,
    pub(super) info: Arc<PathInfo>,
    /// Who vouches for just this NAR; `None`: it is not the one that narinfos name.
    pub(super) holders: Option<Vec<UpstreamId>>,
    /// Holders to be tried, the best first.
    waiting: VecDeque<Arc<Member>>,
    tried: Vec<UpstreamId>,
    /// Holders that stalled while there was another, or whose connection broke; each once.
    set_aside: Vec<Arc<Member>>,
    /// How many of those were tried again.
    tried_again: usize,
    /// Holders that let nobody in, though they answer questions.
    refusing: Vec<Arc<Member>>,
    /// When the first of them did so, and how often all of them were tried since.
    refused: Option<(Instant, u32)>,
    /// Holders that are connected but sick: one slow answer is better than a build.
    doubtful: Vec<Arc<Member>>,
    /// All others, once they are asked who has this NAR.
    others: Option<Answers>,
}

impl Source {
    /// Finds the path info of exactly the NAR that a URL names; `None`: nobody knows it.
    pub(super) async fn locate(shared: &Arc<Shared>, url: &NarUrl) -> Option<Self> {
        let entry = query::entry(shared, url.path_hash, Wanted::Nar).await?;
        Self::of_entry(shared, url, &entry).await
    }

    /// Finds the same where the path's narinfo is known.
    pub(super) async fn of_entry(
        shared: &Arc<Shared>,
        url: &NarUrl,
        entry: &Entry,
    ) -> Option<Self> {
        let setup = shared.setup();
        let (info, holders, waiting, others) = if entry.nar_hash == url.nar_hash {
            let holders = entry.holders();
            let members = holders.iter().filter_map(|id| setup.member(*id).cloned());
            let kept = shared.kept.as_ref().filter(|_| entry.file().is_some());
            let kept = kept.map(|kept| Arc::clone(&kept.member));
            let waiting = kept.into_iter().chain(members).collect();
            (setup.parse(entry)?, Some(holders), waiting, None)
        } else {
            // A client remembers another build of this path; somebody may still have it.
            let mut others = query::ask(&setup, url.path_hash, &[]).answers;
            let (member, found) = next_of(&mut others, url.nar_hash).await?;
            (
                (*found).clone(),
                None,
                VecDeque::from([member]),
                Some(others),
            )
        };
        Some(Self {
            shared: Arc::clone(shared),
            info: Arc::new(info),
            holders,
            waiting,
            tried: Vec::new(),
            set_aside: Vec::new(),
            tried_again: 0,
            refusing: Vec::new(),
            refused: None,
            doubtful: Vec::new(),
            others,
        })
    }

    /// Tells whether the first to be tried is this machine's own store, or the cache itself.
    pub(super) fn is_here(&self) -> bool {
        let first = self.waiting.front();
        first.is_some_and(|member| member.id == KEPT || member.is_own_store())
    }

    /// Tells whether the first to be tried sends many small NARs over one connection.
    pub(super) fn shares_connections(&self) -> bool {
        let first = self.waiting.front();
        first.is_some_and(|member| member.upstream.shares_connections())
    }

    /// Tells whether the NAR comes out of the cache.
    pub(super) fn is_kept(&self) -> bool {
        self.waiting.front().is_some_and(|member| member.id == KEPT)
    }

    /// Returns all who are known to have this NAR; `None` where it is not the one that narinfos name.
    pub(super) fn known_members(&self) -> Option<Vec<Arc<Member>>> {
        self.holders.as_ref()?;
        Some(self.waiting.iter().map(Arc::clone).collect())
    }

    /// Opens the NAR at the next holder that has it.
    pub(super) async fn next_holder(&mut self) -> Option<(Arc<Member>, OpenedNar)> {
        loop {
            self.find_another().await;
            let member = match self.waiting.pop_front() {
                Some(member) => member,
                None => match self.next_set_aside() {
                    Some(member) => member,
                    None if self.wait_for_refusing().await => continue,
                    None => return self.next_doubtful().await,
                },
            };
            self.tried.push(member.id);
            if !self.may_give(&member) {
                self.doubt(&member);
                continue;
            }
            let (shared, info) = (Arc::clone(&self.shared), Arc::clone(&self.info));
            let opened = tokio::select! {
                opened = member.nar(&info) => opened,
                () = member.sickness() => Err(upstream::Error::Down("it is sick".into())),
                never = shared.berths.make_room_at(&member) => match never {},
                () = self.another_after_stall() => {
                    debug!(upstream = member.upstream.name(), path = %info.path, "slow to begin");
                    self.set_aside(&member);
                    continue;
                }
            };
            match member.note(opened) {
                Ok(Some(stream)) => {
                    self.refused = None;
                    return Some((member, stream));
                }
                Ok(None) => self.is_gone(&member),
                Err(error @ upstream::Error::Refused(_)) => {
                    // Told once, and not with each further try.
                    match self.refused {
                        None => self.broke(&member, 0, &error),
                        Some(_) => debug!(upstream = member.upstream.name(), %error, "no NAR yet"),
                    }
                    self.refusing.push(member);
                }
                Err(error) => {
                    self.broke(&member, 0, &error);
                    self.doubt(&member);
                    if matches!(error, upstream::Error::Lost(_)) {
                        self.set_aside(&member);
                    }
                }
            }
        }
    }

    /// Waits a little before those that let nobody in are tried again; `false`: none is left, or it was long enough.
    ///
    /// An sshd drops logins while there are many at once, or after some that failed, and lets others in a moment later.
    async fn wait_for_refusing(&mut self) -> bool {
        let refusing = std::mem::take(&mut self.refusing);
        if refusing.is_empty() {
            return false;
        }
        let (since, tries) = *self.refused.get_or_insert((Instant::now(), 0));
        let late = since.elapsed() >= self.shared.options.transfer.refusal;
        refusing.iter().for_each(|member| self.doubt(member));
        let well = refusing.into_iter().filter(|m| self.may_give(m));
        let well: Vec<_> = well.collect();
        // One slow answer is better than another try.
        if well.is_empty() || late || !self.doubtful.is_empty() {
            return false;
        }
        self.refused = Some((since, tries + 1));
        sleep(REFUSED_PAUSE * 2_u32.pow(tries.min(3))).await;
        self.waiting.extend(well);
        true
    }

    /// Opens the NAR at whichever sick holder is the first to give it, all at once, as long as the last
    /// one is waited for.
    async fn next_doubtful(&mut self) -> Option<(Arc<Member>, OpenedNar)> {
        let patience = self.shared.options.transfer.stall_last;
        let open = |member: &Arc<Member>| {
            let (shared, info) = (Arc::clone(&self.shared), Arc::clone(&self.info));
            let member = Arc::clone(member);
            async move {
                let opened = tokio::select! {
                    opened = timeout(patience, member.nar(&info)) => opened,
                    never = shared.berths.make_room_at(&member) => match never {},
                };
                let late = upstream::Error::TimedOut {
                    question: "NAR",
                    after: patience,
                };
                (member, opened.unwrap_or(Err(late)))
            }
        };
        let mut opening: FuturesUnordered<_> = self.doubtful.iter().map(open).collect();
        while let Some((member, opened)) = opening.next().await {
            // Those that have not answered yet may go on where this one breaks.
            self.doubtful.retain(|doubtful| doubtful.id != member.id);
            match member.note(opened) {
                Ok(Some(stream)) => return Some((member, stream)),
                Ok(None) => self.is_gone(&member),
                Err(error) => self.broke(&member, 0, &error),
            }
        }
        None
    }

    /// Leaves a holder that is sick but connected for the very last; once for each transfer.
    fn doubt(&mut self, member: &Arc<Member>) {
        let known = |doubtful: &Arc<Member>| doubtful.id == member.id;
        if member.is_doubtful() && !self.is_corrupt(member) && !self.doubtful.iter().any(known) {
            self.doubtful.push(Arc::clone(member));
        }
    }

    fn is_gone(&self, member: &Member) {
        let (upstream, info) = (member.upstream.name(), &self.info);
        debug!(upstream, path = %info.path, "the path is gone");
        let hash = info.path.hash();
        self.shared.forget_holder(hash, info.nar_hash, member.id);
    }

    /// Resolves after a stall, as soon as somebody else may give the NAR; never if nobody may.
    ///
    /// Dropped, nothing is lost.
    pub(super) async fn another_after_stall(&mut self) {
        sleep(self.shared.options.transfer.stall).await;
        self.find_another().await;
        if self.waiting.is_empty() {
            std::future::pending::<()>().await;
        }
    }

    /// Lets a holder that stalls, or whose connection broke, be tried once more when nobody else is left.
    pub(super) fn set_aside(&mut self, member: &Arc<Member>) {
        if !self.set_aside.iter().any(|m| m.id == member.id) {
            self.set_aside.push(Arc::clone(member));
        }
    }

    /// Has a holder that gave well tried before all others.
    pub(super) fn retry_first(&mut self, member: &Arc<Member>) {
        self.waiting.push_front(Arc::clone(member));
    }

    /// Says that a holder broke at a byte.
    pub(super) fn broke(&self, member: &Member, offset: u64, error: &upstream::Error) {
        let upstream = member.upstream.name();
        warn!(upstream, path = %self.info.path, offset, %error, "NAR broke off, the next holder is tried");
    }

    /// Waits until a holder waits or no other upstream has the NAR; asks them when needed.
    async fn find_another(&mut self) {
        loop {
            while let Some(member) = self.waiting.pop_front() {
                if self.may_give(&member) {
                    self.waiting.push_front(member);
                    break;
                }
                self.doubt(&member);
            }
            if !self.waiting.is_empty() {
                return;
            }
            let others = self.others.get_or_insert_with(|| {
                let setup = self.shared.setup();
                query::ask(&setup, self.info.path.hash(), &self.tried).answers
            });
            match next_of(others, self.info.nar_hash).await {
                Some((member, _)) if self.tried.contains(&member.id) => {}
                Some((member, _)) => self.waiting.push_back(member),
                None => return,
            }
        }
    }

    fn next_set_aside(&mut self) -> Option<Arc<Member>> {
        let member = self.set_aside.get(self.tried_again)?;
        self.tried_again += 1;
        Some(Arc::clone(member))
    }

    fn may_give(&self, member: &Member) -> bool {
        !member.is_sick() && !self.is_corrupt(member)
    }

    fn is_corrupt(&self, member: &Member) -> bool {
        let hash = self.info.path.hash();
        self.shared.is_distrusted(hash, member.id)
    }
}

/// Tells whether an error says something of a connection alone, so that the same holder may give the NAR over another.
pub(super) fn is_of_connection(error: &upstream::Error) -> bool {
    matches!(
        error,
        upstream::Error::Lost(_) | upstream::Error::TimedOut { .. }
    )
}

/// Waits for the next that has this NAR.
async fn next_of(answers: &mut Answers, nar_hash: NarHash) -> Option<(Arc<Member>, Verified)> {
    while let Some((member, answer)) = answers.next().await {
        if let Answer::Found(found) = answer
            && found.nar_hash == nar_hash
        {
            return Some((member, found));
        }
    }
    None
}

/// Before the first further try of a holder that let nobody in; doubled up to eight times that.
const REFUSED_PAUSE: Duration = Duration::from_millis(200);
