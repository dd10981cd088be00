//! Whether Postgres can lose what it has acknowledged.

use p2p_sync_proto::Problem;

use super::{Store, not_answering};

/// Of replicas an account without the right to see them sees that they are there, and not what they confirm.
const SETTINGS: &str = "SELECT current_setting('fsync')::boolean, current_setting('synchronous_commit'), \
    current_setting('synchronous_standby_names') <> '', \
    (SELECT count(*) FROM pg_stat_get_wal_senders() WHERE pid IS NOT NULL), \
    (SELECT count(*) FROM pg_stat_replication WHERE sync_state IN ('sync', 'quorum')), \
    (SELECT count(*) FROM pg_stat_replication WHERE sync_state IS NULL)";

struct Settings {
    fsync: bool,
    synchronous_commit: String,
    names_standbys: bool,
    replicas: i64,
    confirming: i64,
    unseen: i64,
}

impl Store {
    /// Says it in a few words for the operator: what a crash can lose, and what a failover can.
    pub async fn durability(&self) -> Result<String, Problem> {
        let rows = self.rows(SETTINGS, &[]).await?;
        let row = rows.first().ok_or_else(not_answering)?;
        let settings = Settings {
            fsync: row.get(0),
            synchronous_commit: row.get(1),
            names_standbys: row.get(2),
            replicas: row.get(3),
            confirming: row.get(4),
            unseen: row.get(5),
        };
        Ok(settings.verdict())
    }
}

impl Settings {
    fn verdict(&self) -> String {
        let replicas = self.replicas;
        let confirms = match self.synchronous_commit.as_str() {
            "off" => {
                return "WARNING: a crash of Postgres can lose acknowledged commits: set synchronous_commit = on"
                    .to_owned();
            }
            "local" => "nothing",
            "remote_write" => "what it has received, not that it is on disk",
            _ => "",
        };
        if !self.fsync {
            "WARNING: a crash of the machine can lose acknowledged commits: set fsync = on".to_owned()
        } else if !self.names_standbys && replicas == 0 {
            "no replica is connected".to_owned()
        } else if !self.names_standbys {
            format!(
                "WARNING: {replicas} replicas follow without being waited for, so that a failover can lose acknowledged commits: \
                 set synchronous_standby_names"
            )
        } else if !confirms.is_empty() {
            format!(
                "WARNING: a replica confirms {confirms}, so that a failover can lose acknowledged commits: \
                 set synchronous_commit = on"
            )
        } else if self.confirming == 0 && self.unseen == 0 {
            "WARNING: no replica of synchronous_standby_names is connected, and commits wait for one".to_owned()
        } else {
            "replicas confirm each commit before it is acknowledged".to_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_way_to_lose_a_commit_is_told_with_what_to_set() {
        let safe = || Settings {
            fsync: true,
            synchronous_commit: "on".to_owned(),
            names_standbys: true,
            replicas: 1,
            confirming: 1,
            unseen: 0,
        };
        let with = |synchronous_commit: &str| Settings {
            synchronous_commit: synchronous_commit.to_owned(),
            ..safe()
        };
        let alone = |replicas| Settings {
            names_standbys: false,
            replicas,
            confirming: 0,
            ..safe()
        };
        for (settings, said) in [
            (safe(), "replicas confirm each commit"),
            (with("remote_apply"), "replicas confirm each commit"),
            (alone(0), "no replica is connected"),
            (alone(2), "WARNING: 2 replicas follow without being waited for"),
            (with("off"), "WARNING: a crash of Postgres"),
            (with("local"), "WARNING: a replica confirms nothing"),
            (with("remote_write"), "WARNING: a replica confirms what it has received"),
            (Settings { fsync: false, ..safe() }, "WARNING: a crash of the machine"),
            (
                Settings {
                    confirming: 0,
                    ..safe()
                },
                "WARNING: no replica of synchronous_standby_names",
            ),
            (
                Settings {
                    confirming: 0,
                    unseen: 1,
                    ..safe()
                },
                "replicas confirm each commit",
            ),
        ] {
            assert!(settings.verdict().starts_with(said), "{}", settings.verdict());
        }
    }
}
