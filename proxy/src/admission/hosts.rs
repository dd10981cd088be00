//! What a host may do: its rates, its share of what the hub does at one time, and what it may leave unread.

use std::{
    collections::VecDeque,
    num::{NonZeroU32, NonZeroUsize},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use lru::LruCache;
use p2p_sync_proto::{
    Code, Problem,
    envelope::Lane,
    group::Glance,
    limits::{BATCH_OPS_MAX, BULK_WINDOW_BATCHES, CRITICAL_IN_FLIGHT_MAX, MESSAGE_BYTES_MAX},
    policy::TYPES,
    v1,
};
use prost::bytes::Bytes;
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore, SemaphorePermit},
    time::{sleep, timeout_at},
};
use uuid::Uuid;

use super::Rate;
use crate::{
    operation::Valid,
    pipeline::{WritePermit, Writes},
    store::Pace,
    streams::End,
    validate::types_file::Rules,
};

/// Hosts remembered; the one heard least recently begins anew.
const HOSTS_MAX: NonZeroUsize = NonZeroUsize::new(16 * 1024).expect("not zero");
/// A burst is what comes in so long.
const BURST_SECONDS: u32 = 2;
/// A host that has less of its burst left than one in so many is at its rate.
const BURST_LEFT: u32 = 4;
/// What a host that is at its rate may send in this time is written at once, and the rest of its message as time goes on: it
/// comes evenly, as from who never sends faster, and nobody waits for the whole of a large message.
const PACE: Duration = Duration::from_millis(50);
/// But at least so many operations: a transaction has its price.
const SLICE_MIN: usize = 32;
/// How long a message waits for its host's rate or its share before it is told to come again. Who waits for an answer to a
/// critical one has half a second by default; bulk's sender just sends on later.
const CRITICAL_PATIENCE: Duration = Duration::from_millis(200);
const BULK_PATIENCE: Duration = Duration::from_secs(10);
const CALL_PATIENCE: Duration = Duration::from_secs(2);
/// Hellos, renewals and requests for maps: one of each every few seconds a connection is an agent's habit.
const SESSION_CALLS_PER_SECOND: NonZeroU32 = NonZeroU32::new(10).expect("not zero");
const SESSION_CALLS_BURST: NonZeroU32 = NonZeroU32::new(100).expect("not zero");
/// Of the hub's permits: what an agent has in flight, twice, for the connection that it has just lost may still be there.
const CRITICAL_SHARE: usize = 2 * CRITICAL_IN_FLIGHT_MAX;
const BULK_SHARE: usize = BULK_WINDOW_BATCHES;
/// Of the hub's reads.
const READS_SHARE: usize = 2;
/// Calls for embeddings of one host at one time: they may take as long as the provider does.
const EMBEDDINGS_SHARE: usize = 4;
/// Messages that are checked at one time, and are written at one time by each lane: what one host writes waits for itself in
/// the database, and would do so on all of its connections.
const CHECKED_SHARE: usize = 2;
const WRITING_SHARE: usize = 2;
/// Of what its messages take in memory from when they are opened, and of answers that it has not read. In KiB.
const HELD_KIB: usize = 16 * 1024;
const UNREAD_KIB: usize = 8 * 1024;
/// Streams of batches; the oldest ends for one more, which a host opens that has lost the connection of the others.
const STREAMS_MAX: usize = 4;
/// Watches, and the streams of all of them together; the oldest watch ends for one more, likewise.
const WATCHES_MAX: usize = 128;
const FOLLOWED_MAX: usize = 512;
/// Streams of notices, one a connection; the oldest ends for one more, likewise.
const ATTENDS_MAX: usize = 4;
/// When what found no room comes again.
const RETRY_AFTER: Duration = Duration::from_millis(500);
/// Between two lines of the log that say that a host is held back.
const TOLD_EVERY: Duration = Duration::from_mins(1);

/// What every host may send a second.
#[derive(Clone, Copy, Debug)]
pub struct Quota {
    /// Operations by each lane.
    pub operations: NonZeroU32,
    /// KiB of operations by each lane.
    pub kib: NonZeroU32,
    /// Questions and calls of the cache.
    pub calls: NonZeroU32,
}

