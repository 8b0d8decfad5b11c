//! Muster near its client, builders and nginx behind a line; run by `benches/wan`, which installs what is needed.
//!
//! ```text
//!   c-2.8 … m  --- here
//!      line: 20 ms each way, 1 Gbit/s, for ssh and http alike; as wide as the machine, or 100 Mbit/s where said
//!   b1 b2 b3   builders: Nix 2.8, sshd, nix-daemon; b2 alone has the closures and the large path
//!              and, where said, a muster each over its own store, asked over the same line or past it
//!   www        nginx, the same paths as `nix copy --to file://…?compression=zstd` wrote them
//! ```
//!
//! The line is the rig's relay: each byte arrives 20 ms after it was sent, and a connection's first ones a round
//! trip later still. It has no slow start and loses nothing, to the gain of both sides. One as wide as the machine
//! measures the processors, which two musters, the client and the line share here: it has a row, and no goal.
//!
//! Whatever is compared is taken in turn, forth and back, as in benches/lan.rs; Muster is started anew for every
//! single time, on the builders too, with nothing kept, connected, and left alone for two seconds. The machines' stores
//! are in memory unless it is told otherwise, as there. Paths that are looked up while large NARs run are known to no
//! Muster before.

#[path = "../tests/rig/mod.rs"]
mod rig;

mod figures;
#[path = "figures/load.rs"]
#[expect(dead_code, reason = "what benches/compare.rs and benches/scale.rs use")]
mod load;

use std::env;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use figures::{Figures, Goal, Unit};
use rig::process::Process;
use rig::{Lab, Line, Machine, Muster, Nix, eventually};
use serde_json::json;

#[test]
fn wan() {
    let options = Options::from_environment();
    let scene = Scene::new(&options);
    let mut figures = Figures::default();
    for round in 0..options.pairs {
        eprintln!("-- round {} of {}", round + 1, options.pairs);
        for client in &scene.clients {
            for via in in_turn(Via::ALL, round) {
                scene.closure(client, via, &scene.top, CLOSURE, &mut figures);
            }
            for via in in_turn(Via::DEEP, round) {
                scene.closure(client, via, &scene.deep, DEEP, &mut figures);
            }
            for via in in_turn(Via::MISSING, round) {
                scene.misses(client, via, &mut figures);
            }
            if options.large_mib > 0 {
                for via in in_turn([Via::Nginx, Via::Muster, Via::Peers], round) {
                    scene.large(client, via, LARGE, &mut figures);
                }
                scene.reach(0);
                for via in in_turn([Via::Nginx, Via::Peers], round) {
                    scene.large(client, via, LARGE_WIDE, &mut figures);
                }
                scene.reach(WIDTH);
            }
        }
        if options.large_mib > 0 {
            scene.cat(&mut figures);
            for via in in_turn(Via::LOADED, round) {
                scene.loaded(via, &mut figures);
            }
            scene.narrow(WIDTH);
        }
    }
    scene.judge(&mut figures);
    let about = scene.about(&options);
    if let Some(file) = &options.json {
        let text = json!({ "about": about, "figures": figures.json() });
        fs::write(file, format!("{text:#}\n")).expect("write the JSON file");
    }
    println!("\n{about}\n\n{}", figures.table());
}

struct Options {
    pairs: usize,
    clients: Vec<String>,
    /// Paths below the top of the closure.
    paths: usize,
    /// Of the one large path; 0: none.
    large_mib: u32,
    delay_ms: u64,
    json: Option<String>,
}

impl Options {
    fn from_environment() -> Self {
        let text = |name| env::var(name).ok().filter(|text| !text.is_empty());
        let number = |name, default| text(name).map_or(default, |n| n.parse().expect("a number"));
        let quick = text("MUSTER_WAN_QUICK").is_some();
        let clients = text("MUSTER_WAN_NIX").unwrap_or_else(|| "2.34".into());
        Self {
            pairs: number("MUSTER_WAN_PAIRS", 1) as usize,
            clients: clients.split(' ').map(str::to_owned).collect(),
            paths: if quick { 40 } else { 200 },
            large_mib: if quick {
                0
            } else {
                number("MUSTER_WAN_LARGE", 300)
            },
            delay_ms: u64::from(number("MUSTER_WAN_DELAY", 20)),
            json: text("MUSTER_WAN_JSON"),
        }
    }
}

