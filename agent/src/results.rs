//! What became of each operation, for as long as it is kept: states, waiting, events.

mod kept;
mod ring;

use std::{
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering, fence},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use p2p_sync_proto::{Code, Position, Problem, ids::Numbering};
use uuid::Uuid;

use crate::{events::Events, outbox::ms_since_1970};

use kept::Kept;
use ring::{Noted, Ring, Slot};

/// Those who wait for different operations rarely meet at one bell.
const BELLS: u64 = 64;

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
    /// No longer kept, or never known. Kept are `result_keep`, or 262,144 operations further, whichever is less.
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

/// The results of what was taken, by the operations' numbers where this process made their ids, else by the ids.
pub(crate) struct Results {
    numbered: Option<(Numbering, Ring)>,
    kept: Kept,
    bells: Vec<Bell>,
    closed: AtomicBool,
    began: Instant,
    began_at: SystemTime,
    keep: Duration,
    observer: Option<Observer>,
    events: Arc<Events>,
}

/// Wakes those who wait for an operation to be settled.
#[derive(Default)]
struct Bell {
    waiting: AtomicUsize,
    lock: Mutex<()>,
    rung: Condvar,
}

impl Bell {
    /// Called after the change that is waited for. Takes no lock where nobody waits.
    fn ring(&self) {
        // Whoever is not counted yet sees the change when looking after counting itself.
        fence(Ordering::SeqCst);
        if self.waiting.load(Ordering::SeqCst) > 0 {
            drop(self.hold());
            self.rung.notify_all();
        }
    }

    fn hold(&self) -> MutexGuard<'_, ()> {
        self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the next ring, at most so long.
    fn wait<'a>(&'a self, held: MutexGuard<'a, ()>, timeout: Option<Duration>) -> MutexGuard<'a, ()> {
        match timeout {
            Some(timeout) => {
                let waited = self.rung.wait_timeout(held, timeout);
                waited.unwrap_or_else(PoisonError::into_inner).0
            }
            None => self.rung.wait(held).unwrap_or_else(PoisonError::into_inner),
        }
    }
}

/// Spreads ids that count up over tables and bells.
fn spread(id: Uuid) -> u64 {
    let (_, random) = id.as_u64_pair();
    let mixed = random.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ (mixed >> 32)
}

impl Results {
    /// `numbering` is of the ids that [`Self::accept`] will be told of; without it all are kept by their ids.
    pub(crate) fn new(
        keep: Duration,
        numbering: Option<Numbering>,
        observer: Option<Observer>,
        events: Arc<Events>,
    ) -> Self {
        Self {
            numbered: numbering.map(|numbering| (numbering, Ring::new())),
            kept: Kept::new(keep),
            bells: std::iter::repeat_with(Bell::default)
                .take(usize::try_from(BELLS).expect("few"))
                .collect(),
            closed: AtomicBool::new(false),
            began: Instant::now(),
            began_at: SystemTime::now(),
            keep,
            observer,
            events,
        }
    }

    /// The ring and an operation's number in it, where it is one of those that have one.
    fn numbered(&self, id: Uuid) -> Option<(&Ring, u64)> {
        let (numbering, ring) = self.numbered.as_ref()?;
        Some((ring, numbering.number(id)?))
    }

    fn bell(&self, id: Uuid) -> &Bell {
        &self.bells[usize::try_from(spread(id) % BELLS).expect("below BELLS")]
    }

    /// Notes that an operation was taken; with `notify` an event is told when it settles, its place in [`Events`] is
    /// kept by the caller.
    pub(crate) fn accept(&self, operation_id: Uuid, position: Position, at_ms: u64, notify: bool) {
        if self.observer.is_some() {
            let accepted = Settled {
                at: UNIX_EPOCH + Duration::from_millis(at_ms),
                ..Settled::plain(OperationState::Accepted)
            };
            self.observe(operation_id, position, accepted);
        }
        match self.numbered(operation_id) {
            Some((ring, number)) => {
                let began_at_ms = ms_since_1970(self.began_at);
                let at = Duration::from_millis(at_ms.saturating_sub(began_at_ms));
                // What nobody is told of may be forgotten when there are too many.
                if !ring.accept(number, at, notify) && notify {
                    self.kept.accept(operation_id, at_ms, notify);
                }
            }
            None => self.kept.accept(operation_id, at_ms, notify),
        }
    }

