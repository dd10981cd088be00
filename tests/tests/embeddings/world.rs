//! A hub with a provider behind HTTP, and hosts that say something on its maps.

use std::{
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use p2p_sync_proto::policy::parse_type;
use p2p_sync_proxy::embed::ProviderSettings;
use p2p_sync_tests::{
    embedding_server::EmbeddingServer,
    embeddings::open,
    recording::Happening,
    services::{Database, database, shared_redis_url},
    stack::{Agent, Hub, HubDatabase, is_settled},
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio_postgres::Client;
use uuid::Uuid;

use crate::remote::KEY;

/// Hub and agent in one, as `demo hub …` and `demo agent …`.
const PROGRAM: &str = env!("CARGO_BIN_EXE_demo");
/// For what happens by itself, on a machine that is busy with other things.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);
pub(crate) const DIMENSIONS: usize = 64;

pub(crate) struct World {
    pub(crate) hub: Hub,
    pub(crate) server: EmbeddingServer,
    pub(crate) sql: Client,
    pub(crate) folder: TempDir,
    settings: Vec<(&'static str, String)>,
    database: Database,
}

impl World {
    /// A hub that does not serve yet, with settings of its own.
    pub(crate) async fn not_started(settings: &[(&'static str, String)]) -> Self {
        let server = EmbeddingServer::start(open(ProviderSettings::Lexical, DIMENSIONS).await, KEY).await;
        let redis = shared_redis_url();
        let redis = redis.trim_start_matches("redis://").trim_end_matches('/');
        let (redis_host, redis_port) = redis.rsplit_once(':').expect("a URL with host and port");
        let mut all = vec![
            ("redis_host", redis_host.to_owned()),
            ("redis_port", redis_port.to_owned()),
            ("redis_prefix", format!("t-{}", Uuid::new_v4().simple())),
            ("embedding_provider", "openai".to_owned()),
            ("embedding_base_url", format!("{}/v1", server.url())),
            ("embedding_api_key", KEY.to_owned()),
            ("embedding_model", "the-model".to_owned()),
            ("embedding_dimensions", DIMENSIONS.to_string()),
            ("embedding_timeout_ms", "2000".to_owned()),
        ];
        all.retain(|(key, _)| !settings.iter().any(|(other, _)| other == key));
        all.extend_from_slice(settings);
        let database = database().await;
        let folder = tempfile::tempdir().expect("a folder can be made");
        let on = HubDatabase::Server(database.url().to_owned());
        let hub = Hub::new(Path::new(PROGRAM), &folder.path().join("hub"), &on, &all);
        let sql = database.client().await;
        Self {
            hub,
            server,
            sql,
            folder,
            settings: all,
            database,
        }
    }

    /// A hub that serves, and embeds what happens on some maps.
    pub(crate) async fn embedding(maps: &str, settings: &[(&'static str, String)]) -> Self {
        let mut all = vec![("vector_eligible_maps", maps.to_owned())];
        all.extend_from_slice(settings);
        let mut world = Self::not_started(&all).await;
        world.hub.start();
        world
    }

    /// A second proxy on the same database, with the same keys.
    pub(crate) fn another_proxy(&self) -> Hub {
        let folder = self.folder.path().join("second");
        let on = HubDatabase::Server(self.database.url().to_owned());
        let mut hub = Hub::new(Path::new(PROGRAM), &folder, &on, &self.settings);
        let keyring = self.hub.config().with_file_name("keyring");
        std::fs::copy(keyring, folder.join("keyring")).expect("the first hub's");
        hub.start();
        hub
    }

    /// A host that runs, and holds some maps.
    pub(crate) fn host(&self, name: &str, maps: &[&str]) -> Agent {
        let credential = match maps {
            [] => self.hub.add_host(1),
            maps => self.hub.add_host_of(1, maps),
        };
        let settings = [("retry_delay_max_ms", "500".to_owned())];
        let folder = self.folder.path().join(name);
        let mut agent = Agent::new(Path::new(PROGRAM), &folder, self.hub.address(), &credential, &settings);
        agent.start();
        let began = Instant::now();
        loop {
            let status = agent.ask(json!({"do": "status"}));
            let holds = |map: &&str| {
                status["leases"]
                    .as_array()
                    .is_some_and(|leases| leases.iter().any(|l| l["map"] == **map))
            };
            if status["link_up"] == true && maps.iter().all(holds) {
                return agent;
            }
            assert!(began.elapsed() < PATIENCE, "{status}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// A number by SQL.
    pub(crate) async fn count(&self, sql: &str) -> i64 {
        self.sql.query_one(sql, &[]).await.expect("valid SQL").get(0)
    }

    /// How many vectors there are.
    pub(crate) async fn vectors(&self) -> i64 {
        self.count("SELECT count(*) FROM p2p_sync.embeddings").await
    }

    /// Waits until so many vectors are there and nothing waits.
    pub(crate) async fn embedded(&self, vectors: i64) {
        let began = Instant::now();
        loop {
            let (found, queued) = (
                self.vectors().await,
                self.count("SELECT count(*) FROM p2p_sync.embedding_queue").await,
            );
            if (found, queued) == (vectors, 0) {
                return;
            }
            assert!(
                began.elapsed() < PATIENCE,
                "{found} vectors and {queued} waiting instead of {vectors} and 0: {}",
                self.hub.log()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Has a host say something; waits until it is stored.
pub(crate) fn says(host: &mut Agent, map: &str, char_id: u32, text: &str) {
    let data = json!({"char_id": char_id, "name": "Anna", "text": text});
    put(host, "CHAT_MESSAGE", map, &data);
}

/// Has a host write a state, or delete one of an entity; waits until it is stored.
pub(crate) fn put(host: &mut Agent, data_type: &str, map: &str, data: &Value) {
    write(host, data_type, map, None, Some(data));
}

pub(crate) fn delete(host: &mut Agent, data_type: &str, map: &str, entity: &str) {
    write(host, data_type, map, Some(entity), None);
}

fn write(host: &mut Agent, data_type: &str, map: &str, entity: Option<&str>, data: Option<&Value>) {
    static TAGS: AtomicU64 = AtomicU64::new(1 << 40);
    let tag = TAGS.fetch_add(1, Ordering::Relaxed);
    let happening = Happening {
        at_ms: 0,
        data_type: parse_type(data_type).expect("a type"),
        map: map.to_owned(),
        account_id: 2_000_001,
        entity: entity.map(str::to_owned),
        payload: data.map(Value::to_string),
    };
    assert!(host.submit(tag, &happening), "the agent is gone");
    let began = Instant::now();
    loop {
        let ledger = host.ledger();
        let said = ledger.ids.get(&tag).and_then(|id| ledger.said.get(id));
        match said.map(|said| said.state.as_str()) {
            Some("APPLIED") => return,
            Some(state) if is_settled(state) => panic!("{happening:?} is {state}"),
            _ => {}
        }
        let refused = ledger.refused.get(&tag).cloned();
        drop(ledger);
        assert!(refused.is_none(), "{refused:?}");
        assert!(began.elapsed() < PATIENCE, "{happening:?} is not settled");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// What a host finds.
pub(crate) fn similar(host: &mut Agent, search: &Value) -> Value {
    host.ask(json!({"do": "similar", "search": search}))
}

/// The texts of hits, the nearest first.
pub(crate) fn texts_of(told: &Value) -> Vec<&str> {
    let hits = told["hits"].as_array().unwrap_or_else(|| panic!("{told}"));
    hits.iter().map(|hit| hit["text"].as_str().expect("a text")).collect()
}
