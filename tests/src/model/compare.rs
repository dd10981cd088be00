//! What the tables hold when all is settled, against the model: states, the log, what was set apart, and who has what.

use std::collections::{BTreeMap, BTreeSet};

use p2p_sync_proto::{Code, Position};
use p2p_sync_proxy::store::Store;
use tokio_postgres::{Row, types::ToSql};
use uuid::Uuid;

use super::{
    hub::{Logged, Origin, Written},
    play::{Difference, Play, same},
    world::keeps_every,
};

const STATES: &str = "SELECT path, tenure, host_id, incarnation, sequence, (payload ->> 'n')::bigint, hub_edit \
    FROM p2p_sync.states WHERE path = ANY ($1)";
/// In the order in which subscribers are told.
const LOG: &str = "SELECT path, tenure, host_id, incarnation, sequence, (payload ->> 'n')::bigint, hub_edit, superseded \
    FROM p2p_sync.operations WHERE operation_id = ANY ($1) ORDER BY stream, stream_sequence";
const LIMBO: &str = "SELECT host_id, incarnation, sequence FROM p2p_sync.limbo_operations WHERE host_id = ANY ($1)";
const REJECTED: &str =
    "SELECT host_id, incarnation, sequence, code FROM p2p_sync.rejected_operations WHERE host_id = ANY ($1)";
const CONFLICTS: &str = "SELECT host_id, path, hub_edit, operations FROM p2p_sync.conflicts WHERE host_id = ANY ($1)";
const MAPS: &str = "SELECT m.map, a.host_id, coalesce(a.tenure, 0), coalesce(s.head, 0) FROM unnest($1::text[]) AS m(map) \
    LEFT JOIN p2p_sync.host_assignments AS a ON a.map = m.map LEFT JOIN p2p_sync.map_states AS s ON s.stream = m.map";
const SEATS: &str = "SELECT char_id, account_id, map, host_id, tenure, left_at IS NULL FROM p2p_sync.presence \
    WHERE char_id = ANY ($1)";

impl Play {
    /// Compares everything that this run's world has in the tables.
    pub(super) async fn compare_all(&self) -> Result<(), Difference> {
        self.compare_states().await?;
        self.compare_log().await?;
        self.compare_apart().await?;
        self.compare_rights().await?;
        self.one_writer_a_tenure()?;
        self.each_in_the_order_it_was_made()
    }

    async fn compare_states(&self) -> Result<(), Difference> {
        let rows = ask(&self.store, STATES, &[&self.world.paths()]).await?;
        let found: BTreeMap<String, Written> = rows.iter().map(|row| (row.get(0), written(row))).collect();
        same("states", &found, &self.hub.states)
    }

    async fn compare_log(&self) -> Result<(), Difference> {
        let rows = ask(&self.store, LOG, &[&self.operation_ids]).await?;
        let found = rows.iter().map(|row| (written(row), row.get::<_, bool>(7)));
        let due = self
            .hub
            .log
            .iter()
            .map(|logged| (logged.written.clone(), logged.superseded));
        same("the log", &by_path(found), &by_path(due))
    }

    /// Limbo, what was rejected, and conflicts.
    async fn compare_apart(&self) -> Result<(), Difference> {
        let hosts = &self.world.hosts;
        let rows = ask(&self.store, LIMBO, &[hosts]).await?;
        let found: BTreeSet<Origin> = rows.iter().map(|row| (row.get(0), position(row, 1))).collect();
        same("limbo", &found, &self.hub.limbo.keys().copied().collect())?;

        let rows = ask(&self.store, REJECTED, &[hosts]).await?;
        let code = |row: &Row| Code::try_from(row.get::<_, i32>(3)).unwrap_or(Code::None);
        let found: BTreeMap<Origin, Code> = rows
            .iter()
            .map(|row| ((row.get(0), position(row, 1)), code(row)))
            .collect();
        same("what was rejected", &found, &self.hub.rejected)?;

        let rows = ask(&self.store, CONFLICTS, &[hosts]).await?;
        let key = |row: &Row| (row.get::<_, Uuid>(0), row.get::<_, String>(1), unsigned(row, 2));
        let found: BTreeMap<_, i64> = rows.iter().map(|row| (key(row), row.get(3))).collect();
        same("conflicts", &found, &self.hub.conflicts)
    }

