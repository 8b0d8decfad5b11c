//! Streams of bytes: digests, compression, parts. No sockets, no files.

pub mod compression;
pub mod digest;
pub mod encoder;
pub mod slice;
