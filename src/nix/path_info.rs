//! What a store knows of a path, and the proof that it was checked.
//!
//! [`PathInfo`] comes from an upstream and is only a claim. [`PathInfo::verify`] is the one way to
//! a [`Verified`] path info, and only that can be published and signed.
//! Source: `ValidPathInfo` and `UnkeyedValidPathInfo` in `libstore/path-info.hh`.

use std::ops::Deref;

use super::content_address::ContentAddress;
use super::fingerprint;
use super::hash::NarHash;
use super::signature::{KeyName, PublicKey, Signature};
use super::store_path::{StoreDir, StorePath};

/// A store's claim about one of its paths.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathInfo {
    /// The path.
    pub path: StorePath,
    /// SHA-256 of its NAR.
    pub nar_hash: NarHash,
    /// Size of its NAR in bytes.
    pub nar_size: u64,
    /// The paths it refers to, itself perhaps among them; sorted, each once.
    pub references: Vec<StorePath>,
    /// The derivation that built it, where known.
    pub deriver: Option<StorePath>,
    /// Well-formed signatures by whatever key.
    pub signatures: Vec<Signature>,
    /// The content address, where the path has one.
    pub ca: Option<ContentAddress>,
}

/// Whom an upstream is believed.
#[derive(Clone, Debug)]
pub enum Trust {
    /// The operator vouches for the upstream: a builder reached by ssh, or this machine's daemon.
    Operator,
    /// Each path must carry a signature by one of these keys, or prove itself.
    Keys(Vec<PublicKey>),
}

/// What a [`Verified`] path info rests on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Basis {
    /// The operator's word for the upstream.
    Operator,
    /// A signature by a key that the operator listed.
    Signature(KeyName),
    /// The path's own name; the client checks the content against it.
    ContentAddress,
}

/// A path info that was checked; made by [`PathInfo::verify`] alone.
///
/// ```compile_fail
/// # use muster::nix::path_info::{PathInfo, Verified};
/// fn forge(claim: PathInfo) -> Verified {
///     Verified { info: claim, basis: muster::nix::path_info::Basis::Operator }
/// }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    info: PathInfo,
    basis: Basis,
}

/// A path info that nobody the operator trusts vouches for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path} has no signature by a trusted key (it carries: {carried})")]
pub struct Untrusted {
    path: StorePath,
    carried: String,
}

impl PathInfo {
    /// Checks the claim against what its upstream is trusted with.
    pub fn verify(self, trust: &Trust, store_dir: &StoreDir) -> Result<Verified, Untrusted> {
        let basis = match trust {
            Trust::Operator => Some(Basis::Operator),
            Trust::Keys(keys) => self
                .signed_by(keys, store_dir)
                .map(|name| Basis::Signature(name.clone()))
                .or_else(|| {
                    self.proves_itself(store_dir)
                        .then_some(Basis::ContentAddress)
                }),
        };
        match basis {
            Some(basis) => Ok(Verified { info: self, basis }),
            None => Err(Untrusted {
                carried: self.carried(),
                path: self.path,
            }),
        }
    }

    /// Tells whether the path's name follows from its content address.
    pub fn proves_itself(&self, store_dir: &StoreDir) -> bool {
        let proves = |ca: &ContentAddress| ca.proves(store_dir, &self.path, &self.references);
        self.ca.as_ref().is_some_and(proves)
    }

    /// Sorts the references and drops repeated ones, as the fingerprint needs.
    pub fn normalize(&mut self) {
        self.references.sort_unstable();
        self.references.dedup();
    }

    fn signed_by(&self, keys: &[PublicKey], store_dir: &StoreDir) -> Option<&KeyName> {
        let fingerprint = fingerprint::of_path(self, store_dir);
        let verifies = |s: &&Signature| keys.iter().any(|key| key.verifies(&fingerprint, s));
        let signature = self.signatures.iter().find(verifies)?;
        Some(signature.key_name())
    }

    fn carried(&self) -> String {
        let names: Vec<_> = self
            .signatures
            .iter()
            .map(|s| s.key_name().as_str())
            .collect();
        if names.is_empty() {
            "none".to_owned()
        } else {
            names.join(", ")
        }
    }
}

impl Verified {
    /// Returns what the check rested on.
    pub fn basis(&self) -> &Basis {
        &self.basis
    }
}

impl Deref for Verified {
    type Target = PathInfo;

    fn deref(&self) -> &PathInfo {
        &self.info
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nix::signature::SecretKey;

    const SECRET: &str = "test-1:1FlgeDipndaPd3y6gxxOowecGBiNKZVjRBFQ2+Ok3faXNlsk7twXoE2Nnkww7IzIXZjk8CvLEhbPHSn+ajxdvA==";

    fn info() -> PathInfo {
        PathInfo {
            path: "xgd4ijld16zz4n65lm0jzb4cfscm9vwi-input".parse().unwrap(),
            nar_hash: NarHash::of(b"nar"),
            nar_size: 3,
            references: vec![],
            deriver: None,
            signatures: vec![],
            ca: None,
        }
    }

    #[test]
    fn unsigned_is_refused_where_keys_are_asked_for() {
        let key = SecretKey::parse(SECRET).unwrap();
        let trust = Trust::Keys(vec![key.public()]);
        let store = StoreDir::default();
        assert!(info().verify(&trust, &store).is_err());
        assert!(info().verify(&Trust::Operator, &store).is_ok());

        let mut signed = info();
        signed.signatures = vec![key.sign(&fingerprint::of_path(&signed, &store))];
        let verified = signed.clone().verify(&trust, &store).unwrap();
        assert_eq!(*verified.basis(), Basis::Signature(key.name().clone()));

        signed.nar_size = 4;
        assert!(signed.verify(&trust, &store).is_err());
    }

    #[test]
    fn a_content_address_needs_no_signature_but_must_fit() {
        let store = StoreDir::default();
        let mut claim = info();
        claim.ca = ContentAddress::parse(
            "fixed:sha256:094qif9n4cq4fdg459qzbhg1c6wywawwaaivx0k0x8xhbyx4vwic",
        );
        assert!(claim.clone().verify(&Trust::Keys(vec![]), &store).is_err());
        claim.path = "xgd4ijld16zz4n65lm0jzb4cfscm9vwi-h.txt".parse().unwrap();
        let verified = claim.verify(&Trust::Keys(vec![]), &store).unwrap();
        assert_eq!(*verified.basis(), Basis::ContentAddress);
    }
}
