//! Which maps this host may write: what the hub said last, by this machine's steady clock.
//!
//! Operations carry the tenure of their map, also after a lease was lost: so the hub tells what came late from what is
//! forged. Whether a program should go on writing is another matter, and told by the lease's state and by events.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use p2p_sync_proto::{ids::read_id, v1};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use uuid::Uuid;

use crate::events::{AgentEvent, Events};

/// Maps remembered; of more, those that were lost are forgotten.
const MAPS_MAX: usize = 16_384;
/// How long a grant is not told while the host's copy of the map is on its way to where the tenure began.
const COPY_PATIENCE: Duration = Duration::from_secs(1);

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
    /// It may not any more, though it holds the map still: the map is being handed over. What is sent now to end the map well
    /// applies, as long as it has not passed on.
    HandingOver,
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
    /// To whom it is being handed over, if it is; nil: nobody yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub successor: Option<Uuid>,
}

/// The leases of a host.
pub(crate) struct Leases {
    table: Mutex<Table>,
    events: Arc<Events>,
    /// The last renewal's or change's number, locked while one is on its way: they arrive in their order then.
    pub(crate) counter: tokio::sync::Mutex<u64>,
    /// The hub has told something that a renewal is to tell whole: it is asked at once.
    pub(crate) told: Notify,
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
    /// How far the copies are that are whole.
    copies: HashMap<String, u64>,
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
    /// Not told yet: the host's copy is to come so far first, or that time to be over.
    awaits: Option<(u64, Instant)>,
    /// The hub wants it handed over, to whom it says.
    asked_for: Option<Uuid>,
    /// The program gives it up.
    given_up: bool,
}

