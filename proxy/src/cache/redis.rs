//! The cache in Redis.
//!
//! Its entries belong to an *epoch*, a random name kept in Redis, and only those of the current epoch are read. A proxy
//! that cannot tell whether all its writes have reached Redis (the queue was full, Redis did not answer, the proxy was
//! started anew) names a new epoch before it trusts the cache again: every entry that could be out of date is passed
//! over from then on, by all proxies, and expires. Until it has done so, its own reads go to Postgres.
//!
//! Redis may also lose what it had taken: a replica that was not told yet takes its master's place, a server starts from an
//! older file. So each proxy counts its writes beside the epoch, in the step that writes: where Redis counts fewer than the
//! proxy, it has gone back, and the epoch is over. A proxy that writes nothing looks every second.
//!
//! In a cluster the paths are spread over some parts, each on one node, with an epoch of its own: where one node is lost, its
//! parts are.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use p2p_sync_proto::v1;
use prost::Message;
use redis::RedisError;
use tokio::{sync::Notify, time::timeout};
use uuid::Uuid;

use crate::redis_client::{Call, RedisClient, Script};

/// Paths that wait for Redis, in all parts; newer states of a path take the place of older ones.
const WAITING_MAX: usize = 8192;
/// Bytes of what waits.
const WAITING_BYTES_MAX: usize = 32 * 1024 * 1024;
/// States written in one round trip.
const STATES_PER_ROUND_TRIP: usize = 256;
/// A read that takes longer asks Postgres.
const READ_TIMEOUT: Duration = Duration::from_millis(50);
/// Between attempts to begin an epoch.
const RETRY_DELAY: Duration = Duration::from_millis(250);
/// Between two looks whether Redis has gone back, where nothing is written.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// How long a shutdown waits for what is still on its way.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// KEYS: the epoch's. ARGV: its new name. Nobody has written in it yet.
const BEGIN: &str = r"
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'epoch', ARGV[1])
return 1
";

/// KEYS: the epoch's, then each state's. ARGV: our epoch, our name, how often we have written in it, the expiry, then a sequence
/// and a state for each. Gives Redis' epoch, and how often we have written in it now; nothing was written where the epoch is
/// another, or the count is less than we know of.
const WRITE_NEWER: &str = r"
local held = redis.call('HMGET', KEYS[1], 'epoch', ARGV[2])
local count = tonumber(held[2] or '0')
if held[1] ~= ARGV[1] or count < tonumber(ARGV[3]) then return {held[1], count} end
for i = 2, #KEYS do
  local sequence = ARGV[2 * i + 1]
  local known = redis.call('HGET', KEYS[i], 'sequence')
  if not known or tonumber(known) < tonumber(sequence) then
    redis.call('HSET', KEYS[i], 'sequence', sequence, 'state', ARGV[2 * i + 2])
    redis.call('EXPIRE', KEYS[i], ARGV[4])
  end
end
return {held[1], redis.call('HINCRBY', KEYS[1], ARGV[2], 1)}
";

/// See [`super::Cache`].
pub struct RedisCache {
    parts: Vec<Part>,
}

/// Some of the paths, kept on one node.
struct Part {
    shared: Arc<Shared>,
    client: RedisClient,
    writer: tokio::task::JoinHandle<()>,
}

struct Shared {
    /// What this proxy's writes are counted under.
    proxy: String,
    epoch_key: String,
    state_prefix: String,
    expiry: Duration,
    waiting_max: usize,
    waiting_bytes_max: usize,
    // A std mutex: held for map operations, never across an await.
    queue: Mutex<Queue>,
    wake_up: Notify,
}

