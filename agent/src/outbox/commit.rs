//! One commit of a group of changes.

use std::collections::HashSet;

use p2p_sync_proto::{
    Code, Position, Problem,
    envelope::{seal_with, wrap_key},
};
use prost::{Message as _, bytes::Bytes};
use redb::{Database, Table, WriteTransaction};

use super::{
    CLIENTS, Change, DEAD_LETTERS, DeadRecord, EDITS, Key, LEASES_AT, META, OPERATIONS, Outbox, Record, Sizes,
    WITHDRAWN, edit_at, key, now_ms,
};

/// Sealed bytes of dead letters kept; beyond it the oldest give way.
const DEAD_LETTER_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// Applies changes in one transaction, on disk when this returns; gives what lies in the tables then.
pub(super) fn commit(outbox: &Outbox, database: &Database, changes: &[Change]) -> Result<Sizes, redb::Error> {
    let write = database.begin_write()?;
    let gone = removed(changes);
    let mut tables = Tables::open(outbox, &write)?;
    for change in changes {
        match change {
            Change::Insert(position, _) if gone.contains(position) => {}
            Change::Insert(position, record) => tables.insert(*position, record)?,
            Change::Remove(position) => tables.take_out(*position)?,
            Change::Withdraw(position) => {
                tables.take_out(*position)?;
                tables.withdrawn.insert(key(*position), position.sequence)?;
            }
            Change::Withdrawn(range) => {
                tables.withdrawn.insert((range.incarnation, range.first), range.last)?;
            }
            Change::WithdrawnTold(ranges) => {
                for range in ranges {
                    let told = (range.incarnation, range.first)..=(range.incarnation, range.last);
                    tables.withdrawn.retain_in(told, |_, last| last > range.last)?;
                }
            }
            Change::Bury(position, operation, problem) => tables.bury(*position, operation, problem)?,
            Change::Policies(policies) => {
                let wire = policies.to_wire().encode_to_vec();
                write.open_table(META)?.insert("policies", wire.as_slice())?;
            }
            Change::Leases(leases) => {
                let purpose = outbox.purpose(b'l', LEASES_AT);
                let sealed = seal_with(&outbox.key, &purpose, &leases.encode_to_vec());
                write.open_table(META)?.insert("leases", sealed.as_slice())?;
            }
            Change::Edit(slot, None) => {
                write.open_table(EDITS)?.remove(slot)?;
            }
            Change::Edit(slot, Some(record)) => {
                let sealed = seal_with(
                    &outbox.key,
                    &outbox.purpose(b'e', edit_at(*slot)),
                    &record.encode_to_vec(),
                );
                write.open_table(EDITS)?.insert(slot, sealed.as_slice())?;
            }
            Change::Client(id, number) => {
                write.open_table(CLIENTS)?.insert(id.as_u128(), (*number, now_ms()))?;
            }
            Change::Wrap(_, credential) => {
                let wrapped = wrap_key(&credential.wrapping_key(), &outbox.key);
                write.open_table(META)?.insert("data_key", wrapped.as_slice())?;
            }
            Change::ForgetClient(id) => {
                write.open_table(CLIENTS)?.remove(id.as_u128())?;
            }
        }
    }
    let sizes = tables.sizes;
    drop(tables);
    write.commit()?;
    Ok(sizes)
}

struct Tables<'t> {
    outbox: &'t Outbox,
    operations: Table<'t, Key, &'static [u8]>,
    withdrawn: Table<'t, Key, u64>,
    dead_letters: Table<'t, Key, &'static [u8]>,
    sizes: Sizes,
}

impl<'t> Tables<'t> {
    fn open(outbox: &'t Outbox, write: &'t WriteTransaction) -> Result<Self, redb::Error> {
        Ok(Self {
            outbox,
            operations: write.open_table(OPERATIONS)?,
            withdrawn: write.open_table(WITHDRAWN)?,
            dead_letters: write.open_table(DEAD_LETTERS)?,
            sizes: outbox.sizes,
        })
    }

    fn insert(&mut self, position: Position, record: &Record) -> Result<(), redb::Error> {
        let purpose = self.outbox.purpose(b'o', position);
        let sealed = seal_with(&self.outbox.key, &purpose, &record.encode_to_vec());
        self.sizes.bytes += sealed.len() as u64;
        self.sizes.operations += 1;
        if let Some(old) = self.operations.insert(key(position), sealed.as_slice())? {
            self.sizes.bytes -= old.value().len() as u64;
            self.sizes.operations -= 1;
        }
        Ok(())
    }

    fn take_out(&mut self, position: Position) -> Result<(), redb::Error> {
        if let Some(old) = self.operations.remove(key(position))? {
            self.sizes.bytes -= old.value().len() as u64;
            self.sizes.operations -= 1;
        }
        Ok(())
    }

    fn bury(&mut self, position: Position, operation: &Bytes, problem: &Problem) -> Result<(), redb::Error> {
        self.take_out(position)?;
        if problem.code == Code::DamagedRecord {
            self.withdrawn.insert(key(position), position.sequence)?;
        }
        let dead = DeadRecord {
            operation: operation.clone(),
            code: problem.code.into(),
            reason: problem.sentence.clone(),
            at_ms: now_ms(),
        };
        let sealed = seal_with(
            &self.outbox.key,
            &self.outbox.purpose(b'd', position),
            &dead.encode_to_vec(),
        );
        self.sizes.dead_letter_bytes += sealed.len() as u64;
        if let Some(old) = self.dead_letters.insert(key(position), sealed.as_slice())? {
            self.sizes.dead_letter_bytes -= old.value().len() as u64;
        }
        while self.sizes.dead_letter_bytes > DEAD_LETTER_BYTES_MAX {
            let Some((_, oldest)) = self.dead_letters.pop_first()? else {
                break;
            };
            self.sizes.dead_letter_bytes -= oldest.value().len() as u64;
        }
        Ok(())
    }
}

/// Positions that a group of changes takes out again: settled before they were ever written.
fn removed(changes: &[Change]) -> HashSet<Position> {
    changes
        .iter()
        .filter_map(|change| match change {
            Change::Remove(position) | Change::Withdraw(position) | Change::Bury(position, ..) => Some(*position),
            _ => None,
        })
        .collect()
}
