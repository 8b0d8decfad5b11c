//! Upstreams that are not what they should be, and every way in which ssh reaches one.

mod rig;

use rig::{Lab, Machine, Muster, eventually, helper};

/// Runs muster over one upstream and tells whether it gives the path.
#[track_caller]
fn reaches(client: &Machine, environment: &str, args: &str, path: &str) {
    let mut muster = Muster::start_with(client, environment, args);
    let got = eventually(20.0, || {
        muster.lines().len() == 3 && muster.narinfo(path).status == 200
    });
    assert!(got, "{environment} muster serve {args}\n{}", muster.log());
}

#[test]
fn what_is_no_daemon_of_ours_is_named_and_the_others_serve() {
    let lab = Lab::new();
    let (b1, b2) = (lab.builder("b1"), lab.builder("b2"));
    let client = lab.client(&[]);
    let path = b1.build_one("tiny", "");
    let say = |name: &str, hex: &str| {
        let words = format!("say /tmp/{name} {hex}");
        helper::start(&client, name, words.trim_end())
    };
    // The magic word, then protocol 1.10, then 9.9.
    let magic = "6f-69-78-64-00-00-00-00";
    let _peers = [
        say("old", &format!("{magic}-0a-01-00-00-00-00-00-00")),
        say("new", &format!("{magic}-09-09-00-00-00-00-00-00")),
        say("silent", ""),
        say("garbage", "48-54-54-50-2f-31-2e-31-20-34-30-30-0a"),
    ];
    b2.run("mkdir -p /opt/store /opt/var").ok();
    let elsewhere = "ssh-ng://root@b2?remote-program=env%20NIX_STORE_DIR=/opt/store%20NIX_STATE_DIR=/opt/var%20nix-daemon";
    let mut muster = Muster::serve(
        &client,
        &format!(
            "--upstream unix:///tmp/old --upstream unix:///tmp/new --upstream unix:///tmp/silent \
             --upstream unix:///tmp/garbage --upstream unix:///tmp/none --upstream '{elsewhere}' \
             --upstream ssh-ng://root@b1"
        ),
    );
    assert_eq!(muster.narinfo(&path).status, 200, "{}", muster.log());
    client.substitutes_from(&muster);
    client.realise(&path).ok();
    for (name, words) in [
        (
            "unix:///tmp/old",
            &["sick", "protocol 1.10", "too old", "update Nix there"][..],
        ),
        ("unix:///tmp/new", &["sick", "protocol 9.9"]),
        (
            "unix:///tmp/silent",
            &[
                "sick",
                "no greeting within 5s: what listens there is silent",
            ],
        ),
        (
            "unix:///tmp/garbage",
            &["sick", "not a nix-daemon", "HTTP/1.1 400"],
        ),
        (
            "unix:///tmp/none",
            &["sick", "/tmp/none", "is nix-daemon installed"],
        ),
        (
            "ssh-ng://root@b2",
            &["sick", "store lies in another directory"],
        ),
        ("ssh-ng://root@b1", &["well", "protocol 1."]),
    ] {
        let said = eventually(10.0, || {
            let log = muster.log();
            let mut lines = log.lines().filter(|l| l.starts_with("upstream "));
            lines.any(|l| l.contains(name) && words.iter().all(|w| l.contains(w)))
        });
        assert!(said, "{name}: {words:?}\n{}", muster.log());
    }
}

