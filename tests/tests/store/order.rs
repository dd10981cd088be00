//! The newest version of a path is its truth, whatever arrives when; what counts one by one applies in its order.

use p2p_sync_proto::{Code, Problem};
use p2p_sync_proxy::operation::{Refused, Valid, ValidOp};
use uuid::Uuid;

use crate::fixture::{Hub, at, delete, every, message, numbers, put, refused, told};

const PATH: &str = "prontera/MONSTER_DATA/1";

#[tokio::test]
async fn invariant_03_the_newest_version_wins_whatever_the_order_and_grouping_of_arrival() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let hub = Hub::new().await;
    for round in 0..20_u64 {
        let path = format!("prontera/MONSTER_DATA/{round}");
        let mut ops: Vec<ValidOp> = Vec::new();
        for tenure in 1..=2 {
            for incarnation in 1..=2 {
                for sequence in 1..=4 {
                    let n = tenure * 100 + incarnation * 10 + sequence;
                    // The two tenures are two hosts' in truth; here one host's, whose sequences must not meet.
                    let position = at(incarnation, round * 100 + tenure * 10 + sequence);
                    let payload = Some(format!("{{\"n\": {n}}}"));
                    ops.push(ValidOp {
                        tenure,
                        position,
                        payload,
                        ..put(&path, 1)
                    });
                }
            }
        }
        random.shuffle(&mut ops);
        while !ops.is_empty() {
            let taken = ops.split_off(ops.len() - random.usize(1..=ops.len().min(5)));
            hub.apply(Uuid::nil(), taken).await;
        }
        let (payload, _) = hub.state(&path).await.expect("written");
        assert_eq!(numbers([&payload]), [224], "round {round} of seed {seed}");
    }
}

#[tokio::test]
async fn invariant_03_an_older_operation_of_the_same_message_or_a_later_one_is_superseded() {
    let (hub, host) = (Hub::new().await, Uuid::nil());
    let first = hub.apply(host, vec![put(PATH, 2), put(PATH, 4)]).await;
    assert_eq!(told(&first), ["superseded", "applied"]);
    assert_eq!(
        first
            .changes
            .iter()
            .map(|change| change.position.sequence)
            .collect::<Vec<_>>(),
        [4]
    );
    let late = hub.apply(host, vec![put(PATH, 3)]).await;
    assert_eq!(told(&late), ["superseded"]);
    assert_eq!(late.changes, []);
    assert_eq!(numbers([&hub.state(PATH).await.expect("written").0]), [4]);
}

#[tokio::test]
async fn invariant_03_incarnations_order_one_host_and_between_hosts_of_a_tenure_the_last_to_come_wins() {
    let (hub, a, b) = (Hub::new().await, Uuid::from_u128(1), Uuid::from_u128(2));
    let write = |tenure, incarnation, sequence, n| ValidOp {
        tenure,
        position: at(incarnation, sequence),
        payload: Some(format!("{{\"n\": {n}}}")),
        ..put(PATH, 1)
    };
    for (host, op, outcome, stands) in [
        (a, write(0, 9, 5, 1), "applied", 1),
        (b, write(0, 2, 7, 2), "applied", 2),
        (b, write(0, 2, 6, 3), "superseded", 2),
        (b, write(0, 1, 99, 4), "superseded", 2),
        (a, write(0, 9, 6, 5), "applied", 5),
        (b, write(1, 1, 1, 6), "applied", 6),
        (a, write(0, 9, 7, 7), "superseded", 6),
    ] {
        assert_eq!(told(&hub.apply(host, vec![op]).await), [outcome], "before {stands}");
        assert_eq!(numbers([&hub.state(PATH).await.expect("written").0]), [stands]);
    }
}

#[tokio::test]
async fn invariant_03_a_tombstone_keeps_older_operations_out_and_gives_way_to_newer_ones() {
    let (hub, host) = (Hub::new().await, Uuid::nil());
    hub.apply(host, vec![put(PATH, 1), delete(PATH, 3)]).await;
    assert_eq!(told(&hub.apply(host, vec![put(PATH, 2)]).await), ["superseded"]);
    assert_eq!(hub.state(PATH).await, Some((None, true)));
    assert_eq!(hub.store.scan("prontera/", None, 10).await.expect("reads"), []);
    let changes = hub.store.changes_since("prontera", 0, 10).await.expect("reads");
    assert_eq!(
        changes
            .iter()
            .map(|state| (state.position.sequence, state.deleted))
            .collect::<Vec<_>>(),
        [(3, true)]
    );
    assert_eq!(told(&hub.apply(host, vec![put(PATH, 4)]).await), ["applied"]);
    assert_eq!(numbers([&hub.state(PATH).await.expect("written").0]), [4]);
}

