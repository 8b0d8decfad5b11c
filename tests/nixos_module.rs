//! The NixOS modules without NixOS: what is pure in them is evaluated by a real Nix and held against our own
//! machines parser, our own configuration and systemd's own tools.

mod module;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use module::{SERVE, SOCKET, evaluate, project, text};
use muster::nix::machines::{Builder, Machines};
use muster::nix::store_uri::{StoreKind, StoreUri};
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::TestRunner;
use serde_json::{Value, json};

#[test]
fn every_nix_file_parses() {
    let mut files = vec![project("flake.nix")];
    let folder = fs::read_dir(project("nixos-module")).expect("read nixos-module");
    files.extend(folder.flatten().map(|entry| entry.path()));
    files.retain(|path| path.extension().is_some_and(|end| end == "nix"));
    assert!(files.len() >= 9, "{files:?}");
    for file in files {
        let mut nix = Command::new("nix-instantiate");
        let nix = nix.args(["--store", "dummy://", "--parse"]).arg(&file);
        let parsed = run(nix);
        assert!(parsed.status.success(), "{}", said(&parsed));
    }
}

#[test]
fn pure_files_take_nothing_but_each_other() {
    for file in ["lib.nix", "units.nix", "hardening.nix", "deb.nix"] {
        let path = project("nixos-module").join(file);
        let code = fs::read_to_string(&path).expect("read a module");
        let code: String = code
            .lines()
            .map(|line| line.split('#').next().unwrap_or_default())
            .collect::<Vec<_>>()
            .join("\n");
        for word in [
            "pkgs",
            "<nixpkgs>",
            "fetchurl",
            "fetchTarball",
            "fetchTree",
            "fetchGit",
            "currentSystem",
            "getEnv",
        ] {
            assert!(!code.contains(word), "{file} has {word}");
        }
    }
}

#[test]
fn build_machines_become_the_golden_configuration() {
    let machines = read_json("tests/vectors/nixos/build-machines.json");
    let golden = read_json("tests/vectors/nixos/configuration.json");
    let found = evaluate(
        "let found = lib.fromBuildMachines { buildMachines = input; exclude = [ \"unwanted.example\" ]; }; in
         found // { configuration = builtins.fromJSON (lib.configText {
           machines = false;
           priority = 20;
           store-dir = null;
           secret-key-files = [ \"sign-key-0\" ];
           upstreams = lib.namedUpstreams { office = { uri = \"daemon\"; connect-timeout = null; }; } ++ found.upstreams;
         }); }",
        &machines,
    );
    assert_eq!(found, golden, "{found:#}");
}

#[test]
fn the_golden_configuration_is_accepted() {
    let golden = read_json("tests/vectors/nixos/configuration.json");
    let configuration = &golden["configuration"];
    let folder = tempfile::tempdir().expect("make a folder");
    let file = folder.path().join("muster.json");
    fs::write(&file, configuration.to_string()).expect("write it");
    let check = |file: &Path| {
        run(Command::new(MUSTER)
            .args(["check-config", "--no-files", "--json"])
            .arg(file))
    };
    let checked = check(&file);
    assert!(checked.status.success(), "{}", said(&checked));
    let report: Value = serde_json::from_slice(&checked.stdout).expect("it writes JSON");
    let (upstreams, listed) = (&report["upstreams"], &configuration["upstreams"]);
    assert_eq!(
        upstreams.as_array().map(Vec::len),
        listed.as_array().map(Vec::len),
        "{report:#}"
    );
    assert_eq!(report["warnings"], json!([]), "{report:#}");
    assert_eq!(report["priority"], 20);

    let mut wrong = configuration.clone();
    wrong["listne"] = json!([]);
    fs::write(&file, wrong.to_string()).expect("write it");
    assert!(!check(&file).status.success());
}

