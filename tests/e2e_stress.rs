//! Broken on purpose, as a new user would. `MUSTER_TEST_ROUNDS` makes the long ones longer.

mod rig;

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rig::muster::narinfo_target;
use rig::{Lab, Line, Machine, Muster, eventually};
use rustix::process::Signal;

fn rounds(usual: usize) -> usize {
    let asked = std::env::var("MUSTER_TEST_ROUNDS").ok();
    asked.and_then(|text| text.parse().ok()).unwrap_or(usual)
}

/// Waits until muster has this upstream.
#[track_caller]
fn connected(muster: &Muster<'_>, builders: &[&Machine]) {
    for builder in builders {
        muster.await_log(10.0, &format!("@{}: well", builder.name));
    }
}

#[test]
fn killed_anywhere_in_a_transfer_a_builder_is_not_missed() {
    let lab = Lab::new();
    let (b1, b2) = (lab.builder("b1"), lab.builder("b2"));
    let client = lab.client(&["b1", "b2"]);
    let path = b1.build_one("big", "--arg sizeMB 16");
    assert_eq!(b2.build_one("big", "--arg sizeMB 16"), path);
    let line = Line {
        bytes_per_second: 16_000_000,
        ..Line::default()
    };
    for round in 0..rounds(4) {
        for builder in [&b1, &b2] {
            builder.behind(line);
        }
        client.fresh_store();
        client.run("rm -rf /var/cache/muster").ok();
        let muster = Muster::serve(&client, "");
        client.substitutes_from(&muster);
        connected(&muster, &[&b1, &b2]);
        let after = Duration::from_millis(fastrand::u64(0..1300));
        let victim = if fastrand::bool() { &b1 } else { &b2 };
        let program = ["sshd", "nix-daemon"][round % 2];
        let got = thread::scope(|scope| {
            let transfer = scope.spawn(|| client.realise(&path));
            thread::sleep(after);
            victim.signal(program, Signal::KILL);
            transfer.join().expect("the transfer ends")
        });
        assert_eq!(
            (got.rc, got.built(), got.copied()),
            (0, 0, 1),
            "{program} of {} killed after {after:?}: {got}\n{}",
            victim.name,
            muster.log()
        );
        assert_eq!(client.nar_hash(&path), b2.nar_hash(&path));
        victim.stop_daemon();
        victim.daemon();
    }
}

#[test]
fn killed_in_a_transfer_muster_is_started_again_and_the_client_goes_on() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let client = lab.client(&["b1"]);
    let path = b1.build_one("big", "--arg sizeMB 24");
    b1.behind(Line {
        bytes_per_second: 8_000_000,
        ..Line::default()
    });
    for round in 0..rounds(1) {
        client.fresh_store();
        client.run("rm -rf /var/cache/muster").ok();
        let mut muster = Muster::serve(&client, "");
        client.substitutes_from(&muster);
        connected(&muster, &[&b1]);
        let (got, again) = thread::scope(|scope| {
            let transfer = scope.spawn(|| client.realise(&path));
            thread::sleep(Duration::from_millis(fastrand::u64(1000..2500)));
            muster.signal(Signal::KILL);
            muster.wait(5.0);
            let again = Muster::serve(&client, "");
            (transfer.join().expect("the transfer ends"), again)
        });
        assert_eq!(
            (got.rc, got.built()),
            (0, 0),
            "round {round}: {got}\n{}",
            again.log()
        );
        assert!(got.err.contains("retrying from offset"), "{got}");
        assert_eq!(client.nar_hash(&path), b1.nar_hash(&path));
    }
}

