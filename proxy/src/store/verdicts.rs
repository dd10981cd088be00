//! What was found against hosts, and the lock that forgery leads to.

use p2p_sync_proto::Problem;
use uuid::Uuid;

use super::{Store, call::without_nul, unsigned};
use crate::verdicts::{LockRule, TRESPASS, Verdict};

/// Refusals of a host by one rule are one row a minute, which counts them: there may be thousands a second. A row from
/// before a lock is left alone, for what it counts is spent.
const ADD: &str = "WITH given AS ( \
        SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::text[], $6::text[]::jsonb[], $7::bigint[]) \
            WITH ORDINALITY AS g(host_id, operation_id, path, rule, verdict, details, operations, place) \
    ), counted AS ( \
        UPDATE p2p_sync.security_validations AS v \
            SET details = v.details || jsonb_build_object( \
                'operations', (v.details ->> 'operations')::bigint + g.operations, 'last_at', now()) \
            FROM given AS g \
            WHERE g.verdict = 'refused' AND v.validation_id = ( \
                SELECT max(validation_id) FROM p2p_sync.security_validations \
                WHERE host_id = g.host_id AND rule = g.rule AND verdict = 'refused' \
                    AND received_at > now() - interval '1 minute' \
                    AND validation_id > coalesce((SELECT max(validation_id) FROM p2p_sync.security_validations \
                        WHERE host_id = g.host_id AND rule = 'automatic_lock'), 0)) \
            RETURNING g.place \
    ) \
    INSERT INTO p2p_sync.security_validations (host_id, operation_id, path, rule, verdict, details) \
        SELECT host_id, operation_id, path, rule, verdict, \
                details || CASE WHEN verdict = 'refused' THEN jsonb_build_object('operations', operations) ELSE '{}' END \
            FROM given WHERE place NOT IN (SELECT place FROM counted) ORDER BY place";

/// What was counted for the lock before this one counts no more: whoever unlocks a host gives it a new start.
const LOCK: &str = "WITH counted AS ( \
        SELECT coalesce(sum((details ->> 'operations')::bigint), 0)::bigint AS operations \
        FROM p2p_sync.security_validations \
        WHERE host_id = $1 AND verdict = 'refused' AND received_at > now() - make_interval(secs => $2) \
            AND (rule = ANY ($4)) = $5 \
            AND validation_id > coalesce((SELECT max(validation_id) FROM p2p_sync.security_validations \
                WHERE host_id = $1 AND rule = 'automatic_lock'), 0) \
    ), locked AS ( \
        UPDATE p2p_sync.hosts SET status = 'locked', lock_reason = CASE WHEN $5 \
                THEN 'it tried to write maps or players of others ' || operations || ' times' \
                ELSE 'it forged ' || operations || ' operations' END FROM counted \
            WHERE host_id = $1 AND status = 'active' AND operations >= $3 RETURNING operations \
    ) \
    INSERT INTO p2p_sync.security_validations (host_id, rule, verdict, details) \
        SELECT $1, 'automatic_lock', 'refused', \
                jsonb_build_object('operations', operations, 'window_seconds', $2::float8, 'threshold', $3::bigint) \
            FROM locked \
        RETURNING (details ->> 'operations')::bigint";

const LIST: &str = "SELECT to_char(received_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"'), verdict, rule, \
        path, operation_id, details::text \
    FROM p2p_sync.security_validations WHERE host_id = $1 ORDER BY received_at DESC, validation_id DESC LIMIT $2";

const SUMS: &str = "SELECT verdict, rule, count(*), \
        coalesce(sum((details ->> 'operations')::bigint), count(*))::bigint \
    FROM p2p_sync.security_validations WHERE host_id = $1 GROUP BY verdict, rule ORDER BY verdict, rule";

/// A verdict as it was kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerdictRow {
    /// When it was first found, UTC.
    pub at: String,
    /// `flagged`, `refused` or `reported by host`.
    pub verdict: String,
    /// By which rule.
    pub rule: String,
    /// What the operation was to write; whatever the host sent.
    pub path: Option<String>,
    /// The operation, or the first of several.
    pub operation_id: Option<Uuid>,
    /// The evidence: JSON text.
    pub details: String,
}

/// How often a host was found to break a rule, in what is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerdictSum {
    /// `flagged`, `refused` or `reported by host`.
    pub verdict: String,
    /// By which rule.
    pub rule: String,
    /// Rows.
    pub rows: u64,
    /// Operations that they count.
    pub operations: u64,
}

impl Store {
    /// Writes verdicts, all or none.
    pub async fn add_verdicts(&self, verdicts: &[Verdict]) -> Result<(), Problem> {
        let of = |field: fn(&Verdict) -> &'static str| verdicts.iter().map(field).collect::<Vec<_>>();
        let hosts: Vec<Uuid> = verdicts.iter().map(|one| one.host_id).collect();
        let operation_ids: Vec<Option<Uuid>> = verdicts.iter().map(|one| one.operation_id).collect();
        let paths: Vec<_> = verdicts
            .iter()
            .map(|one| one.path.as_deref().map(without_nul))
            .collect();
        let (rules, kinds) = (of(|one| one.rule), of(|one| one.kind.as_str()));
        let details: Vec<String> = verdicts.iter().map(|one| one.details.to_string()).collect();
        let operations: Vec<i64> = verdicts
            .iter()
            .map(|one| i64::try_from(one.operations).unwrap_or(i64::MAX))
            .collect();
        self.own_rows(
            ADD,
            &[&hosts, &operation_ids, &paths, &rules, &kinds, &details, &operations],
        )
        .await?;
        self.inner.pools.make_durable().await
    }

    /// Locks a host whose forgeries, or trespasses, have come to the threshold; gives how many there were, if it was locked
    /// just now.
    pub async fn lock_for_refusals(
        &self,
        host_id: Uuid,
        is_trespass: bool,
        rule: LockRule,
    ) -> Result<Option<u64>, Problem> {
        let seconds = rule.window.as_secs_f64();
        let rows = self
            .own_rows(
                LOCK,
                &[
                    &host_id,
                    &seconds,
                    &i64::from(rule.threshold),
                    &TRESPASS.as_slice(),
                    &is_trespass,
                ],
            )
            .await?;
        self.inner.pools.make_durable().await?;
        Ok(rows.first().map(|row| unsigned(row.get(0))))
    }

    /// The newest verdicts on a host, the newest first.
    pub async fn verdicts(&self, host_id: Uuid, limit: u32) -> Result<Vec<VerdictRow>, Problem> {
        let rows = self.rows(LIST, &[&host_id, &i64::from(limit)]).await?;
        let verdict = |row: &tokio_postgres::Row| VerdictRow {
            at: row.get(0),
            verdict: row.get(1),
            rule: row.get(2),
            path: row.get(3),
            operation_id: row.get(4),
            details: row.get(5),
        };
        Ok(rows.iter().map(verdict).collect())
    }

    /// All verdicts on a host that are kept, by verdict and rule.
    pub async fn verdict_sums(&self, host_id: Uuid) -> Result<Vec<VerdictSum>, Problem> {
        let rows = self.rows(SUMS, &[&host_id]).await?;
        let sum = |row: &tokio_postgres::Row| VerdictSum {
            verdict: row.get(0),
            rule: row.get(1),
            rows: unsigned(row.get(2)),
            operations: unsigned(row.get(3)),
        };
        Ok(rows.iter().map(sum).collect())
    }
}
