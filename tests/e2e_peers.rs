//! Upstreams that are not what they should be, every way in which ssh reaches one, and musters as upstreams.

mod rig;

use std::thread;
use std::time::{Duration, Instant};

use rig::{Lab, Line, Machine, Muster, eventually, helper};
use rustix::process::Signal;
use serde_json::Value;

/// Runs muster over one upstream and tells whether it gives the path.
#[track_caller]
fn reaches(client: &Machine, environment: &str, args: &str, path: &str) {
    let mut muster = Muster::start_with(client, environment, args);
    let got = eventually(20.0, || {
        muster.lines().len() == 3 && muster.narinfo(path).status == 200
    });
    assert!(got, "{environment} muster serve {args}\n{}", muster.log());
}

#[test]
fn what_is_no_daemon_of_ours_is_named_and_the_others_serve() {
    let lab = Lab::new();
    let (b1, b2) = (lab.builder("b1"), lab.builder("b2"));
    let client = lab.client(&[]);
    let path = b1.build_one("tiny", "");
    let say = |name: &str, hex: &str| {
        let words = format!("say /tmp/{name} {hex}");
        helper::start(&client, name, words.trim_end())
    };
    // The magic word, then protocol 1.10, then 9.9.
    let magic = "6f-69-78-64-00-00-00-00";
    let _peers = [
        say("old", &format!("{magic}-0a-01-00-00-00-00-00-00")),
        say("new", &format!("{magic}-09-09-00-00-00-00-00-00")),
        say("silent", ""),
        say("garbage", "48-54-54-50-2f-31-2e-31-20-34-30-30-0a"),
    ];
    b2.run("mkdir -p /opt/store /opt/var").ok();
    let elsewhere = "ssh-ng://root@b2?remote-program=env%20NIX_STORE_DIR=/opt/store%20NIX_STATE_DIR=/opt/var%20nix-daemon";
    let mut muster = Muster::serve(
        &client,
        &format!(
            "--upstream unix:///tmp/old --upstream unix:///tmp/new --upstream unix:///tmp/silent \
             --upstream unix:///tmp/garbage --upstream unix:///tmp/none --upstream '{elsewhere}' \
             --upstream ssh-ng://root@b1"
        ),
    );
    assert_eq!(muster.narinfo(&path).status, 200, "{}", muster.log());
    client.substitutes_from(&muster);
    client.realise(&path).ok();
    for (name, words) in [
        (
            "unix:///tmp/old",
            &["sick", "protocol 1.10", "too old", "update Nix there"][..],
        ),
        ("unix:///tmp/new", &["sick", "protocol 9.9"]),
        (
            "unix:///tmp/silent",
            &[
                "sick",
                "no greeting within 5s: what listens there is silent",
            ],
        ),
        (
            "unix:///tmp/garbage",
            &["sick", "not a nix-daemon", "HTTP/1.1 400"],
        ),
        (
            "unix:///tmp/none",
            &["sick", "/tmp/none", "is nix-daemon installed"],
        ),
        (
            "ssh-ng://root@b2",
            &["sick", "store lies in another directory"],
        ),
        ("ssh-ng://root@b1", &["well", "protocol 1."]),
    ] {
        let said = eventually(10.0, || {
            let log = muster.log();
            let mut lines = log.lines().filter(|l| l.starts_with("upstream "));
            lines.any(|l| l.contains(name) && words.iter().all(|w| l.contains(w)))
        });
        assert!(said, "{name}: {words:?}\n{}", muster.log());
    }
}

