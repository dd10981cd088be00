//! What waits to be sent and what is on its way: a plain state machine over plain data, without a clock, thread or
//! socket of its own.
//!
//! Memory holds what is live; when it is full, the oldest waiting bulk operations are left to the disk alone and come
//! back, oldest first, as room and the link allow. The live go first, the backlog gets at least every fourth message.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use p2p_sync_proto::{
    Position,
    limits::{BATCH_BYTES_MAX, BATCH_OPS_MAX, BATCH_WITHDRAWN_MAX},
    v1::SequenceRange,
};
use prost::bytes::Bytes;
use uuid::Uuid;

/// Encoded bytes of all operations held here; beyond it the oldest are left to the disk.
const BYTES_MAX: usize = 16 * 1024 * 1024;
/// A path's older operation gives way to a newer one only while this many wait: a short queue is no backlog.
const CONFLATE_ABOVE_OPS: usize = 2048;
/// Every so many bulk messages is one of the backlog while live operations wait too.
const BACKLOG_SHARE: u32 = 4;

/// One operation on its way.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) position: Position,
    pub(crate) operation_id: Uuid,
    pub(crate) path: Arc<str>,
    /// Kept as `every`: never conflated, and bound to the order of its path.
    pub(crate) every: bool,
    pub(crate) critical: bool,
    pub(crate) predecessor: Option<Position>,
    /// Canonical bytes.
    pub(crate) bytes: Bytes,
    /// Of the payload alone, as it was counted when it was taken.
    pub(crate) payload_bytes: usize,
    pub(crate) spooled: bool,
}

#[derive(Debug)]
struct Slot {
    entry: Entry,
    attempts: u32,
    stage: Stage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Waiting,
    /// Tried; waits until then to be tried again.
    Delayed(Instant),
    InFlight,
}

/// The operations that one message carries, and the ranges it withdraws.
#[derive(Debug)]
pub(crate) struct Flight {
    /// In the order of the message, which is the order of their positions.
    pub(crate) operations: Vec<(Position, Bytes)>,
    /// Which of them this flight took out of the queue: predecessors that ride along may be in flight elsewhere.
    taken: Vec<Position>,
    pub(crate) withdrawn: Vec<SequenceRange>,
}

/// All that is on its way.
#[derive(Debug)]
pub(crate) struct Pending {
    slots: BTreeMap<Position, Slot>,
    critical: BTreeSet<Position>,
    live: BTreeSet<Position>,
    backlog: BTreeSet<Position>,
    delayed: BTreeSet<(Instant, Position)>,
    /// The waiting operation of each `latest` path that a newer one may replace.
    newest: HashMap<Arc<str>, Position>,
    withdrawn: BTreeMap<(u64, u64), u64>,
    /// One message at a time tells of them.
    withdrawn_in_flight: bool,
    /// Positions that are on disk alone lie in here; both ends inclusive.
    on_disk: Option<(Position, Position)>,
    bytes: usize,
    ops_max: usize,
    conflation: bool,
    /// Bulk messages taken since the backlog had its turn.
    since_backlog: u32,
}

impl Pending {
    pub(crate) fn new(ops_max: usize, conflation: bool) -> Self {
        Self {
            slots: BTreeMap::new(),
            critical: BTreeSet::new(),
            live: BTreeSet::new(),
            backlog: BTreeSet::new(),
            delayed: BTreeSet::new(),
            newest: HashMap::new(),
            withdrawn: BTreeMap::new(),
            withdrawn_in_flight: false,
            on_disk: None,
            bytes: 0,
            ops_max,
            conflation,
            since_backlog: 0,
        }
    }

    /// Operations in memory, in flight included.
    pub(crate) fn len(&self) -> usize {
        self.slots.len()
    }

    /// Nothing in memory and nothing left to the disk.
    pub(crate) fn is_drained(&self) -> bool {
        self.slots.is_empty() && self.on_disk.is_none()
    }

    /// Bulk operations that could be sent now.
    pub(crate) fn bulk_ready(&self) -> usize {
        self.live.len() + self.backlog.len()
    }

    /// Takes a new operation; gives back the older one of its path that it replaces, if a backlog waits.
    pub(crate) fn push(&mut self, entry: Entry) -> Option<Entry> {
        let replaced = self.conflate(&entry);
        if !entry.every {
            self.newest.insert(entry.path.clone(), entry.position);
        }
        let queue = if entry.critical {
            &mut self.critical
        } else {
            &mut self.live
        };
        queue.insert(entry.position);
        self.insert(entry);
        self.shed();
        replaced
    }

