//! The hosts' spaces in Redis.
//!
//! A host's space is two keys of Redis: its values (a hash, in which the empty field counts the bytes) and the times at
//! which they expire (a sorted set). Each call is one script, so that counting and keeping are one step, whichever proxy
//! does them. Both keys expire with the last value, and where Redis has evicted one of them the other counts as gone. A
//! third key has the position of the host's last write, a few bytes that never expire.

use std::{fmt, time::Duration};

use p2p_sync_proto::{Code, Problem, v1};
use redis::{AsyncTypedCommands as _, RedisError};
use uuid::Uuid;

use super::{ENTRY_BYTES, Found, HOST_BYTES_MAX, HOST_ENTRIES_MAX, Writer, overtaken, to_wire};
use crate::redis_client::{Call, RedisClient, Script};

/// Begins each write. KEYS, behind its own: where the last write's position is. ARGV, behind its own: incarnation and
/// sequence. Gives -1, and does nothing, where the last write is as new. Where Redis has evicted the position alone, the values
/// go too: what was written before could be repeated over them.
const NOTE: &str = r"
local incarnation, sequence = tonumber(ARGV[#ARGV - 1]), tonumber(ARGV[#ARGV])
local last = redis.call('HMGET', KEYS[#KEYS], 'incarnation', 'sequence')
local before, at = tonumber(last[1] or '0'), tonumber(last[2] or '0')
if not last[1] and #KEYS > 1 then redis.call('DEL', KEYS[1], KEYS[2]) end
if incarnation < before or (incarnation == before and sequence <= at) then return -1 end
redis.call('HSET', KEYS[#KEYS], 'incarnation', ARGV[#ARGV - 1], 'sequence', ARGV[#ARGV])
";

/// KEYS: values, expiries. ARGV: key, value, milliseconds to keep it, most bytes, most entries, bytes of an entry.
const SET: &str = r"
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if redis.call('EXISTS', KEYS[1], KEYS[2]) < 2 then redis.call('DEL', KEYS[1], KEYS[2]) end
local bytes = tonumber(redis.call('HGET', KEYS[1], '') or '0')
local function remove(key)
  local held = redis.call('HSTRLEN', KEYS[1], key)
  if redis.call('HDEL', KEYS[1], key) == 1 then bytes = bytes - held - #key - ARGV[6] end
  redis.call('ZREM', KEYS[2], key)
end
remove(ARGV[1])
for _, key in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now)) do remove(key) end
local added = #ARGV[1] + #ARGV[2] + ARGV[6]
local entries = redis.call('ZCARD', KEYS[2])
while entries > 0 and (entries >= tonumber(ARGV[5]) or bytes + added > tonumber(ARGV[4])) do
  remove(redis.call('ZRANGE', KEYS[2], 0, 0)[1])
  entries = entries - 1
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2], '', string.format('%.0f', bytes + added))
redis.call('ZADD', KEYS[2], string.format('%.0f', now + ARGV[3]), ARGV[1])
local last = redis.call('ZRANGE', KEYS[2], -1, -1, 'WITHSCORES')[2]
redis.call('PEXPIREAT', KEYS[1], last)
redis.call('PEXPIREAT', KEYS[2], last)
return 1
";

/// KEYS: values, expiries. ARGV: key. Gives the milliseconds that are left, 0 where it is not there, and the value.
const GET: &str = r"
local until_ms = redis.call('ZSCORE', KEYS[2], ARGV[1])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local left = tonumber(until_ms or '0') - now
local value = left > 0 and redis.call('HGET', KEYS[1], ARGV[1])
if not value then return {0, ''} end
return {left, value}
";

/// KEYS: values, expiries. ARGV: key, bytes of an entry. Gives whether it was there.
const DELETE: &str = r"
local until_ms = redis.call('ZSCORE', KEYS[2], ARGV[1])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local held = redis.call('HSTRLEN', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
if redis.call('HDEL', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('HINCRBY', KEYS[1], '', string.format('%.0f', -(held + #ARGV[1] + ARGV[2])))
return tonumber(until_ms or '0') > now and 1 or 0
";

/// No keys. ARGV: channel, message.
const PUBLISH: &str = r"
redis.call('PUBLISH', ARGV[1], ARGV[2])
return 1
";

/// See [`super::HostCache`].
pub(super) struct RedisSpaces {
    client: RedisClient,
    prefix: String,
    set: Script,
    get: Script,
    delete: Script,
    publish: Script,
}

/// Without the connection, which shows its password.
impl fmt::Debug for RedisSpaces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisSpaces")
            .field("prefix", &self.prefix)
            .finish_non_exhaustive()
    }
}

impl RedisSpaces {
    pub(super) fn new(client: RedisClient, prefix: &str) -> Self {
        Self {
            client,
            prefix: prefix.to_owned(),
            set: writing(SET),
            get: Script::new(GET),
            delete: writing(DELETE),
            publish: writing(PUBLISH),
        }
    }

    pub(super) async fn get(&self, host_id: Uuid, key: &str) -> Result<Found, Problem> {
        let [values, expiries] = self.space(host_id);
        let mut call = Call::default();
        call.key(values).key(expiries).arg(key);
        let answered = self.get.run(&mut self.client.clone(), &call).await;
        let (left, value): (u64, String) = answered.map_err(|error| unavailable(&error))?;
        Ok((left > 0).then(|| to_wire(value, Duration::from_millis(left))))
    }

    pub(super) async fn exists(&self, host_id: Uuid, key: &str) -> Result<bool, Problem> {
        self.get(host_id, key).await.map(|found| found.is_some())
    }

    pub(super) async fn set(&self, writer: Writer, key: &str, value: &str, expiry: Duration) -> Result<(), Problem> {
        let [values, expiries] = self.space(writer.host_id);
        let expiry_ms = u64::try_from(expiry.as_millis()).unwrap_or(u64::MAX);
        let mut call = Call::default();
        call.key(values)
            .key(expiries)
            .arg(key)
            .arg(value)
            .arg(expiry_ms)
            .arg(HOST_BYTES_MAX)
            .arg(HOST_ENTRIES_MAX)
            .arg(ENTRY_BYTES);
        self.write(writer, &self.set, call).await.map(drop)
    }

    pub(super) async fn delete(&self, writer: Writer, key: &str) -> Result<bool, Problem> {
        let [values, expiries] = self.space(writer.host_id);
        let mut call = Call::default();
        call.key(values).key(expiries).arg(key).arg(ENTRY_BYTES);
        self.write(writer, &self.delete, call).await
    }

    /// Runs a write's script; gives whether there was something to do.
    async fn write(&self, writer: Writer, script: &Script, mut call: Call) -> Result<bool, Problem> {
        let [incarnation, sequence] = [writer.position.incarnation, writer.position.sequence];
        call.key(self.written(writer.host_id)).arg(incarnation).arg(sequence);
        let answered: Result<i64, RedisError> = script.run(&mut self.client.clone(), &call).await;
        match answered.map_err(|error| unavailable(&error))? {
            -1 => Err(overtaken()),
            done => Ok(done > 0),
        }
    }

    pub(super) async fn get_shared(&self, name: &str) -> Result<Found, Problem> {
        let key = self.shared(name);
        let mut question = redis::pipe();
        question.get(&key).pttl(&key);
        let (value, left_ms): (Option<String>, i64) = question
            .query_async(&mut self.client.clone())
            .await
            .map_err(|error| unavailable(&error))?;
        Ok(value.map(|value| v1::CacheValue {
            value,
            expires_in_ms: u64::try_from(left_ms).unwrap_or_default(),
        }))
    }

    pub(super) async fn exists_shared(&self, name: &str) -> Result<bool, Problem> {
        let asked = self.client.clone().exists(self.shared(name)).await;
        asked.map_err(|error| unavailable(&error))
    }

    pub(super) async fn publish(&self, writer: Writer, channel: &str, message: &str) -> Result<(), Problem> {
        let channel = format!("{}:host:{}:{channel}", self.prefix, writer.host_id);
        let mut call = Call::default();
        call.arg(channel).arg(message);
        self.write(writer, &self.publish, call).await.map(drop)
    }

    /// The braces keep both keys in one slot of a cluster.
    fn space(&self, host_id: Uuid) -> [String; 2] {
        ["values", "expiries"].map(|what| format!("{}:host-cache:{{{host_id}}}:{what}", self.prefix))
    }

    /// In the same slot as the host's space.
    fn written(&self, host_id: Uuid) -> String {
        format!("{}:host-cache:{{{host_id}}}:written", self.prefix)
    }

    fn shared(&self, name: &str) -> String {
        format!("{}:shared:{name}", self.prefix)
    }
}

/// A script that begins with [`NOTE`].
fn writing(script: &str) -> Script {
    Script::new(&format!("{NOTE}{script}"))
}

/// What Redis says may repeat what it was sent, so only its kind is told.
fn unavailable(error: &RedisError) -> Problem {
    tracing::debug!(kind = ?error.kind(), "a call of a host's cache failed");
    let sentence = "the hub's cache does not answer now: try again, and do without the value until then";
    Problem::new(Code::HubUnavailable, sentence)
}
