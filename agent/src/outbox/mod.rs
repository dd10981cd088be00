//! The durable queue on disk: redb, ciphertext only.
//!
//! Each record is sealed under a data key of the outbox's own, which lies beside it wrapped by the host's credential,
//! so that a stolen disk tells nothing and a new credential makes no record unreadable. All writing is done by one
//! thread (see `spooler`); what is here knows nothing of threads.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use p2p_sync_proto::{
    Code, Policies, Position, Problem,
    envelope::{open_with, unwrap_key, wrap_key},
    keys::{Credential, SealKey},
    v1::{Operation, RenewReply, SequenceRange},
};
use prost::{Message, bytes::Bytes};
use redb::{Database, ReadableDatabase as _, ReadableTable as _, TableDefinition};
use uuid::Uuid;

use crate::{
    edits::EditRecord,
    keys::Keys,
    lanes::{Presences, is_presence},
    pending::GroupOrder,
};

mod commit;
mod file;
#[cfg(test)]
mod tests;

use file::{
    FORMAT_VERSION, check_format, has_records, open_database, other_credential, read_meta, read_number, read_policies,
    read_uuid, unreadable,
};

type Key = (u64, u64);
const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
const OPERATIONS: TableDefinition<Key, &[u8]> = TableDefinition::new("operations");
const WITHDRAWN: TableDefinition<Key, u64> = TableDefinition::new("withdrawn");
const DEAD_LETTERS: TableDefinition<Key, &[u8]> = TableDefinition::new("dead_letters");
/// Of [`Change::Edit`], by slot.
const EDITS: TableDefinition<u64, &[u8]> = TableDefinition::new("edits");
/// Of each attached program: the highest number of its operations that were taken, and when that was, ms since 1970.
const CLIENTS: TableDefinition<u128, (u64, u64)> = TableDefinition::new("clients");

/// They have one record.
const LEASES_AT: Position = Position {
    incarnation: 0,
    sequence: 0,
};

/// Where the record of a slot is sealed for.
fn edit_at(slot: u64) -> Position {
    Position {
        incarnation: 0,
        sequence: slot,
    }
}

/// Set aside on disk and given up when the disk is full, so that what is queued can still drain: taking records out
/// of a copy-on-write file needs pages too.
const RESERVE_BYTES: usize = 2 * 1024 * 1024;
/// Read at a time when the outbox is opened.
const SURVEY_RECORDS: usize = 1024;
const SURVEY_BYTES: u64 = 4 * 1024 * 1024;

/// One operation as it lies in the outbox.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Record {
    /// Canonical bytes of the `Operation`.
    #[prost(bytes = "bytes", tag = "1")]
    pub(crate) operation: Bytes,
    #[prost(bool, tag = "2")]
    pub(crate) critical: bool,
    #[prost(bool, tag = "3")]
    pub(crate) every: bool,
}

#[derive(Clone, PartialEq, Message)]
struct DeadRecord {
    #[prost(bytes = "bytes", tag = "1")]
    operation: Bytes,
    #[prost(int32, tag = "2")]
    code: i32,
    #[prost(string, tag = "3")]
    reason: String,
    #[prost(uint64, tag = "4")]
    at_ms: u64,
}

/// An operation that will never apply, kept readable with its reason.
#[derive(Clone, Debug, PartialEq)]
pub struct DeadLetter {
    /// Where it stood in the host's order.
    pub position: Position,
    /// The operation; `None` where the record itself was damaged.
    pub operation: Option<Operation>,
    /// Why.
    pub problem: Problem,
    /// When it was set aside, milliseconds since 1970 by the host's clock.
    pub at_ms: u64,
}

/// One change to the outbox.
#[derive(Debug)]
pub(crate) enum Change {
    Insert(Position, Record),
    Remove(Position),
    /// Never to be sent: the position is remembered until the hub has been told.
    Withdraw(Position),
    /// Never to be sent, and not on disk.
    Withdrawn(SequenceRange),
    WithdrawnTold(Vec<SequenceRange>),
    /// Removed, and kept as a dead letter.
    Bury(Position, Bytes, Problem),
    Policies(Policies),
    /// What the hub said of the host's leases: the tenures, and whether leases govern.
    Leases(RenewReply),
    /// In a slot the last edit that was seen of a path; `None`: nothing any more.
    Edit(u64, Option<EditRecord>),
    /// An attached program's operations up to this number are here, or were refused.
    Client(Uuid, u64),
    ForgetClient(Uuid),
    /// The data key is wrapped by this credential from then on, which is told to the keys.
    Wrap(Arc<Keys>, Arc<Credential>),
}