#[tokio::test]
async fn invariant_03_what_counts_one_by_one_waits_for_its_predecessor_and_applies_in_order() {
    let (hub, host, path) = (Hub::new().await, Uuid::nil(), "prontera/CRITICAL_GAME_STATE");
    let third = every(path, 3, Some(2));
    let fourth = every(path, 4, Some(3));
    let early = hub
        .apply(
            host,
            vec![third.clone(), fourth.clone(), every("prontera/CHAT_MESSAGE", 5, None)],
        )
        .await;
    assert_eq!(told(&early), ["not yet", "not yet", "applied"]);
    assert_eq!(told(&hub.apply(host, vec![every(path, 1, None)]).await), ["applied"]);
    assert_eq!(told(&hub.apply(host, vec![third.clone()]).await), ["not yet"]);
    let all = hub.apply(host, vec![every(path, 2, Some(1)), third, fourth]).await;
    assert_eq!(told(&all), ["applied", "applied", "applied"]);
    let changes = hub.store.changes_since("prontera", 0, 10).await.expect("reads");
    assert_eq!(numbers(changes.iter().map(|state| &state.payload)), [5, 1, 2, 3, 4]);
}

#[tokio::test]
async fn invariant_03_what_follows_a_refused_operation_does_not_overtake_what_is_before_that() {
    let (hub, host, path) = (Hub::new().await, Uuid::nil(), "prontera/CHAT_MESSAGE");
    let wrong = || Refused {
        follows: vec![at(1, 1)],
        ..refused(1, Some(at(1, 2)), Problem::new(Code::ImpossibleValue, "why"))
    };
    let early = || Valid {
        refused: vec![wrong()],
        ..message(host, vec![every(path, 3, Some(2))])
    };
    for _ in 0..2 {
        let committed = hub.store.apply(&early()).await.expect("serves");
        assert_eq!(told(&committed), ["not yet", "not yet"]);
        assert_eq!(committed.settled_now, [0; 0]);
    }
    assert_eq!(hub.count("SELECT count(*) FROM p2p_sync.rejected_operations").await, 0);
    assert_eq!(told(&hub.apply(host, vec![every(path, 1, None)]).await), ["applied"]);
    let late = hub.store.apply(&early()).await.expect("serves");
    assert_eq!(told(&late), ["applied", "IMPOSSIBLE_VALUE"]);
    assert_eq!(late.settled_now, [1]);
    let changes = hub.store.changes_since("prontera", 0, 10).await.expect("reads");
    assert_eq!(numbers(changes.iter().map(|state| &state.payload)), [1, 3]);
}

#[tokio::test]
async fn invariant_03_a_predecessor_of_an_older_incarnation_is_waited_for_too() {
    let (hub, host, path) = (Hub::new().await, Uuid::nil(), "prontera/CRITICAL_GAME_STATE");
    let after = |sequence| ValidOp {
        position: at(2, 1),
        predecessor: Some(at(1, sequence)),
        ..every(path, 1, None)
    };
    assert_eq!(told(&hub.apply(host, vec![after(9)]).await), ["not yet"]);
    let both = hub.apply(host, vec![after(9), every(path, 9, None)]).await;
    assert_eq!(
        told(&both),
        ["applied", "applied"],
        "the older incarnation of a message goes first"
    );
}

#[tokio::test]
async fn a_writer_that_has_not_seen_the_operators_edit_is_refused_and_its_operation_kept() {
    let (hub, host) = (Hub::new().await, Uuid::nil());
    hub.apply(host, vec![put(PATH, 1)]).await;
    hub.sql
        .execute("UPDATE p2p_sync.states SET hub_edit = 5, payload = '{\"n\": 50}'", &[])
        .await
        .expect("edits");
    let unaware = message(
        host,
        vec![
            put(PATH, 2),
            ValidOp {
                hub_edit_seen: 4,
                ..put(PATH, 3)
            },
        ],
    );
    assert_eq!(
        told(&hub.store.apply(&unaware).await.expect("serves")),
        ["CONFLICT", "CONFLICT"]
    );
    assert_eq!(numbers([&hub.state(PATH).await.expect("there").0]), [50]);
    let kept = "SELECT count(*) FROM p2p_sync.rejected_operations WHERE payload IN ('{\"n\": 2}', '{\"n\": 3}')";
    assert_eq!(hub.count(kept).await, 2);
    assert_eq!(
        told(&hub.store.apply(&unaware).await.expect("serves")),
        ["CONFLICT", "CONFLICT"],
        "told again"
    );

    let aware = ValidOp {
        hub_edit_seen: 5,
        ..put(PATH, 4)
    };
    assert_eq!(
        told(&hub.apply(host, vec![aware, put(PATH, 5)]).await),
        ["applied", "CONFLICT"]
    );
    let clairvoyant = ValidOp {
        hub_edit_seen: 6,
        ..put(PATH, 6)
    };
    assert_eq!(told(&hub.apply(host, vec![clairvoyant]).await), ["CONFLICT"]);
    assert_eq!(numbers([&hub.state(PATH).await.expect("there").0]), [4]);
    assert_eq!(hub.count("SELECT hub_edit FROM p2p_sync.states").await, 5);
}
