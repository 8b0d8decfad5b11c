//! Builders over real ssh: what goes wrong, what it says, and what works again by itself.

mod builder;

use std::io::Read as _;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use builder::{Builder, children, free_port, nar_of, quick, settled, signal, up, wait_for};
use futures_util::StreamExt as _;
use futures_util::future::join_all;
use muster::nix::hash::NarHash;
use muster::nix::store_path::{StoreDir, StorePath};
use muster::upstream::ssh::SshTarget;
use muster::upstream::worker::WorkerUpstream;
use muster::upstream::{Error, Link, Upstream};
use rustix::process::Signal;
use tokio::time::{sleep, timeout};

/// Connects once and returns why it failed.
async fn failure(builder: &Builder, target: SshTarget) -> String {
    let upstream = builder.over_ssh(target, quick());
    let begun = Instant::now();
    let Link::Down { error, .. } = settled(&upstream).await else {
        panic!("it came up");
    };
    assert!(begun.elapsed() < Duration::from_secs(6));
    let asked = Instant::now();
    let answer = upstream.path_info(absent().hash()).await;
    assert!(answer.is_err());
    assert!(
        asked.elapsed() < Duration::from_millis(100),
        "waits for what is down"
    );
    println!("{error}");
    error.to_string()
}

fn absent() -> StorePath {
    "0000000000000000000000000000000a-absent".parse().unwrap()
}

async fn has(upstream: &WorkerUpstream, path: &StorePath) -> bool {
    upstream.path_info(path.hash()).await.unwrap().is_some()
}

#[tokio::test]
async fn logins_that_fail_say_why_and_what_to_do() {
    let builder = Builder::new();
    let sshd = builder.sshd("");
    let target = builder.target(sshd.port);

    let mut wrong = target.clone();
    wrong.host_key = Some(builder.host_key("other-host"));
    let said = failure(&builder, wrong).await;
    assert!(said.contains("column 8"), "{said}");

    let mut unknown = target.clone();
    unknown.host_key = None;
    unknown
        .options
        .push("-oUserKnownHostsFile=/dev/null".into());
    let said = failure(&builder, unknown.clone()).await;
    assert!(said.contains("log in once by hand"), "{said}");

    // As `ssh-keygen -R` would find it.
    let known = format!(
        "[127.0.0.1]:{} {}\n",
        sshd.port,
        builder.host_key("other-host")
    );
    std::fs::write(builder.path("known"), known).unwrap();
    let mut changed = unknown;
    changed.options.pop();
    let file = format!("-oUserKnownHostsFile={}", builder.path("known").display());
    changed.options.push(file);
    let said = failure(&builder, changed).await;
    assert!(said.contains("ssh-keygen -R"), "{said}");

    let mut locked = target.clone();
    locked.key_file = Some(builder.path("locked"));
    locked.options.push("-oIdentitiesOnly=yes".into());
    let said = failure(&builder, locked).await;
    assert!(said.contains("SSH_AUTH_SOCK"), "{said}");

    let mut refused = target.clone();
    refused.port = Some(free_port());
    let said = failure(&builder, refused).await;
    assert!(said.contains("no sshd listens"), "{said}");

    let mut unresolvable = target.clone();
    unresolvable.host = "no-such-host.invalid".into();
    let said = failure(&builder, unresolvable).await;
    assert!(said.contains("no-such-host.invalid"), "{said}");

    let mut missing = target.clone();
    missing.remote_program = vec!["/opt/no/nix-daemon".into()];
    let said = failure(&builder, missing).await;
    assert!(said.contains("remote-program="), "{said}");

    let mut options = target;
    options.options.push("-oNoSuchOption=1".into());
    let said = failure(&builder, options).await;
    assert!(said.contains("NIX_SSHOPTS"), "{said}");
}

