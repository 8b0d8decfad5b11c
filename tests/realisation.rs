//! Realisations, build traces and `nix-cache-info`: mutated text never panics and stays itself.

use muster::nix::build_trace::{BuildTraceEntry, BuildTraceKey};
use muster::nix::cache_info::CacheInfo;
use muster::nix::path_info::Trust;
use muster::nix::realisation::{DrvOutput, Realisation};
use proptest::prelude::*;

/// What Nix 2.8 wrote, and the value of a build trace entry.
const TEXTS: [&str; 3] = [
    include_str!("vectors/realisation/plain.doi"),
    include_str!("vectors/realisation/dependent.doi"),
    r#"{"outPath":"pdz9ww5hfy84ni0j1axgk4bjn1y4vb7c-ca","signatures":["x",{"keyName":"a","sig":"b"}]}"#,
];

fn key() -> BuildTraceKey {
    BuildTraceKey::parse("lpifnrpglcy07zx5rachvz941jw9vsmj-ca.drv/out.doi").unwrap()
}

fn check(bytes: &[u8]) {
    if let Ok(read) = Realisation::parse(bytes) {
        assert_eq!(
            Realisation::parse(read.render().as_bytes()),
            Ok(read.clone())
        );
        assert!(read.verify(&Trust::Keys(vec![])).is_err());
    }
    if let Ok(read) = BuildTraceEntry::parse(key(), bytes) {
        let again = BuildTraceEntry::parse(key(), read.render().as_bytes());
        assert_eq!(again, Ok(read.clone()));
        assert!(read.verify(&Trust::Keys(vec![])).is_err());
    }
    let text = String::from_utf8_lossy(bytes);
    if let Ok(read) = CacheInfo::parse(&text) {
        assert_eq!(CacheInfo::parse(&read.render()), Ok(read));
    }
    if let Ok(id) = text.parse::<DrvOutput>() {
        assert_eq!(id.to_string(), text);
    }
    if let Some(key) = BuildTraceKey::parse(&text) {
        assert_eq!(key.to_string(), text);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn mutated_texts(
        which in 0..TEXTS.len(),
        place: prop::sample::Index,
        removed in 0_usize..6,
        put in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..4),
            "[\\[\\]{},:\"a-f0-9!/.-]{0,4}".prop_map(String::into_bytes),
        ],
    ) {
        let mut bytes = TEXTS[which].as_bytes().to_vec();
        let start = place.index(bytes.len() + 1);
        let end = bytes.len().min(start + removed);
        bytes.splice(start..end, put);
        check(&bytes);
    }

    #[test]
    fn cache_infos(text in "((StoreDir|Priority|WantMassQuery|x):? ?[/a-z0-9-]{0,9}\n){0,5}") {
        check(text.as_bytes());
    }

    #[test]
    fn names(text in "sha256:[0-9a-f]{64}!?[a-z./]{0,5}|[0-9a-z]{32}-a.drv/[a-z./]{0,5}.doi") {
        check(text.as_bytes());
    }
}
