//! How Muster's cost grows with builders, paths, clients and round trip; run by `benches/scale`.
//!
//! ```text
//!   b   nix-daemon of Nix 2.8 with up to a million paths, and Muster over its socket; as many builders
//!       as are wanted are links to that one socket, each with connections and daemon processes of its own
//!   r   another builder, behind a line with a delay; m Muster over ssh-ng://r; c a real client
//!   b1 b2 b3   builders over ssh, for bursts (figures/burst.rs); mb Muster over these
//! ```
//!
//! Load is wrk's over loopback, CPU time from a control group of Muster's own. Each point is the median of
//! the rounds. The points of a curve are taken in turn; those over the size of
//! the store are not, as it only grows. Paths of the large store are in its database alone.

#[path = "../tests/rig/mod.rs"]
mod rig;

#[path = "figures/burst.rs"]
mod burst;
#[path = "figures/catalog.rs"]
mod catalog;
mod figures;
#[path = "figures/load.rs"]
#[expect(dead_code, reason = "what benches/compare.rs alone uses")]
mod load;

use std::env;
use std::fs;
use std::os::unix::fs::symlink;
use std::thread;
use std::time::Duration;

use burst::Burst;
use figures::cpu::CpuGroup;
use figures::{
    BY_BUILDERS, BY_CLIENTS, BY_CLIENTS_P99, BY_PATHS, BY_ROUND_TRIP, Figures, Goal, Unit,
};
use load::{Load, add_entries, add_small, small_name};
use rig::muster::narinfo_target;
use rig::{Lab, Line, Machine, Muster, Nix, eventually};
use serde_json::json;

#[test]
fn scale() {
    let text = |name| env::var(name).ok().filter(|text| !text.is_empty());
    let quick = text("MUSTER_SCALE_QUICK").is_some();
    let rounds = text("MUSTER_SCALE_ROUNDS").map_or(1, |n| n.parse().expect("a number"));
    let most: usize = text("MUSTER_SCALE_PATHS").map_or(1_000, |n| n.parse().expect("a number"));
    let secs = if quick { 1 } else { 2 };

    let mut figures = Figures::default();
    let lab = Lab::new();
    load::write_script(&lab);
    let round_trips = RoundTrips::new(&lab);
    for round in 0..rounds {
        eprintln!("-- round trips, {} of {rounds}", round + 1);
        for delay_ms in [0, 10, 50] {
            round_trips.closure(delay_ms, &mut figures);
        }
    }
    drop(round_trips);
    let burst = Burst::new(&lab);
    for round in 0..rounds {
        eprintln!("-- bursts, {} of {rounds}", round + 1);
        burst.measure(round, &mut figures);
    }
    drop(burst);

    let b = lab.machine("b", Nix::Debian12);
    b.daemon();
    b.build_one("tiny", "");
    for link in 0..30 {
        symlink(SOCKET, b.path(&format!("/run/builder-{link}"))).expect("make a link");
    }
    let mut paths = Vec::new();
    add_small(&b, &mut paths, 1_000, 0);
    for round in 0..rounds {
        eprintln!("-- builders and clients, {} of {rounds}", round + 1);
        by_builders(&b, round, secs, &mut figures);
        by_clients(&b, &paths, secs, &mut figures);
        by_road(&b, &paths, round, &mut figures);
    }
    figures.set_goal(BY_ROAD, "", IN_PLACE, Goal::Beside(THROUGH_DAEMON));
    let sizes = (3..).map(|power| 10_usize.pow(power));
    for size in sizes.take_while(|size| *size <= most) {
        eprintln!("-- {size} paths");
        add_entries(&b, &mut paths, size);
        for _ in 0..rounds {
            by_paths(&b, &paths, &mut figures);
        }
        for _ in 0..rounds {
            catalog::measure(&b, size, &mut figures);
        }
    }

    let about = format!(
        "{rounds} rounds, all on {} cores; {}; load {}",
        thread::available_parallelism().map_or(0, std::num::NonZero::get),
        b.run("nix --version").out.trim(),
        fs::read_to_string("/proc/loadavg")
            .unwrap_or_default()
            .trim(),
    );
    if let Some(file) = text("MUSTER_SCALE_JSON") {
        let text = json!({ "about": about, "figures": figures.json() });
        fs::write(file, format!("{text:#}\n")).expect("write the JSON file");
    }
    if let Some(file) = text("MUSTER_SCALE_SVG") {
        let picture = figures.curves("How the cost grows", &about, &figures::SCALE_CURVES);
        fs::write(file, picture).expect("write the SVG file");
    }
    println!("\n{about}\n\n{}", figures.table());
}

