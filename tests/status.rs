//! `muster status` before a running Muster: the table for people, the JSON for scripts, the exit status.

mod builder;

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use builder::{Builder, free_port, nar_of};
use muster::nix::hash::NarHash;
use serde_json::Value;

const OTHER_HASH: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

/// A running `muster serve`; ends when dropped.
struct Server {
    dir: tempfile::TempDir,
    port: u16,
    child: Child,
}

struct Shown {
    status: i32,
    out: String,
    err: String,
}

impl Server {
    fn start(builder: &Builder, upstreams: &[String]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let port = free_port();
        let list: Vec<_> = upstreams.iter().map(|uri| format!("{uri:?}")).collect();
        let text = format!(
            "listen = [\"127.0.0.1:{port}\", \"unix:{}\"]\nmachines = false\nlocal-daemon = false\n\
             store-dir = {:?}\ncache-dir = {:?}\nupstreams = [{}]\n",
            dir.path().join("socket").display(),
            builder.store_dir.as_str(),
            dir.path().join("cache"),
            list.join(", ")
        );
        fs::write(dir.path().join("config.toml"), text).unwrap();
        let child = muster(&dir)
            .args(["serve", "--config"])
            .arg(dir.path().join("config.toml"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let server = Self { dir, port, child };
        server.until(|report| {
            let all = report["upstreams"].as_array().unwrap();
            all.iter().all(|upstream| upstream["state"] != "connecting")
        });
        server
    }

    fn config(&self) -> String {
        self.dir.path().join("config.toml").display().to_string()
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    fn status(&self, args: &[&str]) -> Shown {
        shown(muster(&self.dir).arg("status").args(args))
    }

    /// The report as JSON, as soon as it is such.
    fn until(&self, such: impl Fn(&Value) -> bool) -> Value {
        let begun = Instant::now();
        loop {
            let shown = self.status(&["--json", "--url", &self.url()]);
            let report: Value = serde_json::from_str(&shown.out).unwrap_or_default();
            if report["upstreams"].is_array() && such(&report) {
                return report;
            }
            assert!(begun.elapsed().as_secs() < 15, "{report:#}{}", shown.err);
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn get(&self, target: &str) -> String {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        let request = format!("GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn muster(dir: &tempfile::TempDir) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_muster"));
    command
        .env("STATE_DIRECTORY", dir.path().join("state"))
        .env("NIX_SSHOPTS", "-F none -oIdentityAgent=none")
        .env_remove("MUSTER_CONFIG")
        .stdin(Stdio::null());
    command
}

fn shown(command: &mut Command) -> Shown {
    let output = command.output().unwrap();
    Shown {
        status: output.status.code().unwrap_or(-1),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

#[track_caller]
fn number(value: &Value) -> u64 {
    value
        .as_u64()
        .unwrap_or_else(|| panic!("{value} is no number"))
}

#[test]
fn what_each_upstream_gave_and_what_went_wrong() {
    let builder = Builder::new();
    let content = [b'x'; 5000];
    let path = builder.add("file", &content);
    let nar = nar_of(&content);
    let first = builder.daemon();
    let other = builder.second_daemon("other", &[(&path, OTHER_HASH, 5)]);
    let (first, other) = (
        format!("unix://{}", first.socket.display()),
        // Held, so that the daemon lives on.
        (format!("unix://{}", other.socket.display()), other),
    );
    let dead = "ssh-ng://127.0.0.1:1".to_owned();
    let server = Server::start(&builder, &[first.clone(), dead.clone()]);

    let narinfo = server.get(&format!("/{}.narinfo", path.hash()));
    let url = narinfo.lines().find_map(|line| line.strip_prefix("URL: "));
    let got = server.get(&format!("/{}", url.expect("it has the path")));
    assert!(got.starts_with("HTTP/1.1 200"), "{got}");
    server.get("/0000000000000000000000000000000a.narinfo");

    // The second time it comes from the cache.
    server.until(|report| report["cache"]["entries"] == 1);
    let again = server.get(&format!("/{}.narinfo", path.hash()));
    let url = again.lines().find_map(|line| line.strip_prefix("URL: "));
    let got = server.get(&format!("/{}", url.expect("it still has the path")));
    assert!(got.starts_with("HTTP/1.1 200"), "{got}");

    let report = server.until(|report| report["cache"]["hits"] == 1);
    let cache = &report["cache"];
    assert_eq!((number(&cache["hits"]), number(&cache["misses"])), (1, 1));
    assert!(number(&cache["bytes"]) > 0 && number(&cache["bytes-max"]) > 0);
    assert!(cache["degraded"].is_null(), "{cache}");
    assert_eq!(report["status"], "degraded");
    assert_eq!(report["version"], env!("CARGO_PKG_VERSION"));
    assert!(number(&report["uptime-ms"]) > 0);
    let well = &report["upstreams"][0];
    assert_eq!(well["uri"], first);
    assert_eq!(well["state"], "well");
    assert_eq!(well["trusted"], true);
    assert!(well["peer"].as_str().unwrap().contains("protocol 1."));
    assert_eq!((number(&well["asked"]), number(&well["hits"])), (2, 1));
    assert_eq!((number(&well["found"]), number(&well["refused"])), (1, 0));
    assert!(well["paths"].is_null(), "no daemon tells all of its paths");
    assert_eq!(
        (number(&well["nars"]), number(&well["nar-bytes"])),
        (1, nar.len() as u64)
    );
    assert!(well["latency-ms"].as_f64().unwrap() > 0.0);
    for none in ["error", "last-error", "retry-in-ms"] {
        assert!(well[none].is_null(), "{none}: {well}");
    }
    let sick = &report["upstreams"][1];
    assert_eq!(sick["state"], "sick");
    assert!(
        sick["error"]
            .as_str()
            .unwrap()
            .contains("Connection refused")
    );
    assert!(
        sick["last-error"]["error"]
            .as_str()
            .unwrap()
            .contains("Connection refused")
    );
    assert!(number(&sick["last-error"]["age-ms"]) < 40_000);
    assert!(number(&sick["retry-in-ms"]) < 40_000);
    assert!(sick["latency-ms"].is_null() && sick["peer"].is_null());
    let narinfo = &report["narinfo"];
    assert_eq!(
        number(&narinfo["absent-without-full-knowledge"]),
        1,
        "{narinfo}"
    );
    assert_eq!(number(&narinfo["requests"]), 3);

    let shown = server.status(&["--url", &server.url()]);
    assert_eq!(shown.status, 3, "{}", shown.err);
    println!("{}", shown.out);
    for words in [
        ": degraded, up ",
        "UPSTREAM",
        "  KNOWN",
        "  well ",
        "  sick ",
        "5.0 KiB",
        "Connection refused",
        "tried again in ",
        "1 absent without full knowledge",
        " of 10 GiB, 50 % of 2 NARs from it",
    ] {
        assert!(shown.out.contains(words), "no {words:?} in\n{}", shown.out);
    }
    assert!(!shown.out.contains('\x1b'), "colour on a terminal only");

    // Two databases that differ about one path.
    let server = Server::start(&builder, &[first, other.0.clone()]);
    server.get(&format!("/{}.narinfo", path.hash()));
    let report = server.until(|report| report["narinfo"]["divergent"] == 1);
    assert_eq!(report["status"], "ok");
    let divergent = &report["divergent"][0];
    assert_eq!(divergent["path"], builder.store_dir.join(&path));
    let hashes = [&divergent["served"], &divergent["nar-hash"]].map(|hash| hash.as_str().unwrap());
    let ours = NarHash::of(&nar).to_string();
    assert!(
        hashes.contains(&&*ours) && hashes[0] != hashes[1],
        "{divergent}"
    );
    let shown = server.status(&["--url", &server.url()]);
    assert_eq!(shown.status, 0);
    assert!(shown.out.contains("1 with other bytes"), "{}", shown.out);
    assert!(
        shown.out.contains(&builder.store_dir.join(&path)),
        "{}",
        shown.out
    );
}

#[test]
fn the_server_is_found_by_configuration_url_and_socket() {
    let builder = Builder::new();
    let server = Server::start(&builder, &[]);
    let socket = format!("unix:{}", server.dir.path().join("socket").display());
    let bare = format!("127.0.0.1:{}", server.port);
    for args in [
        ["--config", &server.config()],
        ["--url", &server.url()],
        ["--url", &bare],
        ["--url", &socket],
    ] {
        let shown = server.status(&args);
        assert_eq!(shown.status, 0, "{args:?}: {}{}", shown.out, shown.err);
        assert!(shown.out.contains("all is well, up "), "{}", shown.out);
        assert!(
            shown.out.contains("no upstreams: name builders"),
            "{}",
            shown.out
        );
    }
}

#[test]
fn nobody_there_or_somebody_else() {
    let dir = tempfile::tempdir().unwrap();
    let status = |args: &[&str]| shown(muster(&dir).arg("status").args(args));
    let nobody = format!("http://127.0.0.1:{}", free_port());
    let said = status(&["--url", &nobody]);
    assert_eq!(said.status, 1);
    assert!(
        said.out.is_empty() && said.err.contains("muster serve"),
        "{}",
        said.err
    );
    let said = status(&["--url", &nobody, "--json"]);
    assert_eq!(said.status, 1);
    let json: Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!(json["status"], "unreachable");
    assert!(json["error"].as_str().unwrap().contains(&nobody));

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let other = format!("http://{}", listener.local_addr().unwrap());
    let answering = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = [0; 1000];
        let _ = stream.read(&mut request);
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi");
    });
    let said = status(&["--url", &other]);
    answering.join().unwrap();
    assert_eq!(said.status, 1);
    assert!(said.err.contains("is no muster"), "{}", said.err);

    for wrong in [
        "ftp://x",
        "127.0.0.1:99999",
        "http://127.0.0.1:x",
        "http://[::1]:70000/a",
    ] {
        let said = status(&["--url", wrong]);
        assert_eq!(said.status, 2, "{wrong}: {}", said.err);
    }
}

#[test]
fn watching_shows_it_again_and_again() {
    let builder = Builder::new();
    let server = Server::start(&builder, &[]);
    let mut watching = muster(&server.dir)
        .args(["status", "--json", "--watch", "0.1", "--url", &server.url()])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(watching.stdout.take().unwrap()).lines();
    let ups: Vec<u64> = lines
        .take(3)
        .map(|line| {
            let report: Value = serde_json::from_str(&line.unwrap()).unwrap();
            number(&report["uptime-ms"])
        })
        .collect();
    let _ = watching.kill();
    let _ = watching.wait();
    assert!(ups.is_sorted() && ups[2] >= ups[0] + 200, "{ups:?}");
    let said = server.status(&["--watch", "0"]);
    assert_eq!(said.status, 2);
}

#[test]
fn colour_and_width_of_a_terminal() {
    let builder = Builder::new();
    let dead = "ssh-ng://somebody-with-a-name@a-builder.example.invalid:2222".to_owned();
    let server = Server::start(&builder, &[dead]);
    let program = PathBuf::from(env!("CARGO_BIN_EXE_muster"));
    let on_terminal = |environment: &str| {
        let line = format!(
            "stty cols 80; {environment} {} status --url {}",
            program.display(),
            server.url()
        );
        let output = Command::new("script")
            .args(["-qec", &line, "/dev/null"])
            .env_remove("NO_COLOR")
            .stdin(Stdio::null())
            .output()
            .expect("script(1) is needed");
        String::from_utf8(output.stdout).unwrap().replace('\r', "")
    };
    let coloured = on_terminal("");
    assert!(coloured.contains("\x1b[1;31msick\x1b[0m"), "{coloured:?}");
    let plain = on_terminal("NO_COLOR=1");
    assert!(!plain.contains('\x1b'), "{plain:?}");
    for line in plain.lines() {
        assert!(line.chars().count() <= 80, "{line:?}");
    }
}