/// What NixOS writes into /etc/nix/machines for the same machines is read by our own parser, and both ways
/// must lead to the same stores by the same keys.
#[test]
fn upstreams_are_those_of_the_machines_file_that_nixos_writes() {
    let mut runner = TestRunner::deterministic();
    let strategy = proptest::collection::vec(machine(), 0..8);
    let lists: Vec<Vec<Value>> = (0..400)
        .map(|_| strategy.new_tree(&mut runner).expect("a list").current())
        .collect();
    let found = evaluate(
        "map (buildMachines: lib.fromBuildMachines { inherit buildMachines; }) input",
        &json!(lists),
    );
    let mut compared = 0;
    for (machines, found) in lists.iter().zip(found.as_array().expect("a list")) {
        let file: String = machines
            .iter()
            .filter(|m| m.get("protocol") != Some(&Value::Null))
            .map(machines_line)
            .collect();
        let read = Machines::parse(&file, "/etc/nix/machines", &mut |_| Ok(None));
        assert!(read.errors.is_empty(), "{file}{:?}", read.errors);
        let read: Vec<String> = read
            .builders()
            .into_iter()
            .map(|Builder { uri, .. }| uri)
            .filter(by_ssh)
            .map(|uri| summary(&uri, uri.settings().ssh_key.clone()))
            .collect();
        let ours: Vec<String> = list(&found["upstreams"])
            .iter()
            .map(|table| StoreUri::parse(text(&table["uri"])).expect("a store URI"))
            .filter(by_ssh)
            .map(|uri| {
                let key = uri.settings().ssh_key.as_deref();
                let key = key.map(|name| credential(found, name));
                summary(&uri, key)
            })
            .collect();
        assert_eq!(ours, read, "\n{file}\n{found:#}");
        compared += read.len();
    }
    assert!(compared > 400, "{compared} stores were compared");
}

#[test]
fn the_units_of_the_deb_are_those_of_the_module() {
    let units = evaluate("deb", &Value::Null);
    let units = units.as_object().expect("texts by name");
    for (name, unit) in units {
        let file = project("debian").join(name);
        let kept = fs::read_to_string(&file).unwrap_or_default();
        assert_eq!(kept, text(unit), "{name} is old: run debian/units");
    }
    let kept = fs::read_dir(project("debian")).expect("read debian");
    let kept = kept.flatten().filter(|entry| {
        let path = entry.path();
        let end = path.extension().and_then(|end| end.to_str());
        matches!(end, Some("service" | "socket" | "timer"))
    });
    assert_eq!(kept.count(), units.len());
}

#[test]
fn systemd_knows_every_word_of_the_units() {
    let folder = tempfile::tempdir().expect("make a folder");
    for (name, unit) in units() {
        fs::write(folder.path().join(name), unit).expect("write a unit");
    }
    for (name, _) in units() {
        let verified = verify(&folder.path().join(&name));
        let complaints = said(&verified);
        assert!(
            verified.status.success() && complaints.trim().is_empty(),
            "{name}: {complaints}"
        );
    }
    // And it would have said so: this is the mistake that another module was shipped with.
    let wrong = folder.path().join("wrong.service");
    let unit =
        text(&evaluate(SERVE, &serve("wrong"))).replace("SystemCallFilter=", "SystemCallFilters=");
    fs::write(&wrong, unit).expect("write a unit");
    let complaints = said(&verify(&wrong));
    assert!(complaints.contains("Unknown key"), "{complaints}");
}

#[test]
fn the_sandbox_leaves_little_open() {
    let folder = tempfile::tempdir().expect("make a folder");
    let exposed = |name: &str, threshold: &str| {
        run(Command::new("systemd-analyze")
            .args([
                "security",
                "--offline=true",
                "--no-pager",
                "--threshold",
                threshold,
            ])
            .arg(folder.path().join(name)))
    };
    let mut services = 0;
    for (name, unit) in units() {
        fs::write(folder.path().join(&name), unit).expect("write a unit");
        if name.ends_with(".service") {
            // In tenths of ten.
            let analysed = exposed(&name, "15");
            assert!(analysed.status.success(), "{}", said(&analysed));
            services += 1;
        }
    }
    assert_eq!(services, 4);
    let open = format!("[Service]\nExecStart={MUSTER} serve\n");
    fs::write(folder.path().join("open.service"), open).expect("write a unit");
    assert!(!exposed("open.service", "15").status.success());
}

