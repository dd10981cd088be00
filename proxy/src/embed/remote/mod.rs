//! Vectors from a server: OpenAI, Azure OpenAI, or whatever speaks as they do.
//!
//! The protocol is async-openai's; what happens on the way is [`transport`]'s, for async-openai's own waits as long as a
//! server says, and reads as much as a server sends.

mod transport;

use std::{
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_openai::{
    Client,
    config::{AzureConfig, Config, OpenAIConfig},
    error::OpenAIError,
    types::embeddings::{CreateEmbeddingRequest, EmbeddingInput},
};
use p2p_sync_proto::Problem;
use tokio::time::{Instant, sleep_until};

use super::{Bounds, EmbedError, RemoteSettings, Service};
use transport::Transport;
pub(crate) use transport::check_base_url;

/// Every provider takes as much: OpenAI 2048 texts and 300,000 tokens, and no token has less than a byte.
const BOUNDS: Bounds = Bounds {
    texts_max: 64,
    text_bytes_max: 32 * 1024,
    batch_bytes_max: 256 * 1024,
    tokens_max: None,
};
/// Of OpenAI's models.
const OPENAI_TOKENS_MAX: usize = 8192;
/// How OpenAI's models are called that take the number of dimensions; servers that do not know it may refuse it.
const TAKES_DIMENSIONS: &str = "text-embedding-3";
/// How often one call asks.
const ATTEMPTS_MAX: u32 = 4;
/// Before the second attempt, where the provider does not say; doubled for each further one.
const BACKOFF: Duration = Duration::from_millis(250);

/// A server that makes vectors.
pub(super) struct Remote {
    client: Client<Box<dyn Config>>,
    model: String,
    dimensions: usize,
    /// Before this nobody asks: the provider said so, or is in trouble.
    pause: Mutex<Pause>,
}

#[derive(Clone)]
struct Pause {
    until: Instant,
    reason: EmbedError,
}

impl Remote {
    pub(super) fn new(settings: &RemoteSettings, dimensions: usize) -> Result<Self, Problem> {
        let transport = Transport::new(settings, dimensions)?;
        // Of no use but to be there: requests go through the transport.
        let client = Client::build(transport.http(), endpoint(settings));
        Ok(Self {
            client: client.with_http_service(transport),
            model: settings.model.clone(),
            dimensions,
            pause: Mutex::new(Pause {
                until: Instant::now(),
                reason: EmbedError::BadAnswer(String::new()),
            }),
        })
    }

    pub(super) fn model(&self) -> &str {
        &self.model
    }

    pub(super) fn dimensions(&self) -> usize {
        self.dimensions
    }

    pub(super) fn bounds(&self) -> Bounds {
        Bounds {
            tokens_max: self.model.starts_with("text-embedding-").then_some(OPENAI_TOKENS_MAX),
            ..BOUNDS
        }
    }

    /// Asks, and asks again where that may help and there is time until the deadline.
    pub(super) async fn embed(&self, texts: &[String], deadline: Instant) -> Result<Vec<Vec<f32>>, EmbedError> {
        let mut attempt = 0;
        loop {
            let pause = self.pause().clone();
            if pause.until > deadline {
                return Err(pause.reason.later(pause.until - Instant::now()));
            }
            sleep_until(pause.until).await;
            attempt += 1;
            match self.ask(texts).await {
                Err(error) if error.passes() => {
                    let wait = error.retry_after().unwrap_or(BACKOFF * (1 << (attempt - 1)));
                    // Proxies that were turned away together do not come back together.
                    let wait = wait.mul_f64(1.0 + fastrand::f64() / 4.0);
                    let until = Instant::now() + wait;
                    let mut pause = self.pause();
                    pause.until = pause.until.max(until);
                    pause.reason = error.clone();
                    drop(pause);
                    tracing::debug!(%error, ?wait, attempt, "the provider of embeddings is asked again later");
                    if attempt == ATTEMPTS_MAX {
                        return Err(error.later(wait));
                    }
                }
                decided => return decided,
            }
        }
    }

    fn pause(&self) -> MutexGuard<'_, Pause> {
        self.pause.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn ask(&self, texts: &[String]) -> Result<Vec<Vec<f32>>, EmbedError> {
        let takes_dimensions = self.model.starts_with(TAKES_DIMENSIONS);
        let request = CreateEmbeddingRequest {
            model: self.model.clone(),
            input: EmbeddingInput::StringArray(texts.to_vec()),
            encoding_format: None,
            user: None,
            dimensions: u32::try_from(self.dimensions).ok().filter(|_| takes_dimensions),
        };
        let mut answer = self.client.embeddings().create(request).await.map_err(told)?;
        answer.data.sort_by_key(|embedding| embedding.index);
        let indexes = answer.data.iter().map(|embedding| embedding.index as usize);
        if !indexes.eq(0..texts.len()) {
            let sentence = format!(
                "{} vectors came for {} texts, or wrongly numbered",
                answer.data.len(),
                texts.len()
            );
            return Err(EmbedError::BadAnswer(sentence));
        }
        Ok(answer.data.into_iter().map(|embedding| embedding.embedding).collect())
    }
}

impl EmbedError {
    /// The same, with when to ask again.
    fn later(self, wait: Duration) -> Self {
        match self {
            Self::Unavailable { reason, .. } => Self::Unavailable {
                reason,
                retry_after: Some(wait),
            },
            Self::RateLimited { .. } => Self::RateLimited { retry_after: wait },
            other => other,
        }
    }
}

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Remote")
            .field("url", &self.client.config().api_base())
            .field("model", &self.model)
            .finish_non_exhaustive()
    }
}

/// The transport's own word where it has one. Others repeat what a server said, which may be anything.
fn told(error: OpenAIError) -> EmbedError {
    match error {
        OpenAIError::Boxed(error) => match error.downcast() {
            Ok(known) => *known,
            Err(_) => EmbedError::BadAnswer("the request could not be made".to_owned()),
        },
        _ => EmbedError::BadAnswer("it is not of the protocol".to_owned()),
    }
}

/// Where it is and how it is asked. Everything is set: async-openai takes what is left out from OPENAI_* in the environment.
fn endpoint(settings: &RemoteSettings) -> Box<dyn Config> {
    let (base_url, key) = (&settings.base_url, settings.api_key.expose());
    match &settings.service {
        Service::OpenAi => Box::new(
            OpenAIConfig::new()
                .with_api_base(base_url)
                .with_api_key(key)
                .with_org_id("")
                .with_project_id(""),
        ),
        Service::Azure {
            deployment,
            api_version,
        } => Box::new(
            AzureConfig::new()
                .with_api_base(base_url)
                .with_api_key(key)
                .with_deployment_id(deployment)
                .with_api_version(api_version),
        ),
    }
}
