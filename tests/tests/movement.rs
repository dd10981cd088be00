//! How the movement of a recorded map server's players is judged: as it was, through bad lines, and forged.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use fastrand::Rng;
use p2p_sync_proto::{Path, Position, json, v1::SyncDataType};
use p2p_sync_proxy::{
    validate::types_file::Rules,
    verdicts::movement::{Finding, Moved, Movement, Pace},
};
use p2p_sync_tests::recording::recorded;
use uuid::Uuid;

const HOST: Uuid = Uuid::from_u128(1);
const PACE: Pace = Pace {
    ms_per_cell: 150,
    ms_per_cell_min: 20,
};
/// Of the operations of honest hosts at most one in so many may be flagged.
const FLAGGED_AT_MOST_ONE_IN: usize = 1000;
/// Of a forging character's operations one is found among so many.
const FOUND_WITHIN: usize = 100;

/// An operation of the recording that says where a character is.
#[derive(Clone)]
struct Op {
    at_ms: u64,
    sequence: u64,
    path: Path,
    data_type: SyncDataType,
    character: u64,
    map: String,
    payload: String,
}

fn ops() -> Vec<Op> {
    let rules = Rules::builtin();
    let of = |(sequence, happening): (u64, p2p_sync_tests::recording::Happening)| {
        let path = Path::parse(&happening.path()?).ok()?;
        let payload = happening.payload?;
        let (character, _) = rules.step(&path.parts(), None)?;
        Some(Op {
            at_ms: happening.at_ms,
            sequence,
            path,
            data_type: happening.data_type,
            character,
            map: happening.map,
            payload,
        })
    };
    let ops: Vec<Op> = (1..).zip(recorded()).filter_map(of).collect();
    assert!(ops.len() > 38_000, "{}", ops.len());
    ops
}

/// A hub that scores what it receives.
struct Hub {
    rules: Rules,
    movement: Movement,
    began: Instant,
}

impl Hub {
    fn new() -> Self {
        Self {
            rules: Rules::builtin(),
            movement: Movement::new(PACE),
            began: Instant::now(),
        }
    }

    fn receive(&mut self, op: &Op, received_ms: u64) -> Option<Finding> {
        let facts = json::check(&op.payload).expect("JSON");
        let (character, step) = self.rules.step(&op.path.parts(), Some(&facts))?;
        let moved = Moved {
            host_id: HOST,
            character,
            map: &op.map,
            version: Position {
                incarnation: 1,
                sequence: op.sequence,
            },
            step,
        };
        self.movement
            .score(&moved, self.began + Duration::from_millis(received_ms))
    }
}

/// What a line does to operations: when each is received, in that order.
fn received(ops: &[Op], rng: &mut Rng, hub_restarts: bool) -> Vec<(u64, Op)> {
    // Messages of up to 20 ms; some are tried again and come up to 3 s late, overtaken by others.
    let mut received = Vec::new();
    let mut sent_ms = 0;
    let mut delay_ms = 0;
    for op in ops {
        if op.at_ms >= sent_ms {
            sent_ms = op.at_ms + rng.u64(1..20);
            delay_ms = if rng.u8(..) < 3 {
                rng.u64(500..3000)
            } else {
                rng.u64(1..60)
            };
        }
        received.push((sent_ms + delay_ms, op.clone()));
    }
    // Outages: nothing is received, and then all at once, of each character all that it did or the newest alone.
    for outage in [15_000, 40_000, 65_000] {
        let began = outage + rng.u64(..5000);
        let until = began + rng.u64(8000..20_000);
        // What waits is conflated by the agent; at worst all of it is in flight already.
        let conflates = rng.bool() || hub_restarts;
        let held = received.iter().filter(|(at, _)| (began..until).contains(at));
        let newest: HashMap<u64, u64> = held
            .filter(|(_, op)| op.data_type == SyncDataType::PlayerPosition)
            .map(|(_, op)| (op.character, op.sequence))
            .fold(HashMap::new(), |mut newest, (character, sequence)| {
                let known = newest.entry(character).or_default();
                *known = sequence.max(*known);
                newest
            });
        let kept: Vec<(u64, Op)> = received
            .iter()
            .filter(|(at, op)| {
                let is_held = (began..until).contains(at) && op.data_type == SyncDataType::PlayerPosition;
                !(is_held && conflates) || newest[&op.character] == op.sequence
            })
            .map(|(at, op)| {
                let at = if (began..until).contains(at) { until } else { *at };
                (at, op.clone())
            })
            .collect();
        received = kept;
    }
    received.sort_by_key(|(at, op)| (*at, op.sequence));
    received
}

