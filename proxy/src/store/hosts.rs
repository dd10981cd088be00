//! The hosts that are enrolled, the outboxes they open, and the claim of the one proxy that works without Redis.

use deadpool_postgres::Object;
use p2p_sync_proto::{Code, Problem};
use tokio::task::JoinHandle;
use tokio_postgres::{Client, Row};
use uuid::Uuid;

use super::{Store, not_answering, signed, unavailable, unsigned};

const HOSTS: &str = "SELECT host_id, account_id, name, key_id, generation, status, lock_reason, \
    to_char(last_seen AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"'), next_key_id, \
    CASE WHEN renewed_at > now() - interval '60 seconds' THEN former_key_id END, role FROM p2p_sync.hosts";

/// Not for long: a host that writes much waits for itself, and others' questions for the connection.
const ONE_HELLO: &str = "SELECT set_config('lock_timeout', '1s', true), \
    pg_advisory_xact_lock(hashtextextended('p2p_sync hello ' || $1::uuid, 0))";

/// Seldom, for a row that changes every few seconds would be one to vacuum; and not while somebody changes the host.
const SEEN: &str = "UPDATE p2p_sync.hosts SET last_seen = now() WHERE host_id = ( \
    SELECT host_id FROM p2p_sync.hosts \
    WHERE host_id = $1 AND coalesce(last_seen < now() - interval '1 minute', true) FOR NO KEY UPDATE SKIP LOCKED)";

/// Held by one proxy of a database; any number that nothing else of the operator's locks. Where its machine vanishes, Postgres
/// gives it up within seconds.
const CLAIM: &str = "SELECT pg_try_advisory_lock(hashtextextended($1, 0))";
const CLAIM_ENDS: &str = "SET tcp_keepalives_idle = 2; SET tcp_keepalives_interval = 1; SET tcp_keepalives_count = 3";

/// Another outbox uses the incarnation, or has come further: two outboxes would count the same sequences.
const IS_CLONED: &str = "SELECT EXISTS (SELECT FROM p2p_sync.settled_sequences WHERE host_id = $1 \
    AND (incarnation > $2 OR incarnation = $2 AND opening_id <> $3))";

const OPEN: &str = "INSERT INTO p2p_sync.settled_sequences AS s (host_id, incarnation, opening_id) VALUES ($1, $2, $3) \
    ON CONFLICT (host_id, incarnation) DO UPDATE SET opening_id = excluded.opening_id \
        WHERE s.opening_id IS DISTINCT FROM excluded.opening_id";

/// As many as `open_incarnation` lets a host have.
const HAS_TOO_MANY: &str =
    "SELECT count(*) >= 4096 FROM p2p_sync.settled_sequences WHERE host_id = $1 AND incarnation <> $2";

/// The newest of the drained incarnations stands for all before it.
const CLOSE: &str = "UPDATE p2p_sync.settled_sequences AS s SET closed = true \
    WHERE host_id = $1 AND NOT closed AND incarnation = (SELECT max(incarnation) FROM p2p_sync.settled_sequences AS older \
        WHERE older.host_id = $1 AND older.incarnation < $2)";

/// For all hosts; a condition on `s` may follow.
pub(super) const FORGET_CLOSED: &str = "DELETE FROM p2p_sync.settled_sequences AS s WHERE EXISTS ( \
    SELECT FROM p2p_sync.settled_sequences AS newer \
    WHERE newer.host_id = s.host_id AND newer.incarnation > s.incarnation AND newer.closed)";

/// Whether a host may take part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostStatus {
    /// It may.
    Active,
    /// Its credential was seen in two places, it forged operations, or an operator said so; an operator decides.
    Locked,
    /// Never again.
    Revoked,
}

impl HostStatus {
    /// As the table holds it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Locked => "locked",
            Self::Revoked => "revoked",
        }
    }

    /// One that this build does not know lets nobody in.
    fn of(text: &str) -> Self {
        [Self::Active, Self::Revoked]
            .into_iter()
            .find(|status| status.as_str() == text)
            .unwrap_or(Self::Locked)
    }
}

/// What a host may do beyond writing the maps it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum HostRole {
    /// Nothing: a volunteer's machine.
    Host,
    /// A machine of the operator's own: it reports the metrics of other hosts, asks for maps for others, hands over and releases
    /// those of others, and holds the maps that nobody else fits.
    Hub,
}

impl HostRole {
    /// As the table holds it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Hub => "hub",
        }
    }

    /// One that this build does not know gives no rights.
    pub(super) fn of(text: &str) -> Self {
        if text == Self::Hub.as_str() {
            Self::Hub
        } else {
            Self::Host
        }
    }
}

