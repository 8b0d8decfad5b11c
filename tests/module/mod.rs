//! The Nix files of this project, evaluated by a real Nix without a store, without nixpkgs; and its .deb.

#![allow(
    clippy::allow_attributes,
    dead_code,
    unreachable_pub,
    reason = "each suite uses another part of it"
)]

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// A file or folder of the project.
pub fn project(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Evaluates an expression to JSON; `lib`, `units` and `deb` are those of `nixos-module/`, and `input` is
/// what is given.
#[track_caller]
pub fn evaluate(expression: &str, input: &Value) -> Value {
    let folder = tempfile::tempdir().expect("make a folder");
    let input_file = folder.path().join("input.json");
    std::fs::write(&input_file, input.to_string()).expect("write the input");
    let module = project("nixos-module");
    let module = module.display();
    let whole = format!(
        "let lib = import {module}/lib.nix; units = import {module}/units.nix; deb = import {module}/deb.nix; \
         section = name: attrs: {{ inherit name attrs; }}; \
         input = builtins.fromJSON (builtins.readFile {}); in {expression}",
        input_file.display()
    );
    let output = Command::new("nix-instantiate")
        .args([
            "--store", "dummy://", "--eval", "--strict", "--json", "-E", &whole,
        ])
        .output()
        .expect("nix-instantiate starts: install Nix");
    assert!(
        output.status.success(),
        "{expression}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).expect("Nix writes JSON")
}

/// The text in a JSON value.
#[track_caller]
pub fn text(value: &Value) -> &str {
    value
        .as_str()
        .unwrap_or_else(|| panic!("{value} is no text"))
}

/// Builds the .deb of a program by the command that the README names, with this revision.
#[track_caller]
pub fn build_deb(muster: &Path, out: &Path, revision: &str) -> PathBuf {
    let output = Command::new("bash")
        .arg(project("debian/build"))
        .arg(out)
        .env("MUSTER", muster)
        .env("REVISION", revision)
        .output()
        .expect("bash starts");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    said.lines()
        .last()
        .expect("it prints the path")
        .trim()
        .into()
}

/// The text of the server's unit as NixOS would have it, for these programs and credentials.
pub const SERVE: &str = "
  let unit = units.serve input; in
  lib.unitText [ (section \"Unit\" unit.unitConfig) (section \"Service\" unit.serviceConfig) ]";

/// The text of its socket.
pub const SOCKET: &str = "
  let unit = units.socket input; in
  lib.unitText [ (section \"Unit\" unit.unitConfig) (section \"Socket\" unit.socketConfig) ]";
