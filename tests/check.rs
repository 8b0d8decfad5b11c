//! `muster check` before real builders, and before set-ups that are broken in one place each.

mod builder;

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use builder::{Builder, free_port};
use muster::nix::signature::{KeyName, SecretKey};
use serde_json::Value;

/// A client of one builder, with a configuration, a key and a `nix.conf` of its own.
struct Client {
    dir: tempfile::TempDir,
    store_dir: String,
    port: u16,
}

/// What a check printed.
struct Checked {
    status: i32,
    out: String,
    err: String,
}

impl Client {
    fn new(builder: &Builder) -> Self {
        let client = Self {
            dir: tempfile::tempdir().unwrap(),
            store_dir: builder.store_dir.as_str().to_owned(),
            port: free_port(),
        };
        for name in ["state", "conf", "bin"] {
            fs::create_dir(client.path(name)).unwrap();
        }
        client.write("state/secret-key", &key("client-1"), 0o600);
        let public = SecretKey::parse(&key("client-1")).unwrap().public();
        let text = format!(
            "extra-substituters = http://127.0.0.1:{}/\nextra-trusted-public-keys = {public}\n\
             narinfo-cache-negative-ttl = 60\n",
            client.port
        );
        client.write("conf/nix.conf", &text, 0o644);
        client
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, text: &str, mode: u32) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    /// Checks these upstreams, with more lines of configuration and more flags.
    fn check(&self, upstreams: &[String], more: &str, flags: &[&str]) -> Checked {
        let list: Vec<_> = upstreams.iter().map(|uri| format!("{uri:?}")).collect();
        let text = format!(
            "listen = [\"127.0.0.1:{}\"]\nlocal-daemon = false\nconnect-timeout = 4\n\
             store-dir = {:?}\nupstreams = [{}]\n{more}\n",
            self.port,
            self.store_dir,
            list.join(", ")
        );
        let text = if more.contains("machines =") {
            text
        } else {
            format!("machines = false\n{text}")
        };
        let config = self.write("config.toml", &text, 0o644);
        let mut command = Command::new(env!("CARGO_BIN_EXE_muster"));
        let path = std::env::var("PATH").unwrap();
        command
            .args(["check", "--config", config.to_str().unwrap()])
            .args(flags)
            .env("STATE_DIRECTORY", self.path("state"))
            .env("NIX_CONF_DIR", self.path("conf"))
            .env("NIX_SSHOPTS", "-F none -oIdentityAgent=none")
            .env("PATH", format!("{}:{path}", self.path("bin").display()))
            .env_remove("MUSTER_CONFIG")
            .stdin(Stdio::null());
        let output = command.output().unwrap();
        Checked {
            status: output.status.code().unwrap_or(-1),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// The findings of one upstream, from JSON.
    fn findings(&self, upstream: &str) -> Value {
        let checked = self.check(
            &[upstream.to_owned()],
            "",
            &["--json", "--only", "^(ssh|unix|daemon|file)"],
        );
        checked.json()["subjects"][0]["checks"].clone()
    }
}

impl Checked {
    #[track_caller]
    fn json(&self) -> Value {
        let json = serde_json::from_str(&self.out);
        json.unwrap_or_else(|error| panic!("{error}: {}{}", self.out, self.err))
    }

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

fn key(name: &str) -> String {
    let seed = zeroize::Zeroizing::new([7; 32]);
    let key = SecretKey::from_seed(KeyName::new(name).unwrap(), &seed);
    format!("{}\n", *key.to_secret_text())
}

fn uri(builder: &Builder, port: u16, host_key: Option<&str>, more: &str) -> String {
    let pinned = host_key.map(|name| {
        let key = STANDARD.encode(builder.host_key(name));
        let key = key.replace('+', "%2B").replace('=', "%3D");
        format!("&base64-ssh-public-host-key={key}")
    });
    let key = builder.path("user");
    format!(
        "ssh-ng://127.0.0.1:{port}?ssh-key={}{}{more}",
        key.display(),
        pinned.unwrap_or_default()
    )
}

/// The outcome of one check, and the words about it.
#[track_caller]
fn finding(findings: &Value, check: &str) -> (String, String) {
    let all = findings.as_array().unwrap_or_else(|| panic!("{findings}"));
    let found = all.iter().find(|finding| finding["check"] == check);
    let found = found.unwrap_or_else(|| panic!("no {check} in {findings:#}"));
    let text = |name: &str| found[name].as_str().unwrap_or_default().to_owned();
    (
        text("outcome"),
        format!("{} -> {}", text("seen"), text("remedy")),
    )
}

#[track_caller]
fn expect(findings: &Value, check: &str, outcome: &str, words: &str) {
    let (is, said) = finding(findings, check);
    assert!(
        is == outcome && said.contains(words),
        "{check}: {is}: {said}\n{findings:#}"
    );
}

/// All of them, but those that are named, are as they should be.
#[track_caller]
fn expect_ok_before(findings: &Value, failed: &str) {
    for finding in findings.as_array().unwrap() {
        if finding["check"] == failed {
            return;
        }
        assert_eq!(finding["outcome"], "ok", "{findings:#}");
    }
}

#[test]
fn a_good_set_up_passes_every_check() {
    let builder = Builder::new();
    let path = builder.add("file", &[b'x'; 3000]);
    builder.add("tiny", b"x");
    let sshd = builder.sshd("");
    let daemon = builder.daemon();
    let client = Client::new(&builder);
    let upstreams = [
        uri(&builder, sshd.port, Some("host"), ""),
        format!("unix://{}", daemon.socket.display()),
    ];
    let checked = client.check(&upstreams, "", &[]);
    assert_eq!(checked.status, 0, "{}{}", checked.out, checked.err);
    println!("{}", checked.out);
    checked.says(&[
        "this side: ok",
        "name, TCP, host key, login, remote program, clock, protocol, store directory, trust",
        "socket, protocol, store directory, trust, known path, fetch, signature",
        "all well: ",
    ]);
    assert!(!checked.out.contains('\x1b'), "colour on a terminal only");

    let checked = client.check(&upstreams, "", &["-v"]);
    checked.says(&[
        "host key: ssh-ed25519 SHA256:",
        ", as pinned",
        "logged in by publickey",
        "nix-daemon --stdio",
        "protocol 1.",
        &format!("known path: {path}, found in "),
        "its hash is right",
        "agrees with ours",
        "trusted: what it has is signed",
        "is free; no muster runs there",
        "client-1 is trusted",
        "30, cache.nixos.org has 40",
        "negative TTL: 60 s",
        "| debug1: ",
    ]);
}

#[test]
fn json_has_its_documented_form() {
    let builder = Builder::new();
    let client = Client::new(&builder);
    let checked = client.check(&["ssh-ng://127.0.0.1:1".to_owned()], "", &["--json"]);
    assert_eq!(checked.status, 1);
    let json = checked.json();
    assert_eq!(json["ok"], false);
    let mut failed = 0;
    for subject in json["subjects"].as_array().unwrap() {
        assert!(subject["name"].is_string());
        let kind = subject["kind"].as_str().unwrap();
        assert!(["this side", "machines file", "upstream"].contains(&kind));
        for check in subject["checks"].as_array().unwrap() {
            let keys: Vec<_> = check.as_object().unwrap().keys().collect();
            assert_eq!(keys, ["check", "outcome", "remedy", "seen", "words"]);
            let outcome = check["outcome"].as_str().unwrap();
            assert!(["ok", "note", "failed", "skipped"].contains(&outcome));
            failed += u64::from(outcome == "failed");
            if outcome == "failed" {
                assert!(
                    check["remedy"].is_string(),
                    "each failure has a remedy: {check}"
                );
            }
        }
    }
    assert_eq!(json["failed"], failed);
}

#[test]
fn a_login_that_fails_is_told_step_by_step() {
    let builder = Builder::new();
    builder.add("file", b"content");
    let sshd = builder.sshd("");
    let client = Client::new(&builder);
    let of = |uri: String| client.findings(&uri);

    let found = of("ssh-ng://no-such-host.invalid".to_owned());
    expect(
        &found,
        "name",
        "failed",
        "no-such-host.invalid is not known",
    );
    expect(&found, "fetch", "skipped", "");

    let found = of(uri(&builder, free_port(), None, ""));
    expect_ok_before(&found, "TCP");
    expect(&found, "TCP", "failed", "nothing listens there");
    expect(&found, "login", "skipped", "cannot be reached");

    let found = of(uri(&builder, sshd.port, Some("other-host"), ""));
    expect_ok_before(&found, "host key");
    expect(&found, "host key", "failed", "column 8");
    expect(&found, "login", "skipped", "host key");

    let locked = uri(&builder, sshd.port, Some("host"), "");
    let locked = locked.replace(
        &format!("ssh-key={}", builder.path("user").display()),
        &format!("ssh-key={}", builder.path("locked").display()),
    );
    let found = of(locked);
    expect_ok_before(&found, "login");
    expect(&found, "login", "failed", "Permission denied");
    expect(
        &found,
        "login",
        "failed",
        "accepts no key that muster can use",
    );
    expect(&found, "remote program", "skipped", "");

    let missing = "&remote-program=/opt/no/nix-daemon";
    let found = of(uri(&builder, sshd.port, Some("host"), missing));
    expect_ok_before(&found, "remote program");
    expect(
        &found,
        "remote program",
        "failed",
        "remote-program=/path/to/nix-daemon",
    );
    expect(&found, "protocol", "skipped", "");
    expect(&found, "clock", "ok", "agrees with ours");
}

#[test]
fn all_that_ssh_said_is_shown_on_demand() {
    let builder = Builder::new();
    let sshd = builder.sshd("");
    let client = Client::new(&builder);
    let upstream = [uri(&builder, sshd.port, Some("other-host"), "")];
    let short = client.check(&upstream, "", &["--only", "host key"]);
    assert_eq!(short.status, 1);
    short.says(&[
        "failed   host key: ",
        "(all that ssh said: -v)",
        "1 of 1 checks failed",
    ]);
    assert!(!short.out.contains("debug1"), "{}", short.out);
    let long = client.check(&upstream, "", &["--only", "host key", "-v"]);
    long.says(&["| debug1: ", "| Host key verification failed."]);
}

#[test]
fn a_clock_that_is_wrong_is_told_with_the_remedy() {
    let builder = Builder::new();
    builder.add("file", b"content");
    let client = Client::new(&builder);
    let script = "#!/bin/sh\ncase $SSH_ORIGINAL_COMMAND in\n\
                  date*) echo $(($(date +%s) + 7230)) ;;\n\
                  *) exec sh -c \"$SSH_ORIGINAL_COMMAND\" ;;\nesac\n";
    let forced = client.write("bin/forced", script, 0o755);
    let sshd = builder.sshd(&format!("ForceCommand {}", forced.display()));
    let found = client.findings(&uri(&builder, sshd.port, Some("host"), ""));
    expect(
        &found,
        "clock",
        "failed",
        "ahead of ours -> set both clocks by NTP",
    );
    expect(&found, "fetch", "ok", "its hash is right");
}

#[test]
fn accounts_that_run_one_program_only() {
    let builder = Builder::new();
    builder.add("file", b"content");
    let client = Client::new(&builder);
    let daemon = builder.path("bin/nix-daemon");
    let sshd = builder.sshd(&format!("ForceCommand {} --stdio", daemon.display()));
    let found = client.findings(&uri(&builder, sshd.port, Some("host"), ""));
    expect(&found, "fetch", "ok", "its hash is right");
    expect(&found, "clock", "skipped", "nothing but its daemon");

    let serve = builder.path("bin/nix-store");
    let sshd = builder.sshd(&format!("ForceCommand {} --serve", serve.display()));
    let found = client.findings(&uri(&builder, sshd.port, Some("host"), ""));
    expect(&found, "login", "ok", "");
    expect(&found, "remote program", "failed", "nix.sshServe.protocol");
}

#[test]
fn a_store_in_another_directory_is_found_out() {
    let (builder, other) = (Builder::new(), Builder::new());
    other.add("file", b"content");
    let sshd = other.sshd("");
    let client = Client::new(&builder);
    let found = client.findings(&uri(&other, sshd.port, Some("host"), ""));
    expect(&found, "protocol", "ok", "protocol 1.");
    expect(&found, "store directory", "failed", "store-dir");
    expect(&found, "fetch", "skipped", "");
}

#[test]
fn trust_signatures_and_bytes() {
    let builder = Builder::new();
    let (_, built) = builder.build("built", "words");
    let sshd = builder.sshd("");
    let client = Client::new(&builder);
    let at = |more: &str| uri(&builder, sshd.port, Some("host"), more);

    let found = client.findings(&at("&trusted=false"));
    expect(&found, "trust", "failed", "trusted-public-keys");
    let public = SecretKey::parse(&key("signer-1"))
        .unwrap()
        .public()
        .to_string();
    let public = public.replace('+', "%2B").replace('=', "%3D");
    let with_key = format!("&trusted-public-keys={public}");
    let path = format!("{}/{built}", builder.store_dir);
    let flags = ["--json", "--only", "^ssh", "--path", &path];
    let findings = |upstream: &str| {
        let checked = client.check(&[upstream.to_owned()], "", &flags);
        checked.json()["subjects"][0]["checks"].clone()
    };
    let found = findings(&at(&with_key));
    expect(&found, "trust", "ok", "must be signed by signer-1");
    expect(&found, "signature", "failed", "trusted-public-keys");

    let file = builder.path("signer");
    fs::write(&file, key("signer-1")).unwrap();
    sign(&builder, &file, &path);
    let found = findings(&at(&with_key));
    expect(&found, "signature", "ok", "signed by signer-1");

    // Bytes that are not the registered ones.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(&path, "CHANGD\n").unwrap();
    let found = findings(&at(""));
    expect(&found, "known path", "ok", "");
    expect(&found, "fetch", "failed", "--repair");
}

fn sign(builder: &Builder, file: &Path, path: &str) {
    nix(
        builder,
        &["store", "sign", "--key-file", file.to_str().unwrap(), path],
    );
}

/// Runs `nix` on the builder's own store.
fn nix(builder: &Builder, arguments: &[&str]) {
    let name = |folder: &str| builder.path(folder).to_str().unwrap().to_owned();
    let ran = Command::new("nix")
        .args(["--extra-experimental-features", "nix-command"])
        .args(arguments)
        .env("NIX_STORE_DIR", name("store"))
        .env("NIX_STATE_DIR", name("state"))
        .env("NIX_LOG_DIR", name("log"))
        .env("NIX_CONF_DIR", name("conf"))
        .env("NIX_REMOTE", "local")
        .status();
    assert!(ran.expect("nix is needed").success());
}

#[test]
fn this_side_in_each_broken_form() {
    let builder = Builder::new();
    let client = Client::new(&builder);
    let here = |more: &str| {
        let checked = client.check(&[], more, &["--json", "--only", "^this side"]);
        checked.json()["subjects"][0]["checks"].clone()
    };
    let good = here("");
    for name in [
        "signing key",
        "port",
        "nix.conf URL",
        "nix.conf key",
        "key names",
        "priority",
        "negative TTL",
    ] {
        expect(&good, name, "ok", "");
    }

    let secret = client.path("state/secret-key");
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o640)).unwrap();
    let found = here("");
    expect(
        &found,
        "signing key",
        "failed",
        "can be read by others (mode 0640): chmod 600",
    );
    expect(&found, "nix.conf URL", "ok", "");
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();

    let same = client.write("same", &key("client-1"), 0o600);
    let both = format!(
        "secret-key-files = [{:?}, {:?}]",
        secret.display(),
        same.display()
    );
    let found = here(&both);
    expect(
        &found,
        "signing key",
        "failed",
        "two keys are named client-1",
    );

    let taken = TcpListener::bind(("127.0.0.1", client.port)).unwrap();
    expect(&here(""), "port", "failed", "ss -ltnp");
    drop(taken);

    expect(
        &here("priority = 50"),
        "priority",
        "failed",
        "50, cache.nixos.org has 40",
    );

    let conf = fs::read_to_string(client.path("conf/nix.conf")).unwrap();
    let with = |text: &str| {
        client.write("conf/nix.conf", text, 0o644);
        here("")
    };
    let found = with("");
    expect(
        &found,
        "nix.conf URL",
        "failed",
        &format!("extra-substituters = http://127.0.0.1:{}", client.port),
    );
    expect(
        &found,
        "nix.conf key",
        "failed",
        "extra-trusted-public-keys = client-1:",
    );
    expect(&found, "negative TTL", "failed", "3600 s");
    let other = SecretKey::from_seed(
        KeyName::new("client-1").unwrap(),
        &zeroize::Zeroizing::new([8; 32]),
    );
    let found = with(&format!("trusted-public-keys = {}\n{conf}", other.public()));
    expect(
        &found,
        "nix.conf key",
        "failed",
        "the first of a name counts",
    );
    expect(&found, "key names", "failed", "client-1");
    let mine = conf.replace(
        &format!(":{}/", client.port),
        &format!(":{}/?priority=45", client.port),
    );
    expect(
        &with(&mine),
        "priority",
        "failed",
        "45, cache.nixos.org has 40",
    );
}

#[test]
fn without_nix_the_files_are_read() {
    let builder = Builder::new();
    let client = Client::new(&builder);
    client.write("bin/nix", "#!/bin/sh\nexit 1\n", 0o755);
    let conf = fs::read_to_string(client.path("conf/nix.conf")).unwrap();
    client.write("conf/more.conf", &conf, 0o644);
    client.write(
        "conf/nix.conf",
        "!include none.conf\ninclude more.conf\n",
        0o644,
    );
    let checked = client.check(&[], "", &["--only", "nix.conf|priority|negative", "-v"]);
    assert_eq!(checked.status, 0, "{}{}", checked.out, checked.err);
    checked.says(&[
        "conf/nix.conf)",
        "client-1 is trusted",
        "30, cache.nixos.org has 40",
        "60 s",
    ]);
}

#[test]
fn lines_that_an_older_nix_reads_otherwise_are_told() {
    let builder = Builder::new();
    let client = Client::new(&builder);
    let machines = client.write(
        "machines",
        "ssh-ng://127.0.0.1:1 x86_64-linux\n  @/nonexistent\nssh-ng://b x86_64-linux - many\n",
        0o644,
    );
    let setting = format!("machines = {:?}", machines.display());
    let checked = client.check(&[], &setting, &["--only", "machines file"]);
    assert_eq!(checked.status, 1);
    let path = machines.display();
    checked.says(&[
        &format!("note     line: {path}:2:1"),
        &format!("failed   line: {path}:3:"),
        "Nix refuses the whole file for it",
    ]);
}

#[test]
fn binary_caches_over_http_and_in_a_folder() {
    let builder = Builder::new();
    let (_, built) = builder.build("built", "words");
    let daemon = builder.daemon();
    let client = Client::new(&builder);
    let port = free_port();
    let text = format!(
        "listen = \"127.0.0.1:{port}\"\nmachines = false\nlocal-daemon = false\nstore-dir = {:?}\n\
         upstreams = [\"unix://{}\"]\n",
        client.store_dir,
        daemon.socket.display()
    );
    let config = client.write("server.toml", &text, 0o644);
    let mut server = Command::new(env!("CARGO_BIN_EXE_muster"))
        .args(["serve", "--config", config.to_str().unwrap()])
        .env("STATE_DIRECTORY", client.path("state"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    builder::wait_for("muster serve", || {
        std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
    });
    let path = builder.store_dir.join(&built);
    let public = SecretKey::parse(&key("client-1"))
        .unwrap()
        .public()
        .to_string();
    let public = public.replace('+', "%2B").replace('=', "%3D");
    let flags = ["--json", "--only", "^(http|file)", "--path", &path];
    let checked = |upstream: &str| {
        let checked = client.check(&[upstream.to_owned()], "", &flags);
        checked.json()["subjects"][0]["checks"].clone()
    };
    let found = checked(&format!(
        "http://127.0.0.1:{port}?trusted-public-keys={public}"
    ));
    let nowhere = checked(&format!("http://127.0.0.1:{port}/nowhere"));
    let strange = checked(&format!("http://127.0.0.1:{port}?trusted=false"));
    let not_secure = checked(&format!("https://127.0.0.1:{port}"));
    let _ = server.kill();
    let _ = server.wait();
    for name in [
        "name",
        "TCP",
        "cache info",
        "store directory",
        "trust",
        "known path",
        "fetch",
        "clock",
    ] {
        expect(&found, name, "ok", "");
    }
    expect(&found, "cache info", "ok", "priority 30");
    expect(&found, "signature", "ok", "signed by client-1");
    expect(
        &nowhere,
        "cache info",
        "failed",
        "status 404 to /nix-cache-info",
    );
    expect(&nowhere, "fetch", "skipped", "");
    expect(&not_secure, "TCP", "ok", "");
    expect(
        &not_secure,
        "TLS",
        "failed",
        "its certificate must be signed by",
    );
    expect(&strange, "trust", "failed", "trusted-public-keys");
    expect(
        &strange,
        "signature",
        "failed",
        "no signature by a trusted key",
    );

    let gone = checked(&format!("http://127.0.0.1:{port}"));
    expect(&gone, "TCP", "failed", "nothing listens there");
    let found = checked("file:///no/such/cache");
    expect(&found, "cache info", "failed", "nix copy --to file://");

    let folder = client.path("cache");
    let to = format!("file://{}", folder.display());
    nix(&builder, &["copy", "--to", &to, &path]);
    let found = checked(&format!("{to}?trusted=true"));
    for name in ["store directory", "known path", "fetch", "signature"] {
        expect(&found, name, "ok", "");
    }
}

#[test]
fn one_failure_does_not_keep_others_from_being_checked() {
    let builder = Builder::new();
    builder.add("file", b"content");
    let sshd = builder.sshd("");
    let client = Client::new(&builder);
    let upstreams = [
        "ssh-ng://no-such-host.invalid".to_owned(),
        uri(&builder, sshd.port, Some("host"), ""),
        "unix:///no/such/socket".to_owned(),
    ];
    let checked = client.check(&upstreams, "", &["--only", "^(ssh|unix)"]);
    assert_eq!(checked.status, 1);
    checked.says(&[
        "ssh-ng://no-such-host.invalid: failed",
        &format!("ssh-ng://127.0.0.1:{}: ok", sshd.port),
        "unix:///no/such/socket: failed",
        "is nix-daemon installed here?",
    ]);
}

#[test]
fn as_the_service_runs_the_same_check_under_its_settings() {
    let builder = Builder::new();
    let client = Client::new(&builder);
    // What systemd would do is in its own test; here is what it is asked for.
    let unit = format!(
        "[Service]\nExecStart={} serve --no-machines --no-local-daemon --listen 127.0.0.1:{}\n\
         DynamicUser=yes\nProtectSystem=strict\nLoadCredential=key:/k\n",
        env!("CARGO_BIN_EXE_muster"),
        client.port
    );
    client.write("unit", &unit, 0o644);
    client.write(
        "bin/systemctl",
        &format!("#!/bin/sh\ncat {}\n", client.path("unit").display()),
        0o755,
    );
    let script = "#!/bin/sh\necho \"systemd-run $*\" >&2\nwhile :; do case $1 in -*) shift;; *) break;; esac; done\nexec \"$@\"\n";
    client.write("bin/systemd-run", script, 0o755);
    let checked = client.check(&[], "", &["--as-service", "--only=port", "--json"]);
    assert_eq!(checked.status, 0, "{}{}", checked.out, checked.err);
    assert_eq!(checked.json()["subjects"][0]["checks"][0]["check"], "port");
    for word in [
        "--pipe --wait",
        "--property=DynamicUser=yes",
        "--property=LoadCredential=key:/k",
        "--property=User=muster",
    ] {
        assert!(checked.err.contains(word), "{word}: {}", checked.err);
    }
}

#[test]
fn wrong_command_lines_are_told_with_the_way_out() {
    let builder = Builder::new();
    let client = Client::new(&builder);
    let upstream = ["unix:///no/such/socket".to_owned()];
    let check = |flags: &[&str]| client.check(&upstream, "", flags);
    // Nothing that was checked is not all well.
    let none = check(&["--only", "builder-a"]);
    assert_eq!(none.status, 1, "{}", none.out);
    assert!(
        none.err.contains("matches no check") && none.err.contains("unix:///no/such/socket"),
        "{}",
        none.err
    );
    for flags in [
        &["--only", "("][..],
        &["--url", "ftp://x"],
        &["--url", "x:99999"],
        &["extra"],
    ] {
        let wrong = check(flags);
        assert_eq!(wrong.status, 2, "{flags:?}: {}{}", wrong.out, wrong.err);
    }
    let path = check(&["--path", "hello"]);
    assert_eq!(path.status, 1);
    assert!(path.err.contains("--path hello"), "{}", path.err);

    let says = |words: &str| {
        let script = format!("#!/bin/sh\necho '{words}' >&2\nexit 1\n");
        client.write("bin/systemctl", &script, 0o755);
        let wrong = check(&["--as-service=other"]);
        assert_eq!(wrong.status, 1);
        wrong.err
    };
    let unknown = says("No files found for other.service.");
    assert!(
        unknown.contains("knows no unit other;") && unknown.contains("--as-service=UNIT"),
        "{unknown}"
    );
    let without = says("System has not been booted with systemd as init system (PID 1).");
    assert!(without.contains("needs a running systemd"), "{without}");

    let found = client.check(
        &[],
        "secret-key-files = [\"/none\"]",
        &["--json", "--only", "signing key"],
    );
    let found = found.json()["subjects"][0]["checks"].clone();
    expect(&found, "signing key", "failed", "muster key generate");
    expect(&found, "signing key", "failed", "name a key that is there");
}

/// Builders that accept and never answer take the time of one, not of all.
#[test]
fn upstreams_are_checked_at_the_same_time() {
    let builder = Builder::new();
    let client = Client::new(&builder);
    let silent: Vec<_> = (0..6)
        .map(|_| TcpListener::bind("127.0.0.1:0").unwrap())
        .collect();
    let port = |listener: &TcpListener| listener.local_addr().unwrap().port();
    let upstreams: Vec<_> = silent
        .iter()
        .map(|listener| format!("ssh-ng://127.0.0.1:{}", port(listener)))
        .collect();
    let took = |upstreams: &[String]| {
        let begun = std::time::Instant::now();
        let checked = client.check(upstreams, "", &["--only", "^ssh", "--json"]);
        assert_eq!(checked.status, 1);
        let json = checked.json();
        assert_eq!(json["subjects"].as_array().unwrap().len(), upstreams.len());
        begun.elapsed().as_secs_f64()
    };
    let one = took(&upstreams[..1]);
    let all = took(&upstreams);
    assert!(one > 2.0, "it was waited for: {one} s");
    assert!(all < 2.5 * one, "six took {all} s, one {one} s");
}
