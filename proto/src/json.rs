//! The bounds of a JSON payload, checked in one pass, the same way on both sides.
//!
//! `serde_json` parses (RFC 8259); this refuses what it lets through and a database column or another parser would not:
//! too deep, too many values, a key twice, NUL, a number no column holds.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};

use crate::{
    limits::{JSON_DEPTH_MAX, JSON_NODES_MAX, JSON_NUMBER_BYTES_MAX},
    reject_code::{Code, Problem},
};

/// What a payload says at its top level that paths are made of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// The scalar members of the outermost object: strings as they are, whole numbers in decimal.
    members: Vec<(String, String)>,
}

impl Facts {
    /// The string or whole number under `key` of the outermost object.
    pub fn member(&self, key: &str) -> Option<&str> {
        self.members
            .iter()
            .find(|(name, _)| name == key)
            .map(|(_, value)| value.as_str())
    }
}

/// Checks a payload and reads its top-level members.
///
/// Refuses with `INVALID_JSON` (line and column), `TOO_DEEP`, `TOO_MANY_NODES`, `DUPLICATE_KEY`, `BAD_TEXT` (NUL,
/// unpaired surrogates) or `NUMBER_OUT_OF_RANGE`. Size is the caller's to bound.
pub fn check(text: &str) -> Result<Facts, Problem> {
    check_numbers(text)?;
    let mut walk = Walk::default();
    let mut parser = serde_json::Deserializer::from_str(text);
    let parsed = Value {
        walk: &mut walk,
        depth: 1,
        key: None,
    }
    .deserialize(&mut parser)
    .and_then(|()| parser.end());
    match parsed {
        Ok(()) => Ok(walk.facts),
        Err(error) => Err(walk.refused.unwrap_or_else(|| describe(&error))),
    }
}

/// Checks bytes that should be a payload; `BAD_TEXT` where they are not UTF-8, otherwise as [`check`].
pub fn check_bytes(bytes: &[u8]) -> Result<(&str, Facts), Problem> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        Problem::new(
            Code::BadText,
            format!(
                "the payload is not UTF-8 from byte {}: convert it before sending",
                error.valid_up_to()
            ),
        )
    })?;
    check(text).map(|facts| (text, facts))
}

fn describe(error: &serde_json::Error) -> Problem {
    let text = error.to_string();
    if text.contains("surrogate") || text.contains("hex escape") {
        let sentence = format!(
            "the payload has an unpaired surrogate at line {} column {}: write both halves of the character, or leave it out",
            error.line(),
            error.column()
        );
        return Problem::new(Code::BadText, sentence);
    }
    Problem::new(Code::InvalidJson, format!("the payload is not valid JSON: {text}"))
}

/// A number is bounded as it is written, and as a decimal column writes it out: what parses to the same float may still be
/// a megabyte of digits, and four bytes with an exponent hundreds of them when they are read back.
fn check_numbers(text: &str) -> Result<(), Problem> {
    let (mut in_string, mut escaped, mut number) = (false, false, None);
    // One byte more than there is ends a number that ends the text.
    for (at, byte) in text.bytes().chain([b' ']).enumerate() {
        if in_string {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_string = false,
                _ => {}
            }
            continue;
        }
        in_string = byte == b'"';
        if byte.is_ascii_digit() || b"+-.eE".contains(&byte) {
            number.get_or_insert(at);
        } else if let Some(first) = number.take()
            && plain_bytes(&text[first..at]) > JSON_NUMBER_BYTES_MAX
        {
            return Err(Problem::new(
                Code::NumberOutOfRange,
                format!("a number at byte {first} has more than {JSON_NUMBER_BYTES_MAX} digits; send it as a string"),
            ));
        }
    }
    Ok(())
}

