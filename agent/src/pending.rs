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

use crate::withdrawn::Withdrawn;

/// Encoded bytes of all operations held here; beyond it the oldest are left to the disk.
pub(crate) const BYTES_MAX: usize = 16 * 1024 * 1024;
/// A path's older operation gives way to a newer one only while this many wait: a short queue is no backlog.
const CONFLATE_ABOVE_OPS: usize = 2048;
/// So much of the backlog is in memory however crowded that is; the largest payloads take 16 MiB then.
const BACKLOG_OPS_MIN: usize = 64;
/// An operation is tried without its predecessor having been seen to settle; a safety net.
const FOLLOWER_DELAY: Duration = Duration::from_secs(5);
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
    /// What it counted for when it was taken.
    pub(crate) reserved_bytes: usize,
    pub(crate) spooled: bool,
}

#[derive(Debug)]
struct Slot {
    entry: Entry,
    attempts: u32,
    stage: Stage,
    /// The operation of its path that was the newest before it, to give way once this one is on disk.
    replaces: Option<Position>,
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
    /// Which operation here names the key as its predecessor.
    followers: HashMap<Position, Position>,
    /// The waiting operation of each `latest` path that a newer one may replace.
    newest: HashMap<Arc<str>, Position>,
    withdrawn: Withdrawn,
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
            followers: HashMap::new(),
            newest: HashMap::new(),
            withdrawn: Withdrawn::default(),
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

    /// Takes a new operation; gives back the older one of its path that it replaces, if a backlog waits or `crowded`.
    pub(crate) fn push(&mut self, entry: Entry, crowded: bool) -> Option<Entry> {
        let replaced = self.conflate(&entry, crowded);
        let mut older = None;
        if !entry.every {
            older = self.newest.insert(entry.path.clone(), entry.position);
        }
        let queue = if entry.critical {
            &mut self.critical
        } else {
            &mut self.live
        };
        queue.insert(entry.position);
        let position = entry.position;
        self.insert(entry);
        if let Some(slot) = self.slots.get_mut(&position) {
            slot.replaces = older;
        }
        self.shed();
        replaced
    }

    /// Takes a page of operations back from the disk, which was read from `from` up to `next`, or to its end.
    ///
    /// One step, so that what is left to the disk meanwhile is never behind where it is read on.
    pub(crate) fn take_back(&mut self, from: Position, page: Vec<Entry>, next: Option<Position>) {
        self.on_disk = match (self.on_disk, next) {
            (Some((before, to)), _) if before < from => Some((before, to)),
            (Some((_, to)), Some(next)) if next <= to => Some((next, to)),
            _ => None,
        };
        for entry in page {
            if !self.slots.contains_key(&entry.position) {
                self.backlog.insert(entry.position);
                self.insert(entry);
            }
        }
    }

    fn insert(&mut self, entry: Entry) {
        self.bytes += entry.bytes.len();
        if let Some(predecessor) = entry.predecessor {
            self.followers.insert(predecessor, entry.position);
        }
        self.slots.insert(
            entry.position,
            Slot {
                entry,
                attempts: 0,
                stage: Stage::Waiting,
                replaces: None,
            },
        );
    }

    fn conflate(&mut self, newer: &Entry, crowded: bool) -> Option<Entry> {
        let is_backlog = self.critical.len() + self.bulk_ready() >= CONFLATE_ABOVE_OPS.min(self.ops_max / 2);
        if !self.conflation || newer.every || !(is_backlog || crowded) || self.withdrawn.is_full() {
            return None;
        }
        let older = *self.newest.get(&newer.path)?;
        let slot = self.slots.get(&older)?;
        // What has been tried may have been applied: only its own answer settles it. What is on disk gives way to what
        // is on disk alone: a kill would leave neither.
        let is_untried = slot.stage == Stage::Waiting && slot.attempts == 0;
        if !is_untried || older >= newer.position || (slot.entry.spooled && !newer.spooled) {
            return None;
        }
        let entry = self.remove(older)?;
        self.withdrawn.insert(older);
        Some(entry)
    }

