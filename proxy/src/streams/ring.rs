//! What of a stream is in memory: its newest changes, without a hole, for all who follow it.
//!
//! A plain state machine. It takes what commits tell, in whatever order they do, and what was read from the database, and
//! gives each follower what lies beyond its position.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use p2p_sync_proto::{Path, Scope, v1};
use prost::Message as _;
use uuid::Uuid;

use super::filter::Filter;
use crate::{operation::Change, store::StateRow};

/// Changes of one stream, and their bytes.
const ENTRIES_MAX: usize = 4096;
const BYTES_MAX: usize = 4 * 1024 * 1024;
/// Changes of all streams together, bytes.
pub(super) const ALL_BYTES_MAX: usize = 128 * 1024 * 1024;
/// Commits that were told before one that comes before them: beyond it they are read from the database.
const EARLY_MAX: usize = 64;
/// What a change takes beside its encoded state.
const ENTRY_BYTES: usize = 256;

/// One change of a stream.
#[derive(Debug)]
pub struct Entry {
    /// As it is told.
    pub state: v1::State,
    /// Absent for a path that this build cannot read.
    pub data_type: Option<v1::SyncDataType>,
    /// Of what a host says of itself: which host.
    pub owner: Option<Uuid>,
    /// As it is encoded.
    pub bytes: usize,
}

impl Entry {
    /// Of a change that was committed just now.
    pub fn of_change(change: &Change) -> Self {
        Self::new(change.to_wire(), Some(&change.path))
    }

    /// Of a row of the database.
    pub fn of_row(row: &StateRow) -> Self {
        Self::of_state(row.to_wire())
    }

    /// Of a state that another proxy told.
    pub fn of_state(state: v1::State) -> Self {
        let path = Path::parse(&state.path).ok();
        Self::new(state, path.as_ref())
    }

    fn new(state: v1::State, path: Option<&Path>) -> Self {
        let parts = path.map(Path::parts);
        Self {
            bytes: state.encoded_len(),
            data_type: parts.as_ref().map(|parts| parts.data_type),
            owner: parts.and_then(|parts| match parts.scope {
                Scope::Host(owner) => Some(owner),
                Scope::Map(_) | Scope::Char(_) | Scope::Account(_) => None,
            }),
            state,
        }
    }
}

/// What one commit, or one read, tells of a stream: all that is left of the positions `(after, upto]`.
#[derive(Clone, Debug)]
pub struct Batch {
    /// The position before.
    pub after: u64,
    /// The last position.
    pub upto: u64,
    /// In the order of the stream; absent where it has to be read.
    pub entries: Option<Vec<Arc<Entry>>>,
    /// Followers are told at once.
    pub urgent: bool,
}

/// What came of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// There is something new to tell.
    Moved {
        /// And some of it at once.
        urgent: bool,
    },
    /// Something before it is missing, or it is empty itself: the stream has to be read.
    Gap,
    /// It is known.
    Known,
}

/// What a follower gets.
#[derive(Debug)]
pub enum Read {
    /// What comes next has left memory: it is for the follower to read.
    Behind,
    /// There is nothing new.
    Nothing,
    /// Up to a position, the states that the follower wants.
    Some {
        /// Everything up to here is told by it.
        upto: u64,
        /// In the order of the stream.
        states: Vec<v1::State>,
        /// There is more in memory.
        more: bool,
    },
}

/// See the module.
#[derive(Debug)]
pub struct Ring {
    /// Everything of `(base, head]` is in `entries`.
    base: u64,
    head: u64,
    entries: VecDeque<Arc<Entry>>,
    bytes: usize,
    /// By where they begin.
    early: BTreeMap<u64, Batch>,
    /// The stream is known to reach so far.
    known: u64,
    /// Bytes of all rings.
    all_bytes: Arc<AtomicUsize>,
}