/// What was found when the outbox was opened.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) first: Option<Position>,
    pub(crate) last: Option<Position>,
    /// The last unsettled operation of each path kept as `every`.
    pub(crate) tails: HashMap<String, Position>,
    pub(crate) presences: Presences,
    pub(crate) withdrawn: Vec<SequenceRange>,
    pub(crate) policies: Option<Policies>,
    /// Of [`Change::Leases`].
    pub(crate) leases: Option<RenewReply>,
    /// Of [`Change::Edit`].
    pub(crate) edits: Vec<(u64, EditRecord)>,
    /// Attached programs of earlier starts: the number and the time of [`Change::Client`].
    pub(crate) clients: Vec<(Uuid, u64, u64)>,
}

/// Records as they were read, and where to read on.
type Page = (Vec<(Position, u64, Option<Record>)>, Option<Position>);

pub(crate) struct Outbox {
    folder: PathBuf,
    /// `None` after an I/O error, until it could be opened again.
    database: Option<Database>,
    key: SealKey,
    /// Made with the outbox; its records open in no other.
    id: Uuid,
    opening_id: Uuid,
    incarnation: u64,
    sizes: Sizes,
}

/// What lies in the tables.
#[derive(Clone, Copy, Debug, Default)]
struct Sizes {
    /// Of sealed records.
    bytes: u64,
    operations: u64,
    /// Of sealed dead letters.
    dead_letter_bytes: u64,
}

impl Outbox {
    /// Opens the outbox in a folder, making it if there is none, and begins a new incarnation on disk.
    ///
    /// It is sealed under `credential` from then on, whichever of that and its `former` ones it was sealed under.
    pub(crate) fn open(
        folder: &Path,
        credential: &Credential,
        former: &[Credential],
    ) -> Result<(Self, Found), Problem> {
        fs::create_dir_all(folder).map_err(|error| unreadable(folder, &error))?;
        match Self::open_once(folder, credential, former) {
            // A full disk may be all that is wrong: what is set aside is for that.
            Err(problem) if problem.code == Code::OutboxUnreadable && fs::remove_file(reserve(folder)).is_ok() => {
                tracing::warn!("{problem}: trying again with the space that was set aside");
                Self::open_once(folder, credential, former)
            }
            opened => opened,
        }
    }

    fn open_once(folder: &Path, credential: &Credential, former: &[Credential]) -> Result<(Self, Found), Problem> {
        let database = open_database(folder)?;
        let meta = read_meta(&database).map_err(|error| unreadable(folder, &error))?;
        check_format(folder, &meta)?;
        let (id, key) = match (read_uuid(&meta, "id"), meta.get("data_key")) {
            (Some(id), Some(wrapped)) => {
                let mut credentials = [credential].into_iter().chain(former);
                let unwrapped = credentials.find_map(|one| unwrap_key(&one.wrapping_key(), wrapped).ok());
                let key = unwrapped.ok_or_else(|| other_credential(folder))?;
                (id, key)
            }
            _ if has_records(&database).map_err(|error| unreadable(folder, &error))? => {
                return Err(unreadable(folder, &io::Error::other("its data key is missing")));
            }
            _ => (Uuid::new_v4(), SealKey::generate()),
        };
        let before = read_number(&meta, "incarnation").unwrap_or(0);
        // A first incarnation begins where no earlier outbox of this host can have been: the hub refuses it if one was.
        let incarnation = if before == 0 { now_ms() / 1000 } else { before + 1 };
        let mut outbox = Self {
            folder: folder.to_owned(),
            database: None,
            key,
            id,
            opening_id: Uuid::new_v4(),
            incarnation,
            sizes: Sizes::default(),
        };
        outbox
            .begin(&database, credential)
            .map_err(|error| unreadable(folder, &error))?;
        outbox.database = Some(database);
        let mut found = outbox.survey(meta.get("policies").cloned())?;
        found.leases = meta.get("leases").and_then(|sealed| outbox.read_leases(sealed));
        if let Err(error) = outbox.make_reserve() {
            tracing::warn!(%error, "no space could be set aside for draining a full disk");
        }
        Ok((outbox, found))
    }

