//! Real clients fetch from a builder that is far: what is fetched ahead for them, and that nothing else changes.

mod rig;

use std::thread;
use std::time::Duration;

use rig::{Lab, Line, Machine, Muster, eventually};
use serde_json::Value;

const FAR: Line = Line {
    delay_ms: 20,
    cut_after_bytes: 0,
    bytes_per_second: 0,
};

/// Starts Muster with this configuration and nothing kept of the one before; what it warms up is warm.
fn start<'m>(client: &'m Machine, config: &str) -> Muster<'m> {
    client.write("/etc/muster.toml", config);
    let mut muster = Muster::serve(client, "--config /etc/muster.toml --cache-size 0");
    let well = |m: &mut Muster<'_>| m.get("/healthz").text().contains(r#""state":"well""#);
    assert!(eventually(20.0, || well(&mut muster)), "{}", muster.log());
    // Sessions for NARs and closures log in, too.
    thread::sleep(Duration::from_secs(4));
    client.substitutes_from(&muster);
    muster
}

fn figure(muster: &mut Muster<'_>, of: &str, name: &str) -> u64 {
    let report: Value = serde_json::from_str(&muster.get("/healthz").text()).expect("JSON");
    report[of][name].as_u64().expect("a figure")
}

/// Fetches a closure anew and compares it with the builder's.
fn fetch(client: &Machine, builder: &Machine, top: &str, muster: &Muster<'_>) {
    client.fresh_store();
    let got = client.realise(top);
    assert_eq!(got.rc, 0, "{got}\n{}", muster.log());
    assert_eq!((got.built(), got.copied()), (0, 41), "{got}");
    for path in client.closure(top) {
        assert_eq!(client.nar_hash(&path), builder.nar_hash(&path), "{path}");
    }
    assert_eq!(client.closure(top), builder.closure(top));
}

#[test]
fn a_far_closure_arrives_alike_with_each_switch_on_and_off() {
    let lab = Lab::new();
    let builder = lab.builder("b");
    let client = lab.client(&["b"]);
    let top = builder.build_one("dag", "--arg n 40");
    builder.behind(FAR);

    for config in [
        "prefetch = false",
        "prefetch-closure = false\nprefetch-nars = 0",
        "prefetch-nars = 0",
        "prefetch-closure = false",
        "compression = \"zstd\"",
        "",
    ] {
        let mut muster = start(&client, config);
        // A look that fetches nothing.
        client.fresh_store();
        let look = format!("nix-store --realise --dry-run {top}");
        let got = client.run_for(60.0, &look).ok();
        assert!(got.err.contains("will be fetched"), "{got}");
        let prefetched = figure(&mut muster, "narinfo", "prefetched");
        let expected = if config == "prefetch = false" { 0 } else { 40 };
        assert_eq!(prefetched, expected, "{config}\n{}", muster.log());
        assert_eq!(figure(&mut muster, "nar", "ahead"), 0, "{config}");

        fetch(&client, &builder, &top, &muster);
        let claimed = figure(&mut muster, "nar", "ahead-claimed");
        let off = config.contains("prefetch-nars = 0") || config == "prefetch = false";
        assert_eq!(claimed == 0, off, "{config}: {claimed}\n{}", muster.log());
        // Each path was had once: by being pulled, or by being asked for.
        let pulled = figure(&mut muster, "nar", "ahead");
        assert_eq!(pulled, claimed, "{config}\n{}", muster.log());
        assert_eq!(figure(&mut muster, "nar", "requests"), 41, "{config}");
        assert_eq!(figure(&mut muster, "nar", "corrupt"), 0, "{config}");
    }
}

#[test]
fn whole_closures_are_asked_for_where_a_builder_is_far_and_lets_us() {
    let lab = Lab::new();
    let builder = lab.builder("b");
    let client = lab.client(&["b"]);
    let top = builder.build_one("dag", "--arg n 40");
    let servers = |builder: &Machine| builder.processes("nix-store");

    builder.behind(FAR);
    let muster = start(&client, "log = \"muster=debug\"");
    muster.await_log(10.0, "nix-store --serve stands ready");
    assert!(!servers(&builder).is_empty());
    fetch(&client, &builder, &top, &muster);
    drop(muster);

    // Such an account starts the daemon, whatever was asked for.
    builder.sshd_with("ForceCommand nix-daemon --stdio");
    let mut muster = start(&client, "");
    let said = "closures are fetched level by level";
    muster.await_log(10.0, said);
    fetch(&client, &builder, &top, &muster);
    assert_eq!(figure(&mut muster, "narinfo", "prefetched"), 40);
    assert_eq!(muster.log().matches(said).count(), 1, "{}", muster.log());
    drop(muster);

    builder.heal();
    builder.sshd_with("");
    // On a loaded machine a near builder may seem far for once.
    let near = (0..5).find_map(|_| {
        let muster = start(&client, "log = \"muster=debug\"");
        muster.await_log(10.0, "worth_it=");
        muster.log().contains("worth_it=false").then_some(muster)
    });
    let muster = near.expect("a near builder is found to be near");
    assert!(servers(&builder).is_empty());
    fetch(&client, &builder, &top, &muster);
}
