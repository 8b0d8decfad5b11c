//! What clients get of a NAR on its way into the cache, each at its own pace: the file as it grows, or the NAR in it.
//!
//! A client holds nothing but the file, and counts for the fill as long as it reads. When the file cannot
//! be written any more, it goes on at the same byte from a holder directly.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::{self, BoxStream};
use tokio::sync::{mpsc, watch};

use crate::cache::fill::{Progress, Stage};
use crate::codec::compression::Encoding;
use crate::codec::decompress::DecodeError;
use crate::codec::slice::slice;
use crate::nix::narinfo::Compression;
use crate::upstream;

use super::berth::{Berth, Giver};
use super::filling::Filling;
use super::kept::read_at;
use super::nar_url::NarUrl;
use super::shared::Shared;
use super::transfer::{self, Error};

/// Keeps a fill going for a client; dropped when the client leaves.
pub(super) struct Client(Arc<Filling>);

impl Client {
    /// Counts one more client of a fill.
    pub(super) fn of(filling: Arc<Filling>) -> Self {
        filling.clients.fetch_add(1, Ordering::Relaxed);
        Self(filling)
    }

    /// Reads the growing file from its beginning to its end.
    pub(super) fn follow(
        self,
        shared: Arc<Shared>,
        url: NarUrl,
    ) -> BoxStream<'static, Result<Bytes, Error>> {
        let progress = self.0.progress.clone();
        let state = Following {
            client: self,
            shared,
            url: NarUrl {
                encoding: Encoding::Zstd,
                ..url
            },
            progress,
            offset: 0,
            direct: None,
        };
        stream::unfold(state, |mut state| async move {
            let item = state.next().await.transpose()?;
            Some((item, state))
        })
        .boxed()
    }

    /// Gives the NAR itself: as it comes while the client keeps up, then out of the file.
    pub(super) fn plain(
        self,
        shared: Arc<Shared>,
        url: NarUrl,
        raw: Option<mpsc::Receiver<Bytes>>,
    ) -> BoxStream<'static, Result<Bytes, Error>> {
        let state = Plain {
            nar_size: self.0.info.nar_size,
            client: self,
            berth: shared.berths.berth(),
            shared,
            url,
            raw,
            offset: 0,
        };
        stream::unfold(state, |mut state| async move {
            let item = state.next().await?;
            Some((item, state))
        })
        .boxed()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.0.clients.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A client in the growing file.
struct Following {
    client: Client,
    shared: Arc<Shared>,
    url: NarUrl,
    progress: watch::Receiver<Progress>,
    offset: u64,
    /// From a holder directly, once the file could not be written; up to `offset` it repeats.
    direct: Option<BoxStream<'static, Result<Bytes, Error>>>,
}

