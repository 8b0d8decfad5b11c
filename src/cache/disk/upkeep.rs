//! Looking after the folder from outside of a server: count, verify, make small, clear.
//!
//! Counting and verifying only read, so they work beside a server. What removes anything needs the lock.
//! Files that are not ours are counted and left alone.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use super::super::nar_name::NarName;
use super::folder::{self, Folder, FolderError, Lock, narinfo_hash};
use super::index::Index;
use super::removal;
use super::text::{self, TextError};
use super::verify::{Verdict, verify};
use crate::nix::store_path::{StoreDir, StorePathHash};

/// A folder that is looked after.
pub struct Upkeep {
    pub(super) folder: Folder,
    pub(super) store_dir: StoreDir,
    /// There where something may be removed.
    _lock: Option<Lock>,
    pub(super) index: Option<Index>,
}

/// What is in a folder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// NARs of ours.
    pub nars: u64,
    /// Bytes of their files.
    pub bytes: u64,
    /// Narinfos, whoever wrote them.
    pub narinfos: u64,
    /// Files in the folder of NARs that are not ours.
    pub foreign: u64,
    /// Bytes that are free on the file system.
    pub bytes_free: u64,
    /// Whether a server uses it.
    pub in_use: bool,
}

/// What a verification found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// Entries that are right.
    pub right: u64,
    /// Bytes of their files.
    pub bytes: u64,
    /// Files that are wrong, each with the reason.
    pub wrong: Vec<(PathBuf, String)>,
    /// Narinfos of others.
    pub foreign: u64,
}

/// What was removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// NARs.
    pub nars: u64,
    /// Bytes of their files.
    pub bytes: u64,
    /// Bytes that are left.
    pub bytes_left: u64,
}

impl Upkeep {
    /// Looks only; a server may be at work.
    pub fn read_only(dir: &Path, store_dir: StoreDir) -> Result<Self, FolderError> {
        let folder = Folder::new(dir.to_owned());
        folder_is_there(&folder)?;
        Ok(Self {
            folder,
            store_dir,
            _lock: None,
            index: None,
        })
    }

    /// Takes the lock, so that something may be removed; [`FolderError::InUse`] while a server has it.
    pub fn exclusive(dir: &Path, store_dir: StoreDir) -> Result<Self, FolderError> {
        let mut this = Self::read_only(dir, store_dir)?;
        // Not there where Nix alone has written, or where somebody deleted it.
        this.folder.make_own()?;
        this._lock = Some(this.folder.lock()?);
        let path = this.folder.index();
        // One that cannot be opened is made anew by the next server.
        if path.exists() {
            this.index = Index::open(&path, INDEX_CACHE_BYTES, this.store_dir.clone()).ok();
        }
        Ok(this)
    }

    /// Counts what is there, by names and sizes; `step` is told how many files were seen.
    pub fn census(&self, mut step: impl FnMut(u64)) -> io::Result<Census> {
        let mut census = Census {
            bytes_free: self.folder.free_bytes()?,
            in_use: self.folder.is_in_use(),
            ..Census::default()
        };
        for entry in fs::read_dir(self.folder.nars())? {
            let entry = entry?;
            let name = entry.file_name();
            if name.to_str().and_then(NarName::parse).is_none() {
                census.foreign += 1;
                continue;
            }
            // One that went meanwhile counts nothing.
            if let Ok(found) = entry.metadata() {
                census.nars += 1;
                census.bytes += found.len();
            }
            step(1);
        }
        for entry in fs::read_dir(self.folder.root())? {
            let name = entry?.file_name();
            if name.to_str().and_then(narinfo_hash).is_some() {
                census.narinfos += 1;
            }
        }
        Ok(census)
    }

    /// Reads every entry and checks it; NARs that no narinfo names are wrong, too.
    ///
    /// `step` is told how many bytes of NARs were seen. Nothing is removed.
    pub fn verify(&self, mut step: impl FnMut(u64)) -> io::Result<Findings> {
        let mut findings = Findings::default();
        for entry in fs::read_dir(self.folder.root())? {
            let name = entry?.file_name();
            if let Some(hash) = name.to_str().and_then(narinfo_hash) {
                self.verify_entry(hash, &mut findings, &mut step)?;
            }
        }
        for entry in fs::read_dir(self.folder.nars())? {
            let name = entry?.file_name();
            if let Some(name) = name.to_str().and_then(NarName::parse)
                && !removal::narinfo_names(&self.folder, &name)
                && self._lock.is_some()
            {
                let file = self.folder.nar(&name);
                findings
                    .wrong
                    .push((file, "no narinfo names it".to_owned()));
            }
        }
        Ok(findings)
    }

