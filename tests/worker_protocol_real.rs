//! The worker protocol against a real `nix-daemon --stdio`, each on a private store.

mod private_store;

use std::fs;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::future::{join_all, try_join_all};
use muster::nix::path_info::PathInfo;
use muster::nix::signature::Signature;
use muster::nix::store_path::{StoreDir, StorePath};
use muster::nix::worker_protocol::Version;
use muster::nix::worker_protocol::reply::Reply;
use muster::nix::worker_protocol::request::Request;
use muster::upstream::connection::{Connection, ConnectionOptions};
use muster::upstream::{Error, NarStream};
use private_store::{PrivateStore, nar_of_file, numbered};

async fn path(connection: &Connection, path: &StorePath) -> Result<Reply, Error> {
    let question = Request::QueryPathFromHashPart(path.hash());
    connection.ask(question).await
}

async fn path_info(connection: &Connection, path: &StorePath) -> Option<PathInfo> {
    let question = Request::QueryPathInfo(path.clone());
    match connection.ask(question).await {
        Ok(Reply::PathInfo(info)) => info,
        other => panic!("{other:?}"),
    }
}

async fn collect(stream: NarStream) -> Result<Vec<u8>, Error> {
    let parts: Vec<_> = stream.collect().await;
    let mut bytes = Vec::new();
    for part in parts {
        bytes.extend_from_slice(&part?);
    }
    Ok(bytes)
}

fn contents(place: usize) -> Vec<u8> {
    format!("contents of {place}\n").into_bytes()
}

#[tokio::test]
async fn every_question_is_answered() {
    let store = PrivateStore::new();
    let infos = store.fill(20).await;
    let daemon = store.daemon().await;
    let connection = &daemon.connection;
    let peer = connection.peer();
    assert!(peer.version >= Version::new(1, 34), "{peer}");
    assert!(
        peer.nix_version
            .as_deref()
            .is_some_and(|v| v.starts_with("2."))
    );

    let there = infos[15].path.clone();
    let missing = numbered(1000);
    assert_eq!(
        path(connection, &there).await.unwrap(),
        Reply::Path(Some(there.clone()))
    );
    assert_eq!(path(connection, &missing).await.unwrap(), Reply::Path(None));
    assert_eq!(
        path_info(connection, &there).await.as_ref(),
        Some(&infos[15])
    );
    assert_eq!(path_info(connection, &missing).await, None);

    let ask = async |request| connection.ask(request).await.unwrap();
    assert_eq!(
        ask(Request::IsValidPath(there.clone())).await,
        Reply::Valid(true)
    );
    assert_eq!(
        ask(Request::IsValidPath(missing.clone())).await,
        Reply::Valid(false)
    );
    let both = Request::QueryValidPaths(vec![missing.clone(), there.clone()]);
    assert_eq!(ask(both).await, Reply::Paths(vec![there.clone()]));
    let none = Request::QueryValidPaths(vec![]);
    assert_eq!(ask(none).await, Reply::Paths(vec![]));
    assert_eq!(ask(Request::SetOptions { verbosity: 0 }).await, Reply::Done);
    assert_eq!(ask(Request::AddTempRoot(there.clone())).await, Reply::Done);
    let id = format!("sha256:{}!out", "0".repeat(64)).parse().unwrap();
    assert_eq!(
        ask(Request::QueryRealisation(id)).await,
        Reply::Realisation(None)
    );

    let signature = Signature::parse(&format!("key-1:{}==", "A".repeat(86))).unwrap();
    let sign = Request::AddSignatures(there.clone(), vec![signature.clone()]);
    assert_eq!(ask(sign).await, Reply::Done);
    let signed = path_info(connection, &there).await.unwrap();
    assert_eq!(signed.signatures, [signature]);

    let mut listed = Vec::new();
    let mut parts = connection.all_paths().unwrap();
    while let Some(part) = parts.next().await {
        listed.extend(part.unwrap());
    }
    listed.sort();
    let mut expected: Vec<_> = infos.into_iter().map(|info| info.path).collect();
    expected.sort();
    assert_eq!(listed, expected);
}

