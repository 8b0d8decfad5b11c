//! Whole closures at once, asked of stores that can do so.

use async_trait::async_trait;

use super::Error;
use crate::nix::path_info::PathInfo;
use crate::nix::store_path::StorePath;

/// A store that tells a closure and all its path infos in at most two round trips, however deep it is.
///
/// A handle is for one closure: what comes with its paths already may be kept for the question that follows.
/// An error says nothing about the store's health: whoever asks goes on level by level. Both futures
/// may be dropped at any point; the answer is then thrown away.
#[async_trait]
pub trait Closures: Send + Sync + 'static {
    /// Lists a path and all that it refers to, in any order; one round trip.
    async fn paths(&self, top: &StorePath) -> Result<Vec<StorePath>, Error>;

    /// Asks what the store knows of these paths; one round trip for some thousand of them.
    ///
    /// They are of the closure that was asked for before. What is not there is left out; the answers are claims, in any order.
    async fn infos(&self, paths: &[StorePath]) -> Result<Vec<PathInfo>, Error>;
}
