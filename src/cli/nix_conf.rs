//! What this machine's Nix is set to: substituters, keys, the memory of "not there".
//!
//! Asked of the real `nix`; where there is none, `nix.conf` is read with its includes. The daemon's
//! view is what counts: settings of a user's own `nix.conf` are heeded only from trusted users.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::nix::signature::PublicKey;

/// The settings that matter for substitution.
#[derive(Clone, Debug, Default)]
pub(super) struct NixConf {
    /// Where it was read: `nix show-config`, or a file.
    pub(super) source: String,
    /// URLs as they are written, with their parameters.
    pub(super) substituters: Vec<String>,
    /// Keys as they are written; of one name the first counts.
    pub(super) trusted_public_keys: Vec<String>,
    /// Seconds for which "not there" is remembered.
    pub(super) negative_ttl: Option<u64>,
    /// Whether paths must be signed.
    pub(super) require_sigs: bool,
}

impl NixConf {
    /// Asks Nix as its daemon would see it, or reads the files; an error says why neither went.
    pub(super) fn of_daemon() -> Result<Self, String> {
        ask(&[("NIX_USER_CONF_FILES", "")]).map_or_else(read_files, Ok)
    }

    /// Asks Nix as this user sees it.
    pub(super) fn of_user() -> Option<Self> {
        ask(&[])
    }

    /// Returns the keys that count: well-formed, and the first of its name.
    pub(super) fn keys(&self) -> Vec<PublicKey> {
        let mut keys: Vec<PublicKey> = Vec::new();
        for text in &self.trusted_public_keys {
            if let Ok(key) = PublicKey::parse(text)
                && !keys.iter().any(|other| other.name() == key.name())
            {
                keys.push(key);
            }
        }
        keys
    }

    /// Returns the names that several different keys have; Nix heeds the first of each.
    pub(super) fn doubled_names(&self) -> Vec<String> {
        let mut of_name: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for key in &self.trusted_public_keys {
            let (name, base64) = key.split_once(':').unwrap_or((key, ""));
            let keys = of_name.entry(name).or_default();
            if !keys.contains(&base64) {
                keys.push(base64);
            }
        }
        let doubled = of_name.into_iter().filter(|(_, keys)| keys.len() > 1);
        doubled.map(|(name, _)| name.to_owned()).collect()
    }

    fn of_json(json: &Value, source: &str) -> Option<Self> {
        let value = |name: &str| json.get(name)?.get("value");
        let list = |name: &str| {
            let items = value(name)?.as_array()?.iter();
            Some(
                items
                    .filter_map(|v| v.as_str())
                    .map(str::to_owned)
                    .collect(),
            )
        };
        Some(Self {
            source: source.to_owned(),
            substituters: list("substituters")?,
            trusted_public_keys: list("trusted-public-keys")?,
            negative_ttl: value("narinfo-cache-negative-ttl").and_then(Value::as_u64),
            require_sigs: value("require-sigs")
                .and_then(Value::as_bool)
                .unwrap_or(true),
        })
    }

    fn of_settings(settings: &BTreeMap<String, Vec<String>>, source: &str) -> Self {
        let words = |names: [&str; 2], default: &str| {
            let find = |prefix: &str| {
                let mut given = names
                    .iter()
                    .map(|name| settings.get(&format!("{prefix}{name}")));
                given.find_map(|words| words.cloned())
            };
            let mut words = find("").unwrap_or_else(|| vec![default.to_owned()]);
            words.extend(find("extra-").unwrap_or_default());
            words
        };
        let one = |name: &str| settings.get(name)?.first().cloned();
        Self {
            source: source.to_owned(),
            substituters: words(["substituters", "binary-caches"], PUBLIC_CACHE),
            trusted_public_keys: words(
                ["trusted-public-keys", "binary-cache-public-keys"],
                PUBLIC_KEY,
            ),
            negative_ttl: one("narinfo-cache-negative-ttl").map_or(Some(3600), |t| t.parse().ok()),
            require_sigs: one("require-sigs").is_none_or(|text| text != "false"),
        }
    }
}

