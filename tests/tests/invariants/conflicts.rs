//! The operator edits what hosts write: through the whole system, agents and operator's commands included.

use std::{
    path::Path,
    thread,
    time::{Duration, Instant},
};

use p2p_sync_agent::{
    Agent, AgentEvent, Attached, Config, LeaseState, OperationState, Question, Settled, Submission, Subscription,
};
use p2p_sync_proto::{Code, keys::Credential, path, v1::SyncDataType};
use p2p_sync_tests::{
    recording::Happening,
    services::{database, shared_redis_url},
    stack,
};
use serde_json::{Value, json};

use crate::world::{PATIENCE, PROGRAM, World, chat, drop_of, run, until};

const PATH: &str = "prontera/ITEM_DROP/7";
/// As long as a cache may be behind an edit, with room for a busy machine; states are cached for a minute.
const SEEN_WITHIN: Duration = Duration::from_secs(30);

fn amount(amount: u32) -> String {
    format!("{{\"drop_id\":7,\"amount\":{amount}}}")
}

fn settled(agent: &Agent, submission: &Submission<'_>) -> Settled {
    let id = agent.submit(submission).expect("taken");
    agent.wait(id, Some(PATIENCE))
}

/// `applied`, or the code of the refusal.
fn wrote(agent: &Agent, number: u32) -> &'static str {
    told(&settled(agent, &drop_of(&amount(number))))
}

fn told(settled: &Settled) -> &'static str {
    match (&settled.state, &settled.problem) {
        (OperationState::Applied, None) => "applied",
        (_, Some(problem)) => problem.code.label(),
        other => panic!("{other:?}"),
    }
}

impl World {
    /// The operator writes an amount; gives the edit's number.
    fn edit(&self, number: u32) -> u64 {
        let told = self.hub.command(&["ops", "put", PATH, "--data", &amount(number)]);
        let number = told
            .strip_prefix(&format!("{PATH} edit="))
            .expect("the path and the edit");
        number.parse().expect("a number")
    }

    fn amount(&self, path: &str) -> i64 {
        let amount = "SELECT (payload ->> 'amount')::bigint FROM p2p_sync.states WHERE path = $1";
        self.rows(amount, &[&path])[0].get(0)
    }
}

fn parsed(text: &str) -> path::Path {
    path::Path::parse(text).expect("a path")
}

fn read_amount(agent: &Agent) -> i64 {
    let state = agent
        .get(&parsed(PATH), Some(PATIENCE))
        .expect("serves")
        .expect("there");
    let data: Value = serde_json::from_slice(&state.payload).expect("JSON");
    data["amount"].as_i64().expect("a number")
}

#[test]
fn invariant_03_an_edit_conflicts_once_with_a_host_that_does_not_know_of_it_and_never_with_one_that_does() {
    let world = World::new();
    let config = world.config("sync_interval_ms = 5\n");
    let agent = Agent::start(config.clone()).expect("starts");
    assert_eq!(wrote(&agent, 1), "applied");
    let edit = world.edit(30);
    assert_eq!(wrote(&agent, 2), Code::Conflict.label());
    assert_eq!(world.amount(PATH), 30, "the operator's stays");
    let listed = world.hub.command(&["ops", "conflicts"]);
    assert!(
        listed.contains(PATH) && listed.contains(&format!("edit={edit} rule=hub settled operations=1")),
        "{listed}"
    );
    assert_eq!(world.hub.command(&["ops", "conflicts", "--open"]), "");
    let id = listed.split(' ').next().expect("a number");
    let shown = world.hub.command(&["ops", "conflicts", "show", id]);
    let lines: Vec<&str> = shown.lines().map(str::trim).collect();
    assert!(lines[2].starts_with("hub:") && lines[2].contains("30"), "{shown}");
    assert!(
        lines[3].starts_with("host:") && lines[3].contains("\"amount\": 2"),
        "{shown}"
    );
    assert!(lines[4].ends_with("(unchanged since)"), "{shown}");

    assert_eq!(wrote(&agent, 3), "applied", "it was told");
    let shown = world.hub.command(&["ops", "conflicts", "show", id]);
    assert!(
        shown.contains("\"amount\": 3") && shown.contains("(written by a host since)"),
        "{shown}"
    );
    agent.shutdown().expect("ends");
    let agent = Agent::start(config.clone()).expect("starts");
    assert_eq!(wrote(&agent, 4), "applied", "and the next start knows");

    // An operator who looks at nothing but the command, and a hub that has the state of before in its cache.
    world.edit(31);
    let begun = Instant::now();
    until("a reader sees the edit", || read_amount(&agent) == 31);
    assert!(begun.elapsed() < SEEN_WITHIN, "after {:?}", begun.elapsed());
    agent.shutdown().expect("ends");
    let agent = Agent::start(config).expect("starts");
    assert_eq!(wrote(&agent, 5), "applied", "it was read, before the start");
    let edited = world.edit(32);
    assert_eq!(wrote(&agent, 6), Code::Conflict.label());
    assert_eq!(world.count("SELECT count(*) FROM p2p_sync.conflicts"), 2);

    let id = world.hub.command(&["ops", "conflicts"]).lines().count().to_string();
    let resolved = world
        .hub
        .command(&["ops", "conflicts", "resolve", &id, "--take", "host"]);
    assert_eq!(resolved, format!("{id} resolved"));
    assert_eq!(world.amount(PATH), 6);
    let refused = world
        .hub
        .fails(&["ops", "conflicts", "resolve", &id, "--data", "{\"amount\":99999}"]);
    assert!(refused.contains("30000"), "{refused}");
    world
        .hub
        .command(&["ops", "conflicts", "resolve", &id, "--data", &amount(33)]);
    assert_eq!(world.amount(PATH), 33);
    assert_eq!(
        wrote(&agent, 7),
        Code::Conflict.label(),
        "it knows of edit {edited} alone"
    );
    assert_eq!(wrote(&agent, 8), "applied");

    world.hub.command(&["ops", "delete", PATH]);
    assert_eq!(wrote(&agent, 9), Code::Conflict.label());
    assert!(world.hub.fails(&["ops", "delete", PATH]).contains("there is no state"));
    assert_eq!(wrote(&agent, 10), "applied");
}

