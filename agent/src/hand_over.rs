//! Maps that this host gives away: the map is ended, what was made for it is brought to the hub first, and then the map is
//! released. So that whoever has it next finds everything, and nothing of it goes to limbo.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use p2p_sync_proto::{
    Code, Position, Problem,
    v1::{self, MapInfo, duty::Role, map_request::What},
};
use tokio::sync::{Notify, watch};

use crate::{link::call_maps, shared::Shared};

/// A program that says nothing has ended a map when it has made nothing for it for so long.
const QUIET: Duration = Duration::from_secs(2);
/// Before the hub takes the map, the release is on its way: so long, or a quarter of the time where that is less.
const MARGIN: Duration = Duration::from_millis(500);
/// For what was made to be settled where the program gives a map up by itself.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often it is looked at whether everything is settled.
const LOOK: Duration = Duration::from_millis(10);
/// Between two attempts to release.
const RELEASE_RETRY: Duration = Duration::from_millis(200);

/// The maps that are on their way to others.
#[derive(Default)]
pub(crate) struct HandOvers {
    under_way: Mutex<HashMap<String, Arc<HandOver>>>,
}

type Ended = Option<Result<Vec<MapInfo>, Problem>>;

/// One map on its way.
struct HandOver {
    map: String,
    tenure: u64,
    plan: Mutex<Plan>,
    /// The plan has changed.
    changed: Notify,
    ended: watch::Sender<Ended>,
}

/// When what is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    /// By then the map is released, whatever is not settled.
    release_by: Instant,
    /// The hub wants it.
    asked_for: bool,
    /// The program has said that what was made before this is all.
    given_up_at: Option<Position>,
    /// It stays here.
    called_off: bool,
}

impl Plan {
    /// Whether the program has ended the map: it says so, it is quiet, or there is no more time.
    fn has_ended(&self, quiet_since: Instant, now: Instant) -> bool {
        self.given_up_at.is_some() || now >= quiet_since + QUIET || now >= self.release_by
    }
}

impl HandOvers {
    /// Takes over what the hub said last, at a moment: maps of this host that others are to have. One that it wants no more
    /// stays, unless the program gives it up. To be called inside a runtime.
    pub(crate) fn heard(&self, shared: &Arc<Shared>, duties: &[v1::Duty], at: Instant) {
        let held = shared.leases.held();
        let asked: Vec<&v1::Duty> = duties.iter().filter(|duty| duty.role() == Role::HandOver).collect();
        for hand_over in self.lock().values() {
            let is_asked = asked.iter().any(|duty| hand_over.is_of(&duty.map, duty.tenure));
            hand_over.change(|plan| {
                plan.called_off |= !is_asked && plan.asked_for && plan.given_up_at.is_none();
                plan.asked_for = is_asked;
            });
        }
        for duty in asked {
            if held
                .iter()
                .any(|(map, tenure)| (map, *tenure) == (&duty.map, duty.tenure))
            {
                let within = Duration::from_millis(duty.within_ms);
                let release_by = at + within.saturating_sub(MARGIN.min(within / 4));
                let hand_over = self.begin(shared, &duty.map, duty.tenure, release_by);
                hand_over.change(|plan| {
                    plan.asked_for = true;
                    plan.called_off = false;
                    // What the hub says later is nearer to the truth.
                    plan.release_by = release_by;
                });
            }
        }
    }

    /// The program gives a map up: what was made before a position is settled first. Gives who waits for the end;
    /// `NOT_LEASE_HOLDER` where this host does not hold the map. To be called inside a runtime.
    pub(crate) fn give_up(
        &self,
        shared: &Arc<Shared>,
        map: &str,
        before: Position,
    ) -> Result<impl Future<Output = Result<Vec<MapInfo>, Problem>> + use<>, Problem> {
        let not_held = || {
            let sentence = format!("this host does not hold {map}: there is nothing to release");
            Problem::new(Code::NotLeaseHolder, sentence)
        };
        let tenure = shared.leases.give_up(map).ok_or_else(not_held)?;
        let hand_over = self.begin(shared, map, tenure, Instant::now() + PATIENCE);
        let mut ended = hand_over.ended.subscribe();
        hand_over.change(|plan| {
            plan.given_up_at = plan.given_up_at.max(Some(before));
            plan.called_off = false;
        });
        Ok(async move {
            let end = ended.wait_for(Option::is_some).await.ok().and_then(|end| end.clone());
            end.unwrap_or_else(|| Err(Problem::new(Code::ShutDown, "the agent has shut down")))
        })
    }

