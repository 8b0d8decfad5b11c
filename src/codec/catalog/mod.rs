//! The live catalog: which paths a store has, fed to those who ask it.
//!
//! A muster that serves one store knows its paths exactly, and feeds them to the musters that ask it:
//! whole first, then every change, and a heartbeat every quarter of a second. Whoever has the feed can
//! say "not there" without a question, while the last heartbeat is younger than a second.
//!
//! ```text
//! store -> source (paths, recent changes) -> feeder -> wire -> view (paths, freshness) -> "no" or "ask"
//! ```
//!
//! Nothing here does I/O or reads a clock. A path is its hash part, 20 bytes.

pub mod set;
pub mod source;
pub mod view;
pub mod wire;
