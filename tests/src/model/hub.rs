//! The hub as it is promised, and nothing of how it is made: one message after the other, one operation after the other.
//!
//! Here is decided what is settled, what waits and who may write; `versions` has what is written then.

mod versions;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use p2p_sync_proto::{Code, Position, Scope, v1::SyncDataType};
use p2p_sync_proxy::operation::{Valid, ValidOp};
use uuid::Uuid;

use super::rights::{Entry, Mover, Right, Rights};

/// An operation of a host's outbox.
pub(super) type Origin = (Uuid, Position);

/// What a host is told of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Told {
    Applied,
    /// It was settled before, and not refused.
    AppliedBefore,
    Superseded,
    NotYet,
    Limbo,
    Rejected(Code),
}

/// What a message has to lead to.
#[derive(Debug, Default)]
pub(super) struct Expected {
    pub(super) outcomes: BTreeMap<u32, Told>,
    /// The last edits by the operator, where a writer had seen others.
    pub(super) edits: HashMap<u32, Vec<u64>>,
    /// Refused, or put into limbo, by this message.
    pub(super) settled_now: BTreeSet<u32>,
    /// What readers are told of, in this order.
    pub(super) changes: Vec<Written>,
}

/// A write at its version.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Written {
    pub(super) path: String,
    pub(super) tenure: u64,
    pub(super) host: Uuid,
    pub(super) at: Position,
    /// Which payload; none for a deletion.
    pub(super) number: Option<i64>,
    /// The operator's last edit then.
    pub(super) edit: u64,
}

/// A row of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Logged {
    pub(super) written: Written,
    pub(super) superseded: bool,
    /// The operator wrote it, out of limbo.
    pub(super) merged: bool,
}

/// How an operation was decided for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Done,
    Limbo,
    Rejected(Code),
}

/// An operation, or a group of them.
pub(super) type Unit = Vec<ValidOp>;

/// All that the hub has to hold.
#[derive(Debug, Default)]
pub(super) struct Hub {
    pub(super) rights: Rights,
    pub(super) states: BTreeMap<String, Written>,
    /// In the order in which it was written.
    pub(super) log: Vec<Logged>,
    pub(super) limbo: BTreeMap<Origin, Unit>,
    pub(super) rejected: BTreeMap<Origin, Code>,
    /// How many operations did not know an edit: by host, path and edit.
    pub(super) conflicts: BTreeMap<(Uuid, String, u64), i64>,
    fates: BTreeMap<Origin, Fate>,
}

/// An operation, or a group, as it came.
struct Came<'a> {
    at: Position,
    index: u32,
    follows: Vec<Position>,
    /// Why validation refused it, if it did.
    refused: Option<Code>,
    /// Empty where it was refused.
    ops: &'a [ValidOp],
}

impl<'a> Came<'a> {
    /// What a message brings of one incarnation, in the order in which it was made.
    fn of(message: &'a Valid, incarnation: u64) -> Vec<Self> {
        let units = message.ops.chunk_by(|one, other| one.position == other.position);
        let units = units.map(|ops| Self {
            at: ops[0].position,
            index: ops[0].index,
            follows: ops.iter().flat_map(ValidOp::follows).collect(),
            refused: None,
            ops,
        });
        let refused = message.refused.iter().filter_map(|one| {
            Some(Self {
                at: one.position?,
                index: one.index,
                follows: one.follows.clone(),
                refused: Some(one.problem.code),
                ops: &[],
            })
        });
        let mut came: Vec<Self> = units
            .chain(refused)
            .filter(|one| one.at.incarnation == incarnation)
            .collect();
        came.sort_by_key(|one| one.at);
        came
    }
}

impl Hub {
    /// Takes a message, each incarnation's operations by themselves.
    pub(super) fn apply(&mut self, message: &Valid) -> Expected {
        let mut expected = Expected::default();
        let host = message.host_id;
        let ops = message.ops.iter().map(|op| op.position.incarnation);
        let refused = message.refused.iter().filter_map(|one| Some(one.position?.incarnation));
        let withdrawn = message.withdrawn.iter().map(|range| range.incarnation);
        for incarnation in ops.chain(refused).chain(withdrawn).collect::<BTreeSet<u64>>() {
            let withdrawn = message
                .withdrawn
                .iter()
                .filter(|range| range.incarnation == incarnation);
            for sequence in withdrawn.flat_map(|range| range.first..=range.last) {
                // What will never come.
                let at = Position { incarnation, sequence };
                self.fates.entry((host, at)).or_insert(Fate::Done);
            }
            let (fresh, refused) = self.settle(host, &Came::of(message, incarnation), &mut expected);
            let writable = self.judge(&fresh, &refused, host, &mut expected);
            let writable = self.settle_conflicts(writable, host, &mut expected);
            self.write(&writable, host, &mut expected);
        }
        expected
    }

    fn reject(&mut self, origin: Origin, code: Code) {
        self.fates.insert(origin, Fate::Rejected(code));
        self.rejected.insert(origin, code);
    }

