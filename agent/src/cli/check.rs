//! `check`: one line for each thing, `ok` or what to do.

use std::{path::Path, process::ExitCode, time::Duration};

use p2p_sync_proto::{Code, Problem};

use crate::{
    Agent, Config, Status, clock, link,
    local_api::{self, Action, Request},
};

/// For a running agent to say how it is.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Asks the agent that runs, or opens the outbox and says hello to the hub for the one question.
pub(super) fn check(file: &Path) -> ExitCode {
    let config = match Config::load(file) {
        Ok(config) => config,
        Err(problems) => {
            println!("settings: {problems}");
            return ExitCode::FAILURE;
        }
    };
    println!("settings: ok ({})", file.display());
    for warning in &config.warnings {
        println!("settings: {warning}");
    }
    let trusted = told("tls", &tls(&config).map_err(|problem| problem.to_string()));
    let found = match agent_status(&config) {
        Some(status) => status.map(|status| {
            (
                format!("in use by the agent at {}", config.socket_path().display()),
                status,
            )
        }),
        None => opened(config).map(|status| ("opened".to_owned(), status)),
    };
    let (how, status) = match found {
        Ok(found) => found,
        Err(problem) => return all_well(&[trusted, told("outbox", &Err(problem.to_string()))]),
    };
    all_well(&[
        trusted,
        told("outbox", &outbox(&how, &status)),
        told("hub", &hub(&status)),
        told("clock", &clock(&status)),
    ])
}

fn all_well(well: &[bool]) -> ExitCode {
    if well.iter().all(|well| *well) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn told(what: &str, found: &Result<String, String>) -> bool {
    match found {
        Ok(found) => println!("{what}: ok ({found})"),
        Err(problem) => println!("{what}: {problem}"),
    }
    found.is_ok()
}

/// What the hub's certificate says, by a connection of its own.
fn tls(config: &Config) -> Result<String, Problem> {
    if !config.endpoint.starts_with("https:") {
        return Ok("not used: plaintext, as the endpoint says".to_owned());
    }
    let runtime = link::runtime(1)?;
    runtime.block_on(link::connect::inspect(config))
}

fn agent_status(config: &Config) -> Option<Result<Status, Problem>> {
    let request = Request {
        action: Action::Status,
        ..Request::default()
    };
    let answer = local_api::ask_within(&config.socket_path(), &request, ANSWER_TIMEOUT)?;
    let other = |_| {
        Problem::new(
            Code::UpgradeRequired,
            "the running agent is of another version: start it anew",
        )
    };
    Some(answer.and_then(|answer| serde_json::from_value(answer).map_err(other)))
}

fn opened(config: Config) -> Result<Status, Problem> {
    let patience = config.connect_timeout * 2;
    let agent = Agent::start(config)?;
    agent.wait_for_link(patience);
    Ok(agent.status())
}

fn outbox(how: &str, status: &Status) -> Result<String, String> {
    let (folder, operations) = (status.outbox_dir.display(), status.outbox_operations);
    if status.outbox_full {
        let sentence = format!("{folder}: full, or its disk is: free space, or wait until the hub has caught up");
        return Err(Problem::new(Code::DiskError, sentence).to_string());
    }
    Ok(format!("{folder}: {how}, {operations} operations in it"))
}

fn hub(status: &Status) -> Result<String, String> {
    if status.link_up {
        return Ok(format!("{} knows host {}", status.endpoint, status.host_id));
    }
    let silent = || {
        let sentence = "the hub does not answer: check main_server_endpoint and the network";
        Problem::new(Code::HubUnavailable, sentence).to_string()
    };
    Err(status.link_problem.clone().unwrap_or_else(silent))
}

fn clock(status: &Status) -> Result<String, String> {
    match status.clock_skew_ms {
        Some(ahead_ms) => match clock::problem_of(ahead_ms) {
            Some(problem) => Err(problem.to_string()),
            None => Ok(format!("{} ms from the hub's", ahead_ms.unsigned_abs())),
        },
        // Why it has not is in the line above.
        None => Ok("the hub has not told its own".to_owned()),
    }
}
