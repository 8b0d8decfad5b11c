//! Where a store is reached: `[user@]host[:port]`.
//!
//! User and host end on ssh's command line and, by ssh's `%h` and `%r`, in the shell of a
//! `ProxyCommand`. So neither may start with `-` or hold what ssh itself refuses there
//! (`valid_hostname`, `valid_ruser` in OpenSSH's `ssh.c`).

use core::net::Ipv6Addr;
use std::fmt;

use super::{StoreUriError, percent_decode};

/// A host, perhaps with a user and a port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Authority {
    user: Option<Box<str>>,
    host: Host,
    port: Option<u16>,
}

/// A host's name or address; never empty, never starting with `-`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Host {
    /// A name, an alias of `ssh_config`, or an IPv4 address.
    Name(Box<str>),
    /// An IPv6 address, perhaps with a zone such as `eth0`.
    V6(Ipv6Addr, Option<Box<str>>),
}

impl Authority {
    /// Reads `[user@]host[:port]`; an IPv6 address with a port must be in brackets.
    pub fn parse(text: &str) -> Result<Self, StoreUriError> {
        let (user, place) = match text.rsplit_once('@') {
            Some((user, place)) => (Some(check_user(user)?), place),
            None => (None, text),
        };
        let (host, port) = split_port(place)?;
        Ok(Self {
            user,
            host: Host::parse(host)?,
            port: port.map(parse_port).transpose()?,
        })
    }

    /// Returns the user, where one is given.
    pub fn user(&self) -> Option<&str> {
        self.user.as_deref()
    }

    /// Returns the host.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Returns the port, where one is given; never 0.
    pub fn port(&self) -> Option<u16> {
        self.port
    }

    /// Tells whether it is exactly `localhost`: Nix runs no ssh for it, but a local command.
    pub fn is_localhost(&self) -> bool {
        self.user.is_none()
            && self.port.is_none()
            && matches!(&self.host, Host::Name(name) if &**name == "localhost")
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(user) = &self.user {
            write!(f, "{}@", super::encode(user))?;
        }
        write!(f, "{}", self.host)?;
        match self.port {
            Some(port) => write!(f, ":{port}"),
            None => Ok(()),
        }
    }
}

impl Host {
    /// Reads a name, an IPv4 address, or an IPv6 address with or without brackets.
    pub fn parse(text: &str) -> Result<Self, StoreUriError> {
        let refused = |reason| StoreUriError::Host {
            host: super::excerpt(text),
            reason,
        };
        let inner = text.strip_prefix('[').and_then(|t| t.strip_suffix(']'));
        if inner.is_some() || text.contains(':') {
            return parse_v6(inner.unwrap_or(text)).ok_or(refused("it is no IPv6 address"));
        }
        let name = percent_decode(text)?;
        if name.is_empty() {
            return Err(refused("it is empty"));
        }
        if name.starts_with('-') {
            return Err(refused(
                "it starts with '-', and ssh would take it for an option",
            ));
        }
        let foreign = |c: char| c.is_whitespace() || c.is_control() || HOST_FOREIGN.contains(c);
        if name.contains(foreign) {
            return Err(refused("it has a character that no host name has"));
        }
        Ok(Self::Name(name.into()))
    }

    /// Returns the host as ssh takes it on its command line: an IPv6 address without brackets.
    pub fn to_ssh(&self) -> String {
        match self {
            Self::Name(name) => name.to_string(),
            Self::V6(address, None) => address.to_string(),
            Self::V6(address, Some(zone)) => format!("{address}%{zone}"),
        }
    }
}

impl fmt::Display for Host {
    /// Writes the host as a URI has it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(&super::encode(name)),
            Self::V6(address, None) => write!(f, "[{address}]"),
            Self::V6(address, Some(zone)) => write!(f, "[{address}%25{zone}]"),
        }
    }
}

fn check_user(text: &str) -> Result<Box<str>, StoreUriError> {
    let user = percent_decode(text)?;
    let refused = |reason| StoreUriError::User {
        user: super::excerpt(text),
        reason,
    };
    if user.contains(':') {
        // Not shown: what follows the colon was meant as a password.
        return Err(StoreUriError::Password);
    }
    if user.is_empty() {
        return Err(refused("it is empty"));
    }
    if user.starts_with('-') {
        return Err(refused(
            "it starts with '-', and ssh would take it for an option",
        ));
    }
    let foreign = |c: char| c.is_whitespace() || c.is_control() || USER_FOREIGN.contains(c);
    if user.contains(foreign) || user.ends_with('\\') {
        return Err(refused("it has a character that ssh refuses in user names"));
    }
    Ok(user.into())
}

