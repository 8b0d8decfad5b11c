//! The floors of the house, checked: imports point down only. The tables below are the rule.
//!
//! A module may name its own floor's folder and any floor below; siblings on one floor do not name each
//! other, except at the top, where wiring is done. Paths are read from the text of `src/`: every `crate::x`,
//! `muster::x` and `super::super::x` outside of comments counts, in tests too.

use std::fs;
use std::path::{Path, PathBuf};

/// What stands on which floor.
const FLOORS: [(&str, u8); 11] = [
    ("main", 7),
    ("app", 7),
    ("cli", 7),
    ("config", 6),
    ("server", 5),
    ("substituter", 4),
    ("cache", 3),
    ("upstream", 3),
    ("codec", 1),
    ("metrics", 1),
    ("nix", 0),
];

/// The floor whose rooms may name each other.
const TOP: u8 = 7;

/// What a floor does without, tests aside.
const WITHOUT: [(&str, &[&str]); 2] = [
    (
        "nix",
        &[
            "tokio::",
            "std::fs",
            "std::net",
            "std::process",
            "async fn",
            "Instant::now",
            "SystemTime::now",
        ],
    ),
    ("codec", &["std::fs", "std::net", "tokio::fs", "tokio::net"]),
];

#[test]
fn imports_point_down() {
    let mut wrong = Vec::new();
    for file in sources() {
        let text = code(&file);
        let here = room(&file);
        let Some(from) = floor(&here) else {
            assert_eq!(
                here,
                "lib",
                "{} stands on no floor: add it to the table",
                file.display()
            );
            continue;
        };
        for there in named(&text) {
            let Some(to) = floor(&there) else {
                wrong.push(format!("{}: {there} is not on any floor", file.display()));
                continue;
            };
            if there != here && to >= from && !(to == TOP && from == TOP) {
                wrong.push(format!(
                    "{}: {here} (floor {from}) names {there} (floor {to})",
                    file.display()
                ));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "imports point down only:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn the_low_floors_do_without() {
    let mut wrong = Vec::new();
    for file in sources()
        .into_iter()
        .filter(|file| !file.ends_with("tests.rs"))
    {
        let text = code(&file);
        let text = text.split("#[cfg(test)]").next().unwrap_or_default();
        let banned = WITHOUT
            .iter()
            .filter(|(name, _)| *name == room(&file))
            .flat_map(|(_, words)| *words);
        for word in banned.filter(|word| text.contains(**word)) {
            wrong.push(format!("{}: {word}", file.display()));
        }
    }
    assert!(
        wrong.is_empty(),
        "the pure floors stay pure:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn names_are_found_in_every_form() {
    let text = "use crate::nix::hash; use crate::{cache::memory, codec, upstream::{ssh, local}};\n\
                fn f() -> super::super::server::Route { muster::config::read() } // crate::app\n\
                pub(in crate::cli) struct X; my_crate::metrics(); pub(crate) fn g() {}";
    let file = tempfile::NamedTempFile::new().expect("make a file");
    fs::write(file.path(), text).expect("write a file");
    assert_eq!(
        named(&code(file.path())),
        [
            "nix", "cache", "codec", "upstream", "server", "config", "cli"
        ]
    );
}

fn floor(name: &str) -> Option<u8> {
    FLOORS
        .iter()
        .find(|(n, _)| *n == name)
        .map(|(_, floor)| *floor)
}

/// The first part of a file's path below `src/`, which names its module.
fn room(file: &Path) -> String {
    let below = file
        .strip_prefix(src())
        .expect("a source file is below src/");
    let first = below.iter().next().expect("a file has a name");
    first.to_string_lossy().trim_end_matches(".rs").to_owned()
}

/// A file's text without its line comments.
fn code(file: &Path) -> String {
    let text = fs::read_to_string(file).expect("read a source file");
    let kept = text
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default());
    kept.collect::<Vec<_>>().join("\n")
}

/// The top modules of this crate that a text names, in their order; groups in braces are looked into.
fn named(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for root in ["crate::", "muster::", "super::super::"] {
        for (at, _) in text.match_indices(root) {
            let before = text.get(..at).and_then(|t| t.chars().next_back());
            if !before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
                let rest = text.get(at + root.len()..).unwrap_or_default();
                // Two steps up from a test module is its own folder, where other names are at home.
                let certain = |name: &String| root != "super::super::" || floor(name).is_some();
                let names = first_names(rest).into_iter().filter(certain);
                found.extend(names.map(|name| (at, name)));
            }
        }
    }
    found.sort_by_key(|(at, _)| *at);
    found.into_iter().map(|(_, name)| name).collect()
}

/// `a::b` gives a; `{a::b, c, d::{e, f}}` gives a, c and d.
fn first_names(path: &str) -> Vec<String> {
    let word = |t: &str| {
        t.chars()
            .take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect::<String>()
    };
    let Some(group) = path.strip_prefix('{') else {
        return vec![word(path)];
    };
    let (mut depth, mut names, mut expected) = (0, Vec::new(), true);
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => expected = true,
            c if expected && !c.is_whitespace() => {
                names.push(word(group.get(at..).unwrap_or_default()));
                expected = false;
            }
            _ => {}
        }
    }
    names
}

fn src() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

fn sources() -> Vec<PathBuf> {
    let mut folders = vec![src()];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)
            .expect("read a folder of src/")
            .flatten()
        {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    files
}