    fn verify_entry(
        &self,
        hash: StorePathHash,
        findings: &mut Findings,
        step: &mut impl FnMut(u64),
    ) -> io::Result<()> {
        let path = self.folder.narinfo(hash);
        let text = match self.folder.read_narinfo(hash) {
            Ok(Some(text)) => text,
            // It went meanwhile.
            Ok(None) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                findings.foreign += 1;
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let record = match text::read(&text, &self.store_dir) {
            Ok(record) if record.info.path.hash() == hash => record,
            Err(TextError::Foreign(_)) => {
                findings.foreign += 1;
                return Ok(());
            }
            Ok(_) => {
                findings
                    .wrong
                    .push((path, "it is of another path".to_owned()));
                return Ok(());
            }
            Err(error) => {
                findings.wrong.push((path, error.to_string()));
                return Ok(());
            }
        };
        let Some((name, file)) = record.name().zip(record.file) else {
            findings.foreign += 1;
            return Ok(());
        };
        let verdict = match self.folder.open_nar(&name) {
            Ok((opened, _)) => verify(opened, &record)?,
            Err(error) => match error.kind() {
                io::ErrorKind::NotFound if self._lock.is_none() && !path.exists() => return Ok(()),
                io::ErrorKind::NotFound | io::ErrorKind::InvalidData => {
                    Verdict::Wrong(error.to_string())
                }
                _ => return Err(error),
            },
        };
        match verdict {
            Verdict::Right => {
                findings.right += 1;
                findings.bytes += file.size_bytes;
            }
            Verdict::Wrong(cause) => findings.wrong.push((self.folder.nar(&name), cause)),
        }
        step(file.size_bytes);
        Ok(())
    }

    /// Removes what a verification found wrong; it needs the lock.
    pub fn remove_wrong(&self, findings: &Findings) -> io::Result<()> {
        for (path, _) in &findings.wrong {
            let name = path.file_name().and_then(|name| name.to_str());
            let name = name.unwrap_or_default();
            if let Some(nar) = NarName::parse(name) {
                if removal::narinfo_names(&self.folder, &nar) {
                    folder::remove(&self.folder.narinfo(nar.path_hash))?;
                }
                self.unlist(nar.path_hash);
            } else if let Some(hash) = narinfo_hash(name) {
                self.unlist(hash);
                let orphan = self.named(hash);
                folder::remove(path)?;
                if let Some(nar) = orphan {
                    folder::remove(&self.folder.nar(&nar))?;
                }
            }
            match folder::remove(path) {
                // A foreign folder of this name is its owner's.
                Err(error) if error.kind() == io::ErrorKind::IsADirectory => {}
                removed => removed?,
            }
        }
        Ok(())
    }

    /// The NAR of the same path that even a malformed narinfo names.
    fn named(&self, hash: StorePathHash) -> Option<NarName> {
        let text = self.folder.read_narinfo(hash).ok()??;
        let mut urls = text
            .lines()
            .filter_map(|line| line.strip_prefix("URL: nar/"));
        let name = NarName::parse(urls.next()?)?;
        (name.path_hash == hash).then_some(name)
    }

    /// Removes NARs without narinfo, then the least recently used entries until at most so many bytes
    /// are left; it needs the lock.
    ///
    /// `step` is told how many files were looked at.
    pub fn collect(&self, bytes_max: u64, mut step: impl FnMut(u64)) -> io::Result<Removed> {
        let mut removed = Removed::default();
        let mut entries = Vec::new();
        for entry in fs::read_dir(self.folder.nars())? {
            let entry = entry?;
            let Some(name) = entry.file_name().to_str().and_then(NarName::parse) else {
                continue;
            };
            let found = entry.metadata()?;
            step(1);
            if !found.is_file() {
                continue;
            }
            if removal::narinfo_names(&self.folder, &name) {
                removed.bytes_left += found.len();
                entries.push((self.last_use(&name, &found), name, found.len()));
            } else {
                folder::remove(&self.folder.nar(&name))?;
                removed.nars += 1;
                removed.bytes += found.len();
            }
        }
        entries.sort_unstable_by_key(|(used, ..)| *used);
        for (_, name, size) in entries {
            if removed.bytes_left <= bytes_max {
                break;
            }
            self.unlist(name.path_hash);
            folder::remove(&self.folder.narinfo(name.path_hash))?;
            folder::remove(&self.folder.nar(&name))?;
            removed.nars += 1;
            removed.bytes += size;
            removed.bytes_left -= size;
        }
        Ok(removed)
    }

    /// By the index, or by the file's age where the index does not know it.
    fn last_use(&self, name: &NarName, found: &fs::Metadata) -> u64 {
        let index = self.index.as_ref();
        let known = index.and_then(|index| index.last_use_of(name.path_hash).ok()?);
        let modified = || {
            let since = found.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
            u64::try_from(since.as_micros()).ok()
        };
        known.or_else(modified).unwrap_or_default()
    }

    /// Removes everything that is ours but `nix-cache-info`; it needs the lock.
    pub fn clear(mut self, mut step: impl FnMut(u64)) -> io::Result<Removed> {
        // First, so that it cannot list what is not there any more.
        self.index = None;
        folder::remove(&self.folder.index())?;
        let mut removed = Removed::default();
        for entry in fs::read_dir(self.folder.root())? {
            let name = entry?.file_name();
            let Some(hash) = name.to_str().and_then(narinfo_hash) else {
                continue;
            };
            let text = self.folder.read_narinfo(hash).ok().flatten();
            let read = text.map(|text| text::read(&text, &self.store_dir));
            if matches!(read, Some(Ok(record)) if record.file.is_some()) {
                folder::remove(&self.folder.narinfo(hash))?;
            }
        }
        for entry in fs::read_dir(self.folder.nars())? {
            let entry = entry?;
            let Some(name) = entry.file_name().to_str().and_then(NarName::parse) else {
                continue;
            };
            let found = entry.metadata()?;
            if found.is_file() {
                folder::remove(&self.folder.nar(&name))?;
                removed.nars += 1;
                removed.bytes += found.len();
            }
            step(1);
        }
        self.folder.clean_temp()?;
        Ok(removed)
    }

    fn unlist(&self, hash: StorePathHash) {
        if let Some(index) = &self.index {
            // What stays listed is found gone by the next server.
            _ = index.write(|changes| changes.remove(hash));
        }
    }
}

/// Refuses a folder that is none of ours, so that a typing error is not an empty cache.
fn folder_is_there(folder: &Folder) -> Result<(), FolderError> {
    let path = folder.nars();
    match fs::metadata(&path) {
        Ok(_) => Ok(()),
        Err(source) => Err(FolderError::Io { path, source }),
    }
}

const INDEX_CACHE_BYTES: usize = 64 << 20;
