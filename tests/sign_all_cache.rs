//! `muster sign-all --cache` on a folder that a server filled; real Nix verifies what it wrote.

mod builder;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use builder::{Builder, Daemon, free_port, signal, wait_for};
use muster::nix::signature::{KeyName, SecretKey};
use muster::nix::store_path::StorePath;
use rustix::process::Signal;
use serde_json::{Value, json};
use zeroize::Zeroizing;

/// A builder with two paths, one of which proves itself, and a configuration to serve them.
struct Scene {
    builder: Builder,
    daemon: Daemon,
    paths: Vec<StorePath>,
    port: u16,
}

struct Ended {
    status: i32,
    out: String,
    err: String,
}

impl Scene {
    fn new() -> Self {
        let builder = Builder::new();
        let paths = vec![
            builder.build("built", "words").1,
            builder.add("added", b"x"),
        ];
        let daemon = builder.daemon();
        let port = free_port();
        let scene = Self {
            builder,
            daemon,
            paths,
            port,
        };
        for name in ["old", "new", "third"] {
            let file = scene.key_file(name);
            fs::write(&file, key(name).to_secret_text().as_bytes()).unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        }
        scene.configure(true);
        scene
    }

    fn key_file(&self, name: &str) -> String {
        self.builder.path(name).display().to_string()
    }

    fn config(&self) -> PathBuf {
        self.builder.path("muster.toml")
    }

    fn folder(&self) -> PathBuf {
        self.builder.path("cache")
    }

    /// Writes the configuration, with the builder or without.
    fn configure(&self, with_builder: bool) {
        let daemon = format!("\"unix://{}\"", self.daemon.socket.display());
        let text = format!(
            "listen = [\"127.0.0.1:{}\"]\nmachines = false\nlocal-daemon = false\nstore-dir = {:?}\n\
             cache-dir = {:?}\ncompression = \"zstd\"\nsecret-key-files = [{:?}]\nupstreams = [{}]\n",
            self.port,
            self.builder.store_dir.as_str(),
            self.folder(),
            self.key_file("old"),
            if with_builder { &daemon } else { "" },
        );
        fs::write(self.config(), text).unwrap();
    }

    fn serve(&self) -> Server {
        let mut command = Command::new(env!("CARGO_BIN_EXE_muster"));
        command.args(["serve", "--config"]).arg(self.config());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let server = Server(command.spawn().unwrap());
        wait_for("the server", || {
            TcpStream::connect(("127.0.0.1", self.port)).is_ok()
        });
        server
    }