    /// Who holds which map and how far its stream is, and where each player is.
    async fn compare_rights(&self) -> Result<(), Difference> {
        let rows = ask(&self.store, MAPS, &[&self.world.maps]).await?;
        let found = rows
            .iter()
            .map(|row| (row.get(0), (row.get(1), unsigned(row, 2), unsigned(row, 3))));
        let found: BTreeMap<String, (Option<Uuid>, u64, u64)> = found.collect();
        let due = self.world.maps.iter().map(|name| {
            let (holder, tenure) = self
                .hub
                .rights
                .maps
                .get(name)
                .map_or((None, 0), |map| (map.holder, map.tenure));
            (
                name.clone(),
                (holder, tenure, self.heads.get(name).copied().unwrap_or(0)),
            )
        });
        same("holders, tenures and heads of maps", &found, &due.collect())?;

        let characters: Vec<i64> = self.world.characters.iter().map(|one| one.id.cast_signed()).collect();
        let rows = ask(&self.store, SEATS, &[&characters]).await?;
        let seat = |row: &Row| {
            let (map, host, is_here): (String, Uuid, bool) = (row.get(2), row.get(3), row.get(5));
            (
                unsigned(row, 0),
                (unsigned(row, 1), map, host, unsigned(row, 4), is_here),
            )
        };
        let found: BTreeMap<_, _> = rows.iter().map(seat).collect();
        let due = self.hub.rights.seats.iter().map(|(character, seat)| {
            let account = u64::from(seat.account);
            (
                *character,
                (account, seat.map.clone(), seat.host, seat.tenure, seat.is_here),
            )
        });
        same("where players are", &found, &due.collect())
    }

    /// Whatever the model says: within one tenure one host writes a path.
    fn one_writer_a_tenure(&self) -> Result<(), Difference> {
        let mut writers: BTreeMap<(&str, u64), Uuid> = BTreeMap::new();
        let logged = self.hub.log.iter().filter(|one| !one.merged).map(|one| &one.written);
        // A state that the operator wrote has its edit for a position, or is in the log as merged.
        let merged: BTreeSet<Origin> = self.merged().map(|one| (one.written.host, one.written.at)).collect();
        let states = self.hub.states.values();
        let states = states.filter(|state| !state.host.is_nil() && !merged.contains(&(state.host, state.at)));
        for one in logged.chain(states) {
            let writer = *writers.entry((&one.path, one.tenure)).or_insert(one.host);
            if writer != one.host {
                return Err(format!(
                    "{} has two writers in tenure {}: {writer} and {}",
                    one.path, one.tenure, one.host
                ));
            }
        }
        Ok(())
    }

    fn merged(&self) -> impl Iterator<Item = &Logged> {
        self.hub.log.iter().filter(|one| one.merged)
    }

    /// Whatever the model says: of types kept as `every`, a host's operations on a path are logged as they were made.
    fn each_in_the_order_it_was_made(&self) -> Result<(), Difference> {
        let mut last: BTreeMap<(&str, Uuid), Position> = BTreeMap::new();
        for Logged { written, merged, .. } in &self.hub.log {
            if *merged || !keeps_every(&written.path) {
                continue;
            }
            let before = last.insert((&written.path, written.host), written.at);
            if before.is_some_and(|before| before >= written.at) {
                return Err(format!("{written:?} is logged behind {before:?}"));
            }
        }
        Ok(())
    }
}

async fn ask(store: &Store, sql: &str, values: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>, Difference> {
    let client = store.reads().await.map_err(|problem| problem.to_string())?;
    let statement = client.prepare_cached(sql).await.map_err(|error| error.to_string())?;
    client
        .query(&statement, values)
        .await
        .map_err(|error| error.to_string())
}

fn written(row: &Row) -> Written {
    Written {
        path: row.get(0),
        tenure: unsigned(row, 1),
        host: row.get(2),
        at: position(row, 3),
        number: row.get(5),
        edit: unsigned(row, 6),
    }
}

fn position(row: &Row, column: usize) -> Position {
    Position {
        incarnation: unsigned(row, column),
        sequence: unsigned(row, column + 1),
    }
}

fn unsigned(row: &Row, column: usize) -> u64 {
    row.get::<_, i64>(column).cast_unsigned()
}

/// Streams do not compare with one another; a path's rows are in the order of its stream.
fn by_path(rows: impl Iterator<Item = (Written, bool)>) -> BTreeMap<String, Vec<(Written, bool)>> {
    let mut paths: BTreeMap<String, Vec<(Written, bool)>> = BTreeMap::new();
    for row in rows {
        paths.entry(row.0.path.clone()).or_default().push(row);
    }
    paths
}
