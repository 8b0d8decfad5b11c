//! Realisations up to Nix 2.34: which store path an output of a content-addressed derivation became.
//!
//! Their text is JSON, as `/realisations/<id>.doi` and `QueryRealisation` carry it; the signed
//! text is the same JSON, compact, keys sorted, without `signatures`:
//!
//! ```text
//! {"dependentRealisations":{"<id>":"<hash>-<name>"},"id":"sha256:<64 hex>!out",
//!  "outPath":"<hash>-<name>","signatures":["<key name>:<base64>"]}
//! ```
//!
//! Nix 2.34 reads no `dependentRealisations` and signs and checks them as empty. Source:
//! `libstore/realisation.cc` at 2.8.0, 2.26.3, 2.33.0 and 2.34.8. Nix 2.35 has [`super::build_trace`].

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Deref;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::hash::Hash;
use super::path_info::Trust;
use super::signature::{SecretKey, Signature};
use super::store_path::StorePath;

/// The name of one derivation output: `sha256:<64 hex digits>!<output>`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DrvOutput(Box<str>);

/// What an output was realised as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Realisation {
    /// The output.
    pub id: DrvOutput,
    /// The path that it became.
    pub out_path: StorePath,
    /// Well-formed signatures by whatever key.
    pub signatures: Vec<Signature>,
    /// Outputs that this one was built from, where the store kept them.
    pub dependent_realisations: BTreeMap<DrvOutput, StorePath>,
}

/// A realisation that was checked; made by [`Realisation::verify`] alone, and alone can be signed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifiedRealisation(Realisation);

/// A realisation that nobody the operator trusts vouches for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{id} has no signature by a trusted key")]
pub struct UntrustedRealisation {
    pub(super) id: String,
}

/// A text that is no realisation or name of one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RealisationError {
    /// It is larger than any realisation.
    #[error("the text has {0} bytes, more than {JSON_BYTES_MAX}")]
    TooLarge(usize),
    /// The name is not `<hash>!<output>`.
    #[error("{0:?} does not name a derivation output")]
    Id(String),
    /// The JSON does not hold what it must.
    #[error("malformed realisation: {0}")]
    Json(String),
}

impl DrvOutput {
    /// Returns the name's text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for DrvOutput {
    type Err = RealisationError;

    fn from_str(text: &str) -> Result<Self, RealisationError> {
        let valid = text.len() <= ID_BYTES_MAX
            && text
                .split_once('!')
                .is_some_and(|(hash, output)| Hash::parse(hash).is_ok() && is_output_name(output));
        if valid {
            Ok(Self(text.into()))
        } else {
            let excerpt = text.chars().take(200).collect();
            Err(RealisationError::Id(excerpt))
        }
    }
}

impl fmt::Display for DrvOutput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for DrvOutput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Realisation {
    /// Reads the JSON, at most 1 MiB; malformed signatures are dropped, unknown fields ignored.
    pub fn parse(json: &[u8]) -> Result<Self, RealisationError> {
        if json.len() > JSON_BYTES_MAX {
            return Err(RealisationError::TooLarge(json.len()));
        }
        let malformed = |e: &dyn fmt::Display| RealisationError::Json(e.to_string());
        let raw: Raw = serde_json::from_slice(json).map_err(|e| malformed(&e))?;
        let mut dependent_realisations = BTreeMap::new();
        for (id, path) in &raw.dependent_realisations {
            let path = path.parse().map_err(|e| malformed(&e))?;
            dependent_realisations.insert(id.parse()?, path);
        }
        let signatures = raw.signatures.iter();
        Ok(Self {
            id: raw.id.parse()?,
            out_path: raw.out_path.parse().map_err(|e| malformed(&e))?,
            signatures: signatures
                .filter_map(|s| Signature::parse(s).ok())
                .collect(),
            dependent_realisations,
        })
    }

