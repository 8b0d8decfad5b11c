//! The cache on disk against what happens to folders: kill -9, foreign, damaged and deleted files, a
//! second process; and real Nix as its reader. Full and read-only disks are in `e2e_cache_disks`.

mod cache;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use muster::cache::backend::{Backend, Error};
use muster::cache::disk::DiskCache;
use muster::cache::nar_name::NarName;
use muster::nix::store_path::{StoreDir, StorePathHash};

use cache::{fill, folder_is_whole, key, look_up, options, path, read, settle, wait};

/// Kills, as the issue asks for.
const KILLS: u64 = 200;
/// Folders at the same time, so that it takes less time.
const LANES: u64 = 4;
/// Paths that the killed processes fill, of 1 to 120 kB: some five times what fits.
const PATHS: u64 = 60;
const KILLED_BYTES_MAX: u64 = 700_000;

/// What the killed processes fill; sizes follow from the number.
fn killed_path(number: u64) -> (muster::nix::path_info::PathInfo, Vec<u8>) {
    path(number, 1000 + usize::try_from(number * 2000).unwrap())
}

/// Fills, evicts, forgets and finds corrupt until it is killed; run by the test below.
#[test]
#[ignore = "never ends: the test of kill -9 runs and kills it"]
fn a_process_that_is_killed() {
    let dir = PathBuf::from(std::env::var_os("MUSTER_TEST_CACHE").expect("run by its test"));
    // It must not outlive a test that failed.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)).unwrap();
    let seed: u64 = std::env::var("MUSTER_TEST_SEED").unwrap().parse().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let cache = std::sync::Arc::new(DiskCache::open(dir, options(KILLED_BYTES_MAX)));
    // A process that another lane is just starting may still have the looking process's lock.
    runtime.block_on(wait("lock", || {
        _ = cache.begin(1);
        cache.stats().degraded.is_none()
    }));
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..6 {
        let cache = std::sync::Arc::clone(&cache);
        tasks.spawn_on(
            async move {
                let mut random = fastrand::Rng::with_seed(seed * 10 + task);
                loop {
                    let (info, nar) = killed_path(random.u64(..PATHS));
                    let hash = info.path.hash();
                    match random.u8(..20) {
                        0 => cache.forget(hash),
                        1 => {
                            if let Some(name) = cache.look_up(hash).and_then(|r| r.name()) {
                                cache.corrupt(&name, "a test");
                            }
                        }
                        2 | 3 => cache.remember(look_up(&info)),
                        4 | 5 => cache.touch(hash),
                        _ => _ = fill(&*cache, &info, &nar).await,
                    }
                }
            },
            runtime.handle(),
        );
    }
    runtime.block_on(tasks.join_all());
}

#[test]
fn kill_9_at_any_moment_leaves_whole_entries_only() {
    let lanes = (0..LANES).map(|lane| {
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            runtime.unwrap().block_on(kill_and_look(lane));
        })
    });
    for lane in lanes.collect::<Vec<_>>() {
        if let Err(panic) = lane.join() {
            std::panic::resume_unwind(panic);
        }
    }
}

