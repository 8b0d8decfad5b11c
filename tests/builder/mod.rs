//! A builder on this machine: a private store, real `nix-daemon`, real `sshd` on a loopback port.
//!
//! Needs `nix-daemon`, `nix-store`, `sshd`, `ssh` and `ssh-keygen`, and fails without them. Logs in as
//! whoever runs the tests. `MUSTER_TEST_NIX` chooses an unpacked newer Nix for the builder, as in the
//! end-to-end tests. Everything is below one temporary folder, and everything ends when dropped.

#![allow(
    dead_code,
    clippy::allow_attributes,
    reason = "each test binary uses its own part, and one uses all"
)]

pub mod stores;

use std::collections::BTreeMap;
use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use muster::nix::store_path::{StoreDir, StorePath};
use muster::upstream::build_log::{BuildLogs, LogOptions};
use muster::upstream::daemon::DaemonSocket;
use muster::upstream::local::database::Place;
use muster::upstream::local::{LocalOptions, LocalUpstream};
use muster::upstream::runtime_dir::RuntimeDir;
use muster::upstream::ssh::{Ssh, SshOptions, SshTarget};
use muster::upstream::worker::{WorkerOptions, WorkerSetup, WorkerUpstream};
use muster::upstream::{Link, Upstream};

/// A private store and the keys to log in to it.
pub struct Builder {
    folder: PathBuf,
    _temporary: Option<tempfile::TempDir>,
    pub store_dir: StoreDir,
}

/// A running sshd; it and its sessions end when dropped.
pub struct Sshd {
    pub port: u16,
    child: Child,
    log: PathBuf,
}

/// A running nix-daemon on a Unix socket; ends when dropped.
pub struct Daemon {
    pub socket: PathBuf,
    child: Child,
}

impl Builder {
    pub fn new() -> Self {
        let temporary = tempfile::tempdir().unwrap();
        let folder = temporary.path().to_owned();
        let path = |name: &str| folder.join(name);
        for name in ["home", "conf", "bin", "store"] {
            fs::create_dir(path(name)).unwrap();
        }
        let conf = "experimental-features = nix-command ca-derivations\nsandbox = false\n\
             build-users-group =\nsubstituters =\nbuilders =\n";
        fs::write(path("conf/nix.conf"), conf).unwrap();
        for (key, passphrase) in [
            ("host", ""),
            ("other-host", ""),
            ("user", ""),
            ("locked", "secret"),
        ] {
            let made = Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", passphrase, "-C", key, "-f"])
                .arg(path(key))
                .status();
            assert!(made.expect("ssh-keygen is needed").success());
        }
        let user = fs::read_to_string(path("user.pub")).unwrap();
        fs::write(path("authorized_keys"), user).unwrap();
        let store_dir = StoreDir::new(path("store").to_str().unwrap()).unwrap();
        let builder = Self {
            folder,
            _temporary: Some(temporary),
            store_dir,
        };
        builder.write_programs();
        builder.nix_store(&["--version"]);
        builder
    }

