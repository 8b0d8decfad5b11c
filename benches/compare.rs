//! What Muster costs as an HTTP server, against nginx with the same files; run by `benches/compare`, which
//! installs what is needed.
//!
//! ```text
//!   b   builder: Nix 2.8, sshd, nix-daemon; has small paths (narinfos of about 600 bytes), eight NARs of
//!       20 MB and one of 500 MB that do not compress, and one of 500 MB of programs, which does
//!   m   muster over ssh-ng://b, with its cache; nginx with the same narinfos and with Muster's own cache
//!       folder; wrk and curl beside them, over loopback
//!   o   on b: muster over b's own store; nginx with the same NAR as `nix copy` wrote it, and zstd(1)
//!   c-… clients, each with a store of its own
//! ```
//!
//! Whatever is compared is taken in turn, forth and back, in one run. CPU time is that of the server alone, from
//! a control group of its own. A ratio is the median over pairs that ran one after the other.

#[path = "../tests/rig/mod.rs"]
mod rig;

#[path = "figures/corpus.rs"]
mod corpus;
mod figures;
#[path = "figures/load.rs"]
#[expect(dead_code, reason = "what benches/scale.rs alone uses")]
mod load;
#[path = "figures/own_store.rs"]
mod own_store;

use std::collections::BTreeMap;
use std::env;
use std::fmt::Write as _;
use std::fs;
use std::process::Command;
use std::thread;

use figures::cpu::CpuGroup;
use figures::{Figures, Goal, Unit};
use load::{Load, add_small, small_name};
use own_store::OwnStore;
use rig::muster::narinfo_target;
use rig::process::Process;
use rig::{Lab, Machine, Muster, Nix, eventually};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

#[test]
fn compare() {
    let options = Options::from_environment();
    let scene = Scene::new(&options);
    let mut figures = Figures::default();
    for _ in 0..MEMORY_TIMES {
        scene.memory(&mut figures);
    }
    {
        let mut servers = Servers::start(&scene);
        servers.warm(&scene);
        for round in 0..options.pairs {
            eprintln!("-- round {} of {}", round + 1, options.pairs);
            servers.narinfos(&scene, round, &mut figures);
            servers.nars(&scene, round, &mut figures);
            for client in &scene.clients {
                servers.clients(&scene, client, round, &mut figures);
            }
        }
    }
    if let Some(file) = &options.profile {
        fs::write(file, profile(&scene)).expect("write the profile");
    }
    let own = OwnStore::start(&scene);
    for round in 0..options.pairs {
        own.nars(&scene, round, &mut figures);
        scene.peaks(round, &mut figures);
    }
    drop(own);
    judge(&scene, &mut figures);
    own_store::judge(&mut figures);
    if let Some(file) = &options.json {
        let text = json!({ "about": scene.about(&options), "figures": figures.json() });
        fs::write(file, format!("{text:#}\n")).expect("write the JSON file");
    }
    if let Some(file) = &options.svg {
        let picture = figures.picture("Muster beside nginx", &scene.about(&options));
        fs::write(file, picture).expect("write the SVG file");
    }
    println!("\n{}\n\n{}", scene.about(&options), figures.table());
}

struct Options {
    pairs: usize,
    clients: Vec<String>,
    /// Seconds of load for one sample.
    load_secs: u32,
    /// Paths whose narinfos are asked for in turn.
    narinfos: usize,
    /// Paths that are loaded to see what one takes in memory.
    in_memory: usize,
    large_mb: u32,
    medium_mb: u32,
    two_windows_mb: u32,
    json: Option<String>,
    svg: Option<String>,
    /// Where the profile of narinfo hits goes.
    profile: Option<String>,
}

impl Options {
    fn from_environment() -> Self {
        let text = |name| env::var(name).ok().filter(|text| !text.is_empty());
        let quick = text("MUSTER_COMPARE_QUICK").is_some();
        let clients = text("MUSTER_COMPARE_NIX").unwrap_or_else(|| "2.8".into());
        let pick = |quickly, fully| if quick { quickly } else { fully };
        Self {
            pairs: text("MUSTER_COMPARE_PAIRS")
                .map_or(1, |n| n.parse().expect("a number of pairs")),
            clients: clients.split(' ').map(str::to_owned).collect(),
            load_secs: pick(1, 3),
            narinfos: 5_000,
            in_memory: if quick { 10_000 } else { 50_000 },
            large_mb: pick(40, 500),
            medium_mb: pick(2, 20),
            two_windows_mb: pick(2, 64),
            json: text("MUSTER_COMPARE_JSON"),
            svg: text("MUSTER_COMPARE_SVG"),
            profile: text("MUSTER_COMPARE_PROFILE"),
        }
    }
}

