//! What is kept on disk, as the substituter sees it: recalled when it is still believed, and a holder of
//! NARs like any other.
//!
//! A record is served as long as one of those who vouched for it would be believed today: trust that the
//! operator has withdrawn ends with the configuration, not with the cache. Which keys sign is decided
//! anew each time, too.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, BoxStream};
use futures_util::{StreamExt as _, TryStreamExt as _};
use tokio::sync::{Semaphore, watch};
use tracing::{debug, warn};

use crate::cache::backend::{Backend, Ground, NarFile, OpenNar, Record};
use crate::cache::memory::{Checked, Entry, Lookup, UpstreamId};
use crate::cache::nar_name::NarName;
use crate::cache::stamp::Content;
use crate::codec::decompress::{DecodeError, Decoder, Window};
use crate::nix::hash::NarHash;
use crate::nix::narinfo::Compression;
use crate::nix::path_info::{PathInfo, Trust, Verified};
use crate::nix::signature::SecretKey;
use crate::nix::store_path::{StorePath, StorePathHash};
use crate::upstream::{self, Link, NarStream, Upstream};

use super::member::Member;
use super::shared::Shared;
use super::{Setup, health, transfer};

/// A kept NAR that is being served as the file that it is.
#[derive(Clone)]
pub struct KeptNar {
    /// The file and its size.
    pub nar: OpenNar,
    name: NarName,
    backend: Arc<dyn Backend>,
}

impl KeptNar {
    /// Opens a kept NAR and counts it as used; `None` when exactly this file is not kept.
    pub(super) fn open(backend: &Arc<dyn Backend>, name: NarName) -> Option<Self> {
        let opened = backend.open(&name);
        let nar = opened
            .inspect_err(|error| warn!(file = %name, %error, "a kept NAR cannot be opened"))
            .ok()??;
        backend.touch(name.path_hash);
        Some(Self {
            nar,
            name,
            backend: Arc::clone(backend),
        })
    }

    /// Makes sure that the bytes are those that were checked before anybody gets them as they are; `None`, and the
    /// entry goes, when they are not.
    ///
    /// Only a file that was changed since, or is not in the index, is read for it: each of them once. Dropped,
    /// reading goes on, and what it finds counts.
    pub(super) async fn proven(self, proving: &Arc<Semaphore>) -> Option<Self> {
        if self.nar.content == Content::Unchanged {
            return Some(self);
        }
        // Who waits for the same file finds it read.
        let turn = Arc::clone(proving).acquire_owned().await.ok()?;
        let kept = Self::open(&self.backend, self.name)?;
        let Content::Unknown(stamp) = kept.nar.content else {
            return Some(kept);
        };
        let read = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            let cause = match kept.nar.has_hash(kept.name.file_hash) {
                Ok(true) => {
                    if let Some(stamp) = stamp {
                        kept.backend.proven(&kept.name, stamp);
                    }
                    return Some(kept);
                }
                Ok(false) => "it was changed".to_owned(),
                Err(error) => error.to_string(),
            };
            kept.backend.corrupt(&kept.name, &cause);
            None
        });
        read.await.ok()?
    }

    /// Notes that the file ended before its size, so that it is not served again.
    pub fn ended_early(&self, offset: u64) {
        let size_bytes = self.nar.size_bytes;
        let cause = format!("it ended after {offset} of {size_bytes} bytes");
        self.backend.corrupt(&self.name, &cause);
    }

    /// Reads a part of the file; an error where the file ends early, which is noted. Dropped, reading ends.
    pub fn read(
        self,
        part: std::ops::Range<u64>,
    ) -> BoxStream<'static, Result<Bytes, transfer::Error>> {
        let (offset, end) = (part.start, part.end);
        let chunks = stream::try_unfold((self, offset), move |(kept, offset)| async move {
            if offset >= end {
                return Ok(None);
            }
            match read_at(Arc::clone(&kept.nar.file), offset, end).await {
                Ok(chunk) => {
                    let next = offset + chunk.len() as u64;
                    Ok(Some((chunk, (kept, next))))
                }
                Err(error) => {
                    kept.ended_early(offset);
                    let cause = upstream::Error::Lost(format!("a kept file: {error}").into());
                    Err(transfer::Error::NoHolderLeft { offset, cause })
                }
            }
        });
        chunks.boxed()
    }

    /// Reads the NAR inside, unchecked; a damaged file is noted. Dropped, reading ends.
    fn decode(self, decoder: &Decoder, window: Window) -> Option<NarStream> {
        let file = read_file(Arc::clone(&self.nar.file), self.nar.size_bytes);
        let decoded = decoder.decode_stream(Compression::Zstd, file.boxed())?;
        let named = decoded.map_err(move |error| {
            let _held = &window;
            let cause = match error {
                DecodeError::Source(error) => error.to_string(),
                DecodeError::Damaged { cause, .. } => cause.to_string(),
            };
            self.backend.corrupt(&self.name, &cause);
            upstream::Error::Lost(format!("the kept file is damaged: {cause}").into())
        });
        Some(named.boxed())
    }
}

