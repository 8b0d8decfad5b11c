//! Musters that ask each other: each answers another for its own store alone, so nothing goes round.

mod support;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use muster::nix::path_info::PathInfo;
use muster::substituter::Substituter;
use muster::substituter::member::Member;
use muster::upstream::Upstream;
use support::peer::{member, met, narinfo, setup_of};
use support::{Answer, Scripted, Served, get, nar_target, options, path, request, serve};

const OWN_STORE: &str = "Muster-Scope: own-store\r\n";

/// One muster: what it asks is told by `ask`, once the others have addresses.
struct Muster {
    substituter: Substituter,
    served: Served,
}

impl Muster {
    async fn new() -> Self {
        let substituter = support::new_substituter(options(), setup_of([]));
        let served = serve(substituter.clone()).await;
        Self {
            substituter,
            served,
        }
    }

    fn ask(&self, members: Vec<Member>) {
        self.substituter.replace(setup_of(members));
    }

    fn address(&self) -> SocketAddr {
        self.served.address
    }

    fn asked(&self) -> u64 {
        self.substituter.counters().narinfo_requests.value()
    }

    async fn narinfo(&self, info: &PathInfo) -> Answer {
        get(self.address(), &narinfo(info)).await
    }
}

/// What a muster offers to others.
async fn offers(muster: &Muster) -> Option<String> {
    let answer = get(muster.address(), "/nix-cache-info").await;
    answer.header("muster-offers").map(str::to_owned)
}

/// A muster as the upstream of another.
async fn peer(number: u16, address: SocketAddr) -> Member {
    member(number, met(address).await.0)
}

/// Two musters that name each other, each with a store of its own.
async fn two() -> [(Muster, Arc<Scripted>); 2] {
    let [a, b] = [Muster::new().await, Muster::new().await];
    let [own_a, own_b] = ["a", "b"].map(Scripted::new);
    let own =
        |own: &Arc<Scripted>| member(0, Arc::clone(own) as Arc<dyn Upstream>).of_own_store(true);
    // What a muster offers is read when it is met, so each has its store by then.
    a.ask(vec![own(&own_a)]);
    b.ask(vec![own(&own_b)]);
    for (muster, store, other) in [(&a, &own_a, &b), (&b, &own_b, &a)] {
        muster.ask(vec![own(store), peer(1, other.address()).await]);
    }
    [(a, own_a), (b, own_b)]
}

