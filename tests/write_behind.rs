//! Small NARs that wait to be kept: not in a client's way, not lost, and had by others meanwhile.

mod support;

use std::io::Read as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _};
use muster::cache::backend::Backend;
use muster::cache::disk::{self, DiskCache};
use muster::cache::memory_backend::MemoryBackend;
use muster::codec::compression::Encoding;
use muster::nix::narinfo::NarInfo;
use muster::nix::path_info::{PathInfo, Trust};
use muster::nix::store_path::StoreDir;
use muster::substituter::nar_url::NarUrl;
use muster::substituter::transfer::{Extent, NarBody};
use muster::substituter::{Substituter, write_behind};
use support::*;
use tokio::time::sleep;

/// Never in a test's time.
const NEVER: Duration = Duration::from_secs(3600);

struct Scene {
    a: Arc<Scripted>,
    backend: Arc<dyn Backend>,
    substituter: Substituter,
    paths: Vec<(PathInfo, Bytes)>,
}

/// One builder with some small paths, in front of an empty cache.
fn scene(encoding: Encoding, options: write_behind::Options) -> Scene {
    scene_over(Arc::new(MemoryBackend::new(1 << 30)), encoding, options)
}

fn scene_over(
    backend: Arc<dyn Backend>,
    encoding: Encoding,
    options: write_behind::Options,
) -> Scene {
    let a = Scripted::new("a");
    let paths: Vec<_> = (0..20).map(|n| path(n, 20_000, &[])).collect();
    for (info, nar) in &paths {
        a.add(info, nar);
    }
    let mut all = support::options();
    all.write_behind = options;
    let setup = setup(std::slice::from_ref(&a), &Trust::Operator, encoding);
    Scene {
        a,
        substituter: Substituter::new(all, setup, Some(Arc::clone(&backend))),
        backend,
        paths,
    }
}

fn on_disk(dir: &Path) -> Arc<dyn Backend> {
    let keys = vec![key().public()];
    let options = disk::Options::new(1 << 30, StoreDir::default(), keys);
    Arc::new(DiskCache::open(dir, options))
}

impl Scene {
    /// Fetches a path as a client does; the decoded NAR.
    async fn fetch(&self, info: &PathInfo) -> Option<Bytes> {
        let text = self.substituter.narinfo(info.path.hash()).await?;
        let text = std::str::from_utf8(&text).unwrap();
        let narinfo = NarInfo::parse(text, &StoreDir::default()).unwrap();
        let url = NarUrl::parse(narinfo.url.strip_prefix("nar/").unwrap(), None).unwrap();
        let nar = self.substituter.nar(&url, Extent::Whole).await?;
        let bytes = match nar.body {
            NarBody::Whole(bytes) => bytes.to_vec(),
            NarBody::Checked { stream, .. } | NarBody::Stream(stream) => {
                let chunks: Vec<Bytes> = stream.try_collect().await.ok()?;
                chunks.concat()
            }
            NarBody::File(kept) => {
                let size = kept.nar.size_bytes;
                let chunks: Vec<_> = kept.read(0..size).collect().await;
                let chunks: Result<Vec<Bytes>, _> = chunks.into_iter().collect();
                chunks.ok()?.concat()
            }
        };
        let mut nar = Vec::new();
        match url.encoding {
            Encoding::None => nar = bytes,
            Encoding::Zstd => nar = zstd::decode_all(&bytes[..]).unwrap(),
            Encoding::Xz => {
                let mut decoder = liblzma::read::XzDecoder::new(&bytes[..]);
                decoder.read_to_end(&mut nar).unwrap();
            }
        }
        Some(nar.into())
    }

    fn kept(&self) -> u64 {
        self.backend.stats().entries
    }

