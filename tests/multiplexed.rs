//! HTTP/2 between musters: one connection for questions, one for small NARs, and the same answers as over HTTP/1.1.

mod support;

use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use http_body::Body as _;
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use muster::cache::backend::Backend;
use muster::cache::memory_backend::MemoryBackend;
use muster::codec::compression::Encoding;
use muster::nix::path_info::{PathInfo, Trust};
use muster::substituter::{Options, Substituter, ahead};
use support::peer::{member, met, narinfo, setup_of};
use support::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep, timeout};

type Path = (PathInfo, Bytes);

/// One connection of HTTP/2 without TLS.
async fn connect(address: SocketAddr) -> SendRequest<String> {
    let stream = TcpStream::connect(address).await.unwrap();
    let (sender, connection) = handshake(TokioExecutor::new(), TokioIo::new(stream))
        .await
        .unwrap();
    tokio::spawn(connection);
    sender
}

async fn ask(
    sender: &SendRequest<String>,
    method: Method,
    target: &str,
    range: &str,
) -> Response<Bytes> {
    let request = Request::builder()
        .method(method)
        .uri(format!("http://muster{target}"))
        .header("range", range)
        .body(String::new())
        .unwrap();
    let answer = sender.clone().send_request(request).await.unwrap();
    let (head, mut body) = answer.into_parts();
    let mut all = Vec::new();
    while let Some(frame) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
        all.extend(frame.unwrap().into_data().unwrap());
    }
    Response::from_parts(head, all.into())
}

/// What stands between two musters and counts connections.
struct Counted {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
}

impl Counted {
    async fn to(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let counted = Self {
            address: listener.local_addr().unwrap(),
            connections: Arc::default(),
        };
        let connections = Arc::clone(&counted.connections);
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                connections.fetch_add(1, Ordering::Relaxed);
                let mut server = TcpStream::connect(server).await.unwrap();
                tokio::spawn(async move { copy_bidirectional(&mut client, &mut server).await });
            }
        });
        counted
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}

/// A substituter over what answers at this address.
async fn over(address: SocketAddr, options: Options) -> (Substituter, String) {
    let (upstream, said) = met(address).await;
    let setup = setup_of([member(0, upstream)]);
    (support::new_substituter(options, setup), said)
}

/// A muster whose own store has these paths.
async fn peer(paths: &[Path]) -> Served {
    let store = Scripted::new("own");
    paths.iter().for_each(|(info, nar)| store.add(info, nar));
    let setup = setup_of([member(0, store).of_own_store(true)]);
    serve(support::new_substituter(options(), setup)).await
}

/// Four kinds of load, and no more connections than two and one for each large NAR.
#[tokio::test(flavor = "multi_thread")]
async fn questions_share_one_connection_and_small_nars_another() {
    let paths: Vec<_> = (0..100).map(|number| path(number, 3000, &[])).collect();
    let large: Vec<_> = (200..203)
        .map(|number| path(number, 5 << 20, &[]))
        .collect();
    let served = peer(&[&paths[..], &large].concat()).await;
    let line = Counted::to(served.address).await;
    let (substituter, said) = over(line.address, options()).await;
    assert!(said.ends_with("HTTP/2"), "{said}");
    // One over HTTP/1.1 learned of the offer.
    assert_eq!(line.connections(), 3);
    let clients = serve(substituter).await;
    let asked = (0..300).map(|number| async move {
        let target = narinfo(&path(number, 3000, &[]).0);
        get(clients.address, &target).await.status
    });
    let found = join_all(asked).await;
    let found = found.into_iter().filter(|status| *status == 200).count();
    assert_eq!((found, line.connections()), (103, 3));
    let fetched = paths.iter().map(|(info, nar)| async move {
        let found = get(clients.address, &narinfo(info)).await;
        get(clients.address, &nar_target(&found)).await.body == *nar
    });
    assert!(join_all(fetched).await.into_iter().all(|right| right));
    assert_eq!(line.connections(), 3);
    for (info, nar) in &large {
        let found = get(clients.address, &narinfo(info)).await;
        assert!(get(clients.address, &nar_target(&found)).await.body == *nar);
    }
    assert!((4..=6).contains(&line.connections()));
}

