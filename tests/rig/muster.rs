//! `muster serve`, running in a machine as an operator would run it.

use std::fs;
use std::path::PathBuf;

use rustix::process::Signal;

use super::eventually;
use super::helper;
use super::http::{self, Response};
use super::machine::Machine;
use super::process::Process;

/// A running `muster serve`; killed when dropped, and its log is shown if the test failed.
pub struct Muster<'m> {
    machine: &'m Machine,
    process: Process,
    relay: Option<(Process, PathBuf)>,
}

impl<'m> Muster<'m> {
    /// Starts `muster serve` with these arguments and waits until it has said its lines for `nix.conf`.
    #[track_caller]
    pub fn serve(machine: &'m Machine, args: &str) -> Self {
        let mut muster = Self::start(machine, args);
        let said = eventually(20.0, || {
            muster.lines().len() == 3 || muster.process.ended().is_some()
        });
        assert!(
            said && muster.lines().len() == 3,
            "muster serve {args} does not start\n{}",
            muster.log()
        );
        muster
    }

    /// Starts `muster serve` and does not wait.
    pub fn start(machine: &'m Machine, args: &str) -> Self {
        Self::start_with(machine, "", args)
    }

    /// Starts `muster serve` in an environment such as `A=1 B=2` and does not wait.
    pub fn start_with(machine: &'m Machine, environment: &str, args: &str) -> Self {
        if std::env::var("MUSTER_TEST_AHEAD").is_ok_and(|set| set == "off") {
            nothing_ahead(machine, args);
        }
        let process = machine.spawn("muster", &format!("env {environment} muster serve {args}"));
        Self {
            machine,
            process,
            relay: None,
        }
    }

    /// The lines for `nix.conf` that it printed.
    pub fn lines(&self) -> Vec<String> {
        let line = |l: &str| {
            NIX_CONF
                .iter()
                .any(|start| l.trim_start().starts_with(start))
        };
        self.process
            .out()
            .lines()
            .filter(|l| line(l))
            .map(|l| l.trim().to_owned())
            .collect()
    }

    /// The URL that it told users to add.
    pub fn url(&self) -> String {
        self.setting("extra-substituters")
    }

    /// The public keys that it told users to trust.
    pub fn key(&self) -> String {
        self.setting("extra-trusted-public-keys")
    }

    fn setting(&self, name: &str) -> String {
        let lines = self.lines();
        let value = lines.iter().find_map(|l| {
            l.strip_prefix(name)?
                .trim()
                .strip_prefix('=')
                .map(str::trim)
        });
        value
            .unwrap_or_else(|| panic!("muster printed no {name}\n{}", self.log()))
            .to_owned()
    }

    /// All that it printed.
    pub fn log(&self) -> String {
        format!(
            "-- muster's stdout\n{}-- muster's stderr\n{}",
            self.process.out(),
            self.process.err()
        )
    }

    /// Asks for a target such as `/nix-cache-info`.
    pub fn get(&mut self, target: &str) -> Response {
        self.request("GET", target, &[])
    }

    /// Asks for a store path's narinfo.
    pub fn narinfo(&mut self, path: &str) -> Response {
        self.get(&narinfo_target(path))
    }

    /// Asks for the NAR that a store path's narinfo names.
    #[track_caller]
    pub fn nar(&mut self, path: &str) -> Response {
        let narinfo = self.narinfo(path);
        let url = narinfo.field("URL");
        let url = url
            .unwrap_or_else(|| panic!("no narinfo of {path}: {}\n{}", narinfo.status, self.log()));
        self.get(&format!("/{url}"))
    }

    /// Asks over HTTP, on the first TCP address that it listens on.
    pub fn request(&mut self, method: &str, target: &str, headers: &[(&str, &str)]) -> Response {
        http::request(&self.socket(), method, target, headers)
    }

    /// A socket on the host that leads to its first TCP address.
    pub fn socket(&mut self) -> PathBuf {
        if self.relay.is_none() {
            let address = self
                .url()
                .trim_start_matches("http://")
                .trim_end_matches('/')
                .to_owned();
            let name = format!(
                "http-{}-{}",
                self.machine.name,
                self.process.inner_pid().unwrap_or(0)
            );
            let relay = helper::start(
                self.machine,
                &name,
                &format!("relay unix:/lab/{name} {address} 0 0 0"),
            );
            self.relay = Some((relay, self.machine.share().join(name)));
        }
        self.relay
            .as_ref()
            .map(|(_, path)| path.clone())
            .expect("the relay was started")
    }

    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// The exit status, if it ends within `secs`.
    pub fn wait(&mut self, secs: f64) -> Option<i32> {
        self.process.wait(secs)
    }

    /// Waits until its log has a text.
    #[track_caller]
    pub fn await_log(&self, secs: f64, text: &str) {
        assert!(
            eventually(secs, || self.log().contains(text)),
            "no {text:?} in the log\n{}",
            self.log()
        );
    }

    /// Its pid, in the host's eyes.
    pub fn pid(&self) -> u32 {
        self.process.inner_pid().expect("muster runs")
    }

    /// Its resident memory, in kB.
    pub fn memory_kb(&self) -> u64 {
        self.status_kb("VmRSS:")
    }

    /// The most that its resident memory ever was, in kB.
    pub fn memory_peak_kb(&self) -> u64 {
        self.status_kb("VmHWM:")
    }

    fn status_kb(&self, name: &str) -> u64 {
        let pid = self.pid();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("read /proc");
        let line = status.lines().find_map(|l| l.strip_prefix(name));
        line.and_then(|l| l.split_whitespace().next()?.parse().ok())
            .expect("the kernel tells")
    }
}

impl Drop for Muster<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}: {}", self.machine.name, self.log());
        }
    }
}

/// Turns off in the configuration what is done before it is asked for, and what is known without a question.
fn nothing_ahead(machine: &Machine, args: &str) {
    let mut words = args.split_whitespace();
    let named = words.find(|word| *word == "--config").and(words.next());
    let file = named.unwrap_or("/etc/muster/muster.toml");
    let said = fs::read_to_string(machine.path(file)).unwrap_or_default();
    let mut text = String::new();
    for line in [
        "prefetch = false\n",
        "catalog = false\n",
        "local-store = \"daemon\"\n",
    ] {
        let (key, _) = line.split_once('=').expect("a key and its value");
        if !said.lines().any(|l| l.starts_with(key)) {
            text += line;
        }
    }
    machine.write(file, &(text + &said));
}

/// What clients ask for to learn about a store path.
pub fn narinfo_target(path: &str) -> String {
    let hash: String = path
        .trim_start_matches("/nix/store/")
        .chars()
        .take_while(|c| *c != '-')
        .collect();
    format!("/{hash}.narinfo")
}

/// What the lines for `nix.conf` start with.
const NIX_CONF: [&str; 3] = [
    "extra-substituters",
    "extra-trusted-public-keys",
    "narinfo-cache-negative-ttl",
];

impl Machine {
    /// Uses the lines that a Muster printed, and no more: all that a client knows.
    pub fn substitutes_from(&self, muster: &Muster<'_>) {
        self.configure(&muster.lines().join("\n"));
    }

    /// Writes `/etc/nix/machines`: these builders over ssh-ng.
    pub fn builders(&self, names: &[&str]) {
        let lines: String = names
            .iter()
            .map(|n| format!("ssh-ng://root@{n} x86_64-linux\n"))
            .collect();
        self.write("/etc/nix/machines", &lines);
    }
}
