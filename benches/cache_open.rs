//! How soon a cache with a million entries answers after a start: opening it, and the first look-up; and from the
//! start of `muster serve` to the first narinfo over its socket, whose only holder is down.
//!
//! After a clean stop and after kill -9, with the index out of the page cache. Run as a test it takes ten
//! thousand entries, and its times say nothing.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use muster::cache::backend::{Backend as _, Ground, NarFile, Record};
use muster::cache::disk::index::Index;
use muster::cache::disk::{DiskCache, Options};
use muster::cache::nar_name::FileHash;
use muster::nix::base32;
use muster::nix::hash::NarHash;
use muster::nix::path_info::{Basis, PathInfo};
use muster::nix::store_path::StoreDir;
use rustix::fs::Advice;

fn main() {
    let whole = std::env::args().any(|arg| arg == "--bench");
    let entries: u64 = if whole { 1_000_000 } else { 10_000 };
    let place = tempfile::tempdir().unwrap();
    let made = Instant::now();
    let clean = place.path().join("clean");
    let killed = place.path().join("killed");
    for dir in [&clean, &killed] {
        fs::create_dir_all(dir.join(".muster")).unwrap();
    }
    make(&clean, &killed, entries);
    let size = fs::metadata(index(&clean)).unwrap().len();
    println!(
        "{entries} entries, {} MB of index, made in {:.0?}",
        size >> 20,
        made.elapsed()
    );
    for (how, dir) in [("a clean stop", &clean), ("kill -9", &killed)] {
        let took = open(dir, entries);
        println!("after {how}: opened and answered in {took:.1?}");
        assert!(took < ANSWERED_WITHIN, "it took {took:?} after {how}");
        let took = serve(dir, place.path(), entries);
        println!("after {how}: a narinfo is served {took:.1?} after the start of the process");
        assert!(
            !whole || took < ANSWERED_WITHIN,
            "it took {took:?} after {how}"
        );
    }
}

fn index(dir: &Path) -> std::path::PathBuf {
    dir.join(".muster/index.redb")
}

/// Fills an index, and copies it while it is open: as kill -9 leaves it.
fn make(clean: &Path, killed: &Path, entries: u64) {
    let opened = Index::open(&index(clean), 512 << 20, StoreDir::default()).unwrap();
    let mut numbers: Vec<u64> = (0..entries).collect();
    fastrand::Rng::with_seed(1).shuffle(&mut numbers);
    for numbers in numbers.chunks(50_000) {
        let put = opened.write(|changes| {
            numbers
                .iter()
                .try_for_each(|number| changes.put(&record(*number), number + 1))
        });
        put.unwrap();
    }
    fs::copy(index(clean), index(killed)).unwrap();
}

/// Opens the cache, looks a path up, and returns how long both took; the answers are checked.
fn open(dir: &Path, entries: u64) -> Duration {
    forget_pages(dir);
    let last = record(entries - 1);
    let begun = Instant::now();
    let cache = DiskCache::open(dir, Options::new(1 << 40, StoreDir::default(), vec![]));
    let found = cache.look_up(last.info.path.hash());
    let took = begun.elapsed();
    assert_eq!(found, Some(last));
    assert_eq!(cache.stats().degraded, None);
    assert!(cache.look_up(record(entries).info.path.hash()).is_none());
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    runtime.unwrap().block_on(cache.stop());
    took
}

/// Takes the index out of the page cache.
fn forget_pages(dir: &Path) {
    let file = File::open(index(dir)).unwrap();
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).unwrap();
}

/// A muster; dropped, it is killed.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        _ = self.0.kill();
        _ = self.0.wait();
    }
}

/// Starts a muster, asks it for a narinfo as soon as it listens, and returns how long both took.
fn serve(dir: &Path, place: &Path, entries: u64) -> Duration {
    forget_pages(dir);
    let socket = place.join("socket");
    _ = fs::remove_file(&socket);
    // The background pass finds none of the NARs, and comes to this one last.
    let spread = |number: &u64| number.wrapping_mul(SPREAD).to_le_bytes();
    let asked = record((0..entries).max_by_key(spread).unwrap());
    let mut muster = Command::new(env!("CARGO_BIN_EXE_muster"));
    muster.args(["serve", "--no-machines", "--no-local-daemon", "--upstream"]);
    muster.arg(format!("{UPSTREAM}?trusted=1"));
    muster.arg(format!("--listen=unix:{}", socket.display()));
    muster.arg("--cache-dir").arg(dir);
    muster.args(["--cache-size", "1000G"]);
    muster
        .env("STATE_DIRECTORY", place)
        .env_remove("MUSTER_CONFIG");
    muster.stdout(Stdio::null()).stderr(Stdio::null());
    let begun = Instant::now();
    let running = Running(muster.spawn().unwrap());
    let mut stream = loop {
        match UnixStream::connect(&socket) {
            Ok(stream) => break stream,
            Err(_) => std::thread::sleep(Duration::from_micros(200)),
        }
        assert!(
            begun.elapsed() < Duration::from_secs(20),
            "it does not listen"
        );
    };
    let hash = asked.info.path.hash();
    let question = format!("GET /{hash}.narinfo HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(question.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let took = begun.elapsed();
    let path = StoreDir::default().join(&asked.info.path);
    assert!(answer.contains(" 200 "), "{answer}");
    assert!(answer.contains(&format!("StorePath: {path}\n")), "{answer}");
    drop(running);
    took
}

/// An entry of the usual size: four references and a signature.
fn record(number: u64) -> Record {
    let path = |number: u64| {
        let mut hash = [0; 20];
        // Spread as real hashes are.
        let spread = number.wrapping_mul(SPREAD);
        hash[..8].copy_from_slice(&spread.to_le_bytes());
        hash[8..16].copy_from_slice(&number.to_le_bytes());
        let text = format!("{}-package-{number}", base32::encode(&hash));
        text.parse().unwrap()
    };
    let mut info = PathInfo {
        path: path(number),
        nar_hash: NarHash([7; 32]),
        nar_size: 100_000,
        references: (1..5).map(|other| path(number ^ other)).collect(),
        deriver: Some(path(number ^ 64)),
        signatures: vec![],
        ca: None,
    };
    info.normalize();
    Record {
        info,
        grounds: vec![Ground {
            upstream: UPSTREAM.to_owned(),
            basis: Basis::Operator,
        }],
        file: Some(NarFile {
            hash: FileHash([9; 32]),
            size_bytes: 30_000,
        }),
    }
}

/// Nobody listens there.
const UPSTREAM: &str = "http://127.0.0.1:9";
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;
const ANSWERED_WITHIN: Duration = Duration::from_millis(200);
