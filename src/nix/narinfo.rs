//! The text of `<hash>.narinfo`: what a binary cache says of one path, and where its NAR is.
//!
//! Lines of `Name: value`, in the order that [`NarInfo::render`] writes:
//!
//! ```text
//! StorePath: /nix/store/<hash>-<name>
//! URL: nar/<file hash>.nar.xz          relative to the cache, or absolute
//! Compression: xz                      no such line: bzip2
//! FileHash: sha256:<base-32>           of the compressed file; may be missing
//! FileSize: <bytes>                    may be missing
//! NarHash: sha256:<base-32>
//! NarSize: <bytes>                     never 0
//! References: <hash>-<name> …          without directory; may be empty
//! Deriver: <hash>-<name>.drv           where known
//! Sig: <key name>:<base64>             any number
//! CA: fixed:r:sha256:<base-32>         where there is one
//! ```
//!
//! Sources: `libstore/nar-info.cc` of Nix 2.8 to 2.36 and what caches were seen to write. Where they
//! leave a choice, the reading is the wider one and the writing is Nix's own. It does not judge where
//! a URL may point; that is for whom fetches it.

use std::fmt::Write as _;

use super::base32;
use super::content_address::ContentAddress;
use super::hash::{Hash, NarHash};
use super::path_info::PathInfo;
use super::signature::Signature;
use super::store_path::{StoreDir, StorePath};

/// A path info and the place of its NAR.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NarInfo {
    /// What the signature covers, and the signatures.
    pub info: PathInfo,
    /// Where the NAR is, relative to the cache or absolute; not empty, no control characters.
    pub url: String,
    /// How the file at `url` is compressed.
    pub compression: Compression,
    /// Hash of that file; clients do not check it.
    pub file_hash: Option<Hash>,
    /// Size of that file in bytes; clients do not check it.
    pub file_size: Option<u64>,
}

/// The compressions that Nix has a name for; Muster neither makes nor reads all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the variants are the formats' own names")]
pub enum Compression {
    None,
    Brotli,
    Bzip2,
    Compress,
    Grzip,
    Gzip,
    Lrzip,
    Lz4,
    Lzip,
    Lzma,
    Lzop,
    Xz,
    Zstd,
}

/// A text that is no narinfo; lines count from 1.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NarInfoError {
    /// It is larger than any narinfo.
    #[error("the text has {0} bytes, more than {TEXT_BYTES_MAX}")]
    TooLarge(usize),
    /// A line is not `Name: value`.
    #[error("line {line}: there is no colon")]
    NoColon {
        /// The line.
        line: usize,
    },
    /// A field that may stand once stands again.
    #[error("line {line}: {field} is given twice")]
    Repeated {
        /// The later line.
        line: usize,
        /// The field's name.
        field: &'static str,
    },
    /// A value does not have the form of its field.
    #[error("line {line}: {field}: {reason}")]
    Malformed {
        /// The line.
        line: usize,
        /// The field's name.
        field: &'static str,
        /// What is wrong with the value.
        reason: String,
    },
    /// A field that must be there is not.
    #[error("{0} is missing")]
    Missing(&'static str),
}

impl NarInfo {
    /// Reads a narinfo of a store in `store_dir`.
    ///
    /// At most 1 MiB, 100,000 references and 1,000 signatures. References come out sorted, each once;
    /// malformed signatures and unknown fields are dropped, because newer clients give up on the
    /// former. A line without colon, a repeated field and a value of the wrong form are errors.
    pub fn parse(text: &str, store_dir: &StoreDir) -> Result<Self, NarInfoError> {
        if text.len() > TEXT_BYTES_MAX {
            return Err(NarInfoError::TooLarge(text.len()));
        }
        let mut fields = Fields::default();
        for (place, content) in text.split_terminator('\n').enumerate() {
            let line = place + 1;
            let (name, value) = content
                .split_once(':')
                .ok_or(NarInfoError::NoColon { line })?;
            let value = value.strip_prefix(' ').unwrap_or(value);
            fields.take(line, name, value, store_dir)?;
        }
        fields.finish()
    }

