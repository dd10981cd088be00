//! Maps that change hands: their rules, who stands by for them, and each step of a hand-over, which looks again, in its own
//! transaction, whether it may be.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use p2p_sync_proto::{Code, Problem, v1::duty::Role};
use tokio_postgres::{Row, types::ToSql};
use uuid::Uuid;

use super::{HostRole, Store, not_answering, signed, unsigned};
use crate::hosts::{
    Settings,
    assignment::{HostFacts, MapFacts, Rule, Step, World},
    handover::{COPY_NEAR, Handover},
    score::{Facts, WORD_KEPT, Word},
};

/// Backups, and assistants, of one map.
pub const STANDBY_MAX: u8 = 8;
/// What is told of a host's attendance holds for so long.
const ATTENDANCE_KEPT: Duration = Duration::from_secs(6);

/// Times that are over are below zero, and NULL is no time.
const MAPS: &str = "SELECT map, a.host_id, coalesce(a.tenure, 0), \
        extract(epoch FROM a.expires_at - clock_timestamp())::float8, \
        extract(epoch FROM clock_timestamp() - a.granted_at)::float8, \
        coalesce(a.backups, '{}'), coalesce(a.assistants, '{}'), a.successor, \
        extract(epoch FROM a.catch_up_until - clock_timestamp())::float8, \
        extract(epoch FROM a.hand_over_until - clock_timestamp())::float8, \
        coalesce(m.head, 0), r.automatic, r.backups, r.assistants, r.hosts, r.score_min \
    FROM p2p_sync.host_assignments AS a FULL JOIN p2p_sync.map_rules AS r USING (map) \
    LEFT JOIN LATERAL (SELECT head FROM p2p_sync.map_states WHERE stream = map) AS m ON true ORDER BY map";

const COPIES: &str = "SELECT map, host_id, sequence FROM p2p_sync.host_copies";

/// What a host said last, over what it said before that: a program that says something of its own leaves the rest out.
const HOSTS: &str = "SELECT h.host_id, h.role, coalesce(t.attended_at > now() - make_interval(secs => $1) AND NOT t.leaving, false), \
        coalesce(t.keeps_no_copies, false), extract(epoch FROM clock_timestamp() - r.renewed_at)::float8, \
        extract(epoch FROM now() - o.opened_at)::float8, l.lapses, \
        p2p_sync.known_metrics(coalesce(m.metrics, '{}') || coalesce(s.payload, '{}'))::text \
    FROM p2p_sync.hosts AS h JOIN p2p_sync.lease_renewals AS r USING (host_id) \
    LEFT JOIN p2p_sync.host_attendances AS t USING (host_id) \
    LEFT JOIN LATERAL (SELECT opened_at FROM p2p_sync.settled_sequences WHERE host_id = h.host_id \
        ORDER BY incarnation DESC LIMIT 1) AS o ON true \
    CROSS JOIN LATERAL (SELECT count(*) AS lapses FROM p2p_sync.map_tenures WHERE host_id = h.host_id \
        AND ended_by IN ('lapsed', 'late') AND ended_at > now() - interval '1 day') AS l \
    LEFT JOIN LATERAL (SELECT metrics FROM p2p_sync.host_metrics WHERE host_id = h.host_id \
        AND received_at > now() - make_interval(secs => $2) ORDER BY received_at DESC LIMIT 1) AS m ON true \
    LEFT JOIN LATERAL (SELECT payload FROM p2p_sync.states WHERE path = '@host/' || h.host_id || '/HOST_METRICS' \
        AND NOT deleted AND received_at > now() - make_interval(secs => $2)) AS s ON true \
    WHERE h.status = 'active' AND r.renewed_at > now() - interval '1 day' ORDER BY h.enrolled_at, h.host_id";

