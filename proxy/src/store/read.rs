//! What readers ask: one path, a prefix, what changed in a stream, what became of an operation.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use p2p_sync_proto::{Path, Position, Problem, at_least::AtLeast, limits::PATH_BYTES_MAX, v1};
use tokio_postgres::{Row, types::ToSql};
use uuid::Uuid;

use super::{Store, call::code_of, signed, unsigned};
use crate::operation::Outcome;

/// As [`StateRow::of`] reads them.
macro_rules! columns {
    () => {
        "path, tenure, incarnation, sequence, deleted, payload::text, account_id, host_id, stream_sequence, received_at, \
            CASE WHEN in_group THEN operation_id END AS group_id, hub_edit, keeps_every"
    };
}

const GET: &str = concat!("SELECT ", columns!(), " FROM p2p_sync.states WHERE path = $1");

const SCAN: &str = concat!(
    "SELECT ",
    columns!(),
    " FROM p2p_sync.states WHERE path >= $1 AND path <= $2 AND path > $3 AND NOT deleted ORDER BY path LIMIT $4"
);

pub(super) const CHANGES: &str = concat!(
    "SELECT * FROM ((SELECT ",
    columns!(),
    " FROM p2p_sync.states WHERE stream = $1 AND stream_sequence > $2 AND NOT keeps_every \
        ORDER BY stream_sequence LIMIT $3) \
    UNION ALL (SELECT ",
    columns!(),
    " FROM p2p_sync.operations WHERE stream = $1 AND stream_sequence > $2 AND keeps_every \
        ORDER BY stream_sequence LIMIT $3)) AS changes ORDER BY stream_sequence LIMIT $3"
);

const REJECTED: &str = "SELECT code, reason, false FROM p2p_sync.rejected_operations WHERE host_id = $1 \
        AND (operation_id = $2 OR incarnation = $3 AND sequence = $4) \
    UNION ALL SELECT code, reason, true FROM p2p_sync.limbo_operations WHERE host_id = $1 \
        AND (operation_id = $2 OR incarnation = $3 AND sequence = $4) LIMIT 1";

/// A group is superseded where each of its members is.
const LOGGED: &str = "SELECT stream_sequence, superseded FROM p2p_sync.operations WHERE operation_id = $1 AND host_id = $2 \
        ORDER BY superseded LIMIT 1";

const SETTLED: &str =
    "SELECT FROM p2p_sync.settled_sequences WHERE host_id = $1 AND incarnation = $2 AND settled @> $3::bigint";

/// Whether a version is settled, and a position of a stream given out. What an incarnation wrote that is closed, or is older than
/// one that is, has come or never will; the operator's edits are counted by themselves.
const HAS_COME: &str = "SELECT ($1::uuid IS NULL \
        OR EXISTS (SELECT FROM p2p_sync.settled_sequences WHERE host_id = $1 AND incarnation = $2 AND settled @> $3::bigint) \
        OR EXISTS (SELECT FROM p2p_sync.settled_sequences WHERE host_id = $1 AND incarnation >= $2 AND closed) \
        OR $1 = '00000000-0000-0000-0000-000000000000' AND (SELECT edits FROM p2p_sync.hub) >= $3) \
    AND coalesce((SELECT head FROM p2p_sync.map_states WHERE stream = $4), 0) >= $5";

/// The largest character, as often as it fits into a path: no path with a prefix sorts after the prefix and this.
const LAST: char = char::MAX;

/// The state of a path, or an operation of a path whose operations each count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateRow {
    /// Whose state it is.
    pub path: String,
    /// The first field of its version.
    pub tenure: u64,
    /// The rest of its version.
    pub position: Position,
    /// The path was deleted at this version; no payload then.
    pub deleted: bool,
    /// JSON text as Postgres writes it: members in its own order.
    pub payload: Option<String>,
    /// Whom it is about; 0 for nobody.
    pub account_id: u32,
    /// Which host wrote it.
    pub host_id: Uuid,
    /// Its position in its stream.
    pub stream_sequence: u64,
    /// Postgres' clock when it was applied, milliseconds since 1970.
    pub received_at_ms: u64,
    /// The group that wrote it, if it was one.
    pub group_id: Option<Uuid>,
    /// The operator's last edit of the path, which it holds or was written after; 0 for none.
    pub hub_edit: u64,
    /// It is of a path whose operations each count, and not only the newest.
    pub keeps_every: bool,
}

