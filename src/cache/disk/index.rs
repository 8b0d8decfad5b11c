//! The index of the cache on disk: what is known of each path, and in which order they were used.
//!
//! An embedded database (redb) in one file. It survives kill -9 and may be deleted: what is in the
//! folder comes back from there. Tables:
//!
//! ```text
//! records   hash -> text of the record
//! uses      hash -> (last use, size of the NAR file)      size 0: a look-up alone
//! nars      (last use, hash) -> ()                         least recently used first
//! look_ups  (last use, hash) -> ()
//! stamps    hash -> time of the NAR file's last change    when its content was checked
//! totals    name -> number                                 so that opening counts nothing
//! ```
//!
//! The last use is in microseconds since 1970, made strictly increasing by the caller.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use redb::{Database, ReadableDatabase as _, ReadableTable as _, Table, TableDefinition};
use tracing::debug;

use super::super::backend::Record;
use super::super::stamp::Stamp;
use super::text;
use crate::nix::store_path::{StoreDir, StorePathHash};

/// An open index.
pub struct Index {
    database: Database,
    store_dir: StoreDir,
}

/// How much the index lists.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// NARs.
    pub entries: u64,
    /// Bytes of their files.
    pub bytes: u64,
    /// Paths without NAR.
    pub look_ups: u64,
}

/// Why the index could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// The database said so; its file may be damaged, or the disk full.
    #[error("{0}")]
    Database(#[from] redb::Error),
    /// Its file is not as it was written.
    #[error("the index is damaged: {0}")]
    Damaged(String),
}

/// The tables within one write.
pub struct Changes<'t> {
    records: Table<'t, Key, &'static [u8]>,
    uses: Table<'t, Key, (u64, u64)>,
    nars: Table<'t, (u64, Key), ()>,
    look_ups: Table<'t, (u64, Key), ()>,
    stamps: Table<'t, Key, u64>,
    totals: Totals,
    store_dir: &'t StoreDir,
}

type Key = [u8; 20];

impl Index {
    /// Opens the index, or makes an empty one where there is no file.
    ///
    /// It takes milliseconds whatever the size. A damaged file is an error, never a panic.
    pub fn open(path: &Path, cache_bytes: usize, store_dir: StoreDir) -> Result<Self, IndexError> {
        guarded(|| {
            let mut builder = Database::builder();
            builder.set_cache_size(cache_bytes);
            let database = builder.create(path).map_err(redb::Error::from)?;
            let index = Self {
                database,
                store_dir,
            };
            // All tables are there from now on. A write costs syncs, so only where one is not.
            let opens = || -> Result<(), IndexError> {
                index.last_use()?;
                index.totals()?;
                index.page(None, 1)?;
                index.stamp(StorePathHash([0; 20])).map(drop)
            };
            if opens().is_err() {
                index.write(|_| Ok(()))?;
            }
            Ok(index)
        })
    }

    /// Returns what is known of a path; it never waits for writers.
    ///
    /// A record that cannot be read is none: one bad row must not cost the others.
    pub fn get(&self, hash: StorePathHash) -> Result<Option<Record>, IndexError> {
        guarded(|| {
            let read = self.database.begin_read().map_err(redb::Error::from)?;
            let records = read.open_table(RECORDS).map_err(redb::Error::from)?;
            let found = records.get(&hash.0).map_err(redb::Error::from)?;
            Ok(found.and_then(|found| decode(hash, found.value(), &self.store_dir)))
        })
    }

    /// Returns the totals.
    pub fn totals(&self) -> Result<Totals, IndexError> {
        guarded(|| {
            let read = self.database.begin_read().map_err(redb::Error::from)?;
            let table = read.open_table(TOTALS).map_err(redb::Error::from)?;
            Totals::read(&table)
        })
    }

    /// Returns the latest use that is recorded.
    pub fn last_use(&self) -> Result<u64, IndexError> {
        guarded(|| {
            let read = self.database.begin_read().map_err(redb::Error::from)?;
            let mut last = 0;
            for table in [NARS, LOOK_UPS] {
                let table = read.open_table(table).map_err(redb::Error::from)?;
                let found = table.last().map_err(redb::Error::from)?;
                last = last.max(found.map_or(0, |(key, _)| key.value().0));
            }
            Ok(last)
        })
    }

