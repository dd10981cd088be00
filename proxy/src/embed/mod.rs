//! Embeddings: texts as vectors of numbers, so that texts that mean the same lie near to each other.
//!
//! An [`Embedder`] stands before one of the providers and promises the same of each: as many vectors as texts, in their
//! order, of the stated dimensions, finite, of length 1; within its time; and an [`EmbedError`] that says what to do next.
//! [`lexical`] needs nothing and knows letters alone, [`local`] runs a sentence model inside this process, [`remote`] asks
//! OpenAI, Azure OpenAI or whatever speaks as they do.
//!
//! [`Embeddings`] serves hosts and tools, and [`queue`] embeds what was written, which [`text`] takes out of payloads.

mod error;
mod lexical;
#[cfg(feature = "local-embeddings")]
mod local;
pub mod queue;
mod remote;
mod service;
mod settings;
pub mod text;
mod turns;

use std::time::Duration;

use p2p_sync_proto::{Code, Problem};
use tokio::time::{Instant, timeout_at};

pub use error::EmbedError;
pub(crate) use remote::check_base_url;
pub use service::{Caller, Embeddings, Kept, Limits, Near, Query, TOOLS_SPENDER};
pub use settings::{LocalSettings, ProviderSettings, RemoteSettings, Service, Settings};

use lexical::Lexical;
#[cfg(feature = "local-embeddings")]
use local::Local;
use remote::Remote;

/// What `check` has embedded.
const PROBE: &str = "Who has seen the caravan?";

/// What one call may be given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Texts.
    pub texts_max: usize,
    /// UTF-8 of one text.
    pub text_bytes_max: usize,
    /// UTF-8 of all of them together; no less than one text may have.
    pub batch_bytes_max: usize,
    /// Tokens of one text that the model reads, where that is known: a local model passes over what comes after, a remote
    /// one refuses the text.
    pub tokens_max: Option<usize>,
}

/// Makes vectors of texts, whoever does it.
#[derive(Debug)]
pub struct Embedder {
    provider: Provider,
    /// Of one call, repetitions included.
    patience: Duration,
}

#[derive(Debug)]
enum Provider {
    Lexical(Lexical),
    #[cfg(feature = "local-embeddings")]
    Local(Local),
    Remote(Box<Remote>),
}

impl Embedder {
    /// Makes ready what the settings name; a model is read here, nobody is asked. `None`: embeddings are off.
    ///
    /// Errors: `BAD_EMBEDDING_PROVIDER`, with the setting to mend.
    #[cfg_attr(
        not(feature = "local-embeddings"),
        expect(clippy::unused_async, reason = "a model is read beside")
    )]
    pub async fn open(settings: &Settings) -> Result<Option<Self>, Problem> {
        let dimensions = settings.dimensions;
        let provider = match &settings.provider {
            ProviderSettings::Off => return Ok(None),
            ProviderSettings::Lexical => Provider::Lexical(Lexical::new(dimensions)),
            #[cfg(feature = "local-embeddings")]
            ProviderSettings::Local(model) => {
                let model = model.clone();
                // Some 100 MB are read.
                let read = tokio::task::spawn_blocking(move || Local::open(&model));
                let read = read.await.map_err(|error| {
                    misconfigured(format!("the model in embedding_model_dir cannot be used ({error})"))
                })?;
                Provider::Local(read?)
            }
            #[cfg(not(feature = "local-embeddings"))]
            ProviderSettings::Local(_) => {
                return Err(misconfigured(
                    "this build has no sentence models: use one with the feature local-embeddings, or another \
                     embedding_provider",
                ));
            }
            ProviderSettings::Remote(service) => Provider::Remote(Box::new(Remote::new(service, dimensions)?)),
        };
        let embedder = Self {
            provider,
            patience: settings.timeout,
        };
        if embedder.dimensions() != dimensions {
            return Err(misconfigured(format!(
                "the model {} has {} dimensions and embedding_dimensions says {dimensions}: set it to the model's, and \
                 where the schema has other vectors, run `p2p-sync-proxy schema reembed`",
                embedder.model(),
                embedder.dimensions(),
            )));
        }
        Ok(Some(embedder))
    }

    /// Which model's the vectors are: those of different models do not compare. Stays the same across versions.
    pub fn model(&self) -> &str {
        match &self.provider {
            Provider::Lexical(_) => lexical::NAME,
            #[cfg(feature = "local-embeddings")]
            Provider::Local(local) => local.name(),
            Provider::Remote(remote) => remote.model(),
        }
    }

    /// Numbers in a vector.
    pub fn dimensions(&self) -> usize {
        match &self.provider {
            Provider::Lexical(lexical) => lexical.dimensions(),
            #[cfg(feature = "local-embeddings")]
            Provider::Local(local) => local.dimensions(),
            Provider::Remote(remote) => remote.dimensions(),
        }
    }

    /// How long a call takes at most, repetitions included.
    pub fn patience(&self) -> Duration {
        self.patience
    }

    /// What one call may be given.
    pub fn bounds(&self) -> Bounds {
        match &self.provider {
            Provider::Lexical(_) => lexical::BOUNDS,
            #[cfg(feature = "local-embeddings")]
            Provider::Local(local) => local.bounds(),
            Provider::Remote(remote) => remote.bounds(),
        }
    }

    /// A vector for each text, in their order, each of [`Self::dimensions`] finite numbers and of length 1.
    ///
    /// Ends within `embedding_timeout_ms`, repetitions included. Dropping the future gives up.
    pub async fn embed(&self, texts: &[String]) -> Result<Vec<Vec<f32>>, EmbedError> {
        self.bounds().check(texts)?;
        let deadline = Instant::now() + self.patience;
        let asked = async {
            match &self.provider {
                Provider::Lexical(lexical) => Ok(texts.iter().map(|text| lexical.embed(text)).collect()),
                #[cfg(feature = "local-embeddings")]
                Provider::Local(local) => local.embed(texts).await,
                Provider::Remote(remote) => remote.embed(texts, deadline).await,
            }
        };
        let vectors = timeout_at(deadline, asked).await.unwrap_or_else(|_| {
            Err(EmbedError::Unavailable {
                reason: format!("no answer within {} ms", self.patience.as_millis()),
                retry_after: None,
            })
        })?;
        checked(vectors, texts.len(), self.dimensions())
    }

    /// Embeds one sentence, so that whoever set this up hears at once what is wrong; with a provider outside it is asked.
    pub async fn probe(&self) -> Result<Duration, Problem> {
        let began = Instant::now();
        let probed = self.embed(&[PROBE.to_owned()]).await;
        probed.map(|_| began.elapsed()).map_err(|error| error.for_operator())
    }
}

