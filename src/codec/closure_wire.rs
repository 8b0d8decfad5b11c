//! A closure as one muster tells it to another: the narinfos of a path and of all that it refers to.
//!
//! ```text
//! closure = "muster-closure-1\n" { length (4 bytes), narinfo } 0 (4 bytes); all numbers little-endian
//! ```
//!
//! The top comes first, every other path behind one that refers to it, each once. The zero says that this is the
//! whole closure: whatever ends without it was cut. What a narinfo says is the reader's to judge.

use bytes::{BufMut as _, Bytes, BytesMut};

/// Bytes that are no whole closure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClosureError {
    /// It does not begin with the line that names the version.
    #[error("it is no closure, or one of another version")]
    Version,
    /// It ends before its end.
    #[error("it was cut")]
    Cut,
    /// Something follows its end.
    #[error("something follows its end")]
    Trailing,
    /// A narinfo is longer than the bound.
    #[error("a narinfo of {0} bytes")]
    Length(usize),
    /// There are more narinfos than the bound.
    #[error("it has more than {0} paths")]
    Count(usize),
}

/// Returns what a closure begins with.
pub const fn begin() -> Bytes {
    Bytes::from_static(VERSION)
}

/// Frames some narinfos; an empty one, or one of more than 1 MiB, cannot be told: `None`.
pub fn frames(narinfos: &[Bytes]) -> Option<Bytes> {
    let length = narinfos.iter().map(|text| text.len() + LENGTH_BYTES).sum();
    let mut framed = BytesMut::with_capacity(length);
    for text in narinfos {
        let length = u32::try_from(text.len()).ok();
        framed.put_u32_le(length.filter(|_| (1..=NARINFO_BYTES_MAX).contains(&text.len()))?);
        framed.extend_from_slice(text);
    }
    Some(framed.freeze())
}

/// Returns what a whole closure ends with.
pub const fn end() -> Bytes {
    Bytes::from_static(&[0; LENGTH_BYTES])
}

/// Reads a whole closure of at most so many paths; the texts share its bytes.
pub fn read(closure: Bytes, paths_max: usize) -> Result<Vec<Bytes>, ClosureError> {
    if !closure.starts_with(VERSION) {
        return Err(ClosureError::Version);
    }
    let mut rest = closure.slice(VERSION.len()..);
    let mut texts = Vec::new();
    loop {
        let (length, _) = rest
            .split_first_chunk::<LENGTH_BYTES>()
            .ok_or(ClosureError::Cut)?;
        let length = usize::try_from(u32::from_le_bytes(*length)).unwrap_or(usize::MAX);
        rest = rest.slice(LENGTH_BYTES..);
        match length {
            0 if rest.is_empty() => return Ok(texts),
            0 => return Err(ClosureError::Trailing),
            1..=NARINFO_BYTES_MAX => {}
            _ => return Err(ClosureError::Length(length)),
        }
        if length > rest.len() {
            return Err(ClosureError::Cut);
        }
        if texts.len() == paths_max {
            return Err(ClosureError::Count(paths_max));
        }
        texts.push(rest.split_to(length));
    }
}

/// Feeds foreign bytes to the reader; what it accepts is written as it was.
#[doc(hidden)]
pub fn fuzz(bytes: &[u8]) {
    if let Ok(texts) = read(Bytes::copy_from_slice(bytes), FUZZED_PATHS_MAX) {
        let framed = frames(&texts).unwrap_or_default();
        assert_eq!([begin(), framed, end()].concat(), bytes);
    }
}

const VERSION: &[u8] = b"muster-closure-1\n";
const LENGTH_BYTES: usize = 4;
const NARINFO_BYTES_MAX: usize = 1 << 20;
const FUZZED_PATHS_MAX: usize = 1000;

#[cfg(test)]
mod tests {
    use super::*;

    fn written(texts: &[&'static str]) -> Vec<u8> {
        let texts: Vec<_> = texts
            .iter()
            .map(|text| Bytes::from_static(text.as_bytes()))
            .collect();
        [begin(), frames(&texts).unwrap(), end()].concat()
    }

    #[test]
    fn written_and_read_alike() {
        for texts in [&[][..], &["top"], &["top", "a", "bc"]] {
            let read = read(written(texts).into(), 3).unwrap();
            assert_eq!(read, texts);
        }
        assert_eq!(frames(&[Bytes::new()]), None);
        assert_eq!(
            frames(&[Bytes::from(vec![b'x'; NARINFO_BYTES_MAX + 1])]),
            None
        );
    }

    #[test]
    fn cut_anywhere_it_is_no_closure() {
        let whole = written(&["top", "a", "bc"]);
        for length in 0..whole.len() {
            let cut = Bytes::copy_from_slice(&whole[..length]);
            assert!(read(cut, 10).is_err(), "{length}");
        }
    }

    #[test]
    fn each_bound_is_told() {
        let whole = written(&["top", "a", "bc"]);
        assert_eq!(read(whole.clone().into(), 2), Err(ClosureError::Count(2)));
        let trailing = [&whole[..], b"x"].concat();
        assert_eq!(read(trailing.into(), 3), Err(ClosureError::Trailing));
        let long = [VERSION, &[255; 8]].concat();
        assert!(matches!(read(long.into(), 3), Err(ClosureError::Length(_))));
        assert_eq!(
            read(Bytes::from_static(b"<html>"), 3),
            Err(ClosureError::Version)
        );
    }

    #[test]
    fn mutated_bytes_do_no_harm() {
        let whole = written(&["top", "a", "bc"]);
        for place in 0..whole.len() {
            for value in [0, 1, 2, 127, 255] {
                let mut bytes = whole.clone();
                bytes[place] = value;
                fuzz(&bytes);
            }
        }
    }
}
