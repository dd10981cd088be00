//! The operator's edits, and the conflicts of hosts' operations with them.

use p2p_sync_proto::{Code, Path, Problem, ids, policy::Keep};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use uuid::Uuid;

use super::{Store, not_answering, unsigned};
use crate::version_vector::VersionVector;

/// Rows that are listed at one time.
const LISTED_MAX: i64 = 1000;

/// A write by a host that had not seen the operator's last edit of its path.
#[derive(Clone, Debug)]
pub struct ConflictRow {
    /// What it is shown and resolved by.
    pub conflict_id: i64,
    /// Who wrote.
    pub host_id: Uuid,
    /// The edit that it had not seen.
    pub hub_edit: u64,
    /// Of the last such operation, or the first such group.
    pub operation_id: Uuid,
    /// What was made of it: `hub`, `host`, `newest` or `both`.
    pub rule: String,
    /// How many operations came so.
    pub operations: u64,
    /// Both values: of one path, or of all that a group writes.
    pub members: Vec<ConflictMember>,
    /// Postgres' clock at the first, RFC 3339.
    pub recorded_at: String,
    /// What the operator took: `hub`, `host` or `data`; none yet.
    pub resolution: Option<String>,
}

impl ConflictRow {
    /// Whether it waits for the operator.
    pub fn is_open(&self) -> bool {
        self.rule == "both" && self.resolution.is_none()
    }
}

/// Which conflicts are wanted.
#[derive(Clone, Copy, Debug, Default)]
pub struct ConflictFilter {
    /// That wait for the operator.
    pub open: bool,
    /// With operations of this host.
    pub host_id: Option<Uuid>,
    /// Older than the one of this number.
    pub before: Option<i64>,
    /// The one of this number.
    pub conflict_id: Option<i64>,
    /// At most so many, and 1000.
    pub limit: Option<u32>,
}

/// Both values of one path.
#[derive(Clone, Debug, Deserialize)]
pub struct ConflictMember {
    /// What was written.
    pub path: String,
    /// Its writer had not seen the last edit; a group may have members of which it had.
    pub conflicts: bool,
    /// What was there; none: nothing.
    pub hub: Option<HubSide>,
    /// What the host wrote.
    pub host: HostSide,
}

/// What was at a path when a host wrote.
#[derive(Clone, Debug, Deserialize)]
pub struct HubSide {
    /// Which edits it had.
    pub vector: VersionVector,
    /// Its position in its stream.
    pub stream_sequence: u64,
    /// JSON; none where it was deleted.
    #[serde(default, deserialize_with = "also_null")]
    pub data: Option<Box<RawValue>>,
}

/// What a host wrote.
#[derive(Clone, Debug, Deserialize)]
pub struct HostSide {
    /// JSON; none where it deleted.
    #[serde(default, deserialize_with = "also_null")]
    pub data: Option<Box<RawValue>>,
}

/// A value that is there may be JSON's null.
fn also_null<'de, D: Deserializer<'de>>(value: D) -> Result<Option<Box<RawValue>>, D::Error> {
    Box::deserialize(value).map(Some)
}

/// What a path is now, beside a conflict of before.
#[derive(Clone, Debug)]
pub struct Present {
    /// Which edits it has.
    pub vector: VersionVector,
    /// Its position in its stream.
    pub stream_sequence: u64,
    /// JSON; none where it is deleted.
    pub payload: Option<String>,
}

/// What the operator takes for a conflict.
#[derive(Clone, Copy, Debug)]
pub enum Take<'a> {
    /// What the hub had.
    Hub,
    /// What the host wrote.
    Host,
    /// Something else, JSON that was checked; not for a group.
    Data(&'a str),
}

impl Store {
    /// Writes a path as the operator's edit; `None` deletes it. Gives the edit's number. What is checked of hosts'
    /// operations is the caller's to check.
    ///
    /// It is the newest of its path, at the tenure of the map's holder, and takes its turn in the stream; hosts' operations
    /// that were made without knowing of it are conflicts.
    pub async fn edit(
        &self,
        path: &Path,
        keep: Keep,
        payload: Option<&str>,
        account_id: Option<u32>,
    ) -> Result<u64, Problem> {
        const EDIT: &str = "SELECT p2p_sync.write_edit($1, $2, $3, $4::text::jsonb, $5, NULL, $6, false, \
            floor(extract(epoch FROM now()) * 1000)::bigint)";
        let data_type = path.parts().data_type as i16;
        let account_id = account_id.map(i64::from);
        let rows = self
            .change(
                EDIT,
                &[
                    &path.as_str(),
                    &data_type,
                    &(keep == Keep::Every),
                    &payload,
                    &account_id,
                    &ids::new_id(),
                ],
            )
            .await?;
        rows.first().map(|row| unsigned(row.get(0))).ok_or_else(not_answering)
    }

