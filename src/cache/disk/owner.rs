//! Whose the files in the folder are: the folder's owner's, also when root makes them.
//!
//! The service runs as a user of its own, and the operator beside it as root (`muster sign-all --cache`,
//! `muster cache gc`, a server tried by hand). What root makes there is handed over, so that the service can
//! open it. Only what was made just now is: the owner could have put a link to a file of root's in its place.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::Path;

use rustix::fs::{Mode, OFlags};

/// Makes a folder in the folder `root`, with this mode; one that is there already is left as it is.
pub fn create_dir(root: &Path, path: &Path, mode: u32) -> io::Result<()> {
    match DirBuilder::new().mode(mode).create(path) {
        // A file of that name is found out by whoever uses it.
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
        Ok(()) => {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            hand_over(
                root,
                &File::from(rustix::fs::open(path, flags, Mode::empty())?),
            )
        }
    }
}

/// Makes an empty file in the folder `root`, to read and write; `AlreadyExists` where the name is taken.
pub fn create_file(root: &Path, path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create_new(true).open(path)?;
    hand_over(root, &file)?;
    Ok(file)
}

/// Gives what was made to the owner of the folder. Nobody but root can, or needs to.
fn hand_over(root: &Path, made: &File) -> io::Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let owner = fs::metadata(root)?;
    if made.metadata()?.uid() == owner.uid() {
        return Ok(());
    }
    std::os::unix::fs::fchown(made, Some(owner.uid()), Some(owner.gid()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_left_as_it_is() {
        let place = tempfile::tempdir().unwrap();
        let root = place.path();
        let (folder, file, link) = (root.join("folder"), root.join("file"), root.join("link"));
        create_dir(root, &folder, 0o700).unwrap();
        assert_eq!(fs::metadata(&folder).unwrap().mode() & 0o777, 0o700);
        create_dir(root, &folder, 0o755).unwrap();
        assert_eq!(fs::metadata(&folder).unwrap().mode() & 0o777, 0o700);
        create_file(root, &file).unwrap();
        std::os::unix::fs::symlink(root.join("elsewhere"), &link).unwrap();
        for taken in [&file, &link] {
            let error = create_file(root, taken).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::AlreadyExists);
        }
        assert!(!root.join("elsewhere").exists());
        create_dir(&root.join("none"), &root.join("none/folder"), 0o755).unwrap_err();
    }
}
