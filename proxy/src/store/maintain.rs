//! What has to be done to the tables from time to time: partitions of the log, and the end of what is kept long enough.

use deadpool_postgres::Object;
use p2p_sync_proto::{Problem, envelope::Lane};

use super::{Store, hosts::FORGET_CLOSED, invitations, unavailable};

/// Dropping and making partitions waits for whoever writes, and lets nobody else in meanwhile.
const PATIENCE: &str = "SET LOCAL lock_timeout = '2s'";

const OLD_PARTITIONS: &str = "SELECT relname::text FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid \
    WHERE inhparent = 'p2p_sync.operations'::regclass AND relname ~ '^operations_[0-9]{8}$' \
    AND to_date(right(relname, 8), 'YYYYMMDD') < (now() AT TIME ZONE 'UTC')::date - $1::int";

const OLD_STRAYS: &str =
    "DELETE FROM p2p_sync.operations_default WHERE received_at < now() - make_interval(days => $1)";

/// What a host's older outboxes still hold after so long is older than the tombstones that would keep it out. Counted from
/// when the next one was opened: until then the older one was in use, and its newest operations are of that day.
const CLOSE_OLD: &str = "UPDATE p2p_sync.settled_sequences AS s SET closed = true FROM ( \
        SELECT host_id, max(incarnation) AS incarnation FROM p2p_sync.settled_sequences AS old \
        WHERE EXISTS (SELECT FROM p2p_sync.settled_sequences AS newer \
            WHERE newer.host_id = old.host_id AND newer.incarnation > old.incarnation \
                AND newer.opened_at < now() - make_interval(days => $1)) \
        GROUP BY host_id) AS expired \
    WHERE s.host_id = expired.host_id AND s.incarnation = expired.incarnation AND NOT s.closed";

const PURGE_TOMBSTONES: &str =
    "DELETE FROM p2p_sync.states WHERE deleted AND received_at < now() - make_interval(days => $1)";

/// As long as an operation can come again, its rejection is told again.
const PURGE_REJECTED: &str = "DELETE FROM p2p_sync.rejected_operations AS r \
    WHERE received_at < now() - make_interval(days => $1) AND (sequence IS NULL OR EXISTS ( \
        SELECT FROM p2p_sync.settled_sequences AS s \
        WHERE s.host_id = r.host_id AND s.incarnation >= r.incarnation AND s.closed))";

const PURGE_VERDICTS: &str =
    "DELETE FROM p2p_sync.security_validations WHERE received_at < now() - make_interval(days => $1)";

/// A bounded number at a time: writers of players meet each row that is deleted. What they hold waits for the next run.
const PURGE_PLAYER_TENURES: &str = "DELETE FROM p2p_sync.player_tenures WHERE ctid = ANY (ARRAY( \
    SELECT ctid FROM p2p_sync.player_tenures WHERE ended_at < now() - make_interval(days => $1) \
    LIMIT 10000 FOR UPDATE SKIP LOCKED))";

/// What is open waits for the operator.
const PURGE_CONFLICTS: &str = "DELETE FROM p2p_sync.conflicts WHERE last_at < now() - make_interval(days => $1) \
    AND (rule <> 'both' OR resolved_at IS NOT NULL)";

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
    /// Conflicts with the operator's edits, as old as the log and settled.
    pub conflicts_purged: u64,
}

impl Store {
    /// Makes the log's next partition and ends what was kept long enough. To be run at the start and every hour or so;
    /// any number of proxies may run it. On an error the rest waits for the next run.
    pub async fn maintain(&self) -> Result<Maintained, Problem> {
        let mut client = self.lane(Lane::Bulk).await?;
        let (log_days, tombstone_days) = (
            days(self.inner.log_retention_days),
            days(self.inner.tombstone_retention_days),
        );
        let done = async {
            let partitions_dropped = turn_log(&mut client, log_days).await?;
            let hosts_closed = client.execute(CLOSE_OLD, &[&tombstone_days]).await?;
            client.execute(FORGET_CLOSED, &[]).await?;
            Ok(Maintained {
                partitions_dropped,
                hosts_closed,
                tombstones_purged: client.execute(PURGE_TOMBSTONES, &[&tombstone_days]).await?,
                rejections_purged: client.execute(PURGE_REJECTED, &[&tombstone_days]).await?,
                verdicts_purged: client.execute(PURGE_VERDICTS, &[&log_days]).await?,
                player_tenures_purged: client.execute(PURGE_PLAYER_TENURES, &[&tombstone_days]).await?,
                invitations_purged: client.execute(invitations::PURGE, &[&invitations::KEPT_DAYS]).await?,
                conflicts_purged: client.execute(PURGE_CONFLICTS, &[&log_days]).await?,
            })
        };
        let done = done.await.map_err(|error| unavailable(&error))?;
        self.inner.pools.make_durable().await?;
        Ok(done)
    }
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
        transaction
            .batch_execute(&format!("DROP TABLE p2p_sync.{}", partition.get::<_, &str>(0)))
            .await?;
    }
    transaction.execute(OLD_STRAYS, &[&retention_days]).await?;
    transaction.commit().await?;
    Ok(old.len() as u64)
}

/// Postgres counts days as `integer`, and its clock does not go back further than some hundred thousand.
fn days(days: u32) -> i32 {
    i32::try_from(days.min(100_000)).expect("bounded")
}