/// The machines, and what they have.
struct Scene {
    clients: Vec<Machine>,
    b: Machine,
    m: Machine,
    load_secs: u32,
    /// Small paths, the first `narinfos` of which are asked for under load.
    small: Vec<String>,
    narinfos: usize,
    /// Of the size at which a NAR is one file of incompressible bytes.
    large: String,
    large_mb: u32,
    medium: Vec<String>,
    medium_mb: u32,
    /// A NAR of twice the bytes that zstd looks back.
    two_windows: String,
    tiny: String,
}

impl Scene {
    fn new(options: &Options) -> Self {
        let lab = Lab::new();
        let b = lab.machine("b", Nix::Debian12);
        b.sshd().daemon();
        // The first build makes the store's folders.
        let tiny = b.build_one("tiny", "");
        let mut small = Vec::new();
        add_small(&b, &mut small, options.in_memory.max(options.narinfos), 3);
        let big =
            |seed: &str, mb| b.build_one("big", &format!("--argstr seed {seed} --arg sizeMB {mb}"));
        let medium = (0..8)
            .map(|n| big(&format!("m{n}"), options.medium_mb))
            .collect();
        let m = lab.machine("m", Nix::Debian12);
        m.builders(&["b"]);
        m.write("/etc/muster/config.toml", "memory-cache-size = \"1G\"\n");
        load::write_script(&lab);
        let client = |version: &String| lab.machine(&format!("c-{version}"), Nix::named(version));
        Self {
            clients: options.clients.iter().map(client).collect(),
            load_secs: options.load_secs,
            narinfos: options.narinfos,
            large: big("l", options.large_mb),
            large_mb: options.large_mb,
            medium,
            medium_mb: options.medium_mb,
            two_windows: big("w", options.two_windows_mb),
            tiny,
            small,
            b,
            m,
        }
    }