impl Ring {
    /// A ring that begins behind a position.
    pub fn new(head: u64, all_bytes: Arc<AtomicUsize>) -> Self {
        Self {
            base: head,
            head,
            entries: VecDeque::new(),
            bytes: 0,
            early: BTreeMap::new(),
            known: head,
            all_bytes,
        }
    }

    /// The last position that is here.
    pub fn head(&self) -> u64 {
        self.head
    }

    /// The last position that is known to be given out.
    pub fn known(&self) -> u64 {
        self.known.max(self.head)
    }

    /// Notes how far the stream is; gives whether it has to be read.
    pub fn reaches(&mut self, head: u64) -> bool {
        self.known = self.known.max(head);
        self.has_gap()
    }

    /// Whether something is known to be there that is not here.
    pub fn has_gap(&self) -> bool {
        self.known > self.head
    }

    /// Takes a batch, and what was waiting for it.
    pub fn take(&mut self, batch: Batch) -> Taken {
        if batch.upto <= self.head {
            return Taken::Known;
        }
        self.known = self.known.max(batch.upto);
        let Some(entries) = &batch.entries else {
            return Taken::Gap;
        };
        if batch.after > self.head {
            // What does not fit is read with the rest.
            if self.early.len() < EARLY_MAX {
                let bytes = entries.iter().map(|entry| entry.bytes + ENTRY_BYTES).sum::<usize>();
                if bytes <= BYTES_MAX / EARLY_MAX {
                    self.early.insert(batch.after, batch);
                }
            }
            return Taken::Gap;
        }
        let mut urgent = batch.urgent;
        self.append(&batch);
        while let Some(early) = self.early.first_entry()
            && *early.key() <= self.head
        {
            let early = early.remove();
            if early.upto > self.head {
                urgent |= early.urgent;
                self.append(&early);
            }
        }
        Taken::Moved { urgent }
    }

    fn append(&mut self, batch: &Batch) {
        let (head, entries) = (self.head, batch.entries.iter().flatten());
        for entry in entries.filter(|entry| entry.state.stream_sequence > head) {
            self.count(entry.bytes + ENTRY_BYTES, true);
            self.entries.push_back(Arc::clone(entry));
        }
        self.head = batch.upto;
        let is_full = |ring: &Self| {
            ring.entries.len() > ENTRIES_MAX
                || ring.bytes > BYTES_MAX
                || ring.all_bytes.load(Ordering::Relaxed) > ALL_BYTES_MAX
        };
        while is_full(self)
            && let Some(oldest) = self.entries.pop_front()
        {
            self.count(oldest.bytes + ENTRY_BYTES, false);
            self.base = oldest.state.stream_sequence;
        }
    }

    fn count(&mut self, bytes: usize, more: bool) {
        if more {
            self.bytes += bytes;
            self.all_bytes.fetch_add(bytes, Ordering::Relaxed);
        } else {
            self.bytes -= bytes;
            self.all_bytes.fetch_sub(bytes, Ordering::Relaxed);
        }
    }

