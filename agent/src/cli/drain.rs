//! `drain`: waits until everything taken is settled, with or without a running agent.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use p2p_sync_proto::Problem;
use serde_json::Value;

use crate::{
    Agent, Config,
    local_api::{self, Action, Request},
    unsaid::Unsaid,
};

/// How often progress is told.
pub(super) const ROUND: Duration = Duration::from_secs(1);

/// Who is asked: found anew each time, for an agent may be stopped or started meanwhile.
pub(super) struct Asked {
    config: Config,
    /// Opened here while no other agent runs.
    agent: Option<Agent>,
}

/// Waits at most `timeout`, or as long as it takes.
pub(super) fn drain(config: Config, timeout: Option<Duration>) -> Result<ExitCode, Problem> {
    let deadline = timeout.map(|timeout| Instant::now() + timeout);
    let mut drain = Asked::new(config);
    let mut told = String::new();
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let round = left.map_or(ROUND, |left| left.min(ROUND));
        let flush = Request {
            action: Action::Flush,
            timeout_ms: u64::try_from(round.as_millis()).unwrap_or(u64::MAX),
            ..Request::default()
        };
        if drain.ask(&flush)?["flushed"] == true {
            eprintln!("p2p-sync-agent: drained");
            return Ok(ExitCode::SUCCESS);
        }
        let status = Request {
            action: Action::Status,
            ..Request::default()
        };
        let progress = progress(&drain.ask(&status)?);
        if progress != told {
            eprintln!("p2p-sync-agent: {progress}");
            told = progress;
        }
        if left.is_some_and(|left| left <= round) {
            return Ok(ExitCode::FAILURE);
        }
    }
}

impl Asked {
    /// What is opened for this alone tells nothing of itself.
    pub(super) fn new(config: Config) -> Self {
        let config = Config {
            metrics_interval: None,
            ..config
        };
        Self { config, agent: None }
    }

    /// Ends an agent that runs by a request, or the one that was opened here.
    pub(super) fn end(self, request: &Request) -> Result<(), Problem> {
        match self.agent {
            Some(agent) => agent.shutdown(),
            None => local_api::ask(&self.config.socket_path(), request).map_or(Ok(()), |told| told.map(|_| ())),
        }
    }

    pub(super) fn ask(&mut self, request: &Request) -> Result<Value, Problem> {
        if let Some(agent) = &self.agent {
            return local_api::answer(agent, request, &Unsaid::default());
        }
        if let Some(answer) = local_api::ask(&self.config.socket_path(), request) {
            return answer;
        }
        let agent = self.agent.insert(Agent::start(self.config.clone())?);
        local_api::answer(agent, request, &Unsaid::default())
    }
}

fn progress(status: &Value) -> String {
    let operations = &status["outbox_operations"];
    match status["link_problem"].as_str() {
        Some(problem) => format!("operations that wait: {operations}; {problem}"),
        None => format!("operations that wait: {operations}"),
    }
}
