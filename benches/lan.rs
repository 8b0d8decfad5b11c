//! Muster on one LAN with real Nix, against nginx; run by `benches/lan`, which installs what is needed.
//!
//! ```text
//!   b1 b2 b3   builders: Nix 2.8, sshd, nix-daemon; b2 alone has the closure (4 KiB each, in layers); and, where
//!              said, a muster each over its own store
//!   silent     accepts TCP and never answers
//!   m          muster serve, and its builders in a machines file
//!   www        nginx, the same closure as `nix copy --to file://…?compression=zstd` wrote it
//!   c-2.8 …    clients: `nix-store --realise TOP` with an empty store and no ~/.cache/nix
//! ```
//!
//! Machines are the rig's: containers on one bridge. Whatever is compared is taken in turn, forth and back,
//! and a ratio is the median over pairs that ran one after the other, so that other load on the machine
//! falls on both. Muster is started anew for every single time, with nothing kept, connected (asked of `/healthz`)
//! and left alone for two seconds, as in benches/wan.rs, except where the figure is about the start.
//!
//! The machines' stores are in memory, unless it is told otherwise: to write 201 small paths takes the client up to
//! half a second on some disks, three times of all that is compared here.

#[path = "../tests/rig/mod.rs"]
mod rig;

mod figures;

use std::env;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use figures::{Figures, Goal, Unit};
use rig::muster::narinfo_target;
use rig::process::Process;
use rig::{Lab, Machine, Muster, Nix, Output, eventually};
use serde_json::json;

#[test]
fn lan() {
    let options = Options::from_environment();
    let scene = Scene::new(&options);
    let mut figures = Figures::default();
    for round in 0..options.pairs {
        eprintln!("-- round {} of {}", round + 1, options.pairs);
        scene.starts(&mut figures);
        for client in &scene.clients {
            let mut all = Via::ALL.to_vec();
            if round % 2 == 1 {
                all.reverse();
            }
            for via in all.iter().filter(|via| scene.takes(client, **via)) {
                scene.closure(client, *via, &mut figures);
            }
            for via in all.iter().filter(|via| via.can_miss()) {
                scene.misses(client, *via, &mut figures);
            }
        }
    }
    if options.ssh_ng {
        scene.plain(&mut figures);
    }
    scene.judge(&mut figures);
    let mut text = figures.json();
    text = json!({ "about": scene.about(&options), "figures": text });
    if let Some(file) = &options.json {
        fs::write(file, format!("{text:#}\n")).expect("write the JSON file");
    }
    println!("\n{}\n\n{}", scene.about(&options), figures.table());
}

struct Options {
    pairs: usize,
    clients: Vec<String>,
    /// Paths below the top of the closure.
    paths: usize,
    /// Whether to wait for what plain ssh-ng needs minutes for.
    ssh_ng: bool,
    json: Option<String>,
}

impl Options {
    fn from_environment() -> Self {
        let text = |name| env::var(name).ok().filter(|text| !text.is_empty());
        let quick = text("MUSTER_LAN_QUICK").is_some();
        let clients = text("MUSTER_LAN_NIX").unwrap_or_else(|| "2.8".into());
        Self {
            pairs: text("MUSTER_LAN_PAIRS").map_or(1, |n| n.parse().expect("a number of pairs")),
            clients: clients.split(' ').map(str::to_owned).collect(),
            paths: if quick { 40 } else { 200 },
            ssh_ng: text("MUSTER_LAN_NO_SSH_NG").is_none(),
            json: text("MUSTER_LAN_JSON"),
        }
    }
}

/// The roads to a closure.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Via {
    Nginx,
    Zstd,
    /// zstd, with NARs pulled when they are asked for and not before.
    NoNarsAhead,
    Plain,
    /// zstd, with one builder that was silent already when Muster started, while Muster still hopes.
    SilentAtStart,
    /// The same after Muster has given it up.
    Silent,
    /// The same when it falls silent after Muster is connected, just before the client asks.
    TurnsSilent,
    /// The builders run muster.
    Peers,
    /// The same when one of them falls silent, as [`Self::TurnsSilent`], and is asked.
    PeersTurnSilent,
    SshNg,
}

