//! NARs that pass as their upstreams have compressed them: the same bytes to the client and into the cache, over
//! breaks and stalls, and never the whole of a wrong one.

mod cache_server;
mod support;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use cache_server::{Asking, CacheServer, Fault, compress, info_of};
use muster::cache::backend::Backend;
use muster::cache::memory::UpstreamId;
use muster::cache::memory_backend::MemoryBackend;
use muster::codec::compression::Encoding;
use muster::nix::hash::{Algorithm, Hash, NarHash};
use muster::nix::narinfo::{Compression, NarInfo};
use muster::nix::path_info::{PathInfo, Trust};
use muster::nix::store_path::StoreDir;
use muster::substituter::counters::Counters;
use muster::substituter::member::Member;
use muster::substituter::publish::Publisher;
use muster::substituter::{Setup, Substituter, health};
use muster::upstream::Upstream;
use support::{Answer, Scripted, Served, get, key, nar_target, options, request, serve};
use tokio::time::{sleep, timeout};

/// Small, and larger than what is read whole before the first byte.
const SIZES: [usize; 2] = [100_000, 6 << 20];
const LARGE: usize = SIZES[1];

fn noise(size: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(size as u64);
    let mut noise = vec![0; size];
    for block in noise.chunks_mut(1000).step_by(2) {
        random.fill(block);
    }
    noise
}

/// Several frames, at a level that we do not use: nobody would make this file by chance.
fn file_of(nar: &[u8]) -> Vec<u8> {
    let (one, two) = nar.split_at(nar.len() / 3);
    let frame = |part: &[u8]| zstd::encode_all(part, 1).unwrap();
    [frame(one), frame(two)].concat()
}

/// One path in binary caches, and a substituter over them.
struct Case {
    info: PathInfo,
    nar: Vec<u8>,
    file: Vec<u8>,
    target: String,
    servers: Vec<CacheServer>,
}

/// How much a narinfo says of the file.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Says {
    All,
    Nothing,
}

impl Case {
    fn new(size: usize, servers: usize, says: Says) -> Self {
        let nar = noise(size);
        let (info, file) = (info_of("path", &nar), file_of(&nar));
        let case = Self {
            info,
            target: "/nar/file.nar.zst".to_owned(),
            nar,
            servers: (0..servers).map(|_| CacheServer::new()).collect(),
            file,
        };
        for server in &case.servers {
            server.put(&case.target, case.file.clone());
            let all = says == Says::All;
            let hash = NarHash::of(&case.file).0;
            let size = case.file.len() as u64;
            case.say(server, all.then_some(hash), all.then_some(size));
        }
        case
    }

    fn say(&self, server: &CacheServer, file_hash: Option<[u8; 32]>, file_size: Option<u64>) {
        server.put_narinfo(&NarInfo {
            info: self.info.clone(),
            url: self.target.trim_start_matches('/').to_owned(),
            compression: Compression::Zstd,
            file_hash: file_hash.and_then(|hash| Hash::new(Algorithm::Sha256, &hash)),
            file_size,
        });
    }

    /// Has another body sent for the file.
    fn send(&self, body: &[u8]) {
        for server in &self.servers {
            server.put(&self.target, body);
        }
    }

    async fn over(&self, encoding: Encoding, cache: Option<Arc<dyn Backend>>) -> Running {
        let mut upstreams: Vec<Arc<dyn Upstream>> = Vec::new();
        for server in &self.servers {
            upstreams.push(Arc::new(Asking::at(&server.url()).start()));
        }
        Running::over(&self.info, upstreams, encoding, cache).await
    }

    /// The path is found at the first server alone, so that it gives the first bytes.
    async fn over_first(&self, cache: Option<Arc<dyn Backend>>) -> Running {
        let narinfo = format!("/{}.narinfo", self.info.path.hash());
        for server in &self.servers[1..] {
            server.fault(&narinfo, Some(Fault::Status(404, "X: y")));
        }
        let run = self.over(Encoding::Zstd, cache).await;
        for server in &self.servers[1..] {
            server.fault(&narinfo, None);
        }
        run
    }

    /// Runs over each kind of cache and none.
    async fn runs(&self) -> [Running; 2] {
        [
            self.over(Encoding::Zstd, None).await,
            self.over(Encoding::Zstd, Some(memory())).await,
        ]
    }

