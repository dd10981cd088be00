//! A hub with a database of its own, the agents' settings, and what Postgres holds in the end.

use std::{
    collections::HashMap,
    net::SocketAddr,
    path::Path,
    sync::LazyLock,
    thread,
    time::{Duration, Instant},
};

use p2p_sync_agent::{Config, Priority, Submission};
use p2p_sync_proto::{Position, v1::SyncDataType};
use p2p_sync_tests::{
    services::{Database, database, free_port, shared_redis_url},
    stack::{Hub, HubDatabase},
};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio_postgres::{Client, NoTls, Row, types::ToSql};
use uuid::Uuid;

/// Hub and agent in one, as `demo hub …` and `demo agent …`.
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_demo");
/// For what happens by itself, on a machine that is busy with other things.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);

/// Agents are called from threads that may wait, as a map server calls them; what is async here runs on this.
static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().expect("a runtime can be made"));

/// Runs a future to its end, also inside of another.
pub(crate) fn run<F: Future>(future: F) -> F::Output {
    tokio::task::block_in_place(|| RUNTIME.block_on(future))
}

/// Looks every 10 ms until `holds`, and panics with `what` when it does not in [`PATIENCE`].
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < PATIENCE, "not so within {PATIENCE:?}: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// A hub, its database and a folder for all that belongs to it. Ends with this value.
pub(crate) struct World {
    pub(crate) hub: Hub,
    pub(crate) folder: TempDir,
    url: String,
    _database: Option<Database>,
}

impl World {
    /// A hub that serves, on a fresh database of the shared Postgres and on the shared Redis.
    pub(crate) fn new() -> Self {
        let mut world = Self::not_started();
        world.hub.start();
        world
    }

    /// As [`Self::new`], not started; its hosts can be admitted and its endpoint is known.
    pub(crate) fn not_started() -> Self {
        Self::not_started_with(&[])
    }

    /// As [`Self::not_started`], with these settings.
    pub(crate) fn not_started_with(settings: &[(&str, String)]) -> Self {
        let database = run(database());
        let url = database.url().to_owned();
        Self {
            _database: Some(database),
            ..Self::on(&url, &shared_redis_url(), settings)
        }
    }

    /// As [`Self::new`], with leases that run so many seconds.
    pub(crate) fn governed(lease_seconds: u64) -> Self {
        Self::with(&[
            ("leases", "required".to_owned()),
            ("lease_seconds", lease_seconds.to_string()),
        ])
    }

    /// As [`Self::new`], with settings of its own.
    pub(crate) fn with(settings: &[(&str, String)]) -> Self {
        let mut world = Self::not_started_with(settings);
        world.hub.start();
        world
    }

    /// A hub on given servers, not started.
    pub(crate) fn on(postgres_url: &str, redis_url: &str, settings: &[(&str, String)]) -> Self {
        let redis = redis_url.trim_start_matches("redis://").trim_end_matches('/');
        let (redis_host, redis_port) = redis.rsplit_once(':').expect("a URL with host and port");
        let mut all = vec![
            ("redis_host", redis_host.to_owned()),
            ("redis_port", redis_port.to_owned()),
        ];
        all.extend_from_slice(settings);
        Self::of(postgres_url, &all)
    }

    /// As [`Self::on`], with a Redis that the settings name.
    pub(crate) fn of(postgres_url: &str, settings: &[(&str, String)]) -> Self {
        let folder = tempfile::Builder::new()
            .prefix("p2p-sync-invariants-")
            .tempdir()
            .expect("a folder can be made");
        let mut all = vec![
            ("port", free_port().to_string()),
            ("redis_prefix", format!("t-{}", Uuid::new_v4().simple())),
        ];
        all.extend_from_slice(settings);
        let database = HubDatabase::Server(postgres_url.to_owned());
        let hub = Hub::new(Path::new(PROGRAM), &folder.path().join("hub"), &database, &all);
        Self {
            hub,
            folder,
            url: postgres_url.to_owned(),
            _database: None,
        }
    }

