//! What a hub answers to messages that an agent of ours would not send.

use p2p_sync_proto::{
    Code, PROTOCOL_VERSION,
    keys::Credential,
    limits::BATCH_OPS_MAX,
    v1::{self, OperationKind, operation::Payload, pull_request::What},
};
use prost::{Message as _, bytes::Bytes};
use uuid::Uuid;

use crate::{
    door::Folder,
    forger::{Forger, embedded, full, good},
};

type Spoil = fn(&mut v1::Operation);

/// What is wrong with each operation, and what the hub says of it.
const SPOILT: [(Spoil, Code, &str); 20] = [
    (
        |op| op.payload = Some(full(r#"{"hp":-3}"#)),
        Code::ImpossibleValue,
        "/hp: ",
    ),
    (
        |op| op.payload = Some(full("[]")),
        Code::SchemaViolation,
        "the payload: ",
    ),
    (
        |op| op.payload = Some(full("{\"hp\":}")),
        Code::InvalidJson,
        "at line 1 column 7",
    ),
    (
        |op| op.payload = Some(full(r#"{"a":"\u0000"}"#)),
        Code::BadText,
        "leave it out",
    ),
    (
        |op| op.payload = Some(Payload::Full(Bytes::from_static(b"\"\xff\""))),
        Code::BadText,
        "convert it before sending",
    ),
    (
        |op| op.payload = Some(full(&"[".repeat(33))),
        Code::TooDeep,
        "flatten it",
    ),
    (
        |op| op.payload = Some(full(r#"{"hp":1,"hp":2}"#)),
        Code::DuplicateKey,
        "keep one",
    ),
    (
        |op| op.payload = Some(full(&" ".repeat(262_145))),
        Code::TooLarge,
        "has at most 262144: split it",
    ),
    (|op| op.payload = None, Code::BadOperation, "a PUT carries a payload"),
    (
        |op| op.kind = OperationKind::Delete.into(),
        Code::BadOperation,
        "a DELETE carries no payload",
    ),
    (
        |op| op.kind = OperationKind::Unspecified.into(),
        Code::BadOperation,
        "the kind is PUT or DELETE",
    ),
    (
        |op| op.kind = OperationKind::Group.into(),
        Code::BadOperation,
        "a GROUP carries its members",
    ),
    (
        |op| op.payload = Some(Payload::Group(v1::Group::default())),
        Code::BadOperation,
        "a PUT carries one payload",
    ),
    (
        |op| op.payload = Some(Payload::Delta(v1::Delta::default())),
        Code::Unsupported,
        "deltas are not taken",
    ),
    (
        |op| op.payload = Some(Payload::Blob(v1::Blob::default())),
        Code::Unsupported,
        "blobs are not taken",
    ),
    (
        |op| op.policy_version = 9,
        Code::Repolicy,
        "made by version 9 of the rules for MONSTER_DATA; the hub's are 1",
    ),
    (|op| op.path = "prontera".into(), Code::BadPath, "write <owner>/<TYPE>"),
    (
        |op| op.path = "@char/7/MONSTER_DATA/7".into(),
        Code::BadPath,
        "is owned by a map",
    ),
    (
        |op| op.path = "prontera/MAPS".into(),
        Code::UnknownType,
        "e.g. prontera/MAP_STATE",
    ),
    (
        |op| op.path = format!("@host/{}/HOST_METRICS", Uuid::nil()),
        Code::NotLeaseHolder,
        "this is host ",
    ),
];

#[tokio::test(flavor = "multi_thread")]
async fn each_operation_that_is_wrong_is_rejected_with_its_reason_and_its_neighbours_apply() {
    let folder = Folder::new();
    let mut hub = embedded(&folder, &[]);
    let credential = Credential::parse(&hub.add_host(1)).expect("the hub's");
    let forger = Forger::new(&hub.start(), credential).await;
    assert_eq!(forger.hello(0).await.code(), Code::UpgradeRequired);
    assert_eq!(forger.hello(PROTOCOL_VERSION).await.code(), Code::None);

    let mut operations = vec![good(1)];
    operations.extend((2..).zip(&SPOILT).map(|(sequence, (spoil, ..))| {
        let mut operation = good(sequence);
        spoil(&mut operation);
        operation
    }));
    operations.push(good(100));
    let mut operations: Vec<Bytes> = operations.iter().map(|op| op.encode_to_vec().into()).collect();
    // The same operation in another encoding: a default written out.
    operations.push([good(101).encode_to_vec(), vec![0x28, 0]].concat().into());
    let mut reply = forger.apply(operations).await;
    // The first good one is of the same path as the last: the hub says so, and it is no refusal.
    reply
        .outcomes
        .retain(|outcome| outcome.state() != v1::OutcomeState::Superseded);
    reply.outcomes.sort_by_key(|outcome| outcome.index);
    assert_eq!(
        (reply.code(), reply.outcomes.len()),
        (Code::None, SPOILT.len() + 1),
        "{reply:?}"
    );
    let encoding = reply.outcomes.pop().expect("counted above");
    for (outcome, (index, (_, code, sentence))) in reply.outcomes.iter().zip((1..).zip(&SPOILT)) {
        assert_eq!(
            (outcome.index, outcome.state(), outcome.code()),
            (index, v1::OutcomeState::Rejected, *code),
            "{outcome:?}"
        );
        assert!(outcome.message.contains(sentence), "{sentence:?} is not in {outcome:?}");
    }
    assert_eq!(encoding.code(), Code::BadOperation);
    assert!(encoding.message.contains("update the agent"), "{encoding:?}");
    let applied = forger
        .pull(Some(What::Get(v1::Get {
            path: good(0).path,
            ..Default::default()
        })))
        .await
        .expect("answered");
    assert_eq!(applied.code(), Code::None, "{applied:?}");

    let too_many = (200..)
        .take(BATCH_OPS_MAX + 1)
        .map(|sequence| good(sequence).encode_to_vec().into());
    let reply = forger.apply(too_many.collect()).await;
    assert_eq!((reply.code(), reply.retry_after_ms), (Code::BadRequest, 0), "{reply:?}");
    assert!(
        reply.message.contains("at most 512 operations, this one has 513"),
        "{reply:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn each_question_that_is_wrong_is_answered_with_what_to_do() {
    let folder = Folder::new();
    let mut hub = embedded(&folder, &[]);
    let credential = Credential::parse(&hub.add_host(1)).expect("the hub's");
    let forger = Forger::new(&hub.start(), credential).await;
    let get = |path: &str| {
        Some(What::Get(v1::Get {
            path: path.to_owned(),
            ..Default::default()
        }))
    };
    let scan = |prefix: String, cursor: &'static [u8]| {
        Some(What::Scan(v1::Scan {
            prefix,
            limit: 1,
            cursor: cursor.into(),
        }))
    };
    let changes = |stream: &str, cursor: &'static [u8]| {
        Some(What::ChangesSince(v1::ChangesSince {
            stream: stream.to_owned(),
            limit: 1,
            cursor: cursor.into(),
        }))
    };
    let status = v1::OperationStatus {
        operation_id: Bytes::from_static(b"abc"),
        position: None,
    };
    let cases = [
        (None, Code::BadRequest, "update the agent"),
        (get("prontera"), Code::BadPath, "write <owner>/<TYPE>"),
        (get("prontera/MAPS"), Code::UnknownType, "e.g. prontera/MAP_STATE"),
        (
            get("prontera/MAP_STATE"),
            Code::NotFound,
            "there is no state at prontera/MAP_STATE",
        ),
        (
            scan("x".repeat(257), b""),
            Code::BadPath,
            "a prefix has at most 256 bytes",
        ),
        (
            scan("prontera/".to_owned(), b"nonsense"),
            Code::BadCursor,
            "with an empty cursor",
        ),
        (changes("no map", b""), Code::BadMap, "give 1 to 32 letters"),
        (
            changes("prontera", b"nonsense"),
            Code::BadCursor,
            "with an empty cursor",
        ),
        (
            Some(What::OperationStatus(status)),
            Code::BadRequest,
            "an operation id has 16 bytes",
        ),
    ];
    for (question, code, sentence) in cases {
        let reply = forger.pull(question).await.expect("answered");
        assert_eq!(reply.code(), code, "{reply:?}");
        assert!(reply.message.contains(sentence), "{sentence:?} is not in {reply:?}");
    }
}
