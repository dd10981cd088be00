use std::sync::mpsc;

use p2p_sync_proto::{
    keys::{KeyId, MasterKey},
    v1::SyncDataType,
};

use super::*;

/// For what happens soon, on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_mins(1);

/// Settings with an outbox in a folder and nobody where the hub should be.
fn config(folder: &std::path::Path) -> Config {
    let master = MasterKey::generate(KeyId::parse("k1").expect("valid"));
    let credential = master.credential(Uuid::from_u128(1), 1).to_text().to_string();
    let text = format!("encryption_key = {credential}\nmain_server_endpoint = http://127.0.0.1:1\n");
    Config::parse(&text, folder, |_| None).expect("valid settings")
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder can be made")
}

fn submission(data_type: SyncDataType, payload: &str) -> Submission<'_> {
    Submission {
        data_type,
        map: "prontera",
        account_id: 0,
        entity: None,
        char_id: None,
        payload: Some(payload),
        priority: crate::Priority::ByType,
        notify: false,
    }
}

/// Runs something on another thread and gives what it gave; panics if it takes forever.
fn ends<T: Send + 'static>(what: &str, run: impl FnOnce() -> T + Send + 'static) -> T {
    let (told, ended) = mpsc::sync_channel(1);
    std::thread::spawn(move || told.send(run()));
    ended
        .recv_timeout(PATIENCE)
        .unwrap_or_else(|error| panic!("{what}: {error}"))
}

#[test]
fn invariant_05_a_shutdown_is_bounded_where_the_outbox_hangs_and_so_is_what_follows() {
    let folder = folder();
    let agent = Agent::start(config(folder.path())).expect("starts");
    let shared = agent.shared.clone();
    // What the spooler needs for each of its rounds: it hangs as it does in a call to a disk that does not answer.
    let held = shared.pending();
    let ended = ends("it is shut down", move || {
        let ended = agent.shutdown_within(Duration::from_millis(50));
        let again = agent.shutdown_within(Duration::ZERO);
        drop(agent);
        [ended, again]
    });
    drop(held);
    for ended in ended {
        assert_eq!(ended.expect_err("it hangs").code, Code::ShutdownIncomplete);
    }
}

/// Submits what is kept as `every` until the outbox is at its bound; gives how many were taken.
fn fill(agent: &Agent) -> u64 {
    let payload = format!(r#"{{"char_id":1,"text":"{}"}}"#, "x".repeat(4000));
    let mut taken = 0;
    let began = Instant::now();
    while !agent.status().outbox_full {
        assert!(began.elapsed() < PATIENCE, "it does not fill up");
        taken += u64::from(agent.submit(&submission(SyncDataType::ChatMessage, &payload)).is_ok());
        std::thread::sleep(Duration::from_millis(1));
    }
    taken
}

#[test]
fn invariant_07_what_only_memory_had_room_for_at_the_outboxs_own_bound_is_on_disk_after_a_shutdown() {
    let folder = folder();
    let config = Config {
        outbox_bytes_max: 64 * 1024,
        ..config(folder.path())
    };
    let agent = Agent::start(config.clone()).expect("starts");
    let mut taken = fill(&agent);
    let on_disk = agent.status().outbox_operations;
    for number in 0..100 {
        let payload = format!(r#"{{"drop_id":{number}}}"#);
        agent
            .submit(&submission(SyncDataType::ItemDrop, &payload))
            .expect("memory has room for it");
        taken += 1;
    }
    // As a link does that takes a moment to end.
    agent.shared.stopping.store(true, Ordering::SeqCst);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(agent.status().outbox_operations, on_disk, "the bound still holds");
    agent.shutdown().expect("the disk has room");
    drop(agent);
    let agent = Agent::start(config).expect("starts again");
    assert_eq!(agent.status().outbox_operations, taken);
}

#[test]
fn who_waits_for_a_flush_is_let_go_by_a_shutdown() {
    let folder = folder();
    let agent = Arc::new(Agent::start(config(folder.path())).expect("starts"));
    let payload = r#"{"char_id":1,"text":"nobody takes it"}"#;
    agent
        .submit(&submission(SyncDataType::ChatMessage, payload))
        .expect("taken");
    let flushing = {
        let agent = agent.clone();
        std::thread::spawn(move || agent.flush(PATIENCE * 2))
    };
    while !agent.shared.flushing.load(Ordering::Relaxed) {
        std::thread::yield_now();
    }
    agent.shutdown().expect("the disk has room");
    let flushed = ends("the flush", move || flushing.join().expect("no panic"));
    assert!(!flushed, "it is on disk, not settled");
}

#[test]
fn what_comes_back_from_disk_as_it_is_settled_is_counted_once() {
    let folder = folder();
    let agent = Agent::start(config(folder.path())).expect("starts");
    let payload = r#"{"char_id":1,"text":"heard once"}"#;
    let id = agent
        .submit(&submission(SyncDataType::ChatMessage, payload))
        .expect("taken");
    while agent.result(id).state != OperationState::Spooled || agent.shared.pending().bulk_ready() == 0 {
        std::thread::yield_now();
    }
    let shared = &agent.shared;
    let position = shared.pending().oldest().expect("it waits");
    for _ in 0..2 {
        let entry = shared.pending().remove(position).expect("it waits");
        shared.push(entry.clone());
        let flight = shared.pending().take_bulk(1).expect("it waits");
        shared.answer(&flight, v1::BatchReply::default());
        shared.push(entry);
    }
    assert_eq!(agent.result(id).state, OperationState::Applied);
    assert_eq!(agent.status().counters.applied, 1);
}
