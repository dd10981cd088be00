//! The way of a message of operations, from its seal to its answer.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use p2p_sync_proto::{Code, Problem, envelope::Lane, v1};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch},
    time::sleep,
};
use tonic::Status;
use uuid::Uuid;

use crate::{
    admission::{
        hosts::{Admitted, Host, Hosts},
        intake::Opening,
    },
    cache::Cache,
    embed::Embeddings,
    host_cache::HostCache,
    hosts::{Settings as MapSettings, attend::Attends},
    open::{Authenticated, Opener},
    operation::{Committed, Outcome, Valid},
    publish::Publisher,
    store::{Pace, Store},
    streams::Streams,
    validate::{types_file::Rules, validate},
    verdicts::Verdicts,
};

/// Messages that are opened, checked or stored at one time, each at most 2 MiB of operations and as much of envelope.
/// Bulk has fewer than critical, so that it sheds first.
const CRITICAL_WRITES_MAX: u32 = 256;
const BULK_WRITES_MAX: u32 = 32;
/// So many critical messages at one time say that they wait, be it for each other or for a slow database: then bulk has one
/// write at a time, and what finds no room is told to come again, until there are fewer. More than three hosts may have.
const CRITICAL_WRITES_MANY: usize = 64;
/// A critical message that took the database so long says that it is slow, for so long after; unless another host's took less
/// meanwhile, for then it is that message.
const SLOW_WRITE: Duration = Duration::from_millis(500);
const SLOW_FOR: Duration = Duration::from_secs(2);
/// How often bulk looks whether critical messages still wait.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);
/// Requests that are read for at one time, each at most 32 MiB of states on their way into a page. One connection fewer than
/// there are for reading: hellos and renewals wait for no page.
pub const READS_MAX: usize = 3;
/// When a message that could not be decided comes again.
const RETRY_AFTER_MS: u32 = 500;

/// The hub: what every stage works with.
#[derive(Debug)]
pub struct Hub {
    /// Who may send.
    pub opener: Opener,
    /// Who verifies a long message now.
    pub opening: Opening,
    /// How much each may send.
    pub hosts: Hosts,
    /// What may be sent.
    pub rules: ArcSwap<Rules>,
    /// Where the truth is.
    pub store: Store,
    /// What was written a moment ago.
    pub cache: Cache,
    /// Who is told of it.
    pub publisher: Publisher,
    /// What is followed, and by whom.
    pub streams: Arc<Streams>,
    /// What hosts keep here for a while, which is no state.
    pub host_cache: HostCache,
    /// How maps are given and moved.
    pub maps: MapSettings,
    /// Who is told of it.
    pub attends: Attends,
    /// What makes vectors of texts, and finds them.
    pub embeddings: Embeddings,
    /// The hub's timeline as the database told it last.
    pub timeline: AtomicU64,
    /// What was found against hosts.
    pub verdicts: Verdicts,
    /// How much is written at one time.
    pub writes: Writes,
    /// How much is read at one time.
    pub reads: Semaphore,
    /// How many machines are enrolled at one time.
    pub enrolments: Semaphore,
    /// Turns true when the hub shuts down: streams end then.
    pub draining: watch::Receiver<bool>,
}

impl Hub {
    /// Notes the timeline that the database tells. With another one it may have gone back, and then the cache has what it does
    /// not know.
    pub fn hear_timeline(&self, timeline: u64) {
        if self.timeline.swap(timeline, Ordering::Relaxed) != timeline {
            self.cache.distrust();
        }
    }
}

/// A message of operations whose sender is known, let in.
#[derive(Debug)]
pub struct LetIn {
    /// Who sent it.
    pub host: Arc<Host>,
    /// What was sent.
    pub message: Authenticated<v1::OperationBatch>,
    /// By which lane.
    pub lane: Lane,
    /// When it was opened.
    pub received: Instant,
    /// That it was let in.
    pub admitted: Admitted,
    /// Its place in its stream.
    pub turn: Turn,
}