#[test]
fn ssh_goes_where_the_operator_says() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let client = lab.client(&[]);
    let path = b1.build_one("tiny", "");
    let known_hosts = lab.share().join("known_hosts");
    let keys = std::fs::read_to_string(&known_hosts).expect("read the known hosts");
    let key = keys
        .lines()
        .find_map(|l| l.strip_prefix("b1,")?.split_once(' '))
        .map(|(_, key)| key.to_owned())
        .expect("b1 is known");

    b1.run_net("ip -6 addr add fd77::11/64 dev eth0 nodad");
    client.run_net("ip -6 addr add fd77::12/64 dev eth0 nodad");
    b1.sshd_with("ListenAddress ::\nPort 2200");
    let more = format!("{keys}fd77::11,127.0.0.1,[b1]:2200 {key}\n");
    std::fs::write(&known_hosts, more).expect("write the known hosts");
    for uri in [
        "ssh-ng://root@b1:2200",
        "ssh-ng://root@[fd77::11]",
        "root@b1",
        "ssh://b1:22",
    ] {
        reaches(&client, "", &format!("--upstream '{uri}'"), &path);
    }
    // The jump host's own loopback: there is no other road to it.
    reaches(
        &client,
        "NIX_SSHOPTS='-J root@b1'",
        "--upstream ssh-ng://root@127.0.0.1",
        &path,
    );

    // The jump's own ssh reads the configuration by itself.
    assert!(eventually(5.0, || client.processes("ssh").is_empty()));
    client.write(
        "/root/.ssh/config",
        "Host *\n  StrictHostKeyChecking yes\n  UserKnownHostsFile /lab/known_hosts\n  ControlMaster auto\n  \
         ControlPath /root/.ssh/master-%C\n  ControlPersist 600\nHost alias\n  HostName b1\n  Port 2200\n",
    );
    for uri in ["ssh-ng://root@b1", "ssh-ng://root@alias"] {
        reaches(&client, "", &format!("--upstream {uri}"), &path);
        let masters = client.run("ls /root/.ssh/master-* 2>&1").failed();
        assert!(masters.out.contains("No such file"), "{masters}");
        assert!(eventually(5.0, || client.processes("ssh").is_empty()));
    }

    client
        .run("mkdir /keys && mv /root/.ssh/id_ed25519 /keys/builder")
        .ok();
    reaches(
        &client,
        "",
        "--upstream 'ssh-ng://root@b1?ssh-key=/keys/builder'",
        &path,
    );
    client.write("/etc/nix/machines", "ssh-ng://root@b1 - /keys/builder\n");
    reaches(&client, "", "", &path);
    let muster = Muster::serve(&client, "--no-machines --upstream ssh-ng://root@b1");
    muster.await_log(10.0, "Permission denied (publickey");
    muster.await_log(1.0, "ssh-key");
}

#[test]
fn the_pinned_host_key_alone_counts() {
    let lab = Lab::new();
    let (b1, b2) = (lab.builder("b1"), lab.builder("b2"));
    let client = lab.client(&[]);
    let path = b1.build_one("tiny", "");
    // The jump's own ssh reads the configuration by itself.
    assert!(eventually(5.0, || client.processes("ssh").is_empty()));
    client.write(
        "/root/.ssh/config",
        "Host *\n  UserKnownHostsFile /dev/null\n",
    );
    let pinned = |machine: &Machine| {
        let line = machine
            .run("base64 -w0 < /etc/ssh/lab_host_key.pub")
            .ok()
            .out;
        client.write(
            "/etc/nix/machines",
            &format!("ssh-ng://root@b1 x86_64-linux - 1 1 - - {}\n", line.trim()),
        );
    };
    pinned(&b1);
    reaches(&client, "", "", &path);
    pinned(&b2);
    let mut muster = Muster::serve(&client, "");
    muster.await_log(10.0, "the host key that is pinned for it, column 8");
    assert_eq!(muster.narinfo(&path).status, 404);
    drop(muster);
    // Not known at all: never a question at a terminal, and the way out is told.
    client.write("/etc/nix/machines", "ssh-ng://root@b1\n");
    let muster = Muster::serve(&client, "");
    muster.await_log(10.0, "log in once by hand");
}

