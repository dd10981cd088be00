//! What the agent does for programs that attach to it.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};

use p2p_sync_proto::{
    Code, Policies, Position, Problem, ids,
    v1::{Operation, SequenceRange},
};
use prost::Message as _;
use uuid::Uuid;

use super::Agent;
use crate::{
    clients::{Client, Clients, Refused},
    counters::add,
    lanes::{MadeElsewhere, Submission, Taken},
    outbox::Change,
    results::{Observer, OperationState, Settled},
};

/// Dead letters that are looked through for what became of operations.
const DEAD_LETTERS_SEARCHED: usize = 1024;

/// What an attached program hands over.
pub(crate) enum Made<'a> {
    One(Submission<'a>),
    Group(Vec<Submission<'a>>),
}

impl Agent {
    /// Takes an operation of an attached program, in the order of that program's numbers: `taken` is the last one.
    ///
    /// `QUEUE_FULL` where it has to be tried again, also while the disk takes nothing, for it goes nowhere but through the
    /// disk. Any other refusal but `SHUT_DOWN` is final and told as the operation's result.
    pub(crate) fn submit_made(
        &self,
        submission: &Made<'_>,
        made: MadeElsewhere,
        client: &Arc<Client>,
        number: u64,
    ) -> Result<(), Problem> {
        let shared = &self.shared;
        if shared.is_disk_full() || shared.clients.waiting_numbers() > shared.config.queue_ops_max {
            return Err(Problem::new(Code::QueueFull, "what was taken has to be on disk first"));
        }
        let announce = |taken: &Taken| {
            let accepted = Settled::plain(OperationState::Accepted);
            shared.results.note(taken.operation_id, taken.position, accepted);
            shared.clients.note_taken(client, number, taken.position);
        };
        let taken = match submission {
            Made::One(submission) => shared.lanes.take_made(submission, Some(made), announce),
            Made::Group(members) => shared.lanes.take_made_group(members, Some(made), announce),
        };
        if taken.is_ok() {
            add(&shared.counters.taken);
            if let Made::One(submission) = submission {
                shared.metrics.note(submission);
            }
        }
        shared.alarm.ring_if_asleep();
        taken.map(|_| ())
    }

    /// Notes what an attached program had read when it made its next operation.
    pub(crate) fn has_read<'s>(&self, states: impl IntoIterator<Item = (&'s str, u64)>) {
        self.shared.has_read(states);
    }

    /// Notes that an operation of an attached program will never be taken: it is kept as a dead letter, on disk with its
    /// number. `operation` has all but its version.
    pub(crate) fn refuse_made(&self, operation: Operation, problem: Problem, client: &Arc<Client>, number: u64) {
        let shared = &self.shared;
        let operation_id = ids::read_id(&operation.operation_id).unwrap_or_default();
        tracing::warn!(%operation_id, %problem, "an operation of an attached program is refused");
        add(&shared.counters.refused);
        let position = shared.lanes.pass_over();
        shared.pending().withdraw(SequenceRange {
            incarnation: position.incarnation,
            first: position.sequence,
            last: position.sequence,
        });
        let operation = Operation {
            version: Some(position.version(0)),
            ..operation
        };
        let refused = Refused {
            position,
            operation: operation.encode_to_vec().into(),
            problem: problem.clone(),
        };
        shared.results.note(operation_id, position, Settled::rejected(problem));
        shared.clients.note_refused(client, number, refused);
        shared.alarm.ring_if_asleep();
        shared.bulk_wake.notify_one();
    }

    /// What became of operations that were refused and are kept as dead letters, of the newest.
    pub(crate) fn buried(&self) -> HashMap<Uuid, Settled> {
        let letters = self.dead_letters(DEAD_LETTERS_SEARCHED).unwrap_or_default();
        let told = letters.into_iter().filter_map(|letter| {
            let id = ids::read_id(&letter.operation?.operation_id)?;
            let settled = Settled {
                at: UNIX_EPOCH + Duration::from_millis(letter.at_ms),
                ..Settled::rejected(letter.problem)
            };
            Some((id, settled))
        });
        told.collect()
    }

    /// What was taken goes to disk now: someone waits.
    pub(crate) fn spool_now(&self) {
        self.shared.alarm.ring();
    }

    /// Programs that attach to this agent.
    pub(crate) fn clients(&self) -> &Clients {
        &self.shared.clients
    }

    /// A program has attached; another is forgotten for it if there are too many.
    pub(crate) fn forget_client(&self, change: Change) {
        self.shared.change(change);
    }

    /// The position that the next operation will have: what is on disk now lies before.
    pub(crate) fn next_position(&self) -> Position {
        self.shared.lanes.next_position()
    }

    /// Whether everything before a position that was on disk when that was the next one is settled.
    pub(crate) fn has_settled_before(&self, position: Position) -> bool {
        let oldest = self.shared.pending().oldest();
        oldest.is_none_or(|oldest| oldest >= position)
    }

    /// The policies in force.
    pub(crate) fn policies(&self) -> Arc<Policies> {
        self.shared.lanes.policies()
    }

    /// Whether anything is taken at all.
    pub(crate) fn is_enabled(&self) -> bool {
        self.shared.config.enabled
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.shared.is_stopping()
    }
}

/// Tells attached programs, and whoever else listens.
pub(super) fn telling(clients: &Arc<Clients>, observer: Option<Observer>) -> Observer {
    let clients = clients.clone();
    Arc::new(move |event| {
        clients.tell(event);
        if let Some(observer) = &observer {
            observer(event);
        }
    })
}
