//! The units under a real systemd: activated by their sockets, inside their sandbox, asked by real clients;
//! and the .deb installed, upgraded, removed and purged there.

mod module;
mod rig;

use std::fs;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use module::{SERVE, SOCKET, evaluate, project, text};
use rig::{Lab, Machine, Systemd, eventually};
use serde_json::{Value, json};

/// Puts the units of the module into a machine, with a configuration and credentials for them.
fn install(systemd: &Systemd<'_>, unit: &Value, socket: &Value, config: &str) {
    let name = unit["name"].as_str().unwrap_or("muster");
    let path = |kind: &str| format!("/etc/systemd/system/{name}.{kind}");
    systemd.write(&path("service"), 0o644, text(&evaluate(SERVE, unit)));
    systemd.write(&path("socket"), 0o644, text(&evaluate(SOCKET, socket)));
    systemd.write(text(&unit["config"]), 0o644, config);
    // The NixOS module declares it, the .deb has it in its sysusers.conf.
    systemd.run(&format!("useradd --system {name}")).ok();
    systemd.run("systemctl daemon-reload").ok();
}

fn unit(name: &str, credentials: &[String]) -> Value {
    json!({
        "name": name,
        "muster": "/lab/bin/muster",
        "kill": "/bin/kill",
        "config": format!("/etc/muster/{name}.toml"),
        "credentials": credentials,
        "sshKey": "ssh-key",
        "knownHosts": "known-hosts",
    })
}

/// Makes a signing key inside; the public half.
fn signing_key(systemd: &Systemd<'_>, path: &str) -> String {
    systemd
        .run(&format!(
            "mkdir -p $(dirname {path}) && /lab/bin/muster key generate lab-1 --secret-key-file {path} >/dev/null && \
             /lab/bin/muster key public <{path}"
        ))
        .ok()
        .out
        .trim()
        .to_owned()
}

fn realise(systemd: &Systemd<'_>, path: &str, key: &str) {
    let line = format!(
        "nix-store --realise {path} --option substituters http://127.0.0.1:5000 \
         --option trusted-public-keys '{key}' --option max-jobs 0"
    );
    let got = systemd.run(&line);
    assert!(got.rc == 0, "{got}\n{}", systemd.journal("muster.service"));
}

fn share(machine: &Machine, name: &str) -> String {
    machine.read(&format!("/lab/{name}"))
}

