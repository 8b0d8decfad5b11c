//! The live catalog: from a store that a real Nix changes, over HTTP, to who asks that store.

mod builder;
#[path = "support/mod.rs"]
mod support;

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use builder::{Builder, up};
use bytes::Bytes;
use futures_util::StreamExt as _;
use muster::codec::catalog::view::Says;
use muster::codec::compression::Encoding;
use muster::nix::store_path::{StoreDir, StorePath, StorePathHash};
use muster::server::listener::Listener;
use muster::server::{self, Info};
use muster::substituter::Substituter;
use muster::substituter::publish::Publisher;
use muster::upstream::binary_cache::{BinaryCache, BinaryCacheOptions};
use muster::upstream::catalog_feed::{FedCatalog, FeedOptions, FeedSource, FeedStream};
use muster::upstream::http_client::HttpOptions;
use muster::upstream::local::{LocalOptions, LocalUpstream};
use muster::upstream::{Error, Link, Upstream};
use rusqlite::Connection;
use support::peer;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

const NOWHERE: &str = "/nowhere/socket";

const INSERT: &str =
    "insert into ValidPaths (path, hash, registrationTime, narSize) values (?1, ?2, 1, 120)";
const NO_HASH: &str = "sha256:0000000000000000000000000000000000000000000000000000000000000000";

/// A muster on a builder: its own store alone, served on a free port.
struct Muster {
    address: SocketAddr,
    substituter: Substituter,
    stop: watch::Sender<bool>,
    task: tokio::task::JoinHandle<()>,
}

async fn muster(builder: &Builder, copies: u16) -> Muster {
    let mut members = vec![];
    for number in 0..copies {
        let local = builder.in_place(Path::new(NOWHERE), LocalOptions::default());
        up(&local).await;
        let member = peer::member(number, Arc::new(local));
        members.push(Arc::new(member.of_own_store(number == 0)));
    }
    let setup = muster::substituter::Setup {
        members,
        publisher: Publisher {
            keys: vec![support::key()],
            store_dir: builder.store_dir.clone(),
            encoding: Encoding::None,
        },
    };
    let substituter = Substituter::new(support::options(), setup, None);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = watch::channel(false);
    let text = format!("StoreDir: {}\nWantMassQuery: 1\n", builder.store_dir);
    let (_, info) = watch::channel(Info {
        cache_info: text.into(),
        public_keys: Bytes::new(),
    });
    let listeners = vec![Listener::Tcp(listener)];
    let options = support::server_options();
    let serve = server::serve(listeners, substituter.clone(), info, options, stopped);
    Muster {
        address,
        substituter,
        stop,
        task: tokio::spawn(serve),
    }
}

/// That muster as an upstream of another.
fn asking(address: SocketAddr, store_dir: &StoreDir, catalog: Option<FeedOptions>) -> BinaryCache {
    let options = BinaryCacheOptions {
        catalog,
        ..BinaryCacheOptions::default()
    };
    peer::asking(address, store_dir.clone(), options)
}

/// A line to a muster on which nothing comes back any more, from the feed alone or at all; nothing is closed.
struct Line {
    address: SocketAddr,
    feed_flows: watch::Sender<bool>,
    flows: watch::Sender<bool>,
}

impl Line {
    async fn to(muster: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let line = Self {
            address: listener.local_addr().unwrap(),
            feed_flows: watch::Sender::new(true),
            flows: watch::Sender::new(true),
        };
        let flows = [&line.feed_flows, &line.flows].map(watch::Sender::subscribe);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let muster = TcpStream::connect(muster).await.unwrap();
                tokio::spawn(carry(client, muster, flows.clone()));
            }
        });
        line
    }
}

async fn carry(client: TcpStream, muster: TcpStream, flows: [watch::Receiver<bool>; 2]) {
    let (mut client_reads, mut client_writes) = client.into_split();
    let (mut muster_reads, mut muster_writes) = muster.into_split();
    let (feeds, is_feed) = watch::channel(false);
    let asking = async move {
        let mut bytes = vec![0; 16 << 10];
        while let Ok(count @ 1..) = client_reads.read(&mut bytes).await {
            let text = String::from_utf8_lossy(&bytes[..count]);
            feeds.send_replace(text.contains("GET /muster/catalog"));
            if muster_writes.write_all(&bytes[..count]).await.is_err() {
                return;
            }
        }
    };
    let [mut feed_flows, mut flows] = flows;
    let answering = async move {
        let mut bytes = vec![0; 16 << 10];
        while let Ok(count @ 1..) = muster_reads.read(&mut bytes).await {
            if *is_feed.borrow() {
                let _ = feed_flows.wait_for(|flows| *flows).await;
            }
            let _ = flows.wait_for(|flows| *flows).await;
            if client_writes.write_all(&bytes[..count]).await.is_err() {
                return;
            }
        }
    };
    // One end closes the other.
    tokio::select! {
        () = asking => {}
        () = answering => {}
    }
}

