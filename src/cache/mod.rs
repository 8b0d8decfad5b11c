//! What we keep of earlier answers, in memory.
//!
//! It knows nothing of upstreams: a holder is a number that the floor above gives out.

pub mod memory;
pub mod policy;
pub mod single_flight;
