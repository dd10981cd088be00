//! The isolation run: how long critical messages of quiet hosts take beside a host that sends a hundred times what it may,
//! and beside a thousand slow connections and a flood of resets, against how long they take without.
//!
//! The hub is a process of its own over real servers. Hosts are sealed by hand here: an agent would not misbehave so. Short
//! rounds measure both by turns, and the quantiles are of all rounds together, so that what else the machine does is in both.

mod host;
mod loud;
mod slow;

use std::{fmt, path::PathBuf, process::ExitCode, time::Duration};

use clap::Parser;
use hdrhistogram::Histogram;
use serde::Serialize;

use self::host::Host;
use crate::{
    load::redis_settings,
    services::{self, Database},
    stack::{Hub, HubDatabase},
    times::{Times, histogram},
};

/// Measures critical messages of quiet hosts, beside loud ones and without.
///
/// Fails when the p99 beside a loud host is more than 10 % above that without, when it is three times that without beside slow
/// connections, or when these take 100 MiB of the hub's memory.
#[derive(Debug, Parser)]
#[command(name = "isolation", version)]
pub struct Options {
    /// Pairs of measurements for each case.
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// How long each is.
    #[arg(long, default_value_t = 4)]
    seconds: u64,
    /// Quiet hosts.
    #[arg(long, default_value_t = 4)]
    hosts: u32,
    /// Critical messages of one operation that each of them sends a second.
    #[arg(long, default_value_t = 50)]
    calls: u32,
    /// What a host may send a second (`host_ops_per_second`). The loud one sends so much in the one measurement, and a hundred
    /// times as much in the other.
    #[arg(long, default_value_t = 500)]
    rate: u32,
    /// Slow connections.
    #[arg(long, default_value_t = 1000)]
    slow: u16,
    /// Where the figures are written as JSON.
    #[arg(long, default_value = "target/isolation.json")]
    json: PathBuf,
}

const GROWTH_MAX: f64 = 1.10;
const SLOW_GROWTH_MAX: f64 = 3.0;
const SLOW_MIB_MAX: f64 = 100.0;

/// What a run came to.
#[derive(Debug, Serialize)]
struct Report {
    rounds: usize,
    seconds: u64,
    quiet_hosts: u32,
    calls_per_second_each: u32,
    rate: u32,
    cases: Vec<Case>,
}

/// One case: every round's figures without and with what disturbs.
#[derive(Debug, Serialize)]
struct Case {
    name: &'static str,
    growth_max: f64,
    /// How long the quiet hosts' messages took, in all rounds.
    without: Times,
    with: Times,
    /// Of the p99.
    growth: f64,
    /// Quiet messages that were not applied.
    failed: u64,
    /// What the disturber got done: messages, connections or resets, by name.
    disturbed: Vec<(&'static str, u64)>,
    /// Of the hub's resident memory at most, where that is a bar.
    grown_mib: Option<f64>,
}

impl Case {
    fn failure(&self) -> Option<String> {
        if self.failed > 0 {
            return Some(format!(
                "{}: {} quiet messages were not applied",
                self.name, self.failed
            ));
        }
        if self.growth > self.growth_max {
            return Some(format!("{}: p99 is {:.2} times that without", self.name, self.growth));
        }
        let grown = self.grown_mib.filter(|grown| *grown >= SLOW_MIB_MAX)?;
        Some(format!("{}: the hub grew by {grown:.0} MiB", self.name))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "isolation: {} rounds of {} s by turns, {} quiet hosts x {} critical messages/s",
            self.rounds, self.seconds, self.quiet_hosts, self.calls_per_second_each
        )?;
        writeln!(
            f,
            "{:24}{:>10}{:>10}{:>10}{:>10}{:>8}{:>8}{:>9}",
            "", "p50 ms", "p99 ms", "p50 with", "p99 with", "growth", "failed", "+MiB"
        )?;
        for case in &self.cases {
            let grown = case.grown_mib.map_or_else(String::new, |grown| format!("{grown:.1}"));
            writeln!(
                f,
                "{:24}{:>10.2}{:>10.2}{:>10.2}{:>10.2}{:>8.2}{:>8}{grown:>9}   {:?}",
                case.name,
                case.without.p50_ms,
                case.without.p99_ms,
                case.with.p50_ms,
                case.with.p99_ms,
                case.growth,
                case.failed,
                case.disturbed
            )?;
        }
        Ok(())
    }
}