/// Reads a file from its beginning in chunks of at most 256 KiB.
pub(super) fn read_file(
    file: Arc<File>,
    size_bytes: u64,
) -> BoxStream<'static, std::io::Result<Bytes>> {
    stream::try_unfold((file, 0), move |(file, offset)| async move {
        if offset >= size_bytes {
            return Ok(None);
        }
        let chunk = read_at(Arc::clone(&file), offset, size_bytes).await?;
        let next = offset + chunk.len() as u64;
        Ok(Some((chunk, (file, next))))
    })
    .boxed()
}

/// Reads up to 256 KiB at a place; an end of the file before `end` is an error.
pub(super) async fn read_at(file: Arc<File>, offset: u64, end: u64) -> std::io::Result<Bytes> {
    let length = usize::try_from(end - offset).unwrap_or(usize::MAX);
    let length = length.min(CHUNK_BYTES);
    let read = tokio::task::spawn_blocking(move || {
        let mut chunk = BytesMut::zeroed(length);
        file.read_exact_at(&mut chunk, offset)?;
        Ok(chunk.freeze())
    });
    read.await.map_err(std::io::Error::other)?
}

/// The kept NARs as an upstream that holds them; it has no path infos to give.
struct Holder {
    backend: Arc<dyn Backend>,
    decoder: Decoder,
    proving: Arc<Semaphore>,
    link: watch::Sender<Link>,
}

/// Makes the member that stands for the kept NARs.
pub(super) fn member(
    backend: Arc<dyn Backend>,
    proving: Arc<Semaphore>,
    now: Instant,
) -> Arc<Member> {
    let peer = "kept NARs".into();
    let holder = Holder {
        backend,
        decoder: Decoder::default(),
        proving,
        link: watch::Sender::new(Link::Up { peer }),
    };
    let options = health::Options::default();
    let trust = Trust::Keys(Vec::new());
    Arc::new(Member::new(KEPT, Arc::new(holder), trust, options, now))
}

#[async_trait]
impl Upstream for Holder {
    fn name(&self) -> &str {
        "the cache"
    }

    fn link(&self) -> watch::Receiver<Link> {
        self.link.subscribe()
    }

    async fn path_info(&self, _: StorePathHash) -> Result<Option<PathInfo>, upstream::Error> {
        Ok(None)
    }

    async fn path_infos(
        &self,
        paths: &[StorePath],
    ) -> Vec<Result<Option<PathInfo>, upstream::Error>> {
        paths.iter().map(|_| Ok(None)).collect()
    }

    async fn nar(&self, info: &PathInfo) -> Result<Option<NarStream>, upstream::Error> {
        let record = self.backend.look_up(info.path.hash());
        let record = record.filter(|record| record.info.nar_hash == info.nar_hash);
        let name = record.and_then(|record| record.name());
        let kept = name.and_then(|name| KeptNar::open(&self.backend, name));
        let Some(kept) = kept else {
            return Ok(None);
        };
        let Some(kept) = kept.proven(&self.proving).await else {
            return Ok(None);
        };
        let window = self.decoder.window(info.nar_size).await;
        Ok(kept.decode(&self.decoder, window))
    }

    async fn keep(&self, _: &StorePath) -> Result<bool, upstream::Error> {
        Ok(true)
    }
}

impl Shared {
    /// Brings a path from disk to memory, if somebody who vouched for it is believed today.
    ///
    /// Its answer is given at once and asked for again behind it.
    pub(super) fn recall(
        &self,
        setup: &Arc<Setup>,
        hash: StorePathHash,
        now: Instant,
    ) -> Option<Arc<Entry>> {
        let record = self.kept.as_ref()?.backend.look_up(hash)?;
        let (verified, mut holders) = believed(setup, &record)?;
        holders.retain(|id| !self.is_distrusted(hash, *id));
        if record.file.is_none() && holders.is_empty() {
            return None;
        }
        let mut text = setup.publisher.publish(&verified);
        if let Some(file) = &record.file {
            text = setup.publisher.with_file(&text, file)?;
        }
        let nar_hash = verified.nar_hash;
        let entry = Entry::new(text, nar_hash, record.file, holders, Checked::Earlier(now));
        let entry = Arc::new(entry);
        self.if_current(setup, || {
            self.cache.commit(hash, Arc::clone(&entry));
            entry
        })
    }

