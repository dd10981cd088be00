//! A host as its agent is: an outbox, and what it stamps on an operation when that is made, by what it knows then.

use std::collections::{BTreeMap, BTreeSet};

use p2p_sync_proto::{
    Code, Path, Position, Problem, Scope, envelope::Lane, ids::new_id, policy::Keep, v1::SequenceRange,
};
use p2p_sync_proxy::operation::{Committed, ConflictRule, History, Outcome, Refused, Valid, ValidOp};
use uuid::Uuid;

use super::hub::{Unit, is_presence};

/// What a map server tells, before the agent puts its stamps on it.
#[derive(Clone, Debug)]
pub(super) struct Draft {
    pub(super) path: Path,
    pub(super) keep: Keep,
    pub(super) history: History,
    pub(super) conflict_rule: ConflictRule,
    pub(super) account_id: u32,
    pub(super) map: String,
    pub(super) payload: Option<String>,
}

/// A unit in the outbox.
#[derive(Debug)]
struct Waiting {
    unit: Unit,
    /// It was sent, or a start before has it on disk.
    tried: bool,
    /// Validation refuses it.
    bad: bool,
}

/// A message on its way, and the start of the host that sent it.
#[derive(Clone, Debug)]
pub(super) struct Message {
    pub(super) host: usize,
    pub(super) incarnation: u64,
    pub(super) valid: Valid,
}

/// One writer.
#[derive(Debug)]
pub(super) struct Host {
    pub(super) id: Uuid,
    place: usize,
    next: Position,
    outbox: BTreeMap<Position, Waiting>,
    /// The last unsettled operation of each path kept as `every`, and of each path that a group wrote.
    tails: BTreeMap<String, Position>,
    /// The last unsettled coming or going of each player, by whose it is.
    comings: BTreeMap<String, Position>,
    /// The newest operation of each path that a newer one may replace.
    newest: BTreeMap<String, Position>,
    withdrawn: BTreeSet<Position>,
    /// The tenures that it has heard of; those that have passed stay.
    pub(super) tenures: BTreeMap<String, u64>,
    /// The last edit by the operator that it has seen, by path.
    seen: BTreeMap<String, u64>,
    /// The characters that the game has on its maps.
    pub(super) players: BTreeSet<usize>,
    renewals: u64,
}

impl Host {
    pub(super) fn new(id: Uuid, place: usize) -> Self {
        Self {
            id,
            place,
            next: Position {
                incarnation: 1,
                sequence: 1,
            },
            outbox: BTreeMap::new(),
            tails: BTreeMap::new(),
            comings: BTreeMap::new(),
            newest: BTreeMap::new(),
            withdrawn: BTreeSet::new(),
            tenures: BTreeMap::new(),
            seen: BTreeMap::new(),
            players: BTreeSet::new(),
            renewals: 0,
        }
    }

    pub(super) fn is_drained(&self) -> bool {
        self.outbox.is_empty() && self.withdrawn.is_empty()
    }

    /// Takes an operation, or a group of several: gives its position and id. `conflates`: an older one of the path that was not
    /// sent gives way. `bad`: it will not pass validation.
    pub(super) fn make(&mut self, drafts: Vec<Draft>, conflates: bool, bad: bool) -> (Position, Uuid) {
        let at = self.next;
        self.next.sequence += 1;
        let in_group = drafts.len() > 1;
        let operation_id = new_id();
        let stamped = drafts
            .into_iter()
            .map(|draft| self.stamp(draft, at, operation_id, in_group));
        let unit: Unit = stamped.collect();
        self.conflate(&unit, conflates && !bad);
        self.outbox.insert(
            at,
            Waiting {
                unit,
                tried: false,
                bad,
            },
        );
        (at, operation_id)
    }