    /// Notes that these positions will never be sent, for the hub to count them as settled.
    pub(crate) fn withdraw(&mut self, range: SequenceRange) {
        self.withdrawn.insert_range(range);
    }

    /// What the hub has not been told of yet.
    pub(crate) fn withdrawn(&self) -> Vec<SequenceRange> {
        self.withdrawn.iter().collect()
    }

    /// Leaves the oldest waiting operations to the disk while memory is over its bounds, critical ones last.
    fn shed(&mut self) {
        while self.slots.len() > self.ops_max || self.bytes > BYTES_MAX {
            let spooled = |position: &&Position| self.slots[*position].entry.spooled;
            // The backlog's newest goes first: its oldest are the next to be sent, and a few of them stay in any case.
            let backlog_max = self.backlog.len().saturating_sub(BACKLOG_OPS_MIN);
            let backlog = self.backlog.iter().rev().take(backlog_max).find(spooled);
            // They come to the disk in their order: where the oldest is not there yet, none is, and none has to be looked at.
            let oldest = || {
                let live = self.live.first().filter(spooled);
                live.or_else(|| self.critical.first().filter(spooled))
            };
            let Some(position) = backlog.or_else(oldest).copied() else {
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
    ///
    /// What is older than all in memory always finds a little room: the rest may have to wait for it.
    pub(crate) fn wants_backlog(&self) -> Option<(Position, Position, usize)> {
        let (from, to) = self.on_disk?;
        let room = (self.ops_max / 2).saturating_sub(self.slots.len());
        if self.slots.first_key_value().is_none_or(|(first, _)| from < *first) {
            return Some((from, to, room.max(BACKLOG_OPS_MIN)));
        }
        (self.backlog.len() < BATCH_OPS_MAX && room > 0 && self.bytes < BYTES_MAX / 2).then_some((from, to, room))
    }

    /// Takes the next critical message: what is there at once, together, with the unsettled predecessors of each path.
    pub(crate) fn take_critical(&mut self) -> Option<Flight> {
        let mut members: BTreeSet<Position> = BTreeSet::new();
        let mut behind_the_disk = Vec::new();
        let mut bytes = 0;
        for position in &self.critical {
            let Some(chain) = self.chain(*position, &members) else {
                behind_the_disk.push(*position);
                continue;
            };
            let chain_bytes: usize = chain.iter().map(|member| self.slots[member].entry.bytes.len()).sum();
            let is_full = members.len() + chain.len() > BATCH_OPS_MAX || bytes + chain_bytes > BATCH_BYTES_MAX;
            if is_full && !members.is_empty() {
                break;
            }
            bytes += chain_bytes;
            members.extend(chain);
        }
        for position in behind_the_disk {
            self.go_by_bulk(position);
        }
        let taken: Vec<Position> = members
            .iter()
            .filter(|position| self.slots[position].stage != Stage::InFlight)
            .copied()
            .collect();
        for position in &taken {
            self.begin(*position);
        }
        let operations: Vec<_> = members
            .iter()
            .map(|position| (*position, self.slots[position].entry.bytes.clone()))
            .collect();
        (!operations.is_empty()).then_some(Flight {
            operations,
            taken,
            withdrawn: vec![],
        })
    }

    /// The operation and its unsettled predecessors that are not in the message yet; `None` when one is not in memory,
    /// or they are more than a message holds.
    fn chain(&self, position: Position, members: &BTreeSet<Position>) -> Option<Vec<Position>> {
        let (mut chain, mut bytes) = (Vec::new(), 0);
        let mut next = Some(position);
        while let Some(at) = next.filter(|at| !members.contains(at)) {
            match self.slots.get(&at) {
                Some(slot) => {
                    chain.push(at);
                    next = slot.entry.predecessor;
                }
                None if self.is_on_disk(at) => return None,
                None => break,
            }
            bytes += self.slots.get(&at).map_or(0, |slot| slot.entry.bytes.len());
            if chain.len() > BATCH_OPS_MAX || (chain.len() > 1 && bytes > BATCH_BYTES_MAX) {
                return None;
            }
        }
        Some(chain)
    }

    fn is_on_disk(&self, position: Position) -> bool {
        self.on_disk.is_some_and(|(from, to)| (from..=to).contains(&position))
    }

    /// An operation that cannot take all its predecessors along goes by the bulk lane, behind them.
    fn go_by_bulk(&mut self, position: Position) {
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
        let taken: Vec<SequenceRange> = self.withdrawn.iter().take(BATCH_WITHDRAWN_MAX).collect();
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
    fn retry(&mut self, position: Position, now: Instant, delay: impl Fn(u32) -> Duration) {
        if let Some(slot) = self.slots.get_mut(&position)
            && slot.stage == Stage::InFlight
        {
            let until = now + delay(slot.attempts);
            slot.stage = Stage::Delayed(until);
            self.delayed.insert((until, position));
        }
    }

    /// Puts one operation back whose predecessor the hub has not settled. It is tried again as soon as that is settled;
    /// if it is not here to be seen settling, after the delay. One whose predecessor is on disk alone goes there too,
    /// for it would keep it out of memory.
    pub(crate) fn not_yet(&mut self, position: Position, now: Instant, delay: impl Fn(u32) -> Duration) {
        let Some(Slot { entry, .. }) = self.slots.get(&position) else {
            return;
        };
        let predecessor = entry.predecessor;
        let is_here = predecessor.is_some_and(|before| self.slots.contains_key(&before));
        let is_on_disk = !is_here && predecessor.is_some_and(|before| self.is_on_disk(before));
        if is_on_disk && entry.spooled {
            self.remove(position);
            self.leave_to_disk(position, position);
        } else if is_here || is_on_disk {
            self.retry(position, now, |_| FOLLOWER_DELAY);
        } else {
            self.retry(position, now, delay);
        }
    }

    /// Queues the delayed operations that follow one another on the path of one that goes.
    fn release_followers(&mut self, mut position: Position) {
        while let Some(&follower) = self.followers.get(&position)
            && let Some(Slot {
                stage: Stage::Delayed(until),
                ..
            }) = self.slots.get(&follower)
        {
            self.delayed.remove(&(*until, follower));
            self.requeue(follower);
            position = follower;
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
        if let Some(predecessor) = entry.predecessor {
            self.followers.remove(&predecessor);
        }
        self.release_followers(position);
        if self.newest.get(&entry.path) == Some(&position) {
            self.newest.remove(&entry.path);
        }
        Some(entry)
    }

    /// Takes out the ranges that the hub has been told.
    pub(crate) fn withdrawn_told(&mut self, told: &[SequenceRange]) {
        for range in told {
            self.withdrawn.remove(range);
        }
        if !told.is_empty() {
            self.withdrawn_in_flight = false;
        }
    }

    /// Whether an operation is here still; one that is not is settled, or on disk alone.
    pub(crate) fn contains(&self, position: Position) -> bool {
        self.slots.contains_key(&position)
    }

    /// Notes that an operation is on disk; false when it is settled already. What it may replace now is given back.
    pub(crate) fn mark_spooled(&mut self, position: Position, crowded: bool) -> (bool, Option<Entry>) {
        let Some(slot) = self.slots.get_mut(&position) else {
            return (false, None);
        };
        slot.entry.spooled = true;
        let Some(older) = slot.replaces.take() else {
            return (true, None);
        };
        let newer = slot.entry.clone();
        // As it was when the newer one came: the older is the newest of its path but for it.
        let newest = self.newest.insert(newer.path.clone(), older);
        let replaced = self.conflate(&newer, crowded);
        match newest {
            Some(newest) => self.newest.insert(newer.path, newest),
            None => self.newest.remove(&newer.path),
        };
        (true, replaced)
    }

    /// Operations that are in memory alone, oldest first.
    pub(crate) fn unspooled(&self) -> Vec<Entry> {
        self.slots
            .values()
            .filter(|slot| !slot.entry.spooled)
            .map(|slot| slot.entry.clone())
            .collect()
    }
}

#[cfg(test)]
mod tests;
