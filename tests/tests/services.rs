//! The servers that the other tests stand on do what those tests take for granted.

use std::time::Duration;

use p2p_sync_tests::services::{OwnPostgres, OwnRedis, PostgresOptions, database, shared_redis_url, wait_until};
use redis::AsyncCommands;
use tokio_postgres::error::SqlState;

#[tokio::test]
async fn a_database_is_empty_has_pgvector_and_goes_with_its_value() {
    let (kept, dropped) = (database().await, database().await);
    let client = kept.client().await;
    client
        .batch_execute("create extension vector; create table only_here (place vector(3))")
        .await
        .unwrap();
    let other = dropped.client().await;
    let tables = other
        .query("select from pg_tables where tablename = 'only_here'", &[])
        .await
        .unwrap();
    assert!(tables.is_empty(), "the databases share a table");

    let url = dropped.url().to_owned();
    drop(dropped);
    let error = tokio_postgres::connect(&url, tokio_postgres::NoTls)
        .await
        .err()
        .expect("the database is gone");
    assert_eq!(error.code(), Some(&SqlState::INVALID_CATALOG_NAME));
}

#[tokio::test]
async fn the_shared_redis_answers() {
    let client = redis::Client::open(shared_redis_url()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    let answer: String = redis::cmd("PING").query_async(&mut connection).await.unwrap();
    assert_eq!(answer, "PONG");
}

#[tokio::test]
async fn a_postgres_killed_in_a_transaction_comes_back_with_what_was_committed() {
    let mut postgres = OwnPostgres::new().await;
    let client = postgres.client().await;
    client.batch_execute("create table ops (id int)").await.unwrap();
    client.batch_execute("insert into ops values (1)").await.unwrap();
    client.batch_execute("begin; insert into ops values (2)").await.unwrap();

    postgres.kill();
    assert!(
        client.batch_execute("commit").await.is_err(),
        "a killed server committed"
    );
    let refused = tokio_postgres::connect(postgres.url(), tokio_postgres::NoTls).await;
    assert!(refused.is_err(), "a killed server lets in");

    postgres.start().await;
    assert_eq!(ids(&postgres).await, [1]);
}

#[tokio::test]
async fn a_postgres_of_each_major_version_restarts_on_the_data_and_with_the_settings_it_was_given() {
    for major in [16, 18] {
        let parent = tempfile::Builder::new().permissions(mode(0o755)).tempdir().unwrap();
        let mut postgres = OwnPostgres::with(PostgresOptions {
            major: Some(major),
            data_parent: Some(parent.path().to_owned()),
            settings: vec![("max_wal_size", "64MB")],
        })
        .await;
        let client = postgres.client().await;
        client
            .batch_execute("create extension vector; create table ops (id int)")
            .await
            .unwrap();
        client.batch_execute("insert into ops values (1)").await.unwrap();

        postgres.restart().await;
        assert_eq!(ids(&postgres).await, [1]);
        let shown = async |name: &str| -> String {
            postgres
                .client()
                .await
                .query_one(&format!("show {name}"), &[])
                .await
                .unwrap()
                .get(0)
        };
        assert!(shown("server_version").await.starts_with(&format!("{major}.")));
        assert_eq!(shown("max_wal_size").await, "64MB");
        assert_eq!(shown("fsync").await, "on");
        assert!(parent.path().join("data/PG_VERSION").exists());
    }
}

#[tokio::test]
async fn a_killed_redis_returns_empty_on_the_same_port() {
    let mut redis = OwnRedis::new().await;
    let client = redis::Client::open(redis.url()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    let () = connection.set("state", "cached").await.unwrap();

    redis.kill();
    assert!(
        client.get_multiplexed_async_connection().await.is_err(),
        "a killed server lets in"
    );

    // Spawned, as tests do that keep a load running meanwhile.
    let redis = tokio::spawn(async move {
        redis.start().await;
        redis
    });
    wait_until(Duration::from_secs(10), "Redis answers again", async || {
        client.get_multiplexed_async_connection().await.is_ok()
    })
    .await;
    let _redis = redis.await.unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    assert_eq!(connection.get::<_, Option<String>>("state").await.unwrap(), None);
}

#[tokio::test]
#[should_panic(expected = "not so within 20ms: the moon is blue")]
async fn waiting_for_what_does_not_come_names_it() {
    wait_until(Duration::from_millis(20), "the moon is blue", async || {
        std::future::pending().await
    })
    .await;
}

async fn ids(postgres: &OwnPostgres) -> Vec<i32> {
    let rows = postgres
        .client()
        .await
        .query("select id from ops order by id", &[])
        .await
        .unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

fn mode(bits: u32) -> std::fs::Permissions {
    std::os::unix::fs::PermissionsExt::from_mode(bits)
}
