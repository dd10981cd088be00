//! What became of each operation, for as long as it is kept: states, waiting, events.

use std::{
    collections::{HashMap, VecDeque},
    hash::{BuildHasherDefault, Hasher},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use p2p_sync_proto::{Code, Position, Problem};
use uuid::Uuid;

use crate::{events::Events, outbox::ms_since_1970};

/// Results remembered, settled and not; beyond it the oldest settled give way, then nothing new is remembered, but what
/// has a place in a bound of its own: what is to be told of, and questions.
const RESULTS_MAX: usize = 262_144;
/// Callers on different operations rarely meet in one shard's lock, and a shard's table that grows is a small one.
const SHARDS: usize = 256;

/// How far an operation has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
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

/// What became of an operation or a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settled {
    /// How far it came.
    pub state: OperationState,
    /// Why it was rejected, or not answered.
    pub problem: Option<Problem>,
    /// What a question was answered with: JSON.
    pub data: Option<Arc<str>>,
    /// When it came so far, by this machine's clock; kept to the millisecond. For `Unknown` and `NotKept`: now.
    pub at: SystemTime,
}

impl Settled {
    pub(crate) fn plain(state: OperationState) -> Self {
        Self {
            state,
            problem: None,
            data: None,
            at: SystemTime::now(),
        }
    }

    pub(crate) fn rejected(problem: Problem) -> Self {
        Self {
            problem: Some(problem),
            ..Self::plain(OperationState::Rejected)
        }
    }

