//! Why a request is not answered with 200, and the only place where status codes are chosen.

use hyper::StatusCode;

/// What went wrong, as far as a client may know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Nobody has it, or the name means nothing. Also when upstreams could not be asked: real
    /// clients abort on anything else for a narinfo.
    #[error("not found")]
    NotFound,
    /// Nothing can be uploaded here.
    #[error("this cache is read-only")]
    ReadOnly,
    /// The range lies behind the end.
    #[error("range not satisfiable")]
    Range {
        /// Size of the whole in bytes.
        size_bytes: u64,
    },
}

impl Error {
    /// Chooses the status.
    pub fn status(self) -> StatusCode {
        match self {
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::ReadOnly => StatusCode::METHOD_NOT_ALLOWED,
            Self::Range { .. } => StatusCode::RANGE_NOT_SATISFIABLE,
        }
    }
}
