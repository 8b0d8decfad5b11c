//! Narinfos in the folder written anew after the keys or the trust have changed, so that whoever reads the folder
//! without muster finds signatures by the keys of today, and none of ours where nobody vouches for a path any more.
//!
//! ```text
//! record (of the index, or a narinfo that still counts) -> temp files -> sync -> rename -> sync
//! ```
//!
//! Each file is replaced as a whole: one is the old narinfo or the new one whatever moment the process or
//! the machine dies at. What carries the right signatures is not written, so an interrupted pass goes on
//! where it was. NARs and the index are not touched: neither holds signatures of ours.

use std::io::{self, Write as _};

use tracing::debug;

use super::super::backend::{Record, Sign};
use super::folder::{Folder, Temp, narinfo_hash};
use super::text;
use super::upkeep::Upkeep;
use crate::nix::signature::{PublicKey, Signature};
use crate::nix::signer::{Need, Signer};
use crate::nix::store_path::{StoreDir, StorePathHash};

/// What became of the narinfos that were looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Narinfos that were written anew.
    pub signed: u64,
    /// Narinfos that carry the right signatures already, or need none.
    pub current: u64,
    /// Narinfos that nobody vouches for today, see [`Unvouched`].
    pub refused: u64,
    /// Narinfos of others, and such as went meanwhile; they are left alone.
    pub foreign: u64,
}

/// What becomes of narinfos that nobody vouches for today.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unvouched {
    /// They stay as they are: whoever asks may not have named everybody who is believed.
    Left,
    /// They lose our signatures. The index keeps what is known of them, so that trust that returns finds them.
    Unsigned,
}

/// How far a pass is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Narinfos that were looked at.
    pub done: u64,
    /// Narinfos in the folder when the pass began.
    pub total: u64,
    /// What became of them so far.
    pub tally: Tally,
}

impl Tally {
    /// Adds what became of others.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            signed: self.signed + other.signed,
            current: self.current + other.current,
            refused: self.refused + other.refused,
            foreign: self.foreign + other.foreign,
        }
    }

    /// Returns how many narinfos were looked at.
    pub fn all(&self) -> u64 {
        self.signed + self.current + self.refused + self.foreign
    }
}

impl Upkeep {
    /// Has every narinfo carry signatures by all keys of `signer` and by no others of ours; it needs
    /// the lock, so no server may use the folder: that one does it by itself when it is reloaded.
    ///
    /// A narinfo counts by the index, or by a signature of one of these keys or of a `former` one; and
    /// only if `believed` says that its grounds still hold. `step` is told after every few hundred.
    /// Interrupted, by an error too, it is begun again: what is done is found `current`.
    pub fn re_sign(
        &self,
        signer: &Signer,
        former: &[PublicKey],
        believed: &(dyn Fn(&Record) -> bool + Sync),
        mut step: impl FnMut(Progress),
    ) -> io::Result<Tally> {
        let sign = |record: &Record| believed(record).then(|| signatures(signer, record));
        let mut known = signer.public_keys();
        known.extend_from_slice(former);
        let hashes = self.narinfos()?;
        let mut tally = Tally::default();
        let total = hashes.len() as u64;
        self.folder.note_signed_by(None)?;
        for some in hashes.chunks(BATCH) {
            let mut records = Vec::with_capacity(some.len());
            for hash in some {
                match self.record(*hash, &known) {
                    Known::Record(record) => records.push(*record),
                    Known::Unvouched => tally.refused += 1,
                    Known::Foreign => tally.foreign += 1,
                }
            }
            let (folder, store_dir) = (&self.folder, &self.store_dir);
            batch(
                folder,
                store_dir,
                &sign,
                Unvouched::Left,
                &records,
                &mut tally,
            )?;
            step(Progress {
                done: tally.all(),
                total,
                tally,
            });
        }
        Ok(tally)
    }