#[test]
fn honest_players_are_not_refused_and_at_most_one_operation_in_a_thousand_is_flagged() {
    let ops = ops();
    let rules = Rules::builtin();
    for happening in recorded() {
        let checked = happening
            .payload
            .as_deref()
            .map_or(Ok(()), |payload| rules.of(happening.data_type).check(payload));
        assert_eq!(checked, Ok(()), "{happening:?}");
    }

    let mut plain = Hub::new();
    let flagged = ops.iter().filter(|op| plain.receive(op, op.at_ms).is_some()).count();
    println!("at its own speed: {flagged} of {} flagged", ops.len());
    assert_eq!(flagged, 0);

    let (mut all, mut flagged) = (0, 0);
    for seed in 0..6 {
        let mut rng = Rng::with_seed(seed);
        let mut hub = Hub::new();
        // Every other time the hub is started anew during the second outage, and remembers nothing.
        let mut restarts = seed % 2 == 1;
        let mut last_ms = 0;
        let mut found = 0;
        let received = received(&ops, &mut rng, restarts);
        for (at_ms, op) in &received {
            if restarts && *at_ms > 40_000 && at_ms - last_ms > 900 {
                (hub, restarts) = (Hub::new(), false);
            }
            last_ms = *at_ms;
            found += usize::from(hub.receive(op, *at_ms).is_some());
        }
        println!("seed {seed}: {found} of {} flagged", received.len());
        all += received.len();
        flagged += found;
    }
    assert!(
        flagged * FLAGGED_AT_MOST_ONE_IN <= all,
        "{flagged} of {all} flagged, of honest hosts"
    );
}

/// How many of a character's operations, from `from_ms` on as `forge` makes them, are received until one is found.
fn found_after(from_ms: u64, character: u64, forge: impl Fn(u64, &Op) -> (u64, Op)) -> usize {
    let mut hub = Hub::new();
    let mut received: Vec<(u64, bool, Op)> = Vec::new();
    let mut forged = 0;
    for op in ops() {
        let is_forged = op.character == character && op.at_ms >= from_ms;
        let (at_ms, op) = if is_forged {
            forged += 1;
            forge(forged, &op)
        } else {
            (op.at_ms, op)
        };
        received.push((at_ms, is_forged, op));
    }
    received.sort_by_key(|(at_ms, _, op)| (*at_ms, op.sequence));
    let mut count = 0;
    for (at_ms, is_forged, op) in received {
        count += usize::from(is_forged);
        let found = hub.receive(&op, at_ms);
        assert!(
            found.is_none() || is_forged,
            "an honest character is flagged: {found:?}"
        );
        if found.is_some() {
            return count;
        }
    }
    panic!("{count} forged operations were not found")
}

/// The same operation somewhere else.
fn at(op: &Op, cell: (u64, u64), event: &str) -> Op {
    let mut data: serde_json::Value = serde_json::from_str(&op.payload).expect("JSON");
    (data["x"], data["y"], data["event"]) = (cell.0.into(), cell.1.into(), event.into());
    Op {
        payload: data.to_string(),
        ..op.clone()
    }
}

#[test]
fn a_teleporting_character_is_found_within_a_hundred_of_its_operations() {
    for from_ms in [0, 30_000] {
        for event in ["move", "setpos"] {
            let found = found_after(from_ms, 150_007, |n, op| {
                (op.at_ms, at(op, (n * 97 % 400, n * 61 % 400), event))
            });
            println!("teleporting by {event} from {from_ms} ms: found after {found}");
            assert!(found <= FOUND_WITHIN, "{found}");
        }
    }
}

#[test]
fn a_speeding_character_is_found_within_a_hundred_of_its_operations() {
    // Three cells in the time of one; and one cell each in a third and in half of the time.
    let found = found_after(0, 150_007, |n, op| (op.at_ms, at(op, (3 * n % 400, 10), "move")));
    println!("three cells for one: found after {found}");
    assert!(found <= FOUND_WITHIN, "{found}");
    for divisor in [2, 3] {
        let found = found_after(0, 150_007, |n, op| {
            (30_000 + n * 150 / divisor, at(op, (n % 400, 10), "move"))
        });
        println!("{divisor} times the speed: found after {found}");
        assert!(found <= FOUND_WITHIN, "{found}");
    }
}
