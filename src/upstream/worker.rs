//! A store behind a nix-daemon, over ssh or a Unix socket.
//!
//! ```text
//! path_info(hash)   QueryPathFromHashPart -> QueryPathInfo   look-up connection (standing)
//! path_infos(…)     QueryPathInfo, pipelined                 look-up connection
//! nar(info)         NarFromPath                              sessions of their own (pool)
//! keep(path)        AddTempRoot, IsValidPath                 connections of their own (roots)
//! closures()        nix-store --serve                       a connection of its own (served)
//! realisation(id)   QueryRealisation                         look-up connection, once tried
//! build_log(drv)    a file, or nix-store --read-log          a connection of its own (build_log)
//! ```

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::build_log::{BuildLogs, LogOptions};
use super::closures::Closures;
use super::pool::{Pool, PoolOptions};
use super::realisations::Realisations;
use super::roots::{Roots, RootsOptions};
use super::served::{Served, ServedOptions};
use super::standing::{Standing, StandingOptions};
use super::wire::Dial;
use super::{Error, Link, NarStream, Upstream};
use crate::nix::build_trace::{BuildTraceEntry, BuildTraceKey};
use crate::nix::path_info::PathInfo;
use crate::nix::realisation::{DrvOutput, Realisation};
use crate::nix::store_path::{StoreDir, StorePath, StorePathHash};
use crate::nix::worker_protocol::reply::Reply;
use crate::nix::worker_protocol::request::Request;

/// An upstream that speaks the worker protocol.
pub struct WorkerUpstream {
    name: String,
    store_dir: StoreDir,
    standing: Arc<Standing>,
    served: Option<Arc<Served>>,
    pool: Arc<Pool>,
    roots: Arc<Roots>,
    realisations: Realisations,
    logs: BuildLogs,
    log_options: LogOptions,
    // Warms the pool; aborted when the upstream is dropped.
    warmer: JoinHandle<()>,
}

/// What an upstream is made of.
pub struct WorkerSetup {
    /// Its name in logs and errors: the URI, without secrets.
    pub name: String,
    /// The way to the daemon.
    pub dial: Arc<dyn Dial>,
    /// Where its build logs are.
    pub logs: BuildLogs,
    /// The directory in which its store must lie, as ours does.
    pub store_dir: StoreDir,
}

/// The bounds of an upstream.
#[derive(Clone, Debug, Default)]
pub struct WorkerOptions {
    /// Of look-ups.
    pub standing: StandingOptions,
    /// Of NARs.
    pub pool: PoolOptions,
    /// Of temporary roots.
    pub roots: RootsOptions,
    /// Of build logs.
    pub logs: LogOptions,
    /// Of asking for whole closures; `None`: not done.
    pub closures: Option<ServedOptions>,
}

impl WorkerUpstream {
    /// Begins to connect in the background; must be called in a runtime.
    ///
    /// Dropped, it closes its connections; NARs that are being read go on.
    pub fn start(setup: WorkerSetup, mut options: WorkerOptions) -> Self {
        for session in [
            &mut options.standing.session,
            &mut options.pool.session,
            &mut options.roots.session,
        ] {
            session.connection.store_dir = setup.store_dir.clone();
        }
        let WorkerSetup {
            name,
            dial,
            logs,
            store_dir,
        } = setup;
        let session = options.standing.session.clone();
        let query_timeout = options.standing.query_timeout;
        let standing = Standing::start(name.clone(), dial.clone(), options.standing);
        let standing = Arc::new(standing);
        let served = options.closures.map(|mut closures| {
            closures.session.store_dir = store_dir.clone();
            Served::start(name.clone(), dial.clone(), standing.clone(), closures)
        });
        let pool = Arc::new(Pool::new(name.clone(), dial.clone(), options.pool));
        let roots = Arc::new(Roots::new(name.clone(), dial.clone(), options.roots));
        Self {
            warmer: tokio::spawn(warm(standing.link(), pool.clone(), roots.clone())),
            roots,
            realisations: Realisations::new(
                name.clone(),
                dial,
                session,
                query_timeout,
                standing.link(),
            ),
            log_options: options.logs,
            name,
            store_dir,
            standing,
            served,
            pool,
            logs,
        }
    }

