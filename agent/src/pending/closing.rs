//! Closing gaps: the hub remembers what it has settled as ranges, a bounded number of them. A host that sends the live
//! first while its backlog lies on disk makes a gap for each operation it leaves behind; told that they are too many, it
//! sends the oldest alone until the hub has had enough of them.

use std::collections::BTreeSet;

use p2p_sync_proto::v1::SequenceRange;

use super::{BATCH_OPS_MAX, Flight, Pending, Position};

/// Messages with the oldest alone, before the live go first again.
const MESSAGES: u32 = 64;
/// Operations kept in memory ahead of those on disk alone, at most; half of memory where that is less.
const AHEAD_OPS: usize = 2 * BATCH_OPS_MAX;

impl Pending {
    /// The hub refused a message for the gaps it would have left. Gives whether the oldest go alone since now.
    pub(crate) fn close_gaps(&mut self) -> bool {
        let began = !self.is_closing_gaps();
        self.closing_messages = MESSAGES;
        if began {
            // Among them are the oldest.
            self.retry_now();
        }
        began
    }

    pub(crate) fn is_closing_gaps(&self) -> bool {
        self.closing_messages > 0
    }

    /// The hub has decided a message, and what that settled is out. With nothing left there is no gap to close: what
    /// comes next need not wait for others as bulk does.
    pub(crate) fn decided(&mut self) {
        self.closing_messages = if self.is_drained() {
            0
        } else {
            self.closing_messages.saturating_sub(1)
        };
    }

    /// The next message that leaves no gap: the oldest that wait, as far as nothing older lies on disk alone.
    pub(super) fn take_oldest(&mut self, ops_max: usize) -> Option<Flight> {
        let ops_max = ops_max.min(BATCH_OPS_MAX);
        let oldest = self.oldest_waiting(ops_max);
        let taken = self.fitting(oldest.iter(), ops_max);
        let upto = match taken.last() {
            Some(last) if taken.len() < oldest.len() || taken.len() == ops_max => *last,
            _ => self.first_on_disk(),
        };
        let withdrawn = if self.withdrawn_in_flight {
            vec![]
        } else {
            self.withdrawn.fitting(|range| first_of(range) < upto)
        };
        self.withdrawn_in_flight |= !withdrawn.is_empty();
        self.flight(taken, withdrawn)
    }

    /// How many of the oldest could be sent now, up to a message of them.
    pub(super) fn oldest_ready(&self) -> usize {
        self.oldest_waiting(BATCH_OPS_MAX).len()
    }

    /// Whether ranges wait to be told that lie before all that is on disk alone.
    pub(super) fn has_oldest_withdrawn(&self) -> bool {
        let first = self.withdrawn.iter().next();
        first.is_some_and(|range| first_of(&range) < self.first_on_disk())
    }

    /// Room for older operations is made by leaving newer ones to the disk: the newest that is there already.
    pub(super) fn newest_spooled(&self) -> Option<Position> {
        let queues = [&self.live, &self.critical, &self.backlog];
        let newest = queues.into_iter().filter_map(BTreeSet::last).max()?;
        self.slots[newest].entry.spooled.then_some(*newest)
    }

    /// How many more of the oldest are wanted in memory to keep the link busy; `from` is the first on disk alone.
    pub(super) fn room_for_oldest(&self, from: Position) -> usize {
        let ahead_max = AHEAD_OPS.min(self.ops_max / 2);
        ahead_max - self.slots.range(..from).take(ahead_max).count()
    }

    fn oldest_waiting(&self, ops_max: usize) -> BTreeSet<Position> {
        let upto = self.first_on_disk();
        let queues = [&self.backlog, &self.live, &self.critical, &self.hastened.waiting];
        let oldest = queues.into_iter().flat_map(|queue| queue.range(..upto).take(ops_max));
        let mut oldest: BTreeSet<Position> = oldest.copied().collect();
        while oldest.len() > ops_max {
            oldest.pop_last();
        }
        oldest
    }

    fn first_on_disk(&self) -> Position {
        const NEVER: Position = Position {
            incarnation: u64::MAX,
            sequence: u64::MAX,
        };
        self.on_disk.map_or(NEVER, |(from, _)| from)
    }
}

fn first_of(range: &SequenceRange) -> Position {
    Position {
        incarnation: range.incarnation,
        sequence: range.first,
    }
}
