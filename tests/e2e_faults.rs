//! A cache that goes wrong in every way, with real clients: whatever it does, they get the right path from the
//! next holder, or fail cleanly; and what it did is forgotten once it does well again.

mod cache_server;
mod rig;

use std::thread;
use std::time::{Duration, Instant};

use muster::nix::narinfo::Compression;
use rig::caches::asked;
use rig::muster::narinfo_target;
use rig::{Lab, Line, Machine, Muster, eventually};

use cache_server::{Authority, CacheServer, Fault, compress};

/// Machines that try faults at the same time; most of these wait for a bound.
const LANES: usize = 3;

/// Where the faulty cache listens, on the client's own machine.
const PORT: u16 = 8000;

const COMPRESSIONS: [(&str, Compression); 3] = [
    ("zstd", Compression::Zstd),
    ("xz", Compression::Xz),
    ("none", Compression::None),
];

/// A builder that has these, the folders that real Nix wrote of them, and the key they are signed with.
struct Origin<'l> {
    lab: &'l Lab,
    builder: Machine,
    key: String,
    /// Read whole before the first byte is given out, and streamed.
    small: String,
    large: String,
}

impl<'l> Origin<'l> {
    fn new(lab: &'l Lab) -> Self {
        let builder = lab.builder("b1");
        let key = builder.signs_as("b1-1");
        let small = builder.build_one("big", "--argstr seed small");
        let large = builder.build_one("big", "--arg sizeMB 6 --argstr seed large");
        for (name, _) in COMPRESSIONS {
            let options = format!("compression={name}");
            let paths = [small.clone(), large.clone()];
            builder.copy_to(&format!("/lab/{name}"), &options, &paths);
        }
        // The cache answers first, so that it is asked for the NAR first, too.
        builder.behind(Line {
            delay_ms: 100,
            ..Line::default()
        });
        Self {
            lab,
            builder,
            key,
            small,
            large,
        }
    }

    /// Does all of it, on a few machines at the same time.
    fn try_all<T: Sync>(&self, all: &[T], builders: &[&str], one: impl Fn(&Lane<'_>, &T) + Sync) {
        thread::scope(|scope| {
            for number in 0..LANES {
                let one = &one;
                scope.spawn(move || {
                    let lane = Lane::new(self, number, builders);
                    for case in all.iter().skip(number).step_by(LANES) {
                        one(&lane, case);
                    }
                });
            }
        });
    }
}

/// A client with a faulty cache of its own.
struct Lane<'o> {
    origin: &'o Origin<'o>,
    client: Machine,
    server: CacheServer,
}

impl<'o> Lane<'o> {
    fn new(origin: &'o Origin<'o>, number: usize, builders: &[&str]) -> Self {
        let client = origin
            .lab
            .machine(&format!("client-{number}"), rig::Nix::under_test());
        client.builders(builders);
        let server = CacheServer::at(client.listener(PORT), None);
        Self {
            origin,
            client,
            server,
        }
    }

    /// Starts a Muster that knows nothing yet, and has a client that knows nothing ask it.
    fn begin(&self, args: &str, wait_for: &[&str]) -> Muster<'_> {
        self.client.fresh_store();
        self.client.wipe_kept();
        let key = &self.origin.key;
        let upstream = format!("http://localhost:{PORT}?trusted-public-keys={key}");
        let muster = Muster::serve(&self.client, &format!("{args} --upstream '{upstream}'"));
        for name in wait_for {
            muster.await_log(10.0, &format!("{name}: well"));
        }
        self.client.configure(&format!(
            "{}\ndownload-attempts = 2",
            muster.lines().join("\n")
        ));
        muster
    }

    /// Loads what Nix wrote with a compression, and returns the target of a path's NAR.
    fn serve(&self, compression: &str, path: &str) -> String {
        self.server
            .put_folder(&self.origin.lab.share().join(compression));
        let narinfo = self.server.file(&narinfo_target(path));
        let narinfo = String::from_utf8(narinfo).expect("a narinfo is a text");
        let url = narinfo.lines().find_map(|l| l.strip_prefix("URL: "));
        format!("/{}", url.expect("a URL"))
    }

    #[track_caller]
    fn has(&self, path: &str) {
        assert_eq!(
            self.client.nar_hash(path),
            self.origin.builder.nar_hash(path),
            "{path}"
        );
    }
}

