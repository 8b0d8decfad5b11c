//! Streams of bytes: digest and compression. No sockets, no files.

pub mod compression;
pub mod compressor;
pub mod digest;
