//! The cache in Redis.
//!
//! Its entries belong to an *epoch*, a random name kept in Redis, and only those of the current epoch are read. A proxy
//! that cannot tell whether all its writes have reached Redis (the queue was full, Redis did not answer, the proxy was
//! started anew) names a new epoch before it trusts the cache again: every entry that could be out of date is passed
//! over from then on, by all proxies, and expires. Until it has done so, its own reads go to Postgres.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use p2p_sync_proto::v1;
use prost::Message;
use redis::{RedisError, Script, aio::ConnectionManager};
use tokio::{sync::Notify, time::timeout};
use uuid::Uuid;

/// Paths that wait for Redis; newer states of a path take the place of older ones.
const WAITING_MAX: usize = 8192;
/// Bytes of what waits.
const WAITING_BYTES_MAX: usize = 32 * 1024 * 1024;
/// States written in one round trip.
const STATES_PER_ROUND_TRIP: usize = 256;
/// A read that takes longer asks Postgres.
const READ_TIMEOUT: Duration = Duration::from_millis(50);
/// Between attempts to begin an epoch.
const RETRY_DELAY: Duration = Duration::from_millis(250);
/// How long a shutdown waits for what is still on its way.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// KEYS: the epoch's, then each state's. ARGV: our epoch, the expiry, then a sequence and a state for each.
/// Gives Redis' epoch; nothing was written where that is another.
const WRITE_NEWER: &str = r"
local epoch = redis.call('GET', KEYS[1])
if epoch ~= ARGV[1] then return epoch end
for i = 2, #KEYS do
  local sequence = ARGV[2 * i - 1]
  local known = redis.call('HGET', KEYS[i], 'sequence')
  if not known or tonumber(known) < tonumber(sequence) then
    redis.call('HSET', KEYS[i], 'sequence', sequence, 'state', ARGV[2 * i])
    redis.call('EXPIRE', KEYS[i], ARGV[2])
  end
end
return epoch
";

/// See [`super::Cache`].
pub struct RedisCache {
    shared: Arc<Shared>,
    connection: ConnectionManager,
    writer: tokio::task::JoinHandle<()>,
}

struct Shared {
    epoch_key: String,
    state_prefix: String,
    expiry: Duration,
    // A std mutex: held for map operations, never across an await.
    queue: Mutex<Queue>,
    wake_up: Notify,
}

