//! All narinfos of a closure of this machine's own store, for another muster.
//!
//! The store is asked level by level, which costs little where it is near. The top is promised as any path is,
//! and what keeps it alive keeps alive what it refers to.

use std::collections::HashSet;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt as _};

use crate::cache::memory::Entry;
use crate::nix::path_info::PathInfo;
use crate::nix::store_path::{StorePath, StorePathHash};
use crate::upstream::Error;
use crate::upstream::peer_closures::PATHS_MAX;

use super::member::{Answer, Member};
use super::query::{self, Wanted};
use super::shared::Shared;
use super::{Setup, Substituter, now};

impl Substituter {
    /// Tells the narinfos of a closure, some at once: the top first, each behind one that refers to it.
    ///
    /// `None`: the own store does not have it, or this is not [that store's](Substituter::own_store) handle. An
    /// error is the last item: the rest could not be found out, or there are more than 100,000 paths. Dropping the
    /// stream ends the asking.
    pub async fn own_closure(
        &self,
        top: StorePathHash,
    ) -> Option<BoxStream<'static, Result<Vec<Bytes>, Error>>> {
        self.all.as_ref()?;
        let entry = query::entry(&self.shared, top, Wanted::NarInfo).await?;
        let setup = self.shared.setup();
        let info = setup.parse(&entry)?;
        let member = entry
            .holders()
            .into_iter()
            .find_map(|id| setup.member(id))?;
        let mut telling = Telling {
            shared: Arc::clone(&self.shared),
            member: Arc::clone(member),
            setup: Arc::clone(&setup),
            seen: HashSet::from([top]),
            open: Vec::new(),
        };
        telling.open_references(&info);
        let first = Ok(vec![entry.text.clone()]);
        let rest = stream::unfold(Some(telling), |telling| async move {
            let mut telling = telling?;
            match telling.next().await {
                Ok(Some(texts)) => Some((Ok(texts), Some(telling))),
                Ok(None) => None,
                Err(error) => Some((Err(error), None)),
            }
        });
        Some(stream::iter([first]).chain(rest).boxed())
    }
}

/// A closure that is being told.
struct Telling {
    shared: Arc<Shared>,
    member: Arc<Member>,
    setup: Arc<Setup>,
    /// Some 20 bytes each.
    seen: HashSet<StorePathHash>,
    /// Referred to by what was told, and not told yet.
    open: Vec<StorePath>,
}

impl Telling {
    /// Asks for the next paths; `None`: all were told.
    async fn next(&mut self) -> Result<Option<Vec<Bytes>>, Error> {
        if self.open.is_empty() {
            return Ok(None);
        }
        let batch: Vec<_> = self.open.drain(..self.open.len().min(BATCH_MAX)).collect();
        let answers = self.member.upstream.path_infos(&batch).await;
        let mut texts = Vec::with_capacity(batch.len());
        for (path, answer) in batch.iter().zip(answers) {
            let claim = answer?.filter(|claim| claim.path == *path);
            let claim = claim.ok_or_else(|| Error::Remote(format!("{path} is gone").into()))?;
            self.open_references(&claim);
            texts.push(self.publish(claim)?.text.clone());
        }
        if self.seen.len() > PATHS_MAX {
            let cause = format!("a closure of more than {PATHS_MAX} paths");
            return Err(Error::Unsupported(cause.into()));
        }
        Ok(Some(texts))
    }

    /// Checks and signs what the store says, as for any narinfo.
    fn publish(&self, claim: PathInfo) -> Result<Arc<Entry>, Error> {
        let refused = Error::Unsupported(format!("{} is not vouched for", claim.path).into());
        let Answer::Found(verified) = self.member.verify(claim, self.setup.store_dir()) else {
            return Err(refused);
        };
        if self
            .shared
            .is_distrusted(verified.path.hash(), self.member.id)
        {
            return Err(refused);
        }
        let entry = self
            .shared
            .commit(&self.setup, &self.member, &verified, now());
        entry.ok_or_else(|| Error::Down("the upstreams were replaced".into()))
    }

    fn open_references(&mut self, info: &PathInfo) {
        let references = info.references.iter();
        let new = references.filter(|path| self.seen.insert(path.hash()));
        self.open.extend(new.cloned());
    }
}

/// Paths asked for and signed in one go: some 5 ms, then others have their turn.
const BATCH_MAX: usize = 256;
