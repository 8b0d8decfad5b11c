//! The `Range` header of a request for an uncompressed NAR.
//!
//! Nix resumes with `bytes=N-`. One range is honoured; several, or what is no range, is answered
//! with the whole, as RFC 9110 section 14.2 allows.

use std::ops::Range;

use hyper::HeaderMap;
use hyper::header::{IF_RANGE, RANGE};

use super::error::Error;

/// Tells whether a part is asked for, of whatever form.
pub(super) fn is_asked_for(headers: &HeaderMap) -> bool {
    headers.contains_key(RANGE) && !headers.contains_key(IF_RANGE)
}

/// Returns the part that is asked for; `None`: the whole.
pub(super) fn of(headers: &HeaderMap, size_bytes: u64) -> Result<Option<Range<u64>>, Error> {
    // Nothing here has a validator that a client could name.
    if !is_asked_for(headers) {
        return Ok(None);
    }
    let Some(value) = headers.get(RANGE).and_then(|value| value.to_str().ok()) else {
        return Ok(None);
    };
    let Ok(parsed) = http_range_header::parse_range_header(value) else {
        return Ok(None);
    };
    if parsed.ranges.len() != 1 {
        return Ok(None);
    }
    match parsed.validate(size_bytes) {
        Ok(ranges) => Ok(ranges.first().map(|r| *r.start()..r.end() + 1)),
        Err(_) => Err(Error::Range { size_bytes }),
    }
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;

    use super::*;

    fn parse(value: &'static str) -> Result<Option<Range<u64>>, Error> {
        let mut headers = HeaderMap::new();
        headers.insert(RANGE, HeaderValue::from_static(value));
        of(&headers, 1000)
    }

    #[test]
    fn one_range_is_honoured() {
        assert_eq!(parse("bytes=0-"), Ok(Some(0..1000)));
        assert_eq!(parse("bytes=10-"), Ok(Some(10..1000)));
        assert_eq!(parse("bytes=10-19"), Ok(Some(10..20)));
        assert_eq!(parse("bytes=-10"), Ok(Some(990..1000)));
        assert_eq!(parse("bytes=999-"), Ok(Some(999..1000)));
        assert_eq!(parse("bytes=10-5000"), Ok(Some(10..1000)));
    }

    #[test]
    fn what_is_no_single_range_means_the_whole() {
        assert_eq!(of(&HeaderMap::new(), 1000), Ok(None));
        assert_eq!(parse("bytes=0-1,5-6"), Ok(None));
        assert_eq!(parse("lines=1-2"), Ok(None));
        assert_eq!(parse("x"), Ok(None));
    }

    #[test]
    fn behind_the_end_there_is_nothing() {
        assert_eq!(parse("bytes=1000-"), Err(Error::Range { size_bytes: 1000 }));
    }
}
