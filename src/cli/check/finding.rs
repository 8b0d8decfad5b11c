//! What one check found, and what to do about it.

use super::super::page::Tone;

/// What came of one check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// As it should be.
    Ok,
    /// It works, and something is worth knowing.
    Note,
    /// It does not work.
    Failed,
    /// It could not be checked, because of something before it or by its nature.
    Skipped,
}

/// One line of the report.
#[derive(Clone, Debug)]
pub(super) struct Finding {
    /// What was checked: one of the check's fixed names.
    pub(super) check: &'static str,
    pub(super) outcome: Outcome,
    /// What was seen.
    pub(super) seen: String,
    /// What the operator can do.
    pub(super) remedy: Option<String>,
    /// All that a program said, where that is more.
    pub(super) words: Option<String>,
}

/// The findings about one machine, store, or this side.
#[derive(Clone, Debug)]
pub(super) struct Subject {
    /// Its name; that of an upstream is its own.
    pub(super) name: String,
    /// What kind it is: `upstream`, `this side` or `machines file`.
    pub(super) kind: &'static str,
    pub(super) findings: Vec<Finding>,
}

impl Finding {
    pub(super) fn ok(check: &'static str, seen: impl Into<String>) -> Self {
        Self::new(check, Outcome::Ok, seen)
    }

    pub(super) fn note(check: &'static str, seen: impl Into<String>) -> Self {
        Self::new(check, Outcome::Note, seen)
    }

    pub(super) fn failed(check: &'static str, seen: impl Into<String>) -> Self {
        Self::new(check, Outcome::Failed, seen)
    }

    pub(super) fn skipped(check: &'static str, seen: impl Into<String>) -> Self {
        Self::new(check, Outcome::Skipped, seen)
    }

    pub(super) fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }

    pub(super) fn words(mut self, words: &str) -> Self {
        self.words = Some(words.to_owned()).filter(|words| !words.trim().is_empty());
        self
    }

    fn new(check: &'static str, outcome: Outcome, seen: impl Into<String>) -> Self {
        Self {
            check,
            outcome,
            seen: seen.into(),
            remedy: None,
            words: None,
        }
    }
}

impl Subject {
    /// Begins with nothing found.
    pub(super) fn new(name: impl Into<String>, kind: &'static str) -> Self {
        Self {
            name: name.into(),
            kind,
            findings: Vec::new(),
        }
    }

    pub(super) fn add(&mut self, finding: Finding) {
        self.findings.push(finding);
    }

    /// Says of all these checks that they had to be left out.
    pub(super) fn skip(&mut self, checks: &[&'static str], why: &str) {
        for check in checks {
            self.add(Finding::skipped(check, why));
        }
    }
}

impl Outcome {
    /// Returns its word, in the table and in JSON.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Failed => "failed",
            Self::Skipped => "skipped",
        }
    }

    pub(super) fn tone(self) -> Tone {
        match self {
            Self::Ok => Tone::Good,
            Self::Note => Tone::Doubtful,
            Self::Failed => Tone::Bad,
            Self::Skipped => Tone::Faint,
        }
    }
}