/// As a proxy does that passes on what a muster offers, and itself speaks HTTP/1.1: refused, or swallowed.
#[tokio::test(flavor = "multi_thread")]
async fn an_offer_that_does_not_hold_costs_little() {
    for swallows in [false, true] {
        behind_a_proxy(swallows).await;
    }
}

async fn behind_a_proxy(swallows: bool) {
    let paths = [path(1, 3000, &[])];
    let served = peer(&paths).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut first = [0; 4];
                client.peek(&mut first).await.unwrap();
                if first == *b"PRI " {
                    if swallows {
                        return sleep(Duration::from_secs(60)).await;
                    }
                    let refusal = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n";
                    return client.write_all(refusal).await.unwrap();
                }
                let mut server = TcpStream::connect(served.address).await.unwrap();
                drop(copy_bidirectional(&mut client, &mut server).await);
            });
        }
    });
    let begun = Instant::now();
    let (substituter, said) = over(address, options()).await;
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(4), "{took:?}");
    assert!(said.ends_with("HTTP/1.1"), "{said}");
    let clients = serve(substituter).await;
    let (info, nar) = &paths[0];
    let found = get(clients.address, &narinfo(info)).await;
    assert!(get(clients.address, &nar_target(&found)).await.body == *nar);
}

/// Small NARs pulled ahead are all asked for at once.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_pulled_ahead_shares_the_connection() {
    let mut paths: Vec<Path> = Vec::new();
    for number in 0..150 {
        let below: Vec<_> = paths.last().map(|(info, _)| info).into_iter().collect();
        let next = path(number, 700, &below);
        paths.push(next);
    }
    let served = peer(&paths).await;
    let line = Counted::to(served.address).await;
    let pulling = Options {
        ahead: Some(ahead::Options::default()),
        ..options()
    };
    let (substituter, _) = over(line.address, pulling).await;
    let clients = serve(substituter.clone()).await;
    let mut targets = Vec::new();
    for (info, _) in paths.iter().rev() {
        targets.push(nar_target(&get(clients.address, &narinfo(info)).await));
    }
    for (target, (_, nar)) in targets.iter().rev().zip(&paths) {
        assert!(get(clients.address, target).await.body == *nar);
    }
    // Some a client may have asked for first.
    assert!(substituter.counters().nar_ahead.value() >= 50);
    assert_eq!(line.connections(), 3);
}

