//! `muster cache` as an operator uses it, on a folder that a cache really filled.

mod cache;

use std::fs;
use std::path::Path;
use std::process::Command;

use muster::cache::backend::Backend;
use muster::cache::disk::DiskCache;
use muster::cache::nar_name::NarName;
use serde_json::Value;

use cache::{fill, options, path, read};

struct Ended {
    status: i32,
    out: String,
    err: String,
}

fn muster(dir: &Path, args: &[&str]) -> Ended {
    let mut command = Command::new(env!("CARGO_BIN_EXE_muster"));
    command.arg("cache").args(args).arg("--cache-dir").arg(dir);
    command.env_remove("MUSTER_CONFIG");
    let ended = command.output().unwrap();
    Ended {
        status: ended.status.code().unwrap(),
        out: String::from_utf8(ended.stdout).unwrap(),
        err: String::from_utf8(ended.stderr).unwrap(),
    }
}

/// What it writes as JSON; the status is given.
fn json(dir: &Path, args: &[&str], status: i32) -> Value {
    let ended = muster(dir, &[args, &["--json"]].concat());
    assert_eq!(ended.status, status, "{args:?}: {}", ended.err);
    assert_eq!(ended.err, "", "no progress where there is no terminal");
    serde_json::from_str(&ended.out).expect("it is JSON")
}

/// A stopped cache with some paths of 10 kB, and the names of their files.
async fn filled(dir: &Path, count: u64) -> Vec<NarName> {
    let cache = DiskCache::open(dir, options(1 << 20));
    let mut names = vec![];
    for number in 0..count {
        let (info, nar) = path(number, 10_000);
        names.push(fill(&cache, &info, &nar).await.unwrap().name(&info));
    }
    cache.stop().await;
    names
}

#[tokio::test]
async fn what_is_kept_is_counted_beside_a_server_and_without_an_index() {
    let place = tempfile::tempdir().unwrap();
    let names = filled(place.path(), 5).await;
    let bytes: u64 = names
        .iter()
        .map(|name| fs::metadata(place.path().join(name.url())).unwrap().len())
        .sum();
    let server = DiskCache::open(place.path(), options(1 << 20));
    assert_eq!(server.stats().degraded, None);
    let stats = json(place.path(), &["stats"], 0);
    assert_eq!(
        (&stats["nars"], &stats["bytes"]),
        (&5.into(), &bytes.into())
    );
    assert_eq!(
        (&stats["narinfos"], &stats["in-use"]),
        (&5.into(), &true.into())
    );
    let text = muster(place.path(), &["stats"]).out;
    assert!(
        text.contains("a running muster") && text.contains(&bytes.to_string()),
        "{text}"
    );
    server.stop().await;
    fs::remove_dir_all(place.path().join(".muster")).unwrap();
    fs::write(place.path().join("nar/notes"), "").unwrap();
    let stats = json(place.path(), &["stats"], 0);
    assert_eq!(
        (&stats["nars"], &stats["in-use"]),
        (&5.into(), &false.into())
    );
    assert_eq!(stats["foreign"], 1);
}

