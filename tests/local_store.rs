//! This machine's own store, read in place beside a real Nix that changes it.

mod builder;

use std::fs;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use builder::{Builder, nar_of, quick, settled, up};
use futures_util::StreamExt as _;
use muster::nix::hash::NarHash;
use muster::nix::nar::NarParser;
use muster::nix::store_path::{StoreDir, StorePath, StorePathHash};
use muster::upstream::local::LocalOptions;
use muster::upstream::{Error, Link, NarStream, OpenedNar, Upstream};
use rusqlite::Connection;

const NOWHERE: &str = "/nowhere/socket";
const IN_PLACE: &str = "the store itself, read in place";

async fn read(mut nar: NarStream) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![];
    while let Some(chunk) = nar.next().await {
        let chunk = chunk?;
        assert!(!chunk.is_empty() && chunk.len() <= 256 << 10);
        bytes.extend(chunk);
    }
    Ok(bytes)
}

/// Reads a NAR that the store checks itself.
async fn read_checked(upstream: &dyn Upstream, path: &StorePath) -> Result<Vec<u8>, Error> {
    let info = upstream.path_info(path.hash()).await?.unwrap();
    match upstream.open_nar(&info).await?.unwrap() {
        OpenedNar::Checked(nar) | OpenedNar::Proven(_, nar) => read(nar).await,
        OpenedNar::Unchecked(_) => panic!("{path} came from the daemon"),
    }
}

/// Whether a path's NAR would be read without being hashed.
async fn is_proven(upstream: &dyn Upstream, path: &StorePath) -> bool {
    let info = upstream.path_info(path.hash()).await.unwrap().unwrap();
    let opened = upstream.open_nar(&info).await.unwrap().unwrap();
    matches!(opened, OpenedNar::Proven(..))
}

/// Lets the tick be over in which a path was made or changed: until then it is hashed each time.
async fn tick() {
    tokio::time::sleep(Duration::from_millis(100)).await;
}

async fn has(upstream: &dyn Upstream, path: &StorePath) -> bool {
    upstream.path_info(path.hash()).await.unwrap().is_some()
}

fn peer(link: &Link) -> String {
    match link {
        Link::Up { peer } => peer.to_string(),
        other => format!("{other:?}"),
    }
}

fn database(builder: &Builder) -> Connection {
    Connection::open(builder.path("state/db/db.sqlite")).unwrap()
}

/// Every entry as the daemon tells it, signatures, derivers and content addresses included.
#[tokio::test]
async fn path_infos_are_those_of_the_daemon_and_of_nix() {
    let builder = Builder::new();
    let mut paths = vec![];
    for n in 0..12 {
        let (derivation, output) = builder.build(&format!("built-{n}"), "x");
        paths.extend([derivation, output]);
    }
    let files: Vec<_> = (0..100).map(|n| format!("file-{n}")).collect();
    let files: Vec<_> = files.iter().map(|n| (n.as_str(), n.as_bytes())).collect();
    paths.extend(builder.add_all(&files));
    let key = builder.run("nix", &["key", "generate-secret", "--key-name", "test-1"]);
    fs::write(builder.path("secret"), key).unwrap();
    let secret = builder.path("secret");
    let signed = builder.store_dir.join(&paths[1]);
    builder.run(
        "nix",
        &["store", "sign", "-k", secret.to_str().unwrap(), &signed],
    );

    let daemon = builder.daemon();
    let over_socket = builder.over_socket(&daemon, quick());
    let local = builder.in_place(Path::new(NOWHERE), LocalOptions::default());
    up(&local).await;
    up(&over_socket).await;
    let here = local.path_infos(&paths).await;
    let there = over_socket.path_infos(&paths).await;
    for ((path, here), there) in paths.iter().zip(here).zip(there) {
        let info = here.unwrap().expect("it is registered");
        assert_eq!(Some(&info), there.unwrap().as_ref());
        let by_hash = local.path_info(path.hash()).await.unwrap();
        assert_eq!(by_hash.as_ref(), Some(&info));
    }
    let info = local.path_info(paths[1].hash()).await.unwrap().unwrap();
    assert_eq!(info.signatures.len(), 1);
    assert_eq!(info.deriver.as_ref(), Some(&paths[0]));

    // And as the command prints them.
    let path = builder.store_dir.join(&paths[1]);
    let printed = builder.run("nix", &["path-info", "--json", &path]);
    let printed: serde_json::Value = serde_json::from_str(&printed).unwrap();
    // A list before Nix 2.19, then an object by path.
    let entry = printed.get(0).or_else(|| printed.get(&path)).unwrap();
    let hash = entry["narHash"].as_str().unwrap();
    assert_eq!(NarHash::parse(hash), Ok(info.nar_hash));
    assert_eq!(entry["narSize"].as_u64(), Some(info.nar_size));
    assert_eq!(entry["signatures"][0], info.signatures[0].to_string());
}

