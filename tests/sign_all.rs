//! `muster sign-all` with real daemons, over sockets and real ssh; real Nix verifies what it wrote.

mod builder;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use builder::stores::{RootedStore, numbered};
use builder::{Builder, Daemon, Sshd, free_port};
use muster::nix::signature::{KeyName, SecretKey};
use rustix::process::Signal;
use serde_json::Value;
use zeroize::Zeroizing;

/// A builder, and a key in a file.
struct Scene {
    builder: Builder,
    key: SecretKey,
    key_file: PathBuf,
}

impl Scene {
    fn new() -> Self {
        let builder = Builder::new();
        let key = key("signer-1", 7);
        let key_file = write_key(&builder, "key", &key);
        Self {
            builder,
            key,
            key_file,
        }
    }

    fn public(&self) -> String {
        self.key.public().to_string()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_muster"));
        command
            .arg("sign-all")
            .args(["--store-dir", self.builder.store_dir.as_str()])
            .arg("--secret-key-file")
            .arg(&self.key_file)
            .args(arguments)
            .env("NIX_SSHOPTS", "-F none -oIdentityAgent=none")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let output = self.command(arguments).output().unwrap();
        eprintln!("{}", String::from_utf8_lossy(&output.stderr));
        output
    }

    /// Runs it with `--json`; returns whether the status was 0, and what it printed.
    fn json(&self, arguments: &[&str]) -> (bool, Value) {
        ended(self.run(&[arguments, &["--json"]].concat()))
    }

    /// The URI of a store over ssh.
    fn over_ssh(&self, sshd: &Sshd, store: &RootedStore<'_>) -> String {
        let host_key = STANDARD.encode(self.builder.host_key("host"));
        format!(
            "ssh-ng://127.0.0.1:{}?ssh-key={}&base64-ssh-public-host-key={}&remote-store={}",
            sshd.port,
            self.builder.path("user").display(),
            host_key.replace('+', "%2B").replace('=', "%3D"),
            store.uri().replace('?', "%3F").replace('=', "%3D"),
        )
    }
}

fn key(name: &str, byte: u8) -> SecretKey {
    SecretKey::from_seed(KeyName::new(name).unwrap(), &Zeroizing::new([byte; 32]))
}

fn write_key(builder: &Builder, file: &str, key: &SecretKey) -> PathBuf {
    let file = builder.path(file);
    fs::write(&file, key.to_secret_text().as_bytes()).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    file
}

fn socket_uri(daemon: &Daemon) -> String {
    format!("unix://{}", daemon.socket.display())
}

fn ended(output: Output) -> (bool, Value) {
    let json = serde_json::from_slice(&output.stdout);
    let json: Value = json.unwrap_or_else(|e| panic!("{e}: {output:?}"));
    assert_eq!(json["ok"], output.status.success(), "{json:#}");
    (output.status.success(), json)
}

fn counts(store: &Value) -> [u64; 6] {
    let skipped = &store["skipped"];
    [
        &store["paths"],
        &store["signed"],
        &skipped["signed-already"],
        &skipped["content-addressed"],
        &skipped["gone"],
        &store["failed"],
    ]
    .map(|count| count.as_u64().unwrap())
}

/// Tells whether this machine's daemons refuse signatures of untrusted users: before Nix 2.17.
fn untrusted_are_refused() -> bool {
    std::env::var("MUSTER_TEST_NIX").map_or(true, |version| version == "2.8")
}

