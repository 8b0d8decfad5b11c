//! Numbers, texts and lists as the worker protocol writes them.
//!
//! [`Reader`] reads what [`super::shape`] found complete; it bounds nothing itself, but cannot be
//! led beyond its bytes.

use bytes::{BufMut as _, BytesMut};

use super::ProtocolError;

/// Appends numbers and texts to a buffer.
pub(in crate::nix) struct Writer<'a>(pub(in crate::nix) &'a mut BytesMut);

/// Takes numbers and texts from the front of complete bytes.
pub(in crate::nix) struct Reader<'a>(pub(in crate::nix) &'a [u8]);

impl Writer<'_> {
    pub(in crate::nix) fn number(&mut self, number: u64) {
        self.0.put_u64_le(number);
    }

    pub(in crate::nix) fn text(&mut self, text: &str) {
        self.texts_joined(&[text]);
    }

    /// Writes one text from its parts.
    pub(in crate::nix) fn texts_joined(&mut self, parts: &[&str]) {
        let len: usize = parts.iter().map(|part| part.len()).sum();
        self.number(len as u64);
        for part in parts {
            self.0.put_slice(part.as_bytes());
        }
        self.0.put_bytes(0, padding(len));
    }
}

impl<'a> Reader<'a> {
    pub(in crate::nix) fn number(&mut self) -> Result<u64, ProtocolError> {
        let (word, rest) = self.0.split_first_chunk().ok_or(TRUNCATED)?;
        self.0 = rest;
        Ok(u64::from_le_bytes(*word))
    }

    pub(in crate::nix) fn text(&mut self) -> Result<&'a [u8], ProtocolError> {
        let len = usize::try_from(self.number()?).map_err(|_| TRUNCATED)?;
        let (text, rest) = self.0.split_at_checked(len).ok_or(TRUNCATED)?;
        self.0 = rest.get(padding(len)..).ok_or(TRUNCATED)?;
        Ok(text)
    }

    /// Reads a list of texts, each through `read`.
    pub(in crate::nix) fn texts<T, E: From<ProtocolError>>(
        &mut self,
        mut read: impl FnMut(&'a [u8]) -> Result<T, E>,
    ) -> Result<Vec<T>, E> {
        let count = self.number()?;
        // Never more than the bytes can hold, whatever the count says.
        let possible = self.0.len() / 8;
        let mut items = Vec::with_capacity(usize::try_from(count).unwrap_or(0).min(possible));
        for _ in 0..count {
            items.push(read(self.text()?)?);
        }
        Ok(items)
    }
}

/// Returns how many zeros follow a text of `len` bytes.
pub(in crate::nix) fn padding(len: usize) -> usize {
    len.wrapping_neg() % 8
}

const TRUNCATED: ProtocolError = ProtocolError::Unexpected {
    what: "end of a message",
    value: 0,
};
