//! What is asked about: a store path, a hash part, or a link to a path.

use std::path::Path;

use anyhow::bail;

use crate::nix::store_path::{StoreDir, StorePath, StorePathHash};

/// A path, or its hash part where that is all that is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Target {
    Path(StorePath),
    Hash(StorePathHash),
}

impl Target {
    /// Reads a store path or anything below it, its name, its hash part, or a link that leads to it.
    pub(super) fn parse(text: &str, store_dir: &StoreDir) -> anyhow::Result<Self> {
        if let Some(hash) = StorePathHash::parse(text) {
            return Ok(Self::Hash(hash));
        }
        if let Some(path) = in_store(text, store_dir).or_else(|| text.parse().ok()) {
            return Ok(Self::Path(path));
        }
        let led = Path::new(text)
            .canonicalize()
            .or_else(|_| std::fs::read_link(text));
        let led = led
            .ok()
            .and_then(|path| in_store(path.to_str()?, store_dir));
        match led {
            Some(path) => Ok(Self::Path(path)),
            None => bail!("{text:?} {}", refusal(text, store_dir)),
        }
    }

    pub(super) fn hash(&self) -> StorePathHash {
        match self {
            Self::Path(path) => path.hash(),
            Self::Hash(hash) => *hash,
        }
    }
}

/// Says what is wrong with a text that names no store path, and what to do.
fn refusal(text: &str, store_dir: &StoreDir) -> String {
    let name = text.rsplit('/').find(|name| !name.is_empty());
    let foreign = name.is_some_and(|name| name.parse::<StorePath>().is_ok());
    let led = Path::new(text).canonicalize();
    if text.contains('#') {
        return "is a flake's name and no store path: name what `nix eval --raw` prints for its \
                .outPath, or .drvPath with --closure"
            .to_owned();
    }
    if foreign && text.starts_with('/') {
        return format!("is not in {store_dir}, the store that is asked about (store-dir)");
    }
    match led {
        Ok(led) if led != Path::new(text) => {
            format!("leads to {}, which is not in {store_dir}", led.display())
        }
        Err(_) if text.starts_with(['/', '.']) && !text.starts_with(store_dir.as_str()) => {
            "is not there: name a link that leads to a store path, such as ./result".to_owned()
        }
        _ => format!(
            "is no store path: it must be like {store_dir}/<hash>-<name>, a hash part of 32 characters \
             (0-9 and a-z without e, o, t and u), or a link such as ./result"
        ),
    }
}

/// Takes the first name below the store directory.
fn in_store(text: &str, store_dir: &StoreDir) -> Option<StorePath> {
    let below = text.strip_prefix(store_dir.as_str())?.strip_prefix('/')?;
    below.split('/').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_named_as_people_do() {
        let dir = StoreDir::default();
        let name = "1q8w6gl1ll0mwfkqc3c2yx005s6wwfrl-hello-2.10";
        let hash = Target::parse("1q8w6gl1ll0mwfkqc3c2yx005s6wwfrl", &dir).unwrap();
        for text in [
            name.to_owned(),
            format!("/nix/store/{name}"),
            format!("/nix/store/{name}/bin/hello"),
        ] {
            let target = Target::parse(&text, &dir).unwrap();
            assert_eq!(target, Target::Path(name.parse().unwrap()), "{text}");
            assert_eq!(target.hash(), hash.hash());
        }
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("result");
        std::os::unix::fs::symlink(format!("/nix/store/{name}"), &link).unwrap();
        let target = Target::parse(link.to_str().unwrap(), &dir).unwrap();
        assert_eq!(target, Target::Path(name.parse().unwrap()));
        for (text, words) in [
            ("hello", "is no store path"),
            ("", "is no store path"),
            ("/etc/passwd", "is no store path"),
            ("/nix/store", "like /nix/store/<hash>-<name>"),
            ("/nix/store/hello", "like /nix/store/<hash>-<name>"),
            ("1q8w6gl1ll0mwfkqc3c2yx005s6wwfre", "without e, o, t and u"),
            ("nixpkgs#hello", "nix eval --raw"),
            ("./none", "is not there"),
            (&format!("/gnu/store/{name}"), "is not in /nix/store"),
        ] {
            let error = Target::parse(text, &dir).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
        let other = folder.path().join("other");
        std::os::unix::fs::symlink("/dev/null", &other).unwrap();
        let error = Target::parse(other.to_str().unwrap(), &dir).unwrap_err();
        assert!(error.to_string().contains("leads to /dev/null"), "{error}");
    }
}
