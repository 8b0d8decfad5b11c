//! A substituter over scripted upstreams, served on a real socket.

#![expect(dead_code, reason = "each test binary uses its own part")]

pub mod peer;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use muster::cache::backend::Backend;
use muster::cache::memory::{self, UpstreamId};
use muster::cache::memory_backend::MemoryBackend;
use muster::codec::beginnings::NotingDigest;
use muster::codec::compression::{EncoderOptions, Encoding};
use muster::nix::hash::NarHash;
use muster::nix::path_info::{PathInfo, Trust};
use muster::nix::signature::{KeyName, SecretKey};
use muster::nix::store_path::{StoreDir, StorePath, StorePathHash};
use muster::server::listener::Listener;
use muster::server::{self, Info};
use muster::substituter::member::Member;
use muster::substituter::publish::Publisher;
use muster::substituter::{
    self, Setup, Substituter, ahead, closure, filling, health, transfer, write_behind,
};
use muster::upstream::closures::Closures;
use muster::upstream::{Error, Link, NarStream, OpenedNar, Upstream};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};

/// Makes a substituter; it keeps NARs if `MUSTER_TEST_CACHE` is set, so that every suite can be run both ways.
pub fn new_substituter(options: substituter::Options, setup: Setup) -> Substituter {
    let backend = keeps().then(|| Arc::new(MemoryBackend::new(1 << 30)) as Arc<dyn Backend>);
    Substituter::new(options, setup, backend)
}

/// Tells whether [`new_substituter`] makes one that keeps NARs.
pub fn keeps() -> bool {
    std::env::var_os("MUSTER_TEST_CACHE").is_some()
}

/// Tells whether [`options`] pull small NARs ahead of the client: `MUSTER_TEST_NARS_AHEAD`.
pub fn pulls_ahead() -> bool {
    std::env::var_os("MUSTER_TEST_NARS_AHEAD").is_some()
}

/// What a scripted upstream does with the next NARs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NarScript {
    /// Gives it.
    #[default]
    Whole,
    /// Gives the first bytes and then an error.
    BreakAt(usize),
    /// The same once, and then gives it.
    BreakOnceAt(usize),
    /// Gives the first bytes and then nothing.
    StallAt(usize),
    /// The same once, and then gives it.
    StallOnceAt(usize),
    /// Gives it with its last byte flipped.
    FlipLast,
    /// Gives it with this byte flipped.
    FlipAt(usize),
    /// Gives it, and one byte more.
    Long,
    /// Gives the bytes up to the second place, the first place flipped, and then an error.
    FlipAtBreakAt(usize, usize),
    /// Gives the first bytes, and then says that they may have been written to.
    WrittenAt(usize),
    /// Gives the first bytes, the very first one flipped, and then an error.
    FlipFirstBreakAt(usize),
    /// Gives as much as [`Scripted::metered`] says by then.
    Metered,
    /// Says that it is gone.
    Gone,
}

/// An upstream that does as it is told.
pub struct Scripted {
    name: String,
    link: watch::Sender<Link>,
    pub paths: Mutex<HashMap<StorePathHash, (PathInfo, Bytes)>>,
    pub nar_script: Mutex<NarScript>,
    /// Whether it says of its NARs that it has checked them.
    pub vouches: AtomicBool,
    /// Whether its NARs are said to be right chunk by chunk.
    pub proves: AtomicBool,
    /// How often it still lets nobody in for a NAR, though it answers questions.
    pub refusals: AtomicUsize,
    /// NARs that it gives at the same time.
    pub nars_max: Mutex<Option<Arc<Semaphore>>>,
    /// Time before any answer.
    pub delay: Mutex<Duration>,
    /// Whether questions are never answered.
    pub silent: Mutex<bool>,
    pub questions: AtomicUsize,
    pub batches: AtomicUsize,
    pub nars: AtomicUsize,
    /// NAR streams that somebody holds.
    pub nars_open: Arc<AtomicUsize>,
    pub kept: Mutex<Vec<StorePath>>,
    /// How many paths it was asked to keep at one go.
    pub kept_together: Mutex<Vec<usize>>,
    /// The bytes of each NAR that it has given out at most, where that is its script.
    pub metered: watch::Sender<usize>,
    /// Who tells whole closures, where that is to be possible.
    pub closures: Mutex<Option<Arc<dyn Closures>>>,
}

