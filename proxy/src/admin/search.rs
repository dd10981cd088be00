//! `POST /v1/embeddings/search`: what lies nearest to a text or a vector.

use std::sync::Arc;

use axum::{Router, body::Body, extract::State, http::StatusCode, response::Response, routing::post};
use p2p_sync_proto::{Code, Path, Problem, path::HUB_EMBEDDINGS, policy::parse_type, v1::SyncDataType};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::{
    body::{self, Numbers},
    status::{Refusal, answer},
};
use crate::{
    embed::{Caller, Near, Query},
    pipeline::Hub,
    store::Found,
};

/// Hits where a search does not say how many.
const LIMIT: u32 = 10;

const PARAMS: [(Code, &str); 6] = [
    (Code::EmptyText, "text"),
    (Code::TextTooLong, "text"),
    (Code::TextRefused, "text"),
    (Code::WrongDimensions, "embedding"),
    (Code::NotFinite, "embedding"),
    (Code::BadMap, "maps"),
];

pub(super) fn routes() -> Router<Arc<Hub>> {
    Router::new().route("/v1/embeddings/search", post(search))
}

/// What hosts ask in the same words, with `prefix` besides.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Sought {
    text: Option<String>,
    embedding: Option<Numbers>,
    limit: Option<u32>,
    #[serde(default)]
    maps: Vec<String>,
    #[serde(default)]
    types: Vec<String>,
    prefix: Option<String>,
    #[serde(default)]
    since_ms: u64,
    #[serde(default)]
    until_ms: u64,
    min_similarity: Option<f32>,
}

#[derive(Serialize)]
struct Hits {
    hits: Vec<Hit>,
}

#[derive(Serialize)]
struct Hit {
    path: String,
    /// Within its map, or a tool's own.
    id: Option<String>,
    #[serde(rename = "type")]
    data_type: &'static str,
    map: String,
    account_id: u32,
    text: String,
    similarity: f32,
    received_at_ms: u64,
    stream_sequence: u64,
    metadata: Option<Box<RawValue>>,
}

async fn search(State(hub): State<Arc<Hub>>, body: Body) -> Result<Response, Refusal> {
    let sought: Sought = body::json(body).await?;
    let near = match (sought.text, sought.embedding) {
        (Some(text), None) => Near::Text(text),
        (None, Some(Numbers(vector))) => Near::Vector(vector),
        (Some(_), Some(_)) | (None, None) => {
            let sentence = "a search is near to a text or to an embedding: give one of them";
            return Err(Problem::new(Code::BadRequest, sentence).into());
        }
    };
    if sought.limit == Some(0) {
        let sentence = "a search has at least one hit: leave limit out, or raise it";
        return Err(Refusal::of("limit", Problem::new(Code::BadRequest, sentence)));
    }
    let types: Result<_, Problem> = sought.types.iter().map(|name| parse_type(name)).collect();
    let query = Query {
        limit: sought.limit.unwrap_or(LIMIT),
        maps: sought.maps,
        types: types.map_err(|problem| Refusal::of("types", problem))?,
        prefix: sought.prefix.filter(|prefix| !prefix.is_empty()),
        since_ms: sought.since_ms,
        until_ms: sought.until_ms,
        similarity_min: sought.min_similarity,
        ..Query::near(near)
    };
    let found = hub.embeddings.search(&hub.store, Caller::Tool, query).await;
    let found = found.map_err(|problem| Refusal::among(problem, &PARAMS))?;
    let hits = found.into_iter().map(hit).collect();
    Ok(answer(StatusCode::OK, super::written(&Hits { hits })?))
}

fn hit(found: Found) -> Hit {
    let path = Path::parse(&found.path).ok();
    let id = path.as_ref().and_then(|path| path.parts().entity);
    let id = id.or_else(|| found.path.strip_prefix(HUB_EMBEDDINGS));
    let data_type = SyncDataType::try_from(i32::from(found.data_type)).unwrap_or_default();
    Hit {
        id: id.map(str::to_owned),
        data_type: data_type.as_str_name(),
        map: found.map,
        account_id: found.account_id,
        text: found.text,
        similarity: found.similarity,
        received_at_ms: found.received_at_ms,
        stream_sequence: found.stream_sequence,
        metadata: found.metadata.and_then(|json| RawValue::from_string(json).ok()),
        path: found.path,
    }
}
