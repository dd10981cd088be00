//! The lines between an attached program and the standalone agent, one JSON object each.
//!
//! The program begins with `{"do":"attach","client":"<uuid>"}` and is answered with a [`Told`] that has the host's id, the
//! policies and the highest number of that program's operations on disk. Then it writes operations, numbered 1, 2, … from
//! its start on, without an answer line each, and is told by further lines what becomes of them.

use std::fmt::Write as _;

use p2p_sync_proto::{Code, Policies, Problem};
use serde::{Deserialize, Serialize};
use serde_json::{json, value::RawValue};
use uuid::Uuid;

use crate::{
    agent::Status,
    lanes::{Priority, Submission},
    local_api::result_json,
    outbox::ms_since_1970,
    results::{OperationState, Settled},
};

/// Edits that were read, in one line.
pub(crate) const SEEN_MAX: usize = 64;
/// Operations whose states are asked for in one line.
pub(crate) const STATES_MAX: usize = 512;

/// What a program says once it is attached.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Said {
    /// `put` or `states`.
    #[serde(rename = "do")]
    pub(crate) action: String,
    /// Of the operation; grows by one with each.
    pub(crate) number: u64,
    pub(crate) operation_id: Uuid,
    pub(crate) made_at_ms: u64,
    #[serde(rename = "type")]
    pub(crate) data_type: String,
    pub(crate) map: String,
    pub(crate) account_id: u32,
    pub(crate) entity: Option<String>,
    pub(crate) char_id: Option<u64>,
    pub(crate) data: Option<Box<RawValue>>,
    pub(crate) priority: bool,
    /// Someone waits for it: it goes to disk at once.
    pub(crate) urgent: bool,
    /// Of a group, which has no operation of its own.
    pub(crate) members: Vec<SaidMember>,
    /// What was read since the operation before: paths, and the last edit of each by the hub's operator.
    pub(crate) seen: Vec<(String, u64)>,
    /// For `states`.
    pub(crate) operation_ids: Vec<Uuid>,
}

/// One operation of a group.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct SaidMember {
    #[serde(rename = "type")]
    pub(crate) data_type: String,
    pub(crate) map: String,
    pub(crate) account_id: u32,
    pub(crate) entity: Option<String>,
    pub(crate) char_id: Option<u64>,
    pub(crate) data: Option<Box<RawValue>>,
    pub(crate) priority: bool,
}

/// What it is told; each line has some of it.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub(crate) struct Told {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) host_id: Option<Uuid>,
    /// Base64 of the contract's `Policies`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) policies: Option<String>,
    /// Its operations up to this number are on disk, or were refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) durable: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) status: Option<Status>,
    /// A page of `states` has been answered.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) answered: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) operation_id: Option<Uuid>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) state: Option<OperationState>,
    /// When it came so far, milliseconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) at_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) code: Option<i32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
}

impl Told {
    pub(crate) fn to_line(&self) -> String {
        serde_json::to_string(self).expect("plain data") + "\n"
    }

    /// Why something was refused, if it was.
    pub(crate) fn problem(&self) -> Option<Problem> {
        let code = self.code.and_then(|code| Code::try_from(code).ok());
        let sentence = self.error.clone()?;
        Some(Problem::new(code.unwrap_or(Code::Internal), sentence))
    }
}

/// How far a program's operations are on disk.
pub(crate) fn durable(number: u64) -> String {
    let told = Told {
        durable: Some(number),
        ..Told::default()
    };
    told.to_line()
}

/// What became of an operation.
pub(crate) fn state(operation_id: Uuid, settled: &Settled) -> String {
    let mut line = result_json(operation_id, settled);
    line["at_ms"] = json!(ms_since_1970(settled.at));
    line.to_string() + "\n"
}

/// An operation as a line without its beginning, which [`numbered`] adds.
pub(crate) fn put(submission: &Submission<'_>, operation_id: Uuid, made_at_ms: u64, urgent: bool) -> String {
    let mut line = begin(
        operation_id,
        made_at_ms,
        urgent,
        submission.payload.map_or(0, str::len) + 256,
    );
    line.push(',');
    write_members(submission, &mut line);
    line += "}\n";
    line
}

