//! The socket that local programs reach an agent by: who may come in, garbage, lines sent twice, and the commands that look
//! after an agent. No hub is needed.

use std::{
    io::{BufRead as _, BufReader, ErrorKind, Write as _},
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    time::Duration,
};

use p2p_sync_tests::stack::Agent;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::door::{Folder, credential, program, run, tells};

const NOWHERE: &str = "http://127.0.0.1:1";
/// For one answer, on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_mins(1);

fn started(folder: &Folder, settings: &[(&str, String)]) -> Agent {
    let mut agent = Agent::new(program(), &folder.path("agent"), NOWHERE, &credential(), settings);
    agent.start();
    agent.ask(json!({"do": "status"}));
    agent
}

/// A connection to an agent's socket.
struct Line(BufReader<UnixStream>);

impl Line {
    fn to(agent: &Agent) -> Self {
        let stream = UnixStream::connect(agent.socket()).expect("it serves");
        stream.set_read_timeout(Some(PATIENCE)).expect("not zero");
        Self(BufReader::new(stream))
    }

    /// Attached as a program of that id; and how far that is on disk.
    fn attached(agent: &Agent, client: Uuid) -> (Self, u64) {
        let mut line = Self::to(agent);
        line.say(&json!({"do": "attach", "client": client}).to_string());
        let answer = line.read().expect("answered");
        assert_eq!(answer["host_id"], json!(agent.host_id()), "{answer}");
        let durable = answer["durable"].as_u64().expect("told");
        (line, durable)
    }

    fn say(&mut self, line: &str) {
        writeln!(self.0.get_mut(), "{line}").expect("it reads");
    }

    fn put(&mut self, number: u64, data: &Value) -> Uuid {
        let id = Uuid::new_v4();
        let put = json!({
            "do": "put", "number": number, "operation_id": id, "type": "CHAT_MESSAGE", "map": "prontera", "data": data,
        });
        self.say(&put.to_string());
        id
    }

    /// One operation, until it is on disk.
    fn put_and_wait(&mut self) {
        self.put(1, &json!({"char_id": 1}));
        self.read_until(|line| line["durable"] == 1);
    }

    /// `None` at the end.
    fn read(&mut self) -> Option<Value> {
        let mut line = String::new();
        match self.0.read_line(&mut line) {
            Ok(0) => None,
            Ok(_) => Some(serde_json::from_str(&line).expect("JSON")),
            // It was closed before it had read all.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => None,
            Err(error) => panic!("nothing came: {error}"),
        }
    }

    /// Reads on until a line fits.
    fn read_until(&mut self, fits: impl Fn(&Value) -> bool) -> Value {
        loop {
            let line = self.read().expect("not the end");
            if fits(&line) {
                return line;
            }
        }
    }
}

#[test]
fn garbage_on_the_socket_is_answered_and_survived() {
    let folder = Folder::new();
    let mut agent = started(&folder, &[]);
    let mode = std::fs::metadata(agent.socket())
        .expect("it is there")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600, "the socket is its owner's alone");
    let mut line = Line::to(&agent);
    for garbage in [
        "hello",
        "{}}",
        "\u{1}\u{2}",
        r#"{"do":"attach"}"#,
        r#"{"do":"pull","pull":"?"}"#,
    ] {
        line.say(garbage);
        let answer = line.read().expect("answered");
        assert_eq!(answer["label"], "BAD_REQUEST", "{garbage}: {answer}");
    }
    line.say(r#"{"do":"status"}"#);
    assert_eq!(line.read().expect("answered")["host_id"], json!(agent.host_id()));

    let (mut line, _) = Line::attached(&agent, Uuid::new_v4());
    line.say("hello");
    let answer = line.read_until(|line| line["label"].is_string());
    assert_eq!(answer["label"], "BAD_REQUEST", "{answer}");
    while line.read().is_some() {}

    let (mut line, _) = Line::attached(&agent, Uuid::new_v4());
    let mut endless = line.0.get_ref().try_clone().expect("a descriptor is left");
    // It is cut off at some time, and writing fails then.
    while endless.write_all(&[b'x'; 4096]).is_ok() {}
    while line.read().is_some() {}
    agent.ask(json!({"do": "status"}));
}

/// 16 programs, and one connection for each of 64 streams that are followed.
const CONNECTIONS_MAX: usize = 80;

