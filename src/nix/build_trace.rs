//! Build trace entries: what realisations became in Nix 2.35.
//!
//! The key is the path of the resolved derivation and the name of its output; it is in the address, and
//! the file holds the value alone. The signed text is both, compact, keys sorted, without `signatures`:
//!
//! ```text
//! /build-trace-v2/<hash>-<name>.drv/<output>.doi
//!     {"outPath":"<hash>-<name>","signatures":[{"keyName":"<name>","sig":"<base64>"}]}
//! signed:
//!     {"key":{"drvPath":"<hash>-<name>.drv","outputName":"<output>"},"value":{"outPath":"<hash>-<name>"}}
//! ```
//!
//! The key of an older realisation is a hash that cannot be had from the path, so neither is made from
//! the other. Sources: `libstore/realisation.cc`, `binary-cache-store.cc` and
//! `libutil/signature/local-keys.cc` at 2.35.0 and 2.36, the manual's "Build Trace Entry" version 3.

use std::fmt;
use std::ops::Deref;

use serde::{Deserialize, Serialize};

use super::path_info::Trust;
use super::realisation::{
    JSON_BYTES_MAX, RealisationError, UntrustedRealisation, is_output_name, sign,
};
use super::signature::{SecretKey, Signature};
use super::store_path::StorePath;

/// The name of an entry: a derivation and one of its outputs.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BuildTraceKey {
    derivation: StorePath,
    output: Box<str>,
}

/// What an output became.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuildTraceEntry {
    /// Of which output.
    pub key: BuildTraceKey,
    /// The path that it became.
    pub out_path: StorePath,
    /// Well-formed signatures by whatever key.
    pub signatures: Vec<Signature>,
}

/// An entry that was checked; made by [`BuildTraceEntry::verify`] alone, and alone can be signed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifiedBuildTraceEntry(BuildTraceEntry);

impl BuildTraceKey {
    /// Makes a key; `None` when the path is no derivation or an output cannot have the name.
    pub fn new(derivation: StorePath, output: &str) -> Option<Self> {
        let valid = derivation.is_derivation() && is_output_name(output);
        let output = output.into();
        valid.then_some(Self { derivation, output })
    }

    /// Reads `<hash>-<name>.drv/<output>.doi`, as it follows `build-trace-v2/`.
    pub fn parse(file: &str) -> Option<Self> {
        let (derivation, output) = file.strip_suffix(".doi")?.split_once('/')?;
        Self::new(derivation.parse().ok()?, output)
    }

    /// Returns the path of the derivation, in which no output of another derivation is left open.
    pub fn derivation(&self) -> &StorePath {
        &self.derivation
    }

    /// Returns the name of the output.
    pub fn output(&self) -> &str {
        &self.output
    }
}

impl fmt::Display for BuildTraceKey {
    /// Writes the file name that [`BuildTraceKey::parse`] reads.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}.doi", self.derivation, self.output)
    }
}

impl BuildTraceEntry {
    /// Reads the value of a key, at most 1 MiB of JSON.
    ///
    /// Signatures may be objects or, as Nix reads them too, texts; malformed ones are dropped.
    pub fn parse(key: BuildTraceKey, json: &[u8]) -> Result<Self, RealisationError> {
        if json.len() > JSON_BYTES_MAX {
            return Err(RealisationError::TooLarge(json.len()));
        }
        let malformed = |e: &dyn fmt::Display| RealisationError::Json(e.to_string());
        let raw: RawValue = serde_json::from_slice(json).map_err(|e| malformed(&e))?;
        let signatures = raw.signatures.iter().filter_map(RawSignature::read);
        Ok(Self {
            key,
            out_path: raw.out_path.parse().map_err(|e| malformed(&e))?,
            signatures: signatures.collect(),
        })
    }

    /// Writes the value as Nix does: compact, keys sorted.
    pub fn render(&self) -> String {
        let signatures = self.signatures.iter().map(Signature::to_string);
        let texts: Vec<_> = signatures.collect();
        let split = |text| str::split_once(text, ':');
        let pairs = texts.iter().filter_map(|text| split(text));
        json(&Value {
            out_path: self.out_path.as_str(),
            signatures: Some(
                pairs
                    .map(|(key_name, sig)| StructuredSignature { key_name, sig })
                    .collect(),
            ),
        })
    }

    /// Writes the text that a signature covers.
    pub fn fingerprint(&self) -> String {
        json(&Signed {
            key: Key {
                drv_path: self.key.derivation.as_str(),
                output_name: &self.key.output,
            },
            value: Value {
                out_path: self.out_path.as_str(),
                signatures: None,
            },
        })
    }

    /// Checks the claim against what its upstream is trusted with.
    pub fn verify(self, trust: &Trust) -> Result<VerifiedBuildTraceEntry, UntrustedRealisation> {
        let believed = match trust {
            Trust::Operator => true,
            Trust::Keys(keys) => {
                let fingerprint = self.fingerprint();
                let verifies = |s: &Signature| keys.iter().any(|k| k.verifies(&fingerprint, s));
                self.signatures.iter().any(verifies)
            }
        };
        if believed {
            Ok(VerifiedBuildTraceEntry(self))
        } else {
            let id = self.key.to_string();
            Err(UntrustedRealisation { id })
        }
    }
}

impl VerifiedBuildTraceEntry {
    /// Adds a signature by each key, in place of an older one by a key of the same name.
    pub fn sign(self, keys: &[SecretKey]) -> BuildTraceEntry {
        let mut entry = self.0;
        let fingerprint = entry.fingerprint();
        sign(&mut entry.signatures, &[fingerprint], keys);
        entry
    }
}

