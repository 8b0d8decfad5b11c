//! Watches the database for paths that come and go, and feeds the catalog from it.
//!
//! Four times a second SQLite is asked whether anybody has written, which takes some microseconds. Where
//! somebody has, new rows have higher numbers than all before them, and a row count tells whether some
//! are gone; then the ranges that lack some are looked at again, or the whole. Both have a ration of processor
//! time: paths that go now and then are noticed at once, and a collection of garbage that takes an hour does
//! not keep a processor busy. What is gone and still fed costs a question; what is new is never held up.
//!
//! A thread of its own does this with a connection of its own: look-ups do not wait for it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::{self, BoxStream};
use rusqlite::Connection;
use rusqlite::types::ValueRef;
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::watch;
use tracing::{debug, info};

use super::database::{self, DatabaseError, Place};
use super::ranges::{self, Ranges};
use crate::codec::catalog::set::HashSet;
use crate::codec::catalog::source::{Feeder, Source};
use crate::nix::store_path::StorePathHash;

/// What a store has, kept up to date while anybody holds this.
pub(super) struct Catalog {
    // Never held over an await; no other lock is taken under it.
    source: Mutex<Source>,
    /// Counts looks at the database.
    looks: watch::Sender<u64>,
    /// Where the clock of the heartbeats begins.
    began: Instant,
}

/// An open database and how far it was read.
struct Reading {
    connection: Connection,
    identity: Option<(u64, u64)>,
    /// SQLite's number for the last commit of anybody.
    version: i64,
    /// The highest row number seen.
    last_id: i64,
    /// Rows that there should be.
    rows: i64,
    /// Where they should be.
    ranges: Ranges,
    /// Whether rows may have gone since they were counted.
    uncounted: bool,
    ration: Ration,
}

impl Catalog {
    /// Starts the thread; it ends when the last handle and the last feed are dropped.
    ///
    /// `Err` when the system gives no thread.
    pub(super) fn start(place: Place) -> std::io::Result<Arc<Self>> {
        let catalog = Arc::new(Self {
            source: Mutex::new(Source::new(place.store_dir.clone())),
            looks: watch::Sender::new(0),
            began: Instant::now(),
        });
        let weak = Arc::downgrade(&catalog);
        std::thread::Builder::new()
            .name("nix-catalog".into())
            .spawn(move || run(&weak, &place))?;
        Ok(catalog)
    }

    /// Feeds whoever reads, for as long as they do; memory is one piece of at most 130 KB.
    pub(super) fn feed(self: &Arc<Self>) -> BoxStream<'static, Bytes> {
        let start = (Arc::clone(self), Feeder::new(), self.looks.subscribe());
        let feed = stream::unfold(start, |(catalog, mut feeder, mut looks)| async move {
            loop {
                let piece = feeder.next(&catalog.source());
                if let Some(piece) = piece {
                    return Some((Bytes::from(piece), (catalog, feeder, looks)));
                }
                looks.changed().await.ok()?;
            }
        });
        feed.boxed()
    }

    fn source(&self) -> MutexGuard<'_, Source> {
        self.source.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Looks at the database until nobody wants to know.
fn run(catalog: &Weak<Catalog>, place: &Place) {
    let mut reading: Option<Reading> = None;
    let mut told = false;
    while let Some(catalog) = catalog.upgrade() {
        let begun = catalog.began.elapsed();
        let looked = match reading.take() {
            Some(open) if open.identity == database::identity(place) => Ok(open),
            _ => Reading::open(place),
        };
        let looked = looked.and_then(|mut open| {
            open.look(place, &catalog)?;
            Ok(open)
        });
        match looked {
            Ok(open) => {
                reading = Some(open);
                told = false;
                let clock_ms = u64::try_from(begun.as_millis()).unwrap_or(u64::MAX);
                catalog.source().confirm(clock_ms);
            }
            Err(error) => {
                catalog.source().doubt();
                if !told {
                    told = true;
                    info!(%error, "the catalog is not fed, its database cannot be read");
                }
            }
        }
        catalog.looks.send_modify(|looks| *looks += 1);
        drop(catalog);
        std::thread::sleep(HEARTBEAT);
    }
}

