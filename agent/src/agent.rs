//! The agent: lanes, outbox and link put together.

mod cache;
mod ending;
mod serving;
#[cfg(test)]
mod tests;

pub(crate) use serving::Made;

use std::{
    path::PathBuf,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwapOption;
use p2p_sync_proto::{Code, Policies, Problem, path::Path, v1};
use tokio::{
    runtime::{Handle, Runtime},
    sync::Notify,
};
use uuid::Uuid;

use crate::{
    clients::Clients,
    clock::Clock,
    config::Config,
    copies::Copies,
    counters::{Counters, Counts, add},
    duties::{Duties, DutyStatus},
    edits,
    events::{self, AgentEvent, Events},
    hand_over::HandOvers,
    keys::Keys,
    lanes::{Lanes, Submission},
    leases::{LeaseState, LeaseStatus, Leases},
    leave,
    link::{self, LinkState, Puller, Watcher},
    maps::{self, MapCall},
    metrics::Metrics,
    outbox::{DeadLetter, Outbox},
    pending::Pending,
    questions::{Question, Questions},
    replica::Replicas,
    results::{Event, Observer, OperationState, Results, Settled},
    shared::Shared,
    spooler::{Alarm, Spooler},
    subscriptions::{Subscription, Subscriptions},
    threads,
    watch::Watch,
};

use ending::Writing;

/// For the thread that holds the outbox to answer a question about it.
const OUTBOX_TIMEOUT: Duration = Duration::from_secs(10);
/// For messages on their way, at shutdown; what is not answered by then is sent again at the next start.
const LINK_SHUTDOWN: Duration = Duration::from_secs(2);

/// A running agent. Dropping it shuts it down.
pub struct Agent {
    shared: Arc<Shared>,
    /// Taken at shutdown; held for a moment by whoever asks the hub something.
    runtime: Mutex<Option<Runtime>>,
    writing: Writing,
    puller: Arc<Puller>,
    #[cfg(unix)]
    watcher: Arc<Watcher>,
    questions: Arc<Questions>,
    subscriptions: Arc<Subscriptions>,
}

/// How the agent is, for people and tools.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Status {
    /// Known to the hub by it.
    pub host_id: Uuid,
    /// Where the hub is.
    pub endpoint: String,
    /// Whether critical messages are answered.
    pub link_up: bool,
    /// Why the link is down, if it is.
    pub link_problem: Option<String>,
    /// By how much the hub's clock is ahead of this machine's, negative where it is behind; absent until the hub has told it.
    #[serde(default)]
    pub clock_skew_ms: Option<i64>,
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
    /// Whether the hub grants leases; absent until it has said so in this start.
    #[serde(default)]
    pub leases_required: Option<bool>,
    /// The maps that this host may write, or might earlier, in their order.
    #[serde(default)]
    pub leases: Vec<LeaseStatus>,
    /// What this host is asked to do for maps besides, in their order.
    #[serde(default)]
    pub duties: Vec<DutyStatus>,
    /// It gives all its maps away, and wants none.
    #[serde(default)]
    pub leaving: bool,
    /// Since the start.
    #[serde(flatten)]
    pub counters: Counts,
}

impl Agent {
    /// Opens the outbox and begins to send. Does not wait for the hub.
    ///
    /// `DATA_DIRECTORY_IN_USE` or `OUTBOX_UNREADABLE` where the outbox cannot be opened.
    pub fn start(config: Config) -> Result<Self, Problem> {
        Self::start_with(config, None, false)
    }

    /// As [`Self::start`], and tells `observer` of each change of an operation's state, operations of earlier starts
    /// included. It is called on the agent's threads and must be quick.
    pub fn start_observed(config: Config, observer: impl Fn(&Event) + Send + Sync + 'static) -> Result<Self, Problem> {
        Self::start_with(config, Some(Arc::new(observer)), false)
    }

    /// As [`Self::start_observed`], for programs that attach, too: they are told of what becomes of their operations.
    pub(crate) fn start_serving(config: Config, observer: Option<Observer>) -> Result<Self, Problem> {
        Self::start_with(config, observer, true)
    }