    pub(crate) fn unknown() -> Self {
        let sentence = "the hub has not answered in time: it settles later under its id, and an operation stays in the outbox until then";
        Self {
            problem: Some(Problem::new(Code::UnknownOutcome, sentence)),
            ..Self::plain(OperationState::Unknown)
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
    shards: Vec<Shard>,
    began: Instant,
    keep: Duration,
    observer: Option<Observer>,
    events: Arc<Events>,
}

#[derive(Default)]
struct Shard {
    inner: Mutex<Inner>,
    settled: Condvar,
}

#[derive(Default)]
struct Inner {
    results: HashMap<Uuid, Known, BuildHasherDefault<IdHasher>>,
    /// The settled, oldest first, with when they were: milliseconds since [`Results::began`].
    order: VecDeque<(u64, Uuid)>,
    waiting: usize,
    closed: bool,
}

/// A result as it is remembered: there are many, and few have more than their state.
struct Known {
    state: OperationState,
    is_question: bool,
    /// An event is to be told when it settles.
    notify: bool,
    at_ms: u64,
    more: Option<Box<More>>,
}

#[derive(Clone, Default)]
struct More {
    problem: Option<Problem>,
    data: Option<Arc<str>>,
}

impl Known {
    fn new(settled: &Settled, notify: bool, is_question: bool) -> Self {
        let more = || {
            Box::new(More {
                problem: settled.problem.clone(),
                data: settled.data.clone(),
            })
        };
        let has_more = settled.problem.is_some() || settled.data.is_some();
        Self {
            state: settled.state,
            is_question,
            notify,
            at_ms: ms_since_1970(settled.at),
            more: has_more.then(more),
        }
    }

    fn settled(&self) -> Settled {
        let More { problem, data } = self.more.as_deref().cloned().unwrap_or_default();
        Settled {
            state: self.state,
            problem,
            data,
            at: UNIX_EPOCH + Duration::from_millis(self.at_ms),
        }
    }
}

/// Ids are made at random by ourselves: to spread their bits is enough.
#[derive(Default)]
struct IdHasher(u64);

impl Hasher for IdHasher {
    fn write(&mut self, bytes: &[u8]) {
        if let Ok(id) = Uuid::from_slice(bytes) {
            self.0 = spread(id);
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// The random half of an id, which ids of one millisecond count up in, with its lower bits in all others.
fn spread(id: Uuid) -> u64 {
    let (_, random) = id.as_u64_pair();
    let mixed = random.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ (mixed >> 32)
}

impl Results {
    pub(crate) fn new(keep: Duration, observer: Option<Observer>, events: Arc<Events>) -> Self {
        Self {
            shards: std::iter::repeat_with(Shard::default).take(SHARDS).collect(),
            began: Instant::now(),
            keep,
            observer,
            events,
        }
    }

    fn shard(&self, id: Uuid) -> &Shard {
        // Other bits than those that place it in the shard's table.
        &self.shards[usize::try_from((spread(id) >> 40) % SHARDS as u64).expect("below SHARDS")]
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Notes that an operation was taken; with `notify` an event is told when it settles, its place in [`Events`] is
    /// kept by the caller.
    pub(crate) fn accept(&self, operation_id: Uuid, position: Position, at_ms: u64, notify: bool) {
        let known = Known {
            state: OperationState::Accepted,
            is_question: false,
            notify,
            at_ms,
            more: None,
        };
        if self.observer.is_some() {
            self.observe(operation_id, position, known.settled());
        }
        let mut inner = lock(&self.shard(operation_id).inner);
        if inner.is_crowded() {
            inner.expire(self.now(), self.keep);
        }
        if notify || !inner.is_crowded() {
            inner.results.insert(operation_id, known);
        }
    }

    /// Notes how far an operation has come; a settled one stays as it is.
    pub(crate) fn note(&self, operation_id: Uuid, position: Position, settled: Settled) {
        if self.set(operation_id, &settled, false, false) {
            self.observe(operation_id, position, settled);
        }
    }

    /// Notes that a question was taken; as for [`Self::accept`].
    pub(crate) fn accept_question(&self, id: Uuid, notify: bool) {
        self.set(id, &Settled::plain(OperationState::Accepted), notify, true);
    }

    /// Notes a question's answer.
    pub(crate) fn answer_question(&self, id: Uuid, settled: &Settled) {
        self.set(id, settled, false, true);
    }

    /// Keeps a settled result no longer.
    pub(crate) fn forget(&self, id: Uuid) {
        let mut inner = lock(&self.shard(id).inner);
        if inner.results.get(&id).is_some_and(|known| known.state.is_settled()) {
            inner.results.remove(&id);
        }
    }

    /// False where it is settled already.
    fn set(&self, id: Uuid, settled: &Settled, notify: bool, is_question: bool) -> bool {
        let shard = self.shard(id);
        let is_settled = settled.state.is_settled();
        let mut notified = false;
        let mut inner = lock(&shard.inner);
        let now = self.now();
        inner.expire(now, self.keep);
        let has_room = !inner.is_crowded() || notify || is_question;
        match inner.results.get_mut(&id) {
            Some(known) if known.state.is_settled() => return false,
            Some(known) => {
                notified = known.notify && is_settled;
                *known = Known::new(settled, known.notify, known.is_question);
            }
            None if has_room => {
                inner.results.insert(id, Known::new(settled, notify, is_question));
            }
            None => {}
        }
        if is_settled {
            inner.order.push_back((now, id));
            if inner.waiting > 0 {
                shard.settled.notify_all();
            }
        }
        drop(inner);
        if notified {
            self.events.settled(id, settled.clone());
        }
        true
    }

    fn observe(&self, operation_id: Uuid, position: Position, settled: Settled) {
        if let Some(observer) = &self.observer {
            observer(&Event {
                operation_id,
                position,
                settled,
            });
        }
    }

    /// Notes that nobody knows any more what became of an operation that was not settled here; ends waiting for it.
    pub(crate) fn not_kept(&self, operation_id: Uuid) {
        let shard = self.shard(operation_id);
        let mut inner = lock(&shard.inner);
        let is_unsettled = |known: &Known| !known.state.is_settled();
        if !inner.results.get(&operation_id).is_some_and(is_unsettled) {
            return;
        }
        let known = inner.results.remove(&operation_id);
        shard.settled.notify_all();
        drop(inner);
        if known.is_some_and(|known| known.notify) {
            self.events
                .settled(operation_id, Settled::plain(OperationState::NotKept));
        }
    }

    /// Operations that are not settled, in no order; questions are none.
    pub(crate) fn unsettled(&self) -> Vec<Uuid> {
        let mut ids = Vec::new();
        for shard in &self.shards {
            let inner = lock(&shard.inner);
            let is_unsettled = |known: &Known| !known.is_question && !known.state.is_settled();
            let unsettled = inner.results.iter().filter(|(_, known)| is_unsettled(known));
            ids.extend(unsettled.map(|(id, _)| *id));
        }
        ids
    }

    /// How far an operation has come.
    pub(crate) fn get(&self, operation_id: Uuid) -> Settled {
        let mut inner = lock(&self.shard(operation_id).inner);
        inner.expire(self.now(), self.keep);
        let known = inner.results.get(&operation_id);
        known.map_or_else(|| Settled::plain(OperationState::NotKept), Known::settled)
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
                Some(result) if result.state.is_settled() => return result.settled(),
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
    fn is_crowded(&self) -> bool {
        self.results.len() >= RESULTS_MAX / SHARDS
    }

    fn expire(&mut self, now: u64, keep: Duration) {
        while let Some(&(at, id)) = self.order.front() {
            if u128::from(now - at) < keep.as_millis() && !self.is_crowded() {
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

    fn results_kept(keep: Duration) -> Results {
        Results::new(keep, None, Arc::new(Events::new()))
    }

    #[test]
    fn a_wait_ends_when_the_operation_is_settled() {
        let results = Arc::new(results_kept(Duration::from_mins(1)));
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
        let results = results_kept(Duration::from_mins(1));
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
        let results = results_kept(Duration::ZERO);
        let id = Uuid::from_u128(1);
        results.note(id, POSITION, Settled::plain(OperationState::Applied));
        assert_eq!(results.get(id).state, OperationState::NotKept);
        assert_eq!(results.wait(id, None).state, OperationState::NotKept);
    }

    #[test]
    fn shutting_down_lets_all_who_wait_go() {
        let results = results_kept(Duration::from_mins(1));
        let id = Uuid::from_u128(1);
        results.note(id, POSITION, Settled::plain(OperationState::Accepted));
        results.close();
        assert_eq!(results.wait(id, None).state, OperationState::Unknown);
    }
}
