//! The cache on a full and on a read-only file system, which takes root to make.

mod cache;

use std::fs;
use std::process::Command;
use std::time::Duration;

use muster::cache::backend::{Backend, Error};
use muster::cache::disk::DiskCache;

use tokio::time::sleep;

use cache::{fill, folder_is_whole, look_up, options, path, read, settle, wait};

/// A small file system, as root may make one; unmounted when dropped.
struct Disk(tempfile::TempDir);

impl Disk {
    fn new(size: &str) -> Self {
        let disk = Self(tempfile::tempdir().unwrap());
        disk.mount(&["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]);
        disk
    }

    fn mount(&self, args: &[&str]) {
        let mut mount = Command::new("mount");
        let done = mount.args(args).arg(self.0.path()).status();
        assert!(
            done.unwrap().success(),
            "these tests mount: run them as root"
        );
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Lazily: a test that failed still has it open.
        _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[tokio::test]
async fn a_full_disk_degrades_and_room_heals() {
    // With a margin that keeps the index writable, and without one, so that its writes fail, too.
    for free_bytes_min in [1 << 20, 0] {
        let disk = Disk::new("8m");
        let dir = disk.0.path().join("cache");
        let bounds = || muster::cache::disk::Options {
            free_bytes_min,
            ..options(1 << 30)
        };
        let cache = DiskCache::open(&dir, bounds());
        let (info, nar) = path(0, 50_000);
        fill(&cache, &info, &nar).await.unwrap();
        let others = disk.0.path().join("others");
        let mut failed = None;
        for number in 1..400 {
            if number == 20 {
                let free = rustix::fs::statvfs(disk.0.path()).unwrap();
                let rest = free.f_bavail * free.f_frsize;
                let size = rest.saturating_sub(free_bytes_min.max(150_000));
                fs::write(&others, vec![0; usize::try_from(size).unwrap()]).unwrap();
            }
            let (info, nar) = path(number, 50_000);
            if let Err(error) = fill(&cache, &info, &nar).await {
                failed = Some(error);
                break;
            }
        }
        assert!(failed.is_some(), "the disk never was full");
        wait("degraded state", || {
            _ = cache
                .begin(50_000)
                .map(|mut fill| fill.write(&[0; 500_000]));
            cache.stats().degraded.is_some()
        })
        .await;
        let cause = cache.stats().degraded.unwrap();
        let place = disk.0.path().display().to_string();
        assert!(cause.contains(&place), "it says where: {cause}");
        let record = cache.look_up(info.path.hash()).unwrap();
        assert_eq!(read(&cache, &record), Some(nar.clone()), "reads go on");
        assert!(matches!(cache.begin(1), Err(Error::Degraded(_))));

        fs::remove_file(&others).unwrap();
        wait("recovery", || {
            _ = cache.begin(1);
            cache.stats().degraded.is_none()
        })
        .await;
        let (late, late_nar) = path(1000, 50_000);
        fill(&cache, &late, &late_nar).await.unwrap();
        settle(&cache).await;
        let record = cache.look_up(info.path.hash()).unwrap();
        assert_eq!(read(&cache, &record), Some(nar));
        cache.stop().await;
        folder_is_whole(&dir);
    }
}

/// The default bound is larger than many a file system.
#[tokio::test]
async fn a_bound_larger_than_the_disk_costs_the_oldest_and_not_the_cache() {
    let disk = Disk::new("12m");
    let dir = disk.0.path().join("cache");
    let cache = DiskCache::open(&dir, options(1 << 30));
    let mut kept = 0;
    for number in 0..400 {
        let (info, nar) = path(number, 50_000);
        match fill(&cache, &info, &nar).await {
            Ok(_) => kept += 1,
            // There is no time to make room for it.
            Err(Error::Full) => sleep(Duration::from_millis(20)).await,
            Err(error) => panic!("{error}"),
        }
        assert_eq!(cache.stats().degraded, None, "after {number}");
    }
    cache.flush().await;
    let stats = cache.stats();
    assert!(kept > 200 && stats.evictions > 100, "{kept} {stats:?}");
    assert!(stats.bytes > 4 << 20, "no more goes than must: {stats:?}");
    let first = cache.look_up(path(0, 50_000).0.path.hash());
    assert!(first.is_none_or(|record| record.file.is_none()));
    cache.stop().await;
    folder_is_whole(&dir);

    // Full by what it has itself when it starts.
    let others = disk.0.path().join("others");
    let free = rustix::fs::statvfs(disk.0.path()).unwrap();
    let size = (free.f_bavail * free.f_frsize).saturating_sub(700_000);
    fs::write(&others, vec![0; usize::try_from(size).unwrap()]).unwrap();
    let cache = DiskCache::open(&dir, options(1 << 30));
    let (info, nar) = path(1000, 50_000);
    fill(&cache, &info, &nar).await.unwrap();
    let record = cache.look_up(info.path.hash()).unwrap();
    assert_eq!(read(&cache, &record), Some(nar));
    assert_eq!(cache.stats().degraded, None);
    cache.stop().await;
}

#[tokio::test]
async fn an_index_that_cannot_be_written_is_done_without_and_comes_back() {
    let disk = Disk::new("8m");
    let dir = disk.0.path().join("cache");
    let bounds = || muster::cache::disk::Options {
        free_bytes_min: 0,
        ..options(1 << 30)
    };
    let cache = DiskCache::open(&dir, bounds());
    let (info, nar) = path(0, 5000);
    fill(&cache, &info, &nar).await.unwrap();
    let others = disk.0.path().join("others");
    let mut file = fs::File::create(&others).unwrap();
    // Until the last byte, so that only the index has anything to write.
    while std::io::Write::write_all(&mut file, &[0; 4096]).is_ok() {}
    drop(file);
    for number in 1..5000 {
        cache.remember(look_up(&path(number, 10).0));
        if number % 500 == 0 {
            cache.flush().await;
        }
    }
    wait("degraded state", || cache.stats().degraded.is_some()).await;
    let cause = cache.stats().degraded.unwrap();
    assert!(cause.contains("index.redb"), "{cause}");
    let record = cache.look_up(info.path.hash()).unwrap();
    assert_eq!(read(&cache, &record), Some(nar.clone()), "reads go on");

    fs::remove_file(&others).unwrap();
    wait("recovery", || {
        _ = cache.begin(1);
        cache.stats().degraded.is_none()
    })
    .await;
    settle(&cache).await;
    let stats = cache.stats();
    assert_eq!(stats.entries, 1, "{stats:?}");
    let (late, late_nar) = path(9000, 5000);
    fill(&cache, &late, &late_nar).await.unwrap();
    let record = cache.look_up(info.path.hash()).unwrap();
    assert_eq!(read(&cache, &record), Some(nar));
    cache.stop().await;
    folder_is_whole(&dir);
}

#[tokio::test]
async fn a_read_only_folder_is_read() {
    let disk = Disk::new("16m");
    let dir = disk.0.path().join("cache");
    let cache = DiskCache::open(&dir, options(1 << 20));
    let (info, nar) = path(1, 2000);
    fill(&cache, &info, &nar).await.unwrap();
    cache.stop().await;
    drop(cache);
    disk.mount(&["-o", "remount,ro"]);
    let cache = DiskCache::open(&dir, options(1 << 20));
    let cause = cache.stats().degraded.unwrap();
    assert!(
        cause.contains("Read-only") && cause.contains("cache"),
        "{cause}"
    );
    let record = cache.look_up(info.path.hash()).unwrap();
    assert_eq!(read(&cache, &record), Some(nar.clone()));
    assert!(matches!(cache.begin(1), Err(Error::Degraded(_))));
    cache.remember(look_up(&path(2, 10).0));
    cache.forget(info.path.hash());
    cache.flush().await;

    disk.mount(&["-o", "remount,rw"]);
    wait("recovery", || {
        _ = cache.begin(1);
        cache.stats().degraded.is_none()
    })
    .await;
    let (other, other_nar) = path(3, 2000);
    fill(&cache, &other, &other_nar).await.unwrap();
    cache.stop().await;
}
