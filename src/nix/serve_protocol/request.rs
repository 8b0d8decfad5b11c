//! The questions that can be asked, and their bytes.
//!
//! Each is its command number and its arguments. Source: the commands in `opServe`, `nix-store.cc`.

use bytes::BytesMut;

use crate::nix::store_path::{StoreDir, StorePath};
use crate::nix::worker_protocol::wire::Writer;

/// A question to a store. All only read: none of them substitutes, builds or locks anything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Which of these paths are there? Answered by [`Event::Paths`](super::session::Event::Paths).
    QueryValidPaths(Vec<StorePath>),
    /// What the store knows of these paths: an [`Event::Info`](super::session::Event::Info) for each
    /// that is there, then [`Event::InfosEnd`](super::session::Event::InfosEnd).
    QueryPathInfos(Vec<StorePath>),
    /// These paths and all that they refer to, answered as the first. A server ends when one of
    /// them is not there.
    QueryClosure(Vec<StorePath>),
}

/// Writes requests for stores in one directory.
#[derive(Clone, Debug)]
pub struct Encoder {
    store_dir: StoreDir,
}

/// What the session waits for once a request was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected(pub(super) Awaited);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Awaited {
    Paths,
    /// At most so many.
    Infos(usize),
}

impl Request {
    /// Returns the command's name in Nix.
    pub fn name(&self) -> &'static str {
        match self {
            Self::QueryValidPaths(_) => "QueryValidPaths",
            Self::QueryPathInfos(_) => "QueryPathInfos",
            Self::QueryClosure(_) => "QueryClosure",
        }
    }
}

impl Encoder {
    /// Makes an encoder for a server whose store lies in `store_dir`.
    pub fn new(store_dir: StoreDir) -> Self {
        Self { store_dir }
    }

    /// Appends the bytes of a request.
    pub fn encode(&self, request: &Request, out: &mut BytesMut) -> Expected {
        let mut out = Writer(out);
        let (paths, awaited) = match request {
            Request::QueryValidPaths(paths) => {
                let (do_not_lock, do_not_substitute) = (0, 0);
                out.number(1);
                out.number(do_not_lock);
                out.number(do_not_substitute);
                (paths, Awaited::Paths)
            }
            Request::QueryPathInfos(paths) => {
                out.number(2);
                (paths, Awaited::Infos(paths.len()))
            }
            Request::QueryClosure(paths) => {
                let without_outputs = 0;
                out.number(7);
                out.number(without_outputs);
                (paths, Awaited::Paths)
            }
        };
        out.number(paths.len() as u64);
        for path in paths {
            out.texts_joined(&[self.store_dir.as_str(), "/", path.as_str()]);
        }
        Expected(awaited)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_written_as_nix_writes_them() {
        let path: StorePath = "i4f75pn3bxkxdk2kld86k5qazq4cqj8i-hello".parse().unwrap();
        let absolute = "/nix/store/i4f75pn3bxkxdk2kld86k5qazq4cqj8i-hello";
        let encode = |request| {
            let mut out = BytesMut::new();
            Encoder::new(StoreDir::default()).encode(&request, &mut out);
            out
        };
        let tail = |words: &[u64]| {
            let mut bytes = BytesMut::new();
            let mut out = Writer(&mut bytes);
            words.iter().for_each(|word| out.number(*word));
            out.text(absolute);
            bytes
        };
        let paths = vec![path];
        let valid = encode(Request::QueryValidPaths(paths.clone()));
        assert_eq!(valid, tail(&[1, 0, 0, 1]));
        let infos = encode(Request::QueryPathInfos(paths.clone()));
        assert_eq!(infos, tail(&[2, 1]));
        assert_eq!(encode(Request::QueryClosure(paths)), tail(&[7, 0, 1]));
    }
}
