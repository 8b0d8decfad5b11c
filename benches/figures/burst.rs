//! Thousands of narinfos at once, as newer clients ask for them: those that are found queue neither behind each other
//! nor behind a builder that is silent.
//!
//! Three builders over ssh, one of which has all paths but every tenth, which nobody has. Muster is started anew for
//! every single burst, with nothing kept, connected, and left alone for two seconds.

use std::fmt::Write as _;
use std::thread;
use std::time::Duration;

use crate::figures::{Figures, Goal, Unit};
use crate::load::{add_small, small_name};
use crate::rig::muster::narinfo_target;
use crate::rig::{Lab, Machine, Muster, Nix, eventually};

/// The machines of their own, and what is asked for.
pub struct Burst {
    builders: Vec<Machine>,
    _silent: Machine,
    m: Machine,
    found: usize,
}

impl Burst {
    pub fn new(lab: &Lab) -> Self {
        let builder = |name| {
            let builder = lab.machine(name, Nix::Debian12);
            builder.sshd().daemon();
            // The first build makes the store's folders.
            builder.build_one("tiny", "");
            builder
        };
        let builders: Vec<_> = ["b1", "b2", "b3"].map(builder).into();
        let silent = lab.machine("silent", Nix::Debian12);
        silent.hang();
        let mut paths = Vec::new();
        add_small(&builders[1], &mut paths, PATHS - PATHS / ABSENT_EACH, 0);
        let m = lab.machine("mb", Nix::Debian12);
        m.builders(&["b1", "b2", "b3"]);
        let machines = m.read("/etc/nix/machines").replace("@b1", "@silent");
        m.write(SILENT_MACHINES, &machines);
        let mut targets = String::new();
        let mut present = paths.iter();
        for place in 0..PATHS {
            let path = match place % ABSENT_EACH {
                0 => small_name("nobody", place, ""),
                _ => present.next().expect("as many as were added").clone(),
            };
            let target = narinfo_target(&path);
            _ = writeln!(
                targets,
                "url = http://127.0.0.1:5000{target}\noutput = /dev/null"
            );
        }
        m.write(TARGETS, &targets);
        Self {
            builders,
            _silent: silent,
            m,
            found: paths.len(),
        }
    }

    /// One burst each way, backwards in every second round.
    pub fn measure(&self, round: usize, figures: &mut Figures) {
        let mut all = [WELL, SILENT, TURNS_SILENT];
        if round % 2 == 1 {
            all.reverse();
        }
        for via in all {
            let waits = self.burst(via);
            for (what, percent) in [(P50, 50), (P99, 99)] {
                let wait = waits[(waits.len() * percent).div_ceil(100) - 1];
                figures.add(what, "", via, Unit::Seconds, wait);
            }
        }
        for what in [P50, P99] {
            for via in [SILENT, TURNS_SILENT] {
                figures.set_goal(what, "", via, Goal::Plus(0.1, WELL));
            }
        }
    }

    /// How long each found one took, in s, the shortest first.
    fn burst(&self, via: &str) -> Vec<f64> {
        let m = &self.m;
        m.run("rm -rf /var/cache/muster /root/.cache/muster").ok();
        let (args, well) = match via {
            SILENT => (format!("--machines {SILENT_MACHINES}"), 2),
            _ => (String::new(), 3),
        };
        let muster = Muster::serve(m, &format!("--no-local-daemon {args}"));
        let ask = "busybox wget -q -O - http://127.0.0.1:5000/healthz";
        let settled = || {
            let health = m.run(ask).out;
            let given_up = health.matches(r#""state":"sick""#).count();
            health.matches(r#""state":"well""#).count() == well && given_up == 3 - well
        };
        assert!(eventually(30.0, settled), "{}", muster.log());
        thread::sleep(Duration::from_secs(2));
        let frozen = (via == TURNS_SILENT).then(|| Frozen::new(&self.builders[0]));
        let line = format!(
            "curl -sS -Z --parallel-immediate --parallel-max {CONNECTIONS} -w '%{{http_code}} %{{time_total}}\\n' -K {TARGETS}"
        );
        let got = m.run(&line).ok();
        drop(frozen);
        let answers: Vec<_> = got.out.lines().collect();
        let found = answers.iter().filter_map(|line| line.strip_prefix("200 "));
        let mut waits: Vec<f64> = found.map(|secs| secs.parse().expect("seconds")).collect();
        let absent = answers.iter().filter(|line| line.starts_with("404 "));
        let counts = (waits.len(), absent.count());
        assert_eq!(counts, (self.found, PATHS - self.found), "{}", muster.log());
        waits.sort_by(f64::total_cmp);
        waits
    }
}

/// A builder that says nothing more, until this is dropped.
struct Frozen<'m>(&'m Machine);

impl<'m> Frozen<'m> {
    fn new(builder: &'m Machine) -> Self {
        builder.freeze();
        Self(builder)
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        self.0.thaw();
    }
}

/// All narinfos of a burst, every so many-th of which nobody has, over so many connections; curl has 300 at most.
const PATHS: usize = 2_000;
const ABSENT_EACH: usize = 10;
const CONNECTIONS: usize = 256;

const TARGETS: &str = "/run/burst";
const SILENT_MACHINES: &str = "/etc/nix/machines.silent";

const WELL: &str = "muster";
const SILENT: &str = "muster, one builder silent";
const TURNS_SILENT: &str = "muster, one builder turns silent";
const P50: &str = "burst of 2,000 cold narinfos over 256 connections, one that is found, p50";
const P99: &str = "burst of 2,000 cold narinfos over 256 connections, one that is found, p99";
