//! Validation: from a message whose sender is known to operations that may be stored.
//!
//! An operation that is wrong is refused by itself and its neighbours go on; a message that is wrong as a whole is not
//! decided at all. What an operation may do (leases, presence, order) is checked where it is stored.

pub mod game_rule;
mod group;
pub mod schema;
pub mod types_file;

use std::collections::HashSet;

use p2p_sync_proto::{
    Code, Path, Policy, Position, Problem, Scope,
    group::{Glance, check_members, readable},
    ids::read_id,
    json::{self, Facts},
    limits::{BATCH_INCARNATIONS_MAX, BATCH_OPS_MAX, BATCH_WITHDRAWN_MAX, PATH_BYTES_MAX, PAYLOAD_BYTES_MAX},
    path::check_map,
    policy::Owner,
    presence,
    v1::{self, OperationKind, SyncDataType, operation::Payload},
};
use prost::{Message, bytes::Bytes};
use uuid::Uuid;

use crate::{
    open::{Authenticated, Sender},
    operation::{COUNTER_MAX, Refused, Valid, ValidOp},
    store::HostRole,
    validate::types_file::Rules,
};

/// Operations checked before others get their turn on the thread: a large batch must not hold up a critical message.
const OPS_PER_TURN: usize = 16;
/// What the refused operations of a message may say that they follow: two for each operation and each member of a group that
/// a message may have.
const REFUSED_FOLLOW_MAX: usize = 2 * BATCH_OPS_MAX;

/// What is told of bytes that are no operation, and of an operation in other bytes than its own.
const NOT_CANONICAL: &str = "the bytes are not an operation's canonical encoding; update the agent";

/// A policy version that an operation made by the built-in policies carries.
const BUILTIN_VERSION: u32 = 0;

/// Checks each operation of a message. The error means that nothing of the message was decided (`BAD_REQUEST`).
pub async fn validate(rules: &Rules, message: Authenticated<v1::OperationBatch>) -> (Sender, Result<Valid, Problem>) {
    let Authenticated { sender, body } = message;
    let lane = sender.label().lane;
    if let Err(problem) = check_batch(&body, sender.label().incarnation) {
        return (sender, Err(problem));
    }
    let mut valid = Valid {
        host_id: sender.host_id(),
        lane,
        ops: Vec::new(),
        refused: Vec::new(),
        withdrawn: body.withdrawn,
    };
    valid.ops.reserve_exact(body.operations.len());
    let mut seen = HashSet::with_capacity(body.operations.len());
    let check = Check {
        rules,
        host_id: sender.host_id(),
        role: sender.role(),
        incarnation_max: sender.label().incarnation,
    };
    let mut followed = 0;
    for (index, bytes) in (0..).zip(&body.operations) {
        if let Err(refused) = check.operation(index, bytes, &mut seen, &mut valid.ops) {
            followed += refused.follows.len();
            valid.refused.push(*refused);
        }
        if valid.ops.len() > BATCH_OPS_MAX || followed > REFUSED_FOLLOW_MAX {
            return (sender, Err(too_many(valid.ops.len())));
        }
        if (index as usize + 1).is_multiple_of(OPS_PER_TURN) {
            tokio::task::yield_now().await;
        }
    }
    let positions = valid.refused.iter().filter_map(|refused| refused.position);
    let positions = valid.ops.iter().map(|op| op.position).chain(positions);
    match check_incarnations(positions.map(|position| position.incarnation)) {
        Ok(()) => (sender, Ok(valid)),
        Err(problem) => (sender, Err(problem)),
    }
}

fn check_batch(batch: &v1::OperationBatch, incarnation_max: u64) -> Result<(), Problem> {
    let bad = |sentence: String| Err(Problem::new(Code::BadRequest, sentence));
    if batch.operations.len() > BATCH_OPS_MAX {
        return Err(too_many(batch.operations.len()));
    }
    if batch.withdrawn.len() > BATCH_WITHDRAWN_MAX {
        let ranges = batch.withdrawn.len();
        return bad(format!(
            "a message withdraws at most {BATCH_WITHDRAWN_MAX} ranges, this one {ranges}"
        ));
    }
    let is_range = |range: &v1::SequenceRange| {
        (1..=range.last).contains(&range.first) && range.last <= COUNTER_MAX && range.incarnation <= incarnation_max
    };
    match batch.withdrawn.iter().find(|range| !is_range(range)) {
        Some(range) => bad(format!(
            "{}:{}-{} withdraws no range of sequences",
            range.incarnation, range.first, range.last
        )),
        None => check_incarnations(batch.withdrawn.iter().map(|range| range.incarnation)),
    }
}

