//! Packs one store path into its NAR, chunk by chunk, on the thread of whoever calls.
//!
//! Files are read straight into the chunks that go to the client. The walk follows no symlink and
//! holds one open directory per level, so a path that is moved away while it is read stays whole or
//! fails; a file that is shorter or longer than its directory said is an error and never padded. So is one that
//! is not as it was when the path was hashed, before any byte of it is given, and one that is written to
//! while it is read. The grammar is in `nix::nar`; names are sorted by their bytes. Source:
//! `libutil/archive.cc`.

use std::ffi::CString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use bytes::Bytes;
use rustix::buffer::spare_capacity;
use rustix::fs::{Advice, AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat};

use super::buffers::Buffers;
use super::facts::{Facts, Ledger};

/// A walk over one path, stopped between two chunks.
pub(super) struct Packer {
    /// Open directories, the innermost last.
    folders: Vec<Folder>,
    /// The file that is being read.
    contents: Option<Contents>,
    buffers: Buffers,
    /// Bytes still to come by the path info; only a hint for the size of buffers.
    left: u64,
    offset: u64,
    ledger: Ledger,
}

/// Why a path is not packed to its end.
#[derive(Debug)]
pub(super) enum PackError {
    /// Its files cannot be read.
    Unreadable(io::Error),
    /// The next file is not as it was; all that was given is right.
    Differs,
    /// The file of which bytes were given was written to meanwhile.
    Written,
}

struct Folder {
    fd: OwnedFd,
    /// Names in descending order: the next is the last.
    entries: Vec<(CString, FileType)>,
    /// Whether it is an entry of another, which is closed after it.
    is_entry: bool,
}

struct Contents {
    fd: OwnedFd,
    size: u64,
    /// Time of the last write.
    written: (i64, u64),
    left: u64,
    is_entry: bool,
}

impl Packer {
    /// Begins at a path whose files are to be as they were, where that is known; `NotFound` when there is
    /// nothing.
    pub(super) fn open(
        path: &Path,
        nar_size: u64,
        buffers: Buffers,
        before: Option<Facts>,
    ) -> Result<(Self, Vec<u8>), PackError> {
        let mut packer = Self {
            folders: Vec::new(),
            contents: None,
            left: nar_size,
            offset: 0,
            ledger: before.map_or_else(Ledger::noting, Ledger::comparing),
            buffers,
        };
        let mut chunk = packer.buffer();
        put(&mut chunk, b"nix-archive-1");
        let name = CString::new(path.as_os_str().as_encoded_bytes()).map_err(io::Error::from)?;
        packer.node(&mut chunk, None, &name, FileType::Unknown)?;
        Ok((packer, chunk))
    }

    /// Tells whether the last chunk was given.
    pub(super) fn is_done(&self) -> bool {
        self.contents.is_none() && self.folders.is_empty()
    }

    /// Returns how many bytes were given.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// Returns what the walk saw, once it is done, unless that was known before.
    pub(super) fn facts(&mut self) -> Option<Facts> {
        self.ledger.facts()
    }

    /// Fills a buffer for the next chunk; the first begins with what [`open`](Self::open) gave.
    ///
    /// A chunk is empty only when all was given.
    pub(super) fn fill(&mut self, begun: Option<Vec<u8>>) -> Result<Bytes, PackError> {
        let mut chunk = begun.unwrap_or_else(|| self.buffer());
        while !self.is_done() {
            if let Some(contents) = self.contents.take() {
                if let Some(open) = self.read(&mut chunk, contents)? {
                    self.contents = Some(open);
                    break;
                }
            } else if chunk.capacity() - chunk.len() < STEP_BYTES_MAX {
                break;
            } else {
                self.step(&mut chunk)?;
            }
        }
        self.offset += chunk.len() as u64;
        self.left = self.left.saturating_sub(chunk.len() as u64);
        Ok(self.buffers.freeze(chunk))
    }

