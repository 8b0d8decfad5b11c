//! NARs that are evicted while somebody reads them, and fills whose readers have gone.

mod support;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use muster::cache::backend::Backend;
use muster::cache::disk::{self, DiskCache};
use muster::cache::memory_backend::MemoryBackend;
use muster::codec::compression::Encoding;
use muster::nix::path_info::{PathInfo, Trust};
use muster::nix::store_path::StoreDir;
use muster::substituter::nar_url::NarUrl;
use muster::substituter::transfer::{Extent, NarBody};
use muster::substituter::{Options, Substituter};
use support::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{sleep, timeout};

/// One that the cache below has room for twice.
const LARGE: usize = 30 << 20;
const CACHE_BYTES_MAX: u64 = 70 << 20;

fn on_disk(dir: &Path) -> Arc<dyn Backend> {
    let keys = vec![key().public()];
    let options = disk::Options::new(CACHE_BYTES_MAX, StoreDir::default(), keys);
    Arc::new(DiskCache::open(dir, options))
}

fn over(upstream: &Arc<Scripted>, options: Options, backend: &Arc<dyn Backend>) -> Substituter {
    let all = std::slice::from_ref(upstream);
    let setup = setup(all, &Trust::Operator, Encoding::None);
    Substituter::new(options, setup, Some(Arc::clone(backend)))
}

fn narinfo_target(info: &PathInfo) -> String {
    format!("/{}.narinfo", info.path.hash())
}