    fn get(&self, target: &str) -> String {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        let request = format!("GET /{target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Has a server fetch all paths, and waits until their narinfos are in the folder.
    fn fill(&self) {
        let server = self.serve();
        for path in &self.paths {
            let hash = path.hash();
            let mut text = String::new();
            wait_for("the path", || {
                text = self.get(&format!("{hash}.narinfo"));
                text.starts_with("HTTP/1.1 200")
            });
            let url = text.lines().find_map(|line| line.strip_prefix("URL: "));
            let nar = self.get(url.expect("a narinfo has a URL"));
            assert!(nar.starts_with("HTTP/1.1 200"), "{nar}");
            let narinfo = self.folder().join(format!("{hash}.narinfo"));
            wait_for("the narinfo", || narinfo.exists());
        }
        server.stop();
    }

    fn sign(&self, arguments: &[&str]) -> Ended {
        let output = Command::new(env!("CARGO_BIN_EXE_muster"))
            .args(["sign-all", "--cache", "--config"])
            .arg(self.config())
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        Ended {
            status: output.status.code().unwrap(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Signs with these keys; the exit status, and how many were signed, left as they are, and failed.
    fn counts(&self, keys: &[&str], arguments: &[&str]) -> (i32, Value) {
        let files: Vec<_> = keys.iter().map(|key| self.key_file(key)).collect();
        let named = files.iter().flat_map(|file| ["--secret-key-file", file]);
        let words: Vec<_> = named
            .chain(arguments.iter().copied())
            .chain(["--json"])
            .collect();
        let ended = self.sign(&words);
        let report: Value =
            serde_json::from_str(&ended.out).unwrap_or_else(|e| panic!("{e}: {}", ended.err));
        assert_eq!(report["ok"], ended.status == 0, "{report:#}");
        assert_eq!(report["cache-dir"], json!(self.folder()));
        assert_eq!(report["keys"], json!(keys));
        assert_eq!(ended.err, "", "no progress where there is no terminal");
        let counts = [
            &report["signed"],
            &report["skipped"]["signed-already"],
            &report["failed"],
        ];
        (ended.status, json!(counts))
    }

    /// What `nix store verify` says of the folder with this key trusted: whether all is well, and its words.
    fn verify(&self, key_name: &str) -> (bool, String) {
        let output = Command::new(self.builder.path("bin/nix"))
            .args([
                "--extra-experimental-features",
                "nix-command",
                "store",
                "verify",
                "--all",
            ])
            .arg("--store")
            .arg(format!("file://{}", self.folder().display()))
            .args(["--sigs-needed", "1", "--option", "substituters", ""])
            .args(["--trusted-public-keys", &key(key_name).public().to_string()])
            .envs(self.builder.environment())
            .output()
            .unwrap();
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.success(), words)
    }
}

/// A running `muster serve`; killed when dropped.
struct Server(Child);

impl Server {
    fn stop(mut self) {
        signal(i32::try_from(self.0.id()).unwrap(), Signal::TERM);
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn key(name: &str) -> SecretKey {
    let seed = [name.as_bytes()[0]; 32];
    SecretKey::from_seed(KeyName::new(name).unwrap(), &Zeroizing::new(seed))
}

#[test]
fn the_folder_is_signed_by_the_new_key_and_real_nix_agrees() {
    let scene = Scene::new();
    scene.fill();
    let (right, words) = scene.verify("old");
    assert!(right, "{words}");
    let (right, words) = scene.verify("new");
    assert!(!right && words.contains("untrusted"), "{words}");

    let (status, counts) = scene.counts(&["new"], &[]);
    assert_eq!((status, &counts[2]), (0, &json!(0)), "{counts}");
    assert!(counts[0].as_u64() >= Some(1), "{counts}");
    let (right, words) = scene.verify("new");
    assert!(right, "{words}");
    assert!(!scene.verify("old").0, "the old key's signature is gone");
    assert_eq!(scene.counts(&["new"], &[]), (0, json!([0, 2, 0])));

    // Both, as in the days of a rotation; and by default the keys of the configuration.
    assert_eq!(scene.counts(&["old", "new"], &[]).0, 0);
    assert!(scene.verify("old").0 && scene.verify("new").0);
    let ended = scene.sign(&[]);
    assert_eq!(ended.status, 0, "{}", ended.err);
    assert!(ended.out.ends_with(", with old\n"), "{}", ended.out);
    assert!(scene.verify("old").0 && !scene.verify("new").0);

    // A server is answered from what was signed, with its own keys.
    let server = scene.serve();
    let text = scene.get(&format!("{}.narinfo", scene.paths[0].hash()));
    assert!(text.contains("\nSig: old:"), "{text}");
    server.stop();
}

#[test]
fn nothing_is_signed_that_nobody_vouches_for_today() {
    let scene = Scene::new();
    scene.fill();
    // The builder is not asked any more: what rested on it alone is not signed; the other proves itself.
    scene.configure(false);
    let (status, counts) = scene.counts(&["new"], &[]);
    assert_eq!((status, &counts[2]), (1, &json!(1)));
    assert!(!scene.verify("new").0);
    assert!(scene.verify("old").0, "it was left as it was");
    let said = scene
        .sign(&["--secret-key-file", &scene.key_file("new")])
        .out;
    assert!(
        said.contains("1 failed") && said.contains("name the upstreams"),
        "{said}"
    );
    scene.configure(true);

    // Without an index a narinfo counts by the key that signed it.
    fs::remove_file(scene.folder().join(".muster/index.redb")).unwrap();
    assert_eq!(scene.counts(&["new"], &[]).0, 1);
    let former = key("old").public().to_string();
    assert_eq!(
        scene.counts(&["new"], &["--former-public-key", &former]).0,
        0
    );
    assert!(scene.verify("new").0);
}

#[test]
fn a_server_that_uses_the_folder_and_wrong_command_lines() {
    let scene = Scene::new();
    scene.fill();
    let server = scene.serve();
    let said = scene.sign(&["--secret-key-file", &scene.key_file("new")]);
    assert_eq!(said.status, 1);
    assert!(said.err.contains("systemctl reload muster"), "{}", said.err);
    server.stop();
    assert!(scene.verify("old").0);

    for wrong in [
        ["--store", "daemon"],
        ["--jobs", "2"],
        ["--former-public-key", "x"],
    ] {
        let said = scene.sign(&wrong);
        assert_eq!(said.status, 2, "{wrong:?}: {}", said.err);
    }
    // No folder at all, and no key.
    let none = scene.builder.path("none").display().to_string();
    let output = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_muster"));
        let output = command.arg("sign-all").args(arguments).output().unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let key = scene.key_file("new");
    let (status, err) = output(&["--cache", &none, "--secret-key-file", &key]);
    assert!(status == Some(1) && err.contains(&none), "{err}");
    let (status, err) = output(&[]);
    assert!(
        status == Some(2) && err.contains("--secret-key-file"),
        "{err}"
    );
}