/// Files from the cache, whole and in parts, and what is no file.
#[tokio::test(flavor = "multi_thread")]
async fn answers_are_those_of_http_1() {
    let store = Scripted::new("a");
    let paths: Vec<_> = [100, 70_000, 5 << 20, 20 << 20]
        .into_iter()
        .enumerate()
        .map(|(number, size)| path(u32::try_from(number).unwrap(), size, &[]))
        .collect();
    paths.iter().for_each(|(info, nar)| store.add(info, nar));
    let backend: Arc<dyn Backend> = Arc::new(MemoryBackend::new(1 << 30));
    let setup = setup(&[store], &Trust::Operator, Encoding::Zstd);
    let served = serve(Substituter::new(options(), setup, Some(backend))).await;
    let sender = connect(served.address).await;
    for (info, _) in &paths {
        let target = narinfo(info);
        // Read once and kept, then found as the file that it is.
        let url = nar_target(&get(served.address, &target).await);
        get(served.address, &url).await;
        let kept = Instant::now();
        let file = loop {
            let found = get(served.address, &target).await;
            let url = nar_target(&found);
            if String::from_utf8_lossy(&found.body).contains("FileHash") {
                break url;
            }
            assert!(kept.elapsed().as_secs() < 10, "{url} is not kept");
            sleep(Duration::from_millis(10)).await;
        };
        let nobody = "/00000000000000000000000000000000.narinfo".to_owned();
        for target in [target, file.clone(), url, nobody, "/nix-cache-info".into()] {
            for range in ["", "bytes=10-59", "bytes=-5", "bytes=99999999999-"] {
                let header = format!("Range: {range}\r\n");
                for method in [Method::GET, Method::HEAD] {
                    let one = request(served.address, method.as_str(), &target, &header).await;
                    let two = ask(&sender, method.clone(), &target, range).await;
                    assert_eq!(one.status, two.status().as_u16(), "{target} {range}");
                    assert!(one.body == *two.body(), "{target} {range}");
                    for name in [
                        "content-length",
                        "content-range",
                        "accept-ranges",
                        "content-type",
                    ] {
                        let two = two.headers().get(name).map(|v| v.to_str().unwrap());
                        if method == Method::HEAD {
                            assert_ne!(two, Some("0"), "{target}: its GET has a body");
                        }
                        // An empty body needs no length.
                        let [one, two] = [one.header(name), two].map(|v| v.filter(|v| *v != "0"));
                        assert_eq!(one, two, "{target} {range} {name}");
                    }
                }
            }
        }
    }
    let upload = ask(&sender, Method::PUT, "/nar/x", "").await;
    assert_eq!(upload.status(), StatusCode::METHOD_NOT_ALLOWED);
}

