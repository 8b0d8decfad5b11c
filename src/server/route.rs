//! From a request's target to what is asked for; below this file no client string exists.

use percent_encoding::percent_decode_str;

use crate::nix::build_trace::BuildTraceKey;
use crate::nix::realisation::DrvOutput;
use crate::nix::store_path::{StorePath, StorePathHash};
use crate::substituter::nar_url::NarUrl;

/// What a client asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// `/nix-cache-info`
    CacheInfo,
    /// `/<hash>.narinfo`
    NarInfo(StorePathHash),
    /// `/nar/…`
    Nar(NarUrl),
    /// `/log/<hash>-<name>.drv`
    Log(StorePath),
    /// `/realisations/<hash>!<output>.doi`, up to Nix 2.34
    Realisation(DrvOutput),
    /// `/build-trace-v2/<drv>/<output>.doi`, Nix 2.35 and later
    BuildTrace(BuildTraceKey),
    /// `/muster/catalog`
    Catalog,
    /// `/muster/closure/<hash>`
    Closure(StorePathHash),
    /// `/healthz`
    Health,
    /// `/public-key`
    PublicKey,
    /// `/`
    Root,
    /// Anything else: not here.
    Unknown,
}

impl Route {
    /// Reads a path with its query, still percent-encoded.
    pub fn parse(path: &str, query: Option<&str>) -> Self {
        let Some(path) = path.strip_prefix('/') else {
            return Self::Unknown;
        };
        if let Some(digits) = path.strip_suffix(".narinfo") {
            return StorePathHash::parse(digits).map_or(Self::Unknown, Self::NarInfo);
        }
        let Ok(path) = percent_decode_str(path).decode_utf8() else {
            return Self::Unknown;
        };
        Self::parse_decoded(&path, query).unwrap_or(Self::Unknown)
    }

    fn parse_decoded(path: &str, query: Option<&str>) -> Option<Self> {
        Some(match path {
            "" => Self::Root,
            "nix-cache-info" => Self::CacheInfo,
            "muster/catalog" => Self::Catalog,
            "healthz" => Self::Health,
            "public-key" => Self::PublicKey,
            path => {
                if let Some(file) = path.strip_prefix("nar/") {
                    Self::Nar(NarUrl::parse(file, query)?)
                } else if let Some(file) = path.strip_prefix("log/") {
                    let derivation: StorePath = file.parse().ok()?;
                    derivation
                        .is_derivation()
                        .then_some(Self::Log(derivation))?
                } else if let Some(digits) = path.strip_prefix("muster/closure/") {
                    Self::Closure(StorePathHash::parse(digits)?)
                } else if let Some(file) = path.strip_prefix("realisations/") {
                    Self::Realisation(file.strip_suffix(".doi")?.parse().ok()?)
                } else {
                    let file = path.strip_prefix("build-trace-v2/")?;
                    Self::BuildTrace(BuildTraceKey::parse(file)?)
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: &str = "1q8w6gl1ll0mwfkqc3c2yx005s6wwfrl";
    const NAR: &str = "0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73";
    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn parse(path: &str) -> Route {
        Route::parse(path, None)
    }

    #[test]
    fn what_real_clients_ask() {
        assert_eq!(parse("/nix-cache-info"), Route::CacheInfo);
        assert!(matches!(
            parse(&format!("/{PATH}.narinfo")),
            Route::NarInfo(_)
        ));
        assert!(matches!(
            parse(&format!("/nar/{PATH}-{NAR}.nar.zst")),
            Route::Nar(_)
        ));
        let log = format!("/log/{PATH}-hello-2.10.drv");
        assert!(matches!(parse(&log), Route::Log(_)));
        for bang in ["!", "%21"] {
            let path = format!("/realisations/sha256:{HEX}{bang}out.doi");
            assert!(matches!(parse(&path), Route::Realisation(_)), "{path}");
        }
    }

    #[test]
    fn what_musters_ask_each_other() {
        assert_eq!(parse("/muster/catalog"), Route::Catalog);
        let closure = parse(&format!("/muster/closure/{PATH}"));
        assert!(matches!(closure, Route::Closure(hash) if hash.to_string() == PATH));
    }

    #[test]
    fn build_traces_of_nix_2_35() {
        let trace = format!("/build-trace-v2/{PATH}-hello.drv/out.doi");
        assert!(matches!(parse(&trace), Route::BuildTrace(_)), "{trace}");
    }

    #[test]
    fn what_does_not_parse_is_not_here() {
        for path in [
            "",
            "x",
            "/x",
            "/.narinfo",
            "/../../etc/passwd",
            "/%2e%2e/x",
            "/%ff.narinfo",
            "/nar/",
            "/nar/../x.nar",
            "/log/x",
            &format!("/log/{PATH}-hello"),
            "/realisations/x.doi",
            "/build-trace-v2/x",
            "/muster/closure/",
            &format!("/muster/closure/{PATH}-hello"),
            &format!("/{PATH}.ls"),
            &format!("/é{PATH}.narinfo"),
        ] {
            assert_eq!(parse(path), Route::Unknown, "{path}");
        }
    }
}
