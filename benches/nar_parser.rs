//! Finding the end of a NAR: one of many small files, and one of a single large file.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use muster::nix::nar::NarParser;
use nix_archive::nar::{NamedNode, Node, encode_tree};

const CHUNK_BYTES: usize = 64 << 10;

fn nar_parser(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("nar_parser");
    for (name, nar) in [("small_files", small_files()), ("large_file", large_file())] {
        assert!(parse(&nar), "the corpus is one NAR");
        group.throughput(Throughput::Bytes(nar.len() as u64));
        group.bench_function(name, |bencher| bencher.iter(|| parse(&nar)));
    }
    group.finish();
}

fn parse(nar: &[u8]) -> bool {
    let mut parser = NarParser::with_size_max(nar.len() as u64);
    let mut ended = false;
    for chunk in nar.chunks(CHUNK_BYTES) {
        ended = parser.push(chunk).unwrap().ended;
    }
    ended
}

/// A hundred folders of a hundred files with 100 to 600 bytes.
fn small_files() -> Vec<u8> {
    let contents = vec![b'x'; 600];
    let names: Vec<String> = (0..100).map(|place| format!("name-{place:03}")).collect();
    let files: Vec<NamedNode<'_>> = names
        .iter()
        .enumerate()
        .map(|(place, name)| NamedNode {
            name: name.as_bytes(),
            node: Node::Regular {
                executable: place % 7 == 0,
                contents: &contents[..100 + 5 * place],
            },
        })
        .collect();
    let folder = |name| NamedNode {
        name,
        node: Node::Directory(&files),
    };
    let folders: Vec<_> = names.iter().map(|name| folder(name.as_bytes())).collect();
    encode(&Node::Directory(&folders))
}

fn large_file() -> Vec<u8> {
    encode(&Node::Regular {
        executable: false,
        contents: &vec![7; 64 << 20],
    })
}

fn encode(tree: &Node<'_>) -> Vec<u8> {
    let mut nar = Vec::new();
    encode_tree(&mut nar, tree).unwrap();
    nar
}

criterion_group!(benches, nar_parser);
criterion_main!(benches);
