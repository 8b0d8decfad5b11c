//! The time that a client has for the head of its next request.
//!
//! hyper makes a new timer for each head and drops it when the head is there. Here they share one real
//! timer per connection, which is set when it rings and not with every request: on a busy connection
//! that is once in an idle time.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use hyper::rt::{Sleep, Timer};

/// Times the heads of one connection; at most one of its timers is waited for at a time.
pub(super) struct IdleTimer {
    ring: Arc<Mutex<Ring>>,
}

/// The real timer, once there is one.
type Ring = Option<Pin<Box<tokio::time::Sleep>>>;

impl IdleTimer {
    pub(super) fn new() -> Self {
        Self {
            ring: Arc::default(),
        }
    }
}

impl Timer for IdleTimer {
    fn sleep(&self, duration: std::time::Duration) -> Pin<Box<dyn Sleep>> {
        self.sleep_until(self.now() + duration)
    }

    fn sleep_until(&self, deadline: Instant) -> Pin<Box<dyn Sleep>> {
        Box::pin(IdleSleep {
            ring: Arc::clone(&self.ring),
            deadline: deadline.into(),
        })
    }

    fn now(&self) -> Instant {
        tokio::time::Instant::now().into_std()
    }
}

/// One head's time. Dropped, it is forgotten; the real timer rings once for nobody.
struct IdleSleep {
    ring: Arc<Mutex<Ring>>,
    deadline: tokio::time::Instant,
}

impl Sleep for IdleSleep {}

impl Future for IdleSleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let deadline = self.deadline;
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let sleep = ring.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        if sleep.deadline() > deadline {
            sleep.as_mut().reset(deadline);
        }
        loop {
            ready!(sleep.as_mut().poll(context));
            if sleep.deadline() >= deadline {
                return Poll::Ready(());
            }
            sleep.as_mut().reset(deadline);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn each_head_has_its_whole_time() {
        let timer = IdleTimer::new();
        let started = tokio::time::Instant::now();
        let mut first = timer.sleep(Duration::from_secs(60));
        let early = tokio::time::timeout(Duration::from_secs(50), first.as_mut()).await;
        assert!(early.is_err());
        drop(first);
        // The real timer still stands at 60 s.
        timer.sleep(Duration::from_secs(60)).await;
        assert_eq!(started.elapsed().as_secs(), 110);
        timer.sleep(Duration::from_secs(5)).await;
        assert_eq!(started.elapsed().as_secs(), 115);
    }
}
