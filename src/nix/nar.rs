//! The NAR grammar: finds the end of an archive in a stream, and refuses what is none.
//!
//! It is not an unpacker: contents of files are skipped, names are looked at and forgotten. The
//! bytes may come in chunks cut anywhere. Memory is bounded by depth times name, 16 KiB, whatever
//! the archive claims.
//!
//! ```text
//! archive   = str("nix-archive-1") node
//! node      = str("(") str("type") kind str(")")
//! kind      = str("regular") [ str("executable") str("") ] str("contents") str(bytes)
//!           | str("symlink") str("target") str(text)
//!           | str("directory") { str("entry") str("(") str("name") str(text) str("node") node str(")") }
//! str(s)    = length as 64-bit little-endian, s, zero bytes up to a multiple of 8
//! ```
//!
//! Names of one directory are strictly sorted by their bytes. Bounds as in `libutil/archive.cc` of
//! Nix: 64 nested nodes, names of 255 and symlink targets of 4095 bytes.

/// Follows one NAR through a stream of chunks.
#[derive(Clone, Debug)]
pub struct NarParser {
    at: At,
    expect: Expect,
    /// The current token as far as earlier chunks brought it.
    token: Vec<u8>,
    /// The last name seen in each open directory, one behind the other.
    names: Vec<u8>,
    /// Where in `names` each open directory's begins.
    directories: Vec<usize>,
    offset: u64,
    size_max: u64,
}

/// How far a chunk brought the parser.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of the chunk that belong to the NAR; all of them unless it ended.
    pub consumed: usize,
    /// Whether the NAR is complete.
    pub ended: bool,
}

/// Bytes that are no NAR; offsets count from its first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NarError {
    /// A length is beyond the bound of its place or of the whole NAR.
    #[error("malformed NAR: a length of {length} at byte {offset} is out of bounds")]
    Length {
        /// Where the length stands.
        offset: u64,
        /// Its value.
        length: u64,
    },
    /// Another token stands where the grammar wants one.
    #[error("malformed NAR: no {expected} at byte {offset}")]
    Token {
        /// Where the token ends.
        offset: u64,
        /// What should be there.
        expected: &'static str,
    },
    /// A name or symlink target is empty or has a forbidden byte, or a name is `.` or `..`.
    #[error("malformed NAR: a forbidden name or symlink target ends at byte {offset}")]
    Name {
        /// Where the name ends.
        offset: u64,
    },
    /// The names of a directory are not strictly sorted.
    #[error("malformed NAR: directory entries are not sorted at byte {offset}")]
    Order {
        /// Where the second name ends.
        offset: u64,
    },
    /// Padding has a byte that is not zero.
    #[error("malformed NAR: padding is not zero at byte {offset}")]
    Padding {
        /// Where the byte stands.
        offset: u64,
    },
    /// Directories are nested deeper than Nix accepts.
    #[error("malformed NAR: nested deeper than {DEPTH_MAX}")]
    Depth,
}

/// What kind of bytes come next.
#[derive(Clone, Copy, Debug)]
enum At {
    Length { word: [u8; 8], have: u8 },
    Token { len: u16 },
    Contents { left: u64, padding: u8 },
    Padding { left: u8 },
    End,
}

/// Which token the grammar wants next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expect {
    Magic,
    NodeOpen,
    Type,
    Kind,
    ContentsOrExecutable,
    ExecutableValue,
    ContentsTag,
    Contents,
    NodeClose,
    TargetTag,
    Target,
    EntryOrClose,
    EntryOpen,
    NameTag,
    Name,
    NodeTag,
    EntryClose,
    Nothing,
}

impl NarParser {
    /// Starts at the first byte of a NAR of unknown size.
    pub fn new() -> Self {
        Self::with_size_max(u64::MAX)
    }

    /// Starts at the first byte of a NAR that must not be longer than `size_max` bytes.
    ///
    /// A length that leads beyond it is refused as soon as it is read.
    pub fn with_size_max(size_max: u64) -> Self {
        Self {
            at: At::LENGTH,
            expect: Expect::Magic,
            token: Vec::new(),
            names: Vec::new(),
            directories: Vec::new(),
            offset: 0,
            size_max,
        }
    }

