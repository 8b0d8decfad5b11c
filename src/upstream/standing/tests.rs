use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use futures_util::future::join_all;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::sleep;

use super::*;
use crate::nix::store_path::StorePathHash;
use crate::upstream::wire::{Purpose, Wire};

/// A way that leads nowhere: it fails after a while, or never.
struct Nowhere {
    dials: AtomicUsize,
    fails_after: Option<Duration>,
}

#[async_trait]
impl Dial for Nowhere {
    async fn dial(&self, purpose: Purpose) -> Result<Wire, Error> {
        assert_eq!(purpose, Purpose::Lookup);
        self.dials.fetch_add(1, Ordering::Relaxed);
        match self.fails_after {
            Some(after) => sleep(after).await,
            None => std::future::pending().await,
        }
        Err(Error::Down("no way".into()))
    }
}

fn start(fails_after: Option<Duration>) -> (Arc<Nowhere>, Standing) {
    let dials = AtomicUsize::new(0);
    let dial = Arc::new(Nowhere { dials, fails_after });
    let options = StandingOptions::default();
    let standing = Standing::start("nowhere".into(), dial.clone(), options);
    (dial, standing)
}

async fn ask(standing: &Standing) -> Result<Reply, Error> {
    let hash = StorePathHash([0; 20]);
    standing.ask(Request::QueryPathFromHashPart(hash)).await
}

#[tokio::test(start_paused = true)]
async fn questions_wait_for_the_first_attempt_and_fail_at_once_afterwards() {
    let (dial, standing) = start(Some(Duration::from_secs(3)));
    let begun = Instant::now();
    let error = ask(&standing).await.unwrap_err();
    assert!(
        matches!(&error, Error::Down(text) if &**text == "no way"),
        "{error}"
    );
    assert_eq!(begun.elapsed().as_secs(), 3);
    // Also while later attempts are under way.
    for _ in 0..200 {
        let asked = Instant::now();
        assert!(ask(&standing).await.is_err());
        assert!(ask_many_fails(&standing).await);
        assert_eq!(asked.elapsed(), Duration::ZERO);
        sleep(Duration::from_secs(3)).await;
    }
    // Ten minutes of pauses that double from a quarter of a second to half a minute.
    let dials = dial.dials.load(Ordering::Relaxed);
    assert!((15..35).contains(&dials), "{dials}");
}

async fn ask_many_fails(standing: &Standing) -> bool {
    let question = Request::QueryPathFromHashPart(StorePathHash([0; 20]));
    let answers = standing.ask_many(vec![question; 3]).await;
    answers.len() == 3 && answers.iter().all(Result::is_err)
}

#[tokio::test(start_paused = true)]
async fn silence_is_bounded_by_the_connect_timeout() {
    let (_, standing) = start(None);
    let begun = Instant::now();
    let error = ask(&standing).await.unwrap_err();
    assert!(
        error.to_string().contains("no greeting within 10s"),
        "{error}"
    );
    assert_eq!(begun.elapsed().as_secs(), 10);
    let link = standing.link().borrow().clone();
    assert!(matches!(link, Link::Down { .. }));
}

#[tokio::test(start_paused = true)]
async fn a_wake_up_takes_the_place_of_a_pause_and_of_a_long_attempt() {
    let (dial, standing) = start(Some(Duration::from_secs(4)));
    let count = || dial.dials.load(Ordering::Relaxed);
    assert!(ask(&standing).await.is_err());
    assert_eq!(count(), 1);
    standing.reconnect();
    let begun = Instant::now();
    assert!(ask(&standing).await.is_err());
    assert_eq!((begun.elapsed().as_secs(), count()), (4, 2));

    // The third attempt has been under way for a while.
    sleep(Duration::from_secs(2)).await;
    assert_eq!(count(), 3);
    standing.reconnect();
    standing.reconnect();
    let begun = Instant::now();
    assert!(ask(&standing).await.is_err());
    assert_eq!((begun.elapsed().as_secs(), count()), (4, 4));
}

