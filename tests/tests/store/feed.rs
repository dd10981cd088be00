//! What consumers of the feed are told: everything, in order, or that they begin anew.

use std::time::Duration;

use p2p_sync_proto::Code;
use p2p_sync_proxy::{
    operation::ValidOp,
    store::{Anew, BATCH_CHANGES_MAX, Batch, ConsumerFilter, ConsumerReader, Told},
};
use p2p_sync_tests::services::wait_until;
use uuid::Uuid;

use crate::fixture::{Hub, delete, every, put};

const ALL: u32 = BATCH_CHANGES_MAX;
const NPC: [&str; 3] = ["prontera/NPC_STATE/1", "prontera/NPC_STATE/2", "prontera/NPC_STATE/3"];

/// In short: `anew *`, `anew prontera`, or the stream's position and the path, with a `-` before one that is deleted.
fn told(batch: &Batch) -> Vec<String> {
    let short = |told: &Told| match told {
        Told::Snapshot { stream, .. } => format!("anew {}", stream.as_deref().unwrap_or("*")),
        Told::Change { stream, row } => {
            assert!(row.path.starts_with(stream.as_str()) || stream.starts_with('@'));
            let sign = if row.deleted { "-" } else { "" };
            format!("{} {sign}{}", row.stream_sequence, row.path)
        }
    };
    batch.told.iter().map(short).collect()
}

/// Reads to the end and acknowledges; gives all that was told.
async fn drain(reader: &mut ConsumerReader, limit: u32) -> Vec<String> {
    let mut all = Vec::new();
    loop {
        let batch = reader.next(limit).await.expect("reads");
        if batch.is_empty() {
            assert!(!batch.has_more);
            return all;
        }
        all.extend(told(&batch));
        reader.acknowledge(&batch).await.expect("acknowledges");
    }
}

fn of(maps: &[&str], types: &[&str]) -> ConsumerFilter {
    let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    ConsumerFilter {
        maps: owned(maps),
        types: owned(types),
    }
}

impl Hub {
    async fn consumer(&self, name: &str, filter: &ConsumerFilter) -> ConsumerReader {
        self.store.add_consumer(name, filter).await.expect("adds");
        self.store.read_consumer(name).await.expect("nobody reads it")
    }

    async fn write(&self, ops: Vec<ValidOp>) {
        self.apply(Uuid::nil(), ops).await;
    }

    async fn run(&self, sql: &str) {
        self.sql.batch_execute(sql).await.expect("valid SQL");
    }

    /// All deletions until now are past what the hub keeps.
    async fn forget_deletions(&self) {
        self.run("UPDATE p2p_sync.states SET received_at = now() - interval '31 days' WHERE deleted")
            .await;
        assert!(self.store.maintain().await.expect("serves").tombstones_purged > 0);
    }
}

#[tokio::test]
async fn invariant_08_a_consumer_is_told_what_is_there_and_then_what_comes_and_new_maps_by_themselves() {
    let hub = Hub::new().await;
    hub.write(vec![
        put(NPC[0], 1),
        put(NPC[1], 2),
        put(NPC[0], 3),
        put("geffen/MAP_STATE", 4),
    ])
    .await;
    let mut reader = hub.consumer("mariadb", &ConsumerFilter::default()).await;
    let first = drain(&mut reader, ALL).await;
    assert_eq!(
        first,
        [
            "anew *",
            "1 geffen/MAP_STATE",
            "2 prontera/NPC_STATE/2",
            "3 prontera/NPC_STATE/1"
        ]
    );
    assert!(drain(&mut reader, ALL).await.is_empty());
    let chat = ["izlude/CHAT_MESSAGE/1", "@char/150001/PLAYER_DATA"];
    hub.write(vec![
        delete(NPC[1], 5),
        every(chat[0], 6, None),
        every(chat[0], 7, Some(6)),
        put(chat[1], 8),
    ])
    .await;
    let mut second = drain(&mut reader, 1).await;
    second.sort();
    assert_eq!(
        second,
        [
            "1 @char/150001/PLAYER_DATA",
            "1 izlude/CHAT_MESSAGE/1",
            "2 izlude/CHAT_MESSAGE/1",
            "4 -prontera/NPC_STATE/2"
        ],
        "each operation of what is kept as every, and nothing twice"
    );
}

