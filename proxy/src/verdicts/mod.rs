//! Verdicts: what was found against a host, kept for the operator beside the answer, and counted towards a lock.
//!
//! Four things are found. *Forgery* is refused by validation and counted. *Trespass*, on maps and players that never were the
//! host's, is refused where it would be stored, and counted apart, for an honest map server that was set up wrongly may commit
//! it. What is told again, because a message came again, counts once. *Movement* is stored and flagged. What a host
//! *reports* of others is stored as its word. All wait in memory, within bounds, for one task that writes them; what is
//! refused waits as a count for each host and rule, so that however many come, none goes uncounted.

pub mod movement;

use std::{
    collections::{HashMap, HashSet, VecDeque},
    num::NonZeroUsize,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use lru::LruCache;
use p2p_sync_proto::{Code, Position, Problem, v1::SyncDataType};
use serde_json::{Value, json};
use tokio::{sync::oneshot, time::interval};
use uuid::Uuid;

use self::movement::{Moved, Movement, Pace};
use crate::{
    open::Opener,
    operation::{Committed, Outcome, Refused, Valid, ValidOp},
    store::{Store, without_nul},
};

/// Between two writes of what was found; a host that is to be locked goes on for so long, and 2 s on other proxies.
const WRITE_INTERVAL: Duration = Duration::from_millis(500);
/// Refusals that wait for what they follow, remembered so that each counts once; of more, the oldest count again.
const WAITED_MAX: NonZeroUsize = NonZeroUsize::new(16 * 1024).expect("not zero");
/// Pairs of host and rule whose refusals are counted between two writes.
const COUNTS_MAX: usize = 16 * 1024;
/// Flags and reports between two writes, each at most some 5 KiB.
const WAITING_MAX: usize = 4096;
/// Flags and reports of one host a minute, of each sort: hosts can make as many as they like.
const OF_A_HOST_MAX: u32 = 60;
const OF_A_HOST_WITHIN: Duration = Duration::from_mins(1);
/// Hosts whose flags and reports are counted.
const HOSTS_MAX: usize = 16 * 1024;
/// A longer report is kept by its operation alone.
const REPORT_BYTES_MAX: usize = 4096;

/// The rules that are trespass, as the table holds them.
pub const TRESPASS: [&str; 2] = ["foreign_map", "foreign_player"];

/// What locks hosts.
#[derive(Clone, Copy, Debug, Default)]
pub struct Locks {
    /// Absent: forgery locks nobody.
    pub forgery: Option<LockRule>,
    /// Absent: trespass locks nobody.
    pub trespass: Option<LockRule>,
}

/// How many refusals lock a host.
#[derive(Clone, Copy, Debug)]
pub struct LockRule {
    /// At least 1.
    pub threshold: u32,
    /// In how long.
    pub window: Duration,
}

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Stored, and suspicious.
    Flagged,
    /// Not stored: no honest agent sends it.
    Refused,
    /// The host's word, about others.
    Reported,
}

impl Kind {
    /// As the table holds it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Flagged => "flagged",
            Self::Refused => "refused",
            Self::Reported => "reported by host",
        }
    }
}

/// One row of `security_validations`, in the making.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// Against whom; of a report, by whom.
    pub host_id: Uuid,
    /// Flagged, refused or reported.
    pub kind: Kind,
    /// By which rule: of what was refused the code's label.
    pub rule: &'static str,
    /// The operation, or the first of several.
    pub operation_id: Option<Uuid>,
    /// What it was to write, if that was a path.
    pub path: Option<String>,
    /// The evidence.
    pub details: Value,
    /// How many operations.
    pub operations: u64,
}

/// Collects what is found and writes it.
#[derive(Debug)]
pub struct Verdicts {
    locks: Locks,
    // Std mutexes: held for a message's operations, never across an await.
    movement: Mutex<Movement>,
    waiting: Mutex<Waiting>,
    /// What was counted while it waited for what it follows.
    waited: Mutex<LruCache<(Uuid, Position), ()>>,
}

