//! Realisations: which store path an output of a content-addressed derivation became.
//!
//! Their text is JSON, as `/realisations/<id>.doi` and `QueryRealisation` carry it; the signed
//! text is the same JSON, compact, keys sorted, without `signatures`. Source:
//! `libstore/realisation.cc`.

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

/// A realisation that was checked; made by [`Realisation::verify`] alone, and only it is signed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifiedRealisation(Realisation);

/// A realisation that nobody the operator trusts vouches for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("realisation {0} has no signature by a trusted key")]
pub struct UntrustedRealisation(DrvOutput);

/// A text that is no realisation or name of one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RealisationError {
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
            && text.split_once('!').is_some_and(|(hash, output)| {
                let allowed = |b: u8| b.is_ascii_alphanumeric() || b"+-._?=".contains(&b);
                Hash::parse(hash).is_ok() && !output.is_empty() && output.bytes().all(allowed)
            });
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
    /// Reads the JSON; malformed signatures are dropped, unknown fields ignored.
    pub fn parse(json: &[u8]) -> Result<Self, RealisationError> {
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
        let trusted = match trust {
            Trust::Operator => true,
            Trust::Keys(keys) => {
                let fingerprint = self.fingerprint();
                let by_key = |s: &Signature| keys.iter().any(|k| k.verifies(&fingerprint, s));
                self.signatures.iter().any(by_key)
            }
        };
        if trusted {
            Ok(VerifiedRealisation(self))
        } else {
            Err(UntrustedRealisation(self.id))
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
    /// Adds a signature by each key, in place of an older one by a key of the same name.
    pub fn sign(self, keys: &[SecretKey]) -> Realisation {
        let mut realisation = self.0;
        let fingerprint = realisation.fingerprint();
        for key in keys {
            realisation
                .signatures
                .retain(|s| s.key_name() != key.name());
            realisation.signatures.push(key.sign(&fingerprint));
        }
        realisation
    }
}

impl Deref for VerifiedRealisation {
    type Target = Realisation;

    fn deref(&self) -> &Realisation {
        &self.0
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
