//! The results that are found by an id: of operations that were made elsewhere or by an earlier start, of questions, and
//! whatever has more to tell than a state.

use std::{
    collections::{HashMap, VecDeque},
    hash::{BuildHasherDefault, Hasher},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, UNIX_EPOCH},
};

use p2p_sync_proto::Problem;
use uuid::Uuid;

use super::{OperationState, Settled, ring::Noted, spread};
use crate::outbox::ms_since_1970;

/// Results remembered, settled and not; beyond it the oldest settled give way, then nothing new is remembered, but what
/// has a place in a bound of its own: what is to be told of, and questions.
const RESULTS_MAX: usize = 262_144;
/// A table that grows is a small one.
const SHARDS: usize = 64;

pub(super) struct Kept {
    shards: Vec<Mutex<Shard>>,
    began: Instant,
    keep: Duration,
}

#[derive(Default)]
struct Shard {
    results: HashMap<Uuid, Known, BuildHasherDefault<IdHasher>>,
    /// The settled, oldest first, with when they were: milliseconds since [`Kept::began`].
    order: VecDeque<(u64, Uuid)>,
}

/// A result as it is remembered: there are many, and few have more than their state.
struct Known {
    state: OperationState,
    is_question: bool,
    /// An event is to be told when it settles.
    notify: bool,
    at_ms: u64,
    more: Option<Box<More>>,
}

#[derive(Clone, Default)]
struct More {
    problem: Option<Problem>,
    data: Option<Arc<str>>,
}

/// Whether a result that is not known yet is remembered from now on.
#[derive(Clone, Copy)]
enum Remember {
    /// Whatever the bound.
    Always,
    WithinBound,
    Never,
}

impl Known {
    fn new(settled: &Settled, notify: bool, is_question: bool) -> Self {
        let more = || {
            Box::new(More {
                problem: settled.problem.clone(),
                data: settled.data.clone(),
            })
        };
        let has_more = settled.problem.is_some() || settled.data.is_some();
        Self {
            state: settled.state,
            is_question,
            notify,
            at_ms: ms_since_1970(settled.at),
            more: has_more.then(more),
        }
    }

    fn settled(&self) -> Settled {
        let More { problem, data } = self.more.as_deref().cloned().unwrap_or_default();
        Settled {
            state: self.state,
            problem,
            data,
            at: UNIX_EPOCH + Duration::from_millis(self.at_ms),
        }
    }
}

/// Ids are made at random by ourselves: to spread their bits is enough.
#[derive(Default)]
struct IdHasher(u64);

impl Hasher for IdHasher {
    fn write(&mut self, bytes: &[u8]) {
        if let Ok(id) = Uuid::from_slice(bytes) {
            self.0 = spread(id);
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

impl Kept {
    /// Keeps what is settled for so long.
    pub(super) fn new(keep: Duration) -> Self {
        Self {
            shards: std::iter::repeat_with(Mutex::default).take(SHARDS).collect(),
            began: Instant::now(),
            keep,
        }
    }

    fn shard(&self, id: Uuid) -> MutexGuard<'_, Shard> {
        // Other bits than those that place it in the shard's table.
        let index = usize::try_from((spread(id) >> 40) % SHARDS as u64).expect("below SHARDS");
        self.shards[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Notes that an operation was taken.
    pub(super) fn accept(&self, id: Uuid, at_ms: u64, notify: bool) {
        let known = Known {
            state: OperationState::Accepted,
            is_question: false,
            notify,
            at_ms,
            more: None,
        };
        let mut shard = self.shard(id);
        if shard.is_crowded() {
            shard.expire(self.now(), self.keep);
        }
        if notify || !shard.is_crowded() {
            shard.results.insert(id, known);
        }
    }

    /// Notes how far an operation has come, and remembers it if there is room.
    pub(super) fn set(&self, id: Uuid, settled: &Settled) -> Noted {
        self.change(id, settled, Remember::WithinBound, false, false)
    }

    /// Notes how far an operation has come, if it is known.
    pub(super) fn set_known(&self, id: Uuid, settled: &Settled) -> Noted {
        self.change(id, settled, Remember::Never, false, false)
    }

    /// Notes that a question was taken, or its answer.
    pub(super) fn set_question(&self, id: Uuid, settled: &Settled, notify: bool) -> Noted {
        self.change(id, settled, Remember::Always, notify, true)
    }

    fn change(&self, id: Uuid, settled: &Settled, remember: Remember, notify: bool, is_question: bool) -> Noted {
        let mut shard = self.shard(id);
        let now = self.now();
        shard.expire(now, self.keep);
        let has_room = match remember {
            Remember::Always => true,
            Remember::WithinBound => !shard.is_crowded(),
            Remember::Never => false,
        };
        let noted = match shard.results.get_mut(&id) {
            Some(known) if known.state.is_settled() => return Noted::Settled,
            Some(known) => {
                *known = Known::new(settled, known.notify, known.is_question);
                Noted::Changed { notify: known.notify }
            }
            None if has_room => {
                shard.results.insert(id, Known::new(settled, notify, is_question));
                Noted::Changed { notify }
            }
            None => return Noted::NotHere,
        };
        if settled.state.is_settled() {
            shard.order.push_back((now, id));
        }
        noted
    }

    /// Keeps a settled result no longer.
    pub(super) fn forget(&self, id: Uuid) {
        let mut shard = self.shard(id);
        if shard.results.get(&id).is_some_and(|known| known.state.is_settled()) {
            shard.results.remove(&id);
        }
    }

    /// Forgets what is not settled; gives whether an event was to be told of it.
    pub(super) fn remove_unsettled(&self, id: Uuid) -> Option<bool> {
        let mut shard = self.shard(id);
        let is_unsettled = |known: &Known| !known.state.is_settled();
        shard.results.get(&id).filter(|known| is_unsettled(known))?;
        shard.results.remove(&id).map(|known| known.notify)
    }

    /// Operations that are not settled, in no order; questions are none.
    pub(super) fn unsettled(&self) -> Vec<Uuid> {
        let mut ids = Vec::new();
        for shard in &self.shards {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            let is_unsettled = |known: &Known| !known.is_question && !known.state.is_settled();
            let unsettled = shard.results.iter().filter(|(_, known)| is_unsettled(known));
            ids.extend(unsettled.map(|(id, _)| *id));
        }
        ids
    }

    /// Lets go of what was kept its time, as far as it is near a result.
    pub(super) fn expire(&self, id: Uuid) {
        self.shard(id).expire(self.now(), self.keep);
    }

    pub(super) fn get(&self, id: Uuid) -> Option<Settled> {
        self.shard(id).results.get(&id).map(Known::settled)
    }
}

impl Shard {
    fn is_crowded(&self) -> bool {
        self.results.len() >= RESULTS_MAX / SHARDS
    }

    fn expire(&mut self, now: u64, keep: Duration) {
        while let Some(&(at, id)) = self.order.front() {
            if u128::from(now - at) < keep.as_millis() && !self.is_crowded() {
                return;
            }
            self.order.pop_front();
            self.results.remove(&id);
        }
    }
}