    fn muster(&self) -> Muster<'_> {
        self.muster_with("")
    }

    fn muster_with(&self, args: &str) -> Muster<'_> {
        let line = format!("--no-local-daemon --listen 0.0.0.0:5000 {args}");
        let muster = Muster::serve(&self.m, &line);
        let ask = "busybox wget -q -O - http://127.0.0.1:5000/healthz";
        let well = || self.m.run(ask).out.contains(r#""state":"well""#);
        assert!(eventually(20.0, well), "{}", muster.log());
        muster
    }

    /// What a narinfo takes in memory: growth over as many as there are, with nothing kept.
    fn memory(&self, figures: &mut Figures) {
        self.m.run("rm -rf /var/cache/muster").ok();
        let mut muster = self.muster();
        let targets = self.targets("all", self.small.iter().map(|p| narinfo_target(p)));
        let few = self.small[..100].iter().map(|p| narinfo_target(p));
        load::once(&self.m, 5000, few);
        let before = muster.memory_kb();
        for _ in 0..60 {
            self.load(&targets, 5000, 64, 3);
            let health = self
                .m
                .run("busybox wget -q -O - http://127.0.0.1:5000/healthz")
                .out;
            let health: serde_json::Value = serde_json::from_str(&health).expect("JSON");
            let held = health["narinfo"]["in-memory"].as_u64().expect("a number");
            if held >= self.small.len() as u64 * 99 / 100 {
                let grown = muster.memory_kb().saturating_sub(before) as f64 * 1024.0;
                figures.add(MEMORY, "", MUSTER, Unit::Bytes, grown / held as f64);
                // What the goal is about.
                let mean = self.mean_text(&mut muster);
                assert!(
                    (550.0..=650.0).contains(&mean),
                    "narinfos of {mean:.0} bytes"
                );
                return;
            }
        }
        panic!("not all narinfos come into memory\n{}", muster.log());
    }

    /// Bytes of a narinfo, by some that lie far apart.
    fn mean_text(&self, muster: &mut Muster<'_>) -> f64 {
        let step = self.small.len() / TEXTS;
        let sizes = (0..TEXTS).map(|n| {
            let narinfo = muster.narinfo(&self.small[n * step]);
            assert_eq!(narinfo.status, 200, "{}", self.small[n * step]);
            narinfo.body.len()
        });
        sizes.sum::<usize>() as f64 / TEXTS as f64
    }

    /// The most memory that Muster ever had, started anew for one NAR that it has from the builder, compresses and
    /// keeps.
    fn peaks(&self, round: usize, figures: &mut Figures) {
        let both = [(PEAK_TWO_WINDOWS, &self.two_windows), (MUSTER, &self.large)];
        for (via, path) in in_turn(&both, round) {
            self.m.run("rm -rf /lab/peak").ok();
            let args = "--compression zstd --cache-dir /lab/peak";
            let mut muster = self.muster_with(args);
            let url = muster.narinfo(path).field("URL").expect("a narinfo");
            let line = format!("curl -sSf -o /dev/null http://127.0.0.1:5000/{url}");
            self.m.run(&line).ok();
            let mut is_kept = || muster.narinfo(path).field("FileHash").is_some();
            let kept = eventually(60.0, &mut is_kept);
            assert!(kept, "{path} is not kept\n{}", muster.log());
            let peak = muster.memory_peak_kb() as f64 * 1.024e-3;
            figures.add(PEAK, "", via, Unit::Megabytes, peak);
        }
    }

    fn targets(&self, name: &str, targets: impl Iterator<Item = String>) -> String {
        load::targets(&self.m, name, targets)
    }

    fn load(&self, targets: &str, port: u16, connections: usize, secs: u32) -> Load {
        load::load(&self.m, targets, port, connections, secs)
    }

    /// GB that one server sends in a round of [`LARGE`].
    fn large_gb(&self) -> f64 {
        f64::from(self.large_mb) * 1.048_576e-3 * LARGE_TIMES as f64
    }

    /// GB that one server sends in a round of [`EIGHT`].
    fn medium_gb(&self) -> f64 {
        f64::from(self.medium_mb) * 1.048_576e-3 * (self.medium.len() * EIGHT_TIMES) as f64
    }

    fn about(&self, options: &Options) -> String {
        let cores = thread::available_parallelism().map_or(0, std::num::NonZero::get);
        format!(
            "{} pairs, {} s of load each, cached NARs of 500 and 20 MB: {:.1} and {:.1} GB on the wire from each server; \
             servers, load and clients on {cores} cores; {}; {}; load {}",
            options.pairs,
            options.load_secs,
            self.large_gb() * options.pairs as f64,
            self.medium_gb() * options.pairs as f64,
            self.m.run("nginx -v").err.trim(),
            self.b.run("nix --version").out.trim(),
            fs::read_to_string("/proc/loadavg")
                .unwrap_or_default()
                .trim(),
        )
    }
}

/// One server under comparison.
struct Server {
    name: &'static str,
    port: u16,
    cpu: CpuGroup,
}

/// The servers on `m`.
struct Servers<'s> {
    muster: Muster<'s>,
    _nginx: Vec<Process>,
    narinfo: Vec<Server>,
    files: Server,
    hits: String,
    misses: String,
    /// Target of each large and medium NAR, as its narinfo names it once it is cached.
    nars: BTreeMap<String, String>,
}

