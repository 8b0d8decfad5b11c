//! How many files may be open: each client's connection is one.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises this process's limit as far as it may, and returns it.
///
/// The soft limit of 1024 that shells give is for programs that use `select`; running into it would
/// refuse clients and starting ssh alike.
pub(super) fn raise_limit() -> usize {
    let limit = getrlimit(Resource::Nofile);
    let wanted = limit.maximum.unwrap_or(FILES_MAX).min(FILES_MAX);
    let current = limit.current.unwrap_or(u64::MAX);
    let raised = Rlimit {
        current: Some(wanted),
        maximum: limit.maximum,
    };
    let files = match current < wanted && setrlimit(Resource::Nofile, raised).is_ok() {
        true => wanted,
        false => current,
    };
    usize::try_from(files).unwrap_or(usize::MAX)
}

/// More than are ever used; programs that we start may walk over all that they could have.
const FILES_MAX: u64 = 65_536;
