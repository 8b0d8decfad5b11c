//! What other servers say of a path: each reads into what is meant, and each URL leads where it should.

mod cache_server;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use cache_server::{Asking, CacheServer, compress};
use futures_util::TryStreamExt as _;
use muster::nix::hash::NarHash;
use muster::nix::narinfo::{Compression, NarInfo};
use muster::nix::path_info::Trust;
use muster::nix::signature::PublicKey;
use muster::nix::store_path::StoreDir;
use muster::upstream::Upstream as _;
use muster::upstream::dialect::read_narinfo;
use muster::upstream::http_url::CacheUrl;

/// Names a file of `tests/vectors/dialects` and embeds it.
macro_rules! dialect {
    ($name:literal, $compression:ident, $url:literal) => {
        (
            $name,
            include_str!(concat!("vectors/dialects/", $name, ".narinfo")),
            Compression::$compression,
            $url,
        )
    };
}

const SERVER: &str = "https://cache.example.org/some/cache";

/// Name, text, compression, and what the URL resolves to at [`SERVER`].
const DIALECTS: [(&str, &str, Compression, &str); 16] = [
    dialect!(
        "cache-nixos-org",
        Xz,
        "https://cache.example.org/some/cache/nar/1pqhvffkws1w6b52gbsh805di9qayr77ipr4hvclpbza8i94hd81.nar.xz"
    ),
    dialect!(
        "nix-push",
        Bzip2,
        "https://cache.example.org/some/cache/1pqhvffkws1w6b52gbsh805di9qayr77ipr4hvclpbza8i94hd81.nar.bz2"
    ),
    dialect!(
        "sparse",
        Bzip2,
        "https://cache.example.org/some/cache/nar/1pqhvffkws1w6b52gbsh805di9qayr77ipr4hvclpbza8i94hd81.nar.bz2"
    ),
    dialect!(
        "nix-serve",
        None,
        "https://cache.example.org/some/cache/nar/xcwmxwa8vpv4xpmpfaibqv6czqk0iq4f-1ph6nz4k516p3yayhhv60hzagxaal4aa7mwpj3ys2zvbd21vnrga.nar"
    ),
    dialect!(
        "nix-serve-ng",
        None,
        "https://cache.example.org/some/cache/nar/xcwmxwa8vpv4xpmpfaibqv6czqk0iq4f-1ph6nz4k516p3yayhhv60hzagxaal4aa7mwpj3ys2zvbd21vnrga.nar"
    ),
    dialect!(
        "harmonia",
        None,
        "https://cache.example.org/some/cache/nar/1ph6nz4k516p3yayhhv60hzagxaal4aa7mwpj3ys2zvbd21vnrga.nar?hash=xcwmxwa8vpv4xpmpfaibqv6czqk0iq4f"
    ),
    dialect!(
        "hydra",
        Xz,
        "https://cache.example.org/some/cache/nar/xcwmxwa8vpv4xpmpfaibqv6czqk0iq4f-foo"
    ),
    dialect!(
        "attic",
        Zstd,
        "https://cache.example.org/some/cache/nar/xcwmxwa8vpv4xpmpfaibqv6czqk0iq4f.nar"
    ),
    dialect!(
        "attic-2022",
        Zstd,
        "https://cache.example.org/some/cache/nar/xcwmxwa8vpv4xpmpfaibqv6czqk0iq4f.nar"
    ),
    dialect!(
        "ncps",
        Xz,
        "https://cache.example.org/some/cache/nar/1pqhvffkws1w6b52gbsh805di9qayr77ipr4hvclpbza8i94hd81.nar"
    ),
    dialect!(
        "cachix",
        Zstd,
        "https://cache.example.org/some/cache/nar/0135485244eaaf4bd98624df784ef60aa7d80a4050af27ca323c683e9ddb10df.nar.zst"
    ),
    dialect!(
        "selector4nix",
        None,
        "https://cache.example.org/some/cache/nar/1ph6nz4k516p3yayhhv60hzagxaal4aa7mwpj3ys2zvbd21vnrga.nar?upstream_query=aGFzaD14Y3dteHdhOHZwdjR4cG1wZmFpYnF2NmN6cWswaXE0Zg"
    ),
    dialect!(
        "peerix",
        None,
        "https://cache.example.org/some/cache/10.0.0.7/12304/local/xcwmxwa8vpv4xpmpfaibqv6czqk0iq4f-1ph6nz4k516p3yayhhv60hzagxaal4aa7mwpj3ys2zvbd21vnrga.nar"
    ),
    dialect!(
        "absolute",
        Xz,
        "https://cache.example.org/nar/1pqhvffkws1w6b52gbsh805di9qayr77ipr4hvclpbza8i94hd81.nar.xz"
    ),
    dialect!(
        "sri-hashes",
        Brotli,
        "https://cache.example.org/some/cache/nar/0135485244eaaf4bd98624df784ef60aa7d80a4050af27ca323c683e9ddb10df.nar.br?sha256=0135485244eaaf4bd98624df784ef60aa7d80a4050af27ca323c683e9ddb10df"
    ),
    dialect!(
        "carriage-returns",
        Xz,
        "https://cache.example.org/some/cache/nar/1pqhvffkws1w6b52gbsh805di9qayr77ipr4hvclpbza8i94hd81.nar.xz"
    ),
];

