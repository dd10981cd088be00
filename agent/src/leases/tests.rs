use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn heard(map: &str, tenure: u64) -> Heard {
    Heard {
        map: map.to_owned(),
        tenure,
        at_risk_in: SECOND * 40,
        left: SECOND * 60,
        stream_head: 0,
        successor: None,
    }
}

fn told(events: &Events) -> Vec<String> {
    let mut told = Vec::new();
    while let Some(event) = events.next(|_| true) {
        told.push(match event {
            AgentEvent::LeaseGranted { map } => format!("granted {map}"),
            AgentEvent::LeaseExpiring { map } => format!("expiring {map}"),
            AgentEvent::LeaseLost { map } => format!("lost {map}"),
            AgentEvent::LeaseHandingOver { map, successor } => format!("handing over {map} to {successor}"),
            other => panic!("{other:?}"),
        });
    }
    told.sort();
    told
}

#[test]
fn a_lease_is_granted_put_at_risk_renewed_and_lost_and_each_is_told_once() {
    let events = Arc::new(Events::new());
    let leases = Leases::new(None, events.clone());
    assert_eq!(leases.state("prontera"), LeaseState::None);
    let now = Instant::now();
    assert!(
        leases.heard_by(true, vec![heard("prontera", 3), heard("geffen", 1)], now, |tenures| {
            assert_eq!(tenures.get("prontera"), Some(&3));
            assert!(told(&events).is_empty(), "operations carry it before it is told");
        })
    );
    assert_eq!(leases.state("prontera"), LeaseState::Held);
    assert_eq!(told(&events), ["granted geffen", "granted prontera"]);
    assert!(!leases.heard(true, vec![heard("prontera", 3), heard("geffen", 1)], now));
    assert!(told(&events).is_empty(), "it goes on as it was");

    assert_eq!(leases.tell_due(now + SECOND * 39), Some(now + SECOND * 40));
    assert_eq!(leases.tell_due(now + SECOND * 40), None);
    leases.tell_due(now + SECOND * 41);
    assert_eq!(told(&events), ["expiring geffen", "expiring prontera"]);
    assert!(!leases.heard(true, vec![heard("prontera", 3), heard("geffen", 1)], now));
    assert_eq!(told(&events), ["granted geffen", "granted prontera"]);

    assert!(
        !leases.heard(true, vec![heard("geffen", 1)], now),
        "its tenure is carried on"
    );
    assert_eq!(told(&events), ["lost prontera"]);
    assert_eq!(leases.state("prontera"), LeaseState::Lost);
    assert_eq!(leases.tenures().get("prontera"), Some(&3));
    assert!(leases.heard(true, vec![heard("prontera", 5), heard("geffen", 2)], now));
    assert_eq!(
        told(&events),
        ["granted geffen", "granted prontera"],
        "also one that was away in between"
    );
}

#[test]
fn past_its_end_a_lease_is_lost_until_it_is_renewed_and_only_the_hub_tells_so() {
    let events = Arc::new(Events::new());
    let leases = Leases::new(None, events.clone());
    let past = Instant::now()
        .checked_sub(SECOND * 60)
        .expect("the machine runs for a minute");
    leases.heard(true, vec![heard("prontera", 1)], past);
    assert_eq!(leases.state("prontera"), LeaseState::Lost);
    leases.heard(true, vec![heard("prontera", 1)], past + SECOND * 15);
    assert_eq!(leases.state("prontera"), LeaseState::Expiring);
    leases.heard(true, vec![heard("prontera", 1)], Instant::now());
    assert_eq!(leases.state("prontera"), LeaseState::Held);
    assert_eq!(told(&events), ["granted prontera"]);
}

