//! Messages that come again: sent twice, from many connections at once, after a restart of the hub, by another lane.

use futures::future::join_all;
use p2p_sync_proto::{
    envelope::Lane,
    keys::Credential,
    v1::{self, BatchReply, OperationBatch, RejectCode, Sealed, pull_reply, pull_request::What},
};
use p2p_sync_tests::services::shared_redis_url;
use uuid::Uuid;

use crate::{
    wire::{WireHost, batch, id_of},
    world::{World, run},
};

const CONNECTIONS: usize = 8;

/// Fifty chat messages of five characters of its own and fifty drops, and their ids.
fn operations(host: &WireHost, first: u64) -> (OperationBatch, Vec<Uuid>) {
    let operations: Vec<_> = (first..first + 100)
        .map(|sequence| match sequence % 2 {
            0 => {
                let before = sequence.checked_sub(10).filter(|&before| before >= first);
                let path = format!("prontera/CHAT_MESSAGE/{first}-{}", sequence % 10);
                host.after(before, host.operation(sequence, &path, Some(r#"{"text":"hi"}"#)))
            }
            _ => host.operation(
                sequence,
                &format!("prontera/ITEM_DROP/{}", sequence % 7),
                Some(r#"{"amount":1}"#),
            ),
        })
        .collect();
    (batch(&operations), operations.iter().map(id_of).collect())
}

/// The same, sealed.
fn message(host: &WireHost, lane: Lane, first: u64) -> (Sealed, Vec<Uuid>) {
    let (batch, ids) = operations(host, first);
    (host.seal(lane, &batch), ids)
}

#[test]
fn invariant_02_operations_sent_again_apply_once_and_are_answered_as_before() {
    let world = World::new();
    let host = WireHost::new(&world.endpoint(), &world.hub.add_host(1));
    let (critical, mut ids) = operations(&host, 1);
    let (bulk, bulk_ids) = operations(&host, 101);
    ids.extend(bulk_ids);
    run(async {
        let channel = host.connect().await;
        for _ in 0..3 {
            let sealed = host.seal(Lane::Critical, &critical);
            let replies = vec![host.critical(&channel, sealed).await.expect("answered")];
            let sealed = vec![host.seal(Lane::Bulk, &bulk), host.seal(Lane::Bulk, &bulk)];
            let more = host.bulk(&channel, sealed).await.expect("answered");
            for reply in replies.into_iter().chain(more) {
                assert_eq!((reply.code, reply.message.as_str()), (0, ""));
                let is_settled = |outcome: &p2p_sync_proto::v1::Outcome| outcome.state == 1;
                assert!(reply.outcomes.iter().all(is_settled), "{:?}", reply.outcomes);
            }
        }
    });
    world.held().assert_log_is(&ids);
    world.assert_log_is_in_order_without_duplicates();
}

#[test]
fn invariant_02_a_message_that_was_recorded_is_told_and_messages_that_overtake_each_other_are_not() {
    let world = World::new();
    let host = WireHost::new(&world.endpoint(), &world.hub.add_host(1));
    let sealed: Vec<Sealed> = (1..=40)
        .map(|sequence| {
            let path = format!("prontera/ITEM_DROP/{sequence}");
            let operation = host.operation(sequence, &path, Some(r#"{"amount":1}"#));
            host.seal(Lane::Critical, &batch(&[operation]))
        })
        .collect();
    run(async {
        let channels = join_all((0..CONNECTIONS).map(|_| host.connect())).await;
        // In no order, over several connections, the first ones last.
        let mut order: Vec<usize> = (1..sealed.len()).collect();
        fastrand::shuffle(&mut order);
        order.push(0);
        for (number, index) in order.into_iter().enumerate() {
            let channel = &channels[number % CONNECTIONS];
            let reply = host.critical(channel, sealed[index].clone()).await.expect("answered");
            assert_eq!(reply.code(), RejectCode::None, "{}", reply.message);
            let again = host
                .critical(&channels[0], sealed[index].clone())
                .await
                .expect("answered");
            assert_eq!(again.code(), RejectCode::Replay);
            assert!(again.outcomes.is_empty());
        }
        let both = vec![host.seal(Lane::Bulk, &batch(&[])); 2];
        let replies = host.bulk(&channels[0], both).await.expect("the stream goes on");
        let codes: Vec<_> = replies.iter().map(BatchReply::code).collect();
        assert_eq!(codes, [RejectCode::None, RejectCode::Replay]);
    });
    assert_eq!(world.count("SELECT count(*) FROM p2p_sync.operations"), 40);
}

#[test]
fn invariant_02_what_is_written_to_the_cache_is_written_once() {
    let mut world = World::new();
    let credential = world.hub.add_host(1);
    let host = WireHost::new(&world.endpoint(), &credential);
    let write = |what| host.seal(Lane::Pull, &v1::PullRequest { what: Some(what) });
    let key = || "gate".to_owned();
    let set = |value: &str| {
        write(What::CacheSet(v1::CacheSet {
            key: key(),
            value: value.to_owned(),
            expiry_seconds: 60,
        }))
    };
    let [open, remove, told, shut] = [
        set("open"),
        write(What::CacheDelete(v1::CacheDelete { key: key() })),
        write(What::Publish(v1::Publish {
            channel: "gates".to_owned(),
            message: "open".to_owned(),
        })),
        set("shut"),
    ];
    let recorded = [open, remove, told, shut];
    for sealed in &recorded {
        let reply = run(async { host.pull(&host.connect().await, sealed.clone()).await }).expect("answered");
        assert_eq!(reply.code(), RejectCode::None, "{}", reply.message);
    }
    let replayed = |world: &World, what: &str| {
        run(async {
            let channel = host.connect().await;
            for sealed in &recorded {
                let reply = host.pull(&channel, sealed.clone()).await.expect("answered");
                assert_eq!(reply.code(), RejectCode::Replay, "{what}");
            }
            let get = write(What::CacheGet(v1::CacheGet { key: key() }));
            match host.pull(&channel, get).await.expect("answered").what {
                Some(pull_reply::What::CacheValue(found)) => assert_eq!(found.value, "shut", "{what}"),
                other => panic!("{what}: {other:?}"),
            }
        });
        assert_eq!(world.count("SELECT count(*) FROM p2p_sync.states"), 0);
    };
    replayed(&world, "to the hub that took them");
    // Its window is empty then; what Redis holds is not.
    world.hub.kill();
    world.hub.start();
    replayed(&world, "to the hub that was started again");
    // Redis may evict where the last write was, and keep what was written since.
    let host_id = Credential::parse(&credential).expect("the hub gave it").host_id;
    let evicted: i64 = run(async {
        let client = redis::Client::open(shared_redis_url()).expect("well formed");
        let mut redis = client.get_multiplexed_async_connection().await.expect("it runs");
        let pattern = format!("*{{{host_id}}}:written");
        let found: Vec<String> = redis::cmd("KEYS")
            .arg(pattern)
            .query_async(&mut redis)
            .await
            .expect("answers");
        redis::cmd("DEL")
            .arg(found)
            .query_async(&mut redis)
            .await
            .expect("answers")
    });
    assert_eq!(evicted, 1);
    world.hub.kill();
    world.hub.start();
    run(async {
        let channel = host.connect().await;
        let reply = host.pull(&channel, recorded[1].clone()).await.expect("answered");
        assert_eq!(reply.code(), RejectCode::None, "nobody can tell");
        let get = write(What::CacheGet(v1::CacheGet { key: key() }));
        let reply = host.pull(&channel, get).await.expect("answered");
        assert_eq!(
            reply.code(),
            RejectCode::NotFound,
            "it goes with what says how new it is"
        );
    });
}

#[test]
fn invariant_02_what_costs_something_is_taken_once() {
    let mut world = World::new();
    let host = WireHost::new(&world.endpoint(), &world.hub.add_host(1));
    let ask = |what| host.seal(Lane::Pull, &v1::PullRequest { what: Some(what) });
    let text = || "the missing caravan".to_owned();
    let search = v1::SearchEmbeddings {
        text: text(),
        ..Default::default()
    };
    let recorded = [
        ask(What::CreateEmbedding(v1::CreateEmbedding { text: text() })),
        ask(What::SearchEmbeddings(search)),
    ];
    let codes = |expected: RejectCode| {
        run(async {
            let channel = host.connect().await;
            for sealed in &recorded {
                let reply = host.pull(&channel, sealed.clone()).await.expect("answered");
                assert_eq!(reply.code(), expected, "{}", reply.message);
            }
        });
    };
    codes(RejectCode::None);
    let spent = world.count("SELECT tokens FROM p2p_sync.embedding_spend");
    assert_eq!(spent, 14);
    codes(RejectCode::Replay);
    // Its window is empty then; what Postgres holds is not.
    world.hub.kill();
    world.hub.start();
    codes(RejectCode::Replay);
    assert_eq!(world.count("SELECT tokens FROM p2p_sync.embedding_spend"), spent);
}

#[test]
fn invariant_02_operations_sent_by_eight_connections_at_once_apply_once() {
    let world = World::new();
    let host = WireHost::new(&world.endpoint(), &world.hub.add_host(1));
    let mut all = Vec::new();
    for round in 0..5 {
        let (critical, ids) = operations(&host, round * 200 + 1);
        let (bulk, bulk_ids) = operations(&host, round * 200 + 101);
        all.extend(ids.into_iter().chain(bulk_ids));
        run(async {
            let channels = join_all((0..CONNECTIONS).map(|_| host.connect())).await;
            let sending = channels.iter().map(|channel| {
                let host = &host;
                let (critical, bulk) = (host.seal(Lane::Critical, &critical), host.seal(Lane::Bulk, &bulk));
                async move {
                    let (one, many) = tokio::join!(host.critical(channel, critical), host.bulk(channel, vec![bulk]));
                    [one.expect("answered").code, many.expect("answered")[0].code]
                }
            });
            assert_eq!(join_all(sending).await, [[0, 0]; CONNECTIONS]);
        });
    }
    world.held().assert_log_is(&all);
    world.assert_log_is_in_order_without_duplicates();
}

#[test]
fn invariant_02_a_message_sent_again_to_a_restarted_hub_applies_once() {
    let mut world = World::new();
    let host = WireHost::new(&world.endpoint(), &world.hub.add_host(1));
    let (recorded, ids) = message(&host, Lane::Critical, 1);
    let send = || {
        run(async {
            host.critical(&host.connect().await, recorded.clone())
                .await
                .expect("answered")
                .code
        })
    };
    assert_eq!(send(), 0);
    world.hub.kill();
    world.hub.start();
    assert_eq!(send(), 0);
    world.hub.stop();
    world.hub.start();
    assert_eq!(send(), 0);
    world.held().assert_log_is(&ids);
}

#[test]
fn invariant_02_a_recorded_message_does_not_open_on_the_other_lane_or_under_another_label() {
    let world = World::new();
    let host = WireHost::new(&world.endpoint(), &world.hub.add_host(1));
    let (recorded, _) = message(&host, Lane::Critical, 1);
    let mut relabelled = recorded.clone();
    relabelled.lane = Lane::Bulk as u32;
    let mut renumbered = recorded.clone();
    renumbered.sequence += 1;
    run(async {
        let channel = host.connect().await;
        for forged in [recorded.clone(), relabelled] {
            let refused = host.bulk(&channel, vec![forged]).await.expect_err("not for this lane");
            assert_eq!(refused.code(), tonic::Code::Unauthenticated);
        }
        let refused = host
            .critical(&channel, renumbered)
            .await
            .expect_err("changed on the way");
        assert_eq!(refused.code(), tonic::Code::Unauthenticated);
    });
    world.held().assert_log_is(&[]);
}
