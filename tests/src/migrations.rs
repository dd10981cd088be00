//! The migrations run: maps that change hands under load, by plan and because their hosts are killed, through real agents, two
//! proxies, Postgres and Redis. No map has two writers, nothing that was acknowledged is lost, and no map is without a writer for
//! longer than it has to be.

mod machine;

use std::{
    collections::HashSet,
    fmt,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use clap::Parser;
use hdrhistogram::Histogram;
use p2p_sync_proxy::{
    hosts::{Settings, score::Weights},
    store::{Connection, HandoverOrder, Hnsw, Leases, Store, StoreConfig},
};
use serde::Serialize;
use tokio_postgres::Client;
use uuid::Uuid;

use self::machine::Machine;
use crate::{
    load::redis_settings,
    services::{self, Database},
    stack::{Hub, HubDatabase},
    times::{Times, histogram, microseconds, write_table},
};

/// Moves maps under load and kills their hosts, and measures how long maps are without a writer.
///
/// Fails when a map has two writers, an acknowledged operation is lost, or a map is without a writer for too long: by plan for
/// 250 ms at p99, and where a host is killed for a second after the end of its lease.
#[derive(Clone, Debug, Parser)]
#[command(name = "migrations", version)]
pub struct Options {
    /// How often a map changes hands: as `P2P_SYNC_MIGRATIONS` says unless it is given; 1000 is the full run.
    #[arg(long, default_value_t = migrations())]
    pub migrations: u32,
    /// Of a hundred, so many because the map's host is killed.
    #[arg(long, default_value_t = 10)]
    pub kills_percent: u8,
    /// Machines.
    #[arg(long, default_value_t = 4)]
    pub hosts: usize,
    /// Maps.
    #[arg(long, default_value_t = 4)]
    pub maps: usize,
    /// Of a lease.
    #[arg(long, default_value_t = 2)]
    pub lease_seconds: u64,
    /// Between two writes of a map.
    #[arg(long, default_value_t = 20)]
    pub write_every_ms: u64,
    /// Where the figures are written as JSON.
    #[arg(long, default_value = "target/migrations.json")]
    pub json: PathBuf,
}

/// Changes of hands in CI.
const MIGRATIONS: u32 = 60;

fn migrations() -> u32 {
    let told = std::env::var("P2P_SYNC_MIGRATIONS").ok();
    told.and_then(|number| number.parse().ok()).unwrap_or(MIGRATIONS)
}

/// Bars, milliseconds.
const PLANNED_P99_MS: f64 = 250.0;
const AFTER_LEASE_MS: f64 = 1000.0;
/// For a map to change hands, whatever happens meanwhile.
const PATIENCE: Duration = Duration::from_mins(1);
const LOOK: Duration = Duration::from_millis(20);

/// What the run came to.
#[derive(Debug, Serialize)]
pub struct Report {
    migrations: u32,
    kills: u32,
    lease_seconds: u64,
    acknowledged: usize,
    logged: i64,
    limbo: i64,
    planned: Times,
    lost_hosts: Times,
    /// Hand-overs that the holder did not complete in time, though it ran.
    late: u64,
    acknowledged_lost: usize,
    written_by_two: i64,
    foreign: i64,
}

impl Report {
    /// What must never be, however slow the machine is.
    #[must_use]
    pub fn wrong(&self) -> Vec<&'static str> {
        broken(&[
            (self.acknowledged == 0, "nothing was acknowledged"),
            (self.acknowledged_lost > 0, "acknowledged operations are lost"),
            (self.written_by_two > 0, "a map was written by two hosts"),
            (self.foreign > 0, "a tenure was written by another host than its own"),
        ])
    }

    /// What took too long.
    fn slow(&self) -> Vec<&'static str> {
        #[expect(clippy::cast_precision_loss, reason = "seconds are few")]
        let lost_max = self.lease_seconds as f64 * 1000.0 + AFTER_LEASE_MS;
        broken(&[
            (self.planned.p99_ms > PLANNED_P99_MS, "planned hand-overs take too long"),
            (self.lost_hosts.p99_ms > lost_max, "maps of lost hosts wait too long"),
        ])
    }
}

