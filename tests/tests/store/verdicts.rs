//! What is found against hosts, and the lock.

use std::time::Duration;

use p2p_sync_proto::{Code, Position, Problem};
use p2p_sync_proxy::{
    operation::{Refused, Valid},
    store::HostStatus,
    verdicts::{Kind, LockRule, Verdict},
};
use serde_json::json;
use uuid::Uuid;

use crate::fixture::{Hub, message, put};

const RULE: LockRule = LockRule {
    threshold: 100,
    window: Duration::from_mins(10),
};

fn verdict(host_id: Uuid, kind: Kind, rule: &'static str, operations: u64) -> Verdict {
    Verdict {
        host_id,
        kind,
        rule,
        operation_id: Some(Uuid::from_u128(9)),
        path: Some("prontera/\0/\u{9b}".to_owned()),
        details: json!({"reason": "why"}),
        operations,
    }
}

async fn status(hub: &Hub, host_id: Uuid) -> HostStatus {
    hub.store.host(host_id).await.expect("serves").expect("there").status
}

#[tokio::test]
async fn refusals_by_one_rule_are_one_row_a_minute_that_counts_them_and_flags_are_rows() {
    let hub = Hub::new().await;
    let (host, other) = (hub.host().await, hub.host().await);
    for _ in 0..3 {
        let found = [
            verdict(host, Kind::Refused, "BAD_PATH", 7),
            verdict(host, Kind::Refused, "BAD_MAP", 1),
            verdict(other, Kind::Refused, "BAD_PATH", 1),
            verdict(host, Kind::Flagged, "movement_speed", 1),
            verdict(host, Kind::Reported, "report", 1),
        ];
        hub.store.add_verdicts(&found).await.expect("written");
    }
    let sums = hub.store.verdict_sums(host).await.expect("serves");
    let facts: Vec<_> = sums
        .iter()
        .map(|sum| (sum.verdict.as_str(), sum.rule.as_str(), sum.rows, sum.operations))
        .collect();
    assert_eq!(
        facts,
        [
            ("flagged", "movement_speed", 3, 3),
            ("refused", "BAD_MAP", 1, 3),
            ("refused", "BAD_PATH", 1, 21),
            ("reported by host", "report", 3, 3),
        ]
    );
    let age = "UPDATE p2p_sync.security_validations SET received_at = received_at - interval '61 seconds'";
    hub.sql.batch_execute(age).await.expect("ages");
    let later = [verdict(host, Kind::Refused, "BAD_PATH", 1)];
    hub.store.add_verdicts(&later).await.expect("written");
    let newest = &hub.store.verdicts(host, 1).await.expect("serves")[0];
    assert_eq!(
        (newest.rule.as_str(), newest.path.as_deref()),
        ("BAD_PATH", Some("prontera/\u{fffd}/\u{9b}"))
    );
    let details: serde_json::Value = serde_json::from_str(&newest.details).expect("JSON");
    assert_eq!(details, json!({"reason": "why", "operations": 1}));
}

#[tokio::test]
async fn a_host_is_locked_at_the_threshold_within_the_window_and_unlocked_with_a_new_start() {
    let hub = Hub::new().await;
    let (host, other) = (hub.host().await, hub.host().await);
    let refuse = async |operations| {
        let found = [verdict(host, Kind::Refused, "BAD_PATH", operations)];
        hub.store.add_verdicts(&found).await.expect("written");
        hub.store.lock_for_refusals(host, false, RULE).await.expect("serves")
    };
    let flags = vec![verdict(host, Kind::Flagged, "movement_speed", 1); 200];
    hub.store.add_verdicts(&flags).await.expect("written");
    assert_eq!(refuse(60).await, None, "flags lock nobody");
    let age = "UPDATE p2p_sync.security_validations SET received_at = received_at - interval '11 minutes'";
    hub.sql.batch_execute(age).await.expect("ages");
    assert_eq!(refuse(99).await, None, "what is older than the window does not count");
    assert_eq!(refuse(1).await, Some(100));
    assert_eq!(status(&hub, host).await, HostStatus::Locked);
    assert_eq!(status(&hub, other).await, HostStatus::Active);
    assert_eq!(refuse(1).await, None, "it is locked already");

    hub.store
        .set_host_status(host, HostStatus::Active)
        .await
        .expect("unlocks");
    assert_eq!(refuse(98).await, None, "a new start, but for what came since");
    assert_eq!(refuse(1).await, Some(100));
}

