//! Random schedules against a simple model of the hub's state: writers with outboxes, two lanes, a network that delays,
//! repeats, reorders and loses, hosts that start anew, maps and players that move, edits by the operator.
//!
//! A schedule is drawn from a seed and played on a real store and on the model at once; each answer is compared, and when all
//! is settled the tables. Many schedules share a database, each with names of its own, several at once. One that fails is
//! cut down to the steps that it needs.

mod compare;
mod host;
mod hub;
mod operator;
mod play;
mod rights;
mod schedule;
mod world;

use std::{
    collections::BTreeMap,
    env, fmt,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use futures::{StreamExt as _, stream};
use p2p_sync_proxy::{
    operation::Span,
    store::{Connection, Hnsw, Leases, Store, StoreConfig},
};
use tokio_postgres::Client;

use self::schedule::{Played, STEPS, play};
use crate::services::{Database, database};

/// Schedules that are played at once: more than the processors of most machines, so that they meet in the database.
const AT_ONCE: usize = 8;
/// Runs that shortening a failing schedule may take.
const SHORTENING_RUNS_MAX: u32 = 300;
/// Replays a seed; with [`SEEDS_VARIABLE`] the first of so many. Drawn where it is not set.
const SEED_VARIABLE: &str = "P2P_SYNC_MODEL_SEED";
/// How many seeds are played.
const SEEDS_VARIABLE: &str = "P2P_SYNC_MODEL_SEEDS";

/// Which seeds are played.
#[derive(Clone, Copy, Debug)]
pub struct Seeds {
    first: u64,
    count: u64,
}

impl Seeds {
    /// As the environment says; else so many, from one that is drawn.
    pub fn from_environment(count: u64) -> Self {
        let variable = |name| {
            let value = env::var(name).ok()?;
            Some(
                value
                    .parse()
                    .unwrap_or_else(|_| panic!("{name} is {value:?}: give a number")),
            )
        };
        match (variable(SEED_VARIABLE), variable(SEEDS_VARIABLE)) {
            (Some(first), count) => Self {
                first,
                count: count.unwrap_or(1),
            },
            (None, given) => Self {
                first: u64::from(fastrand::u32(..)),
                count: given.unwrap_or(count),
            },
        }
    }
}

impl fmt::Display for Seeds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} seeds from {}", self.count, self.first)
    }
}

/// What all schedules came to.
#[derive(Debug)]
pub struct Report {
    seeds: Seeds,
    deliveries: u64,
    took: Duration,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            seeds,
            deliveries,
            took,
        } = self;
        write!(f, "{seeds}, {deliveries} messages, {:.1} s", took.as_secs_f64())
    }
}

/// A schedule that did not go as the model says.
#[derive(Debug)]
pub struct Failure {
    seed: u64,
    difference: String,
    trace: Vec<String>,
    steps: usize,
    passed: u64,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            seed,
            difference,
            trace,
            steps,
            passed,
        } = self;
        writeln!(
            f,
            "seed {seed}, after {passed} others; cut to {steps} of {STEPS} steps:"
        )?;
        for line in trace {
            writeln!(f, "  {line}")?;
        }
        writeln!(f, "{difference}")?;
        write!(f, "replay it by {SEED_VARIABLE}={seed}")
    }
}

/// The store that all schedules share.
struct Ground {
    store: Store,
    sql: Client,
    runs: AtomicU32,
    _database: Database,
}

