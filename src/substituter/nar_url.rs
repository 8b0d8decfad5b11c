//! NAR URLs: `nar/<store path hash>-<NAR hash>[-<file hash>].nar[.zst|.xz]`, relative to the cache's root.
//!
//! A NAR that is kept here has the hash of its file in its name, too: those bytes alone can be asked for in
//! parts, see [`crate::cache::nar_name`].
//! Both hashes are in the name, so any instance can answer it after a restart, and nothing else
//! is ever served under it. Clients remember these names for 30 days: never change their meaning.
//! Also read, for clients that come from them: harmonia's `nar/<NAR hash>.nar?hash=<store path
//! hash>`; nix-serve's form is ours without compression.

use std::fmt;

use crate::cache::nar_name::{FileHash, NarName};
use crate::codec::compression::Encoding;
use crate::nix::hash::NarHash;
use crate::nix::store_path::StorePathHash;

/// The name of one NAR in one encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NarUrl {
    /// The path whose NAR it is.
    pub path_hash: StorePathHash,
    /// The hash that its bytes must have.
    pub nar_hash: NarHash,
    /// How the bytes are compressed.
    pub encoding: Encoding,
    /// Which file it was when the URL was given out; always zstd.
    pub file_hash: Option<FileHash>,
}

impl NarUrl {
    /// Reads the part after `nar/`, and the query without its question mark.
    pub fn parse(file: &str, query: Option<&str>) -> Option<Self> {
        if let Some(name) = NarName::parse(file) {
            return Some(Self {
                path_hash: name.path_hash,
                nar_hash: name.nar_hash,
                encoding: Encoding::Zstd,
                file_hash: Some(name.file_hash),
            });
        }
        let (stem, encoding) = Encoding::split_suffix(file)?;
        let (path_hash, nar_hash) = match stem.split_once('-') {
            Some(hashes) => hashes,
            None => {
                let hash = |pair: &'_ str| pair.strip_prefix("hash=").map(str::to_owned);
                let path_hash = query?.split('&').find_map(hash)?;
                return Some(Self {
                    path_hash: StorePathHash::parse(&path_hash)?,
                    nar_hash: NarHash::from_base32(stem)?,
                    encoding,
                    file_hash: None,
                });
            }
        };
        Some(Self {
            path_hash: StorePathHash::parse(path_hash)?,
            nar_hash: NarHash::from_base32(nar_hash)?,
            encoding,
            file_hash: None,
        })
    }

    /// Names the file that is meant, where it is one.
    pub fn name(&self) -> Option<NarName> {
        self.file_hash.map(|file_hash| NarName {
            path_hash: self.path_hash,
            nar_hash: self.nar_hash,
            file_hash,
        })
    }
}

impl fmt::Display for NarUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(name) = self.name() {
            return f.write_str(&name.url());
        }
        let suffix = match self.encoding {
            Encoding::None => "nar",
            Encoding::Zstd => "nar.zst",
            Encoding::Xz => "nar.xz",
        };
        write!(
            f,
            "nar/{}-{}.{suffix}",
            self.path_hash,
            self.nar_hash.to_base32()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: &str = "1q8w6gl1ll0mwfkqc3c2yx005s6wwfrl";
    const NAR: &str = "0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73";

    #[test]
    fn round_trip_in_every_encoding() {
        for encoding in [Encoding::None, Encoding::Zstd, Encoding::Xz] {
            let url = NarUrl {
                path_hash: StorePathHash::parse(PATH).unwrap(),
                nar_hash: NarHash::from_base32(NAR).unwrap(),
                encoding,
                file_hash: None,
            };
            let text = url.to_string();
            let file = text.strip_prefix("nar/").unwrap();
            assert_eq!(NarUrl::parse(file, None), Some(url));
        }
    }

    #[test]
    fn a_cached_file_has_its_hash_in_its_name() {
        let file = format!("{PATH}-{NAR}-{NAR}.nar.zst");
        let url = NarUrl::parse(&file, None).unwrap();
        assert_eq!(url.file_hash, FileHash::from_base32(NAR));
        assert_eq!(url.to_string(), format!("nar/{file}"));
        let plain = format!("{PATH}-{NAR}-{NAR}.nar");
        assert_eq!(NarUrl::parse(&plain, None), None);
    }

    #[test]
    fn urls_of_other_servers() {
        let harmonia = NarUrl::parse(&format!("{NAR}.nar"), Some(&format!("hash={PATH}")));
        let nix_serve = NarUrl::parse(&format!("{PATH}-{NAR}.nar"), None);
        assert!(harmonia.is_some());
        assert_eq!(harmonia, nix_serve);
    }

    #[test]
    fn foreign_names_are_refused() {
        for file in [
            "",
            ".nar",
            "x.nar",
            "-.nar",
            &format!("{NAR}.nar"),
            &format!("{PATH}-{NAR}.nar.br"),
        ] {
            assert_eq!(NarUrl::parse(file, None), None, "{file}");
        }
    }
}