/// What a path costs that none of so many builders has.
fn by_builders(b: &Machine, round: usize, secs: u32, figures: &mut Figures) {
    for builders in in_turn([1, 3, 10, 30], round) {
        let muster = serve(b, builders);
        let seed = format!("{round} {builders}");
        let miss = measure(b, &muster, 300_000, 64, secs, |place| {
            narinfo_target(&small_name(&seed, place, ""))
        });
        let via = builders.to_string();
        figures.add(BY_BUILDERS, "", &via, Unit::Microseconds, miss.cpu_us);
    }
}

/// What a narinfo costs that is known, with so many connections of clients.
fn by_clients(b: &Machine, paths: &[String], secs: u32, figures: &mut Figures) {
    let muster = serve(b, 1);
    let hit = |connections| {
        measure(b, &muster, 1_000, connections, secs, |place| {
            narinfo_target(&paths[place])
        })
    };
    hit(64);
    for clients in [1, 25, 256] {
        let got = hit(clients);
        let via = clients.to_string();
        figures.add(BY_CLIENTS, "", &via, Unit::Microseconds, got.cpu_us);
        let p99_ms = got.load.p99_us / 1000.0;
        figures.add(BY_CLIENTS_P99, "", &via, Unit::Milliseconds, p99_ms);
    }
}

/// What a path costs that is found for the first time in a store of so many.
fn by_paths(b: &Machine, paths: &[String], figures: &mut Figures) {
    let muster = serve(b, 1);
    let cpu = CpuGroup::new("scale");
    cpu.take(muster.pid());
    let step = paths.len() / COLD_PATHS;
    let targets = (0..COLD_PATHS).map(|n| narinfo_target(&paths[n * step]));
    load::once(b, 5000, targets);
    let each = cpu.used().as_secs_f64() * 1e6 / COLD_PATHS as f64;
    let via = paths.len().to_string();
    figures.add(BY_PATHS, "", &via, Unit::Microseconds, each);
}

/// What a path of the own store costs Muster and the daemon together, read in place and not.
fn by_road(b: &Machine, paths: &[String], round: usize, figures: &mut Figures) {
    for road in in_turn([0, 1], round) {
        let (name, how) = [(IN_PLACE, "auto"), (THROUGH_DAEMON, "daemon")][road];
        let file = "/etc/muster/road.toml";
        b.write(
            file,
            &format!("machines = false\nlocal-store = \"{how}\"\n"),
        );
        // The daemon's process for Muster is a child of one that is in the group.
        let cpu = CpuGroup::new("scale");
        for pid in b.processes("nix-daemon") {
            cpu.take(pid);
        }
        let muster = Muster::serve(b, &format!("--config {file} --cache-size 0"));
        cpu.take(muster.pid());
        thread::sleep(Duration::from_secs(1));
        let before = cpu.used();
        let targets = paths[..COLD_PATHS].iter();
        load::once(b, 5000, targets.map(|path| narinfo_target(path)));
        let each = (cpu.used() - before).as_secs_f64() * 1e6 / COLD_PATHS as f64;
        figures.add(BY_ROAD, "", name, Unit::Microseconds, each);
    }
}