impl Scripted {
    pub fn new(name: &str) -> Arc<Self> {
        let up = Link::Up {
            peer: "scripted".into(),
        };
        Arc::new(Self {
            name: name.to_owned(),
            link: watch::Sender::new(up),
            paths: Mutex::default(),
            nar_script: Mutex::default(),
            vouches: AtomicBool::new(false),
            proves: AtomicBool::new(false),
            refusals: AtomicUsize::new(0),
            nars_max: Mutex::default(),
            delay: Mutex::default(),
            silent: Mutex::default(),
            questions: AtomicUsize::new(0),
            batches: AtomicUsize::new(0),
            nars: AtomicUsize::new(0),
            nars_open: Arc::default(),
            kept: Mutex::default(),
            kept_together: Mutex::default(),
            metered: watch::Sender::new(0),
            closures: Mutex::default(),
        })
    }

    pub fn add(&self, info: &PathInfo, nar: &Bytes) {
        let mut paths = self.paths.lock().unwrap();
        paths.insert(info.path.hash(), (info.clone(), nar.clone()));
    }

    pub fn remove(&self, info: &PathInfo) {
        self.paths.lock().unwrap().remove(&info.path.hash());
    }

    pub fn set_link(&self, link: Link) {
        self.link.send_replace(link);
    }

    pub fn down(&self) {
        self.set_link(Link::Down {
            error: "refused".into(),
            retry_after: Duration::from_secs(1),
        });
    }

    pub fn connecting(&self) {
        self.set_link(Link::Connecting {
            since: tokio::time::Instant::now().into_std(),
        });
    }

    async fn answer(&self) -> Result<(), Error> {
        let delay = *self.delay.lock().unwrap();
        tokio::time::sleep(delay).await;
        let mut link = self.link.subscribe();
        let settled = link.wait_for(|link| !matches!(link, Link::Connecting { .. }));
        let settled = settled.await.map(|link| link.clone());
        if let Ok(Link::Down { error, .. }) = settled {
            return Err(Error::Down(error));
        }
        if *self.silent.lock().unwrap() {
            tokio::time::sleep(Duration::from_secs(10)).await;
            return Err(Error::TimedOut {
                question: "path info",
                after: Duration::from_secs(10),
            });
        }
        Ok(())
    }
}

#[async_trait]
impl Upstream for Scripted {
    fn name(&self) -> &str {
        &self.name
    }

    fn link(&self) -> watch::Receiver<Link> {
        self.link.subscribe()
    }

    async fn path_info(&self, hash: StorePathHash) -> Result<Option<PathInfo>, Error> {
        self.questions.fetch_add(1, Ordering::Relaxed);
        self.answer().await?;
        let paths = self.paths.lock().unwrap();
        Ok(paths.get(&hash).map(|(info, _)| info.clone()))
    }

    async fn path_infos(&self, asked: &[StorePath]) -> Vec<Result<Option<PathInfo>, Error>> {
        self.batches.fetch_add(1, Ordering::Relaxed);
        if let Err(error) = self.answer().await {
            return asked.iter().map(|_| Err(error.clone())).collect();
        }
        let paths = self.paths.lock().unwrap();
        let find = |path: &StorePath| paths.get(&path.hash()).map(|(info, _)| info.clone());
        asked.iter().map(|path| Ok(find(path))).collect()
    }

    fn closures(&self) -> Option<Arc<dyn Closures>> {
        self.closures.lock().unwrap().clone()
    }

