//! Hashes as Nix writes them: `sha256:<nix base-32 | hex | base64>` and SRI `sha256-<base64>`.
//!
//! [`NarHash`] is the hash of a NAR, always SHA-256. [`Hash`] is any algorithm, as content
//! addresses and file hashes may carry. Source: `libutil/hash.cc`.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha2::Digest as _;

use super::base32;

/// The SHA-256 of a NAR.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NarHash(pub [u8; 32]);

/// A hash with its algorithm.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Hash {
    algorithm: Algorithm,
    digest: Box<[u8]>,
}

/// The algorithms that store paths and content addresses may name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// 16 bytes; old fixed-output derivations.
    Md5,
    /// 20 bytes; old fixed-output derivations.
    Sha1,
    /// 32 bytes.
    Sha256,
    /// 64 bytes.
    Sha512,
    /// 32 bytes; Nix 2.27 and later, experimental.
    Blake3,
}

/// A text that is no hash.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a hash: {reason}")]
pub struct HashError {
    text: String,
    reason: &'static str,
}

impl NarHash {
    /// Reads `sha256:…` in base-32, hex or base64, the SRI form, or bare digits.
    pub fn parse(text: &str) -> Result<Self, HashError> {
        let hash = match Hash::parse(text) {
            Ok(hash) => hash,
            Err(error) => Hash::from_digits(Algorithm::Sha256, text).ok_or(error)?,
        };
        hash.sha256()
            .map(Self)
            .ok_or_else(|| error(text, "a NAR hash is a SHA-256"))
    }

    /// Reads 52 base-32 digits, as NAR URLs carry them.
    pub fn from_base32(digits: &str) -> Option<Self> {
        base32::decode(digits.as_bytes()).map(Self)
    }

    /// Returns the 52 base-32 digits without the algorithm.
    pub fn to_base32(self) -> String {
        base32::encode(&self.0)
    }

    /// Hashes a NAR that is wholly in memory.
    pub fn of(nar: &[u8]) -> Self {
        Self(sha2::Sha256::digest(nar).into())
    }
}

impl fmt::Display for NarHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.to_base32())
    }
}

impl fmt::Debug for NarHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Hash {
    /// Makes a hash from its digest; `None` when the length does not fit the algorithm.
    pub fn new(algorithm: Algorithm, digest: &[u8]) -> Option<Self> {
        (digest.len() == algorithm.len()).then(|| Self {
            algorithm,
            digest: digest.into(),
        })
    }

    /// Reads `<algorithm>:<digits>` or the SRI form `<algorithm>-<base64>`.
    pub fn parse(text: &str) -> Result<Self, HashError> {
        let (name, digits, sri) = match (text.split_once(':'), text.split_once('-')) {
            (Some((name, digits)), _) => (name, digits, false),
            (None, Some((name, digits))) => (name, digits, true),
            (None, None) => return Err(error(text, "it names no algorithm")),
        };
        let algorithm =
            Algorithm::parse(name).ok_or_else(|| error(text, "the algorithm is unknown"))?;
        let hash = if sri {
            // SRI allows options after a question mark; Nix ignores none of them, and neither do we.
            STANDARD
                .decode(digits)
                .ok()
                .and_then(|d| Self::new(algorithm, &d))
        } else {
            Self::from_digits(algorithm, digits)
        };
        hash.ok_or_else(|| error(text, "the digits do not fit the algorithm"))
    }

    /// Reads digits in base-32, hex or base64, told apart by their number.
    pub fn from_digits(algorithm: Algorithm, digits: &str) -> Option<Self> {
        let bytes = algorithm.len();
        let digits = digits.as_bytes();
        let digest = if digits.len() == bytes * 2 {
            decode_hex(digits)?
        } else if digits.len() == base32::encoded_len(bytes) {
            match algorithm {
                Algorithm::Md5 => base32::decode::<16>(digits)?.into(),
                Algorithm::Sha1 => base32::decode::<20>(digits)?.into(),
                Algorithm::Sha256 | Algorithm::Blake3 => base32::decode::<32>(digits)?.into(),
                Algorithm::Sha512 => base32::decode::<64>(digits)?.into(),
            }
        } else {
            STANDARD.decode(digits).ok()?
        };
        Self::new(algorithm, &digest)
    }

