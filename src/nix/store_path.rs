//! Store paths: `/nix/store/<32 base-32 digits>-<name>`.
//!
//! A [`StorePath`] is the last component only; the directory is a [`StoreDir`] that is given
//! where a text needs it. Source: `libstore/path.cc`, the manual's "Store Path".

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use sha2::Digest as _;

use super::base32;

/// The directory that holds the store, absolute and without a slash at its end.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct StoreDir(Arc<str>);

/// The hash part of a store path: 20 bytes, written as 32 base-32 digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StorePathHash(pub [u8; 20]);

/// The last component of a store path, `<hash>-<name>`; ordered as its text, as Nix orders them.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StorePath(Box<str>);

/// A text that is no store path.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StorePathError {
    /// The path lies in another directory than the store's.
    #[error("{path:?} is not in the store directory {store_dir}")]
    OtherStoreDir {
        /// The path as it was given.
        path: String,
        /// The directory that was expected.
        store_dir: StoreDir,
    },
    /// The last component is not `<hash>-<name>`.
    #[error("{text:?} is not a store path: {reason}")]
    Malformed {
        /// The component as it was given.
        text: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The store directory itself is no absolute path.
    #[error("{0:?} is not a store directory: it must be absolute, without a slash at its end")]
    StoreDir(String),
}

impl StoreDir {
    /// Makes a store directory from an absolute path.
    pub fn new(path: &str) -> Result<Self, StorePathError> {
        let bad = !path.starts_with('/')
            || path.ends_with('/')
            || path.contains("//")
            || path.contains(char::is_control);
        if bad {
            return Err(StorePathError::StoreDir(excerpt(path)));
        }
        Ok(Self(path.into()))
    }

    /// Returns the directory's text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Writes a store path with its directory.
    pub fn join(&self, path: &StorePath) -> String {
        format!("{}/{}", self.0, path.0)
    }

    /// Reads an absolute store path that lies directly in this directory.
    pub fn parse(&self, absolute: &str) -> Result<StorePath, StorePathError> {
        match self.strip(absolute) {
            Some(rest) => rest.parse(),
            None => Err(StorePathError::OtherStoreDir {
                path: excerpt(absolute),
                store_dir: self.clone(),
            }),
        }
    }

    fn strip<'a>(&self, absolute: &'a str) -> Option<&'a str> {
        absolute.strip_prefix(&*self.0)?.strip_prefix('/')
    }
}

impl Default for StoreDir {
    fn default() -> Self {
        Self("/nix/store".into())
    }
}

impl fmt::Display for StoreDir {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for StoreDir {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl StorePathHash {
    /// Reads 32 base-32 digits.
    pub fn parse(digits: &str) -> Option<Self> {
        base32::decode(digits.as_bytes()).map(Self)
    }
}

impl fmt::Display for StorePathHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&base32::encode(&self.0))
    }
}

impl fmt::Debug for StorePathHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl StorePath {
    /// Makes the path that Nix gives to `name` with a fingerprint of `kind`.
    ///
    /// `kind` is `source`, `text`, `output:out`, … with its references; `inner` is the hex
    /// digest of the content. Source: `StoreDirConfig::makeStorePath`.
    pub fn compute(
        store_dir: &StoreDir,
        kind: &str,
        inner: &str,
        name: &str,
    ) -> Result<Self, StorePathError> {
        let fingerprint = format!("{kind}:{inner}:{store_dir}:{name}");
        let digest = sha2::Sha256::digest(fingerprint);
        let mut hash = [0_u8; 20];
        for (place, byte) in digest.iter().enumerate() {
            hash[place % 20] ^= byte;
        }
        format!("{}-{name}", base32::encode(&hash)).parse()
    }

    /// Returns the whole component, `<hash>-<name>`.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the hash part.
    pub fn hash(&self) -> StorePathHash {
        let digits = self.0.as_bytes().get(..HASH_DIGITS);
        StorePathHash(
            digits
                .and_then(base32::decode)
                .expect("checked when the path was made"),
        )
    }

    /// Returns the name after the hash part.
    pub fn name(&self) -> &str {
        self.0.split_once('-').map_or("", |(_, name)| name)
    }

    /// Tells whether this path names a derivation file.
    pub fn is_derivation(&self) -> bool {
        self.0.ends_with(".drv")
    }
}

impl FromStr for StorePath {
    type Err = StorePathError;

