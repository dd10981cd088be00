//! What a map server is told: answers to questions, updates it follows, results of groups; on the thread that asks.

use p2p_sync_proto::v1::SyncDataType;
use serde_json::Value;

use crate::{
    puppet::{APPLIED, LIMBO, Puppet, REJECTED, number_of},
    world::{World, until},
};

/// Numbers of `p2p_sync_event_kind`, as the header has them.
const LINK_UP: i64 = 3;
const LINK_DOWN: i64 = 4;
const LEASE_GRANTED: i64 = 5;
const LEASE_LOST: i64 = 7;
const LEASE_HANDING_OVER: i64 = 8;

fn started() -> (World, Puppet) {
    let world = World::new();
    let mut puppet = Puppet::new(&world, "");
    puppet.wait_for_link();
    (world, puppet)
}

fn item() -> String {
    number_of(SyncDataType::ItemDrop)
}

/// An operation that is applied when this returns.
fn put(puppet: &mut Puppet, map: &str, payload: &str) {
    let id = puppet.id(&["put", &item(), "0", map, payload]);
    let settled = puppet.settled(&id);
    assert_eq!(settled["state"], APPLIED, "{settled}");
}

fn of_kind<'a>(told: &'a [Value], kind: &str) -> Vec<&'a Value> {
    told.iter().filter(|one| one["kind"] == kind).collect()
}