/// Asks by the command's new name, then by its old one.
fn ask(environment: &[(&str, &str)]) -> Option<NixConf> {
    for (words, name) in [
        (&["config", "show", "--json"][..], "nix config show"),
        (&["show-config", "--json"][..], "nix show-config"),
    ] {
        let output = Command::new("nix")
            .args(["--extra-experimental-features", "nix-command"])
            .args(words)
            .envs(environment.iter().copied())
            .output()
            .ok()?;
        let json = serde_json::from_slice(&output.stdout).ok();
        if let Some(found) = json.and_then(|json| NixConf::of_json(&json, name)) {
            return Some(found);
        }
    }
    None
}

fn read_files() -> Result<NixConf, String> {
    let dir = std::env::var_os("NIX_CONF_DIR").unwrap_or_else(|| "/etc/nix".into());
    let path = PathBuf::from(dir).join("nix.conf");
    let mut settings = BTreeMap::new();
    read_into(&path, true, 0, &mut settings)?;
    if let Ok(text) = std::env::var("NIX_CONFIG") {
        apply(&text, &path, 0, &mut settings)?;
    }
    let source = path.display().to_string();
    Ok(NixConf::of_settings(&settings, &source))
}

fn read_into(
    path: &Path,
    required: bool,
    depth: usize,
    settings: &mut BTreeMap<String, Vec<String>>,
) -> Result<(), String> {
    match std::fs::read_to_string(path) {
        Ok(text) => apply(&text, path, depth, settings),
        Err(_) if !required => Ok(()),
        Err(error) => Err(format!("cannot read {}: {error}", path.display())),
    }
}

/// Takes over `name = words` lines; `include` and `!include` are followed.
fn apply(
    text: &str,
    path: &Path,
    depth: usize,
    settings: &mut BTreeMap<String, Vec<String>>,
) -> Result<(), String> {
    if depth > INCLUDES_DEEP_MAX {
        return Err(format!("{}: includes nest too deep", path.display()));
    }
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default();
        let mut words = line.split_whitespace().map(str::to_owned);
        let (Some(name), Some(next)) = (words.next(), words.next()) else {
            continue;
        };
        match (name.as_str(), next.as_str()) {
            ("include" | "!include", file) => {
                let folder = path.parent().unwrap_or(Path::new("/"));
                read_into(&folder.join(file), name == "include", depth + 1, settings)?;
            }
            (_, "=") => {
                settings.insert(name, words.collect());
            }
            _ => {}
        }
    }
    Ok(())
}

const PUBLIC_CACHE: &str = "https://cache.nixos.org/";
const PUBLIC_KEY: &str = "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=";
const INCLUDES_DEEP_MAX: usize = 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_read_with_their_includes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nix.conf");
        std::fs::write(dir.path().join("more"), "narinfo-cache-negative-ttl = 60\n").unwrap();
        let text = "# a = b\ninclude more\n!include none\nextra-substituters = http://a?priority=3\n\
                    trusted-public-keys = k-1:AAAA k-2:BBBB k-1:CCCC # end\nrequire-sigs = true\n";
        std::fs::write(&path, text).unwrap();
        let mut settings = BTreeMap::new();
        read_into(&path, true, 0, &mut settings).unwrap();
        let conf = NixConf::of_settings(&settings, "file");
        assert_eq!(conf.substituters, [PUBLIC_CACHE, "http://a?priority=3"]);
        assert_eq!(conf.negative_ttl, Some(60));
        assert_eq!(conf.doubled_names(), ["k-1"]);
        assert!(conf.require_sigs);
        std::fs::write(&path, "include none\n").unwrap();
        assert!(read_into(&path, true, 0, &mut settings).is_err());
        std::fs::write(&path, "include nix.conf\n").unwrap();
        assert!(read_into(&path, true, 0, &mut settings).is_err());
    }
}
