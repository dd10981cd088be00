//! Hosts beside what they write: how good each is, who holds which map, who stands by, and how maps change hands.
//!
//! `score` rates a host, `assignment` decides who is to have what and `handover` how far a hand-over is, all of them pure; the
//! `assigner` carries out what they decide, in one proxy at a time. `attend` tells hosts what they hold and are asked to do, and
//! `calls` answers what they ask for.

pub mod assigner;
pub mod assignment;
pub mod attend;
pub mod calls;
pub mod handover;
pub mod score;

use std::time::Duration;

use p2p_sync_proto::v1::{self, duty::Role};
use uuid::Uuid;

use crate::{open::Sender, pipeline::Hub, store::Standing};

/// How maps are given and moved.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// What counts how much in a host's score.
    pub weights: score::Weights,
    /// Maps of one host, whatever it says it wants.
    pub maps_max: usize,
    /// How much better a host has to be, of 100, for a map to be moved to it.
    pub migration_margin: f64,
    /// Between two moves of one map that the hub decides.
    pub migration_min: Duration,
    /// How long a successor may take to catch up before the holder is asked.
    pub catch_up: Duration,
    /// How long a holder may take to release a map that it is asked for.
    pub handover: Duration,
    /// Of a lease.
    pub lease: Duration,
}

impl Settings {
    /// A host that has not been heard for so long gets nothing: it has missed a renewal.
    pub fn silent_after(&self) -> Duration {
        self.lease * 2 / 3
    }

    /// And stands by for nothing any more.
    pub fn gone_after(&self) -> Duration {
        self.lease * 2
    }
}

/// What a renewal answers, and a notice tells.
pub(crate) fn reply(hub: &Hub, sender: &Sender, standing: &Standing) -> v1::RenewReply {
    let leases = hub.store.leases();
    v1::RenewReply {
        governed: leases.required,
        lease_ms: milliseconds(leases.length),
        leases: standing
            .leases
            .iter()
            .map(|lease| v1::Lease {
                map: lease.map.clone(),
                tenure: lease.tenure,
                expires_in_ms: milliseconds(lease.expires_in),
                stream_head: lease.stream_head,
            })
            .collect(),
        duties: standing.duties.iter().map(duty).collect(),
        renew_credential: hub.opener.is_due_for_renewal(sender),
        ..Default::default()
    }
}

fn duty(duty: &crate::store::Duty) -> v1::Duty {
    let is_handover = duty.role == Role::HandOver;
    v1::Duty {
        map: duty.map.clone(),
        role: duty.role.into(),
        host_id: id_bytes(duty.host_id).into(),
        tenure: if is_handover { duty.tenure } else { 0 },
        within_ms: if is_handover { milliseconds(duty.within) } else { 0 },
    }
}

/// 16 bytes, or none.
fn id_bytes(id: Option<Uuid>) -> Vec<u8> {
    id.map(|id| id.as_bytes().to_vec()).unwrap_or_default()
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
