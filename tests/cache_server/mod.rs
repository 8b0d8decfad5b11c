//! A binary cache over HTTP that does what a test tells it: whole files, and every way of going wrong.
//!
//! Plain threads and sockets, so that it can break rules which an HTTP library keeps. Ends with the process.

#![allow(
    dead_code,
    clippy::allow_attributes,
    reason = "each test binary uses its own part"
)]

use std::collections::HashMap;
use std::io::{self, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use muster::codec::decompress::Decoder;
use muster::nix::base32;
use muster::nix::hash::{Algorithm, Hash, NarHash};
use muster::nix::narinfo::{Compression, NarInfo};
use muster::nix::path_info::PathInfo;
use muster::nix::store_path::{StoreDir, StorePath};
use muster::upstream::binary_cache::{BinaryCache, BinaryCacheOptions};
use muster::upstream::cache_http::CacheHttp;
use muster::upstream::http_client::{Access, HttpClient, HttpOptions};
use muster::upstream::http_tls::tls;
use muster::upstream::http_url::CacheUrl;
use rustls::pki_types::PrivateKeyDer;
use rustls::{ServerConfig, ServerConnection, StreamOwned};

/// What becomes of a request.
#[derive(Clone, Debug)]
pub enum Fault {
    /// A status and a header instead of the file.
    Status(u16, &'static str),
    /// The whole length is promised, and the connection closed after so many bytes.
    Cut(usize),
    /// The same, and then nothing more comes.
    Stall(usize),
    /// What is asked for is begun as it should be, and the connection closed after so many bytes of it.
    Portion(usize),
    /// The whole file, whatever part was asked for.
    NoRange,
    /// The same with chunked encoding, without its end.
    CutChunked(usize),
    /// A byte at a time, with a pause after each.
    Drip(Duration),
    /// This length is promised, the file sent, and the connection closed.
    Length(u64),
    /// No head at all.
    Silent,
    /// As it should be, but so much later.
    Late(Duration),
    /// The connection is closed before the head.
    Reset,
    /// The whole length is promised, and the connection reset (RST) after so many bytes.
    ResetAfter(usize),
    /// A head without end.
    HeaderFlood,
    /// Something that is not HTTP.
    NotHttp,
    /// This body, with this header.
    Body(Vec<u8>, &'static str),
    /// This body without end.
    Endless(Vec<u8>),
}

/// What was asked.
#[derive(Clone, Debug)]
pub struct Asked {
    pub method: String,
    pub target: String,
    pub headers: HashMap<String, String>,
}

#[derive(Clone)]
pub struct CacheServer {
    pub port: u16,
    secure: bool,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    files: HashMap<String, Vec<u8>>,
    faults: HashMap<String, Fault>,
    once: HashMap<String, Fault>,
    asked: Vec<Asked>,
    frozen: bool,
    connections: usize,
    head: &'static str,
}

impl CacheServer {
    pub fn new() -> Self {
        Self::start(None)
    }

    /// Speaks TLS with this certificate.
    pub fn secure(config: ServerConfig) -> Self {
        Self::start(Some(Arc::new(config)))
    }

    fn start(config: Option<Arc<ServerConfig>>) -> Self {
        Self::at(TcpListener::bind("127.0.0.1:0").unwrap(), config)
    }

    /// Answers those who connect to a socket, with TLS if there is a certificate for it.
    pub fn at(listener: TcpListener, config: Option<Arc<ServerConfig>>) -> Self {
        let server = Self {
            port: listener.local_addr().unwrap().port(),
            secure: config.is_some(),
            state: Arc::default(),
        };
        server.put(
            "/nix-cache-info",
            "StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 40\n",
        );
        let ours = server.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (server, config) = (ours.clone(), config.clone());
                std::thread::spawn(move || {
                    server.state.lock().unwrap().connections += 1;
                    let wire = stream.try_clone().unwrap();
                    match config {
                        None => server.serve(stream, &wire),
                        Some(config) => {
                            let session = ServerConnection::new(config).unwrap();
                            server.serve(StreamOwned::new(session, stream), &wire);
                        }
                    }
                });
            }
        });
        server
    }

    pub fn url(&self) -> String {
        let scheme = if self.secure { "https" } else { "http" };
        format!("{scheme}://localhost:{}", self.port)
    }

    pub fn put(&self, target: &str, file: impl Into<Vec<u8>>) {
        let mut state = self.state.lock().unwrap();
        state.files.insert(target.to_owned(), file.into());
    }

    /// Says what becomes of all requests for a target from now on.
    pub fn fault(&self, target: &str, fault: Option<Fault>) {
        let mut state = self.state.lock().unwrap();
        match fault {
            Some(fault) => state.faults.insert(target.to_owned(), fault),
            None => state.faults.remove(target),
        };
    }

    /// Says what becomes of the next request for a target alone.
    pub fn fault_once(&self, target: &str, fault: Fault) {
        let mut state = self.state.lock().unwrap();
        state.once.insert(target.to_owned(), fault);
    }

    /// Answers nothing any more and sends nothing more, or all that was asked meanwhile.
    pub fn freeze(&self, frozen: bool) {
        self.state.lock().unwrap().frozen = frozen;
    }

    fn wait_while_frozen(&self) {
        while self.state.lock().unwrap().frozen {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Adds lines to every head, each with `\r\n`.
    pub fn head(&self, lines: &'static str) {
        self.state.lock().unwrap().head = lines;
    }

    pub fn asked(&self) -> Vec<Asked> {
        self.state.lock().unwrap().asked.clone()
    }

    pub fn times_asked(&self, target: &str) -> usize {
        self.asked()
            .iter()
            .filter(|asked| asked.target == target)
            .count()
    }

    pub fn connections(&self) -> usize {
        self.state.lock().unwrap().connections
    }

    /// Adds a path with this NAR, compressed; returns its path info and the target of its NAR.
    pub fn add(&self, name: &str, nar: &[u8], compression: Compression) -> (PathInfo, String) {
        let file = compress(compression, nar);
        let hash = NarHash::of(&file);
        let url = format!("nar/{}.nar.{}", hash.to_base32(), compression.name());
        let narinfo = NarInfo {
            info: info_of(name, nar),
            url: url.clone(),
            compression,
            file_hash: Hash::new(Algorithm::Sha256, &hash.0),
            file_size: Some(file.len() as u64),
        };
        self.put_narinfo(&narinfo);
        let target = format!("/{url}");
        self.put(&target, file);
        (narinfo.info, target)
    }

    pub fn put_narinfo(&self, narinfo: &NarInfo) -> String {
        let target = format!("/{}.narinfo", narinfo.info.path.hash());
        self.put(&target, narinfo.render(&StoreDir::default()));
        target
    }

    /// Adds every file of a folder, and of those in it.
    pub fn put_folder(&self, folder: &std::path::Path) {
        let mut folders = vec![folder.to_owned()];
        while let Some(inner) = folders.pop() {
            for entry in std::fs::read_dir(inner).unwrap().flatten() {
                let path = entry.path();
                if path.is_dir() {
                    folders.push(path);
                } else {
                    let name = path.strip_prefix(folder).unwrap().display().to_string();
                    self.put(&format!("/{name}"), std::fs::read(&path).unwrap());
                }
            }
        }
    }

    /// A file that it has.
    pub fn file(&self, target: &str) -> Vec<u8> {
        let state = self.state.lock().unwrap();
        state
            .files
            .get(target)
            .expect("there is such a file")
            .clone()
    }

    fn serve(&self, stream: impl Read + Write, wire: &TcpStream) {
        let mut stream = BufReader::new(stream);
        while let Ok(Some(asked)) = read_request(&mut stream) {
            self.wait_while_frozen();
            let (file, fault, head) = {
                let mut state = self.state.lock().unwrap();
                let target = asked.target.clone();
                state.asked.push(asked.clone());
                let once = state.once.remove(&target);
                let fault = once.or_else(|| state.faults.get(&target).cloned());
                (state.files.get(&target).cloned(), fault, state.head)
            };
            let out = stream.get_mut();
            let sent = match fault {
                Some(Fault::Late(by)) => {
                    std::thread::sleep(by);
                    answer(out, &asked, file, head)
                }
                Some(fault) => {
                    _ = match fault {
                        Fault::Portion(bytes) => {
                            let mut short = Short(out, bytes);
                            answer(&mut short, &asked, file, head)
                        }
                        Fault::NoRange => {
                            let all = Asked {
                                headers: HashMap::new(),
                                ..asked
                            };
                            answer(out, &all, file, head)
                        }
                        fault => break_it(out, wire, &fault, file.unwrap_or_default(), head),
                    };
                    return;
                }
                None => answer(out, &asked, file, head),
            };
            if sent.is_err() {
                return;
            }
        }
    }
}

fn read_request(stream: &mut impl io::BufRead) -> io::Result<Option<Asked>> {
    let mut line = String::new();
    if stream.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split(' ');
    let mut word = || words.next().unwrap_or_default().to_owned();
    let (method, target) = (word(), word());
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        stream.read_line(&mut line)?;
        match line.trim_end().split_once(':') {
            Some((name, value)) => {
                headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
            }
            None => {
                return Ok(Some(Asked {
                    method,
                    target,
                    headers,
                }));
            }
        }
    }
}

fn answer(
    out: &mut impl Write,
    asked: &Asked,
    file: Option<Vec<u8>>,
    head: &str,
) -> io::Result<()> {
    let Some(file) = file else {
        out.write_all(
            format!("HTTP/1.1 404 Not Found\r\n{head}Content-Length: 0\r\n\r\n").as_bytes(),
        )?;
        return out.flush();
    };
    let range = asked.headers.get("range").and_then(|range| {
        let from = range.strip_prefix("bytes=")?.strip_suffix('-')?;
        from.parse::<usize>().ok()
    });
    let size = file.len();
    let (status, from, more) = match range {
        Some(from) => {
            let more = format!("Content-Range: bytes {from}-{}/{size}\r\n", size - 1);
            ("206 Partial Content", from, more)
        }
        None => ("200 OK", 0, String::new()),
    };
    let part = &file[from..];
    let length = part.len();
    out.write_all(
        format!("HTTP/1.1 {status}\r\n{head}{more}Content-Length: {length}\r\n\r\n").as_bytes(),
    )?;
    out.write_all(part)?;
    out.flush()
}

/// Lets heads pass and so many bytes of a body.
struct Short<W>(W, usize);

impl<W: Write> Write for Short<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.starts_with(b"HTTP/1.1 ") {
            return self.0.write(bytes);
        }
        let size = bytes.len().min(self.1);
        self.1 -= size;
        self.0.write_all(&bytes[..size])?;
        match size < bytes.len() {
            true => Err(io::ErrorKind::BrokenPipe.into()),
            false => Ok(size),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

fn break_it(
    out: &mut impl Write,
    wire: &TcpStream,
    fault: &Fault,
    file: Vec<u8>,
    head: &str,
) -> io::Result<()> {
    let size = file.len();
    let ok = |length: u64| format!("HTTP/1.1 200 OK\r\n{head}Content-Length: {length}\r\n\r\n");
    let forever = Duration::from_secs(3600);
    match fault {
        Fault::Status(status, header) => {
            let text = format!(
                "HTTP/1.1 {status} X\r\n{header}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
            );
            out.write_all(text.as_bytes())?;
        }
        Fault::Cut(bytes) => {
            out.write_all(ok(size as u64).as_bytes())?;
            out.write_all(&file[..*bytes])?;
        }
        // What was asked for matters; see `serve`.
        Fault::Portion(_) | Fault::NoRange | Fault::Late(_) => {}
        Fault::Stall(bytes) => {
            out.write_all(ok(size as u64).as_bytes())?;
            out.write_all(&file[..*bytes])?;
            out.flush()?;
            std::thread::sleep(forever);
        }
        Fault::CutChunked(bytes) => {
            out.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")?;
            write!(out, "{bytes:x}\r\n")?;
            out.write_all(&file[..*bytes])?;
            out.write_all(b"\r\n")?;
        }
        Fault::Drip(pause) => {
            out.write_all(ok(size as u64).as_bytes())?;
            for byte in file {
                out.write_all(&[byte])?;
                out.flush()?;
                std::thread::sleep(*pause);
            }
        }
        Fault::Length(length) => {
            out.write_all(ok(*length).as_bytes())?;
            out.write_all(&file)?;
        }
        Fault::Silent => std::thread::sleep(forever),
        // Closing with unread input resets; here the peer sees a close without a head.
        Fault::Reset => {}
        Fault::ResetAfter(bytes) => {
            out.write_all(ok(size as u64).as_bytes())?;
            out.write_all(&file[..*bytes])?;
            out.flush()?;
            // What was not received yet is lost, too.
            std::thread::sleep(Duration::from_millis(100));
            rustix::net::sockopt::set_socket_linger(wire, Some(Duration::ZERO))?;
        }
        Fault::HeaderFlood => {
            out.write_all(b"HTTP/1.1 200 OK\r\n")?;
            for line in 0_u64.. {
                write!(out, "X-{line}: {}\r\n", "x".repeat(1000))?;
            }
        }
        Fault::NotHttp => out.write_all(b"220 ready to receive mail\r\n")?,
        Fault::Body(body, header) => {
            let length = body.len();
            let text = format!("HTTP/1.1 200 OK\r\n{header}\r\nContent-Length: {length}\r\n\r\n");
            out.write_all(text.as_bytes())?;
            out.write_all(body)?;
        }
        Fault::Endless(body) => {
            out.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")?;
            loop {
                out.write_all(body)?;
            }
        }
    }
    out.flush()
}

/// What a file would be, made by the programs that people use.
pub fn compress(compression: Compression, nar: &[u8]) -> Vec<u8> {
    let program: &[&str] = match compression {
        Compression::None => return nar.to_vec(),
        Compression::Xz => &["xz", "-c1"],
        Compression::Zstd => &["zstd", "-c"],
        Compression::Bzip2 => &["bzip2", "-c"],
        Compression::Gzip => &["gzip", "-c"],
        // Its program is not everywhere.
        Compression::Brotli => return brotli(nar),
        other => panic!("{other:?} is not written here"),
    };
    let mut child = std::process::Command::new(program[0])
        .args(&program[1..])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{} is needed for this test: {e}", program[0]));
    let mut stdin = child.stdin.take().unwrap();
    let nar = nar.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&nar));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    output.stdout
}

