//! One connection of an attached program: takes what it hands over, tells what becomes of it.

use std::{
    io::{self, BufRead, Write as _},
    net::Shutdown,
    os::{fd::AsFd as _, unix::net::UnixStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel::RecvTimeoutError;
use p2p_sync_proto::{
    Code, Policies, Position, Problem,
    limits::PATH_BYTES_MAX,
    path::Path,
    policy::parse_type,
    v1::{self, Group, Operation, OperationKind, operation::Payload},
};
use prost::Message as _;
use serde_json::{Value, value::RawValue};
use uuid::Uuid;

use super::{LINE_BYTES_MAX, told};
use crate::{
    agent::{Agent, Made},
    attach_lines::{self, SEEN_MAX, STATES_MAX, Said, SaidMember, Told},
    clients::Connection,
    lanes::{MadeElsewhere, Priority, Submission},
    results::{OperationState, Settled},
};

/// How often a program is told how the agent is; also finds out whether it is still there.
const STATUS_EVERY: Duration = Duration::from_millis(250);
/// While the outbox takes nothing, an operation is tried this often and its program waits.
const TRY_EVERY: Duration = Duration::from_millis(5);
/// A program that reads nothing for so long is cut off.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// For taking what programs that are gone had written, before another one is let in.
const GONE_TIMEOUT: Duration = Duration::from_secs(2);
/// Bytes written to a program at a time.
const WRITE_BYTES: usize = 64 * 1024;
/// Operations whose states are not known here and are asked of the hub, for all connections; beyond it a program is let ask
/// for no more.
const UNRESOLVED_MAX: usize = 262_144;
/// Asked of the hub at a time, for how long in all, and how long each may take.
const RESOLVE_OPS: usize = 16;
const RESOLVE_ROUND: Duration = Duration::from_millis(500);
const RESOLVE_TIMEOUT: Duration = Duration::from_millis(500);

/// Serves an attached program until it goes away.
pub(super) fn serve(agent: &Agent, id: Uuid, mut input: impl BufRead, mut stream: &UnixStream) -> io::Result<()> {
    if !agent.is_enabled() {
        let off = Problem::new(
            Code::Unsupported,
            "the agent is switched off: set `enabled = yes` for it",
        );
        return writeln!(stream, "{}", told(Value::Null, Err(off)));
    }
    agent.clients().wait_for_the_gone(GONE_TIMEOUT);
    let peer = stream.try_clone()?;
    let (connection, forgotten) = agent.clients().attach(id, Box::new(move || has_hung_up(&peer)));
    if let Some(forgotten) = forgotten {
        agent.forget_client(forgotten);
    }
    let (status, policies) = (agent.status(), agent.policies());
    let attached = Told {
        host_id: Some(status.host_id),
        policies: Some(attach_lines::write_policies(&policies)),
        durable: Some(connection.client.on_disk()),
        status: Some(status),
        ..Told::default()
    };
    stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
    stream.write_all(attached.to_line().as_bytes())?;
    let served = Served {
        agent,
        connection,
        is_gone: AtomicBool::new(false),
        unresolved: Mutex::default(),
        owes_answer: AtomicBool::new(false),
    };
    thread::scope(|scope| {
        let writer = thread::Builder::new().name("p2p-tell".to_owned());
        writer.spawn_scoped(scope, || {
            if let Err(error) = served.tell(stream, policies) {
                tracing::debug!(%error, "an attached program went away");
            }
            served.is_gone.store(true, Ordering::SeqCst);
            // Whoever reads from it now has read all.
            let _ = stream.shutdown(Shutdown::Both);
        })?;
        let read = served.read(&mut input);
        // The writer says what is left to say, and shuts down.
        served.is_gone.store(true, Ordering::SeqCst);
        read
    })
}

fn has_hung_up(stream: &UnixStream) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut polled = [PollFd::new(stream.as_fd(), PollFlags::empty())];
    // A descriptor that cannot be polled says nothing.
    let _ = poll(&mut polled, PollTimeout::ZERO);
    let events = polled[0].revents();
    events.is_some_and(|events| events.contains(PollFlags::POLLHUP))
}

struct Served<'a> {
    agent: &'a Agent,
    connection: Connection<'a>,
    /// One of the two threads has ended.
    is_gone: AtomicBool,
    /// Operations that were settled before this agent was started, or are in its outbox still; with the position that
    /// was the next one when they were asked for: once all before it is settled, they are not in the outbox.
    unresolved: Mutex<Vec<(Uuid, Position)>>,
    /// The last page of `states` is not answered yet: there are too many.
    owes_answer: AtomicBool,
}

