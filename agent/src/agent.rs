//! The agent: lanes, outbox and link put together.

use std::{
    path::PathBuf,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use p2p_sync_proto::{Code, Policies, Problem, path::Path, v1};
use tokio::{runtime::Runtime, sync::Notify};
use uuid::Uuid;

use crate::{
    config::Config,
    lanes::{Lanes, Submission},
    link::{self, LinkState, Puller},
    outbox::{DeadLetter, Outbox},
    pending::Pending,
    results::{Event, Observer, OperationState, Results, Settled},
    shared::Shared,
    spooler::{Alarm, Spooler},
};

/// For the thread that holds the outbox to answer a question about it.
const OUTBOX_TIMEOUT: Duration = Duration::from_secs(10);
/// For messages on their way, at shutdown; what is not answered by then is sent again at the next start.
const LINK_SHUTDOWN: Duration = Duration::from_secs(2);

/// A running agent. Dropping it shuts it down.
pub struct Agent {
    shared: Arc<Shared>,
    /// Taken at shutdown; held for a moment by whoever asks the hub something.
    runtime: Mutex<Option<Runtime>>,
    spooler: Mutex<Option<JoinHandle<()>>>,
    puller: Arc<Puller>,
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
                operations = outbox.operations(),
                "the outbox holds operations of earlier starts"
            );
            pending.leave_to_disk(first, last);
        }
        found.withdrawn.into_iter().for_each(|range| pending.withdraw(range));
        let shared = Arc::new(Shared {
            opening_id: outbox.opening_id(),
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
            finishing: AtomicBool::new(false),
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
        let puller = {
            let _inside = runtime.enter();
            Arc::new(Puller::new(&shared.config, shared.incarnation))
        };
        if shared.config.enabled {
            link::start(&shared, &runtime);
        }
        Ok(Self {
            shared,
            runtime: Mutex::new(Some(runtime)),
            spooler: Mutex::new(Some(spooler)),
            puller,
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
    ///
    /// `UNKNOWN` where it is not settled by then, `NOT_KEPT` where its result is not kept any more.
    pub fn wait(&self, operation_id: Uuid, timeout: Option<Duration>) -> Settled {
        self.shared.results.wait(operation_id, timeout)
    }

    /// Reads from the hub; waits at most `critical_timeout_ms`, or `timeout` where given.
    ///
    /// `HUB_UNAVAILABLE` without an answer, `SHUT_DOWN`, or the code of the hub's refusal.
    pub fn pull(&self, request: v1::PullRequest, timeout: Option<Duration>) -> Result<v1::PullReply, Problem> {
        let timeout = timeout.unwrap_or(self.shared.config.critical_timeout);
        let (told, answer) = mpsc::sync_channel(1);
        let puller = self.puller.clone();
        match &*self.runtime.lock().unwrap_or_else(PoisonError::into_inner) {
            // Who asked may have given up.
            Some(runtime) => runtime.spawn(async move { told.send(puller.pull(request, timeout).await) }),
            None => return Err(shut_down()),
        };
        answer.recv_timeout(timeout * 2).unwrap_or_else(|error| {
            Err(match error {
                mpsc::RecvTimeoutError::Timeout => Problem::new(Code::HubUnavailable, "the hub did not answer in time"),
                mpsc::RecvTimeoutError::Disconnected => shut_down(),
            })
        })
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
    pub fn shutdown(&self) {
        let shared = &self.shared;
        shared.lanes.close();
        shared.stopping.store(true, Ordering::SeqCst);
        shared.stop_wake.notify_waiters();
        let runtime = self.runtime.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(runtime) = runtime {
            // On a thread of its own, for a caller may be inside a runtime, where none may be waited for.
            let ended = std::thread::spawn(move || runtime.shutdown_timeout(LINK_SHUTDOWN)).join();
            log_panic(&ended, "link");
        }
        // The link's last answers are settled: they go to disk with the rest.
        shared.finishing.store(true, Ordering::SeqCst);
        shared.alarm.ring();
        let spooler = self.spooler.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(spooler) = spooler {
            log_panic(&spooler.join(), "spooler");
        }
        shared.results.close();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.shutdown();
    }
}

fn shut_down() -> Problem {
    Problem::new(Code::ShutDown, "the agent has shut down")
}

fn log_panic(ended: &std::thread::Result<()>, thread: &str) {
    if ended.is_err() {
        tracing::error!(thread, "a thread of the agent had panicked");
    }
}
