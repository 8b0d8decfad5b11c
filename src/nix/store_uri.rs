//! Store URIs: how Nix names a store, in `--store`, `substituters` and the machines file.
//!
//! ```text
//! daemon | auto | unix:///path         a daemon of this machine
//! ssh-ng://[user@]host[:port]          a daemon reached by ssh; ssh:// and mounted-ssh-ng:// too
//! host | user@host:port                the same: what has no scheme gets ssh://
//! local | local?root=/mnt | /mnt       a store of this machine without a daemon
//! http://host/path | https://…         a binary cache
//! file:///path                         a binary cache in files
//! …?key=value&key2=value2              parameters, percent-encoded; the first of a name counts
//! ```
//!
//! Source: the manual's "Store URL format", `parseURL` in `libutil/url.cc`, and `Machine` in
//! `libstore/machines.cc` for what has no scheme. Nothing is looked up or opened here.

pub mod authority;
pub mod settings;

use std::fmt;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use authority::Authority;
use settings::StoreSettings;

/// A parsed store URI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreUri {
    kind: StoreKind,
    params: Vec<(String, String)>,
    settings: StoreSettings,
}

/// The kinds of stores.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum StoreKind {
    /// This machine's daemon, at its usual socket.
    Daemon,
    /// A daemon at a socket with this absolute path.
    Unix(String),
    /// A store of this machine without daemon, below this directory where one is given.
    Local(Option<String>),
    /// A builder reached by ssh, named by the scheme of the old protocol.
    Ssh(Authority),
    /// A builder whose daemon is reached by ssh.
    SshNg(Authority),
    /// A binary cache over HTTP; the path starts with `/` or is empty, and does not end with one.
    Http(Authority, String),
    /// A binary cache over HTTPS.
    Https(Authority, String),
    /// A binary cache in this absolute directory.
    File(String),
    /// A store that Muster has no way to ask; its scheme.
    Unsupported(String),
}

/// What two URIs of one store have in common; see [`StoreUri::id`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StoreId(String);

/// A text that is no store URI.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreUriError {
    /// Nothing is there.
    #[error("the store URI is empty")]
    Empty,
    /// It is longer than any URI.
    #[error("the store URI has more than {TEXT_BYTES_MAX} bytes")]
    TooLong,
    /// A `%` without two hexadecimal digits, or bytes that are no printable text.
    #[error("{0:?} is wrongly percent-encoded, or holds control characters")]
    Percent(String),
    /// The host cannot be one.
    #[error("bad host {host:?}: {reason}")]
    Host {
        /// The host as it was given.
        host: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The user cannot be one.
    #[error("bad user {user:?}: {reason}")]
    User {
        /// The user as it was given.
        user: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A password, which is not shown.
    #[error("a password has no place in a store URI")]
    Password,
    /// A user where none can be.
    #[error("a user has no place in a URI of a binary cache")]
    WebUser,
    /// The port is no number from 1 to 65535.
    #[error("bad port {0:?}: a number from 1 to 65535 must follow the colon")]
    Port(String),
    /// Something follows the host.
    #[error(
        "nothing may follow the host, but there is {0:?}; name a store there by ?remote-store="
    )]
    SshPath(String),
    /// A path that is not absolute.
    #[error("{0:?} is neither an absolute path nor a URI with a scheme such as ssh-ng://")]
    RelativePath(String),
    /// A parameter's value does not have the form it must have.
    #[error("parameter {key}: {reason}")]
    Param {
        /// Its name.
        key: String,
        /// What is wrong with the value.
        reason: String,
    },
}

impl StoreUri {
    /// Reads a URI, or one of the forms without scheme.
    pub fn parse(text: &str) -> Result<Self, StoreUriError> {
        Self::parse_with(text, &[])
    }

    /// Reads a URI whose parameters yield to these, as to the columns of the machines file.
    pub fn parse_with(text: &str, over: &[(&str, &str)]) -> Result<Self, StoreUriError> {
        if text.is_empty() {
            return Err(StoreUriError::Empty);
        }
        if text.len() > TEXT_BYTES_MAX {
            return Err(StoreUriError::TooLong);
        }
        let (place, query) = text.split_once('?').unwrap_or((text, ""));
        let mut params: Vec<(String, String)> = Vec::new();
        for (key, value) in over {
            params.push(((*key).to_owned(), (*value).to_owned()));
        }
        // Nix drops a pair without `=`, and decodes the value alone.
        for (key, value) in query.split('&').filter_map(|pair| pair.split_once('=')) {
            if !params.iter().any(|(earlier, _)| earlier == key) {
                params.push((checked(key.to_owned(), key)?, percent_decode(value)?));
            }
        }
        let settings = StoreSettings::read(&params)?;
        let kind = StoreKind::parse(place, &settings)?;
        Ok(Self {
            kind,
            params,
            settings,
        })
    }

