//! Opens what the server listens on: systemd's sockets where it hands some in, else the
//! configured addresses.

use std::fs;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context as _, bail};
use listenfd::ListenFd;
use tokio::net::{TcpListener, UnixListener};
use tracing::warn;

use crate::config::{Config, ListenAddress};
use crate::server::listener::Listener;

/// Open listeners, and what clients call them.
pub(super) struct Opened {
    pub(super) listeners: Vec<Listener>,
    pub(super) addresses: Vec<ListenAddress>,
    /// Whether no byte served can leave this machine.
    pub(super) only_loopback: bool,
}

pub(super) fn open(config: &Config) -> anyhow::Result<Opened> {
    let mut listeners = Vec::new();
    let mut addresses = Vec::new();
    take_activated(&mut listeners, &mut addresses)?;
    let said = |address| config.listen.contains(address);
    if !listeners.is_empty() && config.says_where_to_listen && !addresses.iter().all(said) {
        let (configured, listening) = (shown(&config.listen), shown(&addresses));
        warn!(
            listening,
            configured,
            "systemd's sockets are listened on, and not what `listen` says: change ListenStream="
        );
    }
    if listeners.is_empty() {
        for address in &config.listen {
            let (listener, address) = bind(address, &config.listen)?;
            listeners.push(listener);
            addresses.push(address);
        }
    }
    let only_loopback = addresses.iter().all(|address| match address {
        ListenAddress::Tcp(address) => address.ip().is_loopback(),
        // What sits before a Unix socket may face the network.
        ListenAddress::Unix(_) => false,
    });
    Ok(Opened {
        listeners,
        addresses,
        only_loopback,
    })
}

fn shown(addresses: &[ListenAddress]) -> String {
    let shown: Vec<_> = addresses.iter().map(ToString::to_string).collect();
    shown.join(", ")
}

fn take_activated(
    listeners: &mut Vec<Listener>,
    addresses: &mut Vec<ListenAddress>,
) -> anyhow::Result<()> {
    let mut activated = ListenFd::from_env();
    for place in 0..activated.len() {
        // Each kind refuses the other's sockets, and leaves them where they are.
        if let Ok(Some(listener)) = activated.take_tcp_listener(place) {
            listener.set_nonblocking(true)?;
            let address = listener.local_addr()?;
            listeners.push(Listener::Tcp(TcpListener::from_std(listener)?));
            addresses.push(ListenAddress::Tcp(address));
        } else if let Ok(Some(listener)) = activated.take_unix_listener(place) {
            listener.set_nonblocking(true)?;
            let address = listener.local_addr()?;
            let path = address
                .as_pathname()
                .unwrap_or_else(|| Path::new("(unnamed)"));
            listeners.push(Listener::Unix(UnixListener::from_std(listener)?));
            addresses.push(ListenAddress::Unix(path.to_owned()));
        } else {
            bail!("socket {place} handed in by systemd is no stream socket: use ListenStream=");
        }
    }
    Ok(())
}

fn bind(
    address: &ListenAddress,
    all: &[ListenAddress],
) -> anyhow::Result<(Listener, ListenAddress)> {
    match address {
        ListenAddress::Tcp(address) => {
            let listener = bind_tcp(*address, all).map_err(|error| match error.kind() {
                ErrorKind::AddrInUse => anyhow::anyhow!(
                    "cannot listen on {address}: the port is in use; stop what holds it \
                     (`ss -ltnp`) or choose another with --listen"
                ),
                ErrorKind::PermissionDenied => anyhow::anyhow!(
                    "cannot listen on {address}: not permitted; ports below 1024 need \
                     CAP_NET_BIND_SERVICE"
                ),
                ErrorKind::AddrNotAvailable => anyhow::anyhow!(
                    "cannot listen on {address}: this machine has no such address; name one of its \
                     own (`ip address`), or 0.0.0.0 and [::] for all"
                ),
                _ => anyhow::Error::new(error).context(format!("cannot listen on {address}")),
            })?;
            let bound = listener.local_addr()?;
            Ok((Listener::Tcp(listener), ListenAddress::Tcp(bound)))
        }
        ListenAddress::Unix(path) => {
            remove_stale(path)?;
            let listener = UnixListener::bind(path).map_err(|error| {
                let remedy = match error.kind() {
                    ErrorKind::NotFound => ": make its folder first",
                    ErrorKind::PermissionDenied => ": this user may not write to its folder",
                    ErrorKind::AddrInUse => ": there is a file of this name, which is no socket",
                    _ => "",
                };
                let what = format!("cannot listen on unix:{}{remedy}", path.display());
                anyhow::Error::new(error).context(what)
            })?;
            // As with a TCP port, who may talk to it is decided by the folder it is in.
            fs::set_permissions(path, fs::Permissions::from_mode(0o666))
                .with_context(|| format!("cannot open {} to clients", path.display()))?;
            Ok((Listener::Unix(listener), ListenAddress::Unix(path.clone())))
        }
    }
}

fn bind_tcp(address: SocketAddr, all: &[ListenAddress]) -> std::io::Result<TcpListener> {
    let domain = socket2::Domain::for_address(address);
    let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None)?;
    // `[::]` takes IPv4 along, unless 0.0.0.0 is named beside it.
    let beside = |other: &ListenAddress| match other {
        ListenAddress::Tcp(other) => other.is_ipv4() && other.port() == address.port(),
        ListenAddress::Unix(_) => false,
    };
    if address.is_ipv6() && all.iter().any(beside) {
        socket.set_only_v6(true)?;
    }
    // A restart does not wait for old connections to time out.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Removes a socket that nobody listens on any more; a live one is left, and binding fails.
fn remove_stale(path: &Path) -> anyhow::Result<()> {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
    if is_socket {
        match UnixStream::connect(path) {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
            Ok(_) => bail!(
                "cannot listen on unix:{}: another process does; stop it or choose another path",
                path.display()
            ),
            Err(error) => {
                return Err(error).with_context(|| {
                    format!("cannot tell whether somebody listens on {}", path.display())
                });
            }
        }
        fs::remove_file(path)
            .with_context(|| format!("cannot remove the stale socket {}", path.display()))?;
    }
    Ok(())
}

/// Connections that wait in the kernel while all places are taken.
const BACKLOG: i32 = 4096;