/// All hosts that were heard of late.
#[derive(Debug)]
pub struct Hosts {
    quota: Quota,
    writing_share: usize,
    known: Mutex<LruCache<Uuid, Arc<Host>>>,
}

/// One host.
#[derive(Debug)]
pub struct Host {
    id: Uuid,
    critical: LaneShare,
    bulk: LaneShare,
    calls: Rate,
    session_calls: Rate,
    session: Semaphore,
    /// By the number of the type, each with the rate that it was made for.
    types: Mutex<Vec<Option<TypeRate>>>,
    reads: Arc<Semaphore>,
    /// Texts that it has embedded, and searches, at one time.
    embeddings: Arc<Semaphore>,
    checked: Semaphore,
    held: Arc<Semaphore>,
    unread: Arc<Semaphore>,
    streams: Mutex<VecDeque<Arc<Notify>>>,
    watches: Mutex<VecDeque<Arc<End>>>,
    followed: Arc<Semaphore>,
    attends: Mutex<VecDeque<Arc<End>>>,
    refused: Mutex<Refused>,
}

/// What a rate was made for, and the rate.
type TypeRate = (NonZeroU32, Arc<Rate>);

#[derive(Debug)]
struct LaneShare {
    operations: Rate,
    /// In KiB.
    bytes: Rate,
    permits: Arc<Semaphore>,
    writing: Semaphore,
}

impl LaneShare {
    /// How fast a message is written that leaves so many operations of the host's burst.
    fn pace(&self, left: u32) -> Pace {
        if left >= self.operations.burst.get() / BURST_LEFT {
            return Pace::AtOnce;
        }
        let in_a_slice = f64::from(self.operations.per_second.get()) * PACE.as_secs_f64();
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let operations = (in_a_slice as usize).max(SLICE_MIN);
        Pace::Slices {
            operations,
            every: PACE,
        }
    }
}

#[derive(Debug, Default)]
struct Refused {
    times: u64,
    told: Option<Instant>,
}

/// There is no room for it now: nothing of it was decided, and it comes again after a while.
#[derive(Clone, Debug)]
pub struct Busy {
    /// `RATE_LIMITED`, with what to do.
    pub problem: Problem,
    /// When to come again.
    pub retry_after: Duration,
}

impl Busy {
    fn new(sentence: &str, retry_after: Duration) -> Self {
        Self {
            problem: Problem::new(Code::RateLimited, sentence),
            retry_after,
        }
    }

    /// As the answer to a message.
    pub fn reply(self, timeline: u64) -> v1::BatchReply {
        v1::BatchReply {
            timeline,
            code: self.problem.code.into(),
            message: self.problem.sentence,
            retry_after_ms: milliseconds(self.retry_after),
            ..Default::default()
        }
    }
}

/// At least 1: 0 says nothing.
fn milliseconds(time: Duration) -> u32 {
    u32::try_from(time.as_millis()).unwrap_or(u32::MAX).saturating_add(1)
}

/// The right to write a message of one host.
#[derive(Debug)]
pub struct Admitted {
    /// How fast it is written.
    pub pace: Pace,
    _hub: WritePermit,
    _share: OwnedSemaphorePermit,
    _memory: OwnedSemaphorePermit,
}

/// A stream's place among its host's, given back with this value.
#[derive(Debug)]
pub struct StreamPlace {
    host: Arc<Host>,
    ends: Arc<Notify>,
}

/// A watch's place among its host's, given back with this value.
#[derive(Debug)]
pub struct WatchPlace {
    host: Arc<Host>,
    end: Arc<End>,
    _followed: OwnedSemaphorePermit,
}

/// The place of a stream of notices among its host's, given back with this value.
#[derive(Debug)]
pub struct AttendPlace {
    host: Arc<Host>,
    end: Arc<End>,
}

impl Hosts {
    /// Nobody was heard yet. `connections` is how many the database gives to a lane.
    pub fn new(quota: Quota, connections: usize) -> Self {
        Self {
            quota,
            writing_share: (connections / 2).clamp(1, WRITING_SHARE),
            known: Mutex::new(LruCache::new(HOSTS_MAX)),
        }
    }

    /// The host that a seal has proven.
    pub fn of(&self, id: Uuid) -> Arc<Host> {
        let mut known = lock(&self.known);
        let host = known.get_or_insert(id, || Arc::new(Host::new(id, self.quota, self.writing_share)));
        Arc::clone(host)
    }
}

