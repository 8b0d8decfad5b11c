//! A machine: a container with a `/nix`, a network address and processes of its own.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::process::Signal;

use super::eventually;
use super::lab::{self, Hub};
use super::nix::Nix;
use super::process::{self, Output, Process, signal_process};
use super::services::Services;

/// A running machine; all inside ends when it is dropped.
pub struct Machine {
    pub name: String,
    pub address: String,
    pub nix: Nix,
    pub(super) services: Mutex<Services>,
    hub: Arc<Hub>,
    dir: PathBuf,
    interface: String,
    unshare: Mutex<Child>,
    pid: u32,
}

impl Machine {
    pub(super) fn boot(hub: Arc<Hub>, name: &str, nix: Nix, number: u8) -> Self {
        let lower = nix.root();
        let dir = hub.dir().join(name);
        fs::create_dir_all(dir.join("log")).expect("make the machine's folder");
        let address = format!("10.77.0.{}", 11 + number);
        prepare(&dir.join("files"), &hub);
        let host_key = fs::read_to_string(dir.join("files/etc/ssh/lab_host_key.pub"))
            .expect("read the host key");
        hub.introduce(name, &address, host_key.trim());

        let log = fs::File::create(dir.join("init.log")).expect("create the machine's log");
        let unshare = Command::new("unshare")
            .args([
                "--mount",
                "--uts",
                "--ipc",
                "--pid",
                "--net",
                "--fork",
                "--kill-child",
                "--",
                "sh",
            ])
            .arg(lab::script("machine-init"))
            .args([
                name.as_ref(),
                dir.as_os_str(),
                lower.as_os_str(),
                hub.share().as_os_str(),
            ])
            .stdin(Stdio::piped())
            .stdout(log.try_clone().expect("clone a log file"))
            .stderr(log)
            .process_group(0)
            .spawn()
            .expect("unshare (package util-linux) starts");
        lab::wait_for_up(&dir.join("init.log"), name);
        let pid = only_child(unshare.id());
        let interface = format!("m{number}");
        hub.run(&format!(
            "ip link add {interface} type veth peer name eth0 netns {pid}; \
             ip link set {interface} master hub; ip link set {interface} up"
        ));
        let machine = Self {
            name: name.to_owned(),
            address,
            nix,
            services: Mutex::default(),
            hub,
            dir,
            interface,
            unshare: Mutex::new(unshare),
            pid,
        };
        machine.run_net(&format!(
            "ip addr add {}/24 dev eth0; ip link set eth0 up",
            machine.address
        ));
        machine
    }

    /// Runs a shell line inside, for two minutes at most.
    pub fn run(&self, line: &str) -> Output {
        self.run_for(120.0, line)
    }

    /// Runs a shell line inside, for `secs` at most.
    pub fn run_for(&self, secs: f64, line: &str) -> Output {
        self.run_with_input(secs, line, b"")
    }

    /// Runs a shell line inside with something to read on stdin.
    pub fn run_with_input(&self, secs: f64, line: &str, input: &[u8]) -> Output {
        let mut command = self.inside();
        command.args(["sh", "-c", line]);
        process::run(&mut command, input, Duration::from_secs_f64(secs))
    }

    /// Starts a shell line in the background; it is killed when the answer is dropped.
    pub fn spawn(&self, log: &str, line: &str) -> Process {
        let mut command = self.inside();
        command.args(["sh", "-c", &format!("exec {line}")]);
        Process::spawn(&mut command, &self.dir.join("log").join(log))
    }

    /// The host's view of a path inside.
    pub fn path(&self, inside: &str) -> PathBuf {
        let inside = inside.trim_start_matches('/');
        match inside.strip_prefix("nix/") {
            Some(rest) => self.dir.join("nix").join(rest),
            None => Path::new(&format!("/proc/{}/root", self.pid)).join(inside),
        }
    }

    /// Writes a file inside, with its folders.
    pub fn write(&self, inside: &str, text: &str) {
        let path = self.path(inside);
        fs::create_dir_all(path.parent().expect("a file has a folder")).expect("make a folder");
        fs::write(&path, text).unwrap_or_else(|e| panic!("cannot write {inside}: {e}"));
    }

    /// Reads a file inside.
    pub fn read(&self, inside: &str) -> String {
        fs::read_to_string(self.path(inside))
            .unwrap_or_else(|e| panic!("cannot read {inside}: {e}"))
    }

    /// Sets a file's permissions.
    pub fn chmod(&self, inside: &str, mode: u32) {
        fs::set_permissions(self.path(inside), fs::Permissions::from_mode(mode)).expect("chmod");
    }

