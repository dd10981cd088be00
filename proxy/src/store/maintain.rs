//! What has to be done to the tables from time to time: partitions of the log, and the end of what is kept long enough.

use std::time::{Duration, Instant};

use deadpool_postgres::Object;
use p2p_sync_proto::{Problem, envelope::Lane};

use super::{Store, hosts::FORGET_CLOSED, invitations, unavailable};

/// Dropping and making partitions waits for whoever writes, and lets nobody else in meanwhile.
const PATIENCE: &str = "SET LOCAL lock_timeout = '2s'";

const OLD_PARTITIONS: &str = "SELECT relname::text FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid \
    WHERE inhparent = 'p2p_sync.operations'::regclass AND relname ~ '^operations_[0-9]{8}$' \
    AND to_date(right(relname, 8), 'YYYYMMDD') < (now() AT TIME ZONE 'UTC')::date - $1::int";

const OLD_STRAYS: &str = "WITH gone AS ( \
        DELETE FROM p2p_sync.operations_default WHERE received_at < now() - make_interval(days => $1) \
            RETURNING stream, stream_sequence, keeps_every) \
    INSERT INTO p2p_sync.stream_floors AS f (stream, floor) \
        SELECT stream, max(stream_sequence) FROM gone WHERE keeps_every GROUP BY stream ORDER BY stream \
    ON CONFLICT (stream) DO UPDATE SET floor = greatest(f.floor, excluded.floor)";

/// What a host's older outboxes still hold after so long is older than the tombstones that would keep it out. Counted from
/// when the next one was opened: until then the older one was in use, and its newest operations are of that day.
const CLOSE_OLD: &str = "UPDATE p2p_sync.settled_sequences AS s SET closed = true FROM ( \
        SELECT host_id, max(incarnation) AS incarnation FROM p2p_sync.settled_sequences AS old \
        WHERE EXISTS (SELECT FROM p2p_sync.settled_sequences AS newer \
            WHERE newer.host_id = old.host_id AND newer.incarnation > old.incarnation \
                AND newer.opened_at < now() - make_interval(days => $1)) \
        GROUP BY host_id) AS expired \
    WHERE s.host_id = expired.host_id AND s.incarnation = expired.incarnation AND NOT s.closed";

/// Who was told less of the stream than that a path was deleted would go on holding it.
const RAISE_FLOORS: &str = "noted AS (INSERT INTO p2p_sync.stream_floors AS f (stream, floor) \
        SELECT stream, max(stream_sequence) FROM gone GROUP BY stream ORDER BY stream \
    ON CONFLICT (stream) DO UPDATE SET floor = greatest(f.floor, excluded.floor))";

const TOMBSTONES: Old = Old {
    table: "states",
    which: "deleted AND received_at < now() - make_interval(days => $1)",
    noted: Some(RAISE_FLOORS),
};

/// As long as an operation can come again, its rejection is told again.
const REJECTED: Old = Old {
    table: "rejected_operations",
    which: "received_at < now() - make_interval(days => $1) AND (sequence IS NULL OR EXISTS ( \
        SELECT FROM p2p_sync.settled_sequences AS s \
        WHERE s.host_id = old.host_id AND s.incarnation >= old.incarnation AND s.closed))",
    noted: None,
};

const VERDICTS: Old = Old {
    table: "security_validations",
    which: "received_at < now() - make_interval(days => $1)",
    noted: None,
};

/// One a minute of each host.
const METRICS: Old = Old {
    table: "host_metrics",
    which: "received_at < now() - make_interval(days => $1)",
    noted: None,
};
const METRICS_DAYS: i32 = 7;

const PLAYER_TENURES: Old = Old {
    table: "player_tenures",
    which: "ended_at < now() - make_interval(days => $1)",
    noted: None,
};

const INVITATIONS: Old = Old {
    table: "invitations",
    which: "expires_at < now() - make_interval(days => $1)",
    noted: None,
};

