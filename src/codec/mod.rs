//! Streams of bytes: compression, digests, parts; no sockets, no files.

pub mod slice;
