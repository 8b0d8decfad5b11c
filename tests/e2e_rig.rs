//! The rig itself, with plain Nix and no Muster: what the other end-to-end suites stand on.

mod rig;

use rig::helper::LIAR;
use rig::{Lab, Line, Nix};

#[test]
fn a_client_substitutes_from_a_builder_over_ssh() {
    let lab = Lab::new();
    let builder = lab.machine("b1", Nix::under_test());
    builder.sshd().daemon();
    let key = builder.signs_as("b1-1");
    let client = lab.machine("client", Nix::under_test());
    let path = builder.build_one("tiny", "");
    assert!(!client.valid(&path));

    let keys = format!("--option trusted-public-keys {key}");
    let got = client
        .run(&format!(
            "nix-store -r {path} --option substituters ssh-ng://b1 {keys}"
        ))
        .ok();
    assert_eq!((got.built(), got.copied()), (0, 1), "{got}");
    assert!(client.valid(&path));
    assert_eq!(client.nar_hash(&path), builder.nar_hash(&path));

    client.run("nix store ping --store ssh-ng://guest@b1").ok();

    client.fresh_store();
    assert!(!client.valid(&path));
    let got = client
        .run(&format!(
            "nix-store -r {path} --option substituters ssh-ng://b1"
        ))
        .failed();
    assert!(!client.valid(&path), "nothing unsigned is taken: {got}");
}

#[test]
fn a_builder_fails_in_every_way_and_heals() {
    let lab = Lab::new();
    let builder = lab.machine("b1", Nix::under_test());
    let client = lab.machine("client", Nix::under_test());
    builder.sshd();
    let ssh = |secs| client.run_for(secs, "ssh b1 -- echo heard");
    assert_eq!(ssh(10.0).ok().out, "heard\n");

    builder.dead();
    let refused = ssh(10.0).failed();
    assert!(
        refused.secs < 1.0 && refused.err.contains("refused"),
        "{refused}"
    );

    builder.hang();
    assert_eq!(ssh(1.0).rc, 124);
    builder.heal();
    assert_eq!(ssh(10.0).ok().out, "heard\n");

    for set in [rig::Machine::blackhole, rig::Machine::unplug] {
        set(&builder, true);
        assert_eq!(ssh(1.0).rc, 124);
        set(&builder, false);
        assert_eq!(ssh(10.0).ok().out, "heard\n");
    }

    builder.freeze();
    assert_eq!(ssh(1.0).rc, 124);
    builder.thaw();
    assert_eq!(ssh(10.0).ok().out, "heard\n");

    builder.behind(Line {
        delay_ms: 200,
        ..Line::default()
    });
    let slow = ssh(30.0).ok();
    assert!(
        slow.secs > 1.6,
        "a login is four round trips at least: {slow}"
    );
    builder.behind(Line {
        cut_after_bytes: 100_000,
        ..Line::default()
    });
    let cut = client.run_for(20.0, "ssh b1 -- head -c 1000000 /dev/zero");
    assert!(
        cut.rc != 0 && cut.out.len() < 200_000,
        "{} bytes",
        cut.out.len()
    );
    builder.heal();

    builder.change_host_key();
    let changed = ssh(10.0).failed();
    assert!(
        changed.err.contains("Host key verification failed"),
        "{changed}"
    );
}

#[test]
fn the_workload_builds() {
    let lab = Lab::new();
    let builder = lab.machine("b1", Nix::under_test());
    let dag = builder.build_one("dag", "--arg n 40");
    assert_eq!(builder.closure(&dag).len(), 41);
    assert_eq!(
        builder.build("multi", "").len(),
        1,
        "nix-build prints the first output"
    );
    for attr in [
        "odd",
        "symlink",
        "executable",
        "selfReference",
        "fixedFlat",
        "fixedRecursive",
        "floatingUser",
        "chatty",
        "big",
    ] {
        builder.build(attr, "");
    }
    let (foo, foo_ref) = (
        builder.build_one("foo", "--arg n 3"),
        builder.build_one("fooRef", "--arg n 3"),
    );
    assert_eq!(
        (builder.closure(&foo).len(), builder.closure(&foo_ref).len()),
        (1, 4)
    );
}

#[test]
fn a_liar_changes_the_last_byte_of_a_nar() {
    let lab = Lab::new();
    let builder = lab.builder("b1");
    let client = lab.client(&[]);
    let path = builder.add_marked(64 * 1024);
    let from = |uri: &str| client.run(&format!("nix copy --from 'ssh-ng://b1{uri}' {path}"));
    from(&format!("?{LIAR}")).failed();
    assert!(!client.valid(&path));
    from("").ok();
    assert_eq!(client.nar_hash(&path), builder.nar_hash(&path));
}
