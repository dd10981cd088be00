//! What was sent and not settled: when it is tried again.

use std::time::{Duration, Instant};

use super::{Flight, Pending, Position, Slot, Stage};

/// An operation is tried without its predecessor having been seen to settle; a safety net.
const FOLLOWER_DELAY: Duration = Duration::from_secs(5);

impl Pending {
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
    pub(super) fn retry(&mut self, position: Position, now: Instant, delay: impl Fn(u32) -> Duration) {
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
        let is_here = entry.predecessors().any(|before| self.slots.contains_key(&before));
        let is_on_disk = !is_here && entry.predecessors().any(|before| self.is_on_disk(before));
        if is_on_disk && entry.spooled {
            self.give_to_disk(position);
        } else if is_here || is_on_disk {
            self.retry(position, now, |_| FOLLOWER_DELAY);
        } else {
            self.retry(position, now, delay);
        }
    }

    /// Queues the delayed operations that follow one another on the path of one that goes.
    pub(super) fn release_followers(&mut self, position: Position) {
        let mut gone = vec![position];
        while let Some(before) = gone.pop() {
            let followers: Vec<Position> = self.followers_of(before).collect();
            for follower in followers {
                if let Some(Slot {
                    stage: Stage::Delayed(until),
                    ..
                }) = self.slots.get(&follower)
                {
                    self.delayed.remove(&(*until, follower));
                    self.requeue(follower);
                    gone.push(follower);
                }
            }
        }
    }

    fn followers_of(&self, position: Position) -> impl Iterator<Item = Position> {
        let first = Position {
            incarnation: 0,
            sequence: 0,
        };
        let named = self.followers.range((position, first)..);
        named
            .take_while(move |(before, _)| *before == position)
            .map(|(_, follower)| *follower)
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

    pub(super) fn requeue(&mut self, position: Position) {
        if let Some(slot) = self.slots.get_mut(&position) {
            slot.stage = Stage::Waiting;
            let queue = if slot.entry.critical {
                &mut self.critical
            } else if self.hastened.has(&slot.entry) {
                &mut self.hastened.waiting
            } else {
                &mut self.backlog
            };
            queue.insert(position);
        }
    }
}
