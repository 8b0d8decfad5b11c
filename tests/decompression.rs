//! The decoders: what the real programs write is read, in bounded steps, and nothing else ends well.

use std::convert::Infallible;
use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::stream::{self, Stream, StreamExt as _, TryStreamExt as _};
use muster::codec::decompress::{DecodeError, Decoder};
use muster::codec::digest::{self, DigestError};
use muster::nix::hash::NarHash;
use muster::nix::narinfo::Compression;

/// The programs and their arguments; the same file comes out of each.
const PROGRAMS: [(Compression, &[&str]); 9] = [
    (Compression::Xz, &["xz", "-c"]),
    (Compression::Xz, &["xz", "-c9"]),
    (Compression::Xz, &["xz", "-c0", "--block-size=100000"]),
    (Compression::Lzma, &["xz", "-c", "--format=lzma"]),
    (Compression::Zstd, &["zstd", "-c"]),
    (
        Compression::Zstd,
        &["zstd", "-c", "--ultra", "-22", "--long=27"],
    ),
    (Compression::Bzip2, &["bzip2", "-c"]),
    (Compression::Gzip, &["gzip", "-c"]),
    (Compression::None, &["cat"]),
];

fn nar(bytes: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(7);
    let mut nar = vec![0; bytes];
    for block in nar.chunks_mut(4096).step_by(2) {
        random.fill(block);
    }
    nar
}

fn encode(program: &[&str], text: &[u8]) -> Vec<u8> {
    let mut child = Command::new(program[0])
        .args(&program[1..])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{} is needed for this test: {e}", program[0]));
    let mut stdin = child.stdin.take().unwrap();
    let text = text.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&text));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    assert!(output.status.success());
    output.stdout
}

fn chunks(
    file: &[u8],
    size: usize,
) -> impl Stream<Item = Result<Bytes, Infallible>> + Unpin + use<> {
    let chunks: Vec<_> = file
        .chunks(size)
        .map(Bytes::copy_from_slice)
        .map(Ok)
        .collect();
    stream::iter(chunks)
}

async fn decode(
    compression: Compression,
    file: &[u8],
    chunk: usize,
) -> Result<Vec<u8>, DecodeError<Infallible>> {
    let stream = Decoder::new(2).decode_stream(compression, chunks(file, chunk));
    let mut stream = Box::pin(stream.unwrap());
    let mut all = vec![];
    while let Some(chunk) = stream.try_next().await? {
        let bounded = compression == Compression::None || chunk.len() <= 256 << 10;
        assert!(bounded && !chunk.is_empty());
        all.extend_from_slice(&chunk);
    }
    Ok(all)
}

#[tokio::test]
async fn what_the_real_programs_write_is_read() {
    let nar = nar(3 << 20);
    for (compression, program) in PROGRAMS {
        let file = encode(program, &nar);
        for chunk in [1000, 16 << 10, 64 << 20] {
            let read = decode(compression, &file, chunk).await.unwrap();
            assert!(read == nar, "{program:?} in chunks of {chunk}");
        }
        if compression != Compression::None {
            let cut = decode(compression, &file[..file.len() - 5], 16 << 10).await;
            assert!(
                matches!(cut, Err(DecodeError::Damaged { .. })),
                "{program:?} {cut:?}"
            );
        }
    }
}

#[tokio::test]
async fn a_broken_source_is_told_apart_from_a_damaged_file() {
    let file = encode(&["xz", "-c"], &nar(1 << 20));
    let items = [Ok(Bytes::from(file)), Err("gone")];
    let stream = Decoder::default().decode_stream(Compression::Xz, stream::iter(items));
    let items: Vec<_> = stream.unwrap().collect().await;
    let (last, before) = items.split_last().unwrap();
    assert!(matches!(last, Err(DecodeError::Source("gone"))));
    assert!(before.iter().all(Result::is_ok));
}

/// No multiple of any step, so that it is passed and not met.
const PROMISED: u64 = (1 << 20) + 5;

/// A few KiB that would unpack to gigabytes cost what was promised, and no more.
#[tokio::test]
async fn a_bomb_is_stopped_at_the_promised_size() {
    let zeroes = vec![0; 64 << 20];
    for (compression, program) in PROGRAMS {
        if matches!(compression, Compression::None | Compression::Lzma) {
            continue;
        }
        let file = encode(program, &zeroes).repeat(50);
        let begun = Instant::now();
        let stream = Decoder::default().decode_stream(compression, chunks(&file, 1 << 20));
        let stream = Box::pin(stream.unwrap());
        let items: Vec<_> = digest::verified(stream, NarHash::of(b""), PROMISED)
            .collect()
            .await;
        let (last, before) = items.split_last().unwrap();
        assert!(
            matches!(last, Err(DigestError::Long { .. })),
            "{program:?} {last:?}"
        );
        let bytes: usize = before
            .iter()
            .map(|chunk| chunk.as_ref().map_or(0, Bytes::len))
            .sum();
        assert!((bytes as u64) < PROMISED);
        assert!(
            begun.elapsed() < Duration::from_secs(2),
            "{program:?} {:?}",
            begun.elapsed()
        );
    }
}

/// The time that counts is the thread's own, so that a busy machine does not matter.
#[tokio::test(flavor = "current_thread")]
async fn slow_decoders_leave_the_runtime_alone() {
    let nar = nar(2 << 20);
    for (compression, program) in PROGRAMS {
        let file = encode(program, &nar);
        let stream = Decoder::new(1).decode_stream(compression, chunks(&file, 1 << 20));
        let mut stream = Box::pin(stream.unwrap());
        let mut longest = Duration::ZERO;
        let mut polled =
            std::pin::pin!(async { while stream.try_next().await.unwrap().is_some() {} });
        std::future::poll_fn(|cx| {
            let begun = thread_time();
            let poll = polled.as_mut().poll(cx);
            longest = longest.max(thread_time() - begun);
            poll
        })
        .await;
        // A window of 128 MiB is cleared by the kernel at its first use; bzip2 in place would take 200 ms.
        assert!(
            longest < Duration::from_millis(20),
            "{program:?} {longest:?}"
        );
    }
}

fn thread_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(
        time.tv_sec.unsigned_abs(),
        u32::try_from(time.tv_nsec).unwrap(),
    )
}
