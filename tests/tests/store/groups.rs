//! Groups: all of their members take effect, or none.

use p2p_sync_proto::{Code, ids::new_id};
use p2p_sync_proxy::operation::{Committed, Outcome, ValidOp};
use uuid::Uuid;

use crate::fixture::{Hub, at, every, message, numbers, put, told};

/// Makes one group of operations of one sequence.
pub(crate) fn group(mut members: Vec<ValidOp>) -> Vec<ValidOp> {
    let operation_id = new_id();
    for member in &mut members {
        (member.in_group, member.operation_id) = (true, operation_id);
    }
    members
}

/// Applies a message of operations and groups.
pub(crate) async fn apply(hub: &Hub, host: Uuid, units: Vec<Vec<ValidOp>>) -> Committed {
    let mut valid = message(host, vec![]);
    for (index, unit) in (0..).zip(units) {
        valid.ops.extend(unit.into_iter().map(|op| ValidOp { index, ..op }));
    }
    hub.store.apply(&valid).await.expect("Postgres serves")
}

/// An inventory and a storage, on two maps.
fn trade(sequence: u64) -> Vec<ValidOp> {
    group(vec![
        put(&format!("prontera/NPC_STATE/{sequence}"), sequence),
        put(&format!("geffen/NPC_STATE/{sequence}"), sequence),
    ])
}

#[tokio::test]
async fn invariant_07_a_group_with_a_member_that_postgres_refuses_is_kept_whole_and_its_neighbours_are_stored() {
    let (hub, host) = (Hub::new().await, Uuid::nil());
    hub.sql
        .batch_execute(
            "ALTER TABLE p2p_sync.states ADD CONSTRAINT no_poison \
                CHECK (NOT (payload = '{\"n\": 7}' AND path LIKE 'geffen%'))",
        )
        .await
        .expect("alters");
    let units = || (1..=10).map(trade).collect();
    let committed = apply(&hub, host, units()).await;
    let mut expected = ["applied"; 10];
    expected[6] = "STORE_REFUSED";
    assert_eq!(told(&committed), expected);
    assert_eq!(committed.changes.len(), 18);
    assert_eq!(hub.count("SELECT count(*) FROM p2p_sync.states").await, 18);
    assert_eq!(
        hub.count("SELECT count(*) FROM p2p_sync.operations WHERE sequence = 7")
            .await,
        0
    );
    let kept = "SELECT count(*) FROM p2p_sync.rejected_operations WHERE sequence = 7 AND path = '' \
        AND convert_from(payload, 'UTF8')::jsonb -> 1 ->> 'path' = 'geffen/NPC_STATE/7' \
        AND convert_from(payload, 'UTF8')::jsonb -> 0 -> 'data' = '{\"n\": 7}'";
    assert_eq!(hub.count(kept).await, 1);
    assert_eq!(told(&apply(&hub, host, units()).await), expected, "told again");
}

#[tokio::test]
async fn invariant_02_a_group_that_comes_twice_takes_effect_once() {
    let (hub, host) = (Hub::new().await, Uuid::nil());
    assert_eq!(told(&apply(&hub, host, vec![trade(1)]).await), ["applied"]);
    let again = apply(&hub, host, vec![trade(1), trade(2)]).await;
    assert_eq!(told(&again), ["applied", "applied"]);
    assert_eq!(again.changes.len(), 2, "of the second group alone");
    assert_eq!(hub.count("SELECT count(*) FROM p2p_sync.operations").await, 4);
}

#[tokio::test]
async fn a_group_that_spans_two_maps_is_in_both_streams_under_its_id() {
    let (hub, host) = (Hub::new().await, Uuid::nil());
    let members = group(vec![
        every("prontera/CHAT_MESSAGE/1", 2, Some(1)),
        put("geffen/MAP_STATE", 2),
    ]);
    let id = members[0].operation_id;
    let chat = vec![every("prontera/CHAT_MESSAGE/1", 1, None)];
    let committed = apply(&hub, host, vec![chat, members]).await;
    assert_eq!(told(&committed), ["applied", "applied"]);
    for (stream, sequence) in [("prontera", 2), ("geffen", 1)] {
        let rows = hub.store.changes_since(stream, sequence - 1, 10).await.expect("reads");
        assert_eq!(
            (rows.len(), rows[0].stream_sequence, rows[0].group_id),
            (1, sequence, Some(id))
        );
        assert_eq!(rows[0].to_wire().group_id.as_ref(), id.as_bytes());
    }
    let before = &hub.store.changes_since("prontera", 0, 1).await.expect("reads")[0];
    assert_eq!(before.group_id, None);
    let logged = format!("SELECT count(*) FROM p2p_sync.operations WHERE operation_id = '{id}' AND in_group");
    assert_eq!(
        hub.count(&logged).await,
        2,
        "logged whole, whatever its types' history is"
    );
    let status = hub.store.operation_status(host, id, None).await.expect("reads");
    assert!(matches!(status, Some(Outcome::Applied { .. })));
}

