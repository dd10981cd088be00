//! One request to a provider and its answer: bounded, no redirect followed, and every failure sorted by what helps.

use std::{
    error::Error,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use async_openai::{error::OpenAIError, middleware::HttpRequestFactory, types::embeddings::CreateEmbeddingResponse};
use p2p_sync_proto::Problem;
use reqwest::{Response, StatusCode, Url, header::HeaderMap, redirect};
use serde::Deserialize;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto::ring};
use tonic::codegen::{Service as Layer, http};

use super::{BOUNDS, EmbedError, RemoteSettings, Service};
use crate::{embed::misconfigured, secret::Secret};

/// Where a key travels.
const KEY_HEADERS: [&str; 2] = ["authorization", "api-key"];
/// For the way there; the whole has its own bound.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// JSON of one number of a vector, generously; and of what is around all vectors.
const NUMBER_BYTES_MAX: usize = 32;
const FRAME_BYTES_MAX: usize = 64 * 1024;
/// What is read of an answer that says why there is none.
const REFUSAL_BYTES_MAX: usize = 16 * 1024;
/// Of a provider's own words, in characters.
const WORDS_SHOWN_MAX: usize = 300;
/// As much of a key in a row gives it away.
const KEY_PART_BYTES: usize = 6;
/// A provider that wants to be left alone longer than this is asked all the same.
const RETRY_AFTER_MAX: Duration = Duration::from_hours(1);
/// After a 429 that does not say when.
const RETRY_AFTER_DEFAULT: Duration = Duration::from_secs(1);

/// The way to a provider.
#[derive(Clone)]
pub(super) struct Transport {
    http: reqwest::Client,
    shared: Arc<Shared>,
}

struct Shared {
    api_key: Secret,
    is_azure: bool,
    answer_bytes_max: usize,
}

impl Transport {
    pub(super) fn new(settings: &RemoteSettings, dimensions: usize) -> Result<Self, Problem> {
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(tls(&settings.base_url)?)
            .connect_timeout(CONNECT_TIMEOUT)
            // A key is for whom it was given, and for nobody whom they name.
            .redirect(redirect::Policy::none())
            .user_agent(concat!("p2p-sync-proxy/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| misconfigured(format!("no client can be made ({})", root_cause(&error))))?;
        Ok(Self {
            http,
            shared: Arc::new(Shared {
                api_key: settings.api_key.clone(),
                is_azure: settings.service != Service::OpenAi,
                answer_bytes_max: BOUNDS.texts_max * dimensions * NUMBER_BYTES_MAX + FRAME_BYTES_MAX,
            }),
        })
    }

    pub(super) fn http(&self) -> reqwest::Client {
        self.http.clone()
    }

    async fn send(self, request: HttpRequestFactory) -> Result<Response, OpenAIError> {
        let mut request = request.build().await?;
        for name in KEY_HEADERS {
            if self.shared.api_key.expose().is_empty() {
                request.headers_mut().remove(name);
            } else if let Some(value) = request.headers_mut().get_mut(name) {
                // No `Debug` and no log of the layers below shows it.
                value.set_sensitive(true);
            }
        }
        self.answer(request)
            .await
            .map_err(|error| OpenAIError::Boxed(Box::new(error)))
    }

    async fn answer(&self, request: reqwest::Request) -> Result<Response, EmbedError> {
        let mut response = self.http.execute(request).await.map_err(|error| unreachable(&error))?;
        let status = response.status();
        if !status.is_success() {
            // Cut off, it says nothing more than the status.
            let words = read(&mut response, REFUSAL_BYTES_MAX).await.unwrap_or_default();
            return Err(self.shared.refusal(status, response.headers(), &words));
        }
        let bytes = read(&mut response, self.shared.answer_bytes_max).await?;
        // async-openai logs whole what it cannot read.
        if let Err(error) = serde_json::from_slice::<CreateEmbeddingResponse>(&bytes) {
            let kind = error.classify();
            return Err(EmbedError::BadAnswer(format!(
                "{kind:?} error in its JSON, at byte {} of {}",
                error.column(),
                bytes.len()
            )));
        }
        Ok(http::Response::new(bytes).into())
    }
}

impl Layer<HttpRequestFactory> for Transport {
    type Response = Response;
    type Error = OpenAIError;
    type Future = Pin<Box<dyn Future<Output = Result<Response, OpenAIError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), OpenAIError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: HttpRequestFactory) -> Self::Future {
        Box::pin(self.clone().send(request))
    }
}

/// The machine's own authorities, and ring as everywhere here.
fn tls(base_url: &str) -> Result<ClientConfig, Problem> {
    let mut roots = RootCertStore::empty();
    if base_url.starts_with("https:") {
        let found = rustls_native_certs::load_native_certs();
        roots.add_parsable_certificates(found.certs);
        if roots.is_empty() {
            return Err(misconfigured(
                "this machine knows no certificate authorities, and so no provider: install its package ca-certificates",
            ));
        }
    }
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| misconfigured(format!("TLS cannot be set up ({error})")))?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}

