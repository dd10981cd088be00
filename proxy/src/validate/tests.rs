use p2p_sync_proto::{
    limits::REASON_BYTES_MAX,
    v1::{OperationRef, SequenceRange, Version},
};

use super::*;

const HOST: Uuid = Uuid::from_u128(7);
const INCARNATION: u64 = 3;

fn put() -> v1::Operation {
    v1::Operation {
        operation_id: Uuid::from_u128(1).as_bytes().to_vec().into(),
        version: Some(Version {
            tenure: 0,
            incarnation: INCARNATION,
            sequence: 5,
        }),
        path: "prontera/MONSTER_DATA/7".to_owned(),
        kind: OperationKind::Put.into(),
        policy_version: 1,
        payload: Some(Payload::Full(Bytes::from_static(br#"{"monster_id":7,"hp":3}"#))),
        ..Default::default()
    }
}

fn with_payload(payload: &str) -> v1::Operation {
    v1::Operation {
        payload: Some(Payload::Full(payload.as_bytes().to_vec().into())),
        ..put()
    }
}

fn with_version(tenure: u64, incarnation: u64, sequence: u64) -> v1::Operation {
    v1::Operation {
        version: Some(Version {
            tenure,
            incarnation,
            sequence,
        }),
        ..put()
    }
}

fn with_path(path: &str) -> v1::Operation {
    v1::Operation {
        path: path.to_owned(),
        ..put()
    }
}

fn check(rules: &Rules, op: &v1::Operation) -> Result<ValidOp, Box<Refused>> {
    let check = Check {
        rules,
        host_id: HOST,
        role: HostRole::Host,
        incarnation_max: INCARNATION,
    };
    let mut ops = Vec::new();
    check.operation(0, &op.encode_to_vec().into(), &mut HashSet::new(), &mut ops)?;
    Ok(ops.remove(0))
}

#[test]
fn a_put_and_a_delete_pass_with_what_the_policy_says_of_them() {
    let rules = Rules::builtin();
    let op = check(&rules, &put()).expect("valid");
    assert_eq!(
        (op.data_type, op.map.as_str(), op.deleted),
        (SyncDataType::MonsterData, "prontera", false)
    );
    assert_eq!(op.payload.as_deref(), Some(r#"{"monster_id":7,"hp":3}"#));
    assert_eq!(op.history, rules.of(SyncDataType::MonsterData).history);
    let delete = v1::Operation {
        kind: OperationKind::Delete.into(),
        payload: None,
        ..put()
    };
    assert!(check(&rules, &delete).expect("valid").deleted);
}

fn assert_refused_and_settled(cases: impl IntoIterator<Item = (v1::Operation, Code)>) {
    let rules = Rules::builtin();
    for (op, code) in cases {
        let refused = check(&rules, &op).expect_err(code.label());
        assert_eq!(refused.problem.code, code, "{}", refused.problem);
        assert_eq!(
            refused.position,
            Some(Position {
                incarnation: INCARNATION,
                sequence: 5
            }),
            "{code}"
        );
        assert!(refused.problem.sentence.len() <= REASON_BYTES_MAX);
    }
}

#[test]
fn each_malformed_operation_is_refused_with_its_code_and_settles() {
    let before = |incarnation, sequence| v1::Operation {
        predecessor: Some(OperationRef { incarnation, sequence }),
        ..put()
    };
    assert_refused_and_settled([
        (
            v1::Operation {
                operation_id: Bytes::from_static(b"short"),
                ..put()
            },
            Code::BadOperation,
        ),
        (
            v1::Operation {
                kind: OperationKind::Unspecified.into(),
                ..put()
            },
            Code::BadOperation,
        ),
        (v1::Operation { kind: 77, ..put() }, Code::BadOperation),
        (
            v1::Operation {
                kind: OperationKind::Group.into(),
                ..put()
            },
            Code::BadOperation,
        ),
        (
            v1::Operation {
                payload: Some(Payload::Delta(v1::Delta::default())),
                ..put()
            },
            Code::Unsupported,
        ),
        (
            v1::Operation {
                payload: Some(Payload::Blob(v1::Blob::default())),
                ..put()
            },
            Code::Unsupported,
        ),
        (v1::Operation { payload: None, ..put() }, Code::BadOperation),
        (
            v1::Operation {
                kind: OperationKind::Delete.into(),
                ..put()
            },
            Code::BadOperation,
        ),
        (with_version(u64::MAX, INCARNATION, 5), Code::BadOperation),
        (
            v1::Operation {
                hub_edit_seen: u64::MAX,
                ..put()
            },
            Code::BadOperation,
        ),
        (
            v1::Operation {
                made_at_ms: u64::MAX,
                ..put()
            },
            Code::BadOperation,
        ),
        (before(INCARNATION, 5), Code::BadOperation),
        (before(INCARNATION, 0), Code::BadOperation),
        (before(INCARNATION + 1, 1), Code::BadOperation),
        (
            v1::Operation {
                presence: Some(OperationRef {
                    incarnation: INCARNATION,
                    sequence: 5,
                }),
                ..put()
            },
            Code::BadOperation,
        ),
    ]);
}

#[test]
fn where_a_player_is_is_not_edited() {
    let edit = |path: &str, payload| {
        let path = Path::parse(path).expect("a path");
        check_edit(&Rules::builtin(), &path, payload).map_err(|problem| problem.code)
    };
    for payload in [Some(r#"{"event":"enter","char_id":7}"#), None] {
        assert_eq!(edit("@char/7/PLAYER_PRESENCE", payload), Err(Code::BadOperation));
    }
    assert_eq!(edit("@char/7/PLAYER_DATA", None), Ok(()));
}

#[test]
fn a_players_coming_and_going_is_refused_where_nobody_could_be_moved_by_it() {
    let presence = |payload: &str| v1::Operation {
        path: "@char/7/PLAYER_PRESENCE".to_owned(),
        map: "prontera".to_owned(),
        ..with_payload(payload)
    };
    let enter = || presence(r#"{"event":"enter","char_id":7}"#);
    let rules = Rules::builtin();
    let op = check(&rules, &enter()).expect("valid");
    assert_eq!(
        (op.map.as_str(), op.keep),
        ("prontera", p2p_sync_proto::policy::Keep::Every)
    );
    let nowhere = |event: &str| v1::Operation {
        map: String::new(),
        ..presence(&format!("{{\"event\":\"{event}\"}}"))
    };
    check(&rules, &nowhere("leave")).expect("valid");
    let deleted = v1::Operation {
        kind: OperationKind::Delete.into(),
        payload: None,
        ..enter()
    };
    assert_refused_and_settled([
        (nowhere("enter"), Code::BadMap),
        (presence("{}"), Code::SchemaViolation),
        (presence(r#"{"event":"warp"}"#), Code::SchemaViolation),
        (deleted, Code::BadOperation),
        (with_path("@char/9223372036854775808/PLAYER_DATA"), Code::BadPath),
        (group_of(&[enter()]), Code::BadOperation),
    ]);
}

#[test]
fn each_path_that_is_not_the_hosts_to_write_is_refused_with_its_code() {
    let own = format!("@host/{HOST}/HOST_METRICS");
    let foreign = format!("@host/{}/HOST_METRICS", Uuid::from_u128(8));
    assert_refused_and_settled([
        (with_path(""), Code::BadMap),
        (with_path("prontera/MONSTER_DATA/a/b"), Code::BadPath),
        (with_path("prontera/NO_TYPE"), Code::UnknownType),
        (with_path("@char/1/MONSTER_DATA/7"), Code::BadPath),
        (with_path(&foreign), Code::NotLeaseHolder),
        (
            v1::Operation {
                path: own.clone(),
                ..with_version(1, INCARNATION, 5)
            },
            Code::NotLeaseHolder,
        ),
        (
            v1::Operation {
                map: "not a map".to_owned(),
                ..with_path(&own)
            },
            Code::BadMap,
        ),
        (
            v1::Operation {
                policy_version: 2,
                ..put()
            },
            Code::Repolicy,
        ),
    ]);
}

#[test]
fn invariant_04_a_host_in_the_hubs_role_reports_the_metrics_of_others_and_nothing_else_of_theirs() {
    let rules = Rules::builtin();
    let other = Uuid::from_u128(8);
    let told = |role, data_type: &str, payload: &str| {
        let check = Check {
            rules: &rules,
            host_id: HOST,
            role,
            incarnation_max: INCARNATION,
        };
        let op = v1::Operation {
            path: format!("@host/{other}/{data_type}"),
            ..with_payload(payload)
        };
        let checked = check.operation(0, &op.encode_to_vec().into(), &mut HashSet::new(), &mut Vec::new());
        checked.map_err(|refused| refused.problem.code)
    };
    let metrics = r#"{"cpu_percent":12.5,"players":3,"loop_late_ms_max":7}"#;
    assert_eq!(told(HostRole::Hub, "HOST_METRICS", metrics), Ok(()));
    assert_eq!(told(HostRole::Host, "HOST_METRICS", metrics), Err(Code::NotLeaseHolder));
    assert_eq!(
        told(HostRole::Hub, "SECURITY_VALIDATION/1", "{}"),
        Err(Code::NotLeaseHolder)
    );
    let impossible = r#"{"cpu_percent":101}"#;
    assert_eq!(
        told(HostRole::Hub, "HOST_METRICS", impossible),
        Err(Code::ImpossibleValue)
    );
}

#[test]
fn each_bad_payload_is_refused_with_its_code() {
    let deep = "[".repeat(40) + &"]".repeat(40);
    let large = format!("\"{}\"", "x".repeat(256 * 1024));
    assert_refused_and_settled([
        (with_payload(""), Code::InvalidJson),
        (with_payload("{"), Code::InvalidJson),
        (with_payload(r#"{"a":1,"a":2}"#), Code::DuplicateKey),
        (with_payload(r#"{"a":"\u0000"}"#), Code::BadText),
        (with_payload(&deep), Code::TooDeep),
        (with_payload(&large), Code::TooLarge),
        (with_payload(r#"{"monster_id":7,"hp":"1"}"#), Code::SchemaViolation),
        (with_payload(r#"{"monster_id":7,"hp":-1}"#), Code::ImpossibleValue),
        (
            with_payload(r#"{"monster_id":7,"hp":4,"max_hp":3}"#),
            Code::ImpossibleValue,
        ),
    ]);
}

#[test]
fn what_has_no_place_in_the_hosts_order_settles_nothing() {
    let rules = Rules::builtin();
    for op in [
        v1::Operation { version: None, ..put() },
        with_version(0, INCARNATION, 0),
        with_version(0, INCARNATION, u64::MAX),
        with_version(0, INCARNATION + 1, 1),
    ] {
        let refused = check(&rules, &op).expect_err("no position");
        assert_eq!((refused.problem.code, refused.position), (Code::BadOperation, None));
    }
}

#[test]
fn only_the_canonical_bytes_are_an_operation() {
    let rules = Rules::builtin();
    let check = Check {
        rules: &rules,
        host_id: HOST,
        role: HostRole::Host,
        incarnation_max: INCARNATION,
    };
    let canonical = put().encode_to_vec();
    let unknown_field = [canonical.as_slice(), &[0xf8, 0x07, 0x01]].concat();
    let twice = [canonical.as_slice(), &[0x28, 0x00]].concat();
    let cut = canonical[..canonical.len() - 1].to_vec();
    let readable = Some(Position {
        incarnation: INCARNATION,
        sequence: 5,
    });
    for (bytes, position) in [
        (unknown_field, readable),
        (twice, readable),
        (b"\xff\xff".to_vec(), None),
        (cut, None),
    ] {
        let refused = check
            .operation(0, &bytes.into(), &mut HashSet::new(), &mut Vec::new())
            .expect_err("not canonical");
        assert_eq!(
            (refused.problem.code, refused.position),
            (Code::BadOperation, position),
            "what can be placed settles, so that nothing waits for it"
        );
    }
}

#[test]
fn no_more_is_kept_of_a_refused_operation_than_a_valid_one_may_have() {
    let rules = Rules::builtin();
    let huge = v1::Operation {
        path: "é".repeat(PATH_BYTES_MAX),
        ..with_payload(&"0".repeat(PAYLOAD_BYTES_MAX + 1))
    };
    let refused = check(&rules, &huge).expect_err("no path");
    assert_eq!(
        (refused.path.len(), refused.payload.len()),
        (PATH_BYTES_MAX, PAYLOAD_BYTES_MAX)
    );
    let small = Policy {
        payload_bytes_max: 100,
        ..rules.policies.of(SyncDataType::MonsterData).clone()
    };
    let rules = rules.with_policy(1, small);
    let refused = check(&rules, &with_payload(&"0".repeat(101))).expect_err("too large");
    assert_eq!((refused.problem.code, refused.payload.len()), (Code::TooLarge, 100));
}

#[test]
fn two_operations_of_a_message_never_share_a_version() {
    let rules = Rules::builtin();
    let check = Check {
        rules: &rules,
        host_id: HOST,
        role: HostRole::Host,
        incarnation_max: INCARNATION,
    };
    let (bytes, mut seen) = (Bytes::from(put().encode_to_vec()), HashSet::new());
    let mut ops = Vec::new();
    check.operation(0, &bytes, &mut seen, &mut ops).expect("the first");
    let refused = check.operation(1, &bytes, &mut seen, &mut ops).expect_err("the second");
    assert_eq!(
        (refused.index, refused.position),
        (1, None),
        "refusing it does not settle the first"
    );
}

#[test]
fn operations_made_by_the_built_in_policies_pass_while_these_give_the_same_path() {
    let mut rules = Rules::builtin();
    let builtin = v1::Operation {
        policy_version: 0,
        ..put()
    };
    check(&rules, &builtin).expect("the same path");
    let changed = Policy {
        entity_key: Some("id".to_owned()),
        ..rules.policies.of(SyncDataType::MonsterData).clone()
    };
    rules = rules.with_policy(3, changed);
    assert_eq!(
        check(&rules, &builtin).expect_err("another path").problem.code,
        Code::Repolicy
    );
    for (version, passes) in [(1, false), (2, true), (3, true), (4, false), (u32::MAX, false)] {
        let op = v1::Operation {
            policy_version: version,
            ..put()
        };
        assert_eq!(check(&rules, &op).is_ok(), passes, "version {version}");
    }
}

#[test]
fn a_message_that_is_wrong_as_a_whole_is_not_decided() {
    let range = |incarnation, first, last| v1::OperationBatch {
        operations: Vec::new(),
        withdrawn: vec![SequenceRange {
            incarnation,
            first,
            last,
        }],
    };
    let operations = |count| v1::OperationBatch {
        operations: vec![Bytes::new(); count],
        withdrawn: Vec::new(),
    };
    assert_eq!(check_batch(&operations(BATCH_OPS_MAX), INCARNATION), Ok(()));
    assert_eq!(check_batch(&range(INCARNATION, 1, 1), INCARNATION), Ok(()));
    for batch in [
        operations(BATCH_OPS_MAX + 1),
        v1::OperationBatch {
            operations: Vec::new(),
            withdrawn: vec![SequenceRange::default(); BATCH_WITHDRAWN_MAX + 1],
        },
        v1::OperationBatch {
            operations: Vec::new(),
            withdrawn: (0..=BATCH_INCARNATIONS_MAX as u64)
                .flat_map(|of| range(of, 1, 1).withdrawn)
                .collect(),
        },
        range(INCARNATION, 0, 1),
        range(INCARNATION, 2, 1),
        range(INCARNATION, 1, u64::MAX),
        range(INCARNATION + 1, 1, 1),
    ] {
        assert_eq!(
            check_batch(&batch, INCARNATION).expect_err("nonsense").code,
            Code::BadRequest
        );
    }
}

fn group_of(members: &[v1::Operation]) -> v1::Operation {
    v1::Operation {
        path: String::new(),
        kind: OperationKind::Group.into(),
        policy_version: 0,
        payload: Some(Payload::Group(v1::Group {
            members: members.iter().map(|member| member.encode_to_vec().into()).collect(),
        })),
        ..put()
    }
}

fn check_all(op: &v1::Operation) -> Result<Vec<ValidOp>, Box<Refused>> {
    let rules = Rules::builtin();
    let check = Check {
        rules: &rules,
        host_id: HOST,
        role: HostRole::Host,
        incarnation_max: INCARNATION,
    };
    let mut ops = Vec::new();
    let checked = check.operation(4, &op.encode_to_vec().into(), &mut HashSet::new(), &mut ops);
    checked.map(|()| ops)
}

#[test]
fn each_member_of_a_group_becomes_an_operation_under_the_groups_id_and_position() {
    let delete = v1::Operation {
        kind: OperationKind::Delete.into(),
        payload: None,
        version: with_version(3, INCARNATION, 5).version,
        ..with_path("geffen/MONSTER_DATA/8")
    };
    let ops = check_all(&group_of(&[put(), delete])).expect("valid");
    let facts: Vec<_> = ops
        .iter()
        .map(|op| {
            let (sequence, tenure) = (op.position.sequence, op.tenure);
            (op.index, op.path.as_str(), op.deleted, sequence, tenure, op.in_group)
        })
        .collect();
    assert_eq!(
        facts,
        [
            (4, "prontera/MONSTER_DATA/7", false, 5, 0, true),
            (4, "geffen/MONSTER_DATA/8", true, 5, 3, true)
        ]
    );
    assert_eq!(ops[0].operation_id, ops[1].operation_id);
}

#[test]
fn a_group_is_refused_whole_by_its_first_wrong_member_and_kept_readable() {
    let members = [
        put(),
        v1::Operation {
            path: "geffen/MONSTER_DATA/8".to_owned(),
            ..with_payload("{")
        },
    ];
    let refused = check_all(&group_of(&members)).expect_err("a member is no JSON");
    assert_eq!(refused.problem.code, Code::InvalidJson);
    assert!(
        refused.problem.sentence.starts_with("member 1 of the group"),
        "{}",
        refused.problem
    );
    assert_eq!(refused.position.map(|position| position.sequence), Some(5));
    let kept: serde_json::Value = serde_json::from_slice(&refused.payload).expect("JSON");
    assert_eq!((&kept[0]["data"]["hp"], &kept[1]["data"]), (&3.into(), &"{".into()));
}

#[test]
fn a_group_that_is_none_is_refused() {
    let far = with_version(0, INCARNATION, 6);
    let stranger = v1::Operation {
        operation_id: Uuid::from_u128(2).as_bytes().to_vec().into(),
        ..put()
    };
    let many: Vec<_> = (0..=p2p_sync_proto::limits::GROUP_MEMBERS_MAX)
        .map(|n| with_path(&format!("prontera/MONSTER_DATA/{n}")))
        .collect();
    let large: Vec<_> = (0..4)
        .map(|n| v1::Operation {
            path: format!("prontera/NPC_STATE/{n}"),
            ..with_payload(&format!("\"{}\"", "x".repeat(200 * 1024)))
        })
        .collect();
    for (group, code, sentence) in [
        (group_of(&[]), Code::BadOperation, "1 to 64 members, this one 0"),
        (group_of(&many), Code::BadOperation, "1 to 64 members, this one 65"),
        (group_of(&large), Code::TooLarge, "a group has at most 786432"),
        (
            group_of(&[put(), put()]),
            Code::BadOperation,
            "two members of the group write prontera/MONSTER_DATA/7",
        ),
        (
            group_of(&[far]),
            Code::BadOperation,
            "the id and the position of its group",
        ),
        (
            group_of(&[stranger]),
            Code::BadOperation,
            "the id and the position of its group",
        ),
        (
            group_of(&[group_of(&[put()])]),
            Code::BadOperation,
            "a group's members are no groups",
        ),
        (
            v1::Operation {
                account_id: 7,
                ..group_of(&[put()])
            },
            Code::BadOperation,
            "all else is its members'",
        ),
        (
            v1::Operation {
                version: with_version(1, INCARNATION, 5).version,
                ..group_of(&[put()])
            },
            Code::BadOperation,
            "all else is its members'",
        ),
    ] {
        let refused = check_all(&group).expect_err(sentence);
        assert_eq!(refused.problem.code, code, "{}", refused.problem);
        assert!(refused.problem.sentence.contains(sentence), "{}", refused.problem);
    }
}

/// The most memory this process has had since the count was begun anew, bytes.
#[cfg(target_os = "linux")]
fn most_memory() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux has it");
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM:"))
        .expect("and this");
    let kibibytes = line.split_whitespace().nth(1).expect("a number");
    kibibytes.parse::<usize>().expect("a number") * 1024
}

#[cfg(target_os = "linux")]
#[test]
fn invariant_12_a_group_of_a_million_empty_members_costs_no_more_than_its_bytes() {
    const MEMBERS: usize = 1_000_000;
    let mut op = group_of(&[]).encode_to_vec();
    let empty_group = op.split_off(op.len() - 3);
    assert_eq!(empty_group, [0x9a, 1, 0], "the field of the group, and its length");
    op.extend([0x9a, 1]);
    prost::encoding::encode_varint(2 * MEMBERS as u64, &mut op);
    op.extend([10, 0].repeat(MEMBERS));
    let bytes = Bytes::from(op);
    let rules = Rules::builtin();
    let check = Check {
        rules: &rules,
        host_id: HOST,
        role: HostRole::Host,
        incarnation_max: INCARNATION,
    };
    // 5: what was most is counted anew.
    std::fs::write("/proc/self/clear_refs", "5").expect("Linux has it");
    let before = most_memory();
    let refused = check.operation(0, &bytes, &mut HashSet::new(), &mut Vec::new());
    let grown = most_memory() - before;
    assert!(grown < 8 * 1024 * 1024, "{grown} bytes for a message of 2 MiB");
    let refused = refused.expect_err("too many members");
    assert!(
        refused.problem.sentence.contains("this one 1000000"),
        "{}",
        refused.problem
    );
    assert_eq!(
        refused.position.map(|position| position.sequence),
        Some(5),
        "it is settled"
    );
    let kept: serde_json::Value = serde_json::from_slice(&refused.payload).expect("JSON");
    assert_eq!(kept.as_array().map(Vec::len), Some(64));
}
