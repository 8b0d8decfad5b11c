//! The folder of the cache on disk: which file is where, and whose it is.
//!
//! It is a binary cache as Nix reads and writes them, so that Nix and any web server can use it alone:
//!
//! ```text
//! nix-cache-info
//! <hash>.narinfo                     written after its NAR, removed before it
//! nar/<hash>-<NAR hash>-<file hash>.nar.zst
//! .muster/lock                       held by the process that may write
//! .muster/index.redb                 may be deleted while nobody holds the lock
//! .muster/signed-by                  the public keys that all narinfos carry signatures of
//! .muster/tmp/                       what is not complete; emptied at start
//! ```
//!
//! What has other names is foreign and left alone.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode, OFlags};

use super::super::nar_name::NarName;
use super::owner;
use crate::nix::cache_info::CacheInfo;
use crate::nix::store_path::StorePathHash;

/// The places in one folder.
#[derive(Clone, Debug)]
pub struct Folder {
    root: PathBuf,
}

/// The right to write; dropped, another process may have it.
#[derive(Debug)]
pub struct Lock {
    _file: File,
    /// Device and inode, to see that it is still the one in the folder.
    identity: (u64, u64),
}

/// Why a folder cannot be used or written.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// Another process has the lock.
    #[error("another muster uses {}", .0.display())]
    InUse(PathBuf),
    /// The folder is the cache of another store.
    #[error("{} holds paths of {found}, not of {wanted}", path.display())]
    OtherStore {
        /// The folder.
        path: PathBuf,
        /// What its `nix-cache-info` says.
        found: String,
        /// What was expected.
        wanted: String,
    },
    /// The system refused.
    #[error("cannot use {}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
}

/// A file under `.muster/tmp/`; dropped, it is gone.
#[derive(Debug, Default)]
pub struct Temp {
    path: Option<PathBuf>,
}

impl Folder {
    /// Names the places; it looks at nothing.
    pub fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// Returns the folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Returns where a path's narinfo is.
    pub fn narinfo(&self, hash: StorePathHash) -> PathBuf {
        self.root.join(format!("{hash}.narinfo"))
    }

    /// Returns the folder of all NARs.
    pub fn nars(&self) -> PathBuf {
        self.root.join("nar")
    }

    /// Returns where a NAR is.
    pub fn nar(&self, name: &NarName) -> PathBuf {
        self.root.join(name.url())
    }

    /// Returns where the index is.
    pub fn index(&self) -> PathBuf {
        self.own().join("index.redb")
    }

