//! What a store costs that is served where it lies: Muster over the builder's own, nginx with the same NAR as
//! `nix copy` wrote it, and zstd(1) over the NAR.
//!
//! Only the first read of a path hashes and compresses, so Muster is started anew in each round, with nothing kept.

use std::fs;
use std::process::Command;

use crate::figures::cpu::CpuGroup;
use crate::figures::{Figures, Goal, Unit};
use crate::rig::muster::narinfo_target;
use crate::rig::process::Process;
use crate::rig::{Muster, eventually};
use crate::{MUSTER, NGINX, NGINX_CONF, Scene, Server, accounted, corpus, fetch, in_turn};

/// The servers on `b`, over its own store: nginx, and Muster anew in each round, as only its first read hashes.
pub struct OwnStore {
    _nginx: Process,
    nginx: Server,
    nginx_target: String,
    daemon: CpuGroup,
    /// As large as the large path, and it compresses.
    corpus: String,
}

/// One muster over `b`'s own store; stopped before its control group goes.
struct OwnMuster<'s> {
    muster: Muster<'s>,
    server: Server,
    target: String,
}

impl OwnStore {
    pub fn start(scene: &Scene) -> Self {
        let copy = format!(
            "nix copy --to 'file:///srv/plain?compression=none' {}",
            scene.large
        );
        scene.b.run(&copy).ok();
        let conf = NGINX_CONF
            .replace("@port@", "8083")
            .replace("@root@", "/srv/plain")
            .replace("@more@", "");
        scene.b.write("/etc/nginx-8083.conf", &conf);
        let (nginx, cpu) = accounted(&scene.b, "nginx-8083", "nginx -c /etc/nginx-8083.conf");
        scene.b.await_port(8083);
        // The daemon's work counts, too, where there is any.
        let daemon = CpuGroup::new("daemon");
        for pid in scene.b.processes("nix-daemon") {
            daemon.take(pid);
        }
        let narinfo = scene
            .b
            .run(&format!("cat /srv/plain{}", narinfo_target(&scene.large)))
            .ok()
            .out;
        let url = narinfo
            .lines()
            .find_map(|l| l.strip_prefix("URL: "))
            .expect("a URL");
        Self {
            _nginx: nginx,
            nginx: Server {
                name: NGINX,
                port: 8083,
                cpu,
            },
            nginx_target: format!("/{url}"),
            daemon,
            corpus: dump_corpus(scene),
        }
    }

    pub fn nars(&self, scene: &Scene, round: usize, figures: &mut Figures) {
        self.plain(scene, round, figures);
        self.zstd(scene, round, figures);
    }

    fn plain(&self, scene: &Scene, round: usize, figures: &mut Figures) {
        let mut add = |what, via, secs_per_gb| {
            figures.add(what, "", via, Unit::SecondsPerGb, secs_per_gb);
        };
        let muster = OwnMuster::serve(scene, &scene.large, "--compression none --cache-size 0");
        let first = self.fetch(scene, &muster.server, &muster.target, 1);
        add(OWN_FIRST, MUSTER, first);
        let both = [
            (&muster.server, &muster.target),
            (&self.nginx, &self.nginx_target),
        ];
        let hash = sha256();
        for (server, target) in in_turn(&both, round) {
            let cpu = self.fetch(scene, server, target, LATER_TIMES);
            add(OWN, server.name, cpu);
            if server.name == NGINX {
                add(OWN_FIRST, HARMONIA_AND_HASH, cpu * HARMONIA + hash);
            }
        }
        add(OWN_FIRST, HASH, hash);
    }

    fn zstd(&self, scene: &Scene, round: usize, figures: &mut Figures) {
        for via in in_turn(&[MUSTER, ZSTD_3, ZSTD_1_LONG], round) {
            let mut add = |what, unit, sample| figures.add(what, "", via, unit, sample);
            let (first, ratio) = match *via {
                MUSTER => {
                    let (first, ratio, later) = self.zstd_by_muster(scene);
                    add(OWN_ZSTD, Unit::SecondsPerGb, later);
                    (first, ratio)
                }
                program => zstd_by_program(scene, program),
            };
            add(OWN_ZSTD_FIRST, Unit::SecondsPerGb, first);
            add(OWN_RATIO, Unit::Ratio, ratio);
            assert!(
                (2.5..5.0).contains(&ratio),
                "{via} makes 1 of {ratio:.2}: not as programs compress"
            );
        }
    }

    /// CPU time in s for a GB of NAR, how much smaller it gets, and the same time for what is kept.
    fn zstd_by_muster(&self, scene: &Scene) -> (f64, f64, f64) {
        scene.b.run("rm -rf /srv/cache").ok();
        let args = "--compression zstd --cache-dir /srv/cache";
        let mut own = OwnMuster::serve(scene, &self.corpus, args);
        let narinfo = own.muster.narinfo(&self.corpus);
        let file = narinfo.field("FileHash");
        assert!(
            file.is_none(),
            "it is kept before it was read: {}",
            narinfo.text()
        );
        let first = self.fetch(scene, &own.server, &own.target, 1);
        let mut is_kept = || own.muster.narinfo(&self.corpus).field("FileHash").is_some();
        let kept = eventually(30.0, &mut is_kept);
        assert!(kept, "it is not kept\n{}", own.muster.log());
        let narinfo = own.muster.narinfo(&self.corpus);
        assert_eq!(narinfo.field("Compression").as_deref(), Some("zstd"));
        let size = |name| narinfo.field(name).and_then(|n| n.parse::<f64>().ok());
        let ratio = size("NarSize")
            .zip(size("FileSize"))
            .map(|(nar, file)| nar / file);
        let target = format!("/{}", narinfo.field("URL").expect("a URL"));
        let later = self.fetch(scene, &own.server, &target, LATER_TIMES);
        (
            first,
            ratio.expect("a narinfo of a file has both sizes"),
            later,
        )
    }

