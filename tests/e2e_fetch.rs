//! Real clients fetch from real builders through Muster: every kind of path, every command.

mod rig;

use rig::caches::asked;
use rig::{Lab, Machine, Muster, eventually};

/// Gets a path and compares it, byte for byte and reference for reference, with the builder's.
fn fetch(client: &Machine, builder: &Machine, path: &str) {
    let got = client.realise(path).ok();
    assert_eq!(got.built(), 0, "{path}: {got}");
    assert_eq!(client.nar_hash(path), builder.nar_hash(path), "{path}");
    assert_eq!(client.closure(path), builder.closure(path), "{path}");
}

#[test]
fn every_kind_of_path_arrives_as_it_was_built() {
    let lab = Lab::new();
    let (b1, b2) = (lab.builder("b1"), lab.builder("b2"));
    let client = lab.client(&["b1", "b2"]);
    b1.build("flat", "--arg n 3");
    let attrs = [
        "tiny",
        "symlink",
        "executable",
        "odd",
        "selfReference",
        "fixedFlat",
        "fixedRecursive",
        "soft",
        "files",
    ];
    let mut paths: Vec<_> = attrs.iter().map(|attr| b2.build_one(attr, "")).collect();
    let multi = b2
        .run("nix-store --query --outputs $(nix-instantiate /lab/workload.nix -A multi)")
        .ok();
    paths.extend(multi.out.split_whitespace().map(str::to_owned));
    assert_eq!(paths.len(), attrs.len() + 3);
    // A source added to the store: content-addressed, so its narinfo has a CA line.
    b2.run("mkdir -p /tmp/tree && echo added > /tmp/tree/file")
        .ok();
    paths.push(
        b2.run("nix store add-path /tmp/tree")
            .ok()
            .out
            .trim()
            .to_owned(),
    );

    let muster = Muster::serve(&client, "");
    client.substitutes_from(&muster);
    for path in &paths {
        fetch(&client, &b2, path);
    }
    drop(muster);
    for compression in ["zstd", "xz"] {
        let _muster = muster_with(&client, compression);
        client.fresh_store();
        for path in &paths {
            fetch(&client, &b2, path);
        }
    }
}

fn muster_with<'m>(client: &'m Machine, compression: &str) -> Muster<'m> {
    // Kept NARs are zstd, whatever else is asked for.
    let args = format!("--compression {compression} --cache-size 0");
    let muster = Muster::serve(client, &args);
    client.substitutes_from(&muster);
    muster
}

#[test]
fn a_closure_of_two_hundred_comes_from_the_builder_that_has_it() {
    let lab = Lab::new();
    let (b1, b2) = (lab.builder("b1"), lab.builder("b2"));
    let client = lab.client(&["b1", "b2"]);
    b1.build("flat", "--arg n 20");
    let dag = b2.build_one("dag", "--arg n 200");
    let muster = Muster::serve(&client, "");
    client.substitutes_from(&muster);
    let got = client.realise(&dag).ok();
    assert_eq!((got.built(), got.copied()), (0, 201), "{got}");
    assert_eq!(client.closure(&dag), b2.closure(&dag));
    assert!(got.secs < 20.0, "{got}");
    client
        .run(&format!(
            "nix-store --verify-path $(nix-store --query --requisites {dag})"
        ))
        .ok();
}

#[test]
fn a_closure_spread_over_builders_comes_together() {
    let lab = Lab::new();
    let (b1, b2) = (lab.builder("b1"), lab.builder("b2"));
    let client = lab.client(&["b1", "b2"]);
    let foo = b1.build_one("fooRef", "--arg n 6");
    let tiny = b2.build_one("tiny", "--argstr seed other");
    let muster = Muster::serve(&client, "");
    client.substitutes_from(&muster);
    let got = client.realise(&format!("{foo}' '{tiny}")).ok();
    assert_eq!((got.built(), got.copied()), (0, 8), "{got}");
}

#[test]
fn content_addressed_derivations_are_found_by_their_realisations() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let client = lab.client(&["b1"]);
    let path = b1.build_one("floatingUser", "");
    let muster = Muster::serve(&client, "");
    client.substitutes_from(&muster);
    let got = client.realise_attr("floatingUser", "").ok();
    assert_eq!(got.built(), 0, "{got}");
    assert_eq!(got.out.trim(), path);
    assert_eq!(client.nar_hash(&path), b1.nar_hash(&path));
}