/// A feed without a network between, which can be made to stall.
struct Direct {
    local: LocalUpstream,
    flows: watch::Sender<bool>,
}

#[async_trait]
impl FeedSource for Direct {
    async fn open(&self) -> Result<Option<FeedStream>, Error> {
        let flows = self.flows.subscribe();
        let feed = self.local.catalog().expect("the database is open");
        let feed = feed.then(move |piece| {
            let mut flows = flows.clone();
            async move {
                let _ = flows.wait_for(|flows| *flows).await;
                Ok(piece)
            }
        });
        Ok(Some(feed.boxed()))
    }
}

async fn direct(builder: &Builder, options: FeedOptions) -> (FedCatalog, Arc<Direct>) {
    let local = builder.in_place(Path::new(NOWHERE), LocalOptions::default());
    up(&local).await;
    let source = Arc::new(Direct {
        local,
        flows: watch::Sender::new(true),
    });
    let name = "direct".to_owned();
    let fed = FedCatalog::start(name, source.clone(), builder.store_dir.clone(), options);
    until(|| fed.state().1).await;
    (fed, source)
}

/// Waits at most 10 s, and returns how long it took.
async fn until(mut ready: impl FnMut() -> bool) -> Duration {
    let begun = Instant::now();
    while !ready() {
        assert!(begun.elapsed() < Duration::from_secs(10), "it never comes");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    begun.elapsed()
}

fn absent() -> StorePathHash {
    StorePathHash([7; 20])
}

#[tokio::test]
async fn additions_and_deletions_are_known_within_a_second() {
    let builder = Builder::new();
    let first = builder.add("first", b"first");
    let (fed, _source) = direct(&builder, FeedOptions::default()).await;
    assert_eq!(fed.says(&first.hash()), Says::Yes);
    assert_eq!(fed.says(&absent()), Says::No);
    for round in 0..3 {
        let name = format!("file-{round}");
        let path = builder.add(&name, name.as_bytes());
        let took = until(|| fed.says(&path.hash()) == Says::Yes).await;
        assert!(took < Duration::from_secs(1), "added: {took:?}");
        builder.nix_store(&["--delete", &builder.store_dir.join(&path)]);
        let took = until(|| fed.says(&path.hash()) == Says::No).await;
        assert!(took < Duration::from_secs(1), "deleted: {took:?}");
    }
    let paths: Vec<_> = (0..20).map(|n| format!("many-{n}")).collect();
    let paths: Vec<_> = paths.iter().map(|n| (n.as_str(), n.as_bytes())).collect();
    let paths = builder.add_all(&paths);
    until(|| paths.iter().all(|p| fed.says(&p.hash()) == Says::Yes)).await;
    builder.collect_garbage();
    let took = until(|| paths.iter().all(|p| fed.says(&p.hash()) == Says::No)).await;
    assert!(took < Duration::from_secs(1), "collected: {took:?}");
    assert_eq!(fed.says(&first.hash()), Says::No);
}

/// A feed that stalls without closing says nothing after a second, and is begun anew.
#[tokio::test]
async fn a_stalled_feed_says_nothing() {
    let builder = Builder::new();
    let path = builder.add("file", b"file");
    let options = FeedOptions {
        silence_max: Duration::from_secs(2),
        ..FeedOptions::default()
    };
    let (fed, source) = direct(&builder, options).await;
    assert_eq!(fed.says(&absent()), Says::No);
    source.flows.send_replace(false);
    let stalled = Instant::now();
    until(|| fed.says(&absent()) == Says::Nothing).await;
    let after = stalled.elapsed();
    assert!(after <= Duration::from_millis(1100), "{after:?}");
    assert_eq!(fed.says(&path.hash()), Says::Nothing);
    let added = builder.add("added", b"added");
    source.flows.send_replace(true);
    until(|| fed.says(&added.hash()) == Says::Yes).await;
    assert_eq!(fed.says(&absent()), Says::No);
}

/// A muster that asks another over a line, and has its catalog.
async fn fed_over(line: &Line, builder: &Builder) -> Arc<BinaryCache> {
    let feed = Some(FeedOptions::default());
    let asking = Arc::new(asking(line.address, &builder.store_dir, feed));
    up(&*asking).await;
    until(|| asking.paths_known().is_some()).await;
    asking
}

/// What is no feed is no silence: the muster answers, and a path that comes meanwhile is found by those who ask.
#[tokio::test(flavor = "multi_thread")]
async fn a_path_that_comes_while_the_feed_stalls_is_found() {
    let builder = Builder::new();
    builder.add("file", b"file");
    let serving = muster(&builder, 1).await;
    let line = Line::to(serving.address).await;
    let asking = fed_over(&line, &builder).await;
    let known = asking.paths_known().unwrap();
    let member = peer::member(0, Arc::clone(&asking) as Arc<dyn Upstream>);
    let mut setup = peer::setup_of([member]);
    setup.publisher.store_dir = builder.store_dir.clone();
    let ours = support::serve(support::new_substituter(support::options(), setup)).await;
    let mut link = asking.link();
    link.borrow_and_update();

    line.feed_flows.send_replace(false);
    let added = builder.add("added", b"added");
    until(|| asking.paths_known().is_none()).await;
    let target = format!("/{}.narinfo", added.hash());
    assert_eq!(support::get(ours.address, &target).await.status, 200);
    let nobody = format!("/{}.narinfo", absent());
    assert_eq!(support::get(ours.address, &nobody).await.status, 404);
    // Until its pulse would have been missed twice.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let changed = link.has_changed().unwrap();
    assert!(!changed, "{:?}", *link.borrow());
    let later = builder.add("later", b"later");
    assert!(asking.path_info(later.hash()).await.unwrap().is_some());
    line.feed_flows.send_replace(true);
    until(|| asking.paths_known() == Some(known + 2)).await;
}

/// So it costs nothing when somebody asks the next time.
#[tokio::test(flavor = "multi_thread")]
async fn a_muster_that_feeds_and_turns_silent_is_found_out_before_anybody_asks() {
    let builder = Builder::new();
    let path = builder.add("file", b"file");
    let serving = muster(&builder, 1).await;
    let line = Line::to(serving.address).await;
    let asking = fed_over(&line, &builder).await;
    let mut link = asking.link();
    for _ in 0..2 {
        line.flows.send_replace(false);
        let down = link.wait_for(|link| matches!(link, Link::Down { .. }));
        let down = tokio::time::timeout(Duration::from_secs(10), down).await;
        drop(down.expect("it is found to be silent").unwrap());
        assert!(asking.path_info(path.hash()).await.is_err());
        line.flows.send_replace(true);
        up(&*asking).await;
        assert!(asking.path_info(path.hash()).await.unwrap().is_some());
        until(|| asking.paths_known().is_some()).await;
    }
}

/// Nobody knows what is in a database that cannot be read.
#[tokio::test]
async fn a_store_in_doubt_says_nothing() {
    let builder = Builder::new();
    builder.add("file", b"file");
    let (fed, _source) = direct(&builder, FeedOptions::default()).await;
    let database = builder.path("state/db/db.sqlite");
    let aside = builder.path("state/db/aside");
    fs::rename(&database, &aside).unwrap();
    let took = until(|| fed.says(&absent()) == Says::Nothing).await;
    assert!(took < Duration::from_millis(1600), "{took:?}");
    fs::rename(&aside, &database).unwrap();
    until(|| fed.says(&absent()) == Says::No).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_muster_does_not_have_is_known_without_a_question() {
    known_without_a_question(1).await;
}

/// Another muster asks for the own store alone, so its catalog is all there is to know.
#[tokio::test(flavor = "multi_thread")]
async fn a_muster_over_several_stores_tells_another_what_its_own_store_has() {
    known_without_a_question(2).await;
}

async fn known_without_a_question(stores: u16) {
    let builder = Builder::new();
    let path = builder.add("file", b"file");
    let serving = muster(&builder, stores).await;
    let asked = || serving.substituter.counters().narinfo_requests.value();
    let with = asking(
        serving.address,
        &builder.store_dir,
        Some(FeedOptions::default()),
    );
    let without = asking(serving.address, &builder.store_dir, None);
    up(&with).await;
    up(&without).await;
    // Known once the feed is here: then no question reaches the other muster.
    let begun = Instant::now();
    loop {
        let before = asked();
        assert!(with.path_info(absent()).await.unwrap().is_none());
        if asked() == before {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(10));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let before = asked();
    assert!(without.path_info(absent()).await.unwrap().is_none());
    assert_eq!(asked(), before + 1);
    for upstream in [&with, &without] {
        assert!(upstream.path_info(path.hash()).await.unwrap().is_some());
    }
    let known = with.paths_known().unwrap();
    assert_eq!(without.paths_known(), None);
    let added = builder.add("added", b"added");
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(with.paths_known(), Some(known + 1));
    assert!(with.path_info(added.hash()).await.unwrap().is_some());

    // A feed does not hold a stop up.
    let stopped = Instant::now();
    serving.stop.send_replace(true);
    serving.task.await.unwrap();
    assert!(
        stopped.elapsed() < Duration::from_secs(2),
        "{:?}",
        stopped.elapsed()
    );
    // And what is gone says nothing.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert!(with.path_info(absent()).await.is_err());
    assert_eq!(with.paths_known(), None);
}

/// A store in which nothing happens has nothing but heartbeats to send.
#[tokio::test(flavor = "multi_thread")]
async fn a_quiet_feed_is_not_taken_for_a_slow_drip() {
    let builder = Builder::new();
    builder.add("file", b"file");
    let serving = muster(&builder, 1).await;
    let http = HttpOptions {
        drip_time: Duration::from_millis(400),
        ..HttpOptions::default()
    };
    let options = BinaryCacheOptions {
        catalog: Some(FeedOptions::default()),
        ..BinaryCacheOptions::default()
    };
    let (address, store_dir) = (serving.address, builder.store_dir.clone());
    let cache = peer::asking_within(address, store_dir, options, http);
    until(|| cache.paths_known().is_some()).await;
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(4) {
        assert!(cache.paths_known().is_some(), "{:?}", begun.elapsed());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn a_muster_over_several_stores_has_no_catalog() {
    let builder = Builder::new();
    builder.add("file", b"file");
    let serving = muster(&builder, 2).await;
    let answer = support::get(serving.address, "/muster/catalog").await;
    assert_eq!(answer.status, 404);
}

/// A cache that is no muster is not bothered.
#[tokio::test]
async fn other_caches_are_not_asked_for_a_catalog() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (requests, mut seen) = tokio::sync::mpsc::unbounded_channel();
    let serve = tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let requests = requests.clone();
            tokio::spawn(async move {
                let mut buffer = vec![0; 4096];
                while let Ok(count @ 1..) = stream.read(&mut buffer).await {
                    let text = String::from_utf8_lossy(&buffer[..count]).into_owned();
                    let first = text.lines().next().unwrap_or_default().to_owned();
                    let _ = requests.send(first);
                    let answer = "HTTP/1.1 200 OK\r\nServer: other\r\nContent-Length: 21\r\n\r\nStoreDir: /nix/store\n";
                    let _ = stream.write_all(answer.as_bytes()).await;
                }
            });
        }
    });
    let cache = asking(address, &StoreDir::default(), Some(FeedOptions::default()));
    up(&cache).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let mut all = vec![];
    while let Ok(request) = seen.try_recv() {
        all.push(request);
    }
    assert_eq!(all, ["GET /nix-cache-info HTTP/1.1"]);
    serve.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn watching_a_hundred_thousand_paths_is_cheap_and_deletions_are_known_within_a_second() {
    let builder = Builder::new();
    builder.add("file", b"file");
    let mut writer = Connection::open(builder.path("state/db/db.sqlite")).unwrap();
    let rows = writer.transaction().unwrap();
    for n in 0..100_000 {
        rows.execute(INSERT, (builder.store_dir.join(&numbered(n)), NO_HASH))
            .unwrap();
    }
    rows.commit().unwrap();
    let (fed, _source) = direct(&builder, FeedOptions::default()).await;
    assert_eq!(fed.state(), (100_001, true));
    // The least of some seconds: other tests have watchers in this process, too.
    let mut idle = Duration::MAX;
    for _ in 0..4 {
        let before = watcher_cpu();
        tokio::time::sleep(Duration::from_secs(1)).await;
        idle = idle.min(watcher_cpu().saturating_sub(before));
    }
    println!("idle: {idle:?} of processor time a second");
    assert!(idle < Duration::from_millis(5), "{idle:?}");

    // Gone among many, again and again, one and some; what is new meanwhile is known, too.
    for round in 0..8 {
        let gone: Vec<_> = (0..=round * 5)
            .map(|n| numbered(round * 10_000 + n))
            .collect();
        let new = numbered(200_000 + round);
        let rows = writer.transaction().unwrap();
        for path in &gone {
            let path = builder.store_dir.join(path);
            rows.execute("delete from ValidPaths where path = ?1", [&path])
                .unwrap();
        }
        rows.execute(INSERT, (builder.store_dir.join(&new), NO_HASH))
            .unwrap();
        rows.commit().unwrap();
        let took = until(|| {
            let hashes = gone.iter().map(StorePath::hash);
            hashes.map(|hash| fed.says(&hash)).all(|s| s == Says::No)
        })
        .await;
        println!("{} deletions known after {took:?}", gone.len());
        assert!(took < Duration::from_secs(1), "{took:?}");
        until(|| fed.says(&new.hash()) == Says::Yes).await;
    }
    assert_eq!(fed.state(), (100_001 - 148 + 8, true));
}

/// What lies before, between and behind the paths of the store, and more deletions than are sought one by one.
#[tokio::test]
async fn rows_that_are_no_paths_of_the_store_come_and_go_without_a_trace() {
    let builder = Builder::new();
    let file = builder.add("file", b"file");
    let mut writer = Connection::open(builder.path("state/db/db.sqlite")).unwrap();
    let store_dir = &builder.store_dir;
    let strange = [
        "".to_owned(),
        "/aaa/store/odd".to_owned(),
        format!("{store_dir}/short"),
        format!("{store_dir}/eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee-no-digits"),
        "/zzz/store/odd".to_owned(),
    ];
    let mut change = |statement: &str, paths: &[String]| {
        let rows = writer.transaction().unwrap();
        for path in paths {
            rows.execute(statement, [path]).unwrap();
        }
        rows.commit().unwrap();
    };
    let insert = "insert into ValidPaths (path, hash, registrationTime) values (?1, '', 1)";
    let delete = "delete from ValidPaths where path = ?1";
    let many: Vec<_> = (0..600).map(|n| store_dir.join(&numbered(n))).collect();
    change(insert, &many);
    let (fed, _source) = direct(&builder, FeedOptions::default()).await;
    assert_eq!(fed.state(), (601, true));
    // Where the first path of all is none of the store, the database is not read.
    change(insert, &strange);
    let (alone, others) = strange.split_first().unwrap();
    change(delete, std::slice::from_ref(alone));
    change(delete, &many[..10]);
    until(|| fed.state() == (591, true)).await;
    change(delete, others);
    change(delete, &many[10..500]);
    until(|| fed.state() == (101, true)).await;
    change(insert, &strange);
    change(insert, &many[..1]);
    until(|| fed.state() == (102, true)).await;
    assert_eq!(fed.says(&file.hash()), Says::Yes);
    for n in [0, 1, 499, 500, 599] {
        let expected = if n == 0 || n >= 500 {
            Says::Yes
        } else {
            Says::No
        };
        assert_eq!(fed.says(&numbered(n).hash()), expected, "{n}");
    }
}

/// Processor time of the threads that watch a database.
fn watcher_cpu() -> Duration {
    let threads = fs::read_dir("/proc/self/task").unwrap().flatten();
    let times = threads.filter_map(|thread| {
        let name = fs::read_to_string(thread.path().join("comm")).ok()?;
        let times = fs::read_to_string(thread.path().join("schedstat")).ok()?;
        let nanos = times.split(' ').next()?.parse().ok()?;
        (name.trim() == "nix-catalog").then(|| Duration::from_nanos(nanos))
    });
    times.sum()
}

fn numbered(n: u32) -> StorePath {
    let mut hash = [0x5a; 20];
    hash[..4].copy_from_slice(&n.wrapping_mul(0x9e37_79b1).to_be_bytes());
    format!("{}-path-{n}", StorePathHash(hash)).parse().unwrap()
}