    /// Notes how far an operation has come; a settled one stays as it is.
    pub(crate) fn note(&self, operation_id: Uuid, position: Position, settled: Settled) {
        if self.set(operation_id, &settled) {
            self.observe(operation_id, position, settled);
        }
    }

    /// Notes that a question was taken; as for [`Self::accept`].
    pub(crate) fn accept_question(&self, id: Uuid, notify: bool) {
        let accepted = Settled::plain(OperationState::Accepted);
        self.kept.set_question(id, &accepted, notify);
    }

    /// Notes a question's answer.
    pub(crate) fn answer_question(&self, id: Uuid, settled: &Settled) {
        let noted = self.kept.set_question(id, settled, false);
        self.tell(id, settled, noted);
    }

    /// Keeps a settled result no longer.
    pub(crate) fn forget(&self, id: Uuid) {
        self.kept.forget(id);
    }

    /// False where it is settled already.
    fn set(&self, id: Uuid, settled: &Settled) -> bool {
        let noted = match self.numbered(id) {
            Some((ring, number)) => self.set_numbered(ring, number, id, settled),
            None => self.kept.set(id, settled),
        };
        self.tell(id, settled, noted)
    }

    fn set_numbered(&self, ring: &Ring, number: u64, id: Uuid, settled: &Settled) -> Noted {
        let has_more = settled.problem.is_some() || settled.data.is_some();
        if !has_more {
            let noted = ring.note(number, Slot::Known(settled.state), self.began.elapsed());
            return match noted {
                Noted::NotHere => self.kept.set_known(id, settled),
                noted => noted,
            };
        }
        // The reason first: who sees that there is one finds it.
        match ring.get(number).0 {
            slot if slot.is_settled() => return Noted::Settled,
            Slot::Vacant => return self.kept.set(id, settled),
            _ => {}
        }
        let _ = self.kept.set(id, settled);
        ring.note(number, Slot::ToldElsewhere, self.began.elapsed())
    }

    /// Tells of a change to whom it concerns; gives whether there was one.
    fn tell(&self, id: Uuid, settled: &Settled, noted: Noted) -> bool {
        if settled.state.is_settled() && noted != Noted::Settled {
            self.bell(id).ring();
            if noted == (Noted::Changed { notify: true }) {
                self.events.settled(id, settled.clone());
            }
        }
        noted != Noted::Settled
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

    /// Notes that nobody knows any more what became of an operation that was not settled here and has no number; ends
    /// waiting for it.
    pub(crate) fn not_kept(&self, operation_id: Uuid) {
        let Some(notify) = self.kept.remove_unsettled(operation_id) else {
            return;
        };
        self.bell(operation_id).ring();
        if notify {
            self.events
                .settled(operation_id, Settled::plain(OperationState::NotKept));
        }
    }

    /// Operations without a number that are not settled, in no order; questions are none.
    pub(crate) fn unsettled(&self) -> Vec<Uuid> {
        self.kept.unsettled()
    }

    /// How far an operation has come.
    pub(crate) fn get(&self, operation_id: Uuid) -> Settled {
        self.kept.expire(operation_id);
        self.look(operation_id)
    }

    /// Whether an operation is known to be settled.
    pub(crate) fn is_settled(&self, operation_id: Uuid) -> bool {
        self.look(operation_id).state.is_settled()
    }

    fn look(&self, id: Uuid) -> Settled {
        if let Some((ring, number)) = self.numbered(id)
            && let (Slot::Known(state), at) = ring.get(number)
        {
            if state.is_settled() && self.began.elapsed().saturating_sub(at) >= self.keep {
                return Settled::plain(OperationState::NotKept);
            }
            return Settled {
                at: self.began_at + at,
                ..Settled::plain(state)
            };
        }
        let known = self.kept.get(id);
        known.unwrap_or_else(|| Settled::plain(OperationState::NotKept))
    }

    /// Waits until an operation is settled or the time is over; `None` waits until settled or [`Self::close`]d.
    ///
    /// `Unknown` where it is not settled by then.
    pub(crate) fn wait(&self, operation_id: Uuid, timeout: Option<Duration>) -> Settled {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let bell = self.bell(operation_id);
        let mut held = bell.hold();
        bell.waiting.fetch_add(1, Ordering::SeqCst);
        let settled = loop {
            fence(Ordering::SeqCst);
            let known = self.look(operation_id);
            if known.state.is_settled() || known.state == OperationState::NotKept {
                break known;
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if self.closed.load(Ordering::SeqCst) || left == Some(Duration::ZERO) {
                break Settled::unknown();
            }
            held = bell.wait(held, left);
        };
        bell.waiting.fetch_sub(1, Ordering::SeqCst);
        settled
    }

    /// Lets all who wait go.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        for bell in &self.bells {
            bell.ring();
        }
    }
}

