//! What waits to be sent and what is on its way: a plain state machine over plain data, without a clock, thread or
//! socket of its own.
//!
//! Memory holds what is live; when it is full, the oldest waiting bulk operations are left to the disk alone and come
//! back, oldest first, as room and the link allow. The live go first, the backlog gets at least every fourth message.

mod backlog;
mod closing;
mod conflation;
mod group;
mod hastened;
mod players;
mod retry;
mod take;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Instant,
};

use p2p_sync_proto::{
    Position,
    limits::{BATCH_BYTES_MAX, BATCH_INCARNATIONS_MAX, BATCH_OPS_MAX},
    v1::SequenceRange,
};
use prost::bytes::Bytes;
use uuid::Uuid;

use crate::withdrawn::Withdrawn;

pub(crate) use group::GroupOrder;
use players::Players;

use hastened::Hastened;

/// Encoded bytes of all operations held here; beyond it the oldest are left to the disk.
pub(crate) const BYTES_MAX: usize = 16 * 1024 * 1024;
/// So much of the backlog is in memory however crowded that is; the largest payloads take 16 MiB then.
const BACKLOG_OPS_MIN: usize = 64;

/// One operation on its way.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each says something of its own")]
pub(crate) struct Entry {
    pub(crate) position: Position,
    pub(crate) operation_id: Uuid,
    /// Empty for a group.
    pub(crate) path: Arc<str>,
    /// Kept as `every`: never conflated, and bound to the order of its path.
    pub(crate) every: bool,
    pub(crate) critical: bool,
    /// It came here by the critical lane, maybe before it was on disk; others come behind what was spooled before them.
    pub(crate) sent_while_spooled: bool,
    pub(crate) predecessor: Option<Position>,
    /// The last coming or going of its player.
    pub(crate) presence: Option<Position>,
    pub(crate) group: Option<Arc<GroupOrder>>,
    /// Canonical bytes.
    pub(crate) bytes: Bytes,
    /// What it counted for when it was taken.
    pub(crate) reserved_bytes: usize,
    pub(crate) spooled: bool,
}

impl Entry {
    /// What has to be settled before it.
    fn predecessors(&self) -> impl Iterator<Item = Position> {
        let of_group = self.group.as_deref().map_or(&[][..], |group| &group.predecessors);
        self.predecessor.iter().chain(&self.presence).chain(of_group).copied()
    }

    /// The paths in whose order it stands.
    pub(crate) fn ordered_paths(&self) -> impl Iterator<Item = &str> {
        let of_group = self.group.as_deref().map_or(&[][..], |group| &group.paths);
        let own = (self.every && self.group.is_none()).then_some(&*self.path);
        own.into_iter().chain(of_group.iter().map(String::as_str))
    }

    /// The paths that it writes.
    fn paths(&self) -> impl Iterator<Item = &str> {
        let of_group = self.group.as_deref().map_or(&[][..], |group| &group.paths);
        let own = self.group.is_none().then_some(&*self.path);
        own.into_iter().chain(of_group.iter().map(String::as_str))
    }

    /// How many operations it counts for in a message.
    fn operations(&self) -> usize {
        self.group.as_deref().map_or(1, |group| group.paths.len())
    }
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

impl Flight {
    /// A message of nothing: its seal alone says something.
    pub(crate) fn empty() -> Self {
        Self {
            operations: vec![],
            taken: vec![],
            withdrawn: vec![],
        }
    }
}

/// All that is on its way.
#[derive(Debug)]
pub(crate) struct Pending {
    slots: BTreeMap<Position, Slot>,
    critical: BTreeSet<Position>,
    live: BTreeSet<Position>,
    backlog: BTreeSet<Position>,
    /// Of maps that are handed over, ahead of live and backlog.
    hastened: Hastened,
    /// Up to here everything has come from the lanes, or was settled before it did.
    passed: Option<Position>,
    delayed: BTreeSet<(Instant, Position)>,
    /// Predecessors, and the operations here that name them: of a group there may be one a path.
    followers: BTreeSet<(Position, Position)>,
    players: Players,
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
    /// Messages still to be decided with the oldest alone; 0: the live go first.
    closing_messages: u32,
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
            hastened: Hastened::default(),
            passed: None,
            delayed: BTreeSet::new(),
            followers: BTreeSet::new(),
            players: Players::default(),
            newest: HashMap::new(),
            withdrawn: Withdrawn::default(),
            withdrawn_in_flight: false,
            on_disk: None,
            bytes: 0,
            ops_max,
            conflation,
            closing_messages: 0,
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
        if self.is_closing_gaps() {
            return self.oldest_ready();
        }
        self.hastened.waiting.len() + self.live.len() + self.backlog.len()
    }

    /// Takes a new operation; gives back the older one of its path that it replaces, if a backlog waits or `crowded`.
    pub(crate) fn push(&mut self, entry: Entry, crowded: bool) -> Option<Entry> {
        let replaced = self.conflate(&entry, crowded);
        let mut older = None;
        // What comes after a group does not replace what came before it.
        for path in entry.ordered_paths() {
            self.newest.remove(path);
        }
        if !entry.every {
            older = self.newest.insert(entry.path.clone(), entry.position);
        }
        self.hastened.made(&entry);
        let queue = if entry.critical {
            &mut self.critical
        } else if self.hastened.has(&entry) {
            &mut self.hastened.waiting
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

    fn insert(&mut self, entry: Entry) {
        self.bytes += entry.bytes.len();
        self.hastened.insert(&entry);
        for predecessor in entry.predecessors() {
            self.followers.insert((predecessor, entry.position));
        }
        self.players.insert(&entry);
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

    fn unqueue(&mut self, position: Position) {
        self.critical.remove(&position);
        self.live.remove(&position);
        self.backlog.remove(&position);
        self.hastened.waiting.remove(&position);
        if let Some(Slot {
            stage: Stage::Delayed(until),
            ..
        }) = self.slots.get(&position)
        {
            self.delayed.remove(&(*until, position));
        }
    }

    /// Takes a settled operation out, whichever flight brought the answer first.
    pub(crate) fn remove(&mut self, position: Position) -> Option<Entry> {
        self.unqueue(position);
        let entry = self.slots.remove(&position)?.entry;
        self.bytes -= entry.bytes.len();
        self.hastened.remove(position);
        for predecessor in entry.predecessors() {
            self.followers.remove(&(predecessor, position));
        }
        self.players.remove(&entry);
        self.release_followers(position);
        if self.newest.get(&entry.path) == Some(&position) {
            self.newest.remove(&entry.path);
        }
        Some(entry)
    }

    /// Whether an operation is here still; one that is not is settled, or on disk alone.
    pub(crate) fn contains(&self, position: Position) -> bool {
        self.slots.contains_key(&position)
    }

    /// The oldest operation here or on disk alone, if there is one.
    pub(crate) fn oldest(&self) -> Option<Position> {
        let in_memory = self.slots.first_key_value().map(|(position, _)| *position);
        let on_disk = self.on_disk.map(|(first, _)| first);
        in_memory.into_iter().chain(on_disk).min()
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
