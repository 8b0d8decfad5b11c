//! What is kept, asked for over a real socket: filled once, served as a file, believed while somebody
//! vouches for it, never in the way.

mod support;

use std::net::SocketAddr;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use muster::cache::backend::Backend;
use muster::cache::disk::{self, DiskCache};
use muster::cache::memory_backend::MemoryBackend;
use muster::cache::nar_name::NarName;
use muster::cache::stamp::Content;
use muster::codec::compression::Encoding;
use muster::nix::hash::NarHash;
use muster::nix::narinfo::{Compression, NarInfo};
use muster::nix::path_info::{PathInfo, Trust};
use muster::nix::store_path::StoreDir;
use muster::substituter::Substituter;
use muster::upstream::Link;
use sha2::{Digest as _, Sha256};
use support::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

/// Small, and larger than what is read whole before the first byte.
const SIZES: [usize; 2] = [1000, 6 << 20];

fn memory() -> Arc<dyn Backend> {
    Arc::new(MemoryBackend::new(1 << 30))
}

fn on_disk(dir: &Path) -> Arc<dyn Backend> {
    let keys = vec![key().public()];
    let options = disk::Options::new(1 << 30, StoreDir::default(), keys);
    Arc::new(DiskCache::open(dir, options))
}

fn over(upstreams: &[Arc<Scripted>], backend: &Arc<dyn Backend>) -> Substituter {
    over_as(upstreams, backend, &Trust::Operator, Encoding::None)
}

fn over_as(
    upstreams: &[Arc<Scripted>],
    backend: &Arc<dyn Backend>,
    trust: &Trust,
    encoding: Encoding,
) -> Substituter {
    let setup = setup(upstreams, trust, encoding);
    Substituter::new(options(), setup, Some(Arc::clone(backend)))
}

fn narinfo_target(info: &PathInfo) -> String {
    format!("/{}.narinfo", info.path.hash())
}

async fn narinfo(address: SocketAddr, info: &PathInfo) -> Option<NarInfo> {
    let answer = get(address, &narinfo_target(info)).await;
    (answer.status == 200).then(|| NarInfo::parse(answer.text(), &StoreDir::default()).unwrap())
}