/// A client that takes nothing of one stream, one that asks nothing more, and one that talks nonsense.
#[tokio::test(flavor = "multi_thread")]
async fn whoever_stops_or_is_idle_is_let_go() {
    let store = Scripted::new("a");
    let (info, nar) = path(1, 64 << 20, &[]);
    store.add(&info, &nar);
    let mut limits = server_options();
    limits.shared_idle = Duration::from_millis(400);
    limits.write_stall = Duration::from_millis(400);
    let (served, _) = serve_with(substituter(std::slice::from_ref(&store)), limits).await;
    let target = nar_target(&get(served.address, &narinfo(&info)).await);

    let sender = connect(served.address).await;
    let request = Request::builder()
        .uri(format!("http://muster{target}"))
        .body(String::new())
        .unwrap();
    let _answer = sender.clone().send_request(request).await.unwrap();
    let open = |count| {
        let store = Arc::clone(&store);
        async move {
            let begun = Instant::now();
            while store.nars_open.load(Ordering::Relaxed) != count {
                assert!(begun.elapsed().as_secs() < 5, "the builder is not let go");
                sleep(Duration::from_millis(10)).await;
            }
        }
    };
    open(1).await;
    open(0).await;

    let mut idle = connect(served.address).await;
    let answer = ask(&idle, Method::GET, "/public-key", "").await;
    assert_eq!(answer.status(), StatusCode::OK);
    let gone = async {
        while idle.ready().await.is_ok() {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(Duration::from_secs(5), gone).await.unwrap();

    for nonsense in [
        "PRI nonsense\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nnonsense that is no frame",
    ] {
        let mut stream = TcpStream::connect(served.address).await.unwrap();
        stream.write_all(nonsense.as_bytes()).await.unwrap();
        let mut rest = Vec::new();
        let end = timeout(Duration::from_secs(5), stream.read_to_end(&mut rest)).await;
        drop(end.expect("the connection ends"));
    }
    assert_eq!(get(served.address, "/public-key").await.status, 200);
}

/// HTTP/2 by hand: what no library does.
struct Raw(TcpStream);

impl Raw {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

    /// Begins, and says how much of a stream it has room for.
    async fn begin(address: SocketAddr, window: u32) -> Self {
        let mut raw = Self(TcpStream::connect(address).await.unwrap());
        raw.0.write_all(Self::PREFACE).await.unwrap();
        // SETTINGS_INITIAL_WINDOW_SIZE
        let setting = [&[0, 4][..], &window.to_be_bytes()].concat();
        raw.frame(4, 0, 0, &setting).await;
        raw
    }

    async fn frame(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let head = [&length[1..], &[kind, flags], &stream.to_be_bytes()].concat();
        self.0.write_all(&[&head, payload].concat()).await.unwrap();
    }

    /// Asks for a path of less than 127 bytes, with nothing compressed.
    async fn get(&mut self, stream: u32, target: &str) {
        let mut block = vec![0x82, 0x86, 0x04, u8::try_from(target.len()).unwrap()];
        block.extend(target.as_bytes());
        block.extend([0x01, 1, b'x']);
        // END_STREAM and END_HEADERS
        self.frame(1, 0x5, stream, &block).await;
    }

    /// Reads to the end of the connection, and answers nothing.
    async fn end(mut self) -> Vec<u8> {
        let mut all = Vec::new();
        let end = timeout(Duration::from_secs(8), self.0.read_to_end(&mut all)).await;
        drop(end.expect("the connection ends"));
        all
    }
}

/// None of them may hold a place, or bytes that wait for it.
#[tokio::test(flavor = "multi_thread")]
async fn clients_that_keep_to_no_rule_are_cut() {
    let store = Scripted::new("a");
    let (info, nar) = path(1, 100_000, &[]);
    store.add(&info, &nar);
    let mut limits = server_options();
    limits.idle = Duration::from_millis(500);
    limits.shared_idle = Duration::from_millis(500);
    limits.write_stall = Duration::from_millis(500);
    limits.connections_max = 4;
    let (served, _) = serve_with(substituter(&[store]), limits).await;
    let found = get(served.address, &narinfo(&info)).await;

    // Half of what HTTP/2 begins with.
    let mut half = Raw(TcpStream::connect(served.address).await.unwrap());
    half.0.write_all(&Raw::PREFACE[..10]).await.unwrap();
    // No answer to the question whether it has heard of the end.
    let mut deaf = Raw::begin(served.address, 1 << 20).await;
    deaf.get(1, "/public-key").await;
    // Room for one byte of each answer.
    let mut narrow = Raw::begin(served.address, 1).await;
    for (place, target) in [nar_target(&found), narinfo(&info), "/healthz".into()]
        .iter()
        .enumerate()
    {
        narrow
            .get(1 + 2 * u32::try_from(place).unwrap(), target)
            .await;
    }
    let (half, deaf, narrow) = tokio::join!(half.end(), deaf.end(), narrow.end());
    assert!(half.len() < 1000, "{}", half.len());
    assert!(
        deaf.windows(5).any(|part| part == b"test-"),
        "no public key"
    );
    assert!(narrow.len() < 2000, "{}", narrow.len());
    // All places are free.
    let asked = (0..8).map(|_| get(served.address, "/public-key"));
    let answers = timeout(Duration::from_secs(5), join_all(asked))
        .await
        .unwrap();
    assert!(answers.iter().all(|answer| answer.status == 200));
}

/// What runs is finished, and then the connection ends.
#[tokio::test(flavor = "multi_thread")]
async fn told_to_stop_it_finishes_what_runs() {
    let store = Scripted::new("a");
    let (info, nar) = path(1, 1000, &[]);
    store.add(&info, &nar);
    *store.delay.lock().unwrap() = Duration::from_millis(500);
    let served = serve(substituter(&[store])).await;
    let mut sender = connect(served.address).await;
    let target = narinfo(&info);
    let (answer, ()) = tokio::join!(ask(&sender, Method::GET, &target, ""), async {
        sleep(Duration::from_millis(100)).await;
        served.stop.send_replace(true);
    });
    assert_eq!(answer.status(), StatusCode::OK);
    timeout(Duration::from_secs(3), served.task)
        .await
        .unwrap()
        .unwrap();
    assert!(sender.ready().await.is_err());
}