/// The roads to a closure.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Via {
    Nginx,
    /// The same without the line: what the client itself takes.
    NginxNear,
    Muster,
    /// Without NARs pulled ahead.
    NoNars,
    /// Level by level, and without them.
    Levels,
    /// Level by level, with NARs pulled ahead.
    LevelsAndNars,
    /// With nothing fetched ahead.
    Nothing,
    /// The builders run muster.
    Peers,
    /// The same without the line: the LAN's figure.
    PeersNear,
    /// The builders run muster, and a closure is asked for level by level.
    PeersLevels,
    /// The builders run muster, and nothing is fetched ahead.
    PeersNothing,
    /// The builders run muster, and each path is asked for: what none of them has is not known from catalogs.
    PeersNoCatalog,
}

impl Via {
    const ALL: [Self; 8] = [
        Self::Nginx,
        Self::NginxNear,
        Self::Muster,
        Self::Peers,
        Self::PeersNear,
        Self::NoNars,
        Self::Levels,
        Self::Nothing,
    ];

    /// The roads to a closure of many layers: the whole at once, level by level, path by path.
    const DEEP: [Self; 7] = [
        Self::Nginx,
        Self::Muster,
        Self::LevelsAndNars,
        Self::Nothing,
        Self::Peers,
        Self::PeersLevels,
        Self::PeersNothing,
    ];

    /// The roads on which paths are asked for that nobody has.
    const MISSING: [Self; 5] = [
        Self::Nginx,
        Self::Muster,
        Self::Peers,
        Self::PeersNear,
        Self::PeersNoCatalog,
    ];

    /// The roads on which paths are looked up while large NARs run.
    const LOADED: [Self; 3] = [Self::Muster, Self::Peers, Self::PeersNoCatalog];

    fn name(self) -> &'static str {
        match self {
            Self::Nginx => NGINX,
            Self::NginxNear => NGINX_NEAR,
            Self::Muster => MUSTER,
            Self::NoNars => "muster, no NARs ahead",
            Self::Levels => "muster, level by level, no NARs ahead",
            Self::LevelsAndNars => "muster, level by level",
            Self::Nothing => "muster, nothing ahead",
            Self::Peers => PEERS,
            Self::PeersLevels => "muster, builders run muster, level by level",
            Self::PeersNothing => "muster, builders run muster, nothing ahead",
            Self::PeersNear => PEERS_NEAR,
            Self::PeersNoCatalog => PEERS_NO_CATALOG,
        }
    }

    /// The port of the builders' musters: behind the line, or their own.
    fn peers(self) -> Option<u16> {
        match self {
            Self::Peers | Self::PeersLevels | Self::PeersNothing | Self::PeersNoCatalog => {
                Some(5000)
            }
            Self::PeersNear => Some(PEER_PORT),
            _ => None,
        }
    }

    fn config(self) -> &'static str {
        match self {
            Self::Nginx | Self::NginxNear | Self::Muster | Self::Peers | Self::PeersNear => "",
            Self::NoNars => "prefetch-nars = 0",
            Self::Levels => "prefetch-nars = 0\nprefetch-closure = false",
            Self::LevelsAndNars | Self::PeersLevels => "prefetch-closure = false\n",
            Self::Nothing | Self::PeersNothing => "prefetch = false\n",
            Self::PeersNoCatalog => "catalog = false\n",
        }
    }
}

const NGINX: &str = "nginx over the line";
const NGINX_NEAR: &str = "nginx, no line";
const MUSTER: &str = "muster";
const PEERS: &str = "muster, builders run muster";
const PEERS_NEAR: &str = "muster, builders run muster, no line";
const PEERS_NO_CATALOG: &str = "muster, builders run muster, no catalog";

