//! Queues, outboxes and disks that are full, rows that Postgres refuses, and shutdown: nothing is dropped silently.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use p2p_sync_agent::{Agent, Config, OperationState};
use p2p_sync_proto::{Code, Problem, v1::operation::Payload};
use uuid::Uuid;

use crate::world::{PATIENCE, World, chat, drop_of, run, until};

/// Submitted before the disk has to have taken the last of them.
const PACE_OPS: usize = 256;

/// Large enough to fill a small outbox soon.
fn chat_payload(number: usize) -> String {
    format!(
        r#"{{"char_id":{},"text":"{number} {}"}}"#,
        number % 50,
        "x".repeat(2000)
    )
}

/// Submits chat messages until `ended`; gives the accepted ones and how many were refused with `QUEUE_FULL`.
fn submit_until(agent: &Agent, ended: impl Fn(usize) -> bool) -> (Vec<Uuid>, usize) {
    let mut accepted = Vec::new();
    let begun = Instant::now();
    let mut refused = 0;
    while !ended(refused) {
        assert!(begun.elapsed() < PATIENCE, "nothing filled up: {:?}", agent.status());
        match agent.submit(&chat(&chat_payload(accepted.len()))) {
            Ok(id) => {
                accepted.push(id);
                // Paced by the disk: it is the outbox that is to fill up, not the memory before it.
                let is_taken = || agent.result(id).state != OperationState::Accepted || agent.status().outbox_full;
                if accepted.len().is_multiple_of(PACE_OPS) {
                    until("the disk has taken it or is full", is_taken);
                }
            }
            Err(problem) => {
                assert_eq!(problem.code, Code::QueueFull, "{problem}");
                refused += 1;
            }
        }
    }
    (accepted, refused)
}

#[test]
fn invariant_07_a_full_queue_is_told_at_once_and_nothing_that_was_accepted_is_missing() {
    let world = World::new();
    let agent = Agent::start(world.config("max_queue_size = 16\n")).expect("starts");
    let (accepted, _) = submit_until(&agent, |refused| refused >= 1000);
    assert!(agent.flush(PATIENCE));
    world.held().assert_log_is(&accepted);
}