/// A lease as its holder is told of it.
#[derive(Clone, Debug)]
pub struct Lease {
    /// Which map.
    pub map: String,
    /// What the holder's operations carry.
    pub tenure: u64,
    /// How much longer it runs.
    pub expires_in: Duration,
    /// How far the map's stream was when the tenure began.
    pub stream_head: u64,
}

/// What a host is asked to do for a map.
#[derive(Clone, Debug)]
pub struct Duty {
    /// Which map.
    pub map: String,
    /// What.
    pub role: Role,
    /// Who holds it, or of a hand-over who is to have it.
    pub host_id: Option<Uuid>,
    /// Of the holder.
    pub tenure: u64,
    /// What is left of a hand-over's time.
    pub within: Duration,
}

/// All that a host holds and is asked to do.
#[derive(Clone, Debug, Default)]
pub struct Standing {
    /// In the order of their maps.
    pub leases: Vec<Lease>,
    /// Likewise.
    pub duties: Vec<Duty>,
    /// When this was read: times count from then.
    pub read: Option<Instant>,
}

impl Standing {
    /// With the time that has passed since it was read.
    #[must_use]
    pub fn now(mut self) -> Self {
        let passed = self.read.map_or(Duration::ZERO, |read| read.elapsed());
        for lease in &mut self.leases {
            lease.expires_in = lease.expires_in.saturating_sub(passed);
        }
        for duty in &mut self.duties {
            duty.within = duty.within.saturating_sub(passed);
        }
        self.read = Some(Instant::now());
        self
    }

    /// Whether the same is held and asked for, however much time is left of it.
    pub fn is_same(&self, other: &Self) -> bool {
        let lease = |lease: &Lease| (lease.map.clone(), lease.tenure);
        let duty = |duty: &Duty| (duty.map.clone(), duty.role, duty.host_id, duty.tenure);
        self.leases.iter().map(lease).eq(other.leases.iter().map(lease))
            && self.duties.iter().map(duty).eq(other.duties.iter().map(duty))
    }
}

/// A map as hosts see it.
#[derive(Clone, Debug)]
pub struct MapRow {
    /// Its name.
    pub map: String,
    /// Who holds it.
    pub host_id: Option<Uuid>,
    /// Of the last holder.
    pub tenure: u64,
    /// Zero where the lease has run out.
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

/// What is changed of a map's rule; what is left out stays.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RuleChange {
    /// Whether the hub gives it, and moves it.
    pub automatic: Option<bool>,
    /// How many keep a copy, at most [`STANDBY_MAX`].
    pub backups: Option<u8>,
    /// How many help, likewise.
    pub assistants: Option<u8>,
    /// Who may have it; empty: any host.
    pub hosts: Option<Vec<Uuid>>,
    /// What such a host scores at least, 0 to 100.
    pub score_min: Option<f64>,
}

/// What a hand-over is begun by.
#[derive(Clone, Copy, Debug)]
pub struct HandoverOrder<'a> {
    /// The host that asks for it; absent: the hub, or its operator.
    pub by: Option<Uuid>,
    /// Which map.
    pub map: &'a str,
    /// Who is to have it.
    pub to: Uuid,
    /// What that one scores.
    pub score: f64,
}

impl Store {
    /// What assignments are decided over.
    pub async fn world(&self) -> Result<World, Problem> {
        let (attendance_s, word_s) = (ATTENDANCE_KEPT.as_secs_f64(), WORD_KEPT.as_secs_f64());
        let hosts = self.own_rows(HOSTS, &[&attendance_s, &word_s]).await?;
        let mut world = World {
            maps: self.own_rows(MAPS, &[]).await?.iter().map(map_of).collect(),
            hosts: hosts.iter().map(host_of).collect(),
        };
        let mut copies: HashMap<String, HashMap<Uuid, u64>> = HashMap::new();
        for row in self.own_rows(COPIES, &[]).await? {
            copies
                .entry(row.get(0))
                .or_default()
                .insert(row.get(1), unsigned(row.get(2)));
        }
        for map in &mut world.maps {
            map.copies = copies.remove(&map.map).unwrap_or_default();
        }
        Ok(world)
    }