#[test]
fn what_the_operator_writes_is_checked_as_what_hosts_write_is() {
    let world = World::new();
    for (path, data, part) in [
        (PATH, "{\"amount\":40000}", "30000"),
        (PATH, "{\"amount\":", "JSON"),
        (PATH, "{\"amount\":1,\"amount\":2}", "amount"),
        ("prontera/ITEM_DRP/7", "{}", "ITEM_DRP"),
        ("@char/7/ITEM_DROP/7", "{}", "map"),
        ("prontera/MONSTER_DATA/7", "{\"hp\":2,\"max_hp\":1}", "hp"),
        ("nowhere", "{}", "path"),
    ] {
        let refused = world.hub.fails(&["ops", "put", path, "--data", data]);
        assert!(refused.contains(part), "{path} {data}: {refused}");
    }
    assert_eq!(world.count("SELECT count(*) FROM p2p_sync.states"), 0);
    let told = world.hub.command(&[
        "ops",
        "put",
        "@char/7/PLAYER_DATA",
        "--data",
        "{\"level\":9}",
        "--account-id",
        "2000001",
    ]);
    assert_eq!(told, "@char/7/PLAYER_DATA edit=1");
    assert_eq!(
        world.count("SELECT account_id FROM p2p_sync.states WHERE stream = '@player'"),
        2_000_001
    );
}

#[test]
fn an_edit_is_seen_by_who_asks_scans_or_takes_an_update_and_by_nobody_before() {
    let world = World::new();
    let agent = Agent::start(world.config("sync_interval_ms = 5\n")).expect("starts");
    let scan = || {
        let question = Question::Read {
            data_type: SyncDataType::ItemDrop,
            map: String::new(),
            account_id: 0,
            request: "{\"prefix\":\"prontera/ITEM_DROP/\"}".to_owned(),
        };
        let id = agent.ask(question, false).expect("room");
        let answer = agent.wait(id, Some(PATIENCE)).data.expect("an answer");
        serde_json::from_str::<Value>(&answer).expect("JSON")
    };
    assert_eq!(wrote(&agent, 1), "applied");
    assert_eq!(scan()["states"][0]["hub_edit"], 0);
    let edit = world.edit(30);
    assert_eq!(scan()["states"][0]["hub_edit"], edit);
    assert_eq!(wrote(&agent, 2), "applied");

    let follow = |types: Vec<SyncDataType>| Subscription {
        stream: "prontera".to_owned(),
        types,
        path_prefix: String::new(),
    };
    let take_all = || {
        let mut edits = Vec::new();
        while let Some(event) = agent.next_event(|_| true) {
            if let AgentEvent::Update { state, .. } = event {
                edits.push(state.hub_edit);
            }
        }
        edits
    };
    // Of another type: what it is not told it does not see.
    let other = agent.subscribe(follow(vec![SyncDataType::NpcState])).expect("room");
    world.edit(31);
    thread::sleep(Duration::from_secs(1));
    assert!(take_all().is_empty());
    assert_eq!(wrote(&agent, 3), Code::Conflict.label());
    agent.unsubscribe(other);
    agent.subscribe(follow(vec![])).expect("room");
    let edit = world.edit(32);
    let mut seen = Vec::new();
    until("the edit is told", || {
        seen.extend(take_all());
        seen.last() == Some(&edit)
    });
    assert_eq!(wrote(&agent, 4), "applied");
    until("the write is told", || !take_all().is_empty());
    world.edit(33);
    until("there is an update", || {
        agent.wait_for_event(Duration::from_millis(100))
    });
    assert_eq!(wrote(&agent, 5), Code::Conflict.label(), "it was not taken");
}

