//! When each operation was submitted and when it was settled.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use p2p_sync_agent::{Event, OperationState};
use p2p_sync_proto::Position;
use uuid::Uuid;

/// What is known of one operation.
#[derive(Clone, Debug, Default)]
pub(super) struct Life {
    pub(super) submitted: Option<Submitted>,
    pub(super) settled: Option<(Instant, OperationState, Position)>,
}

/// How an operation was submitted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Submitted {
    pub(super) at: Instant,
    /// By a caller who waits.
    pub(super) waited: bool,
    /// Which happening it tells of, by its index.
    pub(super) happening: usize,
}

/// All operations. An operation may be settled before its submission is noted.
#[derive(Default)]
pub(super) struct Ledger(Mutex<HashMap<Uuid, Life>>);

impl Ledger {
    fn lock(&self) -> MutexGuard<'_, HashMap<Uuid, Life>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes room, so that none is made while time is measured.
    pub(super) fn reserve(&self, operations: usize) {
        self.lock().reserve(operations);
    }

    pub(super) fn submitted(&self, id: Uuid, submitted: Submitted) {
        self.lock().entry(id).or_default().submitted = Some(submitted);
    }

    /// Takes what an agent tells.
    pub(super) fn observe(&self, event: &Event) {
        if event.settled.state.is_settled() {
            let settled = (Instant::now(), event.settled.state, event.position);
            self.lock().entry(event.operation_id).or_default().settled = Some(settled);
        }
    }

    pub(super) fn lives(&self) -> HashMap<Uuid, Life> {
        self.lock().clone()
    }
}