    /// A further proxy on the hub's database, Redis and keyring, with its settings, not started.
    pub(crate) fn another_proxy(&self) -> Hub {
        self.another_proxy_with(&[])
    }

    /// As [`Self::another_proxy`], with its Redis behind another address.
    pub(crate) fn another_proxy_by(&self, redis: SocketAddr) -> Hub {
        self.another_proxy_with(&[
            ("redis_host", redis.ip().to_string()),
            ("redis_port", redis.port().to_string()),
        ])
    }

    /// As [`Self::another_proxy`], with some settings of its own.
    fn another_proxy_with(&self, own: &[(&str, String)]) -> Hub {
        let conf = std::fs::read_to_string(self.hub.config()).expect("the hub has a configuration");
        let made = ["port", "pg_connection_string", "keyring_file"];
        let mut settings: Vec<(&str, String)> = conf
            .lines()
            .filter_map(|line| line.split_once(" = "))
            .filter(|(key, _)| !made.contains(key) && own.iter().all(|(name, _)| name != key))
            .map(|(key, value)| (key, value.to_owned()))
            .collect();
        settings.extend_from_slice(own);
        settings.push(("port", free_port().to_string()));
        let folder = self.folder.path().join(format!("proxy-{}", Uuid::new_v4().simple()));
        let proxy = Hub::new(
            Path::new(PROGRAM),
            &folder,
            &HubDatabase::Server(self.url.clone()),
            &settings,
        );
        self.hub.share_keyring(&proxy);
        proxy
    }

    /// A setting of the hub, if its configuration has it.
    pub(crate) fn setting(&self, key: &str) -> Option<String> {
        let conf = std::fs::read_to_string(self.hub.config()).expect("the hub has a configuration");
        let value = conf.lines().find_map(|line| line.strip_prefix(&format!("{key} = ")));
        value.map(str::to_owned)
    }

    /// Where the hub serves, or will.
    pub(crate) fn endpoint(&self) -> String {
        let port = self.setting("port").expect("set when it was made");
        format!("http://127.0.0.1:{port}")
    }

    /// The settings of an agent in this process, with a credential of its own.
    pub(crate) fn config(&self, settings: &str) -> Config {
        self.config_at(&self.endpoint(), settings)
    }

    /// As [`Self::config`], through something that stands before the hub.
    pub(crate) fn config_at(&self, endpoint: &str, settings: &str) -> Config {
        self.config_of(endpoint, &self.hub.add_host(1), settings)
    }

    /// As [`Self::config_at`], with the credential of a host that is there.
    pub(crate) fn config_of(&self, endpoint: &str, credential: &str, settings: &str) -> Config {
        let mut text =
            format!("main_server_endpoint = {endpoint}\nencryption_key = {credential}\nretry_delay_max_ms = 500\n");
        if !settings.contains("metrics_interval_seconds") {
            // What the hub holds is what a test made.
            text += "metrics_interval_seconds = 0\n";
        }
        let folder = self.folder.path().join(format!("agent-{}", Uuid::new_v4().simple()));
        Config::parse(&(text + settings), &folder, |_| None).expect("valid settings")
    }

    /// A new connection to the hub's database.
    pub(crate) fn client(&self) -> Client {
        let (client, connection) = run(tokio_postgres::connect(&self.url, NoTls)).expect("Postgres serves");
        // Ends when the client is dropped.
        RUNTIME.spawn(connection);
        client
    }

    /// The rows of a query.
    pub(crate) fn rows(&self, sql: &str, values: &[&(dyn ToSql + Sync)]) -> Vec<Row> {
        run(self.client().query(sql, values)).expect("valid SQL")
    }

    /// One number.
    pub(crate) fn count(&self, sql: &str) -> i64 {
        self.rows(sql, &[])[0].get(0)
    }