    /// Begins the next entry of the innermost directory, or ends it.
    fn step(&mut self, chunk: &mut Vec<u8>) -> Result<(), PackError> {
        let Some(mut folder) = self.folders.pop() else {
            return Ok(());
        };
        let Some((name, kind)) = folder.entries.pop() else {
            close(chunk, folder.is_entry);
            return Ok(());
        };
        if self.folders.len() + 1 >= DEPTH_MAX {
            return Err(unfit("nested too deep"));
        }
        put(chunk, b"entry");
        put(chunk, b"(");
        put(chunk, b"name");
        put(chunk, name.as_bytes());
        put(chunk, b"node");
        self.node(chunk, Some(folder), &name, kind)
    }

    /// Writes a node up to its contents or entries.
    fn node(
        &mut self,
        chunk: &mut Vec<u8>,
        folder: Option<Folder>,
        name: &CString,
        mut kind: FileType,
    ) -> Result<(), PackError> {
        put(chunk, b"(");
        put(chunk, b"type");
        let is_entry = folder.is_some();
        let dir = folder.as_ref().map_or(CWD, |folder| {
            use std::os::fd::AsFd as _;
            folder.fd.as_fd()
        });
        if kind == FileType::Unknown {
            let stat = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
            kind = FileType::from_raw_mode(stat.st_mode);
        }
        let begun = match kind {
            FileType::RegularFile => {
                let fd = rustix::fs::openat(dir, name, READ, Mode::empty())?;
                Begun::File(fd)
            }
            FileType::Directory => {
                let fd = rustix::fs::openat(dir, name, READ | OFlags::DIRECTORY, Mode::empty())?;
                Begun::Folder(fd)
            }
            FileType::Symlink => {
                let stat = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
                self.note(&stat)?;
                Begun::Symlink(rustix::fs::readlinkat(dir, name, Vec::new())?)
            }
            _ => return Err(unfit("neither file, directory nor symlink")),
        };
        self.folders.extend(folder);
        match begun {
            Begun::File(fd) => self.file(chunk, fd, is_entry),
            Begun::Folder(fd) => self.folder(chunk, fd, is_entry),
            Begun::Symlink(target) => {
                if target.as_bytes().len() > TARGET_BYTES_MAX {
                    return Err(unfit("a symlink's target is too long"));
                }
                for word in [&b"symlink"[..], b"target", target.as_bytes()] {
                    put(chunk, word);
                }
                close(chunk, is_entry);
                Ok(())
            }
        }
    }

    fn file(&mut self, chunk: &mut Vec<u8>, fd: OwnedFd, is_entry: bool) -> Result<(), PackError> {
        let stat = rustix::fs::fstat(&fd)?;
        self.note(&stat)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(unfit("no file any more"));
        }
        let size = u64::try_from(stat.st_size).map_err(|_| unfit("a size below zero"))?;
        if size > READ_AHEAD_FROM {
            // Only advice: it may be refused.
            let _ = rustix::fs::fadvise(&fd, 0, None, Advice::Sequential);
        }
        put(chunk, b"regular");
        if stat.st_mode & OWNER_MAY_EXECUTE != 0 {
            put(chunk, b"executable");
            put(chunk, b"");
        }
        put(chunk, b"contents");
        chunk.extend_from_slice(&size.to_le_bytes());
        self.contents = Some(Contents {
            fd,
            size,
            written: written(&stat),
            left: size,
            is_entry,
        });
        Ok(())
    }

    /// Reads on into a chunk; `None`: the file is at its end, and closed.
    fn read(
        &self,
        chunk: &mut Vec<u8>,
        mut contents: Contents,
    ) -> Result<Option<Contents>, PackError> {
        while contents.left > 0 {
            let (before, room) = (chunk.len(), chunk.capacity() - chunk.len());
            if room == 0 {
                return Ok(Some(contents));
            }
            match rustix::io::read(&contents.fd, spare_capacity(chunk)) {
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => {
                    contents.is_unwritten()?;
                    return Err(error.into());
                }
                Ok(_) => {}
            };
            let read = (chunk.len() - before) as u64;
            if read == 0 || read > contents.left {
                return Err(PackError::Written);
            }
            contents.left -= read;
        }
        if chunk.capacity() - chunk.len() < STEP_BYTES_MAX {
            return Ok(Some(contents));
        }
        contents.is_unwritten()?;
        pad(chunk, contents.size);
        close(chunk, contents.is_entry);
        Ok(None)
    }

    fn folder(
        &mut self,
        chunk: &mut Vec<u8>,
        fd: OwnedFd,
        is_entry: bool,
    ) -> Result<(), PackError> {
        self.note(&rustix::fs::fstat(&fd)?)?;
        put(chunk, b"directory");
        let mut entries = Vec::new();
        for entry in Dir::read_from(&fd)? {
            let entry = entry?;
            let name = entry.file_name();
            if name != c"." && name != c".." {
                entries.push((name.to_owned(), entry.file_type()));
            }
        }
        entries.sort_unstable_by(|(a, _), (b, _)| b.cmp(a));
        self.folders.push(Folder {
            fd,
            entries,
            is_entry,
        });
        Ok(())
    }

    fn note(&mut self, stat: &Stat) -> Result<(), PackError> {
        match self.ledger.take(stat) {
            true => Ok(()),
            false => Err(PackError::Differs),
        }
    }

    fn buffer(&self) -> Vec<u8> {
        self.buffers
            .take(self.left.saturating_add(STEP_BYTES_MAX as u64))
    }
}