impl Reading {
    fn open(place: &Place) -> Result<Self, DatabaseError> {
        let identity = database::identity(place);
        Ok(Self {
            connection: database::open(place)?,
            identity,
            version: i64::MIN,
            last_id: 0,
            rows: 0,
            ranges: Ranges::new(&place.store_dir),
            uncounted: false,
            ration: Ration::full(Instant::now()),
        })
    }

    /// Brings the catalog up to now.
    fn look(&mut self, place: &Place, catalog: &Catalog) -> Result<(), DatabaseError> {
        let version = self
            .connection
            .query_row("pragma data_version", (), |row| row.get(0))?;
        let first = self.version == i64::MIN;
        if version == self.version && !self.uncounted {
            return Ok(());
        }
        // All below sees one moment.
        self.connection.execute_batch("begin")?;
        let read = match first {
            true => self.whole(place, catalog),
            false => self.changes(place, catalog),
        };
        self.connection.execute_batch("commit")?;
        read?;
        self.version = version;
        Ok(())
    }

    /// Takes new rows in, and finds out whether some are gone as soon as that may be asked.
    fn changes(&mut self, place: &Place, catalog: &Catalog) -> Result<(), DatabaseError> {
        let (last_id, found) = self.rows_after(place, self.last_id)?;
        self.rows += i64::try_from(found.len()).unwrap_or(i64::MAX);
        self.last_id = last_id;
        {
            let mut source = catalog.source();
            for hash in found.into_iter().flatten() {
                source.add(hash);
            }
        }
        self.uncounted = true;
        if !self.ration.allows(Instant::now()) {
            return Ok(());
        }
        let begun = processor_time();
        let count: i64 =
            self.connection
                .query_row("select count(*) from ValidPaths", (), |row| row.get(0))?;
        let gone = self.rows - count;
        let explained = match gone {
            0 => true,
            1..=GONE_FEW => self.gone(place, catalog, gone)?,
            _ => false,
        };
        match explained {
            true => self.uncounted = false,
            false => self.whole(place, catalog)?,
        }
        self.ration.spend(processor_time().saturating_sub(begun));
        Ok(())
    }

    /// Finds so many rows that are gone; `false`: the ranges do not tell which.
    fn gone(&mut self, place: &Place, catalog: &Catalog, gone: i64) -> Result<bool, DatabaseError> {
        let Some(left) = self.left(place, gone)? else {
            return Ok(false);
        };
        let mut lacking = vec![false; self.ranges.iter().count()];
        let mut found = HashSet::new();
        for (range, hashes) in left {
            self.ranges.set(range, hashes.len());
            if let Some(lacks) = lacking.get_mut(range) {
                *lacks = true;
            }
            for hash in hashes.into_iter().flatten() {
                found.insert(hash);
            }
        }
        self.rows -= gone;
        let mut source = catalog.source();
        let is_gone = |hash: &&StorePathHash| {
            lacking.get(ranges::of_hash(hash)) == Some(&true) && !found.contains(hash)
        };
        let gone: Vec<_> = source.paths().iter().filter(is_gone).copied().collect();
        gone.iter().for_each(|hash| source.remove(hash));
        Ok(true)
    }

    /// Returns what is left in the ranges that lack so many rows together, each with its place.
    fn left(&self, place: &Place, gone: i64) -> Result<Option<Vec<Left>>, DatabaseError> {
        let within = "from ValidPaths where path >= ?1 and path < ?2";
        let mut count = self
            .connection
            .prepare(&format!("select count(*) {within}"))?;
        let mut paths = self.connection.prepare(&format!("select path {within}"))?;
        let folder = format!("{}/", place.store_dir);
        let (mut left, mut open) = (Vec::new(), gone);
        for (range, rows) in self.ranges.iter() {
            let counted: i64 = count.query_row(range.bounds(), |row| row.get(0))?;
            if counted == rows {
                continue;
            }
            let hashes = paths.query_map(range.bounds(), |row| {
                Ok(hash_part(row.get_ref(0)?, &folder))
            })?;
            left.push((range.place, hashes.collect::<Result<_, _>>()?));
            open -= rows - counted;
            if open == 0 {
                return Ok(Some(left));
            }
        }
        Ok(None)
    }

