use super::*;
use crate::hosts::score::{Weights, Word};

const LEASE: Duration = Duration::from_mins(1);
const LONG: Duration = Duration::from_hours(1);

fn settings() -> Settings {
    Settings {
        weights: Weights::default(),
        maps_max: 10,
        migration_margin: 20.0,
        migration_min: Duration::from_mins(2),
        catch_up: Duration::from_secs(30),
        handover: Duration::from_secs(10),
        lease: LEASE,
    }
}

fn id(number: u128) -> Uuid {
    Uuid::from_u128(number)
}

/// A host that was heard a moment ago, with so much of its processor in use.
fn host(number: u128, cpu_percent: f64) -> HostFacts {
    HostFacts {
        host_id: id(number),
        role: HostRole::Host,
        is_attending: true,
        keeps_no_copies: false,
        facts: Facts {
            word: Word {
                cpu_percent: Some(cpu_percent),
                ..Word::default()
            },
            uptime: LONG,
            silence: Duration::from_secs(5),
            ..Facts::default()
        },
    }
}

fn fallback(number: u128) -> HostFacts {
    HostFacts {
        role: HostRole::Hub,
        ..host(number, 0.0)
    }
}

fn silent(host: &HostFacts, silence: Duration) -> HostFacts {
    let facts = Facts { silence, ..host.facts };
    HostFacts { facts, ..host.clone() }
}

fn automatic() -> Rule {
    Rule {
        automatic: true,
        ..Rule::default()
    }
}

/// Held by a host for a long time.
fn held(map: &str, holder: u128) -> MapFacts {
    MapFacts {
        map: map.to_owned(),
        rule: Some(automatic()),
        holder: Some(id(holder)),
        tenure: 3,
        lease_left: LEASE,
        held_for: LONG,
        head: 1000,
        ..MapFacts::default()
    }
}

fn run_out(map: MapFacts) -> MapFacts {
    MapFacts {
        lease_left: Duration::ZERO,
        ..map
    }
}

fn steps(maps: &[MapFacts], hosts: &[HostFacts]) -> Vec<Step> {
    let world = World {
        maps: maps.to_vec(),
        hosts: hosts.to_vec(),
    };
    decide(&world, &settings(), true)
}

fn grant(map: &str, to: u128) -> Step {
    let (map, to) = (map.to_owned(), id(to));
    Step::Grant { map, to }
}

fn moved(map: &str, to: u128) -> Step {
    let (map, to) = (map.to_owned(), id(to));
    Step::Move { map, to }
}

#[test]
fn a_map_whose_lease_has_run_out_goes_to_the_best_backup_then_to_the_best_host_then_to_the_hubs_own() {
    let dead = || silent(&host(1, 0.0), LONG);
    let all = [dead(), host(2, 90.0), host(3, 60.0), host(4, 0.0), fallback(9)];
    let backups = MapFacts {
        backups: vec![id(2), id(3)],
        ..run_out(held("prontera", 1))
    };
    assert_eq!(steps(std::slice::from_ref(&backups), &all), [grant("prontera", 3)]);
    // The worse backup has the copy.
    let copied = MapFacts {
        copies: HashMap::from([(id(2), 1000), (id(3), 10), (id(4), 1000)]),
        ..backups
    };
    assert_eq!(steps(&[copied], &all), [grant("prontera", 2)]);
    let map = run_out(held("prontera", 1));
    assert_eq!(steps(std::slice::from_ref(&map), &all), [grant("prontera", 4)]);
    assert_eq!(
        steps(std::slice::from_ref(&map), &[dead(), fallback(9)]),
        [grant("prontera", 9)]
    );
    assert_eq!(steps(&[map], &[dead()]), []);
}

#[test]
fn nothing_is_given_that_is_held_or_has_no_rule_that_says_so() {
    let all = [host(1, 0.0), host(2, 0.0), fallback(9)];
    for rule in [None, Some(Rule::default())] {
        let map = MapFacts {
            rule,
            ..run_out(held("prontera", 7))
        };
        assert_eq!(steps(&[map], &all), []);
    }
    assert_eq!(steps(&[held("prontera", 1)], &all), []);
}

