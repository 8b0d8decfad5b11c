//! A store in memory that does what a test tells it: answers, waits, errs, hangs and lies.
//!
//! It is no cache and has no bounds; it exists for the tests of higher floors.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream;
use tokio::sync::watch;
use tokio::time::sleep;

use super::{Error, Link, NarStream, Upstream};
use crate::nix::build_trace::{BuildTraceEntry, BuildTraceKey};
use crate::nix::path_info::PathInfo;
use crate::nix::realisation::{DrvOutput, Realisation};
use crate::nix::store_path::{StorePath, StorePathHash};

/// A scripted upstream; clones share everything.
#[derive(Clone)]
pub struct Memory {
    inner: Arc<Inner>,
}

/// The questions of [`Upstream`], for scripts and counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Question {
    /// [`Upstream::path_info`].
    PathInfo,
    /// One path of [`Upstream::path_infos`].
    PathInfos,
    /// [`Upstream::nar`].
    Nar,
    /// [`Upstream::keep`].
    Keep,
    /// [`Upstream::build_log`].
    BuildLog,
    /// [`Upstream::realisation`].
    Realisation,
    /// [`Upstream::build_trace`].
    BuildTrace,
}

/// What becomes of a question.
#[derive(Clone, Debug)]
pub enum Script {
    /// It is answered after a while.
    After(Duration),
    /// It fails after a while.
    Fail(Duration, Error),
    /// It is never answered.
    Hang,
}

/// How a NAR is given out.
#[derive(Clone, Debug)]
pub struct NarScript {
    /// Bytes per chunk; at least one.
    pub chunk_bytes: usize,
    /// Pause before each chunk.
    pub pause: Duration,
    /// After so many bytes the stream does this instead of going on.
    pub stop: Option<(usize, Stop)>,
    /// The byte at this place is flipped.
    pub flip: Option<usize>,
}

/// How a NAR stream stops early.
#[derive(Clone, Debug)]
pub enum Stop {
    /// It fails.
    Fail(Error),
    /// It gives nothing more and does not end.
    Hang,
    /// It ends as if all were said.
    End,
}

struct Inner {
    name: String,
    link: watch::Sender<Link>,
    reconnects: AtomicU64,
    // Never held over an await; no other lock is taken under it.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    infos: BTreeMap<StorePathHash, PathInfo>,
    nars: HashMap<StorePath, Bytes>,
    logs: HashMap<StorePath, Bytes>,
    realisations: HashMap<DrvOutput, Realisation>,
    build_traces: HashMap<BuildTraceKey, BuildTraceEntry>,
    scripts: HashMap<Question, Script>,
    nar_scripts: HashMap<StorePath, NarScript>,
    counts: HashMap<Question, u64>,
    kept: Vec<StorePath>,
}