#[tokio::test]
async fn a_signature_for_a_path_that_is_gone_ends_the_session_and_an_empty_set_changes_nothing() {
    let store = PrivateStore::new();
    let infos = store.fill(2).await;
    let daemon = store.daemon().await;
    let (there, missing) = (infos[1].path.clone(), numbered(1000));
    let nothing = Request::AddSignatures(there.clone(), vec![]);
    assert_eq!(daemon.connection.ask(nothing).await.unwrap(), Reply::Done);
    let unchanged = path_info(&daemon.connection, &there).await;
    assert_eq!(unchanged.as_ref(), Some(&infos[1]));

    let signature = Signature::parse(&format!("key-1:{}==", "A".repeat(86))).unwrap();
    let sign = |path: &StorePath| Request::AddSignatures(path.clone(), vec![signature.clone()]);
    let requests = vec![sign(&there), sign(&missing), sign(&infos[0].path)];
    let answers = daemon.connection.ask_many(requests).await;
    assert_eq!(answers[0].as_ref().ok(), Some(&Reply::Done));
    // It crashes; the one after it is not answered either, nor done.
    assert!(matches!(answers[1], Err(Error::Lost(_))), "{answers:?}");
    assert!(matches!(answers[2], Err(Error::Lost(_))), "{answers:?}");
    let next = store.daemon().await;
    let (first, second) = (&infos[0].path, &there);
    let info = path_info(&next.connection, first).await.unwrap();
    assert_eq!(info.signatures, []);
    let info = path_info(&next.connection, second).await.unwrap();
    assert_eq!(info.signatures, [signature]);
}

