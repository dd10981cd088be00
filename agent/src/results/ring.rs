//! The results of what this agent took, found by their numbers: a word each, in the order of their ids.
//!
//! Neighbours in time are neighbours in memory, for a game loop takes hundreds at once and the hub settles them together;
//! and a word that changes as a whole needs no lock that a caller could find held.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use super::OperationState;

/// Results remembered; one that is settled gives way to that with its number and a multiple of this more.
const SLOTS: u64 = 262_144;

/// From the lowest bit: whether an event is to be told, the state, when it came so far, and how often its slot was used
/// before. The last begins anew after 2^38 operations, the time after 34 years.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Word(u64);

const STATE_SHIFT: u32 = 1;
const AT_SHIFT: u32 = 4;
const LAP_SHIFT: u32 = 44;
const STATE_MASK: u64 = (1 << (AT_SHIFT - STATE_SHIFT)) - 1;
const AT_MASK: u64 = (1 << (LAP_SHIFT - AT_SHIFT)) - 1;
const LAP_MASK: u64 = (1 << (u64::BITS - LAP_SHIFT)) - 1;

/// How far an operation has come, as a slot knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Slot {
    Vacant,
    Known(OperationState),
    /// Settled, and what there is to tell is more than a state.
    ToldElsewhere,
}

/// What became of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Noted {
    /// Done; whether an event is to be told of the operation.
    Changed { notify: bool },
    /// It was settled before and stays so.
    Settled,
    /// The slot is another operation's.
    NotHere,
}

const STATES: [Slot; 8] = [
    Slot::Vacant,
    Slot::Known(OperationState::Accepted),
    Slot::Known(OperationState::Spooled),
    Slot::Known(OperationState::Applied),
    Slot::Known(OperationState::Superseded),
    Slot::Known(OperationState::Rejected),
    Slot::Known(OperationState::Limbo),
    Slot::ToldElsewhere,
];

impl Slot {
    fn bits(self) -> u64 {
        let bits = STATES.iter().position(|state| *state == self);
        bits.expect("what is only ever told is not noted") as u64
    }

    pub(super) fn is_settled(self) -> bool {
        match self {
            Self::Vacant => false,
            Self::Known(state) => state.is_settled(),
            Self::ToldElsewhere => true,
        }
    }

    /// Whether another operation may have the slot.
    fn gives_way(self) -> bool {
        self == Self::Vacant || self.is_settled()
    }
}

impl Word {
    fn new(number: u64, slot: Slot, at: Duration, notify: bool) -> Self {
        let at_ms = u64::try_from(at.as_millis()).unwrap_or(u64::MAX) & AT_MASK;
        let lap = (number / SLOTS) & LAP_MASK;
        Self(lap << LAP_SHIFT | at_ms << AT_SHIFT | slot.bits() << STATE_SHIFT | u64::from(notify))
    }

    fn is_of(self, number: u64) -> bool {
        self.0 >> LAP_SHIFT == (number / SLOTS) & LAP_MASK && self.slot() != Slot::Vacant
    }

    fn slot(self) -> Slot {
        STATES[usize::try_from(self.0 >> STATE_SHIFT & STATE_MASK).expect("three bits")]
    }

    fn at(self) -> Duration {
        Duration::from_millis(self.0 >> AT_SHIFT & AT_MASK)
    }

    fn notify(self) -> bool {
        self.0 & 1 == 1
    }
}

pub(super) struct Ring {
    slots: Box<[AtomicU64]>,
}