    /// What the hub's tables hold.
    pub(crate) fn held(&self) -> Held {
        let mut held = Held {
            logged: HashMap::new(),
            states: HashMap::new(),
        };
        for row in self.rows("SELECT operation_id, count(*) FROM p2p_sync.operations GROUP BY 1", &[]) {
            held.logged.insert(row.get(0), row.get(1));
        }
        for row in self.rows("SELECT path, incarnation, sequence FROM p2p_sync.states", &[]) {
            let number = |column| u64::try_from(row.get::<_, i64>(column)).expect("never negative");
            held.states.insert(
                row.get(0),
                Position {
                    incarnation: number(1),
                    sequence: number(2),
                },
            );
        }
        held
    }

    /// Panics if a row of the log is there twice, or `every` operations of a path stand in another order than they were
    /// made in.
    pub(crate) fn assert_log_is_in_order_without_duplicates(&self) {
        // The members of a group share its id.
        let twice = "SELECT count(*) FROM (SELECT FROM p2p_sync.operations \
            GROUP BY operation_id, path HAVING count(*) > 1) AS _";
        assert_eq!(self.count(twice), 0, "operations are in the log twice");
        let same_number = "SELECT count(*) FROM (SELECT FROM p2p_sync.operations \
            GROUP BY stream, stream_sequence HAVING count(*) > 1) AS _";
        assert_eq!(
            self.count(same_number),
            0,
            "two operations have one number in their stream"
        );
        let out_of_order = "SELECT count(*) FROM (SELECT (incarnation, sequence) AS version, \
                lag((incarnation, sequence)) OVER (PARTITION BY path, host_id ORDER BY stream_sequence) AS before \
            FROM p2p_sync.operations WHERE keeps_every) AS _ WHERE version <= before";
        assert_eq!(
            self.count(out_of_order),
            0,
            "`every` operations of a path are out of order"
        );
    }
}

/// What Postgres holds.
pub(crate) struct Held {
    /// Rows of the log by operation.
    pub(crate) logged: HashMap<Uuid, i64>,
    /// The version of each path.
    pub(crate) states: HashMap<String, Position>,
}

impl Held {
    /// The operation's row in the log, or its path at that version or a newer one.
    pub(crate) fn has(&self, operation_id: Uuid, path: &str, position: Position) -> bool {
        self.logged.contains_key(&operation_id) || self.states.get(path).is_some_and(|stored| *stored >= position)
    }

    /// Panics unless each of these is in the log, once, and nothing else is.
    pub(crate) fn assert_log_is(&self, accepted: &[Uuid]) {
        let missing = accepted.iter().filter(|id| !self.logged.contains_key(id)).count();
        assert_eq!(missing, 0, "of {} accepted operations are missing", accepted.len());
        assert_eq!(
            self.logged.len(),
            accepted.len(),
            "the log has operations that were not accepted"
        );
        assert!(
            self.logged.values().all(|&rows| rows == 1),
            "an operation is in the log twice"
        );
    }
}

/// A chat message: kept as `every`, by bulk; each character is a path.
pub(crate) fn chat(payload: &str) -> Submission<'_> {
    Submission {
        data_type: SyncDataType::ChatMessage,
        map: "prontera",
        account_id: 2_000_001,
        entity: None,
        char_id: None,
        payload: Some(payload),
        priority: Priority::ByType,
        notify: false,
    }
}

/// An item on the ground: kept as `latest`, by bulk, all of it logged.
pub(crate) fn drop_of(payload: &str) -> Submission<'_> {
    Submission {
        data_type: SyncDataType::ItemDrop,
        ..chat(payload)
    }
}

/// Something critical about the map: kept as `every`, one path.
pub(crate) fn event(payload: &str) -> Submission<'_> {
    Submission {
        data_type: SyncDataType::CriticalGameState,
        ..chat(payload)
    }
}
