//! What the threads of an attached program share: what it holds, and what it knows of the agent.

use std::{
    collections::HashSet,
    io,
    os::unix::net::UnixStream,
    path::PathBuf,
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, UNIX_EPOCH},
};

use arc_swap::ArcSwap;
use p2p_sync_proto::{Code, Policies, Position, Problem, ids, v1};
use prost::Message as _;
use serde_json::Value;
use tokio::sync::Semaphore;
use uuid::Uuid;

use super::{FLUSH_ROUND, errands::Errands, lock, milliseconds, queue::Queue, shut_down};
use crate::{
    agent::Status,
    attach_lines::{self, Told, read_base64, write_base64},
    config::Config,
    counters::{Counters, add},
    edits,
    events::Events,
    lanes::{Lanes, Priority, Submission, check_group},
    leases::{Leases, heard_from},
    local_api::{self, Action, LINE_BYTES_MAX, Request},
    maps::{MapCall, MapsAnswer},
    outbox::now_ms,
    questions::Asker,
    results::{OperationState, Results, Settled},
    spooler::Alarm,
    unsaid::Unsaid,
};

pub(super) struct Inner {
    pub(super) config: Config,
    pub(super) socket: PathBuf,
    /// Which program this is to the agent, for as long as this value lives.
    pub(super) client: Uuid,
    pub(super) queue: Mutex<Queue>,
    pub(super) policies: ArcSwap<Policies>,
    pub(super) results: Results,
    pub(super) events: Arc<Events>,
    /// As the agent said last.
    pub(super) leases: Arc<Leases>,
    pub(super) counters: Counters,
    pub(super) errands: Errands,
    /// What was read and the agent was not told.
    pub(super) unsaid: Unsaid,
    pub(super) alarm: Alarm,
    /// Whether a caller who waits may expect an answer: the agent is there and its hub answers.
    pub(super) answers: AtomicBool,
    /// A call of the cache has waited in vain, and the agent has answered no request since.
    pub(super) cache_silent: AtomicBool,
    pub(super) known: Mutex<Known>,
    pub(super) changed: Condvar,
    /// To end it from outside.
    pub(super) stream: Mutex<Option<Arc<UnixStream>>>,
    pub(super) ending: AtomicBool,
    /// Places of calls of maps: each waits on a thread.
    pub(super) map_calls: Semaphore,
}

/// What is known of the agent.
#[derive(Default)]
pub(super) struct Known {
    pub(super) status: Status,
    pub(super) is_attached: bool,
    /// Why not.
    pub(super) problem: Option<Problem>,
    /// Whether the link is up, as it was told last.
    told_up: Option<bool>,
}

impl Known {
    /// Tells when the link comes and goes. Without a reason it is not known to be down.
    fn tell_link(&mut self, is_up: bool, problem: Option<Problem>, events: &Events) {
        if self.told_up != Some(is_up) && (is_up || problem.is_some()) {
            self.told_up = Some(is_up);
            events.link(problem.filter(|_| !is_up));
        }
    }
}

fn hub_unavailable(sentence: String) -> Problem {
    Problem::new(Code::HubUnavailable, sentence)
}

/// Calls of maps at a time.
pub(super) const MAP_CALLS_MAX: usize = 2;
/// For the agent to have on its disk what was made before a map is released.
const TAKEN_TIMEOUT: Duration = Duration::from_secs(5);
/// Written before a line when it gets its number, at most.
const NUMBER_BYTES: usize = 64;
/// The position of an operation is the agent's alone to know.
const ELSEWHERE: Position = Position {
    incarnation: 0,
    sequence: 0,
};