#[tokio::test]
async fn nars_are_those_that_nix_dumps() {
    let builder = Builder::new();
    let tree = builder.path("tree");
    fs::create_dir_all(tree.join("a/b/c/empty")).unwrap();
    for size in [
        0,
        1,
        7,
        8,
        9,
        262_143,
        262_144,
        262_145,
        1 << 20,
        (5 << 20) + 3,
    ] {
        let content: Vec<u8> = (0..=250).cycle().take(size).collect();
        fs::write(tree.join(format!("file-{size}")), content).unwrap();
    }
    for n in 0..3000 {
        fs::write(tree.join(format!("a/b/{n}")), n.to_string()).unwrap();
    }
    fs::set_permissions(tree.join("file-8"), fs::Permissions::from_mode(0o755)).unwrap();
    std::os::unix::fs::symlink("/nowhere/at all", tree.join("a/link")).unwrap();
    std::os::unix::fs::symlink("x".repeat(4000), tree.join("a/long")).unwrap();
    let name = std::ffi::OsString::from_encoded(b"caf\xe9");
    fs::write(tree.join(name), "not UTF-8").unwrap();

    let path = builder.nix_store(&["--add", tree.to_str().unwrap()]);
    let path = builder.store_dir.parse(path.trim()).unwrap();
    let local = builder.in_place(Path::new(NOWHERE), LocalOptions::default());
    up(&local).await;
    let info = local.path_info(path.hash()).await.unwrap().unwrap();
    let nar = read(local.nar(&info).await.unwrap().unwrap())
        .await
        .unwrap();
    assert_eq!(nar.len() as u64, info.nar_size);
    assert_eq!(NarHash::of(&nar), info.nar_hash);
    assert!(NarParser::new().push(&nar).unwrap().ended);
    let again = read_checked(&local, &path).await.unwrap();
    assert!(again == nar);
}

/// Bytes that are no text, as a file name.
trait FromEncoded {
    fn from_encoded(bytes: &[u8]) -> Self;
}

impl FromEncoded for std::ffi::OsString {
    fn from_encoded(bytes: &[u8]) -> Self {
        std::os::unix::ffi::OsStringExt::from_vec(bytes.to_vec())
    }
}

#[tokio::test]
async fn additions_and_deletions_are_seen_at_once() {
    let builder = Builder::new();
    builder.add("first", b"first");
    let daemon = builder.daemon();
    let local = builder.in_place(&daemon.socket, LocalOptions::default());
    up(&local).await;
    for round in 0..5 {
        let name = format!("file-{round}");
        let path = builder.add(&name, name.as_bytes());
        assert!(has(&local, &path).await, "{path} was added");
        builder.nix_store(&["--delete", &builder.store_dir.join(&path)]);
        assert!(!has(&local, &path).await, "{path} was deleted");
    }
    let kept = builder.add("kept", b"kept");
    let other = builder.add("other", b"other");
    let info = local.kept_path_info(kept.hash()).await.unwrap().unwrap();
    builder.collect_garbage();
    assert!(has(&local, &kept).await);
    assert!(!has(&local, &other).await);
    assert!(local.nar(&info).await.unwrap().is_some());
    let gone = muster::nix::path_info::PathInfo {
        path: other,
        ..info
    };
    assert!(local.nar(&gone).await.unwrap().is_none());
}

