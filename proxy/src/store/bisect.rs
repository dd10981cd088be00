//! One operation that Postgres does not take must not keep its neighbours out: a message that fails by its content is
//! halved until the culprits stand alone, and those are rejected with Postgres' own sentence. A group stays whole.

use std::borrow::Cow;

use p2p_sync_proto::{
    Code, Problem,
    group::{Member, to_json},
};
use serde_json::value::RawValue;
use tokio_postgres::error::SqlState;

use super::{
    Store, Unavailable,
    apply::{Part, Refusal},
    class, not_answering, told,
};
use crate::operation::{Committed, Valid, ValidOp};

/// The number of gaps or of open incarnations is at its bound; raised by the schema's own functions.
const TOO_MANY_GAPS: &str = "P2G01";

/// Why a call failed.
pub(super) enum Failure {
    /// Something in it cannot be stored, with Postgres' sentence.
    Content(String),
    /// It met another transaction, or its connection broke: the same call may succeed now.
    Again(Unavailable),
    /// Postgres does not serve.
    Unavailable(Unavailable),
}

impl From<Unavailable> for Failure {
    fn from(unavailable: Unavailable) -> Self {
        Self::Unavailable(unavailable)
    }
}

impl Failure {
    /// Tells a bad operation from a bad day by the SQLSTATE: only what is surely the content's fault is rejected.
    pub(super) fn of(error: &tokio_postgres::Error) -> Self {
        if error.is_closed() {
            return Self::Again(Unavailable(not_answering()));
        }
        let Some(state) = error.code() else {
            return Self::Unavailable(Unavailable(not_answering()));
        };
        match class(state) {
            // Data exceptions, violated constraints, limits of the server. An internal error (XX) is none of these: it tells
            // of a broken store, and rejecting by it would reject everything.
            "22" | "23" | "54" => Self::Content(told(error)),
            _ if matches!(
                *state,
                SqlState::T_R_SERIALIZATION_FAILURE | SqlState::T_R_DEADLOCK_DETECTED
            ) =>
            {
                Self::Again(Unavailable(not_answering()))
            }
            _ if state.code() == TOO_MANY_GAPS => Self::Unavailable(Unavailable(Problem::new(
                Code::TooManyGaps,
                "too many earlier operations of this outbox are missing: send those first",
            ))),
            _ => Self::Unavailable(Unavailable(not_answering())),
        }
    }
}

impl Store {
    /// Applies a part; on a failure by its content in halves, one after the other, for predecessors come first.
    pub(super) async fn apply_part<'a>(
        &self,
        valid: &'a Valid,
        part: Part<'a>,
        committed: &mut Committed,
    ) -> Result<(), Unavailable> {
        let mut rest = vec![part];
        while let Some(part) = rest.pop() {
            match self.call(valid, &part).await {
                Ok(answer) => answer.add_to(committed, valid, &part),
                Err(Failure::Content(sentence)) => {
                    let operations = part.ops.len();
                    tracing::warn!(host_id = %valid.host_id, operations, sentence, "Postgres does not take a message");
                    match part.without_culprit(&sentence) {
                        Some(parts) => rest.extend(parts.into_iter().rev()),
                        None => return Err(Unavailable(not_answering())),
                    }
                }
                Err(Failure::Again(unavailable) | Failure::Unavailable(unavailable)) => return Err(unavailable),
            }
        }
        Ok(())
    }
}

impl<'a> Part<'a> {
    /// Two halves, the first with all that is not an operation; or, of a single operation, its refusal. None where no
    /// operation can be the culprit.
    fn without_culprit(mut self, sentence: &str) -> Option<Vec<Part<'a>>> {
        if let Some(middle) = middle(&self.ops) {
            let second = self.ops.split_off(middle);
            let incarnation = self.incarnation;
            return Some(vec![
                self,
                Part {
                    incarnation,
                    ops: second,
                    ..Part::default()
                },
            ]);
        }
        let refusal = refused_alone(&self.ops, sentence)?;
        self.ops.clear();
        self.refused.push(refusal);
        Some(vec![self])
    }
}

/// Where to halve operations without parting a group; `None` where they are one operation or one group.
fn middle(ops: &[&ValidOp]) -> Option<usize> {
    let begins = |at: &usize| ops[*at - 1].position != ops[*at].position;
    let half = ops.len() / 2;
    (1..=half)
        .rev()
        .find(begins)
        .or_else(|| (half + 1..ops.len()).find(begins))
}

/// The refusal of an operation, or of a group as a whole.
fn refused_alone<'a>(ops: &[&'a ValidOp], sentence: &str) -> Option<Refusal<'a>> {
    let first = ops.first()?;
    let (path, data_type, payload) = if first.in_group {
        (
            "",
            -1,
            Cow::Owned(to_json(ops.iter().map(|op| member(op))).into_bytes()),
        )
    } else {
        let payload = first.payload.as_deref().unwrap_or_default().as_bytes();
        (first.path.as_str(), first.data_type.into(), Cow::Borrowed(payload))
    };
    Some(Refusal {
        index: first.index,
        sequence: first.position.sequence,
        follows: ops.iter().flat_map(|op| op.follows()).collect(),
        operation_id: first.operation_id,
        path,
        data_type,
        payload,
        problem: Cow::Owned(refusal(sentence)),
    })
}

fn member(op: &ValidOp) -> Member<'_> {
    Member {
        path: op.path.as_str(),
        account_id: op.account_id,
        map: &op.map,
        data: op
            .payload
            .clone()
            .map(|payload| RawValue::from_string(payload).expect("validation takes JSON alone")),
    }
}

fn refusal(sentence: &str) -> Problem {
    let sentence = format!("the hub's database does not take this operation: {sentence}");
    Problem::new(Code::StoreRefused, sentence).shortened()
}