/// A host as it was enrolled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostRow {
    /// Its identity.
    pub host_id: Uuid,
    /// The volunteer's game account; 0 for none.
    pub account_id: u32,
    /// For people.
    pub name: String,
    /// The master key that its keys are derived from.
    pub key_id: String,
    /// Of its credential, from 1.
    pub generation: u32,
    /// Whether it may take part.
    pub status: HostStatus,
    /// Why not, where it is locked.
    pub lock_reason: Option<String>,
    /// When it last said hello, UTC, to the minute.
    pub last_seen: Option<String>,
    /// Of the next generation's credential, where it was given out and not used yet.
    pub next_key_id: Option<String>,
    /// Of the generation before, for a minute after the renewal: what it sealed may still be on its way.
    pub former_key_id: Option<String>,
    /// What it may do beyond others.
    pub role: HostRole,
}

impl HostRow {
    fn of(row: &Row) -> Self {
        Self {
            host_id: row.get(0),
            account_id: u32::try_from(row.get::<_, i64>(1)).unwrap_or_default(),
            name: row.get(2),
            key_id: row.get(3),
            generation: u32::try_from(row.get::<_, i64>(4)).unwrap_or_default(),
            status: HostStatus::of(row.get(5)),
            lock_reason: row.get(6),
            last_seen: row.get(7),
            next_key_id: row.get(8),
            former_key_id: row.get(9),
            role: HostRole::of(row.get(10)),
        }
    }
}

impl Store {
    /// Enrols a host; enrolling one again changes nothing and gives what is there.
    pub async fn add_host(&self, host_id: Uuid, account_id: u32, name: &str, key_id: &str) -> Result<HostRow, Problem> {
        const ADD: &str = "INSERT INTO p2p_sync.hosts (host_id, account_id, name, key_id) VALUES ($1, $2, $3, $4) \
            ON CONFLICT (host_id) DO NOTHING";
        self.write(ADD, &[&host_id, &i64::from(account_id), &name, &key_id])
            .await?;
        self.host(host_id).await?.ok_or_else(not_answering)
    }

    /// All hosts, in the order they were enrolled.
    pub async fn hosts(&self) -> Result<Vec<HostRow>, Problem> {
        let rows = self
            .rows(&format!("{HOSTS} ORDER BY enrolled_at, host_id"), &[])
            .await?;
        Ok(rows.iter().map(HostRow::of).collect())
    }

    /// One host.
    pub async fn host(&self, host_id: Uuid) -> Result<Option<HostRow>, Problem> {
        let rows = self
            .own_rows(&format!("{HOSTS} WHERE host_id = $1"), &[&host_id])
            .await?;
        Ok(rows.first().map(HostRow::of))
    }

    /// Locks, revokes or readmits a host, and gives the status that it has now; `None` where there is no such host. One
    /// that is revoked gives its leases up and stays revoked, one that is locked keeps them until they run out.
    pub async fn set_host_status(&self, host_id: Uuid, status: HostStatus) -> Result<Option<HostStatus>, Problem> {
        const SET: &str = "SELECT p2p_sync.set_host_status($1, $2)";
        let rows = self.change(SET, &[&host_id, &status.as_str()]).await?;
        let now: Option<&str> = rows.first().and_then(|row| row.get(0));
        Ok(now.map(HostStatus::of))
    }

    /// Gives a host a role; false where there is no such host. Takes hold within 2 s.
    pub async fn set_host_role(&self, host_id: Uuid, role: HostRole) -> Result<bool, Problem> {
        const SET: &str = "UPDATE p2p_sync.hosts SET role = $2 WHERE host_id = $1";
        Ok(self.write(SET, &[&host_id, &role.as_str()]).await? > 0)
    }

    /// A statement that changes something and gives rows; durable when this returns.
    pub(super) async fn change(
        &self,
        sql: &str,
        values: &[&(dyn tokio_postgres::types::ToSql + Sync)],
    ) -> Result<Vec<Row>, Problem> {
        let rows = self.rows(sql, values).await?;
        self.inner.pools.make_durable().await?;
        Ok(rows)
    }

    pub(super) async fn write(
        &self,
        sql: &str,
        values: &[&(dyn tokio_postgres::types::ToSql + Sync)],
    ) -> Result<u64, Problem> {
        let client = self.reads().await?;
        let statement = client.prepare_cached(sql).await.map_err(|error| unavailable(&error))?;
        let rows = client
            .execute(&statement, values)
            .await
            .map_err(|error| unavailable(&error))?;
        self.inner.pools.make_durable().await?;
        Ok(rows)
    }