    /// Makes an empty file for the index, where there is none: whoever opens it gives it its form.
    pub fn make_index(&self) -> io::Result<()> {
        match owner::create_file(&self.root, &self.index()) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            made => made.map(drop),
        }
    }

    fn own(&self) -> PathBuf {
        self.root.join(".muster")
    }

    fn temp(&self) -> PathBuf {
        self.own().join("tmp")
    }

    /// Makes what is not there yet and writes `nix-cache-info`, after a look at whose folder it is.
    pub fn make(&self, info: &CacheInfo) -> Result<(), FolderError> {
        self.check_store(info)?;
        let made = DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&self.root);
        made.map_err(|source| refused(&self.root, source))?;
        for (path, mode) in [
            (self.nars(), 0o755),
            // Nix makes these in a cache of files before it reads, which fails for who may only read.
            (self.root.join("realisations"), 0o755),
            (self.root.join("build-trace-v2"), 0o755),
            (self.root.join("log"), 0o755),
        ] {
            let made = owner::create_dir(&self.root, &path, mode);
            made.map_err(|source| refused(&path, source))?;
        }
        self.make_own()?;
        let (path, text) = (self.cache_info(), info.render());
        if fs::read(&path).is_ok_and(|found| found == text.as_bytes()) {
            return Ok(());
        }
        let write = || {
            let (temp, mut file) = self.create_temp("info")?;
            // Not synced: what a power cut makes of it is written anew at the next start.
            file.write_all(text.as_bytes())?;
            temp.rename(&path)
        };
        write().map_err(|source| refused(&path, source))
    }

    /// Makes the folders that readers do not look into, where they are not there.
    pub fn make_own(&self) -> Result<(), FolderError> {
        for path in [self.own(), self.temp()] {
            let made = owner::create_dir(&self.root, &path, 0o700);
            made.map_err(|source| refused(&path, source))?;
        }
        Ok(())
    }

    /// Refuses the cache of another store; a folder without `nix-cache-info` is nobody's yet.
    pub fn check_store(&self, info: &CacheInfo) -> Result<(), FolderError> {
        let Ok(text) = fs::read_to_string(self.cache_info()) else {
            return Ok(());
        };
        match CacheInfo::parse(&text) {
            Ok(found) if found.store_dir == info.store_dir => Ok(()),
            // An interrupted write of somebody else's, or a text that was never one.
            _ if !text.contains("StoreDir:") => Ok(()),
            found => Err(FolderError::OtherStore {
                path: self.root.clone(),
                found: found.map_or_else(|e| e.to_string(), |info| info.store_dir.to_string()),
                wanted: info.store_dir.to_string(),
            }),
        }
    }

    fn cache_info(&self) -> PathBuf {
        self.root.join("nix-cache-info")
    }

    /// Takes the right to write, without waiting for whoever has it.
    pub fn lock(&self) -> Result<Lock, FolderError> {
        let path = self.own().join("lock");
        let lock = || {
            let file = match owner::create_file(&self.root, &path) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                    OpenOptions::new().write(true).open(&path)?
                }
                made => made?,
            };
            flock_soon(&file)?;
            let found = file.metadata()?;
            Ok(Lock {
                identity: (found.dev(), found.ino()),
                _file: file,
            })
        };
        lock().map_err(|source: io::Error| match source.kind() {
            ErrorKind::WouldBlock => FolderError::InUse(self.root.clone()),
            _ => refused(&path, source),
        })
    }

    /// Tells whether another process may write; a folder that nobody ever locked is free.
    pub fn is_in_use(&self) -> bool {
        let Ok(file) = File::open(self.own().join("lock")) else {
            return false;
        };
        let taken = rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared);
        taken == Err(rustix::io::Errno::WOULDBLOCK)
    }

    /// Tells whether the lock is still that of this folder: false when it was deleted or replaced.
    pub fn still_has(&self, lock: &Lock) -> bool {
        let found = fs::metadata(self.own().join("lock"));
        found.is_ok_and(|found| (found.dev(), found.ino()) == lock.identity)
    }

    /// Removes what an earlier process left incomplete; only the holder of the lock may.
    pub fn clean_temp(&self) -> io::Result<()> {
        for entry in fs::read_dir(self.temp())? {
            let path = entry?.path();
            match fs::remove_file(&path) {
                Err(error) if error.kind() == ErrorKind::IsADirectory => {}
                removed => removed?,
            }
        }
        Ok(())
    }

    /// Makes an empty file for what is not complete yet.
    pub fn create_temp(&self, kind: &str) -> io::Result<(Temp, File)> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = self
            .temp()
            .join(format!("{kind}.{}.{number}", std::process::id()));
        let file = match owner::create_file(&self.root, &path) {
            // One of the same name can only be a dead process's.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                fs::remove_file(&path)?;
                owner::create_file(&self.root, &path)?
            }
            made => made?,
        };
        Ok((Temp { path: Some(path) }, file))
    }

    /// Returns how many bytes this process may still write to the file system.
    pub fn free_bytes(&self) -> io::Result<u64> {
        let found = rustix::fs::statvfs(&self.root)?;
        Ok(found.f_bavail.saturating_mul(found.f_frsize))
    }

    /// Tells whether all narinfos are known to carry just the signatures that this stands for.
    pub fn is_signed_by(&self, mark: &str) -> bool {
        fs::read(self.signed_by()).is_ok_and(|found| found == mark.as_bytes())
    }

    /// Notes what stands for the signatures of all narinfos; `None`: nothing does at present.
    pub fn note_signed_by(&self, mark: Option<&str>) -> io::Result<()> {
        let path = self.signed_by();
        let Some(mark) = mark else {
            return remove(&path);
        };
        let (temp, mut file) = self.create_temp("keys")?;
        file.write_all(mark.as_bytes())?;
        file.sync_data()?;
        temp.rename(&path)
    }

    fn signed_by(&self) -> PathBuf {
        self.own().join("signed-by")
    }

    /// Opens a NAR for reading, with its size in bytes; what is no plain file is `InvalidData`.
    pub fn open_nar(&self, name: &NarName) -> io::Result<(File, u64)> {
        // A foreign pipe of this name must not be waited for, a link not followed.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let opened = rustix::fs::open(self.nar(name), flags, Mode::empty());
        let file = opened.map(File::from).map_err(|error| match error {
            rustix::io::Errno::LOOP => io::Error::new(ErrorKind::InvalidData, "it is a link"),
            error => error.into(),
        })?;
        let found = file.metadata()?;
        if !found.is_file() {
            return Err(io::Error::new(ErrorKind::InvalidData, "it is no file"));
        }
        Ok((file, found.len()))
    }

    /// Reads a narinfo; `None` when there is none, `InvalidData` when it is not one by its size.
    pub fn read_narinfo(&self, hash: StorePathHash) -> io::Result<Option<String>> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = match rustix::fs::open(self.narinfo(hash), flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(rustix::io::Errno::NOENT) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(ErrorKind::InvalidData, "it is no file"));
        }
        let mut text = String::new();
        file.take(NARINFO_BYTES_MAX + 1).read_to_string(&mut text)?;
        if text.len() as u64 > NARINFO_BYTES_MAX {
            return Err(io::Error::new(ErrorKind::InvalidData, "it is too long"));
        }
        Ok(Some(text))
    }

    /// Waits until the names in the folder of all NARs are on disk.
    pub fn sync_nars(&self) -> io::Result<()> {
        File::open(self.nars())?.sync_all()
    }

    /// Waits until the names in the folder itself are on disk.
    pub fn sync_root(&self) -> io::Result<()> {
        File::open(&self.root)?.sync_all()
    }

    /// Waits until everything that was written to the file system is on disk.
    pub fn sync_all(&self) -> io::Result<()> {
        Ok(rustix::fs::syncfs(File::open(&self.root)?)?)
    }
}