impl StateRow {
    pub(super) fn of(row: &Row) -> Self {
        let received_at: SystemTime = row.get(9);
        let since_1970 = received_at.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        Self {
            path: row.get(0),
            tenure: unsigned(row.get(1)),
            position: Position {
                incarnation: unsigned(row.get(2)),
                sequence: unsigned(row.get(3)),
            },
            deleted: row.get(4),
            payload: row.get(5),
            account_id: u32::try_from(row.get::<_, i64>(6)).unwrap_or_default(),
            host_id: row.get(7),
            stream_sequence: unsigned(row.get(8)),
            received_at_ms: u64::try_from(since_1970.as_millis()).unwrap_or_default(),
            group_id: row.get(10),
            hub_edit: unsigned(row.get(11)),
            keeps_every: row.get(12),
        }
    }

    /// As readers get it.
    pub fn to_wire(&self) -> v1::State {
        v1::State {
            path: self.path.clone(),
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

impl Store {
    /// The newest version of a path, a tombstone included.
    pub async fn get(&self, path: &Path) -> Result<Option<StateRow>, Problem> {
        Ok(self.rows(GET, &[&path.as_str()]).await?.first().map(StateRow::of))
    }

    /// Whether everything that led to what is asked for of a path has been committed: what is read after this holds it.
    pub async fn has_come_to(&self, path: &Path, at_least: &AtLeast) -> Result<bool, Problem> {
        let version = at_least.version();
        let host_id = version.map(|known| known.host_id);
        let number = |of: fn(Position) -> u64| signed(version.map_or(0, |known| of(known.position)));
        let incarnation = number(|position| position.incarnation);
        let sequence = number(|position| position.sequence);
        let stream = path.parts().scope.stream();
        let rows = self
            .rows(
                HAS_COME,
                &[&host_id, &incarnation, &sequence, &stream, &signed(at_least.sequence())],
            )
            .await?;
        Ok(rows.first().is_some_and(|row| row.get(0)))
    }

    /// States whose path begins with `prefix`, beyond `after`, in the order of the paths' bytes; deleted ones left out.
    /// Fewer than `limit` mean that there are no more.
    pub async fn scan(&self, prefix: &str, after: Option<&str>, limit: u32) -> Result<Vec<StateRow>, Problem> {
        self.states(
            SCAN,
            &[
                &prefix,
                &last_below(prefix),
                &after.unwrap_or_default(),
                &i64::from(limit),
            ],
        )
        .await
    }

    /// What was committed to a stream after a position, in its order: the newest version of each path kept as `latest`,
    /// each operation of paths kept as `every` (as long as the log keeps it), deletions included. Fewer than `limit` mean
    /// that there are no more.
    pub async fn changes_since(&self, stream: &str, after: u64, limit: u32) -> Result<Vec<StateRow>, Problem> {
        self.states(CHANGES, &[&stream, &signed(after), &i64::from(limit)])
            .await
    }

    /// What became of an operation; `None` where it is not settled, or no longer known. Whether an operation that is not
    /// logged is settled only its position tells, and then SUPERSEDED cannot be told from APPLIED.
    pub async fn operation_status(
        &self,
        host_id: Uuid,
        operation_id: Uuid,
        position: Option<Position>,
    ) -> Result<Option<Outcome>, Problem> {
        let incarnation = position.map(|position| signed(position.incarnation));
        let sequence = position.map(|position| signed(position.sequence));
        // First, for each question sees what was committed until then: what is settled by now has its reason there.
        let is_settled = match position {
            Some(_) => !self
                .rows(SETTLED, &[&host_id, &incarnation, &sequence])
                .await?
                .is_empty(),
            None => false,
        };
        if let Some(row) = self
            .rows(REJECTED, &[&host_id, &operation_id, &incarnation, &sequence])
            .await?
            .first()
        {
            let problem = Problem::new(code_of(row.get(0)), row.get::<_, String>(1));
            return Ok(Some(if row.get(2) {
                Outcome::Limbo(problem)
            } else {
                Outcome::Rejected(problem)
            }));
        }
        if let Some(row) = self.rows(LOGGED, &[&operation_id, &host_id]).await?.first() {
            let applied = Outcome::Applied {
                stream_sequence: unsigned(row.get(0)),
            };
            return Ok(Some(if row.get(1) { Outcome::Superseded } else { applied }));
        }
        Ok(is_settled.then_some(Outcome::Applied { stream_sequence: 0 }))
    }

    async fn states(&self, sql: &str, values: &[&(dyn ToSql + Sync)]) -> Result<Vec<StateRow>, Problem> {
        Ok(self.rows(sql, values).await?.iter().map(StateRow::of).collect())
    }
}

/// Nothing that begins with a prefix sorts after this.
pub(super) fn last_below(prefix: &str) -> String {
    let rest = std::iter::repeat_n(LAST, PATH_BYTES_MAX / LAST.len_utf8());
    prefix.chars().chain(rest).collect()
}