#[test]
fn an_attached_program_is_known_to_have_seen_what_it_read_and_people_are_others() {
    let world = World::new();
    let folder = world.folder.path().join("agent");
    let credential = world.hub.add_host(1);
    let mut agent = stack::Agent::new(Path::new(PROGRAM), &folder, &world.endpoint(), &credential, &[]);
    agent.start();
    let text = format!("agent_socket = {}\n", agent.socket().display());
    let attached = Attached::start(Config::parse(&text, Path::new(""), |_| None).expect("valid")).expect("starts");
    until("it is there", || attached.status().link_up);
    let wrote = |number| {
        let id = attached.submit(&drop_of(&amount(number))).expect("taken");
        told(&attached.wait(id, Some(PATIENCE)))
    };
    let follows = |edit: u64| {
        until("it sees the edit", || {
            let state = attached.get(&parsed(PATH), Some(PATIENCE));
            state.is_ok_and(|state| state.is_some_and(|state| state.hub_edit == edit))
        });
    };
    assert_eq!(wrote(1), "applied");
    world.edit(30);
    assert_eq!(wrote(2), Code::Conflict.label());
    assert_eq!(wrote(3), "applied", "it was told");
    follows(world.edit(31));
    assert_eq!(wrote(4), "applied", "it was read");
    follows(world.edit(32));
    agent.kill();
    agent.start();
    assert_eq!(wrote(5), "applied", "it was read before the agent was killed");
    agent.stop();
    agent.start();
    assert_eq!(wrote(6), "applied");

    let edit = world.edit(33);
    until("a person at the agent sees it", || {
        agent.ask(json!({"do": "scan", "prefix": PATH}))["states"][0]["hub_edit"] == edit
    });
    assert_eq!(wrote(7), Code::Conflict.label());
    assert_eq!(wrote(8), "applied");
    // Who reads and writes by the same lines knows what it read.
    let edit = world.edit(34);
    until("a script sees it", || {
        agent.ask(json!({"do": "scan", "prefix": PATH}))["states"][0]["hub_edit"] == edit
    });
    let happening = Happening {
        at_ms: 0,
        data_type: SyncDataType::ItemDrop,
        map: "prontera".to_owned(),
        account_id: 0,
        entity: None,
        payload: Some(amount(9)),
    };
    agent.submit(1_000_000, &happening);
    assert!(agent.flush(PATIENCE));
    assert_eq!(world.amount(PATH), 9);

    let subscription = Subscription {
        stream: "prontera".to_owned(),
        types: vec![],
        path_prefix: String::new(),
    };
    attached.subscribe(subscription).expect("room");
    let edit = world.edit(35);
    until(
        "the update is taken",
        || matches!(attached.next_event(|_| true), Some(AgentEvent::Update { state, .. }) if state.hub_edit == edit),
    );
    let (here, there) = (amount(10), amount(11));
    let members = [
        drop_of(&here),
        Submission {
            map: "geffen",
            ..drop_of(&there)
        },
    ];
    let id = attached.submit_group(&members, false).expect("taken");
    assert_eq!(told(&attached.wait(id, Some(PATIENCE))), "applied");
}