    fn narinfos(&self) -> io::Result<Vec<StorePathHash>> {
        let mut hashes = Vec::new();
        for entry in std::fs::read_dir(self.folder.root())? {
            hashes.extend(entry?.file_name().to_str().and_then(narinfo_hash));
        }
        Ok(hashes)
    }

    /// What is known of a narinfo: the index is believed, the folder is by its signatures.
    fn record(&self, hash: StorePathHash, known: &[PublicKey]) -> Known {
        let listed = self.index.as_ref().and_then(|index| index.get(hash).ok()?);
        if let Some(record) = listed.filter(|record| record.file.is_some()) {
            return Known::Record(Box::new(record));
        }
        let Ok(Some(text)) = self.folder.read_narinfo(hash) else {
            return Known::Foreign;
        };
        match text::read_file(&text, known, &self.store_dir) {
            Ok(record) if record.info.path.hash() == hash => Known::Record(Box::new(record)),
            Err(text::TextError::Unsigned) => Known::Unvouched,
            _ => Known::Foreign,
        }
    }
}

enum Known {
    Record(Box<Record>),
    Unvouched,
    Foreign,
}

/// Makes what a path lacks of the signer's signatures; none where its name is proof enough.
fn signatures(signer: &Signer, record: &Record) -> Vec<Signature> {
    match signer.need(&record.info) {
        Need::ContentAddressed | Need::Signed => Vec::new(),
        Need::Signatures(made) => made,
    }
}

/// Writes those narinfos anew that do not carry the right signatures.
///
/// Only who may write in the folder calls it; the records are what is known of paths that are kept.
pub(super) fn batch(
    folder: &Folder,
    store_dir: &StoreDir,
    sign: &Sign,
    unvouched: Unvouched,
    records: &[Record],
    tally: &mut Tally,
) -> io::Result<()> {
    let mut written: Vec<(Temp, StorePathHash)> = Vec::new();
    for record in records {
        let hash = record.info.path.hash();
        let Some(carried) = carried(folder, store_dir, record)? else {
            tally.foreign += 1;
            continue;
        };
        let made = sign(record);
        let is_vouched = made.is_some();
        if !is_vouched {
            debug!(path = %record.info.path, "nobody vouches for it today, it is not signed");
            tally.refused += 1;
            if unvouched == Unvouched::Left {
                continue;
            }
        }
        let record = signed(record, made.unwrap_or_default());
        let wanted = &record.info.signatures;
        if wanted.len() == carried.len() && wanted.iter().all(|s| carried.contains(s)) {
            tally.current += u64::from(is_vouched);
            continue;
        }
        tally.signed += u64::from(is_vouched);
        let (temp, mut file) = folder.create_temp("narinfo")?;
        file.write_all(text::of_record(&record, store_dir).as_bytes())?;
        written.push((temp, hash));
    }
    if written.is_empty() {
        return Ok(());
    }
    folder.sync_all()?;
    for (temp, hash) in written {
        temp.rename(&folder.narinfo(hash))?;
    }
    folder.sync_root()
}

/// Returns the record with these signatures beside the foreign ones.
pub(super) fn signed(record: &Record, made: Vec<Signature>) -> Record {
    let mut record = record.clone();
    let anew = |s: &Signature| made.iter().any(|m| m.key_name() == s.key_name());
    record.info.signatures.retain(|s| !anew(s));
    record.info.signatures.extend(made);
    record
}

/// Returns the signatures of the narinfo that names the file of a record; `None`: there is no such.
fn carried(
    folder: &Folder,
    store_dir: &StoreDir,
    record: &Record,
) -> io::Result<Option<Vec<Signature>>> {
    let text = match folder.read_narinfo(record.info.path.hash()) {
        Ok(Some(text)) => text,
        Ok(None) => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => return Ok(None),
        Err(error) => return Err(error),
    };
    let found = text::read(&text, store_dir).ok();
    let same = found.filter(|found| record.file.is_some() && found.name() == record.name());
    Ok(same.map(|found| found.info.signatures))
}

/// Narinfos that share one sync, and open files at once.
const BATCH: usize = 256;