    /// Takes an operation back from the disk.
    pub(crate) fn push_backlog(&mut self, entry: Entry) {
        if self.slots.contains_key(&entry.position) {
            return;
        }
        self.backlog.insert(entry.position);
        self.insert(entry);
    }

    fn insert(&mut self, entry: Entry) {
        self.bytes += entry.bytes.len();
        self.slots.insert(
            entry.position,
            Slot {
                entry,
                attempts: 0,
                stage: Stage::Waiting,
            },
        );
    }

    fn conflate(&mut self, newer: &Entry) -> Option<Entry> {
        if !self.conflation || newer.every || self.bulk_ready() < CONFLATE_ABOVE_OPS {
            return None;
        }
        let older = *self.newest.get(&newer.path)?;
        let slot = self.slots.get(&older)?;
        // What has been tried may have been applied: only its own answer settles it.
        if slot.stage != Stage::Waiting || slot.attempts > 0 || older > newer.position {
            return None;
        }
        let entry = self.remove(older)?;
        self.withdraw(older);
        Some(entry)
    }

    /// Notes that a position will never be sent, for the hub to count it as settled.
    pub(crate) fn withdraw(&mut self, position: Position) {
        self.withdraw_range(SequenceRange {
            incarnation: position.incarnation,
            first: position.sequence,
            last: position.sequence,
        });
    }

    /// As [`Self::withdraw`], for a range read back from the disk.
    pub(crate) fn withdraw_range(&mut self, range: SequenceRange) {
        self.withdrawn.insert((range.incarnation, range.first), range.last);
    }

    /// Leaves the oldest waiting bulk operations to the disk while memory is over its bounds.
    fn shed(&mut self) {
        while self.slots.len() > self.ops_max || self.bytes > BYTES_MAX {
            let spooled = |position: &&Position| self.slots[*position].entry.spooled;
            let oldest_live = self.live.iter().find(spooled).copied();
            // The backlog's newest goes first: its oldest are the next to be sent.
            let Some(position) = self.backlog.iter().next_back().copied().or(oldest_live) else {
                return;
            };
            self.remove(position);
            self.leave_to_disk(position, position);
        }
    }

    /// Notes that the disk holds operations between these positions that memory does not.
    pub(crate) fn leave_to_disk(&mut self, first: Position, last: Position) {
        let (from, to) = self.on_disk.unwrap_or((first, last));
        self.on_disk = Some((from.min(first), to.max(last)));
    }

    /// Where to read on from the disk, and how many operations there is room for; `None` while memory is busy.
    pub(crate) fn wants_backlog(&self) -> Option<(Position, Position, usize)> {
        let (from, to) = self.on_disk?;
        let room = (self.ops_max / 2).saturating_sub(self.slots.len());
        (self.backlog.len() < BATCH_OPS_MAX && room > 0 && self.bytes < BYTES_MAX / 2).then_some((from, to, room))
    }

    /// Notes how far the disk was read: up to `next`, or to its end.
    pub(crate) fn backlog_read_to(&mut self, next: Option<Position>) {
        self.on_disk = match (self.on_disk, next) {
            (Some((_, to)), Some(next)) if next <= to => Some((next, to)),
            _ => None,
        };
    }

    /// Takes the next critical message: what is there at once, together, with the waiting predecessors of each path.
    pub(crate) fn take_critical(&mut self) -> Option<Flight> {
        let mut flight = Flight {
            operations: vec![],
            taken: vec![],
            withdrawn: vec![],
        };
        let mut members: BTreeMap<Position, Bytes> = BTreeMap::new();
        let mut bytes = 0;
        for position in self.critical.clone() {
            let Some(chain) = self.chain(position) else {
                self.delay_for_predecessor(position);
                continue;
            };
            let chain_bytes: usize = chain.iter().map(|member| self.slots[member].entry.bytes.len()).sum();
            let full = members.len() + chain.len() > BATCH_OPS_MAX || bytes + chain_bytes > BATCH_BYTES_MAX;
            if full && !members.is_empty() {
                break;
            }
            bytes += chain_bytes;
            members.extend(
                chain
                    .into_iter()
                    .map(|member| (member, self.slots[&member].entry.bytes.clone())),
            );
        }
        for position in members.keys() {
            if self.slots[position].stage != Stage::InFlight {
                self.begin(*position);
                flight.taken.push(*position);
            }
        }
        flight.operations = members.into_iter().collect();
        (!flight.operations.is_empty()).then_some(flight)
    }