impl<'s> Servers<'s> {
    fn start(scene: &'s Scene) -> Self {
        let muster = scene.muster();
        let narinfos = scene.small[..scene.narinfos].iter();
        let hits = scene.targets("hits", narinfos.map(|p| narinfo_target(p)));
        // So few that those which are believed for no longer, and asked for anew, are the exception.
        let absent = (0..200).map(|n| narinfo_target(&small_name("absent", n, "")));
        let misses = scene.targets("misses", absent);
        let mut nginx = Vec::new();
        let mut serve = |name: &'static str, port: u16, root: &str, more: &str| {
            let conf = NGINX_CONF
                .replace("@port@", &port.to_string())
                .replace("@root@", root)
                .replace("@more@", more);
            scene.m.write(&format!("/etc/nginx-{port}.conf"), &conf);
            let (process, cpu) = accounted(
                &scene.m,
                &format!("nginx-{port}"),
                &format!("nginx -c /etc/nginx-{port}.conf"),
            );
            scene.m.await_port(port);
            nginx.push(process);
            Server { name, port, cpu }
        };
        let narinfo = vec![
            serve(NGINX, 8080, "/srv/narinfo", ""),
            serve(NGINX_OPEN, 8081, "/srv/narinfo", OPEN_FILE_CACHE),
        ];
        let files = serve(NGINX, 8082, "/var/cache/muster", "");
        let cpu = CpuGroup::new("muster");
        cpu.take(muster.pid());
        let muster_server = Server {
            name: MUSTER,
            port: 5000,
            cpu,
        };
        Self {
            muster,
            _nginx: nginx,
            narinfo: std::iter::once(muster_server).chain(narinfo).collect(),
            files,
            hits,
            misses,
            nars: BTreeMap::new(),
        }
    }

    /// Has everything found and cached, and nginx serve the very same narinfos.
    fn warm(&mut self, scene: &Scene) {
        scene.load(&self.hits, 5000, 64, 3);
        let fetch = "mkdir -p /srv/narinfo; cd /srv/narinfo; sed 's,^,url = http://127.0.0.1:5000,; p; s,.*/,output = ,' \
                     /run/targets-hits > /run/fetch; curl -sf -Z --parallel-max 8 -K /run/fetch";
        scene.m.run(fetch).ok();
        let paths = scene.medium.iter().chain([&scene.large, &scene.tiny]);
        for path in paths {
            let nar = self.muster.nar(path);
            assert!(nar.status == 200 && nar.complete, "{path}: {}", nar.status);
            let cached = eventually(60.0, || {
                let narinfo = self.muster.narinfo(path);
                narinfo.field("FileHash").is_some()
                    && narinfo.field("Compression").as_deref() == Some("zstd")
            });
            assert!(
                cached,
                "{path} does not come into the cache\n{}",
                self.muster.log()
            );
            let url = self
                .muster
                .narinfo(path)
                .field("URL")
                .expect("narinfos have one");
            self.nars.insert(path.clone(), format!("/{url}"));
        }
    }

    fn narinfos(&self, scene: &Scene, round: usize, figures: &mut Figures) {
        for server in in_turn(&self.narinfo, round) {
            let before = server.cpu.used();
            let load = scene.load(&self.hits, server.port, 64, scene.load_secs);
            assert!(
                load.refused == 0.0,
                "{}: {} refused",
                server.name,
                load.refused
            );
            let cpu = (server.cpu.used() - before).as_secs_f64() * 1e6;
            figures.add(
                HIT,
                "",
                server.name,
                Unit::Microseconds,
                cpu / load.requests,
            );
        }
        for server in in_turn(&self.narinfo[..2], round) {
            let before = server.cpu.used();
            let load = scene.load(&self.misses, server.port, 64, scene.load_secs);
            assert!(
                load.refused == load.requests,
                "{}: not all refused",
                server.name
            );
            let cpu = (server.cpu.used() - before).as_secs_f64() * 1e6;
            figures.add(
                MISS,
                "",
                server.name,
                Unit::Microseconds,
                cpu / load.requests,
            );
        }
        for server in in_turn(&self.narinfo[..2], round) {
            let load = scene.load(&self.hits, server.port, 1, scene.load_secs);
            figures.add(ONE, "", server.name, Unit::Microseconds, load.p50_us);
        }
    }

    /// Cached NARs: Muster, and nginx on Muster's own folder.
    fn nars(&self, scene: &Scene, round: usize, figures: &mut Figures) {
        let servers = [&self.narinfo[0], &self.files];
        for server in in_turn(&servers, round) {
            let targets = vec![self.nars[&scene.large].clone(); LARGE_TIMES];
            let gb = scene.large_gb();
            let cpu = fetch(&scene.m, server, &targets, 1);
            figures.add(LARGE, "", server.name, Unit::SecondsPerGb, cpu / gb);
        }
        for server in in_turn(&servers, round) {
            let once: Vec<_> = scene.medium.iter().map(|p| self.nars[p].clone()).collect();
            let targets: Vec<_> = std::iter::repeat_n(once, EIGHT_TIMES).flatten().collect();
            let gb = scene.medium_gb();
            let cpu = fetch(&scene.m, server, &targets, 8);
            figures.add(EIGHT, "", server.name, Unit::SecondsPerGb, cpu / gb);
        }
        for server in in_turn(&servers, round) {
            let tiny = scene.targets("tiny", std::iter::once(self.nars[&scene.tiny].clone()));
            let load = scene.load(&tiny, server.port, 1, scene.load_secs);
            figures.add(TINY, "", server.name, Unit::Microseconds, load.p99_us);
        }
        figures.add(
            MEMORY_NARS,
            "",
            MUSTER,
            Unit::Megabytes,
            self.muster.memory_kb() as f64 / 1000.0,
        );
    }

    /// The large NAR to a real client, the second time.
    fn clients(&self, scene: &Scene, client: &Machine, round: usize, figures: &mut Figures) {
        let key = self.muster.key();
        for server in in_turn(&[&self.narinfo[0], &self.files], round) {
            client.fresh_store();
            let url = format!("http://m:{}", server.port);
            let line = format!(
                "nix-store --realise {} --option substituters {url} --option trusted-public-keys '{key}'",
                scene.large
            );
            let got = client.run_for(120.0, &line).ok();
            assert_eq!((got.built(), got.copied()), (0, 1), "{got}");
            let version = client.name.trim_start_matches("c-");
            figures.add(SECOND, version, server.name, Unit::Seconds, got.secs);
        }
    }
}