    /// Writes the JSON as Nix does: compact, keys sorted.
    pub fn render(&self) -> String {
        self.json(Some(
            self.signatures.iter().map(Signature::to_string).collect(),
        ))
    }

    /// Writes the text that a signature covers.
    pub fn fingerprint(&self) -> String {
        self.json(None)
    }

    /// Checks the claim against what its upstream is trusted with.
    pub fn verify(self, trust: &Trust) -> Result<VerifiedRealisation, UntrustedRealisation> {
        let believed = match trust {
            Trust::Operator => true,
            Trust::Keys(keys) => {
                let fingerprint = self.fingerprint();
                let verifies = |s: &Signature| keys.iter().any(|k| k.verifies(&fingerprint, s));
                self.signatures.iter().any(verifies)
            }
        };
        if believed {
            Ok(VerifiedRealisation(self))
        } else {
            let id = self.id.to_string();
            Err(UntrustedRealisation { id })
        }
    }

    fn json(&self, signatures: Option<Vec<String>>) -> String {
        let dependent_realisations = self.dependent_realisations.iter();
        let written = Written {
            dependent_realisations: dependent_realisations
                .map(|(id, path)| (id.as_str(), path.as_str()))
                .collect(),
            id: self.id.as_str(),
            out_path: self.out_path.as_str(),
            signatures,
        };
        serde_json::to_string(&written).expect("maps with text keys always serialize")
    }
}

impl VerifiedRealisation {
    /// Adds a signature by each key, in place of older ones by a key of the same name.
    ///
    /// Where there are dependent realisations each key signs twice, with and without them: Nix up to
    /// 2.33 checks the former, 2.34 the latter, and either ignores a signature that does not fit.
    pub fn sign(self, keys: &[SecretKey]) -> Realisation {
        let mut realisation = self.0;
        let mut fingerprints = vec![realisation.fingerprint()];
        if !realisation.dependent_realisations.is_empty() {
            let dependent_realisations = BTreeMap::new();
            let alone = Realisation {
                dependent_realisations,
                ..realisation.clone()
            };
            fingerprints.push(alone.fingerprint());
        }
        sign(&mut realisation.signatures, &fingerprints, keys);
        realisation
    }
}

impl Deref for VerifiedRealisation {
    type Target = Realisation;

    fn deref(&self) -> &Realisation {
        &self.0
    }
}

/// Tells whether a derivation may have an output of this name.
pub(super) fn is_output_name(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"+-._?=".contains(&b);
    !name.is_empty() && name.len() <= OUTPUT_NAME_BYTES_MAX && name.bytes().all(allowed)
}

/// Replaces the signatures by keys of these names with new ones over each fingerprint.
pub(super) fn sign(signatures: &mut Vec<Signature>, fingerprints: &[String], keys: &[SecretKey]) {
    signatures.retain(|s| keys.iter().all(|key| key.name() != s.key_name()));
    for key in keys {
        signatures.extend(fingerprints.iter().map(|text| key.sign(text)));
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    id: String,
    out_path: String,
    #[serde(default)]
    signatures: Vec<String>,
    #[serde(default)]
    dependent_realisations: BTreeMap<String, String>,
}

/// The fields in the order of their names, as Nix's JSON library sorts them.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Written<'a> {
    dependent_realisations: BTreeMap<&'a str, &'a str>,
    id: &'a str,
    out_path: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    signatures: Option<Vec<String>>,
}

