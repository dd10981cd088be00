use super::*;
use p2p_sync_proto::json;

const HOST: Uuid = Uuid::from_u128(1);
const PACE: Pace = Pace {
    ms_per_cell: 150,
    ms_per_cell_min: 20,
};

/// One character on a line, step by step.
struct Walk {
    movement: Movement,
    began: Instant,
    sequence: u64,
}

impl Walk {
    fn new() -> Self {
        Self {
            movement: Movement::new(PACE),
            began: Instant::now(),
            sequence: 0,
        }
    }

    fn payload(&mut self, at_ms: u64, map: &str, payload: &str) -> Option<Finding> {
        self.sequence += 1;
        self.at(self.sequence, at_ms, map, payload)
    }

    fn at(&mut self, sequence: u64, at_ms: u64, map: &str, payload: &str) -> Option<Finding> {
        let step = Step::read(&json::check(payload).expect("JSON"));
        let version = Position {
            incarnation: 1,
            sequence,
        };
        let moved = Moved {
            host_id: HOST,
            character: 7,
            map,
            version,
            step,
        };
        self.movement.score(&moved, self.began + Duration::from_millis(at_ms))
    }

    fn to(&mut self, at_ms: u64, x: u64) -> Option<Finding> {
        self.payload(at_ms, "prontera", &format!("{{\"event\":\"move\",\"x\":{x},\"y\":5}}"))
    }
}

#[test]
fn walking_is_not_found_however_long_and_running_is() {
    let mut walk = Walk::new();
    for n in 0..900 {
        assert_eq!(walk.to(n * 150, n), None, "{n}");
    }
    let mut run = Walk::new();
    let found = (0..900).find_map(|n| Some((n, run.to(n * 75, n)?)));
    let (n, finding) = found.expect("at twice the speed");
    assert!(n < 100 && finding.rule == Rule::Speed, "{n} {finding:?}");
    assert_eq!(finding.details()["to"], json!({"map": "prontera", "cell": [n, 5]}));
}

#[test]
fn the_speed_that_is_told_counts_down_to_the_floor() {
    let run = |speed: u64, ms: u64| {
        let mut walk = Walk::new();
        (0..1000).find_map(|n| {
            let payload = format!("{{\"x\":{},\"y\":5,\"speed\":{speed}}}", n % 1000);
            walk.payload(n * ms, "prontera", &payload)
        })
    };
    assert_eq!(run(75, 75), None);
    assert!(run(75, 40).is_some());
    assert_eq!(run(1, 20), None, "the floor");
    assert!(run(1, 10).is_some(), "below the floor");
}

#[test]
fn a_jump_is_found_and_told_once_a_minute() {
    let mut walk = Walk::new();
    for n in 0..100 {
        walk.to(n * 150, n);
    }
    let first = walk.to(15_000, 400).expect("300 cells at once");
    assert!(first.rule == Rule::Teleport && !first.is_repeated, "{first:?}");
    assert!(first.score_ms > 30_000, "{first:?}");
    assert!(walk.to(15_150, 100).expect("and back").is_repeated);
    assert_eq!(walk.to(15_300, 101), None, "what follows is judged by itself");
    for n in 102..600 {
        walk.to(15_300 + (n - 101) * 150, n);
    }
    let later = walk.to(90_000, 1).expect("again");
    assert_eq!((later.is_repeated, later.unreported), (false, 1));
}

#[test]
fn warps_that_are_told_pass_and_too_many_do_not() {
    let warp = |walk: &mut Walk, at_ms, x: u64| {
        walk.payload(
            at_ms,
            "prontera",
            &format!("{{\"event\":\"setpos\",\"x\":{x},\"y\":5}}"),
        )
    };
    let mut walk = Walk::new();
    for n in 0..300 {
        assert_eq!(warp(&mut walk, n * 500, n % 2 * 900), None, "two a second");
    }
    let found = (0..100).find_map(|n| warp(&mut walk, 150_000 + n * 150, n % 2 * 900));
    assert_eq!(found.expect("seven a second").rule, Rule::Warps);
    let mut maps = Walk::new();
    let found = (0..100).find_map(|n| {
        let map = ["prontera", "geffen"][n % 2];
        maps.payload(n as u64 * 150, map, r#"{"event":"move","x":5,"y":5}"#)
    });
    assert_eq!(found.expect("seven maps a second").rule, Rule::Warps);
}

#[test]
fn what_an_outage_held_back_passes_at_once_and_no_more_than_that() {
    let mut walk = Walk::new();
    for n in 0..100 {
        walk.to(n * 150, n);
    }
    for n in 100..500 {
        assert_eq!(walk.to(75_000, n), None, "a minute of walking, received at once: {n}");
    }
    let found = (500..600).find(|n| walk.to(75_000 + (n - 500), *n).is_some());
    assert!(found.is_some(), "more than a minute of it");
}

#[test]
fn one_position_of_many_passes_after_an_outage_that_the_hub_does_not_know_of() {
    let mut walk = Walk::new();
    assert_eq!(walk.to(0, 10), None);
    assert_eq!(
        walk.to(5, 300),
        None,
        "what was in flight, and the newest of what waited"
    );
    assert_eq!(walk.to(150, 301), None);
    let jumps = (0..100).position(|n| walk.to(300 + n * 150, n % 2 * 300).is_some());
    assert_eq!(jumps, Some(usize::from(FIRST_JUMPS_MAX) - 1), "no more of them");
}

#[test]
fn a_position_without_a_place_hides_no_jump() {
    let mut walk = Walk::new();
    for n in 0..100 {
        walk.to(n * 150, n);
    }
    assert_eq!(walk.payload(15_000, "prontera", r#"{"event":"hp","hp":5}"#), None);
    assert_eq!(walk.to(15_150, 400).expect("300 cells").rule, Rule::Teleport);
}

#[test]
fn what_was_overtaken_says_nothing() {
    let mut walk = Walk::new();
    walk.to(0, 10);
    for n in 0..100 {
        assert_eq!(
            walk.at(
                100 + 2 * n,
                1000 + n * 150,
                "prontera",
                &format!("{{\"x\":{},\"y\":5}}", 12 + n)
            ),
            None
        );
        assert_eq!(walk.at(2 + n, 1000 + n * 150, "prontera", r#"{"x":900,"y":900}"#), None);
    }
}

#[test]
fn no_more_characters_are_remembered_than_the_bound() {
    let mut movement = Movement::new(PACE);
    let now = Instant::now();
    let step = Step::read(&json::check(r#"{"x":1,"y":1}"#).expect("JSON"));
    for host in 0..300 {
        for character in 0..1100 {
            let version = Position {
                incarnation: 1,
                sequence: 1,
            };
            let host_id = Uuid::from_u128(host);
            let moved = Moved {
                host_id,
                character,
                map: "prontera",
                version,
                step,
            };
            movement.score(&moved, now);
        }
    }
    let counted: usize = movement.hosts.iter().map(|(_, host)| host.characters.len()).sum();
    assert_eq!((movement.characters, movement.hosts.len()), (counted, 128));
    assert_eq!(counted, CHARACTERS_MAX);
}
