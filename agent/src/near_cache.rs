//! The near cache: what was set, deleted or read here a moment ago, and the writes on their way to the hub.
//!
//! What is set here is seen here at once, and a deletion too, whether or not the hub has them yet; what the hub told is
//! kept for [`READ_KEPT`] alone, so that other writers show through. Cache values are not durable: writes wait for the
//! hub in memory, the newest of each key, until they expire, and those that have not left by a shutdown are counted in
//! the log and lost. A plain state machine; [`crate::link`] carries the writes. Keys and values stand in no log.

use std::{
    collections::{HashMap, VecDeque},
    num::NonZeroUsize,
    sync::Arc,
    time::{Duration, Instant},
};

use lru::LruCache;
use p2p_sync_proto::{Code, Problem, v1, v1::pull_request::What};

/// Values kept; what was used least recently gives way.
const ENTRIES_MAX: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");
/// Keys and values kept, bytes.
const BYTES_MAX: usize = 8 * 1024 * 1024;
/// How long what the hub told is believed.
const READ_KEPT: Duration = Duration::from_secs(1);
/// Writes and messages that wait for the hub, what is on its way included.
const WAITING_MAX: usize = 1024;
/// Their keys, values, channels and messages, bytes.
const WAITING_BYTES_MAX: usize = 8 * 1024 * 1024;
/// How long a message waits for the hub before it is given up: who listens wants to hear what happens now.
const MESSAGE_KEPT: Duration = Duration::from_secs(10);
/// How long after the hub refused a message as unsupported further ones are refused at once.
const REFUSAL_KEPT: Duration = Duration::from_secs(10);
/// What is counted so that a read does not bring back what was changed while it was on its way.
const STRIPES: usize = 256;

/// See the module.
pub(crate) struct NearCache {
    kept: LruCache<Arc<str>, Entry>,
    kept_bytes: usize,
    /// Newest per key, oldest first; the one that is on its way is apart.
    order: VecDeque<Arc<str>>,
    writes: HashMap<Arc<str>, Write>,
    messages: VecDeque<Message>,
    flying: Option<Flying>,
    waiting_bytes: usize,
    changes: [u32; STRIPES],
    unsupported: Option<(Problem, Instant)>,
    /// Given up since the start: messages and writes that expired before the hub took them, or that it refused.
    given_up: u64,
}

struct Entry {
    value: Arc<str>,
    until: Instant,
}

#[derive(Clone)]
struct Write {
    /// `None` deletes.
    value: Option<Arc<str>>,
    /// A deletion waits until it is sent.
    until: Option<Instant>,
}

#[derive(Clone)]
struct Message {
    channel: Arc<str>,
    text: Arc<str>,
    until: Instant,
}

enum Flying {
    Write(Arc<str>, Write),
    Message(Message),
}

/// What is known of a key without asking the hub.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Known {
    Value(Arc<str>),
    /// Deleted here.
    Absent,
    /// Ask the hub, and give this back to [`NearCache::note_read`].
    Unknown(u32),
}

impl Default for NearCache {
    fn default() -> Self {
        Self {
            kept: LruCache::new(ENTRIES_MAX),
            kept_bytes: 0,
            order: VecDeque::new(),
            writes: HashMap::new(),
            messages: VecDeque::new(),
            flying: None,
            waiting_bytes: 0,
            changes: [0; STRIPES],
            unsupported: None,
            given_up: 0,
        }
    }
}

impl NearCache {
    /// What is known of a key.
    pub(crate) fn look_up(&mut self, key: &str, now: Instant) -> Known {
        let flying = match &self.flying {
            Some(Flying::Write(flying, write)) if **flying == *key => Some(write),
            _ => None,
        };
        match self.writes.get(key).or(flying) {
            Some(write) if write.until.is_some_and(|until| until <= now) => return Known::Absent,
            Some(write) => return write.value.clone().map_or(Known::Absent, Known::Value),
            None => {}
        }
        match self.kept.get(key) {
            Some(entry) if entry.until > now => Known::Value(entry.value.clone()),
            _ => Known::Unknown(self.changes[stripe(key)]),
        }
    }

    /// Keeps a value and queues it for the hub. `QUEUE_FULL` changes nothing.
    pub(crate) fn set(&mut self, key: &str, value: &str, expiry: Duration, now: Instant) -> Result<(), Problem> {
        let (key, value, until): (Arc<str>, Arc<str>, _) = (key.into(), value.into(), now + expiry);
        let write = Write {
            value: Some(value.clone()),
            until: Some(until),
        };
        self.queue(key.clone(), write, now)?;
        self.keep(key, value, until);
        Ok(())
    }

