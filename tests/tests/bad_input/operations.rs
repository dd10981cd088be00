//! What local programs ask of an agent, and the outbox it works on. No hub is needed: what is refused here is refused
//! before anything is sent.

use p2p_sync_tests::stack::Agent;
use serde_json::{Value, json};

use crate::door::{Folder, credential, program, run};

/// A configuration of an agent that reaches nobody.
fn alone() -> String {
    format!(
        "encryption_key = {}\nmain_server_endpoint = http://127.0.0.1:1\noutbox_path = outbox\n",
        credential()
    )
}

fn put(data_type: &str, data: &str) -> String {
    format!(r#"{{"do":"put","type":"{data_type}","map":"prontera","data":{data}}}"#)
}

/// A request, the code it is refused with, and what it is told to do.
type Case = (String, &'static str, &'static str);

fn payloads() -> Vec<Case> {
    let nested = format!("{}{}", "[".repeat(33), "]".repeat(33));
    vec![
        (put("MAP_STAT", "{}"), "E201 UNKNOWN_TYPE", "did you mean MAP_STATE?"),
        (
            put("99", "{}"),
            "E201 UNKNOWN_TYPE",
            "the types are MAP_STATE, MONSTER_DATA",
        ),
        (
            put("MAP_STATE", &json!("x".repeat(262_144)).to_string()),
            "E203 TOO_LARGE",
            "may have 262144: send less of it",
        ),
        (
            put("MAP_STATE", &nested),
            "E204 TOO_DEEP",
            "nested deeper than 32: flatten it",
        ),
        (
            put("MAP_STATE", &json!(vec![0; 16_384]).to_string()),
            "E205 TOO_MANY_NODES",
            "more than 16384 values: split it",
        ),
        (
            put("MAP_STATE", r#"{"hp":1,"hp":2}"#),
            "E206 DUPLICATE_KEY",
            "\"hp\" stands twice in one object: keep one",
        ),
        (
            put("MAP_STATE", r#"{"text":"\u0000"}"#),
            "E207 BAD_TEXT",
            "NUL character (\\u0000)",
        ),
        (
            put("MAP_STATE", r#"{"text":"\ud800"}"#),
            "E207 BAD_TEXT",
            "unpaired surrogate at line 1 column 16: write both",
        ),
        (
            put("MAP_STATE", r#"{"hp":1e999}"#),
            "E208 NUMBER_OUT_OF_RANGE",
            "a number at byte 6 has more than 64 digits; send it as a string",
        ),
        (
            put("MAP_STATE", &format!("{{\"hp\":{}}}", "9".repeat(65))),
            "E208 NUMBER_OUT_OF_RANGE",
            "send it as a string",
        ),
        (
            put("MAP_STATE", "{}").replace("prontera", "pront era"),
            "E211 BAD_MAP",
            "give 1 to 32 letters",
        ),
        (
            put("MAP_STATE", "{}").replace("prontera", ""),
            "E211 BAD_MAP",
            "say on which map it happened",
        ),
        (
            put("MONSTER_DATA", "{}"),
            "E212 ENTITY_MISSING",
            "put \"monster_id\" into the JSON object",
        ),
        (
            put("PLAYER_DATA", "{}"),
            "E212 ENTITY_MISSING",
            "put \"char_id\" into the JSON object",
        ),
        (
            put("MONSTER_DATA", r#"{"monster_id":"a/b"}"#),
            "E210 BAD_PATH",
            "without / and control characters",
        ),
    ]
}

fn requests() -> Vec<Case> {
    vec![
        (
            r#"{"do":"get","path":"prontera"}"#.into(),
            "E210 BAD_PATH",
            "write <owner>/<TYPE>",
        ),
        (
            r#"{"do":"get","path":"prontera/MAPS"}"#.into(),
            "E201 UNKNOWN_TYPE",
            "e.g. prontera/MAP_STATE",
        ),
        (
            r#"{"do":"get","path":"@char/+7/PLAYER_DATA"}"#.into(),
            "E210 BAD_PATH",
            "without sign or leading zeros",
        ),
        (
            r#"{"do":"scan","prefix":"","cursor":"xy"}"#.into(),
            "E219 BAD_CURSOR",
            "begin again",
        ),
        (
            r#"{"do":"result"}"#.into(),
            "E222 BAD_REQUEST",
            "say which operation: \"operation_id\"",
        ),
        (
            r#"{"do":"put","typ":"MAP_STATE"}"#.into(),
            "E222 BAD_REQUEST",
            "see `p2p-sync-agent run --help`",
        ),
        ("hello".into(), "E222 BAD_REQUEST", "see `p2p-sync-agent run --help`"),
    ]
}

#[test]
fn a_local_program_is_told_what_is_wrong_with_each_request() {
    let cases = [payloads(), requests()].concat();
    let folder = Folder::new();
    let config = folder.write_secret("p2p_data_sync.conf", &alone());
    let input = cases
        .iter()
        .map(|(line, ..)| line.as_str())
        .collect::<Vec<_>>()
        .join("\n")
        + "\n";
    let told = run("agent", &["run", "--stdin", "--drain-timeout", "5"], &config, &input);
    assert_eq!(
        told.exit_code,
        Some(0),
        "nothing was taken, so nothing is left: {}",
        told.err
    );
    let answers: Vec<Value> = told
        .out
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    assert_eq!(answers.len(), cases.len(), "one answer for each line");
    for ((line, code, advice), answer) in cases.iter().zip(answers) {
        let shown: String = line.chars().take(100).collect();
        let told = format!("E{} {}", answer["code"], answer["label"].as_str().unwrap_or_default());
        assert_eq!(told, *code, "{shown}: {answer}");
        assert!(
            answer["error"].as_str().unwrap_or_default().contains(advice),
            "{shown}: {answer}"
        );
    }
}

#[test]
fn a_line_longer_than_any_request_is_refused_and_ends_the_conversation() {
    let folder = Folder::new();
    let config = folder.write_secret("p2p_data_sync.conf", &alone());
    let told = run(
        "agent",
        &["run", "--stdin", "--drain-timeout", "5"],
        &config,
        &"x".repeat(900_000),
    );
    let answer: Value = serde_json::from_str(&told.out).expect("one answer");
    assert_eq!(
        (answer["code"].as_u64(), answer["label"].as_str()),
        (Some(203), Some("TOO_LARGE")),
        "{answer}"
    );
}

#[test]
fn the_command_line_tells_where_json_breaks_and_which_type_was_meant() {
    let folder = Folder::new();
    let config = alone();
    let put = |args: &[&str]| folder.agent(&config, &[&["put", "--map", "prontera"], args].concat());
    put(&["MAP_STATE", r#"{"hp":}"#]).is_refused(&[("E202 INVALID_JSON: ", "expected value at line 1 column 7")]);
    put(&["MAP_STATE", "{\n\"hp\": 1"]).is_refused(&[("E202 INVALID_JSON: ", "at line 2 column 8")]);
    put(&["MAP_STATT", "{}"]).is_refused(&[("E201 UNKNOWN_TYPE: ", "did you mean MAP_STATE?")]);
    assert_eq!(
        put(&["MAP_STATE"]).exit_code,
        Some(2),
        "arguments that are missing are clap's to tell"
    );
}

#[test]
fn an_outbox_in_use_and_one_of_another_credential_are_refused() {
    let folder = Folder::new();
    let mut agent = Agent::new(program(), &folder.path(""), "http://127.0.0.1:1", &credential(), &[]);
    agent.start();
    agent.ask(json!({"do": "status"}));
    let second = run("agent", &["run"], agent.config(), "");
    second.is_refused(&[(
        "E108 DATA_DIRECTORY_IN_USE: the outbox in ",
        "stop it, or give this one an outbox_path of its own",
    )]);
    agent.stop();

    let other = folder.agent(&alone(), &["status"]);
    let advice = "put that one back until it is drained, or give this one an outbox_path of its own";
    other.is_refused(&[("E117 OUTBOX_UNREADABLE: the outbox in ", advice)]);
}
