//! The heartbeats of the live catalog, as they come over the wire: a "no" is said only while the last one is younger
//! than a second, so some may be late and none is far from the next.

mod builder;
#[path = "support/mod.rs"]
mod support;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use builder::{Builder, up};
use muster::codec::catalog::wire::{Decoder, Frame};
use muster::codec::compression::Encoding;
use muster::substituter::publish::Publisher;
use muster::substituter::{Setup, Substituter};
use muster::upstream::local::LocalOptions;
use support::peer;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// For so long, in each second at least so many.
const SECONDS: u64 = 3;
const BEATS_A_SECOND: usize = 3;
/// A machine with much else to do is looked at for longer until it has a moment.
const PATIENCE: Duration = Duration::from_secs(60);
const MEDIAN_MAX: Duration = Duration::from_millis(300);

/// A feed that is read as it comes.
struct Feed {
    stream: BufReader<TcpStream>,
    decoder: Decoder,
}

impl Feed {
    async fn open(address: SocketAddr) -> Self {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream
            .write_all(b"GET /muster/catalog HTTP/1.1\r\nHost: x\r\n\r\n")
            .await
            .unwrap();
        let mut stream = BufReader::new(stream);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert!(stream.read_line(&mut head).await.unwrap() > 0, "{head}");
        }
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        assert!(head.to_lowercase().contains("transfer-encoding: chunked"));
        Self {
            stream,
            decoder: Decoder::default(),
        }
    }

    /// Waits for a chunk of the body and returns how many heartbeats it completes.
    async fn beats(&mut self) -> usize {
        let mut size = String::new();
        self.stream.read_line(&mut size).await.unwrap();
        let size = usize::from_str_radix(size.trim(), 16).expect("the length of a chunk");
        assert!(size > 0, "the feed has no end");
        let mut chunk = vec![0; size + 2];
        self.stream.read_exact(&mut chunk).await.unwrap();
        let mut beats = 0;
        let take = |frame| {
            beats += usize::from(matches!(frame, Frame::Beat(_)));
            Ok(())
        };
        self.decoder.push(&chunk[..size], take).expect("a feed");
        beats
    }
}

/// Whether each second of the last few has its heartbeats.
fn is_steady(beats: &[Instant]) -> bool {
    let (Some(first), Some(last)) = (beats.first(), beats.last()) else {
        return false;
    };
    let Some(begin) = last.checked_sub(Duration::from_secs(SECONDS)) else {
        return false;
    };
    // Any second begins after one of them, or at one.
    let seconds = beats.iter().filter(|at| **at >= begin);
    let mut seconds = seconds.filter(|at| last.duration_since(**at) >= Duration::from_secs(1));
    *first <= begin
        && seconds.all(|from| {
            let until = *from + Duration::from_secs(1);
            let within = beats.iter().filter(|at| **at > *from && **at <= until);
            within.count() >= BEATS_A_SECOND
        })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quiet_store_is_heard_of_three_times_in_any_second() {
    let builder = Builder::new();
    builder.add("file", b"file");
    let local = builder.in_place(Path::new("/nowhere/socket"), LocalOptions::default());
    up(&local).await;
    let setup = Setup {
        members: vec![Arc::new(
            peer::member(0, Arc::new(local)).of_own_store(true),
        )],
        publisher: Publisher {
            keys: vec![support::key()],
            store_dir: builder.store_dir.clone(),
            encoding: Encoding::None,
        },
    };
    let substituter = Substituter::new(support::options(), setup, None);
    let served = support::serve(substituter).await;
    let mut feed = Feed::open(served.address).await;
    let mut beats = Vec::new();
    let steady = async {
        while !is_steady(&beats) {
            for _ in 0..feed.beats().await {
                beats.push(Instant::now());
            }
        }
    };
    let steady = timeout(PATIENCE, steady).await.is_ok();
    let mut gaps: Vec<_> = beats.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!(steady, "{gaps:?}");
    gaps.sort_unstable();
    let median = gaps[gaps.len() / 2];
    assert!(median <= MEDIAN_MAX, "{median:?} of {gaps:?}");
}
