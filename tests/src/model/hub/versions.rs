//! What the paths hold: the newest version of each, the operator's edits, and the log.

use std::collections::BTreeMap;

use p2p_sync_proto::{Code, Path, Position, Scope, policy::Keep};
use p2p_sync_proxy::operation::{ConflictRule, History, ValidOp};
use uuid::Uuid;

use super::{Expected, Fate, Hub, Logged, Origin, Told, Written, is_presence, number_of};

impl Hub {
    pub(super) fn edit_of(&self, op: &ValidOp) -> u64 {
        self.states.get(op.path.as_str()).map_or(0, |state| state.edit)
    }

    /// Refuses what did not know the operator's last edit of its path, where its type's rule says so.
    pub(super) fn settle_conflicts<'a>(
        &mut self,
        writable: Vec<(&'a [ValidOp], Vec<u64>)>,
        host: Uuid,
        expected: &mut Expected,
    ) -> Vec<(&'a [ValidOp], Vec<u64>)> {
        let mut left = Vec::new();
        for (unit, tenures) in writable {
            let first = &unit[0];
            if unit.iter().any(|op| self.edit_of(op) != op.hub_edit_seen) {
                let edits = unit.iter().map(|op| self.edit_of(op)).collect();
                expected.edits.insert(first.index, edits);
            }
            let conflicting = unit.iter().filter(|op| {
                // Comings and goings have moved the player by now.
                let is_there = self.states.contains_key(op.path.as_str());
                is_there && self.edit_of(op) != op.hub_edit_seen && !is_presence(op)
            });
            let conflicting: Vec<&ValidOp> = conflicting.collect();
            if let Some(one) = conflicting.first() {
                let key = (host, one.path.as_str().to_owned(), self.edit_of(one));
                *self.conflicts.entry(key).or_default() += 1;
            }
            if conflicting.iter().any(|op| op.conflict_rule >= ConflictRule::Hub) {
                self.reject((host, first.position), Code::Conflict);
                expected.outcomes.insert(first.index, Told::Rejected(Code::Conflict));
            } else {
                left.push((unit, tenures));
            }
        }
        left
    }

    /// Writes what is newer than its path; of several in one message the newest.
    pub(super) fn write(&mut self, writable: &[(&[ValidOp], Vec<u64>)], host: Uuid, expected: &mut Expected) {
        let mut newest: BTreeMap<&str, (u64, Position)> = BTreeMap::new();
        for (unit, tenures) in writable {
            for (op, tenure) in unit.iter().zip(tenures) {
                let version = (*tenure, op.position);
                if self.is_newer(op, *tenure, host) {
                    let best = newest.entry(op.path.as_str()).or_insert(version);
                    *best = version.max(*best);
                }
            }
        }
        for (unit, tenures) in writable {
            let mut told = Told::Superseded;
            for (op, tenure) in unit.iter().zip(tenures) {
                let is_newest = newest.get(op.path.as_str()) == Some(&(*tenure, op.position));
                let counts = is_newest || op.keep == Keep::Every;
                let written = Written {
                    path: op.path.as_str().to_owned(),
                    tenure: *tenure,
                    host,
                    at: op.position,
                    number: op.payload.as_deref().map(number_of),
                    edit: self.edit_of(op),
                };
                if counts {
                    told = Told::Applied;
                    expected.changes.push(written.clone());
                }
                if op.keep == Keep::Every || op.in_group || op.history == History::All {
                    self.log.push(Logged {
                        written: written.clone(),
                        superseded: !counts,
                        merged: false,
                    });
                }
                if is_newest {
                    self.states.insert(written.path.clone(), written);
                }
            }
            expected.outcomes.insert(unit[0].index, told);
        }
    }

    /// A higher tenure wins; within one, a host's own order, and between hosts who comes last.
    fn is_newer(&self, op: &ValidOp, tenure: u64, host: Uuid) -> bool {
        self.states.get(op.path.as_str()).is_none_or(|state| {
            tenure > state.tenure || tenure == state.tenure && (state.host != host || op.position > state.at)
        })
    }

    /// Writes an edit of the operator's, numbered by the hub: never older than its path, nor than what the holder writes.
    /// `made_under`: the tenure of what was made on a map, 0 for the rest.
    pub(in crate::model) fn edit(
        &mut self,
        by: Origin,
        path: &Path,
        made_under: u64,
        payload: Option<&str>,
        edit: u64,
    ) -> Written {
        let now = match path.parts().scope {
            Scope::Map(map) => self.rights.maps.get(map).map(|map| map.tenure),
            Scope::Char(character) => self.rights.seats.get(&character).map(|seat| seat.tenure),
            Scope::Account(account) => self.rights.account_tenure(account),
            Scope::Host(_) => None,
        };
        let there = self.states.get(path.as_str()).map_or(0, |state| state.tenure);
        let written = Written {
            path: path.as_str().to_owned(),
            tenure: made_under.max(there).max(now.unwrap_or(0)),
            host: by.0,
            at: by.1,
            number: payload.map(number_of),
            edit,
        };
        self.states.insert(written.path.clone(), written.clone());
        written
    }

    /// The operator makes what lies in limbo an edit of its own; the hub numbers the members in the order of their paths.
    pub(in crate::model) fn merge(&mut self, origin: Origin, edits: &BTreeMap<String, u64>) {
        let Some(unit) = self.limbo.remove(&origin) else {
            return;
        };
        self.fates.insert(origin, Fate::Done);
        for op in &unit {
            let edit = edits.get(op.path.as_str()).copied().unwrap_or(0);
            let written = self.edit(origin, &op.path, op.tenure, op.payload.as_deref(), edit);
            self.log.push(Logged {
                written,
                superseded: false,
                merged: true,
            });
        }
    }

    pub(in crate::model) fn discard(&mut self, origin: Origin) {
        if self.limbo.remove(&origin).is_some() {
            self.reject(origin, Code::StaleTenure);
        }
    }
}
