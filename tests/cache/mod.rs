//! NARs, records and narinfos for tests of the cache, real in all but their content.

#![allow(dead_code, reason = "each test program uses its part")]

use bytes::Bytes;
use muster::cache::backend::{Backend, Error, Ground, NarFile, Record};
use muster::cache::disk::Options;
use muster::nix::fingerprint;
use muster::nix::hash::{Algorithm, Hash, NarHash};
use muster::nix::narinfo::{Compression, NarInfo};
use muster::nix::path_info::{Basis, PathInfo};
use muster::nix::signature::{KeyName, SecretKey};
use muster::nix::store_path::{StoreDir, StorePath};
use sha2::Digest as _;

/// The key that signs what the tests keep.
pub fn key() -> SecretKey {
    let seed = zeroize::Zeroizing::new([7; 32]);
    SecretKey::from_seed(KeyName::new("test-muster-1").unwrap(), &seed)
}

/// Bounds for tests: quick to try again, small in memory.
pub fn options(bytes_max: u64) -> Options {
    Options {
        retry_after: std::time::Duration::from_millis(100),
        index_cache_bytes: 8 << 20,
        free_bytes_min: 1 << 20,
        ..Options::new(bytes_max, StoreDir::default(), vec![key().public()])
    }
}

/// The NAR of a single file.
pub fn nar(contents: &[u8]) -> Vec<u8> {
    let mut nar = Vec::new();
    let parts: [&[u8]; 7] = [
        b"nix-archive-1",
        b"(",
        b"type",
        b"regular",
        b"contents",
        contents,
        b")",
    ];
    for part in parts {
        nar.extend_from_slice(&(part.len() as u64).to_le_bytes());
        nar.extend_from_slice(part);
        nar.resize(nar.len().next_multiple_of(8), 0);
    }
    nar
}

/// A path that follows from `number` and `size`, with its NAR; the contents do not compress.
pub fn path(number: u64, size: usize) -> (PathInfo, Vec<u8>) {
    let mut random = fastrand::Rng::with_seed(number);
    let contents: Vec<u8> = std::iter::repeat_with(|| random.u8(..))
        .take(size)
        .collect();
    of(&format!("path-{number}"), &nar(&contents))
}

/// A path of some name with a NAR.
pub fn of(name: &str, nar: &[u8]) -> (PathInfo, Vec<u8>) {
    let inner = muster::nix::hash::encode_hex(&sha2::Sha256::digest(name));
    let path = StorePath::compute(
        &StoreDir::default(),
        "output:out",
        &format!("sha256:{inner}"),
        name,
    );
    let info = PathInfo {
        path: path.unwrap(),
        nar_hash: NarHash::of(nar),
        nar_size: nar.len() as u64,
        references: vec![],
        deriver: None,
        signatures: vec![],
        ca: None,
    };
    (info, nar.to_vec())
}

/// The trusted builder that everything comes from.
pub fn ground() -> Ground {
    Ground {
        upstream: "ssh-ng://root@builder".to_owned(),
        basis: Basis::Operator,
    }
}

/// A look-up without NAR.
pub fn look_up(info: &PathInfo) -> Record {
    Record {
        info: info.clone(),
        grounds: vec![ground()],
        file: None,
    }
}

/// The signed narinfo of a kept file.
pub fn narinfo(info: &PathInfo, file: &NarFile) -> Bytes {
    let mut info = info.clone();
    let signature = key().sign(&fingerprint::of_path(&info, &StoreDir::default()));
    info.signatures.push(signature);
    let narinfo = NarInfo {
        url: file.name(&info).url(),
        compression: Compression::Zstd,
        file_hash: Hash::new(Algorithm::Sha256, &file.hash.0),
        file_size: Some(file.size_bytes),
        info,
    };
    narinfo.render(&StoreDir::default()).into()
}

/// Takes a NAR in, in pieces.
pub async fn fill(backend: &dyn Backend, info: &PathInfo, nar: &[u8]) -> Result<NarFile, Error> {
    let mut fill = backend.begin(info.nar_size)?;
    let file = zstd::encode_all(nar, 1).unwrap();
    for chunk in file.chunks(64 << 10) {
        fill.write(chunk).map_err(|source| Error::Io {
            what: "writing".to_owned(),
            source,
        })?;
    }
    let info = info.clone();
    let text = |file: &NarFile| narinfo(&info, file);
    fill.commit(info.clone(), vec![ground()], text).await
}

/// Reads a kept NAR back, decompressed, and checks that its file is the one that was named.
pub fn read(backend: &dyn Backend, record: &Record) -> Option<Vec<u8>> {
    use std::os::unix::fs::FileExt as _;
    let name = record.name().expect("a kept nar has a name");
    let open = backend.open(&name).expect("a kept nar can be opened")?;
    let mut file = vec![0; usize::try_from(open.size_bytes).unwrap()];
    open.file.read_exact_at(&mut file, 0).expect("read the nar");
    let hash: [u8; 32] = sha2::Sha256::digest(&file).into();
    assert_eq!(hash, name.file_hash.0, "{name}");
    Some(zstd::decode_all(file.as_slice()).expect("decode the nar"))
}