#[test]
fn a_machines_file_as_people_have_it() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let client = lab.client(&[]);
    let path = b1.build_one("tiny", "");
    // No daemon runs here, and what is for this machine itself is no reason to fail.
    client.write(
        "/etc/nix/machines",
        "# mine\nssh://root@b1 x86_64-linux,i686-linux - 4 2 kvm # fast\nlocalhost x86_64-linux - 2\n\
         ssh://localhost\n@/etc/nix/more\n",
    );
    client.write(
        "/etc/nix/more",
        "ssh-ng://nowhere.invalid\n@/etc/nix/machines\n",
    );
    let mut muster = Muster::serve(&client, "");
    muster.await_log(5.0, "/etc/nix/more:2");
    assert_eq!(muster.narinfo(&path).status, 200, "{}", muster.log());
    muster.await_log(10.0, "upstream ssh-ng://nowhere.invalid: sick");
    muster.await_log(1.0, "check the name");
    drop(muster);

    client.run("rm /etc/nix/machines").ok();
    let mut muster = Muster::serve(&client, "");
    muster.await_log(1.0, "No upstreams: name builders");
    assert_eq!(muster.narinfo(&path).status, 404);
    assert_eq!(muster.get("/nix-cache-info").status, 200);
}

const FAR: Line = Line {
    delay_ms: 20,
    cut_after_bytes: 0,
    bytes_per_second: 0,
};

/// Starts a muster that these others are named to; its own store is among its upstreams where a daemon runs.
fn naming<'m>(machine: &'m Machine, port: u16, others: &[&str]) -> Muster<'m> {
    let file = "/etc/muster.toml";
    let others = others
        .iter()
        .map(|other| format!("{{ uri = \"http://{other}:5000\", trusted = true }}"));
    let others = others.collect::<Vec<_>>().join(", ");
    machine.write(file, &format!("machines = false\nupstreams = [{others}]\n"));
    let args = format!("--config {file} --cache-size 0 --listen 0.0.0.0:{port}");
    Muster::serve(machine, &args)
}

fn await_well(muster: &mut Muster<'_>, count: usize) {
    let well = |m: &mut Muster<'_>| {
        m.get("/healthz")
            .text()
            .matches(r#""state":"well""#)
            .count()
    };
    assert!(
        eventually(30.0, || well(muster) == count),
        "{}",
        muster.log()
    );
}

/// How long a client takes to learn of a closure of 201 that nobody has what it is: a look that fetches nothing.
fn look(client: &Machine, seed: &str) -> f64 {
    let nobody = client.instantiate("dag", &format!("--arg n 200 --argstr seed {seed}"));
    let line = format!("nix-store --realise --dry-run {}", nobody.concat());
    let got = client.run_for(120.0, &line).ok();
    assert!(got.err.contains("will be built"), "{got}");
    got.secs
}

fn upstream(muster: &mut Muster<'_>, number: usize, name: &str) -> Value {
    let report: Value = serde_json::from_str(&muster.get("/healthz").text()).expect("JSON");
    report["upstreams"][number][name].clone()
}