/// Waits until something is so, for long enough on a machine with much else to do.
async fn until(what: &str, done: impl Fn() -> bool) {
    let waited = async {
        while !done() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(
        timeout(Duration::from_secs(60), waited).await.is_ok(),
        "{what}"
    );
}

/// Fetches a path, waits until it is kept, and returns where its NAR was and where its file is.
async fn fetch(address: SocketAddr, info: &PathInfo) -> (String, String) {
    let plain = nar_target(&get(address, &narinfo_target(info)).await);
    let answer = get(address, &plain).await;
    assert!(answer.status == 200 && !answer.cut, "{}", answer.head);
    let kept = async {
        loop {
            let narinfo = get(address, &narinfo_target(info)).await;
            if narinfo.text().contains("\nCompression: zstd\n") {
                return nar_target(&narinfo);
            }
            sleep(Duration::from_millis(5)).await;
        }
    };
    let kept = timeout(Duration::from_secs(60), kept).await;
    (plain, kept.expect("it is kept"))
}

/// A client that reads the head of an answer and a little of its body, and stops.
async fn stopped(address: SocketAddr, target: &str) -> (TcpStream, Vec<u8>) {
    let socket = TcpSocket::new_v4().unwrap();
    // Else the system takes some MB in its stead.
    socket.set_recv_buffer_size(8 << 10).unwrap();
    let mut stream = socket.connect(address).await.unwrap();
    let asked = format!("GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(asked.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    assert!(head.starts_with(b"HTTP/1.1 200 "), "{target}");
    let mut body = vec![0; 1000];
    stream.read_exact(&mut body).await.unwrap();
    (stream, body)
}

/// What is being read is not cut: neither the file as it is, nor the NAR that is decoded from it.
#[tokio::test(flavor = "multi_thread")]
async fn an_evicted_nar_reaches_who_reads_it() {
    let dir = tempfile::tempdir().unwrap();
    let a = Scripted::new("a");
    let paths: Vec<_> = (0..4).map(|number| path(number, LARGE, &[])).collect();
    paths.iter().for_each(|(info, nar)| a.add(info, nar));
    let backend = on_disk(dir.path());
    let mut patient = server_options();
    // The readers stop for as long as the fills take.
    patient.write_stall = Duration::from_secs(600);
    let substituter = over(&a, options(), &backend);
    let (served, _) = serve_with(substituter, patient).await;
    let ((info, nar), others) = paths.split_first().unwrap();
    let (plain, target) = fetch(served.address, info).await;
    let file: PathBuf = dir.path().join(target.trim_start_matches('/'));
    let content = Bytes::from(std::fs::read(&file).unwrap());

    let as_it_is = stopped(served.address, &target).await;
    let decoded = stopped(served.address, &plain).await;
    for (info, _) in others {
        fetch(served.address, info).await;
    }
    until("it is evicted", || !file.exists()).await;
    assert!(backend.stats().evictions > 0);
    assert!(
        backend
            .look_up(info.path.hash())
            .is_none_or(|r| r.file.is_none())
    );

    let asked = a.nars.load(Ordering::Relaxed);
    for ((mut stream, mut body), expected) in [(as_it_is, &content), (decoded, nar)] {
        let rest = timeout(Duration::from_secs(60), stream.read_to_end(&mut body)).await;
        rest.expect("it goes on").expect("it is not cut");
        assert!(body == *expected, "{} of {}", body.len(), expected.len());
    }
    assert_eq!(a.nars.load(Ordering::Relaxed), asked, "out of the file");
}

/// More than is held back of it, and than is read whole before the first byte.
const FILLED: usize = 6 << 20;
/// Larger than a fill may be that nobody waits for.
const TOO_LARGE: usize = 12 << 20;

/// Begins to read a NAR; its fill runs for as long as the bounds let it.
async fn begin(substituter: &Substituter, info: &PathInfo) -> (Bytes, Given) {
    assert!(substituter.narinfo(info.path.hash()).await.is_some());
    let url = NarUrl {
        path_hash: info.path.hash(),
        nar_hash: info.nar_hash,
        file_hash: None,
        encoding: Encoding::None,
    };
    let answer = substituter.nar(&url, Extent::Whole).await;
    let NarBody::Stream(mut given) = answer.expect("it is there").body else {
        panic!("it is large");
    };
    let first = given.next().await.expect("a first chunk");
    (first.expect("it is right"), given)
}

type Given = BoxStream<'static, Result<Bytes, muster::substituter::transfer::Error>>;

#[tokio::test(flavor = "multi_thread")]
async fn of_fills_without_clients_only_so_many_go_on() {
    const ORPHANS_MAX: usize = 2;
    let a = Scripted::new("a");
    *a.nar_script.lock().unwrap() = NarScript::Metered;
    let mut options = options();
    options.fill.orphans_max = ORPHANS_MAX;
    options.fill.orphan_bytes_max = (TOO_LARGE - 1) as u64;
    // The source pauses for as long as the test takes: it must not seem to stall.
    options.fill.orphan_stall = Duration::from_secs(600);
    options.transfer.stall = Duration::from_secs(600);
    options.transfer.stall_last = Duration::from_secs(600);
    let backend: Arc<dyn Backend> = Arc::new(MemoryBackend::new(1 << 30));
    let substituter = over(&a, options, &backend);
    a.metered.send_replace(3 << 20);

    let large = path(100, TOO_LARGE, &[]);
    let followed = path(101, FILLED, &[]);
    let left: Vec<_> = (0..4).map(|number| path(number, FILLED, &[])).collect();
    for (info, nar) in left.iter().chain([&large, &followed]) {
        a.add(info, nar);
    }
    let (first, mut rest) = begin(&substituter, &followed.0).await;
    let mut leaving = vec![begin(&substituter, &large.0).await];
    for (info, _) in &left {
        leaving.push(begin(&substituter, info).await);
    }
    let open = || a.nars_open.load(Ordering::Relaxed);
    assert_eq!(open(), left.len() + 2);

    // Of the larger one it is known at once that it is not worth it.
    let (large, others) = (leaving.remove(0), leaving);
    drop(large);
    a.metered.send_replace(4 << 20);
    until("the large one is given up", || open() == left.len() + 1).await;
    drop(others);
    a.metered.send_replace(9 << 19);
    until("the others are given up", || open() <= ORPHANS_MAX + 1).await;
    assert_eq!(open(), ORPHANS_MAX + 1);

    // Those end well, and one that has a client is none of them.
    a.metered.send_replace(usize::MAX);
    let mut got = first.to_vec();
    while let Some(chunk) = rest.next().await {
        got.extend_from_slice(&chunk.expect("it is right"));
    }
    assert!(got == followed.1);
    drop(rest);
    until("all have ended", || open() == 0).await;
    let entries = || usize::try_from(backend.stats().entries).unwrap();
    until("they are kept", || entries() == ORPHANS_MAX + 1).await;
    assert_eq!(backend.stats().bytes_reserved, 0);
}