#[test]
fn the_unit_of_a_client_logs_in_by_ssh_inside_its_sandbox_and_answers() {
    let lab = Lab::new();
    let (b1, b2) = (lab.builder("b1"), lab.builder("b2"));
    let on_b1 = b1.build_one("tiny", "--argstr seed b1");
    let on_b2 = b2.build_one("tiny", "--argstr seed b2");
    let later = b1.build_one("tiny", "--argstr seed later");
    let office = lab.client(&[]);
    let systemd = Systemd::boot(&office);

    // b1 has a key and a pinned host key of its own; b2 leans on what is said once for all.
    let host_key = STANDARD.encode(b1.read("/etc/ssh/lab_host_key.pub"));
    let machines = json!([
        { "hostName": "b1", "sshUser": "root", "protocol": "ssh-ng", "sshKey": "/etc/secrets/b1", "publicHostKey": host_key },
        { "hostName": "b2", "sshUser": "guest", "protocol": "ssh" },
    ]);
    let found = evaluate(
        "lib.fromBuildMachines { buildMachines = input; }",
        &machines,
    );
    assert_eq!(found["withoutKey"], json!(["b2"]));
    let mut credentials: Vec<String> = found["credentials"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|c| format!("{}:{}", text(&c["name"]), text(&c["path"])))
        .collect();
    credentials.extend(
        [
            "ssh-key:/etc/secrets/all",
            "known-hosts:/etc/secrets/hosts",
            "sign:/etc/secrets/sign",
        ]
        .map(str::to_owned),
    );
    let ssh_key = share(&office, "id_ed25519");
    systemd.write("/etc/secrets/b1", 0o600, &ssh_key);
    systemd.write("/etc/secrets/all", 0o600, &ssh_key);
    systemd.write("/etc/secrets/hosts", 0o600, &share(&office, "known_hosts"));
    let key = signing_key(&systemd, "/etc/secrets/sign");
    let config = evaluate(
        "lib.configText { machines = false; upstreams = input; secret-key-files = [ \"sign\" ]; priority = null; }",
        &found["upstreams"],
    );
    install(
        &systemd,
        &unit("muster", &credentials),
        &json!({ "listen": ["127.0.0.1:5000"] }),
        text(&config),
    );

    systemd.run("systemctl start muster.socket").ok();
    assert_eq!(
        systemd.property("muster.service", "ActiveState"),
        "inactive"
    );
    realise(&systemd, &on_b1, &key);
    assert_eq!(systemd.property("muster.service", "ActiveState"), "active");
    realise(&systemd, &on_b2, &key);

    // It is nobody that the machine knows otherwise, and it has none of root's powers.
    let pid = systemd.property("muster.service", "MainPID");
    let status = systemd.run(&format!("cat /proc/{pid}/status")).ok().out;
    let field = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name));
        line.unwrap_or_default()
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ")
    };
    assert!(!field("Uid:").starts_with("0 "), "{status}");
    assert_eq!(field("CapBnd:"), "0000000000000000");
    assert_eq!(field("NoNewPrivs:"), "1");
    assert_eq!(field("Seccomp:"), "2");
    let inside = format!("nsenter -t {pid} -m -- ls /root /home");
    let seen = systemd.run(&inside).out;
    assert_eq!(
        seen.split_whitespace().collect::<Vec<_>>(),
        ["/home:", "/root:"]
    );

    // A reload keeps it running, and a stop loses no client.
    systemd.run("systemctl reload muster.service").ok();
    assert_eq!(systemd.property("muster.service", "MainPID"), pid);
    systemd.run("systemctl stop muster.service").ok();
    assert_eq!(systemd.property("muster.socket", "ActiveState"), "active");
    realise(&systemd, &later, &key);

    // The same checks from within: its user, its credentials, its sandbox; and it goes on undisturbed.
    let pid = systemd.property("muster.service", "MainPID");
    let checked = systemd.run("/lab/bin/muster check --as-service --json --only ^ssh");
    let found: Value = serde_json::from_str(&checked.out).unwrap_or_else(|_| panic!("{checked}"));
    let subjects = found["subjects"].as_array().expect("a list");
    assert_eq!(subjects.len(), 2, "{checked}");
    for check in subjects
        .iter()
        .flat_map(|s| s["checks"].as_array().expect("a list"))
    {
        assert_eq!(check["outcome"], "ok", "{check}");
    }
    let key_check = systemd.run("/lab/bin/muster check --as-service --only 'signing key' -v");
    assert!(
        key_check.out.contains("/run/credentials/muster-check-"),
        "{key_check}"
    );
    // Outside of it there are none of its credentials.
    let outside = "/lab/bin/muster check --config /etc/muster/muster.toml --only 'signing key' -v";
    let outside = systemd.run(outside).ok();
    assert!(outside.out.contains("sign is no file here"), "{outside}");
    assert!(outside.out.contains("--as-service"), "{outside}");
    let config_is = "/lab/bin/muster check-config /etc/muster/muster.toml";
    let config_is = systemd.run(config_is).ok();
    let unseen = "sign, a credential that the service alone sees";
    assert!(config_is.out.contains(unseen), "{config_is}");
    assert_eq!(systemd.property("muster.service", "MainPID"), pid);
    systemd.run("test -d /run/muster").ok();
    realise(&systemd, &on_b1, &key);

    // One that cannot start is given up soon: clients that come are refused, and do not wait for ever.
    systemd.write("/etc/muster/muster.toml", 0o644, "nonsense");
    systemd.run("systemctl stop muster.service").ok();
    let connect = "bash -c 'exec 3<>/dev/tcp/127.0.0.1/5000'";
    systemd.run(connect).ok();
    let is_failed = || systemd.property("muster.socket", "ActiveState") == "failed";
    assert!(eventually(60.0, is_failed), "it is started for ever");
    assert_ne!(systemd.run(connect).rc, 0);
    let socket = systemd.run("systemctl status muster.socket");
    assert!(socket.out.contains("failed"), "{socket}");
    let log = systemd.run("journalctl -u muster").ok();
    assert!(log.out.contains("muster.toml"), "it says why: {log}");
    systemd.write("/etc/muster/muster.toml", 0o644, text(&config));
    systemd
        .run("systemctl reset-failed muster.service muster.socket && systemctl restart muster")
        .ok();
    realise(&systemd, &later, &key);
}

