//! NARs on their way into the cache: read from a holder once, given to any number of clients meanwhile.
//!
//! ```text
//! relay -> digest ┬─> raw channel ──────────> a client of the NAR itself, while it keeps up
//!                 └─> encoder ──> growing file ┬─> clients of the compressed form
//!                                              └─> decoder: clients of the NAR that lag or come late
//! ```
//!
//! The file ends only once hash and size of the NAR agree, so no client gets the last bytes of a wrong
//! one. A slow client holds nothing but the file. When the file cannot be written, each client goes on at
//! the same byte from a holder directly: the cache never makes a client fail.

use std::collections::HashMap;
use std::collections::hash_map::Entry as MapEntry;
use std::fs::File;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::{self, BoxStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tracing::debug;

use crate::cache::backend::{Ground, NarFile};
use crate::cache::fill::{Fill, Progress, Stage};
use crate::codec::compression::{EncodeError, Encoding};
use crate::codec::decompress::{DecodeError, Decoder};
use crate::codec::slice::slice;
use crate::nix::hash::NarHash;
use crate::nix::narinfo::Compression;
use crate::nix::path_info::PathInfo;
use crate::nix::store_path::StorePathHash;

use super::Setup;
use super::kept::read_at;
use super::nar_url::NarUrl;
use super::relay::Relay;
use super::shared::Shared;
use super::source::Source;
use super::transfer::{self, Error};

/// The bounds of filling the cache.
#[derive(Clone, Debug)]
pub struct Options {
    /// Fills that go on after their last client has left: the path will be asked for again.
    pub orphans_max: usize,
    /// A NAR of more bytes is given up when its last client leaves.
    pub orphan_bytes_max: u64,
    /// Silence of a source after which a fill without clients is given up: time to go on from another
    /// holder, but no builder's channel is held for what nobody waits for.
    pub orphan_stall: Duration,
    /// KiB of small NARs that wait to be written; further ones are not kept.
    pub small_kib_max: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            orphans_max: 4,
            orphan_bytes_max: 4 << 30,
            orphan_stall: Duration::from_secs(10),
            small_kib_max: 64 << 10,
        }
    }
}

type Key = (StorePathHash, NarHash);

/// The fills that run.
pub(super) struct Fillings {
    // Never held over an await; no other lock is taken under it.
    running: Mutex<HashMap<Key, Arc<Filling>>>,
    orphans: Arc<Semaphore>,
    small: Arc<Semaphore>,
    decoder: Decoder,
}

/// One fill, as those see it who follow it.
pub(super) struct Filling {
    info: Arc<PathInfo>,
    progress: watch::Receiver<Progress>,
    reader: Arc<File>,
    clients: AtomicUsize,
    /// Why the NAR itself broke off, where it did.
    cut: Mutex<Option<Error>>,
    /// The file once it is kept, or that it will never be.
    outcome: watch::Receiver<Option<Outcome>>,
}

type Outcome = Result<NarFile, ()>;

/// What it takes to make an entry of a NAR.
struct Intake {
    shared: Arc<Shared>,
    setup: Arc<Setup>,
    info: Arc<PathInfo>,
    grounds: Vec<Ground>,
}

/// Keeps a fill going for a client; dropped when the client leaves.
struct Client(Arc<Filling>);

impl Fillings {
    pub(super) fn new(options: &Options) -> Self {
        Self {
            running: Mutex::default(),
            orphans: Arc::new(Semaphore::new(options.orphans_max)),
            small: Arc::new(Semaphore::new(options.small_kib_max as usize)),
            decoder: Decoder::default(),
        }
    }

