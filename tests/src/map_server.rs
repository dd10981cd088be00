//! The sample map server with and without the library: how late its timers are, what a call costs, and whether the hub
//! has all that was taken, while the hub is up, while it cannot be reached, and when it is killed and comes back.
//!
//! The sample has a core of its own; the hub, its Postgres and its Redis share another.

mod account;
mod report;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use clap::Parser;
use p2p_sync_proto::secret_file;
use serde_json::Value;
use tempfile::TempDir;

use self::{
    account::Account,
    report::{Report, Run},
};
use crate::{
    services::{self, Database, OwnPostgres, OwnRedis, PostgresOptions},
    stack::{Hub, HubDatabase},
};

/// Runs the sample map server against a hub and measures its loop.
///
/// Fails when anything is lost, and with `--strict` when a bar is missed, e.g. the timers are late by more than a tenth
/// more than without the library.
#[derive(Debug, Parser)]
#[command(name = "map_server", version)]
pub struct Options {
    /// The sample, built from `tests/map_server`.
    #[arg(long)]
    sample: PathBuf,
    /// Measured seconds of each run.
    #[arg(long, default_value_t = 15)]
    seconds: u32,
    /// Seconds before, in which the sample starts with its burst of NPC states.
    #[arg(long, default_value_t = 6)]
    warmup: u32,
    /// How often each scenario is run, in turns.
    #[arg(long, default_value_t = 1)]
    rounds: u32,
    /// Game events a second.
    #[arg(long, default_value_t = 10_000)]
    events: u32,
    /// Map changes a second, each with a waiting call.
    #[arg(long, default_value_t = 5.0)]
    map_changes: f64,
    /// Clients' packets a second, each of which ends the loop's wait.
    #[arg(long, default_value_t = 0)]
    packets: u32,
    /// The core of the sample.
    #[arg(long, default_value_t = 0)]
    sample_core: u32,
    /// The core of the hub, its Postgres and its Redis.
    #[arg(long, default_value_t = 1)]
    hub_core: u32,
    /// Runs these scenarios beside `without` instead of all.
    #[arg(long)]
    scenario: Vec<Scenario>,
    /// Settings of the library beside those that a run needs, as `key=value`.
    #[arg(long)]
    setting: Vec<String>,
    /// Where the folders of the runs lie while they last.
    #[arg(long, default_value_os_t = std::env::temp_dir())]
    folder: PathBuf,
    /// Where the figures are written as JSON.
    #[arg(long, default_value = "target/map_server.json")]
    json: PathBuf,
    /// Fails also when a bar is missed.
    #[arg(long)]
    strict: bool,
}

/// What the sample meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Scenario {
    /// No library at all.
    Without,
    /// The hub answers all the time.
    Up,
    /// Nobody listens where the hub should be; it is started when the sample has ended.
    Unreachable,
    /// The hub is killed after a quarter of the measured time and comes back at the half.
    Returning,
}

impl Scenario {
    const ALL: [Self; 4] = [Self::Without, Self::Up, Self::Unreachable, Self::Returning];
}

/// For what was taken to be settled when the sample ends.
const FLUSH_TIMEOUT: Duration = Duration::from_mins(3);
/// For the sample to end beyond the time it was asked to run and to flush.
const END_TIMEOUT: Duration = Duration::from_mins(5);
/// Operations whose memory is measured.
const QUEUED: u32 = 10_000;

