//! A program's link to a standalone agent on the same machine, in the place of an agent of its own.
//!
//! Where there are no Unix sockets the counterpart is [`crate::Agent`], inside the program.

mod cache;
mod connection;
mod errands;
mod inner;
mod queue;

use std::{
    net::Shutdown,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use p2p_sync_proto::{Code, Policies, Problem, path::Path, v1};
use tokio::{
    runtime::{Handle, Runtime},
    sync::Semaphore,
};
use uuid::Uuid;

use crate::{
    agent::{Status, get_by},
    config::Config,
    counters::{Counters, add},
    edits,
    events::{self, AgentEvent, Events},
    lanes::{Priority, Submission},
    leases::{LeaseState, Leases},
    link::{self, Puller, Watcher},
    local_api::{Action, Request},
    questions::{Question, Questions},
    replica::Replicas,
    results::{Event, Observer, OperationState, Results, Settled},
    spooler::Alarm,
    subscriptions::{Subscription, Subscriptions},
    threads,
    unsaid::Unsaid,
};

use errands::Errands;
use inner::{Inner, Known};
use queue::Queue;

/// For the agent to take what is here to disk, at shutdown.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);
/// For questions on their way, at shutdown.
const ASKING_SHUTDOWN: Duration = Duration::from_millis(500);
/// How often a shutdown looks whether its threads have ended.
const THREAD_LOOK: Duration = Duration::from_millis(1);
/// How often a flush looks whether it is done.
const FLUSH_ROUND: Duration = Duration::from_millis(20);

/// A program that hands its operations over to a standalone agent; the same calls as [`crate::Agent`]. Dropping it shuts
/// it down.
///
/// An operation is told as `SPOOLED` once the standalone agent has it on disk. From then on it reaches the hub whatever
/// becomes of this program; before, it is in this program's memory, and is handed over as soon as the agent is there. Each
/// is taken exactly once, whichever of the two is killed in between.
///
/// All calls are served. What is asked and followed goes through the agent, so its being away is as the hub's being away;
/// what is cached or published is refused by the agent in the background, and then logged instead of answered.
pub struct Attached {
    inner: Arc<Inner>,
    /// Taken at shutdown.
    runtime: Mutex<Option<Runtime>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Operations that the agent had not taken at the end.
    lost: AtomicUsize,
    questions: Arc<Questions>,
    subscriptions: Subscriptions,
}

impl Attached {
    /// Begins to look for the agent that `agent_socket` names. Does not wait for it: operations are kept in memory until it
    /// is there.
    ///
    /// `MISSING_VALUE` where the configuration names no socket.
    pub fn start(config: Config) -> Result<Self, Problem> {
        Self::start_with(config, None)
    }

    /// As [`Self::start`], and tells `observer` of each change of the state of an operation of this program; its position is
    /// the agent's alone to know and told as 0. It must be quick and not call this value.
    pub fn start_observed(config: Config, observer: impl Fn(&Event) + Send + Sync + 'static) -> Result<Self, Problem> {
        Self::start_with(config, Some(Arc::new(observer)))
    }

    fn start_with(config: Config, observer: Option<Observer>) -> Result<Self, Problem> {
        for warning in &config.warnings {
            tracing::warn!("{warning}");
        }
        let missing = || {
            let sentence = "agent_socket is empty: set it to the socket of the standalone agent";
            Problem::new(Code::MissingValue, sentence)
        };
        let socket = config.agent_socket.clone().ok_or_else(missing)?;
        let events = Arc::new(Events::new());
        let (errands, to_carry) = Errands::new();
        let inner = Arc::new(Inner {
            socket,
            client: Uuid::new_v4(),
            queue: Mutex::new(Queue::new(config.queue_ops_max)),
            policies: ArcSwap::from_pointee(Policies::builtin().with_critical(&config.critical_types)),
            results: Results::new(config.result_keep, None, observer, events.clone()),
            leases: Arc::new(Leases::new(None, events.clone())),
            events,
            counters: Counters::default(),
            errands,
            unsaid: Unsaid::default(),
            alarm: Alarm::default(),
            answers: AtomicBool::new(false),
            cache_silent: AtomicBool::new(false),
            known: Mutex::default(),
            changed: Condvar::new(),
            stream: Mutex::default(),
            ending: AtomicBool::new(false),
            map_calls: Semaphore::new(inner::MAP_CALLS_MAX),
            config,
        });
        let no_thread = |error| Problem::new(Code::Internal, format!("no thread could be started: {error}"));
        let runtime = link::runtime(1)?;
        let leases = inner.leases.clone();
        runtime.spawn(async move { leases.watch().await });
        let asking = inner.clone();
        let ask = move |request: &v1::PullRequest, timeout, kept| asking.pull(request, kept, timeout, timeout);
        let puller = Arc::new(Puller::through_agent(Arc::new(ask)));
        let watcher = Arc::new(Watcher::through_agent(inner.socket.clone()));
        let replicas: Arc<Replicas> = Arc::default();
        // Before the threads: where the second one cannot be started, dropping this ends the first.
        let attached = Self {
            questions: Questions::new(inner.clone(), puller, vec![replicas.clone()]),
            subscriptions: Subscriptions::new(&inner.config, watcher, replicas),
            inner: inner.clone(),
            runtime: Mutex::new(Some(runtime)),
            threads: Mutex::default(),
            lost: AtomicUsize::new(0),
        };
        let connecting = inner.clone();
        let connecting = threads::spawn("p2p-attached", move || connection::run(&connecting)).map_err(no_thread)?;
        lock(&attached.threads).push(connecting);
        let carrying = threads::spawn("p2p-errands", move || errands::run(&inner, &to_carry)).map_err(no_thread)?;
        lock(&attached.threads).push(carrying);
        Ok(attached)
    }

    /// Takes an operation and gives its id. Never waits for disk, network or the agent; refuses as [`crate::Agent::submit`]
    /// does, with `QUEUE_FULL` also while more wait for the agent than memory has room for.
    pub fn submit(&self, submission: &Submission<'_>) -> Result<Uuid, Problem> {
        let id = self.inner.take(submission, false)?;
        self.inner.alarm.ring_if_asleep();
        Ok(id)
    }

    /// As [`crate::Agent::submit_group`]; refuses as [`Self::submit`] does.
    pub fn submit_group(&self, members: &[Submission<'_>], notify: bool) -> Result<Uuid, Problem> {
        let id = self.inner.take_group(members, notify)?;
        self.inner.alarm.ring_if_asleep();
        Ok(id)
    }

    /// Takes an operation by the critical lane and waits for the hub's answer, at most `critical_timeout_ms`.
    ///
    /// As [`crate::Agent::submit_critical`]: without an answer by then it is `UNKNOWN`; after one such timeout, and while
    /// the agent is not there, these calls answer `UNKNOWN` at once until it or the hub answers again.
    pub fn submit_critical(&self, submission: &Submission<'_>) -> Result<(Uuid, Settled), Problem> {
        let inner = &self.inner;
        let submission = Submission {
            priority: Priority::Critical,
            ..submission.clone()
        };
        let is_worth_waiting = inner.answers.load(Ordering::SeqCst);
        let id = inner.take(&submission, is_worth_waiting)?;
        if !is_worth_waiting {
            add(&inner.counters.timeouts);
            inner.alarm.ring_if_asleep();
            return Ok((id, Settled::unknown()));
        }
        inner.alarm.ring();
        let settled = inner.results.wait(id, Some(inner.config.critical_timeout));
        if settled.state == OperationState::Unknown {
            add(&inner.counters.timeouts);
            inner.answers.store(false, Ordering::SeqCst);
        }
        Ok((id, settled))
    }

    /// How far an operation has come.
    pub fn result(&self, operation_id: Uuid) -> Settled {
        self.inner.results.get(operation_id)
    }

    /// Waits until an operation is settled or the time is over; `None`: until settled or shut down.
    ///
    /// `UNKNOWN` where it is not settled by then, `NOT_KEPT` where its result is not kept any more.
    pub fn wait(&self, operation_id: Uuid, timeout: Option<Duration>) -> Settled {
        self.inner.results.wait(operation_id, timeout)
    }

    /// Reads from the hub through the agent; waits at most `critical_timeout_ms`, or `timeout` where given, and as long
    /// again for the agent.
    ///
    /// `HUB_UNAVAILABLE` without an answer, `SHUT_DOWN`, or the code of the hub's refusal.
    #[allow(clippy::needless_pass_by_value)] // As `Agent::pull` has it.
    pub fn pull(&self, request: v1::PullRequest, timeout: Option<Duration>) -> Result<v1::PullReply, Problem> {
        let timeout = timeout.unwrap_or(self.inner.config.critical_timeout);
        let reply = self.inner.pull(&request, false, timeout, timeout * 2)?;
        self.inner.unsaid.has_read(edits::of_reply(&reply));
        Ok(reply)
    }

    /// The state at a path, from the hub; `None` where there is none.
    pub fn get(&self, path: &Path, timeout: Option<Duration>) -> Result<Option<v1::State>, Problem> {
        get_by(path, |request| self.pull(request, timeout))
    }

    /// Waits until everything this program and others handed to the agent is settled, or the time is over; gives whether
    /// it is.
    pub fn flush(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        self.inner.alarm.ring();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.inner.is_ending() {
                return false;
            }
            if self.inner.queue().len() == 0 {
                let request = Request {
                    action: Action::Flush,
                    timeout_ms: milliseconds(left),
                    ..Request::default()
                };
                if let Ok(answer) = self.inner.ask(&request, left) {
                    return answer["flushed"] == true && self.inner.all_told(deadline);
                }
            }
            let known = lock(&self.inner.known);
            // The agent comes back, or has something on disk: either way there is something to look at.
            let _known = self.inner.changed.wait_timeout(known, left.min(FLUSH_ROUND));
        }
    }

    /// As [`crate::Agent::ask`], through the agent. Refuses with `HUB_UNAVAILABLE` until the agent was there once.
    pub fn ask(&self, question: Question, notify: bool) -> Result<Uuid, Problem> {
        self.questions.ask(&self.runtime()?, question, notify)
    }

    /// As [`crate::Agent::wait_for_answer`]; the link includes the one to the agent.
    pub fn wait_for_answer(&self, question_id: Uuid) -> Settled {
        let answers = self.inner.answers.load(Ordering::SeqCst);
        self.questions.wait(question_id, answers, self.critical_timeout())
    }

    /// As [`crate::Agent::subscribe`], through the agent.
    pub fn subscribe(&self, subscription: Subscription) -> Result<u64, Problem> {
        self.subscriptions
            .begin(&self.runtime()?, subscription, &self.inner.events, false)
    }

    /// Ends a subscription; what was not taken of it is not told any more. False where there is none.
    pub fn unsubscribe(&self, subscription: u64) -> bool {
        self.subscriptions.end(subscription)
    }

    /// As [`crate::Agent::next_event`]: of this program's operations, questions and subscriptions, and of the link from
    /// here to the hub, the agent included.
    pub fn next_event(&self, fits: impl FnOnce(&AgentEvent) -> bool) -> Option<AgentEvent> {
        self.taken(events::next_of(&self.inner.events, fits))
    }

    /// As [`crate::Agent::next_own_event`].
    pub(crate) fn next_own_event(&self, fits: impl FnOnce(&AgentEvent) -> bool) -> Option<AgentEvent> {
        self.taken(self.inner.events.next(fits))
    }

    /// An update is seen when it is taken.
    fn taken(&self, event: Option<AgentEvent>) -> Option<AgentEvent> {
        self.inner.unsaid.has_read(event.iter().filter_map(AgentEvent::edit));
        event
    }

    /// As [`crate::Agent::wait_for_event`].
    pub fn wait_for_event(&self, timeout: Duration) -> bool {
        self.inner.events.wait(timeout)
    }

    /// What questions and subscriptions run on.
    fn runtime(&self) -> Result<Handle, Problem> {
        self.inner.check_enabled()?;
        let runtime = lock(&self.runtime);
        let handle = runtime.as_ref().map(|runtime| runtime.handle().clone());
        handle.ok_or_else(shut_down)
    }

    /// As [`crate::Agent::lease`], as the agent said last; while it is gone, until the lease runs out.
    pub fn lease(&self, map: &str) -> LeaseState {
        self.inner.leases.state(map)
    }

    /// How the agent is, as it said last; what waits here to be handed over is among the pending operations.
    pub fn status(&self) -> Status {
        let waiting = self.inner.queue().len();
        let known = lock(&self.inner.known);
        let mut status = known.status.clone();
        status.pending_operations += waiting;
        status.counters = self.inner.counters.counts();
        if !known.is_attached {
            status.link_up = false;
            status.link_problem = known.problem.as_ref().map(ToString::to_string);
        }
        status
    }

    /// Waits until it is known whether the hub answers, or that no agent is there, or the time is over.
    pub fn wait_for_link(&self, timeout: Duration) {
        let known = lock(&self.inner.known);
        let is_unknown = |known: &mut Known| {
            let has_no_problem = known.problem.is_none() && known.status.link_problem.is_none();
            has_no_problem && !known.status.link_up
        };
        // Either way the caller looks at what is known then.
        let _known = self.inner.changed.wait_timeout_while(known, timeout, is_unknown);
    }

    /// Takes nothing more, waits at most 5 s until the agent has on disk what was taken, and ends every thread. May be
    /// called twice.
    ///
    /// `SHUTDOWN_INCOMPLETE` where the agent did not say by then that it has everything: the sentence has the number of
    /// operations, which are lost with this program.
    pub fn shutdown(&self) -> Result<(), Problem> {
        self.shutdown_within(Duration::MAX)
    }

    /// As [`Self::shutdown`], and waits at most `timeout` in all: `SHUTDOWN_INCOMPLETE` also where a thread has not ended
    /// by then, and dropping this value waits no longer either.
    pub fn shutdown_within(&self, timeout: Duration) -> Result<(), Problem> {
        let began = Instant::now();
        let inner = &self.inner;
        inner.queue().close();
        self.questions.close();
        let mut threads = lock(&self.threads);
        if !inner.ending.load(Ordering::SeqCst) {
            inner.alarm.ring();
            let known = lock(&inner.known);
            let is_waiting = |_: &mut Known| inner.queue().len() > 0;
            // The threads are to end in time, too.
            let handing_over = SHUTDOWN_TIMEOUT.min(timeout.saturating_sub(ASKING_SHUTDOWN));
            drop(inner.changed.wait_timeout_while(known, handing_over, is_waiting));
            inner.ending.store(true, Ordering::SeqCst);
            if let Some(stream) = &*lock(&inner.stream) {
                // Closed already is as good.
                let _ = stream.shutdown(Shutdown::Both);
            }
            inner.alarm.ring();
            let operations = inner.queue().len();
            if operations > 0 {
                tracing::error!(
                    operations,
                    "the standalone agent did not take these operations: they are lost"
                );
            }
            self.lost.store(operations, Ordering::SeqCst);
        }
        let runtime = lock(&self.runtime).take();
        if let Some(runtime) = runtime {
            let asking = ASKING_SHUTDOWN.min(timeout.saturating_sub(began.elapsed()));
            // On a thread of its own, for a caller may be inside a runtime, where none may be waited for.
            match threads::spawn("p2p-shutdown", move || runtime.shutdown_timeout(asking)) {
                Ok(ending) => log_panic(&ending.join()),
                Err(error) => tracing::error!(%error, "no thread could be started to end what asks"),
            }
        }
        while !threads.iter().all(JoinHandle::is_finished) && began.elapsed() < timeout {
            std::thread::sleep(THREAD_LOOK);
        }
        for ended in threads.extract_if(.., |thread| thread.is_finished()) {
            log_panic(&ended.join());
        }
        inner.results.close();
        inner.events.close();
        let incomplete = |sentence: String| Err(Problem::new(Code::ShutdownIncomplete, sentence));
        match self.lost.load(Ordering::SeqCst) {
            0 if threads.is_empty() => Ok(()),
            0 => incomplete("what carries questions to the standalone agent did not end in time".to_owned()),
            lost => incomplete(format!(
                "the standalone agent did not say in time that it has everything on disk: operations that are lost: {lost}; \
                 see that it runs and that its disk is not full"
            )),
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // Who shut it down has said how long to wait, and was told how that ended.
        let timeout = if self.inner.is_ending() {
            Duration::ZERO
        } else {
            Duration::MAX
        };
        // Logged where something is lost.
        let _ = self.shutdown_within(timeout);
    }
}

fn log_panic(ended: &std::thread::Result<()>) {
    if ended.is_err() {
        tracing::error!("a thread of the attached program's link had panicked");
    }
}

fn shut_down() -> Problem {
    Problem::new(Code::ShutDown, "the agent has shut down")
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