const ID_BYTES_MAX: usize = 400;
const OUTPUT_NAME_BYTES_MAX: usize = 211;
pub(super) const JSON_BYTES_MAX: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nix::signature::{KeyName, PublicKey};

    // What `nix copy` of Nix 2.8.0 wrote; its store signed with two keys.
    const PLAIN: &str = include_str!("../../tests/vectors/realisation/plain.doi");
    const DEPENDENT: &str = include_str!("../../tests/vectors/realisation/dependent.doi");
    const KEYS: [&str; 2] = [
        "test-1:PHRSweHfQGggVdPwJBrhjwr12+bpNowAK1TixrpG51M=",
        "other-key.example-1:PEq8HNP0RJW8pp6E9hMNhSdhenjZD+eP/r5UOJsU5xw=",
    ];

    fn secret(name: &str) -> SecretKey {
        let name = KeyName::new(name).unwrap();
        SecretKey::from_seed(name, &zeroize::Zeroizing::new([7; 32]))
    }

    #[test]
    fn what_nix_wrote_round_trips_byte_for_byte() {
        for text in [PLAIN, DEPENDENT] {
            let read = Realisation::parse(text.as_bytes()).unwrap();
            assert_eq!(read.render(), text);
            assert_eq!(read.signatures.len(), 2);
        }
        let dependent = Realisation::parse(DEPENDENT.as_bytes()).unwrap();
        assert_eq!(dependent.dependent_realisations.len(), 1);
    }

    #[test]
    fn what_nix_signed_verifies_with_either_key_and_no_other() {
        for text in [PLAIN, DEPENDENT] {
            let read = Realisation::parse(text.as_bytes()).unwrap();
            for key in KEYS {
                let trust = Trust::Keys(vec![PublicKey::parse(key).unwrap()]);
                assert!(read.clone().verify(&trust).is_ok(), "{key}");
                let mut other = read.clone();
                other.out_path = "c61i4gz5k01hfwfm979s0m23hxb0c733-dep".parse().unwrap();
                assert!(other.verify(&trust).is_err(), "{key}");
            }
            let stranger = Trust::Keys(vec![secret("stranger").public()]);
            assert!(read.clone().verify(&stranger).is_err());
            assert!(read.verify(&Trust::Operator).is_ok());
        }
    }

    #[test]
    fn ours_is_a_signature_for_every_version_and_replaces_the_older() {
        let key = secret("ours");
        let trust = Trust::Keys(vec![key.public()]);
        let mut signed = Realisation::parse(DEPENDENT.as_bytes()).unwrap();
        for _ in 0..2 {
            let verified = signed.verify(&Trust::Operator).unwrap();
            signed = verified.sign(std::slice::from_ref(&key));
            assert_eq!(signed.signatures.len(), 4, "two of Nix, two of ours");
        }
        // Nix 2.34 forgets the dependent realisations before it checks.
        let mut newer = signed.clone();
        newer.dependent_realisations.clear();
        for read in [signed, newer] {
            assert!(read.verify(&trust).is_ok());
        }
        let plain = Realisation::parse(PLAIN.as_bytes()).unwrap();
        let plain = plain.verify(&Trust::Operator).unwrap();
        assert_eq!(plain.sign(&[key]).signatures.len(), 3);
    }

    #[test]
    fn foreign_texts_are_refused() {
        for text in ["", "{}", "[]", "null", "{\"id\":\"x\",\"outPath\":\"y\"}"] {
            assert!(Realisation::parse(text.as_bytes()).is_err(), "{text}");
        }
        let large = vec![b' '; JSON_BYTES_MAX + 1];
        let refused = Realisation::parse(&large);
        assert_eq!(refused, Err(RealisationError::TooLarge(large.len())));
        for id in ["", "x!out", "sha256:0!out", "sha256:!", "!", "out"] {
            assert!(id.parse::<DrvOutput>().is_err(), "{id}");
        }
        let hex = "bbed9561758b929a7ac595c80c9f97f9f4a0fea8e45893d7d642c742cc8d32e9";
        for output in ["", "a/b", "a b", "\u{e9}"] {
            let id = format!("sha256:{hex}!{output}");
            assert!(id.parse::<DrvOutput>().is_err(), "{id}");
        }
    }

    #[test]
    fn malformed_signatures_are_dropped() {
        let text = PLAIN.replace("test-1:", "test-1");
        let read = Realisation::parse(text.as_bytes()).unwrap();
        assert_eq!(read.signatures.len(), 1);
    }
}
