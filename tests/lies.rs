//! Every pairing of sources where one lies about a large NAR: a real store whose file has rotted on its disk, or a
//! cache with another NAR than its narinfo promises. What is wrong at the end is mended by the other one and the
//! client sees one whole response; what is wrong at the beginning is cut once.

mod builder;
mod cache_server;
mod sources;
mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use builder::{Builder, Daemon, Sshd, nar_of, quick, up};
use cache_server::compress;
use muster::codec::compression::Encoding;
use muster::nix::narinfo::Compression;
use muster::nix::store_path::StorePath;
use muster::substituter::Setup;
use muster::upstream::Upstream;
use sources::{NAR_BYTES, files, in_folder, member, noise, over_socket, publisher, serving};
use support::{get, nar_target, new_substituter, options, serve};

/// What is wrong with a NAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lie {
    /// The last byte of its file.
    Last,
    /// A byte 700 kB before that.
    Within,
    /// A byte behind its end.
    Long,
    /// The first byte of its file.
    First,
}

/// One kind of source.
struct Kind {
    name: &'static str,
    upstream: Arc<dyn Upstream>,
}

/// A path and the kinds of sources that have it.
struct Case {
    builder: Builder,
    sshd: Sshd,
    path: StorePath,
    content: Vec<u8>,
    folder: tempfile::TempDir,
}