#[test]
fn many_real_clients_share_few_connections() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let client = lab.client(&["b1"]);
    let dag = b1.build_one("dag", "--arg n 40");
    client.write("/etc/muster.toml", "max-connections = 4\n");
    let muster = Muster::serve(&client, "--config /etc/muster.toml");
    client.substitutes_from(&muster);
    connected(&muster, &[&b1]);
    let copies = thread::scope(|scope| {
        let copy = |number: usize| {
            let (client, dag, url) = (&client, &dag, muster.url());
            scope.spawn(move || {
                client.run_for(
                    90.0,
                    &format!(
                        "HOME=/tmp/h{number} nix copy --from {url} --to 'local?root=/tmp/c{number}' {dag}"
                    ),
                )
            })
        };
        let copies: Vec<_> = (0..12).map(copy).collect();
        let ended = copies.into_iter().map(|c| c.join().expect("it ends"));
        ended.collect::<Vec<_>>()
    });
    for copy in copies {
        let copy = copy.ok();
        assert!(!copy.err.contains("retrying"), "{copy}\n{}", muster.log());
    }
}

#[test]
fn clients_that_stop_reading_hold_nobody_up() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let client = lab.client(&["b1"]);
    let paths: Vec<_> = ["x", "y"]
        .map(|seed| b1.build_one("big", &format!("--arg sizeMB 24 --argstr seed {seed}")))
        .into();
    let tiny = b1.build_one("tiny", "");
    let mut muster = Muster::serve(&client, "");
    client.substitutes_from(&muster);
    let url = muster.narinfo(&paths[0]).field("URL").expect("a URL");
    // More than the transfers that a builder gives at once.
    let stopped: Vec<_> = (0..12)
        .map(|n| {
            client.spawn(
                &format!("stopped-{n}"),
                &format!(
                    "bash -c 'exec 3<>/dev/tcp/127.0.0.1/5000; printf \"GET /{url} HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n\" >&3; \
                     head -c 100000 <&3 | wc -c; sleep 60'"
                ),
            )
        })
        .collect();
    let begun = eventually(10.0, || {
        stopped
            .iter()
            .filter(|p| p.out().contains("100000"))
            .count()
            >= 8
    });
    assert!(begun, "{}", muster.log());
    client.realise(&tiny).ok();
    let got = client.realise(&paths[1]).ok();
    assert!(got.secs < 35.0, "{got}\n{}", muster.log());
    assert!(muster.memory_kb() < 150_000, "{} kB", muster.memory_kb());
}

#[test]
fn thousands_of_questions_at_once_beside_a_silent_builder() {
    let lab = Lab::new();
    let (b1, b2) = (lab.builder("b1"), lab.builder("b2"));
    let client = lab.client(&["b1", "b2"]);
    let dag = b1.build_one("dag", "--arg n 40");
    let present: Vec<_> = b1.closure(&dag).iter().map(|p| narinfo_target(p)).collect();
    let mut muster = Muster::serve(&client, "");
    connected(&muster, &[&b1, &b2]);
    b2.freeze();
    let socket = muster.socket();
    let started = Instant::now();
    let answers = thread::scope(|scope| {
        let ask = |number: usize| {
            let (present, socket) = (&present, &socket);
            scope.spawn(move || {
                let mut targets: Vec<String> = (0..150).map(|n| absent(number, n)).collect();
                targets.extend(present.iter().cloned());
                statuses(socket, &targets)
            })
        };
        let asked: Vec<_> = (0..40).map(ask).collect();
        let answers = asked.into_iter().flat_map(|a| a.join().expect("answers"));
        answers.collect::<Vec<_>>()
    });
    let count = |status: u16| answers.iter().filter(|s| **s == status).count();
    assert_eq!(
        (count(200), count(404)),
        (40 * 41, 40 * 150),
        "{}",
        muster.log()
    );
    assert!(
        started.elapsed() < Duration::from_secs(25),
        "{:?}",
        started.elapsed()
    );
    assert!(muster.memory_kb() < 100_000, "{} kB", muster.memory_kb());
    b2.thaw();
}