/// What a road needs while it is taken.
struct Road<'a> {
    muster: Option<Muster<'a>>,
    /// The builders' musters.
    _peers: Vec<Process>,
    url: String,
    key: String,
}

struct Scene {
    // Stopped before its machine.
    _nginx: Process,
    clients: Vec<Machine>,
    builders: Vec<Machine>,
    muster: Machine,
    www: Machine,
    top: String,
    /// Of a closure of as many paths in [`LAYERS`], the top of which refers to the last one alone.
    deep: String,
    large: Vec<String>,
    /// Which nothing refers to that is asked for, and which refer to nothing.
    small: Vec<String>,
    paths: usize,
    /// The key that b2 signs with.
    key: String,
    delay_ms: u64,
}

impl Scene {
    fn new(options: &Options) -> Self {
        let lab = Lab::new();
        let builder = |name| {
            let builder = lab.machine(name, Nix::Debian12);
            builder.daemon();
            // A store without any path is not read in place.
            builder.build_one("tiny", "");
            builder
        };
        let builders: Vec<_> = ["b1", "b2", "b3"].map(builder).into();
        let b2 = &builders[1];
        let key = b2.signs_as("b2-1");
        let top = b2.build_one("dag", &format!("--arg n {}", options.paths));
        let width = options.paths / LAYERS;
        let args = format!(
            "--arg n {} --arg width {width} --argstr seed deep",
            options.paths
        );
        let deep = b2.build_one("deep", &args);
        let large = |number: u32| {
            let args = format!("--arg sizeMB {} --argstr seed {number}", options.large_mib);
            b2.build_one("big", &args)
        };
        let large: Vec<_> = (0..4)
            .filter(|_| options.large_mib > 0)
            .map(large)
            .collect();
        let mut small = Vec::new();
        if options.large_mib > 0 {
            load::add_small(b2, &mut small, LOOKED_UP, 0);
        }
        let cache = "file:///lab/www?compression=zstd&secret-key=/etc/nix/secret";
        let first = large.first().cloned().unwrap_or_default();
        b2.run(&format!("nix copy --to '{cache}' {top} {deep} {first}"))
            .ok();

        for builder in &builders {
            builder.behind(line(options.delay_ms, WIDTH));
        }
        let www = lab.machine("www", Nix::Debian12);
        www.write("/etc/lab-nginx.conf", NGINX_CONF);
        let nginx = www.spawn("nginx", "nginx -c /etc/lab-nginx.conf");
        www.await_port(8080);

        let muster = lab.machine("m", Nix::Debian12);
        muster.builders(&["b1", "b2", "b3"]);
        let client = |version: &String| {
            let client = lab.machine(&format!("c-{version}"), Nix::named(version));
            // As the anchors were taken: 2.8 fetches as many paths at once as it may build.
            client.configure("max-jobs = 16");
            client
        };
        let scene = Self {
            _nginx: nginx,
            clients: options.clients.iter().map(client).collect(),
            builders,
            muster,
            www,
            top,
            deep,
            large,
            small,
            paths: options.paths + 1,
            key,
            delay_ms: options.delay_ms,
        };
        scene.reach(WIDTH);
        scene
    }

    /// Puts a line of so many bytes a second before nginx and the builders' musters.
    fn reach(&self, bytes_per_second: u64) {
        let line = line(self.delay_ms, bytes_per_second);
        for builder in &self.builders {
            builder.reach_over(5000, PEER_PORT, line);
        }
        self.www.reach_over(80, 8080, line);
    }