/// All of them, backwards in every second round; the table lists them as they come in the first.
fn in_turn<const N: usize>(mut all: [usize; N], round: usize) -> [usize; N] {
    if round % 2 == 1 {
        all.reverse();
    }
    all
}

/// Muster over so many links to the one daemon, connected to all.
fn serve(b: &Machine, builders: usize) -> Muster<'_> {
    let upstreams: String = (0..builders)
        .map(|n| format!(" --upstream unix:///run/builder-{n}"))
        .collect();
    b.write("/etc/muster/config.toml", "memory-cache-size = \"2G\"\n");
    let muster = Muster::serve(
        b,
        &format!("--no-machines --no-local-daemon --cache-size 0{upstreams}"),
    );
    let ask = "busybox wget -q -O - http://127.0.0.1:5000/healthz";
    let well = || b.run(ask).out.matches(r#""state":"well""#).count();
    assert!(eventually(20.0, || well() == builders), "{}", muster.log());
    muster
}

struct Measured {
    cpu_us: f64,
    load: Load,
}

/// Asks for targets in turn and returns what one request cost.
fn measure(
    machine: &Machine,
    muster: &Muster<'_>,
    count: usize,
    connections: usize,
    secs: u32,
    target: impl Fn(usize) -> String,
) -> Measured {
    let targets = load::targets(machine, "scale", (0..count).map(target));
    let cpu = CpuGroup::new("scale");
    cpu.take(muster.pid());
    let load = load::load(machine, &targets, 5000, connections, secs);
    let used = cpu.used().as_secs_f64() * 1e6;
    Measured {
        cpu_us: used / load.requests,
        load,
    }
}

/// A real client, Muster beside it, and a builder behind a line.
struct RoundTrips {
    r: Machine,
    m: Machine,
    c: Machine,
    top: String,
}

impl RoundTrips {
    fn new(lab: &Lab) -> Self {
        let r = lab.machine("r", Nix::Debian12);
        r.sshd().daemon();
        let top = r.build_one("dag", "--arg n 200");
        let m = lab.machine("m", Nix::Debian12);
        m.builders(&["r"]);
        Self {
            r,
            m,
            c: lab.machine("c", Nix::Debian12),
            top,
        }
    }

    fn closure(&self, delay_ms: u64, figures: &mut Figures) {
        let line = Line {
            delay_ms,
            cut_after_bytes: 0,
            bytes_per_second: 0,
        };
        self.r.behind(line);
        self.m.run("rm -rf /var/cache/muster").ok();
        let muster = Muster::serve(&self.m, "--listen 0.0.0.0:5000 --no-local-daemon");
        let ask = "busybox wget -q -O - http://127.0.0.1:5000/healthz";
        let well = || self.m.run(ask).out.contains(r#""state":"well""#);
        assert!(eventually(20.0, well), "{}", muster.log());
        thread::sleep(Duration::from_secs(2));
        self.c.fresh_store();
        let got = self.c.run_for(
            120.0,
            &format!(
                "nix-store --realise {} --max-jobs 16 --option substituters {} --option trusted-public-keys '{}'",
                self.top,
                muster.url(),
                muster.key()
            ),
        );
        let got = got.ok();
        assert_eq!(
            (got.built(), got.copied()),
            (0, 201),
            "{got}\n{}",
            muster.log()
        );
        figures.add(
            BY_ROUND_TRIP,
            "",
            &(delay_ms * 2).to_string(),
            Unit::Seconds,
            got.secs,
        );
    }
}

const SOCKET: &str = "/nix/var/nix/daemon-socket/socket";
/// Paths that are looked up cold, spread over the whole store.
const COLD_PATHS: usize = 1_000;

const BY_ROAD: &str = "own store, a path found for the first time, CPU of Muster and nix-daemon";
const IN_PLACE: &str = "muster, read in place";
const THROUGH_DAEMON: &str = "through its daemon";