    fn begin(&self, database: &Database, credential: &Credential) -> Result<(), redb::Error> {
        let write = database.begin_write()?;
        {
            let mut meta = write.open_table(META)?;
            meta.insert("format_version", FORMAT_VERSION.to_be_bytes().as_slice())?;
            meta.insert("id", self.id.as_bytes().as_slice())?;
            meta.insert("data_key", wrap_key(&credential.wrapping_key(), &self.key).as_slice())?;
            meta.insert("incarnation", self.incarnation.to_be_bytes().as_slice())?;
            write.open_table(OPERATIONS)?;
            write.open_table(WITHDRAWN)?;
            write.open_table(DEAD_LETTERS)?;
            write.open_table(CLIENTS)?;
            write.open_table(EDITS)?;
        }
        write.commit()?;
        Ok(())
    }

    /// Reads all records once: counts them, finds the tails of `every` paths, sets damaged ones aside.
    fn survey(&mut self, policies: Option<Vec<u8>>) -> Result<Found, Problem> {
        let mut found = Found {
            policies: policies.and_then(|bytes| read_policies(&bytes)),
            ..Found::default()
        };
        let mut next = Some(Position {
            incarnation: 0,
            sequence: 0,
        });
        let mut damaged = Vec::new();
        while let Some(from) = next {
            let (page, read_on) = self
                .read(from, SURVEY_RECORDS, SURVEY_BYTES)
                .map_err(|error| unreadable(&self.folder, &error))?;
            next = read_on;
            for (position, _, record) in page {
                let Some((record, operation)) = record.and_then(|record| {
                    let operation = Operation::decode(record.operation.clone()).ok()?;
                    Some((record, operation))
                }) else {
                    damaged.push(Change::Bury(position, Bytes::new(), damaged_record(position)));
                    continue;
                };
                found.first.get_or_insert(position);
                found.last = Some(position);
                if let Some(group) = GroupOrder::of(&operation) {
                    let paths = group.paths.iter().cloned();
                    found.tails.extend(paths.map(|path| (path, position)));
                } else if record.every {
                    if is_presence(&operation.path) {
                        let account_id = operation.account_id;
                        found.presences.replace(&operation.path, account_id, position);
                    }
                    found.tails.insert(operation.path, position);
                }
            }
        }
        self.recount().map_err(|error| unreadable(&self.folder, &error))?;
        found.clients = self.read_clients().map_err(|error| unreadable(&self.folder, &error))?;
        found.edits = self.read_edits().map_err(|error| unreadable(&self.folder, &error))?;
        found.withdrawn = self
            .read_withdrawn()
            .map_err(|error| unreadable(&self.folder, &error))?;
        found.withdrawn.extend(damaged.iter().filter_map(|change| match change {
            Change::Bury(Position { incarnation, sequence }, ..) => Some(SequenceRange {
                incarnation: *incarnation,
                first: *sequence,
                last: *sequence,
            }),
            _ => None,
        }));
        self.commit(&damaged)
            .map_err(|error| unreadable(&self.folder, &error))?;
        Ok(found)
    }

    /// Drawn at this opening and written nowhere: copies of one outbox, which count the same incarnations, are told
    /// apart by it.
    pub(crate) fn opening_id(&self) -> Uuid {
        self.opening_id
    }

    /// Grows each time the outbox is opened.
    pub(crate) fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// Of sealed records.
    pub(crate) fn bytes(&self) -> u64 {
        self.sizes.bytes
    }

    /// Records on disk.
    pub(crate) fn operations(&self) -> u64 {
        self.sizes.operations
    }

