//! The search run: synthetic vectors in clusters, searched through an agent and a hub, and by the same SQL alone.
//!
//! What is exact is computed here, over the vectors as they were before Postgres halved their precision. The two ways are
//! measured in turns, query by query, so that what else the machine does meets both.

mod report;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Parser;
use p2p_sync_agent::{Agent, Config};
use p2p_sync_proto::v1::{self, pull_reply, pull_request::What};
use tokio::runtime::Runtime;
use tokio_postgres::{Client, types::ToSql};

use self::report::{Report, Row};
use crate::{
    services::{self, Database},
    stack::{Hub, HubDatabase},
};

/// Searches among synthetic vectors, filtered and not, and compares with exact search and with bare SQL.
///
/// Fails when less than 0.95 of the nearest ten is found, or when the median through agent and hub is more than 1.2 times that
/// of the SQL alone.
#[derive(Debug, Parser)]
#[command(name = "search", version)]
pub struct Options {
    /// How many vectors.
    #[arg(long, default_value_t = 100_000)]
    vectors: usize,
    /// Numbers in each.
    #[arg(long, default_value_t = 384)]
    dimensions: usize,
    /// Queries for each filter.
    #[arg(long, default_value_t = 300)]
    queries: usize,
    /// `hnsw_ef_search` of the hub.
    #[arg(long, default_value_t = 100)]
    ef_search: u32,
    /// What the vectors are drawn by.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Compares with an index in full precision too.
    #[arg(long)]
    full_precision: bool,
    /// Where the figures are written as JSON.
    #[arg(long, default_value = "target/search.json")]
    json: PathBuf,
}

/// Hits of each search.
const NEAREST: usize = 10;
/// Vectors around one point.
const CLUSTER: usize = 100;
/// How far around it, of a length of 1.
const SPREAD: f32 = 0.6;
/// Rows written at one time.
const ROWS: usize = 500;
const LINK_TIMEOUT: Duration = Duration::from_secs(30);
/// For one search.
const PATIENCE: Duration = Duration::from_secs(30);
/// Queries that are not counted, before each filter's.
const WARM_UP: usize = 20;

/// What is searched: the share of vectors on each map.
const MAPS: [(&str, f64); 4] = [("prontera", 0.5), ("geffen", 0.1), ("payon", 0.01), ("gonryun", 0.001)];
/// All others, in equal parts.
const OTHER_MAPS: usize = 100;

