use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::super::super::backend::{Backend as _, Record};
use super::super::folder::Folder;
use super::super::index::{Index, IndexError};
use super::super::samples;
use super::super::shared::Shared;
use super::super::{DiskCache, Options};
use super::Writer;
use crate::nix::hash::NarHash;
use crate::nix::store_path::{StoreDir, StorePathHash};

fn record(number: u8) -> Record {
    samples::record(number, Some(10_000))
}

/// Under load the writer was still at work on an earlier batch when a path was used and a fill began
/// that needed room: the path that had just been used was evicted.
#[test]
fn a_use_that_came_after_the_batch_counts_when_room_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options::new(25_000, StoreDir::default(), vec![]);
    let shared = Arc::new(Shared::new(Folder::new(dir.path().to_owned()), options));
    let mut writer = Writer::open(Arc::clone(&shared));
    let index = shared.index().unwrap();
    for number in [1, 2] {
        let used = shared.tick();
        let written = index.write(|changes| {
            changes.put(&record(number), used)?;
            Ok(changes.totals())
        });
        shared.set_totals(written.unwrap());
    }
    let first = StorePathHash([1; 20]);
    shared.queue.touch(first, shared.tick());
    let _reserved = shared.reserve(10_000).unwrap();
    writer.make_room();
    assert!(index.get(first).unwrap().is_some());
    assert!(index.get(StorePathHash([2; 20])).unwrap().is_none());
}

/// A cache whose writer works when the test says so, with room for two of each that wait.
fn by_hand(dir: &Path) -> (DiskCache, Writer) {
    let mut options = Options::new(25_000, StoreDir::default(), vec![]);
    options.queue_max = 2;
    options.retry_after = Duration::ZERO;
    let shared = Arc::new(Shared::new(Folder::new(dir.to_owned()), options));
    let writer = Writer::open(Arc::clone(&shared));
    let writer_of_cache = Mutex::new(None);
    let cache = DiskCache {
        shared,
        writer: writer_of_cache,
    };
    (cache, writer)
}

fn look_up(number: u8) -> Record {
    Record {
        file: None,
        ..record(number)
    }
}

fn remember(cache: &DiskCache, writer: &mut Writer, numbers: &[u8]) {
    for number in numbers {
        cache.remember(look_up(*number));
        assert!(writer.turn(Duration::ZERO));
        assert_eq!(said(cache, *number), Some(1));
    }
}

fn deny(cache: &DiskCache, number: u8) {
    cache.deny(
        StorePathHash([number; 20]),
        NarHash([number; 32]),
        &["nobody", "u"],
    );
}

/// How many are said to have a path.
fn said(cache: &DiskCache, number: u8) -> Option<usize> {
    let known = cache.look_up(StorePathHash([number; 20]));
    known.map(|record| record.grounds.len())
}

/// What waited for the writer was a list without a bound, and each look-up went through all of it.
#[test]
fn what_is_denied_beyond_the_bound_does_not_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, mut writer) = by_hand(dir.path());
    remember(&cache, &mut writer, &[1, 2, 3, 4]);
    let index = cache.shared.index().unwrap();
    let kept = index.write(|changes| {
        changes.put(&record(9), cache.shared.tick())?;
        Ok(changes.totals())
    });
    cache.shared.set_totals(kept.unwrap());
    drop(index);

    (1..=2).for_each(|number| deny(&cache, number));
    assert_eq!(
        [1, 2, 3, 4].map(|n| said(&cache, n)),
        [None, None, Some(1), Some(1)]
    );
    deny(&cache, 3);
    assert_eq!([1, 2, 3, 4].map(|n| said(&cache, n)), [None; 4]);
    assert_eq!(said(&cache, 9), Some(1), "a kept NAR stays");
    // The last of these comes after the writer was told, and before it works.
    cache.remember(look_up(3));
    deny(&cache, 3);
    assert!(writer.turn(Duration::ZERO));
    assert_eq!([1, 2, 3, 4].map(|n| said(&cache, n)), [None; 4]);
    let stats = cache.stats();
    assert_eq!((stats.look_ups, stats.entries), (0, 1));
    // Said again, it counts again, and there is room again.
    remember(&cache, &mut writer, &[3, 4]);
    deny(&cache, 4);
    assert_eq!([3, 4, 9].map(|n| said(&cache, n)), [Some(1), None, Some(1)]);

    cache.shared.queue.stop();
    assert!(!writer.turn(Duration::ZERO));
    drop((cache, writer));
    let file = Folder::new(dir.path().to_owned()).index();
    let index = Index::open(&file, 1 << 20, StoreDir::default()).unwrap();
    let listed = |number| index.get(StorePathHash([number; 20])).unwrap().is_some();
    assert_eq!(
        [1, 2, 3, 4, 9].map(listed),
        [false, false, true, false, true]
    );
}

/// A sweep that was due when the batch was taken does not stand for what is lost while it is written.
#[test]
fn what_is_lost_while_the_writer_works_is_swept_in_the_next_turn() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, mut writer) = by_hand(dir.path());
    remember(&cache, &mut writer, &[1, 2, 3]);
    (1..=3).for_each(|number| deny(&cache, number));
    let sweep = cache.shared.denials.sweep_due().unwrap();
    let batch = cache.shared.queue.take(Duration::ZERO);
    cache.remember(look_up(4));
    deny(&cache, 4);
    writer.work(batch.tasks);
    writer.sweep(sweep);
    assert_eq!(said(&cache, 4), None);
    assert!(writer.turn(Duration::ZERO));
    assert_eq!([1, 2, 3, 4].map(|n| said(&cache, n)), [None; 4]);
    assert_eq!(cache.shared.denials.sweep_due(), None);
}

/// The writer had taken a look-up and not written it yet when it was denied: the denial was dropped.
#[test]
fn what_is_denied_while_the_writer_has_it_does_not_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, mut writer) = by_hand(dir.path());
    cache.remember(look_up(1));
    let batch = cache.shared.queue.take(Duration::ZERO);
    deny(&cache, 1);
    writer.work(batch.tasks);
    assert_eq!(said(&cache, 1), None);
    assert!(writer.turn(Duration::ZERO));
    assert_eq!(said(&cache, 1), None);
    assert_eq!(cache.stats().look_ups, 0);
    // What nobody said is not written at all.
    deny(&cache, 2);
    assert!(cache.shared.queue.take(Duration::ZERO).tasks.is_empty());
}

/// A failing disk loses denials, and the index came back with what they denied.
#[test]
fn what_is_denied_without_an_index_does_not_come_back_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, mut writer) = by_hand(dir.path());
    remember(&cache, &mut writer, &[1, 2]);
    deny(&cache, 1);
    let batch = cache.shared.queue.take(Duration::ZERO);
    let failed = IndexError::Damaged("a test".to_owned());
    cache.shared.index_failed(&failed);
    writer.work(batch.tasks);
    assert!(cache.shared.denials.sweep_due().is_some());
    deny(&cache, 2);
    // The index is opened anew first, and is then as it was.
    assert!(writer.turn(Duration::ZERO));
    assert!(cache.shared.index().is_some());
    assert_eq!([1, 2].map(|n| said(&cache, n)), [None; 2]);
    assert_eq!(cache.stats().look_ups, 0);
    remember(&cache, &mut writer, &[2]);
}