/// What goes wrong with a NAR whose file is this, and whether that takes long to be seen.
fn nar_faults(file: &[u8], target: &str, compression: Compression) -> Vec<(&'static str, Fault)> {
    let half = file.len() / 2;
    let mut flipped = file.to_vec();
    if let Some(byte) = flipped.get_mut(half) {
        *byte ^= 1;
    }
    let other = compress(compression, &b"another NAR".repeat(100_000));
    let bomb = match compression {
        Compression::None => vec![0; 1 << 20],
        _ => compress(compression, &vec![0; 64 << 20]),
    };
    let again: &'static str = format!("Location: {target}").leak();
    vec![
        ("closed before the head", Fault::Reset),
        ("reset in the middle", Fault::ResetAfter(half)),
        ("cut", Fault::Cut(half)),
        ("cut, in chunks", Fault::CutChunked(half)),
        ("cut before the last byte", Fault::Cut(file.len() - 1)),
        ("declared as 10 GB", Fault::Length(10 << 30)),
        ("declared as half of it", Fault::Length(half as u64)),
        ("a byte is wrong", Fault::Body(flipped, "X: y")),
        ("another NAR", Fault::Body(other, "X: y")),
        (
            "a page to sign in",
            Fault::Body(b"<html>".to_vec(), "Content-Type: text/html"),
        ),
        ("a bomb", Fault::Endless(bomb)),
        ("redirected to itself", Fault::Status(302, again)),
        (
            "redirected to a foreign host",
            Fault::Status(302, "Location: http://b1:22/nar"),
        ),
        ("gone", Fault::Status(404, "X: y")),
        ("an error", Fault::Status(500, "X: y")),
        ("overloaded", Fault::Status(503, "Retry-After: 1")),
        ("another protocol", Fault::NotHttp),
        ("a head without end", Fault::HeaderFlood),
        ("silent", Fault::Silent),
        ("stalled", Fault::Stall(half)),
        ("a drip", Fault::Drip(Duration::from_millis(5))),
    ]
}

/// How many faults there are; the files differ, the list does not.
fn faults() -> usize {
    nar_faults(b"xx", "/", Compression::None).len()
}

#[test]
fn whatever_a_cache_does_to_a_nar_the_client_has_it_from_the_next_holder() {
    let lab = Lab::new();
    let origin = Origin::new(&lab);
    // Each of them for a NAR of either size, or for both; those that take long are begun first.
    let both = asked("MUSTER_TEST_FAULTS", 1) > 1;
    let sizes = |number: usize| {
        [false, true]
            .into_iter()
            .filter(move |large| both || (number % 2 == 1) == *large)
    };
    let cases = (0..faults())
        .rev()
        .flat_map(|n| sizes(n).map(move |large| (n, large)));
    let cases: Vec<_> = cases.collect();
    origin.try_all(&cases, &["b1"], |lane, &(number, is_large)| {
        let path = if is_large {
            &origin.large
        } else {
            &origin.small
        };
        let place = (number + usize::from(is_large)) % COMPRESSIONS.len();
        let (name, compression) = COMPRESSIONS[place];
        let target = lane.serve(name, path);
        let file = lane.server.file(&target);
        let (what, fault) = nar_faults(&file, &target, compression).swap_remove(number);
        let what = format!("{what}, {name}, large: {is_large}");
        lane.server.fault(&target, Some(fault.clone()));
        let before = lane.server.times_asked(&target);
        let muster = lane.begin("", &["localhost:8000", "@b1"]);
        let mut got = lane.client.realise(path);
        let bound = if matches!(fault, Fault::Drip(_)) {
            45.0
        } else {
            25.0
        };
        assert!(got.secs < bound, "{what}: {got}\n{}", muster.log());
        if is_large && got.rc != 0 && lied(&muster) {
            // Its first bytes were given out before the last ones told that they are wrong.
            assert!(!lane.client.valid(path), "{what}: {got}");
            got = lane.client.realise(path);
        }
        let counted = (got.rc, got.built(), got.copied());
        assert_eq!(counted, (0, 0, 1), "{what}: {got}\n{}", muster.log());
        lane.has(path);
        let times = lane.server.times_asked(&target) - before;
        assert!(times > 0, "{what}: it was not asked\n{}", muster.log());
        let memory = muster.memory_peak_kb();
        assert!(memory < 150_000, "{what}: {memory} kB");
        lane.server.fault(&target, None);
    });
}

