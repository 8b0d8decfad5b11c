//! What every backend promises, run on each of them.

mod cache;

use std::sync::Arc;

use muster::cache::backend::{Backend, Error, Ground, Stats};
use muster::cache::disk::DiskCache;
use muster::cache::fill::Stage;
use muster::cache::memory_backend::MemoryBackend;
use muster::nix::path_info::Basis;
use proptest::prelude::*;

use cache::{fill, look_up, options, path, read};

/// A backend under test, and how its background work is awaited.
enum Tested {
    Memory(MemoryBackend),
    Disk(Box<DiskCache>, tempfile::TempDir),
}

impl Tested {
    fn all(bytes_max: u64) -> [Self; 2] {
        let dir = tempfile::tempdir().unwrap();
        let disk = DiskCache::open(dir.path(), options(bytes_max));
        [
            Self::Memory(MemoryBackend::new(bytes_max)),
            Self::Disk(Box::new(disk), dir),
        ]
    }

    fn backend(&self) -> &dyn Backend {
        match self {
            Self::Memory(backend) => backend,
            Self::Disk(backend, _) => &**backend,
        }
    }

    async fn settle(&self) {
        if let Self::Disk(backend, _) = self {
            backend.flush().await;
        }
    }
}

#[tokio::test]
async fn what_was_filled_is_found_and_read() {
    for tested in Tested::all(1 << 20) {
        let backend = tested.backend();
        let (info, nar) = path(1, 5000);
        let hash = info.path.hash();
        assert_eq!(backend.look_up(hash), None);
        let file = fill(backend, &info, &nar).await.unwrap();
        let record = backend.look_up(hash).unwrap();
        assert_eq!((&record.info, record.file), (&info, Some(file)));
        assert_eq!(record.grounds, [cache::ground()]);
        assert_eq!(read(backend, &record), Some(nar));
        let stats = backend.stats();
        assert_eq!((stats.entries, stats.bytes), (1, file.size_bytes));
        assert_eq!((stats.bytes_reserved, stats.fills), (0, 1));
        let mut other = record.name().unwrap();
        other.file_hash.0[0] ^= 1;
        assert!(backend.open(&other).unwrap().is_none());
    }
}

#[tokio::test]
async fn nothing_is_seen_before_commit_and_nothing_is_left_of_a_dropped_fill() {
    for tested in Tested::all(1 << 20) {
        let backend = tested.backend();
        let (info, _) = path(1, 100);
        let mut fill = backend.begin(1000).unwrap();
        let progress = fill.progress();
        fill.write(&[1; 4000]).unwrap();
        assert_eq!(progress.borrow().written, 4000);
        assert_eq!(progress.borrow().stage, Stage::Growing);
        assert_eq!(backend.look_up(info.path.hash()), None);
        assert!(backend.stats().bytes_reserved >= 4000);
        let reader = fill.reader();
        drop(fill);
        assert_eq!(progress.borrow().stage, Stage::Failed);
        assert_eq!(backend.stats().bytes_reserved, 0);
        assert_eq!(reader.metadata().unwrap().len(), 4000, "followers read on");
        if let Tested::Disk(_, dir) = &tested {
            let temp = dir.path().join(".muster/tmp");
            assert_eq!(std::fs::read_dir(temp).unwrap().count(), 0);
        }
    }
}

#[tokio::test]
async fn followers_see_the_end_with_the_file_that_was_made() {
    for tested in Tested::all(1 << 20) {
        let (info, nar) = path(1, 100);
        let bytes = zstd::encode_all(nar.as_slice(), 1).unwrap();
        let mut fill = tested.backend().begin(info.nar_size).unwrap();
        let progress = fill.progress();
        fill.write(&bytes).unwrap();
        let text = |file: &_| cache::narinfo(&info, file);
        let file = fill.commit(info.clone(), vec![], text).await.unwrap();
        assert_eq!(progress.borrow().stage, Stage::Complete(file));
        assert_eq!(file.size_bytes, bytes.len() as u64);
    }
}

