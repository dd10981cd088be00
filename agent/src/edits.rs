//! Which edits by the hub's operator this host has seen: what it writes says so, so that the hub tells a writer who knows
//! of an edit from one who would undo it unawares.
//!
//! An edit is seen by reading its path, in this process or in an attached program, and by being told of it with an
//! operation that did not know it. What people read by the command line is theirs to know, not the map server's.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use arc_swap::ArcSwap;
use lru::LruCache;
use p2p_sync_proto::v1::{self, Operation, operation::Payload, pull_reply::What};
use prost::{Message, bytes::Bytes};

use crate::outbox::Change;

/// Paths remembered; beyond it the one that was heard of longest ago is forgotten, and what is written there conflicts once.
pub(crate) const PATHS_MAX: usize = 8192;

/// A path's last edit as it lies in the outbox, in a slot of its own.
#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct EditRecord {
    #[prost(string, tag = "1")]
    pub(crate) path: String,
    #[prost(uint64, tag = "2")]
    pub(crate) edit: u64,
    #[prost(uint64, tag = "3")]
    pub(crate) told_at_ms: u64,
}

/// The edits that were seen.
#[derive(Default)]
pub(crate) struct Edits {
    /// Mostly there are none, and an enqueue looks at nothing but this.
    any: AtomicBool,
    seen: ArcSwap<HashMap<Arc<str>, Seen>>,
    table: Mutex<Table>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    edit: u64,
    /// What was made elsewhere before did not know of it; 0 where the order in which things came says so.
    told_at_ms: u64,
}

struct Table {
    known: LruCache<Arc<str>, (u64, Seen)>,
    free: Vec<u64>,
    next_slot: u64,
}

impl Default for Table {
    fn default() -> Self {
        Self {
            // Bounded by its slots; takes no room before it is needed.
            known: LruCache::unbounded(),
            free: Vec::new(),
            next_slot: 0,
        }
    }
}

impl Edits {
    /// Takes over what an earlier start knew.
    pub(crate) fn load(&self, found: Vec<(u64, EditRecord)>) {
        let mut table = self.lock();
        for (slot, record) in found {
            table.next_slot = table.next_slot.max(slot + 1);
            let EditRecord { path, edit, told_at_ms } = record;
            table.known.put(path.into(), (slot, Seen { edit, told_at_ms }));
        }
        self.publish(&table);
    }

    /// What an operation on a path says it has seen; `made_at_ms` where it was made in another process.
    pub(crate) fn seen(&self, path: &str, made_at_ms: Option<u64>) -> u64 {
        if !self.any.load(Ordering::Relaxed) {
            return 0;
        }
        match self.seen.load().get(path) {
            Some(seen) if made_at_ms.is_none_or(|at_ms| at_ms >= seen.told_at_ms) => seen.edit,
            _ => 0,
        }
    }