    /// Returns how many bytes were accepted.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Takes the next bytes of the stream; what follows the NAR is left alone.
    ///
    /// After an error the parser is of no further use.
    pub fn push(&mut self, chunk: &[u8]) -> Result<Progress, NarError> {
        let mut rest = chunk;
        while !rest.is_empty() {
            let taken = match self.at {
                At::End => break,
                At::Length { word, have } => self.push_length(word, have, rest)?,
                At::Token { len } => self.push_token(usize::from(len), rest)?,
                At::Contents { left, padding } => {
                    let taken = rest.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                    self.offset += taken as u64;
                    self.at = match left - taken as u64 {
                        0 => At::after_token(padding),
                        left => At::Contents { left, padding },
                    };
                    taken
                }
                At::Padding { left } => {
                    let taken = rest.len().min(usize::from(left));
                    if let Some(place) = rest.iter().take(taken).position(|byte| *byte != 0) {
                        let offset = self.offset + place as u64;
                        return Err(NarError::Padding { offset });
                    }
                    self.offset += taken as u64;
                    self.at = At::after_token(left.saturating_sub(low_byte(taken)));
                    self.end_if_complete();
                    taken
                }
            };
            rest = rest.get(taken..).unwrap_or_default();
        }
        Ok(Progress {
            consumed: chunk.len() - rest.len(),
            ended: matches!(self.at, At::End),
        })
    }

    fn push_length(&mut self, mut word: [u8; 8], have: u8, rest: &[u8]) -> Result<usize, NarError> {
        let gap = word.iter_mut().skip(usize::from(have));
        let taken = gap.zip(rest).map(|(to, from)| *to = *from).count();
        let have = usize::from(have) + taken;
        if have < 8 {
            self.offset += taken as u64;
            self.at = At::Length {
                word,
                have: low_byte(have),
            };
            return Ok(taken);
        }
        let length = u64::from_le_bytes(word);
        let refused = NarError::Length {
            offset: self.offset + taken as u64 - 8,
            length,
        };
        self.offset += taken as u64;
        let [padding, ..] = (length.wrapping_neg() % 8).to_le_bytes();
        let end = length
            .checked_add(u64::from(padding))
            .and_then(|bytes| bytes.checked_add(self.offset));
        if length > self.expect.len_max() || end.is_none_or(|end| end > self.size_max) {
            return Err(refused);
        }
        if self.expect == Expect::Contents {
            self.expect = Expect::NodeClose;
            self.at = match length {
                0 => At::LENGTH,
                left => At::Contents { left, padding },
            };
        } else if length == 0 {
            self.accept(&[])?;
            self.at = At::LENGTH;
        } else {
            self.token.clear();
            self.at = At::Token {
                len: u16::try_from(length).map_err(|_| refused)?,
            };
        }
        Ok(taken)
    }

    fn push_token(&mut self, len: usize, rest: &[u8]) -> Result<usize, NarError> {
        let (taken, _) = rest.split_at(rest.len().min(len - self.token.len()));
        self.offset += taken.len() as u64;
        if taken.len() == len {
            self.accept(taken)?;
        } else {
            self.token.extend_from_slice(taken);
            if self.token.len() < len {
                return Ok(taken.len());
            }
            let token = std::mem::take(&mut self.token);
            self.accept(&token)?;
            self.token = token;
        }
        self.at = At::after_token(low_byte(len.wrapping_neg() % 8));
        self.end_if_complete();
        Ok(taken.len())
    }

    /// Takes a whole token and decides what the grammar wants after it.
    fn accept(&mut self, token: &[u8]) -> Result<(), NarError> {
        self.expect = match (self.expect, token) {
            (Expect::Magic, b"nix-archive-1") => Expect::NodeOpen,
            (Expect::NodeOpen, b"(") if self.directories.len() >= DEPTH_MAX => {
                return Err(NarError::Depth);
            }
            (Expect::NodeOpen, b"(") => Expect::Type,
            (Expect::Type, b"type") => Expect::Kind,
            (Expect::Kind, b"regular") => Expect::ContentsOrExecutable,
            (Expect::Kind, b"symlink") => Expect::TargetTag,
            (Expect::Kind, b"directory") => {
                self.directories.push(self.names.len());
                Expect::EntryOrClose
            }
            (Expect::ContentsOrExecutable, b"executable") => Expect::ExecutableValue,
            (Expect::ContentsOrExecutable | Expect::ContentsTag, b"contents") => Expect::Contents,
            (Expect::ExecutableValue, b"") => Expect::ContentsTag,
            (Expect::TargetTag, b"target") => Expect::Target,
            (Expect::Target, target) if !target.is_empty() && !target.contains(&0) => {
                Expect::NodeClose
            }
            (Expect::NodeClose, b")") => self.after_node(),
            (Expect::EntryOrClose, b")") => {
                let start = self.directories.pop().unwrap_or_default();
                self.names.truncate(start);
                self.after_node()
            }
            (Expect::EntryOrClose, b"entry") => Expect::EntryOpen,
            (Expect::EntryOpen, b"(") => Expect::NameTag,
            (Expect::NameTag, b"name") => Expect::Name,
            (Expect::Name, name) if is_name(name) => self.enter(name)?,
            (Expect::NodeTag, b"node") => Expect::NodeOpen,
            (Expect::EntryClose, b")") => Expect::EntryOrClose,
            (expect, _) => return Err(self.unexpected(expect)),
        };
        Ok(())
    }

