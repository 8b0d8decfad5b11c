//! What unit tests of this folder keep.

use super::super::backend::{Ground, NarFile, Record};
use super::super::nar_name::FileHash;
use crate::nix::hash::NarHash;
use crate::nix::path_info::{Basis, PathInfo};
use crate::nix::store_path::StorePathHash;

/// What is known of the path of a number, with a NAR file of so many bytes or none.
pub fn record(number: u8, size: Option<u64>) -> Record {
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
        file: size.map(|size_bytes| NarFile {
            hash: FileHash([number; 32]),
            size_bytes,
        }),
    }
}
