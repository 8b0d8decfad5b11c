//! How soon a cache with a million entries answers after a start: opening it, and the first look-up.
//!
//! After a clean stop and after kill -9, with the index out of the page cache. Run as a test it takes ten
//! thousand entries.

use std::fs::{self, File};
use std::path::Path;
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
    let file = File::open(index(dir)).unwrap();
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).unwrap();
    let last = record(entries - 1);
    let begun = Instant::now();
    let cache = DiskCache::open(dir, Options::new(1 << 40, StoreDir::default(), vec![]));
    let found = cache.look_up(last.info.path.hash());
    let took = begun.elapsed();
    assert_eq!(found, Some(last));
    assert_eq!(cache.stats().degraded, None);
    assert!(cache.look_up(record(entries).info.path.hash()).is_none());
    took
}

/// An entry of the usual size: four references and a signature.
fn record(number: u64) -> Record {
    let path = |number: u64| {
        let mut hash = [0; 20];
        // Spread as real hashes are.
        let spread = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
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
            upstream: "ssh-ng://nix@builder.example".to_owned(),
            basis: Basis::Operator,
        }],
        file: Some(NarFile {
            hash: FileHash([9; 32]),
            size_bytes: 30_000,
        }),
    }
}

const ANSWERED_WITHIN: Duration = Duration::from_millis(200);