    /// Returns the kind of store.
    pub fn kind(&self) -> &StoreKind {
        &self.kind
    }

    /// Returns what the parameters say.
    pub fn settings(&self) -> &StoreSettings {
        &self.settings
    }

    /// Returns the value of a parameter, decoded.
    pub fn param(&self, key: &str) -> Option<&str> {
        let found = self.params.iter().find(|(name, _)| name == key)?;
        Some(&found.1)
    }

    /// Returns the names of parameters that no Nix knows; they are ignored.
    pub fn unknown_params(&self) -> impl Iterator<Item = &str> {
        let names = self.params.iter().map(|(key, _)| key.as_str());
        names.filter(|key| !settings::is_known(key))
    }

    /// Returns what tells this store from others: two URIs of one identity are asked once.
    ///
    /// For ssh it is user, host, port and remote store, by whatever scheme: Muster asks the daemon
    /// there for each. How the store is asked (keys, programs, compression) does not count.
    pub fn id(&self) -> StoreId {
        let remote = self.settings.remote_store.as_deref().unwrap_or_default();
        StoreId(match &self.kind {
            StoreKind::Daemon | StoreKind::Local(None) => "daemon".to_owned(),
            StoreKind::Unix(path) if path == DAEMON_SOCKET => "daemon".to_owned(),
            StoreKind::Ssh(authority) | StoreKind::SshNg(authority) => {
                let host = authority.host().to_string().to_ascii_lowercase();
                let user = authority.user().unwrap_or_default();
                let port = authority.port().unwrap_or_default();
                format!("ssh {user:?} {host} {port} {remote:?}")
            }
            kind => kind.to_string(),
        })
    }

    /// Returns the URI without what only says how to ask: short enough for logs.
    pub fn name(&self) -> String {
        match &self.settings.remote_store {
            Some(store) => format!("{}?remote-store={}", self.kind, encode(store)),
            None => self.kind.to_string(),
        }
    }
}

impl fmt::Display for StoreUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.kind)?;
        // The path says it already.
        let said = |key: &str| matches!(self.kind, StoreKind::Local(_)) && key == "root";
        let params = self.params.iter().filter(|(key, _)| !said(key));
        for (place, (key, value)) in params.enumerate() {
            let mark = if place == 0 { '?' } else { '&' };
            write!(f, "{mark}{key}={}", encode(value))?;
        }
        Ok(())
    }
}

impl StoreKind {
    fn parse(place: &str, settings: &StoreSettings) -> Result<Self, StoreUriError> {
        let Some((scheme, rest)) = place.split_once("://") else {
            return Self::parse_bare(place, settings);
        };
        Ok(match scheme {
            "ssh" | "ssh-ng" | "mounted-ssh-ng" => Self::parse_ssh(scheme, rest, settings)?,
            "unix" | "daemon" if rest.is_empty() => Self::Daemon,
            "unix" => Self::Unix(absolute(rest)?),
            "local" if rest.is_empty() => Self::Local(settings.root.clone()),
            "local" => Self::Local(Some(absolute(rest)?)),
            "file" => Self::File(absolute(rest)?),
            "http" | "https" => Self::parse_web(scheme, rest)?,
            _ => Self::Unsupported(excerpt(scheme)),
        })
    }

    /// Reads what has no scheme, as the first column of the machines file is read.
    fn parse_bare(place: &str, settings: &StoreSettings) -> Result<Self, StoreUriError> {
        Ok(match place {
            "" | "auto" | "daemon" => Self::Daemon,
            "local" => Self::Local(settings.root.clone()),
            path if path.contains('/') => Self::Local(Some(absolute(path)?)),
            host => Self::parse_ssh("ssh", host, settings)?,
        })
    }

    fn parse_ssh(scheme: &str, rest: &str, with: &StoreSettings) -> Result<Self, StoreUriError> {
        let (authority, path) = split_path(rest);
        if !matches!(path, "" | "/") {
            return Err(StoreUriError::SshPath(excerpt(path)));
        }
        let authority = Authority::parse(authority)?;
        let plain = with.remote_store.is_none() && with.remote_program.is_empty();
        Ok(match scheme {
            // Nix starts no ssh, and what it would run instead is the daemon or its like.
            _ if authority.is_localhost() && plain => Self::Daemon,
            "ssh" => Self::Ssh(authority),
            _ => Self::SshNg(authority),
        })
    }