/// The whole way, stage by stage: each takes what the one before made, so that none can be left out.
async fn write(hub: &Hub, let_in: LetIn) -> v1::Sealed {
    let LetIn {
        host,
        message,
        lane,
        received,
        admitted,
        mut turn,
    } = let_in;
    // Of one message: rules that change meanwhile hold for the next.
    let rules = hub.rules.load_full();
    let checking = host.checking().await;
    let (sender, valid) = validate(&rules, message).await;
    drop(checking);
    turn.come().await;
    let mut valid = valid.map(|valid| under_leases(hub, valid));
    if let Ok(valid) = &mut valid {
        hub.embeddings.mark(&rules, valid);
    }
    let held_back = valid.as_mut().ok().and_then(|valid| host.hold_back(&rules, valid));
    let writing = host.writing(lane).await;
    // It may have waited for long.
    if !hub.opener.lets_in(sender.host_id()).await {
        valid = Err(Problem::new(Code::Locked, SHUT_OUT));
    }
    let began = Instant::now();
    let committed = match &valid {
        Ok(valid) => hub
            .store
            .apply_at(valid, admitted.pace)
            .await
            .map_err(|unavailable| undecided(hub, valid, unavailable.into())),
        Err(problem) => Err(problem.clone()),
    };
    drop(writing);
    if admitted.pace == Pace::AtOnce {
        hub.writes.took(sender.host_id(), lane, began);
    }
    // All of these only queue: what they do with it happens beside the answer, and fails without it.
    match (&valid, &committed) {
        (Ok(valid), Ok(committed)) => {
            hub.hear_timeline(committed.timeline);
            hub.cache.put(&committed.changes);
            hub.publisher.publish(committed);
            hub.embeddings.queued(valid);
            hub.verdicts.judge(received, valid, committed);
        }
        (Err(problem), _) => hub.verdicts.judge_message(received, sender.host_id(), problem),
        _ => {}
    }
    drop(turn);
    let mut reply = reply(hub.timeline.load(Ordering::Relaxed), committed);
    if let (Code::None, Some((held, longest))) = (reply.code(), held_back) {
        let told = |index: &u32| Outcome::HeldBack.to_wire(*index);
        reply.outcomes.extend(held.iter().filter_map(told));
        reply.retry_after_ms = u32::try_from(longest.as_millis()).unwrap_or(u32::MAX).max(1);
    }
    // What it took of the hub comes back before its answer is read, or never is.
    drop(admitted);
    sender.seal(&reply)
}

/// Told under the seal of a host that was let in when its message came.
const SHUT_OUT: &str = "the hub's operator has shut this host out; what it has to send waits in its outbox";

/// Begins [`write`] at once and runs it to its end even if nobody waits for the answer any more, or never did: a caller's
/// deadline drops the handler, one that reads no answers leaves it unpolled, and the permit has to come back all the same.
pub fn write_to_the_end(hub: Arc<Hub>, let_in: LetIn) -> impl Future<Output = Result<v1::Sealed, Status>> + Send {
    let begun = Arc::clone(&hub);
    let task = tokio::spawn(async move { Ok(write(&begun, let_in).await) });
    async move {
        task.await.unwrap_or_else(|error| {
            // It may have come as far as the commit, and no further.
            hub.cache.distrust();
            tracing::error!(%error, "a write was cut off");
            let sentence = "the hub failed at this message; it is sent again";
            Err(Status::internal(Problem::new(Code::Internal, sentence).to_string()))
        })
    }
}

/// Where no lease governs, a tenure says nothing of who may write, and one left from before must not win over newer state.
fn under_leases(hub: &Hub, mut valid: Valid) -> Valid {
    if !hub.store.leases().required {
        for op in &mut valid.ops {
            op.tenure = 0;
        }
    }
    valid
}

/// Where the database broke off or refused to go on, it may have committed a part all the same.
fn undecided(hub: &Hub, valid: &Valid, problem: Problem) -> Problem {
    hub.cache.forget(valid.ops.iter().map(|op| &op.path));
    tracing::warn!(%problem, host_id = %valid.host_id, "a message was not decided");
    problem
}

/// The answer to a message of which nothing was decided.
pub fn refused(hub: &Hub, problem: Problem) -> v1::BatchReply {
    reply(hub.timeline.load(Ordering::Relaxed), Err(problem))
}

