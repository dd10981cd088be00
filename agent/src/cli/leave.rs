//! `leave`: hands this host's maps over, waits until everything taken is settled, and ends the agent that runs.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use p2p_sync_proto::Problem;
use serde_json::Value;

use super::drain::{Asked, ROUND};
use crate::{
    Config,
    local_api::{Action, Request},
};

/// Waits at most `timeout`, or as long as it takes.
pub(super) fn leave(config: Config, timeout: Option<Duration>) -> Result<ExitCode, Problem> {
    let deadline = timeout.map(|timeout| Instant::now() + timeout);
    let mut asked = Asked::new(config);
    let mut told = String::new();
    loop {
        let left = asked.ask(&of(Action::Leave))?;
        if left["left"] == true {
            // It may be gone before it answers.
            let _ = asked.end(&of(Action::Stop));
            eprintln!("p2p-sync-agent: this host holds no map, and everything is settled: it may be switched off");
            return Ok(ExitCode::SUCCESS);
        }
        let progress = progress(&left);
        if progress != told {
            eprintln!("p2p-sync-agent: {progress}");
            told = progress;
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Ok(ExitCode::FAILURE);
        }
        std::thread::sleep(ROUND / 4);
    }
}

fn of(action: Action) -> Request {
    Request {
        action,
        ..Request::default()
    }
}

fn progress(left: &Value) -> String {
    let maps: Vec<&str> = left["maps"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let held = if maps.is_empty() {
        "none".to_owned()
    } else {
        maps.join(", ")
    };
    let waiting = format!(
        "maps that are held: {held}; operations that wait: {}",
        left["outbox_operations"]
    );
    match left["link_problem"].as_str() {
        Some(problem) => format!("{waiting}; {problem}"),
        None => waiting,
    }
}
