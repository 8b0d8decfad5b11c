//! Under a service manager: sockets that it hands in, what it is told, the watchdog. No systemd is needed:
//! a shell hands the sockets on, and a datagram socket listens to what systemd would hear.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// A muster that was started as systemd starts it.
struct Service {
    child: Child,
    dir: TempDir,
    told: UnixDatagram,
}

impl Service {
    /// Starts it with at most three sockets, which become its descriptors from 3 on.
    fn start(sockets: Vec<OwnedFd>, args: &str, environment: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().expect("make a folder");
        let told = UnixDatagram::bind(dir.path().join("notify")).expect("bind");
        told.set_read_timeout(Some(Duration::from_secs(10)))
            .expect("set a timeout");
        let count = sockets.len();
        // A shell can move descriptors and exec, which is all that systemd does here.
        let script = format!(
            "exec 3<&0 4<&1 5<&2 </dev/null >\"$DIR/out\" 2>\"$DIR/err\"; {} \
             export LISTEN_FDS={count} LISTEN_PID=${{SOCKETS_FOR:-$$}} WATCHDOG_PID=$$; \
             exec {MUSTER} serve --no-machines --no-local-daemon {args}",
            ["exec 3<&- 4<&- 5<&-;", "exec 4<&- 5<&-;", "exec 5<&-;", ""][count],
        );
        let mut sockets = sockets.into_iter();
        let mut next = || sockets.next().map_or_else(Stdio::null, Stdio::from);
        let child = Command::new("sh")
            .args(["-c", &script])
            .env("DIR", dir.path())
            .env("STATE_DIRECTORY", dir.path().join("state"))
            .env("NOTIFY_SOCKET", dir.path().join("notify"))
            .env_remove("MUSTER_CONFIG")
            .envs(environment.iter().copied())
            .stdin(next())
            .stdout(next())
            .stderr(next())
            .spawn()
            .expect("start a shell");
        Self { child, dir, told }
    }

    /// The next message to systemd, line by line; within ten seconds.
    #[track_caller]
    fn hears(&self) -> Vec<String> {
        let mut bytes = [0; 4096];
        let size = self
            .told
            .recv(&mut bytes)
            .unwrap_or_else(|error| panic!("systemd hears nothing: {error}\n{}", self.log()));
        let text = String::from_utf8_lossy(&bytes[..size]).into_owned();
        text.lines().map(str::to_owned).collect()
    }

