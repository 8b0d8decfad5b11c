//! The live catalog of a large store: a muster over the own store feeds another, over HTTP on one machine.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::figures::{CATALOG_ADDED, CATALOG_GONE, CATALOG_MEMORY, Figures, Goal, Unit};
use crate::rig::muster::narinfo_target;
use crate::rig::{Machine, Muster};

/// Takes all figures once, over a store of so many paths.
pub fn measure(b: &Machine, paths: usize, figures: &mut Figures) {
    let _feeder = Muster::serve(
        b,
        "--no-machines --upstream daemon --cache-size 0 --listen 127.0.0.1:5001",
    );
    let without = serve(b, false);
    // Both are measured as they are when nothing is under way.
    std::thread::sleep(SETTLED);
    let before = without.memory_kb();
    drop(without);
    let mut fed = serve(b, true);
    fed.await_log(60.0, "its catalog is here");
    std::thread::sleep(SETTLED);
    let grown = fed.memory_kb().saturating_sub(before) as f64 * 1024.0 / 1e6;
    let via = paths.to_string();
    figures.add(CATALOG_MEMORY, "", &via, Unit::Megabytes, grown);

    // One of them after the other, since the answer to one is remembered.
    let files: String = (0..PROBES).map(|n| format!(" probe-{n}")).collect();
    let add =
        format!("cd /tmp && for f in{files}; do date +%s%N > $f; done && nix-store --add{files}");
    let added = b.run(&add).ok().out;
    let added: Vec<&str> = added.lines().collect();
    let after = probe(&added, |path| fed.get(&narinfo_target(path)).status == 200);
    figures.add(CATALOG_ADDED, "", &via, Unit::Milliseconds, after);

    // The last ones, which nobody has asked for: what is served is kept from deletion.
    std::thread::sleep(SETTLED);
    let mut left = known(&mut fed).expect("it was fed");
    for path in added.iter().rev().take(DELETIONS) {
        b.run(&format!("nix-store --delete {path}")).ok();
        left -= 1;
        let begun = Instant::now();
        while known(&mut fed) != Some(left) {
            assert!(begun.elapsed() < PATIENCE, "{path} is gone and not missed");
            std::thread::sleep(BETWEEN / 5);
        }
        let after = begun.elapsed().as_secs_f64() * 1000.0;
        figures.add(CATALOG_GONE, "", &via, Unit::Milliseconds, after);
    }
    figures.set_goal(CATALOG_MEMORY, "", &via, Goal::AtMost(40.0));
    figures.set_goal(CATALOG_ADDED, "", &via, Goal::AtMost(1000.0));
    figures.set_goal(CATALOG_GONE, "", &via, Goal::AtMost(1000.0));
}

/// The muster that is fed, or asks for each path.
fn serve(b: &Machine, catalog: bool) -> Muster<'_> {
    let file = "/etc/muster/fed.toml";
    let text = format!(
        "machines = false\ncatalog = {catalog}\nupstreams = [{{ uri = \"http://127.0.0.1:5001\", trusted = true }}]\n"
    );
    b.write(file, &text);
    let args = format!("--config {file} --no-local-daemon --cache-size 0 --listen 127.0.0.1:5002");
    Muster::serve(b, &args)
}

/// Asks for one path after the other until the answer is there; ms.
fn probe(paths: &[&str], mut is_known: impl FnMut(&str) -> bool) -> f64 {
    let begun = Instant::now();
    let mut asked = paths.iter().map(|path| {
        let known = is_known(path);
        let after = begun.elapsed();
        std::thread::sleep(BETWEEN);
        known.then_some(after.as_secs_f64() * 1000.0)
    });
    let known = asked.find_map(|known| known);
    known.unwrap_or_else(|| panic!("not known after {:?}", begun.elapsed()))
}

/// How many paths are in the catalog that it is fed; `None` while that is not fresh.
fn known(fed: &mut Muster<'_>) -> Option<u64> {
    let health = fed.get("/healthz").text();
    let health: Value = serde_json::from_str(&health).expect("it answers JSON");
    health["upstreams"][0]["paths"].as_u64()
}

/// Paths that are probed, at most 5 s long.
const PROBES: usize = 100;
/// Deleted one after the other, as a collection of garbage does.
const DELETIONS: usize = 8;
const PATIENCE: Duration = Duration::from_secs(20);
const BETWEEN: Duration = Duration::from_millis(50);
/// More than a heartbeat, and than what starting leaves to do.
const SETTLED: Duration = Duration::from_millis(1500);
