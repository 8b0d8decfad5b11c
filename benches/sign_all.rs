//! `muster sign-all` beside `nix store sign --all`; run by `benches/sign-all`, which installs what is needed.
//!
//! ```text
//!   stores   copies of one database with 10,000 (1,000) unsigned paths, a fresh one for every single time
//!   local    nix-daemon on a Unix socket; `NIX_REMOTE=daemon nix store sign --all`, and muster
//!   builder  the same behind real sshd and a line that holds every byte back for 20 ms, each way
//! ```
//!
//! Whatever is compared is taken in turn, forth and back, and a ratio is the median over pairs that ran one
//! after the other. Times are of whole processes; over ssh, what `--json` says: from the end of the login to
//! the last signature, of several builders the longest. Every store is verified after it was timed: each
//! of its paths carries the signature.

#[path = "../tests/builder/mod.rs"]
mod builder;

mod figures;

use std::env;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use builder::stores::RootedStore;
use builder::{Builder, Sshd};
use figures::{Figures, Goal, Unit};
use muster::nix::signature::{KeyName, SecretKey};
use serde_json::{Value, json};
use zeroize::Zeroizing;

#[test]
fn sign_all() {
    let number = |name| env::var(name).ok().and_then(|text| text.parse().ok());
    let pairs: Option<usize> = number("MUSTER_SIGN_PAIRS");
    // Run as a test of itself it is small, too.
    let quick = pairs.is_none() || env::var("MUSTER_SIGN_QUICK").is_ok_and(|text| !text.is_empty());
    let pairs = pairs.unwrap_or(1);
    let paths = if quick { 1000 } else { 10_000 };
    let scene = Scene::new();
    let (large, small) = (
        scene.builder.rooted_store("large", paths),
        scene.builder.rooted_store("small", paths / 10),
    );
    let mut figures = Figures::default();
    let large_what = format!("{paths} paths");
    let small_what = format!("{} paths each, 40 ms", paths / 10);
    for round in 0..pairs {
        eprintln!("-- round {} of {pairs}", round + 1);
        let mut turns: Vec<Turn> = Turn::ALL.to_vec();
        if round % 2 == 1 {
            turns.reverse();
        }
        for turn in turns {
            let (what, seconds) = match turn {
                Turn::Nix | Turn::Muster => (&large_what, scene.local(turn, &large)),
                Turn::Far => (&large_what, scene.far(&[&large])),
                Turn::One => (&small_what, scene.far(&[&small])),
                Turn::Three => (&small_what, scene.far(&[&small; 3])),
            };
            figures.add(what, "", turn.name(), Unit::Seconds, seconds);
        }
    }
    let mut goal = |what, turn: Turn, goal| figures.set_goal(what, "", turn.name(), goal);
    goal(
        &large_what,
        Turn::Muster,
        Goal::Times(1.0, Turn::Nix.name()),
    );
    goal(&large_what, Turn::Far, Goal::Plus(0.8, Turn::Muster.name()));
    goal(&small_what, Turn::Three, Goal::Times(1.3, Turn::One.name()));
    let about = format!(
        "{}, {pairs} rounds, {} processors",
        scene.version(),
        thread::available_parallelism().map_or(1, |n| n.get())
    );
    if let Some(file) = env::var_os("MUSTER_SIGN_JSON") {
        let text = json!({ "about": about, "figures": figures.json() });
        fs::write(file, format!("{text:#}\n")).expect("write the JSON file");
    }
    println!("\n{about}\n\n{}", figures.table());
}

/// What is timed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    Nix,
    Muster,
    Far,
    One,
    Three,
}

impl Turn {
    const ALL: [Self; 5] = [Self::Nix, Self::Muster, Self::Far, Self::One, Self::Three];

    fn name(self) -> &'static str {
        match self {
            Self::Nix => "nix, local daemon",
            Self::Muster => "muster, local daemon",
            Self::Far => "muster, ssh-ng, 40 ms",
            Self::One => "muster, one builder",
            Self::Three => "muster, three builders",
        }
    }
}

struct Scene {
    builder: Builder,
    sshd: Sshd,
    line: u16,
    key: SecretKey,
    key_file: PathBuf,
    muster: PathBuf,
}

impl Scene {
    fn new() -> Self {
        let builder = Builder::new();
        let sshd = builder.sshd("MaxStartups 30");
        let name = KeyName::new("signer-1").expect("a name");
        let key = SecretKey::from_seed(name, &Zeroizing::new([7; 32]));
        let key_file = builder.path("key");
        fs::write(&key_file, key.to_secret_text().as_bytes()).expect("write the key");
        fs::set_permissions(&key_file, fs::Permissions::from_mode(0o600)).expect("chmod");
        let muster = env::var_os("MUSTER").map(PathBuf::from);
        Self {
            line: slow_line(sshd.port),
            builder,
            sshd,
            key,
            key_file,
            muster: muster.unwrap_or_else(|| env!("CARGO_BIN_EXE_muster").into()),
        }
    }