    /// Forgets a value and queues the deletion. `QUEUE_FULL` changes nothing.
    pub(crate) fn delete(&mut self, key: &str, now: Instant) -> Result<(), Problem> {
        let write = Write {
            value: None,
            until: None,
        };
        self.queue(key.into(), write, now)?;
        self.forget(key);
        Ok(())
    }

    /// Queues a message. `QUEUE_FULL`, or `UNSUPPORTED` where the hub has just said so.
    pub(crate) fn publish(&mut self, channel: &str, text: &str, now: Instant) -> Result<(), Problem> {
        match &self.unsupported {
            Some((problem, until)) if *until > now => return Err(problem.clone()),
            _ => self.unsupported = None,
        }
        let added = channel.len() + text.len();
        self.give_up_expired(now);
        self.check_room(added, 1)?;
        self.waiting_bytes += added;
        self.messages.push_back(Message {
            channel: channel.into(),
            text: text.into(),
            until: now + MESSAGE_KEPT,
        });
        Ok(())
    }

    /// Keeps what the hub told, unless the key was changed here since it was asked.
    pub(crate) fn note_read(&mut self, key: &str, told: &v1::CacheValue, asked: u32, now: Instant) {
        if self.changes[stripe(key)] != asked {
            return;
        }
        let left = match told.expires_in_ms {
            0 => READ_KEPT,
            left_ms => READ_KEPT.min(Duration::from_millis(left_ms)),
        };
        self.keep(key.into(), told.value.as_str().into(), now + left);
    }

    /// The next request for the hub; [`Self::settle`] is called with its answer before the next one is taken.
    pub(crate) fn take(&mut self, now: Instant) -> Option<v1::PullRequest> {
        self.give_up_expired(now);
        if self.flying.is_none() {
            self.flying = match self.order.pop_front() {
                Some(key) => self.writes.remove(&key).map(|write| Flying::Write(key, write)),
                None => self.messages.pop_front().map(Flying::Message),
            };
        }
        let what = match self.flying.as_ref()? {
            Flying::Write(key, write) => write.request(key, now),
            Flying::Message(message) => What::Publish(v1::Publish {
                channel: message.channel.to_string(),
                message: message.text.to_string(),
            }),
        };
        Some(v1::PullRequest { what: Some(what) })
    }

    /// What became of the request taken last. True where it should be tried again after a while.
    pub(crate) fn settle(&mut self, refused: Option<Problem>, now: Instant) -> bool {
        let Some(flying) = self.flying.take() else { return false };
        let retry = refused.as_ref().is_some_and(|problem| problem.code.is_retryable());
        match flying {
            Flying::Write(key, write) if retry && !self.writes.contains_key(&key) => {
                self.order.push_front(key.clone());
                self.writes.insert(key, write);
                return true;
            }
            Flying::Message(message) if retry => {
                self.messages.push_front(message);
                return true;
            }
            Flying::Write(key, write) => {
                self.waiting_bytes -= write.bytes(&key);
                // A newer one has taken its place where it is to be retried.
                if refused.is_some() && !retry {
                    self.note_given_up();
                    self.forget(&key);
                }
            }
            Flying::Message(message) => {
                self.waiting_bytes -= message.bytes();
                if refused.is_some() {
                    self.note_given_up();
                }
            }
        }
        if let Some(problem) = refused.filter(|_| !retry) {
            tracing::warn!(%problem, "the hub refused a call of the cache");
            if problem.code == Code::Unsupported {
                self.unsupported = Some((problem, now + REFUSAL_KEPT));
            }
        }
        retry
    }

    /// What the hub does not have: writes and messages.
    pub(crate) fn waiting(&self) -> usize {
        self.writes.len() + self.messages.len() + usize::from(self.flying.is_some())
    }

    fn queue(&mut self, key: Arc<str>, write: Write, now: Instant) -> Result<(), Problem> {
        self.give_up_expired(now);
        let replaced = self.writes.get(&key).map(|older| older.bytes(&key));
        let added = write.bytes(&key);
        self.check_room(
            added.saturating_sub(replaced.unwrap_or(0)),
            usize::from(replaced.is_none()),
        )?;
        self.waiting_bytes = self.waiting_bytes + added - replaced.unwrap_or(0);
        if replaced.is_none() {
            self.order.push_back(key.clone());
        }
        let count = &mut self.changes[stripe(&key)];
        *count = count.wrapping_add(1);
        self.writes.insert(key, write);
        Ok(())
    }

