//! Nix's own database of valid paths, read and never written.
//!
//! ```text
//! <state dir>/db/schema       "10"
//! <state dir>/db/db.sqlite    ValidPaths(id, path, hash, registrationTime, deriver, narSize, ultimate, sigs, ca)
//!                             Refs(referrer, reference)
//! ```
//!
//! It is in WAL mode: readers never wait for writers, and each read transaction sees the last commit.
//! Reading needs the `-shm` file beside it, which lives as long as some process has the database open
//! for writing; where it is not there and cannot be made, opening fails and the daemon is asked, whose
//! process then holds it open. A database without WAL is locked by Nix in a way of its own and is not
//! read. Source: `libstore/schema.sql`, `libstore/local-store.cc`, sqlite.org/wal.html.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension as _, Row, Statement};

use crate::nix::content_address::ContentAddress;
use crate::nix::hash::NarHash;
use crate::nix::path_info::PathInfo;
use crate::nix::signature::Signature;
use crate::nix::store_path::{StoreDir, StorePath, StorePathHash};

/// Where a store of this machine lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Nix's state directory, usually `/nix/var/nix`.
    pub state_dir: PathBuf,
    /// The directory that its store paths name.
    pub store_dir: StoreDir,
    /// Where that directory's files lie for this process.
    pub files_dir: PathBuf,
}

/// A path as the database has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registered {
    /// What is known of the path.
    pub info: PathInfo,
    /// When it was made valid, in seconds of Unix time.
    pub registration_time: i64,
}

/// Why the database does not tell.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    /// It cannot be read, or is not one that we know how to read.
    #[error("{0}")]
    Unfit(String),
    /// SQLite failed.
    #[error("SQLite: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// One row is not what Nix writes.
    #[error("the entry of {path} has no readable {column}")]
    Row {
        /// The path as it stands there.
        path: String,
        /// The column.
        column: &'static str,
    },
}

/// The open database with its prepared questions.
pub(super) struct Database<'c> {
    connection: &'c Connection,
    store_dir: StoreDir,
    between: Statement<'c>,
    exact: Statement<'c>,
    references: Statement<'c>,
}

/// Opens a place's database, where it is one that can be read in place.
pub(super) fn open(place: &Place) -> Result<Connection, DatabaseError> {
    let folder = place.state_dir.join("db");
    let schema = folder.join("schema");
    let version = std::fs::read_to_string(&schema)
        .map_err(|e| DatabaseError::Unfit(format!("cannot read {}: {e}", schema.display())))?;
    if version.trim() != SCHEMA {
        let text = format!("its schema is {:?}, not {SCHEMA}", version.trim());
        return Err(DatabaseError::Unfit(text));
    }
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(file(place), flags)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    let mode: String = connection.query_row("pragma journal_mode", (), |row| row.get(0))?;
    if mode != "wal" {
        let text = format!("its journal mode is {mode}, not wal (use-sqlite-wal in nix.conf)");
        return Err(DatabaseError::Unfit(text));
    }
    let any: Option<String> = connection
        .query_row("select path from ValidPaths limit 1", (), |row| row.get(0))
        .optional()?;
    match any {
        Some(path) if place.store_dir.parse(&path).is_ok() => Ok(connection),
        Some(path) => Err(DatabaseError::Unfit(format!(
            "it holds paths of another directory: {path}"
        ))),
        // Whose store it is shows with the first path.
        None => Err(DatabaseError::Unfit("it holds no path yet".to_owned())),
    }
}

