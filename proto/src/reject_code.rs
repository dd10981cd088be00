//! Why something was refused: a numbered code, and a sentence that says what to do.

use std::fmt;

pub use crate::v1::RejectCode as Code;

impl Code {
    /// The stable name that logs and metrics carry, e.g. `TOO_LARGE`.
    pub fn label(self) -> &'static str {
        self.as_str_name()
    }

    /// Whether the same thing, sent again later, may be taken.
    pub fn is_retryable(self) -> bool {
        matches!(
            self,
            Self::NotYetSettled | Self::HubUnavailable | Self::RateLimited | Self::TooManyGaps | Self::Internal
        )
    }
}

impl fmt::Display for Code {
    /// `E203 TOO_LARGE`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "E{:03} {}", *self as i32, self.label())
    }
}

/// A refusal as people read it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {sentence}")]
pub struct Problem {
    /// The number.
    pub code: Code,
    /// What is wrong and what to do about it.
    pub sentence: String,
}

impl Problem {
    /// A refusal with its sentence.
    pub fn new(code: Code, sentence: impl Into<String>) -> Self {
        Self {
            code,
            sentence: sentence.into(),
        }
    }
}