/// Where Muster's time goes while narinfos are hit over 64 connections, by perf: its top lines, kernel and all.
fn profile(scene: &Scene) -> String {
    let muster = scene.muster();
    let narinfos = scene.small[..scene.narinfos].iter();
    let hits = scene.targets("profiled", narinfos.map(|p| narinfo_target(p)));
    scene.load(&hits, 5000, 64, scene.load_secs);
    let data = tempfile::NamedTempFile::new().expect("make a temporary file");
    let record = Command::new("perf")
        .args([
            "record",
            "-q",
            "-F",
            "1999",
            "-p",
            &muster.pid().to_string(),
        ])
        .arg("-o")
        .arg(data.path())
        .spawn();
    let mut record = record.expect("perf (package linux-perf) starts");
    let load = scene.load(&hits, 5000, 64, 2 * scene.load_secs);
    let pid = Pid::from_raw(record.id().try_into().expect("a pid"));
    kill_process(pid.expect("a pid"), Signal::INT).expect("end perf");
    record.wait().expect("wait for perf");
    let report = |sort: &str, least: &str| {
        let report = Command::new("perf")
            .args([
                "report",
                "--stdio",
                "--no-children",
                "-g",
                "none",
                "--sort",
                sort,
            ])
            .args(["--percent-limit", least, "-i"])
            .arg(data.path())
            .output()
            .expect("perf starts");
        let text = String::from_utf8_lossy(&report.stdout);
        let lines = text.lines().map(str::trim_end);
        let lines: Vec<_> = lines
            .filter(|l| !l.is_empty() && !l.starts_with('#'))
            .collect();
        lines.join("\n")
    };
    let (parts, lines) = (report("dso", "1"), report("dso,sym", "0.7"));
    format!("{:.0} narinfo hits\n\n{parts}\n\n{lines}\n", load.requests)
}

fn judge(scene: &Scene, figures: &mut Figures) {
    figures.set_goal(HIT, "", MUSTER, Goal::Times(0.70, NGINX));
    figures.set_goal(HIT, "", MUSTER, Goal::Times(1.0, NGINX_OPEN));
    figures.set_goal(HIT, "", NGINX_OPEN, Goal::Beside(NGINX));
    figures.set_goal(MISS, "", MUSTER, Goal::Times(0.85, NGINX));
    figures.set_goal(ONE, "", MUSTER, Goal::Times(1.0, NGINX));
    figures.set_goal(MEMORY, "", MUSTER, Goal::AtMost(1500.0));
    figures.set_goal(LARGE, "", MUSTER, Goal::Times(1.5, NGINX));
    figures.set_goal(EIGHT, "", MUSTER, Goal::Times(1.5, NGINX));
    figures.set_goal(TINY, "", MUSTER, Goal::AtMost(5000.0));
    figures.set_goal(TINY, "", MUSTER, Goal::Beside(NGINX));
    figures.set_goal(PEAK, "", MUSTER, Goal::Times(1.25, PEAK_TWO_WINDOWS));
    for client in &scene.clients {
        let version = client.name.trim_start_matches("c-");
        figures.set_goal(SECOND, version, MUSTER, Goal::Times(1.1, NGINX));
    }
}