impl Drop for Served<'_> {
    fn drop(&mut self) {
        let unresolved = self.unresolved.get_mut().unwrap_or_else(PoisonError::into_inner);
        let all = &self.agent.clients().unresolved;
        all.fetch_sub(unresolved.len(), Ordering::SeqCst);
    }
}

impl Served<'_> {
    fn is_over(&self) -> bool {
        self.is_gone.load(Ordering::SeqCst) || self.connection.is_cut.load(Ordering::SeqCst)
    }

    fn read(&self, input: &mut impl BufRead) -> io::Result<()> {
        let mut line = Vec::new();
        // What a program that is gone had written is taken too, up to the end.
        loop {
            line.clear();
            io::Read::take(&mut *input, LINE_BYTES_MAX).read_until(b'\n', &mut line)?;
            if line.last() != Some(&b'\n') {
                // Cut short by the program's end, or longer than any line of it.
                return Ok(());
            }
            let said: Said = match serde_json::from_slice(&line) {
                Ok(said) => said,
                Err(error) => {
                    let problem = Problem::new(Code::BadRequest, format!("not a line of an attached program: {error}"));
                    self.answer(told(Value::Null, Err(problem)).to_string() + "\n");
                    return Ok(());
                }
            };
            match said.action.as_str() {
                "put" => {
                    // Before the operation: it was made by who had read this.
                    let seen = said.seen.iter().take(SEEN_MAX);
                    let seen = seen.filter(|(path, _)| Path::parse(path).is_ok());
                    self.agent.has_read(seen.map(|(path, edit)| (path.as_str(), *edit)));
                    if !self.take(&said) {
                        return Ok(());
                    }
                }
                "states" => self.tell_states(&said.operation_ids),
                // Of a newer library, which does without where it is not answered.
                _ => {}
            }
        }
    }

    /// Takes an operation, as soon as it can be taken; false when the agent or the connection ends before.
    fn take(&self, said: &Said) -> bool {
        let client = &self.connection.client;
        loop {
            let mut taken = client.taken.lock().unwrap_or_else(PoisonError::into_inner);
            if said.number <= *taken {
                drop(taken);
                // Sent again, for its program was not told yet that it is on disk; nor then what became of it.
                let settled = self.agent.result(said.operation_id);
                if settled.state.is_settled() {
                    self.answer(attach_lines::state(said.operation_id, &settled));
                }
                return true;
            }
            match self.submit(said) {
                Ok(()) => {
                    *taken = said.number;
                    drop(taken);
                    if said.urgent {
                        self.agent.spool_now();
                    }
                    return true;
                }
                Err(problem) if problem.code == Code::QueueFull => {}
                Err(problem) if problem.code == Code::ShutDown => return false,
                Err(problem) => {
                    self.agent.refuse_made(as_operation(said), problem, client, said.number);
                    *taken = said.number;
                    return true;
                }
            }
            drop(taken);
            if self.is_over() || self.agent.is_stopping() {
                return false;
            }
            thread::sleep(TRY_EVERY);
        }
    }

    fn submit(&self, said: &Said) -> Result<(), Problem> {
        let submission = if said.members.is_empty() {
            Made::One(Submission {
                data_type: parse_type(&said.data_type)?,
                map: &said.map,
                account_id: said.account_id,
                entity: said.entity.as_deref(),
                char_id: said.char_id,
                payload: said.data.as_deref().map(RawValue::get),
                priority: priority(said.priority),
                notify: false,
            })
        } else {
            Made::Group(said.members.iter().map(member).collect::<Result<_, _>>()?)
        };
        let made = MadeElsewhere {
            operation_id: said.operation_id,
            at_ms: said.made_at_ms,
        };
        self.agent
            .submit_made(&submission, made, &self.connection.client, said.number)
    }

    fn tell_states(&self, operation_ids: &[Uuid]) {
        if self.owes_answer.load(Ordering::SeqCst) {
            // It was not told to ask for more.
            return;
        }
        let next = self.agent.next_position();
        let all = &self.agent.clients().unresolved;
        for id in operation_ids.iter().take(STATES_MAX) {
            let settled = self.agent.result(*id);
            if settled.state != OperationState::NotKept {
                self.answer(attach_lines::state(*id, &settled));
                continue;
            }
            let mut unresolved = self.unresolved.lock().unwrap_or_else(PoisonError::into_inner);
            unresolved.push((*id, next));
            all.fetch_add(1, Ordering::SeqCst);
        }
        if all.load(Ordering::SeqCst) < UNRESOLVED_MAX {
            self.answer(answered());
        } else {
            self.owes_answer.store(true, Ordering::SeqCst);
        }
    }

    /// Waits for room: what a program asked for is told at the speed it reads.
    fn answer(&self, line: String) {
        let mut line = line.into();
        while !self.is_over() {
            match self.connection.to_lines.send_timeout(line, STATUS_EVERY) {
                Err(crossbeam_channel::SendTimeoutError::Timeout(unsent)) => line = unsent,
                _ => return,
            }
        }
    }

    /// Writes what there is to tell until the connection ends.
    fn tell(&self, mut stream: &UnixStream, mut policies: Arc<Policies>) -> io::Result<()> {
        let mut status_due = Instant::now() + STATUS_EVERY;
        let mut batch = String::new();
        while !self.is_over() {
            match self.connection.lines.recv_timeout(STATUS_EVERY) {
                Ok(line) => batch.push_str(&line),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
            while batch.len() < WRITE_BYTES
                && let Ok(line) = self.connection.lines.try_recv()
            {
                batch.push_str(&line);
            }
            if Instant::now() >= status_due {
                self.resolve(&mut batch);
                let all = self.agent.clients().unresolved.load(Ordering::SeqCst);
                if all < UNRESOLVED_MAX && self.owes_answer.swap(false, Ordering::SeqCst) {
                    batch.push_str(&answered());
                }
                let current = self.agent.policies();
                let are_new = !Arc::ptr_eq(&policies, &current);
                policies = current;
                let told = Told {
                    policies: are_new.then(|| attach_lines::write_policies(&policies)),
                    status: Some(self.agent.status()),
                    ..Told::default()
                };
                batch.push_str(&told.to_line());
                status_due = Instant::now() + STATUS_EVERY;
            }
            stream.write_all(batch.as_bytes())?;
            batch.clear();
        }
        batch.extend(self.connection.lines.try_iter().map(|line| line.to_string()));
        stream.write_all(batch.as_bytes())
    }

    /// Operations that are not known here: what the outbox may still hold is told when it settles, the rest is asked of the
    /// hub, and of the dead letters.
    fn resolve(&self, batch: &mut String) {
        let mut unresolved = self.unresolved.lock().unwrap_or_else(PoisonError::into_inner);
        let from = unresolved.len().saturating_sub(RESOLVE_OPS);
        let some = unresolved.split_off(from);
        drop(unresolved);
        let begun = Instant::now();
        let (mut later, mut buried, mut told) = (Vec::new(), None, 0);
        let mut is_silent = false;
        for (id, before) in some {
            let known = self.agent.result(id);
            let settled = if known.state == OperationState::NotKept {
                let may_ask = !is_silent && begun.elapsed() < RESOLVE_ROUND && self.agent.has_settled_before(before);
                match may_ask.then(|| self.settled_at_hub(id)) {
                    None => None,
                    Some(Ok(settled)) if settled.state == OperationState::NotKept => {
                        let buried = buried.get_or_insert_with(|| self.agent.buried());
                        Some(buried.remove(&id).unwrap_or(settled))
                    }
                    Some(Err(problem)) if matches!(problem.code, Code::HubUnavailable | Code::RateLimited) => {
                        is_silent = true;
                        None
                    }
                    Some(settled) => Some(settled.unwrap_or(Settled::plain(OperationState::NotKept))),
                }
            } else {
                Some(known)
            };
            match settled {
                Some(settled) => {
                    batch.push_str(&attach_lines::state(id, &settled));
                    told += 1;
                }
                None => later.push((id, before)),
            }
        }
        self.agent.clients().unresolved.fetch_sub(told, Ordering::SeqCst);
        let mut unresolved = self.unresolved.lock().unwrap_or_else(PoisonError::into_inner);
        // Others first the next time.
        unresolved.splice(..0, later);
    }

    fn settled_at_hub(&self, operation_id: Uuid) -> Result<Settled, Problem> {
        let status = v1::pull_request::What::OperationStatus(v1::OperationStatus {
            operation_id: operation_id.as_bytes().to_vec().into(),
            position: None,
        });
        let reply = self
            .agent
            .pull_for_another(v1::PullRequest { what: Some(status) }, Some(RESOLVE_TIMEOUT))?;
        Ok(match reply.what {
            Some(v1::pull_reply::What::OperationStatus(status)) if status.settled => {
                crate::shared::settled_by(status.state, status.code, status.message)
                    .unwrap_or(Settled::plain(OperationState::NotKept))
            }
            _ => Settled::plain(OperationState::NotKept),
        })
    }
}

