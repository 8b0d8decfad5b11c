//! Killed at any moment: Muster itself while it fills and evicts, and those it reads from in large transfers.
//!
//! `MUSTER_TEST_KILLS` is how often, and `MUSTER_TEST_KILL_MB` how large those transfers are; few and small by
//! default.

mod rig;

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use rig::caches::{FOLDER, asked};
use rig::http;
use rig::muster::narinfo_target;
use rig::{Lab, Line, Machine, Muster, Nix, eventually};
use rustix::process::Signal;
use sha2::{Digest as _, Sha256};

/// What the cache may keep in the first test: a third of what is asked for.
const KEPT_MB: usize = 14;

#[test]
fn killed_again_and_again_while_it_fills_and_evicts_it_serves_whole_nars_only() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let client = lab.client(&["b1"]);
    let small = b1.build_one("flat", "--arg n 24 --arg sizeKB 400");
    let mut paths = b1.closure(&small);
    for seed in ["a", "b", "c", "d", "e", "f"] {
        // Larger than what is read whole.
        paths.push(b1.build_one("big", &format!("--arg sizeMB 5 --argstr seed {seed}")));
    }
    let hash = |path: &String| {
        let hash = b1.nar_hash(path);
        (
            path.clone(),
            hash.split(' ').next().expect("a hash").to_owned(),
        )
    };
    let hashes: HashMap<_, _> = paths.iter().map(hash).collect();
    let args =
        format!("--cache-size {KEPT_MB}M --listen 127.0.0.1:5000 --listen unix:/lab/muster.socket");
    let socket = lab.share().join("muster.socket");
    let kills = asked("MUSTER_TEST_KILLS", 12);
    let (mut filling, mut checked, mut whole) = (0, 0, 0);
    let mut seen = std::collections::BTreeSet::new();
    for kill in 0..kills {
        let muster = Muster::serve(&client, &args);
        let key = muster.key();
        // By what it does and not by the clock, as machines are slow and quick: half of them while NARs come in,
        // half once some are kept, for which the small ones wait up to a second.
        let (begun, enough) = (AtomicUsize::new(0), fastrand::usize(1..24));
        let kept_enough = fastrand::u64(1..12) * (kill % 2) as u64;
        let after = Duration::from_millis(fastrand::u64(0..60));
        whole += thread::scope(|scope| {
            let ask = |_| scope.spawn(|| ask_until_it_dies(&socket, &paths, &hashes, &begun));
            let askers: Vec<_> = (0..4).map(ask).collect();
            let at_work = eventually(20.0, || {
                begun.load(Ordering::Relaxed) >= enough && kept_since_start(&socket) >= kept_enough
            });
            assert!(at_work, "{}", muster.log());
            thread::sleep(after);
            muster.crash();
            let answers = askers.into_iter().map(|a| a.join().expect("right answers"));
            answers.sum::<usize>()
        });
        if client.run(&format!("test -e {FOLDER}/nix-cache-info")).rc != 0 {
            continue;
        }
        let left = client.run(&format!("ls {FOLDER}/.muster/tmp; ls {FOLDER}/nar"));
        filling += usize::from(left.out.lines().any(|l| !l.ends_with(".nar.zst")));
        let nars: Vec<_> = left
            .out
            .lines()
            .filter(|l| l.ends_with(".nar.zst"))
            .collect();
        checked += nars.len();
        seen.extend(nars.into_iter().map(str::to_owned));
        client.folder_verifies(&key);
        // A real client now and then, of what the last ones left.
        if kill % 10 == 9 {
            let mut muster = Muster::serve(&client, &args);
            client.substitutes_from(&muster);
            client.fresh_store();
            let got = client.realise(&paths.join("' '"));
            assert_eq!((got.rc, got.built()), (0, 0), "{got}\n{}", muster.log());
            client.run("nix-store --verify --check-contents").ok();
            let sizes = muster.get("/healthz").text();
            muster.stop();
            let left = client.run(&format!("ls {FOLDER}/.muster/tmp")).ok();
            assert_eq!(left.out, "", "after kill {kill}: {sizes}");
        }
    }
    let size = client.run(&format!("du -sm {FOLDER}/nar | cut -f1")).ok();
    let size: usize = size.out.trim().parse().expect("a size");
    assert!(size <= KEPT_MB + 1, "{size} MB are kept");
    // It has met what it is about: files under way, more paths than fit, and many that stayed.
    assert!(
        filling * 5 > kills && seen.len() > 12 && checked > kills * 2 && whole > kills,
        "{filling} of {kills} in a fill, {checked} kept, {} different, {whole} answers",
        seen.len()
    );
}

