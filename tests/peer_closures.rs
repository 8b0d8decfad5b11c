//! Whole closures asked of another muster: one question for all, and what does not fit is fetched level by level.

mod support;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use muster::codec::closure_wire;
use muster::codec::compression::Encoding;
use muster::nix::narinfo::{Compression, NarInfo};
use muster::nix::path_info::{PathInfo, Trust};
use muster::nix::store_path::StoreDir;
use muster::substituter::{Options, Substituter, ahead};
use muster::upstream::Upstream;
use muster::upstream::binary_cache::BinaryCacheOptions;
use muster::upstream::peer_closures::{BYTES_MAX, PeerClosureOptions};
use support::peer::{member, met_with, setup_of};
use support::{Scripted, get, options, path, request, serve, setup};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep};

type Path = (PathInfo, Bytes);

/// A tree of paths, the top first: each refers to the next ones below it, and the last to itself.
fn tree(count: u32) -> Vec<Path> {
    let mut paths: Vec<Path> = Vec::new();
    for number in 0..count {
        let below: Vec<_> = paths.iter().rev().take(3).map(|(info, _)| info).collect();
        let mut made = path(number, 700, &below);
        if number == 0 {
            made.0.references.push(made.0.path.clone());
        }
        paths.push(made);
    }
    paths.reverse();
    paths
}

/// A substituter over one muster at this address.
async fn over(address: SocketAddr, trust: Trust, options: Options) -> Substituter {
    let bounds = BinaryCacheOptions {
        closures: PeerClosureOptions {
            bytes_max: 1 << 20,
            paths_max: 300,
        },
        ..BinaryCacheOptions::default()
    };
    let mut member = member(0, met_with(address, bounds).await.0);
    member.trust = trust;
    support::new_substituter(options, setup_of([member]))
}

/// Asks for the top and waits until so many path infos were fetched ahead.
async fn walk(substituter: &Substituter, paths: &[Path]) {
    assert!(substituter.narinfo(paths[0].0.path.hash()).await.is_some());
    let ahead = &substituter.counters().narinfo_prefetched;
    for _ in 0..1000 {
        if ahead.value() == paths.len() as u64 - 1 {
            return;
        }
        sleep(Duration::from_millis(10)).await;
    }
    panic!("{} of {} path infos", ahead.value(), paths.len() - 1);
}

/// A line to a server: each way it takes a while, and what is asked over it is written down.
struct Line {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
    connections: Arc<AtomicUsize>,
}

impl Line {
    async fn to(server: SocketAddr, delay: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let line = Self {
            address: listener.local_addr().unwrap(),
            asked: Arc::default(),
            connections: Arc::default(),
        };
        let (asked, connections) = (Arc::clone(&line.asked), Arc::clone(&line.connections));
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                connections.fetch_add(1, Ordering::Relaxed);
                let server = TcpStream::connect(server).await.unwrap();
                let (up, down) = (client.into_split(), server.into_split());
                tokio::spawn(carry(up.0, down.1, delay, Some(Arc::clone(&asked))));
                tokio::spawn(carry(down.0, up.1, delay, None));
            }
        });
        line
    }

    fn asked(&self, word: &str) -> usize {
        let asked = self.asked.lock().unwrap();
        asked.iter().filter(|line| line.contains(word)).count()
    }
}

async fn carry(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    delay: Duration,
    asked: Option<Arc<Mutex<Vec<String>>>>,
) {
    let (send, mut arrive) = tokio::sync::mpsc::channel::<(Instant, Vec<u8>)>(10_000);
    let write = async {
        while let Some((at, bytes)) = arrive.recv().await {
            tokio::time::sleep_until(at).await;
            if to.write_all(&bytes).await.is_err() {
                return;
            }
        }
    };
    let read = async move {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(1..) = from
            .read(&mut buffer)
            .await
            .inspect(|read| buffer.truncate(*read))
        {
            if let Some(asked) = &asked {
                let text = String::from_utf8_lossy(&buffer);
                let lines = text.lines().filter(|line| line.starts_with("GET "));
                asked.lock().unwrap().extend(lines.map(str::to_owned));
            }
            let at = Instant::now() + delay;
            if send.send((at, buffer)).await.is_err() {
                return;
            }
            buffer = vec![0; 64 << 10];
        }
    };
    tokio::join!(write, read);
}