    async fn kept_within(&self, count: u64, bound: Duration) -> bool {
        let begun = Instant::now();
        while self.kept() < count && begun.elapsed() < bound {
            sleep(Duration::from_millis(5)).await;
        }
        self.kept() >= count
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_is_had_with_every_builder_off_and_is_kept_at_the_stop() {
    for encoding in [Encoding::None, Encoding::Zstd, Encoding::Xz] {
        let dir = tempfile::tempdir().unwrap();
        let scene = scene_over(
            on_disk(dir.path()),
            encoding,
            write_behind::Options {
                pause: NEVER,
                patience: NEVER,
                ..Default::default()
            },
        );
        for (info, nar) in &scene.paths {
            assert_eq!(scene.fetch(info).await.unwrap(), *nar);
        }
        assert_eq!(
            (scene.kept(), scene.a.nars.load(Ordering::Relaxed)),
            (0, 20)
        );
        scene.a.down();
        for (info, nar) in &scene.paths {
            // Of the xz file nothing is held: it is the NAR that will be kept.
            if encoding != Encoding::Xz {
                assert_eq!(scene.fetch(info).await.unwrap(), *nar);
            }
        }
        assert_eq!(scene.a.nars.load(Ordering::Relaxed), 20);
        scene.substituter.stop().await;
        let hashes = scene.paths.iter().map(|(info, _)| info.path.hash());
        let backend = on_disk(dir.path());
        let records = hashes.filter_map(|hash| backend.look_up(hash)?.file);
        assert_eq!(records.count(), 20, "{encoding:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_kept_when_clients_pause() {
    let scene = scene(
        Encoding::Zstd,
        write_behind::Options {
            pause: Duration::from_millis(300),
            patience: NEVER,
            ..Default::default()
        },
    );
    let begun = Instant::now();
    let (first, nar) = &scene.paths[0];
    assert_eq!(scene.fetch(first).await.unwrap(), *nar);
    // As long as somebody asks for anything.
    let mut longest = Duration::ZERO;
    while begun.elapsed() < Duration::from_millis(800) {
        let asked = Instant::now();
        let _ = scene.substituter.narinfo(first.path.hash()).await;
        sleep(Duration::from_millis(1)).await;
        longest = longest.max(asked.elapsed());
    }
    assert!(scene.kept() == 0 || longest > Duration::from_millis(150));
    assert!(scene.kept_within(1, Duration::from_secs(10)).await);
    // And again, when it had nothing to do in between.
    for (info, nar) in &scene.paths[1..] {
        assert_eq!(scene.fetch(info).await.unwrap(), *nar);
    }
    assert!(scene.kept_within(20, Duration::from_secs(10)).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_kept_in_time_though_clients_never_pause() {
    let patience = Duration::from_millis(600);
    let scene = scene(
        Encoding::Zstd,
        write_behind::Options {
            pause: Duration::from_millis(200),
            patience,
            ..Default::default()
        },
    );
    let (first, nar) = &scene.paths[0];
    let begun = Instant::now();
    assert_eq!(scene.fetch(first).await.unwrap(), *nar);
    let mut longest = Duration::ZERO;
    while scene.kept() == 0 && begun.elapsed() < Duration::from_secs(10) {
        let asked = Instant::now();
        let _ = scene.substituter.narinfo(first.path.hash()).await;
        sleep(Duration::from_millis(1)).await;
        longest = longest.max(asked.elapsed());
    }
    assert_eq!(scene.kept(), 1);
    // A pause of ours, on a busy machine, is one.
    assert!(begun.elapsed() >= patience || longest > Duration::from_millis(100));
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_waits_than_there_is_room_for() {
    // Random bytes do not compress: 20 KiB and some each.
    let options = |kib_max| write_behind::Options {
        kib_max,
        pause: NEVER,
        patience: NEVER,
    };
    let waits = scene(Encoding::None, options(1000));
    for (info, _) in &waits.paths {
        waits.fetch(info).await.unwrap();
    }
    sleep(Duration::from_millis(200)).await;
    assert_eq!(waits.kept(), 0, "400 of 1000 KiB");
    let half_full = scene(Encoding::None, options(600));
    for (info, _) in &half_full.paths {
        half_full.fetch(info).await.unwrap();
    }
    assert!(half_full.kept_within(15, Duration::from_secs(10)).await);
    let too_small = scene(Encoding::None, options(10));
    for (info, nar) in &too_small.paths {
        assert_eq!(too_small.fetch(info).await.unwrap(), *nar);
    }
    too_small.substituter.stop().await;
    assert_eq!(too_small.kept(), 0);
}