#[test]
fn the_unit_of_a_builder_serves_its_own_store_on_all_addresses() {
    let lab = Lab::new();
    let builder = lab.machine("builder", rig::Nix::Debian12);
    let client = lab.client(&[]);
    let systemd = Systemd::boot(&builder);
    systemd.run("systemctl start nix-daemon").ok();
    let socket = systemd.path("/nix/var/nix/daemon-socket/socket");
    assert!(eventually(20.0, || socket.exists()), "no nix-daemon");
    // As on NixOS; this machine is a Debian, where it is kept for a group.
    systemd.run("chmod 755 /nix/var/nix/daemon-socket").ok();
    let path = systemd
        .run("echo built >/run/built && nix-store --add /run/built")
        .ok()
        .out;
    let key = signing_key(&systemd, "/etc/secrets/sign");
    let config =
        "{ \"machines\": false, \"local-daemon\": true, \"secret-key-files\": [\"sign\"] }";
    install(
        &systemd,
        &unit("muster-builder", &["sign:/etc/secrets/sign".to_owned()]),
        &json!({ "name": "muster-builder", "listen": ["0.0.0.0:5000", "[::]:5000"] }),
        config,
    );
    systemd.run("systemctl start muster-builder.socket").ok();
    client.configure(&format!(
        "extra-substituters = http://builder:5000\nextra-trusted-public-keys = {key}"
    ));
    let got = client.realise(path.trim());
    assert!(
        got.rc == 0,
        "{got}\n{}",
        systemd.journal("muster-builder.service")
    );
}

#[test]
fn the_account_of_a_builder_is_let_to_what_muster_asks_and_no_further() {
    let lab = Lab::new();
    let builder = lab.builder("b1");
    let path = builder.build_one("tiny", "");
    let script = fs::read_to_string(project("nixos-module/forced-command.sh")).expect("read it");
    builder.write("/usr/local/bin/forced", &format!("#!/bin/sh\n{script}"));
    builder.chmod("/usr/local/bin/forced", 0o755);
    builder.sshd_with("Match User guest\n  ForceCommand /usr/local/bin/forced");
    let client = lab.client(&[]);
    client.write("/etc/nix/machines", "ssh-ng://guest@b1\n");
    let muster = rig::Muster::serve(&client, "");
    client.substitutes_from(&muster);
    client.realise(&path).ok();
    let drv = builder.instantiate("tiny", "").join("");
    let log = client.run(&format!("ssh guest@b1 nix-store --read-log {drv}"));
    assert!(!log.err.contains("not the name"), "{log}");
    for command in [
        "cat /etc/passwd",
        "sh",
        "'nix-store --read-log /nix/store/x;id'",
    ] {
        let got = client.run_for(20.0, &format!("echo id | ssh guest@b1 {command}"));
        assert!(
            !got.out.contains("root:") && !got.out.contains("uid="),
            "{command}: {got}"
        );
    }
    let write = client.run_for(20.0, "ssh guest@b1 nix-store --serve --write </dev/null");
    assert!(!write.out.contains("nix-store"), "{write}");
}

#[test]
fn the_timer_of_a_builder_signs_its_store_inside_its_sandbox() {
    let lab = Lab::new();
    let builder = lab.machine("builder", rig::Nix::Debian12);
    let systemd = Systemd::boot(&builder);
    systemd.run("systemctl start nix-daemon").ok();
    let path = systemd
        .run("echo built >/run/built && nix-store --add-fixed --recursive sha256 /run/built >/dev/null; \
              nix-build --no-out-link /lab/workload.nix -A tiny")
        .ok()
        .out;
    let key = signing_key(&systemd, "/etc/muster/credentials/secret-key");
    systemd.run("cp /lab/bin/muster /usr/bin/muster").ok();
    for kind in ["service", "timer"] {
        let name = format!("muster-sign-all.{kind}");
        let unit = fs::read_to_string(project("debian").join(&name)).expect("read a unit");
        systemd.write(&format!("/etc/systemd/system/{name}"), 0o644, &unit);
    }
    systemd
        .run("systemctl daemon-reload && systemctl start muster-sign-all.timer")
        .ok();
    let next = systemd.property("muster-sign-all.timer", "NextElapseUSecRealtime");
    assert!(!next.is_empty() && next != "0", "{next:?}");
    let verify = format!(
        "nix store verify --no-contents --sigs-needed 1 --option trusted-public-keys '{key}' {}",
        path.trim()
    );
    systemd.run(&verify).failed();
    let signed = systemd.run("systemctl start muster-sign-all.service");
    let journal = systemd.journal("muster-sign-all.service");
    assert!(signed.rc == 0, "{signed}\n{journal}");
    systemd.run(&verify).ok();
}

/// Builds the .deb with this revision; its path as the machines see it.
fn build_deb(lab: &Lab, revision: &str) -> String {
    let share = lab.share();
    let built = module::build_deb(&share.join("bin/muster"), &share.join("debian"), revision);
    let name = built.file_name().expect("a package has a name");
    format!("/lab/debian/{}", name.to_string_lossy())
}

