//! Why a payload is refused: noted in a word while it is read, put into a sentence afterwards.

use super::keys::{self, Span};
use crate::{
    limits::{JSON_DEPTH_MAX, JSON_NODES_MAX, JSON_NUMBER_BYTES_MAX},
    reject_code::{Code, Problem},
};

/// Of a key, in a sentence.
const SHOWN_CHARS_MAX: usize = 64;

/// Why, and at which byte.
#[derive(Clone, Copy, Debug)]
pub(super) struct Refusal {
    at: usize,
    why: Why,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Why {
    Broken(&'static str),
    TooDeep,
    TooManyNodes,
    Duplicate(Span),
    Nul,
    Surrogate,
    Number,
}

impl Refusal {
    /// In a box, so that a step without one is small.
    #[cold]
    #[allow(clippy::unnecessary_box_returns)]
    pub(super) fn new(at: usize, why: Why) -> Box<Self> {
        Box::new(Self { at, why })
    }

    #[cold]
    pub(super) fn describe(&self, text: &str) -> Problem {
        let place = || {
            let before = &text.as_bytes()[..self.at.min(text.len())];
            let line = before.split(|&byte| byte == b'\n').count();
            let column = 1 + before.iter().rev().take_while(|&&byte| byte != b'\n').count();
            format!("line {line} column {column}")
        };
        let (code, sentence) = match self.why {
            Why::Broken(what) => (
                Code::InvalidJson,
                format!("the payload is not valid JSON: {what} at {}", place()),
            ),
            Why::TooDeep => (
                Code::TooDeep,
                format!("the payload is nested deeper than {JSON_DEPTH_MAX}: flatten it"),
            ),
            Why::TooManyNodes => (
                Code::TooManyNodes,
                format!("the payload has more than {JSON_NODES_MAX} values: split it"),
            ),
            Why::Duplicate(key) => {
                let key: String = keys::unescaped(key.of(text)).chars().take(SHOWN_CHARS_MAX).collect();
                (
                    Code::DuplicateKey,
                    format!("the key {key:?} stands twice in one object: keep one"),
                )
            }
            Why::Nul => (
                Code::BadText,
                "a string holds a NUL character (\\u0000), which no text column stores: leave it out".to_owned(),
            ),
            Why::Surrogate => (
                Code::BadText,
                format!(
                    "the payload has an unpaired surrogate at {}: write both halves of the character, or leave it out",
                    place()
                ),
            ),
            Why::Number => (
                Code::NumberOutOfRange,
                format!(
                    "a number at byte {} has more than {JSON_NUMBER_BYTES_MAX} digits; send it as a string",
                    self.at
                ),
            ),
        };
        Problem::new(code, sentence)
    }
}
