//! The enqueue run: how long [`Agent::submit`] holds the thread that calls it, with an agent that spools and a link
//! that is down or up, and what the agent adds to its process.
//!
//! A call that does nothing is timed in the same way beside it: what the clock and the machine take is in both.

use std::{
    fmt,
    hint::black_box,
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use clap::Parser;
use hdrhistogram::Histogram;
use p2p_sync_agent::{Agent, Config, Priority, Submission};
use p2p_sync_proto::{
    keys::{KeyId, MasterKey},
    v1::SyncDataType,
};
use serde::Serialize;

use crate::{
    services,
    stack::{Hub, HubDatabase},
};

/// Times `Agent::submit` for payloads of 200 bytes, at 10,000 a second in bursts of 20 ms and back to back.
///
/// The link is down; where `P2P_SYNC_TEST_PG` names a Postgres, it is measured once more with a link that is up.
#[derive(Debug, Parser)]
#[command(name = "enqueue", version)]
pub struct Options {
    /// How long each case is measured.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Where the outbox lies while it runs; a temporary folder is made in it.
    #[arg(long, default_value_os_t = std::env::temp_dir())]
    folder: PathBuf,
    /// Where the figures are written as JSON.
    #[arg(long, default_value = "target/enqueue.json")]
    json: PathBuf,
}

/// A game loop's turn.
const TURN: Duration = Duration::from_millis(20);
/// In each turn: 10,000 a second.
const TURN_OPS: u64 = 200;
/// Back to back: below the queue's bound, then a pause for it to drain.
const BACK_TO_BACK_OPS: u64 = 5000;
const DRAIN_PAUSE: Duration = Duration::from_millis(500);
/// What the queue takes at its default bound.
const QUEUED_OPS: u64 = 10_000;
const LINK_TIMEOUT: Duration = Duration::from_secs(30);

/// Runs every case and shows what it came to.
pub fn run(options: &Options) -> ExitCode {
    let folder = tempfile::Builder::new()
        .prefix("p2p-sync-enqueue-")
        .tempdir_in(&options.folder)
        .expect("a folder can be made");
    let report = measure(options, folder.path());
    println!("{report}");
    let text = serde_json::to_string_pretty(&report).expect("plain data");
    match std::fs::write(&options.json, text) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("enqueue: {} cannot be written: {error}", options.json.display());
            ExitCode::FAILURE
        }
    }
}

/// What a run came to.
#[derive(Debug, Serialize)]
struct Report {
    cases: Vec<Case>,
    /// Resident, with a link that is down.
    added_kib_idle: u64,
    /// The most while 10,000 operations were taken and spooled.
    added_kib_queued: u64,
    added_descriptors: usize,
    added_threads: usize,
}

#[derive(Debug, Serialize)]
struct Case {
    name: String,
    calls: u64,
    p50_ns: u64,
    p99_ns: u64,
    p999_ns: u64,
    max_ns: u64,
}

fn measure(options: &Options, folder: &Path) -> Report {
    // First, for what a process has once held it does not give back.
    let before = Footprint::read();
    let agent = start(&folder.join("size"), "http://127.0.0.1:9", &any_credential());
    thread::sleep(Duration::from_secs(1));
    let idle = Footprint::read();
    let happenings = Happenings::new();
    let queued_kib = queue_kib(&agent, &happenings);
    drop(agent);

    let mut cases = vec![
        burst("nothing, in bursts", options, |_| ()),
        back_to_back("nothing, back to back", options, |_| ()),
    ];
    let agent = start(&folder.join("down"), "http://127.0.0.1:9", &any_credential());
    cases.extend(submit_cases("link down", options, &agent, &happenings));
    drop(agent);
    if std::env::var_os("P2P_SYNC_TEST_PG").is_some() {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime can be made");
        let database = runtime.block_on(services::database());
        let program = std::env::current_exe().expect("a running program has a path");
        let server = HubDatabase::Server(database.url().to_owned());
        let mut hub = Hub::new(&program, &folder.join("hub"), &server, &[]);
        let credential = hub.add_host(1);
        let address = hub.start();
        let agent = start(&folder.join("up"), &address, &credential);
        agent.wait_for_link(LINK_TIMEOUT);
        assert!(agent.status().link_up, "{:?}", agent.status().link_problem);
        cases.extend(submit_cases("link up", options, &agent, &happenings));
        drop(agent);
        hub.stop();
    }
    Report {
        cases,
        added_kib_idle: idle.kib.saturating_sub(before.kib),
        added_kib_queued: queued_kib.saturating_sub(before.kib),
        added_descriptors: idle.descriptors - before.descriptors,
        added_threads: idle.threads - before.threads,
    }
}

fn submit_cases(link: &str, options: &Options, agent: &Agent, happenings: &Happenings) -> Vec<Case> {
    let submit = |number: u64| {
        let taken = agent.submit(&happenings.submission(number));
        black_box(taken).expect("below the queue's bound");
    };
    vec![
        burst(&format!("submit, in bursts, {link}"), options, submit),
        back_to_back(&format!("submit, back to back, {link}"), options, submit),
    ]
}

fn start(folder: &Path, address: &str, credential: &str) -> Agent {
    std::fs::create_dir_all(folder).expect("the folder can be made");
    let text = format!("main_server_endpoint = {address}\nencryption_key = {credential}\noutbox_path = outbox\n");
    let config = Config::parse(&text, folder, |_| None).expect("a valid configuration");
    Agent::start(config).expect("a new outbox can be opened")
}

