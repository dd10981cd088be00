//! Whether the hub holds what the sample says was taken.

use std::collections::HashMap;

use p2p_sync_proto::{Policies, policy::Keep, v1::SyncDataType};
use serde::Serialize;

use crate::services::Database;

/// What was taken, against what Postgres holds.
#[derive(Debug, Default, Serialize)]
pub(super) struct Account {
    /// By the calls of the sample.
    pub(super) taken: u64,
    /// Sequences that the hub has decided for good: applied, or told as superseded.
    pub(super) settled: u64,
    /// Refused by the hub.
    pub(super) rejected: u64,
    /// Events of types kept as `every`, taken and logged.
    pub(super) every_taken: u64,
    pub(super) every_logged: u64,
    pub(super) every_duplicated: u64,
    /// Paths that hold the newest of their events, and of them those where the hub has another or none.
    pub(super) paths: u64,
    pub(super) paths_wrong: u64,
}

/// What a path should hold.
#[derive(Debug, PartialEq, Eq)]
enum Held {
    Serial(u64),
    Removed,
}

impl Account {
    /// Reads the sample's ledger and the hub's database, which has no other host's data.
    pub(super) async fn of(ledger: &str, database: &Database) -> Self {
        let mut account = Self::default();
        let mut paths = HashMap::new();
        let policies = Policies::builtin();
        for line in ledger.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            match words[..] {
                ["taken", data_type, count] => {
                    let number: i32 = data_type.parse().expect("a type's number");
                    let data_type = SyncDataType::try_from(number).expect("a type");
                    let count: u64 = count.parse().expect("a count");
                    account.taken += count;
                    if policies.of(data_type).keep == Keep::Every {
                        account.every_taken += count;
                    }
                }
                [path, "removed"] => {
                    paths.insert(path.to_owned(), Held::Removed);
                }
                [path, serial] => {
                    paths.insert(path.to_owned(), Held::Serial(serial.parse().expect("a serial")));
                }
                _ => panic!("the ledger has the line {line:?}"),
            }
        }
        account.paths = paths.len() as u64;
        account.read(database, &paths).await;
        account
    }

    async fn read(&mut self, database: &Database, paths: &HashMap<String, Held>) {
        let client = database.client().await;
        let one = async |query: &str| -> u64 {
            let row = client.query_one(query, &[]).await.expect("the hub's schema");
            u64::try_from(row.get::<_, i64>(0)).expect("never negative")
        };
        self.settled = one("SELECT coalesce(sum(upper(range) - lower(range)), 0)::bigint
             FROM p2p_sync.settled_sequences, unnest(settled) AS range")
        .await;
        self.rejected = one("SELECT count(*) FROM p2p_sync.rejected_operations").await;
        self.every_logged = one("SELECT count(DISTINCT operation_id) FROM p2p_sync.operations WHERE keeps_every").await;
        let rows = one("SELECT count(*) FROM p2p_sync.operations WHERE keeps_every").await;
        self.every_duplicated = rows - self.every_logged;
        let states = client
            .query(
                "SELECT path, deleted, coalesce((payload->>'n')::bigint, 0) FROM p2p_sync.states WHERE NOT keeps_every",
                &[],
            )
            .await
            .expect("the hub's schema");
        let mut right = 0;
        for state in states {
            let held = if state.get(1) {
                Held::Removed
            } else {
                Held::Serial(u64::try_from(state.get::<_, i64>(2)).expect("never negative"))
            };
            right += u64::from(paths.get(state.get::<_, &str>(0)) == Some(&held));
        }
        self.paths_wrong = self.paths - right;
    }

    /// What does not add up, in words.
    pub(super) fn failures(&self) -> Vec<String> {
        let mut failures = Vec::new();
        if self.settled != self.taken {
            failures.push(format!(
                "{} operations were taken and {} are settled",
                self.taken, self.settled
            ));
        }
        if self.every_logged != self.every_taken {
            failures.push(format!(
                "{} operations that count each were taken and {} are in the log",
                self.every_taken, self.every_logged
            ));
        }
        for (count, what) in [
            (self.rejected, "operations were refused by the hub"),
            (self.every_duplicated, "operations are in the log twice"),
            (self.paths_wrong, "paths do not hold the newest that was taken"),
        ] {
            if count > 0 {
                failures.push(format!("{count} {what}"));
            }
        }
        failures
    }
}
