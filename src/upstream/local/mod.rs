//! This machine's own store, read in place: path infos from Nix's database, NARs from the files.
//!
//! ```text
//! path_info(hash)   database                 else the daemon
//! path_infos(…)     database                 else the daemon, for those that it does not tell
//! nar(info)         database, then files     else the daemon
//! keep(path)        the daemon: temporary roots are its own to give
//! realisation(id)   the daemon
//! build_log(drv)    files, see `build_log`
//! ```
//!
//! Where the database cannot be read (its rights, an unknown schema, another directory, no write-ahead
//! log) the daemon answers everything, and why is said once. It is tried again every few seconds.
//! Without a daemon nothing that is served can be kept from the garbage collector.

mod buffers;
mod catalog;
pub mod database;
mod facts;
mod nar;
mod pack;
mod proofs;
mod ranges;
mod reader;

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::BoxStream;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tracing::{debug, info, warn};

use self::buffers::Buffers;
use self::catalog::Catalog;
use self::database::{Place, Registered};
use self::nar::{Check, NoNar, Order, PackedNar};
use self::proofs::{Claim, Proofs};
pub use self::reader::ReaderOptions;
use self::reader::{Reader, State};
use super::worker::{WorkerOptions, WorkerSetup, WorkerUpstream};
use super::{Error, Link, NarStream, OpenedNar, Upstream};
use crate::codec::beginnings::NotingDigest;
use crate::nix::build_trace::{BuildTraceEntry, BuildTraceKey};
use crate::nix::path_info::PathInfo;
use crate::nix::realisation::{DrvOutput, Realisation};
use crate::nix::store_path::{StorePath, StorePathHash};

/// An upstream over a store of this machine.
pub struct LocalUpstream {
    place: Place,
    options: LocalOptions,
    reader: Reader,
    worker: Arc<WorkerUpstream>,
    link: watch::Receiver<Link>,
    /// Room for NARs that are being packed.
    room: Arc<Semaphore>,
    buffers: Buffers,
    proofs: Proofs,
    /// Made when somebody wants to be fed. Never held over an await.
    catalog: Mutex<Weak<Catalog>>,
    // Tells the state; aborted when the upstream is dropped.
    follower: JoinHandle<()>,
}

/// The bounds of a store that is read in place.
#[derive(Clone, Debug)]
pub struct LocalOptions {
    /// Of the database.
    pub reader: ReaderOptions,
    /// NARs that are being packed at the same time; further ones wait. Each takes 2 MiB, and an open
    /// file per level.
    pub nars_max: usize,
    /// For one step of packing, about 1 MiB; a disk that takes longer is given up.
    pub silence_max: Duration,
    /// Bytes for what is remembered of paths whose files were found right: some 250 for each, 16 for each
    /// of its files and 16 for each MiB.
    pub proofs_bytes_max: u64,
    /// Pause before a database that cannot be read is tried again.
    pub reopen_after: Duration,
    /// Of the daemon beside it.
    pub worker: WorkerOptions,
}

impl LocalUpstream {
    /// Begins to open the database, and to connect to the daemon; must be called in a runtime.
    ///
    /// `Err` when the system gives no thread. Dropped, it closes both; NARs that are being read go on.
    pub fn start(place: Place, setup: WorkerSetup, options: LocalOptions) -> std::io::Result<Self> {
        let reader = Reader::start(place.clone(), options.reader)?;
        let worker = Arc::new(WorkerUpstream::start(setup, options.worker.clone()));
        let since = Instant::now();
        let (told, link) = watch::channel(Link::Connecting { since });
        let follow = follow(
            worker.name().to_owned(),
            reader.clone(),
            worker.link(),
            told,
            options.reopen_after,
        );
        Ok(Self {
            follower: tokio::spawn(follow),
            place,
            reader,
            worker,
            link,
            room: Arc::new(Semaphore::new(options.nars_max.max(1))),
            buffers: Buffers::default(),
            proofs: Proofs::new(options.proofs_bytes_max),
            catalog: Mutex::default(),
            options,
        })
    }