    async fn path(&self, hash: StorePathHash) -> Result<Option<StorePath>, Error> {
        let question = Request::QueryPathFromHashPart(hash);
        match self.standing.ask(question).await? {
            Reply::Path(None) => Ok(None),
            Reply::Path(Some(path)) if path.hash() == hash => Ok(Some(path)),
            Reply::Path(Some(path)) => {
                let text = format!("asked for {hash}, it answered {path}");
                Err(Error::Protocol(text.into()))
            }
            _ => Err(unasked()),
        }
    }

    async fn info(&self, path: StorePath) -> Result<Option<PathInfo>, Error> {
        match self.standing.ask(Request::QueryPathInfo(path)).await? {
            Reply::PathInfo(info) => Ok(info),
            _ => Err(unasked()),
        }
    }
}

impl Drop for WorkerUpstream {
    fn drop(&mut self) {
        self.warmer.abort();
    }
}

#[async_trait]
impl Upstream for WorkerUpstream {
    fn name(&self) -> &str {
        &self.name
    }

    fn link(&self) -> watch::Receiver<Link> {
        self.standing.link()
    }

    fn reconnect(&self) {
        self.standing.reconnect();
        self.pool.renew();
    }

    /// Takes one round trip when there is no such path, two when there is.
    async fn path_info(&self, hash: StorePathHash) -> Result<Option<PathInfo>, Error> {
        match self.path(hash).await? {
            Some(path) => self.info(path).await,
            None => Ok(None),
        }
    }

    /// Takes no more round trips: the path is rooted while its info is under way.
    async fn kept_path_info(&self, hash: StorePathHash) -> Result<Option<PathInfo>, Error> {
        let Some(path) = self.path(hash).await? else {
            return Ok(None);
        };
        let keeping = timeout(KEEP_PATIENCE, self.roots.keep(&path));
        let (info, kept) = tokio::join!(self.info(path.clone()), keeping);
        match kept {
            // Told after the info: it went in between.
            Ok(Ok(false)) => Ok(None),
            _ => info,
        }
    }

    async fn path_infos(&self, paths: &[StorePath]) -> Vec<Result<Option<PathInfo>, Error>> {
        let questions = paths.iter().cloned().map(Request::QueryPathInfo);
        let answers = self.standing.ask_many(questions.collect()).await;
        let unpack = |answer| match answer {
            Ok(Reply::PathInfo(info)) => Ok(info),
            Ok(_) => Err(unasked()),
            Err(error) => Err(error),
        };
        answers.into_iter().map(unpack).collect()
    }

    fn closures(&self) -> Option<Arc<dyn Closures>> {
        let served = self.served.as_ref().filter(|served| served.is_ready())?;
        Some(served.clone())
    }

    async fn nar(&self, info: &PathInfo) -> Result<Option<NarStream>, Error> {
        self.pool.nar(&info.path, info.nar_size).await
    }

    async fn keep(&self, path: &StorePath) -> Result<bool, Error> {
        self.roots.keep(path).await
    }

    async fn keep_many(&self, paths: &[StorePath]) -> Vec<Result<bool, Error>> {
        self.roots.keep_many(paths).await
    }

    async fn build_log(&self, derivation: &StorePath) -> Result<Option<Bytes>, Error> {
        let read = self
            .logs
            .read(derivation, &self.store_dir, self.log_options);
        read.await
    }

    async fn realisation(&self, id: &DrvOutput) -> Result<Option<Realisation>, Error> {
        let question = Request::QueryRealisation(id.clone());
        match self.realisations.ask(&self.standing, question).await? {
            None => Ok(None),
            Some(Reply::Realisation(found)) => Ok(found),
            Some(_) => Err(unasked()),
        }
    }

    async fn build_trace(&self, key: &BuildTraceKey) -> Result<Option<BuildTraceEntry>, Error> {
        let question = Request::QueryBuildTrace(key.clone());
        match self.realisations.ask(&self.standing, question).await? {
            None => Ok(None),
            Some(Reply::BuildTrace(found)) => Ok(found),
            Some(_) => Err(unasked()),
        }
    }
}

/// Keeps a session for NARs and one for roots open while the look-up link is up, so that nobody
/// waits for a login.
async fn warm(mut link: watch::Receiver<Link>, pool: Arc<Pool>, roots: Arc<Roots>) {
    loop {
        let up = matches!(&*link.borrow_and_update(), Link::Up { .. });
        pool.warm(up);
        roots.warm(up);
        if link.changed().await.is_err() {
            return;
        }
    }
}

fn unasked() -> Error {
    Error::Protocol("another answer than asked for".into())
}

/// A path that cannot be rooted within it is promised without.
const KEEP_PATIENCE: Duration = Duration::from_secs(1);
