//! Putting messages together: what the critical lane has, and what the bulk lanes have by turns.

use std::collections::BTreeSet;

use super::{BATCH_BYTES_MAX, BATCH_OPS_MAX, Flight, Pending, Position, Stage};

/// Every so many bulk messages is one of the backlog while live operations wait too.
const BACKLOG_SHARE: u32 = 4;

impl Pending {
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
    pub(super) fn chain(&self, position: Position, members: &BTreeSet<Position>) -> Option<Vec<Position>> {
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

    /// An operation that cannot take all its predecessors along goes by the bulk lane, behind them.
    pub(super) fn go_by_bulk(&mut self, position: Position) {
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

    pub(super) fn begin(&mut self, position: Position) {
        self.unqueue(position);
        if let Some(slot) = self.slots.get_mut(&position) {
            slot.stage = Stage::InFlight;
            slot.attempts += 1;
        }
    }
}