fn brotli(nar: &[u8]) -> Vec<u8> {
    use async_compression::codecs::EncodeV2 as _;
    use async_compression::core::util::{PartialBuffer, WriteBuffer};
    let fastest = async_compression::brotli::EncoderParams::default()
        .quality(async_compression::Level::Fastest);
    let mut encoder = async_compression::codecs::brotli::BrotliEncoder::new(fastest);
    let mut all = vec![0; nar.len() + 10_000];
    let mut room = WriteBuffer::new_initialized(&mut all);
    let mut input = PartialBuffer::new(nar);
    while !input.unwritten().is_empty() {
        encoder.encode(&mut input, &mut room).unwrap();
    }
    while !encoder.finish(&mut room).unwrap() {}
    let size = room.written_len();
    all.truncate(size);
    all
}

pub fn info_of(name: &str, nar: &[u8]) -> PathInfo {
    let hash = base32::encode(&NarHash::of(name.as_bytes()).0[..20]);
    let path: StorePath = format!("{hash}-{name}").parse().unwrap();
    PathInfo {
        path,
        nar_hash: NarHash::of(nar),
        nar_size: nar.len() as u64,
        references: vec![],
        deriver: None,
        signatures: vec![],
        ca: None,
    }
}

/// Bounds for tests: a second where people wait ten.
pub fn quick() -> HttpOptions {
    HttpOptions {
        connect_timeout: Duration::from_secs(2),
        head_timeout: Duration::from_secs(2),
        silence: Duration::from_secs(1),
        drip_time: Duration::from_millis(500),
        drip_bytes: 1000,
        ..HttpOptions::default()
    }
}

