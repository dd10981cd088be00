//! What the agent holds of the streams that its program follows: the newest state of each path, to be read without the hub.
//!
//! It is as current as what the hub has pushed. So it answers only while the hub is heard, and once the snapshot is whole; and
//! it is bounded: a subscription that holds more than there is room for is told to the program all the same, and not kept.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use p2p_sync_proto::{Code, Path, Problem, v1};
use prost::Message as _;

use crate::subscriptions::Subscription;

/// Of all subscriptions together, encoded, with what a path takes beside.
const BYTES_MAX: usize = 16 * 1024 * 1024;
const STATE_BYTES: usize = 256;
/// The hub is heard: it says how far the stream is every 3 s.
const HEARD_WITHIN: Duration = Duration::from_secs(7);

/// What is kept, by subscription.
#[derive(Default)]
pub(crate) struct Replicas {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    kept: HashMap<u64, Replica>,
    bytes: usize,
}

struct Replica {
    subscription: Subscription,
    states: HashMap<String, v1::State>,
    bytes: usize,
    /// Everything that was there when it began is here.
    whole: bool,
    /// There was no room.
    given_up: bool,
    heard: Instant,
}

impl Replicas {
    /// Begins to keep what a subscription is told.
    pub(crate) fn begin(&self, id: u64, subscription: Subscription) {
        let replica = Replica {
            subscription,
            states: HashMap::new(),
            bytes: 0,
            whole: false,
            given_up: false,
            heard: Instant::now(),
        };
        self.lock().kept.insert(id, replica);
    }

    pub(crate) fn end(&self, id: u64) {
        let mut inner = self.lock();
        if let Some(replica) = inner.kept.remove(&id) {
            inner.bytes -= replica.bytes;
        }
    }

    /// Takes a message of the hub's: what is new in it, whether it begins a snapshot, and whether it ends where the stream does.
    pub(crate) fn take(&self, id: u64, states: &[v1::State], begins: bool, is_all: bool) {
        let mut inner = self.lock();
        let Inner { kept, bytes } = &mut *inner;
        let Some(replica) = kept.get_mut(&id) else { return };
        if begins {
            replica.clear(bytes);
            (replica.whole, replica.given_up) = (false, false);
        }
        replica.heard = Instant::now();
        for state in states {
            if replica.given_up {
                break;
            }
            let before = replica.states.remove(&state.path);
            let freed = before.as_ref().map_or(0, size);
            let taken = if state.deleted { 0 } else { size(state) };
            replica.bytes = replica.bytes - freed + taken;
            *bytes = *bytes - freed + taken;
            if !state.deleted {
                replica.states.insert(state.path.clone(), state.clone());
            }
            if *bytes > BYTES_MAX {
                let stream = &replica.subscription.stream;
                tracing::warn!(
                    stream,
                    "a subscription holds more than is kept here: the hub is asked for it"
                );
                replica.clear(bytes);
                replica.given_up = true;
            }
        }
        replica.whole |= is_all;
    }

    /// The state at a path as it was pushed; `NOT_FOUND` where there is none, `NOT_KEPT` where nobody here can say.
    pub(crate) fn get(&self, path: &Path) -> Result<v1::State, Problem> {
        let inner = self.lock();
        let covers = |replica: &&Replica| {
            replica.whole
                && !replica.given_up
                && replica.heard.elapsed() < HEARD_WITHIN
                && replica.subscription.covers(path)
        };
        let not_kept = || {
            let sentence = format!("{path} is not kept here: follow its stream, wait for its snapshot, or ask the hub");
            Problem::new(Code::NotKept, sentence)
        };
        let replica = inner.kept.values().find(covers).ok_or_else(not_kept)?;
        let missing = || Problem::new(Code::NotFound, format!("there is no state at {path}"));
        replica.states.get(path.as_str()).cloned().ok_or_else(missing)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Replica {
    fn clear(&mut self, all_bytes: &mut usize) {
        *all_bytes -= self.bytes;
        self.bytes = 0;
        self.states = HashMap::new();
    }
}

fn size(state: &v1::State) -> usize {
    state.encoded_len() + STATE_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    fn follows(prefix: &str) -> Subscription {
        Subscription {
            stream: "prontera".to_owned(),
            types: vec![],
            path_prefix: prefix.to_owned(),
        }
    }

    fn state(path: &str, payload_bytes: usize, deleted: bool) -> v1::State {
        v1::State {
            path: path.to_owned(),
            payload: vec![b' '; payload_bytes].into(),
            deleted,
            ..Default::default()
        }
    }

    fn code_of(replicas: &Replicas, path: &str) -> Code {
        let path = Path::parse(path).expect("a path");
        replicas.get(&path).map_or_else(|problem| problem.code, |_| Code::None)
    }

    #[test]
    fn what_was_pushed_is_read_once_the_snapshot_is_whole_and_as_far_as_it_reaches() {
        let replicas = Replicas::default();
        replicas.begin(1, follows("prontera/ITEM_DROP"));
        let drop = "prontera/ITEM_DROP/7";
        replicas.take(1, &[state(drop, 3, false)], true, false);
        assert_eq!(code_of(&replicas, drop), Code::NotKept, "more may come");
        replicas.take(1, &[], false, true);
        assert_eq!(code_of(&replicas, drop), Code::None);
        assert_eq!(code_of(&replicas, "prontera/ITEM_DROP/8"), Code::NotFound);
        assert_eq!(code_of(&replicas, "prontera/MAP_STATE"), Code::NotKept);
        assert_eq!(code_of(&replicas, "geffen/ITEM_DROP/7"), Code::NotKept);
        replicas.take(1, &[state(drop, 0, true)], false, true);
        assert_eq!(code_of(&replicas, drop), Code::NotFound);
        replicas.end(1);
        assert_eq!(code_of(&replicas, drop), Code::NotKept);
        assert_eq!(replicas.lock().bytes, 0);
    }

    #[test]
    fn invariant_12_more_than_there_is_room_for_is_not_kept_and_a_new_snapshot_begins_again() {
        let replicas = Replicas::default();
        replicas.begin(1, follows(""));
        let drop = |number: usize| state(&format!("prontera/ITEM_DROP/{number}"), 256 * 1024, false);
        for number in 0..100 {
            replicas.take(1, &[drop(number)], false, true);
            assert!(replicas.lock().bytes <= BYTES_MAX);
        }
        assert_eq!(code_of(&replicas, "prontera/ITEM_DROP/99"), Code::NotKept);
        replicas.take(1, &[drop(1)], true, true);
        assert_eq!(code_of(&replicas, "prontera/ITEM_DROP/1"), Code::None);
    }
}
