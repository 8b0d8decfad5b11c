//! The rig's own small programs, run inside the machines by this very test binary.
//!
//! | program | what it does |
//! |---|---|
//! | `hang ADDR` | accepts TCP and never answers |
//! | `relay LISTEN TARGET DELAY_MS CUT_BYTES RATE` | a line with a delay; it breaks when the target has sent CUT_BYTES |
//! | `stutter RUNNING_MS FROZEN_MS` | stops and continues all other processes of the machine |
//! | `say PATH HEX` | says these bytes to whoever connects to the Unix socket PATH, and no more |
//! | `flip HEX` | `nix-daemon --stdio` whose answers have the last byte of every HEX changed; writes to fd 3 |
//!
//! LISTEN is `ADDR:PORT`, or `unix:PATH` for a socket that the test process reaches.

use std::env;
use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::eventually;
use super::machine::Machine;
use super::process::{Process, signal_process};

/// Starts a program of the table above inside a machine and waits until it is ready.
pub fn start(machine: &Machine, log: &str, words: &str) -> Process {
    let process = machine.spawn(log, &format!("env MUSTER_RIG_PROGRAM='{words}' {HELPER}"));
    let ready = eventually(10.0, || process.out().contains("ready"));
    assert!(
        ready,
        "{}: {words}: {}{}",
        machine.name,
        process.out(),
        process.err()
    );
    process
}

/// Lets every machine have `/lab/bin/liar`, which answers as `nix-daemon --stdio` does, but changes the last
/// byte of the NAR of what [`Machine::add_marked`] added.
pub fn write_liar(share: &Path) -> io::Result<()> {
    let hex: Vec<String> = MARKED_END.iter().map(|b| format!("{b:02x}")).collect();
    let program = format!("MUSTER_RIG_PROGRAM='flip {}' {HELPER}", hex.join("-"));
    let liar = share.join("bin/liar");
    fs::write(
        &liar,
        format!("#!/bin/sh\n{program} 3>&1 >/dev/null | cat\n"),
    )?;
    fs::set_permissions(liar, fs::Permissions::from_mode(0o755))
}

impl Machine {
    /// Adds a file of so many bytes, a multiple of eight, whose NAR the liar changes.
    #[track_caller]
    pub fn add_marked(&self, bytes: usize) -> String {
        let line = format!(
            "mkdir -p /tmp/m && {{ head -c {} /dev/zero | tr '\\0' x; printf LAST-OCT; }} > /tmp/m/marked && \
             nix-store --add /tmp/m/marked",
            bytes - 8
        );
        self.run(&line).ok().out.trim().to_owned()
    }
}

/// The parameter that makes an ssh-ng URI a liar.
pub const LIAR: &str = "remote-program=/lab/bin/liar";

/// What the NAR of a marked file ends with.
const MARKED_END: &[u8] = b"LAST-OCT\x01\0\0\0\0\0\0\0)\0\0\0\0\0\0\0";

const HELPER: &str =
    "/lab/helper --exact rig::helper::program --ignored --nocapture --test-threads=1";

#[test]
#[ignore = "no test, but the programs that run inside the machines"]
fn program() {
    let Ok(words) = env::var("MUSTER_RIG_PROGRAM") else {
        return;
    };
    let number = |word: &str| word.parse::<u64>().expect("a number");
    match words.split(' ').collect::<Vec<_>>().as_slice() {
        ["hang", address] => hang(address),
        ["relay", listen, target, delay, cut, rate] => {
            relay(listen, target, number(delay), number(cut), number(rate));
        }
        ["stutter", running, frozen] => stutter(number(running), number(frozen)),
        ["say", path] => say(path, ""),
        ["say", path, hex] => say(path, hex),
        ["flip", hex] => flip(hex).expect("pass the daemon's answers on"),
        _ => panic!("no such program: {words}"),
    }
}

fn hang(address: &str) {
    let listener = TcpListener::bind(address).expect("bind");
    println!("ready");
    let mut kept = Vec::new();
    loop {
        kept.extend(listener.accept());
    }
}

fn say(path: &str, hex: &str) {
    let listener = UnixListener::bind(path).expect("bind");
    println!("ready");
    let mut kept = Vec::new();
    for mut stream in listener.incoming().flatten() {
        stream.write_all(&bytes(hex)).expect("say it");
        kept.push(stream);
    }
}

fn relay(listen: &str, target: &str, delay_ms: u64, cut: u64, rate: u64) {
    let line = Arc::new(Wire {
        delay: Duration::from_millis(delay_ms),
        rate,
        free: [Mutex::new(Instant::now()), Mutex::new(Instant::now())],
        left: AtomicU64::new(if cut == 0 { u64::MAX } else { cut }),
    });
    let connect = |client: Stream| {
        if let Ok(server) = TcpStream::connect(target) {
            let server = Stream::Tcp(server);
            pump(&line, &client, &server, false);
            pump(&line, &server, &client, true);
        }
    };
    if let Some(path) = listen.strip_prefix("unix:") {
        let listener = UnixListener::bind(path).expect("bind");
        println!("ready");
        listener
            .incoming()
            .flatten()
            .for_each(|s| connect(Stream::Unix(s)));
    } else {
        let listener = TcpListener::bind(listen).expect("bind");
        println!("ready");
        listener
            .incoming()
            .flatten()
            .for_each(|s| connect(Stream::Tcp(s)));
    }
}

struct Wire {
    delay: Duration,
    rate: u64,
    /// When the line can take more, to the target and from it.
    free: [Mutex<Instant>; 2],
    /// Bytes that the target may still send, over all connections.
    left: AtomicU64,
}