#[tokio::test(flavor = "multi_thread")]
async fn two_that_name_each_other_give_what_either_has() {
    let [(a, own_a), (b, own_b)] = two().await;
    let (of_a, nar_a) = path(1, 3000, &[]);
    let (of_b, nar_b) = path(2, 5 << 20, &[]);
    own_a.add(&of_a, &nar_a);
    own_b.add(&of_b, &nar_b);
    for muster in [&a, &b] {
        for (info, nar) in [(&of_a, &nar_a), (&of_b, &nar_b)] {
            let found = muster.narinfo(info).await;
            assert_eq!(found.status, 200);
            let got = get(muster.address(), &nar_target(&found)).await;
            assert_eq!(got.status, 200);
            assert!(got.body == *nar);
        }
    }
    // Vetting asks for paths that nobody has: they do not come back, so neither is taken for the other.
    for muster in [&a, &b] {
        let caring = muster.substituter.care();
        drop(tokio::time::timeout(Duration::from_secs(2), caring).await);
        let setup = muster.substituter.setup();
        assert!(setup.members.iter().all(|member| !member.is_ourselves()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_has_goes_one_step_and_no_further() {
    let [(a, _own_a), (b, _own_b)] = two().await;
    let before = (a.asked(), b.asked());
    let begun = Instant::now();
    for number in 0..50 {
        let (info, _) = path(100 + number, 10, &[]);
        assert_eq!(a.narinfo(&info).await.status, 404);
    }
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(5), "{took:?}");
    // Ours to a, and one of each from a to b; none comes back to a.
    assert_eq!((a.asked() - before.0, b.asked() - before.1), (50, 50));
    let unsure = a.substituter.counters().narinfo_absent_unsure.value();
    assert_eq!(unsure, 0, "a 404 without full knowledge");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_muster_is_answered_by_the_own_store_alone() {
    let muster = Muster::new().await;
    let [own, builder] = ["own", "builder"].map(Scripted::new);
    muster.ask(vec![
        member(0, Arc::clone(&own) as Arc<dyn Upstream>).of_own_store(true),
        member(1, Arc::clone(&builder) as Arc<dyn Upstream>),
    ]);
    let (here, nar_here) = path(1, 3000, &[]);
    let (there, nar_there) = path(2, 3000, &[]);
    own.add(&here, &nar_here);
    builder.add(&there, &nar_there);
    let found = request(muster.address(), "GET", &narinfo(&here), OWN_STORE).await;
    assert_eq!(found.status, 200);
    let nar = request(muster.address(), "GET", &nar_target(&found), OWN_STORE).await;
    assert!(nar.status == 200 && nar.body == nar_here);
    // Found for clients, and known from then on, it is still not told to musters.
    let found = muster.narinfo(&there).await;
    assert_eq!(found.status, 200);
    for target in [narinfo(&there), nar_target(&found)] {
        for method in ["GET", "HEAD"] {
            let answer = request(muster.address(), method, &target, OWN_STORE).await;
            assert_eq!(answer.status, 404, "{method} {target}");
            let answer = request(muster.address(), method, &target, "").await;
            assert_eq!(answer.status, 200, "{method} {target}");
        }
    }
    // A word that we do not know is no reason to withhold anything.
    let answer = request(
        muster.address(),
        "GET",
        &narinfo(&there),
        "Muster-Scope: x\r\n",
    )
    .await;
    assert_eq!(answer.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_muster_without_a_store_of_its_own_has_nothing_for_another() {
    let muster = Muster::new().await;
    let builder = Scripted::new("builder");
    muster.ask(vec![member(0, Arc::clone(&builder) as Arc<dyn Upstream>)]);
    let (info, nar) = path(1, 3000, &[]);
    builder.add(&info, &nar);
    let answer = request(muster.address(), "GET", &narinfo(&info), OWN_STORE).await;
    assert_eq!(answer.status, 404);
    assert_eq!(muster.narinfo(&info).await.status, 200);
    assert_eq!(offers(&muster).await.as_deref(), Some("h2c"));
    muster.ask(vec![
        member(0, Arc::clone(&builder) as Arc<dyn Upstream>).of_own_store(true),
    ]);
    assert_eq!(
        offers(&muster).await.as_deref(),
        Some("own-store, closure, h2c")
    );
}

/// So a laptop's muster may name that of an office, which gathers builders and has no store.
#[tokio::test(flavor = "multi_thread")]
async fn a_muster_without_a_store_of_its_own_is_asked_as_any_cache() {
    let [laptop, office] = [Muster::new().await, Muster::new().await];
    let builder = Scripted::new("builder");
    office.ask(vec![member(0, Arc::clone(&builder) as Arc<dyn Upstream>)]);
    laptop.ask(vec![peer(0, office.address()).await]);
    let (info, nar) = path(1, 3000, &[]);
    builder.add(&info, &nar);
    let found = laptop.narinfo(&info).await;
    assert_eq!(found.status, 200);
    let got = get(laptop.address(), &nar_target(&found)).await;
    assert!(got.status == 200 && got.body == nar);
}

/// Both are asked as any cache is, until the question that comes back tells each what the other leads to.
#[tokio::test(flavor = "multi_thread")]
async fn two_without_stores_that_name_each_other_do_not_go_round() {
    let [a, b] = [Muster::new().await, Muster::new().await];
    let builder = Scripted::new("builder");
    let (info, nar) = path(1, 3000, &[]);
    builder.add(&info, &nar);
    a.ask(vec![
        member(0, Arc::clone(&builder) as Arc<dyn Upstream>),
        peer(1, b.address()).await,
    ]);
    b.ask(vec![peer(1, a.address()).await]);
    for muster in [&a, &b] {
        drop(tokio::time::timeout(Duration::from_secs(2), muster.substituter.care()).await);
    }
    assert!(a.substituter.setup().members[1].is_ourselves());
    let before = a.asked() + b.asked();
    let begun = Instant::now();
    for number in 0..50 {
        let (info, _) = path(100 + number, 10, &[]);
        assert_eq!(a.narinfo(&info).await.status, 404);
        assert_eq!(b.narinfo(&info).await.status, 404);
    }
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(5), "{took:?}");
    // Ours, and at most one of each from the one to the other.
    let asked = a.asked() + b.asked() - before;
    assert!((100..=150).contains(&asked), "{asked}");
    assert_eq!(a.narinfo(&info).await.status, 200);
}

/// One that names itself is found out all the same, though it asks for the own store alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_muster_that_names_itself_finds_itself_out() {
    let muster = Muster::new().await;
    let own = Scripted::new("own");
    muster.ask(vec![
        member(0, Arc::clone(&own) as Arc<dyn Upstream>).of_own_store(true),
    ]);
    assert_eq!(
        offers(&muster).await.as_deref(),
        Some("own-store, closure, h2c")
    );
    muster.ask(vec![
        member(0, Arc::clone(&own) as Arc<dyn Upstream>).of_own_store(true),
        peer(1, muster.address()).await,
    ]);
    drop(tokio::time::timeout(Duration::from_secs(2), muster.substituter.care()).await);
    let setup = muster.substituter.setup();
    let ourselves: Vec<_> = setup.members.iter().map(|m| m.is_ourselves()).collect();
    assert_eq!(ourselves, [false, true]);
}
