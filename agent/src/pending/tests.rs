use std::time::Duration;

use prost::Message as _;

use super::{conflation::CONFLATE_ABOVE_OPS, *};

pub(super) fn entry(sequence: u64, path: &str) -> Entry {
    Entry {
        position: Position {
            incarnation: 1,
            sequence,
        },
        operation_id: Uuid::from_u128(u128::from(sequence)),
        path: path.into(),
        every: false,
        critical: false,
        sent_while_spooled: false,
        predecessor: None,
        presence: None,
        group: None,
        bytes: Bytes::from_static(b"0123456789"),
        reserved_bytes: 0,
        spooled: true,
    }
}

fn every(sequence: u64, predecessor: Option<u64>) -> Entry {
    let predecessor = predecessor.map(|sequence| Position {
        incarnation: 1,
        sequence,
    });
    Entry {
        every: true,
        predecessor,
        ..entry(sequence, "m/CHAT_MESSAGE")
    }
}

fn sequences(flight: &Flight) -> Vec<u64> {
    flight
        .operations
        .iter()
        .map(|(position, _)| position.sequence)
        .collect()
}

fn second(_: u32) -> Duration {
    Duration::from_secs(1)
}

#[test]
fn a_failed_message_is_tried_again_after_its_delay_and_in_order() {
    let mut pending = Pending::new(100, true);
    let now = Instant::now();
    for sequence in 1..=3 {
        pending.push(entry(sequence, &format!("m/{sequence}")), false);
    }
    let flight = pending.take_bulk(10).expect("three wait");
    assert!(pending.take_bulk(10).is_none());
    pending.put_back(&flight, now, second);
    assert_eq!(pending.wake(now), Some(now + Duration::from_secs(1)));
    assert!(pending.take_bulk(10).is_none());
    assert_eq!(pending.wake(now + Duration::from_secs(1)), None);
    assert_eq!(sequences(&pending.take_bulk(10).expect("again")), [1, 2, 3]);
}

#[test]
fn a_short_queue_is_not_conflated_and_a_backlog_is() {
    let mut pending = Pending::new(100_000, true);
    assert!(pending.push(entry(1, "m/a"), false).is_none());
    assert!(pending.push(entry(2, "m/a"), false).is_none());
    let backlog = CONFLATE_ABOVE_OPS as u64;
    for sequence in 3..=backlog {
        pending.push(entry(sequence, &format!("m/{sequence}")), false);
    }
    let replaced = pending.push(entry(backlog + 1, "m/a"), false).expect("conflated");
    assert_eq!(replaced.position.sequence, 2);
    let flight = pending.take_bulk(BATCH_OPS_MAX).expect("waits");
    assert_eq!(
        flight.withdrawn,
        [SequenceRange {
            incarnation: 1,
            first: 2,
            last: 2
        }]
    );
}

#[test]
fn what_was_tried_or_is_kept_as_every_is_never_conflated() {
    let mut pending = Pending::new(100_000, true);
    pending.push(entry(1, "m/a"), false);
    let tried = pending.take_bulk(1).expect("one");
    pending.put_back(&tried, Instant::now(), |_| Duration::ZERO);
    pending.wake(Instant::now());
    for sequence in 2..=CONFLATE_ABOVE_OPS as u64 + 1 {
        pending.push(every(sequence, None), false);
    }
    assert!(pending.push(entry(9000, "m/a"), false).is_none());
    assert!(pending.push(every(9001, None), false).is_none());
}