#[tokio::test]
async fn writers_neither_delay_nor_confuse() {
    let builder = Builder::new();
    let path = builder.add("file", b"file");
    let local = builder.in_place(Path::new(NOWHERE), LocalOptions::default());
    up(&local).await;
    let writer = database(&builder);
    writer
        .execute_batch("begin immediate; delete from ValidPaths")
        .unwrap();
    let asked = Instant::now();
    assert!(has(&local, &path).await, "nothing was committed");
    assert!(asked.elapsed() < Duration::from_secs(1));
    writer.execute_batch("rollback").unwrap();

    for mode in ["passive", "full", "restart", "truncate"] {
        let name = format!("file-{mode}");
        let added = builder.add(&name, b"x");
        let pragma = format!("pragma wal_checkpoint({mode})");
        let busy: i64 = writer.query_row(&pragma, (), |row| row.get(0)).unwrap();
        assert_eq!(busy, 0, "readers hold {mode} up");
        assert!(has(&local, &added).await && has(&local, &path).await);
    }
}

/// What Nix of another time, or another place, left there is not guessed at.
#[tokio::test]
async fn the_daemon_is_asked_where_the_database_is_strange() {
    let builder = Builder::new();
    let path = builder.add("file", b"file");
    let daemon = builder.daemon();
    let mut place = builder.place();
    place.state_dir = builder.path("elsewhere");
    fs::create_dir_all(place.state_dir.join("db")).unwrap();
    let schema = place.state_dir.join("db/schema");
    fs::write(&schema, "11").unwrap();
    let options = LocalOptions {
        reopen_after: Duration::from_millis(100),
        ..LocalOptions::default()
    };
    let local = builder.in_place_at(place, &daemon.socket, options);
    up(&local).await;
    assert!(peer(&settled(&local).await).starts_with("Nix "));
    let info = local.kept_path_info(path.hash()).await.unwrap().unwrap();
    let infos = local.path_infos(std::slice::from_ref(&path)).await;
    assert_eq!(
        infos.into_iter().flatten().flatten().next(),
        Some(info.clone())
    );
    assert!(has(&local, &path).await);
    let Some(OpenedNar::Unchecked(nar)) = local.open_nar(&info).await.unwrap() else {
        panic!("nobody here has checked it");
    };
    assert_eq!(read(nar).await.unwrap(), nar_of(b"file"));

    // Without a write-ahead log, which is not locked as SQLite knows it.
    let strange = builder.path("elsewhere/db/db.sqlite");
    let wal = database(&builder);
    wal.execute("vacuum into ?1", [strange.to_str().unwrap()])
        .unwrap();
    drop(wal);
    fs::write(&schema, "10").unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(peer(&settled(&local).await).starts_with("Nix "));
    assert!(has(&local, &path).await);

    let log = Connection::open(&strange).unwrap();
    log.execute_batch("pragma journal_mode = wal").unwrap();
    let mut link = local.link();
    let direct = link.wait_for(|link| peer(link) == IN_PLACE);
    let direct = tokio::time::timeout(Duration::from_secs(5), direct).await;
    direct.expect("it is read once it can be").unwrap();
    assert!(has(&local, &path).await);
}

#[tokio::test]
async fn paths_of_another_directory_are_not_ours() {
    let builder = Builder::new();
    builder.add("file", b"file");
    let mut place = builder.place();
    place.store_dir = StoreDir::new("/other").unwrap();
    let local = builder.in_place_at(place, Path::new(NOWHERE), LocalOptions::default());
    let link = settled(&local).await;
    assert!(matches!(link, Link::Down { .. }), "{link:?}");
}

