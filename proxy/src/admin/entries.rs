//! `PUT`, `GET` and `DELETE /v1/embeddings/{id}`: what a tool keeps under an id of its own, found by searches like all else.

use std::sync::Arc;

use axum::{
    Router,
    body::Body,
    extract::{Path, State, rejection::PathRejection},
    http::StatusCode,
    response::{IntoResponse as _, Response},
    routing::put,
};
use p2p_sync_proto::{Code, Problem, path::HUB_EMBEDDINGS};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::{
    body::{self, Numbers},
    openai::check_model,
    status::{Refusal, answer},
};
use crate::{embed::Kept, pipeline::Hub};

const PARAMS: [(Code, &str); 8] = [
    (Code::EmptyText, "text"),
    (Code::TextTooLong, "text"),
    (Code::TextRefused, "text"),
    (Code::BadText, "text"),
    (Code::WrongDimensions, "embedding"),
    (Code::NotFinite, "embedding"),
    (Code::BadMap, "map"),
    (Code::BadPath, "id"),
];

type Id = Result<Path<String>, PathRejection>;

pub(super) fn routes() -> Router<Arc<Hub>> {
    let methods = put(replace).get(show).delete(delete);
    Router::new().route("/v1/embeddings/{id}", methods)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Put {
    text: Option<String>,
    embedding: Option<Numbers>,
    /// Of the embedding.
    model: Option<String>,
    #[serde(default)]
    map: String,
    metadata: Option<Box<RawValue>>,
}

#[derive(Serialize)]
struct Done<'a> {
    id: &'a str,
    path: String,
    created: bool,
}

#[derive(Serialize)]
struct Shown<'a> {
    id: &'a str,
    path: String,
    text: Option<String>,
    map: String,
    metadata: Option<Box<RawValue>>,
    model: String,
    embedding: Vec<f32>,
    put_at_ms: u64,
}

async fn replace(State(hub): State<Arc<Hub>>, id: Id, body: Body) -> Result<Response, Refusal> {
    let id = checked(id)?;
    let put: Put = body::json(body).await?;
    if let (Some(embedder), Some(model)) = (hub.embeddings.embedder(), &put.model) {
        check_model(embedder, model)?;
    }
    let kept = Kept {
        text: put.text,
        vector: put.embedding.map(|Numbers(vector)| vector),
        map: put.map,
        // `null` is none.
        metadata: put
            .metadata
            .map(|json| json.get().to_owned())
            .filter(|json| json != "null"),
    };
    let created = hub.embeddings.put(&hub.store, &id, kept).await;
    let created = created.map_err(|problem| Refusal::among(problem, &PARAMS))?;
    let status = if created { StatusCode::CREATED } else { StatusCode::OK };
    let done = Done {
        path: path(&id),
        id: &id,
        created,
    };
    Ok(answer(status, super::written(&done)?))
}

async fn show(State(hub): State<Arc<Hub>>, id: Id) -> Result<Response, Refusal> {
    let id = checked(id)?;
    let entry = hub.embeddings.get(&hub.store, &id).await;
    let entry = entry.map_err(|problem| Refusal::among(problem, &PARAMS))?;
    let shown = Shown {
        path: path(&id),
        id: &id,
        text: Some(entry.text).filter(|text| !text.is_empty()),
        map: entry.map,
        metadata: entry.metadata.and_then(|json| RawValue::from_string(json).ok()),
        model: entry.model,
        embedding: entry.vector,
        put_at_ms: entry.put_at_ms,
    };
    Ok(answer(StatusCode::OK, super::written(&shown)?))
}

async fn delete(State(hub): State<Arc<Hub>>, id: Id) -> Result<Response, Refusal> {
    let id = checked(id)?;
    let deleted = hub.embeddings.delete(&hub.store, &id).await;
    deleted.map_err(|problem| Refusal::among(problem, &PARAMS))?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

fn checked(id: Id) -> Result<String, Refusal> {
    let bad = |_| {
        Refusal::of(
            "id",
            Problem::new(Code::BadPath, "the id in the path is not UTF-8: write it so, in %xx"),
        )
    };
    id.map(|Path(id)| id).map_err(bad)
}

fn path(id: &str) -> String {
    format!("{HUB_EMBEDDINGS}{id}")
}