    fn whole(&mut self, place: &Place, catalog: &Catalog) -> Result<(), DatabaseError> {
        let now = Instant::now();
        self.ranges.clear();
        let (last_id, found) = self.rows_after(place, 0)?;
        self.rows = i64::try_from(found.len()).unwrap_or(i64::MAX);
        self.last_id = last_id;
        let found: HashSet = found.into_iter().flatten().collect();
        debug!(paths = found.len(), after = ?now.elapsed(), "looked at the whole store");
        catalog.source().replace(found);
        self.uncounted = false;
        Ok(())
    }

    /// Reads the rows with higher numbers, and counts them into their ranges; those that are no store paths
    /// of ours are `None`.
    fn rows_after(
        &mut self,
        place: &Place,
        id: i64,
    ) -> Result<(i64, Vec<Option<StorePathHash>>), DatabaseError> {
        // Of the whole, the index over paths is read and not the table: a third of the bytes.
        let all = "select id, path from ValidPaths";
        let text = match id {
            0 => all.to_owned(),
            _ => format!("{all} where id > {id}"),
        };
        let folder = format!("{}/", place.store_dir);
        let mut statement = self.connection.prepare(&text)?;
        let mut rows = statement.query(())?;
        let (mut last, mut found) = (id, Vec::new());
        while let Some(row) = rows.next()? {
            last = last.max(row.get(0)?);
            let path = row.get_ref(1)?;
            let hash = hash_part(path, &folder);
            self.ranges.add(match (&hash, path) {
                (Some(hash), _) => ranges::of_hash(hash),
                (None, ValueRef::Text(path)) => self.ranges.of_text(path),
                // None that Nix writes.
                (None, _) => 0,
            });
            found.push(hash);
        }
        Ok((last, found))
    }
}

/// What is left in one range, by its place: hash parts, and `None` for what is no store path of ours.
type Left = (usize, Vec<Option<StorePathHash>>);

/// Reads the hash part of a path in a folder as it stands in the database; `None`: it is none.
fn hash_part(path: ValueRef<'_>, folder: &str) -> Option<StorePathHash> {
    let name = path
        .as_str()
        .ok()
        .and_then(|path| path.strip_prefix(folder));
    let digits = name.and_then(|name| name.split_once('-'));
    digits.and_then(|(digits, _)| StorePathHash::parse(digits))
}

/// Returns the processor time of this thread so far: waiting for a busy machine costs it nothing.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

/// Processor time that may be spent on finding what is gone: a share of all time, saved up to a bound.
struct Ration {
    /// Seconds; below zero after something dear.
    saved: f64,
    since: Instant,
}

impl Ration {
    fn full(now: Instant) -> Self {
        Self {
            saved: SAVED_MAX,
            since: now,
        }
    }

    fn allows(&mut self, now: Instant) -> bool {
        let earned = now.saturating_duration_since(self.since).as_secs_f64() * SHARE;
        self.saved = (self.saved + earned).min(SAVED_MAX);
        self.since = now;
        self.saved > 0.0
    }

    fn spend(&mut self, time: Duration) {
        self.saved -= time.as_secs_f64();
    }
}

/// Between two looks, and so between two heartbeats.
const HEARTBEAT: Duration = Duration::from_millis(250);

/// Up to so many lie in a quarter of the 1,024 ranges at most. With more, reading all costs less than counting
/// all first.
const GONE_FEW: i64 = 256;

/// Of one processor: a collection of garbage in a million paths is then followed within a second, as a look at
/// the ranges takes some 150 ms.
const SHARE: f64 = 0.2;

/// Seconds: of a million paths the whole can be looked at five times running.
const SAVED_MAX: f64 = 2.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_share_of_the_time_and_no_more() {
        let mut now = Instant::now();
        let mut ration = Ration::full(now);
        let mut looks = 0;
        for _ in 0..4000 {
            now += HEARTBEAT;
            if ration.allows(now) {
                ration.spend(Duration::from_millis(400));
                looks += 1;
            }
        }
        // 1000 s give 200, and 2 were saved.
        assert!((500..=507).contains(&looks), "{looks}");
    }
}
