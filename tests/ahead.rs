//! What is fetched before a client asks: whole closures, and small NARs. Bounded, checked, dropped.

mod support;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use muster::codec::compression::Encoding;
use muster::nix::path_info::{PathInfo, Trust};
use muster::nix::store_path::StorePath;
use muster::substituter::nar_url::NarUrl;
use muster::substituter::transfer::{Extent, NarBody};
use muster::substituter::{Options, Substituter, ahead, closure};
use muster::upstream::Error;
use muster::upstream::closures::Closures;
use support::*;
use tokio::time::{Instant, sleep};

/// A chain of paths, the top first.
fn chain(length: u32, size: usize) -> Vec<(PathInfo, Bytes)> {
    let mut paths: Vec<(PathInfo, Bytes)> = Vec::new();
    for number in 0..length {
        let below: Vec<_> = paths.last().map(|(info, _)| info).into_iter().collect();
        paths.push(path(number, size, &below));
    }
    paths.reverse();
    paths
}

/// One upstream that has these paths, and a substituter over it.
fn over(paths: &[(PathInfo, Bytes)], options: Options) -> (Arc<Scripted>, Substituter) {
    let upstream = Scripted::new("a");
    paths.iter().for_each(|(info, nar)| upstream.add(info, nar));
    let all = std::slice::from_ref(&upstream);
    let setup = setup(all, &Trust::Operator, Encoding::None);
    (upstream, support::new_substituter(options, setup))
}

fn pulling() -> Options {
    Options {
        ahead: Some(ahead::Options::default()),
        ..options()
    }
}

async fn look(substituter: &Substituter, paths: &[(PathInfo, Bytes)]) {
    for (info, _) in paths {
        assert!(substituter.narinfo(info.path.hash()).await.is_some());
    }
}

async fn nar(substituter: &Substituter, info: &PathInfo) -> Option<Bytes> {
    let url = NarUrl {
        file_hash: None,
        path_hash: info.path.hash(),
        nar_hash: info.nar_hash,
        encoding: Encoding::None,
    };
    match substituter.nar(&url, Extent::Whole).await?.body {
        NarBody::Whole(bytes) => Some(bytes),
        NarBody::Checked { .. } | NarBody::Stream(_) | NarBody::File(_) => {
            panic!("a small NAR is given whole")
        }
    }
}

/// Waits until a figure has this value.
async fn until(what: &str, figure: impl Fn() -> u64, value: u64) {
    for _ in 0..2000 {
        if figure() == value {
            return;
        }
        sleep(Duration::from_millis(1)).await;
    }
    panic!("{what}: {} in place of {value}", figure());
}

#[tokio::test]
async fn what_a_client_fetches_is_there_before_it_asks() {
    let paths = chain(50, 1000);
    let (upstream, substituter) = over(&paths, pulling());
    look(&substituter, &paths).await;
    // A dry run ends here.
    sleep(Duration::from_millis(50)).await;
    assert_eq!(upstream.nars.load(Ordering::Relaxed), 0);

    let (leaf, expected) = paths.last().unwrap();
    assert_eq!(nar(&substituter, leaf).await.unwrap(), expected);
    let counters = substituter.counters();
    until("pulled", || counters.nar_ahead.value(), 49).await;
    *upstream.delay.lock().unwrap() = Duration::from_secs(5);
    for (info, expected) in paths.iter().rev().skip(1) {
        let asked = Instant::now();
        assert_eq!(nar(&substituter, info).await.unwrap(), expected);
        assert!(asked.elapsed() < Duration::from_secs(1));
    }
    assert_eq!(counters.nar_ahead_claimed.value(), 49);
    assert_eq!(upstream.nars.load(Ordering::Relaxed), 50);
}

#[tokio::test(start_paused = true)]
async fn a_nar_on_its_way_is_waited_for_and_not_fetched_twice() {
    let paths = chain(10, 1000);
    let (upstream, substituter) = over(&paths, pulling());
    look(&substituter, &paths).await;
    *upstream.delay.lock().unwrap() = Duration::from_millis(40);
    let asked = Instant::now();
    for (info, expected) in paths.iter().rev() {
        assert_eq!(nar(&substituter, info).await.unwrap(), expected);
    }
    // The first, and those that begin with its request: two round trips, not ten.
    assert!(
        asked.elapsed() < Duration::from_millis(150),
        "{:?}",
        asked.elapsed()
    );
    assert_eq!(upstream.nars.load(Ordering::Relaxed), 10);
}

