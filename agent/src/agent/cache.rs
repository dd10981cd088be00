//! The cache calls of an agent.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use p2p_sync_proto::{
    Code, Problem,
    cache::{check_channel, check_key, check_own_key, check_value},
    limits::CACHE_EXPIRY_SECONDS_MAX,
    v1::{self, pull_reply, pull_request::What},
};

use super::Agent;
use crate::{near_cache::Known, read::unexpected};

/// The hosts' cache: values of this host's own, by text keys, and the operator's under keys that begin with `shared:`.
/// They are not durable: use operations for what must not be lost.
impl Agent {
    /// Caches a value for so many seconds; 0 takes `cache_expiry_seconds`, 30 days are the longest. Never waits: it is
    /// seen here at once and goes to the hub in the background.
    ///
    /// `QUEUE_FULL` where too much waits for the hub, `TOO_LARGE`, `BAD_TEXT`, `NOT_ALLOWED` for the shared keys.
    pub fn cache_set(&self, key: &str, value: &str, expiry_seconds: u32) -> Result<(), Problem> {
        self.check_enabled()?;
        check_own_key(key)?;
        check_value(value)?;
        let expiry = match expiry_seconds {
            0 => self.shared.config.cache_expiry,
            seconds => Duration::from_secs(seconds.min(CACHE_EXPIRY_SECONDS_MAX).into()),
        };
        self.shared.near_cache().set(key, value, expiry, Instant::now())?;
        self.shared.cache_wake.notify_one();
        Ok(())
    }

    /// The value at a key: from the near cache, else from the hub, waiting at most `timeout`. After one such wait was in
    /// vain, and while the link is known to be down, calls that need the hub answer at once until the link answers again.
    ///
    /// `HUB_UNAVAILABLE` without an answer, `SHUT_DOWN`, `TOO_LARGE`, `BAD_TEXT`.
    pub fn cache_get(&self, key: &str, timeout: Duration) -> Result<Option<Arc<str>>, Problem> {
        self.check_enabled()?;
        check_key(key)?;
        let asked = match self.shared.near_cache().look_up(key, Instant::now()) {
            Known::Value(value) => return Ok(Some(value)),
            Known::Absent => return Ok(None),
            Known::Unknown(asked) => asked,
        };
        match self.ask_cache(What::CacheGet(v1::CacheGet { key: key.to_owned() }), timeout) {
            Ok(pull_reply::What::CacheValue(told)) => {
                self.shared.near_cache().note_read(key, &told, asked, Instant::now());
                Ok(Some(told.value.into()))
            }
            Ok(_) => Err(unexpected()),
            Err(problem) if problem.code == Code::NotFound => Ok(None),
            Err(problem) => Err(problem),
        }
    }

    /// Removes a value. Never waits, as [`Self::cache_set`], with its refusals.
    pub fn cache_delete(&self, key: &str) -> Result<(), Problem> {
        self.check_enabled()?;
        check_own_key(key)?;
        self.shared.near_cache().delete(key, Instant::now())?;
        self.shared.cache_wake.notify_one();
        Ok(())
    }

    /// Whether there is a value at a key; waits and refuses as [`Self::cache_get`].
    pub fn cache_exists(&self, key: &str, timeout: Duration) -> Result<bool, Problem> {
        self.check_enabled()?;
        check_key(key)?;
        match self.shared.near_cache().look_up(key, Instant::now()) {
            Known::Value(_) => return Ok(true),
            Known::Absent => return Ok(false),
            Known::Unknown(_) => {}
        }
        match self.ask_cache(What::CacheExists(v1::CacheExists { key: key.to_owned() }), timeout)? {
            pull_reply::What::CacheFlag(there) => Ok(there),
            _ => Err(unexpected()),
        }
    }

    /// Sends a message to those who listen on a channel of this host at the hub. Never waits; a message that the hub
    /// has not taken within 10 s is given up, and one whose answer was lost may be heard twice.
    ///
    /// `QUEUE_FULL`, `TOO_LARGE`, `BAD_TEXT`, and `UNSUPPORTED` once a hub without Redis has said that nobody can listen.
    pub fn publish(&self, channel: &str, message: &str) -> Result<(), Problem> {
        self.check_enabled()?;
        check_channel(channel)?;
        check_value(message)?;
        self.shared.near_cache().publish(channel, message, Instant::now())?;
        self.shared.cache_wake.notify_one();
        Ok(())
    }

    /// What waiting calls wait at most where they are not told.
    pub(crate) fn critical_timeout(&self) -> Duration {
        self.shared.config.critical_timeout
    }

    fn ask_cache(&self, what: What, timeout: Duration) -> Result<pull_reply::What, Problem> {
        let (link, silent) = (&self.shared.link, &self.shared.cache_silent);
        if silent.load(Ordering::Relaxed) || (link.problem().is_some() && !link.answers()) {
            let sentence = "the link to the hub is down: do without the value until it is up again";
            return Err(Problem::new(Code::HubUnavailable, sentence));
        }
        let begun = Instant::now();
        let told = self.pull_within(v1::PullRequest { what: Some(what) }, timeout, timeout);
        let unavailable = matches!(&told, Err(problem) if problem.code == Code::HubUnavailable);
        if unavailable && begun.elapsed() >= timeout {
            // Whoever carries the writes finds out when the hub answers again.
            silent.store(true, Ordering::Relaxed);
            self.shared.cache_wake.notify_one();
        }
        told?.what.ok_or_else(unexpected)
    }
}
