//! Leases: which host writes which map. The right itself is checked where operations are written, by the database's own
//! function; here it is given, renewed and taken.

use std::time::{Duration, SystemTime};

use p2p_sync_proto::{Code, Problem};
use uuid::Uuid;

use super::{Standing, Store, signed, unsigned};

/// While the hub serves it says so at least so often; more often where leases are short.
const ALIVE_INTERVAL_MAX: Duration = Duration::from_secs(3);
const ALIVE_INTERVAL_MIN: Duration = Duration::from_millis(250);
/// Longer silence is time that the hub was away, in whose course hosts could not renew: a third of a lease, at most this.
const ALIVE_GAP_MAX: Duration = Duration::from_secs(10);
/// Whoever starts knows that it was.
const START_GAP: Duration = Duration::ZERO;

/// How maps are given to hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leases {
    /// A host writes the maps whose lease it holds; otherwise every host writes every map.
    pub required: bool,
    /// How long a lease runs after it was granted or renewed.
    pub length: Duration,
}

impl Leases {
    /// Between two notes that the hub serves.
    pub fn alive_interval(&self) -> Duration {
        (self.length / 8).clamp(ALIVE_INTERVAL_MIN, ALIVE_INTERVAL_MAX)
    }

    fn alive_gap(&self) -> Duration {
        (self.length / 3).clamp(2 * self.alive_interval(), ALIVE_GAP_MAX)
    }
}

/// Who holds a map, or held it last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assignment {
    /// Which map.
    pub map: String,
    /// Nobody, where it was released.
    pub host_id: Option<Uuid>,
    /// The host's name; empty where there is none.
    pub host_name: String,
    /// Of the last holder.
    pub tenure: u64,
    /// How much longer the lease runs; zero where it has run out.
    pub expires_in: Duration,
    /// Who keeps a copy.
    pub backups: Vec<Uuid>,
    /// Who helps.
    pub assistants: Vec<Uuid>,
    /// Who is to have it.
    pub successor: Option<Uuid>,
    /// How far its stream is.
    pub stream_head: u64,
}

/// One who held a map, the last one last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tenure {
    /// Its number.
    pub tenure: u64,
    /// Whose it was.
    pub host_id: Uuid,
    /// When it began.
    pub granted_at: SystemTime,
    /// When it ended, if it has.
    pub ended_at: Option<SystemTime>,
    /// How it ended, as `map_tenures` says it.
    pub ended_by: Option<String>,
}

impl Store {
    /// How maps are given to hosts.
    pub fn leases(&self) -> Leases {
        self.inner.leases
    }

    /// Gives a host the lease of a map, or more time where it is the holder; gives the tenure.
    ///
    /// Refuses with `NOT_FOUND` where the host is unknown, locked or revoked, and, unless `force`d, with
    /// `NOT_LEASE_HOLDER` while another host's lease runs.
    pub async fn grant_map(&self, map: &str, host_id: Uuid, force: bool) -> Result<u64, Problem> {
        const GRANT: &str = "SELECT granted, holder, holder_tenure, \
            greatest(extract(epoch FROM holder_until - clock_timestamp()), 0)::float8 \
            FROM p2p_sync.grant_map($1, $2, make_interval(secs => $3), $4)";
        // A lease that ran when the hub went away runs still.
        self.note_alive().await?;
        let seconds = self.inner.leases.length.as_secs_f64();
        let rows = self.change(GRANT, &[&map, &host_id, &seconds, &force]).await?;
        let row = rows.first().ok_or_else(super::not_answering)?;
        if row.get(0) {
            return Ok(unsigned(row.get(2)));
        }
        Err(match row.get::<_, Option<Uuid>>(1) {
            None => Problem::new(
                Code::NotFound,
                format!("there is no active host {host_id}: see `p2p-sync-proxy hosts list`"),
            ),
            Some(holder) => {
                let seconds = row.get::<_, f64>(3);
                let sentence = format!(
                    "host {holder} holds the lease of {map} for {seconds:.0} s more: wait until it ends, \
                     have it released (`maps release {map}`), or take it (`maps force {map} {host_id}`)"
                );
                Problem::new(Code::NotLeaseHolder, sentence)
            }
        })
    }

    /// Takes a map from its holder, whom it gives, if there is one.
    pub async fn release_map(&self, map: &str) -> Result<Option<Uuid>, Problem> {
        let rows = self.change("SELECT p2p_sync.release_map($1)", &[&map]).await?;
        Ok(rows.first().and_then(|row| row.get(0)))
    }

