//! From a checked path info to the finished narinfo: URL, signatures, text.

use bytes::Bytes;

use crate::cache::backend::NarFile;
use crate::codec::compression::Encoding;
use crate::nix::fingerprint;
use crate::nix::hash::{Algorithm, Hash};
use crate::nix::narinfo::NarInfo;
use crate::nix::path_info::{Basis, PathInfo, Verified};
use crate::nix::signature::{SecretKey, Signature};
use crate::nix::store_path::StoreDir;

use super::nar_url::NarUrl;

/// Writes and signs narinfos.
#[derive(Clone, Debug)]
pub struct Publisher {
    /// Every key signs each path.
    pub keys: Vec<SecretKey>,
    /// The store's directory, part of what is signed.
    pub store_dir: StoreDir,
    /// How NARs are offered.
    pub encoding: Encoding,
}

impl Publisher {
    /// Lists the public keys as `trusted-public-keys` of nix.conf takes them.
    pub fn public_keys(&self) -> String {
        let keys = self.keys.iter().map(|key| key.public().to_string());
        keys.collect::<Vec<_>>().join(" ")
    }

    /// Tells whether the other one writes the same texts.
    pub fn publishes_as(&self, other: &Self) -> bool {
        let key = |key: &SecretKey| key.public().to_string();
        self.keys.iter().map(key).eq(other.keys.iter().map(key))
            && self.store_dir == other.store_dir
            && self.encoding == other.encoding
    }

    /// Writes the signed text of a narinfo.
    ///
    /// What rests on its content address alone is offered without our signature: the client
    /// checks the content itself. Well-formed foreign signatures are kept beside ours.
    pub fn publish(&self, verified: &Verified) -> Bytes {
        let url = NarUrl {
            path_hash: verified.path.hash(),
            nar_hash: verified.nar_hash,
            encoding: self.encoding,
            file_hash: None,
        };
        let mut info = (**verified).clone();
        let ours = |s: &Signature| self.keys.iter().any(|key| key.name() == s.key_name());
        info.signatures.retain(|s| !ours(s));
        info.signatures.truncate(FOREIGN_SIGNATURES_MAX);
        info.signatures.extend(self.signatures(verified));
        let plain = self.encoding == Encoding::None;
        let narinfo = NarInfo {
            url: url.to_string(),
            compression: self.encoding.compression(),
            file_hash: plain
                .then(|| Hash::new(Algorithm::Sha256, &info.nar_hash.0))
                .flatten(),
            file_size: plain.then_some(info.nar_size),
            info,
        };
        self.finish(&narinfo)
    }

    /// Makes our own signatures; none for what rests on its content address alone.
    pub fn signatures(&self, verified: &Verified) -> Vec<Signature> {
        if *verified.basis() == Basis::ContentAddress {
            return Vec::new();
        }
        let fingerprint = fingerprint::of_path(verified, &self.store_dir);
        self.keys.iter().map(|key| key.sign(&fingerprint)).collect()
    }

    /// Rewrites a published text, so that it names the kept file; `None`: it is no text of ours.
    ///
    /// Signatures do not cover where a NAR is and how it is compressed.
    pub fn with_file(&self, text: &[u8], file: &NarFile) -> Option<Bytes> {
        let text = std::str::from_utf8(text).ok()?;
        let narinfo = NarInfo::parse(text, &self.store_dir).ok()?;
        Some(self.narinfo_of(narinfo.info, file))
    }

    /// Writes the narinfo of a kept file; `signed` carries the signatures that are to be in it.
    pub fn narinfo_of(&self, signed: PathInfo, file: &NarFile) -> Bytes {
        self.finish(&NarInfo {
            url: file.name(&signed).url(),
            compression: Encoding::Zstd.compression(),
            file_hash: Hash::new(Algorithm::Sha256, &file.hash.0),
            file_size: Some(file.size_bytes),
            info: signed,
        })
    }

    /// Drops our own signatures, as records keep what others said.
    pub fn without_ours(&self, mut info: PathInfo) -> PathInfo {
        info.signatures.retain(|signature| {
            let key_name = signature.key_name();
            !self.keys.iter().any(|key| key.name() == key_name)
        });
        info
    }

    fn finish(&self, narinfo: &NarInfo) -> Bytes {
        // Without the room that the text did not need: it may be kept for long.
        Bytes::from(
            narinfo
                .render(&self.store_dir)
                .into_boxed_str()
                .into_boxed_bytes(),
        )
    }
}

/// Far above what any cache adds; keeps a narinfo small for clients with an old limit.
const FOREIGN_SIGNATURES_MAX: usize = 32;
