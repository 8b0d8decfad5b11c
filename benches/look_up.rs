//! Full look-ups (hash part to path, path to path info) on one connection to a real `nix-daemon`.
//!
//! The store holds 10,000 paths of up to eight references; all are found. The daemon's own work is
//! in the figures and is most of them.

#[path = "../tests/private_store/mod.rs"]
#[expect(dead_code, reason = "the tests use the rest")]
mod private_store;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use muster::nix::path_info::PathInfo;
use muster::nix::store_path::StorePath;
use muster::nix::worker_protocol::reply::Reply;
use muster::nix::worker_protocol::request::Request;
use muster::upstream::connection::Connection;
use private_store::PrivateStore;

const PATHS: usize = 10_000;

fn look_up(criterion: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let store = PrivateStore::new();
    let infos = runtime.block_on(store.fill(PATHS));
    let paths: Vec<StorePath> = infos.iter().map(|info| info.path.clone()).collect();
    let daemon = runtime.block_on(store.daemon());
    let connection = &daemon.connection;
    println!("{}", connection.peer());
    // What is timed is checked first.
    let found = runtime.block_on(each_by_itself(connection, &paths));
    assert_eq!(found.len(), PATHS);
    assert!(found.iter().all(|info| infos.contains(info)));
    assert_eq!(runtime.block_on(in_two_batches(connection, &paths)), infos);

    let mut group = criterion.benchmark_group("look_up");
    group.sample_size(11);
    group.throughput(Throughput::Elements(PATHS as u64));
    group.bench_function("each_by_itself", |bencher| {
        bencher.iter(|| runtime.block_on(each_by_itself(connection, &paths)));
    });
    group.bench_function("in_two_batches", |bencher| {
        bencher.iter(|| runtime.block_on(in_two_batches(connection, &paths)));
    });
    let few = &paths[..100];
    group.throughput(Throughput::Elements(few.len() as u64));
    group.bench_function("one_after_the_other", |bencher| {
        bencher.iter(|| {
            runtime.block_on(async {
                for path in few {
                    one(connection, path).await;
                }
            });
        });
    });
    group.finish();
}

async fn one(connection: &Connection, path: &StorePath) -> PathInfo {
    let question = Request::QueryPathFromHashPart(path.hash());
    let Ok(Reply::Path(Some(path))) = connection.ask(question).await else {
        panic!("{path} is not there")
    };
    info(connection.ask(Request::QueryPathInfo(path)).await)
}

/// Looks all up at once, each by two questions, in whatever order they are answered.
async fn each_by_itself(connection: &Connection, paths: &[StorePath]) -> Vec<PathInfo> {
    let look_ups: FuturesUnordered<_> = paths.iter().map(|path| one(connection, path)).collect();
    look_ups.collect().await
}

/// Asks for all paths, then for all path infos.
async fn in_two_batches(connection: &Connection, paths: &[StorePath]) -> Vec<PathInfo> {
    let questions = paths
        .iter()
        .map(|path| Request::QueryPathFromHashPart(path.hash()));
    let found = connection.ask_many(questions.collect()).await;
    let questions = found.into_iter().map(|found| match found {
        Ok(Reply::Path(Some(path))) => Request::QueryPathInfo(path),
        other => panic!("{other:?}"),
    });
    let infos = connection.ask_many(questions.collect()).await;
    infos.into_iter().map(info).collect()
}

fn info(answer: Result<Reply, muster::upstream::Error>) -> PathInfo {
    match answer {
        Ok(Reply::PathInfo(Some(info))) => info,
        other => panic!("{other:?}"),
    }
}

criterion_group!(benches, look_up);
criterion_main!(benches);
