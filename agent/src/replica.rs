//! What the agent holds of streams that are followed, by its program or for a map that it stands by for: the newest state of
//! each path, to be read without the hub.
//!
//! It is as current as what the hub has pushed. So it answers only while the hub is heard, and once the snapshot is whole; and
//! it is bounded: a subscription that holds more than there is room for is told to the program all the same, and not kept.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Bound,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use p2p_sync_proto::{
    Code, Path, Problem,
    at_least::AtLeast,
    limits::{MESSAGE_BYTES_MAX, PAGE_STATES_MAX},
    v1::{self, pull_reply, pull_request},
};
use prost::Message as _;
use uuid::Uuid;

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
    /// In the order of their paths.
    states: BTreeMap<String, v1::State>,
    bytes: usize,
    /// Everything up to here was told.
    at: u64,
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
            states: BTreeMap::new(),
            bytes: 0,
            at: 0,
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

    /// Takes a message of the hub's: what is new in it, whether it begins a snapshot, how far it goes and how far the stream
    /// does. Gives how far what is kept is whole.
    pub(crate) fn take(&self, id: u64, states: &[v1::State], begins: bool, at: u64, head: u64) -> Option<u64> {
        let mut inner = self.lock();
        let Inner { kept, bytes } = &mut *inner;
        let replica = kept.get_mut(&id)?;
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
        replica.whole |= at >= head;
        replica.at = at;
        replica.whole_upto()
    }

    /// How much is kept under an id.
    pub(crate) fn status(&self, id: u64) -> Option<Kept> {
        let inner = self.lock();
        let replica = inner.kept.get(&id)?;
        Some(Kept {
            at: replica.at,
            whole: replica.whole_upto().is_some(),
            states: replica.states.len(),
            bytes: replica.bytes,
        })
    }

    /// What a host's request to read asks for, as it was pushed; `NOT_FOUND` where there is none, `NOT_KEPT` where nobody here
    /// can say, or what is here may be older than it must be.
    pub(crate) fn answer(&self, request: &v1::PullRequest, asker: Uuid) -> Result<v1::PullReply, Problem> {
        let what = match &request.what {
            Some(pull_request::What::Get(get)) => {
                let path = Path::parse(&get.path)?;
                pull_reply::What::State(self.get(&path, &AtLeast::of(get, asker)?)?)
            }
            Some(pull_request::What::Scan(scan)) => pull_reply::What::Page(self.scan(scan)?),
            _ => return Err(not_kept("this")),
        };
        Ok(v1::PullReply {
            what: Some(what),
            ..Default::default()
        })
    }

    fn get(&self, path: &Path, at_least: &AtLeast) -> Result<v1::State, Problem> {
        let inner = self.lock();
        let replica = inner.find(|subscription| subscription.covers(path));
        let replica = replica.ok_or_else(|| not_kept(path.as_str()))?;
        let state = replica.states.get(path.as_str());
        if !at_least.is_held_by(state) {
            let sentence = format!("what is kept here of {path} may be older: wait for the update, or ask the hub");
            return Err(Problem::new(Code::NotKept, sentence));
        }
        let missing = || Problem::new(Code::NotFound, format!("there is no state at {path}"));
        state.cloned().ok_or_else(missing)
    }

    /// Its cursor is the last path.
    fn scan(&self, scan: &v1::Scan) -> Result<v1::Page, Problem> {
        let inner = self.lock();
        let replica = inner.find(|subscription| subscription.covers_all(&scan.prefix));
        let replica = replica.ok_or_else(|| not_kept(&scan.prefix))?;
        let after = std::str::from_utf8(&scan.cursor).ok().filter(|after| {
            let is_its = after.is_empty() || after.starts_with(&scan.prefix);
            is_its && !after.contains('\0')
        });
        let not_one = || Problem::new(Code::BadCursor, "the cursor is not one: leave it out to begin again");
        let from = match after.ok_or_else(not_one)? {
            "" => Bound::Included(scan.prefix.as_str()),
            after => Bound::Excluded(after),
        };
        let limit = match scan.limit {
            0 => PAGE_STATES_MAX,
            limit => limit.min(PAGE_STATES_MAX),
        };
        let mut page = v1::Page::default();
        let mut bytes = 0;
        let range = replica.states.range::<str, _>((from, Bound::Unbounded));
        for (path, state) in range.take_while(|(path, _)| path.starts_with(&scan.prefix)) {
            bytes += state.encoded_len();
            if page.states.len() >= limit as usize || (bytes > MESSAGE_BYTES_MAX && !page.states.is_empty()) {
                page.more = true;
                break;
            }
            page.cursor = path.clone().into();
            page.states.push(state.clone());
        }
        if !page.more {
            page.cursor = prost::bytes::Bytes::new();
        }
        Ok(page)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How much is kept of a subscription.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Kept {
    /// Everything up to here was told.
    pub(crate) at: u64,
    /// Everything is here.
    pub(crate) whole: bool,
    pub(crate) states: usize,
    pub(crate) bytes: usize,
}

impl Inner {
    /// One that can be read of, of those that cover something.
    fn find(&self, covers: impl Fn(&Subscription) -> bool) -> Option<&Replica> {
        let is_one = |replica: &&Replica| {
            replica.whole_upto().is_some() && replica.heard.elapsed() < HEARD_WITHIN && covers(&replica.subscription)
        };
        self.kept.values().find(is_one)
    }
}

fn not_kept(what: &str) -> Problem {
    let sentence = format!("{what} is not kept here: follow its stream, wait for its snapshot, or ask the hub");
    Problem::new(Code::NotKept, sentence)
}

impl Replica {
    fn whole_upto(&self) -> Option<u64> {
        (self.whole && !self.given_up).then_some(self.at)
    }

    fn clear(&mut self, all_bytes: &mut usize) {
        *all_bytes -= self.bytes;
        self.bytes = 0;
        self.states = BTreeMap::new();
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

    /// A message up to where the stream is, or that more follows.
    fn take(replicas: &Replicas, states: &[v1::State], begins: bool, is_all: bool) -> Option<u64> {
        replicas.take(1, states, begins, 5, if is_all { 5 } else { 9 })
    }

    fn code_of(replicas: &Replicas, path: &str) -> Code {
        let path = Path::parse(path).expect("a path");
        let told = replicas.get(&path, &AtLeast::default());
        told.map_or_else(|problem| problem.code, |_| Code::None)
    }

    #[test]
    fn what_was_pushed_is_read_once_the_snapshot_is_whole_and_as_far_as_it_reaches() {
        let replicas = Replicas::default();
        replicas.begin(1, follows("prontera/ITEM_DROP"));
        let drop = "prontera/ITEM_DROP/7";
        take(&replicas, &[state(drop, 3, false)], true, false);
        assert_eq!(code_of(&replicas, drop), Code::NotKept, "more may come");
        take(&replicas, &[], false, true);
        assert_eq!(code_of(&replicas, drop), Code::None);
        assert_eq!(code_of(&replicas, "prontera/ITEM_DROP/8"), Code::NotFound);
        assert_eq!(code_of(&replicas, "prontera/MAP_STATE"), Code::NotKept);
        assert_eq!(code_of(&replicas, "geffen/ITEM_DROP/7"), Code::NotKept);
        take(&replicas, &[state(drop, 0, true)], false, true);
        assert_eq!(code_of(&replicas, drop), Code::NotFound);
        replicas.end(1);
        assert_eq!(code_of(&replicas, drop), Code::NotKept);
        assert_eq!(replicas.lock().bytes, 0);
    }

    #[test]
    fn a_prefix_is_read_page_by_page_in_the_order_of_the_paths() {
        let replicas = Replicas::default();
        replicas.begin(1, follows(""));
        let states: Vec<_> = [9, 7, 8]
            .map(|number| state(&format!("prontera/ITEM_DROP/{number}"), 3, false))
            .into_iter()
            .chain([state("prontera/MAP_STATE", 3, false)])
            .collect();
        assert_eq!(take(&replicas, &states, true, true), Some(5));
        let scan = |prefix: &str, limit, cursor: &[u8]| {
            let scan = v1::Scan {
                prefix: prefix.to_owned(),
                limit,
                cursor: cursor.to_vec().into(),
            };
            let read = replicas.scan(&scan).map_err(|problem| problem.code)?;
            let paths: Vec<_> = read.states.into_iter().map(|state| state.path).collect();
            Ok((paths, read.more, read.cursor))
        };
        let (first, more, cursor) = scan("prontera/ITEM_DROP/", 2, b"").expect("kept");
        assert_eq!((first.len(), more), (2, true));
        let (second, more, cursor) = scan("prontera/ITEM_DROP/", 2, &cursor).expect("kept");
        assert_eq!(
            (second, more, cursor.len()),
            (vec!["prontera/ITEM_DROP/9".to_owned()], false, 0)
        );
        assert_eq!(scan("prontera/", 0, b"").expect("kept").0.len(), 4);
        assert_eq!(scan("geffen/", 0, b""), Err(Code::NotKept));
        assert_eq!(scan("pront", 0, b""), Err(Code::NotKept), "it may be of another map");
        assert_eq!(scan("prontera/", 0, b"geffen/MAP_STATE"), Err(Code::BadCursor));
    }

    #[test]
    fn what_may_be_older_than_it_must_be_is_not_told() {
        let replicas = Replicas::default();
        replicas.begin(1, follows(""));
        let kept = v1::State {
            stream_sequence: 8,
            ..state("prontera/ITEM_DROP/7", 3, false)
        };
        take(&replicas, &[kept], true, true);
        let code = |path: &str, at_least_sequence| {
            let get = v1::Get {
                at_least_sequence,
                ..Default::default()
            };
            let at_least = AtLeast::of(&get, Uuid::nil()).expect("no host is named");
            let told = replicas.get(&Path::parse(path).expect("a path"), &at_least);
            told.map_or_else(|problem| problem.code, |_| Code::None)
        };
        let codes = [7, 8, 9].map(|sequence| code("prontera/ITEM_DROP/7", sequence));
        assert_eq!(codes, [Code::None, Code::None, Code::NotKept]);
        let of_none = [0, 8].map(|sequence| code("prontera/ITEM_DROP/8", sequence));
        assert_eq!(of_none, [Code::NotFound, Code::NotKept], "gone, or not told of yet");
    }

    #[test]
    fn invariant_12_more_than_there_is_room_for_is_not_kept_and_a_new_snapshot_begins_again() {
        let replicas = Replicas::default();
        replicas.begin(1, follows(""));
        let drop = |number: usize| state(&format!("prontera/ITEM_DROP/{number}"), 256 * 1024, false);
        for number in 0..100 {
            take(&replicas, &[drop(number)], false, true);
            assert!(replicas.lock().bytes <= BYTES_MAX);
        }
        assert_eq!(code_of(&replicas, "prontera/ITEM_DROP/99"), Code::NotKept);
        take(&replicas, &[drop(1)], true, true);
        assert_eq!(code_of(&replicas, "prontera/ITEM_DROP/1"), Code::None);
    }
}
