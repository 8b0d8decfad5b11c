//! Narinfos: vectors that `nix copy` wrote, the dialects of other caches, and mutated text.

use muster::nix::fingerprint;
use muster::nix::narinfo::{Compression, NarInfo, NarInfoError, fuzz};
use muster::nix::signature::PublicKey;
use muster::nix::store_path::StoreDir;
use proptest::prelude::*;

/// Names a file of `tests/vectors/narinfo` and embeds it.
macro_rules! vector {
    ($name:literal) => {
        (
            $name,
            include_str!(concat!("vectors/narinfo/", $name, ".narinfo")),
        )
    };
}

/// Names and texts in `tests/vectors/narinfo`.
const WRITTEN_BY_NIX: [(&str, &str); 6] = [
    vector!("none-ca-recursive"),
    vector!("none-deriver"),
    vector!("xz-ca-derivation"),
    vector!("xz-ca-flat"),
    vector!("xz-ca-text-unsigned"),
    vector!("zstd-self-reference-two-signatures"),
];

const KEYS: [&str; 2] = [
    "test-1:PHRSweHfQGggVdPwJBrhjwr12+bpNowAK1TixrpG51M=",
    "other-key.example-1:PEq8HNP0RJW8pp6E9hMNhSdhenjZD+eP/r5UOJsU5xw=",
];

/// What a cache may write at least.
const TERSE: &str = "\
StorePath: /nix/store/xcwmxwa8vpv4xpmpfaibqv6czqk0iq4f-foo
URL: nar/x.nar
NarHash: sha256:1ph6nz4k516p3yayhhv60hzagxaal4aa7mwpj3ys2zvbd21vnrga
NarSize: 208
";

fn parse(text: &str) -> Result<NarInfo, NarInfoError> {
    NarInfo::parse(text, &StoreDir::default())
}

#[test]
fn what_nix_wrote_round_trips_byte_for_byte() {
    for (name, text) in WRITTEN_BY_NIX {
        let read = parse(text).unwrap();
        assert_eq!(read.render(&StoreDir::default()), text, "{name}");
    }
}

#[test]
fn what_nix_signed_verifies() {
    let keys = KEYS.map(|key| PublicKey::parse(key).unwrap());
    for (name, text) in WRITTEN_BY_NIX {
        let info = parse(text).unwrap().info;
        let fingerprint = fingerprint::of_path(&info, &StoreDir::default());
        for signature in &info.signatures {
            let verifies = keys.iter().any(|k| k.verifies(&fingerprint, signature));
            assert!(verifies, "{name}: {signature}");
        }
        if info.ca.is_some() {
            assert!(info.proves_itself(&StoreDir::default()), "{name}");
        }
    }
}

#[test]
fn fields_of_a_whole_narinfo() {
    let (_, text) = WRITTEN_BY_NIX[5];
    let read = parse(text).unwrap();
    assert_eq!(read.compression, Compression::Zstd);
    assert_eq!(read.file_size, Some(161));
    assert_eq!(read.info.nar_size, 208);
    assert_eq!(read.info.references.len(), 2);
    assert_eq!(read.info.signatures.len(), 2);
    assert_eq!(read.info.deriver.unwrap().name(), "foo.drv");
}

#[test]
fn terse_narinfo_has_defaults() {
    for text in [
        TERSE,
        TERSE.trim_end(),
        &format!("{TERSE}Deriver: unknown-deriver\n"),
    ] {
        let read = parse(text).unwrap();
        assert_eq!(read.compression, Compression::Bzip2);
        assert_eq!((read.file_hash, read.file_size), (None, None));
        assert_eq!(read.info.references, []);
        assert_eq!(read.info.deriver, None);
    }
}