#[test]
fn who_is_silent_leaves_does_not_attend_scores_too_little_or_is_not_named_gets_nothing() {
    let rule = Rule {
        hosts: vec![id(2), id(3), id(4)],
        score_min: 40.0,
        ..automatic()
    };
    let map = MapFacts {
        rule: Some(rule),
        holder: None,
        ..held("prontera", 1)
    };
    let weak = HostFacts {
        facts: Facts {
            lapses: 50,
            ..host(4, 100.0).facts
        },
        ..host(4, 100.0)
    };
    let away = HostFacts {
        is_attending: false,
        ..host(3, 0.0)
    };
    let silent = silent(&host(2, 0.0), settings().silent_after() + Duration::from_millis(1));
    let unfit = [host(1, 0.0), silent, away, weak];
    assert_eq!(steps(std::slice::from_ref(&map), &unfit), []);
    let one_fits = [unfit.as_slice(), &[host(2, 50.0)]].concat();
    assert_eq!(steps(&[map], &one_fits[1..]), [grant("prontera", 2)]);
}

#[test]
fn no_host_gets_more_maps_than_it_wants_or_than_the_bound_and_they_are_shared_out() {
    let free: Vec<MapFacts> = (0..30)
        .map(|number| MapFacts {
            holder: None,
            ..held(&format!("map{number:02}"), 0)
        })
        .collect();
    let modest = HostFacts {
        facts: Facts {
            word: Word {
                maps_max: Some(2),
                ..host(1, 0.0).facts.word
            },
            ..host(1, 0.0).facts
        },
        ..host(1, 0.0)
    };
    let told = steps(&free, &[modest, host(2, 0.0), host(3, 0.0)]);
    let of = |number| {
        told.iter()
            .filter(|step| matches!(step, Step::Grant { to, .. } if *to == id(number)))
            .count()
    };
    assert_eq!([of(1), of(2), of(3)], [2, 10, 10], "and the rest waits");
    let few = steps(&free[..6], &[host(2, 0.0), host(3, 0.0)]);
    let of = |number| {
        few.iter()
            .filter(|step| matches!(step, Step::Grant { to, .. } if *to == id(number)))
            .count()
    };
    assert_eq!([of(2), of(3)], [3, 3]);
}

#[test]
fn a_map_is_moved_only_by_the_margin_and_not_again_within_the_time() {
    let (worse, better) = (host(1, 90.0), host(2, 0.0));
    // The processor is 20 of 100: not quite the margin.
    assert_eq!(steps(&[held("prontera", 1)], &[worse.clone(), better.clone()]), []);
    let bad = HostFacts {
        facts: Facts {
            lapses: 3,
            ..worse.facts
        },
        ..worse
    };
    assert_eq!(
        steps(&[held("prontera", 1)], &[bad.clone(), better.clone()]),
        [moved("prontera", 2)]
    );
    let lately = MapFacts {
        held_for: Duration::from_mins(1),
        ..held("prontera", 1)
    };
    assert_eq!(steps(&[lately], &[bad.clone(), better.clone()]), []);
    let world = World {
        maps: vec![held("prontera", 1)],
        hosts: vec![bad.clone(), better.clone()],
    };
    assert_eq!(
        decide(&world, &settings(), false),
        [],
        "nor before the hosts have come back"
    );
    let on_its_way = MapFacts {
        handover: Some(Handover {
            successor: id(2),
            catch_up_left: LONG,
            left: None,
        }),
        backups: vec![id(2)],
        ..held("prontera", 1)
    };
    assert_eq!(steps(&[on_its_way], &[bad, better]), []);
}

#[test]
fn what_the_hubs_own_machine_holds_goes_back_when_a_host_fits() {
    let map = held("prontera", 9);
    assert_eq!(steps(std::slice::from_ref(&map), &[fallback(9)]), []);
    assert_eq!(
        steps(std::slice::from_ref(&map), &[fallback(9), host(1, 100.0)]),
        [moved("prontera", 1)]
    );
    // Unless it is named.
    let rule = Rule {
        hosts: vec![id(9), id(1)],
        ..automatic()
    };
    let named = MapFacts {
        rule: Some(rule),
        ..map
    };
    assert_eq!(steps(&[named], &[fallback(9), host(1, 100.0)]), []);
}

