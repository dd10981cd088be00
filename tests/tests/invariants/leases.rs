//! A map has one writer at a time: through the whole system, agents and operator's commands included.

use std::{collections::HashSet, path::Path, thread, time::Duration};

use p2p_sync_agent::{Agent, AgentEvent, Attached, Config, LeaseState, OperationState, Settled, Submission};
use p2p_sync_proto::{
    Code,
    envelope::Lane,
    keys::Credential,
    v1::{self, SyncDataType},
};
use p2p_sync_tests::stack;
use uuid::Uuid;

use crate::{
    wire::WireHost,
    world::{PATIENCE, PROGRAM, World, chat, run, until},
};

fn host_id(credential: &str) -> Uuid {
    Credential::parse(credential).expect("the hub gave it").host_id
}

fn start(world: &World, credential: &str) -> Agent {
    let config = world.config_of(&world.endpoint(), credential, "sync_interval_ms = 5\n");
    Agent::start(config).expect("starts")
}

/// The lease events that wait, e.g. `granted prontera`.
fn lease_events(next: impl Fn() -> Option<AgentEvent>) -> Vec<String> {
    let mut told = Vec::new();
    while let Some(event) = next() {
        match event {
            AgentEvent::LeaseGranted { map } => told.push(format!("granted {map}")),
            AgentEvent::LeaseExpiring { map } => told.push(format!("expiring {map}")),
            AgentEvent::LeaseLost { map } => told.push(format!("lost {map}")),
            _ => {}
        }
    }
    told
}

fn settled(agent: &Agent, submission: &Submission<'_>) -> Settled {
    let id = agent.submit(submission).expect("taken");
    agent.wait(id, Some(PATIENCE))
}

#[test]
fn invariant_04_a_map_that_is_taken_amid_writes_has_one_writer_at_each_moment_and_nothing_is_lost() {
    let world = World::governed(3);
    let credentials = [world.hub.add_host_of(1, &["prontera"]), world.hub.add_host(2)];
    let agents = credentials.each_ref().map(|credential| start(&world, credential));
    until("the first one holds it", || {
        agents[0].lease("prontera") == LeaseState::Held
    });
    assert_eq!(agents[1].lease("prontera"), LeaseState::None);
    let mut made: [Vec<Uuid>; 2] = [vec![], vec![]];
    let write = |host: usize, made: &mut [Vec<Uuid>; 2], character: u64| {
        let json = format!("{{\"char_id\":{character},\"host\":{host}}}");
        made[host].push(agents[host].submit(&chat(&json)).expect("taken"));
    };
    for round in 0..600 {
        if round == 200 {
            let second = host_id(&credentials[1]).to_string();
            let refused = world.hub.fails(&["maps", "assign", "prontera", &second]);
            assert!(refused.contains("holds the lease of prontera"), "{refused}");
            world.hub.command(&["maps", "force", "prontera", &second]);
        }
        write(0, &mut made, round % 7);
        if agents[1].lease("prontera") == LeaseState::Held {
            write(1, &mut made, round % 7);
        }
        thread::sleep(Duration::from_millis(5));
    }
    until("the second one holds it", || {
        agents[1].lease("prontera") == LeaseState::Held
    });
    until("the first one has lost it", || {
        agents[0].lease("prontera") == LeaseState::Lost
    });
    write(0, &mut made, 1);
    write(1, &mut made, 1);
    assert!(agents.iter().all(|agent| agent.flush(PATIENCE)));
    assert_eq!(
        lease_events(|| agents[0].next_event(|_| true))
            .last()
            .map(String::as_str),
        Some("lost prontera")
    );
    assert_eq!(lease_events(|| agents[1].next_event(|_| true)), ["granted prontera"]);

    let ids = |sql: &str| -> HashSet<Uuid> { world.rows(sql, &[]).iter().map(|row| row.get(0)).collect() };
    let logged = ids("SELECT operation_id FROM p2p_sync.operations");
    let limbo = ids("SELECT operation_id FROM p2p_sync.limbo_operations");
    assert!(logged.is_disjoint(&limbo));
    for (host, made) in made.iter().enumerate() {
        let lost = made
            .iter()
            .filter(|id| !logged.contains(id) && !limbo.contains(id))
            .count();
        assert_eq!(lost, 0, "of {} of host {host}", made.len());
        for id in made {
            let expected = if logged.contains(id) {
                OperationState::Applied
            } else {
                OperationState::Limbo
            };
            assert_eq!(agents[host].result(*id).state, expected);
        }
    }
    let all: HashSet<Uuid> = made[1].iter().copied().collect();
    assert!(limbo.is_disjoint(&all), "the new holder's all apply");
    assert!(
        limbo.len() >= 2 && logged.len() >= 200,
        "{} in limbo, {} applied",
        limbo.len(),
        logged.len()
    );
    let stale = "SELECT count(*) FROM (SELECT tenure, lag(tenure) OVER (ORDER BY stream_sequence) AS before \
        FROM p2p_sync.operations) AS _ WHERE tenure < before";
    assert_eq!(world.count(stale), 0);
    let listed = world
        .hub
        .command(&["limbo", "list", "--map", "prontera", "--limit", "1000"]);
    assert_eq!(listed.lines().count(), limbo.len());
    let first = listed.split(' ').next().expect("a number");
    assert_eq!(world.hub.command(&["limbo", "merge", first]), format!("{first} merged"));
    assert!(
        world
            .hub
            .fails(&["limbo", "discard", first])
            .contains("nothing lies in limbo")
    );
    assert_eq!(
        world.count("SELECT count(*) FROM p2p_sync.states WHERE hub_edit = 1"),
        1
    );
    // What is given up is never told as applied.
    let line = listed.lines().nth(1).expect("at least two");
    let second = line.split(' ').next().expect("a number");
    let operation = line.split(' ').find_map(|field| field.strip_prefix("operation="));
    let operation: Uuid = operation.and_then(|id| id.parse().ok()).expect("an id");
    let discarded = world.hub.command(&["limbo", "discard", second]);
    assert_eq!(discarded, format!("{second} discarded"));
    let left = world.hub.command(&["limbo", "list", "--limit", "1000"]);
    assert_eq!(left.lines().count(), limbo.len() - 2);
    for (table, rows) in [("limbo_operations", 0), ("operations", 0), ("rejected_operations", 1)] {
        let there = format!("SELECT count(*) FROM p2p_sync.{table} WHERE operation_id = $1");
        assert_eq!(world.rows(&there, &[&operation])[0].get::<_, i64>(0), rows, "{table}");
    }
}

