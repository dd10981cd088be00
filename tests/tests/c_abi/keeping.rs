//! Full queues, killed map servers and orderly ends: what was taken is kept, what is not taken has a code.

use p2p_sync_proto::{Code, v1::SyncDataType};
use uuid::Uuid;

use crate::{
    puppet::{Puppet, REJECTED, SPOOLED, number_of},
    world::{World, until},
};

const OPERATIONS: usize = 3000;
const CHAT: &str = r#"{"char_id":%,"text":"number %"}"#;

#[test]
fn invariant_07_a_full_queue_is_told_to_the_map_server_and_what_it_was_given_an_id_for_is_kept() {
    let mut world = World::not_started();
    let mut puppet = Puppet::new(&world, "max_queue_size = 16\n");
    let mut taken = Vec::new();
    until("the queue is full", || {
        let (ids, answer) = puppet.put_many(OPERATIONS, SyncDataType::ChatMessage, CHAT);
        let refused = answer["refused"].as_array().expect("a list");
        assert_eq!(ids.len() + refused.len(), OPERATIONS, "each call gives an id or a code");
        assert!(
            refused.iter().all(|code| *code == Code::QueueFull as i32),
            "{refused:?}"
        );
        taken.extend(ids);
        !refused.is_empty()
    });
    world.hub.start();
    assert!(puppet.flush());
    world.held().assert_log_is(&taken);
    world.assert_log_is_in_order_without_duplicates();
}

/// Has all of these on disk, with nobody at the other end.
fn spooled(puppet: &mut Puppet) -> Vec<Uuid> {
    let (taken, _) = puppet.put_many(OPERATIONS, SyncDataType::ChatMessage, CHAT);
    assert_eq!(taken.len(), OPERATIONS);
    until("all are on disk", || {
        puppet.count_in(SPOOLED, &taken) == OPERATIONS as u64
    });
    taken
}

#[test]
fn invariant_07_what_a_map_server_was_told_to_be_spooled_survives_its_being_killed() {
    let mut world = World::not_started();
    let mut puppet = Puppet::new(&world, "");
    let mut taken = spooled(&mut puppet);
    puppet.kill();
    puppet.start();
    taken.extend(spooled(&mut puppet));
    puppet.kill();
    world.hub.start();
    puppet.start();
    assert!(puppet.flush());
    world.held().assert_log_is(&taken);
    world.assert_log_is_in_order_without_duplicates();
}

#[test]
fn invariant_07_a_map_server_killed_in_mid_stream_loses_nothing_that_was_spooled() {
    let world = World::new();
    let mut puppet = Puppet::new(&world, "");
    puppet.wait_for_link();
    let mut kept = Vec::new();
    for _ in 0..3 {
        let (taken, _) = puppet.put_many(OPERATIONS, SyncDataType::ChatMessage, CHAT);
        until("some are on disk", || {
            puppet.count_in(SPOOLED, &taken[..1000]) + applied(&mut puppet, &taken[..1000]) == 1000
        });
        kept.extend_from_slice(&taken[..1000]);
        puppet.kill();
        puppet.start();
    }
    assert!(puppet.flush());
    let held = world.held();
    let missing = kept.iter().filter(|id| held.logged.get(id) != Some(&1)).count();
    assert_eq!(
        missing,
        0,
        "of {} that were spooled are missing or there twice",
        kept.len()
    );
    world.assert_log_is_in_order_without_duplicates();
}

fn applied(puppet: &mut Puppet, ids: &[Uuid]) -> u64 {
    puppet.count_in(crate::puppet::APPLIED, ids)
}

#[test]
fn invariant_07_an_orderly_end_with_the_hub_down_keeps_all_that_was_taken() {
    let mut world = World::not_started();
    let mut puppet = Puppet::new(&world, "");
    let mut taken = Vec::new();
    for round in 0..4 {
        let (ids, _) = puppet.put_many(OPERATIONS, SyncDataType::ChatMessage, CHAT);
        assert_eq!(ids.len(), OPERATIONS);
        taken.extend(ids);
        // In the same process, twice, and by leaving `main` as a server does that forgets to.
        if round % 2 == 0 {
            puppet.tell(&["final"]);
            puppet.tell(&["final"]);
            let refused = puppet.tell(&["put", &number_of(SyncDataType::ChatMessage), "0", "prontera", "{}"]);
            assert_eq!(refused["id"], "", "{refused}");
            puppet.init();
        } else {
            puppet.leave();
            puppet.start();
        }
    }
    world.hub.start();
    assert!(puppet.flush());
    world.held().assert_log_is(&taken);
    world.assert_log_is_in_order_without_duplicates();
}

#[test]
fn invariant_07_an_end_that_cannot_keep_what_was_taken_says_how_much() {
    let world = World::not_started();
    let mut puppet = Puppet::new(&world, "agent_socket = nobody.sock\n");
    let (ids, _) = puppet.put_many(3, SyncDataType::ChatMessage, CHAT);
    assert_eq!(ids.len(), 3);
    let answer = puppet.tell(&["final"]);
    assert_eq!(answer["code"], Code::ShutdownIncomplete as i32, "{answer}");
    let sentence = answer["message"].as_str().expect("a text");
    assert!(sentence.contains("lost: 3;"), "{sentence}");
}

#[test]
fn invariant_07_an_operation_that_the_hub_refuses_is_told_with_its_reason_and_readable_there() {
    let world = World::new();
    let mut puppet = Puppet::new(&world, "");
    let item = number_of(SyncDataType::ItemDrop);
    let id = puppet.id(&["put_notified", &item, "0", "prontera", "1", r#"{"amount":-1}"#]);
    let told = puppet.process_until("the refusal is told", |told| {
        told.iter().any(|one| one["id"] == id.as_str())
    });
    let told = told.iter().find(|one| one["id"] == id.as_str()).expect("just seen");
    assert_eq!(
        (&told["state"], &told["success"]),
        (&REJECTED.into(), &false.into()),
        "{told}"
    );
    assert_eq!(told["code"], Code::ImpossibleValue as i32, "{told}");
    let result = puppet.tell(&["result", &id]);
    assert_eq!(
        (&result["state"], &result["message"]),
        (&REJECTED.into(), &told["message"])
    );
    let rows = world.rows("SELECT operation_id, reason FROM p2p_sync.rejected_operations", &[]);
    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0].get::<_, Uuid>(0).to_string(), id);
    assert_eq!(told["message"], rows[0].get::<_, String>(1).as_str());
}
