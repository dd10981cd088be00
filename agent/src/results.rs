//! What became of each operation, for as long as it is kept: states, waiting, events.

use std::{
    collections::{HashMap, VecDeque},
    hash::BuildHasher as _,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use p2p_sync_proto::{Code, Position, Problem};
use uuid::Uuid;

/// Results remembered, settled and not; beyond it the oldest settled give way, then nothing new is remembered.
const RESULTS_MAX: usize = 262_144;
/// Callers on different operations rarely meet in one shard's lock.
const SHARDS: usize = 16;

/// How far an operation has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum OperationState {
    /// In memory.
    Accepted,
    /// On disk.
    Spooled,
    /// Committed by the hub.
    Applied,
    /// A newer operation of its path took its place.
    Superseded,
    /// Will never apply; the problem says why. Kept as a dead letter.
    Rejected,
    /// Came under a tenure that has passed; the hub's operator decides.
    Limbo,
    /// Sent, or about to be, and not settled: it stays in the outbox and settles later.
    Unknown,
    /// Settled so long ago that it is no longer kept, or never known.
    NotKept,
}

impl OperationState {
    /// Whether it will not change any more.
    pub fn is_settled(self) -> bool {
        matches!(self, Self::Applied | Self::Superseded | Self::Rejected | Self::Limbo)
    }
}

/// What became of an operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settled {
    /// How far it came.
    pub state: OperationState,
    /// Why it was rejected, or not answered.
    pub problem: Option<Problem>,
}

impl Settled {
    pub(crate) fn plain(state: OperationState) -> Self {
        Self { state, problem: None }
    }

    pub(crate) fn unknown() -> Self {
        let sentence = "the hub has not answered in time: the operation stays in the outbox and settles under its id";
        Self {
            state: OperationState::Unknown,
            problem: Some(Problem::new(Code::UnknownOutcome, sentence)),
        }
    }
}

/// A change of an operation's state.
#[derive(Clone, Debug)]
pub struct Event {
    /// Which operation.
    pub operation_id: Uuid,
    /// Its place in the host's order.
    pub position: Position,
    /// What became of it.
    pub settled: Settled,
}

/// Told of each change, on one of the agent's threads: it must be quick.
pub(crate) type Observer = Arc<dyn Fn(&Event) + Send + Sync>;

pub(crate) struct Results {
    shards: [Shard; SHARDS],
    hasher: std::hash::RandomState,
    keep: Duration,
    observer: Option<Observer>,
}

#[derive(Default)]
struct Shard {
    inner: Mutex<Inner>,
    settled: Condvar,
}

#[derive(Default)]
struct Inner {
    results: HashMap<Uuid, Settled>,
    /// The settled, oldest first.
    order: VecDeque<(Instant, Uuid)>,
    waiting: usize,
    closed: bool,
}

impl Results {
    pub(crate) fn new(keep: Duration, observer: Option<Observer>) -> Self {
        Self {
            shards: Default::default(),
            hasher: std::hash::RandomState::new(),
            keep,
            observer,
        }
    }

    fn shard(&self, id: Uuid) -> &Shard {
        let hash = self.hasher.hash_one(id);
        &self.shards[usize::try_from(hash % SHARDS as u64).expect("below SHARDS")]
    }

    /// Notes how far an operation has come; a settled one stays as it is.
    pub(crate) fn note(&self, operation_id: Uuid, position: Position, settled: Settled) {
        let shard = self.shard(operation_id);
        let is_settled = settled.state.is_settled();
        let mut inner = lock(&shard.inner);
        inner.expire(self.keep);
        let has_room = inner.results.len() < RESULTS_MAX / SHARDS;
        match inner.results.get_mut(&operation_id) {
            Some(known) if known.state.is_settled() => return,
            Some(known) => *known = settled.clone(),
            None if has_room => {
                inner.results.insert(operation_id, settled.clone());
            }
            None => {}
        }
        if is_settled {
            inner.order.push_back((Instant::now(), operation_id));
            if inner.waiting > 0 {
                shard.settled.notify_all();
            }
        }
        drop(inner);
        if let Some(observer) = &self.observer {
            observer(&Event {
                operation_id,
                position,
                settled,
            });
        }
    }

