//! Scripted daemons over an in-memory pipe; real ones are in `tests/worker_protocol_real.rs`.

mod daemon;

use futures_util::future::{join_all, try_join_all};
use tokio::io::split;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::*;
use crate::nix::nar::NarParser;
use crate::nix::store_path::StorePathHash;
use crate::upstream::said::{LAST, error, numbers, text};
use daemon::{Asked, Daemon};

const PATH: &str = "i4f75pn3bxkxdk2kld86k5qazq4cqj8i-hello";

/// The answer to a hash part that is not there.
fn absent() -> Vec<u8> {
    numbers(&[LAST, 0])
}

/// A NAR of one file with `len` bytes.
fn nar(len: usize) -> Vec<u8> {
    let head = ["nix-archive-1", "(", "type", "regular", "contents"];
    let mut out: Vec<u8> = head.iter().flat_map(|token| text(token)).collect();
    out.extend(text(&"x".repeat(len)));
    out.extend(text(")"));
    assert!(NarParser::new().push(&out).unwrap().ended);
    out
}

fn question(place: u64) -> Request {
    let mut hash = [0; 20];
    hash[..8].copy_from_slice(&place.to_le_bytes());
    Request::QueryPathFromHashPart(StorePathHash(hash))
}

fn path() -> StorePath {
    PATH.parse().unwrap()
}

/// Opens a connection to a daemon that `script` plays.
async fn connect<F, T>(
    options: ConnectionOptions,
    script: impl FnOnce(Daemon) -> F + Send + 'static,
) -> (Connection, JoinHandle<T>)
where
    F: Future<Output = T> + Send,
    T: Send + 'static,
{
    // Small, so that either side blocks soon.
    let (ours, theirs) = tokio::io::duplex(4096);
    let daemon = tokio::spawn(async move { script(Daemon::greet(theirs).await).await });
    let (reader, writer) = split(ours);
    let connection = Connection::open(reader, writer, options).await.unwrap();
    (connection, daemon)
}

fn options() -> ConnectionOptions {
    ConnectionOptions::default()
}

async fn collect(stream: NarStream) -> Result<Vec<u8>, Error> {
    let parts: Vec<_> = stream.collect().await;
    let mut bytes = Vec::new();
    for part in parts {
        bytes.extend_from_slice(&part?);
    }
    Ok(bytes)
}

#[tokio::test]
async fn twenty_thousand_questions_do_not_block() {
    let (connection, daemon) = connect(options(), Daemon::answer_all).await;
    assert_eq!(connection.peer().to_string(), "Nix 2.8.0, protocol 1.34");
    let many = connection.ask_many((0..20_000).map(question).collect());
    let alone = join_all((0..20_000).map(|place| connection.ask(question(place))));
    let (many, alone) = timeout(Duration::from_secs(60), async { tokio::join!(many, alone) })
        .await
        .unwrap();
    for answer in many.into_iter().chain(alone) {
        assert_eq!(answer.unwrap(), Reply::Path(None));
    }
    assert_eq!(connection.load(), Load::default());
    drop(connection);
    assert_eq!(daemon.await.unwrap(), 40_000);
}

#[tokio::test]
async fn the_window_bounds_what_is_under_way() {
    let (connection, daemon) = connect(options(), |mut daemon: Daemon| async move {
        let mut count = 0;
        while let Ok(Some(_)) = timeout(Duration::from_millis(200), daemon.asked()).await {
            count += 1;
        }
        for _ in 0..count {
            daemon.say(&absent()).await;
        }
        (count, daemon.answer_all().await)
    })
    .await;
    let answers = connection.ask_many((0..1000).map(question).collect()).await;
    assert_eq!(answers.len(), 1000);
    drop(connection);
    assert_eq!(daemon.await.unwrap(), (256, 744));
}

