//! What was found, for people and as JSON.
//!
//! ```text
//! NAME: failed
//!   ok       the checks that passed, in one line
//!   failed   CHECK: what was seen
//!            -> what to do
//!   skipped  the checks that rest on those
//! ```

use serde_json::{Value, json};

use super::finding::{Finding, Outcome, Subject};
use crate::cli::page::{Page, Tone};

pub(super) fn to_text(subjects: &[Subject], verbose: bool) -> String {
    let mut page = Page::for_stdout();
    for subject in subjects {
        let failed = subject
            .findings
            .iter()
            .any(|f| f.outcome == Outcome::Failed);
        let outcome = if failed { Outcome::Failed } else { Outcome::Ok };
        let head = format!("{}: {}", subject.name, outcome.word());
        page.line(0, &head, outcome.tone());
        if !verbose {
            summary(&mut page, subject, Outcome::Ok);
        }
        for finding in &subject.findings {
            let told = matches!(finding.outcome, Outcome::Failed | Outcome::Note);
            if told || verbose {
                detail(&mut page, finding, verbose);
            }
        }
        if !verbose {
            summary(&mut page, subject, Outcome::Skipped);
        }
        page.gap();
    }
    let all: usize = subjects.iter().map(|subject| subject.findings.len()).sum();
    let (failed, skipped) = (
        count(subjects, Outcome::Failed),
        count(subjects, Outcome::Skipped),
    );
    let rest = match skipped {
        0 => String::new(),
        skipped => format!(", {skipped} could not be made"),
    };
    let (line, tone) = match failed {
        0 => (format!("all well: {all} checks{rest}"), Tone::Good),
        failed => (format!("{failed} of {all} checks failed{rest}"), Tone::Bad),
    };
    page.line(0, &line, tone);
    page.into_text()
}

/// Names the checks of one outcome in one line.
fn summary(page: &mut Page, subject: &Subject, outcome: Outcome) {
    let with = subject.findings.iter().filter(|f| f.outcome == outcome);
    let mut names: Vec<_> = with.map(|finding| finding.check).collect();
    names.dedup();
    if !names.is_empty() {
        let line = format!("{:<8} {}", outcome.word(), names.join(", "));
        page.item(2, REMEDY_INDENT, &line, outcome.tone());
    }
}

fn detail(page: &mut Page, finding: &Finding, verbose: bool) {
    let Finding {
        check,
        outcome,
        seen,
        ..
    } = finding;
    let line = format!("{:<8} {check}: {seen}", outcome.word());
    page.item(2, REMEDY_INDENT, &line, outcome.tone());
    if let Some(remedy) = &finding.remedy {
        let line = format!("-> {remedy}");
        page.item(REMEDY_INDENT, REMEDY_INDENT + 3, &line, Tone::Plain);
    }
    match &finding.words {
        Some(words) if verbose => {
            for line in words.lines() {
                page.line(
                    REMEDY_INDENT,
                    &format!("| {}", line.trim_end()),
                    Tone::Faint,
                );
            }
        }
        Some(_) if *outcome == Outcome::Failed => {
            page.line(REMEDY_INDENT, "(all that ssh said: -v)", Tone::Faint);
        }
        _ => {}
    }
}

pub(super) fn to_json(subjects: &[Subject]) -> Value {
    let finding = |finding: &Finding| {
        json!({
            "check": finding.check,
            "outcome": finding.outcome.word(),
            "seen": finding.seen,
            "remedy": finding.remedy,
            "words": finding.words,
        })
    };
    let subject = |subject: &Subject| {
        json!({
            "name": subject.name,
            "kind": subject.kind,
            "checks": subject.findings.iter().map(finding).collect::<Value>(),
        })
    };
    json!({
        "ok": count(subjects, Outcome::Failed) == 0,
        "failed": count(subjects, Outcome::Failed),
        "subjects": subjects.iter().map(subject).collect::<Value>(),
    })
}

pub(super) fn count(subjects: &[Subject], outcome: Outcome) -> usize {
    let findings = subjects.iter().flat_map(|subject| &subject.findings);
    findings
        .filter(|finding| finding.outcome == outcome)
        .count()
}

const REMEDY_INDENT: usize = 11;
