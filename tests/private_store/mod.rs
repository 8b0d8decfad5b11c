//! A store of its own in a temporary folder, and a real `nix-daemon` on it.
//!
//! This machine's `/nix` is not touched. `MUSTER_TEST_NIX` chooses the daemon: 2.8 (default) is the
//! installed one, 2.26 and 2.34 run in the root folders that `tests/nix-roots` makes.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use muster::nix::hash::{NarHash, encode_hex};
use muster::nix::path_info::PathInfo;
use muster::nix::store_path::{StoreDir, StorePath, StorePathHash};
use muster::upstream::Error;
use muster::upstream::connection::{Connection, ConnectionOptions};
use tokio::process::{Child, Command};

/// A private store; removed when dropped.
pub struct PrivateStore {
    /// The root folder that Nix runs in; `/` for the installed one.
    root: PathBuf,
    /// The temporary folder, as seen from outside of the root.
    dir: tempfile::TempDir,
    /// The same as seen from inside.
    inside: PathBuf,
    pub store_dir: StoreDir,
}

/// A daemon on its standard input and output; killed when dropped.
pub struct Daemon {
    pub connection: Connection,
    pub child: Child,
}

impl PrivateStore {
    pub fn new() -> Self {
        let root = root();
        let dir = tempfile::tempdir_in(root.join("tmp")).unwrap();
        let inside = Path::new("/").join(dir.path().strip_prefix(&root).unwrap());
        fs::create_dir(dir.path().join("store")).unwrap();
        let store_dir = StoreDir::new(inside.join("store").to_str().unwrap()).unwrap();
        Self {
            root,
            dir,
            inside,
            store_dir,
        }
    }

    /// Where a file of the store lies for this process.
    pub fn file(&self, path: &StorePath) -> PathBuf {
        self.dir.path().join("store").join(path.as_str())
    }

    /// A command of Nix on this store.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        if self.root != Path::new("/") {
            // Newer Nix wants /proc; the mount lives as long as the command.
            let script = "mount -t proc proc \"$0/proc\" && exec chroot \"$0\" \"$@\"";
            command = Command::new("unshare");
            command.args(["--mount", "sh", "-c", script]);
            command.arg(&self.root).arg(program);
        }
        for (name, folder) in [
            ("NIX_STORE_DIR", "store"),
            ("NIX_STATE_DIR", "state"),
            ("NIX_LOG_DIR", "log"),
            ("NIX_CONF_DIR", "conf"),
            ("HOME", "home"),
        ] {
            command.env(name, self.inside.join(folder));
        }
        let settings = "build-users-group =\nsandbox = false\nfsync-metadata = false\n\
                        extra-experimental-features = nix-command ca-derivations\n";
        command.env("NIX_CONFIG", settings).env_remove("NIX_REMOTE");
        command
    }

    /// Runs a command to its end; returns its output.
    pub async fn run(&self, program: &str, arguments: &[&str], input: &[u8]) -> Vec<u8> {
        let mut command = self.command(program);
        command.args(arguments).kill_on_drop(true);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|e| missing(program, &e));
        let mut stdin = child.stdin.take().unwrap();
        let write = async move {
            let _ = tokio::io::AsyncWriteExt::write_all(&mut stdin, input).await;
        };
        let (output, ()) = tokio::join!(child.wait_with_output(), write);
        let output = output.unwrap();
        assert!(output.status.success(), "{program} {arguments:?}");
        output.stdout
    }

    /// Starts a daemon and opens a connection to it.
    pub async fn daemon(&self) -> Daemon {
        let options = ConnectionOptions {
            store_dir: self.store_dir.clone(),
            ..ConnectionOptions::default()
        };
        self.daemon_with(options).await.unwrap()
    }

    pub async fn daemon_with(&self, options: ConnectionOptions) -> Result<Daemon, Error> {
        let mut command = self.command("nix-daemon");
        command.arg("--stdio").kill_on_drop(true);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command.stderr(Stdio::null());
        let mut child = command
            .spawn()
            .unwrap_or_else(|e| missing("nix-daemon", &e));
        let reader = child.stdout.take().unwrap();
        let writer = child.stdin.take().unwrap();
        let connection = Connection::open(reader, writer, options).await?;
        Ok(Daemon { connection, child })
    }

    /// Registers `count` paths, each one small file, each referring to the eight before it.
    pub async fn fill(&self, count: usize) -> Vec<PathInfo> {
        let mut infos: Vec<PathInfo> = Vec::with_capacity(count);
        for place in 0..count {
            let path = numbered(place);
            let contents = format!("contents of {place}\n");
            fs::write(self.file(&path), &contents).unwrap();
            let nar = nar_of_file(contents.as_bytes());
            let mut references: Vec<_> =
                infos.iter().rev().take(8).map(|i| i.path.clone()).collect();
            references.sort();
            infos.push(PathInfo {
                path,
                nar_hash: NarHash::of(&nar),
                nar_size: nar.len() as u64,
                references,
                deriver: None,
                signatures: vec![],
                ca: None,
            });
        }
        self.register(&infos).await;
        infos
    }

    /// Makes paths valid whose files are there.
    pub async fn register(&self, infos: &[PathInfo]) {
        let mut lines = Vec::new();
        for info in infos {
            let path = self.store_dir.join(&info.path);
            let deriver = info.deriver.as_ref().map(|d| self.store_dir.join(d));
            let deriver = deriver.unwrap_or_default();
            let hash = encode_hex(&info.nar_hash.0);
            let count = info.references.len();
            writeln!(
                lines,
                "{path}\n{hash}\n{}\n{deriver}\n{count}",
                info.nar_size
            )
            .unwrap();
            for reference in &info.references {
                writeln!(lines, "{}", self.store_dir.join(reference)).unwrap();
            }
        }
        let arguments = ["--register-validity", "--hash-given"];
        self.run("nix-store", &arguments, &lines).await;
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

/// The NAR of one file.
pub fn nar_of_file(contents: &[u8]) -> Vec<u8> {
    let mut nar = Vec::new();
    let tree = nix_archive::nar::Node::Regular {
        executable: false,
        contents,
    };
    nix_archive::nar::encode_tree(&mut nar, &tree).unwrap();
    nar
}

fn root() -> PathBuf {
    let suite = match std::env::var("MUSTER_TEST_NIX").as_deref() {
        Err(_) | Ok("2.8") => return "/".into(),
        Ok("2.26") => "trixie",
        Ok("2.34") => "sid",
        Ok(other) => panic!("MUSTER_TEST_NIX={other}: there are 2.8, 2.26 and 2.34"),
    };
    let roots = std::env::var_os("MUSTER_NIX_ROOTS");
    let roots = roots.unwrap_or_else(|| "/var/tmp/muster-nix-roots".into());
    let root = Path::new(&roots).join(suite);
    assert!(
        root.join("usr/bin/nix").exists(),
        "run tests/nix-roots {suite}"
    );
    root
}

fn missing(program: &str, error: &std::io::Error) -> ! {
    panic!("{program} does not run ({error}): install Debian's nix-bin or another Nix")
}
