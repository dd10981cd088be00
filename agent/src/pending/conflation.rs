//! Newer operations in the place of older ones of their path, and telling the hub which will never come.

use super::{Entry, Pending, Position, SequenceRange, Stage};

/// A path's older operation gives way to a newer one only while this many wait: a short queue is no backlog.
pub(super) const CONFLATE_ABOVE_OPS: usize = 2048;

impl Pending {
    pub(super) fn conflate(&mut self, newer: &Entry, crowded: bool) -> Option<Entry> {
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

    /// Notes that these positions will never be sent, for the hub to count them as settled.
    pub(crate) fn withdraw(&mut self, range: SequenceRange) {
        self.withdrawn.insert_range(range);
    }

    /// What the hub has not been told of yet.
    pub(crate) fn withdrawn(&self) -> Vec<SequenceRange> {
        self.withdrawn.iter().collect()
    }

    pub(super) fn take_withdrawn(&mut self) -> Vec<SequenceRange> {
        if self.withdrawn_in_flight {
            return vec![];
        }
        let taken = self.withdrawn.fitting(|_| true);
        self.withdrawn_in_flight = !taken.is_empty();
        taken
    }

    /// Withdrawn ranges wait to be told.
    pub(crate) fn has_withdrawn(&self) -> bool {
        !self.withdrawn_in_flight
            && if self.is_closing_gaps() {
                self.has_oldest_withdrawn()
            } else {
                !self.withdrawn.is_empty()
            }
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
}