#[tokio::test]
async fn an_earlier_fill_stays_and_another_nar_is_refused() {
    for tested in Tested::all(1 << 20) {
        let backend = tested.backend();
        let (info, nar) = path(1, 3000);
        let first = fill(backend, &info, &nar).await.unwrap();
        let mut again = backend.begin(info.nar_size).unwrap();
        again
            .write(&zstd::encode_all(nar.as_slice(), 7).unwrap())
            .unwrap();
        let ground = Ground {
            upstream: "second".to_owned(),
            basis: Basis::Operator,
        };
        let text = |file: &_| cache::narinfo(&info, file);
        let kept = again.commit(info.clone(), vec![ground.clone()], text).await;
        assert_eq!(kept.unwrap(), first);
        let record = backend.look_up(info.path.hash()).unwrap();
        assert_eq!(record.grounds, [cache::ground(), ground]);

        let (mut other, other_nar) = path(2, 3000);
        other.path = info.path.clone();
        let refused = fill(backend, &other, &other_nar).await;
        assert!(matches!(refused, Err(Error::Diverges)), "{refused:?}");
        let stats = backend.stats();
        assert_eq!((stats.entries, stats.bytes), (1, first.size_bytes));
        assert_eq!(stats.bytes_reserved, 0);
        let record = backend.look_up(info.path.hash()).unwrap();
        assert_eq!(read(backend, &record), Some(nar));
    }
}

#[tokio::test]
async fn the_least_recently_used_goes_first_and_stays_readable() {
    for tested in Tested::all(35_000) {
        let backend = tested.backend();
        let paths: Vec<_> = (0..3).map(|number| path(number, 10_000)).collect();
        for (info, nar) in &paths {
            fill(backend, info, nar).await.unwrap();
        }
        backend.touch(paths[0].0.path.hash());
        let oldest = backend.look_up(paths[1].0.path.hash()).unwrap();
        let open = backend.open(&oldest.name().unwrap()).unwrap().unwrap();
        let (info, nar) = path(3, 10_000);
        fill(backend, &info, &nar).await.unwrap();
        tested.settle().await;
        let there = |number: usize| backend.look_up(paths[number].0.path.hash()).is_some();
        assert_eq!((there(0), there(1), there(2)), (true, false, true));
        assert_eq!(backend.stats().evictions, 1);
        assert!(backend.stats().bytes <= 35_000);
        assert!(backend.open(&oldest.name().unwrap()).unwrap().is_none());
        let mut byte = [0];
        use std::os::unix::fs::FileExt as _;
        open.file.read_exact_at(&mut byte, 10_000).unwrap();
    }
}

#[tokio::test]
async fn what_cannot_fit_is_refused_or_fails_without_harm() {
    for tested in Tested::all(10_000) {
        let backend = tested.backend();
        let too_large = backend.begin(1 << 40);
        assert!(matches!(too_large, Err(Error::TooLarge { .. })));
        let mut fill = backend.begin(100).unwrap();
        fill.write(&[0; 9000]).unwrap();
        assert!(fill.write(&[0; 2000]).is_err());
        assert!(fill.write(&[0; 1]).is_err(), "it stays failed");
        assert_eq!(fill.progress().borrow().stage, Stage::Failed);
        drop(fill);
        assert_eq!(backend.stats().bytes_reserved, 0);
        assert_eq!(backend.stats().degraded, None);
    }
}

#[tokio::test]
async fn look_ups_are_remembered_joined_and_forgotten() {
    for tested in Tested::all(1 << 20) {
        let backend = tested.backend();
        let (info, nar) = path(1, 1000);
        let hash = info.path.hash();
        backend.remember(look_up(&info));
        tested.settle().await;
        assert_eq!(backend.look_up(hash), Some(look_up(&info)));
        assert_eq!(backend.stats().look_ups, 1);

        fill(backend, &info, &nar).await.unwrap();
        let mut second = look_up(&info);
        second.grounds[0].upstream = "second".to_owned();
        backend.remember(second);
        tested.settle().await;
        let record = backend.look_up(hash).unwrap();
        assert_eq!((record.grounds.len(), record.file.is_some()), (2, true));
        let mut diverging = look_up(&info);
        diverging.info.nar_hash.0[0] ^= 1;
        backend.remember(diverging);
        tested.settle().await;
        assert_eq!(backend.look_up(hash), Some(record));
        let Stats {
            entries, look_ups, ..
        } = backend.stats();
        assert_eq!((entries, look_ups), (1, 0));

        backend.forget(hash);
        tested.settle().await;
        assert_eq!(backend.look_up(hash), None);
        assert_eq!((backend.stats().entries, backend.stats().bytes), (0, 0));
    }
}