/// Returns what tells one database file from another that was put in its place.
pub(super) fn identity(place: &Place) -> Option<(u64, u64)> {
    let metadata = std::fs::metadata(file(place)).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

fn file(place: &Place) -> PathBuf {
    place.state_dir.join("db").join("db.sqlite")
}

impl<'c> Database<'c> {
    /// Prepares the questions.
    pub(super) fn prepare(
        connection: &'c Connection,
        store_dir: StoreDir,
    ) -> Result<Self, DatabaseError> {
        Ok(Self {
            between: connection.prepare(&format!(
                "select {COLUMNS} from ValidPaths where path >= ?1 and path < ?2 order by path limit 1"
            ))?,
            exact: connection.prepare(&format!("select {COLUMNS} from ValidPaths where path = ?1"))?,
            references: connection.prepare(
                "select v.path from Refs r join ValidPaths v on v.id = r.reference where r.referrer = ?1",
            )?,
            connection,
            store_dir,
        })
    }

    /// Lets the answers from here to [`end`](Self::end) tell of one moment, at less cost each.
    pub(super) fn begin(&self) -> Result<(), DatabaseError> {
        Ok(self.connection.execute_batch("begin")?)
    }

    /// Ends what [`begin`](Self::begin) began.
    pub(super) fn end(&self) -> Result<(), DatabaseError> {
        if self.connection.is_autocommit() {
            return Ok(());
        }
        Ok(self.connection.execute_batch("commit")?)
    }

    /// Looks a path up by its hash part.
    pub(super) fn by_hash(
        &mut self,
        hash: StorePathHash,
    ) -> Result<Option<Registered>, DatabaseError> {
        let from = format!("{}/{hash}-", self.store_dir);
        // The next character after the dash, so that the range holds all names and nothing else.
        let to = format!("{}/{hash}.", self.store_dir);
        let found = self.between.query_row([&from, &to], Found::of).optional()?;
        found.map(|found| self.complete(found)).transpose()
    }

    /// Looks up exactly this path.
    pub(super) fn by_path(
        &mut self,
        path: &StorePath,
    ) -> Result<Option<Registered>, DatabaseError> {
        let path = self.store_dir.join(path);
        let found = self.exact.query_row([&path], Found::of).optional()?;
        found.map(|found| self.complete(found)).transpose()
    }

    fn complete(&mut self, found: Found) -> Result<Registered, DatabaseError> {
        let mut references = Vec::new();
        let mut rows = self.references.query([found.id])?;
        while let Some(row) = rows.next()? {
            let path = row.get_ref(0)?.as_str().ok();
            let path = path.and_then(|path| self.store_dir.parse(path).ok());
            references.push(path.ok_or_else(|| found.without("references"))?);
        }
        drop(rows);
        let mut info = PathInfo {
            path: self
                .store_dir
                .parse(&found.path)
                .map_err(|_| found.without("path"))?,
            nar_hash: NarHash::parse(&found.hash).map_err(|_| found.without("hash"))?,
            // Very old entries have none; the daemon knows what to do about them.
            nar_size: found
                .nar_size
                .and_then(|size| u64::try_from(size).ok())
                .filter(|size| *size > 0)
                .ok_or_else(|| found.without("narSize"))?,
            references,
            deriver: match found.deriver.as_deref() {
                None | Some("") => None,
                Some(deriver) => {
                    let deriver = self.store_dir.parse(deriver);
                    Some(deriver.map_err(|_| found.without("deriver"))?)
                }
            },
            // Malformed ones are dropped, as those that a daemon sends are.
            signatures: words(found.signatures.as_deref())
                .filter_map(|text| Signature::parse(text).ok())
                .collect(),
            ca: found.ca.as_deref().and_then(ContentAddress::parse),
        };
        info.normalize();
        Ok(Registered {
            info,
            registration_time: found.registration_time,
        })
    }
}

impl DatabaseError {
    /// Tells whether another question may well be answered.
    pub(super) fn is_passing(&self) -> bool {
        match self {
            Self::Row { .. } => true,
            Self::Unfit(_) => false,
            Self::Sqlite(error) => matches!(
                error.sqlite_error_code(),
                Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked)
            ),
        }
    }
}

/// A row of `ValidPaths`.
struct Found {
    id: i64,
    path: String,
    hash: String,
    registration_time: i64,
    deriver: Option<String>,
    nar_size: Option<i64>,
    signatures: Option<String>,
    ca: Option<String>,
}

impl Found {
    fn of(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            id: row.get(0)?,
            path: row.get(1)?,
            hash: row.get(2)?,
            registration_time: row.get(3)?,
            deriver: row.get(4)?,
            nar_size: row.get(5)?,
            signatures: row.get(6)?,
            ca: row.get(7)?,
        })
    }

    fn without(&self, column: &'static str) -> DatabaseError {
        DatabaseError::Row {
            path: self.path.clone(),
            column,
        }
    }
}

fn words(text: Option<&str>) -> impl Iterator<Item = &str> {
    text.unwrap_or_default().split_ascii_whitespace()
}

impl Place {
    /// Takes Nix's usual layout below a state directory and a store directory.
    pub fn new(state_dir: impl Into<PathBuf>, store_dir: StoreDir) -> Self {
        Self {
            state_dir: state_dir.into(),
            files_dir: Path::new(store_dir.as_str()).to_owned(),
            store_dir,
        }
    }

    /// Returns where the files of a path lie.
    pub(super) fn path(&self, path: &StorePath) -> PathBuf {
        self.files_dir.join(path.as_str())
    }
}

/// The only schema since Nix 2.0.
const SCHEMA: &str = "10";

const COLUMNS: &str = "id, path, hash, registrationTime, deriver, narSize, sigs, ca";

/// Nobody locks readers out for longer than it takes to recover a log after a crash.
const BUSY_TIMEOUT: Duration = Duration::from_millis(250);
