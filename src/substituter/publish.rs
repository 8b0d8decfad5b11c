//! From a checked path info to the finished narinfo: URL, signatures, text.

use bytes::Bytes;

use crate::codec::compression::Encoding;
use crate::nix::fingerprint;
use crate::nix::hash::{Algorithm, Hash};
use crate::nix::narinfo::NarInfo;
use crate::nix::path_info::{Basis, Verified};
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
        };
        let mut info = (**verified).clone();
        let ours = |s: &Signature| self.keys.iter().any(|key| key.name() == s.key_name());
        info.signatures.retain(|s| !ours(s));
        info.signatures.truncate(FOREIGN_SIGNATURES_MAX);
        if *verified.basis() != Basis::ContentAddress {
            let fingerprint = fingerprint::of_path(&info, &self.store_dir);
            let signatures = self.keys.iter().map(|key| key.sign(&fingerprint));
            info.signatures.extend(signatures);
        }
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
        Bytes::from(narinfo.render(&self.store_dir))
    }
}

/// Far above what any cache adds; keeps a narinfo small for clients with an old limit.
const FOREIGN_SIGNATURES_MAX: usize = 32;