/// What is open waits for the operator.
const CONFLICTS: Old = Old {
    table: "conflicts",
    which: "last_at < now() - make_interval(days => $1) AND (rule <> 'both' OR resolved_at IS NOT NULL)",
    noted: None,
};

/// What is kept as `every` is searched as long as it is logged.
const EMBEDDED_LINES: Old = Old {
    table: "embeddings",
    which: "entry > 0 AND received_at < now() - make_interval(days => $1)",
    noted: None,
};

/// Where a map is not eligible any more, what was embedded of it stays as it is, but goes with its path.
const EMBEDDED_AND_DELETED: Old = Old {
    table: "embeddings",
    which: "$1::int >= 0 AND EXISTS (SELECT FROM p2p_sync.states AS s \
        WHERE s.path = old.path AND s.deleted AND s.stream_sequence > old.stream_sequence)",
    noted: None,
};

/// What it is of is not there any more, or nobody has looked for as long as the log is kept.
const EMBEDDING_QUEUE: Old = Old {
    table: "embedding_queue",
    which: "(entry > 0 OR dead_code IS NOT NULL) AND queued_at < now() - make_interval(days => $1)",
    noted: None,
};

/// Rows of a table that were kept long enough.
struct Old {
    table: &'static str,
    which: &'static str,
    /// What is noted of the positions that are `gone`, as a part of the statement.
    noted: Option<&'static str>,
}

/// So many rows are deleted well within a statement's time, and writers who meet them wait for no longer.
const PURGED_AT_ONCE: u64 = 10_000;
/// For one table; what is left then waits for the next run.
const PURGE_TIME: Duration = Duration::from_mins(1);

/// What maintenance did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Maintained {
    /// Days of the log that were past their retention.
    pub partitions_dropped: u64,
    /// Hosts whose older outboxes are refused from now on.
    pub hosts_closed: u64,
    /// Deleted paths that are forgotten.
    pub tombstones_purged: u64,
    /// Dead letters that are forgotten.
    pub rejections_purged: u64,
    /// What was found against hosts, as old as the log.
    pub verdicts_purged: u64,
    /// Who had which player so long ago that nothing of it is taken any more.
    pub player_tenures_purged: u64,
    /// Invitations that ended long ago.
    pub invitations_purged: u64,
    /// Reports of hosts that are a week old.
    pub metrics_purged: u64,
    /// Conflicts with the operator's edits, as old as the log and settled.
    pub conflicts_purged: u64,
    /// Vectors of what is not logged or not there any more, and what waited to be embedded of it.
    pub embeddings_purged: u64,
}

impl Store {
    /// Makes the log's next partition and ends what was kept long enough. To be run at the start and every hour or so;
    /// any number of proxies may run it. Where something fails, the rest is done all the same, and the error told.
    pub async fn maintain(&self) -> Result<Maintained, Problem> {
        let mut client = self.lane(Lane::Bulk).await?;
        let (log_days, tombstone_days) = (
            days(self.inner.log_retention_days),
            days(self.inner.tombstone_retention_days),
        );
        let partitions_dropped = turn_log(&mut client, log_days).await;
        let hosts_closed = close_old(&client, tombstone_days).await;
        let waiting_purged = purge(&client, &EMBEDDING_QUEUE, log_days).await;
        let lines_purged = purge(&client, &EMBEDDED_LINES, log_days).await;
        // While there are tombstones that tell of it.
        let deleted_purged = purge(&client, &EMBEDDED_AND_DELETED, tombstone_days).await;
        let tombstones_purged = purge(&client, &TOMBSTONES, tombstone_days).await;
        let rejections_purged = purge(&client, &REJECTED, tombstone_days).await;
        let verdicts_purged = purge(&client, &VERDICTS, log_days).await;
        let player_tenures_purged = purge(&client, &PLAYER_TENURES, tombstone_days).await;
        let invitations_purged = purge(&client, &INVITATIONS, invitations::KEPT_DAYS).await;
        let metrics_purged = purge(&client, &METRICS, METRICS_DAYS).await;
        let conflicts_purged = purge(&client, &CONFLICTS, log_days).await;
        self.inner.pools.make_durable().await?;
        let done = || {
            Ok(Maintained {
                partitions_dropped: partitions_dropped?,
                hosts_closed: hosts_closed?,
                tombstones_purged: tombstones_purged?,
                rejections_purged: rejections_purged?,
                verdicts_purged: verdicts_purged?,
                player_tenures_purged: player_tenures_purged?,
                invitations_purged: invitations_purged?,
                metrics_purged: metrics_purged?,
                conflicts_purged: conflicts_purged?,
                embeddings_purged: waiting_purged? + lines_purged? + deleted_purged?,
            })
        };
        done().map_err(|error: tokio_postgres::Error| unavailable(&error))
    }
}

