//! What the stages hand to one another: operations that were found valid, and what became of them.

use std::collections::HashMap;

use p2p_sync_proto::{Code, Path, Position, Problem, envelope::Lane, policy::Keep, v1};
use uuid::Uuid;

use crate::verdicts::movement::Step;

/// Largest tenure, incarnation, sequence or edit number that Postgres can count with, range bounds included.
///
/// Validation refuses larger ones with `BAD_OPERATION`.
pub const COUNTER_MAX: u64 = i64::MAX.unsigned_abs() - 1;

/// What is logged of a type kept as `latest`; operations of types kept as `every` are always logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum History {
    /// Every operation.
    All,
    /// One operation per path every so many seconds.
    Sampled {
        /// At least 1.
        seconds: u32,
    },
    /// Nothing.
    Off,
}

/// What becomes of an operation whose writer had not seen the operator's last edit of its path. In the order of their
/// strictness: the strictest of a group's members decides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum ConflictRule {
    /// It is applied.
    Host = 1,
    /// What came later holds. An operation comes after the edit that it conflicts with, so it is applied too.
    Newest = 2,
    /// It is rejected.
    #[default]
    Hub = 3,
    /// It is rejected, and the conflict is open until the operator resolves it.
    Both = 4,
}

/// An operation that passed validation, or one member of a group that did.
///
/// The members of a group share its index, id and position, and follow one another wherever operations are listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValidOp {
    /// Which operation of the message, from 0.
    pub index: u32,
    /// As the host gave it.
    pub operation_id: Uuid,
    /// Of its map, as the host gave it; at most [`COUNTER_MAX`]. Of players and hosts the store knows better.
    pub tenure: u64,
    /// The rest of its version, unique per host; both fields at most [`COUNTER_MAX`].
    pub position: Position,
    /// What it writes.
    pub path: Path,
    /// What it tells of.
    pub data_type: v1::SyncDataType,
    /// Whether the newest version of the path is the truth, or each operation counts.
    pub keep: Keep,
    /// What is logged of it.
    pub history: History,
    /// A DELETE: leaves a tombstone, and has no payload.
    pub deleted: bool,
    /// Whom it is about; 0 for nobody.
    pub account_id: u32,
    /// Where it happened; empty when that is not known.
    pub map: String,
    /// The last edit by the hub that the writer had seen on the path; 0 for none. At most [`COUNTER_MAX`].
    pub hub_edit_seen: u64,
    /// What becomes of it where that is not the last.
    pub conflict_rule: ConflictRule,
    /// The operation before this one on its path, where that has to be settled first. Always before `position`.
    pub predecessor: Option<Position>,
    /// The last coming or going of its player, where that has to be settled first. Always before `position`.
    pub presence: Option<Position>,
    /// The host's clock, milliseconds since 1970: shown to people, compared with nothing. At most [`COUNTER_MAX`].
    pub made_at_ms: u64,
    /// JSON text that Postgres can hold; absent for a DELETE.
    pub payload: Option<String>,
    /// A member of a group: stored with the others or not at all.
    pub in_group: bool,
    /// Its text is to be embedded, or to be forgotten where it is a DELETE.
    pub embedded: bool,
    /// Which character is where by it, for types whose movement is scored.
    pub step: Option<(u64, Step)>,
}

impl ValidOp {
    /// What has to be settled before it.
    pub fn follows(&self) -> impl Iterator<Item = Position> {
        self.predecessor.into_iter().chain(self.presence)
    }
}

/// An operation that validation refused. It is kept with its reason, and its position counts as settled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Which operation of the message, from 0.
    pub index: u32,
    /// As the host gave it; nil where it gave none.
    pub operation_id: Uuid,
    /// Absent where the operation could not be read that far: then nothing is settled by refusing it.
    pub position: Option<Position>,
    /// What has to be settled before it, as far as that could be read: else what follows it would overtake these. Always
    /// before `position`.
    pub follows: Vec<Position>,
    /// As the host gave it, whatever it is, cut to what a path may have.
    pub path: String,
    /// As the host gave it, whatever it is.
    pub data_type: i32,
    /// As the host gave it, whatever it is, cut to what its type may have; of a group its members as a JSON array.
    pub payload: Vec<u8>,
    /// Why.
    pub problem: Problem,
}

/// A message whose sender is known and whose operations were checked one by one.
#[derive(Clone, Debug)]
pub struct Valid {
    /// Who sent it, as the envelope proves.
    pub host_id: Uuid,
    /// The lane it came by.
    pub lane: Lane,
    /// What is to be applied.
    pub ops: Vec<ValidOp>,
    /// What is to be refused.
    pub refused: Vec<Refused>,
    /// Sequences that will never come.
    pub withdrawn: Vec<v1::SequenceRange>,
}

/// What became of one operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It took effect.
    Applied {
        /// Its position in its stream; 0 when an earlier message had settled it.
        stream_sequence: u64,
    },
    /// The path holds a newer version.
    Superseded,
    /// It will never apply.
    Rejected(Problem),
    /// It came under a tenure that has passed, and is kept apart.
    Limbo(Problem),
    /// What it follows is not settled, or another host has its player: send it again later. `NOT_YET_SETTLED` on the wire.
    NotYet,
    /// Its type comes faster than it may: send it again later. `RATE_LIMITED` on the wire.
    HeldBack,
}