    /// Writes the text as `nix copy` does, with a newline at its end.
    ///
    /// What `nix copy` wrote comes out byte for byte. The references must be sorted, each once.
    pub fn render(&self, store_dir: &StoreDir) -> String {
        let info = &self.info;
        let mut text = String::with_capacity(600 + self.url.len() + info.references.len() * 64);
        line(&mut text, "StorePath: ", store_dir.as_str());
        line(&mut text, "/", info.path.as_str());
        line(&mut text, "\nURL: ", &self.url);
        line(&mut text, "\nCompression: ", self.compression.name());
        if let Some(hash) = &self.file_hash {
            line(&mut text, "\nFileHash: ", hash.algorithm().name());
            text.push(':');
            base32::push(&mut text, hash.digest());
        }
        if let Some(size) = self.file_size {
            _ = write!(text, "\nFileSize: {size}");
        }
        text.push_str("\nNarHash: sha256:");
        base32::push(&mut text, &info.nar_hash.0);
        _ = write!(text, "\nNarSize: {}\nReferences: ", info.nar_size);
        for (place, reference) in info.references.iter().enumerate() {
            line(
                &mut text,
                if place > 0 { " " } else { "" },
                reference.as_str(),
            );
        }
        if let Some(deriver) = &info.deriver {
            line(&mut text, "\nDeriver: ", deriver.as_str());
        }
        for signature in &info.signatures {
            _ = write!(text, "\nSig: {signature}");
        }
        if let Some(ca) = &info.ca {
            _ = write!(text, "\nCA: {ca}");
        }
        text.push('\n');
        text
    }
}

impl Compression {
    /// Reads the value of a `Compression` line; `None` when Nix has no such name.
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "none" => Self::None,
            "br" => Self::Brotli,
            // An empty value was always read as a missing line.
            "bzip2" | "" => Self::Bzip2,
            "compress" => Self::Compress,
            "grzip" => Self::Grzip,
            "gzip" => Self::Gzip,
            "lrzip" => Self::Lrzip,
            "lz4" => Self::Lz4,
            "lzip" => Self::Lzip,
            "lzma" => Self::Lzma,
            "lzop" => Self::Lzop,
            "xz" => Self::Xz,
            "zstd" => Self::Zstd,
            _ => return None,
        })
    }

    /// Returns Nix's name, as the `Compression` line has it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Brotli => "br",
            Self::Bzip2 => "bzip2",
            Self::Compress => "compress",
            Self::Grzip => "grzip",
            Self::Gzip => "gzip",
            Self::Lrzip => "lrzip",
            Self::Lz4 => "lz4",
            Self::Lzip => "lzip",
            Self::Lzma => "lzma",
            Self::Lzop => "lzop",
            Self::Xz => "xz",
            Self::Zstd => "zstd",
        }
    }
}

/// What was read so far; the outer `Option` is whether the line was seen.
#[derive(Default)]
struct Fields {
    path: Option<StorePath>,
    url: Option<String>,
    compression: Option<Compression>,
    file_hash: Option<Hash>,
    file_size: Option<u64>,
    nar_hash: Option<NarHash>,
    nar_size: Option<u64>,
    references: Option<Vec<StorePath>>,
    deriver: Option<Option<StorePath>>,
    signatures: Vec<Signature>,
    ca: Option<Option<ContentAddress>>,
}

impl Fields {
    fn take(
        &mut self,
        line: usize,
        name: &str,
        value: &str,
        store_dir: &StoreDir,
    ) -> Result<(), NarInfoError> {
        match name {
            "StorePath" => {
                let path = store_dir.parse(value);
                once(&mut self.path, line, "StorePath", path)
            }
            "URL" => once(&mut self.url, line, "URL", url(value)),
            "Compression" => {
                let compression = Compression::parse(value).ok_or("Nix has no such compression");
                once(&mut self.compression, line, "Compression", compression)
            }
            "FileHash" => once(&mut self.file_hash, line, "FileHash", Hash::parse(value)),
            "FileSize" => once(&mut self.file_size, line, "FileSize", size(value)),
            "NarHash" => once(&mut self.nar_hash, line, "NarHash", NarHash::parse(value)),
            "NarSize" => {
                let size = size(value).and_then(|n| if n > 0 { Ok(n) } else { Err("it is 0") });
                once(&mut self.nar_size, line, "NarSize", size)
            }
            "References" => {
                let references = references(value);
                once(&mut self.references, line, "References", references)
            }
            "Deriver" => once(&mut self.deriver, line, "Deriver", deriver(value)),
            "Sig" => self.signature(line, value),
            "CA" => once(&mut self.ca, line, "CA", content_address(value)),
            _ => Ok(()),
        }
    }