#[test]
fn the_next_start_knows_tenures_and_whether_leases_govern_but_holds_nothing() {
    let events = Arc::new(Events::new());
    let leases = Leases::new(None, events.clone());
    leases.heard(true, vec![heard("prontera", 7)], Instant::now());
    let next = Leases::new(Some(leases.to_keep()), events.clone());
    assert_eq!(next.tenures().get("prontera"), Some(&7));
    assert_eq!(
        (next.state("prontera"), next.state("geffen")),
        (LeaseState::Lost, LeaseState::None)
    );
    assert_eq!(next.status().0, None, "the hub has not said so yet");
    told(&events);
    assert!(!next.heard(true, vec![heard("prontera", 7)], Instant::now()));
    assert_eq!(told(&events), ["granted prontera"]);

    next.heard(false, vec![], Instant::now());
    assert_eq!(next.state("geffen"), LeaseState::NotGoverned);
    assert!(next.tenures().is_empty());
    let ungoverned = Leases::new(Some(next.to_keep()), events);
    assert_eq!(ungoverned.state("prontera"), LeaseState::NotGoverned);
}

#[test]
fn a_map_that_is_handed_over_is_not_written_any_more_until_it_is_lost_or_stays_after_all() {
    let events = Arc::new(Events::new());
    let leases = Leases::new(None, events.clone());
    let now = Instant::now();
    let asked = |to: u128| Heard {
        successor: Some(Uuid::from_u128(to)),
        ..heard("prontera", 3)
    };
    leases.heard(true, vec![heard("prontera", 3)], now);
    assert_eq!(told(&events), ["granted prontera"]);
    leases.heard(true, vec![asked(7)], now);
    assert_eq!(leases.state("prontera"), LeaseState::HandingOver);
    let to = Uuid::from_u128(7);
    assert_eq!(told(&events), [format!("handing over prontera to {to}")]);
    assert_eq!(leases.status().1[0].successor, Some(to));
    leases.heard(true, vec![asked(7)], now);
    assert!(told(&events).is_empty(), "once");
    assert_eq!(leases.tell_due(now + SECOND * 41), None, "it ends anyway");
    assert!(told(&events).is_empty());
    leases.heard(true, vec![heard("prontera", 3)], now);
    assert_eq!(leases.state("prontera"), LeaseState::Held, "the hub wants it no more");
    assert_eq!(told(&events), ["granted prontera"]);

    leases.heard(true, vec![asked(7)], now);
    leases.handed_over("prontera", 2);
    assert_eq!(leases.state("prontera"), LeaseState::HandingOver, "of another tenure");
    leases.handed_over("prontera", 3);
    assert_eq!(leases.state("prontera"), LeaseState::Lost);
    assert_eq!(told(&events), ["lost prontera"]);
    assert_eq!(leases.tenures().get("prontera"), Some(&3), "what comes late carries it");
    leases.heard(true, vec![], now);
    assert!(told(&events).is_empty());
}

#[test]
fn a_map_that_the_program_gives_up_stays_given_up_whatever_the_hub_says_meanwhile() {
    let events = Arc::new(Events::new());
    let leases = Leases::new(None, events.clone());
    let now = Instant::now();
    assert_eq!(leases.give_up("prontera"), None);
    leases.heard(true, vec![heard("prontera", 3)], now);
    told(&events);
    assert_eq!(leases.give_up("prontera"), Some(3));
    let nobody = Uuid::nil();
    assert_eq!(told(&events), [format!("handing over prontera to {nobody}")]);
    leases.heard(true, vec![heard("prontera", 3)], now);
    assert_eq!(leases.state("prontera"), LeaseState::HandingOver);
    assert!(told(&events).is_empty());
    leases.keep("prontera", 3);
    assert_eq!(leases.state("prontera"), LeaseState::Held, "the hub refused it");
    assert_eq!(told(&events), ["granted prontera"]);
}

#[test]
fn what_the_hub_tells_between_renewals_is_taken_where_no_renewal_can_have_overtaken_it() {
    let events = Arc::new(Events::new());
    let leases = Leases::new(None, events.clone());
    let now = Instant::now();
    let none = |_: HashMap<Box<str>, u64>| panic!("no tenure changes");
    assert!(
        !leases.noticed(vec![heard("prontera", 3)], now, none),
        "before the first renewal"
    );
    leases.heard(true, vec![heard("geffen", 2)], now);
    told(&events);
    let stamped = |tenures: HashMap<Box<str>, u64>| assert_eq!(tenures.get("prontera"), Some(&3));
    assert!(leases.noticed(vec![heard("prontera", 3)], now, stamped));
    assert_eq!(told(&events), ["granted prontera"], "and geffen is not lost by it");
    leases.heard(true, vec![], now);
    assert_eq!(told(&events), ["lost geffen", "lost prontera"]);
    assert!(!leases.noticed(vec![heard("prontera", 3), heard("geffen", 1)], now, none));
    assert_eq!(leases.state("prontera"), LeaseState::Lost, "what was told late is old");
    assert!(told(&events).is_empty());
}