async fn kill_and_look(lane: u64) {
    let place = tempfile::tempdir().unwrap();
    let dir = place.path().join("cache");
    let mut random = fastrand::Rng::with_seed(lane);
    let (mut entries, mut agreed) = (0, 0);
    for kill in 0..KILLS / LANES {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "a_process_that_is_killed", "--ignored"]);
        child.env("MUSTER_TEST_CACHE", &dir);
        child.env("MUSTER_TEST_SEED", (lane * KILLS + kill).to_string());
        let said = place.path().join("said");
        child.stderr(fs::File::create(&said).unwrap());
        let mut child = child.stdout(Stdio::null()).spawn().unwrap();
        tokio::time::sleep(Duration::from_millis(random.u64(5..120))).await;
        let ended = child.try_wait().unwrap();
        let said = fs::read_to_string(said).unwrap();
        assert_eq!(ended, None, "it must die by us alone: {said}");
        child.kill().unwrap();
        child.wait().unwrap();

        if !dir.join("nix-cache-info").exists() {
            continue;
        }
        entries += folder_is_whole(&dir);
        agreed += u64::from(nix_agrees(place.path(), &dir));
        let cache = DiskCache::open(&dir, options(KILLED_BYTES_MAX));
        assert_eq!(cache.stats().degraded, None, "after kill {kill}");
        for number in 0..PATHS {
            let (info, nar) = killed_path(number);
            let Some(record) = cache.look_up(info.path.hash()) else {
                continue;
            };
            assert_eq!(record.info, info);
            if record.file.is_some() {
                // What the index lists and the folder lacks is none; wrong bytes never are.
                if let Some(found) = read(&cache, &record) {
                    assert!(found == nar, "path {number} after kill {kill}");
                }
            }
        }
        cache.stop().await;
    }
    let cache = DiskCache::open(&dir, options(KILLED_BYTES_MAX));
    settle(&cache).await;
    let stats = cache.stats();
    let listed = fs::read_dir(dir.join("nar")).unwrap().count() as u64;
    assert_eq!(
        stats.entries, listed,
        "no orphans, nothing missing: {stats:?}"
    );
    assert!(stats.bytes <= KILLED_BYTES_MAX && stats.entries > 0);
    cache.stop().await;
    folder_is_whole(&dir);
    assert!(nix_agrees(place.path(), &dir));
    // It would have seen it.
    let nar = fs::read_dir(dir.join("nar"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let mut bytes = fs::read(&nar).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(nar, bytes).unwrap();
    assert!(!nix_verify(place.path(), &dir).0);
    let kills = KILLS / LANES;
    assert!(
        entries > kills * 2 && agreed > kills / 2,
        "{entries} entries, {agreed} folders"
    );
}

/// Has real Nix verify contents and signatures of all paths; false when there are none.
fn nix_agrees(place: &Path, dir: &Path) -> bool {
    let (right, said) = nix_verify(place, dir);
    assert!(right, "{said}");
    assert!(
        !said.contains("warning") && !said.contains("error"),
        "{said}"
    );
    fs::read_dir(dir).unwrap().flatten().any(|entry| {
        let name = entry.file_name();
        name.to_string_lossy().ends_with(".narinfo")
    })
}

/// Whether real Nix finds all of it right, and what it says.
fn nix_verify(place: &Path, dir: &Path) -> (bool, String) {
    let home = tempfile::tempdir_in(place).unwrap();
    let mut nix = nix(home.path());
    nix.args(["store", "verify", "--all", "--store"]);
    nix.arg(format!("file://{}", dir.display()));
    let output = nix.output().expect("these tests need nix");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.success(), said)
}

/// A nix that knows our key and remembers nothing.
fn nix(home: &Path) -> Command {
    let mut nix = Command::new("nix");
    nix.args(["--extra-experimental-features", "nix-command"]);
    nix.args([
        "--option",
        "trusted-public-keys",
        &key().public().to_string(),
    ]);
    nix.env("HOME", home)
        .env("XDG_CACHE_HOME", home.join("cache"));
    nix.env_remove("NIX_REMOTE").env("NIX_CONF_DIR", home);
    nix
}

#[tokio::test]
async fn nix_copies_a_closure_from_the_folder_alone() {
    let place = tempfile::tempdir().unwrap();
    let dir = place.path().join("cache");
    let cache = DiskCache::open(&dir, options(1 << 30));
    // top -> middle -> bottom, and each itself.
    let (mut top, top_nar) = cache::of("top", &cache::nar(&vec![b't'; 100_000]));
    let (mut middle, middle_nar) = cache::of("middle", &cache::nar(b"middle"));
    let (bottom, bottom_nar) = cache::of("bottom", &cache::nar(b""));
    middle.references = vec![bottom.path.clone(), middle.path.clone()];
    top.references = vec![middle.path.clone(), top.path.clone()];
    for info in [&mut top, &mut middle] {
        info.normalize();
    }
    for (info, nar) in [
        (&top, &top_nar),
        (&middle, &middle_nar),
        (&bottom, &bottom_nar),
    ] {
        fill(&cache, info, nar).await.unwrap();
    }
    cache.stop().await;
    fs::remove_dir_all(dir.join(".muster")).unwrap();

    let store = place.path().join("store");
    let absolute = StoreDir::default().join(&top.path);
    let mut copy = nix(place.path());
    copy.args(["copy", "--from", &format!("file://{}", dir.display())]);
    copy.args(["--to", &format!("{}", store.display()), &absolute]);
    let output = copy.output().expect("these tests need nix");
    assert!(output.status.success(), "{output:?}");
    for (info, contents) in [(&top, vec![b't'; 100_000]), (&middle, b"middle".to_vec())] {
        let file = format!(
            "{}{}",
            store.display(),
            StoreDir::default().join(&info.path)
        );
        assert_eq!(fs::read(file).unwrap(), contents);
    }
}

