//! The load run: a recorded map server at many times its speed through one agent and one proxy into real servers, with
//! callers who wait beside it, and how long everything took.
//!
//! The proxy is a process of its own; the agent lives in this one, so that what it does is seen from inside.

mod feed;
mod ledger;
mod report;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use clap::Parser;
use p2p_sync_agent::{Agent, Config};
use redis::{ConnectionAddr, IntoConnectionInfo as _};
use uuid::Uuid;

use self::{ledger::Ledger, report::Report};
use crate::{
    recording,
    services::{self, Database},
    stack::{Hub, HubDatabase},
};

/// Replays a recorded map server through an agent and a proxy into Postgres and Redis, and measures how long it takes.
///
/// Fails when the p99 of a lane's queue age reaches a second, when a waiting call had no answer in time, or when
/// anything was refused, lost or stored twice.
#[derive(Debug, Parser)]
#[command(name = "load", version)]
pub struct Options {
    /// How many times faster than it was recorded.
    #[arg(long, default_value_t = 20.0)]
    speed: f64,
    /// How often the recording is replayed, one after the other.
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Critical calls a second that wait for their answer, besides.
    #[arg(long, default_value_t = 500)]
    calls: u32,
    /// Threads that make these calls.
    #[arg(long, default_value_t = 64)]
    callers: u32,
    /// URL of a superuser of the Postgres; `P2P_SYNC_TEST_PG` where it is not given. A database is made and dropped.
    #[arg(long)]
    pg: Option<String>,
    /// redis:// URL of the Redis; `P2P_SYNC_TEST_REDIS` where it is not given.
    #[arg(long)]
    redis: Option<String>,
    /// With a provider of embeddings that is down, and every map eligible: what is to be embedded waits.
    #[arg(long)]
    provider_down: bool,
    /// Where the outbox lies while it runs; a temporary folder is made in it.
    #[arg(long, default_value_os_t = std::env::temp_dir())]
    folder: PathBuf,
    /// Where the figures are written as JSON.
    #[arg(long, default_value = "target/load.json")]
    json: PathBuf,
}

/// How long a waiting call waits: the agent's default.
const CRITICAL_TIMEOUT_MS: u64 = 500;
const LINK_TIMEOUT: Duration = Duration::from_secs(30);
/// For the outbox to drain when everything was submitted.
const FLUSH_TIMEOUT: Duration = Duration::from_mins(2);

/// Runs the load; success only if every bar holds.
pub fn run(options: &Options) -> ExitCode {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime can be made");
    let database = match &options.pg {
        Some(url) => runtime.block_on(services::database_on(url)),
        None => runtime.block_on(services::database()),
    };
    let folder = tempfile::Builder::new()
        .prefix("p2p-sync-load-")
        .tempdir_in(&options.folder)
        .expect("a folder can be made");
    let report = measure(options, &database, folder.path(), &runtime);
    println!("{report}");
    match report.write(&options.json) {
        Ok(()) => println!("load: these figures as JSON are in {}", options.json.display()),
        Err(error) => {
            eprintln!("load: {} cannot be written: {error}", options.json.display());
            return ExitCode::FAILURE;
        }
    }
    let failures = report.failures();
    for failure in &failures {
        println!("load: FAILED: {failure}");
    }
    if failures.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn measure(options: &Options, database: &Database, folder: &Path, runtime: &tokio::runtime::Runtime) -> Report {
    let program = std::env::current_exe().expect("a running program has a path");
    let redis = options.redis.clone().unwrap_or_else(services::shared_redis_url);
    let server = HubDatabase::Server(database.url().to_owned());
    let mut settings = redis_settings(&redis);
    if options.provider_down {
        settings.extend([
            ("embedding_provider", "openai".to_owned()),
            (
                "embedding_base_url",
                format!("http://127.0.0.1:{}/v1", services::free_port()),
            ),
            ("vector_eligible_maps", "*".to_owned()),
        ]);
    }
    let mut hub = Hub::new(&program, &folder.join("hub"), &server, &settings);
    let credential = hub.add_host(1);
    let address = hub.start();
    let ledger = Arc::new(Ledger::default());
    let agent = start_agent(folder, &address, &credential, &ledger);

    let happenings = recording::with_synthetic_share();
    let fed = feed::feed(options, &agent, &happenings, &ledger);
    let flushed = agent.flush(FLUSH_TIMEOUT);
    if let Err(problem) = agent.shutdown() {
        eprintln!("load: {problem}");
    }
    hub.stop();
    if !flushed {
        eprintln!("load: the outbox did not drain within {FLUSH_TIMEOUT:?}");
    }
    let held = runtime.block_on(report::read(database));
    Report::new(options, &fed, &ledger.lives(), &held)
}

fn start_agent(folder: &Path, address: &str, credential: &str, ledger: &Arc<Ledger>) -> Agent {
    let text = format!(
        "main_server_endpoint = {address}\nencryption_key = {credential}\nmetrics_interval_seconds = 0\nconflation = no\n\
         critical_timeout_ms = {CRITICAL_TIMEOUT_MS}\noutbox_path = outbox\n"
    );
    let config = Config::parse(&text, folder, |_| None).expect("a valid configuration");
    let told = ledger.clone();
    let agent = Agent::start_observed(config, move |event| told.observe(event)).expect("a new outbox can be opened");
    let deadline = Instant::now() + LINK_TIMEOUT;
    while !agent.status().link_up {
        assert!(
            Instant::now() < deadline,
            "the link is not up: {:?}",
            agent.status().link_problem
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    agent
}

/// The hub's settings for a Redis, under names that no other run uses.
pub(crate) fn redis_settings(url: &str) -> Vec<(&'static str, String)> {
    let info = url.into_connection_info().expect("a redis:// URL");
    let ConnectionAddr::Tcp(host, port) = info.addr() else {
        panic!("the Redis is reached by TCP")
    };
    let login = info.redis_settings();
    vec![
        ("redis_host", host.clone()),
        ("redis_port", port.to_string()),
        ("redis_db", login.db().to_string()),
        ("redis_password", login.password().unwrap_or_default().to_owned()),
        ("redis_prefix", format!("load-{}", Uuid::new_v4().simple())),
    ]
}
