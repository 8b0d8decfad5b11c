//! A binary cache as an upstream: `http://`, `https://` and `file://`.
//!
//! A narinfo is asked for once and answers two questions: what the path is, and where its NAR is. The latter is
//! kept for the transfer that may follow, in a bounded memory; where it was lost the narinfo is asked for
//! again. NARs come out decoded, or as the files that they are in; hash and size are the reader's to check, but a
//! file that brings far more bytes than its NAR has is given up here, because no reader would see it.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::{self, StreamExt as _};
use moka::sync::Cache;
use tokio::sync::watch;

use super::cache_files::{CacheFiles, FilePart, FileSize, FileStream, whole};
use super::cache_http::decode_error;
use super::cache_link::CacheLink;
use super::cache_pulse::{CachePulse, CachePulseOptions};
use super::cache_turns::{Turns, size_of};
use super::catalog_feed::{FedCatalog, FeedOptions, FeedSource, FeedStream};
use super::closures::Closures;
use super::dialect::read_narinfo;
use super::peer_closures::{PeerClosureOptions, PeerClosures};
use super::{EncodedNar, Error, Link, NarStream, Upstream};
use crate::codec::catalog::view::Says;
use crate::codec::decompress::Decoder;
use crate::nix::build_trace::{BuildTraceEntry, BuildTraceKey};
use crate::nix::hash::{Hash, NarHash};
use crate::nix::narinfo::{Compression, NarInfo};
use crate::nix::path_info::PathInfo;
use crate::nix::realisation::{DrvOutput, Realisation};
use crate::nix::store_path::{StoreDir, StorePath, StorePathHash};

/// A binary cache that is asked.
pub struct BinaryCache {
    name: String,
    store_dir: StoreDir,
    files: Arc<dyn CacheFiles>,
    link: CacheLink,
    places: Cache<StorePathHash, Arc<Place>>,
    decoder: Decoder,
    turns: Turns,
    options: BinaryCacheOptions,
    /// What a muster says of itself without being asked.
    catalog: Option<FedCatalog>,
}

/// The bounds of a binary cache.
#[derive(Clone, Debug)]
pub struct BinaryCacheOptions {
    /// NARs of more than 4 MiB that are read at the same time.
    pub large_max: usize,
    /// The same for small ones; over HTTP/1 each has a connection.
    pub small_max: usize,
    /// KiB under way at once where they share one: a round trip's worth of a quick line, and little enough that over a
    /// slow one each of them still gets something every few seconds.
    pub shared_small_kib: u32,
    /// Places of NARs that are remembered, some 200 bytes each; a closure has up to 20,000 paths.
    pub places_max: u64,
    /// Bytes of a decoded build log; it is held in memory whole.
    pub log_bytes_max: usize,
    /// Of the catalog that a muster feeds; `None`: it is asked for none.
    pub catalog: Option<FeedOptions>,
    /// Of the sign of life that is asked for where a cache is quiet.
    pub pulse: CachePulseOptions,
    /// Of the closures that a muster tells.
    pub closures: PeerClosureOptions,
}

/// Where the NAR of a path is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// What [`CacheFiles::locate`] made of the narinfo's `URL`.
    pub file: String,
    /// How it is compressed.
    pub compression: Compression,
    /// Hash of the compressed file, where it is said.
    pub file_hash: Option<Hash>,
    /// Size of the compressed file, where it is said.
    pub file_size: Option<u64>,
    /// Hash of the NAR that is in it.
    pub nar_hash: NarHash,
}

impl BinaryCache {
    /// Begins to ask a cache; needs a tokio runtime.
    pub fn start(
        name: String,
        store_dir: StoreDir,
        files: Arc<dyn CacheFiles>,
        decoder: Decoder,
        options: BinaryCacheOptions,
    ) -> Self {
        let (theirs, pulse) = (Arc::clone(&files), options.pulse);
        let link = CacheLink::start(name.clone(), store_dir.clone(), theirs, pulse);
        let catalog = options.catalog.map(|options| {
            let source = MusterFeed {
                files: Arc::clone(&files),
                link: link.watch(),
                pulse: link.pulse(),
            };
            FedCatalog::start(name.clone(), Arc::new(source), store_dir.clone(), options)
        });
        Self {
            catalog,
            name,
            store_dir,
            files,
            link,
            places: Cache::new(options.places_max),
            decoder,
            turns: Turns::new(&options),
            options,
        }
    }