    fn closure(&self, client: &Machine, via: Via, top: &str, what: &str, figures: &mut Figures) {
        let road = self.serve(via);
        client.fresh_store();
        let line = format!("nix-store --realise {top} {}", road.using());
        let got = client.run_for(120.0, &line);
        let log = road.muster.as_ref().map(Muster::log).unwrap_or_default();
        let got = got.ok();
        assert_eq!((got.built(), got.copied()), (0, self.paths), "{got}\n{log}");
        figures.add(what, version(client), via.name(), Unit::Seconds, got.secs);
        if road.muster.is_some() && env::var_os("MUSTER_WAN_SHOW").is_some() {
            let report = self.muster.run(HEALTHZ).out;
            let machines = std::iter::once(&self.muster).chain(&self.builders);
            let cpu: Vec<_> = machines.map(|m| (&m.name, cpu_ms(m, "muster"))).collect();
            eprintln!(
                "{}: {:.3} s, CPU of muster in ms {cpu:?} {report}\n{log}",
                via.name(),
                got.secs
            );
        }
    }

    /// A dry run of as many paths that nobody has.
    fn misses(&self, client: &Machine, via: Via, figures: &mut Figures) {
        let road = self.serve(via);
        client.fresh_store();
        let args = format!("--arg n {} --argstr seed nobody", self.paths - 1);
        let derivation = client.instantiate("dag", &args).concat();
        let using = road.using();
        let line = format!("nix-store --realise --dry-run {derivation} {using}");
        let got = client.run_for(60.0, &line).ok();
        assert!(got.err.contains("will be built"), "{got}");
        figures.add(MISSES, version(client), via.name(), Unit::Seconds, got.secs);
    }

    fn large(&self, client: &Machine, via: Via, what: &str, figures: &mut Figures) {
        let road = self.serve(via);
        client.fresh_store();
        let line = format!("nix-store --realise {} {}", self.large[0], road.using());
        let got = client.run_for(120.0, &line).ok();
        assert_eq!((got.built(), got.copied()), (0, 1), "{got}");
        figures.add(what, version(client), via.name(), Unit::Seconds, got.secs);
    }

    /// The same bytes by ssh alone, login and all.
    fn cat(&self, figures: &mut Figures) {
        let line = format!("ssh root@b2 cat {} > /dev/null", self.large[0]);
        let got = self.muster.run_for(120.0, &line).ok();
        for client in &self.clients {
            figures.add(LARGE, version(client), CAT, Unit::Seconds, got.secs);
        }
    }

    /// Puts all of b2 behind a line of so many bytes a second.
    fn narrow(&self, bytes_per_second: u64) {
        self.builders[1].behind(line(self.delay_ms, bytes_per_second));
        let line = line(self.delay_ms, bytes_per_second);
        self.builders[1].reach_over(5000, PEER_PORT, line);
    }

    /// Look-ups while four large NARs run over a thin line: of what nobody has and of what b2 alone has, each for
    /// the first time.
    fn loaded(&self, via: Via, figures: &mut Figures) {
        self.narrow(THIN);
        let (mut muster, _peers) = self.start(via);
        let url = muster.url();
        let mut nars = Vec::new();
        for (place, path) in self.large.iter().enumerate() {
            let target = muster.narinfo(path).field("URL").expect("a URL");
            let line = format!("busybox wget -q -O /dev/null {url}/{target}");
            nars.push(self.muster.spawn(&format!("nar-{place}"), &line));
        }
        thread::sleep(Duration::from_secs(5));
        let absent = (0..self.small.len()).map(|n| format!("/nix/store/{n:032}-nobody"));
        let absent: Vec<_> = absent.collect();
        for (what, paths, status) in [
            (LOADED_ABSENT, &absent, 404),
            (LOADED_PRESENT, &self.small, 200),
        ] {
            let waits: Vec<_> = paths
                .iter()
                .map(|path| wait(&mut muster, path, status))
                .collect();
            for percent in [50, 99] {
                let via = format!("{}, p{percent}", via.name());
                let wait = percentile(&waits, percent);
                figures.add(what, "", &via, Unit::Milliseconds, wait);
            }
        }
        let running = nars
            .iter_mut()
            .filter_map(|nar| nar.ended().is_none().then_some(()));
        assert_eq!(
            running.count(),
            4,
            "not all NARs ran meanwhile\n{}",
            muster.log()
        );
    }