    /// The operation and its unsettled predecessors; `None` when one of them is not in memory.
    fn chain(&self, position: Position) -> Option<Vec<Position>> {
        let mut chain = vec![position];
        let mut at = position;
        while let Some(predecessor) = self.slots[&at].entry.predecessor {
            match self.slots.get(&predecessor) {
                Some(_) => chain.push(predecessor),
                None if self.is_on_disk(predecessor) => return None,
                None => break,
            }
            if chain.len() > BATCH_OPS_MAX {
                return None;
            }
            at = predecessor;
        }
        Some(chain)
    }

    fn is_on_disk(&self, position: Position) -> bool {
        self.on_disk.is_some_and(|(from, to)| (from..=to).contains(&position))
    }

    /// An operation whose predecessor is still on disk goes by the bulk lane, behind it.
    fn delay_for_predecessor(&mut self, position: Position) {
        self.critical.remove(&position);
        if let Some(slot) = self.slots.get_mut(&position) {
            slot.entry.critical = false;
            self.backlog.insert(position);
        }
    }

    /// Takes the next bulk message of at most `ops_max` operations.
    pub(crate) fn take_bulk(&mut self, ops_max: usize) -> Option<Flight> {
        let backlog_first =
            !self.backlog.is_empty() && (self.live.is_empty() || self.since_backlog + 1 >= BACKLOG_SHARE);
        self.since_backlog = if backlog_first { 0 } else { self.since_backlog + 1 };
        let (first, second) = if backlog_first {
            (&self.backlog, &self.live)
        } else {
            (&self.live, &self.backlog)
        };
        let mut bytes = 0;
        let mut taken: Vec<Position> = first
            .iter()
            .chain(second)
            .take(ops_max.min(BATCH_OPS_MAX))
            .copied()
            .take_while(|position| {
                bytes += self.slots[position].entry.bytes.len();
                bytes <= BATCH_BYTES_MAX || bytes == self.slots[position].entry.bytes.len()
            })
            .collect();
        taken.sort_unstable();
        for position in &taken {
            self.begin(*position);
        }
        let withdrawn = self.take_withdrawn();
        let operations = taken
            .iter()
            .map(|position| (*position, self.slots[position].entry.bytes.clone()))
            .collect();
        let flight = Flight {
            operations,
            taken,
            withdrawn,
        };
        (!flight.operations.is_empty() || !flight.withdrawn.is_empty()).then_some(flight)
    }

    fn take_withdrawn(&mut self) -> Vec<SequenceRange> {
        if self.withdrawn_in_flight {
            return vec![];
        }
        let ranges = self.withdrawn.iter().take(BATCH_WITHDRAWN_MAX);
        let taken: Vec<SequenceRange> = ranges
            .map(|(&(incarnation, first), &last)| SequenceRange {
                incarnation,
                first,
                last,
            })
            .collect();
        self.withdrawn_in_flight = !taken.is_empty();
        taken
    }

    /// Withdrawn ranges wait to be told.
    pub(crate) fn has_withdrawn(&self) -> bool {
        !self.withdrawn.is_empty() && !self.withdrawn_in_flight
    }

    fn begin(&mut self, position: Position) {
        self.unqueue(position);
        if let Some(slot) = self.slots.get_mut(&position) {
            slot.stage = Stage::InFlight;
            slot.attempts += 1;
        }
    }

    fn unqueue(&mut self, position: Position) {
        self.critical.remove(&position);
        self.live.remove(&position);
        self.backlog.remove(&position);
        if let Some(Slot {
            stage: Stage::Delayed(until),
            ..
        }) = self.slots.get(&position)
        {
            self.delayed.remove(&(*until, position));
        }
    }

    /// Puts back what a flight took and what was not settled, each to be tried again after its own delay.
    pub(crate) fn put_back(&mut self, flight: &Flight, now: Instant, delay: impl Fn(u32) -> Duration) {
        for position in &flight.taken {
            self.retry(*position, now, &delay);
        }
        if !flight.withdrawn.is_empty() {
            self.withdrawn_in_flight = false;
        }
    }

    /// Puts one operation back, to be tried again after its delay.
    pub(crate) fn retry(&mut self, position: Position, now: Instant, delay: impl Fn(u32) -> Duration) {
        if let Some(slot) = self.slots.get_mut(&position)
            && slot.stage == Stage::InFlight
        {
            let until = now + delay(slot.attempts);
            slot.stage = Stage::Delayed(until);
            self.delayed.insert((until, position));
        }
    }

    /// Forgets the delays: the link answers again.
    pub(crate) fn retry_now(&mut self) {
        while let Some((_, position)) = self.delayed.pop_first() {
            self.requeue(position);
        }
    }

