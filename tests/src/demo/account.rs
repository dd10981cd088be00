//! Accounting for every operation, by what Postgres holds.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    path::Path,
    time::Duration,
};

use p2p_sync_proto::Position;
use p2p_sync_proxy::store::{Connection, Hnsw, Leases, Store, StoreConfig};

use uuid::Uuid;

use super::replay::Sent;
use crate::{
    recording::Happening,
    stack::{Agent, Said},
};

/// Where every operation went.
#[derive(Debug, Default)]
pub(super) struct Account {
    sent: usize,
    /// In memory alone when their agent was killed.
    unspooled: usize,
    /// Conflated: a newer operation of the path took their place.
    superseded: usize,
    acknowledged: usize,
    /// Of the acknowledged: the log's row, or the path at that version or a newer one.
    stored: usize,
    /// Acknowledged and not stored, or on disk and never settled.
    lost: usize,
    /// Rows of the log beyond one an operation.
    duplicated: usize,
}

impl Account {
    pub(super) fn adds_up(&self) -> bool {
        self.sent == self.unspooled + self.superseded + self.acknowledged
            && self.stored == self.acknowledged
            && self.lost == 0
            && self.duplicated == 0
            && self.superseded * 50 <= self.sent
    }
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "demo: sent={} unspooled={} superseded={} acknowledged={} stored={} lost={} duplicated={}",
            self.sent, self.unspooled, self.superseded, self.acknowledged, self.stored, self.lost, self.duplicated
        )
    }
}

/// What Postgres holds.
struct Held {
    logged: HashSet<String>,
    log_rows: usize,
    /// Version of the state of each path: a map is in one tenure throughout.
    states: HashMap<String, Position>,
    /// Which positions each host's messages settled.
    settled: HashMap<(Uuid, u64), Vec<(u64, u64)>>,
}

pub(super) fn account(database: &Path, agents: &[Agent], sent: &Sent, happenings: &[Happening]) -> Account {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime can be made");
    let held = runtime.block_on(read(database));
    let mut account = Account {
        duplicated: held.log_rows - held.logged.len(),
        ..Account::default()
    };
    for (tag, by) in sent.by.iter().enumerate() {
        account.sent += 1;
        let ledger = by.map(|host| agents[host].ledger());
        let known = ledger.as_ref().and_then(|ledger| {
            let id = ledger.ids.get(&(tag as u64))?;
            Some((id.clone(), ledger.said.get(id).cloned().unwrap_or_default()))
        });
        match known {
            Some((_, said)) if said.state == "SUPERSEDED" => account.superseded += 1,
            Some((id, said))
                if said.state == "APPLIED" || held.settles(by.map(|host| agents[host].host_id()), &said) =>
            {
                account.acknowledged += 1;
                if held.has(&id, &said, &happenings[tag]) {
                    account.stored += 1;
                } else {
                    account.lost += 1;
                }
            }
            Some((id, said)) if said.spooled => {
                let path = happenings[tag].path().unwrap_or_default();
                eprintln!(
                    "demo: operation {id} of {path} was on disk and is in state {}",
                    said.state
                );
                account.lost += 1;
            }
            _ => account.unspooled += 1,
        }
    }
    account
}

impl Held {
    /// Whether the hub settled an operation whose answer the killed agent could not tell of any more.
    fn settles(&self, host_id: Option<Uuid>, said: &Said) -> bool {
        let (Some(host_id), Some(position)) = (host_id, said.position) else {
            return false;
        };
        let ranges = self.settled.get(&(host_id, position.incarnation));
        ranges.is_some_and(|ranges| {
            ranges
                .iter()
                .any(|(first, last)| (*first..=*last).contains(&position.sequence))
        })
    }

    fn has(&self, id: &str, said: &Said, happening: &Happening) -> bool {
        if self.logged.contains(id) {
            return true;
        }
        let (Some(position), Some(path)) = (said.position, happening.path()) else {
            return false;
        };
        self.states.get(&path).is_some_and(|stored| *stored >= position)
    }
}

async fn read(database: &Path) -> Held {
    let config = StoreConfig {
        connection: Connection::Embedded(database.to_owned()),
        critical_connections: 1,
        bulk_connections: 1,
        statement_timeout: Duration::from_mins(1),
        bulk_statement_timeout: Duration::from_mins(1),
        embedding_dimensions: 1536,
        hnsw: Hnsw::default(),
        log_retention_days: 30,
        tombstone_retention_days: 30,
        leases: Leases {
            required: true,
            length: Duration::from_mins(1),
        },
    };
    let store = Store::connect(&config).await.expect("the hub has stopped");
    let client = store.reads().await.expect("a connection");
    let rows = |sql: &'static str| {
        let client = &client;
        async move { client.query(sql, &[]).await.expect("the schema is the hub's") }
    };
    let number = |number: i64| u64::try_from(number).expect("never negative");
    let logged = rows("SELECT operation_id::text FROM p2p_sync.operations").await;
    let states = rows("SELECT path, incarnation, sequence FROM p2p_sync.states").await;
    let settled = rows(
        "SELECT host_id, incarnation, lower(range), upper(range) - 1 \
         FROM p2p_sync.settled_sequences, unnest(settled) AS range",
    )
    .await;
    let mut held = Held {
        log_rows: logged.len(),
        logged: logged.iter().map(|row| row.get(0)).collect(),
        states: HashMap::new(),
        settled: HashMap::new(),
    };
    for row in &states {
        let position = Position {
            incarnation: number(row.get(1)),
            sequence: number(row.get(2)),
        };
        held.states.insert(row.get(0), position);
    }
    for row in &settled {
        let incarnation = (row.get(0), number(row.get(1)));
        held.settled
            .entry(incarnation)
            .or_default()
            .push((number(row.get(2)), number(row.get(3))));
    }
    drop(client);
    store.close().await;
    held
}