impl Host {
    fn new(id: Uuid, quota: Quota, writing_share: usize) -> Self {
        let share = |permits| LaneShare {
            operations: rate(quota.operations, BATCH_OPS_MAX),
            bytes: rate(quota.kib, MESSAGE_BYTES_MAX / 1024),
            permits: Arc::new(Semaphore::new(permits)),
            writing: Semaphore::new(writing_share),
        };
        Self {
            id,
            critical: share(CRITICAL_SHARE),
            bulk: share(BULK_SHARE),
            calls: rate(quota.calls, 1),
            session_calls: Rate::new(SESSION_CALLS_PER_SECOND, SESSION_CALLS_BURST),
            session: Semaphore::new(1),
            types: Mutex::new(vec![None; TYPES.len()]),
            reads: Arc::new(Semaphore::new(READS_SHARE)),
            embeddings: Arc::new(Semaphore::new(EMBEDDINGS_SHARE)),
            checked: Semaphore::new(CHECKED_SHARE),
            held: Arc::new(Semaphore::new(HELD_KIB)),
            unread: Arc::new(Semaphore::new(UNREAD_KIB)),
            streams: Mutex::default(),
            watches: Mutex::default(),
            followed: Arc::new(Semaphore::new(FOLLOWED_MAX)),
            attends: Mutex::default(),
            refused: Mutex::default(),
        }
    }

    fn lane(&self, lane: Lane) -> &LaneShare {
        if lane == Lane::Critical {
            &self.critical
        } else {
            &self.bulk
        }
    }

    /// Waits until a message of the host may go on its way, or tells it to come again: the lane's sender waits with it, so
    /// that what is sent faster than it may be stays with the host.
    pub async fn admit(
        &self,
        lane: Lane,
        message: &v1::OperationBatch,
        writes: &Writes,
    ) -> Result<Result<Admitted, Busy>, tonic::Status> {
        let patience = if lane == Lane::Critical {
            CRITICAL_PATIENCE
        } else {
            BULK_PATIENCE
        };
        let until = Instant::now() + patience;
        let kib = message.operations.iter().map(Bytes::len).sum::<usize>() / 1024 + 1;
        let share = self.lane(lane);
        let in_turn = async {
            let memory = permits(&self.held, kib).await;
            let left = match self.take(&share.operations, operations(message), until).await {
                Ok(left) => left,
                Err(wait) => return Ok(Err(Busy::new("the host sends more operations than it may", wait))),
            };
            if let Err(wait) = self.take(&share.bytes, kib, until).await {
                return Ok(Err(Busy::new("the host sends more bytes than it may", wait)));
            }
            let own = permits(&share.permits, 1).await;
            let hub = writes.permit(lane).await?;
            Ok(Ok(Admitted {
                pace: share.pace(left),
                _hub: hub,
                _share: own,
                _memory: memory,
            }))
        };
        let admitted = timeout_at(until.into(), in_turn).await;
        let admitted = admitted.unwrap_or_else(|_| {
            Ok(Err(Busy::new(
                "the hub has too much to write; it is sent again",
                RETRY_AFTER,
            )))
        });
        if let Ok(Err(busy)) = &admitted {
            self.note_refusal(&busy.problem.sentence);
        }
        admitted
    }

    /// Takes so many of a rate as soon as they are there, and gives how many are left; the error is how long it would be, which is beyond `until`.
    async fn take(&self, rate: &Rate, many: usize, until: Instant) -> Result<u32, Duration> {
        loop {
            match rate.take(many) {
                Err(wait) if Instant::now() + wait < until => sleep(wait).await,
                taken => return taken,
            }
        }
    }

    /// Waits until the host may ask something.
    pub async fn question(&self) -> Result<OwnedSemaphorePermit, Problem> {
        self.asking(&self.reads).await
    }

    /// As [`Self::question`], for what a provider outside may take its time for: the host's other questions do not wait for it.
    pub async fn slow_question(&self) -> Result<OwnedSemaphorePermit, Problem> {
        self.asking(&self.embeddings).await
    }

