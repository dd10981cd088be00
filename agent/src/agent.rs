//! The agent: lanes, outbox and link put together.

use std::{
    path::PathBuf,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, Sender};
use p2p_sync_proto::{Code, Policies, Position, Problem, path::Path, v1};
use tokio::{runtime::Runtime, sync::Notify};
use uuid::Uuid;

use crate::{
    config::Config,
    lanes::{Lanes, Submission},
    link::{self, Link, LinkState},
    outbox::{Change, DeadLetter, Outbox},
    pending::{Entry, Flight, Pending},
    resend,
    results::{Event, Observer, OperationState, Results, Settled},
    spooler::{Alarm, Spooler},
};

/// How soon an operation is sent again whose predecessor was not settled yet, first and longest.
const NOT_YET_DELAY: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(1));

/// What all of the agent's threads share.
pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) outbox_id: Uuid,
    pub(crate) incarnation: u64,
    pub(crate) oldest_incarnation: u64,
    pub(crate) lanes: Lanes,
    critical: Receiver<Entry>,
    pending: Mutex<Pending>,
    pub(crate) results: Results,
    /// Settlements on their way to the spooler. Bounded by what was in `pending` to be settled.
    changes: Mutex<Vec<Change>>,
    pub(crate) alarm: Alarm,
    pub(crate) critical_wake: Notify,
    pub(crate) bulk_wake: Notify,
    pub(crate) link: LinkState,
    stopping: AtomicBool,
    pub(crate) stop_wake: Notify,
    /// Someone waits for the outbox to be empty: nothing lingers.
    flushing: AtomicBool,
    outbox_bytes: AtomicU64,
    outbox_operations: AtomicU64,
    drained: (Mutex<()>, Condvar),
    dead_letter_requests: (Sender<DeadLetterRequest>, Receiver<DeadLetterRequest>),
}

type DeadLetterRequest = (usize, Sender<Result<Vec<DeadLetter>, Problem>>);

impl Shared {
    pub(crate) fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    pub(crate) fn is_disk_full(&self) -> bool {
        self.lanes.disk.full.load(Ordering::Relaxed)
    }

    pub(crate) fn set_disk_full(&self, full: bool) {
        if self.lanes.disk.full.swap(full, Ordering::Relaxed) != full && full {
            tracing::warn!("the outbox is full, or its disk is: `every` operations are refused with QUEUE_FULL");
        }
    }

