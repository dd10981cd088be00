//! Memory that is bounded, and messages that are refused because they are not.

use std::path::Path;

use p2p_sync_proto::{
    body,
    envelope::{self, Lane},
    keys::Direction,
    limits::{BATCH_OPS_MAX, SEALED_BYTES_MAX},
    v1::{RejectCode, SyncDataType},
};
use p2p_sync_tests::{recording::Happening, stack::Agent};
use tonic::Code;

use crate::{
    wire::{WireHost, batch, id_of},
    world::{PROGRAM, World, run, until},
};

const MIB: u64 = 1024 * 1024;
const FED_OPS: usize = 200_000;
/// Of the agent, from before the first operation to after the last. Results that are kept (262,144) take most of it,
/// then 10,000 operations in memory, then the lanes and redb's cache.
const AGENT_GROWTH_BYTES_MAX: u64 = 64 * MIB;
/// Of the hub, over messages that try to make it take more: some sealed messages of the longest kind.
const HUB_GROWTH_BYTES_MAX: u64 = 32 * MIB;

/// A size of a process by its name in `/proc/<pid>/status`.
fn memory(pid: u32, name: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(name))
        .expect("Linux tells it");
    let kib: u64 = line
        .trim_start_matches(':')
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .expect("a number");
    kib * 1024
}

#[test]
fn invariant_12_an_agent_without_a_hub_takes_no_more_memory_however_much_it_is_fed() {
    let world = World::not_started();
    let folder = world.folder.path().join("agent");
    let credential = world.hub.add_host(1);
    let mut agent = Agent::new(Path::new(PROGRAM), &folder, &world.endpoint(), &credential, &[]);
    agent.start();
    agent.ask(serde_json::json!({"do": "status"}));
    let before = memory(agent.pid(), "VmRSS");
    for number in 0..FED_OPS {
        let of = |data_type, payload: String| Happening {
            at_ms: 0,
            data_type,
            map: "prontera".to_owned(),
            account_id: 2_000_001,
            entity: None,
            payload: Some(payload),
        };
        let happening = match number % 3 {
            0 => of(
                SyncDataType::ChatMessage,
                format!(r#"{{"char_id":{},"text":"number {number}"}}"#, number % 150),
            ),
            1 => of(
                SyncDataType::ItemDrop,
                format!(r#"{{"drop_id":{},"amount":1}}"#, number % 5000),
            ),
            _ => of(
                SyncDataType::PlayerPosition,
                format!(r#"{{"char_id":{number},"x":1,"y":2}}"#),
            ),
        };
        assert!(
            agent.submit(number as u64, &happening),
            "the agent is gone: {}",
            agent.log()
        );
    }
    until("all are answered", || {
        let ledger = agent.ledger();
        ledger.ids.len() + ledger.refused.len() == FED_OPS
    });
    let grown = memory(agent.pid(), "VmHWM").saturating_sub(before);
    println!("the agent grew by {} KiB", grown / 1024);
    assert!(grown < AGENT_GROWTH_BYTES_MAX, "the agent grew by {} MiB", grown / MIB);
}

#[test]
fn invariant_12_the_hub_refuses_messages_beyond_the_limits_and_stays_up_and_small() {
    let world = World::new();
    let host = WireHost::new(&world.endpoint(), &world.hub.add_host(1));
    let put = |sequence| {
        host.operation(
            sequence,
            &format!("prontera/ITEM_DROP/{sequence}"),
            Some(r#"{"amount":1}"#),
        )
    };
    let full: Vec<_> = (1..=BATCH_OPS_MAX as u64).map(put).collect();
    run(async {
        let channel = host.connect().await;
        let taken = host
            .critical(&channel, host.seal(Lane::Critical, &batch(&full)))
            .await
            .expect("answered");
        assert_eq!((taken.code(), taken.outcomes.len()), (RejectCode::None, 0));
        let before = memory(world.hub.pid(), "VmHWM");
        for round in 0..10 {
            let first = 1000 * (round + 1);
            let one_more: Vec<_> = (first..=first + BATCH_OPS_MAX as u64).map(put).collect();
            for lane in [Lane::Critical, Lane::Bulk] {
                let sealed = host.seal(lane, &batch(&one_more));
                let refused = match lane {
                    Lane::Critical => host.critical(&channel, sealed).await.expect("answered"),
                    _ => host.bulk(&channel, vec![sealed]).await.expect("answered").remove(0),
                };
                assert_eq!(refused.code(), RejectCode::BadRequest, "{}", refused.message);
                assert_eq!(
                    refused.retry_after_ms, 0,
                    "to be sent again it would have to be another message"
                );
            }

            let mut too_long = host.seal(Lane::Critical, &batch(&full));
            too_long.body = vec![0; SEALED_BYTES_MAX + 1].into();
            let refused = host.critical(&channel, too_long.clone()).await.expect_err("too long");
            assert_eq!(refused.code(), Code::OutOfRange, "{refused}");
            let refused = host.bulk(&channel, vec![too_long]).await.expect_err("too long");
            assert_eq!(refused.code(), Code::OutOfRange, "{refused}");

            let refused = host.critical(&channel, swollen(&host)).await.expect_err("swells");
            assert_eq!(refused.code(), Code::Unauthenticated, "{refused}");
        }
        let grown = memory(world.hub.pid(), "VmHWM") - before;
        assert!(grown < HUB_GROWTH_BYTES_MAX, "the hub grew by {} MiB", grown / MIB);
        let after = put(1 << 20);
        let taken = host
            .critical(&channel, host.seal(Lane::Critical, &batch(&[after])))
            .await
            .expect("still up");
        assert_eq!((taken.code(), taken.outcomes.len()), (RejectCode::None, 0));
    });
    let held = world.held();
    assert!(full.iter().all(|operation| held.logged.contains_key(&id_of(operation))));
    assert_eq!(held.logged.len(), BATCH_OPS_MAX + 1);
}

/// A sealed message of some kilobytes that unpacks to 128 MiB.
fn swollen(host: &WireHost) -> p2p_sync_proto::v1::Sealed {
    let mut plaintext = body::encode(&batch(&vec![host.operation(1, "prontera/MAP_STATE", Some("{}")); 100]));
    plaintext.truncate(1);
    assert_eq!(*plaintext, [1], "so much is compressed");
    plaintext.extend(zstd::bulk::compress(&vec![0; 128 * 1024 * 1024], 1).expect("compresses"));
    let label = host.label(Lane::Critical);
    let sealed = host.seal(Lane::Critical, &batch(&[]));
    p2p_sync_proto::v1::Sealed {
        sequence: label.sequence,
        id: label.id.as_bytes().to_vec().into(),
        body: envelope::seal(&host.credential().to_hub, &label.header(Direction::ToHub), &plaintext).into(),
        ..sealed
    }
}