    /// Fetches the NAR so many times and returns the CPU time that it took, in s for a GB.
    fn fetch(&self, scene: &Scene, server: &Server, target: &str, times: usize) -> f64 {
        let before = self.daemon.used();
        let cpu = fetch(&scene.b, server, &vec![target.to_owned(); times], 1);
        let gb = f64::from(scene.large_mb) * 1.048_576e-3 * times as f64;
        (cpu + (self.daemon.used() - before).as_secs_f64()) / gb
    }
}

impl<'s> OwnMuster<'s> {
    fn serve(scene: &'s Scene, path: &str, args: &str) -> Self {
        let port = 5001;
        let line = format!("--listen 127.0.0.1:{port} --no-machines --upstream daemon {args}");
        let mut muster = Muster::serve(&scene.b, &line);
        let cpu = CpuGroup::new("own");
        cpu.take(muster.pid());
        let url = muster.narinfo(path).field("URL").expect("a narinfo");
        Self {
            muster,
            server: Server {
                name: MUSTER,
                port,
                cpu,
            },
            target: format!("/{url}"),
        }
    }
}

/// Adds the corpus to `b`'s store, and has its NAR lie beside it; the path.
fn dump_corpus(scene: &Scene) -> String {
    let path = corpus::add(&scene.b, scene.large_mb);
    scene
        .b
        .run(&format!("nix-store --dump {path} > {NAR}"))
        .ok();
    path
}

/// CPU time in s for a GB of the same NAR, and how much smaller it gets.
fn zstd_by_program(scene: &Scene, program: &str) -> (f64, f64) {
    let to = format!("{NAR}.zst");
    let line = format!("{program} -q -f {NAR} -o {to}");
    let (mut process, cpu) = accounted(&scene.b, "zstd", &line);
    assert_eq!(process.wait(120.0), Some(0), "{}", process.err());
    let size = |file: &str| {
        let about = fs::metadata(scene.b.path(file));
        about.expect("look at a file").len() as f64
    };
    let nar = size(NAR);
    (cpu.used().as_secs_f64() / (nar / 1e9), nar / size(&to))
}

/// CPU time in s that OpenSSL takes for one SHA-256 of a GB in memory, here and now.
fn sha256() -> f64 {
    let speed = Command::new("openssl")
        .args([
            "speed", "-mr", "-seconds", "1", "-bytes", "262144", "-evp", "sha256",
        ])
        .output()
        .expect("openssl starts");
    let text = String::from_utf8_lossy(&speed.stdout);
    let line = text.lines().find_map(|line| line.strip_prefix("+F:"));
    let rate = line.and_then(|line| line.rsplit(':').next()?.parse::<f64>().ok());
    1e9 / rate.unwrap_or_else(|| panic!("openssl speed tells no bytes in a second: {text}"))
}

pub fn judge(figures: &mut Figures) {
    figures.set_goal(OWN_FIRST, "", MUSTER, Goal::AtMost(0.85));
    figures.set_goal(OWN_FIRST, "", MUSTER, Goal::Times(1.0, HARMONIA_AND_HASH));
    figures.set_goal(OWN_FIRST, "", MUSTER, Goal::Beside(HASH));
    figures.set_goal(OWN, "", MUSTER, Goal::Times(HARMONIA, NGINX));
    figures.set_goal(OWN_ZSTD_FIRST, "", MUSTER, Goal::AtMost(3.0));
    figures.set_goal(OWN_ZSTD_FIRST, "", MUSTER, Goal::Beside(ZSTD_3));
    figures.set_goal(OWN_ZSTD_FIRST, "", MUSTER, Goal::Beside(ZSTD_1_LONG));
    figures.set_goal(OWN_RATIO, "", MUSTER, Goal::AtLeast(0.99, ZSTD_3));
    figures.set_goal(OWN_RATIO, "", MUSTER, Goal::AtLeast(1.0, ZSTD_1_LONG));
    figures.set_goal(OWN_ZSTD, "", MUSTER, Goal::AtMost(0.2));
}

/// CPU of harmonia beside nginx's, where both were measured: 0.30 and 0.18 s/GB.
const HARMONIA: f64 = 0.30 / 0.18;

const OWN_FIRST: &str = "own store, 500 MB uncompressed, first read, CPU";
const OWN: &str = "own store, 500 MB uncompressed, CPU";
/// The same as a sum on this machine: what harmonia takes, which hashes nothing, and one hash.
const HARMONIA_AND_HASH: &str = "1.67 × nginx and a SHA-256";
const HASH: &str = "one SHA-256 by OpenSSL";
const OWN_ZSTD_FIRST: &str = "own store, 500 MB of programs with zstd, first read, CPU";
const OWN_RATIO: &str = "own store, 500 MB of programs with zstd, how much smaller";
const OWN_ZSTD: &str = "own store, 500 MB of programs with zstd, later, CPU";
const ZSTD_3: &str = "zstd -3 -T1";
/// How harmonia 3.2 compresses, which hashes nothing.
const ZSTD_1_LONG: &str = "zstd -1 --long=25 -T1";

/// How often a round fetches what was read before: one time says too little, whichever server it is.
const LATER_TIMES: usize = 4;

/// On disk: the machine's root has 1 GB.
const NAR: &str = "/lab/corpus.nar";
