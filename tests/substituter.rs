//! Many scripted upstreams seen as one: who is waited for, what is asked, what is kept.

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::future::join_all;
use muster::codec::compression::Encoding;
use muster::nix::fingerprint;
use muster::nix::path_info::{PathInfo, Trust};
use muster::nix::store_path::StoreDir;
use muster::substituter::Substituter;
use muster::substituter::nar_url::NarUrl;
use muster::substituter::transfer::{Extent, NarBody};
use muster::upstream::Link;
use support::*;
use tokio::time::{sleep, timeout};

fn up() -> Link {
    Link::Up {
        peer: "scripted".into(),
    }
}

async fn found(substituter: &Substituter, info: &PathInfo) -> bool {
    substituter.narinfo(info.path.hash()).await.is_some()
}

#[tokio::test(start_paused = true)]
async fn the_first_answer_is_served_and_a_silent_builder_costs_nothing() {
    let (a, b) = (Scripted::new("a"), Scripted::new("b"));
    let (info, nar) = path(1, 100, &[]);
    b.add(&info, &nar);
    *a.silent.lock().unwrap() = true;
    *b.delay.lock().unwrap() = Duration::from_millis(5);
    let substituter = substituter(&[a, b]);
    let asked = tokio::time::Instant::now();
    assert!(found(&substituter, &info).await);
    assert!(asked.elapsed() < Duration::from_millis(50));
}

#[tokio::test(start_paused = true)]
async fn a_miss_waits_for_a_loaded_builder_and_for_one_that_connects() {
    let (a, b) = (Scripted::new("a"), Scripted::new("b"));
    let (info, nar) = path(1, 100, &[]);
    b.add(&info, &nar);
    *b.delay.lock().unwrap() = Duration::from_secs(9);
    let both = substituter(&[Arc::clone(&a), Arc::clone(&b)]);
    assert!(found(&both, &info).await);

    *b.delay.lock().unwrap() = Duration::ZERO;
    b.connecting();
    let both = substituter(&[a, Arc::clone(&b)]);
    let asked = tokio::time::Instant::now();
    let connect = async {
        sleep(Duration::from_secs(3)).await;
        b.set_link(up());
    };
    let (found, ()) = tokio::join!(found(&both, &info), connect);
    assert!(found);
    assert!(asked.elapsed() < Duration::from_millis(3100));
}

#[tokio::test]
async fn a_sick_builder_is_not_waited_for_and_a_404_without_it_is_counted() {
    let (a, b) = (Scripted::new("a"), Scripted::new("b"));
    let (info, nar) = path(1, 100, &[]);
    b.add(&info, &nar);
    b.down();
    let substituter = substituter(&[Arc::clone(&a), Arc::clone(&b)]);
    let asked = Instant::now();
    assert!(!found(&substituter, &info).await);
    assert!(asked.elapsed() < Duration::from_millis(100));
    assert_eq!(b.questions.load(Ordering::Relaxed), 0);
    assert_eq!(substituter.counters().narinfo_absent_unsure.value(), 1);

    // Not remembered: it is found as soon as the builder is back.
    b.set_link(up());
    assert!(found(&substituter, &info).await);
    // And what is known of it is answered while it is sick.
    b.down();
    assert!(found(&substituter, &info).await);
    assert_eq!(substituter.counters().narinfo_absent.value(), 0);
}

/// As in databases of old; Nix takes a narinfo with it for a corrupt one.
#[tokio::test]
async fn a_path_of_unknown_size_is_not_offered_and_another_builder_may_know_it() {
    let (a, b) = (Scripted::new("a"), Scripted::new("b"));
    let (info, nar) = path(1, 100, &[]);
    let mut unknown = info.clone();
    unknown.nar_size = 0;
    a.add(&unknown, &nar);
    let substituter = substituter(&[Arc::clone(&a), Arc::clone(&b)]);
    assert!(!found(&substituter, &info).await);
    assert_eq!(substituter.counters().narinfo_absent_unsure.value(), 1);
    b.add(&info, &nar);
    assert!(found(&substituter, &info).await);
}