/// Runs every case; success only if every bar holds.
pub fn run(options: &Options) -> ExitCode {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime can be made");
    let report = Report {
        rounds: options.rounds,
        seconds: options.seconds,
        quiet_hosts: options.hosts,
        calls_per_second_each: options.calls,
        rate: options.rate,
        cases: runtime.block_on(measure(options)),
    };
    println!("{report}");
    let text = serde_json::to_string_pretty(&report).expect("plain data");
    if let Err(error) = std::fs::write(&options.json, text) {
        eprintln!("isolation: {} cannot be written: {error}", options.json.display());
        return ExitCode::FAILURE;
    }
    let failures: Vec<String> = report.cases.iter().filter_map(Case::failure).collect();
    for failure in &failures {
        println!("isolation: FAILED: {failure}");
    }
    if failures.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

async fn measure(options: &Options) -> Vec<Case> {
    let world = World::new(options).await;
    let mut cases = Vec::new();
    for (name, heeds) in [("100x, heeds the hub", true), ("100x, heeds nothing", false)] {
        let (mut without, mut with, mut disturbed) = (Measured::default(), Measured::default(), 0);
        for _ in 0..options.rounds {
            let modest = loud::Loud::start(&world.loud, options.rate, heeds).await;
            without.add(world.quiet(options).await);
            modest.stop().await;
            let loud = loud::Loud::start(&world.loud, options.rate * 100, heeds).await;
            with.add(world.quiet(options).await);
            disturbed += loud.stop().await;
        }
        cases.push(case(
            name,
            GROWTH_MAX,
            &without,
            &with,
            vec![("messages answered", disturbed)],
            None,
        ));
    }
    let (mut without, mut with) = (Measured::default(), Measured::default());
    let (mut held, mut resets, mut grown) = (0, 0, 0.0_f64);
    for _ in 0..options.rounds {
        let before = world.memory_mib();
        without.add(world.quiet(options).await);
        let slow = slow::Slow::start(world.address(), options.slow).await;
        with.add(world.quiet(options).await);
        held = held.max(slow.held());
        grown = grown.max(world.memory_mib() - before);
        resets += slow.stop().await;
    }
    let disturbed = vec![("connections held", held), ("resets", resets)];
    cases.push(case(
        "slow, and resets",
        SLOW_GROWTH_MAX,
        &without,
        &with,
        disturbed,
        Some(grown),
    ));
    cases
}

/// What all rounds measured of one of both.
struct Measured {
    times: Histogram<u64>,
    failed: u64,
}

impl Default for Measured {
    fn default() -> Self {
        Self {
            times: histogram(),
            failed: 0,
        }
    }
}

impl Measured {
    fn add(&mut self, (times, failed): (Histogram<u64>, u64)) {
        self.times.add(times).expect("of the same bounds");
        self.failed += failed;
    }
}

fn case(
    name: &'static str,
    growth_max: f64,
    without: &Measured,
    with: &Measured,
    disturbed: Vec<(&'static str, u64)>,
    grown_mib: Option<f64>,
) -> Case {
    let times = [&without.times, &with.times].map(Times::of);
    Case {
        name,
        growth_max,
        growth: times[1].p99_ms / times[0].p99_ms,
        failed: without.failed + with.failed,
        without: times[0],
        with: times[1],
        disturbed,
        grown_mib,
    }
}

/// A hub, its quiet hosts and the loud one.
struct World {
    hub: Hub,
    quiet: Vec<Host>,
    loud: Host,
    _folder: tempfile::TempDir,
    _database: Database,
}

impl World {
    async fn new(options: &Options) -> Self {
        let program = std::env::current_exe().expect("a running program has a path");
        let folder = tempfile::tempdir().expect("a folder can be made");
        let database = services::database().await;
        let mut settings = redis_settings(&services::shared_redis_url());
        settings.extend([
            ("host_ops_per_second", options.rate.to_string()),
            ("max_connections", "4096".to_owned()),
            ("max_connections_per_address", "64".to_owned()),
        ]);
        let server = HubDatabase::Server(database.url().to_owned());
        let mut hub = Hub::new(&program, &folder.path().join("hub"), &server, &settings);
        let credentials: Vec<String> = (0..=options.hosts).map(|account| hub.add_host(account + 1)).collect();
        let endpoint = hub.start();
        let mut hosts = Vec::new();
        for credential in &credentials {
            hosts.push(Host::connect(&endpoint, credential).await);
        }
        Self {
            hub,
            loud: hosts.remove(0),
            quiet: hosts,
            _folder: folder,
            _database: database,
        }
    }

    fn address(&self) -> std::net::SocketAddr {
        let address = self.hub.address().trim_start_matches("http://");
        address.parse().expect("an address")
    }

    /// How long the quiet hosts' messages take now, and how many were not applied.
    async fn quiet(&self, options: &Options) -> (Histogram<u64>, u64) {
        let mut all = histogram();
        let mut failed = 0;
        let seconds = Duration::from_secs(options.seconds);
        let calling = self
            .quiet
            .iter()
            .map(|host| host.call_on_schedule(options.calls, seconds));
        for (times, not_applied) in futures::future::join_all(calling).await {
            all.add(times).expect("of the same bounds");
            failed += not_applied;
        }
        (all, failed)
    }

    fn memory_mib(&self) -> f64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.hub.pid())).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<f64>().ok());
        kib.expect("Linux tells it") / 1024.0
    }
}
