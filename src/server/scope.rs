//! What musters offer each other, and which part of the upstreams a request is about.
//!
//! ```text
//! GET /nix-cache-info                                  ->  Muster-Offers: own-store, closure, h2c
//! GET … Muster-Scope: own-store                        ->  answered by this machine's own store alone, or not at all
//! GET /muster/closure/<hash> Muster-Scope: own-store   ->  all narinfos of a closure, see `codec::closure_wire`
//! ```
//!
//! A muster sends the second to whoever answers with the first, and to nobody else. So a question goes from one
//! muster to the next and no further, whatever they name as their upstreams. A muster without a store of its own
//! does not offer it and is asked as any cache is; musters of that kind that name each other find out by a
//! question that comes back. Other values mean nothing, and the request is answered as any other.
//!
//! `h2c` offers HTTP/2 to who begins with it, without TLS and upgrade. Who is offered it makes sure by asking so once, as a
//! proxy in between may pass the header on and know nothing of it.

use hyper::HeaderMap;

/// Who is asked for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All upstreams.
    All,
    /// This machine's own store.
    OwnStore,
}

impl Scope {
    /// Reads it from a request.
    pub fn of(headers: &HeaderMap) -> Self {
        match headers.get(HEADER) {
            Some(value) if value == OWN_STORE => Self::OwnStore,
            _ => Self::All,
        }
    }
}

/// The header of a request that names its scope.
const HEADER: &str = "muster-scope";

/// The header that says what a muster can do beyond what all caches can.
pub(super) const OFFERS: &str = "muster-offers";

/// The scope.
const OWN_STORE: &str = "own-store";

/// Returns what a muster offers: with a store of its own this scope, and whole closures within it.
///
/// A list with commas. A peer that knows the first word alone is asked for narinfos one by one.
pub(super) fn offer(has_own_store: bool) -> &'static str {
    match has_own_store {
        true => "own-store, closure, h2c",
        false => "h2c",
    }
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;

    use super::*;

    #[test]
    fn only_the_known_word_narrows_a_request() {
        let with = |value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(HEADER, HeaderValue::from_static(value));
            Scope::of(&headers)
        };
        assert_eq!(Scope::of(&HeaderMap::new()), Scope::All);
        assert_eq!(with("own-store"), Scope::OwnStore);
        assert_eq!(with("everything"), Scope::All);
    }
}
