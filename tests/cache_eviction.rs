//! Eviction goes on beside requests and for bytes that came: it holds nobody up, and what was only declared
//! makes nobody go.

mod cache;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use muster::cache::backend::{Backend as _, Error};
use muster::cache::disk::DiskCache;

use cache::{fill, options, path, settle, wait};

/// Entries of 2 kB, and what they fill.
const ENTRIES: u64 = 2000;
const BYTES_MAX: u64 = 5 << 20;

async fn filled(dir: &std::path::Path) -> Arc<DiskCache> {
    let cache = Arc::new(DiskCache::open(dir, options(BYTES_MAX)));
    let fills = (0..ENTRIES).map(|number| {
        let (info, nar) = path(number, 2000);
        let cache = &cache;
        async move { fill(&**cache, &info, &nar).await.unwrap() }
    });
    futures_util::future::join_all(fills).await;
    settle(&cache).await;
    assert_eq!(cache.stats().evictions, 0);
    cache
}

/// What a request asks of the cache, again and again until it is told to stop; how long each took.
fn ask(cache: &DiskCache, stop: &AtomicBool) -> Vec<Duration> {
    let paths: Vec<_> = (0..ENTRIES).map(|number| path(number, 2000).0).collect();
    let mut took = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let place = fastrand::usize(..paths.len());
        let info = &paths[place];
        let begun = Instant::now();
        if let Some(name) = cache.look_up(info.path.hash()).and_then(|r| r.name()) {
            // It may go between the two.
            cache.open(&name).unwrap();
            // The others stay the least recently used, so that it is they that go.
            if place < paths.len() / 2 {
                cache.touch(info.path.hash());
            }
        }
        drop(cache.begin(1000));
        took.push(begun.elapsed());
    }
    took
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_do_not_wait_for_evictions() {
    let dir = tempfile::tempdir().unwrap();
    let cache = filled(dir.path()).await;
    let stop = Arc::new(AtomicBool::new(false));
    let asking = {
        let (cache, stop) = (Arc::clone(&cache), Arc::clone(&stop));
        std::thread::spawn(move || ask(&cache, &stop))
    };
    // Each makes some hundred go.
    for number in 0..8 {
        let (info, nar) = path(10_000 + number, 500_000);
        fill(&*cache, &info, &nar).await.unwrap();
        settle(&cache).await;
    }
    stop.store(true, Ordering::Relaxed);
    let mut took = asking.join().unwrap();
    let evictions = cache.stats().evictions;
    assert!(evictions > ENTRIES / 4, "{evictions} evictions");
    took.sort_unstable();
    let all = took.len();
    let (median, late) = (took[all / 2], took[all * 99 / 100]);
    assert!(all > 200, "{all} requests");
    // A machine with much else to do; an eviction syncs several times, for some ms each.
    assert!(median < Duration::from_millis(2), "{median:?} of {all}");
    assert!(late < Duration::from_millis(50), "{late:?} of {all}");
}

#[tokio::test]
async fn a_size_that_was_only_declared_makes_nobody_go() {
    let dir = tempfile::tempdir().unwrap();
    let bytes_max = 10 << 30;
    let cache = DiskCache::open(dir.path(), options(bytes_max));
    let (info, nar) = path(1, 5000);
    fill(&cache, &info, &nar).await.unwrap();
    // As ever so many of 10 GB would, of which nothing comes.
    let begun: Vec<_> = (0..100).map(|_| cache.begin(10 << 30).unwrap()).collect();
    settle(&cache).await;
    let stats = cache.stats();
    assert_eq!((stats.entries, stats.evictions), (1, 0), "{stats:?}");
    drop(begun);
    assert_eq!(cache.stats().bytes_reserved, 0);
    assert!(matches!(
        cache.begin(100 << 30),
        Err(Error::TooLarge { .. })
    ));
    // What comes has room made for it, as much as it is.
    let small = tempfile::tempdir().unwrap();
    let cache = DiskCache::open(small.path(), options(100_000));
    for number in 0..10 {
        let (info, nar) = path(number, 10_000);
        fill(&cache, &info, &nar).await.unwrap();
        settle(&cache).await;
    }
    let before = cache.stats().entries;
    assert!(before > 5, "{before}");
    let mut large = cache.begin(100).unwrap();
    large.write(&[1; 50_000]).unwrap();
    wait("room", || cache.stats().entries < before).await;
    let stats = cache.stats();
    assert!(stats.entries >= before - 6, "{stats:?}");
    assert!(large.write(&[1; 60_000]).is_err(), "more than there is");
}