/// Deletes old rows, some at a time; gives how many.
async fn purge(client: &Object, old: &Old, days: i32) -> Result<u64, tokio_postgres::Error> {
    let Old { table, which, noted } = old;
    let some = format!(
        "DELETE FROM p2p_sync.{table} WHERE ctid = ANY (ARRAY( \
            SELECT ctid FROM p2p_sync.{table} AS old WHERE {which} LIMIT {PURGED_AT_ONCE} FOR UPDATE SKIP LOCKED))"
    );
    let and_note =
        noted.map(|noted| format!("WITH gone AS ({some} RETURNING stream, stream_sequence), {noted} SELECT FROM gone"));
    let (began, mut purged) = (Instant::now(), 0);
    loop {
        let rows = match &and_note {
            Some(and_note) => client.query(and_note, &[&days]).await?.len() as u64,
            None => client.execute(&some, &[&days]).await?,
        };
        purged += rows;
        if rows < PURGED_AT_ONCE || began.elapsed() > PURGE_TIME {
            return Ok(purged);
        }
    }
}

async fn close_old(client: &Object, tombstone_days: i32) -> Result<u64, tokio_postgres::Error> {
    let closed = client.execute(CLOSE_OLD, &[&tombstone_days]).await?;
    client.execute(FORGET_CLOSED, &[]).await?;
    Ok(closed)
}

/// Makes partitions and drops old ones; gives how many were dropped.
async fn turn_log(client: &mut Object, retention_days: i32) -> Result<u64, tokio_postgres::Error> {
    let transaction = client.transaction().await?;
    transaction.batch_execute(PATIENCE).await?;
    transaction
        .execute("SELECT p2p_sync.create_log_partitions()", &[])
        .await?;
    let old = transaction.query(OLD_PARTITIONS, &[&retention_days]).await?;
    for partition in &old {
        let partition: &str = partition.get(0);
        transaction.batch_execute(&raise_floors(partition)).await?;
        transaction
            .batch_execute(&format!("DROP TABLE p2p_sync.{partition}"))
            .await?;
    }
    transaction.execute(OLD_STRAYS, &[&retention_days]).await?;
    transaction.commit().await?;
    Ok(old.len() as u64)
}

/// Notes what subscribers miss who have not been told what a partition holds; a look at the end of each stream in its index.
fn raise_floors(partition: &str) -> String {
    format!(
        "INSERT INTO p2p_sync.stream_floors AS f (stream, floor) \
            SELECT m.stream, l.stream_sequence FROM p2p_sync.map_states AS m CROSS JOIN LATERAL ( \
                SELECT stream_sequence FROM p2p_sync.{partition} WHERE stream = m.stream AND keeps_every \
                ORDER BY stream_sequence DESC LIMIT 1) AS l ORDER BY m.stream \
        ON CONFLICT (stream) DO UPDATE SET floor = greatest(f.floor, excluded.floor)"
    )
}

/// Postgres counts days as `integer`, and its clock does not go back further than some hundred thousand.
fn days(days: u32) -> i32 {
    i32::try_from(days.min(100_000)).expect("bounded")
}