#[tokio::test]
async fn an_account_for_the_serve_protocol_alone_is_told_so() {
    let builder = Builder::new();
    let serve = builder.path("bin/nix-store");
    let sshd = builder.sshd(&format!("ForceCommand {} --serve --write", serve.display()));
    let said = failure(&builder, builder.target(sshd.port)).await;
    assert!(said.contains("nix.sshServe.protocol"), "{said}");
}

#[tokio::test]
async fn an_account_that_forces_the_daemon_works() {
    let builder = Builder::new();
    let path = builder.add("file", b"content");
    let daemon = builder.path("bin/nix-daemon");
    let sshd = builder.sshd(&format!("ForceCommand {} --stdio", daemon.display()));
    let upstream = builder.over_ssh(builder.target(sshd.port), quick());
    assert!(has(&upstream, &path).await);
    // The log command is not what runs there; that is no log, and no hang.
    let log = upstream.build_log(&absent_derivation()).await;
    assert!(!matches!(log, Ok(Some(_))), "{log:?}");
}

fn absent_derivation() -> StorePath {
    "0000000000000000000000000000000a-absent.drv"
        .parse()
        .unwrap()
}

#[tokio::test]
async fn a_host_that_accepts_and_never_answers_is_given_up() {
    let builder = Builder::new();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let said = failure(&builder, builder.target(port)).await;
    assert!(said.contains("127.0.0.1"), "{said}");
}

#[tokio::test]
async fn options_aliases_quotes_and_a_remote_store() {
    let builder = Builder::new();
    let path = builder.add("file", b"content");
    let sshd = builder.sshd("");
    let config = format!(
        "Host alias\n HostName 127.0.0.1\n Port {}\n ControlMaster auto\n ControlPath {}\n \
         RemoteCommand false\n PermitLocalCommand yes\n LocalCommand echo garbage\n",
        sshd.port,
        builder.path("users-own").display()
    );
    std::fs::write(builder.path("config"), config).unwrap();
    let local = |name: &str| builder.path(name).to_str().unwrap().to_owned();
    let options = format!(
        "-F {} -o 'ProxyCommand=sh -c \"exec 3<>/dev/tcp/%h/%p; cat <&3 & cat >&3\"' -oIdentityAgent=none",
        local("config")
    );
    let options = options.replace("sh -c", "bash -c");
    let target = SshTarget {
        host: "alias".into(),
        port: None,
        remote_program: vec!["~/nix-store".into()],
        remote_store: Some(format!(
            "local?store={}&state={}&log={}",
            local("store"),
            local("state"),
            local("log")
        )),
        options: muster::upstream::ssh_command::split_options(&options).unwrap(),
        ..builder.target(sshd.port)
    };
    // `~` is the account's; the programs are put there by way of HOME.
    for name in ["nix-daemon", "nix-store"] {
        std::os::unix::fs::symlink(
            builder.path("bin").join(name),
            builder.path("home").join(name),
        )
        .unwrap();
    }
    let upstream = builder.over_ssh(target, quick());
    let link = settled(&upstream).await;
    assert!(matches!(link, Link::Up { .. }), "{link:?}");
    assert!(has(&upstream, &path).await);
    let log = upstream.build_log(&absent_derivation()).await;
    assert!(matches!(log, Ok(None)), "{log:?}");
    assert!(
        !builder.path("users-own").exists(),
        "joined the user's own master"
    );
}

#[tokio::test]
async fn a_question_under_way_survives_the_loss_of_its_connection() {
    let builder = Builder::new();
    let path = builder.add("file", b"content");
    let sshd = builder.sshd("");
    let upstream = builder.over_ssh(builder.target(sshd.port), quick());
    up(&upstream).await;
    let paths = vec![path.clone(); 50];
    for pid in sshd.sessions() {
        signal(pid, Signal::STOP);
    }
    let (one, many, ()) = tokio::join!(
        upstream.path_info(path.hash()),
        upstream.path_infos(&paths),
        async {
            sleep(Duration::from_millis(300)).await;
            sshd.kill_sessions();
        }
    );
    assert_eq!(one.unwrap().unwrap().path, path);
    assert!(
        many.into_iter()
            .all(|info| info.unwrap().unwrap().path == path)
    );
}