#[test]
fn few_maps_are_moved_at_one_time() {
    let maps: Vec<MapFacts> = (0..10).map(|number| held(&format!("map{number}"), 9)).collect();
    let told = steps(&maps, &[fallback(9), host(1, 0.0), host(2, 0.0)]);
    assert_eq!(told.len(), MOVES_MAX);
}

#[test]
fn a_hand_over_ends_by_the_successors_having_it_whatever_becomes_of_the_holder() {
    let handing = |left| MapFacts {
        rule: None,
        handover: Some(Handover {
            successor: id(2),
            catch_up_left: Duration::ZERO,
            left,
        }),
        backups: vec![id(2)],
        ..held("prontera", 1)
    };
    let (map, to) = ("prontera".to_owned(), id(2));
    let both = [host(1, 0.0), host(2, 0.0)];
    let step = |maps: MapFacts, hosts: &[HostFacts]| steps(&[maps], hosts);
    assert_eq!(step(handing(None), &both), [Step::Ask { map: map.clone(), to }]);
    assert_eq!(
        step(handing(Some(Duration::ZERO)), &both),
        [Step::Take { map: map.clone(), to }]
    );
    assert_eq!(step(handing(Some(LEASE)), &both), []);
    assert_eq!(step(run_out(handing(Some(LEASE))), &both), [grant("prontera", 2)]);
    let gone = [host(1, 0.0), silent(&host(2, 0.0), LONG)];
    assert_eq!(step(handing(Some(LEASE)), &gone)[0], Step::CallOff { map, to });
}

#[test]
fn backups_and_assistants_are_chosen_kept_while_they_are_there_and_replaced() {
    let rule = Rule {
        backups: 2,
        assistants: 1,
        ..automatic()
    };
    let map = |backups: &[u128], assistants: &[u128]| MapFacts {
        rule: Some(rule.clone()),
        backups: backups.iter().copied().map(id).collect(),
        assistants: assistants.iter().copied().map(id).collect(),
        ..held("prontera", 1)
    };
    let standby = |backups: &[u128], assistants: &[u128]| Step::Standby {
        map: "prontera".to_owned(),
        tenure: 3,
        backups: backups.iter().copied().map(id).collect(),
        assistants: assistants.iter().copied().map(id).collect(),
    };
    let all = [host(1, 0.0), host(2, 30.0), host(3, 20.0), host(4, 10.0), host(5, 0.0)];
    assert_eq!(steps(&[map(&[], &[])], &all), [standby(&[5, 4], &[3])]);
    assert_eq!(steps(&[map(&[2, 3], &[4])], &all), [], "a better one is no reason");
    let mut one_gone = all.clone();
    one_gone[2] = silent(&host(3, 20.0), settings().gone_after() + Duration::from_secs(1));
    assert_eq!(steps(&[map(&[2, 3], &[4])], &one_gone), [standby(&[2, 5], &[4])]);
    let world = World {
        maps: vec![map(&[2, 3], &[4])],
        hosts: one_gone.to_vec(),
    };
    assert_eq!(decide(&world, &settings(), false), [], "it may come back yet");
    let mut no_copies = all;
    no_copies[4].keeps_no_copies = true;
    assert_eq!(steps(&[map(&[], &[])], &no_copies), [standby(&[4, 3], &[5])]);
    // Without a rule nobody stands by.
    let ruleless = MapFacts {
        rule: None,
        ..map(&[2], &[4])
    };
    assert_eq!(steps(&[ruleless], &no_copies), [standby(&[], &[])]);
}

#[test]
fn the_next_thing_due_is_the_first_lease_or_hand_over_to_end() {
    let maps = |maps: &[MapFacts]| World {
        maps: maps.to_vec(),
        hosts: vec![],
    };
    assert_eq!(due(&maps(&[])), None);
    let later = held("prontera", 1);
    let sooner = MapFacts {
        lease_left: Duration::from_secs(3),
        ..held("geffen", 1)
    };
    assert_eq!(
        due(&maps(&[later.clone(), sooner.clone()])),
        Some(Duration::from_secs(3))
    );
    assert_eq!(due(&maps(&[run_out(later)])), None);
    let handing = MapFacts {
        handover: Some(Handover {
            successor: id(2),
            catch_up_left: Duration::from_secs(2),
            left: None,
        }),
        ..sooner
    };
    assert_eq!(due(&maps(&[handing])), Some(Duration::from_secs(2)));
}
