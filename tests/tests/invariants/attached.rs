//! Programs attached to a standalone agent: either is killed, the disk is full, nobody is there, and each operation takes
//! effect once.

use std::{
    collections::HashSet,
    path::Path,
    time::{Duration, Instant},
};

use p2p_sync_agent::{AgentEvent, Attached, Config, OperationState, Question, Settled, Subscription};
use p2p_sync_proto::{Code, path, v1::SyncDataType};
use p2p_sync_tests::{recording::Happening, stack::Agent};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use uuid::Uuid;

use crate::world::{PATIENCE, PROGRAM, World, chat, drop_of, event, until};

/// Fed before something is killed; more than can be settled by the time it is.
const FEED_OPS: u64 = 4000;
/// A busy machine may take the processor from a thread for so long.
const PREEMPTION: Duration = Duration::from_millis(250);

/// A standalone agent of a world, not started.
fn standalone(world: &World, settings: &[(&str, String)]) -> Agent {
    let mut all = vec![
        ("retry_delay_max_ms", "500".to_owned()),
        ("sync_interval_ms", "5".to_owned()),
    ];
    all.extend_from_slice(settings);
    let folder = world.folder.path().join("agent");
    Agent::new(
        Path::new(PROGRAM),
        &folder,
        &world.endpoint(),
        &world.hub.add_host(1),
        &all,
    )
}

/// Attaches from within this process.
fn attached_to(agent: &Agent, settings: &str) -> Attached {
    let text = format!("agent_socket = {}\n{settings}", agent.socket().display());
    Attached::start(Config::parse(&text, Path::new(""), |_| None).expect("valid")).expect("starts")
}

/// Kept as `every`, of both lanes, on paths that are written again and again.
fn happening(number: u64) -> Happening {
    let (data_type, payload) = if number.is_multiple_of(3) {
        (
            SyncDataType::CriticalGameState,
            json!({"event": "mvp", "number": number}),
        )
    } else {
        (
            SyncDataType::ChatMessage,
            json!({"char_id": number % 20, "number": number}),
        )
    };
    Happening {
        at_ms: 0,
        data_type,
        map: "prontera".to_owned(),
        account_id: 2_000_001,
        entity: None,
        payload: Some(payload.to_string()),
    }
}

/// Panics unless the numbers of each path stand in the log in the order they were made in, each once.
fn assert_numbers_are_in_order(world: &World) {
    let out_of_order = "SELECT count(*) FROM (SELECT (payload->>'number')::bigint AS number, \
            lag((payload->>'number')::bigint) OVER (PARTITION BY path ORDER BY stream_sequence) AS before \
        FROM p2p_sync.operations WHERE keeps_every) AS _ WHERE number <= before";
    assert_eq!(
        world.count(out_of_order),
        0,
        "operations of a path were reordered or repeated"
    );
    world.assert_log_is_in_order_without_duplicates();
}

/// The operations that a program was told of as spooled.
fn spooled(program: &Agent) -> HashSet<Uuid> {
    let ledger = program.ledger();
    let spooled = ledger.said.iter().filter(|(_, said)| said.spooled);
    spooled.map(|(id, _)| id.parse().expect("an id")).collect()
}

fn feed(program: &mut Agent, numbers: std::ops::Range<u64>) {
    for number in numbers {
        assert!(
            program.submit(number, &happening(number)),
            "it is gone: {}",
            program.log()
        );
    }
}

#[test]
fn invariant_01_and_02_what_an_attached_program_was_told_is_spooled_survives_its_kill_and_applies_once() {
    let mut world = World::not_started();
    let mut agent = standalone(&world, &[]);
    agent.start();
    let mut told = HashSet::new();
    let mut number = 0;
    for round in 0..3 {
        let folder = world.folder.path().join(format!("map-server-{round}"));
        let mut program = agent.attached(&folder, &[]);
        program.start();
        feed(&mut program, number..number + FEED_OPS);
        number += FEED_OPS;
        until("some are spooled", || spooled(&program).len() > 100);
        program.kill();
        let spooled = spooled(&program);
        assert!(
            spooled.len() < usize::try_from(FEED_OPS).expect("small"),
            "it was killed when all was done"
        );
        told.extend(spooled);
        if round == 1 {
            world.hub.start();
        }
    }
    assert!(agent.flush(PATIENCE), "the agent does not drain: {}", agent.log());
    let held = world.held();
    let missing = told.iter().filter(|id| held.logged.get(id) != Some(&1)).count();
    assert_eq!(missing, 0, "of {} operations that were spooled", told.len());
    assert_numbers_are_in_order(&world);
}

