//! What a load run came to, for people and as JSON, and whether the bars hold.

use std::{
    collections::{HashMap, HashSet},
    fmt, io,
    path::Path,
};

use p2p_sync_agent::OperationState;
use p2p_sync_proto::{Policies, Position, policy::Keep};
use serde::Serialize;
use uuid::Uuid;

use super::{Options, feed::Fed, ledger::Life};
use crate::{
    recording::Happening,
    services::Database,
    times::{Times, histogram, microseconds, milliseconds, write_table},
};

/// The bar of a lane's queue age at p99.
const QUEUE_AGE_MS_MAX: f64 = 1000.0;

/// What a run came to.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    speed: f64,
    rounds: u32,
    calls_per_second: u32,
    seconds: f64,
    applied_per_second: f64,
    /// From submit to APPLIED, operations of the recording that travel in the critical lane.
    queue_age_critical: Times,
    /// As above, in the bulk lane.
    queue_age_bulk: Times,
    /// From when a waiting call was due to its answer.
    waiting_call: Times,
    /// How late the recording's thread was at worst.
    replay_late_ms: f64,
    critical_timeouts: usize,
    accepted: usize,
    applied: usize,
    /// Not taken by the agent.
    refused: usize,
    /// Accepted and not applied, or applied and not in Postgres.
    lost: usize,
    /// Rows of the log beyond one an operation.
    duplicated: usize,
}

/// What Postgres holds.
pub(super) struct Held {
    logged: HashSet<Uuid>,
    log_rows: usize,
    /// Version of the state of each path; tenure is 0 throughout.
    states: HashMap<String, Position>,
}

pub(super) async fn read(database: &Database) -> Held {
    let client = database.client().await;
    let logged = client
        .query("SELECT operation_id FROM p2p_sync.operations", &[])
        .await
        .expect("the hub's schema");
    let states = client
        .query("SELECT path, incarnation, sequence FROM p2p_sync.states", &[])
        .await
        .expect("the hub's schema");
    let number = |number: i64| u64::try_from(number).expect("never negative");
    Held {
        log_rows: logged.len(),
        logged: logged.iter().map(|row| row.get(0)).collect(),
        states: states
            .iter()
            .map(|row| {
                (
                    row.get(0),
                    Position {
                        incarnation: number(row.get(1)),
                        sequence: number(row.get(2)),
                    },
                )
            })
            .collect(),
    }
}

impl Held {
    /// Whether an applied operation is there: an `every` one in the log, a `latest` one by its path's version.
    fn has(&self, id: Uuid, position: Position, happening: &Happening, policies: &Policies) -> bool {
        let newest = happening.path().and_then(|path| self.states.get(&path));
        let is_logged = policies.of(happening.data_type).keep == Keep::Latest || self.logged.contains(&id);
        is_logged && newest.is_some_and(|newest| *newest >= position)
    }
}

impl Report {
    pub(super) fn new(options: &Options, fed: &Fed<'_>, lives: &HashMap<Uuid, Life>, held: &Held) -> Self {
        let policies = Policies::builtin();
        let (mut critical, mut bulk) = (histogram(), histogram());
        let (mut accepted, mut applied, mut lost, mut ended) = (0, 0, 0, fed.began);
        for (id, life) in lives {
            let Some(submitted) = life.submitted else { continue };
            accepted += 1;
            let happening = &fed.happenings[submitted.happening];
            let Some((at, OperationState::Applied, position)) = life.settled else {
                lost += 1;
                continue;
            };
            applied += 1;
            ended = ended.max(at);
            lost += usize::from(!held.has(*id, position, happening, &policies));
            let lane = if policies.of(happening.data_type).critical {
                &mut critical
            } else {
                &mut bulk
            };
            if !submitted.waited {
                lane.saturating_record(microseconds(at - submitted.at));
            }
        }
        let seconds = (ended - fed.began).as_secs_f64();
        #[allow(clippy::cast_precision_loss)]
        let applied_per_second = applied as f64 / seconds;
        Self {
            speed: options.speed,
            rounds: options.rounds,
            calls_per_second: options.calls,
            seconds,
            applied_per_second,
            queue_age_critical: Times::of(&critical),
            queue_age_bulk: Times::of(&bulk),
            waiting_call: Times::of(&fed.calls.latency),
            replay_late_ms: milliseconds(microseconds(fed.late)),
            critical_timeouts: fed.calls.timeouts,
            accepted,
            applied,
            refused: fed.refused + fed.calls.refused,
            lost,
            duplicated: held.log_rows - held.logged.len(),
        }
    }

    /// The bars that do not hold, in words.
    pub(super) fn failures(&self) -> Vec<String> {
        let mut failures = Vec::new();
        for (lane, age) in [("critical", &self.queue_age_critical), ("bulk", &self.queue_age_bulk)] {
            if age.p99_ms >= QUEUE_AGE_MS_MAX {
                failures.push(format!("the {lane} lane's queue age is {:.0} ms at p99", age.p99_ms));
            }
        }
        for (count, what) in [
            (self.critical_timeouts, "waiting calls had no answer in time"),
            (self.refused, "operations were refused"),
            (self.lost, "accepted operations are not in Postgres"),
            (self.duplicated, "rows of the log repeat an operation"),
        ] {
            if count > 0 {
                failures.push(format!("{count} {what}"));
            }
        }
        failures
    }

    pub(super) fn write(&self, file: &Path) -> io::Result<()> {
        let json = serde_json::to_string_pretty(self).expect("plain data");
        std::fs::write(file, json + "\n")
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "load: speed {} x {} rounds, {} waiting calls/s: {} applied in {:.1} s, {:.0}/s; the replay was late by {:.0} ms at most",
            self.speed,
            self.rounds,
            self.calls_per_second,
            self.applied,
            self.seconds,
            self.applied_per_second,
            self.replay_late_ms
        )?;
        let rows = [
            ("queue age, critical", &self.queue_age_critical),
            ("queue age, bulk", &self.queue_age_bulk),
            ("waiting call", &self.waiting_call),
        ];
        write_table(f, &rows)?;
        write!(
            f,
            "critical timeouts {}, accepted {}, applied {}, refused {}, lost {}, duplicated {}",
            self.critical_timeouts, self.accepted, self.applied, self.refused, self.lost, self.duplicated
        )
    }
}