#[tokio::test]
async fn a_consumer_is_told_again_what_was_not_acknowledged_and_a_look_changes_nothing() {
    let hub = Hub::new().await;
    hub.write((1..=5).map(|n| put(&format!("prontera/NPC_STATE/{n}"), n)).collect())
        .await;
    let mut reader = hub.consumer("mariadb", &ConsumerFilter::default()).await;
    let batch = reader.next(2).await.expect("reads");
    assert_eq!((told(&batch).len(), batch.has_more), (3, true));
    let look = hub.store.peek_consumer("mariadb", 2).await.expect("reads");
    assert_eq!(told(&look), told(&batch));
    drop(reader);
    let mut reader = open(&hub, "mariadb").await;
    let again = reader.next(3).await.expect("reads");
    assert_eq!(told(&again)[..3], told(&batch));
    reader.acknowledge(&again).await.expect("acknowledges");
    assert_eq!(
        told(&reader.next(9).await.expect("reads")),
        ["4 prontera/NPC_STATE/4", "5 prontera/NPC_STATE/5"]
    );
    let first = reader.number().await.expect("numbers");
    assert!(reader.number().await.expect("numbers") > first);
}

/// As soon as the connection of the one before is gone.
async fn open(hub: &Hub, name: &str) -> ConsumerReader {
    let mut reader = None;
    wait_until(Duration::from_secs(10), "the reader before has ended", async || {
        reader = hub.store.read_consumer(name).await.ok();
        reader.is_some()
    })
    .await;
    reader.expect("it was waited for")
}

#[tokio::test]
async fn a_consumer_reads_the_maps_and_types_that_it_names_and_moves_past_all_else() {
    let hub = Hub::new().await;
    // More than one batch leaves out.
    hub.run(
        "INSERT INTO p2p_sync.map_states SELECT 'prontera', 20000, hub_id FROM p2p_sync.hub; \
         INSERT INTO p2p_sync.states (path, stream, stream_sequence, data_type, keeps_every, tenure, incarnation, sequence, \
                host_id, operation_id, in_group, account_id, map, deleted, payload, received_at, origin_hub) \
            SELECT 'prontera/NPC_STATE/' || n, 'prontera', n, 4, false, 0, 1, n, gen_random_uuid(), gen_random_uuid(), false, 0, \
                'prontera', false, '{}', now(), gen_random_uuid() FROM generate_series(1, 20000) AS n",
    )
    .await;
    hub.write(vec![
        put("prontera/MAP_STATE", 1),
        put("prontera_in/MAP_STATE", 2),
        put("prt_in/MAP_STATE", 3),
        put("1@nyd/MAP_STATE", 4),
        put("@char/150001/PLAYER_DATA", 5),
    ])
    .await;
    let mut few = hub
        .consumer("few", &of(&["pront*", "1@*"], &["MAP_STATE", "CHAT_MESSAGE"]))
        .await;
    let (mut batches, mut all) = (0, Vec::new());
    loop {
        let batch = few.next(ALL).await.expect("reads");
        if batch.is_empty() {
            break;
        }
        batches += 1;
        all.extend(told(&batch));
        few.acknowledge(&batch).await.expect("acknowledges");
    }
    all.sort();
    assert_eq!(
        all,
        [
            "1 1@nyd/MAP_STATE",
            "1 prontera_in/MAP_STATE",
            "20001 prontera/MAP_STATE",
            "anew *"
        ]
    );
    assert!(batches > 1, "20,000 changes are left out in more than one");
    let players = hub.consumer("players", &of(&["@player", "prt_i_"], &[])).await;
    drop(players);
    let batch = hub.store.peek_consumer("players", ALL).await.expect("reads");
    assert_eq!(
        told(&batch),
        ["anew *", "1 @char/150001/PLAYER_DATA"],
        "_ stands for itself"
    );
}

#[tokio::test]
async fn invariant_08_a_consumer_that_the_retention_has_passed_begins_the_stream_anew_and_holds_nothing_back() {
    let hub = Hub::new().await;
    hub.write(vec![put(NPC[0], 1), put(NPC[1], 2), put("geffen/MAP_STATE", 3)])
        .await;
    let mut reader = hub.consumer("mariadb", &ConsumerFilter::default()).await;
    drain(&mut reader, ALL).await;
    hub.write(vec![delete(NPC[0], 4)]).await;
    assert_eq!(drain(&mut reader, ALL).await, ["3 -prontera/NPC_STATE/1"]);
    hub.forget_deletions().await;
    assert!(
        drain(&mut reader, ALL).await.is_empty(),
        "it was told of what is forgotten"
    );

    hub.write(vec![put(NPC[2], 5), delete(NPC[1], 6)]).await;
    hub.forget_deletions().await;
    let (consumer, streams) = hub.store.consumer("mariadb").await.expect("reads");
    assert_eq!((consumer.streams_behind, consumer.streams_anew), (1, 1));
    assert_eq!((streams[0].anew, streams[0].behind), (Some(Anew::Forgotten), 5));
    let batch = reader.next(ALL).await.expect("reads");
    assert_eq!(
        told(&batch),
        ["anew prontera", "4 prontera/NPC_STATE/3"],
        "and geffen goes on"
    );
    assert!(matches!(&batch.told[0], Told::Snapshot { reason: Some(reason), .. } if reason.contains("older")));
    reader.acknowledge(&batch).await.expect("acknowledges");
    hub.write(vec![put(NPC[0], 7)]).await;
    assert_eq!(drain(&mut reader, ALL).await, ["6 prontera/NPC_STATE/1"]);
}

