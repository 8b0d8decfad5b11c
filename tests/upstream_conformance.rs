//! The contract of `Upstream`, over every implementer that can be had here.

mod builder;
mod cache_server;
mod nginx;

use std::collections::HashMap;
use std::time::Duration;

use builder::{Builder, nar_of, quick, up};
use cache_server::{Asking, Authority};
use futures_util::StreamExt as _;
use muster::codec::decompress::Decoder;
use muster::nix::hash::NarHash;
use muster::nix::narinfo::Compression;
use muster::nix::path_info::PathInfo;
use muster::nix::realisation::DrvOutput;
use muster::nix::store_path::{StorePath, StorePathHash};
use muster::upstream::binary_cache::{BinaryCache, BinaryCacheOptions};
use muster::upstream::cache_folder::CacheFolder;
use muster::upstream::local::LocalOptions;
use muster::upstream::memory::Memory;
use muster::upstream::{EncodedNar, Link, NarStream, Upstream};
use nginx::Nginx;

/// What the store under test holds.
struct Content {
    /// Files by the NAR that they have.
    nars: HashMap<StorePath, Vec<u8>>,
    small: StorePath,
    large: StorePath,
    /// A derivation with a build log.
    built: (StorePath, &'static str),
    unbuilt: StorePath,
}

const LOG: &str = "said-while-building";
const LARGE_BYTES: usize = 6 << 20;

fn files() -> Vec<(String, Vec<u8>)> {
    let mut files = vec![
        ("small".to_owned(), b"small\n".to_vec()),
        ("empty".to_owned(), vec![]),
        ("large".to_owned(), noise(LARGE_BYTES)),
    ];
    files.extend((0..30).map(|n| (format!("file-{n}"), noise(n * 1000))));
    files
}

fn noise(len: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(len as u64);
    std::iter::repeat_with(|| random.u8(..)).take(len).collect()
}

fn real() -> (Builder, Content) {
    let builder = Builder::new();
    let files = files();
    let all: Vec<_> = files
        .iter()
        .map(|(n, c)| (n.as_str(), c.as_slice()))
        .collect();
    let paths = builder.add_all(&all);
    let (derivation, _) = builder.build("built", LOG);
    let content = Content {
        small: paths[0].clone(),
        large: paths[2].clone(),
        nars: paths
            .into_iter()
            .zip(files.iter().map(|(_, c)| nar_of(c)))
            .collect(),
        built: (derivation, LOG),
        unbuilt: "i4f75pn3bxkxdk2kld86k5qazq4cqj8i-never.drv"
            .parse()
            .unwrap(),
    };
    (builder, content)
}

fn scripted() -> (Memory, Content) {
    let store = Memory::new("memory");
    let mut nars = HashMap::new();
    let mut paths = vec![];
    for (name, content) in files() {
        let nar = nar_of(&content);
        let hash = muster::nix::base32::encode(&NarHash::of(name.as_bytes()).0[..20]);
        let path: StorePath = format!("{hash}-{name}").parse().unwrap();
        let info = PathInfo {
            path: path.clone(),
            nar_hash: NarHash::of(&nar),
            nar_size: nar.len() as u64,
            references: vec![],
            deriver: None,
            signatures: vec![],
            ca: None,
        };
        store.add(info, nar.clone());
        nars.insert(path.clone(), nar);
        paths.push(path);
    }
    let built: StorePath = "i4f75pn3bxkxdk2kld86k5qazq4cqj8i-built.drv"
        .parse()
        .unwrap();
    store.add_log(built.clone(), format!("{LOG}\n").into_bytes());
    let content = Content {
        small: paths[0].clone(),
        large: paths[2].clone(),
        nars,
        built: (built, LOG),
        unbuilt: "i4f75pn3bxkxdk2kld86k5qazq4cqj8i-never.drv"
            .parse()
            .unwrap(),
    };
    (store, content)
}

async fn whole(mut nar: NarStream) -> Vec<u8> {
    let mut bytes = vec![];
    while let Some(chunk) = nar.next().await {
        let chunk = chunk.unwrap();
        assert!(!chunk.is_empty() && chunk.len() <= 256 << 10);
        bytes.extend(chunk);
    }
    bytes
}

fn absent() -> StorePath {
    "0000000000000000000000000000000a-absent".parse().unwrap()
}

/// All that the trait promises and a healthy store can show.
async fn conforms(upstream: &dyn Upstream, content: &Content) {
    assert!(!upstream.name().is_empty());
    up(upstream).await;
    assert!(matches!(&*upstream.link().borrow(), Link::Up { peer } if !peer.is_empty()));
    path_infos(upstream, content).await;
    nars(upstream, content).await;
    files_of_nars(upstream, content).await;
    dropped(upstream, content).await;

    assert!(upstream.keep(&content.small).await.unwrap());
    assert!(upstream.keep(&content.small).await.unwrap());
    assert!(!upstream.keep(&absent()).await.unwrap());
    // In the order of the questions, with repetitions and gaps.
    let mut paths: Vec<_> = content.nars.keys().cloned().collect();
    paths.insert(3, absent());
    paths.push(paths[0].clone());
    let kept = upstream.keep_many(&paths).await.into_iter();
    let there = paths.iter().map(|path| *path != absent());
    assert!(kept.map(Result::unwrap).eq(there));
    assert!(upstream.keep_many(&[]).await.is_empty());

    let (built, log) = &content.built;
    let said = upstream.build_log(built).await.unwrap().unwrap();
    assert_eq!(String::from_utf8_lossy(&said).trim(), *log);
    assert!(
        upstream
            .build_log(&content.unbuilt)
            .await
            .unwrap()
            .is_none()
    );

    let id = format!("sha256:{}!out", "0".repeat(64))
        .parse::<DrvOutput>()
        .unwrap();
    assert!(upstream.realisation(&id).await.unwrap().is_none());
}

async fn path_infos(upstream: &dyn Upstream, content: &Content) {
    for (path, nar) in &content.nars {
        let info = upstream.path_info(path.hash()).await.unwrap().unwrap();
        assert_eq!(info.path, *path);
        assert_eq!(info.nar_hash, NarHash::of(nar));
        assert_eq!(info.nar_size, nar.len() as u64);
    }
    let nobody = StorePathHash([7; 20]);
    assert!(upstream.path_info(nobody).await.unwrap().is_none());
    assert!(upstream.kept_path_info(nobody).await.unwrap().is_none());
    let kept = upstream.kept_path_info(content.small.hash()).await;
    assert_eq!(kept.unwrap().unwrap().path, content.small);

    // In the order of the questions, with repetitions and gaps.
    let mut paths: Vec<_> = content.nars.keys().cloned().collect();
    paths.insert(3, absent());
    paths.push(paths[0].clone());
    let infos = upstream.path_infos(&paths).await;
    assert_eq!(infos.len(), paths.len());
    for (path, info) in paths.iter().zip(infos) {
        let found = info.unwrap().map(|info| info.path);
        assert_eq!(found.as_ref(), (*path != absent()).then_some(path));
    }
    assert!(upstream.path_infos(&[]).await.is_empty());
}

async fn nars(upstream: &dyn Upstream, content: &Content) {
    let one = async |path: &StorePath, nar: &Vec<u8>| {
        let info = upstream.path_info(path.hash()).await.unwrap().unwrap();
        let stream = upstream.nar(&info).await.unwrap().unwrap();
        assert!(whole(stream).await == *nar, "{path}");
    };
    let all = content.nars.iter().map(|(path, nar)| one(path, nar));
    futures_util::future::join_all(all).await;

    // A path that is gone fails by itself, also among others.
    let mut gone = upstream
        .path_info(content.small.hash())
        .await
        .unwrap()
        .unwrap();
    gone.path = absent();
    let nothing = async |info: PathInfo| assert!(upstream.nar(&info).await.unwrap().is_none());
    let small = &content.nars[&content.small];
    let mixed =
        (0..12).map(|_| async { tokio::join!(nothing(gone.clone()), one(&content.small, small)) });
    futures_util::future::join_all(mixed).await;
    gone.nar_size = LARGE_BYTES as u64;
    nothing(gone).await;
}

/// What a store keeps compressed is the NAR, can be begun anywhere, and has the hash and size that are said.
async fn files_of_nars(upstream: &dyn Upstream, content: &Content) {
    for path in [&content.small, &content.large] {
        let info = upstream.path_info(path.hash()).await.unwrap().unwrap();
        let Some(file) = upstream.encoded_nar(&info).await.unwrap() else {
            let opened = upstream.open_encoded(&info, &nothing(), 0).await;
            assert!(opened.unwrap().is_none());
            continue;
        };
        let from = async |offset| {
            let part = upstream.open_encoded(&info, &file, offset).await;
            let part = part.unwrap().expect("it is there");
            assert!(part.begins_at <= offset);
            let mut bytes = whole(part.bytes).await;
            bytes.drain(..usize::try_from(offset - part.begins_at).unwrap());
            bytes
        };
        let bytes = from(0).await;
        assert_eq!(file.file_size, Some(bytes.len() as u64));
        let hash = file.file_hash.as_ref().and_then(|hash| hash.sha256());
        assert_eq!(hash, Some(NarHash::of(&bytes).0));
        let whole_file = futures_util::stream::iter([Ok::<_, ()>(bytes.clone().into())]);
        let decoded = Decoder::new(1).decode_stream(file.compression, whole_file);
        let decoded: Vec<_> = decoded.unwrap().map(Result::unwrap).collect().await;
        assert!(decoded.concat() == content.nars[path]);
        for offset in [1, bytes.len() / 2, bytes.len() - 1] {
            assert!(from(offset as u64).await == bytes[offset..], "{offset}");
        }
        let mut gone = file.clone();
        gone.place += ".gone";
        let opened = upstream.open_encoded(&info, &gone, 0).await;
        assert!(opened.unwrap().is_none());
    }
    let mut absent_info = upstream.path_info(content.small.hash()).await;
    absent_info.as_mut().unwrap().as_mut().unwrap().path = absent();
    let absent_info = absent_info.unwrap().unwrap();
    assert!(upstream.encoded_nar(&absent_info).await.unwrap().is_none());
}

fn nothing() -> EncodedNar {
    EncodedNar {
        compression: Compression::Zstd,
        file_hash: None,
        file_size: None,
        place: "nowhere".to_owned(),
    }
}

/// Dropping anything at any point is a normal event.
async fn dropped(upstream: &dyn Upstream, content: &Content) {
    let small = upstream
        .path_info(content.small.hash())
        .await
        .unwrap()
        .unwrap();
    let large = upstream
        .path_info(content.large.hash())
        .await
        .unwrap()
        .unwrap();
    for wait in [0, 1, 5, 50] {
        let wait = Duration::from_millis(wait);
        let _ = tokio::time::timeout(wait, upstream.path_info(small.path.hash())).await;
        let _ = tokio::time::timeout(wait, upstream.nar(&small)).await;
        let _ = tokio::time::timeout(wait, upstream.nar(&large)).await;
        let _ = tokio::time::timeout(wait, upstream.keep(&small.path)).await;
        let mut begun = upstream.nar(&large).await.unwrap().unwrap();
        assert!(begun.next().await.unwrap().is_ok());
    }
    let again = whole(upstream.nar(&large).await.unwrap().unwrap()).await;
    assert!(again == content.nars[&content.large]);
    assert!(
        upstream
            .path_info(small.path.hash())
            .await
            .unwrap()
            .is_some()
    );
}

#[tokio::test]
async fn memory() {
    let (store, content) = scripted();
    conforms(&store, &content).await;
}

#[tokio::test]
async fn daemon_on_a_unix_socket() {
    let (builder, content) = real();
    let daemon = builder.daemon();
    conforms(&builder.over_socket(&daemon, quick()), &content).await;
}

#[tokio::test]
async fn own_store_in_place() {
    let (builder, content) = real();
    let daemon = builder.daemon();
    let local = builder.in_place(&daemon.socket, LocalOptions::default());
    conforms(&local, &content).await;
}

#[tokio::test]
async fn daemon_over_ssh() {
    let (builder, content) = real();
    let sshd = builder.sshd("");
    let target = builder.target(sshd.port);
    conforms(&builder.over_ssh(target, quick()), &content).await;
}

/// A cache that real Nix wrote; it goes with its folder.
fn written(builder: &Builder, content: &Content, compression: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    // nginx's worker runs as another user.
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(folder.path(), open).unwrap();
    builder.write_cache(folder.path(), compression, &[&content.built.0]);
    folder
}

fn over_http(builder: &Builder, url: &str, roots: Option<std::path::PathBuf>) -> BinaryCache {
    let mut asking = Asking::at(url);
    asking.store_dir = builder.store_dir.clone();
    asking.roots = roots;
    asking.start()
}

#[tokio::test]
async fn binary_cache_in_a_folder() {
    let (builder, content) = real();
    for compression in ["xz", "zstd", "bzip2", "gzip", "br", "none"] {
        let folder = written(&builder, &content, compression);
        let files = CacheFolder::new(folder.path(), Duration::from_secs(10));
        let cache = BinaryCache::start(
            "file".to_owned(),
            builder.store_dir.clone(),
            std::sync::Arc::new(files),
            Decoder::new(2),
            BinaryCacheOptions::default(),
        );
        conforms(&cache, &content).await;
        let large = cache.path_info(content.large.hash()).await;
        let file = cache.encoded_nar(&large.unwrap().unwrap()).await;
        assert_eq!(file.unwrap().unwrap().compression.name(), compression);
    }
}

#[tokio::test]
async fn binary_cache_over_http() {
    let (builder, content) = real();
    for compression in ["xz", "zstd", "bzip2", "gzip", "br", "none"] {
        let folder = written(&builder, &content, compression);
        let nginx = Nginx::new(folder.path());
        let url = format!("http://127.0.0.1:{}", nginx.port);
        conforms(&over_http(&builder, &url, None), &content).await;
    }
}

#[tokio::test]
async fn binary_cache_over_https() {
    let (builder, content) = real();
    let folder = written(&builder, &content, "zstd");
    let authority = Authority::new();
    let (certificate, key) = authority.certify("localhost", 2100);
    let file = |name: &str, text: String| {
        let file = authority.folder.path().join(name);
        std::fs::write(&file, text).unwrap();
        file
    };
    let certificate = file("certificate.pem", certificate.pem());
    let key = file("key.pem", key.serialize_pem());
    let nginx = Nginx::secure(folder.path(), &certificate, &key);
    let url = format!("https://localhost:{}", nginx.port);
    let cache = over_http(&builder, &url, Some(authority.roots()));
    conforms(&cache, &content).await;
    let link = cache.link().borrow().clone();
    assert!(
        matches!(link, Link::Up { peer } if peer.contains("nginx") && peer.ends_with("HTTP/2"))
    );
}
