//! Streams of bytes: digests, compression, parts. No sockets, no files.

pub mod beginnings;
pub mod catalog;
pub mod chunks;
pub mod closure_wire;
pub mod compression;
pub mod compressor;
pub mod decompress;
pub mod decompressor;
pub mod digest;
pub mod file_check;
pub mod held_tail;
pub mod keyed_sum;
pub mod slice;
