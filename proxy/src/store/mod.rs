//! The hub's Postgres: what was committed here is settled, and nothing else is.
//!
//! `apply` writes a message by a `call` of the database's own function, `bisect` sets aside the operations that Postgres
//! refuses, `read` answers what readers ask, `streams` what subscribers follow, `hosts` knows the hosts and their outboxes,
//! `leases` says who writes which map, `maps` how maps change hands, `metrics` what hosts report of themselves, `players` who has
//! which player, `limbo` keeps what came too late for it, `edits` what the operator writes, `verdicts` what was found against hosts, `embeddings` the vectors of texts, `embedding_queue` what waits for one, `entries` what tools keep
//! among them, `reembed` makes them anew, `consumers` who brings what is committed into other databases, `feed_batch` what they
//! are told of it, `consuming` that they acknowledge, `schema` and `maintain` keep the tables, `pools` are the connections,
//! `primary` finds the server that takes writes, `durability` says what that can lose, and `embedded` runs a Postgres inside this
//! process where there is none outside.

mod apply;
mod bisect;
mod call;
mod consumers;
mod consuming;
mod durability;
mod edits;
#[cfg(feature = "embedded")]
mod embedded;
mod embedding_queue;
mod embeddings;
mod entries;
mod feed_batch;
mod hosts;
mod invitations;
mod leases;
mod limbo;
mod maintain;
mod maps;
mod metrics;
mod players;
mod pools;
mod primary;
mod read;
mod reembed;
mod renewal;
pub mod schema;
mod streams;
mod verdicts;

use std::{fmt, path::PathBuf, sync::Arc, time::Duration};

use deadpool_postgres::{GenericClient, Object, PoolError};
use p2p_sync_proto::{Code, Problem, envelope::Lane};
use tokio_postgres::{Row, error::SqlState, types::ToSql};
use uuid::Uuid;

pub use apply::Pace;
pub(crate) use call::without_nul;
pub(crate) use consumers::type_of;
pub use consumers::{Anew, Consumer, ConsumerFilter, ConsumerStream};
pub use consuming::ConsumerReader;
pub use edits::{ConflictFilter, ConflictMember, ConflictRow, HostSide, HubSide, Present, Take};
pub use embedding_queue::{
    Claim as EmbeddingClaim, Content, EligibleMaps, Embedded, QueueStatus, Release, Source, Spent,
};
pub use embeddings::{Found, Hnsw, Search, Space};
pub use entries::{Entry, NewEntry};
pub use feed_batch::{BATCH_CHANGES_MAX, Batch, Told};
pub use hosts::{Claim, HostRole, HostRow, HostStatus};
pub use invitations::{Enrolled, Invitation, InvitationRow, KeyUsers};
pub use leases::{Assignment, Leases, Tenure};
pub use limbo::{LimboFilter, LimboRow};
pub use maintain::Maintained;
pub use maps::{Duty, HandoverOrder, Lease, MapRow, RuleChange, STANDBY_MAX, Standing};
pub use metrics::MetricsRow;
pub(crate) use players::never_seen;
pub use players::{Player, PlayerTenure};
pub use pools::parse_url;
pub use read::StateRow;
pub use reembed::Progress;
pub use streams::{Changes, Head, Reader};
pub use verdicts::{VerdictRow, VerdictSum};

use crate::secret::Secret;
use pools::Pools;

/// Where the database is.
#[derive(Clone, Debug)]
pub enum Connection {
    /// A connection string, as a URL or as `key=value` pairs. May hold a password.
    Url(Secret),
    /// The data directory of a Postgres inside this process, made if it is not there.
    Embedded(PathBuf),
}

/// What the store needs to know.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// Where the database is.
    pub connection: Connection,
    /// Connections that critical messages have for themselves; at least 1. The embedded engine has one for everything.
    pub critical_connections: usize,
    /// Connections that bulk messages share; at least 1.
    pub bulk_connections: usize,
    /// How long Postgres may work on one critical message or read.
    pub statement_timeout: Duration,
    /// How long Postgres may work on one bulk message or on maintenance.
    pub bulk_statement_timeout: Duration,
    /// Of the vectors, when this proxy makes the schema; 1 to 4000.
    pub embedding_dimensions: u32,
    /// How vectors are searched.
    pub hnsw: Hnsw,
    /// How long logged operations are kept.
    pub log_retention_days: u32,
    /// How long tombstones are kept, and how old an outbox may be: what it still holds then is refused.
    pub tombstone_retention_days: u32,
    /// Who may write which map.
    pub leases: Leases,
}

/// The database did not decide: nothing may be said of the message, and it is sent again.
///
/// Some of it may be committed all the same; it is recognised when it comes again. Whoever caches what a message changes
/// has to forget it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(transparent)]
pub struct Unavailable(#[from] pub Problem);

impl From<Unavailable> for Problem {
    fn from(unavailable: Unavailable) -> Self {
        unavailable.0
    }
}

/// A pool for each lane over one database. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    pools: Pools,
    hub_id: Uuid,
    statement_timeout: Duration,
    bulk_statement_timeout: Duration,
    log_retention_days: u32,
    tombstone_retention_days: u32,
    leases: Leases,
}

impl Inner {
    fn statement_timeout(&self, lane: Lane) -> Duration {
        if lane == Lane::Critical {
            self.statement_timeout
        } else {
            self.bulk_statement_timeout
        }
    }
}

