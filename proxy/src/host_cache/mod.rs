//! What hosts cache: a key space for each host, the operator's shared one that hosts only read, and their channels.
//!
//! It has nothing to do with the state that [`crate::cache`] holds: nothing here is durable, and Postgres knows none of
//! it. A host's space is bounded by bytes, entries and time; when it is full, what would expire first gives way. Without
//! Redis it lives in this process and is lost with it, and the shared space is empty, for the operator writes that one in
//! Redis: `SET <redis_prefix>:shared:<name> <value>` is read as the key `shared:<name>`.
//!
//! A write takes effect once: each host's writes are in the order of their messages' positions, and one that is not newer
//! than the last that took effect is a replay, or was overtaken on its way. The last one's position is kept where the values
//! are, so that whoever loses one loses both: what was recorded before that can then be written once more, until the host
//! writes itself.
//!
//! Keys and values are the hosts' data: they stand in no log and no error text.

mod process;
mod redis;

use std::time::Duration;

use p2p_sync_proto::{
    Code, Position, Problem,
    cache::{SHARED_PREFIX, check_channel, check_key, check_own_key, check_value},
    limits::CACHE_EXPIRY_SECONDS_MAX,
    message::Label,
    v1,
};
use tokio::sync::Semaphore;
use uuid::Uuid;

use self::{process::ProcessSpaces, redis::RedisSpaces};
use crate::redis_client::RedisClient;

/// Keys, values and [`ENTRY_BYTES`] for each, of one host.
const HOST_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Values of one host.
const HOST_ENTRIES_MAX: usize = 16_384;
/// What one value costs beyond its own text and its key, bytes.
const ENTRY_BYTES: usize = 256;
/// Calls answered at one time; each holds one value.
const CALLS_MAX: usize = 64;

const _: () = assert!(
    p2p_sync_proto::limits::CACHE_VALUE_BYTES_MAX + p2p_sync_proto::limits::CACHE_KEY_BYTES_MAX + ENTRY_BYTES
        <= HOST_BYTES_MAX,
    "the largest value fits into a host's space"
);

/// The largest number that Redis' scripts tell from its neighbours.
const COUNTER_MAX: u64 = (1 << 53) - 1;

/// Who writes, and where that write stands among its others.
#[derive(Clone, Copy, Debug)]
pub struct Writer {
    host_id: Uuid,
    position: Position,
}

impl Writer {
    /// By what a message's seal proves.
    pub fn new(label: &Label) -> Self {
        Self {
            host_id: label.host_id,
            position: Position {
                incarnation: label.incarnation,
                sequence: label.sequence,
            },
        }
    }

    fn check(self) -> Result<Self, Problem> {
        let Position { incarnation, sequence } = self.position;
        if (1..=COUNTER_MAX).contains(&incarnation) && sequence <= COUNTER_MAX {
            return Ok(self);
        }
        let sentence = "what is cached is numbered by the outbox that it comes from: send it through an agent";
        Err(Problem::new(Code::BadRequest, sentence))
    }
}

/// The hosts' spaces, in one of their two places.
#[derive(Debug)]
pub struct HostCache {
    place: Place,
    calls: Semaphore,
}

#[derive(Debug)]
enum Place {
    Process(ProcessSpaces),
    Redis(Box<RedisSpaces>),
}

/// What was found at a key.
type Found = Option<v1::CacheValue>;

impl HostCache {
    /// Spaces for a hub of one process, lost at its end.
    pub fn process() -> Self {
        Self::new(Place::Process(ProcessSpaces::default()))
    }

    /// Spaces in Redis, shared by the proxies of one database.
    pub fn redis(client: RedisClient, prefix: &str) -> Self {
        Self::new(Place::Redis(Box::new(RedisSpaces::new(client, prefix))))
    }

    fn new(place: Place) -> Self {
        Self {
            place,
            calls: Semaphore::new(CALLS_MAX),
        }
    }

