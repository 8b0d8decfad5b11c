//! Ed25519 keys and signatures as Nix writes them: `<key name>:<base64>`.
//!
//! A secret key is seed and public key, 64 bytes; a public key 32; a signature 64. Source:
//! `libutil/signature/local-keys.cc`; what `nix key generate-secret` made reads and signs alike.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ed25519_dalek::{Signer as _, SigningKey, VerifyingKey};
use zeroize::Zeroizing;

/// A key that signs; its bytes are wiped when it is dropped, and never printed.
#[derive(Clone)]
pub struct SecretKey {
    name: KeyName,
    key: SigningKey,
}

/// A key that verifies.
#[derive(Clone, PartialEq, Eq)]
pub struct PublicKey {
    name: KeyName,
    key: VerifyingKey,
}

/// A signature and the name of the key that made it.
#[derive(Clone, PartialEq, Eq)]
pub struct Signature {
    name: KeyName,
    bytes: [u8; 64],
}

/// The name before the colon: not empty, without colon, white space or control characters.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct KeyName(Box<str>);

/// A text that is no key or signature; the text itself is never shown, it may be secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// There is no colon.
    #[error("it has no colon between name and base64")]
    NoColon,
    /// The name is empty or has a forbidden character.
    #[error("key name {0:?} is empty or has a colon, blank or control character")]
    Name(String),
    /// The part after the colon is not base64.
    #[error("the part after {0:?} is not base64")]
    Base64(String),
    /// The number of bytes is wrong.
    #[error("{name:?} holds {actual} bytes, but {what} has {expected}")]
    Length {
        /// The key name.
        name: String,
        /// What was expected to be read.
        what: &'static str,
        /// Bytes found.
        actual: usize,
        /// Bytes wanted.
        expected: usize,
    },
    /// The bytes are no point of the curve, or seed and public half do not belong together.
    #[error("{0:?} is not a valid Ed25519 key")]
    Invalid(String),
}

impl SecretKey {
    /// Makes a key from 32 random bytes.
    pub fn from_seed(name: KeyName, seed: &Zeroizing<[u8; 32]>) -> Self {
        let key = SigningKey::from_bytes(seed);
        Self { name, key }
    }

    /// Reads `<name>:<base64 of 64 bytes>`; white space around it is ignored.
    pub fn parse(text: &str) -> Result<Self, KeyError> {
        let (name, bytes) = split::<64>(text, "a secret key")?;
        let bytes = Zeroizing::new(bytes);
        let key = SigningKey::from_keypair_bytes(&bytes)
            .map_err(|_| KeyError::Invalid(name.0.to_string()))?;
        Ok(Self { name, key })
    }

    /// Returns the key's name.
    pub fn name(&self) -> &KeyName {
        &self.name
    }

    /// Returns the key that verifies what this one signs.
    pub fn public(&self) -> PublicKey {
        PublicKey {
            name: self.name.clone(),
            key: self.key.verifying_key(),
        }
    }

    /// Signs a fingerprint.
    pub fn sign(&self, fingerprint: &str) -> Signature {
        Signature {
            name: self.name.clone(),
            bytes: self.key.sign(fingerprint.as_bytes()).to_bytes(),
        }
    }

    /// Writes the key as a key file holds it.
    pub fn to_secret_text(&self) -> Zeroizing<String> {
        let bytes = Zeroizing::new(self.key.to_keypair_bytes());
        Zeroizing::new(format!("{}:{}", self.name, STANDARD.encode(*bytes)))
    }
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretKey({})", self.name)
    }
}

impl PublicKey {
    /// Reads `<name>:<base64 of 32 bytes>`; white space around it is ignored.
    pub fn parse(text: &str) -> Result<Self, KeyError> {
        let (name, bytes) = split::<32>(text, "a public key")?;
        let key =
            VerifyingKey::from_bytes(&bytes).map_err(|_| KeyError::Invalid(name.0.to_string()))?;
        Ok(Self { name, key })
    }

    /// Returns the key's name.
    pub fn name(&self) -> &KeyName {
        &self.name
    }