fn reply(timeline: u64, committed: Result<Committed, Problem>) -> v1::BatchReply {
    match committed {
        Ok(committed) => v1::BatchReply {
            timeline: committed.timeline,
            outcomes: committed.to_wire(),
            code: Code::None.into(),
            ..Default::default()
        },
        Err(problem) => v1::BatchReply {
            timeline,
            retry_after_ms: if problem.code.is_retryable() { RETRY_AFTER_MS } else { 0 },
            code: problem.code.into(),
            message: problem.sentence,
            ..Default::default()
        },
    }
}

/// Bounds how much is written at one time, for each lane by itself; bulk gives way to critical messages.
#[derive(Debug)]
pub struct Writes {
    critical: Arc<Semaphore>,
    bulk: Arc<Semaphore>,
    since: Instant,
    /// Milliseconds from `since` until which the database counts as slow.
    slow_until: AtomicU64,
    /// The last critical message that was not slow, and the last of another host than that.
    quick: Mutex<[Option<(Uuid, Instant)>; 2]>,
}

/// The right to write one message.
#[derive(Debug)]
pub struct WritePermit(#[expect(dead_code, reason = "held for its Drop")] OwnedSemaphorePermit);

impl Writes {
    /// Waits for the right to write a message of a lane.
    pub async fn permit(&self, lane: Lane) -> Result<WritePermit, Status> {
        if lane == Lane::Critical {
            let permit = Arc::clone(&self.critical).acquire_owned().await;
            return permit.map(WritePermit).map_err(|_| shutting_down());
        }
        while self.critical_waits() && self.bulk_is_busy() {
            sleep(LOOK_INTERVAL).await;
        }
        let permit = Arc::clone(&self.bulk).acquire_owned().await;
        permit.map(WritePermit).map_err(|_| shutting_down())
    }

    fn critical_waits(&self) -> bool {
        let free = self.critical.available_permits();
        let is_slow = || self.slow_until.load(Ordering::Relaxed) > self.now_ms();
        !self.critical.is_closed() && (free + CRITICAL_WRITES_MANY <= CRITICAL_WRITES_MAX as usize || is_slow())
    }

    fn bulk_is_busy(&self) -> bool {
        self.bulk.available_permits() < BULK_WRITES_MAX as usize
    }

    /// Notes that the database is done with a host's message.
    pub fn took(&self, host_id: Uuid, lane: Lane, began: Instant) {
        if lane == Lane::Bulk {
            return;
        }
        let now = Instant::now();
        let mut quick = self.quick.lock().unwrap_or_else(PoisonError::into_inner);
        if now.duration_since(began) < SLOW_WRITE {
            if quick[0].is_some_and(|(host, _)| host != host_id) {
                quick[1] = quick[0];
            }
            quick[0] = Some((host_id, now));
            return;
        }
        let meanwhile = |of: &Option<(Uuid, Instant)>| of.is_some_and(|(host, at)| host != host_id && at > began);
        if !quick.iter().any(meanwhile) {
            let until = self.now_ms() + u64::try_from(SLOW_FOR.as_millis()).unwrap_or(u64::MAX);
            self.slow_until.fetch_max(until, Ordering::Relaxed);
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Lets nothing more in, and waits until what was begun is done.
    pub async fn drained(&self) {
        for (semaphore, all) in [(&self.critical, CRITICAL_WRITES_MAX), (&self.bulk, BULK_WRITES_MAX)] {
            let done = semaphore.acquire_many(all).await;
            semaphore.close();
            drop(done);
        }
    }
}

impl Default for Writes {
    fn default() -> Self {
        Self {
            critical: Arc::new(Semaphore::new(CRITICAL_WRITES_MAX as usize)),
            bulk: Arc::new(Semaphore::new(BULK_WRITES_MAX as usize)),
            since: Instant::now(),
            slow_until: AtomicU64::new(0),
            quick: Mutex::default(),
        }
    }
}

fn shutting_down() -> Status {
    let sentence = "the hub is shutting down; it is sent again";
    Status::unavailable(Problem::new(Code::ShutDown, sentence).to_string())
}

/// A place in a row: messages of one stream are opened and checked side by side, and stored one after the other.
#[derive(Debug, Default)]
pub struct Turn {
    before: Option<oneshot::Receiver<()>>,
    /// Dropped with the turn, however that ends; that is the next one's sign.
    _after: Option<oneshot::Sender<()>>,
}

impl Turn {
    /// Waits until the turn before is over.
    async fn come(&mut self) {
        if let Some(before) = self.before.take() {
            // Nothing is ever sent: the turn before ends by dropping its sender, and that is no error.
            let _over = before.await;
        }
    }
}

/// Gives the turns of one stream, in order.
#[derive(Debug, Default)]
pub struct Turns {
    last: Option<oneshot::Receiver<()>>,
}

impl Turns {
    /// The turn after the one that was given before.
    pub fn next_turn(&mut self) -> Turn {
        let (after, over) = oneshot::channel();
        Turn {
            before: self.last.replace(over),
            _after: Some(after),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn turns_come_in_order_and_one_that_is_dropped_lets_the_next_on() {
        let mut turns = Turns::default();
        let (mut first, second, mut third) = (turns.next_turn(), turns.next_turn(), turns.next_turn());
        first.come().await;
        let mut third_comes = std::pin::pin!(third.come());
        assert!(futures::poll!(third_comes.as_mut()).is_pending());
        drop(second);
        drop(first);
        third_comes.await;
    }

    #[tokio::test]
    async fn draining_waits_for_what_was_begun_and_lets_nothing_in() {
        let writes = Writes::default();
        let permit = writes.permit(Lane::Critical).await.expect("room");
        let mut drained = std::pin::pin!(writes.drained());
        assert!(futures::poll!(drained.as_mut()).is_pending());
        drop(permit);
        drained.await;
        for lane in [Lane::Critical, Lane::Bulk] {
            let refused = writes.permit(lane).await.expect_err("closed");
            assert_eq!(refused.code(), tonic::Code::Unavailable);
        }
    }

    #[tokio::test]
    async fn invariant_10_bulk_gives_way_while_critical_messages_wait_or_the_database_is_slow() {
        let writes = Writes::default();
        let mut critical = Vec::new();
        for _ in 0..CRITICAL_WRITES_MANY {
            critical.push(writes.permit(Lane::Critical).await.expect("room"));
        }
        let first = writes.permit(Lane::Bulk).await.expect("one goes on");
        let mut second = std::pin::pin!(writes.permit(Lane::Bulk));
        assert!(futures::poll!(second.as_mut()).is_pending());
        critical.pop();
        let second = second.await.expect("they are fewer");
        let [one, other] = [1, 2].map(Uuid::from_u128);
        let long_ago = Instant::now()
            .checked_sub(2 * SLOW_WRITE)
            .expect("the machine runs for longer");
        writes.took(one, Lane::Bulk, long_ago);
        let third = writes.permit(Lane::Bulk).await.expect("bulk may take long");
        for host in [other, one, one] {
            writes.took(host, Lane::Critical, Instant::now());
        }
        writes.took(one, Lane::Critical, long_ago);
        let again = writes
            .permit(Lane::Bulk)
            .await
            .expect("another host's was quick meanwhile");
        drop(again);
        writes.quick.lock().expect("not poisoned")[1] = None;
        writes.took(one, Lane::Critical, long_ago);
        let mut fourth = std::pin::pin!(writes.permit(Lane::Bulk));
        assert!(futures::poll!(fourth.as_mut()).is_pending());
        drop((first, second, third));
        fourth.await.expect("one goes on");
    }

    #[test]
    fn a_message_that_was_not_decided_comes_again_unless_it_is_wrong() {
        let told = |code| reply(3, Err(Problem::new(code, "why")));
        assert_eq!(told(Code::HubUnavailable).retry_after_ms, RETRY_AFTER_MS);
        assert_eq!(told(Code::BadRequest).retry_after_ms, 0);
        assert_eq!(
            (told(Code::BadRequest).code(), told(Code::BadRequest).timeline),
            (Code::BadRequest, 3)
        );
    }
}
