//! Whole closures asked of another muster: one round trip for all path infos, however deep they are.
//!
//! What comes is checked as to its form: it is whole, the top is first, each further path was referred to by one
//! before it and comes once. Whether a path info is believed is decided where all others are. A fault in one
//! narinfo is a fault of the whole answer, and the closure is fetched level by level.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::task::spawn_blocking;

use super::Error;
use super::cache_files::CacheFiles;
use super::cache_pulse::CachePulse;
use super::closures::Closures;
use super::dialect::read_narinfo;
use crate::codec::closure_wire;
use crate::nix::narinfo::NarInfo;
use crate::nix::path_info::PathInfo;
use crate::nix::store_path::{StoreDir, StorePath, StorePathHash};

/// The bounds of asking for closures.
#[derive(Clone, Copy, Debug)]
pub struct PeerClosureOptions {
    /// Bytes of an answer, which is held in memory: some 50,000 paths; a larger closure is fetched level by level.
    pub bytes_max: usize,
    /// Paths of an answer; as many as a muster tells.
    pub paths_max: usize,
}

/// Takes a narinfo that was told, or finds fault with it.
type Found = dyn Fn(&NarInfo) -> Result<(), Error> + Send + Sync;

/// One closure of another muster. What it is told with the list of paths it keeps for the question that follows.
pub(super) struct PeerClosures {
    files: Arc<dyn CacheFiles>,
    pulse: Arc<CachePulse>,
    store_dir: StoreDir,
    options: PeerClosureOptions,
    found: Box<Found>,
    // Never held over an await.
    told: Mutex<HashMap<StorePathHash, PathInfo>>,
}

impl PeerClosures {
    /// Prepares to ask; `found` is shown each narinfo of a closure that has no fault, and may find one.
    pub(super) fn new(
        files: Arc<dyn CacheFiles>,
        pulse: Arc<CachePulse>,
        store_dir: StoreDir,
        options: PeerClosureOptions,
        found: impl Fn(&NarInfo) -> Result<(), Error> + Send + Sync + 'static,
    ) -> Self {
        Self {
            files,
            pulse,
            store_dir,
            options,
            found: Box::new(found),
            told: Mutex::default(),
        }
    }

    fn told(&self) -> MutexGuard<'_, HashMap<StorePathHash, PathInfo>> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Closures for PeerClosures {
    async fn paths(&self, top: &StorePath) -> Result<Vec<StorePath>, Error> {
        let file = format!("{CLOSURE}{}", top.hash());
        let answer = tokio::select! {
            answer = self.files.read(&file, self.options.bytes_max) => answer?,
            never = self.pulse.taken_while_quiet() => match never {},
        };
        let answer = answer.ok_or_else(|| Error::Remote("it does not tell this closure".into()))?;
        let (top, store_dir) = (top.clone(), self.store_dir.clone());
        let paths_max = self.options.paths_max;
        // A thousand narinfos take some 3 ms.
        let read = spawn_blocking(move || read(answer, &top, &store_dir, paths_max)).await;
        let narinfos = read.map_err(|e| Error::Down(e.to_string().into()))??;
        narinfos
            .iter()
            .try_for_each(|narinfo| (self.found)(narinfo))?;
        let paths = narinfos.iter().map(|n| n.info.path.clone()).collect();
        let told = narinfos.into_iter().map(|n| (n.info.path.hash(), n.info));
        *self.told() = told.collect();
        Ok(paths)
    }

    async fn infos(&self, paths: &[StorePath]) -> Result<Vec<PathInfo>, Error> {
        let mut told = self.told();
        let infos = paths.iter().filter_map(|path| told.remove(&path.hash()));
        Ok(infos.collect())
    }
}

/// Reads a closure and checks that it is that of `top`, whole and nothing else.
fn read(
    answer: Bytes,
    top: &StorePath,
    store_dir: &StoreDir,
    paths_max: usize,
) -> Result<Vec<NarInfo>, Error> {
    let texts = closure_wire::read(answer, paths_max).map_err(|e| lie(&e))?;
    let mut open = HashSet::from([top.clone()]);
    let mut told = HashSet::new();
    let mut narinfos = Vec::with_capacity(texts.len());
    for text in &texts {
        let narinfo = read_narinfo(text, store_dir).map_err(|e| lie(&e))?;
        let path = &narinfo.info.path;
        if !open.remove(path) {
            return Err(lie(&format_args!("{path} does not belong to it")));
        }
        told.insert(path.clone());
        let references = narinfo.info.references.iter();
        open.extend(references.filter(|path| !told.contains(*path)).cloned());
        narinfos.push(narinfo);
    }
    match open.iter().next() {
        None => Ok(narinfos),
        Some(path) => Err(lie(&format_args!("{path} is left out"))),
    }
}

fn lie(what: &dyn std::fmt::Display) -> Error {
    Error::Protocol(format!("its closure: {what}").into())
}

impl Default for PeerClosureOptions {
    fn default() -> Self {
        Self {
            bytes_max: BYTES_MAX,
            paths_max: PATHS_MAX,
        }
    }
}

/// Bytes of a closure; a muster tells no more than another one takes.
pub const BYTES_MAX: usize = 32 << 20;

/// Paths of a closure, likewise: five times the closure of a desktop.
pub const PATHS_MAX: usize = 100_000;

/// Where a muster tells closures.
const CLOSURE: &str = "muster/closure/";