#[tokio::test]
async fn a_revoked_host_stays_revoked_and_old_verdicts_are_forgotten() {
    let hub = Hub::new().await;
    let host = hub.host().await;
    hub.store
        .set_host_status(host, HostStatus::Revoked)
        .await
        .expect("revokes");
    for back in [HostStatus::Active, HostStatus::Locked] {
        let now = hub.store.set_host_status(host, back).await;
        assert_eq!(now.expect("serves"), Some(HostStatus::Revoked));
    }
    let found = [verdict(host, Kind::Refused, "BAD_PATH", 1000)];
    hub.store.add_verdicts(&found).await.expect("written");
    assert_eq!(
        hub.store.lock_for_refusals(host, false, RULE).await.expect("serves"),
        None
    );
    assert_eq!(status(&hub, host).await, HostStatus::Revoked);
    let age = "UPDATE p2p_sync.security_validations SET received_at = received_at - interval '31 days'";
    hub.sql.batch_execute(age).await.expect("ages");
    assert_eq!(hub.store.maintain().await.expect("serves").verdicts_purged, 1);
}

#[tokio::test]
async fn trespass_and_forgery_lock_at_thresholds_of_their_own() {
    let hub = Hub::new().await;
    let host = hub.host().await;
    let found = [
        verdict(host, Kind::Refused, "foreign_map", 60),
        verdict(host, Kind::Refused, "foreign_player", 39),
        verdict(host, Kind::Refused, "BAD_PATH", 99),
    ];
    hub.store.add_verdicts(&found).await.expect("written");
    for is_trespass in [false, true] {
        let locked = hub.store.lock_for_refusals(host, is_trespass, RULE).await;
        assert_eq!(locked.expect("serves"), None);
    }
    let one_more = [verdict(host, Kind::Refused, "foreign_map", 1)];
    hub.store.add_verdicts(&one_more).await.expect("written");
    let forged = hub.store.lock_for_refusals(host, false, RULE).await;
    assert_eq!(forged.expect("serves"), None);
    let trespassed = hub.store.lock_for_refusals(host, true, RULE).await;
    assert_eq!(trespassed.expect("serves"), Some(100));
}

#[tokio::test]
async fn what_is_refused_counts_once_however_often_it_comes() {
    let hub = Hub::governed().await;
    let (host, holder) = (hub.host().await, hub.host().await);
    hub.store.grant_map("prontera", holder, false).await.expect("free");
    let refused = Refused {
        index: 1,
        operation_id: Uuid::from_u128(9),
        position: Some(Position {
            incarnation: 1,
            sequence: 2,
        }),
        follows: vec![],
        path: "prontera/MONSTER_DATA/7".to_owned(),
        data_type: 1,
        payload: b"{}".to_vec(),
        problem: Problem::new(Code::ImpossibleValue, "why"),
    };
    let foreign = put("prontera/MONSTER_DATA/7", 1);
    let message = Valid {
        refused: vec![refused],
        ..message(host, vec![foreign])
    };
    let first = hub.store.apply(&message).await.expect("decided");
    assert_eq!(first.settled_now, [0, 1]);
    let again = hub.store.apply(&message).await.expect("decided");
    assert_eq!(again.settled_now, [0; 0]);
    assert_eq!(again.outcomes.len(), 2, "and it is told what it was told before");
}