impl Temp {
    /// Returns where it is; `None` for none.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Gives the file its lasting name; what had it is replaced.
    pub fn rename(mut self, to: &Path) -> io::Result<()> {
        if let Some(path) = &self.path {
            fs::rename(path, to)?;
        }
        self.path = None;
        Ok(())
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        if let Some(path) = self.path.take() {
            // What cannot be removed now is removed at the next start.
            _ = fs::remove_file(path);
        }
    }
}

fn refused(path: &Path, source: io::Error) -> FolderError {
    let path = path.to_owned();
    FolderError::Io { path, source }
}

/// Takes the lock, with patience for somebody who only looks whether it is taken.
fn flock_soon(file: &File) -> rustix::io::Result<()> {
    for _ in 0..LOCK_TRIES {
        match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => std::thread::sleep(LOCK_PAUSE),
            done => return done,
        }
    }
    Err(rustix::io::Errno::WOULDBLOCK)
}

/// Reads the hash part from the name of a narinfo.
pub fn narinfo_hash(file: &str) -> Option<StorePathHash> {
    StorePathHash::parse(file.strip_suffix(".narinfo")?)
}

/// Removes a file; one that is not there is no error.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// More than the parser takes.
const NARINFO_BYTES_MAX: u64 = 1 << 20;
const LOCK_TRIES: u32 = 4;
const LOCK_PAUSE: Duration = Duration::from_millis(5);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nix::store_path::StoreDir;

    fn folder() -> (tempfile::TempDir, Folder) {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::new(dir.path().join("cache"));
        folder.make(&CacheInfo::default()).unwrap();
        (dir, folder)
    }

    #[test]
    fn the_cache_of_another_store_is_left_alone() {
        let (_dir, folder) = folder();
        let other = CacheInfo {
            store_dir: StoreDir::new("/gnu/store").unwrap(),
            ..CacheInfo::default()
        };
        let error = folder.make(&other).unwrap_err();
        assert!(matches!(error, FolderError::OtherStore { .. }), "{error}");
        let info = fs::read_to_string(folder.cache_info()).unwrap();
        assert_eq!(info, CacheInfo::default().render());
    }

    #[test]
    fn one_lock_at_a_time_and_only_of_this_folder() {
        let (_dir, folder) = folder();
        assert!(!folder.is_in_use());
        let lock = folder.lock().unwrap();
        assert!(folder.is_in_use() && folder.still_has(&lock));
        assert!(matches!(folder.lock(), Err(FolderError::InUse(_))));
        fs::remove_dir_all(folder.root()).unwrap();
        assert!(!folder.still_has(&lock));
        folder.make(&CacheInfo::default()).unwrap();
        let anew = folder.lock().unwrap();
        assert!(!folder.still_has(&lock) && folder.still_has(&anew));
    }

    #[test]
    fn what_is_incomplete_goes_when_it_is_dropped_or_at_the_next_start() {
        let (_dir, folder) = folder();
        let (temp, _) = folder.create_temp("nar").unwrap();
        drop(temp);
        assert_eq!(fs::read_dir(folder.temp()).unwrap().count(), 0);
        let (temp, _) = folder.create_temp("nar").unwrap();
        std::mem::forget(temp);
        folder.clean_temp().unwrap();
        assert_eq!(fs::read_dir(folder.temp()).unwrap().count(), 0);
    }

    #[test]
    fn pipes_links_and_folders_are_no_nars() {
        let (_dir, folder) = folder();
        let name = NarName {
            path_hash: StorePathHash([1; 20]),
            nar_hash: crate::nix::hash::NarHash([2; 32]),
            file_hash: super::super::super::nar_name::FileHash([3; 32]),
        };
        let path = folder.nar(&name);
        let kind = || folder.open_nar(&name).unwrap_err().kind();
        assert_eq!(kind(), ErrorKind::NotFound);
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, Mode::from_raw_mode(0o600)).unwrap();
        assert_eq!(kind(), ErrorKind::InvalidData);
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
        assert_eq!(kind(), ErrorKind::InvalidData);
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert_eq!(kind(), ErrorKind::InvalidData);
    }
}