#[test]
fn memory_is_bounded_and_what_it_sheds_comes_back_from_disk_in_order() {
    let mut pending = Pending::new(20, true);
    for sequence in 1..=30 {
        pending.push(entry(sequence, &format!("m/{sequence}")), false);
    }
    assert_eq!(pending.len(), 20);
    let (_, _, room) = pending.wants_backlog().expect("the oldest is on disk");
    assert_eq!(room, BACKLOG_OPS_MIN, "memory is busy");
    assert_eq!(
        sequences(&pending.take_bulk(20).expect("live")),
        (11..=30).collect::<Vec<_>>()
    );
    for sequence in 11..=30 {
        pending.remove(Position {
            incarnation: 1,
            sequence,
        });
    }
    let (from, to, room) = pending.wants_backlog().expect("room");
    assert_eq!((from.sequence, to.sequence, room), (1, 10, BACKLOG_OPS_MIN));
    pending.take_back(from, (1..=10).map(|sequence| entry(sequence, "m")).collect(), None);
    assert_eq!(
        sequences(&pending.take_bulk(20).expect("backlog")),
        (1..=10).collect::<Vec<_>>()
    );
}

#[test]
fn the_backlog_yields_to_the_live_and_is_not_starved() {
    let mut pending = Pending::new(1000, true);
    pending.take_back(entry(1, "m/old").position, vec![entry(1, "m/old")], None);
    let mut turns = Vec::new();
    for sequence in 2..=6 {
        pending.push(entry(sequence, &format!("m/{sequence}")), false);
        turns.extend(sequences(&pending.take_bulk(1).expect("waits")));
    }
    assert_eq!(turns, [2, 3, 4, 1, 5]);
}

#[test]
fn invariant_01_what_follows_an_operation_on_disk_makes_room_for_it() {
    let mut pending = Pending::new(4, true);
    pending.push(every(1, None), false);
    for sequence in 2..=6 {
        pending.push(every(sequence, Some(sequence - 1)), false);
    }
    let flight = pending.take_bulk(10).expect("bulk");
    assert_eq!(sequences(&flight), [3, 4, 5, 6]);
    for (position, _) in &flight.operations {
        pending.not_yet(*position, Instant::now(), second);
    }
    assert_eq!(pending.len(), 0, "what follows the disk is left to it");
    let (from, to, _) = pending.wants_backlog().expect("room");
    assert_eq!((from.sequence, to.sequence), (1, 6));
}

#[test]
fn what_came_before_its_predecessor_waits_until_that_is_settled_and_comes_with_its_own_followers() {
    let mut pending = Pending::new(100, true);
    let now = Instant::now();
    pending.push(every(1, None), false);
    let first = pending.take_bulk(10).expect("bulk");
    pending.push(every(2, Some(1)), false);
    pending.push(every(3, Some(2)), false);
    for (position, _) in pending.take_bulk(10).expect("bulk").operations {
        pending.not_yet(position, now, |_| Duration::ZERO);
    }
    pending.wake(now);
    assert!(pending.take_bulk(10).is_none());
    pending.remove(first.operations[0].0);
    assert_eq!(sequences(&pending.take_bulk(10).expect("released")), [2, 3]);
}

#[test]
fn invariant_12_critical_operations_are_left_to_the_disk_too_and_last() {
    let mut pending = Pending::new(4, false);
    for sequence in 1..=8 {
        let critical = sequence != 6;
        pending.push(
            Entry {
                critical,
                ..entry(sequence, "m/a")
            },
            false,
        );
    }
    assert_eq!(pending.len(), 4);
    let flight = pending.take_critical().expect("critical");
    assert_eq!(sequences(&flight), [4, 5, 7, 8]);
}

#[test]
fn a_critical_operation_takes_its_waiting_predecessors_along() {
    let mut pending = Pending::new(100, true);
    pending.push(every(1, None), false);
    pending.push(every(2, Some(1)), false);
    pending.push(entry(3, "m/x"), false);
    pending.push(
        Entry {
            critical: true,
            ..every(4, Some(2))
        },
        false,
    );
    let flight = pending.take_critical().expect("critical");
    assert_eq!(sequences(&flight), [1, 2, 4]);
    assert_eq!(sequences(&pending.take_bulk(10).expect("the rest")), [3]);
}