    /// Returns the algorithm.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// Returns the raw digest.
    pub fn digest(&self) -> &[u8] {
        &self.digest
    }

    /// Returns the digest if this is a SHA-256.
    pub fn sha256(&self) -> Option<[u8; 32]> {
        match self.algorithm {
            Algorithm::Sha256 => self.digest.as_ref().try_into().ok(),
            _ => None,
        }
    }

    /// Returns the digest as lower-case hex.
    pub fn to_hex(&self) -> String {
        encode_hex(&self.digest)
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = base32::encode(&self.digest);
        write!(f, "{}:{digits}", self.algorithm.name())
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Algorithm {
    /// Reads Nix's name of the algorithm.
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "md5" => Self::Md5,
            "sha1" => Self::Sha1,
            "sha256" => Self::Sha256,
            "sha512" => Self::Sha512,
            "blake3" => Self::Blake3,
            _ => return None,
        })
    }

    /// Returns Nix's name of the algorithm.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Md5 => "md5",
            Self::Sha1 => "sha1",
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
            Self::Blake3 => "blake3",
        }
    }

    /// Returns the length of a digest in bytes.
    #[expect(clippy::len_without_is_empty, reason = "a digest is never empty")]
    pub const fn len(self) -> usize {
        match self {
            Self::Md5 => 16,
            Self::Sha1 => 20,
            Self::Sha256 | Self::Blake3 => 32,
            Self::Sha512 => 64,
        }
    }
}

/// Writes bytes as lower-case hex.
pub fn encode_hex(bytes: &[u8]) -> String {
    let digit = |value: u8| char::from(b"0123456789abcdef"[usize::from(value)]);
    bytes
        .iter()
        .flat_map(|byte| [digit(byte >> 4), digit(byte & 0xf)])
        .collect()
}

/// Reads hex digits of either case; `None` for an odd number or a foreign digit.
pub fn decode_hex(digits: &[u8]) -> Option<Vec<u8>> {
    let value = |digit: u8| {
        char::from(digit)
            .to_digit(16)
            .and_then(|v| u8::try_from(v).ok())
    };
    if !digits.len().is_multiple_of(2) {
        return None;
    }
    digits
        .chunks_exact(2)
        .map(|pair| Some(value(pair[0])? << 4 | value(pair[1])?))
        .collect()
}

fn error(text: &str, reason: &'static str) -> HashError {
    let text = text.chars().take(200).collect();
    HashError { text, reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY_HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    const EMPTY_BASE32: &str = "0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73";
    const EMPTY_BASE64: &str = "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=";

    #[test]
    fn every_form_of_one_hash() {
        let empty = NarHash::of(b"");
        for text in [
            format!("sha256:{EMPTY_HEX}"),
            format!("sha256:{EMPTY_BASE32}"),
            format!("sha256:{EMPTY_BASE64}"),
            format!("sha256-{EMPTY_BASE64}"),
            EMPTY_HEX.to_owned(),
            EMPTY_BASE32.to_owned(),
        ] {
            assert_eq!(NarHash::parse(&text), Ok(empty), "{text}");
        }
        assert_eq!(empty.to_string(), format!("sha256:{EMPTY_BASE32}"));
    }

    #[test]
    fn foreign_texts_are_refused() {
        for text in [
            "",
            "sha256:",
            "sha257:aa",
            "sha1:aa",
            "md5:zz",
            "sha256-é",
            "x",
        ] {
            assert!(NarHash::parse(text).is_err(), "{text}");
        }
        let sha1 = Hash::parse("sha1:da39a3ee5e6b4b0d3255bfef95601890afd80709");
        assert!(sha1.is_ok());
    }
}