    /// All maps that are or were held, or one of them.
    pub async fn assignments(&self, map: Option<&str>) -> Result<Vec<Assignment>, Problem> {
        const LIST: &str = "SELECT a.map, a.host_id, coalesce(h.name, ''), a.tenure, \
                greatest(extract(epoch FROM a.expires_at - clock_timestamp()), 0)::float8, \
                a.backups, a.assistants, a.successor, coalesce(m.head, 0) \
            FROM p2p_sync.host_assignments AS a LEFT JOIN p2p_sync.hosts AS h USING (host_id) \
            LEFT JOIN p2p_sync.map_states AS m ON m.stream = a.map \
            WHERE a.map = coalesce($1, a.map) ORDER BY a.map";
        let rows = self.rows(LIST, &[&map]).await?;
        let of = |row: &tokio_postgres::Row| Assignment {
            map: row.get(0),
            host_id: row.get(1),
            host_name: row.get(2),
            tenure: unsigned(row.get(3)),
            expires_in: Duration::try_from_secs_f64(row.get(4)).unwrap_or_default(),
            backups: row.get(5),
            assistants: row.get(6),
            successor: row.get(7),
            stream_head: unsigned(row.get(8)),
        };
        Ok(rows.iter().map(of).collect())
    }

    /// Who held a map, one after the other.
    pub async fn tenures(&self, map: &str) -> Result<Vec<Tenure>, Problem> {
        const TENURES: &str = "SELECT tenure, host_id, granted_at, ended_at, ended_by FROM p2p_sync.map_tenures WHERE map = $1 \
            ORDER BY tenure";
        let rows = self.rows(TENURES, &[&map]).await?;
        let of = |row: &tokio_postgres::Row| Tenure {
            tenure: unsigned(row.get(0)),
            host_id: row.get(1),
            granted_at: row.get(2),
            ended_at: row.get(3),
            ended_by: row.get(4),
        };
        Ok(rows.iter().map(of).collect())
    }

    /// Renews all leases of a host, run out or not, and gives them, and what the host is asked to do.
    ///
    /// `REPLAY` where (incarnation, counter) is not newer than at the host's last renewal or change: then nothing is renewed.
    pub async fn renew_leases(&self, host_id: Uuid, incarnation: u64, counter: u64) -> Result<Standing, Problem> {
        const RENEW: &str = "SELECT p2p_sync.renew_leases($1, $2, $3, make_interval(secs => $4))";
        let seconds = self.inner.leases.length.as_secs_f64();
        // Not made durable in the embedded engine: one that is lost is made again after a third of the time.
        let rows = self
            .rows(RENEW, &[&host_id, &signed(incarnation), &signed(counter), &seconds])
            .await?;
        if !rows.first().ok_or_else(super::not_answering)?.get::<_, bool>(0) {
            return Err(Problem::new(
                Code::Replay,
                "this renewal, or a later request of this host, was made before: it renews nothing",
            ));
        }
        let mut standings = self.standings(&[host_id]).await?;
        Ok(standings.remove(&host_id).unwrap_or_default())
    }

    /// Notes that the hub serves, every few seconds. Leases that ran when it was noted last are made longer by the time that
    /// the hub was away since, if it was, which is given; none runs longer than [`Leases::length`] from now for it.
    pub async fn note_alive(&self) -> Result<Option<Duration>, Problem> {
        self.note(self.inner.leases.alive_gap()).await
    }

    /// As [`Self::note_alive`], when a proxy starts, before anything else. Where another one serves already, leases gain the
    /// few seconds between two of its notes.
    pub async fn note_start(&self) -> Result<Option<Duration>, Problem> {
        self.note(START_GAP).await
    }

    async fn note(&self, gap: Duration) -> Result<Option<Duration>, Problem> {
        const NOTE: &str = "SELECT extract(epoch FROM \
            p2p_sync.note_alive(make_interval(secs => $1), make_interval(secs => $2)))::float8";
        let (gap_s, lease_s) = (gap.as_secs_f64(), self.inner.leases.length.as_secs_f64());
        // Not made durable in the embedded engine: a note that is lost makes leases longer, never shorter.
        let rows = self.own_rows(NOTE, &[&gap_s, &lease_s]).await?;
        let away = rows.first().map_or(0.0, |row| row.get(0));
        let away = Duration::try_from_secs_f64(away).unwrap_or_default();
        Ok((away > gap).then_some(away))
    }
}