#[tokio::test(start_paused = true)]
async fn what_nobody_claims_is_dropped_and_asked_for_anew() {
    let paths = chain(10, 1000);
    let (upstream, substituter) = over(&paths, pulling());
    look(&substituter, &paths).await;
    assert!(nar(&substituter, &paths[9].0).await.is_some());
    let counters = substituter.counters();
    until("pulled", || counters.nar_ahead.value(), 9).await;
    sleep(Duration::from_secs(31)).await;
    assert_eq!(counters.nar_ahead_dropped.value(), 9);
    let (info, expected) = &paths[3];
    assert_eq!(nar(&substituter, info).await.unwrap(), expected);
    // Out of memory only: what was pulled is on disk, where there is a cache.
    let anew = usize::from(!keeps());
    assert_eq!(upstream.nars.load(Ordering::Relaxed), 10 + anew);
}

#[tokio::test(start_paused = true)]
async fn bytes_are_bounded_and_room_is_given_back_by_claims() {
    let size = 100 << 10;
    let paths = chain(20, size);
    let mut options = pulling();
    options.ahead.as_mut().unwrap().bytes_max = 5 * size as u64;
    let (_, substituter) = over(&paths, options);
    look(&substituter, &paths).await;
    assert!(nar(&substituter, &paths[19].0).await.is_some());
    sleep(Duration::from_secs(1)).await;
    let counters = substituter.counters();
    assert_eq!(counters.nar_ahead.value(), 5);
    // Those that are wanted next, and as each is given out another is fetched.
    for (place, (info, expected)) in paths.iter().rev().skip(1).enumerate() {
        let pulled = u64::try_from(place + 5).unwrap().min(19);
        until("pulled", || counters.nar_ahead.value(), pulled).await;
        assert_eq!(nar(&substituter, info).await.unwrap(), expected);
    }
    assert_eq!(counters.nar_ahead_claimed.value(), 19);
}

#[tokio::test(start_paused = true)]
async fn large_nars_and_strangers_are_left_alone() {
    let paths = chain(3, 1000);
    let (large, large_nar) = path(100, 2 << 20, &[&paths[0].0]);
    let (stranger, stranger_nar) = path(101, 1000, &[]);
    let (upstream, substituter) = over(&paths, pulling());
    upstream.add(&large, &large_nar);
    upstream.add(&stranger, &stranger_nar);
    look(&substituter, &paths).await;
    look(
        &substituter,
        &[(large, large_nar), (stranger, stranger_nar)],
    )
    .await;
    assert!(nar(&substituter, &paths[2].0).await.is_some());
    sleep(Duration::from_secs(1)).await;
    assert_eq!(upstream.nars.load(Ordering::Relaxed), 3);
}

#[tokio::test(start_paused = true)]
async fn a_look_up_of_long_ago_is_no_part_of_a_fetch() {
    let paths = chain(10, 1000);
    let (upstream, substituter) = over(&paths, pulling());
    look(&substituter, &paths[..5]).await;
    sleep(Duration::from_secs(130)).await;
    look(&substituter, &paths[5..]).await;
    assert!(nar(&substituter, &paths[9].0).await.is_some());
    sleep(Duration::from_secs(1)).await;
    assert_eq!(upstream.nars.load(Ordering::Relaxed), 5);
}

