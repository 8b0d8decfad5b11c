//! What the background pass after start has found, looked at again by the writer and changed.

use tracing::{debug, warn};

use super::super::super::backend::Record;
use super::super::super::nar_name::NarName;
use super::super::shared::is_of_the_file;
use super::super::text::TextError;
use super::super::{folder, removal};
use super::Writer;
use crate::nix::store_path::StorePathHash;

impl Writer {
    pub(super) fn take_in(&self, hash: StorePathHash) {
        let Some(index) = self.shared.index() else {
            return;
        };
        if index
            .get(hash)
            .is_ok_and(|known| known.is_some_and(|record| record.file.is_some()))
        {
            return;
        }
        let path = self.shared.folder.narinfo(hash);
        let text = match self.shared.folder.read_narinfo(hash) {
            Ok(Some(text)) => text,
            Ok(None) => return,
            Err(error) => {
                debug!(file = %path.display(), %error, "a foreign file is left alone");
                self.shared.foreign.note(path);
                return;
            }
        };
        match self.shared.check(hash, &text) {
            Ok(record) => {
                let used = self.modified(&record);
                self.change(&index, |changes| changes.put(&record, used));
            }
            Err(TextError::Foreign(url)) => {
                debug!(file = %path.display(), url, "a foreign narinfo is left alone");
                self.shared.foreign.note(path);
            }
            Err(error @ TextError::Unknown(_)) => {
                debug!(file = %path.display(), %error, "a narinfo in the cache is left for the next start");
            }
            Err(error) => {
                warn!(file = %path.display(), %error, "a narinfo in the cache is removed");
                _ = folder::remove(&path);
            }
        }
    }

    /// The time at which an entry of the folder was made stands for its last use.
    fn modified(&self, record: &Record) -> u64 {
        let name = record.name();
        let found = name.and_then(|name| self.shared.folder.nar(&name).metadata().ok());
        let modified = found.and_then(|found| found.modified().ok());
        let since = modified.and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok());
        let micros = since.and_then(|since| u64::try_from(since.as_micros()).ok());
        micros.unwrap_or_default()
    }

    pub(super) fn orphan(&self, name: &NarName) {
        let listed = match self.shared.index().map(|index| index.get(name.path_hash)) {
            Some(Ok(record)) => record.and_then(|record| record.name()) == Some(*name),
            _ => return,
        };
        if !listed && !removal::narinfo_names(&self.shared.folder, name) {
            let file = self.shared.folder.nar(name);
            debug!(file = %file.display(), "a nar without narinfo is removed");
            _ = folder::remove(&file);
        }
    }

    pub(super) fn gone(&self, hash: StorePathHash) {
        let record = match self.shared.index().map(|index| index.get(hash)) {
            Some(Ok(Some(record))) => record,
            // Listed, and not to be read.
            Some(Ok(None)) => return self.unlist(hash),
            Some(Err(_)) | None => return,
        };
        let Some((name, file)) = record.name().zip(record.file) else {
            return;
        };
        let cause = match self.shared.folder.open_nar(&name) {
            Ok((_, size)) if size == file.size_bytes => return,
            Ok((_, size)) => format!("it has {size} of {} bytes", file.size_bytes),
            Err(error) if is_of_the_file(&error) => error.to_string(),
            Err(error) => {
                let file = self.shared.folder.nar(&name);
                return debug!(file = %file.display(), %error, "a nar cannot be opened now");
            }
        };
        self.corrupt(&name, &cause);
    }
}