#[test]
fn texts_keep_secrets_out_and_say_what_they_must() {
    let unit = evaluate(SERVE, &serve("muster"));
    let unit = text(&unit);
    for line in [
        "LoadCredential=ssh-key-0:/root/.ssh/b1",
        "Requires=muster.socket",
        "StartLimitBurst=5",
        "Type=notify",
        "User=muster",
        "StateDirectoryMode=0700",
        "CacheDirectoryMode=0755",
        "NoNewPrivileges=true",
    ] {
        assert!(unit.lines().any(|l| l == line), "no {line}\n{unit}");
    }
    let socket = evaluate(SOCKET, &json!({ "listen": ["0.0.0.0:5000", "[::]:5000"] }));
    let listens = text(&socket).matches("ListenStream=").count();
    assert_eq!(listens, 2);
    // Nix's own daemon asks Muster; if it needed Muster to start, nothing would.
    assert!(!unit.contains("Before=") && !unit.contains("nix-daemon"));
}

#[test]
fn what_takes_a_restart_is_restarted_for() {
    let code = fs::read_to_string(project("src/app/reload.rs")).expect("read it");
    let (_, list) = code.split_once("let settings = [").expect("the list");
    let (list, _) = list.split_once("];").expect("its end");
    let quoted = list.split('"').skip(1).step_by(2);
    let mut settings: Vec<_> = quoted.collect();
    settings.sort_unstable();
    assert!(settings.len() > 15, "{settings:?}");
    let mut all: serde_json::Map<_, _> = settings.iter().map(|s| ((*s).into(), json!(1))).collect();
    all.insert("upstreams".into(), json!([]));
    let heeded = evaluate("builtins.attrNames (lib.needingRestart input)", &json!(all));
    assert_eq!(heeded, json!(settings));
    let none = evaluate("lib.needingRestart input", &json!({ "priority": 20 }));
    assert_eq!(none, json!({}));
}

