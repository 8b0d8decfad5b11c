//! Binary caches on machines: folders that real Nix wrote, nginx over them, and what Muster keeps.

use std::net::{Ipv4Addr, TcpListener};
use std::thread;

use rustix::process::Signal;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::eventually;
use super::machine::Machine;
use super::muster::Muster;
use super::process::Process;

/// Where a service of root's keeps its NARs.
pub const FOLDER: &str = "/var/cache/muster";

/// A number that the environment may change: few rounds by default, many where somebody asks for them.
pub fn asked(name: &str, usual: usize) -> usize {
    let asked = std::env::var(name).ok();
    asked.and_then(|text| text.parse().ok()).unwrap_or(usual)
}

impl Machine {
    /// Writes closures into a folder as a binary cache; `options` as behind `?` in a store URI.
    #[track_caller]
    pub fn copy_to(&self, folder: &str, options: &str, paths: &[String]) {
        let to = format!("file://{folder}?{options}");
        let paths = paths.join("' '");
        self.run_for(300.0, &format!("nix copy --to '{to}' '{paths}'"))
            .ok();
        self.run(&format!("chmod -R a+rX {folder}")).ok();
    }

    /// Starts Debian's nginx with these `server` blocks and waits until it listens on a port. The machine
    /// must have the Nix of Debian 12.
    pub fn nginx(&self, port: u16, servers: &str) -> Process {
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .iter()
            .map(|name| format!("{name}_temp_path /tmp/nginx/{name};\n"))
            .collect();
        self.write(
            "/etc/nginx-lab.conf",
            &format!(
                "daemon off;\nuser root;\nworker_processes 1;\nerror_log /tmp/nginx/error;\n\
                 pid /tmp/nginx/pid;\nevents {{}}\nhttp {{\naccess_log off;\n{temporary}{servers}}}\n"
            ),
        );
        self.run("mkdir -p /tmp/nginx").ok();
        let nginx = self.spawn("nginx", "/usr/sbin/nginx -c /etc/nginx-lab.conf");
        self.await_port(port);
        nginx
    }

    /// A socket of the test process that listens on a port of this machine.
    pub fn listener(&self, port: u16) -> TcpListener {
        let namespace = std::fs::File::open(format!("/proc/{}/ns/net", self.pid()));
        let namespace = namespace.expect("open the machine's network");
        // A thread of its own, which ends there: nobody else is moved.
        let bound = thread::spawn(move || {
            use std::os::fd::AsFd as _;
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
                .expect("enter the machine's network");
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).expect("bind")
        });
        bound.join().expect("listen on a machine")
    }

    /// Has this machine's Nix check content and signatures of all that Muster's folder lists.
    #[track_caller]
    pub fn folder_verifies(&self, key: &str) {
        let line = format!(
            "nix store verify --all --store file://{FOLDER} --sigs-needed 1 --option trusted-public-keys '{key}'"
        );
        self.run(&line).ok();
    }

    /// Removes what a Muster that does not run has kept.
    pub fn wipe_kept(&self) {
        self.run(&format!("rm -rf {FOLDER}")).ok();
    }
}

impl Muster<'_> {
    /// Tells whether the narinfo of a path names a kept file.
    pub fn names_a_file(&mut self, path: &str) -> bool {
        let url = self.narinfo(path).field("URL").unwrap_or_default();
        url.matches('-').count() == 2 && url.ends_with(".nar.zst")
    }

    /// Waits until all of these are kept.
    #[track_caller]
    pub fn await_kept(&mut self, paths: &[String]) {
        for path in paths {
            let kept = eventually(20.0, || self.names_a_file(path));
            assert!(kept, "{path} is not kept\n{}", self.log());
        }
    }

    /// Stops it in good order.
    #[track_caller]
    pub fn stop(mut self) {
        self.signal(Signal::TERM);
        let ended = self.wait(20.0);
        assert_eq!(ended, Some(0), "{}", self.log());
    }

    /// Kills it, as a crash or a lack of memory would.
    #[track_caller]
    pub fn crash(mut self) {
        self.signal(Signal::KILL);
        assert!(self.wait(5.0).is_some(), "it does not die");
    }
}