#[test]
fn a_predecessor_in_flight_rides_along_and_is_put_back_by_the_flight_that_took_it() {
    let mut pending = Pending::new(100, true);
    let now = Instant::now();
    pending.push(every(1, None), false);
    let bulk = pending.take_bulk(10).expect("bulk");
    pending.push(
        Entry {
            critical: true,
            ..every(2, Some(1))
        },
        false,
    );
    let critical = pending.take_critical().expect("critical");
    assert_eq!(sequences(&critical), [1, 2]);
    pending.put_back(&critical, now, |_| Duration::ZERO);
    pending.wake(now);
    assert!(pending.take_bulk(10).is_none(), "still in the bulk flight");
    pending.put_back(&bulk, now, |_| Duration::ZERO);
    pending.wake(now);
    assert_eq!(sequences(&pending.take_bulk(10).expect("back")), [1]);
}

#[test]
fn invariant_03_a_coming_or_going_takes_along_what_was_made_of_the_player_before() {
    let mut pending = Pending::new(100, true);
    let going = |sequence| Entry {
        every: true,
        critical: true,
        bytes: p2p_sync_proto::v1::Operation {
            account_id: 5,
            ..Default::default()
        }
        .encode_to_vec()
        .into(),
        ..entry(sequence, "@char/7/PLAYER_PRESENCE")
    };
    pending.push(entry(1, "@char/7/PLAYER_DATA"), false);
    pending.push(entry(2, "@char/8/PLAYER_DATA"), false);
    pending.push(entry(3, "@account/5/PLAYER_DATA"), false);
    pending.push(group(4, &["@char/7/QUEST_PROGRESS/1", "m/CHAT_MESSAGE"], &[]), false);
    pending.push(going(5), false);
    pending.push(entry(6, "@char/7/PLAYER_DATA"), false);
    let flight = pending.take_critical().expect("critical");
    assert_eq!(sequences(&flight), [1, 3, 4, 5]);
    for (position, _) in &flight.operations {
        pending.remove(*position);
    }
    pending.push(going(7), false);
    assert_eq!(sequences(&pending.take_critical().expect("critical")), [6, 7]);
    assert_eq!(sequences(&pending.take_bulk(10).expect("the rest")), [2]);
}

#[test]
fn a_message_is_closed_before_it_grows_too_large() {
    let mut pending = Pending::new(100, true);
    let large = Bytes::from(vec![0; BATCH_BYTES_MAX / 3]);
    for sequence in 1..=5 {
        pending.push(
            Entry {
                bytes: large.clone(),
                ..entry(sequence, &format!("m/{sequence}"))
            },
            false,
        );
    }
    assert_eq!(sequences(&pending.take_bulk(10).expect("bulk")), [1, 2, 3]);
    assert_eq!(sequences(&pending.take_bulk(10).expect("bulk")), [4, 5]);
}

#[test]
fn invariant_03_on_a_full_disk_an_operation_replaces_older_ones_and_never_itself() {
    let mut pending = Pending::new(100, true);
    let unspooled = |sequence| Entry {
        spooled: false,
        ..entry(sequence, "m/a")
    };
    assert!(pending.push(unspooled(1), true).is_none());
    let replaced = pending.push(unspooled(2), true).expect("the older gives way");
    assert_eq!(replaced.position.sequence, 1);
    assert_eq!(sequences(&pending.take_bulk(10).expect("the newer waits")), [2]);
    assert!(
        pending.push(unspooled(1), true).is_none(),
        "what is on its way is not replaced, least of all by an older"
    );
}

#[test]
fn what_the_disk_holds_comes_back_even_while_memory_is_full_of_what_the_hub_holds_back() {
    let mut pending = Pending::new(100, true);
    let critical = |sequence| Entry {
        critical: true,
        ..entry(sequence, &format!("m/{sequence}"))
    };
    let at = |sequence| entry(sequence, "m/a").position;
    pending.leave_to_disk(at(1), at(3));
    for sequence in 4..=103 {
        pending.push(critical(sequence), false);
    }
    let held_back = pending.take_critical().expect("a hundred wait");
    pending.put_back(&held_back, Instant::now(), second);
    let (from, to, room) = pending.wants_backlog().expect("a few have room");
    assert_eq!((from, to), (at(1), at(3)));
    assert!((3..=BACKLOG_OPS_MIN).contains(&room));
    let page = (1..=3)
        .map(|sequence| entry(sequence, &format!("m/{sequence}")))
        .collect();
    pending.take_back(from, page, None);
    for sequence in 104..=110 {
        pending.push(critical(sequence), false);
    }
    assert_eq!(sequences(&pending.take_bulk(10).expect("they stayed")), [1, 2, 3]);
}