#[tokio::test]
async fn invariant_08_a_snapshot_in_the_making_misses_no_deletion_that_is_forgotten_meanwhile() {
    let hub = Hub::new().await;
    let deleted = "prontera/NPC_STATE/9";
    hub.write(vec![
        put(deleted, 1),
        put(NPC[0], 2),
        put(NPC[1], 3),
        put(NPC[2], 4),
        delete(deleted, 5),
    ])
    .await;
    hub.forget_deletions().await;
    let mut reader = hub.consumer("mariadb", &ConsumerFilter::default()).await;
    let batch = reader.next(1).await.expect("reads");
    assert_eq!(told(&batch), ["anew *", "2 prontera/NPC_STATE/1"]);
    reader.acknowledge(&batch).await.expect("acknowledges");
    let batch = reader.next(1).await.expect("reads");
    assert_eq!(
        told(&batch),
        ["3 prontera/NPC_STATE/2"],
        "it never heard of what was forgotten before"
    );
    reader.acknowledge(&batch).await.expect("acknowledges");
    // It was told of this one.
    hub.write(vec![delete(NPC[0], 6)]).await;
    hub.forget_deletions().await;
    assert_eq!(
        drain(&mut reader, 1).await,
        ["anew prontera", "3 prontera/NPC_STATE/2", "4 prontera/NPC_STATE/3"]
    );
}

#[tokio::test]
async fn invariant_08_a_consumer_begins_anew_with_all_where_the_hubs_database_went_back() {
    let hub = Hub::new().await;
    hub.write(vec![put(NPC[0], 1), put("geffen/MAP_STATE", 2)]).await;
    let mut reader = hub.consumer("mariadb", &ConsumerFilter::default()).await;
    drain(&mut reader, ALL).await;
    // The backup is older than one of the maps.
    hub.run(
        "UPDATE p2p_sync.hub SET timeline = timeline + 1; DELETE FROM p2p_sync.states WHERE stream = 'geffen'; \
         DELETE FROM p2p_sync.map_states WHERE stream = 'geffen'",
    )
    .await;
    let batch = reader.next(ALL).await.expect("reads");
    assert_eq!(
        (batch.timeline, told(&batch)),
        (2, vec!["anew *".to_owned(), "1 prontera/NPC_STATE/1".to_owned()])
    );
    assert!(matches!(
        &batch.told[0],
        Told::Snapshot {
            stream: None,
            reason: Some(_)
        }
    ));
    assert_eq!(
        told(&reader.next(ALL).await.expect("reads")),
        told(&batch),
        "until that is acknowledged"
    );
    reader.acknowledge(&batch).await.expect("acknowledges");
    assert!(drain(&mut reader, ALL).await.is_empty());
    // And where somebody forgot to raise the timeline, as far as that can be seen.
    hub.write(vec![put(NPC[1], 3), put(NPC[2], 4)]).await;
    drain(&mut reader, ALL).await;
    hub.run("DELETE FROM p2p_sync.states WHERE stream_sequence > 1; UPDATE p2p_sync.map_states SET head = 1")
        .await;
    assert_eq!(
        drain(&mut reader, ALL).await,
        ["anew prontera", "1 prontera/NPC_STATE/1"]
    );
}

#[tokio::test]
async fn one_at_a_time_reads_a_consumer_and_the_second_is_told_who_does() {
    let hub = Hub::new().await;
    hub.write(vec![put(NPC[0], 1)]).await;
    let mut reader = hub.consumer("mariadb", &ConsumerFilter::default()).await;
    let _other = hub.consumer("discord", &ConsumerFilter::default()).await;
    let refusal = hub.store.read_consumer("mariadb").await.err().expect("it is read");
    assert_eq!(refusal.code, Code::NotAllowed);
    let process = format!("read by process {} on ", std::process::id());
    assert!(
        refusal.sentence.contains(&process) && refusal.sentence.contains(" since 20"),
        "{refusal}"
    );
    let listed = hub.store.consumers(Some("mariadb")).await.expect("reads");
    assert!(
        listed[0]
            .reader
            .as_ref()
            .is_some_and(|reader| reader.starts_with("process "))
    );

    // Whose connection broke acknowledges nothing any more.
    let batch = reader.next(ALL).await.expect("reads");
    hub.run(
        "SELECT pg_terminate_backend(l.pid) FROM pg_locks AS l JOIN pg_database AS d ON d.oid = l.database \
            WHERE l.locktype = 'advisory' AND d.datname = current_database() \
                AND (l.classid::bigint << 32 | l.objid::bigint) = p2p_sync.consumer_lock('mariadb')",
    )
    .await;
    let mut second = open(&hub, "mariadb").await;
    assert_eq!(
        reader.acknowledge(&batch).await.expect_err("broken").code,
        Code::HubUnavailable
    );
    assert_eq!(told(&second.next(ALL).await.expect("reads")), told(&batch));
    drop(second);
    open(&hub, "mariadb").await;
}

