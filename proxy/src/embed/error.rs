//! Why a text has no vector, and whether asking again helps.

use std::time::Duration;

use p2p_sync_proto::{Code, Problem};

/// Why there are no vectors. No sentence repeats a key, nor what a provider said of one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EmbedError {
    /// The provider does not answer, or not in time, or says that it is in trouble. The same texts may succeed later.
    #[error("the provider of embeddings is not available ({reason})")]
    Unavailable {
        /// What was seen.
        reason: String,
        /// When the provider wants to be asked again, if it said so.
        retry_after: Option<Duration>,
    },
    /// Asked too much. The same texts may succeed later.
    #[error("the provider of embeddings takes no more now")]
    RateLimited {
        /// When it takes more.
        retry_after: Duration,
    },
    /// The settings are wrong, or nobody pays any more: nothing succeeds until the operator has mended it.
    #[error("the provider of embeddings refuses: {0}")]
    Refused(String),
    /// The provider did not take these texts together, for one of them or for the settings: asked one by one, those that
    /// are right succeed, and where none does the settings are wrong.
    #[error("the provider of embeddings did not take this: {0}")]
    NotTaken(String),
    /// The provider answered what is no answer. The same texts may succeed later; most likely the settings are wrong.
    #[error("the provider of embeddings answered what is no answer: {0}")]
    BadAnswer(String),
    /// A text says nothing.
    #[error("text {index} is empty")]
    Empty {
        /// Which one, from 0.
        index: usize,
    },
    /// A text is longer than the provider takes.
    #[error("text {index} takes {bytes} bytes, more than {bytes_max}")]
    TooLong {
        /// Which one, from 0.
        index: usize,
        /// What it has.
        bytes: usize,
        /// What it may have.
        bytes_max: usize,
    },
    /// More than one call may be given.
    #[error("more than {texts_max} texts, or more than {bytes_max} bytes of them, at once")]
    TooMany {
        /// Texts at once.
        texts_max: usize,
        /// Bytes at once.
        bytes_max: usize,
    },
}

impl EmbedError {
    /// When asking again makes sense, where somebody said so.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Unavailable { retry_after, .. } => *retry_after,
            Self::RateLimited { retry_after } => Some(*retry_after),
            _ => None,
        }
    }

    /// Whether it is nobody's fault that time does not mend.
    pub fn passes(&self) -> bool {
        matches!(self, Self::Unavailable { .. } | Self::RateLimited { .. })
    }

    /// What a host or a tool is told: how the provider is set up is the operator's alone.
    pub fn for_caller(&self) -> Problem {
        match self {
            Self::Empty { index } => {
                let sentence = format!("text {index} is empty: leave it out");
                Problem::new(Code::EmptyText, sentence)
            }
            Self::TooLong {
                index,
                bytes,
                bytes_max,
            } => {
                let sentence = format!("text {index} takes {bytes} bytes of at most {bytes_max}: cut it into passages");
                Problem::new(Code::TextTooLong, sentence)
            }
            Self::TooMany { texts_max, bytes_max } => {
                let sentence = format!("ask for at most {texts_max} texts and {bytes_max} bytes of them at once");
                Problem::new(Code::TooLarge, sentence)
            }
            Self::NotTaken(_) => {
                let sentence = "the hub's provider of embeddings did not take this text: make it shorter, or ask the \
                                hub's operator";
                Problem::new(Code::TextRefused, sentence)
            }
            Self::RateLimited { retry_after } => {
                let sentence = format!(
                    "the hub's provider of embeddings takes no more now: ask again in {} s",
                    retry_after.as_secs() + 1
                );
                Problem::new(Code::RateLimited, sentence)
            }
            Self::Unavailable { .. } | Self::Refused(_) | Self::BadAnswer(_) => {
                let sentence = "the hub's provider of embeddings does not serve now: ask again later";
                Problem::new(Code::EmbeddingsUnavailable, sentence)
            }
        }
    }

    /// What the operator is told.
    pub fn for_operator(&self) -> Problem {
        let code = match self {
            Self::Refused(_) | Self::NotTaken(_) | Self::BadAnswer(_) => Code::BadEmbeddingProvider,
            _ => self.for_caller().code,
        };
        Problem::new(code, self.to_string())
    }
}