/// Signs the folder of a stopped service as root, who makes anew what somebody deleted from it.
fn root_leaves_nothing_that_the_service_cannot_use(
    systemd: &Systemd<'_>,
    narinfo: &str,
    key: &str,
) {
    systemd
        .run("rm -rf /var/cache/muster/.muster && muster key generate other-1 --secret-key-file /root/other")
        .ok();
    let signed = systemd
        .run(&format!(
            "muster sign-all --cache --json --former-public-key '{key}' \
             --secret-key-file /root/other --secret-key-file /var/lib/muster/secret-key"
        ))
        .ok();
    let report: Value = serde_json::from_str(&signed.out).unwrap_or_else(|_| panic!("{signed}"));
    assert_ne!(report["signed"], 0, "{report:#}");
    systemd
        .run(&format!("grep '^Sig: other-1:' {narinfo}"))
        .ok();
    let made = systemd
        .run("find /var/cache/muster -printf '%u:%g %p\\n'")
        .ok()
        .out;
    assert!(made.contains("/.muster/lock"), "{made}");
    let foreign = made
        .lines()
        .find(|line| !line.starts_with("muster:muster "));
    assert_eq!(foreign, None, "{made}");

    // A server tried by hand makes the index, which the service goes on with.
    systemd
        .run("! timeout 3 muster serve --no-machines --no-local-daemon --listen 127.0.0.1:5999 2>/dev/null")
        .ok();
    let made = systemd
        .run("find /var/cache/muster -printf '%u:%g %p\\n'")
        .ok()
        .out;
    assert!(made.contains("/.muster/index.redb"), "{made}");
    let foreign = made
        .lines()
        .find(|line| !line.starts_with("muster:muster "));
    assert_eq!(foreign, None, "{made}");
    systemd
        .run("systemctl start muster.socket muster.service")
        .ok();
    let report = || {
        let shown = systemd.run("muster status --json");
        serde_json::from_str::<Value>(&shown.out).unwrap_or_default()["cache"].take()
    };
    let used = || report()["degraded"].is_null() && report()["entries"].as_u64() > Some(0);
    assert!(
        eventually(20.0, used),
        "{:#}\n{}",
        report(),
        systemd.journal("muster.service")
    );
}

