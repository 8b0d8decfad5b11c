//! Streams of bytes: digests, compression, parts. No sockets, no files.

pub mod catalog;
pub mod compression;
pub mod compressor;
pub mod digest;
pub mod slice;
