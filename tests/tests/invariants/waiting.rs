//! Calls that wait for nothing, calls that wait at most their bound, and timeouts that are not failures.

use std::time::{Duration, Instant};

use p2p_sync_agent::{Agent, OperationState, Settled};
use p2p_sync_proto::Code;
use p2p_sync_tests::faulty_link::FaultyLink;
use rustix::process::{Pid, Signal, kill_process};

use crate::world::{PATIENCE, World, chat, drop_of, event, run, until};

const CALLS: usize = 10_000;
/// The default of `critical_timeout_ms`, the shortest wait for the network there is.
const CRITICAL_TIMEOUT: Duration = Duration::from_millis(500);
/// A busy machine may take the processor from a thread for so long.
const PREEMPTION: Duration = Duration::from_millis(250);

/// How long each of many `submit`s took, shortest first.
fn submit_many(agent: &Agent) -> Vec<Duration> {
    let mut took: Vec<Duration> = (0..CALLS)
        .map(|number| {
            let payload = format!(
                r#"{{"char_id":{},"drop_id":{0},"text":"number {number}"}}"#,
                number % 150
            );
            let submission = match number % 3 {
                0 => chat(&payload),
                1 => drop_of(&payload),
                _ => event(&payload),
            };
            let begun = Instant::now();
            let submitted = agent.submit(&submission);
            let took = begun.elapsed();
            if let Err(problem) = submitted {
                assert_eq!(problem.code, Code::QueueFull, "{problem}");
            }
            took
        })
        .collect();
    took.sort_unstable();
    took
}

fn assert_nothing_was_waited_for(took: &[Duration]) {
    let median = took[took.len() / 2];
    assert!(
        median < Duration::from_millis(1),
        "the median call took {median:?}: it waits for the disk"
    );
    let nearly_all = took[took.len() * 999 / 1000];
    assert!(
        nearly_all < Duration::from_millis(50),
        "one call of a thousand took {nearly_all:?}"
    );
    let slowest = took[took.len() - 1];
    assert!(
        slowest < CRITICAL_TIMEOUT,
        "a call took {slowest:?}: it waits for the network"
    );
}

fn settled_as(agent: &Agent) -> (Duration, Settled) {
    let begun = Instant::now();
    let (_, settled) = agent.submit_critical(&event("{}")).expect("taken");
    (begun.elapsed(), settled)
}

#[test]
fn invariant_05_submitting_waits_for_nothing_where_nobody_listens() {
    let world = World::not_started();
    let agent = Agent::start(world.config("")).expect("starts");
    assert_nothing_was_waited_for(&submit_many(&agent));
    let (took, settled) = settled_as(&agent);
    assert!(
        took < PREEMPTION,
        "with the link known to be down a waiting call took {took:?}"
    );
    assert_eq!(settled.state, OperationState::Unknown);
}

#[test]
fn invariant_05_submitting_waits_for_nothing_where_the_hub_never_answers() {
    let world = World::not_started();
    let black_hole = FaultyLink::to(&world.endpoint());
    black_hole.swallow();
    let agent = Agent::start(world.config_at(&black_hole.endpoint(), "")).expect("starts");
    assert_nothing_was_waited_for(&submit_many(&agent));
}

#[test]
fn invariant_05_one_waiting_call_waits_its_timeout_the_next_not_at_all_until_the_link_answers_again() {
    let world = World::new();
    let link = FaultyLink::to(&world.endpoint());
    let agent = Agent::start(world.config_at(&link.endpoint(), "")).expect("starts");
    until("a waiting call is answered", || {
        settled_as(&agent).1.state == OperationState::Applied
    });
    link.swallow();
    let (took, settled) = settled_as(&agent);
    assert_eq!(
        (settled.state, settled.problem.map(|problem| problem.code)),
        (OperationState::Unknown, Some(Code::UnknownOutcome))
    );
    assert!(
        (CRITICAL_TIMEOUT..CRITICAL_TIMEOUT + PREEMPTION).contains(&took),
        "the first call took {took:?}"
    );
    for _ in 0..100 {
        let (took, settled) = settled_as(&agent);
        assert_eq!(settled.state, OperationState::Unknown);
        assert!(took < PREEMPTION, "a call after the first took {took:?}");
    }
    link.heal();
    until("a waiting call is answered again", || {
        settled_as(&agent).1.state == OperationState::Applied
    });
    assert!(agent.flush(PATIENCE), "what was unknown settles");
    world.assert_log_is_in_order_without_duplicates();
}

/// Makes a critical call time out while `held_up`, and follows the operation until it is settled after `release`.
fn a_timeout_is_unknown_and_settles_later(world: &World, agent: &Agent, release: impl FnOnce()) {
    let (id, settled) = agent.submit_critical(&event(r#"{"event":"slow"}"#)).expect("taken");
    assert_eq!(settled.state, OperationState::Unknown, "{settled:?}");
    assert_eq!(settled.problem.expect("says why").code as i32, 404);
    until("it is in the outbox", || agent.status().outbox_operations > 0);
    assert!(!agent.result(id).state.is_settled(), "{:?}", agent.result(id));
    release();
    assert_eq!(agent.wait(id, Some(PATIENCE)).state, OperationState::Applied);
    until("it has left the outbox", || agent.status().outbox_operations == 0);
    let rows = world.rows(
        "SELECT count(*) FROM p2p_sync.operations WHERE operation_id = $1",
        &[&id],
    );
    assert_eq!(rows[0].get::<_, i64>(0), 1, "exactly one row under the same id");
}

fn answered_agent(world: &World) -> Agent {
    let agent = Agent::start(world.config("")).expect("starts");
    until("a waiting call is answered", || {
        settled_as(&agent).1.state == OperationState::Applied
    });
    assert!(agent.flush(PATIENCE));
    agent
}

#[test]
fn invariant_06_a_hub_that_hangs_makes_an_operation_unknown_and_it_settles_later_under_its_id() {
    let world = World::new();
    let agent = answered_agent(&world);
    let pid = Pid::from_raw(i32::try_from(world.hub.pid()).expect("a process id")).expect("not 0");
    kill_process(pid, Signal::STOP).expect("it is our child");
    a_timeout_is_unknown_and_settles_later(&world, &agent, || {
        kill_process(pid, Signal::CONT).expect("it is our child");
    });
}

#[test]
fn invariant_06_a_database_that_hangs_makes_an_operation_unknown_and_it_settles_later_under_its_id() {
    let world = World::new();
    let agent = answered_agent(&world);
    let client = world.client();
    run(client.batch_execute("BEGIN; LOCK TABLE p2p_sync.operations")).expect("valid SQL");
    a_timeout_is_unknown_and_settles_later(&world, &agent, || {
        run(client.batch_execute("ROLLBACK")).expect("valid SQL");
    });
}
