//! Putting messages together: what the critical lane has, and what the bulk lanes have by turns, behind what is hastened.

use std::collections::BTreeSet;

use p2p_sync_proto::v1::SequenceRange;

use super::{BATCH_BYTES_MAX, BATCH_INCARNATIONS_MAX, BATCH_OPS_MAX, Flight, Pending, Position, Slot, Stage};

/// Every so many bulk messages is one of the backlog while live operations wait too.
const BACKLOG_SHARE: u32 = 4;

impl Pending {
    /// Takes the next critical message: what is there at once, together, with the unsettled predecessors of each path.
    pub(crate) fn take_critical(&mut self) -> Option<Flight> {
        if self.is_closing_gaps() {
            return None;
        }
        let mut members: BTreeSet<Position> = BTreeSet::new();
        let mut behind_the_disk = Vec::new();
        let (mut operations, mut bytes, mut incarnations) = (0, 0, BTreeSet::new());
        for position in &self.critical {
            let Some(chain) = self.chain(*position, &members) else {
                behind_the_disk.push(*position);
                continue;
            };
            let chain_bytes: usize = chain.iter().map(|member| self.slots[member].entry.bytes.len()).sum();
            let chain_operations: usize = chain.iter().map(|member| self.slots[member].entry.operations()).sum();
            let mut together = incarnations.clone();
            together.extend(chain.iter().map(|member| member.incarnation));
            let is_full = operations + chain_operations > BATCH_OPS_MAX
                || bytes + chain_bytes > BATCH_BYTES_MAX
                || together.len() > BATCH_INCARNATIONS_MAX;
            if is_full && !members.is_empty() {
                break;
            }
            incarnations = together;
            operations += chain_operations;
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

    /// The operation and its unsettled predecessors that are not in the message yet, of a player's coming or going also what
    /// was made of the player before; `None` when one is not in memory,
    /// or they are more than a message holds.
    pub(super) fn chain(&self, position: Position, members: &BTreeSet<Position>) -> Option<Vec<Position>> {
        let (mut chain, mut operations, mut bytes) = (Vec::new(), 0, 0);
        let mut incarnations = BTreeSet::new();
        let mut next = vec![position];
        // Behind a group the paths part, and may meet again.
        let mut seen = BTreeSet::new();
        while let Some(at) = next.pop() {
            if members.contains(&at) || !seen.insert(at) {
                continue;
            }
            let Some(Slot { entry, .. }) = self.slots.get(&at) else {
                if self.is_on_disk(at) {
                    return None;
                }
                continue;
            };
            chain.push(at);
            next.extend(entry.predecessors());
            next.extend(self.players.before(entry));
            operations += entry.operations();
            bytes += entry.bytes.len();
            incarnations.insert(at.incarnation);
            if operations > BATCH_OPS_MAX
                || (chain.len() > 1 && bytes > BATCH_BYTES_MAX)
                || incarnations.len() > BATCH_INCARNATIONS_MAX
            {
                return None;
            }
        }
        Some(chain)
    }

    /// An operation that cannot take all its predecessors along goes by the bulk lane, behind them.
    pub(super) fn go_by_bulk(&mut self, position: Position) {
        self.critical.remove(&position);
        if let Some(slot) = self.slots.get_mut(&position) {
            slot.entry.critical = false;
            if self.hastened.has(&slot.entry) {
                self.hastened.waiting.insert(position);
            } else {
                self.backlog.insert(position);
            }
        }
    }

    /// Takes the next bulk message of at most `ops_max` operations.
    pub(crate) fn take_bulk(&mut self, ops_max: usize) -> Option<Flight> {
        if self.is_closing_gaps() {
            return self.take_oldest(ops_max);
        }
        let backlog_first =
            !self.backlog.is_empty() && (self.live.is_empty() || self.since_backlog + 1 >= BACKLOG_SHARE);
        self.since_backlog = if backlog_first { 0 } else { self.since_backlog + 1 };
        let (first, second) = if backlog_first {
            (&self.backlog, &self.live)
        } else {
            (&self.live, &self.backlog)
        };
        let waiting = self.hastened.waiting.iter().chain(first).chain(second);
        let taken = self.fitting(waiting, ops_max.min(BATCH_OPS_MAX));
        let withdrawn = self.take_withdrawn();
        self.flight(taken, withdrawn)
    }

    /// As many of these as go into one message, in their order.
    pub(super) fn fitting<'a>(&self, waiting: impl Iterator<Item = &'a Position>, ops_max: usize) -> Vec<Position> {
        let (mut operations, mut bytes, mut incarnations) = (0, 0, BTreeSet::new());
        let mut fitting: Vec<Position> = waiting
            .take(ops_max)
            .copied()
            .take_while(|position| {
                let entry = &self.slots[position].entry;
                operations += entry.operations();
                bytes += entry.bytes.len();
                incarnations.insert(position.incarnation);
                operations <= BATCH_OPS_MAX
                    && (bytes <= BATCH_BYTES_MAX || bytes == entry.bytes.len())
                    && incarnations.len() <= BATCH_INCARNATIONS_MAX
            })
            .collect();
        fitting.sort_unstable();
        fitting
    }

    pub(super) fn flight(&mut self, taken: Vec<Position>, withdrawn: Vec<SequenceRange>) -> Option<Flight> {
        for position in &taken {
            self.begin(*position);
        }
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

    pub(super) fn begin(&mut self, position: Position) {
        self.unqueue(position);
        if let Some(slot) = self.slots.get_mut(&position) {
            slot.stage = Stage::InFlight;
            slot.attempts += 1;
        }
    }
}
