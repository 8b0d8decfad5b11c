//! The public host key of an ssh builder, as column 8 of the machines file pins it.
//!
//! Base64 of one line of a `.pub` file, `TYPE KEY COMMENT`. Nix puts the host's name before it and has a
//! line for `known_hosts`. Source: `libstore/ssh.cc`, `base64Decode` in `libutil/util.cc`. It is not
//! checked here that `KEY` is a key of that type: ssh does, and trusts no host by a line it cannot read.

use std::fmt;

use base64::Engine as _;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};

/// One line for `known_hosts` but for the host's name: not empty, one line, no control characters.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HostKey(Box<str>);

/// A text that is no host key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HostKeyError {
    /// There is a character that base64 does not have.
    #[error("the host key is not base64: it must be the output of `base64 -w0` for a .pub file")]
    Base64,
    /// The decoded bytes are no text.
    #[error(
        "the decoded host key is not text: encode the line of the .pub file, not the key in it"
    )]
    NotText,
    /// Nothing is there.
    #[error("the decoded host key is empty")]
    Empty,
    /// Several lines would be several keys.
    #[error("the decoded host key has more than one line: take one line of the .pub file")]
    Lines,
    /// It is longer than any key.
    #[error("the host key has more than {TEXT_BYTES_MAX} bytes")]
    TooLong,
}

impl HostKey {
    /// Reads the base64 as laxly as Nix does: padding may be missing, and whatever follows the first
    /// `=` is ignored. Any other foreign character is an error.
    pub fn parse_base64(text: &str) -> Result<Self, HostKeyError> {
        if text.len() > TEXT_BYTES_MAX {
            return Err(HostKeyError::TooLong);
        }
        let digits = text.split('=').next().unwrap_or_default();
        // A last digit on its own is less than a byte; Nix drops it.
        let whole = digits.len() - usize::from(digits.len() % 4 == 1);
        let (whole, rest) = digits.split_at_checked(whole).ok_or(HostKeyError::Base64)?;
        if !rest.chars().all(|c| STANDARD.as_str().contains(c)) {
            return Err(HostKeyError::Base64);
        }
        let bytes = LAX.decode(whole).map_err(|_| HostKeyError::Base64)?;
        Self::new(std::str::from_utf8(&bytes).map_err(|_| HostKeyError::NotText)?)
    }

    /// Takes the line of a `.pub` file; line ends behind it are dropped.
    pub fn new(line: &str) -> Result<Self, HostKeyError> {
        let line = line.trim_end_matches(['\n', '\r']);
        if line.trim().is_empty() {
            return Err(HostKeyError::Empty);
        }
        if line.contains(['\n', '\r']) {
            return Err(HostKeyError::Lines);
        }
        if line.contains(|c: char| c.is_control() && c != '\t') {
            return Err(HostKeyError::NotText);
        }
        Ok(Self(line.into()))
    }

    /// Returns the line, `TYPE KEY COMMENT`.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the key's type, such as `ssh-ed25519`, where the line has the form of a host key.
    ///
    /// Without one ssh will not take the key for any host, and refuse to connect.
    pub fn kind(&self) -> Option<&str> {
        let mut words = self.0.split_ascii_whitespace();
        let kind = words.next().filter(|kind| !kind.starts_with(['@', '#']))?;
        words.next().map(|_| kind)
    }

    /// Writes the base64 that column 8 holds.
    pub fn to_base64(&self) -> String {
        LAX.encode(self.0.as_bytes())
    }
}

impl fmt::Display for HostKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

const LAX: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_allow_trailing_bits(true)
        .with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// A 16384-bit RSA key takes 3 KiB.
const TEXT_BYTES_MAX: usize = 16 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_read_as_laxly_as_by_nix() {
        for (text, line) in [
            ("c3NoLWVkMjU1MTkgQUFBQQ==", "ssh-ed25519 AAAA"),
            ("c3NoLWVkMjU1MTkgQUFBQQ", "ssh-ed25519 AAAA"),
            ("c3NoLWVkMjU1MTkgQUFBQSBtZUBoCg==", "ssh-ed25519 AAAA me@h"),
            ("c3NoLWVkMjU1MTkgQUFBQSBtZUBoDQo=", "ssh-ed25519 AAAA me@h"),
            ("c3Nr=x", "ssk"),
            ("c3Nr", "ssk"),
            ("c3NrA", "ssk"),
        ] {
            let key = HostKey::parse_base64(text).unwrap();
            assert_eq!(key.as_str(), line);
            assert_eq!(HostKey::parse_base64(&key.to_base64()), Ok(key));
        }
    }

    #[test]
    fn what_is_no_line_of_text_is_refused() {
        for (text, error) in [
            ("!!!", HostKeyError::Base64),
            ("c3N-", HostKeyError::Base64),
            ("c3Nr\u{e9}", HostKeyError::Base64),
            ("c3Nr!", HostKeyError::Base64),
            ("", HostKeyError::Empty),
            ("A", HostKeyError::Empty),
            ("=c3Nr", HostKeyError::Empty),
            ("Cg==", HostKeyError::Empty),
            ("YQpi", HostKeyError::Lines),
            ("YQ1i", HostKeyError::Lines),
            ("AAAAC3Nz", HostKeyError::NotText),
            ("////", HostKeyError::NotText),
        ] {
            assert_eq!(HostKey::parse_base64(text), Err(error), "{text}");
        }
    }

    #[test]
    fn the_kind_is_told_where_ssh_would_take_the_line() {
        let kind = |line| HostKey::new(line).unwrap().kind().map(str::to_owned);
        assert_eq!(kind("ssh-rsa AAAA me"), Some("ssh-rsa".to_owned()));
        assert_eq!(kind("ssk"), None);
        assert_eq!(kind("@cert-authority * ssh-rsa AAAA"), None);
    }
}