    fn stamp(&mut self, draft: Draft, at: Position, operation_id: Uuid, in_group: bool) -> ValidOp {
        let path = draft.path.as_str().to_owned();
        let tenure = match draft.path.parts().scope {
            Scope::Map(map) => self.tenures.get(map).copied().unwrap_or(0),
            _ => 0,
        };
        let mut op = ValidOp {
            index: 0,
            operation_id,
            tenure,
            position: at,
            data_type: draft.path.parts().data_type,
            path: draft.path,
            keep: draft.keep,
            history: draft.history,
            deleted: draft.payload.is_none(),
            account_id: draft.account_id,
            map: draft.map,
            hub_edit_seen: self.seen.get(&path).copied().unwrap_or(0),
            conflict_rule: draft.conflict_rule,
            predecessor: None,
            presence: None,
            made_at_ms: 1_700_000_000_000,
            payload: draft.payload,
            in_group,
            embedded: false,
            step: None,
        };
        self.link(&mut op);
        op
    }

    /// Puts an operation into the order of its path and its player, and names what is before it there.
    fn link(&mut self, op: &mut ValidOp) {
        let path = op.path.as_str();
        if op.in_group || op.keep == Keep::Every {
            op.predecessor = self.tails.insert(path.to_owned(), op.position);
        }
        let Some(owner) = owner(path) else {
            return;
        };
        if !is_presence(op) {
            op.presence = self.comings.get(owner).copied();
            return;
        }
        let of_character = self.comings.insert(owner.to_owned(), op.position);
        if op.account_id != 0 {
            let of_account = self.comings.insert(format!("@account/{}", op.account_id), op.position);
            op.presence = of_account.filter(|before| Some(*before) != of_character);
        }
    }

    /// Has what was made on a map say that it was made under another tenure than it was.
    pub(super) fn forge(&mut self, at: Position, tenure: u64) {
        let unit = self
            .outbox
            .get_mut(&at)
            .into_iter()
            .flat_map(|waiting| &mut waiting.unit);
        for op in unit.filter(|op| matches!(op.path.parts().scope, Scope::Map(_))) {
            op.tenure = tenure;
        }
    }

    fn conflate(&mut self, unit: &Unit, conflates: bool) {
        let first = &unit[0];
        let path = first.path.as_str();
        if first.in_group || first.keep == Keep::Every {
            for op in unit {
                self.newest.remove(op.path.as_str());
            }
            return;
        }
        let older = self.newest.insert(path.to_owned(), first.position);
        let Some(older) = older.filter(|older| conflates && self.outbox.get(older).is_some_and(|one| !one.tried))
        else {
            return;
        };
        self.outbox.remove(&older);
        self.withdrawn.insert(older);
    }

    /// The positions that wait, oldest first.
    pub(super) fn waiting(&self) -> Vec<Position> {
        self.outbox.keys().copied().collect()
    }

    /// The operation, and all unsettled ones that it follows: so a critical one is sent.
    pub(super) fn chain(&self, at: Position) -> BTreeSet<Position> {
        let (mut chain, mut next) = (BTreeSet::new(), vec![at]);
        while let Some(at) = next.pop() {
            if let Some(waiting) = self.outbox.get(&at)
                && chain.insert(at)
            {
                next.extend(waiting.unit.iter().flat_map(ValidOp::follows));
            }
        }
        chain
    }

    /// A message of what waits at some positions. What is withdrawn goes with bulk alone.
    pub(super) fn message(&mut self, lane: Lane, positions: &BTreeSet<Position>) -> Message {
        let mut valid = Valid {
            host_id: self.id,
            lane,
            ops: vec![],
            refused: vec![],
            withdrawn: vec![],
        };
        for (index, at) in (0..).zip(positions) {
            let Some(waiting) = self.outbox.get_mut(at) else {
                continue;
            };
            waiting.tried = true;
            if waiting.bad {
                valid.refused.push(refusal(index, &waiting.unit[0]));
            } else {
                valid
                    .ops
                    .extend(waiting.unit.iter().map(|op| ValidOp { index, ..op.clone() }));
            }
        }
        if lane == Lane::Bulk {
            let ranges = self.withdrawn.iter().map(|at| SequenceRange {
                incarnation: at.incarnation,
                first: at.sequence,
                last: at.sequence,
            });
            valid.withdrawn.extend(ranges);
        }
        Message {
            host: self.place,
            incarnation: self.next.incarnation,
            valid,
        }
    }