impl Via {
    const ALL: [Self; 10] = [
        Self::Nginx,
        Self::Zstd,
        Self::NoNarsAhead,
        Self::Plain,
        Self::SilentAtStart,
        Self::Silent,
        Self::TurnsSilent,
        Self::Peers,
        Self::PeersTurnSilent,
        Self::SshNg,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Nginx => NGINX,
            Self::Zstd => ZSTD,
            Self::NoNarsAhead => NO_NARS_AHEAD,
            Self::Plain => PLAIN,
            Self::SilentAtStart => SILENT_AT_START,
            Self::Silent => SILENT,
            Self::TurnsSilent => TURNS_SILENT,
            Self::Peers => PEERS,
            Self::PeersTurnSilent => PEERS_TURN_SILENT,
            Self::SshNg => SSH_NG,
        }
    }

    fn can_miss(self) -> bool {
        matches!(
            self,
            Self::Nginx
                | Self::Zstd
                | Self::Silent
                | Self::TurnsSilent
                | Self::Peers
                | Self::PeersTurnSilent
        )
    }

    fn turns_silent(self) -> bool {
        matches!(self, Self::TurnsSilent | Self::PeersTurnSilent)
    }
}

const NGINX: &str = "nginx";
const ZSTD: &str = "muster, zstd";
const NO_NARS_AHEAD: &str = "muster, zstd, no NARs ahead";
const PLAIN: &str = "muster, none";
const SILENT_AT_START: &str = "muster, zstd, one builder silent, in the first 5 s";
const SILENT: &str = "muster, zstd, one builder silent";
const TURNS_SILENT: &str = "muster, zstd, one builder turns silent";
const PEERS: &str = "muster, builders run muster";
const PEERS_TURN_SILENT: &str = "muster, builders run muster, one turns silent";
const SSH_NG: &str = "plain ssh-ng";

/// All machines, and what they have.
struct Scene {
    // Stopped before its machine.
    _nginx: Process,
    clients: Vec<Machine>,
    builders: Vec<Machine>,
    muster: Machine,
    www: Machine,
    top: String,
    paths: usize,
    /// The key that b2 signs with.
    key: String,
}

impl Scene {
    fn new(options: &Options) -> Self {
        let lab = Lab::new();
        let builder = |name| {
            let builder = lab.machine(name, Nix::Debian12);
            builder.sshd().daemon();
            // A store without any path is not read in place.
            builder.build_one("tiny", "");
            builder
        };
        let builders: Vec<_> = ["b1", "b2", "b3"].map(builder).into();
        let silent = lab.machine("silent", Nix::Debian12);
        silent.hang();
        let b2 = &builders[1];
        let key = b2.signs_as("b2-1");
        let top = b2.build_one("dag", &format!("--arg n {}", options.paths));
        let cache = "file:///lab/www?compression=zstd&secret-key=/etc/nix/secret";
        b2.run(&format!("nix copy --to '{cache}' {top}")).ok();

        let www = lab.machine("www", Nix::Debian12);
        www.write("/etc/lab-nginx.conf", NGINX_CONF);
        let nginx = www.spawn("nginx", "nginx -c /etc/lab-nginx.conf");
        www.await_port(80);

        let muster = lab.machine("m", Nix::Debian12);
        muster.builders(&["b1", "b2", "b3"]);
        let all = muster.read("/etc/nix/machines");
        muster.write("/etc/muster-no-nars-ahead.toml", "prefetch-nars = 0\n");
        muster.write("/etc/nix/machines.silent", &all.replace("@b1", "@silent"));
        let peers = ["b1", "b2", "b3"]
            .map(|name| format!("[[upstreams]]\nuri = \"http://{name}:5000\"\ntrusted = true\n"));
        let peers = format!("machines = false\n{}", peers.concat());
        muster.write("/etc/muster-peers.toml", &peers);
        let client = |version: &String| {
            let nix = Nix::named(version);
            lab.machine(&format!("c-{version}"), nix)
        };
        Self {
            _nginx: nginx,
            clients: options.clients.iter().map(client).collect(),
            builders: builders.into_iter().chain([silent]).collect(),
            muster,
            www,
            top,
            paths: options.paths + 1,
            key,
        }
    }

