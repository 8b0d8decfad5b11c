//! Streams of bytes: digest and compression. No sockets, no files.

pub mod compression;
pub mod digest;
pub mod encoder;