/// Runs it; success only if every bar holds.
pub fn run(options: &Options) -> ExitCode {
    let runtime = Runtime::new().expect("a runtime can be made");
    let database = runtime.block_on(services::database());
    let folder = tempfile::tempdir().expect("a folder can be made");
    let report = measure(options, &database, folder.path(), &runtime);
    println!("{report}");
    match report.write(&options.json) {
        Ok(()) => println!("search: these figures as JSON are in {}", options.json.display()),
        Err(error) => {
            eprintln!("search: {} cannot be written: {error}", options.json.display());
            return ExitCode::FAILURE;
        }
    }
    let failures = report.failures();
    for failure in &failures {
        println!("search: FAILED: {failure}");
    }
    if failures.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// All vectors, one after the other, and the map of each.
struct Set {
    dimensions: usize,
    numbers: Vec<f32>,
    maps: Vec<String>,
}

impl Set {
    fn draw(options: &Options, random: &mut fastrand::Rng) -> Self {
        let (count, dimensions) = (options.vectors, options.dimensions);
        let mut numbers = Vec::with_capacity(count * dimensions);
        let centres: Vec<Vec<f32>> = (0..count.div_ceil(CLUSTER)).map(|_| unit(dimensions, random)).collect();
        for _ in 0..count {
            let centre = &centres[random.usize(..centres.len())];
            numbers.extend(around(centre, random));
        }
        let map = |random: &mut fastrand::Rng| {
            let mut at = random.f64();
            for (map, share) in MAPS {
                if at < share {
                    return map.to_owned();
                }
                at -= share;
            }
            format!("map{}", random.usize(..OTHER_MAPS))
        };
        let maps = (0..count).map(|_| map(random)).collect();
        Self {
            dimensions,
            numbers,
            maps,
        }
    }

    fn vector(&self, at: usize) -> &[f32] {
        &self.numbers[at * self.dimensions..(at + 1) * self.dimensions]
    }

    /// The nearest by comparing with each that passes a filter.
    fn nearest(&self, query: &[f32], map: Option<&str>) -> Vec<usize> {
        let passes = |at: &usize| map.is_none_or(|map| self.maps[*at] == map);
        let mut likeness: Vec<(f32, usize)> = (0..self.maps.len())
            .filter(passes)
            .map(|at| (dot(query, self.vector(at)), at))
            .collect();
        let most = NEAREST.min(likeness.len());
        likeness.select_nth_unstable_by(most.saturating_sub(1), |one, other| other.0.total_cmp(&one.0));
        likeness.truncate(most);
        likeness.into_iter().map(|(_, at)| at).collect()
    }
}

/// A direction, any as likely as another.
fn unit(dimensions: usize, random: &mut fastrand::Rng) -> Vec<f32> {
    // A sum of uniform numbers is normal enough.
    let normal = |random: &mut fastrand::Rng| (0..6).map(|_| random.f32() - 0.5).sum::<f32>();
    scaled((0..dimensions).map(|_| normal(random)).collect())
}

fn around(centre: &[f32], random: &mut fastrand::Rng) -> Vec<f32> {
    let aside = unit(centre.len(), random);
    scaled(
        centre
            .iter()
            .zip(aside)
            .map(|(at, aside)| at + SPREAD * aside)
            .collect(),
    )
}

fn scaled(mut vector: Vec<f32>) -> Vec<f32> {
    let length = dot(&vector, &vector).sqrt();
    for x in &mut vector {
        *x /= length;
    }
    vector
}

fn dot(one: &[f32], other: &[f32]) -> f32 {
    one.iter().zip(other).map(|(a, b)| a * b).sum()
}

fn measure(options: &Options, database: &Database, folder: &Path, runtime: &Runtime) -> Report {
    let mut random = fastrand::Rng::with_seed(options.seed);
    let set = Set::draw(options, &mut random);
    let program = std::env::current_exe().expect("a running program has a path");
    let settings = [
        ("embedding_dimensions", options.dimensions.to_string()),
        ("hnsw_ef_search", options.ef_search.to_string()),
    ];
    let server = HubDatabase::Server(database.url().to_owned());
    let mut hub = Hub::new(&program, &folder.join("hub"), &server, &settings);
    let credential = hub.add_host(1);
    let address = hub.start();
    let sql = runtime.block_on(database.client());
    let mut report = runtime.block_on(load(&sql, &set));
    println!(
        "search: {} vectors of {} dimensions are there, indexed in {:.0} s",
        options.vectors, options.dimensions, report.index_seconds
    );
    let settings = format!(
        "SET plan_cache_mode = force_custom_plan; SET jit = off; SET hnsw.ef_search = {}; \
         SET hnsw.iterative_scan = strict_order; SET hnsw.scan_mem_multiplier = 4",
        options.ef_search
    );
    runtime.block_on(sql.batch_execute(&settings)).expect("pgvector 0.8");
    let agent = start_agent(folder, &address, &credential);
    for map in [None].into_iter().chain(MAPS.map(|(map, _)| Some(map))) {
        let row = compare(options, &set, map, &agent, &sql, runtime, &mut random);
        println!("{row}");
        report.rows.push(row);
    }
    if options.full_precision {
        report.full_precision = Some(runtime.block_on(full_precision(options, &sql, &set, &mut random)));
    }
    if let Err(problem) = agent.shutdown() {
        eprintln!("search: {problem}");
    }
    hub.stop();
    report
}

/// Writes all vectors and makes their index anew, as `schema reembed` does.
async fn load(sql: &Client, set: &Set) -> Report {
    const WRITE: &str = "INSERT INTO p2p_sync.embeddings (path, entry, stream_sequence, data_type, map, account_id, received_at, \
            content, content_hash, metadata, embedding) \
        SELECT g.map || '/VECTOR_EMBEDDING/' || ($1 + place - 1), 0, $1 + place, 8, g.map, 0, now(), \
                'text number ' || ($1 + place - 1), sha256(int8send($1 + place)), '{\"by\": \"the run\"}', \
                ($3::real[])[(place - 1) * $4 + 1 : place * $4]::halfvec \
            FROM unnest($2::text[]) WITH ORDINALITY AS g(map, place)";
    sql.batch_execute("DROP INDEX p2p_sync.embeddings_by_cosine")
        .await
        .expect("it is there");
    let write = sql.prepare(WRITE).await.expect("valid SQL");
    let dimensions = i64::try_from(set.dimensions).expect("few");
    for (at, maps) in (0..).step_by(ROWS).zip(set.maps.chunks(ROWS)) {
        let first = i64::try_from(at).expect("few");
        let numbers = &set.numbers[at * set.dimensions..(at + maps.len()) * set.dimensions];
        let values: [&(dyn ToSql + Sync); 4] = [&first, &maps, &numbers, &dimensions];
        sql.execute(&write, &values).await.expect("written");
    }
    let began = Instant::now();
    sql.batch_execute(
        "SET maintenance_work_mem = '1GB'; \
         CREATE INDEX embeddings_by_cosine ON p2p_sync.embeddings USING hnsw (embedding halfvec_cosine_ops) \
            WITH (m = 16, ef_construction = 64); \
         VACUUM ANALYZE p2p_sync.embeddings",
    )
    .await
    .expect("indexed");
    let index_seconds = began.elapsed().as_secs_f64();
    Report {
        vectors: set.maps.len(),
        dimensions: set.dimensions,
        index_seconds,
        index_mib: mib(sql, "p2p_sync.embeddings_by_cosine").await,
        rows: Vec::new(),
        full_precision: None,
    }
}

async fn mib(sql: &Client, relation: &str) -> f64 {
    let asked = format!("SELECT pg_relation_size('{relation}') / 1048576.0::float8");
    sql.query_one(&asked, &[]).await.expect("it is there").get(0)
}

fn start_agent(folder: &Path, address: &str, credential: &str) -> Agent {
    let text = format!("main_server_endpoint = {address}\nencryption_key = {credential}\noutbox_path = outbox\n");
    let config = Config::parse(&text, folder, |_| None).expect("a valid configuration");
    let agent = Agent::start(config).expect("a new outbox can be opened");
    let deadline = Instant::now() + LINK_TIMEOUT;
    while !agent.status().link_up {
        assert!(Instant::now() < deadline, "the link is not up");
        std::thread::sleep(Duration::from_millis(5));
    }
    agent
}

/// As the hub asks; without a filter, and with one.
const SQL: [&str; 2] = [
    "SELECT path, stream_sequence, data_type, map, account_id, received_at, left(content, 1000), metadata::text, \
        embedding <=> $1::real[]::halfvec \
    FROM p2p_sync.embeddings WHERE (SELECT model FROM p2p_sync.embedding_space) = 'lexical-1' \
    ORDER BY embedding <=> $1::real[]::halfvec LIMIT 10",
    "SELECT path, stream_sequence, data_type, map, account_id, received_at, left(content, 1000), metadata::text, \
        embedding <=> $1::real[]::halfvec \
    FROM p2p_sync.embeddings WHERE (SELECT model FROM p2p_sync.embedding_space) = 'lexical-1' AND map = ANY ($2) \
    ORDER BY embedding <=> $1::real[]::halfvec LIMIT 10",
];

fn compare(
    options: &Options,
    set: &Set,
    map: Option<&str>,
    agent: &Agent,
    sql: &Client,
    runtime: &Runtime,
    random: &mut fastrand::Rng,
) -> Row {
    let maps: Vec<String> = map.iter().map(|&map| map.to_owned()).collect();
    let statement = runtime.block_on(sql.prepare(SQL[maps.len()])).expect("valid SQL");
    let (mut bare_ms, mut hub_ms, mut found, mut all) = (Vec::new(), Vec::new(), 0, 0);
    for number in 0..WARM_UP + options.queries {
        let query = around(set.vector(random.usize(..set.maps.len())), random);
        let bare = || {
            let began = Instant::now();
            let values: [&(dyn ToSql + Sync); 2] = [&query, &maps];
            let rows = runtime.block_on(sql.query(&statement, &values[..=maps.len()]));
            (began.elapsed(), rows.expect("searched").len())
        };
        let request = v1::PullRequest {
            what: Some(What::SearchEmbeddings(v1::SearchEmbeddings {
                embedding: query.clone(),
                limit: u32::try_from(NEAREST).expect("few"),
                maps: maps.clone(),
                ..Default::default()
            })),
        };
        let through = || {
            let began = Instant::now();
            let reply = agent.pull(request, Some(PATIENCE)).expect("searched");
            let took = began.elapsed();
            let Some(pull_reply::What::Hits(hits)) = reply.what else {
                panic!("no hits: {reply:?}")
            };
            (took, hits)
        };
        // Who comes second finds the pages warm: by turns.
        let ((bare_took, _), (hub_took, hits)) = if number % 2 == 0 {
            let bare = bare();
            (bare, through())
        } else {
            let through = through();
            (bare(), through)
        };
        if number < WARM_UP {
            continue;
        }
        bare_ms.push(bare_took.as_secs_f64() * 1e3);
        hub_ms.push(hub_took.as_secs_f64() * 1e3);
        let exact = set.nearest(&query, map);
        let hit = |at: &usize| {
            let path = format!("{}/VECTOR_EMBEDDING/{at}", set.maps[*at]);
            hits.hits.iter().any(|hit| hit.path == path)
        };
        found += exact.iter().filter(|at| hit(at)).count();
        all += exact.len();
    }
    let matching = set.maps.iter().filter(|of| map.is_none_or(|map| map == *of)).count();
    let share = |part: usize, whole: usize| {
        f64::from(u32::try_from(part).expect("few")) / f64::from(u32::try_from(whole).expect("few"))
    };
    Row::new(map, matching, share(found, all), bare_ms, hub_ms)
}

/// The same SQL over an index that is not halved: its size in MiB, and its median in ms.
async fn full_precision(options: &Options, sql: &Client, set: &Set, random: &mut fastrand::Rng) -> (f64, f64) {
    let dimensions = set.dimensions;
    sql.batch_execute(&format!(
        "CREATE TABLE full_precision AS SELECT path, embedding::vector({dimensions}) AS embedding FROM p2p_sync.embeddings; \
         CREATE INDEX full_by_cosine ON full_precision USING hnsw (embedding vector_cosine_ops) \
            WITH (m = 16, ef_construction = 64); \
         VACUUM ANALYZE full_precision"
    ))
    .await
    .expect("indexed");
    let statement = sql
        .prepare("SELECT path FROM full_precision ORDER BY embedding <=> $1::real[]::vector LIMIT 10")
        .await
        .expect("valid SQL");
    let mut ms = Vec::new();
    for _ in 0..options.queries {
        let query = around(set.vector(random.usize(..set.maps.len())), random);
        let began = Instant::now();
        sql.query(&statement, &[&query]).await.expect("searched");
        ms.push(began.elapsed().as_secs_f64() * 1e3);
    }
    (mib(sql, "full_by_cosine").await, report::median(&mut ms))
}
