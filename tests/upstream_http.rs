//! A binary cache over HTTP in every bad state: it costs what its bounds say, and nothing wrong comes out.

mod builder;
mod cache_server;

use std::time::{Duration, Instant};

use builder::{nar_of, up};
use bytes::Bytes;
use cache_server::{Asking, Authority, CacheServer, Fault, compress, info_of};
use futures_util::StreamExt as _;
use muster::codec::digest;
use muster::nix::build_trace::BuildTraceKey;
use muster::nix::hash::NarHash;
use muster::nix::narinfo::{Compression, NarInfo};
use muster::nix::path_info::PathInfo;
use muster::nix::realisation::DrvOutput;
use muster::upstream::http_client::Access;
use muster::upstream::http_credentials::Credentials;
use muster::upstream::{Error, Link, Upstream};

const COMPRESSIONS: [Compression; 6] = [
    Compression::None,
    Compression::Xz,
    Compression::Zstd,
    Compression::Bzip2,
    Compression::Gzip,
    Compression::Brotli,
];

fn noise(len: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(len as u64);
    std::iter::repeat_with(|| random.u8(..)).take(len).collect()
}

/// Reads a NAR as the relay does; the bytes that came and how it ended.
async fn read(cache: &dyn Upstream, info: &PathInfo) -> (Vec<u8>, Result<(), String>) {
    let nar = match cache.nar(info).await {
        Ok(Some(nar)) => nar,
        Ok(None) => return (vec![], Err("gone".to_owned())),
        Err(error) => return (vec![], Err(error.to_string())),
    };
    let mut checked = digest::verified(nar, info.nar_hash, info.nar_size);
    let mut bytes = vec![];
    while let Some(chunk) = checked.next().await {
        match chunk {
            Ok(chunk) => bytes.extend_from_slice(&chunk),
            Err(error) => {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                return (
                    bytes,
                    Err(format!("{error}: {}", cause.unwrap_or_default())),
                );
            }
        }
    }
    (bytes, Ok(()))
}

