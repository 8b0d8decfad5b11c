//! `muster serve` as a process: what it listens on, and what a SIGHUP changes.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
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

    /// Waits for lines that have these words, in any order; returns them in this one.
    fn says_all<const N: usize>(&self, words: [&str; N]) -> [String; N] {
        let mut found = words.map(|_| None);
        let mut seen = String::new();
        while found.iter().any(Option::is_none) {
            let line = self.lines.recv_timeout(Duration::from_secs(10));
            let line = line.unwrap_or_else(|_| panic!("not all of {words:?} in:\n{seen}"));
            for (words, found) in words.iter().zip(&mut found) {
                if line.contains(words) {
                    *found = Some(line.clone());
                }
            }
            seen += &format!("{line}\n");
        }
        found.map(|line| line.expect("that was waited for"))
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

fn exchange(stream: impl std::io::Read + std::io::Write) -> String {
    ask(stream, "/nix-cache-info")
}

fn ask(mut stream: impl std::io::Read + std::io::Write, target: &str) -> String {
    let request = format!("GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
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

/// What `/healthz` says of the cache on disk.
fn cache_of(address: &str) -> serde_json::Value {
    let stream = TcpStream::connect(address.strip_prefix("http://").unwrap()).unwrap();
    let answer = ask(stream, "/healthz");
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    let mut report: serde_json::Value = serde_json::from_str(body).unwrap();
    report["cache"].take()
}

/// What has a muster listen on a free port and keep NARs in a folder.
fn keeping_in(folder: &Path) -> [&str; 4] {
    let folder = folder.to_str().unwrap();
    ["--listen", "127.0.0.1:0", "--cache-dir", folder]
}

#[test]
fn ten_gib_are_kept_by_default_and_with_a_size_of_0_there_is_no_folder() {
    let place = Place::new();
    let folder = place.path("cache");
    let dir = keeping_in(&folder);
    let muster = place.serve(&[&dir[..], &["--cache-size", "0"]].concat());
    let address = muster.addresses().remove(0);
    assert!(answers(&address));
    assert_eq!(cache_of(&address), serde_json::Value::Null);
    drop(muster);
    assert!(!folder.exists());

    let muster = place.serve(&dir);
    let address = muster.addresses().remove(0);
    assert_eq!(cache_of(&address)["bytes-max"], 10_u64 << 30);
    assert!(folder.join("nix-cache-info").exists());
}

#[test]
fn files_of_others_in_the_cache_are_left_alone_and_said_at_each_start() {
    let place = Place::new();
    let folder = place.path("cache");
    let dir = keeping_in(&folder);
    // Made in good order first.
    place.serve(&dir).addresses();
    let hash = "0".repeat(32);
    let narinfo = format!(
        "StorePath: /nix/store/{hash}-theirs\nURL: nar/theirs.nar.xz\nCompression: xz\n\
         NarHash: sha256:0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73\nNarSize: 8\n"
    );
    let theirs = [
        (format!("{hash}.narinfo"), narinfo.as_str()),
        ("nar/theirs.nar.xz".to_owned(), "theirs"),
        ("index.html".to_owned(), "theirs"),
    ];
    for (name, text) in &theirs {
        fs::write(folder.join(name), text).unwrap();
    }
    // What reads as no narinfo may be one of ours that a power cut left: nobody could use the folder with it.
    let malformed = folder.join(format!("{}.narinfo", "1".repeat(32)));
    fs::write(&malformed, "StorePath: /nix/store/1111").unwrap();
    let muster = place.serve(&dir);
    let said = muster.says("a narinfo in the cache is removed");
    assert!(said.contains(malformed.to_str().unwrap()), "{said}");
    // The last that the pass says.
    muster.says("files of others in the cache are left alone");
    assert!(!malformed.exists());
    drop(muster);
    for _ in 0..2 {
        let muster = place.serve(&dir);
        let [said, listens] =
            muster.says_all(["files of others in the cache are left alone", "listens on"]);
        let (_, address) = listens.split_once("listens on ").unwrap();
        assert!(said.contains("count=3"), "{said}");
        let named = |(name, _): &(String, &str)| {
            said.contains(&format!("first={}", folder.join(name).display()))
        };
        assert!(theirs.iter().any(named), "{said}");
        assert!(answers(address));
        let cache = cache_of(address);
        assert_eq!(
            (cache["entries"].as_u64(), cache["degraded"].as_str()),
            (Some(0), None),
            "{cache}"
        );
        let stream = TcpStream::connect(address.strip_prefix("http://").unwrap()).unwrap();
        let absent = ask(stream, &format!("/{hash}.narinfo"));
        assert!(absent.starts_with("HTTP/1.1 404"), "{absent}");
        for (name, text) in &theirs {
            assert_eq!(
                fs::read_to_string(folder.join(name)).unwrap(),
                *text,
                "{name}"
            );
        }
    }
}