    /// Returns the running fill of a NAR.
    pub(super) fn running(&self, info: &PathInfo) -> Option<Arc<Filling>> {
        self.lock().get(&key(info)).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Arc<Filling>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A NAR whose first bytes came, for its first client.
pub(super) enum Begun {
    /// It is being kept; the bytes in the encoding that was asked for.
    Kept(BoxStream<'static, Result<Bytes, Error>>, Arc<Filling>),
    /// It is not; the checked NAR.
    Direct(BoxStream<'static, Result<Bytes, Error>>),
}

/// Begins to read a NAR, and to keep it where that can be; `None` when no holder gives a first byte.
///
/// The fill is a task of its own; dropped streams leave it to [`Options`] whether it goes on.
pub(super) async fn begin(source: Source, url: &NarUrl) -> Option<Begun> {
    let intake = Intake::of(&source);
    let (shared, info) = (Arc::clone(&source.shared), Arc::clone(&source.info));
    let checked = Relay::new(source).into_checked().await?;
    let Some(intake) = intake else {
        return Some(Begun::Direct(checked));
    };
    let fill = match intake.begin() {
        Some(fill) => fill,
        None => return Some(Begun::Direct(checked)),
    };
    let (tell_outcome, outcome) = watch::channel(None);
    let filling = Arc::new(Filling {
        info: Arc::clone(&info),
        progress: fill.progress(),
        reader: fill.reader(),
        clients: AtomicUsize::new(0),
        cut: Mutex::default(),
        outcome,
    });
    match shared.fillings.lock().entry(key(&info)) {
        // Another client was faster: its fill serves both.
        MapEntry::Occupied(other) => {
            let other = Arc::clone(other.get());
            return Some(Begun::Kept(other.give(&shared, url, None), other));
        }
        MapEntry::Vacant(place) => place.insert(Arc::clone(&filling)),
    };
    let (raw, raw_reader) = mpsc::channel(RAW_CHUNKS);
    let raw = (url.encoding != Encoding::Zstd).then_some(raw);
    let given = filling.give(&shared, url, raw.is_some().then_some(raw_reader));
    let run = run(
        intake,
        Arc::clone(&filling),
        fill,
        checked,
        raw,
        tell_outcome,
    );
    if !shared.tasks.spawn(run) {
        shared.fillings.lock().remove(&key(&info));
    }
    Some(Begun::Kept(given, filling))
}

/// Reads, encodes and writes until the NAR is whole and kept.
async fn run(
    intake: Intake,
    filling: Arc<Filling>,
    fill: Fill,
    checked: BoxStream<'static, Result<Bytes, Error>>,
    raw: Option<mpsc::Sender<Bytes>>,
    tell_outcome: watch::Sender<Option<Outcome>>,
) {
    let written = write_all(&intake, &filling, fill, checked, raw).await;
    let shared = Arc::clone(&intake.shared);
    let kept = match written {
        Some(fill) => intake.commit(fill).await,
        None => None,
    };
    shared.fillings.lock().remove(&key(&filling.info));
    tell_outcome.send_replace(Some(kept.ok_or(())));
}

/// Writes the whole encoded NAR; `None` when it broke off, could not be written, or nobody wants it.
async fn write_all(
    intake: &Intake,
    filling: &Filling,
    mut fill: Fill,
    checked: BoxStream<'static, Result<Bytes, Error>>,
    mut raw: Option<mpsc::Sender<Bytes>>,
) -> Option<Fill> {
    let shared = &intake.shared;
    let teed = checked.inspect(move |item| {
        let Ok(chunk) = item else { return };
        // One that lags reads on from the file.
        if raw
            .as_ref()
            .is_some_and(|raw| raw.try_send(chunk.clone()).is_err())
        {
            raw = None;
        }
    });
    let nar_size = filling.info.nar_size;
    let mut encoded = shared
        .encoder
        .encode_stream(Encoding::Zstd, nar_size, teed.boxed());
    let mut orphan: Option<OwnedSemaphorePermit> = None;
    loop {
        let item = tokio::select! {
            biased;
            item = encoded.next() => item,
            () = filling.abandonment(shared.options.fill.orphan_stall) => {
                debug!(path = %filling.info.path, "given up, nobody waits and its source is silent");
                return None;
            }
        };
        let Some(item) = item else {
            return Some(fill);
        };
        let chunk = match item {
            Ok(chunk) => chunk,
            Err(error) => {
                filling.break_off(match error {
                    EncodeError::Source(error) => error,
                    EncodeError::Encoder(error) => Error::Encoder(error.to_string()),
                });
                return None;
            }
        };
        if filling.clients.load(Ordering::Relaxed) == 0 && orphan.is_none() {
            let worth_it = nar_size <= shared.options.fill.orphan_bytes_max;
            let orphans = Arc::clone(&shared.fillings.orphans);
            orphan = orphans.try_acquire_owned().ok().filter(|_| worth_it);
            if orphan.is_none() {
                debug!(path = %filling.info.path, "given up, its clients have left");
                return None;
            }
        }
        fill = write(fill, chunk).await?;
    }
}

/// Writes one chunk on a blocking thread; `None`, and the cache has said so, when it cannot be.
async fn write(mut fill: Fill, chunk: Bytes) -> Option<Fill> {
    let written = tokio::task::spawn_blocking(move || fill.write(&chunk).ok().map(|()| fill));
    written.await.ok()?
}

impl Intake {
    /// Gathers what an entry takes, while it is known; `None` where the NAR is not to be kept.
    fn of(source: &Source) -> Option<Self> {
        let shared = Arc::clone(&source.shared);
        shared.kept.as_ref()?;
        let holders = source.holders.as_ref()?;
        let setup = shared.setup();
        let grounds = Shared::grounds(&setup, &source.info, holders);
        Some(Self {
            info: Arc::clone(&source.info),
            setup,
            grounds,
            shared,
        })
    }

    fn begin(&self) -> Option<Fill> {
        let kept = self.shared.kept.as_ref()?;
        let fill = kept.backend.begin(self.info.nar_size);
        fill.inspect_err(|error| debug!(path = %self.info.path, %error, "not kept"))
            .ok()
    }

    /// Makes the entry and publishes the path anew; dropped, the former goes on.
    async fn commit(self, fill: Fill) -> Option<NarFile> {
        let publisher = &self.setup.publisher;
        let info = publisher.without_ours((*self.info).clone());
        let narinfo = |file: &NarFile| publisher.narinfo_of((*self.info).clone(), file);
        match fill.commit(info, self.grounds, narinfo).await {
            Ok(file) => {
                self.shared.publish_kept(&self.info, file);
                Some(file)
            }
            Err(error) => {
                debug!(path = %self.info.path, %error, "not kept");
                None
            }
        }
    }
}

/// Keeps a small checked NAR in the background, if there is room to wait for the disk.
///
/// `encoded` is the NAR in zstd, where that was made already.
pub(super) fn keep_small(source: &Source, nar: Bytes, encoded: Option<Bytes>) {
    let Some(intake) = Intake::of(source) else {
        return;
    };
    let shared = Arc::clone(&intake.shared);
    let kib = u32::try_from(nar.len().div_ceil(1024))
        .unwrap_or(u32::MAX)
        .max(1);
    let small = Arc::clone(&shared.fillings.small);
    let Ok(permit) = small.try_acquire_many_owned(kib) else {
        return;
    };
    shared.tasks.spawn(async move {
        let shared = Arc::clone(&intake.shared);
        let Some(fill) = intake.begin() else {
            return;
        };
        let encoded = match encoded {
            Some(encoded) => Ok(encoded),
            None => shared.encoder.encode_whole(Encoding::Zstd, nar).await,
        };
        if let Ok(encoded) = encoded
            && let Some(fill) = write(fill, encoded).await
        {
            intake.commit(fill).await;
        }
        drop(permit);
    });
}

impl Filling {
    /// Waits until the NAR is kept; `None` when it never will be.
    pub(super) async fn kept(&self) -> Option<NarFile> {
        let mut outcome = self.outcome.clone();
        let outcome = outcome.wait_for(Option::is_some).await.ok()?;
        outcome.as_ref()?.ok()
    }

    /// Gives one client the NAR in the encoding of its URL, from the first byte.
    ///
    /// `raw` brings the NAR itself as far as the client keeps up.
    pub(super) fn give(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        url: &NarUrl,
        raw: Option<mpsc::Receiver<Bytes>>,
    ) -> BoxStream<'static, Result<Bytes, Error>> {
        self.clients.fetch_add(1, Ordering::Relaxed);
        let client = Client(Arc::clone(self));
        let nar_size = self.info.nar_size;
        match url.encoding {
            Encoding::Zstd => client.follow(Arc::clone(shared), *url),
            Encoding::None => client.plain(Arc::clone(shared), *url, raw),
            encoding @ Encoding::Xz => {
                let plain = client.plain(Arc::clone(shared), *url, raw);
                let encoded = shared.encoder.encode_stream(encoding, nar_size, plain);
                transfer::named(encoded)
            }
        }
    }

    /// Resolves after so long, or a multiple of it, when it has no clients then.
    async fn abandonment(&self, patience: Duration) {
        loop {
            tokio::time::sleep(patience).await;
            if self.clients.load(Ordering::Relaxed) == 0 {
                return;
            }
        }
    }

    fn break_off(&self, error: Error) {
        *self.cut.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    }

    fn cut(&self) -> Option<Error> {
        self.cut
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Client {
    /// Reads the growing file from its beginning to its end.
    fn follow(self, shared: Arc<Shared>, url: NarUrl) -> BoxStream<'static, Result<Bytes, Error>> {
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
    fn plain(
        self,
        shared: Arc<Shared>,
        url: NarUrl,
        raw: Option<mpsc::Receiver<Bytes>>,
    ) -> BoxStream<'static, Result<Bytes, Error>> {
        let nar_size = self.0.info.nar_size;
        let state = Plain {
            client: Some(self),
            shared,
            url,
            nar_size,
            raw,
            offset: 0,
            rest: None,
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

    /// Takes the NAR from a holder again, encodes it anew and checks that it begins as the file did.
    async fn go_on_directly(&mut self) -> Result<(), Error> {
        if let Some(cut) = self.client.0.cut() {
            return Err(cut);
        }
        let direct = transfer::directly(&self.shared, &self.url).await;
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
    /// Gone once it reads from the file, which then counts it.
    client: Option<Client>,
    shared: Arc<Shared>,
    url: NarUrl,
    nar_size: u64,
    raw: Option<mpsc::Receiver<Bytes>>,
    offset: u64,
    rest: Option<BoxStream<'static, Result<Bytes, Error>>>,
}

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
        if let Some(client) = self.client.take() {
            if let Some(cut) = client.0.cut() {
                return Some(Err(cut));
            }
            let file = client.follow(Arc::clone(&self.shared), self.url);
            let decoder = &self.shared.fillings.decoder;
            let decoded = decoder.decode_stream(Compression::Zstd, file)?;
            let named = decoded.map(|item| {
                item.map_err(|error| match error {
                    DecodeError::Source(error) => error,
                    DecodeError::Damaged { cause, .. } => Error::Corrupt {
                        upstream: "the cache".to_owned(),
                        cause: cause.to_string(),
                    },
                })
            });
            let missing = self.offset..self.nar_size;
            self.rest = Some(slice(named.boxed(), missing).boxed());
        }
        self.rest.as_mut()?.next().await
    }
}

fn key(info: &PathInfo) -> Key {
    (info.path.hash(), info.nar_hash)
}

fn lost(offset: u64) -> Error {
    Error::NoHolderLeft {
        offset,
        cause: crate::upstream::Error::Down("the cache cannot be written".into()),
    }
}

/// Chunks of at most 256 KiB that a client of the NAR itself may lag behind before it reads the file.
const RAW_CHUNKS: usize = 32;