impl Bounds {
    /// `EmbedError::Empty`, `TooLong` or `TooMany` where a call may not be given these.
    pub fn check(&self, texts: &[String]) -> Result<(), EmbedError> {
        let bytes: usize = texts.iter().map(String::len).sum();
        if texts.len() > self.texts_max || bytes > self.batch_bytes_max.max(self.text_bytes_max) {
            return Err(EmbedError::TooMany {
                texts_max: self.texts_max,
                bytes_max: self.batch_bytes_max,
            });
        }
        for (index, text) in texts.iter().enumerate() {
            if text.trim().is_empty() {
                return Err(EmbedError::Empty { index });
            }
            if text.len() > self.text_bytes_max {
                return Err(EmbedError::TooLong {
                    index,
                    bytes: text.len(),
                    bytes_max: self.text_bytes_max,
                });
            }
        }
        Ok(())
    }
}

/// Holds a provider to its word, and gives every vector the length 1, so that cosine and inner product agree.
fn checked(mut vectors: Vec<Vec<f32>>, texts: usize, dimensions: usize) -> Result<Vec<Vec<f32>>, EmbedError> {
    if vectors.len() != texts {
        let told = format!("{} vectors came for {texts} texts", vectors.len());
        return Err(EmbedError::BadAnswer(told));
    }
    for vector in &mut vectors {
        if vector.len() != dimensions {
            let told = format!(
                "a vector came with {} dimensions instead of {dimensions}: check embedding_model and \
                 embedding_dimensions",
                vector.len()
            );
            return Err(EmbedError::BadAnswer(told));
        }
        // In f64: squares of large numbers leave the range of f32.
        let length = vector.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        // No number, too, when one of them is none.
        if !length.is_finite() || length == 0.0 {
            let told = "a vector came that is zero or holds numbers that are not finite".to_owned();
            return Err(EmbedError::BadAnswer(told));
        }
        for x in vector {
            #[expect(clippy::cast_possible_truncation, reason = "a component of a vector of length 1")]
            let scaled = (f64::from(*x) / length) as f32;
            *x = scaled;
        }
    }
    Ok(vectors)
}

fn misconfigured(sentence: impl Into<String>) -> Problem {
    Problem::new(Code::BadEmbeddingProvider, sentence)
}

#[cfg(test)]
mod tests;
