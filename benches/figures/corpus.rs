//! Data that compresses as what is built does: programs and libraries of this very system, and some headers.
//!
//! `zstd -3` makes a third of it. A store of random bytes, or of one line over and over, would say nothing of
//! what a NAR costs that is compressed.

use std::fs;
use std::io::{Read as _, Write};
use std::path::{Path, PathBuf};

use crate::rig::Machine;

/// Adds a file of so many MiB to a machine's store; its path. The same at every call on one system.
pub fn add(machine: &Machine, mib: u32) -> String {
    let size = u64::from(mib) << 20;
    let headers = size / HEADERS_PART;
    // On disk, unlike most of the machine's root.
    let inside = "/lab/corpus";
    machine.write(inside, "");
    let file = fs::File::create(machine.path(inside)).expect("make a file");
    let mut to = std::io::BufWriter::new(file);
    fill(&mut to, &programs(), size - headers);
    fill(&mut to, &files_below("/usr/include"), headers);
    to.flush().expect("write a file");
    let added = machine.run(&format!("nix-store --add {inside} && rm {inside}"));
    added.ok().out.trim().to_owned()
}

/// What is run, and what is linked to it.
fn programs() -> Vec<PathBuf> {
    let libraries = files_below("/usr/lib").into_iter().filter(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.ends_with(".so") || name.contains(".so.")
    });
    files_below("/usr/bin")
        .into_iter()
        .chain(libraries)
        .collect()
}

/// All files that lie there, in the order of their names.
fn files_below(dir: impl AsRef<Path>) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    let mut entries: Vec<_> = entries.flatten().collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    let mut files = Vec::new();
    for entry in entries {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => files.extend(files_below(entry.path())),
            Ok(kind) if kind.is_file() => files.push(entry.path()),
            _ => {}
        }
    }
    files
}

/// Writes so many bytes: the files one after the other, and all of them again where they are too few.
fn fill(to: &mut impl Write, files: &[PathBuf], size: u64) {
    let mut left = size;
    while left > 0 {
        let before = left;
        for path in files {
            let mut file = fs::File::open(path)
                .expect("open a file of the system")
                .take(left.min(SLICE));
            left -= std::io::copy(&mut file, to).expect("copy a file of the system");
        }
        let once = before - left;
        assert!(
            left == 0 || once >= REPEATED_AFTER,
            "{once} bytes are too few to repeat"
        );
    }
}

/// Of how many bytes one is a header's.
const HEADERS_PART: u64 = 5;

/// Of one file at most: no single one decides.
const SLICE: u64 = 16 << 20;

/// Farther than any of those who compress it looks back, which is 32 MiB: what comes again helps nobody.
const REPEATED_AFTER: u64 = 64 << 20;