/// How a cache is to be asked.
pub struct Asking {
    pub url: String,
    pub store_dir: StoreDir,
    pub access: Access,
    pub roots: Option<PathBuf>,
    pub options: HttpOptions,
}

impl Asking {
    pub fn at(url: &str) -> Self {
        Self {
            url: url.to_owned(),
            store_dir: StoreDir::default(),
            access: Access::default(),
            roots: None,
            options: quick(),
        }
    }

    pub fn start(self) -> BinaryCache {
        let cache = CacheUrl::parse(&self.url).unwrap();
        let tls = tls(self.roots.as_deref()).unwrap();
        let client = HttpClient::new(cache, tls, self.access, self.options.clone());
        let query_timeout = self.options.head_timeout;
        let files = CacheHttp::new(client, self.options, Decoder::new(2), query_timeout);
        BinaryCache::start(
            self.url,
            self.store_dir,
            Arc::new(files),
            Decoder::new(2),
            BinaryCacheOptions::default(),
        )
    }
}

/// A certificate authority made for one test.
pub struct Authority {
    pub folder: tempfile::TempDir,
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
}

impl Authority {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut params = rcgen::CertificateParams::new(vec![]).unwrap();
        // A name of its own, or another authority's signature would only look bad.
        let name = format!("test {}", folder.path().display());
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, name);
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        std::fs::write(folder.path().join("roots.pem"), certificate.pem()).unwrap();
        let issuer = rcgen::Issuer::new(params, key);
        Self { folder, issuer }
    }

    pub fn roots(&self) -> PathBuf {
        self.folder.path().join("roots.pem")
    }

    /// Signs for a name, until a year.
    pub fn certify(&self, name: &str, until_year: i32) -> (rcgen::Certificate, rcgen::KeyPair) {
        let mut params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.not_before = rcgen::date_time_ymd(2000, 1, 1);
        params.not_after = rcgen::date_time_ymd(until_year, 1, 1);
        let key = rcgen::KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.issuer).unwrap(), key)
    }

    pub fn server(&self, name: &str, until_year: i32) -> CacheServer {
        CacheServer::secure(self.config(name, until_year))
    }

    /// What a server of this name says of itself until a year.
    pub fn config(&self, name: &str, until_year: i32) -> ServerConfig {
        let (certificate, key) = self.certify(name, until_year);
        let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)
            .unwrap()
    }
}
