//! The schema loads by psql and by the proxy, twice without harm, on each supported server.

use std::{env, process::Command};

use p2p_sync_proto::Code;
use p2p_sync_proxy::store::{Store, schema};
use p2p_sync_tests::services::{OwnPostgres, PostgresOptions, database};

use crate::fixture::config;

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../sql-files/p2p_data_sync.sql");

async fn load_with_psql(url: String) {
    let run = move || {
        let psql = env::var("P2P_SYNC_TEST_PG_BIN").map_or("psql".into(), |bin| format!("{bin}/psql"));
        Command::new(psql)
            .args([&url, "-q", "-v", "embedding_dimensions=12", "-f", FILE])
            .output()
    };
    let output = tokio::task::spawn_blocking(run)
        .await
        .expect("no panic")
        .expect("psql runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.is_empty(), "{said}");
}

async fn loads_twice_and_serves(major: u16) {
    let postgres = OwnPostgres::with(PostgresOptions {
        major: Some(major),
        ..PostgresOptions::default()
    })
    .await;
    for _ in 0..2 {
        load_with_psql(postgres.url().to_owned()).await;
    }
    let store = Store::connect(&config(postgres.url()))
        .await
        .expect("the schema is as the proxy needs it");
    assert_eq!(store.schema_version().await, Ok(schema::VERSION));
    let dimensions =
        "SELECT atttypmod FROM pg_attribute WHERE attrelid = 'p2p_sync.embeddings'::regclass AND attname = 'embedding'";
    let row = postgres.client().await.query_one(dimensions, &[]).await.expect("reads");
    assert_eq!(row.get::<_, i32>(0), 12);
}

#[tokio::test]
async fn the_schema_loads_twice_with_psql_on_postgres_16() {
    loads_twice_and_serves(16).await;
}

#[tokio::test]
async fn the_schema_loads_twice_with_psql_on_postgres_18() {
    loads_twice_and_serves(18).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn four_proxies_that_start_on_an_empty_database_at_once_make_one_schema() {
    let database = database().await;
    let proxies: Vec<_> = (0..4)
        .map(|_| {
            let config = config(database.url());
            tokio::spawn(async move { Store::connect(&config).await.expect("starts").hub_id() })
        })
        .collect();
    let mut hubs = Vec::new();
    for proxy in proxies {
        hubs.push(proxy.await.expect("no panic"));
    }
    hubs.dedup();
    assert_eq!(hubs.len(), 1);
}

#[tokio::test]
async fn a_database_that_holds_something_else_is_left_alone() {
    let database = database().await;
    database
        .client()
        .await
        .batch_execute("CREATE TABLE login (account_id int)")
        .await
        .expect("creates");
    let refusal = Store::connect(&config(database.url())).await.expect_err("not ours");
    assert_eq!(refusal.code, Code::SchemaMissing);
    load_with_psql(database.url().to_owned()).await;
    assert!(
        Store::connect(&config(database.url())).await.is_ok(),
        "the operator wanted it there"
    );
}

#[tokio::test]
async fn a_schema_of_another_version_is_refused_and_not_touched() {
    let database = database().await;
    assert_eq!(
        Store::upgrade(&config(database.url())).await,
        Ok(schema::VERSION),
        "makes it"
    );
    assert_eq!(
        Store::upgrade(&config(database.url())).await,
        Ok(schema::VERSION),
        "changes nothing"
    );
    let sql = database.client().await;
    sql.batch_execute("INSERT INTO p2p_sync.schema_version VALUES (99)")
        .await
        .expect("inserts");
    let refusal = Store::connect(&config(database.url())).await.expect_err("newer");
    assert_eq!(refusal.code, Code::SchemaOutdated);
    assert!(refusal.sentence.contains("newer release"), "{refusal}");
    assert!(
        sql.batch_execute("SELECT p2p_sync.create_log_partitions()")
            .await
            .is_ok()
    );
}

#[tokio::test]
async fn a_server_that_is_not_there_is_told_without_the_password() {
    let port = p2p_sync_tests::services::free_port();
    let refusal = Store::connect(&config(&format!("postgres://hub:geheim@127.0.0.1:{port}/hub")))
        .await
        .expect_err("no server");
    assert_eq!(refusal.code, Code::DatabaseUnreachable);
    assert!(!refusal.sentence.contains("geheim"), "{refusal}");
}
