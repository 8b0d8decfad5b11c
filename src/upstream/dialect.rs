//! What caches write beside the manual's form, made plain before it is read.
//!
//! The reader of narinfos takes what Nix takes. Beyond that, peerix leaves a space behind the deriver and an empty
//! line at the end, and a file that went through Windows or a careless proxy has carriage returns.

use std::borrow::Cow;

use crate::nix::narinfo::NarInfo;
use crate::nix::store_path::StoreDir;

/// Reads a narinfo in whatever dialect; the error is for people.
pub fn read_narinfo(text: &[u8], store_dir: &StoreDir) -> Result<NarInfo, String> {
    let text = str::from_utf8(text).map_err(|_| "it is no text".to_owned())?;
    NarInfo::parse(&plain(text), store_dir).map_err(|error| error.to_string())
}

/// Takes away white space at the ends of lines, and empty lines.
fn plain(text: &str) -> Cow<'_, str> {
    let odd = |line: &str| line.is_empty() || line.ends_with(|c: char| c.is_ascii_whitespace());
    // An empty value is written with a space: `References: `.
    let odd = |line: &str| odd(line) && !line.ends_with(": ");
    if !text.split_terminator('\n').any(odd) {
        return Cow::Borrowed(text);
    }
    let lines = text.lines().map(str::trim_ascii_end);
    let lines: Vec<_> = lines.filter(|line| !line.is_empty()).collect();
    Cow::Owned(lines.join("\n"))
}
