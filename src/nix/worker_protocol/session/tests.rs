use proptest::prelude::*;

use super::super::fuzz::{fuzz, run};
use super::super::request::{Encoder, Request};
use super::super::wire::Writer;
use super::*;
use crate::nix::build_trace::{BuildTraceEntry, BuildTraceKey};

const HELLO: &str = "cr06m10v2k1pimvwgaybw5hv9i9dg7ck-hello-proto";
const REF: &str = "i4f75pn3bxkxdk2kld86k5qazq4cqj8i-hello";

/// What nix-daemon 2.8.0 sent for a path with the contents `hello`.
const PATH_INFO_2_8: &[u8] = b"stla\0\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x40\0\0\0\0\0\0\0\
    0a430879c266f8b57f4092a0f935cf3facd48bbccde5760d4748ca405171e969\0\0\0\0\0\0\0\0\
    \xdd\x03\x01k\0\0\0\0x\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0C\0\0\0\0\0\0\0\
    fixed:r:sha256:0sg9f58l1jj88w6pdrfdpj5x9b1zrwszk84j81zvby36q9whhhqa\0\0\0\0\0";

const NAR_2_8: &[u8] =
    b"stla\0\0\0\0\r\0\0\0\0\0\0\0nix-archive-1\0\0\0\x01\0\0\0\0\0\0\0(\0\0\0\0\0\0\0\
    \x04\0\0\0\0\0\0\0type\0\0\0\0\x07\0\0\0\0\0\0\0regular\0\x08\0\0\0\0\0\0\0contents\
    \x05\0\0\0\0\0\0\0hello\0\0\0\x01\0\0\0\0\0\0\0)\0\0\0\0\0\0\0";

/// What nix-daemon 2.8.0 sent for the NAR of a path that is not there, up to its end.
const NAR_MISSING_2_8: &[u8] = b"stla\0\0\0\0\r\0\0\0\0\0\0\0nix-archive-1\0\0\0ptxc\0\0\0\0\
    \x05\0\0\0\0\0\0\0Error\0\0\0\0\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0Error\0\0\0\x83\0\0\0\0\0\0\0\
    getting status of '\x1b[35;1m/tmp/nixpriv.3ykj0_6e/store/00000000000000000000000000000000-x\x1b[0m': \
    \x1b[35;1mNo such file or directory\x1b[0m\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\
    ptxc\0\0\0\0\x05\0\0\0\0\0\0\0Error\0\0\0\0\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0Error\0\0\0\x83\0\0\0\0\0\0\0\
    getting status of '\x1b[35;1m/tmp/nixpriv.3ykj0_6e/store/00000000000000000000000000000000-x\x1b[0m': \
    \x1b[35;1mNo such file or directory\x1b[0m\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

fn peer(minor: u8) -> Peer {
    Peer {
        version: Version::new(1, minor),
        nix_version: None,
        trusted: None,
        build_traces: false,
    }
}

fn awaited(peer: &Peer, requests: &[Request]) -> Vec<Awaited> {
    let encoder = Encoder::new(peer, StoreDir::default());
    let encode = |request: &Request| {
        let expected = encoder.encode(request.clone(), &mut BytesMut::new());
        expected.unwrap().0
    };
    requests.iter().map(encode).collect()
}

/// Plays answers in several cuts, which must agree.
fn play(minor: u8, requests: &[Request], answers: &[u8]) -> (Vec<Event>, Option<ProtocolError>) {
    let peer = peer(minor);
    let questions = awaited(&peer, requests);
    let events = run(&peer, &questions, answers, [answers.len()].into_iter());
    for size in [1, 2, 7, 8, 9, 100] {
        let sizes = std::iter::repeat(size);
        assert_eq!(run(&peer, &questions, answers, sizes), events, "{size}");
    }
    events
}

fn replies(minor: u8, requests: &[Request], answers: &[u8]) -> Vec<Result<Reply, ReplyError>> {
    let (events, error) = play(minor, requests, answers);
    assert_eq!(error, None);
    let reply = |event| match event {
        Event::Reply(reply) => Some(reply),
        _ => None,
    };
    events.into_iter().filter_map(reply).collect()
}

/// A word or a text of a scripted answer.
enum Item<'a> {
    N(u64),
    T(&'a str),
}
use Item::{N, T};

