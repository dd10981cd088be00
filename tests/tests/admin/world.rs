//! A hub that serves tools, and a tool that holds every answer to what the hub's OpenAPI document says of it.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use p2p_sync_proxy::{admin::OPENAPI, embed::ProviderSettings};
use p2p_sync_tests::{
    embedding_server::EmbeddingServer,
    embeddings::open,
    services::{Database, database, shared_redis_url},
    stack::{Agent, Hub, HubDatabase},
};
use reqwest::{Client, Method, header::HeaderMap};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto::ring};
use uuid::Uuid;

/// Hub and agent in one, as `demo hub …` and `demo agent …`.
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_demo");
/// For what happens by itself, on a machine that is busy with other things.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);
pub(crate) const DIMENSIONS: usize = 64;
/// Of a hub that makes its vectors itself.
pub(crate) const MODEL: &str = "lexical-1";
/// The provider's.
pub(crate) const KEY: &str = "sk-3d9f0a77c1e84b52";

pub(crate) struct World {
    pub(crate) hub: Hub,
    pub(crate) sql: tokio_postgres::Client,
    pub(crate) folder: TempDir,
    pub(crate) client: Client,
    _database: Option<Database>,
}

/// An answer.
pub(crate) struct Told {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Value,
}

impl Told {
    /// The code of a refusal with its status.
    pub(crate) fn refusal(&self) -> (u16, &str) {
        let code = self.body["error"]["code"].as_str();
        (self.status, code.unwrap_or_else(|| panic!("no refusal: {}", self.body)))
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    pub(crate) fn hits(&self) -> &Vec<Value> {
        self.body["hits"].as_array().unwrap_or_else(|| panic!("{}", self.body))
    }

    /// The texts of hits, the nearest first.
    pub(crate) fn texts(&self) -> Vec<&str> {
        self.hits()
            .iter()
            .map(|hit| hit["text"].as_str().expect("a text"))
            .collect()
    }
}

impl World {
    /// A hub that makes its vectors itself, and serves.
    pub(crate) async fn lexical(settings: &[(&str, String)]) -> Self {
        let mut world = Self::not_started(settings).await;
        world.hub.start();
        world
    }

    /// A hub that serves, with a provider behind HTTP.
    pub(crate) async fn with_provider(settings: &[(&str, String)]) -> (Self, EmbeddingServer) {
        let server = EmbeddingServer::start(open(ProviderSettings::Lexical, DIMENSIONS).await, KEY).await;
        let mut all = vec![
            ("embedding_provider", "openai".to_owned()),
            ("embedding_base_url", format!("{}/v1", server.url())),
            ("embedding_api_key", KEY.to_owned()),
            ("embedding_model", MODEL.to_owned()),
            ("embedding_timeout_ms", "2000".to_owned()),
        ];
        all.retain(|(key, _)| !settings.iter().any(|(other, _)| other == key));
        all.extend_from_slice(settings);
        (Self::lexical(&all).await, server)
    }

    /// A hub with a token that does not run yet.
    pub(crate) async fn not_started(settings: &[(&str, String)]) -> Self {
        let database = database().await;
        let sql = database.client().await;
        let url = database.url().to_owned();
        Self::on(&url, sql, settings, Some(database))
    }

    /// As [`Self::not_started`], on a database of one's own.
    pub(crate) fn on(
        url: &str,
        sql: tokio_postgres::Client,
        settings: &[(&str, String)],
        database: Option<Database>,
    ) -> Self {
        let redis = shared_redis_url();
        let redis = redis.trim_start_matches("redis://").trim_end_matches('/');
        let (redis_host, redis_port) = redis.rsplit_once(':').expect("a URL with host and port");
        let mut all = vec![
            ("redis_host", redis_host.to_owned()),
            ("redis_port", redis_port.to_owned()),
            ("redis_prefix", format!("t-{}", Uuid::new_v4().simple())),
            ("embedding_dimensions", DIMENSIONS.to_string()),
            ("admin_port", "0".to_owned()),
            ("log_level", "debug".to_owned()),
        ];
        all.retain(|(key, _)| !settings.iter().any(|(other, _)| other == key));
        all.extend_from_slice(settings);
        let folder = tempfile::tempdir().expect("a folder can be made");
        let on = HubDatabase::Server(url.to_owned());
        let hub = Hub::new(Path::new(PROGRAM), &folder.path().join("hub"), &on, &all);
        hub.command(&["keys", "admin-token"]);
        Self {
            hub,
            sql,
            folder,
            client: client(RootCertStore::empty()),
            _database: database,
        }
    }

