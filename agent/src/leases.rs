//! Which maps this host may write: what the hub said last, by this machine's steady clock.
//!
//! Operations carry the tenure of their map, also after a lease was lost: so the hub tells what came late from what is
//! forged. Whether a program should go on writing is another matter, and told by the lease's state and by events.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use p2p_sync_proto::v1;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use crate::events::{AgentEvent, Events};

/// Maps remembered; of more, those that were lost are forgotten.
const MAPS_MAX: usize = 16_384;

/// Whether this host may write a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum LeaseState {
    /// The hub grants no leases: every host may write every map.
    NotGoverned,
    /// It may.
    Held,
    /// It may still; the lease ends soon and could not be renewed yet.
    Expiring,
    /// It may not any more: the map has passed to another, or may have, for the lease ran out and could not be renewed.
    Lost,
    /// It never might, or the hub has not said so yet.
    None,
}

/// A lease, for people and tools.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseStatus {
    /// Which map.
    pub map: String,
    /// What operations of the map carry.
    pub tenure: u64,
    /// Whether this host may write it.
    pub state: LeaseState,
    /// How much longer it runs, milliseconds.
    pub expires_in_ms: u64,
}

/// The leases of a host.
pub(crate) struct Leases {
    table: Mutex<Table>,
    events: Arc<Events>,
    renewals: AtomicU64,
    /// Something about the leases is in doubt: the hub is asked soon.
    pub(crate) doubt: Notify,
    /// The table changed: who waits for a lease to be at risk looks again.
    changed: Notify,
}

#[derive(Debug, Default)]
struct Table {
    /// `None` until a hub has said so, in this start or an earlier one.
    governed: Option<bool>,
    /// The hub has said so in this start.
    confirmed: bool,
    maps: HashMap<String, Lease>,
}

#[derive(Clone, Debug)]
struct Lease {
    tenure: u64,
    /// Absent where it is lost, or known from an earlier start alone.
    held: Option<Held>,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    /// It should have been renewed by then.
    at_risk: Instant,
    /// Another host may be given the map from then on.
    until: Instant,
    told_at_risk: bool,
}

/// A lease that is held, as it was heard of.
#[derive(Clone, Debug)]
pub(crate) struct Heard {
    pub(crate) map: String,
    pub(crate) tenure: u64,
    /// It should be renewed within this time.
    pub(crate) at_risk_in: Duration,
    /// It ends after this time.
    pub(crate) left: Duration,
}

impl Leases {
    /// Begins with what an earlier start knew, if there was one.
    pub(crate) fn new(kept: Option<v1::RenewReply>, events: Arc<Events>) -> Self {
        let mut table = Table::default();
        if let Some(kept) = kept {
            table.governed = Some(kept.governed);
            let of = |lease: v1::Lease| {
                let tenure = lease.tenure;
                (lease.map, Lease { tenure, held: None })
            };
            table.maps = kept.leases.into_iter().map(of).collect();
        }
        Self {
            table: Mutex::new(table),
            events,
            renewals: AtomicU64::new(0),
            doubt: Notify::new(),
            changed: Notify::new(),
        }
    }

