//! What the agent does for programs that attach to it.

use std::sync::Arc;

use p2p_sync_proto::{Code, Policies, Position, Problem};
use uuid::Uuid;

use super::Agent;
use crate::{
    clients::{Client, Clients},
    counters::add,
    lanes::{MadeElsewhere, Submission, Taken},
    outbox::Change,
    results::{Observer, OperationState, Settled},
};

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
            shared.clients.note_taken(client, number, Some(taken.position));
        };
        let taken = match submission {
            Made::One(submission) => shared.lanes.take_made(submission, Some(made), announce),
            Made::Group(members) => shared.lanes.take_made_group(members, Some(made), announce),
        };
        if taken.is_ok() {
            add(&shared.counters.taken);
        }
        shared.alarm.ring_if_asleep();
        taken.map(|_| ())
    }

    /// Notes that an operation of an attached program will never be taken.
    pub(crate) fn refuse_made(&self, operation_id: Uuid, problem: Problem, client: &Arc<Client>, number: u64) {
        tracing::warn!(%operation_id, %problem, "an operation of an attached program is refused");
        let rejected = Settled::rejected(problem);
        add(&self.shared.counters.refused);
        let nowhere = Position {
            incarnation: self.shared.incarnation,
            sequence: 0,
        };
        self.shared.results.note(operation_id, nowhere, rejected);
        self.shared.clients.note_taken(client, number, None);
        self.shared.alarm.ring_if_asleep();
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

    /// Whether everything of earlier starts is settled.
    pub(crate) fn has_settled_earlier(&self) -> bool {
        let oldest = self.shared.pending().oldest();
        oldest.is_none_or(|oldest| oldest.incarnation == self.shared.incarnation)
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
