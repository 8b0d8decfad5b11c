//! A binary cache that turns silent costs little, and one that is merely slow is waited for.

mod builder;
mod cache_server;

use std::time::{Duration, Instant};

use builder::{nar_of, up};
use cache_server::{Asking, CacheServer, Fault};
use futures_util::StreamExt as _;
use muster::nix::narinfo::Compression;
use muster::nix::path_info::PathInfo;
use muster::upstream::binary_cache::BinaryCache;
use muster::upstream::http_client::HttpOptions;
use muster::upstream::{Link, Upstream};
use tokio::time::timeout;

const INFO: &str = "/nix-cache-info";

/// How long a question is waited for at most: what is over sooner was given up for another reason.
const PATIENCE: Duration = Duration::from_secs(30);

fn asking(server: &CacheServer) -> BinaryCache {
    let mut asking = Asking::at(&server.url());
    asking.options = HttpOptions {
        head_timeout: PATIENCE,
        silence: PATIENCE,
        ..HttpOptions::default()
    };
    asking.start()
}

fn narinfo(info: &PathInfo) -> String {
    format!("/{}.narinfo", info.path.hash())
}

async fn down(cache: &BinaryCache) -> String {
    let mut link = cache.link();
    let down = link.wait_for(|link| matches!(link, Link::Down { .. }));
    let down = timeout(PATIENCE / 2, down).await;
    match &*down.expect("it is found to be silent").unwrap() {
        Link::Down { error, .. } => error.to_string(),
        other => panic!("{other:?}"),
    }
}

/// Asks for a path that comes late, and tells whether the cache counted as silent meanwhile.
async fn waited_for(cache: &BinaryCache, info: &PathInfo) -> bool {
    let mut link = cache.link();
    link.borrow_and_update();
    let found = cache.path_info(info.path.hash()).await;
    assert_eq!(found.unwrap().as_ref(), Some(info));
    !link.has_changed().unwrap()
}

/// It was asked until the time for a question was over, 10 s for each miss.
#[tokio::test(flavor = "multi_thread")]
async fn a_cache_that_turns_silent_is_given_up_soon_and_counts_again_when_it_is_heard() {
    let server = CacheServer::new();
    let cache = asking(&server);
    let (info, _) = server.add("path", &nar_of(b"x"), Compression::None);
    up(&cache).await;
    assert!(cache.path_info(info.path.hash()).await.unwrap().is_some());
    server.freeze(true);
    let begun = Instant::now();
    let paths = vec![info.path.clone(); 60];
    // More than are asked at once: the pulse does not wait for its turn.
    let answers = cache.path_infos(&paths).await;
    assert!(answers.iter().all(Result::is_err));
    let took = begun.elapsed();
    println!("silent after {took:?}");
    assert!(took < PATIENCE / 3, "{took:?}");
    assert_eq!(down(&cache).await, "no sign of life for 1.2s");
    // Nobody waits for it any more.
    let begun = Instant::now();
    for _ in 0..200 {
        assert!(cache.path_info(info.path.hash()).await.is_err());
    }
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(1), "{took:?}");

    server.freeze(false);
    up(&cache).await;
    assert_eq!(
        cache.path_info(info.path.hash()).await.unwrap(),
        Some(info.clone())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_that_stays_silent_is_asked_anew_in_the_background() {
    let server = CacheServer::new();
    let mut asking = Asking::at(&server.url());
    asking.options.connect_timeout = PATIENCE;
    let cache = asking.start();
    let (info, _) = server.add("path", &nar_of(b"x"), Compression::None);
    up(&cache).await;
    server.freeze(true);
    assert!(cache.path_info(info.path.hash()).await.is_err());
    // The greeting gets no answer either, and its error is told.
    let mut link = cache.link();
    let greeted = |link: &Link| matches!(link, Link::Down { error, .. } if error.contains("GET"));
    let greeted = timeout(PATIENCE, link.wait_for(greeted)).await;
    drop(greeted.expect("it is greeted anew").unwrap());
    server.freeze(false);
    up(&cache).await;
    assert!(cache.path_info(info.path.hash()).await.unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_that_is_slow_with_a_question_and_answers_its_pulse_is_waited_for() {
    let server = CacheServer::new();
    let cache = asking(&server);
    let (info, _) = server.add("path", &nar_of(b"x"), Compression::None);
    up(&cache).await;
    let late = Fault::Late(Duration::from_secs(4));
    server.fault(&narinfo(&info), Some(late));
    let before = server.times_asked(INFO);
    assert!(waited_for(&cache, &info).await);
    let pulses = server.times_asked(INFO) - before;
    // A second apart, and a few more where this machine has much else to do.
    assert!((1..=8).contains(&pulses), "{pulses}");
}

/// Such as have one process for each connection may have none left for a pulse.
#[tokio::test(flavor = "multi_thread")]
async fn a_cache_that_sends_a_nar_is_alive() {
    let server = CacheServer::new();
    let cache = asking(&server);
    let (large, target) = server.add("large", &nar_of(&[7; 1000]), Compression::None);
    let (info, _) = server.add("path", &nar_of(b"x"), Compression::None);
    up(&cache).await;
    server.fault(&target, Some(Fault::Drip(Duration::from_millis(20))));
    let mut nar = cache.nar(&large).await.unwrap().unwrap();
    let reading = tokio::spawn(async move { while nar.next().await.is_some() {} });
    server.fault(INFO, Some(Fault::Silent));
    server.fault(&narinfo(&info), Some(Fault::Late(Duration::from_secs(4))));
    assert!(waited_for(&cache, &info).await);
    assert!(!reading.is_finished(), "it sent until then");
    reading.abort();
}

/// Over a long line, what was lost on its way comes late by itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_far_cache_is_not_called_silent() {
    let server = CacheServer::new();
    let (info, _) = server.add("path", &nar_of(b"x"), Compression::None);
    server.fault(INFO, Some(Fault::Late(Duration::from_millis(150))));
    let cache = asking(&server);
    up(&cache).await;
    // Once to get to know it, and once to see over that connection how far it is.
    builder::wait_for("its distance is known", || server.times_asked(INFO) == 2);
    server.fault(INFO, Some(Fault::Silent));
    server.fault(&narinfo(&info), Some(Fault::Late(Duration::from_secs(4))));
    assert!(waited_for(&cache, &info).await);
    assert_eq!(server.times_asked(INFO), 2);
}
