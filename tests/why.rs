//! `muster why` over real daemons: holders, strangers, other bytes, and closures before they are built.

mod builder;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use builder::{Builder, Daemon, free_port, nar_of};
use muster::nix::hash::{NarHash, encode_hex};
use muster::nix::signature::{KeyName, SecretKey};
use muster::nix::store_path::StorePath;
use serde_json::Value;

const OTHER_HASH: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

/// A client of some upstreams, with a key and a `nix.conf` of its own.
struct Client {
    dir: tempfile::TempDir,
    port: u16,
}

struct Said {
    status: i32,
    out: String,
    err: String,
}

impl Client {
    fn new(builder: &Builder, upstreams: &[String]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let port = free_port();
        let client = Self { dir, port };
        fs::create_dir(client.path("conf")).unwrap();
        let list: Vec<_> = upstreams.iter().map(|uri| format!("{uri:?}")).collect();
        let text = format!(
            "listen = \"127.0.0.1:{port}\"\nmachines = false\nlocal-daemon = false\nconnect-timeout = 4\n\
             store-dir = {:?}\nsecret-key-files = [{:?}]\nupstreams = [{}]\n",
            builder.store_dir.as_str(),
            client.path("key").display(),
            list.join(", ")
        );
        fs::write(client.path("config.toml"), text).unwrap();
        fs::write(client.path("key"), key().to_secret_text().as_str()).unwrap();
        let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        fs::set_permissions(client.path("key"), private).unwrap();
        client.trust(&key().public().to_string());
        client
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes the only key that this client trusts.
    fn trust(&self, key: &str) {
        let text = format!("trusted-public-keys = {key}\n");
        fs::write(self.path("conf/nix.conf"), text).unwrap();
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_muster"));
        command
            .env("NIX_CONF_DIR", self.path("conf"))
            .env("STATE_DIRECTORY", self.path("state"))
            .env("NIX_SSHOPTS", "-F none -oIdentityAgent=none")
            .env("MUSTER_CONFIG", self.path("config.toml"))
            .stdin(Stdio::null());
        command
    }

    fn why(&self, args: &[&str]) -> Said {
        let output = self.command().arg("why").args(args).output().unwrap();
        Said {
            status: output.status.code().unwrap_or(-1),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    #[track_caller]
    fn json(&self, status: i32, args: &[&str]) -> Value {
        let said = self.why(&[args, &["--json"]].concat());
        assert_eq!(said.status, status, "{}{}", said.out, said.err);
        serde_json::from_str(&said.out).unwrap()
    }
}

impl Said {
    #[track_caller]
    fn says(&self, words: &[&str]) {
        for word in words {
            assert!(
                self.out.contains(word),
                "no {word:?} in\n{}{}",
                self.out,
                self.err
            );
        }
    }
}

fn key() -> SecretKey {
    SecretKey::from_seed(
        KeyName::new("client-1").unwrap(),
        &zeroize::Zeroizing::new([7; 32]),
    )
}

fn uri(daemon: &Daemon, more: &str) -> String {
    format!("unix://{}{more}", daemon.socket.display())
}

const DEAD: &str = "ssh-ng://127.0.0.1:1";

#[test]
fn who_has_it_and_who_would_take_it() {
    let builder = Builder::new();
    let (_, built) = builder.build("built", "words");
    let has = builder.daemon();
    let without = builder.second_daemon("without", &[]);
    let client = Client::new(
        &builder,
        &[uri(&has, ""), uri(&without, ""), DEAD.to_owned()],
    );
    let path = builder.store_dir.join(&built);

    let said = client.why(&[&path]);
    println!("{}", said.out);
    assert_eq!(said.status, 0, "{}{}", said.out, said.err);
    let nar = NarHash::of(&nar_of(b"built\n")).to_string();
    said.says(&[
        &path,
        &format!("{}: has it\n", uri(&has, "")),
        &format!("NAR hash    {nar}"),
        "signatures  none",
        "served      yes: the upstream is trusted",
        &format!("{}: does not have it", uri(&without, "")),
        &format!("{DEAD}: cannot tell"),
        "Connection refused",
        "`muster check` says what to do about those",
        "server    none runs here; one would serve it",
        "client    takes it: muster signs it by client-1, which nix.conf trusts",
    ]);
    assert!(!said.out.contains('\x1b'));

    let json = client.json(0, &[&built.hash().to_string()]);
    assert_eq!(json["path"], path);
    let keys: Vec<_> = json.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["client", "hash", "path", "server", "upstreams"]);
    let answers: Vec<_> = json["upstreams"]
        .as_array()
        .unwrap()
        .iter()
        .map(|u| &u["answer"])
        .collect();
    assert_eq!(answers, ["has", "absent", "unknown"]);
    assert_eq!(json["upstreams"][0]["nar-hash"], nar);
    assert_eq!(json["upstreams"][0]["served"], true);
    assert_eq!(json["client"]["accepts"], true);
    assert!(json["server"]["url"].is_null());

    // A link, as nix-build leaves one.
    let link = client.path("result");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    assert_eq!(client.json(0, &[link.to_str().unwrap()])["path"], path);

    client.trust("other-1:lzZbJO7cF6BNjZ5MMOyMyF2Y5PAryxIWzx0p/mo8Xbw=");
    let said = client.why(&[&path]);
    assert_eq!(said.status, 3);
    said.says(&[
        "client    refuses it",
        "extra-trusted-public-keys = client-1:",
    ]);

    let json = client.json(3, &["0000000000000000000000000000000a"]);
    assert!(json["path"].is_null());
    assert_eq!(json["client"]["accepts"], false);
    let said = client.why(&["0000000000000000000000000000000a"]);
    said.says(&["(nobody who can tell has a path with this hash part)"]);
    for (target, words) in [
        (&["hello"][..], "is no store path"),
        (&["nixpkgs#hello"], "nix eval --raw"),
        (
            &["--closure", "0000000000000000000000000000000a"],
            "says more of each",
        ),
        (
            &["--closure", "0000000000000000000000000000000a-x.drv"],
            "make it here with nix-instantiate",
        ),
    ] {
        let said = client.why(target);
        assert_eq!(said.status, 1, "{target:?}: {}", said.out);
        assert!(said.err.contains(words), "{target:?}: {}", said.err);
    }
}

#[test]
fn what_is_not_believed_is_not_served() {
    let builder = Builder::new();
    let (_, built) = builder.build("built", "words");
    let daemon = builder.daemon();
    let other = "other-1:lzZbJO7cF6BNjZ5MMOyMyF2Y5PAryxIWzx0p/mo8Xbw%3D";
    let untrusted = uri(&daemon, &format!("?trusted-public-keys={other}"));
    let client = Client::new(&builder, &[untrusted]);
    let said = client.why(&[&builder.store_dir.join(&built)]);
    assert_eq!(said.status, 3, "{}", said.out);
    said.says(&[
        "has it, but it is not served",
        "no: it has no signature by a key that is asked of this upstream",
        "client    gets a 404",
    ]);
    // What proves itself needs no signature.
    let source = builder.add("file", b"content");
    let said = client.why(&[&builder.store_dir.join(&source)]);
    assert_eq!(said.status, 0, "{}", said.out);
    said.says(&[
        "yes: its name proves its content",
        "client    takes it: its name proves its content",
    ]);
}

#[test]
fn other_bytes_are_told_and_the_running_server_decides() {
    let builder = Builder::new();
    let (_, built) = builder.build("built", "words");
    let first = builder.daemon();
    let other = builder.second_daemon("other", &[(&built, OTHER_HASH, 5)]);
    let client = Client::new(&builder, &[uri(&first, ""), uri(&other, "")]);
    let path = builder.store_dir.join(&built);
    let said = client.why(&[&path]);
    said.says(&["perhaps: upstreams have different bytes"]);

    let mut server = client
        .command()
        .arg("serve")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    builder::wait_for("muster serve", || {
        std::net::TcpStream::connect(("127.0.0.1", client.port)).is_ok()
    });
    let json = client.json(0, &[&path]);
    let _ = server.kill();
    let _ = server.wait();
    let served = json["server"]["nar-hash"].as_str().unwrap();
    assert_eq!(
        json["server"]["url"],
        format!("http://127.0.0.1:{}", client.port)
    );
    for upstream in json["upstreams"].as_array().unwrap() {
        assert_eq!(
            upstream["served"],
            upstream["nar-hash"] == served,
            "{upstream}"
        );
        let why = upstream["why"].as_str().unwrap();
        assert!(
            upstream["served"] == true || why.contains("serves other bytes"),
            "{why}"
        );
    }
    assert!(
        json["client"]["says"]
            .as_str()
            .unwrap()
            .contains("signed by client-1"),
        "{json:#}"
    );
}

/// A closure of three builds and a source, by name: derivations and outputs.
fn closure(builder: &Builder) -> BTreeMap<&'static str, (StorePath, StorePath)> {
    let file = builder.path("closure.nix");
    let text = "let make = name: needs: derivation { inherit name needs; system = builtins.currentSystem; \
                builder = \"/bin/sh\"; src = builtins.toFile \"source\" \"x\"; \
                args = [ \"-c\" \"echo $needs > $out\" ]; }; \
                low = make \"low\" \"\"; middle = make \"middle\" \"${low}\"; tool = make \"tool\" \"\"; \
                in make \"top\" \"${middle} ${builtins.substring 0 0 tool.outPath}\"";
    fs::write(&file, text).unwrap();
    let top = builder.instantiate(file.to_str().unwrap());
    let parse = |text: &str| builder.store_dir.parse(text.trim()).unwrap();
    let needed = builder.nix_store(&["-qR", &top]);
    let mut found = BTreeMap::new();
    for name in ["low", "middle", "tool", "top"] {
        let end = format!("-{name}.drv");
        let drv = needed.lines().find(|line| line.ends_with(&end)).unwrap();
        let out = builder.nix_store(&["-q", "--outputs", drv]);
        found.insert(name, (parse(drv), parse(&out)));
    }
    found
}

#[test]
fn the_weather_of_a_derivation_and_of_a_path() {
    let builder = Builder::new();
    let paths = closure(&builder);
    let daemon = builder.daemon();
    let (top, top_out) = &paths["top"];
    let top_drv = builder.store_dir.join(top);
    let low = &paths["low"].1;
    let low_nar = nar_of(b"\n");
    let low_hash = encode_hex(&NarHash::of(&low_nar).0);

    // Nothing is built yet but the source.
    let client = Client::new(&builder, &[uri(&daemon, ""), DEAD.to_owned()]);
    let json = client.json(3, &["--closure", &top_drv]);
    assert_eq!(
        (&json["kind"], &json["paths"], &json["built"]),
        (&"derivation".into(), &5.into(), &1.into())
    );
    assert_eq!(json["missing"].as_array().unwrap().len(), 4);
    assert_eq!(json["upstreams"][0]["has"], 1);
    assert!(
        json["upstreams"][1]["error"]
            .as_str()
            .unwrap()
            .contains("refused")
    );

    // One machine has built it all, another only the lowest part of it.
    builder.realise(&top_drv);
    let other = builder.second_daemon("other", &[(low, &low_hash, low_nar.len() as u64)]);
    let client = Client::new(&builder, &[uri(&daemon, ""), uri(&other, "")]);
    let said = client.why(&["--closure", &top_drv]);
    println!("{}", said.out);
    assert_eq!(said.status, 0, "{}{}", said.out, said.err);
    said.says(&[
        "5 paths that ",
        "HAS  SHARE",
        "ONLY HERE",
        "  5  100 %",
        "  1   20 %",
        "anywhere",
    ]);
    let json = client.json(0, &["--closure", &top_drv]);
    assert_eq!(json["upstreams"][0]["only-here"], 4);
    assert_eq!(
        (
            &json["upstreams"][1]["has"],
            &json["upstreams"][1]["only-here"]
        ),
        (&1.into(), &0.into())
    );
    assert_eq!(json["unknown-outputs"], 0);

    // At run time it needs neither the tool nor the source.
    let path = builder.store_dir.join(top_out);
    let json = client.json(0, &["--closure", &path]);
    assert_eq!(
        (&json["kind"], &json["paths"], &json["built"]),
        (&"path".into(), &3.into(), &3.into())
    );
    let keys: Vec<_> = json.as_object().unwrap().keys().collect();
    let documented = [
        "built",
        "bytes",
        "kind",
        "missing",
        "path",
        "paths",
        "unknown-outputs",
        "unreadable-derivations",
        "upstreams",
    ];
    assert_eq!(keys, documented);
    let hash = client.json(0, &["--closure", &top_out.hash().to_string()]);
    assert_eq!(hash, json);
}

#[test]
fn derivations_are_read_from_upstreams_too() {
    let builder = Builder::new();
    let paths = closure(&builder);
    let daemon = builder.daemon();
    let drv = builder.store_dir.join(&paths["top"].0);
    let client = Client::new(&builder, &[uri(&daemon, "")]);
    let here = client.json(3, &["--closure", &drv]);
    // The daemon sees its files; we see an empty folder in their place, as on another machine.
    let script = "mount -t tmpfs none \"$0\" && exec \"$@\"";
    let said = Command::new("unshare")
        .args([
            "--map-root-user",
            "--mount",
            "sh",
            "-c",
            script,
            builder.store_dir.as_str(),
        ])
        .args([
            env!("CARGO_BIN_EXE_muster"),
            "why",
            "--closure",
            "--json",
            &drv,
        ])
        .env("NIX_CONF_DIR", client.path("conf"))
        .env("MUSTER_CONFIG", client.path("config.toml"))
        .output()
        .unwrap();
    let json = serde_json::from_slice::<Value>(&said.stdout);
    let json = json.unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&said.stderr)));
    assert_eq!(json, here);
}
