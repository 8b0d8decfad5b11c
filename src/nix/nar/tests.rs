use nix_archive::nar::{self, CaseHack};
use proptest::prelude::*;

use super::*;

fn text(bytes: &[u8]) -> Vec<u8> {
    let mut out = (bytes.len() as u64).to_le_bytes().to_vec();
    out.extend_from_slice(bytes);
    out.resize(out.len().next_multiple_of(8), 0);
    out
}

fn texts(tokens: &[&[u8]]) -> Vec<u8> {
    tokens.iter().flat_map(|token| text(token)).collect()
}

fn entry(name: &[u8]) -> Vec<u8> {
    let mut out = texts(&[b"entry", b"(", b"name", name, b"node", b"(", b"type"]);
    out.extend(texts(&[b"regular", b"contents", b"x", b")", b")"]));
    out
}

fn directory(entries: &[Vec<u8>]) -> Vec<u8> {
    let mut out = texts(&[b"nix-archive-1", b"(", b"type", b"directory"]);
    out.extend(entries.concat());
    out.extend(text(b")"));
    out
}

fn result(bytes: &[u8]) -> Result<bool, NarError> {
    NarParser::new()
        .push(bytes)
        .map(|p| p.ended && p.consumed == bytes.len())
}

/// Tells whether the oracle finds exactly one archive in `bytes`.
fn oracle_accepts(bytes: &[u8]) -> bool {
    nar::decode_events_reader(&mut &*bytes, |_| Ok(())).is_ok()
}

fn sample() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    std::fs::create_dir_all(root.join("a/b/c")).unwrap();
    std::fs::create_dir(root.join("empty")).unwrap();
    std::fs::write(root.join("a/file"), b"hello, world").unwrap();
    std::fs::write(root.join("a/nothing"), b"").unwrap();
    std::fs::write(root.join("a/b/größe"), vec![7; 5000]).unwrap();
    std::os::unix::fs::symlink("../file", root.join("a/b/link")).unwrap();
    let script = root.join("a/b/c/run");
    std::fs::write(&script, b"#!/bin/sh\n").unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&script, mode).unwrap();
    let mut bytes = Vec::new();
    nar::encode_path(&mut bytes, &root, CaseHack::Disabled).unwrap();
    bytes
}

#[test]
fn the_end_is_found_whatever_the_chunks() {
    let bytes = sample();
    let mut stream = bytes.clone();
    stream.extend_from_slice(b"what follows");
    for size in [1, 2, 3, 5, 7, 8, 9, 16, 100, 4096, stream.len()] {
        let mut parser = NarParser::with_size_max(bytes.len() as u64);
        let mut total = 0;
        for chunk in stream.chunks(size) {
            let progress = parser.push(chunk).unwrap();
            total += progress.consumed;
            if progress.ended {
                break;
            }
            assert_eq!(progress.consumed, chunk.len());
        }
        assert_eq!(total, bytes.len(), "chunks of {size}");
        assert_eq!(parser.offset(), bytes.len() as u64);
        assert_eq!(
            parser.push(b"more").unwrap(),
            Progress {
                consumed: 0,
                ended: true
            }
        );
    }
}

#[test]
fn a_length_beyond_the_promised_size_is_refused_at_once() {
    let bytes = sample();
    let mut parser = NarParser::with_size_max(bytes.len() as u64 - 1);
    assert!(matches!(parser.push(&bytes), Err(NarError::Length { .. })));
}

#[test]
fn truncation_is_not_an_end() {
    let bytes = sample();
    for len in 0..bytes.len() {
        let progress = NarParser::new().push(&bytes[..len]).unwrap();
        assert!(!progress.ended, "{len}");
    }
}