impl Store {
    /// Connects, and makes the schema if the database is empty.
    ///
    /// Refuses with `DATABASE_UNREACHABLE`, `DATA_DIRECTORY_IN_USE`, `SCHEMA_MISSING` (the database holds something else)
    /// or `SCHEMA_OUTDATED` (another version).
    pub async fn connect(config: &StoreConfig) -> Result<Self, Problem> {
        let pools = Pools::open(config).await?;
        let client = pools.reads().await.map_err(|error| unreachable(&error))?;
        schema::prepare(&client, schema::Vectors::of(config)).await?;
        pools.make_durable().await?;
        let hub = client
            .query_one("SELECT hub_id FROM p2p_sync.hub", &[])
            .await
            .map_err(|error| unavailable(&error))?;
        drop(client);
        Ok(Self {
            inner: Arc::new(Inner {
                pools,
                hub_id: hub.get(0),
                statement_timeout: config.statement_timeout,
                bulk_statement_timeout: config.bulk_statement_timeout,
                log_retention_days: config.log_retention_days,
                tombstone_retention_days: config.tombstone_retention_days,
                leases: config.leases,
            }),
        })
    }

    /// Brings the schema of a database up to this build's version, making it if the database is empty. Gives the version.
    pub async fn upgrade(config: &StoreConfig) -> Result<i32, Problem> {
        let pools = Pools::open(config).await?;
        let client = pools.reads().await.map_err(|error| unreachable(&error))?;
        let version = schema::upgrade(&client, schema::Vectors::of(config)).await;
        drop(client);
        pools.make_durable().await?;
        pools.close().await;
        version
    }

    /// The version of the schema that is there.
    pub async fn schema_version(&self) -> Result<i32, Problem> {
        let client = self.reads().await?;
        schema::version(&client).await?.ok_or_else(schema::missing)
    }

    /// This hub among others; made with the schema.
    pub fn hub_id(&self) -> Uuid {
        self.inner.hub_id
    }

    /// Changes when the database may have gone back.
    pub async fn timeline(&self) -> Result<u64, Problem> {
        let rows = self.rows("SELECT timeline FROM p2p_sync.hub", &[]).await?;
        rows.first().map(|row| unsigned(row.get(0))).ok_or_else(not_answering)
    }

    /// Closes all connections and stops the embedded engine. Other clones of the store are unavailable from then on.
    pub async fn close(&self) {
        self.inner.pools.close().await;
    }

    async fn lane(&self, lane: Lane) -> Result<Object, Unavailable> {
        let pools = &self.inner.pools;
        let taken = if lane == Lane::Critical {
            pools.critical().await
        } else {
            pools.bulk().await
        };
        taken.map_err(|error| {
            tracing::warn!(%error, ?lane, "no connection to Postgres");
            Unavailable(not_answering())
        })
    }

    /// A connection of the readers, for what the calls above do not ask.
    pub async fn reads(&self) -> Result<Object, Problem> {
        self.inner.pools.reads().await.map_err(|error| no_connection(&error))
    }

    /// What hosts ask, and the operator's commands.
    async fn rows(&self, sql: &str, values: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>, Problem> {
        query(&self.reads().await?, sql, values).await
    }

    /// What the hub asks for itself.
    async fn own_rows(&self, sql: &str, values: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>, Problem> {
        let client = self.inner.pools.own().await.map_err(|error| no_connection(&error))?;
        query(&client, sql, values).await
    }
}

async fn query(client: &impl GenericClient, sql: &str, values: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>, Problem> {
    let statement = client.prepare_cached(sql).await.map_err(|error| unavailable(&error))?;
    client
        .query(&statement, values)
        .await
        .map_err(|error| unavailable(&error))
}

fn no_connection(error: &PoolError) -> Problem {
    tracing::warn!(%error, "no connection to Postgres");
    not_answering()
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store")
            .field("hub_id", &self.inner.hub_id)
            .finish_non_exhaustive()
    }
}

/// What a host is told while Postgres does not serve. Why it does not is the operator's to read in the log.
fn not_answering() -> Problem {
    Problem::new(
        Code::HubUnavailable,
        "the hub's database does not answer now; try again later",
    )
}

/// Logs an error for the operator and gives what a host is told.
fn unavailable(error: &tokio_postgres::Error) -> Problem {
    tracing::warn!(error = %told(error), "Postgres failed");
    not_answering()
}

/// What the operator is told who starts a proxy.
fn unreachable(error: &deadpool_postgres::PoolError) -> Problem {
    let reason = match error {
        deadpool_postgres::PoolError::Backend(error) => told(error),
        other => other.to_string(),
    };
    Problem::new(
        Code::DatabaseUnreachable,
        format!("Postgres cannot be reached ({reason}): check pg_connection_string and that the server runs"),
    )
}

/// Postgres' own sentence without its detail, which quotes rows; for other errors the whole chain.
fn told(error: &tokio_postgres::Error) -> String {
    if let Some(database) = error.as_db_error() {
        return database.message().to_owned();
    }
    let cause = std::error::Error::source(error);
    cause.map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}"))
}

/// The class of an SQLSTATE: its first two characters.
fn class(state: &SqlState) -> &str {
    state.code().get(..2).unwrap_or_default()
}

/// Counters are `bigint` there and never negative.
fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or_default()
}

/// Counters beyond what validation lets pass cannot be told apart; nothing is made of one.
fn signed(number: u64) -> i64 {
    i64::try_from(number.min(crate::operation::COUNTER_MAX)).expect("COUNTER_MAX fits")
}
