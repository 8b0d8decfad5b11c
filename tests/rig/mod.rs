//! Real Nix builders and clients on one machine, for the end-to-end tests.
//!
//! Each [`Machine`] is a small container with its own mount, pid, uts, ipc and network namespace, an
//! overlay root and a real `/nix`; real `sshd` and `nix-daemon` run inside. The machines of a [`Lab`] hang
//! on one bridge in a namespace that the lab made. Nothing of this touches the host's `/nix`, `/etc`,
//! interfaces or processes, and all of it ends with the test process, however that ends.
//!
//! ```text
//!   Lab ── hub (network namespace, bridge 10.77.0.1/24, removes the lab's folder at the end)
//!    ├── Machine b1   10.77.0.11   sshd, nix-daemon; dead, hung, frozen, cut off, behind a slow line
//!    └── Machine c    10.77.0.12   nix, and `muster serve` beside it
//! ```
//!
//! Needs root, overlayfs and the packages that `tests/run` installs. Sockets of the machines are reached
//! from the test process through Unix sockets in the shared folder (`/lab` inside), see [`helper`].

#![allow(
    clippy::allow_attributes,
    dead_code,
    unreachable_pub,
    unused_imports,
    reason = "each suite uses another part of the rig"
)]

pub mod caches;
pub mod helper;
pub mod http;
pub mod lab;
pub mod machine;
pub mod muster;
pub mod nix;
pub mod process;
pub mod services;
pub mod systemd;

pub use lab::Lab;
pub use machine::Machine;
pub use muster::Muster;
pub use nix::Nix;
pub use process::Output;
pub use services::Line;
pub use systemd::Systemd;

use std::time::{Duration, Instant};

/// Asks every 20 ms until the answer is yes; false if `secs` pass before.
pub fn eventually(secs: f64, mut question: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + Duration::from_secs_f64(secs);
    loop {
        if question() {
            return true;
        }
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