    /// Whether the hub has anything to do for maps by itself: rules, or hand-overs.
    pub async fn has_maps_to_assign(&self) -> Result<bool, Problem> {
        const ANY: &str = "SELECT EXISTS (SELECT FROM p2p_sync.map_rules) OR EXISTS (SELECT FROM p2p_sync.host_assignments \
            WHERE successor IS NOT NULL OR backups <> '{}' OR assistants <> '{}')";
        let rows = self.own_rows(ANY, &[]).await?;
        rows.first().map(|row| row.get(0)).ok_or_else(not_answering)
    }

    /// Tries what was decided; false where it did not come about, for things have changed since.
    pub async fn carry_out(&self, step: &Step, settings: &Settings) -> Result<bool, Problem> {
        let lease_s = settings.lease.as_secs_f64();
        let handover_s = settings.handover.as_secs_f64();
        match step {
            Step::Grant { map, to } => {
                const GRANT: &str = "SELECT granted FROM p2p_sync.grant_map($1, $2, make_interval(secs => $3), false)";
                // Whether the lease has run out is asked of this.
                self.note_alive().await?;
                self.tried(GRANT, &[map, to, &lease_s]).await
            }
            Step::Move { map, to } => {
                let (by, score) = (None, 0.0);
                let order = HandoverOrder {
                    by,
                    map,
                    to: *to,
                    score,
                };
                let begun = self.begin_handover(&order, settings).await;
                // Nothing of this is an error of whoever decided it.
                match begun {
                    Err(problem) if problem.code == Code::HubUnavailable => Err(problem),
                    begun => Ok(begun.is_ok()),
                }
            }
            Step::Ask { map, to } => {
                const ASK: &str = "SELECT p2p_sync.ask_to_hand_over($1, $2, make_interval(secs => $3))";
                self.tried(ASK, &[map, to, &handover_s]).await
            }
            Step::Take { map, to } => {
                const TAKE: &str = "SELECT p2p_sync.end_handover($1, $2, make_interval(secs => $3))";
                self.note_alive().await?;
                self.tried(TAKE, &[map, to, &lease_s]).await
            }
            Step::CallOff { map, to } => {
                const CALL_OFF: &str = "SELECT p2p_sync.cancel_handover($1, $2)";
                self.tried(CALL_OFF, &[map, to]).await
            }
            Step::Standby {
                map,
                tenure,
                backups,
                assistants,
            } => {
                const STANDBY: &str = "SELECT p2p_sync.set_standby($1, $2, $3, $4)";
                self.tried(STANDBY, &[map, &signed(*tenure), backups, assistants]).await
            }
        }
    }

    async fn tried(&self, sql: &str, values: &[&(dyn ToSql + Sync)]) -> Result<bool, Problem> {
        let rows = self.own_rows(sql, values).await?;
        self.inner.pools.make_durable().await?;
        rows.first().map(|row| row.get(0)).ok_or_else(not_answering)
    }