    fn signature(&mut self, line: usize, value: &str) -> Result<(), NarInfoError> {
        let Ok(signature) = Signature::parse(value) else {
            return Ok(());
        };
        if self.signatures.contains(&signature) {
            return Ok(());
        }
        if self.signatures.len() == SIGNATURES_MAX {
            let reason = format!("there are more than {SIGNATURES_MAX}");
            let field = "Sig";
            return Err(NarInfoError::Malformed {
                line,
                field,
                reason,
            });
        }
        self.signatures.push(signature);
        Ok(())
    }

    fn finish(self) -> Result<NarInfo, NarInfoError> {
        let missing = NarInfoError::Missing;
        let mut info = PathInfo {
            path: self.path.ok_or(missing("StorePath"))?,
            nar_hash: self.nar_hash.ok_or(missing("NarHash"))?,
            nar_size: self.nar_size.ok_or(missing("NarSize"))?,
            references: self.references.unwrap_or_default(),
            deriver: self.deriver.flatten(),
            signatures: self.signatures,
            ca: self.ca.flatten(),
        };
        info.normalize();
        Ok(NarInfo {
            info,
            url: self.url.ok_or(missing("URL"))?,
            compression: self.compression.unwrap_or(Compression::Bzip2),
            file_hash: self.file_hash,
            file_size: self.file_size,
        })
    }
}

fn once<T, E: ToString>(
    slot: &mut Option<T>,
    line: usize,
    field: &'static str,
    value: Result<T, E>,
) -> Result<(), NarInfoError> {
    if slot.is_some() {
        return Err(NarInfoError::Repeated { line, field });
    }
    let malformed = |e: E| NarInfoError::Malformed {
        line,
        field,
        reason: e.to_string(),
    };
    *slot = Some(value.map_err(malformed)?);
    Ok(())
}

fn url(value: &str) -> Result<String, &'static str> {
    if value.is_empty() {
        Err("it is empty")
    } else if value.contains(char::is_control) {
        Err("it has a control character")
    } else {
        Ok(value.to_owned())
    }
}

fn size(value: &str) -> Result<u64, &'static str> {
    let digits = value.bytes().all(|b| b.is_ascii_digit());
    let number = value.parse().ok().filter(|_| digits);
    number.ok_or("it is not a number of bytes")
}

fn references(value: &str) -> Result<Vec<StorePath>, String> {
    let mut paths = Vec::new();
    for name in value.split(' ').filter(|name| !name.is_empty()) {
        if paths.len() == REFERENCES_MAX {
            return Err(format!("there are more than {REFERENCES_MAX}"));
        }
        paths.push(name.parse::<StorePath>().map_err(|e| e.to_string())?);
    }
    Ok(paths)
}

fn deriver(value: &str) -> Result<Option<StorePath>, String> {
    match value {
        // Hydra once wrote `unknown-deriver`; an empty value can mean nothing else.
        "" | "unknown-deriver" => Ok(None),
        name => name.parse().map(Some).map_err(|e| format!("{e}")),
    }
}

fn content_address(value: &str) -> Result<Option<ContentAddress>, &'static str> {
    match value {
        "" => Ok(None),
        text => match ContentAddress::parse(text) {
            Some(ca) => Ok(Some(ca)),
            None => Err("it is not a content address"),
        },
    }
}

fn line(text: &mut String, start: &str, value: &str) {
    text.push_str(start);
    text.push_str(value);
}

/// Feeds foreign bytes to the parser; what it accepts must survive being written.
#[doc(hidden)]
pub fn fuzz(bytes: &[u8]) {
    let store_dir = StoreDir::default();
    let Ok(text) = str::from_utf8(bytes) else {
        return;
    };
    let Ok(read) = NarInfo::parse(text, &store_dir) else {
        return;
    };
    let written = read.render(&store_dir);
    if written.len() <= TEXT_BYTES_MAX {
        assert_eq!(NarInfo::parse(&written, &store_dir), Ok(read), "{written}");
    }
}

const TEXT_BYTES_MAX: usize = 1 << 20;
const REFERENCES_MAX: usize = 100_000;
const SIGNATURES_MAX: usize = 1_000;