#[tokio::test]
async fn what_an_upstream_denies_is_forgotten_at_once_but_no_nar() {
    for tested in Tested::all(1 << 20) {
        let backend = tested.backend();
        let (info, nar) = path(1, 1000);
        let (hash, nar_hash) = (info.path.hash(), info.nar_hash);
        let mut second = look_up(&info);
        second.grounds[0].upstream = "second".to_owned();
        let first = cache::ground().upstream;
        let one = async |settled: bool| {
            backend.remember(look_up(&info));
            backend.remember(second.clone());
            if settled {
                tested.settle().await;
            }
        };
        one(true).await;
        let mut other = nar_hash;
        other.0[0] ^= 1;
        backend.deny(hash, other, &[&first, "second"]);
        backend.deny(hash, nar_hash, &["somebody", &first]);
        // Before anything is written, and after.
        assert_eq!(backend.look_up(hash), Some(second.clone()));
        tested.settle().await;
        assert_eq!(backend.look_up(hash), Some(second.clone()));
        backend.deny(hash, nar_hash, &["second"]);
        assert_eq!(backend.look_up(hash), None);
        tested.settle().await;
        assert_eq!((backend.look_up(hash), backend.stats().look_ups), (None, 0));
        // Denied before it was even written.
        one(false).await;
        backend.deny(hash, nar_hash, &[&first, "second"]);
        tested.settle().await;
        assert_eq!(backend.look_up(hash), None);
        // Said again, it counts again.
        backend.remember(look_up(&info));
        tested.settle().await;
        assert_eq!(backend.look_up(hash), Some(look_up(&info)));

        let file = fill(backend, &info, &nar).await.unwrap();
        backend.deny(hash, nar_hash, &[&first]);
        tested.settle().await;
        let record = backend.look_up(hash).unwrap();
        assert_eq!(
            (record.file, record.grounds),
            (Some(file), vec![cache::ground()])
        );
    }
}

#[tokio::test]
async fn what_was_found_wrong_goes_and_nothing_else() {
    for tested in Tested::all(1 << 20) {
        let backend = tested.backend();
        let (info, nar) = path(1, 1000);
        let file = fill(backend, &info, &nar).await.unwrap();
        let mut other = file.name(&info);
        other.file_hash.0[0] ^= 1;
        backend.corrupt(&other, "a test");
        tested.settle().await;
        assert!(backend.look_up(info.path.hash()).is_some());
        backend.corrupt(&file.name(&info), "a test");
        tested.settle().await;
        assert!(
            backend
                .look_up(info.path.hash())
                .is_none_or(|r| r.file.is_none())
        );
        assert_eq!(backend.stats().corrupt, 1);
        fill(backend, &info, &nar).await.unwrap();
    }
}

#[tokio::test]
async fn many_fills_at_once_are_all_kept() {
    for tested in Tested::all(64 << 20) {
        let tested = Arc::new(tested);
        let mut tasks = tokio::task::JoinSet::new();
        for number in 0..200 {
            let tested = Arc::clone(&tested);
            tasks.spawn(async move {
                let (info, nar) = path(number % 100, 2000);
                fill(tested.backend(), &info, &nar).await.unwrap();
            });
        }
        tasks.join_all().await;
        let backend = tested.backend();
        assert_eq!(backend.stats().entries, 100);
        for number in 0..100 {
            let (info, nar) = path(number, 2000);
            let record = backend.look_up(info.path.hash()).unwrap();
            assert_eq!(read(backend, &record), Some(nar));
        }
    }
}

#[tokio::test]
async fn after_stop_nothing_is_found_or_kept() {
    for tested in Tested::all(1 << 20) {
        let backend = tested.backend();
        let (info, nar) = path(1, 100);
        let mut running = backend.begin(10).unwrap();
        fill(backend, &info, &nar).await.unwrap();
        backend.stop().await;
        assert_eq!(backend.look_up(info.path.hash()), None);
        assert!(matches!(backend.begin(1), Err(Error::Stopping)));
        running.write(b"x").unwrap();
        let text = |file: &_| cache::narinfo(&info, file);
        let late = running.commit(info.clone(), vec![], text).await;
        assert!(matches!(late, Err(Error::Stopping)), "{late:?}");
        backend.remember(look_up(&info));
        backend.stop().await;
    }
}

