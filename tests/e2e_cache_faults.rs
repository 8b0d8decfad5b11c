//! The cache on disk when something is wrong with it, with real clients and builders: serving goes on, the
//! log and `/healthz` say what and where. And its folder after a change of keys.

mod rig;

use rig::{Lab, Machine, Muster, eventually};
use rustix::process::Signal;

const FOLDER: &str = "/var/cache/muster";

/// Gets a path with an empty store and nothing remembered, and compares it with the builder's.
#[track_caller]
fn fetch(client: &Machine, builder: &Machine, path: &str, muster: &Muster<'_>) {
    client.fresh_store();
    let got = client.realise(path);
    assert_eq!((got.rc, got.built()), (0, 0), "{got}\n{}", muster.log());
    assert_eq!(client.nar_hash(path), builder.nar_hash(path), "{path}");
}

/// Waits until a path is kept; returns its file, as seen in the machine.
#[track_caller]
fn kept(muster: &mut Muster<'_>, path: &str) -> String {
    let mut file = String::new();
    let kept = eventually(20.0, || {
        let url = muster.narinfo(path).field("URL").unwrap_or_default();
        file = format!("{FOLDER}/{url}");
        url.matches('-').count() == 2
    });
    assert!(kept, "{path} is not kept\n{}", muster.log());
    file
}

/// What `/healthz` says in all, and of the cache.
fn health(muster: &mut Muster<'_>) -> (String, String) {
    let report: serde_json::Value = serde_json::from_str(&muster.get("/healthz").text()).unwrap();
    let cause = report["cache"]["degraded"].as_str().unwrap_or_default();
    (
        report["status"].as_str().unwrap().to_owned(),
        cause.to_owned(),
    )
}

#[track_caller]
fn becomes(muster: &mut Muster<'_>, status: &str) {
    // It tries again 30 s after it failed.
    let became = eventually(60.0, || {
        // A fill is what it tries it for.
        health(muster).0 == status
    });
    assert!(
        became,
        "{:?} is not {status}\n{}",
        health(muster),
        muster.log()
    );
}

#[test]
fn a_full_disk_a_read_only_one_and_damaged_files_break_nothing() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let client = lab.client(&["b1"]);
    let mount = |options: &str| {
        let line = format!("mkdir -p {FOLDER} && mount -t tmpfs {options} tmpfs {FOLDER}");
        client.run(&line).ok();
    };
    mount("-o size=120m,mode=700");
    let small = b1.build_one("tiny", "");
    let large = b1.build_one("big", "--arg sizeMB 9");
    let other = b1.build_one("text", "--arg sizeMB 6");
    let mut muster = Muster::serve(&client, "");
    client.substitutes_from(&muster);
    fetch(&client, &b1, &small, &muster);
    kept(&mut muster, &small);
    assert_eq!(health(&mut muster), ("ok".to_owned(), String::new()));

    // Full: what others need is left to them, and nothing more is kept.
    client
        .run(&format!("head -c 70M /dev/zero >{FOLDER}/others"))
        .ok();
    for path in [&large, &small, &other] {
        fetch(&client, &b1, path, &muster);
    }
    let (status, cause) = health(&mut muster);
    assert_eq!(status, "degraded", "{}", muster.log());
    assert!(
        cause.contains(FOLDER) && cause.contains("bytes left"),
        "{cause}"
    );
    muster.await_log(1.0, "the cache cannot be written, serving goes on without");
    client.run(&format!("rm {FOLDER}/others")).ok();
    becomes(&mut muster, "ok");
    muster.await_log(1.0, "the cache can be written again");
    fetch(&client, &b1, &large, &muster);
    let file = kept(&mut muster, &large);

    // Truncated: seen before the first byte, removed, fetched again.
    client.run(&format!("truncate --size=1000000 {file}")).ok();
    fetch(&client, &b1, &large, &muster);
    muster.await_log(5.0, "a cached nar is corrupt, the entry is removed");
    assert!(muster.log().contains(&file), "it says which");
    fetch(&client, &b1, &large, &muster);
    // Other bytes of the same size: the file is read before it is given out, since it was changed.
    let removed = |muster: &Muster<'_>| muster.log().matches("is corrupt").count();
    for path in [&large, &small] {
        let file = kept(&mut muster, path);
        let before = removed(&muster);
        client
            .run(&format!(
                "head -c 20 /dev/urandom | dd of={file} bs=1 seek=50 conv=notrunc"
            ))
            .ok();
        fetch(&client, &b1, path, &muster);
        assert!(eventually(5.0, || removed(&muster) > before));
        fetch(&client, &b1, path, &muster);
    }
    // Somebody else's files are left alone.
    let theirs = format!("{FOLDER}/{}.narinfo", "0".repeat(32));
    client
        .run(&format!(
            "echo theirs >{theirs} && echo theirs >{FOLDER}/nar/x.nar.xz"
        ))
        .ok();
    assert_eq!(
        muster.get(&format!("/{}.narinfo", "0".repeat(32))).status,
        404
    );
    assert_eq!(client.read(&theirs), "theirs\n");

    // Read-only: what is kept is given, all else comes from the builders.
    kept(&mut muster, &large);
    muster.signal(Signal::TERM);
    assert_eq!(muster.wait(20.0), Some(0));
    client.run(&format!("mount -o remount,ro {FOLDER}")).ok();
    let mut muster = Muster::serve(&client, "");
    client.substitutes_from(&muster);
    muster.await_log(1.0, "the cache cannot be written, serving goes on without");
    let (status, cause) = health(&mut muster);
    assert_eq!(status, "degraded");
    assert!(
        cause.contains(FOLDER) && cause.contains("Read-only"),
        "{cause}"
    );
    for path in [&other, &large, &small] {
        fetch(&client, &b1, path, &muster);
    }
    client.run(&format!("mount -o remount,rw {FOLDER}")).ok();
    becomes(&mut muster, "ok");
    fetch(&client, &b1, &other, &muster);
    kept(&mut muster, &other);
    b1.dead();
    for path in [&small, &large, &other] {
        client.fresh_store();
        client.realise(path).ok();
    }
}