#[derive(Debug, Default)]
struct Waiting {
    refused: HashMap<(Uuid, &'static str), Verdict>,
    others: VecDeque<Verdict>,
    quotas: HashMap<(Uuid, Kind), Quota>,
    dropped: u64,
}

#[derive(Debug)]
struct Quota {
    since: Instant,
    taken: u32,
}

/// The rule that a refusal breaks, where no honest agent causes it: agents check all of this before they send.
///
/// Left out is what an honest host may run into: state of a shape that a schema does not take, which agents do not have;
/// types, sizes and policies of another version; conflicts; and what the database does not take.
fn forgery(code: Code) -> Option<&'static str> {
    match code {
        Code::ImpossibleValue
        // By validation: another host's own paths.
        | Code::NotLeaseHolder
        | Code::BadOperation
        | Code::BadRequest
        | Code::BadPath
        | Code::BadMap
        | Code::InvalidJson
        | Code::TooDeep
        | Code::TooManyNodes
        | Code::DuplicateKey
        | Code::BadText
        | Code::NumberOutOfRange => Some(code.label()),
        _ => None,
    }
}

impl Verdicts {
    /// Nothing has been found yet.
    pub fn new(pace: Pace, locks: Locks) -> Self {
        Self {
            locks,
            movement: Mutex::new(Movement::new(pace)),
            waiting: Mutex::default(),
            waited: Mutex::new(LruCache::new(WAITED_MAX)),
        }
    }

    /// Looks at a message that was decided, by when it was received. Never waits.
    pub fn judge(&self, received: Instant, valid: &Valid, committed: &Committed) {
        let mut found: Vec<Verdict> = valid
            .refused
            .iter()
            .filter(|refused| self.is_to_be_judged(valid.host_id, refused, committed))
            .filter_map(|refused| {
                let path = Some(refused.path.clone()).filter(|path| !path.is_empty());
                let operation_id = Some(refused.operation_id).filter(|id| !id.is_nil());
                refusal(valid.host_id, &refused.problem, operation_id, path)
            })
            .collect();
        found.extend(trespasses(valid, committed));
        found.extend(self.moves(received, valid, committed));
        found.extend(reports(valid, committed));
        if !found.is_empty() {
            self.add(received, found);
        }
    }

    /// What was refused counts when it is settled. What has to wait for what it names as before it, which may never come, counts
    /// when it is first seen.
    fn is_to_be_judged(&self, host_id: Uuid, refused: &Refused, committed: &Committed) -> bool {
        let is_settled = committed.settled_now.contains(&refused.index);
        let (Some(position), false) = (refused.position, refused.follows.is_empty()) else {
            return is_settled;
        };
        let told = committed.outcomes.iter().find(|(index, _)| *index == refused.index);
        let waits = told.is_some_and(|(_, outcome)| *outcome == Outcome::NotYet);
        let mut waited = self.waited.lock().unwrap_or_else(PoisonError::into_inner);
        let was_counted = waited.contains(&(host_id, position));
        if waits {
            waited.put((host_id, position), ());
        }
        (is_settled || waits) && !was_counted
    }

    /// Looks at a message that was refused as a whole.
    pub fn judge_message(&self, received: Instant, host_id: Uuid, problem: &Problem) {
        if let Some(verdict) = refusal(host_id, problem, None, None) {
            self.add(received, vec![verdict]);
        }
    }

    fn moves(&self, received: Instant, valid: &Valid, committed: &Committed) -> Vec<Verdict> {
        if valid.ops.iter().all(|op| op.step.is_none()) {
            return Vec::new();
        }
        // Nobody is where an operation says that was not stored.
        let left_out: HashSet<u32> = committed
            .outcomes
            .iter()
            .filter(|(_, outcome)| !matches!(outcome, Outcome::Applied { .. } | Outcome::Superseded))
            .map(|(index, _)| *index)
            .collect();
        let mut movement = self.movement.lock().unwrap_or_else(PoisonError::into_inner);
        let stored = valid.ops.iter().filter(|op| !left_out.contains(&op.index));
        let found = stored.filter_map(|op| {
            let (character, step) = op.step?;
            let moved = Moved {
                host_id: valid.host_id,
                character,
                map: &op.map,
                version: op.position,
                step,
            };
            let finding = movement
                .score(&moved, received)
                .filter(|finding| !finding.is_repeated)?;
            Some(Verdict {
                rule: finding.rule.as_str(),
                details: finding.details(),
                ..of_operation(valid.host_id, Kind::Flagged, op)
            })
        });
        found.collect()
    }