/// A muster whose own store has these paths, and what it counts.
async fn peer(paths: &[Path]) -> (support::Served, Arc<Scripted>, Substituter) {
    let store = Scripted::new("own");
    paths.iter().for_each(|(info, nar)| store.add(info, nar));
    let substituter = support::new_substituter(options(), setup_of([]));
    let own = member(0, Arc::clone(&store) as Arc<dyn Upstream>);
    substituter.replace(setup_of([own.of_own_store(true)]));
    (serve(substituter.clone()).await, store, substituter)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closure_of_200_takes_one_question_over_one_connection() {
    let paths = tree(200);
    let (served, store, theirs) = peer(&paths).await;
    let line = Line::to(served.address, Duration::from_millis(20)).await;
    let substituter = over(line.address, Trust::Operator, options()).await;
    let begun = Instant::now();
    walk(&substituter, &paths).await;
    let took = begun.elapsed();
    // Found, then told: two round trips, and what the test's own build takes to sign.
    assert!(took < Duration::from_secs(2), "{took:?}");
    for (info, _) in &paths {
        let text = substituter.narinfo(info.path.hash()).await.unwrap();
        let text = std::str::from_utf8(&text).unwrap();
        let told = NarInfo::parse(text, &StoreDir::default()).unwrap().info;
        assert_eq!(
            (&told.path, &told.references),
            (&info.path, &info.references)
        );
        assert_eq!(
            (told.nar_hash, told.nar_size),
            (info.nar_hash, info.nar_size)
        );
    }
    assert_eq!(theirs.counters().narinfo_requests.value(), 1);
    // Once for the narinfo, and then level by level for one closure.
    assert_eq!(store.questions.load(Ordering::Relaxed), 1);
    // The first learned of the offer, all else went over the second, and the third waits for NARs.
    assert_eq!(line.connections.load(Ordering::Relaxed), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn small_nars_of_it_are_pulled_ahead_several_at_once() {
    let paths = tree(60);
    let (served, store, theirs) = peer(&paths).await;
    let line = Line::to(served.address, Duration::from_millis(20)).await;
    let pulling = Options {
        ahead: Some(ahead::Options::default()),
        ..options()
    };
    let substituter = over(line.address, Trust::Operator, pulling).await;
    let client = serve(substituter.clone()).await;
    walk(&substituter, &paths).await;
    let begun = Instant::now();
    let mut targets = Vec::new();
    for (info, nar) in paths.iter().rev() {
        let found = get(client.address, &format!("/{}.narinfo", info.path.hash())).await;
        targets.push((support::nar_target(&found), nar));
    }
    for (target, nar) in targets {
        assert!(get(client.address, &target).await.body == *nar);
    }
    let took = begun.elapsed();
    // One after the other they would take 60 round trips: 2.4 s.
    assert!(took < Duration::from_millis(1500), "{took:?}");
    let counters = substituter.counters();
    assert!(
        counters.nar_ahead_claimed.value() >= 50,
        "{}",
        counters.nar_ahead_claimed.value()
    );
    // No narinfo was asked for again to learn where a NAR is.
    assert_eq!(theirs.counters().narinfo_requests.value(), 1);
    assert_eq!(store.nars.load(Ordering::Relaxed), 60);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_muster_tells_closures_of_its_own_store_and_to_musters_alone() {
    const OWN_STORE: &str = "Muster-Scope: own-store\r\n";
    let paths = tree(20);
    let (served, store, _) = peer(&paths).await;
    let target = |path: &Path| format!("/muster/closure/{}", path.0.path.hash());
    let told = async |path: &Path| {
        let answer = request(served.address, "GET", &target(path), OWN_STORE).await;
        let texts = closure_wire::read(answer.body.clone().into(), 100);
        (answer.status, texts.map(|texts| texts.len()))
    };
    assert_eq!(told(&paths[0]).await, (200, Ok(20)));
    assert_eq!(told(&paths[19]).await, (200, Ok(1)));
    assert_eq!(get(served.address, &target(&paths[0])).await.status, 404);
    let (absent, nar) = path(500, 10, &[]);
    assert_eq!(told(&(absent, nar)).await.0, 404);
    // A store that lost a path tells no whole closure.
    store.remove(&paths[12].0);
    let (status, texts) = told(&paths[0]).await;
    assert_eq!(status, 200);
    assert_eq!(texts, Err(closure_wire::ClosureError::Cut));
}

/// Paths in a row, then what each of them refers to: with names as long as they can be, 930 KB of narinfo each.
fn wide_row(count: usize) -> Vec<Path> {
    let leaf = |number| {
        let (mut info, nar) = path(number, 10, &[]);
        let name = format!("{}-{number:0211}", info.path.hash());
        info.path = name.parse().unwrap();
        (info, nar)
    };
    let mut paths: Vec<Path> = (0..3_800).map(leaf).collect();
    let leaves: Vec<_> = paths.iter().map(|(info, _)| info.path.clone()).collect();
    for number in 10_000..10_000 + count {
        let below = paths.last().map(|(info, _)| info.path.clone());
        let mut made = path(u32::try_from(number).unwrap(), 10, &[]);
        made.0.references = leaves.iter().cloned().chain(below).collect();
        made.0.normalize();
        paths.push(made);
    }
    paths.reverse();
    paths
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_of_a_closure_is_told_than_is_read() {
    let paths = wide_row(38);
    let (served, store, _) = peer(&paths).await;
    let scope = "Muster-Scope: own-store\r\n";
    let told = async |(info, _): &Path| {
        let target = format!("/muster/closure/{}", info.path.hash());
        let before = store.batches.load(Ordering::Relaxed);
        let answer = request(served.address, "GET", &target, scope).await;
        assert_eq!(answer.status, 200);
        let asked = store.batches.load(Ordering::Relaxed) - before;
        let body = Bytes::from(answer.body);
        let texts = closure_wire::read(body.clone(), 10_000);
        (body.len(), texts.map(|texts| texts.len()), asked)
    };
    // Each path of the row is asked for behind the one before: 50 times for all.
    let (bytes, texts, asked) = told(&paths[0]).await;
    assert_eq!(texts, Err(closure_wire::ClosureError::Cut));
    assert!((30 << 20..=BYTES_MAX).contains(&bytes), "{bytes}");
    assert!(asked < 50, "{asked}");
    let (bytes, texts, _) = told(&paths[10]).await;
    assert_eq!(texts, Ok(28 + 3_800));
    assert!((25 << 20..BYTES_MAX).contains(&bytes), "{bytes}");
}

/// What a muster that is none answers when it is asked for a closure.
#[derive(Clone)]
enum Fault {
    /// These bytes, and then the end of the connection.
    Bytes(Vec<u8>),
    /// The second, for ever, behind the first.
    Endless(Vec<u8>, Vec<u8>),
    /// Nothing.
    Silence,
    Status(&'static str),
}

fn text(info: &PathInfo) -> Bytes {
    let narinfo = NarInfo {
        info: info.clone(),
        url: format!("nar/{}.nar", info.path.hash()),
        compression: Compression::None,
        file_hash: None,
        file_size: None,
    };
    Bytes::from(narinfo.render(&StoreDir::default()))
}

fn frames(texts: &[Bytes]) -> Vec<u8> {
    closure_wire::frames(texts).unwrap().to_vec()
}

fn closure(texts: &[Bytes]) -> Vec<u8> {
    [
        &closure_wire::begin()[..],
        &frames(texts),
        &closure_wire::end(),
    ]
    .concat()
}

/// A server that says it is a muster, has these paths, and tells closures wrongly.
async fn faulty(paths: &[Path], offers: &'static str, fault: Fault) -> Line {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let paths: Arc<Vec<_>> = Arc::new(paths.to_vec());
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(answer(stream, Arc::clone(&paths), offers, fault.clone()));
        }
    });
    Line::to(address, Duration::ZERO).await
}

async fn answer(mut stream: TcpStream, paths: Arc<Vec<Path>>, offers: &str, fault: Fault) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        match stream.read(&mut byte).await {
            Ok(1..) => head.extend(byte),
            _ => return,
        }
    }
    let head = String::from_utf8(head).unwrap();
    let target = head.split(' ').nth(1).unwrap();
    let say = |status: &str, body: &[u8]| {
        let head = format!(
            "HTTP/1.1 {status}\r\nServer: muster/9\r\nMuster-Offers: {offers}\r\nConnection: close\r\n"
        );
        [head.as_bytes(), b"\r\n", body].concat()
    };
    let known = |(info, _): &&Path| target == format!("/{}.narinfo", info.path.hash());
    let said = if target == "/nix-cache-info" {
        say("200 OK", b"StoreDir: /nix/store\n")
    } else if let Some((info, _)) = paths.iter().find(known) {
        say("200 OK", &text(info))
    } else if target.starts_with("/muster/closure/") {
        match fault {
            Fault::Bytes(bytes) => say("200 OK", &bytes),
            Fault::Status(status) => say(status, b""),
            Fault::Silence => return sleep(Duration::from_secs(60)).await,
            Fault::Endless(first, more) => {
                let mut said = say("200 OK", &first);
                while stream.write_all(&said).await.is_ok() {
                    said.clone_from(&more);
                }
                return;
            }
        }
    } else {
        say("404 Not Found", b"")
    };
    drop(stream.write_all(&said).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_right_closure_is_fetched_level_by_level() {
    let paths = tree(12);
    let texts: Vec<_> = paths.iter().map(|(info, _)| text(info)).collect();
    let stranger = text(&path(900, 10, &[]).0);
    let with = |more: &Bytes| closure(&[&texts[..], std::slice::from_ref(more)].concat());
    let whole = closure(&texts);
    let faults = [
        (
            "cut in a narinfo",
            Fault::Bytes(whole[..whole.len() - 50].to_vec()),
        ),
        (
            "cut before its end",
            Fault::Bytes(whole[..whole.len() - 4].to_vec()),
        ),
        ("nothing", Fault::Bytes(Vec::new())),
        ("garbage", Fault::Bytes(b"<html>no</html>".to_vec())),
        (
            "a garbled narinfo",
            Fault::Bytes(with(&Bytes::from_static(b"no"))),
        ),
        (
            "a path that does not belong to it",
            Fault::Bytes(with(&stranger)),
        ),
        ("a path twice", Fault::Bytes(with(&texts[3]))),
        ("a path left out", Fault::Bytes(closure(&texts[..11]))),
        ("another top", Fault::Bytes(closure(&texts[1..]))),
        ("an address that must not be followed", {
            let mut texts = texts.clone();
            let text = String::from_utf8(texts[5].to_vec()).unwrap();
            texts[5] = Bytes::from(text.replace("URL: nar/", "URL: http://elsewhere/"));
            Fault::Bytes(closure(&texts))
        }),
        (
            "endless",
            Fault::Endless(whole[..whole.len() - 4].to_vec(), frames(&texts[..1])),
        ),
        (
            "endless in a narinfo",
            Fault::Endless(whole.clone(), vec![b'x'; 1000]),
        ),
        ("silence", Fault::Silence),
        ("not there", Fault::Status("404 Not Found")),
        ("a failure", Fault::Status("500 Internal Server Error")),
    ];
    let each = faults.into_iter().map(|(name, fault)| {
        let paths = paths.clone();
        async move {
            let line = faulty(&paths, "own-store, closure", fault).await;
            let substituter = over(line.address, Trust::Operator, options()).await;
            walk(&substituter, &paths).await;
            assert!(line.asked("/muster/closure/") >= 1, "{name}");
            assert_eq!(line.asked(".narinfo"), paths.len(), "{name}");
            let (stranger, _) = path(900, 10, &[]);
            assert!(
                substituter.narinfo(stranger.path.hash()).await.is_none(),
                "{name}"
            );
        }
    });
    futures_util::future::join_all(each).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_right_closure_of_the_same_server_is_taken() {
    let paths = tree(12);
    let texts: Vec<_> = paths.iter().map(|(info, _)| text(info)).collect();
    let right = Fault::Bytes(closure(&texts));
    let line = faulty(&paths, "own-store, closure", right).await;
    let substituter = over(line.address, Trust::Operator, options()).await;
    walk(&substituter, &paths).await;
    assert_eq!(
        (line.asked("/muster/closure/"), line.asked(".narinfo")),
        (1, 1)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_muster_that_does_not_offer_it_is_not_asked() {
    let paths = tree(12);
    for offers in ["own-store", "closure", "x"] {
        let fault = Fault::Status("500 Internal Server Error");
        let line = faulty(&paths, offers, fault).await;
        let substituter = over(line.address, Trust::Operator, options()).await;
        walk(&substituter, &paths).await;
        assert_eq!(line.asked("/muster/closure/"), 0, "{offers}");
    }
}

/// A closure is no way around the keys that the operator listed.
#[tokio::test(flavor = "multi_thread")]
async fn each_narinfo_of_a_closure_is_checked_as_any_other() {
    let paths = tree(12);
    let trust = Trust::Keys(vec![support::key().public()]);
    let publisher = setup(&[], &Trust::Operator, Encoding::None).publisher;
    let mut texts: Vec<_> = paths.iter().map(|(info, _)| text(info)).collect();
    let signed = |info: &PathInfo| {
        let verified = info.clone().verify(&Trust::Operator, &StoreDir::default());
        publisher.publish(&verified.unwrap())
    };
    texts[0] = signed(&paths[0].0);
    texts[7] = signed(&paths[7].0);
    let right = Fault::Bytes(closure(&texts));
    let mut had = paths.clone();
    had[0].0 = NarInfo::parse(
        std::str::from_utf8(&texts[0]).unwrap(),
        &StoreDir::default(),
    )
    .unwrap()
    .info;
    let line = faulty(&had, "own-store, closure", right).await;
    let substituter = over(line.address, trust, options()).await;
    assert!(substituter.narinfo(paths[0].0.path.hash()).await.is_some());
    sleep(Duration::from_secs(1)).await;
    assert_eq!(line.asked("/muster/closure/"), 1);
    assert_eq!(substituter.counters().narinfo_prefetched.value(), 1);
    assert!(substituter.narinfo(paths[7].0.path.hash()).await.is_some());
    assert!(substituter.narinfo(paths[8].0.path.hash()).await.is_none());
}