#[test]
fn after_a_reload_with_another_key_the_folder_alone_carries_its_signatures() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let client = lab.client(&["b1"]);
    let dag = b1.build_one("dag", "--arg n 20");
    let mut paths = b1.closure(&dag);
    paths.push(b1.build_one("big", "--arg sizeMB 6"));
    for name in ["old-1", "new-1"] {
        client
            .run(&format!("muster key generate {name} --secret-key-file /etc/{name} --public-key-file /etc/{name}.pub"))
            .ok();
    }
    let configure = |name: &str| {
        let text = format!("secret-key-files = [\"/etc/{name}\"]\n");
        client.write("/etc/muster.toml", &text);
    };
    let verifies = |name: &str| {
        let key = client.read(&format!("/etc/{name}.pub"));
        let line = format!(
            "nix store verify --all --store file://{FOLDER} --sigs-needed 1 --option trusted-public-keys '{}'",
            key.trim()
        );
        client.run(&line).rc == 0
    };
    configure("old-1");
    let mut muster = Muster::serve(&client, "--config /etc/muster.toml");
    client.substitutes_from(&muster);
    client.realise(&paths.join("' '")).ok();
    for path in &paths {
        kept(&mut muster, path);
    }
    assert!(verifies("old-1") && !verifies("new-1"));

    configure("new-1");
    muster.signal(Signal::HUP);
    muster.await_log(10.0, "narinfos in the cache signed by the keys of today");
    assert!(verifies("new-1") && !verifies("old-1"), "{}", muster.log());
    muster.signal(Signal::TERM);
    assert_eq!(muster.wait(20.0), Some(0));

    // Keys that change over a restart are seen, too.
    configure("old-1");
    let muster = Muster::serve(&client, "--config /etc/muster.toml");
    muster.await_log(10.0, "narinfos in the cache signed by the keys of today");
    assert!(verifies("old-1") && !verifies("new-1"), "{}", muster.log());
    drop(muster);
    // Without muster, and with the present key alone.
    client.fresh_store();
    let key = client.read("/etc/old-1.pub");
    let copied = format!(
        "nix copy --from file://{FOLDER} --option trusted-public-keys '{}' {dag}",
        key.trim()
    );
    client.run(&copied).ok();
}
