//! Following streams of the hub: each change after the last one seen, in the order of the stream, as the hub pushes it and
//! there is room.

use std::{
    collections::HashMap,
    convert::Infallible,
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
use tokio::{runtime::Handle, task::AbortHandle, time::sleep};

use crate::{
    config::Config,
    events::{AgentEvent, Events, PAGE_UPDATES_MAX},
    link::{self, Updates, Watcher},
    replica::Replicas,
    resend,
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

    /// Whether a path is among what it follows.
    pub(crate) fn covers(&self, path: &Path) -> bool {
        let parts = path.parts();
        parts.scope.stream() == self.stream
            && path.as_str().starts_with(&self.path_prefix)
            && (self.types.is_empty() || self.types.contains(&parts.data_type))
    }

    /// Asks for it from a position on.
    fn request(&self, at: u64, timeline: u64) -> v1::SubscribeRequest {
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
        let follower = Follower {
            id,
            replicas,
            watcher: self.watcher.clone(),
            subscription,
            place: Place::default(),
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

/// A subscription, and where it is.
struct Follower {
    id: u64,
    /// Absent where nothing is kept.
    replicas: Option<Arc<Replicas>>,
    watcher: Arc<Watcher>,
    subscription: Subscription,
    place: Place,
    retry_delay: (Duration, Duration),
    ended: Arc<AtomicBool>,
    events: Arc<Events>,
}

impl Follower {
    async fn follow(mut self) {
        let mut attempts = 0;
        let mut told = None;
        loop {
            let Err(problem) = self.watch(&mut attempts, &mut told).await;
            if told.as_ref() != Some(&problem) {
                tracing::warn!(stream = self.subscription.stream, "a subscription waits: {problem}");
            }
            told = Some(problem);
            attempts += 1;
            sleep(resend::delay(attempts, self.retry_delay, fastrand::f64())).await;
        }
    }

    /// Follows by one watch until that ends, and tells what comes. Nothing more is read before there is room for what was.
    async fn watch(&mut self, attempts: &mut u32, told: &mut Option<Problem>) -> Result<Infallible, Problem> {
        let request = self.subscription.request(self.place.at, self.place.timeline);
        let (_, mut updates): (_, Updates) = self.watcher.open(request).await?;
        loop {
            let update = updates.next().await?;
            link::check(&update)?;
            let stream = &self.subscription.stream;
            if update.code() == Code::Resync {
                tracing::warn!(
                    stream,
                    "what was told is too old to go on from: the stream is read anew"
                );
            }
            let begins = update.snapshot;
            let head = update.covered.first().map_or(update.head, |covered| covered.head);
            let states = self.place.take(stream, update).ok_or_else(missed)?;
            if let Some(replicas) = &self.replicas {
                replicas.take(self.id, &states, begins, self.place.at >= head);
            }
            (*attempts, *told) = (0, None);
            if !states.is_empty() {
                let room = self.events.room_for_page().await;
                let updates = self.place.tell(self.id, states);
                self.events
                    .updates(room, updates, || !self.ended.load(Ordering::SeqCst));
            }
        }
    }
}

/// The hub's messages say what they cover, so that what is missing shows.
fn missed() -> Problem {
    let sentence = "the hub has left something out: it is asked anew from the last that was told";
    Problem::new(Code::HubUnavailable, sentence)
}

/// Where a subscription is in its stream.
#[derive(Debug)]
struct Place {
    /// Everything up to here was told.
    at: u64,
    /// Of the hub; 0 before it has said so.
    timeline: u64,
    /// The next update begins a snapshot.
    snapshot: bool,
}

impl Default for Place {
    fn default() -> Self {
        Self {
            at: 0,
            timeline: 0,
            snapshot: true,
        }
    }
}

impl Place {
    /// Takes a message: gives what is new in it, or none where something before it is missing.
    fn take(&mut self, stream: &str, update: v1::Update) -> Option<Vec<v1::State>> {
        if update.snapshot {
            self.at = 0;
            self.snapshot = true;
        }
        let covered = update.covered.iter().find(|covered| covered.stream == stream);
        let (after, upto) = match covered {
            Some(covered) => (covered.after, covered.upto),
            None if update.stream == stream => (update.after, update.upto),
            None => return Some(Vec::new()),
        };
        if after > self.at {
            return None;
        }
        let before = self.at;
        self.at = self.at.max(upto);
        self.timeline = update.timeline;
        let mut states = update.states;
        states.retain(|state| state.stream_sequence > before);
        Some(states)
    }

    /// As the program is told.
    fn tell(&mut self, subscription: u64, states: Vec<v1::State>) -> Vec<AgentEvent> {
        let updates = states.into_iter().map(|state| AgentEvent::Update {
            subscription,
            state,
            snapshot: std::mem::take(&mut self.snapshot),
        });
        updates.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn update(after: u64, upto: u64, sequences: &[u64]) -> v1::Update {
        let state = |sequence: &u64| v1::State {
            stream_sequence: *sequence,
            ..Default::default()
        };
        v1::Update {
            stream: "prontera".to_owned(),
            after,
            upto,
            states: sequences.iter().map(state).collect(),
            timeline: 3,
            ..Default::default()
        }
    }

    fn taken(place: &mut Place, update: v1::Update) -> Option<Vec<u64>> {
        let states = place.take("prontera", update)?;
        Some(states.iter().map(|state| state.stream_sequence).collect())
    }

    #[test]
    fn invariant_08_a_message_that_leaves_something_out_is_not_taken() {
        let mut place = Place::default();
        assert_eq!(taken(&mut place, update(0, 5, &[2, 5])), Some(vec![2, 5]));
        assert_eq!(taken(&mut place, update(7, 9, &[8])), None);
        assert_eq!(place.at, 5, "it asks anew from here");
        assert_eq!(
            taken(&mut place, update(3, 6, &[4, 6])),
            Some(vec![6]),
            "what was told comes once"
        );
        let heartbeat = |after, upto| v1::Update {
            stream: String::new(),
            covered: vec![v1::Covered {
                stream: "prontera".to_owned(),
                after,
                upto,
                head: upto,
            }],
            ..update(0, 0, &[])
        };
        assert_eq!(taken(&mut place, heartbeat(6, 9)), Some(vec![]));
        assert_eq!(taken(&mut place, heartbeat(10, 11)), None);
        assert_eq!((place.at, place.timeline), (9, 3));
    }

    #[test]
    fn a_snapshot_begins_anew_and_the_first_that_is_told_of_it_says_so() {
        let mut place = Place::default();
        let told = |place: &mut Place, update| {
            let states = place.take("prontera", update).expect("nothing is missing");
            let events = place.tell(1, states);
            let begins = events
                .iter()
                .map(|event| matches!(event, AgentEvent::Update { snapshot: true, .. }));
            begins.collect::<Vec<_>>()
        };
        assert_eq!(told(&mut place, update(0, 5, &[2, 5])), [true, false]);
        assert_eq!(told(&mut place, update(5, 6, &[6])), [false]);
        let anew = v1::Update {
            snapshot: true,
            ..update(0, 1, &[])
        };
        assert!(told(&mut place, anew).is_empty());
        assert_eq!(told(&mut place, update(1, 3, &[2, 3])), [true, false]);
    }

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
