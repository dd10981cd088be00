//! Groups: operations that take effect together or not at all.

use prost::{
    Message as _,
    bytes::{Buf as _, Bytes},
    encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field},
};
use serde::Serialize;
use serde_json::value::RawValue;

use crate::{
    Code, Problem,
    limits::{BATCH_BYTES_MAX, GROUP_BYTES_MAX, GROUP_MEMBERS_MAX},
    v1::{Group, Operation, operation::Payload},
};

/// Of the fields of an operation's payload, of a group among them, and of a group's members.
const PAYLOAD_TAGS: std::ops::RangeInclusive<u32> = 16..=19;
const GROUP_TAG: u32 = 19;
const MEMBER_TAG: u32 = 1;

/// Refuses a group of no members or too many (`BAD_OPERATION`).
pub fn check_members(members: usize) -> Result<(), Problem> {
    if (1..=GROUP_MEMBERS_MAX).contains(&members) {
        return Ok(());
    }
    let sentence = format!("a group has 1 to {GROUP_MEMBERS_MAX} members, this one {members}: split it");
    Err(Problem::new(Code::BadOperation, sentence))
}

/// Refuses a group that is too large, encoded (`TOO_LARGE`).
pub fn check_bytes(bytes: usize) -> Result<(), Problem> {
    if bytes <= GROUP_BYTES_MAX {
        return Ok(());
    }
    let sentence = format!("the group has {bytes} bytes; a group has at most {GROUP_BYTES_MAX}: split it");
    Err(Problem::new(Code::TooLarge, sentence))
}

/// Refuses a group of which two members write one path (`BAD_OPERATION`).
pub fn check_distinct<'a>(paths: impl Iterator<Item = &'a str>) -> Result<(), Problem> {
    let mut paths: Vec<&str> = paths.collect();
    paths.sort_unstable();
    match paths.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => {
            let sentence = format!("two members of the group write {}: keep the newer", pair[0]);
            Err(Problem::new(Code::BadOperation, sentence))
        }
        None => Ok(()),
    }
}

/// The refusal of a group for one of its members, counted from 0.
#[must_use]
pub fn refused_member(member: usize, mut problem: Problem) -> Problem {
    problem.sentence = format!("member {member} of the group, counted from 0: {}", problem.sentence);
    problem
}

/// The group in an operation's bytes as far as it is looked at before anything is built of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Glance {
    /// How many members it has.
    pub members: usize,
    /// The first [`GROUP_MEMBERS_MAX`] of them.
    pub first: Group,
    /// Where the operation's first payload begins; its end where there is none.
    pub payload_at: usize,
}

impl Glance {
    /// Looks at an operation's bytes; `None` where they are none. A member takes two of them, and decoded many times as
    /// much: whoever decodes a stranger's group counts its members first.
    pub fn at(operation: &Bytes) -> Option<Self> {
        let mut glance = Self {
            payload_at: operation.len(),
            ..Self::default()
        };
        let mut left = operation.clone();
        while left.has_remaining() {
            let at = operation.len() - left.len();
            let (tag, wire_type) = decode_key(&mut left).ok()?;
            if PAYLOAD_TAGS.contains(&tag) {
                glance.payload_at = glance.payload_at.min(at);
            }
            if tag == GROUP_TAG && wire_type == WireType::LengthDelimited {
                glance.look_at_members(take(&mut left)?)?;
            } else {
                skip_field(wire_type, tag, &mut left, DecodeContext::default()).ok()?;
            }
        }
        Some(glance)
    }

    /// Whether there are more members than a group may have.
    #[must_use]
    pub fn is_crowded(&self) -> bool {
        self.members > GROUP_MEMBERS_MAX
    }

    /// The operation at whose bytes this is; of a group only the first members.
    pub fn operation(self, operation: &Bytes) -> Option<Operation> {
        if self.members == 0 {
            return Operation::decode(operation.clone()).ok();
        }
        let head = Operation::decode(operation.slice(..self.payload_at)).ok()?;
        Some(Operation {
            payload: Some(Payload::Group(self.first)),
            ..head
        })
    }

    fn look_at_members(&mut self, mut group: Bytes) -> Option<()> {
        while group.has_remaining() {
            let (tag, wire_type) = decode_key(&mut group).ok()?;
            if tag != MEMBER_TAG || wire_type != WireType::LengthDelimited {
                skip_field(wire_type, tag, &mut group, DecodeContext::default()).ok()?;
                continue;
            }
            let member = take(&mut group)?;
            self.members += 1;
            if self.members <= GROUP_MEMBERS_MAX {
                self.first.members.push(member);
            }
        }
        Some(())
    }
}

/// Takes a field of bytes whose key was read.
fn take(from: &mut Bytes) -> Option<Bytes> {
    let length = usize::try_from(decode_varint(from).ok()?).ok()?;
    (length <= from.len()).then(|| from.split_to(length))
}

/// One member as a dead letter shows it.
#[derive(Debug, Serialize)]
pub struct Member<'a> {
    /// Whose state it is.
    pub path: &'a str,
    /// Whom it is about; 0 for nobody.
    pub account_id: u32,
    /// Where it happened, when the path does not say.
    pub map: &'a str,
    /// The payload; absent for a DELETE.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<Box<RawValue>>,
}