#[tokio::test]
async fn a_replaced_database_is_noticed() {
    let builder = Builder::new();
    let path = builder.add("file", b"file");
    let local = builder.in_place(Path::new(NOWHERE), LocalOptions::default());
    up(&local).await;
    assert!(has(&local, &path).await);
    let file = builder.path("state/db/db.sqlite");
    let copy = builder.path("copy.sqlite");
    database(&builder)
        .execute("vacuum into ?1", [copy.to_str().unwrap()])
        .unwrap();
    let other = Connection::open(&copy).unwrap();
    other
        .execute_batch("pragma journal_mode = wal; update ValidPaths set narSize = 777")
        .unwrap();
    drop(other);
    for suffix in ["-wal", "-shm"] {
        let _ = fs::remove_file(format!("{}{suffix}", file.display()));
    }
    fs::rename(copy, file).unwrap();
    let seen = async {
        loop {
            match local.path_info(path.hash()).await {
                Ok(Some(info)) if info.nar_size == 777 => break,
                _ => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(5), seen)
        .await
        .expect("it is noticed");
}

#[tokio::test]
async fn files_that_changed_are_never_given_whole() {
    let builder = Builder::new();
    let content = vec![b'x'; 3 << 20];
    let path = builder.add("large", &content);
    let file = builder.path("store").join(path.as_str());
    let local = builder.in_place(Path::new(NOWHERE), LocalOptions::default());
    up(&local).await;
    assert!(!is_proven(&local, &path).await);
    tick().await;
    assert!(read_checked(&local, &path).await.unwrap() == nar_of(&content));
    assert!(is_proven(&local, &path).await);
    assert!(read_checked(&local, &path).await.unwrap() == nar_of(&content));

    // The same size and time; only what nobody can set tells.
    let times = fs::metadata(&file).unwrap().modified().unwrap();
    let mut changed = content.clone();
    changed[1 << 20] = b'y';
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(&file, &changed).unwrap();
    let handle = fs::File::options().write(true).open(&file).unwrap();
    handle.set_modified(times).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o444)).unwrap();
    // Its first MiB is not as it was, so all is hashed.
    assert!(!is_proven(&local, &path).await);
    let error = read_checked(&local, &path).await.unwrap_err();
    assert!(error.to_string().contains("another hash"), "{error}");

    // Cut or lengthened: an error, no padding.
    for len in [100, 4 << 20] {
        let handle = fs::File::options().write(true).open(&file).unwrap();
        handle.set_len(len).unwrap();
        let info = local.path_info(path.hash()).await.unwrap().unwrap();
        let read = match local.nar(&info).await {
            Ok(Some(nar)) => read(nar).await,
            Ok(None) => panic!("it is there"),
            Err(error) => Err(error),
        };
        assert!(read.is_err(), "{len}");
    }
    fs::remove_file(&file).unwrap();
    let info = local.path_info(path.hash()).await.unwrap().unwrap();
    assert!(local.nar(&info).await.unwrap().is_none());
}

/// A file behind the first MiB is known to be another before any of its bytes is given.
#[tokio::test]
async fn a_later_file_that_changed_ends_the_nar_before_it() {
    let builder = Builder::new();
    let tree = builder.path("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("a"), vec![b'a'; 6 << 20]).unwrap();
    fs::write(tree.join("b"), vec![b'b'; 2 << 20]).unwrap();
    let path = builder.nix_store(&["--add", tree.to_str().unwrap()]);
    let path = builder.store_dir.parse(path.trim()).unwrap();
    let local = builder.in_place(Path::new(NOWHERE), LocalOptions::default());
    up(&local).await;
    tick().await;
    let nar = read_checked(&local, &path).await.unwrap();
    assert!(is_proven(&local, &path).await);

    // The same size and time.
    let file = builder.path("store").join(path.as_str()).join("b");
    let times = fs::metadata(&file).unwrap().modified().unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(&file, vec![0xff; 2 << 20]).unwrap();
    let handle = fs::File::options().write(true).open(&file).unwrap();
    handle.set_modified(times).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o444)).unwrap();
    let info = local.path_info(path.hash()).await.unwrap().unwrap();
    let opened = local.open_nar(&info).await.unwrap().unwrap();
    let OpenedNar::Proven(_, mut stream) = opened else {
        panic!("its first files are as they were");
    };
    let (mut given, mut error) = (Vec::new(), None);
    while let Some(item) = stream.next().await {
        match item {
            Ok(chunk) => given.extend_from_slice(&chunk),
            Err(cause) => error = Some(cause.to_string()),
        }
    }
    assert!(nar.starts_with(&given) && !given.contains(&0xff));
    assert!(error.unwrap().contains("changed since"));
    // From now on it is hashed.
    assert!(!is_proven(&local, &path).await);
    let error = read_checked(&local, &path).await.unwrap_err();
    assert!(error.to_string().contains("another hash"), "{error}");
}

