//! Where a message ends: its shape is walked as its bytes arrive, each length looked at once.
//!
//! This is what makes decoding linear however small the chunks are, and what bounds memory: a
//! length is believed only as far as bytes have come, and never beyond its bound.

use super::wire::{Reader, padding};
use super::{MESSAGE_BYTES_MAX, ProtocolError, TEXT_BYTES_MAX};

/// One field of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::nix) enum Field {
    /// A number.
    Number,
    /// A number that must be zero.
    Zero,
    /// A number; if it is zero, the message ends with it.
    Present,
    /// A text.
    Text,
    /// A list of texts.
    Texts,
    /// A list of numbers and texts, each behind a word that tells which: 0 or 1.
    LogFields,
    /// A list of texts, each behind a zero: the traces of an error.
    Traces,
}

/// A walk along a shape that can be taken up when more bytes are there.
#[derive(Clone, Debug)]
pub(in crate::nix) struct Scan {
    shape: &'static [Field],
    /// Bytes walked.
    at: usize,
    /// Items left of the list that is being walked.
    items: Option<u64>,
    /// The word before the item that is being walked.
    tag: Option<u64>,
}

impl Scan {
    pub(in crate::nix) fn new(shape: &'static [Field]) -> Self {
        Self {
            shape,
            at: 0,
            items: None,
            tag: None,
        }
    }

    /// Returns the length of the message once all of it is in `buffer`; `None`: more is needed.
    ///
    /// `buffer` must begin with the same bytes as in earlier calls.
    pub(in crate::nix) fn resume(&mut self, buffer: &[u8]) -> Result<Option<usize>, ProtocolError> {
        while let Some((field, rest)) = self.shape.split_first() {
            let walked = match field {
                Field::Number => self.number(buffer),
                Field::Zero => self.zero(buffer)?,
                Field::Present => match self.number(buffer) {
                    Some(0) => return Ok(Some(self.at)),
                    number => number,
                },
                Field::Text => self.text(buffer)?,
                Field::Texts | Field::LogFields | Field::Traces => self.list(*field, buffer)?,
            };
            if walked.is_none() {
                return Ok(None);
            }
            self.shape = rest;
        }
        Ok(Some(self.at))
    }

    fn list(&mut self, field: Field, buffer: &[u8]) -> Result<Option<u64>, ProtocolError> {
        let mut items = match self.items {
            Some(items) => items,
            None => match self.number(buffer) {
                Some(items) => bounded("list", items, MESSAGE_BYTES_MAX / 8)?,
                None => return Ok(None),
            },
        };
        while items > 0 {
            bounded("message", self.at as u64, MESSAGE_BYTES_MAX)?;
            self.items = Some(items);
            if self.item(field, buffer)?.is_none() {
                return Ok(None);
            }
            self.tag = None;
            items -= 1;
        }
        self.items = None;
        Ok(Some(0))
    }

    fn item(&mut self, field: Field, buffer: &[u8]) -> Result<Option<u64>, ProtocolError> {
        if field == Field::Texts {
            return self.text(buffer);
        }
        if self.tag.is_none() {
            self.tag = self.number(buffer);
        }
        match (field, self.tag) {
            (_, None) => Ok(None),
            (Field::LogFields, Some(0)) => Ok(self.number(buffer)),
            (Field::LogFields, Some(1)) | (Field::Traces, Some(0)) => self.text(buffer),
            (_, Some(value)) => Err(ProtocolError::Unexpected {
                what: "kind of field",
                value,
            }),
        }
    }

    fn number(&mut self, buffer: &[u8]) -> Option<u64> {
        let number = Reader(buffer.get(self.at..)?).number().ok()?;
        self.at += 8;
        Some(number)
    }

    fn zero(&mut self, buffer: &[u8]) -> Result<Option<u64>, ProtocolError> {
        match self.number(buffer) {
            Some(value) if value != 0 => Err(ProtocolError::Unexpected {
                what: "number in place of zero",
                value,
            }),
            number => Ok(number),
        }
    }

    fn text(&mut self, buffer: &[u8]) -> Result<Option<u64>, ProtocolError> {
        let Some(length) = self.number(buffer) else {
            return Ok(None);
        };
        bounded("text", length, TEXT_BYTES_MAX)?;
        bounded("message", length + self.at as u64, MESSAGE_BYTES_MAX)?;
        let bytes = usize::try_from(length).unwrap_or(usize::MAX);
        let zeros = padding(bytes);
        let rest = buffer.get(self.at..).unwrap_or_default();
        let Some(padding) = rest.get(bytes..bytes + zeros) else {
            // Only the length is looked at again when more bytes are there.
            self.at -= 8;
            return Ok(None);
        };
        if let Some(value) = padding.iter().find(|byte| **byte != 0) {
            return Err(ProtocolError::Unexpected {
                what: "padding",
                value: u64::from(*value),
            });
        }
        self.at += bytes + zeros;
        Ok(Some(length))
    }
}

pub(super) fn bounded(what: &'static str, length: u64, max: u64) -> Result<u64, ProtocolError> {
    if length > max {
        return Err(ProtocolError::TooLong { what, length, max });
    }
    Ok(length)
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;

    use super::super::wire::Writer;
    use super::*;

    #[test]
    fn every_prefix_needs_more_and_the_whole_is_found() {
        let mut bytes = BytesMut::new();
        let mut out = Writer(&mut bytes);
        out.number(1);
        out.text("hello");
        out.number(2);
        out.text("");
        out.text("12345678");
        out.number(2);
        out.number(0);
        out.number(7);
        out.number(1);
        out.text("x");
        let shape = &[Field::Present, Field::Text, Field::Texts, Field::LogFields];
        let len = bytes.len();
        bytes.extend_from_slice(b"the next message");
        let mut scan = Scan::new(shape);
        for end in 0..len {
            assert_eq!(scan.resume(&bytes[..end]), Ok(None), "{end}");
        }
        assert_eq!(scan.resume(&bytes), Ok(Some(len)));
        assert_eq!(Scan::new(shape).resume(&bytes), Ok(Some(len)));
        assert_eq!(Scan::new(shape).resume(&[0; 8]), Ok(Some(8)));
    }

    #[test]
    fn lengths_are_not_believed() {
        let text = u64::MAX.to_le_bytes();
        let error = Scan::new(&[Field::Text]).resume(&text).unwrap_err();
        assert!(matches!(error, ProtocolError::TooLong { what: "text", .. }));
        let error = Scan::new(&[Field::Texts]).resume(&text).unwrap_err();
        assert!(matches!(error, ProtocolError::TooLong { what: "list", .. }));
        let many = vec![0; 17 << 20];
        let mut bytes = (2_u64 << 20).to_le_bytes().to_vec();
        bytes.extend(many);
        assert!(Scan::new(&[Field::Texts]).resume(&bytes).is_err());
    }
}