#[tokio::test(start_paused = true)]
async fn wrong_bytes_are_never_given() {
    for script in [
        NarScript::FlipLast,
        NarScript::BreakAt(500),
        NarScript::Gone,
    ] {
        let paths = chain(10, 1000);
        let (later, first) = paths.split_at(5);
        let (upstream, substituter) = over(&paths, pulling());
        look(&substituter, first).await;
        assert!(nar(&substituter, &first[4].0).await.is_some());
        let counters = substituter.counters();
        until("pulled", || counters.nar_ahead.value(), 4).await;
        sleep(Duration::from_secs(31)).await;

        // Those that are pulled now are wrong; another holder would give them rightly.
        *upstream.nar_script.lock().unwrap() = script.clone();
        look(&substituter, later).await;
        assert_eq!(nar(&substituter, &later[4].0).await, None, "{script:?}");
        sleep(Duration::from_secs(1)).await;
        for (info, _) in &later[..4] {
            assert_eq!(nar(&substituter, info).await, None, "{script:?}");
        }
        assert_eq!(counters.nar_ahead_claimed.value(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn switched_off_nothing_is_pulled() {
    let paths = chain(5, 1000);
    let none = ahead::Options {
        bytes_max: 0,
        ..ahead::Options::default()
    };
    for ahead in [None, Some(none)] {
        let (upstream, substituter) = over(&paths, Options { ahead, ..options() });
        look(&substituter, &paths).await;
        for (info, expected) in paths.iter().rev() {
            assert_eq!(nar(&substituter, info).await.unwrap(), expected);
            sleep(Duration::from_millis(100)).await;
        }
        assert_eq!(upstream.nars.load(Ordering::Relaxed), 5);
        assert_eq!(substituter.counters().nar_ahead.value(), 0);
    }
}

/// Tells whole closures of a chain, or does as it is told.
struct Whole {
    paths: Vec<(PathInfo, Bytes)>,
    script: Script,
    /// Before each answer.
    delay: Duration,
    asked: Mutex<Vec<usize>>,
    closures: AtomicUsize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Script {
    Answers,
    FailsAtPaths,
    FailsAtInfos,
    /// Claims things of paths that it was not asked for, and of asked ones under other names.
    Lies,
}

#[async_trait]
impl Closures for Whole {
    async fn paths(&self, top: &StorePath) -> Result<Vec<StorePath>, Error> {
        self.closures.fetch_add(1, Ordering::Relaxed);
        sleep(self.delay).await;
        if self.script == Script::FailsAtPaths {
            return Err(Error::Lost("ended".into()));
        }
        assert_eq!(*top, self.paths[0].0.path);
        Ok(self.paths.iter().map(|(i, _)| i.path.clone()).collect())
    }

    async fn infos(&self, paths: &[StorePath]) -> Result<Vec<PathInfo>, Error> {
        self.asked.lock().unwrap().push(paths.len());
        sleep(self.delay).await;
        if self.script == Script::FailsAtInfos {
            return Err(Error::Lost("ended".into()));
        }
        let known = self.paths.iter().map(|(info, _)| info);
        let mut infos: Vec<_> = known.filter(|i| paths.contains(&i.path)).cloned().collect();
        if self.script == Script::Lies {
            let (unasked, _) = path(999, 1, &[]);
            infos.truncate(2);
            for info in &mut infos {
                let name = format!("{}-other", info.path.hash());
                info.path = name.parse().unwrap();
            }
            infos.push(unasked);
        }
        Ok(infos)
    }
}

fn whole(script: Script, paths: &[(PathInfo, Bytes)]) -> Arc<Whole> {
    Arc::new(Whole {
        paths: paths.to_vec(),
        script,
        delay: Duration::from_millis(40),
        asked: Mutex::default(),
        closures: AtomicUsize::new(0),
    })
}

#[tokio::test(start_paused = true)]
async fn a_deep_closure_takes_two_round_trips() {
    let paths = chain(100, 10);
    let (upstream, substituter) = over(&paths, options());
    let whole = whole(Script::Answers, &paths);
    *upstream.closures.lock().unwrap() = Some(whole.clone());
    look(&substituter, &paths[..1]).await;
    let begun = Instant::now();
    look(&substituter, &paths[1..]).await;
    assert_eq!(begun.elapsed(), Duration::from_millis(80));
    assert_eq!(*whole.asked.lock().unwrap(), [99]);
    assert_eq!(upstream.questions.load(Ordering::Relaxed), 1);
    assert_eq!(upstream.batches.load(Ordering::Relaxed), 0);
    assert_eq!(substituter.counters().narinfo_prefetched.value(), 99);
}

#[tokio::test(start_paused = true)]
async fn where_it_fails_or_is_switched_off_it_goes_level_by_level() {
    for script in [Script::FailsAtPaths, Script::FailsAtInfos, Script::Answers] {
        let paths = chain(30, 10);
        let mut options = options();
        options.prefetch = Some(closure::Options {
            whole: script != Script::Answers,
            ..closure::Options::default()
        });
        let (upstream, substituter) = over(&paths, options);
        let whole = whole(script, &paths);
        *upstream.closures.lock().unwrap() = Some(whole.clone());
        look(&substituter, &paths[..1]).await;
        let counters = substituter.counters();
        until("fetched", || counters.narinfo_prefetched.value(), 29).await;
        assert_eq!(upstream.batches.load(Ordering::Relaxed), 29);
        let asked = usize::from(script != Script::Answers);
        assert_eq!(whole.closures.load(Ordering::Relaxed), asked);
        look(&substituter, &paths).await;
        assert_eq!(upstream.questions.load(Ordering::Relaxed), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn what_was_not_asked_for_is_not_believed() {
    let paths = chain(5, 10);
    let (upstream, substituter) = over(&paths, options());
    *upstream.closures.lock().unwrap() = Some(whole(Script::Lies, &paths));
    look(&substituter, &paths[..1]).await;
    sleep(Duration::from_secs(1)).await;
    assert_eq!(substituter.counters().narinfo_prefetched.value(), 0);
    let (unasked, _) = path(999, 1, &[]);
    assert!(substituter.narinfo(unasked.path.hash()).await.is_none());
    look(&substituter, &paths).await;
}

#[tokio::test(start_paused = true)]
async fn a_whole_closure_is_verified_as_any_path_info() {
    let paths = chain(5, 10);
    let upstream = Scripted::new("a");
    let (signed, nar) = &paths[0];
    let mut signed = signed.clone();
    let fingerprint =
        muster::nix::fingerprint::of_path(&signed, &muster::nix::store_path::StoreDir::default());
    signed.signatures = vec![key().sign(&fingerprint)];
    upstream.add(&signed, nar);
    *upstream.closures.lock().unwrap() = Some(whole(Script::Answers, &paths));
    let trust = Trust::Keys(vec![key().public()]);
    let all = std::slice::from_ref(&upstream);
    let substituter = support::new_substituter(options(), setup(all, &trust, Encoding::None));
    assert!(substituter.narinfo(signed.path.hash()).await.is_some());
    sleep(Duration::from_secs(1)).await;
    assert_eq!(substituter.counters().narinfo_prefetched.value(), 0);
    for (info, _) in &paths[1..] {
        assert!(substituter.narinfo(info.path.hash()).await.is_none());
    }
}

/// A closure of which nobody signed more than the top could be endless.
#[tokio::test(start_paused = true)]
async fn what_a_refused_path_refers_to_is_not_asked_for() {
    for (signed, asked) in [(1, 1), (2, 2), (5, 4)] {
        let upstream = Scripted::new("a");
        let paths = chain(5, 10);
        for (place, (info, nar)) in paths.iter().enumerate() {
            let mut info = info.clone();
            if place < signed {
                let store_dir = muster::nix::store_path::StoreDir::default();
                let fingerprint = muster::nix::fingerprint::of_path(&info, &store_dir);
                info.signatures = vec![key().sign(&fingerprint)];
            }
            upstream.add(&info, nar);
        }
        let trust = Trust::Keys(vec![key().public()]);
        let all = std::slice::from_ref(&upstream);
        let substituter = support::new_substituter(options(), setup(all, &trust, Encoding::None));
        look(&substituter, &paths[..1]).await;
        sleep(Duration::from_secs(1)).await;
        let prefetched = substituter.counters().narinfo_prefetched.value();
        assert_eq!(prefetched, signed as u64 - 1);
        assert_eq!(upstream.batches.load(Ordering::Relaxed), asked, "{signed}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_closure_that_is_too_large_is_fetched_up_to_its_bound() {
    let paths = chain(50, 10);
    let mut options = options();
    options.prefetch = Some(closure::Options {
        paths_max: 20,
        infos_max: 7,
        ..closure::Options::default()
    });
    let (upstream, substituter) = over(&paths, options);
    let whole = whole(Script::Answers, &paths);
    *upstream.closures.lock().unwrap() = Some(whole.clone());
    look(&substituter, &paths[..1]).await;
    sleep(Duration::from_secs(1)).await;
    assert_eq!(*whole.asked.lock().unwrap(), [7, 7, 6]);
    assert_eq!(substituter.counters().narinfo_prefetched.value(), 20);
}