/// Each is a transaction.
fn check_incarnations(all: impl Iterator<Item = u64>) -> Result<(), Problem> {
    let incarnations = all.collect::<HashSet<u64>>().len();
    if incarnations <= BATCH_INCARNATIONS_MAX {
        return Ok(());
    }
    let sentence = format!(
        "a message is of at most {BATCH_INCARNATIONS_MAX} incarnations of its outbox, this one of {incarnations}"
    );
    Err(Problem::new(Code::BadRequest, sentence))
}

/// A transaction holds its streams for every row it writes, and a group has many.
fn too_many(operations: usize) -> Problem {
    let sentence = format!(
        "a message has at most {BATCH_OPS_MAX} operations, this one has {operations} or more; members of groups count"
    );
    Problem::new(Code::BadRequest, sentence)
}

/// What one operation is checked against.
struct Check<'a> {
    rules: &'a Rules,
    host_id: Uuid,
    role: HostRole,
    incarnation_max: u64,
}

impl Check<'_> {
    /// Adds the operation to `ops`, or each member where it is a group.
    fn operation(
        &self,
        index: u32,
        bytes: &Bytes,
        seen: &mut HashSet<Position>,
        ops: &mut Vec<ValidOp>,
    ) -> Result<(), Box<Refused>> {
        let none = || Box::new(self.refused(index, &v1::Operation::default(), None, bad(NOT_CANONICAL)));
        let glance = Glance::at(bytes).ok_or_else(none)?;
        let members = glance.members;
        // Of a group with too many members no more is built than is kept of it.
        let is_crowded = glance.is_crowded();
        let op = if is_crowded {
            glance.operation(bytes)
        } else {
            v1::Operation::decode(bytes.clone()).ok()
        };
        let op = op.ok_or_else(none)?;
        let refused = |position, problem| Box::new(self.refused(index, &op, position, problem));
        let position = self.position(&op).map_err(|problem| refused(None, problem))?;
        if !seen.insert(position) {
            return Err(refused(
                None,
                bad("another operation of the message has the same version"),
            ));
        }
        // Another encoding of the same operation would have another hash when it is signed or forwarded.
        let checked = if is_crowded {
            check_members(members)
        } else if !is_canonical(&op, bytes) {
            Err(bad(NOT_CANONICAL))
        } else if op.kind() == OperationKind::Group {
            self.group(index, &op, position, ops)
        } else {
            self.content(index, &op, position, false).map(|op| ops.push(op))
        };
        checked.map_err(|problem| refused(Some(position), problem))
    }

    /// What is kept of a refused operation: no more than a valid one may have, so that refusals fill no disk.
    fn refused(&self, index: u32, op: &v1::Operation, position: Option<Position>, problem: Problem) -> Refused {
        let data_type = Path::parse(&op.path).map(|path| path.parts().data_type).ok();
        let payload_bytes_max = data_type.map_or(PAYLOAD_BYTES_MAX, |data_type| {
            self.rules.policies.of(data_type).payload_bytes_max
        });
        Refused {
            index,
            operation_id: read_id(&op.operation_id).unwrap_or_default(),
            position,
            follows: position.map(|position| follows(op, position)).unwrap_or_default(),
            path: op.path[..op.path.floor_char_boundary(PATH_BYTES_MAX)].to_owned(),
            data_type: data_type.map_or(-1, i32::from),
            payload: match &op.payload {
                Some(Payload::Full(payload)) => payload[..payload.len().min(payload_bytes_max)].to_vec(),
                Some(Payload::Group(group)) => readable(group).into_bytes(),
                _ => Vec::new(),
            },
            problem: problem.shortened(),
        }
    }

    /// Where the operation stands. What has no place in the host's order cannot be settled there.
    fn position(&self, op: &v1::Operation) -> Result<Position, Problem> {
        let version = op.version.as_ref().ok_or_else(|| bad("the version is missing"))?;
        let position = Position::from(version);
        if !(1..=COUNTER_MAX).contains(&position.sequence) {
            return Err(bad("the sequence is not one: it counts from 1"));
        }
        if position.incarnation > self.incarnation_max.min(COUNTER_MAX) {
            return Err(bad("the incarnation is not one of the sender's outbox yet"));
        }
        Ok(position)
    }

    fn content(&self, index: u32, op: &v1::Operation, position: Position, in_group: bool) -> Result<ValidOp, Problem> {
        let operation_id = read_id(&op.operation_id).ok_or_else(|| bad("the operation id has 16 bytes"))?;
        let deleted = match op.kind() {
            OperationKind::Put => false,
            OperationKind::Delete => true,
            OperationKind::Group => return Err(bad("a group's members are no groups")),
            OperationKind::Unspecified => return Err(bad("the kind is PUT or DELETE")),
        };
        check_counters(op, position)?;
        let path = Path::parse(&op.path)?;
        let parts = path.parts();
        check_tenure(op, parts.scope)?;
        let policy = self.rules.policies.of(parts.data_type);
        self.check_policy_version(op.policy_version, policy)?;
        self.check_owner(op.policy_version, parts.scope, policy)?;
        let map = match parts.scope {
            Scope::Map(map) => map,
            _ if op.map.is_empty() => "",
            _ => check_map(&op.map).map(|()| op.map.as_str())?,
        };
        let payload = self.payload(op.payload.as_ref(), deleted, policy)?;
        presence::check(&parts, map, payload.as_ref().map(|(_, facts)| facts), in_group)?;
        let step = self.rules.step(&parts, payload.as_ref().map(|(_, facts)| facts));
        let payload = payload.map(|(text, _)| text);
        Ok(ValidOp {
            index,
            operation_id,
            tenure: tenure_of(op),
            position,
            data_type: parts.data_type,
            keep: policy.keep,
            history: self.rules.of(parts.data_type).history,
            deleted,
            account_id: op.account_id,
            map: map.to_owned(),
            hub_edit_seen: op.hub_edit_seen,
            conflict_rule: self.rules.of(parts.data_type).conflict,
            predecessor: op.predecessor.map(Position::from),
            presence: op.presence.map(Position::from),
            made_at_ms: op.made_at_ms,
            payload: payload.map(str::to_owned),
            in_group,
            embedded: false,
            step,
            path,
        })
    }

    /// The current policies and the ones before them; the built-in ones as long as they would give the same path.
    fn check_policy_version(&self, version: u32, policy: &Policy) -> Result<(), Problem> {
        let current = self.rules.policies.version;
        let is_known = match version {
            BUILTIN_VERSION => self.rules.agrees_with_builtin(policy.data_type),
            _ => version == current || version.checked_add(1) == Some(current),
        };
        if is_known {
            return Ok(());
        }
        let name = policy.data_type.as_str_name();
        let sentence =
            format!("made by version {version} of the rules for {name}; the hub's are {current}: connect anew");
        Err(Problem::new(Code::Repolicy, sentence))
    }

    fn check_owner(&self, policy_version: u32, scope: Scope<'_>, policy: &Policy) -> Result<(), Problem> {
        let owner = match scope {
            Scope::Map(_) => Owner::Map,
            Scope::Char(_) => Owner::Char,
            Scope::Account(_) => Owner::Account,
            Scope::Host(_) => Owner::Host,
        };
        let name = policy.data_type.as_str_name();
        if owner != policy.owner {
            let code = if policy_version == self.rules.policies.version {
                Code::BadPath
            } else {
                Code::Repolicy
            };
            let expected = policy.owner.as_str_name().to_lowercase();
            return Err(Problem::new(
                code,
                format!("a {name} is owned by a {expected}, the path says otherwise"),
            ));
        }
        match scope {
            // The path is well-formed; the right to write it is what lacks.
            Scope::Host(host_id) if host_id != self.host_id && !self.reports_of_others(policy.data_type) => {
                let sentence = format!(
                    "only host {host_id} writes its own {name}; this is host {}",
                    self.host_id
                );
                Err(Problem::new(Code::NotLeaseHolder, sentence))
            }
            _ => Ok(()),
        }
    }

    /// The operator's own machines see more of a volunteer's than it says itself.
    fn reports_of_others(&self, data_type: SyncDataType) -> bool {
        self.role == HostRole::Hub && data_type == SyncDataType::HostMetrics
    }

    fn payload<'p>(
        &self,
        given: Option<&'p Payload>,
        deleted: bool,
        policy: &Policy,
    ) -> Result<Option<(&'p str, Facts<'p>)>, Problem> {
        let bytes = match given {
            None if deleted => return Ok(None),
            None => return Err(bad("a PUT carries a payload")),
            Some(_) if deleted => return Err(bad("a DELETE carries no payload")),
            Some(Payload::Full(bytes)) => bytes,
            Some(Payload::Delta(_)) => return Err(unsupported("deltas")),
            Some(Payload::Blob(_)) => return Err(unsupported("blobs")),
            Some(Payload::Group(_)) => return Err(bad("a PUT carries one payload, and a GROUP its members")),
        };
        let (length, bytes_max) = (bytes.len(), policy.payload_bytes_max);
        if length > bytes_max {
            let name = policy.data_type.as_str_name();
            let sentence = format!("the payload has {length} bytes; a {name} has at most {bytes_max}: split it");
            return Err(Problem::new(Code::TooLarge, sentence));
        }
        let (text, facts) = json::check_bytes(bytes)?;
        self.rules.of(policy.data_type).check(text)?;
        Ok(Some((text, facts)))
    }
}