    fn add(&self, received: Instant, found: Vec<Verdict>) {
        let mut waiting = self.waiting();
        for verdict in found {
            waiting.add(verdict, received);
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes what is found, until the other side of `ended` is dropped; then once more.
    pub async fn run(&self, store: &Store, opener: &Opener, mut ended: oneshot::Receiver<()>) {
        let mut ticks = interval(WRITE_INTERVAL);
        loop {
            tokio::select! {
                _ = ticks.tick() => self.write(store, opener).await,
                // Nothing is ever sent: its sender is dropped.
                _ = &mut ended => break,
            }
        }
        self.write(store, opener).await;
    }

    /// Writes what has been found since the last time. What the database does not take waits for the next time.
    async fn write(&self, store: &Store, opener: &Opener) {
        let (found, dropped) = self.waiting().take(Instant::now());
        if dropped > 0 {
            tracing::error!(
                dropped,
                "verdicts are lost, and refusals among them not counted: more were found than memory takes"
            );
        }
        if found.is_empty() {
            return;
        }
        if let Err(problem) = store.add_verdicts(&found).await {
            tracing::warn!(%problem, verdicts = found.len(), "verdicts cannot be written now; it is tried again");
            let mut waiting = self.waiting();
            for verdict in found {
                waiting.put_back(verdict);
            }
            return;
        }
        let of = |is_trespass: bool| {
            let refused = found.iter().filter(|verdict| verdict.kind == Kind::Refused);
            let mut hosts: Vec<Uuid> = refused
                .filter(|verdict| TRESPASS.contains(&verdict.rule) == is_trespass)
                .map(|verdict| verdict.host_id)
                .collect();
            hosts.sort_unstable();
            hosts.dedup();
            hosts
        };
        for (is_trespass, rule) in [(false, self.locks.forgery), (true, self.locks.trespass)] {
            let Some(rule) = rule else { continue };
            lock(store, opener, &of(is_trespass), is_trespass, rule).await;
        }
    }
}

async fn lock(store: &Store, opener: &Opener, hosts: &[Uuid], is_trespass: bool, rule: LockRule) {
    for &host_id in hosts {
        match store.lock_for_refusals(host_id, is_trespass, rule).await {
            Ok(None) => {}
            Ok(Some(operations)) => {
                opener.forget(host_id);
                tracing::error!(
                    %host_id, operations, is_trespass, within = ?rule.window,
                    "a host is locked for what it tried to write: see `p2p-sync-proxy hosts verdicts`; `hosts unlock` readmits it"
                );
            }
            // They are in the table: the next refusal counts them again.
            Err(problem) => tracing::warn!(%problem, %host_id, "a host's refusals cannot be counted now"),
        }
    }
}

impl Waiting {
    /// Refusals are summed up, flags and reports taken one by one up to the host's share.
    fn add(&mut self, verdict: Verdict, now: Instant) {
        if verdict.kind == Kind::Refused || self.has_share(&verdict, now) {
            self.put_back(verdict);
        }
    }

    fn put_back(&mut self, verdict: Verdict) {
        if verdict.kind != Kind::Refused {
            if self.others.len() < WAITING_MAX {
                self.others.push_back(verdict);
            } else {
                self.dropped += 1;
            }
            return;
        }
        let key = (verdict.host_id, verdict.rule);
        if let Some(before) = self.refused.get_mut(&key) {
            before.operations += verdict.operations;
        } else if self.refused.len() < COUNTS_MAX {
            self.refused.insert(key, verdict);
        } else {
            self.dropped += verdict.operations;
        }
    }

    fn has_share(&mut self, verdict: &Verdict, now: Instant) -> bool {
        let key = (verdict.host_id, verdict.kind);
        if self.quotas.len() >= HOSTS_MAX && !self.quotas.contains_key(&key) {
            self.dropped += 1;
            return false;
        }
        let quota = self.quotas.entry(key).or_insert(Quota { since: now, taken: 0 });
        quota.taken = quota.taken.saturating_add(1);
        quota.taken <= OF_A_HOST_MAX
    }

    fn take(&mut self, now: Instant) -> (Vec<Verdict>, u64) {
        self.quotas.retain(|(host_id, kind), quota| {
            let is_over = now.saturating_duration_since(quota.since) >= OF_A_HOST_WITHIN;
            if is_over && quota.taken > OF_A_HOST_MAX {
                let (verdict, left_out) = (kind.as_str(), quota.taken - OF_A_HOST_MAX);
                tracing::warn!(%host_id, verdict, left_out, "a host had more of these within a minute than are kept");
            }
            !is_over
        });
        let refused = self.refused.drain().map(|(_, verdict)| verdict);
        let found = refused.chain(self.others.drain(..)).collect();
        (found, std::mem::take(&mut self.dropped))
    }
}

fn refusal(host_id: Uuid, problem: &Problem, operation_id: Option<Uuid>, path: Option<String>) -> Option<Verdict> {
    let rule = forgery(problem.code)?;
    Some(Verdict {
        host_id,
        kind: Kind::Refused,
        rule,
        operation_id,
        path,
        details: json!({"code": problem.code as i32, "reason": without_nul(&problem.sentence)}),
        operations: 1,
    })
}

/// What was refused where it would have been stored, for it never was the host's to write.
fn trespasses<'a>(valid: &'a Valid, committed: &'a Committed) -> impl Iterator<Item = Verdict> + 'a {
    let refused = committed.outcomes.iter().filter_map(|(index, outcome)| {
        let Outcome::Rejected(problem) = outcome else {
            return None;
        };
        let rule = match problem.code {
            Code::NotLeaseHolder => TRESPASS[0],
            Code::PlayerNotHere => TRESPASS[1],
            _ => return None,
        };
        let is_new = committed.settled_now.contains(index);
        is_new.then_some((index, rule, problem))
    });
    refused.filter_map(|(index, rule, problem)| {
        // Not what validation has refused, which is forgery.
        let op = valid.ops.iter().find(|op| op.index == *index)?;
        // Whose a character is was only ever said by whoever entered it first: this host may be the one that is right.
        if problem.code == Code::PlayerNotHere && is_coming(op) {
            return None;
        }
        Some(Verdict {
            rule,
            details: json!({"code": problem.code as i32, "reason": problem.sentence}),
            ..of_operation(valid.host_id, Kind::Refused, op)
        })
    })
}

fn is_coming(op: &ValidOp) -> bool {
    let event = || {
        let payload: Value = serde_json::from_str(op.payload.as_deref()?).ok()?;
        Some(payload.get("event")? == "enter")
    };
    op.data_type == SyncDataType::PlayerPresence && event().unwrap_or_default()
}

/// What the host says it has validated; once, for what is applied again was reported before.
fn reports<'a>(valid: &'a Valid, committed: &'a Committed) -> impl Iterator<Item = Verdict> + 'a {
    let is_new = |op: &ValidOp| {
        committed
            .outcomes
            .iter()
            .any(|(index, outcome)| *index == op.index && matches!(outcome, Outcome::Applied { stream_sequence: 1.. }))
    };
    let reported = valid
        .ops
        .iter()
        .filter(|op| op.data_type == SyncDataType::SecurityValidation)
        .filter(move |op| is_new(op));
    reported.filter_map(|op| {
        let payload = op.payload.as_deref()?;
        let details = if payload.len() <= REPORT_BYTES_MAX {
            serde_json::from_str(payload).unwrap_or_default()
        } else {
            json!({"bytes": payload.len()})
        };
        Some(Verdict {
            rule: "report",
            details: json!({"report": details}),
            ..of_operation(valid.host_id, Kind::Reported, op)
        })
    })
}

fn of_operation(host_id: Uuid, kind: Kind, op: &ValidOp) -> Verdict {
    Verdict {
        host_id,
        kind,
        rule: "",
        operation_id: Some(op.operation_id),
        path: Some(op.path.as_str().to_owned()),
        details: Value::Null,
        operations: 1,
    }
}

#[cfg(test)]
mod tests;
