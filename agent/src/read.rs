//! Reading state from the hub: what is asked, and the answer as JSON, one way for all who read.

use p2p_sync_proto::{
    Code, Path, Policies, Policy, Problem,
    ids::read_id,
    json,
    policy::Place,
    settings::nearest,
    v1::{self, SyncDataType, pull_request::What},
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use uuid::Uuid;

/// The members that a request may have which names a path, and one which names a prefix. `p2p_sync_request.schema.json` says
/// the same, and what each may be.
const PATH: [&str; 4] = ["path", OPTIONS[0], OPTIONS[1], OPTIONS[2]];
const PREFIX: [&str; 4] = ["prefix", "limit", "cursor", OPTIONS[0]];
/// Of one that names neither, whatever its type, beside the type's own.
const NAMES: [&str; 2] = ["entity", "char_id"];
/// Of all that read one state.
const OPTIONS: [&str; 3] = ["kept", "at_least", "at_least_sequence"];

/// What an answer must not be older than.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct AtLeast {
    /// A version that is known of.
    pub(crate) version: Option<Known>,
    /// A position in the path's stream; 0 for none.
    pub(crate) sequence: u64,
}

/// A version, as a state's answer has it, and whose it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Known {
    /// 0, as where it is left out: not known.
    #[serde(default)]
    pub(crate) tenure: u64,
    pub(crate) incarnation: u64,
    pub(crate) sequence: u64,
    /// This host's own where it is left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) host_id: Option<Uuid>,
}

impl AtLeast {
    /// Reads the members of a request.
    fn of(members: &Map<String, Value>) -> Result<Self, Problem> {
        let not_one = |_| {
            bad(
                "\"at_least\" is an object of the whole numbers \"tenure\", \"incarnation\" and \"sequence\", as a state's \
                 version has them, and its \"host_id\"",
            )
        };
        let version = members.get("at_least").map(Known::deserialize).transpose();
        let sequence = members.get("at_least_sequence").map_or(Some(0), Value::as_u64);
        Ok(Self {
            version: version.map_err(not_one)?,
            sequence: sequence
                .ok_or_else(|| bad("\"at_least_sequence\" is a whole number, as a state's stream_sequence"))?,
        })
    }
}

/// Asks for the state at a path.
pub(crate) fn get(path: &str, at_least: &AtLeast) -> Result<v1::PullRequest, Problem> {
    let path = Path::parse(path)?.as_str().to_owned();
    let version = at_least.version;
    let host_id = version.and_then(|known| known.host_id);
    Ok(pull(What::Get(v1::Get {
        path,
        at_least: version.map(|known| v1::Version {
            tenure: known.tenure,
            incarnation: known.incarnation,
            sequence: known.sequence,
        }),
        at_least_sequence: at_least.sequence,
        at_least_host_id: host_id.map(|id| id.as_bytes().to_vec().into()).unwrap_or_default(),
    })))
}

/// Asks for a page of the states below a prefix; `cursor` as the last page's answer has it, empty for the first.
pub(crate) fn scan(prefix: &str, limit: u32, cursor: &str) -> Result<v1::PullRequest, Problem> {
    let not_one = || Problem::new(Code::BadCursor, "the cursor is not one: leave it out to begin again");
    let cursor = read_hex(cursor).ok_or_else(not_one)?.into();
    let prefix = prefix.to_owned();
    Ok(pull(What::Scan(v1::Scan { prefix, limit, cursor })))
}

