//! Every pairing of sources: one breaks in the middle of a large NAR, the other goes on, and the client sees
//! one whole response. Real daemons, real sshd, real sockets; what breaks is a connection or a file, and what stalls
//! a connection.

mod builder;
mod cache_server;
mod sources;
mod support;

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use builder::{Builder, nar_of, quick, up};
use cache_server::Fault;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use muster::codec::compression::Encoding;
use muster::nix::store_path::{StoreDir, StorePath};
use muster::substituter::Setup;
use muster::upstream::Upstream;
use sources::{files, in_folder, member, noise, over_socket, publisher, serving};
use support::{get, nar_target, new_substituter, options, serve};

/// After so many bytes of one connection it breaks.
const BREAK_BYTES: usize = 3 << 20;

/// One kind of source, whole and broken.
struct Kind<'b> {
    name: &'static str,
    whole: Arc<dyn Upstream>,
    /// Makes one that has brought nothing yet.
    broken: Box<dyn Fn() -> Arc<dyn Upstream> + 'b>,
    /// Whether its NARs need a session, and a login takes its time.
    has_sessions: bool,
}

/// What a source does in the middle.
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Break,
    /// Nothing comes any more, and nothing says so.
    Stall,
}

#[tokio::test(flavor = "multi_thread")]
async fn each_source_goes_on_where_any_other_broke() {
    each_goes_on(End::Break).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_source_goes_on_where_any_other_stalled() {
    each_goes_on(End::Stall).await;
}

async fn each_goes_on(end: End) {
    let content = noise();
    let builder = Builder::new();
    let path = builder.add("large", &content);
    let daemon = builder.daemon();
    let sshd = builder.sshd("");
    let folder = tempfile::tempdir().unwrap();
    let kinds = kinds(&builder, &daemon.socket, sshd.port, folder.path(), end);
    let case = Case {
        store_dir: &builder.store_dir,
        path,
        nar: nar_of(&content),
        // Not in the caches, which are written by now.
        small: builder.add("small", b"small"),
    };
    for kind in &kinds {
        case.ready(kind, &*kind.whole).await;
    }
    let mut pairs = Vec::new();
    // A file does not stall.
    let ends = |kind: &&Kind| end == End::Break || kind.name != "file";
    for first in kinds.iter().filter(ends) {
        for second in &kinds {
            for encoding in [Encoding::None, Encoding::Zstd] {
                pairs.push(Pair {
                    first,
                    second,
                    encoding,
                    end,
                });
            }
        }
    }
    // Where they stall there is little else to do.
    let at_once = if end == End::Stall { 3 } else { 1 };
    let case = &case;
    stream::iter(&pairs)
        .for_each_concurrent(at_once, |pair| pair.check(case))
        .await;
}

/// What real Nix compressed passes as it is: it goes on by `Range` at the same place, is skipped to where the server
/// knows no ranges, or goes on at another holder of the same file.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_passes_goes_on_where_it_broke() {
    let builder = Builder::new();
    let path = builder.add("large", &noise());
    let folder = tempfile::tempdir().unwrap();
    builder.write_cache(folder.path(), "zstd", &[]);
    let file = files(&folder.path().join("nar")).remove(0);
    let target = format!("/nar/{}", file.file_name().unwrap().to_str().unwrap());
    let file = std::fs::read(file).unwrap();
    let (half, gone) = (file.len() / 2, Fault::Status(404, "X: y"));
    let rows = [
        ("by range", None, false),
        ("the whole again", Some(Fault::NoRange), false),
        ("at another", Some(gone.clone()), true),
        ("nowhere", Some(gone), false),
    ];
    for (what, then, another) in rows {
        let (first, upstream) = serving(&builder, folder.path());
        let mut upstreams = vec![upstream];
        if another {
            upstreams.push(over_http(&builder, folder.path(), None));
        }
        for upstream in &upstreams {
            up(&**upstream).await;
        }
        let members = upstreams.iter().zip(0..);
        let setup = Setup {
            members: members.map(|(it, number)| member(number, it)).collect(),
            publisher: publisher(&builder.store_dir, Encoding::Zstd),
        };
        let substituter = new_substituter(options(), setup);
        assert!(substituter.narinfo(path.hash()).await.is_some(), "{what}");
        let counted = substituter.clone();
        let served = serve(substituter).await;
        let narinfo = get(served.address, &format!("/{}.narinfo", path.hash())).await;
        first.fault_once(&target, Fault::Cut(half));
        first.fault(&target, then);
        let answer = get(served.address, &nar_target(&narinfo)).await;
        let is_whole = !answer.cut && answer.body == file;
        assert_eq!(is_whole, what != "nowhere", "{what}");
        assert_eq!(answer.cut, what == "nowhere", "{what}");
        assert_eq!(counted.counters().nar_passed.value(), 1, "{what}");
    }
}

