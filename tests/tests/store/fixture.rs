//! A hub with a database of its own, and operations to send to it.

use std::{collections::BTreeMap, time::Duration};

use p2p_sync_proto::{Path, Position, envelope::Lane, ids::new_id, policy::Keep, v1};
use p2p_sync_proxy::{
    operation::{Committed, ConflictRule, History, Outcome, Refused, Valid, ValidOp},
    store::{Connection, Hnsw, Leases, Store, StoreConfig},
};
use p2p_sync_tests::services::{Database, database};
use tokio_postgres::Client;
use uuid::Uuid;

/// A store on an empty database of its own.
pub(crate) struct Hub {
    pub(crate) store: Store,
    pub(crate) database: Database,
    /// A second way to look at the tables.
    pub(crate) sql: Client,
}

impl Hub {
    pub(crate) async fn new() -> Self {
        Self::with(|_| ()).await
    }

    /// One that lets hosts write the maps they hold, and no others.
    pub(crate) async fn governed() -> Self {
        Self::with(|config| config.leases.required = true).await
    }

    pub(crate) async fn with(change: impl FnOnce(&mut StoreConfig)) -> Self {
        let database = database().await;
        let mut config = config(database.url());
        change(&mut config);
        let store = Store::connect(&config).await.expect("an empty database is taken");
        let sql = database.client().await;
        Self { store, database, sql }
    }

    /// Applies a message of a host by the bulk lane.
    pub(crate) async fn apply(&self, host_id: Uuid, ops: Vec<ValidOp>) -> Committed {
        self.store.apply(&message(host_id, ops)).await.expect("Postgres serves")
    }

    /// One number by SQL.
    pub(crate) async fn count(&self, sql: &str) -> i64 {
        self.sql.query_one(sql, &[]).await.expect("valid SQL").get(0)
    }

    /// The payload of a path, and whether it is a tombstone.
    pub(crate) async fn state(&self, path: &str) -> Option<(Option<String>, bool)> {
        let row = self.store.get(&path_of(path)).await.expect("Postgres serves")?;
        Some((row.payload, row.deleted))
    }

    pub(crate) async fn host(&self) -> Uuid {
        let host_id = Uuid::new_v4();
        self.store
            .add_host(host_id, 7, "a host", "k1")
            .await
            .expect("Postgres serves");
        host_id
    }
}

pub(crate) fn config(url: &str) -> StoreConfig {
    StoreConfig {
        connection: Connection::Url(url.into()),
        critical_connections: 2,
        bulk_connections: 8,
        statement_timeout: Duration::from_secs(10),
        bulk_statement_timeout: Duration::from_secs(30),
        embedding_dimensions: 8,
        hnsw: Hnsw::default(),
        log_retention_days: 30,
        tombstone_retention_days: 30,
        leases: Leases {
            required: false,
            length: Duration::from_mins(1),
        },
    }
}

pub(crate) fn path_of(path: &str) -> Path {
    Path::parse(path).expect("a valid path")
}

pub(crate) fn at(incarnation: u64, sequence: u64) -> Position {
    Position { incarnation, sequence }
}

/// A PUT of `{"n": sequence}` in incarnation 1, kept as `latest` and not logged.
pub(crate) fn put(path: &str, sequence: u64) -> ValidOp {
    ValidOp {
        index: 0,
        operation_id: new_id(),
        tenure: 1,
        position: at(1, sequence),
        path: path_of(path),
        data_type: path_of(path).parts().data_type,
        keep: Keep::Latest,
        history: History::Off,
        deleted: false,
        account_id: 2_000_001,
        map: "prontera".to_owned(),
        hub_edit_seen: 0,
        conflict_rule: ConflictRule::Hub,
        predecessor: None,
        presence: None,
        made_at_ms: 1_700_000_000_000,
        payload: Some(format!("{{\"n\": {sequence}}}")),
        in_group: false,
        embedded: false,
        step: None,
    }
}

pub(crate) fn delete(path: &str, sequence: u64) -> ValidOp {
    ValidOp {
        deleted: true,
        payload: None,
        ..put(path, sequence)
    }
}

/// An operation that counts beside the others of its path, after `predecessor` of the same incarnation.
pub(crate) fn every(path: &str, sequence: u64, predecessor: Option<u64>) -> ValidOp {
    ValidOp {
        keep: Keep::Every,
        predecessor: predecessor.map(|before| at(1, before)),
        ..put(path, sequence)
    }
}

pub(crate) fn message(host_id: Uuid, mut ops: Vec<ValidOp>) -> Valid {
    for (index, op) in ops.iter_mut().enumerate() {
        op.index = u32::try_from(index).expect("few");
    }
    Valid {
        host_id,
        lane: Lane::Bulk,
        ops,
        refused: vec![],
        withdrawn: vec![],
    }
}

/// What validation refused, at the end of the message.
pub(crate) fn refused(index: u32, position: Option<Position>, problem: p2p_sync_proto::Problem) -> Refused {
    Refused {
        index,
        operation_id: new_id(),
        position,
        follows: vec![],
        path: "not \0 a path".to_owned(),
        data_type: 99,
        payload: vec![0xff, 0],
        problem,
    }
}

pub(crate) fn withdrawn(first: u64, last: u64) -> v1::SequenceRange {
    v1::SequenceRange {
        incarnation: 1,
        first,
        last,
    }
}

/// The outcomes in the order of the message, in short: `applied`, `superseded`, `not yet`, or the code.
pub(crate) fn told(committed: &Committed) -> Vec<&'static str> {
    let by_index: BTreeMap<u32, &Outcome> = committed
        .outcomes
        .iter()
        .map(|(index, outcome)| (*index, outcome))
        .collect();
    assert_eq!(
        by_index.len(),
        committed.outcomes.len(),
        "an operation is told of twice"
    );
    by_index
        .into_values()
        .map(|outcome| match outcome {
            Outcome::Applied { .. } => "applied",
            Outcome::Superseded => "superseded",
            Outcome::NotYet => "not yet",
            Outcome::HeldBack => "held back",
            Outcome::Limbo(_) => "limbo",
            Outcome::Rejected(problem) => problem.code.label(),
        })
        .collect()
}

/// The `n` of each payload.
pub(crate) fn numbers<'a>(payloads: impl IntoIterator<Item = &'a Option<String>>) -> Vec<u64> {
    payloads
        .into_iter()
        .map(|payload| {
            let json: serde_json::Value = serde_json::from_str(payload.as_deref().expect("a payload")).expect("JSON");
            json["n"].as_u64().expect("a number")
        })
        .collect()
}