    fn parse_web(scheme: &str, rest: &str) -> Result<Self, StoreUriError> {
        let (authority, path) = split_path(rest);
        let authority = Authority::parse(authority)?;
        if authority.user().is_some() {
            return Err(StoreUriError::WebUser);
        }
        let path = checked(path.trim_end_matches('/').to_owned(), path)?;
        if path.contains(|c: char| c.is_whitespace() || "#\"<>\\".contains(c)) {
            return Err(StoreUriError::Percent(excerpt(&path)));
        }
        Ok(match scheme {
            "http" => Self::Http(authority, path),
            _ => Self::Https(authority, path),
        })
    }
}

impl fmt::Display for StoreKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Daemon => f.write_str("daemon"),
            Self::Unix(path) => write!(f, "unix://{}", encode(path)),
            Self::Local(None) => f.write_str("local"),
            Self::Local(Some(path)) => f.write_str(&encode(path)),
            Self::Ssh(authority) => write!(f, "ssh://{authority}"),
            Self::SshNg(authority) => write!(f, "ssh-ng://{authority}"),
            Self::Http(authority, path) => write!(f, "http://{authority}{path}"),
            Self::Https(authority, path) => write!(f, "https://{authority}{path}"),
            Self::File(path) => write!(f, "file://{}", encode(path)),
            Self::Unsupported(scheme) => write!(f, "{scheme}://"),
        }
    }
}

impl fmt::Display for StoreId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Reads any bytes and checks that what is written of them reads alike; for fuzzing.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let Ok(uri) = StoreUri::parse(text) else {
        return;
    };
    if let StoreKind::Ssh(authority) | StoreKind::SshNg(authority) = uri.kind() {
        let host = authority.host().to_ssh();
        assert!(!host.is_empty() && !host.starts_with('-'), "{host:?}");
        assert!(
            !authority
                .user()
                .is_some_and(|u| u.is_empty() || u.starts_with('-'))
        );
    }
    if !matches!(uri.kind(), StoreKind::Unsupported(_)) {
        let written = uri.to_string();
        let again = StoreUri::parse(&written).expect("what was written can be read");
        assert_eq!(again.kind(), uri.kind(), "{written}");
        assert_eq!(again.id(), uri.id(), "{written}");
        assert_eq!(again.to_string(), written);
    }
}

/// Decodes `%41`; a `%` without two digits, foreign bytes and control characters are errors.
fn percent_decode(text: &str) -> Result<String, StoreUriError> {
    let digits = |part: &str| part.bytes().take(2).filter(u8::is_ascii_hexdigit).count() == 2;
    if !text.split('%').skip(1).all(digits) {
        return Err(StoreUriError::Percent(excerpt(text)));
    }
    let decoded = percent_decode_str(text).decode_utf8();
    let decoded = decoded.map_err(|_| StoreUriError::Percent(excerpt(text)))?;
    checked(decoded.into_owned(), text)
}

fn checked(decoded: String, text: &str) -> Result<String, StoreUriError> {
    if decoded.contains(char::is_control) {
        return Err(StoreUriError::Percent(excerpt(text)));
    }
    Ok(decoded)
}

fn absolute(path: &str) -> Result<String, StoreUriError> {
    let path = percent_decode(path)?;
    if !path.starts_with('/') {
        return Err(StoreUriError::RelativePath(excerpt(&path)));
    }
    Ok(path)
}

fn split_path(rest: &str) -> (&str, &str) {
    let slash = rest.find('/').unwrap_or(rest.len());
    rest.split_at_checked(slash).unwrap_or((rest, ""))
}

fn encode(text: &str) -> String {
    utf8_percent_encode(text, ENCODED).to_string()
}

/// What errors show of a text.
fn excerpt(text: &str) -> String {
    text.chars().take(EXCERPT_CHARS_MAX).collect()
}

/// The socket that every Nix daemon listens on unless it is told otherwise.
pub const DAEMON_SOCKET: &str = "/nix/var/nix/daemon-socket/socket";

const TEXT_BYTES_MAX: usize = 64 * 1024;
const EXCERPT_CHARS_MAX: usize = 200;

/// Left as they are: what is readable, and harmless in URIs and in the machines file.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~')
    .remove(b'/')
    .remove(b':')
    .remove(b'+')
    .remove(b',')
    .remove(b'@')
    .remove(b'=');

#[cfg(test)]
mod tests;