/// Those who missed waited 10 s for it, over again whenever it seemed to be well.
#[test]
fn one_of_three_musters_that_turns_silent_costs_little_and_counts_again_when_it_is_heard() {
    let lab = Lab::new();
    let builders = ["b1", "b2", "b3"].map(|name| lab.builder(name));
    let client = lab.client(&[]);
    let seeded =
        |builder: &Machine, seed: &str| builder.build_one("tiny", &format!("--argstr seed {seed}"));
    let of_each = [0, 1, 2].map(|n| seeded(&builders[n], &format!("of-{n}")));
    let more = [0, 1].map(|n| seeded(&builders[n], &format!("more-{n}")));
    let mut theirs: Vec<_> = builders.iter().map(|b| naming(b, 5000, &[])).collect();
    theirs.iter_mut().for_each(|muster| await_well(muster, 1));
    let mut ours = naming(&client, 5000, &["b1", "b2", "b3"]);
    await_well(&mut ours, 3);
    if std::env::var("MUSTER_TEST_AHEAD").is_err() {
        let fed = |ours: &Muster<'_>| ours.log().matches("its catalog is here").count();
        assert!(eventually(10.0, || fed(&ours) == 3), "{}", ours.log());
    }
    for path in &of_each {
        assert_eq!(ours.narinfo(path).status, 200, "{}", ours.log());
    }
    client.substitutes_from(&ours);
    let before = ["a", "b"].map(|seed| look(&client, seed));

    theirs[1].signal(Signal::STOP);
    let turning = look(&client, "turning");
    let sick = eventually(5.0, || upstream(&mut ours, 1, "state") == "sick");
    assert!(sick, "{}", ours.log());
    let asked = upstream(&mut ours, 1, "asked");
    let silent = ["c", "d", "e"].map(|seed| look(&client, seed));
    // Nobody asks it, so nobody waits for it.
    assert_eq!(upstream(&mut ours, 1, "asked"), asked, "{}", ours.log());
    // What another has is found, and what is known of the silent one is told.
    assert_eq!(ours.narinfo(&more[0]).status, 200, "{}", ours.log());
    assert_eq!(ours.narinfo(&of_each[1]).status, 200, "{}", ours.log());

    theirs[1].signal(Signal::CONT);
    await_well(&mut ours, 3);
    assert_eq!(ours.narinfo(&more[1]).status, 200, "{}", ours.log());
    let got = client.realise(&more[1]).ok();
    assert_eq!((got.built(), got.copied()), (0, 1), "{got}");

    // Before and after, for a machine whose load comes and goes; there the quickest look and the slowest are compared.
    let after = ["f", "g"].map(|seed| look(&client, seed));
    let slowest = before.into_iter().chain(after).fold(0.0, f64::max);
    let quickest = silent.into_iter().fold(f64::MAX, f64::min);
    let took = format!(
        "201 misses: {before:.2?} s, turning silent {turning:.2} s, silent {silent:.2?} s, heard again {after:.2?} s"
    );
    println!("{took}");
    // 1.5 s once; with much else to do a look alone may take twice as long as the slowest.
    let log = ours.log();
    assert!(turning < 2.0 * slowest + 1.5, "{took}\n{log}");
    assert!(quickest < slowest + 0.05, "{took}\n{log}");
}

fn figure(muster: &mut Muster<'_>, of: &str, name: &str) -> u64 {
    let report: Value = serde_json::from_str(&muster.get("/healthz").text()).expect("JSON");
    report[of][name].as_u64().expect("a figure")
}

#[test]
fn a_far_builder_that_runs_muster_is_asked_for_a_closure_once() {
    let lab = Lab::new();
    let builder = lab.builder("b1");
    let client = lab.client(&[]);
    let top = builder.build_one("dag", "--arg n 60");
    builder.reach_over(5000, 5001, FAR);
    let mut theirs = naming(&builder, 5001, &[]);
    let mut ours = naming(&client, 5000, &["b1"]);
    await_well(&mut theirs, 1);
    await_well(&mut ours, 1);
    let ahead = std::env::var("MUSTER_TEST_AHEAD").is_err();
    if ahead {
        ours.await_log(10.0, "its catalog is here");
        let report = ours.get("/healthz").text();
        let report: Value = serde_json::from_str(&report).expect("JSON");
        let paths = &report["upstreams"][0]["paths"];
        assert!(paths.as_u64() >= Some(61), "{paths} paths known there");
    }
    let before = figure(&mut theirs, "narinfo", "requests");
    client.substitutes_from(&ours);
    client.fresh_store();
    let got = client.realise(&top).ok();
    assert_eq!((got.built(), got.copied()), (0, 61), "{got}");
    let paths = client.closure(&top);
    assert_eq!(client.nar_hashes(&paths), builder.nar_hashes(&paths));
    if ahead {
        let asked = figure(&mut theirs, "narinfo", "requests") - before;
        // For the top, and once to see whether the question comes back.
        assert!((1..=2).contains(&asked), "{asked}: {}", theirs.log());
        assert_eq!(figure(&mut ours, "narinfo", "prefetched"), 60);
        assert!(figure(&mut ours, "nar", "ahead-claimed") > 0);
    }
    // What nobody has is known without a question.
    let nobody = format!("/nix/store/{:032}-nobody", 1);
    assert_eq!(ours.narinfo(&nobody).status, 404);
    if ahead {
        let asked = figure(&mut theirs, "narinfo", "requests") - before;
        assert!((1..=2).contains(&asked), "{asked}: {}", theirs.log());
    }
}