/// Bytes of a number as it is written or without its exponent, whichever is more. What is no number is the parser's to
/// tell.
fn plain_bytes(number: &str) -> usize {
    let (mantissa, exponent) = number.split_once(['e', 'E']).unwrap_or((number, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    // Only an exponent of many digits is out of range here.
    let exponent: i64 = exponent
        .parse()
        .unwrap_or(if exponent.len() > 18 { i64::MAX } else { 0 });
    let shift = usize::try_from(exponent.unsigned_abs()).unwrap_or(usize::MAX);
    let (whole, fraction) = if exponent < 0 {
        (whole.len(), fraction.len().saturating_add(shift))
    } else {
        (whole.len().saturating_add(shift), fraction.len().saturating_sub(shift))
    };
    number.len().max(whole.saturating_add(fraction).saturating_add(1))
}

#[derive(Default)]
struct Walk {
    nodes: usize,
    facts: Facts,
    /// Our own refusal, kept beside the parser's error type, which only carries text.
    refused: Option<Problem>,
}

impl Walk {
    fn refuse<E: serde::de::Error>(&mut self, code: Code, sentence: String) -> E {
        self.refused = Some(Problem::new(code, sentence));
        E::custom(code.label())
    }

    fn text<E: serde::de::Error>(&mut self, text: &str) -> Result<(), E> {
        if text.contains('\0') {
            let sentence = "a string holds a NUL character (\\u0000), which no text column stores: leave it out";
            return Err(self.refuse(Code::BadText, sentence.to_owned()));
        }
        Ok(())
    }
}

/// One value at its depth; `key` names it where it is a member of the outermost object.
struct Value<'w, 'k> {
    walk: &'w mut Walk,
    depth: usize,
    key: Option<&'k str>,
}

impl Value<'_, '_> {
    fn record(&mut self, value: impl FnOnce() -> String) {
        if let Some(key) = self.key {
            self.walk.facts.members.push((key.to_owned(), value()));
        }
    }
}

impl<'de> DeserializeSeed<'de> for Value<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        self.walk.nodes += 1;
        if self.walk.nodes > JSON_NODES_MAX {
            let sentence = format!("the payload has more than {JSON_NODES_MAX} values: split it");
            return Err(self.walk.refuse(Code::TooManyNodes, sentence));
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Value<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(mut self, number: i64) -> Result<(), E> {
        self.record(|| number.to_string());
        Ok(())
    }

    fn visit_u64<E>(mut self, number: u64) -> Result<(), E> {
        self.record(|| number.to_string());
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E: serde::de::Error>(mut self, text: &str) -> Result<(), E> {
        self.walk.text(text)?;
        self.record(|| text.to_owned());
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        let depth = deeper(self.walk, self.depth)?;
        while items
            .next_element_seed(Value {
                walk: self.walk,
                depth,
                key: None,
            })?
            .is_some()
        {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<(), A::Error> {
        let depth = deeper(self.walk, self.depth)?;
        let mut seen = std::collections::HashSet::new();
        while let Some(key) = members.next_key::<String>()? {
            self.walk.text(&key)?;
            if seen.contains(&key) {
                let sentence = format!("the key {key:?} stands twice in one object: keep one");
                return Err(self.walk.refuse(Code::DuplicateKey, sentence));
            }
            let named = (self.depth == 1).then_some(key.as_str());
            members.next_value_seed(Value {
                walk: self.walk,
                depth,
                key: named,
            })?;
            seen.insert(key);
        }
        Ok(())
    }
}

fn deeper<E: serde::de::Error>(walk: &mut Walk, depth: usize) -> Result<usize, E> {
    if depth > JSON_DEPTH_MAX {
        let sentence = format!("the payload is nested deeper than {JSON_DEPTH_MAX}: flatten it");
        return Err(walk.refuse(Code::TooDeep, sentence));
    }
    Ok(depth + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(text: &str) -> Code {
        check(text).expect_err(&text.chars().take(60).collect::<String>()).code
    }

    #[test]
    fn top_level_members_are_read() {
        let facts =
            check(r#"{"id":7,"name":"Poring","nested":{"id":8},"n":-1,"f":1.5,"list":[{"id":9}]}"#).expect("valid");
        assert_eq!(facts.member("id"), Some("7"));
        assert_eq!(facts.member("name"), Some("Poring"));
        assert_eq!(facts.member("n"), Some("-1"));
        assert_eq!(facts.member("f"), None);
        assert_eq!(facts.member("nested"), None);
    }

    #[test]
    fn broken_json_is_told_with_its_position() {
        let problem = check("{\"a\":\n 1,}").expect_err("trailing comma");
        assert_eq!(problem.code, Code::InvalidJson);
        assert!(problem.sentence.contains("line 2 column"), "{problem}");
        assert_eq!(code(""), Code::InvalidJson);
        assert_eq!(code("{} {}"), Code::InvalidJson);
        assert_eq!(code("NaN"), Code::InvalidJson);
    }

    #[test]
    fn depth_is_bounded() {
        let nested = |depth: usize| "[".repeat(depth) + &"]".repeat(depth);
        assert!(check(&nested(JSON_DEPTH_MAX)).is_ok());
        assert_eq!(code(&nested(JSON_DEPTH_MAX + 1)), Code::TooDeep);
        assert_eq!(code(&nested(100_000)), Code::TooDeep);
    }

    #[test]
    fn the_number_of_values_is_bounded() {
        let list = |items: usize| format!("[{}]", vec!["0"; items].join(","));
        assert!(check(&list(JSON_NODES_MAX - 1)).is_ok());
        assert_eq!(code(&list(JSON_NODES_MAX)), Code::TooManyNodes);
    }

    #[test]
    fn a_key_twice_is_refused_also_when_it_is_escaped() {
        assert_eq!(code(r#"{"a":1,"a":2}"#), Code::DuplicateKey);
        assert_eq!(code(r#"{"a":1,"\u0061":2}"#), Code::DuplicateKey);
        assert_eq!(code(r#"{"x":[{"a":1,"a":2}]}"#), Code::DuplicateKey);
        assert!(check(r#"{"a":{"a":1}}"#).is_ok());
    }

    #[test]
    fn text_that_no_column_stores_is_refused() {
        assert_eq!(code(r#"{"a":"x\u0000y"}"#), Code::BadText);
        assert_eq!(code(r#"{"a\u0000":1}"#), Code::BadText);
        assert_eq!(code(r#"["\ud800"]"#), Code::BadText);
        assert_eq!(check_bytes(b"[\"\xff\"]").expect_err("not UTF-8").code, Code::BadText);
        assert!(check(r#"["\ud83d\ude00"]"#).is_ok());
    }

    #[test]
    fn numbers_are_bounded() {
        assert_eq!(code("[1e999]"), Code::NumberOutOfRange);
        assert_eq!(code(&format!("[{}]", "9".repeat(65))), Code::NumberOutOfRange);
        assert!(check(&format!("[\"{}\"]", "9".repeat(1000))).is_ok());
        for long in [
            "1e308",
            "1e999",
            "-1.5e300",
            "1e-308",
            "1E+64",
            "1e-99999999999999999999",
        ] {
            assert_eq!(code(&format!("{{\"n\":{long}}}")), Code::NumberOutOfRange, "{long}");
            assert_eq!(code(long), Code::NumberOutOfRange, "{long}");
        }
        assert!(check("[-1.5e30, 1e-7, 1E+60, 0.5, 1e0, 18446744073709551615, true, \"1e308\"]").is_ok());
        assert_eq!(code("[1e]"), Code::InvalidJson);
    }
}