    fn version(&self) -> String {
        assert_ne!(self.sshd.port, self.line);
        self.builder.run("nix", &["--version"]).trim().to_owned()
    }

    fn muster(&self) -> Command {
        let mut command = Command::new(&self.muster);
        command
            .arg("sign-all")
            .args(["--store-dir", self.builder.store_dir.as_str()])
            .arg("--secret-key-file")
            .arg(&self.key_file)
            .env("NIX_SSHOPTS", "-F none -oIdentityAgent=none");
        command
    }

    /// Signs a fresh copy through a daemon on this machine.
    fn local(&self, turn: Turn, store: &RootedStore<'_>) -> f64 {
        let store = store.copy();
        let daemon = store.daemon("");
        let mut command = if turn == Turn::Nix {
            let mut command = store.command("nix");
            command
                .args(["store", "sign", "--all", "--key-file"])
                .arg(&self.key_file)
                .env("NIX_REMOTE", "daemon")
                .env("NIX_DAEMON_SOCKET_PATH", &daemon.socket);
            command
        } else {
            let mut command = self.muster();
            command.arg("--store");
            command.arg(format!("unix://{}", daemon.socket.display()));
            command
        };
        let seconds = timed(&mut command);
        self.check(&store);
        seconds
    }

    /// Signs fresh copies behind the line; without what the login takes.
    fn far(&self, stores: &[&RootedStore<'_>]) -> f64 {
        let copies: Vec<_> = stores.iter().map(|store| store.copy()).collect();
        let mut command = self.muster();
        command.arg("--json");
        for store in &copies {
            command.args(["--store", &self.uri(store)]);
        }
        let output = run(&mut command);
        let json: Value = serde_json::from_slice(&output).expect("JSON");
        for store in &copies {
            self.check(store);
        }
        let of_each = json["stores"].as_array().expect("stores").iter();
        let of_each = of_each.map(|store| store["seconds"].as_f64().expect("seconds"));
        of_each.fold(0.0, f64::max)
    }

    fn check(&self, store: &RootedStore<'_>) {
        let (verified, words) = store.verify(&self.key.public().to_string());
        assert!(verified, "{words}");
    }

    fn uri(&self, store: &RootedStore<'_>) -> String {
        let host_key = STANDARD.encode(self.builder.host_key("host"));
        format!(
            "ssh-ng://127.0.0.1:{}?ssh-key={}&base64-ssh-public-host-key={}&remote-store={}",
            self.line,
            self.builder.path("user").display(),
            host_key.replace('+', "%2B").replace('=', "%3D"),
            store.uri().replace('?', "%3F").replace('=', "%3D"),
        )
    }
}

fn timed(command: &mut Command) -> f64 {
    let begun = Instant::now();
    run(command);
    begun.elapsed().as_secs_f64()
}

fn run(command: &mut Command) -> Vec<u8> {
    let output = command.stdin(Stdio::null()).output();
    let output = output.expect("run what is timed");
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {words}");
    output.stdout
}

/// Listens on a port whose bytes reach `target` half a round trip later, and back likewise.
fn slow_line(target: u16) -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let port = listener.local_addr().expect("its number").port();
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let Ok(server) = TcpStream::connect((Ipv4Addr::LOCALHOST, target)) else {
                continue;
            };
            for socket in [&client, &server] {
                socket.set_nodelay(true).expect("TCP_NODELAY");
            }
            let (to, from) = (server.try_clone(), client.try_clone());
            hold_back(client, to.expect("a second handle"));
            hold_back(server, from.expect("a second handle"));
        }
    });
    port
}

/// Passes bytes one way, each after its time, however many are under way.
fn hold_back(mut from: TcpStream, mut to: TcpStream) {
    let (sender, held) = mpsc::channel::<(Instant, Vec<u8>)>();
    thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(len) = from.read(&mut buffer) {
            let due = Instant::now() + ROUND_TRIP / 2;
            if sender.send((due, buffer[..len].to_vec())).is_err() || len == 0 {
                break;
            }
        }
    });
    thread::spawn(move || {
        for (due, bytes) in held {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            if bytes.is_empty() || to.write_all(&bytes).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Both);
    });
}

const ROUND_TRIP: Duration = Duration::from_millis(40);