fn script(items: &[Item<'_>]) -> Vec<u8> {
    let mut bytes = BytesMut::new();
    for item in items {
        match item {
            N(number) => Writer(&mut bytes).number(*number),
            T(text) => Writer(&mut bytes).text(text),
        }
    }
    bytes.to_vec()
}

fn path(name: &str) -> StorePath {
    name.parse().unwrap()
}

fn absolute(name: &str) -> String {
    StoreDir::default().join(&path(name))
}

fn nar_request(nar_size: u64) -> Request {
    Request::NarFromPath {
        path: path(HELLO),
        nar_size,
    }
}

const LAST: Item<'_> = N(message::LAST);
const ERROR: Item<'_> = N(message::ERROR);

#[test]
fn a_path_info_of_nix_2_8() {
    let requests = [Request::QueryPathInfo(path(HELLO))];
    let mut replies = replies(34, &requests, PATH_INFO_2_8);
    let Ok(Reply::PathInfo(Some(info))) = replies.remove(0) else {
        panic!("{replies:?}")
    };
    assert_eq!(info.path.as_str(), HELLO);
    assert_eq!(info.nar_size, 120);
    assert_eq!(
        info.nar_hash.to_string(),
        "sha256:0sg9f58l1jj88w6pdrfdpj5x9b1zrwszk84j81zvby36q9whhhqa"
    );
    assert!(info.ca.is_some());
    assert_eq!((info.deriver, info.references.len()), (None, 0));
}

#[test]
fn a_full_path_info_of_1_21() {
    let references = [absolute(REF), absolute(HELLO), absolute(REF)];
    let good = format!("key-1:{}==", "A".repeat(86));
    let mut items = vec![
        LAST,
        N(1),
        T("/nix/store/i4f75pn3bxkxdk2kld86k5qazq4cqj8i-hello.drv"),
    ];
    let hash = "0".repeat(64);
    items.extend([
        T(&hash),
        N(3),
        T(&references[0]),
        T(&references[1]),
        T(&references[2]),
    ]);
    items.extend([
        N(1_700_000_000),
        N(1234),
        N(1),
        N(2),
        T(&good),
        T("malformed"),
        T("future:x"),
    ]);
    // A second, not there.
    items.extend([LAST, N(0)]);
    let requests = [HELLO, REF].map(|name| Request::QueryPathInfo(path(name)));
    let replies = replies(21, &requests, &script(&items));
    let Ok(Reply::PathInfo(Some(info))) = &replies[0] else {
        panic!("{replies:?}")
    };
    assert_eq!(info.references, [path(HELLO), path(REF)]);
    assert_eq!(
        info.deriver,
        Some(path("i4f75pn3bxkxdk2kld86k5qazq4cqj8i-hello.drv"))
    );
    assert_eq!(info.signatures.len(), 1);
    assert_eq!((info.nar_size, &info.ca), (1234, &None));
    assert_eq!(replies[1], Ok(Reply::PathInfo(None)));
}

#[test]
fn errors_fail_their_question_alone() {
    let request = || Request::QueryPathFromHashPart(path(HELLO).hash());
    let requests = [request(), request(), request(), request(), request()];
    let elsewhere = format!("/elsewhere/{HELLO}");
    let structured = [
        N(0x6f6c_6d67),
        T("a line\n"),
        ERROR,
        T("Error"),
        N(0),
        T("Error"),
        T("\u{1b}[31;1mdisk\u{1b}[0m is full"),
        N(0),
        N(1),
        N(0),
        T("while looking"),
    ];
    let others = [
        LAST,
        T(&elsewhere),
        LAST,
        T("/nix/store/nonsense"),
        LAST,
        T(""),
        LAST,
        T(&absolute(HELLO)),
    ];
    let answers = [script(&structured), script(&others)].concat();
    let (events, error) = play(38, &requests, &answers);
    assert_eq!(error, None);
    assert_eq!(events[0], Event::Log("a line".to_owned()));
    let replies = replies(38, &requests, &answers);
    assert_eq!(
        replies[0],
        Err(ReplyError::Remote("disk is full".to_owned()))
    );
    let Err(ReplyError::StoreDir(error)) = &replies[1] else {
        panic!("{replies:?}")
    };
    assert!(error.to_string().contains("\"/elsewhere/"), "{error}");
    assert!(matches!(replies[2], Err(ReplyError::Malformed(_))));
    assert_eq!(replies[3], Ok(Reply::Path(None)));
    assert_eq!(replies[4], Ok(Reply::Path(Some(path(HELLO)))));
}

#[test]
fn before_1_26_an_error_is_a_text_and_a_status() {
    let requests = [
        Request::IsValidPath(path(HELLO)),
        Request::IsValidPath(path(REF)),
    ];
    let items = [ERROR, T("no"), N(1), LAST, N(1)];
    let replies = replies(25, &requests, &script(&items));
    assert_eq!(replies[0], Err(ReplyError::Remote("no".to_owned())));
    assert_eq!(replies[1], Ok(Reply::Valid(true)));
}

#[test]
fn activities_pass() {
    let requests = [Request::AddTempRoot(path(HELLO))];
    let start = [
        N(0x5354_5254),
        N(1),
        N(3),
        N(101),
        T("copying"),
        N(2),
        N(0),
        N(7),
        N(1),
        T("x"),
    ];
    let result = [
        N(0),
        N(0x5253_4c54),
        N(1),
        N(105),
        N(1),
        N(1),
        T("y"),
        N(0x5354_4f50),
        N(1),
    ];
    let answers = [script(&start), script(&result), script(&[LAST, N(1)])].concat();
    let (events, error) = play(38, &requests, &answers);
    assert_eq!(error, None);
    let log = Event::Log("copying".to_owned());
    assert_eq!(events, [log, Event::Reply(Ok(Reply::Done))]);
}

#[test]
fn all_paths_come_in_parts() {
    let names: Vec<String> = (0..10_000)
        .map(|place| format!("/nix/store/{REF}-{place}"))
        .collect();
    let mut items = vec![LAST, N(10_002)];
    items.extend(names.iter().map(|name| T(name)));
    items.extend([T("/nix/store/.links"), T("/nix/store/x")]);
    let mut session = Session::new(&peer(32), StoreDir::default());
    session.expect(Expected(Awaited::AllPaths));
    let mut buffer = BytesMut::from(&script(&items)[..]);
    let mut paths = 0;
    loop {
        match session.next(&mut buffer).unwrap().unwrap() {
            Event::Paths(part) => paths += part.len(),
            Event::Reply(Ok(Reply::AllPaths { unreadable })) => {
                assert_eq!((paths, unreadable), (10_000, 2));
                break;
            }
            event => panic!("{event:?}"),
        }
    }
    assert!(buffer.is_empty());
}

#[test]
fn realisations_in_three_forms() {
    let id = format!("sha256:{}!out", "0".repeat(64));
    let requests = [Request::QueryRealisation(id.parse().unwrap())];
    let ask = |minor, items: &[Item<'_>]| match &replies(minor, &requests, &script(items))[0] {
        Ok(Reply::Realisation(known)) => known.clone(),
        other => panic!("{other:?}"),
    };
    let bare = ask(30, &[LAST, N(1), T(&absolute(HELLO))]).unwrap();
    let json = format!(
        "{{\"dependentRealisations\":{{}},\"id\":\"{id}\",\"outPath\":\"{HELLO}\",\"signatures\":[]}}"
    );
    assert_eq!(ask(31, &[LAST, N(1), T(&json)]), Some(bare));
    assert_eq!(ask(34, &[LAST, N(0)]), None);

    let new = Peer {
        build_traces: true,
        ..peer(38)
    };
    let items = [
        LAST,
        N(1),
        T(&absolute(HELLO)),
        N(1),
        T("malformed"),
        LAST,
        N(0),
    ];
    let derivation = path("i4f75pn3bxkxdk2kld86k5qazq4cqj8i-hello.drv");
    let key = BuildTraceKey::new(derivation, "out").unwrap();
    let questions = [
        Awaited::BuildTrace(key.clone()),
        Awaited::BuildTrace(key.clone()),
    ];
    let (events, _) = run(&new, &questions, &script(&items), std::iter::repeat(3));
    let known = BuildTraceEntry {
        key,
        out_path: path(HELLO),
        signatures: vec![],
    };
    let known = Event::Reply(Ok(Reply::BuildTrace(Some(known))));
    assert_eq!(events, [known, Event::Reply(Ok(Reply::BuildTrace(None)))]);
}

#[test]
fn nars_follow_each_other() {
    let answers = [NAR_2_8, NAR_2_8, &script(&[LAST, N(1)])].concat();
    let requests = [
        nar_request(120),
        nar_request(120),
        Request::AddTempRoot(path(HELLO)),
    ];
    let (events, error) = play(34, &requests, &answers);
    assert_eq!(error, None);
    let chunk = Event::NarChunk(Bytes::from_static(&NAR_2_8[8..]));
    let nar = [Event::NarStart, chunk, Event::NarEnd];
    let done = [Event::Reply(Ok(Reply::Done))];
    assert_eq!(events, [&nar[..], &nar, &done].concat());
}

#[test]
fn a_nar_of_another_size_ends_the_session() {
    let error = |size| play(34, &[nar_request(size)], NAR_2_8).1.unwrap();
    let short = ProtocolError::NarSize {
        promised: 128,
        actual: 120,
    };
    assert_eq!(error(128), short);
    assert!(matches!(
        error(119),
        ProtocolError::Nar { promised: 119, .. }
    ));
}

#[test]
fn the_error_inside_the_nar_of_a_missing_path_is_shown() {
    let requests = [nar_request(120), nar_request(120)];
    let text = "getting status of '/tmp/nixpriv.3ykj0_6e/store/\
                00000000000000000000000000000000-x': No such file or directory";
    let refused = Event::NarRefused(text.to_owned());
    let over = Some(ProtocolError::Over);
    assert_eq!(
        play(34, &requests, NAR_MISSING_2_8),
        (vec![refused], over.clone())
    );

    // Nix 2.34 finds out before it writes anything of the NAR.
    let fields = [
        ERROR,
        T("Error"),
        N(0),
        T("Error"),
        T("path 'x' is not valid"),
        N(0),
        N(0),
    ];
    let answers = [script(&[LAST]), script(&fields), script(&fields)].concat();
    let refused = Event::NarRefused("path 'x' is not valid".to_owned());
    assert_eq!(play(38, &requests, &answers), (vec![refused], over));
}

#[test]
fn an_error_in_the_middle_of_a_nar_is_shown() {
    let fields = [
        ERROR,
        T("Error"),
        N(0),
        T("Error"),
        T("permission denied"),
        N(0),
        N(0),
    ];
    // Behind "contents", in place of the file's size, and behind "(", in place of a token.
    for cut in [8 + 88, 8 + 40] {
        let answers = [&NAR_2_8[..cut], &script(&fields)].concat();
        let (events, error) = play(34, &[nar_request(120)], &answers);
        assert_eq!(events, [Event::NarStart], "{cut}");
        let cut_short = ProtocolError::NarCut("permission denied".to_owned());
        assert_eq!(error, Some(cut_short), "{cut}");
    }
}

#[test]
fn broken_framing_ends_the_session() {
    let request = [Request::IsValidPath(path(HELLO))];
    let error = |items: &[Item<'_>]| play(34, &request, &script(items)).1.unwrap();
    assert!(matches!(
        error(&[N(7)]),
        ProtocolError::Unexpected { value: 7, .. }
    ));
    let (_, unasked) = play(34, &[], &script(&[LAST]));
    assert_eq!(unasked, Some(ProtocolError::Unasked));
    let fields = [ERROR, T("Error"), N(0), T("Error"), T("bye"), N(0), N(0)];
    let gave_up = ProtocolError::GaveUp("bye".to_owned());
    assert_eq!(play(34, &[], &script(&fields)).1, Some(gave_up));
    assert!(matches!(
        error(&[N(0x6f6c_6d67), N(1 << 40)]),
        ProtocolError::TooLong {
            length: 1_099_511_627_776,
            ..
        }
    ));
}

#[test]
fn one_byte_at_a_time_is_not_quadratic() {
    let names: Vec<String> = (0..100_000)
        .map(|place| format!("/nix/store/{REF}-{place}"))
        .collect();
    let mut items = vec![LAST, N(100_000)];
    items.extend(names.iter().map(|name| T(name)));
    let answers = script(&items);
    // 6.4 MB; looking at them all again at each byte would take hours.
    let sizes = std::iter::repeat(1);
    let (events, _) = run(&peer(34), &[Awaited::Paths], &answers, sizes);
    assert!(
        matches!(&events[..], [Event::Reply(Ok(Reply::Paths(paths)))] if paths.len() == 100_000)
    );
}

/// Questions and what a daemon answered, as `fuzz` takes them.
fn corpus() -> Vec<u8> {
    // Version 1.34; a path info, NAR of 120 bytes, path, all paths, acknowledgement, validity.
    let mut data = vec![16, 6, 4, 15 * 10 + 97, 5, 3, 1, 0];
    data.extend_from_slice(PATH_INFO_2_8);
    data.extend_from_slice(NAR_2_8);
    let absolute = absolute(HELLO);
    data.extend(script(&[
        LAST,
        T(&absolute),
        LAST,
        N(2),
        T(&absolute),
        T("x"),
    ]));
    data.extend(script(&[
        LAST,
        N(1),
        N(0x6f6c_6d67),
        T("line"),
        ERROR,
        T("Error"),
        N(0),
    ]));
    data.extend(script(&[T("Error"), T("no"), N(0), N(1), N(0), T("trace")]));
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