impl fmt::Debug for RedisCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisCache")
            .field("parts", &self.parts.len())
            .finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Queue {
    trust: Trust,
    epoch: String,
    /// How often we have written in this epoch, as Redis has said.
    writes: u64,
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
    pub(super) fn new(client: &RedisClient, prefix: &str, expiry: Duration) -> Self {
        let proxy = Uuid::new_v4().simple().to_string();
        let count = client.parts();
        let part = |number| {
            let shared = Arc::new(Shared {
                proxy: proxy.clone(),
                // What stands in braces decides on the node.
                epoch_key: format!("{prefix}:cache:{{part-{number}}}:epoch"),
                state_prefix: format!("{prefix}:cache:{{part-{number}}}:state:"),
                expiry,
                waiting_max: WAITING_MAX / count,
                waiting_bytes_max: WAITING_BYTES_MAX / count,
                queue: Mutex::default(),
                wake_up: Notify::new(),
            });
            let writer = tokio::spawn(write(Arc::clone(&shared), client.clone()));
            Part {
                shared,
                client: client.clone(),
                writer,
            }
        };
        Self {
            parts: (0..count).map(part).collect(),
        }
    }

    /// The same at all proxies.
    fn part_of(&self, path: &str) -> &Part {
        // FNV-1a.
        let hash = path.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let count = self.parts.len() as u64;
        &self.parts[usize::try_from(hash % count).unwrap_or(0)]
    }

    pub(super) fn put(&self, state: v1::State) {
        self.part_of(&state.path).put(state);
    }

    pub(super) fn distrust(&self, reason: &str) {
        for part in &self.parts {
            part.shared.queue().lose(reason);
            part.shared.wake_up.notify_one();
        }
    }

    pub(super) async fn get(&self, path: &str) -> Option<v1::State> {
        self.part_of(path).get(path).await
    }

    pub(super) async fn flushed(&self) {
        let arrived = async {
            while !self.parts.iter().all(|part| part.shared.queue().is_empty()) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if timeout(FLUSH_TIMEOUT, arrived).await.is_err() {
            tracing::warn!("Redis did not take the last states; they are passed over when the proxy starts again");
        }
    }
}

impl Part {
    fn put(&self, state: v1::State) {
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
        if queue.waiting.len() > self.shared.waiting_max || queue.waiting_bytes > self.shared.waiting_bytes_max {
            queue.lose("the queue before Redis is full");
        }
        drop(queue);
        self.shared.wake_up.notify_one();
    }

    async fn get(&self, path: &str) -> Option<v1::State> {
        let (epoch, writes) = {
            let queue = self.shared.queue();
            if queue.trust != Trust::Held {
                return None;
            }
            if let Some(state) = queue.waiting.get(path).or_else(|| queue.flying.get(path)) {
                return Some(state.clone());
            }
            (queue.epoch.clone(), queue.writes)
        };
        let mut question = redis::pipe();
        question
            .cmd("HMGET")
            .arg(&self.shared.epoch_key)
            .arg("epoch")
            .arg(&self.shared.proxy)
            .hget(self.shared.state_key(&epoch, path), "state");
        let mut client = self.client.clone();
        let answer = question.query_async::<((Option<String>, Option<u64>), Option<Vec<u8>>)>(&mut client);
        let ((current, count), state) = timeout(READ_TIMEOUT, answer).await.ok()?.ok()?;
        if current.as_deref() != Some(epoch.as_str()) || count.unwrap_or(0) < writes {
            self.shared.queue().hear(&epoch, current, count.unwrap_or(0));
            self.shared.wake_up.notify_one();
            return None;
        }
        // Trust may have been lost while Redis answered.
        let still_held = self.shared.queue().trust == Trust::Held;
        v1::State::decode(state?.as_slice()).ok().filter(|_| still_held)
    }
}

impl Drop for Part {
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

    /// Takes what Redis says that does not fit what was asked in our epoch. Where another proxy has begun a new epoch, which
    /// held nothing then, ours can go on in it. No epoch at all, or fewer of our writes than it had taken, mean that Redis has
    /// lost some.
    fn hear(&mut self, ours: &str, current: Option<String>, count: u64) {
        match current {
            _ if self.epoch != ours || self.trust != Trust::Held => {}
            Some(current) if current != ours => {
                self.epoch = current;
                self.writes = 0;
            }
            Some(_) if count >= self.writes => self.writes = count,
            _ => self.lose("Redis has lost what it held"),
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

/// Carries states to Redis, looks whether it has gone back, and begins a new epoch whenever trust was lost.
async fn write(shared: Arc<Shared>, mut client: RedisClient) {
    let (begin, write_newer) = (Script::new(BEGIN), Script::new(WRITE_NEWER));
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
            if let Err(error) = claim(&shared, &begin, &mut client).await {
                tracing::debug!(%error, "Redis takes no new epoch yet");
            }
            continue;
        }
        // Nothing is written too: it counts, and is refused where there is no master any more.
        if idle && timeout(LOOK_INTERVAL, shared.wake_up.notified()).await.is_ok() {
            continue;
        }
        if let Err(error) = fly(&shared, &write_newer, &mut client).await {
            shared.queue().lose(&error.to_string());
        }
    }
}

async fn claim(shared: &Shared, begin: &Script, client: &mut RedisClient) -> Result<(), RedisError> {
    let epoch = Uuid::new_v4().simple().to_string();
    {
        let mut queue = shared.queue();
        queue.clear();
        queue.trust = Trust::Claiming;
    }
    let mut call = Call::default();
    call.key(&shared.epoch_key).arg(&epoch);
    let claimed = begin.run::<()>(client, &call).await;
    let mut queue = shared.queue();
    if claimed.is_err() {
        queue.trust = Trust::Lost;
        queue.clear();
    } else if queue.trust == Trust::Claiming {
        queue.trust = Trust::Held;
        queue.epoch = epoch;
        queue.writes = 0;
        tracing::info!(part = shared.epoch_key, "the cache in Redis is read");
    }
    claimed
}

async fn fly(shared: &Shared, write_newer: &Script, client: &mut RedisClient) -> Result<(), RedisError> {
    let (epoch, writes, flight) = {
        let mut queue = shared.queue();
        if queue.flying.is_empty() {
            queue.take_flight();
        }
        let flight: Vec<v1::State> = queue.flying.values().cloned().collect();
        (queue.epoch.clone(), queue.writes, flight)
    };
    let mut call = Call::default();
    call.key(&shared.epoch_key)
        .arg(&epoch)
        .arg(&shared.proxy)
        .arg(writes)
        .arg(shared.expiry.as_secs());
    for state in &flight {
        call.key(shared.state_key(&epoch, &state.path))
            .arg(state.stream_sequence)
            .arg(state.encode_to_vec());
    }
    let (current, count): (Option<String>, u64) = write_newer.run(client, &call).await?;
    let mut queue = shared.queue();
    // Written, and counted once more than before.
    if current.as_deref() == Some(epoch.as_str()) && count > writes && queue.epoch == epoch {
        queue.flying.clear();
    }
    queue.hear(&epoch, current, count);
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
        queue.hear("ours", Some("theirs".to_owned()), 0);
        assert!(queue.trust == Trust::Held && queue.epoch == "theirs" && queue.waiting.len() == 1);
        queue.hear("ours", Some("late".to_owned()), 0);
        assert_eq!(queue.epoch, "theirs", "an answer to an older question changes nothing");
    }

    #[test]
    fn a_redis_that_forgot_its_epoch_is_not_trusted() {
        let mut queue = held();
        wait(&mut queue, "a");
        queue.hear("ours", None, 0);
        assert!(queue.trust == Trust::Lost && queue.is_empty());
    }

    #[test]
    fn a_redis_that_counts_fewer_writes_than_it_had_taken_is_not_trusted() {
        let mut queue = Queue { writes: 7, ..held() };
        queue.hear("ours", Some("ours".to_owned()), 8);
        assert!(queue.trust == Trust::Held && queue.writes == 8);
        queue.hear("theirs", Some("theirs".to_owned()), 1);
        assert!(
            queue.trust == Trust::Held,
            "an answer to another question changes nothing"
        );
        queue.hear("ours", Some("ours".to_owned()), 7);
        assert!(queue.trust == Trust::Lost);
    }
}