    /// Starts what a road needs.
    fn serve(&self, via: Via) -> Road<'_> {
        let nginx = match via {
            Via::Nginx => Some("http://www"),
            Via::NginxNear => Some("http://www:8080"),
            _ => None,
        };
        if let Some(url) = nginx {
            return Road {
                muster: None,
                _peers: Vec::new(),
                url: url.into(),
                key: self.key.clone(),
            };
        }
        let (muster, peers) = self.start(via);
        Road {
            url: muster.url(),
            key: muster.key(),
            muster: Some(muster),
            _peers: peers,
        }
    }

    /// Starts a muster on each builder, over its own store alone.
    fn start_peers(&self) -> Vec<Process> {
        let start = |builder: &Machine| {
            builder.run(FORGET).ok();
            let line = format!("muster serve --no-machines --listen 0.0.0.0:{PEER_PORT}");
            let peer = builder.spawn("muster", &line);
            builder.await_port(PEER_PORT);
            peer
        };
        self.builders.iter().map(start).collect()
    }

    fn start(&self, via: Via) -> (Muster<'_>, Vec<Process>) {
        let file = "/etc/muster.toml";
        let mut config = via.config().to_owned();
        let mut peers = Vec::new();
        if let Some(port) = via.peers() {
            peers = self.start_peers();
            config.push_str("machines = false\n");
            for builder in &self.builders {
                let uri = format!("http://{}:{port}", builder.name);
                config.push_str(&format!("[[upstreams]]\nuri = \"{uri}\"\ntrusted = true\n"));
            }
        }
        self.muster.run(FORGET).ok();
        self.muster.write(file, &config);
        let args = format!("--config {file} --listen 0.0.0.0:5000");
        let muster = Muster::start(&self.muster, &args);
        let well = || {
            self.muster
                .run(HEALTHZ)
                .out
                .matches(r#""state":"well""#)
                .count()
        };
        assert!(eventually(30.0, || well() == 3), "{}", muster.log());
        // Sessions for NARs and closures log in, too.
        thread::sleep(Duration::from_secs(2));
        (muster, peers)
    }

    fn judge(&self, figures: &mut Figures) {
        for client in self.clients.iter().map(version) {
            for via in Via::ALL {
                figures.set_goal(CLOSURE, client, via.name(), Goal::Beside(NGINX));
            }
            for via in [Via::Muster, Via::Peers] {
                figures.set_goal(DEEP, client, via.name(), Goal::Beside(NGINX));
            }
            for via in [Via::LevelsAndNars, Via::Nothing] {
                figures.set_goal(DEEP, client, via.name(), Goal::Beside(MUSTER));
            }
            for via in [Via::PeersLevels, Via::PeersNothing] {
                figures.set_goal(DEEP, client, via.name(), Goal::Beside(PEERS));
            }
            figures.set_goal(CLOSURE, client, MUSTER, Goal::AtMost(1.0));
            figures.set_goal(CLOSURE, client, PEERS, Goal::AtMost(0.6));
            figures.set_goal(MISSES, client, MUSTER, Goal::AtMost(0.6));
            figures.set_goal(MISSES, client, PEERS, Goal::Times(1.2, PEERS_NEAR));
            figures.set_goal(MISSES, client, PEERS_NO_CATALOG, Goal::Beside(PEERS));
            figures.set_goal(LARGE, client, MUSTER, Goal::Times(1.1, CAT));
            figures.set_goal(LARGE, client, PEERS, Goal::Times(1.0, NGINX));
            figures.set_goal(LARGE_WIDE, client, PEERS, Goal::Beside(NGINX));
        }
        for via in Via::LOADED {
            let via = format!("{}, p99", via.name());
            for what in [LOADED_ABSENT, LOADED_PRESENT] {
                figures.set_goal(what, "", &via, Goal::AtMost(250.0));
            }
        }
    }

    fn about(&self, options: &Options) -> String {
        let cores = thread::available_parallelism().map_or(0, std::num::NonZero::get);
        let nix = |m: &Machine| m.run("nix --version").out.trim().to_owned();
        let versions: Vec<_> = self.clients.iter().map(nix).collect();
        format!(
            "{} small paths, {} pairs, {} ms each way, 1 Gbit/s, all machines on {cores} cores, {}; clients {}; builders and nginx: {}, {}; load {}",
            self.paths,
            options.pairs,
            options.delay_ms,
            figures::stores(),
            versions.join(", "),
            nix(&self.builders[0]),
            self.www.run("nginx -v").err.trim(),
            fs::read_to_string("/proc/loadavg")
                .unwrap_or_default()
                .trim(),
        )
    }
}