/// The .deb's and NixOS's units, with a program that is there.
fn units() -> Vec<(String, String)> {
    let here = |unit: &str| unit.replace("/usr/bin/muster", MUSTER);
    let deb = evaluate("deb", &Value::Null);
    let mut units: Vec<_> = deb
        .as_object()
        .expect("texts by name")
        .iter()
        .map(|(name, unit)| (format!("deb-{name}"), here(text(unit))))
        .map(|(name, unit)| {
            let unit = unit
                .replace("Requires=muster.socket", "Requires=deb-muster.socket")
                .replace("Also=muster.socket", "Also=deb-muster.socket");
            (name, unit)
        })
        .collect();
    let socket = json!({ "name": "lab-muster", "listen": ["127.0.0.1:5000", "[::1]:5000"] });
    units.push((
        "lab-muster.service".to_owned(),
        text(&evaluate(SERVE, &serve("lab-muster"))).to_owned(),
    ));
    units.push((
        "lab-muster.socket".to_owned(),
        text(&evaluate(SOCKET, &socket)).to_owned(),
    ));
    let sign_all = evaluate(
        "let unit = units.signAll input; in
         lib.unitText [ (section \"Unit\" unit.unitConfig) (section \"Service\" unit.serviceConfig) ]",
        &json!({
            "muster": MUSTER,
            "credentials": ["sign-key:/run/secrets/sign"],
            "secretKeys": ["sign-key"],
        }),
    );
    units.push((
        "lab-sign-all.service".to_owned(),
        text(&sign_all).to_owned(),
    ));
    units
}

fn serve(name: &str) -> Value {
    json!({
        "name": name,
        "muster": MUSTER,
        "kill": "/bin/kill",
        "config": "/etc/muster/muster.toml",
        "credentials": ["ssh-key-0:/root/.ssh/b1", "sign-key-0:/run/secrets/sign"],
        "sshKey": "ssh-key",
        "knownHosts": "known-hosts",
    })
}

fn verify(unit: &Path) -> Output {
    run(Command::new("systemd-analyze")
        .args(["verify", "--man=no"])
        .arg(unit))
}

/// A build machine as the option `nix.buildMachines` holds it.
fn machine() -> impl Strategy<Value = Value> {
    let host = prop::sample::select(vec![
        "b1",
        "B1",
        "b2.example",
        "10.0.0.1",
        "[::1]",
        "[2001:DB8::1]:22",
        "b1:2222",
        "nix@b1",
        "b1?remote-store=/mnt",
        "b1?compress=true&remote-store=/mnt",
        "b1?remote-store=/mnt&remote-store=/other",
        "b1?compress=true",
        "b1?ssh-key=/other&max-connections=4",
        "localhost",
        "localhost?compress=true",
        "localhost:22",
    ]);
    let protocol = prop::sample::select(vec![
        Some(json!("ssh")),
        Some(json!("ssh-ng")),
        Some(Value::Null),
        None,
    ]);
    let user = prop::option::of(prop::sample::select(vec!["nix", "root", "Nix"]));
    let key = prop::option::of(prop::sample::select(vec![
        "/k1",
        "/k2",
        "/root/.ssh/a&b%20c?",
    ]));
    let host_key = prop::option::of(prop::sample::select(vec![
        "c3NoLWVkMjU1MTkgQUFBQQ==",
        "c3NoLWVkMjU1MTkgPz8+Pj8/IGI=",
    ]));
    let systems = prop::sample::select(vec!["x86_64-linux", "i686-linux,aarch64-linux", "-"]);
    (host, protocol, user, key, host_key, systems).prop_map(
        |(host, protocol, user, key, host_key, systems)| {
            let mut machine = json!({
                "hostName": host,
                "sshUser": user,
                "sshKey": key,
                "systems": systems,
                "publicHostKey": host_key,
            });
            if let Some(protocol) = protocol {
                machine["protocol"] = protocol;
            }
            machine
        },
    )
}

/// The line that NixOS writes for a machine, by its module nix-remote-build.
fn machines_line(machine: &Value) -> String {
    let field = |name: &str| machine[name].as_str().unwrap_or("-").to_owned();
    let user = machine["sshUser"].as_str();
    format!(
        "{}://{}{} {} {} 1 1 - - {}\n",
        machine["protocol"].as_str().unwrap_or("ssh"),
        user.map(|user| format!("{user}@")).unwrap_or_default(),
        field("hostName"),
        field("systems"),
        field("sshKey"),
        field("publicHostKey"),
    )
}

fn by_ssh(uri: &StoreUri) -> bool {
    matches!(uri.kind(), StoreKind::Ssh(_) | StoreKind::SshNg(_))
}

/// All that decides how a store is reached.
fn summary(uri: &StoreUri, ssh_key: Option<String>) -> String {
    let settings = uri.settings();
    format!(
        "{} {} key {ssh_key:?} host key {:?} compress {} connections {:?}",
        uri.name(),
        uri.id(),
        settings.host_key,
        settings.compress,
        settings.max_connections,
    )
}

/// The file behind a credential; a name that is none stands for itself, as in the program.
fn credential(found: &Value, name: &str) -> String {
    let known = list(&found["credentials"]);
    let known = known.iter().find(|c| c["name"] == name);
    known.map_or(name.to_owned(), |c| text(&c["path"]).to_owned())
}

fn list(value: &Value) -> Vec<Value> {
    value.as_array().expect("a list").clone()
}

fn read_json(path: &str) -> Value {
    let path: PathBuf = project(path);
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).expect("it is JSON")
}

fn run(command: &mut Command) -> Output {
    command
        .output()
        .unwrap_or_else(|e| panic!("{command:?} does not start: {e}; tests/run installs it"))
}

fn said(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

const MUSTER: &str = env!("CARGO_BIN_EXE_muster");