    fn after_node(&self) -> Expect {
        if self.directories.is_empty() {
            Expect::Nothing
        } else {
            Expect::EntryClose
        }
    }

    /// Remembers the name of an entry, which must sort behind its predecessor.
    fn enter(&mut self, name: &[u8]) -> Result<Expect, NarError> {
        let start = self.directories.last().copied().unwrap_or_default();
        // No name is empty, so the first of a directory sorts behind the empty one kept for it.
        if self
            .names
            .get(start..)
            .is_some_and(|previous| name <= previous)
        {
            return Err(NarError::Order {
                offset: self.offset,
            });
        }
        self.names.truncate(start);
        self.names.extend_from_slice(name);
        Ok(Expect::NodeTag)
    }

    fn end_if_complete(&mut self) {
        let between_tokens = matches!(self.at, At::Length { have: 0, .. });
        if self.expect == Expect::Nothing && between_tokens {
            self.at = At::End;
        }
    }

    fn unexpected(&self, expect: Expect) -> NarError {
        let offset = self.offset;
        match expect {
            Expect::Name | Expect::Target => NarError::Name { offset },
            _ => NarError::Token {
                offset,
                expected: expect.name(),
            },
        }
    }
}

impl Default for NarParser {
    fn default() -> Self {
        Self::new()
    }
}

impl At {
    const LENGTH: Self = Self::Length {
        word: [0; 8],
        have: 0,
    };

    fn after_token(padding: u8) -> Self {
        match padding {
            0 => Self::LENGTH,
            left => Self::Padding { left },
        }
    }
}

impl Expect {
    /// Returns the greatest length that a token may have here, in bytes.
    fn len_max(self) -> u64 {
        match self {
            Self::Contents => u64::MAX,
            Self::Target => TARGET_BYTES_MAX,
            Self::Name => NAME_BYTES_MAX,
            _ => KEYWORD_BYTES_MAX,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Magic => "\"nix-archive-1\"",
            Self::NodeOpen | Self::EntryOpen => "\"(\"",
            Self::Type => "\"type\"",
            Self::Kind => "type of file",
            Self::ContentsOrExecutable => "\"contents\" or \"executable\"",
            Self::ExecutableValue => "empty string",
            Self::ContentsTag | Self::Contents => "\"contents\"",
            Self::NodeClose | Self::EntryClose => "\")\"",
            Self::TargetTag | Self::Target => "\"target\"",
            Self::EntryOrClose => "\"entry\" or \")\"",
            Self::NameTag | Self::Name => "\"name\"",
            Self::NodeTag => "\"node\"",
            Self::Nothing => "end",
        }
    }
}

/// Runs the parser over arbitrary bytes, whole and cut in pieces, and asserts that both agree.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    let mut whole = NarParser::new();
    let result = whole.push(data);
    if let Ok(progress) = result {
        assert!(progress.ended || progress.consumed == data.len());
        assert_eq!(whole.offset(), progress.consumed as u64);
    }
    let sizes = data.iter().map(|byte| usize::from(*byte % 23)).chain([1]);
    let mut pieces = NarParser::new();
    let mut rest = data;
    for size in sizes.cycle() {
        let (piece, _) = rest.split_at(size.min(rest.len()));
        match pieces.push(piece) {
            Err(error) => return assert_eq!(Err(error), result),
            Ok(Progress { consumed, ended }) => {
                rest = rest.split_at(consumed).1;
                if ended || rest.is_empty() {
                    let consumed = data.len() - rest.len();
                    return assert_eq!(Ok(Progress { consumed, ended }), result);
                }
            }
        }
    }
}

fn is_name(name: &[u8]) -> bool {
    !name.is_empty() && name != b"." && name != b".." && !name.iter().any(|b| matches!(b, b'/' | 0))
}

/// Narrows a count that is below 256 by its origin.
fn low_byte(count: usize) -> u8 {
    u8::try_from(count).unwrap_or(u8::MAX)
}

const DEPTH_MAX: usize = 64;
const NAME_BYTES_MAX: u64 = 255;
const TARGET_BYTES_MAX: u64 = 4095;
/// Longer than any keyword, so that a wrong one is named as such.
const KEYWORD_BYTES_MAX: u64 = 32;

#[cfg(test)]
mod tests;