/// Between them lies that silence alone: half of the NAR is there at once, and the builder gives the rest in no time.
#[test]
fn a_nar_that_stalls_goes_on_elsewhere_after_the_time_that_is_set() {
    let lab = Lab::new();
    let origin = Origin::new(&lab);
    let lane = Lane::new(&origin, 0, &["b1"]);
    let target = lane.serve("none", &origin.large);
    let nar = lane.server.file(&target);
    let stalls = Fault::Stall(nar.len() / 2);
    lane.server.fault(&target, Some(stalls));
    for (said, least, most) in [("", 5.0, 8.0), ("stall-timeout = 2\n", 2.0, 5.0)] {
        let take = || {
            lane.client.write("/etc/muster.toml", said);
            let wait_for = ["localhost:8000", "@b1"];
            let mut muster = lane.begin("--config /etc/muster.toml", &wait_for);
            let narinfo = muster.narinfo(&origin.large);
            let url = format!("/{}", narinfo.field("URL").expect("a URL"));
            let began = Instant::now();
            let got = muster.get(&url);
            let took = began.elapsed().as_secs_f64();
            assert!(got.complete && got.body == nar, "{}", muster.log());
            assert!(took >= least, "{said:?}: {took} s\n{}", muster.log());
            took
        };
        // Another time where the machine had much else to do.
        let took: Vec<f64> = std::iter::repeat_with(take)
            .take(3)
            .scan(false, |done, took| {
                (!std::mem::replace(done, took < most)).then_some(took)
            })
            .collect();
        assert!(took.iter().any(|took| *took < most), "{said:?}: {took:?}");
    }
}

/// What is done to a NAR.
type Change = fn(&mut Vec<u8>);

/// What it lied about was held back until all of it had come, so the builder makes it good in the same response.
#[test]
fn a_large_nar_that_is_wrong_at_its_end_reaches_the_client_in_one_go() {
    let lab = Lab::new();
    let origin = Origin::new(&lab);
    let lies: [(&str, Change); 3] = [
        ("the last byte", |nar| *nar.last_mut().unwrap() ^= 1),
        ("a byte before", |nar| {
            *nar.iter_mut().rev().nth(1_000_000).unwrap() ^= 1
        }),
        ("a byte more", |nar| nar.push(0)),
    ];
    let cases: Vec<_> = (0..lies.len() * COMPRESSIONS.len()).collect();
    origin.try_all(&cases, &["b1"], |lane, &number| {
        let (lie, change) = &lies[number / COMPRESSIONS.len()];
        let (name, compression) = COMPRESSIONS[number % COMPRESSIONS.len()];
        let served = ["none", "zstd", "xz"][(number + number / COMPRESSIONS.len()) % 3];
        let what = format!("{lie}, {name}, served as {served}");
        let target = lane.serve("none", &origin.large);
        let mut nar = lane.server.file(&target);
        change(&mut nar);
        let target = lane.serve(name, &origin.large);
        let lying = Fault::Body(compress(compression, &nar), "X: y");
        lane.server.fault(&target, Some(lying));
        let before = lane.server.times_asked(&target);
        let muster = lane.begin(
            &format!("--compression {served}"),
            &["localhost:8000", "@b1"],
        );
        let got = lane
            .client
            .realise_attr("big", "--arg sizeMB 6 --argstr seed large");
        let counted = (got.rc, got.built(), got.copied());
        assert_eq!(counted, (0, 0, 1), "{what}: {got}\n{}", muster.log());
        lane.has(&origin.large);
        assert_eq!(lane.server.times_asked(&target) - before, 1, "{what}");
        assert!(lied(&muster), "{what}: {}", muster.log());
        let cut = muster.log().contains("transfer cut");
        assert!(!cut, "{what}: {}", muster.log());
        lane.server.fault(&target, None);
    });
}

/// Whether it has seen bytes that do not fit their narinfo, and believes who gave them no more for a while.
fn lied(muster: &Muster<'_>) -> bool {
    muster.log().contains("does not fit its narinfo")
}

