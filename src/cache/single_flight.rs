//! One question for many askers: equal keys share one future.
//!
//! Whoever waits drives the future; when one asker is dropped another drives on, and when the last
//! is dropped the question is given up. Nothing is kept after the answer.
//!
//! An answer that is on its way for another reason can be announced; those who would ask wait for
//! it, for a while.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared, WeakShared};
use tokio::sync::oneshot;
use tokio::time::timeout;

/// The questions that are under way.
pub struct SingleFlight<K, V> {
    flights: Arc<Flights<K, V>>,
    patience: Duration,
}

/// A flight that its owner ends by hand; dropped without an answer, the askers get `None`.
pub struct Landing<V: Clone> {
    answer: oneshot::Sender<V>,
    /// Keeps the flight under way while nobody waits yet.
    _flight: Flight<V>,
}

/// `None`: the flight was announced and then abandoned.
type Flight<V> = Shared<BoxFuture<'static, Option<V>>>;

type ByKey<K, V> = HashMap<K, UnderWay<V>>;

struct UnderWay<V> {
    /// Tells it from an earlier one of the same key.
    number: u64,
    kind: Kind,
    flight: WeakShared<BoxFuture<'static, Option<V>>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Asked,
    Announced,
}

/// How an asker gets its answer.
enum Boarded<V, A> {
    /// By a question that was asked.
    Asked(Flight<V>),
    /// By an announced flight of this number; the own question is still to be asked.
    Announced(Flight<V>, u64, A),
}

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
    /// Starts with no questions; announced answers are waited for with this patience.
    pub fn new(patience: Duration) -> Self {
        let by_key = Mutex::new(HashMap::new());
        Self {
            flights: Arc::new(Flights { by_key }),
            patience,
        }
    }

    /// Joins the flight of this key, or starts one with `ask`.
    ///
    /// An announced one that does not land in time goes on beside one that is asked. `None` only
    /// when it was abandoned before: ask again.
    pub async fn join<A, F>(&self, key: K, ask: A) -> Option<V>
    where
        A: FnOnce() -> F,
        F: Future<Output = V> + Send + 'static,
    {
        let (announced, number, ask) = match self.board(key, None, ask) {
            Boarded::Asked(flight) => return flight.await,
            Boarded::Announced(flight, number, ask) => (flight, number, ask),
        };
        if let Ok(answer) = timeout(self.patience, announced.clone()).await {
            return answer;
        }
        let (Boarded::Asked(asked) | Boarded::Announced(asked, ..)) =
            self.board(key, Some(number), ask);
        tokio::select! {
            Some(answer) = announced => Some(answer),
            answer = asked => answer,
        }
    }

    /// Finds the flight of this key or asks; one of the number `late` counts for nothing.
    fn board<A, F>(&self, key: K, late: Option<u64>, ask: A) -> Boarded<V, A>
    where
        A: FnOnce() -> F,
        F: Future<Output = V> + Send + 'static,
    {
        let mut by_key = self.flights.lock();
        let under_way = by_key.get(&key).filter(|u| Some(u.number) != late);
        match under_way.and_then(|u| Some((u.flight.upgrade()?, u.kind, u.number))) {
            Some((flight, Kind::Asked, _)) => Boarded::Asked(flight),
            Some((flight, Kind::Announced, number)) => Boarded::Announced(flight, number, ask),
            None => {
                let question = ask().map(Some);
                Boarded::Asked(self.launch(&mut by_key, key, Kind::Asked, question))
            }
        }
    }

    /// Announces a flight whose answer the caller will bring; `None` when one is under way.
    pub fn announce(&self, key: K) -> Option<Landing<V>> {
        let (answer, arrival) = oneshot::channel();
        let mut by_key = self.flights.lock();
        let under_way = by_key.get(&key).and_then(|u| u.flight.upgrade());
        let flight = match &under_way {
            Some(_) => None,
            None => {
                let arrival = arrival.map(Result::ok);
                Some(self.launch(&mut by_key, key, Kind::Announced, arrival))
            }
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
        kind: Kind,
        future: impl Future<Output = Option<V>> + Send + 'static,
    ) -> Flight<V> {
        let number = by_key.get(&key).map_or(0, |u| u.number + 1);
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
            let under_way = UnderWay {
                number,
                kind,
                flight: weak,
            };
            by_key.insert(key, under_way);
        }
        flight
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
            .is_some_and(|u| u.number == self.number)
        {
            by_key.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn flights() -> SingleFlight<u8, u8> {
        SingleFlight::new(Duration::from_millis(100))
    }

    #[tokio::test]
    async fn equal_questions_are_asked_once() {
        let flights = flights();
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
        let flights = flights();
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
        let flights = flights();
        let mut only = Box::pin(flights.join(1, std::future::pending));
        assert!(only.as_mut().now_or_never().is_none());
        assert_eq!(flights.len(), 1);
        drop(only);
        assert!(flights.is_empty());
    }

    #[tokio::test]
    async fn an_announced_flight_lands_or_is_abandoned() {
        let flights = flights();
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

    #[tokio::test(start_paused = true)]
    async fn an_announced_flight_that_is_late_is_not_waited_for_alone() {
        let flights = flights();
        let asked = AtomicUsize::new(0);
        let join = |after| {
            let asked = &asked;
            let ask = move || {
                asked.fetch_add(1, Ordering::Relaxed);
                async move {
                    tokio::time::sleep(Duration::from_millis(after)).await;
                    9
                }
            };
            flights.join(1, ask)
        };
        let landing = flights.announce(1).unwrap();
        let (first, second) = tokio::join!(join(50), join(50));
        assert_eq!((first, second), (Some(9), Some(9)));
        assert_eq!(asked.load(Ordering::Relaxed), 1);
        assert!(flights.is_empty());
        drop(landing);

        // Whichever is first is the answer.
        let landing = flights.announce(1).unwrap();
        let land = async {
            tokio::time::sleep(Duration::from_millis(200)).await;
            landing.land(7);
        };
        let (answer, ()) = tokio::join!(join(500), land);
        assert_eq!(answer, Some(7));

        let landing = flights.announce(1).unwrap();
        let abandon = async {
            tokio::time::sleep(Duration::from_millis(200)).await;
            drop(landing);
        };
        let (answer, ()) = tokio::join!(join(500), abandon);
        assert_eq!(answer, Some(9));
        assert!(flights.is_empty());
    }
}
