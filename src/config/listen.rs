//! Where the server listens: `127.0.0.1:5000`, `[::1]:5000` or `unix:/run/muster/socket`.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

/// An address to listen on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenAddress {
    /// A TCP address.
    Tcp(SocketAddr),
    /// The absolute path of a Unix socket, short enough for one.
    Unix(PathBuf),
}

/// A text that is no address to listen on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ListenError {
    /// It is no TCP address.
    #[error("{text:?} is not an address to listen on: {remedy}")]
    Tcp {
        /// The text.
        text: String,
        /// What to write instead.
        remedy: String,
    },
    /// The path of a Unix socket is relative.
    #[error("unix:{0} is not an absolute path")]
    Relative(String),
    /// The path of a Unix socket does not fit in the kernel's structure.
    #[error("unix:{0} has more than {SOCKET_PATH_BYTES_MAX} bytes")]
    TooLong(String),
}

impl FromStr for ListenAddress {
    type Err = ListenError;

    fn from_str(text: &str) -> Result<Self, ListenError> {
        let Some(path) = text.strip_prefix("unix:") else {
            return match text.parse() {
                Ok(address) => Ok(Self::Tcp(address)),
                Err(_) => Err(ListenError::Tcp {
                    text: text.to_owned(),
                    remedy: remedy(text),
                }),
            };
        };
        // `unix:///run/x` is how others write it.
        let path = path.strip_prefix("//").unwrap_or(path);
        if !path.starts_with('/') {
            return Err(ListenError::Relative(path.to_owned()));
        }
        if path.len() > SOCKET_PATH_BYTES_MAX {
            return Err(ListenError::TooLong(path.to_owned()));
        }
        Ok(Self::Unix(path.into()))
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

fn remedy(text: &str) -> String {
    let bare = text
        .trim_start_matches("http://")
        .trim_end_matches('/')
        .replace("localhost", "127.0.0.1");
    let port = bare.trim_start_matches(['*', ':']);
    for guess in [
        bare.clone(),
        format!("{bare}:5000"),
        format!("[{bare}]:5000"),
        format!("0.0.0.0:{port}"),
    ] {
        if guess.parse::<SocketAddr>().is_ok() {
            return format!("did you mean {guess:?}?");
        }
    }
    "it must be like 127.0.0.1:5000, [::1]:5000 or unix:/run/muster/socket".to_owned()
}

/// `sun_path` of Linux, without the NUL.
const SOCKET_PATH_BYTES_MAX: usize = 107;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written_alike() {
        for text in [
            "127.0.0.1:5000",
            "[::1]:5000",
            "0.0.0.0:0",
            "unix:/run/muster/socket",
        ] {
            let address: ListenAddress = text.parse().unwrap();
            assert_eq!(address.to_string(), text);
        }
        let address: ListenAddress = "unix:///run/x".parse().unwrap();
        assert_eq!(address.to_string(), "unix:/run/x");
    }

    #[test]
    fn what_was_meant_is_named() {
        for (text, words) in [
            ("localhost:5000", "\"127.0.0.1:5000\""),
            ("http://127.0.0.1:5000/", "\"127.0.0.1:5000\""),
            ("127.0.0.1", "\"127.0.0.1:5000\""),
            (":8080", "\"0.0.0.0:8080\""),
            ("*:8080", "\"0.0.0.0:8080\""),
            ("8080", "\"0.0.0.0:8080\""),
            ("::1", "\"[::1]:5000\""),
            ("127.0.0.1:x", "must be like"),
            ("", "must be like"),
            ("unix:socket", "absolute"),
        ] {
            let error = text.parse::<ListenAddress>().unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
        let long = format!("unix:/{}", "x".repeat(107));
        assert!(matches!(
            long.parse::<ListenAddress>(),
            Err(ListenError::TooLong(_))
        ));
    }
}