impl Memory {
    /// Makes an empty store whose link is up.
    pub fn new(name: &str) -> Self {
        let peer = "scripted".into();
        let inner = Inner {
            name: name.to_owned(),
            link: watch::Sender::new(Link::Up { peer }),
            reconnects: AtomicU64::new(0),
            state: Mutex::default(),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// Adds a path with its NAR. Nothing is checked: a claim may lie.
    pub fn add(&self, info: PathInfo, nar: impl Into<Bytes>) {
        let mut state = self.state();
        state.nars.insert(info.path.clone(), nar.into());
        state.infos.insert(info.path.hash(), info);
    }

    /// Answers for this hash with that path info, whatever it names.
    pub fn claim(&self, hash: StorePathHash, info: PathInfo) {
        self.state().infos.insert(hash, info);
    }

    /// Forgets a path and its NAR, as a garbage collection does.
    pub fn remove(&self, path: &StorePath) {
        let mut state = self.state();
        state.infos.remove(&path.hash());
        state.nars.remove(path);
    }

    /// Forgets the NAR alone: the path info promises what is not there.
    pub fn remove_nar(&self, path: &StorePath) {
        self.state().nars.remove(path);
    }

    /// Adds a build log.
    pub fn add_log(&self, derivation: StorePath, log: impl Into<Bytes>) {
        self.state().logs.insert(derivation, log.into());
    }

    /// Adds a realisation.
    pub fn add_realisation(&self, realisation: Realisation) {
        let id = realisation.id.clone();
        self.state().realisations.insert(id, realisation);
    }

    /// Adds a build trace entry.
    pub fn add_build_trace(&self, entry: BuildTraceEntry) {
        let key = entry.key.clone();
        self.state().build_traces.insert(key, entry);
    }

    /// Says what becomes of a kind of question from now on; `None`: answered at once.
    pub fn script(&self, question: Question, script: Option<Script>) {
        let mut state = self.state();
        match script {
            Some(script) => state.scripts.insert(question, script),
            None => state.scripts.remove(&question),
        };
    }

    /// Says the same for every kind of question.
    pub fn script_all(&self, script: Option<&Script>) {
        for question in QUESTIONS {
            self.script(question, script.cloned());
        }
    }

    /// Says how one path's NAR is given out.
    pub fn script_nar(&self, path: &StorePath, script: NarScript) {
        self.state().nar_scripts.insert(path.clone(), script);
    }

    /// Sets the state of the link; questions go on as scripted, and fail at once while down.
    pub fn set_link(&self, link: Link) {
        self.inner.link.send_replace(link);
    }

    /// Sets the link to down.
    pub fn set_down(&self, error: &str) {
        self.set_link(Link::Down {
            error: error.into(),
            retry_after: Duration::from_secs(1),
        });
    }

    /// Sets the link to connecting, beginning now.
    pub fn set_connecting(&self) {
        let since = Instant::now();
        self.set_link(Link::Connecting { since });
    }

    /// Sets the link to up.
    pub fn set_up(&self) {
        let peer = "scripted".into();
        self.set_link(Link::Up { peer });
    }

    /// Returns how often a kind of question was asked.
    pub fn asked(&self, question: Question) -> u64 {
        self.state().counts.get(&question).copied().unwrap_or(0)
    }

    /// Returns the paths that were kept, in order, repeated ones too.
    pub fn kept(&self) -> Vec<StorePath> {
        self.state().kept.clone()
    }

    /// Returns how often [`Upstream::reconnect`] was called.
    pub fn reconnects(&self) -> u64 {
        self.inner.reconnects.load(Ordering::Relaxed)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        let state = self.inner.state.lock();
        state.unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a question and does what its script says; waits while the link is connecting.
    async fn play(&self, question: Question) -> Result<(), Error> {
        let script = {
            let mut state = self.state();
            *state.counts.entry(question).or_default() += 1;
            state.scripts.get(&question).cloned()
        };
        let mut link = self.inner.link.subscribe();
        let settled = link.wait_for(|l| !matches!(l, Link::Connecting { .. }));
        // The sender lives as long as we do.
        if let Ok(link) = settled.await
            && let Link::Down { error, .. } = &*link
        {
            return Err(Error::Down(error.clone()));
        }
        match script {
            None => Ok(()),
            Some(Script::After(delay)) => {
                sleep(delay).await;
                Ok(())
            }
            Some(Script::Fail(delay, error)) => {
                sleep(delay).await;
                Err(error)
            }
            Some(Script::Hang) => std::future::pending().await,
        }
    }
}

#[async_trait]
impl Upstream for Memory {
    fn name(&self) -> &str {
        &self.inner.name
    }

    fn link(&self) -> watch::Receiver<Link> {
        self.inner.link.subscribe()
    }

    fn reconnect(&self) {
        self.inner.reconnects.fetch_add(1, Ordering::Relaxed);
    }

    async fn path_info(&self, hash: StorePathHash) -> Result<Option<PathInfo>, Error> {
        self.play(Question::PathInfo).await?;
        Ok(self.state().infos.get(&hash).cloned())
    }

    async fn path_infos(&self, paths: &[StorePath]) -> Vec<Result<Option<PathInfo>, Error>> {
        let mut answers = Vec::with_capacity(paths.len());
        for path in paths {
            let played = self.play(Question::PathInfos).await;
            let found = || self.state().infos.get(&path.hash()).cloned();
            answers.push(played.map(|()| found().filter(|info| info.path == *path)));
        }
        answers
    }

    async fn nar(&self, info: &PathInfo) -> Result<Option<NarStream>, Error> {
        self.play(Question::Nar).await?;
        let state = self.state();
        let Some(nar) = state.nars.get(&info.path).cloned() else {
            return Ok(None);
        };
        let script = state.nar_scripts.get(&info.path).cloned();
        Ok(Some(stream_of(nar, script.unwrap_or_default())))
    }

    async fn keep(&self, path: &StorePath) -> Result<bool, Error> {
        self.play(Question::Keep).await?;
        let mut state = self.state();
        state.kept.push(path.clone());
        Ok(state.infos.contains_key(&path.hash()))
    }

    async fn build_log(&self, derivation: &StorePath) -> Result<Option<Bytes>, Error> {
        self.play(Question::BuildLog).await?;
        Ok(self.state().logs.get(derivation).cloned())
    }

    async fn realisation(&self, id: &DrvOutput) -> Result<Option<Realisation>, Error> {
        self.play(Question::Realisation).await?;
        Ok(self.state().realisations.get(id).cloned())
    }

    async fn build_trace(&self, key: &BuildTraceKey) -> Result<Option<BuildTraceEntry>, Error> {
        self.play(Question::BuildTrace).await?;
        Ok(self.state().build_traces.get(key).cloned())
    }
}

impl Default for NarScript {
    fn default() -> Self {
        Self {
            chunk_bytes: 64 * 1024,
            pause: Duration::ZERO,
            stop: None,
            flip: None,
        }
    }
}

fn stream_of(nar: Bytes, script: NarScript) -> NarStream {
    let nar = match script.flip {
        None => nar,
        Some(place) => {
            let mut bytes = nar.to_vec();
            if let Some(byte) = bytes.get_mut(place) {
                *byte ^= 1;
            }
            bytes.into()
        }
    };
    let end = script
        .stop
        .as_ref()
        .map_or(nar.len(), |(at, _)| nar.len().min(*at));
    let chunk_bytes = script.chunk_bytes.max(1);
    let pause = script.pause;
    let chunks = stream::iter((0..end).step_by(chunk_bytes)).then(move |start| {
        let chunk = nar.slice(start..end.min(start.saturating_add(chunk_bytes)));
        async move {
            if !pause.is_zero() {
                sleep(pause).await;
            }
            Ok(chunk)
        }
    });
    match script.stop {
        None | Some((_, Stop::End)) => chunks.boxed(),
        Some((_, Stop::Fail(error))) => chunks.chain(stream::iter([Err(error)])).boxed(),
        Some((_, Stop::Hang)) => chunks.chain(stream::pending()).boxed(),
    }
}

const QUESTIONS: [Question; 7] = [
    Question::PathInfo,
    Question::PathInfos,
    Question::Nar,
    Question::Keep,
    Question::BuildLog,
    Question::Realisation,
    Question::BuildTrace,
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nix::hash::NarHash;

    fn info(nar: &[u8]) -> PathInfo {
        PathInfo {
            path: "xgd4ijld16zz4n65lm0jzb4cfscm9vwi-input".parse().unwrap(),
            nar_hash: NarHash::of(nar),
            nar_size: nar.len().try_into().unwrap(),
            references: vec![],
            deriver: None,
            signatures: vec![],
            ca: None,
        }
    }

    async fn read(store: &Memory, info: &PathInfo) -> (Vec<u8>, Option<Error>) {
        let mut stream = store.nar(info).await.unwrap().unwrap();
        let mut bytes = vec![];
        while let Some(item) = stream.next().await {
            match item {
                Ok(chunk) => bytes.extend(chunk),
                Err(error) => return (bytes, Some(error)),
            }
        }
        (bytes, None)
    }

    #[tokio::test]
    async fn nars_are_cut_and_flipped_as_told() {
        let store = Memory::new("m");
        let info = info(b"0123456789");
        store.add(info.clone(), &b"0123456789"[..]);
        assert_eq!(read(&store, &info).await.0, b"0123456789");

        let script = NarScript {
            chunk_bytes: 3,
            stop: Some((7, Stop::Fail(Error::Lost("cut".into())))),
            flip: Some(0),
            ..NarScript::default()
        };
        store.script_nar(&info.path, script);
        let (bytes, error) = read(&store, &info).await;
        assert_eq!(bytes, b"1123456");
        assert!(matches!(error, Some(Error::Lost(_))));
        assert_eq!(store.asked(Question::Nar), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn links_and_scripts() {
        let store = Memory::new("m");
        let info = info(b"nar");
        let hash = info.path.hash();
        store.add(info, &b"nar"[..]);
        store.set_connecting();
        let later = {
            let store = store.clone();
            tokio::spawn(async move { store.path_info(hash).await })
        };
        sleep(Duration::from_secs(1)).await;
        assert!(!later.is_finished());
        store.set_up();
        assert!(later.await.unwrap().unwrap().is_some());

        store.set_down("gone");
        assert!(matches!(store.path_info(hash).await, Err(Error::Down(_))));
        store.set_up();
        store.script(Question::PathInfo, Some(Script::Hang));
        let bound = Duration::from_secs(9);
        let hung = tokio::time::timeout(bound, store.path_info(hash)).await;
        assert!(hung.is_err());
        assert_eq!(store.asked(Question::PathInfo), 3);
    }
}
