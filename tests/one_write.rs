//! What is known is answered where the request is read, and with one write: no thread is woken for it, and
//! the client's kernel has a head and its body at once.

mod support;

use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

use bytes::Bytes;
use futures_util::FutureExt as _;
use muster::server::listener::Listener;
use muster::server::{self, Info};
use muster::substituter::Substituter;
use socket2::{Domain, SockAddr, Socket, Type};
use support::*;
use tokio::sync::watch;

const ROUNDS: usize = 200;

/// Asks again and again over one connection that keeps writes apart. Returns how many there were.
fn writes(mut stream: UnixStream, target: &str, end: &str) -> usize {
    let ask = format!("GET {target} HTTP/1.1\r\nHost: x\r\n\r\n");
    let mut buffer = vec![0; 64 << 10];
    let mut writes = 0;
    for _ in 0..ROUNDS {
        stream.write_all(ask.as_bytes()).unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(end.as_bytes()) {
            let read = stream.read(&mut buffer).unwrap();
            assert_ne!(read, 0, "{}", String::from_utf8_lossy(&answer));
            answer.extend_from_slice(&buffer[..read]);
            writes += 1;
        }
    }
    writes
}

/// Serves on a local socket of whole messages, each of them one write, and asks there.
async fn writes_from(substituter: Substituter, target: String, end: String) -> usize {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let listener = seqpacket();
    let address = SockAddr::unix(&socket).unwrap();
    listener.bind(&address).unwrap();
    listener.listen(1).unwrap();
    listener.set_nonblocking(true).unwrap();
    let listener = UnixListener::from(OwnedFd::from(listener));
    let listener = tokio::net::UnixListener::from_std(listener).unwrap();
    let (_stop, stopped) = watch::channel(false);
    let (_, info) = watch::channel(Info {
        cache_info: Bytes::new(),
        public_keys: Bytes::new(),
    });
    let listeners = vec![Listener::Unix(listener)];
    tokio::spawn(server::serve(
        listeners,
        substituter,
        info,
        server_options(),
        stopped,
    ));
    let asked = tokio::task::spawn_blocking(move || {
        let client = seqpacket();
        client.connect(&address).unwrap();
        writes(OwnedFd::from(client).into(), &target, &end)
    });
    asked.await.unwrap()
}

fn seqpacket() -> Socket {
    Socket::new(Domain::UNIX, Type::SEQPACKET, None).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_known_is_one_write() {
    let a = Scripted::new("a");
    let (info, nar) = path(1, 1000, &[]);
    a.add(&info, &nar);
    let substituter = substituter(&[a]);
    let (there, absent) = (info.path.hash(), path(2, 0, &[]).0.path.hash());
    let text = substituter.narinfo(there).await.unwrap();
    let text = String::from_utf8(text.to_vec()).unwrap();
    assert!(substituter.narinfo(absent).await.is_none());

    let target = format!("/{there}.narinfo");
    assert_eq!(writes_from(substituter.clone(), target, text).await, ROUNDS);
    let target = format!("/{absent}.narinfo");
    let end = "\r\n\r\n".to_owned();
    assert_eq!(writes_from(substituter.clone(), target, end).await, ROUNDS);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_known_waits_for_nobody() {
    let a = Scripted::new("a");
    let (info, nar) = path(1, 1000, &[]);
    a.add(&info, &nar);
    let substituter = substituter(&[a]);
    let (there, absent) = (info.path.hash(), path(2, 0, &[]).0.path.hash());
    let first = substituter.narinfo(there).await;
    assert!(first.is_some() && substituter.narinfo(absent).await.is_none());
    for _ in 0..ROUNDS {
        assert_eq!(
            substituter.narinfo(there).now_or_never(),
            Some(first.clone())
        );
        assert_eq!(substituter.narinfo(absent).now_or_never(), Some(None));
    }
}

/// What the count above rests on.
#[test]
fn two_writes_would_be_seen() {
    let (near, far) = Socket::pair(Domain::UNIX, Type::SEQPACKET, None).unwrap();
    let (near, mut far) = (
        OwnedFd::from(near).into(),
        UnixStream::from(OwnedFd::from(far)),
    );
    let server = thread::spawn(move || {
        let mut request = [0; 1024];
        while far.read(&mut request).unwrap() > 0 {
            far.write_all(b"head\r\n\r\n").unwrap();
            far.write_all(b"body").unwrap();
        }
    });
    assert_eq!(writes(near, "/", "body"), 2 * ROUNDS);
    server.join().unwrap();
}