#[cfg(test)]
mod tests {
    use p2p_sync_proto::ids::IdSource;

    use super::*;
    use crate::outbox::now_ms;

    const POSITION: Position = Position {
        incarnation: 1,
        sequence: 1,
    };

    fn results_kept(keep: Duration) -> Results {
        Results::new(keep, None, None, Arc::new(Events::new()))
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

    /// Results of a source's operations, and the first of these.
    fn numbered(keep: Duration) -> (Results, Uuid) {
        let mut source = IdSource::new();
        let results = Results::new(keep, Some(source.numbering()), None, Arc::new(Events::new()));
        (results, source.next_id(1))
    }

    #[test]
    fn an_operation_of_ours_is_waited_for_and_known_by_its_number() {
        let (results, id) = numbered(Duration::from_mins(1));
        let results = Arc::new(results);
        results.accept(id, POSITION, now_ms(), false);
        let waiting = std::thread::spawn({
            let results = results.clone();
            move || results.wait(id, None)
        });
        results.note(id, POSITION, Settled::plain(OperationState::Spooled));
        results.note(id, POSITION, Settled::plain(OperationState::Applied));
        assert_eq!(waiting.join().expect("no panic").state, OperationState::Applied);
        assert_eq!(results.get(id).state, OperationState::Applied);
    }

    #[test]
    fn why_an_operation_of_ours_was_refused_is_kept_with_it() {
        let (results, id) = numbered(Duration::from_mins(1));
        results.accept(id, POSITION, now_ms(), false);
        let problem = Problem::new(Code::TooLarge, "send less");
        results.note(id, POSITION, Settled::rejected(problem.clone()));
        results.note(id, POSITION, Settled::plain(OperationState::Applied));
        assert_eq!(results.get(id).problem, Some(problem));
        assert_eq!(results.wait(id, None).state, OperationState::Rejected);
    }

    #[test]
    fn what_is_to_be_told_of_is_told_once_also_beyond_the_bound() {
        let mut source = IdSource::new();
        let events = Arc::new(Events::new());
        let results = Results::new(Duration::from_mins(1), Some(source.numbering()), None, events.clone());
        // None of them settles, so that the last finds the first's slot taken.
        let first = source.next_id(1);
        results.accept(first, POSITION, now_ms(), false);
        let others = std::iter::repeat_with(|| source.next_id(1)).take(262_143);
        others.for_each(|id| results.accept(id, POSITION, now_ms(), false));
        let last = source.next_id(1);
        events.reserve_settled().expect("room");
        results.accept(last, POSITION, now_ms(), true);
        assert_eq!(results.get(last).state, OperationState::Accepted);
        for _ in 0..2 {
            results.note(last, POSITION, Settled::plain(OperationState::Applied));
        }
        let told: Vec<_> = std::iter::from_fn(|| events.next(|_| true)).collect();
        assert_eq!(told.len(), 1, "{told:?}");
        assert_eq!(results.get(first).state, OperationState::Accepted);
    }

    #[test]
    fn a_settled_operation_of_ours_is_kept_its_time_and_then_not() {
        let (results, id) = numbered(Duration::ZERO);
        results.accept(id, POSITION, now_ms(), false);
        assert_eq!(results.get(id).state, OperationState::Accepted);
        results.note(id, POSITION, Settled::plain(OperationState::Applied));
        assert_eq!(results.get(id).state, OperationState::NotKept);
    }
}