    /// The next renewal's number: larger than all before of this start, whatever connection they took.
    pub(crate) fn next_renewal(&self) -> u64 {
        self.renewals.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// What operations of each map carry.
    pub(crate) fn tenures(&self) -> HashMap<Box<str>, u64> {
        self.lock().tenures()
    }

    /// What the next start is to know.
    pub(crate) fn to_keep(&self) -> v1::RenewReply {
        let table = self.lock();
        let leases = table.maps.iter().map(|(map, lease)| v1::Lease {
            map: map.clone(),
            tenure: lease.tenure,
            ..Default::default()
        });
        v1::RenewReply {
            governed: table.governed.unwrap_or_default(),
            leases: leases.collect(),
            ..Default::default()
        }
    }

    /// As [`Self::heard_by`], by somebody who makes no operations.
    pub(crate) fn heard(&self, governed: bool, held: Vec<Heard>, at: Instant) -> bool {
        self.heard_by(governed, held, at, |_| {})
    }

    /// Takes over what was heard of all leases at a moment, and tells what changed; true where a tenure did. Those who make
    /// operations have the tenures before anybody learns that a lease is held: what was made between would go to limbo.
    pub(crate) fn heard_by(
        &self,
        governed: bool,
        held: Vec<Heard>,
        at: Instant,
        makers: impl FnOnce(HashMap<Box<str>, u64>),
    ) -> bool {
        let mut table = self.lock();
        let mut changed = table.governed != Some(governed);
        table.governed = Some(governed);
        table.confirmed = true;
        let mut lost: HashMap<String, Lease> = std::mem::take(&mut table.maps);
        let mut events = Vec::new();
        for heard in held {
            let before = lost.remove(&heard.map);
            let stays = before.as_ref().is_some_and(|before| before.tenure == heard.tenure);
            let before = before.and_then(|before| before.held).filter(|_| stays);
            let is_well = !heard.at_risk_in.is_zero();
            changed |= !stays;
            if before.is_none_or(|before| before.told_at_risk && is_well) {
                events.push(AgentEvent::LeaseGranted { map: heard.map.clone() });
            }
            let held = Held {
                at_risk: at + heard.at_risk_in,
                until: at + heard.left,
                told_at_risk: !is_well && before.is_some_and(|before| before.told_at_risk),
            };
            let lease = Lease {
                tenure: heard.tenure,
                held: Some(held),
            };
            table.maps.insert(heard.map, lease);
        }
        for (map, lease) in lost {
            if lease.held.is_some() {
                events.push(AgentEvent::LeaseLost { map: map.clone() });
            }
            if governed && table.maps.len() < MAPS_MAX {
                table.maps.insert(map, Lease { held: None, ..lease });
            } else {
                changed = true;
            }
        }
        if changed {
            makers(table.tenures());
        }
        // Under the lock, so that what is told last is what holds.
        for event in events {
            self.events.lease(event);
        }
        drop(table);
        self.changed.notify_one();
        changed
    }

    /// Whether this host may write a map.
    pub(crate) fn state(&self, map: &str) -> LeaseState {
        let table = self.lock();
        table.state(table.maps.get(map), Instant::now())
    }

    /// Whether the hub grants leases, if it has said so in this start, and all that it said, in the order of the maps.
    pub(crate) fn status(&self) -> (Option<bool>, Vec<LeaseStatus>) {
        let now = Instant::now();
        let table = self.lock();
        let mut leases: Vec<LeaseStatus> = table
            .maps
            .iter()
            .map(|(map, lease)| LeaseStatus {
                map: map.clone(),
                tenure: lease.tenure,
                state: table.state(Some(lease), now),
                expires_in_ms: lease.held.map_or(0, |held| {
                    let left = held.until.saturating_duration_since(now);
                    u64::try_from(left.as_millis()).unwrap_or(u64::MAX)
                }),
            })
            .collect();
        leases.sort_unstable_by(|a, b| a.map.cmp(&b.map));
        (table.governed.filter(|_| table.confirmed), leases)
    }

    /// Tells of each lease that was not renewed in time; ends never.
    pub(crate) async fn watch(&self) {
        loop {
            let next = self.tell_at_risk(Instant::now());
            match next {
                Some(next) => {
                    // Either way there is something to look at.
                    let _ = tokio::time::timeout_at(next.into(), self.changed.notified()).await;
                }
                None => self.changed.notified().await,
            }
        }
    }

    /// Gives when the next one will be.
    fn tell_at_risk(&self, now: Instant) -> Option<Instant> {
        let mut table = self.lock();
        let mut next: Option<Instant> = None;
        for (map, lease) in &mut table.maps {
            let Some(held) = lease.held.as_mut().filter(|held| !held.told_at_risk) else {
                continue;
            };
            if held.at_risk <= now {
                held.told_at_risk = true;
                self.events.lease(AgentEvent::LeaseExpiring { map: map.clone() });
            } else {
                next = Some(next.map_or(held.at_risk, |next| next.min(held.at_risk)));
            }
        }
        next
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn tenures(&self) -> HashMap<Box<str>, u64> {
        let tenures = self.maps.iter();
        tenures
            .map(|(map, lease)| (map.as_str().into(), lease.tenure))
            .collect()
    }

    fn state(&self, lease: Option<&Lease>, now: Instant) -> LeaseState {
        match (self.governed, lease) {
            (Some(false), _) => LeaseState::NotGoverned,
            (_, None) => LeaseState::None,
            (_, Some(Lease { held: None, .. })) => LeaseState::Lost,
            (_, Some(Lease { held: Some(held), .. })) if now >= held.until => LeaseState::Lost,
            (_, Some(Lease { held: Some(held), .. })) if now >= held.at_risk => LeaseState::Expiring,
            _ => LeaseState::Held,
        }
    }
}

/// What a hub's answer says of the leases, counted from when it was asked: its clock began later.
pub(crate) fn heard_of(reply: &v1::RenewReply) -> Vec<Heard> {
    let third = Duration::from_millis(reply.lease_ms / 3);
    let of = |lease: &v1::Lease| {
        let left = Duration::from_millis(lease.expires_in_ms.min(u64::from(u32::MAX)));
        Heard {
            map: lease.map.clone(),
            tenure: lease.tenure,
            at_risk_in: left.saturating_sub(third),
            left,
        }
    };
    reply.leases.iter().take(MAPS_MAX).map(of).collect()
}

/// What a standalone agent's status says of them.
pub(crate) fn heard_from(leases: &[LeaseStatus]) -> Vec<Heard> {
    let may_write = |lease: &&LeaseStatus| matches!(lease.state, LeaseState::Held | LeaseState::Expiring);
    let of = |lease: &LeaseStatus| {
        let left = Duration::from_millis(lease.expires_in_ms);
        let is_well = lease.state == LeaseState::Held;
        Heard {
            map: lease.map.clone(),
            tenure: lease.tenure,
            // The agent tells when it is; this is for an agent that is gone.
            at_risk_in: if is_well { left / 2 } else { Duration::ZERO },
            left,
        }
    };
    leases.iter().filter(may_write).map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn heard(map: &str, tenure: u64) -> Heard {
        Heard {
            map: map.to_owned(),
            tenure,
            at_risk_in: SECOND * 40,
            left: SECOND * 60,
        }
    }

    fn told(events: &Events) -> Vec<String> {
        let mut told = Vec::new();
        while let Some(event) = events.next(|_| true) {
            told.push(match event {
                AgentEvent::LeaseGranted { map } => format!("granted {map}"),
                AgentEvent::LeaseExpiring { map } => format!("expiring {map}"),
                AgentEvent::LeaseLost { map } => format!("lost {map}"),
                other => panic!("{other:?}"),
            });
        }
        told.sort();
        told
    }

    #[test]
    fn a_lease_is_granted_put_at_risk_renewed_and_lost_and_each_is_told_once() {
        let events = Arc::new(Events::new());
        let leases = Leases::new(None, events.clone());
        assert_eq!(leases.state("prontera"), LeaseState::None);
        let now = Instant::now();
        assert!(
            leases.heard_by(true, vec![heard("prontera", 3), heard("geffen", 1)], now, |tenures| {
                assert_eq!(tenures.get("prontera"), Some(&3));
                assert!(told(&events).is_empty(), "operations carry it before it is told");
            })
        );
        assert_eq!(leases.state("prontera"), LeaseState::Held);
        assert_eq!(told(&events), ["granted geffen", "granted prontera"]);
        assert!(!leases.heard(true, vec![heard("prontera", 3), heard("geffen", 1)], now));
        assert!(told(&events).is_empty(), "it goes on as it was");

        assert_eq!(leases.tell_at_risk(now + SECOND * 39), Some(now + SECOND * 40));
        assert_eq!(leases.tell_at_risk(now + SECOND * 40), None);
        leases.tell_at_risk(now + SECOND * 41);
        assert_eq!(told(&events), ["expiring geffen", "expiring prontera"]);
        assert!(!leases.heard(true, vec![heard("prontera", 3), heard("geffen", 1)], now));
        assert_eq!(told(&events), ["granted geffen", "granted prontera"]);

        assert!(
            !leases.heard(true, vec![heard("geffen", 1)], now),
            "its tenure is carried on"
        );
        assert_eq!(told(&events), ["lost prontera"]);
        assert_eq!(leases.state("prontera"), LeaseState::Lost);
        assert_eq!(leases.tenures().get("prontera"), Some(&3));
        assert!(leases.heard(true, vec![heard("prontera", 5), heard("geffen", 2)], now));
        assert_eq!(
            told(&events),
            ["granted geffen", "granted prontera"],
            "also one that was away in between"
        );
    }

    #[test]
    fn past_its_end_a_lease_is_lost_until_it_is_renewed_and_only_the_hub_tells_so() {
        let events = Arc::new(Events::new());
        let leases = Leases::new(None, events.clone());
        let past = Instant::now()
            .checked_sub(SECOND * 60)
            .expect("the machine runs for a minute");
        leases.heard(true, vec![heard("prontera", 1)], past);
        assert_eq!(leases.state("prontera"), LeaseState::Lost);
        leases.heard(true, vec![heard("prontera", 1)], past + SECOND * 15);
        assert_eq!(leases.state("prontera"), LeaseState::Expiring);
        leases.heard(true, vec![heard("prontera", 1)], Instant::now());
        assert_eq!(leases.state("prontera"), LeaseState::Held);
        assert_eq!(told(&events), ["granted prontera"]);
    }

    #[test]
    fn the_next_start_knows_tenures_and_whether_leases_govern_but_holds_nothing() {
        let events = Arc::new(Events::new());
        let leases = Leases::new(None, events.clone());
        leases.heard(true, vec![heard("prontera", 7)], Instant::now());
        let next = Leases::new(Some(leases.to_keep()), events.clone());
        assert_eq!(next.tenures().get("prontera"), Some(&7));
        assert_eq!(
            (next.state("prontera"), next.state("geffen")),
            (LeaseState::Lost, LeaseState::None)
        );
        assert_eq!(next.status().0, None, "the hub has not said so yet");
        told(&events);
        assert!(!next.heard(true, vec![heard("prontera", 7)], Instant::now()));
        assert_eq!(told(&events), ["granted prontera"]);

        next.heard(false, vec![], Instant::now());
        assert_eq!(next.state("geffen"), LeaseState::NotGoverned);
        assert!(next.tenures().is_empty());
        let ungoverned = Leases::new(Some(next.to_keep()), events);
        assert_eq!(ungoverned.state("prontera"), LeaseState::NotGoverned);
    }
}
