//! The link to the hub: a connection for critical messages, one for bulk, one for reading and one for following when they
//! are asked for.

mod attend;
mod bulk;
mod cache;
pub(crate) mod connect;
mod critical;
mod enrol;
mod leases;
mod maps;
mod pinned;
mod rotate;
mod session;
mod watcher;

pub(crate) use enrol::exchange;
pub(crate) use maps::call as call_maps;
pub(crate) use rotate::forget_former;

use std::{
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use p2p_sync_proto::{
    Code, Problem,
    envelope::Lane,
    limits::SEALED_BYTES_MAX,
    v1::{self, pull_client::PullClient},
};
use tokio::{runtime::Runtime, sync::Semaphore};

use crate::{config::Config, copies, events::Events, keys::Keys, metrics, shared::Shared, threads};

use connect::Connector;
pub(crate) use session::{Sent, Session};
pub(crate) use watcher::{Updates, Watcher, check};

use session::Sealer;

/// A lane rests no longer, whatever the hub says.
const REST_MAX: Duration = Duration::from_secs(30);

/// Whether the hub answers.
pub(crate) struct LinkState {
    answers: AtomicBool,
    problem: Mutex<Option<Problem>>,
    known: Condvar,
    /// As it was told last, if it was: whether there is a connection, not whether each call is answered in time.
    told_up: Mutex<Option<bool>>,
    /// How often it was up and went down.
    pub(crate) disconnects: AtomicU32,
    events: Arc<Events>,
}

impl LinkState {
    /// Tells `events` when the link comes and goes.
    pub(crate) fn new(events: Arc<Events>) -> Self {
        Self {
            answers: AtomicBool::new(false),
            problem: Mutex::default(),
            known: Condvar::new(),
            told_up: Mutex::default(),
            disconnects: AtomicU32::new(0),
            events,
        }
    }

    /// Whether a caller who waits may expect an answer.
    pub(crate) fn answers(&self) -> bool {
        self.answers.load(Ordering::Relaxed)
    }

    pub(crate) fn set_answers(&self, answers: bool) {
        self.answers.store(answers, Ordering::Relaxed);
    }

    pub(crate) fn is_up(&self) -> bool {
        self.problem().is_none() && self.answers()
    }

    /// Why the link is down.
    pub(crate) fn problem(&self) -> Option<Problem> {
        self.problem.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until it is known whether the hub answers, or the time is over.
    pub(crate) fn wait_until_known(&self, timeout: Duration) {
        let problem = self.problem.lock().unwrap_or_else(PoisonError::into_inner);
        let is_unknown = |problem: &mut Option<Problem>| problem.is_none() && !self.answers();
        // Either way the caller looks at what is known then.
        let _known = self.known.wait_timeout_while(problem, timeout, is_unknown);
    }

    fn up(&self) {
        let mut problem = self.problem.lock().unwrap_or_else(PoisonError::into_inner);
        *problem = None;
        self.set_answers(true);
        self.known.notify_all();
        // Still locked: who reads in the status that the link is up finds the event.
        self.tell(None);
    }

    /// Notes why the link is down; told once for each new reason.
    fn down(&self, problem: Problem) {
        let mut known = self.problem.lock().unwrap_or_else(PoisonError::into_inner);
        if known.as_ref() != Some(&problem) {
            tracing::warn!("the link is down: {problem}");
        }
        *known = Some(problem.clone());
        self.set_answers(false);
        self.known.notify_all();
        self.tell(Some(problem));
    }

    fn tell(&self, down: Option<Problem>) {
        let is_up = down.is_none();
        let mut told_up = self.told_up.lock().unwrap_or_else(PoisonError::into_inner);
        if *told_up != Some(is_up) {
            if *told_up == Some(true) {
                self.disconnects.fetch_add(1, Ordering::Relaxed);
            }
            *told_up = Some(is_up);
            self.events.link(down);
        }
    }
}

/// The threads that the link runs on.
pub(crate) fn runtime(worker_threads: usize) -> Result<Runtime, Problem> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder
        .worker_threads(worker_threads)
        .thread_name("p2p-link")
        .on_thread_start(threads::behind_this_one())
        .enable_all();
    threads::deaf(|| builder.build())
        .map_err(|error| Problem::new(Code::Internal, format!("no thread could be started: {error}")))
}

/// Starts both lanes' connections, and what carries the cache's writes over the one for reading.
pub(crate) fn start(shared: &Arc<Shared>, puller: &Arc<Puller>, runtime: &Runtime) {
    runtime.spawn(cache::run(shared.clone(), puller.clone()));
    runtime.spawn(critical::run(shared.clone()));
    runtime.spawn(bulk::run(shared.clone()));
    let leases = shared.leases.clone();
    runtime.spawn(async move { leases.watch().await });
    runtime.spawn(copies::tell(shared.clone()));
    if let Some(interval) = shared.config.metrics_interval {
        runtime.spawn(metrics::report(shared.clone(), interval));
    }
}

/// Reads from the hub over a connection that is made when it is first used.
pub(crate) struct Puller(Way);

/// How the hub is asked.
enum Way {
    Itself {
        connector: Connector,
        client: PullClient<tonic::transport::Channel>,
        sealer: Sealer,
    },
    /// Through an agent that is asked on a thread of the runtime's for what blocks.
    Agent { ask: Arc<AskAgent>, places: Semaphore },
}

/// Asks an agent, waiting at most so long; or for what it has without the hub.
pub(crate) type AskAgent = dyn Fn(&v1::PullRequest, Duration, bool) -> Result<v1::PullReply, Problem> + Send + Sync;

/// Questions to an agent at a time.
const ASKED_AGENT_MAX: usize = 4;

impl Puller {
    /// Must be called inside a runtime. `incarnation` is 0 where no outbox takes part; `sent` is its count.
    pub(crate) fn new(config: &Config, keys: Arc<Keys>, incarnation: u64, sent: Arc<Sent>) -> Self {
        let connector = Connector::new(config, sent.clone());
        let channel = session::endpoint(config).connect_with_connector_lazy(connector.clone());
        let client = PullClient::with_origin(channel, session::origin(config));
        Self(Way::Itself {
            connector,
            client: client.max_decoding_message_size(SEALED_BYTES_MAX),
            sealer: Sealer::new(keys, incarnation, sent),
        })
    }

    /// Reads through an agent.
    pub(crate) fn through_agent(ask: Arc<AskAgent>) -> Self {
        let places = Semaphore::new(ASKED_AGENT_MAX);
        Self(Way::Agent { ask, places })
    }

    /// Whether who is asked may have something without the hub.
    pub(crate) fn keeps(&self) -> bool {
        matches!(self.0, Way::Agent { .. })
    }

    /// One question and its answer. Codes of the hub's refusal, or `HUB_UNAVAILABLE`.
    pub(crate) async fn pull(&self, request: v1::PullRequest, timeout: Duration) -> Result<v1::PullReply, Problem> {
        self.pull_kept(request, timeout, false).await
    }

    /// As [`Self::pull`]; of an agent, `kept` asks for what it has without the hub.
    pub(crate) async fn pull_kept(
        &self,
        request: v1::PullRequest,
        timeout: Duration,
        kept: bool,
    ) -> Result<v1::PullReply, Problem> {
        let (connector, client, envelopes) = match &self.0 {
            Way::Itself {
                connector,
                client,
                sealer,
            } => (connector, client, sealer),
            Way::Agent { ask, places } => {
                let _place = places.acquire().await.expect("never closed");
                let ask = ask.clone();
                let asked = tokio::task::spawn_blocking(move || ask(&request, timeout, kept)).await;
                return asked.unwrap_or_else(|error| Err(Problem::new(Code::Internal, error.to_string())));
            }
        };
        let (label, sealed) = envelopes.seal(Lane::Pull, &request);
        let mut call = tonic::Request::new(sealed);
        call.set_timeout(timeout);
        let answer = client
            .clone()
            .call(call)
            .await
            .map_err(|status| connector.problem_of(&status))?;
        let reply: v1::PullReply = envelopes.open(&label, &answer.into_inner())?;
        match Code::try_from(reply.code).unwrap_or(Code::Internal) {
            Code::None => Ok(reply),
            code => Err(Problem::new(code, reply.message)),
        }
    }
}

/// How long the hub wants nothing more of a lane whose message it answered so. What waits meanwhile is sent together then.
fn rest_of(reply: &v1::BatchReply) -> Duration {
    if reply.code() == Code::RateLimited {
        Duration::from_millis(reply.retry_after_ms.into()).min(REST_MAX)
    } else {
        Duration::ZERO
    }
}

/// Waits for a wake-up, or until a time if one is given.
async fn wait(wake: &tokio::sync::Notify, until: Option<std::time::Instant>) {
    match until {
        Some(until) => {
            // Either way there is something to look at.
            let _ = tokio::time::timeout_at(until.into(), wake.notified()).await;
        }
        None => wake.notified().await,
    }
}

/// Waits before the next attempt, or until the agent stops.
async fn pause(shared: &Shared, delay: Duration) {
    let _ = tokio::time::timeout(delay, shared.stop_wake.notified()).await;
}

/// Attempts in a row that failed, after one more; a connection that lasted begins the count anew.
fn attempts_after(shared: &Shared, attempts: u32, began: std::time::Instant) -> u32 {
    if began.elapsed() > shared.config.retry_delay.1 {
        1
    } else {
        attempts + 1
    }
}