    /// Begins to hand a map over to a host.
    ///
    /// Refuses with `NOT_FOUND` (no such active host), `NOT_LEASE_HOLDER` (nobody holds the map, or another host than the one
    /// that asks), `NOT_ALLOWED` (by the map's rule), `BAD_REQUEST` (the host has it), `RATE_LIMITED` (it is being handed to
    /// another one).
    pub async fn begin_handover(&self, order: &HandoverOrder<'_>, settings: &Settings) -> Result<(), Problem> {
        const BEGIN: &str = "SELECT state, holder FROM p2p_sync.begin_handover($1, $2, $3, $4, \
            make_interval(secs => $5), make_interval(secs => $6), $7)";
        let HandoverOrder { by, map, to, score } = *order;
        let (catch_up_s, handover_s) = (settings.catch_up.as_secs_f64(), settings.handover.as_secs_f64());
        let near = signed(COPY_NEAR);
        let values: [&(dyn ToSql + Sync); 7] = [&by, &map, &to, &score, &catch_up_s, &handover_s, &near];
        let rows = self.change(BEGIN, &values).await?;
        let row = rows.first().ok_or_else(not_answering)?;
        let holder: Option<Uuid> = row.get(1);
        Err(match row.get::<_, &str>(0) {
            "begun" => return Ok(()),
            "free" => {
                let sentence = format!("nobody holds {map} now, so that nobody can hand it over: it is assigned");
                Problem::new(Code::NotLeaseHolder, sentence)
            }
            "not holder" => held_by_another(map, holder),
            "not allowed" => not_allowed(map, to),
            "holds it" => Problem::new(Code::BadRequest, format!("host {to} holds {map} already")),
            "busy" => {
                let sentence = format!("{map} is being handed over to another host: ask again when that is over");
                Problem::new(Code::RateLimited, sentence)
            }
            _ => unknown(to),
        })
    }

    /// Gives a map that nobody holds to a host that asks for it, or to one that a host in the hub's role names.
    ///
    /// Refuses with `NOT_LEASE_HOLDER` (who holds it is told), `NOT_ALLOWED` (by the map's rule), `RATE_LIMITED` (the host holds
    /// as many maps as it may), `NOT_FOUND` (no such active host).
    pub async fn ask_for_map(&self, by: Uuid, map: &str, to: Uuid, score: f64, maps_max: usize) -> Result<(), Problem> {
        const ASK: &str =
            "SELECT state, holder FROM p2p_sync.ask_for_map($1, $2, $3, $4, $5, make_interval(secs => $6))";
        self.note_alive().await?;
        let lease_s = self.inner.leases.length.as_secs_f64();
        let bound = i64::try_from(maps_max).unwrap_or(i64::MAX);
        let values: [&(dyn ToSql + Sync); 6] = [&by, &map, &to, &score, &bound, &lease_s];
        let rows = self.change(ASK, &values).await?;
        let row = rows.first().ok_or_else(not_answering)?;
        Err(match row.get::<_, &str>(0) {
            "granted" => return Ok(()),
            "held" => held_by_another(map, row.get(1)),
            "not allowed" => not_allowed(map, to),
            "full" => {
                let sentence = format!("host {to} holds {maps_max} maps, as many as it may: release one first");
                Problem::new(Code::RateLimited, sentence)
            }
            _ => unknown(to),
        })
    }

    /// Releases a map that a host holds under a tenure, or completes its hand-over; on the word of that host or of one in the
    /// hub's role. Said again, it is the same.
    ///
    /// Refuses with `NOT_LEASE_HOLDER` (who holds it is told) or `STALE_TENURE`.
    pub async fn give_map_up(&self, by: Uuid, map: &str, tenure: u64) -> Result<(), Problem> {
        const GIVE_UP: &str =
            "SELECT state, holder, holder_tenure FROM p2p_sync.give_map_up($1, $2, $3, make_interval(secs => $4))";
        let lease_s = self.inner.leases.length.as_secs_f64();
        let rows = self.change(GIVE_UP, &[&by, &map, &signed(tenure), &lease_s]).await?;
        let row = rows.first().ok_or_else(not_answering)?;
        Err(match row.get::<_, &str>(0) {
            "handed over" | "released" => return Ok(()),
            "stale" => {
                let now = row.get::<_, i64>(2);
                let sentence =
                    format!("{map} is held under tenure {now}, not {tenure}: renew the leases, and say it anew");
                Problem::new(Code::StaleTenure, sentence)
            }
            _ => held_by_another(map, row.get(1)),
        })
    }