/// Asks what `request` says; see [`crate::Question::Read`]. `place` has what the call gives beside it.
pub(crate) fn requested(
    policies: &Policies,
    data_type: SyncDataType,
    place: &Place<'_>,
    request: &str,
) -> Result<v1::PullRequest, Problem> {
    let request = if request.trim().is_empty() { "{}" } else { request };
    let facts = json::check(request)?;
    let Ok(Value::Object(members)) = serde_json::from_str::<Value>(request) else {
        return Err(bad(
            "the request is not a JSON object: write {} for the state of the call's own path",
        ));
    };
    let policy = policies.of(data_type);
    if members.get("kept").is_some_and(|kept| !kept.is_boolean()) {
        return Err(bad("\"kept\" is true or false"));
    }
    if members.contains_key("path") {
        refuse_unknown(&members, &PATH)?;
        get(text(&members, "path")?, &AtLeast::of(&members)?)
    } else if members.contains_key("prefix") {
        refuse_unknown(&members, &PREFIX)?;
        let limit = members
            .get("limit")
            .map_or(Some(0), |limit| u32::try_from(limit.as_u64()?).ok());
        let limit = limit.ok_or_else(|| bad("\"limit\" is a whole number from 0, for as many as the hub gives"))?;
        let cursor = members.get("cursor").map_or(Ok(""), |_| text(&members, "cursor"))?;
        scan(text(&members, "prefix")?, limit, cursor)
    } else {
        refuse_unknown(&members, &placed_members(policy))?;
        // What is of another kind would be passed over, and another path read than was meant.
        if let Some(name) = names(policy).find(|name| members.contains_key(*name) && facts.member(name).is_none()) {
            return Err(bad(&format!("{name:?} is a text or a whole number")));
        }
        let char_id = facts.member("char_id").map(|id| id.parse()).transpose();
        let entity = facts.member("entity");
        let place = Place {
            char_id: char_id.map_err(|_| bad("\"char_id\" is the number of a character"))?,
            entity: entity.as_deref(),
            ..*place
        };
        get(policy.path(&place, Some(&facts))?.as_str(), &AtLeast::of(&members)?)
    }
}

/// The members that say which path is meant among those that a type's policy gives.
fn names(policy: &Policy) -> impl Iterator<Item = &str> {
    let keys = [policy.owner_key.as_deref(), policy.entity_key.as_deref()];
    NAMES.into_iter().chain(keys.into_iter().flatten())
}

/// The members of a request whose path the type's policy gives.
fn placed_members(policy: &Policy) -> Vec<&str> {
    // The first two are none of them, but what somebody may have meant who misspelt one.
    ["path", "prefix"]
        .into_iter()
        .chain(names(policy))
        .chain(OPTIONS)
        .collect()
}

/// Whether a request, which [`requested`] has taken, is to be answered from what is kept here.
pub(crate) fn asks_for_kept(request: &str) -> bool {
    let request: Value = serde_json::from_str(request).unwrap_or_default();
    request["kept"] == true
}

/// The answer to [`get`] or [`scan`] as JSON.
pub(crate) fn answer_json(reply: v1::PullReply) -> Result<Value, Problem> {
    match reply.what {
        Some(v1::pull_reply::What::State(state)) => Ok(state_json(&state)),
        Some(v1::pull_reply::What::Page(page)) => {
            let states: Vec<Value> = page.states.iter().map(state_json).collect();
            let start = |start: &v1::ScanStart| json!({ "stream": start.stream, "sequence": start.sequence });
            let starts: Vec<Value> = page.starts.iter().map(start).collect();
            Ok(json!({
                "states": states,
                "more": page.more,
                "cursor": write_hex(&page.cursor),
                "starts": starts,
                "starts_left_out": page.starts_left_out,
            }))
        }
        _ => Err(unexpected()),
    }
}

/// A hub answered something that was not asked.
pub(crate) fn unexpected() -> Problem {
    Problem::new(Code::Internal, "the hub answered something else: update the agent")
}

/// A state as JSON.
pub(crate) fn state_json(state: &v1::State) -> Value {
    let version = state.version.unwrap_or_default();
    let data: Value = serde_json::from_slice(&state.payload).unwrap_or_default();
    json!({
        "path": state.path,
        "version": { "tenure": version.tenure, "incarnation": version.incarnation, "sequence": version.sequence },
        "deleted": state.deleted,
        "account_id": state.account_id,
        "host_id": read_id(&state.host_id).unwrap_or_default(),
        "stream_sequence": state.stream_sequence,
        "received_at_ms": state.received_at_ms,
        "hub_edit": state.hub_edit,
        "data": data,
    })
}

fn pull(what: What) -> v1::PullRequest {
    v1::PullRequest { what: Some(what) }
}

fn bad(sentence: &str) -> Problem {
    Problem::new(Code::BadRequest, sentence)
}

fn text<'m>(members: &'m Map<String, Value>, name: &str) -> Result<&'m str, Problem> {
    let value = members.get(name).and_then(Value::as_str);
    value.ok_or_else(|| bad(&format!("{name:?} is a text")))
}

fn refuse_unknown(members: &Map<String, Value>, known: &[&str]) -> Result<(), Problem> {
    let Some(unknown) = members.keys().find(|name| !known.contains(&name.as_str())) else {
        return Ok(());
    };
    let shown: String = unknown.chars().take(64).collect();
    Err(bad(&match nearest(unknown, known.iter().copied()) {
        Some(name) => format!("the request has no member {shown:?}; did you mean {name:?}?"),
        None => format!(
            "the request has no member {shown:?} here; it may have {}",
            known.join(", ")
        ),
    }))
}

