//! This machine's own nix-daemon, or any other on a Unix socket (`daemon`, `unix:///path`).
//!
//! Source of the address: `libstore/uds-remote-store.cc`. Its build logs lie in files, see
//! `build_log`.

use std::path::{Path, PathBuf};

use async_trait::async_trait;
use tokio::net::UnixStream;

use super::Error;
use super::wire::{Dial, Guard, Purpose, Wire};

/// A daemon that listens on a Unix socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DaemonSocket {
    path: PathBuf,
}

impl DaemonSocket {
    /// Takes a socket's path.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Takes the socket that Nix would use, `environment` being `NIX_DAEMON_SOCKET_PATH`.
    pub fn system(environment: Option<PathBuf>) -> Self {
        let named = environment.filter(|path| !path.as_os_str().is_empty());
        Self::new(named.unwrap_or_else(|| DEFAULT_PATH.into()))
    }

    /// Returns the socket's path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

#[async_trait]
impl Dial for DaemonSocket {
    async fn dial(&self, _purpose: Purpose) -> Result<Wire, Error> {
        let stream = UnixStream::connect(&self.path).await.map_err(|e| {
            let path = self.path.display();
            let remedy = match e.kind() {
                std::io::ErrorKind::NotFound => "; is nix-daemon installed here?",
                std::io::ErrorKind::ConnectionRefused => "; is nix-daemon running?",
                std::io::ErrorKind::PermissionDenied => {
                    "; may this user use the daemon (allowed-users in its nix.conf)?"
                }
                _ => "",
            };
            Error::Down(format!("cannot connect to {path}: {e}{remedy}").into())
        })?;
        let (reader, writer) = stream.into_split();
        Ok(Wire {
            reader: Box::new(reader),
            writer: Box::new(writer),
            guard: Guard::default(),
        })
    }
}

const DEFAULT_PATH: &str = "/nix/var/nix/daemon-socket/socket";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_names_another_socket() {
        let default = Path::new("/nix/var/nix/daemon-socket/socket");
        assert_eq!(DaemonSocket::system(None).path(), default);
        assert_eq!(DaemonSocket::system(Some("".into())).path(), default);
        let named = DaemonSocket::system(Some("/run/d".into()));
        assert_eq!(named.path(), Path::new("/run/d"));
    }
}