    /// Counts a request of a host that changes something: `REPLAY` where it is not newer than the host's last one.
    pub async fn count_request(&self, host_id: Uuid, incarnation: u64, counter: u64) -> Result<(), Problem> {
        const COUNT: &str = "SELECT p2p_sync.count_request($1, $2, $3)";
        let rows = self
            .change(COUNT, &[&host_id, &signed(incarnation), &signed(counter)])
            .await?;
        if rows.first().is_some_and(|row| row.get(0)) {
            return Ok(());
        }
        let sentence = "this request, or a later one of this host, was made before: it changes nothing";
        Err(Problem::new(Code::Replay, sentence))
    }

    /// Refuses with `REPLAY` what is of an outbox that the host has opened again since.
    pub async fn check_incarnation(&self, host_id: Uuid, incarnation: u64) -> Result<(), Problem> {
        const IS_NEWEST: &str =
            "SELECT coalesce(max(incarnation) <= $2, true) FROM p2p_sync.settled_sequences WHERE host_id = $1";
        let rows = self.own_rows(IS_NEWEST, &[&host_id, &signed(incarnation)]).await?;
        if rows.first().is_some_and(|row| row.get(0)) {
            return Ok(());
        }
        let sentence = "the host has started again since this was said";
        Err(Problem::new(Code::Replay, sentence))
    }

    /// Notes how far a host's copies are; of maps that it does not stand by for nothing is taken.
    pub async fn note_copies(&self, host_id: Uuid, copies: &[(String, u64)]) -> Result<(), Problem> {
        const NOTE: &str = "SELECT p2p_sync.note_copies($1, $2, $3)";
        let (maps, sequences): (Vec<&str>, Vec<i64>) = copies
            .iter()
            .map(|(map, sequence)| (map.as_str(), signed(*sequence)))
            .unzip();
        self.change(NOTE, &[&host_id, &maps, &sequences]).await.map(drop)
    }

    /// Notes that hosts attend, as they said it when they began: who leaves, and who keeps no copies.
    pub async fn note_attendances(&self, attending: &[(Uuid, bool, bool)]) -> Result<(), Problem> {
        const NOTE: &str = "INSERT INTO p2p_sync.host_attendances AS a (host_id, leaving, keeps_no_copies) \
            SELECT DISTINCT ON (t.host_id) t.host_id, t.leaving, t.keeps_no_copies \
                FROM unnest($1::uuid[], $2::bool[], $3::bool[]) AS t(host_id, leaving, keeps_no_copies) \
                ORDER BY t.host_id, t.leaving DESC \
            ON CONFLICT (host_id) DO UPDATE SET attended_at = now(), leaving = excluded.leaving, \
                keeps_no_copies = excluded.keeps_no_copies";
        let hosts: Vec<Uuid> = attending.iter().map(|(host, ..)| *host).collect();
        let leaving: Vec<bool> = attending.iter().map(|(_, leaving, _)| *leaving).collect();
        let no_copies: Vec<bool> = attending.iter().map(|(.., none)| *none).collect();
        // Not made durable in the embedded engine: it is noted again in a moment.
        self.own_rows(NOTE, &[&hosts, &leaving, &no_copies]).await.map(drop)
    }

    /// Grows whenever a map changes hands, or who stands by for one.
    pub async fn assignment_changes(&self) -> Result<u64, Problem> {
        const CHANGES: &str = "SELECT coalesce(sum(changes), 0)::bigint FROM p2p_sync.host_assignments";
        let rows = self.own_rows(CHANGES, &[]).await?;
        rows.first().map(|row| unsigned(row.get(0))).ok_or_else(not_answering)
    }

