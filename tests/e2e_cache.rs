//! The cache on disk with real clients and builders: fetched once, then without any builder, without the
//! process that fetched it, and without Muster.

mod rig;

use std::thread;
use std::time::{Duration, Instant};

use rig::caches::{FOLDER, asked};
use rig::{Lab, Machine, Muster, Nix, Output, eventually, helper};
use rustix::process::Signal;

/// Gets paths with an empty store and nothing remembered, and compares them with the builder's.
#[track_caller]
fn fetch(client: &Machine, builder: &Machine, paths: &[String], muster: &Muster<'_>) -> Output {
    client.fresh_store();
    let got = client.realise(&paths.join("' '"));
    assert_eq!((got.rc, got.built()), (0, 0), "{got}\n{}", muster.log());
    assert_eq!(client.nar_hashes(paths), builder.nar_hashes(paths));
    got
}

#[test]
fn fetched_once_a_path_needs_no_builder_and_outlives_a_restart() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let client = lab.client(&["b1"]);
    let dag = b1.build_one("dag", "--arg n 20");
    let mut paths = b1.closure(&dag);
    for (attr, args) in [
        ("big", "--arg sizeMB 24"),
        ("text", "--arg sizeMB 12"),
        ("odd", ""),
        ("selfReference", ""),
    ] {
        paths.push(b1.build_one(attr, args));
    }
    let mut muster = Muster::serve(&client, "");
    client.substitutes_from(&muster);
    fetch(&client, &b1, &paths, &muster);
    muster.await_kept(&paths);

    b1.dead();
    fetch(&client, &b1, &paths, &muster);
    // URLs that a client remembers from before a path was kept.
    let narinfo = muster.narinfo(&paths[0]);
    let url = narinfo.field("URL").expect("a URL");
    let (stem, _) = url.rsplit_once('-').expect("three hashes");
    for old in [".nar", ".nar.zst", ".nar.xz"] {
        let answer = muster.get(&format!("/{stem}{old}"));
        assert_eq!((answer.status, answer.complete), (200, true), "{old}");
    }
    let key = muster.key();
    // In the middle of whatever it does beside, and in good order.
    muster.crash();
    for start in 0..2 {
        let mut muster = Muster::serve(&client, "");
        client.substitutes_from(&muster);
        let began = Instant::now();
        fetch(&client, &b1, &paths, &muster);
        let took = began.elapsed();
        assert!(took < Duration::from_secs(30), "{took:?}\n{}", muster.log());
        assert!(
            paths.iter().all(|path| muster.names_a_file(path)),
            "start {start}"
        );
        muster.stop();
    }
    // Without the index it is found in the folder.
    client.run(&format!("rm -r {FOLDER}/.muster")).ok();
    let mut muster = Muster::serve(&client, "");
    muster.await_kept(&paths);
    fetch(&client, &b1, &paths, &muster);
    muster.stop();
    client.folder_verifies(&key);
    // And by Nix alone, of the version that the client has.
    client.fresh_store();
    client.configure(&format!("trusted-public-keys = {key}"));
    let all = paths.join("' '");
    let copy = format!("nix copy --from file://{FOLDER} '{all}'");
    client.run(&copy).ok();
    assert_eq!(client.nar_hashes(&paths), b1.nar_hashes(&paths));
    client.fresh_store();
    client.configure("trusted-public-keys = ");
    client.run(&copy).failed();
}