    /// Asks for a narinfo and remembers where its NAR is.
    async fn narinfo(&self, hash: StorePathHash) -> Result<Option<NarInfo>, Error> {
        let file = format!("{hash}.narinfo");
        let read = self.files.read(&file, NARINFO_BYTES_MAX);
        let text = self.link.ask(read).await?;
        let Some(text) = text else {
            self.places.invalidate(&hash);
            return Ok(None);
        };
        let narinfo = read_narinfo(&text, &self.store_dir);
        let narinfo = narinfo.map_err(|e| Error::Remote(format!("{file}: {e}").into()))?;
        let place = Place::of(&narinfo, &*self.files)?;
        self.places.insert(hash, Arc::new(place));
        Ok(Some(narinfo))
    }

    /// Finds where this very NAR is; `None` when the cache has the path no more, or with another NAR.
    async fn place(&self, info: &PathInfo, memory: Memory) -> Result<Option<Arc<Place>>, Error> {
        let hash = info.path.hash();
        let fits = |place: &Arc<Place>| place.nar_hash == info.nar_hash;
        if memory == Memory::Used
            && let Some(place) = self.places.get(&hash).filter(fits)
        {
            return Ok(Some(place));
        }
        let Some(narinfo) = self.narinfo(hash).await? else {
            return Ok(None);
        };
        let same = narinfo.info.path == info.path;
        Ok(self.places.get(&hash).filter(fits).filter(|_| same))
    }

    /// Opens the file of a NAR; where it has moved, at its new place.
    async fn open(&self, info: &PathInfo) -> Result<Option<(Arc<Place>, FileStream)>, Error> {
        let Some(place) = self.place(info, Memory::Used).await? else {
            return Ok(None);
        };
        let size = size_of(info.nar_size);
        if let Some(file) = self
            .link
            .note(self.files.open(&place.file, 0, size).await)?
        {
            return Ok(Some((place, file.bytes)));
        }
        // Caches that repack name the NAR otherwise from then on.
        let moved = self.place(info, Memory::Renewed).await?;
        let Some(moved) = moved.filter(|moved| moved.file != place.file) else {
            return Ok(None);
        };
        let file = self.files.open(&moved.file, 0, size).await;
        let file = self.link.note(file)?;
        Ok(file.map(|file| (moved, file.bytes)))
    }
}

impl Place {
    /// Reads it; a URL that must not be followed is an error: nobody is promised what cannot be had.
    fn of(narinfo: &NarInfo, files: &dyn CacheFiles) -> Result<Self, Error> {
        Ok(Self {
            file: files.locate(&narinfo.url)?,
            compression: narinfo.compression,
            file_hash: narinfo.file_hash.clone(),
            file_size: narinfo.file_size,
            nar_hash: narinfo.info.nar_hash,
        })
    }
}

/// The catalog of a cache that is a muster; others are not asked for one.
struct MusterFeed {
    files: Arc<dyn CacheFiles>,
    link: watch::Receiver<Link>,
    pulse: Arc<CachePulse>,
}

#[async_trait]
impl FeedSource for MusterFeed {
    async fn open(&self) -> Result<Option<FeedStream>, Error> {
        let mut link = self.link.clone();
        let up = link.wait_for(|link| matches!(link, Link::Up { .. })).await;
        if !up.is_ok_and(|link| matches!(&*link, Link::Up { peer } if peer.contains(MUSTER))) {
            return Ok(None);
        }
        let place = self.files.locate(CATALOG)?;
        let feed = self.files.open(&place, 0, FileSize::Endless).await?;
        Ok(feed.map(|feed| Arc::clone(&self.pulse).watching(feed.bytes)))
    }
}

/// Whether what is remembered of a path's place counts.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Memory {
    Used,
    Renewed,
}

#[async_trait]
impl Upstream for BinaryCache {
    fn name(&self) -> &str {
        &self.name
    }

    fn link(&self) -> watch::Receiver<Link> {
        self.link.watch()
    }

    fn reconnect(&self) {
        self.link.reconnect();
    }

    /// A "no" of a fresh catalog needs no question.
    async fn path_info(&self, hash: StorePathHash) -> Result<Option<PathInfo>, Error> {
        let says = self.catalog.as_ref().map(|catalog| catalog.says(&hash));
        if says == Some(Says::No) {
            self.places.invalidate(&hash);
            return Ok(None);
        }
        Ok(self.narinfo(hash).await?.map(|narinfo| narinfo.info))
    }