#[tokio::test(start_paused = true)]
async fn dropped_it_tries_no_more() {
    let (dial, standing) = start(Some(Duration::ZERO));
    let mut link = standing.link();
    assert!(ask(&standing).await.is_err());
    drop(standing);
    sleep(Duration::from_secs(1)).await;
    let before = dial.dials.load(Ordering::Relaxed);
    sleep(Duration::from_secs(600)).await;
    assert_eq!(dial.dials.load(Ordering::Relaxed), before);
    link.borrow_and_update();
    assert!(link.changed().await.is_err());
}

/// A daemon that answers so many look-ups, each after a pause, and no more. What asks nothing of the
/// store is answered at once.
struct Slow {
    answers: usize,
    pause: Duration,
    /// Whether it is stopped where it is.
    frozen: watch::Sender<bool>,
}

impl Slow {
    fn new(answers: usize, pause: Duration) -> Self {
        let frozen = watch::Sender::new(false);
        Self {
            answers,
            pause,
            frozen,
        }
    }
}

#[async_trait]
impl Dial for Slow {
    async fn dial(&self, _: Purpose) -> Result<Wire, Error> {
        let (ours, theirs) = tokio::io::duplex(1 << 20);
        let (mut left, pause) = (self.answers, self.pause);
        let mut frozen = self.frozen.subscribe();
        tokio::spawn(async move {
            let (mut reader, mut writer) = tokio::io::split(theirs);
            let words = |words: &[u64]| words.iter().flat_map(|w| w.to_le_bytes()).collect();
            let greeting: Vec<u8> = words(&[0x6478_696f, 0x120]);
            writer.write_all(&greeting).await.unwrap();
            // Magic, version, affinity, reserved space.
            let mut heard = vec![0; 32];
            reader.read_exact(&mut heard).await.unwrap();
            writer.write_u64_le(LAST).await.unwrap();
            // An empty text, an empty list and "no" are the same word.
            let answer: Vec<u8> = words(&[LAST, 0]);
            while let Ok(operation) = reader.read_u64_le().await {
                let text = reader.read_u64_le().await.unwrap();
                let rest = match operation {
                    QUERY_VALID_PATHS => 8,
                    _ => text.next_multiple_of(8),
                };
                let mut rest = vec![0; usize::try_from(rest).unwrap()];
                reader.read_exact(&mut rest).await.unwrap();
                if operation == QUERY_PATH_FROM_HASH_PART {
                    match left.checked_sub(1) {
                        Some(less) => left = less,
                        None => std::future::pending().await,
                    }
                    sleep(pause).await;
                }
                frozen.wait_for(|frozen| !frozen).await.unwrap();
                writer.write_all(&answer).await.unwrap();
            }
        });
        let (reader, writer) = tokio::io::split(ours);
        Ok(Wire {
            reader: Box::new(reader),
            writer: Box::new(writer),
            guard: Default::default(),
        })
    }
}

const LAST: u64 = 0x616c_7473;
const QUERY_PATH_FROM_HASH_PART: u64 = 29;
const QUERY_VALID_PATHS: u64 = 31;

async fn batch(slow: Slow, questions: usize) -> (Vec<Result<Reply, Error>>, u64) {
    let options = StandingOptions::default();
    let standing = Standing::start("slow".into(), Arc::new(slow), options);
    standing.ready().await.unwrap();
    let begun = Instant::now();
    let question = Request::QueryPathFromHashPart(StorePathHash([0; 20]));
    let answers = standing.ask_many(vec![question; questions]).await;
    (answers, begun.elapsed().as_secs())
}

#[tokio::test(start_paused = true)]
async fn answers_that_came_before_a_time_out_are_kept() {
    let pause = Duration::from_secs(1);
    let (answers, seconds) = batch(Slow::new(3, pause), 5).await;
    let answered = answers
        .iter()
        .take_while(|a| matches!(a, Ok(Reply::Path(None))));
    assert_eq!(answered.count(), 3, "{answers:?}");
    for left in &answers[3..] {
        assert!(matches!(left, Err(Error::TimedOut { .. })), "{left:?}");
    }
    assert!((12..16).contains(&seconds), "{seconds}");
}