    /// What hosts hold and are asked to do; a host that is not among the answers holds nothing.
    pub async fn standings(&self, hosts: &[Uuid]) -> Result<HashMap<Uuid, Standing>, Problem> {
        const STANDINGS: &str =
            "SELECT host, map, duty, tenure, left_ms, stream_head, other FROM p2p_sync.standing_of($1)";
        let read = Some(Instant::now());
        let mut standings: HashMap<Uuid, Standing> = HashMap::new();
        for row in self.own_rows(STANDINGS, &[&hosts]).await? {
            let standing = standings.entry(row.get(0)).or_default();
            standing.read = read;
            add_to(standing, &row);
        }
        Ok(standings)
    }

    /// Maps of these names or, where none is named, all that a host holds, stands by for or may be given, or all there are.
    pub async fn maps(&self, host_id: Uuid, all: bool, names: &[String], limit: u32) -> Result<Vec<MapRow>, Problem> {
        const LIST: &str = "SELECT map, a.host_id, coalesce(a.tenure, 0), \
                extract(epoch FROM a.expires_at - clock_timestamp())::float8, \
                coalesce(a.backups, '{}'), coalesce(a.assistants, '{}'), a.successor, coalesce(m.head, 0) \
            FROM p2p_sync.host_assignments AS a FULL JOIN p2p_sync.map_rules AS r USING (map) \
            LEFT JOIN LATERAL (SELECT head FROM p2p_sync.map_states WHERE stream = map) AS m ON true \
            WHERE CASE WHEN $3::text[] <> '{}' THEN map = ANY ($3) \
                ELSE $2 OR $1 = a.host_id OR $1 = ANY (a.backups || a.assistants || a.successor) \
                    OR r.hosts = '{}' OR $1 = ANY (r.hosts) END \
            ORDER BY map LIMIT $4";
        let rows = self.rows(LIST, &[&host_id, &all, &names, &i64::from(limit)]).await?;
        let of = |row: &Row| MapRow {
            map: row.get(0),
            host_id: row.get(1),
            tenure: unsigned(row.get(2)),
            expires_in: seconds(row.get(3)).unwrap_or_default(),
            backups: row.get(4),
            assistants: row.get(5),
            successor: row.get(6),
            stream_head: unsigned(row.get(7)),
        };
        Ok(rows.iter().map(of).collect())
    }

    /// The rules of all maps that have one, by their names.
    pub async fn map_rules(&self) -> Result<Vec<(String, Rule)>, Problem> {
        const RULES: &str =
            "SELECT map, automatic, backups, assistants, hosts, score_min FROM p2p_sync.map_rules ORDER BY map";
        let rows = self.rows(RULES, &[]).await?;
        Ok(rows
            .iter()
            .filter_map(|row| Some((row.get(0), rule_of(row, 1)?)))
            .collect())
    }

    /// Makes or changes a map's rule.
    pub async fn set_map_rule(&self, map: &str, change: &RuleChange) -> Result<(), Problem> {
        const SET: &str = "INSERT INTO p2p_sync.map_rules AS r (map, automatic, backups, assistants, hosts, score_min) \
            VALUES ($1, coalesce($2::bool, false), coalesce($3::smallint, 0), coalesce($4::smallint, 0), \
                coalesce($5::uuid[], '{}'), coalesce($6::float8, 0)) \
            ON CONFLICT (map) DO UPDATE SET automatic = coalesce($2, r.automatic), backups = coalesce($3, r.backups), \
                assistants = coalesce($4, r.assistants), hosts = coalesce($5, r.hosts), score_min = coalesce($6, r.score_min)";
        let (backups, assistants) = (change.backups.map(i16::from), change.assistants.map(i16::from));
        let values: [&(dyn ToSql + Sync); 6] = [
            &map,
            &change.automatic,
            &backups,
            &assistants,
            &change.hosts,
            &change.score_min,
        ];
        self.write(SET, &values).await.map(drop)
    }

    /// Takes a map's rule away; false where it has none.
    pub async fn drop_map_rule(&self, map: &str) -> Result<bool, Problem> {
        Ok(self
            .write("DELETE FROM p2p_sync.map_rules WHERE map = $1", &[&map])
            .await?
            > 0)
    }
}