/// Runs the scenarios; success only if nothing was lost.
pub fn run(options: &Options) -> ExitCode {
    // All that is started from here on inherits it, but for the sample, which takes its own core.
    pin_to(options.hub_core);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime can be made");
    let machine = runtime.block_on(Machine::start());
    let spin = calibrate(options);
    let mut report = Report::new(options.seconds, options.events);
    for round in 0..options.rounds {
        let mut scenarios = Scenario::ALL.to_vec();
        scenarios.retain(|scenario| {
            *scenario == Scenario::Without || options.scenario.is_empty() || options.scenario.contains(scenario)
        });
        // What drifts with time meets each of them alike.
        if round % 2 == 1 {
            scenarios.reverse();
        }
        for scenario in scenarios {
            eprintln!("map_server: round {} of {}: {scenario:?}", round + 1, options.rounds);
            let system = System::new(options, &machine, &runtime);
            report.runs.push(system.play(options, scenario, spin, &runtime));
        }
    }
    let system = System::new(options, &machine, &runtime);
    report.queued = system.sample(&["--queued".to_owned(), QUEUED.to_string()], options);
    println!("{report}");
    if let Err(error) = report.write(&options.json) {
        eprintln!("map_server: {} cannot be written: {error}", options.json.display());
        return ExitCode::FAILURE;
    }
    println!("map_server: these figures as JSON are in {}", options.json.display());
    let failures = report.failures(options.strict);
    for failure in &failures {
        println!("map_server: FAILED: {failure}");
    }
    if failures.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Binds this thread, and so what it starts, to a core.
fn pin_to(core: u32) {
    let mut taskset = Command::new("taskset");
    taskset.args([
        "--cpu-list",
        "--pid",
        &core.to_string(),
        &std::process::id().to_string(),
    ]);
    let is_pinned = taskset
        .stdout(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !is_pinned {
        eprintln!("map_server: core {core} cannot be had: the hub runs where it likes, and the figures say little");
    }
}

/// The work of one event, the same for all runs.
fn calibrate(options: &Options) -> u64 {
    let mut sample = Command::new(&options.sample);
    sample.args(["--calibrate", "--events", &options.events.to_string()]);
    sample.args(["--core", &options.sample_core.to_string()]);
    let output = sample.output().expect("the sample can be run");
    let told = String::from_utf8_lossy(&output.stdout);
    told.trim()
        .parse()
        .unwrap_or_else(|_| panic!("the sample said {told:?}"))
}

/// The servers behind the hubs.
struct Machine {
    postgres: OwnPostgres,
    redis: OwnRedis,
}

impl Machine {
    async fn start() -> Self {
        let settings = vec![("shared_buffers", "128MB")];
        Self {
            postgres: OwnPostgres::with(PostgresOptions {
                settings,
                ..PostgresOptions::default()
            })
            .await,
            redis: OwnRedis::new().await,
        }
    }
}

/// One hub with an empty database, and the folder of one sample.
struct System {
    hub: Hub,
    database: Database,
    folder: TempDir,
}

impl System {
    fn new(options: &Options, machine: &Machine, runtime: &tokio::runtime::Runtime) -> Self {
        let folder = tempfile::Builder::new()
            .prefix("p2p-sync-map-server-")
            .tempdir_in(&options.folder)
            .expect("a folder can be made");
        let database = runtime.block_on(services::database_on(machine.postgres.url()));
        let program = std::env::current_exe().expect("a running program has a path");
        let redis = machine.redis.url();
        let (_, redis_port) = redis.trim_end_matches('/').rsplit_once(':').expect("a URL with a port");
        // The same before and after a kill.
        let port = services::free_port();
        let settings = [
            ("port", port.to_string()),
            ("redis_host", "127.0.0.1".to_owned()),
            ("redis_port", redis_port.to_owned()),
            ("redis_prefix", format!("map-server-{port}")),
        ];
        let server = HubDatabase::Server(database.url().to_owned());
        let hub = Hub::new(&program, &folder.path().join("hub"), &server, &settings);
        let credential = hub.add_host(1);
        let mut config = format!(
            "main_server_endpoint = http://127.0.0.1:{port}\nencryption_key = {credential}\noutbox_path = outbox\n\
             metrics_interval_seconds = 0\n"
        );
        for setting in &options.setting {
            config += &format!("{setting}\n");
        }
        secret_file::replace(&folder.path().join(CONFIG), config.as_bytes()).expect("the folder can be written");
        Self { hub, database, folder }
    }

    fn play(mut self, options: &Options, scenario: Scenario, spin: u64, runtime: &tokio::runtime::Runtime) -> Run {
        let flush = if scenario == Scenario::Unreachable {
            Duration::ZERO
        } else {
            FLUSH_TIMEOUT
        };
        if scenario != Scenario::Unreachable {
            self.hub.start();
        }
        let mut arguments: Vec<String> = Vec::new();
        for (name, value) in [
            ("--seconds", options.seconds.to_string()),
            ("--warmup", options.warmup.to_string()),
            ("--events", options.events.to_string()),
            ("--map-changes", options.map_changes.to_string()),
            ("--packets", options.packets.to_string()),
            ("--spin", spin.to_string()),
            ("--flush-ms", flush.as_millis().to_string()),
            ("--ledger", self.path(LEDGER).display().to_string()),
        ] {
            arguments.extend([name.to_owned(), value]);
        }
        if scenario == Scenario::Without {
            arguments.push("--without".to_owned());
        }
        let began = Instant::now();
        let child = self.start_sample(&arguments, options);
        if scenario == Scenario::Returning {
            let quarter = Duration::from_secs(options.seconds.into()) / 4;
            let killed = began + Duration::from_secs(options.warmup.into()) + quarter;
            std::thread::sleep(killed.saturating_duration_since(Instant::now()));
            self.hub.kill();
            std::thread::sleep((killed + quarter).saturating_duration_since(Instant::now()));
            self.hub.start();
        }
        let sample = self.figures(child, options);
        if scenario == Scenario::Without {
            return Run::new(scenario, sample, None, None);
        }
        let mut drained = None;
        if scenario == Scenario::Unreachable {
            self.hub.start();
            let flush = FLUSH_TIMEOUT.as_millis().to_string();
            drained = Some(self.sample(&["--drain".to_owned(), "--flush-ms".to_owned(), flush], options));
        }
        self.hub.stop();
        let ledger = fs::read_to_string(self.path(LEDGER)).expect("the sample writes it");
        let account = runtime.block_on(Account::of(&ledger, &self.database));
        Run::new(scenario, sample, drained, Some(account))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs the sample to its end; gives its figures.
    fn sample(&self, arguments: &[String], options: &Options) -> Value {
        let child = self.start_sample(arguments, options);
        self.figures(child, options)
    }

    fn start_sample(&self, arguments: &[String], options: &Options) -> Child {
        let log = fs::File::create(self.path(LOG)).expect("the folder can be written");
        let mut sample = Command::new(&options.sample);
        sample.arg("--config").arg(self.path(CONFIG));
        sample.arg("--json").arg(self.path(FIGURES));
        sample
            .args(["--core", &options.sample_core.to_string()])
            .args(arguments);
        sample.stdout(Stdio::null()).stderr(log);
        sample.spawn().expect("the sample can be run")
    }

    /// Waits for the sample's end.
    fn figures(&self, mut child: Child, options: &Options) -> Value {
        let asked = Duration::from_secs(u64::from(options.seconds) + u64::from(options.warmup));
        let deadline = Instant::now() + asked + FLUSH_TIMEOUT + END_TIMEOUT;
        while child.try_wait().expect("it is our child").is_none() {
            if Instant::now() > deadline {
                // Gone already is as good as killed.
                let _ = child.kill();
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let status = child.wait().expect("it is our child");
        let log = read(&self.path(LOG));
        assert!(status.success(), "the sample ended with {status} and said:\n{log}");
        if !log.is_empty() {
            eprint!("{log}");
        }
        let figures = read(&self.path(FIGURES));
        serde_json::from_str(&figures).unwrap_or_else(|error| panic!("no JSON ({error}): {figures}"))
    }
}

const CONFIG: &str = "p2p_data_sync.conf";
const LEDGER: &str = "ledger";
const FIGURES: &str = "figures.json";
const LOG: &str = "sample.log";

fn read(file: &Path) -> String {
    String::from_utf8_lossy(&fs::read(file).unwrap_or_default()).into_owned()
}
