//! Presence: a player comes to a map, or leaves it, by an operation of its own.

use crate::{
    json::Facts,
    path::{Parts, Scope, check_map},
    reject_code::{Code, Problem},
    v1::SyncDataType,
};

/// The JSON member that says which it is.
const EVENT: &str = "event";

/// Checks an operation of type `PLAYER_PRESENCE` for what moving a player takes; any other passes.
///
/// It is a PUT of its own (`BAD_OPERATION`) of a character's path without an entity (`BAD_PATH`), its JSON says the event
/// `enter` or `leave` (`SCHEMA_VIOLATION`), and an `enter` comes with a map (`BAD_MAP`).
pub fn check(parts: &Parts<'_>, map: &str, facts: Option<&Facts<'_>>, in_group: bool) -> Result<(), Problem> {
    if parts.data_type != SyncDataType::PlayerPresence {
        return Ok(());
    }
    if in_group {
        let sentence = "a player comes or goes by an operation of its own: send PLAYER_PRESENCE outside of groups";
        return Err(Problem::new(Code::BadOperation, sentence));
    }
    let Some(facts) = facts else {
        let sentence = "where a player was is not deleted: send a PLAYER_PRESENCE with the event leave";
        return Err(Problem::new(Code::BadOperation, sentence));
    };
    if !matches!(parts.scope, Scope::Char(_)) || parts.entity.is_some() {
        let sentence = "presence is a character's, one for each: write @char/<id>/PLAYER_PRESENCE";
        return Err(Problem::new(Code::BadPath, sentence));
    }
    match facts.member(EVENT).as_deref() {
        Some("enter") => check_map(map),
        Some("leave") => Ok(()),
        _ => Err(Problem::new(
            Code::SchemaViolation,
            "/event: is \"enter\" or \"leave\" in a PLAYER_PRESENCE",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{json, path::Path};

    fn checked(path: &str, map: &str, payload: Option<&str>, in_group: bool) -> Result<(), Code> {
        let path = Path::parse(path).expect("a path");
        let facts = payload.map(|payload| json::check(payload).expect("JSON"));
        check(&path.parts(), map, facts.as_ref(), in_group).map_err(|problem| problem.code)
    }

    #[test]
    fn a_player_comes_to_a_map_or_leaves_by_an_operation_of_its_own() {
        const PATH: &str = "@char/7/PLAYER_PRESENCE";
        let (enter, leave) = (Some(r#"{"event":"enter"}"#), Some(r#"{"event":"leave"}"#));
        for (path, map, payload, in_group, expected) in [
            (PATH, "prontera", enter, false, Ok(())),
            (PATH, "", leave, false, Ok(())),
            (PATH, "", enter, false, Err(Code::BadMap)),
            (PATH, "no map", enter, false, Err(Code::BadMap)),
            (
                PATH,
                "prontera",
                Some(r#"{"event":"ENTER"}"#),
                false,
                Err(Code::SchemaViolation),
            ),
            (
                PATH,
                "prontera",
                Some(r#"{"event":["enter"]}"#),
                false,
                Err(Code::SchemaViolation),
            ),
            (PATH, "prontera", Some("[]"), false, Err(Code::SchemaViolation)),
            (PATH, "prontera", None, false, Err(Code::BadOperation)),
            (PATH, "prontera", enter, true, Err(Code::BadOperation)),
            (
                "@char/7/PLAYER_PRESENCE/1",
                "prontera",
                enter,
                false,
                Err(Code::BadPath),
            ),
            (
                "@account/7/PLAYER_PRESENCE",
                "prontera",
                enter,
                false,
                Err(Code::BadPath),
            ),
            ("prontera/PLAYER_PRESENCE", "prontera", enter, false, Err(Code::BadPath)),
            ("@char/7/PLAYER_DATA", "", None, true, Ok(())),
        ] {
            assert_eq!(
                checked(path, map, payload, in_group),
                expected,
                "{path} {map} {payload:?}"
            );
        }
    }
}