/// `MUSTER_TEST_NAR_MB` is how large it is.
#[test]
fn a_path_of_300_mb_passes_and_is_kept_in_constant_memory() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let client = lab.client(&["b1"]);
    let size_mb = asked("MUSTER_TEST_NAR_MB", 300);
    let big = b1.build_one("big", &format!("--arg sizeMB {size_mb}"));
    let hash = b1.nar_hash(&big);
    // On this machine's disk: that of the machines is their memory.
    let mut muster = Muster::serve(&client, "--cache-dir /lab/kept");
    client.substitutes_from(&muster);
    for round in ["filled", "kept"] {
        client.fresh_store();
        let got = client.run_for(600.0, &format!("nix-store --realise {big}"));
        let got = got.ok();
        assert_eq!((got.built(), got.copied()), (0, 1), "{round}: {got}");
        assert_eq!(client.nar_hash(&big), hash, "{round}");
        muster.await_kept(std::slice::from_ref(&big));
        let peak = muster.memory_peak_kb();
        assert!(peak < 150_000, "{round}: {peak} kB\n{}", muster.log());
        b1.dead();
    }
}

#[test]
fn nix_commands_take_muster_for_a_binary_cache() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let client = lab.client(&["b1"]);
    let foo = b1.build_one("fooRef", "--arg n 4");
    let chatty = b1.build_one("chatty", "");
    let muster = Muster::serve(&client, "");
    client.substitutes_from(&muster);
    let url = muster.url();

    let infos = client
        .run(&format!(
            "nix path-info --store {url} --recursive --json {foo}"
        ))
        .ok();
    assert_eq!(infos.out.matches("narSize").count(), 5, "{infos}");
    client
        .run(&format!(
            "nix store ping --store {url} || nix store info --store {url}"
        ))
        .ok();
    client
        .run(&format!("nix store verify --store {url} --recursive {foo}"))
        .ok();
    client.run(&format!("nix copy --from {url} {foo}")).ok();
    assert_eq!(client.closure(&foo), b1.closure(&foo));
    client
        .run(&format!(
            "nix store verify --recursive --sigs-needed 1 {foo}"
        ))
        .ok();
    let sigs = client.run(&format!("nix path-info --sigs {foo}")).ok();
    assert!(sigs.out.contains("client-muster-1:"), "{sigs}");
    assert!(
        muster.key().starts_with("client-muster-1:"),
        "{}",
        muster.key()
    );
    let cat = client
        .run(&format!("nix store cat --store {url} {foo}/foo"))
        .ok();
    assert!(cat.out.contains("dependency-4"), "{cat}");

    client.realise(&chatty).ok();
    let log = client.run(&format!("nix log --store {url} {chatty}")).ok();
    assert!(
        log.out.contains("line 1 of s\n") && log.out.contains("line 2000 of s"),
        "{log}"
    );
    let drv = client
        .instantiate("chatty", "")
        .pop()
        .expect("chatty has a derivation");
    let log = client.run(&format!("nix log {drv}")).ok();
    assert!(log.out.contains("line 2000 of s"), "{log}");
    let none = client.run(&format!("nix log --store {url} {foo}")).ok();
    assert!(none.out.contains("foo-ref is built"), "{none}");
}

#[test]
fn what_was_missing_is_found_once_it_is_built() {
    let lab = Lab::new();
    let (b1, b2) = (lab.builder("b1"), lab.builder("b2"));
    let client = lab.client(&["b1", "b2"]);
    client.write("/etc/muster.toml", "negative-ttl = 1\n");
    let mut muster = Muster::serve(&client, "--config /etc/muster.toml");
    client.substitutes_from(&muster);
    let drv = b2
        .instantiate("tiny", "--argstr seed later")
        .pop()
        .expect("tiny has a derivation");
    let path = b2
        .run(&format!("nix-store --query --outputs {drv}"))
        .ok()
        .out
        .trim()
        .to_owned();
    assert_eq!(muster.narinfo(&path).status, 404);
    client.realise(&path).failed();
    b2.build("tiny", "--argstr seed later");
    assert!(
        eventually(5.0, || muster.narinfo(&path).status == 200),
        "{}",
        muster.log()
    );
    let got = client
        .run(&format!(
            "nix-store -r {path} --option narinfo-cache-negative-ttl 0"
        ))
        .ok();
    assert_eq!((got.built(), got.copied()), (0, 1), "{got}");
    drop(b1);
}

