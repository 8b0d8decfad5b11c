//! One question for many askers: equal keys share one future.
//!
//! Whoever waits drives the future; when one asker is dropped another drives on, and when the last
//! is dropped the question is given up. Nothing is kept after the answer.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared, WeakShared};
use tokio::sync::oneshot;

/// The questions that are under way.
pub struct SingleFlight<K, V> {
    flights: Arc<Flights<K, V>>,
}

/// A flight that its owner ends by hand; dropped without an answer, the askers get `None`.
pub struct Landing<V: Clone> {
    answer: oneshot::Sender<V>,
    /// Keeps the flight under way while nobody waits yet.
    _flight: Flight<V>,
}

/// `None`: the flight was announced and then abandoned.
type Flight<V> = Shared<BoxFuture<'static, Option<V>>>;

/// Each flight with a number that tells it from an earlier one of the same key.
type ByKey<K, V> = HashMap<K, (u64, WeakShared<BoxFuture<'static, Option<V>>>)>;

struct Flights<K, V> {
    // Never held over an await, no other lock is taken under it, and no `Flight` is dropped
    // under it: the last one's drop comes back here through `Removal`.
    by_key: Mutex<ByKey<K, V>>,
}

/// Takes the key out when the future is done or dropped.
struct Removal<K: Eq + Hash, V> {
    flights: Arc<Flights<K, V>>,
    key: K,
    number: u64,
}

impl<K, V> SingleFlight<K, V>
where
    K: Eq + Hash + Copy + Send + 'static,
    V: Clone + Send + Sync + 'static,
{
    /// Starts with no questions.
    pub fn new() -> Self {
        let by_key = Mutex::new(HashMap::new());
        Self {
            flights: Arc::new(Flights { by_key }),
        }
    }

    /// Joins the flight of this key, or starts one with `ask`.
    ///
    /// `None` only when the flight had been announced and was abandoned: ask again.
    pub async fn join<F>(&self, key: K, ask: impl FnOnce() -> F) -> Option<V>
    where
        F: Future<Output = V> + Send + 'static,
    {
        let flight = {
            let mut by_key = self.flights.lock();
            match by_key.get(&key).and_then(|(_, flight)| flight.upgrade()) {
                Some(flight) => flight,
                None => self.launch(&mut by_key, key, ask().map(Some)),
            }
        };
        flight.await
    }

    /// Announces a flight whose answer the caller will bring; `None` when one is under way.
    pub fn announce(&self, key: K) -> Option<Landing<V>> {
        let (answer, arrival) = oneshot::channel();
        let mut by_key = self.flights.lock();
        let under_way = by_key.get(&key).and_then(|(_, flight)| flight.upgrade());
        let flight = match &under_way {
            Some(_) => None,
            None => Some(self.launch(&mut by_key, key, arrival.map(Result::ok))),
        };
        drop(by_key);
        flight.map(|flight| Landing {
            answer,
            _flight: flight,
        })
    }

    /// Returns how many questions are under way.
    pub fn len(&self) -> usize {
        self.flights.lock().len()
    }

    /// Tells whether no question is under way.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn launch(
        &self,
        by_key: &mut ByKey<K, V>,
        key: K,
        future: impl Future<Output = Option<V>> + Send + 'static,
    ) -> Flight<V> {
        let number = by_key.get(&key).map_or(0, |(number, _)| number + 1);
        let removal = Removal {
            flights: Arc::clone(&self.flights),
            key,
            number,
        };
        let flight = async move {
            let _removal = removal;
            future.await
        };
        let flight = flight.boxed().shared();
        if let Some(weak) = flight.downgrade() {
            by_key.insert(key, (number, weak));
        }
        flight
    }
}

impl<K, V> Default for SingleFlight<K, V>
where
    K: Eq + Hash + Copy + Send + 'static,
    V: Clone + Send + Sync + 'static,
{
    fn default() -> Self {
        Self::new()
    }
}

impl<V: Clone> Landing<V> {
    /// Gives the answer to all who wait.
    pub fn land(self, answer: V) {
        // Nobody waiting is no fault.
        let _ = self.answer.send(answer);
    }
}

impl<K, V> Flights<K, V> {
    fn lock(&self) -> MutexGuard<'_, ByKey<K, V>> {
        self.by_key.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Eq + Hash, V> Drop for Removal<K, V> {
    fn drop(&mut self) {
        let mut by_key = self.flights.lock();
        if by_key
            .get(&self.key)
            .is_some_and(|(n, _)| *n == self.number)
        {
            by_key.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[tokio::test]
    async fn equal_questions_are_asked_once() {
        let flights = SingleFlight::<u8, u8>::new();
        let asked = AtomicUsize::new(0);
        let (release, gate) = oneshot::channel::<u8>();
        let first = flights.join(1, || {
            asked.fetch_add(1, Ordering::Relaxed);
            async { gate.await.unwrap_or(0) }
        });
        let second = flights.join(1, || {
            asked.fetch_add(1, Ordering::Relaxed);
            async { 9 }
        });
        let (first, second, _) = tokio::join!(first, second, async { release.send(7) });
        assert_eq!((first, second), (Some(7), Some(7)));
        assert_eq!(asked.load(Ordering::Relaxed), 1);
        assert!(flights.is_empty());
    }

    #[tokio::test]
    async fn a_follower_drives_on_when_the_leader_is_dropped() {
        let flights = SingleFlight::<u8, u8>::new();
        let (release, gate) = oneshot::channel::<u8>();
        let mut leader = Box::pin(flights.join(1, || async { gate.await.unwrap_or(0) }));
        assert!(leader.as_mut().now_or_never().is_none());
        let mut follower = Box::pin(flights.join(1, || async { 9 }));
        assert!(follower.as_mut().now_or_never().is_none());
        drop(leader);
        release.send(7).unwrap();
        assert_eq!(follower.await, Some(7));
    }

    #[tokio::test]
    async fn the_last_asker_takes_the_question_along() {
        let flights = SingleFlight::<u8, u8>::new();
        let mut only = Box::pin(flights.join(1, std::future::pending));
        assert!(only.as_mut().now_or_never().is_none());
        assert_eq!(flights.len(), 1);
        drop(only);
        assert!(flights.is_empty());
    }

    #[tokio::test]
    async fn an_announced_flight_lands_or_is_abandoned() {
        let flights = SingleFlight::<u8, u8>::new();
        let landing = flights.announce(1).unwrap();
        assert!(flights.announce(1).is_none());
        let waiting = flights.join(1, || async { 9 });
        let (answer, ()) = tokio::join!(waiting, async { landing.land(7) });
        assert_eq!(answer, Some(7));

        let landing = flights.announce(1).unwrap();
        let mut waiting = Box::pin(flights.join(1, || async { 9 }));
        assert!(waiting.as_mut().now_or_never().is_none());
        drop(landing);
        assert_eq!(waiting.await, None);
        assert_eq!(flights.join(1, || async { 9 }).await, Some(9));
    }
}