/// Checks what the operator writes to a path as what hosts write is checked: that the type belongs there, and, unless it is
/// a deletion, the payload's bounds, schema and rules. Where players are is not edited (`BAD_OPERATION`).
pub fn check_edit(rules: &Rules, path: &Path, payload: Option<&str>) -> Result<(), Problem> {
    let parts = path.parts();
    if parts.data_type == SyncDataType::PlayerPresence {
        let sentence =
            "where a player is moves by its host's word: see `p2p-sync-proxy players` for what an operator can do";
        return Err(Problem::new(Code::BadOperation, sentence));
    }
    let policy = rules.policies.of(parts.data_type);
    let host_id = match parts.scope {
        Scope::Host(host_id) => host_id,
        _ => Uuid::nil(),
    };
    let check = Check {
        rules,
        host_id,
        role: HostRole::Host,
        incarnation_max: 0,
    };
    check.check_owner(rules.policies.version, parts.scope, policy)?;
    let payload = payload.map(|payload| Payload::Full(payload.to_owned().into()));
    check.payload(payload.as_ref(), payload.is_none(), policy)?;
    Ok(())
}

/// What an operation, or a group's members, say that they follow; what cannot be is left out.
fn follows(op: &v1::Operation, position: Position) -> Vec<Position> {
    let members = match &op.payload {
        Some(Payload::Group(group)) => &group.members[..],
        _ => &[],
    };
    let members = members
        .iter()
        .filter(|bytes| Glance::at(bytes).is_some_and(|glance| glance.members == 0))
        .filter_map(|bytes| v1::Operation::decode(bytes.clone()).ok())
        .flat_map(|member| [member.predecessor, member.presence]);
    let mut follows: Vec<Position> = [op.predecessor, op.presence]
        .into_iter()
        .chain(members)
        .flatten()
        .map(Position::from)
        .filter(|before| *before < position && (1..=COUNTER_MAX).contains(&before.sequence))
        .collect();
    follows.sort_unstable();
    follows.dedup();
    follows
}