#[tokio::test(start_paused = true)]
async fn a_404_with_full_knowledge_is_remembered_for_its_time_only() {
    let a = Scripted::new("a");
    let (info, nar) = path(1, 100, &[]);
    let mut options = options();
    options.memory.negative_ttl = Duration::from_millis(100);
    let setup = setup(std::slice::from_ref(&a), &Trust::Operator, Encoding::None);
    let substituter = support::new_substituter(options, setup);
    assert!(!found(&substituter, &info).await);
    a.add(&info, &nar);
    assert!(!found(&substituter, &info).await);
    assert_eq!(a.questions.load(Ordering::Relaxed), 1);
    // The memory runs on the real clock.
    std::thread::sleep(Duration::from_millis(150));
    assert!(found(&substituter, &info).await);
}

#[tokio::test(start_paused = true)]
async fn two_timeouts_make_a_builder_sick_and_a_probe_heals_it() {
    let (a, b) = (Scripted::new("a"), Scripted::new("b"));
    *b.silent.lock().unwrap() = true;
    let substituter = substituter(&[a, Arc::clone(&b)]);
    let mut waits = Vec::new();
    for number in 0..3 {
        let (info, _) = path(number, 1, &[]);
        let asked = tokio::time::Instant::now();
        assert!(!found(&substituter, &info).await);
        waits.push(asked.elapsed().as_secs());
    }
    assert_eq!(waits, [10, 10, 0]);
    *b.silent.lock().unwrap() = false;
    let care = substituter.care();
    assert!(timeout(Duration::from_secs(2), care).await.is_err());
    let (info, nar) = path(9, 1, &[]);
    b.add(&info, &nar);
    assert!(found(&substituter, &info).await);
}

fn nar_url(info: &PathInfo) -> NarUrl {
    NarUrl {
        path_hash: info.path.hash(),
        nar_hash: info.nar_hash,
        file_hash: None,
        encoding: Encoding::None,
    }
}

async fn whole_nar(substituter: &Substituter, info: &PathInfo) -> Option<bytes::Bytes> {
    match substituter.nar(&nar_url(info), Extent::Whole).await?.body {
        NarBody::Whole(bytes) => Some(bytes),
        _ => panic!("it is small"),
    }
}

/// Lets a builder time out twice, so that it is connected and sick.
async fn make_sick(substituter: &Substituter, builder: &Scripted) {
    *builder.silent.lock().unwrap() = true;
    for number in 900..902 {
        assert!(!found(substituter, &path(number, 1, &[]).0).await);
    }
}