    pub(crate) fn release_spool_bytes(&self, bytes: usize) {
        self.lanes.spool_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// How long bulk operations wait for others now.
    pub(crate) fn linger(&self) -> Duration {
        if self.flushing.load(Ordering::Relaxed) || self.is_stopping() {
            Duration::ZERO
        } else {
            self.config.linger
        }
    }

    /// The delay before the next attempt of something that failed `attempts` times.
    pub(crate) fn delay(&self, attempts: u32) -> Duration {
        resend::delay(attempts, self.config.retry_delay, fastrand::f64())
    }

    /// Takes critical operations out of their lane into what waits to be sent.
    pub(crate) fn absorb_critical(&self) {
        for entry in self.critical.try_iter() {
            self.push(entry);
        }
    }

    pub(crate) fn push(&self, entry: Entry) {
        let replaced = self.pending().push(entry);
        self.superseded(replaced);
    }

    /// Settles an operation that a newer one of its path replaced before it was sent.
    pub(crate) fn superseded(&self, replaced: Option<Entry>) {
        if let Some(entry) = replaced {
            let settled = Settled::plain(OperationState::Superseded);
            self.results.note(entry.operation_id, entry.position, settled);
            self.change(Change::Withdraw(entry.position));
        }
    }

    pub(crate) fn take_changes(&self) -> Vec<Change> {
        std::mem::take(&mut *self.changes.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn change(&self, change: Change) {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner).push(change);
    }

    /// A record that does not open any more is kept as a dead letter and told to the hub as withdrawn.
    pub(crate) fn set_aside_damaged(&self, position: Position) {
        let sentence =
            format!("the outbox's record {position} does not open: the disk may be failing; the rest goes on");
        tracing::error!(%position, "{sentence}");
        self.pending().withdraw(position);
        self.change(Change::Bury(
            position,
            prost::bytes::Bytes::new(),
            Problem::new(Code::DamagedRecord, sentence),
        ));
    }

    /// Takes the hub's policies over and keeps them for the next start.
    pub(crate) fn take_policies(&self, policies: Policies) {
        let differs = policies
            .iter()
            .zip(self.lanes.policies().iter())
            .any(|(new, old)| new != old);
        if differs {
            tracing::info!(
                version = policies.version,
                "the hub's policies differ from those in force here: theirs hold"
            );
        }
        self.lanes.set_policies(policies.clone());
        self.change(Change::Policies(policies));
    }

    /// Settles what a message carried by what the hub answered.
    pub(crate) fn answer(&self, flight: &Flight, reply: v1::BatchReply) {
        let now = Instant::now();
        let code = Code::try_from(reply.code).unwrap_or(Code::Internal);
        if code != Code::None {
            tracing::warn!(%code, reason = reply.message, "the hub did not decide a batch; it is sent again");
            let at_least = Duration::from_millis(u64::from(reply.retry_after_ms));
            self.pending()
                .put_back(flight, now, |attempts| self.delay(attempts).max(at_least));
            return;
        }
        let mut outcomes = reply.outcomes.into_iter().peekable();
        for (index, (position, _)) in flight.operations.iter().enumerate() {
            let outcome = outcomes.next_if(|outcome| outcome.index as usize == index);
            match outcome.map(settled_by) {
                None => self.settle(*position, Settled::plain(OperationState::Applied)),
                Some(Some(settled)) => self.settle(*position, settled),
                Some(None) => self.pending().retry(*position, now, |attempts| {
                    resend::delay(attempts, NOT_YET_DELAY, fastrand::f64())
                }),
            }
        }
        if !flight.withdrawn.is_empty() {
            self.pending().withdrawn_told(&flight.withdrawn);
            self.change(Change::WithdrawnTold(flight.withdrawn.clone()));
        }
        self.critical_wake.notify_one();
        self.bulk_wake.notify_one();
    }

    fn settle(&self, position: Position, settled: Settled) {
        // Gone already: another message that carried it was answered first.
        let Some(entry) = self.pending().remove(position) else {
            return;
        };
        if entry.every {
            self.lanes.settled(&entry.path, position);
        }
        if self.config.debug {
            tracing::info!(operation_id = %entry.operation_id, path = %entry.path, state = ?settled.state, "settled");
        }
        let change = match &settled.problem {
            Some(problem) if settled.state == OperationState::Rejected => {
                tracing::warn!(operation_id = %entry.operation_id, path = %entry.path, %problem, "the hub refused an operation");
                Change::Bury(position, entry.bytes, problem.clone())
            }
            _ => Change::Remove(position),
        };
        // Told before the record goes: who is killed in between is told again, never left without an answer.
        self.results.note(entry.operation_id, position, settled);
        self.change(change);
    }

    /// Answers those who ask for dead letters; called by the thread that holds the outbox.
    pub(crate) fn serve_requests(&self, outbox: &Outbox) {
        for (letters_max, reply) in self.dead_letter_requests.1.try_iter() {
            let letters = outbox.dead_letters(letters_max);
            let _ = reply.send(letters.map_err(|error| Problem::new(Code::OutboxUnreadable, error.to_string())));
        }
    }

    /// Notes the outbox's size, and tells those who wait for it to be empty.
    pub(crate) fn report(&self, outbox: &Outbox) {
        self.outbox_bytes.store(outbox.bytes(), Ordering::Relaxed);
        self.outbox_operations.store(outbox.operations(), Ordering::Relaxed);
        if self.is_drained() {
            let _guard = self.drained.0.lock().unwrap_or_else(PoisonError::into_inner);
            self.drained.1.notify_all();
        }
    }

    fn is_drained(&self) -> bool {
        self.lanes.spool_bytes.load(Ordering::Relaxed) == 0
            && self.critical.is_empty()
            && self.pending().is_drained()
            && self.outbox_operations.load(Ordering::Relaxed) == 0
    }
}

/// What an outcome settles; `None`: not decided yet.
fn settled_by(outcome: v1::Outcome) -> Option<Settled> {
    let code = Code::try_from(outcome.code).unwrap_or(Code::Internal);
    let problem = (code != Code::None).then(|| Problem::new(code, outcome.message));
    let state = match v1::OutcomeState::try_from(outcome.state) {
        // The hub has the path at this version or a newer one: that is what applied means.
        Ok(v1::OutcomeState::Applied | v1::OutcomeState::Superseded) => OperationState::Applied,
        Ok(v1::OutcomeState::Rejected) => OperationState::Rejected,
        Ok(v1::OutcomeState::Limbo) => OperationState::Limbo,
        Ok(v1::OutcomeState::NotYet) | Err(_) => return None,
    };
    Some(Settled { state, problem })
}

/// A running agent. Dropping it shuts it down.
pub struct Agent {
    shared: Arc<Shared>,
    runtime: Option<Runtime>,
    spooler: Option<JoinHandle<()>>,
    link: Link,
}

/// How the agent is, for people and tools.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Status {
    /// Known to the hub by it.
    pub host_id: Uuid,
    /// Where the hub is.
    pub endpoint: String,
    /// Whether critical messages are answered.
    pub link_up: bool,
    /// Why the link is down, if it is.
    pub link_problem: Option<String>,
    /// Operations in memory, sent and not answered included.
    pub pending_operations: usize,
    /// Operations in the outbox: what would be lost with its disk.
    pub outbox_operations: u64,
    /// Their sealed size.
    pub outbox_bytes: u64,
    /// The outbox or its disk is full.
    pub outbox_full: bool,
    /// Where the outbox is.
    pub outbox_dir: PathBuf,
    /// Of the outbox; grows with each start.
    pub incarnation: u64,
    /// Of the policies in force; 0 for the built-in ones.
    pub policy_version: u32,
}

impl Agent {
    /// Opens the outbox and begins to send. Does not wait for the hub.
    ///
    /// `DATA_DIRECTORY_IN_USE` or `OUTBOX_UNREADABLE` where the outbox cannot be opened.
    pub fn start(config: Config) -> Result<Self, Problem> {
        Self::start_with(config, None)
    }