    async fn asking(&self, share: &Arc<Semaphore>) -> Result<OwnedSemaphorePermit, Problem> {
        let until = Instant::now() + CALL_PATIENCE;
        let in_turn = async {
            self.take(&self.calls, 1, until).await?;
            Ok(permits(share, 1).await)
        };
        let asked = timeout_at(until.into(), in_turn).await;
        asked.unwrap_or(Err(RETRY_AFTER)).map_err(|wait| self.too_many(wait))
    }

    /// Whether the host may say hello, renew its leases or its credential, or ask something of maps; one of these at a time, for each takes a
    /// connection to the database, and may wait there for what the host itself writes.
    pub async fn session_call(&self) -> Result<SemaphorePermit<'_>, Problem> {
        self.session_calls.take(1).map_err(|wait| self.too_many(wait))?;
        Ok(self.session.acquire().await.expect("it is never closed"))
    }

    fn too_many(&self, wait: Duration) -> Problem {
        let wait = milliseconds(wait);
        let sentence = format!("the host asks more than it may: ask again in {wait} ms");
        self.note_refusal(&sentence);
        Problem::new(Code::RateLimited, sentence)
    }

    /// Waits until a message of the host may be checked: others' are checked beside it, whatever it sends.
    pub async fn checking(&self) -> Option<SemaphorePermit<'_>> {
        // Never closed.
        self.checked.acquire().await.ok()
    }

    /// Waits until a message of the host may be written.
    pub async fn writing(&self, lane: Lane) -> Option<SemaphorePermit<'_>> {
        // Never closed.
        self.lane(lane).writing.acquire().await.ok()
    }

    /// Waits until the host has read enough of its answers to get one of so many bytes.
    pub async fn answering(&self, bytes: usize) -> OwnedSemaphorePermit {
        permits(&self.unread, bytes / 1024 + 1).await
    }

    /// Takes out of a checked message what its types have no room for now; gives the indices of what was taken out, and
    /// when it may come again. What came after it of the same type goes with it, so that the order stays.
    pub fn hold_back(&self, rules: &Rules, valid: &mut Valid) -> Option<(Vec<u32>, Duration)> {
        let is_limited = |op: &crate::operation::ValidOp| rules.of(op.data_type).ops_per_second.is_some();
        if !valid.ops.iter().any(is_limited) {
            return None;
        }
        let mut spent = [false; TYPES.len()];
        let (mut held, mut longest) = (Vec::new(), Duration::ZERO);
        // The members of a group are one operation.
        for unit in valid.ops.chunk_by(|one, next| one.index == next.index) {
            let mut counts = [0_usize; TYPES.len()];
            for op in unit {
                counts[op.data_type as usize] += 1;
            }
            let mut is_held = unit.iter().any(|op| spent[op.data_type as usize]);
            for op in unit {
                // Each type once.
                let many = std::mem::take(&mut counts[op.data_type as usize]);
                let Some(rate) = self.of_type(op.data_type, rules).filter(|_| !is_held && many > 0) else {
                    continue;
                };
                if let Err(wait) = rate.take(many) {
                    longest = longest.max(wait);
                    is_held = true;
                }
            }
            if is_held {
                held.push(unit[0].index);
                for op in unit {
                    spent[op.data_type as usize] = true;
                }
            }
        }
        if held.is_empty() {
            return None;
        }
        valid.ops.retain(|op| !held.contains(&op.index));
        self.note_refusal("a type of data comes faster than types.toml allows");
        Some((held, longest))
    }

    fn of_type(&self, data_type: v1::SyncDataType, rules: &Rules) -> Option<Arc<Rate>> {
        let per_second = rules.of(data_type).ops_per_second?;
        let mut types = lock(&self.types);
        let known = &mut types[data_type as usize];
        match known {
            Some((made_for, rate)) if *made_for == per_second => Some(Arc::clone(rate)),
            _ => {
                let made = Arc::new(rate(per_second, 1));
                *known = Some((per_second, Arc::clone(&made)));
                Some(made)
            }
        }
    }

    /// A further stream of batches, which ends when `ends` is told.
    pub fn stream(self: &Arc<Self>, ends: &Arc<Notify>) -> StreamPlace {
        let mut streams = lock(&self.streams);
        streams.push_back(Arc::clone(ends));
        if streams.len() > STREAMS_MAX
            && let Some(oldest) = streams.pop_front()
        {
            oldest.notify_one();
        }
        StreamPlace {
            host: Arc::clone(self),
            ends: Arc::clone(ends),
        }
    }

    /// A further watch of so many streams, which ends when `end` is told. `RATE_LIMITED` with too many streams.
    pub fn watch(self: &Arc<Self>, streams: usize, end: &Arc<End>) -> Result<WatchPlace, Problem> {
        let many = u32::try_from(streams).unwrap_or(u32::MAX);
        let followed = Arc::clone(&self.followed).try_acquire_many_owned(many).map_err(|_| {
            let sentence = format!("the host follows {FOLLOWED_MAX} streams already: end a watch first");
            self.note_refusal(&sentence);
            Problem::new(Code::RateLimited, sentence)
        })?;
        let mut watches = lock(&self.watches);
        watches.push_back(Arc::clone(end));
        if watches.len() > WATCHES_MAX
            && let Some(oldest) = watches.pop_front()
        {
            let sentence = format!("the host has opened {WATCHES_MAX} watches since: the oldest ends");
            oldest.now(Problem::new(Code::RateLimited, sentence));
        }
        Ok(WatchPlace {
            host: Arc::clone(self),
            end: Arc::clone(end),
            _followed: followed,
        })
    }

    /// A further stream of notices, which ends when `end` is told.
    pub fn attend(self: &Arc<Self>, end: &Arc<End>) -> AttendPlace {
        let mut attends = lock(&self.attends);
        attends.push_back(Arc::clone(end));
        if attends.len() > ATTENDS_MAX
            && let Some(oldest) = attends.pop_front()
        {
            let sentence = format!("the host attends {ATTENDS_MAX} times since: the oldest ends");
            oldest.now(Problem::new(Code::RateLimited, sentence));
        }
        AttendPlace {
            host: Arc::clone(self),
            end: Arc::clone(end),
        }
    }

    /// Waits until a watch of the host may read from the database for itself.
    pub async fn reading(&self) -> OwnedSemaphorePermit {
        permits(&self.reads, 1).await
    }

    /// Counts that something of the host was put off, and tells it now and then.
    fn note_refusal(&self, why: &str) {
        let mut refused = lock(&self.refused);
        refused.times += 1;
        if refused.told.is_none_or(|told| told.elapsed() >= TOLD_EVERY) {
            refused.told = Some(Instant::now());
            let times = std::mem::take(&mut refused.times);
            tracing::warn!(host_id = %self.id, times, why, "a host is held back, so that others are served");
        }
    }
}