async fn down(cache: &dyn Upstream) -> String {
    let mut link = cache.link();
    let settled = link.wait_for(|link| !matches!(link, Link::Connecting { .. }));
    match &*tokio::time::timeout(Duration::from_secs(10), settled)
        .await
        .unwrap()
        .unwrap()
    {
        Link::Down { error, .. } => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn every_compression_comes_out_as_the_nar() {
    let server = CacheServer::new();
    let cache = Asking::at(&server.url()).start();
    let nar = nar_of(&noise(700_000));
    for compression in COMPRESSIONS {
        let (info, _) = server.add(compression.name(), &nar, compression);
        let found = cache.path_info(info.path.hash()).await.unwrap().unwrap();
        assert_eq!(found, info);
        let (bytes, end) = read(&cache, &found).await;
        assert_eq!(end, Ok(()), "{compression:?}");
        assert!(bytes == nar);
    }
    let agent = server
        .asked()
        .remove(0)
        .headers
        .remove("user-agent")
        .unwrap();
    assert_eq!(agent, format!("muster/{}", env!("CARGO_PKG_VERSION")));
}

fn loses_little(fault: &Fault, size: usize) -> bool {
    match fault {
        Fault::Length(length) => *length >= size as u64,
        Fault::Cut(left) => *left == size - 1,
        _ => false,
    }
}

#[tokio::test]
async fn a_broken_body_never_ends_well() {
    let server = CacheServer::new();
    let cache = Asking::at(&server.url()).start();
    let nar = nar_of(&noise(600_000));
    for compression in COMPRESSIONS {
        let (info, target) = server.add(compression.name(), &nar, compression);
        let file = compress(compression, &nar);
        let half = file.len() / 2;
        let mut flipped = file.clone();
        flipped[half] ^= 1;
        let other = compress(compression, &nar_of(&noise(600_001)));
        for (fault, seconds) in [
            (Fault::Cut(0), 1),
            (Fault::Cut(half), 1),
            (Fault::Cut(file.len() - 1), 1),
            (Fault::CutChunked(half), 1),
            (Fault::Stall(half), 3),
            (Fault::Length(file.len() as u64 + 1), 1),
            (Fault::Length(10 << 30), 1),
            (Fault::Length(half as u64), 1),
            (Fault::Body(flipped, "X: y"), 1),
            (Fault::Body(other, "X: y"), 1),
            (Fault::Body(vec![], "X: y"), 1),
            (Fault::Body(b"<html>sign in</html>".to_vec(), "X: y"), 1),
            (Fault::Reset, 1),
            (Fault::Silent, 4),
            (Fault::HeaderFlood, 4),
            (Fault::NotHttp, 1),
            (Fault::Drip(Duration::from_millis(5)), 4),
            (Fault::Status(500, "X: y"), 1),
            (Fault::Status(404, "X: y"), 1),
        ] {
            server.fault(&target, Some(fault.clone()));
            let begun = Instant::now();
            let (bytes, end) = read(&cache, &info).await;
            // Of some files the last bytes say nothing about the NAR.
            match end {
                Ok(()) => assert!(
                    bytes == nar && loses_little(&fault, file.len()),
                    "{fault:?}"
                ),
                Err(_) => assert!(bytes.len() < nar.len(), "{compression:?} {fault:?}"),
            }
            assert!(nar.starts_with(&bytes) || matches!(fault, Fault::Body(..)));
            // Twice, for a machine with much else to do.
            let bound = Duration::from_secs(2 * seconds + 1);
            assert!(begun.elapsed() < bound, "{fault:?} {:?}", begun.elapsed());
            server.fault(&target, None);
            up(&cache).await;
            // Three 500s running would have it left alone.
            assert_eq!(read(&cache, &info).await.1, Ok(()), "after {fault:?}");
        }
    }
}

#[tokio::test]
async fn a_broken_narinfo_is_no_answer() {
    let server = CacheServer::new();
    let cache = Asking::at(&server.url()).start();
    let (info, _) = server.add("path", &nar_of(b"x"), Compression::None);
    let target = format!("/{}.narinfo", info.path.hash());
    let huge = vec![b'x'; (1 << 20) + 1];
    for fault in [
        Fault::Cut(50),
        Fault::Stall(50),
        Fault::Drip(Duration::from_millis(50)),
        Fault::Silent,
        Fault::Reset,
        Fault::NotHttp,
        Fault::HeaderFlood,
        Fault::Length(10 << 30),
        Fault::Endless(b"Sig: x:eA==\n".repeat(100)),
        Fault::Body(huge, "X: y"),
        Fault::Body(vec![], "X: y"),
        Fault::Body(b"\xff\xfe".to_vec(), "X: y"),
        Fault::Body(b"<html>sign in</html>".to_vec(), "Content-Type: text/html"),
        Fault::Body(b"x".to_vec(), "Content-Encoding: gzip"),
        Fault::Body(b"x".to_vec(), "Content-Encoding: rot13"),
        Fault::Status(401, "WWW-Authenticate: Basic"),
        Fault::Status(400, "X: y"),
        Fault::Status(418, "X: y"),
        Fault::Status(500, "X: y"),
        Fault::Status(206, "Content-Range: bytes 0-0/1"),
    ] {
        server.fault(&target, Some(fault.clone()));
        let begun = Instant::now();
        let answer = cache.path_info(info.path.hash()).await;
        assert!(answer.is_err(), "{fault:?} {answer:?}");
        assert!(
            begun.elapsed() < Duration::from_secs(9),
            "{fault:?} {:?}",
            begun.elapsed()
        );
        server.fault(&target, None);
        up(&cache).await;
        assert!(
            cache.path_info(info.path.hash()).await.unwrap().is_some(),
            "{fault:?}"
        );
    }
    for status in [404, 403, 410] {
        server.fault(&target, Some(Fault::Status(status, "X: y")));
        assert!(
            cache.path_info(info.path.hash()).await.unwrap().is_none(),
            "{status}"
        );
    }
}

#[tokio::test]
async fn a_connection_that_goes_between_two_questions_costs_nothing() {
    let server = CacheServer::new();
    let cache = Asking::at(&server.url()).start();
    let (info, _) = server.add("path", &nar_of(b"x"), Compression::None);
    let target = format!("/{}.narinfo", info.path.hash());
    for _ in 0..5 {
        server.fault_once(&target, Fault::Reset);
        assert!(cache.path_info(info.path.hash()).await.unwrap().is_some());
    }
}

#[tokio::test]
async fn questions_share_connections() {
    let server = CacheServer::new();
    let cache = Asking::at(&server.url()).start();
    let mut paths = vec![];
    for number in 0..300 {
        let (info, _) = server.add(&format!("path-{number}"), &nar_of(b"x"), Compression::None);
        paths.push(info.path);
    }
    let infos = cache.path_infos(&paths).await;
    for (path, info) in paths.iter().zip(infos) {
        assert_eq!(info.unwrap().unwrap().path, *path);
    }
    assert!(server.connections() <= 26, "{}", server.connections());
}

/// The relay stops at the promised size; what brings no bytes at all is stopped by the cache itself.
#[tokio::test]
async fn bombs_cost_what_was_promised() {
    let server = CacheServer::new();
    let cache = Asking::at(&server.url()).start();
    let nar = nar_of(&noise(1000));
    let skipped = {
        let mut frame = 0x184d_2a50_u32.to_le_bytes().to_vec();
        frame.extend(60_000_u32.to_le_bytes());
        frame.extend([0; 60_000]);
        frame
    };
    let empty_member = compress(Compression::Gzip, b"");
    // Blocks of metadata. The window's bit is in the first alone; the second reaches over the next body's first.
    let skipped_br = {
        let metadata = |size: u32| 0b10_0110 | (size - 1) << 6;
        let mut body = (metadata(60_000) << 1).to_le_bytes()[..3].to_vec();
        body.extend([0; 60_000]);
        body.extend(&metadata(60_003).to_le_bytes()[..3]);
        body
    };
    let zeroes = vec![0; 64 << 20];
    for (compression, body) in [
        (Compression::Zstd, compress(Compression::Zstd, &zeroes)),
        (Compression::Xz, compress(Compression::Xz, &zeroes)),
        (Compression::Bzip2, compress(Compression::Bzip2, &zeroes)),
        (Compression::Brotli, compress(Compression::Brotli, &zeroes)),
        (Compression::Zstd, skipped),
        (Compression::Brotli, skipped_br),
        (Compression::Gzip, empty_member),
        (Compression::None, vec![0; 1 << 20]),
    ] {
        let (info, target) = server.add(compression.name(), &nar, compression);
        server.fault(&target, Some(Fault::Endless(body)));
        let begun = Instant::now();
        let (bytes, end) = read(&cache, &info).await;
        // By its size, and not because it could not be read.
        let cause = end.unwrap_err();
        assert!(!cause.contains("damaged"), "{compression:?} {cause}");
        assert!(bytes.len() < nar.len(), "{compression:?}");
        assert!(
            begun.elapsed() < Duration::from_secs(20),
            "{:?}",
            begun.elapsed()
        );
    }
}

#[tokio::test]
async fn an_overloaded_cache_is_left_alone() {
    let server = CacheServer::new();
    let cache = Asking::at(&server.url()).start();
    let (info, _) = server.add("path", &nar_of(b"x"), Compression::None);
    let target = format!("/{}.narinfo", info.path.hash());
    for (fault, questions) in [
        (Fault::Status(429, "Retry-After: 1"), 1),
        (Fault::Status(503, "Retry-After: 1"), 1),
        (Fault::Status(500, "Retry-After: 1"), 3),
    ] {
        let before = server.times_asked(&target);
        server.fault(&target, Some(fault));
        for _ in 0..50 {
            assert!(cache.path_info(info.path.hash()).await.is_err());
        }
        assert_eq!(server.times_asked(&target) - before, questions);
        server.fault(&target, None);
        tokio::time::sleep(Duration::from_millis(1100)).await;
        assert!(cache.path_info(info.path.hash()).await.unwrap().is_some());
    }
}

#[tokio::test]
async fn redirects_are_followed_at_home_alone() {
    let server = CacheServer::new();
    let other = CacheServer::new();
    let nar = nar_of(&noise(1000));
    let (info, target) = server.add("path", &nar, Compression::None);
    other.put("/elsewhere", nar.clone());
    server.put("/moved", nar.clone());
    let credentials = Credentials::parse("me:secret").unwrap();
    let mut asking = Asking::at(&server.url());
    asking.access.credentials = Some(credentials.clone());
    let cache = asking.start();

    for status in [301, 302, 303, 307, 308] {
        server.fault(&target, Some(Fault::Status(status, "Location: /moved")));
        assert_eq!(read(&cache, &info).await, (nar.clone(), Ok(())), "{status}");
    }
    let away: &'static str = format!("Location: {}/elsewhere", other.url()).leak();
    for header in [
        away,
        "Location: //localhost:1/x",
        "Location: ../../etc/passwd",
        "Location: file:///etc/passwd",
        "Location: ",
        "X: no location",
    ] {
        server.fault(&target, Some(Fault::Status(302, header)));
        let (bytes, end) = read(&cache, &info).await;
        assert!(bytes.is_empty() && end.is_err(), "{header}");
    }
    assert!(other.asked().is_empty());
    // Round and round.
    server.fault(
        &target,
        Some(Fault::Status(302, format!("Location: {target}").leak())),
    );
    let before = server.times_asked(&target);
    let (_, end) = read(&cache, &info).await;
    assert!(end.unwrap_err().contains("redirects"));
    assert_eq!(server.times_asked(&target) - before, 6);

    // Where it is allowed, without what is ours.
    let mut asking = Asking::at(&server.url());
    asking.access = Access {
        credentials: Some(credentials),
        hosts: vec![format!("localhost:{}", other.port)],
    };
    let cache = asking.start();
    server.fault(&target, Some(Fault::Status(302, away)));
    assert_eq!(read(&cache, &info).await, (nar, Ok(())));
    assert_eq!(other.asked().len(), 1);
    assert!(!other.asked()[0].headers.contains_key("authorization"));
    let ours = server.asked();
    let shown = ours
        .iter()
        .filter_map(|asked| asked.headers.get("authorization"));
    assert!(shown.clone().all(|header| header == "Basic bWU6c2VjcmV0"));
    assert_eq!(shown.count(), ours.len());
}

#[tokio::test]
async fn a_narinfo_leads_nowhere_else() {
    let server = CacheServer::new();
    let other = CacheServer::new();
    let nar = nar_of(&noise(1000));
    other.put("/x.nar", nar.clone());
    server.put("/nar/x.nar?hash=y", nar.clone());
    let narinfo = |url: &str| NarInfo {
        info: info_of("path", &nar),
        url: url.to_owned(),
        compression: Compression::None,
        file_hash: None,
        file_size: None,
    };
    let foreign = format!("{}/x.nar", other.url());
    let cache = Asking::at(&server.url()).start();
    for url in [
        foreign.as_str(),
        "../x.nar",
        "nar/%2e%2e/%2e%2e/x",
        "file:///etc/passwd",
        "//h/x",
    ] {
        server.put_narinfo(&narinfo(url));
        let error = cache
            .path_info(narinfo(url).info.path.hash())
            .await
            .unwrap_err();
        assert!(matches!(error, Error::Unsupported(_)), "{url} {error}");
    }
    for url in [
        "nar/x.nar?hash=y",
        "/nar/x.nar?hash=y",
        &format!("{}/nar/x.nar?hash=y", server.url()),
    ] {
        server.put_narinfo(&narinfo(url));
        let info = cache
            .path_info(narinfo(url).info.path.hash())
            .await
            .unwrap()
            .unwrap();
        assert_eq!(read(&cache, &info).await, (nar.clone(), Ok(())), "{url}");
    }
    let mut asking = Asking::at(&server.url());
    asking.access.hosts = vec!["localhost".to_owned()];
    let cache = asking.start();
    server.put_narinfo(&narinfo(&foreign));
    let info = cache
        .path_info(narinfo("x").info.path.hash())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(read(&cache, &info).await, (nar, Ok(())));
}

#[tokio::test]
async fn a_nar_that_was_repacked_is_found_again() {
    let server = CacheServer::new();
    let cache = Asking::at(&server.url()).start();
    let nar = nar_of(&noise(1000));
    let (info, target) = server.add("path", &nar, Compression::Xz);
    assert!(cache.path_info(info.path.hash()).await.unwrap().is_some());
    server.fault(&target, Some(Fault::Status(404, "X: y")));
    let (_, moved) = server.add("path", &nar, Compression::Zstd);
    assert_eq!(read(&cache, &info).await, (nar.clone(), Ok(())));
    // And with another NAR it is another path's.
    server.fault(&moved, Some(Fault::Status(404, "X: y")));
    server.add("path", &nar_of(b"other"), Compression::None);
    assert_eq!(read(&cache, &info).await.1, Err("gone".to_owned()));
    let unseen = Asking::at(&server.url()).start();
    assert_eq!(read(&unseen, &info).await.1, Err("gone".to_owned()));
}

#[tokio::test]
async fn no_cache_is_down_with_a_reason() {
    let server = CacheServer::new();
    let link = async |fault| {
        server.fault("/nix-cache-info", Some(fault));
        down(&Asking::at(&server.url()).start()).await
    };
    assert!(
        link(Fault::Status(404, "X: y"))
            .await
            .contains("binary cache")
    );
    assert!(
        link(Fault::Status(401, "X: y"))
            .await
            .contains("credentials-file")
    );
    assert!(link(Fault::Status(500, "X: y")).await.contains("500"));
    assert!(link(Fault::Silent).await.contains("no answer"));
    assert!(link(Fault::NotHttp).await.contains("HTTP"));
    let body = Fault::Body(b"StoreDir: /gnu/store\n".to_vec(), "X: y");
    assert!(link(body).await.contains("/gnu/store"));
    let refused = Asking::at("http://127.0.0.1:1").start();
    assert!(down(&refused).await.contains("refused"));

    // It comes back by itself.
    server.fault("/nix-cache-info", Some(Fault::Reset));
    let cache = Asking::at(&server.url()).start();
    assert!(matches!(
        cache.path_info(info_of("x", b"").path.hash()).await,
        Err(Error::Down(_))
    ));
    server.fault("/nix-cache-info", None);
    cache.reconnect();
    up(&cache).await;
}

/// What was connected before a sleep is dead after it, and silent for minutes.
#[tokio::test]
async fn a_wake_up_connects_anew() {
    let server = CacheServer::new();
    let cache = Asking::at(&server.url()).start();
    let (info, _) = server.add("path", &nar_of(b"x"), Compression::None);
    for _ in 0..3 {
        assert!(cache.path_info(info.path.hash()).await.unwrap().is_some());
    }
    assert_eq!(server.connections(), 1);
    let mut link = cache.link();
    link.mark_unchanged();
    cache.reconnect();
    tokio::time::timeout(Duration::from_secs(5), link.changed())
        .await
        .unwrap()
        .unwrap();
    up(&cache).await;
    assert!(cache.path_info(info.path.hash()).await.unwrap().is_some());
    assert_eq!(server.connections(), 2);
}

#[tokio::test]
async fn what_answers_is_said() {
    let server = CacheServer::new();
    server.head("Server: nginx/1.22.1\r\n");
    let cache = Asking::at(&server.url()).start();
    up(&cache).await;
    match &*cache.link().borrow() {
        Link::Up { peer } => assert_eq!(&**peer, "binary cache, nginx/1.22.1, HTTP/1.1"),
        other => panic!("{other:?}"),
    };
}

#[tokio::test]
async fn tls_is_judged() {
    let authority = Authority::new();
    let asking = |server: &CacheServer, authority: &Authority| Asking {
        roots: Some(authority.roots()),
        ..Asking::at(&server.url())
    };
    let good = authority.server("localhost", 2100);
    let (info, _) = good.add("path", &nar_of(b"x"), Compression::Zstd);
    let cache = asking(&good, &authority).start();
    assert_eq!(read(&cache, &info).await, (nar_of(b"x"), Ok(())));

    let expired = authority.server("localhost", 2001);
    let cause = down(&asking(&expired, &authority).start()).await;
    assert!(
        cause.contains("expired") || cause.contains("Expired"),
        "{cause}"
    );
    let misnamed = authority.server("other.example", 2100);
    let cause = down(&asking(&misnamed, &authority).start()).await;
    assert!(cause.contains("name") || cause.contains("Name"), "{cause}");
    let cause = down(&asking(&good, &Authority::new()).start()).await;
    assert!(
        cause.contains("UnknownIssuer") || cause.contains("unknown"),
        "{cause}"
    );
    let plain = CacheServer::new();
    let url = plain.url().replace("http:", "https:");
    let cause = down(
        &Asking {
            roots: Some(authority.roots()),
            ..Asking::at(&url)
        }
        .start(),
    )
    .await;
    assert!(!cause.is_empty());
    // Accepted, and no word of TLS.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("https://localhost:{}", silent.local_addr().unwrap().port());
    let begun = Instant::now();
    let cause = down(
        &Asking {
            roots: Some(authority.roots()),
            ..Asking::at(&url)
        }
        .start(),
    )
    .await;
    assert!(cause.contains("no connection within"), "{cause}");
    assert!(begun.elapsed() < Duration::from_secs(8));
}

/// Some servers know no other method, HEAD neither.
#[tokio::test]
async fn nothing_but_get_is_asked() {
    let server = CacheServer::new();
    let cache = Asking::at(&server.url()).start();
    up(&cache).await;
    let nar = nar_of(&noise(700_000));
    let (info, target) = server.add("there", &nar, Compression::Zstd);
    let absent = info_of("absent", &nar);
    for (info, is_there) in [(&info, true), (&absent, false)] {
        let found = cache.path_info(info.path.hash()).await.unwrap();
        assert_eq!(found.is_some(), is_there);
        let found = cache.path_infos(std::slice::from_ref(&info.path)).await;
        assert_eq!(found[0].as_ref().unwrap().is_some(), is_there);
        assert_eq!(cache.keep(&info.path).await.unwrap(), is_there);
    }
    // Whole, as it is, from its middle, and after it broke.
    assert!(read(&cache, &info).await == (nar.clone(), Ok(())));
    let encoded = cache.encoded_nar(&info).await.unwrap().unwrap();
    for offset in [0, 1000] {
        let part = cache.open_encoded(&info, &encoded, offset).await;
        assert!(part.unwrap().is_some(), "{offset}");
    }
    server.fault_once(&target, Fault::Cut(1000));
    assert!(read(&cache, &info).await.1.is_err());
    let drv = "i4f75pn3bxkxdk2kld86k5qazq4cqj8i-built.drv";
    let key = BuildTraceKey::parse(&format!("{drv}/out.doi")).unwrap();
    let output: DrvOutput = format!("sha256:{}!out", "0".repeat(64)).parse().unwrap();
    let log = cache.build_log(&drv.parse().unwrap()).await;
    assert!(log.unwrap().is_none());
    assert!(cache.realisation(&output).await.unwrap().is_none());
    assert!(cache.build_trace(&key).await.unwrap().is_none());

    let asked = server.asked();
    for kind in [
        "/nix-cache-info",
        "/nar/",
        "/log/",
        "/realisations/",
        "/build-trace-v2/",
    ] {
        let is_asked = asked.iter().any(|asked| asked.target.starts_with(kind));
        assert!(is_asked, "{kind} of {asked:?}");
    }
    let others: Vec<_> = asked.iter().filter(|it| it.method != "GET").collect();
    assert!(others.is_empty(), "{others:?}");
}

#[tokio::test]
async fn texts_and_logs_may_be_packed() {
    let server = CacheServer::new();
    let cache = Asking::at(&server.url()).start();
    let drv: muster::nix::store_path::StorePath = "i4f75pn3bxkxdk2kld86k5qazq4cqj8i-built.drv"
        .parse()
        .unwrap();
    let target = format!("/log/{drv}");
    let log = b"said while building\n";
    server.put(&target, *log);
    assert_eq!(cache.build_log(&drv).await.unwrap().unwrap(), log[..]);
    for compression in [
        Compression::Bzip2,
        Compression::Xz,
        Compression::Zstd,
        Compression::Gzip,
    ] {
        server.put(&target, compress(compression, log));
        assert_eq!(
            cache.build_log(&drv).await.unwrap().unwrap(),
            log[..],
            "{compression:?}"
        );
        let header: &'static str = format!("Content-Encoding: {}", compression.name()).leak();
        server.fault(
            &target,
            Some(Fault::Body(compress(compression, log), header)),
        );
        assert_eq!(
            cache.build_log(&drv).await.unwrap().unwrap(),
            log[..],
            "{header}"
        );
        server.fault(&target, None);
    }
    let bomb = compress(Compression::Bzip2, &vec![b'x'; 65 << 20]);
    server.put(&target, bomb);
    assert!(cache.build_log(&drv).await.is_err());

    // A narinfo with carriage returns, and one that was packed on its way.
    let (info, _) = server.add("path", &nar_of(b"x"), Compression::None);
    let narinfo = format!("/{}.narinfo", info.path.hash());
    let text = NarInfo {
        info: info.clone(),
        url: "nar/x".to_owned(),
        compression: Compression::None,
        file_hash: None,
        file_size: None,
    };
    let text = text.render(&muster::nix::store_path::StoreDir::default());
    server.put(&narinfo, text.replace('\n', "\r\n"));
    assert_eq!(
        cache.path_info(info.path.hash()).await.unwrap(),
        Some(info.clone())
    );
    let packed = compress(Compression::Gzip, text.as_bytes());
    server.fault(
        &narinfo,
        Some(Fault::Body(packed, "Content-Encoding: gzip")),
    );
    assert_eq!(cache.path_info(info.path.hash()).await.unwrap(), Some(info));
}

/// A transfer that nobody reads, and one that is dropped, leave room for the next.
#[tokio::test]
async fn dropped_transfers_make_room() {
    let server = CacheServer::new();
    let cache = Asking::at(&server.url()).start();
    let nar = nar_of(&noise(6 << 20));
    let (info, _) = server.add("path", &nar, Compression::None);
    for _ in 0..20 {
        let mut begun = cache.nar(&info).await.unwrap().unwrap();
        let first: Result<Bytes, Error> = begun.next().await.unwrap();
        assert!(first.is_ok());
    }
    let (bytes, end) = read(&cache, &info).await;
    assert_eq!((NarHash::of(&bytes), end), (info.nar_hash, Ok(())));
}
