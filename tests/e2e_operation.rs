//! What an operator meets: mistakes in files and flags, keys, signals, crashes.

mod rig;

use std::thread;

use rig::{Lab, Line, Machine, Muster, Nix, eventually};
use rustix::process::Signal;

/// Runs `muster serve`, which must end at once with an error that has these words.
#[track_caller]
fn refuses(machine: &Machine, args: &str, words: &[&str]) {
    let got = machine
        .run_for(10.0, &format!("muster serve {args}"))
        .failed();
    for word in words {
        assert!(
            got.err.contains(word),
            "no {word:?} in the error of: muster serve {args}\n{got}"
        );
    }
}

#[test]
fn mistakes_are_named_with_their_place() {
    let lab = Lab::new();
    let client = lab.client(&[]);
    client.write(
        "/etc/typo.toml",
        "priority = 30\nlisten-adress = \"127.0.0.1:5000\"\n",
    );
    refuses(
        &client,
        "--config /etc/typo.toml",
        &["listen-adress", "typo.toml", "2"],
    );
    refuses(&client, "--config /etc/none.toml", &["/etc/none.toml"]);
    refuses(&client, "--upstream gopher://b1", &["gopher"]);
    refuses(
        &client,
        "--upstream ssh-ng://-oProxyCommand=x",
        &["-oProxyCommand"],
    );
    refuses(&client, "--listen 127.0.0.1:x", &["127.0.0.1:x"]);
    refuses(&client, "--secret-key-file /etc/none", &["/etc/none"]);

    client.write("/etc/broken.key", "no key at all\n");
    client.chmod("/etc/broken.key", 0o600);
    refuses(
        &client,
        "--secret-key-file /etc/broken.key",
        &["/etc/broken.key"],
    );
    client.run("muster key generate open-1 --secret-key-file /etc/open.key --public-key-file /etc/open.pub").ok();
    client.chmod("/etc/open.key", 0o644);
    refuses(
        &client,
        "--secret-key-file /etc/open.key",
        &["/etc/open.key", "chmod"],
    );

    let running = Muster::serve(&client, "");
    refuses(&client, "", &["127.0.0.1:5000"]);
    drop(running);
    let checked = client.run("muster check-config /etc/typo.toml").failed();
    assert!(
        checked.err.contains("listen-adress") || checked.out.contains("listen-adress"),
        "{checked}"
    );
}

#[test]
fn each_upstream_is_printed_with_its_state() {
    let lab = Lab::new();
    let (b1, b2) = (lab.builder("b1"), lab.builder("b2"));
    let client = lab.client(&["b1", "b2"]);
    b2.dead();
    let muster = Muster::serve(&client, "");
    let said = |name: &str, words: &[&str]| {
        let log = muster.log();
        log.lines()
            .any(|l| l.contains(name) && words.iter().all(|w| l.contains(w)))
    };
    assert!(
        eventually(8.0, || said("b1", &["well"])),
        "{}",
        muster.log()
    );
    let refused = eventually(8.0, || said("b2", &["sick", "refused"]));
    assert!(refused, "ssh's own words are shown\n{}", muster.log());
    drop(b1);
}

#[test]
fn a_bad_line_in_the_machines_file_spoils_no_other() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let client = lab.client(&[]);
    let path = b1.build_one("tiny", "");
    client.write(
        "/etc/nix/machines",
        "# builders\nssh-ng://nowhere x86_64-linux - many\nssh-ng://root@b1\n",
    );
    let muster = Muster::serve(&client, "");
    muster.await_log(5.0, "/etc/nix/machines:2");
    client.substitutes_from(&muster);
    client.realise(&path).ok();
}

#[test]
fn a_changed_host_key_is_told_and_the_others_serve() {
    let lab = Lab::new();
    let (b1, b2) = (lab.builder("b1"), lab.builder("b2"));
    let client = lab.client(&["b1", "b2"]);
    let path = b2.build_one("tiny", "");
    b1.change_host_key();
    let muster = Muster::serve(&client, "");
    client.substitutes_from(&muster);
    let got = client.realise(&path).ok();
    assert!(got.secs < 10.0, "{got}");
    muster.await_log(10.0, "ost key");
}

#[test]
fn an_account_that_allows_only_nix_store_serve_is_told_so() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    b1.sshd_with("ForceCommand nix-store --serve");
    let client = lab.client(&[]);
    client.write("/etc/nix/machines", "ssh://root@b1\n");
    let muster = Muster::serve(&client, "");
    muster.await_log(15.0, "nix-store --serve");
}

#[test]
fn an_ssh_builder_is_asked_by_the_worker_protocol() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let client = lab.client(&[]);
    let path = b1.build_one("tiny", "");
    for uri in [
        "ssh://root@b1",
        "ssh-ng://guest@b1",
        "ssh://root@b1?remote-program=/usr/bin/nix-store",
    ] {
        client.write("/etc/nix/machines", &format!("{uri}\n"));
        client.fresh_store();
        let muster = Muster::serve(&client, "");
        client.substitutes_from(&muster);
        let got = client.realise(&path);
        assert_eq!(
            (got.rc, got.copied()),
            (0, 1),
            "{uri}: {got}\n{}",
            muster.log()
        );
    }
}

#[test]
fn this_machines_own_store_is_an_upstream_where_there_is_a_daemon() {
    let lab = Lab::new();
    let server = lab.client(&[]);
    server.daemon();
    let path = server.build_one("fooRef", "--arg n 3");
    let muster = Muster::serve(&server, "--listen 0.0.0.0:5000");
    let other = lab.machine("other", Nix::under_test());
    other.configure(&format!(
        "extra-substituters = http://client:5000\nextra-trusted-public-keys = {}",
        muster.key()
    ));
    let got = other.realise(&path).ok();
    assert_eq!(
        (got.built(), got.copied()),
        (0, 4),
        "{got}\n{}",
        muster.log()
    );
}