    /// Takes the hub's answer; one to a start before is lost.
    pub(super) fn answered(&mut self, message: &Message, committed: &Committed) {
        if message.incarnation != self.next.incarnation {
            return;
        }
        for range in &message.valid.withdrawn {
            self.withdrawn.remove(&Position {
                incarnation: range.incarnation,
                sequence: range.first,
            });
        }
        let positions: BTreeMap<u32, Position> = message
            .valid
            .ops
            .iter()
            .map(|op| (op.index, op.position))
            .chain(
                message
                    .valid
                    .refused
                    .iter()
                    .filter_map(|one| Some((one.index, one.position?))),
            )
            .collect();
        for (index, outcome) in &committed.outcomes {
            if *outcome != Outcome::NotYet {
                self.settled(positions[index]);
            }
            if let Some(edits) = committed.edits.get(index) {
                let members = message.valid.ops.iter().filter(|op| op.index == *index);
                for (op, edit) in members.zip(edits) {
                    self.saw(op.path.as_str(), *edit);
                }
            }
        }
    }

    /// Notes an edit that it was told of, or read; 0: there is none.
    pub(super) fn saw(&mut self, path: &str, edit: u64) {
        let seen = self.seen.entry(path.to_owned()).or_default();
        *seen = if edit == 0 { 0 } else { edit.max(*seen) };
    }

    fn settled(&mut self, at: Position) {
        let Some(waiting) = self.outbox.remove(&at) else {
            return;
        };
        for op in &waiting.unit {
            let path = op.path.as_str();
            self.tails.retain(|other, tail| other != path || *tail != at);
            self.newest.retain(|other, newest| other != path || *newest != at);
        }
        self.comings.retain(|_, coming| *coming != at);
    }

    /// Starts anew over the same outbox. The last `lost` operations were not on disk, as far as none of them was sent; gives
    /// how many these are.
    pub(super) fn restart(&mut self, jump: u64, lost: usize) -> usize {
        let mut gone = 0;
        while gone < lost && self.outbox.last_key_value().is_some_and(|(_, last)| !last.tried) {
            self.outbox.pop_last();
            gone += 1;
        }
        self.next = Position {
            incarnation: self.next.incarnation + jump,
            sequence: 1,
        };
        self.tails.clear();
        self.comings.clear();
        self.newest.clear();
        let outbox = std::mem::take(&mut self.outbox);
        for (at, mut waiting) in outbox {
            for op in &waiting.unit {
                // What was stamped stays as it is.
                self.link(&mut op.clone());
            }
            waiting.tried = true;
            self.outbox.insert(at, waiting);
        }
        gone
    }

    /// The start and the number of its next renewal of leases.
    pub(super) fn next_renewal(&mut self) -> (u64, u64) {
        self.renewals += 1;
        (self.next.incarnation, self.renewals)
    }
}

/// Whose a player's path is; none where it is no player's.
fn owner(path: &str) -> Option<&str> {
    if !path.starts_with("@char/") && !path.starts_with("@account/") {
        return None;
    }
    let end = path.match_indices('/').nth(1).map_or(path.len(), |(at, _)| at);
    Some(&path[..end])
}

fn refusal(index: u32, op: &ValidOp) -> Refused {
    Refused {
        index,
        operation_id: op.operation_id,
        position: Some(op.position),
        follows: op.follows().collect(),
        path: op.path.as_str().to_owned(),
        data_type: op.data_type as i32,
        payload: op.payload.clone().unwrap_or_default().into_bytes(),
        problem: Problem::new(Code::BadOperation, "the schedule has it refused"),
    }
}