    /// Tells whether `signature` is this key's over `fingerprint`.
    pub fn verifies(&self, fingerprint: &str, signature: &Signature) -> bool {
        let bytes = ed25519_dalek::Signature::from_bytes(&signature.bytes);
        self.name == signature.name
            && self
                .key
                .verify_strict(fingerprint.as_bytes(), &bytes)
                .is_ok()
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.name, STANDARD.encode(self.key.as_bytes()))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Signature {
    /// Reads `<name>:<base64 of 64 bytes>`.
    pub fn parse(text: &str) -> Result<Self, KeyError> {
        let (name, bytes) = split::<64>(text, "a signature")?;
        Ok(Self { name, bytes })
    }

    /// Returns the name of the key that made it.
    pub fn key_name(&self) -> &KeyName {
        &self.name
    }
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.name, STANDARD.encode(self.bytes))
    }
}

impl fmt::Debug for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl KeyName {
    /// Checks a key name.
    pub fn new(name: &str) -> Result<Self, KeyError> {
        let foreign = |c: char| c == ':' || c.is_whitespace() || c.is_control();
        if name.is_empty() || name.len() > NAME_BYTES_MAX || name.contains(foreign) {
            return Err(KeyError::Name(name.chars().take(NAME_BYTES_MAX).collect()));
        }
        Ok(Self(name.into()))
    }

    /// Returns the name's text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for KeyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for KeyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn split<const N: usize>(text: &str, what: &'static str) -> Result<(KeyName, [u8; N]), KeyError> {
    let (name, base64) = text.trim().split_once(':').ok_or(KeyError::NoColon)?;
    let name = KeyName::new(name)?;
    let bytes = Zeroizing::new(
        STANDARD
            .decode(base64)
            .map_err(|_| KeyError::Base64(name.0.to_string()))?,
    );
    let actual = bytes.len();
    let bytes = bytes.as_slice().try_into().map_err(|_| KeyError::Length {
        name: name.0.to_string(),
        what,
        actual,
        expected: N,
    })?;
    Ok((name, bytes))
}

const NAME_BYTES_MAX: usize = 255;

#[cfg(test)]
mod tests {
    use super::*;

    // Made by `nix key generate-secret --key-name test-1`, Nix 2.8.
    const SECRET: &str = "test-1:1FlgeDipndaPd3y6gxxOowecGBiNKZVjRBFQ2+Ok3faXNlsk7twXoE2Nnkww7IzIXZjk8CvLEhbPHSn+ajxdvA==";
    const PUBLIC: &str = "test-1:lzZbJO7cF6BNjZ5MMOyMyF2Y5PAryxIWzx0p/mo8Xbw=";

    #[test]
    fn key_of_real_nix_reads_and_writes_alike() {
        let secret = SecretKey::parse(&format!("{SECRET}\n")).unwrap();
        assert_eq!(secret.public().to_string(), PUBLIC);
        assert_eq!(*secret.to_secret_text(), SECRET);
        assert_eq!(PublicKey::parse(PUBLIC).unwrap(), secret.public());
        assert!(!format!("{secret:?}").contains("1Flg"));
    }

    #[test]
    fn a_signature_holds_for_its_text_key_and_name_only() {
        let secret = SecretKey::parse(SECRET).unwrap();
        let signature = secret.sign("1;a");
        assert!(secret.public().verifies("1;a", &signature));
        assert!(!secret.public().verifies("1;b", &signature));
        let renamed = Signature::parse(&signature.to_string().replace("test-1", "test-2"));
        assert!(!secret.public().verifies("1;a", &renamed.unwrap()));
    }

    #[test]
    fn foreign_texts_are_refused_without_showing_them() {
        for text in ["", ":", "a:", "a", "a b:AAAA", "a:!", "a:AAAA"] {
            assert!(SecretKey::parse(text).is_err(), "{text}");
        }
        let swapped = SECRET.replace("1Flg", "2Flg");
        let error = SecretKey::parse(&swapped).unwrap_err();
        assert!(!error.to_string().contains("2Flg"), "{error}");
    }
}
