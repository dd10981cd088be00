//! What an attached program holds until the standalone agent has it on disk.

use std::{collections::VecDeque, sync::Arc};

use p2p_sync_proto::{Code, Problem};
use uuid::Uuid;

use crate::lanes::{CRITICAL_ROOM_OPS, OPERATION_BYTES, SPOOL_BYTES_MAX};

/// Operations in the order of their numbers; the first ones have been written to this connection.
pub(super) struct Queue {
    kept: VecDeque<Kept>,
    /// How many of `kept` were written.
    written: usize,
    /// The number of the first of `kept`; numbers follow each other.
    first: u64,
    bytes: usize,
    ops_max: usize,
    closed: bool,
}

struct Kept {
    operation_id: Uuid,
    line: Arc<str>,
    bytes: usize,
}

impl Queue {
    pub(super) fn new(ops_max: usize) -> Self {
        Self {
            kept: VecDeque::new(),
            written: 0,
            first: 1,
            bytes: 0,
            ops_max,
            closed: false,
        }
    }

    /// Takes an operation; `announce` is called before another thread can see it.
    pub(super) fn push(
        &mut self,
        operation_id: Uuid,
        line: Arc<str>,
        critical: bool,
        announce: impl FnOnce(),
    ) -> Result<(), Problem> {
        if self.closed {
            return Err(super::shut_down());
        }
        let room = self.ops_max + if critical { CRITICAL_ROOM_OPS } else { 0 };
        let bytes = OPERATION_BYTES + line.len();
        if self.kept.len() >= room || self.bytes + bytes > SPOOL_BYTES_MAX {
            let sentence = "the standalone agent has to take first what waits for it: see that it runs and that its disk \
                            is not full, or send fewer operations";
            return Err(Problem::new(Code::QueueFull, sentence));
        }
        announce();
        self.bytes += bytes;
        self.kept.push_back(Kept {
            operation_id,
            line,
            bytes,
        });
        Ok(())
    }

    /// Takes nothing more.
    pub(super) fn close(&mut self) {
        self.closed = true;
    }

    /// What was not written yet, with its numbers; about so many bytes at most.
    pub(super) fn next_to_write(&mut self, bytes_max: usize) -> Vec<(u64, Arc<str>)> {
        let mut lines = Vec::new();
        let mut bytes = 0;
        while let Some(kept) = self.kept.get(self.written)
            && bytes < bytes_max
        {
            bytes += kept.line.len();
            lines.push((self.first + self.written as u64, kept.line.clone()));
            self.written += 1;
        }
        lines
    }

    /// Whether something was not written yet.
    pub(super) fn has_unwritten(&self) -> bool {
        self.written < self.kept.len()
    }

    /// A new connection: everything that is kept is written again.
    pub(super) fn rewind(&mut self) {
        self.written = 0;
    }

    /// The agent has everything up to a number on disk: gives that out.
    pub(super) fn on_disk(&mut self, number: u64) -> Vec<Uuid> {
        let mut gone = Vec::new();
        while self.first <= number
            && let Some(kept) = self.kept.pop_front()
        {
            gone.push(kept.operation_id);
            self.bytes -= kept.bytes;
            self.first += 1;
            self.written = self.written.saturating_sub(1);
        }
        gone
    }

    /// Operations that are not on the agent's disk, as far as known here.
    pub(super) fn ids(&self) -> impl Iterator<Item = Uuid> {
        self.kept.iter().map(|kept| kept.operation_id)
    }

    /// The number of the operation that was taken last; 0 before any.
    pub(super) fn last(&self) -> u64 {
        self.first + self.kept.len() as u64 - 1
    }

    /// Whether everything up to a number is on the agent's disk.
    pub(super) fn is_on_disk(&self, number: u64) -> bool {
        self.first > number
    }

    pub(super) fn len(&self) -> usize {
        self.kept.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(ops: u64) -> Queue {
        let mut queue = Queue::new(16);
        for number in 1..=ops {
            queue
                .push(Uuid::from_u128(number.into()), "{}".into(), false, || ())
                .expect("room");
        }
        queue
    }

    fn numbers(queue: &mut Queue) -> Vec<u64> {
        queue
            .next_to_write(1000)
            .into_iter()
            .map(|(number, _)| number)
            .collect()
    }

    #[test]
    fn what_is_not_on_disk_is_written_again_in_order_to_a_new_connection() {
        let mut queue = filled(5);
        assert_eq!(numbers(&mut queue), [1, 2, 3, 4, 5]);
        assert!(!queue.has_unwritten());
        assert_eq!(queue.on_disk(2), [Uuid::from_u128(1), Uuid::from_u128(2)]);
        queue.rewind();
        assert_eq!(numbers(&mut queue), [3, 4, 5]);
        assert!(queue.on_disk(1).is_empty(), "told again");
    }

    #[test]
    fn invariant_07_and_12_a_full_queue_is_told_and_critical_operations_have_room_of_their_own() {
        let mut queue = filled(16);
        let refused = queue.push(Uuid::nil(), "{}".into(), false, || ()).expect_err("full");
        assert_eq!(refused.code, Code::QueueFull);
        queue
            .push(Uuid::nil(), "{}".into(), true, || ())
            .expect("room of its own");
        queue.on_disk(2);
        queue.push(Uuid::nil(), "{}".into(), false, || ()).expect("room again");
        let long: Arc<str> = "x".repeat(SPOOL_BYTES_MAX).into();
        let refused = queue.push(Uuid::nil(), long, true, || ()).expect_err("too many bytes");
        assert_eq!(refused.code, Code::QueueFull);
    }
}
