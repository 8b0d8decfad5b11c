//! Where a builder keeps its build logs. The worker protocol has no operation for them.
//!
//! ```text
//! <log dir>/drvs/<first two characters of the derivation>/<rest>[.bz2]      here
//! <log dir>/drvs/<derivation>[.bz2]                                         here, before Nix 1.3
//! nix-store --read-log <store dir>/<derivation>                             over ssh
//! ```
//!
//! Source: `libstore/local-fs-store.cc`, `nix-store --read-log` in the manual. Logs are bounded:
//! a longer one is an error, not a piece that looks whole.

use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use bzip2::read::MultiBzDecoder;
use tokio::task::spawn_blocking;

use super::Error;
use super::wire::{Bounds, Dial, Output};
use crate::nix::store_path::{StoreDir, StorePath};

/// A source of build logs.
#[derive(Clone)]
pub enum BuildLogs {
    /// There is none.
    Nowhere,
    /// Files below a directory of this machine, usually `/nix/var/log/nix`.
    Directory(PathBuf),
    /// A `nix-store` run beside the daemon.
    Command {
        /// Who runs it.
        dial: Arc<dyn Dial>,
        /// The words of `nix-store`, for the account's shell.
        nix_store: Vec<String>,
    },
}

/// The bounds of a build log.
#[derive(Clone, Copy, Debug)]
pub struct LogOptions {
    /// Bytes of a decoded log; it is held in memory whole.
    pub bytes_max: usize,
    /// For a log to come, a login included.
    pub time: Duration,
}

impl BuildLogs {
    /// Reads a derivation's log, decoded; `None` when there is none.
    ///
    /// Dropped, a remote command ends; a local file is read to its end in the background.
    pub async fn read(
        &self,
        derivation: &StorePath,
        store_dir: &StoreDir,
        options: LogOptions,
    ) -> Result<Option<Bytes>, Error> {
        match self {
            Self::Nowhere => Ok(None),
            Self::Directory(log_dir) => {
                let paths = candidates(log_dir, derivation);
                let read = spawn_blocking(move || first_of(&paths, options.bytes_max));
                read.await
                    .unwrap_or_else(|e| Err(Error::Unsupported(e.to_string().into())))
            }
            Self::Command { dial, nix_store } => {
                let mut command = nix_store.clone();
                command.push("--read-log".to_owned());
                // Store paths hold nothing that a shell reads otherwise; the directory might.
                let path = store_dir.join(derivation);
                let quoted = shlex::try_quote(&path).map(|q| q.into_owned());
                command.push(quoted.unwrap_or(path));
                let bounds = Bounds {
                    output_bytes_max: options.bytes_max,
                    time: options.time,
                };
                match dial.run(&command, bounds).await {
                    None => Ok(None),
                    Some(output) => judge(output?),
                }
            }
        }
    }
}

impl Default for LogOptions {
    fn default() -> Self {
        Self {
            bytes_max: 64 << 20,
            time: Duration::from_secs(60),
        }
    }
}

/// Tells a log from "there is none" from "could not find out".
fn judge(output: Output) -> Result<Option<Bytes>, Error> {
    if output.status.success() {
        return Ok(Some(output.stdout));
    }
    // "build log of derivation '…' is not available", Nix 2.3 to 2.34.
    if output.stderr.contains("is not available") {
        return Ok(None);
    }
    let said = output
        .stderr
        .lines()
        .map(str::trim)
        .rfind(|l| !l.is_empty());
    Err(Error::Unsupported(
        format!(
            "nix-store --read-log on the builder: {} ({})",
            said.unwrap_or("it said nothing"),
            output.status
        )
        .into(),
    ))
}

fn candidates(log_dir: &Path, derivation: &StorePath) -> Vec<PathBuf> {
    let name = derivation.as_str();
    let drvs = log_dir.join("drvs");
    let mut plain = vec![drvs.join(name)];
    // A store path is ASCII, and longer than two characters.
    if let Some((folder, rest)) = name.split_at_checked(2) {
        plain.insert(0, drvs.join(folder).join(rest));
    }
    let with_bz2 = |path: PathBuf| {
        let mut packed = path.clone().into_os_string();
        packed.push(".bz2");
        [path, packed.into()]
    };
    plain.into_iter().flat_map(with_bz2).collect()
}