#[test]
fn every_form_of_a_hash_is_the_same_hash() {
    let base32 = "sha256:1ph6nz4k516p3yayhhv60hzagxaal4aa7mwpj3ys2zvbd21vnrga";
    let expected = parse(TERSE).unwrap().info.nar_hash;
    let digest = expected.0;
    let hex = muster::nix::hash::encode_hex(&digest);
    let sri = {
        use base64::Engine as _;
        base64::engine::general_purpose::STANDARD.encode(digest)
    };
    for form in [
        format!("sha256:{hex}"),
        format!("sha256-{sri}"),
        format!("sha256:{sri}"),
    ] {
        let read = parse(&TERSE.replace(base32, &form)).unwrap();
        assert_eq!(read.info.nar_hash, expected, "{form}");
        let with_file = parse(&format!("{TERSE}FileHash: {form}\n")).unwrap();
        assert_eq!(with_file.file_hash.unwrap().digest(), digest);
    }
}

#[test]
fn unknown_fields_and_malformed_signatures_are_dropped() {
    let text =
        format!("{TERSE}System: x86_64-linux\nSig: nonsense\nSig: a:!!\nSig: \nColour:red\n");
    let read = parse(&text).unwrap();
    assert_eq!(read, parse(TERSE).unwrap());
}

#[test]
fn a_signature_given_twice_counts_once() {
    let (_, text) = WRITTEN_BY_NIX[3];
    let signature = text.lines().find(|l| l.starts_with("Sig:")).unwrap();
    let read = parse(&format!("{text}{signature}\n")).unwrap();
    assert_eq!(read.info.signatures.len(), 1);
}

#[test]
fn references_come_out_sorted_and_once() {
    let foo = "xcwmxwa8vpv4xpmpfaibqv6czqk0iq4f-foo";
    let dep = "c61i4gz5k01hfwfm979s0m23hxb0c733-dep";
    let read = parse(&format!("{TERSE}References: {foo}  {dep} {foo}\n")).unwrap();
    let names: Vec<_> = read.info.references.iter().map(|r| r.as_str()).collect();
    assert_eq!(names, [dep, foo]);
}

#[test]
fn every_field_that_stands_once_is_refused_twice() {
    let (_, text) = WRITTEN_BY_NIX[2];
    for line in text.lines().filter(|line| !line.starts_with("Sig:")) {
        let twice = parse(&format!("{text}{line}\n"));
        let expected = text.lines().count() + 1;
        assert!(
            matches!(twice, Err(NarInfoError::Repeated { line, .. }) if line == expected),
            "{line}: {twice:?}"
        );
    }
}

#[test]
fn every_needed_field_is_missed_by_name() {
    for field in ["StorePath", "URL", "NarHash", "NarSize"] {
        let kept = TERSE.lines().filter(|line| !line.starts_with(field));
        let text: String = kept.map(|line| format!("{line}\n")).collect();
        assert_eq!(parse(&text), Err(NarInfoError::Missing(field)));
    }
    assert_eq!(parse(""), Err(NarInfoError::Missing("StorePath")));
}

#[test]
fn wrong_values_are_refused_with_their_line() {
    let size = "NarSize: 208";
    let path = "StorePath: /nix/store/xcwmxwa8vpv4xpmpfaibqv6czqk0iq4f-foo";
    for (from, to, line) in [
        (size, "NarSize: 0", 4),
        (size, "NarSize: ", 4),
        (size, "NarSize: -1", 4),
        (size, "NarSize: +1", 4),
        (size, "NarSize: 1.5", 4),
        (size, "NarSize: 18446744073709551616", 4),
        (size, "NarSize: 208\r", 4),
        (
            path,
            "StorePath: /gnu/store/xcwmxwa8vpv4xpmpfaibqv6czqk0iq4f-foo",
            1,
        ),
        (path, "StorePath: xcwmxwa8vpv4xpmpfaibqv6czqk0iq4f-foo", 1),
        ("URL: nar/x.nar", "URL: ", 2),
        ("URL: nar/x.nar", "URL: nar/\u{7}", 2),
        ("sha256:1ph6", "sha1:1ph6", 3),
        ("sha256:1ph6", "sha256:2ph6", 3),
    ] {
        let refused = parse(&TERSE.replace(from, to));
        assert!(
            matches!(refused, Err(NarInfoError::Malformed { line: l, .. }) if l == line),
            "{to}: {refused:?}"
        );
    }
    for extra in [
        "Compression: foo",
        "FileSize: many",
        "FileHash: sha256:",
        "References: /nix/store/c61i4gz5k01hfwfm979s0m23hxb0c733-dep",
        "Deriver: x.drv",
        "CA: fixed:x",
    ] {
        let refused = parse(&format!("{TERSE}{extra}\n"));
        assert!(
            matches!(refused, Err(NarInfoError::Malformed { line: 5, .. })),
            "{extra}: {refused:?}"
        );
    }
}