impl Held {
    fn successor(&self) -> Option<Uuid> {
        self.asked_for.or_else(|| self.given_up.then(Uuid::nil))
    }
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
    /// Where the map's stream was when the tenure began.
    pub(crate) stream_head: u64,
    /// It is to be handed over, to whom; nil: to nobody yet.
    pub(crate) successor: Option<Uuid>,
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
            counter: tokio::sync::Mutex::new(0),
            told: Notify::new(),
            doubt: Notify::new(),
            changed: Notify::new(),
        }
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
            changed |= before.as_ref().is_none_or(|before| before.tenure != heard.tenure);
            events.extend(table.take(before, heard, at));
        }
        for (map, lease) in lost {
            if lease.held.is_some_and(|held| held.awaits.is_none()) {
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
        self.tell(table, events);
        changed
    }

    /// Takes over of what the hub told between two renewals what cannot be out of date: leases of newer tenures than any that
    /// is known. All else may have been overtaken by a renewal's answer, so that a renewal is to say it.
    pub(crate) fn noticed(&self, held: Vec<Heard>, at: Instant, makers: impl FnOnce(HashMap<Box<str>, u64>)) -> bool {
        let mut table = self.lock();
        if table.governed != Some(true) || !table.confirmed {
            return false;
        }
        let mut events = Vec::new();
        let mut changed = false;
        for heard in held {
            let known = table.maps.get(&heard.map).map_or(0, |known| known.tenure);
            if heard.tenure > known && table.maps.len() < MAPS_MAX {
                events.extend(table.take(None, heard, at));
                changed = true;
            }
        }
        if changed {
            makers(table.tenures());
        }
        self.tell(table, events);
        changed
    }

    /// The program gives up a map that this host holds: gives the tenure, or none where it does not.
    pub(crate) fn give_up(&self, map: &str) -> Option<u64> {
        let mut table = self.lock();
        let lease = table.maps.get_mut(map)?;
        let held = lease.held.as_mut()?;
        let begins = held.successor().is_none();
        held.given_up = true;
        let (tenure, successor) = (lease.tenure, held.successor().unwrap_or_default());
        let event = begins.then(|| AgentEvent::LeaseHandingOver {
            map: map.to_owned(),
            successor,
        });
        self.tell(table, event);
        Some(tenure)
    }

    /// The program keeps a map after all that it wanted to give up: the hub did not take it.
    pub(crate) fn keep(&self, map: &str, tenure: u64) {
        let mut table = self.lock();
        let lease = table.maps.get_mut(map).filter(|lease| lease.tenure == tenure);
        let Some(held) = lease.and_then(|lease| lease.held.as_mut()) else {
            return;
        };
        let ends = std::mem::take(&mut held.given_up) && held.asked_for.is_none();
        let event = ends.then(|| AgentEvent::LeaseGranted { map: map.to_owned() });
        self.tell(table, event);
    }

    /// The hub has taken a map back that was handed over.
    pub(crate) fn handed_over(&self, map: &str, tenure: u64) {
        let mut table = self.lock();
        let lease = table.maps.get_mut(map).filter(|lease| lease.tenure == tenure);
        let held = lease.and_then(|lease| lease.held.take());
        let event = held.map(|_| AgentEvent::LeaseLost { map: map.to_owned() });
        self.tell(table, event);
    }

    /// This host's copy of a map has come so far, or is whole no more.
    pub(crate) fn copied(&self, map: &str, upto: Option<u64>) {
        let mut table = self.lock();
        match upto {
            Some(upto) => _ = table.copies.insert(map.to_owned(), upto),
            None => _ = table.copies.remove(map),
        }
        let held = table.maps.get_mut(map).and_then(|lease| lease.held.as_mut());
        let has_come = |held: &&mut Held| {
            held.awaits
                .is_some_and(|(head, _)| upto.is_none_or(|upto| upto >= head))
        };
        let granted = held.filter(has_come).map(|held| {
            held.awaits = None;
            AgentEvent::LeaseGranted { map: map.to_owned() }
        });
        self.tell(table, granted);
    }

    /// Under the table's lock, so that what is told last is what holds.
    fn tell(&self, table: MutexGuard<'_, Table>, events: impl IntoIterator<Item = AgentEvent>) {
        for event in events {
            self.events.lease(event);
        }
        drop(table);
        self.changed.notify_one();
    }

    /// The maps that this host holds, and their tenures.
    pub(crate) fn held(&self) -> Vec<(String, u64)> {
        let table = self.lock();
        let held = table.maps.iter().filter(|(_, lease)| lease.held.is_some());
        held.map(|(map, lease)| (map.clone(), lease.tenure)).collect()
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
                successor: lease.held.and_then(|held| held.successor()),
            })
            .collect();
        leases.sort_unstable_by(|a, b| a.map.cmp(&b.map));
        (table.governed.filter(|_| table.confirmed), leases)
    }

    /// Tells of each lease that was not renewed in time, and of each whose copy was waited for; ends never.
    pub(crate) async fn watch(&self) {
        loop {
            let next = self.tell_due(Instant::now());
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
    fn tell_due(&self, now: Instant) -> Option<Instant> {
        let mut table = self.lock();
        let mut next: Option<Instant> = None;
        for (map, lease) in &mut table.maps {
            let Some(held) = &mut lease.held else { continue };
            if held.awaits.is_some_and(|(_, until)| until <= now) {
                held.awaits = None;
                self.events.lease(AgentEvent::LeaseGranted { map: map.clone() });
            }
            let is_ending = held.told_at_risk || held.successor().is_some();
            if !is_ending && held.at_risk <= now {
                held.told_at_risk = true;
                self.events.lease(AgentEvent::LeaseExpiring { map: map.clone() });
            }
            let awaited = held.awaits.map(|(_, until)| until);
            let at_risk = (!is_ending && !held.told_at_risk).then_some(held.at_risk);
            next = next.into_iter().chain(awaited).chain(at_risk).min();
        }
        next
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// Takes over a lease that was heard of, and gives what there is to tell of it.
    fn take(&mut self, before: Option<Lease>, heard: Heard, at: Instant) -> Option<AgentEvent> {
        let before = before.filter(|before| before.tenure == heard.tenure);
        let before = before.and_then(|before| before.held);
        let is_well = !heard.at_risk_in.is_zero();
        let awaits = if let Some(before) = before {
            before.awaits
        } else {
            let copied = self.copies.get(&heard.map);
            let is_late = copied.is_some_and(|upto| *upto < heard.stream_head);
            is_late.then(|| (heard.stream_head, at + COPY_PATIENCE))
        };
        let held = Held {
            at_risk: at + heard.at_risk_in,
            until: at + heard.left,
            told_at_risk: !is_well && before.is_some_and(|before| before.told_at_risk),
            awaits,
            asked_for: heard.successor,
            given_up: before.is_some_and(|before| before.given_up),
        };
        let map = heard.map.clone();
        let ended = before.and_then(|before| before.successor());
        let event = match held.successor() {
            Some(_) if ended.is_some() => None,
            Some(successor) => Some(AgentEvent::LeaseHandingOver { map, successor }),
            None => {
                let is_again = before.is_none_or(|before| before.told_at_risk && is_well) || ended.is_some();
                (is_again && awaits.is_none()).then_some(AgentEvent::LeaseGranted { map })
            }
        };
        let lease = Lease {
            tenure: heard.tenure,
            held: Some(held),
        };
        self.maps.insert(heard.map, lease);
        event
    }

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
            (_, Some(Lease { held: Some(held), .. })) if held.awaits.is_some() => LeaseState::None,
            (_, Some(Lease { held: Some(held), .. })) if now >= held.until => LeaseState::Lost,
            (_, Some(Lease { held: Some(held), .. })) if held.successor().is_some() => LeaseState::HandingOver,
            (_, Some(Lease { held: Some(held), .. })) if now >= held.at_risk => LeaseState::Expiring,
            _ => LeaseState::Held,
        }
    }
}