    fn check_room(&self, bytes: usize, writes: usize) -> Result<(), Problem> {
        if self.waiting() + writes <= WAITING_MAX && self.waiting_bytes + bytes <= WAITING_BYTES_MAX {
            return Ok(());
        }
        let sentence = "too much that was cached waits for the hub: try again when the link is up, or cache less";
        Err(Problem::new(Code::QueueFull, sentence))
    }

    /// Looked at from the oldest on, as far as they have expired; what stands behind a longer-lived one goes in its turn.
    fn give_up_expired(&mut self, now: Instant) {
        while let Some(key) = self.order.front() {
            let expired = |write: &Write| write.until.is_some_and(|until| until <= now);
            if !self.writes.get(key).is_none_or(expired) {
                break;
            }
            let key = self.order.pop_front().expect("looked at above");
            if let Some(write) = self.writes.remove(&key) {
                self.waiting_bytes -= write.bytes(&key);
                self.note_given_up();
            }
        }
        while self.messages.front().is_some_and(|message| message.until <= now) {
            let message = self.messages.pop_front().expect("looked at above");
            self.waiting_bytes -= message.bytes();
            self.note_given_up();
        }
    }

    fn note_given_up(&mut self) {
        self.given_up += 1;
        if self.given_up.is_power_of_two() {
            tracing::warn!(
                given_up = self.given_up,
                "what was cached or published did not come to the hub"
            );
        }
    }

    fn keep(&mut self, key: Arc<str>, value: Arc<str>, until: Instant) {
        self.kept_bytes += key.len() + value.len();
        if let Some((key, gone)) = self.kept.push(key, Entry { value, until }) {
            self.kept_bytes -= key.len() + gone.value.len();
        }
        while self.kept_bytes > BYTES_MAX {
            let Some((key, gone)) = self.kept.pop_lru() else { break };
            self.kept_bytes -= key.len() + gone.value.len();
        }
    }

    fn forget(&mut self, key: &str) {
        if let Some(gone) = self.kept.pop(key) {
            self.kept_bytes -= key.len() + gone.value.len();
        }
    }
}

impl Write {
    fn bytes(&self, key: &str) -> usize {
        key.len() + self.value.as_deref().map_or(0, str::len)
    }

    /// With what is left of its time, so that waiting does not make it longer.
    fn request(&self, key: &str, now: Instant) -> What {
        let key = key.to_owned();
        match (&self.value, self.until) {
            (Some(value), Some(until)) => {
                let left = until.saturating_duration_since(now) + Duration::from_millis(999);
                What::CacheSet(v1::CacheSet {
                    key,
                    value: value.to_string(),
                    expiry_seconds: u32::try_from(left.as_secs()).unwrap_or(u32::MAX).max(1),
                })
            }
            _ => What::CacheDelete(v1::CacheDelete { key }),
        }
    }
}

impl Message {
    fn bytes(&self) -> usize {
        self.channel.len() + self.text.len()
    }
}

