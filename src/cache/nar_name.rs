//! The name of a cached NAR: `<store path hash>-<NAR hash>-<file hash>.nar.zst`, in base-32.
//!
//! The same name stands in the folder `nar/` of the cache on disk and, after `nar/`, in the URL of each
//! narinfo that names a cached file; so another server can take over with nothing but the folder. All
//! that it takes to know what the bytes must be is in it. Clients remember it for 30 days: never change
//! its meaning. Names of NARs that are not cached are the substituter's.

use std::fmt;

use crate::nix::base32;
use crate::nix::hash::NarHash;
use crate::nix::store_path::StorePathHash;

/// The SHA-256 of a compressed NAR, as `FileHash` in a narinfo.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileHash(pub [u8; 32]);

/// Which file it is: of which path, with which content, compressed to which bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NarName {
    /// The path whose NAR it is.
    pub path_hash: StorePathHash,
    /// The hash of the NAR.
    pub nar_hash: NarHash,
    /// The hash of the file itself.
    pub file_hash: FileHash,
}

impl FileHash {
    /// Reads 52 base-32 digits.
    pub fn from_base32(digits: &str) -> Option<Self> {
        base32::decode(digits.as_bytes()).map(Self)
    }
}

impl NarName {
    /// Reads a file's name; `None` when it is not exactly what [`Display`](fmt::Display) writes.
    pub fn parse(file: &str) -> Option<Self> {
        let stem = file.strip_suffix(SUFFIX)?;
        let (path_hash, hashes) = stem.split_once('-')?;
        let (nar_hash, file_hash) = hashes.split_once('-')?;
        Some(Self {
            path_hash: StorePathHash::parse(path_hash)?,
            nar_hash: NarHash::from_base32(nar_hash)?,
            file_hash: FileHash::from_base32(file_hash)?,
        })
    }

    /// Returns the URL relative to the cache's root, as the narinfo has it.
    pub fn url(&self) -> String {
        format!("nar/{self}")
    }
}

impl fmt::Display for NarName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (path_hash, nar_hash) = (self.path_hash, self.nar_hash.to_base32());
        let file_hash = base32::encode(&self.file_hash.0);
        write!(f, "{path_hash}-{nar_hash}-{file_hash}{SUFFIX}")
    }
}

impl fmt::Display for FileHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", base32::encode(&self.0))
    }
}

impl fmt::Debug for FileHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

const SUFFIX: &str = ".nar.zst";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_reads_as_it_was_written_and_nothing_else_does() {
        let name = NarName {
            path_hash: StorePathHash([7; 20]),
            nar_hash: NarHash::of(b"nar"),
            file_hash: FileHash([9; 32]),
        };
        let text = name.to_string();
        assert_eq!(text.len(), 32 + 1 + 52 + 1 + 52 + SUFFIX.len());
        assert_eq!(NarName::parse(&text), Some(name));
        assert_eq!(name.url(), format!("nar/{text}"));
        for foreign in [
            String::new(),
            SUFFIX.to_owned(),
            text.replace(".zst", ".xz"),
            text.replace('-', "_"),
            format!("../{text}"),
            format!("{text}.tmp"),
            text.to_uppercase(),
            format!("{}{SUFFIX}", StorePathHash([7; 20])),
        ] {
            assert_eq!(NarName::parse(&foreign), None, "{foreign}");
        }
    }
}