    /// The one under way for a tenure, or a new one.
    fn begin(&self, shared: &Arc<Shared>, map: &str, tenure: u64, release_by: Instant) -> Arc<HandOver> {
        let mut under_way = self.lock();
        if let Some(same) = under_way.get(map).filter(|same| same.tenure == tenure) {
            return same.clone();
        }
        let hand_over = Arc::new(HandOver {
            map: map.to_owned(),
            tenure,
            plan: Mutex::new(Plan {
                release_by,
                asked_for: false,
                given_up_at: None,
                called_off: false,
            }),
            changed: Notify::new(),
            ended: watch::Sender::new(None),
        });
        under_way.insert(map.to_owned(), hand_over.clone());
        shared.pending().hasten(map);
        shared.alarm.ring();
        tracing::info!(map, tenure, "the map is being handed over");
        let (shared, conducted) = (shared.clone(), hand_over.clone());
        tokio::spawn(async move {
            let end = conducted.conduct(&shared).await;
            shared.hand_overs.end(&shared, &conducted, end);
        });
        hand_over
    }

    fn end(&self, shared: &Shared, hand_over: &Arc<HandOver>, end: Result<Vec<MapInfo>, Problem>) {
        let (map, tenure) = (&hand_over.map, hand_over.tenure);
        {
            let mut under_way = self.lock();
            if under_way.get(map).is_some_and(|other| Arc::ptr_eq(other, hand_over)) {
                under_way.remove(map);
                shared.pending().hasten_no_more(map);
            }
        }
        match &end {
            Ok(_) => {
                tracing::info!(map, tenure, "the map is handed over");
                shared.leases.handed_over(map, tenure);
            }
            Err(problem) => {
                tracing::info!(map, tenure, "the map is not handed over: {problem}");
                shared.leases.keep(map, tenure);
                shared.leases.doubt.notify_one();
            }
        }
        shared.bulk_wake.notify_one();
        hand_over.ended.send_replace(Some(end));
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<HandOver>>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl HandOver {
    fn is_of(&self, map: &str, tenure: u64) -> bool {
        self.map == map && self.tenure == tenure
    }

    fn plan(&self) -> Plan {
        *self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Plan)) {
        change(&mut self.plan.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_one();
    }

    /// From the asking to the release.
    async fn conduct(&self, shared: &Arc<Shared>) -> Result<Vec<MapInfo>, Problem> {
        let mut quiet_since = Instant::now();
        let mut made = 0;
        while !self.plan().has_ended(quiet_since, Instant::now()) {
            self.look(shared).await?;
            let made_now = shared.pending().made_since_hastened(&self.map);
            if made_now != made {
                (made, quiet_since) = (made_now, Instant::now());
            }
        }
        let said = self.plan().given_up_at;
        let before = said.unwrap_or_else(|| shared.lanes.next_position());
        while !shared.has_settled_of(&self.map, before) && Instant::now() < self.plan().release_by {
            self.look(shared).await?;
        }
        self.release(shared).await
    }

    /// Waits until there is something to look at; an error where the map stays.
    async fn look(&self, shared: &Shared) -> Result<(), Problem> {
        // Who writes the disk has what is looked for.
        shared.alarm.ring_if_asleep();
        // Either way it is looked at.
        let _ = tokio::time::timeout(LOOK, self.changed.notified()).await;
        self.check()
    }

    fn check(&self) -> Result<(), Problem> {
        if self.plan().called_off {
            let sentence = format!(
                "{} stays with this host: the hub wants it handed over no more",
                self.map
            );
            return Err(Problem::new(Code::Conflict, sentence));
        }
        Ok(())
    }

    /// Until the hub has said what became of it, or long enough to know that it took the map by itself.
    async fn release(&self, shared: &Arc<Shared>) -> Result<Vec<MapInfo>, Problem> {
        let until = Instant::now().max(self.plan().release_by) + PATIENCE;
        loop {
            let release = What::Release(v1::ReleaseMap {
                map: self.map.clone(),
                tenure: self.tenure,
            });
            let problem = match call_maps(shared, release).await {
                Ok(maps) => return Ok(maps),
                Err(problem) => problem,
            };
            let may_pass = matches!(problem.code, Code::HubUnavailable | Code::RateLimited | Code::Internal);
            if !may_pass || Instant::now() >= until {
                return Err(problem);
            }
            tokio::time::sleep(RELEASE_RETRY).await;
            self.check()?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_map_has_ended_when_the_program_says_so_or_is_quiet_or_the_time_is_over() {
        let now = Instant::now();
        let asked = Plan {
            release_by: now + SECOND * 30,
            asked_for: true,
            given_up_at: None,
            called_off: false,
        };
        assert!(!asked.has_ended(now, now));
        assert!(
            !asked.has_ended(now + SECOND * 8, now + SECOND * 9),
            "it was written a second ago"
        );
        assert!(asked.has_ended(now + SECOND * 8, now + SECOND * 10));
        assert!(
            asked.has_ended(now + SECOND * 30, now + SECOND * 30),
            "written to the end"
        );
        let said = Plan {
            given_up_at: Some(Position {
                incarnation: 1,
                sequence: 7,
            }),
            ..asked
        };
        assert!(said.has_ended(now, now));
    }
}
