//! The encoders: what they make is read by the real `zstd` and `xz`, and a broken NAR never ends well.

use std::convert::Infallible;
use std::io::{Read as _, Write as _};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{self, Stream, StreamExt as _, TryStreamExt as _};
use muster::codec::compression::{EncodeError, Encoder, EncoderOptions, Encoding};

const COMPRESSED: [Encoding; 2] = [Encoding::Zstd, Encoding::Xz];

fn encoder() -> Encoder {
    Encoder::new(EncoderOptions::default())
}

/// Bytes of which every other 4 KiB are zero.
fn nar(bytes: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(7);
    let mut nar = vec![0; bytes];
    for block in nar.chunks_mut(4096).step_by(2) {
        random.fill(block);
    }
    nar
}

fn chunks(
    nar: &[u8],
    size: usize,
) -> impl Stream<Item = Result<Bytes, Infallible>> + Unpin + use<> {
    let chunks: Vec<_> = nar
        .chunks(size)
        .map(Bytes::copy_from_slice)
        .map(Ok)
        .collect();
    stream::iter(chunks)
}

async fn encode(encoding: Encoding, nar: &[u8], chunk: usize) -> Vec<u8> {
    let encoded = encoder().encode_stream(encoding, nar.len() as u64, chunks(nar, chunk));
    encoded.try_concat_bytes().await.unwrap()
}

trait TryConcatBytes<E> {
    async fn try_concat_bytes(self) -> Result<Vec<u8>, E>;
}

impl<S: Stream<Item = Result<Bytes, E>> + Unpin, E> TryConcatBytes<E> for S {
    async fn try_concat_bytes(mut self) -> Result<Vec<u8>, E> {
        let mut all = vec![];
        while let Some(chunk) = self.try_next().await? {
            all.extend_from_slice(&chunk);
        }
        Ok(all)
    }
}