#[test]
fn what_is_on_disk_gives_way_only_to_what_is_on_disk() {
    let mut pending = Pending::new(100, true);
    pending.push(entry(1, "m/a"), false);
    let newer = Entry {
        spooled: false,
        critical: true,
        ..entry(2, "m/a")
    };
    assert!(pending.push(newer, true).is_none(), "a kill now would leave neither");
    assert!(!pending.has_withdrawn());
    let (is_here, replaced) = pending.mark_spooled(
        Position {
            incarnation: 1,
            sequence: 2,
        },
        true,
    );
    assert!(is_here);
    assert_eq!(replaced.expect("the older gives way").position.sequence, 1);
    assert!(pending.has_withdrawn());
}

#[test]
fn what_is_left_to_the_disk_while_it_is_read_is_not_forgotten() {
    let mut pending = Pending::new(100, true);
    let at = |sequence| Position {
        incarnation: 1,
        sequence,
    };
    pending.leave_to_disk(at(5), at(9));
    let (from, ..) = pending.wants_backlog().expect("room");
    pending.leave_to_disk(at(3), at(3));
    pending.take_back(from, (5..=9).map(|sequence| entry(sequence, "m")).collect(), None);
    let (from, ..) = pending.wants_backlog().expect("the earlier one is still there");
    assert_eq!(from, at(3));
}

/// A group that writes these paths, after these operations.
fn group(sequence: u64, paths: &[&str], predecessors: &[u64]) -> Entry {
    let at = |&sequence: &u64| Position {
        incarnation: 1,
        sequence,
    };
    Entry {
        every: true,
        group: Some(Arc::new(GroupOrder {
            paths: paths.iter().map(|&path| path.to_owned()).collect(),
            predecessors: predecessors.iter().map(at).collect(),
        })),
        ..entry(sequence, "")
    }
}

#[test]
fn nothing_is_conflated_into_a_group_or_across_it() {
    let mut pending = Pending::new(100_000, true);
    pending.push(entry(1, "m/a"), false);
    pending.push(group(2, &["m/a", "m/b"], &[]), false);
    assert!(pending.push(entry(3, "m/a"), true).is_none());
    let replaced = pending.push(entry(4, "m/a"), true).expect("after the group");
    assert_eq!(replaced.position.sequence, 3);
    assert_eq!(sequences(&pending.take_bulk(BATCH_OPS_MAX).expect("wait")), [1, 2, 4]);
}

#[test]
fn a_critical_operation_takes_along_a_group_and_all_that_comes_before_that() {
    let mut pending = Pending::new(100, true);
    pending.push(every(1, None), false);
    pending.push(every(2, None), false);
    pending.push(group(3, &["m/a", "m/b"], &[1, 2]), false);
    let mut last = every(4, Some(3));
    last.critical = true;
    pending.push(last, false);
    assert_eq!(sequences(&pending.take_critical().expect("waits")), [1, 2, 3, 4]);
}

#[test]
fn all_that_waits_for_a_group_is_tried_again_when_it_is_settled() {
    let mut pending = Pending::new(100, true);
    let now = Instant::now();
    pending.push(group(1, &["m/a", "m/b"], &[]), false);
    pending.push(every(2, Some(1)), false);
    pending.push(every(3, Some(1)), false);
    let flight = pending.take_bulk(10).expect("three wait");
    for (position, _) in &flight.operations[1..] {
        pending.not_yet(*position, now, second);
    }
    assert!(pending.take_bulk(10).is_none());
    pending.remove(flight.operations[0].0);
    assert_eq!(sequences(&pending.take_bulk(10).expect("released")), [2, 3]);
}