    /// As [`Self::start`], and tells `observer` of each change of an operation's state, operations of earlier starts
    /// included. It is called on the agent's threads and must be quick.
    pub fn start_observed(config: Config, observer: impl Fn(&Event) + Send + Sync + 'static) -> Result<Self, Problem> {
        Self::start_with(config, Some(Arc::new(observer)))
    }

    fn start_with(config: Config, observer: Option<Observer>) -> Result<Self, Problem> {
        for warning in &config.warnings {
            tracing::warn!("{warning}");
        }
        let (outbox, found) = Outbox::open(&config.outbox_dir, &config.credential)?;
        let policies = found
            .policies
            .unwrap_or_else(|| Policies::builtin().with_critical(&config.critical_types));
        let (lanes, exits) = Lanes::new(
            config.credential.host_id,
            policies,
            outbox.incarnation(),
            found.tails,
            config.queue_ops_max,
        );
        let mut pending = Pending::new(config.queue_ops_max, config.conflation);
        if let (Some(first), Some(last)) = (found.first, found.last) {
            tracing::info!(
                operations = found.operations,
                "the outbox holds operations of earlier starts"
            );
            pending.leave_to_disk(first, last);
        }
        found
            .withdrawn
            .into_iter()
            .for_each(|range| pending.withdraw_range(range));
        let shared = Arc::new(Shared {
            outbox_id: outbox.id(),
            incarnation: outbox.incarnation(),
            oldest_incarnation: found.first.map_or(outbox.incarnation(), |first| first.incarnation),
            lanes,
            critical: exits.critical,
            pending: Mutex::new(pending),
            results: Results::new(config.result_keep, observer),
            changes: Mutex::default(),
            alarm: Alarm::default(),
            critical_wake: Notify::new(),
            bulk_wake: Notify::new(),
            link: LinkState::default(),
            stopping: AtomicBool::new(false),
            stop_wake: Notify::new(),
            flushing: AtomicBool::new(false),
            outbox_bytes: AtomicU64::new(outbox.bytes()),
            outbox_operations: AtomicU64::new(outbox.operations()),
            drained: (Mutex::new(()), Condvar::new()),
            dead_letter_requests: crossbeam_channel::bounded(4),
            config,
        });
        let spooler = Spooler::new(shared.clone(), exits.spool, outbox);
        let spooler = std::thread::Builder::new()
            .name("p2p-spooler".to_owned())
            .spawn(move || spooler.run())
            .map_err(|error| Problem::new(Code::Internal, format!("no thread could be started: {error}")))?;
        let runtime = link::runtime(shared.config.worker_threads)?;
        let link = Link::start(&shared, &runtime);
        Ok(Self {
            shared,
            runtime: Some(runtime),
            spooler: Some(spooler),
            link,
        })
    }

    /// Takes an operation and gives its id. Never waits for disk or network; see the refusals of the codes `2xx` and
    /// `QUEUE_FULL`.
    pub fn submit(&self, submission: &Submission<'_>) -> Result<Uuid, Problem> {
        if !self.shared.config.enabled {
            return Err(Problem::new(
                Code::Unsupported,
                "synchronisation is off: set `enabled = yes`",
            ));
        }
        let taken = self.shared.lanes.take(submission, |taken| {
            let accepted = Settled::plain(OperationState::Accepted);
            self.shared.results.note(taken.operation_id, taken.position, accepted);
        })?;
        self.shared.alarm.ring_if_asleep();
        if self.shared.lanes.is_critical(submission) {
            self.shared.critical_wake.notify_one();
        }
        Ok(taken.operation_id)
    }

