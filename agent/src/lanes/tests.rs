use p2p_sync_proto::{
    limits::PAYLOAD_BYTES_MAX,
    v1::{Operation, operation::Payload},
};
use prost::Message as _;

use super::*;
use crate::local_api::LINE_BYTES_MAX;

fn lanes(queue_ops_max: usize) -> (Lanes, Exits) {
    let policies = Policies::builtin();
    Lanes::new(
        Uuid::nil(),
        policies,
        7,
        HashMap::new(),
        Presences::default(),
        queue_ops_max,
    )
}

fn chat<'a>() -> Submission<'a> {
    Submission {
        data_type: SyncDataType::ChatMessage,
        map: "prontera",
        account_id: 1,
        entity: None,
        char_id: None,
        payload: Some(r#"{"char_id":5,"text":"hi"}"#),
        priority: Priority::ByType,
        notify: false,
    }
}

#[test]
fn positions_follow_each_other_and_every_operation_names_its_predecessor() {
    let (lanes, exits) = lanes(16);
    let first = lanes.take(&chat(), |_| ()).expect("taken").position;
    lanes.take(&chat(), |_| ()).expect("taken");
    let entries: Vec<Queued> = exits.spool.try_iter().collect();
    assert_eq!(entries[0].predecessor, None);
    assert_eq!(entries[1].predecessor, Some(first));
    let sent = Operation::decode(entries[1].bytes.clone()).expect("canonical");
    assert_eq!(sent.predecessor, Some(first.into()));
    lanes.settled("prontera/CHAT_MESSAGE/5", entries[1].position);
    lanes.take(&chat(), |_| ()).expect("taken");
    assert_eq!(exits.spool.try_recv().expect("third").predecessor, None);
}

#[test]
fn a_parked_sender_is_woken_by_the_next_critical_operation_and_by_no_more() {
    let (lanes, _exits) = lanes(16);
    let critical = Submission {
        priority: Priority::Critical,
        ..chat()
    };
    let wakes = |submission: &Submission<'_>| lanes.take(submission, |_| ()).expect("taken").wakes_sender;
    assert!(!wakes(&critical), "it is at work");
    lanes.park_sender();
    assert!(!wakes(&chat()), "bulk is none of its business");
    assert!(wakes(&critical));
    assert!(!wakes(&critical), "it was woken");
}

#[test]
fn what_leaves_the_lanes_is_whole_and_holds_no_chunk() {
    let (lanes, exits) = lanes(16);
    let taken = lanes.take(&chat(), |_| ()).expect("taken");
    let queued = exits.spool.try_recv().expect("queued");
    let place = queued.bytes.as_ptr();
    let entry = queued.into_entry();
    assert_ne!(entry.bytes.as_ptr(), place);
    assert_eq!(&*entry.path, "prontera/CHAT_MESSAGE/5");
    assert_eq!(
        (entry.operation_id, entry.position),
        (taken.operation_id, taken.position)
    );
    let sent = Operation::decode(entry.bytes).expect("canonical");
    assert_eq!(sent.path, "prontera/CHAT_MESSAGE/5");
    assert_eq!(sent.operation_id, taken.operation_id.as_bytes().as_slice());
}

#[test]
fn a_refused_operation_leaves_no_gap() {
    let (lanes, exits) = lanes(16);
    let broken = Submission {
        payload: Some("{"),
        ..chat()
    };
    assert_eq!(lanes.take(&broken, |_| ()).expect_err("broken").code, Code::InvalidJson);
    assert_eq!(lanes.take(&chat(), |_| ()).expect("taken").position.sequence, 1);
    assert_eq!(exits.spool.len(), 1);
}

#[test]
fn invariant_07_a_full_queue_is_told_and_critical_operations_have_room_of_their_own() {
    let (lanes, exits) = lanes(16);
    for _ in 0..16 {
        lanes.take(&chat(), |_| ()).expect("room");
    }
    assert_eq!(lanes.take(&chat(), |_| ()).expect_err("full").code, Code::QueueFull);
    let critical = Submission {
        priority: Priority::Critical,
        ..chat()
    };
    lanes.take(&critical, |_| ()).expect("room of its own");
    assert_eq!((exits.spool.len(), exits.critical.len()), (17, 1));
}

#[test]
fn invariant_12_payload_bytes_that_wait_are_bounded() {
    let (lanes, _exits) = lanes(100_000);
    let text = format!(r#"{{"char_id":5,"text":"{}"}}"#, "x".repeat(200_000));
    let large = Submission {
        payload: Some(&text),
        ..chat()
    };
    let taken = (0..1000).take_while(|_| lanes.take(&large, |_| ()).is_ok()).count();
    assert_eq!(taken, SPOOL_BYTES_MAX / (OPERATION_BYTES + text.len()));
    assert_eq!(lanes.take(&large, |_| ()).expect_err("bounded").code, Code::QueueFull);
}

#[test]
fn a_group_stands_in_the_order_of_each_path_and_is_one_operation() {
    let (lanes, exits) = lanes(16);
    let other = Submission {
        map: "geffen",
        ..chat()
    };
    let before = lanes.take(&chat(), |_| ()).expect("taken").position;
    let group = lanes.take_group(&[chat(), other.clone()], |_| ()).expect("taken");
    lanes.take(&other, |_| ()).expect("taken");
    let entries: Vec<Entry> = exits.spool.try_iter().map(Queued::into_entry).collect();
    assert_eq!(entries[2].predecessor, Some(group.position));
    let order = entries[1].group.as_deref().expect("a group");
    assert_eq!(order.predecessors, [before]);
    let sent = Operation::decode(entries[1].bytes.clone()).expect("canonical");
    let read = GroupOrder::of(&sent).expect("a group");
    assert_eq!((&read.paths, &read.predecessors), (&order.paths, &order.predecessors));
    assert_eq!(order.paths, ["prontera/CHAT_MESSAGE/5", "geffen/CHAT_MESSAGE/5"]);
}

#[test]
fn a_group_with_one_wrong_member_leaves_no_trace_and_one_critical_member_makes_it_critical() {
    let (lanes, exits) = lanes(16);
    let other = |payload| Submission {
        map: "geffen",
        payload: Some(payload),
        ..chat()
    };
    let problem = lanes.take_group(&[chat(), other("{")], |_| ()).expect_err("no JSON");
    assert_eq!(problem.code, Code::InvalidJson);
    assert!(problem.sentence.starts_with("member 1 of the group"), "{problem}");
    let many = vec![chat(); 65];
    for members in [&[][..], &[chat(), chat()], &many] {
        assert_eq!(
            lanes.take_group(members, |_| ()).expect_err("no group").code,
            Code::BadOperation
        );
    }
    assert!(exits.spool.is_empty());
    assert_eq!(lanes.spool_bytes.load(Ordering::Relaxed), 0);
    lanes.take(&chat(), |_| ()).expect("taken");
    assert_eq!(exits.spool.try_recv().expect("taken").predecessor, None);

    let urgent = Submission {
        priority: Priority::Critical,
        ..other(r#"{"char_id":5}"#)
    };
    lanes.take_group(&[chat(), urgent], |_| ()).expect("taken");
    assert_eq!(exits.critical.len(), 1);
}

/// A text that callers give, of any length and of what JSON writes longest.
fn any_text(random: &mut fastrand::Rng) -> String {
    let most = [4, 20, 40, 140, 4000, 300_000, 1 << 20][random.usize(..7)];
    let piece = ["m", "\u{1}", "\"", "프", "/"][random.usize(..5)];
    piece.repeat(random.usize(..most) / piece.len())
}

#[test]
fn invariant_12_every_operation_that_is_taken_fits_a_message_and_a_line() {
    let seed = fastrand::u64(..);
    let mut random = fastrand::Rng::with_seed(seed);
    let (mut taken, mut refused) = (0, 0);
    for _ in 0..400 {
        let (lanes, exits) = lanes(16);
        let (map, entity) = (any_text(&mut random), any_text(&mut random));
        let text = serde_json::to_string(&any_text(&mut random)).expect("a text");
        let payload = format!(r#"{{"char_id":5,"text":{text}}}"#);
        let submission = Submission {
            data_type: p2p_sync_proto::policy::TYPES[random.usize(..13)],
            map: ["", "prontera", &map][random.usize(..3)],
            account_id: random.u32(..),
            entity: random.bool().then_some(&entity),
            char_id: random.bool().then(|| random.u64(..)),
            payload: random.bool().then_some(&payload),
            priority: Priority::Critical,
            notify: false,
        };
        if lanes.take(&submission, |_| ()).is_err() {
            refused += 1;
            continue;
        }
        taken += 1;
        let bytes = exits.spool.try_recv().expect("queued").bytes.len();
        assert!(bytes <= PAYLOAD_BYTES_MAX + 1024, "seed {seed}: {bytes} bytes");
        let mut line = String::new();
        let put = crate::attach_lines::put(&submission, Uuid::max(), u64::MAX, true);
        crate::attach_lines::numbered(u64::MAX, &put, &mut line);
        assert!(
            line.len() as u64 <= LINE_BYTES_MAX,
            "seed {seed}: a line of {} bytes",
            line.len()
        );
    }
    assert!(
        taken > 20 && refused > 20,
        "seed {seed}: {taken} taken, {refused} refused"
    );
}

fn presence(event: &str, char_id: u64, account_id: u32) -> Submission<'_> {
    Submission {
        data_type: SyncDataType::PlayerPresence,
        account_id,
        char_id: Some(char_id),
        payload: Some(if event == "enter" {
            r#"{"event":"enter"}"#
        } else {
            r#"{"event":"leave"}"#
        }),
        ..chat()
    }
}

fn data(char_id: u64) -> Submission<'static> {
    Submission {
        data_type: SyncDataType::PlayerData,
        char_id: Some(char_id),
        payload: Some("{}"),
        ..chat()
    }
}

/// What an operation names, as it is sent.
fn named(lanes: &Lanes, exits: &Exits, submission: &Submission<'_>) -> (Position, [Option<u64>; 2]) {
    let position = lanes.take(submission, |_| ()).expect("taken").position;
    let queued = exits.spool.try_recv().expect("queued");
    let sent = Operation::decode(queued.bytes.clone()).expect("canonical");
    let entry = queued.into_entry();
    let follows = [entry.predecessor, entry.presence];
    assert_eq!(
        [sent.predecessor, sent.presence].map(|before| before.map(Position::from)),
        follows
    );
    (position, follows.map(|before| before.map(|before| before.sequence)))
}

#[test]
fn what_is_made_of_a_player_names_its_last_coming_or_going_until_that_is_settled() {
    const PATH: &str = "@char/7/PLAYER_PRESENCE";
    let (lanes, exits) = lanes(64);
    let named = |submission: &Submission<'_>| named(&lanes, &exits, submission);
    assert_eq!(named(&data(7)).1, [None, None], "nothing is known of it");
    let (entered, follows) = named(&presence("enter", 7, 9));
    assert_eq!(follows, [None, None]);
    let second = Some(entered.sequence);
    assert_eq!(named(&data(7)).1, [None, second]);
    assert_eq!(named(&data(8)).1, [None, None], "another character");
    assert_eq!(named(&chat()).1, [None, None], "a map's");
    let (left, follows) = named(&presence("leave", 7, 9));
    assert_eq!(follows, [second, None], "it is its path's already");
    // The account's next character, and what a settled one leaves.
    let (other, follows) = named(&presence("enter", 8, 9));
    assert_eq!(follows, [None, Some(left.sequence)]);
    lanes.settled(PATH, entered);
    assert_eq!(
        named(&data(7)).1,
        [None, Some(left.sequence)],
        "a newer one is not settled"
    );
    lanes.settled(PATH, left);
    assert_eq!(named(&data(7)).1, [None, None]);
    assert_eq!(named(&data(8)).1, [None, Some(other.sequence)]);
    lanes.settled("@char/8/PLAYER_PRESENCE", other);
    assert_eq!(
        named(&presence("enter", 7, 9)).1,
        [None, None],
        "nothing is left of the account"
    );
}

#[test]
fn what_is_an_accounts_follows_whichever_of_its_characters_came_last() {
    let mut policies = Policies::builtin();
    let quest = policies.of(SyncDataType::QuestProgress).clone();
    policies = Policies::new(
        1,
        [Policy {
            owner: p2p_sync_proto::policy::Owner::Account,
            owner_key: None,
            ..quest
        }],
    );
    let mut presences = Presences::default();
    let entered = Position {
        incarnation: 6,
        sequence: 4,
    };
    // As found in the outbox of an earlier start.
    presences.replace("@char/7/PLAYER_PRESENCE", 9, entered);
    let (lanes, exits) = Lanes::new(Uuid::nil(), policies, 7, HashMap::new(), presences, 64);
    let quest = Submission {
        data_type: SyncDataType::QuestProgress,
        account_id: 9,
        payload: Some(r#"{"quest_id":1}"#),
        ..chat()
    };
    assert_eq!(named(&lanes, &exits, &quest).1, [None, Some(4)]);
    let group = [quest.clone(), data(7), chat()];
    lanes.take_group(&group, |_| ()).expect("taken");
    let entry = exits.spool.try_recv().expect("queued").into_entry();
    let order = entry.group.expect("a group");
    assert_eq!(order.predecessors, [entered, entered]);
    let sent = Operation::decode(entry.bytes).expect("canonical");
    let again = GroupOrder::of(&sent).expect("a group");
    assert_eq!(again.predecessors, order.predecessors, "read back from disk");
}

#[test]
fn a_player_comes_and_goes_by_an_operation_of_its_own() {
    let (lanes, _exits) = lanes(16);
    let enter = presence("enter", 7, 9);
    let deleted = Submission {
        payload: None,
        ..enter.clone()
    };
    let nowhere = Submission {
        map: "",
        ..enter.clone()
    };
    let unclear = Submission {
        payload: Some("{}"),
        ..enter.clone()
    };
    for (submission, code) in [
        (deleted, Code::BadOperation),
        (nowhere, Code::BadMap),
        (unclear, Code::SchemaViolation),
    ] {
        assert_eq!(lanes.take(&submission, |_| ()).expect_err("refused").code, code);
    }
    let refused = lanes.take_group(&[chat(), enter], |_| ()).expect_err("in a group");
    assert_eq!(refused.code, Code::BadOperation);
}

#[test]
fn operations_say_which_edits_their_writer_had_seen_members_of_groups_and_those_of_other_programs_too() {
    let (lanes, exits) = lanes(16);
    let told = |path: &str, edit, now_ms| {
        let operation = Operation {
            path: path.to_owned(),
            ..Operation::default()
        };
        lanes.edits.told(&operation.encode_to_vec().into(), &[edit], now_ms);
    };
    let other = Submission {
        map: "geffen",
        ..chat()
    };
    let made = |at_ms| MadeElsewhere {
        operation_id: Uuid::nil(),
        at_ms,
    };
    lanes.take(&chat(), |_| ()).expect("taken");
    told("prontera/CHAT_MESSAGE/5", 7, 1000);
    told("geffen/CHAT_MESSAGE/5", 8, 2000);
    lanes.take(&chat(), |_| ()).expect("taken");
    lanes.take_group(&[other.clone(), chat()], |_| ()).expect("taken");
    for at_ms in [999, 1000] {
        lanes.take_made(&chat(), Some(made(at_ms)), |_| ()).expect("taken");
        lanes
            .take_made_group(&[other.clone(), chat()], Some(made(at_ms)), |_| ())
            .expect("taken");
    }
    let seen: Vec<Vec<u64>> = exits
        .spool
        .try_iter()
        .map(|queued| {
            let operation = Operation::decode(queued.bytes).expect("canonical");
            match operation.payload {
                Some(Payload::Group(group)) => {
                    let members = group.members.into_iter().map(Operation::decode);
                    members.map(|member| member.expect("canonical").hub_edit_seen).collect()
                }
                _ => vec![operation.hub_edit_seen],
            }
        })
        .collect();
    assert_eq!(
        seen,
        [vec![0], vec![7], vec![8, 7], vec![0], vec![0, 0], vec![7], vec![0, 7]]
    );
}