/// What a hub's answer says of the leases, counted from when it was asked: its clock began later.
pub(crate) fn heard_of(reply: &v1::RenewReply) -> Vec<Heard> {
    let third = Duration::from_millis(reply.lease_ms / 3);
    let successor = |lease: &v1::Lease| {
        let is_its = |duty: &&v1::Duty| {
            duty.role() == v1::duty::Role::HandOver && duty.map == lease.map && duty.tenure == lease.tenure
        };
        let asked = reply.duties.iter().find(is_its)?;
        Some(read_id(&asked.host_id).unwrap_or_default())
    };
    let of = |lease: &v1::Lease| {
        let left = Duration::from_millis(lease.expires_in_ms.min(u64::from(u32::MAX)));
        Heard {
            map: lease.map.clone(),
            tenure: lease.tenure,
            at_risk_in: left.saturating_sub(third),
            left,
            stream_head: lease.stream_head,
            successor: successor(lease),
        }
    };
    reply.leases.iter().take(MAPS_MAX).map(of).collect()
}

/// What a standalone agent's status says of them.
pub(crate) fn heard_from(leases: &[LeaseStatus]) -> Vec<Heard> {
    use LeaseState::{Expiring, HandingOver, Held};
    let is_held = |lease: &&LeaseStatus| matches!(lease.state, Held | Expiring | HandingOver);
    let of = |lease: &LeaseStatus| {
        let left = Duration::from_millis(lease.expires_in_ms);
        let is_well = lease.state != Expiring;
        Heard {
            map: lease.map.clone(),
            tenure: lease.tenure,
            // The agent tells when it is; this is for an agent that is gone.
            at_risk_in: if is_well { left / 2 } else { Duration::ZERO },
            left,
            // It has waited itself.
            stream_head: 0,
            successor: lease.successor.filter(|_| lease.state == HandingOver),
        }
    };
    leases.iter().filter(is_held).map(of).collect()
}

#[cfg(test)]
mod tests;
