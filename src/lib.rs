//! Muster: the stores of all your Nix builders as one signed HTTP substituter.
//!
//! Each folder is a floor, and imports point down only; `tests/layering.rs` is the table.
//!
//! ```text
//!  7  app  cli                     wiring, start and stop | one file per subcommand
//!  6  config                       what the operator said: raw -> checked
//!  5  server                       HTTP in, HTTP out
//!  4  substituter                  many stores seen as one, signed
//!  3  cache | upstream             what we keep | whom we ask; siblings
//!  1  codec                        streams of bytes: compression, digest
//!  0  nix                          pure values and texts; no I/O, no async, no clock
//! ```

pub mod app;
pub mod cache;
pub mod cli;
pub mod codec;
pub mod config;
pub mod nix;
pub mod server;
pub mod substituter;
pub mod upstream;
