//! Maps that change hands while they are played, through the whole system: agents that are told, hand over, stand by and leave.

use std::{
    collections::HashSet,
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use p2p_sync_agent::{
    Agent, AgentEvent, Attached, Config, DutyRole, LeaseState, OperationState, Question, Settled, Submission,
};
use p2p_sync_proto::{Code, keys::Credential, v1::SyncDataType};
use p2p_sync_tests::{recording::Happening, stack};
use serde_json::Value;
use uuid::Uuid;

use crate::world::{PATIENCE, PROGRAM, World, chat, drop_of, until};

/// A hub that hands over within seconds, and whose leases are long enough that nothing here happens by a renewal.
fn world(lease_seconds: u64) -> World {
    World::with(&[
        ("leases", "required".to_owned()),
        ("lease_seconds", lease_seconds.to_string()),
        ("catch_up_seconds", "2".to_owned()),
        ("handover_seconds", "20".to_owned()),
        ("migration_min_seconds", "1".to_owned()),
    ])
}

fn host_id(credential: &str) -> Uuid {
    Credential::parse(credential).expect("the hub gave it").host_id
}

fn start(world: &World, credential: &str) -> Agent {
    let config = world.config_of(&world.endpoint(), credential, "sync_interval_ms = 5\n");
    let agent = Agent::start(config).expect("starts");
    agent.wait_for_link(PATIENCE);
    agent
}

/// The lease events that wait.
fn lease_events(agent: &Agent) -> Vec<String> {
    let mut told = Vec::new();
    while let Some(event) = agent.next_event(|_| true) {
        match event {
            AgentEvent::LeaseGranted { map } => told.push(format!("granted {map}")),
            AgentEvent::LeaseLost { map } => told.push(format!("lost {map}")),
            AgentEvent::LeaseHandingOver { map, successor } => told.push(format!("handing over {map} to {successor}")),
            _ => {}
        }
    }
    told
}

fn asked(agent: &Agent, question: Question) -> Settled {
    let id = agent.ask(question, false).expect("taken");
    agent.wait(id, Some(PATIENCE))
}

fn answered(agent: &Agent, question: Question) -> Value {
    let settled = asked(agent, question);
    assert_eq!(settled.state, OperationState::Applied, "{settled:?}");
    serde_json::from_str(settled.data.as_deref().expect("an answer")).expect("JSON")
}

fn migrate(map: &str, to: Option<Uuid>) -> Question {
    let map = map.to_owned();
    Question::MigrateMap { map, to }
}

fn release(map: &str) -> Question {
    Question::ReleaseMap { map: map.to_owned() }
}

fn kept(request: &str) -> Question {
    Question::Read {
        data_type: SyncDataType::ItemDrop,
        map: "prontera".to_owned(),
        account_id: 0,
        request: request.to_owned(),
    }
}

/// An item on the ground.
fn dropped(map: &str, number: u64) -> Happening {
    Happening {
        at_ms: 0,
        data_type: SyncDataType::ItemDrop,
        map: map.to_owned(),
        account_id: 0,
        entity: None,
        payload: Some(format!("{{\"drop_id\":{number},\"amount\":1}}")),
    }
}

fn in_limbo(world: &World) -> i64 {
    world.count("SELECT count(*) FROM p2p_sync.limbo_operations")
}

#[test]
fn a_map_that_is_given_or_taken_is_told_at_once_and_not_by_the_next_renewal() {
    let world = world(300);
    let credential = world.hub.add_host(1);
    let agent = start(&world, &credential);
    until("the hub is asked", || agent.status().leases_required == Some(true));
    // The agent attends a moment after its link is up.
    thread::sleep(Duration::from_secs(1));
    let host = host_id(&credential).to_string();
    let begun = Instant::now();
    world.hub.command(&["maps", "assign", "prontera", &host]);
    until("it is granted", || agent.lease("prontera") == LeaseState::Held);
    assert_eq!(lease_events(&agent), ["granted prontera"]);
    world.hub.command(&["maps", "release", "prontera"]);
    until("it is lost", || agent.lease("prontera") == LeaseState::Lost);
    assert!(
        begun.elapsed() < Duration::from_secs(30),
        "a renewal is due after 60 s at the soonest"
    );
    assert_eq!(lease_events(&agent), ["lost prontera"]);
}

#[test]
fn invariant_04_a_map_is_handed_over_amid_writes_and_nothing_of_it_comes_to_limbo() {
    let world = world(60);
    let credentials = [world.hub.add_host_of(1, &["prontera", "geffen"]), world.hub.add_host(2)];
    let agents = credentials.each_ref().map(|credential| start(&world, credential));
    until("the first one holds it", || {
        agents[0].lease("prontera") == LeaseState::Held
    });
    let enter = Submission {
        data_type: SyncDataType::PlayerPresence,
        ..chat(r#"{"char_id":7,"event":"enter"}"#)
    };
    agents[0].submit(&enter).expect("taken");
    let mut made: Vec<Uuid> = Vec::new();
    let mut elsewhere = 0;
    let mut ending = None;
    let successor = host_id(&credentials[1]);
    for round in 0..4000 {
        if round == 200 {
            answered(&agents[0], migrate("prontera", Some(successor)));
        }
        let json = format!("{{\"char_id\":{},\"round\":{round}}}", round % 7);
        if agents[0].lease("prontera") == LeaseState::Held {
            made.push(agents[0].submit(&chat(&json)).expect("taken"));
        } else if ending.is_none() {
            // What a map server does now: it saves who is there, has them leave, and lets the map go.
            assert_eq!(agents[0].lease("prontera"), LeaseState::HandingOver);
            for number in 0..50 {
                let last = format!("{{\"char_id\":{number},\"last\":true}}");
                made.push(agents[0].submit(&chat(&last)).expect("taken"));
            }
            let player = Submission {
                data_type: SyncDataType::PlayerData,
                ..chat(r#"{"char_id":7,"zeny":5}"#)
            };
            made.push(agents[0].submit(&player).expect("taken"));
            let leave = Submission {
                payload: Some(r#"{"char_id":7,"event":"leave"}"#),
                ..enter.clone()
            };
            made.push(agents[0].submit(&leave).expect("taken"));
            ending = Some(agents[0].ask(release("prontera"), false).expect("taken"));
        }
        // Another map goes on all the while.
        let other = Submission {
            map: "geffen",
            ..chat(&json)
        };
        agents[0].submit(&other).expect("taken");
        elsewhere += 1;
        if agents[1].lease("prontera") == LeaseState::Held {
            break;
        }
        thread::sleep(Duration::from_millis(5));
    }
    let released = agents[0].wait(ending.expect("it was told"), Some(PATIENCE));
    assert_eq!(released.state, OperationState::Applied, "{released:?}");
    until("the second one holds it", || {
        agents[1].lease("prontera") == LeaseState::Held
    });
    assert_eq!(agents[0].lease("prontera"), LeaseState::Lost);
    for id in &made {
        assert_eq!(
            agents[0].result(*id).state,
            OperationState::Applied,
            "settled before it passed on"
        );
    }
    // The player, who left, is at once the next one's.
    let entered = agents[1].submit(&enter).expect("taken");
    assert_eq!(agents[1].wait(entered, Some(PATIENCE)).state, OperationState::Applied);
    let late = agents[0].submit(&chat(r#"{"char_id":1,"late":true}"#)).expect("taken");
    assert_eq!(agents[0].wait(late, Some(PATIENCE)).state, OperationState::Limbo);
    assert!(agents.iter().all(|agent| agent.flush(PATIENCE)));
    assert_eq!(
        in_limbo(&world),
        1,
        "the late one alone, of {} and {elsewhere}",
        made.len()
    );
    let told = lease_events(&agents[0]);
    let handing_over = format!("handing over prontera to {successor}");
    let at = |what: &str| told.iter().position(|told| told == what);
    assert!(at(&handing_over).is_some() || at("lost prontera").is_some(), "{told:?}");
    assert_eq!(told.last().map(String::as_str), Some("lost prontera"), "{told:?}");
    let stale = "SELECT count(*) FROM (SELECT tenure, lag(tenure) OVER (ORDER BY stream_sequence) AS before \
        FROM p2p_sync.operations WHERE stream = 'prontera') AS _ WHERE tenure < before";
    assert_eq!(world.count(stale), 0);
}

#[test]
fn a_backlog_of_other_maps_does_not_delay_a_hand_over_and_nothing_of_the_map_is_left_in_it() {
    let world = world(60);
    let credentials = [world.hub.add_host_of(1, &["prontera", "geffen"]), world.hub.add_host(2)];
    let config = world.config_of(
        &world.endpoint(),
        &credentials[0],
        "max_queue_size = 256\nbatch_size = 16\nupload_limit_kbps = 400\n",
    );
    let agent = Agent::start(config).expect("starts");
    until("it holds both", || {
        ["prontera", "geffen"].map(|map| agent.lease(map)) == [LeaseState::Held; 2]
    });
    // More than memory holds: most of it lies on disk alone, and the line takes minutes for it.
    let mut of_the_map = Vec::new();
    for number in 0..3000 {
        // Of what does not get smaller.
        let text: String = (0..25).map(|_| Uuid::new_v4().simple().to_string()).collect();
        let json = format!("{{\"drop_id\":{number},\"amount\":1,\"text\":\"{text}\"}}");
        let is_its = number % 100 == 0;
        let submission = Submission {
            map: if is_its { "prontera" } else { "geffen" },
            ..drop_of(&json)
        };
        let id = loop {
            match agent.submit(&submission) {
                Ok(id) => break id,
                Err(problem) => assert_eq!(problem.code, Code::QueueFull, "{problem}"),
            }
            thread::sleep(Duration::from_millis(5));
        };
        if is_its {
            of_the_map.push(id);
        }
    }
    answered(&agent, release("prontera"));
    for id in &of_the_map {
        assert_eq!(agent.result(*id).state, OperationState::Applied);
    }
    assert!(agent.status().outbox_operations > 1000, "the rest waits still");
    assert_eq!(in_limbo(&world), 0);
}

#[test]
fn a_map_server_that_says_nothing_has_its_map_handed_over_when_it_is_quiet() {
    let world = world(60);
    let credentials = [world.hub.add_host_of(1, &["prontera"]), world.hub.add_host(2)];
    let agents = credentials.each_ref().map(|credential| start(&world, credential));
    until("the first one holds it", || {
        agents[0].lease("prontera") == LeaseState::Held
    });
    world
        .hub
        .command(&["maps", "migrate", "prontera", &host_id(&credentials[1]).to_string()]);
    let mut last = Instant::now();
    let began = Instant::now();
    until("the second one holds it", || {
        if began.elapsed() < Duration::from_secs(4) && agents[0].lease("prontera") != LeaseState::Lost {
            agents[0].submit(&chat(r#"{"char_id":1}"#)).expect("taken");
            last = Instant::now();
        }
        agents[1].lease("prontera") == LeaseState::Held
    });
    assert!(
        last.elapsed() > Duration::from_secs(1),
        "it was quiet before: {:?}",
        last.elapsed()
    );
    assert!(
        began.elapsed() < Duration::from_secs(18),
        "and the hub's time was not over"
    );
    assert!(agents[0].flush(PATIENCE));
    assert_eq!(in_limbo(&world), 0);
}

#[test]
fn a_map_is_given_up_and_asked_for_again_and_what_the_hub_refuses_leaves_it_where_it_is() {
    let world = world(60);
    // Who may ask for it is any host.
    world.hub.command(&["maps", "rule", "prontera", "--automatic", "no"]);
    let credential = world.hub.add_host_of(1, &["prontera"]);
    let agent = start(&world, &credential);
    until("it holds it", || agent.lease("prontera") == LeaseState::Held);
    let refused = asked(&agent, release("geffen"));
    assert_eq!(refused.problem.map(|problem| problem.code), Some(Code::NotLeaseHolder));
    let refused = asked(&agent, migrate("prontera", Some(Uuid::from_u128(7))));
    assert_eq!(refused.state, OperationState::Rejected, "{refused:?}");
    assert_eq!(agent.lease("prontera"), LeaseState::Held);
    answered(&agent, release("prontera"));
    assert_eq!(agent.lease("prontera"), LeaseState::Lost);
    let listed = answered(
        &agent,
        Question::ListMaps {
            map: "prontera".to_owned(),
        },
    );
    assert_eq!(listed["maps"][0]["host_id"], Value::Null, "{listed}");
    // It may have it back, under a new tenure.
    let assigned = answered(
        &agent,
        Question::AssignMap {
            map: "prontera".to_owned(),
        },
    );
    assert_eq!(assigned["maps"][0]["tenure"], 2, "{assigned}");
    until("it holds it again", || agent.lease("prontera") == LeaseState::Held);
    let id = agent.submit(&chat(r#"{"char_id":1}"#)).expect("taken");
    assert_eq!(agent.wait(id, Some(PATIENCE)).state, OperationState::Applied);
}

#[test]
fn a_killed_holders_map_goes_to_the_backup_whose_program_reads_it_warm() {
    let mut world = world(3);
    let credentials = [world.hub.add_host_of(1, &["prontera"]), world.hub.add_host(2)];
    let folder = world.folder.path().join("holder");
    let mut holder = stack::Agent::new(Path::new(PROGRAM), &folder, &world.endpoint(), &credentials[0], &[]);
    holder.start();
    // What it makes before it knows its lease goes to limbo.
    until("the holder has renewed its lease", || {
        world.count("SELECT count(*) FROM p2p_sync.lease_renewals") > 0
    });
    thread::sleep(Duration::from_secs(1));
    for number in 0..300 {
        assert!(holder.submit(number, &dropped("prontera", number)));
    }
    assert!(holder.flush(PATIENCE));
    // Only now: a holder that starts slowly has let its lease run out, and the other one would be given the map.
    let backup = start(&world, &credentials[1]);
    world
        .hub
        .command(&["maps", "rule", "prontera", "--automatic", "yes", "--backups", "1"]);
    until("it stands by, and has caught up", || {
        let status = backup.status();
        let duty = status.duties.iter().find(|duty| duty.map == "prontera");
        duty.is_some_and(|duty| {
            duty.role == DutyRole::Backup && duty.copy.is_some_and(|copy| copy.whole && copy.states == 300)
        })
    });
    let before = asked(&backup, kept(r#"{"prefix":"prontera/","kept":true,"limit":1000}"#));
    assert_eq!(before.state, OperationState::Applied, "{before:?}");
    holder.kill();
    until("the backup has it", || backup.lease("prontera") == LeaseState::Held);
    assert_eq!(lease_events(&backup), ["granted prontera"]);
    // Without the hub, which is killed as well.
    world.hub.kill();
    let read = answered(
        &backup,
        kept(r#"{"prefix":"prontera/ITEM_DROP/","kept":true,"limit":1000}"#),
    );
    assert_eq!(read["states"].as_array().map(Vec::len), Some(300), "{}", read["more"]);
    let one = answered(&backup, kept(r#"{"drop_id":7,"kept":true}"#));
    assert_eq!(one["data"]["drop_id"], 7);
    let other = asked(&backup, kept(r#"{"prefix":"geffen/","kept":true}"#));
    assert_eq!(other.problem.map(|problem| problem.code), Some(Code::NotKept));
    let status = backup.status();
    assert!(
        status
            .leases
            .iter()
            .any(|lease| lease.map == "prontera" && lease.tenure == 2),
        "{status:?}"
    );
}

#[test]
fn a_host_that_keeps_no_copies_has_none() {
    let world = world(60);
    let credentials = [
        world.hub.add_host_of(1, &["prontera"]),
        world.hub.add_host(2),
        world.hub.add_host(3),
    ];
    let _holder = start(&world, &credentials[0]);
    let of = |credential: &str, settings: &str| {
        let config: Config = world.config_of(&world.endpoint(), credential, settings);
        Agent::start(config).expect("starts")
    };
    let without = of(&credentials[1], "keep_backups = no\n");
    let with = of(&credentials[2], "");
    world
        .hub
        .command(&["maps", "rule", "prontera", "--automatic", "no", "--backups", "2"]);
    until("the other one stands by", || {
        with.status()
            .duties
            .iter()
            .any(|duty| duty.role == DutyRole::Backup && duty.copy.is_some_and(|copy| copy.whole))
    });
    assert!(without.status().duties.iter().all(|duty| duty.copy.is_none()));
}

#[test]
fn an_attached_program_hands_over_and_reads_warm_as_the_agent_itself_does() {
    let world = world(60);
    let credentials = [world.hub.add_host_of(1, &["prontera"]), world.hub.add_host(2)];
    let run = |number: usize| {
        let folder = world.folder.path().join(format!("agent-{number}"));
        let mut agent = stack::Agent::new(
            Path::new(PROGRAM),
            &folder,
            &world.endpoint(),
            &credentials[number],
            &[],
        );
        agent.start();
        let text = format!("agent_socket = {}\n", agent.socket().display());
        let config = Config::parse(&text, Path::new(""), |_| None).expect("valid");
        (agent, Attached::start(config).expect("starts"))
    };
    let [(_first, here), (_second, there)] = [run(0), run(1)];
    world
        .hub
        .command(&["maps", "rule", "prontera", "--automatic", "no", "--backups", "1"]);
    until("it holds it", || here.lease("prontera") == LeaseState::Held);
    for number in 0..50 {
        let json = format!("{{\"drop_id\":{number},\"amount\":1}}");
        here.submit(&drop_of(&json)).expect("taken");
    }
    until("the other one stands by", || {
        let duties = there.status().duties;
        duties
            .iter()
            .any(|duty| duty.copy.is_some_and(|copy| copy.whole && copy.states == 50))
    });
    let ended = |attached: &Attached, question: Question| {
        let id = attached.ask(question, false).expect("taken");
        attached.wait(id, Some(PATIENCE))
    };
    let migrated = ended(&here, migrate("prontera", Some(host_id(&credentials[1]))));
    assert_eq!(migrated.state, OperationState::Applied, "{migrated:?}");
    until("it is to be ended", || {
        here.lease("prontera") == LeaseState::HandingOver
    });
    let last = here.submit(&drop_of(r#"{"drop_id":50,"amount":1}"#)).expect("taken");
    let released = ended(&here, release("prontera"));
    assert_eq!(released.state, OperationState::Applied, "{released:?}");
    assert_eq!(here.wait(last, Some(PATIENCE)).state, OperationState::Applied);
    until("the other one has it", || there.lease("prontera") == LeaseState::Held);
    let read = ended(&there, kept(r#"{"prefix":"prontera/","kept":true,"limit":1000}"#));
    let read: Value = serde_json::from_str(read.data.as_deref().unwrap_or_default()).expect("an answer");
    assert_eq!(read["states"].as_array().map(Vec::len), Some(51));
    until("it has lost it", || here.lease("prontera") == LeaseState::Lost);
    assert_eq!(in_limbo(&world), 0);
}

#[test]
fn who_leaves_hands_its_maps_over_and_ends_with_nothing_left_behind() {
    let world = world(60);
    let credentials = [world.hub.add_host_of(1, &["prontera", "geffen"]), world.hub.add_host(2)];
    let folder = world.folder.path().join("leaving");
    let mut leaving = stack::Agent::new(Path::new(PROGRAM), &folder, &world.endpoint(), &credentials[0], &[]);
    leaving.start();
    let other = start(&world, &credentials[1]);
    for map in ["prontera", "geffen"] {
        until("it holds it", || {
            let status = leaving.ask(serde_json::json!({ "do": "status" }));
            status["leases"].as_array().is_some_and(|leases| {
                leases
                    .iter()
                    .any(|lease| lease["map"] == map && lease["state"] == "HELD")
            })
        });
        assert!(leaving.submit(1, &dropped(map, 1)));
    }
    // One goes where it can go; the other one nobody takes but the hub itself.
    let successor = host_id(&credentials[1]).to_string();
    world
        .hub
        .command(&["maps", "rule", "prontera", "--automatic", "yes", "--hosts", &successor]);
    let left = Command::new(PROGRAM)
        .args(["agent", "leave", "--timeout", "80", "--config"])
        .arg(leaving.config())
        .output()
        .expect("the program runs");
    let told = String::from_utf8_lossy(&left.stderr);
    assert!(left.status.success(), "{told}");
    until("its process has ended", || {
        !Path::new(&format!("/proc/{}/fd/0", leaving.pid())).exists()
    });
    until("the other one has it", || other.lease("prontera") == LeaseState::Held);
    let held = world.rows(
        "SELECT map FROM p2p_sync.host_assignments WHERE host_id = $1",
        &[&host_id(&credentials[0])],
    );
    assert!(held.is_empty(), "{told}");
    assert_eq!(in_limbo(&world), 0);
    let drops: HashSet<String> = world
        .held()
        .states
        .into_keys()
        .filter(|path| path.contains("ITEM_DROP"))
        .collect();
    assert_eq!(drops.len(), 2, "{drops:?}");
}

#[test]
fn a_host_tells_how_it_is_and_what_its_program_says_of_it_stands_beside_that() {
    let world = world(60);
    let credential = world.hub.add_host_of(1, &["prontera"]);
    let settings = "metrics_interval_seconds = 1\nupload_limit_kbps = 5000\n";
    let agent = Agent::start(world.config_of(&world.endpoint(), &credential, settings)).expect("starts");
    let host = host_id(&credential);
    let payload = || -> Option<Value> {
        let sql = "SELECT payload::text FROM p2p_sync.states WHERE path = $1";
        let path = format!("@host/{host}/HOST_METRICS");
        let rows = world.rows(sql, &[&path]);
        serde_json::from_str(rows.first()?.get::<_, &str>(0)).ok()
    };
    until("it has told of itself", || {
        payload().is_some_and(|told| told["maps"] == 1)
    });
    let told = payload().expect("told");
    for member in [
        "cpu_percent",
        "cpu_cores",
        "ram_total_mb",
        "ram_free_mb",
        "upload_used_kbps",
        "latency_ms",
    ] {
        assert!(told[member].is_number(), "{member}: {told}");
    }
    assert_eq!(
        (&told["upload_kbps"], &told["disconnects"]),
        (&5000.into(), &0.into()),
        "{told}"
    );
    let own = Submission {
        data_type: SyncDataType::HostMetrics,
        map: "",
        account_id: 0,
        ..chat(r#"{"players":12,"maps":99}"#)
    };
    agent.submit(&own).expect("taken");
    until("both stand together", || {
        payload().is_some_and(|told| told["players"] == 12 && told["maps"] == 1 && told["cpu_cores"].is_number())
    });
}