impl Contents {
    /// Sees that nobody wrote to the file since it was opened; a system that does not tell knows of no write.
    ///
    /// Its time of change is no matter here: another link to it, or the loss of one, is no write.
    fn is_unwritten(&self) -> Result<(), PackError> {
        let Ok(stat) = rustix::fs::fstat(&self.fd) else {
            return Ok(());
        };
        let same = u64::try_from(stat.st_size) == Ok(self.size) && written(&stat) == self.written;
        match same {
            true => Ok(()),
            false => Err(PackError::Written),
        }
    }
}

enum Begun {
    File(OwnedFd),
    Folder(OwnedFd),
    Symlink(CString),
}

/// Ends a node, and the entry that it is.
fn close(chunk: &mut Vec<u8>, is_entry: bool) {
    put(chunk, b")");
    if is_entry {
        put(chunk, b")");
    }
}

fn put(chunk: &mut Vec<u8>, text: &[u8]) {
    chunk.extend_from_slice(&(text.len() as u64).to_le_bytes());
    chunk.extend_from_slice(text);
    pad(chunk, text.len() as u64);
}

fn pad(chunk: &mut Vec<u8>, size: u64) {
    let zeros = [0; 8];
    // At most seven.
    let count = usize::try_from(size.wrapping_neg() % 8).unwrap_or(0);
    chunk.extend_from_slice(zeros.get(..count).unwrap_or_default());
}

fn written(stat: &Stat) -> (i64, u64) {
    (stat.st_mtime, stat.st_mtime_nsec)
}

fn unfit(what: &str) -> PackError {
    PackError::Unreadable(io::Error::other(what))
}

impl From<io::Error> for PackError {
    fn from(error: io::Error) -> Self {
        Self::Unreadable(error)
    }
}

impl From<rustix::io::Errno> for PackError {
    fn from(error: rustix::io::Errno) -> Self {
        Self::Unreadable(error.into())
    }
}

const READ: OFlags = OFlags::RDONLY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC)
    // What is no file after all must not keep the thread waiting.
    .union(OFlags::NONBLOCK);

const OWNER_MAY_EXECUTE: u32 = 0o100;

/// As Nix has them: nested nodes, and a symlink's target.
const DEPTH_MAX: usize = 64;
const TARGET_BYTES_MAX: usize = 4095;

/// The most that one step writes: an entry's name of 255 bytes, a target of 4095, and the words.
pub(super) const STEP_BYTES_MAX: usize = 8 << 10;

/// From this size on the system is told that a file is read from front to back.
const READ_AHEAD_FROM: u64 = 256 << 10;
