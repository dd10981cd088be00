//! Postgres killed under the store: what was acknowledged is there, and the store goes on by itself.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use p2p_sync_proto::Code;
use p2p_sync_proxy::store::{Connection, HostStatus, Store, StoreConfig};
use p2p_sync_tests::services::{OwnPostgres, wait_until};
use uuid::Uuid;

use crate::fixture::{Hub, config, every, message, put, told};

#[tokio::test(flavor = "multi_thread")]
async fn invariant_01_killing_postgres_loses_no_acknowledged_operation_and_the_store_resumes() {
    let mut postgres = OwnPostgres::new().await;
    let store = Store::connect(&config(postgres.url())).await.expect("connects");
    let (mut acknowledged, host) = (0, Uuid::nil());
    for round in 0..3_u64 {
        let written = Arc::new(AtomicU64::new(acknowledged));
        let writing = {
            let (store, written) = (store.clone(), written.clone());
            tokio::spawn(async move {
                let mut sequence = acknowledged;
                loop {
                    let ops = vec![every(
                        "prontera/CHAT_MESSAGE/1",
                        sequence + 1,
                        Some(sequence).filter(|&n| n > 0),
                    )];
                    match store.apply(&message(host, ops)).await {
                        Ok(committed) => assert_eq!(told(&committed), ["applied"]),
                        Err(refusal) => return (sequence, refusal.0.code),
                    }
                    sequence += 1;
                    written.store(sequence, Ordering::Relaxed);
                }
            })
        };
        let some = acknowledged + 10 + 3 * round;
        wait_until(Duration::from_secs(20), "operations are written", async || {
            written.load(Ordering::Relaxed) >= some
        })
        .await;
        postgres.kill();
        let (upto, code) = writing.await.expect("no panic");
        assert_eq!(code, Code::HubUnavailable);
        acknowledged = upto;
        postgres.start().await;
        wait_until(Duration::from_secs(20), "the store resumes", async || {
            store.timeline().await.is_ok()
        })
        .await;
        let sql = postgres.client().await;
        let logged = sql
            .query_one("SELECT count(*), max(sequence) FROM p2p_sync.operations", &[])
            .await
            .expect("reads");
        let (count, last): (i64, i64) = (logged.get(0), logged.get(1));
        assert_eq!(count, last, "an operation is missing or there twice");
        assert!(
            last.unsigned_abs() >= acknowledged,
            "{last} of {acknowledged} acknowledged are there"
        );
    }
}

#[tokio::test]
async fn a_statement_that_takes_too_long_is_ended_and_nothing_of_it_settled() {
    let hub = Hub::new().await;
    let short = StoreConfig {
        bulk_statement_timeout: Duration::from_millis(200),
        ..config(hub.database.url())
    };
    let store = Store::connect(&short).await.expect("connects");
    hub.apply(Uuid::nil(), vec![put("prontera/MAP_STATE", 1)]).await;
    hub.sql
        .batch_execute("BEGIN; SELECT FROM p2p_sync.map_states FOR UPDATE")
        .await
        .expect("locks");
    let blocked = message(Uuid::nil(), vec![put("prontera/MAP_STATE", 2)]);
    let refusal = store.apply(&blocked).await.expect_err("the map is locked");
    assert_eq!(refusal.0.code, Code::HubUnavailable);
    hub.sql.batch_execute("ROLLBACK").await.expect("unlocks");
    let committed = store.apply(&blocked).await.expect("the connection serves on");
    assert_eq!((told(&committed), committed.changes.len()), (vec!["applied"], 1));
}