#[test]
fn invariant_12_programs_beyond_the_bound_are_told_so_and_a_place_that_is_left_is_free_again() {
    let folder = Folder::new();
    let agent = started(&folder, &[]);
    let mut lines: Vec<Line> = (0..CONNECTIONS_MAX)
        .map(|_| Line::attached(&agent, Uuid::new_v4()).0)
        .collect();
    let mut one_more = Line::to(&agent);
    let refused = one_more.read().expect("told");
    assert_eq!(refused["label"], "RATE_LIMITED", "{refused}");
    lines.pop();
    let begun = std::time::Instant::now();
    loop {
        let mut line = Line::to(&agent);
        // Refused, it may be closed before this is written.
        let _ = writeln!(line.0.get_mut(), r#"{{"do":"status"}}"#);
        if line.read().is_some_and(|answer| answer["host_id"].is_string()) {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "the place is not free");
    }
}

#[test]
fn invariant_02_operations_that_a_program_sends_again_are_taken_once_also_by_an_agent_that_was_killed() {
    let folder = Folder::new();
    let mut agent = started(&folder, &[]);
    let client = Uuid::new_v4();
    let (mut line, durable) = Line::attached(&agent, client);
    assert_eq!(durable, 0);
    for number in [1, 2, 2, 1, 3] {
        line.put(number, &json!({"char_id": 1}));
    }
    line.read_until(|line| line["durable"] == 3);
    let (mut again, durable) = Line::attached(&agent, client);
    assert_eq!(durable, 3, "told on another connection as well");
    again.put(3, &json!({"char_id": 1}));
    agent.kill();
    agent.start();
    agent.ask(json!({"do": "status"}));
    let (mut line, durable) = Line::attached(&agent, client);
    assert_eq!(durable, 3, "the number went to disk with its operations");
    for number in 1..=4 {
        line.put(number, &json!({"char_id": 1}));
    }
    line.read_until(|line| line["durable"] == 4);
    // Known once it is on disk: the status is written after the commit.
    let status = line.read_until(|line| line["status"]["outbox_operations"] == 4);
    assert_eq!(status["status"]["outbox_operations"], 4);
    let (_, durable) = Line::attached(&agent, Uuid::new_v4());
    assert_eq!(durable, 0, "another program begins anew");
}

#[test]
fn invariant_07_an_operation_that_the_agent_refuses_is_told_with_its_reason_and_does_not_stop_the_next() {
    let folder = Folder::new();
    let agent = started(&folder, &[]);
    let (mut line, _) = Line::attached(&agent, Uuid::new_v4());
    let refused = line.put(1, &json!({"text": "whose?"}));
    let taken = line.put(2, &json!({"char_id": 1}));
    let told = line.read_until(|line| line["state"].is_string());
    assert_eq!(
        (&told["operation_id"], &told["state"]),
        (&json!(refused), &json!("REJECTED"))
    );
    assert_eq!(told["label"], "ENTITY_MISSING", "{told}");
    line.read_until(|line| line["durable"] == 2);
    line.say(&json!({"do": "states", "operation_ids": [taken, refused]}).to_string());
    let spooled = line.read_until(|line| line["operation_id"] == json!(taken));
    assert_eq!(spooled["state"], "SPOOLED");
    let still = line.read_until(|line| line["operation_id"] == json!(refused));
    assert_eq!(still["state"], "REJECTED", "it can be asked for");
}

/// The dead letters of an agent, newest first.
fn dead_letters(agent: &mut Agent) -> Vec<Value> {
    let answer = agent.ask(json!({"do": "dead_letters", "limit": 10}));
    answer["dead_letters"].as_array().expect("a list").clone()
}

#[test]
fn invariant_07_an_operation_that_the_agent_refuses_is_a_dead_letter_that_survives_its_kill() {
    let folder = Folder::new();
    let mut agent = started(&folder, &[]);
    let (mut line, _) = Line::attached(&agent, Uuid::new_v4());
    let refused = line.put(1, &json!({"text": "whose?"}));
    let group = Uuid::new_v4();
    let members = json!([{"type": "ITEM_DROP", "map": "prontera", "data": {"amount": 3}}]);
    line.say(&json!({"do": "put", "number": 2, "operation_id": group, "members": members}).to_string());
    line.read_until(|line| line["durable"] == 2);
    agent.kill();
    agent.start();
    let letters = dead_letters(&mut agent);
    let ids: Vec<&Value> = letters.iter().map(|letter| &letter["operation_id"]).collect();
    assert_eq!(ids, [&json!(group), &json!(refused)], "{letters:?}");
    assert!(
        letters.iter().all(|letter| letter["label"] == "ENTITY_MISSING"),
        "{letters:?}"
    );
    assert_eq!(letters[1]["data"], json!({"text": "whose?"}));
    assert_eq!(letters[1]["path"], "prontera/CHAT_MESSAGE");
    assert_eq!(letters[0]["data"][0]["data"]["amount"], 3);
}

#[test]
fn invariant_07_a_refusal_that_a_connection_cut_off_is_told_again() {
    let folder = Folder::new();
    let agent = started(&folder, &[]);
    let client = Uuid::new_v4();
    let refused = {
        let (mut line, _) = Line::attached(&agent, client);
        let refused = line.put(1, &json!({"text": "whose?"}));
        line.read_until(|line| line["durable"] == 1);
        refused
    };
    let (mut line, _) = Line::attached(&agent, client);
    let put = json!({"do": "put", "number": 1, "operation_id": refused, "type": "CHAT_MESSAGE", "map": "prontera"});
    line.say(&put.to_string());
    let told = line.read_until(|line| line["state"].is_string());
    assert_eq!(
        (&told["operation_id"], &told["state"]),
        (&json!(refused), &json!("REJECTED"))
    );
    assert_eq!(told["label"], "ENTITY_MISSING", "{told}");
}

#[test]
fn invariant_12_what_programs_ask_the_hub_for_has_one_bound_for_all_of_them() {
    let folder = Folder::new();
    let agent = started(&folder, &[]);
    // Nobody knows them, and the hub is not there to be asked.
    let page: Vec<Uuid> = (0..512).map(Uuid::from_u128).collect();
    let page = json!({"do": "states", "operation_ids": page}).to_string();
    let (mut first, _) = Line::attached(&agent, Uuid::new_v4());
    for _ in 1..262_144 / 512 {
        first.say(&page);
        first.read_until(|line| line["answered"] == true);
    }
    let (mut second, _) = Line::attached(&agent, Uuid::new_v4());
    second.say(&page);
    for _ in 0..4 {
        let line = second.read_until(|line| line["status"].is_object() || line["answered"] == true);
        assert!(line["status"].is_object(), "let ask for more: {line}");
    }
    drop(first);
    second.read_until(|line| line["answered"] == true);
}

#[test]
fn a_socket_of_another_agent_and_a_file_that_is_no_socket_are_left_alone() {
    let folder = Folder::new();
    let socket = folder.path("shared.sock");
    let mut first = started(&folder, &[("agent_socket", socket.display().to_string())]);
    let config = |socket: &str| {
        let key = credential();
        format!("encryption_key = {key}\nmain_server_endpoint = {NOWHERE}\nagent_socket = {socket}\n")
    };
    let second = folder.agent(&config("shared.sock"), &["run"]);
    second.is_refused(&[("E108 DATA_DIRECTORY_IN_USE: ", "another agent serves there")]);
    first.ask(json!({"do": "status"}));
    assert!(UnixStream::connect(&socket).is_ok(), "the first one serves on");

    std::fs::remove_dir_all(folder.path("p2p_sync_outbox")).expect("the second one's");
    let file = folder.write("precious", "data");
    let refused = folder.agent(&config("precious"), &["run"]);
    refused.is_refused(&[("E103 BAD_VALUE: ", "no socket is in the way")]);
    assert_eq!(std::fs::read_to_string(file).expect("it is there"), "data");

    // What a killed agent left behind is in nobody's way.
    first.kill();
    first.start();
    first.ask(json!({"do": "status"}));
    assert!(UnixStream::connect(&socket).is_ok());
}

#[test]
fn a_configuration_without_a_credential_serves_to_attach_and_for_nothing_else() {
    let folder = Folder::new();
    let told = folder.agent("agent_socket = agent.sock\n", &["status"]);
    told.is_refused(&[("E106 BAD_CREDENTIAL: this machine is not enrolled", "attach to it")]);
    let agent = started(&folder, &[]);
    let attach_only = format!("agent_socket = {}\n", agent.socket().display());
    let told = folder.agent(&attach_only, &["status"]);
    assert_eq!(told.exit_code, Some(0), "the running agent answers: {}", told.err);
    assert!(told.out.contains(&agent.host_id().to_string()), "{}", told.out);
}

#[test]
fn check_tells_what_is_well_and_what_to_do_with_and_without_a_running_agent() {
    let folder = Folder::new();
    let broken = folder.agent("encryption_key = short\n", &["check"]);
    assert_eq!(broken.exit_code, Some(1));
    tells(
        &broken.out,
        ("settings: E106 BAD_CREDENTIAL: line 1: ", "copy it again"),
    );

    let mut agent = started(&folder, &[("connect_timeout_ms", "500".to_owned())]);
    let running = run("agent", &["check"], agent.config(), "");
    agent.stop();
    let alone = run("agent", &["check"], agent.config(), "");
    for (told, how) in [(&running, "in use by the agent at"), (&alone, "opened")] {
        assert_eq!(told.exit_code, Some(1), "{told:?}");
        tells(&told.out, ("settings: ok (", "p2p_data_sync.conf"));
        tells(&told.out, ("outbox: ok (", how));
        tells(&told.out, ("hub: E405 HUB_UNAVAILABLE: ", "check main_server_endpoint"));
    }
}

#[test]
fn drain_tells_what_waits_and_gives_up_at_its_time_and_an_empty_outbox_is_drained() {
    let folder = Folder::new();
    let mut agent = started(&folder, &[]);
    let empty = run("agent", &["drain"], agent.config(), "");
    assert_eq!(empty.exit_code, Some(0), "{}", empty.err);
    assert!(empty.err.contains("drained"), "{}", empty.err);
    Line::attached(&agent, Uuid::new_v4()).0.put_and_wait();
    let running = run("agent", &["drain", "--timeout", "1"], agent.config(), "");
    agent.stop();
    let alone = run("agent", &["drain", "--timeout", "1"], agent.config(), "");
    for told in [running, alone] {
        assert_eq!(told.exit_code, Some(1), "{}", told.err);
        assert!(told.err.contains("operations that wait: 1;"), "{}", told.err);
    }
}
