use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;
use crate::nix::store_path::StorePathHash;
use crate::upstream::wire::Wire;

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

/// A daemon that answers so many questions, each after a pause, and no more.
struct Slow {
    answers: usize,
    pause: Duration,
}

#[async_trait]
impl Dial for Slow {
    async fn dial(&self, _: Purpose) -> Result<Wire, Error> {
        let (ours, theirs) = tokio::io::duplex(1 << 20);
        let (answers, pause) = (self.answers, self.pause);
        tokio::spawn(async move {
            let (mut reader, mut writer) = tokio::io::split(theirs);
            let words = |words: &[u64]| words.iter().flat_map(|w| w.to_le_bytes()).collect();
            let greeting: Vec<u8> = words(&[0x6478_696f, 0x120, LAST]);
            writer.write_all(&greeting).await.unwrap();
            // What is asked is known: the greeting, then an unasked question of the directory.
            let answer = async {
                let known: Vec<u8> = words(&[LAST, 0]);
                writer.write_all(&known).await.unwrap();
                for _ in 0..answers {
                    sleep(pause).await;
                    writer.write_all(&known).await.unwrap();
                }
                std::future::pending::<()>().await;
            };
            let mut heard = vec![0; 4096];
            let hear = async { while reader.read(&mut heard).await.is_ok_and(|n| n > 0) {} };
            tokio::select! { () = answer => {}, () = hear => {} }
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
    let (answers, seconds) = batch(Slow { answers: 3, pause }, 5).await;
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
    let (answers, seconds) = batch(Slow { answers: 9, pause }, 9).await;
    assert!(answers.iter().all(Result::is_ok), "{answers:?}");
    assert!((36..=41).contains(&seconds), "{seconds}");
    // But not for ever.
    let (answers, seconds) = batch(Slow { answers: 99, pause }, 99).await;
    let answered = answers.iter().filter(|a| a.is_ok()).count();
    assert!((13..=16).contains(&answered), "{answered}");
    assert!((60..=64).contains(&seconds), "{seconds}");
}
