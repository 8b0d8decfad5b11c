//! Promises 1, 2 and 6: a broken builder never breaks a build, in whatever way it is broken.

mod rig;

use std::thread;
use std::time::Duration;

use rig::{Lab, Line, Machine, Muster, eventually};

/// What a builder does instead of answering.
#[derive(Debug, Clone, Copy)]
enum Fault {
    RefusesConnections,
    NeverAnswers,
    DropsPackets,
    IsUnplugged,
    IsFrozen,
}

use Fault::{DropsPackets, IsFrozen, IsUnplugged, NeverAnswers, RefusesConnections};

impl Fault {
    fn befall(self, builder: &Machine) {
        match self {
            RefusesConnections => builder.dead(),
            NeverAnswers => builder.hang(),
            DropsPackets => builder.blackhole(true),
            IsUnplugged => builder.unplug(true),
            IsFrozen => builder.freeze(),
        }
    }

    fn mend(self, builder: &Machine) {
        match self {
            DropsPackets => builder.blackhole(false),
            IsUnplugged => builder.unplug(false),
            RefusesConnections | NeverAnswers | IsFrozen => {}
        }
        builder.heal();
    }
}

#[test]
fn a_builder_broken_before_the_start_costs_nothing() {
    let lab = Lab::new();
    let (b1, b2) = (lab.builder("b1"), lab.builder("b2"));
    let client = lab.client(&["b1", "b2"]);
    let foo = b2.build_one("fooRef", "--arg n 6");
    for fault in [RefusesConnections, NeverAnswers, DropsPackets, IsUnplugged] {
        fault.befall(&b1);
        client.fresh_store();
        let muster = Muster::serve(&client, "");
        client.substitutes_from(&muster);
        let got = client.realise_attr("fooRef", "--arg n 6").ok();
        assert_eq!(
            (got.built(), got.copied()),
            (0, 7),
            "b1 {fault:?}: {got}\n{}",
            muster.log()
        );
        assert_eq!(got.out.trim(), foo);
        assert!(got.secs < 10.0, "b1 {fault:?}: {got}\n{}", muster.log());
        fault.mend(&b1);
    }
}

#[test]
fn a_builder_that_breaks_while_connected_costs_little() {
    let lab = Lab::new();
    let (b1, b2) = (lab.builder("b1"), lab.builder("b2"));
    let client = lab.client(&["b1", "b2"]);
    b2.build_one("fooRef", "--arg n 6");
    for fault in [
        RefusesConnections,
        NeverAnswers,
        DropsPackets,
        IsUnplugged,
        IsFrozen,
    ] {
        let muster = Muster::serve(&client, "");
        client.substitutes_from(&muster);
        client.fresh_store();
        let missing = client
            .realise("/nix/store/00000000000000000000000000000000-connects")
            .failed();
        fault.befall(&b1);
        let got = client.realise_attr("fooRef", "--arg n 6").ok();
        assert_eq!(got.built(), 0, "b1 {fault:?}: {got}\n{}", muster.log());
        assert!(
            got.secs < 10.0,
            "b1 {fault:?}: {got}\n{missing}\n{}",
            muster.log()
        );
        fault.mend(&b1);
    }
}

#[test]
fn with_every_builder_down_it_starts_and_clients_build() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let client = lab.client(&["b1", "nowhere"]);
    for fault in [RefusesConnections, NeverAnswers, DropsPackets, IsUnplugged] {
        fault.befall(&b1);
        client.fresh_store();
        let mut muster = Muster::serve(&client, "");
        client.substitutes_from(&muster);
        assert_eq!(muster.get("/nix-cache-info").status, 200, "b1 {fault:?}");
        let got = client.realise_attr("tiny", "").ok();
        assert_eq!(got.built(), 1, "b1 {fault:?}: {got}");
        assert!(got.secs < 20.0, "b1 {fault:?}: {got}\n{}", muster.log());
        fault.mend(&b1);
    }
}