/// Reads a body to its end, which has to come within a bound.
async fn read(response: &mut Response, bytes_max: usize) -> Result<Vec<u8>, EmbedError> {
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|error| unreachable(&error))? {
        if bytes.len() + chunk.len() > bytes_max {
            return Err(EmbedError::BadAnswer(format!("it has more than {bytes_max} bytes")));
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

fn unreachable(error: &reqwest::Error) -> EmbedError {
    EmbedError::Unavailable {
        reason: root_cause(error),
        retry_after: None,
    }
}

/// What lies at the bottom of an error; what is above it repeats addresses.
fn root_cause(error: &dyn Error) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}

/// How providers say why not.
#[derive(Default, Deserialize)]
struct Refusal {
    error: Reason,
}

#[derive(Default, Deserialize)]
struct Reason {
    #[serde(default)]
    message: String,
    #[serde(default)]
    code: Option<serde_json::Value>,
}

impl Shared {
    fn refusal(&self, status: StatusCode, headers: &HeaderMap, body: &[u8]) -> EmbedError {
        let Reason { message, code } = serde_json::from_slice::<Refusal>(body).unwrap_or_default().error;
        let code = code.as_ref().and_then(serde_json::Value::as_str).unwrap_or_default();
        let number = status.as_u16();
        let words = || self.shown(&message);
        match number {
            429 if code == "insufficient_quota" => {
                EmbedError::Refused("its quota is used up: look at the plan and the bill there".to_owned())
            }
            429 => EmbedError::RateLimited {
                retry_after: retry_after(headers).unwrap_or(RETRY_AFTER_DEFAULT),
            },
            // What is said of a wrong key repeats parts of it.
            401 | 403 => EmbedError::Refused(format!(
                "it does not take the key (HTTP {number}): check embedding_api_key, and that embedding_base_url is whom it \
                 is for"
            )),
            404 => {
                let checked = if self.is_azure {
                    "embedding_deployment, embedding_api_version"
                } else {
                    "embedding_model"
                };
                EmbedError::Refused(format!(
                    "it has no such thing (HTTP 404{}): check {checked} and embedding_base_url",
                    words()
                ))
            }
            400 | 413 | 422 => EmbedError::NotTaken(format!("HTTP {number}{}", words())),
            300..=399 => EmbedError::Refused(format!(
                "it sends elsewhere (HTTP {number}), where no key is taken: set embedding_base_url to the right place"
            )),
            408 | 409 | 425 | 500..=599 => EmbedError::Unavailable {
                reason: format!("HTTP {number}"),
                retry_after: retry_after(headers),
            },
            _ => EmbedError::Refused(format!("HTTP {number}{}: check embedding_base_url", words())),
        }
    }

    /// A provider's words, if there are any and they do not give the key away.
    fn shown(&self, message: &str) -> String {
        let key = self.api_key.expose().as_bytes();
        let part = KEY_PART_BYTES.min(key.len());
        let gives_away = part > 0
            && key
                .windows(part)
                .any(|part| message.as_bytes().windows(part.len()).any(|said| said == part));
        if message.is_empty() || gives_away {
            return String::new();
        }
        let plain = message
            .chars()
            .map(|letter| if letter.is_control() { ' ' } else { letter });
        format!(": {}", plain.take(WORDS_SHOWN_MAX).collect::<String>())
    }
}

/// How long to leave a provider alone: in milliseconds, as Azure says it, in seconds, or as a date.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = |name| headers.get(name)?.to_str().ok().map(str::trim);
    let in_ms = text("retry-after-ms").and_then(|ms| Some(ms.parse::<f64>().ok()? / 1000.0));
    let in_seconds = || text("retry-after")?.parse::<f64>().ok();
    let at_date = || {
        let date = httpdate::parse_http_date(text("retry-after")?).ok()?;
        Some(date.duration_since(SystemTime::now()).unwrap_or_default().as_secs_f64())
    };
    let seconds = in_ms.or_else(in_seconds).or_else(at_date)?;
    let seconds = Some(seconds).filter(|seconds| *seconds >= 0.0)?;
    Some(Duration::try_from_secs_f64(seconds).map_or(RETRY_AFTER_MAX, |wait| wait.min(RETRY_AFTER_MAX)))
}

/// Whether a URL can be asked, and a key sent there.
pub(crate) fn check_base_url(text: &str, has_key: bool) -> Result<(), &'static str> {
    let url = Url::parse(text).map_err(|_| "expected a URL, e.g. https://api.openai.com/v1")?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        return Err("expected a URL that begins with https:// or http://");
    }
    if !url.username().is_empty() || url.password().is_some() || url.query().is_some() || url.fragment().is_some() {
        return Err("leave out user, password, ? and #: the key is embedding_api_key");
    }
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    let is_loopback = host == "localhost"
        || host
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback());
    if has_key && url.scheme() == "http" && !is_loopback {
        return Err("a key sent by http:// can be read on the way: use https://");
    }
    Ok(())
}