#[test]
fn a_grant_waits_for_the_copy_of_the_map_and_no_longer_than_a_second() {
    let events = Arc::new(Events::new());
    let leases = Leases::new(None, events.clone());
    let now = Instant::now();
    let written = |map: &str| Heard {
        stream_head: 100,
        ..heard(map, 3)
    };
    for map in ["prontera", "geffen", "payon"] {
        leases.copied(map, Some(90));
    }
    leases.copied("payon", Some(100));
    let makes = |tenures: HashMap<Box<str>, u64>| assert_eq!(tenures.len(), 4, "they are carried at once");
    let all = ["prontera", "geffen", "payon", "alberta"].map(written);
    leases.heard_by(true, all.into(), now, makes);
    assert_eq!(
        told(&events),
        ["granted alberta", "granted payon"],
        "no copy, and one that is there"
    );
    assert_eq!(leases.state("prontera"), LeaseState::None);
    leases.copied("prontera", Some(99));
    assert!(told(&events).is_empty());
    leases.copied("prontera", Some(100));
    assert_eq!(told(&events), ["granted prontera"]);
    assert_eq!(leases.state("prontera"), LeaseState::Held);

    assert_eq!(leases.tell_due(now + SECOND / 2), Some(now + SECOND));
    assert!(told(&events).is_empty());
    leases.tell_due(now + SECOND);
    assert_eq!(told(&events), ["granted geffen"]);
    assert_eq!(leases.state("geffen"), LeaseState::Held);
    leases.copied("geffen", Some(120));
    leases.heard(true, vec![written("geffen"), written("prontera")], now);
    assert_eq!(told(&events), ["lost alberta", "lost payon"]);
}

#[test]
fn an_attached_program_is_told_of_a_hand_over_as_the_agent_is() {
    let events = Arc::new(Events::new());
    let here = Leases::new(None, Arc::new(Events::new()));
    let there = Leases::new(None, events.clone());
    let now = Instant::now();
    let pass_on = |leases: Vec<Heard>| {
        here.heard(true, leases, now);
        there.heard(true, heard_from(&here.status().1), now);
        (there.state("prontera"), told(&events))
    };
    assert_eq!(pass_on(vec![heard("prontera", 3)]).0, LeaseState::Held);
    let to = Uuid::from_u128(9);
    let asked = Heard {
        successor: Some(to),
        ..heard("prontera", 3)
    };
    let (state, events) = pass_on(vec![asked]);
    assert_eq!(state, LeaseState::HandingOver);
    assert_eq!(events, [format!("handing over prontera to {to}")]);
    assert_eq!(pass_on(vec![]), (LeaseState::Lost, vec!["lost prontera".to_owned()]));
}

#[test]
fn a_hand_over_is_of_the_tenure_that_the_hub_names() {
    let lease = |tenure| v1::Lease {
        map: "prontera".to_owned(),
        tenure,
        expires_in_ms: 60_000,
        stream_head: 12,
    };
    let to = Uuid::from_u128(5);
    let reply = |tenure| v1::RenewReply {
        lease_ms: 60_000,
        leases: vec![lease(tenure)],
        duties: vec![v1::Duty {
            map: "prontera".to_owned(),
            role: v1::duty::Role::HandOver.into(),
            host_id: to.as_bytes().to_vec().into(),
            tenure: 4,
            within_ms: 1000,
        }],
        ..Default::default()
    };
    let heard = heard_of(&reply(4));
    assert_eq!((heard[0].successor, heard[0].stream_head), (Some(to), 12));
    assert_eq!(heard_of(&reply(5))[0].successor, None);
}