    fn paths_known(&self) -> Option<usize> {
        let (paths, is_fresh) = self.catalog.as_ref()?.state();
        is_fresh.then_some(paths)
    }

    async fn path_infos(&self, paths: &[StorePath]) -> Vec<Result<Option<PathInfo>, Error>> {
        let one = |path: StorePath| async move {
            let info = self.path_info(path.hash()).await?;
            Ok(info.filter(|info| info.path == path))
        };
        let questions = stream::iter(paths.to_vec()).map(one);
        let answers = questions.buffered(self.files.questions_max());
        answers.collect().await
    }

    fn shares_connections(&self) -> bool {
        self.files.shares_connections()
    }

    /// A muster with a store of its own tells its closures.
    fn closures(&self) -> Option<Arc<dyn Closures>> {
        if !self.files.tells_closures() {
            return None;
        }
        let (files, places) = (Arc::clone(&self.files), self.places.clone());
        let found = move |narinfo: &NarInfo| {
            let place = Place::of(narinfo, &*files)?;
            places.insert(narinfo.info.path.hash(), Arc::new(place));
            Ok(())
        };
        let closures = PeerClosures::new(
            Arc::clone(&self.files),
            self.link.pulse(),
            self.store_dir.clone(),
            self.options.closures,
            found,
        );
        Some(Arc::new(closures))
    }

    async fn nar(&self, info: &PathInfo) -> Result<Option<NarStream>, Error> {
        self.link.ready().await?;
        let permit = self.turns.next(info.nar_size, &*self.files).await?;
        let Some((place, file)) = self.open(info).await? else {
            return Ok(None);
        };
        let file = bounded(file, file_bytes_max(info.nar_size)).boxed();
        let compression = place.compression;
        let nar = self
            .decoder
            .decode_stream(compression, file)
            .ok_or_else(|| {
                let name = compression.name();
                Error::Unsupported(format!("compression {name} cannot be read").into())
            })?;
        let nar = nar.map(|chunk| chunk.map_err(decode_error));
        Ok(Some(small_chunks(nar.boxed(), permit).boxed()))
    }

    async fn encoded_nar(&self, info: &PathInfo) -> Result<Option<EncodedNar>, Error> {
        self.link.ready().await?;
        let place = self.place(info, Memory::Used).await?;
        Ok(place.map(|place| EncodedNar {
            compression: place.compression,
            file_hash: place.file_hash.clone(),
            file_size: place.file_size,
            place: place.file.clone(),
        }))
    }

    async fn open_encoded(
        &self,
        info: &PathInfo,
        nar: &EncodedNar,
        offset: u64,
    ) -> Result<Option<FilePart>, Error> {
        self.link.ready().await?;
        let permit = self.turns.next(info.nar_size, &*self.files).await?;
        let size = size_of(info.nar_size);
        let opened = self.files.open(&nar.place, offset, size).await;
        let Some(FilePart { begins_at, bytes }) = self.link.note(opened)? else {
            return Ok(None);
        };
        let left = file_bytes_max(info.nar_size).saturating_sub(begins_at);
        let bytes = small_chunks(bounded(bytes, left).boxed(), permit).boxed();
        Ok(Some(FilePart { begins_at, bytes }))
    }

    async fn keep(&self, path: &StorePath) -> Result<bool, Error> {
        // Nobody can be asked to keep it. What was seen a moment ago is taken to be there yet.
        if self.places.contains_key(&path.hash()) {
            return Ok(true);
        }
        Ok(self
            .path_info(path.hash())
            .await?
            .is_some_and(|info| info.path == *path))
    }

    async fn build_log(&self, derivation: &StorePath) -> Result<Option<Bytes>, Error> {
        if !derivation.is_derivation() {
            return Ok(None);
        }
        let bytes_max = self.options.log_bytes_max;
        let file = format!("log/{derivation}");
        let log = self.link.ask(self.files.read(&file, bytes_max)).await?;
        let Some(log) = log else {
            return Ok(None);
        };
        // A server that knows nothing of it sends the file as it was uploaded.
        let Some(packed) = packed_as(&log) else {
            return Ok(Some(log));
        };
        let source = stream::iter([Ok::<_, Error>(log)]);
        let Some(decoded) = self.decoder.decode_stream(packed, source) else {
            return Ok(None);
        };
        let decoded = decoded.map(|chunk| chunk.map_err(decode_error));
        whole(decoded.boxed(), bytes_max).await.map(Some)
    }

