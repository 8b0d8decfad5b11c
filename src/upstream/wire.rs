//! The way to a daemon: two halves of a byte stream, and what keeps it open.
//!
//! A [`Dial`] knows one store and opens a [`Wire`] to it, over ssh or a Unix socket. It speaks
//! no protocol: that is the connection's. A child process that carries a wire ends with it.

use std::process::ExitStatus;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};

use super::Error;
use super::ssh_process::Process;

/// Opens wires to one store.
#[async_trait]
pub trait Dial: Send + Sync + 'static {
    /// Opens a wire; nobody has spoken on it yet, and it may prove dead at the first word.
    ///
    /// Dropped, it leaves no process behind. It may wait as long as the system does: the caller
    /// bounds it.
    async fn dial(&self, purpose: Purpose) -> Result<Wire, Error>;

    /// Opens a wire to `nix-store --serve` beside the daemon, as [`dial`](Dial::dial) does.
    async fn dial_nix_store(&self) -> Result<Wire, Error> {
        Err(Error::Unsupported("nix-store --serve here".into()))
    }

    /// Runs a program beside the daemon; `None` where there is no way to do so.
    async fn run(&self, _command: &[String], _bounds: Bounds) -> Option<Result<Output, Error>> {
        None
    }
}

/// What a wire is for; traffic of different purposes never shares one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// Questions that are answered at once: its silence is noticed within seconds.
    Lookup,
    /// NARs: may be slow for long without being dead.
    Nar,
    /// Temporary roots, held by the mere existence of the connection.
    Roots,
    /// Whole closures, asked of `nix-store --serve`: mostly idle.
    Closures,
}

/// An open way to a daemon.
pub struct Wire {
    /// What the daemon says.
    pub reader: Box<dyn AsyncRead + Send + Unpin>,
    /// What is said to it.
    pub writer: Box<dyn AsyncWrite + Send + Unpin>,
    /// Keeps the wire open: it closes when the last clone of this is dropped.
    pub guard: Guard,
}

/// What a wire needs to stay open. A clone is another handle on the same.
#[derive(Clone, Default)]
pub struct Guard(Option<Arc<Process>>);

impl Guard {
    /// Makes the guard of a wire that a process carries.
    pub fn of_process(process: Process) -> Self {
        Self(Some(Arc::new(process)))
    }

    /// Adds what the carrier knows to the cause of a loss: ssh's own words and the remedy.
    ///
    /// Waits a moment (at most [`EXPLAIN_WITHIN`](super::ssh_process::EXPLAIN_WITHIN)) for the
    /// process to say its last. Errors that are no loss pass unchanged.
    pub async fn explain(&self, error: Error) -> Error {
        let lost = matches!(error, Error::Lost(_) | Error::Down(_) | Error::Protocol(_));
        match &self.0 {
            Some(process) if lost => process.explain(error).await,
            _ => error,
        }
    }

    /// Returns what the carrier has said so far, where it has said anything.
    pub fn words(&self) -> Option<String> {
        self.0.as_ref()?.words()
    }
}

/// What a command beside the daemon may take.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Bytes of output; more is an error.
    pub output_bytes_max: usize,
    /// From the start to the exit.
    pub time: std::time::Duration,
}

/// What a command beside the daemon gave.
#[derive(Clone, Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// All that it wrote to its output.
    pub stdout: Bytes,
    /// The end of what it wrote to its error output.
    pub stderr: String,
}
