//! Entries that go: the least recently used, the wrong and the forgotten.
//!
//! ```text
//! index -> narinfo -> sync -> NAR
//! ```
//!
//! Dying in between leaves a NAR without narinfo, or both without a row: the background pass of the
//! next start removes the one and takes the other in again.

use super::super::nar_name::NarName;
use super::folder::{self, Folder};
use super::index::{Index, IndexError, Totals};

/// Takes the least recently used entries out of the index until it has at most so many bytes.
///
/// Returns their names, whose files are yet to be removed, and the totals; at most `count_max` at one
/// go.
pub fn take_oldest(
    index: &Index,
    bytes_max: u64,
    count_max: usize,
) -> Result<(Vec<NarName>, Totals), IndexError> {
    index.write(|changes| {
        let mut names = Vec::new();
        while changes.totals().bytes > bytes_max && names.len() < count_max {
            let Some(hash) = changes.oldest_nar()? else {
                break;
            };
            let record = changes.get(hash)?;
            names.extend(record.and_then(|record| record.name()));
            changes.remove(hash)?;
        }
        Ok((names, changes.totals()))
    })
}

/// Removes the files of entries: first all narinfos that name them, then the NARs.
///
/// Errors are left to the background pass, as what is removed from the index is not served any more.
pub fn remove_files(folder: &Folder, names: &[NarName]) {
    for name in names {
        if narinfo_names(folder, name) {
            _ = folder::remove(&folder.narinfo(name.path_hash));
        }
    }
    // Else a power cut could leave a narinfo without its NAR.
    if !names.is_empty() && folder.sync_root().is_ok() {
        for name in names {
            _ = folder::remove(&folder.nar(name));
        }
    }
}

/// Tells whether the narinfo of a path names this file; an unreadable one is taken to do so.
pub fn narinfo_names(folder: &Folder, name: &NarName) -> bool {
    let line = format!("URL: {}", name.url());
    match folder.read_narinfo(name.path_hash) {
        Ok(Some(text)) => text.lines().any(|found| found == line),
        Ok(None) => false,
        Err(_) => true,
    }
}