impl Inner {
    pub(super) fn queue(&self) -> MutexGuard<'_, Queue> {
        lock(&self.queue)
    }

    pub(super) fn is_ending(&self) -> bool {
        self.ending.load(Ordering::SeqCst)
    }

    pub(super) fn check_enabled(&self) -> Result<(), Problem> {
        if self.is_ending() {
            return Err(shut_down());
        }
        let off = || Problem::new(Code::Unsupported, "synchronisation is off: set `enabled = yes`");
        self.config.enabled.then_some(()).ok_or_else(off)
    }

    /// Takes an operation; `urgent` where someone waits for it.
    pub(super) fn take(&self, submission: &Submission<'_>, urgent: bool) -> Result<Uuid, Problem> {
        let taken = self.queue_operation(submission, urgent);
        self.count_taken(&taken);
        taken
    }

    fn count_taken(&self, taken: &Result<Uuid, Problem>) {
        add(match taken {
            Ok(_) => &self.counters.taken,
            Err(_) => &self.counters.refused,
        });
    }

    fn queue_operation(&self, submission: &Submission<'_>, urgent: bool) -> Result<Uuid, Problem> {
        self.check_enabled()?;
        let policies = self.policies.load();
        let policy = policies.of(submission.data_type);
        // The agent makes the path, under its own policies and for its own host; here it is only tried.
        Lanes::path(Uuid::nil(), policy, submission, false)?;
        let critical = submission.priority == Priority::Critical || policy.critical;
        let (operation_id, made_at_ms) = (ids::new_id(), now_ms());
        let line = attach_lines::put(submission, operation_id, made_at_ms, urgent);
        self.queue_line(operation_id, made_at_ms, line, critical, submission.notify)
    }

    /// Takes a group of operations.
    pub(super) fn take_group(&self, members: &[Submission<'_>], notify: bool) -> Result<Uuid, Problem> {
        let taken = self.queue_group(members, notify);
        self.count_taken(&taken);
        taken
    }

    fn queue_group(&self, members: &[Submission<'_>], notify: bool) -> Result<Uuid, Problem> {
        self.check_enabled()?;
        // As for one: the agent makes the paths.
        let critical = check_group(Uuid::nil(), &self.policies.load(), members)?;
        let (operation_id, made_at_ms) = (ids::new_id(), now_ms());
        let line = attach_lines::put_group(members, operation_id, made_at_ms);
        self.queue_line(operation_id, made_at_ms, line, critical, notify)
    }

    fn queue_line(
        &self,
        operation_id: Uuid,
        made_at_ms: u64,
        mut line: String,
        critical: bool,
        notify: bool,
    ) -> Result<Uuid, Problem> {
        if line.len() + NUMBER_BYTES > usize::try_from(LINE_BYTES_MAX).unwrap_or(usize::MAX) {
            let sentence = "it is too long for a line to the agent: send less, or smaller groups";
            return Err(Problem::new(Code::TooLarge, sentence));
        }
        if notify {
            self.events.reserve_settled()?;
        }
        let seen = self.unsaid.take(line.len());
        if !seen.is_empty() {
            attach_lines::add_seen(&seen, &mut line);
        }
        let queued = self.queue().push(operation_id, line.into(), critical, || {
            self.results.accept(operation_id, ELSEWHERE, made_at_ms, notify);
        });
        if queued.is_err() {
            self.unsaid.put_back(seen);
            if notify {
                self.events.release_settled();
            }
        }
        queued.map(|()| operation_id)
    }

    pub(super) fn note(&self, operation_id: Uuid, settled: Settled) {
        self.results.note(operation_id, ELSEWHERE, settled);
    }

    /// Takes over what the agent says on attaching; gives the operations whose states have to be asked for.
    pub(super) fn attached(&self, answer: Told) -> Result<Vec<Uuid>, Problem> {
        if let Some(problem) = answer.problem() {
            return Err(problem);
        }
        if answer.policies.is_none() || answer.durable.is_none() {
            let sentence = "what answers at agent_socket is no standalone agent, or too old a one: update it";
            return Err(Problem::new(Code::UpgradeRequired, sentence));
        }
        tracing::info!(socket = %self.socket.display(), "attached to the standalone agent");
        {
            let mut known = lock(&self.known);
            known.is_attached = true;
            known.problem = None;
        }
        self.told(answer);
        let kept: HashSet<Uuid> = self.queue().ids().collect();
        let mut unknown = self.results.unsettled();
        unknown.retain(|id| !kept.contains(id));
        Ok(unknown)
    }

    /// Takes over what a line says.
    pub(super) fn told(&self, told: Told) {
        if let Some(policies) = told.policies.as_deref().and_then(attach_lines::read_policies) {
            self.policies.store(Arc::new(policies));
        }
        if let (Some(operation_id), Some(state)) = (told.operation_id, told.state) {
            let now = Settled::plain(state);
            let settled = Settled {
                problem: told.problem(),
                at: told.at_ms.map_or(now.at, |at| UNIX_EPOCH + Duration::from_millis(at)),
                ..now
            };
            self.told_state(operation_id, settled);
        }
        if let Some(number) = told.durable {
            let gone = self.queue().on_disk(number);
            for operation_id in gone {
                self.note(operation_id, Settled::plain(OperationState::Spooled));
            }
        }
        if told.status.is_some() || told.durable.is_some() {
            let mut known = lock(&self.known);
            if let Some(status) = told.status {
                if status.link_up && !known.status.link_up {
                    self.answers.store(true, Ordering::SeqCst);
                } else if !status.link_up {
                    self.answers.store(false, Ordering::SeqCst);
                }
                let down = status.link_problem.clone();
                known.tell_link(status.link_up, down.map(hub_unavailable), &self.events);
                // An agent that was just started has yet to ask the hub: what was known before holds.
                if let Some(governed) = status.leases_required {
                    self.leases.heard(governed, heard_from(&status.leases), Instant::now());
                }
                known.status = status;
            }
            self.changed.notify_all();
        }
    }

    pub(super) fn told_state(&self, operation_id: Uuid, settled: Settled) {
        let known = self.results.get(operation_id).state;
        if known == OperationState::NotKept || known.is_settled() {
            // Another program's, or told before.
            return;
        }
        match settled.state {
            OperationState::NotKept => self.results.not_kept(operation_id),
            state if state.is_settled() => {
                self.answers.store(true, Ordering::SeqCst);
                self.counters.settled(state);
                self.note(operation_id, settled);
            }
            // How far it is on disk is told by numbers.
            _ => {}
        }
    }

    /// Waits until what the agent has settled is told here too; false when the time is over.
    pub(super) fn all_told(&self, deadline: Instant) -> bool {
        let mut untold = self.results.unsettled();
        loop {
            untold.retain(|id| {
                let state = self.results.get(*id).state;
                !state.is_settled() && state != OperationState::NotKept
            });
            if untold.is_empty() || Instant::now() >= deadline {
                return untold.is_empty();
            }
            let known = lock(&self.known);
            drop(self.changed.wait_timeout(known, FLUSH_ROUND));
        }
    }

    pub(super) fn detached(&self, problem: Problem) {
        self.answers.store(false, Ordering::SeqCst);
        let mut known = lock(&self.known);
        if known.is_attached || known.problem.as_ref().map(|known| known.code) != Some(problem.code) {
            tracing::warn!(%problem, "not attached to the standalone agent");
        }
        known.is_attached = false;
        known.status.link_up = false;
        known.tell_link(false, Some(problem.clone()), &self.events);
        known.problem = Some(problem);
        self.changed.notify_all();
    }

    pub(super) fn not_there(&self, error: &io::Error) -> Problem {
        let sentence = format!(
            "the standalone agent at {} is not there ({error}): start `p2p-sync-agent run`; operations wait in memory until then",
            self.socket.display()
        );
        Problem::new(Code::HubUnavailable, sentence)
    }

    pub(super) fn silent(&self) -> Problem {
        let sentence = format!(
            "the standalone agent at {} does not answer: see that its process runs; operations wait in memory until then",
            self.socket.display()
        );
        Problem::new(Code::HubUnavailable, sentence)
    }

    /// Reads from the hub through the agent, or what that has without the hub: it may take `timeout`, and the caller waits `patience`.
    pub(super) fn pull(
        &self,
        request: &v1::PullRequest,
        kept: bool,
        timeout: Duration,
        patience: Duration,
    ) -> Result<v1::PullReply, Problem> {
        let request = Request {
            action: Action::Pull,
            kept,
            pull: write_base64(&request.encode_to_vec()),
            timeout_ms: milliseconds(timeout),
            ..Request::default()
        };
        let answer = self.ask(&request, patience)?;
        let reply = answer["reply"].as_str().and_then(read_base64);
        reply
            .and_then(|reply| v1::PullReply::decode(reply.as_slice()).ok())
            .ok_or_else(|| Problem::new(Code::Internal, "the agent answered something else: update it"))
    }

    /// Calls the hub through the agent, which is to have what was made up to a number before.
    fn ask_of_maps(&self, call: MapCall, made: u64) -> Result<Value, Problem> {
        let patience = call.patience();
        let (action, map, to) = match call {
            MapCall::List { map } => (Action::ListMaps, map, None),
            MapCall::Assign { map } => (Action::AssignMap, map, None),
            MapCall::Migrate { map, to } => (Action::MigrateMap, map, to),
            MapCall::Release { map } => {
                self.wait_until_taken(made)?;
                (Action::ReleaseMap, map, None)
            }
        };
        let request = Request {
            action,
            map,
            to: to.map(|to| to.to_string()).unwrap_or_default(),
            ..Request::default()
        };
        self.ask(&request, patience)
    }

    fn wait_until_taken(&self, number: u64) -> Result<(), Problem> {
        let deadline = Instant::now() + TAKEN_TIMEOUT;
        self.alarm.ring();
        while !self.queue().is_on_disk(number) {
            if Instant::now() >= deadline || self.is_ending() {
                return Err(self.silent());
            }
            let known = lock(&self.known);
            drop(self.changed.wait_timeout(known, FLUSH_ROUND));
        }
        Ok(())
    }

    pub(super) fn ask(&self, request: &Request, timeout: Duration) -> Result<Value, Problem> {
        if self.is_ending() {
            return Err(shut_down());
        }
        let not_there = || self.not_there(&io::ErrorKind::NotFound.into());
        local_api::ask_within(&self.socket, request, timeout).ok_or_else(not_there)?
    }
}

impl Asker for Inner {
    fn policies(&self) -> Arc<Policies> {
        self.policies.load_full()
    }

    fn host_id(&self) -> Result<Uuid, Problem> {
        let known = lock(&self.known);
        if known.status.host_id.is_nil() {
            return Err(self.not_there(&io::ErrorKind::NotFound.into()));
        }
        Ok(known.status.host_id)
    }

    fn results(&self) -> &Results {
        &self.results
    }

    fn events(&self) -> &Events {
        &self.events
    }

    fn has_read(&self, reply: &v1::PullReply) {
        self.unsaid.has_read(edits::of_reply(reply));
    }

    fn call_maps(self: Arc<Self>, call: MapCall) -> MapsAnswer {
        let made = self.queue().last();
        // It may not be written from now on, though the agent has yet to hear of it.
        let given_up = match &call {
            MapCall::Release { map } => self.leases.give_up(map).map(|tenure| (map.clone(), tenure)),
            _ => None,
        };
        Box::pin(async move {
            let _place = self.map_calls.acquire().await.expect("never closed");
            let asking = self.clone();
            let asked = tokio::task::spawn_blocking(move || asking.ask_of_maps(call, made)).await;
            let answer = asked.unwrap_or_else(|error| Err(Problem::new(Code::Internal, error.to_string())));
            if let (Err(_), Some((map, tenure))) = (&answer, given_up) {
                self.leases.keep(&map, tenure);
            }
            answer
        })
    }
}