#[tokio::test]
async fn callers_take_turns() {
    let (connection, daemon) = connect(options(), |mut daemon: Daemon| async move {
        let mut order = Vec::new();
        while let Some(Asked::HashPart(hash)) = daemon.asked().await {
            order.push(hash);
            daemon.say(&absent()).await;
        }
        order
    })
    .await;
    let many = connection.ask_many((0..10_000).map(question).collect());
    let single = question(1 << 40);
    let Request::QueryPathFromHashPart(hash) = single else {
        unreachable!()
    };
    let (many, alone) = tokio::join!(many, connection.ask(single));
    assert_eq!((many.len(), alone.unwrap()), (10_000, Reply::Path(None)));
    drop(connection);
    let order = daemon.await.unwrap();
    let place = order.iter().position(|asked| *asked == hash.to_string());
    assert!(place.unwrap() < 300, "{place:?}");
}

#[tokio::test]
async fn an_error_fails_its_question_alone() {
    let (connection, _daemon) = connect(options(), |mut daemon: Daemon| async move {
        for place in 0..9 {
            daemon.asked().await;
            let answer = if place == 4 {
                error("disk is full")
            } else {
                absent()
            };
            daemon.say(&answer).await;
        }
        daemon.answer_all().await
    })
    .await;
    let answers = connection.ask_many((0..9).map(question).collect()).await;
    for (place, answer) in answers.into_iter().enumerate() {
        match answer {
            Ok(reply) => assert!(place != 4 && reply == Reply::Path(None)),
            Err(Error::Remote(words)) => assert!(place == 4 && &*words == "disk is full"),
            Err(error) => panic!("{place}: {error}"),
        }
    }
    assert!(connection.ask(question(0)).await.is_ok());
}

#[tokio::test]
async fn an_end_in_the_middle_fails_all_under_way() {
    let (connection, _daemon) = connect(options(), |mut daemon: Daemon| async move {
        for _ in 0..3 {
            daemon.asked().await;
            daemon.say(&absent()).await;
        }
        daemon.asked().await;
        daemon.say(&absent()[..5]).await;
    })
    .await;
    let answers = connection.ask_many((0..500).map(question).collect()).await;
    let answered = answers.iter().filter(|answer| answer.is_ok()).count();
    assert_eq!((answers.len(), answered), (500, 3));
    assert!(matches!(answers[3], Err(Error::Lost(_))));
    assert!(matches!(connection.closed().await, Error::Lost(_)));
    assert!(matches!(
        connection.ask(question(0)).await,
        Err(Error::Lost(_))
    ));
    assert!(connection.nar(&path(), 120).await.is_err());
}

#[tokio::test]
async fn garbage_ends_the_connection() {
    let (connection, _daemon) = connect(options(), |mut daemon: Daemon| async move {
        daemon.asked().await;
        daemon.say(&absent()).await;
        daemon.asked().await;
        daemon
            .say(b"Connection to builder closed by remote host.")
            .await;
        std::future::pending::<()>().await;
    })
    .await;
    let answers = connection.ask_many((0..10).map(question).collect()).await;
    assert!(answers[0].is_ok());
    assert!(
        answers[1..]
            .iter()
            .all(|a| matches!(a, Err(Error::Protocol(_))))
    );
    assert!(matches!(connection.closed().await, Error::Protocol(_)));
}

#[tokio::test]
async fn a_caller_that_leaves_disturbs_nobody() {
    let (connection, daemon) = connect(options(), |mut daemon: Daemon| async move {
        daemon.asked().await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        daemon.say(&absent()).await;
        daemon.answer_all().await
    })
    .await;
    let impatient = connection.ask(question(0));
    let late = timeout(Duration::from_millis(100), impatient).await;
    assert!(late.is_err());
    let left_before_written = connection.ask_many((0..1000).map(question).collect());
    assert!(
        timeout(Duration::from_millis(1), left_before_written)
            .await
            .is_err()
    );
    assert_eq!(
        connection.ask(question(1)).await.unwrap(),
        Reply::Path(None)
    );
    drop(connection);
    let asked = daemon.await.unwrap();
    assert!(asked <= 257, "{asked}");
}

