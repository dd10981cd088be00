//! The outbox's file: opening it, and what is written about the outbox itself.

use std::{collections::HashMap, path::Path};

use p2p_sync_proto::{Code, Policies, Problem, v1};
use prost::Message as _;
use redb::{Database, ReadableDatabase as _, ReadableTable as _, ReadableTableMetadata as _};
use uuid::Uuid;

use super::{META, OPERATIONS};

/// Of the tables; an agent refuses a newer one and keeps it as it is.
pub(super) const FORMAT_VERSION: u32 = 1;
/// redb's own cache; records are read once, in order.
const CACHE_BYTES: usize = 2 * 1024 * 1024;

pub(super) fn open_database(folder: &Path) -> Result<Database, Problem> {
    let file = folder.join("outbox.redb");
    let opened = redb::Builder::new().set_cache_size(CACHE_BYTES).create(&file);
    opened.map_err(|error| match error {
        redb::DatabaseError::DatabaseAlreadyOpen => Problem::new(
            Code::DataDirectoryInUse,
            format!(
                "the outbox in {} is in use by another agent: stop it, or give this one an outbox_path of its own",
                folder.display()
            ),
        ),
        error => unreadable(folder, &error),
    })
}

pub(super) fn read_meta(database: &Database) -> Result<HashMap<String, Vec<u8>>, redb::Error> {
    let write = database.begin_write()?;
    let mut meta = HashMap::new();
    {
        let table = write.open_table(META)?;
        for row in table.iter()? {
            let (name, value) = row?;
            meta.insert(name.value().to_owned(), value.value().to_vec());
        }
    }
    write.abort()?;
    Ok(meta)
}

/// Whether operations lie in the file.
pub(super) fn has_records(database: &Database) -> Result<bool, redb::Error> {
    let read = database.begin_read()?;
    match read.open_table(OPERATIONS) {
        Ok(table) => Ok(!table.is_empty()?),
        Err(redb::TableError::TableDoesNotExist(_)) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

pub(super) fn check_format(folder: &Path, meta: &HashMap<String, Vec<u8>>) -> Result<(), Problem> {
    let version = meta
        .get("format_version")
        .and_then(|bytes| bytes.as_slice().try_into().ok())
        .map(u32::from_be_bytes);
    match version {
        None | Some(FORMAT_VERSION) => Ok(()),
        Some(newer) => Err(Problem::new(
            Code::OutboxUnreadable,
            format!(
                "the outbox in {} has format {newer}, this agent knows {FORMAT_VERSION}: run the newer agent again",
                folder.display()
            ),
        )),
    }
}

pub(super) fn read_policies(bytes: &[u8]) -> Option<Policies> {
    v1::Policies::decode(bytes).ok().map(Policies::from_wire)
}

pub(super) fn read_uuid(meta: &HashMap<String, Vec<u8>>, name: &str) -> Option<Uuid> {
    Uuid::from_slice(meta.get(name)?).ok()
}

pub(super) fn read_number(meta: &HashMap<String, Vec<u8>>, name: &str) -> Option<u64> {
    meta.get(name)?.as_slice().try_into().ok().map(u64::from_be_bytes)
}

pub(super) fn unreadable(folder: &Path, error: &dyn std::error::Error) -> Problem {
    Problem::new(
        Code::OutboxUnreadable,
        format!(
            "the outbox in {} cannot be used: {error}; check the disk and the folder's rights",
            folder.display()
        ),
    )
}

pub(super) fn other_credential(folder: &Path) -> Problem {
    Problem::new(
        Code::OutboxUnreadable,
        format!(
            "the outbox in {} was made under another credential: put that one back until it is drained, or give this \
             one an outbox_path of its own",
            folder.display()
        ),
    )
}