    /// Plain ssh-ng takes Nix 2.8 and 2.26 minutes: they log in anew for each path.
    fn takes(&self, client: &Machine, via: Via) -> bool {
        via != Via::SshNg || client.nix == Nix::Sid
    }

    /// The closure by one road, with nothing kept anywhere.
    fn closure(&self, client: &Machine, via: Via, figures: &mut Figures) {
        let _peers = self.start_peers(via);
        let (muster, url, key) = self.serve(via);
        client.fresh_store();
        let _silent = self.silence(via);
        let got = self.realise(client, &url, &key, 60.0);
        let log = muster.as_ref().map(Muster::log).unwrap_or_default();
        let got = got.ok();
        assert_eq!((got.built(), got.copied()), (0, self.paths), "{got}\n{log}");
        figures.add(
            CLOSURE,
            version(client),
            via.name(),
            Unit::Seconds,
            got.secs,
        );
        if let Some(muster) = muster {
            figures.add(
                MEMORY_AFTER,
                "",
                via.name(),
                Unit::Megabytes,
                megabytes(&muster),
            );
        }
    }

    /// A dry run of as many paths that nobody has.
    fn misses(&self, client: &Machine, via: Via, figures: &mut Figures) {
        let _peers = self.start_peers(via);
        let (_muster, url, key) = self.serve(via);
        client.fresh_store();
        let args = format!("--arg n {} --argstr seed nobody", self.paths - 1);
        let derivation = client.instantiate("dag", &args).concat();
        let line = format!(
            "nix-store --realise --dry-run {derivation} {}",
            using(&url, &key)
        );
        let _silent = self.silence(via);
        let got = client.run_for(60.0, &line).ok();
        assert!(got.err.contains("will be built"), "{got}");
        figures.add(MISSES, version(client), via.name(), Unit::Seconds, got.secs);
    }

    /// Starts what a road needs; the URL and the key for the client.
    fn serve(&self, via: Via) -> (Option<Muster<'_>>, String, String) {
        let args = match via {
            Via::Nginx => return (None, "http://www".into(), self.key.clone()),
            Via::SshNg => return (None, SSH_NG_URLS.into(), self.key.clone()),
            Via::Zstd | Via::TurnsSilent => "",
            Via::NoNarsAhead => "--config /etc/muster-no-nars-ahead.toml",
            Via::Plain => "--compression none",
            Via::Peers | Via::PeersTurnSilent => "--config /etc/muster-peers.toml",
            Via::Silent | Via::SilentAtStart => "--machines /etc/nix/machines.silent",
        };
        self.muster.run(FORGET).ok();
        let mut muster = Muster::start(&self.muster, &format!("--listen 0.0.0.0:5000 {args}"));
        let well = if args.contains("silent") { 2 } else { 3 };
        self.await_well(&mut muster, well);
        match via {
            Via::Silent => thread::sleep(Duration::from_secs(6)),
            // Sessions for NARs log in, too, each with some 100 ms of CPU on both sides.
            _ => thread::sleep(Duration::from_secs(2)),
        }
        let (url, key) = (muster.url(), muster.key());
        (Some(muster), url, key)
    }

    /// Starts a muster on each builder, over its own store alone, where the road is theirs.
    fn start_peers(&self, via: Via) -> Vec<Process> {
        if !matches!(via, Via::Peers | Via::PeersTurnSilent) {
            return Vec::new();
        }
        let start = |builder: &Machine| {
            builder.run(FORGET).ok();
            let line = "muster serve --no-machines --listen 0.0.0.0:5000";
            let peer = builder.spawn("muster", line);
            builder.await_port(5000);
            peer
        };
        self.builders[..3].iter().map(start).collect()
    }