    /// Applies changes in one commit, which is on disk when this returns.
    ///
    /// After an error nothing of it holds and the file has been closed: an fsync that failed is never tried again on
    /// the same descriptor, since the kernel may have dropped the pages. [`Self::reopen`] before the next commit.
    pub(crate) fn commit(&mut self, changes: &[Change]) -> Result<(), redb::Error> {
        if changes.is_empty() {
            return Ok(());
        }
        let database = self.database.as_ref().ok_or_else(closed)?;
        match commit::commit(self, database, changes) {
            Ok(sizes) => {
                self.sizes = sizes;
                for change in changes {
                    if let Change::Wrap(keys, credential) = change {
                        keys.note_wrapped(credential.generation);
                    }
                }
                Ok(())
            }
            Err(error) => {
                self.database = None;
                Err(error)
            }
        }
    }

    /// Whether it can be read: not after an error, until [`Self::reopen`].
    pub(crate) fn is_open(&self) -> bool {
        self.database.is_some()
    }

    /// Opens the file again after an error.
    pub(crate) fn reopen(&mut self) -> Result<(), Problem> {
        if self.database.is_none() {
            self.database = Some(open_database(&self.folder)?);
            // Whether the failed commit reached the disk is not known.
            self.recount().map_err(|error| unreadable(&self.folder, &error))?;
        }
        Ok(())
    }

    /// Gives up the space set aside, so that what is queued can drain.
    pub(crate) fn give_up_reserve(&self) {
        // Not there is as good as removed.
        let _ = fs::remove_file(reserve(&self.folder));
    }

    /// Sets the space aside again; an error while the disk is still full.
    pub(crate) fn make_reserve(&self) -> io::Result<()> {
        let path = reserve(&self.folder);
        if path.metadata().is_ok_and(|file| file.len() == RESERVE_BYTES as u64) {
            return Ok(());
        }
        let made = (|| {
            let mut file = File::create(&path)?;
            file.write_all(&vec![0; RESERVE_BYTES])?;
            file.sync_all()
        })();
        made.inspect_err(|_| self.give_up_reserve())
    }

    /// Gives unused pages back to the disk. Worth it when a full outbox has drained.
    pub(crate) fn compact(&mut self) {
        if let Some(database) = &mut self.database
            && let Err(error) = database.compact()
        {
            tracing::warn!(%error, "the outbox could not be compacted");
        }
    }

    /// Reads records from a position on, in order: position, sealed size, and the record unless it is damaged; and where
    /// to read on, if there may be more than so many, or so many bytes.
    pub(crate) fn read(&self, from: Position, records_max: usize, bytes_max: u64) -> Result<Page, redb::Error> {
        let read = self.database.as_ref().ok_or_else(closed)?.begin_read()?;
        let table = read.open_table(OPERATIONS)?;
        let (mut page, mut bytes) = (Vec::new(), 0);
        for row in table.range(key(from)..)? {
            let (position, sealed) = row?;
            let position = at(position.value());
            if page.len() >= records_max || bytes >= bytes_max {
                return Ok((page, Some(position)));
            }
            let opened = open_with(&self.key, &self.purpose(b'o', position), sealed.value()).ok();
            let record = opened.and_then(|plain| Record::decode(plain.as_slice()).ok());
            bytes += sealed.value().len() as u64;
            page.push((position, sealed.value().len() as u64, record));
        }
        Ok((page, None))
    }

    /// Counts what lies in the tables.
    fn recount(&mut self) -> Result<(), redb::Error> {
        let read = self.database.as_ref().ok_or_else(closed)?.begin_read()?;
        let mut sizes = Sizes::default();
        for row in read.open_table(OPERATIONS)?.iter()? {
            sizes.bytes += row?.1.value().len() as u64;
            sizes.operations += 1;
        }
        for row in read.open_table(DEAD_LETTERS)?.iter()? {
            sizes.dead_letter_bytes += row?.1.value().len() as u64;
        }
        self.sizes = sizes;
        Ok(())
    }

    /// `None` where they do not open: the hub says them anew.
    fn read_leases(&self, sealed: &[u8]) -> Option<RenewReply> {
        let plain = open_with(&self.key, &self.purpose(b'l', LEASES_AT), sealed).ok()?;
        RenewReply::decode(plain.as_slice()).ok()
    }

