//! How many operations came how far.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::results::OperationState;

/// Counts since the agent's start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Counts {
    /// Operations taken.
    pub taken: u64,
    /// Refused at the call.
    pub refused: u64,
    /// Committed by the hub, operations of earlier starts included.
    pub applied: u64,
    /// Replaced by a newer operation of their path before they were sent.
    pub superseded: u64,
    /// Refused by the hub.
    pub rejected: u64,
    /// Came under a tenure that has passed.
    pub limbo: u64,
    /// Waiting calls that ended without an answer.
    pub timeouts: u64,
}

/// Counted by whoever sees it.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) taken: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) timeouts: AtomicU64,
    applied: AtomicU64,
    superseded: AtomicU64,
    rejected: AtomicU64,
    limbo: AtomicU64,
}

impl Counters {
    pub(crate) fn settled(&self, state: OperationState) {
        let counter = match state {
            OperationState::Applied => &self.applied,
            OperationState::Superseded => &self.superseded,
            OperationState::Rejected => &self.rejected,
            OperationState::Limbo => &self.limbo,
            _ => return,
        };
        add(counter);
    }

    pub(crate) fn counts(&self) -> Counts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            taken: read(&self.taken),
            refused: read(&self.refused),
            applied: read(&self.applied),
            superseded: read(&self.superseded),
            rejected: read(&self.rejected),
            limbo: read(&self.limbo),
            timeouts: read(&self.timeouts),
        }
    }
}

/// Counts one more.
pub(crate) fn add(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
