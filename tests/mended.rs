//! Sources that lie about a large NAR: what is wrong in its last bytes is mended by the next holder and the client
//! sees one whole response; what is wrong before them is cut, once.

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use muster::cache::backend::Backend;
use muster::cache::memory_backend::MemoryBackend;
use muster::codec::compression::Encoding;
use muster::codec::decompress::Decoder;
use muster::nix::narinfo::Compression;
use muster::nix::path_info::{PathInfo, Trust};
use muster::substituter::Substituter;
use support::NarScript::{BreakAt, FlipAt, FlipAtBreakAt, FlipLast, Long, StallAt, Whole};
use support::*;

const BYTES: usize = (6 << 20) + 4321;

/// The first byte that is held back.
const TAIL: usize = BYTES - (1 << 20);

/// The machine may be busy: nothing stalls that is not told to.
const STALL: Duration = Duration::from_secs(4);

/// All lies that cost the client nothing.
const MENDED: [NarScript; 5] = [
    FlipLast,
    FlipAt(BYTES - 700_000),
    FlipAt(TAIL),
    Long,
    FlipAtBreakAt(BYTES - 300_000, BYTES - 100_000),
];

/// One path at several holders, asked one after the other.
struct Case {
    info: PathInfo,
    nar: Bytes,
    holders: Vec<Arc<Scripted>>,
    backend: Option<Arc<dyn Backend>>,
}

/// What one substituter did with it.
struct Run {
    substituter: Substituter,
    served: Served,
    target: String,
}

impl Case {
    fn new(scripts: &[NarScript]) -> Self {
        let (info, nar) = path(1, BYTES, &[]);
        let holders = scripts.iter().enumerate().map(|(number, script)| {
            let holder = Scripted::new(&format!("holder-{number}"));
            holder.add(&info, &nar);
            // The first is known first, and so on.
            *holder.delay.lock().unwrap() = Duration::from_millis(40 * number as u64);
            *holder.nar_script.lock().unwrap() = script.clone();
            holder
        });
        let holders = holders.collect();
        Self {
            info,
            nar,
            holders,
            backend: keeps().then(memory),
        }
    }

    async fn run(&self, encoding: Encoding) -> Run {
        let hash = self.info.path.hash();
        let mut options = options();
        options.transfer.stall = STALL;
        options.transfer.stall_last = STALL * 2;
        let setup = setup(&self.holders, &Trust::Operator, encoding);
        let substituter = Substituter::new(options, setup, self.backend.clone());
        assert!(substituter.narinfo(hash).await.is_some());
        // Late answers are further holders.
        let late = Duration::from_millis(40 * self.holders.len() as u64 + 60);
        tokio::time::sleep(late).await;
        let served = serve(substituter.clone()).await;
        let narinfo = get(served.address, &format!("/{hash}.narinfo")).await;
        Run {
            substituter,
            target: nar_target(&narinfo),
            served,
        }
    }

    fn nars(&self) -> Vec<usize> {
        let nars = |holder: &Arc<Scripted>| holder.nars.load(Ordering::Relaxed);
        self.holders.iter().map(nars).collect()
    }
}

impl Run {
    async fn get(&self) -> Answer {
        get(self.served.address, &self.target).await
    }

    /// The whole NAR, or what is wrong.
    async fn nar(&self, encoding: Encoding) -> Result<Vec<u8>, Answer> {
        let answer = self.get().await;
        if answer.status != 200 || answer.cut {
            return Err(answer);
        }
        Ok(match encoding {
            Encoding::None => answer.body,
            Encoding::Zstd => zstd::decode_all(&answer.body[..]).unwrap(),
            Encoding::Xz => unxz(answer.body).await,
        })
    }

    /// NARs that went on, that were cut, and that were wrong.
    fn counted(&self) -> (u64, u64, u64) {
        let counters = self.substituter.counters();
        (
            counters.nar_resumed.value(),
            counters.nar_cut.value(),
            counters.nar_corrupt.value(),
        )
    }

