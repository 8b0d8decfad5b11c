//! A NAR of 64 MiB on its way to a client: checked, and checked and compressed.
//!
//! Every other 4 KiB are random, the rest repeat. The corpus and what becomes of it are checked
//! before anything is timed.

use std::convert::Infallible;

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use futures_util::stream::{self, Stream, TryStreamExt as _};
use muster::codec::compression::{Encoder, EncoderOptions, Encoding};
use muster::codec::digest;
use muster::nix::hash::NarHash;
use tokio::runtime::Runtime;

const NAR_BYTES: usize = 64 << 20;
const CHUNK_BYTES: usize = 64 << 10;

fn nar_stream(benches: &mut Criterion) {
    let runtime = Runtime::new().expect("a runtime");
    let nar = corpus();
    let nar_hash = NarHash::of(&nar);
    let encoder = Encoder::new(EncoderOptions::default());
    runtime.block_on(check(&nar, nar_hash, &encoder));

    let mut group = benches.benchmark_group("nar_stream");
    group.sample_size(10);
    group.throughput(Throughput::Bytes(NAR_BYTES as u64));
    for encoding in [Encoding::None, Encoding::Zstd] {
        group.bench_function(encoding.name(), |bench| {
            bench.iter(|| {
                let read = serve(&nar, nar_hash, &encoder, encoding);
                runtime.block_on(read.try_fold(0, async |sum, chunk| Ok(sum + chunk.len())))
            });
        });
    }
    group.finish();
}

/// What a client gets of the NAR.
fn serve(
    nar: &Bytes,
    nar_hash: NarHash,
    encoder: &Encoder,
    encoding: Encoding,
) -> impl Stream<Item = Result<Bytes, String>> + use<> {
    let checked = digest::verified(chunks(nar), nar_hash, NAR_BYTES as u64);
    encoder
        .encode_stream(encoding, NAR_BYTES as u64, checked)
        .map_err(|error| error.to_string())
}

fn chunks(nar: &Bytes) -> impl Stream<Item = Result<Bytes, Infallible>> + Unpin + use<> {
    let nar = nar.clone();
    let starts = (0..NAR_BYTES).step_by(CHUNK_BYTES);
    stream::iter(starts.map(move |start| Ok(nar.slice(start..start + CHUNK_BYTES))))
}

async fn check(nar: &Bytes, nar_hash: NarHash, encoder: &Encoder) {
    let plain = read(serve(nar, nar_hash, encoder, Encoding::None)).await;
    assert!(plain == *nar);
    let encoded = read(serve(nar, nar_hash, encoder, Encoding::Zstd)).await;
    let ratio = encoded.len() * 100 / NAR_BYTES;
    assert!((45..55).contains(&ratio), "half compressible: {ratio} %");
    assert!(zstd::decode_all(&*encoded).expect("a zstd frame") == *nar);
}

async fn read(stream: impl Stream<Item = Result<Bytes, String>>) -> Vec<u8> {
    let read = stream.try_fold(vec![], async |mut all: Vec<u8>, chunk| {
        all.extend_from_slice(&chunk);
        Ok(all)
    });
    read.await.expect("an unbroken stream")
}

fn corpus() -> Bytes {
    let mut random = fastrand::Rng::with_seed(1);
    let mut nar = vec![b'x'; NAR_BYTES];
    for block in nar.chunks_mut(4096).step_by(2) {
        random.fill(block);
    }
    nar.into()
}

criterion_group!(benches, nar_stream);
criterion_main!(benches);