impl Drop for StreamPlace {
    fn drop(&mut self) {
        lock(&self.host.streams).retain(|ends| !Arc::ptr_eq(ends, &self.ends));
    }
}

impl Drop for AttendPlace {
    fn drop(&mut self) {
        lock(&self.host.attends).retain(|end| !Arc::ptr_eq(end, &self.end));
    }
}

impl Drop for WatchPlace {
    fn drop(&mut self) {
        lock(&self.host.watches).retain(|end| !Arc::ptr_eq(end, &self.end));
    }
}

fn rate(per_second: NonZeroU32, burst_min: usize) -> Rate {
    let burst_min = u32::try_from(burst_min).ok().and_then(NonZeroU32::new);
    let burst = NonZeroU32::new(per_second.get().saturating_mul(BURST_SECONDS));
    let burst = burst.into_iter().chain(burst_min).max().unwrap_or(per_second);
    Rate::new(per_second, burst)
}

/// How many operations a message has; members of groups count, and ranges that are withdrawn, for each costs as much.
fn operations(message: &v1::OperationBatch) -> usize {
    let count = |bytes| Glance::at(bytes).map_or(1, |glance| glance.members.max(1));
    message.operations.iter().map(count).sum::<usize>() + message.withdrawn.len()
}

/// Waits for so many permits, or for all that there are.
async fn permits(semaphore: &Arc<Semaphore>, many: usize) -> OwnedSemaphorePermit {
    let many = u32::try_from(many).unwrap_or(u32::MAX);
    Arc::clone(semaphore)
        .acquire_many_owned(many)
        .await
        .expect("no share is ever closed")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosts(per_second: u32) -> Hosts {
        let number = |number| NonZeroU32::new(number).expect("not zero");
        let quota = Quota {
            operations: number(per_second),
            kib: number(1 << 20),
            calls: number(per_second),
        };
        Hosts::new(quota, 4)
    }

    fn message(operations: usize) -> v1::OperationBatch {
        v1::OperationBatch {
            operations: vec![Vec::new().into(); operations],
            withdrawn: vec![],
        }
    }

    async fn admit(host: &Host, lane: Lane, operations: usize, writes: &Writes) -> Result<Admitted, Busy> {
        let admitted = host.admit(lane, &message(operations), writes).await;
        admitted.expect("not shutting down")
    }

    #[tokio::test]
    async fn invariant_10_a_host_has_its_share_of_what_is_written_and_others_have_theirs() {
        let (hosts, writes) = (hosts(1_000_000), Writes::default());
        let (greedy, modest) = (hosts.of(Uuid::from_u128(1)), hosts.of(Uuid::from_u128(2)));
        let mut held = Vec::new();
        for _ in 0..CRITICAL_SHARE {
            held.push(admit(&greedy, Lane::Critical, 1, &writes).await.expect("its share"));
        }
        let busy = admit(&greedy, Lane::Critical, 1, &writes)
            .await
            .expect_err("more than that");
        assert_eq!(busy.clone().reply(7).code(), v1::RejectCode::RateLimited);
        assert!(busy.reply(7).retry_after_ms > 0);
        admit(&modest, Lane::Critical, 1, &writes).await.expect("another's");
        held.pop();
        admit(&greedy, Lane::Critical, 1, &writes).await.expect("room again");
    }

    #[tokio::test]
    async fn a_host_keeps_its_rate_while_it_is_looked_up_and_each_lane_has_its_own() {
        let (hosts, writes) = (hosts(100), Writes::default());
        let id = Uuid::from_u128(1);
        admit(&hosts.of(id), Lane::Critical, BATCH_OPS_MAX, &writes)
            .await
            .expect("a burst");
        let busy = admit(&hosts.of(id), Lane::Critical, BATCH_OPS_MAX, &writes)
            .await
            .expect_err("used up");
        assert!(busy.retry_after > Duration::from_secs(4), "{busy:?}");
        admit(&hosts.of(id), Lane::Bulk, BATCH_OPS_MAX, &writes)
            .await
            .expect("the other lane's");
        let began = Instant::now();
        admit(&hosts.of(id), Lane::Bulk, 50, &writes)
            .await
            .expect("it waits for it");
        assert!(began.elapsed() > Duration::from_millis(400), "{:?}", began.elapsed());
    }

    #[tokio::test]
    async fn what_a_host_holds_in_memory_is_bounded() {
        let (hosts, writes) = (hosts(1_000_000), Writes::default());
        let host = hosts.of(Uuid::from_u128(1));
        let large = v1::OperationBatch {
            operations: vec![vec![0; MESSAGE_BYTES_MAX].into()],
            withdrawn: vec![],
        };
        let mut held = Vec::new();
        while let Ok(admitted) = host
            .admit(Lane::Critical, &large, &writes)
            .await
            .expect("not shutting down")
        {
            held.push(admitted);
        }
        assert_eq!(held.len(), HELD_KIB / (MESSAGE_BYTES_MAX / 1024 + 1));
    }

    #[tokio::test]
    async fn what_a_provider_takes_its_time_for_holds_up_no_other_question() {
        let hosts = hosts(1000);
        let host = hosts.of(Uuid::from_u128(1));
        let mut embedding = Vec::new();
        for _ in 0..EMBEDDINGS_SHARE {
            embedding.push(host.slow_question().await.expect("its share"));
        }
        let mut one_more = std::pin::pin!(host.slow_question());
        assert!(futures::poll!(one_more.as_mut()).is_pending());
        let _read = host.question().await.expect("another share");
    }

    #[tokio::test]
    async fn questions_have_a_share_and_a_rate() {
        let hosts = hosts(1);
        let host = hosts.of(Uuid::from_u128(1));
        let _first = host.question().await.expect("a burst");
        let _second = host.question().await.expect("a burst");
        let problem = host.question().await.expect_err("no turn, and none to come");
        assert_eq!(problem.code, Code::RateLimited);
        assert!(problem.sentence.contains("ask again in"), "{problem}");
    }
}
