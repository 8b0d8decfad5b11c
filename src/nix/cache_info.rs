//! The text of `nix-cache-info`: the first thing that a client asks a binary cache.
//!
//! ```text
//! StoreDir: /nix/store
//! WantMassQuery: 1          ask for many paths at once without fear
//! Priority: 30              lower is asked first; cache.nixos.org says 40
//! ```
//!
//! Source: `BinaryCacheStore::init` in `libstore/binary-cache-store.cc`. Nix gives a cache up whose
//! `StoreDir` differs, and Nix fails when `Priority` is no number.

use super::store_path::{StoreDir, StorePathError};

/// What a binary cache says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheInfo {
    /// The directory of all its paths.
    pub store_dir: StoreDir,
    /// Whether it likes to be asked for many paths at once.
    pub want_mass_query: bool,
    /// Its place among several substituters, lower first.
    pub priority: u32,
}

impl CacheInfo {
    /// Reads what a cache says; whatever it leaves out or garbles has Nix's default.
    ///
    /// Only a `StoreDir` that is no directory is an error: a narinfo of such a cache names other
    /// paths than ours. The first 100 lines count.
    pub fn parse(text: &str) -> Result<Self, StorePathError> {
        let mut info = Self::default();
        for line in text.lines().take(LINES_MAX) {
            let Some((name, value)) = line.split_once(':') else {
                continue;
            };
            let value = value.trim();
            match name {
                "StoreDir" => info.store_dir = StoreDir::new(value)?,
                "WantMassQuery" => info.want_mass_query = value == "1",
                "Priority" => info.priority = value.parse().unwrap_or(PRIORITY_DEFAULT),
                _ => {}
            }
        }
        Ok(info)
    }

    /// Writes the text, a newline at its end.
    pub fn render(&self) -> String {
        let Self {
            store_dir,
            want_mass_query,
            priority,
        } = self;
        let want_mass_query = u8::from(*want_mass_query);
        format!("StoreDir: {store_dir}\nWantMassQuery: {want_mass_query}\nPriority: {priority}\n")
    }
}

impl Default for CacheInfo {
    /// What Nix assumes of a cache whose `nix-cache-info` is empty.
    fn default() -> Self {
        Self {
            store_dir: StoreDir::default(),
            want_mass_query: false,
            priority: PRIORITY_DEFAULT,
        }
    }
}

const LINES_MAX: usize = 100;
const PRIORITY_DEFAULT: u32 = 0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_and_read_alike() {
        let info = CacheInfo {
            store_dir: StoreDir::new("/gnu/store").unwrap(),
            want_mass_query: true,
            priority: 30,
        };
        let text = "StoreDir: /gnu/store\nWantMassQuery: 1\nPriority: 30\n";
        assert_eq!(info.render(), text);
        assert_eq!(CacheInfo::parse(text), Ok(info));
    }

    #[test]
    fn what_is_left_out_or_garbled_has_the_default() {
        let default = CacheInfo::default();
        for text in [
            "",
            "StoreDir: /nix/store\n",
            "no colon\nPriority: x\nColour: red",
        ] {
            assert_eq!(CacheInfo::parse(text), Ok(default.clone()), "{text}");
        }
        let crlf = CacheInfo::parse("WantMassQuery:1\r\nPriority:  41\r\n").unwrap();
        assert!(crlf.want_mass_query);
        assert_eq!(crlf.priority, 41);
        assert!(CacheInfo::parse("StoreDir: store\n").is_err());
    }
}
