//! Groups from an agent to a hub that is killed: all of each or nothing, and in the order of every path they write.

use std::{
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
};

use p2p_sync_agent::{Agent, OperationState, Priority, Submission};
use p2p_sync_proto::v1::SyncDataType;
use p2p_sync_tests::stack;
use serde_json::{Value, json};

use crate::world::{PATIENCE, PROGRAM, World, chat, until};

const OPERATIONS: u32 = 600;
const KILLS: u32 = 3;

fn drop_at(map: &'static str, payload: &'static str) -> Submission<'static> {
    Submission {
        data_type: SyncDataType::ItemDrop,
        map,
        payload: Some(payload),
        ..chat("")
    }
}

#[test]
fn invariant_02_and_03_groups_amid_a_hub_that_is_killed_apply_whole_once_and_in_the_order_of_their_paths() {
    let mut world = World::new();
    let config = world.config(&format!(
        "outbox_path = {}\n",
        world.folder.path().join("outbox").display()
    ));
    let agent = Agent::start(config).expect("starts");
    let mut groups = Vec::new();
    for number in 0..OPERATIONS {
        let text = format!(r#"{{"char_id":5,"text":"{number}"}}"#);
        // Before, in and after groups, over both lanes.
        let priority = [Priority::ByType, Priority::ByType, Priority::Critical][(number / 2 % 3) as usize];
        let line = Submission {
            priority,
            ..chat(&text)
        };
        if number % 2 == 0 {
            agent.submit(&line).expect("taken");
        } else {
            let drop = drop_at("geffen", r#"{"drop_id":7,"amount":1}"#);
            groups.push(agent.submit_group(&[drop, line], false).expect("taken"));
        }
        if number % (OPERATIONS / (KILLS + 1)) == OPERATIONS / (KILLS + 1) - 1 && number + 1 < OPERATIONS {
            let newest = *groups.last().expect("several");
            until("a group is on its way", || {
                agent.result(newest).state != OperationState::Accepted
            });
            world.hub.kill();
            world.hub.start();
        }
    }
    assert!(agent.flush(PATIENCE), "{:?}", agent.status());
    for id in &groups {
        assert_eq!(agent.result(*id).state, OperationState::Applied);
    }
    let whole = "SELECT count(*) FROM (SELECT FROM p2p_sync.operations WHERE in_group \
        GROUP BY operation_id HAVING count(*) = 2 AND count(DISTINCT stream) = 2) AS _";
    assert_eq!(world.count(whole), i64::from(OPERATIONS / 2));
    assert_eq!(
        world.count("SELECT count(*) FROM p2p_sync.operations WHERE in_group"),
        i64::from(OPERATIONS)
    );
    let lines = world.rows(
        "SELECT (payload ->> 'text')::bigint FROM p2p_sync.operations WHERE path = 'prontera/CHAT_MESSAGE/5' \
            ORDER BY stream_sequence",
        &[],
    );
    let lines: Vec<i64> = lines.iter().map(|row| row.get(0)).collect();
    assert_eq!(lines, (0..i64::from(OPERATIONS)).collect::<Vec<_>>());
}

#[test]
fn invariant_07_a_group_that_the_hub_refuses_writes_nothing_and_is_a_readable_dead_letter() {
    let world = World::new();
    let config = world.config(&format!(
        "outbox_path = {}\n",
        world.folder.path().join("outbox").display()
    ));
    let agent = Agent::start(config).expect("starts");
    // Only the hub has the schemas.
    let wrong = drop_at("geffen", r#"{"drop_id":7,"amount":-1}"#);
    let id = agent
        .submit_group(&[chat(r#"{"char_id":5,"text":"hi"}"#), wrong], false)
        .expect("taken");
    let settled = agent.wait(id, Some(PATIENCE));
    assert_eq!(settled.state, OperationState::Rejected);
    let problem = settled.problem.expect("why");
    assert_eq!(problem.code.label(), "IMPOSSIBLE_VALUE");
    assert!(problem.sentence.starts_with("member 1 of the group"), "{problem}");
    assert_eq!(world.count("SELECT count(*) FROM p2p_sync.states"), 0);
    let kept = "SELECT count(*) FROM p2p_sync.rejected_operations \
        WHERE convert_from(payload, 'UTF8')::jsonb -> 1 -> 'data' ->> 'amount' = '-1'";
    assert_eq!(world.count(kept), 1);
    until("the dead letter is on disk", || {
        !agent.dead_letters(1).expect("reads").is_empty()
    });
}

/// `p2p-sync-agent group` on a file, or with `-` on what it reads: whether it ended well, and what it said.
fn group_of(agent: &stack::Agent, members: &Value, by_file: bool) -> (bool, Value) {
    let file = agent.config().with_file_name("group.json");
    std::fs::write(&file, members.to_string()).expect("the folder can be written");
    let file = if by_file {
        file.display().to_string()
    } else {
        "-".to_owned()
    };
    let child = Command::new(PROGRAM)
        .args(["agent", "group", &file, "--timeout", "60", "--config"])
        .arg(agent.config())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the program runs");
    if !by_file {
        let mut input = child.stdin.as_ref().expect("piped");
        input.write_all(members.to_string().as_bytes()).expect("it reads");
    }
    // Ends its input, too.
    let output = child.wait_with_output().expect("it is our child");
    let told = serde_json::from_slice(&output.stdout).unwrap_or_default();
    (output.status.code() == Some(0), told)
}

#[test]
fn a_group_at_the_command_line_is_written_whole_or_refused_whole_with_the_member_that_is_wrong() {
    let world = World::new();
    let folder = world.folder.path().join("agent");
    let credential = world.hub.add_host(1);
    let mut agent = stack::Agent::new(Path::new(PROGRAM), &folder, &world.endpoint(), &credential, &[]);
    let members = |wrong: Option<usize>| -> Value {
        let member = |at: usize| {
            let amount = if Some(at) == wrong { 40_000 } else { 1 };
            let map = if at.is_multiple_of(2) { "prontera" } else { "geffen" };
            json!({"type": "ITEM_DROP", "map": map, "data": {"drop_id": at, "amount": amount}})
        };
        (0..5).map(member).collect()
    };
    // Without an agent that runs, and through one.
    for (runs, by_file) in [(false, true), (false, false), (true, true), (true, false)] {
        if runs && by_file {
            agent.start();
            agent.ask(json!({"do": "status"}));
        }
        let (well, told) = group_of(&agent, &members(Some(3)), by_file);
        assert!(!well, "{told}");
        assert_eq!(
            (&told["state"], &told["label"]),
            (&json!("REJECTED"), &json!("IMPOSSIBLE_VALUE")),
            "{told}"
        );
        let sentence = told["error"].as_str().expect("says why");
        assert!(
            sentence.starts_with("member 3 of the group") && sentence.contains("30000"),
            "{sentence}"
        );
        assert_eq!(world.count("SELECT count(*) FROM p2p_sync.states"), 0);
        assert_eq!(world.count("SELECT count(*) FROM p2p_sync.operations"), 0);
    }
    for (by_file, operations) in [(true, 5), (false, 10)] {
        let (well, told) = group_of(&agent, &members(None), by_file);
        assert!(well && told["state"] == "APPLIED", "{told}");
        assert_eq!(world.count("SELECT count(*) FROM p2p_sync.states"), 5);
        let in_group = "SELECT count(*) FROM p2p_sync.operations WHERE in_group";
        assert_eq!(world.count(in_group), operations);
    }
    let (well, _) = group_of(&agent, &json!([{"typ": "ITEM_DROP"}]), true);
    assert!(!well, "no group");
}