#[test]
fn without_muster_the_folder_is_a_binary_cache() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    // It runs nginx, so it is a Debian 12, whatever Nix is under test elsewhere.
    let edge = lab.machine("edge", Nix::named("2.8"));
    edge.builders(&["b1"]);
    let client = lab.machine("client", Nix::under_test());
    let mut paths = b1.closure(&b1.build_one("fooRef", "--arg n 6"));
    paths.push(b1.build_one("big", "--arg sizeMB 9"));

    let mut muster = Muster::serve(&edge, "--listen 0.0.0.0:5000");
    let settings = format!(
        "substituters = http://edge:5000\ntrusted-public-keys = {}\n",
        muster.key()
    );
    client.configure(&settings);
    fetch(&client, &b1, &paths, &muster);
    muster.await_kept(&paths);
    // A client that has asked for the narinfos, and remembers them.
    client.fresh_store();
    let all = paths.join("' '");
    client
        .run(&format!("nix path-info --store http://edge:5000 '{all}'"))
        .ok();
    let key = muster.key();
    muster.stop();
    b1.dead();

    let _nginx = edge.nginx(5000, NGINX);
    let remembered = client.realise(&all);
    assert_eq!((remembered.rc, remembered.built()), (0, 0), "{remembered}");
    client.fresh_store();
    let anew = client.realise(&all);
    assert_eq!((anew.rc, anew.built()), (0, 0), "{anew}");
    assert_eq!(client.nar_hashes(&paths), b1.nar_hashes(&paths));
    edge.configure(&format!("trusted-public-keys = {key}"));
    edge.run(&format!(
        "nix copy --from file://{FOLDER} --to 'local?root=/tmp/copied' '{all}'"
    ))
    .ok();
    edge.folder_verifies(&key);
}

#[test]
fn after_evictions_the_folder_is_a_binary_cache_of_what_is_left() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let edge = lab.machine("edge", Nix::named("2.8"));
    edge.builders(&["b1"]);
    let client = lab.machine("client", Nix::under_test());
    let flat = b1.build_one("flat", "--arg n 30 --arg sizeKB 500");
    let paths = b1.closure(&flat);
    let muster = Muster::serve(&edge, "--listen 0.0.0.0:5000 --cache-size 6M");
    let key = muster.key();
    client.configure(&format!(
        "substituters = http://edge:5000\ntrusted-public-keys = {key}\n"
    ));
    fetch(&client, &b1, &paths, &muster);
    let narinfos = || {
        let listed = edge.run(&format!("cat {FOLDER}/*.narinfo")).ok().out;
        let of = |name: &'static str| {
            let fields = listed.lines().filter_map(move |l| l.strip_prefix(name));
            fields.map(str::to_owned).collect::<Vec<_>>()
        };
        (of("StorePath: "), of("URL: "))
    };
    let few = eventually(10.0, || narinfos().0.len() <= 13);
    assert!(few, "6 MB are 12 of them, and the top\n{}", muster.log());
    muster.stop();
    b1.dead();
    let (left, mut urls) = narinfos();
    assert!(left.len() > 6, "{left:?}");
    let nars = edge.run(&format!("cd {FOLDER} && ls nar/*")).ok().out;
    urls.sort();
    assert_eq!(
        nars.lines().collect::<Vec<_>>(),
        urls,
        "each NAR has its narinfo"
    );
    edge.folder_verifies(&key);

    let nginx = edge.nginx(5000, NGINX);
    client.fresh_store();
    // The top one refers to what is not there any more.
    let alone: Vec<_> = left.iter().filter(|path| **path != flat).cloned().collect();
    let got = client.realise(&alone.join("' '"));
    assert_eq!((got.rc, got.copied()), (0, alone.len()), "{got}");
    client.realise(&flat).failed();
    drop(nginx);
    edge.configure(&format!("trusted-public-keys = {key}"));
    let line = format!(
        "nix copy --from file://{FOLDER} --to 'local?root=/tmp/copied' '{}'",
        alone.join("' '")
    );
    edge.run(&line).ok();
    assert_eq!(client.nar_hashes(&alone), b1.nar_hashes(&alone));
    for path in &alone {
        assert!(edge.path(&format!("/tmp/copied{path}")).exists(), "{path}");
    }
}

