//! What the hub asks of this host for maps, besides writing those that it holds.

use std::sync::{Mutex, MutexGuard, PoisonError};

use p2p_sync_proto::{
    ids::read_id,
    v1::{Duty, duty::Role},
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::copies::{Copies, CopyStatus};

/// Duties remembered, as many as maps that a host holds.
const DUTIES_MAX: usize = 16_384;

/// What is asked of a host for a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum DutyRole {
    /// To keep a copy of it, and to take it over where its holder is lost.
    Backup,
    /// It may be asked to help with it.
    Assistant,
    /// To give it to another.
    HandOver,
    /// This agent is too old to know it.
    #[serde(other)]
    Unknown,
}

/// A duty, for people and tools.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DutyStatus {
    /// Of which map.
    pub map: String,
    /// What is asked.
    pub role: DutyRole,
    /// Who holds it; of a map to be handed over, who is to have it. Absent where that is nobody.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_id: Option<Uuid>,
    /// Of a backup: how far its copy is; absent where none is kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy: Option<CopyStatus>,
}

/// As the hub said them last.
#[derive(Default)]
pub(crate) struct Duties(Mutex<Vec<Duty>>);

impl Duties {
    pub(crate) fn heard(&self, duties: &[Duty]) {
        let mut known = self.lock();
        known.clear();
        known.extend(duties.iter().take(DUTIES_MAX).cloned());
        known.sort_unstable_by(|a, b| a.map.cmp(&b.map));
    }

    pub(crate) fn status(&self, copies: &Copies) -> Vec<DutyStatus> {
        let known = self.lock();
        let duties = known.iter().map(|duty| DutyStatus {
            map: duty.map.clone(),
            role: match duty.role() {
                Role::Backup => DutyRole::Backup,
                Role::Assistant => DutyRole::Assistant,
                Role::HandOver => DutyRole::HandOver,
                Role::Unspecified => DutyRole::Unknown,
            },
            host_id: read_id(&duty.host_id),
            copy: copies.status(&duty.map).filter(|_| duty.role() == Role::Backup),
        });
        duties.collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Duty>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
