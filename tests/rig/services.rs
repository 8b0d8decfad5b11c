//! A builder's services, and every way in which they fail.
//!
//! | state | what others see |
//! |---|---|
//! | [`Machine::dead`] | connections refused, those that stood are gone |
//! | [`Machine::hang`] | TCP accepted, never a byte |
//! | [`Machine::freeze`] | nothing answers any more, established connections stay |
//! | [`Machine::blackhole`] | packets vanish without a word |
//! | [`Machine::stutter`] | alive, but most of the time not running |
//! | [`Machine::behind`] | ssh over a slow, thin or breaking line |

use rustix::process::Signal;

use super::eventually;
use super::helper;
use super::machine::{self, Machine};
use super::process::Process;

/// What runs on a machine.
#[derive(Debug, Default)]
pub struct Services {
    sshd: Option<Process>,
    daemon: Option<Process>,
    hang: Option<Process>,
    line: Option<Process>,
    /// The line that another service of this machine goes over.
    other_line: Option<Process>,
    stutter: Option<Process>,
    /// The line that ssh goes over, kept for [`Machine::heal`]'s sshd.
    over: Option<Line>,
    sshd_config: String,
}

impl Services {
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}

/// A line between a builder and all others, for ssh alone.
#[derive(Debug, Clone, Copy, Default)]
pub struct Line {
    /// Each way.
    pub delay_ms: u64,
    /// Bytes that the builder may send before the line breaks, over all connections; 0 for no end.
    pub cut_after_bytes: u64,
    /// Each way, over all connections; 0 for no limit.
    pub bytes_per_second: u64,
}

impl Machine {
    /// Starts sshd.
    pub fn sshd(&self) -> &Self {
        let mut services = self.services.lock().expect("no panic under this lock");
        let port = if services.over.is_some() { 2222 } else { 22 };
        let config = format!("Port {port}\n{SSHD_CONFIG}{}\n", services.sshd_config);
        self.write("/etc/ssh/lab_sshd_config", &config);
        services.sshd = None;
        services.sshd =
            Some(self.spawn("sshd", "/usr/sbin/sshd -D -e -f /etc/ssh/lab_sshd_config"));
        self.await_port(port);
        if let Some(line) = services.over {
            let relay = format!("relay 0.0.0.0:22 127.0.0.1:2222 {}", line.words());
            services.line = None;
            services.line = Some(helper::start(self, "line", &relay));
        }
        drop(services);
        self
    }

    /// What sshd says of its clients, for the messages of tests.
    pub fn sshd_log(&self) -> String {
        let services = self.services.lock().expect("no panic under this lock");
        services.sshd.as_ref().map(Process::err).unwrap_or_default()
    }

    /// Starts sshd with more lines in its configuration, such as `ForceCommand`.
    pub fn sshd_with(&self, lines: &str) -> &Self {
        self.services
            .lock()
            .expect("no panic under this lock")
            .sshd_config = lines.to_owned();
        self.stop_sshd();
        self.sshd()
    }

    /// Starts nix-daemon.
    pub fn daemon(&self) -> &Self {
        let daemon = self.spawn("nix-daemon", "nix-daemon");
        let socket = "/nix/var/nix/daemon-socket/socket";
        assert!(
            eventually(10.0, || self.listens_on(socket)),
            "{}: nix-daemon: {}",
            self.name,
            daemon.err()
        );
        self.services
            .lock()
            .expect("no panic under this lock")
            .daemon = Some(daemon);
        self
    }

    /// Stops nix-daemon; true if it ran.
    pub fn stop_daemon(&self) -> bool {
        let daemon = self
            .services
            .lock()
            .expect("no panic under this lock")
            .daemon
            .take();
        let ran = daemon.is_some();
        drop(daemon);
        self.kill("nix-daemon");
        ran
    }

    /// Ends sshd with all its sessions: connections are refused from now on.
    pub fn dead(&self) {
        self.stop_sshd();
        let mut services = self.services.lock().expect("no panic under this lock");
        services.hang = None;
        services.line = None;
    }

