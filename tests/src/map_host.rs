//! A program that hosts maps, as a map server does: it writes each map that it holds every few milliseconds, ends one that is to
//! pass on, and writes what becomes of its operations, one a line: `APPLIED <id>`.

use std::{
    collections::HashSet,
    io::{Read as _, Write as _, stdin, stdout},
    path::Path,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use p2p_sync_agent::{Agent, AgentEvent, Config, LeaseState, Priority, Question, Submission};
use p2p_sync_proto::v1::SyncDataType;

/// For the outbox to drain when the input has ended.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(30);

/// Until the input ends: `<configuration> <milliseconds between two writes of a map> <map,map>`.
pub(crate) fn run(config: &Path, every: Duration, maps: &[String]) -> ExitCode {
    let config = Config::load(config).expect("made by the run");
    let started = Agent::start_observed(config, |event| {
        let state = serde_json::to_value(event.settled.state).expect("plain data");
        let state = state.as_str().unwrap_or_default();
        // A reader that went away is told nothing more.
        let _ = writeln!(stdout().lock(), "{state} {}", event.operation_id);
    });
    let agent = started.expect("the outbox can be opened");
    let over = Arc::new(AtomicBool::new(false));
    let told = over.clone();
    thread::spawn(move || {
        let _end = stdin().read_to_end(&mut Vec::new());
        told.store(true, Ordering::Relaxed);
    });
    let mut ending: HashSet<String> = HashSet::new();
    let mut tick = Instant::now();
    while !over.load(Ordering::Relaxed) {
        while let Some(event) = agent.next_event(|_| true) {
            match event {
                AgentEvent::LeaseHandingOver { map, .. } => {
                    // Where it is too late for that, the lease says so.
                    let _asked = agent.ask(Question::ReleaseMap { map: map.clone() }, false);
                    ending.insert(map);
                }
                AgentEvent::LeaseGranted { map } | AgentEvent::LeaseLost { map } => {
                    ending.remove(&map);
                }
                _ => {}
            }
        }
        for (number, map) in (1..).zip(maps) {
            if agent.lease(map) == LeaseState::Held && !ending.contains(map) {
                write(&agent, map, number);
            }
        }
        tick += every;
        let rest = tick.saturating_duration_since(Instant::now());
        if rest.is_zero() {
            tick = Instant::now();
        }
        // An event ends the rest, as it would be seen by a loop that turns more often.
        agent.wait_for_event(rest);
        thread::sleep(
            tick.saturating_duration_since(Instant::now())
                .min(Duration::from_millis(2)),
        );
    }
    agent.flush(FLUSH_TIMEOUT);
    match agent.shutdown() {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("{problem}");
            ExitCode::FAILURE
        }
    }
}

fn write(agent: &Agent, map: &str, number: u32) {
    let payload = format!(r#"{{"char_id":{number},"text":"hi"}}"#);
    let submission = Submission {
        data_type: SyncDataType::ChatMessage,
        map,
        account_id: 2_000_001,
        entity: None,
        char_id: None,
        payload: Some(&payload),
        priority: Priority::Critical,
        notify: false,
    };
    if let Err(problem) = agent.submit(&submission) {
        eprintln!("{map}: {problem}");
    }
}
