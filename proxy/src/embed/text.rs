//! What of an operation's payload is embedded, and what is kept beside it.

use p2p_sync_proto::limits::PAYLOAD_BYTES_MAX;
use serde_json::Value;

/// Pointers of one type.
pub const POINTERS_MAX: usize = 8;
/// Of the JSON that is kept beside a text; more is left out.
pub(super) const METADATA_BYTES_MAX: usize = 4096;
/// A token has some four letters of English, and up to three bytes of other scripts.
const TOKEN_BYTES: usize = 3;

const _: () = assert!(METADATA_BYTES_MAX < PAYLOAD_BYTES_MAX);

/// What an operation says, taken from its payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    /// The texts that the pointers name, a line each.
    pub text: String,
    /// JSON: the payload without them; absent where that is long, or nothing.
    pub metadata: Option<String>,
}

/// Whether a JSON pointer (RFC 6901) names a member.
pub fn is_pointer(pointer: &str) -> bool {
    let escapes = |part: &str| {
        part.split('~')
            .skip(1)
            .all(|rest| rest.starts_with('0') || rest.starts_with('1'))
    };
    pointer.len() <= 64 && pointer.starts_with('/') && pointer.len() > 1 && escapes(pointer)
}

/// Takes what the pointers name out of a payload: texts, and lists of texts. `None` where there is none, or nothing but
/// blanks.
pub fn said(payload: &str, pointers: &[String]) -> Option<Said> {
    let mut payload: Value = serde_json::from_str(payload).ok()?;
    let mut lines = Vec::new();
    for pointer in pointers {
        let Some(named) = payload.pointer_mut(pointer) else {
            continue;
        };
        match named.take() {
            Value::String(text) => lines.push(text),
            Value::Array(texts) => lines.extend(texts.into_iter().filter_map(|text| match text {
                Value::String(text) => Some(text),
                _ => None,
            })),
            // A number is no text; it stays what it is.
            other => *named = other,
        }
    }
    lines.retain(|line| !line.trim().is_empty());
    if lines.is_empty() {
        return None;
    }
    // What was taken is null by now, and so may others be.
    let is_there = payload.as_object_mut().is_some_and(|members| {
        members.retain(|_, value| !value.is_null());
        !members.is_empty()
    });
    let metadata = is_there.then(|| payload.to_string());
    Some(Said {
        text: lines.join("\n"),
        metadata: metadata.filter(|json| json.len() <= METADATA_BYTES_MAX),
    })
}

/// How many tokens a text counts for in a budget: a provider's own count is known only after it was asked.
pub fn tokens(text: &str) -> u64 {
    u64::try_from(text.len().div_ceil(TOKEN_BYTES).max(1)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(payload: &str, pointers: &[&str]) -> Option<(String, Option<String>)> {
        let pointers: Vec<String> = pointers.iter().map(|&pointer| pointer.to_owned()).collect();
        said(payload, &pointers).map(|said| (said.text, said.metadata))
    }

    #[test]
    fn texts_and_lists_of_texts_are_taken_and_the_rest_is_kept_beside_them() {
        let told = of(
            r#"{"npc_id":7,"name":"Kafra","talk":{"lines":["Hello.","Storage?",3,""]}}"#,
            &["/name", "/talk/lines", "/none"],
        );
        let expected = (
            "Kafra\nHello.\nStorage?".to_owned(),
            Some(r#"{"npc_id":7,"talk":{"lines":null}}"#.to_owned()),
        );
        assert_eq!(told, Some(expected));
        assert_eq!(of(r#"{"text":"x"}"#, &["/text"]), Some(("x".to_owned(), None)));
    }

    #[test]
    fn where_there_is_no_text_nothing_is_embedded() {
        for payload in [r#"{"text":" \n"}"#, r#"{"text":5}"#, "{}", "[]", r#"{"text":[1]}"#, "5"] {
            assert_eq!(of(payload, &["/text"]), None, "{payload}");
        }
    }

    #[test]
    fn what_is_long_is_not_kept_beside_the_text() {
        let payload = format!(r#"{{"text":"x","rest":"{}"}}"#, "y".repeat(METADATA_BYTES_MAX));
        assert_eq!(of(&payload, &["/text"]), Some(("x".to_owned(), None)));
    }

    #[test]
    fn pointers_are_of_rfc_6901_and_name_something() {
        let are = ["/text", "/a/0/b", "/a~0b~1", "", "/", "text", "/a~2", "/a~"].map(is_pointer);
        assert_eq!(are, [true, true, true, false, false, false, false, false]);
    }

    #[test]
    fn every_text_counts_for_a_token_at_least() {
        assert_eq!(["x", "xxx", "xxxx"].map(tokens), [1, 1, 2]);
    }
}
