//! Addresses of binary caches, and which addresses a narinfo may send us to.
//!
//! The `URL:` of a narinfo is the upstream's word: it may stay below the cache's own address, or
//! lead to a host that the operator allowed, and nowhere else.

use std::fmt;

use hyper::Uri;

/// The address of a binary cache: `http` or `https`, a host, and a path that ends with a slash.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct CacheUrl {
    scheme: Scheme,
    authority: Box<str>,
    /// Begins and ends with a slash.
    path: Box<str>,
}

/// How the cache is spoken to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scheme {
    /// In clear.
    Http,
    /// Over TLS.
    Https,
}

/// A URL that is not followed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// It does not parse as an address of a cache.
    #[error("{0:?} is not an http or https URL")]
    Malformed(String),
    /// It would leave the cache's folder.
    #[error("{0:?} climbs out of the cache")]
    Climbs(String),
    /// It leads to a host that the operator did not allow.
    #[error("{url:?} leads to {host}, which is not among the upstream's allowed-nar-hosts")]
    ForeignHost {
        /// The URL as it was given.
        url: String,
        /// Its host and port.
        host: String,
    },
    /// A redirect would leave encryption.
    #[error("{0:?} leads from https down to http")]
    Unencrypted(String),
}

impl CacheUrl {
    /// Reads an address; user and password in it are refused, they belong into a file.
    pub fn parse(text: &str) -> Result<Self, UrlError> {
        let malformed = || UrlError::Malformed(excerpt(text));
        let uri: Uri = text.parse().map_err(|_| malformed())?;
        let scheme = match uri.scheme_str() {
            Some("http") => Scheme::Http,
            Some("https") => Scheme::Https,
            _ => return Err(malformed()),
        };
        let authority = uri.authority().ok_or_else(malformed)?;
        if authority.as_str().contains('@') || authority.host().is_empty() {
            return Err(malformed());
        }
        let authority = authority.as_str().to_ascii_lowercase();
        let authority = authority.strip_suffix(scheme.port()).unwrap_or(&authority);
        let mut path = uri.path().to_owned();
        if !path.ends_with('/') {
            path.push('/');
        }
        Ok(Self {
            scheme,
            authority: authority.into(),
            path: path.into(),
        })
    }

    /// Returns how the cache is spoken to.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// Returns the host without port, in lower case.
    pub fn host(&self) -> &str {
        match self.authority.rsplit_once(':') {
            // The colons of an IPv6 address are in brackets.
            Some((host, port)) if !port.contains(']') => host,
            _ => &self.authority,
        }
    }

    /// Returns the address of a file that we name ourselves, such as `nix-cache-info`.
    pub fn file(&self, name: &str) -> Result<Uri, UrlError> {
        let text = format!("{self}{name}");
        text.parse()
            .map_err(|_| UrlError::Malformed(excerpt(&text)))
    }

    /// Resolves what a narinfo of this cache names as its `URL`.
    ///
    /// Relative ones are below the cache's folder, as Nix has it; a query may follow. Absolute ones
    /// lead to this scheme, host and port, or to one of the `allowed` hosts: `host`, `host:port` or `*`.
    pub fn resolve(&self, url: &str, allowed: &[String]) -> Result<Uri, UrlError> {
        let malformed = || UrlError::Malformed(excerpt(url));
        let place = url.split(['?', '#']).next().unwrap_or_default();
        if place.is_empty() || place.contains('\\') || url.contains('#') {
            return Err(malformed());
        }
        if climbs(place) {
            return Err(UrlError::Climbs(excerpt(url)));
        }
        if place.contains("://") {
            let uri: Uri = url.parse().map_err(|_| malformed())?;
            let target = Self::parse(url)?;
            let same = target.scheme == self.scheme && target.authority == self.authority;
            if !same && !target.is_among(allowed) {
                return Err(target.foreign(url));
            }
            return Ok(uri);
        }
        if place.starts_with("//") {
            return Err(malformed());
        }
        if place.starts_with('/') {
            let root = format!("{}://{}{url}", self.scheme, self.authority);
            return root.parse().map_err(|_| malformed());
        }
        self.file(url)
    }