#[test]
fn killed_in_the_middle_of_fills_it_serves_whole_nars_only() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let client = lab.client(&["b1"]);
    let mut paths = b1.closure(&b1.build_one("dag", "--arg n 60"));
    paths.push(b1.build_one("big", "--arg sizeMB 16"));
    paths.push(b1.build_one("text", "--arg sizeMB 16"));
    for round in 0..asked("MUSTER_TEST_ROUNDS", 3) {
        client.fresh_store();
        client.wipe_kept();
        let mut muster = Muster::serve(&client, "");
        client.substitutes_from(&muster);
        muster.await_log(10.0, "@b1: well");
        let key = muster.key();
        let after = Duration::from_millis(fastrand::u64(100..2000));
        thread::scope(|scope| {
            let all = paths.join("' '");
            let client = &client;
            // Whatever becomes of it: it is cut and may find nobody.
            let cut = scope.spawn(move || client.realise(&all));
            thread::sleep(after);
            muster.signal(Signal::KILL);
            muster.wait(5.0);
            cut.join().expect("the client ends");
        });
        if client.run(&format!("test -e {FOLDER}/nix-cache-info")).rc == 0 {
            client.folder_verifies(&key);
        }
        let mut muster = Muster::serve(&client, "");
        fetch(&client, &b1, &paths, &muster);
        muster.await_kept(&paths);
        let left = client.run(&format!("ls {FOLDER}/.muster/tmp | wc -l")).ok();
        assert_eq!(
            left.out.trim(),
            "0",
            "round {round}, killed after {after:?}"
        );
        muster.stop();
        client.folder_verifies(&key);
    }
}

#[test]
fn a_resumed_download_never_joins_two_streams() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let client = lab.client(&["b1"]);
    let path = b1.build_one("text", "--arg sizeMB 40");
    // The same level makes the very same file again, another one does not.
    for (first, second) in [(3, 3), (3, 9)] {
        client.wipe_kept();
        let serve = |level: i32| {
            client.write(
                "/etc/muster.toml",
                &format!("compression-level = {level}\n"),
            );
            Muster::serve(&client, "--config /etc/muster.toml")
        };
        let mut muster = serve(first);
        client.substitutes_from(&muster);
        let paths = std::slice::from_ref(&path);
        fetch(&client, &b1, paths, &muster);
        muster.await_kept(paths);
        // The line breaks in the middle, and another one comes when all has changed.
        let listen = format!("127.0.0.1:60{first}{second}");
        let line = |cut: u64| {
            let words = format!("relay {listen} 127.0.0.1:5000 0 {cut} 0");
            helper::start(&client, &format!("line-{cut}"), &words)
        };
        let breaking = line(15_000_000);
        client.configure(&format!(
            "substituters = http://{listen}\ntrusted-public-keys = {}",
            muster.key()
        ));
        client.fresh_store();
        let mut transfer = client.spawn("transfer", &format!("nix-store --realise {path}"));
        let cut = eventually(20.0, || transfer.err().contains("retrying from offset"));
        assert!(cut, "{}", transfer.err());
        muster.signal(Signal::KILL);
        muster.wait(5.0);
        client.wipe_kept();
        drop(breaking);
        let again = serve(second);
        let _whole = line(0);
        let rc = transfer.wait(60.0);
        let said = transfer.err();
        for joined in ["hash mismatch", "zstd", "decompress", "Nix archive"] {
            assert!(!said.contains(joined), "{said}\n{}", again.log());
        }
        if first == second {
            assert_eq!(rc, Some(0), "{said}\n{}", again.log());
        } else {
            let fresh = client.realise(&path);
            assert_eq!(
                (fresh.rc, fresh.built()),
                (0, 0),
                "{fresh}\n{}",
                again.log()
            );
        }
        assert_eq!(client.nar_hash(&path), b1.nar_hash(&path));
        again.stop();
    }
}