#[test]
fn invariant_01_02_and_03_a_standalone_agent_that_is_killed_under_a_program_loses_repeats_and_reorders_nothing() {
    let world = World::new();
    let mut agent = standalone(&world, &[]);
    agent.start();
    let mut program = agent.attached(&world.folder.path().join("map-server"), &[]);
    program.start();
    let mut fed = 0;
    for _ in 0..4 {
        let before = program.ledger().count("APPLIED");
        feed(&mut program, fed..fed + FEED_OPS);
        fed += FEED_OPS;
        until("some are applied", || program.ledger().count("APPLIED") > before);
        agent.kill();
        agent.start();
    }
    assert!(
        program.flush(PATIENCE),
        "it does not drain: {} {}",
        program.log(),
        agent.log()
    );
    let ledger = program.ledger();
    let refused = ledger
        .refused
        .values()
        .filter(|refusal| refusal["label"] == "QUEUE_FULL")
        .count();
    assert_eq!(refused, ledger.refused.len(), "{:?}", ledger.refused.values().next());
    let accepted: Vec<Uuid> = ledger.ids.values().map(|id| id.parse().expect("an id")).collect();
    assert_eq!(accepted.len() + refused, usize::try_from(fed).expect("small"));
    drop(ledger);
    world.held().assert_log_is(&accepted);
    assert_numbers_are_in_order(&world);
    until(
        "the program is told of each, those settled around a kill included",
        || program.ledger().count("APPLIED") == accepted.len(),
    );
}

#[test]
fn invariant_07_an_agent_that_is_not_there_is_told_in_the_status_and_what_waits_for_it_is_bounded() {
    let world = World::new();
    let mut agent = standalone(&world, &[]);
    let attached = attached_to(&agent, "max_queue_size = 16\n");
    let mut accepted = Vec::new();
    let refused = loop {
        match attached.submit(&chat(&json!({"char_id": 1, "number": accepted.len()}).to_string())) {
            Ok(id) => accepted.push(id),
            Err(problem) => break problem,
        }
    };
    assert_eq!((refused.code, accepted.len()), (Code::QueueFull, 16), "{refused}");
    attached.wait_for_link(PATIENCE);
    let status = attached.status();
    let problem = status.link_problem.expect("says why");
    assert!(problem.contains("start `p2p-sync-agent run`"), "{problem}");
    assert_eq!((status.link_up, status.pending_operations), (false, 16));
    let begun = Instant::now();
    let (id, settled) = attached
        .submit_critical(&event("{}"))
        .expect("critical ones have room of their own");
    assert!(
        begun.elapsed() < PREEMPTION,
        "with nobody there it took {:?}",
        begun.elapsed()
    );
    assert_eq!(settled.state, OperationState::Unknown);
    assert!(!attached.flush(Duration::from_millis(100)));
    agent.start();
    assert!(attached.flush(PATIENCE), "{:?}", attached.status());
    assert_eq!(attached.wait(id, Some(PATIENCE)).state, OperationState::Applied);
    accepted.push(id);
    world.held().assert_log_is(&accepted);
    assert_eq!(attached.status().host_id, agent.host_id());
}

