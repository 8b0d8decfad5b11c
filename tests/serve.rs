//! `muster serve` as a process: what it listens on, and what a SIGHUP changes.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use tempfile::TempDir;

/// A muster without upstreams; dropped, it is killed.
struct Muster {
    child: Child,
    /// Lines of its output and its log.
    lines: Receiver<String>,
}

struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Starts it by a shell, after `prelude`, with this as its standard input.
    fn serve_after(&self, prelude: &str, input: Stdio, args: &[&str]) -> Muster {
        let script = format!("{prelude} exec \"$0\" serve --no-machines --no-local-daemon \"$@\"");
        let mut child = Command::new("/bin/sh")
            .args(["-c", &script, env!("CARGO_BIN_EXE_muster")])
            .args(args)
            .env("STATE_DIRECTORY", self.path("state"))
            .env("RUNTIME_DIRECTORY", self.0.path())
            .env_remove("MUSTER_CONFIG")
            .stdin(input)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (tell, lines) = channel();
        let out = child.stdout.take().unwrap();
        let err = child.stderr.take().unwrap();
        let readers: [Box<dyn std::io::Read + Send>; 2] = [Box::new(out), Box::new(err)];
        for reader in readers {
            let tell = tell.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(reader).lines().map_while(Result::ok) {
                    let _ = tell.send(line);
                }
            });
        }
        Muster { child, lines }
    }

    fn serve(&self, args: &[&str]) -> Muster {
        self.serve_after("", Stdio::null(), args)
    }
}

impl Muster {
    /// Waits for a line that has these words.
    fn says(&self, words: &str) -> String {
        let mut seen = String::new();
        while let Ok(line) = self.lines.recv_timeout(Duration::from_secs(10)) {
            if line.contains(words) {
                return line;
            }
            seen.push_str(&line);
            seen.push('\n');
        }
        panic!("no {words:?} in:\n{seen}");
    }

    /// Waits until it listens; returns its addresses.
    fn addresses(&self) -> Vec<String> {
        let line = self.says("listens on");
        let (_, addresses) = line.split_once("listens on ").unwrap();
        let addresses = addresses.split(' ').map(str::to_owned).collect();
        self.says("narinfo-cache-negative-ttl");
        addresses
    }

    fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        let sent = Command::new("/bin/sh")
            .args(["-c", &format!("kill -{name} {pid}")])
            .status();
        assert!(sent.unwrap().success());
    }
}

impl Drop for Muster {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

fn exchange(mut stream: impl std::io::Read + std::io::Write) -> String {
    stream
        .write_all(b"GET /nix-cache-info HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn answers(address: &str) -> bool {
    let address: SocketAddr = address.strip_prefix("http://").unwrap().parse().unwrap();
    exchange(TcpStream::connect(address).unwrap()).contains("StoreDir: /nix/store\n")
}

#[test]
fn both_wildcards_on_one_port_are_two_listeners() {
    let place = Place::new();
    let port = free_port();
    let (four, six) = (format!("0.0.0.0:{port}"), format!("[::]:{port}"));
    let muster = place.serve(&["--listen", &six, "--listen", &four]);
    assert_eq!(muster.addresses().len(), 2);
    assert!(answers(&format!("http://127.0.0.1:{port}")));
    assert!(answers(&format!("http://[::1]:{port}")));
}

#[test]
fn a_unix_socket_that_somebody_listens_on_is_left_and_a_stale_one_replaced() {
    let place = Place::new();
    let path = place.path("socket");
    let listen = format!("unix:{}", path.display());
    let other = UnixListener::bind(&path).unwrap();
    let muster = place.serve(&["--listen", &listen]);
    muster.says("another process does");
    assert!(path.exists());
    drop(other);
    let muster = place.serve(&["--listen", &listen]);
    muster.addresses();
    let stream = std::os::unix::net::UnixStream::connect(&path).unwrap();
    assert!(exchange(stream).starts_with("HTTP/1.1 200"));

    fs::write(place.path("file"), "precious").unwrap();
    let listen = format!("unix:{}", place.path("file").display());
    place.serve(&["--listen", &listen]).says("cannot listen");
    assert_eq!(fs::read(place.path("file")).unwrap(), b"precious");
}

#[test]
fn sockets_that_systemd_hands_in_are_used() {
    let place = Place::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let expected = format!("http://{}", listener.local_addr().unwrap());
    let prelude = "exec 3<&0 </dev/null; export LISTEN_FDS=1 LISTEN_PID=$$;";
    let input = Stdio::from(std::os::fd::OwnedFd::from(listener));
    let muster = place.serve_after(prelude, input, &["--listen", "127.0.0.1:1"]);
    assert_eq!(muster.addresses(), [expected.as_str()]);
    assert!(answers(&expected));
}

#[test]
fn sighup_takes_over_what_it_can_and_names_the_rest() {
    let place = Place::new();
    let file = place.path("config.toml");
    fs::write(&file, "listen = \"127.0.0.1:0\"\npriority = 30\n").unwrap();
    let muster = place.serve(&["--config", file.to_str().unwrap()]);
    let address = muster.addresses().remove(0);
    let text = "listen = \"127.0.0.1:1\"\npriority = 20\nlog = \"debug\"\n";
    fs::write(&file, text).unwrap();
    muster.signal("HUP");
    assert!(muster.says("takes a restart").contains("listen"));
    assert!(muster.says("takes a restart").contains("log"));
    muster.says("read anew");
    let stream = TcpStream::connect(address.strip_prefix("http://").unwrap()).unwrap();
    assert!(exchange(stream).contains("Priority: 20\n"));

    fs::write(&file, "nonsense\n").unwrap();
    muster.signal("HUP");
    muster.says("the old one stays");
    assert!(answers(&address));
}