    async fn nar(&self, info: &PathInfo) -> Result<Option<NarStream>, Error> {
        self.nars.fetch_add(1, Ordering::Relaxed);
        self.answer().await?;
        let fewer = |left: usize| left.checked_sub(1);
        let (set, got) = (Ordering::Relaxed, Ordering::Relaxed);
        if self.refusals.fetch_update(set, got, fewer).is_ok() {
            return Err(Error::Refused("Connection closed by it port 22".into()));
        }
        let known = self.paths.lock().unwrap().get(&info.path.hash()).cloned();
        let Some((_, nar)) = known else {
            return Ok(None);
        };
        let script = {
            let mut script = self.nar_script.lock().unwrap();
            match &*script {
                NarScript::BreakOnceAt(_) | NarScript::StallOnceAt(_) => {
                    std::mem::take(&mut *script)
                }
                lasting => lasting.clone(),
            }
        };
        let turns = self.nars_max.lock().unwrap().clone();
        let turn = match turns {
            Some(turns) => Some(turns.acquire_owned().await.unwrap()),
            None => None,
        };
        let broken = || Error::Lost("killed".into());
        let chunks = |bytes: &[u8]| -> Vec<Result<Bytes, Error>> {
            bytes
                .chunks(64 << 10)
                .map(|c| Ok(Bytes::copy_from_slice(c)))
                .collect()
        };
        let open = Open::new(&self.nars_open);
        let given: Option<NarStream> = match script {
            NarScript::Gone => None,
            NarScript::Whole => {
                let held = move |_: &Result<Bytes, Error>| {
                    let _held = &turn;
                };
                Some(stream::iter(chunks(&nar)).inspect(held).boxed())
            }
            NarScript::BreakAt(at) | NarScript::BreakOnceAt(at) => {
                let mut items = chunks(&nar[..at.min(nar.len())]);
                items.push(Err(broken()));
                Some(stream::iter(items).boxed())
            }
            NarScript::Metered => {
                let metered = self.metered.subscribe();
                let mut given = 0;
                let items = stream::iter(chunks(&nar)).then(move |chunk| {
                    given += chunk.as_ref().map_or(0, Bytes::len);
                    let (mut metered, end) = (metered.clone(), given);
                    async move {
                        let _ = metered.wait_for(|most| *most >= end).await;
                        chunk
                    }
                });
                Some(items.boxed())
            }
            NarScript::WrittenAt(at) => {
                let mut items = chunks(&nar[..at.min(nar.len())]);
                items.push(Err(Error::Written("a file".into())));
                Some(stream::iter(items).boxed())
            }
            NarScript::StallAt(at) | NarScript::StallOnceAt(at) => {
                let items = chunks(&nar[..at.min(nar.len())]);
                Some(stream::iter(items).chain(stream::pending()).boxed())
            }
            NarScript::FlipFirstBreakAt(at) => {
                let mut bytes = nar[..at.min(nar.len())].to_vec();
                bytes[0] ^= 1;
                let mut items = chunks(&bytes);
                items.push(Err(broken()));
                Some(stream::iter(items).boxed())
            }
            NarScript::FlipLast => {
                let mut bytes = nar.to_vec();
                *bytes.last_mut().unwrap() ^= 1;
                Some(stream::iter(chunks(&bytes)).boxed())
            }
            NarScript::FlipAt(place) => {
                let mut bytes = nar.to_vec();
                bytes[place] ^= 1;
                Some(stream::iter(chunks(&bytes)).boxed())
            }
            NarScript::Long => {
                let bytes = [&nar[..], b"x"].concat();
                Some(stream::iter(chunks(&bytes)).boxed())
            }
            NarScript::FlipAtBreakAt(place, at) => {
                let mut bytes = nar[..at].to_vec();
                bytes[place] ^= 1;
                let mut items = chunks(&bytes);
                items.push(Err(broken()));
                Some(stream::iter(items).boxed())
            }
        };
        let held = |stream: NarStream| {
            let held = stream.inspect(move |_| {
                let _ = &open;
            });
            held.boxed()
        };
        Ok(given.map(held))
    }

