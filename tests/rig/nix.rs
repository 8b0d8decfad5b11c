//! Which Nix a machine has, and what a machine does with it.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use super::machine::Machine;
use super::process::Output;

/// A Nix as Debian packages it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nix {
    /// 2.8, from the root of this very machine (bookworm).
    Debian12,
    /// 2.26, unpacked by `tests/nix-roots trixie`.
    Trixie,
    /// 2.34, unpacked by `tests/nix-roots sid`.
    Sid,
}

impl Nix {
    /// The one that this run of the tests is about: `MUSTER_TEST_NIX`, 2.8 by default.
    pub fn under_test() -> Self {
        env::var("MUSTER_TEST_NIX").map_or(Self::Debian12, |version| Self::named(&version))
    }

    /// The one of a version: 2.8, 2.26 or 2.34.
    pub fn named(version: &str) -> Self {
        match version {
            "2.8" => Self::Debian12,
            "2.26" => Self::Trixie,
            "2.34" => Self::Sid,
            other => panic!("Nix {other}: this rig has 2.8, 2.26 and 2.34"),
        }
    }

    pub(super) fn root(self) -> PathBuf {
        let suite = match self {
            Self::Debian12 => return PathBuf::from("/"),
            Self::Trixie => "trixie",
            Self::Sid => "sid",
        };
        let roots =
            env::var_os("MUSTER_NIX_ROOTS").unwrap_or_else(|| "/var/tmp/muster-nix-roots".into());
        let root = Path::new(&roots).join(suite);
        assert!(
            root.join("usr/bin/nix").exists(),
            "no {} yet: run tests/nix-roots {suite}",
            root.display()
        );
        root
    }
}

/// What Nix's configuration starts with on every machine. Nothing is substituted from anywhere, and
/// `/etc/nix/machines` is for Muster alone: a client that finds nothing builds by itself.
pub const CONF: &str = "\
sandbox = false
build-users-group =
substituters =
builders =
trusted-users = root guest
max-jobs = 2
cores = 1
fsync-metadata = false
require-sigs = true
connect-timeout = 5
flake-registry =
extra-experimental-features = nix-command flakes ca-derivations
";

impl Machine {
    /// Builds an attribute of the workload, `args` as for `nix-build`; the output paths.
    #[track_caller]
    pub fn build(&self, attr: &str, args: &str) -> Vec<String> {
        words(
            &self
                .run_for(
                    300.0,
                    &format!("nix-build --no-out-link /lab/workload.nix -A {attr} {args}"),
                )
                .ok(),
        )
    }

    /// Gets a path by whatever way Nix finds, but within a minute.
    pub fn realise(&self, path: &str) -> Output {
        self.run_for(60.0, &format!("nix-store --realise '{path}'"))
    }

    /// Gets an attribute of the workload by whatever way Nix finds, but within a minute.
    pub fn realise_attr(&self, attr: &str, args: &str) -> Output {
        self.run_for(
            60.0,
            &format!("nix-build --no-out-link /lab/workload.nix -A {attr} {args}"),
        )
    }

    /// Builds an attribute of one output.
    #[track_caller]
    pub fn build_one(&self, attr: &str, args: &str) -> String {
        self.build(attr, args).pop().expect("a build has an output")
    }

    /// The derivations of an attribute.
    #[track_caller]
    pub fn instantiate(&self, attr: &str, args: &str) -> Vec<String> {
        words(
            &self
                .run(&format!(
                    "nix-instantiate /lab/workload.nix -A {attr} {args}"
                ))
                .ok(),
        )
    }

    /// Whether this machine's store has a path.
    pub fn valid(&self, path: &str) -> bool {
        self.run(&format!("nix-store --check-validity '{path}'")).rc == 0
    }

    /// A path and all that it refers to, as this machine's store knows it.
    #[track_caller]
    pub fn closure(&self, path: &str) -> Vec<String> {
        words(
            &self
                .run(&format!("nix-store --query --requisites '{path}'"))
                .ok(),
        )
    }

    /// The hash and size of a path's NAR, as this machine makes it from the files.
    #[track_caller]
    pub fn nar_hash(&self, path: &str) -> String {
        self.run(&format!("nix-store --dump '{path}' | sha256sum"))
            .ok()
            .out
    }

    /// The same of several paths, in their order.
    #[track_caller]
    pub fn nar_hashes(&self, paths: &[String]) -> Vec<String> {
        let each = "do nix-store --dump \"$path\" | sha256sum || exit 1; done";
        let line = format!("for path in '{}'; {each}", paths.join("' '"));
        self.run(&line)
            .ok()
            .out
            .lines()
            .map(str::to_owned)
            .collect()
    }

    /// Adds lines to this machine's `nix.conf`.
    pub fn configure(&self, lines: &str) {
        self.write("/etc/nix/nix.conf", &format!("{CONF}{lines}\n"));
    }

    /// Makes a signing key named `name` and lets this machine's Nix sign with it; the public half.
    pub fn signs_as(&self, name: &str) -> String {
        self.run(&format!(
            "nix-store --generate-binary-cache-key {name} /etc/nix/secret /etc/nix/public"
        ))
        .ok();
        self.configure("secret-key-files = /etc/nix/secret");
        self.read("/etc/nix/public").trim().to_owned()
    }

    /// Forgets the store and all that Nix remembers: a client that was never used.
    pub fn fresh_store(&self) {
        let served = self.stop_daemon();
        for entry in fs::read_dir(self.path("nix/"))
            .expect("read /nix")
            .flatten()
        {
            fs::remove_dir_all(entry.path()).expect("remove the store");
        }
        self.forget_lookups();
        if served {
            self.daemon();
        }
    }

    /// Forgets what Nix remembers of substituters, and keeps the store.
    pub fn forget_lookups(&self) {
        self.run("rm -rf /root/.cache/nix").ok();
    }
}

fn words(output: &Output) -> Vec<String> {
    output.out.split_whitespace().map(str::to_owned).collect()
}