#[test]
fn every_path_is_signed_and_real_nix_verifies_it() {
    let scene = Scene::new();
    let store = scene.builder.rooted_store("one", 300);
    let added = scene.builder.path("added");
    fs::write(&added, "added").unwrap();
    let mut add = store.command("nix-store");
    assert!(add.arg("--add").arg(&added).status().unwrap().success());
    let daemon = store.daemon("");
    let uri = socket_uri(&daemon);
    let (verified, words) = store.verify(&scene.public());
    assert!(!verified && words.contains("is untrusted"), "{words}");

    let (ok, json) = scene.json(&["--store", &uri, "--dry-run"]);
    assert!(ok);
    assert_eq!(json["dry-run"], true);
    assert_eq!(counts(&json["stores"][0]), [301, 300, 0, 1, 0, 0]);
    assert!(!store.verify(&scene.public()).0, "a dry run signed");

    let (ok, json) = scene.json(&["--store", &uri]);
    assert!(ok, "{json:#}");
    assert_eq!(json["keys"], serde_json::json!(["signer-1"]));
    assert_eq!(counts(&json["stores"][0]), [301, 300, 0, 1, 0, 0]);
    let peer = json["stores"][0]["peer"].as_str().unwrap();
    assert!(peer.starts_with("Nix 2."), "{peer}");
    let (verified, words) = store.verify(&scene.public());
    assert!(verified, "{words}");
    let other = key("signer-1", 8).public().to_string();
    assert!(!store.verify(&other).0, "any key will do");

    let (ok, json) = scene.json(&["--store", &uri]);
    assert!(ok);
    assert_eq!(counts(&json["stores"][0]), [301, 0, 300, 1, 0, 0]);

    // A second key is added beside the first; people get a table.
    let second = key("second-1", 9);
    let file = write_key(&scene.builder, "second", &second);
    let more = ["--store", &uri, "--secret-key-file", file.to_str().unwrap()];
    let output = scene.run(&more);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}");
    let row: Vec<_> = text.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(
        row[..8],
        [&uri, "301", "300", "0", "1", "0", "0", "0"],
        "{text}"
    );
    for key in [&scene.key, &second] {
        assert!(store.verify(&key.public().to_string()).0);
    }
}

#[test]
fn a_bogus_signature_of_the_keys_name_is_no_signature() {
    let scene = Scene::new();
    let store = scene.builder.rooted_store("one", 20);
    let daemon = store.daemon("");
    let uri = socket_uri(&daemon);
    // As after a new key was made under the old name.
    let bogus = write_key(&scene.builder, "bogus", &key("signer-1", 8));
    let mut command = scene.command(&["--store", &uri]);
    let other = command.get_args().map(|word| match word {
        word if word == scene.key_file.as_os_str() => bogus.as_os_str().to_owned(),
        word => word.to_owned(),
    });
    let other: Vec<_> = other.collect();
    command = Command::new(env!("CARGO_BIN_EXE_muster"));
    assert!(command.args(other).output().unwrap().status.success());
    let (ok, json) = scene.json(&["--store", &uri]);
    assert!(ok);
    assert_eq!(counts(&json["stores"][0]), [20, 20, 0, 0, 0, 0]);
    let (ok, json) = scene.json(&["--store", &uri]);
    assert!(ok);
    assert_eq!(counts(&json["stores"][0]), [20, 0, 20, 0, 0, 0]);
    assert!(store.verify(&scene.public()).0);
}

