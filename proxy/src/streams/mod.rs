//! What is pushed: each stream that somebody follows is read once on this proxy, and told to all who do.
//!
//! Commits of this proxy come straight from the pipeline ([`Streams::offer`]), those of others by Redis (`wake_ups`). Both may
//! come late, twice, in another order or not at all: a hole is read from Postgres, where each message says what it covers, and
//! a look at the heads of all followed streams, twice a second, finds what nobody told of. [`feed`] and [`ring`] hold what is
//! new, [`watch`] is one subscriber, which reads from Postgres for itself only where it is further back than memory reaches.

pub mod feed;
pub mod filter;
pub mod ring;
pub mod wake_ups;
pub mod watch;

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use p2p_sync_proto::{Code, Problem};
use tokio::{
    sync::Notify,
    time::{MissedTickBehavior, interval, sleep, timeout},
};
use uuid::Uuid;

use crate::{
    operation::Committed,
    store::{Reader, Store},
};
use feed::{Feed, Listener};
use ring::{Batch, Entry};

/// Streams that are followed on one proxy.
const FEEDS_MAX: usize = 16 * 1024;
/// Between two looks at the heads of all followed streams: how late at most what nobody told of is found.
const HEADS_INTERVAL: Duration = Duration::from_millis(500);
/// The same while other proxies cannot be heard.
const HEADS_INTERVAL_ALONE: Duration = Duration::from_millis(100);
/// How long a commit that is told late is waited for before its stream is read.
const LATE_PATIENCE: Duration = Duration::from_millis(5);
/// The same for what is only known to be there: whoever committed it may be about to tell.
const HEAD_PATIENCE: Duration = Duration::from_millis(20);
/// Changes read from the database at once: the largest payloads take 32 MiB then.
const CHANGES_PER_READ: u32 = 128;
/// Between two attempts to read from a database that does not answer.
const RETRY_DELAY: Duration = Duration::from_millis(200);
/// How long a stream stays in memory that nobody follows any more: subscribers come back.
const IDLE_KEPT: Duration = Duration::from_secs(10);
/// Between two looks whether the hosts of open watches are let in still.
const ADMITTED_INTERVAL: Duration = Duration::from_secs(2);
const ADMITTED_TIMEOUT: Duration = Duration::from_secs(2);

/// All streams that are followed, and who follows them.
#[derive(Debug)]
pub struct Streams {
    store: Store,
    feeds: Mutex<HashMap<String, Arc<Feed>>>,
    all_bytes: Arc<AtomicUsize>,
    watches: Mutex<HashMap<Uuid, Open>>,
    /// Whether what other proxies commit is told here; true where there are none.
    hears_others: AtomicBool,
    /// The set of followed streams has changed.
    followed: Notify,
    /// The heads are to be looked at now.
    look: Notify,
}

/// An open watch, or a host that attends.
#[derive(Debug)]
struct Open {
    host_id: Uuid,
    generation: u32,
    end: Weak<End>,
}

/// Ends a watch from outside.
#[derive(Debug, Default)]
pub struct End {
    reason: Mutex<Option<Problem>>,
    pub(crate) told: Notify,
}

impl End {
    /// Ends it, with what its subscriber is told.
    pub fn now(&self, problem: Problem) {
        let mut reason = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        reason.get_or_insert(problem);
        drop(reason);
        self.told.notify_one();
    }

