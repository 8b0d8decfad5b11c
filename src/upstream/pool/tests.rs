use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use futures_util::future::join_all;

use super::*;
use crate::upstream::wire::Wire;

/// A way that leads nowhere.
#[derive(Default)]
struct Nowhere(AtomicUsize);

#[async_trait]
impl Dial for Nowhere {
    async fn dial(&self, purpose: Purpose) -> Result<Wire, Error> {
        assert_eq!(purpose, Purpose::Nar);
        self.0.fetch_add(1, Ordering::Relaxed);
        sleep(Duration::from_secs(1)).await;
        Err(Error::Down("no way".into()))
    }
}

fn path() -> StorePath {
    "xgd4ijld16zz4n65lm0jzb4cfscm9vwi-input".parse().unwrap()
}

#[tokio::test(start_paused = true)]
async fn one_failed_login_answers_all_who_wait_for_it() {
    let dial = Arc::new(Nowhere::default());
    let pool = Pool::new("nowhere".into(), dial.clone(), PoolOptions::default());
    let path = path();
    let answers = join_all((0..50).map(|_| pool.nar(&path, 100))).await;
    let down = |answer: &Result<_, Error>| matches!(answer, Err(Error::Refused(_)));
    assert!(answers.iter().all(down));
    assert_eq!(dial.0.load(Ordering::Relaxed), 1);
}

#[tokio::test(start_paused = true)]
async fn large_nars_fail_by_themselves_and_logins_are_bounded() {
    let dial = Arc::new(Nowhere::default());
    let options = PoolOptions::default();
    let logins_max = options.logins_max;
    let pool = Pool::new("nowhere".into(), dial.clone(), options);
    let path = path();
    let begun = Instant::now();
    let answers = join_all((0..9).map(|_| pool.nar(&path, 1 << 30))).await;
    assert!(answers.iter().all(Result::is_err));
    assert_eq!(dial.0.load(Ordering::Relaxed), 9);
    assert_eq!(begun.elapsed().as_secs(), 9 / logins_max as u64);
}

#[tokio::test(start_paused = true)]
async fn a_session_is_kept_warm_only_while_told_so() {
    let dial = Arc::new(Nowhere::default());
    let pool = Pool::new("nowhere".into(), dial.clone(), PoolOptions::default());
    let count = || dial.0.load(Ordering::Relaxed);
    sleep(Duration::from_secs(600)).await;
    assert_eq!(count(), 0);
    pool.warm(true);
    sleep(Duration::from_secs(120)).await;
    let tries = count();
    assert!((2..=10).contains(&tries), "{tries}");
    pool.warm(false);
    sleep(Duration::from_secs(2)).await;
    let tries = count();
    sleep(Duration::from_secs(600)).await;
    assert_eq!(count(), tries);
    drop(pool);
}