impl Ring {
    pub(super) fn new() -> Self {
        Self {
            slots: (0..SLOTS).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    fn slot(&self, number: u64) -> &AtomicU64 {
        &self.slots[usize::try_from(number % SLOTS).expect("below SLOTS")]
    }

    /// Notes that an operation was taken; false where another that is not settled has the slot.
    ///
    /// Numbers are taken one after the other.
    pub(super) fn accept(&self, number: u64, at: Duration, notify: bool) -> bool {
        let slot = self.slot(number);
        let accepted = Word::new(number, Slot::Known(OperationState::Accepted), at, notify);
        let is_free = Word(slot.load(Ordering::Relaxed)).slot().gives_way();
        if is_free {
            // What gives way changes no more, so that nothing is overwritten.
            slot.store(accepted.0, Ordering::Release);
        }
        is_free
    }

    /// Notes how far an operation has come.
    pub(super) fn note(&self, number: u64, state: Slot, at: Duration) -> Noted {
        let slot = self.slot(number);
        let mut known = Word(slot.load(Ordering::Acquire));
        loop {
            if !known.is_of(number) {
                return Noted::NotHere;
            }
            if known.slot().is_settled() {
                return Noted::Settled;
            }
            let notify = known.notify();
            let next = Word::new(number, state, at, notify);
            // In one order with the count of those who wait: either they see this, or whoever notes it sees them.
            match slot.compare_exchange_weak(known.0, next.0, Ordering::SeqCst, Ordering::Acquire) {
                Ok(_) => return Noted::Changed { notify },
                Err(changed) => known = Word(changed),
            }
        }
    }

    /// How far an operation has come and when; `Vacant` where it is not here.
    pub(super) fn get(&self, number: u64) -> (Slot, Duration) {
        let known = Word(self.slot(number).load(Ordering::SeqCst));
        if known.is_of(number) {
            (known.slot(), known.at())
        } else {
            (Slot::Vacant, Duration::ZERO)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    const APPLIED: Slot = Slot::Known(OperationState::Applied);
    const SPOOLED: Slot = Slot::Known(OperationState::Spooled);

    fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn what_is_noted_is_known_and_what_is_settled_stays_so() {
        let ring = Ring::new();
        let number = 5 * SLOTS + 7;
        assert_eq!(ring.get(number).0, Slot::Vacant);
        assert_eq!(ring.note(number, SPOOLED, at(1)), Noted::NotHere);
        assert!(ring.accept(number, at(1), true));
        assert_eq!(ring.note(number, SPOOLED, at(2)), Noted::Changed { notify: true });
        assert_eq!(ring.get(number), (SPOOLED, at(2)));
        assert_eq!(ring.note(number, APPLIED, at(3)), Noted::Changed { notify: true });
        assert_eq!(ring.note(number, SPOOLED, at(4)), Noted::Settled);
        assert_eq!(ring.get(number), (APPLIED, at(3)));
    }

    #[test]
    fn a_slot_is_its_operations_until_that_is_settled() {
        let ring = Ring::new();
        assert!(ring.accept(7, at(1), false));
        assert!(!ring.accept(7 + SLOTS, at(2), false), "not settled");
        assert_eq!(ring.note(7 + SLOTS, APPLIED, at(2)), Noted::NotHere);
        ring.note(7, Slot::ToldElsewhere, at(3));
        assert!(ring.accept(7 + SLOTS, at(4), false));
        assert_eq!(ring.get(7).0, Slot::Vacant);
        assert_eq!(ring.note(7, SPOOLED, at(5)), Noted::NotHere);
        assert_eq!(ring.get(7 + SLOTS), (Slot::Known(OperationState::Accepted), at(4)));
    }

    #[test]
    fn of_many_who_settle_one_operation_one_does() {
        let ring = Arc::new(Ring::new());
        for number in 0..1000 {
            ring.accept(number, at(0), true);
        }
        let settling: Vec<_> = (0..4)
            .map(|_| {
                let ring = ring.clone();
                let settled = move |number| ring.note(number, APPLIED, at(1)) == Noted::Changed { notify: true };
                std::thread::spawn(move || (0..1000).filter(|number| settled(*number)).count())
            })
            .collect();
        let settled: usize = settling
            .into_iter()
            .map(|thread| thread.join().expect("no panic"))
            .sum();
        assert_eq!(settled, 1000);
    }
}