    async fn open_nar(&self, info: &PathInfo) -> Result<Option<OpenedNar>, Error> {
        let nar = self.nar(info).await?;
        if self.proves.load(Ordering::Relaxed) {
            let mut digest = NotingDigest::default();
            let paths = self.paths.lock().unwrap();
            digest.update(&paths[&info.path.hash()].1);
            let (_, beginnings) = digest.finish();
            return Ok(nar.map(|nar| OpenedNar::Proven(beginnings, nar)));
        }
        Ok(nar.map(match self.vouches.load(Ordering::Relaxed) {
            true => OpenedNar::Checked,
            false => OpenedNar::Unchecked,
        }))
    }

    async fn keep(&self, path: &StorePath) -> Result<bool, Error> {
        self.kept.lock().unwrap().push(path.clone());
        let paths = self.paths.lock().unwrap();
        Ok(paths.contains_key(&path.hash()))
    }

    async fn keep_many(&self, paths: &[StorePath]) -> Vec<Result<bool, Error>> {
        self.kept_together.lock().unwrap().push(paths.len());
        let mut kept = Vec::new();
        for path in paths {
            kept.push(self.keep(path).await);
        }
        kept
    }
}

/// Counts a NAR stream for as long as somebody holds it.
struct Open(Arc<AtomicUsize>);

impl Open {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(count))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A path of `size` bytes; the number makes name and content its own.
pub fn path(number: u32, size: usize, references: &[&PathInfo]) -> (PathInfo, Bytes) {
    let mut state = u64::from(number) + 1;
    let nar: Vec<u8> = (0..size)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 56) as u8
        })
        .collect();
    let nar = Bytes::from(nar);
    let path = StorePath::compute(
        &StoreDir::default(),
        "output:out",
        "sha256:00",
        &format!("path-{number}"),
    );
    let mut info = PathInfo {
        path: path.unwrap(),
        nar_hash: NarHash::of(&nar),
        nar_size: size as u64,
        references: references.iter().map(|r| r.path.clone()).collect(),
        deriver: None,
        signatures: vec![],
        ca: None,
    };
    info.normalize();
    (info, nar)
}

pub fn key() -> SecretKey {
    SecretKey::from_seed(KeyName::new("test-1").unwrap(), &[7; 32].into())
}

pub fn options() -> substituter::Options {
    substituter::Options {
        fill: filling::Options::default(),
        write_behind: write_behind::Options::default(),
        memory: memory::Options {
            bytes_max: 64 << 20,
            revalidate_after: Duration::from_secs(300),
            negative_ttl: Duration::from_secs(3),
        },
        health: health::Options::default(),
        transfer: transfer::Options {
            whole_bytes_max: 4 << 20,
            whole_kib_max: 64 << 10,
            tail_bytes: 1 << 20,
            stall: Duration::from_millis(200),
            stall_last: Duration::from_millis(600),
            // The machine may be busy: all have their say.
            others_within: Duration::from_secs(10),
            refusal: Duration::from_millis(1600),
            encoder: EncoderOptions::default(),
        },
        prefetch: Some(closure::Options::default()),
        ahead: pulls_ahead().then(ahead::Options::default),
        keep_interval: Duration::from_secs(450),
        tasks_max: 1000,
    }
}

pub fn setup(upstreams: &[Arc<Scripted>], trust: &Trust, encoding: Encoding) -> Setup {
    let member = |(place, upstream): (usize, &Arc<Scripted>)| {
        Arc::new(Member::new(
            UpstreamId(u16::try_from(place).unwrap()),
            Arc::clone(upstream) as Arc<dyn Upstream>,
            trust.clone(),
            health::Options::default(),
            tokio::time::Instant::now().into_std(),
        ))
    };
    Setup {
        members: upstreams.iter().enumerate().map(member).collect(),
        publisher: Publisher {
            keys: vec![key()],
            store_dir: StoreDir::default(),
            encoding,
        },
    }
}

pub fn substituter(upstreams: &[Arc<Scripted>]) -> Substituter {
    new_substituter(
        options(),
        setup(upstreams, &Trust::Operator, Encoding::None),
    )
}