/// Nix links equal files to one another; that changes no byte, and no transfer ends by it.
#[tokio::test]
async fn another_link_to_a_file_is_no_other_file() {
    let builder = Builder::new();
    let content = vec![b'x'; 6 << 20];
    let path = builder.add("large", &content);
    let file = builder.path("store").join(path.as_str());
    let local = builder.in_place(Path::new(NOWHERE), LocalOptions::default());
    up(&local).await;
    assert!(read_checked(&local, &path).await.unwrap() == nar_of(&content));
    fs::hard_link(&file, builder.path("one")).unwrap();
    assert!(!is_proven(&local, &path).await);
    tick().await;
    assert!(read_checked(&local, &path).await.unwrap() == nar_of(&content));

    // While it is read, too.
    let info = local.path_info(path.hash()).await.unwrap().unwrap();
    let opened = local.open_nar(&info).await.unwrap().unwrap();
    let OpenedNar::Proven(_, stream) = opened else {
        panic!("it was hashed again");
    };
    fs::hard_link(&file, builder.path("two")).unwrap();
    assert!(read(stream).await.unwrap() == nar_of(&content));
}

#[tokio::test]
async fn a_file_that_is_written_to_while_it_is_read_is_never_given_whole() {
    let builder = Builder::new();
    let content = vec![b'x'; 6 << 20];
    let path = builder.add("large", &content);
    let file = builder.path("store").join(path.as_str());
    let local = builder.in_place(Path::new(NOWHERE), LocalOptions::default());
    up(&local).await;
    tick().await;
    assert!(read_checked(&local, &path).await.unwrap() == nar_of(&content));
    let info = local.path_info(path.hash()).await.unwrap().unwrap();
    let opened = local.open_nar(&info).await.unwrap().unwrap();
    let OpenedNar::Proven(_, stream) = opened else {
        panic!("it was hashed");
    };
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    let mut handle = fs::File::options().write(true).open(&file).unwrap();
    handle.seek(SeekFrom::Start(5 << 20)).unwrap();
    handle.write_all(b"y").unwrap();
    let error = read(stream).await.unwrap_err();
    assert!(matches!(error, Error::Written(_)), "{error}");
}

#[tokio::test]
async fn a_dropped_stream_makes_room() {
    let builder = Builder::new();
    let content = vec![b'x'; 8 << 20];
    let path = builder.add("large", &content);
    let options = LocalOptions {
        nars_max: 1,
        ..LocalOptions::default()
    };
    let local = builder.in_place(Path::new(NOWHERE), options);
    up(&local).await;
    let info = local.path_info(path.hash()).await.unwrap().unwrap();
    for _ in 0..20 {
        let mut nar = local.nar(&info).await.unwrap().unwrap();
        assert!(nar.next().await.unwrap().is_ok());
        let second = tokio::time::timeout(Duration::from_millis(5), local.nar(&info)).await;
        assert!(second.is_err(), "there is room for one");
    }
    let nar = local.nar(&info).await.unwrap().unwrap();
    assert!(read(nar).await.unwrap() == nar_of(&content));
}

#[tokio::test]
async fn without_a_daemon_all_but_roots_works() {
    let builder = Builder::new();
    let path = builder.add("file", b"file");
    let (derivation, _) = builder.build("built", "said");
    let local = builder.in_place(Path::new(NOWHERE), LocalOptions::default());
    up(&local).await;
    assert!(local.kept_path_info(path.hash()).await.unwrap().is_some());
    assert!(local.keep(&path).await.is_err());
    assert_eq!(read_checked(&local, &path).await.unwrap(), nar_of(b"file"));
    let log = local.build_log(&derivation).await.unwrap().unwrap();
    assert_eq!(&log[..], b"said\n");
}