/// How many NARs have been kept since Muster started.
fn kept_since_start(socket: &Path) -> u64 {
    let healthz = http::request(socket, "GET", "/healthz", &[]).text();
    let report: serde_json::Value = serde_json::from_str(&healthz).expect("JSON");
    report["cache"]["fills"].as_u64().expect("a figure")
}

/// Asks for one path after the other as long as there are answers; each that is whole must be right. Counts
/// the NARs that it asked for, and returns how many were whole.
fn ask_until_it_dies(
    socket: &Path,
    paths: &[String],
    hashes: &HashMap<String, String>,
    begun: &AtomicUsize,
) -> usize {
    let mut whole = 0;
    loop {
        // Half of them are the large ones, which come last: their fills take longest.
        let first = paths.len() - 6;
        let place = if fastrand::bool() {
            fastrand::usize(first..paths.len())
        } else {
            fastrand::usize(..first)
        };
        let path = paths.get(place).expect("a path");
        let Ok(narinfo) = http::ask(socket, "GET", &narinfo_target(path), &[]) else {
            return whole;
        };
        let Some(url) = narinfo.field("URL").filter(|_| narinfo.complete) else {
            assert!(
                !narinfo.complete || narinfo.status == 404,
                "{path}: {narinfo:?}"
            );
            continue;
        };
        begun.fetch_add(1, Ordering::Relaxed);
        let Ok(nar) = http::ask(socket, "GET", &format!("/{url}"), &[]) else {
            return whole;
        };
        let bounded = nar
            .header("content-length")
            .or(nar.header("transfer-encoding"));
        assert!(bounded.is_some(), "the end of {url} is not told");
        if !nar.complete || nar.status != 200 {
            assert!(!nar.complete || nar.status == 404, "{url}: {}", nar.status);
            continue;
        }
        let bytes = match url.ends_with(".zst") {
            true => zstd::decode_all(nar.body.as_slice()).expect("whole zstd"),
            false => nar.body,
        };
        let hash: String = Sha256::digest(&bytes)
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        assert_eq!(Some(&hash), hashes.get(path), "{url}");
        whole += 1;
    }
}

/// What a NAR is read from, and how that ends.
#[derive(Clone, Copy, Debug)]
enum Break {
    Sshd,
    Daemon,
    FrozenBuilder,
    Nginx,
    FrozenNginx,
    Muster,
    FrozenMuster,
}

const BREAKS: [Break; 7] = [
    Break::Sshd,
    Break::Nginx,
    Break::Muster,
    Break::FrozenBuilder,
    Break::Daemon,
    Break::FrozenNginx,
    Break::FrozenMuster,
];