/// Members as people read them: a JSON array.
pub fn to_json<'a>(members: impl IntoIterator<Item = Member<'a>>) -> String {
    let members: Vec<Member<'_>> = members.into_iter().collect();
    serde_json::to_string(&members).expect("texts and numbers")
}

/// What is readable of a group, whatever its members are: a JSON array of the first [`GROUP_MEMBERS_MAX`], cut to
/// [`BATCH_BYTES_MAX`].
pub fn readable(group: &Group) -> String {
    let mut json = String::from("[");
    for bytes in group.members.iter().take(GROUP_MEMBERS_MAX) {
        if json.len() >= BATCH_BYTES_MAX {
            break;
        }
        if json.len() > 1 {
            json.push(',');
        }
        let member = Glance::at(bytes).and_then(|glance| glance.operation(bytes));
        let member = member.unwrap_or_default();
        let member = Member {
            path: &member.path,
            account_id: member.account_id,
            map: &member.map,
            data: match &member.payload {
                Some(Payload::Full(payload)) => Some(json_of(&payload[..payload.len().min(BATCH_BYTES_MAX)])),
                _ => None,
            },
        };
        json += &serde_json::to_string(&member).expect("texts and numbers");
    }
    json.push(']');
    json.truncate(json.floor_char_boundary(BATCH_BYTES_MAX));
    json
}

/// A payload as it is; one that is no JSON as a text.
fn json_of(payload: &[u8]) -> Box<RawValue> {
    let text = String::from_utf8_lossy(payload);
    serde_json::from_str(&text)
        .or_else(|_| serde_json::value::to_raw_value(&text))
        .expect("every text is one of JSON's")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_readable_of_a_group_is_json_whatever_its_members_are() {
        let member = |path: &str, payload: Option<&'static [u8]>| {
            let operation = Operation {
                path: path.to_owned(),
                payload: payload.map(|payload| Payload::Full(payload.into())),
                ..Operation::default()
            };
            operation.encode_to_vec().into()
        };
        let group = Group {
            members: vec![
                member("a/MAP_STATE", Some(b"{\"users\": 1}")),
                member("b/MAP_STATE", Some(b"\xff{")),
                member("c/MAP_STATE", None),
                (&b"no operation"[..]).into(),
            ],
        };
        let json: serde_json::Value = serde_json::from_str(&readable(&group)).expect("JSON");
        assert_eq!(json[0]["data"]["users"], 1);
        assert_eq!(json[1]["data"], "\u{fffd}{");
        assert_eq!(json[2].get("data"), None);
        assert_eq!(json[3]["path"], "");
    }

    fn grouped(group: Group) -> Bytes {
        let operation = Operation {
            path: "a/MAP_STATE".to_owned(),
            payload: Some(Payload::Group(group)),
            ..Operation::default()
        };
        operation.encode_to_vec().into()
    }

    #[test]
    fn a_glance_counts_all_members_and_takes_the_first() {
        let members = |count: usize| Group {
            members: (0..count).map(|n| vec![b' '; n % 3].into()).collect(),
        };
        for count in [1, GROUP_MEMBERS_MAX, GROUP_MEMBERS_MAX + 1, 1000] {
            let bytes = grouped(members(count));
            let glance = Glance::at(&bytes).expect("an operation");
            assert_eq!(glance.members, count);
            assert_eq!(glance.is_crowded(), count > GROUP_MEMBERS_MAX);
            let whole = Operation::decode(bytes.clone()).expect("an operation");
            let first = Operation {
                payload: Some(Payload::Group(members(count.min(GROUP_MEMBERS_MAX)))),
                ..whole
            };
            assert_eq!(glance.operation(&bytes), Some(first));
        }
        let single = Operation {
            payload: Some(Payload::Full((&b"{}"[..]).into())),
            ..Operation::default()
        };
        let bytes = single.encode_to_vec().into();
        let glance = Glance::at(&bytes).expect("an operation");
        assert_eq!((glance.members, glance.operation(&bytes)), (0, Some(single)));
        assert_eq!(Glance::at(&grouped(members(9)).slice(..30)), None, "cut off");
    }

    #[test]
    fn invariant_12_no_more_is_readable_of_a_group_than_its_bound() {
        let empty = Group {
            members: vec![Bytes::new(); 10 * GROUP_MEMBERS_MAX],
        };
        let json: serde_json::Value = serde_json::from_str(&readable(&empty)).expect("JSON");
        assert_eq!(json.as_array().map(Vec::len), Some(GROUP_MEMBERS_MAX));
        let control = Operation {
            payload: Some(Payload::Full(vec![1; 2 * BATCH_BYTES_MAX].into())),
            ..Operation::default()
        };
        let large = Group {
            members: vec![control.encode_to_vec().into(); 3],
        };
        assert_eq!(readable(&large).len(), BATCH_BYTES_MAX);
        let nested = Group {
            members: vec![grouped(large)],
        };
        let json: serde_json::Value = serde_json::from_str(&readable(&nested)).expect("JSON");
        assert_eq!(json[0].get("data"), None, "a group's members are no groups");
    }
}
