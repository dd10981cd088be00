//! The way of a message of operations, from its seal to its answer.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use arc_swap::ArcSwap;
use p2p_sync_proto::{Code, Problem, envelope::Lane, v1};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError, oneshot, watch};
use tonic::Status;

use crate::{
    cache::Cache,
    host_cache::HostCache,
    open::{Opener, Replayed},
    operation::{Committed, Valid},
    publish::Publisher,
    store::Store,
    validate::{types_file::Rules, validate},
    verdicts::Verdicts,
};

/// Messages that are opened, checked or stored at one time, each at most 2 MiB of operations and as much of envelope.
/// Bulk has fewer than critical, so that it sheds first.
const CRITICAL_WRITES_MAX: u32 = 256;
const BULK_WRITES_MAX: u32 = 32;
/// Requests that are read for at one time, each at most 32 MiB of states on their way into a page.
pub const READS_MAX: usize = 8;
/// When a message that could not be decided comes again.
const RETRY_AFTER_MS: u32 = 500;

/// The hub: what every stage works with.
#[derive(Debug)]
pub struct Hub {
    /// Who may send.
    pub opener: Opener,
    /// What may be sent.
    pub rules: ArcSwap<Rules>,
    /// Where the truth is.
    pub store: Store,
    /// What was written a moment ago.
    pub cache: Cache,
    /// Who is told of it.
    pub publisher: Publisher,
    /// What hosts keep here for a while, which is no state.
    pub host_cache: HostCache,
    /// The hub's timeline as the database told it last.
    pub timeline: AtomicU64,
    /// What was found against hosts.
    pub verdicts: Verdicts,
    /// How much is written at one time.
    pub writes: Writes,
    /// How much is read at one time.
    pub reads: Semaphore,
    /// Turns true when the hub shuts down: streams end then.
    pub draining: watch::Receiver<bool>,
}

/// The whole way, stage by stage: each takes what the one before made, so that none can be left out.
async fn write(hub: &Hub, lane: Lane, sealed: &v1::Sealed, mut turn: Turn) -> Result<v1::Sealed, Status> {
    let received = Instant::now();
    let timeline = || hub.timeline.load(Ordering::Relaxed);
    let authenticated = match hub.opener.open(lane, sealed).await? {
        Ok(authenticated) => authenticated,
        Err(Replayed { sender, problem }) => return Ok(sender.seal(&reply(timeline(), Err(problem)))),
    };
    // Of one message: rules that change meanwhile hold for the next.
    let rules = hub.rules.load_full();
    let (sender, valid) = validate(&rules, authenticated).await;
    turn.come().await;
    let valid = valid.map(|valid| under_leases(hub, valid));
    let committed = match &valid {
        Ok(valid) => hub
            .store
            .apply(valid)
            .await
            .map_err(|unavailable| undecided(hub, valid, unavailable.into())),
        Err(problem) => Err(problem.clone()),
    };
    // All of these only queue: what they do with it happens beside the answer, and fails without it.
    match (&valid, &committed) {
        (Ok(valid), Ok(committed)) => {
            hub.cache.put(&committed.changes);
            hub.publisher.publish(&committed.changes);
            hub.verdicts.judge(received, valid, committed);
            hub.timeline.store(committed.timeline, Ordering::Relaxed);
        }
        (Err(problem), _) => hub.verdicts.judge_message(received, sender.host_id(), problem),
        _ => {}
    }
    drop(turn);
    Ok(sender.seal(&reply(timeline(), committed)))
}

/// Begins [`write`] at once and runs it to its end even if nobody waits for the answer any more, or never did: a caller's
/// deadline drops the handler, one that reads no answers leaves it unpolled, and the permit has to come back all the same.
pub fn write_to_the_end(
    hub: Arc<Hub>,
    lane: Lane,
    sealed: v1::Sealed,
    permit: WritePermit,
    turn: Turn,
) -> impl Future<Output = Result<v1::Sealed, Status>> + Send {
    let begun = Arc::clone(&hub);
    let task = tokio::spawn(async move {
        let answer = write(&begun, lane, &sealed, turn).await;
        drop(permit);
        answer
    });
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

fn reply(timeline: u64, committed: Result<Committed, Problem>) -> v1::BatchReply {
    match committed {
        Ok(committed) => v1::BatchReply {
            timeline: committed.timeline,
            outcomes: committed
                .outcomes
                .iter()
                .filter_map(|(index, outcome)| outcome.to_wire(*index))
                .collect(),
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

/// Bounds how much is written at one time, for each lane by itself.
#[derive(Debug)]
pub struct Writes {
    critical: Arc<Semaphore>,
    bulk: Arc<Semaphore>,
}

/// The right to write one message.
#[derive(Debug)]
pub struct WritePermit(#[expect(dead_code, reason = "held for its Drop")] OwnedSemaphorePermit);

impl Writes {
    /// Waits for the right to write a message of the bulk lane; the sender's window waits with it.
    pub async fn bulk(&self) -> Result<WritePermit, Status> {
        let permit = Arc::clone(&self.bulk).acquire_owned().await;
        permit.map(WritePermit).map_err(|_| shutting_down())
    }

    /// The right to write a message of the critical lane, or `RESOURCE_EXHAUSTED` at once: its caller waits.
    pub fn critical(&self) -> Result<WritePermit, Status> {
        Arc::clone(&self.critical)
            .try_acquire_owned()
            .map(WritePermit)
            .map_err(|error| match error {
                TryAcquireError::Closed => shutting_down(),
                TryAcquireError::NoPermits => {
                    let sentence = "the hub has too much to write; it is sent again";
                    Status::resource_exhausted(Problem::new(Code::RateLimited, sentence).to_string())
                }
            })
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
        let permit = writes.critical().expect("room");
        let mut drained = std::pin::pin!(writes.drained());
        assert!(futures::poll!(drained.as_mut()).is_pending());
        drop(permit);
        drained.await;
        assert_eq!(writes.critical().expect_err("closed").code(), tonic::Code::Unavailable);
        assert_eq!(
            writes.bulk().await.expect_err("closed").code(),
            tonic::Code::Unavailable
        );
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
