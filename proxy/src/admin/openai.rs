//! `POST /v1/embeddings`, as OpenAI has it: whoever speaks to OpenAI speaks to the hub.

use std::sync::Arc;

use axum::{Router, body::Body, extract::State, http::StatusCode, response::Response, routing::post};
use p2p_sync_proto::{Code, Problem};
use serde::{Deserialize, Serialize, de::IgnoredAny};

use super::{
    body::{self, Numbers, Texts},
    status::{Refusal, answer},
};
use crate::{
    embed::{Caller, Embedder, text::tokens},
    pipeline::Hub,
};

const PARAMS: [(Code, &str); 4] = [
    (Code::EmptyText, "input"),
    (Code::TextTooLong, "input"),
    (Code::TextRefused, "input"),
    (Code::TooLarge, "input"),
];

pub(super) fn routes() -> Router<Arc<Hub>> {
    Router::new().route("/v1/embeddings", post(create))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Create {
    input: Texts,
    model: String,
    #[serde(default)]
    encoding_format: Format,
    dimensions: Option<u64>,
    /// OpenAI's, for whose sake it asks. There is nobody here to tell.
    #[serde(rename = "user")]
    _user: Option<IgnoredAny>,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Format {
    #[default]
    Float,
    Base64,
}

#[derive(Serialize)]
struct Created<'a> {
    object: &'static str,
    data: Vec<One>,
    model: &'a str,
    usage: Usage,
}

#[derive(Serialize)]
struct One {
    object: &'static str,
    index: usize,
    embedding: Written,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Written {
    Float(Vec<f32>),
    Base64(String),
}

/// As the hub counts tokens: a provider's own count is not known where a text was embedded before.
#[derive(Serialize)]
struct Usage {
    prompt_tokens: u64,
    total_tokens: u64,
}

async fn create(State(hub): State<Arc<Hub>>, body: Body) -> Result<Response, Refusal> {
    let create: Create = body::json(body).await?;
    let Some(embedder) = hub.embeddings.embedder() else {
        let sentence = "this hub serves no embeddings: set embedding_provider";
        return Err(Problem::new(Code::Unsupported, sentence).into());
    };
    check_model(embedder, &create.model)?;
    let dimensions = embedder.dimensions();
    if create
        .dimensions
        .is_some_and(|asked| usize::try_from(asked) != Ok(dimensions))
    {
        let sentence = format!("this hub's embeddings have {dimensions} numbers, and no others: leave dimensions out");
        return Err(Refusal::of("dimensions", Problem::new(Code::WrongDimensions, sentence)));
    }
    let texts = create.input.0;
    let vectors = hub.embeddings.create(&hub.store, Caller::Tool, &texts).await;
    let vectors = vectors.map_err(|problem| Refusal::among(problem, &PARAMS))?;
    let total_tokens = texts.iter().map(|text| tokens(text)).sum();
    let one = |(index, vector)| One {
        object: "embedding",
        index,
        embedding: match create.encoding_format {
            Format::Float => Written::Float(vector),
            Format::Base64 => Written::Base64(Numbers::base64(&vector)),
        },
    };
    let created = Created {
        object: "list",
        data: vectors.into_iter().enumerate().map(one).collect(),
        model: embedder.model(),
        usage: Usage {
            prompt_tokens: total_tokens,
            total_tokens,
        },
    };
    Ok(answer(StatusCode::OK, super::written(&created)?))
}

/// Vectors of two models do not compare: who asks for another one would not notice.
pub(super) fn check_model(embedder: &Embedder, asked: &str) -> Result<(), Refusal> {
    let model = embedder.model();
    if asked == model {
        return Ok(());
    }
    let sentence = format!("this hub has no model {asked:?}: ask for {model:?}, whose all of its embeddings are");
    Err(Refusal::of("model", Problem::new(Code::NotFound, sentence)))
}
