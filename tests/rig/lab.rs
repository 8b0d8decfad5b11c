//! A lab: one bridge, one shared folder, any number of machines.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use super::helper;
use super::machine::Machine;
use super::nix::Nix;
use super::{eventually, process};

/// Machines that see each other and nothing else.
pub struct Lab {
    hub: Arc<Hub>,
    machines: AtomicU8,
}

impl Lab {
    /// A lab without machines. Panics with the reason where this system does not let us make one.
    pub fn new() -> Self {
        assert!(
            rustix::process::geteuid().is_root(),
            "the end-to-end tests make namespaces and overlay mounts: run them as root"
        );
        let dir = tempfile::Builder::new()
            .prefix("muster-lab-")
            .tempdir()
            .expect("make a folder for the lab")
            .keep();
        let share = dir.join("share");
        fs::create_dir_all(share.join("bin")).expect("make the shared folder");
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755))
            .expect("open the lab's folder");
        let hub = Hub::start(dir);
        place(&muster(), &share.join("bin/muster"));
        place(
            &std::env::current_exe().expect("own path"),
            &share.join("helper"),
        );
        helper::write_liar(&share).expect("write the liar");
        let workload = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/rig/workload.nix");
        fs::copy(workload, share.join("workload.nix")).expect("copy the workload");
        fs::write(share.join("hosts"), "127.0.0.1 localhost\n").expect("write the hosts");
        fs::write(share.join("known_hosts"), "").expect("write the known hosts");
        host(&format!(
            "ssh-keygen -q -t ed25519 -N '' -C lab -f {}/id_ed25519",
            share.display()
        ));
        Self {
            hub: Arc::new(hub),
            machines: AtomicU8::new(0),
        }
    }

    /// A running machine, known to all others by its name.
    pub fn machine(&self, name: &str, nix: Nix) -> Machine {
        let number = self.machines.fetch_add(1, Ordering::Relaxed);
        Machine::boot(Arc::clone(&self.hub), name, nix, number)
    }

    /// A machine with the Nix under test that answers ssh and builds.
    pub fn builder(&self, name: &str) -> Machine {
        let builder = self.machine(name, Nix::under_test());
        builder.sshd().daemon();
        builder
    }

    /// A machine with the Nix under test and these builders in its `/etc/nix/machines`.
    pub fn client(&self, builders: &[&str]) -> Machine {
        let client = self.machine("client", Nix::under_test());
        client.builders(builders);
        client
    }

    /// The folder that all machines see as `/lab`.
    pub fn share(&self) -> PathBuf {
        self.hub.share()
    }
}

/// The network that the machines hang on, and the keeper of their folder; outlives every machine.
pub struct Hub {
    dir: PathBuf,
    child: Mutex<Child>,
    pid: u32,
}

impl Hub {
    fn start(dir: PathBuf) -> Self {
        let log = fs::File::create(dir.join("hub.log")).expect("create the hub's log");
        let child = Command::new("unshare")
            .args(["--net", "--", "sh"])
            .arg(script("hub-init"))
            .arg(&dir)
            .stdin(Stdio::piped())
            .stdout(log.try_clone().expect("clone a log file"))
            .stderr(log)
            .process_group(0)
            .spawn()
            .expect("unshare (package util-linux) starts");
        let pid = child.id();
        let hub = Self {
            dir,
            child: Mutex::new(child),
            pid,
        };
        wait_for_up(&hub.dir.join("hub.log"), "the lab's network namespace");
        hub
    }

    pub fn share(&self) -> PathBuf {
        self.dir.join("share")
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Runs a shell line in the hub's network namespace.
    pub fn run(&self, line: &str) {
        host(&format!("nsenter -t {} -n -- sh -ec '{line}'", self.pid));
    }

    /// Lets every machine know one more name.
    pub fn introduce(&self, name: &str, address: &str, host_key: &str) {
        append(&self.share().join("hosts"), &format!("{address} {name}\n"));
        append(
            &self.share().join("known_hosts"),
            &format!("{name},{address} {host_key}\n"),
        );
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        let mut child = self
            .child
            .lock()
            .expect("nobody panics while holding the hub");
        drop(child.stdin.take());
        let _ = child.wait();
    }
}

/// The program under test: what cargo built, or the one that `MUSTER` names.
fn muster() -> PathBuf {
    std::env::var_os("MUSTER").map_or_else(|| env!("CARGO_BIN_EXE_muster").into(), PathBuf::from)
}

/// The path of one of the rig's scripts.
pub fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/rig")
        .join(name)
}

/// Runs a shell line on the host, which must succeed.
pub fn host(line: &str) -> String {
    process::run(
        Command::new("sh").args(["-ec", line]),
        b"",
        Duration::from_secs(30),
    )
    .ok()
    .out
}

/// Waits until a script's log says that it is up.
pub fn wait_for_up(log: &Path, what: &str) {
    let text = || fs::read_to_string(log).unwrap_or_default();
    let up = eventually(20.0, || text().lines().any(|line| line == "up"));
    assert!(
        up,
        "{what} does not come up; namespaces or overlayfs refused?\n{}",
        text()
    );
}

fn append(path: &Path, line: &str) {
    let file = fs::OpenOptions::new().append(true).open(path);
    file.and_then(|mut f| f.write_all(line.as_bytes()))
        .expect("append to a shared file");
}

/// Puts a program into the shared folder without copying it, where the file system allows.
fn place(program: &Path, to: &Path) {
    if fs::hard_link(program, to).is_err() {
        fs::copy(program, to).unwrap_or_else(|e| panic!("cannot copy {}: {e}", program.display()));
    }
}
