//! What nobody had is on no disk: after a restart each such path is asked for anew.

mod support;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use muster::cache::backend::Backend;
use muster::cache::disk::folder::Folder;
use muster::cache::disk::index::{Index, Totals};
use muster::cache::disk::{self, DiskCache};
use muster::codec::compression::Encoding;
use muster::nix::path_info::{PathInfo, Trust};
use muster::nix::store_path::{StoreDir, StorePathHash};
use muster::substituter::Substituter;
use support::*;

/// A substituter that keeps what it knows in `dir`, and remembers a "no" in memory for an hour.
fn keeping(dir: &Path, upstream: &Arc<Scripted>) -> Substituter {
    let keys = vec![key().public()];
    let disk = disk::Options::new(1 << 30, StoreDir::default(), keys);
    let backend: Arc<dyn Backend> = Arc::new(DiskCache::open(dir, disk));
    let mut options = options();
    options.memory.negative_ttl = Duration::from_secs(3600);
    let upstreams = std::slice::from_ref(upstream);
    let setup = setup(upstreams, &Trust::Operator, Encoding::None);
    Substituter::new(options, setup, Some(backend))
}

async fn found(substituter: &Substituter, info: &PathInfo) -> bool {
    substituter.narinfo(info.path.hash()).await.is_some()
}

/// Tells whether a hash part stands anywhere in a file, as bytes or as text.
fn holds(file: &[u8], hash: StorePathHash) -> bool {
    let text = hash.to_string();
    let found = |needle: &[u8]| file.windows(needle.len()).any(|bytes| bytes == needle);
    found(&hash.0) || found(text.as_bytes())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_negative_answer_comes_from_disk() {
    let dir = tempfile::tempdir().unwrap();
    let a = Scripted::new("a");
    let (there, there_nar) = path(0, 100, &[]);
    a.add(&there, &there_nar);
    let missed: Vec<_> = (1..=50).map(|number| path(number, 100, &[])).collect();
    let asked = || a.questions.load(Ordering::Relaxed);

    let first = keeping(dir.path(), &a);
    assert!(found(&first, &there).await);
    for (info, _) in &missed {
        assert!(!found(&first, info).await);
    }
    let before = asked();
    assert!(!found(&first, &missed[0].0).await);
    assert_eq!(asked(), before, "known from memory while it runs");
    first.stop().await;
    drop(first);

    // What is found is on disk, and nothing else.
    let file = Folder::new(dir.path().to_owned()).index();
    let index = Index::open(&file, 1 << 20, StoreDir::default()).unwrap();
    let look_ups = |look_ups| Totals {
        look_ups,
        ..Totals::default()
    };
    assert_eq!(index.totals().unwrap(), look_ups(1));
    assert!(index.get(there.path.hash()).unwrap().is_some());
    for (info, _) in &missed {
        assert_eq!(index.get(info.path.hash()).unwrap(), None);
        assert_eq!(index.last_use_of(info.path.hash()).unwrap(), None);
    }
    drop(index);
    let file = std::fs::read(file).unwrap();
    assert!(holds(&file, there.path.hash()));
    let named = |(info, _): &&(PathInfo, _)| holds(&file, info.path.hash());
    assert_eq!(missed.iter().filter(named).count(), 0);

    // So each is there the moment that a builder has it.
    let second = keeping(dir.path(), &a);
    assert!(!found(&second, &missed[0].0).await);
    for (info, nar) in &missed[1..] {
        a.add(info, nar);
        let before = asked();
        assert!(found(&second, info).await);
        assert_eq!(asked(), before + 1, "asked anew");
    }
    second.stop().await;
}
