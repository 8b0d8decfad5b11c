//! The receiving side: what a fed store has, and whether that is fresh enough to say "no".
//!
//! ```text
//! void --begin--> loading --beat--> whole --beat older than a second--> whole, but says nothing
//!  ^-- feed ended, or it contradicts itself --'
//! ```
//!
//! A heartbeat counts from when it was sent: one that was held up on its way is as old as the
//! sender's clock says, measured against the quickest of the last minute.

use std::time::{Duration, Instant};

use super::set::HashSet;
use super::wire::{Beat, FeedError, Frame};
use crate::nix::store_path::{StoreDir, StorePathHash};

/// A fed store as it is known here.
#[derive(Clone, Debug)]
pub struct View {
    store_dir: StoreDir,
    options: Options,
    paths: HashSet,
    stage: Stage,
    /// When the last heartbeat was sent, by our clock.
    known_at: Option<Instant>,
    lag: Lag,
}

/// The bounds of a view.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// A heartbeat older than this says nothing any more. Heartbeats come four times as often.
    pub fresh: Duration,
    /// Paths of one store: 22 bytes each. A feed of more is refused.
    pub paths_max: usize,
}

/// What is known of a path without asking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Says {
    /// The store does not have it.
    No,
    /// The store has it, or had a moment ago.
    Yes,
    /// Ask the store.
    Nothing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Void,
    Loading,
    Whole,
}

/// How long heartbeats are on their way, clocks being what they are.
#[derive(Clone, Copy, Debug)]
struct Lag {
    base: Option<Instant>,
    /// The smallest difference between the clocks in this window of time, and in the last.
    current: Option<i128>,
    last: Option<i128>,
    window_began: Option<Instant>,
}

impl View {
    /// Knows nothing yet of a store whose paths lie in this directory.
    pub fn new(store_dir: StoreDir, options: Options) -> Self {
        Self {
            store_dir,
            options,
            paths: HashSet::new(),
            stage: Stage::Void,
            known_at: None,
            lag: Lag::NONE,
        }
    }

    /// Takes in a frame that came now; after an error the feed is to be left.
    pub fn apply(&mut self, frame: Frame, now: Instant) -> Result<(), FeedError> {
        match (frame, self.stage) {
            (Frame::Begin { store_dir }, _) => {
                self.clear();
                if store_dir != self.store_dir.as_str() {
                    return Err(FeedError::Mismatch("its store is another directory"));
                }
                self.stage = Stage::Loading;
            }
            (_, Stage::Void) => return Err(FeedError::Mismatch("it has no beginning")),
            (Frame::Paths(_), Stage::Whole) => {
                return Err(FeedError::Mismatch("it goes on after its end"));
            }
            (Frame::Paths(hashes) | Frame::Added(hashes), _) => {
                for hash in hashes {
                    self.paths.insert(hash);
                    if self.paths.is_skewed_at(&hash) {
                        self.clear();
                        return Err(FeedError::Mismatch("its paths are no hashes"));
                    }
                }
                if self.paths.len() > self.options.paths_max {
                    self.clear();
                    return Err(FeedError::Mismatch("it has more paths than are taken"));
                }
            }
            (Frame::Removed(hashes), _) => {
                for hash in &hashes {
                    self.paths.remove(hash);
                }
            }
            (Frame::Beat(beat), _) => self.beat(beat, now)?,
        }
        Ok(())
    }

    /// Forgets all: the feed has ended.
    pub fn clear(&mut self) {
        self.paths = HashSet::new();
        self.stage = Stage::Void;
        self.known_at = None;
        self.lag = Lag::NONE;
    }

    /// Tells what is known of a path at this moment.
    pub fn says(&self, hash: &StorePathHash, now: Instant) -> Says {
        match self.is_fresh(now) {
            false => Says::Nothing,
            true if self.paths.contains(hash) => Says::Yes,
            true => Says::No,
        }
    }

    /// Tells whether the whole is known, and as of now.
    pub fn is_fresh(&self, now: Instant) -> bool {
        let young = |at| now.saturating_duration_since(at) < self.options.fresh;
        self.stage == Stage::Whole && self.known_at.is_some_and(young)
    }

    /// Returns what the store has, as far as it was fed.
    pub fn paths(&self) -> &HashSet {
        &self.paths
    }

    fn beat(&mut self, beat: Beat, now: Instant) -> Result<(), FeedError> {
        let same = beat.count == self.paths.len() as u64 && beat.checksum == self.paths.checksum();
        if !same {
            self.clear();
            return Err(FeedError::Mismatch("the heartbeat counts other paths"));
        }
        self.stage = Stage::Whole;
        let late = self.lag.of(beat.clock_ms, now);
        self.known_at = now.checked_sub(late);
        Ok(())
    }
}

