//! Why something was refused: a numbered code, and a sentence that says what to do.

use std::fmt;

use crate::limits::REASON_BYTES_MAX;
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
            Self::NotYetSettled
                | Self::HubUnavailable
                | Self::RateLimited
                | Self::TooManyGaps
                | Self::EmbeddingsUnavailable
                | Self::TooSlow
                | Self::Internal
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

    /// The same, its sentence cut between characters to [`REASON_BYTES_MAX`], what one outcome may say.
    #[must_use]
    pub fn shortened(mut self) -> Self {
        self.sentence
            .truncate(self.sentence.floor_char_boundary(REASON_BYTES_MAX));
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_sentence_is_cut_between_characters() {
        let problem = |sentence: &str| Problem::new(Code::Internal, sentence).shortened().sentence;
        assert_eq!(problem(&"é".repeat(300)), "é".repeat(256));
        assert_eq!(
            problem(&format!("x{}", "é".repeat(300))),
            format!("x{}", "é".repeat(255))
        );
        assert_eq!(problem("short"), "short");
    }
}