fn stripe(key: &str) -> usize {
    key.bytes()
        .fold(0_usize, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()))
        % STRIPES
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_mins(1);

    fn away() -> Problem {
        Problem::new(Code::HubUnavailable, "away")
    }

    fn value(text: &str) -> Known {
        Known::Value(text.into())
    }

    #[test]
    fn what_is_set_or_deleted_here_is_seen_here_at_once_and_for_its_time() {
        let (mut near, now) = (NearCache::default(), Instant::now());
        near.set("a", "1", MINUTE, now).expect("room");
        assert_eq!(near.look_up("a", now), value("1"));
        near.take(now).expect("to send");
        assert_eq!(near.look_up("a", now), value("1"), "on its way");
        near.settle(None, now);
        assert_eq!(near.look_up("a", now), value("1"), "at the hub");
        near.delete("a", now).expect("room");
        assert_eq!(near.look_up("a", now), Known::Absent);
        near.set("a", "2", MINUTE, now).expect("room");
        assert_eq!(near.look_up("a", now + MINUTE), Known::Absent, "expired");
    }

    #[test]
    fn the_newest_write_of_a_key_is_sent_once_with_what_is_left_of_its_time() {
        let (mut near, now) = (NearCache::default(), Instant::now());
        near.set("a", "1", MINUTE, now).expect("room");
        near.set("a", "2", MINUTE, now).expect("room");
        near.take(now).expect("to send");
        assert!(near.settle(Some(away()), now), "tried again");
        let sent = near.take(now + MINUTE / 2).expect("to send").what;
        let Some(What::CacheSet(write)) = sent else {
            panic!("{sent:?}")
        };
        assert_eq!((write.value.as_str(), write.expiry_seconds), ("2", 30));
        assert!(!near.settle(None, now));
        assert_eq!((near.take(now), near.waiting(), near.waiting_bytes), (None, 0, 0));
    }

    #[test]
    fn a_newer_write_goes_before_the_retry_of_an_older_one() {
        let (mut near, now) = (NearCache::default(), Instant::now());
        near.set("a", "1", MINUTE, now).expect("room");
        near.take(now).expect("to send");
        near.delete("a", now).expect("room");
        near.settle(Some(away()), now);
        let sent = near.take(now).expect("to send").what;
        assert!(matches!(sent, Some(What::CacheDelete(_))), "{sent:?}");
        near.settle(None, now);
        assert_eq!((near.waiting(), near.waiting_bytes), (0, 0));
    }

    #[test]
    fn what_waits_is_bounded_and_expires() {
        let (mut near, now) = (NearCache::default(), Instant::now());
        for number in 0..WAITING_MAX {
            near.set(&number.to_string(), "1", MINUTE, now).expect("room");
        }
        let refused = near.set("one more", "1", MINUTE, now).expect_err("full");
        assert_eq!(refused.code, Code::QueueFull);
        assert!(matches!(near.look_up("one more", now), Known::Unknown(_)));
        near.set("0", "2", MINUTE, now)
            .expect("takes the place of an older one");
        near.set("one more", "1", MINUTE, now + MINUTE)
            .expect("the others expired");
        assert_eq!((near.waiting(), near.given_up), (1, WAITING_MAX as u64));
        let text = "x".repeat(256 * 1024);
        let taken = (0..64).filter(|number| near.publish("c", &format!("{number}{text}"), now).is_ok());
        assert_eq!(taken.count(), 31);
    }

    #[test]
    fn what_is_kept_is_bounded_in_bytes_and_number() {
        let (mut near, now) = (NearCache::default(), Instant::now());
        for number in 0..5000 {
            near.keep(number.to_string().into(), "1".into(), now + MINUTE);
        }
        assert_eq!(near.kept.len(), ENTRIES_MAX.get());
        for number in 0..100 {
            near.keep(number.to_string().into(), "x".repeat(256 * 1024).into(), now + MINUTE);
        }
        let counted: usize = near.kept.iter().map(|(key, entry)| key.len() + entry.value.len()).sum();
        assert!(counted <= BYTES_MAX && near.kept_bytes == counted);
    }

    #[test]
    fn what_the_hub_told_is_kept_shortly_and_gives_way_to_what_was_changed_meanwhile() {
        let (mut near, now) = (NearCache::default(), Instant::now());
        let told = |expires_in_ms| v1::CacheValue {
            value: "1".to_owned(),
            expires_in_ms,
        };
        let Known::Unknown(asked) = near.look_up("a", now) else {
            panic!("nothing is known")
        };
        near.note_read("a", &told(0), asked, now);
        assert_eq!(near.look_up("a", now), value("1"));
        assert_eq!(near.look_up("a", now + READ_KEPT), Known::Unknown(asked));
        near.delete("a", now).expect("room");
        near.take(now).expect("to send");
        near.settle(None, now);
        near.note_read("a", &told(0), asked, now);
        assert!(matches!(near.look_up("a", now), Known::Unknown(_)), "deleted meanwhile");
    }

    #[test]
    fn a_hub_without_listeners_is_asked_again_only_after_a_while() {
        let (mut near, now) = (NearCache::default(), Instant::now());
        near.publish("c", "m", now).expect("room");
        near.take(now).expect("to send");
        near.settle(Some(Problem::new(Code::Unsupported, "no Redis")), now);
        assert_eq!(near.publish("c", "m", now).expect_err("known").code, Code::Unsupported);
        assert!(near.publish("c", "m", now + REFUSAL_KEPT).is_ok());
    }
}