    /// Accepts connections and never answers.
    pub fn hang(&self) {
        self.dead();
        let hang = helper::start(self, "hang", "hang 0.0.0.0:22");
        self.services.lock().expect("no panic under this lock").hang = Some(hang);
    }

    /// Stops every process where it is: connections stand, and nothing answers.
    pub fn freeze(&self) {
        self.signal("", Signal::STOP);
    }

    /// Lets the processes run on.
    pub fn thaw(&self) {
        self.signal("", Signal::CONT);
    }

    /// Lets the machine run for `running_ms`, then freezes it for `frozen_ms`, and so on, as one with far
    /// too much work seems from outside.
    pub fn stutter(&self, running_ms: u64, frozen_ms: u64) {
        let stutter = helper::start(
            self,
            "stutter",
            &format!("stutter {running_ms} {frozen_ms}"),
        );
        self.services
            .lock()
            .expect("no panic under this lock")
            .stutter = Some(stutter);
    }

    /// Lets every packet that this machine sends vanish, without an error to anybody, or no longer.
    pub fn blackhole(&self, on: bool) {
        // More specific than the route of the interface, so they win and leave that one alone.
        let verb = if on { "add" } else { "del" };
        self.run_net(&format!(
            "ip route {verb} blackhole 10.77.0.0/25; ip route {verb} blackhole 10.77.0.128/25"
        ));
    }

    /// Puts ssh behind a line, from now on and for connections to come; the sessions that stand end.
    pub fn behind(&self, line: Line) {
        self.dead();
        self.services.lock().expect("no panic under this lock").over = Some(line);
        self.sshd();
    }

    /// Puts what listens on port `inner` behind a line, to be reached on port `outer`.
    pub fn reach_over(&self, outer: u16, inner: u16, line: Line) {
        let relay = format!("relay 0.0.0.0:{outer} 127.0.0.1:{inner} {}", line.words());
        let mut services = self.services.lock().expect("no panic under this lock");
        // One on the same port has to go first.
        services.other_line = None;
        services.other_line = Some(helper::start(self, &format!("line-{outer}"), &relay));
    }

    /// Gives the machine another host key than the one that all know.
    pub fn change_host_key(&self) {
        self.stop_sshd();
        machine::host_key(&self.dir().join("files/etc/ssh/lab_host_key"));
        for file in ["lab_host_key", "lab_host_key.pub"] {
            let text = std::fs::read_to_string(self.dir().join("files/etc/ssh").join(file));
            self.write(&format!("/etc/ssh/{file}"), &text.expect("read a host key"));
        }
        self.sshd();
    }

    /// Ends every failure and has sshd running on a plain line.
    pub fn heal(&self) {
        let mut services = self.services.lock().expect("no panic under this lock");
        let standing = services.sshd.is_some() && services.over.is_none();
        services.hang = None;
        services.line = None;
        services.stutter = None;
        services.over = None;
        drop(services);
        self.thaw();
        if !standing {
            self.stop_sshd();
            self.sshd();
        }
    }

    /// Waits until something listens on a port of this machine.
    pub fn await_port(&self, port: u16) {
        assert!(
            eventually(10.0, || self.listens(port)),
            "{}: nothing listens on port {port}",
            self.name
        );
    }

    fn stop_sshd(&self) {
        let sshd = self
            .services
            .lock()
            .expect("no panic under this lock")
            .sshd
            .take();
        drop(sshd);
        self.kill("sshd");
    }
}

impl Line {
    fn words(self) -> String {
        format!(
            "{} {} {}",
            self.delay_ms, self.cut_after_bytes, self.bytes_per_second
        )
    }
}

/// MaxSessions is left at sshd's own 10, because that is what real builders have.
const SSHD_CONFIG: &str = "\
ListenAddress 0.0.0.0
HostKey /etc/ssh/lab_host_key
UsePAM no
PasswordAuthentication no
PermitRootLogin yes
StrictModes no
PidFile none
PrintMotd no
UseDNS no
MaxStartups 200:30:400
";
