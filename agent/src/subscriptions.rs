//! Following streams of the hub: each change after the last one seen, in the order of the stream, as there is room.

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
    limits::PATH_BYTES_MAX,
    path::{HOST_STREAM, PLAYER_STREAM, check_map},
    v1::{self, SyncDataType, pull_reply, pull_request},
};
use prost::bytes::Bytes;
use tokio::{
    runtime::Handle,
    task::AbortHandle,
    time::{sleep, timeout},
};

use crate::{
    config::Config,
    events::{AgentEvent, Events, PAGE_UPDATES_MAX},
    link::Puller,
    read, resend,
};

/// Subscriptions of one agent at a time.
const SUBSCRIPTIONS_MAX: usize = 64;
/// How long nothing is asked after a page that was the last one there.
const POLL_INTERVAL: Duration = Duration::from_millis(250);
/// For the hub to answer with a page.
const PAGE_TIMEOUT: Duration = Duration::from_secs(5);

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

    fn wants(&self, state: &v1::State) -> bool {
        let is_of_types = || Path::parse(&state.path).is_ok_and(|path| self.types.contains(&path.parts().data_type));
        state.path.starts_with(&self.path_prefix) && (self.types.is_empty() || is_of_types())
    }
}

/// The subscriptions that are followed.
pub(crate) struct Subscriptions {
    puller: Arc<Puller>,
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
    pub(crate) fn new(config: &Config, puller: Arc<Puller>) -> Self {
        Self {
            puller,
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
        let follower = Follower {
            id,
            puller: self.puller.clone(),
            subscription,
            cursor: Bytes::new(),
            snapshot: true,
            retry_delay: self.retry_delay,
            ended: ended.clone(),
            events: events.clone(),
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

/// Where a subscription is in its stream.
struct Follower {
    id: u64,
    puller: Arc<Puller>,
    subscription: Subscription,
    /// Empty at the beginning, and where the hub's database has gone back.
    cursor: Bytes,
    /// The next update begins a snapshot.
    snapshot: bool,
    retry_delay: (Duration, Duration),
    ended: Arc<AtomicBool>,
    events: Arc<Events>,
}

impl Follower {
    async fn follow(mut self) {
        let mut attempts = 0;
        let mut told = None;
        loop {
            match self.read_page().await {
                Ok(true) => attempts = 0,
                Ok(false) => {
                    (attempts, told) = (0, None);
                    sleep(POLL_INTERVAL).await;
                }
                Err(problem) if problem.code == Code::BadCursor && !self.cursor.is_empty() => {
                    let stream = &self.subscription.stream;
                    tracing::warn!(stream, "the hub's database has gone back: the stream is read anew");
                    self.cursor = Bytes::new();
                    self.snapshot = true;
                    // Hubs that do not agree on their timeline would have it read all day.
                    sleep(POLL_INTERVAL).await;
                }
                Err(problem) => {
                    if told.as_ref() != Some(&problem) {
                        tracing::warn!(stream = self.subscription.stream, "a subscription waits: {problem}");
                    }
                    told = Some(problem);
                    attempts += 1;
                    sleep(resend::delay(attempts, self.retry_delay, fastrand::f64())).await;
                }
            }
        }
    }

    /// Reads and tells the next page when there is room for it; gives whether there is more at once.
    async fn read_page(&mut self) -> Result<bool, Problem> {
        let room = self.events.room_for_page().await;
        let changes = v1::ChangesSince {
            stream: self.subscription.stream.clone(),
            limit: PAGE_UPDATES_MAX,
            cursor: self.cursor.clone(),
        };
        let request = v1::PullRequest {
            what: Some(pull_request::What::ChangesSince(changes)),
        };
        let silent = |_| Err(Problem::new(Code::HubUnavailable, "the hub did not answer in time"));
        let pulled = timeout(PAGE_TIMEOUT, self.puller.pull(request, PAGE_TIMEOUT)).await;
        let Some(pull_reply::What::Page(page)) = pulled.unwrap_or_else(silent)?.what else {
            return Err(read::unexpected());
        };
        if page.states.len() > PAGE_UPDATES_MAX as usize {
            return Err(read::unexpected());
        }
        let (subscription, wanted) = (self.id, &self.subscription);
        let snapshot = &mut self.snapshot;
        let updates = page.states.into_iter().filter(|state| wanted.wants(state));
        let updates = updates.map(|state| AgentEvent::Update {
            subscription,
            state,
            snapshot: std::mem::take(snapshot),
        });
        let updates: Vec<AgentEvent> = updates.collect();
        self.events
            .updates(room, updates, || !self.ended.load(Ordering::SeqCst));
        self.cursor = page.cursor;
        Ok(page.more)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(types: &[SyncDataType], prefix: &str) -> Subscription {
        Subscription {
            stream: "prontera".to_owned(),
            types: types.to_vec(),
            path_prefix: prefix.to_owned(),
        }
    }

    #[test]
    fn types_and_prefix_both_have_to_fit() {
        let state = v1::State {
            path: "prontera/ITEM_DROP/7".to_owned(),
            ..Default::default()
        };
        assert!(of(&[], "").wants(&state));
        assert!(of(&[SyncDataType::MapState, SyncDataType::ItemDrop], "prontera/").wants(&state));
        assert!(!of(&[SyncDataType::MapState], "").wants(&state));
        assert!(!of(&[SyncDataType::ItemDrop], "prontera/ITEM_DROP/8").wants(&state));
    }

    #[test]
    fn what_is_no_stream_is_refused() {
        let refused = |stream: &str| {
            let subscription = Subscription {
                stream: stream.to_owned(),
                ..of(&[], "")
            };
            subscription.check().map_err(|problem| problem.code)
        };
        assert_eq!(refused("@player"), Ok(()));
        assert_eq!(refused("@nobody"), Err(Code::BadMap));
        assert_eq!(refused(""), Err(Code::BadMap));
    }
}