    fn start_with(config: Config, observer: Option<Observer>, serves: bool) -> Result<Self, Problem> {
        let credential = config.credential()?;
        for warning in &config.warnings {
            tracing::warn!("{warning}");
        }
        let (outbox, found) = Outbox::open(&config.outbox_dir, credential, &config.former_credentials)?;
        forget_former(&config, credential.generation);
        let keys = Arc::new(Keys::new(credential));
        let policies = found
            .policies
            .unwrap_or_else(|| Policies::builtin().with_critical(&config.critical_types));
        let (lanes, exits) = Lanes::new(
            credential.host_id,
            policies,
            outbox.incarnation(),
            found.tails,
            found.presences,
            config.queue_ops_max,
        );
        let mut pending = Pending::new(config.queue_ops_max, config.conflation);
        if let (Some(first), Some(last)) = (found.first, found.last) {
            let operations = outbox.operations();
            tracing::info!(operations, "the outbox holds operations of earlier starts");
            pending.leave_to_disk(first, last);
        }
        found.withdrawn.into_iter().for_each(|range| pending.withdraw(range));
        let events = Arc::new(Events::new());
        let leases = Arc::new(Leases::new(found.leases, events.clone()));
        lanes.set_tenures(leases.tenures());
        lanes.edits.load(found.edits);
        let clients = Arc::new(Clients::new(found.clients));
        let observer = if serves {
            Some(serving::telling(&clients, observer))
        } else {
            observer
        };
        let shared = Arc::new(Shared {
            opening_id: outbox.opening_id(),
            incarnation: outbox.incarnation(),
            sent: Arc::default(),
            oldest_incarnation: found.first.map_or(outbox.incarnation(), |first| first.incarnation),
            critical: exits.critical,
            pending: Mutex::new(pending),
            results: Results::new(config.result_keep, Some(lanes.numbering()), observer, events.clone()),
            lanes,
            leases,
            duties: Duties::default(),
            hand_overs: HandOvers::default(),
            copies: Copies::default(),
            metrics: Metrics::default(),
            leaving: AtomicBool::new(false),
            leaving_told: Notify::new(),
            end_asked: Notify::new(),
            counters: Counters::default(),
            events: events.clone(),
            clients,
            changes: Mutex::default(),
            alarm: Alarm::default(),
            critical_wake: Notify::new(),
            bulk_wake: Notify::new(),
            link: LinkState::new(events),
            session: ArcSwapOption::empty(),
            near_cache: Mutex::default(),
            cache_wake: Notify::new(),
            cache_silent: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            finishing: AtomicBool::new(false),
            stop_wake: Notify::new(),
            limited_told: Mutex::default(),
            clock: Clock::default(),
            flushing: AtomicBool::new(false),
            outbox_bytes: AtomicU64::new(outbox.bytes()),
            outbox_operations: AtomicU64::new(outbox.operations()),
            drained: (Mutex::new(()), Condvar::new()),
            dead_letter_requests: crossbeam_channel::bounded(4),
            keys,
            config,
        });
        let runtime = link::runtime(shared.config.worker_threads)?;
        let (puller, watcher) = reading(&shared, &runtime);
        // Last of what can fail: it holds the outbox until it is told to end.
        let spooler = Spooler::new(shared.clone(), exits.spool, outbox);
        let spooler = threads::spawn("p2p-spooler", move || spooler.run())
            .map_err(|error| Problem::new(Code::Internal, format!("no thread could be started: {error}")))?;
        if shared.config.enabled {
            link::start(&shared, &puller, &runtime);
        }
        let replicas: Arc<Replicas> = Arc::default();
        Ok(Self {
            questions: Questions::new(
                shared.clone(),
                puller.clone(),
                vec![replicas.clone(), shared.copies.replicas.clone()],
            ),
            subscriptions: Arc::new(Subscriptions::new(&shared.config, watcher.clone(), replicas)),
            shared,
            runtime: Mutex::new(Some(runtime)),
            writing: Writing::by(spooler),
            puller,
            #[cfg(unix)]
            watcher,
        })
    }

