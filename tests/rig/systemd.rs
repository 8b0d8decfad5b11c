//! A machine of the lab that a real systemd has booted: units run as they run for an operator.
//!
//! Its root is this very machine's under a private layer, its network the [`Machine`]'s. Needs the packages
//! systemd and systemd-container, as `tests/run` installs them.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::lab;
use super::machine::Machine;
use super::process::{self, Output};
use super::{eventually, nix};

/// A booted systemd; all inside ends when it is dropped.
pub struct Systemd<'m> {
    machine: &'m Machine,
    child: Child,
    leader: u32,
}

impl<'m> Systemd<'m> {
    /// Boots in a machine's network. Panics with the log where that takes more than a minute.
    #[track_caller]
    pub fn boot(machine: &'m Machine) -> Self {
        let log_path = machine.dir().join("systemd.log");
        let log = fs::File::create(&log_path).expect("create the log");
        let files = machine.dir().join("files/etc/nix");
        fs::create_dir_all(&files).expect("make a folder");
        fs::write(files.join("nix.conf"), nix::CONF).expect("write nix.conf");
        let child = Command::new("nsenter")
            .args(["-t", &machine.pid().to_string(), "-n", "--"])
            .args(["unshare", "--mount", "--", "sh"])
            .arg(lab::script("systemd-init"))
            .args([machine.dir(), &machine.share()])
            .stdin(Stdio::piped())
            .stdout(log.try_clone().expect("clone a log file"))
            .stderr(log)
            .process_group(0)
            .spawn()
            .expect("nsenter (package util-linux) starts");
        let text = || fs::read_to_string(&log_path).unwrap_or_default();
        let up = eventually(90.0, || text().lines().any(|line| line == "up"));
        assert!(up, "systemd does not boot\n{}", text());
        let leader = text()
            .lines()
            .find_map(|line| line.strip_prefix("leader ")?.parse().ok());
        Self {
            machine,
            child,
            leader: leader.expect("the script names the leader before it says up"),
        }
    }

    /// Runs a shell line inside as root, for two minutes at most.
    pub fn run(&self, line: &str) -> Output {
        let mut command = Command::new("nsenter");
        command
            .args(["-t", &self.leader.to_string()])
            .args(["-m", "-u", "-i", "-n", "-p", "-r", "-w", "--"])
            .env_clear()
            .env("HOME", "/root")
            .env("USER", "root")
            .env("LANG", "C.UTF-8")
            .env(
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            )
            .args(["sh", "-c", line]);
        process::run(&mut command, b"", Duration::from_secs(120))
    }

    /// The host's view of a path inside.
    pub fn path(&self, inside: &str) -> PathBuf {
        let root = format!("/proc/{}/root", self.leader);
        Path::new(&root).join(inside.trim_start_matches('/'))
    }

    /// Writes a file inside with its permissions, and its folders.
    pub fn write(&self, inside: &str, mode: u32, text: &str) {
        let path = self.path(inside);
        fs::create_dir_all(path.parent().expect("a file has a folder")).expect("make a folder");
        fs::write(&path, text).unwrap_or_else(|e| panic!("cannot write {inside}: {e}"));
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
    }

    /// What the unit's processes wrote, and what systemd says of it.
    pub fn journal(&self, unit: &str) -> String {
        self.run(&format!(
            "systemctl status --no-pager --lines=0 '{unit}'; journalctl --no-pager --output=cat --unit='{unit}'"
        ))
        .out
    }

    /// Waits until a unit's log has a text.
    #[track_caller]
    pub fn await_log(&self, unit: &str, secs: f64, text: &str) {
        assert!(
            eventually(secs, || self.journal(unit).contains(text)),
            "no {text:?} in the log of {unit}\n{}",
            self.journal(unit)
        );
    }

    /// One property of a unit, as systemd holds it.
    pub fn property(&self, unit: &str, name: &str) -> String {
        let line = format!("systemctl show --property={name} --value '{unit}'");
        self.run(&line).ok().out.trim().to_owned()
    }

    /// The machine whose network it has.
    pub fn machine(&self) -> &Machine {
        self.machine
    }
}

impl Drop for Systemd<'_> {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}