#[test]
fn foreign_texts_are_refused() {
    for text in ["<html>", "\n", "StorePath", &format!("{TERSE}\n")] {
        let refused = parse(text);
        assert!(
            matches!(refused, Err(NarInfoError::NoColon { .. })),
            "{text:?}: {refused:?}"
        );
    }
    let large = format!("{TERSE}X: {}\n", "x".repeat(1 << 20));
    assert_eq!(parse(&large), Err(NarInfoError::TooLarge(large.len())));
}

#[test]
fn another_store_directory() {
    let store_dir = StoreDir::new("/gnu/store").unwrap();
    let text = TERSE.replace("/nix/store", "/gnu/store");
    let read = NarInfo::parse(&text, &store_dir).unwrap();
    assert!(
        read.render(&store_dir)
            .starts_with("StorePath: /gnu/store/")
    );
}

fn bytes_to_put() -> impl Strategy<Value = Vec<u8>> {
    let pieces = [
        "\n",
        ":",
        " ",
        "NarSize: ",
        "Sig: ",
        "é",
        "0",
        "sha256:",
        "References: ",
    ];
    let piece = prop::sample::select(pieces.to_vec()).prop_map(|piece| piece.as_bytes().to_vec());
    prop_oneof![piece, prop::collection::vec(any::<u8>(), 0..4)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn mutated_narinfos_never_panic_and_stay_themselves(
        which in 0..WRITTEN_BY_NIX.len(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), 0_usize..8, bytes_to_put()), 0..6),
    ) {
        let mut bytes = WRITTEN_BY_NIX[which].1.as_bytes().to_vec();
        for (place, removed, put) in edits {
            let start = place.index(bytes.len() + 1);
            let end = bytes.len().min(start + removed);
            bytes.splice(start..end, put);
        }
        fuzz(&bytes);
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        fuzz(&bytes);
    }

    #[test]
    fn what_we_write_reads_as_it_was(
        name in "[a-zA-Z0-9+_?=][a-zA-Z0-9+._?=-]{0,40}",
        url in "[!-~]{1,80}",
        hash: [u8; 32],
        nar_size in 1_u64..,
        file: Option<([u8; 32], u64)>,
        references in prop::collection::vec(any::<[u8; 20]>(), 0..20),
        signers in 0_u8..4,
        zstd: bool,
    ) {
        use muster::nix::hash::{Algorithm, Hash, NarHash};
        use muster::nix::signature::{KeyName, SecretKey};

        let path = |hash: [u8; 20], name: &str| {
            format!("{}-{name}", muster::nix::base32::encode(&hash)).parse().unwrap()
        };
        let mut info = parse(TERSE).unwrap().info;
        info.path = path([7; 20], &name);
        info.nar_hash = NarHash(hash);
        info.nar_size = nar_size;
        info.references = references.into_iter().map(|hash| path(hash, &name)).collect();
        info.normalize();
        info.signatures = (0..signers).map(|signer| {
            let name = KeyName::new(&format!("key-{signer}")).unwrap();
            let key = SecretKey::from_seed(name, &zeroize::Zeroizing::new([signer; 32]));
            key.sign("1;")
        }).collect();
        let narinfo = NarInfo {
            info,
            url,
            compression: if zstd { Compression::Zstd } else { Compression::None },
            file_hash: file.and_then(|(digest, _)| Hash::new(Algorithm::Sha256, &digest)),
            file_size: file.map(|(_, size)| size),
        };
        let text = narinfo.render(&StoreDir::default());
        prop_assert_eq!(parse(&text), Ok(narinfo));
    }
}
