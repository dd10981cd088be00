//! Following streams of the hub: each change after the last one seen, in the order of the stream, as the hub pushes it and
//! there is room.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use p2p_sync_proto::{
    Code, Path, Problem,
    limits::{PATH_BYTES_MAX, UPDATE_STATES_MAX},
    path::{HOST_STREAM, PLAYER_STREAM, check_map},
    v1::{self, SyncDataType},
};
use tokio::{runtime::Handle, task::AbortHandle};

use crate::{
    config::Config,
    events::{Events, PAGE_UPDATES_MAX},
    follower::{Follower, Listener},
    link::Watcher,
    replica::Replicas,
};

/// Subscriptions of one agent at a time.
pub(crate) const SUBSCRIPTIONS_MAX: usize = 64;
const _: () = assert!(
    UPDATE_STATES_MAX <= PAGE_UPDATES_MAX as usize,
    "what a message tells has room where room is waited for"
);

/// What of the hub's state to follow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subscription {
    /// A map's name, `@player` or `@host`.
    pub stream: String,
    /// Empty: all types.
    pub types: Vec<SyncDataType>,
    /// Only paths that begin so; empty: all paths of the stream.
    pub path_prefix: String,
}

impl Subscription {
    fn check(&self) -> Result<(), Problem> {
        if self.stream != PLAYER_STREAM && self.stream != HOST_STREAM {
            check_map(&self.stream)?;
        }
        if self.path_prefix.len() > PATH_BYTES_MAX {
            let sentence = format!("a path has at most {PATH_BYTES_MAX} bytes: follow a shorter prefix");
            return Err(Problem::new(Code::BadPath, sentence));
        }
        Ok(())
    }

    /// All that a stream has.
    pub(crate) fn whole(stream: &str) -> Self {
        Self {
            stream: stream.to_owned(),
            types: vec![],
            path_prefix: String::new(),
        }
    }

    /// Whether all that begins so is among what it follows.
    pub(crate) fn covers_all(&self, prefix: &str) -> bool {
        let stream = match prefix.split_once('/') {
            Some(("@char" | "@account", _)) => PLAYER_STREAM,
            Some(("@host", _)) => HOST_STREAM,
            Some((map, _)) => map,
            None => return false,
        };
        stream == self.stream && prefix.starts_with(&self.path_prefix) && self.types.is_empty()
    }

    /// Whether a path is among what it follows.
    pub(crate) fn covers(&self, path: &Path) -> bool {
        let parts = path.parts();
        parts.scope.stream() == self.stream
            && path.as_str().starts_with(&self.path_prefix)
            && (self.types.is_empty() || self.types.contains(&parts.data_type))
    }

    /// Asks for it from a position on.
    pub(crate) fn request(&self, at: u64, timeline: u64) -> v1::SubscribeRequest {
        let prefix = (!self.path_prefix.is_empty()).then(|| self.path_prefix.clone());
        v1::SubscribeRequest {
            from: vec![v1::StreamPosition {
                stream: self.stream.clone(),
                sequence: at,
            }],
            types: self.types.iter().map(|data_type| (*data_type).into()).collect(),
            path_prefixes: prefix.into_iter().collect(),
            timeline,
        }
    }
}

/// The subscriptions that are followed.
pub(crate) struct Subscriptions {
    watcher: Arc<Watcher>,
    replicas: Arc<Replicas>,
    retry_delay: (Duration, Duration),
    last: AtomicU64,
    followed: Mutex<HashMap<u64, Followed>>,
}

struct Followed {
    task: AbortHandle,
    ended: Arc<AtomicBool>,
    events: Arc<Events>,
}

impl Subscriptions {
    /// What the program follows is kept in `replicas`.
    pub(crate) fn new(config: &Config, watcher: Arc<Watcher>, replicas: Arc<Replicas>) -> Self {
        Self {
            watcher,
            replicas,
            retry_delay: config.retry_delay,
            last: AtomicU64::new(0),
            followed: Mutex::default(),
        }
    }

    /// Follows a stream from its beginning; what changes is told to `events`. Waits for nothing.
    ///
    /// With `closes`, `events` is closed when nothing more will come.
    pub(crate) fn begin(
        &self,
        runtime: &Handle,
        subscription: Subscription,
        events: &Arc<Events>,
        closes: bool,
    ) -> Result<u64, Problem> {
        subscription.check()?;
        let mut all = self.lock();
        if all.len() >= SUBSCRIPTIONS_MAX {
            let sentence = format!("{SUBSCRIPTIONS_MAX} subscriptions are followed already: end one");
            return Err(Problem::new(Code::QueueFull, sentence));
        }
        let id = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        let ended = Arc::new(AtomicBool::new(false));
        // What is watched for another is kept there.
        let replicas = (!closes).then(|| self.replicas.clone());
        if let Some(replicas) = &replicas {
            replicas.begin(id, subscription.clone());
        }
        let listener = Listener::Program {
            events: events.clone(),
            ended: ended.clone(),
        };
        let follower = Follower::new(id, self.watcher.clone(), subscription, self.retry_delay, listener);
        let follower = match replicas {
            Some(replicas) => follower.kept_in(replicas),
            None => follower,
        };
        let closing = closes.then(|| CloseOnDrop(events.clone()));
        let task = runtime.spawn(async move {
            let _closing = closing;
            follower.follow().await;
        });
        let task = task.abort_handle();
        let events = events.clone();
        all.insert(id, Followed { task, ended, events });
        Ok(id)
    }

    /// Ends a subscription: nothing of it is told any more.
    pub(crate) fn end(&self, id: u64) -> bool {
        let Some(followed) = self.lock().remove(&id) else {
            return false;
        };
        followed.task.abort();
        self.replicas.end(id);
        // Before what it told is taken back, so that nothing comes in between.
        followed.ended.store(true, Ordering::SeqCst);
        followed.events.forget_updates(id);
        true
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Followed>> {
        self.followed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct CloseOnDrop(Arc<Events>);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_stream_is_refused() {
        let refused = |stream: &str| {
            let subscription = Subscription {
                stream: stream.to_owned(),
                types: vec![],
                path_prefix: String::new(),
            };
            subscription.check().map_err(|problem| problem.code)
        };
        assert_eq!(refused("@player"), Ok(()));
        assert_eq!(refused("@nobody"), Err(Code::BadMap));
        assert_eq!(refused(""), Err(Code::BadMap));
    }
}