#[tokio::test]
async fn a_lost_or_damaged_index_comes_back_from_the_files() {
    let place = tempfile::tempdir().unwrap();
    let dir = place.path().join("cache");
    let index = dir.join(".muster/index.redb");
    let paths: Vec<_> = (0..20).map(|number| path(number, 2000)).collect();
    let cache = DiskCache::open(&dir, options(1 << 20));
    for (info, nar) in &paths {
        fill(&cache, info, nar).await.unwrap();
    }
    let bytes = cache.stats().bytes;
    cache.stop().await;
    let whole = fs::read(&index).unwrap();
    type Damage<'a> = Box<dyn Fn() + 'a>;
    let damages: [(&str, Damage<'_>); 6] = [
        ("gone", Box::new(|| fs::remove_file(&index).unwrap())),
        ("empty", Box::new(|| fs::write(&index, "").unwrap())),
        (
            "cut",
            Box::new(|| fs::write(&index, &whole[..whole.len() / 2]).unwrap()),
        ),
        (
            "cut short",
            Box::new(|| fs::write(&index, &whole[..5000]).unwrap()),
        ),
        (
            "foreign",
            Box::new(|| fs::write(&index, vec![b'x'; 100_000]).unwrap()),
        ),
        (
            "overwritten",
            Box::new(|| {
                let mut bytes = whole.clone();
                let middle = bytes.len() / 2;
                bytes[4096..middle].fill(0xaa);
                fs::write(&index, bytes).unwrap();
            }),
        ),
    ];
    for (what, damage) in damages {
        damage();
        let cache = DiskCache::open(&dir, options(1 << 20));
        // At once, while the background pass is under way.
        for (info, nar) in &paths {
            let record = cache.look_up(info.path.hash());
            let record = record.unwrap_or_else(|| panic!("{what}: {}", info.path));
            assert_eq!(record.grounds, [cache::ground()], "{what}");
            assert_eq!(read(&cache, &record).as_ref(), Some(nar), "{what}");
        }
        wait("new index", || {
            // A damage that shows late is repaired after the pause, by whoever comes.
            _ = cache.begin(1);
            let stats = cache.stats();
            cache.is_reconciled() && (stats.entries, stats.bytes) == (20, bytes)
        })
        .await;
        assert_eq!(cache.stats().degraded, None, "{what}");
        cache.stop().await;
    }
}

/// Bit rot, or a version that took for a record what this one does not.
#[tokio::test]
async fn a_row_that_cannot_be_read_costs_no_other() {
    let place = tempfile::tempdir().unwrap();
    let dir = place.path().join("cache");
    let paths: Vec<_> = (0..10).map(|number| path(number, 2000)).collect();
    let cache = DiskCache::open(&dir, options(1 << 20));
    for (info, nar) in &paths {
        fill(&cache, info, nar).await.unwrap();
    }
    let (said, _) = path(100, 10);
    cache.remember(look_up(&said));
    cache.stop().await;
    let records: redb::TableDefinition<'_, [u8; 20], &[u8]> = redb::TableDefinition::new("records");
    let database = redb::Database::open(dir.join(".muster/index.redb")).unwrap();
    let write = database.begin_write().unwrap();
    let spoilt = [&paths[0].0, &paths[1].0, &said];
    for info in spoilt {
        let mut table = write.open_table(records).unwrap();
        let had = table.insert(&info.path.hash().0, &b"x"[..]).unwrap();
        assert!(had.is_some());
    }
    write.commit().unwrap();
    drop(database);
    // One of them is not in the folder any more either.
    let gone = paths[1].0.path.hash();
    fs::remove_file(dir.join(format!("{gone}.narinfo"))).unwrap();

    let cache = DiskCache::open(&dir, options(1 << 20));
    settle(&cache).await;
    let stats = cache.stats();
    assert_eq!((stats.degraded, stats.entries), (None, 9));
    for (info, nar) in &paths {
        let record = cache.look_up(info.path.hash());
        match info.path.hash() == gone {
            true => assert_eq!(record, None),
            false => assert_eq!(read(&cache, &record.unwrap()).as_ref(), Some(nar)),
        }
    }
    assert_eq!(cache.look_up(said.path.hash()), None);
    cache.remember(look_up(&said));
    cache.flush().await;
    assert!(cache.look_up(said.path.hash()).is_some());
    cache.stop().await;
    folder_is_whole(&dir);
}

#[tokio::test]
async fn files_of_others_are_left_alone_and_wrong_ones_go() {
    let place = tempfile::tempdir().unwrap();
    let dir = place.path().join("cache");
    let cache = DiskCache::open(&dir, options(1 << 20));
    let paths: Vec<_> = (0..6).map(|number| path(number, 2000)).collect();
    let mut names = vec![];
    for (info, nar) in &paths {
        names.push(fill(&cache, info, nar).await.unwrap().name(info));
    }
    cache.stop().await;
    let nar = |number: usize| dir.join(names[number].url());
    let narinfo = |number: usize| dir.join(format!("{}.narinfo", names[number].path_hash));
    // 0 stays. Known to the index: 1 is cut, 2 is gone. 3 to 5 are to be found in the folder alone.
    let cut = |path: PathBuf| {
        let file = fs::OpenOptions::new().write(true).open(path).unwrap();
        file.set_len(100).unwrap();
    };
    cut(nar(1));
    fs::remove_file(nar(2)).unwrap();
    let whole = fs::read(narinfo(3)).unwrap();
    let reopened = DiskCache::open(&dir, options(1 << 20));
    settle(&reopened).await;
    for name in &names[3..] {
        reopened.forget(name.path_hash);
    }
    reopened.stop().await;
    // A narinfo whose NAR is gone, one that is garbage, and a NAR without narinfo.
    fs::write(narinfo(3), &whole).unwrap();
    fs::write(narinfo(4), "garbage").unwrap();
    fs::write(nar(5), "orphan").unwrap();
    let foreign_hash = StorePathHash([9; 20]);
    let foreign = String::from_utf8(whole).unwrap().replace(
        &names[3].url(),
        "nar/0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73.nar.xz",
    );
    let left_alone = [
        dir.join(format!("{foreign_hash}.narinfo")),
        dir.join("nar/0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73.nar.xz"),
        dir.join("nar/notes.txt"),
        dir.join("README"),
    ];
    for file in &left_alone {
        fs::write(file, &foreign).unwrap();
    }
    fs::create_dir(dir.join(format!("{}.narinfo", StorePathHash([8; 20])))).unwrap();
    fs::create_dir(dir.join("nar/folder")).unwrap();
    fs::write(dir.join(".muster/tmp/nar.1.1"), "left by the dead").unwrap();

    let cache = DiskCache::open(&dir, options(1 << 20));
    settle(&cache).await;
    assert_eq!(cache.stats().degraded, None);
    let there = |number: usize| cache.look_up(names[number].path_hash).is_some();
    let found: Vec<_> = (0..6).map(there).collect();
    assert_eq!(found, [true, false, false, false, false, false]);
    assert_eq!(cache.stats().entries, 1);
    for file in &left_alone {
        assert!(file.exists(), "{}", file.display());
    }
    for number in 1..6 {
        assert!(
            !nar(number).exists() && !narinfo(number).exists(),
            "{number}"
        );
    }
    assert!(!dir.join(".muster/tmp/nar.1.1").exists());
    // What is gone can be filled again, in the place of what is foreign, too.
    for (info, nar) in &paths {
        fill(&cache, info, nar).await.unwrap();
    }
    assert_eq!(cache.stats().entries, 6);
}

#[tokio::test]
async fn a_file_damaged_under_way_is_none_and_its_entry_goes() {
    let place = tempfile::tempdir().unwrap();
    let cache = DiskCache::open(place.path(), options(1 << 20));
    for (number, damage) in ["cut", "gone", "link", "folder", "pipe"].iter().enumerate() {
        let (info, nar) = path(number as u64, 2000);
        let name: NarName = fill(&cache, &info, &nar).await.unwrap().name(&info);
        let file = place.path().join(name.url());
        match *damage {
            "cut" => fs::write(&file, "short").unwrap(),
            "gone" => fs::remove_file(&file).unwrap(),
            kind => {
                fs::remove_file(&file).unwrap();
                match kind {
                    "link" => std::os::unix::fs::symlink("/etc/passwd", &file).unwrap(),
                    "folder" => fs::create_dir(&file).unwrap(),
                    _ => assert!(
                        Command::new("mkfifo")
                            .arg(&file)
                            .status()
                            .unwrap()
                            .success()
                    ),
                }
            }
        }
        assert!(cache.open(&name).unwrap().is_none(), "{damage}");
        cache.flush().await;
        assert_eq!(cache.look_up(info.path.hash()), None, "{damage}");
        assert_eq!(cache.stats().corrupt, number as u64 + 1, "{damage}");
    }
    assert_eq!((cache.stats().entries, cache.stats().degraded), (0, None));
}

#[tokio::test]
async fn the_folder_may_be_deleted_at_any_moment() {
    let place = tempfile::tempdir().unwrap();
    let dir = place.path().join("cache");
    let cache = DiskCache::open(&dir, options(1 << 20));
    let (info, nar) = path(1, 2000);
    fill(&cache, &info, &nar).await.unwrap();
    let record = cache.look_up(info.path.hash()).unwrap();
    fs::remove_dir_all(&dir).unwrap();
    assert!(cache.open(&record.name().unwrap()).unwrap().is_none());
    let (other, other_nar) = path(2, 2000);
    let begun = Instant::now();
    while let Err(error) = fill(&cache, &other, &other_nar).await {
        assert!(begun.elapsed() < Duration::from_secs(10), "{error}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    cache.flush().await;
    assert_eq!(cache.look_up(info.path.hash()), None);
    assert_eq!(cache.stats().entries, 1);
    folder_is_whole(&dir);
}

#[tokio::test]
async fn a_second_process_does_without_until_the_first_ends() {
    let place = tempfile::tempdir().unwrap();
    let first = DiskCache::open(place.path(), options(1 << 20));
    let (info, nar) = path(1, 2000);
    fill(&first, &info, &nar).await.unwrap();
    let second = DiskCache::open(place.path(), options(1 << 20));
    let cause = second.stats().degraded.unwrap();
    assert!(cause.contains("another muster uses"), "{cause}");
    assert_eq!(second.look_up(info.path.hash()), None);
    assert!(matches!(second.begin(1), Err(Error::Degraded(_))));
    first.stop().await;
    wait("turn", || {
        _ = second.begin(1);
        second.stats().degraded.is_none()
    })
    .await;
    let record = second.look_up(info.path.hash()).unwrap();
    assert_eq!(read(&second, &record), Some(nar));
}

#[tokio::test]
async fn the_cache_of_another_store_and_a_file_in_its_place_are_refused() {
    let place = tempfile::tempdir().unwrap();
    let other = place.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("nix-cache-info"), "StoreDir: /gnu/store\n").unwrap();
    let cache = DiskCache::open(&other, options(1 << 20));
    let cause = cache.stats().degraded.unwrap();
    assert!(cause.contains("/gnu/store"), "{cause}");
    assert_eq!(fs::read_dir(&other).unwrap().count(), 1, "nothing was made");
    let file = place.path().join("file");
    fs::write(&file, "").unwrap();
    let cache = DiskCache::open(&file, options(1 << 20));
    assert!(cache.stats().degraded.is_some());
    assert!(cache.begin(1).is_err());
}