/// Starts a program in a control group of its own, all of it from its first instruction.
fn accounted(machine: &Machine, name: &str, line: &str) -> (Process, CpuGroup) {
    let cpu = CpuGroup::new(name);
    machine.run(&format!("rm -f /run/go-{name}")).ok();
    let process = machine.spawn(
        name,
        &format!("sh -c 'while [ ! -e /run/go-{name} ]; do sleep 0.05; done; exec {line}'"),
    );
    assert!(
        eventually(5.0, || process.inner_pid().is_some()),
        "{name} does not start"
    );
    cpu.take(process.inner_pid().expect("just seen"));
    machine.write(&format!("/run/go-{name}"), "");
    (process, cpu)
}

/// Fetches targets, some at once, and returns the CPU time in s that the server took.
fn fetch(machine: &Machine, server: &Server, targets: &[String], at_once: usize) -> f64 {
    let mut list = String::new();
    for target in targets {
        _ = writeln!(
            list,
            "url = http://127.0.0.1:{}{target}\noutput = /dev/null",
            server.port
        );
    }
    machine.write("/run/fetch", &list);
    let before = server.cpu.used();
    let line = format!("curl -sSf -Z --parallel-max {at_once} -K /run/fetch");
    machine.run(&line).ok();
    (server.cpu.used() - before).as_secs_f64()
}

/// All of them, backwards in every second round.
fn in_turn<T>(all: &[T], round: usize) -> Vec<&T> {
    let mut turn: Vec<_> = all.iter().collect();
    if round % 2 == 1 {
        turn.reverse();
    }
    turn
}

/// How often a round fetches the large NAR, and the eight of 20 MB: with 11 pairs more than 10 GB of each.
const LARGE_TIMES: usize = 2;
const EIGHT_TIMES: usize = 6;

/// How often the memory of as many narinfos as there are is taken, and how many are looked at for their size.
const MEMORY_TIMES: usize = 3;
const TEXTS: usize = 200;

const MUSTER: &str = "muster";
const NGINX: &str = "nginx";
const NGINX_OPEN: &str = "nginx, open_file_cache";

const HIT: &str = "narinfo hit, 64 connections, CPU a request";
const MISS: &str = "narinfo 404 that is known, CPU a request";
const ONE: &str = "one connection, one narinfo at a time, p50";
const MEMORY: &str = "memory for each narinfo that is held";
const LARGE: &str = "cached NAR of 500 MB, CPU";
const EIGHT: &str = "8 cached NARs of 20 MB at once, CPU";
const TINY: &str = "cached small NAR on one connection, p99";
const MEMORY_NARS: &str = "memory after these NARs";
const PEAK: &str = "most memory, one NAR of 500 MB fetched, compressed and kept";
const PEAK_TWO_WINDOWS: &str = "a NAR of 64 MB";
const SECOND: &str = "second fetch of a NAR of 500 MB";
const OPEN_FILE_CACHE: &str = "open_file_cache max=100000 inactive=600s; open_file_cache_valid 600s; open_file_cache_errors on;";

const NGINX_CONF: &str = "\
daemon off; user root; worker_processes 2; pid /run/nginx-@port@.pid; error_log /run/nginx-@port@.err;
events { worker_connections 1024; }
http {
  access_log off; sendfile on; tcp_nopush on; tcp_nodelay on; keepalive_requests 100000000; log_not_found off;
  default_type application/octet-stream; @more@
  client_body_temp_path /run/nginx-@port@-1; proxy_temp_path /run/nginx-@port@-2; fastcgi_temp_path /run/nginx-@port@-3;
  uwsgi_temp_path /run/nginx-@port@-4; scgi_temp_path /run/nginx-@port@-5;
  server { listen @port@; root @root@; }
}
";