    /// Keeps on disk what an upstream said of a path.
    pub(super) fn remember(&self, setup: &Setup, member: &Member, verified: &Verified) {
        let Some(kept) = &self.kept else {
            return;
        };
        kept.backend.remember(Record {
            info: setup.publisher.without_ours((**verified).clone()),
            grounds: vec![Ground {
                upstream: member.upstream.name().to_owned(),
                basis: verified.basis().clone(),
            }],
            file: None,
        });
    }

    /// Removes a kept NAR whose bytes were found wrong.
    pub(super) fn distrust_kept(&self, info: &PathInfo, cause: &str) {
        let Some(kept) = &self.kept else {
            return;
        };
        if let Some(file) = self.kept_file(info) {
            kept.backend.corrupt(&file.name(info), cause);
        }
    }

    /// Says by what those who have a path are believed, as its record on disk will.
    pub(super) fn grounds(setup: &Setup, info: &PathInfo, holders: &[UpstreamId]) -> Vec<Ground> {
        let members = holders.iter().filter_map(|id| setup.member(*id));
        let ground = |member: &Arc<Member>| {
            let verified = info.clone().verify(&member.trust, setup.store_dir()).ok()?;
            Some(Ground {
                upstream: member.upstream.name().to_owned(),
                basis: verified.basis().clone(),
            })
        };
        members.filter_map(ground).collect()
    }

    /// Publishes a path anew after its NAR was kept: from now on its narinfo names the file.
    pub(super) fn publish_kept(&self, info: &PathInfo, file: NarFile) {
        let hash = info.path.hash();
        // Before the entry is read: one of an older setup must not come back under a newer one.
        let setup = self.setup();
        let Lookup::Present(entry, _) = self.cache.get(hash, super::now()) else {
            return;
        };
        if entry.nar_hash != info.nar_hash {
            return;
        }
        let Some(text) = setup.publisher.with_file(&entry.text, &file) else {
            debug!(path = %info.path, "its narinfo cannot be read back");
            return;
        };
        let entry = Arc::new(entry.with_file(text, Some(file)));
        self.if_current(&setup, || self.cache.commit(hash, entry));
    }
}

/// Has the backend's narinfos, which others may read, signed as those that are served.
pub(super) fn sign(backend: &dyn Backend, setup: &Arc<Setup>) {
    let keys = setup.publisher.keys.iter().map(SecretKey::public);
    let keys = keys.collect();
    let trust = trust(setup);
    let setup = Arc::clone(setup);
    let sign = move |record: &Record| {
        let (verified, _) = believed(&setup, record)?;
        Some(setup.publisher.signatures(&verified))
    };
    backend.sign_with(keys, trust, Arc::new(sign));
}

/// Stands for who is believed of what, in whatever order they are named.
fn trust(setup: &Setup) -> String {
    let believed =
        |member: &Arc<Member>| format!("{} {:?}\n", member.upstream.name(), member.trust);
    let mut lines: Vec<_> = setup.members.iter().map(believed).collect();
    lines.sort_unstable();
    NarHash::of(lines.concat().as_bytes()).to_base32()
}

/// Checks a record against the trust of today; who of the upstreams is believed to have it.
fn believed(setup: &Setup, record: &Record) -> Option<(Verified, Vec<UpstreamId>)> {
    let mut holders = Vec::new();
    let mut verified = None;
    for ground in &record.grounds {
        let named = |member: &&Arc<Member>| member.upstream.name() == ground.upstream;
        let Some(member) = setup.members.iter().find(named) else {
            continue;
        };
        if let Ok(checked) = record.info.clone().verify(&member.trust, setup.store_dir()) {
            holders.push(member.id);
            verified.get_or_insert(checked);
        }
    }
    let verified = match verified {
        Some(verified) => verified,
        // Whoever had it: its content address is enough.
        None => {
            let nobody = Trust::Keys(Vec::new());
            record
                .info
                .clone()
                .verify(&nobody, setup.store_dir())
                .ok()?
        }
    };
    Some((verified, holders))
}

/// The number of the member that stands for the cache; upstreams are counted from 0.
pub(super) const KEPT: UpstreamId = UpstreamId(u16::MAX);

/// Files that are read at the same time before they are given out: one that is large holds no small one up.
pub(super) const PROVING_MAX: usize = 2;
const CHUNK_BYTES: usize = 256 << 10;
