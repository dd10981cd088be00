//! What hosts report of their load and links: the last report is a state like any, and what is kept of it here is its history.

use std::time::SystemTime;

use p2p_sync_proto::Problem;
use uuid::Uuid;

use super::Store;

/// Takes what hosts said since a minute ago at the earliest into the history, over what each said before that: a program that
/// says something of its own leaves the rest out. Only of the members that the schema knows: else the history of a host that makes
/// up ever new ones would grow with each report. However many proxies do it, and however often, a report is there once.
const RECORD: &str = "INSERT INTO p2p_sync.host_metrics (host_id, received_at, reported_by, metrics) \
    SELECT h.host_id, s.received_at, s.host_id, p2p_sync.known_metrics(coalesce(m.metrics, '{}') || s.payload) \
        FROM p2p_sync.hosts AS h \
        JOIN p2p_sync.states AS s ON s.path = '@host/' || h.host_id || '/HOST_METRICS' AND NOT s.deleted \
        LEFT JOIN LATERAL (SELECT metrics, received_at FROM p2p_sync.host_metrics WHERE host_id = h.host_id \
            ORDER BY received_at DESC LIMIT 1) AS m ON true \
        WHERE h.status = 'active' AND s.received_at > now() - interval '1 hour' AND jsonb_typeof(s.payload) = 'object' \
            AND coalesce(m.received_at <= s.received_at - interval '1 minute', true) \
    ON CONFLICT DO NOTHING";

/// A report of one host.
#[derive(Clone, Debug, PartialEq)]
pub struct MetricsRow {
    /// When it came.
    pub received_at: SystemTime,
    /// Whose word it is: the host's, or that of one in the hub's role.
    pub reported_by: Uuid,
    /// JSON.
    pub metrics: String,
}

impl Store {
    /// Takes new reports into the history; to be done every few seconds.
    pub async fn record_metrics(&self) -> Result<(), Problem> {
        // Not made durable in the embedded engine: the report is there, and its history is no promise.
        self.own_rows(RECORD, &[]).await.map(drop)
    }

    /// The last reports of a host, the newest first.
    pub async fn metrics(&self, host_id: Uuid, limit: u32) -> Result<Vec<MetricsRow>, Problem> {
        const METRICS: &str = "SELECT received_at, reported_by, metrics::text FROM p2p_sync.host_metrics WHERE host_id = $1 \
            ORDER BY received_at DESC LIMIT $2";
        let rows = self.rows(METRICS, &[&host_id, &i64::from(limit)]).await?;
        let of = |row: &tokio_postgres::Row| MetricsRow {
            received_at: row.get(0),
            reported_by: row.get(1),
            metrics: row.get(2),
        };
        Ok(rows.iter().map(of).collect())
    }
}
