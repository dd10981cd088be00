//! Messages that come again: sent twice, from many connections at once, after a restart of the hub, by another lane.

use futures::future::join_all;
use p2p_sync_proto::envelope::Lane;
use uuid::Uuid;

use crate::{
    wire::{WireHost, batch, id_of},
    world::{World, run},
};

const CONNECTIONS: usize = 8;

/// Fifty chat messages of five characters of its own and fifty drops, and their ids.
fn message(host: &WireHost, lane: Lane, first: u64) -> (p2p_sync_proto::v1::Sealed, Vec<Uuid>) {
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
    (
        host.seal(lane, &batch(&operations)),
        operations.iter().map(id_of).collect(),
    )
}

#[test]
fn invariant_02_a_message_sent_again_applies_once_and_is_answered_as_before() {
    let world = World::new();
    let host = WireHost::new(&world.endpoint(), &world.hub.add_host(1));
    let (critical, mut ids) = message(&host, Lane::Critical, 1);
    let (bulk, bulk_ids) = message(&host, Lane::Bulk, 101);
    ids.extend(bulk_ids);
    run(async {
        let channel = host.connect().await;
        for _ in 0..3 {
            let replies = vec![host.critical(&channel, critical.clone()).await.expect("answered")];
            let more = host
                .bulk(&channel, vec![bulk.clone(), bulk.clone()])
                .await
                .expect("answered");
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
fn invariant_02_a_message_sent_by_eight_connections_at_once_applies_once() {
    let world = World::new();
    let host = WireHost::new(&world.endpoint(), &world.hub.add_host(1));
    let mut all = Vec::new();
    for round in 0..5 {
        let (critical, ids) = message(&host, Lane::Critical, round * 200 + 1);
        let (bulk, bulk_ids) = message(&host, Lane::Bulk, round * 200 + 101);
        all.extend(ids.into_iter().chain(bulk_ids));
        run(async {
            let channels = join_all((0..CONNECTIONS).map(|_| host.connect())).await;
            let sending = channels.iter().map(|channel| {
                let (host, critical, bulk) = (&host, critical.clone(), bulk.clone());
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