fn write_hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

fn read_hex(text: &str) -> Option<Vec<u8>> {
    let digit = |at: usize| u8::from_str_radix(text.get(at..at + 2)?, 16).ok();
    (0..text.len()).step_by(2).map(digit).collect()
}

#[cfg(test)]
mod schema;

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(data_type: SyncDataType, request: &str) -> Result<What, Problem> {
        let place = Place {
            host_id: uuid::Uuid::nil(),
            map: "prontera",
            account_id: 2,
            char_id: None,
            entity: None,
        };
        requested(&Policies::builtin(), data_type, &place, request).map(|asked| asked.what.expect("asks something"))
    }

    #[test]
    fn without_a_path_the_types_policy_gives_it() {
        for (data_type, request, path) in [
            (SyncDataType::MapState, "", "prontera/MAP_STATE"),
            (SyncDataType::MapState, " {} ", "prontera/MAP_STATE"),
            (
                SyncDataType::MonsterData,
                r#"{"entity":"m7"}"#,
                "prontera/MONSTER_DATA/m7",
            ),
            (
                SyncDataType::MonsterData,
                r#"{"monster_id":7}"#,
                "prontera/MONSTER_DATA/7",
            ),
            (
                SyncDataType::PlayerPosition,
                r#"{"char_id":150001}"#,
                "prontera/PLAYER_POSITION/150001",
            ),
            (
                SyncDataType::QuestProgress,
                r#"{"char_id":1,"entity":9}"#,
                "@char/1/QUEST_PROGRESS/9",
            ),
            (
                SyncDataType::MapState,
                r#"{"path":"geffen/MAP_STATE"}"#,
                "geffen/MAP_STATE",
            ),
        ] {
            let path = path.to_owned();
            let get = v1::Get {
                path,
                ..Default::default()
            };
            assert_eq!(asked(data_type, request), Ok(What::Get(get)), "{request}");
        }
    }

    #[test]
    fn a_prefix_asks_for_a_page() {
        let asked = asked(
            SyncDataType::MapState,
            r#"{"prefix":"prontera/","limit":5,"cursor":"0aff"}"#,
        );
        let scan = v1::Scan {
            prefix: "prontera/".to_owned(),
            limit: 5,
            cursor: vec![0x0a, 0xff].into(),
        };
        assert_eq!(asked, Ok(What::Scan(scan)));
    }

    #[test]
    fn what_is_no_request_is_refused_with_what_to_write_instead() {
        for (request, code, part) in [
            (r#"{"pth":"prontera/MAP_STATE"}"#, Code::BadRequest, "\"path\""),
            (r#"{"prefix":"p","limt":3}"#, Code::BadRequest, "\"limit\""),
            (r#"{"monster":7}"#, Code::BadRequest, "\"monster_id\""),
            (r#"{"path":"prontera/MAP_STATE","limit":3}"#, Code::BadRequest, "limit"),
            (r#"{"prefix":"p","limit":-3}"#, Code::BadRequest, "whole number"),
            (r#"{"char_id":"Poring","entity":1}"#, Code::BadRequest, "character"),
            (r#"{"prefix":"p","cursor":"xyz"}"#, Code::BadCursor, "leave it out"),
            ("{}", Code::EntityMissing, "monster_id"),
            ("[]", Code::BadRequest, "JSON object"),
            ("{", Code::InvalidJson, "line 1"),
            (r#"{"path":"prontera"}"#, Code::BadPath, "prontera"),
            (r#"{"entity":true}"#, Code::BadRequest, "whole number"),
            (r#"{"monster_id":7.5}"#, Code::BadRequest, "monster_id"),
            (r#"{"entity":1,"at_least":7}"#, Code::BadRequest, "incarnation"),
            (
                r#"{"entity":1,"at_least_sequence":-7}"#,
                Code::BadRequest,
                "stream_sequence",
            ),
            (
                r#"{"prefix":"p","at_least_sequence":7}"#,
                Code::BadRequest,
                "at_least_sequence",
            ),
        ] {
            let problem = asked(SyncDataType::MonsterData, request).expect_err(request);
            assert!(
                problem.code == code && problem.sentence.contains(part),
                "{request}: {problem}"
            );
        }
    }
}
