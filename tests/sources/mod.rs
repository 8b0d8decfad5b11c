//! The kinds of sources that a NAR is had from, over one builder's real store.

#![allow(
    dead_code,
    clippy::allow_attributes,
    reason = "each test binary uses its own part"
)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use muster::cache::memory::UpstreamId;
use muster::codec::compression::Encoding;
use muster::codec::decompress::Decoder;
use muster::nix::path_info::Trust;
use muster::nix::store_path::StoreDir;
use muster::substituter::health;
use muster::substituter::member::Member;
use muster::substituter::publish::Publisher;
use muster::upstream::Upstream;
use muster::upstream::binary_cache::{BinaryCache, BinaryCacheOptions};
use muster::upstream::cache_folder::CacheFolder;
use muster::upstream::daemon::DaemonSocket;
use muster::upstream::worker::{WorkerSetup, WorkerUpstream};

use super::builder::{Builder, quick};
use super::cache_server::{Asking, CacheServer};
use super::support::key;

/// Bytes of a large file that does not compress.
pub const NAR_BYTES: usize = 6 << 20;

/// Starts an upstream over a daemon's socket.
pub fn over_socket(builder: &Builder, socket: &Path) -> Arc<dyn Upstream> {
    let setup = WorkerSetup {
        name: "daemon".into(),
        dial: Arc::new(DaemonSocket::new(socket)),
        logs: muster::upstream::build_log::BuildLogs::Nowhere,
        store_dir: builder.store_dir.clone(),
    };
    Arc::new(WorkerUpstream::start(setup, quick()))
}

pub fn member(number: u16, upstream: &Arc<dyn Upstream>) -> Arc<Member> {
    let now = tokio::time::Instant::now().into_std();
    let (upstream, options) = (Arc::clone(upstream), health::Options::default());
    let id = UpstreamId(number);
    Arc::new(Member::new(id, upstream, Trust::Operator, options, now))
}

pub fn publisher(store_dir: &StoreDir, encoding: Encoding) -> Publisher {
    Publisher {
        keys: vec![key()],
        store_dir: store_dir.clone(),
        encoding,
    }
}

pub fn in_folder(builder: &Builder, folder: &Path) -> Arc<dyn Upstream> {
    Arc::new(BinaryCache::start(
        "file".to_owned(),
        builder.store_dir.clone(),
        Arc::new(CacheFolder::new(folder, Duration::from_secs(10))),
        Decoder::new(2),
        BinaryCacheOptions::default(),
    ))
}

/// Serves what real Nix wrote.
pub fn serving(builder: &Builder, folder: &Path) -> (CacheServer, Arc<dyn Upstream>) {
    let server = CacheServer::new();
    for (below, prefix) in [(folder.to_owned(), "/"), (folder.join("nar"), "/nar/")] {
        for file in files(&below) {
            let name = file.file_name().unwrap().to_str().unwrap();
            let bytes = std::fs::read(&file).unwrap();
            server.put(&format!("{prefix}{name}"), bytes);
        }
    }
    let mut asking = Asking::at(&server.url());
    asking.store_dir = builder.store_dir.clone();
    (server, Arc::new(asking.start()))
}

pub fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().flatten();
    entries
        .map(|entry| entry.path())
        .filter(|path| path.is_file())
        .collect()
}

pub fn noise() -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(5);
    std::iter::repeat_with(|| random.u8(..))
        .take(NAR_BYTES)
        .collect()
}