#[tokio::test(start_paused = true)]
async fn a_sick_holder_is_tried_last_for_a_nar_and_costs_a_look_up_nothing() {
    let (a, b) = (Scripted::new("a"), Scripted::new("b"));
    let (info, nar) = path(1, 100, &[]);
    let (both, both_nar) = path(2, 100, &[]);
    let (new, new_nar) = path(3, 100, &[]);
    for (info, nar) in [(&info, &nar), (&both, &both_nar), (&new, &new_nar)] {
        b.add(info, nar);
    }
    a.add(&both, &both_nar);
    let setup = setup(
        &[Arc::clone(&a), Arc::clone(&b)],
        &Trust::Operator,
        Encoding::None,
    );
    // What is kept would be given from there.
    let substituter = Substituter::new(options(), setup, None);
    assert!(found(&substituter, &info).await && found(&substituter, &both).await);
    sleep(Duration::from_millis(1)).await;
    make_sick(&substituter, &b).await;
    let nars = || b.nars.load(Ordering::Relaxed);

    // Silent still: a 404, as late as the last holder is waited for, and no look-up waits for it.
    let asked = tokio::time::Instant::now();
    let nobody = path(4, 1, &[]).0;
    let (given, looked_up) = tokio::join!(whole_nar(&substituter, &info), async {
        let unknown = found(&substituter, &nobody).await;
        let known = found(&substituter, &info).await;
        (unknown, known, asked.elapsed())
    });
    assert_eq!((given, nars()), (None, 1));
    let last = options().transfer.stall_last;
    assert!(
        (last..last * 2).contains(&asked.elapsed()),
        "{:?}",
        asked.elapsed()
    );
    let (unknown, known, took) = looked_up;
    assert!(
        !unknown && known && took < Duration::from_millis(50),
        "{took:?}"
    );

    // Another holder is well: the sick one is not asked.
    assert_eq!(whole_nar(&substituter, &both).await, Some(both_nar));
    assert_eq!(nars(), 1);

    // Slow, but alive: one slow answer, for what a client remembers from long ago, too.
    *b.silent.lock().unwrap() = false;
    *b.delay.lock().unwrap() = last - Duration::from_millis(100);
    assert_eq!(whole_nar(&substituter, &info).await, Some(nar.clone()));
    make_sick(&substituter, &b).await;
    *b.silent.lock().unwrap() = false;
    assert!(!found(&substituter, &new).await, "a look-up does not wait");
    assert_eq!(whole_nar(&substituter, &new).await, Some(new_nar));
}

#[tokio::test(start_paused = true)]
async fn a_sick_holder_takes_over_when_the_last_well_one_breaks() {
    let (a, b) = (Scripted::new("a"), Scripted::new("b"));
    let (info, nar) = path(1, 100_000, &[]);
    for builder in [&a, &b] {
        builder.add(&info, &nar);
    }
    let substituter = substituter(&[Arc::clone(&a), Arc::clone(&b)]);
    assert!(found(&substituter, &info).await);
    sleep(Duration::from_millis(1)).await;
    make_sick(&substituter, &b).await;
    *b.silent.lock().unwrap() = false;
    *a.nar_script.lock().unwrap() = NarScript::BreakAt(70_000);
    assert_eq!(whole_nar(&substituter, &info).await, Some(nar));
    assert_eq!(b.nars.load(Ordering::Relaxed), 1);
}