#[tokio::test]
async fn silence_is_noticed_within_seconds() {
    let builder = Builder::new();
    let sshd = builder.sshd("");
    let upstream = builder.over_ssh(builder.target(sshd.port), quick());
    up(&upstream).await;
    sleep(Duration::from_millis(500)).await;
    let begun = Instant::now();
    for pid in sshd.sessions() {
        signal(pid, Signal::STOP);
    }
    let mut link = upstream.link();
    let lost = link.wait_for(|l| !matches!(l, Link::Up { .. }));
    timeout(Duration::from_secs(6), lost)
        .await
        .unwrap()
        .unwrap();
    println!("noticed after {:?}", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(5));
    // The listener lets us in again.
    up(&upstream).await;
}

/// Sooner than ssh's own keep-alives, which take one to two seconds.
#[tokio::test]
async fn a_look_up_waits_little_more_than_a_second_for_a_builder_that_turned_silent() {
    let builder = Builder::new();
    let path = builder.add("file", b"content");
    let sshd = builder.sshd("");
    let upstream = builder.over_ssh(builder.target(sshd.port), quick());
    // At whatever time within ssh's second it falls silent.
    for pause_ms in [0, 300, 600] {
        up(&upstream).await;
        sleep(Duration::from_millis(pause_ms)).await;
        assert!(has(&upstream, &path).await);
        let sessions = sshd.sessions();
        sessions.iter().for_each(|pid| signal(*pid, Signal::STOP));
        let begun = Instant::now();
        let answer = upstream.path_info(path.hash()).await;
        let took = begun.elapsed();
        assert!(answer.is_err(), "{answer:?}");
        assert!(took < Duration::from_millis(1350), "{took:?}");
        // Heard again in time, it is the same connection; else there is another.
        sessions.iter().for_each(|pid| signal(*pid, Signal::CONT));
    }
    up(&upstream).await;
    assert!(has(&upstream, &path).await);
}