    /// Packs a path's NAR from its files.
    async fn packed(&self, info: &PathInfo, checked: bool) -> Result<PackedNar, NoNar> {
        let registered = self.reader.by_path(&info.path).await;
        let registered = match registered.map_err(NoNar::Failed)? {
            // A copy of another hash is another NAR.
            Some(r) if r.info.nar_hash == info.nar_hash => r,
            _ => return Err(NoNar::Gone),
        };
        let room = Arc::clone(&self.room).acquire_owned();
        let closing = |_| NoNar::Failed(Error::Down("it is being closed".into()));
        let order = Order {
            files: self.place.path(&info.path),
            nar_size: registered.info.nar_size,
            check: match checked {
                true => self.check(registered),
                false => Check::Size,
            },
            buffers: self.buffers.clone(),
            permit: room.await.map_err(closing)?,
            silence_max: self.options.silence_max,
        };
        PackedNar::open(order).await
    }

    fn check(&self, registered: Registered) -> Check {
        let claim = Claim {
            path: registered.info.path,
            nar_hash: registered.info.nar_hash,
            registration_time: registered.registration_time,
        };
        let proofs = self.proofs.clone();
        match proofs.of(&claim) {
            Some(found) => Check::Facts(found, claim, proofs),
            None => Check::Hash(NotingDigest::default(), claim, proofs),
        }
    }

    async fn packed_or_sent(
        &self,
        info: &PathInfo,
        checked: bool,
    ) -> Result<Option<OpenedNar>, Error> {
        match self.packed(info, checked).await {
            Ok(nar) => Ok(Some(nar.into_opened(checked))),
            Err(NoNar::Gone) => Ok(None),
            Err(NoNar::Failed(error)) => {
                debug!(path = %info.path, %error, "the daemon is asked for the NAR");
                Ok(self.worker.nar(info).await?.map(OpenedNar::Unchecked))
            }
        }
    }
}

impl Drop for LocalUpstream {
    fn drop(&mut self) {
        self.follower.abort();
    }
}

#[async_trait]
impl Upstream for LocalUpstream {
    fn name(&self) -> &str {
        self.worker.name()
    }

    fn link(&self) -> watch::Receiver<Link> {
        self.link.clone()
    }

    fn reconnect(&self) {
        self.reader.reopen();
        self.worker.reconnect();
    }

    async fn path_info(&self, hash: StorePathHash) -> Result<Option<PathInfo>, Error> {
        match self.reader.by_hash(hash).await {
            Ok(found) => Ok(found.map(|registered| registered.info)),
            Err(_) => self.worker.path_info(hash).await,
        }
    }

    /// Has the daemon root the path; where it does not within a moment, the path is promised without.
    async fn kept_path_info(&self, hash: StorePathHash) -> Result<Option<PathInfo>, Error> {
        let Ok(found) = self.reader.by_hash(hash).await else {
            return self.worker.kept_path_info(hash).await;
        };
        let Some(Registered { info, .. }) = found else {
            return Ok(None);
        };
        match timeout(KEEP_PATIENCE, self.worker.keep(&info.path)).await {
            // Told after the info: it went in between.
            Ok(Ok(false)) => Ok(None),
            _ => Ok(Some(info)),
        }
    }

    async fn path_infos(&self, paths: &[StorePath]) -> Vec<Result<Option<PathInfo>, Error>> {
        let Ok(found) = self.reader.by_paths(paths).await else {
            return self.worker.path_infos(paths).await;
        };
        let told = |found: Option<Registered>| found.map(|registered| registered.info);
        let mut answers: Vec<_> = found.into_iter().map(|answer| answer.map(told)).collect();
        let open = answers.iter().zip(paths).filter(|(a, _)| a.is_err());
        let open: Vec<_> = open.map(|(_, path)| path.clone()).collect();
        if !open.is_empty() {
            let mut second = self.worker.path_infos(&open).await.into_iter();
            for (open, answer) in answers.iter_mut().filter(|a| a.is_err()).zip(&mut second) {
                *open = answer;
            }
        }
        answers
    }

