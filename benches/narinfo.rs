//! A narinfo with 20 references: read, write, sign. The corpus is checked before it is timed.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use muster::nix::narinfo::{Compression, NarInfo};
use muster::nix::path_info::PathInfo;
use muster::nix::signature::{KeyName, SecretKey};
use muster::nix::store_path::{StoreDir, StorePath};
use muster::nix::{base32, fingerprint, hash};

const REFERENCES: u8 = 20;

fn narinfo(benches: &mut Criterion) {
    let store_dir = StoreDir::default();
    let key = secret_key();
    let narinfo = corpus(&store_dir, &key);
    let text = narinfo.render(&store_dir);
    check(&narinfo, &text, &store_dir, &key);

    let mut group = benches.benchmark_group("narinfo");
    group.bench_function("parse", |bench| {
        bench.iter(|| NarInfo::parse(black_box(&text), &store_dir));
    });
    group.bench_function("render", |bench| {
        bench.iter(|| black_box(&narinfo).render(&store_dir));
    });
    group.bench_function("fingerprint", |bench| {
        bench.iter(|| fingerprint::of_path(black_box(&narinfo.info), &store_dir));
    });
    group.bench_function("fingerprint and sign", |bench| {
        bench.iter(|| key.sign(&fingerprint::of_path(black_box(&narinfo.info), &store_dir)));
    });
    group.finish();
}

fn check(narinfo: &NarInfo, text: &str, store_dir: &StoreDir, key: &SecretKey) {
    assert_eq!(NarInfo::parse(text, store_dir).as_ref(), Ok(narinfo));
    assert_eq!(narinfo.info.references.len(), usize::from(REFERENCES));
    let fingerprint = fingerprint::of_path(&narinfo.info, store_dir);
    let signature = &narinfo.info.signatures[0];
    assert!(key.public().verifies(&fingerprint, signature));
}

fn secret_key() -> SecretKey {
    let name = KeyName::new("bench-1").expect("a valid name");
    SecretKey::from_seed(name, &zeroize::Zeroizing::new([1; 32]))
}

fn corpus(store_dir: &StoreDir, key: &SecretKey) -> NarInfo {
    let nar_hash = hash::NarHash::of(b"nar");
    let mut info = PathInfo {
        path: path(0),
        nar_hash,
        nar_size: 226_560,
        references: (1..=REFERENCES).map(path).collect(),
        deriver: format!("{}.drv", path(21)).parse().ok(),
        signatures: vec![],
        ca: None,
    };
    info.normalize();
    info.signatures = vec![key.sign(&fingerprint::of_path(&info, store_dir))];
    NarInfo {
        url: format!("nar/{}.nar", nar_hash.to_base32()),
        compression: Compression::None,
        file_hash: hash::Hash::new(hash::Algorithm::Sha256, &nar_hash.0),
        file_size: Some(info.nar_size),
        info,
    }
}

fn path(number: u8) -> StorePath {
    let hash = hash::NarHash::of(&[number]).0;
    let digits = base32::encode(&hash[..20]);
    let path = format!("{digits}-some-package-{number}.2.3").parse();
    path.expect("a valid path")
}

criterion_group!(benches, narinfo);
criterion_main!(benches);