fn add_to(standing: &mut Standing, row: &Row) {
    let map: String = row.get(1);
    let tenure = unsigned(row.get(3));
    let left = Duration::from_millis(unsigned(row.get(4)));
    let role = match row.get::<_, i16>(2) {
        0 => {
            standing.leases.push(Lease {
                map,
                tenure,
                expires_in: left,
                stream_head: unsigned(row.get(5)),
            });
            return;
        }
        1 => Role::Backup,
        2 => Role::Assistant,
        _ => Role::HandOver,
    };
    standing.duties.push(Duty {
        map,
        role,
        host_id: row.get(6),
        tenure,
        within: left,
    });
}

fn map_of(row: &Row) -> MapFacts {
    let handover = row.get::<_, Option<Uuid>>(7).map(|successor| Handover {
        successor,
        catch_up_left: seconds(row.get(8)).unwrap_or_default(),
        left: seconds(row.get(9)),
    });
    MapFacts {
        map: row.get(0),
        rule: rule_of(row, 11),
        holder: row.get(1),
        tenure: unsigned(row.get(2)),
        lease_left: seconds(row.get(3)).unwrap_or_default(),
        held_for: seconds(row.get(4)).unwrap_or_default(),
        backups: row.get(5),
        assistants: row.get(6),
        handover,
        copies: HashMap::new(),
        head: unsigned(row.get(10)),
    }
}

/// A rule in the columns from `first` on; none where they are NULL.
fn rule_of(row: &Row, first: usize) -> Option<Rule> {
    let many = |number: i16| usize::try_from(number).unwrap_or_default();
    Some(Rule {
        automatic: row.get::<_, Option<bool>>(first)?,
        backups: many(row.get(first + 1)),
        assistants: many(row.get(first + 2)),
        hosts: row.get(first + 3),
        score_min: row.get(first + 4),
    })
}

fn host_of(row: &Row) -> HostFacts {
    HostFacts {
        host_id: row.get(0),
        role: HostRole::of(row.get(1)),
        is_attending: row.get(2),
        keeps_no_copies: row.get(3),
        facts: Facts {
            word: word_of(row.get(7)),
            lapses: u32::try_from(row.get::<_, i64>(6)).unwrap_or(u32::MAX),
            uptime: seconds(row.get(5)).unwrap_or_default(),
            silence: seconds(row.get(4)).unwrap_or_default(),
        },
    }
}

/// What a host says of itself; what is no number is not said.
fn word_of(metrics: &str) -> Word {
    let said: serde_json::Value = serde_json::from_str(metrics).unwrap_or_default();
    let number = |member: &str| said[member].as_f64();
    Word {
        cpu_percent: number("cpu_percent"),
        ram_total_mb: number("ram_total_mb"),
        ram_free_mb: number("ram_free_mb"),
        upload_kbps: number("upload_kbps"),
        latency_ms: number("latency_ms"),
        disconnects: number("disconnects"),
        maps_max: said["maps_max"].as_u64().and_then(|maps| usize::try_from(maps).ok()),
    }
}

fn seconds(number: Option<f64>) -> Option<Duration> {
    number.map(|seconds| Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or_default())
}

fn held_by_another(map: &str, holder: Option<Uuid>) -> Problem {
    let sentence = match holder {
        Some(holder) => format!("host {holder} holds the lease of {map}"),
        None => format!("nobody holds the lease of {map}"),
    };
    Problem::new(Code::NotLeaseHolder, sentence)
}

fn not_allowed(map: &str, host_id: Uuid) -> Problem {
    let sentence =
        format!("the rule of {map} does not let host {host_id} have it: ask the operator (`maps rule {map}`)");
    Problem::new(Code::NotAllowed, sentence)
}

fn unknown(host_id: Uuid) -> Problem {
    Problem::new(Code::NotFound, format!("there is no active host {host_id}"))
}
