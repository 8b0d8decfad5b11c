//! A large NAR as clients get it: its last bytes come only when all of it is known to be right.
//!
//! Hash and size tell of a whole NAR alone, so most of it is given before they can. The last
//! [`tail_bytes`](super::transfer::Options::tail_bytes) are held back until they agree. Where they do not, whoever
//! lied is set aside and the next holder is read from its first byte:
//!
//! ```text
//! given by the liar      │ held
//! ───────────────────────┼──────
//! repeated by the next ──┼─────▶ it repeats the same: its last bytes are given, once the whole of it is right
//!                   └ it does not: the next holder, until none is left; then the client sees a cut
//! ```
//!
//! So a lie in the last bytes, a wrong size too, costs the client nothing but time. A lie before them cannot be taken
//! back: it is seen by the hashes of the NAR's beginnings, a MiB behind it at the latest. Who differs may be the one
//! that is right, and is blamed only once that is known.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt as _};
use tracing::{info, warn};

use crate::codec::digest::DigestError;
use crate::codec::held_tail::HeldTail;
use crate::nix::path_info::PathInfo;

use super::givers::{accuse, lock};
use super::relay::Relay;
use super::shared::Shared;
use super::transfer::Error;

/// One NAR on its way, checked.
struct Sound {
    relay: Relay,
    shared: Arc<Shared>,
    info: Arc<PathInfo>,
    /// What was found out about the last that lied.
    lie: Option<Error>,
    /// Whether all is known to be right: what is held can go.
    is_right: bool,
}

impl Relay {
    /// Begins a checked stream; `None` when no holder gives a first byte.
    ///
    /// Whoever reads it to its end has the right bytes; an error is the last item. Dropped, the transfer ends.
    pub(super) async fn into_checked(mut self) -> Option<BoxStream<'static, Result<Bytes, Error>>> {
        let (shared, info) = (Arc::clone(&self.source.shared), self.info());
        self.tail = HeldTail::new(info.nar_size, shared.options.transfer.tail_bytes);
        let mut sound = Sound {
            shared,
            info,
            relay: self,
            lie: None,
            is_right: false,
        };
        // Nothing is promised to the client before somebody gives a first chunk.
        let first = sound.next().await.ok()??;
        let rest = stream::unfold(Some(sound), |sound| async move {
            let mut sound = sound?;
            match sound.next().await {
                Ok(Some(chunk)) => Some((Ok(chunk), Some(sound))),
                Ok(None) => None,
                Err(error) => {
                    sound.shared.counters.nar_cut.increment();
                    warn!(path = %sound.info.path, %error, "transfer cut");
                    Some((Err(error), None))
                }
            }
        });
        Some(stream::iter([Ok(first)]).chain(rest).boxed())
    }
}

impl Sound {
    /// Reads a chunk that may be given; `None` behind the last of a NAR that is right.
    async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        let chunk = loop {
            if self.is_right {
                break self.relay.tail.let_go();
            }
            match self.relay.next().await {
                Some(Ok(chunk)) => {
                    if let Err(lie) = self.judge() {
                        self.mend(&lie)?;
                    } else if !chunk.is_empty() {
                        break Some(chunk);
                    }
                }
                // Whoever breaks after a lie leaves the client with the lie.
                Some(Err(error)) => return Err(self.lie.take().unwrap_or(error)),
                None => match self.judge() {
                    Ok(()) => self.prove(),
                    Err(lie) => self.mend(&lie)?,
                },
            }
        };
        let size = chunk.as_ref().map_or(0, Bytes::len);
        self.shared.counters.nar_bytes.add(size as u64);
        Ok(chunk)
    }

    /// Judges what came, once it is as much as was promised.
    fn judge(&self) -> Result<(), Lie> {
        let (expected, came) = (self.info.nar_size, self.relay.tail.came());
        if came > expected {
            return Err(DigestError::Long { expected });
        }
        if came < expected {
            return Ok(());
        }
        let expected = self.info.nar_hash;
        let judged = lock(&self.relay.givers).judge(expected);
        judged.map_err(|actual| DigestError::Mismatch { actual, expected })
    }

    /// Blames who lied and has the next holder give what is held back anew; an error where what was given is wrong.
    fn mend(&mut self, lie: &Lie) -> Result<(), Error> {
        let expected = self.info.nar_hash;
        let (liars, is_given) = {
            let givers = lock(&self.relay.givers);
            let is_given =
                matches!(lie, DigestError::Mismatch { .. }) && givers.last_is_right(expected);
            (givers.liars(lie, expected), is_given)
        };
        let cause = lie.to_string();
        let upstream = accuse(&self.shared, &self.info, &liars, &cause);
        let error = Error::Corrupt { upstream, cause };
        if is_given || liars.is_empty() {
            return Err(error);
        }
        self.lie = Some(error);
        self.relay.distrust();
        Ok(())
    }

    /// Lets the last bytes go: all is right, so whoever would not repeat it was not.
    fn prove(&mut self) {
        self.is_right = true;
        // A slow client needs nobody for what is here.
        self.relay.drop_stream();
        for member in self.relay.differed.drain(..) {
            let cause = "it began with other bytes";
            accuse(&self.shared, &self.info, &[member], cause);
        }
        if let Some(lie) = self.lie.take() {
            info!(path = %self.info.path, %lie, "NAR was mended by another holder");
        }
    }
}

/// How a NAR is wrong; a source that fails is not one that lies.
type Lie = DigestError<std::convert::Infallible>;
