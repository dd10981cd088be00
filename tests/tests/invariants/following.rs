//! Streams that are followed, questions asked in the background, and what the agent tells of both.

use std::{
    collections::HashSet,
    ffi::OsString,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use p2p_sync_agent::{Agent, AgentEvent, OperationState, Question, Submission, Subscription};
use p2p_sync_proto::{
    Code,
    v1::{State, SyncDataType},
};
use p2p_sync_tests::{faulty_link::FaultyLink, stack};
use serde_json::Value;

use crate::world::{PATIENCE, PROGRAM, World, chat, drop_of, until};

/// Half of them are more than wait to be taken at one time.
const MESSAGES: u64 = 3000;
/// What a question is given, and the time that a busy machine takes for its own: the agent's threads come last there.
const ANSWERED_WITHIN: Duration = Duration::from_secs(30);

fn all_of(stream: &str) -> Subscription {
    Subscription {
        stream: stream.to_owned(),
        types: vec![],
        path_prefix: String::new(),
    }
}

/// The next event; the link's are passed over.
fn next(agent: &Agent) -> AgentEvent {
    let mut taken = None;
    until("there is an event", || {
        agent.wait_for_event(Duration::from_millis(100));
        taken = agent.next_event(|_| true);
        matches!(taken, Some(AgentEvent::Update { .. } | AgentEvent::Settled { .. }))
    });
    taken.expect("waited for")
}

fn next_update(agent: &Agent) -> (State, bool) {
    match next(agent) {
        AgentEvent::Update { state, snapshot, .. } => (state, snapshot),
        other => panic!("not an update: {other:?}"),
    }
}

fn number_of(state: &State) -> u64 {
    let data: Value = serde_json::from_slice(&state.payload).expect("JSON");
    data["number"].as_u64().expect("each has its number")
}

fn say(agent: &Agent, numbers: std::ops::Range<u64>) {
    for number in numbers {
        let submitted = agent.submit(&chat(&format!(r#"{{"char_id":1,"text":"hi","number":{number}}}"#)));
        submitted.expect("taken");
        let moved = agent.submit(&drop_of(&format!(r#"{{"drop_id":{},"number":{number}}}"#, number % 10)));
        moved.expect("taken");
    }
    assert!(agent.flush(PATIENCE));
}

#[test]
fn invariant_08_a_slow_subscriber_sees_every_change_once_and_in_order_across_a_restart_of_the_hub() {
    let mut world = World::new();
    let [writer, reader] = [(); 2].map(|()| Agent::start(world.config("")).expect("starts"));
    let subscription = reader.subscribe(all_of("prontera")).expect("taken");
    say(&writer, 0..MESSAGES / 2);
    let mut seen = Vec::new();
    while seen.len() < 100 {
        seen.push(next_update(&reader));
    }
    world.hub.kill();
    // What waits to be taken, and what the stream's window had carried behind it.
    while let Some(event) = reader.next_event(|_| true) {
        if let AgentEvent::Update { state, snapshot, .. } = event {
            seen.push((state, snapshot));
        }
    }
    world.hub.start();
    say(&writer, MESSAGES / 2..MESSAGES);
    let is_last = |(state, _): &(State, bool)| state.path.contains("CHAT") && number_of(state) == MESSAGES - 1;
    while !seen.iter().rev().take(1).any(is_last) {
        seen.push(next_update(&reader));
    }

    let sequences: Vec<u64> = seen.iter().map(|(state, _)| state.stream_sequence).collect();
    assert!(sequences.is_sorted_by(|a, b| a < b), "out of order, or twice");
    let chats = seen.iter().filter(|(state, _)| state.path == "prontera/CHAT_MESSAGE/1");
    let numbers: Vec<u64> = chats.map(|(state, _)| number_of(state)).collect();
    assert_eq!(numbers, (0..MESSAGES).collect::<Vec<_>>(), "each message, in order");
    let snapshots: Vec<usize> = (0..seen.len()).filter(|&at| seen[at].1).collect();
    assert_eq!(snapshots, [0], "one snapshot, at the beginning");

    let newest: HashSet<(String, i64)> = world
        .rows(
            "SELECT path, stream_sequence FROM p2p_sync.states WHERE path LIKE '%DROP%'",
            &[],
        )
        .iter()
        .map(|row| (row.get(0), row.get(1)))
        .collect();
    let last_seen = seen
        .into_iter()
        .map(|(state, _)| (state.path, state.stream_sequence.cast_signed()));
    let last_seen: HashSet<(String, i64)> = last_seen.collect();
    // The last drop may have been committed behind the last message.
    let missing = newest.difference(&last_seen).count();
    let rest: Vec<_> = (0..missing).map(|_| next_update(&reader)).collect();
    let rest = rest
        .into_iter()
        .map(|(state, _)| (state.path, state.stream_sequence.cast_signed()));
    assert!(
        newest.is_subset(&last_seen.into_iter().chain(rest).collect()),
        "the newest of each path"
    );

    reader.unsubscribe(subscription);
    writer
        .submit_critical(&chat(r#"{"char_id":1,"number":0}"#))
        .expect("taken");
    reader.wait_for_event(Duration::from_secs(1));
    let told = std::iter::from_fn(|| reader.next_event(|_| true));
    let after: Vec<_> = told
        .filter(|event| matches!(event, AgentEvent::Update { .. }))
        .collect();
    assert!(after.is_empty(), "told after its end: {after:?}");
}

#[test]
fn invariant_08_a_hub_whose_database_went_back_begins_a_snapshot_and_says_so() {
    let world = World::new();
    let agent = Agent::start(world.config("")).expect("starts");
    agent.subscribe(all_of("prontera")).expect("taken");
    say(&agent, 0..3);
    let mut before = vec![next_update(&agent)];
    assert!(before[0].1, "the first begins a snapshot");
    while before.len() < 6 {
        before.push(next_update(&agent));
    }
    let went_back = "UPDATE p2p_sync.hub SET timeline = timeline + 1 RETURNING timeline";
    world.rows(went_back, &[]);
    // What is read from the database has the form that Postgres gives it.
    let shape = |state: &State| (state.path.clone(), state.stream_sequence, number_of(state));
    for (number, (state, _)) in before.into_iter().enumerate() {
        let (again, snapshot) = next_update(&agent);
        assert_eq!((shape(&again), snapshot), (shape(&state), number == 0));
    }
}

#[test]
fn types_and_a_prefix_choose_what_is_told_of_a_stream() {
    let world = World::new();
    let agent = Agent::start(world.config("")).expect("starts");
    let subscription = Subscription {
        types: vec![SyncDataType::ItemDrop],
        path_prefix: "prontera/ITEM_DROP/3".to_owned(),
        ..all_of("prontera")
    };
    agent.subscribe(subscription).expect("taken");
    say(&agent, 0..10);
    agent.submit(&drop_of(r#"{"drop_id":33,"number":33}"#)).expect("taken");
    let paths = [(); 2].map(|()| next_update(&agent).0.path);
    assert_eq!(paths, ["prontera/ITEM_DROP/3", "prontera/ITEM_DROP/33"]);
}

fn read(data_type: SyncDataType, request: &str) -> Question {
    Question::Read {
        data_type,
        map: "prontera".to_owned(),
        account_id: 0,
        request: request.to_owned(),
    }
}

#[test]
fn a_question_is_answered_under_its_id_and_told_of_as_an_operation_is() {
    let world = World::new();
    let agent = Agent::start(world.config("")).expect("starts");
    let submission = Submission {
        notify: true,
        ..drop_of(r#"{"drop_id":7,"amount":2}"#)
    };
    let operation = agent.submit(&submission).expect("taken");
    let AgentEvent::Settled { operation_id, settled } = next(&agent) else {
        panic!("not told of");
    };
    assert_eq!((operation_id, settled.state), (operation, OperationState::Applied));

    let question = agent
        .ask(read(SyncDataType::ItemDrop, r#"{"drop_id":7}"#), true)
        .expect("taken");
    let answered = agent.wait(question, Some(PATIENCE));
    assert_eq!(answered.state, OperationState::Applied, "{answered:?}");
    let data: Value = serde_json::from_str(answered.data.as_deref().expect("data")).expect("JSON");
    assert_eq!(
        (&data["path"], &data["data"]["amount"]),
        (&"prontera/ITEM_DROP/7".into(), &2.into())
    );
    let AgentEvent::Settled { operation_id, settled } = next(&agent) else {
        panic!("not told of");
    };
    assert_eq!((operation_id, settled.data), (question, answered.data));

    let ask = |request: &str| {
        let id = agent.ask(read(SyncDataType::ItemDrop, request), false).expect("taken");
        agent.wait(id, Some(PATIENCE))
    };
    let page = ask(r#"{"prefix":"prontera/","limit":1}"#).data.expect("data");
    let page: Value = serde_json::from_str(&page).expect("JSON");
    assert_eq!(
        (page["states"][0]["path"].as_str(), &page["more"]),
        (Some("prontera/ITEM_DROP/7"), &true.into())
    );
    let missing = ask(r#"{"entity":"8"}"#);
    assert_eq!(missing.state, OperationState::Rejected);
    assert_eq!(missing.problem.expect("says why").code, Code::NotFound);
    let told = std::iter::from_fn(|| agent.next_event(|_| true));
    let unasked: Vec<_> = told
        .filter(|event| !matches!(event, AgentEvent::LinkUp | AgentEvent::LinkDown { .. }))
        .collect();
    assert!(unasked.is_empty(), "{unasked:?}");
}

#[test]
fn what_is_followed_is_read_without_the_hub_as_it_was_pushed() {
    let mut world = World::new();
    let agent = Agent::start(world.config("")).expect("starts");
    let ask = |request: &str| {
        let id = agent.ask(read(SyncDataType::ItemDrop, request), false).expect("taken");
        agent.result(id)
    };
    let code = |request: &str| ask(request).problem.map(|problem| problem.code);
    let here = r#"{"drop_id":7,"kept":true}"#;
    assert_eq!(code(here), Some(Code::NotKept), "nothing is followed");
    let subscription = agent.subscribe(all_of("prontera")).expect("taken");
    say(&agent, 0..20);
    let is_newest = |answer: &p2p_sync_agent::Settled| {
        let data = answer.data.as_deref().unwrap_or_default();
        let data: Value = serde_json::from_str(data).unwrap_or_default();
        data["data"]["number"] == 17
    };
    until("the newest was pushed", || is_newest(&ask(here)));
    world.hub.kill();
    assert!(is_newest(&ask(here)), "answered without a hub");
    assert_eq!(code(r#"{"drop_id":77,"kept":true}"#), Some(Code::NotFound));
    assert_eq!(code(r#"{"path":"geffen/MAP_STATE","kept":true}"#), Some(Code::NotKept));
    until("it is not trusted for long", || code(here) == Some(Code::NotKept));
    agent.unsubscribe(subscription);
}

#[test]
fn a_question_without_a_hub_is_rejected_within_its_time() {
    let world = World::not_started();
    let black_hole = FaultyLink::to(&world.endpoint());
    black_hole.swallow();
    for endpoint in [world.endpoint(), black_hole.endpoint()] {
        let agent = Agent::start(world.config_at(&endpoint, "")).expect("starts");
        let begun = Instant::now();
        let id = agent.ask(read(SyncDataType::MapState, ""), false).expect("taken");
        assert!(begun.elapsed() < Duration::from_millis(250), "asking waits");
        let settled = agent.wait(id, Some(ANSWERED_WITHIN));
        let code = settled.problem.map(|problem| problem.code);
        assert_eq!(
            (settled.state, code),
            (OperationState::Rejected, Some(Code::HubUnavailable))
        );
    }
}

/// The threads of this process' agents.
fn agent_threads() -> HashSet<OsString> {
    let tasks = std::fs::read_dir("/proc/self/task").expect("readable").flatten();
    let of_agents = tasks.filter(|task| {
        // Gone already is none.
        let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        name.starts_with("p2p-")
    });
    of_agents.map(|task| task.file_name()).collect()
}

#[test]
fn shutting_down_settles_every_question_and_ends_every_thread() {
    let world = World::not_started();
    let black_hole = FaultyLink::to(&world.endpoint());
    black_hole.swallow();
    let agent = Agent::start(world.config_at(&black_hole.endpoint(), "")).expect("starts");
    agent.subscribe(all_of("prontera")).expect("taken");
    let asked: Vec<_> = std::iter::from_fn(|| agent.ask(read(SyncDataType::MapState, ""), true).ok()).collect();
    assert_eq!(asked.len(), 256, "as many as may be unanswered");
    let refused = agent.ask(read(SyncDataType::MapState, ""), true).expect_err("too many");
    assert_eq!(refused.code, Code::QueueFull);
    // Each takes its name once it runs: the one at the outbox, and two of the link.
    until("its threads run", || agent_threads().len() >= 3);
    let threads = agent_threads();
    agent.shutdown().expect("nothing is lost");
    for id in &asked {
        let code = agent.wait(*id, None).problem.map(|problem| problem.code);
        assert_eq!(code, Some(Code::ShutDown));
    }
    let told = std::iter::from_fn(|| agent.next_event(|_| true));
    let told = told.filter(|event| matches!(event, AgentEvent::Settled { .. }));
    assert_eq!(told.count(), asked.len());
    let codes = [
        agent
            .ask(read(SyncDataType::MapState, ""), false)
            .expect_err("over")
            .code,
        agent.subscribe(all_of("prontera")).expect_err("over").code,
    ];
    assert_eq!(codes, [Code::ShutDown; 2]);
    until("every thread has ended", || agent_threads().is_disjoint(&threads));
}

#[test]
fn the_link_is_told_of_when_it_comes_and_goes() {
    let mut world = World::new();
    let agent = Agent::start(world.config("")).expect("starts");
    let told = || {
        assert!(agent.wait_for_event(PATIENCE), "nothing is told");
        agent.next_event(|_| true).expect("waited for")
    };
    assert!(matches!(told(), AgentEvent::LinkUp));
    world.hub.kill();
    let event = told();
    assert!(
        matches!(&event, AgentEvent::LinkDown { problem } if problem.code == Code::HubUnavailable),
        "{event:?}"
    );
    world.hub.start();
    until("the link is up", || agent.status().link_up);
    world.hub.kill();
    until("the link is down", || !agent.status().link_up);
    world.hub.start();
    until("the link is up", || agent.status().link_up);
    assert!(matches!(told(), AgentEvent::LinkUp), "the last truth alone");
    assert!(agent.next_event(|_| true).is_none());
}

/// A watch, and the paths of its first lines.
fn watched(config: &Path, lines: usize) -> (Child, Vec<String>) {
    let mut child = Command::new(PROGRAM)
        .args(["agent", "watch", "prontera", "--type", "ITEM_DROP", "--config"])
        .arg(config)
        .stdout(Stdio::piped())
        .spawn()
        .expect("the program runs");
    let output = BufReader::new(child.stdout.take().expect("piped")).lines();
    let states = output
        .take(lines)
        .map(|line| serde_json::from_str(&line.expect("a line")));
    let states: Vec<Value> = states.collect::<Result<_, _>>().expect("JSON");
    assert_eq!(states[0]["snapshot"], true);
    let path = |state: &Value| state["path"].as_str().expect("a path").to_owned();
    (child, states.iter().map(path).collect())
}

#[test]
fn a_stream_can_be_watched_through_the_running_agent_and_without_one() {
    let world = World::new();
    let writer = Agent::start(world.config("")).expect("starts");
    say(&writer, 0..3);
    let credential = world.hub.add_host(1);
    let folder = world.folder.path().join("watcher");
    let mut agent = stack::Agent::new(Path::new(PROGRAM), &folder, &world.endpoint(), &credential, &[]);
    let paths = [0, 1, 2].map(|number| format!("prontera/ITEM_DROP/{number}"));

    let (mut alone, seen) = watched(agent.config(), 3);
    assert_eq!(seen, paths);
    alone.kill().expect("it runs");
    alone.wait().expect("it is our child");

    agent.start();
    agent.ask(serde_json::json!({"do": "status"}));
    let (mut through, seen) = watched(agent.config(), 3);
    assert_eq!(seen, paths);
    let refused = agent.ask(serde_json::json!({"do": "watch", "stream": "prontera"}));
    assert_eq!(refused["label"], "BAD_REQUEST", "{refused}");
    agent.stop();
    assert!(
        !through.wait().expect("it is our child").success(),
        "the agent it watched through has ended"
    );
}