    /// How far an operation has come.
    pub(crate) fn get(&self, operation_id: Uuid) -> Settled {
        let mut inner = lock(&self.shard(operation_id).inner);
        inner.expire(self.keep);
        inner
            .results
            .get(&operation_id)
            .cloned()
            .unwrap_or(Settled::plain(OperationState::NotKept))
    }

    /// Waits until an operation is settled or the time is over; `None` waits until settled or [`Self::close`]d.
    ///
    /// `Unknown` where it is not settled by then.
    pub(crate) fn wait(&self, operation_id: Uuid, timeout: Option<Duration>) -> Settled {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let shard = self.shard(operation_id);
        let mut inner = lock(&shard.inner);
        loop {
            match inner.results.get(&operation_id) {
                None => return Settled::plain(OperationState::NotKept),
                Some(result) if result.state.is_settled() => return result.clone(),
                Some(_) if inner.closed => return Settled::unknown(),
                Some(_) => {}
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Settled::unknown();
            }
            inner.waiting += 1;
            inner = match left {
                Some(left) => {
                    shard
                        .settled
                        .wait_timeout(inner, left)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
                None => shard.settled.wait(inner).unwrap_or_else(PoisonError::into_inner),
            };
            inner.waiting -= 1;
        }
    }

    /// Lets all who wait go.
    pub(crate) fn close(&self) {
        for shard in &self.shards {
            lock(&shard.inner).closed = true;
            shard.settled.notify_all();
        }
    }
}

impl Inner {
    fn expire(&mut self, keep: Duration) {
        while let Some(&(at, id)) = self.order.front() {
            let crowded = self.results.len() >= RESULTS_MAX / SHARDS;
            if at.elapsed() < keep && !crowded {
                return;
            }
            self.order.pop_front();
            self.results.remove(&id);
        }
    }
}

fn lock(inner: &Mutex<Inner>) -> MutexGuard<'_, Inner> {
    inner.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const POSITION: Position = Position {
        incarnation: 1,
        sequence: 1,
    };

    #[test]
    fn a_wait_ends_when_the_operation_is_settled() {
        let results = Arc::new(Results::new(Duration::from_mins(1), None));
        let id = Uuid::from_u128(1);
        results.note(id, POSITION, Settled::plain(OperationState::Accepted));
        let waiting = std::thread::spawn({
            let results = results.clone();
            move || results.wait(id, None)
        });
        results.note(id, POSITION, Settled::plain(OperationState::Applied));
        assert_eq!(waiting.join().expect("no panic").state, OperationState::Applied);
    }

    #[test]
    fn a_timeout_is_unknown_and_the_operation_settles_later() {
        let results = Results::new(Duration::from_mins(1), None);
        let id = Uuid::from_u128(1);
        results.note(id, POSITION, Settled::plain(OperationState::Spooled));
        assert_eq!(
            results.wait(id, Some(Duration::from_millis(1))).state,
            OperationState::Unknown
        );
        assert_eq!(results.get(id).state, OperationState::Spooled);
        results.note(id, POSITION, Settled::plain(OperationState::Applied));
        results.note(id, POSITION, Settled::plain(OperationState::Spooled));
        assert_eq!(results.get(id).state, OperationState::Applied);
    }

    #[test]
    fn settled_results_are_kept_their_time_and_then_not() {
        let results = Results::new(Duration::ZERO, None);
        let id = Uuid::from_u128(1);
        results.note(id, POSITION, Settled::plain(OperationState::Applied));
        assert_eq!(results.get(id).state, OperationState::NotKept);
        assert_eq!(results.wait(id, None).state, OperationState::NotKept);
    }

    #[test]
    fn shutting_down_lets_all_who_wait_go() {
        let results = Results::new(Duration::from_mins(1), None);
        let id = Uuid::from_u128(1);
        results.note(id, POSITION, Settled::plain(OperationState::Accepted));
        results.close();
        assert_eq!(results.wait(id, None).state, OperationState::Unknown);
    }
}
