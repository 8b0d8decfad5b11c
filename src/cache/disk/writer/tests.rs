use std::sync::Arc;

use super::super::super::backend::{Ground, NarFile, Record};
use super::super::super::nar_name::FileHash;
use super::super::Options;
use super::super::folder::Folder;
use super::super::shared::Shared;
use super::Writer;
use crate::nix::hash::NarHash;
use crate::nix::path_info::{Basis, PathInfo};
use crate::nix::store_path::{StoreDir, StorePathHash};

fn record(number: u8) -> Record {
    let hash = StorePathHash([number; 20]);
    Record {
        info: PathInfo {
            path: format!("{hash}-p").parse().unwrap(),
            nar_hash: NarHash([number; 32]),
            nar_size: 1,
            references: vec![],
            deriver: None,
            signatures: vec![],
            ca: None,
        },
        grounds: vec![Ground {
            upstream: "u".to_owned(),
            basis: Basis::Operator,
        }],
        file: Some(NarFile {
            hash: FileHash([number; 32]),
            size_bytes: 10_000,
        }),
    }
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