/// What a model of a cache is asked to do.
#[derive(Clone, Debug)]
enum Step {
    Fill(u64),
    Touch(u64),
    Forget(u64),
    Corrupt(u64),
    Remember(u64),
    Reopen,
    LoseIndex,
}

fn step() -> impl Strategy<Value = Step> {
    let number = 0_u64..12;
    prop_oneof![
        6 => number.clone().prop_map(Step::Fill),
        4 => number.clone().prop_map(Step::Touch),
        1 => number.clone().prop_map(Step::Forget),
        1 => number.clone().prop_map(Step::Corrupt),
        1 => number.prop_map(Step::Remember),
        1 => Just(Step::Reopen),
        1 => Just(Step::LoseIndex),
    ]
}

/// About a third of the bytes of all twelve paths.
const MODEL_BYTES_MAX: u64 = 30_000;

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// The cache on disk holds exactly what a list in the order of use would hold.
    #[test]
    fn the_disk_agrees_with_a_model(steps in proptest::collection::vec(step(), 1..40)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(run(steps));
    }
}

async fn run(steps: Vec<Step>) {
    let dir = tempfile::tempdir().unwrap();
    let open = || DiskCache::open(dir.path(), options(MODEL_BYTES_MAX));
    let mut disk = open();
    // Paths with NAR in the order of use, oldest first, with the sizes of their files.
    let mut model: Vec<(u64, u64)> = Vec::new();
    // Once the index was lost, the order of use is that of the files' times.
    let mut order_is_known = true;
    let size = |number: u64| 3000 + usize::try_from(number).unwrap() * 700;
    for step in steps {
        match step {
            // Filling again what is there would make others go for a moment.
            Step::Fill(number) if model.iter().any(|(n, _)| *n == number) => {}
            Step::Fill(number) => {
                let (info, nar) = path(number, size(number));
                let file = fill(&disk, &info, &nar).await.unwrap();
                model.push((number, file.size_bytes));
                disk.flush().await;
            }
            Step::Touch(number) => {
                disk.touch(path(number, size(number)).0.path.hash());
                disk.flush().await;
                if let Some(place) = model.iter().position(|(n, _)| *n == number) {
                    let touched = model.remove(place);
                    model.push(touched);
                }
            }
            Step::Forget(number) => {
                disk.forget(path(number, size(number)).0.path.hash());
                model.retain(|(n, _)| *n != number);
            }
            Step::Corrupt(number) => {
                let hash = path(number, size(number)).0.path.hash();
                if let Some(name) = disk.look_up(hash).and_then(|record| record.name()) {
                    disk.corrupt(&name, "a test");
                }
                model.retain(|(n, _)| *n != number);
            }
            Step::Remember(number) => disk.remember(look_up(&path(number, size(number)).0)),
            Step::Reopen => {
                disk.stop().await;
                disk = open();
            }
            Step::LoseIndex => {
                disk.stop().await;
                std::fs::remove_file(dir.path().join(".muster/index.redb")).unwrap();
                disk = open();
                while !disk.is_reconciled() {
                    tokio::time::sleep(std::time::Duration::from_millis(1)).await;
                }
                order_is_known = false;
            }
        }
        disk.flush().await;
        if order_is_known {
            while model.iter().map(|(_, size)| size).sum::<u64>() > MODEL_BYTES_MAX {
                model.remove(0);
            }
        } else {
            let there = |number: u64| {
                let found = disk.look_up(path(number, size(number)).0.path.hash());
                found.is_some_and(|record| record.file.is_some())
            };
            model.retain(|(number, _)| there(*number));
        }
        let stats = disk.stats();
        let bytes: u64 = model.iter().map(|(_, size)| size).sum();
        assert_eq!(
            (stats.entries, stats.bytes),
            (model.len() as u64, bytes),
            "{stats:?}"
        );
        assert!(stats.bytes <= MODEL_BYTES_MAX && stats.bytes_reserved == 0);
        assert_eq!(stats.degraded, None);
        for number in 0..12 {
            let (info, nar) = path(number, size(number));
            let record = disk.look_up(info.path.hash());
            let record = record.filter(|record| record.file.is_some());
            let expected = model.iter().any(|(n, _)| *n == number);
            assert_eq!(record.is_some(), expected, "path {number}");
            if let Some(record) = record {
                assert_eq!(read(&disk, &record), Some(nar));
            }
        }
    }
}
