//! Commands with an end: run bounded by time, or in the background until dropped.
//!
//! Each command is a process group of its own, so that Ctrl-C at the terminal reaches the test process
//! alone and a command's children end with it.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

/// How a command ended and what it said.
#[derive(Debug, Clone)]
pub struct Output {
    /// The exit status; 128 + N after signal N, [`Output::TIMED_OUT`] when the time was over.
    pub rc: i32,
    pub out: String,
    pub err: String,
    pub secs: f64,
}

impl Output {
    pub const TIMED_OUT: i32 = 124;

    /// Itself, when the command succeeded.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert!(self.rc == 0, "the command failed\n{self}");
        self
    }

    /// Itself, when the command failed in time.
    #[track_caller]
    pub fn failed(self) -> Self {
        assert!(
            self.rc != 0 && self.rc != Self::TIMED_OUT,
            "the command should have failed\n{self}"
        );
        self
    }

    /// How many derivations Nix says it built; over ssh-ng it announces each twice.
    pub fn built(&self) -> usize {
        let named = |line: &'_ str| {
            Some(
                line.strip_prefix("building '")?
                    .split('\'')
                    .next()?
                    .to_owned(),
            )
        };
        self.err
            .lines()
            .filter_map(named)
            .collect::<BTreeSet<_>>()
            .len()
    }

    /// The paths that Nix says it copied.
    pub fn copied(&self) -> usize {
        self.err
            .lines()
            .filter(|l| l.starts_with("copying path '"))
            .count()
    }
}

impl std::fmt::Display for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let tail = |text: &str| {
            let skipped = text.chars().count().saturating_sub(4000);
            text.chars().skip(skipped).collect::<String>()
        };
        write!(
            f,
            "rc {} after {:.2} s\n-- out\n{}\n-- err\n{}",
            self.rc,
            self.secs,
            tail(&self.out),
            tail(&self.err)
        )
    }
}

/// Runs a command to its end, or kills it and all its children when `limit` is over.
pub fn run(command: &mut Command, input: &[u8], limit: Duration) -> Output {
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .unwrap_or_else(|e| panic!("cannot run {command:?}: {e}"));
    let group = child.id();
    let mut stdin = child.stdin.take().expect("stdin is piped");
    let input = input.to_vec();
    thread::spawn(move || stdin.write_all(&input));
    let out = collect(child.stdout.take().expect("stdout is piped"));
    let err = collect(child.stderr.take().expect("stderr is piped"));
    let (done, status) = mpsc::channel();
    thread::spawn(move || done.send(child.wait()));
    let rc = match status.recv_timeout(limit) {
        Ok(status) => exit_code(status.expect("wait for a child")),
        Err(_) => {
            signal_group(group, Signal::KILL);
            Output::TIMED_OUT
        }
    };
    let secs = start.elapsed().as_secs_f64();
    // A grandchild that left the group may hold the pipes open: what is there by then must do.
    let patience = Duration::from_secs(2);
    Output {
        rc,
        out: out.recv_timeout(patience).unwrap_or_default(),
        err: err.recv_timeout(patience).unwrap_or_default(),
        secs,
    }
}

fn collect(mut from: impl Read + Send + 'static) -> Receiver<String> {
    let (done, text) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = from.read_to_end(&mut bytes);
        let _ = done.send(String::from_utf8_lossy(&bytes).into_owned());
    });
    text
}

fn exit_code(status: ExitStatus) -> i32 {
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// A command in the background; killed when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    out: PathBuf,
    err: PathBuf,
}

impl Process {
    /// Starts a command whose stdout and stderr go to `<log>.out` and `<log>.err`.
    pub fn spawn(command: &mut Command, log: &Path) -> Self {
        let (out, err) = (log.with_extension("out"), log.with_extension("err"));
        let file = |path| File::create(path).expect("create a log file");
        let child = command
            .stdin(Stdio::null())
            .stdout(file(&out))
            .stderr(file(&err))
            .process_group(0)
            .spawn()
            .unwrap_or_else(|e| panic!("cannot start {command:?}: {e}"));
        Self { child, out, err }
    }

    /// What it has written to stdout up to now.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.out).unwrap_or_default()).into_owned()
    }

    /// What it has written to stderr up to now.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.err).unwrap_or_default()).into_owned()
    }

    /// The pid, in the host's eyes, of the program that `nsenter` started for us.
    pub fn inner_pid(&self) -> Option<u32> {
        let id = self.child.id();
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).ok()?;
        children.split_whitespace().next()?.parse().ok()
    }

    /// Signals the program itself, not the `nsenter` around it, so that its exit status reaches us.
    pub fn signal(&self, signal: Signal) {
        if let Some(pid) = self.inner_pid() {
            signal_process(pid, signal);
        }
    }

    /// The exit status, once it has ended.
    pub fn ended(&mut self) -> Option<i32> {
        self.child
            .try_wait()
            .expect("wait for a child")
            .map(exit_code)
    }

    /// The exit status, if it ends within `secs`.
    pub fn wait(&mut self, secs: f64) -> Option<i32> {
        super::eventually(secs, || self.ended().is_some());
        self.ended()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.ended().is_none() {
            self.signal(Signal::KILL);
            if self.wait(1.0).is_none() {
                signal_group(self.child.id(), Signal::KILL);
                let _ = self.child.wait();
            }
        }
    }
}

/// Signals one process; one that is gone already is no error.
pub fn signal_process(pid: u32, signal: Signal) {
    if let Some(pid) = pid.try_into().ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, signal);
    }
}

fn signal_group(group: u32, signal: Signal) {
    if let Some(pid) = group.try_into().ok().and_then(Pid::from_raw) {
        let _ = kill_process_group(pid, signal);
    }
}