/// With the hub down, fills the outbox; then brings the hub up, and finds everything that was accepted.
fn a_full_outbox_refuses_or_conflates_and_drains(mut world: World, config: Config) {
    let agent = Agent::start(config).expect("starts");
    let (mut accepted, _) = submit_until(&agent, |_| agent.status().outbox_full);
    let refused = agent
        .submit(&chat(&chat_payload(0)))
        .expect_err("`every` operations find no room");
    assert_eq!(refused.code, Code::QueueFull);

    let mut latest = Vec::new();
    for amount in 1..=200 {
        match agent.submit(&drop_of(&format!(r#"{{"drop_id":7,"amount":{amount}}}"#))) {
            Ok(id) => latest.push(id),
            Err(problem) => assert_eq!(problem.code, Code::QueueFull, "{problem}"),
        }
    }
    let newest = *latest.last().expect("`latest` operations take the place of older ones");
    until("older ones of the path were superseded", || {
        latest[..latest.len() - 1]
            .iter()
            .all(|id| agent.result(*id).state == OperationState::Superseded)
    });

    world.hub.start();
    assert!(agent.flush(PATIENCE), "it drains: {:?}", agent.status());
    until("the outbox takes operations again", || !agent.status().outbox_full);
    let again = agent.submit(&chat(&chat_payload(0))).expect("there is room again");
    assert_eq!(agent.wait(again, Some(PATIENCE)).state, OperationState::Applied);
    accepted.extend([again, newest]);
    for id in &accepted {
        assert_eq!(agent.result(*id).state, OperationState::Applied);
    }
    world.held().assert_log_is(&accepted);
    world.assert_log_is_in_order_without_duplicates();
}

#[test]
fn invariant_07_a_full_outbox_refuses_what_it_cannot_keep_and_loses_nothing_it_took() {
    let world = World::not_started();
    let config = world.config("outbox_max_mb = 2\n");
    a_full_outbox_refuses_or_conflates_and_drains(world, config);
}

/// A small disk; unmounted with the value.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn new(folder: &Path, size: &str) -> Self {
        std::fs::create_dir(folder).expect("the folder can be made");
        let mut mount = Command::new("mount");
        mount
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(folder);
        let mounted = mount.output().expect("mount is installed");
        assert!(
            mounted.status.success(),
            "this test fills a small disk and needs to mount one, as root or in a container that may: {}",
            String::from_utf8_lossy(&mounted.stderr)
        );
        Self(folder.to_owned())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: an agent of a failing test may still have it open.
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[test]
fn invariant_07_a_full_disk_refuses_what_it_cannot_keep_and_still_drains() {
    let world = World::not_started();
    let disk = SmallDisk::new(&world.folder.path().join("disk"), "12m");
    let config = Config {
        outbox_dir: disk.0.join("outbox"),
        ..world.config("")
    };
    a_full_outbox_refuses_or_conflates_and_drains(world, config);
}

#[test]
fn invariant_07_shutting_down_on_a_full_disk_ends_and_keeps_what_was_spooled() {
    let mut world = World::not_started();
    let disk = SmallDisk::new(&world.folder.path().join("disk"), "12m");
    let config = Config {
        outbox_dir: disk.0.join("outbox"),
        queue_ops_max: 64,
        ..world.config("")
    };
    let agent = Agent::start(config.clone()).expect("starts");
    let (accepted, _) = submit_until(&agent, |_| agent.status().outbox_full);
    // More than memory has room for: they wait in the lane.
    let drops = (0..200).filter_map(|number| agent.submit(&drop_of(&format!(r#"{{"drop_id":{number}}}"#))).ok());
    let taken: Vec<Uuid> = accepted.iter().copied().chain(drops).collect();
    let spooled: Vec<Uuid> = accepted
        .into_iter()
        .filter(|id| agent.result(*id).state == OperationState::Spooled)
        .collect();
    assert!(!spooled.is_empty());
    let begun = Instant::now();
    let lost = agent.shutdown().err().map_or(0, |problem| lost_as_told(&problem));
    assert!(
        begun.elapsed() < PATIENCE / 2,
        "shutting down took {:?}",
        begun.elapsed()
    );
    world.hub.start();
    let agent = Agent::start(config).expect("starts again");
    assert!(agent.flush(PATIENCE), "it drains: {:?}", agent.status());
    let held = world.held();
    assert!(spooled.iter().all(|id| held.logged.get(id) == Some(&1)));
    let missing = taken.iter().filter(|id| !held.logged.contains_key(*id)).count();
    assert_eq!(missing, lost, "of {} taken are missing and told as lost", taken.len());
}

/// How many operations a shutdown says it could not keep.
fn lost_as_told(problem: &Problem) -> usize {
    assert_eq!(problem.code, Code::ShutdownIncomplete, "{problem}");
    let told = problem.sentence.split("lost: ").nth(1).expect("says how many");
    let digits: String = told.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().expect("a number")
}

#[test]
fn invariant_07_a_row_that_postgres_refuses_is_rejected_alone_and_readable_on_both_sides() {
    let world = World::new();
    let no_poison = "ALTER TABLE p2p_sync.states ADD CONSTRAINT no_poison CHECK (payload->>'text' <> 'poison')";
    run(world.client().batch_execute(no_poison)).expect("valid SQL");
    let agent = Agent::start(world.config("batch_size = 500\nsync_interval_ms = 10000\n")).expect("starts");
    let mut neighbours = Vec::new();
    let mut poisoned = Uuid::nil();
    for number in 0..500 {
        let text = if number == 250 { "poison" } else { "hi" };
        let id = agent
            .submit(&chat(&format!(r#"{{"char_id":{number},"text":"{text}"}}"#)))
            .expect("taken");
        if number == 250 {
            poisoned = id;
        } else {
            neighbours.push(id);
        }
    }
    let settled = agent.wait(poisoned, Some(PATIENCE));
    assert_eq!(settled.state, OperationState::Rejected);
    let problem = settled.problem.expect("says why");
    assert_eq!(problem.code, Code::StoreRefused);
    assert!(agent.flush(PATIENCE));
    world.held().assert_log_is(&neighbours);

    let on_the_hub = world.rows(
        "SELECT operation_id, code, reason, payload FROM p2p_sync.rejected_operations",
        &[],
    );
    assert_eq!(on_the_hub.len(), 1);
    assert_eq!(
        (on_the_hub[0].get::<_, Uuid>(0), on_the_hub[0].get::<_, i32>(1)),
        (poisoned, 216)
    );
    // Postgres' own words are the operator's to read.
    assert!(on_the_hub[0].get::<_, String>(2).contains("\"no_poison\""));
    assert!(!problem.sentence.contains("poison"), "{problem}");
    assert!(String::from_utf8_lossy(on_the_hub[0].get(3)).contains("poison"));

    let letters = agent.dead_letters(10).expect("readable");
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0].problem, problem);
    let operation = letters[0].operation.as_ref().expect("whole");
    assert_eq!(operation.operation_id, poisoned.as_bytes().as_slice());
    assert!(matches!(&operation.payload, Some(Payload::Full(json)) if json.starts_with(b"{\"char_id\":250")));
}

#[test]
fn invariant_07_shutting_down_in_mid_stream_loses_nothing() {
    let world = World::new();
    let config = world.config("");
    let mut accepted = Vec::new();
    for round in 0..3 {
        let agent = Agent::start(config.clone()).expect("starts");
        for number in 0..3000 {
            accepted.push(
                agent
                    .submit(&chat(&chat_payload(round * 3000 + number)))
                    .expect("there is room"),
            );
        }
        agent.shutdown().expect("nothing is lost");
        let refused = agent
            .submit(&chat(r#"{"char_id":1}"#))
            .expect_err("it takes nothing more");
        assert_eq!(refused.code, Code::ShutDown);
    }
    assert!(
        world.held().logged.len() < accepted.len(),
        "it was shut down when all was done"
    );
    assert!(Agent::start(config).expect("starts").flush(PATIENCE));
    world.held().assert_log_is(&accepted);
    world.assert_log_is_in_order_without_duplicates();
}