#[test]
fn invariant_04_an_agent_that_starts_without_its_hub_writes_under_the_tenure_it_knew() {
    let mut world = World::governed(60);
    let credential = world.hub.add_host_of(1, &["prontera"]);
    let config = world.config_of(&world.endpoint(), &credential, "sync_interval_ms = 5\n");
    let agent = Agent::start(config.clone()).expect("starts");
    until("it holds it", || agent.lease("prontera") == LeaseState::Held);
    assert_eq!(settled(&agent, &chat("{\"char_id\":1}")).state, OperationState::Applied);
    agent.shutdown().expect("ends");
    world.hub.stop();
    let agent = Agent::start(config).expect("starts");
    assert_eq!(agent.lease("prontera"), LeaseState::Lost, "the hub has not said so");
    let id = agent.submit(&chat("{\"char_id\":1}")).expect("taken");
    world.hub.start();
    assert_eq!(agent.wait(id, Some(PATIENCE)).state, OperationState::Applied);
    until("it holds it again", || agent.lease("prontera") == LeaseState::Held);
    // A map that it never was given is another matter, and so is a player who is not on its maps.
    let foreign = settled(
        &agent,
        &Submission {
            map: "geffen",
            ..chat("{\"char_id\":1}")
        },
    );
    assert_eq!(foreign.problem.map(|problem| problem.code), Some(Code::NotLeaseHolder));
    let player = Submission {
        data_type: SyncDataType::PlayerData,
        map: "geffen",
        ..chat("{\"char_id\":7,\"level\":9}")
    };
    let stranger = settled(&agent, &player);
    assert_eq!(stranger.problem.map(|problem| problem.code), Some(Code::PlayerNotHere));
    let enter = Submission {
        data_type: SyncDataType::PlayerPresence,
        ..chat("{\"char_id\":7,\"event\":\"enter\"}")
    };
    agent.submit(&enter).expect("taken");
    assert_eq!(settled(&agent, &player).state, OperationState::Applied);
}

#[test]
fn the_hubs_downtime_costs_nobody_a_lease_that_ran_when_it_went() {
    let mut world = World::governed(4);
    let credential = world.hub.add_host_of(1, &["prontera"]);
    let agent = start(&world, &credential);
    until("it holds it", || agent.lease("prontera") == LeaseState::Held);
    world.hub.kill();
    let running = "SELECT count(*) FROM p2p_sync.host_assignments WHERE expires_at > now()";
    until("it is told that it ends", || {
        lease_events(|| agent.next_event(|_| true)).contains(&"expiring prontera".to_owned())
    });
    until("its time is over", || agent.lease("prontera") == LeaseState::Lost);
    until("nobody renewed it", || world.count(running) == 0);
    agent.shutdown().expect("ends");
    world.hub.start();
    assert_eq!(world.count(running), 1, "there was nobody to renew it with");
}