/// A page of `states` has been answered: it may ask for the next.
fn answered() -> String {
    let answered = Told {
        answered: true,
        ..Told::default()
    };
    answered.to_line()
}

/// An operation that was refused, as a dead letter shows it: in the place of its path what there is of one.
fn as_operation(said: &Said) -> Operation {
    let path = |data_type: &str, map: &str, entity: Option<&str>| {
        let parts = [map, data_type, entity.unwrap_or_default()];
        let parts: Vec<&str> = parts.into_iter().filter(|part| !part.is_empty()).collect();
        let mut path = parts.join("/");
        path.truncate(path.floor_char_boundary(PATH_BYTES_MAX));
        path
    };
    let payload = |data: Option<&RawValue>| data.map(|data| Payload::Full(data.get().as_bytes().to_vec().into()));
    let kind = |is_put: bool| {
        if is_put {
            OperationKind::Put
        } else {
            OperationKind::Delete
        }
    };
    let operation_id = said.operation_id.as_bytes().to_vec().into();
    if said.members.is_empty() {
        return Operation {
            operation_id,
            path: path(&said.data_type, &said.map, said.entity.as_deref()),
            kind: kind(said.data.is_some()).into(),
            account_id: said.account_id,
            made_at_ms: said.made_at_ms,
            payload: payload(said.data.as_deref()),
            ..Operation::default()
        };
    }
    let member = |member: &SaidMember| Operation {
        path: path(&member.data_type, &member.map, member.entity.as_deref()),
        kind: kind(member.data.is_some()).into(),
        account_id: member.account_id,
        payload: payload(member.data.as_deref()),
        ..Operation::default()
    };
    let members = said.members.iter().map(|said| member(said).encode_to_vec().into());
    Operation {
        operation_id,
        kind: OperationKind::Group.into(),
        made_at_ms: said.made_at_ms,
        payload: Some(Payload::Group(Group {
            members: members.collect(),
        })),
        ..Operation::default()
    }
}

fn member(said: &SaidMember) -> Result<Submission<'_>, Problem> {
    Ok(Submission {
        data_type: parse_type(&said.data_type)?,
        map: &said.map,
        account_id: said.account_id,
        entity: said.entity.as_deref(),
        char_id: said.char_id,
        payload: said.data.as_deref().map(RawValue::get),
        priority: priority(said.priority),
        notify: false,
    })
}

fn priority(is_critical: bool) -> Priority {
    if is_critical {
        Priority::Critical
    } else {
        Priority::ByType
    }
}