#[test]
fn a_builder_that_comes_back_is_used_again() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let client = lab.client(&["b1"]);
    let paths: Vec<_> = ["x", "y"]
        .iter()
        .map(|s| b1.build_one("tiny", &format!("--argstr seed {s}")))
        .collect();
    client.write("/etc/muster.toml", "negative-ttl = 1\n");
    b1.dead();
    let mut muster = Muster::serve(&client, "--config /etc/muster.toml");
    client.substitutes_from(&muster);
    for path in &paths {
        client.realise(path).failed();
        b1.heal();
        assert!(
            eventually(40.0, || muster.narinfo(path).status == 200),
            "{}",
            muster.log()
        );
        client.forget_lookups();
        let got = client.realise(path).ok();
        assert_eq!((got.built(), got.copied()), (0, 1), "{got}");
        b1.dead();
    }
}

#[test]
fn what_is_known_of_a_sick_builder_is_still_answered() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let client = lab.client(&["b1"]);
    let path = b1.build_one("tiny", "");
    let mut muster = Muster::serve(&client, "");
    let before = muster.narinfo(&path);
    assert_eq!(before.status, 200);
    b1.dead();
    thread::sleep(Duration::from_secs(3));
    let after = muster.narinfo(&path);
    assert_eq!((after.status, after.text()), (200, before.text()));
}

#[test]
fn a_transfer_survives_its_builder() {
    let lab = Lab::new();
    let (b1, b2) = (lab.builder("b1"), lab.builder("b2"));
    let client = lab.client(&["b1", "b2"]);
    for compression in ["none", "zstd"] {
        // Which of the two Muster takes is its own affair, so each dies once.
        for victim in [&b1, &b2] {
            let seed = format!(
                "--arg sizeMB 24 --argstr seed {}-{compression}",
                victim.name
            );
            let path = b1.build_one("big", &seed);
            assert_eq!(b2.build_one("big", &seed), path);
            for builder in [&b1, &b2] {
                builder.behind(Line {
                    bytes_per_second: 8_000_000,
                    ..Line::default()
                });
            }
            let muster = Muster::serve(&client, &format!("--compression {compression}"));
            client.substitutes_from(&muster);
            let got = thread::scope(|scope| {
                let transfer = scope.spawn(|| client.realise(&path));
                thread::sleep(Duration::from_millis(2500));
                victim.dead();
                transfer.join().expect("the transfer ends")
            });
            let got = got.ok();
            assert_eq!(
                (got.built(), got.copied()),
                (0, 1),
                "{compression}: {got}\n{}",
                muster.log()
            );
            assert_eq!(client.nar_hash(&path), b2.nar_hash(&path));
            assert!(got.secs > 2.5, "too quick to have been interrupted: {got}");
            b1.heal();
            b2.heal();
        }
    }
}

#[test]
fn when_the_last_holder_dies_the_client_sees_a_cut_and_builds() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let client = lab.client(&["b1"]);
    let path = b1.build_one("big", "--arg sizeMB 24");
    b1.behind(Line {
        cut_after_bytes: 12_000_000,
        ..Line::default()
    });
    let mut muster = Muster::serve(&client, "");
    client.substitutes_from(&muster);
    let cut = muster.nar(&path);
    assert!(
        !cut.complete || cut.status == 404,
        "{} with {} bytes",
        cut.status,
        cut.body.len()
    );
    let got = client
        .realise_attr("big", "--arg sizeMB 24 --fallback")
        .ok();
    assert_eq!((got.out.trim(), got.built()), (path.as_str(), 1), "{got}");
}

#[test]
fn a_loaded_builder_on_a_slow_line_is_waited_for_from_the_start() {
    let lab = Lab::new();
    let (b1, b2) = (lab.builder("b1"), lab.builder("b2"));
    let client = lab.client(&["b1", "b2"]);
    let foo = b2.build_one("fooRef", "--arg n 8");
    b2.behind(Line {
        delay_ms: 20,
        ..Line::default()
    });
    // Frozen half of the time. With less left to it, and the machine of the test overloaded too, its
    // login alone can outlast the 5 s for which it is waited.
    b2.stutter(400, 400);
    let muster = Muster::serve(&client, "");
    client.substitutes_from(&muster);
    let got = client.realise_attr("fooRef", "--arg n 8").ok();
    assert_eq!(
        (got.built(), got.copied()),
        (0, 9),
        "{got}\n{}\nb2's sshd: {}",
        muster.log(),
        b2.sshd_log()
    );
    assert_eq!(got.out.trim(), foo);
    drop(b1);
}