impl Lag {
    const NONE: Self = Self {
        base: None,
        current: None,
        last: None,
        window_began: None,
    };

    /// Returns how much later than the quickest this heartbeat came.
    fn of(&mut self, clock_ms: u64, now: Instant) -> Duration {
        let base = *self.base.get_or_insert(now);
        let began = *self.window_began.get_or_insert(now);
        if now.saturating_duration_since(began) >= WINDOW {
            // Two clocks drift apart by less than a millisecond meanwhile.
            self.last = self.current.take();
            self.window_began = Some(now);
        }
        let here = i128::try_from(now.saturating_duration_since(base).as_millis());
        let difference = here.unwrap_or(i128::MAX / 2) - i128::from(clock_ms);
        let least = self
            .current
            .map_or(difference, |least| least.min(difference));
        self.current = Some(least);
        let least = self.last.map_or(least, |last| last.min(least));
        Duration::from_millis(u64::try_from(difference - least).unwrap_or(u64::MAX))
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            fresh: Duration::from_secs(1),
            paths_max: 4_000_000,
        }
    }
}

const WINDOW: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::codec::catalog::source::{Feeder, Source};
    use crate::codec::catalog::wire::Decoder;

    fn hash(n: u16) -> StorePathHash {
        let mut bytes = [7; 20];
        bytes[..2].copy_from_slice(&n.wrapping_mul(257).to_be_bytes());
        bytes[18..].copy_from_slice(&n.to_be_bytes());
        StorePathHash(bytes)
    }

    fn view() -> View {
        View::new(StoreDir::default(), Options::default())
    }

    /// One reader of a feed.
    struct Reader {
        feeder: Feeder,
        decoder: Decoder,
        view: View,
    }

    impl Reader {
        fn new() -> Self {
            Self {
                feeder: Feeder::new(),
                decoder: Decoder::default(),
                view: view(),
            }
        }

        /// Hands on at most so many pieces.
        fn read(&mut self, source: &Source, pieces: usize, now: Instant) {
            for _ in 0..pieces {
                let Some(bytes) = self.feeder.next(source) else {
                    return;
                };
                assert!(bytes.len() < 140_000);
                let view = &mut self.view;
                let applied = self.decoder.push(&bytes, |frame| view.apply(frame, now));
                applied.unwrap();
            }
        }
    }

    #[test]
    fn a_feed_of_what_chance_would_not_bring_is_refused() {
        let now = Instant::now();
        let feed = |same: usize| {
            let mut view = view();
            let store_dir = StoreDir::default().as_str().to_owned();
            view.apply(Frame::Begin { store_dir }, now).unwrap();
            let mut random = fastrand::Rng::with_seed(1);
            let hashes = std::iter::repeat_with(|| {
                let mut hash = [0; 20];
                random.fill(&mut hash[same..]);
                StorePathHash(hash)
            });
            view.apply(Frame::Paths(hashes.take(100_000).collect()), now)
        };
        assert!(feed(0).is_ok());
        assert!(feed(2).is_err());
    }

    proptest! {
        /// However changes and reading interleave, whoever has caught up knows the same.
        #[test]
        fn every_reader_ends_with_what_the_store_has(
            first in prop::collection::vec(0..500_u16, 0..300),
            steps in prop::collection::vec((0..500_u16, any::<bool>(), 0..4_usize), 0..300),
            rescans in prop::collection::vec(0..500_u16, 0..50),
        ) {
            let now = Instant::now();
            let mut source = Source::new(StoreDir::default());
            source.replace(first.iter().map(|n| hash(*n)).collect());
            source.confirm(1);
            let mut readers = [Reader::new(), Reader::new()];
            for (place, (n, add, pieces)) in steps.iter().enumerate() {
                if *add { source.add(hash(*n)) } else { source.remove(&hash(*n)) }
                if place % 3 == 0 { source.confirm(place as u64 + 2) }
                readers[place % 2].read(&source, *pieces, now);
            }
            source.replace(rescans.iter().map(|n| hash(*n)).collect());
            source.confirm(u64::MAX);
            for reader in &mut readers {
                reader.read(&source, usize::MAX, now);
                prop_assert!(reader.view.paths() == source.paths());
                prop_assert!(reader.view.is_fresh(now));
            }
        }

        /// Foreign frames in any order never lead to a "no" that no heartbeat vouched for.
        #[test]
        fn no_order_of_frames_says_no_before_the_whole_is_there(
            kinds in prop::collection::vec((0..4_u8, 0..20_u16), 0..40),
        ) {
            let now = Instant::now();
            let mut view = view();
            let mut told = false;
            for (kind, n) in kinds {
                let frame = match kind {
                    0 => Frame::Begin { store_dir: "/nix/store".into() },
                    1 => Frame::Paths(vec![hash(n)]),
                    2 => Frame::Removed(vec![hash(n)]),
                    _ => Frame::Beat(Beat {
                        count: view.paths().len() as u64,
                        checksum: view.paths().checksum(),
                        clock_ms: 0,
                    }),
                };
                let beat = matches!(frame, Frame::Beat(_));
                let begin = matches!(frame, Frame::Begin { .. });
                let applied = view.apply(frame, now);
                told = !begin && (told || (beat && applied.is_ok()));
                if !told {
                    prop_assert_eq!(view.says(&hash(999), now), Says::Nothing);
                }
            }
        }
    }

    fn fed() -> (Source, Reader, Instant) {
        let mut source = Source::new(StoreDir::default());
        source.replace([hash(1)].into_iter().collect());
        source.confirm(1000);
        let mut reader = Reader::new();
        let now = Instant::now();
        reader.read(&source, usize::MAX, now);
        (source, reader, now)
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn no_is_said_while_the_heartbeat_is_younger_than_a_second() {
        let (mut source, mut reader, now) = fed();
        assert_eq!(reader.view.says(&hash(1), now), Says::Yes);
        assert_eq!(reader.view.says(&hash(2), now), Says::No);
        let later = now + Duration::from_millis(999);
        assert_eq!(reader.view.says(&hash(2), later), Says::No);
        for hash in [hash(1), hash(2)] {
            assert_eq!(reader.view.says(&hash, now + SECOND), Says::Nothing);
        }
        source.confirm(2000);
        reader.read(&source, usize::MAX, now + SECOND);
        assert_eq!(reader.view.says(&hash(2), now + SECOND), Says::No);

        // What the store cannot tell is not told.
        source.doubt();
        reader.read(&source, usize::MAX, now + 2 * SECOND);
        assert_eq!(reader.view.says(&hash(2), now + 2 * SECOND), Says::Nothing);
    }

    /// A feed that was held up and then comes all at once is as old as it is.
    #[test]
    fn late_heartbeats_are_not_young() {
        let (mut source, mut reader, now) = fed();
        // Sent one second after the first, here after five.
        source.confirm(2000);
        let five = now + 5 * SECOND;
        reader.read(&source, usize::MAX, five);
        assert_eq!(reader.view.says(&hash(2), five), Says::Nothing);
        source.confirm(5900);
        reader.read(&source, usize::MAX, five);
        assert_eq!(reader.view.says(&hash(2), five), Says::No);
        let after = five + Duration::from_millis(950);
        assert_eq!(reader.view.says(&hash(2), after), Says::Nothing);
    }

    #[test]
    fn clocks_that_drift_are_followed() {
        let (mut source, mut reader, now) = fed();
        // The sender's clock loses a part in a thousand for ten minutes.
        for quarter in 1..2400_u64 {
            let at = now + Duration::from_millis(quarter * 250);
            source.confirm(1000 + quarter * 250 - quarter / 4);
            reader.read(&source, usize::MAX, at);
            assert_eq!(reader.view.says(&hash(2), at), Says::No, "{quarter}");
        }
    }

    #[test]
    fn a_heartbeat_that_counts_otherwise_ends_the_feed() {
        let (source, mut reader, now) = fed();
        let beat = Beat {
            count: 1,
            checksum: source.paths().checksum() + 1,
            clock_ms: 1001,
        };
        assert!(reader.view.apply(Frame::Beat(beat), now).is_err());
        assert_eq!(reader.view.says(&hash(2), now), Says::Nothing);
        let elsewhere = Frame::Begin {
            store_dir: "/other".into(),
        };
        assert!(view().apply(elsewhere, now).is_err());
    }

    #[test]
    fn a_reader_that_falls_behind_begins_anew() {
        let (mut source, mut reader, now) = fed();
        for round in 0..120_u32 {
            for n in 0..1000 {
                match round % 2 {
                    0 => source.add(hash(n + 10)),
                    _ => source.remove(&hash(n + 10)),
                }
            }
        }
        source.confirm(1100);
        reader.read(&source, usize::MAX, now);
        assert!(reader.view.paths() == source.paths());
        assert!(reader.view.is_fresh(now));
    }
}
