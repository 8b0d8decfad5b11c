//! Streams of bytes: digest and compression. No sockets, no files.

pub mod digest;
