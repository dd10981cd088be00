//! Where a map server's calls go: to an agent of its own, or to the standalone agent beside it.

use std::{sync::Arc, time::Duration};

use p2p_sync_proto::Problem;
use uuid::Uuid;

use crate::{Agent, AgentEvent, Attached, Config, LeaseState, Question, Settled, Status, Submission, Subscription};

/// Either kind of agent, with the same calls.
pub(crate) enum Door {
    /// In this process, with its outbox.
    Own(Agent),
    /// In a process of its own, behind a socket.
    Beside(Attached),
}

/// Passes a call on to whichever it is.
macro_rules! through {
    ($door:expr, $call:ident($($argument:expr),*)) => {
        match $door {
            Door::Own(agent) => agent.$call($($argument),*),
            Door::Beside(attached) => attached.$call($($argument),*),
        }
    };
}

impl Door {
    pub(crate) fn open(config: Config) -> Result<Self, Problem> {
        if config.agent_socket.is_some() {
            Attached::start(config).map(Self::Beside)
        } else {
            Agent::start(config).map(Self::Own)
        }
    }

    pub(crate) fn submit(&self, submission: &Submission<'_>) -> Result<Uuid, Problem> {
        through!(self, submit(submission))
    }

    pub(crate) fn submit_critical(&self, submission: &Submission<'_>) -> Result<(Uuid, Settled), Problem> {
        through!(self, submit_critical(submission))
    }

    pub(crate) fn submit_group(&self, members: &[Submission<'_>], notify: bool) -> Result<Uuid, Problem> {
        through!(self, submit_group(members, notify))
    }

    pub(crate) fn result(&self, id: Uuid) -> Settled {
        through!(self, result(id))
    }

    pub(crate) fn wait(&self, id: Uuid, timeout: Option<Duration>) -> Settled {
        through!(self, wait(id, timeout))
    }

    pub(crate) fn ask(&self, question: Question, notify: bool) -> Result<Uuid, Problem> {
        through!(self, ask(question, notify))
    }

    pub(crate) fn wait_for_answer(&self, id: Uuid) -> Settled {
        through!(self, wait_for_answer(id))
    }

    pub(crate) fn subscribe(&self, subscription: Subscription) -> Result<u64, Problem> {
        through!(self, subscribe(subscription))
    }

    pub(crate) fn unsubscribe(&self, subscription: u64) -> bool {
        through!(self, unsubscribe(subscription))
    }

    pub(crate) fn next_own_event(&self, fits: impl FnOnce(&AgentEvent) -> bool) -> Option<AgentEvent> {
        through!(self, next_own_event(fits))
    }

    pub(crate) fn cache_set(&self, key: &str, value: &str, expiry_seconds: u32) -> Result<(), Problem> {
        through!(self, cache_set(key, value, expiry_seconds))
    }

    pub(crate) fn cache_get(&self, key: &str, timeout: Option<Duration>) -> Result<Option<Arc<str>>, Problem> {
        through!(self, cache_get(key, timeout.unwrap_or(self.critical_timeout())))
    }

    pub(crate) fn cache_delete(&self, key: &str) -> Result<(), Problem> {
        through!(self, cache_delete(key))
    }

    pub(crate) fn cache_exists(&self, key: &str, timeout: Option<Duration>) -> Result<bool, Problem> {
        through!(self, cache_exists(key, timeout.unwrap_or(self.critical_timeout())))
    }

    pub(crate) fn publish(&self, channel: &str, message: &str) -> Result<(), Problem> {
        through!(self, publish(channel, message))
    }

    /// What waiting calls wait at most where they are not told.
    fn critical_timeout(&self) -> Duration {
        through!(self, critical_timeout())
    }

    pub(crate) fn lease(&self, map: &str) -> LeaseState {
        through!(self, lease(map))
    }

    pub(crate) fn status(&self) -> Status {
        through!(self, status())
    }

    pub(crate) fn flush(&self, timeout: Duration) -> bool {
        through!(self, flush(timeout))
    }

    /// `SHUTDOWN_INCOMPLETE` where not all threads ended in time, or operations are lost.
    pub(crate) fn shutdown(&self, timeout: Duration) -> Result<(), Problem> {
        through!(self, shutdown_within(timeout))
    }
}
