//! A hub on a Postgres server that is not as it should be.

use p2p_sync_tests::{
    services::{Database, database, shared_redis_url},
    stack::{Hub, HubDatabase},
};

use crate::door::{Folder, Refusal, program, run, tells};

/// A hub's folder on a database, with a keyring, and without Redis.
fn hub(folder: &Folder, name: &str, database: &Database) -> Hub {
    Hub::new(
        program(),
        &folder.path(name),
        &HubDatabase::Server(database.url().to_owned()),
        &[],
    )
}

/// `serve` refuses and `check` tells the same of the database.
fn is_refused(folder: &Folder, refusal: Refusal<'_>) {
    let config = folder.path("hub/p2p_sync_proxy.conf");
    run("proxy", &["serve"], &config, "").is_refused(&[refusal]);
    let checked = run("proxy", &["check"], &config, "");
    assert_eq!(checked.exit_code, Some(1), "{checked:?}");
    let code = refusal.0.split(": ").next().expect("a code stands first");
    tells(&checked.out, (&format!("database: {code}: "), ""));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schema_of_another_version_is_refused_with_what_to_run() {
    let (folder, database) = (Folder::new(), database().await);
    let hub = hub(&folder, "hub", &database);
    hub.command(&["schema", "upgrade"]);
    let set_version = async |version: i32| {
        let sql = format!("UPDATE p2p_sync.schema_version SET version = {version}");
        database
            .client()
            .await
            .batch_execute(&sql)
            .await
            .expect("a superuser may");
    };
    set_version(2).await;
    let newer = "E112 SCHEMA_OUTDATED: the schema is of version 2, this build knows 1";
    is_refused(&folder, (newer, "install the newer release"));
    set_version(0).await;
    let older = "E112 SCHEMA_OUTDATED: the schema is of version 0, this build needs 1";
    is_refused(&folder, (older, "run p2p-sync-proxy schema upgrade"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_of_something_else_is_left_alone() {
    let (folder, database) = (Folder::new(), database().await);
    let client = database.client().await;
    client
        .batch_execute("CREATE TABLE somebodys (id int)")
        .await
        .expect("a superuser may");
    let _hub = hub(&folder, "hub", &database);
    let missing = "E118 SCHEMA_MISSING: the database holds tables but not the schema p2p_sync";
    is_refused(&folder, (missing, "check pg_connection_string, or load it with psql"));
    let schemas = "SELECT count(*) FROM pg_namespace WHERE nspname = 'p2p_sync'";
    let made: i64 = client.query_one(schemas, &[]).await.expect("readable").get(0);
    assert_eq!(made, 0, "nothing was made there");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_without_the_schema_is_told_by_check_and_a_missing_keyring_by_serve() {
    let (folder, database) = (Folder::new(), database().await);
    let _hub = hub(&folder, "hub", &database);
    let config = folder.path("hub/p2p_sync_proxy.conf");
    let checked = run("proxy", &["check"], &config, "");
    assert_eq!(checked.exit_code, Some(1), "{checked:?}");
    tells(
        &checked.out,
        (
            "database: E118 SCHEMA_MISSING: Postgres answers",
            "run `p2p-sync-proxy schema upgrade`",
        ),
    );

    std::fs::remove_file(folder.path("hub/keyring")).expect("made with the folder");
    let told = run("proxy", &["serve"], &config, "");
    told.is_refused(&[(
        "E116 BAD_KEYRING: there is no keyring at ",
        "make one with `p2p-sync-proxy keys new`",
    )]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_proxy_on_a_database_needs_redis() {
    let (folder, database) = (Folder::new(), database().await);
    let mut first = hub(&folder, "first", &database);
    first.start();
    let _second = hub(&folder, "hub", &database);
    let told = run("proxy", &["serve"], &folder.path("hub/p2p_sync_proxy.conf"), "");
    told.is_refused(&[("E114 SECOND_PROXY: ", "redis_host")]);

    let redis = shared_redis_url();
    let address = redis
        .trim_start_matches("redis://")
        .split('/')
        .next()
        .expect("the first part");
    let (host, port) = address.rsplit_once(':').expect("host:port");
    first.stop();
    let settings = [("redis_host", host.to_owned()), ("redis_port", port.to_owned())];
    let server = HubDatabase::Server(database.url().to_owned());
    let mut pair = ["third", "fourth"].map(|name| Hub::new(program(), &folder.path(name), &server, &settings));
    let addresses = pair.each_mut().map(Hub::start);
    assert_ne!(addresses[0], addresses[1], "with Redis, two proxies serve one database");
}
