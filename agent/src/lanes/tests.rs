use super::*;

fn lanes(queue_ops_max: usize) -> (Lanes, Exits) {
    Lanes::new(Uuid::nil(), Policies::builtin(), 7, HashMap::new(), queue_ops_max)
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
    }
}

#[test]
fn positions_follow_each_other_and_every_operation_names_its_predecessor() {
    let (lanes, exits) = lanes(16);
    let first = lanes.take(&chat(), |_| ()).expect("taken").position;
    lanes.take(&chat(), |_| ()).expect("taken");
    let entries: Vec<Entry> = exits.spool.try_iter().collect();
    assert_eq!(entries[0].predecessor, None);
    assert_eq!(entries[1].predecessor, Some(first));
    let sent = Operation::decode(entries[1].bytes.clone()).expect("canonical");
    assert_eq!(sent.predecessor, Some(first.into()));
    lanes.settled("prontera/CHAT_MESSAGE/5", entries[1].position);
    lanes.take(&chat(), |_| ()).expect("taken");
    assert_eq!(exits.spool.try_recv().expect("third").predecessor, None);
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