    /// The value at a key; `None` where there is none. `HUB_UNAVAILABLE` where Redis does not answer, as for all calls.
    pub async fn get(&self, host_id: Uuid, key: &str) -> Result<Found, Problem> {
        check_key(key)?;
        let _permit = self.calls.acquire().await;
        match (&self.place, key.strip_prefix(SHARED_PREFIX)) {
            (Place::Process(_), Some(_)) => Ok(None),
            (Place::Process(spaces), None) => Ok(spaces.get(host_id, key)),
            (Place::Redis(spaces), Some(name)) => spaces.get_shared(name).await,
            (Place::Redis(spaces), None) => spaces.get(host_id, key).await,
        }
    }

    /// Whether there is a value at a key.
    pub async fn exists(&self, host_id: Uuid, key: &str) -> Result<bool, Problem> {
        check_key(key)?;
        let _permit = self.calls.acquire().await;
        match (&self.place, key.strip_prefix(SHARED_PREFIX)) {
            (Place::Process(_), Some(_)) => Ok(false),
            (Place::Process(spaces), None) => Ok(spaces.get(host_id, key).is_some()),
            (Place::Redis(spaces), Some(name)) => spaces.exists_shared(name).await,
            (Place::Redis(spaces), None) => spaces.exists(host_id, key).await,
        }
    }

    /// Keeps a value for so long; 0 and what is longer than 30 days are 30 days. `NOT_ALLOWED` for the shared space;
    /// `REPLAY`, as for all writes, where the host's last one is as new.
    pub async fn set(&self, writer: Writer, key: &str, value: String, expiry_seconds: u32) -> Result<(), Problem> {
        check_own_key(key)?;
        check_value(&value)?;
        let writer = writer.check()?;
        let _permit = self.calls.acquire().await;
        let expiry = match expiry_seconds {
            0 => CACHE_EXPIRY_SECONDS_MAX,
            seconds => seconds.min(CACHE_EXPIRY_SECONDS_MAX),
        };
        let expiry = Duration::from_secs(expiry.into());
        match &self.place {
            Place::Process(spaces) => {
                spaces.note(writer)?;
                spaces.set(writer.host_id, key, value, expiry);
                Ok(())
            }
            Place::Redis(spaces) => spaces.set(writer, key, &value, expiry).await,
        }
    }

    /// Removes a value; gives whether it was there. `NOT_ALLOWED` for the shared space.
    pub async fn delete(&self, writer: Writer, key: &str) -> Result<bool, Problem> {
        check_own_key(key)?;
        let writer = writer.check()?;
        let _permit = self.calls.acquire().await;
        match &self.place {
            Place::Process(spaces) => {
                spaces.note(writer)?;
                Ok(spaces.delete(writer.host_id, key))
            }
            Place::Redis(spaces) => spaces.delete(writer, key).await,
        }
    }

    /// Tells those who listen on a channel of this host. `UNSUPPORTED` without Redis.
    pub async fn publish(&self, writer: Writer, channel: &str, message: &str) -> Result<(), Problem> {
        check_channel(channel)?;
        check_value(message)?;
        let writer = writer.check()?;
        let _permit = self.calls.acquire().await;
        match &self.place {
            Place::Process(_) => Err(Problem::new(
                Code::Unsupported,
                "this hub runs without Redis, so nobody can listen: ask its operator to set redis_host",
            )),
            Place::Redis(spaces) => spaces.publish(writer, channel, message).await,
        }
    }
}

/// What a write is told that is no newer than the last one.
fn overtaken() -> Problem {
    let sentence = "a newer write of this host was taken before, or this very one: seal it anew to have it written";
    Problem::new(Code::Replay, sentence)
}

/// What an entry counts towards the bounds.
fn bytes(key: &str, value: &str) -> usize {
    key.len() + value.len() + ENTRY_BYTES
}

fn to_wire(value: String, left: Duration) -> v1::CacheValue {
    v1::CacheValue {
        value,
        expires_in_ms: u64::try_from(left.as_millis()).unwrap_or(u64::MAX).max(1),
    }
}
