//! What the agent has to tell a program, taken by that program on its own thread: bounded, in order, nothing lost.
//!
//! Each kind has a bound of its own. A settled-event has its place from the moment its operation is taken; an update is
//! read from the hub only when there is room for it; of the link, and of each map's lease, only the last truth waits.

use std::{
    collections::VecDeque,
    sync::{
        Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use p2p_sync_proto::{Code, Problem, limits::MESSAGE_BYTES_MAX, v1};
use prost::Message as _;
use tokio::sync::{Semaphore, SemaphorePermit};
use uuid::Uuid;

use crate::{log_queue, results::Settled};

/// Operations and questions that will be told of, or are and were not taken.
const SETTLED_MAX: usize = 65_536;
/// Data of answers that were told and not taken: beyond it none is asked for that will be told of.
const ANSWER_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Updates not taken yet, of all subscriptions.
const UPDATES_MAX: usize = 1024;
/// Their encoded size.
const UPDATE_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Updates for which there has to be room before a page is read.
pub(crate) const PAGE_UPDATES_MAX: u32 = 256;
const _: () = assert!(PAGE_UPDATES_MAX as usize <= UPDATES_MAX && MESSAGE_BYTES_MAX <= UPDATE_BYTES_MAX);

/// Something the agent tells a program.
#[derive(Clone, Debug)]
pub enum AgentEvent {
    /// An operation that was submitted with `notify`, or a question so asked, is settled.
    Settled {
        /// Which one.
        operation_id: Uuid,
        /// What became of it.
        settled: Settled,
    },
    /// A change of a stream that is followed.
    Update {
        /// As [`crate::Agent::subscribe`] gave it.
        subscription: u64,
        /// The path's new state, deletions included.
        state: v1::State,
        /// A snapshot begins with this update: what was told of the subscription before does not count any more.
        snapshot: bool,
    },
    /// The hub answers.
    LinkUp,
    /// The hub does not answer any more, or did not from the start.
    LinkDown {
        /// Why.
        problem: Problem,
    },
    /// This host may write a map from now on; also told when a lease that was expiring was renewed.
    LeaseGranted {
        /// Which one.
        map: String,
    },
    /// The right to write a map ends soon, and could not be renewed yet.
    LeaseExpiring {
        /// Which one.
        map: String,
    },
    /// The right to write a map has passed on: the hub said so.
    LeaseLost {
        /// Which one.
        map: String,
    },
    /// A map is to pass on: end it, send what is left to be said of it, then give it up ([`crate::Question::ReleaseMap`]).
    /// [`Self::LeaseLost`] follows, or [`Self::LeaseGranted`] where it stays after all.
    LeaseHandingOver {
        /// Which one.
        map: String,
        /// The host that is to have it; nil for none yet.
        successor: Uuid,
    },
    /// A line of the log; see [`crate::log_queue::install`].
    Log {
        /// How serious it is.
        level: tracing::Level,
        /// One line, its fields behind the message.
        message: String,
    },
}

impl AgentEvent {
    /// Of an update the path and the last edit of it by the hub's operator.
    pub(crate) fn edit(&self) -> Option<(&str, u64)> {
        match self {
            Self::Update { state, .. } => Some((state.path.as_str(), state.hub_edit)),
            _ => None,
        }
    }
}

/// Orders events of all sources of the process.
pub(crate) fn stamp() -> u64 {
    static LAST: AtomicU64 = AtomicU64::new(0);
    LAST.fetch_add(1, Ordering::Relaxed)
}

/// Events that wait to be taken.
pub(crate) struct Events {
    inner: Mutex<Inner>,
    came: Condvar,
    /// Places of settled-events, taken ones excepted.
    settled_reserved: AtomicUsize,
    /// Of answers that were told and not taken.
    answer_bytes: AtomicUsize,
    /// Room for updates; given back as they are taken.
    updates: Semaphore,
    update_bytes: Semaphore,
}

#[derive(Default)]
struct Inner {
    queue: VecDeque<(u64, AgentEvent)>,
    link: Option<(u64, AgentEvent)>,
    leases: VecDeque<(u64, AgentEvent)>,
    closed: bool,
}

impl Events {
    pub(crate) fn new() -> Self {
        Self {
            inner: Mutex::default(),
            came: Condvar::new(),
            settled_reserved: AtomicUsize::new(0),
            answer_bytes: AtomicUsize::new(0),
            updates: Semaphore::new(UPDATES_MAX),
            update_bytes: Semaphore::new(UPDATE_BYTES_MAX),
        }
    }

    /// Keeps a place for a settled-event; `QUEUE_FULL` where there is none.
    pub(crate) fn reserve_settled(&self) -> Result<(), Problem> {
        if self.settled_reserved.fetch_add(1, Ordering::Relaxed) < SETTLED_MAX {
            return Ok(());
        }
        self.release_settled();
        let sentence =
            format!("{SETTLED_MAX} operations are to be told of when they settle: take events, or ask for fewer");
        Err(Problem::new(Code::QueueFull, sentence))
    }

    /// `QUEUE_FULL` where too many bytes of answers wait to be taken.
    pub(crate) fn check_answers(&self) -> Result<(), Problem> {
        if self.answer_bytes.load(Ordering::Relaxed) < ANSWER_BYTES_MAX {
            return Ok(());
        }
        let sentence = format!("answers of {ANSWER_BYTES_MAX} bytes wait to be taken: take events, then ask again");
        Err(Problem::new(Code::QueueFull, sentence))
    }

    /// Gives back a place that is not needed.
    pub(crate) fn release_settled(&self) {
        self.settled_reserved.fetch_sub(1, Ordering::Relaxed);
    }

    /// Tells of what is settled; its place was kept.
    pub(crate) fn settled(&self, operation_id: Uuid, settled: Settled) {
        self.answer_bytes.fetch_add(answer_bytes(&settled), Ordering::Relaxed);
        self.push(AgentEvent::Settled { operation_id, settled });
    }

    /// Tells whether the hub answers; takes the place of what was told of it before and was not taken.
    pub(crate) fn link(&self, down: Option<Problem>) {
        let event = down.map_or(AgentEvent::LinkUp, |problem| AgentEvent::LinkDown { problem });
        self.lock().link = Some((stamp(), event));
        self.came.notify_all();
    }

    /// Tells of a map's lease; takes the place of what was told of it before and was not taken.
    pub(crate) fn lease(&self, event: AgentEvent) {
        let mut inner = self.lock();
        let map = lease_map(&event).map(str::to_owned);
        inner.leases.retain(|(_, told)| lease_map(told) != map.as_deref());
        inner.leases.push_back((stamp(), event));
        drop(inner);
        self.came.notify_all();
    }

    /// Waits until a page of updates has room.
    pub(crate) async fn room_for_page(&self) -> Room<'_> {
        let bytes = u32::try_from(MESSAGE_BYTES_MAX).expect("a message is smaller than 4 GiB");
        Room {
            updates: self.updates.acquire_many(PAGE_UPDATES_MAX).await.expect("never closed"),
            bytes: self.update_bytes.acquire_many(bytes).await.expect("never closed"),
        }
    }

    /// Tells a page of updates, unless it is not `wanted` any more.
    pub(crate) fn updates(&self, mut room: Room<'_>, page: Vec<AgentEvent>, wanted: impl FnOnce() -> bool) {
        let mut inner = self.lock();
        if !wanted() {
            return;
        }
        for event in page {
            room.keep(update_bytes(&event));
            inner.queue.push_back((stamp(), event));
        }
        drop(inner);
        self.came.notify_all();
    }

    /// Takes a subscription's updates back.
    pub(crate) fn forget_updates(&self, of: u64) {
        self.lock().queue.retain(|(_, event)| {
            let forgotten = matches!(event, AgentEvent::Update { subscription, .. } if *subscription == of);
            if forgotten {
                self.taken(event);
            }
            !forgotten
        });
    }

    /// The stamp of the oldest event.
    pub(crate) fn oldest(&self) -> Option<u64> {
        self.lock().oldest()
    }

    /// Takes the oldest event if `fits`.
    pub(crate) fn next(&self, fits: impl FnOnce(&AgentEvent) -> bool) -> Option<AgentEvent> {
        let mut inner = self.lock();
        let oldest = inner.oldest()?;
        let is_oldest = |waiting: Option<&(u64, AgentEvent)>| waiting.is_some_and(|(stamp, _)| *stamp == oldest);
        let is_link = is_oldest(inner.link.as_ref());
        let is_lease = is_oldest(inner.leases.front());
        let waiting = if is_link {
            inner.link.as_ref()
        } else if is_lease {
            inner.leases.front()
        } else {
            inner.queue.front()
        };
        if !fits(&waiting?.1) {
            return None;
        }
        let (_, event) = if is_link {
            inner.link.take()
        } else if is_lease {
            inner.leases.pop_front()
        } else {
            inner.queue.pop_front()
        }?;
        self.taken(&event);
        Some(event)
    }

    /// Waits until there is an event, the time is over or none will come any more; gives whether there is one.
    pub(crate) fn wait(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut inner = self.lock();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if inner.oldest().is_some() {
                return true;
            }
            if inner.closed || left.is_zero() {
                return false;
            }
            inner = self
                .came
                .wait_timeout(inner, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Whether no more events will come.
    pub(crate) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Lets all who wait go; what is there can still be taken.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.came.notify_all();
    }

    fn push(&self, event: AgentEvent) {
        self.lock().queue.push_back((stamp(), event));
        self.came.notify_all();
    }

    /// Gives the room of an event back.
    fn taken(&self, event: &AgentEvent) {
        match event {
            AgentEvent::Settled { settled, .. } => {
                self.answer_bytes.fetch_sub(answer_bytes(settled), Ordering::Relaxed);
                self.release_settled();
            }
            AgentEvent::Update { .. } => {
                self.updates.add_permits(1);
                self.update_bytes.add_permits(update_bytes(event));
            }
            AgentEvent::LinkUp
            | AgentEvent::LinkDown { .. }
            | AgentEvent::LeaseGranted { .. }
            | AgentEvent::LeaseExpiring { .. }
            | AgentEvent::LeaseLost { .. }
            | AgentEvent::LeaseHandingOver { .. }
            | AgentEvent::Log { .. } => {}
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn oldest(&self) -> Option<u64> {
        let queued = self.queue.front().map(|(stamp, _)| *stamp);
        let link = self.link.as_ref().map(|(stamp, _)| *stamp);
        let lease = self.leases.front().map(|(stamp, _)| *stamp);
        queued.into_iter().chain(link).chain(lease).min()
    }
}

/// Takes the oldest of these and of the log's lines if it `fits`.
pub(crate) fn next_of(events: &Events, fits: impl FnOnce(&AgentEvent) -> bool) -> Option<AgentEvent> {
    match (events.oldest(), log_queue::oldest()) {
        (event, Some(line)) if event.is_none_or(|event| line < event) => log_queue::next(fits),
        _ => events.next(fits),
    }
}

/// Room for a page of updates; what is not kept of it is given back.
pub(crate) struct Room<'a> {
    updates: SemaphorePermit<'a>,
    bytes: SemaphorePermit<'a>,
}

impl Room<'_> {
    /// Keeps the room of one update until that is taken.
    fn keep(&mut self, bytes: usize) {
        let (Some(update), Some(bytes)) = (self.updates.split(1), self.bytes.split(bytes)) else {
            unreachable!("a page fits its room: its updates are counted, its bytes are a message's at most");
        };
        update.forget();
        bytes.forget();
    }
}

fn answer_bytes(settled: &Settled) -> usize {
    settled.data.as_ref().map_or(0, |data| data.len())
}

fn lease_map(event: &AgentEvent) -> Option<&str> {
    match event {
        AgentEvent::LeaseGranted { map }
        | AgentEvent::LeaseExpiring { map }
        | AgentEvent::LeaseLost { map }
        | AgentEvent::LeaseHandingOver { map, .. } => Some(map),
        _ => None,
    }
}

fn update_bytes(event: &AgentEvent) -> usize {
    match event {
        AgentEvent::Update { state, .. } => state.encoded_len(),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::OperationState;

    fn update(subscription: u64, stream_sequence: u64, payload_bytes: usize) -> AgentEvent {
        let state = v1::State {
            stream_sequence,
            payload: vec![b' '; payload_bytes].into(),
            ..Default::default()
        };
        AgentEvent::Update {
            subscription,
            state,
            snapshot: false,
        }
    }

    fn take(events: &Events) -> Option<AgentEvent> {
        events.next(|_| true)
    }

    /// Whether a page has room now.
    fn has_room(events: &Events) -> bool {
        let mut waiting = std::pin::pin!(events.room_for_page());
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        waiting.as_mut().poll(&mut context).is_ready()
    }

    fn tell_page(events: &Events, page: Vec<AgentEvent>) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .expect("can be made");
        let room = runtime.block_on(events.room_for_page());
        events.updates(room, page, || true);
    }

    #[test]
    fn events_come_in_the_order_they_were_told_and_one_that_does_not_fit_stays() {
        let events = Events::new();
        events.reserve_settled().expect("room");
        events.settled(Uuid::from_u128(1), Settled::plain(OperationState::Applied));
        events.link(None);
        tell_page(&events, vec![update(1, 1, 0)]);
        assert!(events.next(|_| false).is_none());
        assert!(matches!(take(&events), Some(AgentEvent::Settled { .. })));
        assert!(matches!(take(&events), Some(AgentEvent::LinkUp)));
        assert!(matches!(take(&events), Some(AgentEvent::Update { .. })));
        assert!(take(&events).is_none());
    }

    #[test]
    fn a_link_that_came_and_went_untaken_is_told_as_it_is_now() {
        let events = Events::new();
        events.link(None);
        for sentence in ["first", "second"] {
            events.link(Some(Problem::new(Code::HubUnavailable, sentence)));
        }
        assert!(matches!(take(&events), Some(AgentEvent::LinkDown { problem }) if problem.sentence == "second"));
        assert!(take(&events).is_none());
    }

    #[test]
    fn settled_events_have_a_bound_that_taking_them_gives_back() {
        let events = Events::new();
        for _ in 0..SETTLED_MAX {
            events.reserve_settled().expect("room");
        }
        assert_eq!(events.reserve_settled().expect_err("full").code, Code::QueueFull);
        events.settled(Uuid::from_u128(1), Settled::plain(OperationState::Applied));
        assert!(
            events.reserve_settled().is_err(),
            "told and not taken still has its place"
        );
        take(&events).expect("there is one");
        assert!(events.reserve_settled().is_ok());
    }

    #[test]
    fn invariant_12_answers_that_are_not_taken_have_a_bound_in_bytes_that_taking_them_gives_back() {
        let events = Events::new();
        let mebibyte: std::sync::Arc<str> = "x".repeat(1024 * 1024).into();
        for number in 0..16 {
            events.check_answers().expect("room");
            events.reserve_settled().expect("room");
            let answer = Settled {
                data: Some(mebibyte.clone()),
                ..Settled::plain(OperationState::Applied)
            };
            events.settled(Uuid::from_u128(number), answer);
        }
        assert_eq!(events.check_answers().expect_err("full").code, Code::QueueFull);
        take(&events).expect("there is one");
        assert!(events.check_answers().is_ok());
    }

    #[test]
    fn updates_are_not_read_beyond_their_number_or_bytes_until_some_are_taken() {
        for payload_bytes in [0, 8000] {
            let events = Events::new();
            while has_room(&events) {
                tell_page(
                    &events,
                    (0..u64::from(PAGE_UPDATES_MAX))
                        .map(|n| update(1, n, payload_bytes))
                        .collect(),
                );
            }
            let (told, bytes) = {
                let inner = events.lock();
                let bytes: usize = inner.queue.iter().map(|(_, event)| update_bytes(event)).sum();
                (inner.queue.len(), bytes)
            };
            assert!(
                told <= UPDATES_MAX && bytes <= UPDATE_BYTES_MAX,
                "{told} updates, {bytes} bytes"
            );
            for _ in 0..PAGE_UPDATES_MAX {
                take(&events).expect("there are more");
            }
            assert!(has_room(&events));
            while take(&events).is_some() {}
            assert_eq!(events.updates.available_permits(), UPDATES_MAX);
            assert_eq!(events.update_bytes.available_permits(), UPDATE_BYTES_MAX);
        }
    }

    #[test]
    fn updates_of_a_subscription_that_ended_are_taken_back_with_their_room() {
        let events = Events::new();
        tell_page(&events, vec![update(1, 1, 10), update(2, 1, 10), update(1, 2, 10)]);
        events.forget_updates(1);
        assert!(matches!(
            take(&events),
            Some(AgentEvent::Update { subscription: 2, .. })
        ));
        assert!(take(&events).is_none());
        assert_eq!(events.updates.available_permits(), UPDATES_MAX);
    }

    #[test]
    fn who_waits_is_let_go_by_an_event_and_by_the_end() {
        let events = std::sync::Arc::new(Events::new());
        let waiting = std::thread::spawn({
            let events = events.clone();
            move || events.wait(Duration::from_mins(1))
        });
        events.link(None);
        assert!(waiting.join().expect("no panic"));
        take(&events).expect("there is one");
        events.close();
        assert!(!events.wait(Duration::from_mins(1)));
    }
}
