//! Whole closures over real ssh and a real `nix-store --serve`, of the Nix that `MUSTER_TEST_NIX` names.

mod builder;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use builder::{Builder, Sshd, quick, up};
use muster::nix::store_path::StorePath;
use muster::upstream::closures::Closures;
use muster::upstream::served::ServedOptions;
use muster::upstream::worker::WorkerUpstream;
use muster::upstream::{Error, Upstream};
use tokio::time::sleep;

/// An upstream that asks for whole closures however near the builder is.
fn start(builder: &Builder, sshd: &Sshd, lifetime: Duration) -> WorkerUpstream {
    let mut options = quick();
    options.closures = Some(ServedOptions {
        round_trip_min: Duration::ZERO,
        lifetime,
        ..ServedOptions::default()
    });
    builder.over_ssh(builder.target(sshd.port), options)
}

async fn ready(upstream: &WorkerUpstream) -> Arc<dyn Closures> {
    for _ in 0..500 {
        if let Some(closures) = upstream.closures() {
            return closures;
        }
        sleep(Duration::from_millis(20)).await;
    }
    panic!("nix-store --serve does not come up");
}

/// A derivation that refers to a file, which refers to another.
fn derivation(builder: &Builder, name: &str) -> StorePath {
    let file = format!(r#"builtins.toFile "{name}-a" "a""#);
    let words = format!(r#"${{builtins.toFile "{name}-b" "${{{file}}}"}}"#);
    builder.build(name, &words).0
}

#[tokio::test]
async fn a_closure_and_its_path_infos_are_as_the_worker_protocol_tells_them() {
    let builder = Builder::new();
    let sshd = builder.sshd("");
    let top = derivation(&builder, "deep");
    let upstream = start(&builder, &sshd, Duration::from_secs(30));
    let closures = ready(&upstream).await;

    let closure = closures.paths(&top).await.unwrap();
    let told: BTreeSet<_> = closure.iter().cloned().collect();
    let requisites = builder.nix_store(&["-qR", &builder.store_dir.join(&top)]);
    let parse = |line| builder.store_dir.parse(line).unwrap();
    let expected: BTreeSet<StorePath> = requisites.lines().map(parse).collect();
    assert!(expected.len() >= 3, "{expected:?}");
    assert_eq!(told, expected);

    let mut asked = closure.clone();
    asked.push("0000000000000000000000000000000a-absent".parse().unwrap());
    let mut infos = closures.infos(&asked).await.unwrap();
    infos.sort_by(|a, b| a.path.cmp(&b.path));
    assert_eq!(infos.len(), closure.len());
    let paths: Vec<_> = infos.iter().map(|info| info.path.clone()).collect();
    let by_worker = upstream.path_infos(&paths).await;
    for (info, other) in infos.iter().zip(by_worker) {
        assert_eq!(Some(info), other.unwrap().as_ref());
    }
    assert!(infos.iter().any(|info| info.ca.is_some()));
}

#[tokio::test]
async fn a_top_that_is_gone_is_an_error_and_the_next_is_answered() {
    let builder = Builder::new();
    let sshd = builder.sshd("");
    let top = builder.add("top", b"top");
    let upstream = start(&builder, &sshd, Duration::from_secs(30));
    let closures = ready(&upstream).await;
    let absent = "0000000000000000000000000000000a-absent".parse().unwrap();
    let error = closures.paths(&absent).await.unwrap_err();
    assert!(matches!(error, Error::Lost(_)), "{error}");
    let closures = ready(&upstream).await;
    let closure = closures.paths(&top).await.unwrap();
    assert_eq!(closure, std::slice::from_ref(&top));

    // Likewise when the connection is lost.
    sshd.kill_sessions();
    while upstream.closures().is_some() {
        sleep(Duration::from_millis(20)).await;
    }
    let closures = ready(&upstream).await;
    assert_eq!(closures.paths(&top).await.unwrap(), [top]);
}

#[tokio::test]
async fn what_a_server_remembers_is_gone_after_its_lifetime() {
    let builder = Builder::new();
    let sshd = builder.sshd("");
    let top = builder.add("top", b"top");
    let lifetime = Duration::from_millis(1500);
    let upstream = start(&builder, &sshd, lifetime);
    let closures = ready(&upstream).await;
    assert_eq!(
        closures
            .infos(std::slice::from_ref(&top))
            .await
            .unwrap()
            .len(),
        1
    );
    drop(closures);
    builder.nix_store(&["--delete", &builder.store_dir.join(&top)]);
    sleep(lifetime + Duration::from_millis(500)).await;
    let closures = ready(&upstream).await;
    assert_eq!(closures.infos(&[top]).await.unwrap(), []);
}

#[tokio::test]
async fn an_account_that_refuses_is_remembered_and_looked_up_all_the_same() {
    let builder = Builder::new();
    let daemon = builder.path("bin/nix-daemon");
    let sshd = builder.sshd(&format!("ForceCommand {} --stdio", daemon.display()));
    let top = builder.add("top", b"top");
    let upstream = start(&builder, &sshd, Duration::from_secs(30));
    up(&upstream).await;
    let logins = || sshd.log().matches("Accepted publickey").count();
    // Look-ups, NARs, roots, and three that were refused: a daemon that ends may be a lost line.
    for _ in 0..250 {
        if logins() == 6 {
            break;
        }
        sleep(Duration::from_millis(20)).await;
    }
    sleep(Duration::from_secs(2)).await;
    assert!(upstream.closures().is_none());
    assert_eq!(logins(), 6, "{}", sshd.log());
    assert!(upstream.path_info(top.hash()).await.unwrap().is_some());
}

#[tokio::test]
async fn a_builder_nearby_is_not_logged_in_to_for_it() {
    let builder = Builder::new();
    let sshd = builder.sshd("");
    let mut options = quick();
    options.closures = Some(ServedOptions {
        round_trip_min: Duration::from_secs(2),
        ..ServedOptions::default()
    });
    let upstream = builder.over_ssh(builder.target(sshd.port), options);
    up(&upstream).await;
    sleep(Duration::from_secs(2)).await;
    assert!(upstream.closures().is_none());
    let logins = sshd.log().matches("Accepted publickey").count();
    assert_eq!(logins, 3, "{}", sshd.log());
}