#[test]
fn each_type_has_its_rule_and_a_group_that_of_its_strictest_member() {
    let database = run(database());
    let types = tempfile::NamedTempFile::new().expect("a file can be made");
    let rule = |name: &str, key: &str, conflict: &str| {
        format!("[{name}]\nowner = \"map\"\nkeep = \"latest\"\nentity_key = \"{key}\"\nconflict = \"{conflict}\"\n")
    };
    let text = "version = 2\n".to_owned()
        + &rule("NPC_STATE", "npc_id", "host")
        + &rule("MONSTER_DATA", "monster_id", "newest")
        + &rule("ITEM_DROP", "drop_id", "both");
    std::fs::write(types.path(), text).expect("writes");
    let settings = [("types_file", types.path().display().to_string())];
    let mut world = World::on(database.url(), &shared_redis_url(), &settings);
    world.hub.start();
    let agent = Agent::start(world.config("sync_interval_ms = 5\n")).expect("starts");
    until("it has the policies", || agent.status().policy_version == 2);
    let operation = |data_type, payload| Submission {
        data_type,
        ..drop_of(payload)
    };
    let npc = |payload| operation(SyncDataType::NpcState, payload);
    let monster = |payload| operation(SyncDataType::MonsterData, payload);
    let put = |path: &str, data: &str| world.hub.command(&["ops", "put", path, "--data", data]);
    let amount_at = |path: &str| world.amount(path);
    for (of, path) in [
        (
            &npc as &dyn Fn(&'static str) -> Submission<'static>,
            "prontera/NPC_STATE/7",
        ),
        (&monster, "prontera/MONSTER_DATA/7"),
    ] {
        put(path, "{\"amount\":30}");
        let json = "{\"npc_id\":7,\"monster_id\":7,\"amount\":1}";
        assert_eq!(told(&settled(&agent, &of(json))), "applied", "{path}");
        assert_eq!(amount_at(path), 1);
        // It was told with the first.
        assert_eq!(told(&settled(&agent, &of(json))), "applied");
        let conflicts = "SELECT sum(operations)::bigint FROM p2p_sync.conflicts WHERE path = $1";
        assert_eq!(world.rows(conflicts, &[&path])[0].get::<_, i64>(0), 1, "{path}");
    }
    assert_eq!(world.hub.command(&["ops", "conflicts", "--open"]), "");

    put(PATH, &amount(30));
    assert_eq!(wrote(&agent, 1), Code::Conflict.label());
    let open = world.hub.command(&["ops", "conflicts", "--open"]);
    assert!(open.contains("rule=both open"), "{open}");
    let id = open.split(' ').next().expect("a number");
    world.hub.command(&["ops", "conflicts", "resolve", id, "--take", "hub"]);
    assert_eq!(world.hub.command(&["ops", "conflicts", "--open"]), "");
    assert_eq!(wrote(&agent, 2), Code::Conflict.label(), "that was an edit");
    assert_eq!(wrote(&agent, 3), "applied");

    // The member that is as the host wills goes the way of the one that is not.
    put("prontera/NPC_STATE/7", "{\"amount\":31}");
    put(PATH, &amount(31));
    let drop = amount(4);
    let members = [npc("{\"npc_id\":7,\"amount\":4}"), drop_of(&drop)];
    let trade = || {
        let id = agent.submit_group(&members, false).expect("taken");
        told(&agent.wait(id, Some(PATIENCE)))
    };
    assert_eq!(trade(), Code::Conflict.label());
    assert_eq!((amount_at("prontera/NPC_STATE/7"), amount_at(PATH)), (31, 31));
    assert_eq!(trade(), "applied", "it was told of both");
    let open = world.hub.command(&["ops", "conflicts", "--open"]);
    // The newest is listed first.
    let id = open.split(' ').next().expect("a number");
    let refused = world.hub.fails(&["ops", "conflicts", "resolve", id, "--data", "{}"]);
    assert!(refused.contains("taken whole"), "{refused}");
    world.hub.command(&["ops", "conflicts", "resolve", id, "--take", "hub"]);
    assert_eq!((amount_at("prontera/NPC_STATE/7"), amount_at(PATH)), (31, 31));
}

#[test]
fn after_a_merge_from_limbo_the_maps_holder_conflicts_once_and_writes_on() {
    let world = World::governed(60);
    let credentials = [world.hub.add_host_of(1, &["prontera"]), world.hub.add_host(2)];
    let agents = credentials.each_ref().map(|credential| {
        let config = world.config_of(&world.endpoint(), credential, "sync_interval_ms = 5\n");
        Agent::start(config).expect("starts")
    });
    until("the first one holds it", || {
        agents[0].lease("prontera") == LeaseState::Held
    });
    let second = Credential::parse(&credentials[1]).expect("the hub gave it").host_id;
    world.hub.command(&["maps", "force", "prontera", &second.to_string()]);
    let late = settled(&agents[0], &drop_of(&amount(5)));
    assert_eq!(late.state, OperationState::Limbo);
    until("the second one holds it", || {
        agents[1].lease("prontera") == LeaseState::Held
    });
    assert_eq!(wrote(&agents[1], 1), "applied");
    let listed = world.hub.command(&["limbo", "list"]);
    world
        .hub
        .command(&["limbo", "merge", listed.split(' ').next().expect("a number")]);
    assert_eq!(world.amount(PATH), 5);
    assert_eq!(wrote(&agents[1], 2), Code::Conflict.label());
    for number in 3..6 {
        assert_eq!(wrote(&agents[1], number), "applied");
    }
    assert_eq!(world.amount(PATH), 5, "the last that was written");
    // Its own chat is another path.
    assert_eq!(told(&settled(&agents[1], &chat("{\"char_id\":1}"))), "applied");
}