    /// The next message that is no sign of life.
    #[track_caller]
    fn hears_news(&self) -> Vec<String> {
        loop {
            let lines = self.hears();
            if lines != ["WATCHDOG=1"] {
                return lines;
            }
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn log(&self) -> String {
        let read = |name| fs::read_to_string(self.path(name)).unwrap_or_default();
        format!("{}{}", read("out"), read("err"))
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id().cast_signed()).expect("a pid");
        kill_process(pid, signal).expect("it runs");
    }

    /// The exit status, within ten seconds.
    fn ends(&mut self) -> Option<i32> {
        let end = Instant::now() + Duration::from_secs(10);
        while Instant::now() < end {
            if let Some(status) = self.child.try_wait().expect("wait for it") {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        None
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

/// Asks one question and returns all of the answer.
fn ask(mut stream: impl Read + Write) -> String {
    stream
        .write_all(b"GET /nix-cache-info HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        .expect("send a request");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("read an answer");
    answer
}

#[test]
fn sockets_that_are_handed_in_are_served_and_others_are_not_opened() {
    let dir = tempfile::tempdir().expect("make a folder");
    let tcp = TcpListener::bind("127.0.0.1:0").expect("bind");
    let tcp6 = TcpListener::bind("[::1]:0").expect("bind");
    let path = dir.path().join("socket");
    let unix = UnixListener::bind(&path).expect("bind");
    let (address, address6) = (tcp.local_addr().unwrap(), tcp6.local_addr().unwrap());
    // A client that comes before the service is up waits in the kernel.
    let early = TcpStream::connect(address).expect("connect");

    let free = TcpListener::bind("127.0.0.1:0").expect("bind");
    let other = free.local_addr().expect("it is bound");
    drop(free);
    let service = Service::start(
        vec![tcp.into(), unix.into(), tcp6.into()],
        &format!("--listen {other}"),
        &[],
    );
    assert_eq!(service.hears(), ["READY=1"]);
    assert!(ask(early).contains("StoreDir: /nix/store"));
    for address in [address, address6] {
        assert!(ask(TcpStream::connect(address).unwrap()).starts_with("HTTP/1.1 200"));
        assert!(service.log().contains(&format!(" http://{address}")));
    }
    assert!(ask(UnixStream::connect(&path).unwrap()).starts_with("HTTP/1.1 200"));
    assert!(
        service
            .log()
            .contains(&format!(" unix:{} ", path.display())),
        "{}",
        service.log()
    );
    TcpStream::connect(other).expect_err("--listen is for a start by hand");
    assert!(
        service
            .log()
            .contains(&format!("extra-substituters = http://{address}\n")),
        "{}",
        service.log()
    );
}

#[test]
fn several_sockets_share_one_place() {
    let dir = tempfile::tempdir().expect("make a folder");
    let config = dir.path().join("muster.toml");
    fs::write(&config, "max-connections = 1\n").expect("write a file");
    let (a, b) = (
        TcpListener::bind("127.0.0.1:0"),
        TcpListener::bind("127.0.0.1:0"),
    );
    let (a, b) = (a.expect("bind"), b.expect("bind"));
    let addresses = [&a, &b].map(|l| l.local_addr().expect("it is bound"));
    let args = format!("--config {}", config.display());
    let service = Service::start(vec![a.into(), b.into()], &args, &[]);
    assert_eq!(service.hears(), ["READY=1"]);
    for address in addresses.repeat(3) {
        let stream = TcpStream::connect(address).expect("connect");
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .expect("set a timeout");
        assert!(ask(stream).starts_with("HTTP/1.1 200"));
    }
}

#[test]
fn a_restart_keeps_the_sockets_and_loses_no_client() {
    let tcp = TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = tcp.local_addr().expect("it is bound");
    let again = tcp.try_clone().expect("clone a socket");
    let mut first = Service::start(vec![tcp.into()], "", &[]);
    assert_eq!(first.hears(), ["READY=1"]);
    first.signal(Signal::TERM);
    assert_eq!(first.hears(), ["STOPPING=1"]);
    assert_eq!(first.ends(), Some(0), "{}", first.log());
    let between = TcpStream::connect(address).expect("the kernel holds the socket");
    let _second = Service::start(vec![again.into()], "", &[]);
    assert!(ask(between).starts_with("HTTP/1.1 200"));
}

#[test]
fn a_socket_that_cannot_be_served_is_named() {
    let datagrams = std::net::UdpSocket::bind("127.0.0.1:0").expect("bind");
    let mut service = Service::start(vec![datagrams.into()], "", &[]);
    assert_eq!(service.ends(), Some(1));
    assert!(service.log().contains("ListenStream="), "{}", service.log());
}

#[test]
fn sockets_for_another_process_are_not_taken() {
    let tcp = TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = tcp.local_addr().expect("it is bound");
    let other = [("SOCKETS_FOR", "1")];
    let service = Service::start(vec![tcp.into()], "--listen 127.0.0.1:0", &other);
    assert_eq!(service.hears(), ["READY=1"]);
    assert!(service.log().contains(" http://127.0.0.1:"));
    assert!(!service.log().contains(&address.to_string()));
}

#[test]
fn systemd_is_told_of_start_reload_and_stop() {
    let dir = tempfile::tempdir().expect("make a folder");
    let config = dir.path().join("muster.toml");
    fs::write(&config, "priority = 20\n").expect("write a file");
    let args = format!("--listen 127.0.0.1:0 --config {}", config.display());
    let mut service = Service::start(vec![], &args, &[]);
    assert_eq!(service.hears(), ["READY=1"]);
    for text in ["priority = 21\n", "a mistake\n"] {
        fs::write(&config, text).expect("write a file");
        let before = monotonic_usec();
        service.signal(Signal::HUP);
        let reloading = service.hears();
        let stamp = reloading
            .iter()
            .find_map(|line| line.strip_prefix("MONOTONIC_USEC="));
        assert_eq!(reloading.first().map(String::as_str), Some("RELOADING=1"));
        // Type=notify-reload takes no RELOADING=1 without it, and none from before the signal.
        let stamp: u64 = stamp.expect("a time").parse().expect("a number");
        assert!((before..=monotonic_usec()).contains(&stamp), "{stamp}");
        assert_eq!(service.hears(), ["READY=1"], "whatever came of it");
    }
    assert!(
        service.log().contains("muster.toml:1:"),
        "the mistake is named\n{}",
        service.log()
    );
    service.signal(Signal::TERM);
    assert_eq!(service.hears(), ["STOPPING=1"]);
    assert_eq!(service.ends(), Some(0), "{}", service.log());
}

#[test]
fn the_watchdog_is_fed_twice_in_each_interval() {
    let service = Service::start(
        vec![],
        "--listen 127.0.0.1:0",
        &[("WATCHDOG_USEC", "400000")],
    );
    assert_eq!(service.hears_news(), ["READY=1"]);
    let started = Instant::now();
    for _ in 0..6 {
        assert_eq!(service.hears(), ["WATCHDOG=1"]);
    }
    let six = started.elapsed();
    // Six halves of 400 ms, on a machine that may be loaded.
    assert!(
        (Duration::from_millis(900)..Duration::from_millis(2400)).contains(&six),
        "{six:?}"
    );
}

fn monotonic_usec() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec * 1_000_000 + now.tv_nsec / 1000).expect("after boot")
}

const MUSTER: &str = env!("CARGO_BIN_EXE_muster");
