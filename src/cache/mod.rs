//! What we keep of earlier answers: texts in memory, NARs and records beyond.
//!
//! It knows nothing of upstreams: a holder is a number or a name that the floor above gives out.

pub mod backend;
pub mod disk;
pub mod fill;
pub mod memory;
pub mod memory_backend;
pub mod nar_name;
pub mod policy;
pub mod single_flight;
pub mod stamp;