#[tokio::test]
async fn a_path_that_nix_added_proves_itself() {
    let store = PrivateStore::new();
    let script = "cd \"$NIX_STORE_DIR/..\" && echo hello >hello && nix-store --add hello";
    let added = store.run("sh", &["-c", script], b"").await;
    let added = String::from_utf8(added).unwrap();
    let added = store.store_dir.parse(added.trim()).unwrap();
    let daemon = store.daemon().await;
    let info = path_info(&daemon.connection, &added).await.unwrap();
    assert!(info.proves_itself(&store.store_dir), "{info:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_thousand_questions_do_not_block() {
    let store = PrivateStore::new();
    store.fill(1).await;
    let daemon = store.daemon().await;
    let connection = &daemon.connection;
    let questions = (0..20_000).map(|place| Request::QueryPathFromHashPart(numbered(place).hash()));
    let many = connection.ask_many(questions.clone().collect());
    let alone = join_all(questions.map(|question| connection.ask(question)));
    let both = async { tokio::join!(many, alone) };
    let (many, alone) = tokio::time::timeout(Duration::from_secs(60), both)
        .await
        .unwrap();
    for answers in [many, alone] {
        let found = answers
            .iter()
            .filter(|a| matches!(a, Ok(Reply::Path(Some(_)))))
            .count();
        assert_eq!((found, answers.len()), (1, 20_000));
        assert!(answers.iter().all(Result::is_ok));
    }
}

#[tokio::test]
async fn nars_back_to_back_are_whole() {
    let store = PrivateStore::new();
    let infos = store.fill(300).await;
    let daemon = store.daemon().await;
    let nars = infos
        .iter()
        .map(|info| daemon.connection.nar(&info.path, info.nar_size));
    let streams = try_join_all(nars).await.unwrap();
    for (place, stream) in streams.into_iter().enumerate() {
        let nar = collect(stream.unwrap()).await.unwrap();
        assert_eq!(nar, nar_of_file(&contents(place)), "{place}");
    }
}

#[tokio::test]
async fn a_large_nar_is_whole() {
    let store = PrivateStore::new();
    let large = numbered(7);
    let bytes: Vec<u8> = (0..24_000_000_u32)
        .map(|place| (place % 251) as u8)
        .collect();
    fs::write(store.file(&large), &bytes).unwrap();
    let nar = nar_of_file(&bytes);
    let info = PathInfo {
        path: large.clone(),
        nar_hash: muster::nix::hash::NarHash::of(&nar),
        nar_size: nar.len() as u64,
        references: vec![],
        deriver: None,
        signatures: vec![],
        ca: None,
    };
    store.register(&[info]).await;
    let daemon = store.daemon().await;
    let stream = daemon
        .connection
        .nar(&large, nar.len() as u64)
        .await
        .unwrap();
    assert!(collect(stream.unwrap()).await.unwrap() == nar);
    let reply = path(&daemon.connection, &large).await.unwrap();
    assert_eq!(reply, Reply::Path(Some(large.clone())));

    let wrong = daemon.connection.nar(&large, nar.len() as u64 - 8).await;
    let read = collect(wrong.unwrap().unwrap()).await;
    assert!(matches!(read, Err(Error::Protocol(_))));
    assert!(
        daemon
            .connection
            .ask(Request::IsValidPath(large))
            .await
            .is_err()
    );
}

#[tokio::test]
async fn a_missing_path_has_no_nar() {
    let store = PrivateStore::new();
    let infos = store.fill(2).await;
    fs::remove_file(store.file(&infos[1].path)).unwrap();
    // Never there, and registered but deleted.
    for path in [numbered(1000), infos[1].path.clone()] {
        let daemon = store.daemon().await;
        let connection = &daemon.connection;
        let there = connection.nar(&infos[0].path, infos[0].nar_size);
        let missing = connection.nar(&path, infos[1].nar_size);
        let behind = connection.nar(&infos[0].path, infos[0].nar_size);
        let (there, missing, behind) = tokio::join!(there, missing, behind);
        assert!(there.unwrap().is_some());
        assert!(missing.unwrap().is_none());
        let closed = behind.err().unwrap().to_string();
        assert!(closed.contains(path.as_str()), "{closed}");
        assert!(connection.ask(Request::IsValidPath(path)).await.is_err());
    }
}

#[tokio::test]
async fn an_error_in_the_middle_of_a_nar_is_shown() {
    let store = PrivateStore::new();
    let mut info = store.fill(1).await.remove(0);
    let folder = numbered(1);
    fs::create_dir(store.file(&folder)).unwrap();
    fs::write(store.file(&folder).join("a"), vec![b'a'; 100_000]).unwrap();
    info.path = folder.clone();
    info.nar_size = 200_000;
    store.register(&[info]).await;
    let fifo = store.file(&folder).join("b");
    let status = std::process::Command::new("mkfifo").arg(&fifo).status();
    assert!(status.unwrap().success());
    let daemon = store.daemon().await;
    let stream = daemon.connection.nar(&folder, 200_000).await.unwrap();
    let error = collect(stream.unwrap()).await.unwrap_err().to_string();
    assert!(
        error.contains("the NAR was cut") && error.contains("unsupported type"),
        "{error}"
    );
}

#[tokio::test]
async fn another_store_directory_is_named() {
    let store = PrivateStore::new();
    let infos = store.fill(1).await;
    let options = ConnectionOptions::default();
    let daemon = store.daemon_with(options).await.unwrap();
    let found = path(&daemon.connection, &infos[0].path).await;
    let Err(Error::StoreDir(error)) = found else {
        panic!("{found:?}")
    };
    assert!(error.contains(store.store_dir.as_str()), "{error}");
    // The daemon cannot read this question, says so twice and leaves.
    let questions = (0..3).map(|_| Request::QueryPathInfo(infos[0].path.clone()));
    let answers = daemon.connection.ask_many(questions.collect()).await;
    assert!(
        matches!(&answers[0], Err(Error::Remote(words)) if words.contains("not in the Nix store"))
    );
    assert!(answers[1..].iter().all(Result::is_err));
    assert_ne!(store.store_dir, StoreDir::default());
}

#[tokio::test]
async fn a_killed_daemon_fails_what_is_under_way() {
    let store = PrivateStore::new();
    store.fill(1).await;
    let mut daemon = store.daemon().await;
    let questions =
        (0..100_000).map(|place| Request::QueryPathFromHashPart(numbered(place).hash()));
    let asking = daemon.connection.ask_many(questions.collect());
    let killing = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        daemon.child.kill().await.unwrap();
        Instant::now()
    };
    let (answers, killed) = tokio::join!(asking, killing);
    assert!(killed.elapsed() < Duration::from_secs(5));
    let answered = answers.iter().take_while(|answer| answer.is_ok()).count();
    assert!(answered > 0 && answered < 100_000, "{answered}");
    assert!(
        answers[answered..]
            .iter()
            .all(|a| matches!(a, Err(Error::Lost(_))))
    );
    assert!(matches!(daemon.connection.closed().await, Error::Lost(_)));
}