    /// The processes inside whose `/proc/<pid>/comm` starts with `name`, by their pids on the host.
    /// The two that keep the machine up are never among them.
    pub fn processes(&self, name: &str) -> Vec<u32> {
        let Ok(namespace) = fs::read_link(format!("/proc/{}/ns/pid", self.pid)) else {
            return Vec::new();
        };
        let pids = fs::read_dir("/proc")
            .expect("read /proc")
            .filter_map(|e| e.ok()?.file_name().to_str()?.parse::<u32>().ok());
        pids.filter(|&pid| pid != self.pid)
            .filter(|pid| {
                fs::read_link(format!("/proc/{pid}/ns/pid")).is_ok_and(|n| n == namespace)
            })
            .filter(|pid| {
                fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|s| !s.contains(") Z "))
            })
            .filter(|pid| {
                let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
                comm.starts_with(name) && comm.trim() != "cat"
            })
            .collect()
    }

    /// Signals every process whose name starts so, sshd's sessions and the daemon's workers included.
    pub fn signal(&self, name: &str, signal: Signal) {
        for pid in self.processes(name) {
            signal_process(pid, signal);
        }
    }

    /// Kills every process whose name starts so and waits until they are gone.
    pub fn kill(&self, name: &str) {
        // One that was just forked is not seen the first time.
        let gone = eventually(5.0, || {
            self.signal(name, Signal::KILL);
            self.processes(name).is_empty()
        });
        assert!(gone, "{}: {name} does not die", self.name);
    }

    /// Runs a shell line of the host's tools in this machine's network.
    pub fn run_net(&self, line: &str) {
        lab::host(&format!("nsenter -t {} -n -- sh -ec '{line}'", self.pid));
    }

    /// Pulls the network cable, or puts it back: existing connections hear nothing, new ones find no host.
    pub fn unplug(&self, out: bool) {
        let state = if out { "down" } else { "up" };
        self.hub
            .run(&format!("ip link set {} {state}", self.interface));
    }

    pub(super) fn share(&self) -> PathBuf {
        self.hub.share()
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    pub(super) fn listens(&self, port: u16) -> bool {
        let tables =
            ["tcp", "tcp6"].map(|t| fs::read_to_string(format!("/proc/{}/net/{t}", self.pid)));
        let listening = |line: &str| {
            let mut words = line.split_whitespace().skip(1);
            let local = words
                .next()
                .is_some_and(|w| w.ends_with(&format!(":{port:04X}")));
            local && words.nth(1) == Some("0A")
        };
        tables
            .iter()
            .flatten()
            .any(|table| table.lines().any(listening))
    }

    /// Whether a Unix socket is listened on; its file is there a little earlier.
    pub(super) fn listens_on(&self, socket: &str) -> bool {
        let table = fs::read_to_string(format!("/proc/{}/net/unix", self.pid));
        let listening = |line: &str| {
            line.split_whitespace().nth(3) == Some("00010000") && line.ends_with(socket)
        };
        table.is_ok_and(|table| table.lines().any(listening))
    }

    fn inside(&self) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args([
                "-t",
                &self.pid.to_string(),
                "-m",
                "-u",
                "-i",
                "-n",
                "-p",
                "-r",
                "-w",
                "--",
            ])
            .env_clear()
            .env("HOME", "/root")
            .env("USER", "root")
            .env("LANG", "C.UTF-8")
            .env(
                "PATH",
                "/lab/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            );
        command
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.services.lock().map(|mut s| s.clear()).ok();
        let mut unshare = self
            .unshare
            .lock()
            .expect("nobody panics while holding the machine");
        signal_process(self.pid, Signal::KILL);
        let _ = unshare.wait();
    }
}

/// Lays out what the machine finds in its root: keys, ssh's and Nix's configuration.
fn prepare(files: &Path, hub: &Hub) {
    let share = hub.share();
    let write = |path: &str, text: &str| -> io::Result<()> {
        let path = files.join(path);
        fs::create_dir_all(path.parent().expect("a file has a folder"))?;
        fs::write(&path, text)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))
    };
    let read = |name: &str| fs::read_to_string(share.join(name));
    let all = || -> io::Result<()> {
        write("root/.ssh/id_ed25519", &read("id_ed25519")?)?;
        write("root/.ssh/authorized_keys", &read("id_ed25519.pub")?)?;
        write("root/.ssh/config", SSH_CONFIG)?;
        write("etc/nix/nix.conf", super::nix::CONF)?;
        fs::set_permissions(
            files.join("etc/nix/nix.conf"),
            fs::Permissions::from_mode(0o644),
        )?;
        fs::create_dir_all(files.join("etc/ssh"))
    };
    all().expect("lay out the machine's files");
    host_key(&files.join("etc/ssh/lab_host_key"));
}

/// Makes an ssh host key, replacing one that is there.
pub(super) fn host_key(path: &Path) {
    let path = path.display();
    lab::host(&format!(
        "rm -f {path} {path}.pub; ssh-keygen -q -t ed25519 -N '' -C '' -f {path}"
    ));
}

fn only_child(pid: u32) -> u32 {
    let children =
        fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let first = children
        .split_whitespace()
        .next()
        .and_then(|c| c.parse().ok());
    first.unwrap_or_else(|| panic!("unshare {pid} has no child"))
}

const SSH_CONFIG: &str = "\
Host *
  StrictHostKeyChecking yes
  UserKnownHostsFile /lab/known_hosts
  BatchMode yes
  LogLevel ERROR
";