#[test]
fn what_no_far_builder_has_is_known_without_a_question() {
    let lab = Lab::new();
    let builders = ["b1", "b2", "b3"].map(|name| lab.builder(name));
    let client = lab.client(&[]);
    for builder in &builders {
        // A store without a path is asked through its daemon.
        builder.build_one("tiny", "");
    }
    let mut theirs: Vec<_> = builders
        .iter()
        .map(|builder| {
            builder.reach_over(5000, 5001, FAR);
            naming(builder, 5001, &[])
        })
        .collect();
    theirs.iter_mut().for_each(|muster| await_well(muster, 1));
    let mut ours = naming(&client, 5000, &["b1", "b2", "b3"]);
    await_well(&mut ours, 3);
    let ahead = std::env::var("MUSTER_TEST_AHEAD").is_err();
    if ahead {
        let fed = |ours: &Muster<'_>| ours.log().matches("its catalog is here").count();
        assert!(eventually(10.0, || fed(&ours) == 3), "{}", ours.log());
    }
    let questions = |theirs: &mut Vec<Muster<'_>>| -> u64 {
        let asked = |muster| figure(muster, "narinfo", "requests");
        theirs.iter_mut().map(asked).sum()
    };
    let before = questions(&mut theirs);
    for number in 0..20 {
        let nobody = format!("/nix/store/{number:032}-nobody");
        assert_eq!(ours.narinfo(&nobody).status, 404);
    }
    let asked = questions(&mut theirs) - before;
    // Each of them is asked once to see whether the question comes back; without catalogs, each time.
    let expected = if ahead { 0..=3 } else { 60..=63 };
    assert!(expected.contains(&asked), "{asked}: {}", ours.log());
}

#[test]
fn two_that_name_each_other_serve_and_one_may_be_killed() {
    let lab = Lab::new();
    let (b1, b2) = (lab.builder("b1"), lab.builder("b2"));
    let client = lab.client(&[]);
    let slow = Line {
        bytes_per_second: 5_000_000,
        ..FAR
    };
    let of_b2 = b2.build_one("tiny", "");
    let large = b1.build_one("big", "--arg sizeMB 30");
    assert_eq!(b2.build_one("big", "--arg sizeMB 30"), large);
    b1.reach_over(5000, 5001, slow);
    b2.reach_over(5000, 5001, slow);
    let mut first = naming(&b1, 5001, &["b2"]);
    let mut second = naming(&b2, 5001, &["b1"]);
    await_well(&mut first, 2);
    await_well(&mut second, 2);

    // A client of the one gets what the other has.
    client.configure(&format!(
        "substituters = http://b1:5000\ntrusted-public-keys = {}",
        first.key()
    ));
    client.realise(&of_b2).ok();
    // Nothing goes round, and nothing stalls.
    let before = [&mut first, &mut second].map(|m| figure(m, "narinfo", "requests"));
    let begun = Instant::now();
    for number in 0..50 {
        let nobody = format!("/nix/store/{number:032}-nobody");
        assert_eq!(first.narinfo(&nobody).status, 404);
    }
    let took = begun.elapsed().as_secs_f64();
    assert!(took < 10.0, "{took}");
    let after = [&mut first, &mut second].map(|m| figure(m, "narinfo", "requests"));
    assert_eq!(after[0] - before[0], 50, "{}", first.log());
    assert!(after[1] - before[1] <= 50, "{}", second.log());

    let mut ours = naming(&client, 5000, &["b1", "b2"]);
    await_well(&mut ours, 2);
    client.substitutes_from(&ours);
    client.fresh_store();
    let mut fetch = client.spawn("fetch", &format!("nix-store --realise {large}"));
    thread::sleep(Duration::from_secs(3));
    assert_eq!(fetch.ended(), None, "killed in the middle");
    let from_first = figure(&mut first, "nar", "requests") > 1;
    let source = if from_first { &first } else { &second };
    source.signal(Signal::KILL);
    assert_eq!(fetch.wait(60.0), Some(0), "{}{}", fetch.err(), ours.log());
    assert_eq!(client.nar_hash(&large), b1.nar_hash(&large));
    assert!(figure(&mut ours, "nar", "corrupt") == 0, "{}", ours.log());
}