    /// Takes an operation and gives its id. Never waits for disk or network; see the refusals of the codes `2xx` and
    /// `QUEUE_FULL`.
    pub fn submit(&self, submission: &Submission<'_>) -> Result<Uuid, Problem> {
        self.check_enabled()?;
        let shared = &self.shared;
        let taken = shared.take(submission.notify, |announce| shared.lanes.take(submission, announce))?;
        shared.metrics.note(submission);
        Ok(taken)
    }

    /// Takes 1 to 64 operations that take effect together or not at all, and gives the one id that they have. Never
    /// waits, as [`Self::submit`]; with `notify` one event is told when they settle.
    ///
    /// They may be of several maps, each of another path. All of them are checked before anything is taken: a refusal
    /// says which member it is for. By the critical lane if one of them is critical.
    pub fn submit_group(&self, members: &[Submission<'_>], notify: bool) -> Result<Uuid, Problem> {
        self.check_enabled()?;
        let shared = &self.shared;
        shared.take(notify, |announce| shared.lanes.take_group(members, announce))
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
            add(&self.shared.counters.timeouts);
            return Ok((id, Settled::unknown()));
        }
        // Who waits has the sender look now.
        self.shared.critical_wake.notify_one();
        let settled = self.shared.results.wait(id, Some(self.shared.config.critical_timeout));
        if settled.state == OperationState::Unknown {
            add(&self.shared.counters.timeouts);
            self.shared.link.set_answers(false);
        }
        Ok((id, settled))
    }

    /// How far an operation has come.
    pub fn result(&self, operation_id: Uuid) -> Settled {
        self.shared.results.get(operation_id)
    }

    /// Waits until an operation is settled or the time is over; `None`: until settled or shut down.
    ///
    /// `UNKNOWN` where it is not settled by then, `NOT_KEPT` where its result is not kept any more.
    pub fn wait(&self, operation_id: Uuid, timeout: Option<Duration>) -> Settled {
        self.shared.critical_wake.notify_one();
        self.shared.results.wait(operation_id, timeout)
    }

    /// Reads from the hub; waits at most `critical_timeout_ms`, or `timeout` where given.
    ///
    /// What is written here afterwards counts as knowing the operator's edits in what was read. `HUB_UNAVAILABLE` without
    /// an answer, `SHUT_DOWN`, or the code of the hub's refusal.
    pub fn pull(&self, request: v1::PullRequest, timeout: Option<Duration>) -> Result<v1::PullReply, Problem> {
        let reply = self.pull_for_another(request, timeout)?;
        self.shared.has_read(edits::of_reply(&reply));
        Ok(reply)
    }

    /// As [`Self::pull`], for who is not this program: it knows no more for it.
    pub(crate) fn pull_for_another(
        &self,
        request: v1::PullRequest,
        timeout: Option<Duration>,
    ) -> Result<v1::PullReply, Problem> {
        let timeout = timeout.unwrap_or(self.shared.config.critical_timeout);
        self.pull_within(request, timeout, timeout * 2)
    }

    /// As [`Self::pull`]: the call itself may take `timeout`, and the caller waits `patience`, the connecting included.
    fn pull_within(
        &self,
        request: v1::PullRequest,
        timeout: Duration,
        patience: Duration,
    ) -> Result<v1::PullReply, Problem> {
        let puller = self.puller.clone();
        self.run_within(patience, async move { puller.pull(request, timeout).await })
    }

    /// As [`Self::pull_for_another`], of what is here without the hub; `NOT_KEPT` where that is nothing.
    pub(crate) fn kept(&self, request: &v1::PullRequest) -> Result<v1::PullReply, Problem> {
        self.questions.kept(request)
    }

    /// Asks the hub something of maps and waits for the answer, as long as such a thing may take.
    pub(crate) fn call_maps(&self, call: MapCall) -> Result<serde_json::Value, Problem> {
        call.check()?;
        let (runtime, patience) = (self.runtime()?, call.patience());
        let _inside = runtime.enter();
        self.run_within(patience, maps::call(&self.shared, call))
    }

