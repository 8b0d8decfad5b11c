//! Requests over a real socket against scripted upstreams.

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use muster::codec::compression::Encoding;
use muster::nix::fingerprint;
use muster::nix::narinfo::NarInfo;
use muster::nix::path_info::Trust;
use muster::nix::store_path::StoreDir;
use muster::substituter::Substituter;
use support::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

fn narinfo_target(info: &muster::nix::path_info::PathInfo) -> String {
    format!("/{}.narinfo", info.path.hash())
}

/// A server over one upstream, and where it gives a NAR that is checked whole first and one that is not.
async fn small_and_large() -> (Arc<Scripted>, Served, [String; 2]) {
    let a = Scripted::new("a");
    let paths = [path(1, 1000, &[]), path(2, LARGE_BYTES, &[])];
    paths.iter().for_each(|(info, nar)| a.add(info, nar));
    let served = serve(substituter(std::slice::from_ref(&a))).await;
    let [(small, _), (large, _)] = &paths;
    let small = nar_target(&get(served.address, &narinfo_target(small)).await);
    let large = nar_target(&get(served.address, &narinfo_target(large)).await);
    (a, served, [small, large])
}

const LARGE_BYTES: usize = 5 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn a_path_of_any_builder_is_found_signed_and_given_whole() {
    let (a, b) = (Scripted::new("a"), Scripted::new("b"));
    let (info, nar) = path(1, 1000, &[]);
    b.add(&info, &nar);
    let substituter = substituter(&[a, b]);
    let served = serve(substituter.clone()).await;

    let answer = get(served.address, &narinfo_target(&info)).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("content-type"), Some("text/x-nix-narinfo"));
    let store_dir = StoreDir::default();
    let narinfo = NarInfo::parse(answer.text(), &store_dir).unwrap();
    let signed = fingerprint::of_path(&narinfo.info, &store_dir);
    assert!(
        key()
            .public()
            .verifies(&signed, &narinfo.info.signatures[0])
    );

    let answer = get(served.address, &nar_target(&answer)).await;
    assert_eq!((answer.status, answer.cut), (200, false));
    assert_eq!(answer.body, nar);
    assert_eq!(answer.header("accept-ranges"), Some("bytes"));
    assert_eq!(answer.header("content-length"), Some("1000"));
    // The look-up for the NAR is no narinfo that a client had.
    assert_eq!(substituter.counters().narinfo_requests.value(), 1);
    assert_eq!(substituter.counters().narinfo_memory_hits.value(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rest_of_the_surface() {
    let a = Scripted::new("a");
    let (info, nar) = path(1, 1000, &[]);
    a.add(&info, &nar);
    let served = serve(substituter(&[a])).await;
    let status =
        async |method: &str, target: &str| request(served.address, method, target, "").await.status;

    assert_eq!(status("GET", "/nix-cache-info").await, 200);
    assert_eq!(status("HEAD", &narinfo_target(&info)).await, 200);
    assert_eq!(status("GET", "/public-key").await, 200);
    assert_eq!(status("GET", "/healthz").await, 200);
    assert_eq!(status("PUT", "/nix-cache-info").await, 405);
    assert_eq!(status("POST", "/").await, 405);
    for target in [
        "/x",
        "/x.narinfo",
        "/nar/x.nar",
        "/../etc/passwd",
        "/log/x",
        "/%ff",
    ] {
        assert_eq!(status("GET", target).await, 404, "{target}");
    }
    let nobody = format!("/{}.narinfo", "0".repeat(32));
    assert_eq!(status("GET", &nobody).await, 404);
    assert_eq!(status("HEAD", &nobody).await, 404);

    let target = nar_target(&get(served.address, &narinfo_target(&info)).await);
    let head = request(served.address, "HEAD", &target, "").await;
    assert_eq!(head.header("content-length"), Some("1000"));
    let compressed = request(served.address, "HEAD", &format!("{target}.zst"), "").await;
    assert_eq!(
        (compressed.status, compressed.header("content-length")),
        (200, None)
    );
    assert_eq!(compressed.header("accept-ranges"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn ranges_of_small_and_large_nars() {
    let a = Scripted::new("a");
    let paths = [path(1, 1000, &[]), path(2, 5 << 20, &[])];
    for (info, nar) in &paths {
        a.add(info, nar);
    }
    let served = serve(substituter(&[a])).await;
    for (info, nar) in &paths {
        let target = nar_target(&get(served.address, &narinfo_target(info)).await);
        let size = nar.len();
        for (range, part) in [
            ("bytes=500-".to_owned(), 500..size),
            ("bytes=0-".to_owned(), 0..size),
            ("bytes=10-19".to_owned(), 10..20),
            (format!("bytes={}-", size - 1), size - 1..size),
            ("bytes=-5".to_owned(), size - 5..size),
        ] {
            let header = format!("Range: {range}\r\n");
            let answer = request(served.address, "GET", &target, &header).await;
            assert_eq!((answer.status, answer.cut), (206, false), "{range}");
            assert!(answer.body == nar[part.clone()], "{range} of {size}");
            let expected = format!("bytes {}-{}/{size}", part.start, part.end - 1);
            assert_eq!(answer.header("content-range"), Some(&*expected));
        }
        let header = format!("Range: bytes={size}-\r\n");
        let answer = request(served.address, "GET", &target, &header).await;
        assert_eq!(answer.status, 416);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn compressed_nars_decode_to_the_nar_and_have_no_ranges() {
    let a = Scripted::new("a");
    let paths = [path(1, 1000, &[]), path(2, 5 << 20, &[])];
    for (info, nar) in &paths {
        a.add(info, nar);
    }
    let setup = setup(&[a], &Trust::Operator, Encoding::Zstd);
    let served = serve(support::new_substituter(options(), setup)).await;
    for (info, nar) in &paths {
        let narinfo = get(served.address, &narinfo_target(info)).await;
        assert!(narinfo.text().contains("Compression: zstd\n"));
        assert!(!narinfo.text().contains("FileHash"));
        let answer = get(served.address, &nar_target(&narinfo)).await;
        assert_eq!((answer.status, answer.cut), (200, false));
        assert_eq!(answer.header("accept-ranges"), None);
        assert!(zstd::decode_all(&answer.body[..]).unwrap() == *nar);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_last_byte_is_never_given_out() {
    let (a, served, [small, large]) = small_and_large().await;
    *a.nar_script.lock().unwrap() = NarScript::FlipLast;
    assert_eq!(get(served.address, &small).await.status, 404);
    for target in [large.clone(), format!("{large}.zst")] {
        let answer = get(served.address, &target).await;
        assert!(answer.cut || answer.status == 404, "{target}");
        assert!(answer.body.len() < LARGE_BYTES);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transfer_outlives_its_builder() {
    for script in [
        NarScript::BreakAt(1_000_000),
        NarScript::BreakAt(0),
        NarScript::StallAt(3_000_000),
        NarScript::StallAt(0),
        NarScript::Gone,
    ] {
        for suffix in ["", ".zst"] {
            let (a, b) = (Scripted::new("a"), Scripted::new("b"));
            let (info, nar) = path(1, 5 << 20, &[]);
            a.add(&info, &nar);
            b.add(&info, &nar);
            *b.delay.lock().unwrap() = Duration::from_millis(20);
            *a.nar_script.lock().unwrap() = script.clone();
            let served = serve(substituter(&[Arc::clone(&a), Arc::clone(&b)])).await;
            let target = nar_target(&get(served.address, &narinfo_target(&info)).await);
            let answer = get(served.address, &format!("{target}{suffix}")).await;
            assert_eq!((answer.status, answer.cut), (200, false), "{script:?}");
            assert_eq!(a.nars.load(Ordering::Relaxed), 1, "the other comes first");
            let body = match suffix {
                "" => answer.body,
                _ => zstd::decode_all(&answer.body[..]).unwrap(),
            };
            assert!(body == nar[..], "{script:?}");
            assert_eq!(b.nars.load(Ordering::Relaxed), 1);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_last_holder_that_broke_once_is_asked_once_more() {
    for (size, at) in [
        (1000, 0),
        (1000, 500),
        (LARGE_BYTES, 0),
        (LARGE_BYTES, 3_000_000),
    ] {
        for script in [
            NarScript::BreakOnceAt(at),
            NarScript::StallOnceAt(at),
            NarScript::BreakAt(at),
            NarScript::StallAt(at),
        ] {
            for suffix in ["", ".zst"] {
                let what = format!("{script:?} of {size}, {suffix:?}");
                let a = Scripted::new("a");
                let (info, nar) = path(1, size, &[]);
                a.add(&info, &nar);
                *a.nar_script.lock().unwrap() = script.clone();
                let served = serve(substituter(&[Arc::clone(&a)])).await;
                let target = nar_target(&get(served.address, &narinfo_target(&info)).await);
                let answer = get(served.address, &format!("{target}{suffix}")).await;
                assert_eq!(a.nars.load(Ordering::Relaxed), 2, "{what}");
                if matches!(script, NarScript::BreakAt(_) | NarScript::StallAt(_)) {
                    // For good; once more is all.
                    assert!(answer.cut || answer.status == 404, "{what}");
                    continue;
                }
                assert_eq!((answer.status, answer.cut), (200, false), "{what}");
                let body = match suffix {
                    "" => answer.body,
                    _ => zstd::decode_all(&answer.body[..]).unwrap(),
                };
                assert!(body == nar[..], "{what}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn neither_a_holder_that_is_slow_to_begin_nor_one_that_does_not_tell_holds_a_nar_up() {
    for size in [1000, 5 << 20] {
        let (a, b, c) = (Scripted::new("a"), Scripted::new("b"), Scripted::new("c"));
        let (info, nar) = path(1, size, &[]);
        a.add(&info, &nar);
        *b.silent.lock().unwrap() = true;
        let upstreams = [Arc::clone(&a), b, Arc::clone(&c)];
        let served = serve(substituter(&upstreams)).await;
        let target = nar_target(&get(served.address, &narinfo_target(&info)).await);
        c.add(&info, &nar);
        *a.delay.lock().unwrap() = Duration::from_secs(60);
        let asked = Instant::now();
        assert_eq!(get(served.address, &target).await.body, nar);
        assert!(asked.elapsed() < Duration::from_secs(3));
        // And one that was passed over is waited for when nobody else is left.
        c.remove(&info);
        *a.delay.lock().unwrap() = Duration::from_secs(1);
        assert_eq!(get(served.address, &target).await.body, nar);
    }
}

/// As sshd does while there are many logins at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_last_holder_that_lets_nobody_in_for_a_moment_is_waited_for() {
    let [a, b] = ["a", "b"].map(Scripted::new);
    let paths = [path(1, 3000, &[]), path(2, 5 << 20, &[])];
    paths.iter().for_each(|(info, nar)| a.add(info, nar));
    let both = [Arc::clone(&a), Arc::clone(&b)];
    let served = serve(substituter(&both)).await;
    for (info, nar) in &paths {
        let target = nar_target(&get(served.address, &narinfo_target(info)).await);
        a.refusals.store(3, Ordering::Relaxed);
        let got = get(served.address, &target).await;
        assert!(got.status == 200 && got.body == *nar);
    }
    // Another holder is taken at once.
    let (info, nar) = path(3, 3000, &[]);
    a.add(&info, &nar);
    b.add(&info, &nar);
    let target = nar_target(&get(served.address, &narinfo_target(&info)).await);
    a.refusals.store(usize::MAX, Ordering::Relaxed);
    let begun = std::time::Instant::now();
    assert!(get(served.address, &target).await.body == nar);
    let took = begun.elapsed();
    assert!(took < Duration::from_millis(150), "{took:?}");
    // One that lets nobody in for good is given up.
    let (info, nar) = path(4, 3000, &[]);
    a.add(&info, &nar);
    let target = nar_target(&get(served.address, &narinfo_target(&info)).await);
    let begun = std::time::Instant::now();
    assert_eq!(get(served.address, &target).await.status, 404);
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(8), "{took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_holder_that_gives_all_and_does_not_end_has_given_all() {
    let a = Scripted::new("a");
    let (info, nar) = path(1, 5 << 20, &[]);
    a.add(&info, &nar);
    let served = serve(substituter(std::slice::from_ref(&a))).await;
    let target = nar_target(&get(served.address, &narinfo_target(&info)).await);
    *a.nar_script.lock().unwrap() = NarScript::StallAt(nar.len());
    let answer = timeout(Duration::from_secs(5), get(served.address, &target)).await;
    assert_eq!(answer.unwrap().body, nar);
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_are_counted_against_those_who_gave_them() {
    for size in [200_000, 5 << 20] {
        let (a, b) = (Scripted::new("a"), Scripted::new("b"));
        let (info, nar) = path(1, size, &[]);
        a.add(&info, &nar);
        b.add(&info, &nar);
        *b.delay.lock().unwrap() = Duration::from_millis(20);
        *a.nar_script.lock().unwrap() = NarScript::FlipFirstBreakAt(100_000);
        let substituter = substituter(&[a, b]);
        let served = serve(substituter.clone()).await;
        let target = nar_target(&get(served.address, &narinfo_target(&info)).await);
        tokio::time::sleep(Duration::from_millis(100)).await;
        let first = get(served.address, &target).await;
        // The first bytes of a large one are the client's already.
        assert_eq!(first.cut, size > 1 << 20);
        assert_eq!(get(served.address, &target).await.body, nar);
        let setup = substituter.setup();
        let refused = |place: usize| setup.members[place].refused.load(Ordering::Relaxed);
        assert_eq!((refused(0), refused(1)), (1, 0), "{size}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_another_holder_a_small_nar_is_404_and_a_large_one_is_cut() {
    let (a, served, [small, large]) = small_and_large().await;
    for script in [NarScript::BreakAt(500), NarScript::StallAt(500)] {
        *a.nar_script.lock().unwrap() = script;
        assert_eq!(get(served.address, &small).await.status, 404);
        let answer = get(served.address, &large).await;
        assert!(answer.cut);
    }
    *a.nar_script.lock().unwrap() = NarScript::Gone;
    assert_eq!(get(served.address, &large).await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_build_of_the_path_is_no_source_for_a_remembered_url() {
    let (a, b) = (Scripted::new("a"), Scripted::new("b"));
    let (info, nar) = path(1, 1000, &[]);
    let mut other = info.clone();
    let other_nar = bytes::Bytes::from(vec![1; 1000]);
    other.nar_hash = muster::nix::hash::NarHash::of(&other_nar);
    a.add(&info, &nar);
    b.add(&other, &other_nar);
    *b.delay.lock().unwrap() = Duration::from_millis(20);
    // What is kept would be given without a.
    let upstreams = [Arc::clone(&a), Arc::clone(&b)];
    let setup = setup(&upstreams, &Trust::Operator, Encoding::None);
    let substituter = Substituter::new(options(), setup, None);
    let served = serve(substituter.clone()).await;
    let first = nar_target(&get(served.address, &narinfo_target(&info)).await);
    assert_eq!(get(served.address, &first).await.body, nar);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(substituter.divergent_paths(), 1);

    // The URL of b's build is answered by b, and a's by nobody once a has lost it.
    let second = first.replace(&info.nar_hash.to_base32(), &other.nar_hash.to_base32());
    assert_eq!(get(served.address, &second).await.body, other_nar);
    a.remove(&info);
    assert_eq!(get(served.address, &first).await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_nar_url_is_answered_by_a_new_server() {
    let a = Scripted::new("a");
    let (info, nar) = path(1, 1000, &[]);
    a.add(&info, &nar);
    let served = serve(substituter(std::slice::from_ref(&a))).await;
    let target = nar_target(&get(served.address, &narinfo_target(&info)).await);
    let harmonia = format!(
        "/nar/{}.nar?hash={}",
        info.nar_hash.to_base32(),
        info.path.hash()
    );
    let served = serve(substituter(&[a])).await;
    assert_eq!(get(served.address, &target).await.body, nar);
    assert_eq!(get(served.address, &harmonia).await.body, nar);
}

#[tokio::test(flavor = "multi_thread")]
async fn told_to_stop_it_finishes_what_runs() {
    let a = Scripted::new("a");
    let (info, nar) = path(1, 1000, &[]);
    a.add(&info, &nar);
    *a.delay.lock().unwrap() = Duration::from_millis(300);
    let served = serve(substituter(&[a])).await;
    let target = narinfo_target(&info);
    let running = get(served.address, &target);
    let stop = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        served.stop.send(true).unwrap();
        Instant::now()
    };
    let (answer, told) = tokio::join!(running, stop);
    assert_eq!(answer.status, 200);
    served.task.await.unwrap();
    assert!(told.elapsed() < Duration::from_secs(2));
    assert!(
        tokio::net::TcpStream::connect(served.address)
            .await
            .is_err()
    );
}

/// Waits for something that must come soon.
async fn soon(what: impl Fn() -> bool) {
    let waited = async {
        while !what() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(3), waited).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_frees_the_builder_at_once() {
    for (size, suffix) in [(1000, ""), (5 << 20, ""), (5 << 20, ".zst")] {
        let a = Scripted::new("a");
        let (info, nar) = path(1, size, &[]);
        a.add(&info, &nar);
        let mut options = options();
        options.transfer.stall = Duration::from_secs(60);
        options.transfer.stall_last = Duration::from_secs(60);
        let setup = setup(std::slice::from_ref(&a), &Trust::Operator, Encoding::None);
        // Where NARs are kept, one that was begun is worth finishing.
        let served = serve(Substituter::new(options, setup, None)).await;
        let target = nar_target(&get(served.address, &narinfo_target(&info)).await);
        *a.nar_script.lock().unwrap() = NarScript::StallAt(size - 1);
        let target = format!("{target}{suffix}");
        let running = get(served.address, &target);
        assert!(timeout(Duration::from_millis(300), running).await.is_err());
        assert_eq!(a.nars.load(Ordering::Relaxed), 1);
        soon(|| a.nars_open.load(Ordering::Relaxed) == 0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_takes_nothing_is_cut_and_an_idle_one_let_go() {
    let a = Scripted::new("a");
    let (info, nar) = path(1, 64 << 20, &[]);
    a.add(&info, &nar);
    let mut limits = server_options();
    limits.idle = Duration::from_millis(300);
    limits.write_stall = Duration::from_millis(300);
    let (served, _) = serve_with(substituter(std::slice::from_ref(&a)), limits).await;
    let target = nar_target(&get(served.address, &narinfo_target(&info)).await);

    let mut slow = TcpStream::connect(served.address).await.unwrap();
    let request = format!("GET {target} HTTP/1.1\r\nHost: x\r\n\r\n");
    slow.write_all(request.as_bytes()).await.unwrap();
    soon(|| a.nars_open.load(Ordering::Relaxed) == 1).await;
    soon(|| a.nars_open.load(Ordering::Relaxed) == 0).await;

    let mut idle = TcpStream::connect(served.address).await.unwrap();
    let request = b"GET /public-key HTTP/1.1\r\nHost: x\r\n\r\n";
    idle.write_all(request).await.unwrap();
    let mut answer = Vec::new();
    let read = idle.read_to_end(&mut answer);
    timeout(Duration::from_secs(3), read)
        .await
        .unwrap()
        .unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 200"));
    assert!(!String::from_utf8(answer).unwrap().contains("408"));
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_connections_wait_on_whatever_address() {
    let a = Scripted::new("a");
    let (info, nar) = path(1, 1000, &[]);
    a.add(&info, &nar);
    *a.delay.lock().unwrap() = Duration::from_millis(200);
    let mut limits = server_options();
    limits.connections_max = 1;
    let (served, second) = serve_with(substituter(&[a]), limits).await;
    let target = narinfo_target(&info);
    let asked = (0..6).map(|n| get([served.address, second][n % 2], &target));
    let answers = futures_util::future::join_all(asked);
    for answer in timeout(Duration::from_secs(5), answers).await.unwrap() {
        assert_eq!(answer.status, 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_is_refused_before_it_was_read() {
    let served = serve(substituter(&[])).await;
    let mut stream = TcpStream::connect(served.address).await.unwrap();
    let head = format!(
        "PUT /nar/x HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n",
        1_u64 << 40
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = [0; 12];
    let read = stream.read_exact(&mut answer);
    timeout(Duration::from_secs(3), read)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(&answer, b"HTTP/1.1 405");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_forms_in_which_proxies_ask() {
    let served = serve(substituter(&[])).await;
    let status = async |target: &str| get(served.address, target).await.status;
    assert_eq!(status("http://cache.example/nix-cache-info").await, 200);
    assert_eq!(status("/%6eix-cache-info").await, 200);
    assert_eq!(status("/nix-cache-info?x=1").await, 200);
    assert_eq!(status("http://cache.example/x").await, 404);
}

#[tokio::test]
async fn three_hundred_clients_share_few_places() {
    let upstream = Scripted::new("a");
    let (info, nar) = path(1, 300_000, &[]);
    upstream.add(&info, &nar);
    let served = serve(substituter(&[upstream])).await;
    let address = served.address;
    let narinfo = get(address, &format!("/{}.narinfo", info.path.hash())).await;
    let target = nar_target(&narinfo);
    // As many as there are places, kept idle, as a Nix that builds for hours does.
    let mut idle = Vec::new();
    for _ in 0..64 {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream
            .write_all(b"GET /nix-cache-info HTTP/1.1\r\nHost: x\r\n\r\n")
            .await
            .unwrap();
        let mut first = [0; 12];
        stream.read_exact(&mut first).await.unwrap();
        assert_eq!(&first, b"HTTP/1.1 200");
        idle.push(stream);
    }
    let clients = (0..300).map(|_| {
        let target = target.clone();
        tokio::spawn(async move { get(address, &target).await })
    });
    let clients: Vec<_> = clients.collect();
    let started = Instant::now();
    for client in clients {
        let answer = client.await.unwrap();
        assert_eq!((answer.status, answer.cut), (200, false));
        assert_eq!(answer.body.len(), nar.len());
    }
    assert!(started.elapsed() < Duration::from_secs(20));
}