#[test]
fn the_members_of_groups_count_in_a_message() {
    let mut pending = Pending::new(100, true);
    let paths: Vec<String> = (0..64).map(|n| format!("m/{n}")).collect();
    let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
    for sequence in 1..=10 {
        pending.push(group(sequence, &paths, &[]), false);
    }
    assert_eq!(sequences(&pending.take_bulk(BATCH_OPS_MAX).expect("wait")).len(), 8);
}

#[test]
fn told_of_too_many_gaps_the_oldest_go_alone_until_the_disk_has_caught_up() {
    let mut pending = Pending::new(100, false);
    let now = Instant::now();
    // Memory is full of the newest; the rest is on disk alone.
    for sequence in 1..=1000 {
        pending.push(entry(sequence, &format!("m/{sequence}")), false);
    }
    let live = pending.take_bulk(50).expect("the live go first");
    assert_eq!(sequences(&live).first(), Some(&901));
    pending.put_back(&live, now, second);
    assert!(pending.close_gaps());
    assert!(!pending.close_gaps(), "told once");
    assert!(
        pending.take_bulk(50).is_none(),
        "all in memory is newer than what is on disk"
    );
    let mut next_sent = 1;
    while next_sent <= 1000 {
        while let Some((from, to, room)) = pending.wants_backlog() {
            let upto = to.sequence.min(from.sequence + room as u64 - 1);
            let page = (from.sequence..=upto).map(|sequence| entry(sequence, &format!("m/{sequence}")));
            let next = (upto < to.sequence).then(|| entry(upto + 1, "m").position);
            pending.take_back(from, page.collect(), next);
        }
        let flight = pending.take_bulk(50).expect("the oldest are here");
        for sequence in sequences(&flight) {
            assert_eq!(sequence, next_sent, "nothing older was left behind");
            next_sent += 1;
            pending.remove(entry(sequence, "m").position);
        }
        pending.decided();
    }
    assert!(pending.is_drained());
    assert!(!pending.is_closing_gaps(), "the next goes as it would have");
}

/// As an agent has them that came up again and again while its hub was away.
#[test]
fn a_message_is_of_a_bounded_number_of_incarnations() {
    let most = BATCH_INCARNATIONS_MAX as u64;
    let of = |incarnation, critical| Entry {
        position: Position {
            incarnation,
            sequence: 1,
        },
        critical,
        ..entry(1, &format!("m/{incarnation}"))
    };
    for critical in [false, true] {
        let mut pending = Pending::new(1000, true);
        for incarnation in 1..=2 * most + 1 {
            pending.push(of(incarnation, critical), false);
            pending.withdraw(SequenceRange {
                incarnation,
                first: 7,
                last: 9,
            });
        }
        let mut taken = Vec::new();
        while let Some(flight) = if critical {
            pending.take_critical()
        } else {
            pending.take_bulk(BATCH_OPS_MAX)
        } {
            pending.withdrawn_told(&flight.withdrawn);
            taken.push((flight.operations.len() as u64, flight.withdrawn.len() as u64));
        }
        let told = |ranges| if critical { 0 } else { ranges };
        assert_eq!(taken, [(most, told(most)), (most, told(most)), (1, told(1))]);
    }
    // What has to come with more of them than that, in one message, goes by the other lane.
    let mut pending = Pending::new(1000, true);
    for incarnation in 1..=most + 1 {
        let predecessor = (incarnation > 1).then(|| Position {
            incarnation: incarnation - 1,
            sequence: 1,
        });
        pending.push(
            Entry {
                every: true,
                predecessor,
                ..of(incarnation, incarnation > most)
            },
            false,
        );
    }
    assert!(pending.take_critical().is_none());
    assert_eq!(
        pending.take_bulk(BATCH_OPS_MAX).expect("waits").operations.len() as u64,
        most
    );
}