/// Waits until the narinfo names a kept file, and returns its target.
async fn kept(address: SocketAddr, info: &PathInfo) -> String {
    let waited = async {
        loop {
            let narinfo = narinfo(address, info).await.expect("it is there");
            if narinfo.file_hash.is_some() && narinfo.compression == Compression::Zstd {
                return format!("/{}", narinfo.url);
            }
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(10), waited)
        .await
        .expect("it is kept")
}

fn unzstd(bytes: &[u8]) -> Vec<u8> {
    zstd::decode_all(bytes).expect("a zstd frame")
}

fn sha256(bytes: &[u8]) -> Vec<u8> {
    Sha256::digest(bytes).to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_path_fetched_once_is_given_with_every_builder_off_and_after_a_restart() {
    for size in SIZES {
        let dir = tempfile::tempdir().unwrap();
        let a = Scripted::new("a");
        let (info, nar) = path(1, size, &[]);
        a.add(&info, &nar);
        let substituter = over(std::slice::from_ref(&a), &on_disk(dir.path()));
        let served = serve(substituter.clone()).await;
        let plain = nar_target(&get(served.address, &narinfo_target(&info)).await);
        assert!(plain.ends_with(".nar"), "{plain}");
        assert_eq!(get(served.address, &plain).await.body, nar);
        let file = kept(served.address, &info).await;
        a.down();
        for round in 0..2 {
            let served = match round {
                0 => serve(substituter.clone()).await,
                _ => {
                    substituter.stop().await;
                    serve(over(std::slice::from_ref(&a), &on_disk(dir.path()))).await
                }
            };
            let known = narinfo(served.address, &info).await.expect("it is kept");
            assert_eq!(format!("/{}", known.url), file);
            assert_eq!(known.info.signatures.len(), 1);
            let answer = get(served.address, &file).await;
            assert_eq!(answer.status, 200);
            assert_eq!(answer.header("accept-ranges"), Some("bytes"));
            assert_eq!(answer.body.len() as u64, known.file_size.unwrap());
            assert_eq!(sha256(&answer.body), known.file_hash.unwrap().digest());
            assert_eq!(unzstd(&answer.body), nar);
            // What clients remember from before it was kept.
            assert_eq!(get(served.address, &plain).await.body, nar);
            let on_the_fly = get(served.address, &format!("{plain}.zst")).await;
            assert_eq!(on_the_fly.header("accept-ranges"), None);
            assert_eq!(unzstd(&on_the_fly.body), nar);
            if size < 1 << 20 {
                let xz = get(served.address, &format!("{plain}.xz")).await.body;
                let mut xz = liblzma::read::XzDecoder::new(&*xz);
                let mut decoded = Vec::new();
                std::io::Read::read_to_end(&mut xz, &mut decoded).unwrap();
                assert_eq!(decoded, nar);
            }
            let part = request(served.address, "GET", &plain, "Range: bytes=10-19\r\n").await;
            assert_eq!((part.status, &*part.body), (206, &nar[10..20]));
        }
        assert_eq!(
            a.nars.load(Ordering::Relaxed),
            1,
            "read from the builder once"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn parts_heads_and_many_requests_on_one_connection() {
    let a = Scripted::new("a");
    let backend = memory();
    let paths: Vec<_> = [1, 2, 100, 70_000, 5 << 20, 40 << 20]
        .into_iter()
        .enumerate()
        .map(|(number, size)| path(u32::try_from(number).unwrap(), size, &[]))
        .collect();
    for (info, nar) in &paths {
        a.add(info, nar);
    }
    let substituter = over_as(&[a], &backend, &Trust::Operator, Encoding::Zstd);
    let served = serve(substituter).await;
    let mut all = Vec::new();
    for (info, _) in &paths {
        let target = nar_target(&get(served.address, &narinfo_target(info)).await);
        get(served.address, &target).await;
        let file = kept(served.address, info).await;
        let bytes = get(served.address, &file).await.body;
        all.push((file, bytes));
    }

    // One after the other, and all at once before any answer is read.
    let mut stream = TcpStream::connect(served.address).await.unwrap();
    let mut expected = Vec::new();
    let mut asked = String::new();
    for (file, bytes) in all.iter().chain(all.iter().rev()) {
        asked += &format!("HEAD {file} HTTP/1.1\r\nHost: x\r\n\r\n");
        expected.push(Bytes::new());
        let middle = bytes.len() / 2;
        asked += &format!("GET {file} HTTP/1.1\r\nHost: x\r\nRange: bytes={middle}-\r\n\r\n");
        expected.push(Bytes::copy_from_slice(&bytes[middle..]));
        asked += &format!("GET {file} HTTP/1.1\r\nHost: x\r\n\r\n");
        expected.push(Bytes::copy_from_slice(bytes));
    }
    let (mut reader, mut writer) = stream.split();
    let write = async { writer.write_all(asked.as_bytes()).await.unwrap() };
    let read = async {
        for (place, body) in expected.iter().enumerate() {
            let head = read_head(&mut reader).await;
            let length: usize = head
                .lines()
                .find_map(|line| line.strip_prefix("content-length: "))
                .expect(&head)
                .parse()
                .unwrap();
            if place % 3 == 0 {
                assert_eq!(length, expected[place + 2].len());
                continue;
            }
            let mut got = vec![0; length];
            reader.read_exact(&mut got).await.unwrap();
            assert!(got == *body, "answer {place}: {head}");
        }
    };
    timeout(Duration::from_secs(60), async { tokio::join!(write, read) })
        .await
        .unwrap();

    let (file, bytes) = &all[4];
    let last = request(served.address, "GET", file, "Range: bytes=-5\r\n").await;
    assert_eq!((last.status, &*last.body), (206, &bytes[bytes.len() - 5..]));
    let behind = format!("Range: bytes={}-\r\n", bytes.len());
    let behind = request(served.address, "GET", file, &behind).await;
    assert_eq!(behind.status, 416);
    let other = request(
        served.address,
        "GET",
        file,
        "Range: bytes=5-\r\nIf-Range: \"x\"\r\n",
    )
    .await;
    assert_eq!((other.status, &other.body), (200, bytes));
}

async fn read_head(reader: &mut (impl tokio::io::AsyncRead + Unpin)) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(reader.read_u8().await.unwrap());
    }
    String::from_utf8(head).unwrap().to_lowercase()
}

#[tokio::test(flavor = "multi_thread")]
async fn trust_that_is_withdrawn_is_withdrawn_from_what_is_kept() {
    for size in SIZES {
        let dir = tempfile::tempdir().unwrap();
        let a = Scripted::new("a");
        let (info, nar) = path(1, size, &[]);
        a.add(&info, &nar);
        let backend = on_disk(dir.path());
        let substituter = over(std::slice::from_ref(&a), &backend);
        let served = serve(substituter.clone()).await;
        let plain = nar_target(&get(served.address, &narinfo_target(&info)).await);
        get(served.address, &plain).await;
        let file = kept(served.address, &info).await;
        a.down();
        let nobody = Trust::Keys(vec![]);
        let no_longer = |trust: &Trust| setup(std::slice::from_ref(&a), trust, Encoding::None);
        substituter.replace(Setup::renumbered(no_longer(&nobody)));
        assert!(
            narinfo(served.address, &info).await.is_none(),
            "not believed"
        );
        for target in [&plain, &file] {
            assert_eq!(get(served.address, target).await.status, 404);
        }
        substituter.stop().await;
        let restarted = over_as(
            std::slice::from_ref(&a),
            &on_disk(dir.path()),
            &nobody,
            Encoding::None,
        );
        let served = serve(restarted).await;
        assert!(
            narinfo(served.address, &info).await.is_none(),
            "nor after a restart"
        );
        assert_eq!(get(served.address, &file).await.status, 404);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_look_up_ends_with_the_trust_it_rested_on_and_with_the_last_holder() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (Scripted::new("a"), Scripted::new("b"));
    let (info, nar) = path(1, 1000, &[]);
    for upstream in [&a, &b] {
        upstream.add(&info, &nar);
    }
    let both = [Arc::clone(&a), Arc::clone(&b)];
    let nobody = Trust::Keys(vec![]);
    let known = async |upstreams: &[Arc<Scripted>], trust: &Trust| {
        let backend = on_disk(dir.path());
        let substituter = over_as(upstreams, &backend, trust, Encoding::None);
        let found = substituter.narinfo(info.path.hash()).await.is_some();
        // What is asked for again behind the answer is heard, and written.
        sleep(Duration::from_millis(200)).await;
        substituter.stop().await;
        found
    };
    assert!(known(&both, &Trust::Operator).await);
    for upstream in [&a, &b] {
        upstream.down();
    }
    assert!(known(&both, &Trust::Operator).await, "by what is kept");
    // Not by an upstream that is trusted no more, nor by one that is not configured any more.
    assert!(!known(&both, &nobody).await);
    assert!(!known(&[], &Trust::Operator).await);
    // One of both is enough, and trust that returns counts.
    assert!(known(std::slice::from_ref(&b), &Trust::Operator).await);
    // One denies it, the other is off: that one is believed. Then that one denies it, too.
    for (upstream, still) in [(&a, true), (&b, false)] {
        upstream.remove(&info);
        upstream.set_link(up());
        // The answer is given at once, and asked for behind it.
        known(&both, &Trust::Operator).await;
        upstream.down();
        assert_eq!(known(&both, &Trust::Operator).await, still);
    }
}

fn up() -> Link {
    Link::Up {
        peer: "scripted".into(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_signs_the_folder_with_the_new_key_but_not_what_lost_its_trust() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (Scripted::new("a"), Scripted::new("b"));
    let paths = [path(1, 1000, &[]), path(2, 6 << 20, &[])];
    for (upstream, (info, nar)) in [&a, &b].into_iter().zip(&paths) {
        upstream.add(info, nar);
    }
    let both = [Arc::clone(&a), Arc::clone(&b)];
    let substituter = over(&both, &on_disk(dir.path()));
    let served = serve(substituter.clone()).await;
    let mut files = Vec::new();
    for (info, _) in &paths {
        let plain = nar_target(&get(served.address, &narinfo_target(info)).await);
        get(served.address, &plain).await;
        files.push(kept(served.address, info).await);
    }
    let signed_by = |number: usize| {
        let name = narinfo_target(&paths[number].0);
        let text = std::fs::read_to_string(dir.path().join(name.trim_start_matches('/'))).unwrap();
        let info = NarInfo::parse(&text, &StoreDir::default()).unwrap().info;
        let names = info
            .signatures
            .iter()
            .map(|s| s.key_name().as_str().to_owned());
        names.collect::<Vec<_>>()
    };
    assert_eq!(
        (signed_by(0), signed_by(1)),
        (vec!["test-1".to_owned()], vec!["test-1".to_owned()])
    );
    // The second builder is not configured any more.
    let name = muster::nix::signature::KeyName::new("new-1").unwrap();
    let new = muster::nix::signature::SecretKey::from_seed(name, &[8; 32].into());
    let mut reloaded = setup(&both[..1], &Trust::Operator, Encoding::None);
    reloaded.publisher.keys = vec![new];
    substituter.replace(reloaded);
    // Nobody vouches for the second any more, so the old key does not either.
    let signed = async {
        while signed_by(0) != ["new-1"] || !signed_by(1).is_empty() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(10), signed)
        .await
        .expect("signed anew, and not signed");
    sleep(Duration::from_millis(300)).await;
    assert_eq!(signed_by(1), [""; 0], "nobody vouches for it");
    assert!(narinfo(served.address, &paths[1].0).await.is_none());
    let served_now = narinfo(served.address, &paths[0].0).await.unwrap();
    assert_eq!(served_now.info.signatures[0].key_name().as_str(), "new-1");
    assert_eq!(format!("/{}", served_now.url), files[0]);
    assert_eq!(
        unzstd(&get(served.address, &files[0]).await.body),
        paths[0].1
    );
}

/// A setup whose members have other numbers, as after a reload that changed them.
trait Renumber {
    fn renumbered(self) -> Self;
}

use muster::cache::memory::UpstreamId;
use muster::substituter::member::Member;
use muster::substituter::{Setup, health};

impl Renumber for Setup {
    fn renumbered(mut self) -> Self {
        for member in &mut self.members {
            *member = Arc::new(Member::new(
                UpstreamId(member.id.0 + 100),
                Arc::clone(&member.upstream),
                member.trust.clone(),
                health::Options::default(),
                std::time::Instant::now(),
            ));
        }
        self
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_share_one_fill_in_every_form() {
    let a = Scripted::new("a");
    let (info, nar) = path(1, 12 << 20, &[]);
    a.add(&info, &nar);
    let served = serve(over(std::slice::from_ref(&a), &memory())).await;
    let plain = nar_target(&get(served.address, &narinfo_target(&info)).await);
    let targets = [
        plain.clone(),
        format!("{plain}.zst"),
        plain.clone(),
        format!("{plain}.zst"),
    ];
    let fetched = targets.iter().map(|target| get(served.address, target));
    let answers = join_all(fetched).await;
    for (target, answer) in targets.iter().zip(answers) {
        assert!(!answer.cut, "{target}");
        let body = match target.ends_with("zst") {
            true => unzstd(&answer.body),
            false => answer.body,
        };
        assert!(body == nar, "{target}");
    }
    // Those that came before its first byte may each have asked; all others followed.
    assert!(a.nars.load(Ordering::Relaxed) <= 4);
    kept(served.address, &info).await;
    let nars = a.nars.load(Ordering::Relaxed);
    assert_eq!(get(served.address, &plain).await.body, nar);
    assert_eq!(a.nars.load(Ordering::Relaxed), nars);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_client_holds_no_builder_and_one_that_leaves_stops_no_fill() {
    for suffix in ["", ".zst"] {
        let a = Scripted::new("a");
        let (info, nar) = path(1, 40 << 20, &[]);
        a.add(&info, &nar);
        let served = serve(over(std::slice::from_ref(&a), &memory())).await;
        let target = nar_target(&get(served.address, &narinfo_target(&info)).await) + suffix;
        let mut slow = TcpStream::connect(served.address).await.unwrap();
        let asked = format!("GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        slow.write_all(asked.as_bytes()).await.unwrap();
        // Under load it would else come when all is over, and begin a fill of its own.
        slow.read_u8().await.unwrap();
        let mut leaving = TcpStream::connect(served.address).await.unwrap();
        leaving.write_all(asked.as_bytes()).await.unwrap();
        leaving.read_u8().await.unwrap();
        drop(leaving);
        // It has read nothing of it yet; the whole NAR is kept, and the builder free.
        kept(served.address, &info).await;
        assert_eq!(a.nars_open.load(Ordering::Relaxed), 0, "{suffix}");
        let mut bytes = Vec::new();
        slow.read_to_end(&mut bytes).await.unwrap();
        assert!(bytes.len() > 30 << 20, "{}", bytes.len());
        if suffix.is_empty() {
            assert!(bytes.ends_with(&nar), "the NAR, to its last byte");
        }
    }
}

/// A client that asks for something and reads the head of the answer only.
async fn stopped(address: SocketAddr, target: &str) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    // Else the system takes some MB in its stead.
    socket.set_recv_buffer_size(8 << 10).unwrap();
    let mut stream = socket.connect(address).await.unwrap();
    let asked = format!("GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(asked.as_bytes()).await.unwrap();
    let head = read_head(&mut stream).await;
    assert!(
        head.contains(" 200 ") && head.contains("content-length: "),
        "{head}"
    );
    stream
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_stop_do_not_keep_small_nars_from_others() {
    for backend in [None, Some(memory())] {
        let a = Scripted::new("a");
        let paths: Vec<_> = (0..7).map(|number| path(number, 4 << 20, &[])).collect();
        for (info, nar) in &paths {
            a.add(info, nar);
        }
        let mut options = options();
        // Room for two of them.
        options.transfer.whole_kib_max = 9 << 10;
        let setup = setup(std::slice::from_ref(&a), &Trust::Operator, Encoding::None);
        let mut patient = server_options();
        patient.write_stall = Duration::from_secs(300);
        let substituter = Substituter::new(options, setup, backend);
        let served = serve_with(substituter, patient).await.0;
        // What clients remember: the NAR as it is, and compressed.
        let target = |number: usize| {
            let (info, _) = &paths[number];
            let name = format!("{}-{}", info.path.hash(), info.nar_hash.to_base32());
            format!("/nar/{name}.nar{}", ["", ".zst"][number % 2])
        };
        let asked = std::time::Instant::now();
        let mut clients = Vec::new();
        for number in 0..6 {
            clients.push(stopped(served.address, &target(number)).await);
        }
        let last = get(served.address, &target(6)).await;
        assert!(last.body == paths[6].1);
        let took = asked.elapsed();
        assert!(took < Duration::from_secs(60), "{took:?}");
        // Each of them reads on and has what it was promised.
        for (number, mut client) in clients.into_iter().enumerate() {
            let mut body = Vec::new();
            client.read_to_end(&mut body).await.unwrap();
            let body = match number % 2 {
                0 => body,
                _ => unzstd(&body),
            };
            assert!(body == paths[number].1, "client {number}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fill_whose_client_left_is_finished() {
    let a = Scripted::new("a");
    let (info, nar) = path(1, 30 << 20, &[]);
    a.add(&info, &nar);
    let served = serve(over(&[a], &memory())).await;
    let target = nar_target(&get(served.address, &narinfo_target(&info)).await);
    let mut leaving = TcpStream::connect(served.address).await.unwrap();
    let asked = format!("GET {target} HTTP/1.1\r\nHost: x\r\n\r\n");
    leaving.write_all(asked.as_bytes()).await.unwrap();
    leaving.read_u8().await.unwrap();
    drop(leaving);
    let file = kept(served.address, &info).await;
    assert!(unzstd(&get(served.address, &file).await.body) == nar);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fill_that_nobody_waits_for_holds_no_silent_builder() {
    let a = Scripted::new("a");
    let (info, nar) = path(1, 30 << 20, &[]);
    a.add(&info, &nar);
    *a.nar_script.lock().unwrap() = NarScript::StallAt(20 << 20);
    let mut options = options();
    options.transfer.stall_last = Duration::from_secs(120);
    options.fill.orphan_stall = Duration::from_millis(500);
    let setup = setup(std::slice::from_ref(&a), &Trust::Operator, Encoding::None);
    let backend = memory();
    let served = serve(Substituter::new(options, setup, Some(Arc::clone(&backend)))).await;
    let target = nar_target(&get(served.address, &narinfo_target(&info)).await);
    let mut client = TcpStream::connect(served.address).await.unwrap();
    let asked = format!("GET {target} HTTP/1.1\r\nHost: x\r\n\r\n");
    client.write_all(asked.as_bytes()).await.unwrap();
    let mut bytes = vec![0; 5 << 20];
    client.read_exact(&mut bytes).await.unwrap();
    // Somebody waits: the last holder is waited for as ever.
    sleep(Duration::from_secs(2)).await;
    assert_eq!(a.nars_open.load(Ordering::Relaxed), 1);
    drop(client);
    let free = async {
        let held = || {
            let open = a.nars_open.load(Ordering::Relaxed);
            open > 0 || backend.stats().bytes_reserved > 0
        };
        while held() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(20), free)
        .await
        .expect("builder and room are free");
    // Who comes then begins anew.
    *a.nar_script.lock().unwrap() = NarScript::Whole;
    assert!(get(served.address, &target).await.body == nar);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fill_goes_on_from_the_next_holder_and_what_is_wrong_is_not_kept() {
    for suffix in ["", ".zst"] {
        let (a, b) = (Scripted::new("a"), Scripted::new("b"));
        let (info, nar) = path(1, 20 << 20, &[]);
        a.add(&info, &nar);
        b.add(&info, &nar);
        *a.nar_script.lock().unwrap() = NarScript::BreakAt(7 << 20);
        *b.nar_script.lock().unwrap() = NarScript::BreakAt(11 << 20);
        let c = Scripted::new("c");
        c.add(&info, &nar);
        let served = serve(over(&[a, b, c], &memory())).await;
        let target = nar_target(&get(served.address, &narinfo_target(&info)).await) + suffix;
        sleep(Duration::from_millis(50)).await;
        let answer = get(served.address, &target).await;
        assert!(!answer.cut);
        let body = match suffix {
            "" => answer.body,
            _ => unzstd(&answer.body),
        };
        assert!(body == nar);
        let file = kept(served.address, &info).await;
        assert!(unzstd(&get(served.address, &file).await.body) == nar);
    }
    for script in [NarScript::FlipLast, NarScript::BreakAt(9 << 20)] {
        let a = Scripted::new("a");
        let (info, nar) = path(1, 20 << 20, &[]);
        a.add(&info, &nar);
        *a.nar_script.lock().unwrap() = script.clone();
        let backend = memory();
        let served = serve(over(std::slice::from_ref(&a), &backend)).await;
        let target = nar_target(&get(served.address, &narinfo_target(&info)).await);
        for suffix in ["", ".zst"] {
            let answer = get(served.address, &format!("{target}{suffix}")).await;
            assert!(
                answer.cut || answer.status == 404,
                "{script:?}{suffix}: {}",
                answer.status
            );
        }
        let stats = backend.stats();
        assert_eq!((stats.entries, stats.bytes_reserved), (0, 0), "{script:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_that_cannot_be_written_makes_no_client_fail() {
    // Full in mid-fill, refused at the start, and too small for anything.
    for (bytes_max, degraded) in [(4 << 20, false), (1 << 30, true), (1, false)] {
        let a = Scripted::new("a");
        let backend = MemoryBackend::new(bytes_max);
        backend.degrade(degraded.then_some("the disk is on fire"));
        let backend: Arc<dyn Backend> = Arc::new(backend);
        let served = serve(over(std::slice::from_ref(&a), &backend)).await;
        for (number, size) in [(1, 1000), (2, 9 << 20)] {
            let (info, nar) = path(number, size, &[]);
            a.add(&info, &nar);
            let target = nar_target(&get(served.address, &narinfo_target(&info)).await);
            let suffixes = match size {
                1000 => &["", ".zst", ".xz"][..],
                _ => &["", ".zst"],
            };
            for suffix in suffixes {
                let target = format!("{target}{suffix}");
                let both = tokio::join!(get(served.address, &target), get(served.address, &target));
                for answer in [both.0, both.1] {
                    assert_eq!(answer.status, 200, "{target}");
                    assert!(!answer.cut, "{target} of {bytes_max}, degraded {degraded}");
                    let right = match *suffix {
                        "" => answer.body == nar,
                        ".zst" => unzstd(&answer.body) == nar,
                        _ => answer.body.len() > 500,
                    };
                    assert!(right, "{target} of {bytes_max}, degraded {degraded}");
                }
            }
        }
        assert_eq!(backend.stats().bytes_reserved, 0);
    }
}

/// A builder gives some at a time; each client that goes on without the cache asks for one.
#[tokio::test(flavor = "multi_thread")]
async fn many_clients_of_one_large_nar_outlive_a_cache_that_is_full() {
    let a = Scripted::new("a");
    *a.nars_max.lock().unwrap() = Some(Arc::new(Semaphore::new(8)));
    let (mut info, nar) = path(1, 12 << 20, &[]);
    let mut nar = nar.to_vec();
    for half in nar.chunks_mut(8 << 10) {
        let middle = half.len() / 2;
        half[middle..].fill(0);
    }
    info.nar_hash = NarHash::of(&nar);
    a.add(&info, &Bytes::from(nar.clone()));
    let backend: Arc<dyn Backend> = Arc::new(MemoryBackend::new(3 << 20));
    let served = serve(over(std::slice::from_ref(&a), &backend)).await;
    let plain = nar_target(&get(served.address, &narinfo_target(&info)).await);
    let targets = [format!("{plain}.zst"), plain];
    let clients = (0..48).map(|number| get(served.address, &targets[number % 2]));
    for (number, answer) in join_all(clients).await.into_iter().enumerate() {
        assert!(!answer.cut, "client {number}");
        let body = match number % 2 {
            0 => unzstd(&answer.body),
            _ => answer.body,
        };
        assert!(body == nar, "client {number}");
    }
    assert_eq!(backend.stats().bytes_reserved, 0);
}

/// A decoder of a large NAR takes memory for what it looks back on, and there is room for sixteen of them.
#[tokio::test(flavor = "multi_thread")]
async fn clients_that_stop_in_a_large_nar_do_not_keep_it_from_others() {
    for growing in [false, true] {
        let a = Scripted::new("a");
        let (info, nar) = path(1, 36 << 20, &[]);
        a.add(&info, &nar);
        if growing {
            *a.nar_script.lock().unwrap() = NarScript::Metered;
            a.metered.send_replace(30 << 20);
        }
        let mut patient = server_options();
        patient.write_stall = Duration::from_secs(300);
        let substituter = over(std::slice::from_ref(&a), &memory());
        let served = serve_with(substituter, patient).await.0;
        let plain = nar_target(&get(served.address, &narinfo_target(&info)).await);
        let first = tokio::spawn({
            let plain = plain.clone();
            async move { get(served.address, &plain).await }
        });
        match growing {
            true => {
                while a.nars_open.load(Ordering::Relaxed) == 0 {
                    sleep(Duration::from_millis(5)).await;
                }
            }
            false => {
                kept(served.address, &info).await;
                a.down();
            }
        }
        let asked = std::time::Instant::now();
        let stopping = (0..20).map(|_| stopped(served.address, &plain));
        let stopped = timeout(Duration::from_secs(60), join_all(stopping)).await;
        a.metered.send_replace(usize::MAX);
        let last = timeout(Duration::from_secs(60), get(served.address, &plain)).await;
        assert!(last.expect("room is made").body == nar);
        let waited = asked.elapsed();
        assert!(waited > Duration::from_secs(10), "no place was waited for");
        assert!(first.await.unwrap().body == nar);
        for (number, mut client) in stopped.expect("heads").into_iter().enumerate() {
            let mut body = Vec::new();
            client.read_to_end(&mut body).await.unwrap();
            assert!(body == nar, "client {number}, growing: {growing}");
        }
        assert_eq!(a.nars.load(Ordering::Relaxed), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_are_damaged_behind_our_back_are_cut_removed_and_fetched_again() {
    let dir = tempfile::tempdir().unwrap();
    let a = Scripted::new("a");
    let (info, nar) = path(1, 30 << 20, &[]);
    a.add(&info, &nar);
    let backend = on_disk(dir.path());
    let served = serve(over(std::slice::from_ref(&a), &backend)).await;
    let plain = nar_target(&get(served.address, &narinfo_target(&info)).await);
    get(served.address, &plain).await;
    let target = kept(served.address, &info).await;
    let file: PathBuf = dir.path().join(target.trim_start_matches('/'));

    // Truncated while it is being served.
    let mut reader = TcpStream::connect(served.address).await.unwrap();
    let asked = format!("GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    reader.write_all(asked.as_bytes()).await.unwrap();
    let head = read_head(&mut reader).await;
    assert!(head.contains(" 200 "), "{head}");
    std::fs::OpenOptions::new()
        .write(true)
        .open(&file)
        .unwrap()
        .set_len(12 << 20)
        .unwrap();
    let mut got = Vec::new();
    let _ = reader.read_to_end(&mut got).await;
    assert!(got.len() < 30 << 20, "cut, not padded: {}", got.len());
    let noted = async {
        while backend.stats().corrupt == 0 {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(5), noted)
        .await
        .expect("it is noted");
    // The process lives, the path is fetched again; whoever finds the file gone does not keep it yet.
    for _ in 0..2 {
        assert_eq!(get(served.address, &plain).await.body, nar);
    }
    let target = kept(served.address, &info).await;

    // Overwritten: the form that is decoded here is checked on its way.
    let file: PathBuf = dir.path().join(target.trim_start_matches('/'));
    let open = std::fs::OpenOptions::new().write(true).open(&file).unwrap();
    open.write_all_at(&[0x55; 4096], 9 << 20).unwrap();
    let answer = get(served.address, &plain).await;
    assert!(answer.cut || answer.body == nar, "never wrong bytes");
    let noted = async {
        while backend.stats().corrupt < 2 {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(5), noted)
        .await
        .expect("it is noted, too");
    assert_eq!(get(served.address, &plain).await.body, nar);
}

/// What is served as it is, is read before if it may have changed: the size does not tell.
#[tokio::test(flavor = "multi_thread")]
async fn a_kept_file_that_was_overwritten_is_given_rightly_and_made_anew() {
    for size in SIZES {
        let dir = tempfile::tempdir().unwrap();
        let a = Scripted::new("a");
        let (info, nar) = path(1, size, &[]);
        a.add(&info, &nar);
        let mut backend = on_disk(dir.path());
        let mut substituter = over(std::slice::from_ref(&a), &backend);
        let mut served = serve(substituter.clone()).await;
        let plain = nar_target(&get(served.address, &narinfo_target(&info)).await);
        get(served.address, &plain).await;
        for (round, restarted) in [false, true, false].into_iter().enumerate() {
            let target = kept(served.address, &info).await;
            let file: PathBuf = dir.path().join(target.trim_start_matches('/'));
            if restarted {
                substituter.stop().await;
            }
            let open = std::fs::OpenOptions::new().write(true).open(&file).unwrap();
            let middle = std::fs::metadata(&file).unwrap().len() / 2;
            open.write_all_at(&[0x55; 8], middle).unwrap();
            if restarted {
                backend = on_disk(dir.path());
                substituter = over(std::slice::from_ref(&a), &backend);
                served = serve(substituter.clone()).await;
            }
            // Round 2 asks for what clients remember from before it was kept.
            let asked = if round == 2 { &plain } else { &target };
            let answer = get(served.address, asked).await;
            assert!(answer.status == 200 && !answer.cut, "{size}, round {round}");
            let got = match round {
                2 => answer.body,
                _ => unzstd(&answer.body),
            };
            assert!(got == nar, "{size}, round {round}");
            let corrupt = if restarted { 1 } else { round as u64 / 2 + 1 };
            let noted = async {
                while backend.stats().corrupt < corrupt {
                    sleep(Duration::from_millis(5)).await;
                }
            };
            let noted = timeout(Duration::from_secs(5), noted).await;
            noted.expect("it is noted");
            get(served.address, &plain).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kept_file_is_read_again_only_if_it_changed() {
    let dir = tempfile::tempdir().unwrap();
    let a = Scripted::new("a");
    let (info, nar) = path(1, SIZES[1], &[]);
    a.add(&info, &nar);
    let substituter = over(std::slice::from_ref(&a), &on_disk(dir.path()));
    let served = serve(substituter.clone()).await;
    let plain = nar_target(&get(served.address, &narinfo_target(&info)).await);
    get(served.address, &plain).await;
    let target = kept(served.address, &info).await;
    a.down();
    substituter.stop().await;
    let file: PathBuf = dir.path().join(target.trim_start_matches('/'));
    let name = NarName::parse(target.rsplit('/').next().unwrap()).unwrap();
    let content = |backend: &Arc<dyn Backend>| backend.open(&name).unwrap().unwrap().content;
    let served = async |backend: &Arc<dyn Backend>| {
        let substituter = over(std::slice::from_ref(&a), backend);
        let served = serve(substituter.clone()).await;
        assert!(unzstd(&get(served.address, &target).await.body) == nar);
        substituter
    };
    let backend = on_disk(dir.path());
    assert_eq!(content(&backend), Content::Unchanged, "over a restart");
    served(&backend).await.stop().await;

    // Copied from elsewhere, say: read once, and known from then on, over a restart, too.
    let touched = std::fs::File::options().write(true).open(&file).unwrap();
    let earlier = std::time::SystemTime::now() - Duration::from_secs(3600);
    touched.set_modified(earlier).unwrap();
    let backend = on_disk(dir.path());
    assert!(matches!(content(&backend), Content::Unknown(Some(_))));
    let substituter = served(&backend).await;
    assert_eq!(content(&backend), Content::Unchanged);
    substituter.stop().await;
    let backend = on_disk(dir.path());
    assert_eq!(content(&backend), Content::Unchanged);
    backend.stop().await;

    // Without its index it is not known.
    std::fs::remove_file(dir.path().join(".muster/index.redb")).unwrap();
    let backend = on_disk(dir.path());
    assert!(matches!(content(&backend), Content::Unknown(Some(_))));
    served(&backend).await.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resumed_download_is_the_same_file_or_none() {
    let dir = tempfile::tempdir().unwrap();
    let a = Scripted::new("a");
    let (mut info, _) = path(1, 1, &[]);
    // Something large, of which each level makes other bytes.
    let lines = (0..1_200_000_u32).map(|n| format!("{}\n", n.wrapping_mul(2_654_435_761) >> 8));
    let nar = Bytes::from(lines.collect::<String>());
    (info.nar_hash, info.nar_size) = (muster::nix::hash::NarHash::of(&nar), nar.len() as u64);
    a.add(&info, &nar);
    let served = serve(over(std::slice::from_ref(&a), &on_disk(dir.path()))).await;
    let plain = nar_target(&get(served.address, &narinfo_target(&info)).await);
    get(served.address, &plain).await;
    let target = kept(served.address, &info).await;
    let whole = get(served.address, &target).await.body;
    assert!(whole.len() > 2_000_000, "{}", whole.len());
    let range = "Range: bytes=1000000-\r\n";

    // Wiped and restarted: made again, byte for byte.
    let wiped = tempfile::tempdir().unwrap();
    let again = serve(over(std::slice::from_ref(&a), &on_disk(wiped.path()))).await;
    let rest = request(again.address, "GET", &target, range).await;
    assert_eq!(rest.status, 206, "{}", rest.head);
    assert!(rest.body == whole[1_000_000..]);

    // Another encoder's bytes, or no cache at all: the whole, and no word of parts.
    let mut other = options();
    other.transfer.encoder.zstd_level = Some(7);
    let setups = || setup(std::slice::from_ref(&a), &Trust::Operator, Encoding::None);
    let elsewhere = tempfile::tempdir().unwrap();
    for substituter in [
        Substituter::new(other, setups(), Some(on_disk(elsewhere.path()))),
        Substituter::new(options(), setups(), None),
    ] {
        let served = serve(substituter).await;
        let rest = request(served.address, "GET", &target, range).await;
        assert_eq!(rest.status, 200, "{}", rest.head);
        assert_eq!(rest.header("accept-ranges"), None);
        assert_eq!(rest.header("content-range"), None);
        assert!(unzstd(&rest.body) == nar);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_upstreams_have_lost_or_built_anew_is_still_given_as_it_was() {
    let a = Scripted::new("a");
    let (info, nar) = path(1, 1000, &[]);
    a.add(&info, &nar);
    let mut options = options();
    options.memory.revalidate_after = Duration::ZERO;
    let setup = setup(std::slice::from_ref(&a), &Trust::Operator, Encoding::None);
    let substituter = Substituter::new(options, setup, Some(memory()));
    let served = serve(substituter).await;
    let plain = nar_target(&get(served.address, &narinfo_target(&info)).await);
    get(served.address, &plain).await;
    let target = kept(served.address, &info).await;
    a.remove(&info);
    for _ in 0..5 {
        assert_eq!(kept(served.address, &info).await, target);
        sleep(Duration::from_millis(20)).await;
    }
    let mut other = info.clone();
    let other_nar = Bytes::from(vec![9; 1000]);
    other.nar_hash = muster::nix::hash::NarHash::of(&other_nar);
    a.add(&other, &other_nar);
    for _ in 0..5 {
        assert_eq!(kept(served.address, &info).await, target);
        sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(unzstd(&get(served.address, &target).await.body), nar);
}
