//! Files of signing keys: reading, making and guarding them.
//!
//! A file holds one line, `name:base64`, as `nix key generate-secret` writes it. Nobody but its owner
//! may read it; credentials of systemd are let through, whose access list shows as the group's
//! permission. A new file appears whole or not at all, and never replaces another.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use super::environment::Environment;
use crate::nix::signature::{KeyError, KeyName, PublicKey, SecretKey};

/// What to do where no key is named and none was made yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DefaultKey {
    /// Make one, as `muster serve` does.
    Make,
    /// Say that one will be made.
    LookOnly,
}

/// A signing key and its file.
#[derive(Clone, Debug)]
pub struct KeyFile {
    /// The file.
    pub path: PathBuf,
    /// The key in it.
    pub key: SecretKey,
}

/// What was found where no key is named.
#[derive(Clone, Debug)]
pub(super) enum Found {
    /// The key made at an earlier start.
    Kept(KeyFile),
    /// A key made just now.
    Made(KeyFile),
    /// None yet; the file that it will be in.
    ToBeMade(PathBuf),
}

/// A key file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// It cannot be read.
    #[error("cannot read {}{}", path.display(), remedy(path, source))]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Others than its owner can read it.
    #[error("{path} can be read by others (mode {mode:04o}): chmod 600 {path}", path = path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// It holds no secret key.
    #[error("{} holds no secret key", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with the text.
        #[source]
        source: KeyError,
    },
    /// There is a file already.
    #[error("{} exists already, and a key that signed is not replaced: remove it, or choose another name", .0.display())]
    Exists(PathBuf),
    /// It cannot be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The default key cannot be kept.
    #[error(
        "no signing key can be kept in {}: set STATE_DIRECTORY to a folder that can be written, or name a key by --secret-key-file",
        dir.display()
    )]
    Keep {
        /// The state directory.
        dir: PathBuf,
        /// Why.
        #[source]
        cause: Box<KeyFileError>,
    },
    /// There is no place for the default key.
    #[error(
        "there is no place for a signing key: set HOME or STATE_DIRECTORY, or name a key by --secret-key-file"
    )]
    NoStateDirectory,
    /// The machine's name cannot be in a key's.
    #[error("the host name cannot be the start of a key's name: name a key by --secret-key-file")]
    Hostname(#[source] KeyError),
    /// The system gives no random bytes.
    #[error("the system gives no random bytes: {0}")]
    Random(getrandom::Error),
}

