//! Groups: operations that take effect together or not at all.

use prost::Message as _;
use serde::Serialize;
use serde_json::value::RawValue;

use crate::{
    Code, Problem,
    limits::{BATCH_BYTES_MAX, GROUP_BYTES_MAX, GROUP_MEMBERS_MAX},
    v1::{Group, Operation, operation::Payload},
};

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

/// What is readable of a group, whatever its members are: a JSON array, cut to [`BATCH_BYTES_MAX`].
pub fn readable(group: &Group) -> String {
    let members: Vec<Operation> = group
        .members
        .iter()
        .map(|bytes| Operation::decode(bytes.clone()).unwrap_or_default())
        .collect();
    let mut json = to_json(members.iter().map(|member| Member {
        path: &member.path,
        account_id: member.account_id,
        map: &member.map,
        data: match &member.payload {
            Some(Payload::Full(payload)) => Some(json_of(payload)),
            _ => None,
        },
    }));
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
}