/// Splits `host:port`, `[v6]:port`, and leaves a bare IPv6 address whole.
fn split_port(place: &str) -> Result<(&str, Option<&str>), StoreUriError> {
    if let Some(end) = place.starts_with('[').then(|| place.rfind(']')).flatten() {
        let (host, rest) = place.split_at_checked(end + 1).unwrap_or((place, ""));
        return match rest.strip_prefix(':') {
            Some(port) => Ok((host, Some(port))),
            None if rest.is_empty() => Ok((host, None)),
            None => Err(StoreUriError::Host {
                host: super::excerpt(place),
                reason: "only a port may follow ']'",
            }),
        };
    }
    match place.split_once(':') {
        Some((host, port)) if !port.contains(':') => Ok((host, Some(port))),
        _ => Ok((place, None)),
    }
}

fn parse_port(text: &str) -> Result<u16, StoreUriError> {
    let digits = text.bytes().all(|b| b.is_ascii_digit());
    match text.parse() {
        Ok(port) if digits && port != 0 => Ok(port),
        _ => Err(StoreUriError::Port(super::excerpt(text))),
    }
}

fn parse_v6(text: &str) -> Option<Host> {
    let (address, zone) = match text.split_once('%') {
        Some((address, zone)) => (address, Some(zone.strip_prefix("25").unwrap_or(zone))),
        None => (text, None),
    };
    let fits = |c: char| c.is_ascii_alphanumeric() || "._-~".contains(c);
    if zone.is_some_and(|zone| zone.is_empty() || !zone.chars().all(fits)) {
        return None;
    }
    Some(Host::V6(address.parse().ok()?, zone.map(Into::into)))
}

const HOST_FOREIGN: &str = "'`\"$\\;&<>|(){}[]/?#@%:,*!";
const USER_FOREIGN: &str = "'`\";&<>|(){}";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_of_users_hosts_and_ports() {
        for (text, user, host, port, written) in [
            ("h", None, "h", None, "h"),
            (
                "nix@h.example:2222",
                Some("nix"),
                "h.example",
                Some(2222),
                "nix@h.example:2222",
            ),
            ("a@b@h", Some("a@b"), "h", None, "a@b@h"),
            ("DOM\\me@h", Some("DOM\\me"), "h", None, "DOM%5Cme@h"),
            ("10.0.0.1:22", None, "10.0.0.1", Some(22), "10.0.0.1:22"),
            ("u@[::1]:22", Some("u"), "::1", Some(22), "u@[::1]:22"),
            ("::1", None, "::1", None, "[::1]"),
            (
                "fe80::1%eth0",
                None,
                "fe80::1%eth0",
                None,
                "[fe80::1%25eth0]",
            ),
            (
                "[fe80::1%25eth0]:22",
                None,
                "fe80::1%eth0",
                Some(22),
                "[fe80::1%25eth0]:22",
            ),
            (
                "[fe80::1%eth0]",
                None,
                "fe80::1%eth0",
                None,
                "[fe80::1%25eth0]",
            ),
            ("my_builder", None, "my_builder", None, "my_builder"),
        ] {
            let authority = Authority::parse(text).unwrap();
            assert_eq!(authority.user(), user, "{text}");
            assert_eq!(authority.host().to_ssh(), host, "{text}");
            assert_eq!(authority.port(), port, "{text}");
            assert_eq!(authority.to_string(), written, "{text}");
            assert_eq!(Authority::parse(written), Ok(authority), "{text}");
        }
    }

    #[test]
    fn what_ssh_could_mistake_is_refused() {
        for text in [
            "",
            "@",
            "u@",
            "@h",
            "-oProxyCommand=x",
            "%2doProxyCommand",
            "-u@h",
            "u@-h",
            "h:",
            "h:0",
            "h:65536",
            "h:+1",
            "h:x",
            "[::1]x",
            "[::1",
            "[h]",
            "::g",
            "::1%",
            "fe80::1%a b",
            "a b",
            "h$(x)",
            "h`x`",
            "h;x",
            "u'@h",
            "u\n@h",
            "h%0a",
            "h%zz",
            "u:secret@h",
            "[]",
            "h/x",
        ] {
            assert!(Authority::parse(text).is_err(), "{text}");
        }
        let error = Authority::parse("u:secret@h").unwrap_err();
        assert!(!error.to_string().contains("secret"), "{error}");
    }

    #[test]
    fn localhost_is_this_machine_only_when_it_stands_alone() {
        for (text, local) in [
            ("localhost", true),
            ("u@localhost", false),
            ("localhost:22", false),
            ("LOCALHOST", false),
            ("127.0.0.1", false),
        ] {
            assert_eq!(
                Authority::parse(text).unwrap().is_localhost(),
                local,
                "{text}"
            );
        }
    }
}