#[test]
fn whatever_the_last_holder_does_the_client_fails_cleanly_and_has_it_later() {
    let lab = Lab::new();
    let origin = Origin::new(&lab);
    let cases: Vec<_> = (0..faults()).rev().collect();
    origin.try_all(&cases, &[], |lane, &number| {
        let (name, compression) = COMPRESSIONS[number % COMPRESSIONS.len()];
        let target = lane.serve(name, &origin.small);
        let file = lane.server.file(&target);
        let (what, fault) = nar_faults(&file, &target, compression).swap_remove(number);
        lane.server.fault(&target, Some(fault.clone()));
        let muster = lane.begin("", &["localhost:8000"]);
        let got = lane.client.realise(&origin.small);
        assert!(lane.server.times_asked(&target) > 0, "{what}");
        // Some say more than there is, or keep back what tells nothing.
        let harmless = matches!(fault, Fault::Length(n) if n > 1 << 30)
            || matches!(fault, Fault::Cut(n) if n == file.len() - 1);
        if got.rc != 0 || !harmless {
            let got = got.failed();
            assert!(!lane.client.valid(&origin.small), "{what}: {got}");
        }
        let memory = muster.memory_peak_kb();
        assert!(memory < 150_000, "{what}: {memory} kB");
        lane.server.fault(&target, None);
        if !lied(&muster) {
            let later = eventually(20.0, || {
                lane.client.forget_lookups();
                lane.client.realise(&origin.small).rc == 0
            });
            assert!(later, "{what}: {}", muster.log());
            lane.has(&origin.small);
        }
    });
}

#[test]
fn whatever_a_cache_says_of_paths_the_client_has_them_from_the_builder() {
    let lab = Lab::new();
    let origin = Origin::new(&lab);
    let parts = origin.builder.build_one("flat", "--arg n 22");
    let paths: Vec<String> = origin.builder.closure(&parts);
    origin.builder.copy_to(
        "/lab/zstd",
        "compression=zstd",
        std::slice::from_ref(&parts),
    );
    let other = "NarHash: sha256:1ph6nz4k516p3yayhhv60hzagxaal4aa7mwpj3ys2zvbd21vnrga";
    let edited = |text: &str, name: &str, line: &str| {
        let lines = text.lines();
        let lines = lines.map(|l| if l.starts_with(name) { line } else { l });
        Fault::Body(
            format!("{}\n", lines.collect::<Vec<_>>().join("\n")).into_bytes(),
            "X: y",
        )
    };
    let lane = Lane::new(&origin, 0, &["b1"]);
    lane.serve("zstd", &parts);
    let narinfos = paths.iter().map(|path| narinfo_target(path));
    let targets: Vec<String> = narinfos.collect();
    let text = |target: &str| String::from_utf8_lossy(&lane.server.file(target)).into_owned();
    let faults = |target: &str| {
        let (text, again) = (text(target), format!("Location: {target}").leak());
        vec![
            Fault::Cut(50),
            Fault::Stall(50),
            Fault::Drip(Duration::from_millis(50)),
            Fault::Silent,
            Fault::Reset,
            Fault::ResetAfter(50),
            Fault::NotHttp,
            Fault::HeaderFlood,
            Fault::Length(10 << 30),
            Fault::Endless(b"Sig: x:eA==\n".repeat(100)),
            Fault::Body(vec![b'x'; 2 << 20], "X: y"),
            Fault::Body(vec![], "X: y"),
            Fault::Body(b"<html>sign in</html>".to_vec(), "Content-Type: text/html"),
            Fault::Status(302, again),
            Fault::Status(302, "Location: http://b1:22/x.narinfo"),
            Fault::Status(401, "WWW-Authenticate: Basic"),
            Fault::Status(418, "X: y"),
            Fault::Status(500, "X: y"),
            edited(&text, "NarHash", other),
            edited(&text, "NarSize", "NarSize: 10000000000"),
            edited(&text, "Sig", "Sig: b1-1:AAAA"),
            edited(
                &text,
                "StorePath",
                "StorePath: /nix/store/00000000000000000000000000000000-x",
            ),
            edited(&text, "URL", "URL: http://b1:22/nar/x.nar.zst"),
        ]
    };
    for (number, target) in targets.iter().enumerate() {
        let mut faults = faults(target);
        let count = faults.len();
        assert!(targets.len() >= count, "each fault has a path");
        let fault = faults.swap_remove(number % count);
        lane.server.fault(target, Some(fault));
    }
    // One by one: the builder would tell the whole closure at once.
    lane.client.write("/etc/muster.toml", "prefetch = false\n");
    let args = "--config /etc/muster.toml";
    let muster = lane.begin(args, &["localhost:8000", "@b1"]);
    let began = Instant::now();
    let got = lane.client.realise(&parts);
    let counted = (got.rc, got.built(), got.copied());
    assert_eq!(counted, (0, 0, paths.len()), "{got}\n{}", muster.log());
    for path in &paths {
        lane.has(path);
    }
    assert!(
        began.elapsed() < Duration::from_secs(30),
        "{}",
        muster.log()
    );
    let asked = targets.iter().filter(|t| lane.server.times_asked(t) > 0);
    assert!(
        asked.count() > 10,
        "the cache was hardly asked\n{}",
        muster.log()
    );
    assert!(muster.memory_peak_kb() < 150_000);
    drop(muster);

    // Nobody else has them: they are built.
    lane.client.builders(&[]);
    let muster = lane.begin(args, &["localhost:8000"]);
    let built = lane.client.realise_attr("flat", "--arg n 22");
    assert_eq!(built.rc, 0, "{built}\n{}", muster.log());
    assert!(built.built() > 10, "{built}\n{}", muster.log());
}

