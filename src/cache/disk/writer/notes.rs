//! What the index is told of look-ups: what upstreams said, what they deny, and to forget all of it.

use tracing::warn;

use super::super::super::backend::Record;
use super::super::index::{Changes, Index, IndexError};
use super::super::queue::Denial;
use super::Writer;

/// What upstreams said of a path.
pub(super) enum Note {
    /// They have it.
    Said(Record),
    /// They do not have it.
    Denied(Denial),
}

impl Writer {
    /// Puts down what was said, in its order and by one write, and keeps no more look-ups than are wanted.
    pub(super) fn note(&self, index: Option<&Index>, notes: Vec<Note>) {
        if notes.is_empty() {
            return;
        }
        let written = index.is_some_and(|index| {
            self.change(index, |changes| {
                for note in &notes {
                    match note {
                        Note::Said(record) => self.remember(changes, record.clone())?,
                        Note::Denied(denial) => self.deny(changes, denial)?,
                    }
                }
                while changes.totals().look_ups > self.shared.options.look_ups_max {
                    let Some(hash) = changes.oldest_look_up()? else {
                        break;
                    };
                    changes.remove(hash)?;
                }
                Ok(())
            })
        });
        let mut look_ups = Vec::with_capacity(notes.len());
        for note in notes {
            match note {
                Note::Said(record) => look_ups.push(record.info.path.hash()),
                Note::Denied(denial) => {
                    if !written {
                        self.shared.denials.lose();
                    }
                    self.shared.denials.done(&denial);
                }
            }
        }
        self.shared.queue.written(&look_ups);
    }

    fn remember(&self, changes: &mut Changes<'_>, mut record: Record) -> Result<(), IndexError> {
        record.file = None;
        let hash = record.info.path.hash();
        let mut used = None;
        if let Some(mut known) = changes.get(hash)? {
            if known.info.nar_hash == record.info.nar_hash {
                known.join(record);
                record = known;
                // A NAR is used when somebody fetches it.
                used = changes.last_use(hash)?.filter(|_| record.file.is_some());
            } else if known.file.is_some() {
                return Ok(());
            }
        }
        changes.put(&record, used.unwrap_or_else(|| self.shared.tick()))
    }

    fn deny(&self, changes: &mut Changes<'_>, denial: &Denial) -> Result<(), IndexError> {
        let Some(mut record) = changes.get(denial.hash)? else {
            return Ok(());
        };
        if !record.deny(denial.nar_hash, &denial.upstreams) {
            return Ok(());
        }
        if record.grounds.is_empty() {
            return changes.remove(denial.hash);
        }
        let used = changes.last_use(denial.hash)?;
        changes.put(&record, used.unwrap_or_else(|| self.shared.tick()))
    }

    /// Forgets all look-ups, because it is not known which of them were denied; without an index it stays due.
    pub(super) fn sweep(&self, sweep: u64) {
        let Some(index) = self.shared.index() else {
            return;
        };
        let mut forgotten = 0;
        loop {
            let before = forgotten;
            let written = self.change(&index, |changes| {
                while forgotten < before + SWEPT_AT_ONCE_MAX
                    && let Some(hash) = changes.oldest_look_up()?
                {
                    changes.remove(hash)?;
                    forgotten += 1;
                }
                Ok(())
            });
            if !written {
                return;
            }
            if forgotten < before + SWEPT_AT_ONCE_MAX {
                break;
            }
        }
        self.shared.denials.swept(sweep);
        if forgotten > 0 {
            warn!(
                look_ups = forgotten,
                "denials came faster than they could be written, or could not be written; the look-ups on disk are forgotten"
            );
        }
    }
}

/// Bounds the memory of one write.
const SWEPT_AT_ONCE_MAX: usize = 10_000;