#[test]
fn builders_of_a_machines_file_over_ssh_and_one_that_is_down() {
    let scene = Scene::new();
    let sshd = scene.builder.sshd("");
    let stores = ["b1", "b2", "b3"].map(|name| scene.builder.rooted_store(name, 500));
    let uris = stores.each_ref().map(|store| scene.over_ssh(&sshd, store));
    let down = format!("ssh-ng://127.0.0.1:{}", free_port());
    let machines = scene.builder.path("machines");
    let lines = [&uris[0], &uris[1], &down].map(|uri| format!("{uri} x86_64-linux\n"));
    fs::write(&machines, lines.concat() + "https://cache.example.org\n").unwrap();
    let machines = machines.to_str().unwrap();

    let output = scene.run(&["--machines", machines, "--store", &uris[2], "--json"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let (ok, json) = ended(output);
    assert!(!ok, "{json:#}");
    assert!(said.contains("https://cache.example.org"), "{said}");
    let by_store = json["stores"].as_array().unwrap();
    assert_eq!(by_store.len(), 4, "{json:#}");
    for store in by_store {
        if let Some(error) = store["error"].as_str() {
            assert!(error.contains("no sshd listens"), "{error}");
            assert_eq!(counts(store), [0; 6]);
        } else {
            assert_eq!(counts(store), [500, 500, 0, 0, 0, 0], "{json:#}");
        }
    }
    let failed = by_store.iter().filter(|store| !store["error"].is_null());
    assert_eq!(failed.count(), 1);
    for store in &stores {
        let (verified, words) = store.verify(&scene.public());
        assert!(verified, "{words}");
    }
}

#[test]
fn a_daemon_that_does_not_permit_it_says_so_before_anything_is_signed() {
    let scene = Scene::new();
    let (refusing, willing) = (
        scene.builder.rooted_store("refusing", 50),
        scene.builder.rooted_store("willing", 50),
    );
    let daemons = [refusing.daemon("trusted-users ="), willing.daemon("")];
    let [first, second] = daemons.each_ref().map(socket_uri);
    let output = scene.run(&["--store", &first, "--store", &second, "--json"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let (ok, json) = ended(output);
    assert_eq!(counts(&json["stores"][1]), [50, 50, 0, 0, 0, 0]);
    if !untrusted_are_refused() {
        assert!(ok);
        assert!(refusing.verify(&scene.public()).0);
        return;
    }
    assert!(!ok);
    let error = json["stores"][0]["error"].as_str().unwrap();
    for words in [
        "not permitted",
        "not privileged to add signatures",
        "trusted-users",
        "as root",
    ] {
        assert!(error.contains(words), "{error}");
    }
    assert!(said.contains("not permitted"), "{said}");
    assert_eq!(counts(&json["stores"][0]), [50, 0, 0, 0, 0, 0]);
    assert!(!refusing.verify(&scene.public()).0);
}

/// Waits until some paths are signed, but long before all are.
fn wait_for_signatures(scene: &Scene, store: &RootedStore<'_>, child: &mut Child) {
    let begun = Instant::now();
    loop {
        let mut nix = store.command("nix");
        let path = scene.builder.store_dir.join(&numbered(300));
        nix.args(["path-info", "--sigs", &path]);
        let output = nix.output().unwrap();
        let words = String::from_utf8_lossy(&output.stdout).into_owned();
        if words.contains("signer-1:") {
            return;
        }
        assert!(child.try_wait().unwrap().is_none(), "it ended too soon");
        assert!(
            begun.elapsed().as_secs() < 20,
            "nothing is signed: {output:?}"
        );
        sleep(Duration::from_millis(5));
    }
}

#[test]
fn interrupted_and_started_again_it_goes_on() {
    let scene = Scene::new();
    let paths = 30_000;
    let store = scene.builder.rooted_store("one", paths);
    let daemon = store.daemon("");
    let uri = socket_uri(&daemon);
    let mut before = 0;
    for signal in [Signal::INT, Signal::KILL] {
        let mut child = scene.command(&["--store", &uri, "--json"]).spawn().unwrap();
        if signal == Signal::INT {
            wait_for_signatures(&scene, &store, &mut child);
        } else {
            sleep(Duration::from_millis(400));
        }
        builder::signal(i32::try_from(child.id()).unwrap(), signal);
        let begun = Instant::now();
        let output = child.wait_with_output().unwrap();
        assert!(begun.elapsed() < Duration::from_secs(5), "it does not stop");
        if signal == Signal::INT {
            let (ok, json) = ended(output);
            assert!(!ok && json["interrupted"] == true, "{json:#}");
            let [all, signed, already, ..] = counts(&json["stores"][0]);
            assert_eq!((all, already), (paths as u64, before));
            assert!(signed > 0 && signed < all, "{json:#}");
            assert_eq!(json["stores"][0]["left"], all - signed);
            before = signed;
        } else {
            assert_eq!(output.status.code(), None);
        }
    }
    let (ok, json) = scene.json(&["--store", &uri]);
    assert!(ok, "{json:#}");
    let [all, signed, already, ..] = counts(&json["stores"][0]);
    assert_eq!(signed + already, all);
    assert!(
        already >= before,
        "{before} were counted as signed, {already} are"
    );
    assert!(store.verify(&scene.public()).0);
}

#[test]
fn paths_that_a_store_refuses_are_counted_with_its_reason() {
    let scene = Scene::new();
    let store = scene.builder.rooted_store("one", 50);
    // The store's own database refuses two of them, as a damaged one would.
    let refused = [7, 31].map(numbered);
    let names = refused
        .each_ref()
        .map(|path| format!("'{}'", scene.builder.store_dir.join(path)));
    let trigger = format!(
        "create trigger refuse before update on ValidPaths when new.path in ({}) \
         begin select raise(abort, 'this one is refused'); end",
        names.join(", ")
    );
    let database = rusqlite::Connection::open(store.database()).unwrap();
    database.execute_batch(&trigger).unwrap();
    drop(database);
    let daemon = store.daemon("");
    let uri = socket_uri(&daemon);
    let (ok, json) = scene.json(&["--store", &uri]);
    assert!(!ok, "{json:#}");
    assert_eq!(counts(&json["stores"][0]), [50, 48, 0, 0, 0, 2], "{json:#}");
    let failures = json["stores"][0]["failures"].as_array().unwrap();
    let told: u64 = failures.iter().map(|f| f["count"].as_u64().unwrap()).sum();
    assert_eq!(told, 2, "{json:#}");
    for failure in failures {
        let reason = failure["reason"].as_str().unwrap();
        assert!(reason.contains("executing SQLite statement"), "{reason}");
    }
    let output = scene.run(&["--store", &uri]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("failed: ") && text.contains("executing SQLite statement"),
        "{text}"
    );
}

#[test]
fn a_terminal_shows_how_far_each_store_is() {
    let scene = Scene::new();
    let stores = ["one", "two"].map(|name| scene.builder.rooted_store(name, 4000));
    let daemons = stores.each_ref().map(|store| store.daemon(""));
    let line = format!(
        "stty cols 200; {} sign-all --store-dir {} --secret-key-file {} --jobs 1 --store {} --store {}",
        env!("CARGO_BIN_EXE_muster"),
        scene.builder.store_dir,
        scene.key_file.display(),
        socket_uri(&daemons[0]),
        socket_uri(&daemons[1]),
    );
    let output = Command::new("script")
        .args(["-qec", &line, "/dev/null"])
        .stdin(Stdio::null())
        .output()
        .expect("script(1) is needed");
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{shown}");
    // The second waits while the first is signed, as --jobs 1 has it.
    for words in [
        "waits for its turn",
        " of 4000 paths, ",
        "/s, ",
        " s left",
        "done, 4000 signed",
    ] {
        assert!(shown.contains(words), "no {words:?} in {shown:?}");
    }
    for store in &stores {
        assert!(store.verify(&scene.public()).0);
    }
}

#[test]
fn garbage_is_collected_meanwhile() {
    let scene = Scene::new();
    let store = scene.builder.rooted_store("one", 6000);
    let daemon = store.daemon("");
    let child = scene
        .command(&["--store", &socket_uri(&daemon), "--json"])
        .spawn()
        .unwrap();
    // Everything is garbage; the collector takes from the last path to the first.
    let mut collect = store.command("nix-store");
    collect
        .arg("--gc")
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    assert!(collect.status().unwrap().success());
    let (ok, json) = ended(child.wait_with_output().unwrap());
    let [paths, signed, already, addressed, gone, failed] = counts(&json["stores"][0]);
    assert!(ok, "{json:#}");
    assert_eq!((already, addressed, failed), (0, 0, 0), "{json:#}");
    assert_eq!(signed + gone, paths);
    println!("{signed} signed, {gone} gone");
}

#[test]
fn wrong_command_lines_and_keys() {
    let scene = Scene::new();
    let muster = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_muster"));
        let output = command.arg("sign-all").args(arguments).output().unwrap();
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code().unwrap(), words)
    };
    let key = scene.key_file.to_str().unwrap();
    let (code, words) = muster(&[]);
    assert_eq!(code, 2);
    assert!(words.contains("--secret-key-file"), "{words}");
    let (code, words) = muster(&[
        "--secret-key-file",
        key,
        "--store",
        "https://cache.nixos.org",
    ]);
    assert_eq!(code, 2);
    assert!(words.contains("through its nix-daemon"), "{words}");
    let (code, _) = muster(&["--secret-key-file", key, "--jobs", "0"]);
    assert_eq!(code, 2);
    let (code, words) = muster(&["--secret-key-file", "/no/such/key"]);
    assert_eq!(code, 1);
    assert!(words.contains("/no/such/key"), "{words}");
    fs::set_permissions(&scene.key_file, fs::Permissions::from_mode(0o644)).unwrap();
    let (code, words) = muster(&["--secret-key-file", key]);
    assert_eq!(code, 1);
    assert!(words.contains("chmod 600"), "{words}");
    let (code, words) = muster(&["--secret-key-file", key, "--machines", "/no/such/machines"]);
    assert_eq!(code, 1);
    assert!(words.contains("/no/such/machines"), "{words}");
    assert!(Path::new(key).exists());
}
