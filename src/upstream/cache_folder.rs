//! A binary cache in a folder of this machine, as `nix copy --to file://…` writes it.
//!
//! Files are read on blocking threads, so many at a time; a disk that does not answer holds no more
//! than these. A cache whose `nix-cache-info` is gone, as under a mount that went, has not lost its paths:
//! it cannot be asked.

use std::fs::File;
use std::io::{self, ErrorKind, Read as _, Seek as _, SeekFrom};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::{self, StreamExt as _};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::Error;
use super::cache_files::{CacheFiles, FilePart, FileSize, Greeting};

/// A folder that is a binary cache.
#[derive(Clone)]
pub struct CacheFolder {
    root: PathBuf,
    threads: Arc<Semaphore>,
    patience: Duration,
}

impl CacheFolder {
    /// Takes a folder; `patience` bounds each read of up to 256 KiB.
    pub fn new(root: impl Into<PathBuf>, patience: Duration) -> Self {
        Self {
            root: root.into(),
            threads: Arc::new(Semaphore::new(THREADS_MAX)),
            patience,
        }
    }

    /// Runs work on a blocking thread; given up, it keeps its permit until the disk answers.
    async fn run<T: Send + 'static>(
        &self,
        question: &'static str,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        let threads = Arc::clone(&self.threads);
        let done = async {
            let permit = threads.acquire_owned().await.map_err(io::Error::other)?;
            let done = tokio::task::spawn_blocking(move || {
                let _permit = permit;
                work()
            });
            done.await.map_err(io::Error::other)?
        };
        match timeout(self.patience, done).await {
            Ok(done) => done.map_err(|error| self.broken(&error)),
            Err(_) => {
                let after = self.patience;
                Err(Error::TimedOut { question, after })
            }
        }
    }

    fn broken(&self, error: &io::Error) -> Error {
        Error::Lost(format!("cannot read {}: {error}", self.root.display()).into())
    }

    async fn read_file(&self, name: &str, bytes_max: usize) -> Result<Option<Bytes>, Error> {
        let (path, info) = (self.root.join(name), self.root.join(INFO));
        let read = move || match open(&path)? {
            Some(file) => read_bounded(file, bytes_max).map(Some),
            // Not there, or is nothing there any more?
            None => info.metadata().map(|_| None),
        };
        self.run("a read", read).await
    }
}

#[async_trait]
impl CacheFiles for CacheFolder {
    async fn greet(&self) -> Result<Greeting, Error> {
        let path = self.root.join(INFO);
        let read = move || match open(&path)? {
            Some(file) => read_bounded(file, INFO_BYTES_MAX),
            None => Err(io::Error::new(
                ErrorKind::NotFound,
                "there is no nix-cache-info",
            )),
        };
        let info = self.run("a read", read).await?;
        let peer = "files".to_owned();
        Ok(Greeting { info, peer })
    }

    async fn read(&self, name: &str, bytes_max: usize) -> Result<Option<Bytes>, Error> {
        self.read_file(name, bytes_max).await
    }

    fn locate(&self, url: &str) -> Result<String, Error> {
        let refused = |why: &str| {
            let url: String = url.chars().take(300).collect();
            Error::Unsupported(format!("{url:?} {why}").into())
        };
        if url.contains("://") || url.starts_with('/') || url.contains('\0') {
            return Err(refused("leads out of the cache"));
        }
        if url.split('/').any(|part| part == ".." || part == ".") {
            return Err(refused("climbs out of the cache"));
        }
        Ok(url.to_owned())
    }

    async fn open(
        &self,
        place: &str,
        offset: u64,
        _size: FileSize,
    ) -> Result<Option<FilePart>, Error> {
        let (path, info) = (self.root.join(place), self.root.join(INFO));
        let open = move || {
            let Some(mut file) = open(&path)? else {
                return info.metadata().map(|_| None);
            };
            file.seek(SeekFrom::Start(offset))?;
            Ok(Some(file))
        };
        let Some(file) = self.run("an open", open).await? else {
            return Ok(None);
        };
        let state = Some((self.clone(), file));
        let chunks = stream::unfold(state, |state| async move {
            let (folder, file) = state?;
            let read = folder.run("a read", move || read_chunk(file)).await;
            match read {
                Ok((_, chunk)) if chunk.is_empty() => None,
                Ok((file, chunk)) => Some((Ok(chunk), Some((folder, file)))),
                Err(error) => Some((Err(error), None)),
            }
        });
        Ok(Some(FilePart {
            begins_at: offset,
            bytes: chunks.boxed(),
        }))
    }

    fn questions_max(&self) -> usize {
        THREADS_MAX
    }
}

/// Opens a regular file; `None` when it is not there.
///
/// Anything else, as a pipe nobody writes to, is refused before it can hold a thread.
fn open(path: &std::path::Path) -> io::Result<Option<File>> {
    let absent = |kind| matches!(kind, ErrorKind::NotFound | ErrorKind::NotADirectory);
    match path.metadata() {
        Ok(metadata) if metadata.is_file() => {}
        Ok(_) => return Err(io::Error::other("it is no regular file")),
        Err(error) if absent(error.kind()) => return Ok(None),
        Err(error) => return Err(error),
    }
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if absent(error.kind()) => Ok(None),
        Err(error) => Err(error),
    }
}