    /// Returns the last use of a path.
    pub fn last_use_of(&self, hash: StorePathHash) -> Result<Option<u64>, IndexError> {
        guarded(|| {
            let read = self.database.begin_read().map_err(redb::Error::from)?;
            let uses = read.open_table(USES).map_err(redb::Error::from)?;
            let found = uses.get(&hash.0).map_err(redb::Error::from)?;
            Ok(found.map(|found| found.value().0))
        })
    }

    /// Returns the stamp that a path's NAR file had when its content was checked.
    pub fn stamp(&self, hash: StorePathHash) -> Result<Option<Stamp>, IndexError> {
        guarded(|| {
            let read = self.database.begin_read().map_err(redb::Error::from)?;
            let stamps = read.open_table(STAMPS).map_err(redb::Error::from)?;
            let found = stamps.get(&hash.0).map_err(redb::Error::from)?;
            Ok(found.map(|found| Stamp::from_nanos(found.value())))
        })
    }

    /// Returns up to `count` paths with a NAR, in the order of their hashes, after one of them.
    pub fn page(
        &self,
        after: Option<StorePathHash>,
        count: usize,
    ) -> Result<Vec<(StorePathHash, u64)>, IndexError> {
        use std::ops::Bound;
        guarded(|| {
            let read = self.database.begin_read().map_err(redb::Error::from)?;
            let uses = read.open_table(USES).map_err(redb::Error::from)?;
            let start = after.map_or(Bound::Unbounded, |hash| Bound::Excluded(hash.0));
            let range = uses.range::<Key>((start, Bound::Unbounded));
            let mut page = Vec::new();
            for row in range.map_err(redb::Error::from)? {
                let (key, value) = row.map_err(redb::Error::from)?;
                let size = value.value().1;
                page.push((StorePathHash(key.value()), size));
                if page.len() == count {
                    break;
                }
            }
            Ok(page)
        })
    }

    /// Changes the tables, all or nothing; it comes back when that is on disk.
    pub fn write<T>(
        &self,
        change: impl FnOnce(&mut Changes<'_>) -> Result<T, IndexError>,
    ) -> Result<T, IndexError> {
        guarded(|| {
            let mut write = self.database.begin_write().map_err(redb::Error::from)?;
            // Opening after kill -9 must not read the whole file.
            write.set_quick_repair(true);
            let done = {
                let mut totals = write.open_table(TOTALS).map_err(redb::Error::from)?;
                let before = Totals::read(&totals)?;
                let mut changes = Changes {
                    records: write.open_table(RECORDS).map_err(redb::Error::from)?,
                    uses: write.open_table(USES).map_err(redb::Error::from)?,
                    nars: write.open_table(NARS).map_err(redb::Error::from)?,
                    look_ups: write.open_table(LOOK_UPS).map_err(redb::Error::from)?,
                    stamps: write.open_table(STAMPS).map_err(redb::Error::from)?,
                    totals: before,
                    store_dir: &self.store_dir,
                };
                let done = change(&mut changes)?;
                let after = changes.totals;
                drop(changes);
                if after != before {
                    after.write(&mut totals)?;
                }
                done
            };
            write.commit().map_err(redb::Error::from)?;
            Ok(done)
        })
    }
}

impl Changes<'_> {
    /// Returns the totals as changed so far.
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// Returns what is known of a path, as [`Index::get`] does.
    pub fn get(&self, hash: StorePathHash) -> Result<Option<Record>, IndexError> {
        let found = self.records.get(&hash.0).map_err(redb::Error::from)?;
        Ok(found.and_then(|found| decode(hash, found.value(), self.store_dir)))
    }

    /// Returns the last use of a path.
    pub fn last_use(&self, hash: StorePathHash) -> Result<Option<u64>, IndexError> {
        let found = self.uses.get(&hash.0).map_err(redb::Error::from)?;
        Ok(found.map(|found| found.value().0))
    }

    /// Keeps a record in the place of what was known of its path, as used at a given time.
    pub fn put(&mut self, record: &Record, used: u64) -> Result<(), IndexError> {
        let hash = record.info.path.hash();
        self.unlist(hash)?;
        // An empty file cannot be a zstd frame; 0 is free to mean "none".
        let size = record.file.map_or(0, |file| file.size_bytes);
        let text = text::of_record(record, self.store_dir);
        let kept = self.records.insert(&hash.0, text.as_bytes());
        kept.map_err(redb::Error::from)?;
        self.list(hash, used, size)
    }

    /// Removes a path from all tables.
    pub fn remove(&mut self, hash: StorePathHash) -> Result<(), IndexError> {
        self.unlist(hash)?;
        self.records.remove(&hash.0).map_err(redb::Error::from)?;
        self.stamp(hash, None)
    }

