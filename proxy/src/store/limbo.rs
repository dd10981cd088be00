//! What came under a tenure that had passed: apart from the state until the operator decides.

use p2p_sync_proto::{Code, Problem};
use uuid::Uuid;

use super::{Store, unsigned};

/// Rows that are listed at one time.
const LISTED_MAX: i64 = 1000;
/// What the host is told of an operation that was discarded, if it asks.
const DISCARDED: &str =
    "it came after the right to write its map, or its player, had passed on, and the hub's operator decided against it";

/// An operation, or a group, that waits for the operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LimboRow {
    /// What it is merged or discarded by.
    pub limbo_id: i64,
    /// Who sent it.
    pub host_id: Uuid,
    /// What it was made under; 0 before the host knew of a lease.
    pub tenure: u64,
    /// As the host gave it.
    pub operation_id: Uuid,
    /// What it would write; of a group all of its paths, with a space between.
    pub paths: String,
    /// It would delete its path.
    pub deleted: bool,
    /// JSON text; of a group an array of its members.
    pub payload: Option<String>,
    /// Postgres' clock when it came, RFC 3339.
    pub received_at: String,
}

/// Which rows of limbo are wanted.
#[derive(Clone, Copy, Debug, Default)]
pub struct LimboFilter<'a> {
    /// That write this map.
    pub map: Option<&'a str>,
    /// Of this host.
    pub host_id: Option<Uuid>,
    /// Behind the row of this number.
    pub after: i64,
    /// At most so many, and 1000.
    pub limit: Option<u32>,
}

impl Store {
    /// What lies in limbo, the oldest first.
    pub async fn limbo(&self, wanted: &LimboFilter<'_>) -> Result<Vec<LimboRow>, Problem> {
        const LIST: &str = "SELECT limbo_id, host_id, tenure, operation_id, paths, deleted, payload::text, \
                to_char(received_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"') \
            FROM (SELECT *, CASE WHEN path <> '' THEN path ELSE \
                    (SELECT string_agg(e ->> 'path', ' ' ORDER BY n) \
                        FROM jsonb_array_elements(payload) WITH ORDINALITY AS m(e, n)) END AS paths \
                FROM p2p_sync.limbo_operations) AS listed \
            WHERE limbo_id > $3 AND host_id = coalesce($4, host_id) \
                AND ($1::text IS NULL OR split_part(path, '/', 1) = $1 \
                    OR path = '' AND EXISTS (SELECT FROM jsonb_array_elements(payload) AS e \
                        WHERE split_part(e ->> 'path', '/', 1) = $1)) \
            ORDER BY limbo_id LIMIT $2";
        let limit = wanted
            .limit
            .map_or(LISTED_MAX, |limit| i64::from(limit).min(LISTED_MAX));
        let rows = self
            .rows(LIST, &[&wanted.map, &limit, &wanted.after, &wanted.host_id])
            .await?;
        let of = |row: &tokio_postgres::Row| LimboRow {
            limbo_id: row.get(0),
            host_id: row.get(1),
            tenure: unsigned(row.get(2)),
            operation_id: row.get(3),
            paths: row.get(4),
            deleted: row.get(5),
            payload: row.get(6),
            received_at: row.get(7),
        };
        Ok(rows.iter().map(of).collect())
    }

    /// Writes what lies in limbo as the operator's edit: newer than what its paths have, and their `hub_edit` is a new one.
    /// `NOT_FOUND` where there is no such row.
    pub async fn merge_limbo(&self, limbo_id: i64) -> Result<(), Problem> {
        let rows = self.change("SELECT p2p_sync.merge_limbo($1)", &[&limbo_id]).await?;
        found(&rows, limbo_id)
    }

    /// Gives up what lies in limbo; it becomes a dead letter. `NOT_FOUND` where there is no such row.
    pub async fn discard_limbo(&self, limbo_id: i64) -> Result<(), Problem> {
        let rows = self
            .change("SELECT p2p_sync.discard_limbo($1, $2)", &[&limbo_id, &DISCARDED])
            .await?;
        found(&rows, limbo_id)
    }
}

fn found(rows: &[tokio_postgres::Row], limbo_id: i64) -> Result<(), Problem> {
    if rows.first().is_some_and(|row| row.get(0)) {
        return Ok(());
    }
    Err(Problem::new(
        Code::NotFound,
        format!("nothing lies in limbo under {limbo_id}: see `p2p-sync-proxy limbo list`"),
    ))
}