fn read_bounded(file: File, bytes_max: usize) -> io::Result<Bytes> {
    let mut text = Vec::new();
    let limit = (bytes_max as u64).saturating_add(1);
    file.take(limit).read_to_end(&mut text)?;
    if text.len() > bytes_max {
        let cause = format!("a file has more than {bytes_max} bytes");
        return Err(io::Error::other(cause));
    }
    Ok(text.into())
}

fn read_chunk(file: File) -> io::Result<(File, Bytes)> {
    let mut chunk = Vec::with_capacity(CHUNK_BYTES);
    (&file).take(CHUNK_BYTES as u64).read_to_end(&mut chunk)?;
    Ok((file, chunk.into()))
}

const INFO: &str = "nix-cache-info";
const INFO_BYTES_MAX: usize = 64 << 10;
const CHUNK_BYTES: usize = 256 << 10;

/// Reads at the same time: enough to keep a disk busy, few of tokio's 512 threads.
const THREADS_MAX: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> (tempfile::TempDir, CacheFolder) {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("nar")).unwrap();
        for (name, text) in [(INFO, "StoreDir: /nix/store\n"), ("nar/x.nar", "a NAR")] {
            std::fs::write(root.path().join(name), text).unwrap();
        }
        let folder = CacheFolder::new(root.path(), Duration::from_secs(10));
        (root, folder)
    }

    async fn nar(folder: &CacheFolder, name: &str, offset: u64) -> Result<Option<Vec<u8>>, Error> {
        let opened = folder.open(name, offset, FileSize::Large).await?;
        let Some(FilePart { bytes, .. }) = opened else {
            return Ok(None);
        };
        let chunks: Vec<_> = bytes.collect().await;
        let chunks: Result<Vec<_>, _> = chunks.into_iter().collect();
        chunks.map(|chunks| Some(chunks.concat()))
    }

    #[test]
    fn a_url_does_not_lead_out_of_the_folder() {
        let (_root, folder) = folder();
        for url in [
            "../../etc/passwd",
            "nar/../x",
            "nar/..",
            "..",
            "./nix-cache-info",
            "/etc/passwd",
            "//etc/passwd",
            "file:///etc/passwd",
            "http://elsewhere/x.nar",
            "nar/x\0.nar",
        ] {
            let error = folder.locate(url).unwrap_err();
            assert!(matches!(error, Error::Unsupported(_)), "{url} {error}");
        }
        for url in ["nar/x.nar", "nar/x..nar", "x.nar.xz"] {
            assert_eq!(folder.locate(url).unwrap(), url);
        }
    }

    #[tokio::test]
    async fn only_regular_files_are_read() {
        let (root, folder) = folder();
        let fifo = root.path().join("nar/fifo.nar");
        let mode = rustix::fs::Mode::from_raw_mode(0o644);
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, mode).unwrap();
        std::fs::create_dir(root.path().join("nar/folder.nar")).unwrap();
        for name in ["nar/fifo.nar", "nar/folder.nar", "nar", ""] {
            assert!(nar(&folder, name, 0).await.is_err(), "{name:?}");
            assert!(folder.read(name, 1000).await.is_err(), "{name:?}");
        }
        assert_eq!(
            nar(&folder, "nar/x.nar", 0).await.unwrap().unwrap(),
            b"a NAR"
        );
        assert_eq!(nar(&folder, "nar/x.nar", 2).await.unwrap().unwrap(), b"NAR");
        assert_eq!(nar(&folder, "nar/x.nar", 9).await.unwrap().unwrap(), b"");
        assert_eq!(nar(&folder, "nar/absent.nar", 0).await.unwrap(), None);
        // A file is no folder of further ones.
        assert_eq!(nar(&folder, "nar/x.nar/y", 0).await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_file_is_read_up_to_its_bound() {
        let (root, folder) = folder();
        std::fs::write(root.path().join("x.narinfo"), [b'x'; 1001]).unwrap();
        assert!(folder.read("x.narinfo", 1001).await.unwrap().is_some());
        assert!(folder.read("x.narinfo", 1000).await.is_err());
        std::fs::write(root.path().join(INFO), vec![b'x'; INFO_BYTES_MAX + 1]).unwrap();
        assert!(folder.greet().await.is_err());
    }

    /// As when what was mounted there went: nothing is known, and nothing is gone.
    #[tokio::test]
    async fn without_its_info_a_folder_cannot_be_asked() {
        let (root, folder) = folder();
        assert!(folder.read("x.narinfo", 1000).await.unwrap().is_none());
        std::fs::remove_file(root.path().join(INFO)).unwrap();
        assert!(folder.greet().await.is_err());
        assert!(folder.read("x.narinfo", 1000).await.is_err());
        assert!(nar(&folder, "nar/absent.nar", 0).await.is_err());
        drop(root);
        assert!(folder.read("x.narinfo", 1000).await.is_err());
        assert!(nar(&folder, "nar/x.nar", 0).await.is_err());
    }
}