#[test]
fn invariant_04_a_renewal_that_was_recorded_extends_nothing() {
    let world = World::governed(60);
    let host = WireHost::new(&world.endpoint(), &world.hub.add_host_of(1, &["prontera"]));
    run(async {
        let channel = host.connect().await;
        let recorded = host.seal(Lane::Renew, &v1::RenewRequest { counter: 1 });
        let renewed = host.renew(&channel, recorded.clone()).await.expect("serves");
        assert_eq!(
            (renewed.code(), renewed.governed, renewed.leases.len()),
            (v1::RejectCode::None, true, 1)
        );
        let shorten = "UPDATE p2p_sync.host_assignments SET expires_at = now()";
        let client = tokio::task::block_in_place(|| world.client());
        client.batch_execute(shorten).await.expect("updates");
        let again = host.renew(&channel, recorded).await.expect("serves");
        assert_eq!((again.code(), again.leases.len()), (v1::RejectCode::Replay, 0));
        let running = "SELECT count(*) FROM p2p_sync.host_assignments WHERE expires_at > now()";
        let count: i64 = client.query_one(running, &[]).await.expect("reads").get(0);
        assert_eq!(count, 0);
        let newer = host.seal(Lane::Renew, &v1::RenewRequest { counter: 2 });
        assert_eq!(
            host.renew(&channel, newer).await.expect("serves").code(),
            v1::RejectCode::None
        );
        // Sealed for another lane, it is no renewal.
        let hello = host.seal(Lane::Hello, &v1::RenewRequest { counter: 3 });
        host.renew(&channel, hello).await.expect_err("does not open");
    });
}

#[test]
fn an_attached_program_is_told_of_leases_as_the_agent_is() {
    let world = World::governed(3);
    let credential = world.hub.add_host_of(1, &["prontera"]);
    let folder = world.folder.path().join("agent");
    let mut agent = stack::Agent::new(Path::new(PROGRAM), &folder, &world.endpoint(), &credential, &[]);
    agent.start();
    let text = format!("agent_socket = {}\n", agent.socket().display());
    let attached = Attached::start(Config::parse(&text, Path::new(""), |_| None).expect("valid")).expect("starts");
    until("it is granted", || attached.lease("prontera") == LeaseState::Held);
    assert_eq!(attached.lease("geffen"), LeaseState::None);
    let id = attached.submit(&chat("{\"char_id\":1}")).expect("taken");
    assert_eq!(attached.wait(id, Some(PATIENCE)).state, OperationState::Applied);
    // The agent's going and coming takes nothing from it.
    agent.kill();
    agent.start();
    world
        .hub
        .command(&["maps", "assign", "geffen", &host_id(&credential).to_string()]);
    until("another is granted", || attached.lease("geffen") == LeaseState::Held);
    assert_eq!(attached.lease("prontera"), LeaseState::Held);
    world.hub.command(&["maps", "release", "prontera"]);
    until("it is lost", || attached.lease("prontera") == LeaseState::Lost);
    let events = lease_events(|| attached.next_event(|_| true));
    assert_eq!(events.last().map(String::as_str), Some("lost prontera"), "{events:?}");
    assert!(events.contains(&"granted geffen".to_owned()), "{events:?}");
    let id = attached.submit(&chat("{\"char_id\":1}")).expect("taken");
    assert_eq!(attached.wait(id, Some(PATIENCE)).state, OperationState::Limbo);
    let told = attached.status();
    let states: Vec<(&str, LeaseState)> = told
        .leases
        .iter()
        .map(|lease| (lease.map.as_str(), lease.state))
        .collect();
    assert_eq!(states, [("geffen", LeaseState::Held), ("prontera", LeaseState::Lost)]);
}

#[test]
fn invariant_04_a_group_carries_the_tenure_of_each_map_that_it_writes() {
    let world = World::governed(3);
    let credential = world.hub.add_host_of(1, &["prontera", "geffen"]);
    let (first, second) = (host_id(&credential), host_id(&world.hub.add_host(2)));
    for host in [second, first] {
        world.hub.command(&["maps", "force", "prontera", &host.to_string()]);
    }
    let agent = start(&world, &credential);
    until("it holds both", || {
        ["prontera", "geffen"].map(|map| agent.lease(map)) == [LeaseState::Held; 2]
    });
    let drop = Submission {
        data_type: SyncDataType::ItemDrop,
        map: "geffen",
        payload: Some(r#"{"drop_id":7,"amount":1}"#),
        ..chat("")
    };
    let group = agent
        .submit_group(&[chat(r#"{"char_id":1}"#), drop], true)
        .expect("taken");
    let told = agent.wait(group, Some(PATIENCE));
    assert_eq!(told.state, OperationState::Applied, "{told:?}");
    let tenures = world.rows("SELECT stream, tenure FROM p2p_sync.operations ORDER BY stream", &[]);
    let tenures: Vec<(String, i64)> = tenures.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert_eq!(tenures, [("geffen".to_owned(), 1), ("prontera".to_owned(), 3)]);
    let found = world.count("SELECT count(*) FROM p2p_sync.security_validations");
    assert_eq!(found, 0, "nothing of it is held against the host");
}