    /// Queues what has waited long enough; gives the time of the next that has not.
    pub(crate) fn wake(&mut self, now: Instant) -> Option<Instant> {
        while let Some(&(until, position)) = self.delayed.first() {
            if until > now {
                return Some(until);
            }
            self.delayed.pop_first();
            self.requeue(position);
        }
        None
    }

    fn requeue(&mut self, position: Position) {
        if let Some(slot) = self.slots.get_mut(&position) {
            slot.stage = Stage::Waiting;
            let queue = if slot.entry.critical {
                &mut self.critical
            } else {
                &mut self.backlog
            };
            queue.insert(position);
        }
    }

    /// Takes a settled operation out, whichever flight brought the answer first.
    pub(crate) fn remove(&mut self, position: Position) -> Option<Entry> {
        self.unqueue(position);
        let entry = self.slots.remove(&position)?.entry;
        self.bytes -= entry.bytes.len();
        if self.newest.get(&entry.path) == Some(&position) {
            self.newest.remove(&entry.path);
        }
        Some(entry)
    }

    /// Takes out the ranges that the hub has been told.
    pub(crate) fn withdrawn_told(&mut self, told: &[SequenceRange]) {
        for range in told {
            self.withdrawn.remove(&(range.incarnation, range.first));
        }
        if !told.is_empty() {
            self.withdrawn_in_flight = false;
        }
    }

    /// Notes that an operation is on disk; false when it is settled already.
    pub(crate) fn mark_spooled(&mut self, position: Position) -> bool {
        self.slots
            .get_mut(&position)
            .map(|slot| slot.entry.spooled = true)
            .is_some()
    }

    /// Operations that are in memory alone, oldest first.
    pub(crate) fn unspooled(&self) -> Vec<Entry> {
        self.slots
            .values()
            .filter(|slot| !slot.entry.spooled)
            .map(|slot| slot.entry.clone())
            .collect()
    }

