//! Promises 3 and 4: nothing is signed that was not checked, and bytes are bound to the narinfo.

mod rig;

use std::fs;

use rig::helper::LIAR;
use rig::{Lab, Line, Muster};

#[test]
fn a_client_that_trusts_another_key_takes_nothing() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let client = lab.client(&["b1"]);
    let path = b1.build_one("tiny", "");
    let muster = Muster::serve(&client, "");
    client
        .run("nix-store --generate-binary-cache-key client-muster-1 /tmp/secret /tmp/public")
        .ok();
    let other = client.read("/tmp/public");
    client.configure(&format!(
        "extra-substituters = {}\nextra-trusted-public-keys = {other}",
        muster.url()
    ));
    client.realise(&path).failed();
    assert!(!client.valid(&path));
    client.substitutes_from(&muster);
    client.realise(&path).ok();
}

#[test]
fn a_builders_own_signature_is_kept_beside_ours() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let client = lab.client(&["b1"]);
    let key = b1.signs_as("b1-1");
    let path = b1.build_one("tiny", "");
    let mut muster = Muster::serve(&client, "");
    let narinfo = muster.narinfo(&path).text();
    assert!(
        narinfo.contains("\nSig: b1-1:") && narinfo.contains("\nSig: client-muster-1:"),
        "{narinfo}"
    );
    client.configure(&format!(
        "extra-substituters = {}\nextra-trusted-public-keys = {key}",
        muster.url()
    ));
    client.realise(&path).ok();
}

#[test]
fn a_nar_that_differs_in_its_last_byte_is_never_completed() {
    let lab = Lab::new();
    let (b1, b2) = (lab.builder("b1"), lab.builder("b2"));
    let client = lab.client(&[]);
    let liar = format!("--upstream 'ssh-ng://root@b1?{LIAR}'");
    for bytes in [64 * 1024, 24 << 20] {
        let path = b1.add_marked(bytes);
        for compression in ["none", "zstd"] {
            client.fresh_store();
            let mut muster = Muster::serve(&client, &format!("{liar} --compression {compression}"));
            client.substitutes_from(&muster);
            let nar = muster.nar(&path);
            assert!(
                !nar.complete || nar.status == 404,
                "{} with {} bytes",
                nar.status,
                nar.body.len()
            );
            assert_eq!(
                nar.status == 404,
                bytes < 4 << 20,
                "small ones are read whole before the first byte"
            );
            let got = client.realise(&path);
            assert!(
                got.rc != 0 && !client.valid(&path),
                "{got}\n{}",
                muster.log()
            );
        }
        // An honest holder makes up for it, and the client sees nothing of this.
        assert_eq!(b2.add_marked(bytes), path);
        client.fresh_store();
        let muster = Muster::serve(&client, &format!("{liar} --upstream ssh-ng://root@b2"));
        client.substitutes_from(&muster);
        client.realise(&path).ok();
        assert_eq!(client.nar_hash(&path), b2.nar_hash(&path));
    }
}

/// One lies at the end of a large NAR and answers first; what an honest builder has makes it good, in one go.
#[test]
fn a_large_nar_that_is_wrong_at_its_end_is_made_good_by_another_builder() {
    let lab = Lab::new();
    let (b1, b2) = (lab.builder("b1"), lab.builder("b2"));
    let client = lab.client(&[]);
    // The padding of a NAR, which its form tells, and a byte of a file, which its hash alone does.
    let marked = b1.add_marked(24 << 20);
    assert_eq!(b2.add_marked(24 << 20), marked);
    let rotten = b1.build_one("big", "--arg sizeMB 24");
    assert_eq!(b2.build_one("big", "--arg sizeMB 24"), rotten);
    let mut bytes = fs::read(b1.path(&rotten)).expect("read the file");
    if let Some(last) = bytes.last_mut() {
        *last ^= 1;
    }
    fs::write(b1.path(&rotten), bytes).expect("let the file rot");
    b2.behind(Line {
        delay_ms: 50,
        ..Line::default()
    });
    let upstreams = format!("--upstream 'ssh-ng://root@b1?{LIAR}' --upstream ssh-ng://root@b2");
    for compression in ["none", "zstd", "xz"] {
        for (path, seen) in [
            (&marked, "padding is not zero"),
            (&rotten, "mended by another holder"),
        ] {
            client.fresh_store();
            client.wipe_kept();
            let muster =
                Muster::serve(&client, &format!("{upstreams} --compression {compression}"));
            for name in ["@b1", "@b2"] {
                muster.await_log(10.0, &format!("{name}: well"));
            }
            // A second attempt would hide a cut.
            client.configure(&format!(
                "{}\ndownload-attempts = 1",
                muster.lines().join("\n")
            ));
            let got = client.realise(path).ok();
            assert_eq!((got.built(), got.copied()), (0, 1), "{got}");
            assert_eq!(client.nar_hash(path), b2.nar_hash(path));
            let log = muster.log();
            assert!(log.contains(seen), "{path}: {log}");
            assert!(!log.contains("transfer cut"), "{path}: {log}");
        }
    }
}