#[test]
fn the_package_is_installed_started_upgraded_removed_and_purged() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let path = b1.build_one("tiny", "--argstr seed deb");
    let after = b1.build_one("tiny", "--argstr seed after");
    let (first, second) = (build_deb(&lab, "1"), build_deb(&lab, "2"));
    let office = lab.client(&[]);
    let systemd = Systemd::boot(&office);
    systemd.write(
        "/etc/nix/machines",
        0o644,
        "ssh-ng://root@b1 x86_64-linux /root/.ssh/id_ed25519\n",
    );

    // Installed, it runs at once: enabled, with a key of its own, and its documents are where they belong.
    systemd
        .run(&format!("dpkg --install --force-depends {first}"))
        .ok();
    systemd.await_log("muster.service", 30.0, "extra-trusted-public-keys");
    for unit in ["muster.socket", "muster.service"] {
        assert_eq!(
            systemd
                .run(&format!("systemctl is-enabled {unit}"))
                .out
                .trim(),
            "enabled"
        );
    }
    assert_ne!(
        systemd
            .run("systemctl is-enabled muster-sign-all.timer")
            .out
            .trim(),
        "enabled"
    );
    systemd
        .run("muster check-config | grep -q '/etc/muster/muster.toml can be used'")
        .ok();
    systemd
        .run("gzip -dc /usr/share/man/man1/muster-serve.1.gz | grep -q 'muster.serve'")
        .ok();
    // What the README and the configuration name is there.
    let documents = "cd /usr/share/doc/muster && \
                     for file in $(grep -o '(examples/[a-z/]*\\.\\(toml\\|conf\\))' README.md | tr -d '()') \
                     $(grep -o '/usr/share/doc/muster/[a-z/.]*' /etc/muster/muster.toml); do \
                     test -s $file && echo $file; done | sort -u";
    assert_eq!(
        systemd.run(documents).ok().out,
        "/usr/share/doc/muster/examples/config.toml\nexamples/config.toml\nexamples/nginx/muster.conf\n"
    );
    systemd
        .run("grep -q 'proxy_pass http://muster;' /usr/share/doc/muster/examples/nginx/muster.conf")
        .ok();
    systemd
        .run("bash -n /usr/share/bash-completion/completions/muster")
        .ok();
    systemd
        .run("grep -q '#compdef muster' /usr/share/zsh/vendor-completions/_muster")
        .ok();
    systemd
        .run("grep -q 'complete -c muster' /usr/share/fish/vendor_completions.d/muster.fish")
        .ok();

    // What its configuration says of ssh's files is so: they are put there, and it logs in.
    systemd
        .run("install -m 600 /root/.ssh/id_ed25519 /etc/muster/credentials/ssh-key")
        .ok();
    systemd
        .run("cp /lab/known_hosts /etc/muster/credentials/known-hosts")
        .ok();
    systemd.run("systemctl restart muster.service").ok();
    let key = systemd.run("cat /var/lib/muster/secret-key.pub").ok().out;
    let key = key.trim();
    realise(&systemd, &path, key);

    // The daemon beside it is for the group nix-users, as Debian has it, and the server is let in.
    systemd.run("systemctl start nix-daemon").ok();
    let own = systemd
        .run("echo own >/run/own && nix-store --add /run/own")
        .ok()
        .out;
    systemd
        .run("chgrp nix-users /nix/var/nix/daemon-socket && chmod 770 /nix/var/nix/daemon-socket")
        .ok();
    systemd.run("systemctl reload muster.service").ok();
    let ask = format!("nix path-info --store http://127.0.0.1:5000 {}", own.trim());
    let known = eventually(20.0, || systemd.run(&ask).rc == 0);
    assert!(known, "{}", systemd.journal("muster.service"));

    // What it fetched is in a folder that everybody may read, and that is a cache with Muster gone.
    let name = path.trim_start_matches("/nix/store/");
    let hash: String = name.chars().take(32).collect();
    let narinfo = format!("/var/cache/muster/{hash}.narinfo");
    let kept = eventually(20.0, || systemd.run(&format!("test -s {narinfo}")).rc == 0);
    assert!(kept, "{}", systemd.journal("muster.service"));
    systemd
        .run("systemctl stop muster.socket muster.service")
        .ok();
    let copy = format!(
        "nix copy --from file:///var/cache/muster --to /tmp/nobody/store --option trusted-public-keys '{key}' \
         --option substituters '' {path}"
    );
    systemd
        .run(&format!(
            "install -d -o nobody /tmp/nobody && setpriv --reuid=nobody --regid=nogroup --clear-groups \
             env HOME=/tmp/nobody {copy} && test -e /tmp/nobody/store{path}"
        ))
        .ok();
    systemd
        .run("setpriv --reuid=nobody --clear-groups cat /var/lib/muster/secret-key")
        .failed();
    systemd
        .run(
            "rm -f /etc/nginx/sites-enabled/* /etc/nginx/conf.d/* && \
             echo 'server { listen 127.0.0.1:8080; root /var/cache/muster; }' >/etc/nginx/conf.d/kept.conf && \
             systemctl start nginx",
        )
        .ok();
    systemd
        .run(&format!(
            "nix copy --from http://127.0.0.1:8080 --to /tmp/other --option trusted-public-keys '{key}' {path}"
        ))
        .ok();
    root_leaves_nothing_that_the_service_cannot_use(&systemd, &narinfo, key);

    // An upgrade keeps what the operator wrote, the key, and what is enabled; what runs is the new one.
    systemd
        .run("echo 'priority = 20' >>/etc/muster/muster.toml && systemctl reload muster")
        .ok();
    systemd.run("systemctl disable --quiet muster.service").ok();
    let old = systemd.property("muster.service", "MainPID");
    systemd
        .run(&format!("dpkg --install --force-depends {second}"))
        .ok();
    let restarted = eventually(30.0, || {
        let now = systemd.property("muster.service", "MainPID");
        now != old && now != "0"
    });
    assert!(restarted, "{}", systemd.journal("muster.service"));
    assert_ne!(
        systemd
            .run("systemctl is-enabled muster.service")
            .out
            .trim(),
        "enabled"
    );
    systemd
        .run("grep -q '^priority = 20$' /etc/muster/muster.toml")
        .ok();
    realise(&systemd, &after, key);

    // Removed, nothing runs or listens, and what the operator wrote stays; purged, that is gone too.
    systemd.run("dpkg --remove muster").ok();
    assert_ne!(systemd.property("muster.socket", "ActiveState"), "active");
    assert_ne!(systemd.property("muster.service", "ActiveState"), "active");
    systemd
        .run("test ! -e /usr/bin/muster && test -e /etc/muster/muster.toml")
        .ok();
    systemd.run("test -e /var/lib/muster/secret-key").ok();
    systemd.run("dpkg --purge muster").ok();
    systemd
        .run("! ls -d /etc/muster /var/lib/muster /var/cache/muster 2>/dev/null")
        .ok();
    systemd
        .run("! find /etc/systemd /lib/systemd -name 'muster*' | grep .")
        .ok();
}