impl KeyFileError {
    /// Tells whether there is no such file.
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Read { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// What to do about a key file that cannot be read, where that is known.
fn remedy(path: &Path, error: &io::Error) -> String {
    let bare = path.components().count() == 1 && path.is_relative();
    match error.kind() {
        io::ErrorKind::NotFound if bare => {
            "; a name without slash is that of a credential of systemd (LoadCredential=)".to_owned()
        }
        io::ErrorKind::NotFound => format!(
            "; make a key with `muster key generate NAME --secret-key-file {}`",
            path.display()
        ),
        io::ErrorKind::PermissionDenied => {
            "; it must belong to the user that muster runs as (chown)".to_owned()
        }
        _ => String::new(),
    }
}

/// Reads the key in a file that its owner alone can read.
pub fn read_secret(path: &Path, environment: &Environment) -> Result<KeyFile, KeyFileError> {
    let failed = |source| KeyFileError::Read {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    let mode = metadata.mode() & 0o7777;
    let exposed = if is_credential(path, environment) {
        0o007
    } else {
        0o077
    };
    // A pipe, as of a shell's `<(…)`, has no other readers.
    if metadata.is_file() && mode & exposed != 0 {
        let path = path.to_owned();
        return Err(KeyFileError::Exposed { path, mode });
    }
    let mut text = Zeroizing::new(String::with_capacity(KEY_BYTES_MAX));
    file.take(KEY_BYTES_MAX as u64)
        .read_to_string(&mut text)
        .map_err(failed)?;
    let malformed = |source| KeyFileError::Malformed {
        path: path.to_owned(),
        source,
    };
    let key = SecretKey::parse(&text).map_err(malformed)?;
    let path = path.to_owned();
    Ok(KeyFile { path, key })
}

/// Makes a key from the system's random bytes.
pub fn generate(name: KeyName) -> Result<SecretKey, KeyFileError> {
    let mut seed = Zeroizing::new([0; 32]);
    getrandom::fill(seed.as_mut_slice()).map_err(KeyFileError::Random)?;
    Ok(SecretKey::from_seed(name, &seed))
}

/// Writes a new file that its owner alone can read; one that is there stays.
pub fn write_secret(path: &Path, key: &SecretKey) -> Result<(), KeyFileError> {
    let text = Zeroizing::new(format!("{}\n", *key.to_secret_text()));
    write_new(path, 0o600, text.as_bytes())
}

/// Writes a new file that everybody can read; one that is there stays.
pub fn write_public(path: &Path, key: &PublicKey) -> Result<(), KeyFileError> {
    write_new(path, 0o644, format!("{key}\n").as_bytes())
}

/// Finds the key of the state directory.
pub(super) fn default_key(
    environment: &Environment,
    if_none: DefaultKey,
) -> Result<Found, KeyFileError> {
    let Some(state_dir) = &environment.state_dir else {
        return Err(KeyFileError::NoStateDirectory);
    };
    let path = state_dir.join(DEFAULT_KEY_FILE);
    match read_secret(&path, environment) {
        Err(KeyFileError::Read { source, .. }) if source.kind() == ErrorKind::NotFound => {}
        found => return found.map(Found::Kept),
    }
    if if_none == DefaultKey::LookOnly {
        return Ok(Found::ToBeMade(path));
    }
    let name = default_key_name(environment).map_err(KeyFileError::Hostname)?;
    let key = generate(name)?;
    let keep = |cause| KeyFileError::Keep {
        dir: state_dir.clone(),
        cause: Box::new(cause),
    };
    make_private_dir(state_dir).map_err(keep)?;
    match write_secret(&path, &key) {
        // Another process was first.
        Err(KeyFileError::Exists(_)) => return read_secret(&path, environment).map(Found::Kept),
        written => written.map_err(keep)?,
    }
    // Whatever public key lies here belongs to a secret one that is gone.
    let public = path.with_extension("pub");
    _ = fs::remove_file(&public);
    write_public(&public, &key.public()).map_err(keep)?;
    Ok(Found::Made(KeyFile { path, key }))
}

/// Returns the name of the key that is made at the first start: `<hostname>-muster-1`.
///
/// Clients take one key of a name only, so two Musters must not share theirs. What a key's name
/// cannot hold, or would be read as two keys in nix.conf, becomes a hyphen.
pub fn default_key_name(environment: &Environment) -> Result<KeyName, KeyError> {
    let hostname = environment.hostname.chars().take(HOSTNAME_CHARS_MAX);
    let fit = |c: char| match c {
        ':' | '#' | '"' | '\'' | '\\' => '-',
        c if c.is_whitespace() || c.is_control() => '-',
        c => c,
    };
    let hostname: String = hostname.map(fit).collect();
    KeyName::new(&format!("{hostname}-muster-1"))
}

fn is_credential(path: &Path, environment: &Environment) -> bool {
    let Ok(path) = path.canonicalize() else {
        return false;
    };
    let own = environment
        .credentials_dir
        .as_deref()
        .map(Path::canonicalize);
    let own = own.and_then(Result::ok);
    own.is_some_and(|dir| path.starts_with(dir)) || path.starts_with("/run/credentials")
}

fn make_private_dir(dir: &Path) -> Result<(), KeyFileError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|source| KeyFileError::Write {
        path: dir.to_owned(),
        source,
    })
}

/// Writes beside the path, syncs, and links the file to its name, which fails where there is one.
fn write_new(path: &Path, mode: u32, bytes: &[u8]) -> Result<(), KeyFileError> {
    let dir = match path.parent() {
        Some(dir) if dir != Path::new("") => dir,
        _ => Path::new("."),
    };
    let beside = dir.join(format!(".muster-{:016x}", fastrand::u64(..)));
    let written = write_beside(&beside, mode, bytes).and_then(|()| fs::hard_link(&beside, path));
    _ = fs::remove_file(&beside);
    let written = written.and_then(|()| File::open(dir)?.sync_all());
    written.map_err(|source| match source.kind() {
        ErrorKind::AlreadyExists => KeyFileError::Exists(path.to_owned()),
        _ => KeyFileError::Write {
            path: path.to_owned(),
            source,
        },
    })
}

fn write_beside(beside: &Path, mode: u32, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(beside)?;
    file.write_all(bytes)?;
    file.sync_all()
}

const DEFAULT_KEY_FILE: &str = "secret-key";
/// What the kernel lets a name have.
const HOSTNAME_CHARS_MAX: usize = 64;
/// A key has 88 bytes of base64 and a name of at most 255.
const KEY_BYTES_MAX: usize = 4096;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn environment(dir: &Path) -> Environment {
        Environment {
            state_dir: Some(dir.join("a/state")),
            cache_dir: None,
            credentials_dir: Some(dir.join("credentials")),
            daemon_socket: dir.join("socket"),
            nix_state_dir: dir.join("nix"),
            log_dir: dir.join("log"),
            hostname: "host".to_owned(),
            cores: 1,
        }
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn the_default_key_is_made_once_and_is_private() {
        let dir = tempfile::tempdir().unwrap();
        let environment = environment(dir.path());
        let looked = default_key(&environment, DefaultKey::LookOnly).unwrap();
        assert!(matches!(looked, Found::ToBeMade(_)));
        assert!(!dir.path().join("a").exists());

        let Found::Made(made) = default_key(&environment, DefaultKey::Make).unwrap() else {
            panic!("not made");
        };
        assert_eq!(made.key.name().as_str(), "host-muster-1");
        assert_eq!(mode(&made.path), 0o600);
        assert_eq!(mode(made.path.parent().unwrap()), 0o700);
        let public = fs::read_to_string(made.path.with_extension("pub")).unwrap();
        assert_eq!(PublicKey::parse(&public).unwrap(), made.key.public());
        let files = fs::read_dir(made.path.parent().unwrap()).unwrap();
        assert_eq!(files.count(), 2, "nothing is left beside them");

        let Found::Kept(kept) = default_key(&environment, DefaultKey::Make).unwrap() else {
            panic!("made again");
        };
        assert_eq!(kept.key.public(), made.key.public());
        let refused = write_secret(&made.path, &made.key);
        assert!(matches!(refused, Err(KeyFileError::Exists(_))));
    }

    #[test]
    fn a_file_that_others_can_read_is_refused_unless_it_is_a_credential() {
        let dir = tempfile::tempdir().unwrap();
        let environment = environment(dir.path());
        let credentials = dir.path().join("credentials");
        fs::create_dir(&credentials).unwrap();
        let key = generate(KeyName::new("k-1").unwrap()).unwrap();
        for (folder, bits, accepted) in [
            (dir.path(), 0o600, true),
            (dir.path(), 0o400, true),
            (dir.path(), 0o640, false),
            (dir.path(), 0o604, false),
            (&credentials, 0o440, true),
            (&credentials, 0o444, false),
        ] {
            let path = folder.join(format!("key-{bits:o}"));
            write_secret(&path, &key).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(bits)).unwrap();
            let read = read_secret(&path, &environment);
            assert_eq!(read.is_ok(), accepted, "{path:?}");
            if let Err(error) = read {
                let remedy = format!("chmod 600 {}", path.display());
                assert!(error.to_string().ends_with(&remedy), "{error}");
            }
        }
    }
}
