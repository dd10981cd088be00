//! One bad operation keeps nobody out, and is not lost.

use p2p_sync_proto::{Code, Problem};
use p2p_sync_proxy::operation::{Outcome, Valid};
use uuid::Uuid;

use crate::fixture::{Hub, every, message, put, refused, told};

#[tokio::test]
async fn invariant_07_one_poisoned_operation_in_a_batch_of_500_is_kept_with_its_reason_and_499_are_stored() {
    let (hub, host) = (Hub::new().await, Uuid::nil());
    hub.sql
        .batch_execute("ALTER TABLE p2p_sync.states ADD CONSTRAINT no_poison CHECK (payload <> '{\"n\": 317}')")
        .await
        .expect("alters");
    let ops = (1..=500).map(|n| put(&format!("prontera/NPC_STATE/{n}"), n)).collect();
    let batch = message(host, ops);
    let committed = hub.store.apply(&batch).await.expect("serves");
    let outcomes = told(&committed);
    assert_eq!(outcomes.iter().filter(|outcome| **outcome == "applied").count(), 499);
    assert_eq!(outcomes[316], "STORE_REFUSED");
    assert_eq!(
        (
            hub.count("SELECT count(*) FROM p2p_sync.states").await,
            committed.changes.len()
        ),
        (499, 499)
    );
    let kept = "SELECT sequence FROM p2p_sync.rejected_operations \
        WHERE payload = '{\"n\": 317}' AND reason LIKE '%no_poison%'";
    assert_eq!(hub.count(kept).await, 317);

    assert_eq!(
        told(&hub.store.apply(&batch).await.expect("serves"))[316],
        "STORE_REFUSED",
        "told again"
    );
    let status = hub
        .store
        .operation_status(host, batch.ops[316].operation_id, None)
        .await
        .expect("reads");
    assert!(matches!(status, Some(Outcome::Rejected(problem)) if problem.code == Code::StoreRefused));
}

#[tokio::test]
async fn invariant_07_a_number_that_the_database_cannot_hold_poisons_its_operation_alone() {
    let (hub, host) = (Hub::new().await, Uuid::nil());
    let mut ops: Vec<_> = (1..=4)
        .map(|n| every("prontera/CHAT_MESSAGE/1", n, n.checked_sub(1).filter(|&n| n > 0)))
        .collect();
    ops[1].payload = Some("{\"n\": 1e999999}".to_owned());
    assert_eq!(
        told(&hub.apply(host, ops).await),
        ["applied", "STORE_REFUSED", "applied", "applied"]
    );
}

#[tokio::test]
async fn a_store_that_is_broken_inside_rejects_nothing() {
    let hub = Hub::new().await;
    hub.sql
        .batch_execute(
            "CREATE FUNCTION p2p_sync.break() RETURNS trigger LANGUAGE plpgsql AS \
                $$ BEGIN RAISE EXCEPTION 'could not read block 0' USING ERRCODE = 'XX000'; END $$; \
             CREATE TRIGGER broken BEFORE INSERT ON p2p_sync.states FOR EACH ROW EXECUTE FUNCTION p2p_sync.break()",
        )
        .await
        .expect("alters");
    let batch = message(Uuid::nil(), (1..=2).map(|n| put("prontera/MAP_STATE", n)).collect());
    let refusal = hub.store.apply(&batch).await.expect_err("nothing can be written");
    assert_eq!(refusal.0.code, Code::HubUnavailable);
    hub.sql
        .batch_execute("DROP TRIGGER broken ON p2p_sync.states")
        .await
        .expect("alters");
    let committed = hub.store.apply(&batch).await.expect("serves");
    assert!(
        told(&committed).iter().all(|outcome| *outcome != "STORE_REFUSED"),
        "{committed:?}"
    );
}

#[tokio::test]
async fn invariant_07_what_has_no_position_is_kept_and_settles_nothing() {
    let hub = Hub::new().await;
    let problem = Problem::new(Code::BadOperation, "no version");
    let batch = Valid {
        refused: vec![refused(0, None, problem)],
        ..message(Uuid::nil(), vec![])
    };
    for _ in 0..2 {
        let committed = hub.store.apply(&batch).await.expect("serves");
        assert_eq!(told(&committed), ["BAD_OPERATION"]);
        assert_eq!(committed.timeline, hub.store.timeline().await.expect("reads"));
    }
    assert_eq!(hub.count("SELECT count(*) FROM p2p_sync.rejected_operations").await, 1);
    assert_eq!(hub.count("SELECT count(*) FROM p2p_sync.settled_sequences").await, 0);
}
