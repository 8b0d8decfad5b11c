//! A muster as the upstream of another.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use muster::cache::memory::UpstreamId;
use muster::codec::compression::Encoding;
use muster::codec::decompress::Decoder;
use muster::nix::path_info::{PathInfo, Trust};
use muster::nix::store_path::StoreDir;
use muster::substituter::member::Member;
use muster::substituter::{Setup, health};
use muster::upstream::binary_cache::{BinaryCache, BinaryCacheOptions};
use muster::upstream::cache_http::CacheHttp;
use muster::upstream::http_client::{Access, HttpClient, HttpOptions};
use muster::upstream::http_tls::tls;
use muster::upstream::http_url::CacheUrl;
use muster::upstream::{Link, Upstream};
use tokio::time::{Instant, timeout};

/// Begins to ask the muster at this address.
pub fn asking(
    address: SocketAddr,
    store_dir: StoreDir,
    options: BinaryCacheOptions,
) -> BinaryCache {
    asking_within(address, store_dir, options, HttpOptions::default())
}

/// The same within other bounds of HTTP.
pub fn asking_within(
    address: SocketAddr,
    store_dir: StoreDir,
    options: BinaryCacheOptions,
    http: HttpOptions,
) -> BinaryCache {
    let name = format!("http://{address}");
    let url = CacheUrl::parse(&name).unwrap();
    let client = HttpClient::new(url, tls(None).unwrap(), Access::default(), http.clone());
    let files = CacheHttp::new(client, http, Decoder::default(), QUERY_TIMEOUT);
    BinaryCache::start(
        name,
        store_dir,
        Arc::new(files),
        Decoder::default(),
        options,
    )
}

/// The same for one that has answered, and what it calls itself; it is asked for no catalog.
pub async fn met(address: SocketAddr) -> (Arc<dyn Upstream>, String) {
    met_with(address, BinaryCacheOptions::default()).await
}

/// The same within other bounds.
pub async fn met_with(
    address: SocketAddr,
    mut options: BinaryCacheOptions,
) -> (Arc<dyn Upstream>, String) {
    options.catalog = None;
    let cache = asking(address, StoreDir::default(), options);
    let mut link = cache.link();
    let up = link.wait_for(|link| matches!(link, Link::Up { .. }));
    let up = timeout(Duration::from_secs(10), up).await.unwrap();
    let Link::Up { peer } = up.unwrap().clone() else {
        unreachable!("that was waited for");
    };
    (Arc::new(cache), peer.to_string())
}

/// An upstream whose word is enough.
pub fn member(number: u16, upstream: Arc<dyn Upstream>) -> Member {
    let now = Instant::now().into_std();
    let (id, options) = (UpstreamId(number), health::Options::default());
    Member::new(id, upstream, Trust::Operator, options, now)
}

/// These upstreams, and nothing compressed.
pub fn setup_of(members: impl IntoIterator<Item = Member>) -> Setup {
    Setup {
        members: members.into_iter().map(Arc::new).collect(),
        publisher: super::setup(&[], &Trust::Operator, Encoding::None).publisher,
    }
}

/// Where a muster is asked for the narinfo of a path.
pub fn narinfo(info: &PathInfo) -> String {
    format!("/{}.narinfo", info.path.hash())
}

const QUERY_TIMEOUT: Duration = Duration::from_secs(5);
