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
