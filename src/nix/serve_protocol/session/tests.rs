use proptest::prelude::*;

use super::super::Version;
use super::super::fuzz::{fuzz, run};
use super::super::handshake::Handshake;
use super::*;
use crate::nix::worker_protocol::wire::Writer;

/// What `nix-store --serve` 2.8.0 sent: its greeting; the closure of `top`, which refers to `hello`;
/// the infos of both, asked for with a third path that is not there; and which of two are valid.
const NIX_2_8: &[u8] = include_bytes!("../../../../tests/vectors/serve_protocol/nix-2.8.bin");

const TOP: &str = "i4f75pn3bxkxdk2kld86k5qazq4cqj8i-top";
const HELLO: &str = "jlj1awwa7v2fzg7chy9da1bq8iv9pkrd-hello";

fn path(name: &str) -> StorePath {
    name.parse().unwrap()
}

/// Plays answers in several cuts, which must agree.
fn play(dir: &str, questions: &[Awaited], answers: &[u8]) -> (Vec<Event>, Option<ProtocolError>) {
    let dir = StoreDir::new(dir).unwrap();
    let events = run(&dir, questions, answers, [answers.len()].into_iter());
    for size in [1, 2, 7, 8, 9, 100] {
        let sizes = std::iter::repeat(size);
        assert_eq!(run(&dir, questions, answers, sizes), events, "{size}");
    }
    events
}

fn script(parts: &[Part<'_>]) -> Vec<u8> {
    let mut bytes = BytesMut::new();
    let mut out = Writer(&mut bytes);
    for part in parts {
        match part {
            N(number) => out.number(*number),
            T(text) => out.text(text),
        }
    }
    bytes.to_vec()
}

enum Part<'a> {
    N(u64),
    T(&'a str),
}

use Part::{N, T};

#[test]
fn nix_2_8_answers() {
    let mut input = BytesMut::from(NIX_2_8);
    let version = Handshake::begin(&mut BytesMut::new()).proceed(&mut input);
    assert_eq!(version, Ok(Some(Version::new(2, 7))));
    let questions = [Awaited::Paths, Awaited::Infos(3), Awaited::Paths];
    let (events, error) = play("/tmp/vs/store", &questions, &input);
    assert_eq!(error, None);
    let [
        Event::Paths(Ok(closure)),
        Event::Info(Ok(top)),
        Event::Info(Ok(hello)),
        Event::InfosEnd,
        Event::Paths(Ok(valid)),
    ] = &events[..]
    else {
        panic!("{events:?}");
    };
    assert_eq!(closure[..], [path(TOP), path(HELLO)]);
    assert_eq!(valid[..], [path(TOP)]);

    assert_eq!((&top.path, top.nar_size), (&path(TOP), 168));
    assert_eq!(top.references, [path(HELLO)]);
    let deriver = path("00000000000000000000000000000000-top.drv");
    assert_eq!(top.deriver, Some(deriver));
    assert_eq!(top.signatures.len(), 1);
    assert!(top.signatures[0].to_string().starts_with("k-1:"));
    assert_eq!(top.ca, None);

    assert_eq!((&hello.path, hello.nar_size), (&path(HELLO), 120));
    let hash = "0sg9f58l1jj88w6pdrfdpj5x9b1zrwszk84j81zvby36q9whhhqa";
    assert_eq!(hello.nar_hash.to_base32(), hash);
    assert_eq!((hello.references.len(), &hello.deriver), (0, &None));
    let ca = hello.ca.as_ref().map(ToString::to_string);
    assert_eq!(ca, Some(format!("fixed:r:sha256:{hash}")));
}

#[test]
fn a_strange_name_or_hash_fails_its_own_info_alone() {
    let top = format!("/nix/store/{TOP}");
    let hash = "sha256:0sg9f58l1jj88w6pdrfdpj5x9b1zrwszk84j81zvby36q9whhhqa";
    let info =
        |name: &str, hash: &str| script(&[T(name), T(""), N(0), N(1), N(8), T(hash), T(""), N(0)]);
    let answers = [
        info("/nix/store/strange", hash),
        info(&top, "sha256:no"),
        info("/elsewhere/i4f75pn3bxkxdk2kld86k5qazq4cqj8i-top", hash),
        info(&top, hash),
        script(&[T("")]),
    ];
    let (events, error) = play("/nix/store", &[Awaited::Infos(4)], &answers.concat());
    assert_eq!(error, None);
    assert!(matches!(
        &events[..],
        [
            Event::Info(Err(ReplyError::Malformed(_))),
            Event::Info(Err(ReplyError::Malformed(_))),
            Event::Info(Err(ReplyError::StoreDir(_))),
            Event::Info(Ok(_)),
            Event::InfosEnd,
        ]
    ));
    let (events, _) = play("/nix/store", &[Awaited::Paths], &script(&[N(1), T("x")]));
    assert!(matches!(&events[..], [Event::Paths(Err(_))]));
}

#[test]
fn more_than_was_asked_for_breaks_the_session() {
    let top = format!("/nix/store/{TOP}");
    let info = [T(&top), T(""), N(0), N(1), N(8), T("x"), T(""), N(0)];
    let answers = [script(&info), script(&info)].concat();
    let (events, error) = play("/nix/store", &[Awaited::Infos(1)], &answers);
    assert_eq!((events.len(), error), (1, Some(ProtocolError::Unasked)));
    let (events, error) = play("/nix/store", &[], b"\0");
    assert_eq!((events.len(), error), (0, Some(ProtocolError::Unasked)));
}

#[test]
fn lengths_are_not_believed() {
    for question in [Awaited::Paths, Awaited::Infos(1)] {
        let (_, error) = play("/nix/store", &[question], &script(&[N(u64::MAX)]));
        assert!(matches!(error, Some(ProtocolError::TooLong { .. })));
    }
}

#[test]
fn a_long_closure_in_single_bytes_takes_linear_time() {
    let names: Vec<_> = (0..50_000)
        .map(|place| format!("/nix/store/i4f75pn3bxkxdk2kld86k5qazq4cqj8i-{place}"))
        .collect();
    let mut parts = vec![N(50_000)];
    parts.extend(names.iter().map(|name| T(name)));
    let sizes = std::iter::repeat(1);
    let dir = StoreDir::default();
    let (events, _) = run(&dir, &[Awaited::Paths], &script(&parts), sizes);
    assert!(matches!(&events[..], [Event::Paths(Ok(paths))] if paths.len() == 50_000));
}

/// Questions and what a server answered, as `fuzz` takes them.
fn corpus() -> Vec<u8> {
    let answers = &NIX_2_8[16..];
    // Three questions: paths, 3 infos, paths.
    let mut data = vec![3, 0, 13, 0];
    data.extend_from_slice(answers);
    let text = String::from_utf8_lossy(&data).into_owned();
    assert!(text.contains(TOP));
    data
}

proptest! {
    #[test]
    fn arbitrary_answers_never_panic(data in prop::collection::vec(any::<u8>(), 0..400)) {
        fuzz(&data);
    }

    #[test]
    fn mutated_answers_never_panic(
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut data = corpus();
        for (at, value) in flips {
            let at = at.index(data.len());
            data[at] = value;
        }
        if let Some(cut) = cut {
            data.truncate(cut.index(data.len()));
        }
        fuzz(&data);
    }
}