    /// Notes what was read; gives what is to be kept of it.
    pub(crate) fn read<'s>(&self, states: impl IntoIterator<Item = (&'s str, u64)>) -> Vec<Change> {
        let known = self.seen.load();
        let is_news = |&(path, edit): &(&str, u64)| {
            edit > 0
                && known
                    .get(path)
                    .is_none_or(|seen| (edit, seen.told_at_ms) > (seen.edit, 0))
        };
        let news: Vec<(&str, u64)> = states.into_iter().filter(is_news).collect();
        if news.is_empty() {
            return Vec::new();
        }
        let mut table = self.lock();
        let mut changes = Vec::new();
        for (path, edit) in news {
            let known = table.known.peek(path).map(|(_, seen)| *seen);
            if known.is_none_or(|known| edit >= known.edit) {
                changes.extend(table.set(path, Seen { edit, told_at_ms: 0 }));
            }
        }
        self.publish(&table);
        changes
    }

    /// Notes what the hub told of an operation's path, or of each member's of a group: the last edit there, where the
    /// operation had seen another. Gives what is to be kept of it.
    pub(crate) fn told(&self, operation: &Bytes, edits: &[u64], now_ms: u64) -> Vec<Change> {
        let Ok(operation) = Operation::decode(operation.clone()) else {
            return Vec::new();
        };
        let members: Vec<Operation> = match operation.payload {
            Some(Payload::Group(group)) => {
                let members = group.members.into_iter().map(Operation::decode);
                members.map(Result::unwrap_or_default).collect()
            }
            _ => vec![operation],
        };
        let mut table = self.lock();
        let mut changes = Vec::new();
        for (operation, &edit) in members.iter().zip(edits) {
            let path = operation.path.as_str();
            let known = table.known.peek(path).map(|(_, seen)| *seen);
            let told = Seen {
                edit,
                told_at_ms: now_ms,
            };
            changes.extend(match known {
                _ if edit == 0 => table.forget(path),
                // The hub has gone back: what it has now holds.
                _ if edit < operation.hub_edit_seen => table.set(path, told),
                Some(known) if edit < known.edit => None,
                // A clock that was set back would have all that is made until it is there again conflict.
                Some(known) if edit == known.edit => {
                    let told_at_ms = known.told_at_ms.min(now_ms);
                    table.set(path, Seen { told_at_ms, ..known })
                }
                _ => table.set(path, told),
            });
        }
        self.publish(&table);
        changes
    }

    fn publish(&self, table: &Table) {
        let seen: HashMap<Arc<str>, Seen> = table
            .known
            .iter()
            .map(|(path, (_, seen))| (path.clone(), *seen))
            .collect();
        let any = !seen.is_empty();
        self.seen.store(Arc::new(seen));
        self.any.store(any, Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// Remembers a path's edit; gives the change where it is one.
    fn set(&mut self, path: &str, seen: Seen) -> Option<Change> {
        let slot = match self.known.get(path) {
            Some((_, known)) if *known == seen => return None,
            Some((slot, _)) => *slot,
            None => self.slot(),
        };
        self.known.put(path.into(), (slot, seen));
        let record = EditRecord {
            path: path.to_owned(),
            edit: seen.edit,
            told_at_ms: seen.told_at_ms,
        };
        Some(Change::Edit(slot, Some(record)))
    }

    fn forget(&mut self, path: &str) -> Option<Change> {
        let (slot, _) = self.known.pop(path)?;
        self.free.push(slot);
        Some(Change::Edit(slot, None))
    }

    /// One that nothing lies in, or that of the path that gives way.
    fn slot(&mut self) -> u64 {
        if let Some(slot) = self.free.pop() {
            return slot;
        }
        if self.next_slot < PATHS_MAX as u64 {
            self.next_slot += 1;
            return self.next_slot - 1;
        }
        self.known.pop_lru().map_or(0, |(_, (slot, _))| slot)
    }
}

/// The states that a reply has, as far as edits go.
pub(crate) fn of_reply(reply: &v1::PullReply) -> impl Iterator<Item = (&str, u64)> {
    let states = match &reply.what {
        Some(What::State(state)) => std::slice::from_ref(state),
        Some(What::Page(page)) => &page.states,
        _ => &[],
    };
    states.iter().map(|state| (state.path.as_str(), state.hub_edit))
}

#[cfg(test)]
mod tests {
    use p2p_sync_proto::v1::Group;

    use super::*;

    fn operation(path: &str, hub_edit_seen: u64) -> Operation {
        Operation {
            path: path.to_owned(),
            hub_edit_seen,
            ..Operation::default()
        }
    }

    fn told(edits: &Edits, path: &str, stamped: u64, present: u64, now_ms: u64) -> Vec<Change> {
        edits.told(&operation(path, stamped).encode_to_vec().into(), &[present], now_ms)
    }

    #[test]
    fn what_was_read_or_told_is_stamped_and_the_newest_holds_in_whatever_order_it_comes() {
        let edits = Edits::default();
        assert_eq!(edits.seen("a", None), 0);
        assert_eq!(edits.read([("a", 4), ("b", 0)]).len(), 1);
        assert!(edits.read([("a", 4), ("a", 3), ("b", 0)]).is_empty(), "nothing new");
        assert_eq!((edits.seen("a", None), edits.seen("b", None)), (4, 0));
        assert_eq!(
            told(&edits, "a", 0, 3, 10).len(),
            0,
            "an answer to an operation of before"
        );
        assert_eq!(told(&edits, "a", 4, 6, 10).len(), 1);
        edits.read([("a", 5)]);
        assert_eq!(edits.seen("a", None), 6);
    }

    #[test]
    fn a_hub_that_has_gone_back_is_followed() {
        let edits = Edits::default();
        edits.read([("a", 9)]);
        told(&edits, "a", 9, 2, 10);
        assert_eq!(edits.seen("a", None), 2);
        assert!(matches!(told(&edits, "a", 2, 0, 10)[..], [Change::Edit(0, None)]));
        assert_eq!(edits.seen("a", None), 0);
    }

    #[test]
    fn what_another_process_made_before_the_hub_told_did_not_know() {
        let edits = Edits::default();
        told(&edits, "a", 0, 7, 1000);
        assert_eq!((edits.seen("a", Some(999)), edits.seen("a", Some(1000))), (0, 7));
        assert_eq!(edits.seen("a", None), 7);
        // The clock was set back.
        told(&edits, "a", 0, 7, 500);
        assert_eq!((edits.seen("a", Some(499)), edits.seen("a", Some(999))), (0, 7));
        // It has read it, and says so in the order of its operations.
        assert_eq!(edits.read([("a", 7)]).len(), 1);
        assert_eq!(edits.seen("a", Some(1)), 7);
    }

    #[test]
    fn of_a_group_each_members_edit_is_noted() {
        let edits = Edits::default();
        let members = ["a", "b", "c"].map(|path| operation(path, 0).encode_to_vec().into());
        let group = Operation {
            payload: Some(Payload::Group(Group {
                members: members.to_vec(),
            })),
            ..Operation::default()
        };
        edits.told(&group.encode_to_vec().into(), &[3, 0, 5], 10);
        assert_eq!(["a", "b", "c"].map(|path| edits.seen(path, None)), [3, 0, 5]);
    }

    #[test]
    fn invariant_12_paths_are_bounded_and_each_has_a_slot_of_its_own() {
        let edits = Edits::default();
        let path = |number: usize| format!("prontera/NPC_STATE/{number}");
        let mut kept: HashMap<u64, EditRecord> = HashMap::new();
        let mut keep = |changes: Vec<Change>| {
            for change in changes {
                match change {
                    Change::Edit(slot, Some(record)) => kept.insert(slot, record),
                    Change::Edit(slot, None) => kept.remove(&slot),
                    other => panic!("{other:?}"),
                };
            }
        };
        let paths: Vec<String> = (0..PATHS_MAX + 100).map(path).collect();
        for page in paths.chunks(512) {
            keep(edits.read(page.iter().map(|path| (path.as_str(), 1))));
        }
        keep(told(&edits, &path(PATHS_MAX), 1, 0, 10));
        keep(edits.read([("another", 2)]));
        assert_eq!(kept.len(), PATHS_MAX);
        let next = Edits::default();
        next.load(kept.into_iter().collect());
        for path in paths.iter().map(String::as_str).chain(["another"]) {
            assert_eq!(next.seen(path, None), edits.seen(path, None), "{path}");
        }
        assert_eq!((edits.seen(&path(99), None), edits.seen(&path(100), None)), (0, 1));
    }
}
