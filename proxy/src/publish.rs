//! Publishing: telling whoever follows that a stream has moved on, after the commit and beside the acknowledgement.
//!
//! What is published is a wake-up that carries the changes along. It may be lost: followers see the gap in the stream's
//! positions and read it from Postgres. So a full queue or a dead Redis costs a message, never a write. Where nobody listens
//! to a stream, the changes stay where they are, and only the positions are told.

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use p2p_sync_proto::v1;
use prost::Message;
use tokio::{sync::mpsc, time::Instant};

use crate::{
    operation::{Committed, Span},
    redis_client::RedisClient,
    streams::{Streams, batch_of, wake_ups::channel},
};

/// Updates that wait for Redis.
const UPDATES_MAX: usize = 4096;
/// Bytes of the updates that wait for Redis.
const UPDATE_BYTES_MAX: usize = 32 * 1024 * 1024;
/// One update's bytes; of more only the positions are told.
const ONE_UPDATE_BYTES_MAX: usize = 256 * 1024;
/// Updates sent to Redis in one round trip.
const UPDATES_PER_ROUND_TRIP: usize = 256;
/// Streams that somebody listens to, as far as is remembered.
const HEARD_MAX: usize = 16 * 1024;
/// Between two questions who listens, where publishing does not tell.
const LISTENERS_INTERVAL: Duration = Duration::from_secs(1);

/// What one commit tells of one stream.
#[derive(Debug)]
struct Update {
    stream: String,
    published: v1::Published,
}

/// Where updates go.
#[derive(Debug)]
pub struct Publisher {
    streams: Arc<Streams>,
    /// Absent where there is no other proxy.
    redis: Option<RedisPublisher>,
}

impl Publisher {
    /// A publisher for a hub of one process.
    pub fn process(streams: Arc<Streams>) -> Self {
        Self { streams, redis: None }
    }

    /// A publisher that tells other proxies by Redis; its task ends when the publisher is dropped.
    pub fn redis(streams: Arc<Streams>, client: RedisClient, prefix: &str) -> Self {
        let (queue, waiting) = mpsc::channel(UPDATES_MAX);
        let publisher = RedisPublisher {
            queue,
            queued_bytes: Arc::default(),
            lost: Arc::default(),
            heard: Arc::default(),
        };
        let sending = Sending {
            client,
            prefix: prefix.to_owned(),
            queued_bytes: Arc::clone(&publisher.queued_bytes),
            lost: Arc::clone(&publisher.lost),
            heard: Arc::clone(&publisher.heard),
            unasked: HashSet::new(),
            asked_at: None,
        };
        tokio::spawn(sending.run(waiting));
        Self {
            streams,
            redis: Some(publisher),
        }
    }

    /// Publishes what a message led to. Never waits.
    pub fn publish(&self, committed: &Committed) {
        self.streams.offer(committed);
        if let Some(redis) = &self.redis {
            for span in &committed.spans {
                redis.enqueue(committed, span);
            }
        }
    }
}

/// The queue before Redis.
#[derive(Debug)]
struct RedisPublisher {
    queue: mpsc::Sender<Update>,
    queued_bytes: Arc<AtomicUsize>,
    /// Since Redis last answered: the first one is logged, and the sum when the outage is over.
    lost: Arc<AtomicU64>,
    heard: Arc<Heard>,
}

/// Streams of which somebody heard the last update.
#[derive(Debug, Default)]
struct Heard(Mutex<HashSet<String>>);

impl Heard {
    fn lock(&self) -> MutexGuard<'_, HashSet<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has(&self, stream: &str) -> bool {
        self.lock().contains(stream)
    }

    fn note(&self, stream: &str, receivers: i64) {
        let mut heard = self.lock();
        if receivers == 0 {
            heard.remove(stream);
        } else if heard.len() < HEARD_MAX && !heard.contains(stream) {
            heard.insert(stream.to_owned());
        }
    }
}

impl RedisPublisher {
    fn enqueue(&self, committed: &Committed, span: &Span) {
        let Span { stream, after, upto } = span;
        let mut published = v1::Published {
            after: *after,
            upto: *upto,
            left_out: true,
            timeline: committed.timeline,
            ..Default::default()
        };
        if self.heard.has(stream) {
            let batch = batch_of(committed, stream, *after, *upto);
            let entries = batch.entries.unwrap_or_default();
            published.critical = batch.urgent;
            if entries.iter().map(|entry| entry.bytes).sum::<usize>() <= ONE_UPDATE_BYTES_MAX {
                published.left_out = false;
                published.states = entries.iter().map(|entry| entry.state.clone()).collect();
            }
        }
        let update = Update {
            stream: stream.clone(),
            published,
        };
        let bytes = update.published.encoded_len();
        let fits = self.queued_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes <= UPDATE_BYTES_MAX;
        if !fits || self.queue.try_send(update).is_err() {
            self.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
            note_lost(&self.lost, 1, "the queue before Redis is full");
        }
    }
}

struct Sending {
    client: RedisClient,
    prefix: String,
    queued_bytes: Arc<AtomicUsize>,
    lost: Arc<AtomicU64>,
    heard: Arc<Heard>,
    /// Streams that were published since it was asked last who listens.
    unasked: HashSet<String>,
    asked_at: Option<Instant>,
}

impl Sending {
    async fn run(mut self, mut waiting: mpsc::Receiver<Update>) {
        let mut updates = Vec::with_capacity(UPDATES_PER_ROUND_TRIP);
        while waiting.recv_many(&mut updates, UPDATES_PER_ROUND_TRIP).await > 0 {
            let mut pipeline = redis::pipe();
            let mut bytes = 0;
            for update in &updates {
                let encoded = update.published.encode_to_vec();
                bytes += encoded.len();
                pipeline.publish(channel(&self.prefix, &update.stream), encoded);
            }
            match self.client.publish(&pipeline).await {
                Ok(receivers) => {
                    self.note_heard(&updates, &receivers).await;
                    self.note_recovery();
                }
                Err(error) => note_lost(&self.lost, updates.len() as u64, &error.to_string()),
            }
            self.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
            updates.clear();
        }
    }

    async fn note_heard(&mut self, updates: &[Update], receivers: &[i64]) {
        if self.client.counts_all_who_hear() {
            for (update, receivers) in updates.iter().zip(receivers) {
                self.heard.note(&update.stream, *receivers);
            }
            return;
        }
        let room = HEARD_MAX.saturating_sub(self.unasked.len());
        self.unasked
            .extend(updates.iter().take(room).map(|update| update.stream.clone()));
        if self.asked_at.is_some_and(|at| at.elapsed() < LISTENERS_INTERVAL) {
            return;
        }
        self.asked_at = Some(Instant::now());
        let streams: Vec<String> = self.unasked.drain().collect();
        let channels: Vec<String> = streams.iter().map(|stream| channel(&self.prefix, stream)).collect();
        // Where a node does not say, somebody may listen there.
        let listeners = self.client.listeners(&channels).await.ok();
        for (stream, channel) in streams.iter().zip(&channels) {
            let listening = listeners
                .as_ref()
                .map_or(1, |found| found.get(channel).copied().unwrap_or(0));
            self.heard.note(stream, listening);
        }
    }

    fn note_recovery(&self) {
        let lost = self.lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            tracing::info!(
                lost,
                "updates are published again; followers read what was lost from the database"
            );
        }
    }
}

fn note_lost(lost: &AtomicU64, count: u64, reason: &str) {
    if lost.fetch_add(count, Ordering::Relaxed) == 0 {
        tracing::warn!(
            reason,
            "updates are not published; writes go on, and followers read from the database"
        );
    }
}