    /// Notes the stamp of a path's NAR file, whose content was checked, or forgets it.
    ///
    /// A path that is not listed has none.
    pub fn stamp(&mut self, hash: StorePathHash, stamp: Option<Stamp>) -> Result<(), IndexError> {
        let listed = self.uses.get(&hash.0).map_err(redb::Error::from)?.is_some();
        match stamp.filter(|_| listed) {
            Some(stamp) => self.stamps.insert(&hash.0, stamp.nanos()),
            None => self.stamps.remove(&hash.0),
        }
        .map_err(redb::Error::from)?;
        Ok(())
    }

    /// Notes a use; a path that is not listed stays so.
    pub fn touch(&mut self, hash: StorePathHash, used: u64) -> Result<(), IndexError> {
        match self.unlist(hash)? {
            Some(size) => self.list(hash, used, size),
            None => Ok(()),
        }
    }

    /// Returns the path with a NAR whose last use is longest ago.
    pub fn oldest_nar(&self) -> Result<Option<StorePathHash>, IndexError> {
        let first = self.nars.first().map_err(redb::Error::from)?;
        Ok(first.map(|(key, _)| StorePathHash(key.value().1)))
    }

    /// Returns the path without NAR whose last use is longest ago.
    pub fn oldest_look_up(&self) -> Result<Option<StorePathHash>, IndexError> {
        let first = self.look_ups.first().map_err(redb::Error::from)?;
        Ok(first.map(|(key, _)| StorePathHash(key.value().1)))
    }

    fn list(&mut self, hash: StorePathHash, used: u64, size: u64) -> Result<(), IndexError> {
        let kept = self.uses.insert(&hash.0, (used, size));
        kept.map_err(redb::Error::from)?;
        let order = if size > 0 {
            self.totals.entries += 1;
            self.totals.bytes += size;
            &mut self.nars
        } else {
            self.totals.look_ups += 1;
            &mut self.look_ups
        };
        order
            .insert((used, hash.0), ())
            .map_err(redb::Error::from)?;
        Ok(())
    }

    /// Takes a path out of the orders; returns the size it was listed with.
    fn unlist(&mut self, hash: StorePathHash) -> Result<Option<u64>, IndexError> {
        let removed = self.uses.remove(&hash.0).map_err(redb::Error::from)?;
        let Some((used, size)) = removed.map(|removed| removed.value()) else {
            return Ok(None);
        };
        let order = if size > 0 {
            self.totals.entries = self.totals.entries.saturating_sub(1);
            self.totals.bytes = self.totals.bytes.saturating_sub(size);
            &mut self.nars
        } else {
            self.totals.look_ups = self.totals.look_ups.saturating_sub(1);
            &mut self.look_ups
        };
        order.remove((used, hash.0)).map_err(redb::Error::from)?;
        Ok(Some(size))
    }
}

impl Totals {
    fn read(table: &impl redb::ReadableTable<&'static str, u64>) -> Result<Self, IndexError> {
        let number = |name| -> Result<u64, IndexError> {
            let found = table.get(name).map_err(redb::Error::from)?;
            Ok(found.map_or(0, |found| found.value()))
        };
        Ok(Self {
            entries: number("entries")?,
            bytes: number("bytes")?,
            look_ups: number("look-ups")?,
        })
    }

    fn write(&self, table: &mut Table<'_, &'static str, u64>) -> Result<(), IndexError> {
        for (name, number) in [
            ("entries", self.entries),
            ("bytes", self.bytes),
            ("look-ups", self.look_ups),
        ] {
            table.insert(name, number).map_err(redb::Error::from)?;
        }
        Ok(())
    }
}

/// Reads a record; `None` when it is not as it was written, or was written by a version that took more for one.
fn decode(hash: StorePathHash, bytes: &[u8], store_dir: &StoreDir) -> Option<Record> {
    let text = str::from_utf8(bytes).map_err(|error| error.to_string());
    let record = text.and_then(|t| text::read(t, store_dir).map_err(|error| error.to_string()));
    let record = record.and_then(|record| match record.info.path.hash() == hash {
        true => Ok(record),
        false => Err("it is of another path".to_owned()),
    });
    record
        .inspect_err(|cause| debug!(path.hash = %hash, cause, "a row of the index is passed over"))
        .ok()
}