#[test]
fn whatever_is_read_from_may_break_anywhere_in_a_large_transfer() {
    let lab = Lab::new();
    let (b1, b2) = (lab.builder("b1"), lab.builder("b2"));
    // It runs nginx, so it is a Debian 12.
    let store = lab.machine("store", Nix::named("2.8"));
    let client = lab.client(&[]);
    let size_mb = asked("MUSTER_TEST_KILL_MB", 24);
    let size = format!("--arg sizeMB {size_mb}");
    let path = b1.build_one("big", &size);
    assert_eq!(b2.build_one("big", &size), path);
    assert_eq!(store.build_one("big", &size), path);
    let hash = b2.nar_hash(&path);
    for compression in ["none", "zstd"] {
        let options = format!("compression={compression}");
        store.copy_to(
            &format!("/lab/cache/{compression}"),
            &options,
            std::slice::from_ref(&path),
        );
    }
    // Some 1.5 s for each, however large.
    let rate = size_mb * 700_000;
    let line = Line {
        bytes_per_second: rate as u64,
        ..Line::default()
    };
    let servers = format!("server {{\nlisten 80;\nroot /lab/cache;\nlimit_rate {rate};\n}}\n");
    let mut nginx = Some(store.nginx(80, &servers));
    let mut resumed = 0;
    let kills = asked("MUSTER_TEST_KILLS", BREAKS.len());
    for kill in 0..kills {
        let breaks = BREAKS[kill % BREAKS.len()];
        let far = serve_far(&b1, breaks, line);
        // The other holder is far away, so that the one that breaks is the one that is read.
        b2.behind(Line {
            delay_ms: 60,
            ..line
        });
        let compression = ["none", "zstd"][kill / BREAKS.len() % 2];
        let upstream = match breaks {
            Break::Sshd | Break::Daemon | Break::FrozenBuilder => "ssh-ng://root@b1".to_owned(),
            Break::Nginx | Break::FrozenNginx => format!("http://store/{compression}?trusted=1"),
            Break::Muster | Break::FrozenMuster => "http://b1:5001?trusted=1".to_owned(),
        };
        client.fresh_store();
        client.wipe_kept();
        // With the cache and without, straight through and through the encoder.
        let args = [
            "",
            "--compression zstd",
            "--cache-size 0",
            "--compression zstd --cache-size 0",
        ];
        let args = args[kill % args.len()];
        let mut muster = Muster::serve(
            &client,
            &format!("{args} --upstream '{upstream}' --upstream ssh-ng://root@b2"),
        );
        client.substitutes_from(&muster);
        for name in [upstream.split('?').next().unwrap_or_default(), "@b2"] {
            muster.await_log(15.0, &format!("{name}: well"));
        }
        let mut transfer = client.spawn("transfer", &format!("nix-store --realise {path}"));
        let begun = eventually(20.0, || transfer.err().contains("copying path"));
        assert!(begun, "{}\n{}", transfer.err(), muster.log());
        let after = Duration::from_millis(fastrand::u64(0..1200));
        thread::sleep(after);
        befall(breaks, &b1, &store);
        let rc = transfer.wait(120.0);
        let said = transfer.err();
        let what = format!("{breaks:?} {args} {compression} after {after:?}");
        assert_eq!(rc, Some(0), "{what}: {said}\n{}", muster.log());
        for word in ["building", "retrying"] {
            assert!(!said.contains(word), "{what}: {said}\n{}", muster.log());
        }
        assert_eq!(client.nar_hash(&path), hash, "{what}");
        let healthz = muster.get("/healthz").text();
        let figure = healthz
            .split("\"resumed\":")
            .nth(1)
            .and_then(|t| t.split([',', '}']).next());
        let figure: usize = figure
            .and_then(|t| t.trim().parse().ok())
            .expect("a figure");
        resumed += figure.min(1);
        muster.stop();
        drop(far);
        mend(breaks, &b1, &store);
        if matches!(breaks, Break::Nginx | Break::FrozenNginx) {
            drop(nginx.take());
            nginx = Some(store.nginx(80, &servers));
        }
    }
    assert!(
        resumed * 2 > kills,
        "{resumed} of {kills} went on elsewhere"
    );
}

/// Has the builder be reached in the way that will break.
fn serve_far<'m>(b1: &'m Machine, breaks: Break, line: Line) -> Option<Muster<'m>> {
    match breaks {
        Break::Sshd | Break::Daemon | Break::FrozenBuilder => {
            b1.behind(line);
            None
        }
        Break::Muster | Break::FrozenMuster => {
            let far = Muster::serve(b1, "--no-machines --listen 0.0.0.0:5000");
            far.await_log(10.0, "daemon: well");
            b1.reach_over(5001, 5000, line);
            Some(far)
        }
        Break::Nginx | Break::FrozenNginx => None,
    }
}

fn befall(breaks: Break, b1: &Machine, store: &Machine) {
    match breaks {
        Break::Sshd => b1.signal("sshd", Signal::KILL),
        Break::Daemon => b1.signal("nix-daemon", Signal::KILL),
        Break::FrozenBuilder => b1.freeze(),
        Break::Nginx => store.signal("nginx", Signal::KILL),
        Break::FrozenNginx => store.signal("nginx", Signal::STOP),
        Break::Muster => b1.signal("muster", Signal::KILL),
        Break::FrozenMuster => b1.signal("muster", Signal::STOP),
    }
}

fn mend(breaks: Break, b1: &Machine, store: &Machine) {
    match breaks {
        Break::Sshd | Break::Daemon | Break::FrozenBuilder => {
            b1.thaw();
            b1.stop_daemon();
            b1.daemon();
        }
        Break::Nginx | Break::FrozenNginx => store.kill("nginx"),
        Break::Muster | Break::FrozenMuster => b1.kill("muster"),
    }
}