    /// Begins to give all maps away, and tells how far that is: `left` when this host holds none and nothing waits to be
    /// settled. It takes no map any more.
    pub(crate) fn leave(&self) -> Result<serde_json::Value, Problem> {
        let runtime = self.runtime()?;
        let _inside = runtime.enter();
        leave::begin(&self.shared);
        let is_known = self.shared.leases.status().0.is_some();
        let maps: Vec<String> = self.shared.leases.held().into_iter().map(|(map, _)| map).collect();
        Ok(serde_json::json!({
            "left": is_known && maps.is_empty() && self.shared.is_drained(),
            "maps": maps,
            "outbox_operations": self.shared.outbox_operations.load(Ordering::Relaxed),
            "link_problem": self.shared.link.problem().map(|problem| problem.to_string()),
        }))
    }

    /// Has whoever runs this agent end it.
    pub(crate) fn ask_to_end(&self) {
        self.shared.end_asked.notify_one();
    }

    pub(crate) async fn asked_to_end(&self) {
        self.shared.end_asked.notified().await;
    }

    fn run_within<T: Send + 'static>(
        &self,
        patience: Duration,
        asking: impl Future<Output = Result<T, Problem>> + Send + 'static,
    ) -> Result<T, Problem> {
        let (told, answer) = mpsc::sync_channel(1);
        match &*self.runtime.lock().unwrap_or_else(PoisonError::into_inner) {
            // Who asked may have given up.
            Some(runtime) => runtime.spawn(async move { told.send(asking.await) }),
            None => return Err(shut_down()),
        };
        answer.recv_timeout(patience).unwrap_or_else(|error| {
            Err(match error {
                mpsc::RecvTimeoutError::Timeout => Problem::new(Code::HubUnavailable, "the hub did not answer in time"),
                mpsc::RecvTimeoutError::Disconnected => shut_down(),
            })
        })
    }

    /// The state at a path, from the hub; `None` where there is none.
    pub fn get(&self, path: &Path, timeout: Option<Duration>) -> Result<Option<v1::State>, Problem> {
        get_by(path, |request| self.pull(request, timeout))
    }

    /// Asks the hub something and gives the id that the answer comes under, as an operation's result does: `Applied`
    /// with its data, or `Rejected` with the hub's code, `HUB_UNAVAILABLE` where it does not answer within 5 s. Waits for
    /// nothing.
    ///
    /// With `notify` an [`AgentEvent::Settled`] is told. Refuses with `QUEUE_FULL` while too many are unanswered,
    /// `SHUT_DOWN`, and the codes of what is wrong with the question; with `notify` `QUEUE_FULL` also while 16 MiB of
    /// answers wait to be taken. Answers are kept as results are, the newest 16 MiB at most.
    pub fn ask(&self, question: Question, notify: bool) -> Result<Uuid, Problem> {
        self.questions.ask(&self.runtime()?, question, notify)
    }

    /// Waits for the answer to a question, at most `critical_timeout_ms`; the question goes on and is answered later.
    ///
    /// `UNKNOWN` without an answer by then. After one such timeout, and while the link does not answer, these calls give
    /// what is there at once, until the hub answers a question again.
    pub fn wait_for_answer(&self, question_id: Uuid) -> Settled {
        let answers = self.shared.link.answers();
        self.questions.wait(question_id, answers, self.critical_timeout())
    }

    /// Follows a stream from its beginning: what is there and each change come as [`AgentEvent::Update`], in the order of
    /// the stream, also after the hub was away; nothing is left out but what a newer state of its path replaced before it
    /// was told. The hub pushes them; they wait to be taken, and no more are read then. Waits for nothing.
    ///
    /// Refuses with `BAD_MAP` and `BAD_PATH`, `QUEUE_FULL` with too many subscriptions, and `SHUT_DOWN`.
    pub fn subscribe(&self, subscription: Subscription) -> Result<u64, Problem> {
        self.subscriptions
            .begin(&self.runtime()?, subscription, &self.shared.events, false)
    }

    /// Ends a subscription; what was not taken of it is not told any more. False where there is none.
    pub fn unsubscribe(&self, subscription: u64) -> bool {
        self.subscriptions.end(subscription)
    }

    /// Follows a stream with a queue of its own.
    pub(crate) fn watch(&self, subscription: Subscription) -> Result<Watch, Problem> {
        Watch::begin(&self.subscriptions, &self.runtime()?, subscription)
    }

    /// Passes a watch on to another program, until it ends.
    #[cfg(unix)]
    pub(crate) fn pass_on(
        &self,
        request: &str,
        output: &mut impl std::io::Write,
    ) -> Result<std::io::Result<()>, Problem> {
        Ok(crate::local_api::pass_on(
            &self.runtime()?,
            &self.watcher,
            request,
            output,
        ))
    }

    /// Takes the oldest event if it `fits`, else leaves it. Waits for nothing; `fits` must be quick and not call the
    /// agent. Lines of the log are the process': of several agents one gets each.
    pub fn next_event(&self, fits: impl FnOnce(&AgentEvent) -> bool) -> Option<AgentEvent> {
        self.taken(events::next_of(&self.shared.events, fits))
    }

    /// As [`Self::next_event`], but for lines of the log: those are taken by whoever has a logger.
    pub(crate) fn next_own_event(&self, fits: impl FnOnce(&AgentEvent) -> bool) -> Option<AgentEvent> {
        self.taken(self.shared.events.next(fits))
    }

    /// An update is seen when it is taken.
    fn taken(&self, event: Option<AgentEvent>) -> Option<AgentEvent> {
        self.shared.has_read(event.iter().filter_map(AgentEvent::edit));
        event
    }

    /// Waits until there is an event other than a line of the log, the time is over or the agent is shut down; gives
    /// whether there is one.
    pub fn wait_for_event(&self, timeout: Duration) -> bool {
        self.shared.events.wait(timeout)
    }

    /// What questions and subscriptions run on.
    fn runtime(&self) -> Result<Handle, Problem> {
        self.check_enabled()?;
        let runtime = self.runtime.lock().unwrap_or_else(PoisonError::into_inner);
        runtime
            .as_ref()
            .map(|runtime| runtime.handle().clone())
            .ok_or_else(shut_down)
    }

    fn check_enabled(&self) -> Result<(), Problem> {
        if self.shared.is_stopping() {
            return Err(shut_down());
        }
        let off = || Problem::new(Code::Unsupported, "synchronisation is off: set `enabled = yes`");
        self.shared.config.enabled.then_some(()).ok_or_else(off)
    }

    /// Waits until everything taken is settled, the time is over or the agent is shut down; gives whether it is.
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
            if left.is_zero() || self.shared.is_stopping() {
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

    /// Whether this host may write a map, as the hub said last. Never waits.
    pub fn lease(&self, map: &str) -> LeaseState {
        self.shared.leases.state(map)
    }

    /// How the agent is.
    pub fn status(&self) -> Status {
        let shared = &self.shared;
        let (leases_required, leases) = shared.leases.status();
        Status {
            host_id: shared.lanes.host_id(),
            endpoint: shared.config.endpoint.clone(),
            link_up: shared.link.is_up(),
            link_problem: shared.link.problem().map(|problem| problem.to_string()),
            clock_skew_ms: shared.clock.hub_ahead_ms(),
            pending_operations: shared.pending().len(),
            outbox_operations: shared.outbox_operations.load(Ordering::Relaxed),
            outbox_bytes: shared.outbox_bytes.load(Ordering::Relaxed),
            outbox_full: shared.is_disk_full(),
            outbox_dir: shared.config.outbox_dir.clone(),
            incarnation: shared.incarnation,
            policy_version: shared.lanes.policies().version,
            leases_required,
            leases,
            duties: shared.duties.status(&shared.copies),
            leaving: shared.leaving.load(Ordering::Relaxed),
            counters: shared.counters.counts(),
        }
    }

    /// The newest operations that were refused or damaged, newest first. Waits for the disk, at most 10 s.
    pub fn dead_letters(&self, letters_max: usize) -> Result<Vec<DeadLetter>, Problem> {
        let (reply, answer) = crossbeam_channel::bounded(1);
        self.shared
            .dead_letter_requests
            .0
            .send((letters_max, reply))
            .map_err(|_| shut_down())?;
        self.shared.alarm.ring();
        let unanswered = |_| {
            Problem::new(
                Code::DiskError,
                "the outbox did not answer: its disk may be failing, try again",
            )
        };
        answer.recv_timeout(OUTBOX_TIMEOUT).map_err(unanswered)?
    }

    /// Waits until it is known whether the hub answers, or the time is over.
    pub fn wait_for_link(&self, timeout: Duration) {
        self.shared.link.wait_until_known(timeout);
    }

    /// Takes nothing more, lets the link end, writes what is left to disk, and ends every thread. What is not settled
    /// stays in the outbox. May be called twice.
    ///
    /// `SHUTDOWN_INCOMPLETE` where no disk took what was left; the sentence has the number of operations that are lost.
    pub fn shutdown(&self) -> Result<(), Problem> {
        self.shutdown_within(Duration::MAX)
    }

    /// As [`Self::shutdown`], and does not wait longer for a disk that hangs: `SHUTDOWN_INCOMPLETE` then as well, and
    /// dropping the agent waits no longer either.
    pub fn shutdown_within(&self, timeout: Duration) -> Result<(), Problem> {
        let began = Instant::now();
        let shared = &self.shared;
        shared.lanes.close();
        self.questions.close();
        shared.stopping.store(true, Ordering::SeqCst);
        shared.stop_wake.notify_waiters();
        let runtime = self.runtime.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(runtime) = runtime {
            let link_timeout = LINK_SHUTDOWN.min(timeout);
            // On a thread of its own, for a caller may be inside a runtime, where none may be waited for.
            match threads::spawn("p2p-shutdown", move || runtime.shutdown_timeout(link_timeout)) {
                Ok(ending) => {
                    if ending.join().is_err() {
                        tracing::error!("a thread of the link had panicked");
                    }
                }
                Err(error) => tracing::error!(%error, "no thread could be started to end the link"),
            }
            let lost = shared.near_cache().waiting();
            if lost > 0 {
                tracing::warn!(
                    lost,
                    "what was cached or published had not come to the hub and is not kept"
                );
            }
        }
        // The link's last answers are settled: they go to disk with the rest.
        shared.finishing.store(true, Ordering::SeqCst);
        shared.alarm.ring();
        let ended = self.writing.end(began, timeout);
        shared.results.close();
        shared.events.close();
        ended
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // Who shut it down has said how long to wait, and was told how that ended.
        let timeout = if self.shared.is_stopping() {
            Duration::ZERO
        } else {
            Duration::MAX
        };
        // Logged where something is lost.
        let _ = self.shutdown_within(timeout);
    }
}