/// Makes an error of a panic: the database asserts what a damaged file can break.
fn guarded<T>(work: impl FnOnce() -> Result<T, IndexError>) -> Result<T, IndexError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Err(IndexError::Damaged(text.unwrap_or_default()))
    })
}

const RECORDS: TableDefinition<'_, Key, &[u8]> = TableDefinition::new("records");
const USES: TableDefinition<'_, Key, (u64, u64)> = TableDefinition::new("uses");
const NARS: TableDefinition<'_, (u64, Key), ()> = TableDefinition::new("nars");
const LOOK_UPS: TableDefinition<'_, (u64, Key), ()> = TableDefinition::new("look_ups");
const STAMPS: TableDefinition<'_, Key, u64> = TableDefinition::new("stamps");
const TOTALS: TableDefinition<'_, &str, u64> = TableDefinition::new("totals");

#[cfg(test)]
mod tests {
    use super::super::samples::record;
    use super::*;

    fn open(path: &Path) -> Index {
        Index::open(path, 1 << 20, StoreDir::default()).unwrap()
    }

    #[test]
    fn records_orders_and_totals_agree_and_stay() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index");
        let index = open(&path);
        let written = index.write(|changes| {
            changes.put(&record(1, Some(10)), 5)?;
            changes.put(&record(2, Some(20)), 6)?;
            changes.put(&record(3, None), 7)?;
            changes.put(&record(1, Some(10)), 8)?;
            changes.touch(StorePathHash([9; 20]), 99)?;
            changes.oldest_nar()
        });
        assert_eq!(written.unwrap(), Some(StorePathHash([2; 20])));
        drop(index);
        let index = open(&path);
        let totals = |entries, bytes, look_ups| Totals {
            entries,
            bytes,
            look_ups,
        };
        assert_eq!(index.totals().unwrap(), totals(2, 30, 1));
        assert_eq!(index.last_use().unwrap(), 8);
        assert_eq!(
            index.get(StorePathHash([1; 20])).unwrap(),
            Some(record(1, Some(10)))
        );
        assert_eq!(index.get(StorePathHash([9; 20])).unwrap(), None);
        // A look-up becomes an entry, and an entry goes.
        let totals_now = index.write(|changes| {
            changes.put(&record(3, Some(3)), 9)?;
            changes.remove(StorePathHash([1; 20]))?;
            changes.remove(StorePathHash([1; 20]))?;
            assert_eq!(changes.oldest_look_up()?, None);
            Ok(changes.totals())
        });
        assert_eq!(totals_now.unwrap(), totals(2, 23, 0));
        let page = index.page(Some(StorePathHash([2; 20])), 10).unwrap();
        assert_eq!(page, [(StorePathHash([3; 20]), 3)]);
    }

    #[test]
    fn a_record_that_cannot_be_read_costs_itself_alone() {
        let dir = tempfile::tempdir().unwrap();
        let index = open(&dir.path().join("index"));
        let hash = StorePathHash([1; 20]);
        for text in [&b"of another version"[..], &[0xff]] {
            let written = index.write(|changes| {
                changes.put(&record(1, Some(10)), 5)?;
                let spoilt = changes.records.insert(&hash.0, text);
                spoilt.map(drop).map_err(redb::Error::from)?;
                assert_eq!(changes.get(hash)?, None);
                Ok(changes.totals().entries)
            });
            assert_eq!(written.unwrap(), 1);
            assert_eq!(index.get(hash).unwrap(), None);
        }
        let again = index.write(|changes| changes.put(&record(1, Some(10)), 6));
        again.unwrap();
        assert_eq!(index.get(hash).unwrap(), Some(record(1, Some(10))));
        assert_eq!(index.totals().unwrap().bytes, 10);
    }

    #[test]
    fn a_failed_change_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let index = open(&dir.path().join("index"));
        let failed = index.write(|changes| {
            changes.put(&record(1, Some(10)), 5)?;
            Err::<(), _>(IndexError::Damaged("a test".to_owned()))
        });
        assert!(failed.is_err());
        assert_eq!(index.totals().unwrap(), Totals::default());
        assert_eq!(index.get(StorePathHash([1; 20])).unwrap(), None);
    }

    #[test]
    fn a_panic_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let index = open(&dir.path().join("index"));
        let failed = index.write(|_| -> Result<(), _> { panic!("an assertion") });
        assert!(failed.unwrap_err().to_string().contains("an assertion"));
        index
            .write(|changes| changes.put(&record(1, None), 1))
            .unwrap();
    }
}