/// A server on a free port of loopback; dropped, it is cut.
pub struct Served {
    pub address: SocketAddr,
    pub stop: watch::Sender<bool>,
    pub task: tokio::task::JoinHandle<()>,
}

pub async fn serve(substituter: Substituter) -> Served {
    serve_with(substituter, server_options()).await.0
}

pub fn server_options() -> server::Options {
    server::Options {
        connections_max: 64,
        idle: Duration::from_secs(30),
        shared_idle: Duration::from_secs(30),
        write_stall: Duration::from_secs(30),
        stop: Duration::from_secs(5),
    }
}

/// Serves on two addresses; the second comes back, too.
pub async fn serve_with(
    substituter: Substituter,
    options: server::Options,
) -> (Served, SocketAddr) {
    let listeners = [
        TcpListener::bind("127.0.0.1:0").await.unwrap(),
        TcpListener::bind("127.0.0.1:0").await.unwrap(),
    ];
    let [address, second] = [0, 1].map(|place| listeners[place].local_addr().unwrap());
    let (stop, stopped) = watch::channel(false);
    let (_, info) = watch::channel(Info {
        cache_info: Bytes::from_static(b"StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 30\n"),
        public_keys: Bytes::from(format!("{}\n", key().public())),
    });
    let task = tokio::spawn(server::serve(
        listeners.into_iter().map(Listener::Tcp).collect(),
        substituter,
        info,
        options,
        stopped,
    ));
    let served = Served {
        address,
        stop,
        task,
    };
    (served, second)
}

/// A response as it came over the wire.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
    /// Whether the connection ended before the body did.
    pub cut: bool,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().skip(1).find_map(|line| {
            let (key, value) = line.split_once(": ")?;
            key.eq_ignore_ascii_case(name).then_some(value)
        })
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }
}

/// Sends one request on a connection of its own and reads all that comes.
pub async fn request(address: SocketAddr, method: &str, target: &str, headers: &str) -> Answer {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request =
        format!("{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut bytes = Vec::new();
    let reset = stream.read_to_end(&mut bytes).await.is_err();
    let end = bytes
        .windows(4)
        .position(|w| w == b"\r\n\r\n")
        .expect("a head");
    let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let raw = &bytes[end + 4..];
    let mut answer = Answer {
        status,
        head,
        body: Vec::new(),
        cut: reset,
    };
    if answer.header("transfer-encoding") == Some("chunked") {
        let (body, ended) = dechunk(raw);
        answer.body = body;
        answer.cut |= !ended;
    } else {
        answer.body = raw.to_vec();
        let length = answer
            .header("content-length")
            .and_then(|l| l.parse::<usize>().ok());
        let expected = if method == "HEAD" { Some(0) } else { length };
        answer.cut |= expected.is_some_and(|length| raw.len() < length);
    }
    answer
}

pub async fn get(address: SocketAddr, target: &str) -> Answer {
    request(address, "GET", target, "").await
}

fn dechunk(mut raw: &[u8]) -> (Vec<u8>, bool) {
    let mut body = Vec::new();
    loop {
        let Some(end) = raw.windows(2).position(|w| w == b"\r\n") else {
            return (body, false);
        };
        let size = std::str::from_utf8(&raw[..end]).unwrap();
        let size = usize::from_str_radix(size, 16).unwrap();
        if size == 0 {
            return (body, true);
        }
        raw = &raw[end + 2..];
        if raw.len() < size + 2 {
            body.extend_from_slice(&raw[..raw.len().min(size)]);
            return (body, false);
        }
        body.extend_from_slice(&raw[..size]);
        raw = &raw[size + 2..];
    }
}

/// The target of a NAR, as the narinfo names it.
pub fn nar_target(narinfo: &Answer) -> String {
    let mut lines = narinfo.text().lines();
    let url = lines.find_map(|line| line.strip_prefix("URL: "));
    format!("/{}", url.unwrap())
}