#[tokio::test]
async fn a_builder_that_comes_back_is_found_again() {
    let builder = Builder::new();
    let path = builder.add("file", b"content");
    let port = free_port();
    let sshd = builder.sshd_on(port, "");
    let upstream = builder.over_ssh(builder.target(port), quick());
    assert!(has(&upstream, &path).await);
    drop(sshd);
    let mut link = upstream.link();
    let down = link.wait_for(|l| matches!(l, Link::Down { .. }));
    timeout(Duration::from_secs(6), down)
        .await
        .unwrap()
        .unwrap();
    // Long enough for a long pause; a wake-up cuts it.
    sleep(Duration::from_secs(3)).await;
    let sshd = builder.sshd_on(port, "");
    let begun = Instant::now();
    let down = link.wait_for(|l| matches!(l, Link::Down { .. }));
    timeout(Duration::from_secs(6), down)
        .await
        .unwrap()
        .unwrap();
    upstream.reconnect();
    assert!(has(&upstream, &path).await);
    assert!(
        begun.elapsed() < Duration::from_secs(3),
        "{:?}",
        begun.elapsed()
    );
    drop(sshd);
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_large_nars_at_once() {
    let builder = Builder::new();
    let content = vec![7_u8; 6 << 20];
    let nar = nar_of(&content);
    let names: Vec<_> = (0..20).map(|n| format!("large-{n}")).collect();
    let files: Vec<_> = names
        .iter()
        .map(|n| (n.as_str(), content.as_slice()))
        .collect();
    let paths = builder.add_all(&files);
    // As sshd is by default: 10 sessions a connection, logins dropped beyond 10 under way.
    let sshd = builder.sshd("MaxSessions 10\nMaxStartups 10:30:100");
    let mut options = quick();
    options.pool.idle_max = Duration::from_secs(1);
    let upstream = builder.over_ssh(builder.target(sshd.port), options);
    up(&upstream).await;
    let one = async |path: &StorePath| {
        let info = upstream.path_info(path.hash()).await.unwrap().unwrap();
        let mut stream = upstream.nar(&info).await.unwrap().unwrap();
        let mut bytes = vec![];
        while let Some(chunk) = stream.next().await {
            bytes.extend(chunk.unwrap());
        }
        assert_eq!(bytes.len(), nar.len());
        assert_eq!(NarHash::of(&bytes), info.nar_hash);
    };
    let begun = Instant::now();
    join_all(paths.iter().map(one)).await;
    println!("20 NARs of 6 MiB after {:?}", begun.elapsed());
    // One for look-ups, eight for large NARs, one that is warm, one ready for roots.
    assert!(sshd.sessions().len() <= 11, "{}", sshd.sessions().len());
    sleep(Duration::from_millis(2500)).await;
    assert_eq!(sshd.sessions().len(), 3, "idle sessions stay");
    assert!(!sshd.log().contains("drop connection"), "{}", sshd.log());
}

#[tokio::test]
async fn a_cut_nar_ends_with_an_error_and_others_go_on() {
    let builder = Builder::new();
    let large = builder.add("large", &vec![7; 64 << 20]);
    let small = builder.add("small", b"small");
    let sshd = builder.sshd("");
    let upstream = builder.over_ssh(builder.target(sshd.port), quick());
    let info = upstream.path_info(large.hash()).await.unwrap().unwrap();
    let mut stream = upstream.nar(&info).await.unwrap().unwrap();
    assert!(stream.next().await.unwrap().is_ok());
    sshd.kill_sessions();
    let error = loop {
        match stream.next().await.expect("an error before the end") {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert!(
        matches!(error, Error::Lost(_) | Error::Protocol(_)),
        "{error}"
    );
    assert!(stream.next().await.is_none());
    assert!(has(&upstream, &small).await);
    let info = upstream.path_info(small.hash()).await.unwrap().unwrap();
    assert!(upstream.nar(&info).await.unwrap().is_some());
}

#[tokio::test]
async fn roots_hold_for_two_lifetimes_and_no_longer() {
    let builder = Builder::new();
    let kept = builder.add("kept", b"kept");
    let loose = builder.add("loose", b"loose");
    let sshd = builder.sshd("");
    let mut options = quick();
    options.roots.lifetime = Duration::from_secs(2);
    let upstream = builder.over_ssh(builder.target(sshd.port), options);
    assert!(upstream.keep(&kept).await.unwrap());
    let begun = Instant::now();
    builder.collect_garbage();
    assert!(has(&upstream, &kept).await);
    assert!(!has(&upstream, &loose).await);
    assert!(!upstream.keep(&loose).await.unwrap());

    sleep(Duration::from_secs(3).saturating_sub(begun.elapsed())).await;
    builder.collect_garbage();
    assert!(has(&upstream, &kept).await, "freed in the second lifetime");
    sleep(Duration::from_secs(5).saturating_sub(begun.elapsed())).await;
    builder.collect_garbage();
    assert!(!has(&upstream, &kept).await, "still rooted");
    // The look-up connection, the warm one, and the one ready for roots.
    assert_eq!(sshd.sessions().len(), 3);
}

#[tokio::test]
async fn many_roots_at_one_go_hold_as_single_ones_do() {
    let builder = Builder::new();
    let there: Vec<_> = (0..30)
        .map(|n| builder.add(&format!("there-{n}"), format!("there {n}").as_bytes()))
        .collect();
    let sshd = builder.sshd("");
    let upstream = builder.over_ssh(builder.target(sshd.port), quick());
    assert!(upstream.keep(&there[3]).await.unwrap());
    let mut asked = there.clone();
    asked.insert(7, absent());
    let is_there = |path: &StorePath| *path != absent();
    for _ in 0..2 {
        let kept = upstream.keep_many(&asked).await;
        let kept: Vec<_> = kept.into_iter().map(Result::unwrap).collect();
        assert_eq!(kept, asked.iter().map(is_there).collect::<Vec<_>>());
        builder.collect_garbage();
        for path in &there {
            assert!(has(&upstream, path).await);
        }
        // What is lost under the question is asked for once more.
        sshd.kill_sessions();
    }
}

#[tokio::test]
async fn roots_survive_the_loss_of_their_connection() {
    let builder = Builder::new();
    let kept = builder.add("kept", b"kept");
    let sshd = builder.sshd("");
    let upstream = builder.over_ssh(builder.target(sshd.port), quick());
    assert!(upstream.keep(&kept).await.unwrap());
    sshd.kill_sessions();
    wait_for_async(|| sshd.sessions().len() >= 2).await;
    sleep(Duration::from_secs(2)).await;
    up(&upstream).await;
    builder.collect_garbage();
    assert!(has(&upstream, &kept).await);
    assert!(upstream.keep(&kept).await.unwrap());
}

async fn wait_for_async(ready: impl Fn() -> bool) {
    let begun = Instant::now();
    while !ready() {
        assert!(begun.elapsed().as_secs() < 10);
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn another_store_directory_is_an_error_of_its_own() {
    let mut builder = Builder::new();
    let path = builder.add("file", b"content");
    let sshd = builder.sshd("");
    builder.store_dir = StoreDir::default();
    let upstream = builder.over_ssh(builder.target(sshd.port), quick());
    let answer = upstream.path_info(path.hash()).await;
    assert!(matches!(answer, Err(Error::StoreDir(_))), "{answer:?}");
}

#[tokio::test]
async fn a_daemon_that_hangs_is_left_for_another() {
    let builder = Builder::new();
    let path = builder.add("file", b"content");
    let daemon = builder.daemon();
    let mut options = quick();
    options.standing.query_timeout = Duration::from_secs(1);
    let upstream = builder.over_socket(&daemon, options);
    assert!(has(&upstream, &path).await);
    for pid in daemon.sessions() {
        signal(pid, Signal::STOP);
    }
    let begun = Instant::now();
    let answer = upstream.path_info(path.hash()).await;
    assert!(matches!(answer, Err(Error::TimedOut { .. })), "{answer:?}");
    assert!(begun.elapsed() < Duration::from_secs(2));
    // The hanging connection was given up; the listener makes a process for the next.
    assert!(has(&upstream, &path).await);
}

#[tokio::test]
async fn a_daemon_without_the_feature_knows_no_realisation() {
    let builder = Builder::new();
    let path = builder.add("file", b"content");
    let conf = builder.path("conf/nix.conf");
    let text = std::fs::read_to_string(&conf).unwrap();
    std::fs::write(&conf, text.replace("ca-derivations", "")).unwrap();
    let daemon = builder.daemon();
    let upstream = builder.over_socket(&daemon, quick());
    let id = format!("sha256:{}!out", "0".repeat(64)).parse().unwrap();
    up(&upstream).await;
    let link = upstream.link();
    for _ in 0..3 {
        let answer = upstream.realisation(&id).await;
        assert!(matches!(answer, Ok(None)), "{answer:?}");
    }
    assert!(has(&upstream, &path).await);
    // Nix 2.8 and 2.26 abort on the question; what else is under way must not suffer.
    assert!(
        !link.has_changed().unwrap(),
        "the look-up connection was lost"
    );
}

#[tokio::test]
async fn nothing_is_asked_on_a_terminal() {
    let name = "nothing_is_asked_on_a_terminal";
    if is_helper(name) {
        let port = std::env::var("MUSTER_TEST_PORT").unwrap().parse().unwrap();
        let builder = Builder::at(std::env::var("MUSTER_TEST_FOLDER").unwrap().into());
        let mut target = builder.target(port);
        let config = builder.path("config").to_str().unwrap().to_owned();
        target.options = vec!["-F".into(), config];
        let said = failure(&builder, target).await;
        assert!(said.contains("Host key verification failed"), "{said}");
        return;
    }
    // A jump host whose key is unknown: its ssh is started by ours without BatchMode.
    let builder = Builder::new();
    let sshd = builder.sshd("");
    let config = format!(
        "Host jump\n HostName 127.0.0.1\n Port {}\n UserKnownHostsFile /dev/null\n\
         Host 127.0.0.1\n ProxyJump jump\n",
        sshd.port
    );
    std::fs::write(builder.path("config"), config).unwrap();
    let helper = format!(
        "{} {name} --exact --nocapture",
        std::env::current_exe().unwrap().display()
    );
    // `script` gives it a terminal.
    let output = Command::new("script")
        .args(["-qec", &helper, "/dev/null"])
        .env("MUSTER_TEST_HELPER", name)
        .env("MUSTER_TEST_PORT", sshd.port.to_string())
        .env("MUSTER_TEST_FOLDER", builder.path(""))
        .stdin(Stdio::null())
        .output()
        .expect("script is needed");
    let shown = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{shown}");
    assert!(!shown.contains("Are you sure"), "{shown}");
}

/// The ssh processes that this test process started, zombies too.
fn own_ssh() -> usize {
    children(std::process::id()).len()
}

#[tokio::test]
async fn nothing_is_left_behind() {
    // In a process of its own: other tests have children here, too.
    if !is_helper("nothing_is_left_behind") {
        let status = helper("nothing_is_left_behind").status().unwrap();
        assert!(status.success());
        return;
    }
    let builder = Builder::new();
    let path = builder.add("file", b"content");
    let sshd = builder.sshd("");
    let before = own_ssh();
    let upstream = builder.over_ssh(builder.target(sshd.port), quick());
    let info = upstream.path_info(path.hash()).await.unwrap().unwrap();
    assert!(upstream.nar(&info).await.unwrap().is_some());
    assert!(upstream.keep(&path).await.unwrap());
    let _ = upstream.build_log(&absent_derivation()).await;
    assert!(own_ssh() > before);
    drop(upstream);
    for _ in 0..100 {
        sleep(Duration::from_millis(50)).await;
        if own_ssh() == before {
            break;
        }
    }
    assert_eq!(own_ssh(), before);
    wait_for("the end of the sessions", || sshd.sessions().is_empty());
}

#[tokio::test]
async fn a_killed_muster_leaves_no_session_on_the_builder() {
    if is_helper("a_killed_muster_leaves_no_session_on_the_builder") {
        let port = std::env::var("MUSTER_TEST_PORT").unwrap().parse().unwrap();
        let folder = std::env::var("MUSTER_TEST_FOLDER").unwrap();
        let builder = Builder::at(folder.into());
        let upstream = builder.over_ssh(builder.target(port), quick());
        up(&upstream).await;
        let _ = upstream.keep(&absent()).await;
        println!("up");
        std::future::pending::<()>().await;
    }
    let builder = Builder::new();
    let sshd = builder.sshd("");
    let mut muster = helper("a_killed_muster_leaves_no_session_on_the_builder")
        .env("MUSTER_TEST_PORT", sshd.port.to_string())
        .env("MUSTER_TEST_FOLDER", builder.path(""))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    let mut out = muster.stdout.take().unwrap();
    while !said.contains("up\n") {
        let mut bytes = [0; 100];
        let count = out.read(&mut bytes).unwrap();
        assert!(count > 0, "the helper ended: {said}");
        said.push_str(&String::from_utf8_lossy(&bytes[..count]));
    }
    assert!(sshd.sessions().len() >= 2);
    muster.kill().unwrap();
    muster.wait().unwrap();
    wait_for("the end of the sessions", || sshd.sessions().is_empty());
}

fn is_helper(test: &str) -> bool {
    std::env::var("MUSTER_TEST_HELPER").is_ok_and(|helper| helper == test)
}

/// Runs one test of this file in a process of its own.
fn helper(test: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args([test, "--exact", "--nocapture", "--test-threads=1"])
        .env("MUSTER_TEST_HELPER", test)
        .process_group(0);
    command
}
