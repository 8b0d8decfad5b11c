//! What the process is started with: folders, host name, processors. Read once, handed in.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::nix::store_uri::DAEMON_SOCKET;

/// The process's surroundings, as far as the configuration depends on them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Environment {
    /// Where the default key is kept: the first folder of `$STATE_DIRECTORY`; else `/var/lib/muster`
    /// for root, and `muster` in `$XDG_STATE_HOME` or `~/.local/state` for others; `None`: no home.
    pub state_dir: Option<PathBuf>,
    /// Where NARs are kept: the first folder of `$CACHE_DIRECTORY`; else `/var/cache/muster` for root,
    /// and `muster` in `$XDG_CACHE_HOME` or `~/.cache` for others; `None`: no home.
    pub cache_dir: Option<PathBuf>,
    /// Where systemd puts credentials, `$CREDENTIALS_DIRECTORY`.
    pub credentials_dir: Option<PathBuf>,
    /// The socket of this machine's daemon: `$NIX_DAEMON_SOCKET_PATH`, or the usual one.
    pub daemon_socket: PathBuf,
    /// Where this machine's Nix keeps its database: `$NIX_STATE_DIR`, or the usual place.
    pub nix_state_dir: PathBuf,
    /// Where this machine's Nix keeps its build logs: `$NIX_LOG_DIR`, or the usual place.
    pub log_dir: PathBuf,
    /// This machine's name.
    pub hostname: String,
    /// Processors that the process may use.
    pub cores: usize,
}

impl Environment {
    /// Reads the surroundings of this process.
    pub fn of_process() -> Self {
        let root = rustix::process::geteuid().is_root();
        Self {
            hostname: hostname(),
            cores: std::thread::available_parallelism().map_or(1, |cores| cores.get()),
            ..Self::of(&|name| std::env::var_os(name), root)
        }
    }

    fn of(variable: &dyn Fn(&str) -> Option<OsString>, root: bool) -> Self {
        // What the XDG specification says of relative paths is right for all: ignore them.
        let folder = |name| {
            variable(name)
                .map(PathBuf::from)
                .filter(|path| path.is_absolute())
        };
        let systemd = |name| {
            let first = std::env::split_paths(&variable(name)?).next()?;
            Some(first).filter(|path| path.is_absolute())
        };
        let own = |of_root: &str, xdg, in_home| {
            if root {
                return Some(PathBuf::from(of_root));
            }
            let base = folder(xdg).or_else(|| folder("HOME").map(|home| home.join(in_home)));
            base.map(|base| base.join("muster"))
        };
        let state_dir = || own(ROOT_STATE_DIR, "XDG_STATE_HOME", ".local/state");
        let cache_dir = || own(ROOT_CACHE_DIR, "XDG_CACHE_HOME", ".cache");
        Self {
            state_dir: systemd("STATE_DIRECTORY").or_else(state_dir),
            cache_dir: systemd("CACHE_DIRECTORY").or_else(cache_dir),
            credentials_dir: folder("CREDENTIALS_DIRECTORY"),
            daemon_socket: folder("NIX_DAEMON_SOCKET_PATH").unwrap_or_else(|| DAEMON_SOCKET.into()),
            nix_state_dir: folder("NIX_STATE_DIR").unwrap_or_else(|| DEFAULT_NIX_STATE_DIR.into()),
            log_dir: folder("NIX_LOG_DIR").unwrap_or_else(|| DEFAULT_LOG_DIR.into()),
            hostname: String::new(),
            cores: 1,
        }
    }

    /// Finds a key file: a name without slash that is a credential stands for the credential.
    pub fn key_path(&self, path: &Path) -> PathBuf {
        let named = is_name(path);
        let credential = self.credentials_dir.as_ref().map(|dir| dir.join(path));
        match credential {
            Some(credential) if named && credential.exists() => credential,
            _ => path.to_owned(),
        }
    }

    /// Tells whether a key file may be a credential of the service, which nobody else sees.
    pub fn may_be_unseen(&self, path: &Path) -> bool {
        self.credentials_dir.is_none() && is_name(path)
    }
}

/// Tells whether a path is a name without slash.
fn is_name(path: &Path) -> bool {
    path.file_name() == Some(path.as_os_str())
}

/// Returns this machine's name, `localhost` where it has none.
pub fn hostname() -> String {
    let name = rustix::system::uname();
    let name = name.nodename().to_string_lossy();
    // The kernel says `(none)` before anybody has named it.
    match &*name {
        "" | "(none)" => "localhost".to_owned(),
        name => name.to_owned(),
    }
}

const DEFAULT_NIX_STATE_DIR: &str = "/nix/var/nix";
const DEFAULT_LOG_DIR: &str = "/nix/var/log/nix";
const ROOT_CACHE_DIR: &str = "/var/cache/muster";
const ROOT_STATE_DIR: &str = "/var/lib/muster";

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(variables: &[(&str, &str)], root: bool) -> Environment {
        let variable = |name: &str| {
            let found = variables.iter().find(|(n, _)| *n == name)?;
            Some(found.1.into())
        };
        Environment::of(&variable, root)
    }

    fn state_dir(variables: &[(&str, &str)], root: bool) -> Option<String> {
        let found = environment(variables, root).state_dir;
        found.map(|path| path.to_string_lossy().into_owned())
    }

    #[test]
    fn the_cache_directory_follows_systemd_then_the_user() {
        let dir = |variables: &[_], root| environment(variables, root).cache_dir;
        let home = ("HOME", "/home/u");
        let path = |text: &str| Some(PathBuf::from(text));
        assert_eq!(dir(&[("CACHE_DIRECTORY", "/c:/d"), home], true), path("/c"));
        assert_eq!(dir(&[home], true), path("/var/cache/muster"));
        assert_eq!(dir(&[home], false), path("/home/u/.cache/muster"));
        let xdg = ("XDG_CACHE_HOME", "/x");
        assert_eq!(dir(&[home, xdg], false), path("/x/muster"));
        assert_eq!(dir(&[], false), None);
    }

    #[test]
    fn the_state_directory_follows_systemd_then_the_user() {
        let home = ("HOME", "/home/u");
        let dir = |variables: &[_], root| state_dir(variables, root).unwrap_or_default();
        assert_eq!(
            dir(&[("STATE_DIRECTORY", "/var/lib/a:/var/lib/b"), home], true),
            "/var/lib/a"
        );
        assert_eq!(dir(&[home], true), "/var/lib/muster");
        assert_eq!(dir(&[home], false), "/home/u/.local/state/muster");
        assert_eq!(dir(&[home, ("XDG_STATE_HOME", "/s")], false), "/s/muster");
        assert_eq!(
            dir(&[home, ("XDG_STATE_HOME", "s")], false),
            "/home/u/.local/state/muster"
        );
        assert_eq!(dir(&[("STATE_DIRECTORY", "")], true), "/var/lib/muster");
        assert_eq!(dir(&[], false), "");
    }

    #[test]
    fn a_bare_name_is_a_credential_where_there_is_one() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("key"), "").unwrap();
        let mut environment = Environment::of(&|_| None, true);
        assert_eq!(environment.key_path(Path::new("key")), Path::new("key"));
        environment.credentials_dir = Some(folder.path().to_owned());
        assert_eq!(
            environment.key_path(Path::new("key")),
            folder.path().join("key")
        );
        for other in ["other", "./key", "/key", ".."] {
            assert_eq!(environment.key_path(Path::new(other)), Path::new(other));
        }
    }
}