impl Following {
    async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        loop {
            if let Some(direct) = &mut self.direct {
                return direct.next().await.transpose();
            }
            let Progress { written, stage } = *self.progress.borrow_and_update();
            if self.offset < written {
                if let Some(chunk) = self.client.0.recent.at(self.offset, written) {
                    self.offset += chunk.len() as u64;
                    return Ok(Some(chunk));
                }
                let file = Arc::clone(&self.client.0.reader);
                let chunk = read_at(file, self.offset, written).await;
                let chunk = chunk.map_err(|error| Error::Corrupt {
                    upstream: "the cache".to_owned(),
                    cause: error.to_string(),
                })?;
                self.offset += chunk.len() as u64;
                return Ok(Some(chunk));
            }
            match stage {
                Stage::Complete(_) => return Ok(None),
                Stage::Growing if self.progress.changed().await.is_ok() => {}
                Stage::Growing | Stage::Failed => self.go_on_directly().await?,
            }
        }
    }

    /// Takes the NAR from a holder again, in the same form, and checks that it begins as the file did.
    async fn go_on_directly(&mut self) -> Result<(), Error> {
        if let Some(cut) = self.client.0.cut() {
            return Err(cut);
        }
        let form = self.client.0.form;
        let direct = transfer::directly(&self.shared, &self.url, form).await;
        let mut direct = direct.ok_or_else(|| lost(self.offset))?;
        let mut place = 0;
        while place < self.offset {
            let mut chunk = direct.next().await.ok_or_else(|| lost(self.offset))??;
            let known = usize::try_from(self.offset - place).unwrap_or(usize::MAX);
            let again = chunk.split_to(chunk.len().min(known));
            let mut compared = 0;
            while compared < again.len() {
                let file = Arc::clone(&self.client.0.reader);
                let end = place + again.len() as u64;
                let earlier = read_at(file, place + compared as u64, end).await;
                let earlier = earlier.map_err(|_| lost(self.offset))?;
                if again.get(compared..compared + earlier.len()) != Some(&*earlier) {
                    return Err(Error::Encoder("it came out otherwise this time".to_owned()));
                }
                compared += earlier.len();
            }
            place += again.len() as u64;
            if !chunk.is_empty() {
                direct = stream::iter([Ok(chunk)]).chain(direct).boxed();
                break;
            }
        }
        self.direct = Some(direct);
        Ok(())
    }
}

/// A client of the NAR itself.
struct Plain {
    client: Client,
    shared: Arc<Shared>,
    url: NarUrl,
    nar_size: u64,
    raw: Option<mpsc::Receiver<Bytes>>,
    /// Bytes of the NAR that were given.
    offset: u64,
    /// Where its place in the file is left until it wants more.
    berth: Arc<Berth<Rest>>,
}

/// What follows of a NAR.
type Rest = BoxStream<'static, Result<Bytes, Error>>;

impl Plain {
    async fn next(&mut self) -> Option<Result<Bytes, Error>> {
        if let Some(raw) = &mut self.raw {
            match raw.recv().await {
                Some(chunk) => {
                    self.offset += chunk.len() as u64;
                    return Some(Ok(chunk));
                }
                None => self.raw = None,
            }
        }
        if self.offset >= self.nar_size {
            return None;
        }
        let mut rest = match self.berth.take_back() {
            Some(rest) => rest,
            // It comes here first, or made room for others.
            None => match self.out_of_the_file().await {
                Ok(rest) => rest,
                Err(error) => return Some(Err(error)),
            },
        };
        let item = rest.next().await?;
        if let Ok(chunk) = &item {
            self.offset += chunk.len() as u64;
            self.berth.leave(Giver::Growing, rest);
        }
        Some(item)
    }

    /// Reads the NAR in the file on, at the byte that was not given yet, as soon as there is room for its decoder.
    async fn out_of_the_file(&self) -> Result<Rest, Error> {
        let (shared, filling) = (&self.shared, &self.client.0);
        if let Some(cut) = filling.cut() {
            return Err(cut);
        }
        let decoder = &shared.fillings.decoder;
        let window = tokio::select! {
            window = decoder.window(self.nar_size) => window,
            never = shared.berths.make_room(Giver::Growing, "the cache") => match never {},
        };
        let file = Client::of(Arc::clone(filling)).follow(Arc::clone(shared), self.url);
        let decoded = decoder.decode_stream(Compression::Zstd, file);
        let decoded = decoded.ok_or_else(|| lost(self.offset))?;
        let named = decoded.map(move |item| {
            let _held = &window;
            item.map_err(|error| match error {
                DecodeError::Source(error) => error,
                DecodeError::Damaged { cause, .. } => Error::Corrupt {
                    upstream: "the cache".to_owned(),
                    cause: cause.to_string(),
                },
            })
        });
        Ok(slice(named.boxed(), self.offset..self.nar_size).boxed())
    }
}

fn lost(offset: u64) -> Error {
    Error::NoHolderLeft {
        offset,
        cause: upstream::Error::Down("the cache cannot be written".into()),
    }
}