#[test]
fn keys_are_made_once_and_are_nixs_own() {
    let lab = Lab::new();
    let client = lab.client(&[]);
    let muster = Muster::serve(&client, "");
    let key = muster.key();
    drop(muster);
    let files = client
        .run("find /var/lib/muster -type f -perm /077 -name '*key*' ! -name '*.pub'")
        .ok();
    assert_eq!(files.out, "", "secret keys are for their owner alone");
    assert_eq!(
        Muster::serve(&client, "").key(),
        key,
        "the key outlives the process"
    );
    assert_eq!(Muster::serve(&client, "--listen 127.0.0.1:5009").key(), key);

    client
        .run("nix-store --generate-binary-cache-key made-by-nix-1 /etc/nix.key /etc/nix.pub")
        .ok();
    let public = client.run("muster key public < /etc/nix.key").ok();
    assert_eq!(public.out.trim(), client.read("/etc/nix.pub").trim());
    client.run("muster key generate ours-1 --secret-key-file /etc/ours.key --public-key-file /etc/ours.pub").ok();
    let converted = client
        .run("nix key convert-secret-to-public < /etc/ours.key")
        .ok();
    assert_eq!(converted.out.trim(), client.read("/etc/ours.pub").trim());
    let both = Muster::serve(
        &client,
        "--secret-key-file /etc/ours.key --secret-key-file /etc/nix.key",
    );
    assert!(
        both.key().contains("ours-1:") && both.key().contains("made-by-nix-1:"),
        "{}",
        both.key()
    );
}

#[test]
fn sigterm_lets_a_running_transfer_end_well() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let client = lab.client(&["b1"]);
    let path = b1.build_one("big", "--arg sizeMB 16");
    b1.behind(Line {
        bytes_per_second: 4_000_000,
        ..Line::default()
    });
    let mut muster = Muster::serve(&client, "");
    client.substitutes_from(&muster);
    let got = thread::scope(|scope| {
        let transfer = scope.spawn(|| client.realise(&path));
        // Then it takes four seconds yet.
        let begun = eventually(20.0, || {
            let report = muster.get("/healthz").text();
            let report: serde_json::Value = serde_json::from_str(&report).expect("JSON");
            report["nar"]["requests"].as_u64() > Some(0)
        });
        assert!(begun, "{}", muster.log());
        muster.signal(Signal::TERM);
        transfer.join().expect("the transfer ends")
    });
    assert_eq!((got.rc, got.copied()), (0, 1), "{got}\n{}", muster.log());
    assert_eq!(muster.wait(10.0), Some(0), "{}", muster.log());
}

#[test]
fn sigterm_ends_an_idle_muster_at_once() {
    let lab = Lab::new();
    let _b1 = lab.builder("b1");
    let client = lab.client(&["b1", "nowhere"]);
    let mut muster = Muster::serve(&client, "");
    muster.signal(Signal::TERM);
    assert_eq!(muster.wait(3.0), Some(0), "{}", muster.log());
    assert!(
        eventually(3.0, || client.processes("ssh").is_empty()),
        "no ssh is left behind"
    );
}

#[test]
fn sighup_reads_the_machines_again() {
    let lab = Lab::new();
    let (b1, b2) = (lab.builder("b1"), lab.builder("b2"));
    let client = lab.client(&["b1"]);
    let path = b2.build_one("tiny", "");
    client.write("/etc/muster.toml", "negative-ttl = 1\n");
    let mut muster = Muster::serve(&client, "--config /etc/muster.toml");
    assert_eq!(muster.narinfo(&path).status, 404);
    client.builders(&["b1", "b2"]);
    muster.signal(Signal::HUP);
    assert!(
        eventually(10.0, || muster.narinfo(&path).status == 200),
        "{}",
        muster.log()
    );
    client.write(
        "/etc/nix/machines",
        "ssh-ng://root@b1 x86_64-linux - many\nssh-ng://root@b2\n",
    );
    muster.signal(Signal::HUP);
    muster.await_log(5.0, "/etc/nix/machines:1");
    assert_eq!(muster.narinfo(&path).status, 200);
    drop(b1);
}

#[test]
fn after_a_crash_the_same_urls_are_answered() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let client = lab.client(&["b1"]);
    let path = b1.build_one("fooRef", "--arg n 3");
    let mut muster = Muster::serve(&client, "");
    client.substitutes_from(&muster);
    let url = format!(
        "/{}",
        muster
            .narinfo(&path)
            .field("URL")
            .expect("a narinfo has a URL")
    );
    let before = muster.get(&url).body;
    muster.signal(Signal::KILL);
    muster.wait(5.0);
    drop(muster);
    let ended = eventually(5.0, || client.processes("ssh").is_empty());
    assert!(ended, "no ssh outlives the process that asked it");

    let mut muster = Muster::serve(&client, "");
    let after = muster.get(&url);
    assert!(
        after.complete && after.body == before,
        "a NAR URL needs no narinfo asked before it"
    );
    let got = client.realise(&path).ok();
    assert_eq!((got.built(), got.copied()), (0, 4), "{got}");
}

#[test]
fn a_muster_that_asks_itself_makes_no_loop() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let client = lab.client(&["b1"]);
    let path = b1.build_one("tiny", "");
    let mut muster = Muster::serve(
        &client,
        "--upstream http://127.0.0.1:5000 --upstream ssh-ng://root@b1",
    );
    let absent = muster.get("/00000000000000000000000000000000.narinfo");
    assert_eq!(absent.status, 404);
    assert_eq!(muster.narinfo(&path).status, 200);
    client.substitutes_from(&muster);
    client.realise(&path).ok();
}