#[test]
fn a_file_that_rotted_on_the_builder_is_not_passed_on() {
    let lab = Lab::new();
    let (b1, b2) = (lab.builder("b1"), lab.builder("b2"));
    let path = b1.build_one("big", "--arg sizeMB 1");
    let mut bytes = fs::read(b1.path(&path)).expect("read the file");
    if let Some(last) = bytes.last_mut() {
        *last ^= 1;
    }
    fs::write(b1.path(&path), bytes).expect("let the file rot");
    let client = lab.client(&["b1"]);
    let muster = Muster::serve(&client, "");
    client.substitutes_from(&muster);
    client.realise(&path).failed();
    assert!(!client.valid(&path));
    drop(muster);

    b2.build_one("big", "--arg sizeMB 1");
    client.builders(&["b1", "b2"]);
    client.forget_lookups();
    let muster = Muster::serve(&client, "");
    client.substitutes_from(&muster);
    client.realise(&path).ok();
    assert_eq!(client.nar_hash(&path), b2.nar_hash(&path));
}

#[test]
fn a_path_that_vanished_after_it_was_promised_is_built_or_taken_elsewhere() {
    let lab = Lab::new();
    let (b1, b2) = (lab.builder("b1"), lab.builder("b2"));
    let client = lab.client(&["b1", "b2"]);
    client.write("/etc/muster.toml", "roots-lifetime = 1\n");
    for elsewhere in [false, true] {
        let seed = format!("--argstr seed promised-{elsewhere}");
        let path = b1.build_one("tiny", &seed);
        if elsewhere {
            b2.build_one("tiny", &seed);
        }
        let muster = Muster::serve(&client, "--config /etc/muster.toml");
        client.substitutes_from(&muster);
        client
            .run(&format!("nix path-info --store {} {path}", muster.url()))
            .ok();
        let deleted = rig::eventually(10.0, || {
            b1.run(&format!("nix-store --delete {path}")).rc == 0
        });
        assert!(deleted, "the roots on b1 lapse\n{}", muster.log());
        let got = client.realise_attr("tiny", &seed).ok();
        let expected = if elsewhere { (0, 1) } else { (1, 0) };
        assert_eq!(
            (got.built(), got.copied().min(expected.1)),
            expected,
            "{got}\n{}",
            muster.log()
        );
    }
}

#[test]
fn two_builders_that_disagree_about_a_path_confuse_nobody() {
    let lab = Lab::new();
    let (b1, b2) = (lab.builder("b1"), lab.builder("b2"));
    let client = lab.client(&["b1", "b2"]);
    let path = b1.build_one("nondeterministic", "");
    assert_eq!(b2.build_one("nondeterministic", ""), path);
    let hashes = [b1.nar_hash(&path), b2.nar_hash(&path)];
    assert!(hashes[0] != hashes[1]);
    let mut muster = Muster::serve(&client, "");
    client.substitutes_from(&muster);
    let mut chosen = || muster.narinfo(&path).field("NarHash");
    let first = chosen().expect("a NAR hash");
    for _ in 0..5 {
        assert_eq!(chosen().as_ref(), Some(&first), "one is chosen and kept to");
        client.fresh_store();
        client.realise(&path).ok();
        assert!(hashes.contains(&client.nar_hash(&path)));
    }
}