/// How long the narinfo of a path takes, in ms.
fn wait(muster: &mut Muster<'_>, path: &str, status: u16) -> f64 {
    let asked = Instant::now();
    let got = muster.narinfo(path);
    let wait = asked.elapsed().as_secs_f64() * 1000.0;
    assert_eq!(got.status, status, "{path}\n{}", muster.log());
    wait
}

fn percentile(waits: &[f64], percent: usize) -> f64 {
    let mut sorted = waits.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[(sorted.len() * percent).div_ceil(100) - 1]
}

/// CPU time that a machine's processes of this name have taken, in ms.
fn cpu_ms(machine: &Machine, name: &str) -> u64 {
    let ticks = machine.processes(name).into_iter().filter_map(|pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // utime and stime, behind the name in its brackets.
        let (_, rest) = stat.rsplit_once(") ")?;
        let words = rest.split(' ').skip(11).take(2);
        Some(words.filter_map(|n| n.parse::<u64>().ok()).sum::<u64>())
    });
    ticks.sum::<u64>() * 10
}

impl Road<'_> {
    fn using(&self) -> String {
        let Self { url, key, .. } = self;
        format!("--option substituters '{url}' --option trusted-public-keys '{key}'")
    }
}

fn line(delay_ms: u64, bytes_per_second: u64) -> Line {
    Line {
        delay_ms,
        bytes_per_second,
        ..Line::default()
    }
}

/// All of them, backwards in every second round.
fn in_turn<const N: usize>(mut all: [Via; N], round: usize) -> [Via; N] {
    if round % 2 == 1 {
        all.reverse();
    }
    all
}

fn version(client: &Machine) -> &str {
    client.name.trim_start_matches("c-")
}

const CLOSURE: &str = "closure of small paths, cold";
const DEEP: &str = "closure of small paths in 20 layers, cold";
const MISSES: &str = "as many paths that nobody has, dry run";
const LARGE: &str = "one large path";
const LARGE_WIDE: &str = "one large path, line as wide as the machine";
const LOADED_ABSENT: &str = "look-up of what nobody has, four large NARs run over 100 Mbit/s";
const LOADED_PRESENT: &str = "look-up of what is there, four large NARs run over 100 Mbit/s";
const CAT: &str = "bare ssh cat";

/// Bytes a second of the line: 1 Gbit/s.
const WIDTH: u64 = 1_000_000_000 / 8;
/// 100 Mbit/s.
const THIN: u64 = WIDTH / 10;

/// Paths of each kind that are looked up while large NARs run, one after the other.
const LOOKED_UP: usize = 100;

/// Of the deep closure, below its top.
const LAYERS: usize = 20;

/// Where the builders' musters listen, beyond the line.
const PEER_PORT: u16 = 5001;

/// What a muster has kept.
const FORGET: &str = "rm -rf /var/cache/muster /root/.cache/muster";

const HEALTHZ: &str = "busybox wget -q -O - http://127.0.0.1:5000/healthz";

const NGINX_CONF: &str = "\
daemon off; user root; worker_processes 2; pid /run/nginx.pid; error_log /run/nginx.err;
events { worker_connections 1024; }
http {
  access_log off; sendfile on; tcp_nodelay on; keepalive_requests 100000;
  default_type application/octet-stream;
  client_body_temp_path /run/nginx-1; proxy_temp_path /run/nginx-2; fastcgi_temp_path /run/nginx-3;
  uwsgi_temp_path /run/nginx-4; scgi_temp_path /run/nginx-5;
  server { listen 8080; root /lab/www; }
}
";
