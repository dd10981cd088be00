//! What one member of a payload may be against another, which JSON Schema cannot say.

use p2p_sync_proto::{Code, Problem};
use serde_json::{Number, Value};

/// `hp <= max_hp`: of two members of the outermost object, the first is never more than the second. It holds where
/// either is missing, or no number: what has to be there, and of which type, is the schema's to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GameRule {
    less: String,
    more: String,
}

impl GameRule {
    /// Reads a rule as it is written. The error completes a sentence.
    pub fn parse(text: &str) -> Result<Self, String> {
        let is_name = |name: &str| {
            !name.is_empty()
                && name
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-')
        };
        match text.split_once("<=").map(|(less, more)| (less.trim(), more.trim())) {
            Some((less, more)) if is_name(less) && is_name(more) => Ok(Self {
                less: less.to_owned(),
                more: more.to_owned(),
            }),
            _ => Err("expected `<member> <= <member>`, e.g. \"hp <= max_hp\"".to_owned()),
        }
    }

    /// The members it compares.
    pub fn members(&self) -> [&str; 2] {
        [&self.less, &self.more]
    }

    /// Checks a payload; `IMPOSSIBLE_VALUE` with the JSON pointer and without the values, which are shown to others than
    /// the sender.
    pub fn check(&self, payload: &Value) -> Result<(), Problem> {
        let number = |member: &String| payload.get(member).and_then(Value::as_number);
        match (number(&self.less), number(&self.more)) {
            (Some(less), Some(more)) if exceeds(less, more) => Err(Problem::new(
                Code::ImpossibleValue,
                format!(
                    "/{}: is more than {}, which the game does not have",
                    self.less, self.more
                ),
            )),
            _ => Ok(()),
        }
    }
}

/// Whole numbers are compared whole: as floats, two of them that differ may be one.
fn exceeds(one: &Number, other: &Number) -> bool {
    let whole = |number: &Number| number.as_i64().map(i128::from).or(number.as_u64().map(i128::from));
    match (whole(one), whole(other)) {
        (Some(one), Some(other)) => one > other,
        _ => one.as_f64() > other.as_f64(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(payload: &str) -> Result<(), Problem> {
        let rule = GameRule::parse("hp <= max_hp").expect("a rule");
        rule.check(&serde_json::from_str(payload).expect("JSON"))
    }

    #[test]
    fn more_than_the_most_is_refused_by_its_place_and_without_its_value() {
        let problem = check(r#"{"hp":778,"max_hp":777}"#).expect_err("too much");
        assert_eq!(problem.code, Code::ImpossibleValue);
        assert!(
            problem.sentence.starts_with("/hp: ") && !problem.sentence.contains("77"),
            "{problem}"
        );
        check(r#"{"hp":9007199254740993,"max_hp":9007199254740992}"#).expect_err("too much by one");
        check(r#"{"hp":1.5,"max_hp":1}"#).expect_err("too much by a half");
        check(r#"{"hp":18446744073709551615,"max_hp":-1}"#).expect_err("far too much");
    }

    #[test]
    fn what_is_within_and_what_is_not_there_passes() {
        for payload in [
            r#"{"hp":777,"max_hp":777}"#,
            r#"{"hp":777}"#,
            r#"{"max_hp":7}"#,
            r#"{"hp":"777","max_hp":7}"#,
            "[]",
        ] {
            assert_eq!(check(payload), Ok(()), "{payload}");
        }
    }

    #[test]
    fn only_a_comparison_of_two_members_is_a_rule() {
        for text in [
            "",
            "hp",
            "hp < max_hp",
            "hp <= ",
            "hp <= max hp",
            "hp >= max_hp",
            "a <= b <= c",
        ] {
            GameRule::parse(text).expect_err(text);
        }
    }
}
