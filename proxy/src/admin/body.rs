//! What tools send: read within bounds, and told what is wrong with it.

use std::{fmt, time::Duration};

use axum::body::{Body, HttpBody as _, to_bytes};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use p2p_sync_proto::{Code, Problem};
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, Error as _, SeqAccess, Visitor},
};
use tokio::time::timeout;

/// Of a request. The texts that one call may have, written with escapes, or a vector of the most dimensions, fit many times.
pub(super) const BODY_BYTES_MAX: usize = 1024 * 1024;
/// Until it is whole.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// How far from where a parser stopped a word is looked for that Python and JavaScript write for what is no number.
const WORD_BEFORE: usize = 3;
const WORD_AFTER: usize = 12;

/// Reads a body as JSON.
///
/// Errors: `TOO_LARGE`, `TOO_SLOW`, `INVALID_JSON`, `BAD_REQUEST` where it is JSON and not what is asked for, `NOT_FINITE`
/// where a number is NaN, infinite or too large.
pub(super) async fn json<T: DeserializeOwned>(body: Body) -> Result<T, Problem> {
    let too_large = || {
        let sentence = format!("the body is larger than {BODY_BYTES_MAX} bytes, or was cut off: ask for less at once");
        Problem::new(Code::TooLarge, sentence)
    };
    if body.size_hint().lower() > BODY_BYTES_MAX as u64 {
        return Err(too_large());
    }
    let read = timeout(BODY_TIMEOUT, to_bytes(body, BODY_BYTES_MAX)).await;
    let read = read.map_err(|_| {
        let sentence = format!(
            "the body was not whole within {} s: send it at once",
            BODY_TIMEOUT.as_secs()
        );
        Problem::new(Code::TooSlow, sentence)
    })?;
    parse(&read.map_err(|_| too_large())?)
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    serde_json::from_slice(bytes).map_err(|error| {
        if error.is_data() {
            return Problem::new(Code::BadRequest, format!("the body is not what is asked for: {error}"));
        }
        if error.to_string().starts_with("number out of range") || has_no_number_at(bytes, &error) {
            let sentence = format!("a number is NaN, infinite or too large ({error}): leave it out");
            return Problem::new(Code::NotFinite, sentence);
        }
        Problem::new(Code::InvalidJson, format!("the body is no JSON: {error}"))
    })
}

/// Whether a parser stopped at what is written for NaN or infinity, which JSON does not have.
fn has_no_number_at(bytes: &[u8], error: &serde_json::Error) -> bool {
    let line_at = bytes
        .split_inclusive(|byte| *byte == b'\n')
        .take(error.line().saturating_sub(1))
        .map(<[u8]>::len)
        .sum::<usize>();
    let at = line_at + error.column();
    let around = &bytes[at.saturating_sub(WORD_BEFORE).min(bytes.len())..(at + WORD_AFTER).min(bytes.len())];
    [&b"NaN"[..], b"Infinity"]
        .iter()
        .any(|word| around.windows(word.len()).any(|found| found == *word))
}

/// A vector: a list of numbers, or base64 of them as f32, the least significant byte first, as OpenAI writes them.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Numbers(pub(super) Vec<f32>);

impl<'de> Deserialize<'de> for Numbers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Numbers;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of numbers, or base64 of them as f32")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut numbers: A) -> Result<Numbers, A::Error> {
                let mut read = Vec::new();
                // What JavaScript writes for NaN and infinity is null: it is told as what it is.
                while let Some(number) = numbers.next_element::<Option<f64>>()? {
                    read.push(number.map_or(f32::NAN, narrowed));
                }
                Ok(Numbers(read))
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Numbers, E> {
                let bytes = STANDARD
                    .decode(text)
                    .map_err(|error| E::custom(format!("no base64: {error}")))?;
                let (numbers, rest) = bytes.as_chunks::<4>();
                if !rest.is_empty() {
                    return Err(E::custom("base64 of something else than numbers of four bytes each"));
                }
                Ok(Numbers(
                    numbers.iter().map(|number| f32::from_le_bytes(*number)).collect(),
                ))
            }
        }
        deserializer.deserialize_any(Reader)
    }
}

