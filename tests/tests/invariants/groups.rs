//! Groups from an agent to a hub that is killed: all of each or nothing, and in the order of every path they write.

use p2p_sync_agent::{Agent, OperationState, Priority, Submission};
use p2p_sync_proto::v1::SyncDataType;

use crate::world::{PATIENCE, World, chat, until};

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