    /// Stops the builder that is to fall silent until the result is dropped.
    fn silence(&self, via: Via) -> Option<Frozen<'_>> {
        via.turns_silent().then(|| {
            self.builders[0].freeze();
            let frozen = Frozen(&self.builders[0]);
            if via == Via::PeersTurnSilent {
                // Until then the answer is known from its catalog, and it is not asked at all.
                thread::sleep(CATALOG_STALE);
            }
            frozen
        })
    }

    fn await_well(&self, muster: &mut Muster<'_>, well: usize) {
        let ask = "busybox wget -q -O - http://127.0.0.1:5000/healthz";
        let count = || {
            self.muster
                .run(ask)
                .out
                .matches(r#""state":"well""#)
                .count()
        };
        assert!(eventually(20.0, || count() == well), "{}", muster.log());
    }

    fn realise(&self, client: &Machine, url: &str, key: &str, limit: f64) -> Output {
        let line = format!("nix-store --realise {} {}", self.top, using(url, key));
        client.run_for(limit, &line)
    }

    /// Muster's start until its first answers, and its memory when it is connected.
    fn starts(&self, figures: &mut Figures) {
        let run = format!(
            "env MUSTER_LAN_START=/nix-cache-info,{} /lab/helper --exact first_answers --ignored --nocapture",
            narinfo_target(&self.top)
        );
        let got = self.muster.run(&run).ok();
        let words: Vec<_> = got
            .out
            .lines()
            .filter_map(|l| l.strip_prefix("answered "))
            .collect();
        assert_eq!(words.len(), 2, "{got}");
        for (words, what) in words.iter().zip([FIRST_INFO, FIRST_NARINFO]) {
            let (status, ms) = words.split_once(' ').expect("a status and a time");
            assert_eq!(status, "200", "{got}");
            figures.add(
                what,
                "",
                "",
                Unit::Milliseconds,
                ms.parse().expect("a number"),
            );
        }
        let (muster, ..) = self.serve(Via::Zstd);
        let muster = muster.expect("this road starts one");
        thread::sleep(Duration::from_secs(2));
        figures.add(MEMORY, "", "", Unit::Megabytes, megabytes(&muster));
    }

    /// What plain Nix does without Muster: once, because it takes minutes.
    fn plain(&self, figures: &mut Figures) {
        for client in &self.clients {
            if !self.takes(client, Via::SshNg) {
                client.fresh_store();
                let got = self.realise(client, SSH_NG_URLS, &self.key, PLAIN_LIMIT);
                figures.add(
                    CLOSURE,
                    version(client),
                    &ended(&got, SSH_NG),
                    Unit::Seconds,
                    got.secs,
                );
            }
            client.fresh_store();
            let urls = SSH_NG_URLS.replace("b1", "silent");
            let got = self.realise(client, &urls, &self.key, HANGING_LIMIT);
            let via = ended(&got, "plain ssh-ng, one builder silent");
            figures.add(CLOSURE, version(client), &via, Unit::Seconds, got.secs);
        }
    }

    fn judge(&self, figures: &mut Figures) {
        for client in self.clients.iter().map(version) {
            figures.set_goal(CLOSURE, client, ZSTD, Goal::Times(1.1, NGINX));
            figures.set_goal(CLOSURE, client, NO_NARS_AHEAD, Goal::Beside(NGINX));
            figures.set_goal(CLOSURE, client, PLAIN, Goal::Times(1.1, NGINX));
            figures.set_goal(CLOSURE, client, SILENT_AT_START, Goal::Plus(0.1, ZSTD));
            figures.set_goal(CLOSURE, client, SILENT, Goal::Plus(0.1, ZSTD));
            figures.set_goal(CLOSURE, client, TURNS_SILENT, Goal::Plus(0.1, ZSTD));
            figures.set_goal(CLOSURE, client, PEERS, Goal::Beside(NGINX));
            figures.set_goal(CLOSURE, client, PEERS_TURN_SILENT, Goal::Plus(0.1, PEERS));
            figures.set_goal(CLOSURE, client, SSH_NG, Goal::Beside(NGINX));
            figures.set_goal(MISSES, client, ZSTD, Goal::Times(1.2, NGINX));
            figures.set_goal(MISSES, client, SILENT, Goal::Plus(0.05, ZSTD));
            figures.set_goal(MISSES, client, TURNS_SILENT, Goal::Plus(1.5, ZSTD));
            figures.set_goal(MISSES, client, PEERS, Goal::Beside(NGINX));
            figures.set_goal(MISSES, client, PEERS_TURN_SILENT, Goal::Plus(1.5, PEERS));
        }
        figures.set_goal(FIRST_INFO, "", "", Goal::AtMost(100.0));
        figures.set_goal(MEMORY, "", "", Goal::AtMost(20.0));
    }

    fn about(&self, options: &Options) -> String {
        let cores = thread::available_parallelism().map_or(0, std::num::NonZero::get);
        let nix = |m: &Machine| m.run("nix --version").out.trim().to_owned();
        let versions: Vec<_> = self.clients.iter().map(nix).collect();
        let nginx = self.www.run("nginx -v").err;
        format!(
            "{} small paths, {} pairs, all machines on {cores} cores, {}; clients {}; builders and nginx: {}, {}; load {}",
            self.paths,
            options.pairs,
            figures::stores(),
            versions.join(", "),
            nix(&self.builders[0]),
            nginx.trim(),
            fs::read_to_string("/proc/loadavg")
                .unwrap_or_default()
                .trim(),
        )
    }
}