    /// What lies beyond a position, as much as one message takes.
    pub fn read(&self, after: u64, filter: &Filter) -> Read {
        if after < self.base {
            return Read::Behind;
        }
        if after >= self.head {
            return Read::Nothing;
        }
        let first = self
            .entries
            .partition_point(|entry| entry.state.stream_sequence <= after);
        let (mut page, mut upto) = (filter.page(), after);
        for entry in self.entries.range(first..) {
            if !page.add(entry) {
                return Read::Some {
                    upto,
                    states: page.states,
                    more: true,
                };
            }
            upto = entry.state.stream_sequence;
        }
        Read::Some {
            upto: self.head,
            states: page.states,
            more: false,
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.all_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(sequence: u64, payload_bytes: usize) -> Arc<Entry> {
        Arc::new(Entry::of_state(v1::State {
            path: format!("prontera/ITEM_DROP/{sequence}"),
            stream_sequence: sequence,
            payload: vec![b' '; payload_bytes].into(),
            ..Default::default()
        }))
    }

    /// All positions used.
    fn batch(after: u64, upto: u64) -> Batch {
        Batch {
            after,
            upto,
            entries: Some((after + 1..=upto).map(|sequence| entry(sequence, 10)).collect()),
            urgent: false,
        }
    }

    fn all() -> Filter {
        Filter::of_host(Uuid::nil())
    }

    fn read(ring: &Ring, after: u64) -> (Vec<u64>, u64) {
        match ring.read(after, &all()) {
            Read::Some { upto, states, .. } => (states.iter().map(|state| state.stream_sequence).collect(), upto),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn invariant_08_commits_told_out_of_order_are_given_in_order_and_once() {
        let mut ring = Ring::new(10, Arc::default());
        let moved = Taken::Moved { urgent: false };
        assert_eq!(ring.take(batch(14, 16)), Taken::Gap);
        assert_eq!(ring.take(batch(12, 14)), Taken::Gap);
        assert!(
            matches!(ring.read(10, &all()), Read::Nothing),
            "nothing before its turn"
        );
        assert_eq!(ring.take(batch(10, 12)), moved);
        assert_eq!(ring.take(batch(10, 12)), Taken::Known);
        assert_eq!(read(&ring, 10), ((11..=16).collect(), 16));
        assert_eq!(read(&ring, 13), ((14..=16).collect(), 16));
        assert_eq!(ring.take(batch(15, 18)), moved, "half of it is known");
        assert_eq!(read(&ring, 15), (vec![16, 17, 18], 18));
        assert!(!ring.has_gap());
    }

    #[test]
    fn invariant_08_a_position_whose_change_left_memory_is_behind_and_never_skipped() {
        let mut ring = Ring::new(0, Arc::default());
        let many = ENTRIES_MAX as u64 + 10;
        for sequence in 0..many {
            ring.take(batch(sequence, sequence + 1));
        }
        assert!(matches!(ring.read(9, &all()), Read::Behind));
        assert_eq!(read(&ring, 10).0[0], 11);
    }

    #[test]
    fn what_was_told_without_its_states_is_read() {
        let mut ring = Ring::new(0, Arc::default());
        let wake_up = Batch {
            entries: None,
            ..batch(0, 3)
        };
        assert_eq!(ring.take(wake_up), Taken::Gap);
        assert!(ring.has_gap() && ring.known() == 3);
        // Conflation and refusals have left one.
        let found = Batch {
            entries: Some(vec![entry(2, 1)]),
            ..batch(0, 3)
        };
        assert_eq!(ring.take(found), Taken::Moved { urgent: false });
        assert_eq!(read(&ring, 0), (vec![2], 3));
        assert!(!ring.reaches(3) && ring.reaches(4));
    }

    #[test]
    fn invariant_12_a_ring_is_bounded_in_changes_and_bytes_and_gives_its_bytes_back() {
        let all_bytes: Arc<AtomicUsize> = Arc::default();
        let mut ring = Ring::new(0, all_bytes.clone());
        for sequence in 0..200 {
            let large = Batch {
                entries: Some(vec![entry(sequence + 1, 64 * 1024)]),
                ..batch(sequence, sequence + 1)
            };
            ring.take(large);
            assert!(ring.bytes <= BYTES_MAX && ring.entries.len() <= ENTRIES_MAX);
        }
        assert_eq!(all_bytes.load(Ordering::Relaxed), ring.bytes);
        drop(ring);
        assert_eq!(all_bytes.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_message_ends_where_it_is_full_and_says_that_there_is_more() {
        let mut ring = Ring::new(0, Arc::default());
        ring.take(batch(0, 1000));
        let Read::Some { upto, states, more } = ring.read(0, &all()) else {
            panic!("there is something");
        };
        assert_eq!((upto, states.len(), more), (256, 256, true));
    }
}