    /// Whether a waiting operation of this path could be replaced by a newer one: what a full disk leaves possible.
    pub(crate) fn replace_waiting(&mut self, path: &str) -> Option<Entry> {
        let position = *self.newest.get(path)?;
        let slot = self.slots.get(&position)?;
        if slot.stage != Stage::Waiting || slot.attempts > 0 {
            return None;
        }
        let entry = self.remove(position)?;
        self.withdraw(position);
        Some(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(sequence: u64, path: &str) -> Entry {
        Entry {
            position: Position {
                incarnation: 1,
                sequence,
            },
            operation_id: Uuid::from_u128(u128::from(sequence)),
            path: path.into(),
            every: false,
            critical: false,
            predecessor: None,
            bytes: Bytes::from_static(b"0123456789"),
            payload_bytes: 0,
            spooled: true,
        }
    }

    fn every(sequence: u64, predecessor: Option<u64>) -> Entry {
        let predecessor = predecessor.map(|sequence| Position {
            incarnation: 1,
            sequence,
        });
        Entry {
            every: true,
            predecessor,
            ..entry(sequence, "m/CHAT_MESSAGE")
        }
    }

    fn sequences(flight: &Flight) -> Vec<u64> {
        flight
            .operations
            .iter()
            .map(|(position, _)| position.sequence)
            .collect()
    }

    fn second(_: u32) -> Duration {
        Duration::from_secs(1)
    }

    #[test]
    fn a_failed_message_is_tried_again_after_its_delay_and_in_order() {
        let mut pending = Pending::new(100, true);
        let now = Instant::now();
        for sequence in 1..=3 {
            pending.push(entry(sequence, &format!("m/{sequence}")));
        }
        let flight = pending.take_bulk(10).expect("three wait");
        assert!(pending.take_bulk(10).is_none());
        pending.put_back(&flight, now, second);
        assert_eq!(pending.wake(now), Some(now + Duration::from_secs(1)));
        assert!(pending.take_bulk(10).is_none());
        assert_eq!(pending.wake(now + Duration::from_secs(1)), None);
        assert_eq!(sequences(&pending.take_bulk(10).expect("again")), [1, 2, 3]);
    }

    #[test]
    fn a_short_queue_is_not_conflated_and_a_backlog_is() {
        let mut pending = Pending::new(100_000, true);
        assert!(pending.push(entry(1, "m/a")).is_none());
        assert!(pending.push(entry(2, "m/a")).is_none());
        let backlog = CONFLATE_ABOVE_OPS as u64;
        for sequence in 3..=backlog {
            pending.push(entry(sequence, &format!("m/{sequence}")));
        }
        let replaced = pending.push(entry(backlog + 1, "m/a")).expect("conflated");
        assert_eq!(replaced.position.sequence, 2);
        let flight = pending.take_bulk(BATCH_OPS_MAX).expect("waits");
        assert_eq!(
            flight.withdrawn,
            [SequenceRange {
                incarnation: 1,
                first: 2,
                last: 2
            }]
        );
    }

    #[test]
    fn what_was_tried_or_is_kept_as_every_is_never_conflated() {
        let mut pending = Pending::new(100_000, true);
        pending.push(entry(1, "m/a"));
        let tried = pending.take_bulk(1).expect("one");
        pending.put_back(&tried, Instant::now(), |_| Duration::ZERO);
        pending.wake(Instant::now());
        for sequence in 2..=CONFLATE_ABOVE_OPS as u64 + 1 {
            pending.push(every(sequence, None));
        }
        assert!(pending.push(entry(9000, "m/a")).is_none());
        assert!(pending.push(every(9001, None)).is_none());
    }

    #[test]
    fn memory_is_bounded_and_what_it_sheds_comes_back_from_disk_in_order() {
        let mut pending = Pending::new(20, true);
        for sequence in 1..=30 {
            pending.push(entry(sequence, &format!("m/{sequence}")));
        }
        assert_eq!(pending.len(), 20);
        assert!(pending.wants_backlog().is_none(), "memory is busy");
        assert_eq!(
            sequences(&pending.take_bulk(20).expect("live")),
            (11..=30).collect::<Vec<_>>()
        );
        for sequence in 11..=30 {
            pending.remove(Position {
                incarnation: 1,
                sequence,
            });
        }
        let (from, to, room) = pending.wants_backlog().expect("room");
        assert_eq!((from.sequence, to.sequence, room), (1, 10, 10));
        for sequence in 1..=10 {
            pending.push_backlog(entry(sequence, "m"));
        }
        pending.backlog_read_to(None);
        assert_eq!(
            sequences(&pending.take_bulk(20).expect("backlog")),
            (1..=10).collect::<Vec<_>>()
        );
    }

    #[test]
    fn the_backlog_yields_to_the_live_and_is_not_starved() {
        let mut pending = Pending::new(1000, true);
        pending.push_backlog(entry(1, "m/old"));
        let mut turns = Vec::new();
        for sequence in 2..=6 {
            pending.push(entry(sequence, &format!("m/{sequence}")));
            turns.extend(sequences(&pending.take_bulk(1).expect("waits")));
        }
        assert_eq!(turns, [2, 3, 4, 1, 5]);
    }

    #[test]
    fn a_critical_operation_takes_its_waiting_predecessors_along() {
        let mut pending = Pending::new(100, true);
        pending.push(every(1, None));
        pending.push(every(2, Some(1)));
        pending.push(entry(3, "m/x"));
        pending.push(Entry {
            critical: true,
            ..every(4, Some(2))
        });
        let flight = pending.take_critical().expect("critical");
        assert_eq!(sequences(&flight), [1, 2, 4]);
        assert_eq!(sequences(&pending.take_bulk(10).expect("the rest")), [3]);
    }

    #[test]
    fn a_predecessor_in_flight_rides_along_and_is_put_back_by_the_flight_that_took_it() {
        let mut pending = Pending::new(100, true);
        let now = Instant::now();
        pending.push(every(1, None));
        let bulk = pending.take_bulk(10).expect("bulk");
        pending.push(Entry {
            critical: true,
            ..every(2, Some(1))
        });
        let critical = pending.take_critical().expect("critical");
        assert_eq!(sequences(&critical), [1, 2]);
        pending.put_back(&critical, now, |_| Duration::ZERO);
        pending.wake(now);
        assert!(pending.take_bulk(10).is_none(), "still in the bulk flight");
        pending.put_back(&bulk, now, |_| Duration::ZERO);
        pending.wake(now);
        assert_eq!(sequences(&pending.take_bulk(10).expect("back")), [1]);
    }

    #[test]
    fn a_message_is_closed_before_it_grows_too_large() {
        let mut pending = Pending::new(100, true);
        let large = Bytes::from(vec![0; BATCH_BYTES_MAX / 3]);
        for sequence in 1..=5 {
            pending.push(Entry {
                bytes: large.clone(),
                ..entry(sequence, &format!("m/{sequence}"))
            });
        }
        assert_eq!(sequences(&pending.take_bulk(10).expect("bulk")), [1, 2, 3]);
        assert_eq!(sequences(&pending.take_bulk(10).expect("bulk")), [4, 5]);
    }
}