/// As newer clients ask: every narinfo of a level at once, over hundreds of connections.
#[test]
fn a_client_of_hundreds_of_connections_beside_a_silent_builder() {
    let lab = Lab::new();
    let (b1, b2) = (lab.builder("b1"), lab.builder("b2"));
    let client = lab.client(&["b1", "b2"]);
    let dag = b1.build_one("dag", "--arg n 200");
    let muster = Muster::serve(&client, "");
    connected(&muster, &[&b1, &b2]);
    let many = "http-connections = 300\nmax-substitution-jobs = 300\nmax-jobs = 64";
    client.configure(&format!("{}\n{many}", muster.lines().join("\n")));
    b2.freeze();
    let nobody = client.instantiate("dag", "--arg n 200 --argstr seed nobody");
    let line = format!("nix-store --realise --dry-run {}", nobody.concat());
    let missing = client.run_for(60.0, &line).ok();
    assert!(missing.err.contains("will be built"), "{missing}");
    // Silent for two seconds, it is not waited for any more; the rest is the client's own work.
    assert!(missing.secs < 10.0, "{missing}\n{}", muster.log());
    let got = client
        .run_for(60.0, &format!("nix-store --realise {dag}"))
        .ok();
    assert_eq!((got.built(), got.copied()), (0, 201), "{got}");
    assert!(got.secs < 20.0, "{got}\n{}", muster.log());
    b2.thaw();
}

/// The target of a path that nobody has.
fn absent(asker: usize, number: usize) -> String {
    let number = format!("{:08}", asker * 1000 + number);
    format!("/{}.narinfo", number.repeat(4))
}

/// Asks for all on one connection without waiting for answers; the statuses in their order.
fn statuses(socket: &Path, targets: &[String]) -> Vec<u16> {
    let mut stream = UnixStream::connect(socket).expect("connect");
    stream
        .set_read_timeout(Some(Duration::from_secs(30)))
        .expect("set a timeout");
    let mut writer = stream.try_clone().expect("clone a socket");
    let mut text: String = targets
        .iter()
        .map(|t| format!("GET {t} HTTP/1.1\r\nHost: x\r\n\r\n"))
        .collect();
    text.push_str("GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    let asking = thread::spawn(move || writer.write_all(text.as_bytes()));
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).expect("read the answers");
    asking.join().expect("asked").expect("send the questions");
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let statuses = text.split("HTTP/1.1 ").skip(1);
    let mut statuses: Vec<u16> = statuses.filter_map(|s| s.get(..3)?.parse().ok()).collect();
    statuses.pop();
    statuses
}

#[test]
fn a_first_start_in_a_bad_place_says_what_is_wrong() {
    let lab = Lab::new();
    let client = lab.client(&[]);
    let state = "mkdir -p /var/lib/muster && mount -t tmpfs";
    let serve = "timeout 5 muster serve";
    let full = client.run(&format!(
        "{state} -o size=4k state /var/lib/muster && cat /dev/zero > /var/lib/muster/full; {serve}"
    ));
    assert_eq!(full.rc, 1, "{full}");
    for words in ["cannot write /var/lib/muster/secret-key", "No space left"] {
        assert!(full.err.contains(words), "{full}");
    }
    let left = client
        .run("rm /var/lib/muster/full && ls -A /var/lib/muster")
        .ok();
    assert_eq!(left.out, "", "nothing half-written stays");

    let read_only = client.run(&format!(
        "umount /var/lib/muster && {state} -o ro state /var/lib/muster; {serve}"
    ));
    assert_eq!(read_only.rc, 1, "{read_only}");
    for words in [
        "/var/lib/muster/secret-key",
        "Read-only file system",
        "--secret-key-file",
    ] {
        assert!(read_only.err.contains(words), "{read_only}");
    }
    client.run("umount /var/lib/muster").ok();

    for (hostname, name) in [
        ("my host:x", "my-host-x"),
        ("größe_1", "größe_1"),
        ("-", "-"),
    ] {
        client
            .run(&format!(
                "rm -rf /var/lib/muster; printf '{hostname}' > /proc/sys/kernel/hostname"
            ))
            .ok();
        let muster = Muster::serve(&client, "");
        assert!(
            muster.key().starts_with(&format!("{name}-muster-1:")),
            "{}",
            muster.key()
        );
    }
}