#[tokio::test]
async fn small_nars_do_not_hold_each_other_up() {
    let sizes = [10, 100_000, 0, 3_000_000, 5];
    let (connection, _daemon) = connect(options(), move |mut daemon: Daemon| async move {
        for size in sizes {
            assert!(matches!(daemon.asked().await, Some(Asked::Nar(_))));
            daemon.say(&[numbers(&[LAST]), nar(size)].concat()).await;
        }
        daemon.answer_all().await
    })
    .await;
    let path = path();
    let expected: Vec<_> = sizes.iter().map(|size| nar(*size)).collect();
    let asked = expected
        .iter()
        .map(|nar| connection.nar(&path, nar.len() as u64));
    let streams = timeout(Duration::from_secs(20), try_join_all(asked));
    let streams = streams.await.unwrap().unwrap();
    // Nobody has read yet, and the question behind them is answered.
    assert!(connection.ask(question(0)).await.is_ok());
    for (stream, nar) in streams.into_iter().zip(expected).rev() {
        assert_eq!(collect(stream.unwrap()).await.unwrap(), nar);
    }
    assert_eq!(connection.load(), Load::default());
}

#[tokio::test]
async fn a_large_nar_waits_for_its_reader_and_counts_as_load() {
    let size = 20 << 20;
    let (connection, _daemon) = connect(options(), move |mut daemon: Daemon| async move {
        daemon.asked().await;
        daemon.say(&[numbers(&[LAST]), nar(size)].concat()).await;
        daemon.answer_all().await
    })
    .await;
    let expected = nar(size);
    let stream = connection.nar(&path(), expected.len() as u64).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let left = connection.load().nar_bytes;
    let buffered = expected.len() as u64 - left;
    assert!(
        (1 << 20..=(1 << 20) + (256 << 10)).contains(&buffered),
        "{buffered}"
    );
    let bytes = collect(stream.unwrap().unwrap()).await.unwrap();
    assert!(bytes == expected);
    assert_eq!(connection.load().nar_bytes, 0);
}

#[tokio::test]
async fn a_nar_must_have_the_promised_size() {
    for difference in [-8, 8] {
        let (connection, _daemon) = connect(options(), |mut daemon: Daemon| async move {
            daemon.asked().await;
            daemon.say(&[numbers(&[LAST]), nar(1000)].concat()).await;
            daemon.answer_all().await
        })
        .await;
        let promised = (nar(1000).len() as u64).saturating_add_signed(difference);
        let stream = connection.nar(&path(), promised).await.unwrap().unwrap();
        let behind = connection.ask(question(0));
        let (read, behind) = tokio::join!(collect(stream), behind);
        assert!(matches!(read, Err(Error::Protocol(_))), "{read:?}");
        assert!(behind.is_err());
        assert!(matches!(connection.closed().await, Error::Protocol(_)));
    }
}

#[tokio::test]
async fn a_truncated_nar_is_an_error() {
    let (connection, _daemon) = connect(options(), |mut daemon: Daemon| async move {
        daemon.asked().await;
        let nar = nar(1000);
        daemon.say(&[&numbers(&[LAST]), &nar[..500]].concat()).await;
    })
    .await;
    let stream = connection
        .nar(&path(), nar(1000).len() as u64)
        .await
        .unwrap();
    let read = collect(stream.unwrap()).await;
    assert!(matches!(read, Err(Error::Lost(_))), "{read:?}");
}

#[tokio::test]
async fn a_missing_path_has_no_nar() {
    let words = ["path '/nix/store/x' is not valid", "permission denied"];
    for (words, before) in words.into_iter().zip([Vec::new(), text("nix-archive-1")]) {
        let (connection, _daemon) = connect(options(), move |mut daemon: Daemon| async move {
            daemon.asked().await;
            let answer = [numbers(&[LAST]), before, error(words), error(words)].concat();
            daemon.say(&answer).await;
        })
        .await;
        let path = path();
        let (first, second) = tokio::join!(connection.nar(&path, 120), connection.nar(&path, 120));
        match first {
            Ok(None) => assert!(words.contains("not valid")),
            Err(Error::Remote(said)) => assert_eq!(&*said, "permission denied"),
            Ok(Some(_)) => panic!("a NAR"),
            Err(error) => panic!("{error}"),
        }
        assert!(matches!(second.err(), Some(Error::Lost(_))));
    }
}

