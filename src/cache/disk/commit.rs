//! Group commit: many whole NARs become entries at the cost of a few syncs.
//!
//! ```text
//! narinfos into temp files -> sync all -> rename NARs -> sync -> rename narinfos -> sync -> index
//! ```
//!
//! Whatever moment the process or the machine dies at, a narinfo in the folder has its NAR whole.

use std::fs::File;
use std::io::{self, Write as _};
use std::sync::atomic::Ordering;

use tokio::sync::oneshot;

use super::super::backend::{Error, NarFile, Record};
use super::folder::{self, Temp};
use super::index::Index;
use super::queue::Commit;
use super::resign;
use super::shared::Shared;
use super::text;

type Reply = oneshot::Sender<Result<NarFile, Error>>;

/// A commit whose narinfo is written, too.
struct Written {
    commit: Commit,
    narinfo: Temp,
    narinfo_file: File,
}

/// Makes entries of whole NARs and answers who waits.
///
/// Paths that come twice must come in different calls.
pub fn commit(shared: &Shared, index: Option<&Index>, commits: Vec<Commit>) {
    let mut written = Vec::with_capacity(commits.len());
    let mut joined = Vec::new();
    for mut commit in commits {
        match earlier(shared, &mut commit.record) {
            Earlier::None => {}
            Earlier::Kept(file) => {
                drop((commit.temp, commit.reservation));
                joined.push((commit.record, file, commit.reply));
                continue;
            }
            Earlier::Diverges => {
                drop((commit.temp, commit.reservation));
                _ = commit.reply.send(Err(Error::Diverges));
                continue;
            }
        }
        sign_anew(shared, &mut commit);
        let narinfo = shared.folder.create_temp("narinfo");
        let narinfo = narinfo.and_then(|(temp, mut file)| {
            file.write_all(commit.narinfo.as_bytes())?;
            Ok((temp, file))
        });
        match narinfo {
            Ok((narinfo, narinfo_file)) => written.push(Written {
                commit,
                narinfo,
                narinfo_file,
            }),
            Err(error) => refuse(shared, commit.reply, "writing a narinfo", error),
        }
    }
    if let Err(error) = sync(shared, &written) {
        for written in written {
            let error = io::Error::from(error.kind());
            refuse(shared, written.commit.reply, "syncing a nar", error);
        }
        return;
    }
    let named = rename(shared, written);
    list(shared, index, named, joined);
}

/// Has a fill that began before the keys or the trust changed carry the signatures of today, if any.
fn sign_anew(shared: &Shared, commit: &mut Commit) {
    let changed = shared.signing().filter(|signing| signing.generation > 1);
    if let Some(signing) = changed {
        let made = (signing.sign)(&commit.record).unwrap_or_default();
        let signed = resign::signed(&commit.record, made);
        commit.narinfo = text::of_record(&signed, &shared.options.store_dir);
    }
}

enum Earlier {
    None,
    Kept(NarFile),
    Diverges,
}

/// Looks for an entry of the same path, and joins what is known of it.
fn earlier(shared: &Shared, record: &mut Record) -> Earlier {
    let Some(known) = shared.known(record.info.path.hash()) else {
        return Earlier::None;
    };
    let same = known.info.nar_hash == record.info.nar_hash;
    let whole = known.name().zip(known.file).filter(|(name, file)| {
        let opened = shared.folder.open_nar(name);
        opened.is_ok_and(|(_, size)| size == file.size_bytes)
    });
    match whole {
        Some(_) if !same => Earlier::Diverges,
        Some((_, file)) => {
            let new = std::mem::replace(record, known);
            record.join(new);
            Earlier::Kept(file)
        }
        None => {
            if same {
                let file = record.file;
                let new = std::mem::replace(record, known);
                record.join(new);
                record.file = file;
            }
            Earlier::None
        }
    }
}

/// Waits until NARs and narinfos are on disk: one by one while they are few, else all at once.
fn sync(shared: &Shared, written: &[Written]) -> io::Result<()> {
    let alone = |written: &Written| {
        if let (false, Some(path)) = (written.commit.synced, written.commit.temp.path()) {
            File::open(path)?.sync_data()?;
        }
        written.narinfo_file.sync_data()
    };
    if written.len() <= ALONE_MAX {
        written.iter().try_for_each(alone)
    } else {
        shared.folder.sync_all()
    }
}

/// Gives the files their lasting names, NARs first; returns those that have both.
fn rename(shared: &Shared, written: Vec<Written>) -> Vec<(Commit, Record)> {
    let folder = &shared.folder;
    let mut with_nar = Vec::with_capacity(written.len());
    for Written {
        mut commit,
        narinfo,
        ..
    } in written
    {
        let Some(name) = commit.record.name() else {
            continue;
        };
        let temp = std::mem::take(&mut commit.temp);
        match temp.rename(&folder.nar(&name)) {
            Ok(()) => with_nar.push((commit, narinfo, name)),
            Err(error) => refuse(shared, commit.reply, "naming a nar", error),
        }
    }
    let synced = folder.sync_nars();
    let mut named = Vec::with_capacity(with_nar.len());
    for (commit, narinfo, name) in with_nar {
        let to = folder.narinfo(name.path_hash);
        let done = match &synced {
            Ok(()) => narinfo.rename(&to),
            Err(error) => Err(io::Error::from(error.kind())),
        };
        match done {
            Ok(()) => {
                let record = commit.record.clone();
                named.push((commit, record));
            }
            Err(error) => {
                _ = folder::remove(&folder.nar(&name));
                refuse(shared, commit.reply, "naming a narinfo", error);
            }
        }
    }
    if let Err(error) = folder.sync_root() {
        shared.note_failure("syncing the folder", &error);
    }
    named
}

/// Puts entries into the index and answers.
fn list(
    shared: &Shared,
    index: Option<&Index>,
    named: Vec<(Commit, Record)>,
    joined: Vec<(Record, NarFile, Reply)>,
) {
    if named.is_empty() && joined.is_empty() {
        return;
    }
    let listed = index.map(|index| {
        index.write(|changes| {
            for (record, ..) in &joined {
                changes.put(record, shared.tick())?;
            }
            for (commit, record) in &named {
                changes.put(record, shared.tick())?;
                changes.stamp(record.info.path.hash(), commit.stamp)?;
            }
            Ok(changes.totals())
        })
    });
    match listed {
        Some(Ok(totals)) => shared.set_totals(totals),
        // The folder has them; they are listed when there is an index again.
        Some(Err(error)) => shared.index_failed(&error),
        None => {}
    }
    for (_, file, reply) in joined {
        _ = reply.send(Ok(file));
    }
    let fills = &shared.counts.fills;
    fills.fetch_add(named.len() as u64, Ordering::Relaxed);
    for (commit, _) in named {
        let Some(file) = commit.record.file else {
            continue;
        };
        // Only now, so that the bytes are counted all the time.
        drop(commit.reservation);
        _ = commit.reply.send(Ok(file));
    }
}

fn refuse(shared: &Shared, reply: Reply, what: &str, source: io::Error) {
    let what = format!("{what} in {}", shared.folder.root().display());
    shared.note_failure(&what, &source);
    _ = reply.send(Err(Error::Io { what, source }));
}

/// More files than this are synced together, with all else on the file system.
const ALONE_MAX: usize = 3;