    /// Finds where a redirect leads: to this host, or to one that was allowed, and never from https
    /// down to http.
    ///
    /// `from` is the address that answered with this `location`.
    pub fn redirect(
        &self,
        from: &Uri,
        location: &str,
        allowed: &[String],
    ) -> Result<Uri, UrlError> {
        let malformed = || UrlError::Malformed(excerpt(location));
        let base = Self::parse(&from.to_string())?;
        let location = location.split('#').next().unwrap_or_default();
        // A scheme stands before all else; behind it there may be another address, as in a query.
        let before = location.split(['/', '?']).next().unwrap_or_default();
        let text = if before.ends_with(':') {
            location.to_owned()
        } else if location.starts_with('?') {
            format!(
                "{}://{}{}{location}",
                base.scheme,
                base.authority,
                from.path()
            )
        } else if location.starts_with("//") {
            format!("{}:{location}", base.scheme)
        } else if location.starts_with('/') {
            format!("{}://{}{location}", base.scheme, base.authority)
        } else {
            let (folder, _) = from.path().rsplit_once('/').unwrap_or_default();
            format!("{}://{}{folder}/{location}", base.scheme, base.authority)
        };
        let uri: Uri = text.parse().map_err(|_| malformed())?;
        let target = Self::parse(&text)?;
        if climbs(uri.path()) {
            return Err(UrlError::Climbs(excerpt(location)));
        }
        if base.scheme == Scheme::Https && target.scheme == Scheme::Http {
            return Err(UrlError::Unencrypted(excerpt(location)));
        }
        // A cache on one host may move from http to https.
        if target.authority != self.authority && !target.is_among(allowed) {
            return Err(target.foreign(location));
        }
        Ok(uri)
    }

    /// Tells whether an address is of this very scheme, host and port, and so may see its credentials.
    pub fn is_home_of(&self, uri: &Uri) -> bool {
        Self::parse(&uri.to_string())
            .is_ok_and(|other| other.scheme == self.scheme && other.authority == self.authority)
    }

    fn is_among(&self, allowed: &[String]) -> bool {
        allowed.iter().any(|host| host == "*" || self.is_at(host))
    }

    fn foreign(&self, url: &str) -> UrlError {
        UrlError::ForeignHost {
            url: excerpt(url),
            host: self.authority.to_string(),
        }
    }

    fn is_at(&self, host: &str) -> bool {
        let host = host.to_ascii_lowercase();
        *self.authority == *host || self.host() == host
    }
}

impl fmt::Display for CacheUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}{}", self.scheme, self.authority, self.path)
    }
}

impl fmt::Debug for CacheUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Scheme {
    /// Returns the end of an authority that says nothing.
    fn port(self) -> &'static str {
        match self {
            Self::Http => ":80",
            Self::Https => ":443",
        }
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Http => "http",
            Self::Https => "https",
        })
    }
}

/// Tells whether a path has a `..` part, written plainly or percent-encoded.
fn climbs(path: &str) -> bool {
    let decoded = percent_encoding::percent_decode_str(path).decode_utf8_lossy();
    decoded.split(['/', '\\']).any(|part| part == "..")
}

