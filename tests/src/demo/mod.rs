//! The demo: a recorded day of a map server, from two agents through a hub into Postgres and back out.
//!
//! One agent is killed hard midway and started again. At the end every operation is accounted for, by what Postgres
//! holds.

mod account;
mod replay;

use std::{
    collections::BTreeSet,
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Parser;
use serde_json::json;

use crate::{
    recording,
    stack::{Agent, Hub, HubDatabase},
};

/// Replays a recorded map server through two agents into an embedded hub, and accounts for every operation.
#[derive(Debug, Parser)]
#[command(name = "demo", version)]
pub struct Options {
    /// How many times faster than it was recorded.
    #[arg(long, default_value_t = 4.0)]
    speed: f64,
    /// Leave hub and agents running at the end, and say how to look around.
    #[arg(long)]
    stay: bool,
}

const HOSTS: u64 = 2;
/// For the outboxes to drain at the end; a machine that is busy building needs some of it.
const FLUSH_TIMEOUT: Duration = Duration::from_mins(2);

/// Runs the demo; success only if every operation is accounted for.
pub fn run(options: &Options) -> ExitCode {
    let program = std::env::current_exe().expect("a running program has a path");
    let folder = tempfile::Builder::new()
        .prefix("p2p-sync-demo-")
        .tempdir()
        .expect("a folder can be made");
    let leases = [("leases", "required".to_owned())];
    let mut hub = Hub::new(&program, &folder.path().join("hub"), &HubDatabase::Embedded, &leases);
    println!("demo: hub with an embedded Postgres in {}", folder.path().display());
    let happenings = recording::with_synthetic_share();
    let hosts = usize::try_from(HOSTS).expect("few");
    let credentials: Vec<String> = (0..hosts)
        .map(|host| {
            let of_host = happenings.iter().filter(|one| replay::host_of(one, hosts) == host);
            let maps: BTreeSet<&str> = of_host
                .map(|one| one.map.as_str())
                .filter(|map| !map.is_empty())
                .collect();
            let maps: Vec<&str> = maps.into_iter().collect();
            println!("demo: host {} is granted {}", host + 1, maps.join(", "));
            hub.add_host_of(u32::try_from(host + 1).expect("few"), &maps)
        })
        .collect();
    let address = hub.start();
    println!("demo: hub serving on {address}; two hosts admitted");
    let mut agents: Vec<Agent> = credentials
        .iter()
        .enumerate()
        .map(|(host, credential)| {
            let folder = folder.path().join(format!("host{}", host + 1));
            let mut agent = Agent::new(&program, &folder, &address, credential, &[]);
            agent.start();
            agent
        })
        .collect();

    agents.iter_mut().for_each(wait_for_leases);
    let sent = replay::replay(&mut agents, &happenings, options.speed);
    for (host, agent) in agents.iter_mut().enumerate() {
        if !agent.flush(FLUSH_TIMEOUT) {
            println!("demo: the outbox of host {} did not drain: {}", host + 1, agent.log());
        }
    }
    agents.iter_mut().for_each(Agent::stop);
    hub.stop();
    println!("demo: all stopped; reading everything back from Postgres");
    let account = account::account(&hub_data(folder.path()), &agents, &sent, &happenings);
    if options.stay {
        stay(&mut hub, &mut agents, folder.path());
    }
    println!("{account}");
    if account.adds_up() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Until an agent has heard which maps are its own, it writes none.
fn wait_for_leases(agent: &mut Agent) {
    let began = Instant::now();
    while agent.ask(json!({"do": "status"}))["leases_required"] != true {
        assert!(
            began.elapsed() < FLUSH_TIMEOUT,
            "the hub told no leases: {}",
            agent.log()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn hub_data(folder: &Path) -> std::path::PathBuf {
    folder.join("hub/database")
}

/// Brings the system up again and waits for Ctrl-C.
fn stay(hub: &mut Hub, agents: &mut [Agent], folder: &Path) {
    let address = hub.start();
    println!("demo: staying up; the hub serves on {address}. Look around in another terminal, for instance:");
    let conf = agents[0].config().display().to_string();
    for arguments in [
        "get prontera/MAP_STATE",
        "scan prontera/ --limit 5",
        "scan @char/ --limit 5",
        "status",
    ] {
        println!("  cargo run --release --bin demo -- agent {arguments} --config {conf}");
    }
    println!(
        "demo: configuration, outboxes and logs are in {}; Ctrl-C ends it",
        folder.display()
    );
    // The agents' address is the hub's new one.
    for agent in agents.iter() {
        let text = std::fs::read_to_string(agent.config()).expect("written at the start");
        let rest: Vec<&str> = text.lines().skip(1).collect();
        let moved = format!("main_server_endpoint = {address}\n{}\n", rest.join("\n"));
        std::fs::write(agent.config(), moved).expect("the folder can be written");
    }
    agents.iter_mut().for_each(Agent::start);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime can be made");
    // An error means that signals cannot be awaited: then there is nothing to stay for.
    let _ = runtime.block_on(tokio::signal::ctrl_c());
    agents.iter_mut().for_each(Agent::stop);
    hub.stop();
}