/// What opening the outbox wrapped anew former credentials open no more.
fn forget_former(config: &Config, generation: u32) {
    if config.former_credentials.is_empty() {
        return;
    }
    if let Err(problem) = link::forget_former(&config.credential_file, generation) {
        tracing::warn!("a former credential is kept for now: {problem}");
    }
}

/// What reads from the hub and follows it, over connections that are made when they are first used.
fn reading(shared: &Shared, runtime: &Runtime) -> (Arc<Puller>, Arc<Watcher>) {
    let _inside = runtime.enter();
    let (config, keys, sent) = (&shared.config, &shared.keys, &shared.sent);
    let puller = Puller::new(config, keys.clone(), shared.incarnation, sent.clone());
    let watcher = Watcher::new(config, keys.clone(), shared.incarnation, sent.clone());
    (Arc::new(puller), Arc::new(watcher))
}

/// The state at a path, by whoever can ask the hub.
pub(crate) fn get_by(
    path: &Path,
    pull: impl FnOnce(v1::PullRequest) -> Result<v1::PullReply, Problem>,
) -> Result<Option<v1::State>, Problem> {
    let get = v1::pull_request::What::Get(v1::Get {
        path: path.as_str().to_owned(),
        ..Default::default()
    });
    match pull(v1::PullRequest { what: Some(get) }) {
        Ok(v1::PullReply {
            what: Some(v1::pull_reply::What::State(state)),
            ..
        }) => Ok(Some(state)),
        Ok(_) => Ok(None),
        Err(problem) if problem.code == Code::NotFound => Ok(None),
        Err(problem) => Err(problem),
    }
}

fn shut_down() -> Problem {
    Problem::new(Code::ShutDown, "the agent has shut down")
}
