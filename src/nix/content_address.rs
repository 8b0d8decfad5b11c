//! Content addresses: `text:<hash>`, `fixed:<hash>`, `fixed:r:<hash>`, `fixed:git:<hash>`.
//!
//! A path whose address leads back to its own name proves itself: no signature is needed, the
//! client hashes the content. Source: `libstore/content-address.cc`, `StoreDirConfig::makeFixedOutputPath`.

use std::fmt;

use sha2::Digest as _;

use super::hash::{Algorithm, Hash, encode_hex};
use super::store_path::{StoreDir, StorePath};

/// How a path's name follows from its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContentAddress {
    method: Method,
    hash: Hash,
}

/// What was hashed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Method {
    /// The bytes of a file that `builtins.toFile` or a derivation made.
    Text,
    /// The bytes of one file.
    Flat,
    /// The NAR.
    Recursive,
    /// The Git tree; experimental.
    Git,
}

impl ContentAddress {
    /// Reads the text of a narinfo's `CA` line; `None` when the form is unknown.
    pub fn parse(text: &str) -> Option<Self> {
        let (method, hash) = if let Some(rest) = text.strip_prefix("text:") {
            (Method::Text, rest)
        } else {
            let rest = text.strip_prefix("fixed:")?;
            if let Some(rest) = rest.strip_prefix("r:") {
                (Method::Recursive, rest)
            } else if let Some(rest) = rest.strip_prefix("git:") {
                (Method::Git, rest)
            } else {
                (Method::Flat, rest)
            }
        };
        let hash = Hash::parse(hash).ok()?;
        Some(Self { method, hash })
    }

    /// Tells whether `path` with `references` is the path that this address gives.
    pub fn proves(&self, store_dir: &StoreDir, path: &StorePath, references: &[StorePath]) -> bool {
        let name = path.name();
        let itself = references.contains(path);
        let others: Vec<_> = references.iter().filter(|r| *r != path).collect();
        let kind = |base: &str| {
            let mut kind = base.to_owned();
            for reference in &others {
                kind.push(':');
                kind.push_str(&store_dir.join(reference));
            }
            if itself {
                kind.push_str(":self");
            }
            kind
        };
        let inner = format!("{}:{}", self.hash.algorithm().name(), self.hash.to_hex());
        let computed = match (self.method, self.hash.algorithm()) {
            (Method::Text, _) if itself => return false,
            (Method::Text, _) => StorePath::compute(store_dir, &kind("text"), &inner, name),
            (Method::Recursive, Algorithm::Sha256) => {
                StorePath::compute(store_dir, &kind("source"), &inner, name)
            }
            _ if !references.is_empty() => return false,
            (method, _) => {
                let prefix = match method {
                    Method::Recursive => "r:",
                    Method::Git => "git:",
                    Method::Flat | Method::Text => "",
                };
                let outer = sha2::Sha256::digest(format!("fixed:out:{prefix}{inner}:"));
                let outer = format!("sha256:{}", encode_hex(&outer));
                StorePath::compute(store_dir, "output:out", &outer, name)
            }
        };
        computed.as_ref() == Ok(path)
    }
}

impl fmt::Display for ContentAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let method = match self.method {
            Method::Text => "text",
            Method::Flat => "fixed",
            Method::Recursive => "fixed:r",
            Method::Git => "fixed:git",
        };
        write!(f, "{method}:{}", self.hash)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Paths that Nix 2.8 made: toFile, toFile with a reference, `nix store add-file`, `add-path`.
    const MADE: [(&str, &str, &[&str]); 4] = [
        (
            "i4f75pn3bxkxdk2kld86k5qazq4cqj8i-hello",
            "text:sha256:094qif9n4cq4fdg459qzbhg1c6wywawwaaivx0k0x8xhbyx4vwic",
            &[],
        ),
        (
            "6pry51sldxhiwgi5qwm4c58gfvxg227y-ref",
            "text:sha256:09iq91dbmpj217d8r1jg637y6fgfzqhf2h9clmxpq5s46zhs08q7",
            &["i4f75pn3bxkxdk2kld86k5qazq4cqj8i-hello"],
        ),
        (
            "xgd4ijld16zz4n65lm0jzb4cfscm9vwi-h.txt",
            "fixed:sha256:094qif9n4cq4fdg459qzbhg1c6wywawwaaivx0k0x8xhbyx4vwic",
            &[],
        ),
        (
            "dfgarzn3ggg6l0as7hgn556awb7hx7v0-viapath",
            "fixed:r:sha256:0sg9f58l1jj88w6pdrfdpj5x9b1zrwszk84j81zvby36q9whhhqa",
            &[],
        ),
    ];

    #[test]
    fn addresses_that_nix_made_prove_their_paths() {
        for (path, address, references) in MADE {
            let path: StorePath = path.parse().unwrap();
            let references: Vec<StorePath> =
                references.iter().map(|r| r.parse().unwrap()).collect();
            let parsed = ContentAddress::parse(address).unwrap();
            assert_eq!(parsed.to_string(), address);
            assert!(
                parsed.proves(&StoreDir::default(), &path, &references),
                "{path}"
            );
            let other = StoreDir::new("/other/store").unwrap();
            assert!(!parsed.proves(&other, &path, &references), "{path}");
        }
    }

    #[test]
    fn another_content_proves_nothing() {
        let (path, _, _) = MADE[0];
        let (_, address, _) = MADE[1];
        let address = ContentAddress::parse(address).unwrap();
        assert!(!address.proves(&StoreDir::default(), &path.parse().unwrap(), &[]));
        assert_eq!(ContentAddress::parse("fixed:x"), None);
        assert_eq!(ContentAddress::parse(""), None);
    }
}