const MEANT: &str = include_str!("vectors/narinfo/zstd-self-reference-two-signatures.narinfo");

#[test]
fn each_reads_into_what_is_meant() {
    let store_dir = StoreDir::default();
    let meant = NarInfo::parse(MEANT, &store_dir).unwrap();
    let key = PublicKey::parse("test-1:PHRSweHfQGggVdPwJBrhjwr12+bpNowAK1TixrpG51M=").unwrap();
    for (name, text, compression, _) in DIALECTS {
        let read =
            read_narinfo(text.as_bytes(), &store_dir).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(read.compression, compression, "{name}");
        let without_file = matches!(
            name,
            "nix-serve" | "nix-serve-ng" | "hydra" | "peerix" | "attic"
        );
        assert_eq!(read.file_hash.is_none(), without_file, "{name}");
        assert_eq!(read.file_size.is_none(), without_file, "{name}");
        let mut info = read.info;
        if name == "sparse" {
            assert_eq!(info.deriver, None, "{name}");
            info.deriver = meant.info.deriver.clone();
        }
        assert_eq!(info, meant.info, "{name}");
        // What real Nix signed holds in every dialect.
        assert!(
            info.verify(&Trust::Keys(vec![key.clone()]), &store_dir)
                .is_ok(),
            "{name}"
        );
    }
}

#[test]
fn each_url_leads_where_it_should() {
    let server = CacheUrl::parse(SERVER).unwrap();
    for (name, text, _, expected) in DIALECTS {
        let read = read_narinfo(text.as_bytes(), &StoreDir::default()).unwrap();
        let uri = server.resolve(&read.url, &[]).unwrap();
        assert_eq!(uri.to_string(), expected, "{name}");
    }
}

/// The same text, of a NAR that we have, as a server at `origin` says it; each hash in its own form.
fn of_our_nar(text: &str, nar: &[u8], origin: &str) -> String {
    let hash = NarHash::of(nar);
    let mut ours = String::new();
    for line in text.split_inclusive('\n') {
        let end = line.strip_prefix(line.trim_end()).unwrap_or_default();
        match line.trim_end().split_once(": ") {
            Some(("NarHash", said)) => {
                let hash = match said {
                    sri if sri.starts_with("sha256-") => {
                        format!("sha256-{}", STANDARD.encode(hash.0))
                    }
                    hex if hex.len() == "sha256:".len() + 64 => {
                        format!("sha256:{}", muster::nix::hash::encode_hex(&hash.0))
                    }
                    _ => hash.to_string(),
                };
                ours.push_str(&format!("NarHash: {hash}{end}"));
            }
            Some(("NarSize", _)) => ours.push_str(&format!("NarSize: {}{end}", nar.len())),
            Some(("URL", url)) => {
                let url = url.replace("https://cache.example.org", origin);
                ours.push_str(&format!("URL: {url}{end}"));
            }
            _ => ours.push_str(line),
        }
    }
    ours
}

#[tokio::test]
async fn each_nar_is_had_where_its_url_leads() {
    let meant = NarInfo::parse(MEANT, &StoreDir::default()).unwrap().info;
    let mut random = fastrand::Rng::with_seed(5);
    let nar: Vec<u8> = std::iter::repeat_with(|| random.u8(..))
        .take(70_000)
        .collect();
    for (name, text, compression, url) in DIALECTS {
        let server = CacheServer::new();
        let at = format!("{}/some/cache", server.url());
        let text = of_our_nar(text, &nar, &server.url());
        let target = url.replace("https://cache.example.org", "");
        server.put("/some/cache/nix-cache-info", "StoreDir: /nix/store\n");
        server.put(&format!("/some/cache/{}.narinfo", meant.path.hash()), text);
        server.put(&target, compress(compression, &nar));

        let cache = Asking::at(&at).start();
        let info = cache.path_info(meant.path.hash()).await.unwrap().unwrap();
        assert_eq!(info.path, meant.path, "{name}");
        assert_eq!(info.nar_hash, NarHash::of(&nar), "{name}");
        let chunks = cache.nar(&info).await.unwrap().unwrap();
        let read: Vec<_> = chunks.try_collect().await.unwrap();
        assert!(read.concat() == nar, "{name}");
        assert_eq!(server.times_asked(&target), 1, "{name}");
    }
}

#[test]
fn no_other_server_is_believed_an_absolute_one() {
    let (_, text, _, url) = DIALECTS.into_iter().find(|d| d.0 == "absolute").unwrap();
    let read = read_narinfo(text.as_bytes(), &StoreDir::default()).unwrap();
    let other = CacheUrl::parse("https://other.example.org").unwrap();
    assert!(other.resolve(&read.url, &[]).is_err());
    let allowed = ["cache.example.org".to_owned()];
    assert_eq!(other.resolve(&read.url, &allowed).unwrap().to_string(), url);
}