/// Plays all seeds, or up to the first that fails.
pub async fn run(seeds: Seeds) -> Result<Report, Failure> {
    let began = Instant::now();
    let ground = Arc::new(Ground::new().await);
    let mut played = stream::iter(seeds.first..seeds.first + seeds.count)
        .map(|seed| {
            let ground = ground.clone();
            tokio::spawn(async move { (seed, ground.play(seed, &(0..STEPS).collect::<Vec<u64>>()).await) })
        })
        .buffer_unordered(AT_ONCE);
    let (mut deliveries, mut passed, mut spans) = (0, 0, Vec::new());
    while let Some(one) = played.next().await {
        let (seed, one) = one.expect("a schedule does not panic");
        deliveries += one.play.deliveries;
        if one.outcome.is_err() {
            drop(played);
            return Err(ground.shorten(seed, one, passed).await);
        }
        passed += 1;
        spans.extend(one.play.shared_spans);
    }
    covers(&mut spans);
    ground.no_deadlocks().await;
    let took = began.elapsed();
    Ok(Report {
        seeds,
        deliveries,
        took,
    })
}

impl Ground {
    async fn new() -> Self {
        let database = database().await;
        let sql = database.client().await;
        // Nothing is killed here: what the disk does is left out.
        let name = sql
            .query_one("SELECT current_database()", &[])
            .await
            .expect("serves")
            .get::<_, String>(0);
        let quick = format!("ALTER DATABASE {name} SET synchronous_commit = off");
        sql.batch_execute(&quick).await.expect("the database is ours");
        let store = Store::connect(&config(database.url()))
            .await
            .expect("an empty database is taken");
        Self {
            store,
            sql,
            runs: AtomicU32::new(0),
            _database: database,
        }
    }

    async fn play(&self, seed: u64, steps: &[u64]) -> Played {
        let run = self.runs.fetch_add(1, Ordering::Relaxed) + 1;
        play(&self.store, run, seed, steps).await
    }

    /// Leaves out what the failure does not need: first what came after it, then ever smaller pieces.
    async fn shorten(&self, seed: u64, failed: Played, passed: u64) -> Failure {
        let mut steps: Vec<u64> = (0..=failed.at.min(STEPS - 1)).collect();
        let mut shortest = failed;
        let mut runs = 0;
        let mut piece = steps.len() / 2;
        while piece > 0 && runs < SHORTENING_RUNS_MAX {
            let mut from = 0;
            while from < steps.len() && runs < SHORTENING_RUNS_MAX {
                let upto = (from + piece).min(steps.len());
                let without: Vec<u64> = [&steps[..from], &steps[upto..]].concat();
                runs += 1;
                let played = self.play(seed, &without).await;
                if played.outcome.is_err() {
                    (steps, shortest) = (without, played);
                } else {
                    from = upto;
                }
            }
            piece /= 2;
        }
        Failure {
            seed,
            difference: shortest.outcome.err().unwrap_or_default(),
            trace: shortest.play.trace,
            steps: steps.len(),
            passed,
        }
    }

    /// Messages wait for one another, and never in a circle.
    async fn no_deadlocks(&self) {
        let sql = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()";
        let deadlocks: i64 = self.sql.query_one(sql, &[]).await.expect("serves").get(0);
        assert_eq!(deadlocks, 0, "messages, edits or leases waited in a circle");
    }
}

/// Of the streams that all schedules write, each position up to the last is one message's or one edit's, and what messages
/// took does not overlap.
fn covers(spans: &mut [Span]) {
    spans.sort_by(|one, other| (&one.stream, one.after).cmp(&(&other.stream, other.after)));
    let mut heads: BTreeMap<&str, u64> = BTreeMap::new();
    for span in &*spans {
        let head = heads.insert(&span.stream, span.upto).unwrap_or(0);
        assert!(head <= span.after, "{span:?} overlaps with one up to {head}");
    }
}

fn config(url: &str) -> StoreConfig {
    StoreConfig {
        connection: Connection::Url(url.into()),
        critical_connections: AT_ONCE,
        bulk_connections: AT_ONCE,
        statement_timeout: Duration::from_mins(1),
        bulk_statement_timeout: Duration::from_mins(1),
        embedding_dimensions: 8,
        hnsw: Hnsw::default(),
        log_retention_days: 30,
        tombstone_retention_days: 30,
        leases: Leases {
            required: true,
            // They end when a schedule says so.
            length: Duration::from_hours(24),
        },
    }
}