#[test]
fn a_builder_that_needs_signatures_gives_signed_and_content_addressed_paths_alone() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let client = lab.client(&[]);
    let unsigned = b1.build_one("tiny", "--argstr seed unsigned");
    let foreign_key = b1.signs_as("foreign-1");
    let foreign = b1.build_one("tiny", "--argstr seed foreign");
    let key = b1.signs_as("b1-1");
    let signed = b1.build_one("tiny", "--argstr seed signed");
    b1.run("mkdir -p /tmp/tree && echo added > /tmp/tree/file")
        .ok();
    let added = b1.run("nix store add-path /tmp/tree").ok();
    let added = added.out.trim();
    client.write(
        "/etc/muster.toml",
        &format!(
            "log = \"info,muster=debug\"\n[[upstreams]]\nuri = \"ssh-ng://root@b1\"\ntrusted = false\ntrusted-public-keys = [\"{key}\"]\n"
        ),
    );
    let mut muster = Muster::serve(&client, "--config /etc/muster.toml");
    for path in [&unsigned, &foreign] {
        assert_eq!(muster.narinfo(path).status, 404, "{}", muster.log());
        muster.await_log(1.0, path.trim_start_matches("/nix/store/"));
    }
    muster.await_log(1.0, "no signature by a trusted key (it carries: foreign-1)");
    // Not by the NAR's own address either.
    let hash = b1.run(&format!("nix-store -q --hash {unsigned}")).ok().out;
    let nar = hash.trim().trim_start_matches("sha256:");
    let store_hash = rig::muster::narinfo_target(&unsigned);
    let store_hash = store_hash.trim_matches('/').trim_end_matches(".narinfo");
    let target = format!("/nar/{nar}.nar?hash={store_hash}");
    assert_eq!(muster.get(&target).status, 404, "{target}");

    let text = muster.narinfo(&signed).text();
    assert!(
        text.contains("\nSig: b1-1:") && text.contains("\nSig: client-muster-1:"),
        "{text}"
    );
    let text = muster.narinfo(added).text();
    assert!(
        text.contains("\nCA: fixed:r:sha256:") && !text.contains("\nSig:"),
        "{text}"
    );
    client.substitutes_from(&muster);
    client.realise(&unsigned).failed();
    client.realise(&signed).ok();
    client.realise(added).ok();
    // The builder's word counts for clients that know only its key.
    client.fresh_store();
    client.configure(&format!(
        "extra-substituters = {}\nextra-trusted-public-keys = {key} {foreign_key}",
        muster.url()
    ));
    client.realise(&signed).ok();
    client.realise(&foreign).failed();
}

#[test]
fn several_keys_sign_and_a_reload_changes_them() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let client = lab.client(&["b1"]);
    let path = b1.build_one("tiny", "");
    for name in ["old-1", "new-1"] {
        client
            .run(&format!("muster key generate {name} --secret-key-file /etc/{name} --public-key-file /etc/{name}.pub"))
            .ok();
    }
    let keys = |names: &[&str]| {
        let files: Vec<_> = names.iter().map(|n| format!("\"/etc/{n}\"")).collect();
        let text = format!("secret-key-files = [{}]\n", files.join(", "));
        client.write("/etc/muster.toml", &text);
    };
    keys(&["old-1", "new-1"]);
    let mut muster = Muster::serve(&client, "--config /etc/muster.toml");
    let signed_by = |muster: &mut Muster<'_>| {
        let text = muster.narinfo(&path).text();
        let names = text.lines().filter_map(|l| l.strip_prefix("Sig: "));
        let names = names.filter_map(|l| l.split_once(':'));
        names.map(|(name, _)| name.to_owned()).collect::<Vec<_>>()
    };
    let accepts = |muster: &Muster<'_>, name: &str| {
        client.fresh_store();
        let key = client.read(&format!("/etc/{name}.pub"));
        client.configure(&format!(
            "extra-substituters = {}\nextra-trusted-public-keys = {key}",
            muster.url()
        ));
        client.realise(&path).rc == 0
    };
    assert_eq!(signed_by(&mut muster), ["old-1", "new-1"]);
    assert!(accepts(&muster, "old-1") && accepts(&muster, "new-1"));

    keys(&["new-1"]);
    muster.signal(rustix::process::Signal::HUP);
    let changed = rig::eventually(5.0, || signed_by(&mut muster) == ["new-1"]);
    assert!(changed, "{}", muster.log());
    muster.await_log(
        1.0,
        "signing with other keys, which clients must trust keys=new-1:",
    );
    let public = muster.get("/public-key").text();
    assert!(!public.contains("old-1") && public.contains("new-1:"));
    assert!(accepts(&muster, "new-1") && !accepts(&muster, "old-1"));

    // A reload that cannot be done leaves all as it was.
    keys(&["none"]);
    muster.signal(rustix::process::Signal::HUP);
    muster.await_log(5.0, "cannot read /etc/none");
    assert_eq!(signed_by(&mut muster), ["new-1"]);
}