fn excerpt(text: &str) -> String {
    text.chars().take(300).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache() -> CacheUrl {
        CacheUrl::parse("https://cache.example/some/prefix").unwrap()
    }

    #[test]
    fn urls_below_the_cache_are_followed() {
        let resolve = |url| cache().resolve(url, &[]).map(|uri| uri.to_string());
        for (url, expected) in [
            (
                "nar/x.nar.xz",
                "https://cache.example/some/prefix/nar/x.nar.xz",
            ),
            (
                "nar/x.nar?hash=y",
                "https://cache.example/some/prefix/nar/x.nar?hash=y",
            ),
            ("/nar/x.nar", "https://cache.example/nar/x.nar"),
            (
                "https://cache.example/nar/x.nar",
                "https://cache.example/nar/x.nar",
            ),
        ] {
            assert_eq!(resolve(url).as_deref(), Ok(expected), "{url}");
        }
    }

    #[test]
    fn others_are_refused_unless_allowed() {
        for url in [
            "../x",
            "nar/../../x",
            "nar/%2e%2e/x",
            "nar/..%2fx",
            "//evil.example/x",
            "http://cache.example/x",
            "https://evil.example/x",
            "https://cache.example@evil.example/x",
            "https://cache.example:444/x",
            "file:///etc/passwd",
            "",
            "nar/x y",
        ] {
            assert!(cache().resolve(url, &[]).is_err(), "{url}");
        }
        let allowed = ["cdn.example".to_owned()];
        assert!(cache().resolve("https://cdn.example/x", &allowed).is_ok());
        assert!(
            cache()
                .resolve("https://cdn.example:8443/x", &allowed)
                .is_ok()
        );
        assert!(
            cache()
                .resolve("https://evil-cdn.example/x", &allowed)
                .is_err()
        );
    }

    #[test]
    fn redirects_stay_at_home_or_where_it_is_allowed() {
        let from: Uri = "https://cache.example/some/prefix/nar/x".parse().unwrap();
        let redirect = |to: &str, allowed: &[String]| {
            let found = cache().redirect(&from, to, allowed);
            found.map(|uri| uri.to_string())
        };
        for (to, expected) in [
            ("y?a=b", "https://cache.example/some/prefix/nar/y?a=b"),
            ("/y#z", "https://cache.example/y"),
            ("//cache.example/y", "https://cache.example/y"),
            ("https://cache.example:443/y", "https://cache.example:443/y"),
        ] {
            assert_eq!(redirect(to, &[]).as_deref(), Ok(expected), "{to}");
        }
        let cdn = ["cdn.example".to_owned()];
        assert!(redirect("https://cdn.example/y?signature=z", &cdn).is_ok());
        assert!(redirect("https://cdn.example/y", &["*".to_owned()]).is_ok());
        for to in [
            "http://cache.example/y",
            "http://cdn.example/y",
            "https://evil.example/y",
            "//evil.example/y",
            "https://a@cdn.example/y",
            "../y",
            "file:///etc/passwd",
        ] {
            assert!(redirect(to, &cdn).is_err(), "{to}");
        }
        let moved = |to: &str| {
            let from: Uri = "https://cache.example/a/b".parse().unwrap();
            cache().redirect(&from, to, &[]).unwrap().to_string()
        };
        assert_eq!(moved("c"), "https://cache.example/a/c");
        assert_eq!(moved("?token=1"), "https://cache.example/a/b?token=1");
        let nested = "/download?url=https://other.example/c";
        assert_eq!(moved(nested), format!("https://cache.example{nested}"));
        let plain = CacheUrl::parse("http://cache.example").unwrap();
        let from: Uri = "http://cache.example/x".parse().unwrap();
        assert!(
            plain
                .redirect(&from, "https://cache.example/x", &[])
                .is_ok()
        );
    }

    #[test]
    fn credentials_stay_at_home() {
        let is_home = |uri: &str| cache().is_home_of(&uri.parse().unwrap());
        assert!(is_home("https://cache.example/other") && is_home("https://CACHE.example:443/"));
        for uri in [
            "http://cache.example/",
            "https://cache.example:444/",
            "https://cdn.example/",
            "https://cache.example.evil/",
        ] {
            assert!(!is_home(uri), "{uri}");
        }
        assert_eq!(CacheUrl::parse("http://[::1]:80/").unwrap().host(), "[::1]");
        assert_eq!(CacheUrl::parse("http://[::1]:81/").unwrap().host(), "[::1]");
    }

    #[test]
    fn credentials_in_the_address_are_refused() {
        assert!(CacheUrl::parse("https://user:password@cache.example").is_err());
        assert!(CacheUrl::parse("ftp://cache.example").is_err());
        assert!(CacheUrl::parse("cache.example").is_err());
    }
}