    fn ranges(&self, server: usize) -> Vec<String> {
        let asked = self.servers[server].asked();
        let ours = asked.into_iter().filter(|a| a.target == self.target);
        ours.filter_map(|asked| asked.headers.get("range").cloned())
            .collect()
    }
}

fn memory() -> Arc<dyn Backend> {
    Arc::new(MemoryBackend::new(1 << 30))
}

struct Running {
    substituter: Substituter,
    served: Served,
    narinfo: String,
    target: String,
    kept: Option<Arc<dyn Backend>>,
    info: PathInfo,
}

impl Running {
    async fn over(
        info: &PathInfo,
        upstreams: Vec<Arc<dyn Upstream>>,
        encoding: Encoding,
        kept: Option<Arc<dyn Backend>>,
    ) -> Self {
        let now = tokio::time::Instant::now().into_std();
        let members = upstreams.into_iter().enumerate().map(|(number, upstream)| {
            let id = UpstreamId(u16::try_from(number).unwrap());
            let options = health::Options::default();
            Arc::new(Member::new(id, upstream, Trust::Operator, options, now))
        });
        let setup = Setup {
            members: members.collect(),
            publisher: Publisher {
                keys: vec![key()],
                store_dir: StoreDir::default(),
                encoding,
            },
        };
        let mut options = options();
        // The machine may be busy: nothing stalls that is not told to.
        options.transfer.stall = Duration::from_secs(2);
        options.transfer.stall_last = Duration::from_secs(8);
        let substituter = Substituter::new(options, setup, kept.clone());
        let served = serve(substituter.clone()).await;
        let narinfo = format!("/{}.narinfo", info.path.hash());
        let found = get(served.address, &narinfo).await;
        assert_eq!(found.status, 200);
        // Late answers come in.
        sleep(Duration::from_millis(100)).await;
        Self {
            target: nar_target(&found),
            narinfo,
            substituter,
            served,
            kept,
            info: info.clone(),
        }
    }

    fn address(&self) -> SocketAddr {
        self.served.address
    }

    fn counters(&self) -> &Counters {
        self.substituter.counters()
    }

    async fn get(&self) -> Answer {
        let answer = timeout(Duration::from_secs(20), get(self.address(), &self.target));
        answer.await.expect("an end")
    }

    /// The file that is kept, once it is.
    async fn kept_file(&self) -> Option<Vec<u8>> {
        self.kept.as_ref()?;
        for _ in 0..1000 {
            let text = get(self.address(), &self.narinfo).await;
            let is_file = text.text().contains("Compression: zstd");
            if is_file && text.text().contains("FileHash: ") {
                return Some(get(self.address(), &nar_target(&text)).await.body);
            }
            sleep(Duration::from_millis(5)).await;
        }
        panic!("it is not kept");
    }

    async fn keeps_nothing(&self) {
        sleep(Duration::from_millis(200)).await;
        let Some(kept) = &self.kept else { return };
        let record = kept.look_up(self.info.path.hash());
        assert!(record.is_none_or(|record| record.file.is_none()));
        assert_eq!(kept.stats().entries, 0);
    }

