//! Nothing takes effect twice, and what was told once is told again.

use std::sync::Arc;

use p2p_sync_proto::{Code, Problem};
use p2p_sync_proxy::operation::{History, Outcome, Valid, ValidOp};
use uuid::Uuid;

use crate::fixture::{Hub, at, every, message, numbers, put, refused, told, withdrawn};

/// Sends a message over eight connections at once; each operation of it is logged.
async fn sent_from_eight_connections_applies_once(ops: Vec<ValidOp>) -> Hub {
    let hub = Hub::new().await;
    // The incarnation is known: the first message of one goes another way.
    hub.apply(Uuid::nil(), vec![put("payon/MAP_STATE", 1000)]).await;
    let batch = Arc::new(message(Uuid::nil(), ops));
    let senders: Vec<_> = (0..8)
        .map(|_| {
            let (store, batch) = (hub.store.clone(), batch.clone());
            tokio::spawn(async move { store.apply(&batch).await.expect("Postgres serves") })
        })
        .collect();
    let mut changes = 0;
    for sender in senders {
        let committed = sender.await.expect("no panic");
        assert!(told(&committed).iter().all(|outcome| *outcome == "applied"));
        changes += committed.changes.len();
    }
    assert_eq!(changes, batch.ops.len(), "each operation is published once");
    let logged = hub.count("SELECT count(*) FROM p2p_sync.operations").await;
    assert_eq!(usize::try_from(logged).expect("small"), batch.ops.len());
    hub
}