    /// Packs the path's files; the daemon is asked where they cannot be read.
    async fn nar(&self, info: &PathInfo) -> Result<Option<NarStream>, Error> {
        let opened = self.packed_or_sent(info, false).await?;
        Ok(opened.map(|opened| match opened {
            OpenedNar::Unchecked(stream)
            | OpenedNar::Checked(stream)
            | OpenedNar::Proven(_, stream) => stream,
        }))
    }

    /// Hashes a path's files the first time; later they are known to be unchanged before they are read.
    async fn open_nar(&self, info: &PathInfo) -> Result<Option<OpenedNar>, Error> {
        self.packed_or_sent(info, true).await
    }

    fn catalog(&self) -> Option<BoxStream<'static, Bytes>> {
        if *self.reader.state().borrow() != State::Open {
            return None;
        }
        let mut catalog = self.catalog.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(running) = catalog.upgrade() {
            return Some(running.feed());
        }
        match Catalog::start(self.place.clone()) {
            Ok(started) => {
                *catalog = Arc::downgrade(&started);
                Some(started.feed())
            }
            Err(error) => {
                warn!(upstream = self.name(), %error, "the catalog cannot be fed");
                None
            }
        }
    }

    async fn keep(&self, path: &StorePath) -> Result<bool, Error> {
        self.worker.keep(path).await
    }

    async fn keep_many(&self, paths: &[StorePath]) -> Vec<Result<bool, Error>> {
        self.worker.keep_many(paths).await
    }

    async fn build_log(&self, derivation: &StorePath) -> Result<Option<Bytes>, Error> {
        self.worker.build_log(derivation).await
    }

    async fn realisation(&self, id: &DrvOutput) -> Result<Option<Realisation>, Error> {
        self.worker.realisation(id).await
    }

    async fn build_trace(&self, key: &BuildTraceKey) -> Result<Option<BuildTraceEntry>, Error> {
        self.worker.build_trace(key).await
    }
}

/// Tells the state of what answers: the database where it is open, else the daemon's connection.
async fn follow(
    upstream: String,
    reader: Reader,
    mut daemon: watch::Receiver<Link>,
    link: watch::Sender<Link>,
    reopen_after: Duration,
) {
    let mut state = reader.state();
    loop {
        let now = state.borrow_and_update().clone();
        let behind = daemon.borrow_and_update().clone();
        let pause = match &now {
            State::Unknown => None,
            State::Open => {
                let opened = link.send_if_modified(|link| {
                    let new = !is_direct(link);
                    if new {
                        *link = Link::Up { peer: PEER.into() };
                    }
                    new
                });
                if opened {
                    info!(%upstream, "the store is read in place");
                }
                None
            }
            State::Closed(_) => {
                if matches!(behind, Link::Up { .. }) && !matches!(&*link.borrow(), Link::Up { .. })
                {
                    // Its process holds the database open now.
                    reader.reopen();
                }
                link.send_replace(behind);
                Some(reopen_after)
            }
        };
        let wait = async {
            match pause {
                Some(pause) => sleep(pause).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = state.changed() => {
                if changed.is_err() {
                    return;
                }
                if let State::Closed(why) = &*state.borrow() {
                    info!(%upstream, %why, "the store is not read in place, its daemon is asked");
                }
            }
            Ok(()) = daemon.changed() => {}
            () = wait => reader.reopen(),
        }
    }
}

fn is_direct(link: &Link) -> bool {
    matches!(link, Link::Up { peer } if &**peer == PEER)
}

impl Default for LocalOptions {
    fn default() -> Self {
        Self {
            reader: ReaderOptions::default(),
            nars_max: 64,
            silence_max: Duration::from_secs(30),
            proofs_bytes_max: 16 << 20,
            reopen_after: Duration::from_secs(5),
            worker: WorkerOptions::default(),
        }
    }
}

/// What answers, for people.
const PEER: &str = "the store itself, read in place";

/// A daemon on this machine roots a path within a millisecond, or is in trouble.
const KEEP_PATIENCE: Duration = Duration::from_millis(250);