#[tokio::test(start_paused = true)]
async fn a_batch_may_take_long_as_long_as_answers_come() {
    let pause = Duration::from_secs(4);
    let (answers, seconds) = batch(Slow::new(9, pause), 9).await;
    assert!(answers.iter().all(Result::is_ok), "{answers:?}");
    assert!((36..=41).contains(&seconds), "{seconds}");
    // But not for ever.
    let (answers, seconds) = batch(Slow::new(99, pause), 99).await;
    let answered = answers.iter().filter(|a| a.is_ok()).count();
    assert!((13..=16).contains(&answered), "{answered}");
    assert!((60..=64).contains(&seconds), "{seconds}");
}

/// A client of 25 connections that asks for 8 paths over each, one after the other; the time it takes.
async fn client_run(standing: &Standing) -> Duration {
    let begun = Instant::now();
    let connection = async |_| {
        for _ in 0..8 {
            let _ = ask(standing).await;
        }
    };
    join_all((0..25).map(connection)).await;
    begun.elapsed()
}

async fn settle(standing: &Standing, such: impl FnMut(&Link) -> bool) {
    let mut link = standing.link();
    let settled = timeout(Duration::from_secs(1), link.wait_for(such)).await;
    assert!(settled.is_ok(), "{:?}", standing.link().borrow());
}

#[tokio::test(start_paused = true)]
async fn a_daemon_that_turns_silent_costs_a_client_little_once_and_is_up_when_it_is_heard() {
    let slow = Arc::new(Slow::new(1000, Duration::from_millis(1)));
    let standing = Standing::start("slow".into(), slow.clone(), StandingOptions::default());
    assert!(ask(&standing).await.is_ok());
    // Between two questions, and later: the same.
    for idle in [0, 20] {
        sleep(Duration::from_secs(idle)).await;
        slow.frozen.send_replace(true);
        let took = client_run(&standing).await;
        assert!(took <= Duration::from_millis(1250), "{took:?}");
        assert!(client_run(&standing).await.is_zero(), "nobody waits again");
        settle(&standing, |link| matches!(link, Link::Down { .. })).await;
        slow.frozen.send_replace(false);
        settle(&standing, |link| matches!(link, Link::Up { .. })).await;
        assert!(ask(&standing).await.is_ok());
    }
    assert_eq!(number(&standing), 1, "the connection is the same");
}

#[tokio::test(start_paused = true)]
async fn a_loaded_daemon_is_waited_for() {
    let slow = Arc::new(Slow::new(1000, Duration::from_secs(9)));
    let standing = Standing::start("slow".into(), slow, StandingOptions::default());
    for _ in 0..5 {
        assert!(ask(&standing).await.is_ok());
    }
    assert_eq!(number(&standing), 1);
}

#[tokio::test(start_paused = true)]
async fn a_daemon_that_was_idle_for_long_may_take_its_time_and_one_that_stays_silent_is_left() {
    let slow = Arc::new(Slow::new(1000, Duration::ZERO));
    let standing = Standing::start("slow".into(), slow.clone(), StandingOptions::default());
    assert!(ask(&standing).await.is_ok());
    sleep(Duration::from_secs(31)).await;
    slow.frozen.send_replace(true);
    let thaw = async {
        sleep(Duration::from_secs(8)).await;
        slow.frozen.send_replace(false);
    };
    let (answer, ()) = tokio::join!(ask(&standing), thaw);
    assert!(answer.is_ok());

    slow.frozen.send_replace(true);
    let begun = Instant::now();
    assert!(ask(&standing).await.is_err());
    assert!(begun.elapsed() <= Duration::from_millis(1250));
    sleep(Duration::from_secs(11)).await;
    slow.frozen.send_replace(false);
    settle(&standing, |link| matches!(link, Link::Up { .. })).await;
    assert!(number(&standing) > 1);
}

fn number(standing: &Standing) -> u64 {
    match &*standing.shared.status.borrow() {
        Status::Up(live) => live.number,
        _ => 0,
    }
}