#[tokio::test]
async fn every_kind_of_damage_is_found_and_removed() {
    let place = tempfile::tempdir().unwrap();
    let names = filled(place.path(), 9).await;
    let nar = |number: usize| place.path().join(names[number].url());
    let narinfo = |number: usize| {
        let hash = names[number].path_hash;
        place.path().join(format!("{hash}.narinfo"))
    };
    let clean = json(place.path(), &["verify"], 0);
    assert_eq!(
        (&clean["right"], &clean["wrong"]),
        (&9.into(), &Value::Array(vec![]))
    );

    // 0 and 1 stay.
    let mut flipped = fs::read(nar(2)).unwrap();
    flipped[5000] ^= 1;
    fs::write(nar(2), flipped).unwrap();
    fs::write(nar(3), "cut").unwrap();
    fs::remove_file(nar(4)).unwrap();
    fs::remove_file(narinfo(5)).unwrap();
    let lie = |number: usize, from: &str, to: &str| {
        let text = fs::read_to_string(narinfo(number)).unwrap();
        assert!(text.contains(from));
        fs::write(narinfo(number), text.replace(from, to)).unwrap();
    };
    let size = fs::read_to_string(narinfo(6)).unwrap();
    let size = size
        .lines()
        .find(|line| line.starts_with("NarSize"))
        .unwrap()
        .to_owned();
    lie(6, &size, "NarSize: 10001");
    lie(
        7,
        &format!("StorePath: /nix/store/{}", names[7].path_hash),
        "StorePath: /nix/store/x",
    );
    // Every hash agrees, and it is no archive.
    let (info, bytes) = cache::of("no-archive", b"this is no nar");
    let cache = DiskCache::open(place.path().join("other"), options(1 << 20));
    let forged = fill(&cache, &info, &bytes).await.unwrap();
    cache.stop().await;
    let forged_name = forged.name(&info);
    fs::write(
        place.path().join(forged_name.url()),
        zstd::encode_all(bytes.as_slice(), 1).unwrap(),
    )
    .unwrap();
    let forged_narinfo = format!("{}.narinfo", info.path.hash());
    fs::copy(
        place.path().join("other").join(&forged_narinfo),
        place.path().join(&forged_narinfo),
    )
    .unwrap();
    fs::write(place.path().join("nar/foreign.nar.xz"), "theirs").unwrap();

    let server = DiskCache::open(place.path().join("other"), options(1 << 20));
    let refused = muster(&place.path().join("other"), &["verify"]);
    assert_eq!(refused.status, 1);
    assert!(refused.err.contains("--dry-run"), "{}", refused.err);
    let beside = json(&place.path().join("other"), &["verify", "--dry-run"], 1);
    let cause = beside["wrong"][0]["cause"].as_str().unwrap();
    assert!(cause.starts_with("malformed NAR"), "{cause}");
    server.stop().await;

    let dry = json(place.path(), &["verify", "--dry-run"], 1);
    assert_eq!(
        (&dry["right"], &dry["removed"]),
        (&3.into(), &false.into()),
        "{dry}"
    );
    assert!(nar(2).exists() && nar(3).exists());
    let found = json(place.path(), &["verify"], 1);
    let wrong = found["wrong"].as_array().unwrap();
    let causes: Vec<_> = wrong.iter().map(|w| w["cause"].as_str().unwrap()).collect();
    assert_eq!(found["right"], 3, "{causes:#?}");
    for cause in [
        "another hash than its narinfo says",
        "the file has 3 of",
        "No such file",
        "no narinfo names it",
        "more than 10001 bytes",
        "is no narinfo",
        "malformed NAR",
    ] {
        assert!(
            causes.iter().any(|c| c.contains(cause)),
            "{cause}: {causes:#?}"
        );
    }
    assert!(place.path().join("nar/foreign.nar.xz").exists());
    let after = json(place.path(), &["verify"], 0);
    assert_eq!(after["right"], 3);

    let cache = DiskCache::open(place.path(), options(1 << 20));
    let kept = |number: u64| cache.look_up(path(number, 10_000).0.path.hash());
    assert_eq!(read(&cache, &kept(0).unwrap()), Some(path(0, 10_000).1));
    assert!((2..5).all(|number| kept(number).is_none_or(|record| record.file.is_none())));
    cache.stop().await;
}