/// A builder that accepts and says nothing, until this is dropped.
struct Frozen<'m>(&'m Machine);

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        self.0.thaw();
    }
}

fn using(url: &str, key: &str) -> String {
    format!("--option substituters '{url}' --option trusted-public-keys '{key}'")
}

fn version(client: &Machine) -> &str {
    client.name.trim_start_matches("c-")
}

fn megabytes(muster: &Muster<'_>) -> f64 {
    f64::from(u32::try_from(muster.memory_kb()).expect("less than 4 TB")) / 1000.0
}

fn ended(got: &Output, via: &str) -> String {
    match got.rc {
        0 => via.to_owned(),
        Output::TIMED_OUT => format!("{via}: not done, killed"),
        _ => format!("{via}: failed"),
    }
}

/// Runs in Muster's machine: starts it, and takes the time until it answers.
#[test]
#[ignore = "no test, but a program that runs inside a machine"]
fn first_answers() {
    let Ok(targets) = env::var("MUSTER_LAN_START") else {
        return;
    };
    let address = "127.0.0.1:5001";
    let start = Instant::now();
    let mut muster = Command::new("muster")
        .args(["serve", "--listen", address])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("muster starts");
    for target in targets.split(',') {
        let status = loop {
            if let Some(status) = ask(address, target) {
                break status;
            }
            assert!(start.elapsed().as_secs() < 20, "no answer to {target}");
            thread::sleep(Duration::from_micros(200));
        };
        println!(
            "\nanswered {status} {:.2}",
            start.elapsed().as_secs_f64() * 1000.0
        );
    }
    muster.kill().expect("muster is still there");
    muster.wait().expect("muster ends");
}

fn ask(address: &str, target: &str) -> Option<String> {
    let mut stream = TcpStream::connect(address).ok()?;
    let head = format!("GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).ok()?;
    let mut text = Vec::new();
    stream.read_to_end(&mut text).ok()?;
    let text = String::from_utf8_lossy(&text).into_owned();
    text.split(' ').nth(1).map(str::to_owned)
}

const CLOSURE: &str = "closure of small paths, cold";
const MISSES: &str = "as many paths that nobody has, dry run";
const FIRST_INFO: &str = "start to the first /nix-cache-info";
const FIRST_NARINFO: &str = "start to the first narinfo of a builder's path";
const MEMORY: &str = "memory, idle, three builders connected";
const MEMORY_AFTER: &str = "memory after the closure";

/// More than the second for which a catalog without heartbeats is believed, and less than the five after which
/// its feed is left.
const CATALOG_STALE: Duration = Duration::from_millis(1500);

const SSH_NG_URLS: &str = "ssh-ng://b1 ssh-ng://b2 ssh-ng://b3";
const PLAIN_LIMIT: f64 = 300.0;
const HANGING_LIMIT: f64 = 30.0;

/// What a muster has kept.
const FORGET: &str = "rm -rf /var/cache/muster /root/.cache/muster";

const NGINX_CONF: &str = "\
daemon off; user root; worker_processes 2; pid /run/nginx.pid; error_log /run/nginx.err;
events { worker_connections 1024; }
http {
  access_log off; sendfile on; tcp_nodelay on; keepalive_requests 100000;
  default_type application/octet-stream;
  client_body_temp_path /run/nginx-1; proxy_temp_path /run/nginx-2; fastcgi_temp_path /run/nginx-3;
  uwsgi_temp_path /run/nginx-4; scgi_temp_path /run/nginx-5;
  server { listen 80; root /lab/www; }
}
";