impl Numbers {
    /// As base64.
    pub(super) fn base64(numbers: &[f32]) -> String {
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        STANDARD.encode(bytes)
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "what is beyond it becomes infinite, and is told as that"
)]
fn narrowed(number: f64) -> f32 {
    number as f32
}

/// Texts: one, or a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Texts(pub(super) Vec<String>);

impl<'de> Deserialize<'de> for Texts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Texts;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text or a list of texts (tokens are each model's own: send texts)")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Texts, E> {
                Ok(Texts(vec![text.to_owned()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut texts: A) -> Result<Texts, A::Error> {
                let mut read = Vec::new();
                while let Some(Text(text)) = texts.next_element()? {
                    read.push(text);
                }
                if read.is_empty() {
                    return Err(A::Error::invalid_length(0, &self));
                }
                Ok(Texts(read))
            }
        }
        deserializer.deserialize_any(Reader)
    }
}

/// One of a list, which says what a list may have.
struct Text(String);

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;
        impl Visitor<'_> for Reader {
            type Value = Text;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text (tokens are each model's own: send texts)")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Text, E> {
                Ok(Text(text.to_owned()))
            }
        }
        deserializer.deserialize_str(Reader)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Sent {
        embedding: Option<Numbers>,
        input: Option<Texts>,
    }

    fn code(body: &str) -> Code {
        parse::<Sent>(body.as_bytes()).map_or_else(|problem| problem.code, |_| Code::None)
    }

    #[test]
    fn what_is_no_number_is_told_as_that_however_a_language_writes_it() {
        for number in ["NaN", "Infinity", "-Infinity", "1e400", "-1e999"] {
            assert_eq!(
                code(&format!(r#"{{"embedding":[0.5,{number}]}}"#)),
                Code::NotFinite,
                "{number}"
            );
            assert_eq!(
                code(&format!("{{\n  \"embedding\": [\n    {number}\n  ]\n}}")),
                Code::NotFinite,
                "{number}"
            );
        }
        let sent: Sent = parse(br#"{"embedding":[1,null,1e39,-2]}"#).expect("JSON");
        let numbers = sent.embedding.expect("numbers").0;
        assert!(numbers[1].is_nan() && numbers[2].is_infinite(), "{numbers:?}");
        assert_eq!(
            code(r#"{"input":"NaN","embedding":[1,}"#),
            Code::InvalidJson,
            "a text may say so"
        );
    }

    #[test]
    fn a_vector_is_a_list_or_base64_as_openai_writes_it() {
        let of = |body: &str| {
            parse::<Sent>(body.as_bytes())
                .expect(body)
                .embedding
                .expect("numbers")
                .0
        };
        assert_eq!(of(r#"{"embedding":[0.5,-2]}"#), [0.5, -2.0]);
        let text = Numbers::base64(&[0.5, -2.0]);
        assert_eq!(text, "AAAAPwAAAMA=");
        assert_eq!(of(&format!(r#"{{"embedding":"{text}"}}"#)), [0.5, -2.0]);
        assert_eq!(code(r#"{"embedding":"AAAAPw"}"#), Code::BadRequest);
        assert_eq!(code(r#"{"embedding":"AAA="}"#), Code::BadRequest);
    }

    #[test]
    fn texts_are_one_or_several_and_never_tokens() {
        let of = |body: &str| parse::<Sent>(body.as_bytes()).expect(body).input.expect("texts").0;
        assert_eq!(of(r#"{"input":"a"}"#), ["a"]);
        assert_eq!(of(r#"{"input":["a","b"]}"#), ["a", "b"]);
        for body in [
            r#"{"input":[]}"#,
            r#"{"input":[1,2]}"#,
            r#"{"input":[[1]]}"#,
            r#"{"input":7}"#,
            r#"{"inputs":"a"}"#,
        ] {
            assert_eq!(code(body), Code::BadRequest, "{body}");
        }
        let told = parse::<Sent>(br#"{"input":[1,2]}"#).expect_err("tokens");
        assert!(told.sentence.contains("send texts"), "{told}");
    }
}
