//! What lies in limbo is the operator's to merge or to discard.

use p2p_sync_proto::Code;
use p2p_sync_proxy::{
    operation::{Outcome, ValidOp},
    store::LimboFilter,
};
use uuid::Uuid;

use crate::{
    fixture::{Hub, message, numbers, path_of, put, told},
    groups::{apply, group},
};

fn under(tenure: u64, path: &str, sequence: u64) -> ValidOp {
    ValidOp {
        tenure,
        ..put(path, sequence)
    }
}

/// A hub where one host wrote after its map had passed to another, which had written too.
async fn late() -> (Hub, Uuid, Uuid) {
    let hub = Hub::governed().await;
    let (old, new) = (hub.host().await, hub.host().await);
    hub.store.grant_map("prontera", old, false).await.expect("free");
    hub.store.grant_map("geffen", old, false).await.expect("free");
    hub.store.grant_map("prontera", new, true).await.expect("forced");
    let newer = hub.apply(new, vec![under(2, "prontera/NPC_STATE/1", 1)]).await;
    assert_eq!(told(&newer), ["applied"]);
    let units = vec![
        vec![under(1, "prontera/NPC_STATE/1", 5)],
        group(vec![
            under(1, "prontera/NPC_STATE/2", 6),
            under(1, "geffen/NPC_STATE/2", 6),
        ]),
        vec![under(1, "prontera/NPC_STATE/3 geffen", 7)],
    ];
    assert_eq!(told(&apply(&hub, old, units).await), ["limbo"; 3]);
    (hub, old, new)
}

#[tokio::test]
async fn what_is_merged_is_an_edit_of_the_operators_in_the_order_of_its_streams() {
    let (hub, old, new) = late().await;
    let rows = hub.store.limbo(&LimboFilter::default()).await.expect("serves");
    assert_eq!(
        rows.iter().map(|row| row.paths.as_str()).collect::<Vec<_>>(),
        [
            "prontera/NPC_STATE/1",
            "prontera/NPC_STATE/2 geffen/NPC_STATE/2",
            "prontera/NPC_STATE/3 geffen",
        ]
    );
    let listed = async |wanted: LimboFilter<'_>| hub.store.limbo(&wanted).await.expect("serves");
    let of_geffen = LimboFilter {
        map: Some("geffen"),
        ..LimboFilter::default()
    };
    assert_eq!(listed(of_geffen).await, rows[1..2]);
    let the_next = LimboFilter {
        host_id: Some(old),
        after: rows[0].limbo_id,
        limit: Some(1),
        ..LimboFilter::default()
    };
    assert_eq!(listed(the_next).await, rows[1..2]);
    let of_another = LimboFilter {
        host_id: Some(new),
        ..LimboFilter::default()
    };
    assert!(listed(of_another).await.is_empty());
    let head = hub
        .count("SELECT head FROM p2p_sync.map_states WHERE stream = 'prontera'")
        .await;
    for row in &rows[..2] {
        hub.store.merge_limbo(row.limbo_id).await.expect("there");
        let again = hub.store.merge_limbo(row.limbo_id).await.expect_err("gone");
        assert_eq!(again.code, Code::NotFound);
    }
    assert_eq!(
        numbers([&hub.state("prontera/NPC_STATE/1").await.expect("there").0]),
        [5]
    );
    assert_eq!(numbers([&hub.state("geffen/NPC_STATE/2").await.expect("there").0]), [6]);
    let edited = "SELECT count(*) FROM p2p_sync.states WHERE hub_edit BETWEEN 1 AND 3";
    assert_eq!(hub.count(edited).await, 3);
    let edit = hub.store.get(&path_of("prontera/NPC_STATE/1")).await.expect("serves");
    let edit = edit.expect("there").hub_edit;
    let changes = hub
        .store
        .changes_since("prontera", head.unsigned_abs(), 10)
        .await
        .expect("serves");
    assert_eq!(
        changes.iter().map(|row| row.path.as_str()).collect::<Vec<_>>(),
        ["prontera/NPC_STATE/1", "prontera/NPC_STATE/2",]
    );
    // Its sender asks again: it took effect. The holder had not seen the edit.
    let late = hub.apply(old, vec![under(1, "prontera/NPC_STATE/1", 5)]).await;
    assert_eq!(told(&late), ["applied"]);
    let unseen = hub.apply(new, vec![under(2, "prontera/NPC_STATE/1", 2)]).await;
    assert_eq!(told(&unseen), [Code::Conflict.label()]);
    let seen = ValidOp {
        hub_edit_seen: edit,
        ..under(2, "prontera/NPC_STATE/1", 3)
    };
    assert_eq!(told(&hub.apply(new, vec![seen]).await), ["applied"]);
    assert_eq!(hub.store.limbo(&LimboFilter::default()).await.expect("serves").len(), 1);
}

#[tokio::test]
async fn invariant_07_what_is_discarded_changes_nothing_and_stays_among_the_dead_letters() {
    let (hub, old, _) = late().await;
    let rows = hub.store.limbo(&LimboFilter::default()).await.expect("serves");
    for row in &rows {
        hub.store.discard_limbo(row.limbo_id).await.expect("there");
        assert_eq!(
            hub.store.discard_limbo(row.limbo_id).await.expect_err("gone").code,
            Code::NotFound
        );
    }
    assert_eq!(
        numbers([&hub.state("prontera/NPC_STATE/1").await.expect("there").0]),
        [1]
    );
    assert_eq!(hub.count("SELECT count(*) FROM p2p_sync.rejected_operations").await, 3);
    let again = hub
        .store
        .apply(&message(old, vec![under(1, "prontera/NPC_STATE/1", 5)]))
        .await;
    let outcome = again.expect("serves").outcomes.remove(0).1;
    assert!(
        matches!(&outcome, Outcome::Rejected(problem) if problem.code == Code::StaleTenure && problem.sentence.contains("decided against")),
        "{outcome:?}"
    );
}
