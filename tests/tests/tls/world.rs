//! A hub that serves TLS, its hosts, and what it has stored.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::LazyLock,
    thread,
    time::{Duration, Instant},
};

use p2p_sync_proto::v1::SyncDataType;
use p2p_sync_tests::{
    edge::Place,
    recording::Happening,
    services::{Database, database, free_port, shared_redis_url},
    stack::{Agent, Hub, HubDatabase},
};
use serde_json::json;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio_postgres::NoTls;
use uuid::Uuid;

use crate::authority::{Authority, Claims};

/// Both programs in one.
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_demo");
/// For what happens by itself, on a machine that is busy with other things.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().expect("a runtime can be made"));

/// Looks every 20 ms until `holds`, and panics with `what` when it does not in [`PATIENCE`].
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < PATIENCE, "not so within {PATIENCE:?}: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// A hub with a database and a CA of its own. Ends with this value.
pub(crate) struct World {
    pub(crate) hub: Hub,
    pub(crate) ca: Authority,
    pub(crate) port: u16,
    pub(crate) folder: TempDir,
    database: Database,
}

impl World {
    /// A hub with a certificate for this machine, not started.
    pub(crate) fn new() -> Self {
        Self::with(&[("tls_cert", "hub.pem".to_owned()), ("tls_key", "hub.key".to_owned())])
    }

    /// A hub with these settings, and with a certificate beside its configuration.
    pub(crate) fn with(settings: &[(&str, String)]) -> Self {
        let database = RUNTIME.block_on(database());
        let folder = tempfile::Builder::new()
            .prefix("p2p-sync-tls-")
            .tempdir()
            .expect("a folder can be made");
        let (ca, port) = (Authority::new(), free_port());
        let mut all = vec![("port", port.to_string())];
        all.extend_from_slice(settings);
        let place = HubDatabase::Server(database.url().to_owned());
        let hub_folder = folder.path().join("hub");
        std::fs::create_dir(&hub_folder).expect("a folder can be made");
        ca.sign_into(&hub_folder, &Claims::default());
        Self {
            hub: Hub::new(Path::new(PROGRAM), &hub_folder, &place, &all),
            ca,
            port,
            folder,
            database,
        }
    }

    /// Two proxies on one database, keyring and Redis, neither started; the second one with its `address:port`.
    pub(crate) fn of_two() -> (Self, Hub, String) {
        let redis = shared_redis_url();
        let redis = redis.trim_start_matches("redis://").trim_end_matches('/');
        let (redis_host, redis_port) = redis.rsplit_once(':').expect("a URL with host and port");
        let mut settings = vec![
            ("redis_host", redis_host.to_owned()),
            ("redis_port", redis_port.to_owned()),
            ("redis_prefix", format!("t-{}", Uuid::new_v4().simple())),
        ];
        let world = Self::with(&settings);
        let port = free_port();
        settings.push(("port", port.to_string()));
        let place = HubDatabase::Server(world.database.url().to_owned());
        let other = Hub::new(
            Path::new(PROGRAM),
            &world.folder.path().join("other"),
            &place,
            &settings,
        );
        world.hub.share_keyring(&other);
        (world, other, format!("127.0.0.1:{port}"))
    }

    /// For an edge before the hub, by this name, with the hub's certificate and these values instead of the file's.
    pub(crate) fn place<'a>(&self, name: &str, others: &'a [(&'a str, &'a str)]) -> Place<'a> {
        Place {
            folder: self.folder.path().join(name),
            proxies: vec![format!("127.0.0.1:{}", self.port)],
            certificate: Some(self.hub_folder()),
            others,
        }
    }

    /// Where the hub's configuration and certificate are.
    pub(crate) fn hub_folder(&self) -> PathBuf {
        self.folder.path().join("hub")
    }

    /// A host with a credential of its own that trusts the hub's CA, not started.
    pub(crate) fn host(&self, name: &str, endpoint: &str) -> Agent {
        let ca = self.ca.file(self.folder.path());
        self.host_with(name, endpoint, &[("tls_ca", ca.display().to_string())])
    }

    /// As [`Self::host`], with settings of its own.
    pub(crate) fn host_with(&self, name: &str, endpoint: &str, settings: &[(&str, String)]) -> Agent {
        let credential = self.hub.add_host(1);
        let mut all = vec![("retry_delay_max_ms", "300".to_owned())];
        all.extend_from_slice(settings);
        Agent::new(
            Path::new(PROGRAM),
            &self.folder.path().join(name),
            endpoint,
            &credential,
            &all,
        )
    }

    /// Operations that took effect: each once, however often it came.
    pub(crate) fn stored(&self) -> i64 {
        let url = self.database.url().to_owned();
        RUNTIME.block_on(async move {
            let (client, connection) = tokio_postgres::connect(&url, NoTls).await.expect("Postgres serves");
            tokio::spawn(connection);
            let sql = "SELECT count(*), count(DISTINCT operation_id) FROM p2p_sync.operations";
            let row = client.query_one(sql, &[]).await.expect("the schema is there");
            let (all, distinct): (i64, i64) = (row.get(0), row.get(1));
            assert_eq!(all, distinct, "an operation took effect twice");
            all
        })
    }
}

/// Something that the hub logs each time.
pub(crate) fn chat(number: u64) -> Happening {
    Happening {
        at_ms: 0,
        data_type: SyncDataType::ChatMessage,
        map: "prontera".to_owned(),
        account_id: 2_000_001,
        entity: Some(format!("c{number}")),
        payload: Some(json!({"char_id": 150_001, "message": format!("hello {number}")}).to_string()),
    }
}

/// Why an agent's link is down, as `status` tells it; empty when it is up.
pub(crate) fn link_problem(agent: &mut Agent) -> String {
    let status = agent.ask(json!({"do": "status"}));
    status["link_problem"].as_str().unwrap_or_default().to_owned()
}

/// Waits until an agent says that it has a link.
pub(crate) fn until_up(agent: &mut Agent) {
    until("the link is up", || {
        agent.ask(json!({"do": "status"}))["link_up"] == true
    });
}

/// Runs a command of either program to its end; gives what it said and whether all was well.
pub(crate) fn run(program: &str, command: &[&str], config: &Path, variables: &[(&str, &Path)]) -> (String, bool) {
    let output = Command::new(PROGRAM)
        .arg(program)
        .args(command)
        .arg("--config")
        .arg(config)
        .envs(variables.iter().copied())
        .output()
        .expect("the program runs");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    (text(output.stdout) + &text(output.stderr), output.status.success())
}

/// By the critical lane of a running agent, waiting for the answer.
pub(crate) fn put_critical(agent: &Agent, users: u64) {
    let data = json!({ "users": users }).to_string();
    let put = ["put", "MAP_STATE", "--map", "prontera", data.as_str()];
    let (told, well) = run("agent", &put, agent.config(), &[]);
    assert!(well && told.contains("\"APPLIED\""), "{told}");
}