#[test]
fn invariant_05_and_06_a_waiting_call_through_the_agent_is_answered_and_ends_at_its_bound_when_the_agent_hangs() {
    let world = World::new();
    let mut agent = standalone(&world, &[]);
    agent.start();
    let attached = attached_to(&agent, "");
    let answered = || attached.submit_critical(&event("{}")).expect("taken").1.state;
    until("a waiting call is answered", || answered() == OperationState::Applied);
    let pid = Pid::from_raw(i32::try_from(agent.pid()).expect("a process id")).expect("not 0");
    kill_process(pid, Signal::STOP).expect("it is our child");
    let begun = Instant::now();
    let (slow, settled) = attached.submit_critical(&event("{}")).expect("taken");
    let took = begun.elapsed();
    let timeout = Duration::from_millis(500);
    assert!(
        (timeout..timeout + PREEMPTION).contains(&took),
        "the first call took {took:?}"
    );
    assert_eq!(settled.state, OperationState::Unknown);
    for _ in 0..20 {
        let begun = Instant::now();
        assert_eq!(answered(), OperationState::Unknown);
        assert!(
            begun.elapsed() < PREEMPTION,
            "a call after the first took {:?}",
            begun.elapsed()
        );
    }
    let path = path::Path::parse("prontera/ITEM_DROP/7").expect("valid");
    let begun = Instant::now();
    let unanswered = attached.get(&path, Some(timeout)).expect_err("nobody answers");
    assert_eq!(unanswered.code, Code::HubUnavailable);
    assert!(
        begun.elapsed() < timeout * 2 + PREEMPTION,
        "reading took {:?}",
        begun.elapsed()
    );
    kill_process(pid, Signal::CONT).expect("it is our child");
    assert_eq!(attached.wait(slow, Some(PATIENCE)).state, OperationState::Applied);
    until("a waiting call is answered again", || {
        answered() == OperationState::Applied
    });

    let dropped = attached.submit(&drop_of(r#"{"drop_id":7,"amount":3}"#)).expect("taken");
    assert_eq!(attached.wait(dropped, Some(PATIENCE)).state, OperationState::Applied);
    let state = attached
        .get(&path, Some(PATIENCE))
        .expect("answered")
        .expect("it is there");
    assert_eq!(
        serde_json::from_slice::<serde_json::Value>(&state.payload).expect("JSON")["amount"],
        3
    );
}

#[test]
fn invariant_05_an_agent_that_hangs_costs_the_calls_of_the_cache_one_wait_and_is_told_as_a_link_that_is_down() {
    let world = World::new();
    let mut agent = standalone(&world, &[]);
    agent.start();
    let attached = attached_to(&agent, "");
    attached.wait_for_link(PATIENCE);
    let timeout = Duration::from_millis(500);
    until("the cache answers", || attached.cache_get("a key", timeout).is_ok());
    let pid = Pid::from_raw(i32::try_from(agent.pid()).expect("a process id")).expect("not 0");
    kill_process(pid, Signal::STOP).expect("it is our child");
    let stopped = Instant::now();
    let mut waits = 0;
    // While it hangs unnoticed, and then while it is known to.
    while stopped.elapsed() < Duration::from_secs(4) {
        let begun = Instant::now();
        let asked = attached.cache_get("another key", timeout);
        let took = begun.elapsed();
        assert_eq!(asked.expect_err("nobody answers").code, Code::HubUnavailable);
        assert!(took < timeout + PREEMPTION, "a call took {took:?}");
        waits += usize::from(took >= timeout);
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(waits, 1, "only the first one waits");
    let status = attached.status();
    assert!(!status.link_up);
    let problem = status.link_problem.expect("says why");
    assert!(problem.contains("does not answer"), "{problem}");
    kill_process(pid, Signal::CONT).expect("it is our child");
    until("the cache answers again", || {
        attached.cache_get("a key", timeout).is_ok()
    });
    until("the link is up", || attached.status().link_up);
}

#[test]
fn invariant_06_without_a_hub_an_attached_programs_operations_are_spooled_and_settle_when_it_comes() {
    let mut world = World::not_started();
    let mut agent = standalone(&world, &[]);
    agent.start();
    let attached = attached_to(&agent, "");
    let mut accepted = Vec::new();
    for number in 0..1000 {
        let payload = json!({"char_id": number % 7, "number": number}).to_string();
        let submission = if number % 2 == 0 {
            chat(&payload)
        } else {
            event(&payload)
        };
        accepted.push(attached.submit(&submission).expect("room"));
    }
    until("all are on the agent's disk", || {
        accepted
            .iter()
            .all(|id| attached.result(*id).state == OperationState::Spooled)
    });
    assert_eq!(
        attached.submit_critical(&event("{}")).expect("taken").1.state,
        OperationState::Unknown
    );
    let problem = attached.status().link_problem.expect("told by the agent");
    assert!(problem.contains("cannot be reached"), "{problem}");
    world.hub.start();
    assert!(attached.flush(PATIENCE), "{:?}", attached.status());
    for id in &accepted {
        assert_eq!(attached.wait(*id, Some(PATIENCE)).state, OperationState::Applied);
    }
    assert_eq!(world.held().logged.len(), 1001);
    world.assert_log_is_in_order_without_duplicates();
}

#[test]
fn invariant_07_a_full_outbox_makes_the_attached_program_wait_and_nothing_it_handed_over_is_lost_or_repeated() {
    let mut world = World::not_started();
    let mut agent = standalone(&world, &[("outbox_max_mb", "1".to_owned())]);
    agent.start();
    let attached = attached_to(&agent, "max_queue_size = 64\n");
    let mut accepted = Vec::new();
    let begun = Instant::now();
    while !attached.status().outbox_full {
        assert!(begun.elapsed() < PATIENCE, "nothing filled up: {:?}", attached.status());
        let payload = json!({"char_id": 1, "number": accepted.len(), "text": "x".repeat(2000)}).to_string();
        match attached.submit(&chat(&payload)) {
            Ok(id) => accepted.push(id),
            Err(problem) => assert_eq!(problem.code, Code::QueueFull, "{problem}"),
        }
    }
    // Of both kinds and lanes: also what a full disk keeps in memory if it is the agent's own.
    until("the program's queue is full", || {
        let payload = json!({"drop_id": 1, "char_id": 1, "number": accepted.len()}).to_string();
        let submission = if accepted.len().is_multiple_of(2) {
            chat(&payload)
        } else {
            drop_of(&payload)
        };
        match attached.submit(&submission) {
            Ok(id) => {
                accepted.push(id);
                false
            }
            Err(problem) => problem.code == Code::QueueFull,
        }
    });
    agent.kill();
    agent.start();
    world.hub.start();
    assert!(attached.flush(PATIENCE), "{:?}", attached.status());
    let held = world.held();
    let superseded = accepted
        .iter()
        .filter(|id| attached.wait(**id, Some(PATIENCE)).state == OperationState::Superseded)
        .count();
    assert_eq!(held.logged.len() + superseded, accepted.len());
    assert_numbers_are_in_order(&world);
}

/// Takes events until an operation or a question is told of as settled; counts the updates on the way.
fn told_settled(attached: &Attached, id: Uuid, updates: &mut usize) -> Settled {
    let mut told = None;
    until("it is told of as settled", || {
        attached.wait_for_event(Duration::from_millis(100));
        match attached.next_event(|_| true) {
            Some(AgentEvent::Settled { operation_id, settled }) if operation_id == id => told = Some(settled),
            Some(AgentEvent::Update { .. }) => *updates += 1,
            _ => {}
        }
        told.is_some()
    });
    told.expect("waited for")
}

#[test]
fn an_attached_program_groups_asks_follows_and_caches_through_the_agent() {
    let world = World::new();
    let mut agent = standalone(&world, &[]);
    agent.start();
    let attached = attached_to(&agent, "");
    attached.wait_for_link(PATIENCE);
    let stream = Subscription {
        stream: "prontera".to_owned(),
        types: vec![],
        path_prefix: String::new(),
    };
    let subscription = attached.subscribe(stream).expect("followed");
    let members = [drop_of(r#"{"drop_id":7,"amount":1}"#), event(r#"{"event":"mvp"}"#)];
    let group = attached.submit_group(&members, true).expect("taken");
    let mut updates = 0;
    let settled = told_settled(&attached, group, &mut updates);
    assert_eq!(settled.state, OperationState::Applied, "{settled:?}");
    let question = Question::Read {
        data_type: SyncDataType::CriticalGameState,
        map: "prontera".to_owned(),
        account_id: 0,
        request: String::new(),
    };
    let asked = attached.ask(question, true).expect("asked");
    let answer = told_settled(&attached, asked, &mut updates);
    assert!(answer.data.is_some_and(|data| data.contains("mvp")));
    until("both members are told as updates", || {
        attached.wait_for_event(Duration::from_millis(100));
        updates += usize::from(matches!(attached.next_event(|_| true), Some(AgentEvent::Update { .. })));
        updates == 2
    });
    assert!(attached.unsubscribe(subscription));

    attached.cache_set("online", "17", 60).expect("taken");
    let cached = attached.cache_get("online", PATIENCE).expect("answered");
    assert_eq!(cached.as_deref(), Some("17"), "what was written before is read");
    attached.cache_delete("online").expect("taken");
    assert!(!attached.cache_exists("online", PATIENCE).expect("answered"));
    let counters = attached.status().counters;
    assert_eq!((counters.taken, counters.applied, counters.refused), (1, 1, 0));
    attached.shutdown_within(Duration::from_secs(10)).expect("all is kept");
}