#[test]
fn a_subscriber_is_told_what_stands_and_what_changes_in_order_on_its_own_thread() {
    let (world, mut writer) = started();
    put(&mut writer, "prontera", r#"{"drop_id":1,"amount":1}"#);
    let mut reader = Puppet::new(&world, "");
    let subscription = reader.tell(&["subscribe", "prontera"])["subscription"]
        .as_u64()
        .expect("a number");
    assert!(subscription > 0);
    let path = |one: &Value| one["path"].as_str().expect("a path").to_owned();
    let snapshot = reader.process_until("the snapshot is told", |told| {
        of_kind(told, "update")
            .iter()
            .any(|one| path(one) == "prontera/ITEM_DROP/1")
    });
    assert_eq!(of_kind(&snapshot, "update")[0]["snapshot"], true);

    for amount in 2..=20 {
        put(
            &mut writer,
            "prontera",
            &format!(r#"{{"drop_id":2,"amount":{amount}}}"#),
        );
    }
    put(&mut writer, "izlude", r#"{"drop_id":9}"#);
    let id = writer.id(&["remove", &item(), "0", "prontera", "1"]);
    assert_eq!(writer.settled(&id)["state"], APPLIED);
    let told = reader.process_until("the deletion is told", |told| {
        of_kind(told, "update").iter().any(|one| one["deleted"] == true)
    });
    let updates = of_kind(&told, "update");
    assert!(
        updates
            .iter()
            .all(|one| one["subscription"] == subscription && path(one).starts_with("prontera/"))
    );
    let sequences: Vec<_> = updates
        .iter()
        .map(|one| one["stream_sequence"].as_u64().expect("a number"))
        .collect();
    assert!(sequences.is_sorted_by(|before, after| before < after), "{sequences:?}");
    let newest = updates
        .iter()
        .rfind(|one| path(one) == "prontera/ITEM_DROP/2")
        .expect("it changed");
    let payload: Value = serde_json::from_str(newest["payload"].as_str().expect("text")).expect("JSON");
    assert_eq!(payload["amount"], 20);

    assert_eq!(reader.tell(&["unsubscribe", &subscription.to_string()])["ok"], true);
    assert_eq!(reader.tell(&["unsubscribe", &subscription.to_string()])["ok"], false);
    put(&mut writer, "prontera", r#"{"drop_id":3}"#);
    let after = reader.tell(&["process", "0"]);
    assert!(
        of_kind(after["told"].as_array().expect("a list"), "update").is_empty(),
        "{after}"
    );
}

#[test]
fn callbacks_run_in_process_sync_queue_alone_and_no_more_than_asked_for() {
    let (_world, mut puppet) = started();
    puppet.process_until("the link is told", |told| {
        told.iter().any(|one| one["event"] == LINK_UP)
    });
    let ids: Vec<String> = (0..10)
        .map(|entity| puppet.id(&["put_notified", &item(), "0", "prontera", &entity.to_string(), "{}"]))
        .collect();
    assert!(puppet.flush());
    let mut told = Vec::new();
    until("each is told of", || {
        let answer = puppet.tell(&["process", "1"]);
        assert!(answer["ran"].as_u64() <= Some(1), "{answer}");
        // On a busy machine the link may go and come back meanwhile, which is told as well.
        told.extend(
            of_kind(answer["told"].as_array().expect("a list"), "settled")
                .into_iter()
                .cloned(),
        );
        told.len() >= ids.len()
    });
    assert!(
        told.iter()
            .all(|one| one["on_the_callers_thread"] == true && one["success"] == true),
        "{told:?}"
    );
    let mut told_ids: Vec<&str> = told.iter().map(|one| one["id"].as_str().expect("an id")).collect();
    told_ids.sort_unstable();
    let mut ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    ids.sort_unstable();
    assert_eq!(told_ids, ids, "each once");
    let after = puppet.tell(&["process", "0"]);
    assert!(
        of_kind(after["told"].as_array().expect("a list"), "settled").is_empty(),
        "{after}"
    );
}

#[test]
fn the_link_is_told_when_it_goes_and_when_it_comes() {
    let (mut world, mut puppet) = started();
    let event = |number: i64| move |told: &[Value]| told.iter().any(|one| one["event"] == number);
    puppet.process_until("the link is up", event(LINK_UP));
    world.hub.kill();
    let told = puppet.process_until("the link is down", event(LINK_DOWN));
    let down = told.iter().find(|one| one["event"] == LINK_DOWN).expect("just seen");
    assert!(down["code"].as_i64() > Some(0) && down["message"] != "", "{down}");
    world.hub.start();
    puppet.process_until("the link is up again", event(LINK_UP));
    let log = puppet.log();
    assert!(log.contains("the link is down"), "{log}");
    let details: Vec<&str> = log.lines().filter(|line| line.starts_with("4 ")).collect();
    assert!(details.is_empty(), "each attempt to connect is told: {details:?}");
}

#[test]
fn a_question_is_answered_without_waiting_by_result_or_by_callback() {
    let (_world, mut puppet) = started();
    put(&mut puppet, "prontera", r#"{"drop_id":1,"amount":17}"#);
    let question = [&item(), "0", "prontera", r#"{"entity":"1"}"#];
    let fields = |command| [&[command], question.as_slice()].concat();
    let id = puppet.id(&fields("get"));
    let answer = puppet.settled(&id);
    assert_eq!(
        (&answer["state"], &answer["success"]),
        (&APPLIED.into(), &true.into()),
        "{answer}"
    );
    let data: Value = serde_json::from_str(answer["data"].as_str().expect("text")).expect("JSON");
    assert!(data.to_string().contains("17"), "{data}");

    let id = puppet.id(&fields("get_notified"));
    let told = puppet.process_until("the answer is told", |told| {
        told.iter().any(|one| one["id"] == id.as_str())
    });
    let told = told.iter().find(|one| one["id"] == id.as_str()).expect("just seen");
    assert_eq!(
        (&told["kind"], &told["success"]),
        (&"answer".into(), &true.into()),
        "{told}"
    );
    assert_eq!(told["data"], answer["data"]);
}

#[test]
fn a_question_that_nobody_answers_is_told_to_be_unanswered() {
    let world = World::not_started();
    let mut puppet = Puppet::new(&world, "");
    let id = puppet.id(&["get_notified", &item(), "0", "prontera", r#"{"entity":"1"}"#]);
    let told = puppet.process_until("it is told", |told| told.iter().any(|one| one["id"] == id.as_str()));
    let told = told.iter().find(|one| one["id"] == id.as_str()).expect("just seen");
    assert_eq!(
        (&told["state"], &told["success"]),
        (&REJECTED.into(), &false.into()),
        "{told}"
    );
    assert_eq!(told["code"], p2p_sync_proto::Code::HubUnavailable as i32, "{told}");
}

#[test]
fn what_is_cached_is_seen_at_once_and_by_the_next_start() {
    let (_world, mut puppet) = started();
    assert_eq!(puppet.tell(&["cache_get", "key"])["value"], "");
    assert_eq!(puppet.tell(&["cache_exists", "key"])["exists"], false);
    assert_eq!(puppet.tell(&["cache_set", "key", "a value", "600"])["ok"], true);
    assert_eq!(puppet.tell(&["cache_get", "key"])["value"], "a value");
    assert_eq!(puppet.tell(&["cache_exists", "key"])["exists"], true);
    // It goes to the hub in the background; what reads it there has no cache of its own to look into.
    until("the hub holds it", || {
        puppet.leave();
        puppet.start();
        puppet.wait_for_link();
        if puppet.tell(&["cache_get", "key"])["value"] == "a value" {
            return true;
        }
        puppet.tell(&["cache_set", "key", "a value", "600"]);
        false
    });
    let id = puppet.id(&["cache_ask", "key"]);
    let told = puppet.process_until("the answer is told", |told| {
        told.iter().any(|one| one["id"] == id.as_str())
    });
    let told = told.iter().find(|one| one["id"] == id.as_str()).expect("just seen");
    assert_eq!(
        (&told["success"], &told["data"]),
        (&true.into(), &"a value".into()),
        "{told}"
    );
    for (key, there) in [("key", "true"), ("no key", "false")] {
        let id = puppet.id(&["exists_ask", key]);
        assert_eq!(puppet.settled(&id)["data"], there, "{key}");
    }
    assert_eq!(puppet.tell(&["cache_delete", "key"])["ok"], true);
    assert_eq!(puppet.tell(&["cache_exists", "key"])["exists"], false);
    assert_eq!(puppet.tell(&["cache_get", "key"])["value"], "");
}

#[test]
fn a_group_takes_effect_whole_or_not_at_all() {
    let (world, mut puppet) = started();
    let item = item();
    let of_path = |path: &str| {
        let rows = world.rows(
            "SELECT payload->>'amount' FROM p2p_sync.states WHERE path = $1",
            &[&path],
        );
        rows.first().map(|row| row.get::<_, String>(0))
    };
    let id = puppet.id(&[
        "group",
        &item,
        "0",
        "prontera",
        r#"{"drop_id":1,"amount":5}"#,
        &item,
        "0",
        "izlude",
        r#"{"drop_id":2,"amount":7}"#,
    ]);
    let told = puppet.process_until("the group is told of", |told| {
        told.iter().any(|one| one["id"] == id.as_str())
    });
    assert!(told.iter().any(|one| one["success"] == true), "{told:?}");
    assert_eq!(of_path("prontera/ITEM_DROP/1").as_deref(), Some("5"));
    assert_eq!(of_path("izlude/ITEM_DROP/2").as_deref(), Some("7"));

    let id = puppet.id(&[
        "group",
        &item,
        "0",
        "prontera",
        r#"{"drop_id":1,"amount":6}"#,
        &item,
        "0",
        "izlude",
        r#"{"drop_id":2,"amount":-1}"#,
    ]);
    let settled = puppet.settled(&id);
    assert_eq!(
        (&settled["state"], &settled["success"]),
        (&REJECTED.into(), &false.into()),
        "{settled}"
    );
    assert_eq!(
        of_path("prontera/ITEM_DROP/1").as_deref(),
        Some("5"),
        "its neighbour was refused"
    );
    let refused = puppet.tell(&[
        "group",
        &item,
        "0",
        "prontera",
        r#"{"drop_id":3}"#,
        &item,
        "0",
        "izlude",
        "no JSON",
    ]);
    assert_eq!(refused["id"], "", "{refused}");
}

#[test]
fn players_come_and_go_and_maps_may_be_written() {
    let (world, mut puppet) = started();
    let came = puppet.id(&["enter", "2000001", "150001", "prontera"]);
    let went = puppet.id(&["leave", "2000001", "150001", "prontera"]);
    for id in [&came, &went] {
        assert_eq!(puppet.settled(id)["state"], APPLIED);
    }
    let rows = world.rows(
        "SELECT operation_id, payload->>'event' FROM p2p_sync.operations WHERE path LIKE '@char/150001/%' \
         ORDER BY stream_sequence",
        &[],
    );
    let told: Vec<(String, String)> = rows
        .iter()
        .map(|row| (row.get::<_, uuid::Uuid>(0).to_string(), row.get(1)))
        .collect();
    assert_eq!(told, [(came, "enter".to_owned()), (went, "leave".to_owned())]);
    assert_eq!(puppet.tell(&["may_write", "prontera"])["may"], true);
    assert_eq!(puppet.tell(&["may_write", "../etc"])["may"], false);
    let status = puppet.tell(&["status"]);
    assert_eq!(status["status"]["host_id"], puppet.host_id().to_string());
    assert_eq!(status["status"]["link_up"], true);
}

#[test]
fn invariant_04_a_map_server_is_told_when_it_may_write_a_map_and_when_no_more() {
    let world = World::governed(3);
    let mut puppet = Puppet::new(&world, "");
    let is_up = |told: &[Value]| of_kind(told, "event").iter().any(|one| one["event"] == LINK_UP);
    puppet.process_until("the hub answers", is_up);
    assert_eq!(puppet.tell(&["may_write", "prontera"])["may"], false);
    let host = puppet.host_id().to_string();
    world.hub.command(&["maps", "assign", "prontera", &host]);
    let is_told = |told: &[Value], event: i64| {
        let events = of_kind(told, "event");
        events
            .iter()
            .any(|one| one["event"] == event && one["map"] == "prontera")
    };
    puppet.process_until("the map is granted", |told| is_told(told, LEASE_GRANTED));
    assert_eq!(puppet.tell(&["may_write", "prontera"])["may"], true);
    put(&mut puppet, "prontera", r#"{"drop_id":1,"amount":1}"#);
    world.hub.command(&["maps", "release", "prontera"]);
    puppet.process_until("the map is lost", |told| is_told(told, LEASE_LOST));
    assert_eq!(puppet.tell(&["may_write", "prontera"])["may"], false);
    let id = puppet.id(&["put", &item(), "0", "prontera", r#"{"drop_id":1,"amount":2}"#]);
    assert_eq!(puppet.settled(&id)["state"], LIMBO);
}

#[test]
fn invariant_04_a_map_server_asks_for_a_map_and_hands_it_over_to_another_one() {
    let world = World::with(&[
        ("leases", "required".to_owned()),
        ("lease_seconds", "60".to_owned()),
        ("catch_up_seconds", "1".to_owned()),
    ]);
    // Who may ask for it is any host.
    world.hub.command(&["maps", "rule", "prontera", "--automatic", "no"]);
    let [mut here, mut there] = [(); 2].map(|()| {
        let mut puppet = Puppet::new(&world, "");
        let is_up = |told: &[Value]| of_kind(told, "event").iter().any(|one| one["event"] == LINK_UP);
        puppet.process_until("the hub answers", is_up);
        puppet
    });
    let is_told = |told: &[Value], event: i64| {
        let mut events = of_kind(told, "event").into_iter();
        events.any(|one| one["event"] == event && one["map"] == "prontera")
    };
    let refused = here.tell(&["assign_map", "no map"]);
    assert_eq!(refused["id"], "", "{refused}");
    here.id(&["assign_map", "prontera"]);
    let told = here.process_until("it is assigned and granted", |told| {
        is_told(told, LEASE_GRANTED) && !of_kind(told, "assigned").is_empty()
    });
    assert_eq!(of_kind(&told, "assigned")[0]["success"], true, "{told:?}");
    put(&mut here, "prontera", r#"{"drop_id":1,"amount":1}"#);

    let other = there.host_id().to_string();
    let migrated = here.id(&["migrate_map", "prontera", &other]);
    assert_eq!(here.settled(&migrated)["state"], APPLIED);
    let told = here.process_until("it is to be ended", |told| is_told(told, LEASE_HANDING_OVER));
    let asked = of_kind(&told, "event")
        .into_iter()
        .find(|one| one["event"] == LEASE_HANDING_OVER);
    assert_eq!(asked.expect("told")["message"], other.as_str());
    assert_eq!(here.tell(&["may_write", "prontera"])["may"], false);
    let last = here.id(&["put", &item(), "0", "prontera", r#"{"drop_id":1,"amount":2}"#]);
    here.id(&["release_map", "prontera"]);
    let told = here.process_until("it is released", |told| !of_kind(told, "released").is_empty());
    assert_eq!(of_kind(&told, "released")[0]["success"], true, "{told:?}");
    assert_eq!(here.settled(&last)["state"], APPLIED, "before it passed on");
    there.process_until("the other one has it", |told| is_told(told, LEASE_GRANTED));
    assert_eq!(there.tell(&["may_write", "prontera"])["may"], true);
    let listed = there.id(&["list_maps", "prontera"]);
    let listed = there.settled(&listed);
    let maps: Value = serde_json::from_str(listed["data"].as_str().expect("data")).expect("JSON");
    assert_eq!(maps["maps"][0]["host_id"], other.as_str(), "{maps}");
}
