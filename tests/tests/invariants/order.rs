//! Operations that arrive out of order, over both lanes and several connections.

use std::collections::HashMap;

use futures::future::join_all;
use p2p_sync_proto::{
    envelope::Lane,
    v1::{BatchReply, Operation, OutcomeState},
};
use tonic::transport::Channel;

use crate::{
    wire::{WireHost, batch, id_of},
    world::{World, run},
};

const OPERATIONS: u64 = 300;
const CONNECTIONS: usize = 4;
const BATCH_OPS: usize = 8;
/// Each round settles at least the operations whose predecessors are settled: this many are never needed.
const ROUNDS_MAX: usize = 200;

/// Puts and deletes on six `latest` paths, and three chains of `every` operations.
fn operations(host: &WireHost, random: &mut fastrand::Rng) -> Vec<Operation> {
    let mut tails: HashMap<String, u64> = HashMap::new();
    (1..=OPERATIONS)
        .map(|sequence| {
            if random.bool() {
                let path = format!("prontera/ITEM_DROP/{}", random.u8(0..6));
                let payload = format!(r#"{{"amount":{sequence}}}"#);
                return host.operation(sequence, &path, Some(payload.as_str()).filter(|_| random.u8(0..3) > 0));
            }
            let path = format!("prontera/CHAT_MESSAGE/{}", random.u8(0..3));
            let operation = host.operation(sequence, &path, Some(r#"{"text":"hi"}"#));
            host.after(tails.insert(path, sequence), operation)
        })
        .collect()
}

async fn send(host: &WireHost, channel: &Channel, lane: Lane, batch_of: &[Operation]) -> BatchReply {
    let sealed = host.seal(lane, &batch(batch_of));
    match lane {
        Lane::Critical => host.critical(channel, sealed).await.expect("answered"),
        _ => host.bulk(channel, vec![sealed]).await.expect("answered").remove(0),
    }
}

/// Sends batches of a random part of what is unsettled, a batch a connection at a time; gives how many came too early.
async fn send_in_random_order(host: &WireHost, mut unsettled: Vec<Operation>, random: &mut fastrand::Rng) -> usize {
    let channels = join_all((0..CONNECTIONS).map(|_| host.connect())).await;
    let mut too_early = 0;
    for _ in 0..ROUNDS_MAX {
        random.shuffle(&mut unsettled);
        let mut batches: Vec<Vec<Operation>> = unsettled
            .chunks(BATCH_OPS)
            .map(<[Operation]>::to_vec)
            .take(4 * CONNECTIONS)
            .collect();
        let rest: Vec<Operation> = unsettled.iter().skip(4 * CONNECTIONS * BATCH_OPS).cloned().collect();
        for batch in &mut batches {
            batch.sort_by_key(|operation| operation.version.map(|version| version.sequence));
        }
        let sending = batches.iter().zip(channels.iter().cycle()).map(|(batch, channel)| {
            let lane = if random.bool() { Lane::Critical } else { Lane::Bulk };
            send(host, channel, lane, batch)
        });
        let replies = join_all(sending).await;
        unsettled = rest;
        for (batch, reply) in batches.iter().zip(replies) {
            assert_eq!(reply.code, 0, "{}", reply.message);
            let early = reply
                .outcomes
                .iter()
                .filter(|outcome| outcome.state() == OutcomeState::NotYet);
            unsettled.extend(early.map(|outcome| {
                too_early += 1;
                batch[outcome.index as usize].clone()
            }));
        }
        if unsettled.is_empty() {
            return too_early;
        }
    }
    panic!(
        "{} operations are still told NOT_YET after {ROUNDS_MAX} rounds",
        unsettled.len()
    );
}

#[test]
fn invariant_03_whatever_the_order_of_arrival_the_newest_wins_and_every_operation_keeps_its_place() {
    let world = World::new();
    for _ in 0..4 {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        let host = WireHost::new(&world.endpoint(), &world.hub.add_host(1));
        let all = operations(&host, &mut random);
        // Each run has the same paths: what the run before left is older by tenure for none, so it starts afresh.
        run(world
            .client()
            .batch_execute("TRUNCATE p2p_sync.states, p2p_sync.operations"))
        .expect("valid SQL");
        let too_early = run(send_in_random_order(&host, all.clone(), &mut random));
        assert!(too_early > 0, "nothing came before its predecessor");
        verify(&world, &all);
    }
}

fn verify(world: &World, all: &[Operation]) {
    let mut newest: HashMap<&str, &Operation> = HashMap::new();
    for operation in all {
        newest.insert(&operation.path, operation);
    }
    let states = world.rows("SELECT path, operation_id, deleted FROM p2p_sync.states", &[]);
    assert_eq!(states.len(), newest.len());
    for state in states {
        let path: String = state.get(0);
        let expected = newest[path.as_str()];
        assert_eq!(
            state.get::<_, uuid::Uuid>(1),
            id_of(expected),
            "the state of {path} is not the newest"
        );
        assert_eq!(state.get::<_, bool>(2), expected.payload.is_none());
    }
    world.assert_log_is_in_order_without_duplicates();
    let ids: Vec<_> = all.iter().map(id_of).collect();
    world.held().assert_log_is(&ids);
}

#[test]
fn invariant_03_neither_an_older_delete_nor_an_older_put_wins_whichever_lane_it_takes() {
    let world = World::new();
    let host = WireHost::new(&world.endpoint(), &world.hub.add_host(1));
    let [kept, gone] = ["prontera/ITEM_DROP/1", "prontera/ITEM_DROP/2"];
    let put = |sequence, path| host.operation(sequence, path, Some(r#"{"amount":1}"#));
    let delete = |sequence, path| host.operation(sequence, path, None);
    let (newer_put, newer_delete) = (put(4, kept), delete(5, gone));
    run(async {
        let channel = host.connect().await;
        send(&host, &channel, Lane::Bulk, &[newer_put.clone(), newer_delete.clone()]).await;
        let reply = send(&host, &channel, Lane::Critical, &[delete(1, kept), put(2, gone)]).await;
        let told: Vec<_> = reply.outcomes.iter().map(p2p_sync_proto::v1::Outcome::state).collect();
        assert_eq!(told, [OutcomeState::Superseded; 2]);
    });
    let states = world.rows("SELECT operation_id, deleted FROM p2p_sync.states ORDER BY path", &[]);
    let states: Vec<(uuid::Uuid, bool)> = states.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert_eq!(states, [(id_of(&newer_put), false), (id_of(&newer_delete), true)]);
}

#[test]
fn invariant_03_an_operation_before_its_predecessor_is_held_back_until_that_is_settled() {
    let world = World::new();
    let host = WireHost::new(&world.endpoint(), &world.hub.add_host(1));
    let path = "prontera/CRITICAL_GAME_STATE";
    let say = |sequence, before| host.after(before, host.operation(sequence, path, Some("{}")));
    let (first, second, third) = (say(1, None), say(2, Some(1)), say(3, Some(2)));
    run(async {
        let channel = host.connect().await;
        for _ in 0..2 {
            let early = send(&host, &channel, Lane::Critical, &[second.clone(), third.clone()]).await;
            let told: Vec<_> = early
                .outcomes
                .iter()
                .map(|outcome| (outcome.state(), outcome.code))
                .collect();
            assert_eq!(told, [(OutcomeState::NotYet, 403); 2]);
        }
        assert!(
            send(&host, &channel, Lane::Bulk, std::slice::from_ref(&first))
                .await
                .outcomes
                .is_empty()
        );
        assert!(
            send(&host, &channel, Lane::Critical, &[second.clone(), third.clone()])
                .await
                .outcomes
                .is_empty()
        );
    });
    let log = world.rows(
        "SELECT operation_id FROM p2p_sync.operations ORDER BY stream_sequence",
        &[],
    );
    let log: Vec<uuid::Uuid> = log.iter().map(|row| row.get(0)).collect();
    assert_eq!(log, [&first, &second, &third].map(id_of));
}