#[test]
fn a_slow_client_holds_no_builder_once_its_nar_is_kept() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let client = lab.client(&["b1"]);
    let path = b1.build_one("big", "--arg sizeMB 64");
    let mut muster = Muster::serve(&client, "");
    client.substitutes_from(&muster);
    muster.await_log(10.0, "@b1: well");
    let transfer = client.spawn("transfer", &format!("nix-store --realise {path}"));
    // It says "copying path" before it asks.
    let asked = |m: &mut Muster<'_>| !m.get("/healthz").text().contains(r#""nars":0,"#);
    assert!(eventually(20.0, || asked(&mut muster)), "{}", muster.log());
    client.signal("nix-store", Signal::STOP);
    muster.await_kept(std::slice::from_ref(&path));
    b1.dead();
    assert!(!client.valid(&path), "it was stopped too late");
    client.signal("nix-store", Signal::CONT);
    // By its store: what started it may not wake up with it.
    let arrived = eventually(30.0, || client.valid(&path));
    assert!(
        arrived,
        "{}
{}",
        transfer.err(),
        muster.log()
    );
    assert!(!transfer.err().contains("retrying"), "{}", transfer.err());
    assert_eq!(client.nar_hash(&path), b1.nar_hash(&path));
}

#[test]
fn trust_withdrawn_in_the_configuration_ends_what_rested_on_it() {
    let lab = Lab::new();
    let (b1, b2) = (lab.builder("b1"), lab.builder("b2"));
    let client = lab.client(&[]);
    let only = b1.build_one("big", "--arg sizeMB 6");
    let both = b1.build_one("tiny", "");
    assert_eq!(b2.build_one("tiny", ""), both);
    client.write(
        "/etc/both.toml",
        "upstreams = [\"ssh-ng://root@b1\", \"ssh-ng://root@b2\"]\n",
    );
    client.write("/etc/one.toml", "upstreams = [\"ssh-ng://root@b2\"]\n");
    client.run("cp /etc/both.toml /etc/muster.toml").ok();
    let serve = || Muster::serve(&client, "--no-machines --config /etc/muster.toml");
    let mut muster = serve();
    // On a busy machine the first look-ups are over before it is.
    muster.await_log(30.0, "@b1: well");
    client.substitutes_from(&muster);
    let paths = [only.clone(), both.clone()];
    fetch(&client, &b1, &paths, &muster);
    muster.await_kept(&paths);
    let url = muster.narinfo(&only).field("URL").expect("a URL");
    // Whether who reads the folder without Muster believes a path.
    let key = muster.key();
    let believed = |path: &str| {
        let line = format!(
            "nix store verify --sigs-needed 1 --store file://{FOLDER} \
             --option trusted-public-keys '{key}' {path}"
        );
        client.run(&line).rc == 0
    };
    assert!(believed(&only) && believed(&both));

    client.run("cp /etc/one.toml /etc/muster.toml").ok();
    muster.signal(Signal::HUP);
    muster.await_log(10.0, "configuration read anew");
    for again in 0..2 {
        let gone = muster.narinfo(&only).status;
        assert_eq!(gone, 404, "start {again}\n{}", muster.log());
        assert_eq!(muster.get(&format!("/{url}")).status, 404, "start {again}");
        assert_eq!(muster.narinfo(&both).status, 200, "{}", muster.log());
        let unsigned = eventually(20.0, || !believed(&only));
        assert!(
            unsigned && believed(&both),
            "start {again}\n{}",
            muster.log()
        );
        muster.stop();
        muster = serve();
    }
    client.run("cp /etc/both.toml /etc/muster.toml").ok();
    muster.stop();
    b1.dead();
    let mut muster = serve();
    assert!(muster.names_a_file(&only), "{}", muster.log());
    assert_eq!(muster.get(&format!("/{url}")).status, 200);
    assert!(eventually(20.0, || believed(&only)), "{}", muster.log());
}

/// The folder in Muster's place.
const NGINX: &str = "server {\nlisten 5000;\nroot /var/cache/muster;\n}\n";