#[tokio::test]
async fn the_operator_skips_rewinds_and_removes() {
    let hub = Hub::new().await;
    hub.write((1..=4).map(|n| put(&format!("prontera/NPC_STATE/{n}"), n)).collect())
        .await;
    let mut reader = hub.consumer("mariadb", &ConsumerFilter::default()).await;
    let refusal = reader
        .skip(Some("prontera"), Some(2))
        .await
        .expect_err("has yet to begin");
    assert_eq!(refusal.code, Code::BadValue);
    reader.skip(None, None).await.expect("begins with what comes");
    assert!(drain(&mut reader, ALL).await.is_empty());

    reader.rewind(Some("prontera"), Some(1)).await.expect("rewinds");
    assert_eq!(drain(&mut reader, 1).await.len(), 3);
    reader.rewind(Some("prontera"), Some(1)).await.expect("rewinds");
    reader.skip(Some("prontera"), Some(3)).await.expect("skips");
    assert_eq!(drain(&mut reader, ALL).await, ["4 prontera/NPC_STATE/4"]);
    reader.rewind(Some("prontera"), None).await.expect("rewinds");
    assert_eq!(
        drain(&mut reader, ALL).await[..2],
        ["anew prontera", "1 prontera/NPC_STATE/1"]
    );
    reader.rewind(None, None).await.expect("rewinds");
    assert_eq!(drain(&mut reader, ALL).await[..2], ["anew *", "1 prontera/NPC_STATE/1"]);

    for (wrong, code) in [(Some(3), Code::BadValue), (Some(9), Code::BadValue)] {
        assert_eq!(
            reader.skip(Some("prontera"), wrong).await.expect_err("outside").code,
            code
        );
    }
    assert_eq!(
        reader
            .rewind(Some("prontera"), Some(5))
            .await
            .expect_err("forward")
            .code,
        Code::BadValue
    );
    assert_eq!(
        reader.skip(Some("nowhere"), None).await.expect_err("no stream").code,
        Code::NotFound
    );
    reader.remove().await.expect("removes");
    assert_eq!(
        hub.store.read_consumer("mariadb").await.err().expect("gone").code,
        Code::NotFound
    );
    assert_eq!(hub.count("SELECT count(*) FROM p2p_sync.consumer_cursors").await, 0);
}

#[tokio::test]
async fn invariant_12_a_batch_is_bounded_in_bytes_and_one_change_always_comes_through() {
    let hub = Hub::new().await;
    let large = |n: u64, kib: usize| ValidOp {
        payload: Some(format!("{{\"n\": \"{}\"}}", "x".repeat(kib * 1024))),
        ..put(&format!("prontera/NPC_STATE/{n}"), n)
    };
    hub.write(vec![large(1, 9 * 1024)]).await;
    hub.write((2..=40).map(|n| large(n, 250)).collect()).await;
    let mut reader = hub.consumer("mariadb", &ConsumerFilter::default()).await;
    let mut sizes = Vec::new();
    loop {
        let batch = reader.next(ALL).await.expect("reads");
        if batch.is_empty() {
            break;
        }
        sizes.push(batch.told.len());
        reader.acknowledge(&batch).await.expect("acknowledges");
    }
    assert_eq!(sizes, [2, 32, 7], "the snapshot's line and 9 MiB, 8 MiB, the rest");
}

#[tokio::test]
async fn invariant_12_there_are_only_so_many_consumers_and_each_has_a_name_of_its_own() {
    let hub = Hub::new().await;
    hub.run("INSERT INTO p2p_sync.consumers (name) SELECT 'c' || n FROM generate_series(1, 63) AS n")
        .await;
    hub.store
        .add_consumer("last", &ConsumerFilter::default())
        .await
        .expect("the 64th");
    for name in ["one-more", "last", "no name"] {
        let refusal = hub
            .store
            .add_consumer(name, &ConsumerFilter::default())
            .await
            .expect_err(name);
        assert_eq!(refusal.code, Code::BadValue);
    }
    assert_eq!(hub.store.consumers(None).await.expect("reads").len(), 64);
}