/// A user who may not write there reads as long as some process of Nix has the database open, and asks
/// the daemon else.
#[tokio::test]
async fn another_user_reads_too() {
    let builder = Builder::new();
    let path = builder.add("file", b"file");
    let daemon = builder.daemon();
    for file in [".", "state", "state/db", "store", "log", "conf"] {
        let file = builder.path(file);
        if file.exists() {
            fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        }
    }
    let db = builder.path("state/db");
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args([
        "--exact",
        "child_of_another_user",
        "--ignored",
        "--nocapture",
    ]);
    child
        .env("MUSTER_TEST_FOLDER", builder.path(""))
        .env("MUSTER_TEST_PATH", path.as_str());
    if rustix::process::geteuid().is_root() {
        use std::os::unix::process::CommandExt as _;
        child.uid(65534).gid(65534);
    } else {
        fs::set_permissions(&db, fs::Permissions::from_mode(0o555)).unwrap();
    }
    let output = tokio::task::spawn_blocking(move || child.output());
    let output = output.await.unwrap().unwrap();
    fs::set_permissions(&db, fs::Permissions::from_mode(0o755)).unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{errors}");
    assert!(said.contains("1 passed"), "{said}");
    drop(daemon);
}

#[tokio::test]
#[ignore = "run as another user by the test above"]
async fn child_of_another_user() {
    let builder = Builder::at(std::env::var_os("MUSTER_TEST_FOLDER").unwrap().into());
    let path: StorePath = std::env::var("MUSTER_TEST_PATH").unwrap().parse().unwrap();
    let shm = builder.path("state/db/db.sqlite-shm");
    let refused = fs::write(builder.path("state/db/x"), "");
    assert!(refused.is_err(), "it must not be ours to write");
    // Newer daemons hold it open from their start on.
    if !shm.exists() {
        // Without a process that does it cannot be read, and that is said.
        let alone = builder.in_place(Path::new(NOWHERE), LocalOptions::default());
        assert!(matches!(settled(&alone).await, Link::Down { .. }));
        assert!(alone.path_info(path.hash()).await.is_err());
    }

    let local = builder.in_place(&builder.path("socket"), LocalOptions::default());
    let mut link = local.link();
    let direct = link.wait_for(|link| peer(link) == IN_PLACE);
    let direct = tokio::time::timeout(Duration::from_secs(10), direct).await;
    direct.expect("the daemon's process holds it open").unwrap();
    assert!(shm.exists());
    assert!(has(&local, &path).await);
    assert_eq!(read_checked(&local, &path).await.unwrap(), nar_of(b"file"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_thousand_paths() {
    let builder = Builder::new();
    builder.add("file", b"file");
    let mut writer = database(&builder);
    let rows = writer.transaction().unwrap();
    for n in 0..100_000_u32 {
        let path = builder.store_dir.join(&numbered(n));
        rows.execute(
            "insert into ValidPaths (path, hash, registrationTime, narSize) values (?1, ?2, 1, 120)",
            (path, format!("sha256:{}", "0".repeat(64))),
        )
        .unwrap();
    }
    rows.execute_batch(
        "insert into Refs select a.id, b.id from ValidPaths a join ValidPaths b on b.id between a.id - 8 and a.id - 1",
    )
    .unwrap();
    rows.commit().unwrap();
    let local = builder.in_place(Path::new(NOWHERE), LocalOptions::default());
    up(&local).await;
    let begun = Instant::now();
    let asked = (0..20_000).map(|n| local.path_info(numbered(n * 5 % 100_000).hash()));
    let found = futures_util::future::join_all(asked).await;
    let took = begun.elapsed();
    assert!(found.iter().all(|f| f.as_ref().unwrap().is_some()));
    assert_eq!(
        found[100]
            .as_ref()
            .unwrap()
            .as_ref()
            .unwrap()
            .references
            .len(),
        8
    );
    let nobody = StorePathHash([0xff; 20]);
    assert!(local.path_info(nobody).await.unwrap().is_none());
    println!("20000 look-ups in {took:?}");
    assert!(took < Duration::from_secs(10), "{took:?}");
}

fn numbered(n: u32) -> StorePath {
    let mut hash = [0x5a; 20];
    hash[..4].copy_from_slice(&n.wrapping_mul(0x9e37_79b1).to_be_bytes());
    format!("{}-path-{n}", StorePathHash(hash)).parse().unwrap()
}