#[test]
fn build_logs_of_every_kind_of_upstream_are_shown() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let client = lab.client(&[]);
    let packed = b1.build_one("chatty", "--argstr seed packed");
    b1.configure("compress-build-log = false");
    let plain = b1.build_one("chatty", "--argstr seed plain");
    let kept = b1.run("find /nix/var/log/nix/drvs -name '*chatty*'").ok();
    assert_eq!(
        (kept.out.lines().count(), kept.out.matches(".bz2\n").count()),
        (2, 1),
        "{kept}"
    );
    // An account that is not root's, and the builder's own muster, which reads the files.
    let own = Muster::serve(&b1, "--listen 0.0.0.0:5001 --no-machines");
    for uri in ["ssh-ng://root@b1", "ssh-ng://guest@b1", "ssh://root@b1"] {
        let muster = Muster::serve(&client, &format!("--upstream {uri}"));
        shows_logs(&client, &muster.url(), &packed, "packed");
        shows_logs(&client, &muster.url(), &plain, "plain");
    }
    let through_http = "http://b1:5001";
    shows_logs(&client, through_http, &packed, "packed");
    shows_logs(&client, through_http, &plain, "plain");
    drop(own);

    // Logs may lie elsewhere; Nix knows by NIX_LOG_DIR.
    b1.run("mv /nix/var/log/nix /var/nix-logs").ok();
    let own = Muster::start_with(
        &b1,
        "NIX_LOG_DIR=/var/nix-logs",
        "--listen 0.0.0.0:5001 --no-machines",
    );
    own.await_log(10.0, "upstream daemon: well");
    shows_logs(&client, through_http, &packed, "packed");
}

/// Shows the log of what was built with a seed, asked for by its output and by its derivation.
#[track_caller]
fn shows_logs(client: &Machine, url: &str, output: &str, seed: &str) {
    let drv = client
        .instantiate("chatty", &format!("--argstr seed {seed}"))
        .pop()
        .expect("chatty has a derivation");
    client.forget_lookups();
    for line in [
        format!("nix log --store {url} {output}"),
        format!("nix log --option substituters {url} {drv}"),
    ] {
        let log = client.run(&line).ok();
        let lines = log
            .out
            .lines()
            .filter(|l| l.ends_with(&format!("of {seed}")));
        assert_eq!(lines.count(), 2000, "{line}: {log}");
    }
}

#[test]
fn what_cannot_be_done_with_muster_fails_at_once_and_clearly() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let client = lab.client(&["b1"]);
    let multi = b1.build_one("odd", "");
    let muster = Muster::serve(&client, "");
    client.substitutes_from(&muster);
    let url = muster.url();
    let own = client.build_one("tiny", "--argstr seed own");
    let copied = client
        .run(&format!("nix copy --no-check-sigs --to {url} {own}"))
        .failed();
    assert!(copied.secs < 3.0 && copied.err.contains("405"), "{copied}");
    let listed = client
        .run(&format!(
            "nix store ls --store {url} --recursive --long {multi}"
        ))
        .ok();
    for word in ["größe", "dangling -> /nowhere", "-r-xr-xr-x", "日本語"] {
        assert!(listed.out.contains(word), "no {word}: {listed}");
    }
    let cat = client
        .run(&format!("nix store cat --store {url} {multi}/seven"))
        .ok();
    assert_eq!(cat.out, "1234567");
    let missing = client
        .run(&format!("nix store cat --store {url} {multi}/none"))
        .failed();
    assert!(missing.secs < 3.0, "{missing}");
    let absent = "/nix/store/00000000000000000000000000000000-none";
    for line in [
        format!("nix path-info --store {url} {absent}"),
        format!("nix copy --from {url} {absent}"),
        format!("nix log --store {url} {absent}"),
    ] {
        let got = client.run(&line).failed();
        assert!(got.secs < 3.0 && got.err.contains("none"), "{line}: {got}");
    }
    let verified = client
        .run(&format!(
            "nix store verify --store {url} --recursive --sigs-needed 1 --option trusted-public-keys '{}' {multi}",
            muster.key()
        ))
        .ok();
    assert!(!verified.err.contains("untrusted"), "{verified}");
}