    fn refused(&self) -> Vec<u64> {
        let setup = self.substituter.setup();
        let refused = setup
            .members
            .iter()
            .map(|m| m.refused.load(Ordering::Relaxed));
        refused.collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lie_in_the_last_bytes_is_mended_by_the_next_holder() {
    for encoding in [Encoding::None, Encoding::Zstd, Encoding::Xz] {
        for script in MENDED {
            let what = format!("{script:?}, {encoding:?}");
            let breaks = matches!(script, FlipAtBreakAt(..));
            let case = Case::new(&[script, Whole]);
            let run = case.run(encoding).await;
            assert!(run.nar(encoding).await.unwrap() == case.nar, "{what}");
            // One that breaks after its lie is not known to have lied: nobody got it.
            let lies = u64::from(!breaks);
            assert_eq!(run.counted(), (1, 0, lies), "{what}");
            assert_eq!(run.refused(), [lies, 0], "{what}");
            assert_eq!(case.nars(), [1, 1], "{what}");
            assert!(run.nar(encoding).await.unwrap() == case.nar, "{what}");
            if !breaks {
                assert_eq!(case.nars()[0], 1, "{what}: the liar is not asked again");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lie_before_them_is_cut_once_and_the_next_request_is_whole() {
    for encoding in [Encoding::None, Encoding::Zstd] {
        for place in [0, 3 << 20, (5 << 20) + 10, TAIL - 1] {
            let what = format!("{place}, {encoding:?}");
            let case = Case::new(&[FlipAt(place), Whole]);
            let run = case.run(encoding).await;
            let cut = run.nar(encoding).await.unwrap_err();
            assert_eq!((cut.status, cut.cut), (200, true), "{what}");
            assert_eq!(
                run.refused(),
                [1, 0],
                "{what}: the honest one is not blamed"
            );
            let (_, cut, lies) = run.counted();
            assert_eq!((cut, lies), (1, 1), "{what}");
            assert!(run.nar(encoding).await.unwrap() == case.nar, "{what}");
            assert_eq!(case.nars()[0], 1, "{what}: the liar is not asked again");
            assert_eq!(run.counted().1, 1, "{what}: cut once");
        }
    }
}

/// It need not be read to its end to be cut.
#[tokio::test(flavor = "multi_thread")]
async fn a_lie_at_the_beginning_is_seen_at_the_next_mib_of_another() {
    let case = Case::new(&[FlipAt(0), StallAt((1 << 20) + (64 << 10))]);
    let run = case.run(Encoding::None).await;
    let begun = std::time::Instant::now();
    let cut = run.nar(Encoding::None).await.unwrap_err();
    assert!(cut.cut && begun.elapsed() < STALL, "{:?}", begun.elapsed());
    assert_eq!((run.refused(), case.nars()), (vec![1, 0], vec![1, 1]));
}

#[tokio::test(flavor = "multi_thread")]
async fn as_long_as_another_is_left_it_mends() {
    // Whoever gave other first bytes is found out by whom all agree with in the end.
    let rows: [(&[NarScript], &[u64]); 6] = [
        (&[FlipLast, FlipLast, Whole], &[1, 1, 0]),
        (&[FlipLast, FlipAt(0), Whole], &[1, 1, 0]),
        (&[FlipLast, FlipAt(TAIL - 1), Whole], &[1, 1, 0]),
        (&[FlipLast, BreakAt(3 << 20), Whole], &[1, 0, 0]),
        (&[FlipLast, StallAt(BYTES - 1000), Whole], &[1, 0, 0]),
        (
            &[BreakAt(2 << 20), Long, FlipAt(BYTES - 9), Whole],
            &[0, 1, 1, 0],
        ),
    ];
    for (scripts, refused) in rows {
        for encoding in [Encoding::None, Encoding::Zstd] {
            let what = format!("{scripts:?}, {encoding:?}");
            let case = Case::new(scripts);
            let run = case.run(encoding).await;
            assert!(run.nar(encoding).await.unwrap() == case.nar, "{what}");
            assert_eq!(run.refused(), refused, "{what}");
            let counted = run.counted();
            assert_eq!((counted.1, counted.2), (0, refused.iter().sum()), "{what}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn when_none_is_left_it_is_cut_and_every_liar_is_blamed() {
    let rows: [(&[NarScript], &[u64]); 5] = [
        (&[FlipLast], &[1]),
        (&[Long], &[1]),
        (&[FlipLast, Long, FlipAt(TAIL)], &[1, 1, 1]),
        (&[FlipLast, BreakAt(4 << 20)], &[1, 0]),
        // Nobody knows whose beginning is right.
        (&[FlipLast, FlipAt(0)], &[1, 0]),
    ];
    for (scripts, refused) in rows {
        let case = Case::new(scripts);
        let run = case.run(Encoding::None).await;
        let cut = run.nar(Encoding::None).await.unwrap_err();
        assert!(cut.cut && cut.body.len() <= TAIL, "{scripts:?}");
        assert!(cut.body == case.nar[..cut.body.len()], "{scripts:?}");
        assert_eq!(run.refused(), refused, "{scripts:?}");
        assert_eq!(run.counted().1, 1, "{scripts:?}");
    }
}

/// One that has checked its NAR itself and breaks with its lie held back is mended as one that broke.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_checked_one_gave_wrongly_at_its_end_before_it_broke_is_given_anew() {
    let wrong = FlipAtBreakAt(BYTES - 300_000, BYTES - 100_000);
    for encoding in [Encoding::None, Encoding::Zstd] {
        let case = Case::new(&[wrong.clone(), Whole]);
        case.holders[0].vouches.store(true, Ordering::Relaxed);
        let run = case.run(encoding).await;
        assert!(run.nar(encoding).await.unwrap() == case.nar);
        assert_eq!(run.counted(), (1, 0, 0));
        // And so is the end of who takes over from it.
        let case = Case::new(&[BreakAt(5 << 20), FlipLast, Whole]);
        case.holders[0].vouches.store(true, Ordering::Relaxed);
        let run = case.run(encoding).await;
        assert!(run.nar(encoding).await.unwrap() == case.nar);
        assert_eq!(run.refused(), [0, 1, 0]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_kept_is_the_mended_nar_and_nothing_wrong() {
    for script in MENDED {
        let mut case = Case::new(&[script.clone(), Whole]);
        case.backend = Some(memory());
        let run = case.run(Encoding::Zstd).await;
        assert!(
            run.nar(Encoding::Zstd).await.unwrap() == case.nar,
            "{script:?}"
        );
        let again = kept(&run, &case).await;
        assert!(
            zstd::decode_all(&again.body[..]).unwrap() == case.nar,
            "{script:?}"
        );
        assert_eq!(case.nars(), [1, 1], "{script:?}: out of the cache");
    }
    for scripts in [
        &[FlipAt(0), FlipAt(0)][..],
        &[FlipLast],
        &[Long, BreakAt(5 << 20)],
    ] {
        let mut case = Case::new(scripts);
        let backend = memory();
        case.backend = Some(Arc::clone(&backend));
        let run = case.run(Encoding::None).await;
        assert!(run.nar(Encoding::None).await.is_err(), "{scripts:?}");
        run.substituter.stop().await;
        let stats = backend.stats();
        assert_eq!((stats.entries, stats.bytes_reserved), (0, 0), "{scripts:?}");
    }
}

/// Waits until the NAR is kept, and returns what is served of it then.
async fn kept(run: &Run, case: &Case) -> Answer {
    let narinfo = format!("/{}.narinfo", case.info.path.hash());
    for _ in 0..200 {
        let narinfo = get(run.served.address, &narinfo).await;
        if narinfo.text().contains("FileHash") {
            return get(run.served.address, &nar_target(&narinfo)).await;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("it is not kept");
}

fn memory() -> Arc<dyn Backend> {
    Arc::new(MemoryBackend::new(1 << 30))
}

async fn unxz(file: Vec<u8>) -> Vec<u8> {
    use futures_util::{StreamExt as _, TryStreamExt as _, stream};
    let file = stream::iter([Ok::<_, std::io::Error>(Bytes::from(file))]).boxed();
    let nar = Decoder::new(1)
        .decode_stream(Compression::Xz, file)
        .unwrap();
    let nar: Vec<Bytes> = nar.try_collect().await.unwrap();
    nar.concat()
}