    /// Those that open: of the others the hub tells anew.
    fn read_edits(&self) -> Result<Vec<(u64, EditRecord)>, redb::Error> {
        let read = self.database.as_ref().ok_or_else(closed)?.begin_read()?;
        let mut edits = Vec::new();
        for row in read.open_table(EDITS)?.iter()? {
            let (slot, sealed) = row?;
            let slot = slot.value();
            let opened = open_with(&self.key, &self.purpose(b'e', edit_at(slot)), sealed.value()).ok();
            let record = opened.and_then(|plain| EditRecord::decode(plain.as_slice()).ok());
            edits.extend(record.map(|record| (slot, record)));
        }
        Ok(edits)
    }

    fn read_withdrawn(&self) -> Result<Vec<SequenceRange>, redb::Error> {
        let read = self.database.as_ref().ok_or_else(closed)?.begin_read()?;
        let table = read.open_table(WITHDRAWN)?;
        let mut ranges = Vec::new();
        for row in table.iter()? {
            let (first, last) = row?;
            let (incarnation, first) = first.value();
            ranges.push(SequenceRange {
                incarnation,
                first,
                last: last.value(),
            });
        }
        Ok(ranges)
    }

    fn read_clients(&self) -> Result<Vec<(Uuid, u64, u64)>, redb::Error> {
        let read = self.database.as_ref().ok_or_else(closed)?.begin_read()?;
        let mut clients = Vec::new();
        for row in read.open_table(CLIENTS)?.iter()? {
            let (id, progress) = row?;
            let (number, used_ms) = progress.value();
            clients.push((Uuid::from_u128(id.value()), number, used_ms));
        }
        Ok(clients)
    }

    /// The newest dead letters, newest first.
    pub(crate) fn dead_letters(&self, letters_max: usize) -> Result<Vec<DeadLetter>, redb::Error> {
        let read = self.database.as_ref().ok_or_else(closed)?.begin_read()?;
        let table = read.open_table(DEAD_LETTERS)?;
        let mut letters = Vec::new();
        for row in table.iter()?.rev().take(letters_max) {
            let (position, sealed) = row?;
            let position = at(position.value());
            let opened = open_with(&self.key, &self.purpose(b'd', position), sealed.value()).ok();
            let dead = opened.and_then(|plain| DeadRecord::decode(plain.as_slice()).ok());
            letters.push(match dead {
                None => DeadLetter {
                    position,
                    operation: None,
                    problem: damaged_record(position),
                    at_ms: 0,
                },
                Some(dead) => DeadLetter {
                    position,
                    operation: Operation::decode(dead.operation)
                        .ok()
                        .filter(|operation| !operation.operation_id.is_empty()),
                    problem: Problem::new(Code::try_from(dead.code).unwrap_or(Code::Internal), dead.reason),
                    at_ms: dead.at_ms,
                },
            });
        }
        Ok(letters)
    }

    /// Associated data: a record opens only in this outbox, in its table, at its position.
    fn purpose(&self, table: u8, position: Position) -> Vec<u8> {
        let mut purpose = b"p2p-sync outbox record 1".to_vec();
        purpose.push(table);
        purpose.extend_from_slice(self.id.as_bytes());
        purpose.extend_from_slice(&position.incarnation.to_be_bytes());
        purpose.extend_from_slice(&position.sequence.to_be_bytes());
        purpose
    }
}

fn key(position: Position) -> Key {
    (position.incarnation, position.sequence)
}

fn at((incarnation, sequence): Key) -> Position {
    Position { incarnation, sequence }
}

pub(crate) fn now_ms() -> u64 {
    ms_since_1970(SystemTime::now())
}

pub(crate) fn ms_since_1970(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn closed() -> redb::Error {
    redb::Error::Io(io::Error::other("the outbox is closed after an error"))
}

/// Whether an error says that the disk, or the quota on it, is full.
pub(crate) fn is_full(error: &redb::Error) -> bool {
    matches!(error, redb::Error::Io(io) if matches!(io.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded))
}

pub(crate) fn damaged_record(position: Position) -> Problem {
    Problem::new(
        Code::DamagedRecord,
        format!("the outbox's record {position} does not open: the disk may be failing; the rest goes on"),
    )
}

fn reserve(folder: &Path) -> PathBuf {
    folder.join("outbox.reserve")
}
