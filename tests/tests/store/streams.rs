//! A reader that follows a stream misses nothing, however many write.

use std::time::Duration;

use p2p_sync_proxy::{operation::History, store::Store};
use uuid::Uuid;

use crate::fixture::{Hub, every, message, put, told};

const WRITERS: u64 = 8;
const MESSAGES: u64 = 25;
const OPS: u64 = 4;

/// Reads on from `after` until it has seen `operations`, and gives their hosts and sequences in the order seen.
async fn follow(store: Store, stream: &str, operations: usize) -> Vec<(Uuid, u64)> {
    let (mut after, mut seen) = (0, Vec::new());
    while seen.len() < operations {
        for state in store.changes_since(stream, after, 7).await.expect("reads") {
            assert!(state.stream_sequence > after, "a number came twice or too late");
            after = state.stream_sequence;
            seen.push((state.host_id, state.position.sequence));
        }
    }
    seen
}

#[tokio::test(flavor = "multi_thread")]
async fn invariant_08_a_reader_that_polls_a_stream_misses_nothing_of_eight_writers() {
    let hub = Hub::new().await;
    let total = usize::try_from(WRITERS * MESSAGES * OPS).expect("small");
    let store = hub.store.clone();
    let reader = tokio::spawn(async move { follow(store, "prontera", total).await });
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let store = hub.store.clone();
            tokio::spawn(async move {
                let path = format!("prontera/CHAT_MESSAGE/{writer}");
                for first in (0..MESSAGES).map(|n| n * OPS + 1) {
                    let ops = (first..first + OPS)
                        .map(|n| every(&path, n, n.checked_sub(1).filter(|&n| n > 0)))
                        .collect();
                    let committed = store
                        .apply(&message(Uuid::from_u128(writer.into()), ops))
                        .await
                        .expect("serves");
                    assert!(told(&committed).iter().all(|outcome| *outcome == "applied"));
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.expect("no panic");
    }
    let read = tokio::time::timeout(Duration::from_secs(30), reader).await;
    let seen = read.expect("the reader missed an operation").expect("no panic");
    for writer in 0..WRITERS {
        let host = Uuid::from_u128(writer.into());
        let of_host: Vec<u64> = seen
            .iter()
            .filter(|(id, _)| *id == host)
            .map(|(_, sequence)| *sequence)
            .collect();
        assert_eq!(
            of_host,
            (1..=MESSAGES * OPS).collect::<Vec<_>>(),
            "in the order they were made"
        );
    }
    let head = "SELECT head FROM p2p_sync.map_states WHERE stream = 'prontera'";
    assert_eq!(
        hub.count(head).await.unsigned_abs(),
        WRITERS * MESSAGES * OPS,
        "each operation has one number"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_messages_over_overlapping_maps_never_wait_in_a_circle() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let hub = Hub::new().await;
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let (store, mut random) = (hub.store.clone(), fastrand::Rng::with_seed(seed ^ writer));
            tokio::spawn(async move {
                for message_number in 0..40 {
                    let ops = (1..=20)
                        .map(|n| {
                            put(
                                &format!("map{}/NPC_STATE/{}", random.u8(0..12), random.u8(0..3)),
                                message_number * 20 + n,
                            )
                        })
                        .collect();
                    store
                        .apply(&message(Uuid::from_u128(writer.into()), ops))
                        .await
                        .expect("serves");
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.expect("no panic");
    }
    let deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()";
    assert_eq!(hub.count(deadlocks).await, 0, "seed {seed}");
}

#[tokio::test]
async fn a_prefix_is_read_page_by_page_in_the_order_of_its_paths() {
    let hub = Hub::new().await;
    let paths = [
        "prontera/NPC_STATE/1",
        "prontera/NPC_STATE/é",
        "prontera/NPC_STATE/\u{10ffff}",
        "prontera2/NPC_STATE/1",
    ];
    let ops = paths
        .iter()
        .zip(1..)
        .map(|(path, sequence)| put(path, sequence))
        .collect();
    hub.apply(Uuid::nil(), ops).await;
    let (mut after, mut read) = (None, Vec::new());
    loop {
        let page = hub
            .store
            .scan("prontera/NPC_STATE/", after.as_deref(), 2)
            .await
            .expect("reads");
        read.extend(page.iter().map(|state| state.path.clone()));
        if page.len() < 2 {
            break;
        }
        after = read.last().cloned();
    }
    assert_eq!(read, paths[..3]);
}

#[tokio::test]
async fn the_log_holds_what_the_history_of_a_type_says() {
    let (hub, host) = (Hub::new().await, Uuid::nil());
    let with = |history, path: &str, sequence| p2p_sync_proxy::operation::ValidOp {
        history,
        ..put(path, sequence)
    };
    let sampled = History::Sampled { seconds: 60 };
    for sequence in 0..3 {
        let ops = vec![
            with(History::All, "prontera/MAP_STATE", sequence * 3 + 1),
            with(sampled, "prontera/NPC_STATE/1", sequence * 3 + 2),
            with(History::Off, "prontera/NPC_STATE/2", sequence * 3 + 3),
        ];
        hub.apply(host, ops).await;
    }
    let logged = "SELECT count(*) FROM p2p_sync.operations WHERE path = 'prontera/";
    assert_eq!(hub.count(&format!("{logged}MAP_STATE'")).await, 3);
    assert_eq!(hub.count(&format!("{logged}NPC_STATE/1'")).await, 1);
    assert_eq!(hub.count(&format!("{logged}NPC_STATE/2'")).await, 0);

    hub.sql
        .execute("UPDATE p2p_sync.states SET logged_at = now() - interval '61 s'", &[])
        .await
        .expect("ages");
    let committed = hub.apply(host, vec![with(sampled, "prontera/NPC_STATE/1", 10)]).await;
    assert_eq!(told(&committed), ["applied"]);
    assert_eq!(hub.count(&format!("{logged}NPC_STATE/1'")).await, 2);
}