    pub(crate) fn reason(&self) -> Option<Problem> {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Streams {
    /// Nobody follows anything yet. `hears_others` where no other proxy can be there.
    pub fn new(store: Store, hears_others: bool) -> Arc<Self> {
        Arc::new(Self {
            store,
            feeds: Mutex::default(),
            all_bytes: Arc::default(),
            watches: Mutex::default(),
            hears_others: AtomicBool::new(hears_others),
            followed: Notify::new(),
            look: Notify::new(),
        })
    }

    /// Tells followers here what this proxy has committed. Never waits.
    pub fn offer(self: &Arc<Self>, committed: &Committed) {
        for span in &committed.spans {
            let Some(feed) = self.feed(&span.stream) else {
                continue;
            };
            let batch = batch_of(committed, &span.stream, span.after, span.upto);
            self.take(&feed, committed.timeline, batch);
        }
    }

    /// Takes what another proxy has told of a stream.
    pub fn hear(self: &Arc<Self>, stream: &str, timeline: u64, batch: Batch) {
        if let Some(feed) = self.feed(stream) {
            self.take(&feed, timeline, batch);
        }
    }

    fn take(self: &Arc<Self>, feed: &Arc<Feed>, timeline: u64, batch: Batch) {
        if feed.take(timeline, batch) {
            self.read(feed, LATE_PATIENCE);
        }
    }

    /// Notes whether other proxies can be heard.
    pub fn set_hears_others(&self, hears: bool) {
        self.hears_others.store(hears, Ordering::SeqCst);
        self.look.notify_one();
    }

    /// Looks at the heads now.
    pub fn look_now(&self) {
        self.look.notify_one();
    }

    /// The names of all streams that are followed, in no order.
    pub fn followed(&self) -> Vec<String> {
        lock(&self.feeds).keys().cloned().collect()
    }

    /// Waits until the set of followed streams has changed.
    pub async fn changed(&self) {
        self.followed.notified().await;
    }

    fn feed(&self, stream: &str) -> Option<Arc<Feed>> {
        lock(&self.feeds).get(stream).cloned()
    }

    /// Has a listener woken when a stream moves. `RATE_LIMITED` where too many streams are followed.
    fn follow(&self, stream: &str, listener: &Arc<Listener>, number: u32) -> Result<Arc<Feed>, Problem> {
        let mut feeds = lock(&self.feeds);
        if feeds.len() >= FEEDS_MAX && !feeds.contains_key(stream) {
            let sentence = "the hub follows as many streams as it can: ask again later";
            return Err(Problem::new(Code::RateLimited, sentence));
        }
        let is_new = !feeds.contains_key(stream);
        let feed = feeds
            .entry(stream.to_owned())
            .or_insert_with(|| Arc::new(Feed::new(stream, Arc::clone(&self.all_bytes))));
        // Under the lock of all feeds, so that none is forgotten that somebody follows.
        feed.follow(listener, number);
        if is_new {
            self.followed.notify_one();
        }
        Ok(Arc::clone(feed))
    }

    /// Finds out where feeds are that are followed for the first time.
    async fn place(self: &Arc<Self>, feeds: &[Arc<Feed>]) -> Result<(), Problem> {
        let unplaced: Vec<String> = feeds
            .iter()
            .filter(|feed| feed.head().is_none())
            .map(|feed| feed.name().to_owned())
            .collect();
        if !unplaced.is_empty() {
            self.look_at(&unplaced).await?;
        }
        Ok(())
    }

    async fn look_at(self: &Arc<Self>, streams: &[String]) -> Result<(), Problem> {
        let asked_at: HashMap<&String, u64> = streams
            .iter()
            .filter_map(|stream| Some((stream, self.feed(stream)?.head()?.head)))
            .collect();
        for (stream, head) in self.store.heads(streams).await? {
            let Some(feed) = self.feed(&stream) else { continue };
            if feed.hear(head, asked_at.get(&stream).copied()) {
                self.read(&feed, HEAD_PATIENCE);
            }
        }
        Ok(())
    }

    /// Reads what a feed lacks, on a task of its own, once at a time.
    fn read(self: &Arc<Self>, feed: &Arc<Feed>, patience: Duration) {
        if !feed.begin_reading() {
            return;
        }
        let (streams, feed) = (Arc::clone(self), Arc::clone(feed));
        tokio::spawn(async move {
            sleep(patience).await;
            while let Some(after) = feed.next_to_read() {
                match streams
                    .store
                    .changes(Reader::Hub, feed.name(), after, CHANGES_PER_READ)
                    .await
                {
                    Ok(found) => {
                        let batch = Batch {
                            after,
                            upto: found.upto,
                            entries: Some(found.rows.iter().map(|row| Arc::new(Entry::of_row(row))).collect()),
                            urgent: true,
                        };
                        feed.hear(found.head, None);
                        feed.take(found.head.timeline, batch);
                    }
                    Err(_) => sleep(RETRY_DELAY).await,
                }
            }
        });
    }

    /// Looks at the heads of all followed streams, and forgets those that nobody follows, as long as the proxy serves.
    pub async fn run(self: Arc<Self>) {
        let mut told = false;
        loop {
            let wait = if self.hears_others.load(Ordering::SeqCst) {
                HEADS_INTERVAL
            } else {
                HEADS_INTERVAL_ALONE
            };
            // Either way it is time.
            let _asked = timeout(wait, self.look.notified()).await;
            self.forget_idle();
            let streams = self.followed();
            if streams.is_empty() {
                continue;
            }
            let looked = self.look_at(&streams).await;
            if let Err(problem) = &looked
                && !told
            {
                tracing::warn!(%problem, "streams cannot be looked at; subscribers wait for the database");
            }
            told = looked.is_err();
        }
    }

    fn forget_idle(&self) {
        let mut feeds = lock(&self.feeds);
        let before = feeds.len();
        feeds.retain(|_, feed| feed.idle_since().is_none_or(|since| since.elapsed() < IDLE_KEPT));
        if feeds.len() < before {
            self.followed.notify_one();
        }
    }

    /// Notes a stream to a host that ends where the host is shut out, or has renewed its credential.
    pub(crate) fn open(&self, watch_id: Uuid, host_id: Uuid, generation: u32, end: &Arc<End>) {
        let open = Open {
            host_id,
            generation,
            end: Arc::downgrade(end),
        };
        lock(&self.watches).insert(watch_id, open);
    }

    pub(crate) fn closed(&self, watch_id: Uuid) {
        lock(&self.watches).remove(&watch_id);
    }

    /// Ends the watches of hosts that are shut out, and of credentials that were renewed, as long as the proxy serves; while
    /// the database says nothing, they stay.
    pub async fn follow_hosts(self: Arc<Self>) {
        let mut ticks = interval(ADMITTED_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let mut hosts: Vec<Uuid> = lock(&self.watches).values().map(|open| open.host_id).collect();
            hosts.sort_unstable();
            hosts.dedup();
            if hosts.is_empty() {
                continue;
            }
            let Ok(Ok(generations)) = timeout(ADMITTED_TIMEOUT, self.store.generations(&hosts)).await else {
                continue;
            };
            for open in lock(&self.watches).values() {
                let Some(end) = open.end.upgrade() else { continue };
                match generations.get(&open.host_id) {
                    // Opened since the question.
                    None if hosts.binary_search(&open.host_id).is_err() => {}
                    None => end.now(Problem::new(Code::Locked, SHUT_OUT)),
                    Some(generation) if *generation > open.generation => {
                        end.now(Problem::new(Code::ShutDown, RENEWED));
                    }
                    Some(_) => {}
                }
            }
        }
    }
}

/// Told under the seal of a host that was let in when its watch began.
const SHUT_OUT: &str = "the hub's operator has shut this host out: it is told nothing more";
const RENEWED: &str = "the host has renewed its credential: the watch goes on under the new one, from where it is";

/// What a commit tells of one stream.
pub fn batch_of(committed: &Committed, stream: &str, after: u64, upto: u64) -> Batch {
    let is_here = |change: &&crate::operation::Change| {
        change.stream == stream && change.stream_sequence > after && change.stream_sequence <= upto
    };
    let changes = committed.changes.iter().filter(is_here);
    let mut urgent = false;
    let mut entries: Vec<Arc<Entry>> = changes
        .inspect(|change| urgent |= change.critical)
        .map(|change| Arc::new(Entry::of_change(change)))
        .collect();
    entries.sort_by_key(|entry| entry.state.stream_sequence);
    Batch {
        after,
        upto,
        entries: Some(entries),
        urgent,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