#[tokio::test]
async fn invariant_03_a_group_waits_until_each_of_its_members_may_come_and_holds_back_what_follows() {
    let (hub, host) = (Hub::new().await, Uuid::nil());
    let path = |n| format!("prontera/CHAT_MESSAGE/{n}");
    let chat = |n, sequence, before| vec![every(&path(n), sequence, before)];
    let members = || {
        group(vec![
            every(&path(1), 3, Some(1)),
            every(&path(2), 3, Some(2)),
            put("geffen/MAP_STATE", 3),
        ])
    };
    // The second member's predecessor has not come.
    let early = vec![chat(1, 1, None), members(), chat(1, 4, Some(3)), chat(2, 5, Some(3))];
    assert_eq!(
        told(&apply(&hub, host, early).await),
        ["applied", "not yet", "not yet", "not yet"]
    );
    assert_eq!(hub.state("geffen/MAP_STATE").await, None, "nothing of it");
    let all = vec![chat(2, 2, None), members(), chat(1, 4, Some(3)), chat(2, 5, Some(3))];
    assert_eq!(told(&apply(&hub, host, all).await), ["applied"; 4]);
    let rows = hub.store.changes_since("prontera", 0, 10).await.expect("reads");
    let of = |n| numbers(rows.iter().filter(|row| row.path == path(n)).map(|row| &row.payload));
    assert_eq!((of(1), of(2)), (vec![1, 3, 4], vec![2, 3, 5]));
}

#[tokio::test]
async fn invariant_03_a_member_that_comes_late_leaves_the_newer_version_and_its_group_applies_all_the_same() {
    let (hub, host) = (Hub::new().await, Uuid::nil());
    let newer = vec![put("prontera/NPC_STATE/1", 5)];
    let committed = apply(&hub, host, vec![newer]).await;
    assert_eq!(told(&committed), ["applied"]);
    assert_eq!(told(&apply(&hub, host, vec![trade(1)]).await), ["applied"]);
    let n = async |path| numbers([&hub.state(path).await.expect("stored").0]);
    assert_eq!(
        (n("prontera/NPC_STATE/1").await, n("geffen/NPC_STATE/1").await),
        (vec![5], vec![1])
    );
    // A group of which nothing is the newest.
    let newer = [put("prontera/NPC_STATE/2", 6), put("geffen/NPC_STATE/2", 7)];
    apply(&hub, host, newer.into_iter().map(|op| vec![op]).collect()).await;
    assert_eq!(told(&apply(&hub, host, vec![trade(2)]).await), ["superseded"]);
}

#[tokio::test]
async fn invariant_07_a_group_that_conflicts_with_an_edit_in_one_member_is_kept_whole() {
    let (hub, host) = (Hub::new().await, Uuid::nil());
    apply(&hub, host, vec![trade(1)]).await;
    hub.sql
        .batch_execute("UPDATE p2p_sync.states SET hub_edit = 1 WHERE path = 'prontera/NPC_STATE/1'")
        .await
        .expect("updates");
    let second = group(
        trade(1)
            .into_iter()
            .map(|op| ValidOp {
                position: at(1, 2),
                ..op
            })
            .collect(),
    );
    let committed = apply(&hub, host, vec![second, trade(3)]).await;
    assert_eq!(told(&committed), [Code::Conflict.label(), "applied"]);
    let unchanged = "SELECT count(*) FROM p2p_sync.states WHERE sequence = 1";
    assert_eq!(hub.count(unchanged).await, 2);
    let kept = "SELECT count(*) FROM p2p_sync.rejected_operations WHERE sequence = 2 AND path = '' \
        AND jsonb_array_length(convert_from(payload, 'UTF8')::jsonb) = 2";
    assert_eq!(hub.count(kept).await, 1);
}

#[tokio::test]
async fn invariant_02_a_hub_whose_database_is_killed_amid_a_group_has_all_of_it_or_nothing() {
    let (hub, host) = (Hub::new().await, Uuid::nil());
    // The connection dies at the last row that the group writes.
    hub.sql
        .batch_execute(
            "CREATE FUNCTION p2p_sync.die() RETURNS trigger LANGUAGE plpgsql AS \
                $$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NEW; END $$; \
             CREATE TRIGGER dies AFTER INSERT ON p2p_sync.operations FOR EACH ROW \
                WHEN (NEW.path LIKE 'geffen%') EXECUTE FUNCTION p2p_sync.die()",
        )
        .await
        .expect("alters");
    let mut valid = message(host, vec![]);
    valid.ops = trade(1);
    assert_eq!(
        hub.store.apply(&valid).await.expect_err("dies").0.code,
        Code::HubUnavailable
    );
    for table in ["states", "operations", "settled_sequences"] {
        assert_eq!(
            hub.count(&format!("SELECT count(*) FROM p2p_sync.{table}")).await,
            0,
            "{table}"
        );
    }
    hub.sql
        .batch_execute("DROP TRIGGER dies ON p2p_sync.operations")
        .await
        .expect("alters");
    assert_eq!(told(&hub.store.apply(&valid).await.expect("serves")), ["applied"]);
    assert_eq!(hub.count("SELECT count(*) FROM p2p_sync.states").await, 2);
}
