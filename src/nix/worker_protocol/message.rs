//! What a daemon says between a question and its reply: log lines, activities, an error, the end.
//!
//! Each message is a word that names it and fields behind it. An error ends the question in place
//! of a reply; `STDERR_LAST` says that the reply follows. Source: `processStderrReturn` in
//! `worker-protocol-connection.cc`, `readError` in `serialise.cc`.

use super::shape::Field;
use super::wire::Reader;
use super::{ProtocolError, Version};

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// The reply follows.
    Last,
    /// The question failed.
    Error(String),
    /// A line for people.
    Log(String),
    /// Progress, of no use here.
    Progress,
}

/// Returns the shape of the message that `word` names.
pub(super) fn shape(word: u64, version: Version) -> Result<&'static [Field], ProtocolError> {
    Ok(match word {
        LAST => &[],
        ERROR => error_shape(version),
        NEXT => &[Field::Text],
        START_ACTIVITY => &[
            Field::Number,
            Field::Number,
            Field::Number,
            Field::Text,
            Field::LogFields,
            Field::Number,
        ],
        STOP_ACTIVITY => &[Field::Number],
        RESULT => &[Field::Number, Field::Number, Field::LogFields],
        // READ and WRITE belong to operations that are never asked for.
        value => {
            return Err(ProtocolError::Unexpected {
                what: "message",
                value,
            });
        }
    })
}

/// Returns the shape of an error: structured since 1.26, before that a text and an exit status.
pub(super) fn error_shape(version: Version) -> &'static [Field] {
    if version.has(26) {
        &[
            Field::Text,
            Field::Number,
            Field::Text,
            Field::Text,
            Field::Zero,
            Field::Traces,
        ]
    } else {
        &[Field::Text, Field::Number]
    }
}

/// Reads the fields of the message that `word` names; `bytes` are complete.
pub(super) fn decode(word: u64, bytes: &[u8], version: Version) -> Result<Message, ProtocolError> {
    let mut reader = Reader(bytes);
    Ok(match word {
        LAST => Message::Last,
        ERROR => Message::Error(decode_error(bytes, version)?),
        NEXT => Message::Log(plain(reader.text()?)),
        START_ACTIVITY => {
            for _ in ["activity", "level", "type"] {
                reader.number()?;
            }
            match plain(reader.text()?) {
                line if line.is_empty() => Message::Progress,
                line => Message::Log(line),
            }
        }
        _ => Message::Progress,
    })
}

/// Reads the text of an error whose fields are complete.
pub(super) fn decode_error(bytes: &[u8], version: Version) -> Result<String, ProtocolError> {
    let mut reader = Reader(bytes);
    if version.has(26) {
        reader.text()?;
        reader.number()?;
        reader.text()?;
    }
    Ok(plain(reader.text()?))
}

/// Makes a foreign text fit for a log or error line: one line without colours, cut at 2,000
/// characters.
///
/// Nix sends ANSI colour sequences even to clients that are no terminal.
pub fn plain(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let mut line = String::with_capacity(text.len().min(PLAIN_CHARS_MAX));
    let mut chars = text.chars();
    for _ in 0..PLAIN_CHARS_MAX {
        match chars.next() {
            None => break,
            Some('\u{1b}') => skip_escape(&mut chars),
            Some(c) if !c.is_control() && c != ' ' => line.push(c),
            Some(_) if line.ends_with(' ') => {}
            Some(_) => line.push(' '),
        }
    }
    line.truncate(line.trim_end().len());
    line
}

/// Skips what follows the escape character of a sequence like `ESC [ 35 ; 1 m`.
fn skip_escape(chars: &mut std::str::Chars<'_>) {
    let mut ahead = chars.clone();
    if ahead.next() != Some('[') {
        return;
    }
    let parameters = ahead.by_ref().take(ESCAPE_CHARS_MAX);
    if parameters.into_iter().any(|c| ('@'..='~').contains(&c)) {
        *chars = ahead;
    }
}

pub(super) const LAST: u64 = 0x616c_7473;
pub(super) const ERROR: u64 = 0x6378_7470;
const NEXT: u64 = 0x6f6c_6d67;
const START_ACTIVITY: u64 = 0x5354_5254;
const STOP_ACTIVITY: u64 = 0x5354_4f50;
const RESULT: u64 = 0x5253_4c54;

const PLAIN_CHARS_MAX: usize = 2000;
const ESCAPE_CHARS_MAX: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_texts_become_one_plain_line() {
        let colours = b"path '\x1b[35;1m/nix/store/x\x1b[0m' is not\r\n valid\n";
        assert_eq!(plain(colours), "path '/nix/store/x' is not valid");
        assert_eq!(plain(b"a\x1b"), "a");
        assert_eq!(plain(b"a\x1b[35"), "a[35");
        assert_eq!(plain(b"\xff\0"), "\u{fffd}");
        assert_eq!(plain(&[b'x'; 5000]).len(), 2000);
    }

    #[test]
    fn unknown_words_have_no_shape() {
        for word in [0, 1, 0x6461_7461, 0x6461_7416] {
            assert!(shape(word, Version::OURS).is_err());
        }
    }
}