    pub(crate) fn token_file(&self) -> PathBuf {
        self.hub.config().with_file_name("p2p_sync.admin_token")
    }

    pub(crate) fn token(&self) -> String {
        let text = std::fs::read_to_string(self.token_file()).expect("made");
        text.trim().to_owned()
    }

    /// Asks with the token.
    pub(crate) async fn ask(&self, method: Method, path: &str, body: &Value) -> Told {
        self.ask_as(Some(&self.token()), method, path, &body.to_string()).await
    }

    /// Asks with another token or none, and a body of any kind.
    pub(crate) async fn ask_as(&self, token: Option<&str>, method: Method, path: &str, body: &str) -> Told {
        let url = format!("{}{path}", self.hub.admin_url());
        let mut request = self.client.request(method.clone(), url).body(body.to_owned());
        if let Some(token) = token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let response = request.send().await.expect("an answer");
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let text = response.text().await.expect("whole");
        let body = match text.as_str() {
            "" => Value::Null,
            text => serde_json::from_str(text).unwrap_or_else(|_| panic!("no JSON: {text}")),
        };
        described(&method, path, status, &body);
        Told { status, headers, body }
    }

    pub(crate) async fn search(&self, search: &Value) -> Told {
        self.ask(Method::POST, "/v1/embeddings/search", search).await
    }

    pub(crate) async fn put(&self, id: &str, entry: &Value) -> Told {
        self.ask(Method::PUT, &format!("/v1/embeddings/{id}"), entry).await
    }

    pub(crate) async fn embed(&self, input: &Value) -> Told {
        self.ask(Method::POST, "/v1/embeddings", &json!({"model": MODEL, "input": input}))
            .await
    }

    /// A number by SQL.
    pub(crate) async fn count(&self, sql: &str) -> i64 {
        self.sql.query_one(sql, &[]).await.expect("valid SQL").get(0)
    }

    /// A host that runs, and holds some maps.
    pub(crate) fn host(&self, name: &str, maps: &[&str]) -> Agent {
        let credential = self.hub.add_host_of(1, maps);
        let settings = [("retry_delay_max_ms", "500".to_owned())];
        let folder = self.folder.path().join(name);
        let mut agent = Agent::new(Path::new(PROGRAM), &folder, self.hub.address(), &credential, &settings);
        agent.start();
        let began = Instant::now();
        loop {
            let status = agent.ask(json!({"do": "status"}));
            let leases = status["leases"].as_array().cloned().unwrap_or_default();
            if status["link_up"] == true && leases.len() >= maps.len() {
                return agent;
            }
            assert!(began.elapsed() < PATIENCE, "{status}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A client that trusts some CAs, and nobody else.
pub(crate) fn client(roots: RootCertStore) -> Client {
    let tls = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("the provider has them")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let built = Client::builder().tls_backend_preconfigured(tls).no_proxy().build();
    built.expect("a client can be made")
}

/// Fails where an answer is not as the document says of this path, method and status.
fn described(method: &Method, path: &str, status: u16, body: &Value) {
    let document: Value = serde_json::from_str(OPENAPI).expect("JSON");
    let path = path.split('?').next().unwrap_or_default();
    let known = match path.strip_prefix("/v1/embeddings/") {
        Some(id) if id != "search" => "/v1/embeddings/{id}",
        _ => path,
    };
    let operation = &document["paths"][known][method.as_str().to_ascii_lowercase()];
    if operation.is_null() {
        assert!(
            status == 404 || status == 405,
            "{method} {path} is served with {status} and not described"
        );
        return;
    }
    let response = &operation["responses"][status.to_string()];
    assert!(!response.is_null(), "{method} {path} has no {status}: {body}");
    let response = match response["$ref"].as_str() {
        Some(reference) => document.pointer(&reference[1..]).expect("a component"),
        None => response,
    };
    let schema = &response["content"]["application/json"]["schema"];
    if schema.is_null() {
        assert!(body.is_null(), "{method} {path} has no body with {status}: {body}");
        return;
    }
    let whole = json!({"allOf": [schema], "components": document["components"]});
    let validator = jsonschema::draft202012::new(&whole).expect("a schema");
    let wrong: Vec<String> = validator.iter_errors(body).map(|error| error.to_string()).collect();
    assert!(wrong.is_empty(), "{method} {path} {status}: {wrong:?} in {body}");
}