impl Wire {
    /// Takes the line for so many bytes, after those of all connections that came before; returns
    /// when the last of them is on its way. Waits while more is queued than a router would.
    fn take(&self, from_target: bool, size: usize) -> Instant {
        loop {
            let mut free = self.free[usize::from(from_target)]
                .lock()
                .expect("no panic under this lock");
            let now = Instant::now();
            let queued = free.saturating_duration_since(now);
            if queued <= QUEUE || self.rate == 0 {
                *free = (*free).max(now);
                if self.rate > 0 {
                    *free += Duration::from_secs_f64(size as f64 / self.rate as f64);
                }
                return *free;
            }
            drop(free);
            thread::sleep(queued - QUEUE);
        }
    }
}

/// Bytes a second of a thin line: in less than a millisecond others pass 64 KiB.
const THIN_BELOW: u64 = 64 << 20;

/// What waits for a thin line.
const QUEUE: Duration = Duration::from_millis(50);

/// Passes bytes one way; each arrives `delay` after it was sent, however many are under way. The first
/// come a round trip later: so long takes the greeting of a real TCP connection.
fn pump(wire: &Arc<Wire>, from: &Stream, to: &Stream, counted: bool) {
    let (mut from, mut to) = (from.twin(), to.twin());
    let (put, take) = mpsc::sync_channel::<(Instant, Vec<u8>)>(1024);
    let wire = Arc::clone(wire);
    thread::spawn(move || {
        // Small ones on a thin line, so that connections take turns.
        let is_thin = (1..THIN_BELOW).contains(&wire.rate);
        let mut chunk = vec![0; if is_thin { 16384 } else { 65536 }];
        let greeted = Instant::now() + wire.delay * 2;
        loop {
            let size = from.read(&mut chunk).unwrap_or(0);
            let size64 = size as u64;
            if counted
                && wire.left.fetch_sub(
                    size64.min(wire.left.load(Ordering::Relaxed)),
                    Ordering::Relaxed,
                ) <= size64
            {
                from.close();
                return;
            }
            let sent = wire.take(counted, size).max(greeted);
            // As one piece: byte by byte, an unoptimised test takes a processor for it.
            let bytes = chunk.get(..size).unwrap_or_default().to_vec();
            if put.send((sent + wire.delay, bytes)).is_err() || size == 0 {
                return;
            }
        }
    });
    thread::spawn(move || {
        for (due, bytes) in take {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            if bytes.is_empty() || to.write_all(&bytes).is_err() {
                to.end();
                return;
            }
        }
        to.close();
    });
}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    fn twin(&self) -> Self {
        match self {
            Self::Tcp(s) => {
                s.set_nodelay(true).expect("set TCP_NODELAY");
                Self::Tcp(s.try_clone().expect("clone a socket"))
            }
            Self::Unix(s) => Self::Unix(s.try_clone().expect("clone a socket")),
        }
    }

    fn end(&self) {
        self.shutdown(Shutdown::Write);
    }

    fn close(&self) {
        self.shutdown(Shutdown::Both);
    }

    fn shutdown(&self, how: Shutdown) {
        let _ = match self {
            Self::Tcp(s) => s.shutdown(how),
            Self::Unix(s) => s.shutdown(how),
        };
    }
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(s) => s.read(buf),
            Self::Unix(s) => s.read(buf),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(s) => s.write(buf),
            Self::Unix(s) => s.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn stutter(running_ms: u64, frozen_ms: u64) {
    println!("ready");
    loop {
        for (signal, ms) in [(Signal::STOP, frozen_ms), (Signal::CONT, running_ms)] {
            for pid in others() {
                signal_process(pid, signal);
            }
            thread::sleep(Duration::from_millis(ms));
        }
    }
}

/// The processes of this machine that may be stopped without ending it.
fn others() -> Vec<u32> {
    let comm = |pid: &u32| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let pids = fs::read_dir("/proc").expect("read /proc").flatten();
    pids.filter_map(|e| e.file_name().to_str()?.parse().ok())
        .filter(|&pid| pid != 1)
        .filter(|pid| !["cat", "helper"].contains(&comm(pid).trim()))
        .collect()
}

fn flip(hex: &str) -> io::Result<()> {
    let pattern = bytes(hex);
    let mut daemon = Command::new("nix-daemon")
        .arg("--stdio")
        .stdout(Stdio::piped())
        .spawn()?;
    let mut answers = daemon.stdout.take().expect("stdout is piped");
    let mut to = OpenOptions::new().write(true).open("/proc/self/fd/3")?;
    let mut chunk = vec![0; 65536];
    let mut held = Vec::new();
    loop {
        let size = answers.read(&mut chunk)?;
        held.extend(chunk.iter().take(size));
        while let Some(at) = held.windows(pattern.len()).position(|w| w == pattern) {
            if let Some(last) = held.get_mut(at + pattern.len() - 1) {
                *last ^= 1;
            }
        }
        // What may be the start of the pattern waits for more; all else must go out, or both sides wait.
        let start = (0..pattern.len())
            .rev()
            .find(|&k| held.ends_with(pattern.get(..k).unwrap_or_default()));
        let keep = if size == 0 { 0 } else { start.unwrap_or(0) };
        let ready: Vec<u8> = held.drain(..held.len() - keep).collect();
        to.write_all(&ready)?;
        if size == 0 {
            return Ok(());
        }
    }
}

fn bytes(hex: &str) -> Vec<u8> {
    let byte = |word| u8::from_str_radix(word, 16).expect("bytes in hexadecimal");
    hex.split('-').filter(|h| !h.is_empty()).map(byte).collect()
}