#[test]
fn ssh_goes_where_the_operator_says() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let client = lab.client(&[]);
    let path = b1.build_one("tiny", "");
    let known_hosts = lab.share().join("known_hosts");
    let keys = std::fs::read_to_string(&known_hosts).expect("read the known hosts");
    let key = keys
        .lines()
        .find_map(|l| l.strip_prefix("b1,")?.split_once(' '))
        .map(|(_, key)| key.to_owned())
        .expect("b1 is known");

    b1.run_net("ip -6 addr add fd77::11/64 dev eth0 nodad");
    client.run_net("ip -6 addr add fd77::12/64 dev eth0 nodad");
    b1.sshd_with("ListenAddress ::\nPort 2200");
    let more = format!("{keys}fd77::11,127.0.0.1,[b1]:2200 {key}\n");
    std::fs::write(&known_hosts, more).expect("write the known hosts");
    for uri in [
        "ssh-ng://root@b1:2200",
        "ssh-ng://root@[fd77::11]",
        "root@b1",
        "ssh://b1:22",
    ] {
        reaches(&client, "", &format!("--upstream '{uri}'"), &path);
    }
    // The jump host's own loopback: there is no other road to it.
    reaches(
        &client,
        "NIX_SSHOPTS='-J root@b1'",
        "--upstream ssh-ng://root@127.0.0.1",
        &path,
    );

    client.write(
        "/root/.ssh/config",
        "Host *\n  StrictHostKeyChecking yes\n  UserKnownHostsFile /lab/known_hosts\n  ControlMaster auto\n  \
         ControlPath /root/.ssh/master-%C\n  ControlPersist 600\nHost alias\n  HostName b1\n  Port 2200\n",
    );
    for uri in ["ssh-ng://root@b1", "ssh-ng://root@alias"] {
        reaches(&client, "", &format!("--upstream {uri}"), &path);
        let masters = client.run("ls /root/.ssh/master-* 2>&1").failed();
        assert!(masters.out.contains("No such file"), "{masters}");
        assert!(eventually(5.0, || client.processes("ssh").is_empty()));
    }

    client
        .run("mkdir /keys && mv /root/.ssh/id_ed25519 /keys/builder")
        .ok();
    reaches(
        &client,
        "",
        "--upstream 'ssh-ng://root@b1?ssh-key=/keys/builder'",
        &path,
    );
    client.write("/etc/nix/machines", "ssh-ng://root@b1 - /keys/builder\n");
    reaches(&client, "", "", &path);
    let muster = Muster::serve(&client, "--no-machines --upstream ssh-ng://root@b1");
    muster.await_log(10.0, "Permission denied (publickey");
    muster.await_log(1.0, "ssh-key");
}

#[test]
fn the_pinned_host_key_alone_counts() {
    let lab = Lab::new();
    let (b1, b2) = (lab.builder("b1"), lab.builder("b2"));
    let client = lab.client(&[]);
    let path = b1.build_one("tiny", "");
    client.write(
        "/root/.ssh/config",
        "Host *\n  UserKnownHostsFile /dev/null\n",
    );
    let pinned = |machine: &Machine| {
        let line = machine
            .run("base64 -w0 < /etc/ssh/lab_host_key.pub")
            .ok()
            .out;
        client.write(
            "/etc/nix/machines",
            &format!("ssh-ng://root@b1 x86_64-linux - 1 1 - - {}\n", line.trim()),
        );
    };
    pinned(&b1);
    reaches(&client, "", "", &path);
    pinned(&b2);
    let mut muster = Muster::serve(&client, "");
    muster.await_log(10.0, "the host key that is pinned for it, column 8");
    assert_eq!(muster.narinfo(&path).status, 404);
    drop(muster);
    // Not known at all: never a question at a terminal, and the way out is told.
    client.write("/etc/nix/machines", "ssh-ng://root@b1\n");
    let muster = Muster::serve(&client, "");
    muster.await_log(10.0, "log in once by hand");
}

#[test]
fn a_machines_file_as_people_have_it() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let client = lab.client(&[]);
    let path = b1.build_one("tiny", "");
    // No daemon runs here, and what is for this machine itself is no reason to fail.
    client.write(
        "/etc/nix/machines",
        "# mine\nssh://root@b1 x86_64-linux,i686-linux - 4 2 kvm # fast\nlocalhost x86_64-linux - 2\n\
         ssh://localhost\n@/etc/nix/more\n",
    );
    client.write(
        "/etc/nix/more",
        "ssh-ng://nowhere.invalid\n@/etc/nix/machines\n",
    );
    let mut muster = Muster::serve(&client, "");
    muster.await_log(5.0, "/etc/nix/more:2");
    assert_eq!(muster.narinfo(&path).status, 200, "{}", muster.log());
    muster.await_log(10.0, "upstream ssh-ng://nowhere.invalid: sick");
    muster.await_log(1.0, "check the name");
    drop(muster);

    client.run("rm /etc/nix/machines").ok();
    let mut muster = Muster::serve(&client, "");
    muster.await_log(1.0, "No upstreams: name builders");
    assert_eq!(muster.narinfo(&path).status, 404);
    assert_eq!(muster.get("/nix-cache-info").status, 200);
}