/// The sources of one lie; their processes end when dropped.
struct Liars {
    kinds: Vec<Kind>,
    _daemon: Option<Daemon>,
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_last_byte_is_mended_by_any_other() {
    each_is_mended(Lie::Last, &[Encoding::None, Encoding::Zstd]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_byte_near_the_end_is_mended_by_any_other() {
    each_is_mended(Lie::Within, &[Encoding::Zstd]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_byte_too_many_is_mended_by_any_other() {
    each_is_mended(Lie::Long, &[Encoding::None]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_first_byte_is_cut_once() {
    let case = Case::new();
    let daemon = case.builder.daemon();
    let honest = case.honest(&daemon).await;
    let liars = case.liars(Lie::First).await;
    for (place, first) in liars.kinds.iter().enumerate() {
        let pair = Pair {
            lie: Lie::First,
            first,
            second: &honest[(place + 1) % honest.len()],
            encoding: [Encoding::None, Encoding::Zstd][place % 2],
        };
        pair.check(&case).await;
    }
}

async fn each_is_mended(lie: Lie, encodings: &[Encoding]) {
    let case = Case::new();
    let daemon = case.builder.daemon();
    let honest = case.honest(&daemon).await;
    let liars = case.liars(lie).await;
    // A store's own words tell where its NAR ends.
    let kinds = if lie == Lie::Long { 4 } else { 6 };
    assert_eq!((liars.kinds.len(), honest.len()), (kinds, 6));
    for first in &liars.kinds {
        for second in &honest {
            for encoding in encodings {
                let pair = Pair {
                    lie,
                    first,
                    second,
                    encoding: *encoding,
                };
                pair.check(&case).await;
            }
        }
    }
}

/// One that lies, and one that does not.
struct Pair<'k> {
    lie: Lie,
    first: &'k Kind,
    second: &'k Kind,
    encoding: Encoding,
}

impl Pair<'_> {
    async fn check(&self, case: &Case) {
        let encoding = self.encoding;
        let (first, second) = (self.first.name, self.second.name);
        let what = format!("{:?}: {first} lies, {second} mends, {encoding:?}", self.lie);
        let (one, two) = (
            member(0, &self.first.upstream),
            member(1, &self.second.upstream),
        );
        let setup = |members| Setup {
            members,
            publisher: publisher(&case.builder.store_dir, encoding),
        };
        let mut options = options();
        // The machine may be busy: nothing must seem to stall.
        options.transfer.stall = Duration::from_secs(10);
        options.transfer.stall_last = Duration::from_secs(20);
        let substituter = new_substituter(options, setup(vec![Arc::clone(&one)]));
        // Found at the first alone, so that it gives the first bytes.
        let hash = case.path.hash();
        assert!(substituter.narinfo(hash).await.is_some(), "{what}");
        substituter.replace(setup(vec![Arc::clone(&one), Arc::clone(&two)]));
        let counted = substituter.clone();
        let served = serve(substituter).await;
        let nar = nar_of(&case.content);
        for request in 0..2 {
            let narinfo = get(served.address, &format!("/{hash}.narinfo")).await;
            let target = nar_target(&narinfo);
            let answer = get(served.address, &target).await;
            assert_eq!(answer.status, 200, "{what}: {}", answer.head);
            let is_cut = self.lie == Lie::First && request == 0;
            assert_eq!(answer.cut, is_cut, "{what}, request {request}");
            if !is_cut {
                // What is kept by now is served as it is kept.
                let got = match target.ends_with(".zst") {
                    true => zstd::decode_all(&answer.body[..]).unwrap(),
                    false => answer.body,
                };
                assert!(got == nar, "{what}: {} bytes", got.len());
            }
            // The liar alone is blamed, and not asked again.
            let refused = [&one, &two].map(|it| it.refused.load(Ordering::Relaxed));
            assert_eq!(refused, [1, 0], "{what}, request {request}");
        }
        let counters = counted.counters();
        assert_eq!(counters.nar_resumed.value(), 1, "{what}");
        assert_eq!(counters.nar_corrupt.value(), 1, "{what}");
    }
}

impl Case {
    fn new() -> Self {
        let content = noise();
        let builder = Builder::new();
        Self {
            path: builder.add("large", &content),
            sshd: builder.sshd(""),
            builder,
            content,
            folder: tempfile::tempdir().unwrap(),
        }
    }

    async fn honest(&self, daemon: &Daemon) -> Vec<Kind> {
        let target = self.builder.target(self.sshd.port);
        let mut kinds = vec![
            kind("ssh-ng", Arc::new(self.builder.over_ssh(target, quick()))),
            kind("daemon", over_socket(&self.builder, &daemon.socket)),
        ];
        kinds.extend(self.caches("honest", None));
        for kind in &kinds {
            up(&*kind.upstream).await;
        }
        kinds
    }

    async fn liars(&self, lie: Lie) -> Liars {
        let mut kinds = self.caches("lying", Some(lie));
        let mut daemon = None;
        if lie != Lie::Long {
            let root = self.rotten(lie);
            let run = format!("export NIX_REMOTE='local?root={}'\n", root.display());
            let run = run + "exec nix-daemon \"$@\"";
            let program = self.builder.write_program("rotten-daemon", &run);
            let mut target = self.builder.target(self.sshd.port);
            target.remote_program = vec![program.to_str().unwrap().to_owned()];
            let over_ssh = self.builder.over_ssh(target, quick());
            kinds.push(kind("ssh-ng", Arc::new(over_ssh)));
            let listening = self.builder.daemon_at(&root);
            kinds.push(kind(
                "daemon",
                over_socket(&self.builder, &listening.socket),
            ));
            daemon = Some(listening);
        }
        for kind in &kinds {
            up(&*kind.upstream).await;
        }
        Liars {
            kinds,
            _daemon: daemon,
        }
    }

    /// Copies the path into a store of its own, and lets its file rot there.
    fn rotten(&self, lie: Lie) -> PathBuf {
        let root = self.folder.path().join("rotten");
        let to = format!("local?root={}", root.display());
        let path = self.builder.store_dir.join(&self.path);
        let words = ["--extra-experimental-features", "nix-command", "copy"];
        let words = [&words[..], &["--no-check-sigs", "--to", &to, &path]].concat();
        self.builder.run("nix", &words);
        let copy = root.join("nix/store").join(self.path.to_string());
        let mut content = std::fs::read(&copy).expect("the copy is there");
        assert!(content == self.content);
        content[place(lie)] ^= 1;
        std::fs::remove_file(&copy).unwrap();
        std::fs::write(&copy, content).unwrap();
        root
    }

    fn caches(&self, name: &str, lie: Option<Lie>) -> Vec<Kind> {
        let mut kinds = Vec::new();
        for (name_of, compression) in [
            ("http none", Compression::None),
            ("http zstd", Compression::Zstd),
            ("http xz", Compression::Xz),
            ("file", Compression::Zstd),
        ] {
            let folder = self
                .folder
                .path()
                .join(format!("{name}-{name_of}").replace(' ', "-"));
            self.builder.write_cache(&folder, compression.name(), &[]);
            if let Some(lie) = lie {
                self.make_lie(&folder, compression, lie);
            }
            let upstream = match name_of {
                "file" => in_folder(&self.builder, &folder),
                _ => serving(&self.builder, &folder).1,
            };
            kinds.push(kind(name_of, upstream));
        }
        kinds
    }

    /// Puts another NAR where a narinfo names the right one.
    fn make_lie(&self, folder: &Path, compression: Compression, lie: Lie) {
        let mut nar = nar_of(&self.content);
        match lie {
            Lie::Long => nar.push(b'x'),
            _ => {
                let mut content = self.content.clone();
                content[place(lie)] ^= 1;
                nar = nar_of(&content);
            }
        }
        for file in files(&folder.join("nar")) {
            std::fs::write(file, compress(compression, &nar)).unwrap();
        }
        // Of its file nothing is said, which is allowed.
        for file in files(folder) {
            let text = std::fs::read_to_string(&file).unwrap();
            let lines = text.lines().filter(|line| !line.starts_with("File"));
            let text: String = lines.map(|line| format!("{line}\n")).collect();
            std::fs::write(&file, text).unwrap();
        }
    }
}

/// The wrong byte of the file.
fn place(lie: Lie) -> usize {
    match lie {
        Lie::First => 0,
        Lie::Within => NAR_BYTES - 700_000,
        Lie::Last | Lie::Long => NAR_BYTES - 1,
    }
}

fn kind(name: &'static str, upstream: Arc<dyn Upstream>) -> Kind {
    Kind { name, upstream }
}