/// What a host is told of [`Code::StoreRefused`]. Postgres' own sentence is the operator's, for what it names is the hub's:
/// it is kept with the operation, and logged.
const STORE_REFUSED: &str = "the hub's database does not take this operation: ask the hub's operator, who can read why";

impl Outcome {
    /// As it is told to the sender, who takes an operation that is not listed as applied.
    pub fn to_wire(&self, index: u32) -> Option<v1::Outcome> {
        let (state, code, message) = match self {
            Self::Applied { .. } => return None,
            Self::Superseded => (v1::OutcomeState::Superseded, Code::None, ""),
            Self::Rejected(problem) if problem.code == Code::StoreRefused => {
                (v1::OutcomeState::Rejected, problem.code, STORE_REFUSED)
            }
            Self::Rejected(problem) => (v1::OutcomeState::Rejected, problem.code, problem.sentence.as_str()),
            Self::Limbo(problem) => (v1::OutcomeState::Limbo, problem.code, problem.sentence.as_str()),
            Self::NotYet => (
                v1::OutcomeState::NotYet,
                Code::NotYetSettled,
                "an operation that it follows is not settled, or another host has the player still; it is sent again",
            ),
            Self::HeldBack => (
                v1::OutcomeState::NotYet,
                Code::RateLimited,
                "operations of its type come faster than they may; it is sent again",
            ),
        };
        Some(v1::Outcome {
            index,
            state: state.into(),
            code: code.into(),
            message: message.to_owned(),
            hub_edits: Vec::new(),
        })
    }
}

/// What one message led to. It is durable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    /// Of the hub: changes when its database may have gone back.
    pub timeline: u64,
    /// One for each operation of the message, by its index there, in no particular order.
    pub outcomes: Vec<(u32, Outcome)>,
    /// Of those that were refused or put into limbo, the ones that were so by this message and by none before it.
    pub settled_now: Vec<u32>,
    /// What readers may want to know of: operations that became the newest of their path, and each operation of types
    /// kept as `every`. In the order of each stream.
    pub changes: Vec<Change>,
    /// The positions of streams that the message took: all changes lie in these, and nobody else's do.
    pub spans: Vec<Span>,
    /// Of operations whose writer had seen another edit than the last, by their index: the last one of their path; of a
    /// group of each member's.
    pub edits: HashMap<u32, Vec<u64>>,
}

impl Committed {
    /// What the sender is told: an operation that is not listed was applied.
    pub fn to_wire(&self) -> Vec<v1::Outcome> {
        let told = self.outcomes.iter().filter_map(|(index, outcome)| {
            let hub_edits = self.edits.get(index);
            let applied = || hub_edits.map(|_| applied(*index));
            let wire = outcome.to_wire(*index).or_else(applied)?;
            Some(v1::Outcome {
                hub_edits: hub_edits.cloned().unwrap_or_default(),
                ..wire
            })
        });
        told.collect()
    }
}

fn applied(index: u32) -> v1::Outcome {
    v1::Outcome {
        index,
        state: v1::OutcomeState::Applied.into(),
        ..Default::default()
    }
}

/// Positions of one stream that one transaction took: `(after, upto]`. Not every one of them is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// A map's name, `@player` or `@host`.
    pub stream: String,
    /// The last position before.
    pub after: u64,
    /// The last position of these.
    pub upto: u64,
}

/// A change of state, as caches and subscribers take it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// What changed.
    pub path: Path,
    /// The stream that numbers it: a map's name, `@player` or `@host`.
    pub stream: String,
    /// Its position there.
    pub stream_sequence: u64,
    /// Who wrote it.
    pub host_id: Uuid,
    /// The first field of its version.
    pub tenure: u64,
    /// The rest of its version.
    pub position: Position,
    /// What it tells of.
    pub data_type: v1::SyncDataType,
    /// Whether it is the truth of its path, or one of several that count.
    pub keep: Keep,
    /// The path was deleted; no payload then.
    pub deleted: bool,
    /// Whom it is about; 0 for nobody.
    pub account_id: u32,
    /// JSON text.
    pub payload: Option<String>,
    /// Postgres' clock when the message was applied, milliseconds since 1970.
    pub received_at_ms: u64,
    /// Whether it came by the critical lane.
    pub critical: bool,
    /// The group that it came in, if any.
    pub group_id: Option<Uuid>,
    /// The operator's last edit of the path; 0 for none.
    pub hub_edit: u64,
}

impl Change {
    /// As subscribers and readers get it.
    pub fn to_wire(&self) -> v1::State {
        v1::State {
            path: self.path.as_str().to_owned(),
            version: Some(self.position.version(self.tenure)),
            deleted: self.deleted,
            payload: self.payload.clone().unwrap_or_default().into_bytes().into(),
            account_id: self.account_id,
            host_id: self.host_id.as_bytes().to_vec().into(),
            stream_sequence: self.stream_sequence,
            received_at_ms: self.received_at_ms,
            group_id: self
                .group_id
                .map(|id| id.as_bytes().to_vec().into())
                .unwrap_or_default(),
            hub_edit: self.hub_edit,
        }
    }
}