    /// Notes that a host has opened an outbox, and gives the hub's timeline.
    ///
    /// Incarnations before `oldest_incarnation` hold nothing any more and are closed. Refuses with `NOT_ENROLLED`,
    /// `OUTBOX_CLONED` (nothing may be sent: sequences would be counted twice), `TOO_MANY_GAPS` (too many older incarnations
    /// still hold something) or `HUB_UNAVAILABLE`.
    pub async fn hello(
        &self,
        host_id: Uuid,
        opening_id: Uuid,
        incarnation: u64,
        oldest_incarnation: u64,
    ) -> Result<u64, Problem> {
        let mut client = self.reads().await?;
        let opened = open(&mut client, host_id, opening_id, incarnation, oldest_incarnation).await;
        let timeline = opened.map_err(|error| unavailable(&error))??;
        self.inner.pools.make_durable().await?;
        Ok(timeline)
    }

    /// Claims the database for this proxy alone, until the claim is dropped (`SECOND_PROXY`, `DATABASE_UNREACHABLE`).
    pub async fn claim_single_proxy(&self) -> Result<Claim, Problem> {
        let claim = self.open_claim().await?;
        if claim.take("p2p_sync single proxy").await? {
            return Ok(claim);
        }
        Err(Problem::new(
            Code::SecondProxy,
            "another proxy uses this database, and without Redis they cannot tell each other what changed: \
             set redis_host for both, or stop the other one",
        ))
    }

    /// A connection of its own, by which this proxy may have something for itself; nothing is claimed yet.
    pub async fn open_claim(&self) -> Result<Claim, Problem> {
        let Some(primary) = &self.inner.pools.primary else {
            return Ok(Claim { held_by: None });
        };
        let connected = primary.connect("p2p-sync-proxy claim").await;
        let held_by = Some(connected.map_err(|error| unavailable(&error))?);
        Ok(Claim { held_by })
    }
}

/// The outer error is Postgres', the inner one is the host's.
async fn open(
    client: &mut Object,
    host_id: Uuid,
    opening_id: Uuid,
    incarnation: u64,
    oldest_incarnation: u64,
) -> Result<Result<u64, Problem>, tokio_postgres::Error> {
    let transaction = client.transaction().await?;
    // Two that say hello as the same host at once are told apart. The host's row is left alone: what a hello waits for, the
    // operator's word about the host would wait for too.
    transaction.execute(ONE_HELLO, &[&host_id]).await?;
    let host = transaction
        .query_opt("SELECT FROM p2p_sync.hosts WHERE host_id = $1", &[&host_id])
        .await?;
    if host.is_none() {
        return Ok(Err(Problem::new(
            Code::NotEnrolled,
            "this host is not enrolled here: ask the operator for a token (`p2p-sync-proxy hosts invite`)",
        )));
    }
    let incarnation = signed(incarnation);
    if transaction
        .query_one(IS_CLONED, &[&host_id, &incarnation, &opening_id])
        .await?
        .get(0)
    {
        return Ok(Err(Problem::new(
            Code::OutboxCloned,
            "another outbox has come further under this host's credential: enrol this machine anew if the credential is \
             in use elsewhere, or bring the newest outbox folder back if it was replaced by an older one",
        )));
    }
    transaction
        .execute(CLOSE, &[&host_id, &signed(oldest_incarnation).min(incarnation)])
        .await?;
    let forget = format!("{FORGET_CLOSED} AND s.host_id = $1");
    transaction.execute(&forget, &[&host_id]).await?;
    if transaction
        .query_one(HAS_TOO_MANY, &[&host_id, &incarnation])
        .await?
        .get(0)
    {
        return Ok(Err(Problem::new(
            Code::TooManyGaps,
            "too many earlier incarnations of this outbox are unfinished: send what they hold first, or enrol this machine anew",
        )));
    }
    transaction
        .execute(OPEN, &[&host_id, &incarnation, &opening_id])
        .await?;
    let hub = transaction.query_one("SELECT timeline FROM p2p_sync.hub", &[]).await?;
    transaction.commit().await?;
    client.execute(SEEN, &[&host_id]).await?;
    Ok(Ok(unsigned(hub.get(0))))
}

/// What only one proxy of a database has at a time. An embedded engine's data directory is locked anyway.
#[derive(Debug)]
pub struct Claim {
    held_by: Option<(Client, JoinHandle<()>)>,
}

impl Claim {
    /// Claims what has this name; false while another proxy has it.
    pub async fn take(&self, name: &str) -> Result<bool, Problem> {
        let Some((client, _)) = &self.held_by else {
            return Ok(true);
        };
        let taken = async {
            client.batch_execute(CLAIM_ENDS).await?;
            client.query_one(CLAIM, &[&name]).await
        };
        let row = taken.await.map_err(|error| unavailable(&error))?;
        Ok(row.get(0))
    }

    /// Returns when Postgres has given the claim up, because the connection that holds it broke; otherwise never.
    pub async fn lost(&mut self) {
        match &mut self.held_by {
            // Whether it ended or panicked, the connection is gone.
            Some((_, task)) => drop(task.await),
            None => std::future::pending().await,
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some((_, task)) = &self.held_by {
            task.abort();
        }
    }
}
