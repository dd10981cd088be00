//! The cache calls of an attached program.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use p2p_sync_proto::{
    Code, Problem,
    cache::{check_channel, check_key, check_own_key, check_value},
};
use serde_json::Value;

use super::{Attached, lock, milliseconds};
use crate::{
    local_api::{Action, Request},
    read::unexpected,
};

/// The hosts' cache, with the near cache of the standalone agent. What is written goes to it in the background and in
/// order, and is given up if it is not there for 10 s; reads come behind the writes of this program.
impl Attached {
    /// As [`crate::Agent::cache_set`]. What the agent refuses later, `QUEUE_FULL` among it, is logged.
    pub fn cache_set(&self, key: &str, value: &str, expiry_seconds: u32) -> Result<(), Problem> {
        self.inner.check_enabled()?;
        check_own_key(key)?;
        check_value(value)?;
        let default = || u32::try_from(self.inner.config.cache_expiry.as_secs()).unwrap_or(u32::MAX);
        self.inner.errands.send(Request {
            action: Action::CacheSet,
            key: key.to_owned(),
            value: value.to_owned(),
            expiry_seconds: if expiry_seconds == 0 { default() } else { expiry_seconds },
            ..Request::default()
        })
    }

    /// As [`crate::Agent::cache_get`]; waits at most `timeout` for the agent and the hub together. After one such wait was
    /// in vain, and while no agent is there, these calls answer at once until the agent answers again.
    pub fn cache_get(&self, key: &str, timeout: Duration) -> Result<Option<Arc<str>>, Problem> {
        let answer = self.ask_cache(Action::CacheGet, key, timeout)?;
        match &answer["value"] {
            Value::String(value) => Ok(Some(value.as_str().into())),
            Value::Null => Ok(None),
            _ => Err(unexpected()),
        }
    }

    /// As [`crate::Agent::cache_delete`]. What the agent refuses later is logged.
    pub fn cache_delete(&self, key: &str) -> Result<(), Problem> {
        self.inner.check_enabled()?;
        check_own_key(key)?;
        self.inner.errands.send(Request {
            action: Action::CacheDelete,
            key: key.to_owned(),
            ..Request::default()
        })
    }

    /// As [`crate::Agent::cache_exists`]; waits as [`Self::cache_get`].
    pub fn cache_exists(&self, key: &str, timeout: Duration) -> Result<bool, Problem> {
        let answer = self.ask_cache(Action::CacheExists, key, timeout)?;
        answer["exists"].as_bool().ok_or_else(unexpected)
    }

    /// As [`crate::Agent::publish`]. What the agent refuses later, `UNSUPPORTED` among it, is logged.
    pub fn publish(&self, channel: &str, message: &str) -> Result<(), Problem> {
        self.inner.check_enabled()?;
        check_channel(channel)?;
        check_value(message)?;
        self.inner.errands.send(Request {
            action: Action::Publish,
            channel: channel.to_owned(),
            message: message.to_owned(),
            ..Request::default()
        })
    }

    /// What waiting calls wait at most where they are not told.
    pub(crate) fn critical_timeout(&self) -> Duration {
        self.inner.config.critical_timeout
    }

    fn ask_cache(&self, action: Action, key: &str, timeout: Duration) -> Result<Value, Problem> {
        self.inner.check_enabled()?;
        check_key(key)?;
        if let Some(problem) = lock(&self.inner.known).problem.clone() {
            return Err(problem);
        }
        let silent = &self.inner.cache_silent;
        if silent.load(Ordering::Relaxed) {
            return Err(self.inner.silent());
        }
        let request = Request {
            action,
            key: key.to_owned(),
            timeout_ms: milliseconds(timeout).max(1),
            ..Request::default()
        };
        let begun = Instant::now();
        let answer = self.inner.errands.ask(request, timeout);
        let unavailable = matches!(&answer, Err(problem) if problem.code == Code::HubUnavailable);
        if unavailable && begun.elapsed() >= timeout {
            // Whoever carries the errands finds out when the agent answers again.
            silent.store(true, Ordering::Relaxed);
        }
        answer
    }
}