#[tokio::test(start_paused = true)]
async fn equal_questions_are_asked_once_and_outlive_their_first_asker() {
    let a = Scripted::new("a");
    let (info, nar) = path(1, 100, &[]);
    a.add(&info, &nar);
    *a.delay.lock().unwrap() = Duration::from_secs(1);
    let substituter = substituter(std::slice::from_ref(&a));
    let first = timeout(Duration::from_millis(500), found(&substituter, &info));
    let others = futures_util::future::join_all((0..50).map(|_| found(&substituter, &info)));
    let (first, others) = tokio::join!(first, others);
    assert!(first.is_err());
    assert!(others.into_iter().all(|found| found));
    assert_eq!(a.questions.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_closure_is_fetched_before_it_is_asked_for() {
    let a = Scripted::new("a");
    let mut paths: Vec<(PathInfo, bytes::Bytes)> = Vec::new();
    for number in 0..200_u32 {
        let below = number.saturating_sub(7) as usize..number as usize;
        let references: Vec<_> = paths[below].iter().map(|(info, _)| info).collect();
        let made = path(number, 10, &references);
        paths.push(made);
    }
    for (info, nar) in &paths {
        a.add(info, nar);
    }
    let substituter = substituter(std::slice::from_ref(&a));
    let (top, _) = &paths[199];
    assert!(found(&substituter, top).await);
    while substituter.counters().narinfo_prefetched.value() < 199 {
        sleep(Duration::from_millis(5)).await;
    }
    for (info, _) in &paths {
        assert!(found(&substituter, info).await);
    }
    assert_eq!(a.questions.load(Ordering::Relaxed), 1);
    // One batch for each level, none twice.
    assert!(a.batches.load(Ordering::Relaxed) <= 30);
}

#[tokio::test(start_paused = true)]
async fn a_question_for_what_is_being_fetched_joins_it() {
    let (a, b) = (Scripted::new("a"), Scripted::new("b"));
    let low = path(1, 10, &[]);
    let top = path(2, 10, &[&low.0]);
    for (info, nar) in [&low, &top] {
        a.add(info, nar);
    }
    let substituter = substituter(&[Arc::clone(&a), Arc::clone(&b)]);
    assert!(found(&substituter, &top.0).await);
    *a.delay.lock().unwrap() = Duration::from_millis(100);
    // Lets the walk begin.
    sleep(Duration::from_millis(1)).await;
    assert!(found(&substituter, &low.0).await);
    assert_eq!(a.questions.load(Ordering::Relaxed), 1);

    // What the walk cannot tell is asked for in the ordinary way.
    let low = path(3, 10, &[]);
    let top = path(4, 10, &[&low.0]);
    a.add(&top.0, &top.1);
    b.add(&low.0, &low.1);
    assert!(found(&substituter, &top.0).await);
    assert!(found(&substituter, &low.0).await);
}

#[tokio::test(start_paused = true)]
async fn a_builder_that_falls_silent_while_a_closure_is_fetched_does_not_hold_up_the_others() {
    let (a, b) = (Scripted::new("a"), Scripted::new("b"));
    let low = path(1, 10, &[]);
    let top = path(2, 10, &[&low.0]);
    a.add(&top.0, &top.1);
    a.add(&low.0, &low.1);
    b.add(&low.0, &low.1);
    let substituter = substituter(&[Arc::clone(&a), b]);
    assert!(found(&substituter, &top.0).await);
    *a.silent.lock().unwrap() = true;
    sleep(Duration::from_millis(1)).await;
    let asked = tokio::time::Instant::now();
    assert!(found(&substituter, &low.0).await);
    assert!(asked.elapsed() < Duration::from_millis(500));
}

#[tokio::test]
async fn unsigned_answers_of_an_untrusted_upstream_are_refused() {
    let a = Scripted::new("a");
    let (unsigned, nar) = path(1, 100, &[]);
    let (mut signed, other_nar) = path(2, 100, &[]);
    let listed = muster::nix::signature::SecretKey::from_seed(
        muster::nix::signature::KeyName::new("builder-1").unwrap(),
        &[9; 32].into(),
    );
    let text = fingerprint::of_path(&signed, &StoreDir::default());
    signed.signatures.push(listed.sign(&text));
    a.add(&unsigned, &nar);
    a.add(&signed, &other_nar);
    let trust = Trust::Keys(vec![listed.public()]);
    let setup = setup(&[a], &trust, Encoding::None);
    let substituter = support::new_substituter(options(), setup);
    assert!(!found(&substituter, &unsigned).await);
    let text = substituter.narinfo(signed.path.hash()).await.unwrap();
    let text = std::str::from_utf8(&text).unwrap();
    assert!(
        text.contains("Sig: builder-1:") && text.contains("Sig: test-1:"),
        "{text}"
    );
    assert_eq!(
        substituter.setup().members[0]
            .refused
            .load(Ordering::Relaxed),
        1
    );
}

#[tokio::test]
async fn stale_answers_are_given_at_once_and_checked_behind() {
    let a = Scripted::new("a");
    let (info, nar) = path(1, 100, &[]);
    a.add(&info, &nar);
    let mut options = options();
    options.memory.revalidate_after = Duration::from_millis(30);
    let setup = setup(std::slice::from_ref(&a), &Trust::Operator, Encoding::None);
    let substituter = support::new_substituter(options, setup);
    assert!(found(&substituter, &info).await);
    sleep(Duration::from_millis(50)).await;
    a.remove(&info);
    // The client does not wait for the check; the one after it gets its result.
    assert!(found(&substituter, &info).await);
    sleep(Duration::from_millis(50)).await;
    assert!(!found(&substituter, &info).await);
}

#[tokio::test]
async fn what_its_only_holder_denies_is_not_believed_because_another_builder_is_sick() {
    let (a, b) = (Scripted::new("a"), Scripted::new("b"));
    let (info, nar) = path(1, 100, &[]);
    a.add(&info, &nar);
    b.down();
    let mut options = options();
    options.memory.revalidate_after = Duration::from_millis(30);
    // Keeping it alive would find out, too.
    options.keep_interval = Duration::from_secs(3600);
    let upstreams = [Arc::clone(&a), Arc::clone(&b)];
    let setup = setup(&upstreams, &Trust::Operator, Encoding::None);
    let substituter = support::new_substituter(options, setup);
    assert!(found(&substituter, &info).await);
    sleep(Duration::from_millis(50)).await;
    a.remove(&info);
    assert!(found(&substituter, &info).await);
    sleep(Duration::from_millis(50)).await;
    assert!(!found(&substituter, &info).await);

    // While the holder itself is sick it is believed.
    a.add(&info, &nar);
    assert!(found(&substituter, &info).await);
    a.down();
    for _ in 0..3 {
        sleep(Duration::from_millis(50)).await;
        assert!(found(&substituter, &info).await);
    }
}

#[tokio::test(start_paused = true)]
async fn trust_withdrawn_while_a_question_runs_is_not_served() {
    let (a, b) = (Scripted::new("a"), Scripted::new("b"));
    let (low, low_nar) = path(1, 100, &[]);
    let (top, top_nar) = path(2, 100, &[&low]);
    a.add(&low, &low_nar);
    a.add(&top, &top_nar);
    *a.delay.lock().unwrap() = Duration::from_secs(1);
    let substituter = substituter(std::slice::from_ref(&a));
    let replace = async {
        sleep(Duration::from_millis(500)).await;
        substituter.replace(setup(&[], &Trust::Operator, Encoding::None));
    };
    let (asked, ()) = tokio::join!(found(&substituter, &top), replace);
    assert!(!asked);
    assert!(!found(&substituter, &top).await);

    // The same while a closure is fetched.
    substituter.replace(setup(
        std::slice::from_ref(&a),
        &Trust::Operator,
        Encoding::None,
    ));
    assert!(found(&substituter, &top).await);
    sleep(Duration::from_millis(500)).await;
    substituter.replace(setup(&[], &Trust::Operator, Encoding::None));
    assert!(!found(&substituter, &low).await);
    sleep(Duration::from_secs(2)).await;
    assert!(!found(&substituter, &low).await);
    assert_eq!(substituter.counters().narinfo_prefetched.value(), 0);

    // And what is new at a reload is asked by those who wait already.
    b.add(&low, &low_nar);
    substituter.replace(setup(
        std::slice::from_ref(&a),
        &Trust::Operator,
        Encoding::None,
    ));
    a.remove(&low);
    let replace = async {
        sleep(Duration::from_millis(500)).await;
        substituter.replace(setup(&[b], &Trust::Operator, Encoding::None));
    };
    let (asked, ()) = tokio::join!(found(&substituter, &low), replace);
    assert!(asked);
}

#[tokio::test(start_paused = true)]
async fn one_late_batch_does_not_make_a_builder_sick() {
    let a = Scripted::new("a");
    let below: Vec<_> = (0..50).map(|number| path(number, 10, &[])).collect();
    let references: Vec<_> = below.iter().map(|(info, _)| info).collect();
    let (top, nar) = path(99, 10, &references);
    a.add(&top, &nar);
    let substituter = substituter(std::slice::from_ref(&a));
    assert!(found(&substituter, &top).await);
    *a.silent.lock().unwrap() = true;
    sleep(Duration::from_secs(11)).await;
    *a.silent.lock().unwrap() = false;
    a.add(&below[0].0, &below[0].1);
    assert!(found(&substituter, &below[0].0).await);
}

/// Longer than promised paths are gathered before they are kept alive.
const GATHERED: Duration = Duration::from_millis(60);

#[tokio::test(start_paused = true)]
async fn paths_promised_within_a_moment_are_kept_alive_at_one_go() {
    let [a, b] = ["a", "b"].map(Scripted::new);
    let paths: Vec<_> = (0..40).map(|number| path(number, 10, &[])).collect();
    for (info, nar) in &paths {
        a.add(info, nar);
    }
    for (info, nar) in &paths[..20] {
        b.add(info, nar);
    }
    let substituter = substituter(&[a.clone(), b.clone()]);
    // Asked second, so that a is the first holder of all.
    *b.delay.lock().unwrap() = Duration::from_millis(1);
    let all = join_all(paths.iter().map(|(info, _)| found(&substituter, info)));
    assert!(all.await.into_iter().all(|found| found));
    // Until b has answered, too.
    sleep(Duration::from_millis(5)).await;
    // Gone from a since: b keeps those that it has.
    for (info, _) in &paths[10..30] {
        a.remove(info);
    }
    sleep(GATHERED).await;
    let together = |upstream: &Scripted| upstream.kept_together.lock().unwrap().clone();
    assert_eq!((together(&a), together(&b)), (vec![40], vec![10]));
    assert!(!found(&substituter, &paths[25].0).await, "nobody has it");
    assert!(found(&substituter, &paths[15].0).await, "b has it");
}

#[tokio::test(start_paused = true)]
async fn what_is_served_is_kept_alive_and_what_is_gone_is_forgotten() {
    let a = Scripted::new("a");
    let (info, nar) = path(1, 100, &[]);
    a.add(&info, &nar);
    let substituter = substituter(std::slice::from_ref(&a));
    assert!(found(&substituter, &info).await);
    sleep(GATHERED).await;
    assert_eq!(
        a.kept.lock().unwrap().as_slice(),
        std::slice::from_ref(&info.path)
    );
    assert!(found(&substituter, &info).await);
    sleep(GATHERED).await;
    assert_eq!(a.kept.lock().unwrap().len(), 1);

    let (gone, nar) = path(2, 100, &[&info]);
    let (top, top_nar) = path(3, 100, &[&gone]);
    a.add(&gone, &nar);
    a.add(&top, &top_nar);
    assert!(found(&substituter, &top).await);
    sleep(GATHERED).await;
    a.remove(&gone);
    // Fetched ahead, so still answered once; keeping it alive shows that it is gone.
    assert!(found(&substituter, &gone).await);
    sleep(GATHERED).await;
    assert!(!found(&substituter, &gone).await);
}

#[tokio::test]
async fn late_answers_are_further_holders() {
    let (a, b) = (Scripted::new("a"), Scripted::new("b"));
    let (info, nar) = path(1, 100, &[]);
    a.add(&info, &nar);
    b.add(&info, &nar);
    *b.delay.lock().unwrap() = Duration::from_millis(30);
    let substituter = substituter(&[Arc::clone(&a), Arc::clone(&b)]);
    let served = serve(substituter).await;
    let target = format!("/{}.narinfo", info.path.hash());
    let target = nar_target(&get(served.address, &target).await);
    sleep(Duration::from_millis(100)).await;
    a.down();
    let asked = b.questions.load(Ordering::Relaxed);
    assert_eq!(get(served.address, &target).await.body, nar);
    assert_eq!(b.questions.load(Ordering::Relaxed), asked);
}

/// It answers first, so that its NAR hash would be served again and again, and nobody else has such a NAR.
#[tokio::test]
async fn who_gave_wrong_bytes_does_not_say_what_a_path_is() {
    let (liar, b) = (Scripted::new("liar"), Scripted::new("b"));
    let (info, nar) = path(1, 100, &[]);
    let (other, other_nar) = path(1, 200, &[]);
    assert!(other.path == info.path && other.nar_hash != info.nar_hash);
    liar.add(&other, &vec![b'x'; other_nar.len()].into());
    b.add(&info, &nar);
    *b.delay.lock().unwrap() = Duration::from_millis(30);
    let served = serve(substituter(&[Arc::clone(&liar), b])).await;
    let target = format!("/{}.narinfo", info.path.hash());
    let lie = get(served.address, &target).await;
    assert!(lie.text().contains(&other.nar_hash.to_string()));
    assert_eq!(get(served.address, &nar_target(&lie)).await.status, 404);
    let truth = get(served.address, &target).await;
    assert!(truth.text().contains(&info.nar_hash.to_string()));
    assert_eq!(get(served.address, &nar_target(&truth)).await.body, nar);
}

/// An upstream whose questions come back to the substituter that asks them.
mod mirror {
    use std::sync::OnceLock;

    use async_trait::async_trait;
    use muster::nix::path_info::PathInfo;
    use muster::nix::store_path::{StorePath, StorePathHash};
    use muster::substituter::Substituter;
    use muster::upstream::{Error, Link, NarStream, Upstream};
    use tokio::sync::watch;

    pub struct Mirror {
        pub substituter: OnceLock<Substituter>,
        pub link: watch::Sender<Link>,
    }

    #[async_trait]
    impl Upstream for Mirror {
        fn name(&self) -> &str {
            "mirror"
        }

        fn link(&self) -> watch::Receiver<Link> {
            self.link.subscribe()
        }

        async fn path_info(&self, hash: StorePathHash) -> Result<Option<PathInfo>, Error> {
            let substituter = self.substituter.get().unwrap();
            assert!(substituter.narinfo(hash).await.is_none());
            Ok(None)
        }

        async fn path_infos(&self, paths: &[StorePath]) -> Vec<Result<Option<PathInfo>, Error>> {
            paths.iter().map(|_| Ok(None)).collect()
        }

        async fn nar(&self, _: &PathInfo) -> Result<Option<NarStream>, Error> {
            Ok(None)
        }

        async fn keep(&self, _: &StorePath) -> Result<bool, Error> {
            Ok(false)
        }
    }
}

#[tokio::test]
async fn an_upstream_that_is_ourselves_is_found_out() {
    let mirror = Arc::new(mirror::Mirror {
        substituter: std::sync::OnceLock::new(),
        link: tokio::sync::watch::Sender::new(up()),
    });
    let mut setup = setup(&[], &Trust::Operator, Encoding::None);
    setup
        .members
        .push(Arc::new(muster::substituter::member::Member::new(
            muster::cache::memory::UpstreamId(0),
            Arc::clone(&mirror) as Arc<dyn muster::upstream::Upstream>,
            Trust::Operator,
            muster::substituter::health::Options::default(),
            tokio::time::Instant::now().into_std(),
        )));
    let substituter = support::new_substituter(options(), setup);
    assert!(mirror.substituter.set(substituter.clone()).is_ok());
    let _ = timeout(Duration::from_millis(600), substituter.care()).await;
    assert!(substituter.setup().members[0].is_ourselves());
    let (info, _) = path(1, 1, &[]);
    assert!(!found(&substituter, &info).await);
    // What we would have told ourselves is no lack of knowledge.
    assert_eq!(substituter.counters().narinfo_absent.value(), 1);
    assert_eq!(substituter.counters().narinfo_absent_unsure.value(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_answer_under_way_over_a_reload_is_signed_with_the_new_key() {
    let a = Scripted::new("a");
    let (info, nar) = path(1, 100, &[]);
    a.add(&info, &nar);
    *a.delay.lock().unwrap() = Duration::from_secs(1);
    let first = setup(&[a], &Trust::Operator, Encoding::None);
    let member = Arc::clone(&first.members[0]);
    let rotated = |mut setup: muster::substituter::Setup| {
        let name = muster::nix::signature::KeyName::new("new-1").unwrap();
        let new = muster::nix::signature::SecretKey::from_seed(name, &[8; 32].into());
        setup.members = vec![Arc::clone(&member)];
        setup.publisher.keys = vec![new];
        setup
    };
    let second = rotated(setup(&[], &Trust::Operator, Encoding::None));
    let substituter = support::new_substituter(options(), first);
    let reload = async {
        sleep(Duration::from_millis(500)).await;
        substituter.replace(second);
    };
    let (asked, ()) = tokio::join!(substituter.narinfo(info.path.hash()), reload);
    for text in [asked, substituter.narinfo(info.path.hash()).await] {
        let text = String::from_utf8(text.unwrap().to_vec()).unwrap();
        assert!(
            text.contains("Sig: new-1:") && !text.contains("Sig: test-1:"),
            "{text}"
        );
    }
}

#[tokio::test]
async fn a_reload_that_adds_a_builder_keeps_what_is_known_of_a_sick_one() {
    let (a, b) = (Scripted::new("a"), Scripted::new("b"));
    let (info, nar) = path(1, 100, &[]);
    let (other, other_nar) = path(2, 100, &[]);
    a.add(&info, &nar);
    b.add(&other, &other_nar);
    let first = setup(&[Arc::clone(&a)], &Trust::Operator, Encoding::None);
    let mut more = setup(&[Arc::clone(&a), b], &Trust::Operator, Encoding::None);
    more.members[0] = Arc::clone(&first.members[0]);
    let mut fewer = setup(&[], &Trust::Operator, Encoding::None);
    fewer.members = vec![Arc::clone(&more.members[1])];
    let substituter = support::new_substituter(options(), first);
    assert!(found(&substituter, &info).await);
    assert!(!found(&substituter, &other).await);
    a.down();
    substituter.replace(more);
    assert!(found(&substituter, &info).await);
    assert!(
        found(&substituter, &other).await,
        "the old 404 is forgotten"
    );
    substituter.replace(fewer);
    assert!(!found(&substituter, &info).await, "nobody vouches for it");
}

#[tokio::test(start_paused = true)]
async fn a_transfer_that_nobody_reads_makes_room_and_goes_on_where_it_was() {
    let a = Scripted::new("a");
    let (info, nar) = path(1, 6 << 20, &[]);
    a.add(&info, &nar);
    // A builder that gives one large NAR at a time.
    *a.nars_max.lock().unwrap() = Some(Arc::new(tokio::sync::Semaphore::new(1)));
    // Where NARs are kept, a slow client reads the file instead.
    let setup = setup(&[a], &Trust::Operator, Encoding::None);
    let substituter = Substituter::new(options(), setup, None);
    let url = NarUrl {
        path_hash: info.path.hash(),
        nar_hash: info.nar_hash,
        file_hash: None,
        encoding: Encoding::None,
    };
    let open = async || match substituter
        .nar(&url, Extent::Whole)
        .await
        .expect("it is there")
        .body
    {
        NarBody::Stream(stream) => stream,
        _ => panic!("it is large"),
    };
    let mut stopped = open().await;
    let first = stopped.next().await.unwrap().unwrap();
    let asked = tokio::time::Instant::now();
    let mut other = open().await;
    let waited = asked.elapsed();
    assert!(
        (Duration::from_secs(19)..Duration::from_secs(25)).contains(&waited),
        "{waited:?}"
    );
    let mut read = Vec::new();
    while let Some(chunk) = other.next().await {
        read.extend(chunk.unwrap());
    }
    assert_eq!(read, nar);
    drop(other);
    let mut read = first.to_vec();
    while let Some(chunk) = stopped.next().await {
        read.extend(chunk.unwrap());
    }
    assert_eq!(read, nar);
}