    /// Asserts that the client gets the upstream's own file, and that it is what is kept.
    async fn passes(&self, file: &[u8], what: &str) {
        let answer = self.get().await;
        assert_eq!(answer.status, 200, "{what}");
        assert!(!answer.cut && answer.body == file, "{what}");
        assert_eq!(self.counters().nar_passed.value(), 1, "{what}");
        assert_eq!(self.counters().nar_encoded.value(), 0, "{what}");
        if let Some(kept) = self.kept_file().await {
            assert!(kept == file, "{what}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn client_and_cache_get_the_file_that_the_upstream_has() {
    for size in SIZES {
        for says in [Says::All, Says::Nothing] {
            let case = Case::new(size, 1, says);
            for run in case.runs().await {
                run.passes(&case.file, &format!("{size} {says:?}")).await;
            }
            let run = case.over(Encoding::Zstd, Some(memory())).await;
            run.passes(&case.file, "kept").await;
            let hash = Hash::new(Algorithm::Sha256, &NarHash::of(&case.file).0).unwrap();
            let narinfo = get(run.address(), &run.narinfo).await;
            let (hash, size) = (
                format!("FileHash: {hash}\n"),
                format!("FileSize: {}\n", case.file.len()),
            );
            assert!(narinfo.text().contains(&hash) && narinfo.text().contains(&size));
            let plain = run.target.replace(".nar.zst", ".nar");
            assert!(get(run.address(), &plain).await.body == case.nar);
            let (named, part) = (nar_target(&narinfo), "Range: bytes=7-\r\n");
            let part = request(run.address(), "GET", &named, part).await;
            assert!(part.status == 206 && part.body == case.file[7..]);
            let asked = case.servers[0].times_asked(&case.target);
            assert_eq!(asked, 3, "once by each run");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_breaks_goes_on_by_range_at_the_same_place() {
    for says in [Says::All, Says::Nothing] {
        let case = Case::new(LARGE, 1, says);
        for run in case.runs().await {
            let before = case.ranges(0).len();
            case.servers[0].fault_once(&case.target, Fault::Cut(1_000_000));
            run.passes(&case.file, "cut").await;
            assert_eq!(case.ranges(0)[before..], ["bytes=1000000-"]);
            assert_eq!(run.counters().nar_resumed.value(), 0, "nobody else had it");
        }
        for run in case.runs().await {
            case.servers[0].fault_once(&case.target, Fault::Stall(1_000_000));
            run.passes(&case.file, "stalled").await;
        }
        let each = case.file.len() / 7 + 1;
        case.servers[0].fault(&case.target, Some(Fault::Portion(each)));
        for run in case.runs().await {
            let before = case.ranges(0).len();
            run.passes(&case.file, "in portions").await;
            let last = format!("bytes={}-", 6 * each);
            let ranges = &case.ranges(0)[before..];
            assert_eq!(ranges.len(), 6);
            assert_eq!(ranges[5], last);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_knows_no_range_is_skipped_to_the_byte() {
    let case = Case::new(LARGE, 1, Says::All);
    case.servers[0].fault(&case.target, Some(Fault::NoRange));
    for run in case.runs().await {
        case.servers[0].fault_once(&case.target, Fault::Cut(1_000_000));
        run.passes(&case.file, "the whole again").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_holder_of_the_same_file_goes_on() {
    let gone = [
        Fault::Status(404, "X: y"),
        Fault::Status(500, "X: y"),
        Fault::Reset,
        Fault::Silent,
        Fault::Cut(10),
        Fault::Body(b"short".to_vec(), "X: y"),
        Fault::Body(vec![0; 9], "Content-Encoding: gzip"),
    ];
    for gone in gone {
        let case = Case::new(LARGE, 2, Says::All);
        for run in case.runs().await {
            // Whichever is asked first: no holder gives all of it.
            let (first, second) = (&case.servers[0], &case.servers[1]);
            for server in [first, second] {
                server.fault_once(&case.target, Fault::Cut(1_000_000));
            }
            first.fault(&case.target, Some(gone.clone()));
            run.passes(&case.file, &format!("{gone:?}")).await;
            second.fault(&case.target, None);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_any_holder_it_is_cut_and_not_kept() {
    let case = Case::new(LARGE, 2, Says::All);
    for run in case.runs().await {
        for server in &case.servers {
            server.fault_once(&case.target, Fault::Cut(1_000_000));
            server.fault(&case.target, Some(Fault::Reset));
        }
        let answer = run.get().await;
        assert!(answer.cut && answer.body == case.file[..answer.body.len()]);
        assert!(zstd::decode_all(&answer.body[..]).is_err());
        run.keeps_nothing().await;
        for server in &case.servers {
            server.fault(&case.target, None);
        }
        assert!(run.get().await.body == case.file, "the next request");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lying_file_is_never_given_whole_nor_kept() {
    for size in SIZES {
        let case = Case::new(size, 1, Says::All);
        let mut other = case.nar.clone();
        for place in [0, size - 1] {
            other[place] ^= 1;
            let lie = file_of(&other);
            let padded = [lie.clone(), zstd::encode_all(&b""[..], 1).unwrap()].concat();
            let long = file_of(&[&*case.nar, b"more"].concat());
            let short = file_of(&case.nar[..size - 1]);
            let bomb = zstd::encode_all(&vec![0; 20 * size][..], 1).unwrap();
            for body in [lie, padded, long, short, bomb] {
                case.send(&body);
                let (hash, length) = (NarHash::of(&body).0, body.len() as u64);
                case.say(&case.servers[0], Some(hash), Some(length));
                for run in case.runs().await {
                    let answer = run.get().await;
                    assert!(answer.status == 404 || answer.cut, "{}", answer.head);
                    let given = zstd::decode_all(&answer.body[..]);
                    assert!(answer.body.is_empty() || given.is_err());
                    run.keeps_nothing().await;
                }
            }
        }
    }
}

/// Two servers have the same file by their word, and the first to be asked sends another.
async fn mends(case: &Case, lie: &[u8], what: &str) -> bool {
    let mut mended = 0;
    case.servers[0].put(&case.target, lie);
    for cache in [None, Some(memory())] {
        let run = case.over_first(cache).await;
        let answer = run.get().await;
        assert_eq!(run.counters().nar_corrupt.value(), 1, "{what}");
        assert_eq!(
            run.counters().nar_cut.value(),
            u64::from(answer.cut),
            "{what}"
        );
        assert_eq!(run.counters().nar_passed.value(), 1, "{what}");
        if answer.cut {
            assert!(zstd::decode_all(&answer.body[..]).is_err(), "{what}");
            run.keeps_nothing().await;
        } else {
            assert!(answer.status == 200 && answer.body == case.file, "{what}");
            assert_eq!(run.counters().nar_resumed.value(), 1, "{what}");
            mended += 1;
            if let Some(kept) = run.kept_file().await {
                assert!(kept == case.file, "{what}");
            }
        }
        // Who sent a wrong file is decoded the next time, as the NAR in it may be right; if it is not, for the last time.
        let is_found_out = zstd::decode_all(lie).is_ok_and(|nar| nar != case.nar);
        for asked_at_most in [1, usize::from(!is_found_out)] {
            let before = case.servers[0].times_asked(&case.target);
            let next = run.get().await;
            let nar = zstd::decode_all(&next.body[..]);
            assert!(!next.cut && nar.unwrap() == case.nar, "{what}");
            let asked = case.servers[0].times_asked(&case.target) - before;
            assert!(asked <= asked_at_most, "{what}");
        }
    }
    assert!(mended == 0 || mended == 2, "{what}");
    mended > 0
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_wrong_at_its_end_is_mended_by_another_holder_of_it() {
    let case = Case::new(LARGE, 2, Says::All);
    let changed = |place: usize| {
        let mut other = case.nar.clone();
        other[place] ^= 1;
        file_of(&other)
    };
    let mut damaged = case.file.clone();
    *damaged.last_mut().unwrap() ^= 1;
    let padding = zstd::encode_all(&b""[..], 1).unwrap();
    let lies = [
        ("the last byte", changed(LARGE - 1)),
        ("a byte near the end", changed(LARGE - 800_000)),
        ("too long a NAR", file_of(&[&*case.nar, b"x"].concat())),
        ("a damaged file", damaged),
        ("another frame behind it", [&*case.file, &*padding].concat()),
    ];
    for (what, lie) in &lies {
        assert!(mends(&case, lie, what).await, "{what}");
    }
    assert!(!mends(&case, &changed(0), "the first byte").await);
}

#[tokio::test(flavor = "multi_thread")]
async fn as_long_as_a_holder_of_the_file_is_left_it_mends() {
    let case = Case::new(LARGE, 3, Says::All);
    for place in [0, LARGE - 9] {
        let mut other = case.nar.clone();
        other[place] ^= 1;
        let second = file_of(&other);
        other = case.nar.clone();
        other[LARGE - 1] ^= 1;
        case.servers[0].put(&case.target, file_of(&other));
        case.servers[1].put(&case.target, second);
        for cache in [None, Some(memory())] {
            let run = case.over_first(cache).await;
            run.passes(&case.file, "mended").await;
            let lies = run.counters().nar_corrupt.value();
            assert!(lies == 1 || (lies == 2 && place > 0), "{lies}");
        }
    }
    // With none left, it is cut.
    case.servers[2].put(&case.target, file_of(&case.nar[..LARGE - 1]));
    for cache in [None, Some(memory())] {
        let run = case.over_first(cache).await;
        let answer = run.get().await;
        assert!(answer.cut && zstd::decode_all(&answer.body[..]).is_err());
        run.keeps_nothing().await;
    }
}

/// Nobody gave a byte of it, and yet it is somebody's.
#[tokio::test(flavor = "multi_thread")]
async fn an_empty_file_is_asked_for_once() {
    let case = Case::new(LARGE, 2, Says::All);
    let (empty, hash) = (&case.servers[0], NarHash::of(&case.file).0);
    empty.put(&case.target, "");
    case.say(empty, Some(hash), Some(0));
    for cache in [None, Some(memory())] {
        let before = empty.times_asked(&case.target);
        let run = case.over_first(cache).await;
        run.passes(&case.file, "the other's").await;
        assert_eq!(empty.times_asked(&case.target), before + 1);
        assert_eq!(run.counters().nar_corrupt.value(), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_has_told_the_truth_is_taken_after_a_lie() {
    let case = Case::new(LARGE, 2, Says::All);
    let mut other = case.nar.clone();
    other[0] ^= 1;
    let lie = file_of(&other);
    case.servers[0].put(&case.target, lie);
    for run in case.runs().await {
        for _ in 0..3 {
            let answer = run.get().await;
            let right = zstd::decode_all(&answer.body[..]).is_ok_and(|nar| nar == case.nar);
            assert_eq!(right, !answer.cut);
        }
        let answer = run.get().await;
        assert!(!answer.cut && zstd::decode_all(&answer.body[..]).unwrap() == case.nar);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_with_another_hash_or_size_than_said_is_decoded_the_next_time() {
    for size in SIZES {
        let case = Case::new(size, 1, Says::All);
        let (hash, length) = (NarHash::of(&case.file).0, case.file.len() as u64);
        let said = [
            (Some(NarHash::of(b"another").0), Some(length)),
            (Some(NarHash::of(b"another").0), None),
            (Some(hash), Some(length - 1)),
            (None, Some(length + 1)),
        ];
        for (file_hash, file_size) in said {
            case.say(&case.servers[0], file_hash, file_size);
            for run in case.runs().await {
                let first = run.get().await;
                if size == LARGE {
                    assert!(first.cut && zstd::decode_all(&first.body[..]).is_err());
                    run.keeps_nothing().await;
                }
                let next = run.get().await;
                assert!(!next.cut && next.body != case.file);
                assert!(zstd::decode_all(&next.body[..]).unwrap() == case.nar);
                assert_eq!(run.counters().nar_corrupt.value(), 1);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_must_not_pass_is_encoded_here() {
    for size in SIZES {
        // Another known holder has it as another file, or not as a file; or it is wanted otherwise.
        let case = Case::new(size, 2, Says::All);
        let other = compress(Compression::Zstd, &case.nar);
        case.servers[1].put(&case.target, other.clone());
        case.say(&case.servers[1], Some(NarHash::of(&other).0), None);
        let builder = Scripted::new("builder");
        builder.add(&case.info, &case.nar.clone().into());
        let unnamed = Case::new(size, 2, Says::Nothing);
        let cache = |case: &Case| -> Arc<dyn Upstream> {
            Arc::new(Asking::at(&case.servers[0].url()).start())
        };
        let of_xz = CacheServer::new();
        let (xz_info, _) = of_xz.add("path", &case.nar, Compression::Xz);
        assert_eq!(xz_info.path, case.info.path);
        let xz: Arc<dyn Upstream> = Arc::new(Asking::at(&of_xz.url()).start());
        let zstd = Encoding::Zstd;
        let runs = [
            ("two files", case.over(zstd, Some(memory())).await),
            ("no hashes", unnamed.over(zstd, Some(memory())).await),
            (
                "a builder",
                Running::over(
                    &case.info,
                    vec![cache(&case), builder],
                    zstd,
                    Some(memory()),
                )
                .await,
            ),
            (
                "xz",
                Running::over(&case.info, vec![xz], zstd, Some(memory())).await,
            ),
            ("none", case.over(Encoding::None, Some(memory())).await),
        ];
        for (what, run) in runs {
            let answer = run.get().await;
            assert!(!answer.cut, "{what}");
            if run.target.ends_with(".zst") {
                assert!(answer.body != case.file && answer.body != other, "{what}");
                let nar = zstd::decode_all(&answer.body[..]).unwrap();
                assert!(nar == case.nar, "{what}");
            } else {
                assert!(answer.body == case.nar, "{what}");
            }
            assert_eq!(run.counters().nar_passed.value(), 0, "{what}");
            run.kept_file().await;
            assert_eq!(run.counters().nar_encoded.value(), 1, "{what}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_of_xz_that_breaks_once_is_asked_once_more() {
    for size in SIZES {
        let (server, nar) = (CacheServer::new(), noise(size));
        let (info, target) = server.add("path", &nar, Compression::Xz);
        let half = server.file(&target).len() / 2;
        for encoding in [Encoding::None, Encoding::Zstd] {
            for fault in [Fault::Reset, Fault::Cut(half), Fault::CutChunked(half)] {
                let cache: Arc<dyn Upstream> = Arc::new(Asking::at(&server.url()).start());
                let run = Running::over(&info, vec![cache], encoding, None).await;
                let before = server.times_asked(&target);
                server.fault_once(&target, fault.clone());
                let answer = run.get().await;
                assert_eq!((answer.status, answer.cut), (200, false), "{fault:?}");
                let body = match run.target.ends_with(".zst") {
                    true => zstd::decode_all(&answer.body[..]).unwrap(),
                    false => answer.body,
                };
                assert!(body == nar, "{fault:?}");
                assert_eq!(server.times_asked(&target) - before, 2, "{fault:?}");
            }
        }
    }
}

/// It has cost its client half a minute already, and would do so again.
#[tokio::test(flavor = "multi_thread")]
async fn a_last_holder_that_drips_is_not_asked_once_more() {
    // A file that does not pass is tried to be decoded, as it may have been the file alone.
    for (compression, encoding, tries) in [
        (Compression::Xz, Encoding::None, 1),
        (Compression::Zstd, Encoding::Zstd, 2),
    ] {
        let (server, nar) = (CacheServer::new(), noise(SIZES[0]));
        let (info, target) = server.add("path", &nar, compression);
        let mut asking = Asking::at(&server.url());
        asking.options.drip_time = Duration::from_millis(300);
        asking.options.drip_bytes = 1 << 20;
        let cache: Arc<dyn Upstream> = Arc::new(asking.start());
        let run = Running::over(&info, vec![cache], encoding, None).await;
        server.fault(&target, Some(Fault::Drip(Duration::from_millis(5))));
        assert_eq!(run.get().await.status, 404);
        assert_eq!(server.times_asked(&target), tries);
        server.fault(&target, None);
        assert_eq!(run.get().await.status, 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_file_is_not_passed_where_a_builder_that_was_not_asked_has_it() {
    let case = Case::new(LARGE, 1, Says::All);
    let cache: Arc<dyn Upstream> = Arc::new(Asking::at(&case.servers[0].url()).start());
    let builder = Scripted::new("builder");
    let upstreams: Vec<Arc<dyn Upstream>> = vec![cache, Arc::clone(&builder) as _];
    let run = Running::over(&case.info, upstreams, Encoding::Zstd, None).await;
    // It was built there since.
    builder.add(&case.info, &case.nar.clone().into());
    case.servers[0].fault(&case.target, Some(Fault::Cut(1_000_000)));
    let answer = run.get().await;
    assert!(!answer.cut && zstd::decode_all(&answer.body[..]).unwrap() == case.nar);
    assert_eq!(run.counters().nar_resumed.value(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_nar_is_encoded_once_however_many_ask_for_it() {
    for size in SIZES {
        let case = Case::new(size, 0, Says::All);
        let builder = Scripted::new("builder");
        builder.add(&case.info, &case.nar.clone().into());
        let upstreams: Vec<Arc<dyn Upstream>> = vec![Arc::clone(&builder) as _];
        let run = Running::over(&case.info, upstreams, Encoding::Zstd, Some(memory())).await;
        // So that nobody has the whole before the last has asked.
        *builder.delay.lock().unwrap() = Duration::from_millis(300);
        let all = futures_util::future::join_all((0..5).map(|_| run.get())).await;
        for answer in &all {
            assert!(!answer.cut && answer.body == all[0].body);
        }
        let kept = run.kept_file().await.unwrap();
        assert!(kept == all[0].body && zstd::decode_all(&kept[..]).unwrap() == case.nar);
        assert!(run.get().await.body == kept);
        let plain = run.target.replace(".nar.zst", ".nar");
        assert!(get(run.address(), &plain).await.body == case.nar);
        assert_eq!(run.counters().nar_encoded.value(), 1, "{size}");
    }
}