    /// Conflicts, the newest first.
    pub async fn conflicts(&self, wanted: &ConflictFilter) -> Result<Vec<ConflictRow>, Problem> {
        const LIST: &str = "SELECT conflict_id, host_id, hub_edit, operation_id, rule, operations, members::text, \
                to_char(recorded_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"'), resolution \
            FROM p2p_sync.conflicts \
            WHERE (NOT $1 OR rule = 'both' AND resolved_at IS NULL) AND host_id = coalesce($2, host_id) \
                AND conflict_id < coalesce($3, 9223372036854775807) AND conflict_id = coalesce($4, conflict_id) \
            ORDER BY conflict_id DESC LIMIT $5";
        let limit = wanted
            .limit
            .map_or(LISTED_MAX, |limit| i64::from(limit).min(LISTED_MAX));
        let rows = self
            .rows(
                LIST,
                &[
                    &wanted.open,
                    &wanted.host_id,
                    &wanted.before,
                    &wanted.conflict_id,
                    &limit,
                ],
            )
            .await?;
        let of = |row: &tokio_postgres::Row| {
            Ok(ConflictRow {
                conflict_id: row.get(0),
                host_id: row.get(1),
                hub_edit: unsigned(row.get(2)),
                operation_id: row.get(3),
                rule: row.get(4),
                operations: unsigned(row.get(5)),
                members: serde_json::from_str(row.get(6)).map_err(|error| {
                    let sentence = format!("a row of p2p_sync.conflicts cannot be read: {error}");
                    Problem::new(Code::Internal, sentence)
                })?,
                recorded_at: row.get(7),
                resolution: row.get(8),
            })
        };
        rows.iter().map(of).collect()
    }

    /// The conflict with an id; `NOT_FOUND` where there is none.
    pub async fn conflict(&self, conflict_id: i64) -> Result<ConflictRow, Problem> {
        let wanted = ConflictFilter {
            conflict_id: Some(conflict_id),
            ..ConflictFilter::default()
        };
        let found = self.conflicts(&wanted).await?;
        found.into_iter().next().ok_or_else(|| no_conflict(conflict_id))
    }

    /// What a path of a conflict is now.
    pub async fn present(&self, path: &str) -> Result<Option<Present>, Problem> {
        const PRESENT: &str =
            "SELECT version_vector::text, stream_sequence, payload::text FROM p2p_sync.states WHERE path = $1";
        let rows = self.rows(PRESENT, &[&path]).await?;
        Ok(rows.first().map(|row| Present {
            // What a newer hub writes there is for that one to compare.
            vector: serde_json::from_str(row.get(0)).unwrap_or_default(),
            stream_sequence: unsigned(row.get(1)),
            payload: row.get(2),
        }))
    }

    /// Writes what the operator takes as an edit, of a group all members in one transaction. `NOT_FOUND` where there is no
    /// such conflict.
    pub async fn resolve_conflict(&self, conflict_id: i64, take: Take<'_>) -> Result<(), Problem> {
        const RESOLVE: &str = "SELECT p2p_sync.resolve_conflict($1, $2, $3::text::jsonb, $4)";
        let (take, payload) = match take {
            Take::Hub => ("hub", None),
            Take::Host => ("host", None),
            Take::Data(payload) => ("data", Some(payload)),
        };
        let rows = self
            .change(RESOLVE, &[&conflict_id, &take, &payload, &ids::new_id()])
            .await?;
        if rows.first().is_some_and(|row| row.get(0)) {
            return Ok(());
        }
        Err(no_conflict(conflict_id))
    }

    /// The timeline, and how many edits the operator has made: of all proxies, and of commands in other processes. An error
    /// too where the server takes no writes: then another one is looked for.
    pub async fn pulse(&self) -> Result<(u64, u64), Problem> {
        const PULSE: &str =
            "SELECT timeline, edits, current_setting('transaction_read_only')::boolean FROM p2p_sync.hub";
        let rows = self.own_rows(PULSE, &[]).await?;
        let row = rows.first().ok_or_else(not_answering)?;
        if row.get(2) {
            self.inner.pools.leave_server();
            return Err(not_answering());
        }
        Ok((unsigned(row.get(0)), unsigned(row.get(1))))
    }
}

fn no_conflict(conflict_id: i64) -> Problem {
    Problem::new(
        Code::NotFound,
        format!("there is no conflict {conflict_id}: see `p2p-sync-proxy ops conflicts`"),
    )
}
