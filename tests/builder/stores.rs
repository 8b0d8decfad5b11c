//! Further stores of a builder, each with its own root, database and unsigned paths.
//!
//! They have the builder's store directory, so that one command can be about all of them. Their paths are
//! in the database alone: for questions and signatures no file is needed.

use std::fs;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};

use muster::nix::hash::{NarHash, encode_hex};
use muster::nix::store_path::{StorePath, StorePathHash};

use super::{Builder, Daemon, children, wait_for};

/// A store below a root of its own.
pub struct RootedStore<'a> {
    builder: &'a Builder,
    root: PathBuf,
}

impl Builder {
    /// Makes a store with this many unsigned paths, numbered from 0.
    pub fn rooted_store(&self, name: &str, paths: usize) -> RootedStore<'_> {
        let root = self.path(name);
        fs::create_dir(&root).unwrap();
        let store = RootedStore {
            builder: self,
            root,
        };
        store.register(paths);
        store
    }
}

impl RootedStore<'_> {
    /// The store as Nix names it.
    pub fn uri(&self) -> String {
        format!("local?root={}", self.root.display())
    }

    /// Finds the store's database.
    pub fn database(&self) -> PathBuf {
        let mut find = Command::new("find");
        let found = find.arg(&self.root).args(["-name", "db.sqlite"]).output();
        let found = String::from_utf8(found.unwrap().stdout).unwrap();
        PathBuf::from(found.lines().next().expect("a store has a database"))
    }

    /// Copies the store with its database; no process may use it.
    pub fn copy(&self) -> Self {
        static COPIES: AtomicU64 = AtomicU64::new(0);
        let number = COPIES.fetch_add(1, Ordering::Relaxed);
        let root = self.builder.path(&format!("copy-{number}"));
        let mut copy = Command::new("cp");
        let copied = copy.arg("-a").arg(&self.root).arg(&root).status();
        assert!(copied.unwrap().success());
        Self {
            builder: self.builder,
            root,
        }
    }

    /// A command of Nix on this store.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.builder.path("bin").join(program));
        command
            .envs(self.builder.environment())
            .env("NIX_REMOTE", self.uri());
        command
    }

    /// Starts a nix-daemon on a socket of its own, with further settings.
    pub fn daemon(&self, settings: &str) -> Daemon {
        let socket = self.root.join("socket");
        let mut command = self.command("nix-daemon");
        command
            .env("NIX_DAEMON_SOCKET_PATH", &socket)
            .env("NIX_CONFIG", settings);
        let child = command.stdin(Stdio::null()).stderr(Stdio::null()).spawn();
        let child = child.expect("nix-daemon is needed");
        let daemon = Daemon { socket, child };
        wait_for("nix-daemon", || daemon.listens());
        assert!(children(daemon.child.id()).is_empty());
        daemon
    }

    /// Adds paths without content address or signature, each referring to the three before it.
    fn register(&self, paths: usize) {
        let store_dir = &self.builder.store_dir;
        let mut lines = Vec::new();
        for place in 0..paths {
            let path = store_dir.join(&numbered(place));
            let hash = encode_hex(&NarHash::of(path.as_bytes()).0);
            let references = place.saturating_sub(3)..place;
            writeln!(lines, "{path}\n{hash}\n120\n\n{}", references.len()).unwrap();
            for reference in references {
                writeln!(lines, "{}", store_dir.join(&numbered(reference))).unwrap();
            }
        }
        let file = self.root.join("registration");
        fs::write(&file, lines).unwrap();
        let mut command = self.command("nix-store");
        command
            .arg("--load-db")
            .stdin(fs::File::open(file).unwrap());
        assert!(command.status().unwrap().success());
    }

    /// What `nix store verify` says of the whole store: whether all is signed, and its words.
    pub fn verify(&self, public_key: &str) -> (bool, String) {
        let mut command = self.command("nix");
        command.args([
            "store",
            "verify",
            "--all",
            "--no-contents",
            "--sigs-needed",
            "1",
        ]);
        command.args(["--option", "substituters", ""]);
        command.args(["--trusted-public-keys", public_key]);
        let output = command.output().unwrap();
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.success(), words)
    }
}

/// A store path made from a number.
pub fn numbered(place: usize) -> StorePath {
    let mut hash = [0x5a; 20];
    hash[..8].copy_from_slice(&(place as u64).to_be_bytes());
    format!("{}-path-{place}", StorePathHash(hash))
        .parse()
        .unwrap()
}
