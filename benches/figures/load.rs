//! Load on a server in a machine, by wrk, and stores of many small paths.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;

use sha2::{Digest as _, Sha256};

use crate::rig::{Lab, Machine};

/// What wrk saw.
pub struct Load {
    pub requests: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    /// Answers of 400 and above.
    pub refused: f64,
}

/// Lets all machines have wrk's script.
pub fn write_script(lab: &Lab) {
    fs::write(lab.share().join("requests.lua"), REQUESTS).expect("write wrk's script");
}

/// Writes what wrk is to ask for, and names the file.
pub fn targets(machine: &Machine, name: &str, targets: impl Iterator<Item = String>) -> String {
    let file = format!("/run/targets-{name}");
    machine.write(&file, &(targets.collect::<Vec<_>>().join("\n") + "\n"));
    file
}

/// Asks a server on the machine's own loopback for the targets in turn, over and over.
pub fn load(machine: &Machine, targets: &str, port: u16, connections: usize, secs: u32) -> Load {
    let line = format!(
        "TARGETS={targets} wrk -t1 -c{connections} -d{secs}s --latency --timeout 20s -s /lab/requests.lua http://127.0.0.1:{port}"
    );
    let got = machine.run(&line).ok();
    let words = got.out.lines().find(|l| l.starts_with("requests "));
    let words: Vec<_> = words
        .unwrap_or_else(|| panic!("{got}"))
        .split(' ')
        .collect();
    let numbers: BTreeMap<_, _> = words
        .chunks(2)
        .map(|pair| (pair[0], pair[1].parse::<f64>().expect("a number")))
        .collect();
    assert!(
        numbers["requests"] > 0.0 && numbers["broken"] == 0.0,
        "{got}"
    );
    Load {
        requests: numbers["requests"],
        p50_us: numbers["p50"],
        p99_us: numbers["p99"],
        refused: numbers["status"],
    }
}

/// Asks for each target once.
pub fn once(machine: &Machine, port: u16, targets: impl Iterator<Item = String>) {
    let mut list = String::new();
    for target in targets {
        _ = writeln!(
            list,
            "url = http://127.0.0.1:{port}{target}\noutput = /dev/null"
        );
    }
    machine.write("/run/fetch", &list);
    machine
        .run("curl -sS -Z --parallel-max 64 -K /run/fetch")
        .ok();
}

/// Adds small files to a store until there are so many, at once, as paths that were built; each refers to the
/// few before it. Something must have made the store's folders before.
pub fn add_small(machine: &Machine, paths: &mut Vec<String>, count: usize, references: usize) {
    let store = machine.path("nix/store");
    let first = paths.len();
    let register = entries(paths, count, references);
    for (number, path) in paths.iter().enumerate().skip(first) {
        let file = store.join(path.trim_start_matches("/nix/store/"));
        fs::write(file, small_text(number)).expect("write a path");
    }
    machine
        .run_with_input(
            120.0,
            "nix-store --register-validity --hash-given",
            register.as_bytes(),
        )
        .ok();
}

/// Adds paths to a store's database alone: they can be looked up, and a million of them takes a minute.
pub fn add_entries(machine: &Machine, paths: &mut Vec<String>, count: usize) {
    while paths.len() < count {
        let upto = count.min(paths.len() + ENTRIES_AT_ONCE);
        let register = entries(paths, upto, 0);
        machine
            .run_with_input(120.0, "nix-store --load-db", register.as_bytes())
            .ok();
    }
}

/// Appends the paths up to a count and returns them as `nix-store --register-validity` reads them.
fn entries(paths: &mut Vec<String>, count: usize, references: usize) -> String {
    let mut register = String::new();
    for number in paths.len()..count {
        let path = small_name("small", number, "-a-small-path-of-a-usual-name-1.0.3");
        let nar = nar_of(small_text(number).as_bytes());
        let hash = Sha256::digest(&nar)
            .iter()
            .fold(String::new(), |hex, byte| format!("{hex}{byte:02x}"));
        _ = writeln!(register, "{path}\n{hash}\n{}\n", nar.len());
        let references = &paths[paths.len().saturating_sub(references)..];
        _ = writeln!(register, "{}", references.len());
        for reference in references {
            _ = writeln!(register, "{reference}");
        }
        paths.push(path);
    }
    register
}

fn small_text(number: usize) -> String {
    format!("{number}\n")
}

/// The store path of a number, of a kind.
pub fn small_name(kind: &str, number: usize, name: &str) -> String {
    const DIGITS: &[u8; 32] = b"0123456789abcdfghijklmnpqrsvwxyz";
    let hash = Sha256::digest(format!("{kind} {number}"));
    let digits = hash
        .iter()
        .map(|byte| char::from(DIGITS[usize::from(byte % 32)]));
    format!("/nix/store/{}{name}", digits.collect::<String>())
}

/// The NAR of one file that cannot be executed.
fn nar_of(contents: &[u8]) -> Vec<u8> {
    let mut nar = Vec::new();
    let mut text = |bytes: &[u8]| {
        nar.extend((bytes.len() as u64).to_le_bytes());
        nar.extend(bytes);
        nar.resize(nar.len().next_multiple_of(8), 0);
    };
    for word in ["nix-archive-1", "(", "type", "regular", "contents"] {
        text(word.as_bytes());
    }
    text(contents);
    text(b")");
    nar
}

/// Nix reads all of them into memory before it writes the first.
const ENTRIES_AT_ONCE: usize = 100_000;

const REQUESTS: &str = include_str!("../requests.lua");