    /// Tells of what was settled before, holds back what has to wait, settles the rest and moves players by it. Gives what
    /// is new, and the comings that were refused.
    fn settle<'a>(
        &mut self,
        host: Uuid,
        came: &[Came<'a>],
        expected: &mut Expected,
    ) -> (Vec<&'a [ValidOp]>, BTreeMap<u64, Right>) {
        // Who comes is looked for when the message comes, and again when its turn does: what frees a player meanwhile, the
        // next try finds.
        let early = came.iter().filter(|one| self.is_too_early(one, host)).map(|one| one.at);
        let early: BTreeSet<Position> = early.collect();
        let (mut fresh, mut refused) = (Vec::new(), BTreeMap::new());
        for one in came {
            if let Some(fate) = self.fates.get(&(host, one.at)).copied() {
                expected.outcomes.insert(one.index, fate.told());
                if fate == Fate::Rejected(Code::Conflict) {
                    let edits = one.ops.iter().map(|op| self.edit_of(op)).collect();
                    expected.edits.insert(one.index, edits);
                }
                continue;
            }
            let waits = one
                .follows
                .iter()
                .any(|before| !self.fates.contains_key(&(host, *before)));
            if waits || early.contains(&one.at) {
                expected.outcomes.insert(one.index, Told::NotYet);
                continue;
            }
            if let Some(code) = one.refused {
                self.reject((host, one.at), code);
                expected.settled_now.insert(one.index);
                expected.outcomes.insert(one.index, Told::Rejected(code));
                continue;
            }
            match self.move_player(&one.ops[0], host) {
                Entry::TooEarly => {
                    expected.outcomes.insert(one.index, Told::NotYet);
                    continue;
                }
                Entry::Entered => {}
                Entry::Limbo => {
                    refused.insert(one.at.sequence, Right::Limbo);
                }
                Entry::Refused(code) => {
                    refused.insert(one.at.sequence, Right::Refused(code));
                }
            }
            self.fates.insert((host, one.at), Fate::Done);
            fresh.push(one.ops);
        }
        (fresh, refused)
    }

    fn is_too_early(&self, came: &Came<'_>, host: Uuid) -> bool {
        came.ops.first().is_some_and(|op| match op.path.parts().scope {
            Scope::Char(character) if is_entry(op) => {
                let mover = Mover {
                    host,
                    at: op.position,
                    character,
                };
                self.rights.is_too_early(mover, op.account_id, &op.map)
            }
            _ => false,
        })
    }

    fn move_player(&mut self, op: &ValidOp, host: Uuid) -> Entry {
        let Scope::Char(character) = op.path.parts().scope else {
            return Entry::Entered;
        };
        let mover = Mover {
            host,
            at: op.position,
            character,
        };
        if is_entry(op) {
            return self.rights.enter(mover, op.account_id, &op.map);
        }
        if is_presence(op) {
            self.rights.leave(mover);
        }
        Entry::Entered
    }

    /// Sets apart what its host may not write, a group whole: refused if any of it is, else into limbo. Gives the rest, with
    /// the tenure of each operation.
    fn judge<'a>(
        &mut self,
        fresh: &[&'a [ValidOp]],
        refused: &BTreeMap<u64, Right>,
        host: Uuid,
        expected: &mut Expected,
    ) -> Vec<(&'a [ValidOp], Vec<u64>)> {
        let mut writable = Vec::new();
        for unit in fresh {
            let first = &unit[0];
            let origin = (host, first.position);
            let entry = refused.get(&first.position.sequence).copied();
            // Of two reasons to refuse a group, that of a map is told.
            let (mut codes, mut limbo, mut tenures) = (BTreeSet::new(), false, Vec::new());
            for right in entry.into_iter().chain(unit.iter().map(|op| self.right(op, host))) {
                match right {
                    Right::Write(tenure) => tenures.push(tenure),
                    Right::Limbo => limbo = true,
                    Right::Refused(code) => {
                        codes.insert((code != Code::NotLeaseHolder, code as i32));
                    }
                }
            }
            let told = if let Some((_, code)) = codes.first() {
                let code = Code::try_from(*code).expect("it was a code");
                self.reject(origin, code);
                Told::Rejected(code)
            } else if limbo {
                self.fates.insert(origin, Fate::Limbo);
                self.limbo.insert(origin, unit.to_vec());
                Told::Limbo
            } else {
                writable.push((*unit, tenures));
                continue;
            };
            expected.settled_now.insert(first.index);
            expected.outcomes.insert(first.index, told);
        }
        writable
    }

    fn right(&self, op: &ValidOp, host: Uuid) -> Right {
        match op.path.parts().scope {
            Scope::Map(map) => self.rights.on_map(map, host, op.tenure),
            Scope::Char(character) => self.rights.of_character(character, host, op.position),
            Scope::Account(account) => self.rights.of_account(account, host, op.position),
            // Another host's are refused before they come here.
            Scope::Host(_) => Right::Write(0),
        }
    }
}

impl Fate {
    fn told(self) -> Told {
        match self {
            Self::Done => Told::AppliedBefore,
            Self::Limbo => Told::Limbo,
            Self::Rejected(code) => Told::Rejected(code),
        }
    }
}

/// A player comes or goes by it.
pub(super) fn is_presence(op: &ValidOp) -> bool {
    op.data_type == SyncDataType::PlayerPresence
}

fn is_entry(op: &ValidOp) -> bool {
    is_presence(op) && op.payload.as_ref().is_some_and(|payload| payload.contains("enter"))
}

/// Payloads are told apart by their number `n`.
pub(super) fn number_of(payload: &str) -> i64 {
    let json: serde_json::Value = serde_json::from_str(payload).expect("the schedule writes JSON");
    json["n"].as_i64().expect("each has a number")
}