#[tokio::test]
async fn the_least_recently_used_makes_room() {
    let place = tempfile::tempdir().unwrap();
    let names = filled(place.path(), 6).await;
    let cache = DiskCache::open(place.path(), options(1 << 20));
    cache.touch(names[0].path_hash);
    cache.flush().await;
    let refused = muster(place.path(), &["gc", "--max-size", "1K"]);
    assert_eq!(refused.status, 1);
    assert!(
        refused.err.contains("another muster uses"),
        "{}",
        refused.err
    );
    cache.stop().await;
    fs::remove_file(place.path().join(format!("{}.narinfo", names[5].path_hash))).unwrap();

    let removed = json(place.path(), &["gc", "--max-size", "31000"], 0);
    assert_eq!(removed["removed-nars"], 3, "{removed}");
    assert!(removed["bytes"].as_u64().unwrap() <= 31_000);
    let there: Vec<_> = names
        .iter()
        .map(|name| place.path().join(name.url()).exists())
        .collect();
    assert_eq!(there, [true, false, false, true, true, false]);
    assert_eq!(json(place.path(), &["verify"], 0)["right"], 3);
    let cache = DiskCache::open(place.path(), options(1 << 20));
    assert_eq!(
        cache.stats().entries,
        3 + u64::from(cache.look_up(names[5].path_hash).is_some())
    );
    cache.stop().await;
    assert_eq!(
        json(place.path(), &["gc"], 0)["removed-nars"],
        0,
        "10 GiB by default"
    );
}

#[tokio::test]
async fn clear_leaves_what_is_not_ours() {
    let place = tempfile::tempdir().unwrap();
    filled(place.path(), 3).await;
    let foreign = place.path().join("nar/foreign.nar.xz");
    fs::write(&foreign, "theirs").unwrap();
    let removed = json(place.path(), &["clear"], 0);
    assert_eq!(removed["removed-nars"], 3);
    assert!(foreign.exists() && place.path().join("nix-cache-info").exists());
    let stats = json(place.path(), &["stats"], 0);
    assert_eq!((&stats["nars"], &stats["narinfos"]), (&0.into(), &0.into()));
    let cache = DiskCache::open(place.path(), options(1 << 20));
    assert_eq!((cache.stats().entries, cache.stats().degraded), (0, None));
    let (info, nar) = path(1, 10_000);
    fill(&cache, &info, &nar).await.unwrap();
    let refused = muster(place.path(), &["clear"]);
    assert_eq!(refused.status, 1);
    assert!(
        refused.err.contains("delete the folder itself"),
        "{}",
        refused.err
    );
    cache.stop().await;
}

/// On a terminal each says how far it is, and the answer stands alone in the end.
#[tokio::test]
async fn progress_is_shown_on_a_terminal() {
    let place = tempfile::tempdir().unwrap();
    filled(place.path(), 60).await;
    for (command, word) in [
        ("stats", "counting"),
        ("verify", "verifying"),
        ("gc --max-size 100K", "looking"),
        ("clear", "removing"),
    ] {
        let line = format!(
            "{} cache {command} --cache-dir {} --json >{}",
            env!("CARGO_BIN_EXE_muster"),
            place.path().display(),
            place.path().join("answer").display()
        );
        let mut script = Command::new("script");
        script.args(["--quiet", "--return", "--command", &line, "/dev/null"]);
        let shown = script.env("TERM", "xterm").output();
        let shown = shown.expect("script, of util-linux, is needed for this test");
        let text = String::from_utf8_lossy(&shown.stdout).into_owned();
        assert!(shown.status.success(), "{command}: {text}");
        assert!(text.contains(word), "{command}: {text:?}");
        let answer = fs::read_to_string(place.path().join("answer")).unwrap();
        let answer: Value = serde_json::from_str(&answer).expect("it is JSON");
        assert!(answer.is_object(), "{command}: {answer}");
    }
}

#[test]
fn a_folder_that_is_no_cache_is_said() {
    let place = tempfile::tempdir().unwrap();
    for command in ["stats", "verify", "gc", "clear"] {
        let ended = muster(place.path(), &[command]);
        assert_eq!(ended.status, 1, "{command}");
        assert!(ended.err.contains("cannot use"), "{}", ended.err);
        assert_eq!(
            fs::read_dir(place.path()).unwrap().count(),
            0,
            "nothing was made"
        );
    }
    assert_eq!(
        muster(place.path(), &["gc", "--max-size", "much"]).status,
        2
    );
}
