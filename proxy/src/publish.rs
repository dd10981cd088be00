//! Publishing: telling whoever listens that a stream has moved on, after the commit and beside the acknowledgement.
//!
//! What is published is a wake-up that carries the change along. It may be lost: listeners see the gap in the stream's
//! sequence and read it from Postgres. So a full queue or a dead Redis costs a message, never a write.

use std::sync::{
    Arc,
    atomic::{AtomicU64, AtomicUsize, Ordering},
};

use p2p_sync_proto::v1;
use prost::Message;
use redis::aio::ConnectionManager;
use tokio::sync::{broadcast, mpsc};

use crate::operation::Change;

/// Updates that wait for Redis, or for the slowest listener inside the process.
const UPDATES_MAX: usize = 4096;
/// Bytes of the updates that wait for Redis.
const UPDATE_BYTES_MAX: usize = 32 * 1024 * 1024;
/// Updates sent to Redis in one round trip.
const UPDATES_PER_ROUND_TRIP: usize = 256;

/// One change of one stream.
#[derive(Clone, Debug)]
pub struct Update {
    /// A map's name, `@player` or `@host`.
    pub stream: String,
    /// The change, with its position in the stream.
    pub state: v1::State,
}

/// Where updates go.
#[derive(Debug)]
pub enum Publisher {
    /// To listeners inside this process.
    Process(broadcast::Sender<Update>),
    /// To the channels `<prefix>:updates:<stream>` of Redis, each message an encoded [`v1::State`].
    Redis(RedisPublisher),
}

impl Publisher {
    /// A publisher for a hub of one process.
    pub fn process() -> Self {
        Self::Process(broadcast::Sender::new(UPDATES_MAX))
    }

    /// A publisher over Redis; its task ends when the publisher is dropped.
    pub fn redis(connection: ConnectionManager, prefix: &str) -> Self {
        let (queue, waiting) = mpsc::channel(UPDATES_MAX);
        let publisher = RedisPublisher {
            queue,
            queued_bytes: Arc::default(),
            lost: Arc::default(),
        };
        let sending = Sending {
            connection,
            channel_prefix: format!("{prefix}:updates:"),
            queued_bytes: Arc::clone(&publisher.queued_bytes),
            lost: Arc::clone(&publisher.lost),
        };
        tokio::spawn(sending.run(waiting));
        Self::Redis(publisher)
    }

    /// Publishes what came by the critical lane. Never waits.
    pub fn publish(&self, changes: &[Change]) {
        for change in changes.iter().filter(|change| change.critical) {
            let update = Update {
                stream: change.stream.clone(),
                state: change.to_wire(),
            };
            match self {
                // Nobody listening is no error.
                Self::Process(listeners) => drop(listeners.send(update)),
                Self::Redis(redis) => redis.enqueue(update),
            }
        }
    }
}

/// The queue before Redis.
#[derive(Debug)]
pub struct RedisPublisher {
    queue: mpsc::Sender<Update>,
    queued_bytes: Arc<AtomicUsize>,
    /// Since Redis last answered: the first one is logged, and the sum when the outage is over.
    lost: Arc<AtomicU64>,
}

impl RedisPublisher {
    fn enqueue(&self, update: Update) {
        let bytes = update.state.encoded_len();
        let fits = self.queued_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes <= UPDATE_BYTES_MAX;
        if !fits || self.queue.try_send(update).is_err() {
            self.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
            note_lost(&self.lost, 1, "the queue before Redis is full");
        }
    }
}

struct Sending {
    connection: ConnectionManager,
    channel_prefix: String,
    queued_bytes: Arc<AtomicUsize>,
    lost: Arc<AtomicU64>,
}

impl Sending {
    async fn run(mut self, mut waiting: mpsc::Receiver<Update>) {
        let mut updates = Vec::with_capacity(UPDATES_PER_ROUND_TRIP);
        while waiting.recv_many(&mut updates, UPDATES_PER_ROUND_TRIP).await > 0 {
            let mut pipeline = redis::pipe();
            let mut bytes = 0;
            for update in &updates {
                let encoded = update.state.encode_to_vec();
                bytes += encoded.len();
                pipeline
                    .publish(format!("{}{}", self.channel_prefix, update.stream), encoded)
                    .ignore();
            }
            match pipeline.query_async::<()>(&mut self.connection).await {
                Ok(()) => self.note_recovery(),
                Err(error) => note_lost(&self.lost, updates.len() as u64, &error.to_string()),
            }
            self.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
            updates.clear();
        }
    }

    fn note_recovery(&self) {
        let lost = self.lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            tracing::info!(
                lost,
                "updates are published again; listeners read what was lost from the database"
            );
        }
    }
}

fn note_lost(lost: &AtomicU64, count: u64, reason: &str) {
    if lost.fetch_add(count, Ordering::Relaxed) == 0 {
        tracing::warn!(
            reason,
            "updates are not published; writes go on, and listeners read from the database"
        );
    }
}
