//! A private folder for what `ssh` must read from a file.
//!
//! It is made with mode 0700 under a name of its own and removed when dropped.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// A folder that only this process uses.
#[derive(Debug)]
pub struct RuntimeDir {
    path: PathBuf,
    next: AtomicU64,
}

impl RuntimeDir {
    /// Makes a folder in `parent`, an absolute path such as `$RUNTIME_DIRECTORY` or the
    /// system's folder for temporary files.
    ///
    /// A path that ssh would read as something else (blanks, quotes, `%`, `$`) is refused.
    pub fn create(parent: &Path) -> io::Result<Self> {
        let plain = |text: &str| !text.contains(|c: char| c.is_control() || " \"'%$\\".contains(c));
        if !parent.is_absolute() || !parent.to_str().is_some_and(plain) {
            let message = "ssh cannot read files from a folder of this name";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        let mut builder = fs::DirBuilder::new();
        builder.mode(0o700);
        for _ in 0..ATTEMPTS {
            let path = parent.join(format!("muster-{:016x}", fastrand::u64(..)));
            match builder.create(&path) {
                Ok(()) => {
                    let next = AtomicU64::new(0);
                    return Ok(Self { path, next });
                }
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(e),
            }
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }

    /// Writes a new file that only this user can read, and returns its path.
    pub fn write(&self, name: &str, content: &[u8]) -> io::Result<PathBuf> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let path = self.path.join(format!("{name}-{number}"));
        let mut options = fs::OpenOptions::new();
        options.write(true).create_new(true).mode(0o600);
        options.open(&path)?.write_all(content)?;
        Ok(path)
    }
}

impl Drop for RuntimeDir {
    fn drop(&mut self) {
        // Nothing depends on its absence; a leftover holds host keys, which are public.
        let _ = fs::remove_dir_all(&self.path);
    }
}

const ATTEMPTS: usize = 8;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn private_and_gone_at_the_end() {
        let parent = tempfile::tempdir().unwrap();
        let dir = RuntimeDir::create(parent.path()).unwrap();
        let mode = |p: &Path| fs::metadata(p).unwrap().permissions().mode() & 0o777;
        let first = dir.write("known-hosts", b"* a b\n").unwrap();
        let second = dir.write("known-hosts", b"* c d\n").unwrap();
        assert_ne!(first, second);
        assert_eq!(mode(&first), 0o600);
        assert_eq!(mode(&dir.path), 0o700);
        drop(dir);
        assert!(!first.exists());
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
    }

    #[test]
    fn names_that_ssh_would_misread_are_refused() {
        for parent in ["relative", "/tmp/a b", "/tmp/%d", "/tmp/\"", "/tmp/${HOME}"] {
            assert!(RuntimeDir::create(Path::new(parent)).is_err(), "{parent}");
        }
    }
}
