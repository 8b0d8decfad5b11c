//! Which signatures a path lacks, and making them.
//!
//! Ed25519 is deterministic: a path whose signature equals the one that would be made needs no
//! verifying, which costs twice as much as signing. Source: `CmdSign` in `nix/sigs.cc`, which signs
//! content-addressed paths too; every Nix accepts those without.

use super::fingerprint;
use super::path_info::PathInfo;
use super::signature::{PublicKey, SecretKey, Signature};
use super::store_path::StoreDir;

/// The keys that every path shall carry a signature of.
#[derive(Clone, Debug)]
pub struct Signer {
    keys: Vec<SecretKey>,
    store_dir: StoreDir,
}

/// What a path needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Need {
    /// Nothing: its name follows from its content address.
    ContentAddressed,
    /// Nothing: it carries a valid signature by each key.
    Signed,
    /// These signatures, at least one.
    Signatures(Vec<Signature>),
}

impl Signer {
    /// Takes keys of different names, and the directory of the paths that they sign.
    pub fn new(keys: Vec<SecretKey>, store_dir: StoreDir) -> Self {
        Self { keys, store_dir }
    }

    /// Returns the public halves of the keys.
    pub fn public_keys(&self) -> Vec<PublicKey> {
        self.keys.iter().map(SecretKey::public).collect()
    }

    /// Returns the directory of the paths.
    pub fn store_dir(&self) -> &StoreDir {
        &self.store_dir
    }

    /// Decides what a path needs, and makes it: about 20 µs for each key.
    ///
    /// A signature under a key's name that the key did not make does not count.
    pub fn need(&self, info: &PathInfo) -> Need {
        if info.proves_itself(&self.store_dir) {
            return Need::ContentAddressed;
        }
        let fingerprint = fingerprint::of_path(info, &self.store_dir);
        let lacking = |key: &SecretKey| {
            let made = key.sign(&fingerprint);
            let mut named = info
                .signatures
                .iter()
                .filter(|s| s.key_name() == key.name());
            let public = key.public();
            // Another implementation may have made it with randomness of its own.
            let carried = named.any(|s| *s == made || public.verifies(&fingerprint, s));
            (!carried).then_some(made)
        };
        let signatures: Vec<_> = self.keys.iter().filter_map(lacking).collect();
        if signatures.is_empty() {
            Need::Signed
        } else {
            Need::Signatures(signatures)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nix::content_address::ContentAddress;
    use crate::nix::hash::NarHash;
    use crate::nix::signature::KeyName;
    use zeroize::Zeroizing;

    fn key(name: &str, byte: u8) -> SecretKey {
        SecretKey::from_seed(KeyName::new(name).unwrap(), &Zeroizing::new([byte; 32]))
    }

    fn info() -> PathInfo {
        PathInfo {
            path: "xgd4ijld16zz4n65lm0jzb4cfscm9vwi-h.txt".parse().unwrap(),
            nar_hash: NarHash::of(b"nar"),
            nar_size: 3,
            references: vec![],
            deriver: None,
            signatures: vec![],
            ca: None,
        }
    }

    fn signer(keys: &[SecretKey]) -> Signer {
        Signer::new(keys.to_vec(), StoreDir::default())
    }

    #[test]
    fn only_what_is_missing_is_made() {
        let (a, b) = (key("a-1", 1), key("b-1", 2));
        let both = signer(&[a.clone(), b.clone()]);
        let Need::Signatures(made) = both.need(&info()) else {
            panic!("nothing to sign");
        };
        let fingerprint = fingerprint::of_path(&info(), &StoreDir::default());
        assert!(a.public().verifies(&fingerprint, &made[0]));
        assert!(b.public().verifies(&fingerprint, &made[1]));

        let mut signed = info();
        signed.signatures = vec![made[1].clone()];
        assert_eq!(both.need(&signed), Need::Signatures(vec![made[0].clone()]));
        signed.signatures = made;
        assert_eq!(both.need(&signed), Need::Signed);
    }

    #[test]
    fn a_bogus_signature_of_the_keys_name_does_not_count() {
        let ours = signer(&[key("a-1", 1)]);
        let mut bogus = info();
        let fingerprint = fingerprint::of_path(&bogus, &StoreDir::default());
        // Of another key that has our key's name, as after a rotation that kept it.
        bogus.signatures = vec![key("a-1", 9).sign(&fingerprint)];
        let Need::Signatures(made) = ours.need(&bogus) else {
            panic!("taken for signed");
        };
        // The store then keeps both, and the right one counts.
        bogus.signatures.extend(made);
        assert_eq!(ours.need(&bogus), Need::Signed);
    }

    #[test]
    fn what_only_claims_a_content_address_is_signed() {
        let ours = signer(&[key("a-1", 1)]);
        let mut addressed = info();
        addressed.ca = ContentAddress::parse(
            "fixed:sha256:094qif9n4cq4fdg459qzbhg1c6wywawwaaivx0k0x8xhbyx4vwic",
        );
        assert_eq!(ours.need(&addressed), Need::ContentAddressed);
        addressed.path = "xgd4ijld16zz4n65lm0jzb4cfscm9vwi-other".parse().unwrap();
        assert!(matches!(ours.need(&addressed), Need::Signatures(_)));
    }
}
