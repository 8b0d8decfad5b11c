//! How far it is: a bar for each store on a terminal, lines of text elsewhere; on standard error.

use std::io::{self, IsTerminal as _, Write as _};
use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use tokio::time::{MissedTickBehavior, interval};

use crate::app::sign_all::{Phase, Progress, Store};
use crate::upstream::signing::Mode;
use crate::upstream::signing::tally::Counts;

/// Shows the stores until it is dropped.
pub(super) async fn show(stores: &[Arc<Store>], mode: Mode) {
    if io::stderr().is_terminal() {
        bars(stores).await;
    } else {
        lines(stores, mode).await;
    }
}

/// Writes a line to standard error; with nobody to read it, there is nobody to tell.
pub(super) fn say(line: &str) {
    _ = writeln!(io::stderr().lock(), "{line}");
}

async fn bars(stores: &[Arc<Store>]) {
    let bars = Bars::new(stores);
    let mut ticks = interval(REDRAWN_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        for (store, bar) in stores.iter().zip(&bars.list) {
            let (progress, counts) = (store.progress(), store.tally.counts());
            bar.set_length(counts.paths.max(1));
            bar.set_position(counts.settled());
            bar.set_message(words(&progress, &counts));
        }
    }
}

/// The bars; their last state stays on the screen when dropped.
struct Bars {
    _all: MultiProgress,
    list: Vec<ProgressBar>,
}

impl Bars {
    fn new(stores: &[Arc<Store>]) -> Self {
        let all = MultiProgress::new();
        let style = ProgressStyle::with_template("{prefix}  {bar:24}  {msg}");
        let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
        let width = stores.iter().map(|store| store.name.chars().count()).max();
        let width = width.unwrap_or(0);
        let bar = |store: &Arc<Store>| {
            let bar = all.add(ProgressBar::new(1).with_style(style.clone()));
            bar.set_prefix(format!("{:width$}", store.name));
            bar
        };
        Self {
            list: stores.iter().map(bar).collect(),
            _all: all,
        }
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        for bar in &self.list {
            bar.abandon();
        }
    }
}

async fn lines(stores: &[Arc<Store>], mode: Mode) {
    let mut shown: Vec<(Phase, Instant)> = stores
        .iter()
        .map(|_| (Phase::Waiting, Instant::now()))
        .collect();
    let mut ticks = interval(REDRAWN_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        for (store, (phase, at)) in stores.iter().zip(&mut shown) {
            let (progress, counts) = (store.progress(), store.tally.counts());
            let news = progress.phase != *phase && worth_a_line(&progress.phase, mode);
            let due = progress.phase == Phase::Signing && at.elapsed() >= LINE_EVERY;
            if news || due {
                say(&format!("{}: {}", store.name, words(&progress, &counts)));
                *at = Instant::now();
            }
            *phase = progress.phase;
        }
    }
}

fn worth_a_line(phase: &Phase, mode: Mode) -> bool {
    match phase {
        Phase::Failed(_) => true,
        Phase::Signing => mode == Mode::Sign,
        Phase::Waiting | Phase::Preparing | Phase::Ready | Phase::Done | Phase::Stopped => false,
    }
}

fn words(progress: &Progress, counts: &Counts) -> String {
    match &progress.phase {
        Phase::Waiting => "waits for its turn".to_owned(),
        Phase::Preparing => "logging in".to_owned(),
        Phase::Ready => format!("{} paths", counts.paths),
        Phase::Signing => {
            let elapsed = progress.began.map(|began| began.elapsed());
            going(counts, elapsed.unwrap_or_default())
        }
        Phase::Done => format!("done, {} signed", counts.signed),
        Phase::Stopped => format!("stopped at {} of {}", counts.settled(), counts.paths),
        Phase::Failed(error) => format!("cannot be signed: {error}"),
    }
}

/// `12000 of 100000 paths, 8000/s, 11 s left`
fn going(counts: &Counts, elapsed: Duration) -> String {
    let (settled, paths) = (counts.settled(), counts.paths);
    let mut text = format!("{settled} of {paths} paths");
    let seconds = elapsed.as_secs_f64();
    if settled > 0 && seconds > 0.0 {
        #[expect(
            clippy::cast_precision_loss,
            reason = "a rate for people; counts are below 2^53"
        )]
        let (done, left) = (settled as f64, paths.saturating_sub(settled) as f64);
        let rate = done / seconds;
        text.push_str(&format!(", {rate:.0}/s, {} left", time_left(left / rate)));
    }
    text
}

fn time_left(seconds: f64) -> String {
    let all = seconds.ceil();
    let (minutes, seconds) = ((all / 60.0).floor(), all % 60.0);
    if minutes >= 1.0 {
        format!("{minutes:.0} min {seconds:.0} s")
    } else {
        format!("{seconds:.0} s")
    }
}

const REDRAWN_EVERY: Duration = Duration::from_millis(100);

/// A log is not filled by a store of millions.
const LINE_EVERY: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_and_time_left_are_told() {
        let counts = Counts {
            paths: 100_000,
            signed: 11_000,
            signed_already: 1000,
            ..Counts::default()
        };
        assert_eq!(
            going(&counts, Duration::from_millis(1500)),
            "12000 of 100000 paths, 8000/s, 11 s left"
        );
        assert_eq!(
            going(&counts, Duration::from_secs(100)),
            "12000 of 100000 paths, 120/s, 12 min 14 s left"
        );
        assert_eq!(
            going(&Counts::default(), Duration::from_secs(1)),
            "0 of 0 paths"
        );
    }
}
