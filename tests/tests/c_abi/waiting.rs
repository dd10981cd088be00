//! Calls of a map server that wait for nothing, calls that wait at most their bound, and timeouts that are not failures.

use p2p_sync_proto::{Code, v1::SyncDataType};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::{
    puppet::{ACCEPTED, APPLIED, Puppet, SPOOLED, UNKNOWN, number_of},
    world::World,
};

const CALLS: usize = 10_000;
/// The default of `critical_timeout_ms`, the shortest wait for the network there is.
const CRITICAL_TIMEOUT_US: i64 = 500_000;
/// A busy machine may take the processor from a thread for so long.
const PREEMPTION_US: i64 = 250_000;

fn signal(world: &World, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(world.hub.pid()).expect("a process id")).expect("not 0");
    kill_process(pid, signal).expect("it is our child");
}

fn took_us(answer: &Value) -> i64 {
    answer["us"]
        .as_i64()
        .unwrap_or_else(|| panic!("it was not measured: {answer}"))
}

/// A hub that has answered this map server, and has stopped to.
fn frozen() -> (World, Puppet) {
    let world = World::new();
    let mut puppet = Puppet::new(&world, "");
    puppet.wait_for_link();
    signal(&world, Signal::STOP);
    (world, puppet)
}

fn assert_nothing_was_waited_for(answer: &Value) {
    let of = |name: &str| answer[name].as_i64().expect("measured");
    assert!(
        of("median_us") < 1000,
        "the median call waits for the disk: {}",
        of("median_us")
    );
    assert!(
        of("p999_us") < 50_000,
        "one call of a thousand took {} us",
        of("p999_us")
    );
    assert!(
        of("slowest_us") < CRITICAL_TIMEOUT_US,
        "a call took {} us",
        of("slowest_us")
    );
    let refused = answer["refused"].as_array().expect("a list");
    assert!(
        refused.iter().all(|code| *code == Code::QueueFull as i32),
        "{refused:?}"
    );
}

#[test]
fn invariant_05_a_map_servers_calls_wait_for_nothing_while_the_hub_is_frozen() {
    let (_world, mut puppet) = frozen();
    for data_type in [
        SyncDataType::ChatMessage,
        SyncDataType::PlayerPosition,
        SyncDataType::CriticalGameState,
    ] {
        let (_, answer) = puppet.put_many(CALLS, data_type, r#"{"char_id":%,"text":"number %"}"#);
        assert_nothing_was_waited_for(&answer);
    }
    let item = number_of(SyncDataType::ItemDrop);
    for fields in [
        vec!["put", &item, "0", "prontera", r#"{"drop_id":1}"#, "1"],
        vec!["put_notified", &item, "0", "prontera", "7", "{}"],
        vec!["critical_async", &item, "0", "prontera", r#"{"drop_id":2}"#],
        vec!["remove", &item, "0", "prontera", "7"],
        vec![
            "group",
            &item,
            "0",
            "prontera",
            r#"{"drop_id":3}"#,
            &item,
            "0",
            "prontera",
            r#"{"drop_id":4}"#,
        ],
        vec!["get", &item, "0", "prontera", r#"{"entity":"1"}"#],
        vec!["get_notified", &item, "0", "prontera", r#"{"entity":"1"}"#],
        vec!["cache_set", "key", "value", "0"],
        vec!["cache_ask", "another key"],
        vec!["exists_ask", "another key"],
        vec!["process", "0"],
    ] {
        let answer = puppet.tell(&fields);
        assert!(took_us(&answer) < PREEMPTION_US, "{fields:?}: {answer}");
    }
    // Its bound is that of messages on their way.
    let answer = puppet.tell(&["final"]);
    assert!(took_us(&answer) < 5_000_000 + PREEMPTION_US, "{answer}");
    assert_eq!(answer["logged_elsewhere"], false);
}

#[test]
fn invariant_05_one_waiting_call_waits_its_timeout_the_next_not_at_all_until_the_hub_answers_again() {
    let (world, mut puppet) = frozen();
    let answer = puppet.critical();
    assert!(
        (CRITICAL_TIMEOUT_US..CRITICAL_TIMEOUT_US + PREEMPTION_US).contains(&took_us(&answer)),
        "the first call: {answer}"
    );
    for _ in 0..100 {
        let answer = puppet.critical();
        assert!(took_us(&answer) < PREEMPTION_US, "a call after the first: {answer}");
        let state = answer["state"].as_i64().expect("a state");
        assert!([ACCEPTED, SPOOLED].contains(&state), "{answer}");
    }
    for fields in [vec!["cache_get", "a key"], vec!["cache_exists", "a key"]] {
        let answer = puppet.tell(&fields);
        let took = answer["us"].as_i64().unwrap_or_default();
        assert!(took < CRITICAL_TIMEOUT_US + PREEMPTION_US, "{fields:?}: {answer}");
    }
    assert!(puppet.tell(&["numbers"])["timeouts"].as_i64() >= Some(1));
    signal(&world, Signal::CONT);
    puppet.wait_for_link();
    world.assert_log_is_in_order_without_duplicates();
}

#[test]
fn invariant_05_one_waiting_question_waits_its_timeout_the_next_not_at_all_until_the_hub_answers_again() {
    let (world, mut puppet) = frozen();
    let answer = puppet.tell(&["embedding", "a text"]);
    assert!(
        (CRITICAL_TIMEOUT_US..CRITICAL_TIMEOUT_US + PREEMPTION_US).contains(&took_us(&answer)),
        "the first call: {answer}"
    );
    for _ in 0..50 {
        for fields in [["embedding", "a text"], ["similar", "[0.5]"]] {
            let answer = puppet.tell(&fields);
            assert!(took_us(&answer) < PREEMPTION_US, "a call after the first: {answer}");
        }
    }
    signal(&world, Signal::CONT);
    puppet.wait_for_link();
    assert!(
        took_us(&puppet.tell(&["embedding", "a text"])) < 5_000_000,
        "answered, or not waited for"
    );
}

#[test]
fn invariant_06_a_timeout_is_unknown_to_the_map_server_and_settles_later_under_its_id() {
    let (world, mut puppet) = frozen();
    let answer = puppet.critical();
    let id = answer["id"].as_str().expect("an id").to_owned();
    assert!(!id.is_empty(), "what timed out is taken all the same: {answer}");
    let waited = puppet.tell(&["wait", &id, "50"]);
    assert_eq!(waited["state"], UNKNOWN, "{waited}");
    assert_eq!(waited["code"], Code::UnknownOutcome as i32, "{waited}");
    assert_eq!(waited["success"], false);
    let pending = puppet.tell(&["result", &id]);
    assert_eq!(pending["message"], "pending", "{pending}");

    signal(&world, Signal::CONT);
    let settled = puppet.settled(&id);
    assert_eq!(
        (&settled["state"], &settled["success"]),
        (&APPLIED.into(), &true.into()),
        "{settled}"
    );
    assert_eq!(settled["id"], id.as_str());
    assert!(puppet.flush());
    let id: uuid::Uuid = id.parse().expect("an id");
    let rows = world.rows(
        "SELECT count(*) FROM p2p_sync.operations WHERE operation_id = $1",
        &[&id],
    );
    assert_eq!(rows[0].get::<_, i64>(0), 1, "exactly one row under the same id");
}
