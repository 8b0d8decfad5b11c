//! A narinfo that is in memory, over a real socket of loopback: request, route, cache, response.
//!
//! One connection, one request at a time, so the figure is a round trip with both ends in it.

#[path = "../tests/support/mod.rs"]
mod support;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use support::{Scripted, path, serve, substituter};

fn hit(criterion: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    let upstream = Scripted::new("a");
    let (info, nar) = path(1, 1000, &[]);
    upstream.add(&info, &nar);
    let served = runtime.block_on(serve(substituter(&[upstream])));
    let mut client = BufReader::new(TcpStream::connect(served.address).unwrap());
    client.get_ref().set_nodelay(true).unwrap();

    let mut group = criterion.benchmark_group("hit");
    group.throughput(Throughput::Elements(1));
    for (name, target, status) in [
        ("narinfo", format!("/{}.narinfo", info.path.hash()), "200"),
        ("absent", format!("/{}.narinfo", "0".repeat(32)), "404"),
    ] {
        let request = format!("GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n");
        // The corpus is checked before it is timed.
        let (head, _) = exchange(&mut client, &request);
        assert!(head.starts_with(&format!("HTTP/1.1 {status}")), "{head}");
        group.bench_function(name, |bencher| {
            bencher.iter(|| exchange(&mut client, &request));
        });
    }
    group.finish();
}

fn exchange(client: &mut BufReader<TcpStream>, request: &str) -> (String, Vec<u8>) {
    client.get_mut().write_all(request.as_bytes()).unwrap();
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        assert_ne!(client.read_line(&mut head).unwrap(), 0, "cut");
    }
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "))
        .unwrap();
    let mut body = vec![0; length.parse().unwrap()];
    client.read_exact(&mut body).unwrap();
    (head, body)
}

criterion_group!(benches, hit);
criterion_main!(benches);