impl Deref for VerifiedBuildTraceEntry {
    type Target = BuildTraceEntry;

    fn deref(&self) -> &BuildTraceEntry {
        &self.0
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawValue {
    out_path: String,
    #[serde(default)]
    signatures: Vec<RawSignature>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum RawSignature {
    Text(String),
    #[serde(rename_all = "camelCase")]
    Structured {
        key_name: String,
        sig: String,
    },
}

impl RawSignature {
    fn read(&self) -> Option<Signature> {
        let signature = match self {
            Self::Text(text) => Signature::parse(text),
            Self::Structured { key_name, sig } => Signature::parse(&format!("{key_name}:{sig}")),
        };
        signature.ok()
    }
}

/// Fields stand in the order of their names here and below, as Nix's JSON library sorts them.
#[derive(Serialize)]
struct Signed<'a> {
    key: Key<'a>,
    value: Value<'a>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Key<'a> {
    drv_path: &'a str,
    output_name: &'a str,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Value<'a> {
    out_path: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    signatures: Option<Vec<StructuredSignature<'a>>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct StructuredSignature<'a> {
    key_name: &'a str,
    sig: &'a str,
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("structs of texts always serialize")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nix::signature::KeyName;

    const DERIVATION: &str = "lpifnrpglcy07zx5rachvz941jw9vsmj-ca.drv";
    const OUT_PATH: &str = "pdz9ww5hfy84ni0j1axgk4bjn1y4vb7c-ca";

    fn entry() -> BuildTraceEntry {
        let key = BuildTraceKey::parse(&format!("{DERIVATION}/out.doi")).unwrap();
        let value = format!("{{\"outPath\":\"{OUT_PATH}\",\"signatures\":[]}}");
        BuildTraceEntry::parse(key, value.as_bytes()).unwrap()
    }

    fn secret(name: &str) -> SecretKey {
        let name = KeyName::new(name).unwrap();
        SecretKey::from_seed(name, &zeroize::Zeroizing::new([7; 32]))
    }

    #[test]
    fn fingerprint_has_key_and_value() {
        assert_eq!(
            entry().fingerprint(),
            format!(
                "{{\"key\":{{\"drvPath\":\"{DERIVATION}\",\"outputName\":\"out\"}},\
                 \"value\":{{\"outPath\":\"{OUT_PATH}\"}}}}"
            )
        );
    }

    #[test]
    fn written_and_read_alike() {
        assert_eq!(
            entry().render(),
            format!("{{\"outPath\":\"{OUT_PATH}\",\"signatures\":[]}}")
        );
        let keys = [secret("a"), secret("b")];
        let signed = entry().verify(&Trust::Operator).unwrap().sign(&keys);
        let text = signed.render();
        let (name, base64) = signed.signatures[0]
            .to_string()
            .split_once(':')
            .map(|(name, base64)| (name.to_owned(), base64.to_owned()))
            .unwrap();
        assert!(text.contains(&format!("{{\"keyName\":\"{name}\",\"sig\":\"{base64}\"}}")));
        let read = BuildTraceEntry::parse(signed.key.clone(), text.as_bytes()).unwrap();
        assert_eq!(read, signed);
        for key in &keys {
            let trust = Trust::Keys(vec![key.public()]);
            assert!(read.clone().verify(&trust).is_ok());
        }
        let again = read.verify(&Trust::Operator).unwrap().sign(&keys);
        assert_eq!(again, signed);
    }

    #[test]
    fn a_signature_holds_for_its_key_only() {
        let key = secret("a");
        let trust = Trust::Keys(vec![key.public()]);
        assert!(entry().verify(&trust).is_err());
        let mut signed = entry().verify(&Trust::Operator).unwrap().sign(&[key]);
        signed.key = BuildTraceKey::parse(&format!("{DERIVATION}/dev.doi")).unwrap();
        assert!(signed.verify(&trust).is_err());
    }

    #[test]
    fn signatures_may_be_texts_and_malformed_ones_are_dropped() {
        let signed = entry()
            .verify(&Trust::Operator)
            .unwrap()
            .sign(&[secret("a")]);
        let text = signed.signatures[0].to_string();
        let value = format!(
            "{{\"outPath\":\"{OUT_PATH}\",\"signatures\":[\"{text}\",\"x\",{{\"keyName\":\"a\",\"sig\":\"!\"}}]}}"
        );
        let read = BuildTraceEntry::parse(signed.key.clone(), value.as_bytes());
        assert_eq!(read, Ok(signed));
    }

    #[test]
    fn foreign_names_and_texts_are_refused() {
        for file in [
            "",
            "x",
            "/out.doi",
            &format!("{DERIVATION}/out"),
            &format!("{DERIVATION}/.doi"),
            &format!("{DERIVATION}/a/b.doi"),
            &format!("{DERIVATION}.doi"),
            &format!("{OUT_PATH}/out.doi"),
            &format!("../{DERIVATION}/out.doi"),
        ] {
            assert_eq!(BuildTraceKey::parse(file), None, "{file}");
        }
        let key = BuildTraceKey::parse(&format!("{DERIVATION}/out.doi")).unwrap();
        assert_eq!(key.to_string(), format!("{DERIVATION}/out.doi"));
        for text in ["", "{}", "[]", "{\"outPath\":\"x\"}", "{\"outPath\":1}"] {
            assert!(BuildTraceEntry::parse(key.clone(), text.as_bytes()).is_err());
        }
    }
}