    /// Takes a builder that another process made.
    pub fn at(folder: PathBuf) -> Self {
        let store_dir = StoreDir::new(folder.join("store").to_str().unwrap()).unwrap();
        Self {
            folder,
            _temporary: None,
            store_dir,
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Adds a file of this content under this name.
    pub fn add(&self, name: &str, content: &[u8]) -> StorePath {
        self.add_all(&[(name, content)]).remove(0)
    }

    /// Adds many files with one command.
    pub fn add_all(&self, files: &[(&str, &[u8])]) -> Vec<StorePath> {
        let source = tempfile::tempdir_in(&self.folder).unwrap();
        let mut arguments = vec!["--add".to_owned()];
        for (name, content) in files {
            let file = source.path().join(name);
            fs::write(&file, content).unwrap();
            arguments.push(file.to_str().unwrap().to_owned());
        }
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        let output = self.nix_store(&arguments);
        output
            .lines()
            .map(|line| self.store_dir.parse(line).unwrap())
            .collect()
    }

    /// Builds a derivation that says `words` to its log; returns its path and its output's.
    pub fn build(&self, name: &str, words: &str) -> (StorePath, StorePath) {
        let file = self.path(&format!("{name}.nix"));
        let text = format!(
            "derivation {{ name = \"{name}\"; system = builtins.currentSystem; \
             builder = \"/bin/sh\"; args = [ \"-c\" \"echo {words}; echo {name} > $out\" ]; }}"
        );
        fs::write(&file, text).unwrap();
        let derivation = self.instantiate(file.to_str().unwrap());
        let output = self.realise(&derivation);
        let parse = |text: &str| self.store_dir.parse(text.trim()).unwrap();
        (parse(&derivation), parse(&output))
    }

    /// Evaluates a file; returns the derivation's path.
    pub fn instantiate(&self, file: &str) -> String {
        self.run("nix-instantiate", &[file]).trim().to_owned()
    }

    /// Builds a derivation; returns its output's path.
    pub fn realise(&self, derivation: &str) -> String {
        let hook = self.path("bin/hook");
        let mut arguments = vec!["--realise", derivation];
        // A Nix that runs by way of its loader cannot call itself as its build hook, and 2.26 takes
        // another one from the command line only.
        if std::env::var_os("MUSTER_TEST_NIX").is_some() {
            arguments.extend(["--option", "build-hook", hook.to_str().unwrap()]);
        }
        self.nix_store(&arguments)
    }

    /// Runs the garbage collector.
    pub fn collect_garbage(&self) {
        self.nix_store(&["--gc"]);
    }

    pub fn nix_store(&self, arguments: &[&str]) -> String {
        self.run("nix-store", arguments)
    }

    /// Writes the whole store and these build logs into a folder, as a binary cache; its compression is Nix's word.
    pub fn write_cache(&self, folder: &Path, compression: &str, logs: &[&StorePath]) {
        let to = format!("file://{}?compression={compression}", folder.display());
        let nix = |arguments: &[&str]| {
            let mut command = Command::new("/usr/bin/nix");
            command.args(["--offline", "--extra-experimental-features", "nix-command"]);
            let output = command.args(arguments).envs(self.environment()).output();
            let output = output.expect("nix is needed");
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "nix {arguments:?}: {stderr}");
        };
        nix(&["copy", "--no-check-sigs", "--all", "--to", &to]);
        for derivation in logs {
            let path = self.store_dir.join(derivation);
            nix(&["store", "copy-log", "--to", &to, &path]);
        }
    }

    pub fn run(&self, program: &str, arguments: &[&str]) -> String {
        let mut command = Command::new(self.path("bin").join(program));
        let output = command.args(arguments).envs(self.environment()).output();
        let output = output.unwrap_or_else(|e| panic!("{program}: {e}"));
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {arguments:?}: {stderr}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Makes a second database for the same store directory, as of another machine, and starts its daemon.
    ///
    /// It knows these paths alone, by the NAR hash in hex and the size that are given; their files are the
    /// first one's.
    pub fn second_daemon(&self, name: &str, paths: &[(&StorePath, &str, u64)]) -> Daemon {
        let state = self.path(&format!("{name}-state"));
        let mut lines = String::new();
        for (path, hash, size) in paths {
            let path = self.store_dir.join(path);
            lines.push_str(&format!("{path}\n{hash}\n{size}\n\n0\n"));
        }
        let mut environment = self.environment();
        environment.insert("NIX_STATE_DIR", state.to_str().unwrap().to_owned());
        let mut register = Command::new(self.path("bin/nix-store"))
            .args(["--register-validity", "--hash-given"])
            .envs(&environment)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = register.stdin.take().unwrap();
        std::io::Write::write_all(&mut stdin, lines.as_bytes()).unwrap();
        drop(stdin);
        assert!(register.wait().unwrap().success());
        self.daemon_with(self.path(&format!("{name}-socket")), &environment)
    }

    pub fn environment(&self) -> BTreeMap<&'static str, String> {
        let path = |name: &str| self.path(name).to_str().unwrap().to_owned();
        BTreeMap::from([
            ("NIX_STORE_DIR", path("store")),
            ("NIX_STATE_DIR", path("state")),
            ("NIX_LOG_DIR", path("log")),
            ("NIX_CONF_DIR", path("conf")),
            ("NIX_REMOTE", "local".to_owned()),
            ("HOME", path("home")),
            ("XDG_CACHE_HOME", path("home")),
            ("PATH", format!("{}:/usr/bin:/bin", path("bin"))),
        ])
    }

    /// Writes `bin/nix-daemon` and the like, which run the Nix that is chosen.
    fn write_programs(&self) {
        self.write_program("hook", "echo '# decline-permanently' >&2");
        for name in ["nix", "nix-daemon", "nix-store", "nix-instantiate"] {
            let run = match std::env::var("MUSTER_TEST_NIX").as_deref() {
                Err(_) | Ok("2.8") => format!("exec /usr/bin/{name} \"$@\""),
                Ok(version) => {
                    let suite = if version == "2.26" { "trixie" } else { "sid" };
                    let roots = std::env::var("MUSTER_NIX_ROOTS");
                    let roots = roots.unwrap_or_else(|_| "/var/tmp/muster-nix-roots".into());
                    let root = format!("{roots}/{suite}");
                    let multiarch = format!("{}-linux-gnu", std::env::consts::ARCH);
                    format!(
                        "set -- --argv0 {name} {root}/usr/bin/nix \"$@\"\n\
                         for ld in {root}/lib*/ld-linux-*; do\n\
                         exec \"$ld\" --library-path {root}/usr/lib/{multiarch} \"$@\"\ndone"
                    )
                }
            };
            self.write_program(name, &run);
        }
    }

    /// Writes a shell script `bin/<name>`.
    pub fn write_program(&self, name: &str, script: &str) -> PathBuf {
        let file = self.path("bin").join(name);
        fs::write(&file, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        file
    }

    /// Starts sshd; `extra` lines go to its configuration.
    pub fn sshd(&self, extra: &str) -> Sshd {
        self.sshd_on(free_port(), extra)
    }

    pub fn sshd_on(&self, port: u16, extra: &str) -> Sshd {
        // sshd insists on this folder when it runs as root.
        let _ = fs::create_dir_all("/run/sshd");
        let file = self.path(&format!("sshd-{port}"));
        let log = self.path(&format!("sshd-{port}.log"));
        let set: Vec<_> = self
            .environment()
            .iter()
            .map(|(k, v)| format!("{k}={v}"))
            .collect();
        let text = format!(
            "Port {port}\nListenAddress 127.0.0.1\nHostKey {host}\nPidFile none\nUsePAM no\n\
             StrictModes no\nAuthorizedKeysFile {keys}\nPermitRootLogin yes\nSetEnv {set}\n\
             PasswordAuthentication no\nKbdInteractiveAuthentication no\n{extra}\n",
            host = self.path("host").display(),
            keys = self.path("authorized_keys").display(),
            set = set.join(" "),
        );
        fs::write(&file, text).unwrap();
        let mut command = Command::new("/usr/sbin/sshd");
        command.arg("-D").arg("-f").arg(&file).arg("-E").arg(&log);
        let child = command
            .stdin(Stdio::null())
            .spawn()
            .expect("sshd is needed");
        let sshd = Sshd { port, child, log };
        sshd.wait();
        sshd
    }

    /// Starts a nix-daemon on a socket of its own.
    pub fn daemon(&self) -> Daemon {
        self.daemon_with(self.path("socket"), &self.environment())
    }

    /// Starts the daemon of another store with the same store directory, which lies below a root of its own.
    pub fn daemon_at(&self, root: &Path) -> Daemon {
        let mut environment = self.environment();
        environment.insert("NIX_REMOTE", format!("local?root={}", root.display()));
        self.daemon_with(root.join("socket"), &environment)
    }

    fn daemon_with(&self, socket: PathBuf, environment: &BTreeMap<&str, String>) -> Daemon {
        let mut command = Command::new(self.path("bin").join("nix-daemon"));
        command
            .envs(environment)
            .env("NIX_DAEMON_SOCKET_PATH", &socket);
        let child = command
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let daemon = Daemon { socket, child };
        wait_for("nix-daemon", || daemon.listens());
        daemon
    }

    /// The public host key, `TYPE KEY COMMENT`.
    pub fn host_key(&self, name: &str) -> String {
        let text = fs::read_to_string(self.path(&format!("{name}.pub"))).unwrap();
        text.trim().to_owned()
    }

    /// A target that logs in with the key that is let in and pins the right host key.
    pub fn target(&self, port: u16) -> SshTarget {
        SshTarget {
            user: None,
            host: "127.0.0.1".into(),
            port: Some(port),
            key_file: Some(self.path("user")),
            host_key: Some(self.host_key("host")),
            compress: false,
            remote_program: vec![],
            remote_store: None,
            // The tests must not depend on the account's own configuration and agent.
            options: vec!["-F".into(), "none".into(), "-oIdentityAgent=none".into()],
        }
    }

    pub fn ssh(&self, target: SshTarget, connect_timeout: Duration) -> Ssh {
        let runtime_dir = Arc::new(RuntimeDir::create(&self.folder).unwrap());
        let options = SshOptions {
            connect_timeout,
            ..SshOptions::default()
        };
        Ssh::new(target, options, runtime_dir).unwrap()
    }

    /// Starts an upstream over ssh.
    pub fn over_ssh(&self, target: SshTarget, mut options: WorkerOptions) -> WorkerUpstream {
        let connect_timeout = options.standing.session.connect_timeout;
        options.pool.session.connect_timeout = connect_timeout;
        options.roots.session.connect_timeout = connect_timeout;
        let ssh = Arc::new(self.ssh(target, connect_timeout));
        let logs = BuildLogs::Command {
            nix_store: ssh.nix_store(),
            dial: ssh.clone(),
        };
        let setup = WorkerSetup {
            name: "ssh-ng://builder".into(),
            dial: ssh,
            logs,
            store_dir: self.store_dir.clone(),
        };
        WorkerUpstream::start(setup, options)
    }

    /// Where the store lies, for who reads it in place.
    pub fn place(&self) -> Place {
        Place::new(self.path("state"), self.store_dir.clone())
    }

    /// Starts an upstream that reads the store in place, with a daemon's socket beside it.
    pub fn in_place(&self, socket: &Path, options: LocalOptions) -> LocalUpstream {
        self.in_place_at(self.place(), socket, options)
    }

    /// Starts one that looks for the store in this place.
    pub fn in_place_at(
        &self,
        place: Place,
        socket: &Path,
        mut options: LocalOptions,
    ) -> LocalUpstream {
        options.worker = quick();
        let setup = WorkerSetup {
            name: "local".into(),
            dial: Arc::new(DaemonSocket::new(socket)),
            logs: BuildLogs::Directory(self.path("log")),
            store_dir: self.store_dir.clone(),
        };
        LocalUpstream::start(place, setup, options).unwrap()
    }

    /// Starts an upstream over the socket of a daemon.
    pub fn over_socket(&self, daemon: &Daemon, options: WorkerOptions) -> WorkerUpstream {
        let setup = WorkerSetup {
            name: "daemon".into(),
            dial: Arc::new(DaemonSocket::new(&daemon.socket)),
            logs: BuildLogs::Directory(self.path("log")),
            store_dir: self.store_dir.clone(),
        };
        WorkerUpstream::start(setup, options)
    }
}

impl Sshd {
    fn wait(&self) {
        wait_for("sshd", || {
            TcpStream::connect(("127.0.0.1", self.port)).is_ok()
        });
    }

    /// The processes that carry connections: children of the listening one.
    pub fn sessions(&self) -> Vec<i32> {
        children(self.child.id())
    }

    /// Kills what carries connections; the listener goes on.
    pub fn kill_sessions(&self) {
        for pid in self.sessions() {
            signal(pid, rustix::process::Signal::KILL);
        }
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        self.kill_sessions();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Daemon {
    /// Whether it can be connected to; the file of its socket is there a little earlier.
    fn listens(&self) -> bool {
        let sockets = fs::read_to_string("/proc/net/unix").unwrap();
        let socket = self.socket.to_str().unwrap();
        let listening = |line: &str| {
            line.split_whitespace().nth(3) == Some("00010000") && line.ends_with(socket)
        };
        sockets.lines().any(listening)
    }

    /// The processes that carry connections.
    pub fn sessions(&self) -> Vec<i32> {
        children(self.child.id())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        for pid in self.sessions() {
            signal(pid, rustix::process::Signal::KILL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn signal(pid: i32, signal: rustix::process::Signal) {
    if let Some(pid) = rustix::process::Pid::from_raw(pid) {
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// The children of a process.
pub fn children(parent: u32) -> Vec<i32> {
    let all = fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let pid: i32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (_, rest) = stat.rsplit_once(") ")?;
        let of: u32 = rest.split(' ').nth(1)?.parse().ok()?;
        (of == parent).then_some(pid)
    });
    all.collect()
}

pub fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    listener.local_addr().unwrap().port()
}

/// Waits at most 10 s for something on this machine.
pub fn wait_for(what: &str, mut ready: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !ready() {
        assert!(begun.elapsed().as_secs() < 10, "{what} does not come up");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Waits until the link is no longer connecting.
pub async fn settled(upstream: &dyn Upstream) -> Link {
    let mut link = upstream.link();
    let settled = link.wait_for(|l| !matches!(l, Link::Connecting { .. }));
    let settled = tokio::time::timeout(Duration::from_secs(20), settled).await;
    settled.expect("the link settles").unwrap().clone()
}

/// Waits until the link is up.
pub async fn up(upstream: &dyn Upstream) {
    let mut link = upstream.link();
    let up = link.wait_for(|l| matches!(l, Link::Up { .. }));
    let up = tokio::time::timeout(Duration::from_secs(20), up).await;
    up.expect("the link comes up").unwrap();
}

/// Bounds that let tests of failures be quick.
pub fn quick() -> WorkerOptions {
    let mut options = WorkerOptions::default();
    options.standing.session.connect_timeout = Duration::from_secs(4);
    options.logs = LogOptions {
        time: Duration::from_secs(20),
        ..options.logs
    };
    options
}

/// The NAR of a regular file.
pub fn nar_of(content: &[u8]) -> Vec<u8> {
    let mut nar = vec![];
    let mut text = |bytes: &[u8]| {
        nar.extend((bytes.len() as u64).to_le_bytes());
        nar.extend(bytes);
        nar.resize(nar.len().next_multiple_of(8), 0);
    };
    for word in ["nix-archive-1", "(", "type", "regular", "contents"] {
        text(word.as_bytes());
    }
    text(content);
    text(b")");
    nar
}

pub fn read_dir_len(path: &Path) -> usize {
    fs::read_dir(path).map_or(0, Iterator::count)
}
