//! What memory has no room for: left to the disk alone, and taken back.

use super::{BACKLOG_OPS_MIN, BATCH_OPS_MAX, BYTES_MAX, Entry, Pending, Position};

impl Pending {
    /// Leaves the oldest waiting operations to the disk while memory is over its bounds, critical ones last.
    pub(super) fn shed(&mut self) {
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
            // What is hastened goes last, and comes back first.
            let hastened = || self.hastened.waiting.iter().rev().find(spooled);
            let given_up = if self.is_closing_gaps() {
                self.newest_spooled()
            } else {
                backlog.or_else(oldest).or_else(hastened).copied()
            };
            let Some(position) = given_up else {
                return;
            };
            self.give_to_disk(position);
        }
    }

    /// Leaves an operation of those in memory to the disk.
    pub(super) fn give_to_disk(&mut self, position: Position) {
        let entry = self.remove(position);
        self.leave_to_disk(position, position);
        if entry.is_some_and(|entry| self.hastened.has(&entry)) {
            self.hastened.left_to_disk(position);
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
        if self.is_closing_gaps() {
            let room = self.room_for_oldest(from);
            return (room > 0).then_some((from, to, room));
        }
        let room = (self.ops_max / 2).saturating_sub(self.slots.len());
        if self.slots.first_key_value().is_none_or(|(first, _)| from < *first) {
            return Some((from, to, room.max(BACKLOG_OPS_MIN)));
        }
        (self.backlog.len() < BATCH_OPS_MAX && room > 0 && self.bytes < BYTES_MAX / 2).then_some((from, to, room))
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
                let queue = if self.hastened.has(&entry) {
                    &mut self.hastened.waiting
                } else {
                    &mut self.backlog
                };
                queue.insert(entry.position);
                self.insert(entry);
            }
        }
        if self.is_closing_gaps() {
            self.shed();
        }
    }

    pub(super) fn is_on_disk(&self, position: Position) -> bool {
        self.on_disk.is_some_and(|(from, to)| (from..=to).contains(&position))
    }
}