#[test]
fn hostile_archives_are_refused() {
    let bad = |entries: &[Vec<u8>]| result(&directory(entries)).unwrap_err();
    for name in [&b""[..], b".", b"..", b"a/b", b"a\0b", &[b'a'; 256]] {
        let error = bad(&[entry(name)]);
        assert!(
            matches!(error, NarError::Name { .. } | NarError::Length { .. }),
            "{name:?}: {error}"
        );
    }
    assert_eq!(result(&directory(&[entry(&[0xff; 255])])), Ok(true));
    for pair in [[b"b", b"a"], [b"a", b"a"]] {
        let error = bad(&pair.map(|name| entry(name)));
        assert!(matches!(error, NarError::Order { .. }), "{error}");
    }
    let mut target = texts(&[b"nix-archive-1", b"(", b"type", b"symlink", b"target"]);
    target.extend_from_slice(&(1_u64 << 40).to_le_bytes());
    assert!(matches!(result(&target), Err(NarError::Length { .. })));
    let mut contents = texts(&[b"nix-archive-1", b"(", b"type", b"regular", b"contents"]);
    contents.extend_from_slice(&u64::MAX.to_le_bytes());
    assert!(matches!(result(&contents), Err(NarError::Length { .. })));
    let mut padded = text(b"nix-archive-1");
    *padded.last_mut().unwrap() = 1;
    assert!(matches!(result(&padded), Err(NarError::Padding { .. })));
    let error = result(&text(b"nix-archive-2")).unwrap_err();
    assert_eq!(
        error.to_string(),
        "malformed NAR: no \"nix-archive-1\" at byte 21"
    );
}

#[test]
fn depth_is_bounded_as_in_nix() {
    let nested = |directories: usize| {
        let mut out = text(b"nix-archive-1");
        for _ in 0..directories {
            out.extend(texts(&[b"(", b"type", b"directory"]));
            out.extend(texts(&[b"entry", b"(", b"name", b"d", b"node"]));
        }
        out.extend(texts(&[b"(", b"type", b"regular", b"contents", b"", b")"]));
        for _ in 0..directories {
            out.extend(texts(&[b")", b")"]));
        }
        out
    };
    for (directories, accepted) in [(62, true), (63, true), (64, false), (65, false)] {
        let bytes = nested(directories);
        assert_eq!(result(&bytes) == Ok(true), accepted, "{directories}");
        assert_eq!(oracle_accepts(&bytes), accepted, "{directories}");
    }
    assert_eq!(result(&nested(100_000)), Err(NarError::Depth));
}

#[derive(Clone, Debug)]
enum Tree {
    File(bool, Vec<u8>),
    Link(Vec<u8>),
    Directory(std::collections::BTreeMap<Vec<u8>, Tree>),
}

fn tree() -> impl Strategy<Value = Tree> {
    let leaf = prop_oneof![
        (any::<bool>(), prop::collection::vec(any::<u8>(), 0..40))
            .prop_map(|(executable, bytes)| Tree::File(executable, bytes)),
        prop::collection::vec(1_u8.., 1..20).prop_map(Tree::Link),
    ];
    let name = "[a-z][a-z.-]{0,12}".prop_map(String::into_bytes);
    leaf.prop_recursive(5, 40, 6, move |inner| {
        prop::collection::btree_map(name.clone(), inner, 0..6).prop_map(Tree::Directory)
    })
}

fn node(tree: &Tree, out: &mut Vec<u8>) {
    match tree {
        Tree::File(executable, bytes) => {
            out.extend(texts(&[b"(", b"type", b"regular"]));
            if *executable {
                out.extend(texts(&[b"executable", b""]));
            }
            out.extend(texts(&[b"contents", bytes, b")"]));
        }
        Tree::Link(target) => {
            out.extend(texts(&[b"(", b"type", b"symlink", b"target"]));
            out.extend(texts(&[target, b")"]));
        }
        Tree::Directory(entries) => {
            out.extend(texts(&[b"(", b"type", b"directory"]));
            for (name, child) in entries {
                out.extend(texts(&[b"entry", b"(", b"name", name, b"node"]));
                node(child, out);
                out.extend(text(b")"));
            }
            out.extend(text(b")"));
        }
    }
}

fn encode(tree: &Tree) -> Vec<u8> {
    let mut out = text(b"nix-archive-1");
    node(tree, &mut out);
    out
}

proptest! {
    #[test]
    fn agrees_with_the_oracle(
        tree in tree(),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = encode(&tree);
        if flips.is_empty() && cut.is_none() {
            prop_assert_eq!(result(&bytes), Ok(true));
        }
        for (at, value) in flips {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        fuzz(&bytes);
        match result(&bytes) {
            // Nix refuses what no file system can hold, the oracle does not.
            Err(NarError::Name { .. }) => {}
            ours => prop_assert_eq!(ours == Ok(true), oracle_accepts(&bytes)),
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        fuzz(&bytes);
        let mut begun = texts(&[b"nix-archive-1", b"(", b"type", b"directory"]);
        begun.extend(bytes);
        fuzz(&begun);
    }
}