    /// Takes an operation by the critical lane and waits for the hub's answer, at most `critical_timeout_ms`.
    ///
    /// Without an answer by then it is `UNKNOWN`, not failed: it settles later under the id. After one such timeout
    /// these calls answer `UNKNOWN` at once, until the link answers again.
    pub fn submit_critical(&self, submission: &Submission<'_>) -> Result<(Uuid, Settled), Problem> {
        let submission = Submission {
            priority: crate::Priority::Critical,
            ..submission.clone()
        };
        let id = self.submit(&submission)?;
        if !self.shared.link.answers() {
            return Ok((id, Settled::unknown()));
        }
        let settled = self.shared.results.wait(id, Some(self.shared.config.critical_timeout));
        if settled.state == OperationState::Unknown {
            self.shared.link.set_answers(false);
        }
        Ok((id, settled))
    }

    /// How far an operation has come.
    pub fn result(&self, operation_id: Uuid) -> Settled {
        self.shared.results.get(operation_id)
    }

    /// Waits until an operation is settled or the time is over; `None`: until settled or shut down.
    pub fn wait(&self, operation_id: Uuid, timeout: Option<Duration>) -> Settled {
        self.shared.results.wait(operation_id, timeout)
    }

    /// Reads from the hub; waits at most `critical_timeout_ms`, or `timeout` where given.
    pub fn pull(&self, request: v1::PullRequest, timeout: Option<Duration>) -> Result<v1::PullReply, Problem> {
        let runtime = self.runtime.as_ref().expect("taken at shutdown alone");
        let timeout = timeout.unwrap_or(self.shared.config.critical_timeout);
        runtime.block_on(self.link.pull(request, timeout))
    }

    /// The state at a path, from the hub; `None` where there is none.
    pub fn get(&self, path: &Path, timeout: Option<Duration>) -> Result<Option<v1::State>, Problem> {
        let get = v1::pull_request::What::Get(v1::Get {
            path: path.as_str().to_owned(),
        });
        match self.pull(v1::PullRequest { what: Some(get) }, timeout) {
            Ok(v1::PullReply {
                what: Some(v1::pull_reply::What::State(state)),
                ..
            }) => Ok(Some(state)),
            Ok(_) => Ok(None),
            Err(problem) if problem.code == Code::NotFound => Ok(None),
            Err(problem) => Err(problem),
        }
    }

    /// Waits until everything taken is settled, or the time is over; gives whether it is.
    pub fn flush(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        self.shared.flushing.store(true, Ordering::Relaxed);
        self.shared.alarm.ring();
        self.shared.bulk_wake.notify_one();
        let (lock, condvar) = &self.shared.drained;
        let mut guard = lock.lock().unwrap_or_else(PoisonError::into_inner);
        let drained = loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if self.shared.is_drained() {
                break true;
            }
            if left.is_zero() {
                break false;
            }
            // The outbox is reported every few milliseconds; a wait that misses one is not long.
            let round = left.min(Duration::from_millis(50));
            guard = condvar
                .wait_timeout(guard, round)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            self.shared.alarm.ring_if_asleep();
        };
        drop(guard);
        self.shared.flushing.store(false, Ordering::Relaxed);
        drained
    }

    /// How the agent is.
    pub fn status(&self) -> Status {
        let shared = &self.shared;
        Status {
            host_id: shared.config.credential.host_id,
            endpoint: shared.config.endpoint.clone(),
            link_up: shared.link.is_up(),
            link_problem: shared.link.problem().map(|problem| problem.to_string()),
            pending_operations: shared.pending().len(),
            outbox_operations: shared.outbox_operations.load(Ordering::Relaxed),
            outbox_bytes: shared.outbox_bytes.load(Ordering::Relaxed),
            outbox_full: shared.is_disk_full(),
            outbox_dir: shared.config.outbox_dir.clone(),
            incarnation: shared.incarnation,
            policy_version: shared.lanes.policies().version,
        }
    }

    /// The newest operations that were refused or damaged, newest first.
    pub fn dead_letters(&self, letters_max: usize) -> Result<Vec<DeadLetter>, Problem> {
        let shut_down = || Problem::new(Code::ShutDown, "the agent has shut down");
        let (reply, answer) = crossbeam_channel::bounded(1);
        self.shared
            .dead_letter_requests
            .0
            .send((letters_max, reply))
            .map_err(|_| shut_down())?;
        self.shared.alarm.ring();
        answer.recv().map_err(|_| shut_down())?
    }

    /// Takes nothing more, writes what was taken to disk, and ends every thread. What is not settled stays in the
    /// outbox. May be called twice.
    pub fn shutdown(&mut self) {
        self.shared.lanes.close();
        self.shared.stopping.store(true, Ordering::SeqCst);
        self.shared.alarm.ring();
        self.shared.stop_wake.notify_waiters();
        if let Some(runtime) = self.runtime.take() {
            // A message on its way is sent again at the next start.
            runtime.shutdown_timeout(Duration::from_secs(2));
        }
        if let Some(spooler) = self.spooler.take()
            && spooler.join().is_err()
        {
            tracing::error!("the spooler had panicked");
        }
        self.shared.results.close();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.shutdown();
    }
}
