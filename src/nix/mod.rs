//! The formats and words of Nix: pure values and texts, without I/O, async or a clock.

pub mod base32;
pub mod build_trace;
pub mod cache_info;
pub mod content_address;
pub mod fingerprint;
pub mod hash;
pub mod host_key;
pub mod machines;
pub mod nar;
pub mod narinfo;
pub mod path_info;
pub mod realisation;
pub mod serve_protocol;
pub mod signature;
pub mod signer;
pub mod store_path;
pub mod store_uri;
pub mod worker_protocol;