fn first_of(paths: &[PathBuf], bytes_max: usize) -> Result<Option<Bytes>, Error> {
    for path in paths {
        let file = match std::fs::File::open(path) {
            Ok(file) => file,
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                continue;
            }
            Err(e) => return Err(unreadable(path, &e)),
        };
        let log = if path.extension().is_some_and(|e| e == "bz2") {
            read_bounded(MultiBzDecoder::new(file), path, bytes_max)
        } else {
            read_bounded(file, path, bytes_max)
        };
        return log.map(Some);
    }
    Ok(None)
}

fn read_bounded(reader: impl Read, path: &Path, bytes_max: usize) -> Result<Bytes, Error> {
    let limit = u64::try_from(bytes_max).unwrap_or(u64::MAX);
    let mut log = Vec::new();
    let mut reader = reader.take(limit.saturating_add(1));
    reader
        .read_to_end(&mut log)
        .map_err(|e| unreadable(path, &e))?;
    if log.len() > bytes_max {
        let text = format!("{} is longer than {bytes_max} bytes", path.display());
        return Err(Error::Unsupported(text.into()));
    }
    Ok(log.into())
}

fn unreadable(path: &Path, error: &std::io::Error) -> Error {
    Error::Unsupported(format!("cannot read {}: {error}", path.display()).into())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::ExitStatus;

    use super::*;

    const DRV: &str = "1q8w6gl1ll0mwfkqc3c2yx005s6wwfrl-hello.drv";
    const OPTIONS: LogOptions = LogOptions {
        bytes_max: 100,
        time: Duration::from_secs(1),
    };

    async fn read(dir: &Path) -> Result<Option<Bytes>, Error> {
        let logs = BuildLogs::Directory(dir.to_owned());
        let drv = DRV.parse().unwrap();
        logs.read(&drv, &StoreDir::default(), OPTIONS).await
    }

    fn packed(text: &[u8]) -> Vec<u8> {
        let mut encoder = bzip2::write::BzEncoder::new(vec![], bzip2::Compression::fast());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    #[tokio::test]
    async fn plain_packed_old_and_absent() {
        let dir = tempfile::tempdir().unwrap();
        assert!(read(dir.path()).await.unwrap().is_none());

        let old = dir.path().join("drvs").join(DRV);
        std::fs::create_dir_all(old.parent().unwrap()).unwrap();
        std::fs::write(&old, "old").unwrap();
        assert_eq!(&read(dir.path()).await.unwrap().unwrap()[..], b"old");

        let (folder, rest) = DRV.split_at(2);
        let folder = dir.path().join("drvs").join(folder);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join(format!("{rest}.bz2")), packed(b"packed")).unwrap();
        assert_eq!(&read(dir.path()).await.unwrap().unwrap()[..], b"packed");

        std::fs::write(folder.join(rest), "plain").unwrap();
        assert_eq!(&read(dir.path()).await.unwrap().unwrap()[..], b"plain");
    }

    #[tokio::test]
    async fn too_long_and_damaged_logs_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let (folder, rest) = DRV.split_at(2);
        let folder = dir.path().join("drvs").join(folder);
        std::fs::create_dir_all(&folder).unwrap();
        let file = folder.join(format!("{rest}.bz2"));
        for content in [packed(&[b'x'; 101]), b"BZh9 no".to_vec()] {
            std::fs::write(&file, content).unwrap();
            let error = read(dir.path()).await.unwrap_err();
            assert!(matches!(error, Error::Unsupported(_)), "{error}");
        }
    }

    #[test]
    fn the_exit_code_and_the_words_decide() {
        let output = |code: i32, stderr: &str| Output {
            status: ExitStatus::from_raw(code << 8),
            stdout: "log".into(),
            stderr: stderr.to_owned(),
        };
        let text = "error: build log of derivation '/nix/store/x.drv' is not available\n";
        assert!(judge(output(1, text)).unwrap().is_none());
        assert_eq!(judge(output(0, "")).unwrap().unwrap(), "log");
        assert!(judge(output(127, "sh: nix-store: not found\n")).is_err());
    }
}