    /// Reads `<hash>-<name>` without a directory.
    fn from_str(text: &str) -> Result<Self, StorePathError> {
        match fault(text.as_bytes()) {
            None => Ok(Self(text.into())),
            Some(reason) => Err(StorePathError::Malformed {
                text: excerpt(text),
                reason,
            }),
        }
    }
}

impl fmt::Display for StorePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for StorePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn fault(text: &[u8]) -> Option<&'static str> {
    let Some((hash, rest)) = text.split_at_checked(HASH_DIGITS) else {
        return Some("it is too short");
    };
    if base32::decode::<20>(hash).is_none() {
        return Some("its hash part is not 32 base-32 digits");
    }
    let Some((b'-', name)) = rest.split_first() else {
        return Some("no dash follows the hash part");
    };
    name_fault(name)
}

fn name_fault(name: &[u8]) -> Option<&'static str> {
    let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b"+-._?=".contains(byte);
    // Nix 2.20 and later refuse `.`, `..` and names that begin with `.-` or `..-`; older ones
    // refuse every leading dot. The newer rule is the wider one.
    let dots = |prefix: &[u8]| {
        name.strip_prefix(prefix)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(b"-"))
    };
    if name.is_empty() {
        Some("its name is empty")
    } else if name.len() > NAME_BYTES_MAX {
        Some("its name is longer than 211 bytes")
    } else if !name.iter().all(allowed) {
        Some("its name has a character that is not allowed")
    } else if dots(b".") || dots(b"..") {
        Some("its name must not be . or .. or begin with .- or ..-")
    } else {
        None
    }
}

/// Cuts a foreign text so that an error message stays readable.
fn excerpt(text: &str) -> String {
    text.chars().take(300).collect()
}

const HASH_DIGITS: usize = 32;
const NAME_BYTES_MAX: usize = 211;

#[cfg(test)]
mod tests {
    use super::*;

    const FOO: &str = "1q8w6gl1ll0mwfkqc3c2yx005s6wwfrl-hello-2.10";

    #[test]
    fn parts_of_a_path() {
        let store = StoreDir::default();
        let path = store.parse(&format!("/nix/store/{FOO}")).unwrap();
        assert_eq!(path.as_str(), FOO);
        assert_eq!(path.name(), "hello-2.10");
        assert_eq!(path.hash().to_string(), "1q8w6gl1ll0mwfkqc3c2yx005s6wwfrl");
        assert_eq!(store.join(&path), format!("/nix/store/{FOO}"));
    }

    #[test]
    fn foreign_texts_are_refused() {
        let store = StoreDir::default();
        for text in [
            "",
            "/nix/store",
            "/nix/store/",
            "/nix/storeX/1q8w6gl1ll0mwfkqc3c2yx005s6wwfrl-hello",
            "/nix/store/1q8w6gl1ll0mwfkqc3c2yx005s6wwfrl",
            "/nix/store/1q8w6gl1ll0mwfkqc3c2yx005s6wwfrl-",
            "/nix/store/1q8w6gl1ll0mwfkqc3c2yx005s6wwfrl-a/b",
            "/nix/store/1q8w6gl1ll0mwfkqc3c2yx005s6wwfre-hello",
            "/nix/store/1q8w6gl1ll0mwfkqc3c2yx005s6wwfrl-..",
            "/nix/store/1q8w6gl1ll0mwfkqc3c2yx005s6wwfrl-.-x",
            "/nix/store/1q8w6gl1ll0mwfkqc3c2yx005s6wwfrl-größe",
            "/nix/store/1q8w6gl1ll0mwfkqc3c2yx005s6wwfrl-a\nb",
        ] {
            assert!(store.parse(text).is_err(), "{text}");
        }
        let long = format!("1q8w6gl1ll0mwfkqc3c2yx005s6wwfrl-{}", "a".repeat(212));
        assert!(long.parse::<StorePath>().is_err());
    }

    #[test]
    fn computed_text_path() {
        // `builtins.toFile "hello" "hello"`, Nix 2.8.
        let digest = sha2::Sha256::digest("hello");
        let inner = format!("sha256:{}", crate::nix::hash::encode_hex(&digest));
        let path = StorePath::compute(&StoreDir::default(), "text", &inner, "hello").unwrap();
        assert_eq!(path.as_str(), "i4f75pn3bxkxdk2kld86k5qazq4cqj8i-hello");
    }
}
