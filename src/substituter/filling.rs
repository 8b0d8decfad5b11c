//! NARs on their way into the cache: read from a holder once, given to any number of clients meanwhile.
//!
//! ```text
//! relay -> digest ┬─> raw channel ──────────> a client of the NAR itself, while it keeps up
//!                 └─> encoder ──> growing file ┬─> clients of the compressed form
//!                         passing ──^          └─> decoder: clients of the NAR that lag or come late
//! ```
//!
//! So a NAR is encoded once, however many ask for it, and not at all where its upstream has done so. The file
//! ends only once hash and size of the NAR agree, so no client gets the last bytes of a wrong one. What clients
//! get of it, each at its own pace, is in [`super::following`].

use std::collections::HashMap;
use std::collections::hash_map::Entry as MapEntry;
use std::fs::File;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tracing::debug;

use crate::cache::backend::NarFile;
use crate::cache::fill::{Fill, Progress};
use crate::codec::compression::Encoding;
use crate::codec::decompress::Decoder;
use crate::nix::hash::NarHash;
use crate::nix::path_info::PathInfo;
use crate::nix::store_path::StorePathHash;

use super::following::Client;
use super::intake::Intake;
use super::nar_url::NarUrl;
use super::recent::Recent;
use super::shared::Shared;
use super::source::Source;
use super::transfer::{self, Checked, Error, Form};
use super::writing::Writing;

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
}

impl Default for Options {
    fn default() -> Self {
        Self {
            orphans_max: 4,
            orphan_bytes_max: 4 << 30,
            orphan_stall: Duration::from_secs(10),
        }
    }
}

type Key = (StorePathHash, NarHash);

/// The fills that run.
pub(super) struct Fillings {
    // Never held over an await; no other lock is taken under it.
    running: Mutex<HashMap<Key, Arc<Filling>>>,
    orphans: Arc<Semaphore>,
    pub(super) decoder: Decoder,
}

/// One fill, as those see it who follow it.
pub(super) struct Filling {
    pub(super) info: Arc<PathInfo>,
    /// How the file is made; made otherwise it would be another.
    pub(super) form: Form,
    pub(super) progress: watch::Receiver<Progress>,
    pub(super) reader: Arc<File>,
    /// What was written last.
    pub(super) recent: Arc<Recent>,
    pub(super) clients: AtomicUsize,
    /// Why the NAR itself broke off, where it did.
    cut: Mutex<Option<Error>>,
    /// The file once it is kept, or that it will never be.
    outcome: watch::Receiver<Option<Outcome>>,
}

type Outcome = Result<NarFile, ()>;

impl Fillings {
    pub(super) fn new(options: &Options) -> Self {
        Self {
            running: Mutex::default(),
            orphans: Arc::new(Semaphore::new(options.orphans_max)),
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
    /// It is not.
    Direct(Checked),
}

/// Begins to read a NAR, and to keep it where that can be; `None` when no holder gives a first byte.
///
/// The fill is a task of its own; dropped streams leave it to [`Options`] whether it goes on.
pub(super) async fn begin(source: Source, url: &NarUrl) -> Option<Begun> {
    let intake = Intake::of(&source);
    let (shared, info) = (Arc::clone(&source.shared), Arc::clone(&source.info));
    let checked = Checked::open(source, url).await?;
    let Some(intake) = intake else {
        return Some(Begun::Direct(checked));
    };
    let mut fill = match intake.begin() {
        Some(fill) => fill,
        None => return Some(Begun::Direct(checked)),
    };
    if let Checked::File {
        hash: Some(hash), ..
    } = &checked
    {
        fill.promise(*hash);
    }
    let (tell_outcome, outcome) = watch::channel(None);
    let filling = Arc::new(Filling {
        info: Arc::clone(&info),
        form: checked.form(),
        progress: fill.progress(),
        reader: fill.reader(),
        recent: Arc::default(),
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
    checked: Checked,
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
    // A client that stops holds no memory.
    filling.recent.clear();
    tell_outcome.send_replace(Some(kept.ok_or(())));
}

/// Writes the whole encoded NAR; `None` when it broke off, could not be written, or nobody wants it.
async fn write_all(
    intake: &Intake,
    filling: &Filling,
    fill: Fill,
    checked: Checked,
    raw: Option<mpsc::Sender<Bytes>>,
) -> Option<Fill> {
    let shared = &intake.shared;
    let nar_size = filling.info.nar_size;
    let mut file = match checked {
        Checked::File { stream, .. } => stream,
        Checked::Nar(nar) => transfer::encode(shared, Encoding::Zstd, nar_size, teed(nar, raw)),
    };
    let mut orphan: Option<OwnedSemaphorePermit> = None;
    let mut writing = Writing::new(fill, Arc::clone(&filling.recent));
    let ended = loop {
        if !writing.has_room() {
            writing.turn().await?;
        }
        let item = tokio::select! {
            biased;
            done = writing.turn() => {
                done?;
                continue;
            }
            item = file.next() => item,
            () = filling.abandonment(shared.options.fill.orphan_stall) => {
                debug!(path = %filling.info.path, "given up, nobody waits and its source is silent");
                return None;
            }
        };
        match item {
            Some(Ok(chunk)) => writing.take(chunk),
            Some(Err(error)) => break Err(error),
            None => break Ok(()),
        }
        if filling.clients.load(Ordering::Relaxed) == 0 && orphan.is_none() {
            let worth_it = nar_size <= shared.options.fill.orphan_bytes_max;
            let orphans = Arc::clone(&shared.fillings.orphans);
            orphan = orphans.try_acquire_owned().ok().filter(|_| worth_it);
            if orphan.is_none() {
                debug!(path = %filling.info.path, "given up, its clients have left");
                return None;
            }
        }
    };
    // What came before is for the clients, also where the rest never comes.
    let fill = writing.finish().await?;
    match ended {
        Ok(()) => Some(fill),
        Err(error) => {
            filling.break_off(error);
            None
        }
    }
}

/// Gives each chunk to a client, too, for as long as it keeps up; one that lags reads on from the file.
fn teed(
    nar: BoxStream<'static, Result<Bytes, Error>>,
    mut raw: Option<mpsc::Sender<Bytes>>,
) -> BoxStream<'static, Result<Bytes, Error>> {
    let tee = move |item: &Result<Bytes, Error>| {
        let (Ok(chunk), Some(client)) = (item, &raw) else {
            return;
        };
        if client.try_send(chunk.clone()).is_err() {
            raw = None;
        }
    };
    nar.inspect(tee).boxed()
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
        let client = Client::of(Arc::clone(self));
        let nar_size = self.info.nar_size;
        match url.encoding {
            Encoding::Zstd => client.follow(Arc::clone(shared), *url),
            Encoding::None => client.plain(Arc::clone(shared), *url, raw),
            encoding @ Encoding::Xz => {
                let plain = client.plain(Arc::clone(shared), *url, raw);
                transfer::encode(shared, encoding, nar_size, plain)
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

    pub(super) fn cut(&self) -> Option<Error> {
        self.cut
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

fn key(info: &PathInfo) -> Key {
    (info.path.hash(), info.nar_hash)
}

/// Chunks of at most 256 KiB that a client of the NAR itself may lag behind before it reads the file.
const RAW_CHUNKS: usize = 32;