#[tokio::test]
async fn a_stalled_nar_is_given_up() {
    let options = ConnectionOptions {
        stall_timeout: Duration::from_millis(200),
        ..options()
    };
    let (connection, _daemon) = connect(options, |mut daemon: Daemon| async move {
        daemon.asked().await;
        let nar = nar(1000);
        daemon.say(&[&numbers(&[LAST]), &nar[..500]].concat()).await;
        std::future::pending::<()>().await;
    })
    .await;
    // Silence without a question is no stall.
    tokio::time::sleep(Duration::from_millis(400)).await;
    let stream = connection
        .nar(&path(), nar(1000).len() as u64)
        .await
        .unwrap();
    let read = timeout(Duration::from_secs(5), collect(stream.unwrap())).await;
    let read = read.unwrap();
    assert!(
        matches!(
            read,
            Err(Error::TimedOut {
                question: "NarFromPath",
                ..
            })
        ),
        "{read:?}"
    );
}

#[tokio::test]
async fn silence_under_a_question_is_given_up() {
    let options = ConnectionOptions {
        query_timeout: Duration::from_millis(200),
        ..options()
    };
    let (connection, _daemon) = connect(options, |daemon: Daemon| async move {
        let _stays_open = daemon;
        std::future::pending::<()>().await;
    })
    .await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let begun = Instant::now();
    let answer = timeout(Duration::from_secs(5), connection.ask(question(0))).await;
    let answer = answer.unwrap();
    assert!(matches!(answer, Err(Error::TimedOut { .. })), "{answer:?}");
    assert!(begun.elapsed() >= Duration::from_millis(200));
}

#[tokio::test]
async fn an_abandoned_nar_is_read_on_or_breaks_the_connection() {
    for (size, survives) in [(6 << 20, true), (20 << 20, false)] {
        let (connection, _daemon) = connect(options(), move |mut daemon: Daemon| async move {
            daemon.asked().await;
            daemon.say(&[numbers(&[LAST]), nar(size)].concat()).await;
            daemon.answer_all().await
        })
        .await;
        let nar_size = nar(size).len() as u64;
        let mut stream = connection.nar(&path(), nar_size).await.unwrap().unwrap();
        assert!(stream.next().await.unwrap().is_ok());
        drop(stream);
        assert_eq!(
            connection.ask(question(0)).await.is_ok(),
            survives,
            "{size}"
        );
    }
}

#[tokio::test]
async fn the_last_handle_closes_and_a_stream_is_one() {
    let (connection, daemon) = connect(options(), |mut daemon: Daemon| async move {
        daemon.asked().await;
        daemon.say(&[numbers(&[LAST]), nar(5 << 20)].concat()).await;
        daemon.answer_all().await
    })
    .await;
    let nar_size = nar(5 << 20).len() as u64;
    let stream = connection.nar(&path(), nar_size).await.unwrap().unwrap();
    drop(connection);
    assert_eq!(collect(stream).await.unwrap().len() as u64, nar_size);
    let asked = timeout(Duration::from_secs(5), daemon).await;
    assert_eq!(asked.unwrap().unwrap(), 0);
}

#[tokio::test]
async fn what_is_no_daemon_is_named() {
    for (said, expected) in [
        (&b""[..], "connection lost: closed before it greeted"),
        (b"no such account\n", "it says \"no such account\""),
        (b"oixd", "it says \"oixd\""),
        (
            b"oixd\0\0\0\0\x0a\x01\0\0\0\0\0\0",
            "not supported: the nix-daemon speaks protocol 1.10",
        ),
    ] {
        let (ours, mut theirs) = tokio::io::duplex(4096);
        theirs.write_all(said).await.unwrap();
        drop(theirs);
        let (reader, writer) = split(ours);
        let error = Connection::open(reader, writer, options())
            .await
            .unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
}