fn is_canonical(op: &v1::Operation, bytes: &Bytes) -> bool {
    op.encoded_len() == bytes.len() && op.encode_to_vec() == bytes[..]
}

fn check_counters(op: &v1::Operation, position: Position) -> Result<(), Problem> {
    for (name, counter) in [
        ("tenure", tenure_of(op)),
        ("edit", op.hub_edit_seen),
        ("clock", op.made_at_ms),
    ] {
        if counter > COUNTER_MAX {
            return Err(bad(&format!("the {name}'s number is larger than the hub counts")));
        }
    }
    let follows = op.predecessor.iter().chain(&op.presence);
    for before in follows.map(|reference| Position::from(*reference)) {
        if before >= position || !(1..=COUNTER_MAX).contains(&before.sequence) {
            return Err(bad("what it follows does not come before the operation"));
        }
    }
    Ok(())
}

/// A lease is of a map; of which tenure it may be is known where it is stored.
fn check_tenure(op: &v1::Operation, scope: Scope<'_>) -> Result<(), Problem> {
    match scope {
        Scope::Map(_) => Ok(()),
        _ if tenure_of(op) == 0 => Ok(()),
        _ => {
            let sentence = "only what belongs to a map is written under a tenure: send it with tenure 0";
            Err(Problem::new(Code::NotLeaseHolder, sentence))
        }
    }
}

fn tenure_of(op: &v1::Operation) -> u64 {
    op.version.as_ref().map_or(0, |version| version.tenure)
}

fn bad(what: &str) -> Problem {
    Problem::new(Code::BadOperation, what.to_owned())
}

fn unsupported(what: &str) -> Problem {
    Problem::new(
        Code::Unsupported,
        format!("{what} are not taken by this hub: send each state whole, by itself"),
    )
}

#[cfg(test)]
mod tests;