#[test]
fn a_trusted_cache_that_lies_is_found_out_by_one_client() {
    let lab = Lab::new();
    let origin = Origin::new(&lab);
    let lane = Lane::new(&origin, 0, &["b1"]);
    let path = &origin.small;
    lane.serve("zstd", path);
    // Trusted by the operator's word alone, and it gives another NAR under the path's name.
    let target = narinfo_target(path);
    let text = String::from_utf8(lane.server.file(&target)).expect("a text");
    let lies = text.lines().map(|l| match l.split(' ').next() {
        Some("NarHash:") => "NarHash: sha256:1ph6nz4k516p3yayhhv60hzagxaal4aa7mwpj3ys2zvbd21vnrga",
        _ => l,
    });
    let lies = format!("{}\n", lies.collect::<Vec<_>>().join("\n"));
    lane.server
        .fault(&target, Some(Fault::Body(lies.into_bytes(), "X: y")));
    lane.client.wipe_kept();
    let upstream = format!("http://localhost:{PORT}?trusted=1");
    let muster = Muster::serve(&lane.client, &format!("--upstream '{upstream}'"));
    for name in ["localhost:8000", "@b1"] {
        muster.await_log(10.0, &format!("{name}: well"));
    }
    lane.client.substitutes_from(&muster);
    let first = lane.client.realise(path);
    assert!(first.rc != 0 && !lane.client.valid(path), "{first}");
    // It is found out, and the builder's word counts from now on.
    lane.client.forget_lookups();
    let second = lane.client.realise(path);
    assert_eq!(
        (second.rc, second.copied()),
        (0, 1),
        "{second}\n{}",
        muster.log()
    );
    lane.has(path);
}