fn broken(bars: &[(bool, &'static str)]) -> Vec<&'static str> {
    let broken = bars.iter().filter(|(is_broken, _)| *is_broken);
    broken.map(|(_, what)| *what).collect()
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "migrations: {} and {} kills with leases of {} s; {} acknowledged operations, {} logged, {} in limbo",
            self.migrations, self.kills, self.lease_seconds, self.acknowledged, self.logged, self.limbo
        )?;
        let rows = [
            ("no writer, planned", &self.planned),
            ("no writer, host killed", &self.lost_hosts),
        ];
        write_table(f, &rows)?;
        write!(
            f,
            "acknowledged and lost: {}; written by two: {}; foreign: {}; too late: {}",
            self.acknowledged_lost, self.written_by_two, self.foreign, self.late
        )
    }
}

/// Runs it; success only if every bar holds.
pub fn run(options: &Options) -> ExitCode {
    let program = std::env::current_exe().expect("a running program has a path");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime can be made");
    let report = runtime.block_on(measure(options, &program));
    println!("{report}");
    let text = serde_json::to_string_pretty(&report).expect("plain data");
    if let Err(error) = std::fs::write(&options.json, text) {
        eprintln!("migrations: {} cannot be written: {error}", options.json.display());
        return ExitCode::FAILURE;
    }
    let failures = [report.wrong(), report.slow()].concat();
    for failure in &failures {
        println!("migrations: FAILED: {failure}");
    }
    if failures.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Moves and kills; `program` is a binary that is all programs of the system.
pub async fn measure(options: &Options, program: &Path) -> Report {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let database = services::database().await;
    let (hubs, machines, names) = tokio::task::block_in_place(|| set_up(options, program, folder.path(), &database));
    let settings = settings(options);
    let store = Store::connect(&store_config(database.url(), &settings))
        .await
        .expect("the hub's own database");
    let run = Arc::new(Run {
        left: AtomicU32::new(options.migrations),
        kills: AtomicU32::new(0),
        kill: tokio::sync::Mutex::new(()),
        kills_percent: options.kills_percent,
        settings,
        store,
        machines,
        sql: database.client().await,
    });
    let moving: Vec<_> = names
        .iter()
        .map(|map| tokio::spawn(keep_moving(run.clone(), map.clone())))
        .collect();
    for moved in moving {
        moved.await.expect("every map changed hands each time");
    }
    // What the last ones made settles.
    let acknowledged = tokio::task::block_in_place(|| {
        let mut all = Vec::new();
        for machine in &run.machines {
            all.extend(machine.end());
        }
        all
    });
    drop(hubs);
    report(options, &run, &acknowledged).await
}

type Machines = Vec<Machine>;

fn set_up(options: &Options, program: &Path, folder: &Path, database: &Database) -> ([Hub; 2], Machines, Vec<String>) {
    let server = HubDatabase::Server(database.url().to_owned());
    let mut conf = redis_settings(&services::shared_redis_url());
    conf.extend([
        ("leases", "required".to_owned()),
        ("lease_seconds", options.lease_seconds.to_string()),
        // Nothing moves but by this run, and what it breaks.
        ("migration_margin", "100".to_owned()),
        ("catch_up_seconds", "5".to_owned()),
    ]);
    let mut hubs = ["first", "second"].map(|name| Hub::new(program, &folder.join(name), &server, &conf));
    hubs[0].share_keyring(&hubs[1]);
    let credentials: Vec<String> = (0..options.hosts).map(|_| hubs[0].add_host(1)).collect();
    let endpoints = hubs.each_mut().map(Hub::start);
    let names: Vec<String> = (0..options.maps).map(|number| format!("map{number}")).collect();
    for map in &names {
        hubs[0].command(&["maps", "rule", map, "--automatic", "--backups", "2"]);
    }
    let machine = |(number, credential): (usize, &String)| {
        let endpoint = &endpoints[number % 2];
        let folder = folder.join(format!("host{number}"));
        let arguments = vec![options.write_every_ms.to_string(), names.join(",")];
        Machine::new(program, &folder, endpoint, credential, arguments)
    };
    let machines: Machines = credentials.iter().enumerate().map(machine).collect();
    for machine in &machines {
        machine.start();
    }
    (hubs, machines, names)
}

fn settings(options: &Options) -> Settings {
    Settings {
        weights: Weights::default(),
        maps_max: 100,
        migration_margin: 100.0,
        migration_min: Duration::from_secs(1),
        catch_up: Duration::from_secs(5),
        handover: Duration::from_secs(10),
        lease: Duration::from_secs(options.lease_seconds),
    }
}

fn store_config(url: &str, settings: &Settings) -> StoreConfig {
    StoreConfig {
        connection: Connection::Url(url.into()),
        critical_connections: 1,
        bulk_connections: 1,
        statement_timeout: Duration::from_secs(10),
        bulk_statement_timeout: Duration::from_secs(30),
        embedding_dimensions: 1536,
        hnsw: Hnsw::default(),
        log_retention_days: 30,
        tombstone_retention_days: 30,
        leases: Leases {
            required: true,
            length: settings.lease,
        },
    }
}

struct Run {
    /// Changes of hands that are to come.
    left: AtomicU32,
    kills: AtomicU32,
    /// One machine is down at a time.
    kill: tokio::sync::Mutex<()>,
    kills_percent: u8,
    settings: Settings,
    store: Store,
    machines: Machines,
    sql: Client,
}

/// Who holds a map that is held.
#[derive(Clone, Copy)]
struct Held {
    host_id: Uuid,
    tenure: i64,
    is_on_its_way: bool,
}

impl Run {
    async fn held(&self, map: &str) -> Option<Held> {
        const HELD: &str = "SELECT a.host_id, a.tenure, a.successor IS NOT NULL FROM p2p_sync.host_assignments AS a \
            WHERE a.map = $1 AND a.host_id IS NOT NULL AND a.expires_at > clock_timestamp() AND EXISTS ( \
                SELECT FROM p2p_sync.operations AS o WHERE o.stream = a.map AND o.keeps_every \
                    AND o.stream_sequence > a.stream_head AND o.tenure = a.tenure)";
        let row = self.sql.query_opt(HELD, &[&map]).await.expect("valid SQL")?;
        Some(Held {
            host_id: row.get(0),
            tenure: row.get(1),
            is_on_its_way: row.get(2),
        })
    }

    /// Waits until a map is held, and was written, under a later tenure.
    async fn held_after(&self, map: &str, tenure: i64) -> Held {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(held) = self.held(map).await.filter(|held| held.tenure > tenure) {
                return held;
            }
            assert!(Instant::now() < until, "{map} does not go on after tenure {tenure}");
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Hands a map over to another machine; begins again where that is called off.
    async fn hand_over(&self, map: &str, from: Held) {
        let until = Instant::now() + PATIENCE;
        loop {
            let held = self.held(map).await;
            if held.is_some_and(|held| held.tenure > from.tenure) {
                return;
            }
            if held.is_some_and(|held| !held.is_on_its_way) {
                let others: Vec<&Machine> = self
                    .machines
                    .iter()
                    .filter(|machine| machine.host_id != from.host_id && machine.runs())
                    .collect();
                if let Some(to) = fastrand::choice(&others).map(|machine| machine.host_id) {
                    let (by, score) = (None, 0.0);
                    // What is refused is tried again: it may be on its way by another's word, or not be held any more.
                    let _begun = self
                        .store
                        .begin_handover(&HandoverOrder { by, map, to, score }, &self.settings)
                        .await;
                }
            }
            assert!(Instant::now() < until, "{map} is not handed over");
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn kill(&self, map: &str, holder: Held) {
        let _one = self.kill.lock().await;
        let Some(machine) = self.machines.iter().find(|machine| machine.host_id == holder.host_id) else {
            return;
        };
        self.kills.fetch_add(1, Ordering::Relaxed);
        tokio::task::block_in_place(|| machine.kill());
        self.held_after(map, holder.tenure).await;
        machine.start();
    }
}

async fn keep_moving(run: Arc<Run>, map: String) {
    let mut tenure = 0;
    loop {
        let held = run.held_after(&map, tenure).await;
        tenure = held.tenure;
        let taken = run
            .left
            .try_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        if taken.is_err() {
            return;
        }
        // It is played for a while.
        tokio::time::sleep(Duration::from_millis(fastrand::u64(100..400))).await;
        if fastrand::u8(0..100) < run.kills_percent {
            run.kill(&map, held).await;
        } else {
            run.hand_over(&map, held).await;
        }
    }
}

async fn report(options: &Options, run: &Run, said: &[(String, Uuid)]) -> Report {
    // A tenure in which nothing was written was of a host that was killed as it got the map; each such host has a lease.
    const GAPS: &str = "WITH spans AS ( \
            SELECT stream, tenure, min(received_at) AS first, max(received_at) AS last FROM p2p_sync.operations GROUP BY 1, 2 \
        ), gaps AS ( \
            SELECT stream, tenure, lead(tenure) OVER by_tenure AS next, lead(first) OVER by_tenure - last AS gap FROM spans \
                WINDOW by_tenure AS (PARTITION BY stream ORDER BY tenure) \
        ) SELECT CASE WHEN g.next = g.tenure + 1 THEN t.ended_by ELSE 'lapsed' END, \
                extract(epoch FROM greatest(g.gap, interval '0'))::float8 - $1::float8 * greatest(0, ( \
                    SELECT count(*) FROM p2p_sync.map_tenures AS l WHERE l.map = g.stream AND l.ended_by = 'lapsed' \
                        AND l.tenure >= g.tenure AND l.tenure < g.next) - 1) FROM gaps AS g \
            JOIN p2p_sync.map_tenures AS t ON t.map = g.stream AND t.tenure = g.tenure WHERE g.gap IS NOT NULL";
    const TWO: &str = "SELECT count(*) FROM (SELECT tenure, max(tenure) OVER (PARTITION BY stream ORDER BY stream_sequence) AS newest \
        FROM p2p_sync.operations) AS _ WHERE tenure < newest";
    const FOREIGN: &str = "SELECT count(*) FROM p2p_sync.operations AS o LEFT JOIN p2p_sync.map_tenures AS t \
        ON t.map = o.stream AND t.tenure = o.tenure AND t.host_id = o.host_id WHERE t.host_id IS NULL";
    let (mut planned, mut lost_hosts, mut late) = (histogram(), histogram(), 0);
    for row in run
        .sql
        .query(GAPS, &[&run.settings.lease.as_secs_f64()])
        .await
        .expect("valid SQL")
    {
        let record = |times: &mut Histogram<u64>| {
            times.saturating_record(microseconds(Duration::from_secs_f64(row.get::<_, f64>(1).max(0.0))));
        };
        match row.get::<_, Option<&str>>(0) {
            Some("handed over") => record(&mut planned),
            Some("lapsed") => record(&mut lost_hosts),
            _ => late += 1,
        }
    }
    let ids = async |sql: &str| -> HashSet<Uuid> {
        run.sql
            .query(sql, &[])
            .await
            .expect("valid SQL")
            .iter()
            .map(|row| row.get(0))
            .collect()
    };
    let logged = ids("SELECT operation_id FROM p2p_sync.operations").await;
    let limbo = ids("SELECT operation_id FROM p2p_sync.limbo_operations").await;
    let is_lost = |(state, id): &&(String, Uuid)| match state.as_str() {
        "APPLIED" => !logged.contains(id),
        "LIMBO" => !limbo.contains(id),
        _ => false,
    };
    for (state, id) in said.iter().filter(is_lost) {
        // Whoever looks for it finds it by this.
        let elsewhere = (logged.contains(id), limbo.contains(id));
        println!("migrations: {id} was told as {state}, and is not there; logged, in limbo: {elsewhere:?}");
    }
    let count = async |sql: &str| -> i64 { run.sql.query_one(sql, &[]).await.expect("valid SQL").get(0) };
    Report {
        migrations: options.migrations,
        kills: run.kills.load(Ordering::Relaxed),
        lease_seconds: options.lease_seconds,
        acknowledged: said.iter().filter(|(state, _)| state == "APPLIED").count(),
        logged: i64::try_from(logged.len()).unwrap_or(i64::MAX),
        limbo: i64::try_from(limbo.len()).unwrap_or(i64::MAX),
        planned: Times::of(&planned),
        lost_hosts: Times::of(&lost_hosts),
        late,
        acknowledged_lost: said.iter().filter(is_lost).count(),
        written_by_two: count(TWO).await,
        foreign: count(FOREIGN).await,
    }
}