/// As [`put`], of a group.
pub(crate) fn put_group(submissions: &[Submission<'_>], operation_id: Uuid, made_at_ms: u64) -> String {
    let bytes = |submission: &Submission<'_>| submission.payload.map_or(0, str::len) + 256;
    let mut line = begin(operation_id, made_at_ms, false, submissions.iter().map(bytes).sum());
    line += r#","members":["#;
    for (at, submission) in submissions.iter().enumerate() {
        line += if at == 0 { "{" } else { ",{" };
        write_members(submission, &mut line);
        line.push('}');
    }
    line += "]}\n";
    line
}

fn begin(operation_id: Uuid, made_at_ms: u64, urgent: bool, capacity: usize) -> String {
    let mut line = String::with_capacity(capacity);
    // Writing to a string does not fail.
    let _ = write!(line, r#","operation_id":"{operation_id}","made_at_ms":{made_at_ms}"#);
    if urgent {
        line += r#","urgent":true"#;
    }
    line
}

/// What an operation tells, as the members of a JSON object.
fn write_members(submission: &Submission<'_>, line: &mut String) {
    let name = submission.data_type.as_str_name();
    let _ = write!(
        line,
        r#""type":"{name}","map":{},"account_id":{}"#,
        json!(submission.map),
        submission.account_id
    );
    if let Some(entity) = submission.entity {
        let _ = write!(line, r#","entity":{}"#, json!(entity));
    }
    if let Some(char_id) = submission.char_id {
        let _ = write!(line, r#","char_id":{char_id}"#);
    }
    if submission.priority == Priority::Critical {
        *line += r#","priority":true"#;
    }
    if let Some(payload) = submission.payload {
        *line += r#","data":"#;
        // Between the values of checked JSON a line's end is as good as a space, and within them there is none.
        line.extend(payload.split(['\n', '\r']).flat_map(|part| [part, " "]));
    }
}

/// What was read before an operation was made, added to its line.
pub(crate) fn add_seen(seen: &[(String, u64)], line: &mut String) {
    let end = line.trim_end().len() - 1;
    line.truncate(end);
    let _ = write!(line, r#","seen":{}}}"#, json!(seen));
    line.push('\n');
}

/// The whole line of an operation.
pub(crate) fn numbered(number: u64, put: &str, to: &mut String) {
    let _ = write!(to, r#"{{"do":"put","number":{number}{put}"#);
}

/// Asks for the states of operations.
pub(crate) fn states(operation_ids: &[Uuid]) -> String {
    json!({ "do": "states", "operation_ids": operation_ids }).to_string() + "\n"
}

/// The policies as a text.
pub(crate) fn write_policies(policies: &Policies) -> String {
    write_base64(&prost::Message::encode_to_vec(&policies.to_wire()))
}

/// The policies from a text.
pub(crate) fn read_policies(text: &str) -> Option<Policies> {
    let bytes = read_base64(text)?;
    let wire = prost::Message::decode(bytes.as_slice()).ok()?;
    Some(Policies::from_wire(wire))
}

pub(crate) fn write_base64(bytes: &[u8]) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

pub(crate) fn read_base64(text: &str) -> Option<Vec<u8>> {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.decode(text).ok()
}

#[cfg(test)]
mod tests {
    use p2p_sync_proto::v1::SyncDataType;

    use super::*;

    #[test]
    fn an_operation_is_read_as_it_was_written_and_takes_one_line() {
        let submission = Submission {
            data_type: SyncDataType::ChatMessage,
            map: "prontera",
            account_id: 7,
            entity: Some("a \"b\"\n"),
            char_id: Some(150_001),
            payload: Some("{\r\n \"text\": \"one\\ntwo\"\n}"),
            priority: Priority::Critical,
            notify: false,
        };
        let id = Uuid::from_u128(1);
        let mut line = String::new();
        numbered(9, &put(&submission, id, 3, true), &mut line);
        assert_eq!(line.find('\n'), Some(line.len() - 1));
        let said: Said = serde_json::from_str(&line).expect("JSON");
        assert_eq!((said.action.as_str(), said.number, said.operation_id), ("put", 9, id));
        assert_eq!((said.made_at_ms, said.account_id, said.char_id), (3, 7, Some(150_001)));
        assert_eq!(
            (said.data_type.as_str(), said.map.as_str()),
            ("CHAT_MESSAGE", "prontera")
        );
        assert_eq!(said.entity.as_deref(), submission.entity);
        assert!(said.priority && said.urgent);
        let data: serde_json::Value = serde_json::from_str(said.data.expect("given").get()).expect("JSON");
        assert_eq!(data, json!({"text": "one\ntwo"}));
    }

    #[test]
    fn policies_survive_a_line() {
        let policies = Policies::builtin();
        assert_eq!(read_policies(&write_policies(&policies)), Some(policies));
        assert_eq!(read_policies("!"), None);
    }
}