/// Without the connection, which shows its password.
impl fmt::Debug for RedisCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisCache")
            .field("epoch_key", &self.shared.epoch_key)
            .finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Queue {
    trust: Trust,
    epoch: String,
    waiting: HashMap<String, v1::State>,
    waiting_bytes: usize,
    /// Sent, not yet known to have arrived; read before Redis, as `waiting` is.
    flying: HashMap<String, v1::State>,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Trust {
    /// Writes were lost: nothing is taken and nothing is read until a new epoch is begun.
    #[default]
    Lost,
    /// A new epoch is on its way to Redis: what is committed from here on belongs to it.
    Claiming,
    /// Every write since the epoch began is in Redis or waits here.
    Held,
}

impl RedisCache {
    pub(super) fn new(connection: ConnectionManager, prefix: &str, expiry: Duration) -> Self {
        let shared = Arc::new(Shared {
            epoch_key: format!("{prefix}:cache-epoch"),
            state_prefix: format!("{prefix}:state:"),
            expiry,
            queue: Mutex::default(),
            wake_up: Notify::new(),
        });
        let writer = tokio::spawn(write(Arc::clone(&shared), connection.clone()));
        Self {
            shared,
            connection,
            writer,
        }
    }

    pub(super) fn put(&self, state: v1::State) {
        let mut queue = self.shared.queue();
        if queue.trust == Trust::Lost {
            return;
        }
        let known = queue.waiting.get(&state.path).or_else(|| queue.flying.get(&state.path));
        if known.is_some_and(|known| known.stream_sequence >= state.stream_sequence) {
            return;
        }
        queue.waiting_bytes += state.encoded_len();
        if let Some(older) = queue.waiting.insert(state.path.clone(), state) {
            queue.waiting_bytes -= older.encoded_len();
        }
        if queue.waiting.len() > WAITING_MAX || queue.waiting_bytes > WAITING_BYTES_MAX {
            queue.lose("the queue before Redis is full");
        }
        drop(queue);
        self.shared.wake_up.notify_one();
    }

    pub(super) fn distrust(&self, reason: &str) {
        self.shared.queue().lose(reason);
        self.shared.wake_up.notify_one();
    }

    pub(super) async fn get(&self, path: &str) -> Option<v1::State> {
        let epoch = {
            let queue = self.shared.queue();
            if queue.trust != Trust::Held {
                return None;
            }
            if let Some(state) = queue.waiting.get(path).or_else(|| queue.flying.get(path)) {
                return Some(state.clone());
            }
            queue.epoch.clone()
        };
        let mut question = redis::pipe();
        question
            .get(&self.shared.epoch_key)
            .hget(self.shared.state_key(&epoch, path), "state");
        let mut connection = self.connection.clone();
        let answer = question.query_async::<(Option<String>, Option<Vec<u8>>)>(&mut connection);
        let (current, state) = timeout(READ_TIMEOUT, answer).await.ok()?.ok()?;
        if current.as_deref() != Some(epoch.as_str()) {
            self.shared.queue().adopt(&epoch, current);
            self.shared.wake_up.notify_one();
            return None;
        }
        // Trust may have been lost while Redis answered.
        let still_held = self.shared.queue().trust == Trust::Held;
        v1::State::decode(state?.as_slice()).ok().filter(|_| still_held)
    }

    pub(super) async fn flushed(&self) {
        let arrived = async {
            while !self.shared.queue().is_empty() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if timeout(FLUSH_TIMEOUT, arrived).await.is_err() {
            tracing::warn!("Redis did not take the last states; they are passed over when the proxy starts again");
        }
    }
}

impl Drop for RedisCache {
    fn drop(&mut self) {
        self.writer.abort();
    }
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state_key(&self, epoch: &str, path: &str) -> String {
        format!("{}{epoch}:{path}", self.state_prefix)
    }
}

impl Queue {
    fn lose(&mut self, reason: &str) {
        if self.trust == Trust::Held {
            tracing::warn!(reason, "the cache in Redis is passed over; reads go to the database");
        }
        self.trust = Trust::Lost;
        self.clear();
    }

    /// Another proxy has begun a new epoch, which held nothing then: ours can go on in it. No epoch at all means that
    /// Redis has lost what it held, this proxy's writes among it.
    fn adopt(&mut self, ours: &str, current: Option<String>) {
        match current {
            _ if self.epoch != ours || self.trust != Trust::Held => {}
            Some(current) => self.epoch = current,
            None => self.lose("Redis has lost what it held"),
        }
    }

    fn take_flight(&mut self) {
        let paths: Vec<String> = self.waiting.keys().take(STATES_PER_ROUND_TRIP).cloned().collect();
        for path in paths {
            if let Some(state) = self.waiting.remove(&path) {
                self.waiting_bytes -= state.encoded_len();
                self.flying.insert(path, state);
            }
        }
    }

    fn clear(&mut self) {
        self.waiting.clear();
        self.flying.clear();
        self.waiting_bytes = 0;
    }

    fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.flying.is_empty()
    }
}

/// Carries states to Redis, and begins a new epoch whenever trust was lost.
async fn write(shared: Arc<Shared>, mut connection: ConnectionManager) {
    let script = Script::new(WRITE_NEWER);
    let mut first_epoch = true;
    loop {
        let (trust, idle) = {
            let queue = shared.queue();
            (queue.trust, queue.is_empty())
        };
        if trust != Trust::Held {
            // What lost the last epoch would soon lose the next one.
            if !std::mem::take(&mut first_epoch) {
                tokio::time::sleep(RETRY_DELAY).await;
            }
            if let Err(error) = claim(&shared, &mut connection).await {
                tracing::debug!(%error, "Redis takes no new epoch yet");
            }
        } else if idle {
            shared.wake_up.notified().await;
        } else if let Err(error) = fly(&shared, &script, &mut connection).await {
            shared.queue().lose(&error.to_string());
        }
    }
}

async fn claim(shared: &Shared, connection: &mut ConnectionManager) -> Result<(), RedisError> {
    let epoch = Uuid::new_v4().simple().to_string();
    {
        let mut queue = shared.queue();
        queue.clear();
        queue.trust = Trust::Claiming;
    }
    let claimed = redis::cmd("SET")
        .arg(&shared.epoch_key)
        .arg(&epoch)
        .query_async::<()>(connection)
        .await;
    let mut queue = shared.queue();
    if claimed.is_err() {
        queue.trust = Trust::Lost;
        queue.clear();
    } else if queue.trust == Trust::Claiming {
        queue.trust = Trust::Held;
        queue.epoch = epoch;
        tracing::info!("the cache in Redis is read");
    }
    claimed
}

async fn fly(shared: &Shared, script: &Script, connection: &mut ConnectionManager) -> Result<(), RedisError> {
    let (epoch, flight) = {
        let mut queue = shared.queue();
        if queue.flying.is_empty() {
            queue.take_flight();
        }
        let flight: Vec<v1::State> = queue.flying.values().cloned().collect();
        (queue.epoch.clone(), flight)
    };
    let mut call = script.key(&shared.epoch_key);
    call.arg(&epoch).arg(shared.expiry.as_secs());
    for state in &flight {
        call.key(shared.state_key(&epoch, &state.path))
            .arg(state.stream_sequence)
            .arg(state.encode_to_vec());
    }
    let current: Option<String> = call.invoke_async(connection).await?;
    let mut queue = shared.queue();
    if current.as_deref() == Some(epoch.as_str()) {
        queue.flying.clear();
    } else {
        queue.adopt(&epoch, current);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held() -> Queue {
        Queue {
            trust: Trust::Held,
            epoch: "ours".to_owned(),
            ..Queue::default()
        }
    }

    fn wait(queue: &mut Queue, path: &str) {
        let state = v1::State {
            path: path.to_owned(),
            ..Default::default()
        };
        queue.waiting_bytes += state.encoded_len();
        queue.waiting.insert(path.to_owned(), state);
    }

    #[test]
    fn a_flight_is_bounded_and_what_flies_is_no_longer_counted_as_waiting() {
        let mut queue = held();
        for number in 0..=STATES_PER_ROUND_TRIP {
            wait(&mut queue, &number.to_string());
        }
        queue.take_flight();
        assert_eq!((queue.flying.len(), queue.waiting.len()), (STATES_PER_ROUND_TRIP, 1));
        assert_eq!(
            queue.waiting_bytes,
            queue.waiting.values().map(Message::encoded_len).sum::<usize>()
        );
        queue.flying.clear();
        queue.take_flight();
        assert_eq!((queue.waiting.len(), queue.waiting_bytes), (0, 0));
    }

    #[test]
    fn another_proxys_epoch_is_adopted_with_what_waits_for_it() {
        let mut queue = held();
        wait(&mut queue, "a");
        queue.adopt("ours", Some("theirs".to_owned()));
        assert!(queue.trust == Trust::Held && queue.epoch == "theirs" && queue.waiting.len() == 1);
        queue.adopt("ours", Some("late".to_owned()));
        assert_eq!(queue.epoch, "theirs", "an answer to an older question changes nothing");
    }

    #[test]
    fn a_redis_that_forgot_its_epoch_is_not_trusted() {
        let mut queue = held();
        wait(&mut queue, "a");
        queue.adopt("ours", None);
        assert!(queue.trust == Trust::Lost && queue.is_empty());
    }
}
