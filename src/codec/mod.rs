//! Streams of bytes: digests, compression, parts. No sockets, no files.

pub mod compression;
pub mod compressor;
pub mod decompress;
pub mod decompressor;
pub mod digest;
pub mod slice;