/// What the real program makes of the bytes; `Err` with its words when it refuses them.
fn decode(encoding: Encoding, encoded: &[u8]) -> Result<Vec<u8>, String> {
    let program = match encoding {
        Encoding::None => return Ok(encoded.to_vec()),
        Encoding::Zstd => "zstd",
        Encoding::Xz => "xz",
    };
    let mut child = Command::new(program)
        .arg("-dc")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{program} is needed for this test: {e}"));
    let mut stdin = child.stdin.take().unwrap();
    let encoded = encoded.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&encoded));
    let output = child.wait_with_output().unwrap();
    _ = writer.join().unwrap();
    if output.status.success() {
        Ok(output.stdout)
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

#[tokio::test]
async fn real_programs_read_what_is_made() {
    for size in [0, 1, 100, 4096, 300_000, 3_000_001] {
        let nar = nar(size);
        for encoding in Encoding::ALL {
            let encoded = encode(encoding, &nar, 70_001).await;
            assert!(
                decode(encoding, &encoded).unwrap() == nar,
                "{encoding:?} {size}"
            );
            let whole = encoder().encode_whole(encoding, nar.clone().into()).await;
            assert!(
                decode(encoding, &whole.unwrap()).unwrap() == nar,
                "{encoding:?} {size}"
            );
        }
    }
}

#[tokio::test]
async fn zstd_makes_one_frame_with_size_and_checksum() {
    let nar = nar(1_000_000);
    let encoded = encode(Encoding::Zstd, &nar, 10_000).await;
    let size = zstd::zstd_safe::get_frame_content_size(&encoded);
    assert_eq!(size.unwrap(), Some(1_000_000));
    let frame = zstd::zstd_safe::find_frame_compressed_size(&encoded).unwrap();
    assert_eq!(frame, encoded.len());
    // RFC 8878, 3.1.1.1.1: bit 2 of the frame header says that a checksum follows.
    assert_eq!(encoded[4] & 4, 4);
    assert!(encoded.len() < 600_000, "{} bytes", encoded.len());
}

#[tokio::test]
async fn equal_nars_become_equal_bytes_however_they_come() {
    let nar = nar(2_000_000);
    for encoding in COMPRESSED {
        let first = encode(encoding, &nar, 1_000).await;
        for chunk in [65_536, 262_144, 2_000_000] {
            assert!(
                encode(encoding, &nar, chunk).await == first,
                "{encoding:?} {chunk}"
            );
        }
    }
}

/// A client whose file cannot be kept is given it anew, and would be cut if that came out otherwise.
#[tokio::test]
async fn a_large_nar_becomes_the_same_bytes_beside_many_others() {
    for size in [8 << 20, (8 << 20) + 1, 40_000_003] {
        let nar = nar(size);
        let first = encode(Encoding::Zstd, &nar, 3_000_000).await;
        let shared = encoder();
        let at_once: Vec<_> = [70_001, 262_144, 1 << 20]
            .into_iter()
            .cycle()
            .take(12)
            .map(|chunk| {
                let source = chunks(&nar, chunk);
                shared.encode_stream(Encoding::Zstd, size as u64, source)
            })
            .collect();
        let all = at_once.into_iter().map(TryConcatBytes::try_concat_bytes);
        for encoded in futures_util::future::join_all(all).await {
            assert!(encoded.unwrap() == first, "{size}");
        }
        assert!(decode(Encoding::Zstd, &first).unwrap() == nar, "{size}");
    }
}

#[tokio::test]
async fn a_source_that_fails_leaves_a_frame_without_end() {
    let nar = nar(3_000_000);
    for encoding in COMPRESSED {
        for good in [0, 1, 5, 11, 12] {
            let ok = chunks(&nar, 250_000).take(good).map_err(|e| match e {});
            let broken = ok.chain(stream::iter([Err("gone"), Ok(Bytes::from_static(b"more"))]));
            let mut encoded = encoder().encode_stream(encoding, nar.len() as u64, broken);
            let mut bytes = vec![];
            let error = loop {
                match encoded.next().await.unwrap() {
                    Ok(chunk) => bytes.extend_from_slice(&chunk),
                    Err(error) => break error,
                }
            };
            assert!(matches!(error, EncodeError::Source("gone")));
            assert!(encoded.next().await.is_none());
            let decoded = decode(encoding, &bytes);
            // Nothing at all is no frame either, but `zstd -d` says nothing of it.
            assert!(bytes.is_empty() || decoded.is_err(), "{encoding:?} {good}");
        }
    }
}

#[tokio::test]
async fn another_size_than_promised_is_an_error() {
    let nar = nar(1_000_000);
    for promised in [999_999, 1_000_001] {
        let encoded = encoder().encode_stream(Encoding::Zstd, promised, chunks(&nar, 65_536));
        let broken = encoded.try_concat_bytes().await;
        assert!(matches!(broken, Err(EncodeError::Encoder(_))), "{promised}");
    }
}

#[tokio::test]
async fn none_passes_everything_through() {
    let source = stream::iter([Ok(Bytes::from_static(b"a")), Err("gone"), Ok(Bytes::new())]);
    let mut plain = encoder().encode_stream(Encoding::None, 1, source);
    assert_eq!(plain.next().await.unwrap().unwrap(), "a");
    assert!(matches!(
        plain.next().await,
        Some(Err(EncodeError::Source("gone")))
    ));
    assert!(plain.next().await.is_none());
}

/// Counts the chunks that were asked for.
fn counted(
    asked: &Arc<AtomicUsize>,
) -> impl Stream<Item = Result<Bytes, Infallible>> + Unpin + use<> {
    let asked = Arc::clone(asked);
    let random = Bytes::from(nar(8_192)).slice(..4_096);
    stream::repeat_with(move || {
        asked.fetch_add(1, Ordering::Relaxed);
        Ok(random.clone())
    })
}

#[tokio::test]
async fn a_client_that_does_not_read_stops_the_source() {
    for encoding in COMPRESSED {
        let asked = Arc::new(AtomicUsize::new(0));
        let mut encoded = encoder().encode_stream(encoding, 1 << 40, counted(&asked));
        encoded.next().await.unwrap().unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
        let before = asked.load(Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(asked.load(Ordering::Relaxed), before);
        drop(encoded);
        assert_eq!(
            Arc::strong_count(&asked),
            1,
            "the source is dropped with the stream"
        );
    }
}

#[tokio::test]
async fn slow_readers_do_not_hold_the_permit() {
    let one = Encoder::new(EncoderOptions {
        concurrent: 1,
        ..EncoderOptions::default()
    });
    let asked = Arc::new(AtomicUsize::new(0));
    let mut stalled = vec![];
    for _ in 0..5 {
        let mut encoded = one.encode_stream(Encoding::Zstd, 1 << 40, counted(&asked));
        encoded.next().await.unwrap().unwrap();
        stalled.push(encoded);
    }
    let nar = nar(3_000_000);
    let other = one.encode_stream(Encoding::Zstd, nar.len() as u64, chunks(&nar, 65_536));
    let encoded = tokio::time::timeout(Duration::from_secs(20), other.try_concat_bytes()).await;
    assert!(decode(Encoding::Zstd, &encoded.unwrap().unwrap()).unwrap() == nar);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_transfers_share_the_permits() {
    let nar = nar(1_500_000);
    let two = Encoder::new(EncoderOptions {
        concurrent: 2,
        ..EncoderOptions::default()
    });
    let transfers = (0..20).map(|_| {
        two.encode_stream(Encoding::Zstd, nar.len() as u64, chunks(&nar, 100_000))
            .try_concat_bytes()
    });
    let all = futures_util::future::join_all(transfers).await;
    for encoded in all {
        let mut decoded = vec![];
        let encoded = encoded.unwrap();
        zstd::Decoder::new(&*encoded)
            .unwrap()
            .read_to_end(&mut decoded)
            .unwrap();
        assert!(decoded == nar);
    }
}