/// Nobody checks what a trusted cache declares but the bytes themselves: no room is made for it, and none is taken.
#[test]
fn ten_gigabytes_that_a_trusted_cache_only_declares_cost_nothing() {
    let lab = Lab::new();
    let origin = Origin::new(&lab);
    let lane = Lane::new(&origin, 0, &[]);
    let target = lane.serve("zstd", &origin.small);
    let narinfo = narinfo_target(&origin.small);
    let text = String::from_utf8(lane.server.file(&narinfo)).expect("a text");
    let lines = text.lines().map(|line| match line.split(' ').next() {
        Some("NarSize:") => "NarSize: 10000000000",
        _ => line,
    });
    let declared = format!("{}\n", lines.collect::<Vec<_>>().join("\n"));
    let declared = Fault::Body(declared.into_bytes(), "X: y");
    lane.server.fault(&narinfo, Some(declared));
    let upstream = format!("http://localhost:{PORT}?trusted=1");
    let args = format!("--cache-size 10G --upstream '{upstream}'");
    let mut muster = Muster::serve(&lane.client, &args);
    muster.await_log(10.0, "localhost:8000: well");
    let lines = muster.lines().join("\n");
    let lines = format!("{lines}\ndownload-attempts = 2\nfallback = true");
    lane.client.configure(&lines);
    lane.client.realise(&origin.large).ok();
    muster.await_kept(std::slice::from_ref(&origin.large));

    // As long as its file is, and as long as it says.
    for fault in [None, Some(Fault::Length(10 << 30))] {
        lane.client.fresh_store();
        lane.server.fault(&target, fault);
        let before = lane.server.times_asked(&target);
        let built = lane.client.realise_attr("big", "--argstr seed small");
        // It began to copy it, which failed.
        assert_eq!(
            (built.rc, built.built()),
            (0, 1),
            "{built}\n{}",
            muster.log()
        );
        lane.has(&origin.small);
        let asked = lane.server.times_asked(&target) - before;
        assert!(asked > 0, "{}", muster.log());
    }
    let report = muster.get("/healthz").text();
    let report: serde_json::Value = serde_json::from_str(&report).expect("JSON");
    let cache = &report["cache"];
    let figures = ["evictions", "bytes-reserved"].map(|name| cache[name].as_u64());
    assert_eq!(figures, [Some(0), Some(0)], "{cache}");
    assert!(muster.names_a_file(&origin.large), "{}", muster.log());
    let memory = muster.memory_peak_kb();
    assert!(memory < 150_000, "{memory} kB");
}

#[test]
fn a_cache_behind_a_bad_certificate_is_done_without_and_a_good_one_is_used() {
    let lab = Lab::new();
    let origin = Origin::new(&lab);
    let path = &origin.small;
    let (ours, foreign) = (Authority::new(), Authority::new());
    let client = lab.client(&["b1"]);
    let roots = std::fs::read_to_string(ours.roots()).expect("read a certificate");
    client.write("/etc/ssl/certs/ca-certificates.crt", &roots);
    let servers: Vec<_> = [
        (8443, ours.config("localhost", 2100)),
        (8444, ours.config("localhost", 2001)),
        (8445, ours.config("other.example", 2100)),
        (8446, foreign.config("localhost", 2100)),
    ]
    .into_iter()
    .map(|(port, config)| {
        (
            port,
            CacheServer::at(client.listener(port), Some(config.into())),
        )
    })
    .collect();
    let plain = CacheServer::at(client.listener(8447), None);
    for server in servers.iter().map(|(_, server)| server).chain([&plain]) {
        server.put_folder(&lab.share().join("zstd"));
    }
    let key = &origin.key;
    for (port, words) in [
        (8443, ""),
        (8444, "expired"),
        (8445, "name"),
        (8446, "UnknownIssuer"),
        (8447, "handshake"),
    ] {
        client.fresh_store();
        client.wipe_kept();
        let upstream = format!("https://localhost:{port}?trusted-public-keys={key}");
        let mut muster = Muster::serve(&client, &format!("--upstream '{upstream}'"));
        muster.await_log(10.0, "@b1: well");
        let state = if port == 8443 { "well" } else { "sick" };
        muster.await_log(10.0, &format!("localhost:{port}: {state}"));
        let log = muster.log().to_lowercase();
        assert!(log.contains(&words.to_lowercase()), "{port}: {log}");
        client.substitutes_from(&muster);
        let got = client.realise(path);
        assert_eq!((got.rc, got.built()), (0, 0), "{got}\n{}", muster.log());
        assert_eq!(client.nar_hash(path), origin.builder.nar_hash(path));
        let absent = muster.get("/00000000000000000000000000000001.narinfo");
        assert_eq!(absent.status, 404);
        let nar_asked = servers[0]
            .1
            .asked()
            .iter()
            .any(|a| a.target.starts_with("/nar/"));
        assert!(nar_asked, "the good one gives the NAR");

        let check = client.run(&format!(
            "muster check --no-machines --upstream '{upstream}' --only 'localhost:{port}'"
        ));
        let said = format!("{}{}", check.out, check.err).to_lowercase();
        match port {
            8443 => assert_eq!(check.rc, 0, "{check}"),
            _ => assert!(
                check.rc == 1 && said.contains(&words.to_lowercase()),
                "{check}"
            ),
        }
    }
}