#[tokio::test(flavor = "multi_thread")]
async fn invariant_02_a_batch_sent_again_from_eight_connections_applies_once() {
    let logged = |n: u64| ValidOp {
        history: History::All,
        ..put(&format!("geffen/NPC_STATE/{n}"), n)
    };
    let counted = |n: u64| every(&format!("prontera/CHAT_MESSAGE/{n}"), n, None);
    sent_from_eight_connections_applies_once((1..=100).map(logged).chain((101..=200).map(counted)).collect()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn invariant_02_a_chain_of_operations_sent_again_from_eight_connections_applies_once_and_in_order() {
    let chain = |n: u64| {
        every(
            "prontera/CHAT_MESSAGE/1",
            n,
            n.checked_sub(1).filter(|&before| before > 0),
        )
    };
    let hub = sent_from_eight_connections_applies_once((1..=200).map(chain).collect()).await;
    let logged = hub.store.changes_since("prontera", 0, 1000).await.expect("reads");
    assert_eq!(
        numbers(logged.iter().map(|state| &state.payload)),
        (1..=200).collect::<Vec<_>>()
    );
}

#[tokio::test]
async fn invariant_02_a_position_that_stands_twice_in_a_message_counts_once() {
    let hub = Hub::new().await;
    let op = every("prontera/CHAT_MESSAGE/1", 1, None);
    let committed = hub.apply(Uuid::nil(), vec![op.clone(), op]).await;
    assert_eq!(told(&committed), ["applied", "applied"]);
    assert_eq!(hub.count("SELECT count(*) FROM p2p_sync.operations").await, 1);
}

#[tokio::test]
async fn invariant_02_what_was_rejected_stays_rejected_and_what_was_applied_applied() {
    let (hub, host) = (Hub::new().await, Uuid::nil());
    let problem = Problem::new(Code::SchemaViolation, "at /hp: 7 is more than max_hp");
    let strict = Valid {
        refused: vec![refused(1, Some(at(1, 2)), problem.clone())],
        ..message(host, vec![put("prontera/MAP_STATE", 1)])
    };
    let first = hub.store.apply(&strict).await.expect("serves");
    assert_eq!(told(&first), ["applied", "SCHEMA_VIOLATION"]);

    // The rules changed in between: each is valid where it was not, and the other way round.
    let lenient = Valid {
        refused: vec![refused(1, Some(at(1, 1)), problem.clone())],
        ..message(host, vec![put("prontera/MAP_STATE", 2)])
    };
    let second = hub.store.apply(&lenient).await.expect("serves");
    assert_eq!(told(&second), ["SCHEMA_VIOLATION", "applied"]);
    assert_eq!(
        second.outcomes[0].1,
        Outcome::Rejected(problem),
        "with the sentence that was told"
    );
    assert_eq!(hub.count("SELECT count(*) FROM p2p_sync.rejected_operations").await, 1);
    assert_eq!(numbers([&hub.state("prontera/MAP_STATE").await.expect("there").0]), [1]);
}

#[tokio::test]
async fn invariant_02_withdrawn_sequences_never_apply_and_close_their_gaps() {
    let (hub, host) = (Hub::new().await, Uuid::nil());
    let batch = Valid {
        withdrawn: vec![withdrawn(2, 8), withdrawn(9, 5)],
        ..message(host, vec![put("prontera/MAP_STATE", 1), put("prontera/MAP_STATE", 9)])
    };
    hub.store.apply(&batch).await.expect("serves");
    assert_eq!(
        hub.count("SELECT upper(settled) FROM p2p_sync.settled_sequences WHERE settled = '{[1,10)}'")
            .await,
        10
    );
    let withdrawn_op = every("prontera/CHAT_MESSAGE/1", 5, None);
    assert_eq!(hub.apply(host, vec![withdrawn_op]).await.changes, []);
    let unseen = hub
        .apply(host, vec![every("prontera/CHAT_MESSAGE/1", 10, Some(4))])
        .await;
    assert_eq!(told(&unseen), ["applied"], "a withdrawn predecessor is settled");
}

#[tokio::test]
async fn invariant_12_the_gaps_of_an_incarnation_are_bounded_and_nothing_of_such_a_message_is_settled() {
    let (hub, host) = (Hub::new().await, Uuid::nil());
    let every_other = |from: u64| {
        (from..from + 500)
            .map(|n| put("prontera/MAP_STATE", 2 * n))
            .collect::<Vec<_>>()
    };
    for from in (1..4001).step_by(500) {
        hub.apply(host, every_other(from)).await;
    }
    let before = hub.count("SELECT upper(settled) FROM p2p_sync.settled_sequences").await;
    let refusal = hub
        .store
        .apply(&message(host, every_other(4001)))
        .await
        .expect_err("too many gaps");
    assert_eq!(refusal.0.code, Code::TooManyGaps);
    assert_eq!(
        hub.count("SELECT upper(settled) FROM p2p_sync.settled_sequences").await,
        before
    );

    let closing = Valid {
        withdrawn: vec![withdrawn(1, 8000)],
        ..message(host, every_other(4001))
    };
    assert!(
        hub.store.apply(&closing).await.is_ok(),
        "with the gaps closed it is taken"
    );
}

#[tokio::test]
async fn an_outbox_says_hello_again_and_closes_what_it_has_drained() {
    let hub = Hub::new().await;
    let (host, outbox) = (hub.host().await, Uuid::new_v4());
    let timeline = hub.store.hello(host, outbox, 1, 1).await.expect("the first");
    hub.apply(host, vec![put("prontera/MAP_STATE", 1)]).await;
    assert_eq!(
        hub.store.hello(host, outbox, 1, 1).await,
        Ok(timeline),
        "after a broken connection"
    );
    assert_eq!(
        hub.store.hello(host, outbox, 2, 1).await,
        Ok(timeline),
        "with operations of 1 left"
    );
    assert_eq!(
        told(&hub.apply(host, vec![put("prontera/MAP_STATE", 2)]).await),
        ["applied"]
    );
    assert_eq!(hub.store.hello(host, outbox, 3, 3).await, Ok(timeline), "drained");
    for sequence in [2, 3] {
        let late = hub.apply(host, vec![put("prontera/MAP_STATE", sequence)]).await;
        assert_eq!(told(&late), ["OUTBOX_TOO_OLD"]);
    }
    assert_eq!(numbers([&hub.state("prontera/MAP_STATE").await.expect("there").0]), [2]);
    assert_eq!(
        hub.count("SELECT count(*) FROM p2p_sync.settled_sequences").await,
        2,
        "one closed row stands for all"
    );
}

#[tokio::test]
async fn invariant_02_a_second_outbox_under_the_same_credential_is_told_so() {
    let hub = Hub::new().await;
    let (host, outbox) = (hub.host().await, Uuid::new_v4());
    hub.store.hello(host, outbox, 5, 5).await.expect("the first");
    let cloned = |refusal: Problem| assert_eq!(refusal.code, Code::OutboxCloned);
    cloned(
        hub.store
            .hello(host, Uuid::new_v4(), 5, 5)
            .await
            .expect_err("another outbox, the same incarnation"),
    );
    cloned(
        hub.store
            .hello(host, Uuid::new_v4(), 4, 4)
            .await
            .expect_err("another outbox, behind"),
    );
    cloned(
        hub.store
            .hello(host, outbox, 4, 4)
            .await
            .expect_err("the outbox went back"),
    );
    assert!(
        hub.store.hello(host, Uuid::new_v4(), 6, 6).await.is_ok(),
        "a new outbox that is ahead"
    );
    let stranger = hub
        .store
        .hello(Uuid::new_v4(), outbox, 1, 1)
        .await
        .expect_err("never enrolled");
    assert_eq!(stranger.code, Code::NotEnrolled);
}

#[tokio::test]
async fn invariant_10_what_is_told_again_is_looked_up_alone_whatever_lies_between() {
    let hub = Hub::new().await;
    // All that a host was ever told of, every second in limbo.
    let told = "INSERT INTO p2p_sync.settled_sequences (host_id, incarnation, settled) \
            SELECT id, 1, '{[1,20001)}' FROM (SELECT '00000000-0000-0000-0000-000000000000'::uuid AS id) AS _; \
        INSERT INTO p2p_sync.rejected_operations \
                (host_id, incarnation, sequence, operation_id, path, data_type, code, reason, payload) \
            SELECT '00000000-0000-0000-0000-000000000000', 1, n, gen_random_uuid(), '', 0, 305, 'why', '' \
                FROM generate_series(1, 19999, 2) AS n; \
        INSERT INTO p2p_sync.limbo_operations (host_id, incarnation, sequence, tenure, operation_id, path, data_type, \
                keeps_every, account_id, made_at_ms, deleted, code, reason) \
            SELECT '00000000-0000-0000-0000-000000000000', 1, n, 1, gen_random_uuid(), '', 0, true, 0, 0, true, 306, 'why' \
                FROM generate_series(2, 20000, 2) AS n; \
        ANALYZE p2p_sync.rejected_operations, p2p_sync.limbo_operations";
    hub.sql.batch_execute(told).await.expect("writes");
    // What a transaction has read is counted with it.
    hub.sql.batch_execute("BEGIN").await.expect("begins");
    let arguments = "SELECT pronargs::bigint FROM pg_proc WHERE oid = 'p2p_sync.apply_batch'::regproc";
    let arguments = usize::try_from(hub.count(arguments).await).expect("some");
    let unused = ", NULL".repeat(arguments - 14);
    let again = format!(
        "SELECT cardinality(told_sequences)::bigint FROM p2p_sync.apply_batch( \
            '00000000-0000-0000-0000-000000000000', 1, 4096, '{{[1,3),[19999,20001)}}', '{{}}', '{{}}', '{{}}', '{{}}', \
            '{{1,2,19999,20000}}', '{{}}', '{{}}', '{{}}', '{{}}', '{{}}'{unused})"
    );
    assert_eq!(hub.count(&again).await, 4);
    let read = "SELECT sum(pg_stat_get_xact_tuples_returned(relation))::bigint FROM ( \
            SELECT indrelid AS relation, indrelid FROM pg_index UNION SELECT indexrelid, indrelid FROM pg_index) AS _ \
        WHERE indrelid IN ('p2p_sync.rejected_operations'::regclass, 'p2p_sync.limbo_operations'::regclass)";
    assert!(hub.count(read).await <= 8, "of 20,000");
    hub.sql.batch_execute("ROLLBACK").await.expect("ends");
}