    async fn realisation(&self, id: &DrvOutput) -> Result<Option<Realisation>, Error> {
        let file = format!("realisations/{id}.doi");
        let read = self.files.read(&file, NARINFO_BYTES_MAX);
        let json = self.link.ask(read).await?;
        let Some(json) = json else {
            return Ok(None);
        };
        let malformed =
            |error: &dyn std::fmt::Display| Error::Remote(format!("{file}: {error}").into());
        let realisation = Realisation::parse(&json).map_err(|e| malformed(&e))?;
        match realisation.id == *id {
            true => Ok(Some(realisation)),
            false => Err(malformed(&format_args!("it is that of {}", realisation.id))),
        }
    }

    async fn build_trace(&self, key: &BuildTraceKey) -> Result<Option<BuildTraceEntry>, Error> {
        let (derivation, output) = (key.derivation(), key.output());
        let file = format!("build-trace-v2/{derivation}/{output}.doi");
        let read = self.files.read(&file, NARINFO_BYTES_MAX);
        let json = self.link.ask(read).await?;
        let entry = json.map(|json| BuildTraceEntry::parse(key.clone(), &json));
        let entry = entry.transpose();
        entry.map_err(|error| Error::Remote(format!("{file}: {error}").into()))
    }
}

/// Tells how a build log was packed by its first bytes, which no text has.
fn packed_as(log: &[u8]) -> Option<Compression> {
    let magics: [(&[u8], Compression); 4] = [
        (b"BZh", Compression::Bzip2),
        (b"\xfd7zXZ\0", Compression::Xz),
        (b"\x28\xb5\x2f\xfd", Compression::Zstd),
        (b"\x1f\x8b", Compression::Gzip),
    ];
    let found = magics.into_iter().find(|(magic, _)| log.starts_with(magic));
    found.map(|(_, compression)| compression)
}

/// What a file may have at most: no compression makes a NAR much larger than it is.
fn file_bytes_max(nar_size: u64) -> u64 {
    nar_size
        .saturating_add(nar_size / 8)
        .saturating_add(1 << 20)
}

/// Ends a stream with an error behind so many bytes.
fn bounded(
    file: FileStream,
    bytes_max: u64,
) -> impl futures_util::Stream<Item = Result<Bytes, Error>> + Send {
    let state = Some((file, 0_u64));
    stream::unfold(state, move |state| async move {
        let (mut file, mut bytes) = state?;
        match file.next().await? {
            Ok(chunk) => {
                bytes = bytes.saturating_add(chunk.len() as u64);
                if bytes > bytes_max {
                    let cause = "the file has far more bytes than its nar";
                    return Some((Err(Error::Protocol(cause.into())), None));
                }
                Some((Ok(chunk), Some((file, bytes))))
            }
            Err(error) => Some((Err(error), None)),
        }
    })
}

/// Cuts chunks to what a [`NarStream`] may have; whatever else the transfer holds goes with the stream.
fn small_chunks<T: Send>(
    nar: FileStream,
    held: T,
) -> impl futures_util::Stream<Item = Result<Bytes, Error>> + Send {
    let state = (nar, Bytes::new(), held);
    stream::unfold(state, |(mut nar, mut rest, held)| async move {
        while rest.is_empty() {
            match nar.next().await? {
                Ok(chunk) => rest = chunk,
                Err(error) => return Some((Err(error), (stream::empty().boxed(), rest, held))),
            }
        }
        let chunk = rest.split_to(rest.len().min(CHUNK_BYTES_MAX));
        Some((Ok(chunk), (nar, rest, held)))
    })
}

impl Default for BinaryCacheOptions {
    fn default() -> Self {
        Self {
            large_max: 8,
            small_max: 25,
            shared_small_kib: 4 << 10,
            places_max: 50_000,
            log_bytes_max: 64 << 20,
            catalog: Some(FeedOptions::default()),
            pulse: CachePulseOptions::default(),
            closures: PeerClosureOptions::default(),
        }
    }
}

/// What a muster calls itself in the header `Server`, and where its catalog is.
const MUSTER: &str = "muster/";
const CATALOG: &str = "muster/catalog";

const NARINFO_BYTES_MAX: usize = 1 << 20;
const CHUNK_BYTES_MAX: usize = 256 << 10;