fn any_credential() -> String {
    let master = MasterKey::generate(KeyId::parse("k1").expect("valid"));
    master.credential(uuid::Uuid::new_v4(), 1).to_text().to_string()
}

/// Payloads of 200 bytes as a map server tells them, of types of either lane.
struct Happenings(Vec<(SyncDataType, String)>);

impl Happenings {
    fn new() -> Self {
        let made = (0..1000_u32).map(|number| {
            let (x, y) = (number % 300, number / 3);
            let (data_type, key) = match number % 5 {
                0 | 1 => (SyncDataType::PlayerPosition, "char_id"),
                2 => (SyncDataType::MonsterData, "monster_id"),
                3 => (SyncDataType::ItemDrop, "drop_id"),
                _ => (SyncDataType::ChatMessage, "char_id"),
            };
            let id = 150_000 + number;
            let mut text = format!(
                r#"{{"{key}":{id},"map":"prontera","x":{x},"y":{y},"direction":4,"speed":150,"hp":48211,"max_hp":51000,"state":"walking","target":{{"x":156,"y":201}},"note":""#
            );
            text.extend(std::iter::repeat_n('n', 198 - text.len()));
            text.push_str("\"}");
            (data_type, text)
        });
        Self(made.collect())
    }

    fn submission(&self, number: u64) -> Submission<'_> {
        let (data_type, payload) = &self.0[usize::try_from(number).expect("64 bits") % self.0.len()];
        Submission {
            data_type: *data_type,
            map: "prontera",
            account_id: 2_000_001,
            entity: None,
            char_id: None,
            payload: Some(payload),
            priority: Priority::ByType,
            notify: false,
        }
    }
}

/// Calls in each turn of a game loop, at once, and sleeps until the next.
fn burst(name: &str, options: &Options, mut call: impl FnMut(u64)) -> Case {
    let mut times = times();
    let began = Instant::now();
    let mut due = began;
    let mut number = 0;
    while began.elapsed() < Duration::from_secs(options.seconds) {
        for _ in 0..TURN_OPS {
            timed(&mut times, || call(number));
            number += 1;
        }
        due += TURN;
        thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    Case::of(name, &times)
}

/// Calls one after the other as long as the queue surely takes them, and lets it drain.
fn back_to_back(name: &str, options: &Options, mut call: impl FnMut(u64)) -> Case {
    let mut times = times();
    let began = Instant::now();
    let mut number = 0;
    while began.elapsed() < Duration::from_secs(options.seconds) {
        for _ in 0..BACK_TO_BACK_OPS {
            timed(&mut times, || call(number));
            number += 1;
        }
        thread::sleep(DRAIN_PAUSE);
    }
    Case::of(name, &times)
}

fn timed(times: &mut Histogram<u64>, call: impl FnOnce()) {
    let began = Instant::now();
    call();
    let took = began.elapsed();
    times.saturating_record(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
}

fn times() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 1_000_000_000, 3).expect("valid bounds")
}

impl Case {
    fn of(name: &str, times: &Histogram<u64>) -> Self {
        Self {
            name: name.to_owned(),
            calls: times.len(),
            p50_ns: times.value_at_quantile(0.5),
            p99_ns: times.value_at_quantile(0.99),
            p999_ns: times.value_at_quantile(0.999),
            max_ns: times.max(),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [calls, p50, p99, p999, max] = ["calls", "p50 ns", "p99 ns", "p99.9 ns", "max ns"];
        writeln!(f, "{:<32}{calls:>9}{p50:>9}{p99:>9}{p999:>10}{max:>12}", "")?;
        for case in &self.cases {
            let Case { name, calls, .. } = case;
            let (p50, p99, p999, max) = (case.p50_ns, case.p99_ns, case.p999_ns, case.max_ns);
            writeln!(f, "{name:<32}{calls:>9}{p50:>9}{p99:>9}{p999:>10}{max:>12}")?;
        }
        write!(
            f,
            "the agent adds {} KiB idle, {} KiB with {QUEUED_OPS} operations queued, {} descriptors, {} threads",
            self.added_kib_idle, self.added_kib_queued, self.added_descriptors, self.added_threads
        )
    }
}

/// Fills the queue; the most that was resident until everything was spooled and waits for the hub.
fn queue_kib(agent: &Agent, happenings: &Happenings) -> u64 {
    let mut most = 0;
    for number in 0..QUEUED_OPS {
        agent
            .submit(&happenings.submission(number))
            .expect("below the queue's bound");
    }
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(3) {
        most = most.max(Footprint::read().kib);
        thread::sleep(Duration::from_millis(1));
    }
    most
}

/// What this process takes.
struct Footprint {
    kib: u64,
    descriptors: usize,
    threads: usize,
}

impl Footprint {
    fn read() -> Self {
        let status = std::fs::read_to_string("/proc/self/status").expect("Linux has it");
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = resident.and_then(|text| text.trim().trim_end_matches(" kB").parse().ok());
        let entries = |folder: &str| std::fs::read_dir(folder).expect("Linux has it").count();
        Self {
            kib: kib.expect("a number of KiB"),
            descriptors: entries("/proc/self/fd"),
            threads: entries("/proc/self/task"),
        }
    }
}