#[tokio::test]
async fn a_second_proxy_cannot_claim_the_database_until_the_first_has_gone() {
    let hub = Hub::new().await;
    let other = Store::connect(&config(hub.database.url())).await.expect("connects");
    let claim = hub.store.claim_single_proxy().await.expect("the first");
    assert_eq!(
        other.claim_single_proxy().await.expect_err("the second").code,
        Code::SecondProxy
    );
    drop(claim);
    wait_until(Duration::from_secs(5), "the claim is free", async || {
        other.claim_single_proxy().await.is_ok()
    })
    .await;

    let mut claim = hub.store.claim_single_proxy().await.expect("again");
    hub.sql
        .batch_execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE '%claim'")
        .await
        .expect("ends it");
    tokio::time::timeout(Duration::from_secs(5), claim.lost())
        .await
        .expect("the loss is told");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_embedded_engine_keeps_what_it_holds_and_its_directory_to_itself() {
    let directory = tempfile::tempdir().expect("a directory");
    let embedded = StoreConfig {
        connection: Connection::Embedded(directory.path().join("data")),
        ..config("")
    };
    let store = Store::connect(&embedded).await.expect("starts");
    let in_use = Store::connect(&embedded).await.expect_err("it is running");
    assert_eq!(in_use.code, Code::DataDirectoryInUse);
    let batches: Vec<_> = (0..4)
        .map(|host| {
            let store = store.clone();
            let ops = (1..=50)
                .map(|n| put(&format!("prontera/NPC_STATE/{host}-{n}"), n))
                .collect();
            tokio::spawn(async move {
                store
                    .apply(&message(Uuid::from_u128(host), ops))
                    .await
                    .expect("serves")
                    .changes
                    .len()
            })
        })
        .collect();
    for batch in batches {
        assert_eq!(batch.await.expect("no panic"), 50);
    }
    let hub_id = store.hub_id();
    store.close().await;
    assert_eq!(store.timeline().await.expect_err("closed").code, Code::HubUnavailable);

    let again = Arc::new(Store::connect(&embedded).await.expect("starts again"));
    assert_eq!(again.hub_id(), hub_id);
    assert_eq!(again.scan("prontera/", None, 1000).await.expect("reads").len(), 200);
    assert!(again.claim_single_proxy().await.is_ok());
    again.maintain().await.expect("maintains");
    again.close().await;
}

#[tokio::test]
async fn invariant_10_hosts_that_ask_a_lot_hold_up_none_of_what_the_hub_asks_itself() {
    let hub = Hub::new().await;
    let host = hub.host().await;
    let mut taken = Vec::new();
    for _ in 0..4 {
        taken.push(hub.store.reads().await.expect("a connection"));
    }
    let asks = async {
        hub.store.host(host).await.expect("who a host is").expect("there");
        hub.store.note_alive().await.expect("that the hub serves");
        hub.store.pulse().await.expect("whether the database answers");
        hub.store.add_verdicts(&[]).await.expect("what was found");
    };
    let asked = tokio::time::timeout(Duration::from_secs(4), asks).await;
    asked.expect("it waits for no connection that hosts have");
    drop(taken);
}

#[tokio::test]
async fn invariant_10_a_hello_that_waits_for_its_hosts_own_writes_holds_up_no_lock_of_the_host() {
    let hub = Hub::new().await;
    let (host, opening) = (hub.host().await, Uuid::from_u128(1));
    hub.store.hello(host, opening, 1, 1).await.expect("admitted");
    let mut writer = hub.database.client().await;
    let transaction = writer.transaction().await.expect("begins");
    let row = "SELECT FROM p2p_sync.settled_sequences WHERE host_id = $1 FOR UPDATE";
    transaction.execute(row, &[&host]).await.expect("locks");
    let hello = {
        let store = hub.store.clone();
        tokio::spawn(async move { store.hello(host, opening, 1, 1).await })
    };
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
    wait_until(Duration::from_secs(20), "the hello waits", async || {
        hub.count(waiting).await > 0
    })
    .await;
    let locked = hub.store.set_host_status(host, HostStatus::Locked).await;
    assert_eq!(locked.expect("serves"), Some(HostStatus::Locked));
    assert!(!hello.is_finished(), "the host was locked while its hello waited");
    let given_up = hello.await.expect("no panic").expect_err("it waits for so long");
    assert_eq!(given_up.code, Code::HubUnavailable);
    drop(transaction);
}