/// What is asked for.
struct Case<'b> {
    store_dir: &'b StoreDir,
    path: StorePath,
    nar: Vec<u8>,
    small: StorePath,
}

impl Case<'_> {
    /// Waits until a source can give a first byte at once: a login may take longer than a stall.
    async fn ready(&self, kind: &Kind<'_>, upstream: &dyn Upstream) {
        if !kind.has_sessions {
            return up(upstream).await;
        }
        let small = async || {
            let info = upstream.path_info(self.small.hash()).await.ok()??;
            let nar = upstream.nar(&info).await.ok()??;
            nar.try_fold((), async |(), _| Ok(())).await.ok()
        };
        let begun = Instant::now();
        // As often as it takes where logins time out, on a machine with much else to do.
        while small().await.is_none() {
            assert!(begun.elapsed() < Duration::from_secs(120), "{}", kind.name);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// A source that gives half, and one that gives the rest.
struct Pair<'k> {
    first: &'k Kind<'k>,
    second: &'k Kind<'k>,
    encoding: Encoding,
    end: End,
}

impl Pair<'_> {
    /// Has the one go on where the other ended, once.
    async fn check(&self, case: &Case<'_>) {
        let Self {
            first,
            second,
            encoding,
            end,
        } = *self;
        let what = format!(
            "{}: {end:?}, {} goes on, {encoding:?}",
            first.name, second.name
        );
        let broken = (first.broken)();
        case.ready(first, &*broken).await;
        let path = &case.path;
        let (one, two) = (member(0, &broken), member(1, &second.whole));
        let setup = |members| Setup {
            members,
            publisher: publisher(case.store_dir, encoding),
        };
        let mut options = options();
        // The machine may be busy: where nothing stalls, it must not seem so.
        options.transfer.stall = match end {
            End::Break => Duration::from_secs(10),
            End::Stall => Duration::from_secs(2),
        };
        options.transfer.stall_last = Duration::from_secs(20);
        let substituter = new_substituter(options, setup(vec![Arc::clone(&one)]));
        // Found at the first alone, so that it gives the first bytes.
        assert!(substituter.narinfo(path.hash()).await.is_some(), "{what}");
        substituter.replace(setup(vec![one, two]));
        let counted = substituter.clone();
        let served = serve(substituter).await;
        let narinfo = get(served.address, &format!("/{}.narinfo", path.hash())).await;
        let answer = get(served.address, &nar_target(&narinfo)).await;
        assert!(
            answer.status == 200 && !answer.cut,
            "{what}: {}",
            answer.head
        );
        let got = match encoding {
            Encoding::Zstd => zstd::decode_all(&answer.body[..]).unwrap(),
            _ => answer.body,
        };
        assert!(got == case.nar, "{what}: {} bytes", got.len());
        assert_eq!(counted.counters().nar_resumed.value(), 1, "{what}");
    }
}

