use super::*;

fn verdict(host: u128, kind: Kind) -> Verdict {
    Verdict {
        host_id: Uuid::from_u128(host),
        kind,
        rule: "a rule",
        operation_id: None,
        path: None,
        details: Value::Null,
        operations: 1,
    }
}

#[test]
fn every_refusal_is_counted_and_takes_no_more_room() {
    let (mut waiting, now) = (Waiting::default(), Instant::now());
    for _ in 0..100_000 {
        waiting.add(verdict(1, Kind::Refused), now);
    }
    waiting.add(verdict(2, Kind::Refused), now);
    let (mut found, dropped) = waiting.take(now);
    found.sort_by_key(|verdict| verdict.host_id);
    let counts: Vec<u64> = found.iter().map(|verdict| verdict.operations).collect();
    assert_eq!((counts, dropped), (vec![100_000, 1], 0));
    for verdict in found {
        waiting.put_back(verdict);
    }
    waiting.add(verdict(1, Kind::Refused), now);
    assert_eq!(
        waiting
            .take(now)
            .0
            .iter()
            .map(|verdict| verdict.operations)
            .sum::<u64>(),
        100_002,
        "what was not written is counted on"
    );
}

#[test]
fn refusals_that_cannot_be_counted_are_told() {
    let (mut waiting, now) = (Waiting::default(), Instant::now());
    for host in 0..=COUNTS_MAX as u128 {
        waiting.add(verdict(host, Kind::Refused), now);
    }
    let (found, dropped) = waiting.take(now);
    assert_eq!((found.len(), dropped), (COUNTS_MAX, 1));
    assert_eq!(waiting.take(now).1, 0, "once");
}

#[test]
fn a_host_has_its_share_of_flags_and_reports_a_minute() {
    let (mut waiting, now) = (Waiting::default(), Instant::now());
    for _ in 0..1000 {
        for kind in [Kind::Flagged, Kind::Reported] {
            waiting.add(verdict(1, kind), now);
        }
    }
    waiting.add(verdict(2, Kind::Flagged), now);
    assert_eq!(waiting.take(now).0.len(), 2 * OF_A_HOST_MAX as usize + 1);
    waiting.add(verdict(1, Kind::Flagged), now);
    assert_eq!(waiting.take(now + OF_A_HOST_WITHIN).0.len(), 0);
    waiting.add(verdict(1, Kind::Flagged), now + OF_A_HOST_WITHIN);
    assert_eq!(waiting.take(now + OF_A_HOST_WITHIN).0.len(), 1, "the next minute");
}

#[test]
fn what_an_honest_host_may_run_into_is_no_forgery() {
    for code in [
        Code::SchemaViolation,
        Code::Repolicy,
        Code::Conflict,
        Code::PlayerNotHere,
        Code::StoreRefused,
        Code::TooLarge,
        Code::UnknownType,
        Code::Unsupported,
        Code::OutboxTooOld,
        Code::HubUnavailable,
    ] {
        assert_eq!(forgery(code), None, "{code}");
    }
    assert_eq!(forgery(Code::ImpossibleValue), Some("IMPOSSIBLE_VALUE"));
    assert_eq!(forgery(Code::NotLeaseHolder), Some("NOT_LEASE_HOLDER"));
}

fn walks(index: u32, x: u32) -> ValidOp {
    let payload = format!("{{\"event\":\"move\",\"x\":{x},\"y\":5}}");
    let step = movement::Step::read(&p2p_sync_proto::json::check(&payload).expect("JSON"));
    ValidOp {
        index,
        operation_id: Uuid::from_u128(index.into()),
        tenure: 0,
        position: p2p_sync_proto::Position {
            incarnation: 1,
            sequence: u64::from(index) + 1,
        },
        path: p2p_sync_proto::Path::parse("prontera/PLAYER_POSITION/7").expect("a path"),
        data_type: SyncDataType::PlayerPosition,
        keep: p2p_sync_proto::policy::Keep::Latest,
        history: crate::operation::History::All,
        deleted: false,
        account_id: 0,
        map: "prontera".to_owned(),
        hub_edit_seen: 0,
        conflict_rule: crate::operation::ConflictRule::Hub,
        predecessor: None,
        presence: None,
        made_at_ms: 0,
        payload: Some(payload),
        in_group: false,
        embedded: false,
        step: Some((7, step)),
    }
}

#[test]
fn nobody_is_flagged_for_what_was_not_stored() {
    let pace = Pace {
        ms_per_cell: 150,
        ms_per_cell_min: 20,
    };
    let far_off = |outcome: Outcome| {
        let verdicts = Verdicts::new(pace, Locks::default());
        let valid = Valid {
            host_id: Uuid::from_u128(1),
            lane: p2p_sync_proto::envelope::Lane::Bulk,
            ops: (0..80).map(|n| walks(n, 5 + n % 2 * 900)).collect(),
            refused: vec![],
            withdrawn: vec![],
        };
        let committed = Committed {
            timeline: 1,
            outcomes: (0..80)
                .map(|n| {
                    (
                        n,
                        if n % 2 == 0 {
                            Outcome::Superseded
                        } else {
                            outcome.clone()
                        },
                    )
                })
                .collect(),
            settled_now: vec![],
            changes: vec![],
            spans: vec![],
            edits: std::collections::HashMap::new(),
        };
        verdicts.judge(Instant::now(), &valid, &committed);
        let (found, _) = verdicts.waiting().take(Instant::now());
        found.len()
    };
    assert!(far_off(Outcome::Superseded) > 0);
    let late = Problem::new(Code::StaleTenure, "late");
    for left_out in [Outcome::Limbo(late.clone()), Outcome::Rejected(late), Outcome::NotYet] {
        assert_eq!(far_off(left_out), 0);
    }
}

#[test]
fn a_coming_that_is_refused_for_its_account_is_no_trespass_and_a_going_is() {
    let moved = |index, event: &str| ValidOp {
        path: p2p_sync_proto::Path::parse("@char/7/PLAYER_PRESENCE").expect("a path"),
        data_type: SyncDataType::PlayerPresence,
        payload: Some(format!("{{\"event\": \"{event}\"}}")),
        step: None,
        ..walks(index, 5)
    };
    let valid = Valid {
        host_id: Uuid::from_u128(1),
        lane: p2p_sync_proto::envelope::Lane::Critical,
        ops: vec![moved(0, "enter"), moved(1, "leave"), moved(2, "enter")],
        refused: vec![],
        withdrawn: vec![],
    };
    let rejected = |code| Outcome::Rejected(Problem::new(code, "why"));
    let committed = Committed {
        timeline: 1,
        outcomes: vec![
            (0, rejected(Code::PlayerNotHere)),
            (1, rejected(Code::PlayerNotHere)),
            (2, rejected(Code::NotLeaseHolder)),
        ],
        settled_now: vec![0, 1, 2],
        changes: vec![],
        spans: vec![],
        edits: std::collections::HashMap::new(),
    };
    let found: Vec<_> = trespasses(&valid, &committed).map(|verdict| verdict.rule).collect();
    assert_eq!(found, ["foreign_player", "foreign_map"]);
}
