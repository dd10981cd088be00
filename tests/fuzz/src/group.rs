//! Groups, which are looked at before they are built.

use p2p_sync_proto::{
    group::{Glance, readable},
    limits::{BATCH_BYTES_MAX, GROUP_MEMBERS_MAX},
    v1::{Group, Operation, operation::Payload},
};
use prost::{Message as _, bytes::Bytes};

use crate::way;

/// See the module.
pub fn read(input: &[u8]) {
    let Some((way, rest)) = way(input) else { return };
    let bytes = if way.is_multiple_of(2) {
        Bytes::copy_from_slice(rest)
    } else {
        grouped(way, rest)
    };
    let whole = Operation::decode(bytes.clone());
    let Some(glance) = Glance::at(&bytes) else {
        assert!(whole.is_err(), "an operation that no glance sees through");
        return;
    };
    let (members, is_crowded) = (glance.members, glance.is_crowded());
    assert_eq!(is_crowded, members > GROUP_MEMBERS_MAX);
    let glimpsed = glance.operation(&bytes);
    let Ok(operation) = whole else { return };
    if operation.encode_to_vec() != bytes {
        return;
    }
    let group = match &operation.payload {
        Some(Payload::Group(group)) => group.clone(),
        _ => Group::default(),
    };
    assert_eq!(members, group.members.len());
    if !is_crowded && members > 0 {
        assert_eq!(glimpsed.as_ref(), Some(&operation));
    }
    let shown = readable(&group);
    assert!(shown.len() <= BATCH_BYTES_MAX);
    if shown.len() < BATCH_BYTES_MAX {
        // Numbers that no program can hold are JSON all the same.
        serde_json::from_str::<&serde_json::value::RawValue>(&shown).expect("JSON");
    }
}

/// Members as long as the input says, canonical as a whole.
fn grouped(way: u8, mut rest: &[u8]) -> Bytes {
    let mut members = Vec::new();
    while let Some((&length, behind)) = rest.split_first() {
        let (member, behind) = behind.split_at(usize::from(length).min(behind.len()));
        let member = Bytes::copy_from_slice(member);
        members.extend(std::iter::repeat_n(
            member,
            if length == 0 { usize::from(way) } else { 1 },
        ));
        rest = behind;
    }
    let operation = Operation {
        payload: Some(Payload::Group(Group { members })),
        ..Operation::default()
    };
    operation.encode_to_vec().into()
}