fn kinds<'b>(
    builder: &'b Builder,
    socket: &Path,
    port: u16,
    folder: &Path,
    end: End,
) -> Vec<Kind<'b>> {
    let over_ssh =
        |port| -> Arc<dyn Upstream> { Arc::new(builder.over_ssh(builder.target(port), quick())) };
    let far = breaking_port(port, end);
    let near = breaking_socket(socket, &builder.path("breaking"), end);
    let mut kinds = vec![
        Kind {
            name: "ssh-ng",
            whole: over_ssh(port),
            broken: Box::new(move || over_ssh(far)),
            has_sessions: true,
        },
        Kind {
            name: "daemon",
            whole: over_socket(builder, socket),
            broken: Box::new(move || over_socket(builder, &near)),
            has_sessions: true,
        },
    ];
    for (name, compression) in [
        ("http none", "none"),
        ("http zstd", "zstd"),
        ("http xz", "xz"),
    ] {
        let cache = folder.join(compression);
        builder.write_cache(&cache, compression, &[]);
        kinds.push(Kind {
            name,
            whole: over_http(builder, &cache, None),
            broken: Box::new(move || over_http(builder, &cache, Some(end))),
            has_sessions: false,
        });
    }
    let whole = folder.join("whole");
    builder.write_cache(&whole, "zstd", &[]);
    let broken = folder.join("broken");
    builder.write_cache(&broken, "zstd", &[]);
    for file in files(&broken.join("nar")) {
        let file = std::fs::OpenOptions::new().write(true).open(file).unwrap();
        file.set_len(file.metadata().unwrap().len() / 2).unwrap();
    }
    kinds.push(Kind {
        name: "file",
        whole: in_folder(builder, &whole),
        broken: Box::new(move || in_folder(builder, &broken)),
        has_sessions: false,
    });
    kinds
}

/// Serves what real Nix wrote; the files of the NARs may end in the middle.
fn over_http(builder: &Builder, folder: &Path, end: Option<End>) -> Arc<dyn Upstream> {
    let (server, upstream) = serving(builder, folder);
    for file in files(&folder.join("nar")) {
        let Some(end) = end else { break };
        let name = file.file_name().unwrap().to_str().unwrap();
        let half = file.metadata().unwrap().len() / 2;
        let half = usize::try_from(half).unwrap();
        let fault = match end {
            End::Break => Fault::Cut(half),
            End::Stall => Fault::Stall(half),
        };
        server.fault(&format!("/nar/{name}"), Some(fault));
    }
    upstream
}

/// A port that leads to another, until a connection has brought its share.
fn breaking_port(to: u16, end: End) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for near in listener.incoming().flatten() {
            let far = TcpStream::connect(("127.0.0.1", to)).unwrap();
            let (mut up_from, mut up_to) = (near.try_clone().unwrap(), far.try_clone().unwrap());
            std::thread::spawn(move || std::io::copy(&mut up_from, &mut up_to));
            std::thread::spawn(move || {
                relay(&far, &near, end);
                _ = (near.shutdown(Shutdown::Both), far.shutdown(Shutdown::Both));
            });
        }
    });
    port
}

/// The same for a Unix socket.
fn breaking_socket(to: &Path, at: &Path, end: End) -> PathBuf {
    let listener = UnixListener::bind(at).unwrap();
    let to = to.to_owned();
    std::thread::spawn(move || {
        for near in listener.incoming().flatten() {
            let far = UnixStream::connect(&to).unwrap();
            let (mut up_from, mut up_to) = (near.try_clone().unwrap(), far.try_clone().unwrap());
            std::thread::spawn(move || std::io::copy(&mut up_from, &mut up_to));
            std::thread::spawn(move || {
                relay(&far, &near, end);
                _ = (near.shutdown(Shutdown::Both), far.shutdown(Shutdown::Both));
            });
        }
    });
    at.to_owned()
}

fn relay<F, T>(mut from: &F, mut to: &T, end: End)
where
    for<'a> &'a F: std::io::Read,
    for<'a> &'a T: std::io::Write,
{
    let (mut buffer, mut left) = (vec![0; 64 << 10], BREAK_BYTES);
    while let Ok(size) = from.read(&mut buffer) {
        let size = size.min(left);
        if size == 0 && left == 0 && end == End::Stall {
            // For as long as the test takes; what more comes is not read.
            std::thread::sleep(Duration::from_secs(600));
        }
        if size == 0 || to.write_all(&buffer[..size]).is_err() {
            return;
        }
        left -= size;
    }
}
